"""Calls that are jobs: a session that leaves finds their results later, and none runs twice."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from conftest import marked_processes, open_files
from contract.functions import (
    CustomError,
    Gate,
    add,
    fail,
    files,
    identity,
    lines,
    put,
    record,
    total,
    until,
    wait_until_gone,
)
from executorlib import cli, get_cache_data, get_future_from_cache, get_item_from_future, split_future
from executorlib.api import ExecutorlibSocketError
from executorlib.cache import batch_directory, entries

WAIT = 40
pytestmark = [pytest.mark.cache, pytest.mark.essential, pytest.mark.rows(jobs=True)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def make(make_executor: Callable[..., Any], store: Path) -> Callable[..., Any]:
    """Make executors that share one cache directory."""
    return lambda **kwargs: make_executor(cache_directory=str(store), **kwargs)


def waiting(store: Path) -> list[str]:
    return files(store, "_i.h5")


def finished(store: Path) -> list[str]:
    return files(store, "_o.h5")


def assert_tidy(store: Path) -> None:
    """All entries are done; a job removes its own right after its result is there."""
    until(lambda: not waiting(store))


def runs(held: Gate) -> int:
    """How many calls have come to a gate."""
    return len([name for name in os.listdir(held.folder) if name.startswith(f"{held.name}-started-")])


def is_cancelled(future: Future[Any]) -> bool:
    try:
        future.exception(WAIT)
    except CancelledError:
        return True
    return False


def key(name: str) -> dict[str, str]:
    return {"cache_key": name}


# Leaving and coming back.


def test_leaving_cancels_the_futures_and_keeps_the_jobs(
    make: Callable[..., Any],
    gate: Callable[..., Gate],
    store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    held, log = gate(), str(tmp_path / "log")
    executor = make()
    first = executor.submit(held, 1)
    futures = [first, executor.submit(record, log, 2), executor.submit(add, first, 1)]
    held.pid()
    executor.shutdown(wait=False)
    assert all(future.done() for future in futures)
    assert futures[0].cancelled()
    assert futures[2].cancelled()
    executor.shutdown()
    assert not caplog.records
    held.open()
    with make() as again:
        first = again.submit(held, 1)
        results = [first, again.submit(record, log, 2), again.submit(add, first, 1)]
        assert [future.result(WAIT) for future in results] == [1, 2, 2]
    assert lines(log) == ["2"]
    assert runs(held) == 1
    assert_tidy(store)


def test_leaving_right_after_submitting(make: Callable[..., Any], store: Path) -> None:
    """Calls that were not handed to the queuing system yet become jobs, too."""
    executor = make()
    futures = [executor.submit(add, i, 1) for i in range(5)]
    futures.append(executor.submit(total, *futures, resource_dict=key("last")))
    executor.shutdown(wait=False)
    assert all(future.done() for future in futures)
    assert futures[-1].cancelled()
    executor.shutdown()
    assert get_future_from_cache(store, "last").result(WAIT) == 15
    until(lambda: len(finished(store)) == 6, WAIT)


def test_leaving_the_block_without_waiting(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    held = gate()
    with make(wait=False) as executor:
        future = executor.submit(held, 5, resource_dict=key("held"))
        held.pid()
    assert future.cancelled()
    held.open()
    assert get_future_from_cache(store, "held").result(WAIT) == 5


def test_leaving_in_a_callback(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    """The executor's thread cannot wait for itself there."""
    held = gate()
    executor = make()
    pending = executor.submit(held, 5, resource_dict=key("held"))
    held.pid()
    done = executor.submit(add, 1, 2)
    left: Future[None] = Future()

    def leave(future: Future[int]) -> None:
        executor.shutdown(wait=False)
        left.set_result(None)

    done.add_done_callback(leave)
    left.result(WAIT)
    executor.shutdown()
    assert pending.cancelled()
    held.open()
    assert get_future_from_cache(store, "held").result(WAIT) == 5


def test_coming_back_to_a_running_job(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """The job is joined; what depends on it waits for it."""
    held = gate()
    executor = make()
    executor.submit(held, 1)
    held.pid()
    executor.shutdown(wait=False)
    with make() as again:
        future = again.submit(held, 1)
        dependent = again.submit(add, future, 1)
        until(future.running, WAIT)
        assert not dependent.done()
        held.open()
        assert (future.result(WAIT), dependent.result(WAIT)) == (1, 2)
    assert runs(held) == 1


def test_leaving_a_job_that_another_session_submitted(
    make: Callable[..., Any], gate: Callable[..., Gate], store: Path
) -> None:
    held = gate()
    with make() as executor:
        future = executor.submit(held, 1, resource_dict=key("held"))
        held.pid()
        other = make()
        joined = other.submit(held, 1, resource_dict=key("held"))
        until(lambda: len(other) == 0 or joined.running(), WAIT)
        other.shutdown(wait=False)
        assert is_cancelled(joined)
        held.open()
        assert future.result(WAIT) == 1
    assert runs(held) == 1
    assert finished(store) == ["held_o.h5"]


def test_cancelling_a_joined_call_leaves_the_other_sessions_job(
    make: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    held = gate()
    with make() as executor, make() as other:
        first = executor.submit(held, 1)
        held.pid()
        mine = executor.submit(add, first, 1)  # waits in the queue
        joined = other.submit(add, other.submit(held, 1), 1)
        until(lambda: other.future_queue is not None)
        assert joined.cancel()
        held.open()
        assert mine.result(WAIT) == 2


@pytest.mark.rows("jobs")
def test_joined_call_runs_when_its_job_is_killed(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Also while the session that submitted the job, and its queue, go on."""
    held = gate()
    with make() as other, make() as executor:
        theirs = other.submit(held, 1)
        job = held.pid()
        joined = executor.submit(held, 1)
        until(joined.running, WAIT)
        os.kill(job, signal.SIGKILL)
        assert isinstance(theirs.exception(WAIT), ExecutorlibSocketError)
        held.open()
        assert joined.result(WAIT) == 1


@pytest.mark.rows("jobs")
def test_joined_call_runs_when_its_job_is_cancelled(
    make: Callable[..., Any], gate: Callable[..., Gate], store: Path
) -> None:
    held = gate()
    with make(max_cores=1) as other, make() as executor:
        other.submit(held, 1)
        theirs = other.submit(add, 1, 2)  # waits in the queue
        until(lambda: len(waiting(store)) == 2, WAIT)
        joined = executor.submit(add, 1, 2)
        until(joined.running, WAIT)
        assert theirs.cancel()
        assert joined.result(WAIT) == 3
        held.open()


TWICE = """
    from contract.functions import add, put, record, wait_for

    put(f"ready-{sys.argv[0][-4]}")
    wait_for("go")
    with Executor(**OPTIONS) as executor:
        first = list(executor.map(record, ["first"] * 8, range(8)))
        second = executor.map(record, ["second"] * 8, [executor.submit(add, i, 1) for i in range(8)])
        print(first, list(second))
"""


def with_tests() -> dict[str, str]:
    """The environment in which programs find this folder's functions."""
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}


def test_two_sessions_submit_the_same_at_the_same_moment(row: Any, scripts: Any, store: Path, tmp_path: Path) -> None:
    options = row.arguments(cache_directory=str(store))
    programs = [scripts.start(TWICE, options, env=with_tests()) for _ in range(2)]
    until(lambda: len(list(tmp_path.glob("ready-?"))) == 2, WAIT)
    put(tmp_path / "go")
    expected = f"{list(range(8))} {list(range(1, 9))}\n"
    for program in programs:
        out, err = program.communicate(timeout=WAIT)
        assert not err, err
        assert out == expected
    assert sorted(lines(tmp_path / "first")) == sorted(map(str, range(8)))
    assert sorted(lines(tmp_path / "second")) == sorted(map(str, range(1, 9)))
    assert_tidy(store)


KILLED = """
    from contract.functions import Gate, add, record

    executor = Executor(**OPTIONS)
    first = executor.submit(Gate(os.getcwd(), "gate"), 1)
    second = executor.submit(record, "log", first)
    third = executor.submit(add, second, 1)
    third.result()
"""


def test_session_that_is_killed(
    row: Any, scripts: Any, make: Callable[..., Any], gate: Callable[..., Gate], store: Path, tmp_path: Path
) -> None:
    """Its jobs go on, and its half-finished work does not hinder the next session."""
    held = gate()
    program = scripts.start(KILLED, row.arguments(cache_directory=str(store)), env=with_tests())
    held.pid()
    program.send_signal(signal.SIGKILL)
    assert program.wait(WAIT) == -signal.SIGKILL
    held.open()
    with make() as executor:
        first = executor.submit(Gate(str(tmp_path), "gate"), 1)
        second = executor.submit(record, "log", first)
        assert executor.submit(add, second, 1).result(WAIT) == 2
    assert runs(held) == 1
    assert_tidy(store)


def test_same_keys_whenever_inputs_are_done(make: Callable[..., Any], store: Path) -> None:
    """A call with futures as inputs has the same key whether or not their results were there before it."""
    with make() as executor:
        source = executor.submit(identity, {"a": (1, 2)})
        part = get_item_from_future(source, "a")
        results = [executor.submit(identity, part), executor.submit(total, *split_future(part, 2))]
        assert [future.result(WAIT) for future in results] == [(1, 2), 3]
    before = finished(store)
    assert len(before) == 3
    with make() as executor:
        source = executor.submit(identity, {"a": (1, 2)})
        assert source.result(WAIT) == {"a": (1, 2)}
        part = get_item_from_future(source, "a")
        results = [executor.submit(identity, part), executor.submit(total, *split_future(part, 2))]
        assert [future.result(WAIT) for future in results] == [(1, 2), 3]
    assert finished(store) == before


# Jobs that are inputs of jobs.


def test_chain_without_a_session(
    make: Callable[..., Any], gate: Callable[..., Gate], store: Path, tmp_path: Path
) -> None:
    held, log = gate(), str(tmp_path / "log")
    executor = make()
    future = executor.submit(held, 0)
    for step in range(1, 4):
        future = executor.submit(add, executor.submit(record, log, future), step)
    executor.submit(identity, future, resource_dict=key("last"))
    held.pid()
    executor.shutdown(wait=False)
    executor.shutdown()
    held.open()
    assert get_future_from_cache(store, "last").result(WAIT) == 6
    assert lines(log) == ["0", "1", "3"]


def test_two_layers_without_a_session(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    held = gate()
    executor = make()
    top = executor.submit(held, 10)
    first = [executor.submit(add, top, i) for i in range(4)]
    second = [executor.submit(add, future, 100) for future in first]
    executor.submit(total, *second, resource_dict=key("last"))
    held.pid()
    executor.shutdown(wait=False)
    executor.shutdown()
    held.open()
    assert get_future_from_cache(store, "last").result(WAIT) == 4 * 110 + 6


def test_layers_of_different_order(make: Callable[..., Any]) -> None:
    """Each call waits for its own input, whatever its place among the others."""
    with make() as executor:
        first = [executor.submit(identity, i) for i in range(6)]
        reverse = [executor.submit(add, future, 10) for future in reversed(first)]
        some = [executor.submit(add, first[i], 20) for i in (1, 2, 5)]
        pairs = [executor.submit(add, left, right) for left, right in zip(first, reverse, strict=True)]
        assert [future.result(WAIT) for future in reverse] == [15, 14, 13, 12, 11, 10]
        assert [future.result(WAIT) for future in some] == [21, 22, 25]
        assert [future.result(WAIT) for future in pairs] == [15] * 6


def test_parts_of_results_without_a_session(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    held = gate()
    executor = make()
    source = executor.submit(held, {"a": (1, 20)})
    left, right = split_future(get_item_from_future(source, "a"), 2)
    executor.submit(add, left, b=right, resource_dict=key("last"))
    held.pid()
    executor.shutdown(wait=False)
    executor.shutdown()
    held.open()
    assert get_future_from_cache(store, "last").result(WAIT) == 21


def test_failed_input_fails_its_dependents(
    make: Callable[..., Any], gate: Callable[..., Gate], store: Path, tmp_path: Path
) -> None:
    """Even if those are in the queue already. No job is left, and none of them has run."""
    held, log = gate(), str(tmp_path / "log")

    def fail_later() -> None:
        held()
        fail("the input")

    with make() as executor:
        bad = executor.submit(fail_later)
        second = executor.submit(record, log, bad)
        third = executor.submit(record, log, [second, executor.submit(identity, 5)])
        held.pid()
        held.open()
        for future in (bad, second, third):
            assert isinstance(future.exception(WAIT), CustomError)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    assert lines(log) == []
    assert_tidy(store)


def test_result_that_lacks_the_part(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make() as executor:
        part = get_item_from_future(executor.submit(held, {"a": 1}), "b")
        dependent = executor.submit(add, part, 1)
        held.pid()
        held.open()
        assert isinstance(dependent.exception(WAIT), KeyError)


def test_inputs_that_another_session_runs(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make() as one, make() as two:
        mine = one.submit(held, 1)
        held.pid()
        joined = two.submit(held, 1)
        across = two.submit(add, mine, joined)
        held.open()
        assert across.result(WAIT) == 2
    assert runs(held) == 1


def test_input_of_another_sessions_queue_is_waited_for(
    make: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path
) -> None:
    """Each session has a queue of its own on one machine; a call does not start before an input in another one ends."""
    held, log = gate(), str(tmp_path / "log")
    with make() as one, make() as two:
        one.submit(held, 1)
        held.pid()
        joined = two.submit(held, 1)
        until(joined.running, WAIT)
        across = two.submit(record, log, joined)
        assert two.submit(add, 2, 3).result(WAIT) == 5  # later, and not kept waiting
        assert not across.running()
        assert not across.done()
        held.open()
        assert across.result(WAIT) == 1
    assert runs(held) == 1


# Cancelling.


def test_cancelling_a_job_in_the_queue(
    make: Callable[..., Any], gate: Callable[..., Gate], store: Path, tmp_path: Path
) -> None:
    held, log = gate(), str(tmp_path / "log")
    with make() as executor:
        first = executor.submit(held, 1)
        queued = executor.submit(record, log, first)
        held.pid()
        until(lambda: len(waiting(store)) == 2, WAIT)
        assert queued.cancel()
        until(lambda: len(waiting(store)) == 1)
        held.open()
        assert first.result(WAIT) == 1
    assert lines(log) == []
    with make() as executor:
        assert executor.submit(record, log, executor.submit(held, 1)).result(WAIT) == 1
    assert lines(log) == ["1"]


def test_cancelling_one_of_two_equal_calls(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """The job is the other one's as well."""
    held = gate()
    with make() as executor:
        first = executor.submit(held, 1)
        twins = [executor.submit(add, first, 1) for _ in range(3)]
        assert twins[0].cancel()
        held.pid()
        assert twins[1].cancel()
        held.open()
        assert twins[2].result(WAIT) == 2


def test_leaving_with_the_queue_emptied(
    make: Callable[..., Any], gate: Callable[..., Gate], store: Path, tmp_path: Path
) -> None:
    held, log = gate(), str(tmp_path / "log")
    executor = make()
    running = executor.submit(held, 1)
    queued = [executor.submit(record, log, running) for _ in range(2)]
    until(running.running, WAIT)
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(map(is_cancelled, queued))
    held.open()
    executor.shutdown()
    assert running.result(0) == 1
    assert lines(log) == []
    assert_tidy(store)


# The contents of the cache directory.


def test_future_of_a_running_job(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    held = gate()
    with make() as executor:
        executor.submit(held, 7, resource_dict=key("folder/held"))
        held.pid()
        future = get_future_from_cache(store, "folder/held")
        assert not future.done()
        (entry,) = get_cache_data(store)
        assert entry["input_args"] == [7]
        assert "output" not in entry
        held.open()
        assert future.result(WAIT) == 7


def test_exceptions_are_kept_with_their_traceback(make: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def record_and_fail() -> None:
        record(log, "ran")
        fail("on record")

    for _ in range(2):
        with make() as executor:
            error = executor.submit(record_and_fail, resource_dict=key("bad")).exception(WAIT)
            assert isinstance(error, CustomError)
            assert error.args == ("on record",)
            assert "Traceback (most recent call last)" in str(error.__cause__)
            assert "in record_and_fail" in str(error.__cause__)
    assert lines(log) == ["ran"]
    with pytest.raises(CustomError, match="on record"):
        get_future_from_cache(store, "bad")


def test_default_directory(
    row: Any, monkeypatch: pytest.MonkeyPatch, gate: Callable[..., Gate], tmp_path: Path
) -> None:
    """It is in the working directory of the constructor's call, even if the program changes directory later."""
    held = gate()
    monkeypatch.chdir(tmp_path)
    with row.executor_class() as executor:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        future = executor.submit(held, 1, resource_dict=key("held"))
        held.open()
        assert future.result(WAIT) == 1
    assert finished(tmp_path) == ["executorlib_cache/held_o.h5"]


@pytest.mark.linux
def test_nothing_is_left_behind(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """A session that leaves keeps nothing; once its jobs are over, neither do they."""
    held = gate()
    threads, files, processes = threading.active_count(), len(open_files()), set(marked_processes())
    executor = make()
    executor.submit(add, executor.submit(held, 1), 1)
    pid = held.pid()
    executor.shutdown(wait=False)
    until(lambda: threading.active_count() == threads)
    assert len(open_files()) == files
    assert os.path.exists(f"/proc/{pid}")
    held.open()
    until(lambda: set(marked_processes()) <= processes, WAIT)


@pytest.mark.rows("jobs")
def test_entry_of_a_session_that_has_not_submitted_it_yet(
    make: Callable[..., Any], gate: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sessions leave it alone as long as that session lives."""
    held = gate()
    with make() as executor, make() as other:
        # More inputs than this are waited for here, not by the queue.
        monkeypatch.setattr("executorlib.jobs.submitter._MOST_DEPENDENCIES", 2)
        inputs = [executor.submit(held, i) for i in range(3)]
        mine = executor.submit(total, *inputs, resource_dict=key("sum"))
        held.pids(2)
        joined = other.submit(total, 1, resource_dict=key("sum"))
        with pytest.raises(TimeoutError):
            joined.result(0.5)
        held.open()
        assert (mine.result(WAIT), joined.result(WAIT)) == (3, 3)


# The output of jobs.


@pytest.mark.rows("jobs", "flux-cluster")
def test_output_of_calls_is_in_their_entries(
    make: Callable[..., Any], store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard output and error in their order, of calls that return and that raise; only the end of long ones."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def speak(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stderr.write("aside\n")

    def speak_and_fail() -> None:
        sys.stdout.write("before the end\n")
        fail("on purpose")

    with make() as executor:
        executor.submit(speak, "a word", resource_dict=key("word"))
        executor.submit(speak_and_fail, resource_dict=key("bad"))
        executor.submit(speak, "x" * 3_000_000, resource_dict=key("much"))
        executor.submit(identity, 1, resource_dict=key("silent"))
    until(lambda: not waiting(store))
    assert sorted(os.listdir(store)) == [f"{name}_o.h5" for name in ("bad", "much", "silent", "word")]
    printed = {name: show(store, name, capsys).get("printed") for name in ("word", "bad", "much", "silent")}
    assert printed["word"] == "a word\naside\n"
    assert printed["bad"] == "before the end\n"
    assert printed["silent"] is None
    cut = 3_000_000 + len("\naside\n") - (1 << 20)
    assert printed["much"] == f"[{cut} bytes before this were cut]\n{'x' * ((1 << 20) - 7)}\naside\n"
    cli.main(["cache", "show", "word", "-d", str(store)])
    assert "printed:        a word\n                aside\n" in capsys.readouterr().out
    assert all("printed" not in row for row in get_cache_data(store))


@pytest.mark.mpi
@pytest.mark.rows("jobs", "flux-cluster")
def test_output_of_ranks_is_in_their_entries(
    make: Callable[..., Any], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of them prints, and however late."""

    def speak() -> None:
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.Get_rank()
        sys.stdout.write(f"rank {rank}\n" * (1000 if rank else 1))

    with make() as executor:
        executor.submit(speak, resource_dict={"cores": 2, **key("ranks")}).result(WAIT)
    until(lambda: not waiting(store))
    assert os.listdir(store) == ["ranks_o.h5"]
    printed = show(store, "ranks", capsys)["printed"].splitlines()
    assert sorted(printed) == ["rank 0", *["rank 1"] * 1000]


def show(store: Path, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["cache", "show", name, "-d", str(store), "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


@pytest.mark.rows("jobs")
def test_output_of_a_job_without_a_result_is_kept(make: Callable[..., Any], store: Path) -> None:
    def speak_and_die() -> None:
        os.write(1, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with make() as executor:
        assert "last words" in str(executor.submit(speak_and_die).exception(WAIT))
    (output,) = store.glob(f"{batch_directory.FOLDER}/*/output.0")
    assert output.read_text() == "last words\n"


@pytest.mark.rows("jobs")
def test_batches_of_a_session_that_left(make: Callable[..., Any], store: Path, gate: Callable[..., Gate]) -> None:
    """The one that comes back to all of its calls removes it."""
    held = gate()
    first = make()
    for number in range(2):
        first.submit(held, number, resource_dict=key(str(number)))
    held.pids(2)
    first.shutdown(wait=False)
    with make() as executor:
        futures = [executor.submit(held, number, resource_dict=key(str(number))) for number in range(2)]
        with pytest.raises(TimeoutError):
            futures[0].result(0.3)
        held.open()
        assert [future.result(WAIT) for future in futures] == [0, 1]
    until(lambda: not waiting(store))
    assert sorted(os.listdir(store)) == ["0_o.h5", "1_o.h5"]


# Secrets.


@pytest.mark.rows("jobs")
def test_files_with_the_environment_are_private(
    make: Callable[..., Any], store: Path, gate: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = gate()
    before = os.umask(0)
    try:
        with make() as executor:
            monkeypatch.setenv("EXECUTORLIB_TEST_SECRET", "s3cr3t")
            executor.submit(held, 1)
            held.pid()
            modes = {path.name: path.stat().st_mode & 0o777 for path in store.glob(f"{batch_directory.FOLDER}/*/*")}
            secret = [path.name for path in store.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
            held.open()
    finally:
        os.umask(before)
    assert secret in ([], ["setup"])
    assert modes["setup"] == 0o600
    assert not any(mode & 0o002 for mode in modes.values())


# Things that other sessions have left.


@pytest.mark.rows("jobs")
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_an_entry_that_is_damaged(
    make: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """It is claimed again soon, by one session only. Not at once, because an empty entry may be about to be filled."""
    monkeypatch.setattr("executorlib.jobs.claims._UNREADABLE_SECONDS", 0.5)
    path = entries.entry_path(store, "call", "i")
    values = {"function": record, "input_args": ["x", 1], "input_kwargs": {}, "resource_dict": {}}
    assert entries.write_input(str(path), {**values, "batch": str(store / "gone")})
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    log = str(store.parent / "log")
    with make() as one, make() as two:
        futures = [each.submit(record, log, 1, resource_dict=key("call")) for each in (one, two)]
        assert [future.result(WAIT) for future in futures] == [1, 1]
    assert lines(log) == ["1"]


@pytest.mark.rows("jobs")
def test_entry_and_result_that_are_damaged(
    make: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executorlib.jobs.claims._UNREADABLE_SECONDS", 0.5)
    store.mkdir()
    for kind in ("i", "o"):
        entries.entry_path(store, "call", kind).write_bytes(b"garbage")
    with make() as executor:
        assert executor.submit(add, 1, 2, resource_dict=key("call")).result(WAIT) == 3
    assert_tidy(store)


def test_damaged_entry_that_another_session_has_claimed(store: Path) -> None:
    """The session that found it damaged is too late."""
    path = str(entries.entry_path(store, "call", "i"))
    values = {"function": abs, "input_args": [1], "input_kwargs": {}, "resource_dict": {}}
    assert entries.write_input(path, {**values, "batch": "of another session"})
    entries.take_over(path, "damaged", root=str(store))
    assert entries.claimed_for(path) == "of another session"


@pytest.mark.rows("jobs")
def test_failure_to_begin_a_call_is_not_kept(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    """A missing module fails the call for those who wait. Once it is there, the call runs if submitted again."""
    module = tmp_path / "came_later.py"
    module.write_text("def double(x):\n    return 2 * x\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from came_later import double

        module.unlink()
        importlib.invalidate_caches()
        with make_executor(cache_directory=tmp_path / "store") as executor:
            assert isinstance(executor.submit(double, 4).exception(WAIT), ModuleNotFoundError)
        assert_tidy(tmp_path / "store")  # until then it would be the same job
        module.write_text("def double(x):\n    return 2 * x\n")
        for _ in range(2):
            with make_executor(cache_directory=tmp_path / "store") as executor:
                assert executor.submit(double, 4).result(WAIT) == 8
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("came_later", None)


@pytest.mark.rows("jobs")
def test_session_in_a_job_of_another_system(
    make: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of the job that the session runs in is not mistaken for the calls' own."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("JOB_ID", "4711")
    with make() as executor:
        executor.submit(add, 1, 2).result(WAIT)
    (row,) = get_cache_data(store)
    assert row["queue_id"] is None
    assert "4711" not in [(store / path).read_text() for path in files(store, batch_directory.JOB_ID_FILE)]


@pytest.mark.rows("jobs")
def test_a_job_of_another_system_is_only_watched(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    with make_executor(cache_directory=tmp_path / "other") as executor:
        executor.submit(add, 1, 2).result(WAIT)
    (done,) = (tmp_path / "other").glob("*_o.h5")
    store = tmp_path / "store"
    batch = store / batch_directory.FOLDER / "batch"
    batch.mkdir(parents=True)
    path = store / done.name.replace("_o.h5", "_i.h5")
    batch.joinpath(batch_directory.OWNER_FILE).write_text('{"system": "Slurm", "host": "elsewhere", "pid": 1}')
    batch.joinpath(batch_directory.ENTRIES_FILE).write_text(f"0 {path}\n")
    batch.joinpath(batch_directory.JOB_ID_FILE).write_text("17")
    call = {"function": add, "input_args": [1, 2], "input_kwargs": {}, "resource_dict": {}, "batch": str(batch)}
    assert entries.write_input(str(path), call)
    with make_executor(cache_directory=store) as executor:
        future = executor.submit(add, 1, 2)
        assert executor.submit(add, 3, 4).result(WAIT) == 7  # others go on
        assert not future.done()
        done.rename(store / done.name)
        assert future.result(WAIT) == 3


@pytest.mark.rows("jobs")
def test_a_directory_of_several_names(
    make_executor: Callable[..., Any], tmp_path: Path, gate: Callable[..., Gate]
) -> None:
    """A session that knows the directory by another name joins the right element of a job array."""
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "link").symlink_to(store)
    held = gate()
    first = make_executor(cache_directory=tmp_path / "link", max_workers=3)
    futures = [first.submit(held, number) for number in range(3)]
    held.pids(3)
    first.shutdown(wait=False)
    second = make_executor(cache_directory=store)
    joined = second.submit(held, 2)
    until(lambda: all(future.done() for future in futures))
    held.open()
    assert joined.result(WAIT) == 2
    second.shutdown()
    assert runs(held) == 3
    assert_tidy(store)


@pytest.mark.rows("jobs", "slurm")
@pytest.mark.parametrize("name", ["a\nb", "\r\x85", "\\n\\", "%j 'a' \"b\" $HOME"])
def test_directories_of_any_name(make_executor: Callable[..., Any], row: Any, tmp_path: Path, name: str) -> None:
    """A name that Slurm cannot take as a cache directory is an error at once."""
    folder = tmp_path / name
    store: Any = folder
    if row.name == "slurm" and "\\" in name:
        with pytest.raises(ValueError, match="has a backslash in its path"):
            make_executor(cache_directory=folder)
        store = tmp_path / "store"
    executor = make_executor(cache_directory=store, resource_dict={"cwd": folder})
    futures = [executor.submit(os.path.relpath, "/", "/a" * number) for number in (1, 2)]
    where = executor.submit(os.getcwd)
    assert [future.result(WAIT) for future in futures] == ["..", "../.."]
    assert where.result(WAIT) == str(folder)


@pytest.mark.linux
@pytest.mark.rows("jobs")
def test_kill_workers_with_a_suspended_queue(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """The local queue is a process of ours, which must be continued so that it can end its jobs."""
    held = gate()
    executor = make_executor(max_workers=1)
    future = executor.submit(held)
    pid = held.pid()
    until(future.running)  # before that, it would be cancelled
    for _ in range(2):  # above the job is the node agent, and above that the queue
        with open(f"/proc/{pid}/stat") as stat:
            pid = int(stat.read().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGSTOP)
    executor.kill_workers()
    assert future.exception(WAIT) is not None
    executor.shutdown()
    wait_until_gone(pid, seconds=WAIT)  # it went on, and saw that it is not needed any more
