"""What a call is named by in the cache: its function, all that this reaches, and its inputs."""
