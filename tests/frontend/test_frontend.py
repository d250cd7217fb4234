"""Spec -> graph: parameter counts, folding of layers, and that builders cover the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.frontend import Limits, build
from compiler.frontend.parts import ACTIVATIONS
from compiler.frontend.wiring import PART_BUILDERS, Run, fold
from compiler.ir.core import walk
from compiler.ir.parser import parse
from specs.config import resolve_size
from specs.node import Options, marks_of
from specs.parts import PART_CLASSES, GatedMlp
from specs.schema import load_spec

MODELS = sorted((Path(__file__).parents[2] / "specs" / "models").glob("*.yaml"))
SIZES = [(path, size) for path in MODELS for size in load_spec(path).sizes]


@pytest.mark.parametrize(("path", "size"), SIZES, ids=[f"{path.stem}-{size}" for path, size in SIZES])
def test_published_sizes_count_their_parameters_and_round_trip(path: Path, size: str) -> None:
    spec = load_spec(path)
    built = build(spec, resolve_size(spec, size))
    assert built.parameters == spec.sizes[size].parameters
    assert parse(str(built.graph)) == built.graph


def test_depth_does_not_grow_the_graph() -> None:
    spec = load_spec(MODELS[0].parent / "llama.yaml")
    shallow, deep = (build(spec, resolve_size(spec, size)) for size in ("demo", "70b"))
    assert len(list(walk(shallow.graph.equations))) <= len(list(walk(deep.graph.equations))) + 1
    assert len(deep.weights) > 10 * len(shallow.weights)


def test_limits_become_the_ranges_of_dims() -> None:
    spec = load_spec(MODELS[0].parent / "llama.yaml")
    graph = build(spec, resolve_size(spec, "demo"), Limits(batch=3, sequence=77)).graph
    assert (graph.dim("B").hi, graph.dim("S").hi, graph.dim("S").opt) == (3, 77, 77)


def test_every_part_kind_and_activation_of_the_schema_has_a_builder() -> None:
    assert {cls.kind_name() for cls in PART_CLASSES} == set(PART_BUILDERS)
    options = next(mark for mark in marks_of(GatedMlp.model_fields["act"]) if isinstance(mark, Options))
    assert set(options.values) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        ("aaaaaa", [Run(0, 1, 6)]),
        ("abababab", [Run(0, 2, 4)]),
        ("abaabaab", [Run(0, 3, 2), Run(6, 1, 1), Run(7, 1, 1)]),
        ("dddmmmmm", [Run(3, 1, 5)]),
        ("wwwwwgwwwwwgww", [Run(0, 6, 2), Run(12, 1, 2)]),
        ("abcd", [Run(0, 1, 1), Run(1, 1, 1), Run(2, 1, 1), Run(3, 1, 1)]),
    ],
)
def test_fold_finds_the_pattern_of_layers(layers: str, runs: list[Run]) -> None:
    folded = fold(list(layers))
    assert [index for run in folded for index in range(run.start, run.start + run.period * run.count)] == list(
        range(len(layers))
    )
    for run in folded:
        for index in range(run.start, run.start + run.period * run.count):
            assert layers[index] == layers[run.start + (index - run.start) % run.period]
    assert set(runs) <= set(folded)
