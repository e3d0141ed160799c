"""A key covers each change of code or of a value that a call reaches, and nothing that depends on the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import executorlib
from executorlib.keys import fingerprint
from executorlib.worker.call import named_inputs


class Case(NamedTuple):
    """A call before and after a change.

    Attributes:
        files: Modules of the user's by path; MOD stands for a name of the case's own.
        program: What the program defines; the call is that of `f` without arguments.
        old: The text that is changed, in the modules and in the program.
        new: What it becomes.
    """

    files: dict[str, str]
    program: str
    old: str
    new: str


def in_module(text: str, old: str, new: str, use: str = "return X") -> Case:
    """A change in a module whose function is called."""
    return Case({"MOD.py": f"{text}\ndef f():\n    {use}\n"}, "from MOD import f", old, new)


def in_program(text: str, old: str, new: str) -> Case:
    """A change in the program itself."""
    return Case({}, text, old, new)


OTHER = "def g(): return 1\nclass C:\n  x = 2\n  def m(self): return 3\nA = 4\n"
INSTANCE = "class K:\n  def __init__(s, a): s.a = a\n"

# The kinds of globals of a module, and the ways in which the function reads them.
GLOBALS = {
    "number": in_module("X = 1", "1", "2"),
    "pattern": in_module("import re\nX = re.compile('a')", "'a'", "'b'", "return X.pattern"),
    "flags of a pattern": in_module("import re\nX = re.compile('a', re.I)", "re.I", "re.M", "return X.flags"),
    "partial": in_module("import functools\nX = functools.partial(pow, 2)", "2", "3", "return X(5)"),
    "partial of a function": in_module(
        "import functools\ndef g(a, b): return a + b\nX = functools.partial(g, 2)", "a + b", "a * b", "return X(5)"
    ),
    "namespace": in_module("import types\nX = types.SimpleNamespace(a=1)", "a=1", "a=2", "return X.a"),
    "instance": in_module(INSTANCE + "X = K(1)", "K(1)", "K(2)", "return X.a"),
    "class of an instance": in_module("class K:\n  def m(s): return 1\nX = K()", "1", "2", "return X.m()"),
    "bound method": in_module(INSTANCE + "  def m(s): return s.a\nX = K(1).m", "K(1)", "K(2)", "return X()"),
    "class decorator": in_module(
        "class Memo:\n  def __init__(s, f): s.f = f\n  def __call__(s): return s.f()\n@Memo\ndef X(): return 1",
        "return 1",
        "return 2",
        "return X()",
    ),
    "code of a class decorator": in_module(
        "class Memo:\n  def __init__(s, f): s.f = f\n  def __call__(s): return s.f() + 10\n@Memo\ndef X(): return 1",
        "10",
        "20",
        "return X()",
    ),
    "bytearray": in_module("X = bytearray(b'a')", "'a'", "'b'", "return bytes(X)"),
    "range": in_module("X = range(3)", "3", "4", "return list(X)"),
    "slice": in_module("X = slice(1)", "1", "2", "return [1, 2, 3][X]"),
    "array": in_module("import array\nX = array.array('i', [1])", "[1]", "[2]", "return X.tolist()"),
    "deque": in_module("import collections\nX = collections.deque([1])", "[1]", "[2]", "return list(X)"),
    "dictionary with a lock": in_module(
        "import threading\nX = {'x': 1, 'l': threading.Lock()}", "1", "2", "return X['x']"
    ),
    "dictionary of functions": in_module("X = {'x': lambda: 1}", "1", "2", "return X['x']()"),
    "dictionary of instances": in_module(INSTANCE + "X = {'x': K(1)}", "K(1)", "K(2)", "return X['x'].a"),
    "named tuple": in_module("import collections\nT = collections.namedtuple('T', 'a')\nX = T(1)", "(1)", "(2)"),
    "class attribute": in_module("class X:\n  a = 1", "1", "2", "return X.a"),
    "pattern in a class": in_module("import re\nclass X:\n  a = re.compile('a')", "'a'", "'b'", "return X.a.pattern"),
    "instance in a class": in_module(INSTANCE + "class X:\n  a = K(1)", "K(1)", "K(2)", "return X.a.a"),
    "descriptor": in_module(
        "class D:\n  def __init__(s, v): s.v = v\n  def __get__(s, o, t): return s.v\nclass X:\n  a = D(1)",
        "D(1)",
        "D(2)",
        "return X.a",
    ),
    "dunder attribute of a class": in_module("class X:\n  __version__ = 1", "1", "2", "return X.__version__"),
    "hash of a class": in_module(
        "class K:\n  __hash__ = None\nX = [K.__hash__ is None]", "None\n", "object.__hash__\n"
    ),
    "enumeration": in_module("import enum\nclass X(enum.Enum):\n  A = 1", "1", "2", "return X.A.value"),
    "attribute of an enumeration": in_module(
        "import enum\nclass X(enum.Enum):\n  A = 1\nX.factor = 10", "10", "20", "return X.factor"
    ),
    "annotation of a data class": in_module(
        "import dataclasses\n@dataclasses.dataclass\nclass X:\n  a: int = 1",
        "int",
        "float",
        "return X.__dataclass_fields__['a'].type",
    ),
    "UserDict": in_module("import collections\nX = collections.UserDict(x=1)", "1", "2", "return X['x']"),
    "ChainMap": in_module("import collections\nX = collections.ChainMap({'x': 1})", "1", "2", "return X['x']"),
    "itemgetter": in_module("import operator\nX = operator.itemgetter(0)", "(0)", "(1)", "return X([1, 2])"),
    "Struct": in_module("import struct\nX = struct.Struct('<I')", "<", ">", "return X.pack(1)"),
    "generator": in_module("X = (i for i in [1])", "[1]", "[2]", "return next(X)"),
    "parser": in_module(
        "import configparser\nX = configparser.ConfigParser()\nX.read_string('[a]\\nb=1')",
        "b=1",
        "b=2",
        "return X['a']['b']",
    ),
    "changed later": in_module("X = []\nX.append(1)", "append(1)", "append(2)"),
    "item set later": in_module("X = {}\nX['a'] = 1", "= 1", "= 2"),
    "changed by another name": in_module("X = []\nY = X\nY += [1]", "[1]", "[2]"),
    "filled by a function": in_module("X = []\ndef fill(): X.append(1)\nfill()", "(1)", "(2)"),
    "filled as another is assigned": in_module("X = []\ndef fill(): X.append(1)\nY = fill()", "(1)", "(2)"),
    "filled in a loop": in_module("X = []\nfor i in range(2): X.append(i)", "range(2)", "range(3)"),
    "filled by a decorator": in_module(
        "X = {}\ndef register(g):\n  X[g.__name__] = g\n@register\ndef g(): return 1", "1", "2", "return X['g']()"
    ),
    "filled by subclasses": in_module(
        "X = []\nclass B:\n  def __init_subclass__(c): X.append(c.a)\nclass D(B):\n  a = 1", "a = 1", "a = 2"
    ),
    "subclasses": in_module(
        "class B: pass\nclass D(B):\n  a = 1", "a = 1", "a = 2", "return [c.a for c in B.__subclasses__()]"
    ),
    "set by a function": in_module("def init():\n  global X\n  X = 1\ninit()", "X = 1", "X = 2"),
    "conditional": in_module("try:\n  X = 1\nexcept ValueError:\n  X = 0", "1", "2"),
    "without a statement of its own": in_module("globals()['X'] = 1", "1", "2"),
    "executed text": in_module("exec('X = 1')", "1", "2"),
    "__getattr__ of a module": Case(
        {"MOD.py": "def __getattr__(name): return 1"}, "import MOD\ndef f(): return MOD.anything", "1", "2"
    ),
}

# How a function may reach what it uses.
LAZY = "def __getattr__(name):\n  import importlib\n  return getattr(importlib.import_module(f'{__name__}.b'), name)"
WAYS = {
    "function": in_module("def g(): return 1", "1", "2", "return g()"),
    "function of a function": in_module("def h(): return 1\ndef g(): return h()", "1", "2", "return g()"),
    "default": Case({"MOD.py": "A = 1\ndef f(x=A): return x"}, "from MOD import f", "1", "2"),
    "closure": Case(
        {"MOD.py": "def make(a):\n  def f(): return a\n  return f\nf = make(1)"}, "from MOD import f", "1", "2"
    ),
    "function made by a function": Case(
        {"MOD.py": "A = 1\ndef make():\n  return lambda: A"}, "import MOD\nf = MOD.make()", "1", "2"
    ),
    "decorator": Case(
        {"MOD.py": "def d(g):\n  def w(): return g() + 10\n  return w\n@d\ndef f(): return 1"},
        "from MOD import f",
        "10",
        "20",
    ),
    "decorator in another module": Case(
        {
            "MOD_d.py": "import functools\ndef d(g):\n  @functools.wraps(g)\n  def w(): return g() + 10\n  return w",
            "MOD.py": "from MOD_d import d\n@d\ndef f(): return 1",
        },
        "from MOD import f",
        "10",
        "20",
    ),
    "wrapped function": Case(
        {"MOD.py": "import functools\ndef d(g): return functools.wraps(g)(lambda: g())\n@d\ndef f(): return 1"},
        "from MOD import f",
        "1",
        "2",
    ),
    "lru_cache": Case(
        {"MOD.py": "import functools\n@functools.lru_cache\ndef f(): return 1"}, "from MOD import f", "1", "2"
    ),
    "single dispatch": Case(
        {
            "MOD.py": "import functools\n@functools.singledispatch\ndef g(x): return 1\n"
            "@g.register\ndef _(x: int): return 2\ndef f(): return g(1)"
        },
        "from MOD import f",
        "return 2",
        "return 3",
    ),
    "property": in_module("class C:\n  @property\n  def p(self): return 1", "1", "2", "return C().p"),
    "static method": in_module("class C:\n  @staticmethod\n  def p(): return 1", "1", "2", "return C.p()"),
    "metaclass": in_module(
        "class M(type):\n  def p(cls): return 1\nclass C(metaclass=M): pass", "1", "2", "return C.p()"
    ),
    "base class": in_module("class B:\n  a = 1\nclass C(B): pass", "1", "2", "return C.a"),
    "base class in another module": Case(
        {"MOD_b.py": "class B:\n  a = 1", "MOD.py": "from MOD_b import B\nclass C(B): pass\ndef f(): return C.a"},
        "from MOD import f",
        "1",
        "2",
    ),
    "import in the function": Case(
        {"MOD_b.py": OTHER, "MOD.py": "def f():\n  from MOD_b import g\n  return g()"},
        "from MOD import f",
        "return 1",
        "return 9",
    ),
    "import as another name in the function": Case(
        {"MOD/__init__.py": "", "MOD/b.py": OTHER, "MOD/a.py": "def f():\n  import MOD.b as s\n  return s.g()"},
        "from MOD.a import f",
        "return 1",
        "return 9",
    ),
    "relative import in the function": Case(
        {"MOD/__init__.py": "", "MOD/b.py": OTHER, "MOD/a.py": "def f():\n  from .b import C\n  return C().m()"},
        "from MOD.a import f",
        "return 3",
        "return 9",
    ),
    "relative import of a module": Case(
        {"MOD/__init__.py": "", "MOD/b.py": OTHER, "MOD/a.py": "from . import b\ndef f(): return b.g()"},
        "from MOD.a import f",
        "return 1",
        "return 9",
    ),
    "attribute of a package": Case(
        {"MOD/__init__.py": "", "MOD/b.py": OTHER, "MOD_a.py": "import MOD.b\ndef f(): return MOD.b.C.x"},
        "from MOD_a import f",
        "x = 2",
        "x = 9",
    ),
    "exported by a package": Case(
        {"MOD/__init__.py": "from .b import g", "MOD/b.py": OTHER}, "from MOD import g as f", "return 1", "return 9"
    ),
    "run by a package": Case(
        {"MOD/__init__.py": "from . import b\nb.A = 5", "MOD/b.py": OTHER + "def f(): return A"},
        "from MOD.b import f",
        "A = 5",
        "A = 9",
    ),
    "run by an imported module": Case(
        {
            "MOD.py": "import MOD_c\nX = []\ndef f(): return list(X)",
            "MOD_c.py": "import sys\ndef g(): return 1\nn = g()",
        },
        "import MOD\nMOD.X.append(MOD.MOD_c.n)\nf = lambda: MOD.MOD_c.n",
        "return 1",
        "return 9",
    ),
    "all names of another": Case(
        {"MOD_b.py": OTHER, "MOD.py": "from MOD_b import *\ndef f(): return g()"},
        "from MOD import f",
        "return 1",
        "return 9",
    ),
    "alias": Case(
        {"MOD_b.py": OTHER, "MOD.py": "from MOD_b import g as other\nh = other\ndef f(): return h()"},
        "from MOD import f",
        "return 1",
        "return 9",
    ),
    "module passed on": Case(
        {"MOD_b.py": OTHER, "MOD.py": "import MOD_b\ndef read(m): return m.A\ndef f(): return read(MOD_b)"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "computed attribute": Case(
        {"MOD_b.py": OTHER, "MOD.py": "import MOD_b\ndef f(): return getattr(MOD_b, 'A'.upper())"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "module by its name": Case(
        {"MOD_b.py": OTHER, "MOD.py": "import importlib\ndef f(): return importlib.import_module('MOD_b').A"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "namespace package": Case(
        {"MOD/b.py": OTHER, "MOD/a.py": "def f():\n  from MOD.b import A\n  return A"},
        "from MOD.a import f",
        "A = 4",
        "A = 9",
    ),
    "made up by a package": Case(
        {"MOD/__init__.py": LAZY, "MOD/b.py": OTHER}, "import MOD\ndef f(): return MOD.A", "A = 4", "A = 9"
    ),
    "quoted annotation": in_module(
        "import typing\nclass C:\n  a: 'D'\nclass D:\n  a = 1",
        "a = 1",
        "a = 2",
        "return typing.get_type_hints(C)['a'].a",
    ),
    "deep": Case(
        {
            "MOD_d.py": "A = 1",
            "MOD_c.py": "import MOD_d\ndef c():\n  return MOD_d.A",
            "MOD_b.py": "def b():\n  import MOD_c\n  return MOD_c.c()",
            "MOD.py": "from MOD_b import b\ndef f(): return b()",
        },
        "from MOD import f",
        "A = 1",
        "A = 2",
    ),
    "circle": Case(
        {
            "MOD_b.py": "import MOD\ndef b(n): return MOD.a(n - 1) if n else A\nA = 1",
            "MOD.py": "import MOD_b\ndef a(n): return MOD_b.b(n)\ndef f(): return a(3)",
        },
        "from MOD import f",
        "A = 1",
        "A = 2",
    ),
}

# Objects that a program may use, of its own and of modules.
PROGRAMS = {
    "global of the program": in_program("A = 1\ndef f(): return A", "1", "2"),
    "instance of the program": in_program(INSTANCE + "X = K(1)\ndef f(): return X.a", "K(1)", "K(2)"),
    "slots with a state of another kind": in_program(
        "class C:\n  __slots__ = ('a', 'b')\n  def __init__(self): self.a, self.b = 1, 5\n"
        "  def __getstate__(self): return self.a, self.b\n  def __setstate__(self, state): self.a, self.b = state\n"
        "X = C()\ndef f(): return X.a",
        "= 1,",
        "= 2,",
    ),
    "pattern of the program": in_program("import re\nX = re.compile('a')\ndef f(): return X.pattern", "'a'", "'b'"),
    "dunder attribute": in_program("class C:\n  __version__ = 1\ndef f(): return C.__version__", "1", "2"),
    "hash": in_program(
        "class C:\n  __hash__ = None\ndef f(): return C.__hash__ is None", "None\n", "object.__hash__\n"
    ),
    "attribute of an enum": in_program(
        "import enum\nclass C(enum.Enum):\n  A = 1\nC.factor = 10\ndef f(): return C.factor", "10", "20"
    ),
    "dunder attribute of an enum": in_program(
        "import enum\nclass C(enum.Enum):\n  A = 1\n  __version__ = 1.5\ndef f(): return C.__version__", "1.5", "2.5"
    ),
    "annotation": in_program("class C:\n  a: int\ndef f(): return C.__annotations__", "int", "float"),
    "annotation of a field": in_program(
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n  a: int = 1\ndef f(): return C.__annotations__",
        "int",
        "float",
    ),
    "field": in_program(
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n  a: int = 1\ndef f(): return C().a", "1", "2"
    ),
    "meta class": in_program(
        "class M(type):\n  def p(cls): return 1\nclass C(metaclass=M): pass\ndef f(): return C.p()", "1", "2"
    ),
    "cached function": in_program(
        "import functools\n@functools.lru_cache\ndef g(): return 1\ndef f(): return g()", "1", "2"
    ),
    "dispatching function": in_program(
        "import functools\n@functools.singledispatch\ndef g(x): return 1\n@g.register(int)\ndef _(x): return 2\n"
        "def f(): return g(1)",
        "return 2",
        "return 3",
    ),
    "function of a module": Case({"MOD.py": OTHER}, "from MOD import g\ndef f(): return g()", "return 1", "return 9"),
    "attribute of a module": Case({"MOD.py": OTHER}, "import MOD\ndef f(): return MOD.A", "A = 4", "A = 9"),
    "attribute of a submodule": Case(
        {"MOD/__init__.py": "", "MOD/b.py": OTHER}, "import MOD.b\ndef f(): return MOD.b.C.x", "x = 2", "x = 9"
    ),
    "class of a module": Case({"MOD.py": OTHER}, "from MOD import C\ndef f(): return C().m()", "return 3", "return 9"),
    "instance of a module's class": Case(
        {"MOD.py": OTHER}, "from MOD import C\nX = C()\ndef f(): return X.m()", "return 3", "return 9"
    ),
    "subclass of a module's class": Case(
        {"MOD.py": OTHER}, "import MOD\nclass D(MOD.C): pass\ndef f(): return D().m()", "return 3", "return 9"
    ),
    "object of a module": Case(
        {"MOD.py": INSTANCE + "X = K(1)"}, "from MOD import X\ndef f(): return X.a", "K(1)", "K(2)"
    ),
    "module in the function": Case(
        {"MOD.py": OTHER}, "def f():\n  import MOD\n  return MOD.g()", "return 1", "return 9"
    ),
    "name in the function": Case({"MOD.py": OTHER}, "def f():\n  from MOD import A\n  return A", "A = 4", "A = 9"),
    "alias in the function": Case(
        {"MOD/__init__.py": "", "MOD/b.py": OTHER},
        "def f():\n  import MOD.b as s\n  return s.A",
        "A = 4",
        "A = 9",
    ),
    "import in a nested function": Case(
        {"MOD.py": OTHER},
        "def f():\n  def inner():\n    from MOD import A\n    return A\n  return inner()",
        "A = 4",
        "A = 9",
    ),
    "import by name": Case(
        {"MOD.py": OTHER}, "import importlib\ndef f(): return importlib.import_module('MOD').A", "A = 4", "A = 9"
    ),
    "handed on": Case(
        {"MOD.py": OTHER}, "import MOD\ndef read(m): return m.A\ndef f(): return read(MOD)", "A = 4", "A = 9"
    ),
    "argument": Case(
        {"MOD.py": OTHER},
        "import functools, MOD\ndef read(c): return c.m()\nf = functools.partial(read, MOD.C())",
        "return 3",
        "return 9",
    ),
    "method": Case({"MOD.py": OTHER}, "import MOD\nf = MOD.C().m", "return 3", "return 9"),
}

# Objects that libraries make of the program's functions and classes, and their notes about them.
MADE = {
    "partial with the looks of a function": in_program(
        "import functools\ndef scale(k, x): return k * x\n"
        "f = functools.partial(functools.update_wrapper(functools.partial(scale, 2), scale), 5)",
        "scale, 2",
        "scale, 3",
    ),
    "attribute of a cached function": in_program(
        "import functools\n@functools.lru_cache\ndef g(): return 1\ng.unit = 1\ndef f(): return g.unit",
        "unit = 1",
        "unit = 2",
    ),
    "size of a cache": in_program(
        "import functools\n@functools.lru_cache(4)\ndef g(): return 1\ndef f(): return g.cache_parameters()['maxsize']",
        "(4)",
        "(5)",
    ),
    "attribute of a dispatching function": in_program(
        "import functools\n@functools.singledispatch\ndef g(x): return 1\ng.unit = 1\ndef f(): return g.unit",
        "unit = 1",
        "unit = 2",
    ),
    "missing member of an enumeration": in_program(
        "import enum\nclass C(enum.Enum):\n  A = 1\n  B = 2\n  @classmethod\n"
        "  def _missing_(cls, value): return cls.A\ndef f(): return C(7).value",
        "cls.A",
        "cls.B",
    ),
    "class registered with an abstract one": in_program(
        "import abc\nclass A(abc.ABC): pass\nclass C: pass\nclass D: pass\nA.register(C)\n"
        "def f(): return issubclass(C, A)",
        "register(C)",
        "register(D)",
    ),
    "name of a function": in_program("def g(): return 1\ng.__name__ = 'a'\ndef f(): return g.__name__", "'a'", "'b'"),
    "text of a function": in_program("def g(): pass\ng.__doc__ = 'a'\ndef f(): return g.__doc__", "'a'", "'b'"),
    "text of a class": in_program("class C:\n  'a'\ndef f(): return C.__doc__", "'a'", "'b'"),
    "import by another name": Case(
        {"MOD.py": OTHER},
        "from importlib import import_module as load\ndef f(): return load('MOD').A",
        "A = 4",
        "A = 9",
    ),
    "name resolved": Case(
        {"MOD.py": OTHER}, "import pkgutil as p\ndef f(): return p.resolve_name('MOD:A')", "A = 4", "A = 9"
    ),
    "loaded module": Case(
        {"MOD.py": OTHER},
        "import sys as s, MOD\nM = MOD.g\ndef f(): return M() and s.modules['MOD'].A",
        "A = 4",
        "A = 9",
    ),
}

# Effects of a module's import other than those of calls of its own functions.
TASKS = (
    "class T:\n  def __init__(s, n): s.n, s.down = n, []\n  def __rshift__(s, o): s.down.append(o.n)\n"
    "t1, t2, t3 = T(1), T(2), T(3)\n"
)
IMPORTS = {
    "all names of a library": in_module("from math import *", "math", "cmath", "return sqrt(4)"),
    "all names, with one of a built-in": Case(
        {"MOD_b.py": "def round(x): return 1", "MOD.py": "from MOD_b import *\ndef f(): return round(7.5)"},
        "from MOD import f",
        "return 1",
        "return 2",
    ),
    "all names, one of them instead of another": Case(
        {"MOD_b.py": "def g(): return 1", "MOD.py": "def g(): return 0\nfrom MOD_b import *\ndef f(): return g()"},
        "from MOD import f",
        "return 1",
        "return 2",
    ),
    "all names of two modules": Case(
        {
            "MOD_b.py": "A = 1",
            "MOD_c.py": "A = 2",
            "MOD.py": "from MOD_b import *\nfrom MOD_c import *\ndef f(): return A",
        },
        "from MOD import f",
        "from MOD_b import *\nfrom MOD_c import *",
        "from MOD_c import *\nfrom MOD_b import *",
    ),
    "list of all names": Case(
        {
            "MOD_b.py": "A = 1",
            "MOD_c.py": "__all__ = ['B']\nA = 2\nB = 3",
            "MOD.py": "from MOD_b import *\nfrom MOD_c import *\ndef f(): return A",
        },
        "from MOD import f",
        "['B']",
        "['A']",
    ),
    "registered with a library": Case(
        {
            "MOD.py": "import codecs\n@codecs.register\ndef search(name):\n  if name == 'MOD_x':\n"
            "    return codecs.CodecInfo(lambda s, e='strict': (b'1', len(s)), None)\n"
            "def f(): return 'x'.encode('MOD_x')"
        },
        "from MOD import f",
        "b'1'",
        "b'2'",
    ),
    "subclass of a library's class": in_module(
        "from email.policy import Policy\nclass My(Policy):\n  marker = 1",
        "marker = 1",
        "marker = 2",
        "return [c.marker for c in Policy.__subclasses__() if c.__module__ == __name__]",
    ),
    "subclass of a library's class, by another module": Case(
        {
            "MOD_b.py": "from email.policy import Policy",
            "MOD.py": "from MOD_b import Policy\nclass My(Policy):\n  marker = 1\ndef g(c): return c.__subclasses__()\n"
            "def f():\n  import email.policy as p\n"
            "  return [c.marker for c in g(p.Policy) if c.__module__ == __name__]",
        },
        "from MOD import f",
        "marker = 1",
        "marker = 2",
    ),
    "assigned while a library is set": in_module(
        "import decimal\n_c = decimal.setcontext(decimal.Context(prec=5))",
        "prec=5",
        "prec=9",
        "return decimal.Decimal(1) / 3",
    ),
    "assigned while an operator is at work": in_module(
        TASKS + "chain = t1 >> t2", "t1 >> t2", "t1 >> t3", "return t1.down"
    ),
    "assigned while an iterator is used up": in_module(
        "it = iter(range(9))\nfound = 3 in it", "3 in", "5 in", "return next(it)"
    ),
    "told its name by a class": in_module(
        "X = []\nclass D:\n  def __set_name__(s, c, name): X.append(name)\nd = D()\nclass C:\n  a = d", "a = d", "b = d"
    ),
    "order of imports": Case(
        {
            "MOD_r.py": "X = []",
            "MOD_b.py": "import MOD_r\nMOD_r.X.append(1)",
            "MOD_c.py": "import MOD_r\nMOD_r.X.append(2)",
            "MOD.py": "import MOD_b\nimport MOD_c\nimport MOD_r\ndef f(): return MOD_r.X",
        },
        "from MOD import f",
        "import MOD_b\nimport MOD_c",
        "import MOD_c\nimport MOD_b",
    ),
    "text of a module": Case({"MOD.py": "'one'\ndef f(): return __doc__"}, "from MOD import f", "'one'", "'two'"),
    "text of a module, from another": Case(
        {"MOD.py": "'one'\nA = 1"}, "import MOD\ndef f(): return MOD.__doc__", "'one'", "'two'"
    ),
    "block of one's own for type checkers": in_module(
        "TYPE_CHECKING = True\nif TYPE_CHECKING:\n  X = 1", "X = 1", "X = 2"
    ),
    "importer by another name": Case(
        {"MOD_b.py": OTHER, "MOD.py": "from importlib import import_module as load\ndef f(): return load('MOD_b').A"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "name of a module resolved": Case(
        {"MOD_b.py": OTHER, "MOD.py": "import pkgutil\ndef f(): return pkgutil.resolve_name('MOD_b:A')"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "module run by its name": Case(
        {"MOD_b.py": OTHER, "MOD.py": "import runpy\ndef f(): return runpy.run_module('MOD_b')['A']"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "loaded modules": Case(
        {"MOD_b.py": OTHER, "MOD.py": "from sys import modules\nimport MOD_b\ndef f(): return modules['MOD_b'].A"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
    "loaded modules by another name": Case(
        {"MOD_b.py": OTHER, "MOD.py": "import sys as s\nimport MOD_b\ndef f(): return s.modules['MOD_b'].A"},
        "from MOD import f",
        "A = 4",
        "A = 9",
    ),
}

CASES = {**MADE, **IMPORTS, **GLOBALS, **WAYS, **PROGRAMS}

# Computes keys, in a session and in the process that runs the calls.
DRIVER = """
import base64, json, sys
from executorlib.keys import fingerprint; from executorlib import serialize

folder, role = sys.argv[1:]
sys.path.insert(0, folder)
rows = {}
for what, row in json.load(sys.stdin).items():
    if role == "session":
        namespace = {"__name__": "__main__"}
        exec(compile(row["program"], "<program>", "exec", dont_inherit=True), namespace)
        f = namespace["f"]
        key = fingerprint.key_of(f, (), {})
        try:
            row["pickle"] = base64.b64encode(serialize.dumps_in_band(f)).decode()
        except Exception as error:
            row["pickle"] = None
        row["key"] = [*key[:-1], base64.b64encode(key.sources).decode()]
        row["result"] = repr(f())
        row["after"] = fingerprint.key_of(f, (), {}).name
    elif row["pickle"] is not None:
        *rest, known = row["key"]
        key = fingerprint.Key(*rest, base64.b64decode(known))
        fingerprint.prepare(key)
        f = serialize.loads([base64.b64decode(row["pickle"])])
        row["there"] = fingerprint.recompute(key, f, (), {}).name
        row["result there"] = repr(f())
    rows[what] = row
print(json.dumps(rows))
"""


def write(folder: Path, changed: bool) -> dict[str, dict[str, Any]]:
    """Write the modules of all cases; return their programs."""
    rows = {}
    for number, (what, case) in enumerate(CASES.items()):
        name = "lab_" + str(number).translate(str.maketrans("0123456789", "ghijklmnop"))  # no change is to meet it
        texts = {path.replace("MOD", name): text.replace("MOD", name) for path, text in case.files.items()}
        program = case.program.replace("MOD", name)
        old, new = case.old.replace("MOD", name), case.new.replace("MOD", name)
        if changed:
            assert any(old in text for text in (program, *texts.values())), what
            texts = {path: text.replace(old, new) for path, text in texts.items()}
            program = program.replace(old, new)
        for path, text in texts.items():
            folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
            folder.joinpath(path).write_text(text)
        rows[what] = {"program": program}
    return rows


def drive(folder: Path, role: str, seed: int, rows: dict[str, Any]) -> dict[str, Any]:
    """Run `DRIVER` in an interpreter of its own."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": str(Path(executorlib.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), role],
        input=json.dumps(rows),
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


class Keys(NamedTuple):
    before: dict[str, Any]
    after: dict[str, Any]
    twin: dict[str, Any]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """All cases before and after their change, and unchanged in another place, in processes of their own."""
    made = []
    for seed, (name, changed) in enumerate([("before", False), ("after", True), ("twin", False)], start=1):
        folder = tmp_path_factory.mktemp(name)
        rows = drive(folder, "session", seed, write(folder, changed))
        made.append(drive(folder, "worker", seed + 10, rows))
    return Keys(*made)


@pytest.mark.parametrize("what", CASES)
def test_key_of_a_changed_call_differs(keys: Keys, what: str) -> None:
    before, after = keys.before[what], keys.after[what]
    assert before["result"] != after["result"], "the change changes nothing"
    assert before["key"][0] != after["key"][0]


@pytest.mark.parametrize("what", CASES)
def test_key_of_an_unchanged_call_is_the_same_elsewhere(keys: Keys, what: str) -> None:
    before, twin = keys.before[what], keys.twin[what]
    assert before["key"][0] == twin["key"][0] == before["after"]


@pytest.mark.parametrize("what", CASES)
def test_the_process_that_runs_a_call_derives_the_same_key(keys: Keys, what: str) -> None:
    for row in keys:
        if row[what]["pickle"] is None:
            pytest.skip("cannot be pickled")
        assert row[what]["there"] == row[what]["key"][0]
        assert row[what]["result there"] == row[what]["result"]


def test_a_keyword_is_not_what_is_added_to_the_key() -> None:
    def key(kwargs: dict[str, Any], ranks: int, init: str) -> str:
        return fingerprint.call_key(dict, (), named_inputs(kwargs, ranks, init))

    assert key({"number of ranks": 2}, 1, "") != key({}, 2, "")
    assert key({"init function": "a"}, 1, "") != key({}, 1, "a")
    assert key({"keyword number of ranks": 2}, 1, "") != key({"number of ranks": 2}, 1, "")


def test_a_call_without_assertions_is_another_one() -> None:
    program = (
        "import os.path\nfrom executorlib.keys.fingerprint import call_key\nprint(call_key(os.path.join, ('a',), {}))"
    )
    commands = [[sys.executable, *options, "-c", program] for options in ([], ["-O"], [])]
    keys = [subprocess.check_output(command, timeout=100) for command in commands]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]
