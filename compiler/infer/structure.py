"""What a checkpoint's modules are, told from their names (specs/infer_hints.yaml) and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compiler.infer.hints import Hints, matches
from compiler.infer.modules import Module, Modules, modules_of
from specs.checkpoint import Checkpoint
from specs.errors import SpecRTError, Where

PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
ORDER = (
    "embed", "positions", "types", "norm_e", "norm_1", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_norm",
    "attn.k_norm", "attn.o", "norm_2", "norm_3", "mlp.gate", "mlp.up", "mlp.down", "norm_4", "norm_f", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The modules by role (`attn.q`, `norm_1`, `embed`), the sizes that follow from shapes, and what is left over."""

    roles: dict[str, Module]
    placement: str  # of the norms: a key of `wirings`
    sizes: dict[str, int]
    layers: int
    fused_gate: bool
    transposed: frozenset[str]  # roles stored [in, out]
    buffers: tuple[str, ...]
    unknown: tuple[str, ...]
    guesses: dict[str, str] = field(default_factory=dict)  # role: why it was not certain


def refuse(where: Where, message: str, notes: list[str] | None = None, hint: str | None = None) -> SpecRTError:
    """No draft can be made."""
    hint = hint or "write the spec by hand (specs/REFERENCE.md), starting from the nearest of specs/models"
    return SpecRTError("SPEC-080", f"cannot draft a spec: {message}", where=where, notes=notes or (), hint=hint)


def recognise(checkpoint: Checkpoint, hints: Hints) -> Found:
    """Give every module its role; raises SPEC-080 where attention, feed-forward, embedding or heads are not found."""
    where = checkpoint.config_where
    modules = modules_of(checkpoint)
    experts = next((name for name in checkpoint.tensors if set(name.split(".")) & set(hints.experts)), None)
    if experts is not None:
        raise refuse(where, "it has experts, which are not drafted", [f"`{experts}`"])
    guesses: dict[str, str] = {}
    roles = _layer_roles(modules, hints, where)
    roles |= _outside_roles(modules, hints, where)
    placement, norms = _norms(modules, hints, roles, guesses)
    roles |= norms
    _need(roles, modules, where)
    transposed = _transposed(roles, guesses)
    sizes = _sizes(roles, transposed, checkpoint.config, hints, where)
    sizes["layers"] = modules.layers
    up, gated = sizes.pop("up"), "mlp.gate" in roles
    fused = not gated and up == 2 * sizes["d_ffn"]
    if up != sizes["d_ffn"] and not fused:
        raise refuse(where, f"the feed-forward widens to {up} and narrows from {sizes['d_ffn']}")
    for role in [role for role in ("attn.q_norm", "attn.k_norm") if role in roles]:
        if roles[role].weight != (sizes["d_head"],) or roles[role].bias is not None:
            del roles["attn.q_norm"], roles["attn.k_norm"]
            break
    roles = {role: roles[role] for role in ORDER if role in roles}
    used = {module.name for module in roles.values()}
    left = [
        f"{name}.{suffix}"
        for name, module in modules.modules.items()
        if name not in used
        for suffix in ("weight", "bias")
        if getattr(module, suffix) is not None
    ]
    left += [*modules.loose, *_stray_biases(roles)]
    buffers = tuple(name for name in left if matches(name, hints.buffers))
    unknown = tuple(sorted(set(left) - set(buffers)))
    return Found(roles, placement, sizes, modules.layers, fused, transposed, buffers, unknown, guesses)


def _layer_roles(modules: Modules, hints: Hints, where: Where) -> dict[str, Module]:
    """The projections, by name alone, each at most once."""
    found: dict[str, Module] = {}
    for module in modules.modules.values():
        if not module.layered:
            continue
        rank = 2 if module.rank == 2 else 1
        for role, patterns in hints.layer.items():
            if (role in PROJECTIONS) == (rank == 2) and matches(module.inner, patterns):
                if role in found:
                    notes = [f"`{found[role].name}` and `{module.name}`"]
                    raise refuse(where, f"two modules of a layer could be `{role}`", notes)
                found[role] = module
                break
    if "mlp.up" not in found and "mlp.gate" in found:  # w1 and w2 without a third: no gate
        found["mlp.up"] = found.pop("mlp.gate")
    return found


def _outside_roles(modules: Modules, hints: Hints, where: Where) -> dict[str, Module]:
    found: dict[str, Module] = {}
    ranks = {"norm_e": 1, "norm_f": 1}
    for module in modules.modules.values():
        if module.layered:
            continue
        for role, patterns in hints.outside.items():
            if module.rank == ranks.get(role, 2) and matches(module.name, patterns):
                if role in found:
                    notes = [f"`{found[role].name}` and `{module.name}`"]
                    raise refuse(where, f"two modules could be `{role}`", notes)
                found[role] = module
                break
    return found


def _norms(
    modules: Modules, hints: Hints, roles: dict[str, Module], guesses: dict[str, str]
) -> tuple[str, dict[str, Module]]:
    """How the norms of a layer stand, and which is which."""
    width = roles["embed"].weight[-1] if "embed" in roles and roles["embed"].weight else 0
    taken = {module.name for module in roles.values()}
    norms = [m for m in modules.modules.values() if m.layered and m.weight == (width,) and m.name not in taken]
    for entry in hints.norms:
        words: dict[str, list[str]] = entry["words"]
        found: dict[str, Module] = {}
        for norm in norms:
            role = next((role for role, patterns in words.items() if matches(norm.inner, patterns)), None)
            if role is not None and role not in found:
                found[role] = norm
        if len(found) == len(words) == len(norms):
            return entry["placement"], found
    if len(norms) == 2:
        guesses["norm_1"] = "their names don't tell which of the two norms comes first"
        return "pre", {"norm_1": norms[0], "norm_2": norms[1]}
    if norms:
        guesses["norm_1"] = f"{len(norms)} norms in a layer that no known arrangement has; they are ignored below"
    return "none", {}


def _need(roles: dict[str, Module], modules: Modules, where: Where) -> None:
    missing = [role for role in ("embed", "attn.o", "mlp.up", "mlp.down") if role not in roles]
    if "attn.qkv" not in roles:
        missing += [role for role in ("attn.q", "attn.k", "attn.v") if role not in roles]
    if missing or not modules.layers:
        taken = {module.name for module in roles.values()}
        free = [f"`{m.name}` {list(m.weight or ())}" for m in modules.modules.values() if m.name not in taken]
        hint = "if one of them is it, add its name to specs/infer_hints.yaml; else write the spec by hand"
        what = ", ".join(f"`{role}`" for role in missing) or "layers"
        notes = ["not recognised:", *[f"  {line}" for line in free[:12]]] if free else []
        raise refuse(where, f"nothing in it looks like {what}", notes, hint)


def _transposed(roles: dict[str, Module], guesses: dict[str, str]) -> frozenset[str]:
    """Which projections are stored [in, out]. Square ones go with the rest."""
    width = (roles["embed"].weight or (0, 0))[-1]
    verdicts: dict[str, bool] = {}
    for role in PROJECTIONS:
        if role in roles and roles[role].weight is not None:
            rows, columns = roles[role].weight or (0, 0)
            inward = role in ("attn.o", "mlp.down")
            fits, turned = (rows, columns) if inward else (columns, rows), width
            if (fits[0] == turned) != (fits[1] == turned):
                verdicts[role] = fits[1] == turned
    if not verdicts:
        guesses["transposed"] = (
            "every matrix is square, so nothing tells whether they are stored [out, in] or [in, out]"
        )
    most = sum(verdicts.values()) * 2 > len(verdicts)
    return frozenset(role for role in PROJECTIONS if role in roles and verdicts.get(role, most))


def _sizes(
    roles: dict[str, Module], transposed: frozenset[str], config: dict[str, Any], hints: Hints, where: Where
) -> dict[str, int]:
    def shape(role: str) -> tuple[int, int]:
        rows, columns = roles[role].weight or (0, 0)
        return (columns, rows) if role in transposed else (rows, columns)

    heads = next((config[key] for key in hints.config["heads"] if isinstance(config.get(key), int)), None)
    if not heads:
        keys = ", ".join(f"`{key}`" for key in hints.config["heads"])
        raise refuse(where, "config.json does not say how many heads there are", [f"looked for {keys}"])
    vocab, width = roles["embed"].weight or (0, 0)
    inner = shape("attn.o")[1]
    d_head = inner // heads
    if "attn.qkv" in roles:
        kv_rows = shape("attn.qkv")[0] - inner
        kv_heads = kv_rows // (2 * d_head) if d_head else 0
        fits = kv_rows == 2 * kv_heads * d_head and shape("attn.qkv")[1] == width
    else:
        kv_heads = shape("attn.k")[0] // d_head if d_head else 0
        fits = shape("attn.k") == shape("attn.v") == (kv_heads * d_head, width) and shape("attn.q") == (inner, width)
    if not fits or kv_heads < 1 or heads % kv_heads or inner != heads * d_head:
        shapes = [f"`{roles[r].name}` {list(roles[r].weight or ())}" for r in PROJECTIONS[:5] if r in roles]
        raise refuse(where, f"the shapes of the attention do not fit {heads} heads and a width of {width}", shapes)
    return {
        "d_model": width, "heads": heads, "kv_heads": kv_heads, "d_head": d_head, "vocab": vocab,
        "d_ffn": shape("mlp.down")[1], "up": shape("mlp.up")[0],
    }  # fmt: skip


def _stray_biases(roles: dict[str, Module]) -> list[str]:
    """Biases that only some projections of a group have; the parts have them on all or on none."""
    stray = []
    for group in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up", "mlp.down")):
        members = [roles[role] for role in group if role in roles]
        if any(m.bias is None for m in members):
            stray += [f"{m.name}.bias" for m in members if m.bias is not None]
    return stray
