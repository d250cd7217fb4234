"""Low-bit checkpoints in the layout of TensorRT-LLM's converters: what is stored is what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compiler.api import float_weights, prepare, weights_of
from compiler.ir.formats import round_to
from tests.families import mixed_gemm
from tests.families.tensorrt_llm import LLAMA, LLAMA_SAYS, Tensors, converted, model, write
from tests.golden_errors import check_raises

pytest.importorskip("transformers")


def quantized(tensors: Tensors, make: Callable[[torch.Tensor], Tensors]) -> Tensors:
    """A rank's tensors with the layers' linears in a low-bit layout."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and module.endswith((".qkv", ".dense", ".fc", ".gate", ".proj")):
            out |= {f"{module}.{key}": value for key, value in make(tensor).items()}
        else:
            out[name] = tensor
    return out


def float8(weight: torch.Tensor) -> Tensors:
    scale = torch.tensor([0.01])
    return {
        "weight": round_to(weight / scale, "f8e4m3"), "weights_scaling_factor": scale,
        "activation_scaling_factor": torch.ones(1),
    }  # fmt: skip


def halves(weight: torch.Tensor) -> Tensors:
    """AWQ as ModelOpt packs it: two outputs in a byte, factors for the inputs."""
    factors = torch.linspace(0.5, 1.5, weight.shape[1])
    split = (weight / factors).unflatten(1, (-1, 16))
    scale = split.abs().amax(-1) / 7
    codes = (split / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    packed = (codes[0::2] & 15) | (codes[1::2] << 4)
    return {"weight": packed, "weights_scaling_factor": scale, "prequant_scaling_factor": factors}


def test_low_bit_weights_of_two_ranks(tmp_path: Path) -> None:
    stated, save = LLAMA_SAYS, model("Llama", **LLAMA, rope_theta=5000.0)
    theirs = prepare(save(tmp_path / "vendor"), precision="fp32", max_sequence=64)
    exact = float_weights(theirs)
    for algorithm, make, bound in (("FP8", float8, 0.06), ("W4A16_AWQ", halves, 0.2)):
        config, ranks = converted(theirs, {**stated, "quantization": {"quant_algo": algorithm}}, 2)
        made = [quantized(rank, make) for rank in ranks]
        found = prepare(write(tmp_path / algorithm, config, made), max_sequence=64)
        read = float_weights(found)
        for name in (
            "layers.1.attn.q.weight",
            "layers.2.attn.v.weight",
            "layers.0.mlp.gate.weight",
            "layers.2.mlp.down.weight",
        ):
            wanted = exact(name)
            assert float((read(name) - wanted).norm() / wanted.norm()) < bound, (algorithm, name)
        if algorithm == "FP8":  # codes are kept: a step is exact
            assert found.precision.recipe.name == "checkpoint"
            codes = weights_of(found)("layers.2.attn.v.weight.codes")
            assert torch.equal(codes.float() * 0.01, read("layers.2.attn.v.weight"))


@pytest.mark.parametrize(
    ("algorithm", "gpu"),
    [("W8A16", "sm70"), ("W8A16", "sm86"), ("W4A16", "sm70"), ("W4A16", "sm75"), ("W4A16_GPTQ", "sm89"),
     ("W8A16_GPTQ", "sm80")],
)  # fmt: skip
def test_weights_in_the_order_of_a_gpu_s_products(algorithm: str, gpu: str, tmp_path: Path) -> None:
    bits = int(algorithm[1])
    sizes = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    theirs = prepare(model("Llama", **sizes, rope_theta=5000.0)(tmp_path / "vendor"), precision="fp32")
    told = {**LLAMA_SAYS, "head_size": 32, "rotary_embedding_dim": 32}
    config, ranks = converted(theirs, told | {"quantization": {"quant_algo": algorithm, "made_for": gpu}}, 2)
    rounded: list[Tensors] = [{}, {}]

    def make(weight: torch.Tensor) -> Tensors:
        wide, codes, parts = (_grouped if "GPTQ" in algorithm else _per_output)(weight, bits)
        numbers = mixed_gemm.preprocessed(codes.T, bits, int(gpu[2:]))
        stored = torch.from_numpy(numbers.view("int8")).reshape(len(codes.T), -1)
        return {"weight": stored.view(torch.float16) if "GPTQ" in algorithm else stored, **parts, "wide": wide}

    for rank, own in zip(ranks, rounded, strict=True):
        made = quantized(rank, make)
        own |= {name[:-4] + "weight": made.pop(name) for name in list(made) if name.endswith(".wide")}
        rank.clear()
        rank |= made
    found = prepare(write(tmp_path / "stored", config, ranks), max_sequence=64)
    read = float_weights(found)
    plain = {**config, "quantization": {"quant_algo": None}}
    floats = [
        {
            **{n: t for n, t in rank.items() if not n.startswith("transformer.layers")},
            **own,
            **{n: t for n, t in rank.items() if "norm" in n},
        }
        for rank, own in zip(ranks, rounded, strict=True)
    ]
    wanted = float_weights(prepare(write(tmp_path / "floats", plain, floats), precision="fp32"))
    for decl in theirs.built.weights:
        # zeros times scales are rounded to float16 by the writer, and to whole codes here
        tolerance = 2e-3 if "GPTQ" in algorithm else 0
        torch.testing.assert_close(read(decl.name).float(), wanted(decl.name), rtol=0, atol=tolerance)
    assert found.precision.recipe.name == "checkpoint"
    if (algorithm, gpu) == ("W8A16", "sm86"):  # told another GPU: outputs lack the code that their scale is made from
        config["quantization"]["made_for"] = "sm70"
        mistaken = prepare(write(tmp_path / "CKPT-032-gpu", config, ranks), max_sequence=64)
        check_raises("CKPT-032-gpu", float_weights(mistaken), "layers.0.attn.o.weight")
    parts = {name: weights_of(found)(f"layers.0.attn.o.weight.{name}").float() for name in ("codes", "scale")}
    assert parts["codes"].shape == (128, 128)
    assert parts["scale"].shape == (128, 4 if "GPTQ" in algorithm else 2)  # a scale of each rank's inputs, or of 32


def _per_output(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """The whole range, as `symmetric_quantize` has it: the largest number is code 128 or 8, cut to 127 or 7."""
    half = 2 ** (bits - 1)
    scale = (weight.abs().amax(1) / half).half()
    codes = (weight / (weight.abs().amax(1, keepdim=True) / half)).round().clamp(-half, half - 1)
    return codes * scale.float()[:, None], codes.to(torch.int8), {"per_channel_scale": scale}


def _grouped(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Groups of 32 inputs with zeros, which are stored times scales."""
    split = weight.unflatten(1, (-1, 32))
    low, high = split.amin(-1).clamp_max(0), split.amax(-1).clamp_min(0)
    scale, middle = ((high - low) / (2**bits - 1)).half(), 2 ** (bits - 1)
    zero = (-low / scale.float()).round() - middle
    codes = ((split / scale.float()[..., None]).round() + zero[..., None]).clamp(-middle, middle - 1)
    wide = ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1)
    parts = {"weights_scaling_factor": scale.T, "zero": (-zero * scale.float()).half().T}
    return wide, codes.flatten(1).to(torch.int8), parts
