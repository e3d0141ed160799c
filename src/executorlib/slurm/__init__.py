"""Slurm: jobs by its commands, and all nodes of an allocation."""
