"""The connection of an executor to a Flux instance.

Flux's library has an event loop of its own (its reactor) for a connection and its futures. The executor's loop sleeps
in that reactor (`Events.sleep_in`), which watches our loop's descriptor. So one thread drives both, everything is an
event, and nothing is polled.

Of Flux's Python bindings only those for connection, submission, events and signals are used. `flux.jobspec` describes
the jobs.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from executorlib.flux.jobspec import blobs_of, errors_in, is_text, job_number, nodes_of
from executorlib.flux.policy import Policy
from executorlib.jobs.system import Refused
from executorlib.launchers.contract import Events
from executorlib.machine import NodeShape
from executorlib.poller import WakeUp

# Called with an event of a job: its name and its context.
OnEvent = Callable[[str, Mapping[str, Any]], None]

FLUX_NAME = "Flux instance "
# Seconds for Flux to answer the last requests; until it has, the connection would stay open.
_CLOSE_SECONDS = 2.0
# Seconds between attempts to follow a job whose events have ended although the job has not.
_AGAIN_SECONDS = 1.0
# The last event of a job.
_LAST_EVENT = "clean"
# Flag to get the place of a value in the key-value store, not the value (RFC 11).
_TREE_OBJECT = 16
# Most pieces of a job's output log, of at most a megabyte each, that are searched for its last words.
_MOST_PIECES = 16
# Name of an event that nobody publishes.
_NO_EVENT = "executorlib.none"
_INSTALL = (
    "Flux's Python bindings are part of flux-core (conda install -c conda-forge flux-core) and belong to one version "
    "of Python. Install executorlib[flux] into the Python that `flux python` runs, or into another Python of the same "
    "version, and add the output of `flux python --get-path` to PYTHONPATH."
)


def connect() -> Any:
    """Connect to the nearest Flux instance, the one in ``FLUX_URI`` or the system's.

    Raises:
        ImportError: Flux's bindings cannot be loaded.
        RuntimeError: There is no instance.
    """
    try:
        import flux
        import flux.job
    except ImportError as error:
        raise ImportError(f"Flux's Python bindings cannot be loaded ({error}). {_INSTALL}", name=error.name) from error
    try:
        return flux.Flux()
    except OSError as error:
        uri = os.environ.get("FLUX_URI")
        where = f"at FLUX_URI={uri}" if uri else "and FLUX_URI is not set"
        raise RuntimeError(
            f"no Flux instance can be reached {where}: {error}. Start the program within one: `flux start python "
            "script.py` on this machine, `srun flux start python script.py` in a Slurm job, or as a job of Flux "
            "(`flux batch`, `flux alloc`)."
        ) from error


def known_instance() -> tuple[list[NodeShape], Policy]:
    """The nodes of the nearest Flux instance, including those that are down, and what it demands of jobs.

    Raises:
        ImportError: Flux's bindings cannot be loaded.
        RuntimeError: There is no instance.
    """
    connection = connect()
    nodes = nodes_of(connection.rpc("resource.sched-status", nodeid=0).get()["all"])
    config: dict[str, Any] = {}
    with contextlib.suppress(OSError):  # it tells nobody, but will refuse what it does not accept
        config = connection.rpc("config.get").get() or {}
    return nodes, Policy(config)


def cancel_jobs(instance: str, names: Sequence[str]) -> None:
    """Cancel jobs and wait for the answers; jobs that have already ended do not matter.

    Args:
        instance: The instance's name, as given by `instance_name`; empty for the nearest.
        names: Ids of jobs.

    Raises:
        ImportError: Flux's bindings cannot be loaded.
        RuntimeError: There is no instance, or it is another one.
    """
    connection = connect()
    nearest = instance_name(connection)
    if instance not in ("", nearest):
        raise RuntimeError(
            f"the jobs belong to {instance}, but the instance that can be reached from here is {nearest}. Set FLUX_URI "
            "to the former; if it has ended, so have its jobs, and their entries can be removed (`executorlib cache "
            "rm`)."
        )
    from flux.job import cancel_async

    for answer in [cancel_async(connection, job_number(name)) for name in names]:
        with contextlib.suppress(OSError):
            answer.get()


def instance_name(connection: Any) -> str:
    """The `BatchSystem.name` of an instance, which is unique because job numbers mean nothing in another instance."""
    for attribute in ("broker.uuid", "broker.starttime"):  # the first is newer
        with contextlib.suppress(OSError):
            value = connection.rpc("attr.get", {"name": attribute}, nodeid=0).get()["value"]
            return f"{FLUX_NAME}{value}"
    return FLUX_NAME.rstrip()


class FluxInstance:
    """A connection driven by the loop, in whose thread all callbacks come.

    Args:
        events: The loop.
        on_lost: Called once, with the reason, when the connection has ended; open requests are refused after that.
        submit_by: A `flux.job.FluxExecutor` that the user has made for the same instance, and that submits for us.
    """

    def __init__(self, events: Events, on_lost: Callable[[str], None], submit_by: Any = None) -> None:
        self._events = events
        self._on_lost = on_lost
        self._submit_by = submit_by
        self._submitted: deque[Callable[[], None]] = deque()  # appended by threads of that executor
        self._wake_up: WakeUp | None = None
        self._flux: Any = None
        self._reactor: Any = None
        self._watcher: Any = None
        self._timer: Any = None
        self._presence: Any = None
        # Names from Flux's library, set once it is loaded: flags of the reactor, and the function that sets a timer.
        self._only_look = self._wait_once = 0
        self._set_timer: Any = None
        self._numbers = itertools.count(1)
        # Requests that Flux has not fully answered, by number: the future, and what to call if no answer will come.
        self._pending: dict[int, tuple[Any, Callable[[Refused], None]]] = {}
        self._watched: dict[int, Any] = {}  # futures of those that are events
        self._wanted: set[int] = set()  # those that somebody is still interested in
        self.lost = ""
        self.is_owner = True  # otherwise some urgencies are not for us
        self.name = FLUX_NAME.rstrip()
        self.socket = ""  # of the broker on this machine

    def open(self) -> None:
        """Connect. The connection belongs to the thread that does this, which must be the loop's.

        Raises:
            ImportError: Flux's bindings cannot be loaded.
            RuntimeError: There is no instance.
        """
        if self._flux is not None or self.lost:
            return
        self._flux = connect()
        from flux.constants import FLUX_MSGTYPE_EVENT, FLUX_POLLIN, FLUX_REACTOR_NOWAIT, FLUX_REACTOR_ONCE
        from flux.core.inner import raw

        self._only_look, self._wait_once = FLUX_REACTOR_NOWAIT, FLUX_REACTOR_ONCE
        self._set_timer = raw.flux_timer_watcher_reset
        self.is_owner = self._flux.attr_get("security.owner") == str(os.getuid())
        self.name = instance_name(self._flux)
        self.socket = self._flux.attr_get("local-uri").removeprefix("local://")
        self._reactor = self._flux.get_reactor()
        self._watcher = self._flux.fd_watcher_create(self._events.fileno(), lambda *_: None, FLUX_POLLIN)
        self._timer = self._flux.timer_watcher_create(0.0, lambda *_: None)
        self._watcher.start()
        # The end of the connection wakes up the reactor only while something is expected of it, so always
        # expect something.
        self._presence = self._flux.msg_watcher_create(lambda *_: None, FLUX_MSGTYPE_EVENT, _NO_EVENT)
        self._presence.start()
        self._events.sleep_in(self._sleep)
        if self._submit_by is not None:
            self._wake_up = WakeUp()
            self._events.watch(self._wake_up.read, self._on_wake)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._set_timer(self._timer.handle, seconds, 0.0)
            self._timer.start()
        try:
            ended = self._flux.reactor_run(self._reactor, self._only_look if seconds == 0 else self._wait_once)
        except OSError:  # means the same
            ended = -1
        if seconds > 0 and not self.lost:
            self._timer.stop()
        if ended < 0:
            self._lose("its broker or the connection to it has ended")

    def _lose(self, why: str) -> None:
        if not self.lost:
            self.lost = f"the Flux instance was lost: {why}"
            self._events.sleep_in(None)
            self._events.call_later(0.0, self._tell_loss)

    def _tell_loss(self) -> None:
        for future in self._watched.values():
            future.needs_cancel = False  # there is nobody left to be told
        self._on_lost(self.lost)
        for _, refuse in list(self._pending.values()):
            refuse(Refused(self.lost))

    # -- jobs -----------------------------------------------------------------------------------------------------

    def submit(self, spec: Mapping[str, Any], urgency: int, on_answer: Callable[[int | Refused], None]) -> None:
        """Submit a job.

        Args:
            spec: Its jobspec.
            urgency: How urgent it is.
            on_answer: Called with the job's number, or with the reason why it was refused.
        """
        if self._submit_by is not None:
            self._have_submitted(spec, urgency, on_answer)
            return
        from flux.job import submit_async, submit_get_id

        def answered(future: Any) -> bool:
            answer: int | Refused
            try:
                answer = int(submit_get_id(future))
            except OSError as error:
                answer = _refused(error, future.error_string())
            on_answer(answer)
            return True

        problem = _not_text(spec)
        if problem is not None:
            refused = Refused(f"Flux accepts only UTF-8, and {problem!r} is not UTF-8")
            self._events.call_later(0.0, lambda: on_answer(refused))
            return
        text = json.dumps(spec)
        self._ask(next(self._numbers), lambda flux: submit_async(flux, text, urgency), answered, on_answer)

    def _have_submitted(
        self, spec: Mapping[str, Any], urgency: int, on_answer: Callable[[int | Refused], None]
    ) -> None:
        def find_out(future: Any) -> None:
            try:
                answer: int | Refused = int(future.jobid(0))
            except Exception as error:
                answer = Refused(str(error))
            on_answer(answer)

        def tell(future: Any) -> None:  # in another thread
            self._submitted.append(lambda: find_out(future))
            wake_up = self._wake_up
            if wake_up is not None:
                with contextlib.suppress(BlockingIOError):  # full: the loop is awake already
                    os.write(wake_up.write, b"\0")

        if self.lost:
            lost = Refused(self.lost)
            self._events.call_later(0.0, lambda: on_answer(lost))
            return
        try:
            self._submit_by.submit(json.dumps(spec), urgency=urgency).add_jobid_callback(tell)
        except RuntimeError as error:  # it was shut down
            refused = Refused(f"the flux_executor says: {error}")
            self._events.call_later(0.0, lambda: on_answer(refused))

    def _on_wake(self) -> None:
        if self._wake_up is not None:
            self._wake_up.drain()
        while self._submitted:
            self._submitted.popleft()()

    def watch(self, job: int, on_event: OnEvent) -> int:
        """Report all events of a job, past and future. An empty name means that there are no more, or no such job.

        Args:
            job: Number of the job.
            on_event: Called with each event.

        Returns:
            The key for `unwatch`.
        """
        key = next(self._numbers)
        self._wanted.add(key)
        self._follow(key, job, on_event, 0, "")
        return key

    def _follow(self, key: int, job: int, on_event: OnEvent, told: int, last: str) -> None:
        """Report the events of a job, except for the first ones, which were reported before.

        Flux ends the event streams of all jobs when it unloads the module that sends them: to load it again, or when
        the instance is shut down, which is followed by the loss of the instance.
        """
        from flux.job import event_watch_async

        seen = 0

        def end(is_known: bool) -> None:
            self._watched.pop(key, None)
            if key not in self._wanted:
                return
            if is_known and last != _LAST_EVENT and not self.lost:
                self._events.call_later(_AGAIN_SECONDS, lambda: self._follow(key, job, on_event, max(seen, told), last))
                return
            self._wanted.remove(key)
            on_event("", {})

        def answered(future: Any) -> bool:
            nonlocal seen, last
            is_known = True
            try:
                event = future.get_event()
            except OSError as error:
                event = None
                future.needs_cancel = False
                is_known = error.errno != errno.ENOENT
            if event is None:
                end(is_known)
                return True
            seen += 1
            if seen > told and key in self._wanted:
                last = event.name
                on_event(event.name, event.context)
            return False

        def begin(flux: Any) -> Any:
            self._watched[key] = event_watch_async(flux, job)
            return self._watched[key]

        if key in self._wanted:
            self._ask(key, begin, answered, lambda refused: end(False))

    def read_errors(self, job: int, most: int, on_read: Callable[[bytes], None]) -> None:
        """Read the end of what a job has written to standard error.

        Its output log may be large, and would come in as many events as it has lines. So the owner of the instance, who
        is allowed to, reads the last pieces of the log from Flux's stores. For others, logs are limited to 10 MB.

        Args:
            job: Number of the job, which has ended.
            most: Most bytes to read.
            on_read: Called with them, once.
        """
        from flux.job import JobID

        def look_up() -> None:
            def take(answer: Any) -> None:
                on_read(errors_in(answer["guest.output"].encode(), most))

            asked = {"id": job, "keys": ["guest.output"], "flags": 0}
            self._call("job-info.lookup", asked, take, lambda: on_read(b""))

        def take_place(answer: Any) -> None:
            inline, pieces = blobs_of(answer["val"])
            if pieces:
                load(pieces[-_MOST_PIECES:], b"")
            else:
                on_read(errors_in(inline, most))

        def load(pieces: list[bytes], found: bytes) -> None:
            def take(piece: bytes) -> None:
                errors = (errors_in(piece, most) + found)[-most:]
                if len(errors) < most and pieces[:-1]:
                    load(pieces[:-1], errors)
                else:
                    on_read(errors)

            self._load(pieces[-1], take, lambda: on_read(found))

        if not self.is_owner:
            look_up()
            return
        key = {"key": f"{JobID(job).kvs}.guest.output", "namespace": "primary", "flags": _TREE_OBJECT}
        self._call("kvs.lookup", key, take_place, look_up)

    def _call(
        self, topic: str, asked: Mapping[str, Any], on_answer: Callable[[Any], None], on_error: Callable[[], None]
    ) -> None:
        """Call one of Flux's services."""

        def answered(future: Any) -> bool:
            try:
                answer = future.get()
            except OSError:
                on_error()
            else:
                on_answer(answer)
            return True

        self._ask(next(self._numbers), lambda flux: flux.rpc(topic, asked), answered, lambda refused: on_error())

    def _load(self, digest: bytes, on_loaded: Callable[[bytes], None], on_error: Callable[[], None]) -> None:
        """Load a piece of a value from the content store, whose requests and answers are not JSON."""
        from flux.constants import FLUX_NODEID_ANY
        from flux.core.inner import ffi, raw
        from flux.future import Future
        from flux.rpc import RPC

        def begin(flux: Any) -> Any:
            asked = raw.flux_rpc_raw(flux.handle, b"content.load", digest, len(digest), FLUX_NODEID_ANY, 0)
            return Future(asked, prefixes=["flux_rpc_", "flux_future_"], pimpl_t=RPC.RPCInnerWrapper)

        def answered(future: Any) -> bool:
            data, size = ffi.new("void *[1]"), ffi.new("size_t [1]")
            try:
                future.pimpl.flux_rpc_get_raw(data, size)
            except OSError:
                on_error()
            else:
                on_loaded(bytes(ffi.buffer(data[0], size[0])))
            return True

        self._ask(next(self._numbers), begin, answered, lambda refused: on_error())

    def unwatch(self, key: int, ends_soon: bool = False) -> None:
        """Report no more events.

        Args:
            key: What `watch` returned.
            ends_soon: Whether the events are about to end anyway, so that Flux need not be told.
        """
        self._wanted.discard(key)
        if not ends_soon:
            future = self._watched.pop(key, None)
            if future is not None and not self.lost:
                with contextlib.suppress(OSError):
                    future.cancel()
                future.needs_cancel = False

    def end(self, job: int, kind: str, why: str = "") -> None:
        """Raise an exception that ends a job, waiting or running; a job that has ended does not matter.

        Args:
            job: Number of the job.
            kind: Type of the exception: ``cancel`` or ``timeout``.
            why: Noted with it.
        """
        raised = {"id": job, "severity": 0, "type": kind, "note": why}
        self._tell(lambda flux: flux.rpc("job-manager.raise", raised))

    def kill(self, job: int, signal_number: int) -> None:
        """Signal the tasks of a running job; a job that is not running does not matter."""
        from flux.job import kill_async

        self._tell(lambda flux: kill_async(flux, job, signal_number))

    def _tell(self, begin: Callable[[Any], Any]) -> None:
        def answered(future: Any) -> bool:
            with contextlib.suppress(OSError):
                future.get()
            return True

        self._ask(next(self._numbers), begin, answered, lambda refused: None)

    def _ask(
        self,
        key: int,
        begin: Callable[[Any], Any],
        answered: Callable[[Any], bool],
        on_refused: Callable[[Refused], None],
    ) -> None:
        """Begin a request whose answers come through one of Flux's futures.

        Args:
            key: Number of the request.
            begin: Makes the future.
            answered: Called with the future for each answer; returns whether that was the last.
            on_refused: Called if no answer will come. Never from within this call, because the caller has not yet noted
                that it asked.
        """

        def call_back(future: Any) -> None:
            if answered(future):
                self._pending.pop(key, None)

        text = self.lost
        if not text:
            try:
                self._pending[key] = begin(self._flux).then(call_back), on_refused
                return
            except OSError as error:
                text = str(error)
        refused = Refused(text)
        self._events.call_later(0.0, lambda: on_refused(refused))

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Handle Flux's messages until the condition holds, this many seconds have passed, or the instance is lost."""
        give_up = time.monotonic() + seconds
        while not condition() and not self.lost and (left := give_up - time.monotonic()) > 0:
            self._sleep(left)

    def close(self) -> None:
        """Close the connection; jobs go on."""
        if self._flux is None:
            return
        for key in list(self._watched):  # also of jobs that take long to end
            self.unwatch(key)
        self.wait(lambda: not self._pending, _CLOSE_SECONDS)
        self._release()
        self._events.sleep_in(None)
        for watcher in (self._watcher, self._timer, self._presence):
            watcher.destroy()
        del watcher  # it refers to the connection, which would then stay open in spite of the collection below
        if self._wake_up is not None:
            self._events.unwatch(self._wake_up.read)
            self._wake_up = None
        self._watcher = self._timer = self._presence = self._reactor = self._flux = None
        # Flux's futures and watchers refer to themselves, so they keep the connection open until they are collected.
        gc.collect()
        if not self.lost:
            self.lost = "the executor has ended"

    def _release(self) -> None:
        """Let Flux release the futures that it will never answer, which also releases the connection.

        Flux keeps a future until the future has called back, so each gets an answer, which is ignored.
        """
        if not self._pending:
            return
        for future, _ in self._pending.values():
            future.stop()
            future.pimpl.fulfill_error(errno.ECONNRESET, None)
        self._pending.clear()
        with contextlib.suppress(OSError):  # of a connection that was lost, which the reactor says once more
            self._flux.reactor_run(self._reactor, self._only_look)


def _refused(error: OSError, text: str | None) -> Refused:
    """Flux's reason for refusing a job."""
    if error.errno == errno.ENOSYS:
        return Refused("it no longer accepts jobs, because it is shutting down")
    return Refused(text or str(error))


def _not_text(value: Any) -> str | None:
    """The first text, in a value meant for JSON, that holds bytes which are not characters."""
    if isinstance(value, str):
        return None if is_text(value) else value
    each = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(_not_text, each) if found is not None), None)
