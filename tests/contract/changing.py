"""Objects that change while they are looked at, for workers, which import this without pytest."""

from __future__ import annotations

from typing import Any

from contract.functions import append


class Changing:
    """An argument that another thread changes: to each that looks at it, it is the next of these values.

    A session looks at a call's arguments when it looks the call up, and as it pickles them; where calls are jobs, it
    makes sure then that they are still the same.
    """

    def __init__(self, *values: str) -> None:
        self.values = list(values)

    def __reduce__(self) -> Any:
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return Changing, (value,)


def see(log: str, changing: Changing) -> str:
    """Return the argument as the process that runs the call sees it."""
    value = changing.values[0]
    append(log, value)
    return value


class Counting:
    """A result that a thread of the function goes on changing: pickled again, it is another one."""

    pickled = 0

    def __reduce__(self) -> Any:
        self.pickled += 1
        return int, (self.pickled,)
