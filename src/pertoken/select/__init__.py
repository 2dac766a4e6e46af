"""The room of selectors: which data to train on."""
