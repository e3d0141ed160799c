"""The base class of all executors."""

from __future__ import annotations

import contextlib
import inspect  # noqa: F401  # submit looks at signatures, which must not need a file when none can be opened any more
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, Protocol, TypeVar, overload

from executorlib.core import imports
from executorlib.core.block import BlockScheduler
from executorlib.core.fresh import FreshScheduler
from executorlib.core.ledger import Ledger
from executorlib.core.lookup import Lookup
from executorlib.core.loop import Loop, running_loops
from executorlib.core.sending import Delivery, Messages
from executorlib.core.task import CallFuture, function_name
from executorlib.errors import EXECUTOR_ADVICE
from executorlib.futures import unasked
from executorlib.futures.derived import batched
from executorlib.futures.inputs import find_futures_in_call
from executorlib.launchers.contract import Events, Launcher, Lifetime
from executorlib.options import lists_keys
from executorlib.resources import Demand, Resources, check_cache_key, positive_or_none, whole_number
from executorlib.worker.function import Function

if TYPE_CHECKING:
    from executorlib.graph.record import Graph
    from executorlib.options import Options
    from executorlib.resources import OneRank, ResourceDict

    _OneRank = OneRank | None
    # Types that hold futures, and types that may hold some. A Sequence of anything would include every str.
    _Futures = Future[Any] | list[Future[Any]] | tuple[Future[Any], ...] | set[Future[Any]] | dict[Any, Future[Any]]
    _Sequences = list[Any] | tuple[Any, ...] | Collection[Future[Any]]
    _Mixed = _Sequences | set[Any] | frozenset[Any] | dict[Any, Any] | Mapping[Any, Future[Any]]

    class _WithTemplate(Protocol):
        """An executor that passes unknown keys on to a template."""

        _has_template: Literal[True]


P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

_executor_numbers = itertools.count()


class BaseExecutor(Executor):
    """The base class of all executors: the standard library's `Executor` interface, with resources for each call.

    Subclasses that add behaviour call ``super().__init__(*args, **kwargs)`` and
    ``super().submit(fn, *args, **kwargs)``.

    Args:
        options: The arguments that all rows take.
        make_launcher: Makes the launcher of workers, given the loop.
        ledger: The resources that the executor may use.
        capacity: The most that a call can have, for checking its needs; None if only the system knows.
        count_cores: Whether the ledger counts cores; otherwise it counts calls.
        max_workers: Most calls at once, or the number of workers of the block.
        max_calls: Most calls handed out at once in the default mode; None for all.
        pin: Whether workers are pinned to the cores that they hold.
        settings: Further settings for `info`, besides those of all rows.
        entries: How calls travel if they become jobs of a queuing system, which go on without the executor; None if
            workers run them.
    """

    _loop: Loop | None = None
    _graph: Graph | None = None
    # If True, unknown keys of a resource_dict go to a submission template instead of being errors.
    _has_template: bool = False

    def __init__(
        self,
        options: Options,
        *,
        make_launcher: Callable[[Events], Launcher],
        ledger: Ledger,
        capacity: Ledger | None,
        count_cores: bool,
        max_workers: int,
        max_calls: int | None,
        pin: bool,
        settings: dict[str, Any],
        entries: Delivery | None = None,
    ) -> None:
        resources, block = options.resources, options.block_allocation
        jobs = entries is not None
        if jobs and options.log_records:
            raise ValueError(
                f"{type(self).__name__}: log_records=True cannot be honoured for calls that are jobs: they go on "
                "without this process and its handlers. Add a handler that writes to a file inside the function, or "
                "let workers run the calls with block_allocation=True."
            )
        self._capacity = capacity
        self._jobs = jobs
        self._count_cores = count_cores
        self._worker_count = max_workers
        self._resources = resources
        self._block = block
        self._disable_dependencies = options.disable_dependencies
        self._wait = options.wait
        self._graph = options.graph
        self._finish_graph = options.finish_graph
        self._settings = {**options.settings, **settings}
        self._is_shut_down = False
        self._demand = self._checked_demand(resources, type(self).__name__)
        check_cache_key(resources, type(self).__name__)
        self._make_directories(resources, type(self).__name__)
        if options.graph is not None:
            return
        imports.check_executor(type(self).__name__)
        scheduler: BlockScheduler | FreshScheduler
        if block:
            self._check_block(max_workers)
            # A deadline counts from when a call is handed over, so calls with one are not handed over ahead.
            lookahead = resources.run_time_max is None
            scheduler = BlockScheduler(max_workers, options.restart_limit, ledger, self._demand, lookahead)
        else:
            scheduler = FreshScheduler(ledger, max_calls, options.restart_limit)
        loop = self._loop = Loop(
            scheduler,
            make_launcher,
            entries
            or Messages(
                Lookup(options.init_function, options.cache_versions, Lifetime.BLOCK if block else Lifetime.CALL),
                pin=pin,
                log_sizes=options.log_obj_size,
                log_records=options.log_records,
            ),
            block_resources=resources if block else None,
            log_sizes=options.log_obj_size,
            name=f"executorlib-{next(_executor_numbers)}",
        )
        # An executor that is dropped without shutdown finishes its calls and ends. The loop has no reference to it.
        weakref.finalize(self, loop.shutdown, False).atexit = False
        try:
            loop.start()
        except BaseException:  # such as Ctrl-C: nobody will have this executor to shut it down
            loop.shutdown(True)
            raise

    # -- submitting -----------------------------------------------------------------------------------------------

    # A ParamSpec alone would refuse valid calls: with futures in place of values, with `resource_dict`, or without the
    # parameters that `init_function` fills. So only plain positional arguments are checked. The first overload that
    # fits counts.
    @overload
    def submit(
        self, fn: Callable[..., T], a: _Futures, /, *args: Any, resource_dict: _OneRank = None, **kwargs: Any
    ) -> Future[T]: ...
    @overload
    def submit(
        self, fn: Callable[..., T], a: Any, b: _Futures, /, *args: Any, resource_dict: _OneRank = None, **kwargs: Any
    ) -> Future[T]: ...
    @overload
    def submit(
        self,
        fn: Callable[..., T],
        a: Any,
        b: Any,
        c: _Futures,
        /,
        *args: Any,
        resource_dict: _OneRank = None,
        **kwargs: Any,
    ) -> Future[T]: ...
    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...
    @overload
    def submit(  # type: ignore[overload-cannot-match]
        self, fn: Callable[..., T], /, *, resource_dict: _OneRank = None, **kwargs: Any
    ) -> Future[T]: ...
    @overload
    def submit(
        self,
        fn: Callable[Concatenate[A, ...], T],
        a: A | _Mixed,
        /,
        *,
        resource_dict: _OneRank = None,
        **kwargs: Any,
    ) -> Future[T]: ...
    @overload
    def submit(
        self,
        fn: Callable[Concatenate[A, B, ...], T],
        a: A | _Mixed,
        b: B | _Mixed,
        /,
        *,
        resource_dict: _OneRank = None,
        **kwargs: Any,
    ) -> Future[T]: ...
    @overload
    def submit(
        self,
        fn: Callable[Concatenate[A, B, C, ...], T],
        a: A | _Mixed,
        b: B | _Mixed,
        c: C | _Mixed,
        /,
        *args: Any,
        resource_dict: _OneRank = None,
        **kwargs: Any,
    ) -> Future[T]: ...
    # Here `cores` may be above 1, so that the result is a list.
    @overload
    def submit(
        self, fn: Callable[..., Any], /, *args: Any, resource_dict: ResourceDict, **kwargs: Any
    ) -> Future[Any]: ...
    @overload
    def submit(
        self: _WithTemplate, fn: Callable[..., Any], /, *args: Any, resource_dict: Mapping[str, Any], **kwargs: Any
    ) -> Future[Any]: ...
    @lists_keys
    def submit(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        resource_dict: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Future[Any]:
        """Schedule the call ``fn(*args, **kwargs)``.

        Args:
            fn: Any callable.
            *args: Positional arguments. Futures among them, at any depth of lists, tuples, sets, dicts and
                dataclasses, are waited for and replaced by their results.
            resource_dict: The resources of the call, with the keys below, if they differ from the executor's.
            **kwargs: Keyword arguments, with futures as above.

        Returns:
            The call's future. With ``cores`` above 1 its result is the list of all ranks' results.

        Raises:
            RuntimeError: The executor was shut down.
            ValueError: Something cannot be honoured; the text says what to change.
            TypeError: ``fn`` is not callable, or a value in ``resource_dict`` has a wrong type.
        """
        if not callable(fn):
            raise TypeError(f"submit needs a callable, got {fn!r} ({type(fn).__name__}).")
        if Function(fn).takes(["resource_dict"]):
            raise ValueError(
                f"call of {function_name(fn)}: its parameter 'resource_dict' can never be filled, because submit takes "
                "that name for the call's resources. Rename the parameter."
            )
        resources, demand = self._resources, self._demand
        if resource_dict:
            subject = f"call of {function_name(fn)}"
            if self._block:
                raise ValueError(
                    f"{subject}: with block_allocation=True the resources belong to the executor's workers. Give "
                    "resource_dict to the constructor, or leave block_allocation out."
                )
            resources = resources.updated(resource_dict, subject, self._has_template)
            demand = self._checked_demand(resources, subject)
            check_cache_key(resources, subject)
            self._make_directories(resources, subject)
        if self._jobs and resources.cwd is None:
            # A job starts later, and elsewhere.
            with contextlib.suppress(OSError):  # it was removed
                resources = replace(resources, cwd=os.getcwd())
        if self._graph is not None:
            self._check_open()
            return self._graph.call(fn, args, kwargs, dict(resource_dict or {}))
        assert self._loop is not None
        self._loop.check_open()
        imports.check_call(fn, args, kwargs)
        if resources.cores > 1:
            self._prepare_ranks()
        call: Future[Any] = CallFuture()
        try:
            inputs = find_futures_in_call(args, kwargs)
        except ValueError as error:
            raise ValueError(f"call of {function_name(fn)}: {error}") from None
        except RecursionError as error:  # nested too deeply to be pickled either
            call.set_exception(error)
            return call
        if inputs and self._disable_dependencies:
            call.set_exception(
                ValueError(
                    f"call of {function_name(fn)}: a future is among its inputs, but the executor was made with "
                    "disable_dependencies=True. Pass future.result(), or leave that argument out."
                )
            )
            return call
        self._loop.submit(fn, args, kwargs, call, resources, demand, inputs)
        return call

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any] | Future[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Call a function for many arguments at once, as `concurrent.futures.Executor.map` does.

        Args:
            fn: A callable that takes as many arguments as there are iterables.
            *iterables: The arguments, call by call. A future may stand for an iterable. `map` waits for it, because the
                number of calls is not known before; pass futures of single arguments to go on meanwhile.
            timeout: Seconds from now within which each result must be there; None for no limit.
            chunksize: Number of calls that travel and run together as one, which saves time with very short calls.
            buffersize: Number of calls submitted ahead of the result that is asked for; None submits all at once.

        Returns:
            An iterator of the results, in order.

        Raises:
            TimeoutError: A result was not there in time (raised by the iterator), or the result of a future that stands
                for an iterable was not (raised by `map` itself).
            ValueError: ``chunksize`` or ``buffersize`` is below 1.
        """
        whole_number(1)("map: chunksize", chunksize)
        if buffersize is not None:
            whole_number(1)("map: buffersize", buffersize)
        deadline = None if timeout is None else time.monotonic() + timeout
        calls: Iterator[tuple[Any, ...]] = zip(
            *[self._iterable(each, fn, deadline) for each in iterables], strict=False
        )
        # On several ranks, a chunk's result would be the list of ranks, not of calls. A graph shows every call.
        chunked = chunksize > 1 and self._graph is None and self._resources.cores == 1
        if chunked:
            chunks = iter(lambda: list(itertools.islice(calls, chunksize)), [])
            submitted: Iterator[Future[Any]] = (self.submit(_run_chunk, fn, chunk) for chunk in chunks)
        else:
            submitted = (self.submit(fn, *args) for args in calls)
        # Submitted now, not when the first result is asked for.
        futures = deque(submitted if buffersize is None else itertools.islice(submitted, buffersize))
        results = _results(futures, submitted, deadline)
        return itertools.chain.from_iterable(results) if chunked else results

    def _iterable(
        self, iterable: Iterable[Any] | Future[Any], fn: Callable[..., Any], deadline: float | None
    ) -> Iterable[Any]:
        """Wait for an iterable of `map`, if a future stands for it."""
        if not isinstance(iterable, Future):
            return iterable
        subject = f"map of {function_name(fn)}"
        if self._graph is not None:
            raise ValueError(
                f"{subject}: an iterable is a future, but no call runs while a graph is recorded, so its length is "
                "unknown. Pass futures of its elements (split_future)."
            )
        if self._disable_dependencies:
            raise ValueError(
                f"{subject}: an iterable is a future, but the executor was made with disable_dependencies=True. Pass "
                "future.result()."
            )
        self._check_open()
        elements: Iterable[Any] = iterable.result(None if deadline is None else deadline - time.monotonic())
        return elements

    @overload
    def batched(self, iterable: Iterable[Future[T]], n: int) -> list[Future[list[T]]]: ...
    @overload
    def batched(self, iterable: Iterable[Any], n: int) -> list[Future[list[Any]]]: ...
    def batched(self, iterable: Iterable[Any], n: int) -> list[Future[list[Any]]]:
        """Group futures by ``n`` in the order in which they finish. Failed ones come last.

        Args:
            iterable: The futures. Anything else counts as a result that exists already.
            n: Size of a group. The last group may be smaller.

        Returns:
            Futures of lists of results. A group that holds a failed input fails with that input's exception.

        Raises:
            ValueError: ``n`` is below 1.
        """
        if self._graph is not None:
            sources = list(iterable)
            whole_number(1)("batched: n", n)
            return [self._graph.batch(sources[start : start + n]) for start in range(0, len(sources), n)]
        return batched(iterable, n)

    # -- ending ---------------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and release all resources once the present ones are over.

        Args:
            wait: Whether to return only then. If false, executors whose calls are jobs of a queuing system leave: the
                jobs go on, and the present futures become cancelled.
            cancel_futures: Whether to cancel calls that have not started.
        """
        self._is_shut_down = True
        if self._loop is not None:
            if self._jobs and not wait and not cancel_futures:
                self._loop.detach()
                return
            self._loop.shutdown(cancel_futures)
            if wait:
                self._loop.join()

    def terminate_workers(self) -> None:
        """End running calls by SIGTERM, cancel the others, and shut down; their futures fail or are cancelled."""
        self._end_workers(signal.SIGTERM)

    def kill_workers(self) -> None:
        """End running calls by SIGKILL, cancel the others, and shut down; their futures fail or are cancelled."""
        self._end_workers(signal.SIGKILL)

    def _end_workers(self, signal_number: int) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        if self._loop is not None:
            self._loop.end_workers(signal_number)

    def __exit__(self, exc_type: type[BaseException] | None, exc_val: Any, exc_tb: Any) -> None:
        if self._loop is not None and exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # A user who presses Ctrl-C wants the calls to end, and does not want to wait for them.
            self.shutdown(wait=False, cancel_futures=True)
            self._loop.end_workers(signal.SIGINT)
        self.shutdown(wait=self._wait)
        if self._graph is not None and self._finish_graph is not None and exc_type is None:
            self._finish_graph(self._graph)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: {EXECUTOR_ADVICE}")

    # -- properties -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of calls that have not started."""
        return self._loop.waiting if self._loop is not None else 0

    def __bool__(self) -> bool:
        """True, although `len` may be 0."""
        return True

    @property
    def info(self) -> dict[str, Any] | None:
        """The executor's settings; None after shutdown."""
        if self._is_shut_down:
            return None
        return {**self._resources.as_dict(), **self._settings, "max_workers": self._worker_count}

    @property
    def max_workers(self) -> int | None:
        """Most calls at once, or the number of workers of a block; None after shutdown.

        Setting it grows or shrinks a block: new workers start at once, and surplus ones end after their calls.

        Raises:
            NotImplementedError: Set without ``block_allocation=True``; it is a ValueError, too.
            ValueError: Set below 1, or to more than the cores or GPUs allow.
            RuntimeError: Set after shutdown.
        """
        return None if self._is_shut_down else self._worker_count

    @max_workers.setter
    def max_workers(self, value: int) -> None:
        self._check_open()
        if not self._block or self._loop is None:
            raise _NotInThisModeError(
                "max_workers can be changed only with block_allocation=True; otherwise, make a new executor."
            )
        size = positive_or_none("max_workers", value)
        assert size is not None
        self._check_block(size)
        self._worker_count = size
        self._loop.resize(size)

    @property
    def _max_workers(self) -> int | None:
        return self.max_workers

    @property
    def future_queue(self) -> CallQueue | None:
        """The calls that have not started; None after shutdown."""
        return None if self._is_shut_down else CallQueue(self)

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _checked_demand(self, resources: Resources, subject: str) -> Demand:
        """The resources that the ledger has to provide, after a check that it can ever do so.

        Raises:
            ValueError: It can never provide them.
        """
        self._check(resources, subject)
        demand = resources.demand
        capacity = self._capacity
        if capacity is None:
            return demand
        most_gpus = max(node.total_gpus for node in capacity.nodes)
        if demand.gpus > most_gpus:
            raise ValueError(
                f"{subject} needs {demand.gpus} GPUs (cores={resources.cores} × "
                f"gpus_per_core={resources.gpus_per_core}), but the executor has {most_gpus}. Ask for fewer, or name "
                "the devices: SingleNodeExecutor(gpus=…), or the environment variable CUDA_VISIBLE_DEVICES."
            )
        if not self._count_cores:
            return Demand(1, demand.gpus, demand.exclusive)
        if not capacity.could_hold(demand):
            most = max(node.total_cores for node in capacity.nodes)
            raise ValueError(
                f"{subject} needs {demand.cores} cores (cores={resources.cores} × "
                f"threads_per_core={resources.threads_per_core}), but the executor has {most} "
                "(max_cores, or this machine's CPUs). Ask for fewer, or make the executor with "
                f"max_cores={demand.cores}."
            )
        return demand

    def _prepare_ranks(self) -> None:
        """Find the program that starts the ranks of a call, so that the loop need not wait for the answer."""

    def _make_directories(self, resources: Resources, subject: str) -> None:
        from executorlib.cache import trust

        # The cache directory is made when the first entry is written.
        for key in ("cwd", "cache_directory"):
            path = getattr(resources, key)
            if path is None:
                continue
            try:
                if key == "cwd":
                    os.makedirs(path, exist_ok=True)
                else:
                    trust.check_folder(path)
            except trust.UntrustedFile as error:
                raise ValueError(f"{subject}: {error}") from error
            except OSError as error:
                raise ValueError(
                    f"{subject}: the directory {key}={path!r} cannot be created: {error.strerror}. Name another one."
                ) from error

    def _check(self, resources: Resources, subject: str) -> None:
        """Raise ValueError for a resource that this row cannot honour."""

    def _check_block(self, size: int) -> None:
        room = self._room()
        if room is not None and size > room:
            demand = self._resources.demand
            raise ValueError(
                f"max_workers={size} workers of {demand.cores} cores and {demand.gpus} GPUs do not fit: there is room "
                f"for {room} (in max_cores, or in all the cores there are). Ask for fewer workers."
            )

    def _room(self) -> int | None:
        """The largest possible number of workers of a block; None if only the system knows."""
        if self._capacity is None:
            return None
        demand = self._demand if self._count_cores else self._demand._replace(cores=0)
        return self._capacity.room_for(demand) if demand.cores or demand.gpus else None


class _NotInThisModeError(NotImplementedError, ValueError):
    """Only blocks of workers can do it. In executorlib 1.x that is not implemented, and here it is a wrong value."""


class CallQueue:
    """A view of the calls that have not started, with methods of `queue.Queue`.

    Args:
        executor: The executor that has the calls.
    """

    def __init__(self, executor: BaseExecutor) -> None:
        self._executor = executor

    def qsize(self) -> int:
        """The number of calls."""
        return len(self._executor)

    def empty(self) -> bool:
        """Return whether there are no calls."""
        return self.qsize() == 0


def _run_chunk(fn: Callable[..., Any], chunk: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [fn(*args) for args in chunk]


def _results(futures: deque[Future[Any]], submitted: Iterator[Future[Any]], deadline: float | None) -> Iterator[Any]:
    """Yield results in order, and submit one more call for each; cancel the rest when the caller stops."""
    try:
        while futures:
            futures.extend(itertools.islice(submitted, 1))
            # Neither has a name, because a generator that waits must not keep a future or its result alive.
            yield _result_or_cancel(futures.popleft(), deadline)
    finally:
        for future in futures:
            future.cancel()


def _result_or_cancel(future: Future[Any], deadline: float | None) -> Any:
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    except BaseException:
        future.cancel()
        raise
    finally:
        # An exception's traceback refers to this frame, and the frame to the future, which has the exception.
        del future


def _finish_at_exit() -> None:
    """Finish all calls before the interpreter ends, as `ProcessPoolExecutor` does; after Ctrl-C, end them."""
    # In an interactive session, the last exception may be an old one.
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")
    loops = running_loops()
    for loop in loops:
        loop.shutdown(cancel=interrupted, reason="cannot schedule new futures after interpreter shutdown")
        if interrupted:
            loop.end_workers(signal.SIGINT)
    for loop in loops:
        loop.join()
    if not interrupted:
        unasked.tell_the_rest()


def _forget_after_fork() -> None:
    unasked.forget()
    for loop in running_loops():
        loop.after_fork()


# This hook runs before the interpreter waits for threads, such as the loops; plain atexit handlers come too late. The
# standard library's own executors use it, too.
threading._register_atexit(_finish_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_forget_after_fork)
