"""The executor for programs that run inside a Slurm allocation and distribute their calls over its nodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from executorlib.core.ledger import Ledger, Node, spread_over
from executorlib.executor import BaseExecutor
from executorlib.launchers.contract import Events, Launcher, Lifetime
from executorlib.machine import NodeShape
from executorlib.options import Options, documented
from executorlib.resources import Demand, ResourceDict, Resources, reject_unsupported
from executorlib.single_node.mpi import ask_mpiexec_once
from executorlib.slurm.allocation import slurm_allocation
from executorlib.slurm.nodes import NodesLauncher


@documented(Options)
class SlurmJobExecutor(BaseExecutor):
    """Runs calls on the nodes of the Slurm job that this program is in, each in a fresh process or in a block.

    One `srun` starts an agent on every node. Calls then need nothing from Slurm, except those with ranks on several
    nodes, ``pmi_mode`` or ``slurm_cmd_args``, which are steps.

    Args:
        cache_directory: Keep results in this directory, which all nodes must see, and look calls up there before
            running them; the same as the key in ``resource_dict``. By default nothing is kept.
        max_cores: Most cores in use at once, where a call takes ``cores × threads_per_core``. They are those of the
            first nodes that together have as many; by default all of the allocation.
        pmi_mode: How `srun` and the MPI library of a call with several ranks find each other, such as ``"pmix"`` or
            ``"pmi2"``; None starts the ranks with the MPI library's own `mpiexec`.
        restart_limit: How often a call is run again when a node that it runs on is lost; if only its process dies, the
            call fails. In block mode, how often each worker is replaced when it dies.

    Raises:
        RuntimeError: This program is not inside a Slurm job.
        ValueError: An argument cannot be honoured; the text says why and what to do.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        max_cores: int | None = None,
        resource_dict: ResourceDict | None = None,
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
        restart_limit: int = 0,
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
            restart_limit=restart_limit,
            restarts_calls=True,
        )
        self._pmi_mode = pmi_mode
        defaults = options.resources
        shapes = [] if options.graph is not None else allocated_nodes(options.max_cores)
        nodes = [Node.of(shape) for shape in shapes]
        ledger = Ledger(nodes)
        self._ledger = ledger
        demand = ledger.spread(defaults)
        # A demand that never fits is an error below.
        fitting = 0 if demand is None else ledger.room_for(demand)
        modules = ["executorlib.worker.entry"] if defaults.cache_directory is not None else []
        if log_records:
            modules.append("executorlib.worker.records")

        def make_launcher(events: Events) -> Launcher:
            return NodesLauncher(
                events,
                nodes,
                lifetime=Lifetime.BLOCK if block_allocation else Lifetime.CALL,
                preload=modules,
                threads=defaults.threads_per_core,
                pmi_mode=pmi_mode,
                hostname_localhost=bool(options.hostname_localhost),
            )

        super().__init__(
            options,
            make_launcher=make_launcher,
            ledger=ledger,
            # All original nodes: calls that fit only on nodes lost since then fail by their futures, not at submit.
            capacity=None if options.graph is not None else Ledger([Node.of(shape) for shape in shapes]),
            count_cores=True,
            max_workers=options.max_workers or max(1, fitting),
            max_calls=options.max_workers,
            pin=True,
            settings={"restart_limit": restart_limit, "pmi_mode": pmi_mode},
        )

    @property
    def info(self) -> dict[str, Any] | None:
        """The executor's settings; ``nodes`` has what is on each node and what of it is free. None after shutdown."""
        info = super().info
        if info is None:
            return None
        nodes = {
            node.name: {
                "cores": node.total_cores,
                "free_cores": len(node.free_cores),
                "gpus": node.total_gpus,
                "free_gpus": len(node.free_gpus),
            }
            for node in list(self._ledger.nodes)
        }
        return {**info, "nodes": nodes}

    def _check(self, resources: Resources, subject: str) -> None:
        reject_unsupported(resources, subject, "inside an allocation", {"submission_template": "no job is submitted"})
        if resources.slurm_cmd_args and resources.cores > 1 and self._pmi_mode is None:
            raise ValueError(
                f"{subject}: slurm_cmd_args are options of srun, but without pmi_mode mpiexec starts the ranks. Give "
                "the executor a pmi_mode ('pmi2' for MPICH, 'pmix' for Open MPI), or leave them out here."
            )

    def _prepare_ranks(self) -> None:
        ask_mpiexec_once()

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        if self._capacity is None:
            return super()._checked_demand(resources, subject)
        self._check(resources, subject)
        return spread_over(
            self._capacity,
            resources,
            subject,
            "the allocation, or max_cores of it,",
            "Ask for less, or for a larger allocation.",
        )


def allocated_nodes(max_cores: int | None) -> list[NodeShape]:
    """The nodes of the job that this process is in, up to this many cores.

    Raises:
        RuntimeError: This process is not in a job.
    """
    try:
        shapes = slurm_allocation(os.environ)
    except ValueError as error:
        raise RuntimeError(f"SlurmJobExecutor cannot be used here: {error}") from None
    nodes = []
    left = sum(shape.cpus for shape in shapes) if max_cores is None else max_cores
    for shape in shapes:
        if left > 0:
            nodes.append(shape._replace(cpus=min(shape.cpus, left)))
            left -= shape.cpus
    return nodes
