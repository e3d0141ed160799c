"""Finds the queue that a pysqa configuration is for; without one it is Slurm."""

from __future__ import annotations

from executorlib.jobs.pysqa import PysqaQueue
from executorlib.jobs.templates import Templates
from executorlib.slurm.queue import DEFAULT_TEMPLATE, Settings, SlurmQueue


def open_queue(pysqa_config_directory: str | None, settings: Settings | None = None) -> SlurmQueue | PysqaQueue:
    """The queue of a pysqa configuration, or Slurm if there is none.

    Args:
        pysqa_config_directory: Directory with a ``queue.yaml`` and templates, as pysqa describes them.
        settings: The settings of the cluster, for Slurm.

    Raises:
        ValueError: The configuration cannot be used; the text says why.
        ImportError: A configuration is given, and pysqa is not installed.
    """
    return queue_of(Templates(DEFAULT_TEMPLATE, pysqa_config_directory), settings)


def queue_of(templates: Templates, settings: Settings | None = None) -> SlurmQueue | PysqaQueue:
    """The queue that the templates are for."""
    if templates.queue_type == "SLURM":
        return SlurmQueue(settings, templates)
    return PysqaQueue(templates)
