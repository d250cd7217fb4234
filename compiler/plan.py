"""The plan that a prepared model would get: how its graph is cut and which ports each step has; nothing is written."""

from __future__ import annotations

from typing import Any

from compiler.api import Prepared


def plan_of(prepared: Prepared) -> dict[str, Any]:
    """The content of the plan.json that `compile` would write; raises SpecRTError LOWER-xxx where it could not."""
    if prepared.request.on_gpu:
        from compiler.lower.tensorrt.lowering import plan_of as gpu_plan

        asked = prepared.request
        return gpu_plan(prepared.lowered, prepared.options, asked.architecture, asked.pipeline_parallel)[1].as_dict()
    from compiler.lower import openvino as backend
    from compiler.lower.capability import check
    from compiler.lower.partition import partition
    from compiler.lower.plan import Plan, Step, cache_of

    graph = prepared.graph
    check(graph, backend.verdict, backend.NAME)
    names = {value.name: name for name, value in graph.outputs}
    steps = tuple(
        Step(
            backend.NAME,
            f"engine/{number}.xml",
            {value.name: value.name for value in segment.graph.inputs},
            {names.get(value.name, value.name): value.name for _, value in segment.graph.outputs},
            backend.config(prepared.precision.base, segment.graph),
        )
        for number, segment in enumerate(partition(graph, backend.step_of))
    )
    return Plan(graph.dims, graph.inputs, steps, graph.outputs, cache_of(graph)).as_dict()
