"""Entries of the cache directory: written whole or not at all, and read in every form that exists."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import logging
import operator
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import as_user
from executorlib import SingleNodeExecutor, cli, terminate
from executorlib.api import TestClusterExecutor
from executorlib.cache import batch_directory, entries, trust
from executorlib.cache import directory as cache
from executorlib.worker import job
from executorlib.worker.call import Answer
from unit.properties import repeatable

pytestmark = pytest.mark.cache

SECONDS = 20.0  # in which what another process or thread does must be seen


def write(path: Path, **result: Any) -> None:
    """Write the entry of a call of `operator.add`, with its output or error."""
    arguments: dict[str, Any] = {"args": (1,), "kwargs": {"b": 2}, "resource_dict": {"cores": 1}, "runtime": 0.5}
    entries.write_output(path, function=operator.add, **arguments, **result)


def write_plain(path: Path, form: str = "uint8", **values: Any) -> None:
    """Write a file as others do, with h5py alone."""
    import h5py
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            data = value if isinstance(value, bytes) else cloudpickle.dumps(value)
            if form == "void":
                file.create_dataset(name, data=numpy.void(data))
            else:
                file.create_dataset(name, data=numpy.frombuffer(data, numpy.uint8), compression="gzip")


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start an interpreter that knows this package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return out.strip()


def listed(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


# -- one entry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, None, "x" * 3_000_000, b"ends with zeros\0\0", {"a": [1, {2}]}])
def test_a_result_comes_back(tmp_path: Path, value: Any) -> None:
    path = entries.entry_path(tmp_path, "key")
    write(path, output=value)
    assert entries.read_output(path) == entries.Output(value, None, 0.5, {})


def test_an_exception_comes_back(tmp_path: Path) -> None:
    path = entries.entry_path(tmp_path, "key")
    write(path, error=KeyError("why"))
    output = entries.read_output(path)
    assert output is not None
    assert isinstance(output.error, KeyError)
    assert (output.value, output.error.args) == (None, ("why",))


def test_inputs_are_kept_as_they_were(tmp_path: Path) -> None:
    path, values = entries.entry_path(tmp_path, "key"), [[1]]
    inputs = {"args": entries.Snapshot.of(values), "kwargs": entries.Snapshot.of({"a": values})}
    values[0].append(2)
    entries.write_output(path, function=len, **inputs, resource_dict={}, runtime=1.0, output=b"")
    [row] = cache.get_cache_data(tmp_path)
    assert (row["input_args"], row["input_kwargs"], row["output"]) == ([[1]], {"a": [[1]]}, b"")


def test_an_array_comes_back(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    path = entries.entry_path(tmp_path, "key")
    write(path, output=numpy.arange(400_000.0).reshape(2, -1))
    output = entries.read_output(path)
    assert output is not None
    assert (output.value == numpy.arange(400_000.0).reshape(2, -1)).all()


def test_datasets_are_rows_of_gzipped_bytes(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = entries.entry_path(tmp_path, "key")
    write(path, output=3)
    with h5py.File(path) as file:
        values = {name: pickle.loads(dataset[()].tobytes()) for name, dataset in file.items()}
        assert all((each.ndim, each.dtype.str, each.compression) == (1, "|u1", "gzip") for each in file.values())
    assert values == {
        "function": operator.add,
        "input_args": [1],
        "input_kwargs": {"b": 2},
        "resource_dict": {"cores": 1},
        "output": 3,
        "runtime": 0.5,
    }


@pytest.mark.parametrize("form", ["uint8", "void"])
def test_files_of_others_load(tmp_path: Path, form: str) -> None:
    write_plain(tmp_path / "done_o.h5", form, function=operator.add, input_args=(1,), output=b"\x80\x04K\x03.\0\0")
    assert entries.read_output(tmp_path / "done_o.h5") == entries.Output(3, None, None, {})
    write_plain(tmp_path / "failed_o.h5", form, error=ValueError("x"), runtime=1.0, error_log_file="log")
    output = entries.read_output(tmp_path / "failed_o.h5")
    assert output is not None
    assert str(output.error) == "x"
    rows = cache.get_cache_data(tmp_path)
    assert [sorted(row) for row in rows] == [
        ["filename", "function", "input_args", "output"],
        ["error", "error_log_file", "filename", "runtime"],
    ]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", ["uint8", "void"])
def test_a_job_that_executorlib_1_submitted_is_followed(tmp_path: Path, form: str) -> None:
    values = {"function": operator.add, "input_args": [1], "input_kwargs": {"b": 2}, "error_log_file": None}
    write_plain(tmp_path / "a_i.h5", form, **values, resource_dict={"cores": 1}, queue_id=17)
    [row] = cache.get_cache_data(tmp_path)
    assert row == {**values, "resource_dict": {"cores": 1}, "queue_id": 17, "filename": str(tmp_path / "a_i.h5")}
    future = cache.get_future_from_cache(tmp_path, "a")
    (tmp_path / "a_i.h5").rename(tmp_path / "a_r.h5")
    write_plain(tmp_path / "new", form, **values, output=3, runtime=0.5)
    (tmp_path / "new").rename(tmp_path / "a_o.h5")
    assert future.result(timeout=SECONDS) == 3


def test_inputs_that_executorlib_1_stored_as_references_to_files_load(tmp_path: Path) -> None:
    module = types.ModuleType("executorlib.task_scheduler.file.shared")

    class FutureItem:
        def __init__(self, path: Path, selector: Any) -> None:
            self._file_name, self._selector = str(path), selector

    FutureItem.__module__, FutureItem.__qualname__ = module.__name__, "FutureItem"
    module.FutureItem = FutureItem  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        inputs = [FutureItem(tmp_path / "a_o.h5", None), FutureItem(tmp_path / "a_o.h5", 1)]
        write_plain(tmp_path / "b_i.h5", input_args=pickle.dumps(inputs))
    finally:
        del sys.modules[module.__name__]
    [row] = cache.get_cache_data(tmp_path)
    whole, part = row["input_args"]
    assert (whole.done(), repr(whole)) == (False, f"StoredResult({str(tmp_path / 'a_o.h5')!r})")
    with pytest.raises(FileNotFoundError, match="has no result yet"):
        whole.result()
    write(tmp_path / "a_o.h5", output=[1, 2])
    assert (whole.done(), whole.result(), part.result()) == (True, [1, 2], 2)
    write(tmp_path / "a_o.h5", error=KeyError("why"))
    with pytest.raises(KeyError, match="why"):
        part.result()


def test_the_path_of_an_entry(tmp_path: Path) -> None:
    assert entries.entry_path(tmp_path, "key") == tmp_path / "key_o.h5"
    assert entries.entry_path(str(tmp_path), "a/b.c/key", "i") == tmp_path / "a/b.c/key_i.h5"
    path = entries.entry_path(tmp_path, "k" * 250)
    write(path, output=1)
    assert entries.read_output(path) == entries.Output(1, None, 0.5, {})


@pytest.mark.parametrize("key", ["", "/key", "../key", "a/../../key", "a/..", "..", ".", "./key", "a//b", "a/", "a\0b"])
def test_keys_that_lead_out_of_the_directory_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="does not name a file inside the cache directory"):
        entries.entry_path(tmp_path, key)


@pytest.mark.parametrize("key", ["k" * 251, "é" * 126, "k" * 256 + "/key"])
def test_keys_that_are_too_long_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="too long for a file name"):
        entries.entry_path(tmp_path, key)


def test_a_missing_entry_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert entries.read_output(tmp_path / "no_o.h5") is None
    assert entries.read_output(tmp_path / "no" / "no_o.h5") is None
    assert entries.read_output(tmp_path / "file" / "no_o.h5") is None
    assert not caplog.records


def damaged_files(path: Path) -> Iterator[bytes]:
    write(path, output=list(range(1000)))
    whole = path.read_bytes()
    yield from (b"", b"junk", b"\0" * 5000)
    yield from (whole[: len(whole) * part // 8] for part in range(1, 8))
    yield whole[: len(whole) // 8] + b"\0" * (len(whole) - len(whole) // 8)
    for values in ({}, {"output": b"junk"}, {"output": b"cno_module_of_this_name\nx\n."}, {"runtime": 1.0}):
        write_plain(path, **values)
        yield path.read_bytes()


def test_a_damaged_entry_is_absent_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = entries.entry_path(tmp_path, "key")
    for content in damaged_files(path):
        path.write_bytes(content)
        caplog.clear()
        assert entries.read_output(path) is None
        [record] = caplog.records
        assert (record.name, record.levelno) == ("executorlib", logging.WARNING)
        assert str(path) in record.getMessage()
        write(path, output=1)
        assert entries.read_output(path) == entries.Output(1, None, 0.5, {})
        assert listed(tmp_path) == ["key_o.h5"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = entries.entry_path(tmp_path, "key")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_with_little_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            write(path, output=os.urandom(2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(OSError, match="too large"):
        write_with_little_space()
    assert listed(tmp_path) == []
    write(path, output=2)
    with pytest.raises(OSError, match="too large"):
        write_with_little_space()
    assert listed(tmp_path) == ["key_o.h5"]
    assert entries.read_output(path) == entries.Output(2, None, 0.5, {})


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lock"):
        write(tmp_path / "key_o.h5", output=threading.Lock())
    (tmp_path / "folder_o.h5").mkdir()
    with pytest.raises(OSError, match="folder_o"):
        write(tmp_path / "folder_o.h5", output=1)
    assert listed(tmp_path) == []


def test_entries_are_for_all_who_may_use_the_directory(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write(tmp_path / "a" / "key_o.h5", output=1)
    finally:
        os.umask(umask)
    assert (tmp_path / "a" / "key_o.h5").stat().st_mode & 0o777 == 0o640


def test_locks_do_not_matter(tmp_path: Path) -> None:
    path = entries.entry_path(tmp_path, "key")
    write(path, output=1)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert entries.read_output(path) == entries.Output(1, None, 0.5, {})
        write(path, output=2)
    assert entries.read_output(path) == entries.Output(2, None, 0.5, {})


def test_a_look_up_lists_no_directory(tmp_path: Path) -> None:
    write(tmp_path / "a" / "done_o.h5", output=1)
    write_plain(tmp_path / "a" / "runs_i.h5", function=len)
    code = """
    import sys
    from executorlib import SingleNodeExecutor; from executorlib.cache import directory as cache, entries

    def look(event, arguments):
        if event in ("os.listdir", "os.scandir") and str(arguments[0]).startswith(sys.argv[1]):
            listed.append(arguments)

    listed = []
    sys.addaudithook(look)
    results = [
        entries.read_output(entries.entry_path(sys.argv[1], "a/done")).value,
        entries.read_output(entries.entry_path(sys.argv[1], "a/no")),
        cache.get_future_from_cache(sys.argv[1], "a/done").result(),
        cache.get_future_from_cache(sys.argv[1], "a/runs").done(),
    ]
    with SingleNodeExecutor(cache_directory=sys.argv[1]) as executor:
        futures = [executor.submit(len, "xx", resource_dict={"cache_key": key}) for key in ("a/done", "a/no")]
    print([*results, *(future.result() for future in futures)], listed)
    """
    assert output_of(run(code, tmp_path)) == "[1, None, 1, False, 1, 2] []"
    assert listed(tmp_path) == ["a/done_o.h5", "a/no_o.h5", "a/runs_i.h5"]


def test_many_processes_use_one_entry_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = entries.entry_path(tmp_path, "key")
    code = """
    import sys
    from executorlib.cache import directory as cache, entries
    path, number = sys.argv[1], int(sys.argv[2])
    for size in range(1, 25):
        value = bytes([number]) * (size * 4000)
        arguments = dict(args=(), kwargs={}, resource_dict={}, runtime=1.0)
        entries.write_output(path, function=len, output=value, **arguments)
        output = entries.read_output(path)
        assert output is not None and len(set(output.value)) == 1, output
    """
    writers = [run(code, path, number) for number in range(3)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        output = entries.read_output(path)
        assert output is None or len(set(output.value)) == 1
        seen += output is not None
    for writer in writers:
        output_of(writer)
    assert seen
    assert not caplog.records
    assert listed(tmp_path) == ["key_o.h5"]


# -- what users call ---------------------------------------------------------------------------------------------------


def test_cache_data_has_a_row_for_each_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "b_o.h5", output=3)
    write(tmp_path / "folder" / "c_o.h5", error=KeyError("why"))
    write_plain(tmp_path / "a_i.h5", function=len, input_args=[1], queue_id=17)
    write_plain(tmp_path / "other.h5", function=len)
    (tmp_path / "damaged_o.h5").write_bytes(b"junk")
    waiting, done, failed = cache.get_cache_data(tmp_path)
    assert waiting == {"function": len, "input_args": [1], "queue_id": 17, "filename": str(tmp_path / "a_i.h5")}
    assert done == {
        "function": operator.add,
        "input_args": [1],
        "input_kwargs": {"b": 2},
        "output": 3,
        "resource_dict": {"cores": 1},
        "runtime": 0.5,
        "filename": str(tmp_path / "b_o.h5"),
    }
    assert isinstance(failed.pop("error"), KeyError)
    assert failed["filename"] == str(tmp_path / "folder" / "c_o.h5")
    assert ["damaged_o.h5" in record.getMessage() for record in caplog.records] == [True]


def test_cache_data_of_no_directory_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert cache.get_cache_data(tmp_path / "no") == []
    assert cache.get_cache_data(str(tmp_path)) == []


def test_cache_data_gives_absolute_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a_o.h5", output=3)
    monkeypatch.chdir(tmp_path)
    assert [row["filename"] for row in cache.get_cache_data(".")] == [str(tmp_path / "a_o.h5")]


def test_a_future_of_an_entry_that_is_done(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b_o.h5", output=3)
    future = cache.get_future_from_cache(tmp_path, "a/b")
    assert isinstance(future, concurrent.futures.Future)
    assert future.done()
    assert future.result() == 3


def test_the_exception_of_an_entry_is_raised(tmp_path: Path) -> None:
    write(tmp_path / "a_o.h5", error=KeyError("why"))
    with pytest.raises(KeyError, match="why"):
        cache.get_future_from_cache(tmp_path, "a")


def test_a_future_of_no_entry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no entry 'a'; get_cache_data\(\) lists"):
        cache.get_future_from_cache(tmp_path, "a")
    with pytest.raises(ValueError, match="inside the cache directory"):
        cache.get_future_from_cache(tmp_path, "../a")


def test_the_names_of_datasets_are_read_without_what_they_hold(tmp_path: Path) -> None:
    write_plain(tmp_path / "a_o.h5", function=b"junk", error=b"junk")
    (tmp_path / "damaged_o.h5").write_bytes(b"junk")
    assert entries.datasets_of(tmp_path / "a_o.h5") == {"function", "error"}
    assert entries.datasets_of(tmp_path / "damaged_o.h5") == entries.datasets_of(tmp_path / "no_o.h5") == set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_POLL_SECONDS", 0.01)


def watchers() -> int:
    return sum(thread.name == "executorlib-cache" for thread in threading.enumerate())


def start_entry(directory: Path, key: str = "a", suffix: str = "i") -> concurrent.futures.Future[Any]:
    write_plain(directory / f"{key}_{suffix}.h5", function=len)
    future = cache.get_future_from_cache(directory, key)
    assert not future.done()
    return future


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("suffix", ["i", "r"])
def test_a_future_of_a_running_entry_resolves(tmp_path: Path, suffix: str) -> None:
    future = start_entry(tmp_path, suffix=suffix)
    (tmp_path / f"a_{suffix}.h5").rename(tmp_path / "a_r.h5")
    code = """
    import sys
    from executorlib.cache import directory as cache, entries
    entries.write_output(sys.argv[1], function=len, args=(), kwargs={}, resource_dict={}, runtime=1.0, output=3)
    """
    writer = run(code, tmp_path / "a_o.h5")
    assert future.result(timeout=SECONDS) == 3
    output_of(writer)


@pytest.mark.usefixtures("quick")
def test_a_future_of_a_running_entry_gets_the_exception(tmp_path: Path) -> None:
    future = start_entry(tmp_path)
    write(tmp_path / "a_o.h5", error=KeyError("why"))
    assert isinstance(future.exception(timeout=SECONDS), KeyError)


@pytest.mark.usefixtures("quick")
def test_a_future_of_an_entry_that_ends_damaged_says_so(tmp_path: Path) -> None:
    future = start_entry(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "junk").replace(tmp_path / "a_o.h5")
    error = future.exception(timeout=SECONDS)
    assert isinstance(error, OSError)
    assert "a_o.h5 is damaged, or holds a result that was not kept" in str(error)


@pytest.mark.usefixtures("quick")
def test_a_future_of_an_entry_that_is_removed_becomes_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_GONE_SECONDS", 0.02)
    future = start_entry(tmp_path)
    terminate.terminate_task_in_cache(tmp_path, "a")
    assert concurrent.futures.wait([future], timeout=SECONDS).done
    assert future.cancelled()


@pytest.mark.usefixtures("quick")
def test_one_thread_serves_all_futures_and_ends_with_the_last(tmp_path: Path) -> None:
    futures = [start_entry(tmp_path, str(number)) for number in range(5)]
    assert watchers() == 1
    [watcher] = [thread for thread in threading.enumerate() if thread.name == "executorlib-cache"]
    for number, future in enumerate(futures[:4]):
        write(tmp_path / f"{number}_o.h5", output=number)
        assert future.result(timeout=SECONDS) == number
    assert futures[4].cancel()
    assert concurrent.futures.wait(futures, timeout=SECONDS).done == set(futures)
    watcher.join(SECONDS)
    assert watchers() == 0
    assert (tmp_path / "4_i.h5").exists()
    again = cache.get_future_from_cache(tmp_path, "4")
    write(tmp_path / "4_o.h5", output=4)
    assert again.result(timeout=SECONDS) == 4


@pytest.mark.usefixtures("quick")
def test_callbacks_may_ask_for_further_entries(tmp_path: Path) -> None:
    first, done = start_entry(tmp_path), threading.Event()
    write_plain(tmp_path / "b_i.h5", function=len)

    def follow(_: Any) -> None:
        cache.get_future_from_cache(tmp_path, "b").add_done_callback(lambda _: done.set())

    first.add_done_callback(follow)
    write(tmp_path / "a_o.h5", output=1)
    assert first.result(timeout=SECONDS) == 1
    write(tmp_path / "b_o.h5", output=1)
    assert done.wait(SECONDS)


def test_waiting_for_an_entry_does_not_keep_the_interpreter_alive(tmp_path: Path) -> None:
    write_plain(tmp_path / "a_i.h5", function=len)
    code = """
    import sys
    from executorlib.cache.directory import get_future_from_cache
    print(get_future_from_cache(sys.argv[1], "a").done())
    """
    assert output_of(run(code, tmp_path)) == "False"


def test_a_forked_process_can_wait_for_entries_of_its_own(tmp_path: Path) -> None:
    write_plain(tmp_path / "a_i.h5", function=len)
    code = """
    import os, sys, warnings
    from executorlib.cache import directory as cache, entries
    warnings.simplefilter("ignore")
    parents = cache.get_future_from_cache(sys.argv[1], "a")
    cache._watcher._lock.acquire()
    if os.fork() == 0:
        future = cache.get_future_from_cache(sys.argv[1], "a")
        path = entries.entry_path(sys.argv[1], "a")
        entries.write_output(path, function=len, args=(), kwargs={}, resource_dict={}, runtime=1.0, output=3)
        os._exit(future.result(timeout=10))
    cache._watcher._lock.release()
    print(os.waitstatus_to_exitcode(os.wait()[1]), parents.result(timeout=10))
    """
    assert output_of(run(code, tmp_path)) == "3 3"


def test_terminating_removes_what_waits_and_leaves_what_is_done(tmp_path: Path) -> None:
    write_plain(tmp_path / "a_i.h5", function=len, queue_id=None)
    write_plain(tmp_path / "folder" / "b_i.h5", function=len)
    write_plain(tmp_path / "c_i.h5", function=len, queue_id=17)
    write(tmp_path / "c_o.h5", output=3)
    (tmp_path / "damaged_i.h5").write_bytes(b"junk")
    terminate.terminate_tasks_in_cache(tmp_path)
    assert listed(tmp_path) == ["c_i.h5", "c_o.h5"]
    terminate.terminate_tasks_in_cache(tmp_path / "no")


def test_terminating_one_entry(tmp_path: Path) -> None:
    for name in ("a", "folder/b"):
        write_plain(tmp_path / f"{name}_i.h5", function=len)
    write(tmp_path / "c_o.h5", output=3)
    terminate.terminate_task_in_cache(tmp_path, "folder/b")
    terminate.terminate_task_in_cache(tmp_path, "c")
    assert listed(tmp_path) == ["a_i.h5", "c_o.h5"]
    with pytest.raises(FileNotFoundError, match="no entry 'b'"):
        terminate.terminate_task_in_cache(tmp_path, "b")


def fake_scancel(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> Path:
    """A scancel that notes what it was told; returns the file."""
    said = folder / "cancelled"
    program = folder / "bin" / "scancel"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\necho no controller >&2\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return said


def test_terminating_cancels_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fake_scancel(tmp_path, monkeypatch, 0)
    store = tmp_path / "store"
    write_plain(store / "a_i.h5", function=len, queue_id=None)
    write_plain(store / "b_i.h5", function=len, queue_id=17)
    batch = store / batch_directory.FOLDER / "batch"
    batch.mkdir(parents=True)
    batch.joinpath(batch_directory.OWNER_FILE).write_text('{"system": "Slurm"}')
    batch.joinpath(batch_directory.JOB_ID_FILE).write_text("18")
    batch.joinpath(batch_directory.ENTRIES_FILE).write_text(f"0 {store}/c_i.h5\n1 {store}/d_i.h5\n")
    for name in ("c", "d"):
        write_plain(store / f"{name}_i.h5", function=len, batch=str(batch))
    write(store / "c_o.h5", output=3)
    terminate.terminate_tasks_in_cache(str(store))
    assert said.read_text() == "--quiet 17 18_[1]\n"
    assert [name for name in listed(store) if name.endswith("_i.h5")] == ["c_i.h5"]


@pytest.mark.parametrize(
    ("noted", "configured", "cancels"),
    [
        ("Slurm", "a", True),
        ("Slurm cluster a", "a", True),
        ("Slurm cluster b", "a", False),
        ("Slurm cluster a", "", False),
        ("the queue", "a", False),
    ],
)
def test_terminating_cancels_no_other_systems_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: str, configured: str, cancels: bool
) -> None:
    """On another cluster, the job's number belongs to somebody else's job."""
    said = fake_scancel(tmp_path, monkeypatch, 0)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'ClusterName             = {configured}'\n")
    scontrol.chmod(0o755)
    store = tmp_path / "store"
    batch = store / batch_directory.FOLDER / "batch"
    batch.mkdir(parents=True)
    batch.joinpath(batch_directory.OWNER_FILE).write_text(f'{{"system": "{noted}"}}')
    batch.joinpath(batch_directory.JOB_ID_FILE).write_text("18")
    batch.joinpath(batch_directory.ENTRIES_FILE).write_text(f"0 {store}/c_i.h5\n")
    write_plain(store / "c_i.h5", function=len, batch=str(batch))
    if cancels:
        terminate.terminate_tasks_in_cache(store)
        assert said.read_text() == "--quiet 18\n"
    else:
        with pytest.raises(ValueError, match=f"submitted to {noted}, but .* nothing was cancelled"):
            terminate.terminate_tasks_in_cache(store)
        assert not said.exists()
    assert (store / "c_i.h5").exists() is not cancels


def test_entries_stay_where_their_jobs_cannot_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scancel(tmp_path, monkeypatch, 1)
    store = tmp_path / "store"
    write_plain(store / "b_i.h5", function=len, queue_id=17)
    with pytest.raises(RuntimeError, match=r"could not be cancelled .*no controller"):
        terminate.terminate_task_in_cache(store, "b", backend="slurm")
    with pytest.raises(ValueError, match="backend is 'lsf'"):
        terminate.terminate_tasks_in_cache(store, backend="lsf")
    assert listed(store) == ["b_i.h5"]


# -- without h5py ------------------------------------------------------------------------------------------------------


def test_missing_h5py_is_an_error_that_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = entries.entry_path(tmp_path, "key")
    write_plain(path, function=len, output=1)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (
        lambda: entries.read_output(path),
        lambda: entries.read_entry(path),
        lambda: entries.datasets_of(path),
        lambda: cache.get_cache_data(tmp_path),
        lambda: cache.get_future_from_cache(tmp_path, "key"),
    ):
        with pytest.raises(ImportError, match=r'pip install "executorlib\[cache\]"'):
            call()


def test_importing_the_module_loads_neither_h5py_nor_numpy() -> None:
    code = (
        "import executorlib.cache.directory, json, sys; "
        "print(json.dumps([n in sys.modules for n in ('h5py', 'numpy')]))"
    )
    assert json.loads(output_of(run(code))) == [False, False]


# The owners whose files are read.

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def folder_for(folder: Path, mode: int) -> Path:
    folder.mkdir(exist_ok=True)
    folder.chmod(mode)
    return folder


def give_away(root: Path, *paths: Path) -> None:
    """Make files, and the folders that they are in below the root, a stranger's."""
    for path in paths:
        for part in (path, *path.parents):
            if part == root:
                break
            os.chown(part, STRANGER, STRANGER)


@needs_root
@pytest.mark.parametrize("mode", [0o777, 0o1777])
@pytest.mark.parametrize("key", ["a", "sub/folder/a"])
def test_files_of_strangers_are_not_unpickled(tmp_path: Path, mode: int, key: str) -> None:
    """If everybody may write there, a stranger can have made the file and its folder."""
    store = folder_for(tmp_path / "store", mode)
    path, waiting = entries.entry_path(store, key), str(entries.entry_path(store, key, "i"))
    call: dict[str, Any] = {"function": abs, "input_args": [1], "input_kwargs": {}, "resource_dict": {}}
    assert entries.write_input(waiting, call)
    give_away(store, Path(waiting))
    with pytest.raises(PermissionError, match=f"{store}/.* is not .*to nobody, and everybody may write to {store}"):
        entries.read_input(waiting, str(store))
    with pytest.raises(PermissionError, match="is not "):
        terminate.terminate_task_in_cache(store, key)
    assert Path(waiting).exists()
    shutil.rmtree(store)
    folder_for(store, mode)
    write(path, output=3)
    give_away(store, path)
    reference = pickle.dumps(entries.ResultOf(str(path), (), entries.root_of(str(path), key)))
    for read in (
        lambda: cache.get_future_from_cache(store, key),
        lambda: cache.get_cache_data(store),
        lambda: entries.read_entry(path, store),
        lambda: entries.read_ending(str(path), str(store)),
        lambda: pickle.loads(reference),
    ):
        with pytest.raises(PermissionError, match=f"chmod o-w {store}"):
            read()


@needs_root
def test_future_of_a_file_that_a_stranger_puts_there(tmp_path: Path) -> None:
    store = folder_for(tmp_path / "store", 0o1777)
    call: dict[str, Any] = {"function": abs, "input_args": [1], "input_kwargs": {}, "resource_dict": {}}
    assert entries.write_input(str(entries.entry_path(store, "a", "i")), call)
    future = cache.get_future_from_cache(store, "a")
    elsewhere = tmp_path / "planted"
    write(elsewhere, output=3)
    give_away(tmp_path, elsewhere)
    elsewhere.rename(entries.entry_path(store, "a"))
    assert isinstance(future.exception(SECONDS), PermissionError)


@needs_root
@pytest.mark.parametrize("theirs", [False, True])
def test_files_of_writers_whom_the_owner_admits(tmp_path: Path, theirs: bool) -> None:
    """This includes a group that this user is in, even if the cache directory is in a folder for everybody."""
    store = folder_for(folder_for(tmp_path / "scratch", 0o1777) / "store", 0o2775)
    path = entries.entry_path(store, "sub/a")
    write(path, output=3)
    give_away(store, path)
    if theirs:
        os.chown(store, STRANGER, os.getegid())
    assert cache.get_future_from_cache(store, "sub/a").result() == 3
    assert [row["output"] for row in cache.get_cache_data(store)] == [3]


@pytest.mark.parametrize("link", [False, True])
def test_own_files_where_everybody_may_write(tmp_path: Path, link: bool) -> None:
    store = folder_for(tmp_path / "store", 0o777)
    if link:
        store = tmp_path / "link"
        store.symlink_to("store")
    write(entries.entry_path(store, "sub/a"), output=3)
    assert cache.get_future_from_cache(store, "sub/a").result() == 3
    assert [row["output"] for row in cache.get_cache_data(store)] == [3]


@needs_root
def test_a_change_of_the_mode_is_seen(tmp_path: Path) -> None:
    store = folder_for(tmp_path / "store", 0o755)
    path = entries.entry_path(store, "a")
    write(path, output=3)
    give_away(store, path)
    assert entries.read_output(path, store) is not None
    store.chmod(0o757)
    with pytest.raises(PermissionError):
        entries.read_output(path, store)


def test_nobody_else_can_write_to_new_files(tmp_path: Path) -> None:
    """Even with a umask that would let everybody write."""
    before = os.umask(0)
    try:
        write(tmp_path / "a_o.h5", output=3)
        assert entries.write_input(str(tmp_path / "b_i.h5"), {"function": abs})
        batch = Path(batch_directory.make(str(tmp_path), "batch"))
        entries.take_over(str(tmp_path / "b_i.h5"), "it")
    finally:
        os.umask(before)
    made = [tmp_path / "a_o.h5", batch, batch.parent, *batch.parent.iterdir()]
    assert [path for path in made if path.stat().st_mode & 0o002] == []


@pytest.mark.timeout(SECONDS)
def test_pipe_in_the_place_of_a_file(tmp_path: Path) -> None:
    """Nobody writes to it, so waiting for data would never end."""
    os.mkfifo(tmp_path / "a_o.h5")
    assert entries.read_output(tmp_path / "a_o.h5") is None
    assert entries.datasets_of(tmp_path / "a_o.h5") == set()


def test_programs_of_jobs_where_everybody_may_write(tmp_path: Path) -> None:
    """In a folder without the sticky bit, anybody can replace the files."""
    store = folder_for(tmp_path / "store", 0o777)
    with pytest.raises(PermissionError, match=f"jobs are not run from .*chmod o-w {store}"):
        batch_directory.make(str(store), "batch")
    store.chmod(0o1777)
    assert Path(batch_directory.make(str(store), "batch")).is_dir()


@needs_root
def test_programs_of_jobs_in_a_folder_of_a_stranger(tmp_path: Path) -> None:
    store = folder_for(tmp_path / "store", 0o1777)
    folder = folder_for(store / batch_directory.FOLDER, 0o755)
    give_away(store, folder)
    with pytest.raises(PermissionError, match="belongs to nobody"):
        batch_directory.make(str(store), "batch")
    assert not list(folder.iterdir())


@needs_root
@pytest.mark.parametrize(
    "name",
    [batch_directory.SETUP_FILE, batch_directory.OWNER_FILE, batch_directory.ENTRIES_FILE, batch_directory.JOB_ID_FILE],
)
def test_files_of_batches_that_a_stranger_put_there(tmp_path: Path, name: str) -> None:
    store = folder_for(tmp_path / "store", 0o1777)
    batch = Path(batch_directory.make(str(store), "batch"))
    path = entries.entry_path(store, "a", "i")
    call: dict[str, Any] = {"function": abs, "input_args": [1], "input_kwargs": {}, "resource_dict": {}}
    assert entries.write_input(str(path), {**call, "batch": str(batch)})
    (batch / batch_directory.SETUP_FILE).write_bytes(pickle.dumps({"system": "none"}))
    (batch / batch_directory.OWNER_FILE).write_text('{"system": "Slurm"}')
    (batch / batch_directory.ENTRIES_FILE).write_text(f"0 {path}\n")
    (batch / batch_directory.JOB_ID_FILE).write_text("7")
    assert cache.job_of(str(path), store) == ("7", None, "Slurm")
    give_away(batch, batch / name)
    with pytest.raises(PermissionError, match=f"{name} is not read"):
        job.run(str(batch), 0) if name == batch_directory.SETUP_FILE else cache.job_of(str(path), store)


# Links, and what else is in the place of files and folders.


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("target", ["b_o.h5", "/dev/zero", "nowhere"])
def test_links_in_the_place_of_entries(tmp_path: Path, target: str) -> None:
    """One leads to another call's result of the same owner, the other to an endless file of root's."""
    write(entries.entry_path(tmp_path, "b"), output="of another call")
    entries.entry_path(tmp_path, "a").symlink_to(target)
    for read in (
        lambda: cache.get_future_from_cache(tmp_path, "a"),
        lambda: cache.get_cache_data(tmp_path),
        lambda: entries.read_output(tmp_path / "a_o.h5"),
    ):
        with pytest.raises(PermissionError, match="is not used: it is a symbolic link"):
            read()
    assert entries.datasets_of(tmp_path / "a_o.h5") == set()


def test_links_in_the_place_of_folders(tmp_path: Path) -> None:
    """Nothing is read, written or removed through them, but a link to the cache directory itself is followed."""
    elsewhere, real = folder_for(tmp_path / "elsewhere", 0o755), folder_for(tmp_path / "real", 0o755)
    store = tmp_path / "store"
    store.symlink_to(real)
    write(elsewhere / "a_o.h5", output=3)
    (elsewhere / "a_i.h5").touch()
    write(entries.entry_path(store, "sub/a"), output=4)
    assert cache.get_future_from_cache(store, "sub/a").result() == 4
    (store / "link").symlink_to(elsewhere)
    path = str(entries.entry_path(store, "link/a", "i"))
    before = sorted(elsewhere.iterdir())
    for step in (
        lambda: cache.get_future_from_cache(store, "link/a"),
        lambda: entries.write_input(path, {"function": abs}, str(store)),
        lambda: entries.write_pickles(entries.output_of(path), {"output": b"1"}, str(store)),
        lambda: entries.remove_input(path, str(store)),
        lambda: entries.take_over(path, "it", root=str(store)),
    ):
        with pytest.raises(PermissionError, match="link is not used: it is a symbolic link"):
            step()
    assert sorted(elsewhere.iterdir()) == before


def test_growing_file_is_read_to_its_present_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows all the time has no end."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    status = os.stat(path)
    real = os.fstat

    def grows(fd: int) -> os.stat_result:
        found = real(fd)
        if found.st_ino == status.st_ino:
            with path.open("ab") as file:
                file.write(b"more")
        return found

    monkeypatch.setattr(os, "fstat", grows)
    assert trust.read(path) == b"0123456789"
    assert trust.read(path, last=3) == b"ore"


def test_a_claim_whose_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of NFS asks again, and its server says that the link is there already."""
    real = os.link

    def link(source: str, target: str, **keywords: Any) -> None:
        real(source, target, **keywords)
        raise FileExistsError

    monkeypatch.setattr(os, "link", link)
    assert entries.write_input(str(tmp_path / "a_i.h5"), {"function": abs})
    monkeypatch.undo()
    assert not entries.write_input(str(tmp_path / "a_i.h5"), {"function": abs})
    assert [path.name for path in tmp_path.iterdir()] == ["a_i.h5"]


def test_results_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("fdatasync" if hasattr(os, "fdatasync") else "fsync", "rename"):
        real = getattr(os, name)

        def step(*args: Any, name: str = name, real: Any = real, **keywords: Any) -> None:
            steps.append(name)
            real(*args, **keywords)

        monkeypatch.setattr(os, name, step)
    write(tmp_path / "a_o.h5", output=1)
    assert [step.replace("fdata", "f") for step in steps] == ["fsync", "rename"]
    steps.clear()
    entries.write_pickles(str(tmp_path / "b_o.h5"), {"output": b"1"})
    assert [step.replace("fdata", "f") for step in steps] == ["fsync", "rename"]


# Directories of strangers.


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o775, 0o777, 0o1777])
def test_the_directory_of_a_stranger(tmp_path: Path, mode: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in it is unpickled, whoever owns the file."""
    store = folder_for(tmp_path / "store", mode)
    entries.write_pickles(str(store / "a_o.h5"), {"output": pickle.dumps(Trace(tmp_path / "trace"))})
    os.chown(store, STRANGER, STRANGER)
    for read in (
        lambda: cache.get_future_from_cache(store, "a"),
        lambda: cache.get_cache_data(store),
        lambda: batch_directory.make(str(store), batch_directory.new_name()),
    ):
        with pytest.raises(PermissionError, match=f"{store} is not used as a cache directory: it belongs to nobody"):
            read()
    for row in (SingleNodeExecutor, TestClusterExecutor):
        with pytest.raises(ValueError, match="it belongs to nobody"):
            row(cache_directory=store)
        with row(cache_directory=tmp_path / "own") as executor, pytest.raises(ValueError, match="it belongs to nobody"):
            executor.submit(abs, -1, resource_dict={"cache_directory": str(store)})
    for command in (["ls"], ["show", "a"], ["rm", "a"], ["prune"]):
        assert cli.main(["cache", *command, "-d", str(store)]) == 1
        assert "it belongs to nobody" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()
    assert [path.name for path in store.iterdir()] == ["a_o.h5"]


class Trace:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@needs_root
@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [
        (1, 0o2755, "belongs to daemon|belongs to user 1"),
        (1, 0o2775, "^3$"),  # of the reader's group
        (0, 0o755, "^3$"),
        (STRANGER, 0o755, "^3$"),  # the reader's own
    ],
)
def test_directories_are_read_only_if_their_owner_is_trusted(for_all: Path, owner: int, mode: int, said: str) -> None:
    store = folder_for(for_all / "store", 0o755)
    write(store / "a_o.h5", output=3)
    os.chown(store, owner, STRANGER)
    store.chmod(mode)
    text = as_user(STRANGER, "cache.get_cache_data(sys.argv[1])[0]['output']", store)
    assert re.search(said, text), text


def test_a_server_that_takes_this_user_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``root_squash``: all files of this process, even its cache directory, belong to another user."""
    write(tmp_path / "a_o.h5", output=3)
    monkeypatch.setattr(os, "geteuid", lambda: 1_000_000)
    monkeypatch.setattr(trust, "is_trusted", lambda owner: owner == 1_000_000)
    monkeypatch.setattr(trust, "_is_shared", lambda top, status: False)
    monkeypatch.setattr(trust, "_own_names", {})
    output = entries.read_output(tmp_path / "a_o.h5", tmp_path)
    assert output is not None
    assert output.value == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a_o.h5"]
    assert trust.is_own(os.stat(tmp_path))


def test_asking_whether_something_is_there_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a_o.h5", output=1)
    (tmp_path / "link").symlink_to("nowhere")
    for name, there in (("a_o.h5", True), ("link", True), (".", True), ("b_o.h5", False), ("no/folder/at/all", False)):
        assert trust.is_there(str(tmp_path / name)) is there
        assert trust.is_there(str(tmp_path / name)) is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_o.h5", "link"]


def test_a_cache_directory_that_a_link_leads_to_can_be_asked(tmp_path: Path) -> None:
    store, link = tmp_path / "store", tmp_path / "link"
    store.mkdir()
    link.symlink_to(store)
    assert not trust.is_there(str(link / "a_o.h5"))
    with pytest.raises(FileNotFoundError, match="has no entry"):
        cache.get_future_from_cache(link, "a")
    assert not list(store.iterdir())
    write(store / "a_o.h5", output=1)
    assert trust.is_there(str(link / "a_o.h5"))
    assert cache.get_future_from_cache(link, "a").result() == 1


def test_result_that_appears_late_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system, which remembered that it was not there."""
    path = tmp_path / "a_o.h5"
    is_there = trust.is_there

    def ask(asked: str) -> bool:
        write(path, output=3)
        return is_there(asked)

    monkeypatch.setattr(trust, "is_there", ask)
    assert pickle.loads(pickle.dumps(entries.ResultOf(str(path)))) == 3


def test_inputs_that_were_stored_before_the_modules_were_put_into_folders(tmp_path: Path) -> None:
    """They name a module by its older name. Both reading an entry and a waiting job must find it."""
    write(tmp_path / "a_o.h5", output=3)
    where = (str(tmp_path / "a_o.h5"), (), str(tmp_path), None)
    reference = b"cexecutorlib.entries\n_load_result\n" + pickle.dumps(where, 0).removesuffix(b".") + b"R"
    stored = entries.Snapshot(b"]" + reference + b"a.")
    waiting = str(entries.entry_path(tmp_path, "b", "i"))
    call: dict[str, Any] = {"function": abs, "input_args": stored, "input_kwargs": {}, "resource_dict": {}}
    assert entries.write_input(waiting, call)
    found = entries.read_entry(waiting)
    assert found is not None
    assert [type(each) for each in found["input_args"]] == [entries.ResultOf]
    assert pickle.loads(stored) == [3]
    assert entries.load_with_names(stored) == [entries.name_of_result("a", ())]


def test_damaged_input_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a_o.h5"
    path.write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=r"a_o\.h5, which is damaged.*Submit that call again"):
        pickle.loads(pickle.dumps(entries.ResultOf(str(path))))


@pytest.mark.parametrize("there", ["a file for a folder", "damaged", "not kept", "kept"])
def test_job_that_ran_something_else_leaves_its_result(
    tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "folder" / "other_o.h5"
    pickles = {name: pickle.dumps(()) for name in ("function", "input_args", "input_kwargs", "resource_dict")}
    kept = {**pickles, "output": pickle.dumps("older")}
    if there == "a file for a folder":
        folder.write_text("")
    elif there == "damaged":
        folder.mkdir()
        other.write_bytes(b"damaged")
    else:
        more = {} if there == "kept" else {entries.NOT_KEPT: pickle.dumps(True)}
        entries.write_pickles(str(other), {**kept, **more}, str(tmp_path))
    store = {"path": str(tmp_path / "a_i.h5"), "root": str(tmp_path), "batch": "batch", "queue_id": None}
    what = {**pickles, **store, "key": ["a", {}], "job_output": str(tmp_path / "output"), "ranks": 1}
    claim = job.Claim(what)
    claim.ran, claim.versions = "folder/other", {}
    assert job._store(what, Answer([pickle.dumps(5)], ""), 1.0, claim) == job.RESULT
    ending = entries.read_ending(str(tmp_path / "a_o.h5"), str(tmp_path))
    assert ending is not None
    assert (pickle.loads(ending.data), ending.kept, ending.ran) == (5, False, "folder/other")
    if there == "a file for a folder":
        assert "the result was not kept in the cache file" in capsys.readouterr().err
    else:
        output = entries.read_output(other, tmp_path)
        assert output is not None
        assert output.value == ("older" if there == "kept" else 5)


@repeatable
@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_files_of_others(damage: list[tuple[int, int]]) -> None:
    """Whatever the HDF5 library reads from it, the entry counts as absent: no exception, and no other value."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a_o.h5")
        write_plain(path, output="the result", runtime=0.5)
        content = bytearray(path.read_bytes())
        for place, byte in damage:
            content[place % len(content)] = byte
        path.write_bytes(content)
        output = entries.read_output(path)
        assert output is None or output.value == "the result"


@pytest.mark.parametrize("take", [os.link, shutil.copy, os.replace], ids=["link", "copy", "rename"])
def test_a_file_under_the_name_of_another_call_is_no_result(tmp_path: Path, take: Any, caplog: Any) -> None:
    """This holds for names derived from the call. A user may rename entries that they have named themselves."""
    for key, versions in ("derived", {}), ("named", None):
        entries.write_output(
            tmp_path / f"{key}_o.h5",
            function=len,
            args=[""],
            kwargs={},
            resource_dict={},
            runtime=0.5,
            output=3,
            versions=versions,
        )
        take(tmp_path / f"{key}_o.h5", tmp_path / f"{key}2_o.h5")
    assert entries.read_output(tmp_path / "derived2_o.h5") is None
    assert entries.read_ending(str(tmp_path / "derived2_o.h5")) is None
    assert "derived" in caplog.text
    found = entries.read_output(tmp_path / "named2_o.h5")
    assert found is not None
    assert found.value == 3
