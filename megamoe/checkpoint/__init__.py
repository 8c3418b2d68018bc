"""Checkpoints: writing, verifying, reading, resharding, exporting."""
