"""A queue that is driven by commands, with made-up answers of these commands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from executorlib import SlurmClusterExecutor
from executorlib.jobs.command_system import CommandSystem, Silence
from executorlib.jobs.queue import JobState, Submission
from executorlib.jobs.system import Refused
from executorlib.launchers.subprocesses import CommandOutput, Commands
from executorlib.resources import Resources
from fakes import Events


class Stumbles:
    """A queue whose answers nobody understands."""

    name = "a queue"
    array_limit = 1
    has_dependencies = False
    history_delay = 0.0
    codes_of_the_gone: frozenset[int] = frozenset()

    def script(self, submission: Submission) -> str:
        return "#!/bin/sh\n"

    def unused(self, submission: Submission) -> list[str]:
        return []

    def submit_command(self, submission: Submission, script_path: str) -> list[str]:
        return ["submit", script_path]

    def status_command(self, job_ids: Any) -> list[str]:
        return ["status"]

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        return ["detail"]

    def parse_job_id(self, output: str) -> str:
        raise IndexError("no word")

    def parse_status(self, output: str, job_ids: Any) -> dict[tuple[str, int], JobState]:
        raise KeyError("jobid")

    def parse_detail(self, output: str) -> JobState | None:
        raise TypeError("no text")


class UnderstandsFine(Stumbles):
    """... but for one word."""

    def parse_status(self, output: str, job_ids: Any) -> dict[tuple[str, int], JobState]:
        return {} if output == "fine" else super().parse_status(output, job_ids)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[CommandOutput]:
    """The outputs of the commands, one after the other; the last one is repeated."""
    answers: list[CommandOutput] = []

    def run(commands: Any, argv: list[str], on_answer: Callable[[CommandOutput], None], **_: Any) -> None:
        on_answer(answers.pop(0) if len(answers) > 1 else answers[0])

    monkeypatch.setattr(Commands, "run", run)
    return answers


def system(queue: Any, events: Any = None) -> CommandSystem:
    return CommandSystem(events or Events(), "a queue", lambda _settings: queue, [])


def submission(folder: Path) -> Submission:
    return Submission("a", str(folder), "true", 1, Resources(), {}, str(folder))


def test_answers_that_cannot_be_understood(said: list[CommandOutput], tmp_path: Path) -> None:
    """They fail that request and nothing else."""
    said.append(CommandOutput(0, "what?", ""))
    queue, answers = system(Stumbles()), []
    queue.query(["7"], answers.append)
    queue.detail(("7", None), answers.append)
    assert answers == [None, None]
    queue.submit(submission(tmp_path), answers.append)
    assert isinstance(answers[-1], Refused)
    assert not answers[-1].transient
    assert "no word" in str(answers[-1])


class Accepts(Stumbles):
    def parse_job_id(self, output: str) -> str:
        return output.strip()


def test_message_about_an_accepted_job_is_logged_once(
    said: list[CommandOutput], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the call. The same message about another job is not repeated."""
    warning = "submit: Warning: can't run 1 processes on 4 nodes, setting nnodes to 1"
    said += [
        CommandOutput(0, "20001\n", ""),
        CommandOutput(0, "20002\n", f"{warning}\n\n"),
        CommandOutput(0, "20003\n", f"{warning}\nsubmit: job 20003 costs nothing\n"),
        CommandOutput(0, "20004\n", f"{warning}\nsubmit: job 20004 costs nothing\n"),
    ]
    queue, answers = system(Accepts()), []
    for _ in range(4):
        queue.submit(submission(tmp_path), answers.append)
    assert answers == ["20001", "20002", "20003", "20004"]
    assert [record.getMessage() for record in caplog.records] == [
        f"submit accepted the job of a with the message: {warning}",
        "submit accepted the job of a with the message: submit: job 20003 costs nothing",
    ]


def test_silence_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    silence = Silence("Slurm")
    silence.failed(0.0, 20.0, "squeue: no controller")
    silence.failed(25.0, 29.0, "squeue: no controller")
    assert not caplog.records
    silence.failed(35.0, 36.0, "squeue: still no controller")
    silence.failed(46.0, 47.0, "squeue: no controller")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("executorlib", "WARNING")
    assert "Slurm has not answered status queries for 36 s" in record.message
    assert "squeue: still no controller" in record.message
    caplog.clear()
    silence.answered()
    silence.answered()
    silence.failed(100.0, 101.0, "squeue: no controller")
    assert [each.message for each in caplog.records] == ["Slurm answers again"]


@pytest.mark.parametrize(
    ("answer", "word"),
    [(CommandOutput(1, "", "no controller"), "no controller"), (CommandOutput(0, "half a line", ""), "'jobid'")],
)
def test_queries_that_fail_for_long(
    said: list[CommandOutput],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: CommandOutput,
    word: str,
) -> None:
    monkeypatch.setattr("executorlib.jobs.command_system._SILENT_SECONDS", 0.0)
    said += [answer, answer, CommandOutput(0, "fine", "")]
    asked, answers = system(UnderstandsFine()), []
    for _ in range(3):
        asked.query(["7"], answers.append)
    assert answers == [None, None, {}]
    first, second = (record.message for record in caplog.records)
    assert f": {word}. " in first
    assert second == "a queue answers again"


def test_template_that_raises_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(queue: Any, submission: Submission) -> str:
        raise RuntimeError("recursion")

    monkeypatch.setattr(Stumbles, "script", script)
    answers: list[Any] = []
    system(Stumbles()).submit(submission(tmp_path), answers.append)
    assert "RuntimeError: recursion" in str(answers[0])


def test_system_that_cannot_be_used_here() -> None:
    """It is still asked about jobs of other sessions."""

    def broken(settings: str) -> Any:
        raise ImportError("no pysqa")

    events = Events()
    broken_system = CommandSystem(events, "a queue", broken, ["settings"])
    answers: list[Any] = []
    broken_system.query(["7"], answers.append)
    broken_system.detail(("7", None), answers.append)
    broken_system.cancel([("7", None)])
    events.run_timers()
    assert answers == [None, None]


@pytest.mark.parametrize("pmi_mode", [None, "pmix"])
def test_mpiexec_is_asked_at_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pmi_mode: str | None) -> None:
    """The loop, for which all calls wait, does not ask for up to 30 s. Only rows whose ranks it starts ask."""
    asked: list[None] = []

    def find() -> Any:
        asked.append(None)
        raise FileNotFoundError

    monkeypatch.setattr("executorlib.single_node.mpi.find_mpiexec", find)
    # One that runs nothing needs no cluster.
    with SlurmClusterExecutor(pmi_mode=pmi_mode, export_workflow_filename=str(tmp_path / "graph.json")) as executor:
        executor.submit(shlex.quote, "a")
        assert not asked
        executor.submit(shlex.quote, "b", resource_dict={"cores": 2})
        assert len(asked) == (0 if pmi_mode else 1)


# Says nothing before the test opens the gate; takes every job, and notes what it is to wait for.
SILENT = {
    "scontrol": '#!/bin/sh\nread line < "$GATE"\n',
    "sbatch": '#!/bin/sh\necho "$@" >> "$GATE.jobs"\ngrep -c . "$GATE.jobs"\n',
    "squeue": "#!/bin/sh\nexit 1\n",
}


@pytest.mark.cache
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_leaving_while_the_queue_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Futures are cancelled at once. Jobs are handed over when it answers, each after its inputs."""
    for name, text in SILENT.items():
        tmp_path.joinpath(name).write_text(text)
        tmp_path.joinpath(name).chmod(0o755)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setenv("GATE", str(gate))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    executor = SlurmClusterExecutor(cache_directory=str(tmp_path / "store"))
    try:
        first = executor.submit(abs, -1)
        futures = [first, executor.submit(max, first, 2), executor.submit(max, 1, 2)]
        cancelled: list[Any] = []
        for future in futures:
            future.add_done_callback(cancelled.append)
        executor.shutdown(wait=False)
        assert cancelled == futures
        assert all(future.cancelled() for future in futures)
        executor.shutdown(wait=False)  # as does the end of a `with` block
    finally:
        gate.write_text("\n")
        executor.shutdown()
    jobs = (tmp_path / "gate.jobs").read_text().splitlines()
    assert ["--dependency=" in job for job in jobs] == [False, True]
    assert not caplog.records


@pytest.mark.parametrize(
    ("argv", "cwd", "said"),
    [
        (["no-such-command"], None, "no-such-command cannot be run: No such file or directory: no-such-command"),
        (["true"], "/no/such/folder", "true cannot be run: No such file or directory: /no/such/folder"),
        (["true", "a\0b"], None, "true cannot be run: embedded null byte"),
    ],
)
def test_command_that_cannot_be_run(argv: list[str], cwd: str | None, said: str) -> None:
    """This is an answer like others, and names the missing program."""
    events, answers = Events(), []
    Commands(events).run(argv, answers.append, cwd=cwd)
    for _ in range(3):
        events.run_timers()
    assert [(answer.ok, answer.error) for answer in answers] == [(False, said)]
