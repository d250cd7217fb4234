"""Every mistake in the text of a spec, with its golden message."""

from __future__ import annotations

from pathlib import Path

import pytest

from specs.schema import load_spec
from tests.golden_errors import check_raises
from tests.specs.samples import SPEC, broken

EMBED = "embed:  {kind: embedding, rows: vocab}"

# golden name: (text in SPEC, what replaces it)
EDITS: dict[str, tuple[str, str]] = {
    "SPEC-001-tab": ("    kind: attention\n", "\tkind: attention\n"),
    "SPEC-001-syntax": ("{kind: embedding, rows: vocab}", "{kind: embedding, rows: vocab"),
    "SPEC-001-unquoted": ("name: small", "name: [small] model"),
    "SPEC-001-two-documents": ("schema: 1", "schema: 1\n---\nschema: 1"),
    "SPEC-002-duplicate-key": (EMBED, f"{EMBED}\n  {EMBED}"),
    "SPEC-002-duplicate-in-flow": ("rows: vocab", "rows: vocab, rows: vocab"),
    "SPEC-003-exponent": ("eps: 1.0e-5", "eps: 1e-5"),
    "SPEC-003-boolean": ("when: tied", "when: yes"),
    "SPEC-003-boolean-key": ("hint]", "hint]\n  , on: 1"),
    "SPEC-003-capital-boolean": ("tie | false", "False"),
    "SPEC-003-octal": ("rope_theta | 10000.0", "010000"),
    "SPEC-003-sexagesimal": ("rope_theta | 10000.0", "10:30"),
    "SPEC-003-date": ("paper: none", "paper: 2017-06-12"),
    "SPEC-003-number-as-key": ("  1b:", "  1:"),
    "SPEC-003-anchor": ("{kind: rms_norm, eps: 1.0e-5}", "&norm {kind: rms_norm, eps: 1.0e-5}"),
    "SPEC-003-merge": ("embed:  {kind", "<<: 1\n  embed:  {kind"),
    "SPEC-003-tag": ("name: small", "name: !!str small"),
    "SPEC-004-unknown-key": ("{kind: gated_mlp, act: silu}", "{kind: gated_mlp, act: silu, d_fnn: 7}"),
    "SPEC-004-top": ("sizes:\n", "size:\n"),
    "SPEC-004-missing-space": ("eps: 1.0e-5", "eps:1.0e-5"),
    "SPEC-005-not-a-mapping": ("match: {model_type: small}", "match: small"),
    "SPEC-005-nested": ("rows: vocab", "rows: {of: vocab}"),
    "SPEC-005-not-text": ("name: small", "name: 7"),
    "SPEC-005-not-whole": ("parameters: 1000", "parameters: 1000.5"),
    "SPEC-005-empty": ("d_model:  hidden_size", "d_model:"),
    "SPEC-005-graph": ("graph:\n  - x = embed(tokens)\n", "graph: x\nname_2:\n  - x = embed(tokens)\n"),
    "SPEC-006-missing-key": ("    mask: causal\n", ""),
    "SPEC-006-missing-kind": ("kind: embedding, ", ""),
    "SPEC-006-no-width": ("d_model:  hidden_size", "d_modell: hidden_size"),
    "SPEC-007-schema-version": ("schema: 1", "schema: 2"),
    "SPEC-010-syntax": ("d_model / heads", "d_model / / heads"),
    "SPEC-010-lambda": ("d_model / heads", "(lambda:d_model)"),
    "SPEC-010-attribute": ("d_model / heads", "(d_model + 1).real"),
    "SPEC-010-function": ("d_model / heads", "sqr(d_model)"),
    "SPEC-010-arguments": ("d_model / heads", "max(d_model)"),
    "SPEC-010-python-true": ("tie | false", "tie | False"),
    "SPEC-010-is": ("tie | false", "tie is none"),
    "SPEC-011-undefined-name": ("out: vocab", "out: vocabulary"),
    "SPEC-011-undefined-option": ("kind: gated_mlp, act: silu", "kind: gated_mlp, act: sillu"),
    "SPEC-011-undefined-value": ("head(norm_f(x))", "head(norm_f(y))"),
    "SPEC-011-undefined-after-repeat": ("head(norm_f(x))", "head(norm_f(x + h))"),
    "SPEC-011-undefined-scalar": ("x = embed(tokens)", "x = embed(tokens) * sqrt(d_modl)"),
    "SPEC-011-layer-outside-repeat": ("norm_f: {kind: rms_norm, eps: 1.0e-5}", "norm_f: {kind: rms_norm, eps: layer}"),
    "SPEC-013-literal": ("{kind: rms_norm, eps: 1.0e-5}", "{kind: rms_norm, eps: true}"),
    "SPEC-014-literal": ("kind: gated_mlp, act: silu", "kind: gated_mlp, act: \"'mish'\""),
    "SPEC-015-unknown-kind": ("kind: gated_mlp", "kind: gated_mpl"),
    "SPEC-015-unknown-position": ("kind: rope", "kind: ropes"),
    "SPEC-016-no-dimension": ("  d_ffn:    ffn\n", ""),
    "SPEC-017-tied-to-nothing": ("to: embed", "to: embedding"),
    "SPEC-017-tied-to-attention": ("to: embed", "to: attn"),
    "SPEC-018-unused-part": ("x + attn(h) + mlp(h)", "x + attn(h)"),
    "SPEC-018-used-twice": ("x + attn(h) + mlp(h)", "x + attn(h) + mlp(norm_1(x))"),
    "SPEC-019-size": ("d_model: 8", "d_modle: 8"),
    "SPEC-020-syntax": ("x = embed(tokens)", "x = embed(tokens"),
    "SPEC-020-not-an-equation": ("x = embed(tokens)", "embed(tokens)"),
    "SPEC-020-not-allowed": ("x = embed(tokens)", "x = embed(tokens) @ tokens"),
    "SPEC-020-target": ("x = embed(tokens)", "x.y = embed(tokens)"),
    "SPEC-020-no-count": ("- repeat layers:", "- repeat:"),
    "SPEC-020-nested-repeat": ("- h = norm_1(x)", "- repeat layers:\n          - h = norm_1(x)"),
    "SPEC-020-running-condition": ("attn(h) + mlp(h)", "(attn(h) if h else mlp(h))"),
    "SPEC-021-input": ("x = embed(tokens)", "tokens = embed(tokens)"),
    "SPEC-021-config-name": ("x = embed(tokens)", "theta = embed(tokens)"),
    "SPEC-021-option": ("  theta:    rope_theta", "  half:     style | none\n  theta:    rope_theta"),
    "SPEC-021-part-and-config": ("  theta:    rope_theta | 10000.0", "  mlp:    rope_theta"),
    "SPEC-021-not-a-name": ("  theta:    rope_theta", "  the-ta:    rope_theta"),
    "SPEC-022-not-a-part": ("mlp(h)", "mpl(h)"),
    "SPEC-023-no-output": ("logits =", "y ="),
    "SPEC-024-part-arity": ("attn(h)", "attn(h, x)"),
    "SPEC-024-targets": ("h = norm_1(x)", "h, g = norm_1(x)"),
    "SPEC-025-unused-value": ("- h = norm_1(x)", "- h = norm_1(x)\n      - g = h + x"),
    "SPEC-026-no-effect": ("  theta:    rope_theta", "  window:   sliding_window | none\n  theta:    rope_theta"),
    "SPEC-030-unknown-weight": ("mlp.gate: layers", "mlp.gat: layers"),
    "SPEC-030-no-layer": ("layers.{i}.gate", "layers.gate"),
    "SPEC-030-layer": ("norm_f:   norm", "norm_f:   norm.{i}"),
    "SPEC-030-twice": ("attn.o:   layers.{i}.o", "attn.o:   layers.{i}.o\n  attn.q:   layers.{i}.q"),
    "SPEC-030-no-source": ('{from: "layers.{i}.qkv", layout', "{layout"),
    "SPEC-031-layout": ("[q: heads, k: kv_heads, v: kv_heads] d_head", "q k v"),
    "SPEC-005-two-rules": ("sizes:\n", "derive: {prefix: {first: vocab, has: vocab}}\nsizes:\n"),
    "SPEC-034": ("sizes:\n", "derive: {prefixes: {first: vocab}}\nsizes:\n"),
    "SPEC-030-spelling": ("sizes:\n", "spellings: {gamma: weight}\nsizes:\n"),
    "SPEC-020-when": ("  - logits = head(norm_f(x))", "  - when tied: logits = head(norm_f(x))"),
    "SPEC-011-under-a-condition": ("- logits = head(norm_f(x))", "- when tied: [h = norm_f(x)]\n  - logits = head(h)"),
    "SPEC-031-piece": ("[q: heads, k: kv_heads, v: kv_heads] d_head", "[q: heads, q, v] d_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_mistake(name: str, tmp_path: Path) -> None:
    check_raises(name, broken, tmp_path, *EDITS[name])


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    empty, binary, listing = tmp_path / "empty.yaml", tmp_path / "binary.yaml", tmp_path / "list.yaml"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe\x00")
    listing.write_text("- 1\n")
    check_raises("SPEC-001-empty", load_spec, empty)
    check_raises("SPEC-001-not-text", load_spec, binary)
    check_raises("SPEC-001-list", load_spec, listing)
    check_raises("SPEC-001-no-file", load_spec, tmp_path / "absent.yaml")


def test_the_sample_itself_is_right(tmp_path: Path) -> None:
    assert broken(tmp_path, SPEC, SPEC).outputs == ("logits",)
