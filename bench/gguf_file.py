"""Write a LLaMA checkpoint as GGUF, for llama.cpp: the same weights under its names, in its order of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Our precision: what llama.cpp has nearest to it. Its 4-bit files keep embedding and output in more bits, so do these.
TYPES = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "w8a16": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "w4a16": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
TYPES |= {"w8a8_block": TYPES["w8a16"], "w4a8": TYPES["w4a16"]}  # llama.cpp rounds inputs to 8 bits with any of these


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        layer, inner = module.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[inner]}.weight"
    return f"{NAMES[module]}.weight"


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [H*D, M] of a query or key projection, each head reordered from two halves to interleaved pairs.

    GGML rotates neighbours (2j, 2j+1) where the checkpoint expects (j, j + D/2); attention only sees dot products
    over a head, so permuting queries and keys alike changes nothing else.
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write(checkpoint: Path, config: dict[str, Any], dtype: str, out: Path) -> None:
    """Write the GGUF file; matrices in `dtype`, norms in float32, no tokenizer."""
    matrix_type, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")

    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        for name in names:
            size = file.get_slice(name).get_shape()
            kind = kind_of(name, len(size), matrix_type)
            plain = kind == gguf.GGMLQuantizationType.F32
            # for a raw type the writer wants the shape in bytes
            shape = size if plain else gguf.quant_shape_to_byte_shape(size, kind)
            count = int(np.prod(shape)) * (4 if plain else 1)
            data_type = np.dtype(np.float32 if plain else np.uint8)
            writer.add_tensor_info(gguf_name(name), shape, data_type, count, None if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:  # one at a time: the whole in float32 may not fit beside the engines
            tensor = file.get_tensor(name)
            if name.endswith("q_proj.weight"):
                tensor = interleave(tensor, config["num_attention_heads"])
            elif name.endswith("k_proj.weight"):
                tensor = interleave(tensor, config["num_key_value_heads"])
            kind = kind_of(name, tensor.ndim, matrix_type)
            writer.write_tensor_data(gguf.quantize(tensor.float().contiguous().numpy(), kind).view(np.uint8))
    writer.close()


def kind_of(name: str, rank: int, matrix_type: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type of a tensor: vectors are float32, embedding and output not of 4 bits."""
    if rank < 2:
        return gguf.GGMLQuantizationType.F32
    outer = name.startswith(("model.embed_tokens", "lm_head"))
    return gguf.GGMLQuantizationType.Q8_0 if outer and matrix_type == gguf.GGMLQuantizationType.Q4_0 else matrix_type
