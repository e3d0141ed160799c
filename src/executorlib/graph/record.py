"""The dependency graph: calls that are recorded instead of run.

An executor with one of the graph options passes every call to a `Graph` and runs none. A call returns a
`RecordedFuture`, done at once with None, which knows the graph and the step that it represents. Whatever users derive
from it or pass it to is recorded in turn, and at the end the graph is written:

    Graph.call, Graph.batch, RecordedFuture.item   record   (submit, batched, get_item_from_future)
    picture.draw, picture.write                    picture  (notebook; png, svg, pdf, dot)
    workflow_definition.export                     Python Workflow Definition, JSON
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import reprlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from executorlib.errors import refuse_future

_logger = logging.getLogger("executorlib")
_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxstring = _repr.maxother = _LABEL_LENGTH = 40  # characters


class RecordedFuture(Future[Any]):
    """The future of a recorded call, done at once with None.

    Attributes:
        graph: The graph that it belongs to.
        origin: The step of the graph whose result it represents.
    """

    def __init__(self, graph: Graph, origin: _Call | _Group | _Item) -> None:
        super().__init__()
        self.graph = graph
        self.origin = origin
        self.set_result(None)

    __reduce__ = refuse_future

    def item(self, key: Any) -> RecordedFuture:
        """Record one element of the result, for `get_item_from_future`.

        Args:
            key: Index or key of the element.

        Returns:
            A recorded future for the element.
        """
        return RecordedFuture(self.graph, _Item(self, key))


class Graph:
    """Calls in the order of their submission, with what each takes from the ones before it.

    Nothing in it runs. Containers that hold futures are copied when a call is recorded; other arguments are only
    referenced.
    """

    def __init__(self) -> None:
        self._steps: list[_Call | _Group] = []

    def call(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        resources: Mapping[str, Any] | None = None,
    ) -> RecordedFuture:
        """Record a call.

        Args:
            fn: The function.
            args: Its positional arguments. Futures in them, at any depth, become edges.
            kwargs: Its keyword arguments. Futures in them become edges, too.
            resources: What the call requests beyond the executor's own resources. Shown in the picture, not exported.

        Returns:
            A future that is done with None.

        Raises:
            TypeError: The function does not take these arguments.
        """
        step = _Call(fn, list(_bind(fn, args, kwargs)), dict(resources or {}))
        self._steps.append(step)
        return RecordedFuture(self, step)

    def batch(self, sources: Iterable[Future[Any]]) -> RecordedFuture:
        """Record a list of the results of several futures, for `batched`.

        Args:
            sources: The futures in the batch.

        Returns:
            A future that is done with None.
        """
        step = _Group(list(sources))
        self._steps.append(step)
        return RecordedFuture(self, step)

    def _origin(self, future: Future[Any]) -> tuple[_Call | _Group | Future[Any], list[Any]]:
        """Return where a future's value comes from, and the keys that lead from there to the value."""
        keys: list[Any] = []
        while isinstance(future, RecordedFuture) and future.graph is self:
            if not isinstance(future.origin, _Item):
                return future.origin, keys
            keys.insert(0, future.origin.key)
            future = future.origin.source
        return future, keys


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any

    def identity(self) -> Hashable:
        """Return a value that is equal for constants drawn as one: equal scalars, or the same object.

        It includes the type, because 1, 1.0 and True are equal.
        """
        if isinstance(self.value, (bool, int, float, complex, str, bytes, type(None))):
            return type(self.value), repr(self.value)
        return id(self.value)


@dataclasses.dataclass(frozen=True)
class _Container:
    """A container with a future somewhere in it. The keys of its items are indices, keys or field names."""

    kind: type
    items: list[tuple[Any, _Value]]

    def suffix(self, key: Any) -> str:
        if issubclass(self.kind, (set, frozenset)) or isinstance(key, Future):
            return ""
        if issubclass(self.kind, (list, tuple, dict)):
            return f"[{_short(key)}]"
        return f".{key}"


_Value: TypeAlias = "_Constant | _Container | Future[Any]"


@dataclasses.dataclass(frozen=True)
class _Argument:
    """One argument of a call.

    Attributes:
        name: The name of its parameter, with the index for one of `*args`.
        value: The value given for it.
        by_name: True if it can be passed by name.
    """

    name: str
    value: _Value
    by_name: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    fn: Callable[..., Any]
    arguments: list[_Argument]
    resources: dict[str, Any]

    def name(self) -> str:
        return _function_name(self.fn)

    def text(self) -> str:
        wishes = ", ".join(f"{key}={_short(value)}" for key, value in self.resources.items())
        return f"{self.name()}\n{wishes}" if wishes else self.name()

    def inputs(self) -> Iterator[tuple[str, _Constant | Future[Any]]]:
        for argument in self.arguments:
            yield from _leaves(argument.name, argument.value)


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    sources: list[Future[Any]]

    def inputs(self) -> Iterator[tuple[str, _Constant | Future[Any]]]:
        # A batch takes its inputs in the order in which they finish, so they have no fixed place in it.
        for source in self.sources:
            yield "", source


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    source: RecordedFuture
    key: Any


def _short(value: Any) -> str:
    """Show a value in one short line."""
    text = " ".join(_repr.repr(value).split())
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 3] + "..."


def _function_name(fn: Callable[..., Any]) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return str(name).rpartition("<locals>.")[2]


def _bind(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[_Argument]:
    """Name the arguments of a call after the function's parameters."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a built-in without a signature
        for index, value in enumerate(args):
            yield _Argument(str(index), _freeze(value), by_name=False)
        for name, value in kwargs.items():
            yield _Argument(name, _freeze(value), by_name=True)
        return
    try:
        # Partial, because init_function or the executor may fill in arguments that are missing here.
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        call = f"{_function_name(fn)}{signature}"
        raise TypeError(f"{call} does not take these arguments: {error}") from None
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            for index, element in enumerate(value):
                yield _Argument(f"{name}[{index}]", _freeze(element), by_name=False)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            for key, element in value.items():
                yield _Argument(key, _freeze(element), by_name=True)
        else:
            by_name = kind is not inspect.Parameter.POSITIONAL_ONLY
            yield _Argument(name, _freeze(value), by_name)


def _freeze(value: Any, within: frozenset[int] = frozenset()) -> _Value:
    """Copy the containers that lead to futures. `within` holds the ids of those being copied."""
    if isinstance(value, Future):
        return value
    parts: Iterable[tuple[Any, Any]]
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = enumerate(value)
    elif isinstance(value, dict):
        parts = [*value.items(), *((key, key) for key in value if isinstance(key, Future))]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        parts = [(f.name, getattr(value, f.name)) for f in fields if hasattr(value, f.name)]
    else:
        return _Constant(value)
    if id(value) in within:
        return _Constant(value)
    within |= {id(value)}
    items = [(key, _freeze(part, within)) for key, part in parts]
    if all(isinstance(part, _Constant) for _, part in items):
        return _Constant(value)
    return _Container(type(value), items)


def _leaves(path: str, value: _Value) -> Iterator[tuple[str, _Constant | Future[Any]]]:
    if isinstance(value, _Container):
        for key, part in value.items:
            yield from _leaves(path + value.suffix(key), part)
    else:
        yield path, value
