"""User objects to bytes and back: pickle protocol 5 with large buffers kept apart.

A pickled object is a list of frames: the pickle itself, then the buffers that it refers to. Frames are
opaque to everything between the two processes that write and read them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import sys
import weakref
from types import BuiltinFunctionType, FunctionType, ModuleType

TYPE_CHECKING = False  # typing's own would load typing, of which a starting worker needs nothing
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, TypeAlias

Frame: TypeAlias = bytes | bytearray | memoryview

PROTOCOL = 5

# A buffer of its own costs a length field and a slice on the other side; below this size copying it
# into the pickle is cheaper (measured with numpy arrays: break-even near 4 KiB).
_OUT_OF_BAND_BYTES = 4096

# Exactly these types pickle alike everywhere, so the much cheaper C pickler can take them.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})


@functools.cache
def _pickler() -> Any:
    """The class that pickles what plain pickle cannot, or by reference only; loaded when it is first needed."""
    import types
    from collections import ChainMap

    import cloudpickle  # takes longer to load than all else of a worker, and plain values do without

    table = cloudpickle.Pickler.dispatch_table
    reduce_code = table[types.CodeType]

    def keep_file_name(code: types.CodeType) -> tuple[Any, ...]:
        """Undo what cloudpickle 3.1.3 does: without the file's name a remote traceback has no lines of the function."""
        make, args = reduce_code(code)
        if "<dynamic-code>" in args:
            args = tuple(code.co_filename if arg == "<dynamic-code>" else arg for arg in args)
        return make, args

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap({types.CodeType: keep_file_name}, table)

    return Pickler


def _is_plain(items: Sequence[object]) -> bool:
    return all(type(item) in _PLAIN for item in items)


def dumps(obj: object) -> list[Frame]:
    """Pickle any object, functions and classes of `__main__` included.

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
    return [stream.getbuffer(), *buffers]


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


def loads(frames: Sequence[Frame]) -> Any:
    """Rebuild an object from its frames.

    Arrays stay views of the frames' memory, so frames must not be written to or reused afterwards.
    """
    return pickle.loads(frames[0], buffers=frames[1:])


def nbytes(frame: Frame) -> int:
    """Size of a frame."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def _is_importable(fn: object) -> bool:
    """Whether cloudpickle would pickle a function as the name under which a worker can import it."""
    if type(fn) is BuiltinFunctionType:
        return isinstance(fn.__self__, ModuleType)  # not a method of some object
    if type(fn) is not FunctionType or fn.__module__ == "__main__":
        return False
    module = sys.modules.get(fn.__module__)
    if module is None or getattr(module, fn.__qualname__, None) is not fn:
        return False
    cloudpickle = sys.modules.get("cloudpickle")
    return cloudpickle is None or not cloudpickle.list_registry_pickle_by_value()


class FunctionPickler:
    """Pickles each function once for all calls that were submitted before it was pickled.

    A function may be changed between two submits (a global, a closure cell, a default), and each call
    must see at least the state of its own submit. Bytes made after a call was submitted satisfy that, so
    they serve every call with a number below the one that was next when they were made.
    """

    _KEEP = 64
    # Of all pickles together: some may hold data, and stay although their functions are gone.
    _KEEP_BYTES = 64 * 1024 * 1024

    def __init__(self) -> None:
        # Weak, as nothing may be kept of a call once it is over.
        self._cache: dict[int, tuple[weakref.ref[Callable[..., Any]], int, bytes]] = {}
        self._bytes = 0

    def dumps(self, fn: Callable[..., Any], number: int, next_number: int) -> bytes:
        """Pickle ``fn`` for call ``number``, where the next call to be submitted is ``next_number``."""
        if _is_importable(fn):
            return pickle.dumps(fn, PROTOCOL)  # its name, which is cheap, and does not change
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
            with contextlib.suppress(TypeError):  # not all callables can be referred to weakly
                self._cache[id(fn)] = (weakref.ref(fn), next_number, data)
                self._bytes += len(data)
        return data

    def clear(self) -> None:
        """Forget all pickles."""
        self._cache.clear()
        self._bytes = 0
