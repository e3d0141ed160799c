"""Makes the reference show the docstrings that `help` shows: some are completed when their module is imported."""

import inspect
from typing import Any

import griffe

_DECORATORS = {"executorlib.options.documented", "executorlib.options.lists_keys"}


class DocstringsOfHelp(griffe.Extension):
    """Replaces the docstrings of classes and functions with such a decorator, which Griffe reads from the source."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the docstring of one object."""
        decorators = obj.decorators if isinstance(obj, griffe.Class | griffe.Function) else []
        if obj.docstring and any(each.callable_path in _DECORATORS for each in decorators):
            obj.docstring.value = inspect.getdoc(griffe.dynamic_import(obj.path))
