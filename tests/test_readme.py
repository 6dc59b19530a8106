"""Every command of the README runs as it is written, but for its directories and its number of steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
QUICKSTART, TESTS = "bash examples/quickstart/run.sh", "bash tests/run.sh"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart, made brief: four steps of each stage."""
    out = tmp_path_factory.mktemp("readme")
    done = run(f"{QUICKSTART} --brief --out {out / 'quickstart'}", out)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["stage1_layout"].startswith("tensor 1 x pipeline 2") and "data 2" in last["stage1_layout"]
    assert last["stage2_layout"].startswith("tensor 2 x pipeline 2") and last["served"] == {
        "questions": 8,
        "equal": True,
    }
    requested = (out / "quickstart/scenes/questions.jsonl").read_text().count("\n")
    assert last["evaluation"]["benchmark"] == "custom" and last["evaluation"]["questions"] == requested > 100
    return out


def run(command: str, out: Path) -> subprocess.CompletedProcess:
    command = command.replace("runs/", f"{out}/")
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )


def environment() -> dict[str, str]:
    """Return an environment in which this interpreter's is the active one, so that the scripts install nothing."""
    prefix = Path(sys.executable).parent
    own = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return own | {
        "VIRTUAL_ENV": str(prefix.parent),
        "PATH": f"{prefix}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def test_the_readme_has_the_two_commands() -> None:
    assert COMMANDS[:2] == [QUICKSTART, TESTS]
    assert len(COMMANDS) == len(set(COMMANDS))


def test_the_tests_command_passes_its_arguments_on(tmp_path: Path) -> None:
    done = run(f"{TESTS} tests/test_architecture.py -k test_only_code_counts", tmp_path)
    assert done.returncode == 0 and "[100%]" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("torchrun", "python tools/train.py"))])
def test_training_commands(command: str, quickstart: Path) -> None:
    inputs = [
        f"data.{name}={quickstart}/quickstart/data/finetune{end}"
        for name, end in (("train", ""), ("validation", "_validation"))
    ]
    inputs += [
        f"data.tokenizer={quickstart}/quickstart/tokenizer.model",
        f"checkpoint.initialize_from={quickstart}/quickstart/pretrain/checkpoints/latest",
    ]
    done = run(" ".join([command, *inputs, "train.steps=2"]), quickstart)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "prepare_data" in c])
def test_preparing(command: str, quickstart: Path) -> None:
    done = run(command, quickstart)
    assert done.returncode == 0, done.stderr
    assert "no record rejected" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if "doctor" in c])
def test_looking_at_data(command: str, quickstart: Path) -> None:
    done = run(command, quickstart)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "positions, 41 trained" in done.stdout and "all findings, this report and the histogram are in" in done.stdout
    )


def test_round_trip_of_the_quickstart_export(quickstart: Path) -> None:
    """In the order of the README: each goes on with what the one before has made."""
    outputs = [run(command, quickstart) for command in COMMANDS if "convert" in command]
    assert [done.returncode for done in outputs] == [0, 0, 0], [done.stderr for done in outputs]
    assert "greedy answers equal" in outputs[1].stdout and "projector: sha256" in outputs[2].stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "tools/bench_" in c])
def test_benches_print_a_ratio(command: str, quickstart: Path) -> None:
    done = run(f"{command} --samples 1 --steps 1", quickstart)
    assert done.returncode == 0, done.stderr
    assert "ratio of tokens per second" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if "caption" in c])
def test_captioning(command: str, quickstart: Path) -> None:
    done = run(command, quickstart)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((quickstart / "captions.json").read_text())) == 128


@pytest.mark.parametrize("command", [c for c in COMMANDS if "tools/evaluate.py" in c])
def test_evaluating(command: str, quickstart: Path) -> None:
    done = run(command, quickstart)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["headline"]["name"] == "accuracy"


@pytest.mark.parametrize(("command", "path", "wanted"), [
    *((c, "/data/plugin/scalars/tags", "train/loss") for c in COMMANDS if c.startswith("tensorboard")),
    *((c, "/health", '"ok"') for c in COMMANDS if "tools/serve.py" in c),
])  # fmt: skip
def test_pages_open(command: str, path: str, wanted: str, quickstart: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"{command} --port {port}".replace("runs/", f"{quickstart}/")
    server = subprocess.Popen(
        shlex.split(command),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wanted in _page(f"http://127.0.0.1:{port}{path}", wanted, server)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _page(address: str, wanted: str, server: subprocess.Popen) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                text = answer.read().decode()
        except OSError as error:
            text = str(error)
        if wanted in text or time.monotonic() > deadline or server.poll() is not None:
            return text
        time.sleep(0.5)


def test_every_command_is_run_by_one_of_these() -> None:
    prefixes = (
        "source .venv/bin/activate",
        QUICKSTART,
        TESTS,
        "torchrun",
        "python tools/train.py",
        "python tools/doctor.py",
        "python tools/prepare_data.py",
        "python tools/bench_",
    )
    prefixes += (
        "python tools/convert.py",
        "python tools/serve.py",
        "python tools/caption.py",
        "python tools/evaluate.py",
        "tensorboard",
    )
    assert [command for command in COMMANDS if not command.startswith(prefixes)] == []
