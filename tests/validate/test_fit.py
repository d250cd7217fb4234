"""Fit and roofline: sums that can be done in the head."""

from __future__ import annotations

from compiler.validate.fit import Load, Part, cheapest, decode, fit

CARD = Part("card", memory=80e9, bandwidth=1e12, rates={"f16": 100e12})
LOAD = Load(weights=8e9, read=8e9, kv_per_token=1e6, operations=16e9, arithmetic="f16")


def test_decode_is_bound_by_bandwidth_then_by_arithmetic() -> None:
    assert decode(CARD, LOAD, 1, 0) == 100.0  # 8 GB at 0.8 TB/s
    assert decode(CARD, LOAD, 1, 8000) == 50.0  # and as much cache
    assert decode(CARD, LOAD, 1000, 0) == 100e12 / 16e9


def test_fit_takes_what_the_weights_leave() -> None:
    assert fit(CARD, LOAD, 1000).batch == 64  # 80 * 0.9 - 8 = 64 GB at 1 GB a sequence
    alone = fit(CARD, LOAD, 100_000)
    assert (alone.batch, alone.context) == (1, 64_000)
    assert fit(Part("small", 8e9, 1e12, {}), LOAD, 1000).batch == 0


def test_cheapest_first_then_fastest() -> None:
    fast = Part("fast", 80e9, 2e12, {})
    tiny = Part("tiny", 4e9, 1e12, {})
    low = Load(2e9, 2e9, 1e6, 16e9, "f16")
    found = list(cheapest({CARD: 2.0, fast: 2.0, tiny: 1.0}, {"fp16": LOAD, "w4": low}, 1, 1000))
    assert [(part.name, precision) for part, precision, _ in found] == [
        ("tiny", "w4"), ("fast", "w4"), ("card", "w4"), ("fast", "fp16"), ("card", "fp16"),
    ]  # fmt: skip
