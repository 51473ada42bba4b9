"""A job that comes back by itself: place, start, watch, decide, swap, resume."""
