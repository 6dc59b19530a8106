"""Captioning through an endpoint that answers, throttles, returns garbage, crashes or rejects."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from fake_endpoint import FakeServer, caption_of, completion, image_of, serving
from PIL import Image

from megatron_share4v.caption.endpoint import EndpointCaptioner
from megatron_share4v.caption.inputs import read_image_entries
from megatron_share4v.caption.job import JobOptions, run_job
from megatron_share4v.caption.records import CaptionRow, CaptionSettings, ImageEntry
from megatron_share4v.errors import ConfigError
from megatron_share4v.infer.answer_log import DPGroup
from megatron_share4v.remote.openai_client import MAX_RETRY_WAIT_S, Endpoint

COUNT = 12


@pytest.fixture
def pictures(tmp_path: Path) -> list[ImageEntry]:
    """COUNT images with different bytes."""
    for number in range(COUNT):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(buffer, format="PNG" if number % 2 else "JPEG")
        (tmp_path / f"{number:02}.{'png' if number % 2 else 'jpg'}").write_bytes(buffer.getvalue())
    return read_image_entries(images_file=None, images=["."], root=tmp_path)


def caption(
    url: str,
    pictures: list[ImageEntry],
    *,
    waits: list[float] | None = None,
    settings: CaptionSettings = CaptionSettings(),
    **more,
) -> dict[str, CaptionRow]:
    endpoint = Endpoint(url=url, model="m", **{"concurrency": 4, "retries": 2, **more})
    captioner = EndpointCaptioner(endpoint, settings=settings, sleep=([] if waits is None else waits).append)
    return {row.path: row for rows in captioner(iter(pictures)) for row in rows}


def expected(picture: ImageEntry) -> CaptionRow:
    return CaptionRow(
        picture.id, picture.path, caption=f"caption {sum(picture.read())}", tokens=4, finish_reason="stop"
    )


def all_captioned(rows: dict[str, CaptionRow], pictures: list[ImageEntry]) -> bool:
    return rows == {picture.path: expected(picture) for picture in pictures}


def test_requests_and_captions(pictures: list[ImageEntry]) -> None:
    def slow(request: dict, number: int):
        time.sleep(0.02)
        return caption_of(request)

    with serving(slow) as (url, server):
        assert all_captioned(
            caption(url, pictures, key="secret", settings=CaptionSettings(prompt="What?", max_new_tokens=7)), pictures
        )
    assert len(server.requests) == COUNT and 2 <= server.most_at_once <= 4
    request = next(request for request in server.requests if image_of(request) == pictures[0].read())
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "What?"}
    others = {name: value for name, value in request.items() if name != "messages"}
    assert others == {"path": "/v1/chat/completions", "model": "m", "max_tokens": 7, "temperature": 0.0}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    kinds = {request["messages"][0]["content"][0]["image_url"]["url"].partition(";")[0] for request in server.requests}
    assert kinds == {"data:image/png", "data:image/jpeg"}


def test_sampling_sends_one_seed_per_image(pictures: list[ImageEntry]) -> None:
    settings = CaptionSettings(temperature=0.5, top_p=0.7, repetition_penalty=1.5, seed=3)
    with serving(lambda request, number: caption_of(request)) as (url, server):
        caption(url, pictures, settings=settings)
        caption(url, pictures[::-1], settings=settings)
    seeds = {image_of(request): request["seed"] for request in server.requests[:COUNT]}
    assert (
        seeds == {image_of(request): request["seed"] for request in server.requests[COUNT:]}
        and len(set(seeds.values())) == COUNT
    )
    assert {(request["top_p"], request["repetition_penalty"]) for request in server.requests} == {(0.7, 1.5)}


BROKEN = [
    (200, {}, b"<html>proxy</html>"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (200, {}, b'[{"choices": 3}]'),
    (200, {}, b"\xff\xfe" * 10),
    (200, {}, b"[" * 100_000),
    (200, {"Content-Length": "5000"}, b'{"choices": '),
    (429, {"Retry-After": "7"}, b"busy"),
    (500, {}, b"oops"),
    (503, {}, b""),
    FakeServer.HANG_UP,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken[0]} {broken[2][:12]!r}")
def test_transient_errors_are_retried(broken, pictures: list[ImageEntry]) -> None:
    waits: list[float] = []
    with serving(lambda request, number: broken if number < 2 else caption_of(request)) as (url, server):
        assert all_captioned(caption(url, pictures, waits=waits, timeout_s=5.0), pictures)
    assert len(server.requests) == 3 * COUNT and len(waits) == 2 * COUNT
    assert set(waits) == {7.0} if broken[0] == 429 else all(0.7 < wait < 2.6 for wait in waits)


def test_retry_after_is_limited(pictures: list[ImageEntry]) -> None:
    waits: list[float] = []
    with serving(lambda request, number: caption_of(request) if number else (429, {"Retry-After": "86400"}, b"")) as (
        url,
        _,
    ):
        caption(url, pictures, waits=waits)
    assert set(waits) == {MAX_RETRY_WAIT_S}


@pytest.mark.parametrize(
    "broken", [(500, {}, b"crashed"), (200, {}, b"{}"), (400, {}, b'{"error": {"message": "crashed: no such colour"}}')]
)
def test_permanently_failing_image_becomes_an_error_row(broken, pictures: list[ImageEntry]) -> None:
    bad = pictures[5].read()
    with serving(lambda request, number: broken if image_of(request) == bad else caption_of(request)) as (url, server):
        rows = caption(url, pictures)
    error = rows.pop(pictures[5].path).error
    assert ("crashed" in error or "not a chat completion" in error) and all_captioned(
        rows, [*pictures[:5], *pictures[6:]]
    )
    assert len(server.requests) == COUNT - 1 + (1 if broken[0] == 400 else 3)


@pytest.mark.parametrize("broken", [(503, {}, b"down"), (400, {}, b"max_tokens is too large"), FakeServer.HANG_UP])
def test_dead_endpoint_ends_the_job_without_error_rows(broken, pictures: list[ImageEntry], tmp_path: Path) -> None:
    options = JobOptions(save_path=tmp_path / "out.json", images=(".",), images_root=tmp_path)
    (tmp_path / "zz.png").write_bytes(b"broken")

    def job(url: str):
        captioner = EndpointCaptioner(
            Endpoint(url=url, model="m", concurrency=2, retries=1),
            settings=CaptionSettings(),
            sleep=lambda seconds: None,
        )
        return run_job(captioner, options, settings=CaptionSettings(), model="m", share=DPGroup())

    down = [False]
    with serving(lambda request, number: broken if down[0] else caption_of(request)) as (url, _):
        down[0] = True
        with pytest.raises(ConfigError, match="got no caption.*finished captions are kept"):
            job(url)
        assert not (tmp_path / "out.json").exists()
        down[0] = False
        summary = job(url)
    assert (summary.captions, summary.errors) == (COUNT, 1)
    assert json.loads((tmp_path / "out.json").read_text())[0] == {pictures[0].path: expected(pictures[0]).caption}


def test_dead_endpoint_with_few_images(pictures: list[ImageEntry]) -> None:
    with (
        serving(lambda request, number: (500, {}, b"")) as (url, _),
        pytest.raises(ConfigError, match="the last 2 images"),
    ):
        caption(url, pictures[:2])


def test_connection_refused(pictures: list[ImageEntry]) -> None:
    with serving(lambda request, number: completion("x")) as (url, _):
        pass
    with pytest.raises(ConfigError, match="no response"):
        caption(url, pictures)


@pytest.mark.parametrize("code", [401, 404, 307])
def test_rejected_client_ends_the_job_at_once(code: int, pictures: list[ImageEntry]) -> None:
    with serving(lambda request, number: (code, {"Location": "http://127.0.0.1:9/elsewhere"}, b'{"error": "no"}')) as (
        url,
        server,
    ):
        with pytest.raises(ConfigError, match=f"HTTP {code}.*check URL"):
            caption(url, pictures, key="secret")
    assert len(server.requests) <= 8


def test_job_end_does_not_wait_for_retry_pauses(pictures: list[ImageEntry]) -> None:
    last = pictures[3].read()

    def answer(request: dict, number: int):
        time.sleep(0.2 * (image_of(request) == last))
        return (401, {}, b"") if image_of(request) == last else (429, {"Retry-After": "50"}, b"busy")

    with serving(answer) as (url, _):
        started = time.monotonic()
        captioner = EndpointCaptioner(Endpoint(url=url, model="m", concurrency=4), settings=CaptionSettings())
        with pytest.raises(ConfigError, match="HTTP 401"):
            list(captioner(iter(pictures)))
    assert time.monotonic() - started < 20, "the other requests are in a retry pause of 50 s"


def test_unreadable_images_are_not_sent(pictures: list[ImageEntry], tmp_path: Path) -> None:
    Path(pictures[0].file).write_bytes(b"no image")
    Path(pictures[1].file).unlink()
    with serving(lambda request, number: caption_of(request)) as (url, server):
        rows = caption(url, pictures)
    assert (
        "image cannot be read (8 bytes, text)" in rows.pop(pictures[0].path).error
        and "No such file" in rows.pop(pictures[1].path).error
    )
    assert all_captioned(rows, pictures[2:]) and len(server.requests) == COUNT - 2


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc", "http://"])
def test_invalid_urls_are_rejected(url: str) -> None:
    with pytest.raises(ConfigError, match="not an http"):
        EndpointCaptioner(Endpoint(url=url, model="m"), settings=CaptionSettings())
