"""PBS Professional as a queuing system."""
