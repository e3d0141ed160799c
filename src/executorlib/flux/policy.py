"""The limits that a Flux instance's configuration sets for jobs: queues and times (RFC 33). Flux is not asked here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from executorlib.resources import Resources

# Seconds that a job gets beyond the run_time_max of its call: to start, and to report by itself that time is up.
_SPARE_SECONDS = 30.0
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Policy:
    """The queues of an instance, and how long jobs may run there.

    Args:
        config: The configuration, as ``config.get`` answers.

    Attributes:
        queues: Names of the queues; empty if the instance has no named queues.
        default_queue: The queue of jobs that name none; if it is empty, such jobs are refused, unless there are no
            `queues`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.queues = tuple(_at(config, "queues"))
        self.default_queue = str(_at(config, "policy", "jobspec", "defaults", "system").get("queue", ""))

    def queue_of(self, resources: Resources) -> str:
        """The queue that a call goes to; empty if it names none and there is no default."""
        further = resources.template_values
        return str(further.get("queue") or further.get("partition") or self.default_queue)

    def problem(self, resources: Resources, named: bool = True) -> str:
        """Return the reason why a call would be refused; empty if it would not be.

        Args:
            resources: What it needs.
            named: Whether its queue has to be known by now.
        """
        queue = self.queue_of(resources)
        if self.queues and queue not in self.queues and (queue or named):
            said = f"the Flux instance has no queue {queue!r}" if queue else "the Flux instance has no default queue"
            return f"{said}. Name one with resource_dict={{'queue': …}}; the queues are {', '.join(self.queues)}."
        seconds, limit = resources.run_time_max, self._limit(queue)
        if limit and seconds is not None and seconds > limit:
            where = f" for queue {queue!r}" if queue else ""
            return (
                f"run_time_max={seconds:g} is above the limit of {limit:g} s that this Flux instance has{where}. "
                "Ask for less, or name a queue that allows more."
            )
        return ""

    def duration(self, resources: Resources, spare: float = _SPARE_SECONDS) -> float:
        """The duration to ask for, in seconds; 0 for the instance's default, or no limit if it has none.

        Args:
            resources: What the call needs.
            spare: Seconds that the job gets beyond those of the call.
        """
        queue = self.queue_of(resources)
        limit = self._limit(queue)
        if resources.run_time_max is None:
            return 0.0 if self._has_default_duration(queue) else limit
        duration = resources.run_time_max + spare
        return min(duration, limit) if limit else duration

    def _policies(self, queue: str) -> list[Mapping[str, Any]]:
        """The policies that apply to a queue, closest first: its own, that of its parent queue, the general one."""
        own = _at(self._config, "queues", queue)
        parent = _at(self._config, "queues", str(own.get("parent", "")))
        return [_at(each, "policy") for each in (own, parent, self._config)]

    def _limit(self, queue: str) -> float:
        limits = [_at(policy, "limits").get("duration") for policy in self._policies(queue)]
        return next((_seconds(limit) for limit in limits if limit is not None), 0.0)

    def _has_default_duration(self, queue: str) -> bool:
        return any("duration" in _at(policy, "jobspec", "defaults", "system") for policy in self._policies(queue))


def _at(table: Any, *keys: str) -> Mapping[str, Any]:
    """A table within a table; empty if there is none."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else {}


def _seconds(duration: object) -> float:
    """A duration in Flux's notation (RFC 23), such as ``1.5h``, in seconds; 0 if it is unlimited or not understood."""
    found = re.fullmatch(r"([0-9.]+)(ms|s|m|h|d)?", str(duration).strip())
    return float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
