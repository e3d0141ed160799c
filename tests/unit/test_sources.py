"""Reading modules' files: an outdated state is never used, and known files are not read again."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import py_compile
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executorlib.keys import fingerprint, sources, statements
from executorlib.keys.sources import reach


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; the modules in it have names with ``lab_``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sources, "_SLICES", {})
    monkeypatch.setattr(sources, "_SOURCES", {})
    monkeypatch.setattr(sources, "_FIRST", {})
    monkeypatch.setattr(sources, "_many", 0)
    monkeypatch.setattr(sources, "_last", "")
    yield tmp_path
    for name in [each for each in sys.modules if each.startswith("lab_")]:
        del sys.modules[name]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files for unchanged as soon as their time of change says so."""
    monkeypatch.setattr(sources, "_TICK_NS", -(10**18))


def digest(module: str, *chain: str) -> str:
    return reach(frozenset({(module, chain)})).digest


def count_parsing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    parsed: list[str] = []
    parse = statements.parse

    def counting(data: bytes, path: str, package: str, content: bytes) -> Any:
        parsed.append(os.path.basename(path))
        return parse(data, path, package, content)

    monkeypatch.setattr(statements, "parse", counting)
    return parsed


def test_changes_within_a_tick_of_the_clock_are_seen(folder: Path) -> None:
    path = folder / "lab_a.py"
    path.write_text("A = 1")
    status = path.stat()
    first = digest("lab_a", "A")
    path.write_text("A = 2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest("lab_a", "A") != first


@pytest.mark.usefixtures("settled")
def test_files_that_have_not_changed_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lab_b.py").write_text("B = 1")
    (folder / "lab_a.py").write_text("import lab_b\nA = lab_b.B\nC = 1")
    parsed = count_parsing(monkeypatch)
    first = digest("lab_a", "A")
    assert sorted(parsed) == ["lab_a.py", "lab_b.py"]
    assert digest("lab_a", "A") == first
    digest("lab_a", "C")
    (folder / "results.txt").write_text("changes the folder")
    assert digest("lab_a", "A") == first
    assert sorted(parsed) == ["lab_a.py", "lab_b.py"]
    (folder / "lab_b.py").write_text("B = 12")
    assert digest("lab_a", "A") != first
    assert parsed[2:] == ["lab_b.py"]


@pytest.mark.usefixtures("settled")
def test_a_module_that_comes_before_another_on_the_path_is_seen(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lab_a.py").write_text("A = 1")
    first = digest("lab_a", "A")
    other = tmp_path_factory.mktemp("other")
    monkeypatch.syspath_prepend(str(other))
    assert digest("lab_a", "A") == first
    (other / "lab_a.py").write_text("A = 2")
    assert digest("lab_a", "A") != first


@pytest.mark.usefixtures("settled")
def test_a_module_that_appears_is_seen(folder: Path) -> None:
    (folder / "lab_a.py").write_text("def f():\n  import lab_later\n  return lab_later.A")
    first = digest("lab_a", "f")
    (folder / "lab_later.py").write_text("A = 1")
    importlib.invalidate_caches()
    assert digest("lab_a", "f") != first


@pytest.mark.usefixtures("settled")
def test_files_that_another_process_has_read_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "lab_a.py"
    path.write_text("def f(): return 1")
    key = fingerprint.key_of(importlib.import_module("lab_a").f, (), {})
    sent = fingerprint.Key(*json.loads(json.dumps(key[:-1])), sources=bytes(key.sources))
    fingerprint.prepare(sent)
    function = sys.modules["lab_a"].f
    parsed = count_parsing(monkeypatch)
    monkeypatch.setattr(sources, "_SLICES", {})
    assert fingerprint.recompute(sent, function, (), {}).name == key.name
    assert parsed == []
    # Unless the file is another one here.
    monkeypatch.setattr(sources, "_SLICES", {})
    monkeypatch.setattr(sources, "_SOURCES", {})
    monkeypatch.setattr(sources, "_FIRST", {})
    path.write_text("def f(): return 22")
    assert fingerprint.recompute(sent, function, (), {}).name != key.name
    assert parsed == ["lab_a.py"]


@pytest.mark.parametrize("imported", ["before", "while the call before it ran"])
def test_a_process_that_has_loaded_an_older_state_has_another_key(folder: Path, imported: str) -> None:
    """This happens to a worker of a block while the user edits a module."""
    path = folder / "lab_a.py"
    path.write_text("def f(): return 1")
    if imported == "before":
        function = importlib.import_module("lab_a").f
        old = fingerprint.key_of(function, (), {})
        fingerprint.prepare(old)
        assert fingerprint.recompute(old, function, (), {}).name == old.name
    else:
        function = importlib.import_module("lab_a").f
        fingerprint.recompute(fingerprint.key_of(len, (), {}), len, (), {})
    path.write_text("def f(): return 2")
    new = fingerprint.key_of(function, (), {})  # of what a new process would run
    assert fingerprint.recompute(new, function, (), {}).name != new.name


@pytest.mark.parametrize("known", [True, False], ids=["the call's", "another"])
def test_a_module_that_changes_while_its_call_is_unpickled_has_another_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """This includes a module that an input refers to only since it changed meanwhile."""
    path = folder / "lab_a.py"
    path.write_text("def f(): return 1")
    function = importlib.import_module("lab_a").f
    key = fingerprint.key_of(function if known else len, (), {})
    for name in ("_FIRST", "_SLICES", "_SOURCES"):  # as in a new process
        monkeypatch.setattr(sources, name, {})
    monkeypatch.setattr(sources, "_many", len(sys.modules))
    monkeypatch.setattr(sources, "_last", next(reversed(sys.modules)))
    fingerprint.prepare(key)
    path.write_text("def f(): return 22")
    now = fingerprint.key_of(function, (), {})
    assert fingerprint.recompute(key, function, (), {}).name != now.name


def test_stale_byte_code_has_another_key(folder: Path) -> None:
    path = folder / "lab_a.py"
    path.write_text("def f(): return 1")
    os.utime(path, ns=(10**18, 10**18))
    py_compile.compile(str(path))
    byte_code = importlib.util.cache_from_source(str(path))
    os.utime(byte_code, ns=(10**18, 10**18))
    path.write_text("def f(): return 2")
    os.utime(path, ns=(10**18 + 5, 10**18 + 5))
    function = importlib.import_module("lab_a").f
    assert function() == 1  # the import did not notice
    key = fingerprint.key_of(function, (), {})
    assert fingerprint.recompute(key, function, (), {}).name != key.name
    py_compile.compile(str(path))
    assert fingerprint.recompute(key, function, (), {}).name == key.name


@pytest.mark.parametrize(
    ("mode", "text", "stale"),
    [
        ("TIMESTAMP", "def f(): return 2", True),
        ("TIMESTAMP", "def f(): return 1", False),  # written anew, as a copy or a change of its rights leaves it
        ("UNCHECKED_HASH", "def f(): return 2", True),
        ("UNCHECKED_HASH", "def f(): return 1", False),
    ],
)
def test_byte_code_of_another_text_has_another_key(folder: Path, mode: str, text: str, stale: bool) -> None:
    path = folder / "lab_a.py"
    path.write_text("def f(): return 1")
    os.utime(path, ns=(10**18, 10**18))
    byte_code = py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode[mode])
    assert byte_code is not None
    path.write_text(text)
    os.utime(path, ns=(10**18, 10**18))
    os.utime(byte_code, ns=(10**18 + 1, 10**18 + 1))  # older than the last change of the file
    sources.remember(reach(frozenset({("lab_a", ("f",))})))
    function = importlib.import_module("lab_a").f
    assert function() == 1  # the import takes the byte code
    key = fingerprint.key_of(function, (), {})
    assert (fingerprint.recompute(key, function, (), {}).name != key.name) == stale


def test_nothing_is_imported(folder: Path) -> None:
    (folder / "lab_p").mkdir()
    (folder / "lab_p" / "__init__.py").write_text("1 / 0")
    (folder / "lab_p" / "a.py").write_text("1 / 0\nA = 1")
    first = digest("lab_p.a", "A")
    (folder / "lab_p" / "__init__.py").write_text("2 / 0")
    assert digest("lab_p.a", "A") != first
    assert not [name for name in sys.modules if name.startswith("lab_")]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("lab_x" + importlib.machinery.EXTENSION_SUFFIXES[0], "binary 1", "binary 2"),
        ("lab_x.py", "not Python 1", "not Python 2"),
        ("lab_x.py", "A = " + "+".join("1" * 20000), "A = " + "+".join("2" * 20000)),
    ],
)
def test_modules_that_cannot_be_parsed_count_whole(folder: Path, name: str, before: str, after: str) -> None:
    (folder / name).write_text(before)
    first = digest("lab_x", "A")
    (folder / name).write_text(after)
    assert digest("lab_x", "A") != first


def test_modules_in_a_zip_file_count_with_all_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "lab.zip"
    digests = []
    for value in (1, 2):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("lab_z.py", f"A = {value}")
        monkeypatch.syspath_prepend(str(path))
        importlib.invalidate_caches()
        digests.append(digest("lab_z", "A"))
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("A = 1\nB = 1", ("B = 1", "B = 2")),
        ("A = 1\ndef g(x=1): return x", ("x=1", "x=2")),
        ("import re\nA = 1\nP = re.compile('a')", ("'a'", "'b'")),
        ("import dataclasses\nA = 1\n@dataclasses.dataclass\nclass C:\n  a: int", ("int", "float")),
        ("A = 1\n# why", ("why", "because")),
        ("A = 1\nif __name__ == '__main__': print(A)", ("print(A)", "print(-A)")),
        ("import typing\nA = 1\nif typing.TYPE_CHECKING: import lab_b", ("lab_b", "lab_c")),
        ("A = 1\nclass B: pass\nclass C(B):\n  a = 1", ("a = 1", "a = 2")),
        ("A = 1\nB = [A, {1: A}, A + A, -A, lambda: A]", ("-A", "+A")),
    ],
)
def test_statements_that_a_name_does_not_use_do_not_count(folder: Path, text: str, change: tuple[str, str]) -> None:
    path = folder / "lab_a.py"
    path.write_text(text)
    first = digest("lab_a", "A")
    path.write_text(text.replace(*change))
    assert path.read_text() != text
    assert digest("lab_a", "A") == first


def test_warnings_in_a_module_are_not_shown(folder: Path) -> None:
    (folder / "lab_a.py").write_text("A = '\\d'\nB = 1 is 1")
    assert digest("lab_a", "A")


def test_distributions_that_are_used_are_named(folder: Path) -> None:
    site = folder / "site-packages"
    for name in ("lab_used", "lab_unused"):
        (site / f"{name}-1.0.dist-info").mkdir(parents=True)
        (site / f"{name}-1.0.dist-info" / "RECORD").write_text(f"{name}.py,,\n")
        (site / f"{name}.py").write_text("X = 1")
    sys.path.insert(0, str(site))  # taken back with the rest
    (folder / "lab_a.py").write_text("import lab_used, lab_unused\nA = lab_used.X\nB = lab_unused.X")
    roots = frozenset({("lab_a", ("A",))})
    first = reach(roots)
    assert first.versions == {"lab_used": "1.0"}
    (site / "lab_used.py").write_text("X = 2")
    assert reach(roots).digest == first.digest
    os.rename(site / "lab_used-1.0.dist-info", site / "lab_used-2.0.dist-info")
    os.utime(site, ns=(1, 1))
    assert reach(roots).versions == {"lab_used": "2.0"}
    assert reach(roots).digest == first.digest


def test_versions_are_part_of_the_key_on_request(folder: Path) -> None:
    site = folder / "site-packages"
    (site / "lab_used-1.0.dist-info").mkdir(parents=True)
    (site / "lab_used-1.0.dist-info" / "RECORD").write_text("lab_used.py,,\n")
    (site / "lab_used.py").write_text("X = 1")
    sys.path.insert(0, str(site))
    (folder / "lab_a.py").write_text("import lab_used\ndef f(): return lab_used.X")
    function = importlib.import_module("lab_a").f
    keys = {by: fingerprint.key_of(function, (), {}, by_version=by) for by in (False, True)}
    os.rename(site / "lab_used-1.0.dist-info", site / "lab_used-2.0.dist-info")
    os.utime(site, ns=(1, 1))
    for by, key in keys.items():
        now = fingerprint.key_of(function, (), {}, by_version=by)
        assert (key.versions, now.versions) == ({"lab_used": "1.0"}, {"lab_used": "2.0"})
        assert (key.name == now.name) is not by
        fingerprint.prepare(now)
        assert fingerprint.recompute(now, function, (), {}).name == now.name


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("A = 1\nB = A * 2", "* 2", "* 3"),
        ("import re\nX = re.compile('a')", "'a'", "'b'"),
        ("import dataclasses\n@dataclasses.dataclass\nclass C:\n  a: int = dataclasses.field(default=1)", "=1", "=2"),
        ("class C:\n  @property\n  def p(self): return 1\n  @p.setter\n  def p(self, v): pass", "return 1", "return 2"),
        ("import enum\nclass C(enum.Enum):\n  A = 1", "A = 1", "A = 2"),
        ("class C(ValueError):\n  A = 1", "A = 1", "A = 2"),
        ("if __name__ == '__main__':\n  print(1)", "(1)", "(2)"),
        ("import typing as t\nif t.TYPE_CHECKING:\n  X = 1", "X = 1", "X = 2"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  X = 1", "X = 1", "X = 2"),
    ],
)
def test_modules_that_a_function_does_not_reach_do_not_count(folder: Path, text: str, old: str, new: str) -> None:
    path = folder / "lab_a.py"
    path.write_text(f"{text}\ndef f(): return 0")
    first = digest("lab_a", "f")
    path.write_text(path.read_text().replace(old, new))
    assert digest("lab_a", "f") == first


def test_new_modules_are_distinguished_from_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = dict.fromkeys(("a", "b", "c"))
    monkeypatch.setattr(sys, "modules", modules)
    monkeypatch.setattr(sources, "_many", 0)
    monkeypatch.setattr(sources, "_last", "")
    assert sorted(sources._new_modules()) == ["a", "b", "c"]
    assert sources._new_modules() == []
    modules["d"] = None
    assert sources._new_modules() == ["d"]
    # Removed and imported again, as Python itself does with each module at the end of its import.
    modules["e"] = modules.pop("d")
    modules["d"] = None
    assert {"e"} <= set(sources._new_modules())
    del modules["a"]
    modules["f"] = None
    assert {"f"} <= set(sources._new_modules())
    assert sources._new_modules() == []
