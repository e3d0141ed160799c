"""How a library's programs are started and looked after."""

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
from executorlib.worker import protocol

if TYPE_CHECKING:
    from executorlib.single_node.mpi import Mpiexec

# How long a program may take to end by itself: after it answered to `shutdown`, and where nobody
# waits for it.
_END_SECONDS = 30.0
# From SIGTERM to SIGKILL: mpiexec passes the first on to its ranks and needs a moment for it.
_TERM_SECONDS = 5.0

_STDERR_CHUNK = 1 << 16
_STDERR_FILE_BYTES = 1 << 24
_STDERR_TAIL_BYTES = 4096


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
        environment = dict.fromkeys(protocol.THREAD_VARIABLES, str(self._threads_per_core))
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
    from executorlib.single_node.mpi import find_mpiexec

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
