"""The faults: functions that kill or break a worker, and values that do so while they are pickled or unpickled."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contract.functions import CustomError, put

LAST_WORDS = "last words of the process"


def segfault(_path: str) -> None:
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # jobs have their own limits, whatever this process's are
    ctypes.string_at(0)


def hard_exit(_path: str) -> None:
    os._exit(7)


def soft_exit(_path: str) -> None:
    sys.exit(7)


def killed_from_outside(path: str) -> None:
    """Say who to kill and wait for it."""
    put(path, str(os.getpid()))
    time.sleep(60)


_hoard: list[bytes] = []


def out_of_memory(_path: str) -> None:
    """Use up the memory that a limit leaves, and keep it, so that even the report is tight."""
    limit = _address_space() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    while True:
        _hoard.append(bytes(1 << 20))


def _address_space() -> int:
    with open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[0]) * resource.getpagesize()


def raise_error(_path: str) -> None:
    raise CustomError("the fault")


FAULTS: dict[str, Callable[[str], None]] = {
    "segfault": segfault,
    "os._exit": hard_exit,
    "sys.exit": soft_exit,
    "SIGKILL": killed_from_outside,
    "out of memory": out_of_memory,
    "raise": raise_error,
}


def strike(fault: str, path: str) -> None:
    """Let a fault happen, after some last words on standard error."""
    os.write(2, f"{LAST_WORDS}\n".encode())
    FAULTS[fault](path)


def strike_here(fault: str, path: str, pid: int) -> None:
    """As ``strike``, but never in the test's own process."""
    if os.getpid() != pid:
        strike(fault, path)


@dataclass
class FaultAtUnpickling:
    """An argument that strikes where it is unpickled."""

    fault: str
    path: str

    def __reduce__(self) -> Any:
        return strike_here, (self.fault, self.path, os.getpid())


@dataclass
class FaultAtPickling:
    """A result that strikes where it is pickled."""

    fault: str
    path: str

    def __reduce__(self) -> Any:
        strike(self.fault, self.path)
        return int, ()


class Unloadable:
    """A value that can be pickled, and raises where it is unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _raise, (self.error,)


def _raise(error: BaseException) -> None:
    raise error


class Unsavable:
    """A value that raises where it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class PickyError(Exception):
    """An exception that cannot be rebuilt from its ``args``, a common mistake."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


class PickyOSError(OSError):
    """The same of an exception that Python itself makes more of."""

    def __init__(self, code: int, *, path: str) -> None:
        super().__init__(code, os.strerror(code), path)
        self.path = path


class HoldingError(Exception):
    """An exception with something that cannot be pickled."""

    def __init__(self, text: str) -> None:
        import threading

        super().__init__(text)
        self.lock = threading.Lock()


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def die_or_add(i: int, every: int) -> int:
    if i % every == every - 1:
        die()
    return i + 1
