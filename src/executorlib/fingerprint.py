"""The key of a call in the cache: a digest of its function and its inputs.

Pickled bytes do not serve: they change with the hash seed (order of sets), with who shares an object with
whom, and with the file and line where a function was written. So the walk below describes each object
itself, in bytes that depend on its value alone.

Each object becomes a *token*: short plain values are their own token, anything else is the digest of its
description, which holds the tokens of its parts.

- Data: by value. Dictionaries count their order, sets do not, arrays count dtype, shape and elements.
- Functions: by code, defaults, closure and the globals they read, and so on through the functions and
  classes found there. File names, line numbers and annotations do not count.
- What the standard library and installed packages define: by name; if it is the function that is called,
  by the version of its package too. Their globals are often caches, so their code is not followed.
- Classes: like functions, by bases and attributes.
- Everything else: by what it tells pickle (`object.__reduce_ex__`).

Byte code differs between minor versions of Python, and so do the keys of most functions.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import marshal
import os
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# Changing how anything is described means changing this, so that no new key meets an old entry.
_FORMAT = b"executorlib 1"

# Version 2 of marshal writes floats in binary and neither references nor interning, both of which depend on
# who shares an object with whom; for exactly these types it is short, unambiguous and ends where it ends.
_MARSHAL = 2
_SCALARS = frozenset({type(None), type(...), bool, int, float, complex, str, bytes})

_LONG = 64  # bytes; plain values that need more are replaced by their digest
_SMALL = 64  # elements; up to here describing plain values again is cheaper than remembering them

# Elements of sets may have to be described once a way that leads to them. Above this number of objects
# described in vain, the inputs are a dense net of sets that refer to each other.
_MOST_DISCARDED = 1_000_000

_PATH_PARTS = 12  # of the way to an object that an error text names

_MAIN = frozenset({None, "__main__", "__mp_main__"})
_NOWHERE = types.ModuleType("nowhere")
_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")
_LIBRARY_FOLDERS = re.compile(r"[/\\](site|dist)-packages[/\\]")

# In an importable module, globals of these types are constants; other objects there are state, such as locks,
# loggers and caches, which the module makes anew in every process.
_VALUE_MODULES = frozenset({"datetime", "decimal", "fractions", "pathlib"})
_VALUE_TYPES = (type, enum.Enum, tuple, list, dict, set, frozenset, str, bytes, int, float, complex)

# The generators behind `random.random`, `numpy.random.rand` and so on. Each process seeds its own, so that
# their state is no input of a call.
_SHARED_GENERATORS = {"Random": ("random", "_inst"), "RandomState": ("numpy.random.mtrand", "_rand")}

# Attributes of a class that hold code of its own, as against its bookkeeping.
_CODE_TYPES = (
    types.FunctionType,
    classmethod,
    staticmethod,
    property,
    functools.cached_property,
    functools.partialmethod,
)

_READS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_READS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})

# Python 3.13 and later store these in each class body: a line number, and a tuple that 3.13.0 puts in an order
# that changes with the hash seed.
_CLASS_BOOKKEEPING = frozenset({"__firstlineno__", "__static_attributes__"})


class Key(NamedTuple):
    """The key of a call, in plain data that travels as JSON.

    Attributes:
        name: Of the call's entry in the cache.
        versions: The installed distributions that the call reaches, and the version of each.
        by_version: Whether the name tells these versions apart.
        sources: What is known of the user's modules, so that `recompute` need not read them again.
    """

    name: str
    versions: dict[str, str]
    by_version: bool = False
    sources: Sequence[Any] = ()


def key_of(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, by_version: bool = False) -> Key:
    """Derive the key of a call that another process will run.

    The key is the same in another process or session, with any ``PYTHONHASHSEED``, and for the same function
    defined again. It is another one for another body, default, closure variable or global that the function,
    or one that it calls, reads.

    Args:
        fn: The function to be called.
        args: Its positional arguments.
        kwargs: Its keyword arguments; their order does not count.
        by_version: Whether another version of a distribution that the call reaches makes it another key.

    Returns:
        The key; its name is that of the function followed by 32 hexadecimal digits: ASCII letters, digits and
        underscores only.

    Raises:
        TypeError: If the function or an input holds an object that cannot be described, such as a lock.
    """
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
        raise TypeError(
            f"no cache key can be derived for the call of {name}: {where} {error}. "
            'Name the cache entry yourself with resource_dict={"cache_key": "..."}, '
            "or do without that object."
        ) from error.__cause__
    return Key(name + _digest(_FORMAT, b"".join(tokens)).hex(), {}, by_version)


def recompute(key: Key, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """Derive the key of a call in the process that is about to run it.

    Args:
        key: What `key_of` told the process that submitted the call.
        fn: The function, as it was unpickled here.
        args: Its positional arguments, unpickled here.
        kwargs: Its keyword arguments, unpickled here.

    Returns:
        The key of what this process runs. Another name than that of ``key`` means that it would run something
        else than what was looked up: something has changed in between, or this process has loaded a module of
        the user's before its file changed.

    Raises:
        TypeError: If the function or an input cannot be described.
    """
    return key_of(fn, args, kwargs, by_version=key.by_version)


def call_key(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Derive the name of a call's cache entry; see `key_of`."""
    return key_of(fn, args, kwargs).name


def same_definition(first: type, second: type) -> bool:
    """Whether two classes are made by the same code, wherever it was run; no where that cannot be told."""
    try:
        return _Walk().token(first) == _Walk().token(second)
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
    if not isinstance(module, str) or not _is_library(module):
        return None
    version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", None)
    return version if isinstance(version, str) else None


def _digest(*pieces: Any) -> bytes:
    # 128 bits: no two of 10**12 keys meet by chance, and file names stay short.
    state = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        state.update(piece)
    return state.digest()


class _Indescribable(Exception):
    """An object has no description; ``path`` leads to it, innermost part first."""

    def __init__(self, obj: object, reason: object) -> None:
        kind = type(obj)
        super().__init__(f"is a {kind.__module__}.{kind.__qualname__} ({reason})")
        self.path: list[str] = []


class _Described(NamedTuple):
    obj: object  # keeps the object, and with it its id
    token: bytes
    cycle: frozenset[int]


_NO_CYCLE: frozenset[int] = frozenset()


class _Walk:
    """Describes the objects of one call.

    The objects form a graph with cycles (a function that calls itself, a class whose methods name it, a list
    in itself). As in Tarjan's search for strongly connected components, `_open` holds the objects entered
    of which it is not known yet whether something below them leads back above them. A reference to one of
    them becomes a distance on that stack, which is the same wherever the cycle hangs. A token is kept for
    reuse only once its component is complete, and not reused while another member of the component is open;
    so it is always the token that a new description would give, and sharing an object never shows.
    """

    def __init__(self) -> None:
        self._open: dict[int, int] = {}
        self._stack: list[object] = []
        self._low = 0
        self._described: dict[int, _Described] = {}
        self._discarded = 0

    # -- the walk ---------------------------------------------------------------------------------------------

    def token(self, obj: Any) -> bytes:
        """Return bytes that stand for the object's value."""
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
        """Return the token of an object's part; ``label`` names it should it have none."""
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
            # What an element left open would lengthen the distances in those after it.
            self._discarded += len(self._stack) - place
            if self._discarded > _MOST_DISCARDED:
                raise _Indescribable(element, "sets that refer to each other too often")
            self._leave(place)
        return b"".join(sorted(tokens))

    def attempt(self, obj: Any) -> bytes:
        """Return the token of an object, or of its type where it has none."""
        place, low = len(self._stack), self._low
        try:
            return self.token(obj)
        except (_Indescribable, RecursionError):
            self._leave(place)
            self._low = low
            return _named(type(obj).__module__, type(obj).__qualname__)


def _is_library(name: str | None) -> bool:
    """Say whether a module belongs to the standard library or to an installed package."""
    module = sys.modules.get(name or "")
    if module is None or name in _MAIN:
        return False
    path = getattr(module, "__file__", None)
    if path is None:
        return name is not None and name.partition(".")[0] in sys.stdlib_module_names
    return path.startswith(_STANDARD_LIBRARY) or _LIBRARY_FOLDERS.search(path) is not None


def _find(module: str | None, qualname: str) -> Any:
    """Return what a loaded module holds under a dotted name, or None."""
    found: Any = sys.modules.get(module or "")
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


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
        if isinstance(obj, numpy.generic) and not obj.dtype.hasobject:
            element: bytes = obj.tobytes()
            return b"element:" + _dtype(walk, obj.dtype) + element
    if kind.__name__ in _SHARED_GENERATORS and _find(*_SHARED_GENERATORS[kind.__name__]) is obj:
        return _named(*_SHARED_GENERATORS[kind.__name__])
    module, qualname = _own_name(obj)
    if qualname is not None and _is_library(module) and _find(module, qualname) is obj:
        return _named(module, qualname)
    wrapped = getattr(obj, "__wrapped__", None) if callable(obj) else None
    if callable(wrapped) and _is_library(kind.__module__):  # functools.lru_cache, numba.jit
        return b"wrapped:" + _named(kind.__module__, kind.__qualname__) + walk.part(wrapped, "")
    return _reduced(walk, obj)


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


def _memory(walk: _Walk, obj: memoryview) -> bytes:
    return b"memoryview:" + walk.token((obj.format, obj.shape)) + obj.tobytes()


def _dtype(walk: _Walk, dtype: Any) -> bytes:
    if dtype.isbuiltin == 1:
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


def _reduced(walk: _Walk, obj: Any) -> bytes:
    reducer = copyreg.dispatch_table.get(type(obj))
    try:
        reduced: Any = reducer(obj) if reducer is not None else obj.__reduce_ex__(4)
        if isinstance(reduced, str):
            return _named(getattr(obj, "__module__", None), reduced) + walk.token(type(obj))
        build, args, state, items, pairs, set_state = (*reduced, None, None, None, None)[:6]
        items, pairs = list(items or ()), dict(pairs or ())
    except Exception as error:
        raise _Indescribable(obj, error) from error
    # What was made for this reduction alone is described in place and not remembered.
    tokens = [b"object:", walk.part(build, ""), walk.part(set_state, "")]
    states = state if type(state) is tuple and len(state) == 2 else (state,)
    for each in states:
        in_place = type(each) is dict
        tokens.append(_mapping(walk, each, ".{}") if in_place else walk.part(each, ", its state"))
    tokens += _sequence(walk, tuple(args)), _sequence(walk, items), _mapping(walk, pairs)
    return b"".join([b"%d;" % len(token) + token for token in tokens])


# -- functions and classes ------------------------------------------------------------------------------------


class _Code(NamedTuple):
    digest: bytes
    globals: tuple[str, ...]
    attributes: frozenset[str]


_CODES: weakref.WeakKeyDictionary[types.CodeType, _Code] = weakref.WeakKeyDictionary()


def _code(code: types.CodeType) -> _Code:
    """Describe byte code without where it was written, and name the globals and attributes that it reads."""
    known = _CODES.get(code)
    if known is not None:
        return known
    instructions = list(dis.get_instructions(code))
    names = {each.argval for each in instructions if each.opname in _READS_GLOBAL}
    attributes = {each.argval for each in instructions if each.opname in _READS_ATTRIBUTE}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            nested = _code(constant)
            names.update(nested.globals)
            attributes.update(nested.attributes)
    walk = _Walk()
    if _CLASS_BOOKKEEPING.isdisjoint(code.co_names):
        body = [code.co_code, walk.token(code.co_consts), walk.token(code.co_names)]
    else:
        body = [walk.token(_class_body(instructions))]
    parameters = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    variables = (code.co_varnames, code.co_cellvars, code.co_freevars)
    handlers = getattr(code, "co_exceptiontable", b"")
    digest = _digest(walk.token((parameters, variables, handlers)), *body)
    described = _CODES[code] = _Code(digest, tuple(sorted(names)), frozenset(attributes))
    return described


def _class_body(instructions: list[dis.Instruction]) -> list[object]:
    """List the instructions of a class body with their operands, less the bookkeeping."""
    body: list[object] = []
    for each in instructions:
        if each.opname == "STORE_NAME" and each.argval in _CLASS_BOOKKEEPING:
            body.pop()  # the instruction that loaded its value
        elif each.opname not in ("EXTENDED_ARG", "CACHE"):
            by_number = each.opcode in dis.hasjrel or each.opcode in dis.hasjabs
            body.append((each.opname, each.arg if by_number else each.argval))
    return body


def _function(walk: _Walk, fn: types.FunctionType) -> bytes:
    module, qualname = fn.__module__, fn.__qualname__
    importable = module not in _MAIN and _find(module, qualname) is fn
    if importable and _is_library(module):
        return _named(module, qualname)
    code = _code(fn.__code__)
    tokens = [b"function:", code.digest]
    if importable:
        tokens.append(_named(module, qualname))
    if fn.__defaults__:
        tokens.append(b"defaults:")
        tokens += [walk.part(value, ", default {}", i) for i, value in enumerate(fn.__defaults__)]
    for name, value in sorted((fn.__kwdefaults__ or {}).items()):
        tokens += b"default:", walk.token(name), walk.part(value, ", default of {!r}", name)
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        tokens += b"closure:", walk.part(cell, ", closure variable {!r}", name)
    home: Any = fn.__globals__.get("__name__")
    loaded = home not in _MAIN and vars(sys.modules.get(home, _NOWHERE)) is fn.__globals__
    for name, value in sorted(fn.__dict__.items()):
        tokens += b"attribute:", walk.token(name)
        tokens.append(_module_global(walk, value) if loaded else walk.part(value, ", attribute {!r}", name))
    if _is_library(home):
        return b"".join(tokens)
    for name in code.globals:
        if name in fn.__globals__:
            value = fn.__globals__[name]
            tokens += b"global:", walk.token(name)
            tokens.append(_module_global(walk, value) if loaded else walk.part(value, ", global {!r}", name))
            if type(value) is types.ModuleType:
                tokens += _used(walk, value, code.attributes, set())
    return b"".join(tokens)


def _used(walk: _Walk, module: types.ModuleType, attributes: frozenset[str], seen: set[str]) -> list[bytes]:
    """Describe what code that reads these attributes can use of a module of the user's own."""
    tokens: list[bytes] = []
    if _is_library(module.__name__) or module.__name__ in seen:
        return tokens
    seen.add(module.__name__)
    for name in sorted(attributes.intersection(vars(module))):
        value = vars(module)[name]
        tokens += b"global:", walk.token(name), _module_global(walk, value)
        if type(value) is types.ModuleType:
            tokens += _used(walk, value, attributes, seen)
    return tokens


def _module_global(walk: _Walk, value: Any) -> bytes:
    kind = type(value)
    constant = (
        kind in _BY_TYPE
        or isinstance(value, _VALUE_TYPES)
        or kind.__module__.partition(".")[0] in _VALUE_MODULES
        or kind.__module__ == "numpy"
        or hasattr(kind, "__dataclass_fields__")
        or hasattr(value, "__wrapped__")
    )
    return walk.attempt(value) if constant else _named(kind.__module__, kind.__qualname__)


def _class(walk: _Walk, cls: type) -> bytes:
    module, qualname = cls.__module__, cls.__qualname__
    importable = module not in _MAIN and _find(module, qualname) is cls
    if importable and _is_library(module):
        return _named(module, qualname)
    tokens = [b"class:", walk.token(qualname), walk.token(type(cls))]
    if importable:
        tokens.append(_named(module, qualname))
    tokens += [walk.part(base, ", base {}", base.__name__) for base in cls.__bases__]
    is_enum = issubclass(cls, enum.Enum)
    for name, member in getattr(cls, "__members__", {}).items() if is_enum else ():
        tokens += walk.token(name), walk.part(member._value_, ".{}", name)
    for name, value in sorted(vars(cls).items()):
        is_code = isinstance(value, _CODE_TYPES)
        private = name.startswith("__") and name.endswith("__") and name != "__slots__"
        if not is_code and (private or is_enum or name == "_abc_impl"):
            continue
        if isinstance(value, types.MemberDescriptorType):  # made from __slots__; cloudpickle loses them
            continue
        tokens += b"attribute:", walk.token(name)
        tokens.append(walk.part(value, ".{}", name) if module in _MAIN else _module_global(walk, value))
    return b"".join(tokens)


def _method(walk: _Walk, obj: Any) -> bytes:
    owner, name = obj.__self__, obj.__name__
    if owner is None or isinstance(owner, types.ModuleType):
        return _named(obj.__module__, obj.__qualname__)
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
    memoryview: _memory,
    types.MappingProxyType: lambda walk, obj: b"proxy:" + _mapping(walk, dict(obj)),
    types.ModuleType: lambda walk, obj: b"module:" + walk.token(obj.__name__),
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
    functools.cached_property: lambda walk, obj: b"cached_property:" + walk.part(obj.func, ""),
    # A cache that empties itself; functools.singledispatch keeps one.
    weakref.WeakKeyDictionary: lambda walk, obj: b"weak dictionary:",
}
