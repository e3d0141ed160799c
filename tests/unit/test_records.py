"""The worker's end of ``log_records=True``: one message at a time, whoever logs while one is being sent."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from executorlib.transports.messages import Message
from executorlib.worker import records, settings
from executorlib.worker.records import Reporter

logger = logging.getLogger("executorlib_tests.reporter")


class Line:
    """A connection over which messages take a while: meanwhile something happens."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self.inside = False
        self.closed = False

    def send(self, header: list[Any], frames: Any = ()) -> None:
        assert not self.inside, "two messages at a time"
        self.inside = True
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        self.inside = False
        self.sent.append(header[3]["msg"] if header[0] == "log" else header[0])

    def receive(self) -> Message:
        assert not self.inside
        self.inside = True
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        self.inside = False
        return Message(["call", 7], [], [])

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    undo: list[Callable[[], None]] = []
    divert = settings.divert
    monkeypatch.setattr(settings, "divert", lambda handler: undo.append(divert(handler)) or undo[-1])
    monkeypatch.setattr(records.os, "register_at_fork", lambda **callbacks: None)
    logger.setLevel(logging.INFO)
    yield Line()
    for each in undo:
        each()
    logger.setLevel(logging.NOTSET)


def test_records_logged_during_a_send_follow_the_message(line: Line) -> None:
    """By a signal handler, say, in the middle of it."""
    reporter = Reporter(line)
    line.meanwhile = lambda: logger.info("meanwhile")
    logger.info("first")
    assert line.sent == ["first", "meanwhile"]
    line.meanwhile = lambda: logger.info("beside an answer")
    reporter.send(["result"])
    assert line.sent[2:] == ["result", "beside an answer"]


def test_signals_wait_until_a_message_is_sent(line: Line) -> None:
    def fail(number: int, frame: object) -> None:
        raise TimeoutError("of the user")

    reporter = Reporter(line)
    before = signal.signal(signal.SIGUSR1, fail)
    try:
        line.meanwhile = lambda: signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(TimeoutError, match="of the user"):
            logger.info("whole")
        assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert line.sent == ["whole"]
    reporter.send(["result"])
    assert line.sent == ["whole", "result"]


def test_records_logged_while_waiting_for_a_call_are_sent_later(line: Line) -> None:
    """A ZeroMQ connection is for one thread at a time, and only a limited number of records waits."""
    reporter = Reporter(line)
    line.meanwhile = lambda: [logger.info("%d", number) for number in range(1500)]
    assert reporter.receive().header == ["call", 7]
    assert line.sent == [f"{number}" for number in range(1000)]
    assert reporter.number == 7


def test_only_answers_reveal_that_the_executor_is_gone(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(header: list[Any], frames: Any = ()) -> None:
        raise BrokenPipeError

    reporter = Reporter(line)
    monkeypatch.setattr(line, "send", fail)
    logger.info("nobody is there")
    with pytest.raises(BrokenPipeError):
        reporter.send(["result"])


def test_a_connection_is_made_with_the_first_record(line: Line) -> None:
    made: list[int] = []

    def connect() -> Line:
        made.append(1)
        return line

    reporter = Reporter(None, connect, 3)
    assert not made
    logger.info("one")
    logger.info("two")
    assert (made, line.sent) == ([1], ["one", "two"])
    reporter.close()
    assert line.closed
    logger.info("after the end")
    assert line.sent == ["one", "two"]


def test_attributes_are_bounded(line: Line) -> None:
    sent: list[dict[str, Any]] = []
    reporter = Reporter(line)
    reporter.report = sent.append  # type: ignore[method-assign]
    logger.info("many", extra={f"key{number}": "y" * 5000 for number in range(1000)})
    (values,) = sent
    assert len(values) == 100
    assert len(values["key0"]) < 1100
    assert values["msg"] == "many"
