"""The commands of docs/captioning.md run with smaller directories, server and token counts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from fake_endpoint import completion, serving
from forked_tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/captioning.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
HELD_OUT = 64
BRIEF = "train.steps=2 train.global_batch_size=4 train.micro_batch_size=2"


def run(command: str, out: Path) -> CompletedProcess:
    command = command.replace("--max-new-tokens 100", "--max-new-tokens 12").replace("runs/", f"{out}/")
    ranks, words = re.fullmatch(r"(?:python|torchrun --nproc-per-node (\d+)) (.+)", command).groups()
    done = run_tool(*shlex.split(words), ranks=int(ranks or 1), environment={"OPENAI_API_KEY": ""}, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a very short quickstart: scenes, tokenizer, prepared data, a stage 2 checkpoint."""
    root = tmp_path_factory.mktemp("docs")
    run(
        f"python examples/quickstart/make_data.py --out runs/quickstart --train-scenes 64 --held-out-scenes {HELD_OUT}",
        root,
    )
    data = "data.train=runs/quickstart/data/finetune data.validation=runs/quickstart/data/finetune_validation"
    data += " data.tokenizer=runs/quickstart/tokenizer.model"
    layout = (
        "run.directory=runs/quickstart/finetune parallel.tensor=1 parallel.pipeline=1 checkpoint.initialize_from=null"
    )
    run(f"python tools/train.py examples/quickstart/finetune.yaml {data} {layout} {BRIEF}", root)
    (root / "captions").mkdir()
    listed = [f"images/held_out_{number:06}.png" for number in range(HELD_OUT)]
    (root / "captions/images_to_describe.json").write_text(json.dumps(listed))
    return root


def test_commands_from_captions_to_training(out: Path) -> None:
    alone, shared, prepare, train, remote = COMMANDS
    run(alone, out)
    run(shared, out)
    captions = [json.loads((out / "captions" / name).read_text()) for name in ("captions.json", "shared.json")]
    assert captions[0] == captions[1] and len(captions[0]) == HELD_OUT
    records = json.loads((out / "captions/train.json").read_text())
    assert f"{len(records)} samples" in run(prepare, out).stdout and len(records) > HELD_OUT // 2
    data = "data.validation=runs/quickstart/data/pretrain_validation data.tokenizer=runs/quickstart/tokenizer.model"
    assert (
        "step 2/2"
        in run(
            f"{train} {data} {BRIEF}".replace(" train.steps=200", "").replace(" train.micro_batch_size=12", ""), out
        ).stderr
    )
    with serving(lambda request, number: completion("a red circle")) as (url, _):
        run(remote.replace("http://127.0.0.1:8000/v1", url), out)
    assert json.loads((out / "captions/remote.json").read_text())[0] == {"images/held_out_000000.png": "a red circle"}
