"""The room of tokenization: what the tokens are, changed on ids alone."""
