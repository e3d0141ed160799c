"""Functions that log, for workers, which import them without pytest."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

NAME = "executorlib_tests.records"


def tell(text: str, *args: Any, **extra: Any) -> tuple[int, int]:
    """Log a text in a call; return process and thread."""
    logging.getLogger(NAME).info(text, *args, extra=extra)
    return os.getpid(), threading.get_ident()


def tell_levels() -> None:
    logger = logging.getLogger(NAME)
    logger.debug("debug")
    logger.warning("warning")


class NoText:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def tell_what_cannot_travel() -> None:
    logger = logging.getLogger(NAME)
    lock = threading.Lock()
    try:
        raise ValueError("of the call")
    except ValueError:
        logger.exception("with %s", lock, extra={"lock": lock, "bad": NoText(), "large": 10**5000})
    logger.info("stack", stack_info=True)
    logger.info("x" * 1_000_000)
    logger.info("\ud800\U0001f600\0")


def tell_badly() -> None:
    logging.getLogger(NAME).info("%d", "no number")
    logging.getLogger(NAME).info("after")


def flood(count: int, size: int) -> bytes:
    """Log from several threads while there is more to send."""
    logger = logging.getLogger(NAME)

    def run(name: str) -> None:
        for number in range(count):
            logger.info("%s %d %s", name, number, "x" * size)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return bytes(3_000_000)


def tell_and_die() -> None:
    for number in range(100):
        logging.getLogger(NAME).info("%d", number)
    os.kill(os.getpid(), signal.SIGKILL)


def tell_as_it_starts() -> dict[str, Any]:
    logging.getLogger(NAME).info("setting up")
    return {}


def fork_and_tell() -> int:
    """Log in a process that the call forks, then in the call."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for _ in range(100):
                logging.getLogger(NAME).info("in the fork")
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    logging.getLogger(NAME).info("in the call")
    return status


def loaded() -> bool:

    return "executorlib.worker.records" in sys.modules


def tell_on_ranks(text: str) -> int:
    logging.getLogger(NAME).info(text)
    return os.getpid()
