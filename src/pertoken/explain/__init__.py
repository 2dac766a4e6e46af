"""The room of explainers: what the tokens say of a model's answer, and what it came from."""
