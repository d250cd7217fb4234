"""The second and third generation: vendor code's cases, and variants of them against a class of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiler import prepare
from specs.errors import SpecRTError
from tests.families.harness import (
    ROOT,
    check_case,
    check_decoder,
    check_fuses,
    check_golden_ir,
    logits_of,
    save_random,
)

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", ["chatglm2-6b", "chatglm3-6b"])
def test_agrees_with_the_vendor(case: str, tmp_path: Path) -> None:
    check_case(case, tmp_path / "bundle")


def _as_vendor(folder: Path, config: Any, grouped: bool, **more: Any) -> None:
    """Rewrite a saved model of transformers' class to the vendor's names and fused tensors."""
    stored, out = load_file(folder / "model.safetensors"), {}
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, tensor in stored.items():
        new = name.replace("model.layers.", "transformer.encoder.layers.").replace(
            "self_attn.o_proj", "self_attention.dense"
        )
        new = new.replace("mlp.gate_up_proj", "mlp.dense_h_to_4h").replace("mlp.down_proj", "mlp.dense_4h_to_h")
        new = new.replace("model.embed_tokens", "transformer.embedding.word_embeddings")
        new = new.replace("model.norm", "transformer.encoder.final_layernorm").replace(
            "lm_head", "transformer.output_layer"
        )
        if "self_attn.q_proj" in name:
            parts = [stored[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            if not grouped:  # head by head
                parts = [torch.stack([part.unflatten(0, (heads, dim)) for part in parts], 1).flatten(0, 2)]
            out[new.replace("self_attn.q_proj", "self_attention.query_key_value")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            out[new] = tensor
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, folder / "model.safetensors")
    written = {
        "model_type": "chatglm", "hidden_size": config.hidden_size, "num_layers": config.num_hidden_layers,
        "num_attention_heads": heads, "multi_query_attention": grouped, "multi_query_group_num": groups,
        "kv_channels": dim, "ffn_hidden_size": config.intermediate_size, "padded_vocab_size": config.vocab_size,
        "seq_length": 128, "layernorm_epsilon": config.rms_norm_eps, "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias, "rmsnorm": True, "post_layer_norm": True, "original_rope": True, **more,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(("grouped", "bias", "ratio"), [(False, True, 1), (True, False, 50)])
def test_variants(grouped: bool, bias: bool, ratio: int, tmp_path: Path) -> None:
    config = transformers.GlmConfig(
        vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1 if grouped else 4, head_dim=16, rms_norm_eps=1e-5, attention_bias=bias, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = save_random(transformers.GlmForCausalLM(config), tmp_path / "model")
    _as_vendor(tmp_path / "model", config, grouped, rope_ratio=ratio)
    check_decoder(tmp_path / "model", logits_of(model), 120, lengths=(1, 9, 30), new=8)


def test_late_residual_biases_no_last_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that no published size has, as the vendor's code reads them."""
    from transformers.models.glm import modeling_glm

    def layer(self: Any, hidden_states: Any, **given: Any) -> Any:
        h = self.input_layernorm(hidden_states)
        m = self.post_attention_layernorm(h + self.self_attn(hidden_states=h, **given)[0])
        return m + self.mlp(m)

    folder = tmp_path / "model"
    config = transformers.GlmConfig(
        vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, attention_bias=True, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = save_random(transformers.GlmForCausalLM(config), folder)
    flags = {"apply_residual_connection_post_layernorm": True, "post_layer_norm": False, "add_bias_linear": True}
    _as_vendor(folder, config, grouped=True, **flags)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.encoder.final_layernorm.weight")
    for number, block in enumerate(model.model.layers):
        names = ("self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        for name, part in zip(
            names, (block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj), strict=True
        ):
            bias = torch.linspace(-0.5, 0.5, len(part.weight))
            part.bias, tensors[f"transformer.encoder.layers.{number}.{name}.bias"] = torch.nn.Parameter(bias), bias
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(modeling_glm.GlmDecoderLayer, "forward", layer)
    model.model.norm = torch.nn.Identity()
    check_decoder(folder, logits_of(model), 120, lengths=(1, 9, 30), new=6)


def test_refuses_what_it_does_not_cover(tmp_path: Path) -> None:
    config = json.loads((ROOT / "tests/data/reference/chatglm2-6b/config.json").read_text())
    for key, value, code in [
        ("rmsnorm", False, "SPEC-042"),
        ("pre_seq_len", 128, "SPEC-043"),
        ("quantization_bit", 4, "SPEC-043"),
    ]:
        folder = tmp_path / key
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(ROOT / "tests/data/reference/chatglm2-6b/model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(SpecRTError) as caught:
            prepare(folder)
        assert caught.value.code == code
        assert key in str(caught.value)


def test_golden() -> None:
    check_golden_ir("chatglm2", "chatglm2", "6b")
    for size in ("6b", "glm-4-9b"):
        check_fuses("chatglm2", size, norms=3, attentions=1, gated=1)
