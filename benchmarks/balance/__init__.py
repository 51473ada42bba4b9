"""Static against measured division of micro-batches, one rank slowed."""
