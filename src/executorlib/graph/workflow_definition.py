"""Writes a recorded graph as a Python Workflow Definition."""

from __future__ import annotations

import inspect
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executorlib.graph.record import RecordedFuture, _Call, _Constant, _Container, _short

if TYPE_CHECKING:
    from executorlib.graph.record import Graph, _Value

# Names that the format's own package, python-workflow-definition 0.1.5, gives its version and helper functions.
_FORMAT_VERSION = "0.1.0"
_GET_LIST = "python_workflow_definition.shared.get_list"
_GET_DICT = "python_workflow_definition.shared.get_dict"
_GET_ITEM = "python_workflow_definition.executorlib.get_item"
_RESERVED_PORT = "__result__"


def export(graph: Graph, filename: str | os.PathLike[str]) -> None:
    """Write the graph as Python Workflow Definition 0.1.0. Missing folders are made.

    The result of the exported workflow is that of the one call whose result no other call uses. If there are several,
    it is the list of their results in the order of submission. For JSON, tuples and numpy arrays become lists, and
    numpy scalars become numbers. Resources are left out.

    Args:
        graph: The graph.
        filename: The JSON file.

    Raises:
        ValueError: There is no call, or the format cannot hold something; the text names the call and the argument.
            No file is written then.
    """
    text = json.dumps(_Export(graph).document(), indent=4, allow_nan=False)
    path = Path(filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


class _Export:
    """Turns a graph into the nodes and edges of a Python Workflow Definition.

    It follows the rules of the format's own runners (python-workflow-definition 0.1.5). Arguments are passed by name. A
    function node runs only if an edge ends in it and if it is a plain Python function of a module. There is one output
    node, and the result is that of the function node that runs last. A `sourcePort` is a string, so it can only hold a
    string key; any other element is fetched by a node of its own.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: list[dict[str, Any]] = []
        self._edges: list[dict[str, Any]] = []
        self._ids: dict[Hashable, int] = {}
        # Each name in use, with the last number that was appended to it to make another name.
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
        """Return the node, and its port, that supplies a value to the argument of that name."""
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
        """Add one input node for each name and value, with a unique name, and return its number."""
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
    """Return the `module.function` under which another program finds the function.

    For a function of a script the module is named after the script's file, and for one of `python -m` it is that
    module, so that another program can import it. A function from a notebook or prompt keeps `__main__` and can be
    loaded only there.
    """
    if not inspect.isfunction(fn):
        raise ValueError(
            f"{_short(fn)} is not a Python function, and the format can call nothing else; wrap it in a function of a "
            "module"
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
    """Return the call's arguments by name, and others that a runner of the format needs."""
    arguments: dict[str, _Value] = {}
    for argument in call.arguments:
        if not argument.by_name:
            raise ValueError(
                f"the format passes arguments by name, and {argument.name!r} can only be passed by position; wrap the "
                "function in one whose parameters have names"
            )
        arguments[argument.name] = argument.value
    parameters = inspect.signature(call.fn).parameters
    if "executorlib_worker_id" in parameters:
        # Outside a block of workers, the number is always 0.
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
            # Runners do not run a function node without an incoming edge.
            arguments[name] = _Constant(parameter.default)
    if not arguments:
        raise ValueError(
            "it takes no arguments, and the format runs only functions that do; give it a parameter"
            " with a default value"
        )
    return arguments


def _result(future: Future[Any]) -> Any:
    """Return the value of a future that belongs to no call of the graph."""
    if isinstance(future, RecordedFuture):
        raise ValueError("it is a call recorded by another executor; submit both calls to the same executor")
    if not future.done():
        raise ValueError(
            "it is the future of another executor and not done yet, so its value cannot be stored; wait for it first"
        )
    if future.cancelled() or (error := future.exception()) is not None:
        reason = "was cancelled" if future.cancelled() else f"failed with {error!r}"
        raise ValueError(f"it is the future of another executor, which {reason}")
    return future.result()


def _json_value(value: Any) -> Any:
    """Convert a value to what JSON has for it.

    Raises:
        ValueError: JSON has nothing for such a value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        value.encode()  # raises for a lone surrogate, which cannot be written to a file
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
        if type(plain) is not type(value):  # numpy returns numbers unchanged that Python has no type for
            return _json_value(plain)
    remedy = "pass value.tolist()" if hasattr(value, "tolist") else "build it inside the function"
    raise ValueError(f"JSON has no place for a value of type {type(value).__name__}; {remedy}")


def _check_key(key: Any) -> None:
    if type(key) is not str:
        raise ValueError(f"{_short(key)} is the key of a dictionary; keys have to be strings in JSON")
