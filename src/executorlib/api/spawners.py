"""Starts a library's programs and watches them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from executorlib.api.program import _KEYS_VARIABLE
from executorlib.futures.locks import RLock
from executorlib.launchers import streams
from executorlib.options import documented
from executorlib.worker import protocol

if TYPE_CHECKING:
    from executorlib.single_node.mpi import Mpiexec

# How long a program may take to end by itself after it answered to `shutdown`.
_END_SECONDS = 30.0
# From SIGTERM to SIGKILL: mpiexec passes SIGTERM on to its ranks, which takes a moment.
_TERM_SECONDS = 5.0

_STDERR_CHUNK = 1 << 16
_STDERR_FILE_BYTES = 1 << 24
_STDERR_TAIL_BYTES = 4096


class _Relay:
    """A program's standard error: shown on ours, with its end remembered for error texts.

    It goes to an unnamed file and not through a pipe, so that a program never waits for a library that is busy.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open until close()
        # The program appends, so that we can empty the file while it writes.
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)
        self._shown = 0
        self._tail = b""

    def forward(self) -> None:
        """Show what the program has written since the last time."""
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
        """The end of what the program has written."""
        self.forward()
        return self._tail.decode(errors="replace").strip()

    def close(self) -> None:
        self.forward()
        self.file.close()


class SubprocessSpawner:
    """Starts programs on this node, one at a time, and watches them.

    Args:
        cwd: Working directory of the program, created if missing; by default this process's.
        cores: Number of MPI ranks; only `MpiExecSpawner` starts more than one.
        worker_id: The program's number; kept for spawners that derive from this one.
        openmpi_oversubscribe: Let Open MPI start more ranks than there are cores.
        threads_per_core: Threads of each rank: the value of ``OMP_NUM_THREADS``, ``OPENBLAS_NUM_THREADS``,
            ``MKL_NUM_THREADS``, ``NUMEXPR_NUM_THREADS`` and ``VECLIB_MAXIMUM_THREADS`` in the program.
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
            stop_function: Called first; if it returns True, the program is not started.

        Returns:
            Whether the program is running.

        Raises:
            RuntimeError: The last program is still running.
            OSError: The program cannot be started.
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
                # In a group of its own, so that everything the program starts can be ended with it.
                start_new_session=True,
            )
        except BaseException:
            self._forget()
            raise
        return self.poll()

    def poll(self) -> bool:
        """Return whether the program is running. Also shows what it has written to standard error."""
        running = self._process is not None and self._process.poll() is None
        if self._relay is not None:
            self._relay.forward()
        return running

    def shutdown(self, wait: bool = True) -> None:
        """Make sure that the program ends.

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
        """Return the variables that the program needs in its environment."""
        environment = dict.fromkeys(protocol.THREAD_VARIABLES, str(self._threads_per_core))
        return {**environment, _KEYS_VARIABLE: self._keys}

    def _forget(self) -> None:
        self._process = None
        if self._relay is not None:
            self._relay.close()
            self._relay = None


@documented(SubprocessSpawner)
class MpiExecSpawner(SubprocessSpawner):
    """Starts a program with MPI: ``cores`` ranks on this node; without mpiexec if ``cores`` is 1."""

    def generate_command(self, command_lst: list[str]) -> list[str]:
        """The command that `bootup` runs for a program.

        Args:
            command_lst: The program and its arguments.

        Returns:
            ``mpiexec -n <cores> ... <command_lst>``, with ``--oversubscribe`` if it was asked for and this is Open MPI.

        Raises:
            FileNotFoundError: There is no mpiexec next to this Python or on PATH.
            RuntimeError: It does not answer ``--version``.
        """
        if self._cores == 1:
            return super().generate_command(command_lst)
        return _find_mpiexec().command(self._cores, command_lst, self._openmpi_oversubscribe)

    def _environment(self) -> dict[str, str]:
        ranks = _find_mpiexec().environment() if self._cores > 1 else {}
        return {**super()._environment(), **ranks}


def _find_mpiexec() -> Mpiexec:
    # Imported here, because the programs also import this module and do not need the executor's side.
    from executorlib.single_node.mpi import find_mpiexec

    return find_mpiexec()


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """End a program and, if it leads a process group of its own, everything that it started."""
    # No such process, or one that only waits to be reaped (macOS): it has ended in the meantime.
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
