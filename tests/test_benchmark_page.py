"""The benchmark's page in a real browser: toggles, sorts, shows what it is asked for, and asks no network."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgeport.benchmark.page import page
from edgeport.benchmark.results import MODELS, Results, Row

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
PHONE = {"width": 390, "height": 844}


def results() -> Results:
    """Two tasks, each asked on a machine of its own, two evolutions and three precisions, with a hostile name among them."""
    rows = [
        Row(task, evolution, model, precision, size << 20, correct=100 + 40 * at - 10 * drop, total=400, score_seconds=3.0,
            score_peak_bytes=(size + 160) << 20, perplexity=20.0 + drop, machine=int(task == "legs"))
        for task in ("triage", "legs")
        for evolution in ("LoRA", "</script><b>full")
        for at, model in enumerate(MODELS)
        for drop, (precision, size) in enumerate((("bf16", 258), ("Q8_0", 138), ("Q4_0", 88)))
    ]  # fmt: skip
    told = {"port_peak_bytes": 270 << 20, "port_seconds": 2.5, "gain_kept": 0.8, "gain_error": 0.12}
    kl = {"bf16": 0.01, "Q8_0": 0.03, "Q4_0": 0.02}
    rows = [replace(row, kl=kl[row.precision], **told) if row.model == "ported" else row for row in rows]
    tasks = [
        {"name": "triage", "title": "Triage", "source": "made up", "questions": 400, "floor": 0.125},
        {"name": "legs", "title": "Legs", "source": "made up", "questions": 400, "floor": 0.05},
    ]
    small = {"processor": "Small", "cores": 2, "system": "Linux", "ram_bytes": 1 << 33, "versions": {"edgeport": "0.1"}}
    machines = [small, {**small, "processor": "Large", "cores": 64}]
    return Results("edgeport bench -o out", tasks, 0, rows, ("A note.",), machines)


def test_the_page_carries_everything_itself() -> None:
    content = page(results())
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|fetch\(""", content)
    assert content.count("</script>") == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        found = next((path for name in BROWSERS if (path := shutil.which(name))), str(own) if own.exists() else None)
        if found is None:
            pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
        # a container's root has no sandbox, and the page is our own
        launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page, opened; at the end nothing has gone wrong in it, and nothing was asked of a network."""
    (tmp_path / "results.html").write_text(page(results()), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1180, "height": 900}, color_scheme="light")
    opened = context.new_page()
    mistakes, requests = [], []
    opened.on("pageerror", lambda error: mistakes.append(str(error)))
    opened.on("console", lambda message: mistakes.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto((tmp_path / "results.html").as_uri())
    yield opened
    assert mistakes == []
    assert [url for url in requests if not url.startswith("file:")] == []
    context.close()


def test_names_longer_than_a_phone_is_wide(browser: Any, tmp_path: Path) -> None:
    found, name = results(), "a-model-and-its-questions-" * 4 + "x" * 60
    rows = [replace(row, task=name, evolution=row.evolution + name) for row in found.rows if row.task == "triage"]
    tasks = [{**found.tasks[0], "name": name, "title": name, "source": name}]
    (tmp_path / "results.html").write_text(page(replace(found, rows=rows, tasks=tasks)), encoding="utf-8")
    with closing(browser.new_page(viewport=PHONE)) as opened:
        opened.goto((tmp_path / "results.html").as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        button = opened.locator("#theme").bounding_box()
    assert button["width"] > button["height"]


def test_the_sentence_is_about_one_evolution(shown: Any) -> None:
    press(shown, "evolution", "</script><b>full")
    shown.evaluate("results.rows = results.rows.filter(row => row.evolution !== 'LoRA' || row.model !== 're-tuned'); render()")
    told = shown.locator("#answer").inner_text()
    assert "base (LoRA)" in told and "training again" not in told


def press(shown: Any, group: str, name: str) -> None:
    shown.locator(f'button[data-set="{group}"][data-name="{name}"]').click()


def column(shown: Any, place: int) -> list[str]:
    return [text.strip() for text in shown.locator(f"#body td:nth-child({place})").all_inner_texts()]


def test_toggles(shown: Any) -> None:
    dots = shown.locator(".dot")
    assert dots.count() == 15  # five models in three precisions, of the first evolution
    press(shown, "precision", "Q8_0")
    assert dots.count() == 10 and "Q8_0" not in column(shown, 2)
    press(shown, "evolution", "</script><b>full")
    assert dots.count() == 20
    press(shown, "model", "old base")
    assert dots.count() == 16 and "old base" not in column(shown, 1)
    press(shown, "axis", "port_peak_bytes")
    assert dots.count() == 4 and shown.locator("tbody tr").count() == 16  # bases are not ported
    press(shown, "task", "legs")
    assert "Legs" in shown.locator("#what").inner_text()
    for evolution in ("LoRA", "</script><b>full"):
        press(shown, "evolution", evolution)
    assert dots.count() == 0 and "Nothing to show" in shown.locator("#chart").inner_text()


def test_machines(shown: Any) -> None:
    assert shown.locator("th").last.inner_text() == "machine" and set(column(shown, shown.locator("th").count())) == {"1"}
    press(shown, "task", "legs")
    assert set(column(shown, shown.locator("th").count())) == {"2"}
    foot = shown.locator("#foot").inner_text()
    assert "Machine 1: Small, 2 cores, 8.00 GiB of memory; edgeport 0.1" in foot and "Machine 2: Large, 64 cores" in foot


def test_sorting(shown: Any) -> None:
    accuracies = [float(text.split(" %")[0]) for text in column(shown, 3)]
    assert accuracies == sorted(accuracies, reverse=True)
    shown.locator('th[data-key="bytes"]').click()
    sizes = [float(text.split()[0]) for text in column(shown, 4)]
    assert sizes == sorted(sizes, reverse=True)
    shown.locator('th[data-key="bytes"]').press("Enter")
    assert [float(text.split()[0]) for text in column(shown, 4)] == sorted(sizes)
    assert shown.locator('th[data-key="bytes"]').get_attribute("aria-sort") == "ascending"


def test_sorting_by_what_the_first_row_lacks(shown: Any) -> None:
    """The reference has no divergence from itself; the others come first, the largest on top."""
    shown.locator('th[data-key="kl"]').click()
    assert shown.locator('th[data-key="kl"]').get_attribute("aria-sort") == "descending"
    place = shown.locator("#head th").evaluate_all("cells => cells.findIndex(cell => cell.dataset.key === 'kl')") + 1
    told = [text.split()[0] for text in column(shown, place)]
    numbers = [float(text) for text in told if text != "–"]
    assert len(numbers) > 1 and numbers == sorted(numbers, reverse=True) and told[len(numbers) :] == ["–"] * told.count("–")


def test_what_is_pressed_keeps_the_focus(shown: Any) -> None:
    for place in ('button[data-set="model"][data-name="re-tuned"]', 'th[data-key="bytes"]'):
        shown.locator(place).focus()
        shown.keyboard.press("Enter")
        assert shown.evaluate("place => document.activeElement === document.querySelector(place)", place)


def test_labels_say_where_their_lines_are(shown: Any) -> None:
    for hidden in ("old base", "tuned old base", "evolved base", "re-tuned"):
        press(shown, "model", hidden)
    for hidden in ("Q8_0", "Q4_0"):
        press(shown, "precision", hidden)
    texts = shown.locator("#chart text").all_text_contents()
    shares = [float(text.removesuffix(" %")) for text in texts if text.endswith(" %")]
    assert len(shares) > 2 and len({round(above - below, 6) for below, above in pairwise(shares)}) == 1, texts


def test_the_floor_stays_within_the_chart(browser: Any, tmp_path: Path) -> None:
    found = results()
    (tmp_path / "results.html").write_text(page(replace(found, tasks=[{**one, "floor": 0.99} for one in found.tasks])))
    with closing(browser.new_page()) as opened:
        opened.goto((tmp_path / "results.html").as_uri())
        assert opened.locator("#chart svg").count() == 1
        assert "always the commonest answer" not in (opened.locator("#chart").text_content() or "")


def test_the_front_is_of_models_that_none_beats(shown: Any) -> None:
    """In these figures the re-tuned model leads in each precision, and fewer bits cost accuracy."""
    path = shown.locator(".front").get_attribute("d")
    assert path.count("H") == path.count("V") == 2
    spots = [shown.locator(f'.dot[aria-label^="re-tuned, {name}"]').bounding_box() for name in ("Q4_0", "Q8_0", "bf16")]
    assert [box["x"] for box in spots] == sorted(box["x"] for box in spots)
    assert [box["y"] for box in spots] == sorted((box["y"] for box in spots), reverse=True)


def test_hovering_names_the_row(shown: Any) -> None:
    tip = shown.locator("#tip")
    assert not tip.is_visible()
    shown.locator('.dot[aria-label^="ported, Q4_0"]').hover()
    text = tip.inner_text()
    assert "ported" in text and "50.0 %" in text and "88 MiB" in text and "0.0200" in text and "80 % ± 12" in text
    assert shown.locator("tbody tr.lit").count() == 1


def test_light_dark_phone_and_paper(shown: Any, tmp_path: Path) -> None:
    def background() -> str:
        return str(shown.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    shown.locator("#theme").click()
    assert background() != light
    shown.set_viewport_size(PHONE)
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # the chart is drawn anew when the page hears of its new size
    shown.wait_for_function("document.querySelector('svg[role=img]').getBoundingClientRect().width <= innerWidth")
    assert min(box["height"] for button in shown.locator("button").all() if (box := button.bounding_box())) >= 36
    picture = shown.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert shown.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")
