"""Accuracy gates: limits that a compiled model must keep, reached by leaving its worst linears in the base precision.

The linears are ordered by how much error each adds, on a row of the gates' text; then bisection finds the fewest, worst
first, that must stay as they are. Everything is measured on this CPU, with the numbers of the precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.precision.chosen import LayerPrecision
from compiler.validate.metrics import Agreement
from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from collections.abc import Callable

    from compiler.api import Prepared


@dataclass(frozen=True)
class Gates:
    """Limits on the difference from float32: mean KL divergence in nats, perplexity as a share more (0.01 is 1 %), and
    the least share of equal first tokens; `text` is what they are measured on, else random ids.
    """

    mean_kl: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    text: Path | None = None
    where: Where | None = None

    def misses(self, found: Agreement) -> list[str]:
        """The limits that do not hold, as text."""
        lines = []
        if self.mean_kl is not None and not found.mean_kl <= self.mean_kl:
            lines.append(f"mean KL divergence {found.mean_kl:.2g}, limit {self.mean_kl:g}")
        if self.top1 is not None and not found.top1 >= self.top1:
            lines.append(f"same first token {found.top1:.1%}, limit {self.top1:.1%}")
        if self.perplexity is not None:
            assert found.perplexity is not None  # there is text: VAL-011
            assert found.reference_perplexity is not None
            more = found.perplexity / found.reference_perplexity - 1
            if not more <= self.perplexity:
                lines.append(f"perplexity {more:+.2%}, limit {self.perplexity:+.2%}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The limits that are set, for the passport."""
        return {key: getattr(self, key) for key in ("mean_kl", "perplexity", "top1") if getattr(self, key) is not None}


def within_gates(prepared: Prepared, progress: Callable[[str, int, int], None] | None = None) -> Prepared:
    """The same model with as many linears in the base precision as its gates need, and the card for its passport.

    Raises SpecRTError VAL-010 where they do not hold even so, VAL-011 for a limit on perplexity without text.
    """
    from compiler.api import prepare_request

    gates = prepared.request.gates
    assert gates is not None
    judge = _Judge(prepared, gates)
    plan = prepared.precision.plan
    names = [] if plan is None else [name.removesuffix(".weight") for name in plan.linears]
    attempts = max(1, len(names)).bit_length() + 2

    def measure(kept: Sequence[str]) -> Agreement:
        if progress is not None:
            progress("gates", judge.attempts, attempts)
        return judge.measure(_with_kept(prepared, kept))

    first = found = measure(())
    kept: list[str] = []
    if gates.misses(first):
        ordered = judge.worst_first(names)
        found = measure(ordered)
        if problems := gates.misses(found):
            raise _impossible(prepared, gates, problems)
        low, high = 0, len(ordered)  # keeping `low` misses, keeping `high` holds
        while high - low > 1:
            middle = (low + high) // 2
            tried = measure(ordered[:middle])
            if gates.misses(tried):
                low = middle
            else:
                high, found = middle, tried
        kept = ordered[:high]
    if progress is not None:
        progress("gates", attempts, attempts)
    card = {
        "limits": gates.as_dict(), "text": None if gates.text is None else str(gates.text),
        "without": first.as_dict(), "with": found.as_dict(), "kept": kept, "of": len(names),
        "attempts": judge.attempts,
    }  # fmt: skip
    return prepare_request(replace(_with_kept(prepared, kept), card=card))


def _with_kept(prepared: Prepared, kept: Sequence[str]) -> Any:
    """The request with these linears in the base precision, before what the user says of layers."""
    asked = prepared.request
    if not kept:
        return asked
    return replace(asked, layers=(LayerPrecision(tuple(kept), prepared.precision.base), *asked.layers))


def _impossible(prepared: Prepared, gates: Gates, problems: Sequence[str]) -> SpecRTError:
    base, name = prepared.precision.base, prepared.precision.recipe.name
    what = f"in {base}" if name == base else f"in {name} with every linear left in {base}"
    return SpecRTError(
        "VAL-010", f"the gates do not hold {what}: {'; '.join(problems)}", where=gates.where,
        hint="loosen the limit, or take a precision whose base is wider (fp32); no bundle was written",
    )  # fmt: skip


class _Judge:
    """The reference's outputs, once, and what a request's bundle makes of the same rows."""

    def __init__(self, prepared: Prepared, gates: Gates) -> None:
        from compiler.api import float_weights
        from compiler.validate.expect import expect
        from compiler.validate.models import rows_of

        folder = prepared.source.checkpoint
        rows = None
        if gates.text is not None:
            rows = rows_of(gates.text, Path(str(getattr(folder, "dir", "."))))
        elif gates.perplexity is not None:
            message = "a limit on perplexity needs `text`: random ids have none that means anything"
            raise SpecRTError("VAL-011", message, where=gates.where)
        self.text = gates.text is not None
        self.attempts = 0
        self._prepared = prepared
        self._weights = float_weights(prepared)
        self._expected = expect(prepared, self._weights, rows, seed=prepared.request.seed)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._errors: Mapping[str, float] = {}

    def measure(self, asked: Any) -> Agreement:
        """Compile for this CPU, run, compare; the first time also remember the error of every value."""
        import runtime
        from compiler.api import compile_prepared, prepare_request
        from compiler.validate.metrics import agreement

        self.attempts += 1
        with tempfile.TemporaryDirectory(prefix="specrt-gates-") as folder:
            here = replace(
                asked, target="cpu", toolchain=None, build=(), gates=None, card=None, out=Path(folder) / "bundle"
            )
            bundle = compile_prepared(prepare_request(here))
            with runtime.load(bundle, verify=False) as model:
                found = [model.forward([row])[0][self._expected.name] for row in self._expected.rows]
            if not self._errors:
                self._errors = self._trace(bundle)
        return agreement(found, self._expected.judged, self._expected.rows if self.text else None)

    def _trace(self, bundle: Path) -> Mapping[str, float]:
        from compiler.api import prepare_request
        from compiler.validate.trace import trace

        plain = prepare_request(
            replace(
                self._prepared.request,
                target="cpu",
                toolchain=None,
                build=(),
                precision="fp32",
                kv_cache=None,
                layers=(),
                gates=None,
            )
        )
        self._plain, expected = plain.graph, self._expected
        steps = trace(bundle, plain.graph, self._weights, expected.rows[0], expected.further[0]).steps
        return {step.value: step.error.relative for step in steps}

    def worst_first(self, names: Sequence[str]) -> list[str]:
        """Linears by the error that each adds to its input's: the root of the difference of the squares."""
        from compiler.passes.quantization_plan import linears_of

        added: dict[str, float] = {}
        counts: dict[str, int] = {}
        for weight, equation, _ in linears_of(self._plain):
            round_ = counts.get(equation.result.name, 0)
            counts[equation.result.name] = round_ + 1
            inputs, result = equation.values[0].name, equation.result.name
            before, after = (
                self._errors.get(f"{value}[{round_}]", self._errors.get(value, 0.0)) for value in (inputs, result)
            )
            added[weight.removesuffix(".weight")] = max(0.0, after**2 - before**2) ** 0.5
        return sorted(names, key=lambda name: -added.get(name, 0.0))
