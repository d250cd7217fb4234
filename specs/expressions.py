"""The expression language of specs: arithmetic, comparisons, choices and a few functions, on a whitelisted
syntax tree.

Nothing is ever handed to Python's `eval`: the text is parsed with `ast`, every node is checked against a
whitelist, and a small interpreter walks the tree. Names are looked up in the given environment only; no
attribute of a Python object is reachable.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from specs.errors import SpecRTError, Where
from specs.functions import BINARY, COMPARE, CONSTANTS, FUNCTIONS, Value
from specs.names import did_you_mean

MAX_LENGTH = 600
MAX_DEPTH = 40


@dataclass(frozen=True)
class Missing:
    """Stands for a name the environment does not have, so that `a | b` can go on to `b`."""

    name: str


@dataclass(frozen=True)
class Expr:
    """One parsed expression; `where` is its first character."""

    text: str
    where: Where
    tree: ast.expr = field(compare=False, repr=False)

    def names(self) -> frozenset[str]:
        """Every free name in it; of a dotted name, the whole path."""
        return frozenset(_names(self.tree))

    def value(self, env: Mapping[str, Value]) -> Value:
        """Its value with names from `env`; raises SPEC-011 for an unknown name, SPEC-012 for an impossible
        operation.
        """
        return evaluate(self, env)

    def as_int(self, env: Mapping[str, Value]) -> int:
        """Its value, which must be a whole number; raises SPEC-013."""
        value = evaluate(self, env)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type("a whole number", value)
        return value

    def as_float(self, env: Mapping[str, Value]) -> float:
        """Its value, which must be a number; raises SPEC-013."""
        value = evaluate(self, env)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong_type("a number", value)
        return float(value)

    def as_bool(self, env: Mapping[str, Value]) -> bool:
        """Its value, which must be true or false; raises SPEC-013."""
        value = evaluate(self, env)
        if not isinstance(value, bool):
            raise self._wrong_type("`true` or `false`", value)
        return value

    def as_str(self, env: Mapping[str, Value]) -> str:
        """Its value, which must be text; raises SPEC-013."""
        value = evaluate(self, env)
        if not isinstance(value, str):
            raise self._wrong_type("text", value)
        return value

    def _wrong_type(self, expected: str, value: Value) -> SpecRTError:
        return SpecRTError("SPEC-013", f"`{self.text}` must be {expected}, but is {show(value)}", where=self.where)


def literal(value: Value) -> str:
    """A value as a spec writes it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def show(value: Value) -> str:
    """A value as a spec would write it, shortened."""
    text = literal(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- parsing -----------------------------------------------------------------------------------------------


def parse_tree(text: str, where: Where) -> ast.expr:
    """Python's syntax tree of `text`, not yet whitelisted; raises SPEC-010."""
    if len(text) > MAX_LENGTH:
        raise SpecRTError("SPEC-010", f"expression longer than {MAX_LENGTH} characters", where=where)
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = getattr(error, "offset", None) or 1
        raise SpecRTError("SPEC-010", f"cannot read the expression `{text}`", where=shift(where, column - 1)) from error


def shift(where: Where, columns: int) -> Where:
    """The place `columns` further to the right."""
    if where.column is None:
        return where
    return Where(where.file, where.line, where.column + columns)


def parse_expr(source: str | int | float | bool | None, where: Where) -> Expr:
    """Parse one expression, or wrap a literal that YAML already read; raises SPEC-010."""
    if not isinstance(source, str):
        text = literal(source)
        return Expr(text, where, ast.parse(text, mode="eval").body)
    source = source.strip()
    tree = parse_tree(source, where)
    check_tree(tree, source, where)
    return Expr(source, where, tree)


def check_tree(tree: ast.expr, text: str, where: Where, depth: int = 0) -> None:
    """Whitelist a syntax tree; raises SPEC-010 naming the first construct that is not allowed."""

    def refuse(what: str, hint: str | None = None) -> SpecRTError:
        return SpecRTError(
            "SPEC-010",
            f"{what} in the expression `{text}`",
            where=shift(where, tree.col_offset),
            hint=hint,
        )

    if depth > MAX_DEPTH:
        raise refuse("too many nested parts")
    children: list[ast.expr] = []
    if isinstance(tree, ast.Constant):
        if isinstance(tree.value, bool | None):
            raise refuse(f"`{tree.value}` is not a name", f"write `{str(tree.value).lower()}`")
        if not isinstance(tree.value, int | float | str):
            raise refuse("this kind of literal is not allowed")
    elif isinstance(tree, ast.Name | ast.Attribute):
        path = dotted(tree)
        if path is None:
            raise refuse("`.` is only allowed between names")
        if "__" in path:
            raise refuse(f"`{path}` is not allowed as a name")
    elif isinstance(tree, ast.BinOp) and (type(tree.op) in BINARY or isinstance(tree.op, ast.BitOr)):
        children = [tree.left, tree.right]
    elif isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub | ast.Not):
        children = [tree.operand]
    elif isinstance(tree, ast.BoolOp):
        children = tree.values
    elif isinstance(tree, ast.Compare):
        if any(type(op) not in COMPARE for op in tree.ops):
            raise refuse("`is` is not allowed", "compare with `==`")
        children = [tree.left, *tree.comparators]
    elif isinstance(tree, ast.IfExp):
        children = [tree.test, tree.body, tree.orelse]
    elif isinstance(tree, ast.List | ast.Tuple):
        children = tree.elts
    elif isinstance(tree, ast.Subscript):
        children = [tree.value, tree.slice]
    elif isinstance(tree, ast.Call):
        if not isinstance(tree.func, ast.Name) or tree.keywords:
            raise refuse("a call must be `function(argument, ...)`")
        if tree.func.id not in FUNCTIONS:
            raise refuse(f"unknown function `{tree.func.id}`", did_you_mean(tree.func.id, FUNCTIONS))
        expected = FUNCTIONS[tree.func.id][1]
        if len(tree.args) != expected:
            raise refuse(f"`{tree.func.id}` takes {expected} argument{'s'[: expected > 1]}, got {len(tree.args)}")
        children = tree.args
    else:
        raise refuse(f"`{ast.get_source_segment(text, tree)}` is not allowed")
    for child in children:
        check_tree(child, text, where, depth + 1)


def dotted(tree: ast.expr) -> str | None:
    """`a.b.c` for a chain of names, else None."""
    if isinstance(tree, ast.Name):
        return tree.id
    if isinstance(tree, ast.Attribute):
        base = dotted(tree.value)
        return None if base is None else f"{base}.{tree.attr}"
    return None


def _names(tree: ast.expr) -> Iterator[str]:
    path = dotted(tree)
    if path is not None:
        if path not in CONSTANTS:
            yield path
        return
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.expr) and not (isinstance(tree, ast.Call) and child is tree.func):
            yield from _names(child)


# ---- evaluation --------------------------------------------------------------------------------------------


def evaluate(expr: Expr, env: Mapping[str, Value]) -> Value:
    """The value of `expr` with names from `env`; raises SPEC-011 for an unknown name, SPEC-012 for an
    impossible operation.
    """
    try:
        value = _evaluate(expr.tree, env)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, KeyError, IndexError) as error:
        raise SpecRTError(
            "SPEC-012", f"`{expr.text}` cannot be computed: {_reason(error)}", where=expr.where
        ) from error
    if isinstance(value, Missing):
        raise SpecRTError(
            "SPEC-011", f"`{value.name}` is not defined", where=expr.where, hint=did_you_mean(value.name, env)
        )
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no entry {error}"
    return str(error)


def lookup(path: str, env: Mapping[str, Value]) -> Value:
    """The value at a dotted path, or `Missing`."""
    if path in env:
        return env[path]
    if path in CONSTANTS:
        return CONSTANTS[path]
    head, *rest = path.split(".")
    value: Value = env.get(head, Missing(path))
    for key in rest:
        if not isinstance(value, Mapping) or key not in value:
            return Missing(path)
        value = value[key]
    return value


def _evaluate(tree: ast.expr, env: Mapping[str, Value]) -> Value:
    """Missing names pass up to the nearest `|`; everything else treats them as an answer."""
    path = dotted(tree)
    if path is not None:
        return lookup(path, env)
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.IfExp):
        test = _evaluate(tree.test, env)
        if isinstance(test, Missing):
            return test
        return _evaluate(tree.body if _truth(test) else tree.orelse, env)
    if isinstance(tree, ast.BoolOp):
        value: Value = None
        for child in tree.values:
            value = _evaluate(child, env)
            if isinstance(value, Missing) or _truth(value) is isinstance(tree.op, ast.Or):
                return value
        return value
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        left = _evaluate(tree.left, env)
        return _evaluate(tree.right, env) if left is None or isinstance(left, Missing) else left
    parts = [_evaluate(child, env) for child in _operands(tree)]
    for part in parts:
        if isinstance(part, Missing):
            return part
    return _apply(tree, parts)


def _operands(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp):
        return [tree.left, tree.right]
    if isinstance(tree, ast.UnaryOp):
        return [tree.operand]
    if isinstance(tree, ast.Compare):
        return [tree.left, *tree.comparators]
    if isinstance(tree, ast.List | ast.Tuple):
        return tree.elts
    if isinstance(tree, ast.Subscript):
        return [tree.value, tree.slice]
    assert isinstance(tree, ast.Call)
    return tree.args


def _apply(tree: ast.expr, parts: list[Value]) -> Value:
    if isinstance(tree, ast.BinOp):
        return BINARY[type(tree.op)](_number(parts[0]), _number(parts[1]))
    if isinstance(tree, ast.UnaryOp):
        if isinstance(tree.op, ast.Not):
            return not _truth(parts[0])
        return BINARY[ast.Sub](0, _number(parts[0]))
    if isinstance(tree, ast.Compare):
        pairs = zip(tree.ops, parts, parts[1:], strict=False)
        results = [COMPARE[type(op)](a, b) for op, a, b in pairs]
        return results[0] if len(results) == 1 else all(results)
    if isinstance(tree, ast.List | ast.Tuple):
        return parts
    if isinstance(tree, ast.Subscript):
        return parts[0][parts[1]]
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    return FUNCTIONS[tree.func.id][0](*parts)


def _number(value: Value) -> Value:
    if isinstance(value, str | list | dict | bool | None):
        raise TypeError(f"arithmetic needs numbers, got {show(value)}")
    return value


def _truth(value: Value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a condition must be true or false, got {show(value)}")
    return value
