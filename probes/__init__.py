"""What a healthy node is."""
