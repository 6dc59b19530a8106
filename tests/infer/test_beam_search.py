"""Beam search equals transformers' in any batch; beam sampling follows seed and distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_helpers import drain
from exported_model import encode_with_chat_template
from hf_fixtures import write_llava_hf

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource as Source
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.data.loading.prompt import make_prompt
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.evaluate.agreement import _load, generated_questions
from megatron_share4v.infer.beam_search import BeamSearchEngine
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.request import GenerationRequest, SamplingParams
from megatron_share4v.infer.session import Session

NEW = 14


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beams")
    import_model(Source(directory=write_llava_hf(root / "hf")), root / "checkpoint", options=ImportOptions())
    export_model(root / "checkpoint", root / "export", layout="llava-hf")
    return root / "export"


@pytest.fixture(scope="module")
def session(export: Path, mesh) -> Session:
    return Session.open(export.parent / "checkpoint", mesh=mesh, dtype="fp32")


def prompts(session: Session) -> list:
    patches = session.config.model.vision.num_patches
    return [
        make_prompt(session.encoder, q.turns, image=q.image, tokens_per_image=patches) for q in generated_questions()
    ]


Answer = tuple[list[int], str]


def ask(
    session: Session,
    given: list,
    *,
    beams: int,
    requests=16,
    seeds=itertools.repeat(None),
    eos: int | None = None,
    **options,
) -> list[Answer]:
    """(ids, finish reason) of each request."""
    engine = Engine.open(session, EngineConfig(max_requests=requests, cache_positions=4096))
    engine.stop_ids = engine.stop_ids if eos is None else frozenset({eos})
    engine = BeamSearchEngine(engine, beams=beams)
    sampling = SamplingParams(**{"max_new_tokens": NEW, **options})
    for number, (prompt, seed) in enumerate(zip(given, seeds)):
        engine.add(GenerationRequest(f"r{number}", prompt, replace(sampling, seed=seed)))
    found: dict[str, tuple[list[int], str]] = {f"r{number}": ([], "") for number in range(len(given))}
    for event in drain(engine):
        ids, reason = found[event.request_id]
        assert not reason, "no event follows the finish reason"
        found[event.request_id] = (ids + [event.token_id] * (event.token_id is not None), event.finish_reason or "")
    return list(found.values())


@torch.no_grad()
def transformers_answers(export: Path, *, beams: int, eos: int) -> list[list[int]]:
    """Beam search answers of transformers' generate on the export."""
    processor, model = _load(export)
    vocabulary = model.config.image_token_id  # ids beyond the tokenizer's vocabulary
    suppressed = list(range(vocabulary, model.config.text_config.vocab_size))
    answers = []
    for question in generated_questions():
        inputs = encode_with_chat_template(processor, question)
        output = model.generate(
            **inputs,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=NEW,
            min_new_tokens=1,
            eos_token_id=eos,
            pad_token_id=eos,
            suppress_tokens=suppressed,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(output[: output.index(eos)] if eos in output else output)
    return answers


@pytest.mark.parametrize("beams", [2, 3])
def test_search_equals_transformers(beams: int, export: Path, session: Session) -> None:
    given = prompts(session)
    likely = Counter(token for ids, _ in ask(session, given, beams=beams) for token in ids).most_common(12)
    ended = Counter()
    for eos in [2, *(token for token, _ in likely[::3])]:  # a random model never generates </s>: use other end ids
        answers = ask(session, given, beams=beams, eos=eos)
        assert [ids for ids, _ in answers] == transformers_answers(export, beams=beams, eos=eos)
        ended.update(reason for _, reason in answers)
    assert ended["stop"] and ended["length"], ended


def test_answers_do_not_depend_on_the_batch(session: Session) -> None:
    given = prompts(session)
    for options in ({}, {"temperature": 1.0, "repetition_penalty": 1.5}):
        together = ask(session, given, beams=3, seeds=range(4), **options)
        assert together == ask(session, given, beams=3, requests=1, seeds=range(4), **options)
        alone = [ask(session, [prompt], beams=3, seeds=[seed], **options)[0] for seed, prompt in enumerate(given)]
        assert together == alone


def test_equal_seeds_give_equal_answers(session: Session) -> None:
    one = prompts(session)[0]
    answers = ask(session, [one] * 6, beams=3, seeds=[1, 2, 3, 1, 2, 3], temperature=1.0)
    assert answers[:3] == answers[3:] and len({tuple(ids) for ids, _ in answers}) > 1


def test_beam_sampling_draws_without_replacement(session: Session) -> None:
    """With one beam and one token, two ids are drawn and the likelier wins: P(max of two draws = i) is known."""
    one, count = prompts(session)[0], 600
    engine = Engine.open(session, EngineConfig())
    engine.add(GenerationRequest("x", one, SamplingParams(max_new_tokens=1, logprobs=20)))
    [event] = drain(engine)
    top = [math.exp(value / 1.0) for _, value in event.logprobs.top]
    found = Counter(
        ids[0] for ids, _ in ask(session, [one] * count, beams=1, seeds=range(count), max_new_tokens=1, temperature=1.0)
    )
    share = found[event.token_id] / count
    expected = top[0] + sum(p * top[0] / (1 - p) for p in top[1:])  # first, or second after any other
    # Four standard deviations, and the tail left out of the sum.
    spread = 4 * math.sqrt(share * (1 - share) / count) + (1 - sum(top)) * top[0]
    assert abs(share - expected) < spread, (share, expected, spread)


def test_repetition_penalty(session: Session) -> None:
    one = prompts(session)[0]
    plain, penalized = (
        ask(session, [one], beams=3, repetition_penalty=penalty, max_new_tokens=60)[0][0] for penalty in (1.0, 50.0)
    )
    assert len(set(penalized)) == len(penalized) and len(set(plain)) < len(plain)


def test_unsupported_parameters_and_too_many_positions_are_rejected(session: Session) -> None:
    one = prompts(session)[0]
    with pytest.raises(ConfigError, match="beam search supports"):
        ask(session, [one], beams=3, top_p=0.5)
    with pytest.raises(DataError, match="ask for fewer tokens or beams"):
        ask(session, [one], beams=3, max_new_tokens=2000)
