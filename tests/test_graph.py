from __future__ import annotations

import builtins
import dataclasses
import functools
import json
import logging
import math
import os
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from executorlib.graph import picture, workflow_definition
from executorlib.graph.picture import check_filename
from executorlib.graph.record import Graph, RecordedFuture


def add(x: Any, y: Any = 1) -> Any:
    return x + y


def total(values: Any, *, scale: float = 1.0) -> Any:
    return scale * sum(values)


def split(a: Any) -> list[Any]:
    return [a, a + 1, {"double": 2 * a}]


def parts(a: Any, b: Any) -> dict[str, Any]:
    return {"sum": a + b, "product": a * b, "both": (a, b)}


def settings(config: dict[str, Any]) -> float:
    return float(config["start"] + sum(config["steps"]))


def twice(number: float) -> float:
    return 2 * number


def everything(first: int, /, second: int, *rest: int, **named: int) -> None: ...


def constant() -> int:
    return 7


def seeded(seed: int = 11) -> int:
    return seed


def whose(executorlib_worker_id: int, x: int) -> int:
    return 10 * executorlib_worker_id + x


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


def record(graph: Graph, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> RecordedFuture:
    return graph.call(fn, args, kwargs)


def lines(graph: Graph) -> list[str]:
    """The nodes and edges in the DOT text, without the fonts and colours."""
    return [line.strip() for line in picture.dot(graph).splitlines()[3:-1]]


def labels(graph: Graph) -> list[str]:
    """The labels of the nodes."""
    return [line.split('"')[1] for line in lines(graph) if "->" not in line]


def edges(graph: Graph) -> list[tuple[str, str, str]]:
    """Source, target and label of the edges, with nodes called by their labels."""
    nodes = {line.split()[0]: line.split('"')[1] for line in lines(graph) if "->" not in line}
    found = []
    for line in lines(graph):
        if "->" in line:
            source, _, target, *rest = line.rstrip(";").split(maxsplit=3)
            label = rest[0].split('"')[1] if rest else ""
            found.append((nodes[source], nodes[target], label))
    return found


# --- recording ------------------------------------------------------------------------------------


def test_recorded_call_runs_nothing_and_is_done_with_none() -> None:
    future = record(Graph(), lambda x: pytest.fail("it ran"), 1)
    assert isinstance(future, Future)
    assert future.done()
    assert future.result(timeout=0) is None
    seen: list[Future[Any]] = []
    future.add_done_callback(seen.append)
    assert seen == [future]
    assert future.item("key").result(timeout=0) is None
    assert Graph().batch([future]).result(timeout=0) is None


def test_dot_text() -> None:
    graph = Graph()
    first = record(graph, add, 1, y=2)
    graph.call(add, (first,), {"y": 2}, {"cores": 2, "gpus_per_core": 1})
    assert picture.dot(graph) == (
        "digraph executorlib {\n"
        '    node [fontname="Helvetica", fontsize=12, style=filled, fillcolor=white];\n'
        '    edge [fontname="Helvetica", fontsize=10];\n'
        '    n0 [label="add", shape=box, fillcolor="#d6e6f5"];\n'
        '    n1 [label="x = 1", shape=ellipse];\n'
        '    n2 [label="y = 2", shape=ellipse];\n'
        '    n3 [label="add\\ncores=2, gpus_per_core=1", shape=box, fillcolor="#d6e6f5"];\n'
        "    n1 -> n0;\n"
        "    n2 -> n0;\n"
        '    n0 -> n3 [label="x"];\n'
        "    n2 -> n3;\n"
        "}\n"
    )


def test_dot_of_nothing() -> None:
    assert lines(Graph()) == []


def test_futures_at_any_depth_are_edges() -> None:
    graph = Graph()
    one = record(graph, constant)
    two = record(graph, seeded)
    record(graph, settings, {"start": one, "steps": [0.5, (two, Point(one, {two}))]})
    assert edges(graph) == [
        ("constant", "settings", "config['start']"),
        ("config['steps'][0] = 0.5", "settings", ""),
        ("seeded", "settings", "config['steps'][1][0]"),
        ("constant", "settings", "config['steps'][1][1].x"),
        ("seeded", "settings", "config['steps'][1][1].y"),
    ]


def test_futures_as_keys_are_edges() -> None:
    graph = Graph()
    record(graph, total, {record(graph, constant): record(graph, seeded)})
    assert edges(graph) == [("seeded", "total", "values"), ("constant", "total", "values")]


def test_container_is_recorded_as_it_is_at_submission() -> None:
    graph = Graph()
    values = [record(graph, constant)]
    record(graph, total, values)
    values.append(record(graph, seeded))
    assert edges(graph) == [("constant", "total", "values[0]")]


def test_container_that_holds_itself() -> None:
    graph = Graph()
    loop: list[Any] = [record(graph, constant)]
    loop.append(loop)
    record(graph, total, loop)
    assert edges(graph)[0] == ("constant", "total", "values[0]")


def test_equal_scalars_of_one_type_and_name_are_one_node() -> None:
    graph = Graph()
    for value in (1, True, 1.0, "1", b"1", None, 1, True, 1.0, "1", b"1", None):
        record(graph, twice, value)
    record(graph, add, 1)
    inputs = [label for label in labels(graph) if "=" in label]
    assert sorted(inputs) == sorted(
        [
            *("number = 1", "number = True", "number = 1.0", "number = '1'", "number = b'1'"),
            *("number = None", "x = 1"),
        ]
    )


def test_other_constants_are_one_node_only_as_one_object() -> None:
    graph = Graph()
    shared = {"unhashable": [1]}
    for value in (shared, shared, {"unhashable": [1]}):
        record(graph, twice, value)
    assert labels(graph).count("number = {'unhashable': [1]}") == 2


def test_arguments_are_named_after_parameters() -> None:
    graph = Graph()
    record(graph, everything, 1, 2, 3, 4, key=5)
    assert [source for source, _, _ in edges(graph)] == [
        *("first = 1", "second = 2", "rest[0] = 3", "rest[1] = 4", "key = 5"),
    ]


def test_function_without_a_signature() -> None:
    graph = Graph()
    record(graph, builtins.print, "text", end="")
    record(graph, max, 1, 2)
    assert {target for _, target, _ in edges(graph)} == {"print", "max"}
    assert ("1 = 2", "max", "") in edges(graph)


def test_wrong_arguments_are_errors_at_once() -> None:
    graph = Graph()
    with pytest.raises(TypeError, match=r"add\(x.*\).* does not take these arguments: .*'z'"):
        record(graph, add, z=1)
    assert lines(graph) == []


def test_names_of_callables() -> None:
    graph = Graph()

    class Model:
        def fit(self) -> None: ...

        def __call__(self) -> None: ...

    for fn in (functools.partial(functools.partial(add, 1), 2), Model().fit, Model(), lambda: 0):
        record(graph, fn)
    assert labels(graph) == ["add", "Model.fit", "Model", "<lambda>"]


def test_elements_of_a_result() -> None:
    graph = Graph()
    whole = record(graph, split, 1)
    record(graph, add, whole.item(0), whole.item(2).item("double"))
    assert edges(graph)[1:] == [
        ("split", "add", "x = result[0]"),
        ("split", "add", "y = result[2]['double']"),
    ]


def test_batch_is_a_node() -> None:
    graph = Graph()
    outside: Future[int] = Future()
    batch = graph.batch([record(graph, constant).item(0), outside])
    record(graph, total, batch)
    assert edges(graph) == [
        ("constant", "batch of 2", "result[0]"),
        ("future from elsewhere", "batch of 2", ""),
        ("batch of 2", "total", "values"),
    ]


def test_futures_of_other_executors_are_drawn_as_inputs() -> None:
    graph = Graph()
    outside: Future[int] = Future()
    record(graph, add, outside, record(Graph(), constant))
    record(graph, twice, outside)
    assert labels(graph).count("future from elsewhere") == 2
    assert ("future from elsewhere", "twice", "number") in edges(graph)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ('say "hi"', "'say \\\"hi\\\"'"),
        ("back\\slash", "'back\\\\\\\\slash'"),
        ("<b>&amp;", "'<b>&amp;amp;'"),
        ("line\nbreak", "'line\\\\nbreak'"),
        ("é ≤ λ", "'é ≤ λ'"),
        ("\x00\ud800", "'\\\\x00\\\\ud800'"),
    ],
)
def test_labels_are_escaped(value: str, label: str) -> None:
    graph = Graph()
    record(graph, twice, value)
    assert f'[label="number = {label}", ' in picture.dot(graph)


def test_labels_are_one_short_line() -> None:
    class Awkward:
        def __init__(self, text: str) -> None:
            self.text = text

        def __repr__(self) -> str:
            if not self.text:
                raise RuntimeError("no repr")
            return self.text

    graph = Graph()
    for text in ("array([[1,\n       2]])", "x" * 1000, "a\x00b\ud800", ""):
        record(graph, twice, Awkward(text))
    record(graph, twice, [[["x" * 100] * 9] * 9] * 9)
    texts = [label.removeprefix("number = ") for label in labels(graph) if "=" in label]
    assert texts[0] == "array([[1, 2]])"
    assert texts[2] == "a?b?"
    assert all(len(text) <= 40 for text in texts)


# --- pictures -------------------------------------------------------------------------------------


def workflow(graph: Graph) -> Graph:
    energies = [record(graph, add, x, y=2.5) for x in range(3)]
    fit = graph.call(total, (energies,), {"scale": 0.5}, {"cores": 2})
    record(graph, parts, fit, energies[0])
    return graph


def test_unknown_ending() -> None:
    for name in ("graph.bmp", "graph", Path("graph.txt")):
        with pytest.raises(ValueError, match=r"one of \.png, \.svg, \.pdf, \.dot"):
            check_filename(name)
        with pytest.raises(ValueError, match="ending"):
            picture.write(Graph(), name)


def test_dot_file_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_graphviz(monkeypatch)
    check_filename("graph.DOT")
    check_filename(None)
    target = tmp_path / "new" / "graph.dot"
    graph = workflow(Graph())
    picture.write(graph, target)
    assert target.read_text(encoding="utf-8") == picture.dot(graph)


@pytest.mark.parametrize("name", ["graph.png", "graph.svg", "graph.pdf"])
def test_missing_library(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_graphviz(monkeypatch)
    with pytest.raises(ValueError, match=r'pip install "executorlib\[graph\]"'):
        check_filename(name)
    with pytest.raises(ValueError, match=r'pip install "executorlib\[graph\]"'):
        picture.write(Graph(), tmp_path / name)


def test_program_dot_takes_the_place_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_graphviz(monkeypatch)
    program = tmp_path / "dot"
    program.write_text('#!/bin/sh\necho "$1"\nexec /bin/cat\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    graph = workflow(Graph())
    picture.write(graph, tmp_path / "graph.pdf")
    assert (tmp_path / "graph.pdf").read_text() == "-Tpdf\n" + picture.dot(graph)


def no_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz", exc_type=ImportError, reason='pictures: pip install "executorlib[graph]"')
    graph = workflow(Graph())
    record(graph, add, '<&"\\>', "é")
    for name in ("graph.png", "graph.svg", "graph.PDF"):
        check_filename(name)
        picture.write(graph, tmp_path / name)
    png = (tmp_path / "graph.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert min(width, height) > 200
    svg = (tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert svg.count('class="node"') == len(labels(graph))
    assert svg.count('class="edge"') == len(edges(graph))
    assert "cores=2" in svg
    assert "y = &#39;é&#39;" in svg
    assert "x = &#39;&lt;&amp;&quot;\\\\&gt;&#39;" in svg
    assert (tmp_path / "graph.PDF").read_bytes().startswith(b"%PDF")


def test_outside_a_notebook_a_hint_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="executorlib"):
        picture.draw(workflow(Graph()))
    assert "plot_dependency_graph_filename" in caplog.text


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Pretends to be a notebook; what it shows."""
    cells: list[dict[str, str]] = []
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display = types.ModuleType("IPython.display")
    display.display = lambda bundle, raw: cells.append(bundle)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return cells


def test_notebook_shows_svg(shown: list[dict[str, str]]) -> None:
    pytest.importorskip("pygraphviz", exc_type=ImportError, reason='pictures: pip install "executorlib[graph]"')
    check_filename(None)
    picture.draw(workflow(Graph()))
    assert "</svg>" in shown[0]["image/svg+xml"]


def test_notebook_without_the_library(shown: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    no_graphviz(monkeypatch)
    with pytest.raises(ValueError, match=r'pip install "executorlib\[graph\]"'):
        check_filename(None)
    assert shown == []


# --- Python Workflow Definition -------------------------------------------------------------------


def exported(graph: Graph, folder: Path) -> dict[str, Any]:
    workflow_definition.export(graph, folder / "workflow.json")
    document = json.loads((folder / "workflow.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def test_export_text(tmp_path: Path) -> None:
    graph = Graph()
    result = record(graph, parts, 1, b=2)
    record(graph, add, result.item("sum"), y=1)
    module = add.__module__
    assert exported(graph, tmp_path) == {
        "version": "0.1.0",
        "nodes": [
            {"id": 0, "type": "function", "value": f"{module}.parts"},
            {"id": 1, "type": "input", "value": 1, "name": "a"},
            {"id": 2, "type": "input", "value": 2, "name": "b"},
            {"id": 3, "type": "function", "value": f"{module}.add"},
            {"id": 4, "type": "input", "value": 1, "name": "y"},
            {"id": 5, "type": "output", "name": "result"},
        ],
        "edges": [
            {"target": 0, "targetPort": "a", "source": 1, "sourcePort": None},
            {"target": 0, "targetPort": "b", "source": 2, "sourcePort": None},
            {"target": 3, "targetPort": "x", "source": 0, "sourcePort": "sum"},
            {"target": 3, "targetPort": "y", "source": 4, "sourcePort": None},
            {"target": 5, "targetPort": None, "source": 3, "sourcePort": None},
        ],
    }


def test_exported_inputs_have_names_of_their_own(tmp_path: Path) -> None:
    graph = Graph()
    for value in (1, 1.0, True, 1, [True], [1]):
        record(graph, twice, value)
    inputs = [node for node in exported(graph, tmp_path)["nodes"] if node["type"] == "input"]
    assert [(node["name"], json.dumps(node["value"])) for node in inputs] == [
        ("number", "1"),
        ("number_1", "1.0"),
        ("number_2", "true"),
        ("number_3", "[true]"),
        ("number_4", "[1]"),
    ]


class Direct:
    """Runs what `Recorder` records."""

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    def item(self, whole: Any, key: Any) -> Any:
        return whole[key]

    def batch(self, sources: list[Any]) -> Any:
        return sources


class Recorder:
    def __init__(self) -> None:
        self.graph = Graph()

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.graph.call(fn, args, kwargs)

    def item(self, whole: Any, key: Any) -> Any:
        return whole.item(key)

    def batch(self, sources: list[Any]) -> Any:
        return self.graph.batch(sources)


def one_call(on: Any) -> Any:
    return on.submit(add, 1, 2.5)


def chain(on: Any) -> Any:
    return functools.reduce(lambda value, step: on.submit(add, value, y=step), range(20), 1.5)


def diamond(on: Any) -> Any:
    top = on.submit(parts, 2, b=3)
    return on.submit(add, on.submit(twice, on.item(top, "sum")), on.item(top, "product"))


def elements(on: Any) -> Any:
    whole = on.submit(split, 4)
    both = on.item(on.submit(parts, on.item(whole, 0), on.item(whole, 1)), "both")
    return on.submit(add, on.item(both, 1), on.item(on.item(whole, 2), "double"))


def unused_elements(on: Any) -> Any:
    whole = on.submit(split, 4)
    _, second = on.item(whole, 0), on.item(whole, 1)
    return on.submit(twice, second)


def nested(on: Any) -> Any:
    steps = [0.25, on.submit(twice, 4), on.submit(total, [on.submit(twice, n) for n in range(12)])]
    return on.submit(settings, {"start": on.submit(add, 3), "steps": steps})


def batches(on: Any) -> Any:
    sources = [on.submit(twice, n) for n in range(5)]
    chunks = [on.batch(sources[:3]), on.batch(sources[3:])]
    sums = [on.submit(total, chunk, scale=0.5) for chunk in chunks]
    return on.submit(add, on.submit(total, sums), on.item(chunks[0], 2))


def several_results(on: Any) -> Any:
    return [on.submit(twice, n) for n in range(3)] + [on.submit(add, on.submit(twice, 9))]


def numpy_scalars(on: Any) -> Any:
    numpy = pytest.importorskip("numpy")
    return on.submit(add, numpy.float64(0.1), on.submit(twice, numpy.int64(3)))


def no_arguments(on: Any) -> Any:
    return on.submit(add, on.submit(seeded))


def worker_number(on: Any) -> Any:
    number = {"executorlib_worker_id": 0} if isinstance(on, Direct) else {}
    return on.submit(whose, x=4, **number)


def values(on: Any) -> Any:
    return on.submit(add, [None, True, "é", {"": -1.5e-300}], on.submit(add, [[]], [10**30]))


@pytest.mark.parametrize(
    "flow",
    [
        *(one_call, chain, diamond, elements, unused_elements, nested, batches, several_results),
        *(numpy_scalars, no_arguments, worker_number, values),
    ],
    ids=lambda flow: flow.__name__,
)
def test_exported_workflow_runs_to_the_same_result(flow: Callable[[Any], Any], tmp_path: Path) -> None:
    runner = pytest.importorskip(
        "python_workflow_definition.purepython",
        reason="exports are not run: pip install python-workflow-definition",
    )
    recorder = Recorder()
    flow(recorder)
    workflow_definition.export(recorder.graph, tmp_path / "workflow.json")
    assert runner.load_workflow_json(str(tmp_path / "workflow.json")) == flow(Direct())


def test_futures_of_other_executors_are_exported_by_value(tmp_path: Path) -> None:
    graph = Graph()
    outside: Future[list[int]] = Future()
    outside.set_result([1, 2])
    record(graph, total, outside)
    nodes = exported(graph, tmp_path)["nodes"]
    assert {"id": 1, "type": "input", "value": [1, 2], "name": "values"} in nodes


def pending() -> Future[Any]:
    return Future()


def failed() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(RuntimeError("diverged"))
    return future


def cancelled() -> Future[Any]:
    future: Future[Any] = Future()
    future.cancel()
    return future


class Model:
    def method(self, x: int) -> int:
        return x

    def __call__(self, x: int) -> int:
        return x


def positional(x: int, /) -> int:
    return x


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (twice, ({1, 2},), ", twice, argument 'number': JSON has no place .* type set"),
        (twice, (1 + 2j,), "argument 'number': .* complex"),
        (twice, ([{1: "one"}],), "argument 'number': 1 is the key of a dictionary"),
        (twice, (math.nan,), "argument 'number': JSON has no number for nan"),
        (twice, ([math.inf],), "JSON has no number for inf"),
        (twice, ("\ud800",), "argument 'number': .*surrogates"),
        (total, ([constant],), "argument 'values': .* type function"),
        (twice, (pending(),), "argument 'number': .*not done yet.*wait for it"),
        (twice, (failed(),), r"failed with RuntimeError\('diverged'\)"),
        (twice, (cancelled(),), "was cancelled"),
        (twice, (record(Graph(), constant),), "recorded by another executor"),
        (total, ({record(Graph(), constant)},), "a future inside a set"),
        (total, (Point(record(Graph(), constant)),), "a future inside a Point"),
        (settings, ({1: record(Graph(), constant)},), "1 is the key of a dictionary"),
        (settings, ({record(Graph(), constant): 1},), "Future.* is the key of a dictionary"),
        (constant, (), ", constant: it takes no arguments"),
        (add, (), ", add: argument 'x' is missing; .*init_function"),
        (positional, (1,), r", positional: .*'x' can only be passed by position"),
        (everything, (1, 2, 3), r"'first' can only be passed by position"),
        (max, (1, 2), "built-in function max.* is not a Python function"),
        (Point, (1,), "Point.* is not a Python function"),
        (functools.partial(add, 1), (), "partial.* is not a Python function"),
        (Model(), (1,), "is not a Python function"),
        (Model().method, (1,), "is not a Python function"),
        (Model.method, (1, 2), "no such function .*method.*top level of a module"),
        (lambda x: x, (1,), "no such function .*<lambda>"),
    ],
)
def test_values_that_the_format_cannot_hold_are_named(
    fn: Callable[..., Any], args: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    graph = Graph()
    record(graph, add, 1)
    record(graph, fn, *args)
    with pytest.raises(ValueError, match=f"cannot export call 2.*{message}"):
        workflow_definition.export(graph, tmp_path / "workflow.json")
    assert list(tmp_path.iterdir()) == []


def test_numpy_goes_into_json(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    values = {
        "array": numpy.arange(6).reshape(2, 3),
        "of floats": numpy.array([0.1, -2.5]),
        "of truths": numpy.array([True, False]),
        "of texts": numpy.array(["a", "b"]),
        "of objects": numpy.array([None, numpy.float32(0.5), numpy.arange(2)], dtype=object),
        "of one": numpy.array(3),
        "long": numpy.array([0.25], dtype=numpy.longdouble),
        "scalars": (numpy.bool_(True), numpy.int8(1), numpy.float32(0.5), numpy.str_("text"), numpy.longdouble(2)),
    }
    graph = Graph()
    record(graph, settings, values)
    workflow_definition.export(graph, tmp_path / "workflow.json")
    nodes = json.loads((tmp_path / "workflow.json").read_text())["nodes"]
    assert [node["value"] for node in nodes if node["type"] == "input"] == [
        {
            "array": [[0, 1, 2], [3, 4, 5]],
            "of floats": [0.1, -2.5],
            "of truths": [True, False],
            "of texts": ["a", "b"],
            "of objects": [None, 0.5, [0, 1]],
            "of one": 3,
            "long": [0.25],
            "scalars": [True, 1, 0.5, "text", 2.0],
        }
    ]


def test_numpy_that_json_has_no_place_for(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    for value, told in (
        (numpy.array([1j]), "type complex"),
        (numpy.array([1], dtype=numpy.clongdouble), "type clongdouble"),
        (numpy.array([numpy.inf]), "no number for inf"),
        (numpy.datetime64("2020-01-01"), "type date"),
    ):
        graph = Graph()
        record(graph, twice, value)
        with pytest.raises(ValueError, match=told):
            workflow_definition.export(graph, tmp_path / "workflow.json")


def test_no_workflow_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no call was submitted"):
        workflow_definition.export(Graph(), tmp_path / "workflow.json")


SCRIPT = """
from executorlib.graph.record import Graph
from executorlib.graph.workflow_definition import export

def triple(x):
    return 3 * x

if __name__ == "__main__":
    graph = Graph()
    graph.call(triple, (14,), {})
    export(graph, "workflow.json")
"""


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["a_script.py"], "a_script.triple"),
        (["-m", "a_script"], "a_script.triple"),
        (["-c", SCRIPT], "__main__.triple"),
        (["not-a-name.py"], "__main__.triple"),
    ],
)
def test_functions_of_a_script_are_named_after_its_file(command: list[str], path: str, tmp_path: Path) -> None:
    for name in ("a_script.py", "not-a-name.py"):
        (tmp_path / name).write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(picture.__file__).parents[2])}
    command = [sys.executable, *command]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=30)
    document = json.loads((tmp_path / "workflow.json").read_text())
    assert document["nodes"][0]["value"] == path
