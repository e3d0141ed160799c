"""The statements of a module's file: which names each of them defines, uses and may change.

Loaded only where a file has to be read, because `ast` takes long to load.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from executorlib.sources import LOADED, OBJECTS, Root, absolute

# A module that uses one of these can define and read any name, so it is taken whole; of the second ones, without
# arguments.
_ANY_NAME = frozenset({"exec", "eval", "globals"})
_ANY_NAME_ALONE = frozenset({"locals", "vars", "dir"})
_ANY_MODULE = ("sys", "modules")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_IMPORTERS = frozenset({"import_module", "__import__"})


class Statement(NamedTuple):
    """One statement of a module.

    Attributes:
        digest: Stands for what it says, comments and layout aside.
        binds: The names that it gives a value.
        uses: The names in it, each with the attributes taken of it.
        imports: What names in a function or class mean that are imported there.
        runs: Whether it may change what other statements have defined.
        runs_with: It may if one of these names is the user's own.
        extends: Names of the classes that it derives from, which can know their subclasses.
    """

    digest: bytes
    binds: frozenset[str]
    uses: frozenset[tuple[str, ...]]
    imports: dict[str, list[Root]]
    runs: bool
    runs_with: frozenset[str]
    extends: tuple[tuple[str, ...], ...]


class Source(NamedTuple):
    """The statements of a module's file.

    Attributes:
        content: Stands for all that the file says.
        statements: What it runs.
        defined: The places of the statements that give a name its value.
        imports: What names stand for that it imports.
        stars: Modules of which it imports all names.
        whole: Whether it can define and read names in ways that do not show.
        lazy: Whether it makes up what is asked of it, and so may import whatever is below it.
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
        data: What it holds.
        path: Where it is.
        package: The package that relative imports in it are relative to.
        content: Stands for what it holds.
    """
    unknown = Source(content, (), {}, {}, (), True)
    if not path.endswith(".py"):
        return unknown  # an extension module, or byte code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever imports the module is told
            tree = ast.parse(data, path)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return unknown
    reader = _Reader(package)
    statements = tuple(filter(None, map(reader.statement, tree.body)))
    defined: dict[str, list[int]] = {}
    for index, statement in enumerate(statements):
        for bound in statement.binds:
            defined.setdefault(bound, []).append(index)
    return Source(
        content, statements, defined, reader.imports, tuple(reader.stars), reader.whole, "__getattr__" in defined
    )


NAMESPACE = Source(b"", (), {}, {}, (), False)


class _Reader:
    """Turns the statements of one module into what a slice needs of them."""

    def __init__(self, package: str) -> None:
        self._package = package
        self.imports: dict[str, list[Root]] = {}
        self.stars: list[str] = []
        self.whole = False

    def statement(self, node: ast.stmt) -> Statement | None:
        """Describe a statement; None for one that does nothing when the module is imported."""
        if isinstance(node, ast.If) and _is_never_true(node.test):
            if not node.orelse:
                return None
            node = ast.If(ast.Constant(False), [ast.Pass()], node.orelse)
        text, uses, imports, binds = self._walk(node)
        if isinstance(node, _SCOPES):
            binds.add(node.name)
            self.whole |= node.name == "__getattr__"
        else:
            binds = {*binds, *_stored(node), *imports} - {LOADED, OBJECTS}
            for name, roots in imports.items():
                self.imports.setdefault(name, []).extend(roots)
            imports = {name: roots for name, roots in imports.items() if name == OBJECTS}
        runs, runs_with = _effects(node)
        bases = node.bases if isinstance(node, ast.ClassDef) else []
        extends = tuple(filter(None, map(_chain, bases)))
        digest = hashlib.blake2b("\0".join(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return Statement(digest, frozenset(binds), frozenset(uses), imports, runs, frozenset(runs_with), extends)

    def _walk(self, top: ast.stmt) -> tuple[list[str], set[tuple[str, ...]], dict[str, list[Root]], set[str]]:
        """List what a tree says, the names in it, its imports and the globals that its functions set.

        Without recursion, as some are deep.
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
                    self.whole |= inner.id in _ANY_NAME or chain[:2] == _ANY_MODULE
                else:
                    stack.append(inner)
                continue
            if isinstance(node, ast.Constant):
                text.append(f"{type(node.value).__name__} {node.value!r}")
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
                if alias.asname:
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
        elif called[0] in _IMPORTERS and node.args and isinstance(node.args[0], ast.Constant):
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


def _is_never_true(test: ast.expr) -> bool:
    """Whether a condition is that of a block for type checkers, or for running the module as a program."""
    if _chain(test)[-1:] == ("TYPE_CHECKING",):
        return True
    return (
        isinstance(test, ast.Compare)
        and _chain(test.left) == ("__name__",)
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == "__main__"
    )


# -- which statements change what others define -----------------------------------------------------------------------

# Of expressions of these, made of any names, the value is a new object or one that has a name already.
_HARMLESS = (
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.Tuple,
    ast.List,
    ast.Set,
    ast.Dict,
    ast.UnaryOp,
    ast.BinOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.JoinedStr,
    ast.FormattedValue,
)


def _effects(node: ast.stmt) -> tuple[bool, set[str]]:
    """Say whether a statement may change what others define: surely not, or with one of some names, or always."""
    names: set[str] = set()
    return _runs(node, names), names


def _runs(node: ast.stmt, names: set[str]) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or type(node).__name__ == "TypeAlias":
        return False
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for decorator in node.decorator_list:
            _add_names(decorator, names)
        _add_risks([*node.args.defaults, *filter(None, node.args.kw_defaults)], names)
        return False
    if isinstance(node, ast.ClassDef):
        for part in (*node.decorator_list, *node.keywords):
            _add_names(part, names)
        _add_risks([base for base in node.bases if not _chain(base)], names)
        runs = [_runs(each, names) for each in node.body]  # of each, for the names
        return any(runs) or any(getattr(each, "name", "") == "__init_subclass__" for each in node.body)
    if isinstance(node, ast.Assign):
        if not all(_is_plain(target) for target in node.targets):
            return True
        if any(not isinstance(target, ast.Name) for target in node.targets) and not isinstance(node.value, ast.Tuple):
            _add_names(node.value, names)  # taking it apart may use it up
        _add_risks([node.value], names)
        return False
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            _add_risks([node.value], names)
        return not isinstance(node.target, ast.Name)
    return True


def _is_plain(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple | ast.List):
        return all(map(_is_plain, target.elts))
    return isinstance(target, ast.Name)


def _add_names(node: ast.AST, names: set[str]) -> None:
    names.update(each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _add_risks(expressions: Sequence[ast.expr], names: set[str]) -> None:
    """Add the names in calls and the like, which may change what the names stand for."""
    stack: list[ast.AST] = list(expressions)
    while stack:
        node = stack.pop()
        if isinstance(node, _HARMLESS):
            stack += [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        elif isinstance(node, ast.Lambda):
            stack += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        else:
            _add_names(node, names)
