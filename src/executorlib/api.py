"""For libraries: start a program, with MPI ranks if need be, and exchange dictionaries with it.

    library                                  program
    interface = interface_bootup(...)   →    context, socket = interface_connect(host, port)
    interface.send_dict({...})          →    interface_receive(socket)
    interface.receive_dict()            ←    interface_send(socket, {...})
    interface.shutdown()                →    {"shutdown": True, ...}
                                             interface_shutdown(socket, context)

Dictionaries travel as cloudpickle bytes over one ZeroMQ connection: a ROUTER in the library's
process, a DEALER in the program. It is encrypted, and both ends prove who they are (CURVE): every
interface makes its keys, hands the program's to it by the environment, and lets no other key in, so
nothing that a stranger sends is unpickled. The program's first message is an empty one, by which
the interface learns its address.

No thread is started: connections are let in, and the program is looked after, while a method of the
interface waits. An interface is for one thread at a time.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from socket import AF_INET, gaierror, getaddrinfo, gethostname
from typing import TYPE_CHECKING, Any, cast

import cloudpickle
import zmq

from executorlib import serialize
from executorlib.errors import ExecutorlibSocketError, RemoteTraceback, describe_exit
from executorlib.launchers import streams
from executorlib.locks import RLock
from executorlib.transports.curve import ClientKeys, Door
from executorlib.worker import call

if TYPE_CHECKING:
    from executorlib.clusters import TestClusterExecutor
    from executorlib.launchers.mpi import Mpiexec

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

_logger = logging.getLogger("executorlib")


def __getattr__(name: str) -> object:
    # Programs that only connect back do without all that belongs to executors.
    if name != "TestClusterExecutor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from executorlib.clusters import TestClusterExecutor

    return TestClusterExecutor


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Environment variable with the keys of the interface's program.
_KEYS_VARIABLE = "EXECUTORLIB_CURVE_KEYS"
_HELLO = b""

# What a program sent before it died may still be on its way through the kernel and libzmq's thread.
_LAST_MESSAGE_MS = 200
# How long a program may take to end by itself: after it answered to `shutdown`, and where nobody
# waits for it.
_END_SECONDS = 30.0
_END_UNAWAITED_SECONDS = 2.0
# From SIGTERM to SIGKILL: mpiexec passes the first on to its ranks and needs a moment for it.
_TERM_SECONDS = 5.0
# How long a program that closes its connection waits for its last message to be taken.
_LINGER_MS = 30_000
# How long the other ranks may go on after one has failed: they may be waiting for it, and would
# forever.
_RANK_GRACE_SECONDS = 5.0

_STDERR_CHUNK = 1 << 16
_STDERR_FILE_BYTES = 1 << 24
_STDERR_TAIL_BYTES = 4096

_BACKEND = Path(__file__).with_name("backend")


# The library's end.


class _Listener:
    """The library's end of the connection: lets one key in, and knows one program."""

    def __init__(self) -> None:
        self._program: bytes | None = None
        self._context = zmq.Context()
        self._door = Door(self._context)
        self.keys = self._door.keys.dumps()
        self._socket = self._context.socket(zmq.ROUTER)
        self._door.guard(self._socket)
        # A connection that comes while nobody answers at the door is kept waiting, without a limit.
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
        """Take the next program that connects for the program; drop what the last one sent."""
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
        """Wait for the program's next message, the empty hello included; None means in vain."""
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

    A program that was not shut down when its interface is garbage-collected, or when the
    interpreter exits, is ended.

    Args:
        spawner: Starts the program and looks after it.
        log_obj_size: Log the size in bytes of each message sent and received (logger
            ``executorlib``, level WARNING).
        time_out_ms: How often, in milliseconds, a method that waits looks whether the program is
            alive. A program's end is noticed within little more than this time.
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
        """Whether the program was started, and not shut down since. It may have died meanwhile."""
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
            command_lst: The program and its arguments, ``--host`` and ``--zmqport`` included; by
                default as before.
            stop_function: Asked before the program is started; when it returns True, the program is
                not started.

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
        # A spawner with a bootup of its own knows nothing of the environment that ours would hand
        # over.
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
            The dictionary. ``{"error": ExecutorlibSocketError}`` when the program ended or was not
            started; its text names the command, exit code or signal, host, and the last lines of
            standard error. ``{"error": exception}`` when the message cannot be unpickled.
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
            The answer. ``{"error": ExecutorlibSocketError}`` when the program is not there to give
            one.
        """
        try:
            self.send_dict(input_dict)
        except ExecutorlibSocketError as error:
            return {"error": error}
        return self.receive_dict()

    def shutdown(self, wait: bool = True) -> Any:
        """Tell the program to end, and see to it that it does.

        A program that never connected is ended at once. The interface cannot be used afterwards.

        Args:
            wait: Let the program finish what it is doing and end by itself (within 30 s of its
                answer). With False, it is ended if it has not done so within 2 s.

        Returns:
            What the program answered as ``result``; None without an answer.
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
        """The program's next message.

        Raises:
            ExecutorlibSocketError: There will be none.
        """
        if self._listener.closed:
            raise ExecutorlibSocketError("The interface was shut down. Start another program with interface_bootup().")
        while True:
            # Asked before waiting: what a program sent before it died is found below.
            alive = self._spawner is None or self._spawner.poll()
            message = self._listener.receive(self._time_out_ms if alive else _LAST_MESSAGE_MS)
            if message is not None:
                return message
            if not alive:
                raise self._lost()

    def _lost(self, end: str = "is not running") -> ExecutorlibSocketError:
        """What to tell about a program that is not there."""
        if not self._booted:
            return ExecutorlibSocketError(
                "There is no program to exchange messages with: bootup() was not called, or the "
                "spawner or the stop_function did not let it start one."
            )
        process = getattr(self._spawner, "_process", None)
        if process is not None and process.poll() is not None:
            # As a wait status has it: the signal's number, which Popen negates, or the exit code.
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
    if os.getpid() != owner:  # a fork has the object, but the program is not its own
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

    The program finds ``--host``, ``--zmqport`` and, where a number was given, ``--worker-id``
    behind its own arguments.

    Args:
        command_lst: The program and its arguments, for example ``[sys.executable, "program.py"]``.
        connections: Starts the program: `SubprocessSpawner` or `MpiExecSpawner`.
        hostname_localhost: Whether the program is told to connect to ``localhost`` rather than to
            this machine's name. By default on macOS, which often does not resolve it, and where the
            name cannot be resolved.
        log_obj_size: Log the size in bytes of each message (logger ``executorlib``, level WARNING).
        worker_id: The program's number, for its ``--worker-id``.
        stop_function: Asked before the program is started; when it returns True, the program is not
            started and `SocketInterface.status` is False.

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


# Spawners.


class _Relay:
    """A program's standard error: shown on ours, its end remembered for errors.

    It goes to a file without a name, not through a pipe: a program never waits for a library that
    is busy.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open until close()
        # The program appends, so the file can be emptied under it.
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)
        self._shown = 0
        self._tail = b""

    def forward(self) -> None:
        """Show what the program wrote since last time."""
        while not self.file.closed:
            data = os.pread(self.file.fileno(), _STDERR_CHUNK, self._shown)
            if not data:
                break
            self._shown += len(data)
            self._tail = (self._tail + data)[-_STDERR_TAIL_BYTES:]
            if sys.stderr is not sys.__stderr__ or streams.is_users(2):
                with contextlib.suppress(OSError, ValueError, AttributeError):  # ours is closed, or there is none
                    sys.stderr.write(data.decode(errors="replace"))
        if self._shown > _STDERR_FILE_BYTES:
            self.file.truncate(0)
            self._shown = 0

    def tail(self) -> str:
        """The last that the program wrote."""
        self.forward()
        return self._tail.decode(errors="replace").strip()

    def close(self) -> None:
        self.forward()
        self.file.close()


class SubprocessSpawner:
    """Starts a program on this node and looks after it; one at a time.

    Args:
        cwd: Working directory of the program, made where missing; by default this process's.
        cores: Number of MPI ranks; only `MpiExecSpawner` starts more than one.
        worker_id: The program's number; kept for spawners that derive from this one.
        openmpi_oversubscribe: Let Open MPI start more ranks than there are cores.
        threads_per_core: Threads of each rank: the value of ``OMP_NUM_THREADS``,
            ``OPENBLAS_NUM_THREADS``, ``MKL_NUM_THREADS``, ``NUMEXPR_NUM_THREADS`` and
            ``VECLIB_MAXIMUM_THREADS`` in the program.
    """

    def __init__(
        self,
        cwd: str | None = None,
        cores: int = 1,
        worker_id: int = 0,
        openmpi_oversubscribe: bool = False,
        threads_per_core: int = 1,
    ) -> None:
        self._cwd = cwd
        self._cores = cores
        self._worker_id = worker_id
        self._openmpi_oversubscribe = openmpi_oversubscribe
        self._threads_per_core = threads_per_core
        self._process: subprocess.Popen[bytes] | None = None
        self._relay: _Relay | None = None
        self._keys = ""

    def generate_command(self, command_lst: list[str]) -> list[str]:
        """The command that `bootup` runs for a program.

        Args:
            command_lst: The program and its arguments.

        Returns:
            The same command.
        """
        return list(command_lst)

    def bootup(
        self,
        command_lst: list[str],
        stop_function: Callable[[], bool] | None = None,
    ) -> bool:
        """Start the program.

        Args:
            command_lst: The program and its arguments.
            stop_function: Asked first; when it returns True, the program is not started.

        Returns:
            Whether the program runs.

        Raises:
            RuntimeError: The last one is still running.
            OSError: It cannot be started.
        """
        if self.poll():
            raise RuntimeError("The program is running; shut it down before another bootup().")
        if stop_function is not None and stop_function():
            return False
        if self._cwd is not None:
            os.makedirs(self._cwd, exist_ok=True)
        self._forget()
        self._relay = _Relay()
        try:
            self._process = subprocess.Popen(
                self.generate_command(command_lst),
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=None if streams.is_users(1) else subprocess.DEVNULL,
                stderr=self._relay.file,
                env={**os.environ, **self._environment()},
                # A group of its own, so that what the program starts can be ended with it.
                start_new_session=True,
            )
        except BaseException:
            self._forget()
            raise
        return self.poll()

    def poll(self) -> bool:
        """Whether the program runs. Shows what it wrote to standard error meanwhile."""
        running = self._process is not None and self._process.poll() is None
        if self._relay is not None:
            self._relay.forward()
        return running

    def shutdown(self, wait: bool = True) -> None:
        """See to it that the program ends.

        Args:
            wait: Give it 30 s to end by itself; with False, it gets SIGTERM at once. SIGKILL follows 5 s after that.
        """
        process = self._process
        if process is not None:
            try:
                process.wait(_END_SECONDS if wait else 0)
            except subprocess.TimeoutExpired:
                _terminate(process)
        self._forget()

    def _environment(self) -> dict[str, str]:
        """What the program needs in its environment."""
        environment = dict.fromkeys(call.THREAD_VARIABLES, str(self._threads_per_core))
        return {**environment, _KEYS_VARIABLE: self._keys}

    def _forget(self) -> None:
        self._process = None
        if self._relay is not None:
            self._relay.close()
            self._relay = None


class MpiExecSpawner(SubprocessSpawner):
    """Starts a program with MPI: ``cores`` ranks on this node; without mpiexec where that is 1."""

    def generate_command(self, command_lst: list[str]) -> list[str]:
        """The command that `bootup` runs for a program.

        Args:
            command_lst: The program and its arguments.

        Returns:
            ``mpiexec -n <cores> ... <command_lst>``, with ``--oversubscribe`` for Open MPI where it was asked for.

        Raises:
            FileNotFoundError: There is no mpiexec beside this Python or on PATH.
            RuntimeError: It does not answer ``--version``.
        """
        if self._cores == 1:
            return super().generate_command(command_lst)
        return _find_mpiexec().command(self._cores, command_lst, self._openmpi_oversubscribe)

    def _environment(self) -> dict[str, str]:
        ranks = _find_mpiexec().environment() if self._cores > 1 else {}
        return {**super()._environment(), **ranks}


def _find_mpiexec() -> Mpiexec:
    # Here, because the programs, which import this module too, have no use for the executor's side.
    from executorlib.launchers.mpi import find_mpiexec

    return find_mpiexec()


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it started where it leads a process group of its own."""
    # No such process, or only one that waits to be reaped (macOS): it has ended meanwhile.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send = os.killpg if os.getpgid(process.pid) == process.pid else os.kill
        send(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_SECONDS)
            return
        send(process.pid, signal.SIGKILL)
    process.wait()


_exporting = RLock()


@contextlib.contextmanager
def _exported(environment: Mapping[str, str]) -> Iterator[None]:
    """Set variables in this process's environment, for a program that inherits it."""
    if not environment:
        yield
        return
    with _exporting:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


# The program's end.


class _ProgramSocket(zmq.Socket[bytes]):
    """A program's end of the connection, which knows when the other one is gone.

    Only a connection that was lost or refused makes an event in its monitor: the library listens
    before it starts the program. So one event is enough, and it stays in the monitor for all later
    calls.
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
                f"Nobody at {address} takes messages of this program (any more): the process that "
                "started it has ended or has shut its interface down, or it is another one than "
                "the one whose keys this program has."
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

    Where it does not catch the error, the other ranks wait for this one in a call of theirs, and
    this one for them in MPI_Finalize, for ever.
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
            f"The environment variable {_KEYS_VARIABLE} does not hold the keys of an interface. "
            "Start this program with interface_bootup() of the same version of executorlib; what "
            "starts it in between has to pass its environment on."
        ) from None
    getaddrinfo(host, port, AF_INET)  # libzmq would try for ever, in silence
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
        socket: From `interface_connect`; nothing is done with None, which the ranks of an MPI
            program but the first have.
        result_dict: ``{"result": ...}``, ``{"error": exception}`` or what else the library expects.

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
        ExecutorlibSocketError: The library's process ended or has shut its interface down.
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
    """Close a program's connection, once what it sent is on its way.

    Args:
        socket: From `interface_connect`, or None.
        context: From `interface_connect`, or None.
    """
    if socket is not None:
        socket.close()
    if context is not None:
        context.term()


# Programs of our own.


def get_command_path(executable: str) -> str:
    """Path of a program that runs the functions sent to it, for ``command_lst``.

    Args:
        executable: ``interactive_serial.py``, or ``interactive_parallel.py`` for the ranks of an
            MPI world.

    Returns:
        The absolute path, to be run by a Python that has this version of executorlib.

    Raises:
        ValueError: There is no such program.
    """
    path = _BACKEND / executable
    if not path.is_file():
        known = ", ".join(sorted(each.name for each in _BACKEND.glob("*.py")))
        raise ValueError(f"There is no program {executable!r}; there are {known}.")
    return str(path)


def serve_functions(ranks: Any = None) -> None:
    """Run as a program of `get_command_path`, with the arguments that `interface_bootup` adds.

    ``{"fn": f, "args": (...), "kwargs": {...}}`` is answered with ``{"result": f(*args,
    **kwargs)}``, the list of all ranks' values where there are several, or ``{"error":
    exception}``. With ``"init": True``, the items of the dict that the function returns fill the
    parameters that later calls leave out. ``{"shutdown": True}`` ends the program.

    Args:
        ranks: An mpi4py communicator; without, the program has no other ranks.
    """
    parser = argparse.ArgumentParser(description="Runs the functions that a library sends.")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--zmqport", required=True)
    parser.add_argument("--worker-id", type=int, default=0)
    options, _ = parser.parse_known_args()
    # Functions are unpickled by the names of their modules, and these may lie where the program was
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
    """Do what a message asks for. Returns the pickled answer, None to the last message."""
    init = False
    with call.OnlyHere():
        try:
            message = cloudpickle.loads(payload)
            if message.get("shutdown"):
                return None
            init = bool(message.get("init"))
            fn, args, kwargs = message["fn"], message["args"], message["kwargs"]
            result = fn(*args, **kwargs, **call.Function(fn).left_out(args, kwargs, values))
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
    """Put the ranks' answers together; only the first rank's return value counts."""
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
    """An exception on its way: unpickled, it is the exception, with its traceback as cause."""

    def __init__(self, error: BaseException) -> None:
        frames = call.dump_error(error)
        self._error = serialize.Pickled(frames[0]) if len(frames) == 1 else serialize.loads(frames)
        self._text = call.traceback_text(error)

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, str]]:
        return _arrived, (self._error, self._text)


def _arrived(error: BaseException, text: str) -> BaseException:
    error.__cause__ = RemoteTraceback(text)
    return error


# Helpers for libraries with a queue of calls.


def cancel_items_in_queue(que: queue.Queue[Any]) -> None:
    """Empty a queue and cancel the future of every item, which is a dict with the key ``future``.

    Args:
        que: The queue; every item counts as done (`queue.Queue.task_done`).
    """
    while True:
        try:
            item = que.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, dict) and "future" in item and item["future"].cancel():
            # For those who wait in concurrent.futures.wait() or as_completed().
            with contextlib.suppress(RuntimeError):
                item["future"].set_running_or_notify_cancel()
        que.task_done()


def cloudpickle_register(ind: int = 2) -> None:
    """Have a caller's module pickled by value, so that other processes need not import it.

    Args:
        ind: Which caller: 1 is the function that calls this one, 2 its caller, and so on; the
            outermost where there are not so many.
    """
    frame = sys._getframe()
    for _ in range(ind):
        if frame.f_back is None:
            break
        frame = frame.f_back
    module = sys.modules.get(frame.f_globals.get("__name__", ""))
    if module is not None:
        cloudpickle.register_pickle_by_value(module)
