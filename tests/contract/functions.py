"""Functions that the tests send to workers; tests and workers signal each other by files.

Every fresh process imports this module, so that it imports little itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# Long enough for a loaded machine, short enough that a worker that is waited for in vain ends.
SECONDS = 15.0


def read(path: str | os.PathLike[str]) -> str:
    with open(path) as file:
        return file.read()


def wait_for(path: str | os.PathLike[str], seconds: float = SECONDS) -> str:
    """Wait until a file is there and return what it holds."""
    give_up = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > give_up:
            raise TimeoutError(f"no file {path} within {seconds:g} s")
        time.sleep(0.002)
    return read(path)


def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until something holds that the executor's own thread brings about."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"not so after {seconds:g} s"
        time.sleep(0.002)


def files(store: str | os.PathLike[str], ending: str) -> list[str]:
    """Files below a directory whose names end so. `Path.rglob` fails where a folder goes while it looks."""
    found = [os.path.join(folder, name) for folder, _, names in os.walk(store) for name in names]
    return sorted(os.path.relpath(path, store) for path in found if path.endswith(ending))


def put(path: str | os.PathLike[str], text: str = "") -> None:
    """Write a file that nobody sees half written."""
    draft = f"{path}.{os.getpid()}.draft"
    with open(draft, "w") as file:
        file.write(text)
    os.replace(draft, path)


def append(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file that several processes write to."""
    with open(path, "a") as log:
        log.write(line + "\n")


def lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines that were appended to a file so far."""
    return read(path).splitlines() if os.path.exists(path) else []


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not os.path.exists("/proc/self")  # macOS has no /proc
    except ProcessLookupError:
        return False


def wait_until_gone(*pids: int, seconds: float = 5.0) -> None:
    """Wait until none of these processes exists."""
    until(lambda: not [pid for pid in pids if alive(pid)], seconds)


@dataclass(frozen=True)
class Gate:
    """A callable that says that it runs and then waits until the test opens the gate."""

    folder: str
    name: str

    def __call__(self, value: Any = None) -> Any:
        put(f"{self.folder}/{self.name}-started-{os.getpid()}")
        wait_for(f"{self.folder}/{self.name}-open")
        return value

    def open(self) -> None:
        """Let all calls through."""
        put(f"{self.folder}/{self.name}-open")

    def pids(self, count: int, seconds: float = SECONDS) -> list[int]:
        """Wait until ``count`` processes are at the gate and return their ids."""
        give_up = time.monotonic() + seconds
        while True:
            names = [
                name
                for name in os.listdir(self.folder)
                if name.startswith(f"{self.name}-started-") and not name.endswith(".draft")
            ]
            if len(names) >= count:
                return sorted(int(name.rpartition("-")[2]) for name in names)
            assert time.monotonic() < give_up, f"{len(names)} of {count} calls at gate {self.name}"
            time.sleep(0.002)

    def pid(self) -> int:
        """Wait until a process is at the gate and return its id."""
        return self.pids(1)[0]


class CustomError(Exception):
    """An exception of the user's own."""


class Thing:
    """An object that takes weak references and knows how to compute."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __call__(self, other: Any) -> Any:
        return self.value + other

    def method(self, other: Any) -> Any:
        return self.value * other

    @classmethod
    def make(cls, value: Any) -> Thing:
        return cls(value)

    @staticmethod
    def double(value: Any) -> Any:
        return 2 * value


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Record:
    name: str
    value: Any


@dataclass(frozen=True)
class Frozen:
    value: Any


def add(a: Any, b: Any = 10) -> Any:
    return a + b


def identity(value: Any) -> Any:
    return value


def total(*values: Any) -> Any:
    return sum(values)


def keywords(**kwargs: Any) -> dict[str, Any]:
    return kwargs


def fail(message: str = "no luck") -> None:
    raise CustomError(message)


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def record(path: str, value: Any) -> Any:
    """Leave a trace of having run."""
    append(path, str(value))
    return value


def counted(path: str, amount: int, _number: int = 0) -> None:
    """Log the start and the end of a call that takes ``amount`` cores; the number tells it from equal ones."""
    append(path, f"+{amount}")
    time.sleep(0.01)
    append(path, f"-{amount}")


def highest(path: str | os.PathLike[str]) -> int:
    """The most that calls of ``counted`` took at once."""
    now = most = 0
    for line in lines(path):
        now += int(line)
        most = max(most, now)
    return most


def odd_fails(number: int) -> int:
    if number % 2:
        fail(f"{number} is odd")
    return number


def affinity() -> set[int]:
    return os.sched_getaffinity(0)


def numbered(gate: Gate, executorlib_worker_id: int) -> int:
    gate()
    return executorlib_worker_id


def rank(value: Any = None) -> tuple[int, int, Any]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    return world.Get_rank(), world.Get_size(), value


def rank_sum(value: float) -> float:
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(value * (MPI.COMM_WORLD.Get_rank() + 1))  # type: ignore[no-any-return]


def rank_that_fails(bad: int) -> int:
    """One rank raises; the others wait for it, as ranks do."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == bad:
        raise CustomError(f"rank {bad}")
    MPI.COMM_WORLD.Barrier()
    return 0


def note_shared_memory(folder: str) -> Any:
    """On a rank: write down what it has mapped of shared memory, and wait for all ranks to have done so."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with open("/proc/self/maps") as maps:
        names = [line.partition("/dev/shm/")[2].removesuffix(" (deleted)\n").strip() for line in maps]
    put(f"{folder}/{world.rank}.{os.getpid()}.{os.getppid()}", "\n".join(filter(None, names)))
    world.Barrier()
    return world


def raise_on(folder: str, ranks: list[int], others_wait: bool) -> None:
    world = note_shared_memory(folder)
    if world.rank in ranks:
        raise CustomError("after all were there")
    if others_wait:
        world.Barrier()


def die_on_a_rank(folder: str) -> None:
    if note_shared_memory(folder).rank == 1:
        os._exit(3)
    time.sleep(60)


def rest(folder: str) -> None:
    note_shared_memory(folder)
    time.sleep(60)


def takes_resource_dict(value: Any, resource_dict: Any = None) -> Any:
    return value
