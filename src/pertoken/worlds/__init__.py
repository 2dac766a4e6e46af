"""Small tasks whose truth is known, built from packages alone: imported by cli, examples and tests, never by rooms."""
