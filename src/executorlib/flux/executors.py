"""The executors for Flux: each call, or each worker of a block, is a job of the instance that this program is in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from executorlib.core.ledger import Ledger, Node, Unlimited, spread_over
from executorlib.executor import BaseExecutor
from executorlib.flux.instance import known_instance
from executorlib.flux.jobspec import FURTHER_KEYS
from executorlib.flux.policy import Policy
from executorlib.flux.system import FluxSystem
from executorlib.flux.workers import FluxLauncher
from executorlib.jobs.delivery import Entries
from executorlib.jobs.executor import QueueExecutor
from executorlib.jobs.launcher import JobLauncher
from executorlib.jobs.templates import FLUX, Templates
from executorlib.launchers.contract import Events, Launcher
from executorlib.options import Options, documented
from executorlib.resources import Demand, ResourceDict, Resources, reject_unsupported, unknown_key

# Without max_workers and max_cores, Flux is given calls for this many times the cores of its instance: so the next one
# is there when a core becomes free, and the others wait here, where a call takes less memory than as a job.
_AHEAD = 2
_INSTANCE, _ADVICE = "the Flux instance", "Ask for less, or start a larger instance."
# Keys of resource_dict that have no meaning for Flux, and why.
_USELESS = {
    "slurm_cmd_args": "there is no Slurm in between",
    "openmpi_oversubscribe": "Flux starts no more ranks than there are cores",
}


@documented(Options)
class FluxJobExecutor(BaseExecutor):
    """Runs calls as jobs of the Flux instance that this program is in, each in a fresh process or in a block.

    While jobs run, Flux's own commands can show them, cancel them and attach to them. Flux's store keeps what calls
    print (`flux job attach`).

    Args:
        cache_directory: Keep results in this directory, which all nodes must see, and look calls up there before
            running them; the same as the key in ``resource_dict``. By default nothing is kept.
        resource_dict: Defaults for each call, with the keys below and with ``queue``, ``bank`` and ``job_name``, which
            are Flux's; never changed. By default a call takes one core.
        pmi_mode: What Flux offers to the MPI library of a call with several ranks, such as ``"pmix"``, which Open MPI
            needs and which Flux has with its plugin flux-pmix; None for PMI-1, which MPICH finds.
        flux_executor: A `flux.job.FluxExecutor` for this instance, which then submits the jobs. By default a connection
            of this executor does.
        flux_executor_nesting: Give each call, or each worker of a block, a Flux instance of its own, with everything
            that it asked for; its function can use that with another executor.
        flux_log_files: Write what calls print to ``flux_<job id>.out`` and ``.err`` in their working directories.
        openmpi_oversubscribe: Accepted for compatibility. True is an error, because Flux starts no more ranks than
            there are cores.

    Raises:
        RuntimeError: No Flux instance can be reached.
        ImportError: Flux's Python bindings cannot be loaded.
        ValueError: An argument cannot be honoured; the text says why and what to do.
    """

    # Flux has further keys of its own, see `_check`.
    _has_template: Literal[True] = True

    def __init__(
        self,
        max_workers: int | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        max_cores: int | None = None,
        resource_dict: ResourceDict | Mapping[str, Any] | None = None,
        pmi_mode: str | None = None,
        flux_executor: Any = None,
        flux_executor_nesting: bool = False,
        flux_log_files: bool = False,
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
            has_template=True,
        )
        max_workers, max_cores = options.max_workers, options.max_cores
        if flux_executor is not None and not callable(getattr(flux_executor, "submit", None)):
            raise TypeError(f"flux_executor is {flux_executor!r}, expected a flux.job.FluxExecutor.")
        shapes, policy = ([], Policy({})) if options.graph is not None else known_instance()
        self._policy = policy
        self._nodes = [Node.of(shape) for shape in shapes]
        self._max_cores = max_cores
        total = sum(node.total_cores for node in self._nodes)
        max_calls = max_workers
        if max_calls is None and max_cores is None and not block_allocation:
            max_calls = max(1, _AHEAD * total)

        def make_launcher(events: Events) -> Launcher:
            return FluxLauncher(
                events,
                policy=policy,
                pmi_mode=pmi_mode,
                nested=flux_executor_nesting,
                log_files=flux_log_files,
                hostname_localhost=bool(options.hostname_localhost),
                submit_by=flux_executor,
            )

        super().__init__(
            options,
            make_launcher=make_launcher,
            # Flux decides which cores they are.
            ledger=Unlimited("Flux") if max_cores is None else Ledger([Node("Flux", range(max_cores))]),
            capacity=Ledger(self._nodes) if self._nodes else None,
            count_cores=True,
            max_workers=max_workers or max(1, self._fitting(options.resources)),
            max_calls=max_calls,
            pin=False,
            settings={
                "restart_limit": restart_limit,
                "pmi_mode": pmi_mode,
                "flux_executor": flux_executor,
                "flux_executor_nesting": flux_executor_nesting,
                "flux_log_files": flux_log_files,
            },
        )

    @property
    def info(self) -> dict[str, Any] | None:
        """The executor's settings, and under ``nodes`` what the instance has; None after shutdown."""
        info = super().info
        if info is None:
            return None
        nodes = {node.name: {"cores": node.total_cores, "gpus": node.total_gpus} for node in self._nodes}
        return {**info, "nodes": nodes}

    def _check(self, resources: Resources, subject: str) -> None:
        reasons = {**_USELESS, "submission_template": "no script is submitted"}
        reject_unsupported(resources, subject, "by FluxJobExecutor", reasons)
        for key in resources.template_values:
            if key not in FURTHER_KEYS:
                raise ValueError(unknown_key(key, subject))
        # Defaults that name no queue are refused only when a call is submitted, unless they are for a block.
        _check_policy(self._policy, resources, subject, named=self._loop is not None or self._block)

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        self._check(resources, subject)
        demand = resources.demand
        if self._capacity is None:
            return demand
        if self._max_cores is not None and demand.cores > self._max_cores:
            raise ValueError(
                f"{subject} needs {demand.cores} cores (cores={resources.cores} × threads_per_core="
                f"{resources.threads_per_core}), but max_cores is {self._max_cores}. Ask for fewer, or raise it."
            )
        spread_over(self._capacity, resources, subject, _INSTANCE, _ADVICE)
        # Only Flux knows which nodes and GPUs are free.
        return Demand(demand.cores)

    def _room(self) -> int | None:
        return None if self._capacity is None else self._fitting(self._resources)

    def _fitting(self, resources: Resources) -> int:
        """Return how many workers fit into the instance, or into ``max_cores`` of its cores."""
        nodes = Ledger(self._nodes)
        demand = nodes.spread(resources)
        fitting = 0 if demand is None else nodes.room_for(demand)
        return fitting if self._max_cores is None else min(fitting, self._max_cores // resources.demand.cores)


@documented(QueueExecutor)
class FluxClusterExecutor(QueueExecutor):
    """Submits each call to Flux as a job, through a cache directory, so that the session may end before its calls do.

    The jobs belong to the instance that this program is in, and end with it. So it is useful with a lasting instance,
    such as the system's own.

    Args:
        pysqa_config_directory: A pysqa configuration of type FLUX (``queue.yaml`` and templates);
            ``resource_dict["queue"]`` chooses a script from it. A call with a script, also with one of its own
            (``submission_template``), is submitted by `flux batch`: it runs in a Flux instance of its own, which its
            function can use. None needs no configuration.
        pmi_mode: What Flux offers to the MPI library of a call with several ranks, such as ``"pmix"``, which Open MPI
            needs and which Flux has with its plugin flux-pmix; None for PMI-1, which MPICH finds.
        openmpi_oversubscribe: Accepted for compatibility. True is an error, because Flux starts no more ranks than
            there are cores.

    Raises:
        RuntimeError: No Flux instance can be reached.
        ImportError: Flux's Python bindings cannot be loaded, or pysqa if there is a script.
        ValueError: An argument cannot be honoured; the text says why and what to do.
    """

    _instance: Ledger | None = None
    _policy = Policy({})
    _has_configuration = False

    def _check_system(self, configuration: str | None) -> None:
        shapes, self._policy = known_instance()
        self._instance = Ledger([Node.of(shape) for shape in shapes])
        self._has_configuration = configuration is not None
        self._templates = Templates(None, configuration, FLUX)

    def _job_launcher(
        self, events: Events, entries: Entries, configuration: str | None, pmi_mode: str | None, log_sizes: bool
    ) -> Launcher:
        system = FluxSystem(events, self._policy, pmi_mode, configuration)
        return JobLauncher(events, entries, system, system.command, log_sizes)

    def _worker_launcher(
        self, events: Events, configuration: str | None, pmi_mode: str | None, folder: str, hostname_localhost: bool
    ) -> Launcher:
        return FluxLauncher(
            events,
            policy=self._policy,
            pmi_mode=pmi_mode,
            nested=False,
            log_files=False,
            hostname_localhost=hostname_localhost,
        )

    def _check(self, resources: Resources, subject: str) -> None:
        reject_unsupported(resources, subject, "by FluxClusterExecutor", _USELESS)
        if not self._has_configuration:  # a configuration has queues of its own
            by_script = resources.submission_template is not None
            named = not by_script and (self._loop is not None or self._block)
            _check_policy(self._policy, resources, subject, named)

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        if self._instance is not None:
            spread_over(self._instance, resources, subject, _INSTANCE, _ADVICE)
        return super()._checked_demand(resources, subject)


def _check_policy(policy: Policy, resources: Resources, subject: str, named: bool) -> None:
    """Make sure that the instance accepts a call.

    Args:
        policy: What the instance demands of jobs.
        resources: What the call asks for.
        subject: Who asks for it, for the error text.
        named: Whether the call must have a queue by now, as in `Policy.problem`.

    Raises:
        ValueError: It does not.
    """
    problem = policy.problem(resources, named)
    if problem:
        raise ValueError(f"{subject}: {problem}")
