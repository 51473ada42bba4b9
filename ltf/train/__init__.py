"""The training run: parts made from a configuration, step after step, and what is decided about them."""
