"""Flux as what runs the jobs of `launchers.jobs`: each call is a Flux job, told of by its events.

A call that brings a script of its own (``submission_template``, or a configuration of pysqa) is submitted by `flux
batch`, which runs the script in a Flux instance that has what the call asked for. All others are plain jobs.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from executorlib.launchers.base import Events
from executorlib.launchers.commands import Answer, Commands
from executorlib.launchers.flux import (
    FURTHER_KEYS,
    JobLog,
    job_environment,
    job_name,
    job_number,
    jobspec,
    run_command,
    task_options,
    urgency,
)
from executorlib.launchers.flux_instance import FluxInstance
from executorlib.launchers.queue import Batch, Cause, JobState, Phase
from executorlib.launchers.systems import JobKey, Refused, States
from executorlib.launchers.templates import FLUX, Templates, warn_of_unused
from executorlib.resources import Resources

# A script says by directives what its instance has; where it does not, it is what the call asks for.
_HAS_RESOURCES = re.compile(r"^#+\s*flux:.*?\s(-n|-N|--nslots|--num-slots|--nodes)\b", re.MULTILINE)
# A call ends itself at its run_time_max, by a signal that it may ignore. So long after that, in seconds, Flux ends it.
_LATE_SECONDS = 2.0
# How long the state of a job that has ended is remembered, in seconds.
_KEEP_SECONDS = 120.0
# Given to an instance beyond the run_time_max of its call, in seconds, to start and to end.
_BATCH_SPARE_SECONDS = 60.0


class FluxSystem:
    """The Flux instance that this process is in, as `systems.JobSystem` describes it.

    Args:
        events: The loop.
        pmi_mode: What Flux's shell offers to MPI; None for its default.
        configuration: A configuration of pysqa for scripts; None where calls are plain jobs.
    """

    # Its jobs tell by themselves (`listen`), and what is asked here is this object's memory.
    first_query = 0.1
    last_query = 10.0
    # A job has one number, and one is submitted as quickly as several.
    array_limit = 1

    def __init__(self, events: Events, pmi_mode: str | None, configuration: str | None) -> None:
        self.name = ""  # known from `prepare` on
        self._events = events
        self._pmi_mode = pmi_mode
        self._instance = FluxInstance(events, self._on_lost)
        self._templates = Templates(None, configuration, FLUX)
        self._has_configuration = configuration is not None
        self._commands = Commands(events)
        self._logs: dict[int, JobLog] = {}  # of all jobs that were ever asked for or submitted here
        self._heard: set[int] = set()  # of which at least one event, or that there is none, is known
        self._questions: list[tuple[set[int], Callable[[], None]]] = []  # by jobs that were not heard of yet
        self._on_change: Callable[[], None] = lambda: None
        self._submitting = 0
        self._warned: set[str] = set()

    def can_wait_for(self, job_id: str) -> bool:
        """See `JobSystem.can_wait_for`."""
        return True

    @property
    def busy(self) -> bool:
        """See `JobSystem.busy`."""
        return self._submitting > 0 or self._commands.busy

    def listen(self, on_change: Callable[[], None]) -> None:
        """See `JobSystem.listen`."""
        self._on_change = on_change

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """See `JobSystem.prepare`."""
        self._instance.open()
        self.name = self._instance.name
        on_ready()

    def setup(self) -> dict[str, Any]:
        """See `JobSystem.setup`; jobs have the environment of their submission."""
        return {"shown_gpus": True, "id_variables": ("FLUX_JOB_ID",)}

    def submit(self, batch: Batch, on_done: Callable[[str | Refused], None]) -> None:
        """See `JobSystem.submit`."""
        self._submitting += 1

        def answered(answer: int | Refused) -> None:
            self._submitting -= 1
            if isinstance(answer, Refused):
                on_done(answer)
                return
            self._follow(answer, batch.resources.run_time_max)
            on_done(job_name(answer))

        if self.has_script(batch.resources):
            self._submit_script(batch, answered)
            return
        warn_of_unused([key for key in batch.template_values if key not in FURTHER_KEYS], self._warned)
        spec = jobspec(
            batch.resources,
            shlex.split(batch.command),
            os.environ,
            name=batch.name,
            cwd=batch.cwd,
            pmi_mode=self._pmi_mode,
            output=self._output(batch),
            dependencies=[job_number(dependency.job_id) for dependency in batch.dependencies],
        )
        self._instance.submit(spec, urgency(batch.resources.priority, self._instance.is_owner), answered)

    def has_script(self, resources: Resources) -> bool:
        """Whether a call is submitted as a script."""
        return self._has_configuration or resources.submission_template is not None

    def command(self, resources: Resources, program: list[str]) -> list[str]:
        """The command, in a job, that runs a call's program on all of its ranks: a plain job has them itself."""
        if resources.cores == 1 or not self.has_script(resources):
            return program
        return run_command(resources, self._pmi_mode, program)

    @staticmethod
    def _output(batch: Batch) -> str:
        # Where Flux's shell sees braces it would fill something in.
        return os.path.join(batch.directory, "output.0").replace("{{", "{{{{")

    def _submit_script(self, batch: Batch, answered: Callable[[int | Refused], None]) -> None:
        path = os.path.join(batch.directory, "job.sh")
        try:
            script = self._templates.render(batch)
            unused = self._templates.unused(batch)
            with open(path, "w", encoding="utf-8") as file:
                file.write(script)
        except Exception as error:  # pysqa's, or of a template's, too
            refused = Refused(str(error))
            self._events.call_later(0.0, lambda: answered(refused))
            return
        resources = batch.resources
        says_resources = _HAS_RESOURCES.search(script) is not None
        warn_of_unused([key for key in unused if says_resources or key in batch.template_values], self._warned)
        options = [f"--job-name={batch.name}", f"--cwd={batch.cwd}", f"--output={self._output(batch)}"]
        options.append(f"--urgency={urgency(resources.priority, self._instance.is_owner)}")
        options += [f"--dependency=afterok:{dependency.job_id}" for dependency in batch.dependencies]
        if not says_resources:
            options += task_options(resources)
            if resources.num_nodes is not None or resources.exclusive:
                options.append(f"--nodes={resources.num_nodes or 1}")
            if resources.exclusive:
                options.append("--exclusive")
            if resources.run_time_max is not None:
                options.append(f"--time-limit={resources.run_time_max + _BATCH_SPARE_SECONDS:g}s")

        def done(answer: Answer) -> None:
            found = re.search(r"^[fƒ][1-9A-HJ-NP-Za-km-z]+$", answer.output.strip(), re.MULTILINE)
            if not answer.ok or found is None:
                answered(Refused(f"flux batch refused it: {answer.text}"))
            else:
                answered(job_number(found[0]))

        self._commands.run(["flux", "batch", *options, path], done, cwd=batch.cwd, env=job_environment(os.environ))

    # -- states ---------------------------------------------------------------------------------------------------

    def _follow(self, job: int, limit: float | None = None) -> None:
        """Know the state of a job from now on, and end it when it should have ended itself."""
        if job in self._logs:
            return
        log = self._logs[job] = JobLog()

        def end() -> None:
            if log.state.phase is not Phase.ENDED:
                self._instance.end(job, "timeout", f"it ran longer than {limit:g} s")

        def on_event(event: str, context: Any) -> None:
            before = log.state.phase
            if event:
                log.add(event, context)
                if event == "start" and limit is not None:
                    self._events.call_later(limit + _LATE_SECONDS, end)
                if log.state.phase is not before:
                    self._on_change()
            elif job not in self._heard:
                del self._logs[job]  # the instance does not know it
            self._hear(job)
            if not event:
                # Results are there by now; who asks all the same has it told once more.
                self._events.call_later(_KEEP_SECONDS, lambda: self._forget(job))

        self._instance.watch(job, on_event)

    def _forget(self, job: int) -> None:
        self._logs.pop(job, None)
        self._heard.discard(job)

    def _hear(self, job: int) -> None:
        self._heard.add(job)
        questions, self._questions = self._questions, []
        for missing, answer in questions:
            missing.discard(job)
            if missing:
                self._questions.append((missing, answer))
            else:
                answer()

    def _ask(self, jobs: set[int], answer: Callable[[], None]) -> None:
        """Call back once something is known of all these jobs."""
        if self._instance.lost:
            answer()
            return
        for job in jobs:
            self._follow(job)
        missing = jobs - self._heard
        if missing:
            self._questions.append((missing, answer))
        else:
            answer()

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """See `JobSystem.query`."""
        jobs = {job_number(job_id): job_id for job_id in job_ids}

        def answer() -> None:
            known = {} if self._instance.lost else self._logs
            on_states({(name, None): known[job].state for job, name in jobs.items() if job in known})

        self._ask(set(jobs), answer)

    def detail(self, job: JobKey, on_state: Callable[[JobState | None], None]) -> None:
        """See `JobSystem.detail`."""
        number = job_number(job[0])

        def answer() -> None:
            log = self._logs.get(number)
            on_state(None if log is None or self._instance.lost else log.state)

        self._ask({number}, answer)

    def cause_in(self, output: str) -> Cause:
        """See `JobSystem.cause_in`; Flux writes nothing there."""
        return Cause.NONE

    def cancel(self, jobs: Sequence[JobKey]) -> None:
        """See `JobSystem.cancel`."""
        for job_id, _ in jobs:
            self._instance.end(job_number(job_id), "cancel")

    def _on_lost(self, why: str) -> None:
        questions, self._questions = self._questions, []
        for _, answer in questions:
            answer()

    def close(self) -> None:
        """See `JobSystem.close`."""
        self._commands.close()
        self._instance.close()
