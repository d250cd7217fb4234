"""Tensor types: an element type and a shape whose dims are integers or names of symbolic dims."""

from __future__ import annotations

from dataclasses import dataclass

# Element types by the name that the text IR prints, with their size in bits.
DTYPES: dict[str, int] = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "f8e4m3": 8,
    "i64": 64,
    "i32": 32,
    "i8": 8,
    "u8": 8,
    "i4": 4,
    "u4": 4,
    "f4e2m1": 4,
    "f8e8m0": 8,
    "bool": 1,
}
FLOATS = frozenset({"f32", "f16", "bf16", "f8e4m3"})
INTEGERS = frozenset({"i64", "i32", "i8", "u8", "i4", "u4"})
# Stored, moved and dequantized; no arithmetic takes them.
STORED = frozenset({"i4", "u4", "f4e2m1", "f8e8m0"})

# A dim is a number, or the name of a `Sym` that the graph declares.
Dim = int | str
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Sym:
    """A symbolic dim and its range; `lo`, `opt` and `hi` become one axis of an optimization profile."""

    name: str
    lo: int
    opt: int
    hi: int

    def __str__(self) -> str:
        return f"{self.name} in {self.lo}..{self.opt}..{self.hi}"


@dataclass(frozen=True)
class TensorType:
    """An element type with a shape, printed `f32[B,S,4096]`."""

    dtype: str
    shape: Shape = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(str(dim) for dim in self.shape)}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def static_shape(self) -> tuple[int, ...]:
        """The shape as integers; raises TypeError where a dim is symbolic (weights and constants never are)."""
        dims: list[int] = []
        for dim in self.shape:
            if not isinstance(dim, int):
                raise TypeError(f"{self} has the symbolic dim `{dim}`")
            dims.append(dim)
        return tuple(dims)

    def with_dtype(self, dtype: str) -> TensorType:
        return TensorType(dtype, self.shape)
