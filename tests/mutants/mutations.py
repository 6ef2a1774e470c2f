"""Small changes of code, each of which should make a test fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Mutation(NamedTuple):
    """A change of a text: where, all of it then, and its line before and after; of several lines the first."""

    line: int
    source: str
    old: str
    new: str


_COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
_ARITHMETIC: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Add(),
    ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Mult(),
    ast.Mod: ast.FloorDiv(),
    ast.Pow: ast.Mult(),
    ast.LShift: ast.RShift(),
    ast.RShift: ast.LShift(),
    ast.BitAnd: ast.BitOr(),
    ast.BitOr: ast.BitAnd(),
    ast.BitXor: ast.BitOr(),
}
_DTYPES = {"float32": "bfloat16", "float64": "float32", "int64": "int32", "int32": "int16"}
_CASTS = {"float": "bfloat16", "double": "float", "long": "int"}
_REMOVED = (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete)
# What says something to readers or to type checkers, and nothing to the program.
_UNTOUCHED = (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)
_NO_CODE = {"annotation", "returns", "decorator_list"}


def mutations(text: str) -> Iterator[Mutation]:
    """Those of a text: one comparison, sum, number, condition or dtype reads otherwise, or a statement is gone."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    whole = text.encode()
    for node in _nodes(ast.parse(text)):
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
        first, last = starts[node.lineno - 1] + node.col_offset, starts[end_line - 1] + end_column
        for new in _changes(node):
            source = (whole[:first] + new.encode() + whole[last:]).decode()
            told = source.splitlines()[node.lineno - 1]
            yield Mutation(node.lineno, source, lines[node.lineno - 1].strip(), told.strip())


def function_at(text: str, line: int) -> int:
    """The first line, decorators included, of the innermost function that a line lies in; 0 where there is none."""
    return max((first for first, last in _functions(text) if first <= line <= last), default=0)


@cache
def _functions(text: str) -> list[tuple[int, int]]:
    return [
        (min(each.lineno for each in (node, *node.decorator_list)), node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _nodes(node: ast.AST, inside: bool = False) -> Iterator[ast.expr | ast.stmt]:
    """What may be changed, in order."""
    if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__"):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    if isinstance(node, _UNTOUCHED):
        return
    alias = isinstance(node, ast.Module | ast.ClassDef)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in _NO_CODE and not (alias and _is_type(child)):
                yield from _nodes(child)


def _is_type(node: ast.AST) -> bool:
    """Whether a statement only names a type."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr)


def _changes(node: ast.expr | ast.stmt) -> Iterator[str]:
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                new = ast.Compare(left, [*ops[:i], _COMPARISONS[type(op)], *ops[i + 1 :]], comparators)
                yield f"({ast.unparse(new)})"
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC and not _is_text(left) and not _is_text(right):
            yield f"({ast.unparse(ast.BinOp(left, _ARITHMETIC[type(op)], right))})"
        case ast.BoolOp(op, values):
            yield f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))})"
        case ast.UnaryOp(ast.Not(), operand) | ast.UnaryOp(ast.USub(), operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield str(not value)
        case ast.Constant(int(value)):
            yield str(value + 1)
        case ast.Constant(float(value)):
            yield str(2 * value if value else 1.0)
        case ast.Attribute(ast.Name("torch"), name) if name in _DTYPES:
            yield f"torch.{_DTYPES[name]}"
        case ast.Call(ast.Attribute(value, name), []) if name in _CASTS:
            yield f"({ast.unparse(value)}).{_CASTS[name]}()"
        case ast.Expr(ast.Call()) | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield "pass"
        case _ if isinstance(node, _REMOVED):
            yield "pass"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
