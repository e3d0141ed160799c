"""Results are stored only under the key of the call that ran, whatever changes between submit and run."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.changing import Changing, Counting, see
from contract.functions import Gate, files, identity, lines, record
from executorlib.core import sending
from executorlib.keys import sources

WAIT = 50
pytestmark = [pytest.mark.cache]


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "log")


def results(store: str) -> dict[str, int]:
    """The results in a cache directory, and what tells each file from one that takes its place."""
    return {name: os.stat(os.path.join(store, name)).st_ino for name in files(store, "_o.h5")}


@pytest.mark.essential
@pytest.mark.parametrize("seen", ["AB", "ABA", "ABCA"])
def test_argument_that_changes(
    make_executor: Callable[..., Any],
    row: Any,
    store: str,
    log: str,
    seen: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Looked up as A, run as B: later sessions do not get B's result for A, and do not run B again."""
    caplog.set_level(logging.WARNING, "executorlib")
    with make_executor(cache_directory=store) as executor:
        ran = executor.submit(see, log, Changing(*seen)).result(WAIT)
    # A job is submitted as what it is then; only a change back, while it is pickled, goes unseen.
    assert ran == ("B" if seen != "ABCA" or not row.jobs else "A")
    told = [each.message for each in caplog.records if "looked up" in each.message]
    assert len(told) == (0 if row.jobs and seen != "ABA" else 1)
    assert all("copies" in each for each in told)
    with make_executor(cache_directory=store) as executor:
        assert [executor.submit(see, log, Changing(value)).result(WAIT) for value in "AB"] == ["A", "B"]
    assert lines(log).count(ran) == 1
    assert len(lines(log)) == 2


@pytest.mark.essential
def test_function_that_changes(make_executor: Callable[..., Any], store: str, log: str) -> None:
    """Its closure changes, or a global of a script."""

    def make(*values: str) -> Callable[[], str]:
        changing = Changing(*values)
        return lambda: see(log, changing)

    with make_executor(cache_directory=store) as executor:
        assert executor.submit(make("A", "B", "A")).result(WAIT) == "B"
    with make_executor(cache_directory=store) as executor:
        assert [executor.submit(make(value)).result(WAIT) for value in "AB"] == ["A", "B"]
    assert lines(log) == ["B", "A"]


@pytest.mark.rows(jobs=True)
def test_argument_that_never_stays_the_same(make_executor: Callable[..., Any], store: str, log: str) -> None:
    changing = Changing(*map(str, range(100)))
    with make_executor(cache_directory=store) as executor:
        error = executor.submit(see, log, changing).exception(WAIT)
        assert executor.submit(identity, 1).result(WAIT) == 1
    assert "times while they were being submitted" in str(error)
    assert "copies" in str(error)
    assert not lines(log)


@pytest.mark.rows(jobs=False)
def test_equal_calls_run_when_the_first_has_changed(
    make_executor: Callable[..., Any], store: str, log: str, gate: Callable[..., Gate]
) -> None:
    """They wait for its result, which turns out to be another call's, and then run themselves."""
    held = gate()
    with make_executor(cache_directory=store, max_workers=1) as executor:
        first = executor.submit(held)
        held.pid()
        futures = [executor.submit(see, log, Changing(*seen)) for seen in ("AB", "A", "A")]
        held.open()
        assert first.result(WAIT) is None
        assert [future.result(WAIT) for future in futures] == ["B", "A", "A"]


@pytest.mark.rows(block=True)
def test_init_function_that_changes(make_executor: Callable[..., Any], store: str, log: str) -> None:
    def make(*values: str) -> Callable[[], dict[str, Any]]:
        changing = Changing(*values)
        return lambda: {"who": changing.values[0]}

    def say(number: int, who: str) -> str:
        record(log, who)
        return who

    with make_executor(cache_directory=store, max_workers=1, init_function=make("A", "B")) as executor:
        # As the worker starts, or as the call is looked up: whichever is first sees A.
        assert executor.submit(say, 0).result(WAIT) in ("A", "B")
    for value in "AB":
        with make_executor(cache_directory=store, max_workers=1, init_function=make(value)) as executor:
            assert executor.submit(say, 0).result(WAIT) == value
    assert sorted(lines(log)) == ["A", "B"]


@pytest.mark.long
@pytest.mark.essential
@pytest.mark.parametrize("loaded", [True, False])
def test_module_that_changes(scripts: Any, row: Any, store: str, log: str, tmp_path: Path, loaded: bool) -> None:
    """Its file changes between the session's import and the worker's, which may have imported it even earlier."""
    module = tmp_path / "mine.py"
    text = "from contract.functions import record\nWHAT = {0!r}  # {1}\ndef tell(log):\n    return record(log, WHAT)\n"
    source = """
    import importlib, sys
    sys.path.insert(0, os.getcwd())
    import mine
    with Executor(**OPTIONS["executor"]) as executor:
        if OPTIONS["first"]:
            executor.submit(mine.tell, OPTIONS["other"]).result(40)
        if OPTIONS["now"]:
            with open("mine.py", "w") as file:
                file.write(OPTIONS["now"])
        print(executor.submit(mine.tell, OPTIONS["log"]).result(40))
    """
    options = {"executor": row.arguments(cache_directory=store, max_workers=1), "log": log, "other": f"{log}2"}
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(before: str, now: str) -> str:
        module.write_text(before)
        process = scripts.start(source, {**options, "first": loaded, "now": now}, env=env)
        out, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0
        return str(out.strip())

    old, new = text.format("old", ""), text.format("new", "and longer")
    said = run(old, new)
    assert [run(old, ""), run(new, "")] == ["old", "new"]
    assert said in ("old", "new")
    assert sorted(lines(log)) in (["new", "old"], ["new", "old", said])


_CHANGED_MEANWHILE = """
import sys
sys.path.insert(0, os.getcwd())
import mine

class Slow:
    def __reduce__(self):
        return write, (OPTIONS["now"],)

def write(text):
    with open("mine.py", "w") as file:
        file.write(text)
    return Slow()

with Executor(**OPTIONS["executor"]) as executor:
    print(executor.submit(mine.tell, Slow()).result(40))
"""


@pytest.mark.rows("fork", "spawn", "jobs")
def test_module_that_changes_while_the_inputs_are_loaded(scripts: Any, row: Any, store: str, tmp_path: Path) -> None:
    """The worker has imported it by then, because the function is defined in it."""
    module = tmp_path / "mine.py"
    text = "WHAT = {0!r}  # {1}\ndef tell(_):\n    return WHAT\n"
    old, new = text.format("old", ""), text.format("new", "and longer")
    module.write_text(old)
    options = {"executor": row.arguments(cache_directory=store, max_workers=1), "now": new}
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    for said in ("old", "new"):
        process = scripts.start(_CHANGED_MEANWHILE, options, env=env)
        out, err = process.communicate(timeout=WAIT)
        assert (out.strip(), "looked up" in err) == (said, True)
        assert module.read_text() == new


_CHANGED_BETWEEN = """
import sys
import threading
sys.path.insert(0, os.getcwd())
import mine

class Pause:
    def __init__(self):
        self.begun, self.over = threading.Event(), threading.Event()

    def __reduce__(self):
        self.begun.set()
        assert self.over.wait(40)
        return str, ()

with Executor(**OPTIONS["executor"]) as executor:
    first, second = Pause(), Pause()
    executor.submit(len, first)
    assert first.begun.wait(40)
    before = executor.submit(mine.tell, 1)
    executor.submit(mine.tell, second)
    first.over.set()
    assert second.begun.wait(40)
    with open("mine.py", "w") as file:
        file.write(OPTIONS["now"])
    after = executor.submit(mine.tell, 1)
    second.over.set()
    print(before.result(40), after.result(40))
"""


def test_module_that_changes_between_two_submits(scripts: Any, row: Any, store: str, tmp_path: Path) -> None:
    """Calls submitted together are looked up one by one: one was submitted before the change, the other after it."""
    text = "WHAT = {0!r}  # {1}\ndef tell(_):\n    return WHAT\n"
    old, new = text.format("old", ""), text.format("new", "and longer")
    (tmp_path / "mine.py").write_text(old)
    options = {"executor": row.arguments(cache_directory=store, max_workers=1), "now": new}
    source = """
    sys.path.insert(0, os.getcwd())
    import mine
    with Executor(**OPTIONS["executor"]) as executor:
        print(executor.submit(mine.tell, 1).result(40))
    """
    env = {"PYTHONDONTWRITEBYTECODE": "1"}

    def run(source: str) -> str:
        process = scripts.start(source, options, env=env)
        out, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0
        return str(out.strip())

    assert run("import sys\n" + textwrap.dedent(source)) == "old"
    assert run(_CHANGED_BETWEEN) == "old new"


class Pause:
    """An argument at which whoever looks at it waits."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def __reduce__(self) -> Any:
        self.begun.set()
        assert self.over.wait(WAIT)
        return str, ()


@pytest.mark.rows(jobs=False)
def test_files_are_looked_at_once_for_calls_that_come_together(
    make_executor: Callable[..., Any], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    reach = sources.reach
    monkeypatch.setattr(sources, "reach", lambda roots: looked.append(roots) or reach(roots))
    pause = Pause()
    with make_executor(cache_directory=store) as executor:
        first = executor.submit(len, pause)
        assert pause.begun.wait(WAIT)
        futures = [executor.submit(identity, number) for number in range(20)]
        pause.over.set()
        assert [future.result(WAIT) for future in (first, *futures)] == [0, *range(20)]
        assert len(looked) == 1
        assert executor.submit(identity, 20).result(WAIT) == 20
        assert len(looked) == 2


class Text(str):
    """Comes from a module, which is read as well where it is an argument."""


@pytest.mark.rows(jobs=False)
@pytest.mark.parametrize(("most", "pieces"), [(256, 3), (2, 2)])
def test_findings_about_modules_are_sent_once(
    make_executor: Callable[..., Any],
    row: Any,
    store: str,
    log: str,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    pieces: int,
) -> None:
    """One function, and what is known of it with arguments of either kind; or less at a time."""
    monkeypatch.setattr(sending, "_PIECES_PER_WORKER", most)
    for expected in ([pieces] if row.block else [], []):  # the second session finds all results
        with make_executor(cache_directory=store, max_workers=1) as executor:
            for number in range(3):
                for value in (number, Text(number)):
                    assert executor.submit(record, log, value).result(WAIT) == value
            # The executor's record of what workers keep.
            assert [len(known) for known in executor._loop._delivery._known_pieces.values()] == expected
            assert lines(log) == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.mpi
@pytest.mark.rows("fork", "jobs")
def test_ranks_that_change_their_argument(make_executor: Callable[..., Any], store: str, log: str) -> None:
    import numpy

    def add_rank(values: Any, changing: Changing) -> float:
        from mpi4py import MPI

        values += MPI.COMM_WORLD.Get_rank()
        if MPI.COMM_WORLD.Get_rank() == 0:
            see(log, changing)
        return float(values.sum())

    two = {"cores": 2}
    expected = [0.0, 50_000.0]
    with make_executor(cache_directory=store, max_workers=None, max_cores=2, resource_dict=two) as executor:
        future = executor.submit(add_rank, numpy.zeros(50_000), Changing("A", "B", "A"))
        assert future.result(WAIT) == expected
        for value in "AB":
            assert executor.submit(add_rank, numpy.zeros(50_000), Changing(value)).result(WAIT) == expected
    assert lines(log) == ["B", "A"]
    from executorlib import get_cache_data

    stored = [row["input_args"][0] for row in get_cache_data(store)]
    assert len(stored) >= 2
    assert all(not each.any() and each.flags.writeable for each in stored)


@pytest.mark.essential
def test_result_that_goes_on_changing(make_executor: Callable[..., Any], store: str) -> None:
    """The cache keeps the result as it was returned."""
    with make_executor(cache_directory=store) as executor:
        first = executor.submit(Counting).result(WAIT)
    with make_executor(cache_directory=store) as executor:
        assert executor.submit(Counting).result(WAIT) == first


# Jobs: others that wait for them, and their results as inputs.


@pytest.mark.rows("jobs")
def test_equal_calls_of_a_job_that_changes(
    make_executor: Callable[..., Any], store: str, log: str, gate: Callable[..., Gate]
) -> None:
    """In the same session and in another: they follow a job which turns out to run something else."""
    held = gate()

    def wait_and_see(changing: Changing) -> str:
        held()
        return see(log, changing)

    with make_executor(cache_directory=store) as executor, make_executor(cache_directory=store) as other:
        future = executor.submit(wait_and_see, Changing("A", "B", "A"))
        held.pid()
        twin = executor.submit(wait_and_see, Changing("A"))
        follower = other.submit(wait_and_see, Changing("A"))
        dependent = other.submit(identity, follower)
        held.open()
        assert [each.result(WAIT) for each in (twin, follower)] == ["A", "A"]
        # Unless the other session has run the call again, for what it is named by, before this one looked.
        assert future.result(WAIT) in ("A", "B")
        # It was to start after the other session's job, and is not fooled by what that left.
        error = dependent.exception(WAIT)
        assert error is not None or dependent.result() == "A"
    assert sorted(lines(log)) == ["A", "B"]


@pytest.mark.rows("jobs")
def test_dependents_of_a_job_that_changes(make_executor: Callable[..., Any], store: str, log: str) -> None:
    """They get the same result as those who wait, and theirs is not kept under the key that was looked up."""
    with make_executor(cache_directory=store) as executor:
        first = executor.submit(see, log, Changing("A", "B", "A"))
        second = executor.submit(identity, [first])
        assert second.result(WAIT) == ["B"]
        assert executor.submit(record, log, second).result(WAIT) == ["B"]
    for value in "AB":
        with make_executor(cache_directory=store) as executor:
            second = executor.submit(identity, [executor.submit(see, log, Changing(value))])
            assert executor.submit(record, log, second).result(WAIT) == [value]
    assert lines(log) == ["B", "['B']", "A", "['A']"]


# Many calls, with what programs do.

_CHANGES = """
import numpy

{definitions}

def main():
    pairs = []
    with Executor(**OPTIONS["executor"]) as executor:
        for i in OPTIONS["values"]:
            pairs.append((i, {submit}))
            if OPTIONS["wait"]:
                assert pairs[-1][1].result(50) == 3.0 * i, i
        wrong = sum(future.result(50) != 3.0 * i for i, future in pairs)
    return wrong

print(main())
"""


@pytest.mark.rows("fork", "block-fork", "jobs")
@pytest.mark.parametrize("kind", ["buffer", "global"])
@pytest.mark.parametrize("back", [False, True], ids=["on", "back"])
def test_many_changes(scripts: Any, row: Any, store: str, kind: str, back: bool) -> None:
    """A loop changes what it submits; a second program, which waits for each, gets the right value for every one."""
    pytest.importorskip("numpy")
    if kind == "buffer":
        definitions = "def total(a):\n    return float(a.sum())\nbuffer = numpy.zeros(3)\n"
        submit = "(buffer.fill(i), executor.submit(total, buffer))[1]"
    else:
        definitions = "def total():\n    return 3.0 * SCALE\n"
        submit = "(globals().update(SCALE=i), executor.submit(total))[1]"
    source = _CHANGES.format(definitions=definitions, submit=submit)
    values = [i % 2 for i in range(50)] if back else list(range(50))
    options = {"executor": row.arguments(cache_directory=store), "values": values}
    process = scripts.start(source, {**options, "wait": False})
    assert process.communicate(timeout=WAIT)[0].strip().isdigit()
    process = scripts.start(source, {**options, "values": values[:12], "wait": True})
    out, err = process.communicate(timeout=WAIT)
    assert (out.strip(), process.returncode) == ("0", 0), err


# All this must not cost a hit.

_HITS = """
import functools, operator, sys
import numpy
sys.path.insert(0, os.getcwd())
import own
from own import Own

FACTOR = 3

def plain(x, y=2):
    return helper(x) * FACTOR + y

def helper(x):
    return x + 1

def closure(n):
    def inner(x):
        return x + n
    return inner

class Mine:
    def __init__(self, value):
        self.value = value
    def method(self, x):
        return self.value * x
    def __call__(self, x):
        return self.value - x

names = {"__name__": "__main__"}
exec("import math\\ndef cell(x):\\n    return math.sqrt(x) + OFFSET\\nOFFSET = 1", names)

CALLS = [
    (plain, 1), (plain, numpy.arange(6).reshape(2, 3)), (closure(4), 1), (lambda x: x + FACTOR, 1),
    (names["cell"], 4), (functools.partial(plain, y=5), 1), (Mine(3).method, 2), (Mine(3), 2),
    (own.double, 4), (own.uses_module, 4), (Own(2).method, 3), (Own(2), 3), (Own.make, 3),
    (numpy.sum, numpy.ones((3, 3), dtype="f4")), (numpy.linalg.norm, numpy.arange(3.0)),
    (operator.add, 1, 2), (operator.itemgetter(1), [1, 2]), (str.upper, "a"), (sorted, {3, 1, 2}), (len, {"a": {1, 2}}),
    (plain, numpy.float64(2.5)), (repr, numpy.array([("a", 1)], dtype=[("x", "U1"), ("y", "i4")])),
    (own.double, numpy.array([1, "a", None], dtype=object).size),
]

with Executor(**OPTIONS["executor"]) as executor:
    futures = [executor.submit(*call) for call in CALLS]
    for future in futures:
        future.result(50)
    print(len(futures), list(executor.map(helper, range(10), chunksize=3)))
"""

_OWN = """
import re
LIMITS = {"low": 1, "high": [2, 3]}
PATTERN = re.compile("a+")

def double(x):
    return 2 * x

def uses_module(x):
    import json
    return double(x) + LIMITS["low"] + len(PATTERN.findall(json.dumps("aa")))

class Own:
    scale = 3
    def __init__(self, value):
        self.value = value
    def method(self, x):
        return self.value * x * self.scale
    def __call__(self, x):
        return self.method(x)
    @classmethod
    def make(cls, value):
        return cls(value).value
"""


@pytest.mark.long
@pytest.mark.essential
def test_second_program_runs_nothing(scripts: Any, row: Any, store: str, tmp_path: Path) -> None:
    """The keys at run time equal those at the look-up, for all kinds of functions and inputs."""
    pytest.importorskip("numpy")
    (tmp_path / "own.py").write_text(_OWN)
    options = {"executor": row.arguments(cache_directory=store)}
    # Each with another order of sets, and where it is imported anew in workers.
    first = scripts.run(_HITS, options, env={"PYTHONHASHSEED": "1"})
    there = results(store)
    assert len(there) == 27
    assert scripts.run(_HITS, options, env={"PYTHONHASHSEED": "2"}) == first
    assert results(store) == there


def test_calls_that_share_their_inputs_with_others_are_found(
    make_executor: Callable[..., Any], store: str, log: str
) -> None:
    """A function and its inputs may hold the same objects. If they are pickled apart, these become copies."""
    shared = ["shared", {"by": "all"}]

    def see_both(mine: Any, first: Any, second: Any) -> Any:
        return record(log, [mine, first, second, shared])

    for _ in range(2):
        with make_executor(cache_directory=store) as executor:
            assert executor.submit(see_both, shared, shared, [shared]).result(WAIT)[0] == shared
    assert len(lines(log)) == 1
