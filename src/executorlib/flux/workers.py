"""Workers as Flux jobs, which connect back over the network: one job for a call, or for each worker of a block.

    launch ─▶ jobspec ─▶ Flux ─▶ start ─▶ worker: hello ─▶ setup, calls ─▶ results ─▶ stop ─▶ finish

A worker of a block, unless it has several ranks, is behind a relay (`relay.node_side`) in its job, so that many calls
travel together, and calls that it has not started can be taken back.

Flux reports on each job by its events, and the connection on the worker. A worker is over when both have ended, or when
one has and the other does not follow.
"""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from executorlib.errors import ExecutorlibSocketError, TimeLimitError, describe_exit, over_time
from executorlib.flux.instance import FluxInstance
from executorlib.flux.jobspec import JobLog, job_name, jobspec, run_command, untold_environment, urgency
from executorlib.flux.policy import Policy
from executorlib.jobs.job import read_tail
from executorlib.jobs.queue import Cause, Phase
from executorlib.jobs.system import Refused
from executorlib.launchers.boot import boot_command
from executorlib.launchers.connecting import ConnectingWorker
from executorlib.launchers.contract import Events, Exit, Launcher, Lifetime, Process
from executorlib.launchers.last_output import STDERR_TAIL_BYTES
from executorlib.relay.executor_side import RelayEnd, Relays, relay_program
from executorlib.serialize import Frame
from executorlib.transports.curve import CONNECTION_VARIABLE
from executorlib.transports.router import Router, worker_of

# Seconds after the end of a worker's job or connection within which the other has to follow.
_FOLLOW_SECONDS = 10.0
# Seconds that a job may last after its worker has left. It usually lasts as long as the worker's exit handlers take,
# and an instance of its own as long as that takes to shut down.
_LEFT_SECONDS, _INSTANCE_LEFT_SECONDS = 10.0, 60.0
# Seconds from cancelling a job to giving it up: Flux sends SIGTERM, 5 s later SIGKILL, and runs epilogs.
_CANCEL_SECONDS = 60.0
# Seconds for reading the output of a job that has died from Flux's store.
_OUTPUT_SECONDS = 10.0


class State(enum.IntEnum):
    """How far a worker and its job have come."""

    STARTING = 0  # it has not connected
    CONNECTED = 1
    LEFT = 2  # its connection has ended, its job has not
    FINISHED = 3  # its job has ended, its connection has not
    ENDING = 4  # its end is known, and its last output is being read
    OVER = 5  # its end was reported, or nobody waits for that any more


STARTING, CONNECTED, LEFT, FINISHED, ENDING, OVER = State

LEGAL_MOVES: dict[State, frozenset[State]] = {
    STARTING: frozenset({CONNECTED, ENDING, OVER}),
    CONNECTED: frozenset({LEFT, FINISHED, OVER}),
    # To OVER directly: the other end did not follow, or Flux no longer says anything.
    LEFT: frozenset({ENDING, OVER}),
    FINISHED: frozenset({ENDING, OVER}),
    ENDING: frozenset({OVER}),
    OVER: frozenset(),
}


class Member:
    """A worker and its job.

    Attributes:
        process: The worker, for the loop.
        worker: The worker's own connection, which a worker behind a relay never makes.
        folder: The directory in which its job starts.
        relay: The relay, if there is one.
        identity: Its number, which identifies its connection.
        log: What Flux has said about the job.
        job: The job's number, once it was submitted.
        watch: The key by which its events are watched.
        signalled: The last signal sent to it, or to be sent once it is there.
        state: How far it has come; only `move` changes it.
    """

    def __init__(self, worker: ConnectingWorker, folder: str) -> None:
        self.process = process = worker.process
        self.worker = worker
        self.folder = folder
        # Only for a worker that takes call after call, in one process.
        self.relay = RelayEnd() if process.lifetime is Lifetime.BLOCK and process.resources.cores == 1 else None
        self.identity = str(process.number)
        self.log = JobLog()
        self.job: int | None = None
        self.watch = 0
        self.signalled = 0
        self.state = STARTING

    def move(self, state: State) -> None:
        """Change the state.

        Raises:
            RuntimeError: The move is not legal, which is a bug of the caller.
        """
        if state not in LEGAL_MOVES[self.state]:
            raise RuntimeError(f"worker {self.identity}, {self.state.name}: illegal move to {state.name}")
        self.state = state

    @property
    def peer(self) -> bytes | None:
        """The connection of the worker or its relay, once it has said hello."""
        return self.worker.peer if self.relay is None else self.relay.peer


class FluxLauncher(Launcher):
    """Starts workers as jobs of the Flux instance that this process is in.

    Args:
        events: The loop.
        policy: What the instance demands of jobs.
        pmi_mode: What Flux's shell offers to MPI; None for its default.
        nested: Whether each worker gets a Flux instance of its own.
        log_files: Whether workers print to files in their working directories, and not to Flux's store.
        hostname_localhost: Whether to listen on the loopback interface only.
        submit_by: As in `FluxInstance`.
    """

    def __init__(
        self,
        events: Events,
        *,
        policy: Policy,
        pmi_mode: str | None,
        nested: bool,
        log_files: bool,
        hostname_localhost: bool,
        submit_by: Any = None,
    ) -> None:
        self._events = events
        self._policy = policy
        self._pmi_mode = pmi_mode
        self._nested = nested
        self._left_seconds = _INSTANCE_LEFT_SECONDS if nested else _LEFT_SECONDS
        self._log_files = log_files
        self._instance = FluxInstance(events, self._on_instance_lost, submit_by)
        self._router = Router(events, self._on_message, self._on_lost, tcp=True, hostname_localhost=hostname_localhost)
        self._relays = Relays(events, self._router, Lifetime.BLOCK, self._on_worker_exit)
        self._members: dict[str, Member] = {}  # by identity, the worker's number

    # -- Launcher -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Connect to the instance."""
        self._instance.open()

    def launch(self, process: Process) -> None:
        """Submit a worker as a job."""
        self._instance.open()
        resources = process.resources
        # Kept: by the time that the job ends, this process may be in another directory, or its own may be gone.
        member = Member(self._connecting(process), resources.cwd or os.getcwd())
        identity = member.identity
        process.host = "Flux"
        if process.lifetime is Lifetime.BLOCK:
            resources = replace(resources, run_time_max=None)  # that limit is for each of its calls
        files = ("flux_{{id.f58plain}}.out", "flux_{{id.f58plain}}.err") if self._log_files else ("", "")
        spec = jobspec(
            resources,
            self._program(member),
            {**os.environ, CONNECTION_VARIABLE: self._router.credentials(identity).dumps()},
            name=self._name(process),
            cwd=member.folder,
            policy=self._policy,
            pmi_mode=self._pmi_mode,
            nested=self._nested,
            output=files[0],
            errors=files[1],
        )
        self._members[identity] = member
        problem = self._policy.problem(resources)
        if problem:
            self._events.call_later(0.0, lambda: self._on_submitted(identity, Refused(problem)))
            return
        self._instance.submit(
            spec,
            urgency(resources.priority, self._instance.is_owner),
            lambda answer: self._on_submitted(identity, answer),
        )

    def _connecting(self, process: Process) -> ConnectingWorker:
        return ConnectingWorker(
            self._events,
            self._router,
            process,
            lambda: self._end_by_force(process),
            starter="Flux" if self._pmi_mode is None else f"Flux with pmi_mode={self._pmi_mode!r}",
            advice="MPICH finds Flux by itself; Open MPI needs Flux's pmix plugin (flux-pmix) and pmi_mode='pmix'. Use "
            "an mpi4py that was built for one of them.",
            # Flux counts the job's resources until it has ended; here another call may take its place already.
            leaves=True,
        )

    def _end_by_force(self, process: Process) -> None:
        member = self._members.get(str(process.number))
        # Once its call is over and it has left, `_on_lost` sees to it.
        if member is not None and not (member.worker.done and member.state is LEFT):
            self.kill(process, signal.SIGKILL)

    def _program(self, member: Member) -> list[str]:
        process = member.process
        ranks = process.resources.cores
        if member.relay is not None:
            # Its one worker is set up only once, so it gets the settings with that.
            threads = process.resources.threads_per_core
            return relay_program(lifetime=Lifetime.BLOCK, stock=0, preload=(), threads=threads, given={})
        module = "executorlib.worker.mpi" if ranks > 1 else "executorlib.worker.remote"
        program = boot_command(module, f"({process.lifetime is Lifetime.CALL})" if ranks > 1 else "()")
        # An instance of its own starts the program in a single process.
        return run_command(process.resources, self._pmi_mode, program) if self._nested and ranks > 1 else program

    @staticmethod
    def _name(process: Process) -> str:
        if process.lifetime is Lifetime.CALL and process.calls:
            return process.calls[0].name
        return f"executorlib worker {process.slot}"

    def setup(self, process: Process) -> dict[str, Any]:
        """Return the worker's settings beyond the environment and import path that its job was submitted with."""
        return {"shown_gpus": True, "env": untold_environment(os.environ)}

    def kill(self, process: Process, signal_number: int) -> None:
        """Signal a worker through its relay, or its job through Flux."""
        member = self._members.get(str(process.number))
        if member is None or member.state >= ENDING or member.signalled == signal.SIGKILL:
            return
        member.signalled = signal_number
        if member.job is None:
            return  # it is on its way to Flux; see `_on_submitted`
        if member.relay is not None and member.relay.peer is not None:
            # Signal only the worker: its relay then reports which calls it has started.
            self._relays.kill(member.relay, process.number, signal_number)
            self._later(_FOLLOW_SECONDS, member.identity, self._end_unfollowed)
            return
        if member.log.started:
            self._instance.kill(member.job, signal_number)
        if signal_number == signal.SIGKILL or not member.log.started:
            self._instance.end(member.job, "cancel")
            self._later(_CANCEL_SECONDS, member.identity, lambda it: self._end_as(it, "Flux has not ended its job"))

    def close(self) -> None:
        """Close the connections. Jobs whose workers have left end by themselves; all others are cancelled."""
        leaving = []
        for member in self._members.values():
            member.move(OVER)
            if member.worker.done:
                leaving.append(member)  # if it were cancelled, its call would look as if it had failed
            else:
                self._cancel(member)
        self._instance.wait(lambda: not any(map(self._is_running, leaving)), self._left_seconds)
        for member in leaving:
            self._cancel(member)
        self._members.clear()
        self._instance.close()
        self._router.close()

    # -- what Flux reports ----------------------------------------------------------------------------------------

    def _on_submitted(self, identity: str, answer: int | Refused) -> None:
        member = self._members.get(identity)
        if member is None:  # the executor has ended
            if not isinstance(answer, Refused):
                self._instance.end(answer, "cancel")
            return
        if isinstance(answer, Refused):
            text = f"Flux did not accept its job: {answer}"
            self._end_as(member, text, ExecutorlibSocketError(f"{self._subject(member)} was not run: {text}"))
            return
        member.job = answer
        member.watch = self._instance.watch(answer, lambda event, context: self._on_event(identity, event, context))
        if member.signalled:
            signal_number, member.signalled = member.signalled, 0
            self.kill(member.process, signal_number)

    def _on_event(self, identity: str, event: str, context: Any) -> None:
        member = self._members.get(identity)
        if member is None:
            return
        before = member.log.state.phase
        member.log.add(event, context)
        if member.state >= ENDING:
            return
        if event == "start" and member.signalled:
            assert member.job is not None  # whose event this is
            self._instance.kill(member.job, member.signalled)
        if member.log.state.phase is Phase.ENDED is not before:
            if member.state is CONNECTED:
                # The worker's last messages may still be on their way.
                member.move(FINISHED)
                self._later(_FOLLOW_SECONDS, identity, self._end_as_told)
            else:
                self._end_as_told(member)
        elif not event and member.log.state.phase is not Phase.ENDED:
            self._end_as(member, f"Flux has lost track of its job {self._job_text(member)}")

    def _on_instance_lost(self, why: str) -> None:
        for member in list(self._members.values()):
            self._end_as(member, why)

    # -- what the worker reports ----------------------------------------------------------------------------------

    def _on_message(self, peer: bytes, header: list[Any], frames: list[Frame]) -> None:
        member = self._members.get(worker_of(peer))
        if member is None:
            return  # it was given up, and its job was cancelled
        relay = member.relay
        if relay is None:
            member.worker.on_message(peer, header, frames)
        elif header[0] == "done":
            self._relays.on_done(relay, header[1], frames)
        elif header[0] == "hello" and relay.peer is None:
            relay.peer = peer
            member.process.host, member.process.pid = header[1]["host"], header[1]["pid"]
            self._relays.start(relay, member.process)
        if member.state is STARTING and member.peer is not None:
            member.move(CONNECTED)

    def _on_worker_exit(self, relay: RelayEnd, number: int, about: dict[str, Any], error: BaseException | None) -> None:
        """A worker has ended, as its relay reports, so its job is to end, too."""
        member = self._members.get(str(number))
        if member is None or relay.peer is None:
            return
        self._forget(member, ends_soon=True)
        self._router.send(relay.peer, ["end"], [])
        self._relays.conclude(relay, number, about, error)

    def _on_lost(self, peer: bytes) -> None:
        member = self._members.get(worker_of(peer))
        if member is None or member.peer != peer:
            return
        if member.state is FINISHED:
            self._end_as_told(member)
        elif member.state is CONNECTED:
            member.move(LEFT)
            if member.worker.done:
                self._later(self._left_seconds, member.identity, lambda it: self.kill(it.process, signal.SIGKILL))
            else:
                self._later(_FOLLOW_SECONDS, member.identity, self._end_unfollowed)

    # -- ending ---------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, identity: str, callback: Callable[[Member], None]) -> None:
        """Call back, unless the worker's end is known by then.

        The timer holds only its identity, so that a timeout never keeps a worker, a call or a result alive.
        """

        def call() -> None:
            member = self._members.get(identity)
            if member is not None and member.state < ENDING:
                callback(member)

        self._events.call_later(seconds, call)

    def _end_unfollowed(self, member: Member) -> None:
        """Nothing more has come from a worker that has left or was signalled: cancel its job if that has not ended."""
        if member.state is FINISHED:
            self._end_as_told(member)
            return
        self._cancel(member)
        why = "the connection to it was lost"
        if member.signalled:
            why = f"this executor sent it {signal.Signals(member.signalled).name}, and its end was not reported"
        self._end_as(member, f"{why}; its job {self._job_text(member)} was cancelled")

    def _end_as_told(self, member: Member) -> None:
        """The job has ended: report how, with the worker's last output."""
        member.move(ENDING)
        job, identity = member.job, member.identity
        if job is not None and self._log_files:
            self._on_output(identity, read_tail(os.path.join(member.folder, f"flux_{job_name(job)}.err")))
        elif job is None or not member.log.started or member.log.state.state == "COMPLETED":
            self._on_output(identity, b"")
        else:
            # It is in Flux's store. Both hold only the worker's identity, as in `_later`.
            self._instance.read_errors(job, STDERR_TAIL_BYTES, lambda errors: self._on_output(identity, errors))
            self._events.call_later(_OUTPUT_SECONDS, lambda: self._on_output(identity, b""))

    def _on_output(self, identity: str, errors: bytes) -> None:
        member = self._members.get(identity)
        if member is None or member.state is not ENDING:
            return  # it came too late, or twice
        member.process.stderr += errors
        state, log = member.log.state, member.log
        text = f"its Flux job {self._job_text(member)} ended as {state.state}{replace(state, exit_code='').facts()}"
        if log.status is not None:
            text = f"it {describe_exit(log.status)}; {text}"
        error: BaseException | None = None
        limit = member.process.resources.run_time_max if member.process.lifetime is Lifetime.CALL else None
        if state.cause is Cause.TIME_LIMIT and limit is not None:
            error = TimeLimitError(over_time(self._subject(member), limit))
        self._end(member, Exit(log.status, text, error, planned=state.cause.ends_early))

    def _end_as(self, member: Member, text: str, error: BaseException | None = None) -> None:
        """Report a worker's end, unless its job has ended: then `_on_output` reports how."""
        if member.state < ENDING:
            self._end(member, Exit(None, text, error))

    def _end(self, member: Member, end: Exit) -> None:
        """Report a worker's end; only its relay, if it has one, can know more of it (`_on_worker_exit`)."""
        self._forget(member, ends_soon=member.log.state.phase is Phase.ENDED)
        self._events.on_exit(member.process, end)

    def _forget(self, member: Member, ends_soon: bool) -> None:
        member.move(OVER)
        del self._members[member.identity]
        self._instance.unwatch(member.watch, ends_soon)

    def _cancel(self, member: Member) -> None:
        if member.job is not None and self._is_running(member):
            self._instance.end(member.job, "cancel")

    @staticmethod
    def _is_running(member: Member) -> bool:
        return member.job is not None and member.log.state.phase is not Phase.ENDED

    @staticmethod
    def _job_text(member: Member) -> str:
        return "" if member.job is None else job_name(member.job)

    @staticmethod
    def _subject(member: Member) -> str:
        calls = member.process.calls
        return f"Call {calls[0].number} of {calls[0].name}" if calls else "A worker"
