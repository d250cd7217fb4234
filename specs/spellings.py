"""Other spellings of tensor names: `spellings:` of a spec, applied before anything looks at a checkpoint's tensors.

.gamma: .weight                   a name's end
wrapper.: ""                      a name's beginning
.dense_h_to_4h.: .up.             anywhere between dots
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from specs.checkpoint import Checkpoint, TensorInfo
from specs.errors import SpecRTError, Where
from specs.schema import Spec


def respelled(spec: Spec, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors named as the spec spells them; raises CKPT-018 where two become one."""
    if not spec.spellings:
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    for stored, info in checkpoint.tensors.items():
        name = respell(stored, spec.spellings)
        if name in tensors:
            raise SpecRTError(
                "CKPT-018",
                f"`{tensors[name].stored}` and `{stored}` are both `{name}`",
                where=Where(str(checkpoint.dir)),
                notes=(f"by the spellings at {spec.key_where('spellings')}",),
            )
        tensors[name] = replace(info, name=name, stored=stored)
    return replace(checkpoint, tensors=tensors)


def respell(name: str, spellings: Mapping[str, str]) -> str:
    """A name with each spelling replaced, in the order in which they stand."""
    for theirs, ours in spellings.items():
        if theirs.startswith(".") and theirs.endswith("."):
            name = name.replace(theirs, ours)
        elif theirs.startswith("."):
            name = name[: -len(theirs)] + ours if name.endswith(theirs) else name
        elif name.startswith(theirs):
            name = ours + name[len(theirs) :]
    return name
