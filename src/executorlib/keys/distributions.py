"""Finds the installed distribution that a module in a folder belongs to, and its version.

`importlib.metadata` answers this only for all distributions at once and reads every file list to do so, which takes up
to a second if much is installed. This module lists one folder and usually reads one file list.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

_INFO = (".dist-info", ".egg-info")
LIBRARY_FOLDERS = ("site-packages", "dist-packages")
# The limit for folders with other names, such as those that `pip install --target` fills. A program's own folder may
# hold more, and listing it whenever a file is added to it would take long.
_MOST_FILES = 2000
# Matches, in a list of files, a folder or a file that is a module.
_FIRST_PARTS = re.compile(r"^([^/,\n]+)(?=/|\.(?:py|pyc|so|pyd)(?:,|$))", re.MULTILINE)


class Distribution(NamedTuple):
    """An installed distribution."""

    name: str
    version: str


class _Folder:
    """The distributions in one folder, valid until something is added to the folder or removed from it."""

    def __init__(self, path: str, modified: int) -> None:
        self._path = path
        self.modified = modified
        by_name: dict[str, list[str]] = {}
        for info in _infos(path):
            by_name.setdefault(_normal(_split(info)[0]), []).append(info)
        self._by_name = by_name
        self._owners: dict[str, list[str]] | None = None
        self._known: dict[str, Distribution | None] = {}
        self._files: dict[str, frozenset[str]] = {}

    def owner(self, top: str, path: str) -> Distribution | None:
        """Return the distribution of the module at this path; `top` is the first part of the module's name."""
        if not self._by_name:
            return None
        if top in self._known:
            return self._known[top]
        infos = [each for each in self._by_name.get(_normal(top), ()) if top in self._tops(each)]
        if not infos:
            if self._owners is None:
                self._owners = {}
                for info in (each for known in self._by_name.values() for each in known):
                    for name in self._tops(info):
                        self._owners.setdefault(name, []).append(info)
            infos = self._owners.get(top, [])
        if len(infos) > 1:  # they share a namespace package
            listed = os.path.relpath(path, self._path).replace(os.sep, "/")
            infos = [each for each in infos if listed in self._modules(each)] or infos
            return self._described(infos[0])
        found = self._known[top] = self._described(infos[0]) if infos else None
        return found

    def _modules(self, info: str) -> frozenset[str]:
        """Return the files of a distribution. They are kept, because each module of a namespace package needs them."""
        if info not in self._files:
            lines = self._read(info, "RECORD").split("\n")
            self._files[info] = frozenset([line.partition(",")[0] for line in lines])
        return self._files[info]

    def _tops(self, info: str) -> set[str]:
        """Return the first parts of the names of the modules that a distribution has here."""
        if files := self._read(info, "RECORD"):
            return {name.partition(".")[0] for name in _FIRST_PARTS.findall(files)}
        if names := self._read(info, "top_level.txt"):
            return set(names.split())
        return {_split(info)[0].replace("-", "_")}  # some Debian packages have neither file

    def _described(self, info: str) -> Distribution:
        name, version = _split(info)
        if not version:
            file = "METADATA" if info.endswith(".dist-info") else "PKG-INFO"
            line = re.search("^Version: *(.+)$", self._read(info, file), re.MULTILINE)
            version = line[1].strip() if line else "unknown"
        return Distribution(name, version)

    def _read(self, info: str, file: str) -> str:
        try:
            with open(os.path.join(self._path, info, file), encoding="utf-8", errors="replace") as stream:
                return stream.read()
        except OSError:
            return ""


_FOLDERS: dict[str, _Folder] = {}


def owner(folder: str, top: str, path: str) -> Distribution | None:
    """Find the distribution that a module belongs to.

    A distribution installed in editable mode has no modules of its own in the folder; its code is where it is edited.

    Args:
        folder: The folder that holds the module or its outermost package.
        top: Name of that module or package.
        path: The module's file.

    Returns:
        The distribution, or None if the module belongs to none.
    """
    try:
        modified = os.stat(folder).st_mtime_ns
    except OSError:
        return None
    known = _FOLDERS.get(folder)
    if known is None or known.modified != modified:
        known = _FOLDERS[folder] = _Folder(folder, modified)
    return known.owner(top, path)


def _infos(folder: str) -> list[str]:
    """Return the directories (and egg-info files) that describe the distributions in a folder."""
    is_library = os.path.basename(folder) in LIBRARY_FOLDERS
    endings = _INFO if is_library else _INFO[:1]  # an egg-info elsewhere belongs to sources that are being edited
    found = []
    try:
        with os.scandir(folder) as files:
            for number, file in enumerate(files):
                if number >= _MOST_FILES and not is_library:
                    return []
                if file.name.endswith(endings):
                    found.append(file.name)
    except OSError:
        return []
    return sorted(found)


def _split(info: str) -> tuple[str, str]:
    """Split a name such as ``numpy-2.1.0.dist-info`` into name and version, which may be empty."""
    stem = re.sub(r"-py\d[\d.]*$", "", os.path.splitext(info)[0])
    name, _, version = stem.partition("-")
    return name, version


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "_", name).lower()


@functools.cache
def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def others(made_with: Mapping[str, str], here: Mapping[str, str | None]) -> dict[str, str]:
    """Return the versions that something was made with and that differ from those here, as far as these are known."""
    return {name: version for name, version in made_with.items() if here.get(name) not in (None, version)}


_told: set[str] = set()


def tell_of_others(made_with: Mapping[str, str], here: Mapping[str, str], directory: str) -> None:
    """Warn that a cached result was made with other versions than those here, once for each distribution."""
    names = sorted(name for name in others(made_with, here) if name not in _told)
    if not names:
        return
    import logging  # not needed by workers

    _told.update(names)
    changes = ", ".join(f"{name} {made_with[name]} (now {here[name]})" for name in names)
    logging.getLogger("executorlib").warning(
        "results in the cache directory %s were made with other versions: %s. They are used anyway; `executorlib cache "
        'prune --outdated -d %s` removes them, cache_versions="key" runs such calls again, and "ignore" turns this '
        "warning off.",
        directory,
        changes,
        directory,
    )
