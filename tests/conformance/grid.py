"""Keys and values whose codes are certain: no backend may round x / scale + zero to the other side of a tie."""

from __future__ import annotations

import torch


def on_grid(shape: tuple[int, ...], codes: str, generator: torch.Generator, exact: bool = False) -> torch.Tensor:
    """Numbers f32[*N,D] whose rows have scales that are powers of two, of size 1 to 4.

    u8: up to 0.4 of a step from a code, on it with `exact` (in 16 bits there is no place between); f8e4m3: on a code.
    """
    rows = shape[:-1]
    unit = torch.ldexp(torch.ones(*rows, 1), torch.randint(0, 2, (*rows, 1), generator=generator))
    ends = torch.argsort(torch.rand(shape, generator=generator), -1)[..., :2]
    if codes == "f8e4m3":
        bits = torch.randint(0, 127, shape, generator=generator).to(torch.uint8)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        x = bits.view(torch.float8_e4m3fn).float() * sign
        return x.scatter(-1, ends[..., :1], 448.0) * unit / 256
    x = torch.randint(0, 256, shape, generator=generator).float()
    if not exact:
        x = x + torch.rand(shape, generator=generator) * 0.8 - 0.4
    x = x.clamp(0, 255).scatter(-1, ends, torch.tensor([0.0, 255.0]).expand(*rows, 2))
    zero = torch.randint(100, 156, (*rows, 1), generator=generator)
    return (x - zero) * unit / 64
