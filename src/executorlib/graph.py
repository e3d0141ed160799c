"""The dependency graph: calls that are recorded instead of run, to be drawn or exported.

An executor with one of the graph options hands every call to a `Graph` and runs none. A call gives
a `RecordedFuture`, done at once with None, that knows the graph and the step it stands for. What a
user derives from it or passes it to is recorded in turn, and at the end the graph is written:

    Graph.call, Graph.batch, RecordedFuture.item   record   (submit, batched, get_item_from_future)
    Graph.draw, Graph.write                        picture  (notebook; png, svg, pdf, dot)
    Graph.export                                   Python Workflow Definition, JSON
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import math
import numbers
import os
import reprlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from executorlib.errors import refuse_future

_FORMATS = ("png", "svg", "pdf", "dot")

# Names that the format's own package gives its version and its helper functions,
# python-workflow-definition 0.1.5.
_FORMAT_VERSION = "0.1.0"
_GET_LIST = "python_workflow_definition.shared.get_list"
_GET_DICT = "python_workflow_definition.shared.get_dict"
_GET_ITEM = "python_workflow_definition.executorlib.get_item"
_RESERVED_PORT = "__result__"

_logger = logging.getLogger("executorlib")
_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxstring = _repr.maxother = _LABEL_LENGTH = 40  # characters


class RecordedFuture(Future[Any]):
    """What a recorded call returns: a future that is done at once with None.

    Attributes:
        graph: The graph that it belongs to.
        origin: The step in it whose result it stands for.
    """

    def __init__(self, graph: Graph, origin: _Call | _Batch | _Item) -> None:
        super().__init__()
        self.graph = graph
        self.origin = origin
        self.set_result(None)

    __reduce__ = refuse_future

    def item(self, key: Any) -> RecordedFuture:
        """Record one element of the result: what `get_item_from_future` returns for this future.

        Args:
            key: Index or key of the element.

        Returns:
            A future for the element, itself recorded.
        """
        return RecordedFuture(self.graph, _Item(self, key))


class Graph:
    """Calls in the order of their submission, and what each takes from the ones before it.

    Nothing in it runs. Containers that hold futures are copied when a call is recorded; all other
    arguments are referred to.
    """

    def __init__(self) -> None:
        self._steps: list[_Call | _Batch] = []

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
            args: Its positional arguments; futures in them, at any depth, become edges.
            kwargs: Its keyword arguments, likewise.
            resources: What the call asks for beyond the executor's own resources; shown in the
                picture, not exported.

        Returns:
            A future that is done with None.

        Raises:
            TypeError: The function does not take these arguments.
        """
        step = _Call(fn, list(_bind(fn, args, kwargs)), dict(resources or {}))
        self._steps.append(step)
        return RecordedFuture(self, step)

    def batch(self, sources: Iterable[Future[Any]]) -> RecordedFuture:
        """Record a list made of the results of several futures, as `batched` returns it.

        Args:
            sources: The futures in the batch.

        Returns:
            A future that is done with None.
        """
        step = _Batch(list(sources))
        self._steps.append(step)
        return RecordedFuture(self, step)

    def dot(self) -> str:
        """The graph in the DOT language of Graphviz.

        Boxes are calls, ellipses what goes into them: constants as `name = value`, and futures that
        belong to no call of this graph. An edge is labelled with the argument that it fills. Equal
        numbers and strings for an argument of one name are one ellipse; any other constant is one
        ellipse as long as it is one object.

        Returns:
            The text of a `.dot` file.
        """
        names: dict[Hashable, str] = {}
        edges: list[str] = []
        lines = [
            "digraph executorlib {",
            '    node [fontname="Helvetica", fontsize=12, style=filled, fillcolor=white];',
            '    edge [fontname="Helvetica", fontsize=10];',
        ]

        def node(key: Hashable, label: str, attributes: str) -> str:
            if key not in names:
                names[key] = f"n{len(names)}"
                lines.append(f"    {names[key]} [label={_quote(label)}, {attributes}];")
            return names[key]

        for step in self._steps:
            if isinstance(step, _Call):
                target = node(step, step.text(), 'shape=box, fillcolor="#d6e6f5"')
            else:
                target = node(step, f"batch of {len(step.sources)}", 'shape=box, style="dashed"')
            for path, leaf in step.inputs():
                if isinstance(leaf, _Constant):
                    label = f"{path} = {_short(leaf.value)}"
                    source = node((path, leaf.identity()), label, "shape=ellipse")
                    edges.append(f"    {source} -> {target};")
                    continue
                origin, keys = self._origin(leaf)
                if isinstance(origin, Future):
                    source = node(origin, "future from elsewhere", 'shape=ellipse, style="dashed"')
                else:
                    source = names[origin]
                if keys:
                    element = "result" + "".join(f"[{_short(key)}]" for key in keys)
                    path = f"{path} = {element}" if path else element
                edges.append(f"    {source} -> {target} [label={_quote(path)}];")
        return "\n".join([*lines, *edges, "}"]) + "\n"

    def draw(self) -> None:
        """Show the graph below the cell in a notebook; elsewhere log how to get a picture.

        Raises:
            ValueError: In a notebook: no library is there that draws it.
        """
        if not _in_notebook():
            _logger.warning(
                "plot_dependency_graph=True shows the dependency graph in a notebook only. To write"
                ' it to a file, give plot_dependency_graph_filename="graph.svg" (or .png, .pdf,'
                " .dot)."
            )
            return
        check_filename(None)
        svg = _render(self.dot(), "svg").decode()
        import_module("IPython.display").display({"image/svg+xml": svg}, raw=True)

    def write(self, filename: str | os.PathLike[str]) -> None:
        """Write the graph as a picture or as DOT text; missing folders are made.

        Args:
            filename: Ends in .png, .svg, .pdf or .dot.

        Raises:
            ValueError: Another ending, or no library is there that draws it.
        """
        check_filename(filename)
        path = Path(filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        if _format(path) == "dot":
            path.write_text(self.dot(), encoding="utf-8")
        else:
            path.write_bytes(_render(self.dot(), _format(path)))

    def export(self, filename: str | os.PathLike[str]) -> None:
        """Write the graph as Python Workflow Definition 0.1.0; missing folders are made.

        The result of the exported workflow is that of the one call whose result no other call uses,
        or, where there are several, the list of theirs in the order of submission. Tuples and
        numpy's arrays become lists, numpy's scalars numbers, as JSON has them. Resources are left out.

        Args:
            filename: The JSON file.

        Raises:
            ValueError: Something that the format cannot hold, with the call and the argument, or
                no call at all. No file is written then.
        """
        text = json.dumps(_Export(self).document(), indent=4, allow_nan=False)
        path = Path(filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    def _origin(self, future: Future[Any]) -> tuple[_Call | _Batch | Future[Any], list[Any]]:
        """Where a future's value comes from, and the keys that lead from there to the value."""
        keys: list[Any] = []
        while isinstance(future, RecordedFuture) and future.graph is self:
            if not isinstance(future.origin, _Item):
                return future.origin, keys
            keys.insert(0, future.origin.key)
            future = future.origin.source
        return future, keys


def check_filename(filename: str | os.PathLike[str] | None) -> None:
    """Check that the graph can be drawn, before any work is put into recording it.

    Args:
        filename: Where it will be written; None: shown in a notebook.

    Raises:
        ValueError: The ending is not known, or a library is missing; the text says what to install.
    """
    if filename is None:
        needed = "svg" if _in_notebook() else "dot"
    else:
        needed = _format(filename)
        if needed not in _FORMATS:
            known = ", ".join("." + ending for ending in _FORMATS)
            raise ValueError(
                f"plot_dependency_graph_filename={os.fspath(filename)!r}: the ending chooses the"
                f" format and must be one of {known}"
            )
    if needed != "dot" and not (find_spec("pygraphviz") or shutil.which("dot")):
        raise ValueError(
            f"drawing the dependency graph as {needed} takes Graphviz: pip install"
            ' "executorlib[graph]", or install Graphviz itself (apt install graphviz, brew install'
            " graphviz). A file that ends in .dot needs neither."
        )


# --- what is recorded -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any

    def identity(self) -> Hashable:
        """Equal for constants that may be drawn as one: equal scalars, or the same object.

        The type is part of it because 1, 1.0 and True are equal.
        """
        if isinstance(self.value, (bool, int, float, complex, str, bytes, type(None))):
            return type(self.value), repr(self.value)
        return id(self.value)


@dataclasses.dataclass(frozen=True)
class _Container:
    """A container with a future somewhere in it; the keys are indices, keys or field names."""

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
        name: Its parameter, with the index for one of `*args`.
        value: What was given for it.
        by_name: Whether it can be passed by name.
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
class _Batch:
    sources: list[Future[Any]]

    def inputs(self) -> Iterator[tuple[str, _Constant | Future[Any]]]:
        # A batch takes its inputs in the order in which they finish, so they have no place in it.
        for source in self.sources:
            yield "", source


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    source: RecordedFuture
    key: Any


def _short(value: Any) -> str:
    """What a value looks like, in one short line."""
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
    except (TypeError, ValueError):  # built-ins that have none
        for index, value in enumerate(args):
            yield _Argument(str(index), _freeze(value), by_name=False)
        for name, value in kwargs.items():
            yield _Argument(name, _freeze(value), by_name=True)
        return
    try:
        # Partial, because init_function or the executor may fill in what is left out here.
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
    """Copy the containers that lead to futures; `within` holds the ids of those being copied."""
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


# --- pictures -------------------------------------------------------------------------------------


def _format(filename: str | os.PathLike[str]) -> str:
    return Path(filename).suffix[1:].lower()


def _quote(text: str) -> str:
    """A DOT string that shows the text as it is, with line breaks kept.

    In labels Graphviz reads backslash sequences and HTML entities, see
    https://graphviz.org/docs/attr-types/escString/.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"), ("\n", "\\n")):
        shown = shown.replace(plain, escaped)
    return f'"{shown}"'


def _render(dot: str, picture_format: str) -> bytes:
    """Lay the graph out with pygraphviz, whose wheels bring Graphviz along, else with `dot`."""
    if find_spec("pygraphviz"):
        import pygraphviz

        return bytes(pygraphviz.AGraph(string=dot).draw(format=picture_format, prog="dot"))
    command = ["dot", f"-T{picture_format}"]
    return subprocess.run(command, input=dot.encode(), stdout=subprocess.PIPE, check=True).stdout


def _in_notebook() -> bool:
    # Where IPython is not loaded this is no notebook, and importing it would be slow.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


# --- Python Workflow Definition -------------------------------------------------------------------


class _Export:
    """Turns a graph into the nodes and edges of a Python Workflow Definition.

    The rules of the format's own runners (python-workflow-definition 0.1.5) that shape it:
    arguments go by name; a function node runs only if an edge ends in it and if it is a plain
    Python function of a module; there is one output node, and the result is that of the function
    node that runs last. A `sourcePort` is a string, so that only a string key can be one; any other
    element is fetched by a node of its own.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: list[dict[str, Any]] = []
        self._edges: list[dict[str, Any]] = []
        self._ids: dict[Hashable, int] = {}
        # Each name that is taken, and the last number that was put behind it to make another.
        self._input_names: dict[str, int] = {}

    def document(self) -> dict[str, Any]:
        calls = [step for step in self._graph._steps if isinstance(step, _Call)]
        if not calls:
            raise ValueError("there is no workflow to export: no call was submitted")
        for number, call in enumerate(calls, 1):
            self._add_call(f"cannot export call {number}, {call.name()}", call)
        used = {edge["source"] for edge in self._edges}
        finals = [self._ids[call] for call in calls if self._ids[call] not in used]
        if len(finals) > 1:
            gather = self._add_node(type="function", value=_GET_LIST)
            for index, final in enumerate(finals):
                self._add_edge(gather, str(index), (final, None))
            finals = [gather]
        self._add_edge(self._add_node(type="output", name="result"), None, (finals[0], None))
        return {"version": _FORMAT_VERSION, "nodes": self._nodes, "edges": self._edges}

    def _add_call(self, where: str, call: _Call) -> None:
        try:
            path = _import_path(call.fn)
            arguments = _complete(call)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        self._ids[call] = target = self._add_node(type="function", value=path)
        for name, value in arguments.items():
            self._add_argument(f"{where}, argument {name!r}", target, name, value)

    def _add_argument(self, where: str, target: int, name: str, value: _Value) -> None:
        try:
            self._add_edge(target, name, self._source(name, value))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None

    def _source(self, name: str, value: _Value) -> tuple[int, str | None]:
        """The node, and the port of it, that supplies a value to the argument of that name."""
        if isinstance(value, _Constant):
            return self._add_input(name, value.value), None
        if isinstance(value, _Container):
            return self._add_container(name, value), None
        origin, keys = self._graph._origin(value)
        if isinstance(origin, Future):
            return self._add_input(name, _result(origin)), None
        if origin not in self._ids:
            parts = [(str(index), leaf) for index, (_, leaf) in enumerate(origin.inputs())]
            self._ids[origin] = self._add_helper(_GET_LIST, name, parts)
        source: tuple[int, str | None] = self._ids[origin], None
        for key in keys:
            if source[1] is None and type(key) is str and key != _RESERVED_PORT:
                source = source[0], key
            else:
                source = self._add_item(source, key), None
        return source

    def _add_item(self, source: tuple[int, str | None], key: Any) -> int:
        identity = (source, json.dumps(_json_value(key)))
        if identity not in self._ids:
            self._ids[identity] = target = self._add_node(type="function", value=_GET_ITEM)
            self._add_edge(target, "obj", source)
            self._add_edge(target, "key", (self._add_input("key", key), None))
        return self._ids[identity]

    def _add_container(self, name: str, container: _Container) -> int:
        if container.kind in (list, tuple):
            return self._add_helper(_GET_LIST, name, [(str(k), v) for k, v in container.items])
        if container.kind is not dict:
            raise ValueError(
                f"it holds a future inside a {container.kind.__name__}, and the format has only"
                " lists and dictionaries; pass the future as an argument of its own"
            )
        for key, _ in container.items:
            _check_key(key)
        return self._add_helper(_GET_DICT, name, container.items)

    def _add_helper(self, path: str, name: str, parts: Iterable[tuple[str, _Value]]) -> int:
        target = self._add_node(type="function", value=path)
        for key, part in parts:
            self._add_edge(target, key, self._source(f"{name}_{key}", part))
        return target

    def _add_input(self, name: str, value: Any) -> int:
        """One input node for each name and value, under a name of its own."""
        value = _json_value(value)
        identity = (name, json.dumps(value))
        if identity not in self._ids:
            unique = name
            while unique in self._input_names:
                self._input_names[name] += 1
                unique = f"{name}_{self._input_names[name]}"
            self._input_names[unique] = 0
            self._ids[identity] = self._add_node(type="input", value=value, name=unique)
        return self._ids[identity]

    def _add_node(self, **fields: Any) -> int:
        self._nodes.append({"id": len(self._nodes), **fields})
        return len(self._nodes) - 1

    def _add_edge(self, target: int, port: str | None, source: tuple[int, str | None]) -> None:
        edge = {
            "target": target,
            "targetPort": port,
            "source": source[0],
            "sourcePort": source[1],
        }
        self._edges.append(edge)


def _import_path(fn: Callable[..., Any]) -> str:
    """The `module.function` under which another program finds the function.

    A function of a script is named after the script's file and one of `python -m` after the module,
    so that another program can import it. What a notebook or prompt defines keeps `__main__` and
    can be loaded only there.
    """
    if not inspect.isfunction(fn):
        raise ValueError(
            f"{_short(fn)} is not a Python function, and the format calls nothing else; wrap"
            " it in a function of a module"
        )
    module = fn.__module__
    found = sys.modules.get(module)
    if getattr(found, fn.__name__, None) is not fn:
        raise ValueError(
            f"there is no such function {module}.{fn.__name__}, and the format names functions that"
            " way; define it at the top level of a module, not as a lambda or inside another"
            " function or a class"
        )
    if module == "__main__" and found is not None:
        spec = found.__spec__
        stem = Path(getattr(found, "__file__", None) or "").stem
        module = spec.name if spec else stem if stem.isidentifier() else module
    return f"{module}.{fn.__name__}"


def _complete(call: _Call) -> dict[str, _Value]:
    """The call's arguments by name, with those added that a runner of the format needs."""
    arguments: dict[str, _Value] = {}
    for argument in call.arguments:
        if not argument.by_name:
            raise ValueError(
                f"the format passes arguments by name, and {argument.name!r} has to go by position;"
                " wrap the function in one whose parameters have names"
            )
        arguments[argument.name] = argument.value
    parameters = inspect.signature(call.fn).parameters
    if "executorlib_worker_id" in parameters:
        # Outside a block of workers the number is always 0.
        arguments.setdefault("executorlib_worker_id", _Constant(0))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if parameter.kind in variadic or name in arguments:
            continue
        if parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"argument {name!r} is missing; what init_function supplies is not exported, pass it to submit"
            )
        if not arguments and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            # A function without an incoming edge would not be run.
            arguments[name] = _Constant(parameter.default)
    if not arguments:
        raise ValueError(
            "it takes no arguments, and the format runs only functions that do; give it a parameter"
            " with a default value"
        )
    return arguments


def _result(future: Future[Any]) -> Any:
    """The value of a future that belongs to no call of the graph."""
    if isinstance(future, RecordedFuture):
        raise ValueError("it is a call recorded by another executor; submit both calls to the same executor")
    if not future.done():
        raise ValueError(
            "it is the future of another executor and not done yet, so that its value cannot be"
            " stored; wait for it first"
        )
    if future.cancelled() or (error := future.exception()) is not None:
        reason = "was cancelled" if future.cancelled() else f"failed with {error!r}"
        raise ValueError(f"it is the future of another executor, which {reason}")
    return future.result()


def _json_value(value: Any) -> Any:
    """The value as JSON has it.

    Raises:
        ValueError: JSON has no such value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        value.encode()  # a lone surrogate has no place in a file
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        if not math.isfinite(value):
            raise ValueError(f"JSON has no number for {value!r}")
        return float(value)
    if type(value) in (list, tuple):
        return [_json_value(element) for element in value]
    if type(value) is dict:
        for key in value:
            _check_key(key)
        return {key: _json_value(element) for key, element in value.items()}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        plain = value.tolist()
        if type(plain) is not type(value):  # as numbers are that Python has nothing for
            return _json_value(plain)
    remedy = "pass value.tolist()" if hasattr(value, "tolist") else "build it inside the function"
    raise ValueError(f"JSON has no place for a value of type {type(value).__name__}; {remedy}")


def _check_key(key: Any) -> None:
    if type(key) is not str:
        raise ValueError(f"{_short(key)} is the key of a dictionary; keys have to be strings in JSON")
