"""If an object cannot be pickled or unpickled, in either direction, only its own future fails."""

from __future__ import annotations

import collections
import functools
import pickle
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from contract.functions import CustomError, Thing, add, fail, identity, keywords
from executorlib import get_item_from_future
from faults.functions import HoldingError, PickyError, PickyOSError, Unloadable, Unsavable

WAIT = 30
pytestmark = pytest.mark.rows(live=True)


def deep_list() -> list[Any]:
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    return deep


def unpicklable(kind: str) -> Any:
    """A value of this kind that pickle refuses; made where it is used."""
    makers: dict[str, Callable[[], Any]] = {
        "lock": threading.Lock,
        "thread": threading.current_thread,
        "generator": lambda: (i for i in range(3)),
        "file": lambda: sys.__stdin__,
        "frame": sys._getframe,
        "weak reference": lambda: weakref.ref(Thing(1)),
        "memoryview": lambda: memoryview(b"abc"),
        "deep list": deep_list,
        "raises": lambda: Unsavable(CustomError("unsavable")),
        "raises KeyboardInterrupt": lambda: Unsavable(KeyboardInterrupt()),
        "raises SystemExit": lambda: Unsavable(SystemExit(3)),
        "raises MemoryError": lambda: Unsavable(MemoryError()),
        "lock in a closure": _closure,
        "lock in a list": lambda: [1, {"a": threading.Lock()}],
    }
    return makers[kind]()


def _closure() -> Callable[[], Any]:
    lock = threading.Lock()
    return lambda: lock


KINDS = [
    "lock",
    "thread",
    "generator",
    "file",
    "frame",
    "weak reference",
    "memoryview",
    "deep list",
    "raises",
    "raises KeyboardInterrupt",
    "raises SystemExit",
    "raises MemoryError",
    "lock in a closure",
    "lock in a list",
]
# Pickle's depth differs between Pythons, and cloudpickle may save what pickle cannot.
MAY_SUCCEED = {"deep list", "memoryview", "file"}


def check_failed(future: Any, kind: str) -> None:
    error = future.exception(WAIT)
    if kind not in MAY_SUCCEED:
        assert error is not None
    if error is not None and kind != "deep list":
        assert not isinstance(error, BrokenExecutor), "a worker died of it"


@pytest.mark.parametrize("kind", KINDS)
def test_argument(executor: Any, kind: str) -> None:
    value = unpicklable(kind)
    good = executor.submit(add, 1, 2)
    check_failed(executor.submit(identity, value), kind)
    check_failed(executor.submit(identity, value=[value]), kind)
    assert good.result(WAIT) == 3
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_result(executor: Any, kind: str) -> None:
    check_failed(executor.submit(unpicklable, kind), kind)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of exceptions came with Python 3.11")
def test_result_is_named(executor: Any) -> None:
    error = executor.submit(threading.Lock).exception(WAIT)
    assert any("its result cannot be pickled" in note for note in error.__notes__)


@pytest.mark.parametrize("cause", [OSError(24, "Too many open files"), MemoryError()], ids=["files", "memory"])
def test_lack_of_resources_is_not_blamed_on_the_objects(executor: Any, cause: Exception) -> None:
    error = executor.submit(identity, Unsavable(cause)).exception(WAIT)
    assert isinstance(error, type(cause))
    text = "\n".join(getattr(error, "__notes__", [])) + str(error.__cause__)
    assert "identity could not be sent" in text
    assert "ulimit" in text
    assert "cannot be pickled" not in text


@pytest.mark.parametrize("kind", ["lock", "raises", "lock in a closure"])
def test_error_says_which_call_and_why(executor: Any, kind: str) -> None:
    """In a note of the error, or before Python 3.11 in its cause."""

    def told(error: BaseException) -> str:
        return f"{error} {getattr(error, '__notes__', '')} {error.__cause__}"

    assert "identity" in told(executor.submit(identity, unpicklable(kind)).exception(WAIT))
    assert "unpicklable" in told(executor.submit(unpicklable, kind).exception(WAIT))


def array_of(value: object) -> Any:
    numpy = pytest.importorskip("numpy")
    return numpy.array([value, None], dtype=object)


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value

    def get(self) -> object:
        return self.value


def closure_of(value: object) -> Callable[[], object]:
    return lambda: value


# Where nobody looks for futures: the call that has one there, and where the text says that it is.
PLACES: dict[str, tuple[Callable[[object], tuple[Any, ...]], str]] = {
    "array": (lambda value: (identity, array_of(value)), "argument 1 holds"),
    "attribute": (lambda value: (add, 1, Holder(value)), "argument 2 holds"),
    "deque": (lambda value: (identity, collections.deque([value])), "argument 1 holds"),
    "partial": (lambda value: (functools.partial(add, value), 1), "the function holds"),
    "bound method": (lambda value: (Holder(value).get,), "the function holds"),
    "closure": (lambda value: (closure_of(value),), "the function holds"),
    "in a list": (lambda value: (identity, [Holder(value)]), "argument 1 holds"),
}


@pytest.mark.parametrize("place", PLACES)
def test_futures_in_places_that_are_not_searched(executor: Any, place: str) -> None:
    """The error says where the future is, and how to pass it."""
    source = executor.submit(add, 1, 2)
    call, where = PLACES[place]
    for future in (source, get_item_from_future(source, 0), Future()):
        error = executor.submit(*call(future)).exception(WAIT)
        assert isinstance(error, TypeError)
        assert f"{where} a future" in str(error)
        assert "as an argument of its own, or pass future.result()" in str(error)
    assert executor.submit(add, source, 1).result(WAIT) == 4


def test_executors_as_inputs(executor: Any) -> None:
    with ThreadPoolExecutor(1) as threads:
        for other in (executor, threads):
            for call, where in (
                ((identity, other), "argument 1 is"),
                ((identity, [other]), "argument 1 holds"),
                ((other.shutdown,), "the function holds"),
            ):
                error = executor.submit(*call).exception(WAIT)
                assert isinstance(error, TypeError)
                assert f"{where} an executor" in str(error)
                assert "Make one inside the function" in str(error)
        error = executor.submit(keywords, other=executor).exception(WAIT)
        assert "argument 'other' is an executor" in str(error)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.rows("fork")
def test_futures_and_executors_refuse_to_be_pickled(executor: Any) -> None:
    source = executor.submit(add, 1, 2)
    derived = [get_item_from_future(source, 0), *executor.batched([source], 1)]
    for future in (source, *derived):
        with pytest.raises(TypeError, match=r"Future cannot be pickled\. .*future\.result\(\)"):
            pickle.dumps(future)
    with pytest.raises(TypeError, match=r"Executor cannot be pickled: .*inside the function"):
        pickle.dumps(executor)
    error = executor.submit(return_a_future).exception(WAIT)
    assert "CallFuture cannot be pickled" in str(error)


def return_a_future() -> Any:
    from executorlib import SingleNodeExecutor

    with SingleNodeExecutor(max_workers=1) as executor:
        return executor.submit(add, 1, 2)


def test_function(executor: Any) -> None:
    lock = threading.Lock()

    def locked() -> None:
        with lock:
            pass

    assert executor.submit(locked).exception(WAIT) is not None
    assert executor.submit(Unsavable(CustomError("x")).__reduce__).exception(WAIT) is not None
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.parametrize("error", [CustomError("at loading"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_argument_that_cannot_be_loaded(executor: Any, error: BaseException) -> None:
    seen = executor.submit(identity, Unloadable(error)).exception(WAIT)
    assert seen is not None
    assert type(error).__name__ in f"{seen!r} {seen} {seen.__cause__}"
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_argument_whose_module_the_worker_lacks(executor: Any) -> None:
    """A module that a program makes by code cannot be imported elsewhere."""
    import types

    module = types.ModuleType("made_by_hand")
    exec("class Local:\n    pass\ndef f():\n    return 1", module.__dict__)
    sys.modules["made_by_hand"] = module
    try:
        for value in (module.Local(), module.f):
            error = executor.submit(identity, value).exception(WAIT)
            assert "made_by_hand" in str(error)
        assert "made_by_hand" in str(executor.submit(module.f).exception(WAIT))
    finally:
        del sys.modules["made_by_hand"]
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_result_whose_module_the_user_lacks(executor: Any) -> None:
    def make() -> Any:
        import sys
        import types

        module = types.ModuleType("made_in_the_worker")
        exec("class Local:\n    pass", module.__dict__)
        sys.modules["made_in_the_worker"] = module
        return module.Local()

    assert "made_in_the_worker" in str(executor.submit(make).exception(WAIT))
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_error_whose_class_takes_more_than_its_args(executor: Any) -> None:
    """It arrives as what it is, with all that it has."""

    class LocalError(ValueError):
        def __init__(self, *, code: int) -> None:
            super().__init__()
            self.code = code

        def __str__(self) -> str:
            return f"local, {self.code}"

    def picky() -> None:
        error = PickyError(5, "what went wrong")
        if hasattr(error, "add_note"):
            error.add_note("a note")
        raise error

    def of_the_system() -> None:
        raise PickyOSError(2, path="/no/such/file")

    def local() -> None:
        raise LocalError(code=7)

    calls = [executor.submit(fn) for fn in (picky, of_the_system, local)]
    error, of_system, own = [call.exception(WAIT) for call in calls]
    assert type(error) is PickyError
    assert (str(error), error.args, error.code) == ("what went wrong (5)", ("what went wrong (5)",), 5)
    assert getattr(error, "__notes__", ["a note"]) == ["a note"]
    assert "in picky" in str(error.__cause__)
    assert type(of_system) is PickyOSError
    assert (of_system.errno, of_system.filename, of_system.path) == (2, "/no/such/file", "/no/such/file")
    assert str(of_system) == str(PickyOSError(2, path="/no/such/file"))
    assert isinstance(own, ValueError)
    assert (type(own).__name__, str(own), own.args) == ("LocalError", "local, 7", ())
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought groups")
def test_group_of_errors_whose_classes_take_more_than_their_args(executor: Any) -> None:
    def several() -> None:
        raise ExceptionGroup("several", [PickyError(5, "one"), CustomError("two")])  # noqa: F821

    error: Any = executor.submit(several).exception(WAIT)
    assert [type(each) for each in error.exceptions] == [PickyError, CustomError]
    assert str(error.exceptions[0]) == "one (5)"


def test_error_that_cannot_be_rebuilt(executor: Any) -> None:
    """The replacement names its class."""

    class StubbornError(Exception):
        def __reduce__(self) -> Any:
            return int, ("no number",)

    def stubborn() -> None:
        raise StubbornError("what went wrong")

    error = executor.submit(stubborn).exception(WAIT)
    assert isinstance(error, RuntimeError)
    assert "StubbornError: what went wrong" in str(error)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_error_that_cannot_be_pickled(executor: Any) -> None:
    def holding() -> None:
        raise HoldingError("what went wrong")

    error = executor.submit(holding).exception(WAIT)
    assert error is not None
    assert "what went wrong" in f"{error} {error.__cause__}"
    assert "HoldingError" in f"{error!r} {error} {error.__cause__}"
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_error_that_cannot_be_shown(executor: Any) -> None:
    class Unshowable(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

        __repr__ = __str__

    def raise_it() -> None:
        raise Unshowable

    assert executor.submit(raise_it).exception(WAIT) is not None
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_error_chain_that_cannot_be_pickled(executor: Any) -> None:
    def chained() -> None:
        try:
            raise HoldingError("the first")
        except HoldingError as error:
            raise CustomError("the second") from error

    error = executor.submit(chained).exception(WAIT)
    assert "the second" in f"{error} {error.__cause__}"
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_inputs_that_cannot_be_shown(make_executor: Callable[..., Any], tmp_path: Any) -> None:
    """The error log shows inputs; one that has no text must not hide the error."""

    class Shy:
        def __repr__(self) -> str:
            raise ValueError("no text")

    own = {"error_log_file": str(tmp_path / "errors.log")}
    with make_executor(resource_dict=own) as executor:
        error = executor.submit(fail, Shy()).exception(WAIT)
        assert isinstance(error, CustomError)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    assert "CustomError" in (tmp_path / "errors.log").read_text()


def test_sockets_cannot_be_arguments(executor: Any) -> None:
    left, right = socket.socketpair()
    with left, right:
        assert executor.submit(identity, left).exception(WAIT) is not None
    assert executor.submit(add, 1, 2).result(WAIT) == 3
