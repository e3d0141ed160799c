"""Futures: what they are, as inputs of calls, and made from each other."""
