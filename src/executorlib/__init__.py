"""Python functions on HPC systems, one call at a time, behind the standard library's `Executor` interface."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from executorlib._version import __version__
    from executorlib.cache.directory import get_cache_data, get_future_from_cache
    from executorlib.executor import BaseExecutor
    from executorlib.flux.executors import FluxClusterExecutor, FluxJobExecutor
    from executorlib.futures.derived import get_item_from_future, split_future
    from executorlib.resources import ResourceDict
    from executorlib.single_node.executor import SingleNodeExecutor
    from executorlib.slurm.cluster_executor import SlurmClusterExecutor
    from executorlib.slurm.job_executor import SlurmJobExecutor
    from executorlib.terminate import terminate_task_in_cache, terminate_tasks_in_cache

__all__ = [
    "BaseExecutor",
    "FluxClusterExecutor",
    "FluxJobExecutor",
    "ResourceDict",
    "SingleNodeExecutor",
    "SlurmClusterExecutor",
    "SlurmJobExecutor",
    "__version__",
    "get_cache_data",
    "get_future_from_cache",
    "get_item_from_future",
    "split_future",
    "terminate_task_in_cache",
    "terminate_tasks_in_cache",
]

# Names are loaded when they are first used, so that importing the package, and starting a worker, costs almost nothing.
_MODULES = {
    "BaseExecutor": "executor",
    "FluxClusterExecutor": "flux.executors",
    "FluxJobExecutor": "flux.executors",
    "ResourceDict": "resources",
    "SingleNodeExecutor": "single_node.executor",
    "SlurmClusterExecutor": "slurm.cluster_executor",
    "SlurmJobExecutor": "slurm.job_executor",
    "__version__": "_version",
    "get_cache_data": "cache.directory",
    "get_future_from_cache": "cache.directory",
    "get_item_from_future": "futures.derived",
    "split_future": "futures.derived",
    "terminate_task_in_cache": "terminate",
    "terminate_tasks_in_cache": "terminate",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
