"""Low-bit weights in the order in which TensorRT-LLM's mixed products read them: its weight-only and GPTQ checkpoints.

The steps are those of `preprocess_weights_for_mixed_gemm` (cpp/tensorrt_llm/kernels/cutlass_kernels/
cutlass_preprocessors.cpp, 0.6 to 0.19, Apache 2.0), undone. They depend on the GPU on which the converter ran, and no
file tells which one that was. Left out is SM90, whose steps changed from version to version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    import torch

    from specs.packed import Packed

GPUS = range(70, 90)
_TURING = 75  # the first whose tensor cores take 8 and 4 bits from shared memory
_ROWS = {  # which row of a group of inputs lies at each place: what a thread gets when 16-bit numbers are loaded
    8: (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
    4: (0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
        4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31),
}  # fmt: skip
_WORD = {8: (0, 2, 1, 3), 4: (0, 2, 4, 6, 1, 3, 5, 7)}  # which number of a 32-bit word lies at each place
TILE = 64  # inputs of one output that lie together


def in_order(stored: torch.Tensor, bits: int, gpu: int) -> torch.Tensor:
    """Signed codes i8 [out, in] of a matrix [in, out] of bytes (two numbers in each where bits are 4) for a GPU."""
    import torch

    numbers, rows = stored.contiguous().view(torch.uint8), len(stored)
    if bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), -1)
    word = torch.argsort(torch.tensor(_WORD[bits]))
    codes = (numbers.reshape(-1, len(word))[:, word].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    if gpu < _TURING:
        plain: torch.Tensor = codes.reshape(rows, -1).T.contiguous()
        return plain
    together = 16 // bits  # outputs whose tiles fill one cache line
    codes = codes.reshape(-1, rows // TILE, together, TILE).transpose(1, 2)
    group = torch.argsort(torch.tensor(_ROWS[bits]))
    ordered: torch.Tensor = codes.reshape(-1, rows // len(group), len(group))[..., group].reshape(-1, rows).contiguous()
    return ordered


def rank_of(
    packed: Packed, parts: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes [out, in], scales [out, groups] and zeros (or None) of one rank's part; raises CKPT-032 for another GPU's.

    Weight-only: a scale of each output [out], its largest weight over half the range. GPTQ: scales [in / g, out], and
    `zero` [in / g, out], which is added to code times scale.
    """
    import torch

    info = dict(packed.parts)["weight.0"]
    where = Where(str(info.file))
    if packed.gpu >= _TURING and len(parts["weight"]) % TILE:
        message = (
            f"`{info.name}` has {len(parts['weight'])} inputs, no multiple of the {TILE} of a tile of SM{packed.gpu}"
        )
        raise SpecRTError("CKPT-032", message, where=where, hint="name the GPU on which it was converted")
    codes = in_order(parts["weight"], packed.bits, packed.gpu)
    if "per_channel_scale" in parts:
        scale = parts["per_channel_scale"].reshape(-1, 1)
        largest = codes.to(torch.int16).abs().amax(1, keepdim=True)
        if bool(((largest < 2 ** (packed.bits - 1) - 1) & (scale != 0)).any()):
            message = f"`{info.name}` is not in the order of SM{packed.gpu}: outputs lack their largest code"
            raise SpecRTError("CKPT-032", message, where=where, hint="name the GPU on which it was converted")
        return codes, scale, None
    scale = parts["weights_scaling_factor"].T.contiguous()
    if "zero" not in parts:
        return codes, scale, None
    exact = -parts["zero"].T.float() / scale.float()
    zeros = exact.round()
    if not bool(((exact - zeros).abs() < 0.1).all()):  # 128, rounded to float16, is off by 0.06 at most
        message = f"`{info.name}` has zeros that are no whole codes"
        raise SpecRTError("CKPT-032", message, where=where)
    return codes, scale, zeros.to(torch.int16)
