"""The program's end of an interface."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from socket import AF_INET, getaddrinfo
from typing import Any, cast

import cloudpickle
import zmq

from executorlib import serialize
from executorlib.errors import ExecutorlibSocketError, RemoteTraceback
from executorlib.transports.curve import ClientKeys
from executorlib.worker import call, function

# Environment variable with the keys that the interface gives its program.
_KEYS_VARIABLE = "EXECUTORLIB_CURVE_KEYS"
_HELLO = b""
# How long a program that closes its connection waits until its last message has been received.
_LINGER_MS = 30_000
# How long the other ranks may go on after one has failed: they may be waiting for it, which would never end.
_RANK_GRACE_SECONDS = 5.0


class _ProgramSocket(zmq.Socket[bytes]):
    """A program's end of the connection, which notices when the other end is gone.

    Its monitor gets an event only if the connection is lost or refused, because the library listens before it starts
    the program. So a single event is enough, and it stays in the monitor for all later calls.
    """

    def lost(self) -> bool:
        return bool(self._watch().poll(0))

    def wait(self) -> None:
        """Wait for a message.

        Raises:
            ExecutorlibSocketError: There will be none.
        """
        poller = zmq.Poller()
        poller.register(self, zmq.POLLIN)
        poller.register(self._watch(), zmq.POLLIN)
        if self not in dict(poller.poll()):
            atexit.register(_abort_other_ranks)
            address = self.getsockopt_string(zmq.LAST_ENDPOINT)
            raise ExecutorlibSocketError(
                f"Nothing at {address} accepts messages from this program: the process that started it has ended or "
                "has shut down its interface, or this program holds the keys of another process."
            )

    def close(self, linger: int | None = None) -> None:
        if not self.closed:
            monitor = self._watch()
            if linger is None and self.lost():
                linger = 0
            self.disable_monitor()
            monitor.close(linger=0)
        super().close(linger=linger)

    def _watch(self) -> zmq.Socket[bytes]:
        return self.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)


def _abort_other_ranks() -> None:
    """End an MPI program whose library is gone.

    If the program does not catch the error, the other ranks wait for this one in a call of theirs, and this one waits
    for them in MPI_Finalize, forever.
    """
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(1)


def interface_connect(host: str, port: str) -> tuple[zmq.Context[Any], zmq.Socket[bytes]]:
    """Connect a program to the interface that started it.

    Args:
        host: The ``--host`` in the program's arguments.
        port: The ``--zmqport`` in the program's arguments.

    Returns:
        Context and socket, for `interface_receive`, `interface_send` and `interface_shutdown`.

    Raises:
        ExecutorlibSocketError: The program's environment does not have the keys of the interface.
        OSError: The host's name cannot be resolved.
    """
    try:
        keys = ClientKeys.parse(os.environ[_KEYS_VARIABLE])
    except (KeyError, ValueError):
        raise ExecutorlibSocketError(
            f"The environment variable {_KEYS_VARIABLE} does not hold the keys of an interface. Start this program "
            "with interface_bootup() of the same version of executorlib; every program in between must pass its "
            "environment on."
        ) from None
    getaddrinfo(host, port, AF_INET)  # libzmq would silently try forever
    context = zmq.Context()
    socket = cast(_ProgramSocket, context.socket(zmq.DEALER, socket_class=_ProgramSocket))
    keys.use(socket)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket._watch()
    socket.connect(f"tcp://{host}:{port}")
    socket.send(_HELLO)
    return context, socket


def interface_send(socket: zmq.Socket[bytes] | None, result_dict: dict[str, Any]) -> None:
    """Send a dictionary to the library.

    Args:
        socket: From `interface_connect`; None, as in all ranks of an MPI program but the first, does nothing.
        result_dict: ``{"result": ...}``, ``{"error": exception}`` or whatever else the library expects.

    Raises:
        Exception: Whatever pickling the dictionary raises.
    """
    if socket is not None:
        socket.send(cloudpickle.dumps(result_dict))


def interface_receive(socket: zmq.Socket[bytes] | None) -> dict[str, Any]:
    """Wait for the library's next dictionary.

    Args:
        socket: From `interface_connect`; with None, the dictionary is empty.

    Returns:
        The dictionary.

    Raises:
        ExecutorlibSocketError: The library's process has ended or has shut its interface down.
        Exception: Whatever unpickling the dictionary raises.
    """
    if socket is None:
        return {}
    return cloudpickle.loads(_receive(socket))  # type: ignore[no-any-return]


def _receive(socket: zmq.Socket[bytes]) -> bytes:
    if isinstance(socket, _ProgramSocket):
        socket.wait()
    return socket.recv()


def interface_shutdown(socket: zmq.Socket[bytes] | None, context: zmq.Context[Any] | None) -> None:
    """Close a program's connection, once everything it sent is on its way.

    Args:
        socket: From `interface_connect`, or None.
        context: From `interface_connect`, or None.
    """
    if socket is not None:
        socket.close()
    if context is not None:
        context.term()


def serve_functions(ranks: Any = None) -> None:
    """Run as a program of `get_command_path`, with the arguments that `interface_bootup` adds.

    ``{"fn": f, "args": (...), "kwargs": {...}}`` is answered with ``{"result": f(*args, **kwargs)}``, where several
    ranks give a list of all their values, or with ``{"error": exception}``. With ``"init": True``, the items of the
    dict that the function returns fill parameters that later calls leave out. ``{"shutdown": True}`` ends the program.

    Args:
        ranks: An mpi4py communicator; without it, the program has no other ranks.
    """
    parser = argparse.ArgumentParser(description="Runs the functions that a library sends.")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--zmqport", required=True)
    parser.add_argument("--worker-id", type=int, default=0)
    options, _ = parser.parse_known_args()
    # Functions are unpickled by their modules' names, and the modules may be in the directory where the program
    # started.
    sys.path.insert(1, os.getcwd())
    values = {"executorlib_worker_id": options.worker_id}
    try:
        context, socket = None, None
        if ranks is None or ranks.Get_rank() == 0:
            context, socket = interface_connect(options.host, options.zmqport)
        while True:
            payload = b"" if socket is None else _receive(socket)
            if ranks is not None:
                payload = ranks.bcast(payload)
            answer = _serve(payload, values, ranks)
            if socket is not None:
                socket.send(answer or _pack({"result": True}))
            if answer is None:
                break
        interface_shutdown(socket, context)
    except BaseException:
        if ranks is None:
            raise
        # Left alone, the other ranks would wait for this one.
        traceback.print_exc()
        ranks.Abort(1)


def _serve(payload: bytes, values: dict[str, Any], ranks: Any) -> bytes | None:
    """Carry out a message; returns the pickled answer, or None for the last message."""
    init = False
    with call.OnlyHere():
        try:
            message = cloudpickle.loads(payload)
            if message.get("shutdown"):
                return None
            init = bool(message.get("init"))
            fn, args, kwargs = message["fn"], message["args"], message["kwargs"]
            result = fn(*args, **kwargs, **function.Function(fn).left_out(args, kwargs, values))
            if init:
                values.update(result)
                result = True
            answer = {"result": result}
        except Exception as error:
            answer = {"error": _Raised(error)}
        packed = _pack(answer)
    return packed if ranks is None else _join(packed, "error" in answer, init, ranks)


def _pack(answer: dict[str, Any]) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(answer)
    except Exception as error:
        data = cloudpickle.dumps({"error": _Raised(error)})
    return data


def _join(packed: bytes, failed: bool, init: bool, ranks: Any) -> bytes:
    """Combine the ranks' answers; only the first rank's return value counts."""
    together = ranks.Ibarrier()
    give_up = time.monotonic() + _RANK_GRACE_SECONDS
    while not together.Test():
        if failed and time.monotonic() > give_up:
            raise cloudpickle.loads(packed)["error"]
        time.sleep(0.001)
    every = ranks.gather(packed)
    if every is None:
        return b""
    answers = [cloudpickle.loads(each) for each in every]
    for each, answer in zip(every, answers, strict=True):
        if "error" in answer:
            return bytes(each)
    if init or len(answers) == 1:
        return bytes(every[0])
    return _pack({"result": [answer["result"] for answer in answers]})


class _Raised:
    """An exception on its way: unpickling it gives the exception itself, with its traceback as the cause."""

    def __init__(self, error: BaseException) -> None:
        frames = call.dump_error(error)
        self._error = serialize.Pickled(frames[0]) if len(frames) == 1 else serialize.loads(frames)
        self._text = call.traceback_text(error)

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, str]]:
        return _arrived, (self._error, self._text)


def _arrived(error: BaseException, text: str) -> BaseException:
    error.__cause__ = RemoteTraceback(text)
    return error
