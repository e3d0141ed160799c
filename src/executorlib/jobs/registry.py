"""The languages of queuing systems, by what the ``queue_type`` of a pysqa configuration calls the system.

A language is loaded when it is first needed, and no other one is. So each is named by text here, also those of the
rooms above this one.
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
# Where there is no configuration.
DEFAULT = "SLURM"


def language(queue_type: str) -> type[Queue]:
    """The language of a type of queuing system, one of `LANGUAGES`."""
    module, _, name = LANGUAGES[queue_type].partition(":")
    return cast("type[Queue]", getattr(importlib.import_module(module), name))
