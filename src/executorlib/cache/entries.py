"""Files of calls: each call of a cache directory is one HDF5 file.

An entry is the file ``<key>_i.h5`` while its call waits or runs, and ``<key>_o.h5`` once it is done. Its datasets are
`function`, `input_args`, `input_kwargs`, `resource_dict`, `output` or `error`, `runtime`, `queue_id` and
`error_log_file`, as far as they are known. Each holds the pickle of one value as a row of bytes.

Reading an entry unpickles it, and unpickling runs whatever the file says. Module `trust` decides whose files are read;
functions that read take the cache directory as `root` for that purpose.

Several processes may use one directory at once. A file is put in place whole, so a reader sees a whole entry or none.
Results are put in place by a rename, so the last of two stays; claims by a hard link, so the first one stays
(`write_input`). No locks are taken, because network file systems often have none: HDF5 only ever works on memory and on
open files, never on paths.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import time
from typing import NamedTuple

from executorlib.cache import batch_directory, hdf5, trust, unpickle
from executorlib.serialize import dumps_in_band

# Every job pays for these imports at its start, so only what all jobs need is loaded here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import ModuleType
    from typing import Any, Literal

INPUT, OUTPUT = "_i.h5", "_o.h5"
WRITING = "_r.h5"  # the name that executorlib 1.x gives an entry while it adds the result

DATASETS = (
    "function",
    "input_args",
    "input_kwargs",
    "output",
    "error",
    "resource_dict",
    "runtime",
    "queue_id",
    "error_log_file",
)

# The distributions that a call reached, each with the version that the call ran with.
VERSIONS = "versions"
# A dataset which says that the result is only for those who wait for this job and must not be kept.
NOT_KEPT = "not_kept"
# The output of a job (as text, cut to its end if it is long), and how many bytes the job printed in all.
PRINTED, PRINTED_BYTES = "printed", "printed_bytes"
# A dataset that goes with NOT_KEPT. It holds the name of what ran, if that is not what the entry is named after; then
# `batch` is the batch directory of the job.
RAN = "ran"
# The key that names the entry, if it was derived from the call. It exposes a file that was copied or linked to the name
# of another call, whose result it is not.
NAME = "name"
_CALL = ("function", "input_args", "input_kwargs", "resource_dict")
_RESULT = ("output", "error", "runtime", "traceback")
# The datasets that a look-up reads and that hold only plain data of ours, so they need no `unpickle`.
_PLAIN = frozenset({"runtime", "traceback", VERSIONS, NAME, NOT_KEPT, RAN})

# The fastest level, because large arrays of floats hardly shrink at any.
_GZIP_LEVEL = 1
_CHUNK_BYTES = 1 << 20

_NAME_BYTES = 255  # the limit for one file name on all common file systems

# How long, in seconds, the result of an input may take to show on another node's file system.
_SHOW_SECONDS = 30.0
# The content of a mark if the call was cancelled for everybody who waits for it.
_TERMINATED = b"terminated"
# A process that marks an entry as dead removes the entry at once. After this long, the process must be dead itself.
_MARKER_SECONDS = 60.0


class Output(NamedTuple):
    """The outcome of a call that is done.

    Attributes:
        value: What the function returned; None if it raised.
        error: What the function raised, or None.
        runtime: Seconds that the function took, or None if the entry does not say.
        versions: The distributions that the call reached, each with the version that it ran with.
    """

    value: Any
    error: BaseException | None
    runtime: float | None
    versions: dict[str, str] = {}  # noqa: RUF012  # nobody changes it


class StoredResult:
    """The result of another entry, as executorlib 1.x stores it among the inputs of a call that waits for it."""

    _file_name: str
    _selector: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._file_name!r})"

    def done(self) -> bool:
        """Return whether the other call is done."""
        return os.path.exists(self._file_name)

    def result(self) -> Any:
        """Return the other call's result.

        Raises:
            FileNotFoundError: If the other call is not done.
            Exception: What the other call's function raised.
        """
        output = read_output(self._file_name)
        if output is None:
            raise FileNotFoundError(f"the input {self._file_name} has no result yet")
        if output.error is not None:
            raise output.error
        return output.value if self._selector is None else output.value[self._selector]


class ResultOf:
    """A placeholder among a call's inputs that unpickles to the result of another entry.

    Args:
        path: The other entry's output file, absolute.
        keys: What to take of the result: ``result[keys[0]][keys[1]]...``.
        root: The other entry's cache directory; by default the file's folder.
        batch: The batch directory of the other entry's job, if this session submitted that job. Its result is then
            accepted even if the job ran something other than what the entry is named after (see `name_of_result`).
    """

    def __init__(
        self, path: str, keys: tuple[Any, ...] = (), root: str | None = None, batch: str | None = None
    ) -> None:
        self._path = path
        self._keys = keys
        self._root = root
        self._batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_result, (self._path, self._keys, self._root, self._batch)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path!r}, {self._keys!r})"


# Results loaded as inputs that are not what their entry is named after: the file, and the name of what ran instead.
_others: dict[str, str] = {}


# The modules that pickles may name for the next function: this one, and its name before modules moved into folders.
# Entries from then still exist, and jobs that have waited since then unpickle their inputs themselves.
_HOMES = (__name__, "executorlib.entries")
sys.modules[_HOMES[1]] = sys.modules[__name__]


def _load_result(path: str, keys: tuple[Any, ...], root: str | None = None, batch: str | None = None) -> Any:
    give_up = time.monotonic() + _SHOW_SECONDS
    while (output := _read_input_result(path, root, batch)) is None:
        there = trust.is_there(path)
        # Only that look may have revealed it: the read before it was answered from a network file system's cache.
        if there and (output := _read_input_result(path, root, batch)) is not None:
            break
        if there or time.monotonic() > give_up:
            what = "is damaged, or was not to be kept" if there else "no longer exists"
            raise FileNotFoundError(
                f"an input of this call is the result of {path}, which {what}. Submit that call again, then this one."
            )
        time.sleep(1.0)
    if output.error is not None:
        raise output.error
    value = output.value
    for key in keys:
        value = value[key]
    return value


def _read_input_result(path: str, root: str | None, batch: str | None) -> Output | None:
    values = read_values(path, (*_RESULT, NOT_KEPT, RAN, "batch"), root)
    if values is not None and RAN in values:
        if values.get("batch") != batch:
            raise FileNotFoundError(
                f"an input of this call is the result of {path}, which does not match its key: another session's job "
                "wrote it after its function, inputs or modules were changed between submit and run. Submit that call "
                "again, then this one."
            )
        _others[path] = values[RAN]
        del values[NOT_KEPT]
    return _output(path, values)


def name_of_result(key: str, keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what represents the result of another call, or an item of it, in the key of a call that takes it as input.

    Args:
        key: The other call's key.
        keys: What is taken of its result.
    """
    return ("the result of the call", key, *keys)


def _name_loaded(path: str, keys: tuple[Any, ...], root: str | None = None, batch: str | None = None) -> Any:
    folder = os.path.dirname(path) if root is None else root
    key = path.removesuffix(OUTPUT)[len(folder.rstrip(os.sep)) + 1 :]
    return name_of_result(_others.get(path, key), keys)


class _NamingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_load_result" and module in _HOMES:
            return _name_loaded
        return super().find_class(module, name)


def refers_to_results(data: bytes) -> bool:
    """Return whether a pickle may refer to results of other entries."""
    return b"_load_result" in data


def load_with_names(data: bytes) -> Any:
    """Unpickle inputs with the results of other entries replaced by their names, as keys need them.

    Call it after this process has loaded these results: if one turned out not to be what its entry is named after, it
    gets the name of what it is.
    """
    return _NamingUnpickler(io.BytesIO(data)).load()


class _Unpickler(unpickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "FutureItem" and module.startswith("executorlib."):
            return StoredResult
        if name == "_load_result" and module in _HOMES:
            return ResultOf  # inspecting a call's inputs must not load the results that they refer to
        return super().find_class(module, name)


def entry_path(directory: str | os.PathLike[str], key: str, suffix: Literal["i", "o"] = "o") -> Path:
    """Return the path of an entry's file.

    Args:
        directory: The cache directory.
        key: The entry's key. Slashes make sub-folders.
        suffix: ``"i"`` for a call that waits or runs, ``"o"`` for one that is done.

    Raises:
        ValueError: If the key is empty, leads out of the directory, or cannot be a file name.
    """
    from pathlib import Path  # not needed by jobs

    parts = key.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\0" in key:
        raise ValueError(
            f"the cache_key {key!r} does not name a file inside the cache directory; use a relative "
            'path such as "name" or "folder/name", without "." and ".."'
        )
    path = Path(directory, *parts[:-1], f"{parts[-1]}_{suffix}.h5")
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in (*parts[:-1], path.name)):
        raise ValueError(
            f"the cache_key {key[:40]!r}... is too long for a file name; use at most {_NAME_BYTES - len(OUTPUT)} bytes"
        )
    return path


def root_of(path: str, key: str) -> str:
    """Return the cache directory, given an output file that `entry_path` named and its key."""
    return path.removesuffix(key + OUTPUT).rstrip(os.sep) or os.sep


class Snapshot(bytes):
    """The pickle of a value as it was at a certain time."""

    @classmethod
    def of(cls, value: Any) -> Snapshot:
        """Pickle a value now.

        Raises:
            Exception: Whatever pickling it raises.
        """
        return cls(dumps_in_band(value))


def beside(path: str, key: str, other: str) -> str:
    """Name the output file of another derived key, in the same cache directory as this key's output file."""
    return os.path.join(root_of(path, key), other + OUTPUT)


def write_output(
    path: str | os.PathLike[str],
    *,
    function: Any,
    args: Iterable[Any] | Snapshot,
    kwargs: dict[str, Any] | Snapshot,
    resource_dict: dict[str, Any],
    runtime: float,
    output: Any = None,
    error: BaseException | None = None,
    root: str | None = None,
    versions: dict[str, str] | None = None,
) -> None:
    """Write the entry of a call that is done, whole or not at all.

    Args:
        path: The entry's file, from `entry_path`. Its folder is made if it is missing.
        function: The function that was called, or a `Snapshot` of it.
        args: Its positional arguments. The function may have changed them, so this may be a `Snapshot` of their list
            from before it ran.
        kwargs: Its keyword arguments, or a `Snapshot` of them.
        resource_dict: The resources that it ran with.
        runtime: Seconds that it took.
        output: What it returned, or a `Snapshot` of that. Not kept if it raised.
        error: What it raised, or None.
        root: The cache directory; by default the file's folder.
        versions: The distributions that the call reaches, with their versions, if they are known.

    Raises:
        ImportError: If a value is larger than 4 GB and h5py is missing.
        OSError: If the file cannot be written, for example on a full disk. Nothing is left behind.
        Exception: Whatever pickling one of the values raises.
    """
    result = {"output": output} if error is None else {"error": error}
    values = {
        "function": function,
        "input_args": args if isinstance(args, Snapshot) else list(args),
        "input_kwargs": kwargs,
        "resource_dict": resource_dict,
        **result,
        "runtime": runtime,
        **({} if versions is None else {VERSIONS: versions, NAME: _name_of(path)}),
    }
    trust.write(os.fspath(path), pack(values), root, durable=True)


def write_pickles(path: str, pickles: dict[str, bytes], root: str | None = None) -> None:
    """Write the entry of a call that is done from values that are pickled already.

    Args:
        path: The entry's file.
        pickles: The pickle of each dataset, by name.
        root: The cache directory; by default the file's folder.

    Raises:
        ImportError: If a value is larger than 4 GB and h5py is missing.
        OSError: If the file cannot be written. Nothing is left behind.
    """
    if VERSIONS in pickles:  # only entries with a derived key have them
        pickles = {**pickles, NAME: dumps_in_band(_name_of(path))}
    trust.write(path, pack({name: Snapshot(data) for name, data in pickles.items()}), root, durable=True)


def write_input(path: str, values: dict[str, Any], root: str | None = None) -> bool:
    """Claim an entry: of all who try at the same time, one puts its file in place and has the call run.

    Args:
        path: The file, from `entry_path` with ``"i"``. Its folder is made if it is missing.
        values: The value of each dataset, by name. A `Snapshot` is stored as it is.
        root: The cache directory; by default the file's folder.

    Returns:
        True if the file was put in place; False if there was one already.

    Raises:
        ImportError: If a value is larger than 4 GB and h5py is missing.
        OSError: If the file cannot be written. Nothing is left behind.
        Exception: Whatever pickling one of the values raises.
    """
    return trust.write_first(path, pack(values), root)


def read_input(path: str, root: str | None = None) -> dict[str, Any] | None:
    """Read a call that is to be run.

    Args:
        path: The file, as `write_input` made it.
        root: The cache directory; by default the file's folder.

    Returns:
        The pickles ``function``, ``input_args``, ``input_kwargs`` and ``resource_dict``, and as values ``batch``, the
        batch directory (None in files of executorlib 1.x), ``key``, a `fingerprint.Key` as a list (None if the user
        named the entry), ``run_time_max`` and ``error_log_file``. None if there is no such file or it cannot be read.

    Raises:
        UntrustedFile: Anybody could have put the file there.
    """
    pickles = _read_or_none(path, (*_CALL, "batch", "key"), root)
    if pickles is None or not pickles.keys() >= set(_CALL):
        return None
    try:
        resources = _load(pickles["resource_dict"])
        plain = {name: _load(pickles.pop(name)) if name in pickles else None for name in ("batch", "key")}
    except Exception as error:  # a damaged pickle can raise almost anything
        _warn_unreadable(path, error)
        return None
    return {
        **pickles,
        **plain,
        "run_time_max": resources.get("run_time_max"),
        "error_log_file": resources.get("error_log_file"),
    }


class Ending(NamedTuple):
    """The end of a call, described without unpickling any of the user's objects.

    Attributes:
        data: The pickle of what the function returned or raised.
        failed: True if it raised.
        runtime: Seconds that it took.
        traceback: The traceback as text, if it raised.
        kept: True if later sessions may find the result, too.
        printed: How many bytes the job printed. The entry has the end of that.
        ran: The name of what ran, if that is not what the entry is named after.
        batch: The batch directory of the job in that case.
    """

    data: bytes
    failed: bool
    runtime: float
    traceback: str
    kept: bool = True
    printed: int = 0
    ran: str = ""
    batch: str | None = None


def read_ending(path: str, root: str | None = None) -> Ending | None:
    """Read how a call ended.

    Args:
        path: The call's output file.
        root: The cache directory; by default the file's folder.

    Returns:
        How the call ended; None if the file is missing, incomplete, or holds no result.

    Raises:
        UntrustedFile: Anybody could have put the file there.
    """
    pickles = _read_or_none(path, (*_RESULT, PRINTED_BYTES, NOT_KEPT, RAN, "batch"), root)
    if pickles is None or not pickles.keys() & {"output", "error"}:
        return None
    failed = "error" in pickles
    try:
        runtime = _load(pickles["runtime"]) if "runtime" in pickles else 0.0
        traceback = _load(pickles["traceback"]) if "traceback" in pickles else ""
        printed = _load(pickles[PRINTED_BYTES]) if PRINTED_BYTES in pickles else 0
        ran, batch = (_load(pickles[RAN]), _load(pickles["batch"])) if RAN in pickles else ("", None)
    except Exception as error:  # a damaged pickle can raise almost anything
        _warn_unreadable(path, error)
        return None
    data = pickles["error" if failed else "output"]
    return Ending(data, failed, runtime, traceback, NOT_KEPT not in pickles, printed, ran, batch)


def _read_or_none(path: str, names: Iterable[str], root: str | None) -> dict[str, bytes] | None:
    try:
        return _read_pickles(path, names, root)
    except ImportError as error:  # h5py is missing; a damaged entry of ours looks like one that needs it
        _warn_unreadable(path, error)
        return None


def remove_input(path: str, root: str | None = None) -> None:
    """Remove the file of an entry that waits or runs; it may be gone already."""
    trust.remove(path, root)


def output_of(path: str) -> str:
    """Name the file that holds an entry's result, given the file of the entry while it waits or runs."""
    return path.removesuffix(INPUT) + OUTPUT


def input_of(path: str) -> str:
    """Name the file of an entry while it waits or runs, given the file that holds its result."""
    return path.removesuffix(OUTPUT) + INPUT


def take_over(path: str, name: str, batch: str | None = None, root: str | None = None) -> None:
    """Free an entry whose job is dead, so that it can be claimed again.

    Several sessions may find it dead at the same time, and the second must not remove what the first has claimed anew.
    So only one of them ever removes the entry of a given job: the first to make the marker.

    Args:
        path: The entry's file.
        name: A name for the dead job that is never used twice.
        batch: The dead job's batch directory, or None if it could not be read. An entry of another batch is left alone.
        root: The cache directory; by default the file's folder.
    """
    marker = _marker(path, name)
    if not trust.make_mark(marker, root) and not trust.is_older(marker, _MARKER_SECONDS):
        return
    # This session may be late, and the entry may belong to another job by now.
    if claimed_for(path, root) in (None, batch):
        remove_input(path, root)


def job_name(path: str, batch: str) -> str:
    """Return the name by which `take_over` knows an entry's job.

    Args:
        path: The entry's file.
        batch: The job's batch directory.
    """
    return f"{os.path.basename(batch)}-{os.path.basename(path)}"


def _marker(path: str, name: str) -> str:
    """Return the path of the file that marks an entry's job as dead."""
    import hashlib  # not needed by jobs

    # A digest, because a key in the name can already be as long as a file name may be.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return os.path.join(os.path.dirname(path), batch_directory.FOLDER, f"dead-{digest}")


def terminate(path: str, batch: str | None, root: str | None = None) -> None:
    """Remove an entry whose job was cancelled, so that sessions that wait for it do not submit it again.

    Args:
        path: The entry's file.
        batch: The job's batch directory, or None if there is none.
        root: The cache directory; by default the file's folder.
    """
    if batch is not None:
        with contextlib.suppress(OSError):
            trust.write(_marker(path, job_name(path, batch)), _TERMINATED, root)
    remove_input(path, root)


def is_terminated(path: str, batch: str, root: str | None = None) -> bool:
    """Return whether `terminate` cancelled an entry's job.

    Args:
        path: The entry's file.
        batch: The job's batch directory.
        root: The cache directory; by default the file's folder.
    """
    try:
        return trust.read(_marker(path, job_name(path, batch)), root) == _TERMINATED
    except OSError:
        return False


def claimed_for(path: str, root: str | None = None) -> str | None:
    """Return the batch directory for which a waiting or running entry is claimed; None if it cannot be read."""
    entry = read_input(path, root)
    return None if entry is None else entry["batch"]


def pack(values: dict[str, Any]) -> memoryview:
    """Return the bytes of an HDF5 file that holds these values."""
    pickles = {name: value if isinstance(value, Snapshot) else dumps_in_band(value) for name, value in values.items()}
    if all(len(pickled) <= hdf5.MOST_BYTES for pickled in pickles.values()):
        return memoryview(hdf5.pack(pickles))
    h5py = _h5py()
    import numpy  # comes with h5py

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, pickled in pickles.items():
            data = numpy.frombuffer(pickled, dtype=numpy.uint8)
            file.create_dataset(
                name,
                data=data,
                chunks=(min(data.size, _CHUNK_BYTES),),
                compression="gzip",
                compression_opts=_GZIP_LEVEL,
            )
    return memoryview(image.getvalue())


def read_output(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Output | None:
    """Read the result of a call that is done.

    Args:
        path: The entry's file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        The result. None if there is no such file, or if it cannot be read, which is logged as a warning; in both
        cases the call has to run.

    Raises:
        ImportError: If the file needs h5py and it is missing.
        UntrustedFile: Anybody could have put the file there.
    """
    return _output(path, read_values(path, (*_RESULT, VERSIONS, NOT_KEPT), root))


def _output(path: str | os.PathLike[str], values: dict[str, Any] | None) -> Output | None:
    if values is None or NOT_KEPT in values:
        return None
    versions = values.get(VERSIONS, {})
    if "error" in values:
        error = values["error"]
        traceback = values.get("traceback", "")
        if isinstance(error, BaseException):
            from executorlib.errors import RemoteTraceback, contained  # takes a third of a job's start-up time

            if traceback:
                error.__cause__ = RemoteTraceback(traceback)
            error = contained(error, f"the call of {path}: the function")
        return Output(None, error, values.get("runtime"), versions)
    if "output" in values:
        return Output(values["output"], None, values.get("runtime"), versions)
    _warn("the cache file %s is ignored: it holds no result", path)
    return None


def read_entry(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> dict[str, Any] | None:
    """Read everything that the file of an entry holds.

    Args:
        path: The entry's file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        The unpickled datasets by name, with `printed` as text, and `traceback` if the call raised. None if there is
        no such file, or if it cannot be read, which is logged as a warning.

    Raises:
        ImportError: If the file needs h5py and it is missing.
        UntrustedFile: Anybody could have put the file there.
    """
    return read_values(path, (*DATASETS, VERSIONS, "traceback", PRINTED), root)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def versions_of(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Read which distributions a call reached and which versions it ran with, unpickling nothing else.

    Args:
        path: The entry's file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        The versions by distribution. Empty if there is no such file, it cannot be read, or it does not say.

    Raises:
        ImportError: If the file needs h5py and it is missing.
        UntrustedFile: Anybody could have put the file there.
    """
    pickles = _read_pickles(path, (VERSIONS,), root) or {}
    try:
        found = _PlainUnpickler(io.BytesIO(pickles[VERSIONS])).load() if VERSIONS in pickles else {}
    except Exception as error:  # a damaged pickle can raise almost anything
        _warn_unreadable(path, error)
        found = {}
    return found if isinstance(found, dict) else {}


def datasets_of(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> set[str]:
    """List the datasets in the file of an entry, without unpickling them.

    Args:
        path: The entry's file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        The names of its datasets; none if there is no such file, or if it is damaged or not trusted.

    Raises:
        ImportError: If the file needs h5py and it is missing.
    """
    try:
        return set(_datasets(trust.read(path, root), None))
    except ImportError:
        raise
    except Exception:  # a damaged file can raise almost anything
        return set()


def read_values(
    path: str | os.PathLike[str], names: Iterable[str], root: str | os.PathLike[str] | None = None
) -> dict[str, Any] | None:
    """Unpickle those of these datasets that an entry has. Return None if its file is missing or damaged.

    Raises:
        ImportError: If the file needs h5py and it is missing.
        UntrustedFile: Anybody could have put the file there.
    """
    pickles = _read_pickles(path, names, root)
    if pickles is None:
        return None
    try:
        return {name: pickle.loads(data) if name in _PLAIN else _load(data) for name, data in pickles.items()}
    except Exception as error:  # a damaged pickle can raise almost anything
        _warn_unreadable(path, error)
        return None


def _name_of(path: str | os.PathLike[str]) -> str:
    return os.path.basename(path).removesuffix(OUTPUT)


def _read_pickles(
    path: str | os.PathLike[str], names: Iterable[str], root: str | os.PathLike[str] | None
) -> dict[str, bytes] | None:
    try:
        pickles = _datasets(trust.read(path, root), {*names, NAME})
        name = pickle.loads(pickles.pop(NAME)) if NAME in pickles else None
        if name not in (None, _name_of(path)):
            raise hdf5.Damaged(f"it is a copy of the entry {name!r}, not a result of this call")
        return pickles
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ImportError, trust.UntrustedFile):
        raise
    except Exception as error:  # a damaged file can raise almost anything
        _warn_unreadable(path, error)
        return None


def _datasets(content: bytes, names: set[str] | None) -> dict[str, bytes]:
    found = hdf5.unpack(content, names)
    if found is not None:
        return found
    # Written by executorlib 1.x, or too large for `hdf5`. Opened from memory, because h5py locks files opened by path.
    h5py = _h5py()
    with h5py.File(io.BytesIO(content), "r") as file:
        return {name: _bytes_of(h5py, file.id, name.encode()) for name in file if names is None or name in names}


def _bytes_of(h5py: ModuleType, file: Any, name: bytes) -> bytes:
    # The low-level interface of h5py takes half the time.
    import numpy

    dataset = h5py.h5d.open(file, name)
    # Older files have no checksums over their metadata, so the size may be nonsense.
    size = dataset.dtype.itemsize * int(numpy.prod(dataset.shape, dtype=object))
    if dataset.dtype.hasobject or size > hdf5.most_inflated(dataset.get_storage_size()):
        raise hdf5.Damaged(f"its dataset {name.decode()} cannot have {size} bytes")
    content = numpy.empty(dataset.shape, dataset.dtype)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, content)
    return content.tobytes()


def _load(data: bytes) -> Any:
    return unpickle.loads(data, _Unpickler)


def _warn(text: str, *values: object) -> None:
    import logging  # not needed by jobs

    logging.getLogger("executorlib").warning(text, *values)


def _warn_unreadable(path: str | os.PathLike[str], error: Exception) -> None:
    _warn("the cache file %s is ignored: %s: %s", path, type(error).__name__, error)


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            'entries of executorlib 1.x, and values of more than 4 GB, need h5py: pip install "executorlib[cache]"'
        ) from error
    module: ModuleType = h5py
    return module
