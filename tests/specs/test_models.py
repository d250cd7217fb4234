"""What every file of specs/models owes: a reader's length, sources, sizes that count right, a golden, a test."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

from compiler.frontend import build
from specs.config import resolve_size
from specs.match import spec_files
from specs.schema import load_spec
from tests.golden_errors import ROOT

MAX_LINES = 60
REASON = re.compile(r"# more than 60 lines: \w")
FILES = spec_files()


@lru_cache
def golden_names() -> frozenset[str]:
    """The architectures that have a graph in tests/golden/models."""
    graphs = (path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "golden" / "models").glob("*.ir"))
    return frozenset(match[1] for text in graphs if (match := re.match(r"graph (\w+)\(", text)) is not None)


@lru_cache
def names_in_family_tests() -> frozenset[str]:
    """Every text in tests/families/test_*.py, the names of specs among them."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests" / "families").glob("test_*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return frozenset(text.replace("-", "_") for text in texts)  # folders of reference cases are spelled with `-`


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_complete(path: Path) -> None:
    spec, lines = load_spec(path), path.read_text(encoding="utf-8").splitlines()
    missing = []
    if len(lines) > MAX_LINES and not any(REASON.search(line) for line in lines):
        missing.append(f"{len(lines)} lines: at most {MAX_LINES}, or a comment `# more than 60 lines: why`")
    if not any(text.strip() for text in spec.source.values()):
        missing.append("a source")
    if not spec.sizes:
        missing.append("a size with its number of parameters")
    if spec.name not in golden_names():
        missing.append("a graph in tests/golden/models (check_golden_ir)")
    if path.stem not in names_in_family_tests():
        missing.append("a test in tests/families that names it")
    assert not missing, f"{path.relative_to(ROOT)} lacks: {'; '.join(missing)}"
    assert path.stem == spec.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameters_are_what_the_shapes_have(path: Path) -> None:
    spec = load_spec(path)
    counted = {size: build(spec, resolve_size(spec, size)).parameters for size in spec.sizes}
    assert counted == {size: entry.parameters for size, entry in spec.sizes.items()}
