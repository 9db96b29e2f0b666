"""The embedded default: a small world of real audio, and two small models that were pretrained on it."""
