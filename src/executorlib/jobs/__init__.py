"""Calls and workers as jobs of any queuing system."""
