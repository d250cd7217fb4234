"""First divergence: a bundle's engine against the reference, value by value in the order of the equations.

The reference is the interpreter on the graph that the source gives now, in float32. The engine is the file in the
bundle, with its values read where the lowering left their names: so a fault anywhere between the two, in the spec that
was compiled, the weights that were written, a pass or the backend, shows at the first value that it touches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.ir.core import Equation, Graph
from compiler.validate.metrics import Error, Floats, error
from specs.errors import SpecRTError
from specs.precision import load_recipe, with_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_LABEL = re.compile(r"(?P<value>[^ ]+) @ (?P<place>[^ ]+:\d+)")  # as the lowering names a node
# A value's relative error may be FACTOR sqrt(n) u after n operations: so rounding errors grow (Higham and Mary, SIAM J.
# Sci. Comput. 41(5), 2019, theorem 2.4). The factors are about four times the largest that the demo model needs (2.0 in
# float32, whose sums round too; 0.2 in 16 bits, which are summed in float32).
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
FACTOR = {"fp32": 8.0, "fp16": 1.0, "bf16": 1.0}


@dataclass(frozen=True)
class Step:
    """One compared value: its name (`attn.q[3]`), the place in the spec, its error and its bound."""

    value: str
    op: str
    place: str
    error: Error
    bound: float

    @property
    def within(self) -> bool:
        """Whether the relative error is a number within the bound."""
        return self.error.relative <= self.bound


@dataclass(frozen=True)
class Trace:
    """All compared values in order; `skipped` are those that the engine computes inside something larger."""

    steps: tuple[Step, ...]
    skipped: int

    @property
    def first(self) -> Step | None:
        """The first value out of its bound, or None."""
        return next((step for step in self.steps if not step.within), None)


def trace(
    bundle: Path,
    graph: Graph,
    weights: Callable[[str], torch.Tensor],
    tokens: Sequence[int],
    further: Mapping[str, Any] | None = None,
) -> Trace:
    """Compare the engine of a CPU bundle with the reference's `graph` on one prompt, with its `further` inputs.

    Raises SpecRTError VAL-001 for a bundle with no single engine whose values can be read, VAL-002 where the reference
    needs inputs that a prompt does not give.
    """
    from compiler.ir.interpreter import run
    from runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    if [(step.kind, step.backend) for step in opened.program.steps] != [("engine", "openvino")]:
        message = f"`{bundle}` is not one engine of the CPU backend, so its inner values can't be read"
        raise SpecRTError("VAL-001", message, hint="compile for `--target cpu` and trace that")
    layout = opened.program.cache
    block = layout.block_size if layout is not None else 1
    batch = prompt_inputs(graph, tokens, block, further or {})
    reference: dict[str, Floats] = {}
    run(
        graph,
        {name: _tensor(value) for name, value in batch.items()},
        weights,
        _states(graph, -(-len(tokens) // block)),
        lambda name, value: reference.__setitem__(name, value.float().numpy()),
    )
    found = _engine_values(opened, batch, -(-len(tokens) // block))
    precision, cache = str(opened.manifest["precision"]), opened.manifest.get("kv_cache")
    steps, skipped = [], 0
    for number, (name, equation) in enumerate(_order(graph.equations), start=1):
        if equation.op in ("weight", "const", "state"):
            continue
        ours, theirs = found.get(name), reference[name]
        if ours is None or ours.size != theirs.size:
            skipped += 1
            continue
        place = "" if equation.where is None else str(equation.where)
        bound = bound_of(precision, number, cache)
        steps.append(Step(name, equation.op, place, error(ours.reshape(theirs.shape), theirs), bound))
    return Trace(tuple(steps), skipped)


def bound_of(precision: str, operations: int, kv_cache: str | None = None) -> float:
    """How far a value may be off after so many operations; of 8 bits or fewer, what the recipe grants the logits."""
    if precision in FACTOR and kv_cache is None:
        return float(FACTOR[precision] * operations**0.5 * ROUNDOFF[precision])
    return with_cache(load_recipe(precision), kv_cache).bound.relative


def prompt_inputs(
    graph: Graph, tokens: Sequence[int], block: int, further: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of a graph for one sequence from its beginning; raises SpecRTError VAL-002 where it needs others."""
    size, blocks = len(tokens), -(-len(tokens) // block)
    ids, positions = np.asarray(tokens, np.int32), np.arange(size, dtype=np.int32)
    if any(value.name == "past_lens" for value in graph.inputs):
        known: dict[str, Any] = {
            "tokens": ids, "positions": positions, "rows": ids * 0, "past_lens": [0], "seq_begins": [0, size],
            "block_ids": range(blocks), "block_begins": [0, blocks], "max_context": size, "select": positions,
        }  # fmt: skip
    else:
        zeros = np.zeros((1, size))
        known = {"tokens": ids[None], "positions": positions[None], "rows": zeros, "token_types": zeros}
    packed = "past_lens" in known  # then a value for each sequence, or all tokens in one row
    known |= {name: value if packed and np.ndim(value) else [value] for name, value in further.items()}
    missing = [value.name for value in graph.inputs if value.name not in known]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise SpecRTError("VAL-002", f"the model needs {names} beside a prompt, which a trace does not give")
    return {value.name: np.asarray(known[value.name], np.int32) for value in graph.inputs}


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(array.copy()) if array.ndim else torch.tensor(int(array), dtype=torch.int32)


def _states(graph: Graph, blocks: int) -> dict[str, torch.Tensor]:
    """Empty caches of as many blocks as the prompt fills."""
    import torch

    from compiler.ir.core import walk
    from compiler.ir.interpreter import torch_dtype
    from compiler.ir.names import expand
    from compiler.sizes import counted

    found: dict[str, torch.Tensor] = {}
    counts = {id(equation): count for equation, count in counted(graph.equations)}
    for equation in walk(graph.equations):
        if equation.op == "state":
            shape = [blocks if isinstance(size, str) else size for size in equation.result.type.shape]
            for index in range(counts[id(equation)]):
                name = expand(str(equation.attr["name"]), index)
                found[name] = torch.zeros(shape, dtype=torch_dtype(equation.result.type.dtype))
    return found


def _order(equations: Sequence[Equation]) -> Iterator[tuple[str, Equation]]:
    """Equations in the order in which they run, values of a `repeat` as `name[round]`."""
    for equation in equations:
        if equation.body is None:
            yield from ((value.name, equation) for value in equation.results)
            continue
        rounds = equation.attr["count"]
        assert isinstance(rounds, int)
        for index in range(rounds):
            for name, inner in _order(equation.body.equations):
                yield f"{name}[{index}]", inner


def _engine_values(opened: Any, batch: Mapping[str, np.ndarray[Any, Any]], blocks: int) -> dict[str, Floats]:
    """Every named value of the bundle's engine, run once on its own caches."""
    import openvino as ov

    from runtime.openvino_executable import restore_properties

    step = opened.program.steps[0]
    core = ov.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, and with it the operations that the file uses
    model = core.read_model(opened.path / step.file)
    ports: dict[str, str] = {}  # value: the name of its tensor
    outputs = []
    for node in model.get_ordered_ops():
        match = _LABEL.fullmatch(node.get_friendly_name())
        if match is not None and node.get_output_size() and node.get_type_name() not in ("Constant", "Result"):
            output = node.output(0)
            if not output.get_names():  # what has a name is an output of the model already
                output.get_tensor().add_names({f"trace {len(ports)}"})
                outputs.append(output)
            ports[match["value"]] = output.get_any_name()
    model.add_outputs(outputs)
    restore_properties(model)
    request = core.compile_model(model, "CPU", dict(step.config)).create_infer_request()
    for port in model.inputs:
        (name, *_) = port.get_names()
        if name in batch:
            request.set_tensor(name, ov.Tensor(batch[name]))
        else:
            shape = [blocks if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()]
            request.set_tensor(name, ov.Tensor(port.get_element_type(), ov.Shape(shape)))
    request.infer()
    return {name: np.array(request.get_tensor(port).data, np.float32) for name, port in ports.items()}
