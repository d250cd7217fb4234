"""Weights as TensorRT-LLM puts them in order for its mixed products: its documented steps on each number in turn.

From the comments and loops of cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp: rows are permuted in
groups of 16 or 32, the matrix is transposed, tiles of 64 rows of 2 or 4 columns are put side by side, then numbers are
moved up by half the range and shuffled in each 32-bit word. For SM70 only the last.
"""

from __future__ import annotations

import numpy as np
import torch

BYTES = "0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15"
HALVES = "0 1 8 9 16 17 24 25 2 3 10 11 18 19 26 27 4 5 12 13 20 21 28 29 6 7 14 15 22 23 30 31"


def preprocessed(codes: torch.Tensor, bits: int, sm: int) -> np.ndarray:
    """Signed codes [in, out] as the bytes that are stored, one after the other."""
    rows, columns = codes.shape
    numbers = codes.tolist()
    flat = [number for row in numbers for number in row]
    if sm >= 75:
        order = [int(row) for row in (BYTES if bits == 8 else HALVES).split()]
        permuted = [numbers[row // len(order) * len(order) + order[row % len(order)]] for row in range(rows)]
        interleave = 2 if bits == 8 else 4
        flat = [0] * (rows * columns)
        for column in range(columns):
            for row in range(rows):
                tile, inside = divmod(row, 64)
                line = column // interleave * rows * interleave
                flat[line + (tile * interleave + column % interleave) * 64 + inside] = permuted[row][column]
    words = []
    for start in range(0, len(flat), 32 // bits):
        word = [number + 2 ** (bits - 1) for number in flat[start : start + 32 // bits]]
        words += [word[0], word[2], word[1], word[3]] if bits == 8 else word[0::2] + word[1::2]
    if bits == 8:
        return np.array(words, np.uint8)
    return np.array([low | high << 4 for low, high in zip(words[0::2], words[1::2], strict=True)], np.uint8)
