"""A one-layer attention model in numpy over a real paged cache: wrong blocks, places or rows change its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import Bundle, Limits
from runtime.executable import LIKELIEST, PACKED
from runtime.model import Model
from runtime.program import Port, Program
from runtime.sampling import Sampling, candidates

VOCAB, WIDTH = 50, 16
_RANDOM = np.random.default_rng(3)
EMBED = _RANDOM.standard_normal((VOCAB, WIDTH))
PLACE = _RANDOM.standard_normal((4096, WIDTH)) * 0.5
Q, K, V = (_RANDOM.standard_normal((WIDTH, WIDTH)) / 4 for _ in range(3))
HEAD = _RANDOM.standard_normal((WIDTH, VOCAB))


def attend(x: np.ndarray, keys: np.ndarray, values: np.ndarray, past: int, prefix: int = 0) -> np.ndarray:
    """Causal attention of new tokens x [S, D] at `past` over keys and values [past + S, D]; a prefix is seen by all."""
    scores = (x @ Q) @ keys.T
    rows, columns = np.arange(past, past + len(x))[:, None], np.arange(len(keys))[None]
    scores = np.where((columns <= rows) | (columns < prefix), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return x + (weights / weights.sum(axis=1, keepdims=True)) @ values


def dense_logits(tokens: Sequence[int], prefix: int = 0) -> np.ndarray:
    """The same model without a cache: [len, V]."""
    x = EMBED[list(tokens)] + PLACE[: len(tokens)]
    return (attend(x, x @ K, x @ V, 0, prefix) @ HEAD).astype(np.float32)


def dense_greedy(tokens: Sequence[int], count: int) -> list[int]:
    row = list(tokens)
    for _ in range(count):
        row.append(int(dense_logits(row)[-1].argmax()))
    return row[len(tokens) :]


class FakeExecutable:
    """Checks every input it gets, and counts; NaN in what was never written, and behind `nan_token`."""

    nan_token = -1

    def __init__(self, blocks: int, block_size: int = 4, nan_at: int | None = None) -> None:
        self.blocks, self.block_size, self.cache_bytes = blocks, block_size, 0
        self.keys = np.full((blocks, block_size, WIDTH), np.nan)
        self.values = np.full((blocks, block_size, WIDTH), np.nan)
        self.shapes: list[tuple[int, int]] = []  # (sequences, tokens) of each step
        self.same = 0  # steps whose arrays were those of the step before
        self.nan_at = nan_at
        self._last: Mapping[str, np.ndarray] = {}
        self.shared = self.copied = 0  # the most that tables had in common at once; blocks in all

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.copied += 1
            self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def close(self) -> None:
        self.closed = True

    def execute(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.same += all(self._last.get(name) is array for name, array in batch.items())
        self._last = dict(batch)
        assert all(array.dtype == np.int32 for array in batch.values())
        begins, past_lens = batch["seq_begins"], batch["past_lens"]
        table, table_begins = batch["block_ids"], batch["block_begins"]
        assert len(begins) == len(table_begins) == len(past_lens) + 1
        assert begins[-1] == len(batch["tokens"]) == len(batch["positions"])
        assert table_begins[-1] == len(table)
        out, context, users, written = [], 0, Counter(table.tolist()), set()
        for row, past in enumerate(past_lens):
            tokens = batch["tokens"][begins[row] : begins[row + 1]]
            total = int(past) + len(tokens)
            context = max(context, total)
            assert len(tokens) >= 1
            assert batch["positions"][begins[row] : begins[row + 1]].tolist() == list(range(past, total))
            mine = table[table_begins[row] : table_begins[row + 1]]
            assert len(mine) * self.block_size >= total
            x = EMBED[tokens] + PLACE[past:total]
            for place in range(past, total):
                block, slot = mine[place // self.block_size], place % self.block_size
                written.add(int(block))
                self.keys[block, slot], self.values[block, slot] = x[place - past] @ K, x[place - past] @ V
            keys = self.keys[mine].reshape(-1, WIDTH)[:total]
            values = self.values[mine].reshape(-1, WIDTH)[:total]
            out.append(attend(x, keys, values, int(past), int(batch["prefix"][row]) if "prefix" in batch else 0))
        assert all(users[block] == 1 for block in written)  # what several read nobody writes
        self.shared = max(self.shared, len(table) - len(users))
        assert batch["max_context"] == context
        self.shapes.append((len(past_lens), int(begins[-1])))
        assert len(batch["select"]) >= 1
        logits = (np.concatenate(out)[batch["select"]] @ HEAD).astype(np.float32)
        if len(self.shapes) == self.nan_at:
            logits[0] = np.nan
        logits[batch["tokens"][batch["select"]] == self.nan_token] = np.nan
        return {"logits": logits}


class Picking(FakeExecutable):
    """Chooses by itself, as the GPU does; NaN becomes -1."""

    picks = 0

    def pick(self, batch: Mapping[str, np.ndarray], how: np.ndarray = LIKELIEST) -> np.ndarray:
        self.picks += 1
        logits = self.execute(batch)["logits"]
        found = np.where(np.isnan(logits).any(1), -1, logits.argmax(1)).astype(np.int32)
        assert len(how) in (0, 4 * len(logits))
        for row, words in enumerate(how.reshape(-1, 4)):
            temperature, _, top_p, chance = words.view(np.float32).tolist()
            if temperature and found[row] >= 0:
                sampling = Sampling(temperature=temperature, top_k=int(words[1]) or None, top_p=top_p)
                ids, weights = candidates(logits[row], sampling)
                ends = np.cumsum(weights, dtype=np.float64)
                found[row] = ids[np.searchsorted(ends, chance * ends[-1], side="right")]
        return found


class Behind:
    """A device that computes behind the host: when is chance, at the latest when somebody waits for it.

    A pipeline of several stages lets more of its steps wait; `early` counts those that needed a token of one of them.
    """

    cache_bytes = 0

    def __init__(self, blocks: int, seed: int = 0, stages: int = 1) -> None:
        self.stages, self.sets, self.early = stages, stages + 1, 0
        self.inner = Picking(blocks)
        self.blocks, self.block_size = blocks, self.inner.block_size
        self.random = np.random.default_rng(seed)
        self.batches: list[dict[str, np.ndarray]] = [{}] * self.sets  # the host writes, the device reads, in turn
        self.results = [np.zeros(0, np.int32)] * self.sets
        # what is not computed: tickets, sources, of which launch, how
        self.queue: list[tuple[int, Sequence[int], int, np.ndarray]] = []
        self.chosen = [np.zeros(0, np.int32)] * self.sets  # on the device
        self.given = self.followed = 0

    def close(self) -> None:
        self.queue.clear()

    def launch(
        self, batch: Mapping[str, np.ndarray], sources: Sequence[int] = (), how: np.ndarray = LIKELIEST, behind: int = 1
    ) -> int:
        assert 1 <= behind <= self.stages
        self.given += 1
        self.compute(until=self.given - self.sets)  # its arrays are written again now
        self.batches[self.given % self.sets] = {name: array.copy() for name, array in batch.items()}
        self.results[self.given % self.sets] = np.full(len(batch["select"]), -7, np.int32)
        self.queue.append((self.given, sources, behind, how.copy()))
        follows = max(sources, default=-1) >= 0
        self.followed += follows
        self.early += follows and behind < self.stages
        self.compute(until=self.given - int(self.random.integers(0, self.sets + 1)))
        return self.given

    def compute(self, until: int) -> None:
        """Steps in their order, up to a ticket's."""
        while self.queue and self.queue[0][0] <= until:
            ticket, sources, behind, how = self.queue.pop(0)
            batch = self.batches[ticket % self.sets]
            for place, source in enumerate(sources):
                if source >= 0:
                    batch["tokens"][place] = self.chosen[(ticket - behind) % self.sets][source]
            picked = self.inner.pick(batch, how)
            self.chosen[ticket % self.sets] = np.maximum(picked, 0)
            self.results[ticket % self.sets][:] = picked

    def wait(self, ticket: int) -> np.ndarray:
        assert self.given - self.sets < ticket <= self.given
        self.compute(until=ticket)
        return self.results[ticket % self.sets]

    def pick(self, batch: Mapping[str, np.ndarray], how: np.ndarray = LIKELIEST) -> np.ndarray:
        return self.wait(self.launch(batch, how=how))

    def execute(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.compute(until=self.given)
        return self.inner.execute(batch)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.compute(until=self.given)
        self.inner.copy_blocks(pairs)


class FakeEncoder:
    """Full attention over padded rows; `kinds` [B, S] and `shift` [B] are further inputs."""

    blocks = block_size = cache_bytes = 0

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        raise AssertionError(f"it has no cache, but {pairs}")

    def close(self) -> None:
        self.closed = True

    def execute(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.shapes.append(batch["tokens"].shape)
        hidden = []
        for tokens, positions, kinds in zip(batch["tokens"], batch["positions"], batch["kinds"], strict=True):
            x = EMBED[tokens] + PLACE[kinds]
            seen = positions >= 0
            scores = np.where(seen[None], (x @ Q) @ (x @ K).T, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            hidden.append((weights / weights.sum(axis=1, keepdims=True)) @ x)
        out = np.array(hidden, np.float32)
        return {"hidden": out, "pooled": out[:, 0] + batch["shift"][:, None]}


def bundle(role: str = "decoder", extra: Sequence[str] = (), **changes: Any) -> Bundle:
    if role == "decoder":
        inputs = [Port(name, "i32", ("T",)) for name in PACKED] + [Port(name, "i32", ("B",)) for name in extra]
        outputs = (Port("logits", "f32", ("N", VOCAB)),)
    else:
        inputs = [Port(name, "i32", ("B", "S")) for name in ("tokens", "positions", "kinds")] + [
            Port("shift", "i32", ("B",))
        ]
        outputs = (Port("hidden", "f32", ("B", "S", WIDTH)), Port("pooled", "f32", ("B", WIDTH)))
    program = Program(tuple(inputs), outputs, {port.name: port.name for port in outputs}, (), {}, None)
    given: dict[str, Any] = {
        "path": Path("fake"), "manifest": {}, "plan": {}, "program": program, "limits": Limits(4, 64), "name": "fake",
        "role": role, "vocab": VOCAB, "stop": (), "toolchain": {}, "tokenizer": None,
    }  # fmt: skip
    return Bundle(**{**given, **changes})


def decoder(
    blocks: int = 64,
    *,
    step_tokens: int | None = None,
    extra: Sequence[str] = (),
    nan_at: int | None = None,
    **changes: Any,
) -> tuple[Model, FakeExecutable]:
    executable = FakeExecutable(blocks, nan_at=nan_at)
    return Model(bundle(extra=extra, **changes), executable, step_tokens=step_tokens), executable
