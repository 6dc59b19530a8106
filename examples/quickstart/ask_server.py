"""Serve the trained model briefly and ask it about held-out images over HTTP, like any client of OpenAI's API.

Run by examples/quickstart/run.sh, in one process. Writes OUT/served.json, which score.py compares with its own answers;
the server's log is OUT/serve.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: `examples` is not installed

from megatron_share4v.data.images.pil_decoder import image_to_data_url
from megatron_share4v.errors import ServeError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.files import read_text

SERVE = Path(__file__).resolve().parents[2] / "tools" / "serve.py"
READY_TIMEOUT_S, ANSWER_TIMEOUT_S, MAX_TOKENS = 120, 60, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--questions", type=int, default=8, help="number of held-out questions to ask")
    arguments = parser.parse_args()
    with exit_on_user_error():
        from examples.quickstart.dataset import load_held_out

        out = arguments.out
        _, questions = load_held_out(out / "scenes" / "held_out.json")
        with run_server(out / "finetune", log=out / "serve.log") as url:
            rows = [
                {"question": q.question, "answer": ask(url, q.question, out / "scenes" / q.image)}
                for q in questions[: arguments.questions]
            ]
        (out / "served.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"served {out / 'finetune'} over HTTP: {rows[0]['question']!r} -> {rows[0]['answer']!r}")


@contextlib.contextmanager
def run_server(checkpoint: Path, *, log: Path) -> Iterator[str]:
    """Start a server and yield its URL once it is ready. Raises ServeError when it exits or is not ready in time."""
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(
            [sys.executable, str(SERVE), str(checkpoint), "--port", "0"], stdout=file, stderr=file
        )
    try:
        yield _wait_until_ready(server, log)
    finally:
        server.terminate()
        server.wait(timeout=READY_TIMEOUT_S)


def _wait_until_ready(server: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        match = re.search(r"http://[\d.]+:\d+", read_text(log))
        with contextlib.suppress(OSError):  # no connection, or 503, until the model is loaded
            if match and urllib.request.urlopen(f"{match[0]}/health", timeout=5).status == 200:
                return match[0]
        time.sleep(0.2)
    state = "is not ready" if server.poll() is None else f"exited with code {server.returncode}"
    raise ServeError(f"the server {state} within {READY_TIMEOUT_S} s; its log: {log}")


def ask(url: str, question: str, image: Path) -> str:
    """Request the greedy answer to `question` about the image file."""
    image_part = {"type": "image_url", "image_url": {"url": image_to_data_url(image.read_bytes())}}
    body = {
        "model": "share4v",
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": [image_part, {"type": "text", "text": question}]}],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as reply:
        return json.load(reply)["choices"][0]["message"]["content"].strip()


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
