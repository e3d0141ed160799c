"""The resources of a call: the keys of ``resource_dict``, defined, checked and documented only here."""

from __future__ import annotations

import difflib
import functools
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, SupportsIndex, TypedDict


class Demand(NamedTuple):
    """The share of the ledger that a call takes while it runs. Calls with equal demands are interchangeable.

    Attributes:
        cores: Cores, on all nodes together.
        gpus: GPUs, on all nodes together.
        exclusive: Whether the call has its nodes to itself.
        nodes: The number of nodes over which it is spread, all of which it takes at once.
        ranks: The number of parts that must not be split. Only relevant with several nodes.
    """

    cores: int
    gpus: int = 0
    exclusive: bool = False
    nodes: int = 1
    ranks: int = 1

    def shares(self) -> list[tuple[int, int]]:
        """Return the cores and GPUs on each node. Ranks are spread evenly, and the larger shares come first."""
        cores, gpus = self.cores // self.ranks, self.gpus // self.ranks
        few, larger = divmod(self.ranks, self.nodes)
        counts = [few + 1] * larger + [few] * (self.nodes - larger)
        return [(count * cores, count * gpus) for count in counts]


class _AllButCores(TypedDict, total=False):
    threads_per_core: SupportsIndex | None
    gpus_per_core: SupportsIndex | None
    cwd: str | os.PathLike[str] | None
    cache_key: str | None
    cache_directory: str | os.PathLike[str] | None
    num_nodes: SupportsIndex | None
    exclusive: bool | None
    error_log_file: str | os.PathLike[str] | None
    run_time_max: float | None
    priority: SupportsIndex | None
    slurm_cmd_args: list[str] | tuple[str, ...] | None
    submission_template: str | None
    openmpi_oversubscribe: bool | None


class OneRank(_AllButCores, total=False):
    """A ``resource_dict`` with which the result is the function's own, for type checkers."""

    cores: Literal[1] | None


class ResourceDict(_AllButCores, total=False):
    """A ``resource_dict``, for annotations. The help of every executor explains the keys. None means "as before"."""

    cores: SupportsIndex | None


# Keys that do not concern the launcher on a node or the local queue: where results are kept and errors are logged, and
# how the nodes were chosen and requested.
_SEEN_TO = {
    "cache_key",
    "cache_directory",
    "error_log_file",
    "num_nodes",
    "slurm_cmd_args",
    "submission_template",
    "template_keys",
}


@dataclass(frozen=True)
class Resources:
    """The resources that one call needs.

    Attributes:
        cores: MPI ranks, by default 1. Above 1, the function runs on every rank and the result lists the results of all
            ranks.
        threads_per_core: Threads of each rank, by default 1. The usual variables (`OMP_NUM_THREADS`, ...) are set to
            this number.
        gpus_per_core: GPUs of each rank, by default 0. `CUDA_VISIBLE_DEVICES` and `ROCR_VISIBLE_DEVICES` name them.
        cwd: Working directory, made if it is missing. None is the submitting process's own, as it is when the call or
            its block's worker starts. For calls that are a cluster's jobs, it is as it was at `submit`, and for block
            workers that are Slurm's jobs, as it was when the executor was made.
        cache_key: Name of the cache entry, instead of the one derived from function and inputs.
        cache_directory: Directory in which the result is kept and looked up.
        num_nodes: Nodes over which the ranks are spread. One machine has one node.
        exclusive: Whether the call has its nodes to itself; by default not.
        error_log_file: File to which an exception of the function is appended, with the function's inputs.
        run_time_max: Seconds after which the call is ended with `TimeoutError`; by default never.
        priority: Calls with a higher priority start first; by default 0. Queuing systems limit who may raise it.
        slurm_cmd_args: Further options of ``sbatch`` or ``srun``; only with the executors of Slurm.
        submission_template: Template of the job script; only with executors that submit jobs. Keys of its own, such as
            ``partition``, ``account``, ``job_name`` and ``memory_max`` of the one for Slurm, are keys here, too.
        openmpi_oversubscribe: Whether Open MPI may start more ranks than there are cores; by default not. MPICH always
            may, and Flux never does.
        template_keys: Keys and values of the submission template, which are not ours.
    """

    cores: int = 1
    threads_per_core: int = 1
    gpus_per_core: int = 0
    cwd: str | None = None
    cache_key: str | None = None
    cache_directory: str | None = None
    num_nodes: int | None = None
    exclusive: bool = False
    error_log_file: str | None = None
    run_time_max: float | None = None
    priority: int = 0
    slurm_cmd_args: tuple[str, ...] = ()
    submission_template: str | None = None
    openmpi_oversubscribe: bool = False
    template_keys: tuple[tuple[str, Any], ...] = ()

    @property
    def template_values(self) -> dict[str, Any]:
        """`template_keys` as a dictionary."""
        return dict(self.template_keys)

    @functools.cached_property
    def sent(self) -> dict[str, Any]:
        """The resources that a launcher elsewhere needs to start the call's process, as a ``resource_dict``.

        These are all that differ from their defaults, except those dealt with before a process starts.
        """
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default and name not in _SEEN_TO}

    @property
    def demand(self) -> Demand:
        """The demand on one node, for a ledger that counts cores."""
        return Demand(self.cores * self.threads_per_core, self.cores * self.gpus_per_core, self.exclusive)

    def demand_over(self, nodes: int) -> Demand:
        """Return the demand spread over several nodes, each of which holds at least one rank."""
        return self.demand if nodes == 1 else self.demand._replace(nodes=nodes, ranks=self.cores)

    def updated(self, changes: Mapping[str, Any], subject: str, allow_template_keys: bool = False) -> Resources:
        """Return these resources with the changes that a user wrote.

        Args:
            changes: Keys and values of a ``resource_dict``. None means "as before".
            subject: Whose changes they are, for the error text, such as ``call of 'f'``.
            allow_template_keys: Whether keys that are unknown here go to a submission template.

        Raises:
            TypeError: A value has the wrong type, or ``changes`` is not a mapping.
            ValueError: A key is unknown, or a value is out of range.
        """
        if not isinstance(changes, Mapping):
            raise TypeError(
                f"{subject}: resource_dict is a {type(changes).__name__}, expected a dict such as {{'cores': 2}}."
            )
        checked: dict[str, Any] = {}
        template_keys = self.template_values
        for key, value in changes.items():
            check = _CHECKS.get(key)
            if check is None and not allow_template_keys:
                raise ValueError(unknown_key(key, subject))
            if value is None:
                continue
            what = f"{subject}: resource_dict[{key!r}]"
            if check is None:
                template_keys[_text(f"{subject}: a key of resource_dict", key)] = _plain(what, value)
            else:
                checked[key] = check(what, value)
        if template_keys:
            checked["template_keys"] = tuple(sorted(template_keys.items()))
        return replace(self, **checked) if checked else self

    def as_dict(self) -> dict[str, Any]:
        """Return the resources as a ``resource_dict``, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "template_keys"}
        values.update(self.template_keys)
        values["slurm_cmd_args"] = list(self.slurm_cmd_args)
        return {key: value for key, value in values.items() if value is not None}


def check_ranks_of_nodes(resources: Resources, subject: str) -> None:
    """Make sure that a call has a rank for each of its nodes.

    Args:
        resources: What the call needs.
        subject: Whose resources these are, for the error text.

    Raises:
        ValueError: There are fewer ranks than nodes.
    """
    if resources.num_nodes is not None and resources.num_nodes > resources.cores:
        raise ValueError(
            f"{subject}: num_nodes={resources.num_nodes} with cores={resources.cores} cannot be honoured: each node "
            f"runs at least one rank of a call. Ask for cores={resources.num_nodes} or more (the result is then the "
            "list of all ranks' results), or leave num_nodes out."
        )


def check_cache_key(resources: Resources, subject: str) -> None:
    """Make sure that a named cache entry is in a cache directory.

    Raises:
        ValueError: There is no cache directory.
    """
    if resources.cache_key is not None and resources.cache_directory is None:
        raise ValueError(
            f"{subject}: cache_key={resources.cache_key!r} names an entry of a cache directory, but no directory was "
            "named, so nothing would be kept. Name one with cache_directory, or leave cache_key out."
        )


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


def nearest_key(key: object, more: Iterable[str] = ()) -> str | None:
    """Return the known key that the user may have meant.

    Args:
        key: The key that the user wrote.
        more: Other known keys.
    """
    near = difflib.get_close_matches(str(key), [*_CHECKS, *more], n=1, cutoff=0.5)
    return near[0] if near else None


# Keys that only executors with job scripts have, and arguments of the executors themselves.
OF_JOBS = ("memory_max", "partition", "queue", "account", "bank", "qos", "constraint", "reservation", "job_name")
_OF_EXECUTORS = ("pmi_mode", "restart_limit", "max_workers", "max_cores", "block_allocation", "init_function")


def unknown_key(key: object, subject: str) -> str:
    """Return the text of the error about a key that would be ignored."""
    if key in OF_JOBS:
        return f"{subject}: {key!r} in resource_dict is for executors that submit jobs; this executor would ignore it."
    if key in _OF_EXECUTORS:
        return f"{subject}: {key!r} is not a key of resource_dict, but an argument of executors that have it."
    near = nearest_key(key)
    hint = f"did you mean {near!r}?" if near else f"known keys are {', '.join(_CHECKS)}."
    return f"{subject}: unknown key {key!r} in resource_dict; {hint}"


def listed(keys: Iterable[str]) -> str:
    """List keys for a warning, each with the known key that may be meant."""
    near = {key: None if key in OF_JOBS else nearest_key(key) for key in keys}
    return ", ".join(f"{key!r} (did you mean {known!r}?)" if known else repr(key) for key, known in near.items())


def whole_number(minimum: int) -> Callable[[str, object], int]:
    """Make a check for integers (including numpy's, but not bool) of at least ``minimum``."""

    def check(what: str, value: object) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected an int of at least {minimum}.")
        number = operator.index(value)
        if number < minimum:
            raise ValueError(f"{what} is {number}, expected an int of at least {minimum}.")
        return number

    return check


def positive_or_none(name: str, value: int | None) -> int | None:
    """Check an optional count, which must be above 0."""
    if value is None:
        return None
    try:
        return whole_number(1)(name, value)
    except ValueError:
        raise ValueError(f"{name} must be greater than 0") from None  # as executorlib 1.x says it


def _any_integer(what: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected an int.")
    return operator.index(value)


# About thirty years, which systems can count in any of their units.
_MOST_SECONDS = 1e9


def _seconds(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected a number of seconds above 0.")
    seconds = float(value)
    if not 0 < seconds <= _MOST_SECONDS:
        raise ValueError(f"{what} is {value!r}, expected a number of seconds above 0, up to {_MOST_SECONDS:g}.")
    return seconds


def _text(what: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected a non-empty str.")
    return _without_null(what, value)


def _without_null(what: str, text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{what} is {text!r}: no program can be given a null character.")
    return text


def _plain(what: str, value: object) -> object:
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected a str or a number for the template.")
    return _without_null(what, value) if isinstance(value, str) else value


def _path(what: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected a path as str or os.PathLike.")
    path = _without_null(what, os.fsdecode(value))
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(
            f"{what} is the relative path {path!r}, but this process's working directory was removed. Name an absolute "
            "path, or go to another directory first (os.chdir)."
        ) from None


def _flag(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected True or False.")
    return value


def _texts(what: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{what} is {value!r} ({type(value).__name__}), expected a list of str.")
    return tuple(_text(f"{what}[{index}]", item) for index, item in enumerate(value))


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "cores": whole_number(1),
    "threads_per_core": whole_number(1),
    "gpus_per_core": whole_number(0),
    "cwd": _path,
    "cache_key": _text,
    "cache_directory": _path,
    "num_nodes": whole_number(1),
    "exclusive": _flag,
    "error_log_file": _path,
    "run_time_max": _seconds,
    "priority": _any_integer,
    "slurm_cmd_args": _texts,
    "submission_template": _text,
    "openmpi_oversubscribe": _flag,
}
