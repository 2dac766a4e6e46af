"""The room of decoders: control over what is generated, token by token."""
