"""The layout language of fused weights: how the rows of one stored tensor are made up of several of ours.

    [q: heads, k: kv_heads, v: kv_heads] d_head       all of Q, then K, then V
    heads [q, k, v] d_head                            per head: its q, k and v
    kv_heads [q: heads / kv_heads, k, v] d_head       per group: its q heads, then k, then v
    [gate, up] d_ffn        d_ffn [gate, up]          halves; alternating rows

It reads outermost axis first, as an array's shape. The bracket is one axis that concatenates its pieces; a
piece without a count has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from specs.errors import SpecRTError, Where
from specs.expressions import Expr, parse_expr
from specs.functions import Value


@dataclass(frozen=True)
class Piece:
    """One member of the bracket: our leaf's last name and how many steps of the bracket's axis it takes."""

    name: str
    count: Expr


@dataclass(frozen=True)
class Layout:
    """A parsed layout: the axes before the bracket, its pieces, the axes after it."""

    text: str
    outer: tuple[Expr, ...]
    pieces: tuple[Piece, ...]
    inner: tuple[Expr, ...]
    where: Where

    def expressions(self) -> list[Expr]:
        """Every expression in it."""
        return [*self.outer, *(piece.count for piece in self.pieces), *self.inner]

    def sizes(self, env: Mapping[str, Value]) -> tuple[int, dict[str, tuple[int, int]], int, int]:
        """(outer rows, {piece: (start, stop) on the bracket's axis}, length of that axis, inner rows); raises
        SPEC-032.
        """
        outer = self._product(self.outer, env)
        inner = self._product(self.inner, env)
        spans: dict[str, tuple[int, int]] = {}
        at = 0
        for piece in self.pieces:
            count = piece.count.as_int(env)
            if count <= 0:
                raise SpecRTError(
                    "SPEC-032",
                    f"`{piece.name}` has {count} rows in the layout `{self.text}`",
                    where=self.where,
                )
            spans[piece.name] = (at, at + count)
            at += count
        return outer, spans, at, inner

    def _product(self, axes: tuple[Expr, ...], env: Mapping[str, Value]) -> int:
        result = 1
        for axis in axes:
            result *= axis.as_int(env)
        return result


_LAYOUT = re.compile(r"([^\[\]]*)\[([^\[\]]*)\]([^\[\]]*)$")


def parse_layout(text: str, where: Where) -> Layout:
    """Parse a layout; raises SPEC-031."""
    match = _LAYOUT.match(text.strip())
    if match is None:
        raise SpecRTError(
            "SPEC-031",
            f"cannot read the layout `{text}`",
            where=where,
            hint="write axes and one bracket, say `heads [q, k, v] d_head`",
        )
    outer, bracket, inner = match.groups()
    pieces: list[Piece] = []
    for item in bracket.split(","):
        name, _, count = (part.strip() for part in item.partition(":"))
        if not name.isidentifier() or (":" in item and not count) or name in {piece.name for piece in pieces}:
            raise SpecRTError(
                "SPEC-031",
                f"cannot read `{item.strip()}` in the layout `{text}`",
                where=where,
                hint="a piece is `name` or `name: count`, each name once",
            )
        pieces.append(Piece(name, parse_expr(count, where) if count else parse_expr(1, where)))
    return Layout(text, _axes(outer, where), tuple(pieces), _axes(inner, where), where)


def _axes(text: str, where: Where) -> tuple[Expr, ...]:
    """Axes are separated by spaces; one with spaces in it stands in parentheses."""
    words = re.findall(r"\([^()]*\)|[^\s()]+", text)
    return tuple(parse_expr(word, where) for word in words)
