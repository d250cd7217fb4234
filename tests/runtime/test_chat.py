"""Chat templates: into the bundle at compile time, and rendered there as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compiler.text import copy_text
from runtime.bundle import Chat
from runtime.chat import ChatTemplate
from specs.checkpoint import Checkpoint
from tests.cli.conftest import DEMO
from tests.golden_errors import check_raises

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": " Where is the café? ", "name": None},
    {"role": "assistant", "content": "Here.\n"},
    {"role": "user", "content": "Thanks"},
]
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "blocks": "{%- set ns = namespace(n=0) %}\n{%- for m in messages %}\n    {%- set ns.n = ns.n + 1 %}\n"
    "    {% if loop.first %}{% continue %}{% endif %}\n  {{ ns.n }}: {{ m.content }}\n"
    "{% if ns.n == 3 %}{% break %}{% endif %}{%- endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools is none }}{{ 'name' in messages[1] }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "names": "{{ strftime_now('%Y') | length }}{{ dict(a=1) }}{{ missing }}{{ enable_thinking is defined }}"
    "{{ pad_token }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_and_ids_as_transformers(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from runtime.tokenizer import Tokenizer

    path = tmp_path / "chat_template.jinja"
    path.write_text(TEMPLATES[name], encoding="utf-8")
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer.json"), chat_template=TEMPLATES[name], **TOKENS
    )
    ours = ChatTemplate(Chat(path, TOKENS))
    for variables in ({}, {"add_generation_prompt": False, "enable_thinking": True}):
        asked: dict[str, Any] = {"add_generation_prompt": True, **variables}
        text = ours.render(MESSAGES, **asked)
        assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, **asked)
        ids = Tokenizer(DEMO / "tokenizer.json").encode(text, special=False)
        assert ids == theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **asked)


@pytest.mark.parametrize(
    ("golden", "template"),
    [
        ("RUN-051", "{% for m in messages %}\n{{ m.content }"),
        ("RUN-052", "{{ raise_exception('roles must alternate') }}"),
        ("RUN-052-sandbox", "{{ messages.__class__.__mro__ }}"),
        ("RUN-052-change", "{{ messages.append(1) }}"),
    ],
)
def test_mistakes(golden: str, template: str, tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text(template, encoding="utf-8")
    check_raises(golden, lambda: ChatTemplate(Chat(path, {})).render(MESSAGES))


def _copied(tmp_path: Path, settings: object, template: str | None = None) -> tuple[dict[str, Any], Path]:
    source, work = tmp_path / "source", tmp_path / "work"
    for folder in (source, work):
        folder.mkdir()
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template is not None:
        (source / "chat_template.jinja").write_text(template, encoding="utf-8")
    checkpoint = Checkpoint.__new__(Checkpoint)
    object.__setattr__(checkpoint, "dir", str(source))
    return copy_text(checkpoint, work), work / "chat_template.jinja"


@pytest.mark.parametrize(
    ("stated", "template", "expected"),
    [
        ("a", None, "a"),
        ("a", "b\n", "b\n"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "rag", "template": "r"}], None, None),
        (None, None, None),
    ],
)
def test_what_compile_copies(stated: object, template: str | None, expected: str | None, tmp_path: Path) -> None:
    settings = {"chat_template": stated, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    text, path = _copied(tmp_path, settings, template)
    if expected is None:
        assert (text["chat"], path.exists()) == (None, False)
    else:
        assert text["chat"] == {"template": "chat_template.jinja", "tokens": TOKENS}
        assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(("golden", "settings"), [("CKPT-036", {"chat_template": 3}), ("CKPT-036-list", [1])])
def test_settings_that_mean_nothing(golden: str, settings: object, tmp_path: Path) -> None:
    check_raises(golden, _copied, tmp_path, settings)


def test_a_bundle_without_one_says_so(tmp_path: Path) -> None:
    assert copy_text(None, tmp_path) == {"tokenizer": None, "chat": None}
