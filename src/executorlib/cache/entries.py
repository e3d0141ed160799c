"""Files of calls: one HDF5 file for each call of a cache directory.

An entry is the file ``<key>_i.h5`` while its call waits or runs and ``<key>_o.h5`` once it is done. Its
datasets, each the pickle of one value as a row of bytes, are `function`, `input_args`, `input_kwargs`,
`resource_dict`, `output` or `error`, `runtime`, `queue_id` and `error_log_file`, as far as they are known.

Reading an entry unpickles it, and unpickling runs whatever the file says; see `trust` for whose files are read. What
reads one takes the cache directory as `root` for this.

Several processes may use one directory at once. A file is put in place whole, so a reader sees a whole entry or
none: results by a rename, so that of two the last one stays, and claims by a hard link, so that it is the first one
(`write_input`). No lock is taken, because network file systems often have none: HDF5 only ever works on memory and on
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

# Nothing is loaded here that jobs do without: what a job loads, it pays for at every start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import ModuleType
    from typing import Any, Literal

INPUT, OUTPUT = "_i.h5", "_o.h5"
WRITING = "_r.h5"  # executorlib 1.x calls an entry so while it adds the result to it

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

# The distributions that a call reached, and the version of each that it ran with.
VERSIONS = "versions"
# A dataset that says: this result is for those who wait for this job, and not to be kept.
NOT_KEPT = "not_kept"
# What a job printed, as text, and how many bytes that was, with what was cut.
PRINTED, PRINTED_BYTES = "printed", "printed_bytes"
# A dataset that says, together with it: what ran is not what the entry is named by, but what this names. Then `batch`
# is the batch directory of the job.
RAN = "ran"
# The key that names the entry, where it was derived from the call: a file that was copied or linked to the name of
# another call is no result of that.
NAME = "name"
_CALL = ("function", "input_args", "input_kwargs", "resource_dict")
_RESULT = ("output", "error", "runtime", "traceback")
# Of these, and of what else a look-up reads, what is ours: nothing in it has to be rebuilt by `foreign`.
_PLAIN = frozenset({"runtime", "traceback", VERSIONS, NAME, NOT_KEPT, RAN})

# Large arrays of floats hardly shrink at any level, so the fastest.
_GZIP_LEVEL = 1
_CHUNK_BYTES = 1 << 20

_NAME_BYTES = 255  # of one file name, on all common file systems

# How long the result of an input may take to show on another node's file system, in seconds.
_SHOW_SECONDS = 30.0
# In the mark of one that was cancelled for all who wait for it.
_TERMINATED = b"terminated"
# Who has marked an entry as dead removes it at once; after so long, whoever it was is dead as well.
_MARKER_SECONDS = 60.0


class Output(NamedTuple):
    """What a call that is done left behind.

    Attributes:
        value: What the function returned; None where it raised.
        error: What the function raised, or None.
        runtime: Seconds that the function took, or None where the entry does not tell.
        versions: The distributions that the call reached, and the version of each that it ran with.
    """

    value: Any
    error: BaseException | None
    runtime: float | None
    versions: dict[str, str] = {}  # noqa: RUF012  # never changed


class StoredResult:
    """The result of another entry, as executorlib 1.x writes it among the inputs of a call that waits for it."""

    _file_name: str
    _selector: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._file_name!r})"

    def done(self) -> bool:
        """Say whether the other call is done."""
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
    """Stands among a call's inputs for the result of another entry, and is unpickled to that result.

    Args:
        path: The other entry's output file, absolute.
        keys: What to take of the result: ``result[keys[0]][keys[1]]...``.
        root: The other entry's cache directory; by default the file's folder.
        batch: The batch directory of the other entry's job, where the session that refers to it has submitted that: its
            result is taken also where the job ran something else than what the entry is named by, see `name_of_result`.
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


# Of the results that were loaded as inputs: files of those that are not what their entry is named by, and of what.
_others: dict[str, str] = {}


# Where pickles say that the next one is: this module, and what it was called before the modules were put into folders.
# Entries of that time stay, and jobs that wait since then unpickle their inputs by themselves.
_HOMES = (__name__, "executorlib.entries")
sys.modules[_HOMES[1]] = sys.modules[__name__]


def _load_result(path: str, keys: tuple[Any, ...], root: str | None = None, batch: str | None = None) -> Any:
    give_up = time.monotonic() + _SHOW_SECONDS
    while (output := _read_input_result(path, root, batch)) is None:
        there = trust.is_there(path)
        # Which may be the first to see it: what was read before came from a network file system's memory.
        if there and (output := _read_input_result(path, root, batch)) is not None:
            break
        if there or time.monotonic() > give_up:
            what = "is damaged, or was not to be kept" if there else "is not there (any more)"
            raise FileNotFoundError(
                f"an input of this call is the result of {path}, which {what}. Submit that call again, and this one."
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
                f"an input of this call is the result of {path}, which holds the result of other code or inputs than "
                "its key says: another session's job left it there, whose function, inputs or modules were changed "
                "between submit and run. Submit that call again, and this one."
            )
        _others[path] = values[RAN]
        del values[NOT_KEPT]
    return _output(path, values)


def name_of_result(key: str, keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """What stands in the key of a call for an input that is the result of another one, or an item of it.

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
    """Whether a pickle may refer to results of other entries."""
    return b"_load_result" in data


def load_with_names(data: bytes) -> Any:
    """Unpickle inputs, with results of other entries by name, as in keys.

    After these were loaded, in this process: where one is that of something else than what its entry is named by, it
    has the name of what it is.
    """
    return _NamingUnpickler(io.BytesIO(data)).load()


class _Unpickler(unpickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "FutureItem" and module.startswith("executorlib."):
            return StoredResult
        if name == "_load_result" and module in _HOMES:
            return ResultOf  # who looks at a call's inputs need not load them all
        return super().find_class(module, name)


def entry_path(directory: str | os.PathLike[str], key: str, suffix: Literal["i", "o"] = "o") -> Path:
    """Name the file of an entry.

    Args:
        directory: The cache directory.
        key: Key of the entry; slashes make sub-folders.
        suffix: ``"i"`` for a call that waits or runs, ``"o"`` for one that is done.

    Raises:
        ValueError: If the key is empty, leads out of the directory, or cannot be a file name.
    """
    from pathlib import Path  # jobs do without

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
    """The cache directory of the output file that `entry_path` named for a key."""
    return path.removesuffix(key + OUTPUT).rstrip(os.sep) or os.sep


class Snapshot(bytes):
    """The pickle of a value as it was at some time."""

    @classmethod
    def of(cls, value: Any) -> Snapshot:
        """Pickle a value now.

        Raises:
            Exception: Whatever pickling it raises.
        """
        return cls(dumps_in_band(value))


def beside(path: str, key: str, other: str) -> str:
    """Name the output file of another derived key, in the cache directory of the output file of this one."""
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
    """Put the entry of a call that is done in place, whole or not at all.

    Args:
        path: Its file, from `entry_path`; the folder is made where missing.
        function: The function that was called, or a `Snapshot` of it.
        args: Its positional arguments, or a `Snapshot` of their list from before the function ran, which
            may have changed them.
        kwargs: Its keyword arguments, or a `Snapshot` of them.
        resource_dict: The resources it ran with.
        runtime: Seconds it took.
        output: What it returned, or a `Snapshot` of that; not kept where it raised.
        error: What it raised, or None.
        root: The cache directory; by default the file's folder.
        versions: The distributions that the call reaches, with their versions, where they are known.

    Raises:
        ImportError: If h5py is missing.
        OSError: If the file cannot be written, for example on a full disk; nothing is left behind.
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
    """Put the entry of a call that is done in place, whose values are pickled already.

    Args:
        path: Its file.
        pickles: Datasets and what they hold.
        root: The cache directory; by default the file's folder.

    Raises:
        ImportError: If h5py is missing.
        OSError: If the file cannot be written; nothing is left behind.
    """
    if VERSIONS in pickles:  # of a derived key
        pickles = {**pickles, NAME: dumps_in_band(_name_of(path))}
    trust.write(path, pack({name: Snapshot(data) for name, data in pickles.items()}), root, durable=True)


def write_input(path: str, values: dict[str, Any], root: str | None = None) -> bool:
    """Claim an entry: of all who try at the same time, one puts its file in place and has the call run.

    Args:
        path: The file, from `entry_path` with ``"i"``; its folder is made where missing.
        values: Datasets and their values; a `Snapshot` is stored as it is.
        root: The cache directory; by default the file's folder.

    Returns:
        Whether it was put in place; False where there is one already.

    Raises:
        ImportError: If h5py is missing.
        OSError: If the file cannot be written; nothing is left behind.
        Exception: Whatever pickling one of the values raises.
    """
    return trust.write_first(path, pack(values), root)


def read_input(path: str, root: str | None = None) -> dict[str, Any] | None:
    """Read what is to be run.

    Args:
        path: The file, as `write_input` made it.
        root: The cache directory; by default the file's folder.

    Returns:
        The pickles ``function``, ``input_args``, ``input_kwargs`` and ``resource_dict``; ``batch``, the batch directory
        (None in files of executorlib 1.x), ``key``, a `fingerprint.Key` as a list (None where the user has named the
        entry), and ``run_time_max`` and ``error_log_file`` as values. None where there is no such file or it cannot be
        read.

    Raises:
        UntrustedFile: Anybody could have put it there.
    """
    pickles = _read_or_none(path, (*_CALL, "batch", "key"), root)
    if pickles is None or not pickles.keys() >= set(_CALL):
        return None
    try:
        resources = _load(pickles["resource_dict"])
        plain = {name: _load(pickles.pop(name)) if name in pickles else None for name in ("batch", "key")}
    except Exception as error:  # damaged pickles raise nearly everything
        _warn_unreadable(path, error)
        return None
    return {
        **pickles,
        **plain,
        "run_time_max": resources.get("run_time_max"),
        "error_log_file": resources.get("error_log_file"),
    }


class Ending(NamedTuple):
    """How a call ended, before anything of the user's is unpickled.

    Attributes:
        data: Pickle of what the function returned, or of what it raised.
        failed: Whether it raised.
        runtime: Seconds that it took.
        traceback: Where it raised, as text.
        kept: Whether later sessions are to find it, too.
        printed: How many bytes its job had printed, of which the entry has the end.
        ran: What ran, where that is something else than what the entry is named by.
        batch: Likewise, the batch directory of the job.
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
        path: Its output file.
        root: The cache directory; by default the file's folder.

    Returns:
        How; None where the file is not there, not whole, or holds no result.

    Raises:
        UntrustedFile: Anybody could have put it there.
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
    except Exception as error:  # damaged pickles raise nearly everything
        _warn_unreadable(path, error)
        return None
    data = pickles["error" if failed else "output"]
    return Ending(data, failed, runtime, traceback, NOT_KEPT not in pickles, printed, ran, batch)


def _read_or_none(path: str, names: Iterable[str], root: str | None) -> dict[str, bytes] | None:
    try:
        return _read_pickles(path, names, root)
    except ImportError as error:  # of h5py; an entry of ours that is damaged looks like one of others
        _warn_unreadable(path, error)
        return None


def remove_input(path: str, root: str | None = None) -> None:
    """Remove the file of an entry that waits or runs; it may be gone already."""
    trust.remove(path, root)


def output_of(path: str) -> str:
    """Name the file that holds an entry's result, given that of the entry that waits or runs."""
    return path.removesuffix(INPUT) + OUTPUT


def input_of(path: str) -> str:
    """The reverse of `output_of`."""
    return path.removesuffix(OUTPUT) + INPUT


def take_over(path: str, name: str, batch: str | None = None, root: str | None = None) -> None:
    """Free an entry whose job is dead, so that it can be claimed again.

    Several may find it dead at the same time, and the second must not remove what the first has claimed anew. So only
    one ever removes the entry of one job, the one that makes the marker first.

    Args:
        path: The entry's file.
        name: Names the job that is dead, unique for all times.
        batch: The dead job's batch directory; an entry of another one stays. None for one that cannot be read.
        root: The cache directory; by default the file's folder.
    """
    marker = _marker(path, name)
    if not trust.make_mark(marker, root) and not trust.is_older(marker, _MARKER_SECONDS):
        return
    # Who found it dead may be late: by now it may be another one's.
    if claimed_for(path, root) in (None, batch):
        remove_input(path, root)


def job_name(path: str, batch: str) -> str:
    """What `take_over` is to be told of the job of an entry.

    Args:
        path: The entry's file.
        batch: The job's batch directory.
    """
    return f"{os.path.basename(batch)}-{os.path.basename(path)}"


def _marker(path: str, name: str) -> str:
    """The file that marks the job of an entry as dead."""
    import hashlib  # jobs do without

    # A digest: names have batches and keys in them, which may be as long as file names can be.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return os.path.join(os.path.dirname(path), batch_directory.FOLDER, f"dead-{digest}")


def terminate(path: str, batch: str | None, root: str | None = None) -> None:
    """Remove an entry whose job was cancelled, so that sessions which wait for it do not submit it anew.

    Args:
        path: The entry's file.
        batch: The job's batch directory; None where there is none.
        root: The cache directory; by default the file's folder.
    """
    if batch is not None:
        with contextlib.suppress(OSError):
            trust.write(_marker(path, job_name(path, batch)), _TERMINATED, root)
    remove_input(path, root)


def is_terminated(path: str, batch: str, root: str | None = None) -> bool:
    """Whether the job of an entry was cancelled by `terminate`.

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
    """The batch directory that an entry which waits or runs is claimed for; None where that cannot be read."""
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
    return image.getbuffer()


def read_output(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Output | None:
    """Read the result of a call that is done.

    Args:
        path: Its file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        The result; None where there is no such file or it cannot be read, of which the latter is logged
        as a warning. Either way the call has to run.

    Raises:
        ImportError: If h5py is missing.
        UntrustedFile: Anybody could have put it there.
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
            from executorlib.errors import RemoteTraceback, contained  # takes a third of a job's start

            if traceback:
                error.__cause__ = RemoteTraceback(traceback)
            error = contained(error, f"the call of {path}: the function")
        return Output(None, error, values.get("runtime"), versions)
    if "output" in values:
        return Output(values["output"], None, values.get("runtime"), versions)
    _warn("the cache file %s is ignored: it holds no result", path)
    return None


def read_entry(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> dict[str, Any] | None:
    """Read all that the file of an entry holds.

    Args:
        path: Its file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        Its datasets, unpickled, by name, with `traceback`, where it raised, and `printed` as text; None where there is
        no such file or it cannot be read, of which the latter is logged as a warning.

    Raises:
        ImportError: If h5py is missing.
        UntrustedFile: Anybody could have put it there.
    """
    return read_values(path, (*DATASETS, VERSIONS, "traceback", PRINTED), root)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def versions_of(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Read which distributions a call reached, and which versions it ran with, without unpickling anything else.

    Args:
        path: Its file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        The version by distribution; empty where there is no such file, it cannot be read or does not tell.

    Raises:
        ImportError: If h5py is missing.
        UntrustedFile: Anybody could have put it there.
    """
    pickles = _read_pickles(path, (VERSIONS,), root) or {}
    try:
        found = _PlainUnpickler(io.BytesIO(pickles[VERSIONS])).load() if VERSIONS in pickles else {}
    except Exception as error:  # damaged pickles raise nearly everything
        _warn_unreadable(path, error)
        found = {}
    return found if isinstance(found, dict) else {}


def datasets_of(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> set[str]:
    """Name what the file of an entry holds, without unpickling it.

    Args:
        path: Its file, from `entry_path`.
        root: The cache directory; by default the file's folder.

    Returns:
        Names of its datasets; none where there is no such file, or it is damaged or not to be trusted.

    Raises:
        ImportError: If h5py is missing.
    """
    try:
        return set(_datasets(trust.read(path, root), None))
    except ImportError:
        raise
    except Exception:  # damaged files raise nearly everything
        return set()


def read_values(
    path: str | os.PathLike[str], names: Iterable[str], root: str | os.PathLike[str] | None = None
) -> dict[str, Any] | None:
    """Unpickle these datasets of an entry, as far as it has them; None where there is no file, or a damaged one.

    Raises:
        ImportError: If h5py is missing.
        UntrustedFile: Anybody could have put it there.
    """
    pickles = _read_pickles(path, names, root)
    if pickles is None:
        return None
    try:
        return {name: pickle.loads(data) if name in _PLAIN else _load(data) for name, data in pickles.items()}
    except Exception as error:  # damaged pickles raise nearly everything
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
            raise hdf5.Damaged(f"it is a copy of the entry {name!r}, and no result of this call")
        return pickles
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ImportError, trust.UntrustedFile):
        raise
    except Exception as error:  # damaged files raise nearly everything
        _warn_unreadable(path, error)
        return None


def _datasets(content: bytes, names: set[str] | None) -> dict[str, bytes]:
    found = hdf5.unpack(content, names)
    if found is not None:
        return found
    # Written by executorlib 1.x, or too large for us. By its path h5py would lock it.
    h5py = _h5py()
    with h5py.File(io.BytesIO(content), "r") as file:
        return {name: _bytes_of(h5py, file.id, name.encode()) for name in file if names is None or name in names}


def _bytes_of(h5py: ModuleType, file: Any, name: bytes) -> bytes:
    # By h5py's lower layer, which takes half the time.
    import numpy

    dataset = h5py.h5d.open(file, name)
    # Older files have no checksums over what they say of themselves.
    size = dataset.dtype.itemsize * int(numpy.prod(dataset.shape, dtype=object))
    if dataset.dtype.hasobject or size > hdf5.most_inflated(dataset.get_storage_size()):
        raise hdf5.Damaged(f"its dataset {name.decode()} cannot have {size} bytes")
    content = numpy.empty(dataset.shape, dataset.dtype)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, content)
    return content.tobytes()


def _load(data: bytes) -> Any:
    return unpickle.loads(data, _Unpickler)


def _warn(text: str, *values: object) -> None:
    import logging  # what jobs do without

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
