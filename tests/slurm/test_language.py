"""A real Slurm understands our commands, and its answers are understood here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executorlib.jobs.command_system import open_dialect
from executorlib.jobs.queue import Cause, Dependency, JobState, Phase, Submission
from executorlib.resources import Resources
from executorlib.single_node.mpi import find_mpiexec
from executorlib.slurm.queue import SETTINGS_COMMAND, SlurmDialect, command_environment, parse_settings, rank_command

pytestmark = pytest.mark.slurm

COMMAND_SECONDS = 30.0
JOB_SECONDS = 30.0


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = command_environment(os.environ)
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=environment)


def output_of(command: list[str]) -> str:
    done = run(command)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def queue() -> SlurmDialect:
    return SlurmDialect(parse_settings(output_of(SETTINGS_COMMAND)))


class Jobs:
    """Submits jobs of one test, and cancels them in the end."""

    def __init__(self, queue: SlurmDialect, folder: Path) -> None:
        self.queue = queue
        self.folder = folder
        self.submitted: list[str] = []

    def submission(
        self, command: str = "true", count: int = 1, values: dict[str, Any] | None = None, **more: Any
    ) -> Submission:
        fields = {key: more.pop(key) for key in ("dependencies", "cwd") if key in more}
        directory = self.folder / f"batch {len(self.submitted)}%a"
        directory.mkdir()
        defaults = {"cwd": str(self.folder)}
        resources = Resources().updated(more, "test")
        return Submission("a test", str(directory), command, count, resources, values or {}, **{**defaults, **fields})

    def submit(self, submission: Submission, queue: SlurmDialect | None = None) -> str:
        queue = queue or self.queue
        script = Path(submission.directory, "job.sh")
        script.write_text(queue.script(submission))
        job_id = queue.parse_job_id(output_of(queue.submit_command(submission, str(script))))
        self.submitted.append(job_id)
        return job_id

    def states(self) -> dict[tuple[str, int], JobState]:
        return self.queue.parse_status(output_of(self.queue.status_command(self.submitted)), self.submitted)

    def ends(self, job_id: str, count: int = 1) -> list[JobState]:
        """The states of a job, or of the elements of an array, once all have ended."""
        give_up = time.monotonic() + JOB_SECONDS
        while time.monotonic() < give_up:
            states = self.states()
            found = [states.get((job_id, index)) for index in range(count)]
            ended = [state for state in found if state is not None and state.phase is Phase.ENDED]
            if len(ended) == count:
                return ended
            time.sleep(0.1)  # Slurm tells nobody: it has to be asked
        raise AssertionError(f"job {job_id} has not ended: {found}")

    def printed(self, submission: Submission, index: int = 0) -> str:
        return Path(submission.directory, f"output.{index}").read_text()


@pytest.fixture
def jobs(queue: SlurmDialect, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(queue, tmp_path)
    yield made
    if made.submitted:
        output_of(queue.cancel_command([(job_id, None) for job_id in made.submitted]))


@pytest.fixture
def shown(jobs: Jobs) -> Callable[..., dict[str, str]]:
    """Submit a job that does not start, and return what scontrol shows of it."""

    def show(values: dict[str, Any] | None = None, **resources: Any) -> dict[str, str]:
        arguments = [*resources.pop("slurm_cmd_args", []), "--hold"]
        job_id = jobs.submit(jobs.submission(values=values, slurm_cmd_args=arguments, **resources))
        text = output_of(["scontrol", "--details", "show", "job", job_id])
        return dict(re.findall(r"(?:^|\s)([\w/:]+)=(.*?)(?=\s+[\w/:]+=|\s*$)", text, re.MULTILINE))

    return show


# The resources of a call.


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, {"NumCPUs": "1", "NumTasks": "1", "CPUs/Task": "1", "Requeue": "0", "Partition": "main", "Nice": "0"}),
        ({"cores": 3}, {"NumTasks": "3", "NumCPUs": "3"}),
        ({"threads_per_core": 2}, {"NumTasks": "1", "CPUs/Task": "2", "NumCPUs": "2"}),
        ({"cores": 2, "threads_per_core": 2}, {"NumTasks": "2", "CPUs/Task": "2", "NumCPUs": "4"}),
        ({"gpus_per_core": 2}, {"TresPerNode": "gres:gpu:2"}),
        ({"cores": 2, "gpus_per_core": 1}, {"TresPerTask": "gres:gpu:1"}),
        ({"cores": 4, "num_nodes": 2}, {"NumNodes": "2", "NumTasks": "4"}),
        ({"exclusive": True}, {"OverSubscribe": "NO"}),
        ({"run_time_max": 90}, {"TimeLimit": "00:03:00"}),
        ({"priority": -7}, {"Nice": "7"}),
        ({"slurm_cmd_args": ["--comment=mine", "--requeue"]}, {"Comment": "mine", "Requeue": "1"}),
    ],
    ids=str,
)
def test_resources(
    resources: dict[str, Any], expected: dict[str, str], shown: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    found = shown(**resources)
    assert {key: normal(found.get(key, "")) for key in expected} == expected
    assert found["WorkDir"] == str(tmp_path)


def normal(value: str) -> str:
    """Without what versions of Slurm write differently.

    That is ``2-2`` nodes, ``gres/gpu`` since 23.11, and what a task has as ``cpu=1,gres/gpu=1`` since 26.05.
    """
    value = re.sub(r"^(\d+)-\1$", r"\1", value).replace("gres/", "gres:")
    return re.sub(r"^cpu=\d+,gres:gpu=", "gres:gpu:", value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"partition": "short"}, {"Partition": "short"}),
        ({"queue": "short"}, {"Partition": "short"}),
        ({"memory_max": 2}, {"MinMemoryNode": "2G"}),
        ({"job_name": 'two "words" \\'}, {"JobName": 'two "words" \\'}),
    ],
    ids=str,
)
def test_further_keys(values: dict[str, Any], expected: dict[str, str], shown: Callable[..., dict[str, str]]) -> None:
    found = shown(values)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs an operator of Slurm, such as root")
def test_operators_raise_priorities(shown: Callable[..., dict[str, str]]) -> None:
    assert shown(priority=7)["Nice"] == "-7"


def test_options_that_a_template_cannot_change(jobs: Jobs) -> None:
    template = (
        "#!/bin/bash\n#SBATCH --output=o.txt --error=e.txt --array=0-9 --dependency=afterok:1 --chdir=/ -n {{cores}}\n"
        "echo out; echo err >&2; pwd\n{{command}}"
    )
    (jobs.folder / "a cwd").mkdir()
    cwd = str(jobs.folder / "a cwd")
    first = jobs.submit(jobs.submission())
    submission = jobs.submission("exit 3", 2, submission_template=template, cwd=cwd, dependencies=(Dependency(first),))
    job_id = jobs.submit(submission)
    assert [state.exit_code for state in jobs.ends(job_id, 2)] == ["3:0", "3:0"]
    assert [jobs.printed(submission, index) for index in range(2)] == [f"out\nerr\n{cwd}\n"] * 2
    assert (job_id, 2) not in jobs.states()


def test_configuration_of_pysqa(jobs: Jobs) -> None:
    folder = jobs.folder / "queues"
    folder.mkdir()
    (folder / "queue.yaml").write_text(
        "queue_type: SLURM\nqueue_primary: a\nqueues: {a: {cores_max: 4, memory_max: 1, script: a.sh}}\n"
    )
    (folder / "a.sh").write_text(
        "#!/bin/bash\n#SBATCH -p short --ntasks={{cores}} --mem={{memory_max}}G --hold\n{{command}}\n"
    )
    configured = open_dialect(str(folder))
    assert isinstance(configured, SlurmDialect)
    job_id = jobs.submit(jobs.submission(cores=3, values={"memory_max": 8}), configured)
    text = output_of(["scontrol", "show", "job", job_id])
    assert all(expected in text for expected in ("Partition=short", "NumTasks=3", "MinMemoryNode=1G"))


@pytest.mark.parametrize(
    ("values", "resources", "message"),
    [
        ({"partition": "nowhere"}, {}, "Invalid partition name specified"),
        ({"memory_max": 10_000}, {}, "Memory specification can not be satisfied"),
        ({}, {"gpus_per_core": 99}, "Requested node configuration is not available"),
        ({}, {"slurm_cmd_args": ["--no-such-option"]}, "unrecognized option '--no-such-option'"),
    ],
    ids=["partition", "memory", "gpus", "option"],
)
def test_refusals(values: dict[str, Any], resources: dict[str, Any], message: str, jobs: Jobs) -> None:
    submission = jobs.submission(values=values, **resources)
    script = Path(submission.directory, "job.sh")
    script.write_text(jobs.queue.script(submission))
    done = run(jobs.queue.submit_command(submission, str(script)))
    assert done.returncode != 0
    assert message in done.stderr
    assert not jobs.queue.is_transient(done.stderr)


# GPUs and ranks.


def test_gpus_of_one_call(jobs: Jobs) -> None:
    submission = jobs.submission('echo "$CUDA_VISIBLE_DEVICES"', gpus_per_core=2)
    assert jobs.ends(jobs.submit(submission))[0].state == "COMPLETED"
    assert len(jobs.printed(submission).strip().split(",")) == 2


def test_ranks_have_their_own_gpus_and_threads(jobs: Jobs) -> None:
    program = ["bash", "-c", 'echo "$SLURM_PROCID $(wc -w <<< "${CUDA_VISIBLE_DEVICES//,/ }") $SLURM_CPUS_PER_TASK"']
    needs = {"cores": 2, "threads_per_core": 2, "gpus_per_core": 1, "num_nodes": 2}
    command = rank_command(Resources().updated(needs, "test"), "none", program)
    submission = jobs.submission(shlex.join(command), **needs)
    assert jobs.ends(jobs.submit(submission))[0].state == "COMPLETED", jobs.printed(submission)
    assert sorted(jobs.printed(submission).splitlines()) == ["0 1 2", "1 1 2"]


@pytest.mark.mpi
def test_ranks_of_mpiexec_see_all_gpus_of_their_node(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    program = ["bash", "-c", 'echo "$SLURMD_NODENAME $(wc -w <<< "${CUDA_VISIBLE_DEVICES//,/ }")"']
    needs = {"cores": 4, "gpus_per_core": 1, "num_nodes": 2}
    command = rank_command(Resources().updated(needs, "test"), None, program, find_mpiexec().path)
    submission = jobs.submission(shlex.join(command), **needs)
    assert jobs.ends(jobs.submit(submission))[0].state == "COMPLETED", jobs.printed(submission)
    lines = [line.split() for line in jobs.printed(submission).splitlines()]
    assert sorted(gpus for _, gpus in lines) == ["2"] * 4
    assert len({node for node, _ in lines}) == 2


# Arrays, dependencies, cancelling.


def test_array_that_is_held(jobs: Jobs) -> None:
    job_id = jobs.submit(jobs.submission(count=9, slurm_cmd_args=["--hold"]))
    states = jobs.states()
    assert {states[job_id, index].reason for index in range(9)} == {"JobHeldUser"}


def test_scattered_elements_are_all_listed(jobs: Jobs) -> None:
    job_id = jobs.submit(jobs.submission(count=200, slurm_cmd_args=["--hold"]))
    primes = [number for number in range(2, 200) if all(number % other for other in range(2, number))]
    output_of(jobs.queue.cancel_command([(job_id, index) for index in range(200) if index not in primes]))
    states = jobs.states()
    assert [index for index in range(200) if (job_id, index) in states] == primes
    # Slurm forgets a job at once if it is cancelled while it waits.
    done = run(["scontrol", "show", "job", f"{job_id}_0"])
    assert f"Job {job_id}_0 not found\n" in (done.stdout, done.stderr)  # the latter since Slurm 26.05


def test_dependencies(jobs: Jobs) -> None:
    inputs = jobs.submit(jobs.submission("exit $((SLURM_ARRAY_TASK_ID == 1))", 3))
    each = jobs.submit(jobs.submission(count=3, dependencies=(Dependency(inputs, corresponding=True),)))
    good = jobs.submit(jobs.submission(dependencies=(Dependency(inputs, 0), Dependency(inputs, 2))))
    bad = jobs.submit(jobs.submission(dependencies=(Dependency(inputs, 0), Dependency(inputs, 1), Dependency(good))))
    whole = jobs.submit(jobs.submission(count=2, dependencies=(Dependency(inputs),)))
    never = JobState(Phase.ENDED, "CANCELLED", "DependencyNeverSatisfied", "0:0", cause=Cause.CANCELLED)
    done = ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert [state.state for state in jobs.ends(each, 3)] == done
    assert [state.state for state in jobs.ends(good)] == ["COMPLETED"]
    assert jobs.ends(bad) == [never]
    assert jobs.ends(whole, 2) == [never, never]


def test_cancel_of_jobs_and_of_elements(jobs: Jobs) -> None:
    held = {"slurm_cmd_args": ["--hold"]}
    plain, array = jobs.submit(jobs.submission(**held)), jobs.submit(jobs.submission(count=5, **held))
    output_of(jobs.queue.cancel_command([(plain, None), (array, 1), (array, 2), (array, 4)]))
    states = jobs.states()
    assert states[plain, 0].state == "CANCELLED"
    assert {index for index in range(5) if (array, index) in states} == {0, 3}


# How jobs end.


@pytest.mark.parametrize(
    ("command", "state", "exit_code"),
    [
        ("true", "COMPLETED", "0:0"),
        ("exit 3", "FAILED", "3:0"),
        ("kill -9 $$", "FAILED", "0:9"),
        ("/no/such/python", "FAILED", "127:0"),
    ],
)
def test_ends(command: str, state: str, exit_code: str, jobs: Jobs) -> None:
    job_id = jobs.submit(jobs.submission(command))
    (end,) = jobs.ends(job_id)
    assert (end.phase, end.state, end.exit_code, bool(end.node)) == (Phase.ENDED, state, exit_code, True)
    detail = SlurmDialect().parse_detail(output_of(["scontrol", "show", "job", job_id]))
    assert detail == end


def test_ends_by_the_database(jobs: Jobs) -> None:
    if jobs.queue.detail_command("1", None)[0] != "sacct":
        pytest.skip("needs a cluster with accounting (SLURM_CLUSTER_ACCOUNTING=1)")
    job_id = jobs.submit(jobs.submission("exit $SLURM_ARRAY_TASK_ID", 2))
    ends = jobs.ends(job_id, 2)
    give_up = time.monotonic() + JOB_SECONDS
    details: list[JobState | None] = []
    # The database learns a little later.
    while not all(detail and detail.phase is Phase.ENDED for detail in details or [None]):
        assert time.monotonic() < give_up, details
        time.sleep(0.1)
        details = [jobs.queue.parse_detail(output_of(jobs.queue.detail_command(job_id, index))) for index in (0, 1)]
    assert [(d.state, d.exit_code, d.node) for d in details if d] == [(e.state, e.exit_code, e.node) for e in ends]


def test_unknown_jobs(queue: SlurmDialect) -> None:
    unknown = "67000000"
    assert (unknown, 0) not in queue.parse_status(output_of(queue.status_command([unknown])), [unknown])
    assert queue.parse_detail(run(queue.detail_command(unknown, 3)).stdout) is None
    assert queue.parse_detail(run(["scontrol", "show", "job", unknown]).stdout) is None


def test_jobs_that_can_never_start(jobs: Jobs) -> None:
    """Slurm accepts it, and lets it wait forever."""
    submitted = [jobs.submit(jobs.submission(values={"partition": "short"}, run_time_max=36_000))]
    if " 24.11" not in output_of(["sinfo", "--version"]):  # which refuses it
        submitted.append(jobs.submit(jobs.submission(cores=9999)))
    give_up = time.monotonic() + JOB_SECONDS
    while not all((state := jobs.states()[job, 0]).hopeless for job in submitted):
        assert time.monotonic() < give_up, state
        time.sleep(0.1)


def test_status_is_one_request(jobs: Jobs) -> None:
    """However many jobs there are."""
    for _ in range(3):
        jobs.submit(jobs.submission(count=100, slurm_cmd_args=["--hold"]))

    def requests() -> int:
        return sum(int(count) for count in re.findall(r"REQUEST_JOB_\w+ .*?count:(\d+)", output_of(["sdiag"])))

    before = requests()
    assert len([key for key in jobs.states() if key[0] in jobs.submitted]) == 300
    assert requests() - before == 1
