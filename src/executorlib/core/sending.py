"""Sends calls to those who run them, and reads the results.

The loop asks a `Delivery` and does not know of which kind it is. `Messages` is for workers; `jobs.delivery.Entries` is
for calls that become jobs. In the order of a call's life:

    accept     the call is submitted; from here on its future is known to others   (in the submitting thread)
    job_of     for each input: is it enough to wait until its call is launched?
    inputs     the last input that it waits for is done                             (may raise: the call fails)
    look_up    all inputs are there and it has a cache directory                    (may raise: the call fails)
    joins      the cache does not have it: does it wait for an equal call?
    set_up     its worker can be reached                                            (may raise: nothing can run)
    hand       it is its turn on that worker                                        (may raise: the call fails)
    loads      the worker has answered                                              (may raise: the call fails)
    over       it has ended in whatever way, if it was looked up
    gone       the worker has ended

All but `accept` and `not_started` are called by the loop, in its thread. Only what is said to raise may raise.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from typing import TYPE_CHECKING, Any

from executorlib import serialize
from executorlib.core.lookup import EqualCalls
from executorlib.futures.inputs import fill_in
from executorlib.launchers.contract import Lifetime
from executorlib.launchers.session import settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from executorlib.cache.entries import Output
    from executorlib.core.lookup import Lookup
    from executorlib.core.scheduler import Scheduler
    from executorlib.core.task import Task
    from executorlib.launchers.contract import Process
    from executorlib.serialize import Frame

logger = logging.getLogger("executorlib")

# Limits for what one worker of a block keeps: pickles of functions, and what is known about their sources. Beyond them
# the worker forgets all, and pieces are sent again.
_PIECES_PER_WORKER = 256
_PIECE_BYTES_PER_WORKER = 256 * 1024 * 1024
# Pickles larger than this are identified by their digest, so that they need not be kept here.
_DIGEST_BYTES = 256 * 1024


class Delivery:
    """A way for calls to reach those who run them.

    Args:
        lookup: Derives keys and reads the cache.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup

    def accept(self, task: Task) -> None:
        """A call is being submitted, and nobody else knows its future yet.

        Called in the submitting thread, by one thread at a time.
        """
        raise NotImplementedError

    def not_started(self, scheduler: Scheduler) -> int:
        """Number of accepted calls that have not started; called in any thread."""
        return scheduler.not_started

    def job_of(self, source: Future[Any]) -> int:
        """Number of the call of this executor whose job another job can follow to have this input; 0 if there is none.

        Args:
            source: The future among the inputs.
        """
        return 0

    def inputs(self, task: Task) -> None:
        """The last input that a call has waited for is done: put in place what is needed of its inputs.

        Raises:
            BaseException: What the user's objects raise.
        """

    def look_up(self, task: Task) -> Output | None:
        """Name a call's entry in the cache, and read its result; None if the call has to run.

        Raises:
            BaseException: What the user's objects raise, or why the entry cannot be used.
        """
        raise NotImplementedError

    def joins(self, task: Task) -> bool:
        """Return whether a call that the cache does not have waits for an equal one: `over` returns it then."""
        return False

    def set_up(self, process: Process, setup: dict[str, Any]) -> None:
        """Tell a worker, as the first thing, how to set itself up.

        Args:
            process: The worker's process.
            setup: What the launcher demands of it.

        Raises:
            BaseException: Why no worker can ever be set up.
        """

    def hand(self, process: Process, task: Task, now: bool) -> float | None:
        """Give a worker a call; the flush of its transport sends it.

        Args:
            process: The worker's process.
            task: The call.
            now: Whether the worker may start it without asking for a permit.

        Returns:
            Seconds after which the loop has to end the call; None if that is not for the loop to do.

        Raises:
            BaseException: What the user's objects raise while being pickled. Nothing of the call is sent then.
        """
        raise NotImplementedError

    def loads(self, frames: list[Frame]) -> Any:
        """Rebuild what a call has returned or raised.

        Raises:
            BaseException: What the user's objects raise while being rebuilt.
        """
        raise NotImplementedError

    def over(self, task: Task) -> Sequence[Task]:
        """A call that was looked up is over. Returns those that have waited for it, to be looked up again."""
        return ()

    def gone(self, process: Process) -> None:
        """A worker is gone: forget it."""

    def close(self) -> None:
        """Let go of the user's objects."""
        self.lookup.close()


class Messages(Delivery):
    """Calls and results are messages to and from workers.

    Args:
        lookup: Derives keys and reads the cache.
        pin: Whether to pin workers to the cores of their allocation.
        log_sizes: Whether to log the size of each call.
        log_records: As in `options.Options`.
    """

    def __init__(
        self, lookup: Lookup, *, pin: bool = False, log_sizes: bool = False, log_records: bool = False
    ) -> None:
        super().__init__(lookup)
        self._pin = pin
        self._log_sizes = log_sizes
        self._log_records = log_records
        self._next_number = 1  # at most that of the next call to be submitted
        self._equal_calls = EqualCalls()
        self._function_pickler = serialize.FunctionPickler()
        self._piece_numbers: dict[bytes, int] = {}
        self._piece_counter = itertools.count(1)
        self._known_pieces: dict[int, dict[int, int]] = {}  # for each worker: number and size of its pieces

    def accept(self, task: Task) -> None:
        """Note that the call exists: what is pickled from now on may serve it."""
        self._next_number = task.number + 1

    def inputs(self, task: Task) -> None:
        """Fill in the results of the call's inputs."""
        task.args, task.kwargs = fill_in(task.args), fill_in(task.kwargs)

    def look_up(self, task: Task) -> Output | None:
        """Name the call's entry by its key, and read it."""
        directory = task.resources.cache_directory
        assert directory is not None
        self.lookup.identify(task, directory, task.args, task.kwargs)
        return self.lookup.find(task, directory)

    def joins(self, task: Task) -> bool:
        """Return whether an equal call runs already, whose result will be in the cache."""
        return self._equal_calls.join(task)

    def over(self, task: Task) -> Sequence[Task]:
        """Return the equal calls that have waited for this one."""
        return self._equal_calls.leave(task)

    def set_up(self, process: Process, setup: dict[str, Any]) -> None:
        """Put the worker's set-up first, with the init function.

        Raises:
            BaseException: The init function cannot be pickled.
        """
        resources = process.resources
        changed = {name: value for name, value in settings().items() if process.settings.get(name) != value}
        if changed:
            setup["settings"] = changed
        if self._log_records:
            setup["records"] = True
        setup["slot"] = process.slot
        setup["threads"] = resources.threads_per_core
        if resources.cwd is not None:
            setup["cwd"] = resources.cwd
        held = process.places[0]
        if self._pin:
            setup["cores"] = held.cores
        setup["gpus"] = held.gpus
        frames: list[Frame] = []
        init_function = self.lookup.init_function
        if init_function is not None:
            frames = serialize.dumps(init_function)
            if resources.cache_directory is not None and resources.cache_key is None:
                with contextlib.suppress(TypeError):  # the look-up of each call reports it
                    key = self.lookup.key(init_function, (), {})
                    setup["init_key"] = key[:-1]
                    frames = [key.sources, *frames]
        assert process.transport is not None
        process.transport.put(["setup", setup], frames)

    def hand(self, process: Process, task: Task, now: bool) -> float | None:
        """Put the call, without those parts that the worker has kept.

        Raises:
            BaseException: The call cannot be pickled.
        """
        transport = process.transport
        assert transport is not None
        assert task.fn is not None
        function = self._function_pickler.dumps(task.fn, task.number, self._next_number)
        arguments = serialize.dumps_arguments(task.args, task.kwargs)
        options: dict[str, Any] = {"now": True} if now else {}
        resources = task.resources
        if resources.error_log_file is not None:
            options["error_log_file"] = resources.error_log_file
        if resources.run_time_max is not None:
            options["limit"] = [resources.run_time_max, time.time() + resources.run_time_max]
        if task.cache_path is not None:
            key = None if task.key is None else task.key[:-1]
            options["cache"] = {"path": task.cache_path, "key": key, "resources": resources.as_dict()}
        # Parts that are the same for many calls; a worker of a block keeps them.
        pieces = [function, task.key.sources] if task.key is not None and task.key.sources else [function]
        numbers: Sequence[int] = range(len(pieces))
        known: dict[int, int] = {}
        if process.lifetime is Lifetime.BLOCK:
            numbers = [self._number_of(piece) for piece in pieces]
            known = self._known_pieces.setdefault(process.number, known)
        new = {number: piece for number, piece in zip(numbers, pieces, strict=True) if number not in known}
        if new and known:
            size = sum(known.values()) + sum(map(len, new.values()))
            if len(known) + len(new) > _PIECES_PER_WORKER or size > _PIECE_BYTES_PER_WORKER:
                transport.put(["forget"])
                known.clear()
                new = dict(zip(numbers, pieces, strict=True))
        if new:
            options["new"] = [*new]
        if len(pieces) > 1:
            options["sources"] = numbers[1]
        size = transport.put(["call", task.number, numbers[0], options], [*new.values(), *arguments])
        known.update((number, len(piece)) for number, piece in new.items())
        if self._log_sizes:
            logger.warning("call %d of %s: sent %d bytes", task.number, task.name, size)
        return resources.run_time_max

    def _number_of(self, piece: bytes) -> int:
        key = piece
        if len(piece) > _DIGEST_BYTES:
            import hashlib  # takes a millisecond, and few functions are that large

            key = hashlib.sha256(piece).digest()
        number = self._piece_numbers.get(key)
        if number is None:
            if len(self._piece_numbers) >= _PIECES_PER_WORKER:
                self._piece_numbers.clear()
            number = self._piece_numbers[key] = next(self._piece_counter)
        return number

    def loads(self, frames: list[Frame]) -> Any:
        """Unpickle it.

        Raises:
            BaseException: It cannot be unpickled here.
        """
        return serialize.loads(frames)

    def gone(self, process: Process) -> None:
        """Forget what the worker has kept."""
        self._known_pieces.pop(process.number, None)

    def close(self) -> None:
        """Let go of functions."""
        super().close()
        self._function_pickler.clear()
