"""The page's chat in a real browser."""

from __future__ import annotations

from collections.abc import Callable

from browser import PNG, SLOW_S, bodies_of, send_message, wait_for, wait_for_answers
from playwright.sync_api import Browser, Page, Route, expect
from server_fixture import Running, picture, running, until

from megatron_share4v.data.loading.encode import Encoder


def test_text_question(page: Page, host: Running) -> None:
    host.engine.answer = lambda engine, request: "Three boats."
    sent = bodies_of(page)
    assert page.locator("#send").is_disabled() and page.evaluate("document.activeElement.id") == "text"
    send_message(page, "How many?")
    wait_for_answers(page)
    assert page.inner_text(".answer") == "Three boats."
    assert (
        sent[0]["messages"] == [{"role": "user", "content": "How many?"}]
        and sent[0]["stream"]
        and sent[0]["model"] == "share4v-7b"
    )
    assert " s" in page.inner_text(".stats") and page.inner_text(".stats").startswith(
        f"{len(host.engine.encoder.tokenizer.encode('Three boats.'))} tokens"
    )
    assert page.input_value("#text") == "" and page.locator("#welcome").is_hidden()


def test_image_question_and_second_turn(page: Page, host: Running) -> None:
    sent = bodies_of(page)
    page.set_input_files("#file", PNG)
    expect(page.locator("#preview")).to_be_visible()
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 300
    send_message(page, "What is it?")
    wait_for_answers(page)
    assert page.locator("#chip").is_hidden() and page.locator(".user img").is_visible()
    assert host.engine.requests[-1].prompt.pixels.size(0) == 1
    first = page.inner_text(".answer")
    send_message(page, "And now?")
    wait_for_answers(page, 2)
    image, again = sent[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and again == {
        "type": "text",
        "text": "What is it?",
    }
    assert sent[1]["messages"] == [
        sent[0]["messages"][0],
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]


def test_a_new_image_starts_a_new_conversation(page: Page) -> None:
    sent = bodies_of(page)
    page.click(".example >> nth=1")
    wait_for_answers(page)
    page.set_input_files("#file", PNG)
    expect(page.locator("#chip-note")).to_contain_text("new conversation")
    send_message(page, "This one?")
    wait_for_answers(page)
    assert len(sent) == 2 and len(sent[1]["messages"]) == 1
    assert page.locator(".user").count() == 1


def test_streaming_and_stop(page: Page, host: Running) -> None:
    host.engine.step_s = SLOW_S
    send_message(page, "Tell me")
    wait_for(page, "document.querySelector('.answer')?.textContent.length > 5")
    first = page.inner_text(".answer")
    wait_for(page, f"document.querySelector('.answer').textContent.length > {len(first)}")
    assert page.inner_text(".answer").startswith(first)
    assert page.locator("#send").is_hidden()
    cancelled = len(host.engine.cancelled)
    page.click("#stop")
    wait_for_answers(page)
    until(lambda: len(host.engine.cancelled) == cancelled + 1 and not host.engine.running)
    text = page.inner_text(".answer")
    assert page.inner_text(".stats").startswith("stopped · ") and page.evaluate("document.activeElement.id") == "text"
    host.engine.step_s = 0.0
    sent = bodies_of(page)
    send_message(page, "Go on")
    wait_for_answers(page, 2)
    assert sent[0]["messages"][1] == {"role": "assistant", "content": text}, "text before Stop stays in the history"
    host.engine.step_s = SLOW_S
    send_message(page, "More")
    wait_for(page, "document.querySelectorAll('.answer')[2]?.textContent.length > 5")
    page.keyboard.press("Escape")
    wait_for_answers(page, 3)


def test_regenerate_replaces_the_last_answer_and_keeps_the_image(page: Page) -> None:
    sent = bodies_of(page)
    page.set_input_files("#file", PNG)
    send_message(page, "What is it?")
    wait_for_answers(page)
    first = page.inner_text(".answer")
    send_message(page, "Anything else?")
    wait_for_answers(page, 2)
    second = page.inner_text(".answer >> nth=1")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    page.get_by_role("button", name="Regenerate").click()
    wait_for(
        page,
        "(old) => { const a = document.querySelectorAll('.answer')[1]; return a.ariaBusy === 'false' && "
        "a.textContent !== old; }",
        second,
    )
    assert page.inner_text(".answer >> nth=0") == first and page.locator(".answer").count() == 2
    assert sent[2]["messages"] == sent[1]["messages"] and sent[2]["messages"][0]["content"][0]["type"] == "image_url"


def test_clear_starts_a_new_conversation(page: Page) -> None:
    page.click(".example >> nth=0")
    wait_for_answers(page)
    page.click("#clear")
    assert (
        page.locator(".turn").count() == 0
        and page.locator("#welcome").is_visible()
        and page.locator("#clear").is_disabled()
    )
    sent = bodies_of(page)
    send_message(page, "Who are you?")
    wait_for_answers(page)
    assert sent[0]["messages"] == [{"role": "user", "content": "Who are you?"}]


def test_parameters_reach_the_request_and_survive_reload(page: Page) -> None:
    sent = bodies_of(page)
    assert page.locator("#parameters").is_visible()
    for name, value in (
        ("temperature", "0.9"),
        ("top_p", "0.4"),
        ("max_tokens", "32"),
        ("seed", "5"),
        ("system", "Be brief."),
    ):
        page.fill(f"#{name}", value)
    send_message(page, "Hi")
    wait_for_answers(page)
    assert {name: sent[0][name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.9,
        "top_p": 0.4,
        "max_tokens": 32,
        "seed": 5,
    }
    assert sent[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "cut at the maximum" in page.inner_text(".stats")
    page.reload()
    page.wait_for_selector("[data-state=ready]")
    assert page.input_value("#temperature") == "0.9" and page.inner_text("output[for=temperature]") == "0.9"
    page.click("#defaults")
    send_message(page, "Hi")
    wait_for_answers(page)
    assert (sent[1]["temperature"], sent[1]["top_p"], sent[1]["max_tokens"], "seed" in sent[1]) == (
        0.2,
        0.7,
        512,
        False,
    )


def test_invalid_images_show_an_error_and_the_page_stays_usable(page: Page) -> None:
    for file, message in (
        (
            {"name": "large.png", "mimeType": "image/png", "buffer": picture(size=(600, 400))},
            "large.png has 0.7 MB|large.png has 721 kB",
        ),
        ({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}, "notes.txt is not an image"),
        ({"name": "torn.png", "mimeType": "image/png", "buffer": b"no image"}, "torn.png is damaged"),
    ):
        page.set_input_files("#file", file)
        expect(page.locator("#alert")).to_be_visible()
        assert any(part in page.inner_text("#alert") for part in message.split("|")), page.inner_text("#alert")
        page.set_input_files("#file", PNG)
        expect(page.locator("#alert")).to_be_hidden()
        page.click("#detach")
    send_message(page, "Still there?")
    wait_for_answers(page)


def test_markup_is_shown_as_text(page: Page, host: Running) -> None:
    evil = "<b>bold</b> <img src=x onerror=alert(1)> **strong** <script>window.hit=1</script> &amp;"
    host.engine.answer = lambda engine, request: evil
    send_message(page, f"say {evil}")
    wait_for_answers(page)
    assert page.inner_text(".answer") == evil and page.inner_text(".bubble") == f"say {evil}"
    assert page.locator(".answer *, .bubble *").count() == 0 and page.evaluate("window.hit") is None


def test_typed_placeholder_stays_text(page: Page, host: Running) -> None:
    page.set_input_files("#file", PNG)
    send_message(page, "What does <image> mean?")
    wait_for_answers(page)
    prompt = host.engine.requests[-1].prompt
    assert prompt.image_slots.numel() == 16 and "<image>" in host.engine.encoder.tokenizer.decode(
        prompt.token_ids.tolist()
    )


def test_failure_then_retry(open_page: Callable[..., Page]) -> None:
    page = open_page(expected=("ERR_FAILED", "429"))
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send_message(page, "Hello?")
    expect(page.locator(".oops")).to_contain_text("cannot be reached")

    def busy(route: Route) -> None:
        route.fulfill(
            status=429,
            headers={"retry-after": "3"},
            json={"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": 429}},
        )

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", busy)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".oops")).to_contain_text("Try again in 3 seconds")
    page.unroute("**/v1/chat/completions")
    sent = bodies_of(page)
    page.get_by_role("button", name="Retry").click()
    wait_for_answers(page)
    expect(page.locator(".oops")).to_have_count(0)
    assert sent[0]["messages"] == [{"role": "user", "content": "Hello?"}] and page.inner_text(".answer")


def test_too_long_conversation_shows_a_message(open_page: Callable[..., Page]) -> None:
    page = open_page(expected=("400",))
    send_message(page, "cat " * 700)
    expect(page.locator(".oops")).to_contain_text("Exceeds max token length. Please start a new conversation.")


def test_server_that_needs_a_key(open_page: Callable[..., Page], browser: Browser, encoder: Encoder) -> None:
    with running(encoder, api_key="open sesame") as guarded:
        page = browser.new_page()
        page.goto(guarded.url)
        expect(page.locator("#model-name")).to_have_text("key needed")
        page.fill("#key", "open sesame")
        page.press("#key", "Tab")
        expect(page.locator("#model-name")).to_have_text("share4v")
        send_message(page, "Hi")
        wait_for_answers(page)
        assert page.inner_text(".answer")
        page.close()


def test_enter_and_shift_enter(page: Page) -> None:
    page.click("#text")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#text") == "one\ntwo" and page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    wait_for_answers(page)
    assert page.inner_text(".bubble") == "one\ntwo"


def test_paste_drop_and_copy(open_page: Callable[..., Page], host: Running) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    transfer = """async (kind) => {
      const canvas = document.querySelector('.example canvas');
      const blob = await new Promise((done) => canvas.toBlob(done));
      const data = new DataTransfer();
      data.items.add(new File([blob], `${kind}.png`, { type: 'image/png' }));
      const target = document.querySelector('#text');
      if (kind === 'paste')
        target.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true }));
      else for (const step of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(step, { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    for kind in ("paste", "drop"):
        page.evaluate(transfer, kind)
        expect(page.locator("#chip-name")).to_have_text(f"{kind}.png")
        page.click("#detach")
    send_message(page, "Hi")
    wait_for_answers(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text(".answer")


def test_keyboard_and_screen_reader(page: Page) -> None:
    named = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([aria-hidden]), textarea, select')]
             .filter((e) => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert named == []
    page.focus("#tab-chat")
    order = ["tab-chat"]
    for _ in range(11):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert order == [
        "tab-chat",
        "theme",
        "settings",
        "log",
        "example",
        "example",
        "example",
        "attach",
        "text",
        "temperature",
        "top_p",
        "max_tokens",
    ]
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert (
        page.evaluate("document.activeElement.id") == "tab-captioner"
        and page.locator("#captioner").is_visible()
        and page.locator("#chat").is_hidden()
    )
    page.keyboard.press("ArrowLeft")
    send_message(page, "Hi")
    wait_for_answers(page)
    assert page.get_attribute(".answer", "aria-live") == "polite" and page.get_attribute("#log", "role") == "log"
    assert page.locator("main").locator("visible=true").first.get_attribute("role") == "tabpanel"


def test_server_restart(open_page: Callable[..., Page], encoder: Encoder) -> None:
    with running(encoder) as first:
        port = int(first.url.rpartition(":")[2])
        page = open_page(url=first.url, expected=("ERR_",))
        send_message(page, "Hi")
        wait_for_answers(page)
    send_message(page, "Hello?")
    expect(page.locator(".oops")).to_contain_text("cannot be reached")
    with running(encoder, port=port):
        page.get_by_role("button", name="Retry").click()
        wait_for_answers(page, 2)
        assert page.inner_text(".answer >> nth=1")
        page.close()
