"""A call's function and its parameters."""

from __future__ import annotations

import contextlib
from types import BuiltinFunctionType, FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any


class Function:
    """A callable, with what is known about its parameters."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def takes(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that can be passed by name; none if the callable does not say."""
        fn = self.fn
        if type(fn) is FunctionType and not hasattr(fn, "__wrapped__"):
            code = fn.__code__
            known: Sequence[str] = code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount]
            return [name for name in names if name in known]
        if type(fn) is BuiltinFunctionType:
            # Parsing the signature of a built-in takes much longer than calling it.
            text = getattr(fn, "__text_signature__", None) or ""
            names = [name for name in names if name in text]
            if not names:
                return []
        signature = self._signature()
        if signature is None:
            return []
        by_name = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
        known = [name for name, parameter in signature.parameters.items() if parameter.kind.name in by_name]
        return [name for name in names if name in known]

    def _signature(self) -> inspect.Signature | None:
        import inspect  # takes a new worker milliseconds, and few calls need it

        try:
            return inspect.signature(self.fn)
        except (TypeError, ValueError):  # built-ins without a signature
            return None

    def left_out(self, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """Return those of ``values`` whose parameters the caller left out."""
        wanted = {name: values[name] for name in self.takes(values) if name not in kwargs}
        if wanted and args:
            signature = self._signature()
            if signature is not None:
                with contextlib.suppress(TypeError):
                    for name in signature.bind_partial(*args).arguments:
                        wanted.pop(name, None)
        return wanted
