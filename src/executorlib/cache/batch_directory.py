"""Batch directories, where the jobs of queuing systems find what to run.

A batch is a set of calls submitted together as one job array. Its directory, ``.executorlib/<batch>`` in the cache
directory, holds what its jobs print and small text files, each written by one process and read by others.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import re
import stat
import time

from executorlib.cache import trust

# Inside the cache directory.
FOLDER = ".executorlib"
# Inside a batch directory: the entries that its jobs run, the job's id in the queuing system (see `JobIds`), who
# submitted it, and the settings that its jobs apply to match the user's process.
ENTRIES_FILE = "entries"
JOB_ID_FILE = "job_id"
OWNER_FILE = "owner"
SETUP_FILE = "setup"


# The names that `new_name` makes. Nothing else is ever removed.
_NAME = re.compile(r"\d{8}-\d{6}-\d+-(?:workers)?\d+-[0-9a-f]{6}")


_numbers = itertools.count(1)


def new_name(kind: str = "") -> str:
    """Make a batch name that is never used twice.

    Args:
        kind: ``"workers"`` for workers of a block.
    """
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{kind}{next(_numbers)}-{os.urandom(3).hex()}"


def is_name(name: str) -> bool:
    """Return whether `new_name` could have made this name."""
    return _NAME.fullmatch(name) is not None


def make(root: str, name: str) -> str:
    """Make a batch directory that only this user, and those whom the cache directory trusts, can write to.

    Jobs run programs from this directory, so nobody else may be able to replace them.

    Args:
        root: The cache directory. It is made if it is missing.
        name: The batch's name.

    Raises:
        UntrustedFile: Others could replace the directory.
        OSError: The directory cannot be made.
    """
    folder = os.path.join(root, FOLDER)
    directory = os.path.join(folder, name)
    trust.within(folder, root, lambda fd: _make(fd, root, folder, directory))
    return directory


def _make(fd: int, root: str, folder: str, directory: str) -> None:
    status = os.fstat(fd)
    for above, mode, below, owner in (
        (root, os.stat(root).st_mode, folder, status.st_uid),
        (folder, status.st_mode, directory, os.geteuid()),
    ):
        if mode & stat.S_IWOTH and not (mode & stat.S_ISVTX and trust.is_trusted(owner)):
            raise trust.UntrustedFile(
                f"jobs are not run from {below}, which belongs to {trust.name_of(owner)}: everybody may write to "
                f"{above}, so anybody could replace the programs that jobs run. {trust.advice_for(above)}"
            )
    os.mkdir(os.path.basename(directory), trust.FOLDER_MODE, dir_fd=fd)


def remove(directory: str, but_output: bool = False) -> bool:
    """Remove a batch directory of this user and the files in it, and return whether it was removed.

    Links are not followed: a link, or anything else that has replaced the folder, is left alone.

    Args:
        directory: The batch directory.
        but_output: Keep what jobs printed, and the directory if there is any of it.
    """
    above, name = os.path.split(directory)
    if not is_name(name):
        return False
    try:
        with trust.opened(above, root_of(directory)) as folder:
            fd = os.open(name, trust.LIST, dir_fd=folder)
            try:
                if not trust.is_own(os.fstat(fd)):
                    return False
                # A batch has no sub-folders, so this is not one.
                found = {each: os.stat(each, dir_fd=fd, follow_symlinks=False) for each in os.listdir(fd)}
                if any(stat.S_ISDIR(status.st_mode) for status in found.values()):
                    return False
                for each, status in found.items():
                    if but_output and each.startswith("output.") and status.st_size:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(each, dir_fd=fd)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=folder)
    except OSError:
        return False  # it is gone, a job still writes to it, or output is kept
    return True


def remove_folder(root: str) -> None:
    """Remove the folder that holds a cache directory's batches, if it is empty."""
    with contextlib.suppress(OSError), trust.opened(root) as folder:
        os.rmdir(FOLDER, dir_fd=folder)


def root_of(directory: str) -> str:
    """Return the cache directory that a batch directory is in."""
    return os.path.dirname(os.path.dirname(directory))


def read_text(directory: str, name: str) -> str | None:
    """Read a small text file of a batch directory. Return None if it is missing or empty.

    Raises:
        UntrustedFile: Anybody could have put the file there.
    """
    try:
        return trust.read(os.path.join(directory, name), root_of(directory)).decode() or None
    except trust.UntrustedFile:
        raise
    except (OSError, UnicodeDecodeError):
        return None


def entries_of(directory: str) -> dict[int, str]:
    """Read which entries the jobs of a batch run, as a mapping from index in the job array to file.

    Raises:
        UntrustedFile: Anybody could have put the list there.
        OSError: The list cannot be read.
        ValueError: The list is damaged.
    """
    found = {}
    lines = trust.read(os.path.join(directory, ENTRIES_FILE), root_of(directory)).decode().split("\n")
    for line in filter(None, lines):
        index, _, path = line.partition(" ")
        found[int(index)] = path.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")
    return found


def write_entries(directory: str, paths: dict[int, str]) -> None:
    """Write the list that `entries_of` reads. Each entry is one line, so line feeds in names are escaped."""
    lines = (f"{index} " + path.replace("\\", "\\\\").replace("\n", "\\n") for index, path in paths.items())
    write_text(directory, ENTRIES_FILE, "".join(f"{line}\n" for line in lines))


def write_text(directory: str, name: str, text: str) -> None:
    """Write a small text file of a batch directory, whole or not at all."""
    trust.write(os.path.join(directory, name), text.encode(), root_of(directory))


class JobIds:
    """The jobs that run the calls of a batch.

    Usually this is one job array, and its id is in the file ``job_id``. If a limit of the queuing system admits only
    some of the calls at a time, there are several, and ``job_id.5-9`` holds the id of the job for calls 5 to 9.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, int, str]] = []  # first call, last call and id, in order

    @staticmethod
    def file(part: str) -> str:
        """Name the file with the id of the job that runs a part such as ``5-9``; empty means the whole batch."""
        return f"{JOB_ID_FILE}.{part}" if part else JOB_ID_FILE

    @classmethod
    def read(cls, directory: str, last: int) -> JobIds:
        """Read the ids of the jobs submitted so far.

        Args:
            directory: The batch directory.
            last: The index of the batch's last call.

        Raises:
            UntrustedFile: Anybody could have put one of the files there.
        """
        found = cls()
        whole = read_text(directory, JOB_ID_FILE)
        if whole is not None:
            found.add(0, last, whole.strip())
            return found
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(directory)
        for name in names:
            start, _, part = name.rpartition(".")
            first, _, end = part.partition("-")
            is_part = start == JOB_ID_FILE and first.isdecimal() and end.isdecimal()
            job_id = read_text(directory, name) if is_part else None
            if job_id is not None:
                found.add(int(first), int(end), job_id.strip())
        return found

    def add(self, first: int, last: int, job_id: str) -> None:
        """Record that a job was submitted for these calls."""
        bisect.insort(self._parts, (first, last, job_id))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def part(self, index: int) -> tuple[int, int, str] | None:
        """Return the first call, the last call and the id of the job that runs a call; None if it is not submitted."""
        at = bisect.bisect(self._parts, (index + 1,)) - 1
        return self._parts[at] if at >= 0 and self._parts[at][1] >= index else None

    def of(self, index: int) -> tuple[str, int | None] | None:
        """Return the id of the job that runs a call, and the call's index in the array (None for a plain job)."""
        part = self.part(index)
        # A batch of one call, at index 0, is a plain job.
        return None if part is None else (part[2], index if part[1] else None)
