"""Folds what is known before the model runs: constants, operations that change nothing, equal equations, dead ones.

Constants are evaluated by the operation's own meaning, so the value is the one that the reference computes. Weights are
no constants here: expressions of weights alone are left to the lowering, which evaluates them once.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value, substitute, walk
from compiler.ir.ops import REGISTRY
from compiler.ir.types import STORED, TensorType
from compiler.passes.pattern import show
from compiler.passes.rewrite import remove_dead
from compiler.passes.runner import Log, Pass

LARGEST = 4096  # elements of a constant that is written out in the graph
_LITERAL_DTYPES = frozenset({"f32", "i32", "i64"})


def _fold(graph: Graph, log: Log) -> Graph:
    outputs = tuple(value for _, value in graph.outputs)
    folder = _Folder(log)
    equations = folder.block(graph.equations, outputs, {}, {}, {})
    outputs_now = tuple((name, folder.resolved(value)) for name, value in graph.outputs)
    folded = replace(graph, equations=equations, outputs=outputs_now)
    kept = remove_dead(folded)
    alive = {equation.results[0].name for equation in walk(kept.equations)}
    for equation in walk(folded.equations):
        if equation.results[0].name not in alive:
            log.hit("dead", equation.results[0].name, equation.where)
    return kept


class _Folder:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.swap: dict[str, Arg] = {}

    def resolved(self, value: Value) -> Value:
        """What a value became."""
        new = self.swap.get(value.name, value)
        return new if isinstance(new, Value) else value

    def block(
        self,
        equations: tuple[Equation, ...],
        results: tuple[Value, ...],
        outer: dict[str, Equation],
        known: dict[object, Value],
        scalars: dict[str, Arg],
    ) -> tuple[Equation, ...]:
        """Fold one block; `known` are pure equations around it by content, `scalars` what fits in as a literal."""
        definitions, known, scalars = dict(outer), dict(known), dict(scalars)
        needed = {value.name for value in results}
        out: list[Equation] = []
        for original in equations:
            equation = substitute(original, self.swap) if self.swap else original
            if equation.body is not None:
                out.append(self.repeat(equation, definitions, known, scalars))
                continue
            written = _with_literals(equation, scalars)
            if written is not equation:
                self.log.hit("literal", equation.results[0].name, equation.where)
                equation = written
            folded = _evaluate(equation, definitions)
            if folded is not None:
                self.log.hit("constant", equation.result.name, equation.where)
                equation = folded
            shorter = _shorter(equation, definitions)
            if shorter is not None:
                self.log.hit("chain", equation.result.name, equation.where)
                equation = shorter
            same = _identity(equation)
            rule = "identity"
            if same is None and not REGISTRY[equation.op].effect:
                same, rule = known.get(_key(equation)), "equal"
            if same is not None and len(equation.results) == 1:
                self.swap[equation.result.name] = same
                self.log.hit(rule, equation.result.name, equation.where)
                continue
            known[_key(equation)] = equation.results[0]
            if equation.op == "const" and equation.result.type.rank == 0 and equation.result.name not in needed:
                value = equation.attr["value"]
                if isinstance(value, (int, float)) and equation.result.type.dtype in _LITERAL_DTYPES:
                    scalars[equation.result.name] = value
            definitions.update((value.name, equation) for value in equation.results)
            out.append(equation)
        return tuple(out)

    def repeat(
        self, equation: Equation, outer: dict[str, Equation], known: dict[object, Value], scalars: dict[str, Arg]
    ) -> Equation:
        body = equation.body
        assert body is not None
        equations = self.block(body.equations, body.results, outer, known, scalars)
        results = tuple(self.resolved(value) for value in body.results)
        return replace(equation, body=Block(body.params, equations, results))


def _key(equation: Equation) -> object:
    """What makes two pure equations the same: all but the result's name and the place."""
    # 1, 1.0 and true are equal in Python and different here.
    args = tuple(arg.name if isinstance(arg, Value) else (type(arg).__name__, arg) for arg in equation.args)
    return equation.op, args, repr(equation.attrs), tuple(value.type for value in equation.results)


def _identity(equation: Equation) -> Value | None:
    """The operand that an equation gives back unchanged."""
    op, args = equation.op, equation.args
    first = args[0] if args else None
    if not isinstance(first, Value) or len(equation.results) != 1 or first.type != equation.result.type:
        if op in ("add", "mul") and isinstance(args[1], Value) and args[1].type == equation.result.type:
            return args[1] if _is(args[0], 1.0 if op == "mul" else 0.0) else None
        return None
    if op in ("reshape", "cast", "slice") or (op == "concat" and len(args) == 1):
        return first
    if op == "transpose":
        axes = equation.attr["axes"]
        return first if isinstance(axes, tuple) and axes == tuple(range(-len(axes), 0)) else None
    if op in ("add", "sub"):
        return first if _is(args[1], 0.0) else None
    if op in ("mul", "div"):
        return first if _is(args[1], 1.0) else None
    if op in ("and", "or"):
        return first if args[0] == args[1] else None
    return None


def _is(arg: Arg, number: float) -> bool:
    return isinstance(arg, (int, float)) and not isinstance(arg, bool) and arg == number


def _shorter(equation: Equation, definitions: dict[str, Equation]) -> Equation | None:
    """A reshape of a reshape reads the first one's operand."""
    if equation.op != "reshape":
        return None
    before = definitions.get(equation.values[0].name)
    return replace(equation, args=before.args) if before is not None and before.op == "reshape" else None


def _with_literals(equation: Equation, scalars: dict[str, Arg]) -> Equation:
    """Scalar constants as literals, where a tensor stands beside them to give the type."""
    definition = REGISTRY[equation.op]
    if not scalars or not definition.literals:
        return equation
    args = tuple(scalars.get(arg.name, arg) if isinstance(arg, Value) else arg for arg in equation.args)
    if args == equation.args or not any(isinstance(arg, Value) for arg in args):
        return equation
    types = definition.infer_types(args, equation.attr)
    return replace(equation, args=args) if types == tuple(value.type for value in equation.results) else equation


def _evaluate(equation: Equation, definitions: dict[str, Equation]) -> Equation | None:
    """The equation as a constant, where all its operands are small constants."""
    definition = REGISTRY[equation.op]
    if definition.source or definition.effect or not equation.values or len(equation.results) != 1:
        return None
    kind = equation.result.type
    if any(isinstance(dim, str) for dim in kind.shape) or prod(kind.static_shape()) > LARGEST or kind.dtype in STORED:
        return None
    constants = [definitions.get(value.name) for value in equation.values]
    if not all(constant is not None and constant.op == "const" for constant in constants):
        return None
    value = _run(equation, definitions, kind)
    if value is None:
        return None
    return Equation("const", (), equation.results, (("value", value),), None, equation.where)


def _run(equation: Equation, definitions: dict[str, Equation], kind: TensorType) -> AttrValue:
    import torch

    from compiler.ir.interpreter import torch_dtype

    def tensor(arg: Arg) -> object:
        if not isinstance(arg, Value):
            return arg
        return torch.tensor(definitions[arg.name].attr["value"], dtype=torch_dtype(arg.type.dtype))

    try:
        with torch.no_grad():
            result = REGISTRY[equation.op].body(*(tensor(arg) for arg in equation.args), **equation.attr)
    except (IndexError, RuntimeError):
        return None  # the reference can't compute it either (an index out of range): left to whoever runs the graph
    if tuple(result.shape) != kind.static_shape():
        raise AssertionError(f"{show(equation)} gives {tuple(result.shape)}, not {kind}")
    return _tuples(result.tolist())


def _tuples(value: object) -> AttrValue:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value  # type: ignore[return-value]


FOLD_CONSTANTS = Pass("fold_constants", _fold)
