"""The poller, by which the loop and a node's relay wait."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from executorlib.poller import Poller


@pytest.fixture
def poller() -> Iterator[Poller]:
    made = Poller()
    yield made
    made.close_poll()


def test_timers_come_in_their_order(poller: Poller) -> None:
    called: list[str] = []
    poller.call_later(0.0, lambda: called.append("first"))
    poller.call_later(60.0, lambda: called.append("late"))
    poller.call_later(0.0, lambda: called.append("second"))
    poller.call_back([])
    assert called == ["first", "second"]


def test_timers_that_begin_timers_keep_nobody_waiting(poller: Poller) -> None:
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        assert turns < 10, "the descriptor was not looked at"
        poller.call_later(0.0, again)

    heard: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        poller.watch(ours, lambda: heard.append(ours.recv(10)))
        poller.call_later(0.0, again)
        theirs.send(b"word")
        while not heard:
            poller.call_back(poller.poll(poller.next_timer()))
            poller.call_back([])
    assert heard == [b"word"]
