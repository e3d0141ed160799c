"""Draws a recorded graph."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Hashable
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from executorlib.graph.record import Graph, _Call, _Constant, _short

_logger = logging.getLogger("executorlib")

_FORMATS = ("png", "svg", "pdf", "dot")


def check_filename(filename: str | os.PathLike[str] | None) -> None:
    """Check that the graph can be drawn, before any work goes into recording it.

    Args:
        filename: The file that it will be written to. None if it will be shown in a notebook.

    Raises:
        ValueError: The ending is unknown, or a library is missing; the text says what to install.
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
            f'drawing the dependency graph as {needed} needs Graphviz: pip install "executorlib[graph]", or install '
            "Graphviz itself (apt install graphviz, brew install graphviz). A file that ends in .dot needs neither."
        )


def dot(graph: Graph) -> str:
    """Return the graph in the DOT language of Graphviz.

    Boxes are calls. Ellipses are their inputs: constants as `name = value`, and futures that belong to no call of this
    graph. An edge is labelled with the argument that it fills. Equal numbers and strings for arguments of the same name
    share one ellipse; any other constant shares one only with the same object.

    Args:
        graph: The graph.

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

    for step in graph._steps:
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
            origin, keys = graph._origin(leaf)
            if isinstance(origin, Future):
                source = node(origin, "future from elsewhere", 'shape=ellipse, style="dashed"')
            else:
                source = names[origin]
            if keys:
                element = "result" + "".join(f"[{_short(key)}]" for key in keys)
                path = f"{path} = {element}" if path else element
            edges.append(f"    {source} -> {target} [label={_quote(path)}];")
    return "\n".join([*lines, *edges, "}"]) + "\n"


def draw(graph: Graph) -> None:
    """Show the graph below the cell in a notebook. Elsewhere, log how to get a picture.

    Args:
        graph: The graph.

    Raises:
        ValueError: This is a notebook, and no library to draw the graph is installed.
    """
    if not _in_notebook():
        _logger.warning(
            "plot_dependency_graph=True shows the dependency graph in a notebook only. To write"
            ' it to a file, give plot_dependency_graph_filename="graph.svg" (or .png, .pdf,'
            " .dot)."
        )
        return
    check_filename(None)
    svg = _render(dot(graph), "svg").decode()
    import_module("IPython.display").display({"image/svg+xml": svg}, raw=True)


def write(graph: Graph, filename: str | os.PathLike[str]) -> None:
    """Write the graph as a picture or as DOT text. Missing folders are made.

    Args:
        graph: The graph.
        filename: A file that ends in .png, .svg, .pdf or .dot.

    Raises:
        ValueError: The file has another ending, or no library to draw the graph is installed.
    """
    check_filename(filename)
    path = Path(filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _format(path) == "dot":
        path.write_text(dot(graph), encoding="utf-8")
    else:
        path.write_bytes(_render(dot(graph), _format(path)))


def _format(filename: str | os.PathLike[str]) -> str:
    return Path(filename).suffix[1:].lower()


def _quote(text: str) -> str:
    """Return a DOT string that shows the text as it is, with line breaks kept.

    Graphviz interprets backslash sequences and HTML entities in labels, see
    https://graphviz.org/docs/attr-types/escString/.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"), ("\n", "\\n")):
        shown = shown.replace(plain, escaped)
    return f'"{shown}"'


def _render(dot: str, picture_format: str) -> bytes:
    """Lay the graph out with pygraphviz, whose wheels include Graphviz, or else with `dot`."""
    if find_spec("pygraphviz"):
        import pygraphviz

        return bytes(pygraphviz.AGraph(string=dot).draw(format=picture_format, prog="dot"))
    command = ["dot", f"-T{picture_format}"]
    return subprocess.run(command, input=dot.encode(), stdout=subprocess.PIPE, check=True).stdout


def _in_notebook() -> bool:
    # Without IPython loaded this is not a notebook, and importing it would be slow.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
