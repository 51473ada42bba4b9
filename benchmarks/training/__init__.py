"""Tokens a second of a training step, ours beside transformers' own model in a plain loop."""
