"""The report in a real browser: no console error, no request, nothing wider than the window, in light, dark and on a phone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.report import write_report

CHROMIUM = os.environ.get("LIMBECK_CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


def _load_fake_runs() -> Any:
    if "fake_runs" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fake_runs", Path(__file__).parents[1] / "fake_runs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["fake_runs"] = module
        spec.loader.exec_module(module)
    return sys.modules["fake_runs"]


fake = _load_fake_runs()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("the browser test needs Chromium: install it, or name it in LIMBECK_CHROMIUM")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("report")
    long = ["x" * 300, "a class name of many words " * 9, "<script>alert(1)</script>", "ok"]
    runs = {
        "image": [fake.fake_run(base / "image", items=300, notes=["n" * 300])],
        "text": [fake.fake_run(base / "text", classes=2, kind="text", items=200, skill={"teacher": 0.5})],
        "long": [fake.fake_run(base / "long", classes=long, items=200, student="hf:" + "m" * 200)],
        "thousand": [fake.fake_run(base / "thousand", classes=1000, items=1200)],
        "train": [fake.fake_run(base / "train", roles=("student",), items=200)],
        "deploy": [fake.fake_run(base / "deploy", items=200, changes={"export": fake.deployed(0.8)})],
        "seeds": [fake.fake_seeds(base / "seeds", 2, items=200)],
    }
    runs["compare"] = [folder for (folder,) in runs.values()]
    return {name: write_report(folders, base / f"{name}.html") for name, folders in runs.items()}


def opened(browser: Any, path: Path, size: dict[str, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and what it said on the console or asked of a network."""
    tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(f"error: {error}"))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file://", "data:")) else None)
    tab.on(
        "request", lambda request: said.append(request.url) if request.url.startswith("file://") and request.url != path.as_uri() else None
    )
    tab.goto(path.as_uri())
    return tab, said


@pytest.mark.parametrize("name", ["image", "text", "long", "thousand", "train", "deploy", "seeds", "compare"])
def test_pages_are_quiet_and_fit_a_phone_and_a_desktop(browser: Any, pages: dict[str, Path], name: str) -> None:
    for size, scheme in ((PHONE, "dark"), (DESKTOP, "light")):
        tab, said = opened(browser, pages[name], size, scheme)
        tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= size["width"]
        assert said == []
        tab.context.close()


def test_colours_follow_the_system_and_the_button(browser: Any, pages: dict[str, Path]) -> None:
    tab, said = opened(browser, pages["image"], DESKTOP, "dark")
    brightness = "getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    assert tab.evaluate(brightness) < 150
    tab.click(".theme")
    assert tab.evaluate(brightness) > 600
    curve = "getComputedStyle(document.querySelector('.chart .line.student')).stroke"
    light = tab.evaluate(curve)
    tab.click(".theme")
    assert tab.evaluate(brightness) < 150
    assert tab.evaluate(curve) != light
    assert said == []
    tab.context.close()


def test_code_is_copied_and_points_tell_their_values(browser: Any, pages: dict[str, Path]) -> None:
    tab, said = opened(browser, pages["image"], DESKTOP)
    tab.evaluate("Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => { window.copied = text; }}})")
    tab.click("#recipe .copy")
    assert tab.evaluate("window.copied") == (pages["image"].parent / "image" / "recipe.yaml").read_text().rstrip()
    tab.locator(".chart .mark.student").first.hover()
    assert "latency" in tab.inner_text("#tip")
    assert said == []
    tab.context.close()


def test_what_to_deploy_tells_its_values_and_no_name_covers_another(browser: Any, pages: dict[str, Path]) -> None:
    for size in (DESKTOP, PHONE):
        tab, said = opened(browser, pages["deploy"], size)
        tab.locator(".deploy .bubble.s2").last.hover()
        assert "latency p50" in tab.inner_text("#tip")
        box = "(e) => { const b = e.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; }"
        boxes = tab.evaluate(f"[...document.querySelectorAll('.deploy .name')].map({box})")
        assert len(boxes) == 8
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert min(a[2], b[2]) - max(a[0], b[0]) < 1 or min(a[3], b[3]) - max(a[1], b[1]) < 3, (a, b)
        assert said == []
        tab.context.close()


def test_a_script_that_came_with_the_data_would_not_run(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    """The page's policy is the second wall behind escaping."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        pages["image"].read_text().replace("</main>", '<script>window.ran = 1</script><img src="http://127.0.0.1:9/x"></main>')
    )
    tab, said = opened(browser, broken, DESKTOP)
    assert tab.evaluate("window.ran") is None
    assert any("Content Security Policy" in line for line in said)
    tab.context.close()
