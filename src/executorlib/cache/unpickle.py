"""Unpickling what another session pickled: its classes of `__main__` become this session's identical ones.

A class that a script or a notebook defines is pickled by value. To cloudpickle it is another class in every session,
even if the same lines made it: objects would not equal those made here, and an exception would not be caught by its
name. So such a class is compared with the class of that name here, in the way in which cache keys tell functions apart.
If both have the same definition, the object is rebuilt with the class that is here.
"""

from __future__ import annotations

import io
import pickle
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

# The functions with which cloudpickle rebuilds a class and an enumeration, with the position of the class's id among
# their arguments; and the function with which it sets the attributes of the class.
_MAKERS = {"_make_skeleton_class": 4, "_make_skeleton_enum": 5}
_SETTER = "_class_setstate"
# Unpickles a pickle inside the pickle, such as what one of several ranks returned.
_NESTED = ("executorlib.serialize", "unpickled")


class Unpickler(pickle.Unpickler):
    """Rebuilds classes that were pickled by value.

    Attributes:
        known: Classes to use instead, by cloudpickle's id.
        made: Classes that were newly made, by that id.
    """

    known: dict[str, type]
    made: dict[str, type]

    def find_class(self, module: str, name: str) -> Any:
        """Find a global, with replacements for those that rebuild classes."""
        if (module, name) == _NESTED:
            return self._nested
        found = super().find_class(module, name)
        if module.partition(".")[0] == "cloudpickle":
            if name in _MAKERS:
                return self._maker(found, _MAKERS[name])
            if name == _SETTER:
                return self._setter(found)
        return found

    def _nested(self, data: bytes) -> Any:
        loader = type(self)(io.BytesIO(data))
        loader.known, loader.made = self.known, self.made
        return loader.load()

    def _maker(self, make: Callable[..., type], place: int) -> Callable[..., type]:
        def made(*args: Any) -> type:
            number = args[place]
            if number in self.known:
                return self.known[number]
            new = make(*args)
            if number is not None:
                self.made[number] = new
            return new

        return made

    def _setter(self, set_state: Callable[[type, Any], type]) -> Callable[[type, Any], type]:
        # Our classes keep their attributes. Those from the pickle would read globals of the other session.
        ours = set(self.known.values())
        return lambda cls, state: cls if cls in ours else set_state(cls, state)


def loads(data: bytes | bytearray | memoryview, unpickler: type[Unpickler] = Unpickler) -> Any:
    """Rebuild an object.

    Args:
        data: The object's pickle.
        unpickler: The class that unpickles it.

    Raises:
        Exception: Whatever the pickle's own code raises.
    """
    loaded, made = _load(data, unpickler, {})
    if not made:
        return loaded
    known = {number: ours for number, cls in made.items() if (ours := _same_here(cls)) is not None}
    return _load(data, unpickler, known)[0] if known else loaded


def _load(
    data: bytes | bytearray | memoryview, unpickler: type[Unpickler], known: dict[str, type]
) -> tuple[Any, dict[str, type]]:
    loader = unpickler(io.BytesIO(data))
    loader.known, loader.made = known, {}
    return loader.load(), loader.made


def _same_here(cls: type) -> type | None:
    """Return this process's class with the same name and definition, if it is another object."""
    if cls.__module__ != "__main__" or "<locals>" in cls.__qualname__:
        return None
    from executorlib.keys.fingerprint import same_definition

    for ours in _of_that_name(cls):
        if ours is cls:
            return None
        if same_definition(ours, cls):
            return ours
    return None


def _of_that_name(cls: type) -> Iterator[type]:
    """Yield candidates: the program's class, then classes that came by value with something else, as in a job."""
    ours: Any = sys.modules.get("__main__")
    for part in cls.__qualname__.split("."):
        ours = getattr(ours, part, None)
    if isinstance(ours, type):
        yield ours
    known = getattr(sys.modules.get("cloudpickle.cloudpickle"), "_DYNAMIC_CLASS_TRACKER_BY_CLASS", ())
    for each in list(known):
        if (each.__module__, each.__qualname__) == (cls.__module__, cls.__qualname__):
            yield each
