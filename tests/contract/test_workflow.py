"""The graph of calls instead of their results: nothing runs, the graph is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.functions import add, lines, record

WAIT = 30


def test_plotting_runs_nothing(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    drawn = tmp_path / "graph.dot"
    with make_executor(plot_dependency_graph_filename=str(drawn)) as executor:
        first = executor.submit(record, log, 1)
        assert first.done()
        assert first.result() is None
        second = executor.submit(add, first, b=5)
        assert second.done()
        assert second.result() is None
    assert lines(log) == []
    text = drawn.read_text()
    assert "record" in text
    assert "add" in text


def test_export(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "workflow.json"
    with make_executor(export_workflow_filename=str(path)) as executor:
        first = executor.submit(add, 1, b=2)
        executor.submit(add, first, b=4)
    workflow = json.loads(path.read_text())
    assert workflow["version"] == "0.1.0"
    kinds = [node["type"] for node in workflow["nodes"]]
    assert kinds.count("function") == 2
    assert "input" in kinds
    assert "output" in kinds
    functions = {node["id"] for node in workflow["nodes"] if node["type"] == "function"}
    assert any(edge["source"] in functions and edge["target"] in functions for edge in workflow["edges"])
    assert {frozenset(edge) for edge in workflow["edges"]} == {
        frozenset({"source", "sourcePort", "target", "targetPort"})
    }


@pytest.mark.parametrize("name", ["graph.xyz", "graph"])
def test_ending_that_says_nothing(row: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def use() -> None:
        with row.make(plot_dependency_graph_filename=str(path)) as executor:
            executor.submit(add, 1, 2)

    with pytest.raises(ValueError, match="svg"):
        use()
