"""Rows of a quantized KV cache: a scale and a zero in float32, then a code for each number, all in bytes.

u8: scale = (max - min) / 255 of the row, zero = -min / scale, code = round(x / scale + zero), ties to even, as
OpenVINO's paged attention has them, so that the plugin reads and writes these rows itself. f8e4m3: scale = max|x| / 448
as `row_scale` has it, zero = 0. A number is (code - zero) scale. The head keeps codes at a multiple of 8 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specs.errors import SpecRTError

if TYPE_CHECKING:
    import torch

HEAD = 8  # bytes before the codes
CODES = ("u8", "f8e4m3")
LEAST = {"u8": 1e-4, "f8e4m3": 1e-12}  # the scale of a row whose numbers are all equal, or all 0


def to_rows(x: torch.Tensor, codes: str) -> torch.Tensor:
    """Numbers [*N,D] as rows u8[*N,D+8]. Raises SpecRTError IR-004 for other codes."""
    import torch

    x = x.float()
    if codes == "u8":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, LEAST[codes], scale)
        zero = -low / scale
        bits = (x / scale + zero).nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)
    elif codes == "f8e4m3":
        scale = (x.abs().amax(-1, keepdim=True) / 448.0).clamp_min(LEAST[codes])
        zero = torch.zeros_like(scale)
        bits = (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        raise SpecRTError("IR-004", f"a cache has codes of {', '.join(CODES)}, not `{codes}`")
    return torch.cat((torch.cat((scale, zero), -1).contiguous().view(torch.uint8), bits), -1)


def from_rows(rows: torch.Tensor, codes: str) -> torch.Tensor:
    """The numbers f32[*N,D] of rows u8[*N,D+8]."""
    import torch

    head = rows[..., :HEAD].contiguous().view(torch.float32)
    bits = rows[..., HEAD:].contiguous()
    exact = bits.float() if codes == "u8" else bits.view(torch.float8_e4m3fn).float()
    return (exact - head[..., 1:]) * head[..., :1]
