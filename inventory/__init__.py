"""Who the nodes are, how to reach them, and what state they are in."""
