"""Serve the trained model for a moment and ask it about held-out pictures over HTTP, as any client of OpenAI's API would.

Run by examples/quickstart/run.sh, in one process. Writes OUT/served.json, which score.py compares with its own answers; the server's log is OUT/serve.log.
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

from megatron_share4v.data.images.pil_decoder import data_url
from megatron_share4v.errors import ServeError, exit_on_user_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: examples/ is no installed package


SERVE = Path(__file__).resolve().parents[2] / "tools" / "serve.py"
READY_S, ANSWER_S, TOKENS = 120, 60, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--questions", type=int, default=8, help="held-out questions to ask")
    arguments = parser.parse_args()
    with exit_on_user_error():
        from examples.quickstart.dataset import load_held_out

        out = arguments.out
        _, questions = load_held_out(out / "scenes" / "held_out.json")
        with served(out / "finetune", log=out / "serve.log") as url:
            rows = [
                {"question": q.question, "answer": ask(url, q.question, out / "scenes" / q.image)}
                for q in questions[: arguments.questions]
            ]
        (out / "served.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"served {out / 'finetune'}; asked it {rows[0]['question']!r} over HTTP: {rows[0]['answer']!r}")


@contextlib.contextmanager
def served(checkpoint: Path, *, log: Path) -> Iterator[str]:
    """The address of a server that answers. Raises ServeError when it ends, or is not ready in time."""
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(
            [sys.executable, str(SERVE), str(checkpoint), "--port", "0"], stdout=file, stderr=file
        )
    try:
        yield _address(server, log)
    finally:
        server.terminate()
        server.wait(timeout=READY_S)


def _address(server: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"http://[\d.]+:\d+", log.read_text(encoding="utf-8"))
        with contextlib.suppress(OSError):  # no connection, or 503, until the model is loaded
            if found and urllib.request.urlopen(f"{found[0]}/health", timeout=5).status == 200:
                return found[0]
        time.sleep(0.2)
    ended = "is not ready" if server.poll() is None else f"ended with exit code {server.returncode}"
    raise ServeError(f"the server of the trained model {ended} after {READY_S} s at most; its log: {log}")


def ask(url: str, question: str, picture: Path) -> str:
    """The greedy answer to `question` about `picture`."""
    image = {"type": "image_url", "image_url": {"url": data_url(picture.read_bytes())}}
    body = {
        "model": "share4v",
        "temperature": 0,
        "max_tokens": TOKENS,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": question}]}],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
        return json.load(reply)["choices"][0]["message"]["content"].strip()


if __name__ == "__main__":
    main()
