"""Takes the last round out of the last `repeat`: what follows it can then move in.

With the last layer in the open, only the rows whose logits are wanted go through its part behind the attention
(select_rows): of a prompt's thousands of rows, one.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Arg, Equation, Graph, substitute
from compiler.passes.rewrite import Names
from compiler.passes.runner import Log, Pass
from compiler.passes.unroll import in_round, value_of

RULE = "peel_last"


def _peel(graph: Graph, log: Log) -> Graph:
    places = [index for index, equation in enumerate(graph.equations) if equation.body is not None]
    loop = graph.equations[places[-1]] if places else None
    if loop is None or loop.body is None:
        log.refuse(RULE, graph.outputs[0][1].name, None, "the graph repeats nothing")
        return graph
    count = loop.attr["count"]
    assert isinstance(count, int)  # C4
    if count < 2:
        log.refuse(RULE, loop.results[0].name, loop.where, "one round only")
        return graph
    log.hit(RULE, loop.results[0].name, loop.where)
    names = Names(graph)
    mapping: dict[str, Arg] = dict(zip((param.name for param in loop.body.params), loop.results, strict=True))
    last: list[Equation] = []
    for old in loop.body.equations:
        last.append(in_round(old, mapping, count - 1, names))
        mapping.update(zip((value.name for value in old.results), last[-1].results, strict=True))
    ends = {
        value.name: value_of(mapping, result) for value, result in zip(loop.results, loop.body.results, strict=True)
    }
    shorter = replace(loop, attrs=(("count", count - 1),))
    before, after = graph.equations[: places[-1]], graph.equations[places[-1] + 1 :]
    outputs = tuple((name, value_of(dict(ends), value)) for name, value in graph.outputs)
    equations = (*before, shorter, *last, *(substitute(equation, ends) for equation in after))
    return replace(graph, equations=equations, outputs=outputs)


PEEL_LAST = Pass("peel_last", _peel)
