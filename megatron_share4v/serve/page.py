"""The page at /, with a content security policy that allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><defs><linearGradient id="a" x1="0" y1="0" '
    'x2="1" y2="1"><stop stop-color="#7c6cff"/><stop offset="1" '
    'stop-color="#2fb7c6"/></linearGradient></defs><rect width="32" height="32" rx="9" fill="url(#a)"/><path '
    'd="M5.5 16c2.8-5 6.3-7.5 10.500-7.500S23.700 11 26.500 16c-2.800 5-6.300 7.500-10.500 7.500S8.300 21 '
    '5.500 16Z" fill="#fff"/><circle cx="16" cy="16" r="4.200" fill="#4b3fd0"/><circle cx="17.500" '
    'cy="14.500" r="1.300" fill="#fff"/></svg>'
)


def content_security_policy(page: str) -> str:
    """Policy with scripts and styles by hash, and connections and images from this origin."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for "
        "'script'; trusted-types 'none'"
    )


def routes() -> list[Route]:
    """Routes of the page and its icon."""
    page = resources.files("megatron_share4v.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_security_policy(page),
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
    }
    body = page.encode()

    async def show(request: Request) -> Response:
        return Response(body, media_type="text/html", headers=headers)

    async def icon(request: Request) -> Response:
        return Response(ICON, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})

    return [Route("/", show, methods=["GET"]), Route("/favicon.ico", icon, methods=["GET"])]
