"""The model: a decoder with dense or mixture-of-experts layers, its counts, and its form on disk."""
