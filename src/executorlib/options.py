"""The arguments that the constructors of all executors take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from executorlib.resources import Resources, whole_number

if TYPE_CHECKING:
    from executorlib.graph.record import Graph

_CACHE_VERSIONS = ("warn", "key", "ignore")


class Common:
    """The arguments that all rows take, checked and converted. The rows' own docstrings say more about each.

    Args:
        name: The class, for error texts.
        max_workers: Most calls at once, or the number of workers of a block.
        cache_directory: The directory of cached results.
        max_cores: Most cores in use at once.
        resource_dict: Defaults for each call.
        hostname_localhost: Whether workers connect to ``localhost``.
        block_allocation: Whether a fixed set of workers runs the calls.
        init_function: Runs once in each worker of a block.
        disable_dependencies: Whether a future among the inputs is an error.
        refresh_rate: Accepted for compatibility.
        plot_dependency_graph: Whether to show a graph of the calls instead of running them.
        plot_dependency_graph_filename: The file of such a graph.
        export_workflow_filename: The file of a workflow definition, written instead of running the calls.
        log_obj_size: Whether to log the size of calls and results.
        wait: Whether leaving the `with` block waits for the calls.
        openmpi_oversubscribe: Whether Open MPI may start more ranks than there are cores.
        cache_versions: The treatment of a cached result whose call reaches distributions that are now installed in
            other versions: it is used with a single warning (``"warn"``), used silently (``"ignore"``), or not found
            (``"key"``), because the versions are part of the key.
        log_records: Whether this process's handlers get the log records of calls.
        restart_limit: How often each worker is replaced when it dies.
        restarts_calls: Whether `restart_limit` means something without a block.
        has_template: Whether unknown keys of ``resource_dict`` go to a submission template.
        default_directory: The cache directory if none is named.

    Attributes:
        resources: Defaults for each call.
        graph: Records calls instead of running them, if a graph was requested.
        finish_graph: Shows or writes the graph.
        settings: The settings for `BaseExecutor.info`.
    """

    def __init__(
        self,
        name: str,
        *,
        max_workers: int | None,
        cache_directory: str | os.PathLike[str] | None,
        max_cores: int | None,
        resource_dict: Mapping[str, Any] | None,
        hostname_localhost: bool | None,
        block_allocation: bool,
        init_function: Callable[[], dict[str, Any]] | None,
        disable_dependencies: bool,
        refresh_rate: float,
        plot_dependency_graph: bool,
        plot_dependency_graph_filename: str | None,
        export_workflow_filename: str | None,
        log_obj_size: bool,
        wait: bool,
        openmpi_oversubscribe: bool,
        cache_versions: str,
        log_records: bool,
        restart_limit: int = 0,
        restarts_calls: bool = False,
        has_template: bool = False,
        default_directory: str | None = None,
    ) -> None:
        self.max_workers = positive_or_none("max_workers", max_workers)
        self.max_cores = positive_or_none("max_cores", max_cores)
        self.restart_limit = whole_number(0)("restart_limit", restart_limit)
        self.block = block_allocation
        self.init_function = init_function
        self.disable_dependencies = disable_dependencies
        self.wait = wait
        self.log_sizes = log_obj_size
        self.hostname_localhost = bool(hostname_localhost)
        if cache_versions not in _CACHE_VERSIONS:
            expected = ", ".join(map(repr, _CACHE_VERSIONS))
            raise ValueError(f"cache_versions is {cache_versions!r}, expected one of {expected}.")
        self.cache_versions = cache_versions
        self.log_records = log_records
        _check_init_function(init_function, block_allocation)
        if restart_limit and not block_allocation and not restarts_calls:
            raise ValueError(
                "restart_limit needs block_allocation=True: without it every call has a process of its own anyway."
            )
        self.resources = Resources(openmpi_oversubscribe=openmpi_oversubscribe).updated(
            resource_dict or {}, name, has_template
        )
        if cache_directory is not None or (default_directory is not None and self.resources.cache_directory is None):
            self.resources = self.resources.updated({"cache_directory": cache_directory or default_directory}, name)
        self.graph, self.finish_graph = _graph_mode(
            plot_dependency_graph, plot_dependency_graph_filename, export_workflow_filename, disable_dependencies
        )
        self.settings = {
            "max_cores": self.max_cores,
            "block_allocation": block_allocation,
            "init_function": init_function,
            "hostname_localhost": hostname_localhost,
            "disable_dependencies": disable_dependencies,
            "refresh_rate": refresh_rate,
            "log_obj_size": log_obj_size,
            "wait": wait,
            "cache_versions": cache_versions,
            "log_records": log_records,
        }


def _check_init_function(init_function: object, block_allocation: bool) -> None:
    """Raise an error if the two arguments do not go together."""
    if init_function is not None and not block_allocation:
        raise ValueError(
            "init_function needs block_allocation=True: without it every call has a process of its own, and "
            "nothing would be left of the initialisation."
        )
    if init_function is not None and not callable(init_function):
        raise TypeError(f"init_function is {init_function!r}, expected a callable that returns a dict.")


def reject_unsupported(resources: Resources, subject: str, where: str, reasons: Mapping[str, str]) -> None:
    """Make sure that a call requests nothing that a row cannot honour.

    Args:
        resources: The resources that the call requests.
        subject: The owner of the resources, for the error text.
        where: The place that cannot honour them, for the error text.
        reasons: The reasons, by key of ``resource_dict``.

    Raises:
        ValueError: The call sets one of these keys.
    """
    for key, why in reasons.items():
        if getattr(resources, key):
            raise ValueError(f"{subject}: {key} cannot be honoured {where}: {why}. Leave it out here.")


def positive_or_none(name: str, value: int | None) -> int | None:
    """Check an optional count, which must be above 0."""
    if value is None:
        return None
    try:
        return whole_number(1)(name, value)
    except ValueError:
        raise ValueError(f"{name} must be greater than 0") from None  # as executorlib 1.x says it


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
