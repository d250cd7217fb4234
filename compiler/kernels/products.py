"""Products of every stored type as kernels: what one is, how its weight lies, which kernel and tiles compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.ir.formats import codes, from_codes
from compiler.kernels.attention import HOPPER, Launch, power
from compiler.kernels.row_source import RefusedError

if TYPE_CHECKING:
    import torch

    from compiler.ir.core import Equation

MANY = 8192  # rows that no call exceeds (decision 27)
SPAN = 128  # columns of a weight that are packed together, in words of 16 bits
NIBBLES = ("i4", "u4", "f4e2m1")
FLOATS = ("f16", "bf16")
IN_WORDS = ("packed", "widened", "words")  # kernels that read what `pack` gives
WEIGHTS = {
    "f16": ("f16", "i8", "f8e4m3", *NIBBLES), "bf16": ("bf16", "i8", "f8e4m3", *NIBBLES), "i8": ("i8", "i4", "u4"),
    "f8e4m3": ("f8e4m3",),
}  # fmt: skip
SCALES = {"": "", "f32": "f32", "f16": "f16", "bf16": "bf16", "f8e8m0": "u8", "f8e4m3": "u8"}  # as a kernel takes them
FINE = 16  # columns of E2M1 that share a scale of E4M3: a code times its scale is a number of float16
LARGE = (90, 100)  # architectures whose multiprocessors hold, and whose products want, tiles of 128 x 256
BLOCKS = 132  # multiprocessors: a product's columns are split where a product of whole rows would leave some idle
# rows, outs, warps and time of a tile, next to that of 128 x 128 (of 64 x 128 for itself), as measured (decision 49)
WIDENED = ((64, 128, 8, 1.0), (128, 128, 8, 1.0), (128, 64, 4, 0.59), (256, 128, 8, 1.7))
LEAST_FP8 = 89  # Ada: the first whose conversions and products of E4M3 the compiler has
LEAST_INT8 = 80  # Turing multiplies INT8, but the compiler has no products of it below Ampere


@dataclass(frozen=True)
class Product:
    """y [count, outs] = (x . w') with scales, + bias + residual: summed in float32 (INT8 in int32), rounded once.

    `scale`, a type or "", is [outs] with `group` 0, else [ins / group, outs]: a block of outs reads it in one piece.
    `zero` has that shape too, a byte an element. `x_scale` is "", "tensor" f32[1], "row" f32[count], or "block", whose
    scales are `x_scale_type`[count, ins / x_block]. Where x is float, "tensor" is the outer scale of the weight. A
    weight that is `in_words` is as `pack` gives it.
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


def in_words(x: str, w: str, group: int = 0) -> bool:
    """Whether a weight under inputs of type `x`, with scales for `group` columns or rows (0), is as `pack` gives it."""
    return w in NIBBLES or (w == "i8" and x in FLOATS and (not group or group >= SPAN // 2))


def packed_bytes(ins: int, dtype: str) -> int:
    """Bytes of a row of `ins` columns as `pack` gives it."""
    return -(-ins // SPAN) * SPAN // (1 if dtype == "i8" else 2)


def pack(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values [outs, ins] of 4 or 8 bits, held as the interpreter does, as uint8 [outs, packed_bytes(ins)].

    Word j of a span of 128 columns (16 bits, low byte first) holds the codes of columns j, j + 32, j + 64, j + 96 from
    the lowest bits on; of 8 bits those of j and j + 64. The code of i4 is 8 higher than its value. What is beyond `ins`
    is 0.
    """
    import torch

    bits = values.view(torch.uint8) if dtype == "i8" else codes(values, dtype)
    bits = bits.to(torch.int32) ^ (8 if dtype == "i4" else 0)
    held = 2 if dtype == "i8" else 4
    wide = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % SPAN)).reshape(len(bits), -1, held, SPAN // held)
    words = (wide << torch.arange(0, 16, 16 // held)[:, None]).sum(2)
    return torch.stack([words & 255, words >> 8], -1).to(torch.uint8).reshape(len(bits), -1)


def unpack(stored: torch.Tensor, ins: int, dtype: str) -> torch.Tensor:
    """The values [outs, ins] of `pack`."""
    import torch

    held = 2 if dtype == "i8" else 4
    low, high = stored.to(torch.int32).reshape(len(stored), -1, 1, SPAN // held, 2).unbind(-1)
    parts = (low | high << 8) >> torch.arange(0, 16, 16 // held)[:, None] & (1 << 16 // held) - 1
    bits = (parts.reshape(len(stored), -1)[:, :ins] ^ (8 if dtype == "i4" else 0)).to(torch.uint8)
    return bits.view(torch.int8) if dtype == "i8" else from_codes(bits, dtype)


def multiplies(x: str, w: str, architecture: int) -> bool:
    """Whether a kernel multiplies inputs of codes `x` as they are; else they become numbers before the product."""
    least = {"f8e4m3": LEAST_FP8, "i8": LEAST_INT8}.get(x, 0)
    return w in WEIGHTS.get(x, ()) and architecture >= least


def group_of(dequantize: Equation) -> int:
    """Columns of a weight that share a scale, 0 where a whole row does."""
    block = dequantize.attr.get("block")
    return int(str(block[-1])) if isinstance(block, tuple) else 0


def product(p: Product, rows: int, architecture: int) -> Launch:
    """The kernel for at most `rows` rows on a GPU (90 is sm_90): grid (outs / `tile`, count / `rows`) of its constants.

    Where these have `splits` above 1, the grid has as many along its third axis, y is f32[splits, count, outs], and
    `joined` follows. Raises RefusedError where no kernel computes it.
    """
    _check(p, architecture)
    words = in_words(p.x, p.w, p.group)
    by_bits = p.w == "f8e4m3" and architecture < LEAST_FP8
    zero = [("zero", ("i8" if p.w == "i4" else "u8") if p.zero else "")] if words else []
    x_scale = [("x_scale", SCALES[p.x_scale_type] if p.x_scale else "")]
    added = [("bias", p.bias), ("residual", p.residual)]
    first = [("x", p.x), ("w", "u8" if words or by_bits else p.w), ("scale", SCALES[p.scale]), *zero]
    constants: dict[str, Any] = {"outs": p.outs, "ins": p.ins, "group": p.group}
    name = "words" if architecture == HOPPER and _suits_hopper(p, rows) else "widened"
    tiles, warps, stages = _words_tiles(p, rows) if name == "words" else _tiles(p, rows, architecture)
    tiles["once"] = rows <= tiles["rows"]
    # as many blocks on each multiprocessor: of launches that overlap a free one would get more (decision 53)
    blocks = -(-p.outs // tiles["tile"]) * tiles.get("splits", 1)
    resident = -(-blocks // BLOCKS) if tiles["once"] and architecture in LARGE else 0
    if words:
        constants |= {"kind": p.w, "span": SPAN, "stages": stages}
    if "splits" in tiles:
        split = tiles["splits"] > 1
        arguments = (*first, *([("bias", ""), ("residual", ""), ("y", "f32")] if split else [*added, ("y", p.out)]))
        source = "words_hopper.words" if name == "words" else "widened.widened"
        return Launch(name, source, (*arguments, ("count", "int")), constants | tiles, warps, stages, resident=resident)
    arguments = (*first, *x_scale, *added, ("y", p.out), ("count", "int"))
    constants |= {"x_kind": p.x_scale, "x_block": p.x_block}
    if words:
        share = min(SPAN, SPAN if p.group in (0, FINE) else p.group, p.x_block or SPAN)
        unit = 512.0 if p.w != "f4e2m1" and p.x != "i8" else 1.0
        constants |= {"share": share, "unit": unit}
        return Launch("packed", "packed.packed", arguments, constants | tiles, warps, stages, resident=resident)
    return Launch("dense", "dense.dense", arguments, constants | tiles, warps, stages, resident=resident)


def joined(p: Product, splits: int) -> Launch:
    """What adds the splits of a product, scales of whole rows, bias and residual."""
    arguments = (
        ("sums", "f32"), ("scale", "" if p.group else SCALES[p.scale]), ("bias", p.bias), ("residual", p.residual),
        ("y", p.out), ("count", "int"),
    )  # fmt: skip
    return Launch(
        "joined", "widened.joined", arguments, {"outs": p.outs, "splits": splits, "rows": 2, "tile": 512}, 4, 1
    )


def _check(p: Product, architecture: int) -> None:
    if p.w not in WEIGHTS.get(p.x, ()):
        raise RefusedError(f"a product of {p.x} and {p.w}")
    if not multiplies(p.x, p.w, architecture):
        raise RefusedError(f"a product of {p.x} on sm_{architecture}")
    fine = (p.w, p.scale, p.group) == ("f4e2m1", "f8e4m3", FINE)
    if p.scale not in SCALES or p.x_scale_type not in SCALES or "f8e4m3" in (p.x_scale_type, "" if fine else p.scale):
        raise RefusedError(f"scales of {p.scale or 'f32'} and {p.x_scale_type}")
    if p.zero and (p.w not in ("i4", "u4") or not p.scale):
        raise RefusedError(f"a zero of {p.w}")
    if (p.group and not p.scale) or (p.w in NIBBLES and not p.scale):
        raise RefusedError(f"{p.w} without a scale")
    if p.x_scale not in ("", "tensor") and p.x in ("f16", "bf16"):
        raise RefusedError(f"a scale of {p.x}")
    if (p.x_scale == "block") != bool(p.x_block):
        raise RefusedError(f"x_scale {p.x_scale!r} with blocks of {p.x_block}")
    for size in (p.group, p.x_block):
        least = FINE if fine else 32
        if size and (size < least or size != power(size) or p.ins % size):
            raise RefusedError(f"scales for {size} of {p.ins} columns: a power of two from 32 on has a kernel")


def _tiles(p: Product, rows: int, architecture: int) -> tuple[dict[str, Any], int, int]:
    """Sizes of tiles, warps, stages, from measurements on an H200 (decision 43) of some kinds and sizes."""
    if in_words(p.x, p.w, p.group):
        few = p.x == "i8" or rows == 1 or p.group == FINE or bool(p.x_scale)
        return _packed_tiles(p, rows) if few else _widened_tiles(p, rows, architecture)
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
        tile, stages = (16, 3) if p.outs > 8192 else (8, 4)
        return {"rows": 1, "tile": tile, "parts": 8, "chunk": 1, "band": 1}, 2, stages
    if rows <= 16 and p.outs > 8192:
        return {"rows": 16, "tile": 64, "parts": 1, "chunk": 2, "band": 1}, 2, 3
    if rows <= 16:
        return {"rows": 16, "tile": 32, "parts": 2, "chunk": 1, "band": 1}, 2, 4
    if rows <= 64:
        return {"rows": 64, "tile": 64, "parts": 1, "chunk": 1, "band": 1}, 4, 4
    return {"rows": 128, "tile": 128, "parts": 1, "chunk": 1, "band": 8}, 8, 3


def _suits_hopper(p: Product, rows: int) -> bool:
    """Whether compiler/kernels/words_hopper.py has it and is the faster: of what was measured (decision 67)."""
    paired = p.scale == p.x or (p.w == "f4e2m1" and (p.x, p.scale) == ("bf16", "f8e8m0"))
    whole = p.outs % 128 == 0 and p.ins % SPAN == 0
    few = 1 < rows <= 64 or (rows == 128 and _plain(p) and p.outs > 128 * BLOCKS)
    return few and p.w in NIBBLES and p.x in FLOATS and p.group >= 32 and not p.x_scale and paired and whole


def _plain(p: Product) -> bool:
    return p.x == "f16" and p.w != "f4e2m1" and not p.zero


def _words_tiles(p: Product, rows: int) -> tuple[dict[str, Any], int, int]:
    """Tiles and splits on sm_90; several blocks share a multiprocessor, and each split has four spans or more."""
    tile = 64 if rows <= 32 and _plain(p) else 128
    most, each = (4, 3) if tile == 64 else (8, 4 if rows <= 32 else 2)
    room = min(most, each * BLOCKS // -(-p.outs // tile), p.ins // SPAN // 4)
    tiles = {"rows": rows, "tile": tile, "band": 1, "splits": max(power(room + 1) // 2, 1)}
    return tiles, 4, 2 if rows == 128 else 4


def _widened_tiles(p: Product, rows: int, architecture: int) -> tuple[dict[str, Any], int, int]:
    """The tile and splits that take the least time where blocks run in waves, one to a multiprocessor."""
    spans = -(-p.ins // SPAN)
    if rows <= 32:  # several fit one, and wait for memory most of the time
        room = min(4, 3 * BLOCKS // -(-p.outs // 64), spans)
        return {"rows": rows, "tile": 64, "band": 1, "splits": max(power(room + 1) // 2, 1)}, 4, 4
    found = []
    for height, tile, warps, time in WIDENED:
        blocks = -(-p.outs // tile) * -(-rows // height)
        alone = tile == 64 and blocks <= 2 * BLOCKS  # two share a multiprocessor; one would leave much of it idle
        if (height == 64) != (rows == 64) or (height == 256 and architecture not in LARGE) or alone:
            continue
        for splits in (1, 2, 4, 8) if rows <= 512 else (1,):
            waves = -(-blocks * splits // BLOCKS) / splits
            # sums are written and read, for each tile in the time of three columns; and `joined` is launched
            joins = 3 * blocks * splits / p.ins + 0.05 if splits > 1 else 0
            if splits <= spans:
                found.append((time * (waves + joins), height, tile, splits, warps))
    _, height, tile, splits, warps = min(found)
    tiles = {"rows": height, "tile": tile, "band": 8 if rows > 64 else 1, "splits": splits}
    return tiles, warps, 4 if rows == 64 else 3
