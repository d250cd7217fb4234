"""Rules about the source as a whole: what may import what, which names it may use, what every error owes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import error_table  # noqa: E402
import model_table  # noqa: E402

PACKAGES = ("specs", "compiler", "runtime", "serve")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_PYTHON = sorted(path for folder in (*PACKAGES, "bench", "tools", "tests") for path in (ROOT / folder).rglob("*.py"))

# What each package may import of ours beside itself; the longest matching name holds.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "specs": (),
    "runtime": ("specs.errors",),
    "serve": ("specs.errors", "runtime"),
    "compiler.ir": ("specs",),
    "compiler.frontend": ("specs", "compiler.ir"),
    "compiler.passes": ("specs", "compiler.ir"),
    "compiler.kernels": ("specs", "compiler.ir"),
    "compiler.lower": ("specs", "compiler.ir", "compiler.passes", "compiler.kernels"),
    "compiler.cli": ("specs", "compiler", "runtime", "serve"),
    "compiler.validate": ("specs", "compiler", "runtime"),
    "compiler.benchmark": ("specs", "compiler", "runtime"),
    "compiler.quantization": ("specs", "compiler", "runtime.derive"),
    "compiler": ("specs", "compiler"),
}

# A model is data: no family's name may decide anything. Names that are also words (opt, phi) are left out.
# Found: llama, Llama3, tiny_llama, LlamaForCausalLM.
FAMILY = re.compile(
    r"(?<![A-Za-z])(?i:alpaca|aquila|baichuan|bart|bert|bloom|chatglm|codegen|cohere|dbrx|deepseek|falcon|gemma|glm"
    r"|gpt(?!q)|granite|grok|internlm|llama|mamba|minicpm|mistral|mixtral|mpt|nemo|nemotron|neox|olmo|pythia|qwen|roberta|santacoder"
    r"|smollm|stablelm|starcoder|t5|vicuna|xlnet|yi)(?![a-z])"
)

MAX_LINES = 400
LONG_FILES: dict[str, str] = {}  # path: why it is one thing that reads better whole


def name_of(path: Path) -> str:
    """The dotted module name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports_of(path: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it, as absolute names."""
    found: set[str] = set()
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *((node.module or "").split("."))]).strip(".")
            # `from package import module` names the module, not the package
            for alias in node.names:
                full = f"{prefix}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT / full.replace(".", "/") / "__init__.py").exists()
                found.add(full if is_module or is_package else prefix)
    return {name for name in found if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    module = name_of(path)
    home = max((name for name in MAY_IMPORT if inside(module, name)), key=len)
    allowed = (home, *MAY_IMPORT[home])
    wrong = sorted(name for name in imports_of(path) if not any(inside(name, ok) for ok in allowed))
    assert not wrong, f"{module} may import {', '.join(allowed)}, and imports {', '.join(wrong)}"


def test_no_model_family_in_code() -> None:
    # bench/ is not searched: it names a peer engine, its package and its file format
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*SOURCES, *sorted((ROOT / "tools").rglob("*.py"))]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FAMILY.search(line)
    ]
    assert not named, "a model is data; these lines name a family:\n" + "\n".join(named)


@pytest.mark.parametrize("modules", ["specs, compiler, runtime", "compiler.cli"])
def test_importing_is_light(modules: str) -> None:
    heavy = ("torch", "openvino", "transformers", "tensorrt", "jinja2", "starlette", "uvicorn")
    code = f"import sys, {modules}; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_error_code_has_a_golden() -> None:
    codes = error_table.codes_in_source()
    missing = [
        f"{code} ({', '.join(sorted(files))})"
        for code, files in sorted(codes.items())
        if not error_table.goldens_of(code)
    ]
    assert not missing, f"no tests/golden/errors/CODE.txt for: {'; '.join(missing)}"


def test_every_golden_belongs_to_a_code() -> None:
    codes = error_table.codes_in_source()
    stray = []
    for golden in sorted(error_table.GOLDENS.glob("*.txt")):
        code = error_table.CODE.match(golden.name)
        if code is None or code[0] not in codes:
            stray.append(golden.name)
        else:
            assert golden.read_text(encoding="utf-8").startswith(f"error[{code[0]}]: "), golden.name
    assert not stray, f"goldens of codes that no source file has: {', '.join(stray)}"


def test_error_table_is_current() -> None:
    assert error_table.TABLE.read_text(encoding="utf-8") == error_table.render(), "run `python tools/error_table.py`"


def test_model_table_is_current() -> None:
    """Only specs with a recorded result have a row, so a new spec alone makes nothing stale."""
    assert model_table.README.read_text(encoding="utf-8") == model_table.page(), "run `python tools/model_table.py`"


def test_files_stay_small() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in ALL_PYTHON}
    long = {name: count for name, count in lines.items() if count > MAX_LINES and name not in LONG_FILES}
    assert not long, f"over {MAX_LINES} lines; split, or list with a reason: {long}"
    stale = [name for name in LONG_FILES if lines.get(name, 0) <= MAX_LINES]
    assert not stale, f"no longer long, remove from LONG_FILES: {stale}"


def test_decisions_are_numbered_in_order() -> None:
    """They are cited by number; people who work side by side give out the same one, or leave one out."""
    numbers = re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8"), re.M)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))


def test_makefile_pins_torch_as_constraints_do() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"torch==\S+", (ROOT / "Makefile").read_text(encoding="utf-8")) == re.findall(
        r"^torch==\S+", constraints, re.M
    )
