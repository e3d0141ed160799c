"""Flux as the system that runs the jobs of `jobs.launcher`: each call is a Flux job, whose events tell its state.

A call with a script of its own (``submission_template``, or a pysqa configuration) is submitted by `flux batch`, which
runs the script in a Flux instance with what the call asked for. All other calls are plain jobs.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from executorlib.flux.instance import FluxInstance
from executorlib.flux.jobspec import (
    FURTHER_KEYS,
    JobLog,
    job_environment,
    job_name,
    job_number,
    jobspec,
    run_command,
    task_options,
    untold_environment,
    urgency,
)
from executorlib.flux.policy import Policy
from executorlib.jobs.queue import Dependency, JobState, Phase, Submission
from executorlib.jobs.system import BatchSystem, JobKey, Refused, States
from executorlib.jobs.templates import FLUX, Templates, warn_of_unused
from executorlib.launchers.contract import Events
from executorlib.launchers.subprocesses import CommandOutput, Commands
from executorlib.resources import Resources
from executorlib.worker.job import OUTPUT_VARIABLE

# Directives by which a script sets the resources of its instance; without them it gets what the call asks for.
_HAS_RESOURCES = re.compile(r"^#+\s*flux:.*?\s(-n|-N|--nslots|--num-slots|--nodes)\b", re.MULTILINE)
# At its run_time_max a call ends itself by a signal, which it may ignore. This many seconds later Flux ends it.
_LATE_SECONDS = 2.0
# How long the state of a job is remembered after its end, in seconds.
_KEEP_SECONDS = 120.0
# Seconds that an instance gets beyond the run_time_max of its call, to start and to end.
_BATCH_SPARE_SECONDS = 60.0


class _Followed:
    """A job whose events are followed.

    Attributes:
        log: What the events said.
        heard: Whether anything is known, even if only that there is no such job.
        known: Whether there is such a job.
    """

    def __init__(self) -> None:
        self.log = JobLog()
        self.heard = False
        self.known = False


class FluxSystem(BatchSystem):
    """The Flux instance that this process is in.

    Args:
        events: The loop.
        policy: What the instance demands of jobs.
        pmi_mode: What Flux's shell offers to MPI; None for its default.
        configuration: A pysqa configuration with scripts; None if calls are plain jobs.
    """

    # Changes are reported as they come (`listen`), and queries are answered from this object's memory.
    first_query = 0.1
    last_query = 10.0
    # In Flux a job has a single number, and submitting one is as fast as submitting several.
    array_limit = 1

    def __init__(self, events: Events, policy: Policy, pmi_mode: str | None, configuration: str | None) -> None:
        self.name = ""  # set by `prepare`
        self._events = events
        self._policy = policy
        self._pmi_mode = pmi_mode
        self._instance = FluxInstance(events, self._on_lost)
        self._templates = Templates(None, configuration, FLUX)
        self._has_configuration = configuration is not None
        self._commands = Commands(events)
        self._jobs: dict[int, _Followed] = {}  # by number, those that were submitted here or asked about
        self._questions: list[tuple[set[int], Callable[[], None]]] = []  # with the jobs that were not heard of yet
        self._on_change: Callable[[], None] = lambda: None
        self._submitting = 0
        self._warned: set[str] = set()

    def can_wait_for(self, dependency: Dependency) -> bool:
        """Always true: dependencies hold between all jobs of an instance."""
        return True

    @property
    def busy(self) -> bool:
        """True while jobs are being submitted."""
        return self._submitting > 0 or self._commands.busy

    def about(self) -> dict[str, str]:
        """The socket of the instance, for `is_gone`."""
        return {"socket": self._instance.socket}

    def is_gone(self, owner: Mapping[str, Any]) -> bool:
        """Return whether it was an instance on this machine and nobody listens at its socket any more."""
        path = owner.get("socket")
        return bool(path) and owner.get("host") == socket.gethostname() and not _is_listening(str(path))

    def listen(self, on_change: Callable[[], None]) -> None:
        """Call back whenever a job has changed its phase, or the instance is lost."""
        self._on_change = on_change

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """Connect to the instance; if that fails, each call reports why."""
        try:
            self._instance.open()
        except (ImportError, RuntimeError) as error:  # it was there when the executor was made
            self._instance.lost = str(error)
        self.name = self._instance.name
        on_ready()

    def setup(self) -> dict[str, Any]:
        """Return the settings of jobs beyond the environment that they were submitted with."""
        untold = untold_environment(os.environ)
        return {"shown_gpus": True, "id_variables": ("FLUX_JOB_ID",), "env": untold}

    def submit(self, submission: Submission, on_done: Callable[[str | Refused], None]) -> None:
        """Submit a call, as a plain job or with its script."""
        self._submitting += 1

        def answered(answer: int | Refused) -> None:
            self._submitting -= 1
            if isinstance(answer, Refused):
                on_done(answer)
                return
            self._follow(answer, submission.resources.run_time_max)
            on_done(job_name(answer))

        has_script = self.has_script(submission.resources)
        # A configuration has queues of its own, and a script may name one itself.
        problem = "" if self._has_configuration else self._policy.problem(submission.resources, named=not has_script)
        if problem:
            refused = Refused(problem)
            self._events.call_later(0.0, lambda: answered(refused))
            return
        if has_script:
            self._submit_script(submission, answered)
            return
        warn_of_unused([key for key in submission.template_values if key not in FURTHER_KEYS], self._warned)
        spec = jobspec(
            submission.resources,
            shlex.split(submission.command),
            {**os.environ, OUTPUT_VARIABLE: _output(submission)},
            name=submission.name,
            cwd=submission.cwd,
            policy=self._policy,
            pmi_mode=self._pmi_mode,
            output=_for_flux(_output(submission)),
            dependencies=[job_number(dependency.job_id) for dependency in submission.dependencies],
        )
        self._instance.submit(spec, urgency(submission.resources.priority, self._instance.is_owner), answered)

    def has_script(self, resources: Resources) -> bool:
        """Return whether a call is submitted as a script."""
        return self._has_configuration or resources.submission_template is not None

    def command(self, resources: Resources, program: list[str]) -> list[str]:
        """The command, run in a job, that runs a call's program on all of its ranks; a plain job is those ranks."""
        if resources.cores == 1 or not self.has_script(resources):
            return program
        return run_command(resources, self._pmi_mode, program)

    def _submit_script(self, submission: Submission, answered: Callable[[int | Refused], None]) -> None:
        path = os.path.join(submission.directory, "job.sh")
        try:
            script = self._templates.render(submission)
            unused = self._templates.unused(submission)
            with open(path, "w", encoding="utf-8") as file:
                file.write(script)
        except Exception as error:  # also of pysqa or of a template
            refused = Refused(str(error))
            self._events.call_later(0.0, lambda: answered(refused))
            return
        resources = submission.resources
        says_resources = _HAS_RESOURCES.search(script) is not None
        warn_of_unused([key for key in unused if says_resources or key in submission.template_values], self._warned)
        options = [
            f"--job-name={submission.name}",
            f"--cwd={submission.cwd}",
            f"--output={_for_flux(_output(submission))}",
        ]
        options.append(f"--urgency={urgency(resources.priority, self._instance.is_owner)}")
        options += [f"--dependency=afterok:{dependency.job_id}" for dependency in submission.dependencies]
        if not says_resources:
            options += task_options(resources)
            if resources.exclusive:
                options += ["--exclusive"] if resources.num_nodes is not None else ["--nodes=1", "--exclusive"]
            duration = self._policy.duration(resources, _BATCH_SPARE_SECONDS)
            if duration:
                options.append(f"--time-limit={duration:g}s")

        def done(answer: CommandOutput) -> None:
            found = re.search(r"^[fƒ][1-9A-HJ-NP-Za-km-z]+$", answer.output.strip(), re.MULTILINE)
            if not answer.ok or found is None:
                answered(Refused(f"flux batch refused it: {answer.text}"))
            else:
                answered(job_number(found[0]))

        self._commands.run(["flux", "batch", *options, path], done, cwd=submission.cwd, env=job_environment(os.environ))

    # -- states ---------------------------------------------------------------------------------------------------

    def _follow(self, number: int, limit: float | None = None) -> None:
        """Keep the state of a job from now on, and end the job if it runs beyond its limit."""
        if number in self._jobs:
            return
        job = self._jobs[number] = _Followed()

        def end() -> None:
            if job.log.state.phase is not Phase.ENDED:
                self._instance.end(number, "timeout", f"it ran longer than {limit:g} s")

        def on_event(event: str, context: Any) -> None:
            before = job.log.state.phase
            if event:
                job.known = True
                job.log.add(event, context)
                if event == "start" and limit is not None:
                    self._events.call_later(limit + _LATE_SECONDS, end)
                if job.log.state.phase is not before:
                    self._on_change()
            else:
                # The results are there by now; if somebody asks nevertheless, the job is followed once more.
                self._events.call_later(_KEEP_SECONDS, lambda: self._forget(number))
            job.heard = True
            self._answer_for(number)

        self._instance.watch(number, on_event)

    def _forget(self, number: int) -> None:
        self._jobs.pop(number, None)

    def _answer_for(self, number: int) -> None:
        """Something is known about a job now, so answer the questions that waited only for it."""
        questions, self._questions = self._questions, []
        for missing, answer in questions:
            missing.discard(number)
            if missing:
                self._questions.append((missing, answer))
            else:
                answer()

    def _ask(self, numbers: set[int], answer: Callable[[], None]) -> None:
        """Call back, later, once something is known about all these jobs."""
        missing: set[int] = set()
        if not self._instance.lost:
            for number in numbers:
                self._follow(number)
            missing = {number for number in numbers if not self._jobs[number].heard}
        if missing:
            self._questions.append((missing, answer))
        else:
            self._events.call_later(0.0, answer)

    def _state(self, number: int) -> JobState | None:
        """The state of a job; None if the instance does not know it, or is gone."""
        job = self._jobs.get(number)
        return job.log.state if job is not None and job.known and not self._instance.lost else None

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """Report the states of jobs, once all of them are known."""
        numbers = {job_id: job_number(job_id) for job_id in job_ids}

        def answer() -> None:
            found = {job_id: self._state(number) for job_id, number in numbers.items()}
            on_states({(job_id, None): state for job_id, state in found.items() if state is not None})

        self._ask(set(numbers.values()), answer)

    def detail(self, job: JobKey, on_state: Callable[[JobState | None], None]) -> None:
        """Report the state of one job, once it is known."""
        number = job_number(job[0])
        self._ask({number}, lambda: on_state(self._state(number)))

    def cancel(self, jobs: Sequence[JobKey]) -> None:
        """Cancel jobs."""
        for job_id, _ in jobs:
            self._instance.end(job_number(job_id), "cancel")

    def _on_lost(self, why: str) -> None:
        questions, self._questions = self._questions, []
        for _, answer in questions:
            answer()
        self._on_change()

    def close(self) -> None:
        """Close the connection; jobs go on."""
        self._commands.close()
        self._instance.close()


def _output(submission: Submission) -> str:
    """The output file of a batch's job."""
    return os.path.join(submission.directory, "output.0")


def _for_flux(path: str) -> str:
    """A path with its braces escaped, because Flux's shell would expand them as templates."""
    return path.replace("{{", "{{{{")


def _is_listening(path: str) -> bool:
    """Return whether anybody listens at a socket. The file alone is no proof: a killed process leaves it behind."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:  # it cannot be known
            return True
    return True
