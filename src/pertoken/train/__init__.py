"""Training objectives, one file a method. They meet through the catalog; a room's file imports core and `_preference`."""
