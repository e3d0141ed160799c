"""The executor that submits each call, or each worker, to Slurm as a job."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from dataclasses import replace
from functools import partial

from executorlib.jobs.command_system import CommandSystem
from executorlib.jobs.executor import QueueExecutor
from executorlib.jobs.launcher import JobLauncher
from executorlib.jobs.templates import Templates
from executorlib.jobs.workers import JobWorkerLauncher
from executorlib.launchers.contract import Events, JobEvents, Launcher
from executorlib.resources import Demand, Resources
from executorlib.single_node.mpi import find_mpiexec
from executorlib.slurm.queue import (
    DEFAULT_TEMPLATE,
    SETTINGS_COMMAND,
    command_environment,
    parse_settings,
    rank_command,
)
from executorlib.slurm.registry import queue_of


class SlurmClusterExecutor(QueueExecutor):
    """Submits each call to Slurm as a job, by `sbatch`. Calls with the same needs that come together are one job array.

    Other arguments are those of `ClusterExecutor`.

    Args:
        pysqa_config_directory: A pysqa configuration (``queue.yaml`` and templates); ``resource_dict["queue"]`` chooses
            the script from it. It may be for another queuing system that pysqa drives, instead of Slurm.
        pmi_mode: How `srun` and the MPI library of a call with several ranks find each other, such as ``"pmix"`` or
            ``"pmi2"``; None starts the ranks with the MPI library's own `mpiexec`.

    Raises:
        RuntimeError: The queuing system's commands are not on this machine.
        ImportError: pysqa is not installed.
    """

    def _check_system(self, configuration: str | None) -> None:
        self._templates = check_queue(configuration)

    def _check(self, resources: Resources, subject: str) -> None:
        super()._check(resources, subject)
        folder = resources.cache_directory
        if folder is not None and "\\" in folder and (self._templates is None or self._templates.queue_type == "SLURM"):
            raise ValueError(
                f"{subject}: the cache directory {folder!r} has a backslash in its path, and Slurm starts no job array "
                "with output files there. Choose a directory without one, by cache_directory."
            )

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        if resources.cores > 1 and self._pmi_mode is None:
            with contextlib.suppress(OSError, RuntimeError):  # it may exist where the job runs
                find_mpiexec()  # asks it once, here and not in the loop
        return super()._checked_demand(resources, subject)

    def _job_launcher(
        self, events: JobEvents, configuration: str | None, pmi_mode: str | None, log_sizes: bool
    ) -> Launcher:
        assert self._templates is not None
        system = queue_system(events, self._templates)
        return JobLauncher(events, system, partial(job_command, pmi_mode), log_sizes)

    def _worker_launcher(
        self, events: Events, configuration: str | None, pmi_mode: str | None, folder: str, hostname_localhost: bool
    ) -> Launcher:
        assert self._templates is not None
        system = queue_system(events, self._templates)
        return JobWorkerLauncher(events, system, partial(job_command, pmi_mode), folder, hostname_localhost)


def check_queue(configuration: str | None) -> Templates:
    """Make sure that jobs can be submitted from here; returns the templates of their scripts.

    Raises:
        RuntimeError: The queuing system's commands are not on this machine.
        ImportError: pysqa is not installed.
        ValueError: The configuration cannot be used.
    """
    templates = Templates(DEFAULT_TEMPLATE, configuration)
    if configuration is None:
        # pysqa renders a user's template. It takes half a second to load, so the loop's thread does that. By then the
        # program may be about to end, when it is too late to load the threads that pysqa's dependencies use.
        import concurrent.futures.thread  # noqa: F401

        if importlib.util.find_spec("pysqa") is None:
            raise ImportError('jobs need pysqa for their scripts: pip install "executorlib[cluster]"')
    submit = queue_of(templates).submit_program
    if shutil.which(submit) is None:
        raise RuntimeError(
            f"jobs are submitted with `{submit}`, which is not on PATH. Run this where jobs can be submitted (a login "
            "node, after loading the module that brings the command), or use SingleNodeExecutor on this machine."
        )
    return templates


def queue_system(events: Events, templates: Templates) -> CommandSystem:
    """The system that the templates are for."""
    if templates.queue_type != "SLURM":
        return CommandSystem(events, "the queue", lambda answer: queue_of(templates), [])
    return CommandSystem(
        events,
        "Slurm",
        lambda answer: queue_of(templates, parse_settings(answer)),
        SETTINGS_COMMAND,
        command_environment,
    )


def job_command(pmi_mode: str | None, resources: Resources, program: list[str]) -> list[str]:
    """The command, run in a job, that runs a call's program on all of its ranks."""
    if resources.cores == 1 or pmi_mode is not None:
        return rank_command(resources, pmi_mode, program)
    try:
        mpiexec = find_mpiexec()
    except (OSError, RuntimeError):  # not here, but maybe where the job runs
        return rank_command(resources, None, program)
    variables = [f"{name}={value}" for name, value in mpiexec.environment().items()]
    if not mpiexec.is_open_mpi:
        resources = replace(resources, openmpi_oversubscribe=False)
    command = rank_command(resources, None, program, mpiexec.path)
    return ["env", *variables, *command] if variables else command
