"""Delivers calls that become jobs: they travel as entries of the cache directory.

Everything that a job needs is in its call's entry, and its result is in another one, which `jobs.launcher` finds. So
there is nothing to send, and a call need not wait for inputs that are jobs, too: it refers to their entries, by names
that are known before the results are.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from executorlib.cache import unpickle
from executorlib.core.sending import Delivery
from executorlib.core.task import CallFuture
from executorlib.futures.inputs import Stored, StoredCall, StoredFuture, fill_in, stored

if TYPE_CHECKING:
    from concurrent.futures import Future

    from executorlib.cache.entries import Output
    from executorlib.core.lookup import Lookup
    from executorlib.core.scheduler import Scheduler
    from executorlib.core.task import Task
    from executorlib.launchers.contract import Process
    from executorlib.serialize import Frame

_numbers = itertools.count()


class Entries(Delivery):
    """Calls and results are files of a cache directory.

    Args:
        lookup: Derives keys and reads the cache.
    """

    def __init__(self, lookup: Lookup) -> None:
        super().__init__(lookup)
        self._number = next(_numbers)  # tells the calls of this executor from those of others
        self._real_paths: dict[str, str] = {}

    # -- Delivery -------------------------------------------------------------------------------------------------

    def accept(self, task: Task) -> None:
        """Let the future, and futures that are made from it, say which call they stand for."""
        if isinstance(task.future, CallFuture):
            task.future._stored = Stored(StoredCall(self._number, task.number))

    def not_started(self, scheduler: Scheduler) -> int:
        """A launched call may still wait in the queue."""
        return scheduler.not_started + scheduler.launching

    def job_of(self, source: Future[Any]) -> int:
        """The call whose result, or an item of whose result, the future stands for."""
        found = getattr(source, "_stored", None)
        return found.call.number if found is not None and found.call.executor == self._number else 0

    def look_up(self, task: Task) -> Output | None:
        """Put the names of other jobs' results in place, and read the call's entry."""
        return self.lookup.find(task, self._identify(task))

    def hand(self, process: Process, task: Task, now: bool) -> float | None:
        """Do nothing: the job reads its entry, and the queuing system ends it when its time is over."""
        return None

    def loads(self, frames: list[Frame]) -> Any:
        """Unpickle what maybe another session's job has left.

        Raises:
            BaseException: It cannot be unpickled here.
        """
        return unpickle.loads(frames[0])

    # -- for the launcher -----------------------------------------------------------------------------------------

    def inputs_of(self, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that becomes a job, with references in place of other jobs' results.

        Sets `Task.after` to the files of those results.
        """
        from executorlib.cache.entries import ResultOf, root_of

        after: list[str] = []

        def refer(future: Future[Any]) -> Any:
            found = stored(future)
            assert found is not None  # `_by_name` left only these
            call = found.call
            after.append(call.path)
            return ResultOf(call.path, found.keys, root_of(call.path, call.key), call.batch)

        inputs = fill_in(task.args, refer), fill_in(task.kwargs, refer)
        task.after = tuple(dict.fromkeys(after))
        return inputs

    def is_changed(self, task: Task) -> bool:
        """Return whether the call's key has changed since the look-up; if so, the call is renamed to its new key."""
        before = task.cache_path
        self._identify(task)
        return task.cache_path != before

    # -- names ----------------------------------------------------------------------------------------------------

    def _identify(self, task: Task) -> str:
        """Name a call's entry by the call's present state; returns the cache directory."""
        directory = task.resources.cache_directory
        assert directory is not None
        directory = self._real_path(directory)
        # The call must not keep the results of the jobs it depends on in memory.
        task.args, task.kwargs = fill_in(task.args, _by_name), fill_in(task.kwargs, _by_name)
        # The name of the call that makes a result is known before the result is.
        args, kwargs = fill_in(task.args, _name_of_input), fill_in(task.kwargs, _name_of_input)
        name = self.lookup.identify(task, directory, args, kwargs)
        if isinstance(task.future, CallFuture):
            task.future._stored.call.key, task.future._stored.call.path = name, task.cache_path
        return directory

    def _real_path(self, directory: str) -> str:
        """One name for a directory that may be reached by several; found only once, because that takes a while."""
        found = self._real_paths.get(directory)
        if found is None:
            found = self._real_paths[directory] = os.path.realpath(directory)
        return found


def _by_name(future: Future[Any]) -> Any:
    """An input while its call is not a job yet: the name for a job's result, the result itself for any other future."""
    found = stored(future)
    return future.result() if found is None else StoredFuture(found)


def _name_of_input(future: Future[Any]) -> Any:
    from executorlib.cache.entries import name_of_result

    found = stored(future)
    return future.result() if found is None else name_of_result(found.call.key, found.keys)
