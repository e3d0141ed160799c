"""``log_records=True``: what calls log reaches the handlers of the session, and each record once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from contract.telling import (
    NAME,
    flood,
    fork_and_tell,
    loaded,
    tell,
    tell_and_die,
    tell_as_it_starts,
    tell_badly,
    tell_levels,
    tell_on_ranks,
    tell_what_cannot_travel,
)
from executorlib.api import ExecutorlibSocketError

WAIT = 60
LOCAL = ("fork", "spawn", "block-fork", "block-spawn", "block-jobs")
ALL = (*LOCAL, "slurm-job", "block-slurm-job", "flux", "block-flux", "block-flux-cluster")
pytestmark = pytest.mark.rows(*ALL)


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Keeps the records of the logger `NAME`, whose level is DEBUG."""
    handler = Kept()
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def test_a_record_is_what_was_logged(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True) as executor:
        future = executor.submit(tell, "%s are %d", "two", 2, sample="Fe", steps=7)
        process, thread = future.result(WAIT)
        (record,) = kept.records  # it was there before the result
    assert (record.name, record.levelno, record.levelname) == (NAME, logging.INFO, "INFO")
    assert (record.getMessage(), record.args) == ("two are 2", ())
    assert (record.process, record.thread, record.threadName) == (process, thread, "MainThread")
    assert process != os.getpid()
    assert (record.funcName, record.filename) == ("tell", "telling.py")
    assert (record.sample, record.steps) == ("Fe", 7)  # type: ignore[attr-defined]
    assert record.executorlib_call == "call 1 of tell"  # type: ignore[attr-defined]
    assert record.executorlib_rank == 0  # type: ignore[attr-defined]


def test_each_record_says_which_call_it_is_of(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True, max_workers=2) as executor:
        assert len(list(executor.map(tell, [f"{number}" for number in range(1, 9)]))) == 8
    told = {record.getMessage(): record.executorlib_call for record in kept.records}  # type: ignore[attr-defined]
    assert told == {f"{number}": f"call {number} of tell" for number in range(1, 9)}


@pytest.mark.parametrize("propagate", [True, False])
def test_levels_of_loggers_and_handlers(make_executor: Callable[..., Any], kept: Kept, propagate: bool) -> None:
    """They are those of the session, even if a logger passes its records only to its own handlers."""
    logging.getLogger(NAME).propagate = propagate
    with make_executor(log_records=True, max_workers=1) as executor:
        executor.submit(tell_levels).result(WAIT)
        assert kept.texts == ["debug", "warning"]
        kept.setLevel(logging.WARNING)
        executor.submit(tell_levels).result(WAIT)
        assert kept.texts == ["debug", "warning", "warning"]
        logging.getLogger(NAME).setLevel(logging.ERROR)
        executor.submit(tell_levels).result(WAIT)
        assert kept.texts == ["debug", "warning", "warning"]


def test_attributes_that_cannot_be_sent_become_text(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True) as executor:
        executor.submit(tell_what_cannot_travel).result(WAIT)
    failed, stack, long, odd = kept.records
    assert "unlocked _thread.lock" in failed.getMessage()
    assert failed.exc_info is None
    assert failed.exc_text is not None
    assert failed.exc_text.endswith("ValueError: of the call")
    assert "unlocked _thread.lock" in failed.lock  # type: ignore[attr-defined]
    assert failed.bad == "<NoText>"  # type: ignore[attr-defined]
    assert logging.Formatter("%(message)s").format(failed).endswith("ValueError: of the call")
    assert stack.stack_info is not None
    assert "tell_what_cannot_travel" in stack.stack_info
    assert long.getMessage().startswith("x" * 50_000 + "\n... 900000 characters were left out")
    assert odd.getMessage() == "\ud800\U0001f600\0"


def test_a_record_without_a_text_harms_nothing(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True) as executor:
        executor.submit(tell_badly).result(WAIT)
    assert kept.texts == ["after"]


def test_a_flood_comes_whole_and_in_order(make_executor: Callable[..., Any], kept: Kept) -> None:
    """More than sockets hold: the call waits for the handlers."""
    with make_executor(log_records=True) as executor:
        assert executor.submit(flood, 1000, 1000).result(WAIT) == bytes(3_000_000)
    for name in "abc":
        of_thread = [text.split()[1] for text in kept.texts if text.startswith(name)]
        assert of_thread == [f"{number}" for number in range(1000)]


@pytest.mark.rows(*LOCAL)
def test_records_logged_before_a_death_arrive(make_executor: Callable[..., Any], kept: Kept) -> None:
    seen: list[int] = []
    with make_executor(log_records=True, max_workers=1) as executor:
        future = executor.submit(tell_and_die)
        future.add_done_callback(lambda future: seen.append(len(kept.records)))
        with pytest.raises(ExecutorlibSocketError):
            future.result(WAIT)
    assert kept.texts == [f"{number}" for number in range(100)]
    assert seen == [100]


@pytest.mark.rows("block-fork", "block-spawn", "block-jobs", "block-slurm-job", "block-flux", "block-flux-cluster")
def test_the_init_function_logs(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True, max_workers=1, init_function=tell_as_it_starts) as executor:
        executor.submit(tell, "in the call").result(WAIT)
    assert [(record.getMessage(), record.executorlib_call) for record in kept.records] == [  # type: ignore[attr-defined]
        ("setting up", "the init_function"),
        ("in the call", "call 1 of tell"),
    ]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_a_call_forks_leave_the_connection_alone(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True) as executor:
        assert executor.submit(fork_and_tell).result(WAIT) == 0
    assert kept.texts == ["in the call"]


class Failing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit("the handler fails")


def test_a_handler_that_raises(
    make_executor: Callable[..., Any], kept: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is reported as `logging` does, and does not affect other calls or the executor."""
    failing = Failing()
    logging.getLogger(NAME).addHandler(failing)
    try:
        with make_executor(log_records=True) as executor:
            executor.submit(tell, "one").result(WAIT)
            executor.submit(tell, "two").result(WAIT)
    finally:
        logging.getLogger(NAME).removeHandler(failing)
    assert kept.texts == ["one", "two"]
    assert capsys.readouterr().err.count("SystemExit: the handler fails") == 2


def test_nothing_is_sent_nor_loaded_unless_asked_for(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor() as executor:
        assert not executor.submit(loaded).result(WAIT)
        executor.submit(tell, "not sent").result(WAIT)
    assert kept.texts == []


SCRIPT = """
import logging

def talk():
    logging.getLogger("app").info("in the call")
    if os.fork() == 0:
        logging.getLogger("app").info("in the fork")
        sys.stdout.flush()
        os._exit(0)
    os.wait()

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout, level=logging.INFO)
    file = logging.FileHandler("log")
    file.setFormatter(logging.Formatter("%(executorlib_call)s: %(message)s"))
    logging.root.addHandler(file)
    with Executor(**OPTIONS) as executor:
        executor.submit(talk).result()
"""


@pytest.mark.rows(*LOCAL)
def test_each_handler_writes_a_record_once(row: Any, scripts: Any) -> None:
    """The handlers in a worker that imitate the session's are only for processes that calls fork."""
    lines = scripts.run(SCRIPT, {**row.arguments(), "log_records": True}).splitlines()
    assert sorted(lines) == ["INFO in the call", "INFO in the fork"]
    assert (scripts.folder / "log").read_text() == "call 1 of talk: in the call\n"


@pytest.mark.mpi
@pytest.mark.rows("fork", "spawn", "block-fork", "slurm-job")
def test_ranks(make_executor: Callable[..., Any], kept: Kept) -> None:
    with make_executor(log_records=True, max_workers=1, max_cores=2, resource_dict={"cores": 2}) as executor:
        first, second = executor.submit(tell_on_ranks, "here").result(WAIT)
    told = {
        (record.executorlib_rank, record.process, record.executorlib_call, record.getMessage())  # type: ignore[attr-defined]
        for record in kept.records
    }
    assert told == {(rank, pid, "call 1 of tell_on_ranks", "here") for rank, pid in enumerate((first, second))}
