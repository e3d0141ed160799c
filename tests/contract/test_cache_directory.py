"""Results on disk: found again by another executor, readable as rows and futures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.functions import CustomError, Gate, add, fail, files, identity, lines, record, until

WAIT = 30
pytestmark = [pytest.mark.cache, pytest.mark.essential]


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def finished(store: str) -> list[str]:
    return files(store, "_o.h5")


def test_second_executor_finds_the_result(make_executor: Callable[..., Any], store: str, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    for _ in range(2):
        with make_executor(cache_directory=store) as executor:
            assert executor.submit(record, log, 5).result(WAIT) == 5
    assert lines(log) == ["5"]
    assert len(finished(store)) == 1
    assert finished(store)[0].startswith("record")


def test_same_executor_finds_the_result(make_executor: Callable[..., Any], store: str, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with make_executor(cache_directory=store) as executor:
        assert executor.submit(record, log, 5).result(WAIT) == 5
        assert executor.submit(record, log, value=5).result(WAIT) == 5
        assert executor.submit(record, log, 6).result(WAIT) == 6
    assert lines(log).count("6") == 1


@pytest.mark.rows(jobs=False)
def test_equal_calls_at_once_run_once(
    make_executor: Callable[..., Any], store: str, tmp_path: Path, gate: Callable[..., Gate]
) -> None:
    held, log = gate(), str(tmp_path / "log")

    def run(value: int) -> int:
        record(log, value)
        held()
        return value

    with make_executor(cache_directory=store) as executor:
        futures = [executor.submit(run, 5) for _ in range(4)]
        other = executor.submit(run, 6)
        held.pids(2)
        assert futures[-1].cancel()
        held.open()
        assert [future.result(WAIT) for future in [*futures[:-1], other]] == [5, 5, 5, 6]
    assert sorted(lines(log)) == ["5", "6"]


@pytest.mark.rows(jobs=False)
def test_equal_calls_run_when_the_first_leaves_no_result(
    make_executor: Callable[..., Any], store: str, tmp_path: Path, gate: Callable[..., Gate]
) -> None:
    """They wait for its result, and run if there is none."""
    held, log = gate(), str(tmp_path / "log")

    def run(value: int) -> None:
        record(log, value)
        raise CustomError(str(value))

    with make_executor(cache_directory=store, max_workers=1) as executor:
        first = executor.submit(held)
        held.pids(1)
        futures = [executor.submit(run, 5) for _ in range(3)]
        cancelled, *equal = [executor.submit(record, log, 6) for _ in range(3)]
        cancelled.cancel()  # a block's worker may hold it already
        held.open()
        assert first.result(WAIT) is None
        assert all(isinstance(future.exception(WAIT), CustomError) for future in futures)
        assert [future.result(WAIT) for future in equal] == [6, 6]
    assert lines(log).count("5") == 3


def test_inputs_that_are_futures_count_by_their_results(
    make_executor: Callable[..., Any], row: Any, store: str, tmp_path: Path
) -> None:
    """A job has its key before its inputs have results, so they count by the keys of their calls."""
    log = str(tmp_path / "log")
    with make_executor(cache_directory=store) as executor:
        five = executor.submit(add, 2, 3)
        assert executor.submit(record, log, five).result(WAIT) == 5
    with make_executor(cache_directory=store) as executor:
        assert executor.submit(record, log, 5).result(WAIT) == 5
        assert executor.submit(record, log, executor.submit(add, 2, 3)).result(WAIT) == 5
    assert lines(log) == (["5"] * 2 if row.jobs else ["5"])


def test_another_function_has_another_entry(make_executor: Callable[..., Any], store: str) -> None:
    def make(constant: int) -> Callable[[int], int]:
        def f(x: int) -> int:
            return x + constant

        return f

    with make_executor(cache_directory=store) as executor:
        results = [executor.submit(make(constant), 1).result(WAIT) for constant in (1, 2, 1)]
    assert results == [2, 3, 2]
    assert len(finished(store)) == 2


def test_rows(make_executor: Callable[..., Any], store: str) -> None:
    from executorlib import get_cache_data

    assert get_cache_data(store) == []
    with make_executor(cache_directory=store) as executor:
        executor.submit(add, 1, b=2).result(WAIT)
    (row,) = get_cache_data(store)
    assert row["function"](1, 1) == 2
    assert list(row["input_args"]) == [1]
    assert row["input_kwargs"] == {"b": 2}
    assert row["output"] == 3
    assert row["runtime"] >= 0
    assert isinstance(row["resource_dict"], dict)
    assert Path(store, row["filename"]).is_file() or Path(row["filename"]).is_file()


@pytest.mark.rows(block=False)
def test_key_that_the_user_chose(make_executor: Callable[..., Any], store: str) -> None:
    from executorlib import get_future_from_cache

    with make_executor(cache_directory=store) as executor:
        own = {"cache_key": "project/part one"}
        assert executor.submit(add, 1, 2, resource_dict=own).result(WAIT) == 3
        assert finished(store) == ["project/part one_o.h5"]
        # The key decides, whatever the inputs.
        assert executor.submit(add, 5, 5, resource_dict=own).result(WAIT) == 3
    future = get_future_from_cache(store, "project/part one")
    assert future.done()
    assert future.result() == 3
    with pytest.raises(FileNotFoundError):
        get_future_from_cache(store, "project/part two")


@pytest.mark.rows(block=False)
@pytest.mark.parametrize("key", ["../outside", "/tmp/outside", "a/../../outside"])
def test_key_that_leads_out_of_the_directory(make_executor: Callable[..., Any], store: str, key: str) -> None:
    with make_executor(cache_directory=store) as executor:
        with pytest.raises(ValueError, match="cache_key"):
            executor.submit(add, 1, 2, resource_dict={"cache_key": key}).result(WAIT)
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.rows(block=False)
def test_directory_of_one_call(make_executor: Callable[..., Any], store: str) -> None:
    with make_executor() as executor:
        own = {"cache_directory": store}
        assert executor.submit(add, 1, 2, resource_dict=own).result(WAIT) == 3
        assert executor.submit(add, 3, 4).result(WAIT) == 7
    assert len(finished(store)) == 1


def test_failed_calls_are_on_record(make_executor: Callable[..., Any], store: str) -> None:
    from executorlib import get_cache_data

    with make_executor(cache_directory=store) as executor:
        assert isinstance(executor.submit(fail, "on record").exception(WAIT), CustomError)
    rows = get_cache_data(store)
    for row in rows:
        assert "output" not in row
        assert isinstance(row["error"], CustomError)


def test_directory_that_cannot_be_made(make_executor: Callable[..., Any], store: str) -> None:
    Path(store).write_text("a file where the directory should be")
    with pytest.raises(ValueError, match="store"):
        make_executor(cache_directory=store)


@pytest.mark.rows("fork", "spawn")
def test_directory_of_a_call_that_cannot_be_made(make_executor: Callable[..., Any], store: str) -> None:
    Path(store).write_text("a file where the directory should be")
    with make_executor() as executor:
        with pytest.raises(ValueError, match="store"):
            executor.submit(add, 1, 2, resource_dict={"cache_directory": store})
        assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_directory_is_made_with_its_first_entry(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    store = tmp_path / "folder" / "store"
    with make_executor(cache_directory=str(store)) as executor:
        assert not store.parent.exists()
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    assert len(finished(str(store))) == 1


def test_only_results_are_left(row: Any, make_executor: Callable[..., Any], store: str) -> None:
    with make_executor(cache_directory=store) as executor:
        futures = [executor.submit(announce, i) for i in range(3)]
        futures.append(executor.submit(add, futures[0], 1))
        failed = executor.submit(fail, "on purpose")
        assert [future.result(WAIT) for future in futures] == [0, 1, 2, 1]
        assert isinstance(failed.exception(WAIT), CustomError)
    until(lambda: not files(store, "_i.h5"))
    if not (row.block and row.slurm):  # what workers print is elsewhere
        assert [name for name in os.listdir(store) if not name.endswith("_o.h5")] == []
        return

    # Slurm writes it there. Such workers print for many calls, so no entry has it.
    def printed() -> list[str]:
        left = [os.path.join(store, path) for path in files(store, "") if not path.endswith("_o.h5")]
        assert all(os.path.basename(path).startswith("output.") for path in left), left
        return sorted(line for path in left for line in lines(path))

    until(lambda: printed() == [f"I am call {i}" for i in range(3)])


def announce(value: int) -> int:
    sys.stdout.write(f"I am call {value}\n")
    return value


def test_two_executors_at_once(make_executor: Callable[..., Any], store: str) -> None:
    with (
        make_executor(cache_directory=store) as one,
        make_executor(cache_directory=store) as two,
    ):
        futures = [each.submit(identity, i) for i in range(6) for each in (one, two)]
        assert [future.result(WAIT) for future in futures] == [i // 2 for i in range(12)]
    assert len(finished(store)) == 6
    assert not files(store, "_i.h5")


def test_numpy_results(make_executor: Callable[..., Any], store: str) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(10_000.0)
    for _ in range(2):
        with make_executor(cache_directory=store) as executor:
            result = executor.submit(numpy.cumsum, array).result(WAIT)
            assert result[-1] == array.sum()
            assert executor.submit(identity, array[::3]).result(WAIT)[1] == 3.0
    assert len(finished(store)) == 2


def test_without_h5py(row: Any, scripts: Any, store: str, tmp_path: Path) -> None:
    """Only entries of executorlib 1.x need it."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "h5py.py").write_text("raise ModuleNotFoundError(\"No module named 'h5py'\")\n")
    out = scripts.run(
        """
        sys.modules["h5py"] = None  # missing here; in workers it cannot be imported
        for _ in range(2):
            with Executor(**{**OPTIONS, "cache_directory": "store"}) as executor:
                print(executor.submit(abs, -1).result(20))
        """,
        row.arguments(),
        env={"PYTHONPATH": f"{hidden}:{_python_path()}"},
    )
    assert out.split() == ["1", "1"]


def _python_path() -> str:
    import os

    return os.environ.get("PYTHONPATH", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_results_of_strangers_are_not_read(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    """If everybody may write there, a file of another user is an error. The call does not run instead."""
    store, log = tmp_path / "store", str(tmp_path / "log")
    store.mkdir()
    store.chmod(0o1777)
    with make_executor(cache_directory=str(store)) as executor:
        executor.submit(record, log, 1).result(WAIT)
        (path,) = store.glob("*_o.h5")
        os.chown(path, 65534, 65534)
    with make_executor(cache_directory=str(store)) as executor:
        future = executor.submit(record, log, 1)
        with pytest.raises(PermissionError, match=f"{path.name} is not read: .*chmod o-w {store}"):
            future.result(WAIT)
        assert executor.submit(record, log, 2).result(WAIT) == 2
    assert lines(log) == ["1", "2"]


@pytest.mark.rows("fork", "jobs")
def test_classes_of_a_program_in_its_next_run(scripts: Any, row: Any, tmp_path: Path) -> None:
    """To the program they are its own classes: as results, as exceptions, and as inputs of other calls."""
    source = """
        from dataclasses import dataclass

        @dataclass
        class Point:
            x: int

        class TooCold(Exception):
            pass

        def make(x):
            return Point(x)

        def check(point, run):
            return isinstance(point, Point), point == Point(1), run

        def fail():
            raise TooCold

        with Executor(**OPTIONS) as executor:
            point = executor.submit(make, 1)
            checked = executor.submit(check, point, len(os.listdir(OPTIONS["cache_directory"])) > 3)
            print(isinstance(point.result(), Point), point.result() == Point(1), checked.result()[:2])
            try:
                executor.submit(fail).result()
            except TooCold:
                print("caught")
    """
    options = {**row.options, "cache_directory": str(tmp_path / "store")}
    (tmp_path / "store").mkdir()
    for _ in range(2):
        assert scripts.run(source, options).split() == ["True", "True", "(True,", "True)", "caught"]
