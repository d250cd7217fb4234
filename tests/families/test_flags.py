"""Keys of config.json that would change the result and that a spec does not have are errors, never ignored."""

from __future__ import annotations

from typing import Any

import pytest

from specs.config import resolve_config
from specs.errors import SpecRTError, Where
from specs.schema import load_spec
from tests.golden_errors import ROOT

transformers = pytest.importorskip("transformers")

FLAGS: list[tuple[str, str, dict[str, Any], str]] = [
    ("gpt2", "GPT2Config", {"add_cross_attention": True}, "SPEC-043"),
    ("gpt_bigcode", "GPTBigCodeConfig", {"add_cross_attention": True}, "SPEC-043"),
    ("gptj", "GPTJConfig", {"rotary": False}, "SPEC-042"),
    ("gptj", "GPTJConfig", {"scale_attn_weights": False}, "SPEC-042"),
    ("gpt_neox", "GPTNeoXConfig", {"rotary_emb_base": 77}, "SPEC-041"),
    ("opt", "OPTConfig", {"learned_scale": True}, "SPEC-043"),
    ("bloom", "BloomConfig", {"n_inner": 12}, "SPEC-043"),
    ("falcon", "FalconConfig", {"apply_residual_connection_post_layernorm": True}, "SPEC-043"),
    ("falcon", "FalconConfig", {"partial_rotary_factor": 0.5}, "SPEC-042"),
    ("mpt", "MptConfig", {"no_bias": False}, "SPEC-042"),
    ("mpt", "MptConfig", {"logit_scale": "inv_sqrt_d_model"}, "SPEC-043"),
    ("mpt", "MptConfig", {"norm_type": "rmsnorm"}, "SPEC-042"),
    ("mpt", "MptConfig", {"attn_config": {"alibi": False}}, "SPEC-042"),
    ("mpt", "MptConfig", {"attn_config": {"attn_type": "multiquery_attention"}}, "SPEC-042"),
    ("mpt", "MptConfig", {"attn_config": {"qk_ln": True}}, "SPEC-043"),
    ("mpt", "MptConfig", {"attn_config": {"prefix_lm": True}}, "SPEC-043"),
    ("mpt", "MptConfig", {"attn_config": {"attn_uses_sequence_id": True}}, "SPEC-043"),
]


@pytest.mark.parametrize(("spec", "config", "flag", "code"), FLAGS, ids=lambda value: str(value)[:40])
def test_refused(spec: str, config: str, flag: dict[str, Any], code: str) -> None:
    loaded = load_spec(ROOT / "specs" / "models" / f"{spec}.yaml")
    content = getattr(transformers, config)().to_dict()
    resolve_config(loaded, content, Where("config.json"))
    with pytest.raises(SpecRTError) as caught:
        resolve_config(loaded, {**content, **flag}, Where("config.json"))
    assert caught.value.code == code
