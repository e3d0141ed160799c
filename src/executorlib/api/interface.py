"""The library's end: the interface to a program that the library has started."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
import weakref
from collections.abc import Callable
from socket import AF_INET, gaierror, getaddrinfo, gethostname
from typing import Any

import cloudpickle
import zmq

from executorlib.api.program import _HELLO
from executorlib.api.spawners import SubprocessSpawner, _exported
from executorlib.errors import ExecutorlibSocketError, describe_exit
from executorlib.transports.curve import Door

_logger = logging.getLogger("executorlib")

# The last message of a program that has died may still be on its way through the kernel and libzmq's thread.
_LAST_MESSAGE_MS = 200
_END_UNAWAITED_SECONDS = 2.0


class _Listener:
    """The library's end of the connection, which accepts one key and one program."""

    def __init__(self) -> None:
        self._program: bytes | None = None
        self._context = zmq.Context()
        self._door = Door(self._context)
        self.keys = self._door.keys.dumps()
        self._socket = self._context.socket(zmq.ROUTER)
        self._door.guard(self._socket)
        # A connection that comes while nobody answers at the door has to wait, for as long as it takes.
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._poller = zmq.Poller()
        self._poller.register(self._door.socket, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)

    @property
    def connected(self) -> bool:
        return self._program is not None

    @property
    def closed(self) -> bool:
        return bool(self._context.closed)

    def bind(self) -> int:
        return self._socket.bind_to_random_port("tcp://*")

    def forget(self) -> None:
        """Accept the next program that connects, and drop the messages of the last one."""
        self._program = None
        while self._socket.poll(0):
            self._socket.recv_multipart()

    def send(self, payload: bytes) -> None:
        """Send to the program, which must have connected.

        Raises:
            zmq.ZMQError: The program has closed its connection (EHOSTUNREACH).
        """
        assert self._program is not None
        self._socket.send_multipart([self._program, payload])

    def receive(self, timeout_ms: float) -> bytes | None:
        """Wait for the program's next message, including its empty hello; None if none came in time."""
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left * 1000)))
            if self._door.socket in ready:
                self._door.answer()
            elif self._socket not in ready:
                return None
            if self._socket in ready:
                sender, *frames = self._socket.recv_multipart()
                if self._program is None and frames == [_HELLO]:
                    self._program = sender
                if sender == self._program and len(frames) == 1:
                    return frames[0]

    def close(self) -> None:
        self._socket.close()
        self._door.close()
        self._program = None
        self._context.term()


class SocketInterface:
    """The library's end of the connection to one program.

    A program that has not been shut down is ended when its interface is garbage-collected, or when the interpreter
    exits.

    Args:
        spawner: Starts the program and watches it.
        log_obj_size: Log the size in bytes of each message sent and received (logger ``executorlib``, level WARNING).
        time_out_ms: How often, in milliseconds, a waiting method checks whether the program is alive. The end of a
            program is noticed within little more than this time.
    """

    def __init__(
        self,
        spawner: SubprocessSpawner | None = None,
        log_obj_size: bool = False,
        time_out_ms: int = 1000,
    ) -> None:
        self._spawner = spawner
        self._log_obj_size = log_obj_size
        self._time_out_ms = time_out_ms
        self._command_lst: list[str] = []
        self._booted = False
        self._listener = _Listener()
        self._end = weakref.finalize(self, _end, os.getpid(), self._listener, spawner)

    @property
    def status(self) -> bool:
        """True if the program was started and has not been shut down since. It may have died in the meantime."""
        return self._booted

    def bind_to_random_port(self) -> int:
        """Listen for the program.

        Returns:
            The TCP port, for the program's ``--zmqport``.
        """
        return self._listener.bind()

    def bootup(
        self,
        command_lst: list[str] | None = None,
        stop_function: Callable[[], bool] | None = None,
    ) -> None:
        """Start the program, or start it again; `status` tells whether it was started.

        Args:
            command_lst: The program and its arguments, including ``--host`` and ``--zmqport``; by default the same as
                the last time.
            stop_function: Called before the program is started; if it returns True, the program is not started.

        Raises:
            ValueError: There is no command, or the interface has no spawner or was shut down.
            RuntimeError: The program is running.
            OSError: The program cannot be started.
        """
        self._command_lst = list(command_lst or self._command_lst)
        if not self._command_lst:
            raise ValueError("bootup needs a command_lst: there is no earlier one to repeat.")
        if self._spawner is None or self._listener.closed:
            raise ValueError(
                "This interface cannot start a program: it was shut down or has no spawner. "
                "Make a new one: SocketInterface(spawner=...)."
            )
        self._booted = False
        self._listener.forget()
        self._spawner._keys = self._listener.keys
        # A spawner with a bootup of its own does not know the environment that ours would pass on.
        foreign = type(self._spawner).bootup is not SubprocessSpawner.bootup
        with _exported(self._spawner._environment() if foreign else {}):
            self._booted = self._spawner.bootup(self._command_lst, stop_function=stop_function)

    def send_dict(self, input_dict: dict[str, Any]) -> None:
        """Send a dictionary, once the program has connected.

        Args:
            input_dict: Anything that cloudpickle can pickle.

        Raises:
            ExecutorlibSocketError: The program ended, was not started, or closed its connection.
            Exception: Whatever pickling the dictionary raises.
        """
        payload = cloudpickle.dumps(input_dict)
        while not self._listener.connected:
            self._next_message()
        if self._log_obj_size:
            _logger.warning("sent a message of %d bytes", len(payload))
        try:
            self._listener.send(payload)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise self._lost("has closed its connection") from None

    def receive_dict(self) -> dict[str, Any]:
        """Wait for the program's next dictionary, as long as the program lives.

        Returns:
            The dictionary. ``{"error": ExecutorlibSocketError}`` if the program ended or was not started; the error's
            text names the command, the exit code or signal, the host, and the last lines of standard error.
            ``{"error": exception}`` if the message cannot be unpickled.
        """
        try:
            while not (payload := self._next_message()):
                pass
        except ExecutorlibSocketError as error:
            return {"error": error}
        if self._log_obj_size:
            _logger.warning("received a message of %d bytes", len(payload))
        try:
            return cloudpickle.loads(payload)  # type: ignore[no-any-return]
        except Exception as error:
            return {"error": error}

    def send_and_receive_dict(self, input_dict: dict[str, Any]) -> dict[str, Any]:
        """Send a dictionary and wait for the answer; see `send_dict` and `receive_dict`.

        Returns:
            The answer. ``{"error": ExecutorlibSocketError}`` if the program is not there to give one.
        """
        try:
            self.send_dict(input_dict)
        except ExecutorlibSocketError as error:
            return {"error": error}
        return self.receive_dict()

    def shutdown(self, wait: bool = True) -> Any:
        """Tell the program to end, and make sure that it does.

        A program that never connected is ended at once. The interface cannot be used afterwards.

        Args:
            wait: Let the program finish what it is doing and end by itself (within 30 s of its answer). With False, it
                is ended if it has not done so within 2 s.

        Returns:
            The ``result`` in the program's answer; None without an answer.
        """
        result = None
        self._booted = False
        if wait and self._listener.connected and self._spawner is not None and self._spawner.poll():
            answer = self.send_and_receive_dict({"shutdown": True, "wait": True})
            result = answer.get("result") if isinstance(answer, dict) else None
            self._spawner.shutdown(wait=True)
        self._end()
        return result

    def _next_message(self) -> bytes:
        """Wait for the program's next message.

        Raises:
            ExecutorlibSocketError: There will be none.
        """
        if self._listener.closed:
            raise ExecutorlibSocketError("The interface was shut down. Start another program with interface_bootup().")
        while True:
            # Check before waiting, so that messages which the program sent before it died are still found below.
            alive = self._spawner is None or self._spawner.poll()
            message = self._listener.receive(self._time_out_ms if alive else _LAST_MESSAGE_MS)
            if message is not None:
                return message
            if not alive:
                raise self._lost()

    def _lost(self, end: str = "is not running") -> ExecutorlibSocketError:
        """The error for a program that is not there."""
        if not self._booted:
            return ExecutorlibSocketError(
                "There is no program to exchange messages with: bootup() was not called, or the spawner or the "
                "stop_function kept it from starting one."
            )
        process = getattr(self._spawner, "_process", None)
        if process is not None and process.poll() is not None:
            # Convert to a wait status: the signal's number, which Popen negates, or the exit code.
            code = process.returncode
            end = describe_exit(-code if code < 0 else code << 8)
        if not self._listener.connected:
            end += " before it connected back with interface_connect()"
        command = shlex.join(self._command_lst)
        text = f"The program {command!r}, started on host {gethostname()}, {end}. bootup() starts it again."
        relay = getattr(self._spawner, "_relay", None)
        if relay is not None and (tail := relay.tail()):
            text += f" Its standard error ends with:\n{tail}"
        return ExecutorlibSocketError(text)


def _end(owner: int, listener: _Listener, spawner: SubprocessSpawner | None) -> None:
    """End an interface's program and close its connection; runs once."""
    if os.getpid() != owner:  # a fork has a copy of the object, but the program is not its own
        return
    try:
        if spawner is not None:
            if listener.connected and spawner.poll():
                with contextlib.suppress(zmq.ZMQError):
                    listener.send(cloudpickle.dumps({"shutdown": True, "wait": False}))
                give_up = time.monotonic() + _END_UNAWAITED_SECONDS
                while spawner.poll() and time.monotonic() < give_up:
                    time.sleep(0.01)
            spawner.shutdown(wait=False)
    finally:
        listener.close()


def interface_bootup(
    command_lst: list[str],
    connections: SubprocessSpawner,
    hostname_localhost: bool | None = None,
    log_obj_size: bool = False,
    worker_id: int | None = None,
    stop_function: Callable[[], bool] | None = None,
) -> SocketInterface:
    """Start a program that connects back with `interface_connect`.

    ``--host``, ``--zmqport`` and, if a number is given, ``--worker-id`` are appended to the program's arguments.

    Args:
        command_lst: The program and its arguments, for example ``[sys.executable, "program.py"]``.
        connections: Starts the program: `SubprocessSpawner` or `MpiExecSpawner`.
        hostname_localhost: Whether the program is told to connect to ``localhost`` rather than to this machine's name.
            By default it is on macOS, which often does not resolve its own name, and where the name cannot be resolved.
        log_obj_size: Log the size in bytes of each message (logger ``executorlib``, level WARNING).
        worker_id: The program's number, for its ``--worker-id``.
        stop_function: Called before the program is started; if it returns True, the program is not started and
            `SocketInterface.status` is False.

    Returns:
        The interface to the program.

    Raises:
        OSError: The program cannot be started.
    """
    interface = SocketInterface(spawner=connections, log_obj_size=log_obj_size)
    number = [] if worker_id is None else ["--worker-id", str(worker_id)]
    try:
        port = str(interface.bind_to_random_port())
        address = ["--host", _host(hostname_localhost), *number, "--zmqport", port]
        interface.bootup([*command_lst, *address], stop_function=stop_function)
    except BaseException:
        interface.shutdown(wait=False)
        raise
    return interface


def _host(localhost: bool | None) -> str:
    if localhost is None:
        try:
            localhost = sys.platform == "darwin" or not getaddrinfo(gethostname(), None, AF_INET)
        except gaierror:
            localhost = True
    return "localhost" if localhost else gethostname()
