"""For libraries: start a program, with MPI ranks if needed, and exchange dictionaries with it.

    library                                  program
    interface = interface_bootup(...)   →    context, socket = interface_connect(host, port)
    interface.send_dict({...})          →    interface_receive(socket)
    interface.receive_dict()            ←    interface_send(socket, {...})
    interface.shutdown()                →    {"shutdown": True, ...}
                                             interface_shutdown(socket, context)

Dictionaries travel as cloudpickle bytes over one ZeroMQ connection: a ROUTER in the library's process, a DEALER in the
program. It is encrypted, and both ends prove who they are (CURVE). Every interface makes its own keys, gives the
program its keys through the environment, and accepts no other key, so nothing that a stranger sends is unpickled. The
program's first message is empty; from it the interface learns the program's address.

No thread is started: while a method of the interface waits, it accepts connections and watches the program. Only one
thread at a time may use an interface.
"""

from __future__ import annotations

import contextlib
import queue
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from executorlib.api.interface import SocketInterface, interface_bootup
from executorlib.api.program import interface_connect, interface_receive, interface_send, interface_shutdown
from executorlib.api.spawners import MpiExecSpawner, SubprocessSpawner
from executorlib.errors import ExecutorlibSocketError

if TYPE_CHECKING:
    from executorlib.local_queue.executor import TestClusterExecutor

__all__ = [
    "ExecutorlibSocketError",
    "MpiExecSpawner",
    "SocketInterface",
    "SubprocessSpawner",
    "TestClusterExecutor",
    "cancel_items_in_queue",
    "cloudpickle_register",
    "get_command_path",
    "interface_bootup",
    "interface_connect",
    "interface_receive",
    "interface_send",
    "interface_shutdown",
]


def __getattr__(name: str) -> object:
    # Programs that only connect back need nothing that belongs to executors.
    if name != "TestClusterExecutor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from executorlib.local_queue.executor import TestClusterExecutor

    return TestClusterExecutor


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_BACKEND = Path(__file__).parents[1] / "backend"


# Our own programs.


def get_command_path(executable: str) -> str:
    """Path of a program that runs the functions sent to it, for ``command_lst``.

    Args:
        executable: ``interactive_serial.py``, or ``interactive_parallel.py`` for the ranks of an MPI world.

    Returns:
        The absolute path. It must be run by a Python with this version of executorlib.

    Raises:
        ValueError: There is no such program.
    """
    path = _BACKEND / executable
    if not path.is_file():
        known = ", ".join(sorted(each.name for each in _BACKEND.glob("*.py")))
        raise ValueError(f"There is no program {executable!r}; the programs are {known}.")
    return str(path)


# Helpers for libraries with a queue of calls.


def cancel_items_in_queue(que: queue.Queue[Any]) -> None:
    """Empty a queue and cancel the future of every item, which is a dict with the key ``future``.

    Args:
        que: The queue; every item is marked as done (`queue.Queue.task_done`).
    """
    while True:
        try:
            item = que.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, dict) and "future" in item and item["future"].cancel():
            # For threads that wait in concurrent.futures.wait() or as_completed().
            with contextlib.suppress(RuntimeError):
                item["future"].set_running_or_notify_cancel()
        que.task_done()


def cloudpickle_register(ind: int = 2) -> None:
    """Have a caller's module pickled by value, so that other processes need not import it.

    Args:
        ind: Which caller: 1 is the function that calls this one, 2 is its caller, and so on; the outermost if there are
            not that many.
    """
    frame = sys._getframe()
    for _ in range(ind):
        if frame.f_back is None:
            break
        frame = frame.f_back
    module = sys.modules.get(frame.f_globals.get("__name__", ""))
    if module is not None:
        cloudpickle.register_pickle_by_value(module)
