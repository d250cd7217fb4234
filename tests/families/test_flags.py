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


# What a file without the key means is not what the class takes: kept from shapes, or not seen within the context.
OTHERWISE = {
    "rope_parameters", "layer_types", "num_key_value_heads", "max_window_layers", "q_lora_rank", "n_shared_experts",
}  # fmt: skip
CLASSES = {
    "bert": "Bert", "bloom": "Bloom", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "falcon": "Falcon",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3Text", "glm": "Glm", "glm4": "Glm4", "gpt2": "GPT2",
    "gpt_bigcode": "GPTBigCode", "gpt_neox": "GPTNeoX", "gpt_oss": "GptOss", "gptj": "GPTJ", "llama": "Llama",
    "mistral": "Mistral", "mixtral": "Mixtral", "mpt": "Mpt", "nemotron": "Nemotron", "opt": "OPT", "phi": "Phi",
    "phi3": "Phi3", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
    "roberta": "Roberta", "starcoder2": "Starcoder2",
}  # fmt: skip


@pytest.mark.parametrize("spec", CLASSES)
def test_an_absent_key_is_what_the_reference_takes(spec: str) -> None:
    """Or it is an error."""
    loaded = load_spec(ROOT / "specs" / "models" / f"{spec}.yaml")
    content = getattr(transformers, f"{CLASSES[spec]}Config")().to_dict()
    full = resolve_config(loaded, content, Where("config.json"))
    wrong = []
    for key in content.keys() - OTHERWISE - {"model_type", "sliding_window"}:
        try:
            found = resolve_config(loaded, {k: v for k, v in content.items() if k != key}, Where("config.json"))
        except SpecRTError:
            continue
        wrong += [(key, name) for name, value in full.items() if found[name] != value and found[name] != "gelu_tanh"]
    assert not wrong
