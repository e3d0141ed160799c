"""The languages of queuing systems, by the ``queue_type`` of a pysqa configuration.

Each is named by text here, even those in the folders above this one, so that only the languages in use are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from executorlib.jobs.queue import Queue

LANGUAGES = {
    "SLURM": "executorlib.slurm.queue:SlurmQueue",
    "SGE": "executorlib.jobs.pysqa:PysqaQueue",
    "TORQUE": "executorlib.jobs.pysqa:PysqaQueue",
    "LSF": "executorlib.jobs.pysqa:PysqaQueue",
    "PBS": "executorlib.jobs.pbs:PbsQueue",
}
# The system of executors without a configuration.
DEFAULT = "SLURM"


def language(queue_type: str) -> type[Queue]:
    """Load the language of a type of queuing system, a key of `LANGUAGES`."""
    module, _, name = LANGUAGES[queue_type].partition(":")
    return cast("type[Queue]", getattr(importlib.import_module(module), name))
