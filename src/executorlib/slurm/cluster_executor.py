"""The executor that submits each call, or each worker, to Slurm as a job."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from functools import partial

from executorlib.jobs.command_system import open_system, open_templates
from executorlib.jobs.delivery import Entries
from executorlib.jobs.executor import QueueExecutor
from executorlib.jobs.launcher import JobLauncher
from executorlib.jobs.queue import Dialect
from executorlib.jobs.registry import DEFAULT, dialect_of
from executorlib.jobs.templates import Templates
from executorlib.jobs.workers import JobWorkerLauncher
from executorlib.launchers.contract import Events, Launcher
from executorlib.options import documented
from executorlib.resources import Demand, Resources
from executorlib.single_node.mpi import ask_mpiexec_once, find_mpiexec


@documented(QueueExecutor)
class SlurmClusterExecutor(QueueExecutor):
    """Submits each call to Slurm as a job, by `sbatch`. Calls with the same needs that come together are one job array.

    A call is a file in the cache directory. The job reads it and leaves the result beside it. So the session may end,
    and another one that submits the same calls finds their results or joins the jobs that still wait or run. Results
    stay in the directory until it is cleaned (``executorlib cache prune``).

    Args:
        pysqa_config_directory: A pysqa configuration (``queue.yaml`` and templates); ``resource_dict["queue"]`` chooses
            the script from it. It may be for another queuing system instead of Slurm, such as PBS Professional or Grid
            Engine. By default Slurm gets a script of executorlib's own.
        pmi_mode: How `srun` and the MPI library of a call with several ranks find each other, such as ``"pmix"`` or
            ``"pmi2"``; None starts the ranks with the MPI library's own `mpiexec`.

    Raises:
        RuntimeError: The queuing system's commands are not on this machine.
        ImportError: pysqa is not installed.
        ValueError: An argument cannot be honoured; the text says why and what to do.
    """

    def _check_system(self, configuration: str | None) -> None:
        self._templates = check_queue(configuration)
        if self._pmi_mode is not None and not self._dialect.has_pmi_modes:
            raise ValueError(
                f"pmi_mode is {self._pmi_mode!r}, but {self._dialect.title} does not start ranks: mpiexec does. Leave "
                "pmi_mode out."
            )

    @property
    def _dialect(self) -> type[Dialect]:
        return dialect_of(DEFAULT if self._templates is None else self._templates.queue_type)

    def _check(self, resources: Resources, subject: str) -> None:
        super()._check(resources, subject)
        folder = resources.cache_directory
        problem = "" if folder is None else self._dialect.problem_with(folder)
        if problem:
            raise ValueError(
                f"{subject}: the cache directory {folder!r} {problem}. Choose a directory without one with "
                "cache_directory."
            )

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        if resources.cores > 1 and self._pmi_mode is None:
            ask_mpiexec_once()
        return super()._checked_demand(resources, subject)

    def _job_launcher(
        self, events: Events, entries: Entries, configuration: str | None, pmi_mode: str | None, log_sizes: bool
    ) -> Launcher:
        assert self._templates is not None
        system = open_system(events, self._templates)
        return JobLauncher(events, entries, system, partial(job_command, self._dialect, pmi_mode), log_sizes)

    def _worker_launcher(
        self, events: Events, configuration: str | None, pmi_mode: str | None, folder: str, hostname_localhost: bool
    ) -> Launcher:
        assert self._templates is not None
        system = open_system(events, self._templates)
        command = partial(job_command, self._dialect, pmi_mode)
        return JobWorkerLauncher(events, system, command, folder, hostname_localhost)


def check_queue(configuration: str | None) -> Templates:
    """Make sure that jobs can be submitted from here; returns the templates of their scripts.

    Raises:
        RuntimeError: The queuing system's commands are not on this machine.
        ImportError: pysqa is not installed.
        ValueError: The configuration cannot be used.
    """
    templates = open_templates(configuration)
    if configuration is None:
        # pysqa renders a user's template. It takes half a second to load, so the loop's thread does that. By then the
        # program may be about to end, when it is too late to load the threads that pysqa's dependencies use.
        import concurrent.futures.thread  # noqa: F401

        if importlib.util.find_spec("pysqa") is None:
            raise ImportError('jobs need pysqa for their scripts: pip install "executorlib[cluster]"')
    submit = dialect_of(templates.queue_type).from_settings("", templates).submit_program
    if shutil.which(submit) is None:
        raise RuntimeError(
            f"jobs are submitted with `{submit}`, which is not on PATH. Run this where jobs can be submitted (a login "
            "node, after loading the module that provides the command), or use SingleNodeExecutor on this machine."
        )
    return templates


def job_command(dialect: type[Dialect], pmi_mode: str | None, resources: Resources, program: list[str]) -> list[str]:
    """The command, run in a job, that runs a call's program on all of its ranks."""
    if resources.cores == 1 or pmi_mode is not None:
        return dialect.rank_command(resources, pmi_mode, program)
    try:
        mpiexec = find_mpiexec()
    except (OSError, RuntimeError):  # not here, but maybe where the job runs
        return dialect.rank_command(resources, None, program)
    variables = [f"{name}={value}" for name, value in mpiexec.environment().items()]
    if not mpiexec.is_open_mpi:
        resources = replace(resources, openmpi_oversubscribe=False)
    command = dialect.rank_command(resources, None, program, mpiexec.path)
    return ["env", *variables, *command] if variables else command
