"""Converts user objects to bytes and back, by pickle protocol 5 with large buffers kept apart.

A pickled object is a list of frames: the pickle itself, then the buffers that it refers to. Everything between the two
processes that write and read them treats frames as opaque.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import sys
import weakref
from types import BuiltinFunctionType, FunctionType, ModuleType

TYPE_CHECKING = False  # importing it would load typing, which a starting worker does not need
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, TypeAlias

Frame: TypeAlias = bytes | bytearray | memoryview

PROTOCOL = 5

# A separate buffer costs a length field and a slice on the other side. Below this size, copying it into the pickle is
# cheaper (measured with numpy arrays: equal near 4 KiB).
_OUT_OF_BAND_BYTES = 4096


class Pickled:
    """Embeds a pickle in another one without first rebuilding what it holds, because that would run users' code."""

    __slots__ = ("_data",)

    def __init__(self, data: Frame) -> None:
        self._data = bytes(data)

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickled, (self._data,)


def unpickled(data: bytes) -> Any:
    """Return what a `Pickled` unpickles to. `cache.unpickle` replaces this function with its own."""
    return pickle.loads(data)


# Exactly these types pickle the same everywhere, so the much cheaper C pickler can handle them.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})


# The types that `functools` makes of functions. Pickle either refuses them or stores only a name, which is useless
# without the program that defines it. A cache arrives empty.
_CachedFunction = type(functools.cache(len))
_dispatching: Any = functools.singledispatch(len)
_DISPATCHING = _dispatching.__code__


# The modules that are the program itself; the second is for programs started by `multiprocessing`.
PROGRAM = frozenset({"__main__", "__mp_main__"})


def is_by_name(obj: object, module: object, qualname: str) -> bool:
    """Return True if an object is pickled as a name, under which a worker imports it from its module."""
    if not isinstance(module, str) or module in PROGRAM or held(module, qualname) is not obj:
        return False
    cloudpickle = sys.modules.get("cloudpickle")
    by_value = () if cloudpickle is None else cloudpickle.list_registry_pickle_by_value()
    return not by_value or not any(f"{module}.".startswith(f"{each}.") for each in by_value)


def _is_found_by_name(obj: Any) -> bool:
    return is_by_name(obj, getattr(obj, "__module__", None), getattr(obj, "__qualname__", ""))


def held(module: str | None, qualname: str) -> Any:
    """Return what a loaded module holds under a dotted name, or None."""
    found: Any = sys.modules.get(module or "")
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _reduce_cached(cached: Any) -> str | tuple[Any, ...]:
    """Reduce what `functools.lru_cache` made of a function."""
    if _is_found_by_name(cached):
        return str(cached.__qualname__)
    parameters = cached.cache_parameters()
    attributes = {name: value for name, value in vars(cached).items() if name != "cache_parameters"}
    return _make_cached, (cached.__wrapped__, parameters["maxsize"], parameters["typed"]), attributes


def _make_cached(fn: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(fn)


def _reduce_cached_property(obj: functools.cached_property[Any]) -> tuple[Any, ...]:
    # Before Python 3.12, it holds a lock.
    attributes = {name: value for name, value in vars(obj).items() if name not in ("func", "lock")}
    return functools.cached_property, (obj.func,), attributes


def _reduce_dispatching_method(obj: functools.singledispatchmethod[Any]) -> tuple[Any, ...]:
    attributes = {name: value for name, value in vars(obj).items() if name not in ("func", "_method_cache")}
    return functools.singledispatchmethod, (obj.func,), attributes


def _reduce_single_dispatch(dispatching: Any) -> tuple[Any, ...]:
    """Reduce what `functools.singledispatch` made of a function."""
    wrapped = dispatching.__wrapped__
    made_anew = ("register", "dispatch", "registry", "_clear_cache")
    attributes = {name: value for name, value in vars(dispatching).items() if name not in made_anew}
    names = {name: getattr(dispatching, name) for name in ("__module__", "__name__", "__qualname__", "__doc__")}
    state = dict(dispatching.registry), names, attributes
    return functools.singledispatch, (wrapped,), state, None, None, _fill_single_dispatch


def _fill_single_dispatch(dispatching: Any, state: tuple[dict[type, Any], dict[str, Any], dict[str, Any]]) -> None:
    registry, names, attributes = state
    for cls, implementation in registry.items():
        dispatching.register(cls, implementation)
    for name, value in names.items():
        setattr(dispatching, name, value)
    vars(dispatching).update(attributes)


# From Python 3.14 on, annotations are evaluated on demand, which fails for a name that is imported only for type
# checkers. cloudpickle loses the annotations of classes, and evaluates those of functions.
_LAZY_ANNOTATIONS = sys.version_info >= (3, 14)


def _reduce_class(cls: type, by_cloudpickle: Callable[[Any], Any]) -> Any:
    """Reduce a class together with what cloudpickle loses: its annotations and its qualified name."""
    reduced = by_cloudpickle(cls)
    if isinstance(reduced, tuple) and len(reduced) > 2:
        attributes = reduced[2][0]
        if cls.__qualname__ != cls.__name__:
            attributes["__qualname__"] = cls.__qualname__
        if _LAZY_ANNOTATIONS and "__annotate_func__" in vars(cls):
            attributes["__annotations__"] = annotations_of(cls)
    return reduced


def _reduce_lazily_annotated(fn: FunctionType, by_cloudpickle: Callable[[Any], Any]) -> Any:
    """Reduce a function of Python 3.14 or later, even if its annotations cannot be evaluated."""
    try:
        fn.__annotations__  # noqa: B018  # cloudpickle evaluates it
    except Exception:
        if not _is_found_by_name(fn):
            return by_cloudpickle(_annotated_by_text(fn))
    return by_cloudpickle(fn)


def _annotated_by_text(fn: FunctionType) -> FunctionType:
    """Return a copy of a function that has the text of its annotations in place of their values."""
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    for name in ("__module__", "__qualname__", "__doc__", "__kwdefaults__"):
        setattr(copy, name, getattr(fn, name))
    vars(copy).update(vars(fn))
    copy.__annotations__ = annotations_of(fn)
    return copy


def annotations_of(obj: Any) -> dict[str, Any]:
    """Return the annotations of a function or of a class itself; as source text if one cannot be evaluated."""
    if sys.version_info >= (3, 14):
        import annotationlib

        try:
            return dict(annotationlib.get_annotations(obj))
        except Exception:  # mostly a NameError
            return dict(annotationlib.get_annotations(obj, format=annotationlib.Format.STRING))
    else:
        return dict(vars(obj).get("__annotations__", {}) if isinstance(obj, type) else obj.__annotations__)


@functools.cache
def _pickler() -> Any:
    """Return the class that pickles what plain pickle cannot, or only by reference. It is loaded when first needed."""
    import types
    from collections import ChainMap

    import cloudpickle  # loads slower than the rest of a worker, and plain values do not need it

    table = cloudpickle.Pickler.dispatch_table
    reduce_code = table[types.CodeType]
    by_cloudpickle = cloudpickle.Pickler.reducer_override

    def keep_file_name(code: types.CodeType) -> tuple[Any, ...]:
        """Restore the file's name, which cloudpickle 3.1.3 drops. Remote tracebacks need it to show the source."""
        make, args = reduce_code(code)
        # By type, because with the option -bb comparing one of the bytes among them with text is an error.
        return make, tuple(code.co_filename if type(arg) is str and arg == "<dynamic-code>" else arg for arg in args)

    special = {
        types.CodeType: keep_file_name,
        _CachedFunction: _reduce_cached,
        functools.cached_property: _reduce_cached_property,
        functools.singledispatchmethod: _reduce_dispatching_method,
    }

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap(special, table)

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is FunctionType and obj.__code__ is _DISPATCHING and not _is_found_by_name(obj):
                return _reduce_single_dispatch(obj)
            if isinstance(obj, type):
                return _reduce_class(obj, functools.partial(by_cloudpickle, self))
            if _LAZY_ANNOTATIONS and isinstance(obj, FunctionType):
                return _reduce_lazily_annotated(obj, functools.partial(by_cloudpickle, self))
            return by_cloudpickle(self, obj)

    return Pickler


def _is_plain(items: Sequence[object]) -> bool:
    return all(type(item) in _PLAIN for item in items)


def dumps(obj: object) -> list[Frame]:
    """Pickle any object, including functions and classes of `__main__`.

    Raises:
        Exception: Whatever the object's own reduction raises.
    """
    if type(obj) in _PLAIN:
        return [pickle.dumps(obj, PROTOCOL)]
    buffers: list[Frame] = []

    def keep_small_in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _OUT_OF_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    stream = io.BytesIO()
    _pickler()(stream, PROTOCOL, buffer_callback=keep_small_in_band).dump(obj)
    # Not `getbuffer`: a stream that is collected in a cycle with a view of it complains on standard error.
    return [stream.getvalue(), *buffers]


def dumps_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Frame]:
    """Pickle the arguments of a call as the pair ``(args, kwargs)``."""
    if _is_plain(args) and (not kwargs or _is_plain(tuple(kwargs.values()))):
        return [pickle.dumps((args, kwargs), PROTOCOL)]
    return dumps((args, kwargs))


def dumps_in_band(obj: object) -> bytes:
    """Pickle an object into one piece of bytes."""
    stream = io.BytesIO()
    _pickler()(stream, PROTOCOL).dump(obj)
    return stream.getvalue()


@functools.cache
def _exception_pickler() -> Any:
    class ExceptionPickler(_pickler()):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, BaseException):
                cls = type(obj)
                # A class that has its own way of pickling is left to it.
                if cls.__reduce__ is _built_in(cls).__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__:
                    reduced: Any = obj.__reduce__()
                    return (rebuilt_exception, reduced[:2], *reduced[2:])
            return super().reducer_override(obj)

    return ExceptionPickler


def dumps_exception(error: BaseException) -> bytes:
    """Pickle an exception, and those in it, so that they are rebuilt without calling their ``__init__``.

    By default, ``__init__`` is called with ``args``, which are those that were passed to `Exception` and often too few.

    Raises:
        Exception: Something in it cannot be pickled.
    """
    stream = io.BytesIO()
    _exception_pickler()(stream, PROTOCOL).dump(error)
    return stream.getvalue()


def rebuilt_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Make an exception with ``args``. Unpickling sets its attributes next."""
    built_in = _built_in(cls)
    error: BaseException = built_in.__new__(cls, *args)
    built_in.__init__(error, *args)
    return error


def _built_in(cls: type[BaseException]) -> Any:
    """Return the built-in class whose memory layout an exception class has."""
    found: Any = cls
    while found.__module__ != "builtins":
        found = found.__base__
    return found


class _Found(Exception):
    """Ends a search."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self.what = what


def find(obj: object, kinds: tuple[type, ...]) -> object | None:
    """Return the first object of these types that pickling meets; None if it meets none or fails before."""

    class Finder(_pickler()):  # type: ignore[misc]
        def reducer_override(self, each: Any) -> Any:
            if isinstance(each, kinds):
                raise _Found(each)
            return super().reducer_override(each)

    try:
        # Large buffers are not copied.
        Finder(io.BytesIO(), PROTOCOL, buffer_callback=lambda buffer: False).dump(obj)
    except _Found as found:
        return found.what
    except BaseException:  # the user's objects may raise anything
        return None
    return None


def loads(frames: Sequence[Frame]) -> Any:
    """Rebuild an object from its frames.

    Arrays stay views of the frames' memory, so nobody may write to the frames or reuse them afterwards.
    """
    return pickle.loads(frames[0], buffers=frames[1:])


def nbytes(frame: Frame) -> int:
    """Return the size of a frame in bytes."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def _is_importable(fn: object) -> bool:
    """Return True if cloudpickle would pickle a function as a name under which a worker can import it."""
    if type(fn) is BuiltinFunctionType:
        return isinstance(fn.__self__, ModuleType)  # so it is not a method of some object
    return type(fn) is FunctionType and is_by_name(fn, fn.__module__, fn.__qualname__)


class FunctionPickler:
    """Pickles each function once for all calls that were submitted before it was pickled.

    A function may change between two submits (a global, a closure cell, a default), and each call must see at least the
    state of its own submit. Bytes made after a call was submitted satisfy that, so they serve every call with a number
    below the one that was next when they were made.
    """

    _KEEP = 64
    # The most bytes of all pickles together, because some may hold data and stay after their functions are gone.
    _KEEP_BYTES = 64 * 1024 * 1024

    def __init__(self) -> None:
        # Weak, because nothing of a call may be kept once it is over.
        self._cache: dict[int, tuple[weakref.ref[Callable[..., Any]], int, bytes]] = {}
        self._bytes = 0

    def dumps(self, fn: Callable[..., Any], number: int, next_number: int) -> bytes:
        """Pickle ``fn`` for call ``number``, when the next call to be submitted is ``next_number``."""
        if _is_importable(fn):
            return pickle.dumps(fn, PROTOCOL)  # only its name, which is cheap and does not change
        known = self._cache.get(id(fn))
        if known is not None and known[0]() is fn and number < known[1]:
            return known[2]
        data = dumps_in_band(fn)
        if known is not None:
            self._bytes -= len(known[2])
            del self._cache[id(fn)]
        if len(self._cache) >= self._KEEP or self._bytes + len(data) > self._KEEP_BYTES:
            self.clear()
        if len(data) <= self._KEEP_BYTES:
            with contextlib.suppress(TypeError):  # not all callables can have weak references
                self._cache[id(fn)] = (weakref.ref(fn), next_number, data)
                self._bytes += len(data)
        return data

    def clear(self) -> None:
        """Forget all pickles."""
        self._cache.clear()
        self._bytes = 0
