"""Images in requests: accepted ones equal training's decoding, others are rejected; fetching of URLs."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import ipaddress
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import slow_images
from malformed_requests import BOMBS, LONG_TEXT
from PIL import Image
from server_fixture import Running, data_url, picture, running, until

from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.images.fetch import ImageFetcher, is_public


def ask(server: Running, url: str) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": parts}], "max_tokens": 1},
        timeout=20,
    )


def encode_image(mode: str, form: str, **options) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(size=(50, 30)))).convert(mode).save(file, form, **options)
    return file.getvalue()


def animation() -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_image("RGB", "JPEG", exif=exif)


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(file, "PNG")
    return file.getvalue()


ACCEPTED = {
    **{
        f"{form} {mode}": encode_image(mode, form)
        for form, mode in [
            ("PNG", "RGB"),
            ("PNG", "RGBA"),
            ("PNG", "LA"),
            ("PNG", "P"),
            ("PNG", "1"),
            ("JPEG", "L"),
            ("JPEG", "CMYK"),
        ]
    },
    **{form: encode_image("RGB", form) for form in ("WEBP", "GIF", "BMP")},
    "animated GIF": animation(),
    "rotated by EXIF": exif_rotated(),
    "16 bit": sixteen_bit(),
    "long text chunk": LONG_TEXT,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_decoded_as_in_training(server: Running, encoder: Encoder, name: str) -> None:
    answer = ask(server, data_url(ACCEPTED[name], "image/whatever"))
    assert answer.status_code == 200, answer.text
    assert np.array_equal(server.engine.requests[0].prompt.pixels[0].numpy(), decode(ACCEPTED[name], encoder.images))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_images_are_rejected(server: Running, form: str) -> None:
    data = picture(form=form, size=(80, 60))
    answer = ask(server, data_url(data[: len(data) * 2 // 3]))
    assert answer.status_code == 400 and "image" in answer.json()["error"]["message"] and not server.engine.requests


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_decompression_bombs_are_rejected_at_once(server: Running, number: int) -> None:
    start = time.monotonic()
    answer = ask(server, data_url(BOMBS[number]))
    assert answer.status_code == 400 and time.monotonic() - start < 10, answer.text


@pytest.mark.parametrize(
    ("size", "words"), [((9000, 7200), "accepted are 1 to 50000000"), ((20_000, 20_000), "are accepted, 50000000")]
)
def test_too_many_pixels_name_the_limit_of_the_server(server: Running, size: tuple[int, int], words: str) -> None:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    answer = ask(server, data_url(file.getvalue()))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("name", slow_images.BOMBS)
def test_slow_images_are_rejected_before_decoding(server: Running, name: str) -> None:
    answer = ask(server, data_url(slow_images.BOMBS[name]()))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("messages[0]"), answer.text
    assert error["message"].startswith(f"{error['param']}: image is a JPEG of ")


class BlockedPool:
    """A decode pool whose images are decoded when `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def decode(self, request: object) -> np.ndarray:
        assert self.release.wait(60)
        return np.zeros((32, 32, 3), dtype=np.uint8)

    def close(self) -> None:
        self.release.set()


def test_text_never_waits_for_images_and_their_queue_is_bounded(encoder: Encoder) -> None:
    with running(encoder, image_workers=2, max_waiting_images=3) as server, ThreadPoolExecutor(8) as clients:
        images = server.app.state.prompt_builder.images
        images.pool.close()
        images.pool = pool = BlockedPool()
        asked = [clients.submit(ask, server, data_url(picture(seed=seed))) for seed in range(5)]
        until(lambda: images.waiting == 5)
        refused = ask(server, data_url(picture()))
        assert refused.status_code == 429 and "3 images are waiting" in refused.json()["error"]["message"]
        for path, body in {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "What?"}]},
            "/v1/completions": {"prompt": "What?"},
            "/tokenize": {"prompt": "What?"},
        }.items():
            assert httpx.post(f"{server.url}{path}", json=body, timeout=20).status_code == 200
        assert httpx.put(f"{server.url}/api", json={"prompts": ["What?"]}, timeout=20).status_code == 200
        assert images.waiting == 5 and not any(one.done() for one in asked)
        pool.release.set()
        assert [one.result().status_code for one in asked] == [200] * 5
        assert images.waiting == 0


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (data_url(encode_image("RGB", "TIFF")), "not an image in PNG, JPEG, WebP, GIF or BMP format"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "not an image in PNG"),
        (data_url(picture(), "text/html"), "the type text/html; write image/png"),
        (data_url(picture(), "application/octet-stream"), "the type application/octet-stream; write image/png"),
        (data_url(picture())[:-1], "lacks its padding"),
        (data_url(picture()) + "\n", "spaces or line breaks"),
        (data_url(picture()).replace("base64,", "base64, "), "spaces or line breaks"),
        (urllib.parse.quote(data_url(b"\xff\xfe" * 30), safe=":;,/"), "is percent-encoded"),
        ("data:image/png;base64," + base64.urlsafe_b64encode(b"\xff\xfe" * 30).decode(), "URL-safe alphabet"),
        (f"data:image/png;base64,{base64.b64encode(picture())}", "repr of Python's bytes"),
        (data_url(picture()) + "!", "has '!' at character"),
        ("data:image/png;base64,", "nothing after its comma"),
        ("data:image/png,abc", "has no ;base64"),
        ("data:image/png", "must begin with data:image/TYPE;base64,"),
        (base64.b64encode(picture()).decode(), "bare base64; write data:image/png;base64, before it"),
        (base64.b64encode(picture(form="JPEG")).decode(), "bare base64; write data:image/jpeg;base64, before it"),
        (f'"{data_url(picture())}"', "quoted twice"),
        ("https://example.com/a.png", "does not fetch images"),
        ("file:///etc/passwd", "looks like a path"),
        ("C:\\pictures\\a.png", "looks like a path"),
        ("holiday.jpeg", "looks like a path"),
        ("blob:http://x/1", "blob: URLs are not supported"),
        ("ftp://example.org/a.png", "ftp: URLs are not supported"),
        ("the cat", "'the cat' is not a URL"),
        ("data:image/png;base64,iVBORw==iVBORw==", "has padding (=) in its middle"),
        ("data:image/png;base64,iVBORw", "has 6 characters, which must be a multiple of 4"),
        ("", "is empty"),
    ],
)
def test_rejections_name_the_message(server: Running, url: str, words: str) -> None:
    answer = ask(server, url)
    assert (
        answer.status_code == 400
        and words in answer.json()["error"]["message"]
        and answer.json()["error"]["param"] == "messages[0].content[0]"
    ), answer.text


def test_byte_limit(encoder: Encoder) -> None:
    data = picture(size=(80, 60))
    with running(encoder, max_image_bytes=len(data)) as server:
        assert ask(server, data_url(data)).status_code == 200
        answer = ask(server, data_url(data + b"0"))
        assert (
            answer.status_code == 400
            and f"{len(data) + 1} bytes; accepted are {len(data)}" in answer.json()["error"]["message"]
        )


def test_typed_placeholder_is_text(server: Running, encoder: Encoder) -> None:
    parts = [{"type": "text", "text": "<image> a<image>b"}, {"type": "image_url", "image_url": data_url(picture())}]
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "<image>"}]})
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "<image>"})
    first, second, third = (request.prompt for request in server.engine.requests)
    tokenizer = encoder.tokenizer
    assert first.image_slots.numel() == 16 and first.pixels.size(0) == 1
    after = first.token_ids[int(first.image_slots[-1]) + 1 :].tolist()
    assert after == tokenizer.encode("\n<image> a<image>b ASSISTANT:")
    assert second.image_slots.numel() == 0 and "USER: <image> ASSISTANT:" in tokenizer.decode(second.token_ids.tolist())
    assert third.token_ids.tolist() == [1, *tokenizer.encode("<image>")]


# Fetching of image URLs.

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "0.0.0.0",
    "100.64.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "198.18.0.1",
    "192.0.2.1",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "ff02::1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
    "::7f00:1",
    "2001:db8::1",
]


def test_public_addresses() -> None:
    assert [text for text in PRIVATE if is_public(ipaddress.ip_address(text))] == []
    assert all(
        is_public(ipaddress.ip_address(text)) for text in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8")
    )


class ImageHost(http.server.BaseHTTPRequestHandler):
    """Web server with the files of the fetch tests."""

    def do_GET(self) -> None:
        data = picture()
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        if self.path == "/slow":
            time.sleep(1.5)
        self.send_response(200)
        if self.path == "/large":
            data = b"x" * 200_000
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keep the test output quiet."""


@pytest.fixture(scope="module")
def image_host() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ImageHost) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class FakeResolver:
    """A resolver with fixed answers that counts its calls."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.hosts = list(answers), []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.hosts.append(host)
        return self.answers.pop(0)


def fetch(
    url: str, *answers: list[str], accepts=lambda address: True, domains: tuple[str, ...] = (), **options
) -> bytes:
    settings = {"max_bytes": 100_000, "timeout_s": 1.0} | options
    fetcher = ImageFetcher(
        domains=domains,
        accepts=accepts,
        resolve=FakeResolver(*answers) if answers else FakeResolver(["127.0.0.1"]),
        **settings,
    )
    return asyncio.run(fetcher.fetch(url, place="here"))


def test_fetches_from_the_vetted_address_after_one_resolution(image_host: int) -> None:
    resolver = FakeResolver(["127.0.0.1"])  # a second resolution would raise
    fetcher = ImageFetcher(
        domains=("pictures.example",), max_bytes=100_000, timeout_s=5, accepts=lambda address: True, resolve=resolver
    )
    assert asyncio.run(fetcher.fetch(f"http://cdn.pictures.example:{image_host}/a.png?b=c", place="here")) == picture()
    assert resolver.hosts == ["cdn.pictures.example"]
    assert fetch(f"http://a.example:{image_host}/endless") == picture()


@pytest.mark.parametrize(
    ("url", "answers", "accepts", "words"),
    [
        ("http://a.example:{port}/", [["8.8.8.8", "127.0.0.1"]], is_public, "not on the public internet"),
        ("http://a.example:{port}/", [["::ffff:127.0.0.1"]], is_public, "not on the public internet"),
        ("http://a.example:{port}/", [["fe80::1%eth0"]], is_public, "not on the public internet"),
        ("http://a.example:{port}/", [[]], is_public, "not on the public internet"),
        ("http://a.example:{port}/redirect", [], None, "answers 302; redirects are not followed"),
        ("http://a.example:{port}/large", [], None, "more than 100000 bytes"),
        ("http://a.example:{port}/slow", [], None, "did not arrive within 1 s"),
        ("http://me:secret@a.example:{port}/", [], None, "credentials"),
        ("http://a.example:99999/", [], None, "cannot be read"),
        ("http://a.example :{port}/", [], None, "ASCII without spaces"),
        ("http://a.example\\@b/", [], None, "ASCII without spaces and backslashes"),
        ("ftp://a.example/", [], None, "must be http"),
        ("http:///a", [], None, "must be http"),
        ("http://a.example:1/", [], None, "cannot be fetched"),
    ],
)
def test_rejected_urls(image_host: int, url: str, answers: list[list[str]], accepts, words: str) -> None:
    options = {"accepts": accepts} if accepts else {}
    with pytest.raises(ApiError, match=words):
        fetch(url.format(port=image_host), *answers, **options)


def test_domain_allowlist(image_host: int) -> None:
    for host in ("b.example", "xa.example", "a.example.evil"):
        with pytest.raises(ApiError, match="from a.example only"):
            fetch(f"http://{host}:{image_host}/", domains=("a.example",))


def test_server_fetches_allowed_urls(encoder: Encoder, image_host: int) -> None:
    fetcher = ImageFetcher(domains=(), max_bytes=100_000, timeout_s=5, accepts=lambda address: True)
    with running(encoder, allow_image_urls=(), fetcher=fetcher) as server:
        assert ask(server, f"http://127.0.0.1:{image_host}/a.png").status_code == 200
        assert server.engine.requests[0].prompt.pixels.size(0) == 1
