"""One connection for each node, and many workers behind it."""
