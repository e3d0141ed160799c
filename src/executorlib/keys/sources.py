"""Finds what a call reaches in its user's modules, by reading their files.

Functions and classes of a module travel to a worker by name, and the worker imports the module from its file. So in a
key they count by the text of that file, not by their state in this process. Nothing is imported to find out.

A module is a row of statements. From the statement that defines a name, all names in it are followed into the functions
and classes of this module and of others, and through all imports. In every module that the import of a reached one
runs, each statement also counts that may change what others define (a call, a decorator of the user's, an assignment to
an item). Anything that cannot be followed counts as a whole: a module that uses `globals()`, one that is passed on as
an object, one without source.

Modules of the standard library and of installed distributions are not followed.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import marshal
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from executorlib.keys import distributions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from executorlib.keys.statements import Source, Statement

# A name in a module with attributes, such as ``("pkg.mod", ("Model", "fit"))``. Without any, the whole module.
Root: TypeAlias = tuple[str, tuple[str, ...]]

# Keys among imports, under names that no variable can have: modules that are loaded without getting a name, and modules
# that `import_module("...")` returns as objects.
LOADED, OBJECTS = "", "*"


_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")
_STANDARD_ZIP = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
_LIBRARY_FOLDERS = re.compile(rf"[/\\]({'|'.join(distributions.LIBRARY_FOLDERS)})[/\\]")
_BUILTINS = frozenset(dir(builtins))

# Calls that change nothing: all built-in functions and classes except these, and the library calls named below.
_HARMFUL = frozenset(
    {"setattr", "delattr", "__import__", "exec", "eval", "next", "print", "input", "open", "breakpoint"}
)
_HARMLESS_MODULES = frozenset(
    {
        "abc",
        "collections",
        "collections.abc",
        "dataclasses",
        "datetime",
        "enum",
        "fractions",
        "functools",
        "itertools",
        "math",
        "numbers",
        "os.path",
        "typing",
        "typing_extensions",
    }
)
_HARMLESS_CALLS = frozenset(
    {
        "contextlib.asynccontextmanager",
        "contextlib.contextmanager",
        "decimal.Decimal",
        "logging.getLogger",
        "operator.attrgetter",
        "operator.itemgetter",
        "os.environ.get",
        "os.getenv",
        "pathlib.Path",
        "re.compile",
        "threading.Lock",
        "threading.RLock",
        "types.MappingProxyType",
        "types.SimpleNamespace",
        *(f"numba.{name}" for name in ("guvectorize", "jit", "njit", "vectorize")),
        *(f"numpy.{name}" for name in ("arange", "array", "asarray", "dtype", "empty", "eye", "full", "linspace")),
        *(f"numpy.{name}" for name in ("cos", "exp", "log", "ones", "sin", "sqrt", "zeros")),
    }
)

# A file may be written twice within one tick of its file system's clock, so a younger stamp may hide a second change.
_TICK_NS = 2_000_000_000

_MOST_SLICES = 4096


# -- modules ----------------------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """A module's place, and its owner: the user or a distribution.

    Attributes:
        path: Its file; empty if it has none.
        folders: Where its submodules are searched for; empty if it is not a package.
        users: True if it is the user's own, part of neither the standard library nor an installed distribution.
        distribution: The distribution that it belongs to.
    """

    path: str
    folders: tuple[str, ...]
    users: bool
    distribution: distributions.Distribution | None


def module_at(name: str, path: str, folders: Iterable[str] = ()) -> Module:
    """Find out whose a module at this path is."""
    folders = tuple(folders)
    file = path or next(iter(folders), "")
    top, *_ = parts = name.split(".")
    if top == "executorlib" or not file:
        return Module(path, folders, False, None)
    if file.startswith(_STANDARD_LIBRARY) and not _LIBRARY_FOLDERS.search(file):
        return Module(path, folders, False, None)
    folder = os.path.dirname(file)
    for _ in range(len(parts) if _is_init(path) else len(parts) - 1):
        folder = os.path.dirname(folder)
    distribution = distributions.owner(folder, top, path)
    return Module(path, folders, distribution is None, distribution)


def _is_init(path: str) -> bool:
    return os.path.basename(path).partition(".")[0] == "__init__"


def loaded(name: str) -> dict[str, Any]:
    """Return what a loaded module holds, without what its ``__getattr__`` would make up."""
    return getattr(sys.modules.get(name), "__dict__", {})


def find(name: str) -> Module | None:
    """Find a module by name, without importing anything."""
    return _Finder().find(name)


def _is_namespace(module: Module) -> bool:
    return not module.path and bool(module.folders)


def absolute(module: str, level: int, package: str | None) -> str | None:
    """Return the full name of a module in an import statement, or None if it leads out of its package."""
    if not level:
        return module
    parts = (package or "").split(".")
    if not package or level > len(parts):
        return None
    return ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])


class _Finder:
    """Finds modules by name as an import statement would, without importing the packages that they are in."""

    def __init__(self) -> None:
        self.found: dict[str, Module | None] = {}

    def find(self, name: str) -> Module | None:
        """Return the module of that name, or None."""
        if name not in self.found:
            self.found[name] = self._find(name)
        return self.found[name]

    def _find(self, name: str) -> Module | None:
        package, _, _ = name.rpartition(".")
        if not package:
            if name in sys.builtin_module_names or importlib.machinery.FrozenImporter.find_spec(name):
                return Module("", (), False, None)
            spec = _spec(name, None)
        else:
            parent = self.find(package)
            if parent is None or not (parent.users or _is_namespace(parent)):
                return parent  # a package of others, so nothing in it is the user's
            spec = _spec(name, parent.folders) if parent.folders else None
        if spec is None:
            return _find_loaded(name)
        path = spec.origin if spec.has_location and spec.origin else ""
        return module_at(name, path, spec.submodule_search_locations or ())


def _spec(name: str, folders: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    try:
        spec = importlib.machinery.PathFinder.find_spec(name, folders)
        if spec is not None or folders is not None:
            return spec
        for finder in sys.meta_path:  # finders of packages installed in editable mode
            if getattr(finder, "__module__", "").startswith("__editable__"):
                spec = finder.find_spec(name, None)
                if spec is not None:
                    return spec
    except Exception:  # other people's finders may raise anything
        return None
    return None


def _find_loaded(name: str) -> Module | None:
    """Return a module that was loaded from another place than where an import would find it now."""
    held = loaded(name)
    path = held.get("__file__")
    return module_at(name, path, held.get("__path__") or ()) if isinstance(path, str) else None


# -- files ------------------------------------------------------------------------------------------------------------

Stamp: TypeAlias = list[int]


def stamp(path: str) -> Stamp:
    """Return values that change whenever a file or folder does; empty if there is none."""
    while True:
        try:
            status = os.stat(path)
        except NotADirectoryError:
            path = os.path.dirname(path)  # a zip file with modules
        except OSError:
            return []
        else:
            break
    if stat.S_ISDIR(status.st_mode):
        return [status.st_mtime_ns, status.st_ino]
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino]


def _is_settled(stamp: Stamp) -> bool:
    return not stamp or time.time_ns() - max(stamp[:2]) > _TICK_NS


_SOURCES: dict[tuple[str, str], tuple[Stamp, bool, Source]] = {}


def _source(name: str, module: Module) -> Source:
    """Read a module, or return what was read before if its file has not changed."""
    now = stamp(module.path)
    known = _SOURCES.get((name, module.path))
    if known is not None and known[0] == now and known[1]:
        return known[2]
    settled = _is_settled(now)
    data = _read(module.path)
    content = hashlib.blake2b(data, digest_size=16).digest()
    source = known[2] if known is not None and known[2].content == content else None
    if source is None:
        from executorlib.keys.statements import parse  # slow to load, and not needed for known files

        package = name if module.folders else name.rpartition(".")[0]
        source = parse(data, module.path, package, content)
    _SOURCES[name, module.path] = now, settled, source
    return source


def _read(path: str) -> bytes:
    while path:
        try:
            with open(path, "rb") as file:
                return file.read()
        except NotADirectoryError:
            path = os.path.dirname(path)  # a zip file with modules
        except OSError:
            return b""
    return b""


# -- slices -----------------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """The definitions that can be reached from some names, as plain data.

    Attributes:
        digest: A digest of it, in hexadecimal.
        versions: The distributions that it uses, with their versions.
        files: The files that it was read from, each with its stamp.
        settled: True if these stamps reveal every later change.
        found: Where each module was found that was searched for.
        search: Where they were searched for: the import path, and the folders with their stamps.
    """

    digest: str
    versions: dict[str, str]
    files: list[Any]
    settled: bool
    found: list[Any]
    search: list[Any]


class _Slicer:
    """Collects the statements that can be reached from some names."""

    def __init__(self) -> None:
        self._finder = _Finder()
        self._files: dict[str, Stamp] = {}
        self._versions: dict[str, str] = {}
        self._sources: dict[str, Source] = {}
        self._taken: dict[str, set[int]] = {}
        self._seen: set[tuple[Root, bool]] = set()
        self._work: list[tuple[Root, bool]] = []

    def slice(self, roots: Iterable[Root]) -> Slice:
        """Follow these names and return what they reach."""
        search = _search_path()
        for root in roots:
            self._later(root)
        while self._work:
            root, own = self._work.pop()
            self._reach(*root, own)
            if not self._work:
                self._take_subclasses()
        state = hashlib.blake2b(digest_size=16)
        for name in sorted(self._sources):
            source, taken = self._sources[name], self._taken[name]
            state.update(b"%s:%d;" % (name.encode(), len(taken)))
            if source.whole:
                state.update(source.content)
            for index, statement in enumerate(source.statements):
                for module, chain in statement.loads:
                    for each in (module, ".".join((module, *chain[:1]))):
                        if each in self._sources:  # importing it may have effects, whose order counts
                            state.update(b"import %s;" % each.encode())
                if index in taken:
                    state.update(statement.digest)
        found = self._finder.found
        missing = sorted(name for name, module in found.items() if module is None)
        state.update("\0".join(missing).encode())
        folders = [*search, *(each for module in found.values() if module and module.users for each in module.folders)]
        return Slice(
            state.hexdigest(),
            self._versions,
            [[path, stamp] for path, stamp in self._files.items()],
            all(map(_is_settled, self._files.values())),
            [[name, _plain(module)] for name, module in found.items()],
            [search, [[folder, stamp(folder)] for folder in dict.fromkeys(folders)]],
        )

    def _later(self, root: Root, own: bool = False) -> None:
        """Queue a name to follow. If it was read in its `own` module, it may be local to a function or built in."""
        if (root, own) not in self._seen:
            self._seen.add((root, own))
            self._work.append((root, own))

    def _load(self, name: str) -> Source | None:
        """Take what the import of a module runs. Return None if the module is not the user's."""
        if name in self._sources:
            return self._sources[name]
        module = self._finder.find(name)
        if module is None or not (module.users or _is_namespace(module)):
            return None
        if package := name.rpartition(".")[0]:
            self._load(package)
        if module.path:
            self._files[module.path] = stamp(module.path)
            source = _source(name, module)
        else:
            from executorlib.keys.statements import NAMESPACE

            source = NAMESPACE
        self._sources[name] = source
        self._taken[name] = set()
        for roots in source.imports.values():
            for root in roots:
                self._import(root)
        for star in source.stars:
            self._import((star, ()))
            self._later((star, ("__all__",)), own=True)
        if source.whole:
            self._later((name, ()))
        if source.lazy and module.folders:
            import pkgutil

            for _, inner, _ in pkgutil.iter_modules(module.folders, f"{name}."):
                self._later((inner, ()))
        for index, statement in enumerate(source.statements):
            if statement.runs or self._may_change(name, source, statement):
                self._take(name, index)
        return source

    def _import(self, root: Root) -> None:
        """Take what an import statement runs."""
        module, chain = root
        if self._load(module) is not None and chain and (inner := self._submodule(module, chain[0])):
            self._load(inner)

    def _submodule(self, module: str, name: str) -> str | None:
        found = self._finder.find(module)
        if found is None or not found.folders:
            return None
        inner = f"{module}.{name}"
        return inner if self._finder.find(inner) is not None else None

    def _may_change(self, module: str, source: Source, statement: Statement) -> bool:
        """Return True if a statement may change what others define, with something of the user's or by a call."""
        for name in statement.runs_with:
            if name in source.imports:
                found = [self._finder.find(each) for each, _ in source.imports[name]]
                if any(each is None or each.users for each in found):
                    return True
            elif name in source.defined or (source.stars and self._may_come_from_star(source, name)):
                return True
        return any(self._has_effects(source, chain) for chain in statement.calls) or any(
            self._is_registering(module, chain, set()) for chain in statement.extends
        )

    def _may_come_from_star(self, source: Source, name: str) -> bool:
        return name not in _BUILTINS or any(self._defines(star, name, set()) for star in source.stars)

    def _has_effects(self, source: Source, chain: tuple[str, ...]) -> bool:
        """Return True if a library function may do more than return something."""
        if not chain:
            return True
        if chain[0] in source.imports:
            return not all(_is_harmless(*target) for target in _targets(source.imports, chain))
        return chain[0] not in _BUILTINS or chain[0] in _HARMFUL or any(name[:2] == "__" for name in chain[1:])

    def _is_registering(self, module: str, chain: tuple[str, ...], seen: set[Root]) -> bool:
        """Return True if a class derives from a library's class, which may keep a register of its subclasses."""
        if (module, chain) in seen:
            return False
        seen.add((module, chain))
        source = self._load(module)
        if source is None:
            return not _is_harmless(module, chain)
        return any(self._is_registering(*target, seen) for target in _targets(source.imports, chain) if target[1])

    def _take(self, module: str, index: int) -> None:
        """Take a statement, and queue what it uses."""
        if index in self._taken[module]:
            return
        self._taken[module].add(index)
        statement = self._sources[module].statements[index]
        for chain in statement.uses:
            for target in _targets(statement.imports, chain):
                self._later(target)
            self._later((module, chain), own=True)
        for name, roots in statement.imports.items():
            for root in roots:
                self._later(root) if name == OBJECTS else self._import(root)

    def _reach(self, name: str, chain: tuple[str, ...], own: bool) -> None:
        """Take what defines a name in a module."""
        source = self._load(name)
        if source is None:
            self._use(name)
            return
        if not chain:
            self._take_all(name, source)
            return
        first, *rest = chain
        indices = source.defined.get(first, ())
        for index in indices:
            self._take(name, index)
        targets = [*_targets(source.imports, chain)]
        inner = None if own and first not in source.imports else self._submodule(name, first)
        if inner is not None:
            targets.append((inner, tuple(rest)))
        for target in targets:
            self._later(target)
        # Any module from which all names are imported may define the name, overriding this module or a built-in.
        stars = [star for star in source.stars if own or self._defines(star, first, set())]
        for star in stars:
            self._later((star, chain), own)
        if not (stars or own or indices or targets):
            self._take_all(name, source)  # defined in a way that cannot be seen

    def _use(self, name: str) -> None:
        """Note the distribution of a module that is not the user's."""
        module = self._finder.find(name)
        if module is not None and module.distribution is not None:
            self._versions[module.distribution.name] = module.distribution.version

    def _take_all(self, name: str, source: Source) -> None:
        for index in range(len(source.statements)):
            self._take(name, index)
        for roots in source.imports.values():
            for root in roots:
                self._later(root)
        for star in source.stars:
            self._later((star, ()))

    def _defines(self, module: str, name: str, seen: set[str]) -> bool:
        source = self._load(module) if module not in seen else None
        if source is None:
            return False
        seen.add(module)
        if name in source.defined or self._submodule(module, name):
            return True
        return any(self._defines(star, name, seen) for star in source.stars)

    def _take_subclasses(self) -> None:
        """Take the loaded classes that derive from taken ones, because these may have registered them."""
        for name, source in list(self._sources.items()):
            for index, statement in enumerate(source.statements):
                if any(self._is_taken(name, chain, set()) for chain in statement.extends):
                    self._take(name, index)

    def _is_taken(self, module: str, chain: tuple[str, ...], seen: set[Root]) -> bool:
        source = self._sources.get(module)
        if source is None or not chain or (module, chain) in seen:
            return False
        seen.add((module, chain))
        if chain[0] not in source.imports and not self._taken[module].isdisjoint(source.defined.get(chain[0], ())):
            return True
        return any(self._is_taken(*target, seen) for target in _targets(source.imports, chain))


def _targets(imports: dict[str, list[Root]], chain: tuple[str, ...]) -> Iterator[Root]:
    """Yield what a name with attributes stands for among the imports."""
    first, *rest = chain
    for module, attributes in imports.get(first, ()):
        yield module, (*attributes, *rest)
        if not attributes and not rest:  # as an object, it gives access to the modules below it
            yield from [root for root in imports.get(LOADED, ()) if root[0].startswith(module + ".")]


def _is_harmless(module: str, chain: tuple[str, ...]) -> bool:
    """Return True if calling something of a library, or deriving from it, has no effect but its result."""
    *within, _ = name = (module, *chain)
    return ".".join(within) in _HARMLESS_MODULES or ".".join(name) in _HARMLESS_CALLS


def _plain(module: Module | None) -> list[Any] | None:
    if module is None:
        return None
    path, folders, users, distribution = module
    return [path, list(folders), users, None if distribution is None else list(distribution)]


def _search_path() -> list[str]:
    """Return the folders of the import path that can change."""
    return [path or os.getcwd() for path in sys.path if isinstance(path, str) and not _is_settled_folder(path)]


@functools.cache
def _is_settled_folder(path: str) -> bool:
    """Return True if a folder or zip file of the import path is the standard library's."""
    return path.endswith(_STANDARD_ZIP) or (
        (path + os.sep).startswith(_STANDARD_LIBRARY) and not _LIBRARY_FOLDERS.search(path + os.sep)
    )


# -- slices that are known already ------------------------------------------------------------------------------------

# Slices, by the names from which they were reached.
Reached: TypeAlias = dict[frozenset[Root], Slice]

NOTHING = Slice("", {}, [], True, [], [[], []])

_SLICES: Reached = {}

# The stamps of the user's modules when this process first came across their files, and the time when it last looked.
_FIRST: dict[str, Stamp] = {}
_looked = time.time_ns()
# How many modules were loaded when this process last looked, and the last of them.
_many, _last = 0, ""


def reach(roots: frozenset[Root]) -> Slice:
    """Read what can be reached from names in modules, as a process that starts now would import it."""
    known = _SLICES.get(roots)
    if known is not None:
        current = _current(known)
        if current is not None:
            if current is not known:
                _SLICES[roots] = current
            return current
    if len(_SLICES) >= _MOST_SLICES:
        _SLICES.clear()
    found = _SLICES[roots] = _Slicer().slice(roots)
    return found


def learn(roots: frozenset[Root], known: Slice) -> None:
    """Take over what another process has read. It is used as long as the files here are the same."""
    _SLICES.setdefault(roots, known)


_PACKED: dict[frozenset[Root], tuple[Slice, bytes]] = {}

# Version 2 of marshal, which all releases of Python read.
_MARSHAL = 2


def packed(roots: frozenset[Root], read: Slice) -> bytes:
    """Pack what `reach` has found, for another process."""
    known = _PACKED.get(roots)
    if known is None or known[0] is not read:
        if len(_PACKED) >= _MOST_SLICES:
            _PACKED.clear()
        known = _PACKED[roots] = read, marshal.dumps((sorted(roots), [*read]), _MARSHAL)
    return known[1]


@functools.lru_cache(maxsize=64)
def unpacked(data: bytes) -> tuple[frozenset[Root], Slice]:
    """Return the names, and what was found, as another process has `packed` them."""
    roots, read = marshal.loads(data)
    return frozenset(roots), Slice(*read)


def _current(known: Slice) -> Slice | None:
    """Return a slice if it still holds, with its search path updated, or None."""
    if not known.settled:
        return None
    for path, then in known.files:
        if stamp(path) != then:
            return None
    search, folders = known.search
    if search == _search_path() and all(stamp(folder) == then for folder, then in folders):
        return known
    finder = _Finder()
    if any(_plain(finder.find(name)) != module for name, module in known.found):
        return None
    here = _search_path()
    folders = dict.fromkeys([*here, *(folder for folder, _ in folders if folder not in search)])
    return known._replace(search=[here, [[folder, stamp(folder)] for folder in folders]])


def remember(known: Slice = NOTHING) -> None:
    """Record the state of modules' files before the next step may load them, so that `changed_here` can find changes.

    Args:
        known: A slice whose files to record, besides those of the modules that this process has loaded.
    """
    global _looked
    _looked = time.time_ns()
    for path, _ in known.files:
        if path not in _FIRST:
            _FIRST[path] = stamp(path)
    for name in _new_modules():
        path = loaded(name).get("__file__")
        if not isinstance(path, str) or path in _FIRST:
            continue
        if not path.startswith(_STANDARD_LIBRARY) and not _LIBRARY_FOLDERS.search(path):
            _FIRST[path] = stamp(path)


def _new_modules() -> list[str]:
    """Return the modules that were loaded since the last time, and maybe others.

    New modules are at the end, unless older ones were removed. If a forked process went through all modules for each
    call, it would get its own copy of every page that holds one of their names.
    """
    global _many, _last
    many, last = len(sys.modules), next(reversed(sys.modules))
    # No Python code runs while a list is made, so no other thread can import something meanwhile.
    names = [*itertools.takewhile(_last.__ne__, reversed(sys.modules))]
    if len(names) + _many != many:
        names = [*sys.modules]
    _many, _last = many, last
    return names


def changed_here(known: Slice) -> bool:
    """Return True if this process may have loaded, or may yet load, another state of a module than its file has now."""
    changed = [path for path, then in known.files if not _is_as_first(path, then)]
    return bool(changed) or any(_has_stale_byte_code(path) for path, _ in known.files)


def _is_as_first(path: str, now: Stamp) -> bool:
    first = _FIRST.setdefault(path, now)
    if first is not now:
        return first == now
    # Not recorded, as nobody knew that it would be loaded. Since the last look it may have been loaded, and changed.
    return not now or max(now[:2]) < _looked - _TICK_NS


# By path: the stamps of a file and of its byte code, and True if the byte code belongs to another state of the file.
_BYTE_CODE: dict[str, tuple[Stamp, Stamp, bool]] = {}


def _has_stale_byte_code(path: str) -> bool:
    """Return True if an import would use byte code of another state of a file."""
    try:
        cached = importlib.util.cache_from_source(path)
    except NotImplementedError:
        return False
    compiled = stamp(cached)
    if not compiled or not path.endswith(".py"):
        return False
    now = stamp(path)
    known = _BYTE_CODE.get(path)
    if known is None or known[0] != now or known[1] != compiled:
        known = _BYTE_CODE[path] = now, compiled, _is_of_another_state(path, now, cached, compiled)
    return known[2]


def _is_of_another_state(path: str, now: Stamp, cached: str, compiled: Stamp) -> bool:
    """Return True if an import would use byte code that does not match the file, instead of compiling the file.

    Python compares the size of the file and the second of its change, which are the same if a file changes twice within
    a second or gets its old time back. If the byte code says so, Python compares a hash instead, or nothing.
    """
    code, source = _read(cached), _read(path)
    if code[:4] != importlib.util.MAGIC_NUMBER:
        return False
    flags, second, size = (int.from_bytes(code[i : i + 4], "little") for i in (4, 8, 12))
    if flags & 1:
        return code[8:16] != importlib.util.source_hash(source)  # if Python compares them itself, no harm is done
    if second != now[0] // 1_000_000_000 & 0xFFFFFFFF or size != len(source) & 0xFFFFFFFF:
        return False
    if compiled[0] > max(now[:2]):
        return False
    try:
        # A later time does not prove a change: the file's permissions may have been changed, or the file copied.
        known: object = marshal.loads(code[16:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return known != compile(source, path, "exec", dont_inherit=True)
    except Exception:
        return True
