"""YAML with positions and without traps: every value remembers file:line:column.

What YAML would misread is an error: duplicate keys, keys that are not text, `yes/no/on/off` as booleans, numbers
that YAML 1.1 reads as text (`1e-5`) or in an unexpected base (`010`, `1:30`), dates, tabs, anchors, aliases, merge
keys, tags and several documents in one file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from specs.errors import SpecRTError, Where

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class Scalar:
    """One YAML scalar and where it stands; `quoted` tells `'7b'` from a bare word."""

    value: Plain
    where: Where
    quoted: bool = False


class YamlMap(dict[str, "Node"]):
    """A YAML mapping; `key_where` gives the place of each key."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where
        self.key_where: dict[str, Where] = {}


class YamlList(list["Node"]):
    """A YAML sequence."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where


Node = Scalar | YamlMap | YamlList

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)$")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?$")
_NUMBER_LIKE = re.compile(
    r"[-+]?\.?[0-9][0-9_.:]*([eE][-+]?[0-9][0-9_]*)?$|[-+]?0[xXoObB][0-9a-fA-F_]+$|[-+]?\.(inf|nan)$",
    re.IGNORECASE,
)
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}")
_BARE_BOOLEANS = {"y", "n", "yes", "no", "on", "off"}
_CONSTANTS: dict[str, Plain] = {"true": True, "false": False, "null": None}


def plain(node: Node) -> object:
    """The node as ordinary Python data, without positions."""
    if isinstance(node, YamlMap):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, YamlList):
        return [plain(item) for item in node]
    return node.value


def load_yaml(path: str | Path, text: str | None = None) -> YamlMap:
    """Read one YAML file (or `text`, named `path` in messages) whose top is a mapping; raises SPEC-001,
    SPEC-002, SPEC-003.
    """
    name = str(path)
    if text is None:
        text = _read_text(Path(path))
    try:
        root = _loader(name, text).get_single_node()
    except RecursionError as error:
        raise SpecRTError("SPEC-001", "not valid YAML: nested too deeply", where=Where(name)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Where(name, mark.line + 1, mark.column + 1) if mark else Where(name)
        raise SpecRTError(
            "SPEC-001",
            f"not valid YAML: {_problem(error)}",
            where=where,
            hint=_syntax_hint(text, where, _problem(error)),
        ) from error
    except yaml.YAMLError as error:
        raise SpecRTError("SPEC-001", f"not valid YAML: {error}".splitlines()[0], where=Where(name)) from error
    if root is None:
        raise SpecRTError("SPEC-001", "the file is empty", where=Where(name))
    node = _convert(name, root)
    if not isinstance(node, YamlMap):
        raise SpecRTError("SPEC-001", "the file must be a mapping of keys to values", where=node.where)
    return node


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    return f"{error.context}, {problem}" if problem.startswith("but ") and error.context else problem


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecRTError("SPEC-001", "not valid YAML: the file is not UTF-8 text", where=Where(str(path))) from error
    except OSError as error:
        raise SpecRTError("SPEC-001", f"cannot read the file: {error.strerror}", where=Where(str(path))) from error


def _syntax_hint(text: str, where: Where, problem: str) -> str | None:
    lines = text.splitlines()
    line = lines[where.line - 1] if where.line and where.line <= len(lines) else ""
    if "\t" in line:
        return "YAML forbids tabs for indentation; use spaces"
    if problem.startswith("expected ',' or"):
        return "close the `{` or `[` that stands before, or put text that holds one in double quotes"
    if re.search(r":\s*\[.*\]\s*\S", line) or re.search(r":\s*[`@%&*!|>]", line):
        return "put text that starts with a special character in double quotes"
    return None


class _Loader(yaml.SafeLoader):
    """PyYAML's composer, which stops at anchors, aliases and tags: they hide what a file says."""

    file: str

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = Where(self.file, event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            hint = "write the value out, or name it in `config:`"
            raise SpecRTError("SPEC-003", "YAML anchors and aliases are not allowed", where=where, hint=hint)
        if event.tag:
            raise SpecRTError("SPEC-003", f"YAML tags are not allowed: `{event.tag}`", where=where)
        return super().compose_node(parent, index)


def _loader(name: str, text: str) -> _Loader:
    loader = _Loader(text)
    loader.file = name
    return loader


def _convert(name: str, node: yaml.Node) -> Node:
    where = Where(name, node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.MappingNode):
        mapping = YamlMap(where)
        for key_node, value_node in node.value:
            key, key_where = _key(name, key_node)
            if key in mapping:
                first = mapping.key_where[key]
                raise SpecRTError(
                    "SPEC-002",
                    f"key `{key}` is given twice",
                    where=key_where,
                    notes=(f"first given at {first}",),
                    hint="keep one of them",
                )
            mapping[key] = _convert(name, value_node)
            mapping.key_where[key] = key_where
        return mapping
    if isinstance(node, yaml.SequenceNode):
        sequence = YamlList(where)
        sequence.extend(_convert(name, item) for item in node.value)
        return sequence
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:
        return Scalar(node.value, where, quoted=True)
    return Scalar(_plain_scalar(node.value, where), where)


def _key(name: str, node: yaml.Node) -> tuple[str, Where]:
    where = Where(name, node.start_mark.line + 1, node.start_mark.column + 1)
    if not isinstance(node, yaml.ScalarNode):
        raise SpecRTError("SPEC-003", "a key must be text", where=where)
    if node.style is None:
        if node.value == "<<":
            raise SpecRTError(
                "SPEC-003", "YAML merge keys (`<<`) are not allowed", where=where, hint="write the keys out"
            )
        if not isinstance(_plain_scalar(node.value, where), str):
            raise SpecRTError(
                "SPEC-003", f"key `{node.value}` is not text", where=where, hint=f'quote it: "{node.value}"'
            )
    return node.value, where


def _plain_scalar(text: str, where: Where) -> Plain:
    """The value of an unquoted scalar: YAML 1.2's core types, less whatever 1.1 and 1.2 read differently."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text == "" or text == "~":
        return None
    if text.lower() in _BARE_BOOLEANS or text.lower() in _CONSTANTS:
        raise SpecRTError(
            "SPEC-003",
            f"`{text}` is ambiguous: YAML may read it as true, false or null",
            where=where,
            hint=f'write `true`, `false` or `null`; for the text, quote it: "{text}"',
        )
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text)
    if _DATE.match(text):
        raise SpecRTError("SPEC-003", f"`{text}` is a date to YAML", where=where, hint=f'quote it: "{text}"')
    if _NUMBER_LIKE.match(text):
        raise SpecRTError(
            "SPEC-003",
            f"`{text}` looks like a number, but YAML does not read it as that number",
            where=where,
            hint=_number_hint(text),
        )
    return text


def _number_hint(text: str) -> str:
    match = re.match(r"([-+]?[0-9]+)(\.[0-9]*)?[eE]([-+]?)([0-9]+)$", text)
    if match:
        whole, fraction, sign, exponent = match.groups()
        digits = "." + ((fraction or "").lstrip(".") or "0")
        number = f"{whole}{digits}e{sign or '+'}{exponent}"
        return f"write `{number}` (YAML wants the point and the sign); if it is text, quote it"
    return f'write it as a plain decimal number, or quote it if it is text: "{text}"'
