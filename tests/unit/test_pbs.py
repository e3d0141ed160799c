"""The language of PBS Professional, against text in the formats that it documents.

None of this text comes from a real PBS. What its commands take is in the manual pages qsub(1B), qstat(1B), qselect(1B)
and qdel(1B), what jobs are like in pbs_job_attributes(7B). How `qstat -F json` writes, what it ends with, comments, the
exit codes and the words of refusals are in the source of OpenPBS 23: src/cmds/qstat.c, src/lib/Libjson,
src/lib/Liblog/pbs_messages.c, src/include/pbs_error.h and job.h. What is wrong with the JSON of version 19.1 is in its
issues 1255 and 2541.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib.jobs.command_system import open_dialect, open_templates
from executorlib.jobs.queue import Cause, Dependency, JobState, Limit, Phase, Submission
from executorlib.jobs.registry import DIALECTS, dialect_of
from executorlib.jobs.templates import check_keys
from executorlib.pbs import queue as pbs
from executorlib.pbs.queue import PbsDialect, Settings, parse_settings
from executorlib.resources import Resources
from executorlib.worker import protocol
from unit.properties import repeatable

needs_pysqa = pytest.mark.skipif(importlib.util.find_spec("pysqa") is None, reason="needs pysqa (pip install pysqa)")
needs_jinja = pytest.mark.skipif(importlib.util.find_spec("jinja2") is None, reason="needs jinja2 (pip install jinja2)")


def submission(count: int = 1, values: dict[str, Any] | None = None, **more: Any) -> Submission:
    fields = {key: more.pop(key) for key in ("name", "directory", "dependencies", "first") if key in more}
    defaults: dict[str, Any] = {"name": "relax", "directory": "/cache/.executorlib/b1"}
    return Submission(
        command="python run.py",
        count=count,
        resources=Resources(**more),
        template_values=values or {},
        cwd="/home/me/my project",
        **{**defaults, **fields},
    )


def directives(script: str) -> list[str]:
    return [line.removeprefix("#PBS ") for line in script.splitlines() if line.startswith("#PBS ")]


# The registry.


def test_each_language_is_found_by_the_type_of_its_queue() -> None:
    for queue_type in DIALECTS:
        dialect = dialect_of(queue_type)
        assert dialect.title
        assert isinstance(dialect.has_pmi_modes, bool)
        assert isinstance(dialect.command_environment({"A": "1"}), dict)


@pytest.mark.parametrize(
    ("queue_type", "loaded"), [("SLURM", "executorlib.slurm.queue"), ("PBS", "executorlib.pbs.queue")]
)
def test_one_language_does_not_load_another(queue_type: str, loaded: str) -> None:
    program = (
        "import sys; from executorlib.jobs.registry import dialect_of; dialect_of(sys.argv[1]); "
        "print([name for name in sys.modules if name in sys.argv[2:]])"
    )
    modules = sorted({text.partition(":")[0] for text in DIALECTS.values()})
    command = [sys.executable, "-c", program, queue_type, *modules]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([loaded])


# Scripts.


@needs_jinja
def test_default_script_needs_nothing_of_the_user() -> None:
    assert PbsDialect().script(submission()) == (
        "#!/bin/bash\n"
        "#PBS -N relax\n"
        "#PBS -l select=1:ncpus=1:mpiprocs=1:ompthreads=1\n"
        "#PBS -r n\n"
        "\n"
        "cd '/home/me/my project' && python run.py\n"
    )


@needs_jinja
@pytest.mark.parametrize(
    ("values", "resources", "expected"),
    [
        ({}, {"cores": 3, "threads_per_core": 2}, ["-l select=1:ncpus=6:mpiprocs=3:ompthreads=2"]),
        ({}, {"gpus_per_core": 2}, ["-l select=1:ncpus=1:mpiprocs=1:ompthreads=1:ngpus=2"]),
        ({"memory_max": 2}, {"cores": 2}, ["-l select=1:ncpus=2:mpiprocs=2:ompthreads=1:mem=2048mb"]),
        ({"memory_max": 0.3}, {}, ["-l select=1:ncpus=1:mpiprocs=1:ompthreads=1:mem=308mb"]),
        ({"memory_max": "800mb"}, {}, ["-l select=1:ncpus=1:mpiprocs=1:ompthreads=1:mem=800mb"]),
        ({}, {"cores": 4, "num_nodes": 2},
         ["-l select=2:ncpus=2:mpiprocs=2:ompthreads=1", "-l place=scatter"]),
        ({"memory_max": 1}, {"cores": 5, "num_nodes": 3, "gpus_per_core": 1},
         ["-l select=2:ncpus=2:mpiprocs=2:ompthreads=1:ngpus=2:mem=1024mb"
          "+1:ncpus=1:mpiprocs=1:ompthreads=1:ngpus=1:mem=1024mb", "-l place=scatter"]),
        ({}, {"exclusive": True}, ["-l place=pack:excl"]),
        ({}, {"exclusive": True, "num_nodes": 2, "cores": 2}, ["-l place=scatter:excl"]),
        ({}, {"priority": -7}, ["-p -7"]),
        ({}, {"priority": 5000}, ["-p 1023"]),
        ({}, {"run_time_max": 60.5}, ["-l walltime=180"]),
        ({"queue": "workq"}, {}, ["-q workq"]),
        ({"partition": "workq"}, {}, ["-q workq"]),
        ({"account": "chem", "project": "p1"}, {}, ["-A chem", "-P p1"]),
        ({"account": "chem\n#PBS -q other"}, {}, ["-A chem#PBS-qother"]),
        ({"job_name": "my job: α(1)"}, {}, ["-N my_job_1_"]),
    ],
    ids=str,
)  # fmt: skip
def test_each_need_becomes_a_directive(values: dict[str, Any], resources: dict[str, Any], expected: list[str]) -> None:
    script = PbsDialect().script(submission(values=values, **resources))
    assert set(expected) <= set(directives(script))
    assert PbsDialect().unused(submission(values=values, **resources)) == []


@needs_jinja
def test_names_that_pbs_takes() -> None:
    for name, taken in {"f.<locals>.<lambda>": "f._locals_._lambda_", "g and 3 more": "g_and_3_more", "λ": "_"}.items():
        assert f"-N {taken}" in directives(PbsDialect().script(submission(name=name)))
    assert f"-N {230 * 'f'}" in directives(PbsDialect().script(submission(name=300 * "f")))


@needs_jinja
def test_arrays_may_run_again() -> None:
    """PBS refuses arrays that may not."""
    assert "-r n" in directives(PbsDialect().script(submission()))
    assert "-r n" not in directives(PbsDialect().script(submission(2)))


@needs_jinja
def test_keys_without_effect() -> None:
    assert PbsDialect().unused(submission(values={"constraint": "fast"}, slurm_cmd_args=("-x",))) == [
        "constraint",
        "slurm_cmd_args",
    ]


@needs_pysqa
def test_configuration(tmp_path: Path) -> None:
    """A queue without a script in the configuration gets the default script."""
    (tmp_path / "queue.yaml").write_text(
        "queue_type: PBS\nqueue_primary: workq\nqueues:\n"
        "  workq: {cores_max: 4, run_time_max: 3600}\n"
        "  own: {cores_max: 4, script: own.sh}\n"
    )
    (tmp_path / "own.sh").write_text("#!/bin/sh\n#PBS -l walltime={{ run_time_max }}\n{{ command }} {{ colour }}\n")
    queue = open_dialect(str(tmp_path))
    assert isinstance(queue, PbsDialect)
    assert {"-q workq", "-l walltime=3600"} <= set(directives(queue.script(submission())))
    assert queue.unused(submission(values={"queue": "own"}, priority=1)) == ["priority"]
    assert queue.script(submission(values={"queue": "own", "colour": "red"}, run_time_max=1.0)) == (
        "#!/bin/sh\n#PBS -l walltime=120\ncd '/home/me/my project' && python run.py red\n"
    )
    assert queue.script(submission(submission_template="{{ command }} {{ cores }}", cores=9)).endswith("run.py 9\n")
    with pytest.raises(ValueError, match="needs 5 cores, but its queue has cores_max: 4"):
        queue.script(submission(cores=5))
    templates = open_templates(str(tmp_path))
    known = Resources().updated({"account": "a", "colour": "c"}, "f", allow_template_keys=True)
    check_keys(known, "f", templates)
    with pytest.raises(ValueError, match="unknown key 'qualty'"):
        check_keys(known.updated({"qualty": 1}, "f", allow_template_keys=True), "f", templates)


@needs_pysqa
def test_queue_without_a_script_where_there_is_no_default(tmp_path: Path) -> None:
    (tmp_path / "queue.yaml").write_text("queue_type: TORQUE\nqueue_primary: a\nqueues: {a: {cores_max: 4}}\n")
    with pytest.raises(ValueError, match="names no script"):
        open_dialect(str(tmp_path)).script(submission())


# Submission: qsub(1B).


def test_submission_of_one_call_and_of_many() -> None:
    queue = PbsDialect(environ={"PATH": "/bin", "LD_LIBRARY_PATH": "/opt/lib", "SECRET": "x"})
    common = ["qsub", "-j", "oe", "-k", "oed", "-o"]
    assert queue.submit_command(submission(), "/s") == [
        *common, "/cache/.executorlib/b1/output.0", "-v", "PATH,LD_LIBRARY_PATH", "/s",
    ]  # fmt: skip
    elements = [*common, "/cache/.executorlib/b1/output.^array_index^"]
    assert queue.submit_command(submission(7), "/s") == [*elements, "-v", "PATH,LD_LIBRARY_PATH", "-J", "0-6", "/s"]
    # qsub refuses to export what is not there.
    assert PbsDialect(environ={}).submit_command(submission(3, first=4), "/s") == [*elements, "-J", "4-6", "/s"]


def test_an_array_of_one_element() -> None:
    """It must be an array to keep the call's number, but PBS accepts no array from 5 to 5."""
    assert PbsDialect(environ={}).submit_command(submission(1, first=5), "/s")[-3:] == ["-J", "5-6:2", "/s"]


def test_dependencies() -> None:
    wanted = (Dependency("12"), Dependency("9[]"), Dependency("12"))
    assert PbsDialect().submit_command(submission(dependencies=wanted), "/s")[-3:] == [
        "-W",
        "depend=afterok:12:9[]",
        "/s",
    ]
    # A job whose input has just ended well would be refused.
    assert not PbsDialect(Settings(history=False)).has_dependencies
    assert PbsDialect(Settings(history=True)).has_dependencies
    assert not PbsDialect.waits_for_elements


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("1234.pbs01\n", "1234"),
        ("1234[].pbs01.site.org\n", "1234[]"),
        ("Your project has 3 hours left\n1234.pbs01\n", "1234"),
        ("1234\n", "1234"),
    ],
)
def test_job_id(output: str, expected: str) -> None:
    assert PbsDialect().parse_job_id(output) == expected


@pytest.mark.parametrize("output", ["", "qsub: thanks\n", "17 hours left\n"])
def test_text_without_a_job_id(output: str) -> None:
    with pytest.raises(ValueError, match=r"qsub printed .* instead of a job id"):
        PbsDialect().parse_job_id(output)


REFUSALS = [
    "qsub: Unknown queue",
    "qsub: Job violates queue and/or server resource limits",
    "qsub: Unknown resource: colour",
    'qsub: Resource invalid in "select" specification: gpus',
    "qsub: Queue is not enabled",
    "qsub: Unauthorized Request ",
    "qsub: illegally formed job name",
    "qsub: Invalid Job Dependency",
    "qsub: script file:: No such file or directory",
]
OUTAGES = [
    "qsub: cannot connect to server pbs01 (errno=15010)",
    "Connection refused\nqstat: cannot connect to server pbs01 (errno=111)",
    "qsub: No free connections",
    "qstat: End of File",
    "qsub: Resource temporarily unavailable",
    "pbs_iff: error returned: 15031\nqsub: Batch protocol error",
]


@pytest.mark.parametrize("said", REFUSALS)
def test_refusals(said: str) -> None:
    assert not PbsDialect().is_transient(said)
    assert PbsDialect().limit_in(said) is Limit.NONE


@pytest.mark.parametrize("said", OUTAGES)
def test_outages(said: str) -> None:
    assert PbsDialect().is_transient(said)
    assert PbsDialect().limit_in(said) is Limit.NONE


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("qsub: would exceed complex's per-user limit", Limit.OWN),
        ("qsub: would exceed queue workq's per-user limit of jobs in 'Q' state", Limit.OWN),
        ("qsub: Maximum number of jobs for user me already in complex", Limit.OWN),
        ("qsub: Array job exceeds server or queue size limit", Limit.OWN),
        ("qsub: Maximum number of jobs already in complex", Limit.SHARED),
        ("qsub: Maximum number of jobs for group chem already in queue workq", Limit.SHARED),
        ("qsub: would exceed queue workq's per-project limit", Limit.SHARED),
        ("qsub: would exceed limit on resource ncpus in complex", Limit.SHARED),
    ],
)
def test_limits_to_the_number_of_jobs(said: str, limit: Limit) -> None:
    assert PbsDialect().limit_in(said) is limit


# The variables of jobs: qsub(1B), Environment Variables.


def test_variables_of_jobs() -> None:
    assert PbsDialect.id_variables == ("PBS_ARRAY_ID", "PBS_JOBID")
    assert PbsDialect.element_variables == ("PBS_ARRAY_INDEX",)
    environ = {"HOME": "/h", "A": "1", "BASH_FUNC_module%%": "() {\n}"}
    dropped = ["PBS_JOBID", "PBS_ARRAY_INDEX", "PMI_RANK", "CUDA_VISIBLE_DEVICES", "TMPDIR", "NCPUS"]
    assert PbsDialect().handed_on({**environ, **dict.fromkeys(dropped, "0")}) == environ


@pytest.mark.parametrize(("queue_type", "element"), [("SLURM", 5), ("PBS", 3)])
def test_a_job_in_a_job_of_another_system(queue_type: str, element: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other system's variables for arrays do not count."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("PBS_ARRAY_INDEX", "3")
    names: Any = dialect_of(queue_type).element_variables
    assert protocol.element_number(names) == element
    assert protocol.element_number(()) == 0


@pytest.mark.parametrize(("numbered", "text"), [(False, ""), (True, "5"), (("PBS_ARRAY_INDEX",), "3"), ((), "0")])
def test_the_number_in_a_workers_name(numbered: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of older versions say only that there is a number, and mean Slurm's."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("PBS_ARRAY_INDEX", "3")
    assert protocol.element_text(numbered) == text


# Status: qstat(1B), pbs_job_attributes(7B).


def answer(jobs: dict[str, Any]) -> str:
    """As cJSON prints it: indented by tabs, and one before each value."""
    told = {"timestamp": 1764406012, "pbs_version": "23.06.06", "pbs_server": "pbs01", "Jobs": jobs}
    return json.dumps(told, indent="\t", separators=(",", ":\t")) + "\n"


def job(state: str, **more: Any) -> dict[str, Any]:
    return {
        "Job_Name": "relax",
        "Job_Owner": "me@login1",
        "job_state": state,
        "queue": "workq",
        "server": "pbs01",
        "Checkpoint": "u",
        "ctime": "Sat Nov 29 08:46:40 2026",
        "Hold_Types": "n",
        "Join_Path": "oe",
        "Keep_Files": "oed",
        "Output_Path": "login1:/cache/.executorlib/b1/output.0",
        "Rerunable": "False",
        "Resource_List": {
            "mem": "2gb", "ncpus": 1, "nodect": 1, "place": "pack", "select": "1:ncpus=1", "walltime": "00:02:00",
        },
        "Variable_List": {"PBS_O_HOME": "/home/me", "PBS_O_WORKDIR": "/home/me", "PATH": "/usr/bin:/bin"},
        "Submit_arguments": "-j oe -k oed -o /cache/.executorlib/b1/output.0 /cache/.executorlib/b1/job.sh",
        **more,
    }  # fmt: skip


STARTED = "Job run at Sat Nov 29 at 08:46 on (node1:ncpus=1:mem=2097152kb)"
RAN = {"exec_host": "node1/0", "exec_vnode": "(node1:ncpus=1:mem=2097152kb)", "run_count": 1}


def ended(code: int | None, substate: int, comment: str = "", **used: Any) -> dict[str, Any]:
    usage = {"cpupercent": 0, "cput": "00:00:00", "mem": "9692kb", "ncpus": 1, "vmem": "9692kb", "walltime": "00:00:10"}
    told = {**RAN, "substate": substate, "resources_used": {**usage, **used}, "comment": f"{STARTED}{comment}"}
    return job("F", **told, **({} if code is None else {"Exit_status": code}))


STATES = [
    (job("Q", substate=10, comment="Not Running: Insufficient amount of resource: ncpus"),
     JobState(Phase.PENDING, "queued", "Not Running: Insufficient amount of resource: ncpus")),
    (job("Q", substate=10, comment="Can Never Run: Insufficient amount of resource: ncpus (R: 99 A: 8 T: 8)"),
     JobState(Phase.PENDING, "queued", "Can Never Run: Insufficient amount of resource: ncpus (R: 99 A: 8 T: 8)",
              hopeless=True)),
    (job("H", substate=20, Hold_Types="s", run_count=21, comment="job held, too many failed attempts to run"),
     JobState(Phase.PENDING, "held", "job held, too many failed attempts to run", hopeless=True,
              cause=Cause.NODE_FAILED)),
    (job("H", substate=20, Hold_Types="u", comment="Job held by me on Sat Nov 29 08:46:41 2026"),
     JobState(Phase.PENDING, "held", "Job held by me on Sat Nov 29 08:46:41 2026")),
    (job("H", substate=20, Hold_Types="uo", comment="Job held by root on Sat Nov 29 08:46:41 2026"),
     JobState(Phase.PENDING, "held", "Job held by root on Sat Nov 29 08:46:41 2026", held=True)),
    (job("H", substate=22, Hold_Types="s", depend="afterok:7.pbs01@pbs01"), JobState(Phase.PENDING, "held")),
    (job("W", substate=30), JobState(Phase.PENDING, "waiting for its time")),
    (job("T", substate=0), JobState(Phase.PENDING, "in transit")),
    (job("R", substate=42, **RAN, comment=STARTED), JobState(Phase.RUNNING, "running", node="node1")),
    (job("R", substate=42, exec_host="node1/0*2+node2/0*2+node1/1"),
     JobState(Phase.RUNNING, "running", node="node1,node2")),
    (job("E", substate=51, **RAN), JobState(Phase.RUNNING, "exiting", node="node1")),
    (job("S", substate=45, **RAN), JobState(Phase.RUNNING, "suspended", node="node1")),
    (job("U", substate=42, **RAN), JobState(Phase.RUNNING, "suspended by its workstation's user", node="node1")),
    (job("M", substate=94), JobState(Phase.RUNNING, "moved")),
    (job("?"), JobState(Phase.RUNNING, "?")),
    (ended(0, 92, " and finished"), JobState(Phase.ENDED, "finished", "", "0", "node1")),
    (ended(83, 93, " and failed"), JobState(Phase.ENDED, "failed", "", "83", "node1")),
    (ended(137, 93, " and failed"), JobState(Phase.ENDED, "failed", "", "137", "node1")),
    (ended(265, 93, " and failed"), JobState(Phase.ENDED, "failed", "", "0:9", "node1")),
    (ended(265, 93, " and failed", mem="2097152kb"),
     JobState(Phase.ENDED, "failed", "", "0:9", "node1", cause=Cause.OUT_OF_MEMORY)),
    (ended(271, 93, " and failed", walltime="00:02:03"),
     JobState(Phase.ENDED, "failed", "", "0:15", "node1", cause=Cause.TIME_LIMIT)),
    (ended(-29, 93, " and exceeded resource walltime"),
     JobState(Phase.ENDED, "failed", "it exceeded walltime (-29)", "", "node1", cause=Cause.TIME_LIMIT)),
    (ended(-27, 93, " and exceeded resource mem"),
     JobState(Phase.ENDED, "failed", "it exceeded mem (-27)", "", "node1", cause=Cause.OUT_OF_MEMORY)),
    (ended(-4, 93, " and failed"),
     JobState(Phase.ENDED, "failed", "its node's daemon was restarted (-4)", "", "node1", cause=Cause.NODE_FAILED)),
    (ended(-1, 93, " and failed"), JobState(Phase.ENDED, "failed", "it could not be started (-1)", "", "node1")),
    (ended(271, 91, " and terminated by me@login1"),
     JobState(Phase.ENDED, "terminated", "", "0:15", "node1", cause=Cause.CANCELLED)),
    (job("F", substate=91, comment="Not Running: Not enough free nodes available and terminated by me@login1"),
     JobState(Phase.ENDED, "terminated", "Not Running: Not enough free nodes available and terminated by me@login1",
              cause=Cause.CANCELLED)),
    (job("F", substate=93, comment="Job deleted as result of dependency on job 7.pbs01"),
     JobState(Phase.ENDED, "terminated", "Job deleted as result of dependency on job 7.pbs01", cause=Cause.CANCELLED)),
    (job("X"), JobState(Phase.ENDED, "finished")),
    (ended(0, 91, " and terminated"), JobState(Phase.ENDED, "finished", "", "0", "node1")),
]  # fmt: skip


@pytest.mark.parametrize(("told", "expected"), STATES, ids=str)
def test_states(told: dict[str, Any], expected: JobState) -> None:
    printed = answer({"1234.pbs01": told})
    queue = PbsDialect(Settings(history=True))
    assert queue.parse_status(printed, ["1234"]) == {("1234", 0): expected}
    assert queue.parse_detail(printed) == expected


def test_facts_about_a_killed_job() -> None:
    state = PbsDialect().parse_detail(answer({"1234.pbs01": ended(265, 93)}))
    assert state is not None
    assert state.facts() == " (exit code 0:9 by SIGKILL, node node1)"
    assert (state.code, state.died_of) == (0, 9)


def test_states_of_an_array() -> None:
    """The array's state counts for elements that are not listed, such as waiting ones in older versions."""
    printed = answer(
        {
            "1234[].pbs01": job("B", array="True", array_state_count="Queued:2 Running:1 Exiting:0 Expired:1 "),
            "1234[0].pbs01": {**ended(83, 93), "job_state": "X"},
            "1234[1].pbs01": job("R", substate=42, **RAN),
            "77.pbs01": job("Q"),
            "R12.pbs01": job("Q"),
        }
    )
    states = PbsDialect().parse_status(printed, ["1234[]", "77"])
    assert {key: (state.phase, state.exit_code) for key, state in states.items()} == {
        ("1234[]", None): (Phase.RUNNING, ""),
        ("1234[]", 0): (Phase.ENDED, "83"),
        ("1234[]", 1): (Phase.RUNNING, ""),
        ("77", 0): (Phase.PENDING, ""),
    }


def test_questions() -> None:
    remembers, forgets = PbsDialect(Settings(history=True)), PbsDialect(Settings(history=False))
    assert remembers.status_command(["7", "12[]"]) == ["qstat", "-x", "-f", "-F", "json", "-t", "7", "12[]"]
    assert forgets.status_command(["7"]) == ["qstat", "-f", "-F", "json", "-t", "7"]
    assert remembers.detail_command("12[]", 3) == ["qstat", "-x", "-f", "-F", "json", "12[3]"]
    assert remembers.detail_command("7", None) == ["qstat", "-x", "-f", "-F", "json", "7"]
    assert forgets.detail_command("7", None) == []


def test_unknown_jobs() -> None:
    """`qstat` lists all others, and exits with the last eight bits of PBSE_UNKJOBID or PBSE_HISTJOBID."""
    assert PbsDialect().parse_status(answer({}), ["7"]) == {}
    assert PbsDialect().parse_detail(answer({})) is None
    assert {153, 35} <= PbsDialect.codes_of_the_gone
    assert not PbsDialect.codes_of_the_gone & {0, 1, 2}


def test_query_for_any_jobs() -> None:
    queue = PbsDialect()
    assert queue.status_command([])[:2] == ["qselect", "-u"]
    states = queue.parse_status("1234.pbs01\n1240[].pbs01\n", [])
    assert {key: state.phase for key, state in states.items()} == {
        ("1234", None): Phase.PENDING,
        ("1240[]", None): Phase.PENDING,
    }
    assert queue.parse_status("", []) == {}


@pytest.mark.parametrize(
    "printed", ["", "Job id  Name\n", answer({"7.pbs01": job("R")})[:-30], "qstat: cannot connect to server pbs01"]
)
def test_answer_that_is_incomplete(printed: str) -> None:
    with pytest.raises(ValueError, match="instead of a list of jobs"):
        PbsDialect().parse_status(printed, ["7"])


# As version 19.1 writes it: numbers that are none, and text that is not escaped.
INVALID = """\
{
    "timestamp":1764406012,
    "pbs_version":"19.1.1",
    "pbs_server":"pbs01",
    "Jobs":{
        "1234[1].pbs01":{
            "Job_Name":"say "hello"",
            "job_state":"F",
            "exec_host":"node1/0",
            "comment":"Job run at Sat Nov 29 \\(a note: "node1"\\) and failed",
            "Resource_List":{
                "mem":"2gb",
                "walltime":"00:02:00"
            },
            "Variable_List":{
                "job_state":"R",
                "VERSION":005,
                "BASH_FUNC_module()":"() {  eval `/usr/bin/modulecmd bash $*`
}",
                "QUOTED":"\\'a\\, b\\'"
            },
            "resources_used":{
                "mem":"2097152kb",
                "walltime":"00:00:10"
            },
            "Exit_status":265,
            "substate":93
        },
        "1235.pbs01":{
            "job_state":"Q",
            "comment":"Not Running: "
        }
    }
}
"""


def test_answer_that_is_not_valid_json() -> None:
    with pytest.raises(ValueError, match="delimiter"):
        json.loads(INVALID, strict=False)
    assert PbsDialect().parse_status(INVALID, ["1234[]", "1235"]) == {
        ("1234[]", 1): JobState(Phase.ENDED, "failed", "", "0:9", "node1", cause=Cause.OUT_OF_MEMORY),
        ("1235", 0): JobState(Phase.PENDING, "queued", "Not Running:"),
    }


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
variables = st.dictionaries(st.from_regex("[A-Za-z_]{1,8}", fullmatch=True), texts, max_size=4)


@given(
    known=st.lists(st.tuples(st.sampled_from("QRF"), texts, variables), max_size=4),
    indent=st.sampled_from(["\t", "    "]),
)
@repeatable
def test_both_ways_to_read_an_answer_agree(known: list[tuple[str, str, dict[str, str]]], indent: str) -> None:
    """Nothing that users put into variables and names is mistaken for PBS's own output."""
    jobs = {
        f"{number}.pbs01": {
            "Job_Name": name, "job_state": state, "Variable_List": theirs or {"A": "1"}, "Exit_status": number,
        }
        for number, (state, name, theirs) in enumerate(known)
    }  # fmt: skip
    printed = json.dumps({"Jobs": jobs}, indent=indent, ensure_ascii=False)
    scanned = {name: pbs._state(found) for name, found in pbs._scanned(printed).items()}
    assert scanned == {name: pbs._state(found) for name, found in jobs.items()}


# PBS writes this into a job's output, in the MoM's words.
@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("=>> PBS: job killed: walltime 127 exceeded limit 120\n", Cause.TIME_LIMIT),
        ("=>> PBS: job killed: mem 2109440kb exceeded limit 2097152kb\n", Cause.OUT_OF_MEMORY),
        ("=>> PBS: job killed: vmem 2109440kb exceeded limit 2097152kb\n", Cause.OUT_OF_MEMORY),
        ("=>> PBS: job killed: cput 240 exceeded limit 120\n", Cause.NONE),
        ("Cgroup mem limit exceeded: oom-kill: process 4711\n", Cause.OUT_OF_MEMORY),
        ("Killed\n", Cause.NONE),
        ("", Cause.NONE),
    ],
)
def test_cause_in_the_output(output: str, cause: Cause) -> None:
    assert PbsDialect().cause_in(f"a line\n{output}") is cause


# qdel(1B): jobs, arrays, elements, and ranges of these.


def test_cancel() -> None:
    jobs = [("12[]", 3), ("9", None), ("12[]", 4), ("12[]", 7), ("10[]", 1), ("10[]", None)]
    assert PbsDialect().cancel_command(jobs) == ["qdel", "9", "10[]", "12[3-4]", "12[7]"]
    assert PbsDialect().cancel_command([("12[]", index) for index in range(1000)]) == ["qdel", "12[0-999]"]


@given(indices=st.sets(st.integers(0, 60), min_size=1))
@repeatable
def test_ranges(indices: set[int]) -> None:
    ranges = [run.partition("-") for run in pbs._runs(indices)]
    spread = [list(range(int(first), int(last or first) + 1)) for first, _, last in ranges]
    assert [index for each in spread for index in each] == sorted(indices)


# qstat -B -f -F json: pbs_server_attributes(7B).


SERVER = {
    "timestamp": 1764406012,
    "pbs_version": "23.06.06",
    "pbs_server": "pbs01",
    "Server": {
        "pbs01": {
            "server_state": "Active",
            "server_host": "pbs01.site.org",
            "scheduling": "True",
            "total_jobs": 12,
            "state_count": "Transit:0 Queued:3 Held:0 Waiting:0 Running:9 Exiting:0 Begun:0 ",
            "default_queue": "workq",
            "max_array_size": 10000,
            "job_history_enable": "True",
            "job_history_duration": "336:00:00",
            "pbs_version": "23.06.06",
        }
    },
}


def told_of_server(**changes: Any) -> str:
    about = {key: value for key, value in {**SERVER["Server"]["pbs01"], **changes}.items() if value is not None}  # type: ignore[index]
    return json.dumps({**SERVER, "Server": {"pbs01": about}}, indent="\t", separators=(",", ":\t"))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (told_of_server(), Settings(1000, True, "pbs01")),
        (told_of_server(max_array_size=50, job_history_enable=None), Settings(50, False, "pbs01")),
        (told_of_server(max_array_size=None, job_history_enable=True), Settings(1000, True, "pbs01")),
        (told_of_server(max_array_size=0, job_history_enable="False"), Settings(1, False, "pbs01")),
        ("qstat: cannot connect to server pbs01 (errno=15010)", Settings()),
        ("", Settings()),
        ('{"pbs_server": "a", "Server": {}}', Settings()),
    ],
    ids=str,
)
def test_settings(output: str, expected: Settings) -> None:
    assert parse_settings(output) == expected
    assert PbsDialect(parse_settings(output)).array_limit == expected.array_limit


def test_a_number_means_nothing_on_another_server() -> None:
    assert PbsDialect(parse_settings(told_of_server())).name == "PBS Professional server pbs01"
    assert PbsDialect().name == "PBS Professional"


def test_ranks() -> None:
    unbound = ["OMPI_MCA_hwloc_base_binding_policy=none", "PRTE_MCA_hwloc_default_binding_policy=none"]
    assert PbsDialect.rank_command(Resources(), None, ["x"]) == ["x"]
    assert PbsDialect.rank_command(Resources(cores=4, gpus_per_core=1), None, ["x"], "/opt/mpiexec") == [
        *("env", *unbound, "/opt/mpiexec", "-n", "4", "x")
    ]


@pytest.mark.parametrize(("folder", "problem"), [("/scratch/a b", False), ("/scratch/a:b", True)])
def test_folders_for_output(folder: str, problem: bool) -> None:
    assert bool(PbsDialect.problem_with(folder)) is problem
