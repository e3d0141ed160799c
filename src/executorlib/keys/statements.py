"""The statements of a module's file: which names each of them defines, uses and may change.

Loaded only if a file has to be read, because `ast` takes long to load.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from executorlib.keys.sources import LOADED, OBJECTS, Root, absolute

# A module that uses one of these can define and read any name, so it is taken as a whole. The second ones do that only
# without arguments.
_ANY_NAME = frozenset({"exec", "eval", "globals"})
_ANY_NAME_ALONE = frozenset({"locals", "vars", "dir"})
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
IMPORTERS = frozenset({"import_module", "__import__"})
# Modules with functions that find a module by its name, and their parts that do not. In a module that imports one of
# them, every string counts that is a module's name.
_MACHINERY = frozenset({"importlib", "importlib.util", "pkgutil", "runpy", "pydoc", "imp"})
_NO_MACHINERY = frozenset({"metadata", "resources"})
_MODULE_NAME = re.compile(r"[^\W\d]\w*([.:][^\W\d]\w*)*")
_CHECKER = "TYPE_CHECKING"


class Statement(NamedTuple):
    """One statement of a module.

    Attributes:
        digest: A digest of what it says, without comments and layout.
        binds: The names that it gives a value.
        uses: The names in it, each with the attributes taken of it.
        imports: For a function or class, what the names that it imports inside stand for.
        runs: True if it may change what other statements define.
        runs_with: It may do so if one of these names is the user's own.
        extends: Names of the classes that it derives from, which may know their subclasses.
        calls: Names of the functions that it calls when it runs; empty for one without a name.
        loads: What it imports when it runs, in this order.
    """

    digest: bytes
    binds: frozenset[str]
    uses: frozenset[tuple[str, ...]]
    imports: dict[str, list[Root]]
    runs: bool
    runs_with: frozenset[str]
    extends: tuple[tuple[str, ...], ...]
    calls: frozenset[tuple[str, ...]]
    loads: tuple[Root, ...]


class Source(NamedTuple):
    """The statements of a module's file.

    Attributes:
        content: A digest of the whole file.
        statements: The statements that it runs.
        defined: The positions of the statements that give a name its value.
        imports: What the names that it imports stand for.
        stars: Modules from which it imports all names.
        whole: True if it can define and read names in ways that cannot be seen.
        lazy: True if it has a ``__getattr__``, and so may import anything below it.
    """

    content: bytes
    statements: tuple[Statement, ...]
    defined: dict[str, list[int]]
    imports: dict[str, list[Root]]
    stars: tuple[str, ...]
    whole: bool
    lazy: bool = False


def parse(data: bytes, path: str, package: str, content: bytes) -> Source:
    """Take a module's file apart.

    Args:
        data: The file's content.
        path: The file.
        package: The package that relative imports in it are relative to.
        content: A digest of the content.
    """
    unknown = Source(content, (), {}, {}, (), True)
    if not path.endswith(".py"):
        return unknown  # an extension module, or byte code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are for those who import the module
            tree = ast.parse(data, path)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return unknown
    reader = _Reader(package, _names_for_checkers(tree) if _CHECKER.encode() in data else set())
    statements = list(filter(None, map(reader.statement, tree.body)))
    if ast.get_docstring(tree, clean=False) is not None:
        statements[0] = statements[0]._replace(binds=frozenset({"__doc__"}))
    if reader.machinery:
        for statement, texts in zip(statements, reader.texts, strict=True):
            statement.imports.setdefault(OBJECTS, []).extend((text, ()) for text in sorted(texts))
    defined: dict[str, list[int]] = {}
    for index, statement in enumerate(statements):
        for bound in statement.binds:
            defined.setdefault(bound, []).append(index)
    constants = set() if reader.stars else _constants(tree, defined)
    return Source(
        content,
        tuple(each._replace(runs_with=each.runs_with - constants) for each in statements),
        defined,
        reader.imports,
        tuple(reader.stars),
        reader.whole,
        "__getattr__" in defined,
    )


def _names_for_checkers(tree: ast.Module) -> set[tuple[str, ...]]:
    """Return what stands for `typing.TYPE_CHECKING` in a module, unless its name is also given something else."""
    known: set[tuple[str, ...]] = set()
    false: set[int] = set()
    given: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    return set()
                if alias.name == _CHECKER and node.module in ("typing", "typing_extensions") and not node.level:
                    known.add((alias.asname or alias.name,))
                else:
                    given.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in ("typing", "typing_extensions"):
                    known.add((alias.asname or alias.name, _CHECKER))
                else:
                    given.add(alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is False:
            false.update(id(target) for target in node.targets if isinstance(target, ast.Name))
            known.update((target.id,) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and id(node) not in false:
            given.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr == _CHECKER and not isinstance(node.ctx, ast.Load):
            return set()
    return {chain for chain in known if chain[-1] == _CHECKER and chain[0] not in given}


def _constants(tree: ast.Module, defined: dict[str, list[int]]) -> set[str]:
    """Return the names of numbers, strings and other values that nothing can change."""
    constants: set[str] = set()
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(node, ast.AnnAssign):
            target = node.target
        if value is not None and isinstance(target, ast.Name) and len(defined.get(target.id, ())) == 1:
            parts = [each for each in ast.walk(value) if isinstance(each, ast.expr)]
            if all(isinstance(each, _CONSTANT) and getattr(each, "id", "") in {"", *constants} for each in parts):
                constants.add(target.id)
    return constants


NAMESPACE = Source(b"", (), {}, {}, (), False)


class _Reader:
    """Turns the statements of one module into what a slice needs to know of them."""

    def __init__(self, package: str, for_checkers: set[tuple[str, ...]]) -> None:
        self._package = package
        self._for_checkers = for_checkers
        self._systems = {"sys"}
        self._importers = set(IMPORTERS)
        self.machinery = False
        self.texts: list[set[str]] = []
        self.imports: dict[str, list[Root]] = {}
        self.stars: list[str] = []
        self.whole = False

    def statement(self, node: ast.stmt) -> Statement | None:
        """Describe a statement. Return None if it does nothing when the module is imported."""
        if isinstance(node, ast.If) and (_chain(node.test) in self._for_checkers or _is_of_a_program(node.test)):
            if not node.orelse:
                return None
            node = ast.If(ast.Constant(False), [ast.Pass()], node.orelse)
        stars = len(self.stars)
        self.texts.append(set())
        text, uses, imports, binds = self._walk(node)
        loads: list[Root] = []
        if isinstance(node, _SCOPES):
            binds.add(node.name)
            self.whole |= node.name == "__getattr__"
        else:
            binds = {*binds, *_stored(node), *imports} - {LOADED, OBJECTS}
            for name, roots in imports.items():
                self.imports.setdefault(name, []).extend(roots)
                loads += roots if name != OBJECTS else ()
            loads += [(star, ()) for star in self.stars[stars:]]
            imports = {name: roots for name, roots in imports.items() if name == OBJECTS}
        risks = _Risks()
        runs = _runs(node, risks)
        bases = node.bases if isinstance(node, ast.ClassDef) else []
        extends = (_chain(base.value if isinstance(base, ast.Subscript) else base) for base in bases)
        digest = hashlib.blake2b("\0".join(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return Statement(
            digest,
            frozenset(binds),
            frozenset(uses),
            imports,
            runs,
            frozenset(risks.names),
            tuple(filter(None, extends)),
            frozenset(risks.calls),
            tuple(loads),
        )

    def _walk(self, top: ast.stmt) -> tuple[list[str], set[tuple[str, ...]], dict[str, list[Root]], set[str]]:
        """List what a tree says, the names in it, its imports and the globals that its functions set.

        This is not recursive, because some trees are deep.
        """
        assigned: set[str] = set()
        text: list[str] = []
        uses: set[tuple[str, ...]] = set()
        imports: dict[str, list[Root]] = {}
        stack: list[ast.AST] = [top]
        while stack:
            node = stack.pop()
            kind = type(node)
            if kind is ast.Name or kind is ast.Attribute:
                inner, attributes = _unwound(node)
                text.append(f"{kind.__name__} {'.'.join(attributes)}")
                if isinstance(inner, ast.Name):
                    chain = (inner.id, *attributes)
                    text.append(inner.id)
                    uses.add(chain)
                    loaded = inner.id in self._systems and chain[1:2] == ("modules",)
                    self.whole |= inner.id in _ANY_NAME or loaded
                    self.machinery |= loaded or inner.id in IMPORTERS
                else:
                    stack.append(inner)
                continue
            if isinstance(node, ast.Constant):
                text.append(f"{type(node.value).__name__} {node.value!r}")
                if isinstance(node.value, str) and _MODULE_NAME.fullmatch(node.value):
                    parts = re.split("[.:]", node.value)
                    self.texts[-1].update(".".join(parts[: count + 1]) for count in range(len(parts)))
                continue
            text.append(kind.__name__)
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._note_import(node, imports)
            elif isinstance(node, ast.Call):
                self._note_call(node, imports)
            elif isinstance(node, ast.Global):
                assigned.update(node.names)
            elif isinstance(node, _ANNOTATED):
                for quoted in _quoted_annotations(node):
                    uses.update((name,) for name in _IDENTIFIER.findall(quoted))
            children: list[ast.AST] = []
            for field in node._fields:
                value = getattr(node, field, None)
                if isinstance(value, ast.AST):
                    children.append(value)
                elif isinstance(value, list):
                    text.append(f"{len(value)} {field}")
                    for each in value:
                        if isinstance(each, ast.AST):
                            children.append(each)
                        else:
                            text.append(repr(each))
                elif field != "type_comment":
                    text.append(f"{field} {value!r}")
            stack.extend(reversed(children))
        return text, uses, imports, assigned

    def _note_import(self, node: ast.Import | ast.ImportFrom, imports: dict[str, list[Root]]) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                self.machinery |= alias.name in _MACHINERY
                if alias.asname:
                    if alias.name == "sys":
                        self._systems.add(alias.asname)
                    imports.setdefault(alias.asname, []).append((alias.name, ()))
                else:
                    top = alias.name.partition(".")[0]
                    imports.setdefault(top, []).append((top, ()))
                    imports.setdefault(LOADED, []).append((alias.name, ()))
            return
        module = absolute(node.module or "", node.level, self._package)
        if module is None:
            return
        for alias in node.names:
            self.machinery |= module in _MACHINERY and alias.name not in _NO_MACHINERY
            if module == "sys" and alias.name in ("modules", "*"):
                self.machinery = self.whole = True
            if module == "importlib" and alias.name in IMPORTERS:
                self._importers.add(alias.asname or alias.name)
            if alias.name == "*":
                self.stars.append(module)
            else:
                imports.setdefault(alias.asname or alias.name, []).append((module, (alias.name,)))

    def _note_call(self, node: ast.Call, imports: dict[str, list[Root]]) -> None:
        called = _chain(node.func)[-1:]
        if not called:
            return
        if called[0] in _ANY_NAME_ALONE and not node.args:
            self.whole = True
        elif called[0] in self._importers and node.args and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value
            if isinstance(name, str):
                plain = name.lstrip(".")
                module = absolute(plain, len(name) - len(plain), self._package)
                if module:
                    imports.setdefault(OBJECTS, []).append((module, ()))


_ANNOTATED = (ast.AnnAssign, ast.arg, ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _unwound(node: ast.AST) -> tuple[ast.AST, list[str]]:
    attributes = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return node, attributes[::-1]


def _chain(node: ast.AST) -> tuple[str, ...]:
    inner, attributes = _unwound(node)
    return (inner.id, *attributes) if isinstance(inner, ast.Name) else ()


def _stored(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load):
            yield each.id
        elif isinstance(each, (*_SCOPES, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and each.name:
            yield each.name
        elif type(each).__name__ == "TypeAlias":
            yield each.name.id  # type: ignore[attr-defined]


def _quoted_annotations(node: ast.AST) -> Iterator[str]:
    for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        if isinstance(annotation, ast.AST):
            for each in ast.walk(annotation):
                if isinstance(each, ast.Constant) and isinstance(each.value, str):
                    yield each.value


def _is_of_a_program(test: ast.expr) -> bool:
    """Return True if this is the condition of a block that runs only if the module is the program."""
    return (
        isinstance(test, ast.Compare)
        and _chain(test.left) == ("__name__",)
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == "__main__"
    )


# -- which statements change what others define -----------------------------------------------------------------------

# Expressions of these, made of any names, evaluate to a new object or to one that already has a name.
_HARMLESS = (
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.Tuple,
    ast.List,
    ast.Set,
    ast.Dict,
    ast.BoolOp,
    ast.IfExp,
    ast.JoinedStr,
    ast.FormattedValue,
)
# Expressions of these, made of such values, evaluate to something that cannot be changed.
_CONSTANT = (ast.Constant, ast.Name, ast.Tuple, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp)

# Decorators that a class makes of its own properties and methods.
_OF_MEMBERS = frozenset({"setter", "getter", "deleter", "register"})


class _Risks:
    """The means by which a statement may change what others define.

    Attributes:
        names: It may do so with one of these, if that stands for something of the user's.
        calls: It may do so by calling one of these, unless that is known to do nothing but return something.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.calls: set[tuple[str, ...]] = set()

    def add(self, node: ast.AST) -> None:
        """Add all names and calls of an expression."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                self.names.add(each.id)
            elif isinstance(each, ast.Call) and not isinstance(_unwound(each.func)[0], ast.Constant | ast.JoinedStr):
                self.calls.add(_chain(each.func))

    def add_decorator(self, node: ast.expr) -> None:
        """Add what is called with a function or class when it is defined."""
        self.add(node)
        if not isinstance(node, ast.Call):
            self.calls.add(_chain(node))

    def add_values(self, expressions: Sequence[ast.expr]) -> None:
        """Add what is in calls, operators and the like, which may change the values of the names."""
        stack: list[ast.AST] = list(expressions)
        while stack:
            node = stack.pop()
            if isinstance(node, _HARMLESS):
                stack += [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
            elif isinstance(node, ast.Lambda):
                stack += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            else:
                self.add(node)


def _runs(node: ast.stmt, risks: _Risks) -> bool:
    """Return True if a statement may change what others define in any case. If not, add to the risks what may do so."""
    if isinstance(node, ast.ImportFrom):
        return any(alias.name == "*" for alias in node.names)  # which replaces what others define
    if isinstance(node, ast.Import | ast.Pass) or type(node).__name__ == "TypeAlias":
        return False
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for decorator in node.decorator_list:
            risks.add_decorator(decorator)
        risks.add_values([*node.args.defaults, *filter(None, node.args.kw_defaults)])
        return False
    if isinstance(node, ast.ClassDef):
        inner = _Risks()
        runs = [_runs(each, inner) for each in node.body]  # not lazily: each call adds its names
        own = {getattr(each, "name", "") for each in node.body}
        for each in node.body:
            if isinstance(each, ast.Assign | ast.AnnAssign) and each.value is not None:
                inner.names.update(
                    name.id for name in ast.walk(each.value) if isinstance(name, ast.Name)
                )  # __set_name__
        risks.names |= inner.names
        risks.calls |= {
            chain for chain in inner.calls if chain[:1] not in {(name,) for name in own} or chain[-1] not in _OF_MEMBERS
        }
        for decorator in node.decorator_list:
            risks.add_decorator(decorator)
        for keyword in node.keywords:
            risks.add(keyword.value)
            if keyword.arg == "metaclass":
                risks.calls.add(_chain(keyword.value))
        risks.add_values([base for base in node.bases if not _chain(base)])
        return any(runs) or "__init_subclass__" in own
    if isinstance(node, ast.Assign):
        if not all(_is_plain(target) for target in node.targets):
            return True
        if any(not isinstance(target, ast.Name) for target in node.targets) and not isinstance(node.value, ast.Tuple):
            risks.add(node.value)  # unpacking may exhaust an iterator
        risks.add_values([node.value])
        return False
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            risks.add_values([node.value])
        return not isinstance(node.target, ast.Name)
    return True


def _is_plain(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple | ast.List):
        return all(map(_is_plain, target.elts))
    return isinstance(target, ast.Name)
