"""tools/serve.py with an exported model at one and two ranks: answers, shutdown, rejections."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hf_fixtures import write_llava_hf
from server_fixture import data_url

from megatron_share4v.evaluate.agreement import generated_questions
from megatron_share4v.infer.session import Question, Session
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout

ROOT, NEW = Path(__file__).resolve().parents[2], 12
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_hf(tmp_path_factory.mktemp("start") / "hf")


@pytest.fixture(scope="module")
def expected(export: Path) -> list[str]:
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=60),
        open_mesh(Layout(), device=device) as mesh,
    ):
        return Session.open(export, mesh=mesh, dtype="fp32").answer(generated_questions(), max_new_tokens=NEW)


def command(*arguments: object, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / "tools/serve.py"), *map(str, arguments)]


@contextlib.contextmanager
def served(export: Path, log: Path, *, ranks: int) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with open(log, "wb") as file:
        arguments = (
            export,
            "--port",
            port,
            "--dtype",
            "fp32",
            "--model-name",
            "tiny",
            "--max-requests",
            4,
            "--step-positions",
            32,
        )
        server = subprocess.Popen(
            command(*arguments, ranks=ranks), env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield server, client
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(client: httpx.Client, question: Question) -> dict:
    messages = []
    for turn in question.turns:
        text = turn.text.replace("<image>", "").strip()
        parts = [{"type": "text", "text": text}]
        if "<image>" in turn.text:
            parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(question.image)}})
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn.role], "content": parts})
    return client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": NEW}
    ).json()


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_equal_the_session(export: Path, expected: list[str], tmp_path: Path, ranks: int) -> None:
    with served(export, tmp_path / "log.txt", ranks=ranks) as (server, client):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda question: ask(client, question), generated_questions()))
        assert [answer["choices"][0]["message"]["content"].strip() for answer in answers] == expected
        scored = client.post(
            "/v1/completions", json={"prompt": "a b c", "max_tokens": 0, "echo": True, "logprobs": 2}
        ).json()
        values = scored["choices"][0]["logprobs"]["token_logprobs"]
        assert (
            values[0] is None
            and len(values) > 3
            and all(value < 0 for value in values[1:])
            and scored["usage"]["completion_tokens"] == 0
        )
        seeded = [
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8, "seed": 3, "n": 3}).json()["choices"]
            for _ in range(2)
        ]
        assert seeded[0] == seeded[1]
        metrics = client.get("/metrics").text
        assert (
            'share4v_encoder_calls_total{model_name="tiny"}' in metrics
            and 'share4v_num_requests_running{model_name="tiny"} 0' in metrics
        )
        os.kill(server.pid, signal.SIGTERM)
        code = server.wait(60)
    start, ready, running = (
        (tmp_path / "log.txt").read_text().split("stopped")[0].partition("ready at http://127.0.0.1:")
    )
    assert "listening on" in start and ready
    # From the first request on, torchrun may add lines of its own.
    assert "request=" in running.splitlines()[1], "ready is the last line of the start"
    assert re.search(
        r"POST /v1/chat/completions 200 request=\w+ client=127\.0\.0\.1 prompt_tokens=\d+ images=1", running
    )
    assert "stopped" in (tmp_path / "log.txt").read_text()
    assert code == 0 if ranks == 1 else "Traceback" not in (tmp_path / "log.txt").read_text().split("stopped")[0], (
        tmp_path / "log.txt"
    ).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--port", "0"], "nowhere: No such file or directory; give the directory of a checkpoint"),
        ([str(ROOT / "docs"), "--port", "0"], "docs"),
        ([str(ROOT), "--port", "high", "--max-requests", "0"], '--port: should be a valid integer, got "high"'),
        ([str(ROOT), "--max-requests", "500"], "step_positions 256 is less than max_requests 500"),
        ([str(ROOT), "--api-key", "a", "--api-key-file", "b"], "are both given"),
    ],
)
def test_user_errors_are_one_message(arguments: list[str], words: str) -> None:
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 2 and "error: " in done.stderr and words in done.stderr and "Traceback" not in done.stderr
    ), done.stderr
    assert "listening" not in done.stderr, "told before anything is started"


def test_help_lists_settings() -> None:
    done = subprocess.run(command("--help"), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and all(
        option in done.stdout for option in ("--allow-image-urls", "--max-waiting", "--prefix-cache", "--api-key")
    )
