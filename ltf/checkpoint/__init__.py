"""Checkpoints: written in the background, verified before they are read, never fewer than two."""
