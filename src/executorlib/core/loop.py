"""The one thread of an executor: it waits for everything at once and carries out what the scheduler decides.

    submit ──post──▶ inbox ─┐                       ┌─▶ Launch, Kill ─▶ launcher
    cancel, inputs ─post──▶ ├─▶ scheduler.on_… ─▶ effects ─▶ Send, Recall, Stop ─▶ transport
    sockets, exits, timers ─┘                       └─▶ LookUp, Fail ─▶ cache, futures

One turn: (1) hand the events in the inbox to the scheduler, (2) carry out its effects, so that workers have work again,
(3) only then unpickle the results that came and resolve their futures, whose callbacks may fill the inbox again,
(4) sleep until a descriptor is ready, a timer is due or another thread posts.

All state of calls and workers belongs to this thread; other threads only append to the inbox. Apart from the sleep
itself, and `close` at the very end, nothing here waits for another process. Pickling, callbacks of futures
and reading the cache do take time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from pickle import PicklingError
from typing import Any

from executorlib import serialize
from executorlib.core import answers
from executorlib.core.scheduler import Effect, Fail, Kill, Launch, LookUp, Recall, Scheduler, Send, Stop, Worker
from executorlib.core.sending import Delivery
from executorlib.core.task import CANCELLED, FAILED, LAUNCHING, RUNNING, CallFuture, Task
from executorlib.errors import (
    ExecutorlibSocketError,
    TimeLimitError,
    add_advice,
    advise_unpicklable,
    contained,
    note_chain,
    over_time,
)
from executorlib.futures.derived import when_done
from executorlib.futures.inputs import failed_call, input_error, misplaced
from executorlib.futures.locks import Event, RLock
from executorlib.futures.unasked import Failures, Record
from executorlib.launchers import streams
from executorlib.launchers.contract import Events, Exit, Launcher, Lifetime, Place, Process, Timer
from executorlib.launchers.last_output import has_stack, tail_text
from executorlib.poller import Poller, WakeUp
from executorlib.resources import Demand, Resources
from executorlib.serialize import Frame

logger = logging.getLogger("executorlib")

# Seconds between SIGINT, SIGTERM or the end of a time limit and SIGKILL: time to tidy up.
_GRACE_SECONDS = 2.0

# Seconds between attempts to continue suspended helpers once the executor is to end.
_RESUME_SECONDS = 1.0

# When a call's time is over, its worker reports by itself where the call is, which takes a moment to arrive. Look for
# the report at this interval, in seconds, and this many times; then end the worker without it.
_LOOK_SECONDS, _MOST_LOOKS = 0.02, 25

# The name of the cause in error texts, if all workers were sent this signal.
_ENDED_BY = {signal.SIGKILL: "kill_workers()", signal.SIGTERM: "terminate_workers()", signal.SIGINT: "Ctrl-C"}


class _InputDone:
    """Tells the loop that an input of a call is done, and keeps nothing of the call afterwards.

    Futures keep their callbacks forever, so a plain reference would keep every later result of a chain alive.

    Args:
        loop: The loop.
        task: The call.
        is_job: Whether the call need not wait for this input, and only needs to know if it fails.
    """

    __slots__ = ("_is_job", "_loop", "_task")

    def __init__(self, loop: Loop, task: Task, is_job: bool = False) -> None:
        self._loop: Loop | None = loop
        self._task: Task | None = task
        self._is_job = is_job

    def __call__(self, future: Future[Any]) -> None:
        loop, task = self._loop, self._task
        self._loop = self._task = None
        if loop is not None and task is not None:
            error = input_error(future)
            if error is not None or not self._is_job:
                loop.post(loop.on_input_done, task, error, failed_call(future), getattr(future, "_unasked", None))


class _Cancelled:
    """Tells the loop that a call's future was cancelled, and keeps nothing of the call afterwards."""

    __slots__ = ("_loop", "_task")

    def __init__(self, loop: Loop, task: Task) -> None:
        self._loop = loop
        self._task = task

    def __call__(self) -> None:
        self._loop.post(self._loop.on_cancelled, self._task)


class _Process(Process):
    """A worker's process, with the scheduler's record of the worker.

    Attributes:
        worker: That record.
        unread: If it has given calls back, the number of the last call that there was then. Until the worker answers a
            later one, it may not have read the messages of those that it has given back.
    """

    def __init__(self, worker: Worker, resources: Resources, lifetime: Lifetime) -> None:
        places = [Place(share.node.name, share.cores, share.gpus) for share in worker.allocation.shares]
        super().__init__(worker.number, resources, lifetime, worker.slot, places, worker.calls)
        self.worker = worker
        self.unread = 0


class Loop(Poller, Events):
    """Runs the calls of one executor, from `start` on.

    Args:
        scheduler: Decides what happens.
        make_launcher: Given the loop, makes the launcher that starts workers.
        delivery: How calls travel.
        block_resources: Resources of each worker of a block; None if every call has a worker of its own.
        log_sizes: Whether to log the size of each result.
        name: Name of the thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        make_launcher: Callable[[Events], Launcher],
        delivery: Delivery,
        *,
        block_resources: Resources | None,
        log_sizes: bool,
        name: str,
    ) -> None:
        # Nothing here may need to be freed: a Ctrl-C can strike at any line. See `start`.
        self._delivery = delivery
        self.scheduler = scheduler
        self._ledger = scheduler.ledger
        self._block_resources = block_resources
        self._lifetime = Lifetime.CALL if block_resources is None else Lifetime.BLOCK
        self._log_sizes = log_sizes
        self._next_number = 1
        self._last_posted = 0  # number of the last call that was put into the inbox
        self._last_taken = 0  # number of the last call that was taken out of it
        self._submit_lock = RLock()
        self._refusal = ""  # why submit is refused
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._sleeping = False
        self._settled = False  # whether the scheduler has decided about all events that it was given
        self._closing = False
        self._tasks: dict[int, Task] = {}
        self._processes: dict[int, _Process] = {}
        self._results: list[tuple[Task, list[Any], list[Frame]]] = []
        self._records: list[dict[str, Any]] = []
        self._broken_by: BaseException | None = None
        self._last_death = ""
        self._ended_by = ""  # what has ended all workers
        self._soon: list[Callable[[], None]] = []
        self._failures = Failures()
        self._deadlines: dict[int, tuple[float, int]] = {}  # by worker: when its call's time is over, and which call
        self._deadline = Timer(self, self._on_deadline)
        self._pid = os.getpid()
        self._make_launcher = make_launcher
        self._wake_up: WakeUp | None = None  # while the loop runs
        self._failed_to_start: BaseException | None = None
        self._started = Event()  # or failed to start
        self._let_go = Event()  # all futures are over or have been given up
        self._ended = Event()
        self._detached = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)

    def start(self) -> None:
        """Start the thread and return once it has everything it needs.

        Whatever has to be freed again is made by the thread itself, because a Ctrl-C strikes only in the main thread.
        When it strikes here, `shutdown` ends the thread, however far it has come.

        Raises:
            RuntimeError: No further thread can be started. Nothing is left behind, as after any other error.
        """
        # Not from this thread: if `Thread.start` is interrupted, the new thread may never get to `_run`.
        start_new_thread(self._start_thread, ())
        self._started.wait()
        if self._failed_to_start is not None:
            raise self._failed_to_start

    def _start_thread(self) -> None:
        try:
            self._thread.start()
        except BaseException as error:
            self._fail_to_start(error)

    def _fail_to_start(self, error: BaseException) -> None:
        self._failed_to_start = error
        for event in (self._ended, self._let_go, self._started):
            event.set()

    # -- called from any thread ---------------------------------------------------------------------------------------

    def submit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        future: Future[Any],
        resources: Resources,
        demand: Demand,
        inputs: list[Future[Any]],
    ) -> None:
        """Accept a call.

        Args:
            fn: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            future: Its future, pending.
            resources: What it needs; checked.
            demand: What it takes from the ledger.
            inputs: Futures among the arguments.

        Raises:
            RuntimeError: The executor was shut down, or belongs to another process.
        """
        with self._submit_lock:
            # Under the lock, so that no call can follow a shutdown that has been posted.
            self.check_open()
            number = self._next_number
            self._next_number = number + 1
            task = Task(number, fn, args, kwargs, future, resources, demand, len(inputs))
            if isinstance(future, CallFuture):
                future._on_cancel = _Cancelled(self, task)
            self._delivery.accept(task)
            self.post(self._on_submit, task, inputs)
            # Only now: a call that a Ctrl-C kept from being posted must not be counted forever.
            self._last_posted = number

    def check_open(self) -> None:
        """Raise RuntimeError unless calls are accepted."""
        if self._refusal:
            raise RuntimeError(self._refusal)

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Have a function called in the loop's thread."""
        # In a `finally` that a Ctrl-C cannot get ahead of, because nobody else may wake the loop.
        try:
            self._inbox.append((function, args))
        finally:
            # The loop sets the flag, then looks into the inbox, then sleeps: it sees this entry, or we see the flag.
            # Only the loop may clear the flag, as clearing it here could hit the loop's next sleep.
            wake_up = self._wake_up
            if self._sleeping and wake_up is not None:
                try:  # noqa: SIM105  # see above
                    os.write(wake_up.write, b"\0")
                except OSError:
                    pass  # full: it is awake already

    def shutdown(self, cancel: bool, reason: str = "cannot schedule new futures after shutdown") -> None:
        """Accept no more calls, and end once those accepted are over.

        Args:
            cancel: Whether to cancel calls that have not started.
            reason: Error text for later submits.
        """
        with self._submit_lock:
            if not self._refusal:
                self._refusal = reason
            self.post(self._on_shutdown, cancel)

    def detach(self) -> None:
        """Accept no more calls and end soon. Jobs go on; all pending futures are cancelled when this returns."""
        with self._submit_lock:
            if not self._refusal:
                self._refusal = "cannot schedule new futures after shutdown"
            self.post(self._on_detach)
        # Callbacks of futures run in the loop's thread, which cannot wait for itself.
        if threading.current_thread() is not self._thread and self._pid == os.getpid():
            self._let_go.wait()

    def end_workers(self, signal_number: int) -> None:
        """Signal the workers that run calls; those that are still there after a grace period are killed."""
        self.post(self._on_end_workers, signal_number)

    def kill_call(self, future: Future[Any]) -> None:
        """Kill the worker that runs a call."""
        self.post(self._on_kill_call, future)

    def resize(self, size: int) -> None:
        """Set the number of workers of a block."""
        self.post(self._on_resize, size)

    def join(self) -> None:
        """Wait until the loop has ended."""
        started = self._thread.ident is not None
        if started and threading.current_thread() is not self._thread and self._pid == os.getpid():
            self._ended.wait()  # before Python 3.13, a Ctrl-C makes `Thread.join` believe that the thread has ended
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Calls that have not started."""
        return self._delivery.not_started(self.scheduler) + max(0, self._last_posted - self._last_taken)

    # -- events from the inbox ----------------------------------------------------------------------------------------

    def _on_submit(self, task: Task, inputs: list[Future[Any]]) -> None:
        self._tasks[task.number] = task
        # Callbacks are added here and not in submit, where a Ctrl-C could leave some of them out.
        for source in inputs:
            producer = self._tasks.get(self._delivery.job_of(source))
            if producer is not None:
                if producer.state >= LAUNCHING:
                    task.missing -= 1
                elif producer.dependents is None:
                    producer.dependents = [task]
                else:
                    producer.dependents.append(task)
            when_done(source, _InputDone(self, task, producer is not None))
        self._last_taken = task.number
        self.scheduler.on_submit(task)

    def _on_known(self, task: Task) -> None:
        """A call has become a job, or is done, so calls that have it as an input can become jobs after it."""
        dependents, task.dependents = task.dependents, None
        for dependent in dependents or ():
            self._settled = False
            if not dependent.over:
                self.scheduler.on_input(dependent)

    def on_input_done(
        self, task: Task, error: BaseException | None, source: str = "", record: Record | None = None
    ) -> None:
        """An input of a call is done. ``source`` is its name; ``record`` is about its failure, if it failed."""
        if task.over or task.number not in self._tasks:
            return
        if self._detached:  # the input was given up; its job goes on, and so does the job that depends on it
            return
        if error is not None:
            if task.state is not RUNNING:  # a job that runs in spite of it is left to end by itself
                note_chain(error, source, f"call {task.number} of {task.name}")
                self._fail(task, error)
                if record and isinstance(task.future, CallFuture):
                    record.clear()  # the failure is reported, or asked for, as that of this call
            return
        if task.missing == 1:  # the last one
            try:
                self._delivery.inputs(task)
            except BaseException as caught:
                self._fail(task, contained(caught, "filling in the results of its inputs"))
                return
        self.scheduler.on_input(task)

    def on_cancelled(self, task: Task) -> None:
        """A call's future was cancelled."""
        if not task.over and task.number in self._tasks:  # otherwise its submission was interrupted
            self.scheduler.on_cancel(task)
            self._announce(task)
            self._drop(task)

    def _on_shutdown(self, cancel: bool) -> None:
        if not self._closing:
            self._resume()
        self._closing = True
        if cancel:
            for task in list(self._tasks.values()):
                if not task.announced and _cancel(task.future.cancel, task.future):
                    self.on_cancelled(task)

    def _resume(self) -> None:
        # Those who wait for the executor's end must not be held up by a process that is suspended, now or later.
        self._launcher.resume()
        self.call_later(_RESUME_SECONDS, self._resume)

    def _on_detach(self) -> None:
        if self._detached:  # by an earlier `shutdown`
            return
        self._closing = self._detached = True
        # Calls submitted just before still become jobs. Those that cannot yet are given up, and their futures say so.
        while effects := self.scheduler.take_effects():
            for effect in effects:
                self._carry_out(effect)
        for task in list(self._tasks.values()):
            if task.state < LAUNCHING:
                self.scheduler.on_cancel(task)
            # Now, and not once the jobs are in the system: that could take as long as the system does not answer.
            task.announced = True
            if isinstance(task.future, CallFuture):
                _cancel(task.future._abandon, task.future)
        self._let_go.set()
        self._launcher.detach(self._on_detached)

    def _on_detached(self) -> None:
        for task in list(self._tasks.values()):
            self._drop(task)
        self._processes.clear()

    def _on_end_workers(self, signal_number: int) -> None:
        self._ended_by = self._ended_by or _ENDED_BY[signal.Signals(signal_number)]
        self.scheduler.on_break("the workers were ended")
        for process in list(self._processes.values()):
            # A worker that waits for calls has nothing to interrupt.
            idle = not process.calls and signal_number == signal.SIGINT
            self._launcher.kill(process, signal.SIGTERM if idle else signal_number)
        if signal_number != signal.SIGKILL:
            self.call_later(_GRACE_SECONDS, lambda: self._on_end_workers(signal.SIGKILL))

    def _on_kill_call(self, future: Future[Any]) -> None:
        for process in list(self._processes.values()):
            if any(task.future is future for task in process.worker.calls):
                self._launcher.kill(process, signal.SIGKILL)

    def _on_resize(self, size: int) -> None:
        self.scheduler.on_resize(size)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._fail_to_start(error)
            return
        self._started.set()
        try:
            self._launcher.prepare()
            import cloudpickle  # noqa: F401  # while the workers start; the first call may need it

            while True:
                self._work()
                if self._closing and not self._tasks and not self._inbox:
                    if self.scheduler.size:
                        self.scheduler.on_resize(0)
                        self._settled = False
                        continue
                    # Let workers end by themselves, so that their exit handlers and threads are not cut short.
                    if not self._processes and not self._launcher.busy:
                        break
                self._wait()
        except BaseException as error:
            self._crash(error)
        finally:
            self._end()

    def _open(self) -> None:
        """Acquire everything that has to be freed again: all of it, or nothing."""
        streams.fill()
        with contextlib.ExitStack() as on_failure:
            super().__init__()
            on_failure.callback(self.close_poll)
            self._wake_up = WakeUp()
            on_failure.callback(setattr, self, "_wake_up", None)
            self.watch(self._wake_up.read, self._wake_up.drain)
            self._launcher = self._make_launcher(self)
            # It may refer to the executor, which is to be collected, and to end its loop, when the user drops it.
            del self._make_launcher
            on_failure.pop_all()
        _loops.add(self)

    def _work(self) -> None:
        """Handle what has come in. Futures come last, because their waiters then compete with this thread."""
        inbox = self._inbox
        while inbox or not self._settled:
            self._settled = True
            while inbox:
                function, args = inbox.popleft()
                function(*args)
            self._decide()
        while self._soon:
            self._soon.pop()()
        if self._records:
            self._hand_over_records()
        results, self._results = self._results, []
        for task, header, frames in results:
            self._resolve(task, header, frames)

    def _decide(self) -> None:
        """Carry out what the scheduler decides after the events so far.

        All calls looked up here were submitted before this begins, so it is enough to look once at what they reach in
        files: a user who changed a file and then submitted did so before this. Calls that are submitted from now on
        wait in the inbox for the next decision, which looks again.
        """
        lookup = self._delivery.lookup
        lookup.remember()
        try:
            for effect in self.scheduler.take_effects():
                self._carry_out(effect)
        finally:
            lookup.forget()

    def _wait(self) -> None:
        """Sleep until something happens, and handle it.

        If the inbox is not empty this looks without sleeping, since callbacks may fill the inbox forever.
        """
        timeout = self.next_timer()
        self._sleeping = True
        if self._inbox:
            timeout = 0.0
        ready = self.poll(timeout)
        self._sleeping = False
        self._settled = False
        self.call_back(ready)

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            self._send(effect.worker, effect.tasks)
        elif isinstance(effect, Launch):
            self._launch(effect.worker, effect.task)
        elif isinstance(effect, LookUp):
            self._look_up(effect.task)
        elif isinstance(effect, Kill):
            self._kill(effect.worker)
        elif isinstance(effect, Recall):
            self._recall(effect.worker, effect.most)
        elif isinstance(effect, Stop):
            self._stop(effect.worker)
        elif isinstance(effect, Fail):
            error = self._broken_by or ExecutorlibSocketError(
                f"Call {effect.task.number} of {effect.task.name} was not run: {effect.reason}. {self._last_death}"
            )
            self._conclude(effect.task, None, error)

    # -- effects ------------------------------------------------------------------------------------------------------

    def _launch(self, worker: Worker, task: Task | None) -> None:
        resources = task.resources if task is not None else self._block_resources
        assert resources is not None
        process = _Process(worker, resources, self._lifetime)
        self._processes[worker.number] = process
        try:
            self._launcher.launch(process)
        except Exception as error:
            if worker.number in self._processes:
                self.on_exit(process, Exit(None, f"it could not be started: {type(error).__name__}: {error}"))
        if task is not None and task.dependents:
            self._on_known(task)

    def _send(self, worker: Worker, tasks: list[Task]) -> None:
        process = self._processes[worker.number]
        transport = process.transport
        assert transport is not None
        # The worker may start a call without asking only if it is the first one and the worker is idle. It must ask if
        # it may first read messages of calls that it gave back: for those it would take the permit of a later call,
        # which would then count as started if the worker dies in this one.
        now = len(worker.calls) == len(tasks) and not process.unread
        held = []
        for task in tasks:
            if not self._announce(task):
                self._settled = False
                self.scheduler.on_unsent(worker, task, CANCELLED)
                self._drop(task)
                continue
            try:
                seconds = self._delivery.hand(process, task, now)
            except BaseException as error:  # whatever the user's objects raise while being pickled
                self._settled = False
                self.scheduler.on_unsent(worker, task, FAILED)
                hidden = misplaced(task.fn, task.args, task.kwargs)
                self._conclude(task, None, advise_unpicklable(error, task.number, task.name, hidden))
                continue
            if process.permits is not None and not now:
                held.append(task.number)
            now = False
            if seconds is not None:
                self._set_deadline(process, task, seconds)
        if held and process.permits is not None:
            process.permits.grant(held)
        transport.flush()

    def _kill(self, worker: Worker) -> None:
        process = self._processes.get(worker.number)
        if process is not None:
            self._launcher.kill(process, signal.SIGKILL)

    def _stop(self, worker: Worker) -> None:
        process = self._processes[worker.number]
        if process.transport is not None:
            process.transport.put(["stop"])
            process.transport.flush()
        if process.resources.run_time_max is not None:
            seconds = process.resources.run_time_max + _GRACE_SECONDS
            self.call_later(seconds, lambda: self._end_leftover(worker.number))

    def _recall(self, worker: Worker, count: int) -> None:
        process = self._processes[worker.number]
        if process.permits is not None:
            self.on_recalled(process, process.permits.take_back(count))

    def on_recalled(self, process: Process, numbers: Sequence[int]) -> None:
        """The worker has given these calls back, so they run elsewhere."""
        known = self._processes.get(process.number)
        if known is not None and (tasks := self._held(known.worker, numbers)):
            known.unread = self._last_taken
            self._settled = False
            self.scheduler.on_recalled(known.worker, tasks)

    @staticmethod
    def _held(worker: Worker, numbers: Sequence[int]) -> list[Task]:
        """Those of a worker's calls that have these numbers."""
        wanted = set(numbers)
        return [task for task in worker.calls if task.number in wanted]

    def _look_up(self, task: Task, may_wait: bool = True) -> None:
        self._settled = False
        try:
            output = self._delivery.look_up(task)
        except BaseException as error:
            self._fail(task, contained(error, f"pickling the arguments of {task.name}", PicklingError))
            return
        if output is not None:
            self.scheduler.on_found(task)
            self._conclude(task, output.value, output.error)
        elif not may_wait or not self._delivery.joins(task):
            self.scheduler.on_missed(task)

    def _on_equal_over(self, task: Task) -> None:
        if not task.over:
            # If there is no result, run all of them at once: one after the other they would take long to fail.
            self._look_up(task, may_wait=False)

    # -- launcher events ----------------------------------------------------------------------------------------------

    def on_connected(self, process: Process) -> None:
        """Send the worker its set-up. A fresh worker, or a job, can then be handed its call."""
        known = self._processes.get(process.number)
        if known is None:
            return  # given up by `detach`
        setup = self._launcher.setup(process)
        try:
            self._delivery.set_up(process, setup)
        except BaseException as error:
            self._break(contained(error, "pickling the init_function"))
            self._kill(known.worker)
            return
        self._settled = False
        self.scheduler.on_connected(known.worker)
        if self._lifetime is Lifetime.BLOCK:  # otherwise the call is sent along
            assert process.transport is not None
            process.transport.flush()

    def on_message(self, process: Process, header: list[Any], frames: list[Frame]) -> None:
        """Handle a message of a worker: it is ready, it logs, or a call is over."""
        known = self._processes.get(process.number)
        if known is None:
            return  # given up by `detach`
        kind, *rest = header
        worker = known.worker
        if kind == "ready":
            self.scheduler.on_started(worker, lookahead=process.permits is not None)
            return
        if kind == "log":
            self._on_record(*rest)
            return
        number, seconds, text, more = rest
        if number == 0:  # not from a call, but from the set-up or the init function before it
            self._on_setup_error(process, frames, text)
            return
        task = self._tasks.get(number)
        if task is None or task.state is not RUNNING:
            return  # already over: timed out, or another rank came first
        if self._log_sizes:
            size = sum(map(serialize.nbytes, frames))
            logger.warning("call %d of %s: received %d bytes", task.number, task.name, size)
        if number > known.unread:
            known.unread = 0
        self.scheduler.on_result(worker, task, seconds, failed=kind == "error", leaving="leaving" in more)
        if kind == "error" and process.resources.cores > 1 and "whole" not in more:
            # The launcher ends and replaces the world, whose other ranks may wait forever for the one that failed.
            self.scheduler.on_planned_exit(worker)
        self._results.append((task, header, frames))

    def _on_record(self, number: int, rank: int, values: dict[str, Any]) -> None:
        task = self._tasks.get(number)
        subject = "the init_function" if number == 0 else f"call {number}"
        values["executorlib_call"] = subject if task is None else f"{subject} of {task.name}"
        values["executorlib_rank"] = rank
        self._records.append(values)

    def _hand_over_records(self) -> None:
        """Give the log records of calls to the handlers in this process, before the calls' futures are done."""
        records, self._records = self._records, []
        for values in records:
            record: Any = None
            try:
                record = logging.makeLogRecord(values)
                named = logging.getLogger(record.name)
                if named.isEnabledFor(record.levelno):
                    named.handle(record)
            except BaseException:  # from the user's handler, filter or record factory; reported as `logging` does
                with contextlib.suppress(BaseException):
                    logging.Handler().handleError(record)

    def _on_setup_error(self, process: Process, frames: list[Frame], text: str) -> None:
        error = answers.rebuild_error(frames, text, "the worker's set-up", self._delivery.loads)
        if self._lifetime is Lifetime.CALL:
            process.verdict = error
        else:
            add_advice(
                error,
                "This was raised while a worker of the block was set up (working directory, variables, init_function), "
                "so no call of this executor can run. Mend the cause and make a new executor.",
            )
            self._break(error)

    def on_exit(self, process: Process, end: Exit) -> None:
        """Conclude or requeue the calls of a worker that is gone."""
        self._settled = False
        known = self._processes.pop(process.number, None)
        if known is None:
            return  # given up by `detach`
        worker = known.worker
        self._delivery.gone(process)
        self._deadlines.pop(worker.number, None)
        recalled = self._held(worker, end.unstarted)
        expected = worker.stopping
        # A worker that was never ready would end the same way every time, so it counts as a death.
        if end.planned and worker.ready:
            self.scheduler.on_planned_exit(worker)
        lost = self.scheduler.on_exit(worker, recalled)
        where = f" (process {process.pid} on {process.host})" if process.pid else ""
        tail = tail_text(process.stderr)
        said = f" Its last lines on standard error:\n{tail}" if tail else " It wrote nothing to standard error."
        if not expected:
            why = str(process.verdict or f"{end.text}.")
            self._last_death = f"The last worker to die{where}: {why}{said}"
        if process.on_gone is not None:
            process.on_gone()
        advice = "Only this call fails; it can be submitted again."
        if self._ended_by:
            advice = f"{self._ended_by} has ended all of the executor's workers."
        verdict = process.verdict
        if isinstance(verdict, TimeLimitError):
            verdict = TimeLimitError(f"{verdict}{said}")
        if self._records:
            self._hand_over_records()
        for task in lost:
            error = verdict or end.error
            if error is None:
                reason = f"its worker{where} ended before it gave one: {end.text}"
                error = ExecutorlibSocketError(
                    f"Call {task.number} of {task.name} has no result: {reason}. {advice}{said}"
                )
                error.wait_status, error.reason = end.status, reason
            self._conclude(task, None, error)

    def on_node_lost(self, name: str) -> None:
        """Tell the scheduler that nothing can run on this node any more."""
        self._settled = False
        for node in [node for node in self._ledger.nodes if node.name == name]:
            self.scheduler.on_node_lost(node)

    # -- deadlines ----------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call back at the end of this turn."""
        self._soon.append(callback)

    def _set_deadline(self, process: _Process, task: Task, seconds: float) -> None:
        # One timer for all: a timer for each call would stay until it is due, and limits may be days.
        self._deadlines[process.number] = (time.monotonic() + seconds, task.number)
        self._deadline.within(seconds)

    def _on_deadline(self) -> None:
        now = time.monotonic()
        for worker_number, (due, number) in list(self._deadlines.items()):
            if due <= now:
                del self._deadlines[worker_number]
                self._expire(worker_number, number)
        if self._deadlines:
            self._deadline.within(max(0.0, min(self._deadlines.values())[0] - now))

    def _expire(self, worker_number: int, number: int, seen: int = 0, looks: int = _MOST_LOOKS) -> None:
        """The time of a call is over: end its worker if it still runs."""
        task = self._tasks.get(number)
        process = self._processes.get(worker_number)
        if process is None:
            return
        worker = process.worker
        if self._lifetime is Lifetime.CALL and (task is None or task.over):
            # The process may be about to exit, as it should.
            self.call_later(_GRACE_SECONDS, lambda: self._end_leftover(worker_number))
            return
        if task is None or task.state is not RUNNING or task not in worker.calls:
            return
        told = len(process.stderr) if has_stack(process.stderr) else 0
        if looks and not (told and told == seen):  # its stack has not arrived, or not completely
            self.call_later(_LOOK_SECONDS, lambda: self._expire(worker_number, number, told, looks - 1))
            return
        limit = task.resources.run_time_max
        assert limit is not None
        process.verdict = TimeLimitError(over_time(f"Call {number} of {task.name}", limit))
        self.scheduler.on_planned_exit(worker)
        self._kill(worker)

    def _end_leftover(self, worker_number: int) -> None:
        """Kill a worker that does not end when it should: exit handlers and threads of calls have a limit, too."""
        process = self._processes.get(worker_number)
        if process is not None:
            logger.warning(
                "process %d on %s was killed: its calls were over, but exit handlers or threads that they left went on "
                "beyond their run_time_max of %g s",
                process.pid,
                process.host,
                process.resources.run_time_max,
            )
            self._kill(process.worker)

    # -- futures ------------------------------------------------------------------------------------------------------

    def _announce(self, task: Task) -> bool:
        """Tell a future that its call starts; returns False if it was cancelled."""
        if not task.announced:
            task.announced = True
            return task.future.set_running_or_notify_cancel()
        return True

    def _resolve(self, task: Task, header: list[Any], frames: list[Frame]) -> None:
        kind, _, _, text, more = header
        if "other" in more:
            self._delivery.lookup.tell_of_change(task)
        if text and kind == "result":
            logger.warning("call %d of %s: %s", task.number, task.name, text)
        # The error gets no name here: its traceback may lead to this frame, and only a collection could free both.
        self._conclude(task, *answers.rebuild(task, header, frames, self._delivery.loads))

    def _fail(self, task: Task, error: BaseException) -> None:
        """Fail a call that has not started."""
        self.scheduler.on_failed(task)
        self._conclude(task, None, error)

    def _conclude(self, task: Task, value: Any, error: BaseException | None) -> None:
        """Resolve a call's future and forget the call."""
        future = task.future
        dependents = task.dependents
        if error is not None and isinstance(future, CallFuture):
            future._failed_call = f"call {task.number} of {task.name}"
            future._unasked = self._failures.add(future, future._failed_call, error)
        self._drop(task)
        try:
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        except InvalidStateError:
            # It was cancelled at the last moment, before it started.
            if not task.announced:
                task.announced = True
                future.set_running_or_notify_cancel()
        except BaseException:  # from a callback; the future itself only handles Exceptions
            logger.exception("a callback of a future raised")
        if dependents:
            # After a failure, callbacks have posted the error to them, which is handled before the next decision.
            self._on_known(task)

    def _drop(self, task: Task) -> None:
        self._tasks.pop(task.number, None)
        if task.cache_path is not None:
            for other in self._delivery.over(task):
                self.post(self._on_equal_over, other)
        if isinstance(task.future, CallFuture):
            task.future._on_cancel = None
        task.release()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _break(self, error: BaseException) -> None:
        """The workers of a block cannot be set up: fail all its calls with the reason."""
        self._broken_by = error
        self._settled = False
        self.scheduler.on_break(f"the workers cannot be set up: {error}")

    def _crash(self, error: BaseException) -> None:
        """Fail all calls: a bug of ours must not leave futures pending."""
        logger.critical("executorlib's loop failed; all its calls fail with it", exc_info=error)
        with self._submit_lock:
            self._refusal = self._refusal or f"the executor has failed: {error!r}"
        while self._inbox:
            function, args = self._inbox.popleft()
            if function == self._on_submit:
                self._tasks[args[0].number] = args[0]
        for task in list(self._tasks.values()):
            failure = ExecutorlibSocketError(
                f"Call {task.number} of {task.name} was lost: executorlib failed: {error!r}"
            )
            failure.__cause__ = error
            self._conclude(task, None, failure)

    def _end(self) -> None:
        try:
            self._launcher.close()
        finally:
            self.close_poll()
            self._wake_up = None
            self._delivery.close()
            if not self._ended_by:  # otherwise the user ended the calls, and knows
                self._failures.tell()
            _loops.discard(self)
            self._let_go.set()
            self._ended.set()

    def after_fork(self) -> None:
        """In a forked copy of the user's process, let go of everything, but leave what the parent shares untouched."""
        self._refusal = (
            "this executor belongs to the process that made it; after a fork, make a new one in the child process"
        )
        self._sleeping = False
        self._submit_lock = RLock()
        if self._wake_up is not None:
            self._callbacks.pop(self._wake_up.read, None)  # it closes by itself
            self._wake_up = None
        for fd in self._callbacks:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._callbacks.clear()
        _loops.discard(self)


def _cancel(cancel: Callable[[], object], future: Future[Any]) -> bool:
    """Cancel a future, whatever its callbacks raise; return whether it is cancelled."""
    try:
        cancel()
    except BaseException:
        logger.exception("a callback of a future raised")
    return future.cancelled()


# Their threads keep them alive anyway. A WeakSet cannot be listed while another thread removes something.
_loops: set[Loop] = set()


def running_loops() -> list[Loop]:
    """The loops of this process that have not ended."""
    return list(_loops)
