"""The names of calls in the cache, derived from the function, everything it reaches, and the inputs."""
