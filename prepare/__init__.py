"""From what you have to a manifest: importers, text to speech, verbalising, the rating sheet."""
