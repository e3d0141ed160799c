"""Calls, or workers, as jobs of a queuing system, whichever that is."""
