"""Complete docstrings for users, from descriptions that are written once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from executorlib.resources import Resources

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def documented(source: type) -> Callable[[C], C]:
    """Complete a class's docstring: all arguments of the constructor in order, and any keys of ``resource_dict``.

    A section of arguments must have no blank line.

    Args:
        source: The class whose docstring describes the arguments that the class's own docstring leaves out.

    Raises:
        TypeError: The class's docstring describes an argument that the constructor does not have.
    """

    def complete(cls: C) -> C:
        if cls.__doc__ is None:  # `python -OO` removes docstrings
            return cls
        before, own, after = _split(cls.__doc__, "Args")
        described = {**_split(source.__doc__ or "", "Args")[1], **own}
        names = inspect.signature(cls).parameters
        if unknown := own.keys() - names:
            raise TypeError(
                f"{cls.__name__} has no argument {', '.join(sorted(unknown))}, which its docstring describes"
            )
        arguments = "".join(f"    {described[name]}\n" for name in names)
        cls.__doc__ = f"{before.rstrip()}\n\nArgs:\n{arguments}\n{after}".rstrip()
        return lists_keys(cls) if "resource_dict" in names else cls

    return complete


def lists_keys(described: F) -> F:
    """Append the keys of ``resource_dict``, as `Resources` describes them, to a docstring that has not got them yet."""
    if described.__doc__ is not None:
        described.__doc__ = f"{inspect.cleandoc(described.__doc__)}\n\n{_keys()}"
    return described


@functools.cache
def _keys() -> str:
    _, attributes, _ = _split(Resources.__doc__ or "", "Attributes")
    del attributes["template_keys"]  # not a key, but all that are not executorlib's
    return "Keys of resource_dict:\n" + "".join(
        f"    - ``{name}``{text.removeprefix(name)}\n" for name, text in attributes.items()
    )


def _split(docstring: str, title: str) -> tuple[str, dict[str, str], str]:
    """Split a docstring at a section: the text before it, its items by name, and the text after it."""
    before, _, rest = inspect.cleandoc(docstring).partition(f"\n{title}:\n")
    section, _, after = rest.partition("\n\n")
    items = re.split(r"^    (?=\w)", section, flags=re.MULTILINE)[1:]
    return before, {item.partition(":")[0]: item.rstrip() for item in items}, after
