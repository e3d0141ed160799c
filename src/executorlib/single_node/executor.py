"""The executor for this machine."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from executorlib import machine
from executorlib.core.ledger import Ledger, Node
from executorlib.executor import BaseExecutor
from executorlib.launchers.contract import Lifetime
from executorlib.options import Options, documented
from executorlib.resources import ResourceDict, Resources, reject_unsupported, whole_number
from executorlib.single_node.launcher import LocalLauncher
from executorlib.single_node.mpi import ask_mpiexec_once

# Where the next executor of this process starts taking CPUs, so that two small ones do not share a CPU.
_first_cpu = itertools.count()


@documented(Options)
class SingleNodeExecutor(BaseExecutor):
    """Runs calls on this machine: each in a fresh process of its own, or in a block of workers.

    Args:
        max_workers: Most calls at once; in block mode the number of workers. If only this is given, cores are not
            counted. Each worker takes up to four open files of this process; its soft limit (``ulimit -n``) is raised
            if needed. By default ``max_cores`` decides.
        max_cores: Most cores in use at once, where a call takes ``cores × threads_per_core``. If neither limit is
            given, the default is the CPUs that this process may use, by affinity and container limits.
        hostname_localhost: Accepted for compatibility; nothing here connects by host name.
        preload: Modules to import once, before any worker is forked, so that calls need not import them; with "spawn",
            every worker imports them when it starts.
        gpus: Number of GPUs, or their device names; None asks the machine.
        start_method: "fork" (default on Linux) forks workers from a small process that has none of this one's threads;
            "spawn" (default elsewhere) starts a new interpreter for each worker, which is slower.
        pin_cores: Pin each call to the cores that it holds. None does so if cores are counted and the system can.

    Raises:
        ValueError: An argument cannot be honoured; the text says why and what to do.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        max_cores: int | None = None,
        resource_dict: ResourceDict | None = None,
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
        restart_limit: int = 0,
        openmpi_oversubscribe: bool = False,
        *,
        preload: Sequence[str] = (),
        gpus: int | Sequence[str | int] | None = None,
        start_method: str | None = None,
        pin_cores: bool | None = None,
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
            restart_limit=restart_limit,
        )
        spawn = _is_spawn(start_method)
        modules = _preload_modules(preload)
        defaults = options.resources
        max_workers, max_cores = options.max_workers, options.max_cores
        devices = _devices(gpus)
        count_cores = max_cores is not None or max_workers is None
        cpus = machine.usable_cpus()
        cores = max_cores or len(cpus)
        demand = defaults.demand
        if block_allocation:
            size = max_workers or max(1, Ledger([Node("localhost", range(cores), devices)]).room_for(demand))
        else:
            size = max_workers or max(1, cores // demand.cores)
        if count_cores:
            can_pin = hasattr(os, "sched_setaffinity") and cores <= len(cpus)
            # Executors of other processes should start elsewhere, too, so that two small ones do not share a CPU.
            first = (os.getpid() + next(_first_cpu)) * cores % len(cpus)
            ids = (cpus[first:] + cpus[:first])[:cores] if can_pin else list(range(cores))
        else:
            can_pin = False
            ids = list(range(size))
        if pin_cores and not can_pin:
            raise ValueError(
                "pin_cores=True cannot be honoured: it needs a system with CPU affinity (Linux) and max_cores "
                f"between 1 and the {len(cpus)} CPUs that this process may use. Give max_cores, or leave pin_cores out."
            )
        ledger = Ledger([Node("localhost", ids, devices)])
        if defaults.cache_directory is not None:
            # Workers need it to write entries. Imported once, in the agent, it costs the calls nothing.
            modules.append("executorlib.worker.entry")
        if log_records:
            modules.append("executorlib.worker.records")
        # A larger stock than can run at once would only take memory.
        stock = min(size, len(cpus)) if defaults.cores == 1 else 0
        if options.graph is None and not block_allocation:
            _check_files(size, stock)
        super().__init__(
            options,
            make_launcher=lambda events: LocalLauncher(
                events,
                spawn=spawn,
                lifetime=Lifetime.BLOCK if block_allocation else Lifetime.CALL,
                stock=stock,
                preload=modules,
                default_threads=defaults.threads_per_core,
            ),
            ledger=ledger,
            capacity=ledger,
            count_cores=count_cores,
            max_workers=size,
            max_calls=size,
            pin=can_pin and pin_cores is not False,
            settings={
                "restart_limit": restart_limit,
                "preload": tuple(preload),
                "gpus": tuple(devices),
                "start_method": "spawn" if spawn else "fork",
                "pin_cores": can_pin and pin_cores is not False,
            },
        )

    def _check(self, resources: Resources, subject: str) -> None:
        reasons = {"slurm_cmd_args": "there is no Slurm in between", "submission_template": "no job is submitted"}
        reject_unsupported(resources, subject, "on a single node", reasons)
        if resources.num_nodes is not None and resources.num_nodes > 1:
            raise ValueError(
                f"{subject}: num_nodes={resources.num_nodes} cannot be honoured on a single node. Ask for 1, or leave "
                "it out."
            )

    def _prepare_ranks(self) -> None:
        ask_mpiexec_once()

    def _check_block(self, size: int) -> None:
        super()._check_block(size)
        _check_files(size, 0)


# Open files of this process: a worker's connection and standard error, and in a block two more for its permits.
_FILES_PER_WORKER = 4
# Those of the loop itself, including those for the node agent.
_FILES_PER_EXECUTOR = 8


def _check_files(workers: int, stock: int) -> None:
    """Raise ValueError if this process may not be able to open enough files.

    A worker of one call needs only half of what is counted here, but the next one may start while it is about to exit.
    """
    wanted = _FILES_PER_EXECUTOR + _FILES_PER_WORKER * workers + 2 * stock
    room = machine.room_for_files(wanted)
    if room < wanted:
        raise ValueError(
            f"{workers} workers at once need {wanted} open files in this process, which may open only {room} more. "
            "Ask for fewer with max_workers or max_cores, or have the hard limit raised (`ulimit -Hn`)."
        )


def _is_spawn(start_method: str | None) -> bool:
    if start_method is None:
        # macOS can fork, but some of its frameworks do not survive that; CPython spawns there for the same reason.
        return sys.platform != "linux"
    if start_method not in ("fork", "spawn"):
        raise ValueError(f"start_method is {start_method!r}, expected 'fork' or 'spawn'.")
    return start_method == "spawn"


def _preload_modules(preload: Sequence[str]) -> list[str]:
    if isinstance(preload, str):
        raise TypeError(f"preload is the str {preload!r}, expected a list of module names such as [{preload!r}].")
    modules = list(preload)
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError, AttributeError):
            found = False
        if not found:
            raise ValueError(f"preload names the module {module!r}, which cannot be found. Install it or leave it out.")
    return modules


def _devices(gpus: int | Sequence[str | int] | None) -> list[str]:
    if gpus is None:
        return machine.visible_gpus()
    if isinstance(gpus, str):
        raise TypeError(f"gpus is the str {gpus!r}, expected a number or a list of device names such as ['0', '1'].")
    if isinstance(gpus, Sequence):
        return [str(device) for device in gpus]
    return [str(index) for index in range(whole_number(0)("gpus", gpus))]
