"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from runtime.engine import Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many values lay below each bound."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self._counts)

    def lines(self, name: str) -> list[str]:
        """Its samples; each bucket counts those below it too, as the format wants it."""
        found, below = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*found, f"{name}_sum {self.sum:.6f}", f"{name}_count {below}"]


class Metrics:
    """Counts of the server since it started; only the event loop writes them."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model
        self.answers: dict[tuple[str, str], int] = {}  # (path, status or `gone`): how many
        self.prompt_tokens = self.new_tokens = 0
        self.first = Histogram()
        self.between = Histogram()
        self.whole = Histogram()

    def answered(self, path: str, status: str) -> None:
        """Count an answer; status `gone` is a client that did not wait for it."""
        self.answers[path, status] = self.answers.get((path, status), 0) + 1

    def text(self) -> str:
        """All of it."""
        engine = self._engine
        lines = _metric(
            "specrt_info", "gauge", "What is served.", [f'specrt_info{{model="{_escaped(self._model)}"}} 1']
        )
        counts = [f'specrt_requests_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.answers.items())]  # fmt: skip
        lines += _metric("specrt_requests_total", "counter", "Requests that were answered.", counts)
        for name, kind, told, value in (
            ("prompt_tokens_total", "counter", "Tokens of accepted prompts.", self.prompt_tokens),
            ("new_tokens_total", "counter", "Tokens that were generated for clients.", self.new_tokens),
            ("preemptions_total", "counter", "Sequences that gave their blocks up.", engine.preemptions),
            ("sequences_running", "gauge", "Sequences in the batch.", engine.running),
            ("sequences_waiting", "gauge", "Sequences in the queue.", engine.waiting),
            ("cache_blocks_used", "gauge", "Blocks of the KV cache in use.", engine.blocks - engine.free_blocks),
            ("cache_blocks", "gauge", "Blocks of the KV cache in all.", engine.blocks),
        ):
            lines += _metric(f"specrt_{name}", kind, told, [f"specrt_{name} {value}"])
        for name, told, histogram in (
            ("time_to_first_token_seconds", "From a request to its first token.", self.first),
            ("time_per_output_token_seconds", "Between two tokens of a sequence.", self.between),
            ("request_seconds", "From a request to its last token.", self.whole),
        ):
            lines += _metric(f"specrt_{name}", "histogram", told, histogram.lines(f"specrt_{name}"))
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, told: str, samples: Sequence[str]) -> list[str]:
    return [f"# HELP {name} {told}", f"# TYPE {name} {kind}", *samples]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
