"""The executor's side of the node agent, which forks workers (or has them exec a new interpreter).

The agent is started when the first worker is wanted, and again if it dies. It keeps a few forked children in stock, so
that a call need not wait for its fork.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from executorlib import serialize
from executorlib.errors import ExecutorlibSocketError, describe_exit
from executorlib.launchers import streams
from executorlib.launchers.boot import arguments, boot_command, import_path
from executorlib.launchers.contract import Events, Exit, Lifetime, Process
from executorlib.launchers.last_output import STDERR_TAIL_BYTES, tail_text
from executorlib.launchers.session import settings
from executorlib.serialize import Frame
from executorlib.transports.messages import Channel, Message
from executorlib.worker.protocol import THREAD_VARIABLES, SocketPermits

# Seconds that an agent may take to end after its connection was closed. All it does is kill and reap, for which its own
# limit is five seconds.
_AGENT_END_SECONDS = 10.0
# Seconds that a worker may take to exit after its connection ended, before it counts as running on without one.
_EXIT_SECONDS = 1.0
# Once its writer has ended, a pipe holds at most this many pieces (1 MiB, `/proc/sys/fs/pipe-max-size`). The number is
# limited because other processes may still be writing.
_LAST_PIECES = 17


class Surroundings:
    """Environment, import path and arguments of this process, compared with those that an agent was started with.

    A worker sees the user's process as it is when its call starts, although it is forked from an older agent.
    """

    def __init__(self) -> None:
        self._environ = os.environ.copy()
        self._path = import_path()
        self._argv = arguments()
        self._cwd = _working_directory()
        self._seen: dict[Any, Any] | None = None
        self._changes: dict[str, str | None] = {}

    def changes(self) -> dict[str, Any]:
        """Return the settings that make a worker see this process as it is now."""
        # Compare the encoded form of os.environ if it has one: decoding all of it takes longer than a fork.
        seen = dict(getattr(os.environ, "_data", os.environ))
        if seen != self._seen:
            now, before = os.environ.copy(), self._environ
            self._changes = {name: value for name, value in now.items() if before.get(name) != value}
            self._changes.update((name, None) for name in before if name not in now)
            self._seen = seen
        setup: dict[str, Any] = {}
        if self._changes:
            setup["env"] = self._changes
        if (path := import_path()) != self._path:
            setup["path"] = path
        if (argv := arguments()) != self._argv:
            setup["argv"] = argv
        if (cwd := _working_directory()) != self._cwd:
            setup["cwd"] = cwd
        return setup


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


class PipeTransport:
    """A stream to a worker on this node, driven by the loop's selector."""

    def __init__(self, channel: Channel, events: Events) -> None:
        self.channel = channel
        self._events = events
        self._waiting = False

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Append a message for the worker."""
        return self.channel.put(header, frames)

    def flush(self) -> None:
        """Send the appended messages, now or as soon as the socket accepts them."""
        try:
            done = self.channel.flush()
        except OSError:
            done = True  # the worker is gone; the agent reports its exit
        if not done or self._waiting:
            self._waiting = not done
            self._events.watch_writable(self.channel, self._waiting, self.flush)


@dataclass(eq=False)
class _Child:
    """A child of the agent, in stock or at work."""

    number: int
    pid: int
    stderr: int
    channel: Channel | None
    permits: SocketPermits | None
    process: Process | None = None


class AgentClient:
    """The executor's side of a node agent.

    Args:
        events: The loop.
        spawn: Whether workers are new interpreters instead of forks.
        lifetime: How long workers live.
        stock: Number of forked children to keep ready.
        preload: Modules that the agent imports before it forks.
        threads: Value of the thread variables in the agent, for preloaded modules that read them.
        on_exit: Called when a worker ends; by default the loop's `on_exit`.
        given: Settings that forked workers start with (see `session.settings`); by default this process's own.
    """

    def __init__(
        self,
        events: Events,
        *,
        spawn: bool,
        lifetime: Lifetime,
        stock: int,
        preload: Sequence[str],
        threads: int,
        on_exit: Callable[[Process, Exit], None] | None = None,
        given: dict[str, Any] | None = None,
    ) -> None:
        self._events = events
        self._given = given
        self._on_exit = on_exit or events.on_exit
        self._spawn = spawn
        self._pooled = lifetime is Lifetime.BLOCK
        self._stock_size = 0 if spawn or self._pooled else stock
        self._preload = list(preload)
        self._threads = threads
        self._popen: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._stderr = bytearray()
        self._number = 0
        self._wanted: dict[int, Process] = {}  # requested, not started yet
        self._unwanted: dict[Process, int] = {}  # those of them to be sent a signal once they have started
        self._orders = 0  # number of requested children that are for the stock
        self._stock: deque[_Child] = deque()
        self._children: dict[int, _Child] = {}
        self._by_worker: dict[int, _Child] = {}
        self._host = socket.gethostname()
        self._greeted = False
        self.killed = 0
        self.surroundings = Surroundings()
        self._settings: dict[str, Any] = {}

    # -- requests -------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """True if an agent is running, as far as is known."""
        return self._popen is not None

    def start(self) -> None:
        """Start the agent unless it is running."""
        if self.runs:
            return
        self.surroundings = Surroundings()
        environ = os.environ.copy()
        if self._preload:
            environ.update(dict.fromkeys(THREAD_VARIABLES, str(self._threads)))
        preload = [] if self._spawn else self._preload
        if not self._spawn:
            self._settings = settings() if self._given is None else self._given
        streams.fill()
        with contextlib.ExitStack() as on_failure:
            ours, theirs = socket.socketpair()
            on_failure.callback(ours.close)
            with theirs:
                error_read, error_write = os.pipe()
                on_failure.callback(os.close, error_read)
                command = boot_command(
                    "executorlib.worker.agent", f"({theirs.fileno()}, {preload!r}, {self._settings!r})"
                )
                try:
                    self._popen = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=None if streams.is_users(1) else subprocess.DEVNULL,
                        stderr=error_write,
                        env=environ,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                    )
                finally:
                    os.close(error_write)
            on_failure.pop_all()
        self._greeted = False
        self._stderr.clear()
        self._error_fd = error_read
        os.set_blocking(error_read, False)
        self._events.watch(error_read, self._on_agent_stderr)
        self._channel = Channel(ours)
        self._events.watch(self._channel, self._on_readable)
        self._order_stock()
        self._flush()

    def launch(self, process: Process) -> None:
        """Give a worker a child from the stock, or request one."""
        try:
            self.start()
        except OSError as error:
            self._on_exit(process, Exit(None, f"the node agent could not be started: {error}"))
            return
        if self._stock:
            self._assign(self._stock.popleft(), process)
            self._order_stock()
        else:
            self._order(process)
        self._flush()

    def run(
        self,
        process: Process,
        argv: list[str],
        env: dict[str, str],
        cwd: str | None,
        *,
        forks: bool = False,
        folders: Sequence[str] = (),
    ) -> None:
        """Have the agent run a program, such as `mpiexec`, as a worker that connects back by itself.

        Args:
            process: The worker.
            argv: The program and its arguments.
            env: Its environment.
            cwd: Its working directory, if not the agent's.
            forks: Whether it has child processes as long as it works, so that it is killed once it has had none for a
                while.
            folders: Folders that all such workers of the executor share; the agent removes them if the executor is
                killed.
        """
        try:
            self.start()
        except OSError as error:
            self._on_exit(process, Exit(None, f"the node agent could not be started: {error}"))
            return
        number = self._next_number()
        self._wanted[number] = process
        options = {"argv": argv, "env": env, "cwd": cwd, "own_channel": True, "forks": forks, "folders": list(folders)}
        self._put(["start", number, options])
        self._flush()

    def kill(self, process: Process, signal_number: int) -> None:
        """Signal a worker's process group, as soon as there is one."""
        self._continue()
        child = self._by_worker.get(process.number)
        if child is not None:
            self._put(["kill", child.number, signal_number])
            self._flush()
        elif self._unwanted.get(process) != signal.SIGKILL and any(each is process for each in self._wanted.values()):
            self._unwanted[process] = signal_number

    def resume(self) -> None:
        """Continue the agent, and those workers that run no call and so have nothing left to do but end."""
        self._continue()
        for child in self._by_worker.values():
            assert child.process is not None
            if not child.process.busy:
                self._put(["kill", child.number, signal.SIGCONT])
        self._flush()

    def _continue(self) -> None:
        """Continue the agent if it was suspended: nobody else can carry out what it is about to be asked."""
        if self._popen is not None:
            self._popen.send_signal(signal.SIGCONT)

    def wait(self, process: Process, seconds: float) -> bool:
        """Block until a worker ends, when the loop has finished everything else; returns whether it did in time."""
        give_up = time.monotonic() + seconds
        silent = False
        while process.number in self._by_worker or any(each is process for each in self._wanted.values()):
            left = give_up - time.monotonic()
            if left <= 0 or self._channel is None:
                return False
            poll = select.poll()
            poll.register(self._channel.fileno(), select.POLLIN)
            child = self._by_worker.get(process.number)
            if child is not None and not silent:
                poll.register(child.stderr, select.POLLIN)
            ready = [fd for fd, _ in poll.poll(left * 1000)]
            if child is not None and child.stderr in ready:
                silent = not _forward(child.stderr, process.stderr)
            if self._channel.fileno() in ready:
                self._on_readable()
        return True

    def close(self) -> None:
        """End the agent, and everything that it started."""
        for child in list(self._children.values()):
            self._forget(child)
        self._stock.clear()
        self._wanted.clear()
        self._unwanted.clear()
        self._disconnect()

    # -- the agent's messages -------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        channel = self._channel
        assert channel is not None
        messages, closed = channel.receive()
        for message in messages:
            self._on_message(message)
        if closed and self._channel is channel:
            self._on_agent_death()

    def _on_message(self, message: Message) -> None:
        kind, number, *rest = message.header
        if kind == "started" and message.error is None:
            self._on_started(number, rest[0], message.fds)
        elif kind == "started":
            # Nobody can talk to this worker.
            self._put(["kill", number, signal.SIGKILL])
            self._flush()
            self._on_not_started(number, f"its connection cannot be accepted here: {message.error}")
        elif kind == "exited":
            child = self._children.get(number)
            if child is not None:
                self._on_child_exit(child, rest[0], f"it {describe_exit(rest[0])}")
        elif kind == "failed":
            self._on_not_started(number, f"the node agent could not start it: {rest[0]}")
        else:
            self._greeted = True

    def _on_not_started(self, number: int, text: str) -> None:
        process = self._wanted.pop(number, None)
        if process is None:
            self._orders -= 1
        else:
            self._unwanted.pop(process, None)
            self._on_exit(process, Exit(None, text))

    def _on_started(self, number: int, pid: int, fds: list[int]) -> None:
        stderr, *sockets = fds
        os.set_blocking(stderr, False)
        channel = Channel(socket.socket(fileno=sockets[0])) if sockets else None
        permits = None
        if len(sockets) == 3:
            permits = SocketPermits(socket.socket(fileno=sockets[1]), socket.socket(fileno=sockets[2]))
        child = _Child(number, pid, stderr, channel, permits)
        self._children[number] = child
        process = self._wanted.pop(number, None)
        if process is not None:
            self._assign(child, process)
            if process in self._unwanted:
                self.kill(process, self._unwanted.pop(process))
            return
        self._orders -= 1
        self._stock.append(child)

    def _assign(self, child: _Child, process: Process) -> None:
        child.process = process
        process.pid = child.pid
        process.host = self._host
        process.permits = child.permits
        self._by_worker[process.number] = child
        self._events.watch(child.stderr, lambda: self._on_stderr(child))
        if child.channel is not None:
            channel = child.channel
            process.transport = PipeTransport(channel, self._events)
            process.settings = self._settings
            self._events.watch(channel, lambda: self._on_channel(child))
            self._events.on_connected(process)

    def _on_channel(self, child: _Child) -> None:
        if not self._receive(child):
            return
        # The stream has ended, so only the exit still counts, and it usually follows at once.
        assert child.channel is not None
        self._events.unwatch(child.channel)
        process = child.process
        if process is not None and (process.lifetime is Lifetime.BLOCK or process.busy):
            self._events.call_later(_EXIT_SECONDS, lambda: self._end_disconnected(child.number))

    def _end_disconnected(self, number: int) -> None:
        """Kill a worker that runs on without a connection."""
        child = self._children.get(number)
        if child is None or child.process is None:
            return
        process = child.process
        process.verdict = process.verdict or ExecutorlibSocketError(
            f"The connection of worker process {process.pid} on {process.host} ended although the process ran on, so "
            "it was killed: its call closed the connection's file descriptor, or wrote into it."
        )
        self.kill(process, signal.SIGKILL)

    def _receive(self, child: _Child, everything: bool = False) -> bool:
        """Deliver what a child has sent; True at the end of the stream."""
        assert child.channel is not None
        messages, closed = child.channel.receive(everything)
        process = child.process
        while messages:
            message = messages.pop(0)
            if process is not None and message.error is not None:
                _, number, seconds, text, more = message.header
                text += "the result of the call could not be received here"
                frames = serialize.dumps(message.error)
                self._events.on_message(process, ["error", number, seconds, text, more], frames)
            elif process is not None:
                self._events.on_message(process, message.header, message.frames)
        return closed

    def _on_stderr(self, child: _Child) -> None:
        if child.process is not None and not _forward(child.stderr, child.process.stderr):
            self._events.unwatch(child.stderr)

    def _on_child_exit(self, child: _Child, status: int | None, text: str) -> None:
        # Everything it sent before it died is in the socket by now.
        if child.channel is not None:
            self._receive(child, everything=True)
        process = child.process
        if process is None:
            if child in self._stock:
                self._stock.remove(child)
            self._forget(child)
            return
        _forward(child.stderr, process.stderr, _LAST_PIECES)
        unstarted = () if child.permits is None else child.permits.take_back()
        self._on_exit(process, Exit(status, text, unstarted=unstarted))
        self._forget(child)

    def _forget(self, child: _Child) -> None:
        del self._children[child.number]
        if child.process is not None:
            self._events.unwatch(child.stderr)
            if child.channel is not None:
                self._events.unwatch(child.channel)
            self._by_worker.pop(child.process.number, None)
        os.close(child.stderr)
        if child.channel is not None:
            child.channel.close()
        if child.permits is not None:
            child.permits.close()

    # -- the agent's own end --------------------------------------------------------------------------------------

    def _on_agent_stderr(self) -> None:
        if not _forward(self._error_fd, self._stderr):
            self._events.unwatch(self._error_fd)

    def _on_agent_death(self) -> None:
        _forward(self._error_fd, self._stderr, _LAST_PIECES)
        status = self._disconnect()
        how = describe_exit(status)
        tail = tail_text(self._stderr)
        text = f"the node agent that started it {how}" if self._greeted else f"the node agent {how} as it started"
        if tail:
            text += f"; its last words were:\n{tail}"
        self._stock.clear()
        self._orders = 0
        wanted = list(self._wanted.values())
        self._wanted.clear()
        self._unwanted.clear()
        for child in list(self._children.values()):
            # The system kills them with their agent if it can; this is for other systems, and for what the workers
            # started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, 9)
            self._on_child_exit(child, None, text)
        for process in wanted:
            self._on_exit(process, Exit(None, text))

    def _disconnect(self) -> int:
        """Close the connection, which ends the agent, and return its wait status."""
        if self._popen is None or self._channel is None:
            return 0
        self._events.unwatch(self._channel)
        self._events.unwatch(self._error_fd)
        self._channel.close()
        self._channel = None
        self._continue()
        popen, self._popen = self._popen, None
        try:
            code = popen.wait(_AGENT_END_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()
            code = popen.wait()
        os.close(self._error_fd)
        self.killed += code < 0
        return code << 8 if code >= 0 else -code

    # -- orders ---------------------------------------------------------------------------------------------------

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _order(self, process: Process) -> None:
        number = self._next_number()
        self._wanted[number] = process
        self._put(["start", number, self._options()])

    def _order_stock(self) -> None:
        while len(self._stock) + self._orders < self._stock_size:
            self._orders += 1
            self._put(["start", self._next_number(), self._options()])

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self._pooled:
            options["pooled"] = True
        if self._spawn:
            options["argv"] = boot_command("executorlib.worker.spawned", f"({self._pooled}, {self._preload!r})")
            options["env"] = os.environ.copy()
        return options

    def _put(self, header: list[Any]) -> None:
        assert self._channel is not None
        self._channel.put(header)

    def _flush(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            done = channel.flush()
        except OSError:
            return  # reading from the channel will tell
        self._events.watch_writable(channel, not done, self._flush)


def _write_stderr(data: bytes) -> None:
    """Write what the user's standard error accepts without waiting; a full pipe or stopped terminal gets no more."""
    if not streams.is_users(2):
        return
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    for start in range(0, len(data), select.PIPE_BUF):
        # A pipe that is writable is sure to accept this much.
        if not poll.poll(0):
            return
        with contextlib.suppress(OSError):
            os.write(2, data[start : start + select.PIPE_BUF])


def _forward(fd: int, tail: bytearray, most: int = 1) -> bool:
    """Pass on what a process writes to standard error, and keep its tail; False at the end of the stream.

    Args:
        fd: Where to read.
        tail: The end of everything so far.
        most: Most pieces to read, of up to 64 KB each, so that a process that writes endlessly cannot occupy the loop.
    """
    for _ in range(most):
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        tail += data
        del tail[:-STDERR_TAIL_BYTES]
        _write_stderr(data)
    return True
