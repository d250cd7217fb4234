"""Small models for tests of precisions: random weights, calibration ids, the float32 reference and the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import compiler
import runtime
from compiler.api import Prepared, float_weights, prepare, weights_of
from compiler.ir.core import Graph
from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.names import expand
from compiler.passes import pipelines
from compiler.passes.insert_kv_cache import BLOCK
from compiler.passes.quantize import quantize
from compiler.passes.runner import run_passes
from compiler.sizes import counted
from compiler.validate.expect import expect, mark
from compiler.validate.reference import random_rows
from compiler.validate.trace import prompt_inputs
from specs.precision import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "specs" / "models"
LENGTHS = (1, 7, 24)


def calibration(folder: Path, vocab: int = 300, count: int = 256) -> Path:
    """A file of random ids."""
    path = folder / "ids.npy"
    np.save(path, np.random.default_rng(3).integers(0, vocab, count))
    return path


def options(folder: Path, precision: str, **more: Any) -> dict[str, Any]:
    """What a tiny random model is compiled with."""
    data = {"calibration": calibration(folder)} if load_recipe(precision).calibration else {}
    return {"size": "tiny", "weights": "random", "max_sequence": 64, "precision": precision, **data, **more}


def quantized_graph(prepared: Prepared) -> Graph:
    """The graph over tokens [B,S] with the request's precision: what the interpreter can run without a cache."""
    chosen = prepared.precision
    own = None if chosen.stored is None else chosen.stored.linears
    passes = (*pipelines.FUSION, quantize(chosen.recipe, chosen.overrides, stored=own))
    return run_passes(prepared.built.graph, passes)[0]


def served(prepared: Prepared, weights: Any, rows: list[list[int]]) -> list[Any]:
    """Logits of rows by the interpreter, of the graph as it is served, with its cache."""
    found = []
    for row in rows:
        inputs = {name: torch.from_numpy(x) for name, x in prompt_inputs(prepared.graph, row, BLOCK, {}).items()}
        states = {
            expand(str(equation.attr["name"]), index): torch.zeros(
                [-(-len(row) // BLOCK) if isinstance(dim, str) else dim for dim in equation.result.type.shape],
                dtype=torch_dtype(equation.result.type.dtype),
            )
            for equation, count in counted(prepared.graph.equations)
            if equation.op == "state"
            for index in range(count)
        }
        found.append(run(prepared.graph, inputs, weights, states)["logits"].float().numpy())
    return found


def computed(spec: str, folder: Path, precision: str, **more: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Logits (or hidden states) of the bundle, of the interpreter in its precision, and of that in float32."""
    path, asked = MODELS / f"{spec}.yaml", options(folder, precision, **more)
    prepared = prepare(path, out=folder / "bundle", **asked)
    rows = random_rows(prepared.source.config["vocab"], LENGTHS)
    for row in rows:
        mark(row, prepared)
    exact = expect(prepared, float_weights(prepared), rows)
    emulated = expect(prepared, weights_of(prepared), rows, graph=quantized_graph(prepared))
    model = runtime.load(compiler.compile(path, out=folder / "bundle", **asked))
    return [found[exact.name] for found in model.forward(rows)], emulated.judged, exact.judged
