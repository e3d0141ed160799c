"""Modules that submit calls during their import get an error if the call would need the module itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executorlib import SingleNodeExecutor

MODULE = """
import functools, math, threading
from concurrent.futures import ThreadPoolExecutor

import made_by_a_test

CONSTANT = 3

def f(x):
    return x + 1

class A:
    def method(self):
        return 1

    @staticmethod
    def static():
        return 2

by_value = lambda x: x + CONSTANT

with made_by_a_test.executor as executor:
    result = {expression}
"""

NEED_THE_MODULE = [
    "executor.submit(f, 1)",
    "executor.submit(A)",
    "executor.submit(A.static)",
    "executor.submit(A().method)",
    "executor.submit(functools.partial(f, 1))",
    "executor.submit(len, [A()])",
    "executor.submit(dict, value={'deep': [A]})",
    "executor.submit(lambda: f(1))",
    "executor.submit(len, executor.submit(list), A())",
    "list(executor.map(f, [1]))",
    "ThreadPoolExecutor(1).submit(executor.submit, f, 1).result()",
]
DO_NOT = {
    "executor.submit(math.sqrt, 4).result(30)": 2.0,
    "executor.submit(by_value, 4).result(30)": 7,
    "executor.submit(max, executor.submit(abs, -5), 4).result(30)": 5,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For modules, which are forgotten afterwards."""
    monkeypatch.setenv("EXECUTORLIB_IMPORT_DEPTH", "0")  # and what an executor of theirs makes of it
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def import_it(folder: Path) -> Callable[[str], Any]:
    """Import a module that evaluates an expression with an executor."""

    def do_it(expression: str) -> Any:
        (folder / "made_by_a_test.py").write_text("import contextlib\nexecutor = contextlib.nullcontext()\n")
        importlib.import_module("made_by_a_test").executor = SingleNodeExecutor(max_workers=1)  # type: ignore[attr-defined]
        (folder / "imported_by_a_test.py").write_text(MODULE.replace("{expression}", expression))
        return importlib.import_module("imported_by_a_test")

    return do_it


@pytest.mark.parametrize("expression", NEED_THE_MODULE)
def test_call_that_needs_the_module(import_it: Callable[[str], Any], expression: str) -> None:
    with pytest.raises(
        RuntimeError, match="it needs the module 'imported_by_a_test', which was still being imported"
    ) as caught:
        import_it(expression)
    assert "if __name__ == '__main__':" in str(caught.value)


@pytest.mark.parametrize("expression", DO_NOT)
def test_call_that_does_not(import_it: Callable[[str], Any], expression: str) -> None:
    assert import_it(expression).result == DO_NOT[expression]


def test_later_calls(import_it: Callable[[str], Any]) -> None:
    module = import_it("None")
    with SingleNodeExecutor(max_workers=1) as executor:
        assert executor.submit(module.f, 1).result(30) == 2
        assert executor.submit(module.A().method).result(30) == 1


def test_package_above_the_module(folder: Path) -> None:
    """Its worker would import that first."""
    (folder / "package_of_a_test").mkdir()
    (folder / "package_of_a_test" / "inner.py").write_text("def f():\n    return 1\n")
    (folder / "package_of_a_test" / "__init__.py").write_text(
        "import executorlib\n"
        "from package_of_a_test.inner import f\n"
        "with executorlib.SingleNodeExecutor(max_workers=1) as executor:\n"
        "    executor.submit(f).result(30)\n"
    )
    with pytest.raises(RuntimeError, match="it needs the module 'package_of_a_test'"):
        importlib.import_module("package_of_a_test")


@pytest.mark.parametrize("block", [False, True])
def test_executors_that_imports_open_are_not_nested_without_end(scripts: Any, tmp_path: Path, block: bool) -> None:
    """Each level imports the module in a way that `submit` cannot see."""
    (tmp_path / "importer.py").write_text("def run():\n    import opener\n    return opener.result\n")
    (tmp_path / "opener.py").write_text(
        "import os, importer\n"
        "from executorlib import SingleNodeExecutor\n"
        "with open('count', 'a') as file:\n"
        "    file.write('x')\n"
        f"with SingleNodeExecutor(max_workers=1, block_allocation={block}) as executor:\n"
        "    result = executor.submit(importer.run).result(60)\n"
    )
    out = scripts.run(
        """
        try:
            import opener
        except RuntimeError as error:
            print(error)
        """,
    )
    assert "importing the module 'opener' opens SingleNodeExecutor in a worker" in out
    assert "5 times" in out
    assert (tmp_path / "count").read_text() == 6 * "x"


def test_modules_that_open_executors_for_later(scripts: Any, tmp_path: Path) -> None:
    """Their number does not matter: only nesting counts."""
    for number in range(8):
        (tmp_path / f"module{number}.py").write_text(
            "import atexit\n"
            "from executorlib import SingleNodeExecutor\n"
            "executor = SingleNodeExecutor(max_workers=1)\n"
            "atexit.register(executor.shutdown)\n"
            f"def double(x):\n    return 2 * x + {number} * 0\n"
        )
    out = scripts.run(
        """
        import module0, module1, module2, module3, module4, module5, module6, module7

        def work():
            import module0, module1, module2, module3, module4, module5, module6, module7
            results = module7.executor.submit(module7.double, 2).result(60)
            for module in (module0, module1, module2, module3, module4, module5, module6, module7):
                module.executor.shutdown()
            return results

        print(module0.executor.submit(work).result(60))
        """,
    )
    assert out == "4\n"
