"""Programs written for executorlib 1.x find the names, arguments and defaults that they use."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from concurrent.futures import BrokenExecutor, Executor
from pathlib import Path
from typing import Any

import pytest

import executorlib
import executorlib.api
from compat import promised
from compat.promised import REQUIRED

# What executors need to run, beyond the core.
NEEDS = {
    "FluxClusterExecutor": [pytest.mark.flux],
    "FluxJobExecutor": [pytest.mark.flux],
    "SlurmClusterExecutor": [pytest.mark.cache, pytest.mark.slurm],
    "SlurmJobExecutor": [
        pytest.mark.slurm,
        pytest.mark.skipif("SLURM_JOB_ID" not in os.environ, reason="needs a Slurm job around it"),
    ],
    "TestClusterExecutor": [pytest.mark.cache],
}


def parameters(function: Any) -> promised.Signature:
    """The parameters of a function without ``self``, or of a class's constructor."""
    found = inspect.signature(function).parameters.values()
    return [
        (
            each.name,
            each.kind,
            REQUIRED if each.default is inspect.Parameter.empty else each.default,
        )
        for each in found
        if each.name != "self"
    ]


@pytest.mark.parametrize("name", sorted(promised.NAMES | promised.NAMES_BEYOND))
def test_name(name: str) -> None:
    assert getattr(executorlib, name) is not None
    assert name in dir(executorlib)


@pytest.mark.parametrize("name", sorted(promised.API_NAMES))
def test_api_name(name: str) -> None:
    assert getattr(executorlib.api, name) is not None
    assert name in dir(executorlib.api)


def test_all_lists_what_is_public() -> None:
    assert set(executorlib.__all__) | {"__version__"} == promised.NAMES | promised.NAMES_BEYOND
    assert set(executorlib.api.__all__) == promised.API_NAMES


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        executorlib.no_such_name  # noqa: B018
    with pytest.raises(ImportError):
        from executorlib import no_such_name  # noqa: F401


def test_version() -> None:
    assert isinstance(executorlib.__version__, str)
    assert executorlib.__version__[0].isdigit()


def find(name: str) -> Any:
    """A class, wherever it is public."""
    return getattr(executorlib if name in promised.NAMES else executorlib.api, name)


@pytest.mark.parametrize("name", sorted(promised.CONSTRUCTORS))
def test_constructor(name: str) -> None:
    """Same names, same defaults, same positions."""
    positional, beyond = {}, {}
    for parameter, kind, default in parameters(find(name)):
        (beyond if kind is inspect.Parameter.KEYWORD_ONLY else positional)[parameter] = default
    assert list(positional.items()) == list(promised.CONSTRUCTORS[name].items())
    assert beyond == promised.CONSTRUCTORS_BEYOND[name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=NEEDS.get(each, [])) for each in sorted(promised.CONSTRUCTORS)],
)
def test_constructor_takes_every_default(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where some make their cache directory
    defaults = {**promised.CONSTRUCTORS[name], **promised.CONSTRUCTORS_BEYOND[name]}
    with find(name)(**defaults) as executor:
        assert executor.submit(abs, -1).result(30) == 1


@pytest.mark.parametrize("name", sorted(promised.METHODS))
@pytest.mark.parametrize("executor", ["BaseExecutor", *sorted(promised.CONSTRUCTORS)])
def test_method(executor: str, name: str) -> None:
    method = getattr(find(executor), name)
    assert parameters(method) == promised.METHODS[name]


@pytest.mark.parametrize("executor", ["BaseExecutor", *sorted(promised.CONSTRUCTORS)])
def test_class(executor: str) -> None:
    found = find(executor)
    assert issubclass(found, executorlib.BaseExecutor)
    assert issubclass(found, Executor)
    for name in promised.PROPERTIES:
        assert isinstance(inspect.getattr_static(found, name), property), name


@pytest.mark.parametrize("name", sorted(promised.FUNCTIONS))
def test_function(name: str) -> None:
    assert parameters(getattr(executorlib, name)) == promised.FUNCTIONS[name]


@pytest.mark.parametrize("name", sorted(promised.API_FUNCTIONS))
def test_api_function(name: str) -> None:
    assert parameters(getattr(executorlib.api, name)) == promised.API_FUNCTIONS[name]


@pytest.mark.parametrize("name", sorted(promised.API_METHODS))
def test_api_class(name: str) -> None:
    found = getattr(executorlib.api, name)
    assert {method for method in promised.API_METHODS[name] if hasattr(found, method)} == (promised.API_METHODS[name])


def test_socket_error() -> None:
    assert issubclass(executorlib.api.ExecutorlibSocketError, BrokenExecutor)
    assert issubclass(executorlib.api.ExecutorlibSocketError, RuntimeError)


@pytest.mark.parametrize("key", sorted(promised.RESOURCE_KEYS))
def test_resource_key(key: str) -> None:
    """Every key is known: a wrong value is the complaint, not the key."""
    with pytest.raises((TypeError, ValueError)) as caught:
        executorlib.SingleNodeExecutor(resource_dict={key: object()})
    assert "unknown" not in str(caught.value)


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return set(done.stdout.split())


def test_import_loads_little() -> None:
    loaded = loaded_by("import executorlib")
    assert not loaded & promised.NOT_LOADED_BY_IMPORT
    assert len(loaded - loaded_by("pass")) < 30


def test_type_checkers_are_told() -> None:
    from importlib.resources import files

    assert files("executorlib").joinpath("py.typed").is_file()
