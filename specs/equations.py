"""The equations of `graph:`: how the parts are wired. Parsed with `ast` against a whitelist into a few frozen
node types.

x = embed(tokens)                      a call of a part, or of a function from FUNCTIONS
x = x + attn(norm_1(x))                + - * / of values and scalars
x = x * sqrt(d_model)                  a scalar: any expression of config names, `layer` and numbers
x = x + (moe(h) if layer >= 1 else mlp(h))    a choice made when the model is built, not when it runs
h = tanh(pooler(first(x)))             first: a row's first token; squeeze: without the last dim, which is 1
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from specs.errors import SpecRTError, Where
from specs.expressions import Expr, check_tree, parse_expr, shift
from specs.functions import CONSTANTS
from specs.functions import FUNCTIONS as SCALAR_FUNCTIONS
from specs.names import did_you_mean
from specs.yaml_loader import Node, Scalar, YamlList, YamlMap

FUNCTIONS = {"tanh": 1, "sigmoid": 1, "exp": 1, "sqrt": 1, "first": 1, "squeeze": 1}
"""Functions of tensors, with their number of arguments; all but the last two are elementwise."""
INPUTS = ("tokens", "positions", "token_types", "ordinals")
"""Values that exist before the first equation, each int [B, S]."""
SEQUENCE_INPUTS = ("prefix", "blank", "counting")
"""Inputs that masks and positions read by themselves, one number for each sequence, int [B]."""
OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "start_logits", "end_logits")
"""A value with one of these names is a result of the model."""
LAYER = "layer"
"""Inside `repeat`: the number of the layer, counted from 0 through all repeats."""


@dataclass(frozen=True)
class Name:
    """A tensor: an input or the target of an earlier equation."""

    id: str
    where: Where


@dataclass(frozen=True)
class Constant:
    """A number known when the model is built: an expression of config names, `layer` and literals."""

    expr: Expr
    where: Where


@dataclass(frozen=True)
class BinOp:
    """`left op right` with op one of + - * /; at least one side is a tensor."""

    op: str
    left: Value
    right: Value
    where: Where


@dataclass(frozen=True)
class Call:
    """A part (then `func` is in `Spec.parts`) or a function of FUNCTIONS applied to tensors."""

    func: str
    args: tuple[Value, ...]
    where: Where


@dataclass(frozen=True)
class IfExp:
    """`body` when the static condition `test` holds, else `orelse`."""

    test: Expr
    body: Value
    orelse: Value
    where: Where


Value = Name | Constant | BinOp | Call | IfExp


@dataclass(frozen=True)
class Equation:
    """`targets = value`; more than one target only for a part that gives several values. It is there `when` holds."""

    targets: tuple[str, ...]
    value: Value
    where: Where
    when: Expr | None = None


@dataclass(frozen=True)
class Repeat:
    """`body`, once per layer; names it assigns that exist before it are carried from layer to layer."""

    count: Expr
    body: tuple[Equation, ...]
    where: Where


Step = Equation | Repeat

_OPS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def parse_graph(node: Node, parts: set[str]) -> tuple[Step, ...]:
    """The steps of `graph:`; `parts` are the names that can be called; raises SPEC-005, SPEC-020, SPEC-021."""
    if not isinstance(node, YamlList):
        raise SpecRTError("SPEC-005", "`graph` must be a list of equations", where=node.where)
    tensors: set[str] = set(INPUTS)
    steps: list[Step] = []
    for item in node:
        if isinstance(item, YamlMap) and next(iter(item), "").startswith("when "):
            steps += _parse_when(item, parts, tensors)
        elif isinstance(item, YamlMap):
            steps.append(_parse_repeat(item, parts, tensors))
        else:
            steps.append(_parse_equation(item, parts, tensors))
    return tuple(steps)


def _parse_when(item: YamlMap, parts: set[str], tensors: set[str]) -> list[Equation]:
    """Equations under a condition; what they assign is known among them only."""
    ((key, body),) = item.items() if len(item) == 1 else [("", item)]
    where = item.key_where.get(key, item.where)
    if not isinstance(body, YamlList) or not body:
        raise SpecRTError("SPEC-020", "`when CONDITION:` needs a list of equations below it", where=where)
    test = parse_expr(key[len("when ") :], shift(where, len("when ")))
    inner = set(tensors)
    return [replace(_parse_equation(line, parts, inner), when=test) for line in body]


def _parse_repeat(item: YamlMap, parts: set[str], tensors: set[str]) -> Repeat:
    keys = list(item)
    key = keys[0] if keys else ""
    if len(keys) != 1 or not key.startswith("repeat "):
        raise SpecRTError(
            "SPEC-020",
            "expected an equation or `repeat COUNT:`",
            where=item.where,
            hint="an equation that holds `: ` must be in double quotes",
        )
    where = item.key_where[key]
    body = item[key]
    if not isinstance(body, YamlList) or not body:
        raise SpecRTError("SPEC-020", "`repeat` needs a list of equations below it", where=where)
    count = parse_expr(key[len("repeat ") :], shift(where, len("repeat ")))
    # Names first assigned inside the loop are not known after it.
    inner = set(tensors)
    return Repeat(count, tuple(_parse_equation(line, parts, inner) for line in body), where)


def _parse_equation(item: Node, parts: set[str], tensors: set[str]) -> Equation:
    if not isinstance(item, Scalar) or not isinstance(item.value, str):
        hint = "`repeat` cannot be nested" if isinstance(item, YamlMap) else None
        raise SpecRTError("SPEC-020", "expected an equation such as `x = x + attn(h)`", where=item.where, hint=hint)
    text, where = item.value, item.where
    if item.quoted:
        where = shift(where, 1)
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = (getattr(error, "offset", None) or 1) - 1
        raise SpecRTError("SPEC-020", f"cannot read the equation `{text}`", where=shift(where, column)) from error
    if len(module.body) != 1 or not isinstance(module.body[0], ast.Assign) or len(module.body[0].targets) != 1:
        raise SpecRTError("SPEC-020", f"`{text}` is not an equation `name = value`", where=where)
    assign = module.body[0]
    targets = _targets(assign.targets[0], text, where)
    value = _Reader(text, where, parts, tensors).read(assign.value)
    tensors.update(targets)
    return Equation(targets, value, where)


def _targets(tree: ast.expr, text: str, where: Where) -> tuple[str, ...]:
    elements = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    names = tuple(element.id for element in elements if isinstance(element, ast.Name))
    if len(names) != len(elements) or len(set(names)) != len(names) or not names:
        raise SpecRTError("SPEC-020", f"the left side of `{text}` must be one or more names", where=where)
    for name in names:
        if name in INPUTS or name == LAYER or name in CONSTANTS or name in FUNCTIONS or name in SCALAR_FUNCTIONS:
            raise SpecRTError("SPEC-021", f"`{name}` has a meaning of its own and cannot be assigned", where=where)
    return names


@dataclass(frozen=True)
class _Reader:
    """Turns the right side of one equation into value nodes."""

    text: str
    where: Where
    parts: set[str]
    tensors: set[str]

    def read(self, tree: ast.expr, depth: int = 0) -> Value:
        where = shift(self.where, tree.col_offset)
        if depth > 40:
            raise SpecRTError(
                "SPEC-020",
                "too many nested parts in one equation",
                where=where,
                hint="name an intermediate value",
            )
        if self._is_constant(tree):
            return Constant(self._expr(tree), where)
        if isinstance(tree, ast.Name):
            return Name(tree.id, where)
        if isinstance(tree, ast.BinOp) and type(tree.op) in _OPS:
            return BinOp(_OPS[type(tree.op)], self.read(tree.left, depth + 1), self.read(tree.right, depth + 1), where)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            minus_one = parse_expr(-1, where)
            return BinOp("*", Constant(minus_one, where), self.read(tree.operand, depth + 1), where)
        if isinstance(tree, ast.IfExp):
            if not self._is_constant(tree.test):
                raise SpecRTError(
                    "SPEC-020",
                    "a condition may only use config names, `layer` and numbers",
                    where=shift(self.where, tree.test.col_offset),
                    hint="it is decided when the model is built",
                )
            return IfExp(
                self._expr(tree.test),
                self.read(tree.body, depth + 1),
                self.read(tree.orelse, depth + 1),
                where,
            )
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
            func = tree.func.id
            if func not in self.parts and func not in FUNCTIONS:
                raise SpecRTError(
                    "SPEC-022",
                    f"`{func}` is neither a part nor a function",
                    where=where,
                    hint=did_you_mean(func, [*self.parts, *FUNCTIONS]),
                )
            return Call(func, tuple(self.read(arg, depth + 1) for arg in tree.args), where)
        raise SpecRTError(
            "SPEC-020",
            f"`{ast.get_source_segment(self.text, tree)}` is not allowed in an equation",
            where=where,
            hint="allowed: names, numbers, + - * /, part(x), function(x), a if condition else b",
        )

    def _is_constant(self, tree: ast.expr) -> bool:
        """Whether nothing in it is a tensor. A lone unknown name is left to the name check, which knows what
        is near.
        """
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and (node.id in self.tensors or node.id in self.parts):
                return False
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in SCALAR_FUNCTIONS:
                return False
        return True

    def _expr(self, tree: ast.expr) -> Expr:
        where = shift(self.where, tree.col_offset)
        check_tree(tree, self.text, self.where)
        return Expr(ast.get_source_segment(self.text, tree) or "", where, tree)


def children(value: Value) -> tuple[Value, ...]:
    """The nodes right below a node."""
    if isinstance(value, BinOp):
        return (value.left, value.right)
    if isinstance(value, IfExp):
        return (value.body, value.orelse)
    return value.args if isinstance(value, Call) else ()


def walk(value: Value) -> Iterator[Value]:
    """The node and all nodes below it, outermost first."""
    yield value
    for child in children(value):
        yield from walk(child)


def equations(steps: tuple[Step, ...]) -> Iterator[Equation]:
    """Every equation, those in repeats included, in order."""
    for step in steps:
        if isinstance(step, Repeat):
            yield from step.body
        else:
            yield step
