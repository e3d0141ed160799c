"""The language of Slurm, against what Slurm 22.05.8 printed, and of pysqa's other queues."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib.jobs import templates
from executorlib.jobs.command_system import open_dialect
from executorlib.jobs.pysqa import PysqaDialect
from executorlib.jobs.queue import Cause, Dependency, Dialect, JobState, Limit, Phase, Submission
from executorlib.jobs.templates import Templates, check_keys, minutes
from executorlib.resources import Resources
from executorlib.slurm import queue as slurm
from executorlib.slurm.queue import (
    DEFAULT_TEMPLATE,
    Settings,
    SlurmDialect,
    command_environment,
    parse_settings,
    rank_command,
)
from unit.properties import repeatable

needs_pysqa = pytest.mark.skipif(importlib.util.find_spec("pysqa") is None, reason="needs pysqa (pip install pysqa)")


def submission(count: int = 1, values: dict[str, Any] | None = None, **more: Any) -> Submission:
    fields = {key: more.pop(key) for key in ("directory", "dependencies", "cwd") if key in more}
    defaults: dict[str, Any] = {"directory": "/cache/.executorlib/b1", "cwd": "/home/me/project"}
    return Submission(
        "relax",
        command="python -m job",
        count=count,
        resources=Resources(**more),
        template_values=values or {},
        **{**defaults, **fields},
    )


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


# Scripts.


@needs_pysqa
def test_default_script_needs_nothing_of_the_user() -> None:
    assert SlurmDialect(user=1000).script(submission()) == (
        "#!/bin/bash\n"
        '#SBATCH --job-name="relax"\n'
        "#SBATCH --ntasks=1\n"
        "#SBATCH --cpus-per-task=1\n"
        "#SBATCH --no-requeue\n"
        "\n"
        "python -m job\n"
    )


@needs_pysqa
@pytest.mark.parametrize(
    ("values", "resources", "expected"),
    [
        ({}, {"cores": 3, "threads_per_core": 2}, ["--ntasks=3", "--cpus-per-task=2"]),
        ({}, {"gpus_per_core": 2}, ["--gres=gpu:2"]),
        ({}, {"cores": 2, "gpus_per_core": 1}, ["--gpus-per-task=1"]),
        ({}, {"num_nodes": 2}, ["--nodes=2"]),
        ({}, {"exclusive": True}, ["--exclusive"]),
        ({}, {"priority": -7}, ["--nice=7"]),
        ({}, {"run_time_max": 5.0}, ["--time=2"]),
        ({}, {"run_time_max": 60.0}, ["--time=2"]),
        ({}, {"run_time_max": 60.5}, ["--time=3"]),
        ({"partition": "short"}, {}, ['--partition="short"']),
        ({"queue": "short"}, {}, ['--partition="short"']),
        ({"partition": "a", "queue": "b"}, {}, ['--partition="a"']),
        ({"account": "chem", "qos": "high"}, {}, ['--account="chem"', '--qos="high"']),
        ({"constraint": "a&b", "reservation": "r"}, {}, ['--constraint="a&b"', '--reservation="r"']),
        ({"memory_max": 2}, {}, ["--mem=2048M"]),
        ({"memory_max": 0.3}, {}, ["--mem=308M"]),
        ({"memory_max": "2"}, {}, ["--mem=2048M"]),
        ({"memory_max": "500M"}, {}, ['--mem="500M"']),
        ({"job_name": 'a "b" \\c'}, {}, ['--job-name="a \\"b\\" \\\\c"']),
        ({"job_name": "two\nlines"}, {}, ['--job-name="two lines"']),
    ],
    ids=str,
)
def test_each_need_becomes_a_directive(values: dict[str, Any], resources: dict[str, Any], expected: list[str]) -> None:
    script = SlurmDialect(user=1000).script(submission(values=values, **resources))
    assert set(expected) <= set(directives(script))
    assert SlurmDialect(user=1000).unused(submission(values=values, **resources)) == []


@needs_pysqa
def test_only_operators_raise_a_priority() -> None:
    urgent = submission(priority=7)
    assert "--nice=-7" in directives(SlurmDialect(user=0).script(urgent))
    assert not [line for line in directives(SlurmDialect(user=1000).script(urgent)) if "nice" in line]
    assert SlurmDialect(user=0).unused(urgent) == []
    assert SlurmDialect(user=1000).unused(urgent) == ["priority"]


@needs_pysqa
def test_template_of_the_call() -> None:
    text = (
        "#!/bin/sh\n#SBATCH -n {{cores}} -p {{partition}}\n"
        "{% if run_time_max %}#SBATCH -t {{run_time_max // 60}}\n{% endif %}{{command}}"
    )
    own = submission(
        values={"partition": "p", "feature": "x", "dependency_list": [1]},
        submission_template=text,
        cores=2,
        threads_per_core=3,
        run_time_max=61.0,
        gpus_per_core=1,
    )
    # As many cores as all threads need, because it does not ask for threads; and no less time than was given.
    assert SlurmDialect().script(own) == "#!/bin/sh\n#SBATCH -n 6 -p p\n#SBATCH -t 3\npython -m job\n"
    assert SlurmDialect().unused(own) == ["feature", "dependency_list", "gpus_per_core"]
    knows_threads = submission(
        submission_template="{{cores}}x{{threads_per_core}} {{command}}", cores=2, threads_per_core=3
    )
    assert SlurmDialect().script(knows_threads) == "2x3 python -m job\n"


@needs_pysqa
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\n{% if cores %}", r"submission_template is not a valid Jinja template: line 2: Unexpected end"),
        ("{{ cores + job_name }}", r"submission_template cannot be rendered: unsupported operand"),
        ("{{ a.b.c }}", r"submission_template cannot be rendered: 'a' is undefined"),
    ],
)
def test_template_that_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlurmDialect().script(submission(submission_template=text))


def test_without_pysqa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysqa.base.core", None)
    # The default template needs nothing of it, and so no time for loading it.
    templates._variables.cache_clear()
    assert "--ntasks=2" in SlurmDialect().script(submission(cores=2))
    assert not SlurmDialect().unused(submission(cores=2))
    with pytest.raises(ImportError, match=r'pip install "executorlib\[cluster\]"'):
        SlurmDialect().script(submission(submission_template="{{ unique_to_this_test }}"))


@given(seconds=st.floats(0.001, 1e7))
@repeatable
def test_a_time_limit_leaves_a_minute(seconds: float) -> None:
    assert seconds + 60 <= 60 * minutes(seconds) < seconds + 120.001


# pysqa's configurations.


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    (tmp_path / "queue.yaml").write_text(
        "queue_type: SLURM\n"
        "queue_primary: small\n"
        "queues:\n"
        "  small: {cores_max: 4, cores_min: 2, run_time_max: 3600, memory_max: 2, script: small.sh}\n"
        "  large: {cores_max: 400, script: large.sh}\n"
    )
    (tmp_path / "small.sh").write_text(
        "#!/bin/bash\n#SBATCH --partition=small -n {{cores}}\n{%- if run_time_max %}\n"
        "#SBATCH -t {{ [1, run_time_max // 60]|max }}\n{%- endif %}\n"
        "{%- if memory_max %}\n#SBATCH --mem={{memory_max}}G\n{%- endif %}\n{{command}}\n"
    )
    (tmp_path / "large.sh").write_text("#!/bin/bash\n#SBATCH --partition=large --account={{account}}\n{{command}}\n")
    return tmp_path


@needs_pysqa
@pytest.mark.parametrize(
    ("key", "near"),
    [("thread_per_core", "threads_per_core"), ("walltim", "walltime"), ("quality", None)],
)
def test_keys_that_no_queue_of_a_configuration_has(configuration: Path, key: str, near: str | None) -> None:
    """A warning names keys of another queue or of pysqa later."""
    with (configuration / "large.sh").open("a") as script:
        script.write("# {{ walltime }}\n")
    templates = Templates(DEFAULT_TEMPLATE, str(configuration))
    known = {"walltime": 1, "account": "a", "qos": "q", "dependency_list": "none", "working_directory": "/"}
    resources = Resources().updated(known, "f", allow_template_keys=True)
    check_keys(resources, "call of f", templates)
    meant = f"; did you mean {near!r}" if near else ". No"
    with pytest.raises(ValueError, match=f"call of f: unknown key {key!r} in resource_dict{meant}"):
        check_keys(resources.updated({key: 1}, "f", allow_template_keys=True), "call of f", templates)


@needs_pysqa
def test_configuration(configuration: Path) -> None:
    queue = open_dialect(str(configuration))
    assert isinstance(queue, SlurmDialect)
    # Brought within the queue's limits, and its defaults filled in.
    small = "#!/bin/bash\n#SBATCH --partition=small -n 2\n#SBATCH -t 60\n"
    assert queue.script(submission()) == f"{small}python -m job\n"
    assert queue.script(submission(values={"memory_max": 9})) == f"{small}#SBATCH --mem=2G\npython -m job\n"
    assert "-t 3\n" in queue.script(submission(run_time_max=100.0))
    chosen = submission(values={"queue": "large", "account": "chem", "partition": "p"}, cores=40)
    assert queue.script(chosen) == "#!/bin/bash\n#SBATCH --partition=large --account=chem\npython -m job\n"
    assert queue.unused(chosen) == ["partition"]
    assert queue.script(submission(submission_template="own {{cores}}", cores=40)) == "own 40\n"
    for wrong, message in (
        (submission(cores=5), "needs 5 cores, but its queue has cores_max: 4"),
        (submission(values={"queue": "huge"}), "is 'huge', but .*queue.yaml has only small, large"),
    ):
        with pytest.raises(ValueError, match=message):
            queue.script(wrong)


@needs_pysqa
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("queues: [", "queue.yaml cannot be used"),
        ("queue_type: SLURM", "it needs the keys queue_type and queues"),
        ("queue_type: MOAB\nqueues: {}", "queues of type 'MOAB' cannot be used here, only SLURM, SGE, TORQUE, LSF"),
        ("queue_type: SLURM\nqueues: {a: {script: missing.sh}}", "missing.sh"),
        ("queue_type: SLURM\nqueues: {a: {script: queue.yaml}} # {% if %}", "Expected an expression"),
    ],
)
def test_configuration_that_is_wrong(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "queue.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_dialect(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


# Submission.


def test_submission_of_one_call_and_of_many() -> None:
    queue = SlurmDialect()
    both = ["--parsable", "--chdir=/home/me/project"]
    output = "/cache/.executorlib/b1/output"
    assert queue.submit_command(submission(), "/s") == [
        "sbatch", *both, f"--output={output}.0", f"--error={output}.0", "--open-mode=append", "/s",
    ]  # fmt: skip
    many = submission(7, directory="/100%/b", slurm_cmd_args=("--mail-type=END", "-w", "node1"))
    assert queue.submit_command(many, "/s") == [
        *("sbatch", "--mail-type=END", "-w", "node1", *both),
        *("--output=/100%%/b/output.%a", "--error=/100%%/b/output.%a", "--open-mode=append", "--array=0-6", "/s"),
    ]


@pytest.mark.parametrize(
    ("dependencies", "expected"),
    [
        ([Dependency("12")], "afterok:12"),
        ([Dependency("12", 0), Dependency("12", 3), Dependency("9"), Dependency("12", 0)], "afterok:12_0:12_3:9"),
        ([Dependency("12", corresponding=True)], "aftercorr:12"),
        ([Dependency("9", 1), Dependency("12", corresponding=True)], "aftercorr:12,afterok:9_1"),
    ],
    ids=str,
)
def test_dependencies(dependencies: list[Dependency], expected: str) -> None:
    command = SlurmDialect().submit_command(submission(2, dependencies=tuple(dependencies)), "/s")
    assert command[-3:] == [f"--dependency={expected}", "--kill-on-invalid-dep=yes", "/s"]


@pytest.mark.parametrize(
    "option",
    ["--array=0-3", "-a", "-a0-3", "--output=x", "-ox", "--error", "--wait", "-W", "--wrap=x", "--parsable", "-D/x"],
)
def test_options_that_users_may_not_set(option: str) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        SlurmDialect().submit_command(submission(slurm_cmd_args=(option,)), "/s")


@pytest.mark.parametrize("option", ["-dsingleton", "-d", "--dependency=singleton"])
def test_users_dependency_is_added_to_ours(option: str) -> None:
    assert option in SlurmDialect().submit_command(submission(slurm_cmd_args=(option,)), "/s")
    with pytest.raises(ValueError, match="leave it out"):
        SlurmDialect().submit_command(submission(slurm_cmd_args=(option,), dependencies=(Dependency("1"),)), "/s")


@pytest.mark.parametrize(
    "option", ["--account=a", "-A", "--wait-all-nodes=1", "--open", "--comment=-o", "--requeue", "-w"]
)
def test_options_that_users_may_set(option: str) -> None:
    assert option in SlurmDialect().submit_command(submission(slurm_cmd_args=(option,)), "/s")


@pytest.mark.parametrize(
    "output", ["123\n", "123;virtual\n", "Your project has 3 hours left\n123\n", "Submitted batch job 123\n"]
)
def test_job_id(output: str) -> None:
    assert SlurmDialect().parse_job_id(output) == "123"


def test_text_without_a_job_id() -> None:
    with pytest.raises(ValueError, match="'thanks, 5 hours' instead of a job id"):
        SlurmDialect().parse_job_id("thanks, 5 hours\n")


REFUSALS = [
    "sbatch: error: invalid partition specified: nope\n"
    "sbatch: error: Batch job submission failed: Invalid partition name specified",
    "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
    "sbatch: error: Memory specification can not be satisfied\n"
    "sbatch: error: Batch job submission failed: Requested node configuration is not available",
    "sbatch: error: Batch job submission failed: Invalid job array specification",
    "sbatch: error: Batch job submission failed: Invalid feature specification",
    "sbatch: error: Batch job submission failed: Requested reservation is invalid",
    "sbatch: error: Batch job submission failed: Invalid --nice value",
    "sbatch: error: Invalid generic resource (gres) specification",
    "sbatch: error: Invalid --time specification",
    "sbatch: error: Invalid directive found in batch script: b",
    "sbatch: error: Unable to open file job.sh",
    "sbatch: unrecognized option '--foo'\nTry \"sbatch --help\" for more information",
    "sbatch: error: Batch job submission failed: User's group not permitted to use this partition",
    "sbatch: error: AssocMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)",
]
OUTAGES = [
    "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "scancel: error: Kill job error on job id 20098: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
    "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    "sacct: error: Problem talking to the database: Connection refused",
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "slurm_load_jobs error: Zero Bytes were transmitted or received",
    "slurm_load_jobs error: Slurm backup controller in standby mode",
    "sbatch: error: If munged is up, restart with --num-threads=10\n"
    "sbatch: error: Munge encode failed: Failed to access socket\n"
    "sbatch: error: Batch job submission failed: Protocol authentication error",
]
# The messages of Slurm 22.05 if one more job would be too many, by each of the limits that sacctmgr sets.
FULL = {
    "QOSMaxSubmitJobPerUserLimit": Limit.OWN,
    "AssocMaxSubmitJobLimit": Limit.OWN,
    "AssocGrpSubmitJobsLimit": Limit.SHARED,
    "QOSGrpSubmitJobsLimit": Limit.SHARED,
    "MaxSubmitJobsPerAccount": Limit.SHARED,
}


@pytest.mark.parametrize("word", FULL)
def test_a_limit_to_the_number_of_jobs(word: str) -> None:
    violates = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or"
    text = f"sbatch: error: {word}\nsbatch: error: {violates} time limits)"
    assert SlurmDialect().limit_in(text) is FULL[word]
    assert not SlurmDialect().is_transient(text)


def test_refusals_that_are_no_limit_to_the_number_of_jobs() -> None:
    busy, *others = sorted([*REFUSALS, *OUTAGES], key=lambda text: "unable to accept" not in text)
    assert SlurmDialect().limit_in(busy) is Limit.SHARED  # of the controller
    assert {SlurmDialect().limit_in(text) for text in others} == {Limit.NONE}


@pytest.mark.parametrize(("texts", "transient"), [(REFUSALS, False), (OUTAGES, True)], ids=["refusals", "outages"])
def test_refusals_that_are_worth_a_retry(texts: list[str], transient: bool) -> None:
    assert [text for text in texts if SlurmDialect().is_transient(text) is not transient] == []


# Questions and answers.

SQUEUE = """\
20046|2|CANCELLED|0||DependencyNeverSatisfied|
20048|N/A|CANCELLED|0||JobHeldUser|
20045|3|COMPLETED|0|node1|None|
20108|N/A|COMPLETING|15|node1|None|
20045|1|FAILED|768|node1|NonZeroExitCode|
20045|2|FAILED|9|node1|JobLaunchFailure|
20106|N/A|NODE_FAIL|0|node3|NodeDown|
20104|N/A|OUT_OF_MEMORY|253|node1|OutOfMemory|
20110|N/A|TIMEOUT|0|node[1-2]|TimeLimit|
20001|8-10,12,20-24:2%5|PENDING|0||JobArrayTaskLimit|
20107|N/A|PENDING|0||BeginTime|
20090|N/A|PENDING|0||PartitionConfig|
20092|N/A|PENDING|0||PartitionTimeLimit|
20097|N/A|PENDING|0||Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions|
20001|0|RUNNING|0|node1|None|
"""
IDS = [line.partition("|")[0] for line in SQUEUE.splitlines()]


def test_status() -> None:
    states = SlurmDialect().parse_status("CLUSTER: virtual\n\n" + SQUEUE, IDS)
    waits = JobState(Phase.PENDING, "PENDING", "JobArrayTaskLimit")
    assert states == {
        ("20046", 2): JobState(Phase.ENDED, "CANCELLED", "DependencyNeverSatisfied", "0:0", cause=Cause.CANCELLED),
        ("20048", 0): JobState(Phase.ENDED, "CANCELLED", "", "0:0", cause=Cause.CANCELLED),
        ("20045", 3): JobState(Phase.ENDED, "COMPLETED", "", "0:0", "node1"),
        ("20108", 0): JobState(Phase.RUNNING, "COMPLETING", "", "", "node1"),
        ("20045", 1): JobState(Phase.ENDED, "FAILED", "NonZeroExitCode", "3:0", "node1"),
        ("20045", 2): JobState(Phase.ENDED, "FAILED", "JobLaunchFailure", "0:9", "node1"),
        ("20106", 0): JobState(Phase.ENDED, "NODE_FAIL", "NodeDown", "0:0", "node3", cause=Cause.NODE_FAILED),
        ("20104", 0): JobState(
            Phase.ENDED, "OUT_OF_MEMORY", "OutOfMemory", "0:125", "node1", cause=Cause.OUT_OF_MEMORY
        ),
        ("20110", 0): JobState(Phase.ENDED, "TIMEOUT", "TimeLimit", "0:0", "node[1-2]", cause=Cause.TIME_LIMIT),
        **{("20001", index): waits for index in (8, 9, 10, 12, 20, 22, 24)},
        ("20107", 0): JobState(Phase.PENDING, "PENDING", "BeginTime"),
        ("20090", 0): JobState(Phase.PENDING, "PENDING", "PartitionConfig", hopeless=True),
        ("20092", 0): JobState(Phase.PENDING, "PENDING", "PartitionTimeLimit", hopeless=True),
        ("20097", 0): JobState(
            Phase.PENDING,
            "PENDING",
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
        ),
        ("20001", 0): JobState(Phase.RUNNING, "RUNNING", "", "", "node1"),
    }
    assert SlurmDialect().parse_status("", IDS) == {}


def test_an_exit_code_that_is_made_up() -> None:
    """Slurm 24.11 reports 0:1, which would be SIGHUP, for a job whose node has failed. For others it is true."""
    lines = "1|N/A|NODE_FAIL|0:1|node2|NodeDown|\n2|N/A|FAILED|0:1|node2|NonZeroExitCode|\n"
    states = SlurmDialect().parse_status(lines, ["1", "2"])
    assert [states[job_id, 0].facts() for job_id in "12"] == [
        " (reason NodeDown, node node2)",
        " (reason NonZeroExitCode, exit code 0:1 by SIGHUP, node node2)",
    ]


def test_jobs_that_were_not_asked_for() -> None:
    """They may be arrays of millions of elements, so the answer only says that there are some."""
    printed = (
        "7|5|FAILED|256|node1|NonZeroExitCode|\n"
        "7|0-3999999|PENDING|0||Priority|\n"
        "7|4|COMPLETED|0|node1|None|\n"
        "8|1|RUNNING|0|node1|None|\n"
    )
    states = SlurmDialect().parse_status(printed, ["8"])
    assert states == {
        ("7", None): JobState(Phase.PENDING, "PENDING", "Priority"),
        ("8", 1): JobState(Phase.RUNNING, "RUNNING", node="node1"),
    }


@pytest.mark.parametrize("indices", ["0-4294967295", "4294967295", "0-99999999999999999999", "0-4000001", "0-9:0"])
def test_indices_that_no_cluster_gives(indices: str) -> None:
    """The answer is rejected before it could fill the memory."""
    with pytest.raises(ValueError, match="Slurm cannot have assigned"):
        SlurmDialect().parse_status(f"7|{indices}|PENDING|0||Priority|\n", ["7"])


@pytest.mark.parametrize(
    "line", ["20044|0-2,4-6,8-19,25-29,61...|PENDING|0||JobHeldUser|", "20044|0-2|PENDI", "slurm_load_jobs error"]
)
def test_status_that_is_incomplete(line: str) -> None:
    with pytest.raises(ValueError, match="incomplete"):
        SlurmDialect().parse_status(SQUEUE + line + "\n", ["20044"])


def test_the_status_query_does_not_grow() -> None:
    queue = SlurmDialect(user=1000)
    assert queue.status_command([]) == queue.status_command([str(number) for number in range(10_000)])
    assert "--user=1000" in queue.status_command([])


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [
        ("QOSMaxCpuPerJobLimit", True),
        ("QOSMaxMemoryPerJob", True),
        ("launch failed requeued held", True),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpCpuLimit", False),
        ("ReqNodeNotAvail, UnavailableNodes:node1", False),
        ("JobHeldUser", False),
        ("JobHeldAdmin", False),
        ("Priority", False),
    ],
)
def test_hopeless_reasons_to_wait(reason: str, hopeless: bool) -> None:
    assert SlurmDialect().parse_status(f"1|N/A|PENDING|0||{reason}|\n", ["1"])["1", 0].hopeless is hopeless


def test_jobs_that_are_held() -> None:
    """Whoever holds them may release them. The failure of a node is no reason to ask for something else."""
    lines = (
        "1|N/A|PENDING|0||JobHeldAdmin|\n2|N/A|PENDING|0||JobHeldUser|\n3|N/A|PENDING|0||launch failed requeued held|"
    )
    states = SlurmDialect().parse_status(lines, ["1", "2", "3"])
    assert [states[job_id, 0].held for job_id in "123"] == [True, False, False]
    assert states["3", 0].cause is Cause.NODE_FAILED


# An array, an srun step over its memory, a cancelled job, one whose node failed.
SACCT = [
    ("20045_1|FAILED|3:0|node1\n20045_1.batch|FAILED|3:0|node1\n",
     JobState(Phase.ENDED, "FAILED", "", "3:0", "node1")),
    ("20105|FAILED|1:0|node1\n20105.batch|FAILED|1:0|node1\n20105.0|OUT_OF_MEMORY|0:125|node1\n",
     JobState(Phase.ENDED, "OUT_OF_MEMORY", "", "0:125", "node1", cause=Cause.OUT_OF_MEMORY)),
    ("20108|CANCELLED by 0|0:0|node1\n20108.batch|CANCELLED|0:15|node1\n",
     JobState(Phase.ENDED, "CANCELLED", "by user 0", "0:0", "node1", cause=Cause.CANCELLED)),
    ("20046_2|CANCELLED|0:0|None assigned\n",
     JobState(Phase.ENDED, "CANCELLED", "", "0:0", cause=Cause.CANCELLED)),
    ("20106|NODE_FAIL|0:0|node3\n20106.batch|CANCELLED||node3\n",
     JobState(Phase.ENDED, "NODE_FAIL", "", "0:0", "node3", cause=Cause.NODE_FAILED)),
    ("20107|PENDING|0:0|None assigned\n", JobState(Phase.PENDING, "PENDING")),
    ("7|RUNNING|0:0|node1\n7.extern|RUNNING|0:0|node1\n", JobState(Phase.RUNNING, "RUNNING", "", "", "node1")),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("output", "expected"), SACCT, ids=str)
def test_detail_by_sacct(output: str, expected: JobState | None) -> None:
    assert SlurmDialect().parse_detail(output) == expected


SCONTROL = """\
JobId=20005 ArrayJobId=20001 ArrayTaskId=1 ArrayTaskThrottle=5 JobName=a JobState=RUNNING Reason=None
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=root QOS=normal
   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=3:0
   RunTime=00:00:00 TimeLimit=01:00:00 TimeMin=N/A
   Partition=main AllocNode:Sid=localhost:30188
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node1
   BatchHost=node1
   NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/home/user/a.sh 2
"""


def test_detail_by_scontrol() -> None:
    queue = SlurmDialect()
    assert queue.parse_detail(SCONTROL) == JobState(Phase.ENDED, "FAILED", "NonZeroExitCode", "3:0", "node1")
    other = SCONTROL.replace("=FAILED", "=COMPLETED").replace("ExitCode=3:0", "ExitCode=0:0")
    assert queue.parse_detail(SCONTROL + "\n" + other) == queue.parse_detail(SCONTROL)
    held = SCONTROL.replace(
        "JobState=FAILED Reason=NonZeroExitCode", "JobState=PENDING Reason=launch_failed_requeued_held"
    )
    held = held.replace("   NodeList=node1", "   NodeList=")
    waits = JobState(Phase.PENDING, "PENDING", "launch failed requeued held", hopeless=True, cause=Cause.NODE_FAILED)
    assert queue.parse_detail(held) == waits
    assert queue.parse_detail("Job 20043_3 not found\n") is None


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("slurmstepd: error: Job 7 exceeded memory limit (2048 > 1024), being killed", Cause.OUT_OF_MEMORY),
        # Since 26.05 nobody says who is speaking.
        (
            "[2026-11-28T23:31:08.503] error: Job 7 exceeded memory limit (2048 > 1024), being killed",
            Cause.OUT_OF_MEMORY,
        ),
        ("slurmstepd: error: *** JOB 7 ON node1 CANCELLED ***", Cause.NONE),
        ("error: it exceeded memory limit", Cause.NONE),
        ("", Cause.NONE),
    ],
)
def test_cause_in_the_output(output: str, cause: Cause) -> None:
    assert SlurmDialect().cause_in(f"a line\n{output}\n") is cause


def test_detail_is_asked_of_the_database_where_there_is_one() -> None:
    assert SlurmDialect(Settings(accounting=True)).detail_command("12", 3)[-1] == "--jobs=12_3"
    assert SlurmDialect(Settings(accounting=False)).detail_command("12", None) == ["scontrol", "show", "job", "12"]


def test_cancel() -> None:
    jobs = [("12", 3), ("9", None), ("12", 4), ("12", 7), ("10", 1), ("10", None)]
    assert SlurmDialect().cancel_command(jobs) == ["scancel", "--quiet", "12_[3-4,7]", "9", "10"]
    everything = SlurmDialect().cancel_command([("12", index) for index in range(10_000)])
    assert everything == ["scancel", "--quiet", "12_[0-9999]"]


@given(indices=st.sets(st.integers(0, 60), min_size=1))
@repeatable
def test_index_expressions(indices: set[int]) -> None:
    assert list(slurm._expand(slurm._ranges(indices))) == sorted(indices)


# Settings and surroundings.


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Configuration data as of 2026-11-22T15:56:23\nAccountingStorageType   = accounting_storage/slurmdbd\n"
         "MaxArraySize            = 1001\nMaxJobCount             = 10000\n", Settings(1001, True)),
        ("AccountingStorageType   = accounting_storage/none\nMaxArraySize = 10001\nMaxJobCount = 10000\n",
         Settings(5000, False)),
        ("AccountingStorageType   = (null)\nMaxArraySize            = 0\n", Settings(1, False)),
        ("ClusterName             = virtual\n", Settings(cluster="virtual")),
        ("", Settings(1001, False)),
    ],
    ids=str,
)  # fmt: skip
def test_settings(output: str, expected: Settings) -> None:
    assert parse_settings(output) == expected
    assert SlurmDialect(parse_settings(output)).array_limit == expected.array_limit


def test_environment_of_the_commands() -> None:
    kept = {"PATH": "/bin", "SLURM_CONF": "/c", "SLURM_CLUSTERS": "a", "SBATCH_ACCOUNT": "chem"}
    dropped = ("SLURM_MEM_PER_CPU", "SLURM_TRES_PER_TASK", "SQUEUE_FORMAT", "SACCT_FORMAT", "SBATCH_ARRAY_INX")
    assert command_environment({**kept, **dict.fromkeys(dropped, "1")}) == {**kept, "SLURM_BITSTR_LEN": "0"}


UNBOUND = "OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none"


@pytest.mark.parametrize(
    ("resources", "pmi_mode", "expected"),
    [
        ({}, "pmix", "x"),
        ({"cores": 4}, None, f"env {UNBOUND} mpiexec -n 4 x"),
        ({"cores": 4, "gpus_per_core": 2}, None,
         f"env -u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK SLURM_GPUS=8 {UNBOUND} mpiexec -n 4 x"),
        ({"cores": 4, "openmpi_oversubscribe": True}, None, f"env {UNBOUND} mpiexec -n 4 --oversubscribe x"),
        ({"cores": 4, "threads_per_core": 2}, "pmi2",
         "srun -n 4 --cpus-per-task=2 --mpi=pmi2 --kill-on-bad-exit=1 x"),
        ({"cores": 4, "openmpi_oversubscribe": True}, "pmix",
         "srun -n 4 --cpus-per-task=1 --mpi=pmix --kill-on-bad-exit=1 --overcommit x"),
    ],
    ids=str,
)  # fmt: skip
def test_ranks(resources: dict[str, Any], pmi_mode: str | None, expected: str) -> None:
    assert " ".join(rank_command(Resources(**resources), pmi_mode, ["x"])) == expected


# Other queues.

QSTAT = """<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
  <queue_info>{running}  </queue_info>
  <job_info>{waiting}  </job_info>
</job_info>
"""
QSTAT_JOB = (
    '<job_list state="x"><JB_job_number>{}</JB_job_number><JB_name>a</JB_name><JB_owner>me</JB_owner>'
    "<state>{}</state></job_list>"
)


def other_queue(folder: Path, kind: str) -> PysqaDialect:
    (folder / "queue.yaml").write_text(
        f"queue_type: {kind}\nqueue_primary: a\nqueues:\n  a: {{cores_max: 8, script: a.sh}}\n"
    )
    (folder / "a.sh").write_text("#!/bin/bash\n#$ -N {{job_name}} -wd {{working_directory}}\n{{command}}\n")
    queue = open_dialect(str(folder))
    assert isinstance(queue, PysqaDialect)
    return queue


@needs_pysqa
@pytest.mark.skipif(importlib.util.find_spec("defusedxml") is None, reason='needs pip install "pysqa[sge]"')
def test_grid_engine(tmp_path: Path) -> None:
    queue: Dialect = other_queue(tmp_path, "SGE")
    assert (queue.array_limit, queue.has_dependencies) == (1, False)
    assert queue.script(submission()) == "#!/bin/bash\n#$ -N relax -wd /home/me/project\npython -m job\n"
    assert queue.submit_command(submission(), "/s") == [
        *("qsub", "-terse", "-V", "-j", "y", "-o", "/cache/.executorlib/b1/output.0", "-wd", "/home/me/project", "/s")
    ]
    assert queue.parse_job_id("42\n") == "42"
    assert queue.cancel_command([("42", None), ("43", 0)]) == ["qdel", "42", "43"]
    assert queue.unused(submission(slurm_cmd_args=("-x",), values={"partition": "p"})) == [
        "partition",
        "slurm_cmd_args",
    ]
    for name, allowed in {"f.<locals>.<lambda>": "f._locals_._lambda_", "2nd": "_2nd"}.items():
        assert f"#$ -N {allowed} " in queue.script(replace(submission(), name=name))
    waiting = "".join(QSTAT_JOB.format(43 + i, word) for i, word in enumerate(["qw", "hqw", "hRqw", "Eqw", "Ehqw"]))
    states = queue.parse_status(QSTAT.format(running=QSTAT_JOB.format(42, "r"), waiting=waiting), [])
    assert {key[0]: (state.phase, state.hopeless) for key, state in states.items()} == {
        "42": (Phase.RUNNING, False),
        **dict.fromkeys(["43", "44", "45"], (Phase.PENDING, False)),
        **dict.fromkeys(["46", "47"], (Phase.PENDING, True)),
    }
    assert queue.parse_status(QSTAT.format(running="", waiting=""), []) == {}
    for wrong in ("", "error: commlib error: got select error (Connection refused)"):
        with pytest.raises(ValueError, match="instead of a list of jobs"):
            queue.parse_status(wrong, [])
    assert queue.is_transient("error: commlib error: got select error (Connection refused)")
    assert not queue.is_transient("Unable to run job: unknown queue")
    assert queue.parse_detail(
        "hostname     n1  \nfailed       100 : assumedly after job\nexit_status  137  (Killed)\n"
    ) == (JobState(Phase.ENDED, "failed", "assumedly after job", "137", "n1"))
    limit = queue.parse_detail("failed       37 : qmaster enforced h_rt, h_cpu, or h_vmem limit\nexit_status  137\n")
    assert limit is not None
    assert limit.cause is Cause.TIME_LIMIT
    assert queue.parse_detail("error: job id 42 not found\n") is None


@needs_pysqa
@pytest.mark.parametrize(
    ("kind", "options", "printed", "listing", "expected"),
    [
        ("TORQUE", ["qsub", "-V", "-j", "oe", "-o"], "42.server\n",
         "Job Id: 42.server\n Job_Name = a\n Job_Owner = me@h\n job_state = R\n queue = q\n"
         " Variable_List = PBS_O_WORKDIR=/x,PBS_O_HOST=h\n",
         Phase.RUNNING),
        ("LSF", ["bsub", "-o"], "Job <42> is submitted to queue <q>.\n",
         "JOBID USER STAT QUEUE FROM_HOST EXEC_HOST JOB_NAME SUBMIT_TIME\n42 me PEND q h - a Nov 22 15:00\n",
         Phase.PENDING),
    ],
    ids=["torque", "lsf"],
)  # fmt: skip
def test_torque_and_lsf(
    kind: str, options: list[str], printed: str, listing: str, expected: Phase, tmp_path: Path
) -> None:
    queue = other_queue(tmp_path, kind)
    assert queue.submit_command(submission(), "/s") == [*options, "/cache/.executorlib/b1/output.0", "/s"]
    assert queue.parse_job_id(printed) == "42"
    assert queue.parse_status(listing, [])["42", 0].phase is expected
    assert queue.detail_command("42", None) == []
    with pytest.raises(ValueError, match="instead of a job id"):
        queue.parse_job_id("thanks\n")
    with pytest.raises(ValueError, match="one by one"):
        queue.submit_command(submission(2), "/s")


TORQUE_JOB = (
    "Job Id: {}.server\n    Job_Name = a\n    Job_Owner = me@h\n    job_state = {}\n    queue = q\n{}"
    "    Variable_List = PBS_O_WORKDIR=/x,PBS_O_HOST=h\n\n"
)


@needs_pysqa
def test_completed_jobs_of_torque(tmp_path: Path) -> None:
    """They are listed for some minutes."""
    queue = other_queue(tmp_path, "TORQUE")
    ends = {"40": "0", "41": "83", "42": "271", "43": "-3"}
    listing = "".join(
        TORQUE_JOB.format(job, "C", f"    exec_host = node1/0+node1/1\n    exit_status = {code}\n")
        for job, code in ends.items()
    )
    states = queue.parse_status(listing + TORQUE_JOB.format("44", "Q", "") + TORQUE_JOB.format("45", "C", ""), [])
    ended = {job: states[job, 0] for job in [*ends, "45"]}
    assert {state.phase for state in ended.values()} == {Phase.ENDED}
    assert [state.exit_code for state in ended.values()] == ["0", "83", "0:15", "-3", ""]
    assert [state.node for state in ended.values()] == [*["node1"] * 4, ""]
    assert states["44", 0].phase is Phase.PENDING


@needs_pysqa
def test_without_a_template() -> None:
    with pytest.raises(ValueError, match=r"resource_dict\['submission_template'\]"):
        Templates(None).render(submission())
