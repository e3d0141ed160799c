"""What a user sets in the interpreter reaches the calls: options, recursion limit, warning filters, logging."""

from __future__ import annotations

import json
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


class OwnWarning(UserWarning):
    pass


def warn(text: str, category: type[Warning] = UserWarning) -> str:
    """What became of a warning."""
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
    """Taken as a call's worker is set up, although that has the earlier settings by birth."""
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
