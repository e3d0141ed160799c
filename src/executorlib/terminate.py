"""Cancel the jobs of a cache directory, whichever session submitted them."""

from __future__ import annotations

import contextlib
import os
import subprocess

from executorlib.cache import directory, entries, trust
from executorlib.flux.instance import FLUX_NAME, cancel_jobs
from executorlib.jobs.command_system import open_dialect
from executorlib.jobs.queue import Dialect, same_system

_LOCAL = "the local queue"


def terminate_tasks_in_cache(
    cache_directory: str | os.PathLike[str],
    pysqa_config_directory: str | None = None,
    backend: str | None = None,
) -> None:
    """Cancel all calls of a cache directory that wait or run, and remove their entries.

    A job of `TestClusterExecutor` that is already running is only forgotten, not ended.

    Args:
        cache_directory: The cache directory, searched with its sub-folders.
        pysqa_config_directory: Configuration of the queuing system that the calls were submitted with, or None.
        backend: Queuing system that has their jobs: ``"slurm"``, ``"flux"``, or None for what the entries say.

    Raises:
        ValueError: ``backend`` is not known, or a job belongs to another system than the one here.
        RuntimeError: The queuing system did not accept the request; then nothing is removed.
        ImportError: An entry needs h5py (it has a value over 4 GB), which is missing.
    """
    _terminate(cache_directory, directory.pending_entries(cache_directory), pysqa_config_directory, backend)


def terminate_task_in_cache(
    cache_directory: str | os.PathLike[str],
    cache_key: str,
    pysqa_config_directory: str | None = None,
    backend: str | None = None,
) -> None:
    """Cancel one call that waits or runs, and remove its entry; a call that is done stays as it is.

    Sessions that wait for the call are told. A job of `TestClusterExecutor` that is already running is only forgotten,
    not ended.

    Args:
        cache_directory: The cache directory.
        cache_key: Key of the entry.
        pysqa_config_directory: Configuration of the queuing system that the call was submitted with, or None.
        backend: Queuing system that has its job: ``"slurm"``, ``"flux"``, or None for what the entry says.

    Raises:
        FileNotFoundError: There is no entry with that key.
        ValueError: ``backend`` is not known, or the job belongs to another system than the one here.
        RuntimeError: The queuing system did not accept the request; then the entry stays.
        ImportError: The entry needs h5py (it has a value over 4 GB), which is missing.
    """
    path = os.path.abspath(entries.entry_path(cache_directory, cache_key, "i"))
    if os.path.exists(entries.output_of(path)):
        return
    if not os.path.exists(path):
        raise FileNotFoundError(f"the cache directory {os.fspath(cache_directory)} has no entry {cache_key!r}")
    _terminate(cache_directory, [path], pysqa_config_directory, backend)


def _terminate(root: str | os.PathLike[str], paths: list[str], configuration: str | None, backend: str | None) -> None:
    if backend not in (None, "slurm", "flux"):
        raise ValueError(f"backend is {backend!r}, expected 'slurm', 'flux', or None for what the entries say.")
    jobs = []
    systems: dict[str, str] = {}  # named by entries, with one such entry for each
    flux_jobs: dict[str, list[str]] = {}  # by instance
    for path in paths:
        job_id, index, system = directory.job_of(path, root)
        if job_id is None or system == _LOCAL:
            continue
        if (system or "").startswith(FLUX_NAME) or (system is None and backend == "flux"):
            flux_jobs.setdefault(system or "", []).append(job_id)
            continue
        if system is not None:
            systems.setdefault(system, path)
        jobs.append((job_id, index))
    if jobs:
        dialect = _dialect_of(systems, configuration)
        if not dialect.cancels_the_gone:
            # It would refuse the whole command if one job had ended.
            ids = [job_id for job_id, _ in jobs]
            known = dialect.parse_status(_run(dialect, dialect.status_command(ids)), ids)
            jobs = [job for job in jobs if (job[0], job[1] or 0) in known]
    if jobs:
        _run(dialect, dialect.cancel_command(jobs))
    for instance, names in flux_jobs.items():
        cancel_jobs(instance, names)
    # A job that starts nevertheless finds its entry gone, and ends.
    for path in paths:
        batch = None
        with contextlib.suppress(trust.UntrustedFile):
            batch = entries.claimed_for(path, os.fspath(root))
        entries.terminate(path, batch, os.fspath(root))


def _dialect_of(systems: dict[str, str], configuration: str | None) -> Dialect:
    """Return the dialect here, if it is that of these systems: in any other, the numbers belong to other jobs.

    Args:
        systems: Names of systems, and for each an entry with a job there.
        configuration: As ``pysqa_config_directory`` in `terminate_tasks_in_cache`.

    Raises:
        ValueError: It is another one.
        RuntimeError: It does not say which one it is.
    """
    dialect = open_dialect(configuration)
    if any(system != dialect.name and same_system(dialect.name, system) for system in systems):
        dialect = open_dialect(configuration, _run(dialect, list(dialect.settings_command)))
    for system, path in systems.items():
        if not same_system(system, dialect.name):
            raise ValueError(
                f"the job of {path} was submitted to {system}, but the commands here are those of {dialect.name}, "
                "where its number belongs to another job; nothing was cancelled. Run this where that system's commands "
                "work, or give the pysqa_config_directory that the call was submitted with."
            )
    return dialect


def _run(dialect: Dialect, argv: list[str]) -> str:
    """Run a command of the queuing system; returns what it prints."""
    try:
        environment = dialect.command_environment(os.environ)
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        if done.returncode not in dialect.codes_of_the_gone:
            done.check_returncode()
        return done.stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or getattr(error, "stdout", None) or str(error)).strip()
        raise RuntimeError(
            f"the jobs could not be cancelled ({argv[0]}: {said}), so their entries stay. Run this where the queuing "
            "system's commands work, and name its pysqa_config_directory if it is not Slurm."
        ) from error
