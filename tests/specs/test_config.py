"""config.json to our names: the variants that transformers writes, and every way it can disagree with a spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specs.checkpoint import read_json
from specs.config import find_size, resolve_config, resolve_size
from specs.errors import SpecRTError, Where
from specs.match import check_match, match_spec
from specs.rope import inv_freq
from specs.schema import load_spec
from tests.golden_errors import ROOT, check_raises
from tests.specs.samples import CONFIG, HERE, SPEC, broken, write_spec

LLAMA = ROOT / "specs" / "models" / "llama.yaml"


def resolved(**changes: Any) -> dict[str, Any]:
    """LLaMA's names for the config.json of a small model with some keys changed (None removes one)."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        **changes,
    }
    return resolve_config(load_spec(LLAMA), {k: v for k, v in config.items() if v is not None}, HERE)


def test_hub_style_config() -> None:
    names = resolved()
    assert (names["kv_heads"], names["d_head"], names["theta"], names["rope_scaling"], names["tied"]) == (
        4,
        16,
        10000.0,
        None,
        False,
    )
    assert resolved(num_key_value_heads=2, head_dim=32, rope_theta=5e5, tie_word_embeddings=True) == {
        **names,
        "kv_heads": 2,
        "d_head": 32,
        "theta": 5e5,
        "tied": True,
    }


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "pretraining_tp": {"pretraining_tp": 2},
    "dropout": {"attention_dropout": 0.1},
    "several stops": {"eos_token_id": [1, 2]},
    "theta": {"rope_theta": 5e5},
    "old linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "old llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "new llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "llama3, original length left out": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "yarn, all keys": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "dtype": {"dtype": "bfloat16"},
    "sampling in config": {"temperature": 0.5, "do_sample": True, "max_length": 30},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_saves_is_read(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    theirs = transformers.LlamaConfig(**sizes, max_position_embeddings=128, **VARIANTS[name])
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert match_spec(config).name == "llama"
    names = resolve_config(load_spec(LLAMA), config, Where("config.json"))
    assert names["d_head"] == theirs.head_dim
    assert names["kv_heads"] == theirs.num_key_value_heads
    assert (names["qkvo_bias"], names["mlp_bias"], names["tied"]) == (
        theirs.attention_bias,
        theirs.mlp_bias,
        theirs.tie_word_embeddings,
    )
    rotary = LlamaRotaryEmbedding(theirs)
    found = inv_freq(names["d_head"], names["theta"], names["rope_scaling"], names["context"])
    ours, multiplier = found.short, found.multiplier
    assert ours.tolist() == pytest.approx(rotary.inv_freq.tolist(), rel=3e-7)
    assert multiplier == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_saved_by_transformers_then_tiny_model_config_round_trip() -> None:
    config = (
        read_json(ROOT / "demo" / "tiny-llama" / "config.json") if (ROOT / "demo" / "tiny-llama").is_dir() else None
    )
    if config is None:
        pytest.skip("the demo model is not here")
    spec = load_spec(LLAMA)
    demo = resolve_config(spec, config, HERE)
    size = resolve_size(spec, "demo")
    assert {**demo, "rope_scaling": None} == size


# golden name: changed keys of config.json
CONFIGS: dict[str, dict[str, Any]] = {
    "SPEC-040-missing-key": {"hidden_size": None},
    "SPEC-041-contradiction": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "SPEC-041-two-scalings": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "SPEC-042-partial-rotary": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "SPEC-043-sliding-window": {"sliding_window": 4096},
    "SPEC-043-quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "SPEC-046-not-a-number": {"hidden_size": "64"},
    "SPEC-046-uneven-heads": {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_the_spec_does_not_cover(name: str) -> None:
    check_raises(name, resolved, **CONFIGS[name])


@pytest.mark.parametrize("off", [None, False, 0, "", [], {}])
def test_an_uncovered_flag_that_is_off_is_fine(off: object) -> None:
    assert resolved(sliding_window=off) == resolved()


def test_a_key_read_only_inside_a_mapping_does_not_cover_the_others(tmp_path: Path) -> None:
    spec = broken(tmp_path, "rope_theta | 10000.0", "rope.theta | 10000.0")
    assert resolve_config(spec, {**CONFIG, "rope": {"theta": 5.0}}, HERE)["theta"] == 5.0
    check_raises(
        "SPEC-043-inside-mapping", resolve_config, spec, {**CONFIG, "rope": {"theta": 5.0, "factor": 2.0}}, HERE
    )


def test_facts_inside_a_mapping_read_whole_need_their_own_path(tmp_path: Path) -> None:
    spec = broken(tmp_path, "rope_theta | 10000.0", "len(rope | []) + 1.0")
    config = {**CONFIG, "rope": {"partial_rotary_factor": 0.5}}
    check_raises("SPEC-043-named-only", resolve_config, spec, config, HERE)


def test_biases_that_the_spec_does_not_have(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path))
    check_raises("SPEC-043-attention-bias", resolve_config, spec, {**CONFIG, "attention_bias": True}, HERE)


def test_our_earlier_name_wins_over_their_key(tmp_path: Path) -> None:
    spec = broken(tmp_path, "d_ffn:    ffn", "d_ffn:    4 * d_model")
    assert resolve_config(spec, {**CONFIG, "ffn": 0, "d_model": 0}, HERE)["d_ffn"] == 32


def test_impossible_arithmetic_and_types(tmp_path: Path) -> None:
    spec = broken(tmp_path, "d_ffn:    ffn", "d_ffn:    ffn * d_model")
    check_raises("SPEC-012-text", resolve_config, spec, {**CONFIG, "ffn": "6"}, HERE)
    spec = broken(tmp_path, "d_ffn:    ffn", "d_ffn:    ffn / (heads - 4)")
    check_raises("SPEC-012-zero", resolve_config, spec, CONFIG, HERE)
    linear: Any = broken(tmp_path, "when: tied", "when: theta | tied").parts["head"]
    check_raises("SPEC-013-condition", linear.tied.when.as_bool, {"theta": 1.5})
    part: Any = broken(tmp_path, "out: vocab", "out: vocab / 3").parts["head"]
    check_raises("SPEC-013-whole", part.out.as_int, {"vocab": 10})


def test_a_closed_field_may_differ_by_layer_and_by_config(tmp_path: Path) -> None:
    choice = "'relu if layer % 2 == 0 else silu'"
    part: Any = broken(tmp_path, "act: silu}\n  norm_f", f"act: {choice}}}\n  norm_f").parts["mlp"]
    assert [part.choice("act", {"layer": layer}) for layer in range(3)] == ["relu", "silu", "relu"]
    text = SPEC.replace("act: silu}\n  norm_f", "act: activation}\n  norm_f")
    path = write_spec(
        tmp_path, "require: {act: silu}", "", text.replace("\n  tied:  ", "\n  activation: act\n  tied:  ")
    )
    spec = load_spec(path)
    part = spec.parts["mlp"]
    assert part.choice("act", resolve_config(spec, {**CONFIG, "act": "gelu_tanh"}, HERE)) == "gelu_tanh"
    check_raises("SPEC-014-option", part.choice, "act", resolve_config(spec, {**CONFIG, "act": "mish"}, HERE))


def test_sizes(tmp_path: Path) -> None:
    spec = load_spec(LLAMA)
    assert resolve_size(spec, "7b")["d_head"] == 128
    assert resolve_size(spec, "70b")["kv_heads"] == 8
    assert find_size(spec, "8b").parameters == 8_030_261_248
    check_raises("SPEC-044-unknown-size", resolve_size, spec, "7B")
    check_raises("SPEC-045-incomplete-size", resolve_size, broken(tmp_path, "layers: 2, ", ""), "1b")


def test_match(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    broken(folder, "{model_type: small}", "{model_type: [small, smaller], when: alibi | false}")
    assert match_spec({"model_type": "smaller", "alibi": True}, specs_dir=folder).name == "small"
    check_raises("SPEC-047-nearest", match_spec, {"model_type": "smal"}, HERE, folder)
    check_raises("SPEC-047-unknown", match_spec, {"model_type": "zebra"}, HERE, folder)
    check_raises("SPEC-047-variant", match_spec, {"model_type": "small"}, HERE, folder)
    check_raises("SPEC-047-no-model-type", match_spec, {}, HERE, folder)
    (folder / "twin.yaml").write_text((folder / "small.yaml").read_text())
    check_raises("SPEC-047-several", match_spec, {"model_type": "small", "alibi": True}, HERE, folder)


def test_a_named_spec_must_be_for_the_checkpoint(tmp_path: Path) -> None:
    spec = broken(tmp_path, "{model_type: small}", "{model_type: small, when: alibi | false}")
    check_match(spec, {"model_type": "small", "alibi": True}, HERE)
    check_raises("SPEC-048-wrong-match", check_match, spec, {"model_type": "large"}, HERE)
    check_raises("SPEC-048-wrong-variant", check_match, spec, {"model_type": "small"}, HERE)


ROPES: dict[str, dict[str, Any]] = {
    "SPEC-050-unknown-type": {"rope_type": "lama3", "factor": 2.0},
    "SPEC-050-no-formula": {"rope_type": "spiral"},
    "SPEC-050-two-types": {"rope_type": "linear", "type": "yarn", "factor": 2.0},
    "SPEC-054-unknown-parameter": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32},
    "SPEC-054-not-a-number": {"rope_type": "linear", "factor": "2"},
    "SPEC-054-length": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4},
    "SPEC-054-zero": {"rope_type": "linear", "factor": 0},
    "SPEC-055-missing-parameter": {"rope_type": "linear"},
    "SPEC-055-no-context": {"rope_type": "yarn", "factor": 4.0},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_that_is_not_known(name: str) -> None:
    context = 64 if name == "SPEC-054-length" else None
    check_raises(name, inv_freq, 8, 10000.0, ROPES[name], context, where=HERE)


def test_rope_scaling_of_the_wrong_form() -> None:
    check_raises("SPEC-053-odd", inv_freq, 7, 10000.0, None, where=HERE)
    check_raises("SPEC-054-not-a-mapping", inv_freq, 8, 10000.0, [2.0], where=HERE)


def test_json_that_no_config_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for name, text in {
        "CKPT-003-not-json": '{\n "a": 1,\n}',
        "CKPT-003-list": "[1]",
        "CKPT-003-duplicate": '{"a": 1, "a": 2}',
    }.items():
        path.write_text(text)
        check_raises(name, read_json, path)
    path.write_bytes(b"\xff")
    check_raises("CKPT-003-not-text", read_json, path)
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}


def test_no_error_without_a_code() -> None:
    with pytest.raises(SpecRTError) as caught:
        resolved(hidden_size=None)
    assert caught.value.as_dict()["code"] == "SPEC-040"
