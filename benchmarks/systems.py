"""The measured systems: how each is opened with two workers, given a call, and asked for results.

Every system is one small function. All run on the loopback interface, with telemetry and
dashboards off.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = 2


def _results(futures: Sequence[Any]) -> list[Any]:
    return [future.result() for future in futures]


@dataclass(frozen=True)
class Pool:
    """An open system.

    Attributes:
        submit: ``submit(function, *args)`` gives a future of any kind, without waiting.
        gather: Waits for a list of such futures and gives their results.
    """

    submit: Callable[..., Any]
    gather: Callable[[Sequence[Any]], list[Any]] = _results


@dataclass(frozen=True)
class System:
    """A row of the table of systems.

    Attributes:
        label: The name in tables and pictures.
        environment: The virtual environment (see environments.py) it is measured in.
        open: Opens it with two workers.
    """

    label: str
    environment: str
    open: Callable[[], AbstractContextManager[Pool]]


@contextmanager
def executorlib(**options: Any) -> Iterator[Pool]:
    """This package and, in its own environment, executorlib 1.x: same names, same arguments."""
    from executorlib import SingleNodeExecutor

    with SingleNodeExecutor(max_workers=WORKERS, hostname_localhost=True, **options) as executor:
        yield Pool(executor.submit)


@contextmanager
def process_pool() -> Iterator[Pool]:
    """The standard library's process pool with its defaults."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(max_workers=WORKERS) as executor:
        yield Pool(executor.submit)


@contextmanager
def process_pool_fresh() -> Iterator[Pool]:
    """The standard library's process pool with a fresh process for each call."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(max_workers=WORKERS, max_tasks_per_child=1, mp_context=get_context("spawn")) as executor:
        yield Pool(executor.submit)


@contextmanager
def multiprocessing_pool() -> Iterator[Pool]:
    """``multiprocessing.Pool.apply_async``."""
    from multiprocessing import Pool as ProcessPool

    with ProcessPool(WORKERS) as pool:
        yield Pool(
            lambda function, *args: pool.apply_async(function, args),
            lambda results: [result.get() for result in results],
        )


@contextmanager
def loky() -> Iterator[Pool]:
    """loky's reusable executor."""
    from loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=WORKERS)
    yield Pool(executor.submit)
    executor.shutdown(wait=True)


@contextmanager
def parsl() -> Iterator[Pool]:
    """Parsl's HighThroughputExecutor, its interchange and workers on this machine."""
    import parsl
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    executor = HighThroughputExecutor(
        label="workers",
        address="127.0.0.1",
        max_workers_per_node=WORKERS,
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )
    config = Config(executors=[executor], usage_tracking=0, initialize_logging=False)
    app = functools.cache(parsl.python_app)
    with parsl.load(config):
        yield Pool(lambda function, *args: app(function)(*args))


@contextmanager
def dask() -> Iterator[Pool]:
    """Dask distributed: two workers of one thread each."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        # pure=False: equal calls are calls, not one cached result.
        yield Pool(functools.partial(client.submit, pure=False), client.gather)


@contextmanager
def ray() -> Iterator[Pool]:
    """Ray tasks on a node of two CPUs."""
    import ray

    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    remote = functools.cache(ray.remote)
    yield Pool(
        lambda function, *args: remote(function).remote(*args),
        lambda references: ray.get(list(references)),
    )
    ray.shutdown()


@contextmanager
def hyperqueue() -> Iterator[Pool]:
    """HyperQueue's local cluster (the Python wheel) starting ``/bin/true``, whatever the function.

    A call is a task; ``gather`` submits them as one job without output files, the fastest way
    HyperQueue has.
    """
    from hyperqueue import Job, LocalCluster
    from hyperqueue.cluster import WorkerConfig

    def run(commands: Sequence[list[str]]) -> list[Any]:
        job = Job()
        tasks = [job.program(command, stdout=None, stderr=None) for command in commands]
        # HyperQueue's own wait asks once a second; a task that depends on all says it at once.
        done = Path(tempfile.mkdtemp()) / "done"
        job.program(["touch", str(done)], deps=tasks, stdout=None, stderr=None)
        client.submit(job)
        while not done.exists():
            time.sleep(0.005)
        return [None] * len(tasks)

    with LocalCluster(worker_config=WorkerConfig(cores=WORKERS)) as cluster:
        client = cluster.client()
        yield Pool(lambda function: ["/bin/true"], run)


SYSTEMS = {
    "ours": System("executorlib", "ours", executorlib),
    "ours-block": System("executorlib, block", "ours", functools.partial(executorlib, block_allocation=True)),
    "executorlib1x": System("executorlib 1.x", "executorlib1x", executorlib),
    "executorlib1x-block": System(
        "executorlib 1.x, block",
        "executorlib1x",
        functools.partial(executorlib, block_allocation=True),
    ),
    "process-pool": System("ProcessPoolExecutor", "stdlib", process_pool),
    "process-pool-fresh": System("ProcessPoolExecutor, fresh processes", "stdlib", process_pool_fresh),
    "multiprocessing": System("multiprocessing.Pool", "stdlib", multiprocessing_pool),
    "loky": System("loky", "loky", loky),
    "parsl": System("Parsl", "parsl", parsl),
    "dask": System("Dask", "dask", dask),
    "ray": System("Ray", "ray", ray),
    "hyperqueue": System("HyperQueue, /bin/true", "hyperqueue", hyperqueue),
}

# Set for every measurement: no usage reports, no progress bars.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PARSL_TRACKING": "false",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
