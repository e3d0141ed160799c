"""Programs written for executorlib 1.x find the names, arguments and defaults that they use."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
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

# The packages that executors need beyond the core.
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


def described(function: Any) -> dict[str, str]:
    """The arguments that a docstring describes, in order; an error if one is described twice."""
    section = re.search(r"^Args:\n((?: .*\n)+)", f"{inspect.getdoc(function)}\n", re.MULTILINE)
    items = [] if section is None else re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE)[1:]
    names, texts = zip(*[item.split(": ", 1) for item in items], strict=True) if items else ((), ())
    assert len(set(names)) == len(names), names
    return {name.lstrip("*"): " ".join(text.split()) for name, text in zip(names, texts, strict=True)}


def with_arguments() -> dict[str, Any]:
    """All that is public and takes arguments, by name."""
    found = {name: find(name) for name in ["BaseExecutor", *promised.CONSTRUCTORS]}
    found.update({f"BaseExecutor.{name}": getattr(executorlib.BaseExecutor, name) for name in promised.METHODS})
    found.update({name: getattr(executorlib, name) for name in promised.FUNCTIONS})
    found.update({name: getattr(executorlib.api, name) for name in promised.API_FUNCTIONS})
    return found


@pytest.mark.skipif(sys.flags.optimize > 1, reason="there are no docstrings")
@pytest.mark.parametrize("name", sorted(with_arguments()))
def test_docstring_describes_every_argument(name: str) -> None:
    """... once, in the order of the signature, and without sending the reader elsewhere for it."""
    function = with_arguments()[name]
    texts = described(function)
    assert list(texts) == [parameter for parameter, _, _ in parameters(function)]
    elsewhere = re.compile(r"\bSee\b|, see `|[Ll]ikewise|[Oo]ther arguments are|[Tt]akes the arguments of|as in `")
    assert not elsewhere.search(inspect.getdoc(function) or "")


@pytest.mark.skipif(sys.flags.optimize > 1, reason="there are no docstrings")
@pytest.mark.parametrize("name", sorted(promised.CONSTRUCTORS))
def test_docstring_explains_none(name: str) -> None:
    """Other defaults speak for themselves in the signature, which `help` shows, too."""
    texts = described(find(name))
    for parameter, _, default in parameters(find(name)):
        if default is None:
            assert re.search(r"default|None|If a file is named|compatibility", texts[parameter]), parameter


@pytest.mark.skipif(sys.flags.optimize > 1, reason="there are no docstrings")
@pytest.mark.parametrize("name", ["BaseExecutor.submit", *sorted(promised.CONSTRUCTORS)])
def test_docstring_describes_every_resource_key(name: str) -> None:
    _, _, section = (inspect.getdoc(with_arguments()[name]) or "").partition("\nKeys of resource_dict:\n")
    keys = re.findall(r"^    - ``(\w+)``: \S", section, re.MULTILINE)
    assert sorted(keys) == sorted(promised.RESOURCE_KEYS)


@pytest.mark.skipif(sys.flags.optimize > 1, reason="there are no docstrings")
@pytest.mark.long
def test_reference_shows_what_help_shows() -> None:
    """Its generator reads the source, where docstrings are not complete yet."""
    griffe = pytest.importorskip("griffe", exc_type=ImportError)
    extension = Path(__file__).parents[2] / "docs" / "docstrings_of_help.py"
    loader = griffe.GriffeLoader(
        search_paths=[Path(executorlib.__file__).parents[1]], extensions=griffe.load_extensions(str(extension))
    )
    package = loader.load("executorlib")
    for name in ["BaseExecutor.submit", *promised.CONSTRUCTORS]:
        function = with_arguments()[name]
        path = f"{function.__module__}.{function.__qualname__}".removeprefix("executorlib.")
        assert package[path].docstring.value == inspect.getdoc(function)


def test_shared_arguments_are_described_once() -> None:
    """`Options` has exactly the arguments that all rows have, besides the one that rows of jobs lack."""
    from executorlib.options import Options

    taken = [{parameter for parameter, _, _ in parameters(find(name))} for name in promised.CONSTRUCTORS]
    fields = {field.name for field in dataclasses.fields(Options) if field.init}
    assert fields - {"restart_limit"} == set.intersection(*taken)


def test_executors_need_no_docstrings() -> None:
    """`python -OO` removes them."""
    loaded_by("from executorlib import *\nfrom executorlib.api import *", "-OO")


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


def loaded_by(statement: str, *options: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
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
