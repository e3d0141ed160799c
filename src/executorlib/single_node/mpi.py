"""MPI worlds on one node: `mpiexec` starts the ranks, and rank 0 connects back.

The node agent runs `mpiexec`, so a world is watched and ended like any other worker. `mpiexec --version` tells whether
it is Open MPI or MPICH.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from executorlib.launchers.contract import Events, Exit, Process
from executorlib.serialize import Frame
from executorlib.worker.protocol import THREAD_VARIABLES

if TYPE_CHECKING:
    from executorlib.launchers.connecting import ConnectingWorker
    from executorlib.single_node.agent import AgentClient
    from executorlib.transports.router import Router

_INSTALL = (
    'Install both with `pip install "executorlib[mpi]"`, or load your cluster\'s MPI module and '
    "`pip install mpi4py` for it."
)
# Seconds from asking a world to end, so that mpiexec can tidy up, to killing it.
_GRACE_SECONDS = 2.0
# Seconds to wait for the kernel to release the memory of ranks that are gone. That takes milliseconds, but files of
# other worlds, which stay in use, look the same; and the loop is waiting.
_RELEASE_SECONDS = 0.5
# Where Open MPI keeps its worlds' session directories, from version 5 on and before. They remain if it is killed.
_SESSION_VARIABLES = ("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base")
# Where it keeps the memory that ranks share, from version 5 on and before. That remains, too.
_SHARED_VARIABLES = ("OMPI_MCA_btl_sm_backing_directory", "OMPI_MCA_btl_vader_backing_directory")
_MEMORY = "/dev/shm"
# In the environment of all ranks of an executor, to find those that have outlived everything else.
_MARK_VARIABLE = "EXECUTORLIB_RANKS_OF"
# Variables set by a launcher that started the user's process itself; a new world must not join that world.
FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDI_")


@dataclass(frozen=True)
class Mpiexec:
    """An MPI launcher.

    Attributes:
        path: The program.
        is_open_mpi: Whether it is Open MPI's; otherwise it is treated as MPICH's, or as one that behaves like it.
        version: First line of the answer to `--version`.
    """

    path: str
    is_open_mpi: bool
    version: str

    def command(self, ranks: int, program: list[str], oversubscribe: bool) -> list[str]:
        """The command that runs a program on this many ranks."""
        options: list[str] = []
        if self.is_open_mpi:
            # The ledger assigns cores; if mpiexec bound ranks itself, it would put all worlds on the same cores.
            options += ["--bind-to", "none"]
            if oversubscribe:
                options.append("--oversubscribe")
        return [self.path, "-n", str(ranks), *options, *program]

    def command_on(self, hosts: list[str], ranks: int, program: list[str], oversubscribe: bool) -> list[str]:
        """The command that runs ranks on several nodes, each given as ``name:ranks``."""
        command = self.command(ranks, program, oversubscribe)
        return [command[0], "--host" if self.is_open_mpi else "-hosts", ",".join(hosts), *command[1:]]

    def environment(self) -> dict[str, str]:
        """Environment variables that it needs."""
        if self.is_open_mpi and os.geteuid() == 0:
            # Open MPI refuses to run as root unless told twice, and in containers root is often the only user.
            return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {}


def find_mpiexec() -> Mpiexec:
    """Find `mpiexec`: next to this interpreter (where PyPI's wheels put it), then on PATH.

    Raises:
        FileNotFoundError: There is none.
        RuntimeError: It does not answer `--version`.
    """
    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    path = beside if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if path is None:
        raise FileNotFoundError(f"a call with cores > 1 needs `mpiexec`, which is not on PATH. {_INSTALL}")
    answer = _ask(path)
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


@functools.lru_cache
def _ask(path: str) -> Mpiexec | str:
    """Return a program's answer to `--version`, or why there is none. Failures are kept, too, as asking may be slow."""
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    try:
        answer = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
            env=environ,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{path} --version` does not work: {error}. {_INSTALL}"
    text = answer.stdout + answer.stderr
    is_open_mpi = any(name in text for name in ("Open MPI", "OpenRTE", "PRRTE", "prterun"))
    return Mpiexec(path, is_open_mpi, text.strip().partition("\n")[0])


def ask_mpiexec_once() -> None:
    """Have the answer of `find_mpiexec` ready for the loop, because asking may take a tenth of a second.

    A missing `mpiexec` is no error here: it is one of the call, or there may be one where the call's job runs.
    """
    with contextlib.suppress(OSError, RuntimeError):
        find_mpiexec()


def check_mpi() -> BaseException | None:
    """The reason why MPI calls cannot run here, or None."""
    try:
        find_mpiexec()
    except (OSError, RuntimeError) as error:
        return error
    if importlib.util.find_spec("mpi4py") is None:
        return ModuleNotFoundError(f"a call with cores > 1 needs the package mpi4py, which is missing. {_INSTALL}")
    return None


@dataclass(frozen=True)
class _World:
    """A running world.

    Attributes:
        worker: The worker that it is for the loop.
        agent: The agent that runs its `mpiexec`.
        mark: Environment variable and value that only its processes have.
        since: When it was started.
    """

    worker: ConnectingWorker
    agent: AgentClient
    mark: str
    since: float


class MpiLauncher:
    """Starts worlds and connects them to the loop.

    Args:
        events: The loop.
        hidden: Prefixes of the names of further variables that `mpiexec` must not see.
    """

    def __init__(self, events: Events, hidden: tuple[str, ...] = ()) -> None:
        self._events = events
        self._foreign = (*FOREIGN_PREFIXES, *hidden)
        self._router: Router | None = None
        self._worlds: dict[str, _World] = {}  # by identity
        self._since: float | None = None  # when the first one was started
        self._agents: dict[AgentClient, int] = {}  # agents that run worlds, with how often each was killed before
        self._folders: list[str] = []  # the socket's, and one in memory; Open MPI's files are in both, by world

    def launch(self, process: Process, agent: AgentClient, program: list[str]) -> None:
        """Start the ranks of a world.

        Args:
            process: The worker that the world is for the loop.
            agent: Runs `mpiexec`.
            program: Program and arguments of each rank.
        """
        error = check_mpi()
        if error is not None:
            self._events.on_exit(process, Exit(None, str(error), error))
            return
        if self._router is None:
            from executorlib.transports.router import Router

            self._router = Router(self._events, self._on_message)
            self._folders = [self._router.directory]
        from executorlib.launchers.connecting import ConnectingWorker
        from executorlib.transports.curve import CONNECTION_VARIABLE

        resources = process.resources
        mpiexec = find_mpiexec()
        identity = str(process.number)
        env = {name: value for name, value in os.environ.items() if not name.startswith(self._foreign)}
        env.update(mpiexec.environment())
        env.update(dict.fromkeys(THREAD_VARIABLES, str(resources.threads_per_core)))
        if mpiexec.is_open_mpi:
            if len(self._folders) == 1 and os.access(_MEMORY, os.W_OK):
                self._folders.append(tempfile.mkdtemp(prefix="executorlib-", dir=_MEMORY))
            for folder, variables in zip(self._folders, (_SESSION_VARIABLES, _SHARED_VARIABLES), strict=False):
                own = os.path.join(folder, identity)
                os.mkdir(own, mode=0o700)
                env = {**dict.fromkeys(variables, own), **env}
        env[_MARK_VARIABLE] = self._router.directory
        credentials = env[CONNECTION_VARIABLE] = self._router.credentials(identity).dumps()
        argv = mpiexec.command(resources.cores, program, resources.openmpi_oversubscribe)
        worker = ConnectingWorker(
            self._events,
            self._router,
            process,
            lambda: self.end(process, agent),
            starter=f"{mpiexec.path} ({mpiexec.version})",
            advice=f"Use an mpi4py that was built for this MPI. {_INSTALL}",
        )
        world = _World(worker, agent, f"{CONNECTION_VARIABLE}={credentials}", time.time())
        self._worlds[identity] = world
        self._since = self._since or world.since
        self._agents.setdefault(agent, agent.killed)
        process.on_gone = lambda: self._forget(identity)
        agent.run(process, argv, env, resources.cwd, forks=True, folders=self._folders)

    def _on_message(self, peer: bytes, header: list[Any], frames: list[Frame]) -> None:
        from executorlib.transports.router import worker_of

        world = self._worlds.get(worker_of(peer))
        if world is not None:
            world.worker.on_message(peer, header, frames)

    def kill(self, process: Process, agent: AgentClient, signal_number: int) -> None:
        """Signal a world; SIGKILL ends it gently first, so that mpiexec can tidy up."""
        if signal_number == signal.SIGKILL:
            self.end(process, agent)
        else:
            self._signal(process, agent, signal_number)

    def end(self, process: Process, agent: AgentClient) -> None:
        """End a world: gently at first, by force after a grace period."""
        self._signal(process, agent, signal.SIGTERM)
        identity = str(process.number)
        self._events.call_later(_GRACE_SECONDS, lambda: self._kill_if_alive(identity))

    def _signal(self, process: Process, agent: AgentClient, signal_number: int) -> None:
        world = self._worlds.get(str(process.number))
        if world is not None and world.worker.peer is None and signal_number in (signal.SIGTERM, signal.SIGINT):
            # No user code runs in it yet, and only the agent can tidy up after ranks that have not found each other.
            signal_number = signal.SIGKILL
        agent.kill(process, signal_number)

    def _kill_if_alive(self, identity: str) -> None:
        world = self._worlds.get(identity)
        if world is not None:
            world.agent.kill(world.worker.process, signal.SIGKILL)

    def _forget(self, identity: str) -> None:
        world = self._worlds.pop(identity, None)
        if world is not None and not world.agent.runs:
            # The agent was killed and could not tidy up. The ranks have lost all their ancestors, or are about to.
            _end_and_tidy_up(world.mark, world.since)
        for folder in self._folders:
            shutil.rmtree(os.path.join(folder, identity), ignore_errors=True)

    def close(self) -> None:
        """Close the connections, once the worlds and their agents are gone."""
        for identity in list(self._worlds):
            self._forget(identity)
        if self._router is not None:
            self._router.close()
            if self._since is not None and any(agent.killed > before for agent, before in self._agents.items()):
                # A world may have ended before its agent was killed, and some of its ranks may have outlived both.
                _end_and_tidy_up(f"{_MARK_VARIABLE}={self._router.directory}", self._since)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def _end_and_tidy_up(mark: str, since: float) -> None:
    """Kill ranks that no longer have an agent, and remove what they leave in memory.

    Args:
        mark: Environment variable and value that identify them.
        since: When the first of them was started.
    """
    from executorlib.worker.family import end_marked
    from executorlib.worker.world import remove_unused_files

    end_marked(os.fsencode(mark))
    give_up = time.monotonic() + _RELEASE_SECONDS
    while remove_unused_files(since) and time.monotonic() < give_up:
        time.sleep(0.01)
