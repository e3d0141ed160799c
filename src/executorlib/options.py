"""The arguments that the constructors of all executors take, and docstrings that describe them."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from executorlib.resources import Resources, positive_or_none, whole_number

if TYPE_CHECKING:
    from executorlib.graph.record import Graph

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])

_CACHE_VERSIONS = ("warn", "key", "ignore")
# Arguments that `BaseExecutor.info` shows.
_SETTINGS = (
    "max_cores",
    "block_allocation",
    "init_function",
    "hostname_localhost",
    "disable_dependencies",
    "refresh_rate",
    "log_obj_size",
    "wait",
    "cache_versions",
    "log_records",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The arguments that the constructors of all executors take, checked, and what follows from them.

    This is the one place that describes them for users. `documented` copies a description to each executor whose
    docstring has none of its own.

    Args:
        max_workers: Most calls at once; in block mode the number of workers. By default as many as there is room for.
        cache_directory: Keep results in this directory, and look calls up there before running them; the same as the
            key in ``resource_dict``. By default nothing is kept.
        max_cores: Most cores in use at once, where a call takes ``cores × threads_per_core``. By default all that there
            are.
        resource_dict: Defaults for each call, with the keys below; never changed. By default a call takes one core.
        hostname_localhost: Listen on the loopback interface only, because all workers are on this machine. By default
            workers may connect from other machines.
        block_allocation: Start a fixed set of workers that run call after call, instead of a process for each call.
        init_function: In block mode, runs once in each worker and returns a dict whose items fill parameters that later
            calls leave out. None runs nothing.
        disable_dependencies: Make a future among the inputs an error.
        refresh_rate: Seconds; accepted for compatibility, as nothing here polls.
        plot_dependency_graph: Run nothing, and show the graph of the calls when the `with` block is left (in a
            notebook).
        plot_dependency_graph_filename: If a file is named, run nothing, and write the graph to it: png, svg, pdf or dot
            by its ending.
        export_workflow_filename: If a file is named, run nothing, and write a Python Workflow Definition (JSON) to it.
        log_obj_size: Log the sizes of calls and results, logger ``executorlib``, level WARNING.
        wait: Whether leaving the `with` block waits for the calls.
        restart_limit: In block mode, how often each worker is replaced when it dies.
        openmpi_oversubscribe: Let Open MPI start more ranks than there are cores; MPICH always does.
        cache_versions: Cached results that were made with other versions of libraries are used with a single warning
            (``"warn"``), not found (``"key"``), or used silently (``"ignore"``).
        log_records: Pass what calls log to this process's handlers. Each record has the call as ``executorlib_call``
            and its rank as ``executorlib_rank``. The handlers run in the executor's thread, so they must not wait for
            its futures.
        name: The executor's class, for error texts.
        has_template: Whether unknown keys of ``resource_dict`` go to a submission template.
        restarts_calls: Whether `restart_limit` means something without a block.
        default_directory: The cache directory if none is named.

    Attributes:
        resources: Defaults for each call.
        graph: Records calls instead of running them, if a graph was requested.
        finish_graph: Shows or writes the graph.
    """

    max_workers: int | None
    cache_directory: str | os.PathLike[str] | None
    max_cores: int | None
    resource_dict: Mapping[str, Any] | None
    hostname_localhost: bool | None
    block_allocation: bool
    init_function: Callable[[], dict[str, Any]] | None
    disable_dependencies: bool
    refresh_rate: float
    plot_dependency_graph: bool
    plot_dependency_graph_filename: str | None
    export_workflow_filename: str | None
    log_obj_size: bool
    wait: bool
    restart_limit: int = 0  # executors of jobs have no such argument
    openmpi_oversubscribe: bool
    cache_versions: str
    log_records: bool
    # Facts about the executor's class.
    name: InitVar[str]
    has_template: InitVar[bool] = False
    restarts_calls: InitVar[bool] = False
    default_directory: InitVar[str | None] = None
    # Derived from the arguments.
    resources: Resources = field(init=False)
    graph: Graph | None = field(init=False)
    finish_graph: Callable[[Graph], None] | None = field(init=False)

    def __post_init__(self, name: str, has_template: bool, restarts_calls: bool, default_directory: str | None) -> None:
        put = functools.partial(object.__setattr__, self)  # only here may a frozen object still be changed
        put("max_workers", positive_or_none("max_workers", self.max_workers))
        put("max_cores", positive_or_none("max_cores", self.max_cores))
        put("restart_limit", whole_number(0)("restart_limit", self.restart_limit))
        if self.cache_versions not in _CACHE_VERSIONS:
            expected = ", ".join(map(repr, _CACHE_VERSIONS))
            raise ValueError(f"cache_versions is {self.cache_versions!r}, expected one of {expected}.")
        _check_init_function(self.init_function, self.block_allocation)
        if self.restart_limit and not self.block_allocation and not restarts_calls:
            raise ValueError(
                "restart_limit needs block_allocation=True: without it every call has a process of its own anyway."
            )
        resources = Resources(openmpi_oversubscribe=self.openmpi_oversubscribe).updated(
            self.resource_dict or {}, name, has_template
        )
        directory = self.cache_directory
        if directory is not None or (default_directory is not None and resources.cache_directory is None):
            resources = resources.updated(
                {"cache_directory": default_directory if directory is None else directory}, name
            )
        put("resources", resources)
        graph, finish_graph = _graph_mode(
            self.plot_dependency_graph,
            self.plot_dependency_graph_filename,
            self.export_workflow_filename,
            self.disable_dependencies,
        )
        put("graph", graph)
        put("finish_graph", finish_graph)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings for `BaseExecutor.info`, except those that are in `resources`."""
        return {name: getattr(self, name) for name in _SETTINGS}


def _check_init_function(init_function: object, block_allocation: bool) -> None:
    """Raise an error if the two arguments do not go together."""
    if init_function is not None and not block_allocation:
        raise ValueError(
            "init_function needs block_allocation=True: without it every call has a process of its own, and the "
            "initialisation would be lost."
        )
    if init_function is not None and not callable(init_function):
        raise TypeError(f"init_function is {init_function!r}, expected a callable that returns a dict.")


def _graph_mode(
    plot: bool, plot_filename: str | None, export_filename: str | None, disable_dependencies: bool
) -> tuple[Graph | None, Callable[[Graph], None] | None]:
    """Make the recorder of a graph and the step that finishes it, if the constructor's arguments request a graph."""
    if not (plot or plot_filename or export_filename):
        return None, None
    if disable_dependencies:
        raise ValueError(
            "a dependency graph cannot be made with disable_dependencies=True. Leave one of the two arguments out."
        )
    from executorlib.graph import picture, workflow_definition
    from executorlib.graph.record import Graph

    if plot or plot_filename:
        picture.check_filename(plot_filename)

    def finish(graph: Graph) -> None:
        if plot_filename is not None:
            picture.write(graph, plot_filename)
        elif plot:
            picture.draw(graph)
        if export_filename is not None:
            workflow_definition.export(graph, export_filename)

    return Graph(), finish


# Docstrings.


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
