"""Workers on the nodes of a Slurm allocation: one `srun` starts an agent on each node, which then starts all workers.

So the number of requests to Slurm's controller does not depend on the number of calls. The agent of a node is a
`relay.node_side`, which holds one encrypted connection and uses the code of `SingleNodeExecutor`, with mpiexec for
ranks on one node. Workers that need Slurm itself (ranks on several nodes, ``pmi_mode``, ``slurm_cmd_args``) are steps
of their own, beside the agents and on exactly the nodes that the ledger chose.

A node whose agent is gone is lost: nobody can tell what became of its workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from executorlib.errors import ExecutorlibSocketError
from executorlib.launchers.boot import arguments, boot_command
from executorlib.launchers.connecting import ConnectingWorker
from executorlib.launchers.contract import Events, Exit, Launcher, Lifetime, Process
from executorlib.launchers.last_output import tail_text
from executorlib.launchers.session import settings
from executorlib.launchers.subprocesses import CommandOutput, Commands
from executorlib.relay.executor_side import RelayEnd, Relays, relay_program
from executorlib.resources import Resources
from executorlib.serialize import Frame
from executorlib.single_node.agent import AgentClient
from executorlib.single_node.mpi import find_mpiexec
from executorlib.slurm.queue import command_environment
from executorlib.slurm.steps import parse_time_left, ranks_command, relays_command, step_environment
from executorlib.transports.curve import CONNECTION_VARIABLE
from executorlib.transports.router import Router, worker_of
from executorlib.worker.protocol import THREAD_VARIABLES

if TYPE_CHECKING:
    from executorlib.core.ledger import Node

logger = logging.getLogger("executorlib")

# Identity of the agents' connections. Those of steps are the numbers of their workers.
_RELAYS = "relays"
# An agent that has not connected within this time, in seconds, will not come: slow file systems and prologs take some
# tens of seconds.
_START_SECONDS = 180.0
# Seconds that srun may take after the loss of a connection to say what it knows about it.
_WORDS_SECONDS = 0.5
# When a node fails, Slurm kills everything there at once, and the agent may report a worker's end before its own. So
# the report of a killed worker is held back this long, in seconds, in case the whole node is gone.
_KILLED_SECONDS = 0.25
# Seconds for the agents to end their workers during shutdown, and for srun to pass on the workers' last output.
_END_SECONDS = 10.0
# Seconds between looks for new connections during that time.
_CLOSE_SECONDS = 0.02
# Seconds from asking a step to end to killing its srun.
_GRACE_SECONDS = 5.0
# How long before the job's time limit the user is warned, in seconds.
_WARN_SECONDS = 300.0


class _Relay(RelayEnd):
    """A node, as the executor sees it.

    Attributes:
        node: The ledger's record of it.
        waiting: Workers that are to be started once its agent is connected.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node
        self.size = node.total_cores, sorted(node.free_gpus)
        self.waiting: dict[int, Process] = {}


class NodesLauncher(Launcher):
    """Starts workers on the nodes of the allocation that this process is in.

    Args:
        events: The loop.
        nodes: The nodes.
        lifetime: How long workers live.
        preload: Modules that the agents import before they fork.
        threads: `threads_per_core` of the executor.
        pmi_mode: How `srun` and MPI find each other, such as ``"pmix"``; None for mpiexec.
        hostname_localhost: Whether to listen on the loopback interface only.
    """

    def __init__(
        self,
        events: Events,
        nodes: Sequence[Node],
        *,
        lifetime: Lifetime,
        preload: Sequence[str],
        threads: int,
        pmi_mode: str | None,
        hostname_localhost: bool,
    ) -> None:
        self._events = events
        self._lifetime = lifetime
        self._preload = preload
        self._threads = threads
        self._pmi_mode = pmi_mode
        self._by_node = {node.name: _Relay(node) for node in nodes}
        self._by_peer: dict[bytes, _Relay] = {}
        self._router = Router(events, self._on_message, self._on_lost, tcp=True, hostname_localhost=hostname_localhost)
        self._relays = Relays(events, self._router, lifetime, self._on_worker_exit)
        # It runs srun, reports srun's end, and ends with this process.
        self._agent = AgentClient(
            events,
            spawn=False,
            lifetime=Lifetime.CALL,
            stock=0,
            preload=[],
            threads=threads,
            on_exit=self._on_step_exit,
        )
        self._step: Process | None = None  # of the relays
        self._steps: dict[str, ConnectingWorker] = {}  # of ranks, by identity
        self._folder = ""  # of files that name the node of each rank of a step
        self._commands = Commands(events)
        self._closing = False

    # -- Launcher -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Start the relays on all nodes with one srun."""
        if self._step is not None:
            return
        given = settings()
        program = relay_program(
            lifetime=self._lifetime,
            stock=0
            if self._lifetime is Lifetime.BLOCK
            else max(relay.node.total_cores for relay in self._by_node.values()),
            preload=self._preload,
            threads=self._threads,
            given=given,
        )
        for relay in self._by_node.values():
            relay.settings = given
        self._step = Process(0, Resources())
        env = step_environment(os.environ)
        env[CONNECTION_VARIABLE] = self._router.credentials(_RELAYS).dumps()
        self._agent.run(self._step, relays_command(list(self._by_node), program), env, None)
        self._events.call_later(_START_SECONDS, self._on_start_over)
        self._ask_time_left()

    def launch(self, process: Process) -> None:
        """Start a worker by the relay of its node, or as a step."""
        self.prepare()
        relay = self._by_node[process.places[0].node]
        if relay.lost:
            self._events.on_exit(process, Exit(None, relay.lost))
        elif self._is_step(process):
            self._run_step(process)
        elif relay.peer is None:
            relay.waiting[process.number] = process
        else:
            self._start(relay, process)

    def setup(self, process: Process) -> dict[str, Any]:
        """Return the changes in this process since the agents started, and the worker's share of each of its nodes."""
        setup = self._agent.surroundings.changes()
        if process.resources.cores > 1:
            setup["argv"] = arguments()  # ranks do not get them on the command line, see `boot_command`
        if self._is_step(process):
            setup["shares"] = {
                node: {"node": self._by_node[node].size, "cores": cores, "gpus": gpus}
                for node, cores, gpus in process.places
            }
        else:
            setup["node"] = self._by_node[process.places[0].node].size
        return setup

    def kill(self, process: Process, signal_number: int) -> None:
        """Signal a worker, or end its step."""
        number = process.number
        relay = self._by_node[process.places[0].node]
        if number in relay.waiting:
            del relay.waiting[number]
            self._events.on_exit(process, Exit(None, "it was no longer needed"))
        elif number in relay.processes:
            self._relays.kill(relay, number, signal_number)
        elif str(number) in self._steps:
            self._end_step(process)

    def resume(self) -> None:
        """Continue srun and all agents."""
        self._agent.resume()
        for peer in self._by_peer:
            self._router.send(peer, ["resume"], [])

    def close(self) -> None:
        """End the agents with their workers, and wait for srun, which passes on their last output."""
        self._closing = True
        for peer in self._by_peer:
            self._router.send(peer, ["end"], [])
        give_up = time.monotonic() + _END_SECONDS
        # Agents that connect only now are told to end when they say hello.
        while self._step is not None and not self._agent.wait(self._step, _CLOSE_SECONDS):
            self._router.read()
            if time.monotonic() > give_up:
                break
        self._agent.close()
        self._commands.close()
        self._router.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- relays ---------------------------------------------------------------------------------------------------

    def _start(self, relay: _Relay, process: Process) -> None:
        process.host = relay.node.name
        self._relays.start(relay, process)

    def _on_message(self, peer: bytes, header: list[Any], frames: list[Frame]) -> None:
        identity = worker_of(peer)
        if identity != _RELAYS:
            if identity in self._steps:
                self._steps[identity].on_message(peer, header, frames)
            return
        if header[0] == "hello":
            self._on_hello(peer, header[1])
            return
        relay = self._by_peer.get(peer)
        if relay is None:
            return
        if header[0] == "bye":
            self._lose(relay, header[1])
            return
        self._relays.on_done(relay, header[1], frames)

    def _on_hello(self, peer: bytes, about: dict[str, Any]) -> None:
        relay = self._by_node.get(about["node"])
        if self._closing:
            self._router.send(peer, ["end"], [])
            return
        if relay is None or relay.peer is not None or relay.lost:
            return
        relay.peer = peer
        self._by_peer[peer] = relay
        waiting, relay.waiting = relay.waiting, {}
        for process in waiting.values():
            self._start(relay, process)

    def _on_worker_exit(self, relay: RelayEnd, number: int, about: dict[str, Any], error: BaseException | None) -> None:
        if about["status"] == signal.SIGKILL and number not in relay.killing:
            # Its node may be about to be lost, which would be the better explanation.
            self._events.call_later(_KILLED_SECONDS, lambda: self._tell_exit(relay, number, about, error))
        else:
            self._tell_exit(relay, number, about, error)

    def _tell_exit(self, relay: RelayEnd, number: int, about: dict[str, Any], error: BaseException | None) -> None:
        if not relay.lost:  # otherwise `_end_workers` reports it
            self._relays.conclude(relay, number, about, error)

    # -- nodes that are lost --------------------------------------------------------------------------------------

    def _on_lost(self, peer: bytes) -> None:
        relay = self._by_peer.get(peer)
        if relay is not None:
            self._lose(relay, "the connection to the agent there has ended")

    def _on_start_over(self) -> None:
        for relay in self._by_node.values():
            if relay.peer is None:
                self._lose(relay, f"its agent has not connected within {_START_SECONDS:g} s")

    def _lose(self, relay: _Relay, why: str) -> None:
        if relay.lost or self._closing:
            return
        relay.lost = f"node {relay.node.name} was lost: {why}"
        logger.warning("%s; its calls fail, and no more are started there", relay.lost)
        self._events.on_node_lost(relay.node.name)
        self._events.call_later(_WORDS_SECONDS, lambda: self._end_workers(relay))

    def _end_workers(self, relay: _Relay) -> None:
        said = tail_text(self._step.stderr) if self._step is not None else ""
        text = relay.lost + (f"; Slurm said:\n{said}" if said else "")
        for process in [step.process for step in self._steps.values()]:
            if any(place.node == relay.node.name for place in process.places):
                process.verdict = process.verdict or ExecutorlibSocketError(f"A call's ranks were ended: {text}")
                self._end_step(process)
        processes = [*relay.waiting.values(), *relay.processes.values()]
        relay.waiting.clear()
        relay.processes.clear()
        for process in processes:
            self._events.on_exit(process, Exit(None, text))

    # -- steps ----------------------------------------------------------------------------------------------------

    def _is_step(self, process: Process) -> bool:
        resources = process.resources
        return bool(
            resources.slurm_cmd_args or len(process.places) > 1 or (resources.cores > 1 and self._pmi_mode is not None)
        )

    def _run_step(self, process: Process) -> None:
        resources = process.resources
        identity = str(process.number)
        nodes = [place.node for place in process.places]
        shares = resources.demand_over(len(nodes)).shares()
        ranks = {node: cores // resources.threads_per_core for node, (cores, _) in zip(nodes, shares, strict=True)}
        hosts = [node for node, count in ranks.items() for _ in range(count)]
        env = step_environment(os.environ)
        env.update(dict.fromkeys(THREAD_VARIABLES, str(resources.threads_per_core)))
        env[CONNECTION_VARIABLE] = self._router.credentials(identity).dumps()
        module = "executorlib.worker.mpi" if len(hosts) > 1 else "executorlib.worker.remote"
        call = f"({process.lifetime is Lifetime.CALL})" if len(hosts) > 1 else "()"
        program = boot_command(module, call, rank=len(hosts) > 1)
        if len(hosts) > 1 and self._pmi_mode is None:
            try:
                mpiexec = find_mpiexec()
            except (OSError, RuntimeError) as error:
                self._events.on_exit(process, Exit(None, str(error), error))
                return
            # In Slurm's order, because srun starts the agents of MPICH's mpiexec, and they take their parts in that
            # order.
            placed = [f"{name}:{ranks[name]}" for name in self._by_node if name in ranks]
            argv = mpiexec.command_on(placed, len(hosts), program, resources.openmpi_oversubscribe)
            # mpiexec has srun start its agents, which must be allowed beside the relays.
            env = {**mpiexec.environment(), **env, "SLURM_OVERLAP": "1"}
        else:
            argv = ranks_command(resources, hosts, self._pmi_mode, program)
            if len(nodes) > 1:
                self._folder = self._folder or tempfile.mkdtemp(prefix="executorlib-")
                env["SLURM_HOSTFILE"] = os.path.join(self._folder, identity)
                with open(env["SLURM_HOSTFILE"], "w", encoding="utf-8") as file:
                    file.write("".join(f"{host}\n" for host in hosts))
        process.host = ", ".join(nodes)
        self._steps[identity] = ConnectingWorker(
            self._events,
            self._router,
            process,
            lambda: self._end_step(process),
            starter="mpiexec" if self._pmi_mode is None else f"srun with pmi_mode={self._pmi_mode!r}",
            advice="MPICH needs pmi_mode='pmi2', Open MPI pmi_mode='pmix' (`srun --mpi=list` shows what there is); or "
            "leave pmi_mode out to have the MPI's own mpiexec start the ranks.",
        )
        self._agent.run(process, argv, env, resources.cwd, folders=[self._folder] if self._folder else [])

    def _end_step(self, process: Process) -> None:
        """End a step. When srun is told to end, it kills its tasks."""
        identity = str(process.number)

        def kill() -> None:
            step = self._steps.get(identity)
            if step is not None:
                self._agent.kill(step.process, signal.SIGKILL)

        if identity in self._steps:
            self._agent.kill(process, signal.SIGTERM)
            self._events.call_later(_GRACE_SECONDS, kill)

    def _forget_step(self, identity: str) -> None:
        self._steps.pop(identity, None)
        if self._folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, identity))

    def _on_step_exit(self, process: Process, end: Exit) -> None:
        """A step is over: that of the relays, or one of ranks."""
        if process is not self._step:
            if b"ode failure" in process.stderr and not self._closing:
                # srun noticed first; what it means for the node will be known in a moment.
                self._events.call_later(_WORDS_SECONDS, lambda: self._on_ranks_exit(process, end))
            else:
                self._on_ranks_exit(process, end)
            return
        for relay in self._by_node.values():
            self._lose(relay, f"srun, which runs the agents, ended: {end.text}")

    def _on_ranks_exit(self, process: Process, end: Exit) -> None:
        self._forget_step(str(process.number))
        self._events.on_exit(process, end)

    # -- the time limit -------------------------------------------------------------------------------------------

    def _ask_time_left(self) -> None:
        job = os.environ.get("SLURM_JOB_ID", "")
        env = command_environment(os.environ)
        self._commands.run(["squeue", "--noheader", f"--jobs={job}", "--format=%L"], self._on_time_left, env=env)

    def _on_time_left(self, answer: CommandOutput) -> None:
        left = parse_time_left(answer.output) if answer.ok else None
        if left is None:
            return
        if left > _WARN_SECONDS:
            # Ask again then, because the limit may have been raised meanwhile.
            self._events.call_later(left - _WARN_SECONDS + 1, self._ask_time_left)
        else:
            logger.warning(
                "Slurm job %s reaches its time limit in %d s; calls that still run then are lost",
                os.environ.get("SLURM_JOB_ID"),
                left,
            )
