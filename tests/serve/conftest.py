"""Servers with a fake engine (see tests/server_fixture.py), and a browser for their page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from server_fixture import FakeEngine, FakeLimits, Running, default_answer, make_encoder, running

from megatron_share4v.data.loading.encode import Encoder

ARGUMENTS = [
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def shared(encoder: Encoder) -> Iterator[Running]:
    with running(encoder) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Running:
    """The shared server with its engine reset."""
    shared.engine.answer, shared.engine.step_s = default_answer, 0.0
    shared.engine.requests.clear()
    shared.engine.cancelled.clear()
    return shared


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail("no chromium on PATH: run tests/run.sh as root, or install it (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{argument}" for argument in ARGUMENTS])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def host(encoder: Encoder) -> Iterator[Running]:
    with running(
        encoder,
        engine=FakeEngine(encoder, limits=FakeLimits(max_requests=4)),
        model_name="share4v-7b",
        max_image_bytes=400_000,
    ) as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, host: Running) -> Iterator[Callable[..., Page]]:
    """Open the page; fails on console errors and on requests to another origin."""
    host.engine.answer, host.engine.step_s = default_answer, 0.0
    problems, contexts = [], []

    def open_one(
        *, width: int = 1280, height: int = 800, expected: tuple[str, ...] = (), url: str | None = None, **options
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on(
            "console",
            lambda message: (
                None
                if message.type != "error" or any(e in message.text for e in expected)
                else problems.append(message.text)
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url or host.url, "data:", "blob:")) else problems.append(request.url)
            ),
        )
        page.goto(url or host.url)
        page.wait_for_selector("[data-state=ready]")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()
