"""Products of every stored type as kernels: what one is, how its weight lies, which kernel and tiles compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.ir.formats import codes, from_codes
from compiler.kernels.attention import Launch, power
from compiler.kernels.row_source import RefusedError

if TYPE_CHECKING:
    import torch

MANY = 8192  # rows that no call exceeds (decision 27)
SPAN = 128  # columns of a weight of 4 bits that are packed together, in words of 16 bits
NIBBLES = ("i4", "u4", "f4e2m1")
WEIGHTS = {
    "f16": ("f16", "i8", "f8e4m3", *NIBBLES), "bf16": ("bf16", "i8", "f8e4m3", *NIBBLES), "i8": ("i8", "i4", "u4"),
    "f8e4m3": ("f8e4m3",),
}  # fmt: skip
SCALES = {"": "", "f32": "f32", "f16": "f16", "bf16": "bf16", "f8e8m0": "u8"}  # as a kernel takes them
LARGE = (90, 100)  # architectures whose multiprocessors hold, and whose products want, tiles of 128 x 256
LEAST_FP8 = 89  # Ada: the first whose conversions and products of E4M3 the compiler has


@dataclass(frozen=True)
class Product:
    """y [count, outs] = (x . w') with scales, + bias + residual: summed in float32 (INT8 in int32), rounded once.

    `scale`, a type or "", is [outs] with `group` 0, else [ins / group, outs]: a block of outs reads it in one piece.
    `zero` has that shape too, a byte an element. `x_scale` is "", "tensor" f32[1], "row" f32[count], or "block", whose
    scales are `x_scale_type`[count, ins / x_block]. A weight of 4 bits is as `pack` gives it.
    """

    outs: int
    ins: int
    x: str
    w: str
    out: str
    scale: str = ""
    group: int = 0
    zero: bool = False
    x_scale: str = ""
    x_block: int = 0
    x_scale_type: str = "f32"
    bias: str = ""  # types of what is added, "" for nothing
    residual: str = ""


def packed_bytes(ins: int) -> int:
    """Bytes of a row of `ins` columns as `pack` gives it."""
    return -(-ins // SPAN) * SPAN // 2


def pack(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values [outs, ins] of 4 bits, held as the interpreter does, as uint8 [outs, packed_bytes(ins)].

    Word j of a span of 128 columns (16 bits, low byte first) holds the codes of columns j, j + 32, j + 64, j + 96 from
    the lowest bits on. The code of i4 is 8 higher than its value. What is beyond `ins` is 0.
    """
    import torch

    bits = codes(values, dtype).to(torch.int32) ^ (8 if dtype == "i4" else 0)
    wide = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % SPAN)).reshape(len(bits), -1, 4, SPAN // 4)
    words = wide[:, :, 0] | wide[:, :, 1] << 4 | wide[:, :, 2] << 8 | wide[:, :, 3] << 12
    return torch.stack([words & 255, words >> 8], -1).to(torch.uint8).reshape(len(bits), -1)


def unpack(stored: torch.Tensor, ins: int, dtype: str) -> torch.Tensor:
    """The values [outs, ins] of `pack`."""
    import torch

    pairs = stored.to(torch.int32).reshape(len(stored), -1, 1, SPAN // 4, 2)
    parts = torch.cat([pairs[..., 0] & 15, pairs[..., 0] >> 4, pairs[..., 1] & 15, pairs[..., 1] >> 4], 2)
    bits = parts.reshape(len(stored), -1)[:, :ins] ^ (8 if dtype == "i4" else 0)
    return from_codes(bits.to(torch.uint8), dtype)


def product(p: Product, rows: int, architecture: int) -> Launch:
    """The kernel for at most `rows` rows on a GPU (90 is sm_90): grid (outs / `tile`, count / `rows`) of its constants.

    Raises RefusedError where no kernel computes it.
    """
    _check(p, architecture)
    nibbles = p.w in NIBBLES
    arguments = (
        ("x", p.x), ("w", "u8" if nibbles else p.w), ("scale", SCALES[p.scale]),
        *([("zero", ("i8" if p.w == "i4" else "u8") if p.zero else "")] if nibbles else []),
        ("x_scale", SCALES[p.x_scale_type] if p.x_scale else ""), ("bias", p.bias),
        ("residual", p.residual), ("y", p.out), ("count", "int"),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "outs": p.outs, "ins": p.ins, "group": p.group, "x_kind": p.x_scale, "x_block": p.x_block,
    }  # fmt: skip
    tiles, warps, stages = _tiles(p, rows, architecture)
    if nibbles:
        share = min(SPAN, p.group or SPAN, p.x_block or SPAN)
        unit = 512.0 if p.w != "f4e2m1" and p.x != "i8" else 1.0
        constants |= {"kind": p.w, "span": SPAN, "share": share, "unit": unit}
        return Launch("packed", "packed.packed", arguments, constants | tiles | {"stages": stages}, warps, stages)
    return Launch("dense", "dense.dense", arguments, constants | tiles, warps, stages)


def _check(p: Product, architecture: int) -> None:
    if p.w not in WEIGHTS.get(p.x, ()):
        raise RefusedError(f"a product of {p.x} and {p.w}")
    if "f8e4m3" in (p.x, p.w) and architecture < LEAST_FP8:
        raise RefusedError(f"a product of f8e4m3 on sm_{architecture}")
    if p.scale not in SCALES or p.x_scale_type not in SCALES:
        raise RefusedError(f"scales of {p.scale or 'f32'} and {p.x_scale_type}")
    if p.zero and (p.w not in ("i4", "u4") or not p.scale):
        raise RefusedError(f"a zero of {p.w}")
    if (p.group and not p.scale) or (p.w in NIBBLES and not p.scale):
        raise RefusedError(f"{p.w} without a scale")
    if p.x_scale and p.x in ("f16", "bf16"):
        raise RefusedError(f"a scale of {p.x}")
    if (p.x_scale == "block") != bool(p.x_block):
        raise RefusedError(f"x_scale {p.x_scale!r} with blocks of {p.x_block}")
    for size in (p.group, p.x_block):
        if size and (size < 32 or size != power(size) or p.ins % size):
            raise RefusedError(f"scales for {size} of {p.ins} columns: a power of two from 32 on has a kernel")


def _tiles(p: Product, rows: int, architecture: int) -> tuple[dict[str, Any], int, int]:
    """Sizes of tiles, warps, stages, from measurements on an H200 (decision 43) of some kinds and sizes."""
    if p.w in NIBBLES:
        return _packed_tiles(p, rows)
    line = 128 if p.x in ("i8", "f8e4m3") else 64  # elements of 128 bytes
    wide, widest = p.outs > 8192, p.outs > 16384 and line == 128
    height, band, warps = (
        16 if rows <= 16 else 64 if rows <= 64 else 128,
        1 if rows <= 64 else 8,
        4 if rows <= 256 else 8,
    )
    if rows <= 16:
        widest |= p.outs > 16384 and p.w != p.x
        tile, depth, stages = (64, 128, 6) if widest else (32, 128, 6) if wide or line == 64 else (32, 256, 5)
    elif rows <= 64:
        tile, depth, stages = (128, 128, 4) if widest else (64, line, 5) if wide else (32, 2 * line, 5)
    elif rows <= 256:
        height, tile, depth, stages = (128, 64, line, 4) if wide else (64, 32, 2 * line, 4)
    else:
        tile, depth, stages = 256 if architecture in LARGE and (wide or rows > 1024) else 128, line, 3
    depth = min(depth, p.group or depth, p.x_block or depth)
    return {"rows": height, "tile": tile, "depth": depth, "band": band, "turned": p.w != p.x}, warps, stages


def _packed_tiles(p: Product, rows: int) -> tuple[dict[str, Any], int, int]:
    if rows == 1:
        return {"rows": 1, "tile": 16, "parts": 8, "chunk": 1, "band": 1}, 2, 3
    if rows <= 16 and p.outs > 8192:
        return {"rows": 16, "tile": 64, "parts": 1, "chunk": 2, "band": 1}, 2, 3
    if rows <= 16:
        return {"rows": 16, "tile": 32, "parts": 2, "chunk": 1, "band": 1}, 2, 4
    if rows <= 64:
        return {"rows": 64, "tile": 64, "parts": 1, "chunk": 1, "band": 1}, 4, 4
    return {"rows": 128, "tile": 128, "parts": 1, "chunk": 1, "band": 8}, 8, 3
