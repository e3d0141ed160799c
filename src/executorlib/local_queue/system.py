"""A queuing system on one machine that needs no installation: a process that runs jobs and outlives the session.

The process is `local_queue.process`, started with the first job. Over a socket it reads and answers in JSON, one object
a line. When the socket is closed it finishes its jobs and exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from executorlib import machine
from executorlib.jobs.queue import Cause, Dependency, JobState, Phase, Submission
from executorlib.jobs.system import BatchSystem, JobKey, Refused, States
from executorlib.launchers import streams
from executorlib.launchers.boot import boot_command
from executorlib.launchers.contract import Events
from executorlib.single_node.agent import Surroundings

# A job gets this much longer than its run_time_max, so that it can start, and end by itself at its limit.
_SPARE_SECONDS = 1.0


class LocalSystem(BatchSystem):
    """The session's side of the local queue.

    Args:
        events: The loop.
        options: Arguments of the `SingleNodeExecutor` that runs the jobs.
    """

    name = "the local queue"
    array_limit = 100_000
    # Queries cost next to nothing here.
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
        """Return whether the job is in this session's queue; other sessions have other processes."""
        return self._has(dependency.job_id)

    def _has(self, job_id: str) -> bool:
        return bool(self._id) and job_id.startswith(f"{self._id}:")

    def resume(self) -> None:
        """Continue the queue's process if it was suspended."""
        if self._socket is not None and is_alive(f"{self._id}:"):
            _, pid, _ = self._id.rsplit(":", 2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGCONT)

    @property
    def busy(self) -> bool:
        """True while requests have not been sent."""
        return bool(self._unsent)

    def setup(self) -> dict[str, Any]:
        """Return the changes in this process since the queue was started."""
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
            # The shell leaves the process to init, so that nobody here has to wait for its end.
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
                # The id tells anybody whether the process is still there; the start time distinguishes it from a later
                # process with the same number.
                self._id = f"{socket.gethostname()}:{int(pid)}:{machine.process_start(int(pid))}"
            except (OSError, ValueError, subprocess.CalledProcessError):
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours
        self._events.watch(ours, self._on_readable)

    def submit(self, submission: Submission, on_done: Callable[[str | Refused], None]) -> None:
        """Send a batch to the queue's process, which is started first if there is none."""
        try:
            self._start()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            on_done(Refused(f"it could not be started: {error}"))
            return
        self._submitted += 1
        job_id = f"{self._id}:{self._submitted}"
        resources = submission.resources
        needs = {**resources.sent, "cwd": submission.cwd}
        if resources.run_time_max is not None:
            # A job ends itself at its limit; this one is for functions that prevent that.
            needs["run_time_max"] = resources.run_time_max + _SPARE_SECONDS
        after = [[each.job_id, each.index, each.corresponding] for each in submission.dependencies]
        self._send(
            {
                "submit": job_id,
                "directory": submission.directory,
                "first": submission.first,
                "count": submission.count,
                "needs": needs,
                "after": after,
            }
        )
        on_done(job_id)

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """Ask the queue's process for the states of its jobs, and look whether those of other sessions are alive."""
        # For jobs of other sessions, we can only find out whether the process that runs them still exists.
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
        """Report the job as lost: all that was known has been reported, so an unknown job went with its queue."""
        lost = JobState(Phase.ENDED, "LOST", "its queue's process has ended", cause=Cause.NODE_FAILED)
        self._events.call_later(0.0, lambda: on_state(lost))

    def cancel(self, jobs: Sequence[tuple[str, int | None]]) -> None:
        """Cancel jobs."""
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
            self._unsent.clear()  # it is dead, which reading will tell
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
        """The process has died and its jobs are gone; the next job gets a new process."""
        self.close()
        questions, self._questions = self._questions, deque()
        for answer in questions:
            answer({})

    def close(self) -> None:
        """Close the socket; the process finishes its jobs."""
        if self._socket is not None:
            self._events.unwatch(self._socket)
            self._socket.close()
        self._socket = None
        self._received.clear()
        self._unsent.clear()


def is_alive(job_id: str) -> bool:
    """Return whether the process that runs a job is still there; true if that cannot be known from here."""
    host, pid, started, _ = [*job_id.rsplit(":", 3), "", "", ""][:4]
    if host != socket.gethostname() or not pid.isdigit():
        return True  # it cannot be known from here
    return machine.is_running(int(pid), started)
