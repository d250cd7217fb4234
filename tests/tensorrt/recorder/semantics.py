"""What each layer type does: the type and rank of its result (strong typing), and its value, by PyTorch.

From the operators reference of TensorRT (docs.nvidia.com/deeplearning/tensorrt, operators); the layers that 8.6 has are
run against the real library by tests/tensorrt/on_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.tensorrt.recorder.network import Layer

TORCH = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64,
    "INT8": torch.int8, "BOOL": torch.bool, "FP8": torch.float8_e4m3fn, "E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}
TORCH |= {"INT4": torch.int8, "FP4": torch.float8_e4m3fn}  # one value to an element, as the interpreter holds them
_FLOATS = ("FLOAT", "HALF", "BF16")
_NUMBERS = (*_FLOATS, "INT32", "INT64")
T = tuple[str, int]
Rule = Callable[..., T | list[T]]  # a list where a layer has several outputs
LAYERS: dict[str, tuple[Rule, Callable[..., torch.Tensor]]] = {}


def check_types(layer: Layer) -> list[T]:
    """The type and rank that each of a layer's outputs has; AssertionError where strong typing refuses its inputs."""
    rule = LAYERS[layer._kind][0]
    found = rule(layer, *((tensor._kind, tensor._rank) for tensor in layer._inputs))
    return found if isinstance(found, list) else [found]


def layer_of(name: str, rule: Rule) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    def register(evaluate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        LAYERS[name] = (rule, evaluate)
        return evaluate

    return register


# -- rules ------------------------------------------------------------------------------------------------------------


def _same(*allowed: str) -> Rule:
    def rule(layer: Layer, x: T, *_: T) -> T:
        assert x[0] in allowed, f"{layer._kind} of {x[0]}, takes {allowed}"
        return x

    return rule


def _elementwise(layer: Layer, a: T, b: T) -> T:
    op = layer._params["op"].name
    assert a[0] == b[0], f"{op} of {a[0]} and {b[0]}"
    assert a[1] == b[1], f"{op} of ranks {a[1]} and {b[1]}"
    if op in ("AND", "OR", "XOR"):
        assert a[0] == "BOOL", f"{op} of {a[0]}"
    else:
        assert a[0] in (*_NUMBERS, "BOOL") if op == "EQUAL" else a[0] in _NUMBERS, f"{op} of {a[0]}"
    return ("BOOL" if op in ("EQUAL", "LESS", "GREATER") else a[0]), a[1]


def _unary(layer: Layer, x: T) -> T:
    op = layer._params["op"].name
    assert x[0] == "BOOL" if op == "NOT" else x[0] in _FLOATS, f"{op} of {x[0]}"
    return x


def _matmul(layer: Layer, a: T, b: T) -> T:
    assert a == b, f"a product of {a} and {b}"
    assert a[0] in _FLOATS
    return a


def _select(layer: Layer, condition: T, a: T, b: T) -> T:
    assert condition[0] == "BOOL", f"a condition of {condition[0]}"
    assert a[0] == b[0], f"select of {a[0]} and {b[0]}"
    assert condition[1] == a[1] == b[1], f"ranks {condition[1]}, {a[1]}, {b[1]}"
    return a


def _gather(layer: Layer, table: T, index: T) -> T:
    assert index[0] in ("INT32", "INT64"), f"indices of {index[0]}"
    return table[0], table[1] + index[1] - 1


def _concat(layer: Layer, *parts: T) -> T:
    assert len(set(parts)) == 1, f"concatenation of {parts}"
    return parts[0]


def _norm(layer: Layer, x: T, scale: T, bias: T) -> T:
    assert x[0] == scale[0] == bias[0], f"types {x[0]}, {scale[0]}, {bias[0]}"
    assert x[0] in _FLOATS
    assert x[1] == scale[1] == bias[1], f"ranks {x[1]}, {scale[1]}, {bias[1]}"
    return x


def _rotary(layer: Layer, x: T, cos: T, sin: T) -> T:
    assert x[1] == 4, "rotary embedding takes [B,H,S,D]"
    assert (cos, sin) == ((x[0], 3), (x[0], 3)), "tables [B,S,D/2] of the input's type, where no positions are given"
    return x


def _update(layer: Layer, cache: T, new: T, places: T) -> T:
    assert layer._inputs[0]._source is None, "the cache must be an input of the network"
    assert isinstance(layer._inputs[0]._shape[2], int), "the cache has no shape"
    assert layer._inputs[0]._shape[2] > 0, "the cache must have a static number of places"
    assert cache == new, f"a cache of {cache} and an update of {new}"
    assert cache[0] in _FLOATS, f"a cache of {cache[0]}"
    assert cache[1] == 4, "[B,K,C,D]"
    assert places[0] in ("INT32", "INT64"), f"places of {places}"
    assert places[1] == 1, f"places of {places}"
    assert layer._params["cache_mode"].name == "LINEAR"
    return cache


def _attention(layer: Layer, q: T, k: T, v: T, *masks: T) -> T:
    assert q == k == v, f"attention of {q}, {k} and {v}"
    assert q[0] in _FLOATS, f"attention of {q[0]}"
    assert q[1] == 4, "[B,H,S,D]"
    for mask in masks:
        assert mask[0] in ("BOOL", q[0]), f"a mask of {mask[0]} for queries of {q[0]}"
        assert mask[1] == 4, f"a mask of rank {mask[1]}"
        assert layer._params.get("causal") in (False, None), "a mask and `causal`"
        assert "causal_kind" not in layer._params or layer._params["causal_kind"].name == "NONE", "a mask and a kind"
    return q


# -- values -----------------------------------------------------------------------------------------------------------


@layer_of("add_constant", lambda layer: (layer._params["kind"], layer._params["data"].ndim))
def constant(layer: Layer) -> torch.Tensor:
    data: torch.Tensor = layer._params["data"]
    return data


@layer_of("add_identity", _same(*TORCH))
def identity(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x


@layer_of("add_cast", lambda layer, x: (layer._params["to_type"].name, x[1]))
def cast(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x.to(TORCH[layer._params["to_type"].name])


_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add, "SUB": torch.sub, "PROD": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum,
    "POW": torch.pow, "AND": torch.logical_and, "OR": torch.logical_or, "XOR": torch.logical_xor,
    "EQUAL": torch.eq, "LESS": torch.lt, "GREATER": torch.gt,
    "DIV": lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
}  # fmt: skip


@layer_of("add_elementwise", _elementwise)
def elementwise(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    for left, right in zip(a.shape, b.shape, strict=True):
        assert left == right or 1 in (left, right), f"shapes {list(a.shape)} and {list(b.shape)}"
    return _BINARY[layer._params["op"].name](a, b)


_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs,
    "NEG": torch.neg, "SIN": torch.sin, "COS": torch.cos, "ERF": torch.erf, "NOT": torch.logical_not,
    "CEIL": torch.ceil, "FLOOR": torch.floor, "ROUND": torch.round, "SIGN": torch.sign,
}  # fmt: skip


@layer_of("add_unary", _unary)
def unary(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return _UNARY[layer._params["op"].name](x)


_ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "RELU": torch.relu, "SIGMOID": torch.sigmoid, "TANH": torch.tanh,
    "GELU_ERF": torch.nn.functional.gelu, "GELU_TANH": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}  # fmt: skip


@layer_of("add_activation", _same(*_FLOATS))
def activation(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return _ACTIVATION[layer._params["type"].name](x)


def _axes(mask: int, rank: int) -> list[int]:
    axes = [axis for axis in range(rank) if mask >> axis & 1]
    assert mask < 1 << rank, f"axes {mask:b} of rank {rank}"
    return axes


@layer_of("add_reduce", lambda layer, x: (x[0], x[1] if layer._params["keep_dims"] else x[1] - 1))
def reduce(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    axes, keep = _axes(int(layer._params["axes"]), x.ndim), layer._params["keep_dims"]
    return {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax, "MIN": torch.amin}[layer._params["op"].name](
        x, axes, keepdim=keep
    )


@layer_of("add_softmax", _same(*_FLOATS))
def softmax(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    (axis,) = _axes(layer._state["axes"], x.ndim)
    return torch.softmax(x, axis)


@layer_of("add_matrix_multiply", _matmul)
def matrix_multiply(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    for left, right in zip(a.shape[:-2], b.shape[:-2], strict=True):
        assert left == right or 1 in (left, right), f"shapes {list(a.shape)} and {list(b.shape)}"
    a = a.transpose(-1, -2) if layer._params["op0"].name == "TRANSPOSE" else a
    b = b.transpose(-1, -2) if layer._params["op1"].name == "TRANSPOSE" else b
    return a @ b


@layer_of("add_gather", _gather)
def gather(layer: Layer, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    axis = int(layer._params["axis"])
    if shared := layer._state["num_elementwise_dims"]:
        assert shared == axis == 1, "the recorder has one shared dim in front of the axis"
        assert table.shape[0] == index.shape[0]
        return torch.stack([rows.index_select(0, chosen.long()) for rows, chosen in zip(table, index, strict=True)])
    assert bool((index >= 0).all() and (index < table.shape[axis]).all()), "indices out of range"
    found = table.index_select(axis, index.reshape(-1).long())
    return found.reshape(*table.shape[:axis], *index.shape, *table.shape[axis + 1 :])


@layer_of("add_gather_v2", lambda layer, x, index: x)
def gather_elements(layer: Layer, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    assert layer._params["mode"].name == "ELEMENT"
    return x.gather(layer._state["axis"], index.long())


@layer_of("add_topk", lambda layer, x: [x, ("INT32", x[1])])
def topk(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (axis,) = _axes(int(layer._params["axes"]), x.ndim)
    assert layer._params["op"].name == "MAX"
    values, places = torch.sort(x, dim=axis, descending=True, stable=True)
    count = int(layer._params["k"])
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count).int()


@layer_of("add_select", _select)
def select(layer: Layer, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a, b)


@layer_of("add_shape", lambda layer, x: ("INT64" if layer._api.version[:2] in ("10", "11") else "INT32", 1))
def shape(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.shape, dtype=TORCH[layer._output._kind])


@layer_of("add_shuffle", lambda layer, x: x)  # of the input's rank until reshape_dims or input 1 is set
def shuffle(layer: Layer, x: torch.Tensor, *size: torch.Tensor) -> torch.Tensor:
    state = layer._state
    if "first_transpose" in state:
        assert sorted(state["first_transpose"]) == list(range(x.ndim)), f"{state['first_transpose']} of rank {x.ndim}"
        x = x.permute(state["first_transpose"])
    target = size[0].tolist() if size else state.get("reshape_dims")
    if target is not None:
        if state.get("zero_is_placeholder", True):
            target = [x.shape[axis] if dim == 0 else dim for axis, dim in enumerate(target)]
        assert list(target).count(-1) <= 1, f"reshape to {target}"
        x = x.reshape(target)
    return x


@layer_of("add_slice", lambda layer, x, *_: x)
def slice_(layer: Layer, x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    parts = [list(layer._params[name]) for name in ("start", "shape", "stride")]
    for index, tensor in enumerate(rest):
        if tensor is not None:
            parts[index] = tensor.tolist()
    start, size, stride = parts
    assert len(start) == len(size) == len(stride) == x.ndim, f"slice of rank {x.ndim} by {parts}"
    for axis in range(x.ndim):
        last = start[axis] + (size[axis] - 1) * stride[axis]
        assert size[axis] >= 1, f"{parts} of {list(x.shape)}"
        assert 0 <= start[axis] <= last < x.shape[axis], f"{parts} of {list(x.shape)}"
        x = x.index_select(axis, torch.arange(start[axis], last + 1, stride[axis]))
    return x


@layer_of("add_concatenation", _concat)
def concatenation(layer: Layer, *parts: torch.Tensor) -> torch.Tensor:
    axis = layer._state["axis"]
    assert 0 <= axis < parts[0].ndim
    return torch.cat(parts, axis)


@layer_of("add_normalization", _norm)
@layer_of("add_normalization_v2", _norm)
def normalization(layer: Layer, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    axes = _axes(int(layer._params["axesMask"]), x.ndim)
    assert axes == [x.ndim - 1], "the recorder has layer norm over the last dim"
    for row in (scale, bias):
        assert list(row.shape) == [1] * (x.ndim - 1) + [x.shape[-1]], f"scale or bias of shape {list(row.shape)}"
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    spread = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + layer._state["epsilon"])
    return (centred * spread * scale.float() + bias.float()).to(x.dtype)


@layer_of("add_rotary_embedding", _rotary)
def rotary_embedding(layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = int(layer._params["rotary_embedding_dim"]) or x.shape[-1]
    half = size // 2
    assert list(cos.shape) == list(sin.shape) == [x.shape[0], x.shape[2], half], f"tables of {list(cos.shape)}"
    c, s = cos[:, None], sin[:, None]
    turned, rest = x[..., :size], x[..., size:]
    if layer._params["interleaved"]:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned, rest), -1)


@layer_of("add_kv_cache_update", _update)
def kv_cache_update(layer: Layer, cache: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """In place: what the caller gave is changed, and is the output."""
    for row, start in enumerate(places.tolist()):
        assert start >= 0, f"place {start}"
        assert start + new.shape[2] <= cache.shape[2], f"{new.shape[2]} tokens from {start} on of {cache.shape[2]}"
        cache[row, :, start : start + new.shape[2]] = new[row]
    return cache


@layer_of("add_attention", _attention)
@layer_of("add_attention_v2", _attention)
def attention(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
    assert layer._params["norm_op"].name == "SOFTMAX"
    assert k.shape == v.shape, f"keys of {list(k.shape)}, values of {list(v.shape)}"
    assert q.shape[1] % k.shape[1] == 0
    assert masks, "the recorder has attention with a mask only"
    (mask,) = masks
    for dim, wanted in zip(mask.shape, (*q.shape[:3], k.shape[2]), strict=True):
        assert dim in (1, wanted), f"a mask of {list(mask.shape)}"
    keys, values = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.float() @ keys.transpose(-1, -2)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return (torch.softmax(scores, -1) @ values).to(q.dtype)
