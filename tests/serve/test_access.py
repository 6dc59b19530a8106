"""Access: host names against DNS rebinding, pages of other origins, and where the key comes from."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from server_fixture import Running, running

from megatron_share4v.config.load import from_options
from megatron_share4v.config.serve import ServeConfig, find_api_key
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.errors import ConfigError

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
PAGE = "https://chat.example.com"


def status(server: Running, host: str, path: str = "/health") -> int:
    return httpx.get(f"{server.url}{path}", headers={"host": host}, timeout=20).status_code


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("a.localhost.", 200),
        ("127.0.0.1:1", 200),
        ("192.168.7.7", 200),
        ("[::1]:8000", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("a:b:c", 403),
        ("localhost@evil", 403),
    ],
)
def test_foreign_host_names_are_refused(server: Running, host: str, expected: int) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert status(server, host, path) == expected
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers={"host": host}, timeout=20)
    assert answer.status_code == expected
    if expected == 403:
        assert "DNS rebinding" in answer.json()["error"]["message"] and answer.headers["x-request-id"]


def test_allowed_hosts(encoder: Encoder) -> None:
    with running(encoder, allowed_hosts=("gpu1", "*.example.com")) as server:
        assert [status(server, host) for host in ("gpu1:80", "GPU1", "a.example.com", "localhost")] == [200] * 4
        assert [status(server, host) for host in ("gpu2", "example.com", "aexample.com")] == [403] * 3
    with running(encoder, allowed_hosts=("*",)) as server:
        assert status(server, "evil.example") == 200
    with running(encoder, api_key="k") as server:
        assert status(server, "api.example.com") == 200
    with running(encoder, api_key="k", allowed_hosts=("gpu1",)) as server:
        assert [status(server, "gpu1"), status(server, "api.example.com")] == [200, 403]


def test_pages_of_other_origins_have_no_access_by_default(server: Running) -> None:
    answer = httpx.options(f"{server.url}/v1/chat/completions", headers=PREFLIGHT | {"origin": PAGE})
    assert answer.status_code == 405
    answer = httpx.get(f"{server.url}/v1/models", headers={"origin": PAGE})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_pages_of_allowed_origins_have_access(encoder: Encoder) -> None:
    with running(encoder, allowed_origins=(PAGE,), api_key="k") as server:
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.options(url, headers=PREFLIGHT | {"origin": PAGE})  # without the key: browsers send none
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        answer = httpx.options(url, headers=PREFLIGHT | {"origin": "https://evil.example"})
        assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
        headers = {"origin": PAGE, "authorization": "Bearer k"}
        answer = httpx.post(url, json=body, headers=headers, timeout=20)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        answer = httpx.post(url, json=body, headers={"origin": PAGE}, timeout=20)  # a page can read this error
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allowed_origins": ("chat.example.com",)}, "must be http://NAME, https://NAME"),
        ({"allowed_origins": ("https://a.example/path",)}, "'https://a.example/path' must be"),
        ({"allowed_hosts": ("http://a.example",)}, "without scheme, port and path"),
        ({"allowed_hosts": ("a.example:80",)}, "'a.example:80' must be a name"),
    ],
)
def test_bad_names_are_refused_at_start(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_options(ServeConfig, options)


def test_key_from_option_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARE4V_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert find_api_key(option=None, file=None) is None
    monkeypatch.setenv("SHARE4V_API_KEY", "from-environment")
    assert find_api_key(option=None, file=None) == "from-environment"
    assert find_api_key(option=None, file=file) == "from-file"
    assert find_api_key(option="from-option", file=None) == "from-option"
    with pytest.raises(ConfigError, match="both given"):
        find_api_key(option="a", file=file)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_api_key(option=None, file=tmp_path / "none")
    for text in ("", "two words"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="the key and nothing else"):
            find_api_key(option=None, file=file)
