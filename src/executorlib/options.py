"""What the constructors of all executors take alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from executorlib.resources import Resources, whole_number

if TYPE_CHECKING:
    from executorlib.graph.record import Graph

_CACHE_VERSIONS = ("warn", "key", "ignore")


class Common:
    """What the constructors of all rows take alike: checked, and put into the form in which it is used.

    Args:
        name: The class, for error texts.
        max_workers: See `SingleNodeExecutor`, as all others.
        cache_directory: Likewise.
        max_cores: Likewise.
        resource_dict: Likewise.
        hostname_localhost: Likewise.
        block_allocation: Likewise.
        init_function: Likewise.
        disable_dependencies: Likewise.
        refresh_rate: Likewise.
        plot_dependency_graph: Likewise.
        plot_dependency_graph_filename: Likewise.
        export_workflow_filename: Likewise.
        log_obj_size: Likewise.
        wait: Likewise.
        openmpi_oversubscribe: Likewise.
        cache_versions: What becomes of a result in the cache that was made with other versions of the distributions
            that its call reaches than those installed: ``"warn"``, used and told once; ``"ignore"``, used;
            ``"key"``, not found, as the versions are part of the key.
        log_records: See `SingleNodeExecutor`.
        restart_limit: Likewise.
        restarts_calls: Whether `restart_limit` means something without a block.
        has_template: Whether unknown keys of ``resource_dict`` go to a submission template.
        default_directory: Cache directory where none is named.

    Attributes:
        resources: Defaults for every call.
        graph: Records calls instead of running them, where a graph was asked for.
        finish_graph: Shows or writes it.
        settings: What `BaseExecutor.info` shows.
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
        self.max_workers = positive("max_workers", max_workers)
        self.max_cores = positive("max_cores", max_cores)
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
    """Raise an error where the two arguments do not go together."""
    if init_function is not None and not block_allocation:
        raise ValueError(
            "init_function needs block_allocation=True: without it every call has a process of its own, and "
            "nothing would be left of the initialisation."
        )
    if init_function is not None and not callable(init_function):
        raise TypeError(f"init_function is {init_function!r}, expected a callable that returns a dict.")


def refuse(resources: Resources, subject: str, where: str, reasons: Mapping[str, str]) -> None:
    """Make sure that a call asks for nothing that a row has no use for.

    Args:
        resources: What the call asks for.
        subject: Whose that is, for the error text.
        where: What cannot honour it, likewise.
        reasons: Why not, by key of ``resource_dict``.

    Raises:
        ValueError: It does.
    """
    for key, why in reasons.items():
        if getattr(resources, key):
            raise ValueError(f"{subject}: {key} cannot be honoured {where}: {why}. Leave it out here.")


def positive(name: str, value: int | None) -> int | None:
    """Check an optional count, which has to be above 0."""
    if value is None:
        return None
    try:
        return whole_number(1)(name, value)
    except ValueError:
        raise ValueError(f"{name} must be greater than 0") from None  # as executorlib 1.x says it


def _graph_mode(
    plot: bool, plot_filename: str | None, export_filename: str | None, disable_dependencies: bool
) -> tuple[Graph | None, Callable[[Graph], None] | None]:
    """The recorder and what to do with it in the end, where the constructor's arguments ask for a graph."""
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
