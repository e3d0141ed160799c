"""The dialects of queuing systems, by the ``queue_type`` of a pysqa configuration.

Each is named by text here, even those in the folders above this one, so that only the dialects in use are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from executorlib.jobs.queue import Dialect

DIALECTS = {
    "SLURM": "executorlib.slurm.queue:SlurmDialect",
    "SGE": "executorlib.jobs.pysqa:PysqaDialect",
    "TORQUE": "executorlib.jobs.pysqa:PysqaDialect",
    "LSF": "executorlib.jobs.pysqa:PysqaDialect",
    "PBS": "executorlib.pbs.queue:PbsDialect",
}
# The system of executors without a configuration.
DEFAULT = "SLURM"


def dialect_of(queue_type: str) -> type[Dialect]:
    """Load the dialect of a type of queuing system, a key of `DIALECTS`."""
    module, _, name = DIALECTS[queue_type].partition(":")
    return cast("type[Dialect]", getattr(importlib.import_module(module), name))
