"""Drives a queuing system by its commands."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from executorlib.jobs.queue import Cause, Dependency, Dialect, JobState, Submission
from executorlib.jobs.registry import DEFAULT, dialect_of
from executorlib.jobs.system import BatchSystem, Refused
from executorlib.jobs.templates import Templates, warn_of_unused
from executorlib.launchers.contract import Events
from executorlib.launchers.subprocesses import CommandOutput, Commands

if TYPE_CHECKING:
    from executorlib.jobs.system import JobKey, States

logger = logging.getLogger("executorlib")

# Seconds without an answer before the user is told. Controllers are restarted now and then.
_SILENT_SECONDS = 30.0
# Seconds between two queries of a history that does not have the end of a job yet.
_HISTORY_SECONDS = 2.0


class Silence:
    """Warns the user once when a system stops answering, and once when it answers again.

    Args:
        name: The name of the system.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None
        self._told = False

    def failed(self, asked: float, now: float, said: str) -> None:
        """Note that a query was not answered.

        Args:
            asked: The time of the query.
            now: The time when it failed.
            said: The text that came instead of an answer.
        """
        if self._since is None:
            self._since = asked
        if not self._told and now - self._since >= _SILENT_SECONDS:
            self._told = True
            logger.warning(
                "%s has not answered status queries for %.0f s: %s. Jobs go on and their results are found, but a job "
                "that ends without a result goes unnoticed until it answers. It is asked again and again.",
                self._name,
                now - self._since,
                said,
            )

    def answered(self) -> None:
        """Note that a query was answered."""
        if self._told:
            logger.warning("%s answers again", self._name)
        self._since, self._told = None, False


class CommandSystem(BatchSystem):
    """A batch queue that is driven by its commands.

    Args:
        events: The loop.
        name: The system's name until its queue is known, which has a more exact one.
        make_dialect: Makes the queue's dialect from the output of `settings_command`.
        settings_command: The command that asks the system, once, for its settings; empty if there is none.
        environment: Makes the environment of the commands from that of this process.
    """

    # Results need no query, and errors have to be known within 15 s.
    first_query = 2.0
    last_query = 10.0

    def __init__(
        self,
        events: Events,
        name: str,
        make_dialect: Callable[[str], Dialect],
        settings_command: list[str],
        environment: Callable[[Mapping[str, str]], dict[str, str]] = dict,
    ) -> None:
        self.name = name
        self._events = events
        self._commands = Commands(events)
        self._environment = environment
        self._make_dialect = make_dialect
        self._settings_command = settings_command
        self._dialect: Dialect | None = None
        if not settings_command:
            self._use(make_dialect(""))
        self._waiting: list[Callable[[], None]] = []
        self._warned: set[str] = set()
        self._problem = ""
        self._silence = Silence(name)

    def _use(self, dialect: Dialect) -> None:
        self._dialect, self.name = dialect, dialect.name

    @property
    def array_limit(self) -> int:
        """Most calls in one batch; known from the first answer on."""
        return self._dialect.array_limit if self._dialect is not None else 1

    @property
    def element_variables(self) -> tuple[str, ...]:
        """The variables that hold a job's index in its array; known from the first answer on."""
        return self._dialect.element_variables if self._dialect is not None else ()

    def can_wait_for(self, dependency: Dependency) -> bool:
        """Return whether the queue has dependencies, on elements of arrays if this one names elements."""
        if self._dialect is None or not self._dialect.has_dependencies:
            return False
        is_whole = dependency.index is None and not dependency.corresponding
        return is_whole or self._dialect.waits_for_elements

    @property
    def busy(self) -> bool:
        """True while any command is running."""
        return self._commands.busy

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """Ask for the settings, and call `on_ready` once `array_limit` is known."""
        if self._dialect is not None:
            on_ready()
            return
        self._waiting.append(on_ready)
        if len(self._waiting) > 1:
            return

        def know(answer: CommandOutput) -> None:
            # Without an answer, the system's defaults are assumed. The submission will say what is wrong.
            try:
                self._use(self._make_dialect(answer.output if answer.ok else ""))
            except Exception as error:  # raised by pysqa or by a package that it loads
                self._problem = f"{type(error).__name__}: {error}"
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()

        self._run(self._settings_command, know)

    def setup(self) -> dict[str, Any]:
        """The names of the queue's variables, and the environment that it does not hand on to jobs by itself."""
        if self._dialect is None:
            return {}
        return {
            "id_variables": self._dialect.id_variables,
            "local_rank_variables": self._dialect.local_rank_variables,
            "defaults": self._dialect.handed_on(os.environ),
        }

    def _run(self, argv: list[str], on_answer: Callable[[CommandOutput], None], cwd: str | None = None) -> None:
        self._commands.run(argv, on_answer, cwd=cwd, env=self._environment(os.environ))

    def submit(self, submission: Submission, on_done: Callable[[str | Refused], None]) -> None:
        """Write the script of a batch and submit it."""
        dialect = self._dialect
        if dialect is None:
            on_done(Refused(self._problem))
            return
        path = os.path.join(submission.directory, "job.sh")
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(dialect.script(submission))
            warn_of_unused(dialect.unused(submission), self._warned)
            argv = dialect.submit_command(submission, path)
        except (OSError, ValueError, ImportError) as error:
            on_done(Refused(str(error)))
            return
        except Exception as error:  # raised by pysqa or in a template
            on_done(Refused(f"{type(error).__name__}: {error}"))
            return

        def answered(answer: CommandOutput) -> None:
            if not answer.ok:
                transient = answer.code is None or dialect.is_transient(answer.text)
                limit = dialect.limit_in(answer.text)
                on_done(Refused(f"{argv[0]} refused it: {answer.text}", transient, limit))
                return
            self._tell(argv[0], submission.name, answer.error)
            taken: str | Refused
            try:
                taken = dialect.parse_job_id(answer.output)
            except Exception as error:  # whatever the reason, this is no job id
                taken = Refused(f"the answer of {argv[0]} was not understood: {error}")
            on_done(taken)

        # Some queues start a job in the directory from which it was submitted.
        self._run(argv, answered, submission.cwd)

    def _tell(self, program: str, name: str, said: str) -> None:
        """Warn the user, once, of a message that came with an accepted submission."""
        for line in filter(None, map(str.strip, said.splitlines())):
            words = re.sub(r"\d{3,}", "", line)  # messages that differ only in a job's number count as one
            if words not in self._warned:
                self._warned.add(words)
                logger.warning("%s accepted the job of %s with the message: %s", program, name, line)

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """Ask for the states of all these jobs with one command."""
        dialect = self._dialect
        if dialect is None:  # these are other sessions' jobs, in a system that cannot be used here
            self._events.call_later(0.0, lambda: on_states(None))
            return

        asked = time.monotonic()

        def answered(answer: CommandOutput) -> None:
            states: States | None = None
            said = answer.text
            if answer.ok or answer.code in dialect.codes_of_the_gone:
                try:
                    states = dialect.parse_status(answer.output, job_ids)
                except Exception as error:  # whatever the reason, this is no answer
                    said = str(error)
            if states is None:
                self._silence.failed(asked, time.monotonic(), said)
            else:
                self._silence.answered()
            on_states(states)

        self._run(dialect.status_command(job_ids), answered)

    def detail(self, job: JobKey, on_state: Callable[[JobState | None], None]) -> None:
        """Ask how a job ended, again and again while the history may not have its end yet."""
        dialect = self._dialect
        argv = [] if dialect is None else dialect.detail_command(*job)
        if dialect is None or not argv:
            self._events.call_later(0.0, lambda: on_state(None))
            return
        give_up = time.monotonic() + dialect.history_delay

        def answered(answer: CommandOutput) -> None:
            state = None
            if answer.ok or answer.code in dialect.codes_of_the_gone:
                with contextlib.suppress(Exception):
                    state = dialect.parse_detail(answer.output)
            if state is None and time.monotonic() < give_up:
                self._events.call_later(_HISTORY_SECONDS, lambda: self._run(argv, answered))
            else:
                on_state(state)

        self._run(argv, answered)

    def cause_in(self, output: str) -> Cause:
        """The cause that the queue has written into the output."""
        return Cause.NONE if self._dialect is None else self._dialect.cause_in(output)

    def cancel(self, jobs: Sequence[JobKey]) -> None:
        """Cancel jobs with one command."""
        if self._dialect is not None:
            self._run(self._dialect.cancel_command(jobs), lambda answer: None)

    def close(self) -> None:
        """Kill the commands that still run; jobs go on."""
        self._commands.close()


def open_templates(configuration: str | None) -> Templates:
    """The templates of a pysqa configuration, or Slurm's default template if there is none.

    Raises:
        ValueError: The configuration cannot be used; the text says why.
        ImportError: A configuration is given, and pysqa is not installed.
    """
    return Templates(dialect_of(DEFAULT).default_template, configuration)


def open_dialect(configuration: str | None, settings: str = "") -> Dialect:
    """The dialect of a pysqa configuration, or Slurm's if there is none.

    Args:
        configuration: Directory with a ``queue.yaml`` and templates, as pysqa describes them.
        settings: The output of its `Dialect.settings_command`.

    Raises:
        ValueError: The configuration cannot be used; the text says why.
        ImportError: A configuration is given, and pysqa is not installed.
    """
    templates = open_templates(configuration)
    return dialect_of(templates.queue_type).from_settings(settings, templates)


def open_system(events: Events, templates: Templates) -> CommandSystem:
    """The system that the templates are for."""
    dialect = dialect_of(templates.queue_type)
    return CommandSystem(
        events,
        dialect.title,
        lambda answer: dialect.from_settings(answer, templates),
        list(dialect.settings_command),
        dialect.command_environment,
    )
