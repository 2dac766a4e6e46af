"""Decoders: what draws tokens under guidance, constraints or control. One file a method; the catalog names them."""
