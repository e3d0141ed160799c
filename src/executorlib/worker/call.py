"""A worker's work: take a call, run it, answer.

This is the same for forked and spawned workers, and for one call or many. Ranks of an MPI world use `run`, too.

Messages to a worker are ``["setup", {...}]`` (once), ``["call", number, function number, options]``, ``["forget"]`` and
``["stop"]``. The parts that many calls share, the function's pickle and the sources of its key, have numbers. A part
that the worker does not have yet comes first among a call's frames, and the option ``new`` lists its number. Answers
are ``["ready"]``, ``["result", number, seconds, warning, more]`` and ``["error", number, seconds, traceback, more]``.
The number of the init function is 0. ``more`` may say ``leaving`` (the process has nothing left to do but exit) and
``other`` (the call ran with other code or inputs than were looked up). `worker.records` also sends what calls log.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import importlib
import os
import sys
import threading
import time

from executorlib import serialize
from executorlib.worker.function import Function
from executorlib.worker.protocol import GPU_VARIABLES, THREAD_VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any, Protocol

    from executorlib.keys.fingerprint import Key
    from executorlib.serialize import Frame
    from executorlib.transports.messages import Connection, Message
    from executorlib.worker.entry import Entry
    from executorlib.worker.protocol import WorkerPermits
    from executorlib.worker.records import Reporter

    class Beginning(Protocol):
        """Is told of a call after it was unpickled and before it runs. It must not raise."""

        def begin(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Take note of the call."""
            ...


# The most characters of a text in a message's header, where a character takes at most twelve bytes; see `bounded`.
_MOST_TEXT = 1_000_000


class OnlyHere:
    """Wraps the user's code: if that forks a process which returns from it as well, the copy ends here.

    Only the process that was given a call may answer it, keep its result, or go on as a worker. The copy ends with the
    exit code that a script would have, and does not touch what it shares with the worker: sockets, permits, exit
    handlers, and printed text that is not written yet, which the worker writes.
    """

    __slots__ = ("_process",)

    def __enter__(self) -> None:
        self._process = os.getpid()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._process:
            return
        code = 1
        try:
            if error is None:
                code = 0
            elif isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
                code = error.code or 0
            else:
                # Not `sys.stderr`, which may hold text that the worker has yet to write.
                text = f"{error.code}\n" if isinstance(error, SystemExit) else traceback_text(error)
                os.write(2, text.encode(errors="replace"))
        finally:
            os._exit(code & 0xFF)


class Answer:
    """The outcome of a call: ``frames`` hold the pickled result, or the exception if ``traceback`` is not empty.

    The function took ``seconds``. Unless ``loaded``, the call did not begin because its surroundings lack something,
    such as a module or a file of its inputs.
    """

    __slots__ = ("frames", "loaded", "seconds", "traceback")

    def __init__(self, frames: list[Frame], traceback: str, seconds: float = 0.0, loaded: bool = True) -> None:
        self.frames = frames
        self.traceback = bounded(traceback)
        self.seconds = seconds
        self.loaded = loaded


def run(
    function: Frame,
    arguments: Sequence[Frame],
    values: dict[str, Any],
    options: dict[str, Any],
    entry: Beginning | None = None,
) -> Answer:
    """Unpickle a call, run it and pickle its result. Whatever goes wrong becomes the answer.

    Args:
        function: The pickled function.
        arguments: Frames of the pickled pair of positional and keyword arguments.
        values: Defaults for parameters that the caller left out.
        options: ``error_log_file`` and ``limit``, as the executor sent them. When the limit is reached, the call's
            position is written to standard error; ending it is left to the executor.
        entry: Where the result is to be kept. Then the answer is one frame, for the caller as for the entry, because a
            thread that the function left behind may change the result before it is pickled a second time.
    """
    fn: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    stage = "the call could not be unpickled in its worker"
    loaded = False
    if "limit" in options:
        seconds, end = options["limit"]
        left = end - time.time()  # less than the limit, if this process took a while to start
        with contextlib.suppress(Exception):  # the time is too long, or no thread can be started
            faulthandler.dump_traceback_later(left if 0 < left < seconds else seconds, file=2)
    try:
        with OnlyHere():
            fn = serialize.loads([function])
            args, kwargs = serialize.loads(arguments)
            stage, loaded = "", True
            filled = Function(fn).left_out(args, kwargs, values)
            if entry is not None:
                entry.begin(fn, args, kwargs)
        started = time.perf_counter()
        with OnlyHere():
            result = fn(*args, **kwargs, **filled)
        seconds = time.perf_counter() - started
        stage = "the call returned, but its result cannot be pickled"
        with OnlyHere():
            frames: list[Frame] = serialize.dumps(result) if entry is None else [serialize.dumps_in_band(result)]
        return Answer(frames, "", seconds)
    except BaseException as error:
        with OnlyHere():
            text = traceback_text(error)
            name = getattr(fn, "__qualname__", type(fn).__qualname__) if fn is not None else "a function"
            if stage:
                text = f"call of {name}: {stage}\n{text}"
                if hasattr(error, "add_note"):  # Python 3.11 and later
                    error.add_note(f"call of {name}: {stage}")
            told = error if isinstance(error, Exception) else _contained(error, name, loaded, bool(stage))
            frames = dump_error(told)
        if "error_log_file" in options:
            log_error(options["error_log_file"], fn, args, kwargs, text)
        return Answer(frames, text, loaded=loaded)
    finally:
        if "limit" in options:
            faulthandler.cancel_dump_traceback_later()


def _contained(error: BaseException, name: str, loaded: bool, pickling: bool) -> BaseException:
    """Return what reaches the user's program of an exception that would end a program."""
    from pickle import PicklingError

    from executorlib.errors import contained  # takes a third of a worker's start-up time

    if not loaded:
        return contained(error, f"call of {name}: unpickling the arguments of the function")
    if pickling:
        return contained(error, f"call of {name}: pickling the result of the function", PicklingError)
    return contained(error, f"call of {name}: the function")


def named_inputs(kwargs: dict[str, Any], ranks: int, init: str) -> dict[str, Any]:
    """Return the keyword arguments from which a call's key is derived: its own, and whatever else changes its result.

    Both the session that looks a call up and the process that runs it use this function.

    Args:
        kwargs: The keyword arguments.
        ranks: The number of ranks that the call runs on. With several, its result is a list of theirs.
        init: The name of the init function's key, as that function fills parameters that the caller left out; empty if
            there is none.
    """
    # Only keywords given as `**{"...": value}` are not identifiers. The prefix keeps them apart from what is added.
    inputs = {name if name.isidentifier() else f"keyword {name}": value for name, value in kwargs.items()}
    if ranks > 1:
        inputs["number of ranks"] = ranks
    if init:
        inputs["init function"] = init
    return inputs


class Defaults:
    """Values for parameters that callers leave out.

    Args:
        slot: The worker's number in its block.

    Attributes:
        values: The values by parameter name.
        init: The key of the init function that returned them, if results are kept.
    """

    def __init__(self, slot: int = 0) -> None:
        self.values: dict[str, Any] = {"executorlib_worker_id": slot}
        self.init: Key | None = None
        self._problem = ""  # the reason why no result can be kept

    def initialize(self, frames: Sequence[Frame], key: list[Any] | None) -> None:
        """Run an init function and check what it returns.

        Args:
            frames: The function. If it has a key, the sources of the key come first.
            key: The executor's key for it without these sources, if results are kept and there is one.
        """
        expected: Key | None = None
        if key is not None:
            from executorlib.keys import fingerprint

            expected = fingerprint.Key(*key)._replace(sources=bytes(frames[0]))
            frames = frames[1:]
            fingerprint.prepare(expected)
        with OnlyHere():
            function = serialize.loads(frames)
            try:
                self.init = self._key_of(function, expected)
            except Exception as error:
                self._problem = f"the init function has no key: {error}"
            values = function()
        if not isinstance(values, dict):
            raise TypeError(
                f"init_function returned {type(values).__name__}, expected a dict of parameter names and values."
            )
        self.values.update(values)

    @staticmethod
    def _key_of(function: Callable[[], Any], key: Key | None) -> Key:
        """Derive the key of the function that runs here, as for every call; see `worker.entry`."""
        if key is None:
            raise ValueError("none could be derived when this worker was started")
        from executorlib.keys import fingerprint

        return fingerprint.recompute(key, function, (), {})

    def entry(
        self, function: Frame, options: dict[str, Any], kept: dict[int, bytes], whole: bool = True
    ) -> Entry | None:
        """Return a call's entry in the cache, or None if it has none.

        Args:
            function: The pickled function.
            options: ``cache``, as the executor sent it, and ``sources``, the number of the sources of its key, if any.
            kept: What this worker keeps, by number.
            whole: True if the entry is written here.
        """
        if "cache" not in options:
            return None
        from executorlib.worker.entry import Entry

        known = kept[options["sources"]] if "sources" in options else b""
        entry = Entry(options["cache"], function, known, self.init, whole)
        entry.problem = self._problem
        return entry


def traceback_text(error: BaseException) -> str:
    """Return the traceback as the interpreter would print it, without the frames of this module."""
    import traceback

    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def bounded(text: str, most: int = _MOST_TEXT) -> str:
    """Cut the middle out of a text that is too long for a message's header, which is not meant for data.

    The exception itself, with everything that it says, is sent in full beside the text.

    Args:
        text: The text.
        most: The number of characters to keep.
    """
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters were left out here ...\n{text[-half:]}"


def dump_error(error: BaseException) -> list[Frame]:
    """Pickle an exception. If it cannot be pickled and rebuilt, a similar one takes its place."""
    try:
        frames = serialize.dumps(error)
        serialize.loads(frames)
        return frames
    except Exception as reason:
        with contextlib.suppress(Exception):
            data = serialize.dumps_exception(error)
            serialize.loads([data])
            return [data]
        # Not chained to the original, whose traceback is sent beside it as text.
        text = (
            f"{type(error).__name__}: {_safe_str(error)} (the exception itself cannot be pickled: "
            f"{type(reason).__name__}: {_safe_str(reason)})"
        )
        return serialize.dumps(RuntimeError(text))


def dump_setup_error(error: BaseException) -> list[Frame]:
    """Do what `dump_error` does, for an error before the first call, raised by the init function or the system."""
    if not isinstance(error, Exception):
        from executorlib.errors import contained

        error = contained(error, "setting up the worker, the init_function")
    return dump_error(error)


def _safe_str(obj: object) -> str:
    try:
        return str(obj)
    except Exception:
        return "<no text>"


def safe_repr(obj: object) -> str:
    """Return an object's `repr`, or its type's name if that raises."""
    try:
        return repr(obj)
    except Exception:
        return f"<{type(obj).__name__}>"


def log_error(path: str, fn: object, args: object, kwargs: object, text: str) -> None:
    """Append what the function raised, and its inputs, to the user's error log."""
    entry = f"function: {safe_repr(fn)}\nargs: {safe_repr(args)}\nkwargs: {safe_repr(kwargs)}\n{text}\n"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "a", encoding="utf-8") as log:
            log.write(entry)
    except OSError as error:
        sys.stderr.write(f"executorlib: cannot append to error_log_file {path}: {error}\n")


def tell_crashes() -> None:
    """Have this process write its position to standard error if it crashes. Error texts quote the end of that."""
    if faulthandler.is_enabled():  # enabled by the user, or before this process was forked
        return
    if sys.version_info >= (3, 14):
        faulthandler.enable(2, all_threads=False, c_stack=False)
    else:
        faulthandler.enable(2, all_threads=False)


def set_up(setup: dict[str, Any]) -> None:
    """Prepare the process for its call, before anything of the user's is imported.

    Args:
        setup: Optional keys are ``defaults`` (variables, set only where the process has none of the name), ``env``
            (changes; None removes), ``path`` (`sys.path`), ``argv``, ``cwd``, ``threads``, ``gpus`` (device names),
            ``cores`` (CPU numbers to pin to), ``node`` (a number of CPUs and a list of device names; ``cores`` and
            ``gpus`` refer to these, which may have other names here), ``shown_gpus`` (whether what started the process
            has set one of the variables that name devices) and ``settings`` (see `worker.settings`). The caller
            handles the others: ``records`` (whether the executor wants log records), ``slot`` and ``init_key``.
    """
    tell_crashes()
    for name, value in setup.get("defaults", {}).items():
        os.environ.setdefault(name, value)
    for name, value in setup.get("env", {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    threads = str(setup.get("threads", 1))
    for name in THREAD_VARIABLES:
        os.environ[name] = threads
    gpus = setup.get("gpus")
    if gpus and "node" in setup:
        visible = next(filter(None, map(os.environ.get, GPU_VARIABLES)), "")
        gpus = _as_called_here(gpus, setup["node"][1], visible.split(","))
    if gpus:
        for name in GPU_VARIABLES:
            os.environ[name] = ",".join(gpus)
    elif setup.get("shown_gpus"):
        shown = next((devices for name in GPU_VARIABLES if (devices := os.environ.get(name, "-1")) != "-1"), None)
        for name in GPU_VARIABLES if shown is not None else ():
            os.environ[name] = str(shown)
    if "path" in setup:
        sys.path[:] = setup["path"]
    if "argv" in setup:
        sys.argv[:] = setup["argv"]
    cores = setup.get("cores")
    if cores and "node" in setup:
        # If the system lets this process use other CPUs than it was given, nobody knows which are its own.
        cores = _as_called_here(cores, range(setup["node"][0]), sorted(os.sched_getaffinity(0)), [])
    if cores and hasattr(os, "sched_setaffinity"):
        # Pinning is optional: a control group may have taken CPUs away meanwhile.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
    if "settings" in setup:
        from executorlib.worker import settings  # forked workers mostly inherit them from their agent

        settings.apply(setup["settings"])
    cwd = setup.get("cwd")
    if cwd is not None:
        os.chdir(cwd)


def _as_called_here(
    names: list[Any], there: Sequence[Any], here: Sequence[Any], unknown: list[Any] | None = None
) -> list[Any]:
    """Translate names from one complete list to another; return ``unknown`` if the lists do not match."""
    if len(there) != len(here):
        return names if unknown is None else unknown
    translated = dict(zip(there, here, strict=True))
    return [translated[name] for name in names]


def serve(connection: Connection | Reporter, permits: WorkerPermits | None) -> None:
    """Run calls until there are no more.

    Args:
        connection: The connection to the executor.
        permits: Says which calls to start, for a worker of a block. Without it, one call is run.
    """
    setup_message = connection.receive()
    if setup_message.header[0] == "stop":
        return  # nobody needs this worker any more
    setup = setup_message.header[1]
    defaults = Defaults(setup.get("slot", 0))
    try:
        set_up(setup)
        if "records" in setup:
            from executorlib.worker.records import Reporter

            connection = Reporter(connection)
        if setup_message.frames:
            defaults.initialize(setup_message.frames, setup.get("init_key"))
    except BaseException as error:
        connection.send(["error", 0, 0.0, bounded(traceback_text(error)), {}], dump_setup_error(error))
        return
    del setup_message
    if permits is None:
        if _run_one(connection, connection.receive(), defaults, {}, last=True):
            os._exit(0)
        return
    connection.send(["ready"])
    kept: dict[int, bytes] = {}
    while (message := connection.receive()).header[0] != "stop":
        if message.header[0] == "forget":
            kept.clear()
            continue
        _, number, _, options = message.header
        if options.get("now") or permits.allow(number):
            _run_one(connection, message, defaults, kept, last=False)
        else:
            # The call was taken back, but the function that came with it may be used again.
            keep(kept, options, message.frames)
        # Released before waiting for the next message, because it may hold large arrays.
        del message


def keep(kept: dict[int, bytes], options: dict[str, Any], frames: list[Frame]) -> list[Frame]:
    """Keep what came with a call for later calls, and return the other frames, those of the arguments.

    Args:
        kept: What this worker keeps, by number.
        options: The call's options; ``new`` has the numbers of what came.
        frames: The call's frames.
    """
    numbers = options.get("new", ())
    kept.update(zip(numbers, map(bytes, frames), strict=False))
    return frames[len(numbers) :]


def _run_one(
    connection: Connection | Reporter, message: Message, defaults: Defaults, kept: dict[int, bytes], *, last: bool
) -> bool:
    """Run a call and answer. Return True if this was the process's last call and nothing is left to do."""
    _, number, function_number, options = message.header
    arguments = keep(kept, options, message.frames)
    function = kept[function_number]
    entry = defaults.entry(function, options, kept)
    started = time.perf_counter()
    answer = run(function, arguments, defaults.values, options, entry)
    seconds = time.perf_counter() - started
    warning = "" if entry is None or answer.traceback else entry.store(answer.frames[0], answer.seconds)
    flush()  # so that what the function printed arrives before its result
    # Threads and exit handlers that the function left may run for any time after its result.
    leaving = last and threading.active_count() == 1 and atexit._ncallbacks() == 0
    more: dict[str, Any] = {"leaving": True} if leaving else {}
    if entry is not None and entry.is_other and not answer.traceback:
        more["other"] = True
    if answer.traceback:
        connection.send(["error", number, seconds, answer.traceback, more], answer.frames)
    else:
        connection.send(["result", number, seconds, warning, more], answer.frames)
    return leaving


def flush() -> None:
    """Write out what Python and C's stdio have buffered, because `os._exit` would lose it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # the user's function has closed or replaced them
        pass
    _c_flush()(None)


@functools.cache
def _c_flush() -> Callable[[None], int]:
    import ctypes

    flush_files: Callable[[None], int] = ctypes.CDLL(None).fflush
    return flush_files


def load(modules: Sequence[str]) -> None:
    """Import modules ahead of the calls that use them."""
    with OnlyHere():
        for name in modules:
            importlib.import_module(name)


def leave(code: int, last: Callable[[], None] | None = None) -> None:
    """End this process like the interpreter (wait for threads, run exit handlers, flush), but run nothing inherited.

    Args:
        code: The exit code.
        last: Called after all that.
    """
    try:
        with OnlyHere():
            try:
                threading._shutdown()  # type: ignore[attr-defined]
            except BaseException as error:  # a signal arrived while waiting for threads
                sys.stderr.write(traceback_text(error))
            atexit._run_exitfuncs()
    finally:
        try:
            flush()
            if last is not None:
                last()
        finally:
            os._exit(code)
