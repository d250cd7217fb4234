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
TYPES = {
    "fp32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


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
    torch_type, matrix_type, file_type = TYPES[dtype]
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
            kind = matrix_type if len(size) == 2 else gguf.GGMLQuantizationType.F32
            width = 4 if kind == gguf.GGMLQuantizationType.F32 else 2
            # for a raw type the writer wants the shape in bytes
            shape = size if width == 4 else [*size[:-1], size[-1] * width]
            data_type = np.dtype(np.float32 if width == 4 else np.uint8)
            count = int(np.prod(size)) * width
            writer.add_tensor_info(gguf_name(name), shape, data_type, count, None if width == 4 else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:  # one at a time: the whole in float32 may not fit beside the engines
            tensor = file.get_tensor(name)
            if name.endswith("q_proj.weight"):
                tensor = interleave(tensor, config["num_attention_heads"])
            elif name.endswith("k_proj.weight"):
                tensor = interleave(tensor, config["num_key_value_heads"])
            tensor = tensor.to(torch_type if tensor.ndim == 2 else torch.float32).contiguous()
            writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()
