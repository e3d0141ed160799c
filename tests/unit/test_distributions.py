"""The distribution of a module, in folders as pip, editable installs and Debian leave them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from executorlib.keys import distributions
from executorlib.keys.distributions import owner


def install(folder: Path, info: str, *files: str, **metadata: str) -> None:
    """Put files into a folder, and what pip writes of them."""
    for name in files:
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text("")
    described = folder / info
    described.mkdir(parents=True)
    for name, text in metadata.items():
        (described / name).write_text(text)
    if info.endswith(".dist-info"):
        (described / "RECORD").write_text("".join(f"{name},sha256=0,0\n" for name in (*files, f"{info}/METADATA")))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


def found(folder: Path, path: str) -> tuple[str, ...] | None:
    top = path.partition("/")[0].partition(".")[0]
    return owner(str(folder), top, str(folder / path))


def test_modules_and_packages(site: Path) -> None:
    install(site, "alpha-1.2.dist-info", "alpha/__init__.py", "alpha/b.py", "_alpha.cpython-311.so")
    install(site, "Py_Beta-2.0.post1.dist-info", "beta.py")
    assert found(site, "alpha/__init__.py") == found(site, "alpha/b.py") == ("alpha", "1.2")
    assert found(site, "_alpha.cpython-311.so") == ("alpha", "1.2")
    assert found(site, "beta.py") == ("Py_Beta", "2.0.post1")
    assert found(site, "gamma.py") is None


def test_a_namespace_of_several_distributions(site: Path) -> None:
    install(site, "space_a-1.dist-info", "space/a/__init__.py")
    install(site, "space_b-2.dist-info", "space/b.py")
    assert found(site, "space/a/__init__.py") == ("space_a", "1")
    assert found(site, "space/b.py") == ("space_b", "2")


def test_files_of_a_namespace_are_listed_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"space/m{number}.py" for number in range(5)]
    install(site, "space_a-1.dist-info", *names)
    install(site, "space_b-2.dist-info", "space/b.py")
    read: list[str] = []
    original = distributions._Folder._read

    def counting(self: distributions._Folder, info: str, file: str) -> str:
        read.append(info)
        return original(self, info, file)

    monkeypatch.setattr(distributions._Folder, "_read", counting)
    assert found(site, "space/b.py") == ("space_b", "2")
    read.clear()
    assert {found(site, name) for name in names} == {("space_a", "1")}
    assert read == []


def test_eggs_of_older_tools_and_of_debian(site: Path) -> None:
    install(site, "old-1.0-py3.11.egg-info", top_level_txt="")
    (site / "old-1.0-py3.11.egg-info" / "top_level.txt").write_text("older\n")
    (site / "named-3.1.egg-info").write_text("Metadata-Version: 1.0\n")
    install(site, "unnamed.egg-info")
    (site / "unnamed.egg-info" / "PKG-INFO").write_text("Name: unnamed\nVersion: 4.5\n")
    assert found(site, "older/__init__.py") == ("old", "1.0")
    assert found(site, "named.py") == ("named", "3.1")
    assert found(site, "unnamed/__init__.py") == ("unnamed", "4.5")


def test_edited_sources_belong_to_no_distribution(site: Path, tmp_path: Path) -> None:
    sources = tmp_path / "src"
    (sources / "alpha").mkdir(parents=True)
    install(site, "alpha-1.0.dist-info", "__editable___alpha_finder.py", "alpha.pth")
    install(sources, "alpha.egg-info", PKG_INFO="")
    assert found(site, "alpha/__init__.py") is None
    assert found(sources, "alpha/__init__.py") is None


def test_folders_by_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "target", "alpha-1.0.dist-info", "alpha.py")
    assert found(tmp_path / "target", "alpha.py") == ("alpha", "1.0")
    monkeypatch.setattr(distributions, "_MOST_FILES", 1)
    install(tmp_path / "large", "alpha-1.0.dist-info", "alpha.py")
    assert found(tmp_path / "large", "alpha.py") is None


def test_another_version_is_seen(site: Path) -> None:
    install(site, "alpha-1.0.dist-info", "alpha.py")
    assert found(site, "alpha.py") == ("alpha", "1.0")
    os.rename(site / "alpha-1.0.dist-info", site / "alpha-1.1.dist-info")
    os.utime(site, ns=(1, 1))  # the clock of the file system may not have gone on
    assert found(site, "alpha.py") == ("alpha", "1.1")


def test_warning_names_each_distribution_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributions, "_told", set())
    here = {"alpha": "2", "beta": "2", "gamma": "2"}
    with caplog.at_level(logging.WARNING, "executorlib"):
        distributions.tell_of_others({"alpha": "2"}, here, "store")
        assert not caplog.records
        for _ in range(2):
            distributions.tell_of_others({"alpha": "1", "beta": "1", "gamma": "2", "delta": "1"}, here, "store")
    (record,) = caplog.records
    assert "store were made with other versions: alpha 1 (now 2), beta 1 (now 2)." in record.getMessage()
