"""Flux: calls and workers as jobs of an instance, over one connection to it."""
