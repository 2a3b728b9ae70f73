"""Small wrong changes to a module's code, of the kinds that programmers make. `bench_mutants` runs them.

It knows no test. Left alone is what no result depends on: docstrings, messages of errors, annotations, logging, names.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

COMPARED: dict[type[ast.AST], list[type[ast.AST]]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn], ast.NotIn: [ast.In],
}  # fmt: skip
COUNTED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.MatMult: ast.Mult,
}  # fmt: skip
PAIRS = (
    ("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"), ("floor", "ceil"), ("fmin", "fmax"),
    ("nanmin", "nanmax"), ("zeros", "ones"), ("cumsum", "cumprod"), ("sum", "prod"), ("mean", "sum"),
    ("add", "discard"),
)  # fmt: skip
OTHER = {b: a for a, b in PAIRS} | dict(PAIRS)
SIDES = {"left": "right", "right": "left"}
SILENT = (
    "log.",
    "logger.",
    "warnings.",
    "os.kill",
    "cast",
    "reading",
)  # a mutant must signal no other process
CHECKS = (
    "strict",
    "cache",
    "nogil",
    "copy",
    "frozen",
    "eq",
)  # keywords that change no result of right code
HIDDEN = ("annotation", "returns", "decorator_list", "type_comment", "type_params", "ctx")


@dataclass(frozen=True, eq=False)
class Mutant:
    """One change: where it is in the tree, and how a person reads it."""

    operator: str
    line: int
    scope: str  # the outermost function that holds it, `Class.method`; empty where it is none's
    is_compiled: bool  # by numba
    before: str
    after: str
    parent: ast.AST
    field: str
    at: int | None
    new: Any

    def put(self) -> None:
        """Into its tree."""
        if self.at is None:
            setattr(self.parent, self.field, self.new)
        else:
            getattr(self.parent, self.field)[self.at] = self.new
        ast.fix_missing_locations(self.parent)


def mutants_of(tree: ast.Module) -> Iterator[Mutant]:
    """Every one of a module, in the order of its text."""
    for site in _sites(tree, Site("", False, False)):
        for operator, before, after, new in _changes(site):
            yield Mutant(
                operator, site.line, site.where.scope, site.where.is_compiled, before, after, site.parent, site.field,
                site.at, new,
            )  # fmt: skip


@dataclass(frozen=True)
class Site:
    """What a node stands in."""

    scope: str
    is_function: bool
    is_compiled: bool

    def inside(self, node: ast.AST) -> Site:
        if self.is_function or not isinstance(node, ast.ClassDef | ast.FunctionDef):
            return self
        name = f"{self.scope}.{node.name}" if self.scope else node.name
        is_compiled = any("njit" in ast.unparse(one) for one in node.decorator_list)
        return Site(name, isinstance(node, ast.FunctionDef), is_compiled)


@dataclass(frozen=True, eq=False)
class Found:
    node: Any
    parent: ast.AST
    field: str
    at: int | None
    line: int
    where: Site


def _sites(parent: ast.AST, where: Site) -> Iterator[Found]:
    for field, value in ast.iter_fields(parent):
        if field in HIDDEN or _is_left_alone(parent):
            continue
        is_default = isinstance(parent, ast.arguments)  # made when the function is
        inner = Site("", False, False) if is_default or not where.is_function else where
        for at, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST) and not _is_docstring(node):
                line = getattr(node, "lineno", getattr(parent, "lineno", 0))
                yield Found(node, parent, field, at, line, inner)
                yield from _sites(node, where.inside(node) if not is_default else inner)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).startswith(SILENT)
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom)


def _is_docstring(node: ast.AST) -> bool:
    """Or the dots of a protocol."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


Change = tuple[str, str, str, Any]


def _changes(site: Found) -> Iterator[Change]:
    node = site.node
    if site.field == "test" or (isinstance(site.parent, ast.comprehension) and site.field == "ifs"):
        yield from _negated(node)
    if (changes := BY_KIND.get(type(node))) is not None:
        yield from changes(node, site)


def _negated(node: ast.expr) -> Iterator[Change]:
    if isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
        return  # changed as what they are
    text = ast.unparse(node)
    yield "negation", text, f"not {text}", ast.UnaryOp(ast.Not(), node)


def _compared(node: ast.Compare, site: Found) -> Iterator[Change]:
    for n, operation in enumerate(node.ops):
        for other in COMPARED.get(type(operation), []):
            operations = [*node.ops[:n], other(), *node.ops[n + 1 :]]
            new = ast.Compare(node.left, operations, node.comparators)
            yield "comparison", ast.unparse(node), ast.unparse(new), new


def _counted(node: ast.BinOp | ast.AugAssign, site: Found) -> Iterator[Change]:
    other = COUNTED.get(type(node.op))
    if other is None or _is_text(node):
        return
    old = ast.unparse(node)
    new: Any = (
        ast.BinOp(node.left, other(), node.right)
        if isinstance(node, ast.BinOp)
        else ast.AugAssign(node.target, other(), node.value)
    )
    yield "arithmetic", old, ast.unparse(new), new
    if isinstance(node, ast.AugAssign):
        yield "statement", old, "pass", ast.Pass()


def _is_text(node: ast.BinOp | ast.AugAssign) -> bool:
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _constant(node: ast.Constant, site: Found) -> Iterator[Change]:
    value, word = node.value, getattr(site.parent, "arg", None)
    if word in CHECKS:
        return
    kind = "axis" if word == "axis" else "constant"
    kind = "default" if isinstance(site.parent, ast.arguments) else kind
    others: list[Any] = []
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [1 - value] if kind == "axis" and value in (0, 1) else [value + 1, value - 1]
    elif isinstance(value, float):
        others = [value * 2 if value else 1.0]
    elif isinstance(value, str) and value in SIDES:
        others = [SIDES[value]]
    for other in others:
        new = ast.copy_location(ast.Constant(other), node)
        yield kind, f"{_context(site)}: {value!r}", repr(other), new


def _context(site: Found) -> str:
    """What a number is part of: there may be several on a line."""
    text = ast.unparse(site.parent) if isinstance(site.parent, ast.expr | ast.keyword) else ""
    return text.partition("\n")[0][:60]


def _unary(node: ast.UnaryOp, site: Found) -> Iterator[Change]:
    if isinstance(node.op, ast.Not | ast.Invert | ast.USub) and not (
        isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
    ):
        yield "negation", ast.unparse(node), ast.unparse(node.operand), node.operand


def _both(node: ast.BoolOp, site: Found) -> Iterator[Change]:
    new = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    yield "and/or", ast.unparse(node), ast.unparse(new), new


def _either(node: ast.IfExp, site: Found) -> Iterator[Change]:
    for branch in (node.body, node.orelse):
        yield "branch", ast.unparse(node), ast.unparse(branch), branch


def _called(node: ast.Name | ast.Attribute, site: Found) -> Iterator[Change]:
    name = node.id if isinstance(node, ast.Name) else node.attr
    is_call = isinstance(site.parent, ast.Call) and site.field == "func"
    if (is_call or site.field == "value") and name in OTHER:
        other = OTHER[name]
        new: Any = (
            ast.Name(other, node.ctx)
            if isinstance(node, ast.Name)
            else ast.Attribute(node.value, other, node.ctx)
        )
        yield "call", ast.unparse(site.parent)[:80], ast.unparse(new), new


def _sliced(node: ast.Slice, site: Found) -> Iterator[Change]:
    parts = {"lower": node.lower, "upper": node.upper, "step": node.step}
    for name, part in parts.items():
        if part is not None:
            new = ast.Slice(**(parts | {name: None}))
            yield "slice", ast.unparse(site.parent), ast.unparse(new), new
            if name == "upper" and not isinstance(part, ast.Constant | ast.UnaryOp):
                less = ast.BinOp(part, ast.Sub(), ast.Constant(1))
                new = ast.Slice(**(parts | {name: less}))
                yield "slice", ast.unparse(site.parent), ast.unparse(new), new


def _dropped(node: ast.stmt, site: Found) -> Iterator[Change]:
    if isinstance(node, ast.Expr) and _is_left_alone(node.value):
        return
    targets = getattr(node, "targets", [])
    if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name | ast.Tuple) for to in targets):
        return  # whoever reads the name fails
    yield "statement", ast.unparse(node).partition("\n")[0], "pass", ast.Pass()


def _returned(node: ast.Return, site: Found) -> Iterator[Change]:
    if node.value is not None and not _is_nothing(node.value):
        new = ast.Return(ast.Constant(None))
        yield "return", ast.unparse(node), "return None", new


def _is_nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value in (None, False)


BY_KIND: dict[type[ast.AST], Callable[[Any, Found], Iterator[Change]]] = {
    ast.Compare: _compared, ast.BinOp: _counted, ast.AugAssign: _counted, ast.Constant: _constant,
    ast.UnaryOp: _unary, ast.BoolOp: _both, ast.IfExp: _either, ast.Name: _called, ast.Attribute: _called,
    ast.Slice: _sliced, ast.Return: _returned,
} | dict.fromkeys(
    (ast.Expr, ast.Assign, ast.Raise, ast.Delete, ast.Continue, ast.Break, ast.Assert), _dropped
)  # fmt: skip
