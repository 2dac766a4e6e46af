"""Training objectives, one file a method. A room's file imports core and its room's `_` modules."""
