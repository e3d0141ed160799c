"""The public contract as data: every name, argument and default that programs rely on.

Delivered names must match exactly. Names that come later must be absent, so that a name that
appears is moved from one list to the other and is checked from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter


@dataclass(frozen=True)
class Required:
    """Stands for "no default"."""


REQUIRED = Required()

# Names of ``executorlib``.

NAMES = {
    "BaseExecutor",
    "FluxClusterExecutor",
    "FluxJobExecutor",
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
}

# Names of ``executorlib`` beyond those of executorlib 1.x.

NAMES_BEYOND = {"ResourceDict"}

# Names of ``executorlib.api``.

API_NAMES = {
    "ExecutorlibSocketError",
    "MpiExecSpawner",
    "SocketInterface",
    "SubprocessSpawner",
    "TestClusterExecutor",
    "cancel_items_in_queue",
    "cloudpickle_register",
    "get_command_path",
    "interface_bootup",
    "interface_connect",
    "interface_receive",
    "interface_send",
    "interface_shutdown",
}

# Constructors: arguments in the order in which they may be given by position, with their defaults.

_FIRST: dict[str, object] = {
    "max_workers": None,
    "cache_directory": None,
    "max_cores": None,
    "resource_dict": None,
}
_REST: dict[str, object] = {
    "hostname_localhost": None,
    "block_allocation": False,
    "init_function": None,
    "disable_dependencies": False,
    "refresh_rate": 0.01,
    "plot_dependency_graph": False,
    "plot_dependency_graph_filename": None,
    "export_workflow_filename": None,
    "log_obj_size": False,
    "wait": True,
}
CONSTRUCTORS: dict[str, dict[str, object]] = {
    "FluxClusterExecutor": {
        **_FIRST,
        "pysqa_config_directory": None,
        "pmi_mode": None,
        **_REST,
        "openmpi_oversubscribe": False,
    },
    "FluxJobExecutor": {
        **_FIRST,
        "pmi_mode": None,
        "flux_executor": None,
        "flux_executor_nesting": False,
        "flux_log_files": False,
        **_REST,
        "restart_limit": 0,
        "openmpi_oversubscribe": False,
    },
    "SingleNodeExecutor": {**_FIRST, **_REST, "restart_limit": 0, "openmpi_oversubscribe": False},
    "SlurmClusterExecutor": {
        **_FIRST,
        "pysqa_config_directory": None,
        "pmi_mode": None,
        **_REST,
        "openmpi_oversubscribe": False,
    },
    "SlurmJobExecutor": {**_FIRST, "pmi_mode": None, **_REST, "restart_limit": 0, "openmpi_oversubscribe": False},
    "TestClusterExecutor": {**_FIRST, **_REST, "openmpi_oversubscribe": False},
}
# Arguments beyond those of executorlib 1.x; by keyword only, so that no position moves.
CONSTRUCTORS_BEYOND: dict[str, dict[str, object]] = {
    "FluxClusterExecutor": {"cache_versions": "warn", "log_records": False},
    "FluxJobExecutor": {"cache_versions": "warn", "log_records": False},
    "SingleNodeExecutor": {
        "preload": (),
        "gpus": None,
        "start_method": None,
        "pin_cores": None,
        "cache_versions": "warn",
        "log_records": False,
    },
    "SlurmClusterExecutor": {"cache_versions": "warn", "log_records": False},
    "SlurmJobExecutor": {"cache_versions": "warn", "log_records": False},
    "TestClusterExecutor": {"cache_versions": "warn", "log_records": False},
}

# Methods: parameter, kind, default.

_POSITIONAL_ONLY = Parameter.POSITIONAL_ONLY
_ANY = Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD = Parameter.KEYWORD_ONLY
_ARGS = Parameter.VAR_POSITIONAL
_KWARGS = Parameter.VAR_KEYWORD

Signature = list[tuple[str, object, object]]

METHODS: dict[str, Signature] = {
    "submit": [
        ("fn", _POSITIONAL_ONLY, REQUIRED),
        ("args", _ARGS, REQUIRED),
        ("resource_dict", _KEYWORD, None),
        ("kwargs", _KWARGS, REQUIRED),
    ],
    "map": [
        ("fn", _ANY, REQUIRED),
        ("iterables", _ARGS, REQUIRED),
        ("timeout", _KEYWORD, None),
        ("chunksize", _KEYWORD, 1),
        ("buffersize", _KEYWORD, None),
    ],
    "batched": [("iterable", _ANY, REQUIRED), ("n", _ANY, REQUIRED)],
    "shutdown": [("wait", _ANY, True), ("cancel_futures", _KEYWORD, False)],
    "terminate_workers": [],
    "kill_workers": [],
}

PROPERTIES = {"max_workers", "info", "future_queue"}

FUNCTIONS: dict[str, Signature] = {
    "get_cache_data": [("cache_directory", _ANY, REQUIRED)],
    "get_future_from_cache": [("cache_directory", _ANY, REQUIRED), ("cache_key", _ANY, REQUIRED)],
    "get_item_from_future": [("future", _ANY, REQUIRED), ("key", _ANY, REQUIRED)],
    "split_future": [("future", _ANY, REQUIRED), ("n", _ANY, REQUIRED)],
    "terminate_task_in_cache": [
        ("cache_directory", _ANY, REQUIRED),
        ("cache_key", _ANY, REQUIRED),
        ("pysqa_config_directory", _ANY, None),
        ("backend", _ANY, None),
    ],
    "terminate_tasks_in_cache": [
        ("cache_directory", _ANY, REQUIRED),
        ("pysqa_config_directory", _ANY, None),
        ("backend", _ANY, None),
    ],
}

_SPAWNER: Signature = [
    ("cwd", _ANY, None),
    ("cores", _ANY, 1),
    ("worker_id", _ANY, 0),
    ("openmpi_oversubscribe", _ANY, False),
    ("threads_per_core", _ANY, 1),
]
API_FUNCTIONS: dict[str, Signature] = {
    "MpiExecSpawner": _SPAWNER,
    "SubprocessSpawner": _SPAWNER,
    "SocketInterface": [
        ("spawner", _ANY, None),
        ("log_obj_size", _ANY, False),
        ("time_out_ms", _ANY, 1000),
    ],
    "cancel_items_in_queue": [("que", _ANY, REQUIRED)],
    "cloudpickle_register": [("ind", _ANY, 2)],
    "get_command_path": [("executable", _ANY, REQUIRED)],
    "interface_bootup": [
        ("command_lst", _ANY, REQUIRED),
        ("connections", _ANY, REQUIRED),
        ("hostname_localhost", _ANY, None),
        ("log_obj_size", _ANY, False),
        ("worker_id", _ANY, None),
        ("stop_function", _ANY, None),
    ],
    "interface_connect": [("host", _ANY, REQUIRED), ("port", _ANY, REQUIRED)],
    "interface_send": [("socket", _ANY, REQUIRED), ("result_dict", _ANY, REQUIRED)],
    "interface_receive": [("socket", _ANY, REQUIRED)],
    "interface_shutdown": [("socket", _ANY, REQUIRED), ("context", _ANY, REQUIRED)],
}
API_METHODS: dict[str, set[str]] = {
    "SocketInterface": {
        "bind_to_random_port",
        "bootup",
        "receive_dict",
        "send_and_receive_dict",
        "send_dict",
        "shutdown",
        "status",
    },
    "SubprocessSpawner": {"bootup", "generate_command", "poll", "shutdown"},
    "MpiExecSpawner": {"bootup", "generate_command", "poll", "shutdown"},
}

# Keys of ``resource_dict`` that every executor knows.
RESOURCE_KEYS = {
    "cores",
    "threads_per_core",
    "gpus_per_core",
    "cwd",
    "cache_key",
    "cache_directory",
    "num_nodes",
    "exclusive",
    "error_log_file",
    "run_time_max",
    "priority",
    "slurm_cmd_args",
    "submission_template",
    "openmpi_oversubscribe",
}

# Modules that ``import executorlib`` alone must not load.
NOT_LOADED_BY_IMPORT = {
    "cloudpickle",
    "flux",
    "h5py",
    "mpi4py",
    "multiprocessing",
    "networkx",
    "numpy",
    "pygraphviz",
    "pysqa",
    "zmq",
}
