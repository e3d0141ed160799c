"""Gives users the entries of a cache directory, as a list or as futures.

Reading an entry unpickles it, and unpickling runs whatever the file says, so use only cache directories whose writers
you trust. If everybody may write to the directory, only files of this user and of root are read.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from executorlib.cache import batch_directory, trust
from executorlib.cache.entries import (
    DATASETS,
    INPUT,
    OUTPUT,
    WRITING,
    entry_path,
    input_of,
    output_of,
    read_output,
    read_values,
)
from executorlib.futures.lean import LeanFuture
from executorlib.futures.locks import RLock

logger = logging.getLogger("executorlib")

_POLL_SECONDS = 0.2
# With many entries, looks get rarer so that they take at most this share of a core, but stay within about a second.
_POLL_SHARE = 0.02
_LONGEST_POLL_SECONDS = 1.0
# An entry counts as removed once neither of its files has been seen for this long. Network file systems show a rename
# late: mostly within seconds, but NFS may by default take up to a minute.
_GONE_SECONDS = 10.0
# How often, in seconds, a network file system must look for the result anew instead of answering from its cache.
_ASK_SECONDS = 5.0


def get_cache_data(cache_directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """List all entries of a cache directory, for example to make a `pandas.DataFrame`.

    Reading unpickles the entries, so use only a directory that you trust.

    Args:
        cache_directory: The cache directory. Its sub-folders are searched as well.

    Returns:
        One dictionary per entry, ordered by file. It holds the file's absolute path as ``filename`` and, if the
        entry has them, ``function``, ``input_args``, ``input_kwargs``, ``output`` or ``error``, ``resource_dict``,
        ``runtime`` (seconds), ``queue_id`` and ``error_log_file``. Files that cannot be read are left out, with a
        warning in the log. If the directory does not exist, the list is empty.

    Raises:
        ImportError: If h5py is missing and an entry needs it (it is from executorlib 1.x, or has a value over 4 GB).
        PermissionError: If everybody may write to the directory and a file in it belongs to another user.
    """
    rows = []
    for path in _files(cache_directory, (INPUT, OUTPUT)):
        values = read_values(path, DATASETS, cache_directory)
        if values is None and not os.path.exists(path) and trust.is_there(path):
            values = read_values(path, DATASETS, cache_directory)
        if values is None:
            continue
        if path.endswith(INPUT) and "queue_id" not in values:
            job_id, _, _ = job_of(path, cache_directory)
            if job_id is not None:
                values["queue_id"] = int(job_id) if job_id.isdigit() else job_id
        rows.append({**values, "filename": path})
    return rows


def get_future_from_cache(cache_directory: str | os.PathLike[str], cache_key: str) -> Future[Any]:
    """Return the result of an entry as a future.

    Reading unpickles the entry, so use only a directory that you trust.

    Args:
        cache_directory: The cache directory.
        cache_key: The entry's key: the ``cache_key`` that was given, or the name of its file without ``_o.h5``.

    Returns:
        A future that is done, or, if the call still waits or runs, one that gets done with the call. The latter is
        cancelled if the entry is removed. Cancelling the future does not affect the call.

    Raises:
        Exception: What the function raised.
        FileNotFoundError: If there is no entry with that key.
        ImportError: If h5py is missing and the entry needs it (it is from executorlib 1.x, or has a value over 4 GB).
        PermissionError: If everybody may write to the directory and the file belongs to another user.
        ValueError: If the key leads out of the directory.
    """
    path = os.path.abspath(entry_path(cache_directory, cache_key))
    # The last look is needed because the call may finish between the first two.
    output = read_output(path, cache_directory)
    running = output is None and _is_pending(path)
    if output is None and not running and trust.is_there(path):
        output = read_output(path, cache_directory)
    if output is None and not running and not trust.is_there(input_of(path)):
        raise FileNotFoundError(
            f"the cache directory {os.fspath(cache_directory)} has no entry {cache_key!r}; get_cache_data() lists the "
            "entries it has"
        )
    future: Future[Any] = LeanFuture()
    if output is None:
        _watcher.watch(future, path, os.path.abspath(cache_directory))
    elif output.error is not None:
        raise output.error
    else:
        future.set_result(output.value)
    return future


def pending_entries(directory: str | os.PathLike[str]) -> list[str]:
    """List the files of entries that wait or run, in a cache directory and its sub-folders."""
    return [path for path in _files(directory, (INPUT,)) if not os.path.exists(output_of(path))]


def job_of(path: str, root: str | os.PathLike[str]) -> tuple[str | None, int | None, str | None]:
    """Find the job that runs an entry which waits or runs.

    Args:
        path: The entry's file.
        root: The cache directory.

    Returns:
        The job's id, its index in the job array (None for a plain job), and the name of the queuing system. Each of
        them is None if it is not known.

    Raises:
        PermissionError: Everybody may write to the directory, and a file needed for the answer is another user's.
    """
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # as batches list it
    values = read_values(path, ("batch", "queue_id"), root) or {}
    directory = values.get("batch")
    if directory is None:
        job = values.get("queue_id")
        return None if job is None else str(job), None, None
    try:
        indices = {entry: index for index, entry in batch_directory.entries_of(directory).items()}
        owner = json.loads(batch_directory.read_text(directory, batch_directory.OWNER_FILE) or "{}")
    except trust.UntrustedFile:
        raise
    except (OSError, ValueError):
        return None, None, None
    index = indices.get(path)
    if index is None:
        return None, None, owner.get("system")
    job = batch_directory.JobIds.read(directory, max(indices.values())).of(index)
    return *(job or (None, None)), owner.get("system")


def _files(directory: str | os.PathLike[str], endings: tuple[str, ...]) -> Iterator[str]:
    """Return the files with these endings in a cache directory and its sub-folders, in order."""
    paths = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(os.path.abspath(directory))
        for name in names
        if name.endswith(endings)
    ]
    yield from sorted(paths)


def _is_pending(output_path: str) -> bool:
    stem = output_path.removesuffix(OUTPUT)
    return os.path.exists(stem + INPUT) or os.path.exists(stem + WRITING)


# -- entries that other processes will finish -----------------------------------------------------------------


class _Watcher:
    """Resolves futures of entries that other processes work on, in one thread that ends with the last future."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._new: list[tuple[Future[Any], str, str]] = []
        self._running = False

    def watch(self, future: Future[Any], path: str, root: str) -> None:
        """Resolve a future once its file exists; `root` is the cache directory."""
        with self._lock:
            self._new.append((future, path, root))
            if not self._running:
                self._running = True
                # A daemon, because no result is lost if the interpreter exits before a file appears.
                threading.Thread(target=self._run, name="executorlib-cache", daemon=True).start()

    def _run(self) -> None:
        # For each future: file, root, when it was last seen pending, and when the server was last asked.
        watched: dict[Future[Any], tuple[str, str, float, float]] = {}
        while True:
            with self._lock:
                now = time.monotonic()
                watched.update({future: (path, root, now, now) for future, path, root in self._new})
                self._new.clear()
                if not watched:
                    self._running = False
                    return
            began = time.thread_time()
            for future, (path, root, seen, asked) in list(watched.items()):
                now = time.monotonic()
                if now - asked > _ASK_SECONDS:
                    asked = now
                    trust.is_there(path)
                try:
                    if future.cancelled():
                        future.set_running_or_notify_cancel()  # wakes those who wait for it
                        del watched[future]
                    elif self._look(future, path, root, seen):
                        del watched[future]
                    else:
                        watched[future] = (path, root, now if _is_pending(path) else seen, asked)
                except BaseException:  # raised by a callback; it must not stop the other futures
                    logger.exception("a callback of a future raised")
                    del watched[future]
            del future
            pause = (time.thread_time() - began) / _POLL_SHARE
            time.sleep(max(_POLL_SECONDS, min(pause, _LONGEST_POLL_SECONDS)))

    @staticmethod
    def _look(future: Future[Any], path: str, root: str, seen: float) -> bool:
        """Resolve the future if its entry is done, damaged or removed, and return whether it was resolved."""
        if not os.path.exists(path):
            if time.monotonic() - seen < _GONE_SECONDS or trust.is_there(path):
                return False
            future.cancel()
            future.set_running_or_notify_cancel()
            return True
        try:
            output = read_output(path, root)
            if output is None:
                raise OSError(
                    f"the cache file {path} is damaged, or holds a result that was not kept; run the call again"
                )
            error = output.error
        except Exception as failure:
            output, error = None, failure
        if future.set_running_or_notify_cancel():
            if error is not None:
                future.set_exception(error)
            elif output is not None:
                future.set_result(output.value)
        return True


_watcher = _Watcher()


def _after_fork() -> None:
    # The thread and its futures exist only in the parent, and the lock may have been held at the fork.
    global _watcher
    _watcher = _Watcher()


os.register_at_fork(after_in_child=_after_fork)
