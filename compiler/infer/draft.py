"""From what was recognised to the draft's text."""

from __future__ import annotations

import re
from typing import Any

from compiler.infer import Check
from compiler.infer.hints import Hints
from compiler.infer.keys import Keys
from compiler.infer.page import Page, number_text, yaml_text
from compiler.infer.position import Position, position_of
from compiler.infer.structure import Found
from specs.node import Options, marks_of
from specs.parts import Mlp
from specs.schema import SCHEMA_VERSION

_COMMENT = (
    "# Drafted by `specrt infer` from config.json and the tensors' names and shapes. Lines below CHECK are assumptions."
)


def write(found: Found, hints: Hints, config: dict[str, Any]) -> tuple[str, str, tuple[Check, ...]]:
    """The draft's name, text and checks."""
    model_type = str(config["model_type"])
    name = re.sub(r"\W", "_", model_type).lower()
    keys = Keys(config, hints)
    names = _sizes(found, keys)
    position = position_of(found, hints, keys)
    attention = Page()
    _attention(attention, found, hints, keys, position)
    parts = _parts(found, hints, keys, position)
    placement = _placement(found, hints, keys)
    page = Page()
    page.put(_COMMENT)
    page.put(f"schema: {SCHEMA_VERSION}")
    page.put(f"name: {name if name[:1].isalpha() else 'model_' + name}")
    page.put(f"match: {{model_type: {yaml_text(model_type)}}}")
    page.put("source: {paper: unknown, code: unknown}", "source", ["fill in where the facts come from"])
    page.put("config:")
    for ours, (expr, checks) in {**names, **keys.names}.items():
        page.put(f"  {ours + ':':<13} {expr}", f"config.{ours}", checks)
    _require(page, keys)
    _ignore(page, found)
    page.put("parts:")
    for part, (fields, checks) in parts.items():
        if part == "attn":
            page.include(attention)
        else:
            page.put(f"  {part + ':':<7} {{{fields}}}", part, checks)
    _graph(page, found, hints, *placement)
    _checkpoint(page, found, hints)
    return name, page.text, tuple(Check(*check) for check in page.checks)


Entries = dict[str, tuple[str, list[str]]]


def _sizes(found: Found, keys: Keys) -> Entries:
    """The `config` lines of what shapes tell."""
    fallbacks = {"d_head": "d_model // heads", "kv_heads": "heads", "d_ffn": "4 * d_model"}
    known: dict[str, int] = {}
    entries: Entries = {}
    for name in ("d_model", "layers", "heads", "kv_heads", "d_head", "d_ffn", "vocab"):
        known[name] = found.sizes[name]
        entries[name] = keys.size(name, known, fallbacks.get(name))
    context = keys.first("context")
    if context:
        entries["context"] = (context, [])
    return entries


def _parts(found: Found, hints: Hints, keys: Keys, position: Position) -> Entries:
    roles = found.roles
    parts: Entries = {"embed": ("kind: embedding, rows: vocab", [])}
    if "positions" in roles:
        parts["pos"] = (f"kind: embedding, {position.table}", position.checks)
    if "types" in roles:
        rows = (roles["types"].weight or (0,))[0]
        expr, checks = keys.size("types", {"types": rows}, None)
        keys.fixed("types_rows", expr, *checks)
        parts["types"] = ("kind: embedding, rows: types_rows", [])
    norms = [role for role in ("norm_e", "norm_1", "norm_2", "norm_3", "norm_4", "norm_f") if role in roles]
    written = {role: _norm(found, hints, keys, role, first=role == norms[0]) for role in norms}
    parts |= {role: entry for role, entry in written.items() if role in ("norm_e", "norm_1")}
    parts["attn"] = ("", [])
    parts |= {role: entry for role, entry in written.items() if role in ("norm_2", "norm_3", "norm_4")}
    parts["mlp"] = _mlp(found, hints, keys)
    parts |= {role: entry for role, entry in written.items() if role == "norm_f"}
    head = _head(found, keys)
    return parts if head is None else {**parts, "head": head}


def _norm(found: Found, hints: Hints, keys: Keys, role: str, *, first: bool) -> tuple[str, list[str]]:
    module = found.roles[role]
    checks: list[str] = []
    key = keys.first("eps")
    if key is None:
        keys.fixed("eps", number_text(1e-5), "config.json names no epsilon of the norms; 1e-5 is only common")
    else:
        keys.fixed("eps", key)
    if module.bias is not None:
        return "kind: layer_norm, eps: eps, bias: true", checks
    layer = key in hints.layer_eps_keys
    if first and key not in hints.rms_eps_keys:
        checks.append("norms without a bias: `rms_norm`, or `layer_norm` (which also subtracts the mean)")
    if first:
        checks.append("the gain: the stored weight, or with `gain: one_plus` 1 + the stored weight")
    return f"kind: {'layer' if layer else 'rms'}_norm, eps: eps", checks


def _attention(page: Page, found: Found, hints: Hints, keys: Keys, position: Position) -> None:
    """The attention part, a field a line, because most of what can't be known is here."""
    roles = found.roles
    page.put("  attn:")
    page.put("    kind: attention")
    names = [str(name) for name in keys.config.get("architectures") or ()]
    causal = any(word in name for name in names for word in hints.causal_words)
    mask = "causal" if causal or "types" not in roles else "full"
    unsaid = "nothing says whether a token sees only those before it (`causal`) or all (`full`)"
    page.put(f"    mask: {mask}", "attn.mask", [] if causal else [unsaid])
    window = next((key for key in hints.window if keys.config.get(key)), None)
    if window is not None and not any(keys.config.get(key) is False for key in hints.window_switches):
        keys.fixed("window", f"{keys.read(window)} | none")
        page.put("    window: window", "attn.window", ["whether the window holds in every layer"])
    group = [roles[role] for role in ("attn.qkv", "attn.q", "attn.k", "attn.v") if role in roles]
    qkv, out = all(module.bias is not None for module in group), roles["attn.o"].bias is not None
    if qkv or out:
        page.put(f"    bias: {{qkv: {yaml_text(qkv)}, out: {yaml_text(out)}}}")
    if "attn.q_norm" in roles:
        page.put("    qk_norm: {eps: eps}", "attn.qk_norm", ["that it is an RMS norm of each head before the rotation"])
    scale = "the scale is d_head ** -0.5 and nothing caps the scores: a draft never reads another from config.json"
    page.put(
        f"    position: {{{position.fields}}}", "attn.position", [*([] if position.table else position.checks), scale]
    )


def _mlp(found: Found, hints: Hints, keys: Keys) -> tuple[str, list[str]]:
    gated = "mlp.gate" in found.roles or found.fused_gate
    key = next((key for key in hints.act_keys if isinstance(keys.config.get(key), str)), None)
    options = next(mark for mark in marks_of(Mlp.model_fields["act"]) if isinstance(mark, Options))
    checks = []
    if key is not None and keys.config[key] in {*options.values, *options.spellings}:
        keys.fixed("activation", keys.read(key))
        act = "activation"
    else:
        act = "silu" if gated else "gelu"
        said = (
            "names no activation" if key is None else f"has `{key}: {keys.config[key]}`, which no activation is called"
        )
        checks.append(f"activation `{act}`: config.json {said}")
    members = [found.roles[role] for role in ("mlp.gate", "mlp.up", "mlp.down") if role in found.roles]
    bias = ", bias: true" if all(module.bias is not None for module in members) else ""
    return f"kind: {'gated_mlp' if gated else 'mlp'}, act: {act}{bias}", checks


def _head(found: Found, keys: Keys) -> tuple[str, list[str]] | None:
    head, key = found.roles.get("head"), keys.first("tied")
    if head is None and key is not None and keys.config[key] is False:
        return None
    fields, checks = "kind: linear, out: vocab", []
    if head is not None and head.bias is not None:
        fields += ", bias: true"
    if key is not None and (head is None or keys.config[key]):
        keys.fixed("tied", f"{key} | true" if head is None else key)
        fields += ", tied: {to: embed, when: tied}"
    elif key is not None:
        keys.fixed("tied", key)
        fields += ", tied: {to: embed, when: tied}"
    elif head is None:
        fields += ", tied: {to: embed, when: true}"
        checks.append("no tensor looks like an output matrix, so it is taken to be the embedding's")
    return fields, checks


def _require(page: Page, keys: Keys) -> None:
    unread = keys.unread()
    if keys.require or unread:
        page.put("require:")
    for key, value in keys.require.items():
        page.put(f"  {yaml_text(key)}: {yaml_text(value)}")
    text = "the draft uses none of these and takes no other values: read what matters in `config`, `ignore` the rest"
    for index, (key, value) in enumerate(unread.items()):
        wanted = yaml_text([value] if isinstance(value, list) else value)
        page.put(f"  {yaml_text(key)}: {wanted}", f"require ({', '.join(unread)})", [text] if index == 0 else [])


def _ignore(page: Page, found: Found) -> None:
    if not found.buffers and not found.unknown:
        return
    page.put("ignore:")
    page.put("  tensors:")
    for name in sorted(set(found.buffers)):
        page.put(f"    - {json_name(name)}")
    text = "these were not recognised, so the draft leaves them out; most likely the model uses them"
    for index, name in enumerate(found.unknown):
        page.put(f"    - {json_name(name)}", "ignore.tensors", [text] if index == 0 else [])


def json_name(name: str) -> str:
    """A tensor's name in quotes, because of its braces."""
    return f'"{name}"' if "{" in name else name


def _placement(found: Found, hints: Hints, keys: Keys) -> tuple[str, list[str]]:
    """Where the norms of a layer stand, and what is not certain of it."""
    placement, checks = found.placement, [found.guesses["norm_1"]] if "norm_1" in found.guesses else []
    flag = next((key for key in hints.parallel_keys if keys.config.get(key) is True), None)
    if flag is not None:
        keys.require[keys.read(flag)] = True
        return {"pre": "parallel_2"}.get(placement, placement), checks
    if placement == "none":
        return placement, [*checks, "no norm in the layers was recognised"]
    where = "the wiring of a layer: where its norms stand, and attention and MLP in turn or side by side"
    return placement, [*checks, where]


def _graph(page: Page, found: Found, hints: Hints, placement: str, unsure: list[str]) -> None:
    roles = found.roles
    page.put("graph:")
    start = "embed(tokens)"
    if "positions" in roles:
        start += " + pos(positions)"
    if "types" in roles:
        start += " + types(token_types)"
    checks = ["whether what enters the layers is multiplied by a number, say sqrt(d_model)"]
    page.put(f"  - x = {f'norm_e({start})' if 'norm_e' in roles else start}", "graph", checks)
    page.put("  - repeat layers:")
    for index, line in enumerate(hints.wirings[placement]):
        page.put(f"      - {line}", "graph", unsure if index == 0 else ())
    last = "norm_f(x)" if "norm_f" in roles else "x"
    has_head = any(line.startswith("  head:") for line in page.lines)
    page.put(f"  - logits = head({last})" if has_head else f"  - last_hidden_state = {last}")


def _checkpoint(page: Page, found: Found, hints: Hints) -> None:
    page.put("checkpoint:")
    for role, module in found.roles.items():
        name, layout, checks = {"positions": "pos"}.get(role, role), None, []
        if role == "attn.qkv":
            layout = next((text for word, text in hints.fused_qkv.items() if module.name.endswith(word)), hints.blocks)
            if found.sizes["kv_heads"] > 1:
                others = {hints.blocks, *hints.fused_qkv.values(), "heads [q, k, v] d_head"} - {layout}
                checks.append(
                    "the order of the fused rows; others are " + ", ".join(f"`{one}`" for one in sorted(others))
                )
        if role == "mlp.up" and found.fused_gate:
            name, layout = "mlp.gate_up", "[gate, up] d_ffn"
            checks.append("which half of the fused rows is the gate (`[gate, up] d_ffn` or `[up, gate] d_ffn`)")
        if "transposed" in found.guesses and role == "attn.o":
            checks.append(found.guesses["transposed"])
        if role in found.transposed or layout:
            fields = [f"from: {json_name(module.name)}"]
            fields += [f'layout: "{layout}"'] if layout else []
            fields += ["transpose: true"] if role in found.transposed else []
            text = "{" + ", ".join(fields) + "}"
        else:
            text = module.name
        page.put(f"  {name + ':':<12} {text}", f"checkpoint.{name}", checks)
