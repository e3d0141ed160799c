"""The node agent: a small single-threaded process that starts workers, reports their ends, and outlives none of them.

It is started once per executor by `exec`, so it has none of the user's threads. It forks a child for every worker,
which thus gets a fresh interpreter with serializer and worker code loaded for the price of a fork. The agent makes the
channel over which a child talks to the executor and passes it to both, so no socket ever listens.

It receives ``["start", number, options]`` and ``["kill", number, signal]`` from the executor, and sends
``["hello", pid]``, ``["started", number, pid]`` with descriptors, ``["failed", number, text]`` and
``["exited", number, wait status]``.

It ends with its executor, and takes every process that descends from it along.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib.util
import os
import select
import signal
import socket
import sys
import time

from executorlib.transports.messages import Connection
from executorlib.worker import call, family, protocol, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The descriptors at which an exec'ed worker finds its connection and its permits.
CONNECTION_FD = 3
PERMITS_FD = 4
# MPICH's mpiexec waits forever if the process that it uses to start ranks is killed at a bad moment. So such a program
# may be without a process of its own for this long, in seconds; and how often to look.
_ALONE_SECONDS, _LOOK_SECONDS = 10.0, 1.0


class Agent:
    """The agent's state: its connection and its children.

    Args:
        connection: The connection to the executor.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._children: dict[int, int] = {}  # pid → worker number
        self._pids: dict[int, int] = {}
        self._programs: set[int] = set()  # pids of children that are not workers themselves, such as mpiexec
        self._busy: dict[int, float] = {}  # programs that only wait for processes: when each last had one
        self._next_look = 0.0
        self._folders: set[str] = set()  # the executor's, for removal here if it was killed
        self.is_left = False  # True once the executor is gone
        self._since: float | None = None  # when the first program with its own channel was started
        self._pid = os.getpid()
        self._parent = os.getppid()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # A terminal's Ctrl-C is meant for the user's process, which decides what becomes of the calls.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        family.adopt()

    def serve(self) -> None:
        """Work until the executor is gone."""
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        poll.register(self._wake_read.fileno(), select.POLLIN)
        # The end of the connection reveals the executor's end, unless the user's process was forked and the copy holds
        # its descriptors; then a pidfd does. Systems without pidfds compare the parent's pid once a second.
        parent_fd = -1
        with contextlib.suppress(OSError, AttributeError):
            parent_fd = os.pidfd_open(self._parent)
            poll.register(parent_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(1000 * _LOOK_SECONDS if parent_fd < 0 or self._busy else None)}
            if parent_fd in ready or os.getppid() != self._parent:
                self.is_left = True
                return
            if self._busy:
                self._end_those_alone()
            if self._wake_read.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
                self._reap()
            if self._connection.fileno() in ready:
                try:
                    message = self._connection.receive()
                    self._obey(message.header)
                    while self._connection.pending():
                        self._obey(self._connection.receive().header)
                except (EOFError, ConnectionError):
                    self.is_left = True
                    return
                except OSError:
                    return
                self._load_the_rest()

    def _end_those_alone(self) -> None:
        """End programs that have no process left to wait for."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for pid, seen in self._busy.items():
            if not family.is_alone(pid):
                self._busy[pid] = now
            elif now - seen > _ALONE_SECONDS:
                _kill_group(pid, signal.SIGKILL)

    def _load_the_rest(self) -> None:
        """Load what most children need. The first ones start without it, because loading it would delay them more."""
        if "cloudpickle" not in sys.modules:
            import cloudpickle  # noqa: F401

            _freeze()

    def _obey(self, header: list[Any]) -> None:
        if header[0] == "start":
            _, number, options = header
            try:
                self._start(number, options)
            except OSError as error:
                self._connection.send(["failed", number, f"{type(error).__name__}: {error}"])
        else:
            _, number, signal_number = header
            pid = self._pids.get(number)
            if pid is not None and signal_number == signal.SIGKILL:
                self._kill(pid)
            elif pid is not None:
                _kill_group(pid, signal_number)

    def _kill(self, pid: int) -> None:
        """Kill a worker and all its descendants. Ranks have process groups of their own and would outlive mpiexec."""
        left = family.descendants(pid)
        if pid in self._programs:
            from executorlib.worker import world

            for descendant in left:
                family.kill(descendant, signal.SIGSTOP)
                world.unlink_shared_files(descendant)  # ranks that are still starting have not done it
        _kill_group(pid, signal.SIGKILL)
        for descendant in left:
            family.kill(descendant, signal.SIGKILL)

    def _start(self, number: int, options: dict[str, Any]) -> None:
        """Start a worker.

        Args:
            number: The executor's number for it.
            options: ``pooled``: it runs many calls and needs permits. ``argv``: exec this instead of going on as a
                fork, with ``env`` and ``cwd``. ``own_channel``: it connects back on its own and needs no connection.
                ``forks``: it has child processes for as long as it has something to do. ``folders``: what to remove
                at the end if the executor is gone.
        """
        theirs: list[socket.socket] = []  # the executor's ends
        ours: list[socket.socket] = []  # the child's ends
        self._folders.update(options.get("folders", ()))
        error_read, error_write = os.pipe()
        if options.get("own_channel") and self._since is None:
            self._since = time.time()
        try:
            if not options.get("own_channel"):
                for _ in range(2 if options.get("pooled") else 1):
                    their_end, our_end = socket.socketpair()
                    theirs.append(their_end)
                    ours.append(our_end)
            pid = os.fork()
            if pid == 0:
                try:
                    # If the child held the executor's ends too, these connections would never end.
                    os.close(error_read)
                    for sock in theirs:
                        sock.close()
                    self._become_child(error_write, ours, options)
                finally:
                    os._exit(70)
            # The child does this as well, so that it is done whoever gets there first.
            with contextlib.suppress(OSError):
                os.setpgid(pid, pid)
            self._children[pid] = number
            if options.get("own_channel"):
                self._programs.add(pid)
            if options.get("forks"):
                self._busy[pid] = time.monotonic()
            self._pids[number] = pid
            fds = [error_read, *(sock.fileno() for sock in theirs)]
            if options.get("pooled"):
                fds.append(ours[1].fileno())
            self._connection.send(["started", number, pid], (), fds)
        finally:
            for sock in (*theirs, *ours):
                sock.close()
            os.close(error_read)
            os.close(error_write)

    def _become_child(self, error_write: int, ours: list[socket.socket], options: dict[str, Any]) -> None:
        """Leave the agent behind in the forked child, and run as a worker or exec another program. Never returns."""
        try:
            family.prctl(family.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(0)  # the agent died before its death could be signalled
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(error_write, 2)
            os.close(error_write)
            if "argv" in options:
                self._exec(ours, options)
            self._connection.close()
            self._wake_read.close()
            self._wake_write.close()
            atexit._clear()
            gc.enable()
            _reseed()
            permits = protocol.WorkerPermits(ours[1]) if len(ours) > 1 else None
            call.serve(Connection(ours[0]), permits)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            os._exit(0)  # the executor is gone
        except BaseException as error:
            sys.stderr.write(call.traceback_text(error))
            call.leave(1)
        call.leave(0)

    def _exec(self, ours: list[socket.socket], options: dict[str, Any]) -> None:
        # Through high numbers first, because each descriptor may have the number that the other is to get.
        high = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 16) for sock in ours]
        for target, fd in zip((CONNECTION_FD, PERMITS_FD), high, strict=False):
            os.dup2(fd, target, inheritable=True)
        if options.get("cwd"):
            os.chdir(options["cwd"])
        argv = options["argv"]
        try:
            os.execvpe(argv[0], argv, options["env"])
        except OSError as error:
            sys.stderr.write(f"cannot execute {argv[0]}: {error}\n")
            sys.stderr.flush()
            os._exit(127)

    def _reap(self) -> None:
        """Report children that ended. After a bad end, kill what is left of their process group."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            is_program = pid in self._programs
            self._programs.discard(pid)
            self._busy.pop(pid, None)
            number = self._children.pop(pid, None)
            if number is None:
                self._tidy_up()  # left behind by one of our children, maybe a rank that outlived mpiexec
                continue
            if status != 0:
                # The number cannot be reused as long as there is a process in the group.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                if is_program:
                    self._tidy_up()
            del self._pids[number]
            self._connection.send(["exited", number, status])

    def _tidy_up(self) -> None:
        if self._since is not None:
            from executorlib.worker import world

            world.remove_unused_files(self._since)

    def end(self) -> None:
        """Kill and reap all descendants of the agent."""
        signal.set_wakeup_fd(-1)  # nobody wants to hear of children's ends any more
        for pid in self._programs:
            self._kill(pid)
        for pid in self._children:
            _kill_group(pid, signal.SIGKILL)
        family.end()
        self._tidy_up()
        if self.is_left and self._folders:
            from shutil import rmtree

            for folder in self._folders:
                rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the agent's sockets, because the interpreter would warn about them at exit."""
        self._wake_read.close()
        self._wake_write.close()
        self._connection.close()


def _kill_group(pid: int, signal_number: int) -> None:
    try:
        os.killpg(pid, signal_number)
    except (ProcessLookupError, PermissionError):  # there is no group yet, or only zombies are in it (macOS)
        family.kill(pid, signal_number)


def _freeze() -> None:
    """Keep the garbage collector off existing objects: children share these pages until somebody writes to them."""
    gc.collect()
    gc.freeze()


def _reseed() -> None:
    """Give the child its own random numbers. Python's generator does so by itself; numpy's, if preloaded, does not."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def note_files(modules: list[str]) -> None:
    """Record the files of preloaded modules, so that a later change of one shows in keys."""
    if "executorlib.keys.sources" in sys.modules or any(name.partition(".")[0] != "executorlib" for name in modules):
        from executorlib.keys.sources import remember  # not needed by most workers

        remember()


def main(fd: int, preload: list[str], given: dict[str, Any]) -> None:
    """Run as agent.

    Args:
        fd: The descriptor of the socket to the executor.
        preload: Modules to import before any child is forked.
        given: Settings that all children inherit, see `worker.settings`.
    """
    family.unblock()
    # A suspended agent would not notice that its executor is gone. SIGCONT has no effect on one that is running.
    family.prctl(family.PR_SET_PDEATHSIG, signal.SIGCONT)
    call.tell_crashes()
    connection = Connection(socket.socket(fileno=fd))
    os.set_inheritable(fd, False)
    agent = Agent(connection)
    try:
        settings.apply(given)
        call.load(preload)
        if "executorlib.worker.entry" in preload:
            from executorlib.worker.entry import rehearse

            rehearse()
        note_files(preload)
        call.flush()  # or every child would print it again
        # This search fails after going through the whole import path, so that every child inherits the directory
        # listings instead of reading them anew for its first import.
        importlib.util.find_spec("_executorlib_finds_no_such_module")
        connection.send(["hello", os.getpid()])
        gc.disable()
        _freeze()
        agent.serve()
    except (BrokenPipeError, ConnectionResetError):
        agent.is_left = True
    finally:
        agent.end()
    # Not after an exception: the executor reads its text once the connection has ended.
    agent.close()
