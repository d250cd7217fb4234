"""A training toolkit's decoder, both generations of its names: its own cases, and variants through transformers."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import compiler
import runtime
from specs.errors import SpecRTError
from tests.families.harness import (
    REFERENCE,
    check_case,
    check_decoder,
    check_fuses,
    check_golden_ir,
    logits_of,
    prompts,
    save_random,
)
from tests.golden_errors import check_raises

transformers = pytest.importorskip("transformers")
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
CASE = REFERENCE / "gpt-nemo-rope-swiglu-ln1p-gqa"


@pytest.mark.parametrize("case", ["gpt-nemo-learned-gelu", "gpt-nemo-rope-swiglu-ln1p-gqa"])
def test_agrees_with_the_toolkit(case: str, tmp_path: Path) -> None:
    check_case(case, tmp_path / "bundle")


# -- variants ---------------------------------------------------------------------------------------------------------

LEGACY = {
    "layer": "model.language_model.encoder.layers", "top": "model.language_model",
    "qkv": "self_attention.query_key_value",
    "out": "self_attention.dense", "norm_2": "post_attention_layernorm", "fc1": "mlp.dense_h_to_4h",
    "fc2": "mlp.dense_4h_to_h", "final": "model.language_model.encoder.final_layernorm",
}  # fmt: skip
CORE = {
    "layer": "model.decoder.layers", "top": "model", "qkv": "self_attention.linear_qkv",
    "out": "self_attention.linear_proj", "norm_2": "pre_mlp_layernorm", "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2", "final": "model.decoder.final_layernorm",
}  # fmt: skip


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    parts = [x.unflatten(0, (groups, -1)) for x in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)


def _renamed(stored: dict[str, torch.Tensor], names: dict[str, str], groups: int, *, apart: bool) -> dict[str, Any]:
    """The tensors of transformers' decoders of rotary positions, under the toolkit's names."""
    out = {f"{names['top']}.embedding.word_embeddings.weight": stored["model.embed_tokens.weight"]}
    out |= {f"{names['final']}.{key[11:]}": value for key, value in stored.items() if key.startswith("model.norm.")}
    if "lm_head.weight" in stored:
        out[f"{names['top']}.output_layer.weight"] = stored["lm_head.weight"]
    for key, value in stored.items():
        if not key.startswith("model.layers."):
            continue
        _, _, layer, *rest, kind = key.split(".")
        module, base = ".".join(rest), f"{names['layer']}.{layer}"
        if module == "self_attn.q_proj":
            k, v = (stored[key.replace("q_proj", f"{letter}_proj")] for letter in "kv")
            out[f"{base}.{names['qkv']}.{kind}"] = _grouped(value, k, v, groups)
        elif module == "mlp.gate_proj":
            up = stored[key.replace("gate_proj", "up_proj")]
            if apart:
                out |= {f"{base}.{names['fc1']}.{kind}": value, f"{base}.{names['fc1']}_2.{kind}": up}
            else:
                out[f"{base}.{names['fc1']}.{kind}"] = torch.cat((value, up))
        elif module == "mlp.up_proj" and key.replace("up_proj", "gate_proj") not in stored:
            out[f"{base}.{names['fc1']}.{kind}"] = value
        elif module in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            new = {"self_attn.o_proj": "out", "mlp.down_proj": "fc2", "post_attention_layernorm": "norm_2"}
            out[f"{base}.{names[new[module]] if module in new else module}.{kind}"] = value
    return out


def _write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    base = json.loads((CASE / "config.json").read_text())
    kept = {key: value for key, value in base.items() if key not in ("num_query_groups", "rotary_percentage")}
    (folder / "config.json").write_text(json.dumps({**kept, **config}))


@pytest.mark.parametrize(
    ("activation", "fusion", "act", "names", "tied"),
    [
        ("swiglu", False, "silu", LEGACY, False),
        ("geglu", True, "gelu_pytorch_tanh", LEGACY, True),
        ("fast-geglu", False, "gelu", CORE, False),
        ("fast-reglu", False, "relu", LEGACY, False),
    ],
)
def test_gated(activation: str, fusion: bool, act: str, names: dict[str, str], tied: bool, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, hidden_act=act, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, attention_bias=tied, mlp_bias=tied,
    )  # fmt: skip
    folder = tmp_path / "model"
    model = save_random(transformers.LlamaForCausalLM(config), folder)
    apart = not activation.startswith("fast-")
    _write(
        folder, _renamed(load_file(folder / "model.safetensors"), names, 1, apart=apart),
        vocab_size=90, hidden_size=48, ffn_hidden_size=56, num_attention_heads=4, num_query_groups=1, kv_channels=16,
        normalization="rmsnorm", activation=activation, bias_activation_fusion=fusion, bias=tied,
        share_embeddings_and_output_weights=tied, mcore_gpt=names is CORE,
    )  # fmt: skip
    check_decoder(folder, logits_of(model), 100, lengths=(1, 20), new=6)


@pytest.mark.parametrize(("fused_norms", "act"), [(False, "gelu"), (True, "relu2")])
def test_one_plus_gain_partial_rotation(fused_norms: bool, act: str, tmp_path: Path) -> None:
    config = transformers.NemotronConfig(
        vocab_size=100, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, hidden_act=act, norm_eps=1e-5, partial_rotary_factor=0.5,
    )  # fmt: skip
    folder = tmp_path / "model"
    model = save_random(transformers.NemotronForCausalLM(config), folder)
    tensors = _renamed(load_file(folder / "model.safetensors"), CORE, 2, apart=False)
    if fused_norms:
        for old, new in [("input_layernorm.", "self_attention.linear_qkv"), ("pre_mlp_layernorm.", "mlp.linear_fc1")]:
            tensors = {name.replace(old, f"{new}.layer_norm_"): tensor for name, tensor in tensors.items()}
        tensors = {name.replace("model.", "model.module.", 1): tensor for name, tensor in tensors.items()}
    _write(
        folder, tensors, vocab_size=100, hidden_size=64, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2,
        normalization="layernorm1p", activation="gelu" if act == "gelu" else "squared-relu", bias=False,
        rotary_percentage=0.5,
    )  # fmt: skip
    check_decoder(folder, logits_of(model), 100, lengths=(1, 20), new=6)


# -- archives ---------------------------------------------------------------------------------------------------------


def _archive(path: Path, config: bytes | None, weights: bytes | None = None, mode: str = "w:") -> Path:
    members = {"./model_config.yaml": config, "./model_weights.ckpt": weights, "tokenizer.model": b""}
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def _saved(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def test_archive(tmp_path: Path) -> None:
    """An archive, the same unpacked, and one whose tensors share storage and have another type, are one model."""
    rows = prompts(288, 3, 9)
    expected = runtime.load(compiler.compile(CASE, out=tmp_path / "plain")).logits(rows)
    with tarfile.open(CASE / "model.nemo") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    state = torch.load(tmp_path / "unpacked/model_weights.ckpt", weights_only=True)
    state["model.decoder.final_layernorm._extra_state"] = io.BytesIO(b"scales")
    both = torch.cat([state[f"model.decoder.final_layernorm.{kind}"] for kind in ("weight", "bias")])
    state |= {f"model.decoder.final_layernorm.{kind}": both[96 * i :][:96] for i, kind in enumerate(("weight", "bias"))}
    config = yaml.safe_load((CASE / "model_config.yaml").read_text()) | {"target": TARGET, "precision": "bf16"}
    again = _archive(tmp_path / "m.nemo", yaml.dump(config).encode(), _saved(state))
    for number, source in enumerate([CASE / "model.nemo", tmp_path / "unpacked", again]):
        own = runtime.load(compiler.compile(source, out=tmp_path / f"bundle{number}"))
        for found, wanted in zip(own.logits(rows), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = (CASE / "model_config.yaml").read_bytes()
    bad = _archive(tmp_path / "bad.nemo", config, _saved({"a": _Attack()}))
    check_raises("CKPT-017-pickle", compiler.prepare, bad)
    assert not (tmp_path / "executed").exists()
    plain = _archive(tmp_path / "p.nemo", config, pickle.dumps({"a": 1}))
    check_raises("CKPT-017-zip", compiler.prepare, plain)
    strided = _saved({"a": torch.zeros(4, 4).t()[1:]})
    check_raises(
        "CKPT-017-strides",
        compiler.prepare,
        _archive(tmp_path / "s", config, strided),
    )


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    config = (CASE / "model_config.yaml").read_bytes()
    gz = _archive(tmp_path / "z.nemo", config, mode="w:gz")
    check_raises("CKPT-015-compressed", compiler.prepare, gz)
    check_raises("CKPT-015-no-config", compiler.prepare, _archive(tmp_path / "n.nemo", None))
    split = _archive(tmp_path / "split.nemo", config)
    with tarfile.open(split, "a:") as archive:
        for rank in range(2):
            archive.addfile(tarfile.TarInfo(f"mp_rank_{rank:02}/model_weights.ckpt"), io.BytesIO())
    check_raises("CKPT-016", compiler.prepare, split)
    check_raises("CKPT-003-yaml", compiler.prepare, _archive(tmp_path / "y", b"a: [", b""))
    check_raises(
        "CKPT-003-yaml-list",
        compiler.prepare,
        _archive(tmp_path / "l", b"[]", b""),
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"megatron_legacy": True}, "SPEC-042"),
        ({"transformer_block_type": "normformer"}, "SPEC-042"),
        ({"position_embedding_type": "alibi"}, "SPEC-042"),
        ({"tensor_model_parallel_size": 2}, "SPEC-042"),
        ({"activation": "mish"}, "SPEC-042"),
        ({"target": "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel"}, "SPEC-042"),
        ({"new_flag": True}, "SPEC-043"),
    ],
)
def test_refuses_what_it_does_not_cover(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    _write(tmp_path, load_file(CASE / "model.safetensors"), **change)
    with pytest.raises(SpecRTError) as caught:
        compiler.prepare(tmp_path)
    assert caught.value.code == code
    assert next(iter(change)) in str(caught.value)


def test_golden() -> None:
    check_golden_ir("nemo_gpt", "nemo_gpt", "5b")
    check_fuses("nemo_gpt", "5b", norms=3, attentions=1)
    assert compiler.prepare(CASE).graph
