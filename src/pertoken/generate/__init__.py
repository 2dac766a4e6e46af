"""Decoders: what draws text from a model, steered. One file a method; the catalog names them."""
