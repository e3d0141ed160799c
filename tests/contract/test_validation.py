"""Bad input is an error at once that names the call and the remedy; the executor works on."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from contract.functions import add, identity, takes_resource_dict, until

WAIT = 30
BAD = (TypeError, ValueError)

# key, value, what the message must name besides the key and the call
WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("cores", 0, "at least 1"),
    ("cores", -2, "at least 1"),
    ("cores", "2", "str"),
    ("cores", 1.5, "float"),
    ("cores", [1], "list"),
    ("threads_per_core", 0, "at least 1"),
    ("threads_per_core", -1, "at least 1"),
    ("threads_per_core", "2", "str"),
    ("gpus_per_core", -1, "at least 0"),
    ("gpus_per_core", 0.5, "float"),
    ("num_nodes", 0, "at least 1"),
    ("cwd", 3, "int"),
    ("cache_key", 3, "int"),
    ("cache_directory", 3, "int"),
    ("error_log_file", 3, "int"),
    ("run_time_max", 0, "above 0"),
    ("run_time_max", -1.0, "above 0"),
    ("run_time_max", "1", "str"),
    ("run_time_max", float("nan"), "nan"),
    ("priority", "high", "str"),
    ("exclusive", "yes", "str"),
    ("slurm_cmd_args", "--exclusive", "list"),
    ("slurm_cmd_args", [1], "int"),
    ("openmpi_oversubscribe", "yes", "str"),
]
WRONG_IDS = [f"{key}={value!r}" for key, value, _ in WRONG_VALUES]

# key as written, the known key that it is nearest to
UNKNOWN_KEYS = [
    ("core", "cores"),
    ("Cores", "cores"),
    ("threads_per_cores", "threads_per_core"),
    ("gpu_per_core", "gpus_per_core"),
    ("run_time", "run_time_max"),
    ("error_log", "error_log_file"),
    ("cache_dir", "cache_directory"),
]


def works_on(executor: Any) -> None:
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.rows("fork", "jobs")
@pytest.mark.parametrize(("key", "value", "named"), WRONG_VALUES, ids=WRONG_IDS)
def test_wrong_value_at_submit(executor: Any, key: str, value: Any, named: str) -> None:
    with pytest.raises(BAD) as caught:
        executor.submit(add, 1, 2, resource_dict={key: value})
    text = str(caught.value)
    assert key in text
    assert "add" in text
    assert named in text
    works_on(executor)


@pytest.mark.rows("fork", "block-fork")
@pytest.mark.parametrize(("key", "value", "named"), WRONG_VALUES, ids=WRONG_IDS)
def test_wrong_value_at_construction(row: Any, key: str, value: Any, named: str) -> None:
    with pytest.raises(BAD) as caught:
        row.make(resource_dict={key: value})
    assert key in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.rows(block=False, single_node=True)
@pytest.mark.parametrize(("key", "nearest"), UNKNOWN_KEYS)
def test_unknown_key_at_submit(executor: Any, key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(key))) as caught:
        executor.submit(add, 1, 2, resource_dict={key: 1})
    assert repr(nearest) in str(caught.value)
    assert "add" in str(caught.value)
    works_on(executor)


@pytest.mark.rows(block=False, single_node=True)
@pytest.mark.parametrize("key", ["partition", "zzz", 3])
def test_unknown_key_without_a_similar_one(executor: Any, key: Any) -> None:
    """A scheduler's keys are unknown here, and the message lists the known ones."""
    with pytest.raises(BAD) as caught:
        executor.submit(add, 1, 2, resource_dict={key: 1})
    assert repr(key) in str(caught.value)
    works_on(executor)


@pytest.mark.rows("jobs", "slurm")
@pytest.mark.parametrize(
    ("key", "nearest"), [("thread_per_core", "threads_per_core"), ("Cores", "cores"), ("partitions", "partition")]
)
def test_misspelt_key_where_calls_are_jobs(executor: Any, row: Any, key: str, nearest: str) -> None:
    """It is an error at once unless a template uses it. Keys of templates and of pysqa are accepted."""
    for use in (lambda: executor.submit(add, 1, 2, resource_dict={key: 1}), lambda: row.make(resource_dict={key: 1})):
        with pytest.raises(BAD, match=f"unknown key {key!r} in resource_dict; did you mean {nearest!r}"):
            use()


@pytest.mark.rows("jobs")
def test_a_key_of_the_calls_own_template(executor: Any) -> None:
    pytest.importorskip("jinja2")
    template = "#!/bin/bash\n#SBATCH --comment={{ my_comment }}\n{{ command }}\n"
    own = {"submission_template": template, "my_comment": "mine", "dependency_list": "none"}
    assert executor.submit(add, 1, 2, resource_dict=own).result(WAIT) == 3
    with pytest.raises(BAD, match="unknown key 'my_coment' in resource_dict; did you mean 'my_comment'"):
        executor.submit(add, 1, 2, resource_dict={"submission_template": template, "my_coment": "mine"})


@pytest.mark.rows(single_node=True)
@pytest.mark.parametrize(("key", "nearest"), UNKNOWN_KEYS[:2])
def test_unknown_key_at_construction(row: Any, key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(key))) as caught:
        row.make(resource_dict={key: 1})
    assert repr(nearest) in str(caught.value)


@pytest.mark.rows("jobs")
def test_template_keys_without_a_template(executor: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A program for a cluster runs here, too, and a warning names the keys that are ignored."""
    assert executor.submit(add, 1, 2, resource_dict={"partition": "long"}).result(WAIT) == 3
    [record] = [record for record in caplog.records if "is ignored" in record.getMessage()]
    assert "'partition'" in record.getMessage()
    caplog.clear()
    assert executor.submit(add, 1, 2, resource_dict={"memory_max": 2}).result(WAIT) == 3
    [record] = [record for record in caplog.records if "is ignored" in record.getMessage()]
    assert "'memory_max'" in record.getMessage()
    assert "did you mean" not in record.getMessage()
    with pytest.raises(BAD, match="expected a non-empty str"):
        executor.submit(add, 1, 2, resource_dict={3: 1})


@pytest.mark.rows(jobs=False)
def test_name_of_an_entry_without_a_cache_directory(
    make_executor: Callable[..., Any], row: Any, tmp_path: Path
) -> None:
    """Nothing would be kept under it."""
    named, said = (
        {"cache_key": "answer"},
        "cache_key='answer' names an entry of a cache directory, but no directory was named",
    )
    with pytest.raises(ValueError, match=said):
        make_executor(resource_dict=named)
    if not row.block:
        with make_executor() as executor, pytest.raises(ValueError, match=said):
            executor.submit(add, 1, 2, resource_dict=named)
        with make_executor(cache_directory=str(tmp_path)) as executor:
            assert executor.submit(add, 1, 2, resource_dict=named).result(WAIT) == 3


@pytest.mark.rows("fork", "jobs")
@pytest.mark.parametrize("value", ["", 3])
def test_bad_cache_directory_wherever_it_is_named(row: Any, value: Any) -> None:
    named: dict[str, Any] = {"cache_directory": value}
    for options in (named, {"resource_dict": named}):
        with pytest.raises(TypeError, match="expected a path as str"):
            row.make(**options)


@pytest.mark.cache
@pytest.mark.rows("fork", "block-fork", "jobs")
def test_advice_for_calls_without_a_key(make_executor: Callable[..., Any], row: Any, tmp_path: Path) -> None:
    """The advice is to name the entry, if that can be done and helps."""
    # cloudpickle sends an open file's text.
    with open(__file__) as file, make_executor(cache_directory=str(tmp_path)) as executor:
        error = executor.submit(add, 1, file).exception(WAIT)
        assert isinstance(error, TypeError)
        expected = "Calls of a block take no cache_key" if row.block else "Name the cache entry yourself"
        assert expected in str(error)
        error = executor.submit(add, 1, threading.Lock()).exception(WAIT)
        assert isinstance(error, TypeError)
        assert "args[1] is a _thread.lock" in str(error)
        assert "cache_key" not in str(error)
        assert "create such objects" in str(error)


@pytest.mark.rows(block=False)
@pytest.mark.parametrize("given", [[("cores", 1)], "cores", 3])
def test_resources_that_are_not_a_dictionary(executor: Any, given: Any) -> None:
    with pytest.raises(BAD, match="resource_dict"):
        executor.submit(add, 1, 2, resource_dict=given)
    works_on(executor)


@pytest.mark.rows(block=False)
@pytest.mark.parametrize("wanted", [{"threads_per_core": 3}, {"cores": 3}, {"cores": 2, "threads_per_core": 2}])
def test_more_cores_than_there_will_ever_be(make_executor: Callable[..., Any], wanted: dict[str, int]) -> None:
    with make_executor(max_cores=2) as executor:
        with pytest.raises(ValueError, match="max_cores") as caught:
            executor.submit(add, 1, 2, resource_dict=wanted)
        assert "add" in str(caught.value)
        works_on(executor)


def test_more_cores_at_construction_than_there_will_ever_be(row: Any) -> None:
    with pytest.raises(ValueError, match="max_cores"):
        row.make(max_cores=2, resource_dict={"threads_per_core": 3})


@pytest.mark.rows(block=False)
def test_directory_that_cannot_be_made(executor: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    wanted = str(tmp_path / "file" / "below")
    with pytest.raises((OSError, ValueError)) as caught:
        executor.submit(add, 1, 2, resource_dict={"cwd": wanted}).result(WAIT)
    assert wanted in str(caught.value)
    assert "add" in str(caught.value)
    works_on(executor)


@pytest.mark.rows("block-fork", "block-spawn")
def test_directory_of_a_block_that_cannot_be_made(row: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    wanted = str(tmp_path / "file" / "below")
    with pytest.raises((OSError, ValueError)) as caught:  # noqa: SIM117
        with row.make(resource_dict={"cwd": wanted}) as executor:
            executor.submit(add, 1, 2).result(WAIT)
    assert wanted in str(caught.value)


def test_function_with_a_parameter_named_resource_dict(executor: Any) -> None:
    with pytest.raises(ValueError, match="resource_dict") as caught:
        executor.submit(takes_resource_dict, 1)
    assert "takes_resource_dict" in str(caught.value)
    works_on(executor)


@pytest.mark.rows(block=True)
def test_resources_at_submit_in_a_block(executor: Any) -> None:
    with pytest.raises(ValueError, match="resource_dict") as caught:
        executor.submit(add, 1, 2, resource_dict={"cores": 1})
    assert "add" in str(caught.value)
    assert executor.submit(add, 1, 2, resource_dict={}).result(WAIT) == 3
    assert executor.submit(add, 1, 2, resource_dict=None).result(WAIT) == 3


@pytest.mark.rows(block=False)
def test_init_function_without_a_block(row: Any) -> None:
    with pytest.raises(ValueError, match="block_allocation"):
        row.make(init_function=dict)


@pytest.mark.parametrize("key", ["max_workers", "max_cores"])
@pytest.mark.parametrize("count", [0, -1])
def test_no_workers(row: Any, key: str, count: int) -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        row.make(**{key: count})


def test_no_workers_has_the_known_text(row: Any) -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        row.make(max_workers=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_workers", "2"),
        ("max_workers", 1.5),
        ("max_cores", "2"),
        ("resource_dict", [1]),
        ("start_method", "forkserver"),
        ("restart_limit", -1),
        ("restart_limit", "many"),
        ("gpus", -1),
        ("gpus", 1.5),
        ("preload", "numpy"),
        ("preload", [3]),
        ("init_function", 3),
    ],
)
@pytest.mark.rows("fork", "block-fork", "spawn")
def test_wrong_argument_at_construction(row: Any, key: str, value: Any) -> None:
    with pytest.raises(BAD, match=key):
        row.make(**{key: value})


def test_unknown_argument_at_construction(row: Any) -> None:
    with pytest.raises(TypeError, match="max_worker"):
        row.make(max_worker=2)


@pytest.mark.parametrize("function", [None, 3, "add"])
def test_function_that_is_not_callable(executor: Any, function: Any) -> None:
    with pytest.raises(TypeError):
        executor.submit(function, 1).result(WAIT)
    works_on(executor)


def test_container_that_holds_itself_and_a_future(executor: Any) -> None:
    """A cycle cannot be rebuilt with results: an error at once, naming the call."""
    future: Future[int] = Future()
    knot: list[Any] = [future]
    knot.append(knot)
    with pytest.raises(BAD) as caught:
        executor.submit(identity, knot).result(0.5)
    assert "identity" in str(caught.value)
    future.set_result(1)
    works_on(executor)


def test_container_that_holds_itself(executor: Any) -> None:
    """A cycle without a future is a value like any other."""
    knot: list[Any] = [1]
    knot.append(knot)
    result = executor.submit(identity, knot).result(WAIT)
    assert result[0] == 1
    assert result[1] is result


def test_future_that_a_shut_down_executor_cancelled(
    executor: Any, make_executor: Callable[..., Any], gate: Any
) -> None:
    held = gate()
    with make_executor(max_workers=1) as other:
        running = other.submit(held, 1)
        until(running.running, WAIT)
        waiting = [other.submit(add, i, 2) for i in range(100)]
        other.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(CancelledError):
            executor.submit(add, waiting[-1], 1).result(WAIT)
        held.open()
        assert executor.submit(add, running, 1).result(WAIT) == 2


def test_future_that_a_shut_down_executor_finished(executor: Any, make_executor: Callable[..., Any]) -> None:
    with make_executor() as other:
        done = other.submit(add, 1, 2)
    assert executor.submit(add, done, 1).result(WAIT) == 4
