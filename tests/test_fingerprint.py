"""Keys of calls: the same for the same function and inputs, wherever and whenever; another for anything else."""

from __future__ import annotations

import base64
import copy
import functools
import gc
import importlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executorlib import serialize
from executorlib.keys import fingerprint
from executorlib.keys.fingerprint import call_key


def define(source: str, name: str = "f", cell: int = 1, line: int = 0) -> Any:
    """Define a function as a notebook does, with a file name of the cell's own."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = compile("\n" * line + textwrap.dedent(source), f"<ipython-input-{cell}>", "exec", dont_inherit=True)
    exec(code, namespace)
    return namespace[name]


def key(*args: Any, **kwargs: Any) -> str:
    """The key of a call with these inputs."""
    return call_key(len, args, kwargs)


# -- functions ---------------------------------------------------------------------------------------------------------


def changes(source: str, *replacements: tuple[str, str]) -> list[str]:
    """The source of a function, followed by that source with each of the replacements made in it."""
    assert all(old in source for old, _ in replacements)
    return [source, *(source.replace(old, new) for old, new in replacements)]


# Each function with changes that make it another one.
FUNCTIONS = {
    "body": changes("def f(x): return x + 1", ("1", "2"), ("+", "-"), ("1", "1.0"), ("1", "'1'")),
    "default": changes("def f(x, y=1): return x", ("=1", "=2"), ("=1", "=[1]"), ("=1", "")),
    "keyword default": changes("def f(*, x=1, y=2): return x", ("y=2", "y=3"), ("x=1", "x=2"), ("x=1", "x")),
    "parameter": changes("def f(x): return 1", ("x", "y"), ("x", "*x"), ("x", "**x"), ("x", "*, x")),
    "kind": changes("def f(x): return x", ("return", "yield"), ("def", "async def")),
    "attribute": changes("def f(x): return f.a\nf.a = 1", ("= 1", "= 2")),
    "closure": changes("def g(a): return lambda x: x + a\nf = g(1)", ("(1)", "(2)"), ("(1)", "('1')")),
    "global": changes("A = 1\ndef f(x): return x + A", ("= 1", "= 2"), ("A = 1", "")),
    "global of a lambda": changes("A = 1\ndef f(x): return [(lambda: y + A)() for y in x]", ("= 1", "= 2")),
    "function called": changes(
        "A = 1\ndef h(x): return x + A\ndef g(x): return h(x)\ndef f(x): return g(x)",
        ("= 1", "= 2"),
        ("x + A", "x - A"),
        ("return h", "return -h"),
    ),
    "recursion": changes("def f(n): return n and n * f(n - 1)", ("n *", "n +")),
    "mutual recursion": changes("def f(n): return n and g(n)\ndef g(n): return f(n - 1)", ("- 1", "- 2")),
    "exception handler": changes("def f(x):\n  try: x()\n  except ValueError: return 1", ("Value", "Type")),
    "set in the body": changes("def f(x): return x in {'a', 'b', 'c'}", ("'c'", "'d'")),
    "class": changes(
        """
        class B: b = 1
        class C(B):
            a = 1
            def m(self): return C.a
        def f(x): return C().m()
        """,
        ("a = 1", "a = 2"),
        ("b = 1", "b = 2"),
        ("return C.a", "return -C.a"),
        ("(B)", ""),
    ),
    "class in the body": changes(
        """
        def f(x):
            class C:
                d = 17
                def __init__(self): self.a = 1; self.b = 2; self.c = 3
            return C()
        """,
        ("self.c = 3", "self.c = 4"),
        ("d = 17", "d = 18"),
    ),
    "decorator": changes(
        """
        import functools
        def d(g):
            @functools.wraps(g)
            def w(x): return g(x)
            return w
        @d
        def f(x): return 1
        """,
        ("return 1", "return 2"),
        ("return g", "return -g"),
        ("@d", ""),
    ),
    "lru_cache": changes("import functools\n@functools.lru_cache\ndef f(x): return 1", ("return 1", "return 2")),
    "single dispatch": changes(
        """
        import functools
        @functools.singledispatch
        def f(x): return 1
        @f.register
        def _(x: int): return 2
        """,
        ("return 1", "return 3"),
        ("return 2", "return 3"),
        ("int", "float"),
    ),
    "partial": changes(
        "import functools\ndef g(*a, **k): return 0\nf = functools.partial(g, 1, b=2)",
        ("return 0", "return 1"),
        ("(g, 1", "(g, 3"),
        ("b=2", "b=3"),
        ("b=2", "c=2"),
    ),
    "method": changes(
        """
        class C:
            def __init__(self, a): self.a = a
            def m(self): return self.a
            def n(self): return self.a
        f = C(1).m
        """,
        ("C(1)", "C(2)"),
        ("return", "return -"),
        ("f = C(1).m", "f = C(1).n"),
    ),
    "class method": changes(
        "class C:\n  @classmethod\n  def m(c): return 1\nf = C.m",
        ("1", "2"),
        ("class C", "class D(int): pass\nclass C(D)"),
    ),
    "static method": changes("class C:\n  @staticmethod\n  def m(): return 1\nf = C.m", ("1", "2")),
    "callable object": changes(
        """
        class C:
            def __init__(self, a): self.a = a
            def __call__(self): return self.a
        f = C(1)
        """,
        ("C(1)", "C(2)"),
        ("return", "return -"),
    ),
    "property": changes("class C:\n  @property\n  def p(self): return 1\ndef f(): return C().p", ("1", "2")),
    "cached property": changes(
        "import functools as t\nclass C:\n  @t.cached_property\n  def p(self): return 1\ndef f(): return C().p",
        ("1", "2"),
    ),
    "slots": changes(
        "class C:\n  __slots__ = ('a', 'b')\n  def __init__(self): super().__init__()\nf = C", ("'b'", "'c'")
    ),
    "abstract class": changes(
        """
        import abc
        class B(abc.ABC):
            @abc.abstractmethod
            def m(self): ...
        class C(B):
            def m(self): return 1
        f = C
        """,
        ("return 1", "return 2"),
    ),
    "dataclass": changes(
        """
        import dataclasses
        @dataclasses.dataclass
        class C:
            a: int = 1
            b: list = dataclasses.field(default_factory=list)
        f = C
        """,
        ("= 1", "= 2"),
        ("=list", "=tuple"),
    ),
    "named tuple": changes("import typing\nclass C(typing.NamedTuple):\n  a: int = 1\nf = C", ("1", "2")),
    "enum": changes(
        """
        import enum
        class C(enum.Enum):
            A = 1
            B = 2
            def m(self): return 3
        def f(x): return C.A.m()
        """,
        ("= 2", "= 4"),
        ("B =", "D ="),
        ("return 3", "return 4"),
    ),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_key_of_a_changed_function_differs(what: str) -> None:
    keys = [call_key(define(source), (), {}) for source in FUNCTIONS[what]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("what", FUNCTIONS)
def test_key_of_a_function_defined_again_is_the_same(what: str) -> None:
    for source in FUNCTIONS[what]:
        first = define(source, cell=1)
        again = define(source, cell=2, line=300)
        assert call_key(first, (1,), {}) == call_key(again, (1,), {})


def in_other_process(code: str, seed: int, data: str = "") -> Any:
    """Run code in an interpreter with another hash seed; return what it prints as JSON."""
    tests, source = Path(__file__).parent, Path(fingerprint.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": os.pathsep.join([str(tests), str(source)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=data,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Data in which the hash seed, addresses or order of creation could show.
DATA = """
import datetime, decimal, enum, fractions, pathlib, re, types, collections, uuid, array, typing
names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
class Plain:
    def __init__(self, a): self.a = a
    def method(self): return Plain, self.a
class Slots:
    __slots__ = ("a", "__dict__")
    def __init__(self, a): self.a = a; self.b = a
class Tree:
    def __init__(self, name, up=None):
        self.name, self.up, self.down = name, up, set()
        if up is not None: up.down.add(self)
class Text(str): pass
class Names(set): pass
class Level(enum.IntFlag): LOW = 1; HIGH = 2
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
ring = [1]; ring.append({"ring": ring})
root = Tree("root")
for name in names: Tree(name + "!", Tree(name, root))
values = [
    set(names), frozenset(names), Names(names), {"a": set(names), "b": {frozenset(names), frozenset()}},
    {Plain, Slots, Tree, even, odd, len, ValueError}, {(name, Level.LOW) for name in names}, even, odd, [odd, even],
    Plain(set(names)), Slots(1), Plain(1).method, Text("x"), Level.LOW, Level.LOW | Level.HIGH, ring, root,
    datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc), datetime.timedelta(1), decimal.Decimal("1.10"),
    fractions.Fraction(1, 3), pathlib.PurePosixPath("a/b"), re.compile("a+", re.I), uuid.UUID(int=5), 1j, ..., None,
    NotImplemented, range(3), slice(1, 2), bytearray(b"x"), memoryview(b"x"), array.array("d", [1.0]),
    collections.OrderedDict(a=1), collections.Counter("aab"), collections.defaultdict(list, a=[1]),
    collections.deque([1, 2], 3), types.SimpleNamespace(a=1), typing.Optional[int], list[int], ValueError("x", 1),
    str.upper, "x".upper, dict.fromkeys, (1).__add__, collections, types.MappingProxyType({"a": 1}), 10**30, object,
]
"""


@pytest.fixture(scope="module")
def keys_elsewhere() -> list[dict[str, Any]]:
    """Keys of `FUNCTIONS` and `DATA`, computed by two other processes with hash seeds of their own."""
    code = """
    import json
    from executorlib.keys.fingerprint import call_key
    from test_fingerprint import DATA, FUNCTIONS, define
    exec(DATA)
    functions = {what: [call_key(define(text), (), {}) for text in texts] for what, texts in FUNCTIONS.items()}
    print(json.dumps({"functions": functions, "data": [call_key(len, (value,), {}) for value in values]}))
    """
    return [in_other_process(code, seed) for seed in (1, 2)]


def test_keys_of_functions_do_not_depend_on_process_or_hash_seed(keys_elsewhere: list[dict[str, Any]]) -> None:
    here = {what: [call_key(define(text), (), {}) for text in texts] for what, texts in FUNCTIONS.items()}
    for there in keys_elsewhere:
        assert there["functions"] == here


def test_keys_of_data_do_not_depend_on_process_or_hash_seed(keys_elsewhere: list[dict[str, Any]]) -> None:
    first, second = (there["data"] for there in keys_elsewhere)
    assert first == second
    assert len(set(first)) == len(first)


def test_key_of_an_unpickled_function_is_the_same() -> None:
    names = list(FUNCTIONS)
    functions = [define(FUNCTIONS[what][0]) for what in names]
    data = base64.b64encode(serialize.dumps_in_band(functions)).decode()
    code = """
    import base64, json, sys, cloudpickle
    from executorlib.keys.fingerprint import call_key
    functions = cloudpickle.loads(base64.b64decode(sys.stdin.read()))
    print(json.dumps([call_key(function, (), {}) for function in functions]))
    """
    there = dict(zip(names, in_other_process(code, 3, data), strict=True))
    here = {what: call_key(function, (), {}) for what, function in zip(names, functions, strict=True)}
    assert there == here


def test_pickling_an_instance_leaves_the_key_of_its_class() -> None:
    cls = define("class C:\n  def __init__(self): self.a = 1", "C")
    before = call_key(cls, (), {})
    copy.copy(cls())
    assert "__slotnames__" in vars(cls)
    assert call_key(cls, (), {}) == before


# Data of libraries, which pickling must not change in a way that shows.
LIBRARY_DATA = """
import argparse, collections, configparser, ctypes, ipaddress, logging, operator, typing, zoneinfo
library_values = [
    operator.itemgetter(1), operator.methodcaller("a", 1), logging.getLogger("x"), ipaddress.ip_address("1.2.3.4"),
    collections.UserDict(a=1), collections.ChainMap({"a": 1}), argparse.Namespace(a=1), ctypes.c_int(3), KeyError("a"),
    zoneinfo.ZoneInfo("UTC"), collections.defaultdict(lambda: 1), typing.Callable[[int], str], int | str,
    typing.TypeVar("T"), typing.Literal["a"], configparser.ConfigParser(),
]
try:
    import numpy as np
    a = np.arange(6.0).reshape(2, 3)
    library_values += [
        a, np.asfortranarray(a), a.T, np.array(["a"]), np.array([1], "M8[s]"), np.array([(1, 2)], "i4,f8"),
        np.array([{1}, "a"], object), np.dtype("f8"), np.dtype("i4,f8"), np.float32(1),
        np.ma.array([1, 2], mask=[0, 1]),
        np.random.default_rng(1), np.random.RandomState(1), np.sin, np.sum, np.polynomial.Polynomial([1, 2]), [a, a],
    ]
    import pandas as pd
    library_values += [
        pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": [1.0, 2.0]}), pd.Series([1, 2], name="q"), pd.Index([1, 2]),
        pd.Timestamp("2020-01-01"), pd.Categorical(["a", "b"]), pd.DataFrame({"t": pd.to_datetime(["2020-01-01"])}),
    ]
except ImportError:
    pass
"""


def test_data_has_the_same_key_where_it_is_unpickled() -> None:
    there = """
    import base64, json, sys
    from executorlib.keys import fingerprint; from executorlib import serialize
    same = {}
    for what, (key, data) in json.load(sys.stdin).items():
        value = serialize.loads([base64.b64decode(data)])
        known = fingerprint.Key(*key)._replace(sources=base64.b64decode(key[-1]))
        same[what] = fingerprint.recompute(known, len, (value,), {}).name == known.name
    print(json.dumps(same))
    """
    here = """
    import base64, json
    from executorlib.keys import fingerprint; from executorlib import serialize
    from test_fingerprint import DATA, LIBRARY_DATA
    exec(DATA)
    exec(LIBRARY_DATA)
    text = lambda data: base64.b64encode(data).decode()
    rows = {}
    for number, value in enumerate([*values, *library_values]):
        key = fingerprint.key_of(len, (value,), {})
        pickled = serialize.dumps_in_band(value)
        rows[f"{number} {value!r}"] = [*key[:-1], text(key.sources)], text(pickled)
    print(json.dumps(rows))
    """
    rows = in_other_process(here, 1)
    same = in_other_process(there, 2, json.dumps(rows))
    assert [what for what, is_same in same.items() if not is_same] == []
    assert len(same) > 70


def test_running_and_tracing_a_function_leave_its_key() -> None:
    fn = define("def f(n):\n  total = 0\n  for i in range(n): total += i * 2.0\n  return [total].pop()")
    before = call_key(fn, (), {})
    fingerprint._CODES.clear()
    for _ in range(300):
        fn(30)
    assert call_key(fn, (), {}) == before
    fingerprint._CODES.clear()
    trace = sys.gettrace()
    sys.settrace(lambda frame, event, arg: lambda *_: None)
    try:
        fn(30)
        traced = call_key(fn, (), {})
    finally:
        sys.settrace(trace)
    assert traced == before


def test_comments_and_annotations_do_not_count() -> None:
    plain = define("def f(x, y=1):\n  return x")
    annotated = define("def f(x: int, y: 'str' = 1) -> int:\n  # why\n\n  return x")
    assert call_key(plain, (), {}) == call_key(annotated, (), {})


def test_unused_globals_and_attributes_of_other_objects_do_not_count() -> None:
    first = define("A = 1\nb = 1\ndef f(x): return x.b")
    second = define("A = 2\nb = 2\ndef f(x): return x.b")
    assert call_key(first, (), {}) == call_key(second, (), {})


def test_key_is_the_name_and_a_digest() -> None:
    class Model:
        def __call__(self) -> None: ...

    def name(fn: Any) -> str:
        return call_key(fn, (), {})[:-32]

    assert name(len) == "len"
    assert name(functools.partial(functools.partial(max, 1), 2)) == "max"
    assert name(lambda: 1) == "lambda"
    assert name(Model()) == "Model"
    assert name([].append) == "append"
    assert name(define("def été(): return 1", "été")) == "_t_"
    long = define(f"def {'f' * 300}(): return 1", "f" * 300)
    assert name(long) == "f" * 64
    assert call_key(len, (), {})[-32:].strip("0123456789abcdef") == ""


def test_keyword_order_does_not_count_and_kind_of_argument_does() -> None:
    assert key(a=1, b=2) == key(b=2, a=1)
    keys = [key(1, 2), key(2, 1), key([1, 2]), key((1, 2)), key(1, b=2), key(a=1, b=2), key(), key(None)]
    assert len(set(keys)) == len(keys)


def test_no_reference_to_the_function_is_kept() -> None:
    fn = define("def f(x): return x")
    call_key(fn, ([],), {})
    assert not [each for each in gc.get_referrers(fn) if isinstance(each, fingerprint._Described)]


# -- modules and packages ----------------------------------------------------------------------------------------------


class Modules:
    """Modules of the user's own, written to a folder and loaded again after each change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, text: str) -> ModuleType:
        path = self._folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        for loaded in [each for each in sys.modules if each == name or each.startswith("lab_")]:
            del sys.modules[loaded]
        return importlib.import_module(name)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Modules(tmp_path)
    for name in [each for each in sys.modules if each.startswith("lab_")]:
        del sys.modules[name]


CHANGES_IN_A_MODULE = [
    ("A = 1\ndef f(x): return x + A", "A = 2\ndef f(x): return x + A"),
    ("A = {'a': [1]}\ndef f(x): return A", "A = {'a': [2]}\ndef f(x): return A"),
    ("def g(x): return x\ndef f(x): return g(x)", "def g(x): return -x\ndef f(x): return g(x)"),
    ("class C:\n  a = 1\ndef f(x): return C().a", "class C:\n  a = 2\ndef f(x): return C().a"),
    (
        "import dataclasses as d\n@d.dataclass\nclass C:\n  a: int\nS = C(1)\ndef f(x): return S",
        "import dataclasses as d\n@d.dataclass\nclass C:\n  a: int\nS = C(2)\ndef f(x): return S",
    ),
    (
        "import functools\n@functools.cache\ndef g(x): return x\ndef f(x): return g(x)",
        "import functools\n@functools.cache\ndef g(x): return -x\ndef f(x): return g(x)",
    ),
]


@pytest.mark.parametrize(("before", "after"), CHANGES_IN_A_MODULE)
def test_a_change_in_a_module_of_the_users_own_counts(modules: Any, before: str, after: str) -> None:
    first = call_key(modules("lab_one", before).f, (1,), {})
    assert call_key(modules("lab_one", "\n\n" + before).f, (1,), {}) == first
    assert call_key(modules("lab_one", after).f, (1,), {}) != first


@pytest.mark.parametrize(
    "use",
    [
        "from lab_tools import g\ndef f(x): return g(x)",
        "import lab_tools\ndef f(x): return lab_tools.g(x)",
        "import lab_tools as t\ndef f(x): return [t.g(y) for y in x]",
        "from lab_tools import C\ndef f(x): return C(x)",
        "import lab_tools\nclass D(lab_tools.C): pass\ndef f(x): return D(x)",
    ],
)
def test_a_notebook_sees_changes_in_the_modules_that_it_uses(modules: Any, use: str) -> None:
    text = "def g(x): return x\nclass C:\n  def m(self): return 1\nOTHER = 1"
    modules("lab_tools", text)
    first = call_key(define(use), (1,), {})
    modules("lab_tools", text.replace("OTHER = 1", "OTHER = 2"))
    assert call_key(define(use), (1,), {}) == first
    modules("lab_tools", text.replace("return x", "return -x").replace("return 1", "return 2"))
    assert call_key(define(use), (1,), {}) != first


def test_state_of_a_module_does_not_count(modules: Any) -> None:
    text = """
    import logging, threading
    lock, log = threading.Lock(), logging.getLogger("lab")
    handlers = {"a": threading.Lock()}
    class Pool:
        lock = threading.Lock()
        def __init__(self): self.free = [1]
    pool = Pool()
    def f(x):
        with lock: return log, pool, Pool, handlers, x
    """
    module = modules("lab_state", text)
    first = call_key(module.f, (1,), {})
    module.pool.free.clear()
    assert call_key(module.f, (1,), {}) == first
    assert call_key(modules("lab_state", text).f, (1,), {}) == first


def test_packages_that_refer_to_each_other_in_circles(modules: Any) -> None:
    count = 12
    functions = "\n".join(
        f"def g{i}(x): return [{', '.join(f'g{j}' for j in range(count))}][x] if x else C{i % 3}" for i in range(count)
    )
    classes = "\n".join(f"class C{i}:\n  def m(self): return C{(i + 1) % 3}, C{(i + 2) % 3}, g{i}" for i in range(3))
    text = f"{functions}\n{classes}\n"
    module = modules("lab_net", text)
    keys = {call_key(getattr(module, f"g{i}"), (), {}) for i in range(count)}
    assert len(keys) == count
    # Earlier descriptions must not matter.
    together = key((module.g1, module.C0, module.g2)), key({module.g1, module.C0, module.g2})
    again = modules("lab_net", "\n" + text)
    assert together == (key((again.g1, again.C0, again.g2)), key({again.g2, again.g1, again.C0}))
    assert key((again.C0, again.g2, again.g1)) != together[0]
    changed = modules("lab_net", text.replace("if x else C2", "if x else C1"))
    assert call_key(changed.g0, (), {}) not in keys


def test_library_functions_count_by_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    # Python 3.15 warns where its own are asked for.
    monkeypatch.setitem(vars(json), "__version__", "98")
    before = call_key(re.sub, ("a",), {}), call_key(json.dumps, ({},), {})
    re.compile("fills a cache of the module")
    assert (call_key(re.sub, ("a",), {}), call_key(json.dumps, ({},), {})) == before
    assert call_key(json.loads, ({},), {})[-32:] != before[1][-32:]
    monkeypatch.setitem(vars(json), "__version__", "99")
    assert call_key(json.dumps, ({},), {}) != before[1]


def test_random_functions_are_functions_without_state() -> None:
    source = "from random import random, randint\ndef f(x): return random() + randint(1, 6)"
    before = call_key(define(source), (), {}), call_key(random.random, (), {})
    random.random()
    assert (call_key(define(source), (), {}), call_key(random.random, (), {})) == before
    assert key(random.Random(1).random) != key(random.Random(2).random)


# -- data --------------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(max_size=100)
)
data = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers(), st.tuples(st.text(), st.floats())), inner),
        st.builds(slice, inner, inner),
        st.builds(functools.partial, st.just(print), inner),
    ),
    max_leaves=12,
)


@settings(max_examples=50)
@given(data)
def test_equal_data_has_the_same_key(value: Any) -> None:
    assert key(pickle.loads(pickle.dumps(value))) == key(value)
    assert key([value, value]) == key([value, copy.deepcopy(value)])


@given(data, data)
def test_different_data_has_another_key(one: Any, other: Any) -> None:
    # repr() tells types, order, -0.0 and nan apart, as the key shall.
    assert (key(one) == key(other)) == (repr(one) == repr(other))


@settings(max_examples=50)
@given(st.lists(st.one_of(scalars, st.tuples(st.text(), st.integers())), max_size=8), st.randoms(use_true_random=False))
def test_order_of_a_set_does_not_count(values: list[Any], shuffle: Any) -> None:
    same = list(set(values))
    shuffle.shuffle(same)
    assert key(set(values)) == key(set(same))
    assert key(set(values)) != key(frozenset(values))
    assert key({*values, "one more" * 20}) != key(set(values) - {"one more" * 20})


def test_values_that_compare_equal_but_are_not_the_same() -> None:
    class Text(str):
        __slots__ = ()

    values = [1, 1.0, True, "1", b"1", 1j, Text("1"), [1], (1,), {1}, frozenset({1}), {1: 1}, [[1]], 0.0, -0.0, 2**31]
    values += [[], (), {}, set(), frozenset(), "", b"", None, "None", 0, False, [None], "x" * 100, b"x" * 100]
    values += [[1] * 64, [1] * 65, (1,) * 65, {1: {}}, {1: []}, [{}], {"a": 1, "b": 2}, {"b": 2, "a": 1}]
    keys = [key(value) for value in values]
    assert len(set(keys)) == len(keys)


def test_data_that_contains_itself() -> None:
    def ring(length: int) -> list[Any]:
        first: list[Any] = []
        last = first
        for _ in range(length - 1):
            last.append([])
            last = last[0]
        last.append(first)
        return first

    assert key(ring(3)) == key(ring(3))
    assert len({key(ring(1)), key(ring(2)), key(ring(3)), key([])}) == 4
    # The same wherever it hangs, and whatever was described before.
    three = ring(3)
    assert key([[three]], three) == key([[ring(3)]], ring(3))
    assert key(three, three[0]) == key(ring(3), ring(3))


def test_shared_parts_are_described_once() -> None:
    value: Any = ["x"] * 100
    for _ in range(60):
        value = [value, value]
    assert key(value) == key(copy.deepcopy(value))


def test_dense_nets_of_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        def __init__(self) -> None:
            self.neighbours: set[Node] = set()

    nodes = [Node() for _ in range(30)]
    for node in nodes:
        node.neighbours.update(nodes)
    monkeypatch.setattr(fingerprint, "_MOST_DISCARDED", 1000)
    with pytest.raises(TypeError, match="sets that refer to each other too often"):
        key(nodes)


def test_arrays() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(24.0).reshape(4, 6)
    same = [
        array.copy(),
        numpy.asfortranarray(array),
        numpy.repeat(array, 2, axis=1)[:, ::2],
        array[::-1][::-1],
        array[:, ::-1].copy()[:, ::-1],
    ]
    assert {key(each) for each in same} == {key(array)}
    other = array.copy()
    other[3, 5] = -1
    different = [other, array.T, array.reshape(6, 4), array.ravel(), array.tolist(), array.astype("f4")]
    different += [
        array.astype(">f8"),
        array.view("i8"),
        array[:0],
        array[:, :0],
        numpy.float64(1),
        1.0,
        numpy.array(1.0),
    ]
    different += [numpy.float32(1), numpy.array([1], "M8[s]"), numpy.array([1], "M8[ns]"), numpy.array([1]), array > 3]
    different += [
        numpy.array(["a"]),
        numpy.array([b"a"]),
        numpy.array([(1, 2)], "i4,i4"),
        numpy.array([(1, 2)], "i4,u4"),
    ]
    different += [numpy.array([{1}, "a"], object), numpy.array([{2}, "a"], object), numpy.dtype("f8"), numpy.sin]
    different += [numpy.ma.array([1.0, 2.0], mask=[0, 1]), numpy.ma.array([1.0, 2.0], mask=[1, 0])]
    keys = [key(array), *(key(each) for each in different)]
    assert len(set(keys)) == len(keys)
    assert keys[1:] == [key(copy.deepcopy(each)) for each in different]
    big = numpy.arange(500_000).reshape(500, 1000)
    assert key(big.T) == key(big.T.copy())


def test_arrays_in_files(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "a.npy", numpy.arange(10.0))
    mapped = numpy.load(tmp_path / "a.npy", mmap_mode="r")
    assert key(mapped) == key(numpy.arange(10.0))


def test_random_generators_count_by_their_state() -> None:
    numpy = pytest.importorskip("numpy")
    before = key(numpy.random.rand)
    numpy.random.rand()
    assert key(numpy.random.rand) == before
    assert key(numpy.random.RandomState(1).rand) != key(numpy.random.RandomState(2).rand)
    assert key(numpy.random.default_rng(1)) == key(numpy.random.default_rng(1))
    assert key(numpy.random.default_rng(1)) != key(numpy.random.default_rng(2))


# -- what has no key ---------------------------------------------------------------------------------------------------


class Potential:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_an_input_without_a_key_is_named() -> None:
    with pytest.raises(TypeError) as caught:
        call_key(define("def relax(x): return x", "relax"), (1, {"pot": [Potential()]}), {})
    text = str(caught.value)
    assert "call of relax: args[1]['pot'][0].lock is a _thread.lock" in text
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("import threading\nL = threading.Lock()\ndef f(x): return L", "the function, global 'L' is a _thread.lock"),
        ("import threading\nL = threading.Lock()\nf = lambda x, y=L: x", "the function, default 0 is"),
        ("import threading\nL = threading.Lock()\ndef f(*, y=L): return y", "the function, default of 'y' is"),
        (
            "import threading\ndef g(L): return lambda: L\nf = g(threading.Lock())",
            "the function, closure variable 'L' is",
        ),
        (
            "import threading\nclass C: L = threading.Lock()\ndef g(): return C\ndef f(x): return g()",
            "the function, global 'g', global 'C'.L is",
        ),
        ("f = (i for i in [1])", "the function is a builtins.generator"),
    ],
)
def test_a_function_without_a_key_says_why(source: str, where: str) -> None:
    with pytest.raises(TypeError) as caught:
        call_key(define(source), (), {})
    assert where in str(caught.value)


def test_keywords_and_elements_without_a_key_are_named() -> None:
    lock = threading.Lock()
    for value, where in [(lock, "kwargs['a'] is"), ({lock}, "kwargs['a'], an element is"), ({1: lock}, "['a'][1] is")]:
        with pytest.raises(TypeError) as caught:
            key(a=value)
        assert where in str(caught.value)


def test_data_nested_too_deeply_is_refused() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(TypeError, match="nested too deeply") as caught:
        key(value)
    assert len(str(caught.value)) < 1000


def test_reductions_count_whole() -> None:
    class Reduced:
        def __init__(self, *reduced: Any) -> None:
            self.reduced = reduced

        def __reduce_ex__(self, protocol: Any) -> Any:
            return self.reduced

    state = [None, {}, {"a": 1}, ({"a": 1}, None), (None, {"a": 1}), ({"a": 1}, {"a": 1}), [("a", 1)], 1, (1, 2)]
    variants: list[tuple[Any, ...]] = [(list, ()), (set, ()), (list, ([],)), (list, ([], []))]
    variants += [(list, (), each) for each in state[1:]]
    variants += [(list, (), None, iter([1])), (list, (), None, iter([1, 2])), (list, (), None, None, iter([(1, 2)]))]
    keys = [key(Reduced(*variant)) for variant in variants]
    assert all(one != other for one, other in itertools.combinations(keys, 2))
