"""What one attention kernel does of a graph: the attention, the rotations that only it reads, and views into products.

A kernel reads rows through an offset and strides, so that the slices of a joined query, key and value product cost
nothing; and it rotates queries and keys on the way. See docs/gpu-plan.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from compiler.ir.core import Equation, Graph, Value, used_values
from compiler.ir.types import Shape
from compiler.lower.plan import Step

BACKEND = "cuda"
NAME = "attention"
# Operands of paged_attention behind q, k, v and the caches, by the kernel's port.
_PORTS = ("past_lens", "seq_begins", "block_ids", "block_begins", "max_context", "prefix", "sinks")


@dataclass(frozen=True)
class View:
    """Element d of head h of row t lies at offset + t row + h head + d of the value."""

    value: Value
    offset: int
    row: int
    head: int

    def as_dict(self) -> dict[str, int]:
        return {"offset": self.offset, "row": self.row, "head": self.head}


@dataclass(frozen=True)
class AttentionStep:
    """One kernel call: an attention, with what it takes over of the equations before it."""

    equation: Equation
    q: View
    k: View
    v: View
    rotation: Equation | None  # of the queries; the keys' has the same tables and style
    absorbed: tuple[Equation, ...]

    def step(self, weights: Mapping[str, str], states: Mapping[str, str]) -> Step:
        """The plan's step; `weights` and `states` give what values of weights and caches are stored as."""
        equation = self.equation
        heads, d_head = (int(dim) for dim in equation.values[0].type.shape[-2:])
        kv_heads, d_value = (int(dim) for dim in equation.values[2].type.shape[-2:])
        inputs = {name: view.value.name for name, view in (("q", self.q), ("k", self.k), ("v", self.v))}
        rotary = None
        if self.rotation is not None:
            cos, sin = self.rotation.values[1:]
            inputs |= {"cos": cos.name, "sin": sin.name}
            rotary = {"style": self.rotation.attr["style"], "pairs": cos.type.shape[-1]}
        for port, arg in zip(_PORTS, equation.args[5:], strict=False):
            if isinstance(arg, Value):
                inputs[port] = f"weight:{weights[arg.name]}" if arg.name in weights else arg.name
        slopes = equation.attr.get("slopes")
        attrs: dict[str, Any] = {
            "heads": heads, "kv_heads": kv_heads, "d_head": d_head, "d_value": d_value,
            "q": self.q.as_dict(), "k": self.k.as_dict(), "v": self.v.as_dict(),
            "scale": equation.attr["scale"], "causal": equation.attr["causal"], "window": equation.attr.get("window"),
            "softcap": equation.attr.get("softcap"), "slopes": list(slopes) if isinstance(slopes, tuple) else None,
            "bf16_bias": equation.attr.get("bf16_bias"), "codes": equation.attr.get("codes"), "rotary": rotary,
            "k_cache": states[equation.values[3].name], "v_cache": states[equation.values[4].name],
        }  # fmt: skip
        return Step(BACKEND, "", inputs, {"out": equation.result.name}, {}, "kernel", NAME, attrs)


def attention_steps(graph: Graph) -> dict[str, AttentionStep]:
    """The kernel of every paged attention at the top level, by its result's name."""
    found = _Finder(graph)
    return {
        equation.result.name: found.step(equation) for equation in graph.equations if equation.op == "paged_attention"
    }


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.definitions = {value.name: equation for equation in graph.equations for value in equation.results}
        self.readers: dict[str, list[Equation]] = {}
        for equation in graph.equations:
            for name in {value.name for value in used_values(equation)}:
                self.readers.setdefault(name, []).append(equation)
        self.public = {value.name for _, value in graph.outputs}

    def alone(self, value: Value, reader: Equation) -> Equation | None:
        """The equation that defines a value which nothing but `reader` reads."""
        if value.name in self.public or self.readers[value.name] != [reader]:
            return None
        return self.definitions.get(value.name)

    def step(self, equation: Equation) -> AttentionStep:
        q, k, v = equation.values[:3]
        rotations = [self.alone(value, equation) for value in (q, k)]
        absorbed: list[Equation] = []
        rotation = None
        if _turned_alike(*rotations):
            rotation = rotations[0]
            absorbed += [found for found in rotations if found is not None]
        views = []
        for value, turned in zip((q, k, v), (*rotations, None), strict=True):
            by_kernel = rotation is not None and turned is not None
            source, reader = (turned.values[0], turned) if by_kernel and turned is not None else (value, equation)
            view, chain = self.view(source, reader)
            views.append(view)
            absorbed += chain
        return AttentionStep(equation, views[0], views[1], views[2], rotation, tuple(absorbed))

    def view(self, value: Value, reader: Equation) -> tuple[View, list[Equation]]:
        """The farthest value back that `value` is a strided view of, and the equations between."""
        chain: list[Equation] = []
        best = (View(value, *_strides(value.type.shape, [])), 0)
        current = value
        while (found := self.alone(current, reader)) is not None and found.op in ("reshape", "slice"):
            chain.append(found)
            current, reader = found.values[0], found
            try:
                best = (View(current, *_strides(current.type.shape, chain[::-1])), len(chain))
            except _NoViewError:
                break
        return best[0], chain[: best[1]]


def _turned_alike(q: Equation | None, k: Equation | None) -> bool:
    if q is None or k is None or q.op != "rotate" or k.op != "rotate":
        return False
    return q.values[1:] == k.values[1:] and q.attr["style"] == k.attr["style"]


class _NoViewError(Exception):
    pass


def _strides(shape: Shape, chain: list[Equation]) -> tuple[int, int, int]:
    """Offset, row and head stride of [T,H,D] after `chain` on a dense value of a shape [T,...]; raises _NoViewError."""
    sizes = _tail(shape)
    strides = [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    row, offset = prod(sizes), 0
    for equation in chain:
        if equation.op == "slice":
            axis, start = equation.attr["axis"], equation.attr["start"]
            assert isinstance(axis, int)  # C4
            assert isinstance(start, int)
            if -axis > len(sizes):
                raise _NoViewError
            offset += start * strides[axis]
        else:
            if any(outer != inner * size for outer, inner, size in zip(strides, strides[1:], sizes[1:], strict=False)):
                raise _NoViewError  # rows of the old shape are not one run
            new, unit = _tail(equation.result.type.shape), strides[-1]
            strides = [unit * prod(new[axis + 1 :]) for axis in range(len(new))]
        if equation.result.type.shape[:1] != shape[:1]:
            raise _NoViewError  # the tokens are not its rows
        sizes = _tail(equation.result.type.shape)
    if len(sizes) != 2 or strides[1] != 1:
        raise _NoViewError
    return offset, row, strides[0]


def _tail(shape: Shape) -> list[int]:
    if any(isinstance(dim, str) for dim in shape[1:]):
        raise _NoViewError
    return [int(dim) for dim in shape[1:]]
