"""A worker's work: take a call, run it, answer.

The same for forked and for spawned workers, for one call and for many. Ranks of an MPI world use `run` from here too.

Messages to a worker are ``["setup", {...}]``, once, ``["call", number, function number, options]``, ``["forget"]`` and
``["stop"]``. What goes with call after call, the function's pickle and what is known of its sources, has a number; what
the worker does not have yet comes first among a call's frames, and the option ``new`` has the numbers. Answers are
``["ready"]``, ``["result", number, seconds, warning, more]`` and ``["error", number, seconds, traceback, more]``, where
number 0 is the init function, and ``more`` may say ``leaving``: that nothing is left of the process but to exit, and
``other``: that what ran is not what was looked up in the cache. `worker.records` sends what calls log beside.
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
    from executorlib.worker.protocol import Permits
    from executorlib.worker.records import Reporter

    class Beginning(Protocol):
        """Is told of a call that was unpickled, before it runs; must not raise."""

        def begin(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Take it in."""
            ...


# Characters of a text that travels in a message's header, where one takes twelve bytes at most: see `bounded`.
_MOST_TEXT = 1_000_000


class OnlyHere:
    """Around code of the user's: of a process that it forks, and that comes back from it as well, nothing remains.

    Only the process that was given a call may answer it, keep its result, or go on as a worker. So the copy ends here,
    by the code that a script would end with, and without a touch on what it shares with the worker: sockets, permits,
    exit handlers, and what was printed and not yet written, which the worker writes.
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
                # Not by `sys.stderr`, which may hold what the worker has yet to write.
                text = f"{error.code}\n" if isinstance(error, SystemExit) else traceback_text(error)
                os.write(2, text.encode(errors="replace"))
        finally:
            os._exit(code & 0xFF)


class Answer:
    """How a call ended: ``frames`` hold the pickled result, or exception where ``traceback`` is not empty.

    Its function took so many ``seconds``. Without being ``loaded`` it did not begin, for what its surroundings lack: a
    module, or a file of its inputs.
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
    """Unpickle a call, run it and pickle its result; whatever goes wrong becomes the answer.

    Args:
        function: The pickled function.
        arguments: Frames of the pickled pair of positional and keyword arguments.
        values: Defaults for parameters that the caller left out.
        options: ``error_log_file`` and ``limit``, as the executor sent them. At its limit the call writes to standard
            error where it is; it is for the executor to end it.
        entry: Where the result is to be kept. The answer is one frame then, for whoever waits and for the entry: what
            is pickled twice may have changed in between, by a thread that the function has left behind.
    """
    fn: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    stage = "the call could not be unpickled in its worker"
    loaded = False
    if "limit" in options:
        seconds, end = options["limit"]
        left = end - time.time()  # less, as it may have taken this process a while to start
        with contextlib.suppress(Exception):  # too long a time, or no thread to be had
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
                if hasattr(error, "add_note"):  # from Python 3.11 on
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
    """What of an exception that ends programs goes to the user's program."""
    from pickle import PicklingError

    from executorlib.errors import contained  # takes a third of a worker's start

    if not loaded:
        return contained(error, f"call of {name}: unpickling the arguments of the function")
    if pickling:
        return contained(error, f"call of {name}: pickling the result of the function", PicklingError)
    return contained(error, f"call of {name}: the function")


def named_inputs(kwargs: dict[str, Any], ranks: int, init: str) -> dict[str, Any]:
    """The keyword arguments of a call with what else makes its result another one: what its key is derived from.

    The session that looks a call up and the process that runs it both ask here.

    Args:
        kwargs: The keyword arguments.
        ranks: On how many ranks it runs: its result is a list of as many.
        init: Name of the key of the init function, which fills parameters that the caller left out; empty without one.
    """
    # Only keywords that were given as `**{"...": value}` are no identifiers; they are kept apart from what is added.
    inputs = {name if name.isidentifier() else f"keyword {name}": value for name, value in kwargs.items()}
    if ranks > 1:
        inputs["number of ranks"] = ranks
    if init:
        inputs["init function"] = init
    return inputs


class Defaults:
    """What fills parameters that callers leave out.

    Args:
        slot: The worker's number in its block.

    Attributes:
        values: By the name of the parameter.
        init: The key of the init function that gave them, where results are kept.
    """

    def __init__(self, slot: int = 0) -> None:
        self.values: dict[str, Any] = {"executorlib_worker_id": slot}
        self.init: Key | None = None
        self._problem = ""  # why nothing can be kept

    def initialize(self, frames: Sequence[Frame], key: list[Any] | None) -> None:
        """Run an init function and check what it returns.

        Args:
            frames: The function; behind the sources of its key, where there is one.
            key: The executor's key of it, less these, where results are kept and it has one.
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
        """The key of what runs here, as of every call; see `worker.entry`."""
        if key is None:
            raise ValueError("none could be derived as this worker was started")
        from executorlib.keys import fingerprint

        return fingerprint.recompute(key, function, (), {})

    def entry(
        self, function: Frame, options: dict[str, Any], kept: dict[int, bytes], whole: bool = True
    ) -> Entry | None:
        """A call's entry in the cache; None where it has none.

        Args:
            function: The pickled function.
            options: ``cache``, as the executor sent it, and ``sources``, the number of the sources of its key, if any.
            kept: What this worker keeps, by its number.
            whole: Whether it is written here.
        """
        if "cache" not in options:
            return None
        from executorlib.worker.entry import Entry

        known = kept[options["sources"]] if "sources" in options else b""
        entry = Entry(options["cache"], function, known, self.init, whole)
        entry.problem = self._problem
        return entry


def traceback_text(error: BaseException) -> str:
    """The traceback as the interpreter would print it, without the frames of this module."""
    import traceback

    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def bounded(text: str, most: int = _MOST_TEXT) -> str:
    """The text without its middle where it is too long for a message's header, which is no place for data.

    An exception itself, with all that it says, travels beside its text whatever its size.

    Args:
        text: The text.
        most: Characters that are not too many.
    """
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters were left out here ...\n{text[-half:]}"


def dump_error(error: BaseException) -> list[Frame]:
    """Pickle an exception; one that cannot be pickled and rebuilt is replaced by one that can."""
    try:
        frames = serialize.dumps(error)
        serialize.loads(frames)
        return frames
    except Exception as reason:
        with contextlib.suppress(Exception):
            data = serialize.dumps_exception(error)
            serialize.loads([data])
            return [data]
        # Without the original: its traceback travels as text beside it.
        text = (
            f"{type(error).__name__}: {_safe_str(error)} (the exception itself cannot be pickled: "
            f"{type(reason).__name__}: {_safe_str(reason)})"
        )
        return serialize.dumps(RuntimeError(text))


def dump_setup_error(error: BaseException) -> list[Frame]:
    """The same for what was raised before the first call: by the init function, or by the system."""
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
    """What `repr` says, or else what it is."""
    try:
        return repr(obj)
    except Exception:
        return f"<{type(obj).__name__}>"


def log_error(path: str, fn: object, args: object, kwargs: object, text: str) -> None:
    """Append to the user's error log what the function raised, and on which inputs."""
    entry = f"function: {safe_repr(fn)}\nargs: {safe_repr(args)}\nkwargs: {safe_repr(kwargs)}\n{text}\n"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "a", encoding="utf-8") as log:
            log.write(entry)
    except OSError as error:
        sys.stderr.write(f"executorlib: cannot append to error_log_file {path}: {error}\n")


def tell_crashes() -> None:
    """Have this process write where it was, should it crash, to standard error, of which error texts have the end."""
    if faulthandler.is_enabled():  # by the user's options, or before this process was forked
        return
    if sys.version_info >= (3, 14):
        faulthandler.enable(2, all_threads=False, c_stack=False)
    else:
        faulthandler.enable(2, all_threads=False)


def set_up(setup: dict[str, Any]) -> None:
    """Make the process what its call expects, before anything of the user is imported.

    Args:
        setup: Optional keys ``defaults`` (variables, which count where there is none of the name), ``env`` (changes;
            None removes), ``path`` (`sys.path`), ``argv``, ``cwd``, ``threads``,
            ``gpus`` (device names), ``cores`` (CPU numbers to pin to), ``node`` (a number of CPUs and a list of device
            names: ``cores`` and ``gpus`` count among these, which may be called otherwise here), ``shown_gpus``
            (whether what started the process has set one of the variables that name devices), ``settings`` (see
            `worker.settings`). The caller sees to the others: ``records`` (whether the executor wants what is logged),
            ``slot`` and ``init_key``.
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
        # Where the system lets this process use other CPUs than it was given, nobody knows which are its own.
        cores = _as_called_here(cores, range(setup["node"][0]), sorted(os.sched_getaffinity(0)), [])
    if cores and hasattr(os, "sched_setaffinity"):
        # Pinning is a help, not a need: a control group may have taken CPUs away meanwhile.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
    if "settings" in setup:
        from executorlib.worker import settings  # which forked workers mostly have from their agent

        settings.apply(setup["settings"])
    cwd = setup.get("cwd")
    if cwd is not None:
        os.chdir(cwd)


def _as_called_here(
    names: list[Any], there: Sequence[Any], here: Sequence[Any], unknown: list[Any] | None = None
) -> list[Any]:
    """Translate names from one list of all there are to another, or to ``unknown`` where these do not match."""
    if len(there) != len(here):
        return names if unknown is None else unknown
    translated = dict(zip(there, here, strict=True))
    return [translated[name] for name in names]


def serve(connection: Connection | Reporter, permits: Permits | None) -> None:
    """Run calls until there are no more.

    Args:
        connection: To the executor.
        permits: Which calls to start, for a worker of a block; without, one call is run.
    """
    setup_message = connection.receive()
    if setup_message.header[0] == "stop":
        return  # nobody waits for this worker any more
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
            # Taken back; but the function that came with it may be used again.
            keep(kept, options, message.frames)
        # Not kept while waiting for the next: it may hold large arrays.
        del message


def keep(kept: dict[int, bytes], options: dict[str, Any], frames: list[Frame]) -> list[Frame]:
    """Keep what came with a call for those that follow; the other frames, those of its arguments, are returned.

    Args:
        kept: What this worker keeps, by its number.
        options: The call's; ``new`` has the numbers of what came.
        frames: The call's.
    """
    numbers = options.get("new", ())
    kept.update(zip(numbers, map(bytes, frames), strict=False))
    return frames[len(numbers) :]


def _run_one(
    connection: Connection | Reporter, message: Message, defaults: Defaults, kept: dict[int, bytes], *, last: bool
) -> bool:
    """Run a call and answer; return whether the process, if this was its last call, has nothing left to do."""
    _, number, function_number, options = message.header
    arguments = keep(kept, options, message.frames)
    function = kept[function_number]
    entry = defaults.entry(function, options, kept)
    started = time.perf_counter()
    answer = run(function, arguments, defaults.values, options, entry)
    seconds = time.perf_counter() - started
    warning = "" if entry is None or answer.traceback else entry.store(answer.frames[0], answer.seconds)
    flush()  # what the function printed comes before its result
    # Threads and exit handlers of the function may take any time after its result.
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
    """Write out what was printed, by Python and by C's stdio, of which `os._exit` would lose the rest."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # closed or replaced by the user's function
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
    """End this process as the interpreter would: wait for threads, run exit handlers, flush; but nothing inherited.

    Args:
        code: Exit code.
        last: Called after all that.
    """
    try:
        with OnlyHere():
            try:
                threading._shutdown()  # type: ignore[attr-defined]
            except BaseException as error:  # a signal that comes while threads are waited for
                sys.stderr.write(traceback_text(error))
            atexit._run_exitfuncs()
    finally:
        try:
            flush()
            if last is not None:
                last()
        finally:
            os._exit(code)
