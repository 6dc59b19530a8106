"""tools/caption.py end to end: killed and resumed, two DP ranks, TP 2, broken images, an endpoint."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from fake_endpoint import caption_of, serving
from forked_tools import Tool, run_tool
from hf_fixtures import write_llava_hf

from examples.quickstart.scenes import draw_scene, make_scene
from megatron_share4v.caption.job import JobOptions
from megatron_share4v.caption.records import CaptionSettings
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.launch import World

IMAGES, TOKENS = 24, 40
BROKEN = ("05.png", "17.png", "18.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and images/ with a list that has duplicates and broken images."""
    root = tmp_path_factory.mktemp("caption")
    import_model(HfSource(directory=write_llava_hf(root / "hf")), root / "model", options=ImportOptions())
    (root / "images").mkdir()
    names = [f"{number:02}.png" for number in range(IMAGES)]
    for number, name in enumerate(names):
        draw_scene(make_scene(0, "held_out", number), 64).save(root / "images" / name)
    (root / "images/05.png").write_bytes(b"no image")
    (root / "images/17.png").write_bytes((root / "images/16.png").read_bytes()[:300])
    (root / "images/18.png").unlink()
    (root / "list.json").write_text(json.dumps([*names, "03.png", "05.png", "03.png"]))
    return root


def command(place: Path, out: Path, *more: str) -> list[object]:
    given = ["--images-file", place / "list.json", "--images-root", place / "images"]
    given += ["--save-path", out / "captions.json", "--jsonl", out / "rows.jsonl", "--annotations", out / "train.json"]
    given += ["--batch-size", "3", "--max-new-tokens", TOKENS]
    model = [] if "--endpoint" in more else ["--model-name", place / "model"]
    return ["tools/caption.py", *model, *given, *more]


def run(place: Path, out: Path, *more: str, ranks: int = 1, **environment: str) -> CompletedProcess:
    return run_tool(*command(place, out, *more), ranks=ranks, environment={"OPENAI_API_KEY": ""} | environment)


def results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("captions.json", "rows.jsonl", "train.json")}


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> dict[str, bytes]:
    """Results of one process without interruption."""
    done = run(place, place / "whole")
    assert done.returncode == 3, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["images"], last["captions"], last["errors"]) == (IMAGES + 3, IMAGES - 1, 4)
    assert "4 images have no caption" in done.stderr and "05.png: image cannot be read" in done.stderr
    return results(place / "whole")


def test_broken_images_become_error_rows(uninterrupted: dict[str, bytes], place: Path) -> None:
    rows = [json.loads(line) for line in uninterrupted["rows.jsonl"].splitlines()]
    assert [row["path"] for row in rows] == json.loads((place / "list.json").read_text())
    assert [row["path"] for row in rows if row["error"]] == [*BROKEN, "05.png"]
    captions = {row["path"]: row["caption"] for row in rows if not row["error"]}
    assert len(set(captions.values())) > IMAGES // 2, "captions depend on the image"
    official = json.loads(uninterrupted["captions.json"])
    assert official == [{row["path"]: row["caption"]} for row in rows if not row["error"]]
    assert [entry["03.png"] for entry in official if "03.png" in entry] == [captions["03.png"]] * 3


def test_sigkill_and_resume(uninterrupted: dict[str, bytes], place: Path) -> None:
    out = place / "killed"
    process = Tool(*command(place, out))
    journal, deadline = out / "captions.json.journal/rank0.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline, process.output
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = journal.read_bytes().count(b"\n") - 1
    assert 7 <= kept < IMAGES + 3 and not (out / "captions.json").exists()
    done = run(place, out)
    assert done.returncode == 3, done.stderr
    assert results(out) == uninterrupted
    assert journal.read_bytes().count(b"\n") - 1 == IMAGES + 3, "nothing was captioned twice"


def test_two_ranks_equal_one(uninterrupted: dict[str, bytes], place: Path) -> None:
    out = place / "two"
    done = run(place, out, ranks=2)
    assert done.returncode == 3 and '"errors": 4' in done.stdout, done.stderr
    assert results(out) == uninterrupted
    counts = [path.read_bytes().count(b"\n") - 1 for path in sorted((out / "captions.json.journal").iterdir())]
    assert counts == [14, 13]


def test_tp2_equals_one(uninterrupted: dict[str, bytes], place: Path) -> None:
    done = run(place, place / "tensor", "--num_gpus", "2", ranks=2)
    assert '"errors": 4' in done.stdout, done.stderr
    assert results(place / "tensor") == uninterrupted


def test_beam_sampling_over_two_ranks_equals_one(place: Path) -> None:
    beams = [
        "--num-beams",
        "3",
        "--temperature",
        "1",
        "--repetition-penalty",
        "1.5",
        "--seed",
        "3",
        "--max-new-tokens",
        "12",
    ]
    one = run(place, place / "beams1", *beams)
    two = run(place, place / "beams2", *beams, "--num_gpus", "2", "--batch-size", "1", ranks=2)
    assert one.returncode == 3 and '"errors": 4' in two.stdout, one.stderr + two.stderr
    assert results(place / "beams1") == results(place / "beams2")
    repeated = [
        next(iter(entry.values()))
        for entry in json.loads((place / "beams1/captions.json").read_text())
        if "03.png" in entry
    ]
    assert len(set(repeated)) == 3, "each entry has its own seed"


def test_endpoint_without_a_model(place: Path) -> None:
    with serving(lambda request, number: caption_of(request) if number else (429, {"Retry-After": "0"}, b"")) as (
        url,
        server,
    ):
        more = ["--endpoint", url, "--endpoint-model", "m", "--shards", str(place / "remote/shards")]
        done = run(place, place / "remote", *more, OPENAI_API_KEY="sesame")
    assert done.returncode == 3, done.stderr
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame"}
    rows = [json.loads(line) for line in (place / "remote/rows.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows if row["error"]] == [*BROKEN, "05.png"]
    assert rows[0]["caption"] == f"caption {sum((place / 'images/00.png').read_bytes())}"
    assert (place / "remote/shards/shard-000000.tar").exists()


def test_local_server_gives_equal_captions(uninterrupted: dict[str, bytes], place: Path) -> None:
    options = ["--port", "0", "--api-key", "sesame", "--max-requests", "2", "--max-waiting", "1"]
    server = Tool("tools/serve.py", place / "model", *options, merged=True)
    try:
        deadline = time.monotonic() + 120
        while not (match := re.search(r"http://127.0.0.1:(\d+)/", server.output[0])) or not is_healthy(int(match[1])):
            assert server.poll() is None and time.monotonic() < deadline, server.output
            time.sleep(0.05)
        # More concurrent requests than the server admits: some get 429 and are retried.
        more = ["--endpoint", f"{match[0]}v1", "--endpoint-model", "share4v", "--concurrency", "6", "--retries", "20"]
        done = run(place, place / "served", *more, OPENAI_API_KEY="sesame")
        wrong = run(place, place / "wrong", *more, OPENAI_API_KEY="wrong")
    finally:
        server.send_signal(signal.SIGTERM)
        log, _ = server.communicate()
    assert done.returncode == 3, done.stderr + log
    files = results(place / "served"), uninterrupted
    from_server, from_model = ([json.loads(line) for line in file["rows.jsonl"].splitlines()] for file in files)
    for row in (*from_server, *from_model):
        row["error"] = bool(row["error"])  # image bytes are compared elsewhere
    assert from_server == from_model
    assert wrong.returncode == 2 and "HTTP 401" in wrong.stderr and "Traceback" not in wrong.stderr


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError as error:
        print(error)
        return False


def test_user_errors_are_one_message(place: Path, tmp_path: Path) -> None:
    for more, message in (
        (["--endpoint", "http://127.0.0.1:9/v1"], "--endpoint-model"),
        (["--max-new-tokens", "5000"], "ask for fewer tokens"),
    ):
        done = run(place, tmp_path, *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tensor": 2}, "torchrun --nproc-per-node 2"), ({"name": "Lin-Chen/ShareCaptioner"}, "no such directory")],
)
def test_models_that_cannot_be_opened(options: dict, message: str, tmp_path: Path) -> None:
    from megatron_share4v.caption.run import ModelOptions, caption_with_model

    model, world = ModelOptions(**{"name": str(tmp_path), **options}), World.single_process()
    with pytest.raises(ConfigError, match=message):
        caption_with_model(model, JobOptions(save_path=tmp_path / "c.json"), settings=CaptionSettings(), world=world)
