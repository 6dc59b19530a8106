"""The quickstart's pairs: their configurations, their tokenizers, and (with -m matrix) a brief run of each."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.quickstart.tokenizer import FAMILIES, train_byte_bpe
from megatron_share4v.config.load import load_run
from megatron_share4v.evaluate.agreement import _compare_template
from megatron_share4v.infer.session import Question
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.template import get_template
from megatron_share4v.text.template_tokens import fitting_templates, stop_ids

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
PAIRS = sorted(path.parent.name for path in QUICKSTART.glob("*/pretrain.yaml"))
TEXTS = ["The red circle is left of the blue square.", "What colour is the star? Green.", "There are 12 shapes."] * 20


def start(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(QUICKSTART / "run.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=dict(os.environ))


def test_unknown_pair_is_refused_with_the_known_ones() -> None:
    done = start("--pair", "clip_gemma")
    known = f"clip_llama_2, {' or '.join(PAIRS)}"
    assert (done.returncode, done.stderr) == (2, f"error: there is no pair clip_gemma; choose {known}\n")
    assert start("--pair").returncode == 2


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_differ_from_the_default_in_model_and_text_only(pair: str) -> None:
    for stage in ("pretrain", "finetune"):
        default, config = load_run(QUICKSTART / f"{stage}.yaml"), load_run(QUICKSTART / pair / f"{stage}.yaml")
        assert (config.optim, config.train, config.parallel) == (default.optim, default.train, default.parallel)
        assert config.model.trainable == default.model.trainable and config.model.init_std == default.model.init_std
        assert (config.model.vision != default.model.vision) == pair.startswith("siglip")
        assert config.run.directory == f"runs/quickstart_{pair}/{stage}"
        assert config.data.tokenizer == f"runs/quickstart_{pair}/tokenizer.json"
    assert config.data.template in FAMILIES
    assert FAMILIES[config.data.template].vocab_size <= config.model.language.vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_of_a_family(family: str, tmp_path: Path) -> None:
    kind, path = FAMILIES[family], tmp_path / "tokenizer.json"
    train_byte_bpe(TEXTS, path, family=family)
    content = path.read_bytes()
    train_byte_bpe(TEXTS, path, family=family)
    assert path.read_bytes() == content, "training is not repeatable"
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size <= kind.vocab_size and tokenizer.special_pieces == frozenset(kind.special)
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == kind.eos
    assert family in fitting_templates(tokenizer) and tokenizer.eos_id in stop_ids(get_template(family), tokenizer)
    assert tokenizer.bos_ids == ([] if kind.bos is None else [tokenizer.token_id(kind.bos)])
    assert tokenizer.decode(tokenizer.encode("été 😀\n\nThe red circle")) == "été 😀\n\nThe red circle"


@pytest.mark.matrix
@pytest.mark.parametrize("pair", PAIRS)
def test_brief_run(pair: str, tmp_path: Path) -> None:
    done = start("--brief", "--pair", pair, "--out", str(tmp_path / "out"), timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["served"] == {"questions": 8, "equal": True} and last["hf_export"]["greedy_equal"]
    assert last["hf_export"]["max_logit_diff"] < 1e-4


def test_a_tokenizer_without_a_start_token_is_compared(tmp_path: Path) -> None:
    """A start token is left out of what the export's chat template renders, if there is one."""
    for bos in (None, "<s>"):
        tokenizer = SimpleNamespace(bos_token=bos, chat_template="yes")
        processor = SimpleNamespace(
            tokenizer=tokenizer, chat_template=None, apply_chat_template=lambda *_, **__: f"{bos or ''}text"
        )
        assert _compare_template(processor, "text", Question((), None), name="qwen_2.5") == "equal"
