"""The process behind `local_queue.system`: runs jobs on this machine, within its CPUs, until there are none left.

It is a `SingleNodeExecutor` whose calls are the jobs, so that limits, deaths and MPI are handled there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from concurrent.futures import Future
from typing import Any

from executorlib.cache import trust
from executorlib.errors import ExecutorlibSocketError
from executorlib.single_node.executor import SingleNodeExecutor
from executorlib.worker import family, job

# A job that has ended is reported only in this many answers, since the session knows it after the first.
_TELL_ENDED = 3


class _JobFailed(Exception):
    """Raised for a job that ended without a result, so that jobs which depend on it fail."""


def _run(directory: str, index: int, *inputs: None) -> None:
    """Run a job in its process, with its output in the batch directory."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    output = os.open(os.path.join(directory, f"output.{index}"), flags, trust.FILE_MODE)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    code = job.run(directory, index)
    if code != job.RESULT:
        raise _JobFailed(code)


class LocalQueue:
    """Accepts requests and keeps the jobs.

    Args:
        executor: Runs the jobs.
    """

    def __init__(self, executor: SingleNodeExecutor) -> None:
        self._executor = executor
        self._jobs: dict[str, dict[int, Future[Any]]] = {}
        self._told: dict[tuple[str, int], int] = {}

    def obey(self, request: dict[str, Any]) -> list[Any] | None:
        """Carry out a request; returns the answer if it is a query."""
        if "submit" in request:
            self._submit(request)
        elif "cancel" in request:
            for job_id, index in request["cancel"]:
                for future in self._chosen(job_id, index):
                    self._cancel(future)
        else:
            return self._states()
        return None

    def _submit(self, request: dict[str, Any]) -> None:
        futures = self._jobs[request["submit"]] = {}
        for index in range(request["first"], request["first"] + request["count"]):
            inputs: list[Future[Any]] = []
            for job_id, element, corresponding in request["after"]:
                inputs += self._chosen(job_id, index if corresponding else element)
            try:
                future = self._executor.submit(
                    _run, request["directory"], index, *inputs, resource_dict=request["needs"]
                )
            except Exception as error:
                future = Future()
                future.set_exception(error)
            futures[index] = future

    def _chosen(self, job_id: str, index: int | None) -> list[Future[Any]]:
        """One element of a job, or all of them."""
        futures = self._jobs.get(job_id, {})
        if index is None:
            return list(futures.values())
        return [futures[index]] if index in futures else []

    def _cancel(self, future: Future[Any]) -> None:
        loop = self._executor._loop
        if not future.cancel() and loop is not None:
            loop.kill_call(future)

    def _states(self) -> list[Any]:
        states = []
        for job_id, futures in list(self._jobs.items()):
            for index, future in futures.items():
                told = self._told.get((job_id, index), 0)
                if told < _TELL_ENDED:
                    states.append([job_id, index, *_state(future)])
                if future.done():
                    self._told[job_id, index] = told + 1
        return states


def _state(future: Future[Any]) -> tuple[str, str, str, str, str]:
    """Phase, state, reason, exit code and cause, as in `JobState`."""
    if future.cancelled():
        return "ended", "CANCELLED", "", "", "cancelled"
    if not future.done():
        return ("running", "RUNNING", "", "", "none") if future.running() else ("pending", "PENDING", "", "", "none")
    error = future.exception()
    if error is None:
        return "ended", "COMPLETED", "", "0:0", "none"
    if isinstance(error, _JobFailed):
        return "ended", "FAILED", "", f"{error.args[0]}:0", "none"
    if isinstance(error, TimeoutError):
        return "ended", "TIMEOUT", "", "", "time limit"
    status = error.wait_status if isinstance(error, ExecutorlibSocketError) else None
    if status is None:
        # Users know only the job, and not the call that ran it.
        if isinstance(error, ExecutorlibSocketError):
            return "ended", "FAILED", error.reason or str(error), "", "none"
        return "ended", "FAILED", f"{type(error).__name__}: {error}", "", "none"
    code = os.waitstatus_to_exitcode(status)
    killed = "out of memory, unless somebody sent SIGKILL" if code == -signal.SIGKILL else ""
    return "ended", "COMPLETED" if code == 0 else "FAILED", killed, f"{max(code, 0)}:{max(-code, 0)}", "none"


def main(fd: int, options: dict[str, Any]) -> None:
    """Run the queue.

    Args:
        fd: Descriptor of the socket to the session that submits.
        options: Arguments of `SingleNodeExecutor`.
    """
    # The queue must outlive a terminal that closes, and a session that no longer reads.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    family.unblock()
    os.set_inheritable(fd, False)
    with SingleNodeExecutor(**options) as executor, socket.socket(fileno=fd) as sock:
        queue = LocalQueue(executor)
        with contextlib.suppress(OSError), sock.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                answer = queue.obey(json.loads(line))
                if answer is not None:
                    sock.sendall(json.dumps(answer).encode() + b"\n")
