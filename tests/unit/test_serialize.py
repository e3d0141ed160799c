"""User objects to frames and back; each function's state as of its submit."""

from __future__ import annotations

import collections
import functools
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executorlib import serialize
from executorlib.keys.fingerprint import _is_by_name
from executorlib.serialize import (
    _OUT_OF_BAND_BYTES,
    FunctionPickler,
    dumps,
    dumps_arguments,
    dumps_in_band,
    is_by_name,
    loads,
)
from unit.properties import examples, repeatable


class Number(int):
    """Looks plain, and is not."""

    def __reduce__(self) -> Any:
        return (Number, (int(self) + 1,))


class Nested:
    def method(self) -> None:
        pass


def test_objects_that_are_pickled_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """This must agree with cloudpickle: a worker must find it by its name, and keys must agree."""
    import cloudpickle

    def goes_by_name(obj: Any, module: str, qualname: str) -> bool:
        assert is_by_name(obj, module, qualname) is _is_by_name(obj, module, qualname)
        pickled = cloudpickle.dumps(obj)
        assert is_by_name(obj, module, qualname) is (len(pickled) < 100)
        return is_by_name(obj, module, qualname)

    here, above = sys.modules[__name__], sys.modules["unit"]
    for obj, qualname in ((Nested, "Nested"), (Nested.method, "Nested.method"), (of_main, "of_main")):
        assert goes_by_name(obj, __name__, qualname)
        assert not is_by_name(obj, "no_such_module", qualname)
        assert not is_by_name(obj, None, qualname)
        for module in (here, above):
            cloudpickle.register_pickle_by_value(module)
            try:
                assert not goes_by_name(obj, __name__, qualname)
            finally:
                cloudpickle.unregister_pickle_by_value(module)
    replaced = Nested
    local, _ = of_main("def f(): pass")
    assert not goes_by_name(local, "__main__", "f")
    monkeypatch.setattr(here, "Nested", None)  # its place is taken
    assert not is_by_name(replaced, __name__, "Nested")


def of_main(source: str, name: str = "f") -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function as a notebook defines it, and its globals."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(source, namespace)
    return namespace[name], namespace


# Objects.


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, 1j, "text", b"bytes", (), [1, [2]], {"a": {1, 2}}, range(3), Ellipsis, int, abs],
    ids=repr,
)
def test_round_trip(value: object) -> None:
    rebuilt = loads(dumps(value))
    assert rebuilt == value
    assert type(rebuilt) is type(value)


def test_objects_that_plain_pickle_rejects() -> None:
    captured = 3
    assert loads(dumps(lambda x: x + captured))(1) == 4
    function, _ = of_main("k = 5\ndef f(x): return x * k")
    assert loads(dumps(function))(2) == 10
    assert loads([dumps_in_band(functools.partial(function, 3))])() == 15


CACHING = """
import functools

@functools.cache
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

@functools.lru_cache(maxsize=7, typed=True)
def limited(x):
    "Its text."
    return x

limited.unit = "eV"

@functools.singledispatch
def kind(x):
    "What it is."
    return "something"

@kind.register
def _(x: int):
    return "whole"

@kind.register(list)
def _(x):
    return [kind(each) for each in x]

kind.attribute = 3

class Model:
    made = 0

    @functools.lru_cache
    def heavy(self, x):
        return x + 1

    @functools.cached_property
    def table(self):
        "A table."
        self.made += 1
        return [self.made]

    @functools.singledispatchmethod
    def of(self, x):
        return "something"

    @of.register
    def _(self, x: int):
        return "whole"

def f():
    return fib(20), limited(2), kind(3), kind([1, "a"]), Model().heavy(1), Model().table, Model().of(1), Model().of("")
"""


def test_wrappers_of_functools() -> None:
    """A script's own caches and dispatchers are pickled by value, as its functions are."""
    function, names = of_main(CACHING)
    assert loads(dumps(function))() == (6765, 2, "whole", ["whole", "something"], 2, [1], "whole", "something")
    fib = loads(dumps(names["fib"]))
    assert fib(30) == 832040
    assert fib.cache_info().currsize == 31  # it calls itself, not a copy without a cache
    assert fib.__wrapped__.__globals__["fib"] is fib
    limited = loads(dumps(names["limited"]))
    assert limited.cache_parameters() == {"maxsize": 7, "typed": True}
    assert (limited.__name__, limited.__doc__, limited.unit) == ("limited", "Its text.", "eV")
    kind = loads(dumps(names["kind"]))
    assert kind([1, ""]) == ["whole", "something"]
    assert (kind.__name__, kind.__doc__, kind.attribute) == ("kind", "What it is.", 3)
    assert kind.__wrapped__.__globals__["kind"] is kind
    kind.register(str, lambda x: "text")
    assert kind("") == "text"
    assert names["kind"]("") == "something"
    model = loads(dumps(names["Model"]))
    first = model()
    assert first.table is first.table
    assert (model.table.__doc__, model.table.attrname) == ("A table.", "table")


def test_cache_of_a_callable_without_a_name() -> None:
    cached = functools.lru_cache(functools.partial(of_main("def f(x, y): return x + y")[0], 1))
    assert loads(dumps(cached))(2) == 3


def test_caches_of_importable_modules_go_by_name() -> None:
    import fnmatch
    import pkgutil

    assert loads(dumps(fnmatch._compile_pattern)) is fnmatch._compile_pattern  # an lru_cache
    assert loads(dumps(pkgutil.get_importer)) is pkgutil.get_importer
    assert loads(dumps(pkgutil.iter_importer_modules)) is pkgutil.iter_importer_modules  # dispatches


def test_objects_that_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match="pickle"):
        dumps([threading.Lock()])


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()


@repeatable
@given(
    args=st.lists(scalars | st.lists(scalars, max_size=2), max_size=4).map(tuple),
    kwargs=st.dictionaries(st.text(), scalars, max_size=3),
)
def test_fast_path_equals_slow_path(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rebuilt = loads(dumps_arguments(args, kwargs))
    assert rebuilt == loads(dumps((args, kwargs))) == (args, kwargs)
    assert [type(value) for value in rebuilt[0]] == [type(value) for value in args]


def test_fast_path_takes_exact_types_only() -> None:
    assert loads(dumps_arguments((Number(1),), {"key": Number(5)})) == ((2,), {"key": 6})
    assert loads(dumps(Number(1))) == 2
    function, _ = of_main("class f(str): pass")
    text = function("abc")
    [rebuilt], _ = loads(dumps_arguments((text,), {}))
    assert rebuilt == "abc"
    assert type(rebuilt).__name__ == "f"


# Large buffers.


@pytest.mark.parametrize(
    ("nbytes", "frames"), [(0, 1), (_OUT_OF_BAND_BYTES - 1, 1), (_OUT_OF_BAND_BYTES, 2), (10 * _OUT_OF_BAND_BYTES, 2)]
)
def test_threshold(nbytes: int, frames: int) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(nbytes, dtype="u1")
    made = dumps({"array": array})
    assert len(made) == frames
    assert (loads(made)["array"] == array).all()


def test_large_buffers_are_not_copied() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(_OUT_OF_BAND_BYTES)
    [_, frame] = dumps_arguments((array,), {})
    array[0] = 7
    assert bytes(frame[:8]) == array[:1].tobytes()
    [rebuilt], _ = loads([dumps_arguments((array,), {})[0], frame])
    assert numpy.shares_memory(rebuilt, array)


def test_many_buffers_stay_in_order() -> None:
    numpy = pytest.importorskip("numpy")
    arrays = [numpy.full(size, number) for number, size in enumerate([10, 5000, 1, 9000, 700])]
    frames = dumps(arrays)
    assert len(frames) == 1 + 3
    rebuilt = loads(frames)
    assert all((one == other).all() for one, other in zip(rebuilt, arrays, strict=True))


@pytest.mark.parametrize("order", ["C", "F", "strided", "read-only"])
def test_arrays_of_every_layout(order: str) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(10_000.0).reshape(100, 100)
    if order == "F":
        array = numpy.asfortranarray(array)
    elif order == "strided":
        array = array[::2, ::3]
    else:
        array.flags.writeable = order != "read-only"
    # As they arrive: in memory that can be written to.
    rebuilt = loads([bytearray(frame) for frame in dumps(array)])
    assert (rebuilt == array).all()
    assert rebuilt.flags.writeable == (order != "read-only")


def test_the_same_array_twice_is_sent_once() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(5000)
    frames = dumps((array, array))
    assert len(frames) == 2
    one, other = loads(frames)
    assert one is other


def test_in_band_is_one_piece() -> None:
    numpy = pytest.importorskip("numpy")
    data = dumps_in_band(numpy.ones(5000))
    assert type(data) is bytes
    assert pickle.loads(data).sum() == 5000


# Functions. Each call must see the function as it was at its submit, or later; calls are numbered by their submits.


class Submits:
    """Submits functions and pickles them later, as the executor does."""

    def __init__(self) -> None:
        self.pickler = FunctionPickler()
        self.next_number = 1

    def submit(self) -> int:
        self.next_number += 1
        return self.next_number - 1

    def send(self, fn: Callable[..., Any], number: int) -> bytes:
        return self.pickler.dumps(fn, number, self.next_number)


CHANGES = [
    ("global", "k = 1\ndef f(): return k", lambda fn, space: space.update(k=2)),
    ("default", "def f(x=1): return x", lambda fn, space: setattr(fn, "__defaults__", (2,))),
    ("keyword default", "def f(*, x=1): return x", lambda fn, space: fn.__kwdefaults__.update(x=2)),
    (
        "closure",
        "def make():\n    x = 1\n    def f(): return x\n    return f\nf = make()",
        lambda fn, space: setattr(fn.__closure__[0], "cell_contents", 2),
    ),
    ("mutable global", "k = [1]\ndef f(): return k[0]", lambda fn, space: space["k"].__setitem__(0, 2)),
    (
        "function it calls",
        "def g(): return 1\ndef f(): return g()",
        lambda fn, space: exec("def g(): return 2", space),
    ),
    ("attribute", "def f(): return f.x\nf.x = 1", lambda fn, space: setattr(fn, "x", 2)),
    (
        "object",
        "class C:\n    x = 1\n    def __call__(self): return self.x\nf = C()",
        lambda fn, space: setattr(fn, "x", 2),
    ),
]


@pytest.mark.parametrize(("source", "change"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_change_between_two_submits_is_seen(source: str, change: Callable[..., Any]) -> None:
    function, namespace = of_main(source)
    submits = Submits()
    first = submits.submit()
    assert loads([submits.send(function, first)])() == 1
    change(function, namespace)
    second = submits.submit()
    assert loads([submits.send(function, second)])() == 2


def test_calls_of_the_same_time_share_one_pickle() -> None:
    function, _ = of_main("def f(): pass")
    submits = Submits()
    numbers = [submits.submit() for _ in range(5)]
    data = [submits.send(function, number) for number in numbers]
    assert all(each is data[0] for each in data)


def test_call_that_is_sent_after_a_later_one() -> None:
    """For a call of low priority, a pickle made after its submit is right, and one made before is not."""
    function, namespace = of_main("k = 1\ndef f(): return k")
    submits = Submits()
    first = submits.submit()
    namespace["k"] = 2
    second = submits.submit()
    assert loads([submits.send(function, second)])() == 2
    namespace["k"] = 3
    assert loads([submits.send(function, first)])() in (2, 3)  # of after its submit
    third = submits.submit()
    assert loads([submits.send(function, third)])() == 3


@settings(repeatable, max_examples=examples(60))
@given(st.lists(st.sampled_from(["submit", "send", "change"]), max_size=25), st.data())
def test_calls_never_see_the_state_before_their_submit(steps: list[str], data: st.DataObject) -> None:
    function, namespace = of_main("k = 0\ndef f(): return k")
    submits = Submits()
    waiting: list[tuple[int, int]] = []
    for step in [*steps, *["send"] * len(steps)]:
        if step == "submit":
            waiting.append((submits.submit(), namespace["k"]))
        elif step == "change":
            namespace["k"] += 1
        elif waiting:
            number, before = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            assert before <= loads([submits.send(function, number)])() <= namespace["k"]


def test_another_function_in_the_same_place() -> None:
    """Python reuses an id once its object is gone."""
    submits = Submits()
    for value in range(200):
        function = eval(f"lambda: {value}", {"__name__": "__main__"})
        assert loads([submits.send(function, submits.submit())])() == value


def test_unpicklable_function_leaves_no_trace() -> None:
    lock = threading.Lock()
    submits = Submits()

    def locked() -> None:
        lock.acquire()

    for _ in range(2):
        with pytest.raises(TypeError, match="pickle"):
            submits.send(locked, submits.submit())


def test_keeps_few_functions_and_forgets_all() -> None:
    submits = Submits()
    functions = [functools.partial(abs, -number) for number in range(300)]
    references = [weakref.ref(function) for function in functions]
    for function in functions:
        assert loads([submits.send(function, submits.submit())])() == abs(function.args[0])
    del functions, function
    gc.collect()
    assert sum(reference() is not None for reference in references) <= 64
    submits.pickler.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * 300


def test_keeps_few_bytes_of_functions() -> None:
    """This includes functions that hold data and change between two submits."""
    submits = Submits()
    limit = 10_000
    submits.pickler._KEEP_BYTES = limit
    functions = [functools.partial(len, bytes(size)) for size in (3000, 3000, 3000, 3000, 3000, limit, 3000)]
    for function in functions * 2:
        kept = submits.send(function, submits.submit())
        assert loads([kept])() == len(function.args[0])
        total = sum(len(data) for _, _, data in submits.pickler._cache.values())
        assert total <= limit
        assert total == submits.pickler._bytes
    assert submits.pickler.dumps(functions[-1], 1, 2) is kept
    submits.pickler.clear()
    assert submits.pickler._bytes == 0


def test_standard_containers() -> None:
    value = collections.OrderedDict(a=collections.deque([1], 3), b=collections.Counter("aab"))
    assert loads(dumps(value)) == value


def test_functions_by_value_keep_the_name_of_their_file() -> None:
    """A traceback finds its source lines by that name."""

    def function() -> None:
        pass

    for frames in (serialize.dumps(function), [serialize.dumps_in_band(function)]):
        assert serialize.loads(frames).__code__.co_filename == __file__


ANNOTATED = """
class Point:
    x: int
    other: "Point"

class Unknown:
    x: int
    y: Missing

def f(point: Point) -> int:
    return 1

def g(point: Missing) -> int:
    return g.__annotations__
"""


def test_annotations_go_along() -> None:
    """This includes annotations that are evaluated late, and one that cannot be evaluated at all."""
    late = sys.version_info >= (3, 14)
    source = ANNOTATED if late else "from __future__ import annotations\n" + ANNOTATED
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<program>", "exec", dont_inherit=True), names)
    point, f, g = loads(dumps((names["Point"], names["f"], names["g"])))
    if late:
        assert point.__annotations__ == {"x": int, "other": "Point"}
        assert f.__annotations__ == {"point": point, "return": int}
        assert loads(dumps(names["Unknown"])).__annotations__ == {"x": "int", "y": "Missing"}
    else:
        assert point.__annotations__ == {"x": "int", "other": "'Point'"}
    assert g(None) == g.__annotations__ == {"point": "Missing", "return": "int"}


def test_a_class_of_a_function_keeps_its_name() -> None:
    class Local:
        pass

    assert name_elsewhere(Local) == "test_a_class_of_a_function_keeps_its_name.<locals>.Local"


def name_elsewhere(cls: type) -> str:
    """The class's full name, as a process tells it that has not defined the class."""
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())().__qualname__)"
    sent = dumps_in_band(lambda: cls)
    said = subprocess.run([sys.executable, "-bb", "-c", code], input=sent, capture_output=True, check=True).stdout
    return said.decode().strip()


def test_bytes_and_text_are_not_compared(tmp_path: Path) -> None:
    """The interpreter's option -bb would make that an error."""
    program = tmp_path / "program.py"
    program.write_text("from executorlib import serialize\ndef f(): return b'a'\nserialize.dumps(f)\n")
    subprocess.run([sys.executable, "-bb", str(program)], check=True)


def test_frames_can_be_collected_in_a_cycle() -> None:
    """The frames of an exception's traceback are, too, without a message on standard error."""
    cycle: list[Any] = [dumps({"not": {"plain"}})]
    cycle.append(cycle)
    del cycle
    gc.collect()
