"""Runs a plan for a GPU without one: engine steps by a recorded network or the interpreter, attention by the IR's
meaning, read through the views that the plan states. Also makes the batches that a runtime would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from compiler.ir import Graph
from compiler.ir.formats import HALF_BYTES, pack
from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.ops import REGISTRY
from compiler.lower.plan import Step
from compiler.lower.tensorrt.cut import Cut
from compiler.lower.tensorrt.dialects import Dialect
from compiler.lower.tensorrt.emitter import Baked
from compiler.lower.tensorrt.network import create_network, emit

Values = Mapping[str, torch.Tensor]
# A step's graph and its inputs -> its outputs by port.
Engine = Callable[[Graph, Values], dict[str, torch.Tensor]]
BLOCKS = 8


def baked(pieces: Cut, weights: Values) -> Baked:
    """Stored tensors as an engine that holds them asks for them: numpy's types, or bits."""
    bits = {"bf16": torch.uint16, "f8e4m3": torch.uint8, "f8e8m0": torch.uint8}

    def array(name: str) -> Any:
        dtype, tensor = pieces.tensors[name].type.dtype, weights[name].contiguous()
        if dtype in HALF_BYTES:
            return pack(tensor, dtype).numpy()
        return (tensor.view(bits[dtype]) if dtype in bits else tensor).numpy()

    return array


def recorded(trt: Any, dialect: Dialect, held: Baked | None = None, *, native: bool = False) -> Engine:
    """Engines recorded once for each segment, then evaluated; `held` gives weights to those that hold theirs."""
    networks: dict[int, Any] = {}

    def engine(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        if id(graph) not in networks:
            network = create_network(trt, trt.Builder(trt.Logger()), dialect)
            emitter = emit(trt, graph, network, dialect, held, native=native)
            network.finish()
            networks[id(graph)] = (network, emitter, graph)
        outputs: dict[str, torch.Tensor] = networks[id(graph)][0].evaluate(inputs)
        return outputs

    return engine


def interpreted(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
    """A segment as the IR means it."""
    return run(graph, inputs, {}.__getitem__)


RANKS = 2  # that run a plan with exchanges


def run_plan(
    pieces: Cut, inputs: Values, weights: Values, states: Values, engine: Engine, program: Engine = interpreted
) -> dict[str, torch.Tensor]:
    """The outputs of a plan by name; `weights` are the stored tensors, `states` the caches, changed in place."""
    values = dict(inputs)
    for step in pieces.steps:
        given = {port: _bound(name, values, weights) for port, name in step.inputs.items()}
        if step.kind == "kernel":
            values[step.outputs["out"]] = attend(step, given, states)
            continue
        if step.kind == "collective":
            attrs = {"axis": step.attrs["axis"]} if step.name == "all_gather" else {}
            values[step.outputs["out"]] = REGISTRY[step.name].body(given["x"], ranks=RANKS, **attrs)
            continue
        graph = pieces.segments[step.file.removeprefix("segments/").removesuffix(".ir")].graph
        for port, tensor in (program if step.kind == "program" else engine)(graph, given).items():
            values[step.outputs[port]] = tensor
    return {name: values[value.name] for name, value in pieces.graph.outputs}


def _bound(name: str, values: Values, weights: Values) -> torch.Tensor:
    return weights[name.removeprefix("weight:")] if name.startswith("weight:") else values[name]


def attend(step: Step, given: Values, states: Values) -> torch.Tensor:
    """An attention step as docs/gpu-plan.md states it."""
    attrs = step.attrs
    tokens = given["q"].shape[0]
    rows = {}
    for port, heads, dim in (("q", "heads", "d_head"), ("k", "kv_heads", "d_head"), ("v", "kv_heads", "d_value")):
        view, value = attrs[port], given[port].contiguous()
        rows[port] = value.as_strided(
            (tokens, attrs[heads], attrs[dim]), (view["row"], view["head"], 1), view["offset"]
        )
    if attrs["rotary"] is not None:
        assert given["cos"].shape == (tokens, attrs["rotary"]["pairs"])
        for port in ("q", "k"):
            rows[port] = REGISTRY["rotate"].body(rows[port], given["cos"], given["sin"], style=attrs["rotary"]["style"])
    options = {name: attrs[name] for name in ("scale", "causal", "window", "softcap", "bf16_bias", "codes")}
    metadata = [given[name] for name in ("past_lens", "seq_begins", "block_ids", "block_begins", "max_context")]
    out: torch.Tensor = REGISTRY["paged_attention"].body(
        rows["q"], rows["k"], rows["v"], states[attrs["k_cache"]], states[attrs["v_cache"]], *metadata,
        given.get("prefix"), given.get("sinks"), slopes=attrs["slopes"], **options,
    )  # fmt: skip
    return out


# -- batches ----------------------------------------------------------------------------------------------------------


def packed(graph: Graph, past: list[int], new: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A call of a decoder: sequence b has past[b] cached tokens and new[b] new ones; one block of the cache each."""
    generator = torch.Generator().manual_seed(seed)
    begins = [sum(new[:index]) for index in range(len(new) + 1)]
    total = begins[-1]
    known: dict[str, Any] = {
        "tokens": torch.randint(0, 160, (total,), generator=generator),
        "positions": [at for start, count in zip(past, new, strict=True) for at in range(start, start + count)],
        "past_lens": past, "seq_begins": begins, "block_ids": [5, 2, 6, 1][: len(new)],
        "block_begins": list(range(len(new) + 1)), "max_context": max(a + b for a, b in zip(past, new, strict=True)),
        "select": [begin - 1 for begin in begins[1:]] + [0],
    }  # fmt: skip
    sizes = {"T": total, "B": len(new), "N": len(known["select"])}
    return {value.name: _filled(value, known, sizes, generator) for value in graph.inputs}


def padded(graph: Graph, lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A call of an encoder: rows of these lengths, padding at positions -1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    at = torch.arange(shape[1]).repeat(shape[0], 1)
    known = {
        "tokens": torch.randint(0, 160, shape, generator=generator),
        "positions": torch.where(at < torch.tensor(lengths)[:, None], at, -1),
    }
    return {value.name: _filled(value, known, {"B": shape[0], "S": shape[1]}, generator) for value in graph.inputs}


def _filled(value: Any, known: Mapping[str, Any], sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    if value.name in known:
        return torch.as_tensor(known[value.name]).to(torch.int32)
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in value.type.shape]
    if value.name == "token_types":  # a model may have one type only
        return torch.zeros(shape, dtype=torch.int32)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int32)


def states_of(graph: Graph) -> dict[str, torch.Tensor]:
    """Caches of BLOCKS blocks, full of what nothing may read."""
    return {
        str(equation.attr["name"]): torch.full(
            [BLOCKS if dim == "C" else int(dim) for dim in equation.result.type.shape],
            255 if equation.result.type.dtype == "u8" else float("nan"),  # a scale of such bytes is NaN
            dtype=torch_dtype(equation.result.type.dtype),
        )
        for equation in graph.equations
        if equation.op == "state"
    }
