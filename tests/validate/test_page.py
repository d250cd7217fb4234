"""The report's page in a real browser: read at three widths, light and dark, filtered, sorted, a command copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler.validate.emulate import Subject
from compiler.validate.html import page
from compiler.validate.matrix import Choice, Model, assemble
from tests.golden_errors import ROOT
from tests.validate.test_matrix import GOOD, record

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `dev` has Playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (on Debian: apt install chromium)"
)

SPECS = ROOT / "specs" / "models"
WIDTHS = (390, 1024, 1600)

# Elements with text of their own whose colour is too near the first background behind it (WCAG 2.1, 1.4.3: below 4.5).
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const clear = (rgb) => rgb.length === 4 && rgb[3] === 0;
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.getClientRects().length || node.closest("svg, noscript, script, .skip")) continue;
    let behind = node, back = [0, 0, 0, 0];
    for (; behind && clear(back); behind = behind.parentElement) back = parse(getComputedStyle(behind).backgroundColor);
    const a = light(parse(getComputedStyle(node).color)), b = light(clear(back) ? [255, 255, 255] : back);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${node.tagName}.${node.className} ${node.textContent.slice(0, 30)} ${ratio}`);
  }
  return found;
}"""
# Elements whose text is wider than they are and is not meant to scroll.
CUT = """() => [...document.querySelectorAll("button, th, td, h1, h2, p")].filter((node) =>
  node.getClientRects().length && node.scrollWidth > node.clientWidth + 1 && !node.closest(".scroll, .wide, .chart"))
  .map((node) => node.tagName + " " + node.textContent.slice(0, 40))"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three models, with every level in it."""
    models = [Model(name, title, Subject(SPECS / f"{name}.yaml", "tiny"), size) for name, title, size in (
        ("llama", "LLaMA", "7b"), ("gpt2", "GPT-2", "xl"), ("bloom", "BLOOM", "176b"))]  # fmt: skip
    choice = Choice(("fp32", "fp16", "fp8", "w4a16"), ("sm70", "sm80", "sm90"), ("tensorrt-8.6", "tensorrt-10.8"))
    profile = [{"value": f"attn.q[{i}]", "relative": 10.0 ** -(i % 5 + 2), "place": "llama.yaml:37"} for i in range(40)]
    emulated = {
        (model.name, precision): {**GOOD, "mean_kl": 10.0 ** -(5 + index + place), "profile": profile}
        for index, model in enumerate(models)
        for place, precision in enumerate(("fp16", "w4a16"))
    }
    records = (record(), record(level="emitted", precision="fp32", gpu="any"), record(model="gpt2", spec="changed"))
    content = assemble(models, choice, emulated, records, "specrt validate --models llama,gpt2,bloom").as_dict()
    file = tmp_path_factory.mktemp("page") / "index.html"
    file.write_text(page(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, path: Path, width: int = 1024, scheme: str = "light") -> Any:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    found = context.new_page()
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
    found.goto(path.as_uri())
    assert problems == []
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read(browser: Any, path: Path, width: int, scheme: str) -> None:
    found = opened(browser, path, width, scheme)
    assert found.evaluate("document.documentElement.scrollWidth") <= width
    assert found.evaluate(CUT) == []
    assert found.evaluate(CONTRAST) == []
    found.click("button[data-model=llama][data-precision=fp16]")
    assert found.evaluate("document.querySelector('dialog').getBoundingClientRect().right") <= width
    assert found.evaluate(CONTRAST) == []
    assert found.evaluate(CUT) == []


def test_filter_sort_and_show(browser: Any, path: Path) -> None:
    found = opened(browser, path)
    names = lambda: found.locator("#grid tbody th").all_inner_texts()  # noqa: E731
    assert names() == ["LLaMA", "GPT-2", "BLOOM"]
    found.fill("#find", "gpt")
    assert names() == ["GPT-2"]
    found.fill("#find", "")
    found.select_option("#sort", "error")
    assert names() == ["LLaMA", "GPT-2", "BLOOM"]
    found.select_option("#sort", "name")
    assert names() == ["BLOOM", "GPT-2", "LLaMA"]
    cell = found.locator("button[data-model=llama][data-precision=fp16]")
    assert cell.inner_text() == "Executed"
    found.select_option("#show", "kl")
    assert cell.inner_text() == "1.0e−5"
    found.select_option("#gpu", "sm80")
    assert "emulated" in (cell.get_attribute("class") or "")
    found.select_option("#gpu", "sm70")
    assert "refused" in (found.locator("button[data-model=llama][data-precision=fp8]").get_attribute("class") or "")


def test_totals_count_and_hide_levels(browser: Any, path: Path) -> None:
    found = opened(browser, path)
    assert found.locator("#totals button.executed strong").inner_text() == "2"
    found.click("#totals button.executed")
    assert found.locator("button[data-model=llama][data-precision=fp16]").count() == 0
    found.click("#totals button.executed")
    assert found.locator("button[data-model=llama][data-precision=fp16]").count() == 1


def test_a_cell_opens_by_keyboard_and_its_command_is_copied(browser: Any, path: Path) -> None:
    found = opened(browser, path)
    found.focus("button[data-model=llama][data-precision=fp32]")
    found.keyboard.press("ArrowRight")
    found.keyboard.press("Enter")
    dialog = found.locator("dialog")
    assert dialog.locator("h2").inner_text() == "LLaMA, fp16"
    assert "H200" in dialog.inner_text()
    assert dialog.locator("figure circle").count() == 40
    found.click("#copy")
    assert found.evaluate("navigator.clipboard.readText()") == found.locator("#command").inner_text()
    assert (
        found.locator("#command")
        .inner_text()
        .startswith(f"specrt validate {SPECS}/llama.yaml --size tiny --precisions fp16")
    )
    found.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_stale_evidence_is_marked(browser: Any, path: Path) -> None:
    found = opened(browser, path)
    cell = found.locator("button[data-model=gpt2][data-precision=fp16]")
    assert "stale" in (cell.get_attribute("class") or "")
    assert "stale" in (cell.get_attribute("aria-label") or "")
    cell.click()
    assert "stale: the spec changed since" in found.locator("dialog").inner_text()


def test_dark_by_hand(browser: Any, path: Path) -> None:
    found = opened(browser, path)
    before = found.evaluate("getComputedStyle(document.body).backgroundColor")
    found.click("#theme")
    assert found.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert found.evaluate(CONTRAST) == []
