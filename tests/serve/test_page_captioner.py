"""The page's captioner in a browser, and screenshots in both themes under tests/artifacts/page/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import PNG, SHOTS, SLOW_S, bodies_of, send_message, wait_for, wait_for_answers
from playwright.sync_api import Page, expect
from server_fixture import Running, picture, until


def test_captioner(page: Page, host: Running) -> None:
    page.click("#tab-captioner")
    files = [
        {"name": f"{name}.png", "mimeType": "image/png", "buffer": picture(seed=seed)}
        for seed, name in enumerate("abcde")
    ]
    files.insert(1, {"name": "torn.png", "mimeType": "image/png", "buffer": b"broken"})
    page.set_input_files("#files", files)
    assert page.locator("#rows tr").count() == 6 and page.inner_text("#run") == "Caption 6 images"
    host.engine.step_s = 0.01
    sent = bodies_of(page)
    page.click("#run")
    wait_for(
        page,
        "[...document.querySelectorAll('td.caption')].some((c) => c.textContent && c.parentNode.dataset.state === "
        "'running')",
    )
    expect(page.locator("#run")).to_have_text("Retry 1 failed", timeout=15000)
    host.engine.step_s = 0.0
    assert page.inner_text("#summary") == "6 of 6 images, 1 failed"
    assert (
        sent[0]["temperature"] == 0 and sent[0]["messages"][0]["content"][1]["text"] == "Describe this image in detail."
    )
    captions = dict(zip(page.locator("td.name").all_inner_texts(), page.locator("td.caption").all_inner_texts()))
    saved = {}
    for name in ("json", "jsonl"):
        with page.expect_download() as download:
            page.click(f"#export-{name}")
        assert download.value.suggested_filename == f"captions.{name}"
        saved[name] = Path(download.value.path()).read_text()
    listed = json.loads(saved["json"])
    assert [list(entry) for entry in listed] == [[f"{name}.png"] for name in "abcde"]
    assert [text for entry in listed for text in entry.values()] == [
        text for name, text in captions.items() if "torn" not in name
    ]
    lines = [json.loads(line) for line in saved["jsonl"].splitlines()]
    assert (
        len(lines) == 6
        and lines[1]["id"] == "torn.png"
        and lines[1]["caption"] is None
        and "damaged" in lines[1]["error"]
    )
    assert lines[0]["finish_reason"] == "stop" and lines[0]["tokens"] > 0 and lines[0]["error"] is None


def test_captioner_stop_and_resume(page: Page, host: Running) -> None:
    host.engine.step_s = SLOW_S
    page.click("#tab-captioner")
    page.set_input_files("#files", [PNG | {"name": f"{number}.png"} for number in range(8)])
    page.click("#run")
    page.wait_for_selector("tr[data-state=running]")
    page.click("#run")
    expect(page.locator("#run")).to_have_text("Caption 8 images")
    until(lambda: not host.engine.running)
    host.engine.step_s = 0.0
    page.click("#run")
    expect(page.locator("#summary")).to_have_text("8 of 8 images")
    page.click("#empty-table")
    expect(page.locator("#summary")).to_have_text("No images yet")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_screenshots_without_horizontal_scroll(
    open_page: Callable[..., Page], host: Running, theme: str, width: int
) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page = open_page(width=width, height=800 if width > 400 else 844, color_scheme=theme)

    def shoot(name: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        wide = (
            "[...document.querySelectorAll('main:not([hidden]) *')]"
            ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.unseen'))"
        )
        assert page.evaluate(f"{wide}.map((e) => e.outerHTML.slice(0, 120))") == []
        page.screenshot(path=SHOTS / f"{name}-{theme}-{width}.png")

    assert page.get_attribute("html", "data-theme") == theme
    shoot("welcome")
    page.click(".example >> nth=0")
    wait_for_answers(page)
    host.engine.step_s = SLOW_S
    send_message(page, "And " + "unbelievably" * 9 + "long words?")
    wait_for(page, "document.querySelectorAll('.answer')[1]?.textContent.length > 60")
    shoot("chat")
    page.click("#stop")
    host.engine.step_s = 0.0
    page.click("#tab-captioner")
    page.set_input_files(
        "#files", [PNG | {"name": f"{name}.png"} for name in ("a", "b")] + [PNG | {"name": "torn.png", "buffer": b"x"}]
    )
    page.click("#run")
    expect(page.locator("#summary")).to_have_text("3 of 3 images, 1 failed")
    shoot("captioner")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != theme
