"""Running one command on many nodes: ours beside what a user would pick instead."""
