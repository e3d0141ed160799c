"""A queuing system on one machine, with nothing installed: a process that runs jobs and outlives who submits them.

It is `local_queue.process`, started with the first job. Over a socket it takes one JSON object a line and answers
likewise; when the socket ends it finishes what it has and exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from executorlib import machine
from executorlib.jobs.queue import Batch, Cause, Dependency, JobState, Phase
from executorlib.jobs.system import JobKey, Refused, States
from executorlib.launchers import streams
from executorlib.launchers.boot import boot_command
from executorlib.launchers.contract import Events
from executorlib.single_node.agent import Surroundings

# Given to a job beyond its run_time_max, in which it starts and, at its limit, ends by itself.
_SPARE_SECONDS = 1.0


class LocalSystem:
    """The executor's side.

    Args:
        events: The loop.
        options: Arguments of the `SingleNodeExecutor` that runs the jobs.
    """

    name = "the local queue"
    array_limit = 100_000
    element_variables: tuple[str, ...] = ()  # its process tells each job its number
    # A question costs next to nothing here.
    first_query = 0.1
    last_query = 1.0

    def __init__(self, events: Events, options: dict[str, Any]) -> None:
        self._events = events
        self._options = options
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._unsent = bytearray()
        self._questions: deque[Callable[[States | None], None]] = deque()
        self._id = ""
        self._submitted = 0
        self._surroundings = Surroundings()

    def can_wait_for(self, dependency: Dependency) -> bool:
        """See `JobSystem.can_wait_for`; another session's queue is another process."""
        return self._has(dependency.job_id)

    def _has(self, job_id: str) -> bool:
        return bool(self._id) and job_id.startswith(f"{self._id}:")

    def resume(self) -> None:
        """See `JobSystem.resume`."""
        if self._socket is not None and is_alive(f"{self._id}:"):
            _, pid, _ = self._id.rsplit(":", 2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGCONT)

    @property
    def busy(self) -> bool:
        """See `JobSystem.busy`."""
        return bool(self._unsent)

    def about(self) -> dict[str, str]:
        """See `JobSystem.about`."""
        return {}

    def is_gone(self, owner: Mapping[str, Any]) -> bool:
        """See `JobSystem.is_gone`; of a queuing system nothing is known here."""
        return False

    def listen(self, on_change: Callable[[], None]) -> None:
        """See `JobSystem.listen`; it tells nothing by itself."""

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """See `JobSystem.prepare`."""
        on_ready()

    def setup(self) -> dict[str, Any]:
        """See `JobSystem.setup`."""
        return self._surroundings.changes()

    def _start(self) -> None:
        if self._socket is not None:
            return
        streams.fill()
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.set_inheritable(True)
            self._surroundings = Surroundings()
            command = boot_command("executorlib.local_queue.process", f"({theirs.fileno()}, {self._options!r})")
            # The shell leaves it to init, so that nobody here has to wait for its end.
            script = '"$@" >/dev/null 2>&1 & echo $!'
            try:
                pid = subprocess.run(
                    ["/bin/sh", "-c", script, "sh", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    check=True,
                ).stdout
                # Whoever reads the id can tell whether the process is still there; the start time tells it from a
                # later one.
                self._id = f"{socket.gethostname()}:{int(pid)}:{machine.process_start(int(pid))}"
            except (OSError, ValueError, subprocess.CalledProcessError):
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours
        self._events.watch(ours, self._on_readable)

    def submit(self, batch: Batch, on_done: Callable[[str | Refused], None]) -> None:
        """See `JobSystem.submit`."""
        try:
            self._start()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            on_done(Refused(f"it could not be started: {error}"))
            return
        self._submitted += 1
        job_id = f"{self._id}:{self._submitted}"
        resources = batch.resources
        needs = {**resources.sent, "cwd": batch.cwd}
        if resources.run_time_max is not None:
            # A job ends itself at its limit; this is for functions that do not let it.
            needs["run_time_max"] = resources.run_time_max + _SPARE_SECONDS
        after = [[each.job_id, each.index, each.corresponding] for each in batch.dependencies]
        self._send(
            {
                "submit": job_id,
                "directory": batch.directory,
                "first": batch.first,
                "count": batch.count,
                "needs": needs,
                "after": after,
            }
        )
        on_done(job_id)

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """See `JobSystem.query`."""
        # Of other sessions' jobs it can only be told whether what runs them is there.
        foreign: dict[JobKey, JobState] = {
            (job_id, None): JobState(Phase.RUNNING, "RUNNING")
            for job_id in job_ids
            if not self._has(job_id) and is_alive(job_id)
        }
        if self._socket is None:
            self._events.call_later(0.0, lambda: on_states(foreign))
            return
        self._questions.append(lambda states: on_states({**foreign, **(states or {})}))
        self._send({"query": True})

    def detail(self, job: tuple[str, int | None], on_state: Callable[[JobState | None], None]) -> None:
        """See `JobSystem.detail`; all that is known was said, so what is gone went with its queue."""
        lost = JobState(Phase.ENDED, "LOST", "its queue's process has ended", cause=Cause.NODE_FAILED)
        self._events.call_later(0.0, lambda: on_state(lost))

    def cause_in(self, output: str) -> Cause:
        """See `JobSystem.cause_in`."""
        return Cause.NONE

    def cancel(self, jobs: Sequence[tuple[str, int | None]]) -> None:
        """See `JobSystem.cancel`."""
        self._send({"cancel": [list(job) for job in jobs]})

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent += json.dumps(message).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        if self._socket is None:
            self._unsent.clear()
            return
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # it is dead; reading tells
        self._events.watch_writable(self._socket, bool(self._unsent), self._flush)

    def _on_readable(self) -> None:
        sock = self._socket
        assert sock is not None
        try:
            data = sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._on_death()
            return
        self._received += data
        while (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            states = {
                (job_id, index): JobState(Phase(phase), state, reason, exit_code, cause=Cause(cause))
                for job_id, index, phase, state, reason, exit_code, cause in json.loads(line)
            }
            self._questions.popleft()(states)

    def _on_death(self) -> None:
        """All its jobs are gone with it; the next one gets a new process."""
        self.close()
        questions, self._questions = self._questions, deque()
        for answer in questions:
            answer({})

    def close(self) -> None:
        """See `JobSystem.close`."""
        if self._socket is not None:
            self._events.unwatch(self._socket)
            self._socket.close()
        self._socket = None
        self._received.clear()
        self._unsent.clear()


def is_alive(job_id: str) -> bool:
    """Whether the process that runs a job is still there."""
    host, pid, started, _ = [*job_id.rsplit(":", 3), "", "", ""][:4]
    if host != socket.gethostname() or not pid.isdigit():
        return True  # not to be known from here
    return machine.is_running(int(pid), started)
