"""Classes of programs in what another session has pickled."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from executorlib import serialize
from executorlib.cache import unpickle

PROGRAM = """
    import enum, sys
    from dataclasses import dataclass
    from typing import Any, NamedTuple

    from executorlib.cache import unpickle as foreign; from executorlib import serialize

    LIMIT = 3

    @dataclass
    class Point:
        x: int

        def is_far(self):
            return self.x > LIMIT

    class Color(enum.Enum):
        RED = 1

    class Pair(NamedTuple):
        point: Point
        color: Color

    class TooCold(Exception):
        pass

    class Changed:
        version = CHANGED

    def local():
        class Inner:
            pass
        return Inner()

    value = [Point(5), Color.RED, Pair(Point(1), Color.RED), TooCold("brr"), Changed(), local(), Point]
    if sys.argv[1] == "write":
        open("pickle", "wb").write(serialize.dumps_in_band(value))
    else:
        point, color, pair, error, changed, inner, again = foreign.loads(open("pickle", "rb").read())
        LIMIT = 10
        print(point == Point(5), again is Point, point.is_far(), Point(11).is_far())
        print(color is Color.RED, pair == Pair(Point(1), Color.RED), isinstance(pair, Pair))
        print(type(error) is TooCold, error.args)
        print(type(changed) is Changed, changed.version, type(inner).__name__)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return tmp_path / "program.py"


def run(program: Path, what: str, changed: int) -> str:
    program.write_text(textwrap.dedent(PROGRAM).replace("CHANGED", str(changed)))
    command = [sys.executable, str(program), what]
    return subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=True).stdout


def test_classes_of_the_program_are_its_own(program: Path) -> None:
    """They are if they have not changed. Their methods see the program's globals, not the pickled ones."""
    run(program, "write", 1)
    assert run(program, "read", 1).splitlines() == [
        "True True False True",
        "True True True",
        "True ('brr',)",
        "True 1 Inner",
    ]


def test_a_class_that_was_changed_is_another_one(program: Path) -> None:
    run(program, "write", 1)
    assert run(program, "read", 2).splitlines()[-1] == "False 1 Inner"


def test_a_pickle_within_a_pickle(program: Path) -> None:
    """As of the result of one of several ranks."""
    run(program, "write", 1)
    data = (program.parent / "pickle").read_bytes()
    (program.parent / "pickle").write_bytes(serialize.dumps_in_band(serialize.Pickled(data)))
    assert run(program, "read", 1).splitlines()[0] == "True True False True"


@pytest.mark.parametrize("value", [1, "text", [1.5, {"a": (None,)}], abs, Path("/tmp")])
def test_pickle_without_classes(value: object) -> None:
    assert unpickle.loads(serialize.dumps_in_band(value)) == value
