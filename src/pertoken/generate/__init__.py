"""Decoders: one file a method."""
