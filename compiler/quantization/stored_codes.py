"""Low-bit weights that a checkpoint holds, taken over as they are: which linears and how from headers alone, then their
codes and scales, of which nothing is rounded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.ir.formats import RANGE
from compiler.passes.quantization_plan import Linear, Storage
from compiler.quantization.weights import Weights, by_part
from specs.errors import SpecRTError, Where
from specs.precision import stored_recipe
from specs.unpack import Codes, Form, codes_of, form_of
from specs.weight_source import WeightSource, mxfp4_codes, stored_tensor, take

if TYPE_CHECKING:
    import torch

    from specs.checkpoint import Checkpoint

PARTS = ("codes", "scale", "zero", "outer", "order")


@dataclass(frozen=True)
class Stored:
    """A checkpoint's low-bit weights by name: how each is stored, or why it is not kept; `sources` of all weights."""

    linears: Mapping[str, Linear | str]
    sources: Mapping[str, WeightSource]
    where: Where

    def types(self) -> list[str]:
        """The types of codes, the most frequent first."""
        counted = Counter(linear.storage.type for linear in self.linears.values() if isinstance(linear, Linear))
        return [name for name, _ in counted.most_common()]


def stored_in(sources: Mapping[str, WeightSource], checkpoint: Checkpoint) -> Stored:
    """The low-bit weights of a checkpoint, from its headers."""
    where = checkpoint.config_where
    found: dict[str, Linear | str] = {}
    for name, source in sources.items():
        storage = storage_in(source)
        if isinstance(storage, Storage):
            found[name] = Linear(name, storage, stored_recipe(storage.type, where))
        elif storage is not None:
            found[name] = storage
    return Stored(found, sources, where)


def storage_in(source: WeightSource) -> Storage | str | None:
    """How a source's own codes are stored, why they can't be kept, or None where it has none."""
    infos = source.stack or (source.tensor,)
    forms = {None if info.packed is None else form_of(info.packed) for info in infos}
    if source.scales is not None:
        forms = {Form("f4e2m1", "f8e8m0", source.scales.shape, (1, 32))}
    form = next(iter(forms))
    if form is None and len(forms) == 1:
        return None
    if len(forms) > 1:
        return "its parts are stored unlike each other"
    if not isinstance(form, Form):
        return form
    if form.permuted and source.stack:
        return "each of its matrices has an order of inputs of its own"
    *lead, rows, _ = source.shape
    block, (count, groups) = form.block, form.scale_shape[-2:]
    if _tall(form) and not source.select.whole:  # a piece of squares: one scale for each row
        block, count = (1, form.block[1]), rows
    elif count != 1 and not _tall(form):
        count = rows
    return Storage(
        form.type, source.shape, form.scale, (*lead, count, groups), block, form.zero, form.outer, form.permuted
    )


def _tall(form: Form) -> bool:
    return bool(form.block) and form.block[0] > 1


def stored_codes(base: Weights, linears: Mapping[str, Linear], sources: Mapping[str, WeightSource]) -> Weights:
    """Weights by the names of a quantized graph; raises SpecRTError CKPT-032, CKPT-033 for codes that do not fit."""
    return by_part(base, linears, PARTS, lambda owner: parts_of(sources[owner], linears[owner].storage))


def parts_of(source: WeightSource, storage: Storage) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight by the suffix that `quantize` names them with."""
    import torch

    if source.scales is not None:
        codes, scale = mxfp4_codes(stored_tensor(source.tensor), stored_tensor(source.scales))
        return {
            "codes": take(codes, source.select, storage.shape),
            "scale": take(scale, source.select, storage.scale_shape),
        }
    each = [_piece(info, source, storage) for info in source.stack or (source.tensor,)]
    if not source.stack:
        return each[0]
    outer = {"outer": each[0]["outer"]} if storage.outer else {}
    if any(not torch.equal(parts["outer"], outer["outer"]) for parts in each if outer):
        raise _unfit(source, "its matrices have scales of their own for the whole matrix")
    return {part: torch.stack([parts[part] for parts in each]) for part in each[0] if part != "outer"} | outer


def _piece(info: object, source: WeightSource, storage: Storage) -> dict[str, torch.Tensor]:
    """What is stored of one matrix: the rows that the source takes, columns in the order of their groups."""
    from specs.checkpoint import TensorInfo

    assert isinstance(info, TensorInfo)
    assert info.packed is not None
    form = form_of(info.packed)
    assert isinstance(form, Form)
    found = codes_of(info.packed, stored_tensor)
    rows, width = storage.shape[-2:]
    codes, order = found.codes, _order(found, source, storage)
    if order is not None:
        codes = codes[:, order]
    parts = {"codes": take(codes, source.select, (rows, width))}
    for name, tensor in (("scale", found.scale), ("zero", found.zero)):
        if tensor is not None:
            parts[name] = _rows(tensor, form, source, storage, len(found.codes))
    if found.zero is not None:
        parts["zero"] = _zero(parts["zero"], source, storage)
    if found.outer is not None:
        parts["outer"] = found.outer
    if storage.permuted:
        import torch

        parts["order"] = (torch.arange(width) if order is None else order).to(torch.int32)
    return parts


def _rows(tensor: torch.Tensor, form: Form, source: WeightSource, storage: Storage, rows: int) -> torch.Tensor:
    """A scale or zero of the rows that are taken."""
    if len(tensor) == 1 or (_tall(form) and source.select.whole):
        return tensor.contiguous()
    if _tall(form):
        tensor = tensor.repeat_interleave(form.block[0], 0)[:rows]
    return take(tensor, source.select, storage.scale_shape[-2:])


def _order(found: Codes, source: WeightSource, storage: Storage) -> torch.Tensor | None:
    """Where the inputs lie in the order of their groups."""
    import torch

    if found.groups is None:
        return None
    if not storage.permuted:
        raise _unfit(source, "inputs are in groups by an order of their own (`g_idx`), which config.json does not tell")
    order = torch.argsort(found.groups, stable=True)
    size = storage.block[1] if storage.block else len(order)
    if bool((found.groups[order] != torch.arange(len(order)) // size).any()):
        raise _unfit(source, f"its groups of inputs (`g_idx`) are not of {size} each")
    return order


def _zero(zero: torch.Tensor, source: WeightSource, storage: Storage) -> torch.Tensor:
    import torch

    low, high = RANGE[storage.type]
    if zero.dtype is torch.int16 and (int(zero.min()) < low or int(zero.max()) > high):
        raise _unfit(source, f"a zero point is outside of {storage.type}: {int(zero.min())} to {int(zero.max())}")
    return zero.to(torch.uint8 if storage.type == "u4" else torch.int8)


def _unfit(source: WeightSource, problem: str) -> SpecRTError:
    return SpecRTError(
        "CKPT-033", f"the codes of `{source.tensor.name}` can't be kept: {problem}",
        where=Where(str(Path(source.tensor.file))), hint="with `--precision fp32` they are read as numbers",
    )  # fmt: skip
