"""Mixtures of experts -> plain equations: scores, the choice, the chosen experts' products, their weighted sum."""

from __future__ import annotations

from compiler.frontend.context import Context
from compiler.frontend.parts import activate, linear, width
from compiler.ir import TensorType, Value
from specs import parts as schema
from specs.errors import SpecRTError


def moe_part(ctx: Context, name: str, part: schema.Moe, x: Value) -> Value:
    """The weighted sum of the chosen experts' results on x [B,S,M]."""
    env, bias = ctx.env, ctx.flag(part.bias)
    experts, count, size = part.experts.as_int(env), part.top_k.as_int(env), part.d_ffn.as_int(env)
    chosen, weights = _route(ctx, name, part, x, experts, count)

    def product(leaf: str, of: Value, out: int) -> Value:
        matrices = ctx.weight(f"{name}.{leaf}", "weight", experts, out, width(of))
        y = ctx.emit("gather_matmul", of, matrices, chosen, to=f"{name}.{leaf}")
        if not bias:
            return y
        mine = ctx.emit("gather", ctx.weight(f"{name}.{leaf}", "bias", experts, out), chosen, to=f"{name}.{leaf}.bias")
        return ctx.emit("add", y, mine, to=f"{name}.{leaf}")

    row = ctx.emit("reshape", x, to=f"{name}.row", shape=("B", "S", 1, width(x)))
    hidden = _hidden(ctx, name, part.expert, product("gate", row, size), product("up", row, size))
    results = product("down", hidden, width(x))
    weights = ctx.emit("reshape", weights, to=f"{name}.weights", shape=("B", "S", 1, count))
    summed = ctx.emit("matmul", weights, results, to=f"{name}.sum")
    return ctx.emit("reshape", summed, to=name, shape=("B", "S", width(x)))


def _hidden(ctx: Context, name: str, expert: schema.ExpertKind, gate: Value, up: Value) -> Value:
    if isinstance(expert, schema.GatedExpert):
        active = activate(ctx, name, expert.choice("act", ctx.env), gate)
        return ctx.emit("mul", active, up, to=f"{name}.hidden")
    limit, alpha = expert.limit.as_float(ctx.env), expert.alpha.as_float(ctx.env)
    gate = ctx.emit("minimum", gate, limit, to=f"{name}.gate.clamped")
    up = ctx.emit("maximum", ctx.emit("minimum", up, limit, to=f"{name}.up.low"), -limit, to=f"{name}.up.clamped")
    opened = ctx.emit("sigmoid", ctx.emit("mul", gate, alpha, to=f"{name}.act.in"), to=f"{name}.act")
    opened = ctx.emit("mul", gate, opened, to=f"{name}.act")
    return ctx.emit("mul", ctx.emit("add", up, 1.0, to=f"{name}.up.one"), opened, to=f"{name}.hidden")


def _route(ctx: Context, name: str, part: schema.Moe, x: Value, experts: int, count: int) -> tuple[Value, Value]:
    """The chosen experts, i32 [B,S,K], and their weights [B,S,K]."""
    router, name = part.router, f"{name}.router"
    kind = ctx.option(router, "score")
    logits = linear(ctx, name, x, experts, ctx.flag(router.bias))
    scores = logits if kind == "softmax_of_chosen" else ctx.emit(kind, logits, to=f"{name}.scores")
    by = scores
    if ctx.flag(router.correction):
        by = ctx.emit("add", scores, ctx.weight(f"{part_of(name)}.correction", "weight", experts), to=f"{name}.choice")
    chosen = _choose(ctx, name, part, by, experts, count)
    weights = ctx.emit("take", scores, chosen, to=f"{name}.chosen")
    if kind == "softmax_of_chosen":
        weights = ctx.emit("softmax", weights, to=f"{name}.weights")
    if ctx.flag(router.renormalise):
        weights = ctx.emit("div", weights, ctx.emit("sum", weights, to=f"{name}.sum"), to=f"{name}.weights")
    scale = 1.0 if router.scale is None else router.scale.as_float(ctx.env)
    return chosen, weights if scale == 1.0 else ctx.emit("mul", weights, scale, to=f"{name}.weights")


def part_of(name: str) -> str:
    """`moe` of `moe.router`."""
    return name.rpartition(".")[0]


def _choose(ctx: Context, name: str, part: schema.Moe, scores: Value, experts: int, count: int) -> Value:
    """The best experts, i32 [B,S,K]; where they stand in groups, among those of the best groups."""
    router, env = part.router, ctx.env
    groups = None if router.groups is None else router.groups.value(env)
    if groups is None:
        return ctx.emit("top_k", scores, to=f"{name}.top", k=count)
    kept = None if router.top_groups is None else router.top_groups.value(env)
    best = None if router.group_best is None else router.group_best.as_int(env)
    if not isinstance(groups, int) or not isinstance(kept, int) or best is None or experts % groups:
        raise SpecRTError(
            "SPEC-069",
            f"{experts} experts in {groups} groups, of which {kept} are looked at by their {best} best",
            where=router.where,
            hint="groups divide the experts evenly, and need `top_groups` and `group_best`",
        )
    each = experts // groups
    grid = ctx.emit("reshape", scores, to=f"{name}.groups", shape=("B", "S", groups, each))
    tops = ctx.emit("take", grid, ctx.emit("top_k", grid, to=f"{name}.groups.top", k=best), to=f"{name}.groups.best")
    worth = ctx.emit("reshape", ctx.emit("sum", tops, to=f"{name}.groups.worth"), to=f"{name}.groups.worth",
                     shape=("B", "S", groups))  # fmt: skip
    first = ctx.emit("mul", ctx.emit("top_k", worth, to=f"{name}.groups.chosen", k=kept), each, to=f"{name}.first")
    offsets = ctx.const(tuple(range(each)), TensorType("i32", (each,)), f"{name}.offsets")
    grid = ctx.emit("add", ctx.emit("reshape", first, to=f"{name}.first", shape=("B", "S", kept, 1)), offsets,
                    to=f"{name}.candidates")  # fmt: skip
    candidates = ctx.emit("reshape", grid, to=f"{name}.candidates", shape=("B", "S", kept * each))
    among = ctx.emit("take", scores, candidates, to=f"{name}.among")
    return ctx.emit("take", candidates, ctx.emit("top_k", among, to=f"{name}.top", k=count), to=f"{name}.experts")
