"""Results are found again unless code in other modules has changed or, on request, versions have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cache, pytest.mark.rows("fork", "jobs")]

CHANGED = """
    import sys
    sys.path.insert(0, "lab")

    def inside(x):
        from lab_model import simulate
        return simulate(x)

    import lab_model

    def outside(x):
        return lab_model.scaled(x)

    with Executor(**OPTIONS) as executor:
        print(executor.submit(inside, 2).result(), executor.submit(outside, 2).result())
    with Executor(**OPTIONS) as executor:
        futures = [executor.submit(inside, 2), executor.submit(outside, 2)]
        print(*[future.result() for future in futures])
"""

MODEL = """
class Model:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        with open("ran", "a") as file:
            file.write("x")
        return x * self.factor


model = Model({factor})


def scaled(x):
    return model(x)


def simulate(x):
    return model(x)
"""


def test_calls_run_again_after_a_change_in_a_module(scripts: Any, row: Any, tmp_path: Path) -> None:
    options = {**row.options, "cache_directory": str(tmp_path / "store"), "resource_dict": {"cwd": str(tmp_path)}}
    (tmp_path / "lab").mkdir()
    for session, factor in enumerate((10, 100), start=1):
        (tmp_path / "lab" / "lab_model.py").write_text(MODEL.format(factor=factor))
        assert scripts.run(CHANGED, options).split() == [str(2 * factor)] * 4
        assert (tmp_path / "ran").read_text() == "xx" * session


VERSIONS = """
    import logging
    import sys
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    sys.path.insert(0, "site-packages")
    import lab_library

    def ran(x):
        with open("ran", "a") as file:
            file.write("x")
        return lab_library.double(x)

    def other(x):
        return lab_library.double(x)

    with Executor(**OPTIONS) as executor:
        print(executor.submit(ran, 2).result(), executor.submit(other, 3).result())
"""


@pytest.mark.parametrize(("cache_versions", "told", "runs"), [("warn", 1, "x"), ("ignore", 0, "x"), ("key", 0, "xx")])
def test_versions_of_libraries(
    scripts: Any, row: Any, tmp_path: Path, cache_versions: str, told: int, runs: str
) -> None:
    store = str(tmp_path / "store")
    options = {**row.options, "cache_directory": store, "cache_versions": cache_versions}
    options["resource_dict"] = {"cwd": str(tmp_path)}
    site = tmp_path / "site-packages"
    (site / "lab_library-1.0.dist-info").mkdir(parents=True)
    (site / "lab_library-1.0.dist-info" / "RECORD").write_text("lab_library.py,,\n")
    (site / "lab_library.py").write_text("def double(x): return 2 * x\n")
    assert scripts.run(VERSIONS, options).split() == ["4", "6"]
    assert scripts.run(VERSIONS, options).split() == ["4", "6"]
    assert (tmp_path / "ran").read_text() == "x"
    (site / "lab_library-1.0.dist-info").rename(site / "lab_library-2.0.dist-info")
    *warnings, results = scripts.run(VERSIONS, options).splitlines()
    assert results.split() == ["4", "6"]
    assert len(warnings) == told
    assert all(f"{store} were made with other versions: lab_library 1.0 (now 2.0)." in text for text in warnings)
    assert (tmp_path / "ran").read_text() == runs


def test_wrong_settings_for_versions_are_errors(make_executor: Any) -> None:
    with pytest.raises(ValueError, match="cache_versions is 'no', expected one of 'warn', 'key', 'ignore'"):
        make_executor(cache_versions="no")
