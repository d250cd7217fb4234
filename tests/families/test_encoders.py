"""Encoders with their heads, against transformers: ragged rows together, each as alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compiler
import runtime
from specs.errors import SpecRTError
from tests.families.evidence import record
from tests.families.harness import TOLERANCE, check_fuses, check_golden_ir, prompts, save_random, write_config
from tests.golden_errors import check_raises

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "layer_norm_eps": 1e-5,
}  # fmt: skip
OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")


def expected(model: Any, tokens: list[int], types: list[int] | None = None) -> dict[str, np.ndarray]:
    """The outputs of one row alone, by name."""
    given = {} if types is None else {"token_type_ids": torch.tensor([types])}
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), **given)
    return {name: out[name][0].float().numpy() for name in OUTPUTS if name in out and out[name] is not None}


def check_rows(bundle: Path, model: Any, rows: list[list[int]], types: list[list[int]] | None = None) -> runtime.Model:
    """Every output of every row, by name and shape."""
    own = runtime.load(bundle)
    found, worst = own.forward(rows, **({} if types is None else {"token_types": types})), 0.0
    for row, (tokens, outputs) in enumerate(zip(rows, found, strict=True)):
        wanted = expected(model, tokens, None if types is None else types[row])
        assert outputs.keys() == wanted.keys()
        for name, value in wanted.items():
            assert outputs[name].shape == value.shape, name
            np.testing.assert_allclose(outputs[name], value, rtol=0, atol=TOLERANCE, err_msg=f"{name} of row {row}")
            worst = max(worst, float(np.abs(outputs[name] - value).max()))
    record(bundle, worst, 0)
    return own


def rows_and_types(types: int) -> tuple[list[list[int]], list[list[int]]]:
    rows = [[token + 3 for token in row] for row in prompts(80, 1, 7, 33, 12)]
    return rows, [[(index // 3) % types for index in range(len(row))] for row in rows]


HEADS = ["Model", "ForMaskedLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification"]


@pytest.mark.parametrize("head", [*HEADS, "ForPreTraining", "ForNextSentencePrediction"])
def test_first(head: str, tmp_path: Path) -> None:
    labels = 2 if head == "ForQuestionAnswering" else 5
    config = transformers.BertConfig(**SHAPE, num_labels=labels, hidden_act="gelu_new" if head == "Model" else "gelu")
    model = save_random(getattr(transformers, f"Bert{head}")(config), tmp_path / "model")
    if head == "ForPreTraining":
        inner, model = model, transformers.BertForMaskedLM(config).eval()
        model.bert, model.cls.predictions = inner.bert, inner.cls.predictions
    bundle = compiler.compile(tmp_path / "model", out=tmp_path / "bundle")
    rows, types = rows_and_types(2)
    own = check_rows(bundle, model, rows, types)
    check_rows(bundle, model, rows)  # without types: zeros
    if head == "Model":
        check_raises("RUN-008-row-of-a-table", own.forward, rows, token_types=[*types[:-1], [2] * len(rows[-1])])
        for code, method in (("RUN-015", own.logits), ("RUN-014", own.generate)):
            with pytest.raises(SpecRTError) as caught:
                method(rows)
            assert caught.value.code == code
    elif head != "ForQuestionAnswering":
        assert own.logits(rows)[1].shape == expected(model, rows[1])["logits"].shape


@pytest.mark.parametrize("head", HEADS)
def test_second(head: str, tmp_path: Path) -> None:
    labels = 2 if head == "ForQuestionAnswering" else 3
    config = transformers.RobertaConfig(
        **SHAPE, num_labels=labels, type_vocab_size=1, pad_token_id=1, hidden_act="gelu"
    )
    model = save_random(getattr(transformers, f"Roberta{head}")(config), tmp_path / "model")
    rows, _ = rows_and_types(1)
    rows.append([5, 1, 1, 9, 1, 12])  # the id of padding inside of a row has no place of its own
    own = check_rows(compiler.compile(tmp_path / "model", out=tmp_path / "bundle"), model, rows)
    assert own.limits.max_sequence == 38
    with pytest.raises(SpecRTError, match="learned 38 positions"):
        compiler.prepare(tmp_path / "model", max_sequence=39)


def test_second_in_other_places(tmp_path: Path) -> None:
    """Another id of padding, an activation of its own, the multilingual twin's names."""
    config = transformers.XLMRobertaConfig(**SHAPE, type_vocab_size=2, pad_token_id=4, hidden_act="relu")
    model = save_random(transformers.XLMRobertaForMaskedLM(config), tmp_path / "model")
    rows, types = rows_and_types(2)
    check_rows(compiler.compile(tmp_path / "model", out=tmp_path / "bundle"), model, rows, types)


@pytest.mark.parametrize("case", ["old", "unnamed", "no_pooler", "untied"])
def test_other_files(case: str, tmp_path: Path) -> None:
    """Names of old files, files that do not name their head, models without a pooler, a head of its own weights."""
    folder = tmp_path / "model"
    options: dict[str, Any] = {"tie_word_embeddings": False} if case == "untied" else {}
    config = transformers.BertConfig(**SHAPE, **options)
    kind = transformers.BertForMaskedLM if case in ("old", "untied") else transformers.BertModel
    if case == "unnamed":
        kind = transformers.BertForQuestionAnswering
    model = save_random(kind(config, **({"add_pooling_layer": False} if case == "no_pooler" else {})), folder)
    if case == "no_pooler":
        model.pooler = None
    tensors = load_file(folder / "model.safetensors")
    if case == "old":
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }
        tensors |= {"bert.pooler.dense.weight": torch.zeros(48, 48), "bert.pooler.dense.bias": torch.zeros(48)}
        tensors |= {"cls.seq_relationship.weight": torch.zeros(2, 48), "cls.seq_relationship.bias": torch.zeros(2)}
        tensors |= {"bert.embeddings.position_ids": torch.arange(40)[None]}
    if case == "unnamed":
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
        write_config(folder, architectures=None)
    save_file(tensors, folder / "model.safetensors")
    rows, types = rows_and_types(2)
    check_rows(compiler.compile(folder, out=tmp_path / "bundle"), model, rows, types)


@pytest.mark.parametrize(
    "kind", ["BertForTokenClassification", "BertForNextSentencePrediction", "RobertaForTokenClassification"]
)
def test_heads_told_from_tensors(kind: str, tmp_path: Path) -> None:
    """The config names no head, and leaves out what the reference takes as given."""
    head = getattr(transformers, kind)
    shape = {**SHAPE, "layer_norm_eps": 1e-12, "num_labels": 3} if "Token" in kind else SHAPE
    model = save_random(head(head.config_class(**shape)), tmp_path / "model")
    absent = ("architectures", "type_vocab_size", "pad_token_id", *(["layer_norm_eps"] if "Token" in kind else []))
    write_config(tmp_path / "model", **dict.fromkeys(absent))
    rows, types = rows_and_types(2)
    check_rows(compiler.compile(tmp_path / "model", out=tmp_path / "bundle"), model, rows, types)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"is_decoder": True}, "SPEC-042"),
        ({"add_cross_attention": True}, "SPEC-042"),
        ({"position_embedding_type": "relative_key"}, "SPEC-042"),
        ({"architectures": ["BertForMultipleChoice"]}, "SPEC-042"),
        ({"hidden_act": "mish"}, "SPEC-014"),
        ({"embedding_size": 128}, "SPEC-043"),
    ],
)
def test_refuses_what_it_does_not_cover(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SpecRTError) as caught:
        compiler.prepare(tmp_path)
    assert caught.value.code == code
    assert str(next(iter(change.values()))).strip("[]'") in str(caught.value).replace("true", "True")


def test_golden() -> None:
    for name in ("bert", "roberta"):
        check_golden_ir(name, name, "base")
        for size in ("base", "large"):
            check_fuses(name, size, norms=3, attentions=1)
