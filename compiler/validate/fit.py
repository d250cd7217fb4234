"""What fits on a GPU and how fast it can decode at best: memory and roofline from sizes and datasheet figures.

Roofline: a step takes the longer of moving its bytes and of its arithmetic (Williams et al., CACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

BANDWIDTH_SHARE = 0.8  # of the datasheet's bandwidth, that good kernels reach (facts: specs/gpus)
MEMORY_SHARE = 0.9  # of the part's memory; the rest is the driver's, the engine's activations and fragmentation
_POWERS = tuple(2**exponent for exponent in range(15))


@dataclass(frozen=True, eq=False)
class Part:
    """A GPU as it is sold: bytes of memory, bytes and operations a second (`rates` by type of the arithmetic)."""

    name: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Load:
    """What one model in one precision asks for: bytes of weights, of those a step reads, of KV cache for a token, and
    operations for a token; `arithmetic` is the type that matrix products compute in.
    """

    weights: float
    read: float
    kv_per_token: float
    operations: float
    arithmetic: str


@dataclass(frozen=True)
class Fit:
    """The largest batch of sequences of `context` tokens, 0 where not even one fits, and decode speeds in tokens/s."""

    batch: int
    context: int
    decode_1: float
    decode_max: float


def room(part: Part, load: Load) -> float:
    """Bytes that the weights leave for the KV cache; below 0 where they do not fit."""
    return part.memory * MEMORY_SHARE - load.weights


def holds(part: Part, load: Load, batch: int, context: int) -> bool:
    """Whether `batch` sequences of `context` tokens fit beside the weights."""
    return batch * context * load.kv_per_token <= room(part, load)


def decode(part: Part, load: Load, batch: int, context: int) -> float:
    """Tokens a second at best, of `batch` sequences that hold `context` tokens each."""
    moved = (load.read + batch * context * load.kv_per_token) / (part.bandwidth * BANDWIDTH_SHARE)
    rate = part.rates.get(load.arithmetic)
    computed = batch * load.operations / rate if rate else 0.0
    return batch / max(moved, computed)


def fit(part: Part, load: Load, context: int) -> Fit:
    """The largest power of two of sequences of `context` tokens; where not one fits, one of fewer tokens."""
    left = room(part, load)
    if left <= 0:
        return Fit(0, 0, 0.0, 0.0)
    if not load.kv_per_token:
        return Fit(_POWERS[-1], context, decode(part, load, 1, context), decode(part, load, _POWERS[-1], context))
    batch = max((size for size in _POWERS if size * context * load.kv_per_token <= left), default=0)
    if not batch:
        batch, context = 1, int(left // load.kv_per_token)
    if not context:
        return Fit(0, 0, 0.0, 0.0)
    return Fit(batch, context, decode(part, load, 1, context), decode(part, load, batch, context))


def cheapest(
    parts: Mapping[Part, float], loads: Mapping[str, Load], batch: int, context: int
) -> Iterator[tuple[Part, str, float]]:
    """Parts (with what they cost, in any unit) and precisions that hold the load, cheapest first, then fastest."""
    fitting = [
        (price, -decode(part, load, batch, context), part, precision)
        for part, price in parts.items()
        for precision, load in loads.items()
        if holds(part, load, batch, context)
    ]
    for _, speed, part, precision in sorted(fitting, key=lambda item: item[:2]):
        yield part, precision, -speed
