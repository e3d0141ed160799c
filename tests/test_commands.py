"""The command line lists without reading entries, reports its failures, and removes only the requested files."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from conftest import as_user
from executorlib import cli
from executorlib._version import __version__
from executorlib.cache import batch_directory, entries
from executorlib.cache import scan as cache_scan
from executorlib.keys import distributions

pytestmark = pytest.mark.cache

DAY = 86400.0


def write(path: Path, **result: Any) -> Path:
    """Write the entry of a call of `operator.add`, with its output or error."""
    arguments: dict[str, Any] = {"args": (1,), "kwargs": {"b": 2}, "resource_dict": {"cores": 1}, "runtime": 0.5}
    entries.write_output(path, function=operator.add, **arguments, **result)
    return path


def batch_name(name: str) -> str:
    """A name as batches have it."""
    return f"20260101-000000-1-1-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def batch(
    directory: Path, name: str, entries: dict[int, str], job: str = "", outputs: dict[int, str] | None = None
) -> Path:
    """Make the batch directory of these keys; ``outputs`` is what the jobs that started printed."""
    folder = directory / ".executorlib" / batch_name(name)
    folder.mkdir(parents=True)
    (folder / "entries").write_text("".join(f"{index} {directory}/{key}_i.h5\n" for index, key in entries.items()))
    if job:
        (folder / "job_id").write_text(job + "\n")
    for index, text in (outputs or {}).items():
        (folder / f"output.{index}").write_text(text)
    return folder


def age(path: Path, seconds: float) -> None:
    """Make a file, or a folder with all that is in it, older."""
    for each in [*path.rglob("*"), path]:
        status = each.stat()
        os.utime(each, (status.st_mtime - seconds, status.st_mtime - seconds))


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with an entry in each state, none of them readable."""
    for name, size in (("done_o.h5", 3000), ("sub/done_o.h5", 100), ("waits_i.h5", 20), ("runs_i.h5", 7)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    (tmp_path / "other.txt").touch()
    keys = {0: "done", 1: "waits", 3: "runs", 4: "died"}
    batch(tmp_path, "first", keys, "17", {0: "fine", 3: "", 4: "out of memory"})
    return tmp_path


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process and give its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code: Any = cli.main([str(each) for each in arguments])
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run


def states(call: Call, directory: Path, *options: str) -> dict[str, str]:
    code, out, errors = call("cache", "ls", "-d", directory, "--json", *options)
    assert (code, errors) == (0, "")
    return {row["key"]: row["state"] for row in map(json.loads, out.splitlines())}


def write_with_versions(path: Path, **versions: str) -> Path:
    """Write the entry of a call that ran with these versions of distributions."""
    values = {"function": len, "input_args": ["ab"], "input_kwargs": {}, "output": 2, "versions": versions}
    entries.write_pickles(str(path), {name: pickle.dumps(value) for name, value in values.items()})
    return path


# -- ls ----------------------------------------------------------------------------------------------------------------


def test_ls_lists_states_sizes_and_ages_and_reads_nothing(
    directory: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    age(directory / "sub" / "done_o.h5", 3 * DAY)
    code, out, errors = call("cache", "ls", "-d", directory, "--sort", "state")
    assert (code, errors) == (0, "")
    *rows, total = out.splitlines()
    assert [row.split() for row in rows] == [
        ["waiting", "20B", "0s", "waits"],
        ["running", "7B", "0s", "runs"],
        ["done", "2.9K", "0s", "done"],
        ["done", "100B", "3d", "sub/done"],
        ["failed", "13B", "0s", "died"],
    ]
    assert total == "5 entries, 3.1K (1 waiting, 1 running, 2 done, 1 failed)"


def test_ls_writes_json(directory: Path, call: Call) -> None:
    _, out, _ = call("cache", "ls", "-d", directory, "--json", "--state", "running")
    row = json.loads(out)
    assert 0 <= row.pop("age") < 60
    assert row == {"key": "runs", "state": "running", "size": 7, "file": str(directory.resolve() / "runs_i.h5")}


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--sort", "key"], ["died", "done", "runs", "sub/done", "waits"]),
        (["--sort", "key", "--reverse", "--limit", "2"], ["waits", "sub/done"]),
        (["--sort", "size", "--limit", "2"], ["done", "sub/done"]),
        (["--sort", "size", "--reverse"], ["runs", "died", "waits", "sub/done", "done"]),
        (["--sort", "age", "--limit", "1", "--reverse"], ["done"]),
        (["--limit", "0"], []),
    ],
)
def test_ls_sorts(directory: Path, call: Call, options: list[str], keys: list[str]) -> None:
    age(directory / "done_o.h5", DAY)
    _, out, _ = call("cache", "ls", "-d", directory, *options)
    *rows, total = out.splitlines()
    assert [row.split()[-1] for row in rows] == keys
    assert total.startswith("5 entries, ")


def test_ls_prints_entries_as_it_finds_them(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(_: str) -> Any:
        yield cache_scan.ListedEntry("first", "done", 1, 0.0, "first_o.h5")
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "scan", scan)
    code, out, _ = call("cache", "ls", "-d", tmp_path)
    assert (code, out.split()[-1]) == (130, "first")


def test_the_states_of_a_call_that_is_submitted_again(tmp_path: Path, call: Call) -> None:
    age(batch(tmp_path, "b", {0: "key"}, "17", {0: "killed"}), 60)
    assert states(call, tmp_path) == {"key": "failed"}
    (tmp_path / "key_i.h5").touch()
    again = batch(tmp_path, "a", {0: "key"}, "18")
    assert states(call, tmp_path) == {"key": "waiting"}
    (again / "output.0").touch()
    assert states(call, tmp_path) == {"key": "running"}
    (tmp_path / "key_o.h5").touch()
    assert states(call, tmp_path) == {"key": "done"}
    (tmp_path / "key_i.h5").unlink()
    assert states(call, tmp_path) == {"key": "done"}
    (tmp_path / "key_o.h5").rename(tmp_path / "key_r.h5")  # executorlib 1.x adds the result
    assert states(call, tmp_path) == {"key": "running"}


def test_ls_follows_a_link_to_the_directory(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, call: Call
) -> None:
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(directory)
    assert states(call, link) == states(call, directory)


def test_ls_ignores_batches_that_are_damaged_or_name_other_directories(tmp_path: Path, call: Call) -> None:
    folder = batch(tmp_path, "elsewhere", {}, outputs={0: "x"})
    (folder / "entries").write_text(f"0 {tmp_path}-moved/key_i.h5\n")
    (batch(tmp_path, "damaged", {}) / "entries").write_text("\0junk")
    (tmp_path / ".executorlib" / "no_entries").mkdir()
    assert states(call, tmp_path) == {}


def test_ls_prints_names_that_cannot_harm_the_terminal(tmp_path: Path, call: Call) -> None:
    (tmp_path / "a\x1b[2J\n_o.h5").touch()
    _, out, _ = call("cache", "ls", "-d", tmp_path)
    assert r"a\x1b[2J\n" in out


def test_ls_into_a_pipe_that_closes_is_silent(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number:0100}_o.h5").touch()
    command = [sys.executable, "-m", "executorlib", "cache", "ls", "-d", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(entries.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"done")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_prints_the_content_of_an_entry(tmp_path: Path, call: Call) -> None:
    write(tmp_path / "a" / "key_o.h5", output="x" * 2000)
    batch(tmp_path, "b", {0: "a/key", 1: "other"}, "17", {0: ""})
    code, out, errors = call("cache", "show", "-d", tmp_path, "a/key")
    assert (code, errors) == (0, "")
    shown = dict(re.findall(r"^(\w+): +(.*)$", out, re.MULTILINE))
    assert shown.pop("output") == "'" + "x" * 999 + "... (2002 characters)"
    assert shown.pop("file") == str(tmp_path.resolve() / "a" / "key_o.h5")
    assert shown.pop("job_output").endswith(f"/.executorlib/{batch_name('b')}/output.0")
    assert shown.pop("size").endswith("K")
    assert shown == {
        "key": "a/key",
        "state": "done",
        "age": "0s",
        "job": "17_0",
        "function": "_operator.add",
        "input_args": "[0] 1",
        "input_kwargs": "b = 2",
        "resource_dict": "cores = 1",
        "runtime": "0.5 s",
    }
    _, out, _ = call("cache", "show", "-d", tmp_path, "a/key", "--full")
    assert "x" * 2000 + "'" in out


class Unrepresentable:
    """An object whose repr() raises."""

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_show_does_not_unpickle_files_of_strangers(tmp_path: Path, call: Call) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o1777)
    path = write(store / "sub/a_o.h5", output=3)
    for each in (path, path.parent):
        os.chown(each, 65534, 65534)
    code, out, err = call("cache", "show", "sub/a", "-d", store)
    assert (code, out) == (1, "")
    assert f"chmod o-w {store}" in err
    assert call("cache", "ls", "-d", store)[0] == 0


def test_show_writes_json(tmp_path: Path, call: Call) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        arguments: dict[str, Any] = {"args": (Unrepresentable(),), "kwargs": {}, "resource_dict": {}, "runtime": 0.5}
        entries.write_output(tmp_path / "key_o.h5", function=operator.add, **arguments, error=KeyError("why"))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    code, out, _ = call("cache", "show", "-d", tmp_path, "key", "--json")
    shown = json.loads(out)
    assert (code, shown["error"], shown["runtime"]) == (0, "KeyError('why')", 0.5)
    assert shown["input_args"] == ["<Unrepresentable, whose repr() raised RuntimeError>"]
    assert "output" not in shown


def test_show_prints_where_a_function_raised(tmp_path: Path, call: Call) -> None:
    values = {"function": operator.add, "error": KeyError("why"), "traceback": "Traceback:\n  in add", "queue_id": 17}
    entries.write_pickles(str(tmp_path / "key_o.h5"), {name: pickle.dumps(value) for name, value in values.items()})
    _, out, _ = call("cache", "show", "-d", tmp_path, "key")
    assert re.search(r"^error: +KeyError\('why'\)$", out, re.MULTILINE)
    assert re.search(r"^traceback: +Traceback:\n +in add$", out, re.MULTILINE)
    assert re.search(r"^queue_id: +17$", out, re.MULTILINE)


def test_show_of_a_failed_call_names_the_output_of_its_job(directory: Path, call: Call) -> None:
    code, out, _ = call("cache", "show", "-d", directory, "died")
    assert code == 0
    assert re.search(r"^state: +failed$", out, re.MULTILINE)
    assert re.search(rf"^job_output: +.*/\.executorlib/{batch_name('first')}/output\.4$", out, re.MULTILINE)
    assert "ended without a result" in out


def test_show_of_an_entry_that_cannot_be_read_says_what_to_do(
    directory: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, errors = call("cache", "show", "-d", directory, "done")
    assert (code, out) == (1, "")
    assert "python -m executorlib cache show" in errors
    assert "is ignored" in caplog.text


def test_show_needs_h5py_for_entries_of_others(directory: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "done_o.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    code, _, errors = call("cache", "show", "-d", directory, "done")
    assert code == 1
    assert 'pip install "executorlib[cache]"' in errors


def test_show_warns_that_it_unpickles(call: Call) -> None:
    code, out, _ = call("cache", "show", "--help")
    assert code == 0
    assert "unpickling runs whatever code the file contains" in " ".join(out.split())


# -- rm ----------------------------------------------------------------------------------------------------------------


def test_rm_removes_entries_and_what_their_jobs_printed(directory: Path, call: Call) -> None:
    code, out, errors = call("cache", "rm", "-d", directory, "done", "sub/done", "died")
    assert (code, errors) == (0, "")
    assert out.splitlines() == ["removed done", "removed sub/done", "removed died"]
    assert states(call, directory) == {"waits": "waiting", "runs": "running"}


def test_rm_keeps_waiting_and_running_entries_unless_forced(directory: Path, call: Call) -> None:
    before = files(directory)
    code, out, errors = call("cache", "rm", "-d", directory, "waits", "runs")
    assert (code, out) == (1, "")
    assert "'waits' is waiting" in errors
    assert "'runs' is running: cancel its job with terminate_task_in_cache()" in errors
    assert files(directory) == before
    code, _, _ = call("cache", "rm", "-d", directory, "waits", "runs", "--force")
    assert code == 0
    assert states(call, directory) == {"done": "done", "sub/done": "done", "died": "failed"}


def test_rm_removes_the_others_if_one_is_missing(directory: Path, call: Call) -> None:
    code, out, errors = call("cache", "rm", "-d", directory, "no", "../done", "done", "--json")
    assert code == 1
    assert json.loads(out)["removed"] == str(directory.resolve() / "done_o.h5")
    assert f"has no entry 'no'; `executorlib cache ls -d {directory}`" in errors
    assert "'../done' does not name a file inside the cache directory" in errors


# -- prune -------------------------------------------------------------------------------------------------------------


def test_prune_by_age_and_size(directory: Path, call: Call) -> None:
    age(directory, 40 * DAY)
    (directory / "new_o.h5").write_bytes(b"x" * 5000)
    code, out, _ = call("cache", "prune", "-d", directory, "--older-than", "30d", "--larger-than", "1K")
    assert code == 0
    assert out == "removed 1 entry, 2.9K (1 done); leftovers: 0; 2.9K in all\n"
    assert "done_o.h5" not in files(directory)
    call("cache", "prune", "-d", directory, "--older-than", "30d")
    assert states(call, directory) == {"new": "done", "waits": "waiting", "runs": "running"}
    code, _, _ = call("cache", "prune", "-d", directory, "--older-than", "30d", "--pending")
    assert (code, files(directory)) == (0, ["new_o.h5", "other.txt"])


def test_prune_failed_calls(tmp_path: Path, call: Call) -> None:
    write(tmp_path / "good_o.h5", output=3)
    write(tmp_path / "bad_o.h5", error=KeyError("why"))
    (tmp_path / "damaged_o.h5").touch()
    (tmp_path / "waits_i.h5").touch()
    batch(tmp_path, "b", {0: "died", 1: "waits"}, "17", {0: "killed"})
    code, out, _ = call("cache", "prune", "-d", tmp_path, "--failed")
    assert (code, "removed 2 entries" in out) == (0, True)
    assert states(call, tmp_path) == {"good": "done", "damaged": "done", "waits": "waiting"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that these distributions are installed, in these versions."""
    versions = {"pytest": "9.0", "numpy": "2.0"}
    monkeypatch.setattr(distributions, "installed", versions.get)


@pytest.mark.usefixtures("installed")
def test_prune_results_of_other_versions(tmp_path: Path, call: Call) -> None:
    write_with_versions(tmp_path / "same_o.h5", numpy="2.0", pytest="9.0")
    write_with_versions(tmp_path / "older_o.h5", numpy="1.0", pytest="9.0")
    write_with_versions(tmp_path / "not_here_o.h5", scipy="1.0")
    write_with_versions(tmp_path / "waits_i.h5", numpy="1.0")
    write(tmp_path / "unknown_o.h5", output=1)
    (tmp_path / "damaged_o.h5").write_bytes(b"x")
    assert call("cache", "prune", "-d", tmp_path, "--outdated")[0] == 0
    assert files(tmp_path) == ["damaged_o.h5", "not_here_o.h5", "same_o.h5", "unknown_o.h5", "waits_i.h5"]


def test_pruning_by_versions_unpickles_no_objects(tmp_path: Path, call: Call) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    values = {"output": Trap(), "versions": {"numpy": Trap()}}
    entries.write_pickles(str(tmp_path / "a_o.h5"), {name: pickle.dumps(value) for name, value in values.items()})
    assert call("cache", "prune", "-d", tmp_path, "--outdated")[0] == 0
    assert files(tmp_path) == ["a_o.h5"]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.usefixtures("installed")
def test_show_prints_versions(tmp_path: Path, call: Call) -> None:
    write_with_versions(tmp_path / "a_o.h5", numpy="1.0", pytest="9.0", scipy="1.0")
    _, out, _ = call("cache", "show", "-d", tmp_path, "a")
    assert "pytest 9.0\n" in out
    assert "numpy 1.0 (installed here: 2.0)" in out
    assert "scipy 1.0\n" in out
    _, out, _ = call("cache", "show", "-d", tmp_path, "a", "--json")
    assert json.loads(out)["versions"] == {"numpy": "1.0", "pytest": "9.0", "scipy": "1.0"}


def test_prune_to_a_size_removes_the_oldest(tmp_path: Path, call: Call) -> None:
    for number in range(10):
        path = tmp_path / f"{number}_o.h5"
        path.write_bytes(b"x" * 1024)
        age(path, number * DAY)
    (tmp_path / "waits_i.h5").write_bytes(b"x" * 1024)
    call("cache", "prune", "-d", tmp_path, "--max-size", "4.5K")
    assert files(tmp_path) == ["0_o.h5", "1_o.h5", "2_o.h5", "waits_i.h5"]
    code, _, errors = call("cache", "prune", "-d", tmp_path, "--max-size", "1B")
    assert (code, files(tmp_path)) == (0, ["waits_i.h5"])
    assert "1.0K remain, all in entries that wait or run" in errors


def test_a_dry_run_lists_and_removes_nothing(directory: Path, call: Call) -> None:
    before = files(directory)
    code, out, _ = call("cache", "prune", "-d", directory, "--larger-than", "1K", "--dry-run")
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()] == ["done", "all"]
    assert "would remove 1 entry" in out
    _, out, _ = call("cache", "prune", "-d", directory, "--larger-than", "1K", "--dry-run", "--json")
    assert json.loads(out)["would_remove"] == str(directory.resolve() / "done_o.h5")
    assert files(directory) == before


def test_prune_removes_files_of_crashed_writers(tmp_path: Path, call: Call) -> None:
    for hours, name in ((2, "old"), (0, "new")):
        for path in (tmp_path / f"{name}_o.h5", tmp_path / f"{name}_i.h5", tmp_path / f"{name}_alone_i.h5"):
            path.touch()
        temporary = tmp_path / "sub" / f".{12 if hours else 13}-0123456789abcdef.tmp"
        temporary.parent.mkdir(exist_ok=True)
        temporary.touch()
        for path in [*tmp_path.glob(f"{name}*"), temporary]:
            age(path, hours * 3600)
    (tmp_path / ".other.tmp").touch()
    age(tmp_path / ".other.tmp", DAY)
    code, out, _ = call("cache", "prune", "-d", tmp_path)
    assert (code, out) == (0, "removed 0 entries, 0B; leftovers: 2 (inputs: 1, temporary file: 1); 0B in all\n")
    kept = [".other.tmp", "new_alone_i.h5", "new_i.h5", "new_o.h5", "old_alone_i.h5", "old_o.h5"]
    assert files(tmp_path) == [*kept, "sub/.13-0123456789abcdef.tmp"]


def test_prune_removes_marks_of_jobs_that_died(tmp_path: Path, call: Call) -> None:
    for folder in (tmp_path, tmp_path / "sub"):
        entries.take_over(str(folder / "key_i.h5"), "old")
        age(folder / ".executorlib", 2 * 3600)
    old = files(tmp_path)
    entries.take_over(str(tmp_path / "key_i.h5"), "new")
    (new,) = set(files(tmp_path)) - set(old)
    _, out, _ = call("cache", "prune", "-d", tmp_path)
    assert "leftovers: 2 (mark of a dead job: 2);" in out
    assert files(tmp_path) == [new]


def test_the_files_of_writers_that_die_are_known_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise BlockingIOError

    for name in ("rename", "unlink"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(BlockingIOError):
        write(tmp_path / "key_o.h5", output=1)
    (left,) = files(tmp_path)
    assert cache_scan._TEMPORARY.fullmatch(left)


def test_prune_removes_batch_directories_that_nobody_needs(tmp_path: Path, call: Call) -> None:
    (tmp_path / "done_o.h5").touch()
    (tmp_path / "waits_i.h5").touch()
    folders = {
        "stale": batch(tmp_path, "stale", {0: "done", 1: "gone"}, "17", {1: "killed"}),
        "waits": batch(tmp_path, "waits", {0: "done", 1: "waits"}, "18"),
        "fresh": batch(tmp_path, "fresh", {0: "done"}, "19"),
        "incomplete": batch(tmp_path, "incomplete", {}),
    }
    (folders["incomplete"] / "entries").unlink()
    for name, folder in folders.items():
        age(folder, 0 if name == "fresh" else 600)
    call("cache", "prune", "-d", tmp_path, "--older-than", "1h")
    assert all(folder.exists() for folder in folders.values())
    code, out, _ = call("cache", "prune", "-d", tmp_path, "--json")
    row = json.loads(out)
    assert (code, row["kind"], row["removed"]) == (0, "batch directory", str(folders["stale"].resolve()))
    assert [name for name, folder in folders.items() if folder.exists()] == ["waits", "fresh", "incomplete"]
    age(folders["incomplete"], 3600)
    call("cache", "prune", "-d", tmp_path)
    assert not folders["incomplete"].exists()


def test_nothing_is_removed_by_way_of_links(tmp_path: Path, call: Call) -> None:
    """Anybody who may write to the directory can put links there, to folders of the user who cleans it."""
    home, store = tmp_path / "home", tmp_path / "store"
    (home / batch_name("thesis")).mkdir(parents=True)
    for path in (home / "a_o.h5", home / batch_name("thesis") / "thesis.tex"):
        path.write_text("precious")
    age(home, DAY)
    (store / ".executorlib").mkdir(parents=True)
    (store / ".executorlib" / batch_name("b")).symlink_to(home / batch_name("thesis"))
    (store / "sub").symlink_to(home)
    before = files(home)
    assert call("cache", "prune", "-d", store, "--older-than", "1h")[0] == 0
    code, _, error = call("cache", "rm", "-d", store, "sub/a")
    assert code == 1
    assert "sub is not used: it is a symbolic link" in error
    (store / ".executorlib" / batch_name("b")).unlink()
    (store / ".executorlib").rmdir()
    (store / ".executorlib").symlink_to(home)
    for command in (["prune"], ["prune", "--older-than", "1h"], ["ls"]):
        code, _, error = call("cache", *command, "-d", store)
        assert code == 1
        assert ".executorlib is not used: it is a symbolic link" in error
    assert files(home) == before


def test_folders_that_are_swapped_for_links_meanwhile(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment between looking and removing."""
    home, store = tmp_path / "home", tmp_path / "store"
    folder = batch(store, "b", {0: "gone"})
    write(store / "sub" / "a_o.h5", output=1)
    for path in (home / "b" / folder.name / "entries", home / "sub" / "a_o.h5"):
        path.parent.mkdir(parents=True)
        path.write_text("precious")
    age(store, DAY)
    before, remove = files(home), batch_directory.remove

    def swap(*arguments: Any) -> Any:
        for name, target in ((".executorlib", "b"), ("sub", "sub")):
            if not (store / name).is_symlink():
                (store / name).rename(store / f"was-{target}")
                (store / name).symlink_to(home / target)
        return remove(*arguments)

    monkeypatch.setattr(batch_directory, "remove", swap)
    call("cache", "prune", "-d", store)
    assert (store / "was-b" / folder.name / "entries").exists()
    monkeypatch.undo()
    (store / ".executorlib").unlink()
    (entry,) = [each for each in cache_scan.scan(str(store)) if each.key == "was-sub/a"]
    (store / "was-sub").rename(store / "aside")
    (store / "was-sub").symlink_to(home / "sub")
    with pytest.raises(PermissionError, match="symbolic link"):
        cache_scan.remove(str(store), [entry])
    assert files(home) == before


@pytest.mark.parametrize("what", ["name", "folder"])
def test_only_batch_directories_are_removed(tmp_path: Path, call: Call, what: str) -> None:
    folder = batch(tmp_path, "b", {0: "gone"})
    if what == "name":
        folder = folder.rename(folder.parent / "thesis")
    else:
        (folder / "thesis").mkdir()
    age(folder, DAY)
    call("cache", "prune", "-d", tmp_path)
    assert (folder / "entries").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_users_remove_their_own_batch_directories(for_all: Path) -> None:
    """In a directory for everybody, where users may remove files in folders of others."""
    store = for_all / "store"
    folders = {user: batch(store, f"of-{user}", {0: "gone"}) for user in (1, 2)}
    for user, folder in folders.items():
        os.chown(folder, user, -1)
        folder.chmod(0o777)
        age(folder, DAY)
    for folder in (store, store / ".executorlib"):
        folder.chmod(0o777)
    assert as_user(1, "commands.main(['cache', 'prune', '-d', sys.argv[1]])", store).endswith("0")
    assert [user for user, folder in folders.items() if folder.exists()] == [2]


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["ls"], ["show", "key"], ["rm", "key"], ["prune"]])
def test_no_such_directory(tmp_path: Path, call: Call, arguments: list[str]) -> None:
    code, out, errors = call("cache", *arguments, "-d", tmp_path / "no")
    assert (code, out) == (1, "")
    assert (
        errors
        == f"executorlib: there is no directory {tmp_path}/no; name the executor's cache_directory with --directory\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: TOOL"),
        (["cache"], "required: COMMAND"),
        (["cache", "prune", "--older-than", "30"], "'30' is not an age; write a number and s, m, h, d or w"),
        (["cache", "prune", "--max-size", "1X"], "'1X' is not a size; write a number and K, M, G or T"),
        (["cache", "ls", "--limit", "-1"], "'-1' is not a number of entries"),
    ],
)
def test_wrong_arguments(call: Call, arguments: list[str], text: str) -> None:
    code, _, errors = call(*arguments)
    assert code == 2
    assert text in errors


def test_reverse_needs_an_order(tmp_path: Path, call: Call) -> None:
    code, _, errors = call("cache", "ls", "-d", tmp_path, "--reverse")
    assert code == 1
    assert "--reverse needs an order" in errors


def test_the_version(call: Call) -> None:
    assert call("--version") == (0, __version__ + "\n", "")


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("10B", 10), ("1k", 1024), ("1.5G", 3 << 29), ("2GiB", 2 << 30), ("3TB", 3 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert cli._size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("1.5h", 5400), ("2d", 2 * DAY), ("1W", 7 * DAY)])
def test_ages(text: str, seconds: float) -> None:
    assert cli._age(text) == seconds


def test_sizes_and_ages_are_short() -> None:
    sizes = {0: "0B", 999: "999B", 1000: "1.0K", 10_239: "10K", 1_023_000: "999K", 5 << 30: "5.0G", 3 << 60: "3072P"}
    assert {size: cli._human_size(size) for size in sizes} == sizes
    ages = {-5: "0s", 0.5: "0s", 119: "119s", 120: "2m", 7199: "119m", 7200: "2h", 2 * DAY - 1: "47h", 2 * DAY: "2d"}
    assert {seconds: cli._human_age(seconds) for seconds in ages} == ages
