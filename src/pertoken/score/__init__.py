"""Scorers: what gives the tokens of a trace their credit. One file a method; the catalog names them."""
