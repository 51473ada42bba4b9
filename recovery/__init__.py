"""What to do when something breaks."""
