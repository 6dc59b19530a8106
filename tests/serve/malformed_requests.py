"""Malformed requests generated from a seed, and raw connections to send them. For test_malformed_requests.py."""

from __future__ import annotations

import base64
import copy
import json
import socket
import struct
import zlib
from dataclasses import dataclass
from random import Random

from server_fixture import data_url, picture

PNG, JPEG, WEBP, GIF, BMP = (picture(form=form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"))
JUNK = [
    None,
    True,
    False,
    0,
    -1,
    3.5,
    1e308,
    -(2**63) - 1,
    10**40,
    "",
    "x",
    "\ud800",
    "\x00",
    "<image>",
    "</s>",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [{}],
    ["a"] * 3000,
    "y" * 70_000,
    {"type": "text"},
    [{"type": "image_url"}],
    [{"type": "text", "text": 5}],
    [[[[[[]]]]]],
    "NaN",
    "💥" * 100,
    -0.0,
]
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/api"]
ODD_PATHS = [
    "/",
    "/v1",
    "/v1/models/../x",
    "/v1/models/%00",
    "/etc/passwd",
    "/..%2f..%2fetc/passwd",
    "/v1/chat/completions/",
    "//",
    "/v1/responses",
    "/%ff",
    "/x" * 900,
]


@dataclass(frozen=True)
class RawRequest:
    """Bytes to send. whole: whether they are a complete request, which gets a response."""

    data: bytes
    whole: bool = True
    kind: str = ""


def chat(url: str = "") -> dict:
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url or data_url(PNG)}}]
    return {
        "model": "share4v",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 3,
        "temperature": 0.5,
        "seed": 1,
        "stop": ["\n"],
    }


def _valid(random: Random) -> tuple[str, dict]:
    bodies = {
        "/v1/chat/completions": chat() | {"n": 2, "logprobs": True, "top_logprobs": 2, "stream": random.random() < 0.3},
        "/v1/completions": {
            "prompt": ["a", "b"],
            "max_tokens": 3,
            "echo": True,
            "logprobs": 1,
            "stream": random.random() < 0.3,
        },
        "/tokenize": {"prompt": "some text"},
        "/detokenize": {"tokens": [1, 5, 300]},
        "/api": {
            "prompts": ["a <image>"],
            "images": [[data_url(PNG)]],
            "tokens_to_generate": 3,
            "logprobs": True,
            "top_k": 1,
            "top_p": 0.5,
        },
    }
    path = random.choice(PATHS)
    return path, copy.deepcopy(bodies[path])


def _nested_values(value: object) -> list[tuple[object, object]]:
    """(container, key) of every nested value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [item for key in keys for item in [(value, key), *_nested_values(value[key])]]


def mutated(random: Random) -> RawRequest:
    """A valid request with one to three values replaced."""
    path, body = _valid(random)
    for _ in range(random.randint(1, 3)):
        container, key = random.choice(_nested_values(body))
        container[key] = copy.deepcopy(random.choice(JUNK))
    if random.random() < 0.2:
        body[
            random.choice(
                [
                    "n",
                    "tools",
                    "stream_options",
                    "best_of",
                    "suffix",
                    "extra",
                    "max_tokens",
                    "min_tokens",
                    "top_k",
                    "beam_width",
                ]
            )
        ] = copy.deepcopy(random.choice(JUNK))
    return post(path, json.dumps(body).encode("utf-8", "surrogatepass"))


def invalid_json(random: Random) -> RawRequest:
    """Bodies that are not JSON, or unusual JSON."""
    text = json.dumps(chat()).encode()
    options = [
        b"[" * random.randint(1, 60_000),
        b'{"a":' * 30_000,
        text[: random.randrange(len(text))],
        random.randbytes(random.randrange(400)),
        b"",
        b"null",
        b"5",
        b'{"messages": NaN}',
        b'{"max_tokens": 1e999, "prompt": "a"}',
        b'{"seed": ' + b"9" * 6000 + b"}",
        b'{"model": "\\ud800"}',
        b"\xff\xfe{}",
        b'"' + b"a" * 50_000,
        b'{"prompt": ' + json.dumps(list(range(30_000))).encode() + b"}",
        b'{"prompt": "' + b"cat " * 40_000 + b'"}',
        b'{"a":1}' * 1000,
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 1500}).encode(),
        json.dumps({f"k{i}": i for i in range(20_000)}).encode(),
    ]
    return post(random.choice(PATHS), random.choice(options))


def bad_image(random: Random) -> RawRequest:
    """A chat whose image is damaged, not an image, or a decompression bomb."""
    file = random.choice([PNG, JPEG, WEBP, GIF, BMP])
    cut = file[: random.randrange(1, len(file))]
    noisy = bytearray(file)
    for _ in range(8):
        noisy[random.randrange(len(noisy))] = random.randrange(256)
    good = data_url(PNG)
    url = random.choice(
        [
            data_url(cut),
            data_url(bytes(noisy)),
            data_url(random.randbytes(300)),
            data_url(random.choice(BOMBS)),
            data_url(b""),
            good[:-3],
            good + "!",
            good[:40] + "\n" + good[40:],
            good.replace("image/png", "text/html"),
            good.replace(";base64", ""),
            "data:",
            "data:image/png;base64," + "=" * 40,
            "data:image/png;base64,é",
            good.replace("base64,", "base64,%"),
            "data:" + ";a=b" * 200 + ";base64,AAAA",
            "ftp://example.com/a.png",
            "file:///etc/passwd",
            "",
            "x" * 3000,
        ]
    )
    return post("/v1/chat/completions", json.dumps(chat(url)).encode())


def odd_http(random: Random) -> RawRequest:
    """Wrong methods, paths, headers and sizes; chunked bodies."""
    body = json.dumps(chat()).encode()
    path = random.choice([*PATHS, *ODD_PATHS])
    method = random.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
    choice = random.randrange(7)
    if choice == 0:
        return RawRequest(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
            kind="head" if method == "HEAD" else "",
        )
    if choice == 1:
        return post(
            path,
            body,
            kind=random.choice(
                ["text/plain", "", "multipart/form-data; boundary=x", "application/json; charset=utf-16"]
            ),
        )
    if choice == 2:
        return RawRequest(
            (
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                "Content-Length: 99999999999\r\n\r\n{"
            ).encode()
        )
    if choice == 3:
        return RawRequest(random.randbytes(200) + b"\r\n\r\n", kind="not http")
    if choice == 4:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        ).encode()
        return RawRequest(
            head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:50], body[50:])) + b"0\r\n\r\n"
        )
    if choice == 5:
        return post(path, body, extra=f"X-Long: {'a' * 30_000}\r\n")
    return post(path, body, extra="Authorization: Bearer ÿ\r\nExpect: 100-continue\r\n" * random.randint(1, 2))


def aborted(random: Random) -> RawRequest:
    """A request that is cut off, or whose response is not read."""
    data = post(
        "/v1/chat/completions", json.dumps(chat() | {"stream": random.random() < 0.5, "max_tokens": 300}).encode()
    ).data
    return RawRequest(data if random.random() < 0.5 else data[: random.randrange(20, len(data))], whole=False)


def generate(random: Random) -> RawRequest:
    """A request of a random kind."""
    kinds = ((mutated, 46), (invalid_json, 14), (bad_image, 20), (odd_http, 12), (aborted, 8))
    return random.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0](random)


def post(path: str, body: bytes, *, kind: str = "application/json", extra: str = "") -> RawRequest:
    """A complete request; /api takes PUT."""
    method = "PUT" if path == "/api" else "POST"
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        f"{extra}Content-Length: {len(body)}\r\n\r\n"
    )
    return RawRequest(head.encode("latin-1") + body)


def exchange(port: int, raw: RawRequest, *, timeout_s: float) -> tuple[int, bytes] | None:
    """Status and body; None when not awaited. Raises TimeoutError when the server hangs."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        try:
            connection.sendall(raw.data)
        except (BrokenPipeError, ConnectionResetError):
            if not raw.whole:
                return None
        if not raw.whole:
            return None
        received = bytearray()
        while chunk := connection.recv(1 << 16):
            received += chunk
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    return status, b"" if raw.kind == "head" else body


def _png(width: int, height: int, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * 4_000_000, 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    data = b"k\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


LONG_TEXT = _png(16, 16, _text_bomb())
BOMBS = [
    _png(30_000, 30_000),
    _png(12_000, 12_000),
    _png(7_500, 7_500),  # 56 million pixels: below Pillow's limit, above the server's
    _png(1_000_000, 1),
    b"GIF89a" + struct.pack("<HH", 65535, 65535) + GIF[10:],
    BMP[:18] + struct.pack("<ii", 40_000, 40_000) + BMP[26:],
    b"RIFF"
    + struct.pack("<I", 30)
    + b"WEBPVP8X"
    + struct.pack("<I", 10)
    + b"\0\0\0\0"
    + struct.pack("<I", 16_000)[:3]
    + struct.pack("<I", 16_000)[:3],
    b"RIFF" + base64.b64decode("AAAAAA==") + b"WEBPVP8L" + b"\xff" * 40,
]
