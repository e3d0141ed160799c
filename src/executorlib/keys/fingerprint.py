"""The key of a call in the cache: a digest of its function and its inputs.

Pickled bytes cannot serve as keys. They change with the hash seed (order of sets), with how objects are shared, and
with the file and line where a function was written. So this module describes each object itself, in bytes that depend
only on its value.

Each object becomes a *token*: short plain values are their own token, anything else is the digest of its
description, which holds the tokens of its parts.

- Data: by value. Dictionaries count their order, sets do not, arrays count dtype, shape and elements.
- Definitions of the standard library and of installed packages: by name; the called function itself also by the version
  of its package. Their code is not followed, because their globals are often caches.
- Definitions of a user's module: by name, and by the text of the module's file, because a worker imports them from
  there (`sources`).
- Functions of `__main__` and those without a name of their own, which are sent to workers by value: by code, defaults,
  closure, the modules they import and the globals they read, and so on through the functions and classes found there.
  File names, line numbers and annotations of functions do not count.
- Classes of that kind: by bases, attributes and annotations.
- Everything else: by what it tells pickle (`object.__reduce_ex__`).

So a key captures what another process gets to see, and that process derives the same key from what it was sent.

Byte code differs between minor versions of Python, so the keys of most functions do as well.
"""

from __future__ import annotations

import abc
import copyreg
import dis
import enum
import functools
import hashlib
import marshal
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from executorlib import serialize
from executorlib.keys import sources
from executorlib.keys.sources import Root
from executorlib.keys.statements import IMPORTERS

# Change this whenever the description of anything changes, so that new keys never match old entries.
_FORMAT = b"executorlib 2"

# Version 2 of marshal writes floats in binary, and has neither references nor interning, which depend on how objects
# are shared. For exactly these types its output is short and unambiguous, and no output is the start of another.
_MARSHAL = 2
_SCALARS = frozenset({type(None), type(...), bool, int, float, complex, str, bytes})

_LONG = 64  # bytes; longer plain values are replaced by their digest
_SMALL = 64  # elements; up to here, describing plain values again is cheaper than remembering them

# Elements of sets may have to be described again on every path that leads to them. If more objects than this are
# described in vain, the inputs are a dense net of sets that refer to each other.
_MOST_DISCARDED = 1_000_000

_DIGITS = 32  # of a key's digest, in hexadecimal
_PATH_PARTS = 12  # of the path to an object, as error texts show it

_MAIN = serialize.PROGRAM | {None}
# Kinds of numpy dtypes that are fully described by kind, size, byte order and unit, which are all in their `str`.
_PLAIN_KINDS = frozenset("biufcmMSU")

# The generators behind `random.random`, `numpy.random.rand` and so on. Each process seeds its own, so their state is
# not an input of a call.
_SHARED_GENERATORS = {"Random": ("random", "_inst"), "RandomState": ("numpy.random.mtrand", "_rand")}

# Attributes of a class that only say where it is from, or derive from the others. In each class body, Python 3.13 and
# later store a line number, and a tuple whose order in 3.13.0 changes with the hash seed. Annotations are described
# separately.
_CLASS_BOOKKEEPING = frozenset({"__firstlineno__", "__static_attributes__"})
_NOT_OF_A_CLASS = _CLASS_BOOKKEEPING | {
    "__module__",
    "__qualname__",
    "__dict__",
    "__weakref__",
    "__abstractmethods__",
    "__slotnames__",  # left there when an instance is pickled
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__classdictcell__",
    "_abc_impl",
}

_READS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_READS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})

# Attributes that `functools` gives its wrappers, besides copies of the function's own.
_OF_A_CACHE = frozenset({"__wrapped__", "cache_parameters", "__annotations__", "__annotate__"})
_OF_A_DISPATCHER = frozenset({"__wrapped__", "register", "dispatch", "registry", "_clear_cache"})

# Attributes that the standard library gives an enumeration, in one release of Python or another.
_OF_AN_ENUM = frozenset(
    f"_{name}_"
    for name in [
        "add_alias",
        "add_value_alias",
        "all_bits",
        "flag_mask",
        "generate_next_value",
        "hashable_values",
        "ignore",
        "inverted",
        "iter_member",
        "iter_member_by_def",
        "iter_member_by_value",
        "member_map",
        "member_names",
        "member_type",
        "new_member",
        "order",
        "singles_mask",
        "sort_order",
        "unhashable_values",
        "unhashable_values_map",
        "use_args",
        "value2member_map",
        "value_repr",
    ]
)

_DOTTED_NAME = re.compile(r"[^\W\d]\w*([.:][^\W\d]\w*)*")
# Modules of the standard library whose functions find a module by its name, whatever name the function has.
_MACHINERY = frozenset({"importlib", "pkgutil", "runpy", "pydoc", "imp"})


class Key(NamedTuple):
    """The key of a call, as plain data.

    Attributes:
        name: The name of the call's entry in the cache.
        versions: The installed distributions that the call reaches, and the version of each.
        by_version: True if the name depends on these versions.
        sources: What is known of the user's modules, so that `recompute` need not read them again. It is in the form
            that `sources.packed` makes, because it is long and mostly the same from call to call.
    """

    name: str
    versions: dict[str, str]
    by_version: bool = False
    sources: bytes = b""


def key_of(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    by_version: bool = False,
    reached: sources.Reached | None = None,
) -> Key:
    """Derive the key of a call that another process will run.

    The key is the same in any process or session, with any ``PYTHONHASHSEED``, and if the same function is defined
    again. It differs if the body, a default, a closure variable or a global differs that is read by the function or
    by one that it calls.

    Args:
        fn: The function to be called.
        args: Its positional arguments.
        kwargs: Its keyword arguments. Their order does not count.
        by_version: If true, the key depends on the versions of the distributions that the call reaches.
        reached: What the caller has looked up since this call was submitted and takes to be unchanged. New findings are
            added. None to look at the files of everything that the call reaches.

    Returns:
        The key. Its name is the function's followed by 32 hexadecimal digits, and has only ASCII letters, digits and
        underscores.

    Raises:
        TypeError: If the function or an input holds an object that cannot be described, such as a lock.
    """
    key, roots, read = _derive(fn, args, kwargs, by_version, {} if reached is None else reached)
    return key._replace(sources=sources.packed(roots, read)) if roots else key


def prepare(key: Key) -> None:
    """Record the files that a call will load. Call it before any of the call is unpickled, and `recompute` afterwards.

    Unpickling a call may load a module, and the module's file may change before unpickling ends, because inputs may
    take long to load. The state recorded here is the one that gets loaded, or an older one.
    """
    sources.remember(sources.unpacked(key.sources)[1] if key.sources else sources.NOTHING)


def recompute(key: Key, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """Derive the key of a call in the process that is about to run it and has called `prepare`.

    Args:
        key: The key that `key_of` gave to the process that submitted the call.
        fn: The function, as unpickled here.
        args: Its positional arguments, unpickled here.
        kwargs: Its keyword arguments, unpickled here.

    Returns:
        The key of what this process runs. If its name differs from that of ``key``, this process would run something
        other than what was looked up: something has changed in between, or this process loaded a module of the
        user's before the module's file changed.

    Raises:
        TypeError: If the function or an input cannot be described.
    """
    if key.sources:
        sources.learn(*sources.unpacked(key.sources))
    found, _, read = _derive(fn, args, kwargs, key.by_version, {})
    changed = sources.changed_here(read)
    sources.remember()
    if changed:
        return found._replace(name=found.name[:-_DIGITS] + _digest(b"changed", found.name.encode()).hex())
    return found


def call_key(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Derive the name of a call's cache entry, as `key_of` does."""
    return key_of(fn, args, kwargs).name


def _derive(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    by_version: bool,
    reached: sources.Reached,
) -> tuple[Key, frozenset[Root], sources.Slice]:
    called = fn
    while isinstance(called, functools.partial):
        called = called.func
    name = _call_name(called)
    walk = _Walk()
    try:
        tokens = [walk.part(fn, "the function"), walk.token(_version(called))]
        tokens += [walk.part(value, "args[{}]", index) for index, value in enumerate(args)]
        tokens.append(b"kwargs")
        for key in sorted(kwargs):
            tokens += walk.token(key), walk.part(kwargs[key], "kwargs[{!r}]", key)
    except _Indescribable as error:
        where = "".join(error.path[: -1 - _PATH_PARTS : -1])
        raise TypeError(f"no cache key can be derived for the call of {name}: {where} {error}.") from error.__cause__
    # Without assertions, a module means something else. A worker is started with the session's flags.
    pieces = [_FORMAT, b"optimize %d;" % sys.flags.optimize, b"".join(tokens)]
    roots = frozenset(walk.roots)
    if not roots:
        return Key(name + _digest(*pieces).hex(), {}, by_version), roots, sources.NOTHING
    read = reached.get(roots) or reached.setdefault(roots, sources.reach(roots))
    pieces.append(read.digest.encode())
    if by_version:
        pieces.append(repr(sorted(read.versions.items())).encode())
    return Key(name + _digest(*pieces).hex(), dict(read.versions), by_version), roots, read


def same_definition(first: type, second: type) -> bool:
    """Return True if two classes are known to be made by the same code, wherever that ran."""
    one, other = _Walk(), _Walk()
    try:
        return one.token(first) == other.token(second) and one.roots == other.roots
    except (_Indescribable, RecursionError):
        return False


def _call_name(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__name__", None)
    if not isinstance(name, str):
        name = type(fn).__name__
    return re.sub("[^A-Za-z0-9_]", "_", name.strip("<>"))[:64]


def _version(fn: Callable[..., Any]) -> str | None:
    """Return the version of the installed package that defines a function."""
    module = getattr(fn, "__module__", None)
    if not isinstance(module, str) or _home(module).users:
        return None
    # Not `getattr`: the standard library warns about such attributes that it is going to remove.
    version = vars(sys.modules.get(module.partition(".")[0], types)).get("__version__")
    return version if isinstance(version, str) else None


def _digest(*pieces: Any) -> bytes:
    # 128 bits: short file names, and no two of 10**12 keys collide by chance.
    state = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        state.update(piece)
    return state.digest()


class _Indescribable(Exception):
    """An object cannot be described; ``path`` leads to it, innermost part first."""

    def __init__(self, obj: object, reason: object) -> None:
        kind = type(obj)
        super().__init__(f"is a {kind.__module__}.{kind.__qualname__} ({reason})")
        self.path: list[str] = []


class _Described(NamedTuple):
    obj: object  # keeps the object alive, so that its id stays unique
    token: bytes
    cycle: frozenset[int]


_NO_CYCLE: frozenset[int] = frozenset()


class _Walk:
    """Describes the objects of one call.

    The objects form a graph with cycles (a function that calls itself, a class whose methods name it, a list in
    itself). As in Tarjan's search for strongly connected components, `_open` holds the entered objects for which it is
    not yet known if something below them leads back above them. A reference to one of them becomes a distance on that
    stack, which is the same wherever the cycle hangs. A token is kept only once its component is complete, and is not
    reused while another member of the component is open. So it always equals the token that a new description would
    give, and sharing an object never shows.

    Attributes:
        roots: The names that the objects refer to: modules and what they define.
    """

    def __init__(self) -> None:
        self.roots: set[Root] = set()
        self._open: dict[int, int] = {}
        self._stack: list[object] = []
        self._low = 0
        self._described: dict[int, _Described] = {}
        self._discarded = 0

    # -- the walk ---------------------------------------------------------------------------------------------

    def token(self, obj: Any) -> bytes:
        """Return bytes that represent the object's value."""
        kind = type(obj)
        if kind in _SCALARS or ((kind is tuple or kind is list) and len(obj) <= _SMALL and _all_scalars(obj)):
            if kind is bytes and len(obj) > _LONG:
                return b"#" + _digest(b"bytes:", obj)
            plain = marshal.dumps(obj, _MARSHAL)
            return plain if len(plain) <= _LONG else b"#" + _digest(b"plain:", plain)
        place = self._open.get(id(obj))
        if place is not None:
            self._low = min(self._low, place)
            return b"^%d;" % (len(self._stack) - place)
        known = self._described.get(id(obj))
        if known is not None and known.cycle.isdisjoint(self._open):
            return known.token
        return self._enter(obj)

    def part(self, obj: Any, label: str, key: object = None) -> bytes:
        """Return the token of an object's part. If it has none, the error names it by ``label``."""
        try:
            return self.token(obj)
        except _Indescribable as error:
            error.path.append(label.format(key))
            raise
        except RecursionError as error:
            failure = _Indescribable(obj, "nested too deeply")
            failure.path.append(label.format(key))
            raise failure from error

    def _enter(self, obj: Any) -> bytes:
        if type(obj) is memoryview:
            return self.token(obj.tobytes())  # it arrives as bytes
        place = len(self._stack)
        self._stack.append(obj)
        self._open[id(obj)] = place
        outer, self._low = self._low, place
        token = b"#" + _digest(_describe(self, obj))
        if self._low == place:
            alone = len(self._stack) == place + 1
            cycle = _NO_CYCLE if alone else frozenset(map(id, self._stack[place:]))
            self._leave(place)
            self._described[id(obj)] = _Described(obj, token, cycle)
        self._low = min(outer, self._low)
        return token

    def _leave(self, place: int) -> None:
        for obj in self._stack[place:]:
            del self._open[id(obj)]
        del self._stack[place:]

    def unordered(self, elements: Iterable[Any]) -> bytes:
        """Return the tokens of elements whose order does not count."""
        place = len(self._stack)
        tokens = []
        for element in elements:
            tokens.append(self.part(element, ", an element"))
            # Objects that an element left open would lengthen the distances in the elements after it.
            self._discarded += len(self._stack) - place
            if self._discarded > _MOST_DISCARDED:
                raise _Indescribable(element, "sets that refer to each other too often")
            self._leave(place)
        return b"".join(sorted(tokens))

    def named(self, module: str | None, qualname: str) -> bytes:
        """Return the token of something that a module defines, and note that the call reaches it."""
        home = _home(module)
        if home.root:
            self.roots.add((home.root, (qualname.partition(".")[0],) if home.users else ()))
        return _named(module, qualname)

    def module(self, name: str, chain: tuple[str, ...] = ()) -> None:
        """Note that the call reaches a module, or what a chain of attributes of it leads to."""
        home = _home(name)
        if home.root:
            self.roots.add((home.root, chain if home.users else ()))


class _Home(NamedTuple):
    """The way in which a module counts in a key.

    Attributes:
        users: True if it is the user's own.
        root: The module to follow: itself, or the outermost module of its distribution. Empty for the standard library
            and for modules without a file.
    """

    users: bool
    root: str


_PROGRAM, _STANDARD = _Home(True, ""), _Home(False, "")
_HOMES: dict[str, tuple[object, _Home]] = {}


def _home(name: str | None) -> _Home:
    if name in _MAIN:
        return _PROGRAM
    assert name is not None
    path = sources.loaded(name).get("__file__")
    known = _HOMES.get(name)
    if known is not None and known[0] == path:
        return known[1]
    found = _find_home(name)
    if name in sys.modules:
        _HOMES[name] = path, found
    return found


def _find_home(name: str) -> _Home:
    top = name.partition(".")[0]
    held = sources.loaded(name)
    path, folders = held.get("__file__"), held.get("__path__")
    if name not in sys.modules:
        found = sources.find(name)
    elif path or folders:
        found = sources.module_at(name, path or "", folders or ())
    elif top in sys.stdlib_module_names:
        return _STANDARD
    else:
        found = None
    if found is None:
        return _PROGRAM
    if found.users:
        return _Home(True, name)
    if found.distribution is None:
        return _STANDARD
    return _Home(False, top if sources.loaded(top).get("__file__") else name)


def _is_by_name(obj: object, module: str | None, qualname: str) -> bool:
    """Return True if an object is pickled as a name that identifies it, in a module with a file or in a library."""
    if not serialize.is_by_name(obj, module, qualname):
        return False
    home = _home(module)
    return not home.users or bool(home.root)


def _named(module: str | None, qualname: str) -> bytes:
    return b"name:" + marshal.dumps((module, qualname), _MARSHAL)


# -- descriptions, by type ------------------------------------------------------------------------------------


def _describe(walk: _Walk, obj: Any) -> bytes:
    kind = type(obj)
    describe = _BY_TYPE.get(kind)
    if describe is not None:
        return describe(walk, obj)
    if isinstance(obj, type):
        return _class(walk, obj)
    if isinstance(obj, enum.Enum):
        return b"member:" + walk.token(kind) + walk.token(obj._name_) + walk.token(obj._value_)
    if isinstance(obj, set | frozenset):
        state = walk.part(getattr(obj, "__dict__", None), ".__dict__")
        return b"subset:" + walk.token(kind) + state + walk.unordered(obj)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if kind is numpy.ndarray or kind is numpy.memmap:
            return _array(walk, obj)
        masked = sys.modules.get("numpy.ma")
        if masked is not None and kind is masked.MaskedArray:  # its pickle has a fill value other than its own
            arrays = _array(walk, obj.view(numpy.ndarray)) + _array(walk, masked.getmaskarray(obj))
            return b"masked " + arrays + walk.part((obj.fill_value, obj.hardmask), "")
        if isinstance(obj, numpy.generic) and not obj.dtype.hasobject:
            element: bytes = obj.tobytes()
            return b"element:" + _dtype(walk, obj.dtype) + element
    if kind is TypeVar and not _is_by_name(obj, obj.__module__, obj.__name__):
        parts = (obj.__name__, obj.__bound__, obj.__constraints__, obj.__covariant__, obj.__contravariant__)
        return b"type variable:" + walk.part(parts, "")
    if kind.__name__ in _SHARED_GENERATORS and serialize.held(*_SHARED_GENERATORS[kind.__name__]) is obj:
        return walk.named(*_SHARED_GENERATORS[kind.__name__])
    module, qualname = _own_name(obj)
    if qualname is not None and not _home(module).users and serialize.held(module, qualname) is obj:
        return walk.named(module, qualname)
    wrapped = getattr(obj, "__wrapped__", None) if callable(obj) else None
    if callable(wrapped) and not _home(kind.__module__).users:
        if qualname is not None and _is_by_name(obj, module, qualname) and isinstance(_reduce(obj), str):
            return walk.named(module, qualname)
        return _wrapper(walk, obj, wrapped)
    return _reduced(walk, obj)


def _wrapper(walk: _Walk, obj: Any, wrapped: Any) -> bytes:
    """Describe an object that a library has made of a function: by the function and everything that goes with it."""
    kind = type(obj)
    if kind is functools._lru_cache_wrapper:
        held: Any = obj.cache_parameters()
    elif kind.__module__.partition(".")[0] == "numba" and hasattr(obj, "_reduce_states"):
        states = obj._reduce_states()
        return b"compiled:" + _mapping(walk, {name: states[name] for name in sorted(states) if name != "uuid"})
    else:
        return _reduced(walk, obj)
    own = {name: value for name, value in sorted(vars(obj).items()) if name not in _OF_A_CACHE}
    head = b"wrapped:" + walk.named(kind.__module__, kind.__qualname__) + walk.part(wrapped, "")
    return head + _mapping(walk, held) + _mapping(walk, own, ".{}")


def _own_name(obj: Any) -> tuple[str | None, str | None]:
    module = getattr(obj, "__module__", None)
    qualname = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    if isinstance(module, str) and isinstance(qualname, str):
        return module, qualname
    return None, None


def _all_scalars(values: Iterable[object]) -> bool:
    return _SCALARS.issuperset(map(type, values))


def _sequence(walk: _Walk, obj: list[Any] | tuple[Any, ...]) -> bytes:
    if _all_scalars(obj):
        return b"plain:" + marshal.dumps(obj, _MARSHAL)
    tag = b"list:" if type(obj) is list else b"tuple:"
    return tag + b"".join([walk.part(value, "[{}]", index) for index, value in enumerate(obj)])


def _mapping(walk: _Walk, obj: dict[Any, Any], label: str = "[{!r}]") -> bytes:
    if _all_scalars(obj) and _all_scalars(obj.values()):
        return b"plain dict:" + marshal.dumps([*obj, *obj.values()], _MARSHAL)
    tokens = [b"dict:"]
    for key, value in obj.items():
        tokens += walk.part(key, ", key {!r}", key), walk.part(value, label, key)
    return b"".join(tokens)


def _set(walk: _Walk, obj: set[Any] | frozenset[Any]) -> bytes:
    tag = b"set:" if type(obj) is set else b"frozenset:"
    if _all_scalars(obj):
        return tag + b"".join(sorted([marshal.dumps(value, _MARSHAL) for value in obj]))
    return tag + b"*" + walk.unordered(obj)


def _dtype(walk: _Walk, dtype: Any) -> bytes:
    # Not `isbuiltin`, which is 0 for a dtype that was unpickled.
    if dtype.kind in _PLAIN_KINDS and not dtype.metadata:
        return walk.token(dtype.str)
    return b"dtype:" + _digest(_reduced(walk, dtype))


def _array(walk: _Walk, obj: Any) -> bytes:
    import numpy

    head = b"array:" + _dtype(walk, obj.dtype) + walk.token(obj.shape)
    if obj.dtype.hasobject:
        return head + walk.part(obj.reshape(-1).tolist(), "")
    if obj.nbytes == 0:
        return head
    if obj.flags.c_contiguous:
        return head + _digest(obj.reshape(-1).view(numpy.uint8))
    state = hashlib.blake2b(digest_size=16)
    blocks: Any = numpy.nditer(obj, flags=["external_loop", "buffered"], order="C", buffersize=1 << 16)
    for block in blocks:
        state.update(block.tobytes())
    return head + state.digest()


def _reduce(obj: Any) -> Any:
    reducer = copyreg.dispatch_table.get(type(obj))
    return reducer(obj) if reducer is not None else obj.__reduce_ex__(4)


def _loses_slots(cls: type) -> bool:
    """Return True if cloudpickle moves the values of an instance's slots into its ``__dict__`` at the other end."""
    by_name = _is_by_name(cls, cls.__module__, cls.__qualname__)
    return not by_name and any("__slots__" in vars(each) for each in cls.__mro__)


def _reduced(walk: _Walk, obj: Any) -> bytes:
    try:
        reduced = _reduce(obj)
        if isinstance(reduced, str):
            return walk.named(getattr(obj, "__module__", None), reduced) + walk.token(type(obj))
        build, args, state, items, pairs, set_state = (*reduced, None, None, None, None)[:6]
        items, pairs = list(items or ()), dict(pairs or ())
    except Exception as error:
        raise _Indescribable(obj, error) from error
    # Objects made only for this reduction are described in place and not remembered.
    tokens = [b"object:", walk.part(build, ""), walk.part(set_state, "")]
    states = state if type(state) is tuple and len(state) == 2 else (state,)
    own = any(each is not None and type(each) is not dict for each in states)  # from the user's __getstate__
    if build is copyreg.__newobj__ and not own and _loses_slots(type(obj)):  # type: ignore[attr-defined]
        merged = {name: value for each in states for name, value in (each or {}).items()}
        states = ({name: merged[name] for name in sorted(merged)},)
    for each in states:
        in_place = type(each) is dict
        tokens.append(_mapping(walk, each, ".{}") if in_place else walk.part(each, ", its state"))
    tokens += _sequence(walk, tuple(args)), _sequence(walk, items), _mapping(walk, pairs)
    return b"".join([b"%d;" % len(token) + token for token in tokens])


# -- functions and classes ------------------------------------------------------------------------------------


class _Code(NamedTuple):
    """The contents of byte code.

    Attributes:
        digest: A digest of it, without where it was written.
        globals: The globals that it reads, each with the attributes that it takes of it.
        imports: The modules and names that it imports, with the level of relative imports.
        texts: The strings in it that may name a module.
    """

    digest: bytes
    globals: dict[str, frozenset[tuple[str, ...]]]
    imports: frozenset[tuple[str, int, str | None]]
    texts: frozenset[str]


_CODES: weakref.WeakKeyDictionary[types.CodeType, _Code] = weakref.WeakKeyDictionary()


def _code(code: types.CodeType) -> _Code:
    known = _CODES.get(code)
    if known is not None:
        return known
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("EXTENDED_ARG", "CACHE")]
    read: dict[str, set[tuple[str, ...]]] = {}
    imports = set(_imported(code, instructions))
    texts = set(_texts(code.co_consts))
    for name, chain in _chains(instructions):
        read.setdefault(name, set()).add(chain)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            nested = _code(constant)
            imports.update(nested.imports)
            texts.update(nested.texts)
            for name, chains in nested.globals.items():
                read.setdefault(name, set()).update(chains)
    walk = _Walk()
    if _CLASS_BOOKKEEPING.isdisjoint(code.co_names):
        body = [code.co_code, walk.token(code.co_consts), walk.token(code.co_names)]
    else:
        body = [walk.token(_class_body(instructions))]
    parameters = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    variables = (code.co_varnames, code.co_cellvars, code.co_freevars)
    handlers = getattr(code, "co_exceptiontable", b"")
    digest = _digest(walk.token((parameters, variables, handlers)), *body)
    names = {name: frozenset(read[name]) for name in sorted(read)}
    described = _CODES[code] = _Code(digest, names, frozenset(imports), frozenset(texts))
    return described


def _chains(instructions: list[dis.Instruction]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Yield the globals that instructions read, each with the attributes that they take of it."""
    name, chain = None, []
    for each in instructions:
        if name is not None and each.opname in _READS_ATTRIBUTE:
            chain.append(each.argval)
            continue
        if name is not None:
            yield name, tuple(chain)
        name, chain = (each.argval, []) if each.opname in _READS_GLOBAL else (None, [])


def _imported(code: types.CodeType, instructions: list[dis.Instruction]) -> Iterable[tuple[str, int, str | None]]:
    """Yield the modules that instructions import, with the level of the import and the names taken of the module."""
    module: tuple[str, int] | None = None
    for index, each in enumerate(instructions):
        if each.opname == "IMPORT_NAME":
            level, names = (before.argval for before in instructions[index - 2 : index])
            module = (each.argval, level if isinstance(level, int) else 0)
            if not names or "*" in names:
                yield *module, None
            else:
                for name in names:
                    yield *module, name
    if not IMPORTERS.isdisjoint(code.co_names) or not _MACHINERY.isdisjoint(code.co_names):
        for text in _texts(code.co_consts):
            yield text, 0, None


def _texts(constants: Iterable[object]) -> Iterable[str]:
    """Yield the strings that may name a module or something in one, and all their leading parts."""
    for constant in constants:
        if isinstance(constant, str) and _DOTTED_NAME.fullmatch(constant):
            parts = re.split("[.:]", constant)
            for count in range(1, len(parts) + 1):
                yield ".".join(parts[:count])


def _finds_modules(value: object, chains: Iterable[tuple[str, ...]]) -> bool:
    """Return True if a global finds modules by name: the import machinery or `sys.modules`."""
    if isinstance(value, types.ModuleType):
        return value.__name__ in _MACHINERY or (value is sys and any(chain[:1] == ("modules",) for chain in chains))
    return value is sys.modules or (
        isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] in _MACHINERY
    )


def _class_body(instructions: list[dis.Instruction]) -> list[object]:
    """List the instructions of a class body with their operands, without the bookkeeping."""
    body: list[object] = []
    for each in instructions:
        if each.opname == "STORE_NAME" and each.argval in _CLASS_BOOKKEEPING:
            body.pop()  # the instruction that loaded its value
        else:
            by_number = each.opcode in dis.hasjrel or each.opcode in dis.hasjabs
            body.append((each.opname, each.arg if by_number else each.argval))
    return body


def _function(walk: _Walk, fn: types.FunctionType) -> bytes:
    module, qualname = fn.__module__, fn.__qualname__
    if _is_by_name(fn, module, qualname):
        return walk.named(module, qualname)
    home: Any = fn.__globals__.get("__name__")
    if home == "functools" and hasattr(fn, "registry"):  # of singledispatch; its variables are caches and state
        registry = [walk.token(item) for item in fn.registry.items()]
        own = {name: value for name, value in sorted(fn.__dict__.items()) if name not in _OF_A_DISPATCHER}
        wrapped = walk.part(fn.__wrapped__, "")  # type: ignore[attr-defined]
        return b"singledispatch:" + wrapped + b"".join(registry) + _mapping(walk, own, ".{}")
    code = _code(fn.__code__)
    tokens = [b"function:", code.digest, walk.token((fn.__name__, qualname)), walk.part(fn.__doc__, ".__doc__")]
    if fn.__defaults__:
        tokens.append(b"defaults:")
        tokens += [walk.part(value, ", default {}", i) for i, value in enumerate(fn.__defaults__)]
    for name, value in sorted((fn.__kwdefaults__ or {}).items()):
        tokens += b"default:", walk.token(name), walk.part(value, ", default of {!r}", name)
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        tokens += b"closure:", walk.part(cell, ", closure variable {!r}", name)
    for name, value in sorted(fn.__dict__.items()):
        tokens += b"attribute:", walk.token(name), walk.part(value, ", attribute {!r}", name)
    package = fn.__globals__.get("__package__")
    for imported, level, name_in_it in code.imports:
        absolute = sources.absolute(imported, level, package if isinstance(package, str) else None)
        if absolute:
            walk.roots.add((absolute, () if name_in_it is None else (name_in_it,)))
    if not _home(home).users:
        walk.module(home)
        return b"".join(tokens)
    for name, chains in code.globals.items():
        if name in fn.__globals__:
            value = fn.__globals__[name]
            if _finds_modules(value, chains):
                walk.roots.update((text, ()) for text in code.texts)
            if value is sys.modules:
                continue  # it arrives as the other process's own, with other modules in it
            tokens += b"global:", walk.token(name)
            if type(value) is types.ModuleType and _home(value.__name__).root:
                tokens.append(_named(value.__name__, ""))
                for chain in chains:
                    walk.module(value.__name__, chain)
            else:
                tokens.append(walk.part(value, ", global {!r}", name))
    return b"".join(tokens)


def _module(walk: _Walk, module: types.ModuleType) -> bytes:
    home = _home(module.__name__)
    walk.module(module.__name__)
    if home is not _PROGRAM or module.__name__ in _MAIN:
        return b"module:" + walk.token(module.__name__)
    # A module made by code, which is sent by value.
    held = {name: value for name, value in vars(module).items() if name != "__builtins__"}
    return b"module:" + _mapping(walk, held, ".{}")


def _class(walk: _Walk, cls: type) -> bytes:
    module, qualname = cls.__module__, cls.__qualname__
    if _is_by_name(cls, module, qualname):
        return walk.named(module, qualname)
    tokens = [b"class:", walk.token(qualname), walk.token(type(cls)), walk.token(_annotations(cls))]
    tokens += [walk.part(base, ", base {}", base.__name__) for base in cls.__bases__]
    if isinstance(cls, abc.ABCMeta):
        registered = [each() for each in abc._get_dump(cls)[0]]  # type: ignore[attr-defined]
        tokens += b"registered:", walk.unordered(each for each in registered if each is not None)
    members = getattr(cls, "__members__", {}) if issubclass(cls, enum.Enum) else None
    for name, member in (members or {}).items():
        tokens += walk.token(name), walk.part(member._value_, ".{}", name)
    inherited: dict[str, Any] = {}
    for base in reversed(cls.__bases__):
        inherited.update(vars(base))
    for name, value in sorted(vars(cls).items()):
        # cloudpickle leaves out attributes that a base has as well.
        if name in _NOT_OF_A_CLASS or (name in inherited and inherited[name] is value):
            continue
        if name == "__doc__" and not _is_written(cls, value):
            continue
        if members is not None and (name in members or _is_kept_by_enum(name)):
            continue
        # Descriptors made from __slots__, which cloudpickle drops.
        if isinstance(value, types.MemberDescriptorType):
            continue
        tokens += b"attribute:", walk.token(name), walk.part(value, ".{}", name)
    return b"".join(tokens)


def _is_written(cls: type, doc: object) -> bool:
    """Return True if the docstring of a class is its author's. A data class without one makes it of its fields."""
    return isinstance(doc, str) and not ("__dataclass_fields__" in vars(cls) and doc.startswith(f"{cls.__name__}("))


def _is_kept_by_enum(name: str) -> bool:
    """Return True if an attribute of an enumeration is the standard library's own record of its members."""
    return name in _OF_AN_ENUM


def _annotations(cls: type) -> list[tuple[str, str]]:
    """Return the annotations of a class itself, as text."""
    return [(name, _text(value)) for name, value in serialize.annotations_of(cls).items()]


def _text(annotation: object) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__"):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return annotation if isinstance(annotation, str) else repr(annotation)


def _method(walk: _Walk, obj: Any) -> bytes:
    owner, name = obj.__self__, obj.__name__
    if owner is None or isinstance(owner, types.ModuleType):
        return walk.named(obj.__module__, obj.__qualname__)
    function = getattr(obj, "__func__", None)
    return b"method:" + walk.token(name) + walk.part(function, "") + walk.part(owner, ".__self__")


def _descriptor(walk: _Walk, obj: Any) -> bytes:
    return b"descriptor:" + walk.token(obj.__objclass__) + walk.token(obj.__name__)


def _cell(walk: _Walk, obj: types.CellType) -> bytes:
    try:
        return b"cell:" + walk.part(obj.cell_contents, "")
    except ValueError:
        return b"empty cell:"


def _property(walk: _Walk, obj: property) -> bytes:
    return b"property:" + b"".join([walk.part(each, "") for each in (obj.fget, obj.fset, obj.fdel)])


_BY_TYPE: dict[type, Callable[[_Walk, Any], bytes]] = {
    list: _sequence,
    tuple: _sequence,
    dict: _mapping,
    set: _set,
    frozenset: _set,
    types.MappingProxyType: lambda walk, obj: b"proxy:" + _mapping(walk, dict(obj)),
    types.ModuleType: _module,
    types.CodeType: lambda walk, obj: b"code:" + _code(obj).digest,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _method,
    types.MethodWrapperType: _method,
    types.WrapperDescriptorType: _descriptor,
    types.MethodDescriptorType: _descriptor,
    types.ClassMethodDescriptorType: _descriptor,
    types.GetSetDescriptorType: _descriptor,
    types.MemberDescriptorType: _descriptor,
    types.CellType: _cell,
    property: _property,
    classmethod: lambda walk, obj: b"classmethod:" + walk.part(obj.__func__, ""),
    staticmethod: lambda walk, obj: b"staticmethod:" + walk.part(obj.__func__, ""),
    functools.singledispatchmethod: lambda walk, obj: (
        b"singledispatchmethod:" + walk.part(obj.func, "") + walk.part(obj.dispatcher, "")
    ),
    functools.cached_property: lambda walk, obj: b"cached_property:" + walk.part(obj.func, ""),
    # A cache that empties itself, as in functools.singledispatch.
    weakref.WeakKeyDictionary: lambda walk, obj: b"weak dictionary:",
}
