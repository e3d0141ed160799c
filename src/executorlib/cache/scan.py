"""Lists the contents of a cache directory, and finds the files that no call needs any longer."""

from __future__ import annotations

import functools
import itertools
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from executorlib.cache import batch_directory, entries, trust

State = Literal["waiting", "running", "done", "failed"]

_INPUT, _WRITING, _OUTPUT = "_i.h5", "_r.h5", "_o.h5"
_ENDING_BYTES = len(_OUTPUT)
# The names that `cache.trust` gives files which are not in place yet.
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{16}\.tmp")
# A file that is being written changes all the time, so one left alone for this long is abandoned. Batch directories may
# be removed after a minute: until then, their session may not have read yet what a job printed.
_ABANDONED_SECONDS = 3600.0


class ListedEntry(NamedTuple):
    """One call of a cache directory.

    Attributes:
        key: The entry's key.
        state: ``"done"`` if its result file is there, whether the call returned or raised; ``"running"`` if its job
            has started; ``"failed"`` if its job has started and neither its inputs nor a result are left; otherwise
            ``"waiting"``.
        size: Bytes of its file.
        modified: When that file was written, in seconds since 1970.
        path: That file. For a failed call, the file with what its job printed.
    """

    key: str
    state: State
    size: int
    modified: float
    path: str


class ListedJob(NamedTuple):
    """The job of one call, as listed in a batch directory.

    Attributes:
        stem: Path of the call's entry without its ending, with symbolic links resolved.
        name: The job's name in the queuing system, or None before it is submitted.
        output: The file with what it printed, or None before it starts.
    """

    stem: str
    name: str | None
    output: str | None


def scan(directory: str) -> Iterator[ListedEntry]:
    """Find all entries of a cache directory and its sub-folders, in no order.

    This takes one `stat` per entry, and keeps in memory only the entries that are not done.

    Args:
        directory: The cache directory.

    Raises:
        OSError: If the directory cannot be listed.
    """
    root = os.path.realpath(directory)
    pending: dict[str, ListedEntry] = {}
    for item in _files(root):
        if item.name.endswith(_OUTPUT):
            entry = _entry(root, item.path, "done")
            if entry:
                yield entry
        elif item.name.endswith((_INPUT, _WRITING)):
            entry = _entry(root, item.path, "running" if item.name.endswith(_WRITING) else "waiting")
            if entry:
                pending[_stem(item.path)] = entry
    # If a job has just finished, its inputs may still lie beside the result.
    pending = {stem: entry for stem, entry in pending.items() if not os.path.exists(stem + _OUTPUT)}
    failed: set[str] = set()
    for job in _jobs(root):
        entry = pending.pop(job.stem, None)
        if entry:
            yield _not_done(entry, job)
        elif job.output and job.stem not in failed and job.stem.startswith(root + os.sep) and _is_gone(job.stem):
            failed.add(job.stem)
            entry = _failed(root, job)
            if entry:
                yield entry
    yield from pending.values()


def find(directory: str, key: str) -> tuple[ListedEntry, ListedJob | None] | None:
    """Find one entry without listing the cache directory.

    Args:
        directory: The cache directory.
        key: The entry's key.

    Returns:
        The entry, and its job if a batch directory lists one. None if there is no such entry.

    Raises:
        ValueError: If the key leads out of the directory.
    """
    root = os.path.realpath(directory)
    stem = _stem(str(entries.entry_path(root, key)))
    job = next((job for job in _jobs(root) if job.stem == os.path.realpath(stem)), None)
    # Looks follow the order of a call's life, so an entry that moves on meanwhile is seen in one of its states.
    endings: dict[str, State] = {_INPUT: "waiting", _WRITING: "running", _OUTPUT: "done"}
    found = {state: _entry(root, stem + ending, state) for ending, state in endings.items()}
    entry = found["done"] or found["running"] or found["waiting"]
    if entry is None:
        entry = _failed(root, job) if job and job.output else None
    elif entry.state == "waiting" and job:
        entry = _not_done(entry, job)
    return (entry, job) if entry else None


def _files(root: str) -> Iterator[os.DirEntry[str]]:
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            items = os.scandir(folder)
        except FileNotFoundError:
            if folder == root:
                raise
            continue  # removed meanwhile
        with items:
            for item in items:
                if not item.is_dir(follow_symlinks=False):
                    yield item
                elif item.path != os.path.join(root, batch_directory.FOLDER):
                    folders.append(item.path)


def _stem(path: str) -> str:
    return path[:-_ENDING_BYTES]


def _entry(root: str, path: str, state: State) -> ListedEntry | None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except NotADirectoryError:
        return None
    except FileNotFoundError:
        if not trust.is_there(path):
            return None
        status = os.stat(path, follow_symlinks=False)
    return ListedEntry(_stem(path)[len(root) + 1 :], state, status.st_size, status.st_mtime, path)


def _not_done(entry: ListedEntry, job: ListedJob) -> ListedEntry:
    return entry._replace(state="running") if job.output else entry


def _failed(root: str, job: ListedJob) -> ListedEntry | None:
    entry = _entry(root, job.output or "", "failed")
    return entry and entry._replace(key=job.stem[len(root) + 1 :])


def _is_gone(stem: str) -> bool:
    return not any(os.path.exists(stem + ending) for ending in (_INPUT, _WRITING, _OUTPUT))


def _batches(root: str) -> list[str]:
    """List the batch directories, latest first, because the latest counts if two of them list the same entry."""
    folder = os.path.join(root, batch_directory.FOLDER)
    try:
        found = list(trust.listed(folder, root))
    except FileNotFoundError:
        return []
    folders = [os.path.join(folder, name) for name, status in found if stat.S_ISDIR(status.st_mode)]
    return sorted(
        folders,
        key=lambda folder: (_modified(os.path.join(folder, batch_directory.ENTRIES_FILE)), folder),
        reverse=True,
    )


def _jobs(root: str) -> Iterator[ListedJob]:
    for batch in _batches(root):
        yield from _jobs_of(batch)


def _jobs_of(batch: str) -> Iterator[ListedJob]:
    try:
        calls = batch_directory.entries_of(batch)
        printed = {
            name for name, _ in trust.listed(batch, batch_directory.root_of(batch)) if name.startswith("output.")
        }
        ids = batch_directory.JobIds.read(batch, max(calls, default=0))
    except (OSError, ValueError):
        return  # removed meanwhile, incomplete, or a stranger's and therefore ignored
    for index, path in calls.items():
        output = f"output.{index}"
        job_id, element = ids.of(index) or (None, None)
        yield ListedJob(
            os.path.join(_realpath(os.path.dirname(path)), _stem(os.path.basename(path))),
            job_id if element is None else f"{job_id}_{element}",
            os.path.join(batch, output) if output in printed else None,
        )


@functools.lru_cache(maxsize=64)
def _realpath(folder: str) -> str:
    return os.path.realpath(folder)


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


# -- removing -----------------------------------------------------------------------------------------------------


class Leftover(NamedTuple):
    """Something that no call needs any more.

    Attributes:
        kind: ``"temporary file"``, ``"inputs"`` of a call that is done, ``"mark of a dead job"`` or
            ``"batch directory"``.
        size: Its bytes.
        path: The file or folder.
    """

    kind: str
    size: int
    path: str


def remove(directory: str, entries: Iterable[ListedEntry]) -> None:
    """Remove entries and what their jobs printed. Jobs that wait or run are not cancelled.

    Args:
        directory: The cache directory.
        entries: Entries that `scan` or `find` found there.

    Raises:
        OSError: If a file cannot be removed.
    """
    root = os.path.realpath(directory)
    stems = set()
    for entry in entries:
        trust.remove(entry.path, root)
        stem = os.path.join(root, entry.key)
        if entry.state == "done":
            trust.remove(stem + _INPUT, root)
        stems.add(os.path.join(_realpath(os.path.dirname(stem)), os.path.basename(stem)))
    # With the output left, the job would count as failed: started, and nothing left of it.
    for job in _jobs(root) if stems else ():
        if job.output and job.stem in stems:
            trust.remove(job.output, root)


def leftovers(directory: str, older_than: float) -> Iterator[Leftover]:
    """Find what crashed processes and finished calls left behind.

    Args:
        directory: The cache directory.
        older_than: Only batch directories untouched for this many seconds count. For files it is at least an hour.

    Raises:
        OSError: If the directory cannot be listed.
    """
    root = os.path.realpath(directory)
    now = time.time()
    directories = _batches(root)
    for item in itertools.chain(_files(root), _plain_files(os.path.join(root, batch_directory.FOLDER))):
        kind = _leftover_kind(item)
        if kind:
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if now - status.st_mtime > max(_ABANDONED_SECONDS, older_than):
                yield Leftover(kind, status.st_size, item.path)
    for batch in directories:
        try:
            own = batch_directory.is_name(os.path.basename(batch)) and trust.is_own(os.lstat(batch))
            sizes = dict(trust.listed(batch, root))
        except OSError:
            continue  # removed meanwhile
        # The folder's own time would change whenever an entry or the output of its job is removed.
        modified = max((status.st_mtime for status in sizes.values()), default=_modified(batch))
        # Without this file the batch is still being made, or its session died while making it.
        complete = batch_directory.ENTRIES_FILE in sizes
        settled = now - modified > (older_than if complete else max(_ABANDONED_SECONDS, older_than))
        if own and settled and not any(_is_pending(job.stem) for job in _jobs_of(batch)):
            yield Leftover("batch directory", sum(status.st_size for status in sizes.values()), batch)


def _leftover_kind(item: os.DirEntry[str]) -> str | None:
    if _TEMPORARY.fullmatch(item.name):
        return "temporary file"
    if item.name.startswith("dead-") and os.path.basename(os.path.dirname(item.path)) == batch_directory.FOLDER:
        return "mark of a dead job"
    if item.name.endswith(_INPUT) and os.path.exists(_stem(item.path) + _OUTPUT):
        return "inputs"
    return None


def _plain_files(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            yield from (item for item in items if not item.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return


def _is_pending(stem: str) -> bool:
    waits = os.path.exists(stem + _INPUT) or os.path.exists(stem + _WRITING)
    return waits and not os.path.exists(stem + _OUTPUT)
