"""What there is to say of an architecture, part by part, in the same words for every spec (`specrt diff`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from specs.equations import Call, Name, equations, walk
from specs.expressions import Expr
from specs.layouts import parse_layout
from specs.node import Node, Options, marks_of
from specs.parts import Embedding, Linear, PartBase
from specs.schema import Spec
from specs.wiring import form, symbol, used_parts
from specs.wording import Words

KINDS = {
    "rms_norm": "RMS norm",
    "layer_norm": "layer norm",
    "mlp": "two matrices: down(act(up(x)))",
    "gated_mlp": "gated: down(act(gate(x)) * up(x))",
    "rope": "rotary",
    "alibi": "ALiBi",
    "none": "none",
}
LABELS = {
    "act": "activation", "d_ffn": "width", "eps": "epsilon",
    "bias.qkv": "bias on q, k, v", "bias.out": "bias on the output", "qk_norm": "norm of queries and keys",
    "position": "positions", "position.style": "rotary pairs", "position.dims": "rotated dims",
    "position.theta": "rotary base", "position.scaling": "rotary scaling", "position.original": "unscaled context",
    "unit_rows": "rows of length 1", "softcap": "cap of the scores",
    "scale": "factor on q k^T", "sinks": "sink logits", "tied.when": "tied to embedding",
}  # fmt: skip
ABSENT = {
    "scale": "1 / sqrt(head width)", "gain": "the weight", "window": "none", "softcap": "none",
    "position.scaling": "none", "position.original": "none", "width": "d_model", "offset": "0",
}  # fmt: skip
GAINS = {"weight": "the weight", "one_plus": "1 + the weight"}
SIZES = {
    "d_model": "width", "layers": "layers", "heads": "heads", "kv_heads": "key and value heads", "d_head": "head width",
    "d_ffn": "MLP width", "vocab": "vocabulary", "context": "trained context",
}  # fmt: skip
_UNSAID = {"position.context", "rows", "out"}  # they follow from other facts


@dataclass(frozen=True)
class Fact:
    """One line: group (`attention`), what (`rotary base`), and the text that is compared; `of` is the fact whose detail
    it is (`positions`).
    """

    group: str
    what: str
    text: str
    of: str | None = None


def facts(spec: Spec, env: Mapping[str, Any] | None, parameters: int | None = None) -> list[Fact]:
    """Every fact of a spec; with `env`, the values of its names, also its sizes, and values instead of their source."""
    words = Words(spec, env)
    wiring = form(spec, words)
    found = [
        Fact("wiring", "into the layers", wiring.enter),
        Fact("wiring", "a layer", wiring.layer),
        Fact("wiring", "out of the layers", wiring.leave),
    ]
    names = _groups(spec, used_parts(spec, words))
    for part, group in names.items():
        found += _part(words, spec.parts[part], group)
    found += _one_group_of_norms([fact for fact in found if fact.group.startswith("norm")])
    found = [fact for fact in found if not fact.group.startswith("norm ")]
    found += _weights(spec, names)
    found += [Fact("sizes", label, words.size(name)) for name, label in SIZES.items() if name in spec.config]
    if env is not None and parameters is not None:
        found.append(Fact("sizes", "parameters", f"{parameters:,}"))
    return found


def _groups(spec: Spec, used: list[str]) -> dict[str, str]:
    """What each part is called: by what it is, not by its name; numbered where a spec has several."""
    titles = {"attn": "attention", "mlp": "MLP", "embedding": "embedding", "norm": "norm", "linear": "head"}
    symbols = {name: symbol(spec.parts[name]) for name in used}
    groups = {name: titles.get(word, word.replace("_", " ")) for name, word in symbols.items()}
    fed = {
        node.func: arg.id
        for step in equations(spec.graph) for node in walk(step.value) if isinstance(node, Call)
        for arg in node.args if isinstance(arg, Name)
    }  # fmt: skip
    groups |= {n: f"embedding of {fed[n]}" for n, group in groups.items() if group == "embedding" and n in fed}
    groups |= {name: "experts" for name in used if spec.parts[name].kind_name() == "moe"}
    many = {group for group in groups.values() if list(groups.values()).count(group) > 1}
    counts = dict.fromkeys(many, 0)
    for name, group in groups.items():
        if group in many:
            counts[group] += 1
            groups[name] = f"{group} {counts[group]}"
    return groups


def _part(words: Words, part: PartBase, group: str) -> Iterator[Fact]:
    kind = part.kind_name()
    if not isinstance(part, Embedding | Linear) and kind not in ("attention", "moe"):
        yield Fact(group, "kind", _kind(kind))
    yield from _fields(words, part, group, "")


def _kind(kind: str) -> str:
    return KINDS.get(kind, kind.replace("_", " "))


def _label(path: str) -> str:
    return LABELS.get(path, path.replace("_", " ").replace(".", " "))


def _fields(words: Words, node: Node, group: str, prefix: str) -> Iterator[Fact]:
    """The fields of a part and of what it is made of, those left out too: not having one is a fact."""
    for name, info in type(node).model_fields.items():
        path, value = f"{prefix}{name}", getattr(node, name)
        if name in ("where", "kind", "to") or path in _UNSAID:
            continue
        if isinstance(value, Expr) and value.text == name and name in SIZES:
            continue  # it is said among the sizes
        parent = LABELS.get("position") if prefix == "position." else None
        if isinstance(value, Node):
            kind = getattr(value, "kind", None)
            there = getattr(value, "when", None)
            if kind is not None:
                yield Fact(group, _label(path), _kind(str(kind)))
            elif name == "qk_norm":
                yield Fact(group, _label(path), "yes" if there is None else words.of(there))
            yield from _fields(words, value, group, f"{path}.")
            continue
        options = next((mark for mark in marks_of(info) if isinstance(mark, Options)), None)
        if value is None and not marks_of(info):  # a group of fields that is left out as a whole
            inner = {"bias": ("bias.qkv", "bias.out"), "tied": ("tied.when",)}.get(path, (path,))
            yield from (Fact(group, _label(one), "no") for one in inner)
            continue
        text = words.of(value, _absent(path, words.env), options)
        if path == "width" and words.env is not None and text == str(words.env["d_model"]):
            text = ABSENT["width"]
        yield Fact(group, _label(path), GAINS.get(text, text), parent)


def _absent(path: str, env: Mapping[str, Any] | None) -> str:
    """What a field that is left out means."""
    if path == "scale" and env is not None and isinstance(env.get("d_head"), int):
        return f"{env['d_head'] ** -0.5:g}"
    return ABSENT.get(path, "no")


def _one_group_of_norms(norms: list[Fact]) -> Iterator[Fact]:
    """Norms that are all alike are said once; else what differs is said with its place."""
    whats = dict.fromkeys(fact.what for fact in norms)
    for what in whats:
        texts = [fact.text for fact in norms if fact.what == what]
        if len(set(texts)) == 1:
            yield Fact("norms", what, texts[0])
        else:
            yield Fact("norms", what, ", ".join(f"{fact.text} ({fact.group})" for fact in norms if fact.what == what))


def _weights(spec: Spec, names: Mapping[str, str]) -> Iterator[Fact]:
    """How a checkpoint stores them: what is fused in which order, and what is transposed."""
    fused = {group: "each its own tensor" for group in names.values() if group.startswith(("attention", "MLP"))}
    turned: list[str] = []
    for key, entry in spec.checkpoint.items():
        part, _, leaf = key.partition(".")
        if part not in names and entry.layout is not None:  # a tensor of several parts
            part = parse_layout(entry.layout, entry.where).pieces[0].name
        if part not in names:
            continue
        group = names[part]
        if entry.layout is not None:
            fused[group] = f"one tensor: {entry.layout}"
        if entry.transpose:
            turned.append(f"{group} {leaf}" if leaf else group)
    yield from (Fact("checkpoint", group, text) for group, text in fused.items())
    yield Fact("checkpoint", "stored [in, out]", ", ".join(dict.fromkeys(turned)) or "none")
