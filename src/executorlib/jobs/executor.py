"""The base classes of executors whose calls are jobs of a queuing system."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from executorlib.core.ledger import Ledger, Node, Unlimited
from executorlib.core.lookup import Lookup
from executorlib.executor import BaseExecutor
from executorlib.jobs.delivery import Entries
from executorlib.jobs.templates import Templates, check_keys
from executorlib.launchers.contract import Events, Launcher
from executorlib.options import Options, documented
from executorlib.resources import Demand, ResourceDict, Resources, check_ranks_of_nodes

_CACHE_DIRECTORY = "executorlib_cache"


class ClusterExecutor(BaseExecutor):
    """The base class of executors whose calls become jobs, through a cache directory that all nodes see.

    A call is a file there. The job reads it and leaves the result beside it. So the session may end, and another one
    that submits the same calls finds their results or joins the jobs that still wait or run. Results stay in the
    directory until it is cleaned (``executorlib cache prune``).

    Args:
        options: The arguments that all rows take.
        make_launcher: Makes the launcher, given the loop.
        ledger: The resources that the executor may use.
        capacity: The most that a call can have; None if only the system knows.
        max_calls: Most jobs at once; None for as many as the system takes.
        max_workers: The number of workers of a block, otherwise most calls at once; None if nothing limits it.
        settings: Further settings for `info`, besides those of all rows.
    """

    _has_template: Literal[True] = True
    _templates: Templates | None = None

    def __init__(
        self,
        options: Options,
        *,
        make_launcher: Callable[[Events], Launcher],
        ledger: Ledger,
        capacity: Ledger | None,
        max_calls: int | None,
        max_workers: int | None,
        settings: dict[str, Any],
        entries: Entries | None,
    ) -> None:
        super().__init__(
            options,
            make_launcher=make_launcher,
            ledger=ledger,
            capacity=capacity,
            count_cores=options.max_cores is not None,
            max_workers=max_workers or (1 if options.block_allocation else _MANY),
            max_calls=max_calls,
            pin=False,
            settings=settings,
            entries=entries,
        )

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        check_keys(resources, subject, self._templates)
        return super()._checked_demand(resources, subject)


# The value of max_workers if nothing limits it. The queue's own limits are far below.
_MANY = 1_000_000


@documented(Options)
class QueueExecutor(ClusterExecutor):
    """The base class of the rows of real queuing systems. All rows whose calls are jobs share its descriptions.

    Args:
        max_workers: Most jobs at once; in block mode the number of workers, one job each. By default as many as the
            system takes. Further calls wait in this process, and are given up when it ends.
        cache_directory: The directory of calls and results, which all nodes see; by default ``executorlib_cache`` in
            the working directory. The same as the key in ``resource_dict``.
        max_cores: Most cores in use at once, where a job takes ``cores × threads_per_core``. By default as many as the
            system gives. Further calls wait as with ``max_workers``.
        resource_dict: Defaults for each call, with the keys below; never changed. Further keys, such as ``partition``,
            ``memory_max`` (GB) or ``job_name``, go to the submission template. By default a call takes one core.
        pysqa_config_directory: A pysqa configuration (``queue.yaml`` and templates); ``resource_dict["queue"]`` chooses
            the script from it. None needs no configuration.
        pmi_mode: How the ranks of a call find each other, such as ``"pmix"`` or ``"pmi2"``; None leaves that to
            the MPI library's own `mpiexec`.
        hostname_localhost: In block mode, have workers connect to ``localhost``. By default they connect to this
            machine's addresses.
        block_allocation: Start a fixed set of workers, each a job, that run call after call, instead of a job for each
            call.
        refresh_rate: Seconds; accepted for compatibility, because the cost of looking decides how often results are
            looked for.
        wait: Whether leaving the `with` block waits for the calls. Otherwise jobs go on, and futures become cancelled.
        log_records: In block mode, pass what calls log to this process's handlers. Each record has the call as
            ``executorlib_call`` and its rank as ``executorlib_rank``. The handlers run in the executor's thread, so
            they must not wait for its futures.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        max_cores: int | None = None,
        resource_dict: ResourceDict | Mapping[str, Any] | None = None,
        pysqa_config_directory: str | os.PathLike[str] | None = None,
        pmi_mode: str | None = None,
        hostname_localhost: bool | None = None,
        block_allocation: bool = False,
        init_function: Callable[[], dict[str, Any]] | None = None,
        disable_dependencies: bool = False,
        refresh_rate: float = 0.01,
        plot_dependency_graph: bool = False,
        plot_dependency_graph_filename: str | None = None,
        export_workflow_filename: str | None = None,
        log_obj_size: bool = False,
        wait: bool = True,
        openmpi_oversubscribe: bool = False,
        *,
        cache_versions: str = "warn",
        log_records: bool = False,
    ) -> None:
        options = Options(
            name=type(self).__name__,
            max_workers=max_workers,
            cache_directory=cache_directory,
            max_cores=max_cores,
            resource_dict=resource_dict,
            hostname_localhost=hostname_localhost,
            block_allocation=block_allocation,
            init_function=init_function,
            disable_dependencies=disable_dependencies,
            refresh_rate=refresh_rate,
            plot_dependency_graph=plot_dependency_graph,
            plot_dependency_graph_filename=plot_dependency_graph_filename,
            export_workflow_filename=export_workflow_filename,
            log_obj_size=log_obj_size,
            wait=wait,
            openmpi_oversubscribe=openmpi_oversubscribe,
            cache_versions=cache_versions,
            log_records=log_records,
            has_template=True,
            default_directory=None if block_allocation else _CACHE_DIRECTORY,
        )
        configuration = None if pysqa_config_directory is None else os.fspath(pysqa_config_directory)
        self._pmi_mode = pmi_mode
        if options.graph is None:
            self._check_system(configuration)
        limited = None if options.max_cores is None else Ledger([Node("cluster", range(options.max_cores))])

        entries = None if block_allocation else Entries(Lookup(cache_versions=options.cache_versions))

        def make_launcher(events: Events) -> Launcher:
            if entries is not None:
                return self._job_launcher(events, entries, configuration, pmi_mode, log_obj_size)
            folder = options.resources.cache_directory or os.path.abspath(_CACHE_DIRECTORY)
            return self._worker_launcher(events, configuration, pmi_mode, folder, bool(options.hostname_localhost))

        super().__init__(
            options,
            make_launcher=make_launcher,
            ledger=limited or Unlimited("cluster"),
            capacity=limited,
            max_calls=options.max_workers,
            max_workers=options.max_workers,
            settings={"pysqa_config_directory": configuration, "pmi_mode": pmi_mode},
            entries=entries,
        )

    def _check_system(self, configuration: str | None) -> None:
        """Raise an error if no jobs can be submitted from here."""
        raise NotImplementedError

    def _job_launcher(
        self, events: Events, entries: Entries, configuration: str | None, pmi_mode: str | None, log_sizes: bool
    ) -> Launcher:
        """Make the launcher that runs each call as a job."""
        raise NotImplementedError

    def _worker_launcher(
        self, events: Events, configuration: str | None, pmi_mode: str | None, folder: str, hostname_localhost: bool
    ) -> Launcher:
        """Make the launcher that runs each worker of a block as a job."""
        raise NotImplementedError

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        # Only the system knows its GPUs and nodes; max_cores is about cores.
        return super()._checked_demand(replace(resources, gpus_per_core=0, exclusive=False), subject)

    def _check(self, resources: Resources, subject: str) -> None:
        if resources.submission_template is None:  # otherwise the template decides
            check_ranks_of_nodes(resources, subject)
