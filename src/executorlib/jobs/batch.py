"""The record of a batch: the calls that are submitted together, and the jobs that they became."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import TYPE_CHECKING, Any

from executorlib import machine
from executorlib.cache import batch_directory, trust

if TYPE_CHECKING:
    from executorlib.jobs.job import Job

# Seconds that an entry of another machine's session may lack a job id before that session counts as dead.
SUBMIT_SECONDS = 600.0


class Batch:
    """Calls that are submitted together, by this session or another, or in parts if a limit does not admit all.

    Attributes:
        directory: The directory of its files.
        ours: Whether this session submits it.
        key: The values that all its calls share.
        name: The function of its first call.
        jobs: Its calls by index, as long as they are not over.
        first: The index of the first call.
        size: The number of calls that it has had.
        ids: The ids of the jobs that were submitted.
        after: The jobs that have to succeed first.
        corresponds: Another batch. Each of its jobs has to succeed before the job of the same index here.
        cancelled: The indices of calls that were cancelled before the job's id was known.
        kept: By index, how many bytes of a job's output are in its entry.
        made: The time when it was begun.
        touched: The time when the last call was added.
    """

    def __init__(self, directory: str, ours: bool, key: Any = None, first: int = 0) -> None:
        self.directory = directory
        self.ours = ours
        self.key = key
        self.name = ""
        self.jobs: dict[int, Job] = {}
        self.first = first
        self.size = 0
        self.ids = batch_directory.JobIds()
        self.after: list[Job] = []
        self.corresponds: Batch | None = None
        self.cancelled: set[int] = set()
        self.kept: dict[int, int] = {}
        self.made = self.touched = time.monotonic()
        self._indices: dict[str, int] | None = None

    def read_entries(self) -> bool:
        """Read which entries a batch of another session has; False if the file is missing (so far) or damaged.

        Raises:
            OSError: The file cannot be read.
        """
        if self._indices is None:
            try:
                self._indices = {entry: index for index, entry in batch_directory.entries_of(self.directory).items()}
            except (FileNotFoundError, ValueError):
                return False
        return True

    def read_ids(self) -> bool:
        """Read which jobs a batch of another session became; returns whether there are any (yet).

        Raises:
            UntrustedFile: Anybody could have written the file.
            OSError: The list of its entries cannot be read.
        """
        # The order matters: once there is a job, the list is complete.
        is_submitted = bool(batch_directory.JobIds.read(self.directory, 0))
        if is_submitted and self.read_entries():
            self.ids = batch_directory.JobIds.read(self.directory, max((self._indices or {}).values(), default=0))
        return is_submitted

    @property
    def last(self) -> int:
        """The index of the last call."""
        return self.first + self.size - 1

    @property
    def has_entries(self) -> bool:
        """True if the entries of a batch of another session are known."""
        return self._indices is not None

    def index_of(self, path: str) -> int | None:
        """The place of an entry in a batch of another session; None if that is not known."""
        return (self._indices or {}).get(path)

    def remove_files(self) -> None:
        """Remove its directory, unless that has the only copy of something that its jobs have printed."""
        if not self.ours and not self.kept.keys() >= set((self._indices or {"": -1}).values()):
            return  # other sessions may wait for calls that are not known here
        with contextlib.suppress(OSError):
            for name, status in trust.listed(self.directory, batch_directory.root_of(self.directory)):
                output, _, index = name.partition(".")
                if output == "output" and status.st_size > (self.kept.get(int(index), 0) if index.isdecimal() else 0):
                    return
            batch_directory.remove(self.directory)

    def is_abandoned(self) -> bool:
        """Return whether the session that made it ended before submitting it. A job that runs anyway will notice."""
        owner = owner_of(self.directory)
        if owner.get("host") != socket.gethostname() or "pid" not in owner:
            return not trust.is_there(self.directory) or trust.is_older(self.directory, SUBMIT_SECONDS)
        return not machine.is_running(owner["pid"], owner.get("started", ""))


def owner_of(directory: str) -> dict[str, Any]:
    """Read the record of the session that submits, or has submitted, a batch; empty if that is not known."""
    try:
        owner = json.loads(batch_directory.read_text(directory, batch_directory.OWNER_FILE) or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
