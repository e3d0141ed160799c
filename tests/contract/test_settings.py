"""Settings of the user's interpreter reach the calls: options, recursion limit, warning filters, logging."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WAIT = 60
pytestmark = pytest.mark.rows("fork", "spawn", "block-fork", "block-spawn", "jobs", "block-jobs")

FLAGS = """
def flags():
    import sys
    return (
        sys.flags.optimize, sys.warnoptions, sys.flags.utf8_mode, sys.flags.dev_mode, sys.flags.isolated,
        sys._xoptions, sys.flags.no_site, sys.flags.dont_write_bytecode, sys.flags.no_user_site,
    )

if __name__ == "__main__":
    with Executor(**OPTIONS) as executor:
        print(json.dumps([flags(), executor.submit(flags).result()]))
"""


@pytest.mark.parametrize(
    "options",
    [
        ("-O", "-B", "-W", "error::UserWarning", "-X", "utf8"),
        ("-X", "dev", "-X", "faulthandler", "-W", "error"),
        ("-I",),
    ],
    ids=" ".join,
)
def test_options(row: Any, scripts: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Those that `ProcessPoolExecutor` gives to processes that it spawns."""
    path = tmp_path / "flags.py"
    path.write_text(scripts.prelude + FLAGS)
    done = subprocess.run(
        [sys.executable, *options, str(path)],
        env={**os.environ, "TEST_OPTIONS": json.dumps(row.arguments())},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.stderr == ""
    here, there = json.loads(done.stdout)
    assert there == here


# Settings that change while the program runs.


@pytest.fixture
def recursion_limit() -> Iterator[Callable[[int], None]]:
    before = sys.getrecursionlimit()
    yield sys.setrecursionlimit
    sys.setrecursionlimit(before)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_recursion_limit(make_executor: Callable[..., Any], recursion_limit: Callable[[int], None]) -> None:
    """The one that is set when a worker is set up; deep values travel in both directions."""

    def depth(n: int) -> int:
        return 0 if n == 0 else 1 + depth(n - 1)

    def deep(value: list[Any]) -> list[Any]:
        import sys

        return [sys.getrecursionlimit(), value]

    recursion_limit(20_000)
    with make_executor() as executor:
        limit, value = executor.submit(deep, nested(2000)).result(WAIT)
        assert limit == 20_000
        for _ in range(2000):
            (value,) = value
        assert value == []
        assert executor.submit(depth, 4000).result(WAIT) == 4000


@pytest.mark.rows(block=False)
def test_recursion_limit_that_changes(
    make_executor: Callable[..., Any], recursion_limit: Callable[[int], None]
) -> None:
    def limit(number: int) -> int:
        import sys

        return sys.getrecursionlimit()

    with make_executor() as executor:
        for number in (3000, 4000, 1200):
            recursion_limit(number)
            assert executor.submit(limit, number).result(WAIT) == number


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.fixture
def digits() -> Iterator[Callable[[int], None]]:
    if not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this Python has no limit of digits")
    before = sys.get_int_max_str_digits()
    yield sys.set_int_max_str_digits
    sys.set_int_max_str_digits(before)


def mask_and_digits(number: int) -> tuple[int, int]:
    import os
    import sys

    mask = os.umask(0)
    os.umask(mask)
    return mask, sys.get_int_max_str_digits()


def test_umask_and_digits(
    make_executor: Callable[..., Any], umask: Callable[[int], int], digits: Callable[[int], None]
) -> None:
    umask(0o27)
    digits(5000)
    with make_executor() as executor:
        assert executor.submit(mask_and_digits, 0).result(WAIT) == (0o27, 5000)


@pytest.mark.linux
@pytest.mark.rows(block=False)
def test_umask_and_digits_that_change(
    make_executor: Callable[..., Any], umask: Callable[[int], int], digits: Callable[[int], None]
) -> None:
    with make_executor() as executor:
        for mask, number in ((0o22, 0), (0o77, 7000), (0o2, 641)):
            umask(mask)
            digits(number)
            assert executor.submit(mask_and_digits, number).result(WAIT) == (mask, number)


class OwnWarning(UserWarning):
    pass


def warn(text: str, category: type[Warning] = UserWarning) -> str:
    """Return the outcome of a warning."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        try:
            warnings.warn(text, category, stacklevel=1)
        except Warning as error:
            return f"raised {error}"
    return f"{len(caught)} shown"


def test_warning_filters(make_executor: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", message="quiet.*")
        warnings.filterwarnings("error", category=OwnWarning, append=True)
        warnings.filterwarnings("error", category=DeprecationWarning, append=True)
        warnings.filterwarnings("ignore", module="no_such_module")
        with make_executor() as executor:
            seen = [
                executor.submit(warn, *call).result(WAIT)
                for call in (("quiet, please",), ("loud",), ("own", OwnWarning), ("old", DeprecationWarning))
            ]
    assert seen == ["0 shown", "1 shown", "raised own", "raised old"]


LOGGING = """
import logging

logging.basicConfig(format="MINE %(levelname)s %(name)s %(message)s", stream=sys.stdout, level=logging.INFO)
logging.getLogger("talkative").setLevel(logging.DEBUG)
logging.getLogger("quiet").setLevel(logging.ERROR)
logging.getLogger("executorlib").setLevel(logging.ERROR)

def talk():
    for name in ("talkative", "quiet", "other"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "in the call")

if __name__ == "__main__":
    with Executor(**OPTIONS) as executor:
        executor.submit(talk).result()
"""


@pytest.mark.rows(prints_here=True)
def test_levels_and_format_of_logging(row: Any, scripts: Any) -> None:
    assert scripts.run(LOGGING, row.arguments()).splitlines() == [
        "MINE DEBUG talkative in the call",
        "MINE INFO talkative in the call",
        "MINE WARNING talkative in the call",
        "MINE INFO other in the call",
        "MINE WARNING other in the call",
    ]


@pytest.mark.rows("fork", "spawn")
def test_logging_that_changes(row: Any, scripts: Any) -> None:
    """They are read when a call's worker is set up, although the worker was forked with earlier settings."""
    source = """
    import logging

    def talk(text):
        logging.getLogger("app").warning(text)
        logging.getLogger("app").info(text)

    if __name__ == "__main__":
        handler = logging.StreamHandler(sys.stdout)
        logging.root.addHandler(handler)
        with Executor(**OPTIONS) as executor:
            executor.submit(talk, "plain").result()
            handler.setFormatter(logging.Formatter("{levelname}: {message}", style="{"))
            logging.root.setLevel(logging.INFO)
            executor.submit(talk, "styled").result()
            logging.disable(logging.WARNING)
            executor.submit(talk, "disabled").result()
            logging.disable(logging.NOTSET)
            logging.root.setLevel(logging.WARNING)
            logging.getLogger("app").propagate = False
            logging.getLogger("app").addHandler(handler)
            executor.submit(talk, "its own").result()
    """
    lines = scripts.run(source, row.arguments()).splitlines()
    assert lines == ["plain", "WARNING: styled", "INFO: styled", "WARNING: its own"]


@pytest.mark.rows("jobs")
def test_no_records_of_jobs_which_outlive_the_handlers(make_executor: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="log_records=True cannot be honoured for calls that are jobs"):
        make_executor(log_records=True)


# Objects that a program may put in place of those of logging and warnings: none may keep calls from running.
ODDITIES = {
    "formatter without a format": "class Own(logging.Formatter):\n    def __init__(self):\n        pass\n"
    "    def format(self, record):\n        return 'own'\nhandler.setFormatter(Own())",
    "formatter of another kind": "class Own:\n    def format(self, record):\n        return 'own'\n"
    "handler.setFormatter(Own())",
    "format without fields": "handler.setFormatter(logging.Formatter('no fields', validate=False))",
    "field that a filter adds": "def add(record):\n    record.rank = 1\n    return True\n"
    "handler.addFilter(add)\nhandler.setFormatter(logging.Formatter('%(rank)s %(message)s'))",
    "stream that cannot be compared": "class Stream:\n    def __eq__(self, other):\n        raise RuntimeError('eq')\n"
    "logging.root.addHandler(logging.StreamHandler(Stream()))",
    "level that is an enumeration": "class Level(enum.IntEnum):\n    LOW = 15\n"
    "logging.getLogger('other').setLevel(Level.LOW)",
    "name that is an enumeration": "class Name(str, enum.Enum):\n    PART = 'part'\n"
    "logging.getLogger(Name.PART).setLevel(logging.INFO)",
    "level that is none": "logging.getLogger('other').level = 'LOW'",
    "filter that is none": "warnings.filters.append(('ignore', None))",
}

ODD = """
import enum, logging, warnings

handler = logging.StreamHandler(sys.stdout)
log = logging.getLogger("app")
log.propagate = False
log.addHandler(handler)
log.setLevel(logging.INFO)
{oddity}

def talk():
    logging.getLogger("app").info("in the call")

if __name__ == "__main__":
    with Executor(**OPTIONS) as executor:
        executor.submit(talk).result()
"""


@pytest.mark.rows("fork", "jobs")
@pytest.mark.parametrize("oddity", ODDITIES)
def test_settings_that_are_odd(row: Any, scripts: Any, oddity: str) -> None:
    """Calls get the settings that can be handed on, run without the others, and print nothing on standard error."""
    said = scripts.run(ODD.format(oddity=ODDITIES[oddity]), row.arguments())
    if row.prints_here:
        assert said == {"format without fields": "no fields\n"}.get(oddity, "in the call\n")


def calls_made(function: Callable[[], Any]) -> int:
    """How many functions are called, of Python and of C."""
    events: list[str] = []
    gc.disable()  # as Hypothesis has functions called by each collection
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return sum(event in ("call", "c_call") for event in events)


def test_unchanged_loggers_cost_little() -> None:
    """Each fresh call looks for changes, and large libraries have hundreds of loggers."""
    from executorlib.launchers.session import settings

    settings()
    before = calls_made(settings)
    for number in range(300):
        logging.getLogger(f"many.loggers.{number}.deep")
    assert calls_made(settings) == before
