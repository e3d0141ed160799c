"""The executor whose calls are jobs of a queue on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from executorlib import machine
from executorlib.core.ledger import Ledger, Node, Unlimited
from executorlib.core.lookup import Lookup
from executorlib.jobs.delivery import Entries
from executorlib.jobs.executor import _CACHE_DIRECTORY, ClusterExecutor, QueueExecutor
from executorlib.jobs.launcher import JobLauncher
from executorlib.launchers.contract import Events, Launcher, Lifetime
from executorlib.local_queue.system import LocalSystem
from executorlib.options import Options, documented
from executorlib.resources import ResourceDict, Resources, listed
from executorlib.single_node.launcher import LocalLauncher

logger = logging.getLogger("executorlib")


@documented(QueueExecutor)
class TestClusterExecutor(ClusterExecutor):
    """Runs calls as a cluster executor does, with files and jobs, but on this machine and with nothing installed.

    For tests of programs that will use a cluster, and for calls that are to go on after a notebook is closed. Calls
    beyond the limits wait in the local queue, which outlives this process.

    Args:
        max_workers: Most calls at once; in block mode the number of workers. By default ``max_cores`` decides.
        max_cores: Most cores in use at once, where a call takes ``cores × threads_per_core``. If neither limit is
            given, the default is the number of this machine's CPUs.
        cache_directory: The directory of calls and results; by default ``executorlib_cache`` in the working directory.
            The same as the key in ``resource_dict``.
        resource_dict: Defaults for each call, with the keys below; never changed. Further keys, which a cluster's
            submission template would use, cause a warning. By default a call takes one core.
        hostname_localhost: Accepted for compatibility; nothing here connects by host name.
        block_allocation: Start a fixed set of workers that run call after call, instead of a job for each call.

    Raises:
        ValueError: An argument cannot be honoured; the text says why and what to do.
    """

    __test__ = False  # keeps pytest from collecting it because of its name

    def _check(self, resources: Resources, subject: str) -> None:
        slurms = [key for key in ("num_nodes", "slurm_cmd_args", "submission_template") if getattr(resources, key)]
        if resources.template_keys or slurms:
            keys = ", ".join([*filter(None, [listed(resources.template_values)]), *map(repr, slurms)])
            logger.warning("%s: %s in resource_dict is ignored: no queuing system runs the job", subject, keys)

    def __init__(
        self,
        max_workers: int | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        max_cores: int | None = None,
        resource_dict: ResourceDict | Mapping[str, Any] | None = None,
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
            max_cores=len(machine.usable_cpus()) if max_workers is None and max_cores is None else max_cores,
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
        size = options.max_workers or options.max_cores or 1
        capacity = Ledger([Node("localhost", range(options.max_cores or size), machine.visible_gpus())])

        entries = None if block_allocation else Entries(Lookup(cache_versions=options.cache_versions))

        def make_launcher(events: Events) -> Launcher:
            if entries is None:
                return LocalLauncher(
                    events,
                    spawn=False,
                    lifetime=Lifetime.BLOCK,
                    stock=0,
                    preload=["executorlib.worker.entry", *(["executorlib.worker.records"] if log_records else [])],
                    default_threads=options.resources.threads_per_core,
                )
            limits = {
                "max_workers": options.max_workers,
                "max_cores": None if max_cores is None else options.max_cores,
                "preload": ["executorlib.worker.entry"],
            }
            return JobLauncher(
                events, entries, LocalSystem(events, limits), lambda resources, program: program, log_obj_size
            )

        super().__init__(
            options,
            make_launcher=make_launcher,
            # Nothing is held back before the local queue, because it would be lost with this process.
            ledger=capacity if block_allocation else Unlimited("localhost"),
            capacity=capacity,
            max_calls=None,
            max_workers=size,
            settings={},
            entries=entries,
        )
