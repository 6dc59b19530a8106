"""Actions and waits shared by the page tests. The browser is a fixture in conftest.py."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Page, expect
from server_fixture import picture, until

SHOTS = Path(__file__).resolve().parents[1] / "artifacts" / "page"
SLOW_S = 0.03
PNG = {"name": "harbour.png", "mimeType": "image/png", "buffer": picture(size=(300, 200))}


def send_message(page: Page, text: str) -> None:
    """Type a message and press Enter."""
    page.fill("#text", text)
    page.press("#text", "Enter")


def wait_for_answers(page: Page, count: int = 1) -> None:
    """Wait until `count` answers are complete."""
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(count)


def wait_for(page: Page, expression: str, argument: object = None) -> None:
    """Wait until a JavaScript condition holds.

    Playwright's wait_for_function needs eval, which the page's policy forbids.
    """
    until(lambda: page.evaluate(expression, argument) or page.wait_for_timeout(10))


def bodies_of(page: Page) -> list[dict]:
    """Bodies of the requests the page sends from now on."""
    found: list[dict] = []
    page.on(
        "request", lambda request: found.append(json.loads(request.post_data)) if request.method == "POST" else None
    )
    return found
