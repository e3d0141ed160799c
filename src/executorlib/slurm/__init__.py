"""Slurm: jobs through its commands, and workers on all nodes of an allocation."""
