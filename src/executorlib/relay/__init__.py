"""Relays: one connection to each node, with many workers behind it."""
