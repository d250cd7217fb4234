"""Positions of blank infilling -> equations: a stream that stops at the blank, and one that counts inside of it."""

from __future__ import annotations

from compiler.frontend.context import Context
from compiler.ir import Value


def block_streams(ctx: Context, count: int) -> tuple[Value, ...]:
    """The position streams i32[B,S] of a block rope, one or two, made once for all layers."""
    return ctx.shared(("block_rope", count), lambda: _streams(ctx, count))  # type: ignore[no-any-return]


def _streams(ctx: Context, count: int) -> tuple[Value, ...]:
    at = ctx.input("positions", "i32", "B", "S")
    rows = ctx.input("rows", "i32", "B", "S")

    def of_token(name: str) -> Value:
        """What an input of each sequence is for each token."""
        return ctx.emit("gather", ctx.input(name, "i32", "B"), rows, to=f"rope.{name}")

    prefix, blank = of_token("prefix"), of_token("blank")
    before = ctx.emit("compare", at, prefix, to="rope.before", kind="lt")
    if count == 1:
        counting = ctx.emit("compare", of_token("counting"), 0, to="rope.counting", kind="gt")
        return (ctx.emit("where", ctx.emit("or", before, counting, to="rope.runs"), at, blank, to="rope.first"),)
    first = ctx.emit("where", before, at, blank, to="rope.first")
    since = ctx.emit("add", ctx.emit("sub", at, prefix, to="rope.since"), 1, to="rope.since")
    return first, ctx.emit("maximum", since, 0, to="rope.second")
