"""Published low-bit checkpoints: written by their documented layout, read as the numbers that the layout stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
from compiler.api import compile_prepared, float_weights, prepare, weights_of
from compiler.ir.formats import pack, round_to
from compiler.ir.interpreter import torch_dtype
from compiler.ir.ops import REGISTRY
from compiler.passes.quantization_plan import Linear, leaf_of
from compiler.validate.reference import outputs
from specs.checkpoint import Checkpoint
from specs.unpack import AWQ_ORDER
from tests.families.harness import prompts, save_random
from tests.golden_errors import check_raises

transformers = pytest.importorskip("transformers")
Tensors = dict[str, torch.Tensor]
GROUP = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    save_random(transformers.LlamaForCausalLM(config), folder)
    return folder


def into_words(numbers: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers 0.. packed into int32 along an axis, number `order[i]` of each word at place i."""
    count = 32 // bits
    split = numbers.long().movedim(axis, -1).unflatten(-1, (-1, count))
    split = split[..., list(order)] if order is not None else split
    total = (split << (torch.arange(count) * bits)).sum(-1)
    return total.to(torch.int32).movedim(-1, axis)


def affine(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 [in, out], zeros and float16 scales [in / 32, out] of a weight [out, in]."""
    split = weight.T.unflatten(0, (-1, GROUP))
    low, high = split.amin(1).clamp_max(0), split.amax(1).clamp_min(0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = (split / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15).flatten(0, 1)
    return codes, zero, scale


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, zero, scale = affine(weight)
    each = [part.repeat_interleave(GROUP, 0) for part in (zero, scale.float())]
    parts = {
        "qweight": into_words(codes, 4, 1, AWQ_ORDER),
        "qzeros": into_words(zero, 4, 1, AWQ_ORDER),
        "scales": scale,
    }
    return parts, ((codes - each[0]) * each[1]).T


def gptq(weight: torch.Tensor, offset: int = 1) -> tuple[Tensors, torch.Tensor]:
    """Act-order: inputs belong to groups in an order of their own."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    codes, zero, scale = affine(weight[:, order])
    back = torch.argsort(order)
    of_input = (torch.arange(len(codes)) // GROUP)[back]
    codes = codes[back]
    parts = {
        "qweight": into_words(codes, 4, 0), "qzeros": into_words(zero - offset, 4, 1), "scales": scale,
        "g_idx": of_input.to(torch.int32),
    }  # fmt: skip
    return parts, ((codes - zero[of_input]) * scale.float()[of_input]).T


def symmetric(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """GPTQ without zero points: the middle of the range is stored for all, less one; no act-order."""
    split = weight.T.unflatten(0, (-1, GROUP))
    scale = (split.abs().amax(1) / 7).half()
    codes = (split / scale.float()[:, None]).round().clamp(-8, 7).flatten(0, 1)
    parts = {
        "qweight": into_words(codes + 8, 4, 0), "qzeros": into_words(torch.full(scale.shape, 7), 4, 1), "scales": scale,
        "g_idx": torch.arange(len(codes), dtype=torch.int32) // GROUP,
    }  # fmt: skip
    return parts, (codes * scale.float().repeat_interleave(GROUP, 0)).T


def eight(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """GPTQ in 8 bits with a zero point for each group."""
    split = weight.T.unflatten(0, (-1, GROUP))
    low = split.amin(1).clamp_max(0)
    scale = ((split.amax(1).clamp_min(0) - low) / 255).half()
    zero = (-low / scale.float()).round().clamp(1, 255)
    codes = (split / scale.float()[:, None] + zero[:, None]).round().clamp(0, 255).flatten(0, 1)
    each = [part.repeat_interleave(GROUP, 0) for part in (zero, scale.float())]
    parts = {"qweight": into_words(codes, 8, 0), "qzeros": into_words(zero - 1, 8, 1), "scales": scale}
    return parts, ((codes - each[0]) * each[1]).T


def int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = round_to(weight / scale, "i8")
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def packed4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    split = weight.unflatten(1, (-1, GROUP))
    scale = split.abs().amax(-1) / 7
    codes = round_to(split / scale[..., None], "i4").float()
    parts = {
        "weight_packed": into_words(codes.flatten(1) + 8, 4, 1), "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return parts, (codes * scale[..., None]).flatten(1)


def zeros4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors with zero points and groups in the order of a calibration (`actorder: group`)."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(4))
    codes, zero, scale = (part.T for part in affine(weight[:, order]))
    back = torch.argsort(order)
    groups = (torch.arange(codes.shape[1]) // GROUP)[back]
    codes = codes[:, back]
    parts = {
        "weight_packed": into_words(codes, 4, 1), "weight_scale": scale, "weight_g_idx": groups.to(torch.int32),
        "weight_zero_point": into_words(zero, 4, 0), "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return parts, (codes - zero[:, groups]) * scale.float()[:, groups]


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax() / 448).reshape(1)
    codes = round_to(weight / scale, "f8e4m3")
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}, codes.float() * scale


def fp8_squares(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Squares of 48, which no side divides."""
    rows, columns = (-(-size // 48) for size in weight.shape)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.005
    wide = scale.repeat_interleave(48, 0).repeat_interleave(48, 1)[: weight.shape[0], : weight.shape[1]]
    codes = round_to(weight / wide, "f8e4m3")
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * wide


def nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    split = weight.unflatten(1, (-1, 16))
    outer = weight.abs().amax() / (6 * 448)
    scale = round_to(split.abs().amax(-1) / 6 / outer, "f8e4m3")
    step = (scale.float() * outer)[..., None]
    codes = round_to(split / step, "f4e2m1")
    parts = {"weight": pack(codes.flatten(1), "f4e2m1"), "weight_scale": scale, "weight_scale_2": outer.reshape(())}
    return parts, (codes.float() * step).flatten(1)


Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
_COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
FORMATS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq_v2": (
        lambda w: gptq(w, 0),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "desc_act": True},
    ),
    "gptq_sym": (symmetric, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
    "gptq_8": (eight, {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": False}),
    "int8": (int8, {**_COMPRESSED, "format": "int-quantized", "config_groups": {"0": {"weights": {"num_bits": 8}}}}),
    "pack4": (
        packed4,
        {**_COMPRESSED, "format": "pack-quantized", "config_groups": {"0": {"weights": {"num_bits": 4}}}},
    ),
    "pack4_zeros": (
        zeros4,
        {**_COMPRESSED, "format": "pack-quantized", "config_groups": {"0": {"weights": {"num_bits": 4}}}},
    ),
    "float8": (fp8, {**_COMPRESSED, "format": "float-quantized", "config_groups": {"0": {"weights": {"num_bits": 8}}}}),
    "fp8_blocks": (fp8_squares, {"quant_method": "fp8", "weight_block_size": [48, 48]}),
    "modelopt_fp8": (fp8, {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}),
    "modelopt_nvfp4": (nvfp4, {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
}


def write(base: Path, folder: Path, write_module: Writer, stated: dict[str, Any], plain: Path | None = None) -> None:
    """A copy of a checkpoint with its layers' linears in a low-bit layout, and one with the numbers that these are."""
    config = json.loads((base / "config.json").read_text())
    own: Tensors = {}
    numbers: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            own[name] = numbers[name] = tensor
            continue
        parts, numbers[name] = write_module(tensor)
        own |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    folder.mkdir()
    save_file(own, folder / "model.safetensors")
    if "producer" in stated:
        (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    else:
        config |= {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    if plain is not None:
        plain.mkdir()
        save_file({name: value.contiguous() for name, value in numbers.items()}, plain / "model.safetensors")
        (plain / "config.json").write_text((base / "config.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_kept_and_their_numbers_are_those_of_the_layout(name: str, base: Path, tmp_path: Path) -> None:
    writer, stated = FORMATS[name]
    write(base, tmp_path / "packed", writer, stated, tmp_path / "plain")
    numbers = float_weights(prepare(tmp_path / "plain"))
    prepared = prepare(
        tmp_path / "packed", out=tmp_path / "bundle"
    )  # no precision: a low-bit checkpoint stays as it is
    assert prepared.precision.recipe.name == "checkpoint"
    plan = prepared.precision.plan
    assert plan is not None
    assert len(plan.linears) == 14, plan.kept
    assert set(plan.kept) == {"head.weight"}
    read, floats = weights_of(prepared), float_weights(prepared)
    for linear in plan.linears.values():
        wanted = numbers(linear.weight)
        assert torch.equal(floats(linear.weight), wanted)
        assert torch.equal(dequantized(linear, read), wanted)
    rows = prompts(320, 5, 11)
    logits = [row["logits"] for row in outputs(prepared.built.graph, numbers, rows)]
    for found, exact in zip(runtime.load(compile_prepared(prepared)).logits(rows), logits, strict=True):
        # the same float32 numbers: sums in another order may differ in the last places
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(exact), rtol=1e-4, atol=1e-4)


def dequantized(linear: Linear, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight that a linear's stored tensors stand for, its inputs in their own order."""
    store = linear.storage
    codes, scale = read(f"{linear.weight}.codes"), read(f"{linear.weight}.scale")
    assert codes.dtype is torch_dtype(store.type)
    assert (tuple(codes.shape), tuple(scale.shape)) == (store.shape, store.scale_shape)
    zero = read(f"{linear.weight}.zero") if store.zero else None
    outer = read(f"{linear.weight}.outer") if store.outer else None
    wide: torch.Tensor = REGISTRY["dequantize"].body(codes, scale, zero, outer, dtype="f32", block=store.block)
    return wide[:, torch.argsort(read(f"{linear.weight}.order").long())] if store.permuted else wide


def test_what_is_not_read(base: Path, tmp_path: Path) -> None:
    for name, stated in {
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "awq": {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "gptq": {"quant_method": "gptq", "bits": 3},
        "compressed": {**_COMPRESSED, "format": "marlin-24", "config_groups": {"0": {"weights": {"num_bits": 4}}}},
        "modelopt": {"producer": {}, "quantization": {"quant_algo": "W4A8_AWQ"}},
        "method": {"quant_method": "quip"},
    }.items():
        write(base, tmp_path / name, awq, stated)
        check_raises(f"CKPT-030-{name}", Checkpoint.open, tmp_path / name)


def test_codes_that_do_not_fit_what_config_says(base: Path, tmp_path: Path) -> None:
    act_order, none = FORMATS["gptq"][1], {"quant_method": "gptq", "bits": 4, "sym": True}
    for name, stated, code in (("order", {**act_order, "desc_act": False}, "CKPT-033"), ("zeros", none, "CKPT-032")):
        write(base, tmp_path / name, gptq, stated)
        prepared = prepare(tmp_path / name)
        assert prepared.precision.plan is not None
        check_raises(f"{code}-{name}", weights_of(prepared), f"{next(iter(prepared.precision.plan.linears))}.codes")


def test_where_there_are_no_codes_or_they_can_not_run(base: Path, tmp_path: Path) -> None:
    check_raises("PREC-017", prepare, base, precision="checkpoint")
    write(base, tmp_path / "blocks", *FORMATS["modelopt_nvfp4"])
    check_raises("PREC-010-checkpoint", prepare, tmp_path / "blocks", target="sm120", toolchain="tensorrt-8.6")


def test_layers_with_a_precision_of_their_own(base: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "model", *FORMATS["awq"])
    (tmp_path / "run.yaml").write_text(
        "deployment: 1\ncheckpoint: model\nlayers: [{linears: [attn.q], precision: w8a16}, "
        "{linears: [mlp.down], precision: fp32}]\n"
    )
    prepared = prepare(tmp_path / "run.yaml")
    plan, read = prepared.precision.plan, weights_of(prepared)
    assert plan is not None
    assert {leaf_of(name): linear.recipe.name for name, linear in plan.linears.items()} == {
        "attn.q": "w8a16", **dict.fromkeys(("attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up"), "checkpoint")
    }  # fmt: skip
    assert read("layers.1.attn.q.weight.codes").dtype is torch.int8
    assert read("layers.1.attn.k.weight.codes").dtype is torch.uint8


def test_a_module_that_lacks_a_part(base: Path, tmp_path: Path) -> None:
    def broken(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts, numbers = awq(weight)
        return {name: part for name, part in parts.items() if name != "qzeros"}, numbers

    write(base, tmp_path / "model", broken, FORMATS["awq"][1])
    check_raises("CKPT-031", Checkpoint.open, tmp_path / "model")
