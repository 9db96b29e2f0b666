"""The embedded default: a small world of real audio, and two small models pretrained on it."""
