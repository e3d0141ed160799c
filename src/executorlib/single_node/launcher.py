"""Starts workers on this node: forked by its agent, or as MPI ranks by mpiexec."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from executorlib.launchers.boot import arguments, boot_command
from executorlib.launchers.contract import Events, Launcher, Lifetime, Process
from executorlib.single_node.agent import AgentClient
from executorlib.single_node.mpi import MpiLauncher


class LocalLauncher(Launcher):
    """Starts workers on one node: forked or spawned by an agent, or as ranks of an MPI world.

    Args:
        events: The loop.
        spawn: Whether workers are new interpreters instead of forks.
        lifetime: How long workers live.
        stock: Number of forked children to keep ready.
        preload: Modules that an agent imports before it forks.
        default_threads: `threads_per_core` of the executor, for the agent that is started first.
        hidden: Prefixes of the names of variables that `mpiexec` must not see.
        given: Settings that forked workers start with, as in `AgentClient`.
    """

    def __init__(
        self,
        events: Events,
        *,
        spawn: bool,
        lifetime: Lifetime,
        stock: int,
        preload: Sequence[str],
        default_threads: int,
        hidden: tuple[str, ...] = (),
        given: dict[str, Any] | None = None,
    ) -> None:
        self._events = events
        self._given = given
        self._spawn = spawn
        self._lifetime = lifetime
        self._stock = stock
        self._preload = preload
        self._agents: dict[int, AgentClient] = {}
        self._mpi: MpiLauncher | None = None
        self._default_threads = default_threads
        self._hidden = hidden

    def prepare(self) -> None:
        """Start the agent early. If that fails, it fails again with the first call, and is reported then."""
        with contextlib.suppress(OSError):
            self._agent(self._default_threads).start()

    def _agent(self, threads: int) -> AgentClient:
        # Libraries read the thread variables when they are loaded. Preloaded ones do so in the agent, so then every
        # number of threads needs an agent of its own.
        key = threads if self._preload else 0
        agent = self._agents.get(key)
        if agent is None:
            agent = self._agents[key] = AgentClient(
                self._events,
                spawn=self._spawn,
                lifetime=self._lifetime,
                stock=self._stock,
                preload=self._preload,
                threads=threads,
                given=self._given,
            )
        return agent

    def launch(self, process: Process) -> None:
        """Start a worker, or an MPI world if it has several ranks."""
        agent = self._agent(process.resources.threads_per_core)
        if process.resources.cores > 1:
            if self._mpi is None:
                self._mpi = MpiLauncher(self._events, self._hidden)
            single = process.lifetime is Lifetime.CALL
            self._mpi.launch(
                process, agent, boot_command("executorlib.worker.mpi", f"({single}, local=True)", rank=True)
            )
        else:
            agent.launch(process)

    def setup(self, process: Process) -> dict[str, Any]:
        """Return the changes in this process since the worker's agent was started."""
        setup = self._agent(process.resources.threads_per_core).surroundings.changes()
        if process.resources.cores > 1:
            setup["argv"] = arguments()  # ranks do not get them on the command line, see `boot_command`
        return setup

    def kill(self, process: Process, signal_number: int) -> None:
        """Signal a worker or world."""
        agent = self._agent(process.resources.threads_per_core)
        if self._mpi is not None and process.resources.cores > 1:
            self._mpi.kill(process, agent, signal_number)
        else:
            agent.kill(process, signal_number)

    def resume(self) -> None:
        """Continue the agents, and their workers that have no call."""
        for agent in self._agents.values():
            agent.resume()

    def close(self) -> None:
        """End the agents, and with them all workers."""
        for agent in self._agents.values():
            agent.close()
        if self._mpi is not None:
            self._mpi.close()
