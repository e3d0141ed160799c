"""Requests to Flux, and the meaning of its answers, which a real Flux 0.88 gave."""

from __future__ import annotations

import ast
import base64
import json
from typing import Any

import pytest

from executorlib.flux.jobspec import (
    JobLog,
    blobs_of,
    errors_in,
    job_name,
    job_number,
    jobspec,
    nodes_of,
    run_command,
    untold_environment,
    urgency,
)
from executorlib.flux.policy import Policy
from executorlib.jobs.queue import Cause, Phase
from executorlib.launchers.boot import boot_command
from executorlib.resources import Resources


def spec(resources: Resources, environ: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    options = {"policy": Policy({}), **options}
    return jobspec(resources, ["python", "run.py"], environ or {}, name="add", cwd="/home/me", **options)


def system(found: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = found["attributes"]["system"]
    return value


CORE = {"type": "core", "count": 1}


def slot(count: int, *each: dict[str, Any]) -> dict[str, Any]:
    return {"type": "slot", "count": count, "label": "task", "with": list(each)}


@pytest.mark.parametrize(
    ("resources", "requested", "count"),
    [
        (Resources(), slot(1, CORE), {"per_slot": 1}),
        (Resources(cores=3), slot(3, CORE), {"per_slot": 1}),
        (
            Resources(cores=2, threads_per_core=4, gpus_per_core=1),
            slot(2, {"type": "core", "count": 4}, {"type": "gpu", "count": 1}),
            {"per_slot": 1},
        ),
        (
            Resources(cores=4, num_nodes=2),
            {"type": "node", "count": 2, "with": [slot(2, CORE)]},
            {"per_slot": 1},
        ),
        # Three ranks on two nodes: a slot is left over.
        (
            Resources(cores=3, num_nodes=2, exclusive=True),
            {"type": "node", "count": 2, "with": [slot(2, CORE)], "exclusive": True},
            {"total": 3},
        ),
        (
            Resources(exclusive=True),
            {"type": "node", "count": 1, "with": [slot(1, CORE)], "exclusive": True},
            {"per_slot": 1},
        ),
    ],
)
def test_requested_resources(resources: Resources, requested: dict[str, Any], count: dict[str, int]) -> None:
    found = spec(resources)
    assert found["version"] == 1
    assert found["resources"] == [requested]
    assert found["tasks"] == [{"command": ["python", "run.py"], "slot": "task", "count": count}]


def test_the_rest_of_a_jobspec() -> None:
    further = (("account", "physics"), ("job_name", "mine"), ("memory_max", 4), ("queue", "debug"))
    resources = Resources(threads_per_core=2, run_time_max=60.0, template_keys=further)
    found = system(
        spec(resources, {"HOME": "/home/me", "PMI_RANK": "3", "SLURM_ARRAY_TASK_ID": "7"}, dependencies=[10099884032])
    )
    assert found["job"] == {"name": "mine"}
    assert (found["queue"], found["bank"], "memory_max" in found) == ("debug", "physics", False)
    assert found["cwd"] == "/home/me"
    # Time to start beside the call's own.
    assert 60 < found["duration"] <= 120
    assert found["dependencies"] == [{"scheme": "afterok", "value": "fGPVYeb"}]
    assert found["environment"].pop("OMP_NUM_THREADS") == "2"
    # Jobs must not inherit the MPI world or the place in an array of the process that started the executor.
    assert {"PMI_RANK", "SLURM_ARRAY_TASK_ID"}.isdisjoint(found["environment"])
    assert found["environment"]["HOME"] == "/home/me"


def test_without_limits_and_names() -> None:
    found = system(spec(Resources()))
    assert (found["duration"], found["job"], found["shell"]) == (0.0, {"name": "add"}, {"options": {}})
    assert {"dependencies", "queue", "bank"}.isdisjoint(found)


def test_shell_options() -> None:
    def options(resources: Resources, **more: Any) -> Any:
        return system(spec(resources, **more))["shell"]["options"]

    ranks = {"cpu-affinity": "per-task", "exit-on-error": 1, "exit-timeout": 10.0}
    assert options(Resources(cores=2)) == ranks
    assert options(Resources(cores=2, gpus_per_core=1), pmi_mode="pmix") == {
        **ranks,
        "gpu-affinity": "per-task",
        "pmi": "pmix",
    }
    assert options(Resources(), output="/out", errors="/err") == {
        "output": {
            "mode": "append",
            "stdout": {"type": "file", "path": "/out"},
            "stderr": {"type": "file", "path": "/err"},
        }
    }


def test_an_instance_of_its_own() -> None:
    found = spec(Resources(cores=2), nested=True, pmi_mode="pmix")
    assert found["tasks"][0]["command"] == ["flux", "broker", "python", "run.py"]
    options = system(found)["shell"]["options"]
    assert options["per-resource"] == {"type": "node"}
    assert "pmi" not in options  # the brokers'; ranks have it from the command that starts them
    resources = Resources(cores=4, threads_per_core=2, gpus_per_core=1, num_nodes=2)
    command = run_command(resources, "pmix", ["python"])
    assert command == ["flux", "run", "-n4", "-c2", "-g1", "-N2", "-o", "pmi=pmix", "python"]


@pytest.mark.parametrize(
    ("priority", "owner", "expected"), [(0, True, 16), (3, True, 19), (99, True, 31), (-99, True, 1), (3, False, 16)]
)
def test_urgency(priority: int, owner: bool, expected: int) -> None:
    assert urgency(priority, owner) == expected


@pytest.mark.parametrize(("number", "name"), [(10099884032, "fGPVYeb"), (7381975040, "fCFKYzj"), (0, "f1")])
def test_job_ids(number: int, name: str) -> None:
    assert job_name(number) == name
    assert {job_number(name), job_number("ƒ" + name[1:]), job_number(str(number))} == {number}


def test_text_without_a_job_id() -> None:
    with pytest.raises(ValueError, match="substring"):
        job_number("f0l")  # letters that look like others are not used


def test_nodes() -> None:
    found = nodes_of(
        {
            "version": 1,
            "execution": {
                "R_lite": [
                    {"rank": "0-1,3", "children": {"core": "0-3", "gpu": "0-1"}},
                    {"rank": "2", "children": {"core": "0,2"}},
                ],
                "nodelist": ["node[0-2]", "fat7"],
            },
        }
    )
    assert [tuple(each[:3]) for each in found] == [
        ("node0", 4, ("0", "1")),
        ("node1", 4, ("0", "1")),
        ("node2", 2, ()),
        ("fat7", 4, ("0", "1")),
    ]


def log(*events: tuple[str, dict[str, Any]]) -> JobLog:
    made = JobLog()
    for name, context in events:
        made.add(name, context)
    return made


SUBMIT = ("submit", {"userid": 0, "urgency": 16, "flags": 0, "version": 1})
ALLOC = ("alloc", {"annotations": {"sched": {"resource_summary": "rank1/core0"}}})
START = ("start", {})
ENDING = (("release", {"ranks": "all", "final": True}), ("free", {}), ("clean", {}))


def raised(kind: str, note: str, severity: int = 0) -> tuple[str, dict[str, Any]]:
    return ("exception", {"type": kind, "severity": severity, "note": note, "userid": 0})


def test_a_job_that_waits_and_runs() -> None:
    assert log(SUBMIT, ("depend", {}), ("priority", {"priority": 16})).state.phase is Phase.PENDING
    running = log(SUBMIT, ALLOC, START)
    assert (running.state.phase, running.state.node, running.started) == (Phase.RUNNING, "rank1/core0", True)


@pytest.mark.parametrize(
    ("events", "word", "exit_code", "cause"),
    [
        ([ALLOC, START, ("finish", {"status": 0})], "COMPLETED", "0:0", Cause.NONE),
        ([ALLOC, START, ("finish", {"status": 768})], "FAILED", "3:0", Cause.NONE),
        # Flux's shell tells of a signal by the exit code.
        ([ALLOC, START, ("finish", {"status": 35072})], "FAILED", "0:9", Cause.NONE),
        ([ALLOC, START, ("finish", {"status": 9})], "FAILED", "0:9", Cause.NONE),
        (
            [ALLOC, START, raised("cancel", ""), ("finish", {"status": 36608})],
            "CANCELED",
            "0:15",
            Cause.CANCELLED,
        ),
        ([raised("cancel", "")], "CANCELED", "", Cause.CANCELLED),
        (
            [ALLOC, START, raised("timeout", "resource allocation expired"), ("finish", {"status": 36352})],
            "TIMEOUT",
            "0:14",
            Cause.TIME_LIMIT,
        ),
        ([raised("dependency", "dependency/afterok: antecedent failed")], "FAILED", "", Cause.NONE),
        ([raised("alloc", "alloc denied due to type=unsatisfiable")], "FAILED", "", Cause.NONE),
        (
            [
                ALLOC,
                START,
                raised("exec", "lost contact with job shell on broker node2 (rank 2)"),
                ("finish", {"status": 35072}),
            ],
            "FAILED",
            "0:9",
            Cause.NODE_FAILED,
        ),
    ],
)
def test_how_a_job_ended(events: list[Any], word: str, exit_code: str, cause: Cause) -> None:
    state = log(SUBMIT, *events, *ENDING).state
    assert (state.phase, state.state, state.exit_code, state.cause) == (Phase.ENDED, word, exit_code, cause)


def test_exceptions_that_end_nothing() -> None:
    state = log(SUBMIT, ALLOC, START, raised("mine", "only a word", severity=3), ("finish", {"status": 0})).state
    assert (state.state, state.reason) == ("COMPLETED", "")


def test_reason_of_a_failed_start() -> None:
    note = "task 0 (host vm): start failed: /nonexistent: No such file or directory"
    state = log(SUBMIT, ALLOC, START, raised("exec", note), ("finish", {"status": 32512})).state
    assert (state.reason, state.exit_code) == (f"exec: {note}", "127:0")


def line(stream: str, **context: Any) -> bytes:
    return json.dumps(
        {"timestamp": 1.5, "name": "data", "context": {"stream": stream, "rank": "0", **context}}
    ).encode()


def test_last_words() -> None:
    encoded = base64.b64encode(b"\xff\x00").decode()
    log = b"\n".join(
        [
            json.dumps({"timestamp": 1.0, "name": "header", "context": {"version": 1}}).encode(),
            line("stderr", data="a warning\n"),
            line("stdout", data='"stderr" is what this line is about\n'),
            line("stderr", data=encoded, encoding="base64"),
            line("stdout", data="x" * 10_000),
            line("stderr", eof=True),
            b"",
        ]
    )
    assert errors_in(log, 4096) == b"a warning\n\xff\x00"
    assert errors_in(log, 4) == b"g\n\xff\x00"
    assert errors_in(b'{"name":"data","context":{"stream":"stderr"', 9) == b""  # cut off
    assert errors_in(b"", 9) == b""


def test_place_of_a_value() -> None:
    encoded = base64.b64encode(b"small").decode()
    assert blobs_of({"ver": 1, "type": "val", "data": encoded}) == (b"small", [])
    assert blobs_of({"ver": 1, "type": "valref", "data": ["sha1-00ff", "sha1-10"]}) == (b"", [b"\x00\xff", b"\x10"])


# -- what an instance demands of jobs -----------------------------------------------------------------------------

QUEUES = {
    "policy": {"limits": {"duration": "2h"}},
    "queues": {
        "debug": {"policy": {"limits": {"duration": "1.5m"}}},
        "part": {"parent": "debug"},
        "long": {"policy": {"limits": {"duration": "0"}}},
        "usual": {"policy": {"jobspec": {"defaults": {"system": {"duration": "1h"}}}}},
    },
}


def in_queue(name: str, run_time_max: float | None = None) -> Resources:
    return Resources(run_time_max=run_time_max, template_keys=(("queue", name),))


@pytest.mark.parametrize(
    ("resources", "duration"),
    [
        (in_queue("debug"), 90.0),
        (in_queue("debug", 10.0), 40.0),
        (in_queue("debug", 80.0), 90.0),  # what the limit leaves of the time to start and end
        (in_queue("part"), 90.0),
        (in_queue("long"), 0.0),
        (in_queue("long", 1e6), 1e6 + 30),
        (in_queue("usual"), 0.0),  # Flux has a default for it
    ],
)
def test_durations_within_limits(resources: Resources, duration: float) -> None:
    policy = Policy(QUEUES)
    assert policy.problem(resources) == ""
    assert system(spec(resources, policy=policy))["duration"] == duration


def test_limits_without_queues() -> None:
    policy = Policy({"policy": {"limits": {"duration": "1d"}}})
    assert (policy.problem(Resources()), policy.duration(Resources())) == ("", 86400.0)
    assert "86400 s" in policy.problem(Resources(run_time_max=1e5))


def test_requests_that_would_be_refused() -> None:
    policy = Policy(QUEUES)
    for resources in (Resources(), in_queue("no_such")):
        assert "debug, part, long, usual" in policy.problem(resources)
    assert policy.problem(Resources(), named=False) == ""
    assert "limit of 90 s that this Flux instance has for queue 'debug'" in policy.problem(in_queue("debug", 91))
    with_default = Policy({**QUEUES, "policy": {"jobspec": {"defaults": {"system": {"queue": "debug"}}}}})
    assert (with_default.problem(Resources()), with_default.duration(Resources())) == ("", 90.0)
    assert Policy({}).problem(Resources()) == ""


# -- what cannot be said to Flux ----------------------------------------------------------------------------------


def test_variables_that_are_not_text() -> None:
    environ = {"RAW": "caf\udce9", "\udcff": "name", "TEXT": "café"}
    found = system(spec(Resources(), environ))["environment"]
    assert found["TEXT"] == "café"
    assert {"RAW", "\udcff"}.isdisjoint(found)
    assert untold_environment(environ) == {"RAW": "caf\udce9", "\udcff": "name"}


def test_commands_have_no_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["{{id}}", "{{{name}}}", "\\{{", "{" * 7, "{{" + "a" * 70_000 + "}}"]
    monkeypatch.setattr("sys.argv", texts)
    command = boot_command("executorlib.worker.remote", "()")
    assert not [each for each in command if "{{" in each]
    source = "".join(command[command.index("-c") + 2 :]) or command[-1]
    lists = [ast.literal_eval(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.List)]
    assert texts in lists
