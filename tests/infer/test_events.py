"""Token events: tokens, finish reasons, log-probabilities, and cancellation."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import EOS, VOCABULARY, ask, drain, engine_of, mixed_prompts, prompt
from tolerances import FP32_MODULE

from megatron_share4v.data.records import Batch
from megatron_share4v.infer.request import GenerationRequest, SamplingParams


def events_of(engine, given, **options) -> list:
    engine.add(GenerationRequest("one", given, SamplingParams(**{"max_new_tokens": 8, **options})))
    return drain(engine)


@pytest.fixture(scope="module")
def answer(chunks: list) -> list[int]:
    [found] = ask(engine_of(chunks), [prompt(0)], ignore_eos=True, max_new_tokens=8)
    assert EOS not in found and found[3] not in found[:3]
    return found


def test_last_token_has_finish_reason_length(chunks: list, answer: list[int]) -> None:
    events = events_of(engine_of(chunks), prompt(0))
    assert [(event.token_id, event.finish_reason) for event in events] == [
        *((token, None) for token in answer[:-1]),
        (answer[-1], "length"),
    ]


def test_stop_id_is_not_part_of_the_answer(chunks: list, answer: list[int]) -> None:
    stop = answer[3]
    events = events_of(engine_of(chunks), prompt(0), stop_ids=frozenset({stop}))
    assert [event.token_id for event in events] == [*answer[:3], None] and events[-1].finish_reason == "stop"
    events = events_of(engine_of(chunks), prompt(0), stop_ids=frozenset({stop}), ignore_eos=True)
    assert events[-1].finish_reason == "stop"


def test_min_tokens(chunks: list, answer: list[int]) -> None:
    events = events_of(engine_of(chunks), prompt(0), stop_ids=frozenset({answer[0]}), min_tokens=4)
    assert len(events) > 4 and answer[0] not in [event.token_id for event in events[:4]]


def test_end_token(chunks: list, answer: list[int]) -> None:
    from megatron_share4v.config.engine import EngineConfig
    from megatron_share4v.infer.engine import Engine

    engine = Engine(chunks[0], config=EngineConfig(), vocabulary=VOCABULARY, stop_ids=frozenset({answer[3]}))
    assert [event.token_id for event in events_of(engine, prompt(0))] == [*answer[:3], None]
    assert [event.token_id for event in events_of(engine, prompt(0), ignore_eos=True)] == answer


def test_padded_vocabulary_is_never_sampled(chunks: list) -> None:
    from megatron_share4v.config.engine import EngineConfig
    from megatron_share4v.infer.engine import Engine

    given = prompt(0, images=0)
    small = type(given)(given.token_ids % 20 + 3, given.image_slots, given.pixels)
    engine = Engine(chunks[0], config=EngineConfig(), vocabulary=23, stop_ids=frozenset({EOS}))
    assert all(
        token < 23 for token in ask(engine, [small], temperature=2.0, seeds=[1], ignore_eos=True, max_new_tokens=30)[0]
    )


def raw_logprobs(chunks: list, given) -> torch.Tensor:
    """Log-probabilities [L, V] after each position of a prompt."""
    length = given.token_ids.numel()
    batch = Batch(given.token_ids.unsqueeze(0), given.image_slots, given.pixels, torch.arange(length), None)
    with torch.no_grad():
        return chunks[0].forward_logits(batch)[:, :VOCABULARY].log_softmax(-1)


@pytest.mark.parametrize("step_positions", [16, 256])
def test_logprobs_of_prompt_and_answer(chunks: list, step_positions: int) -> None:
    given = prompt(5, length=26)
    engine = engine_of(chunks, step_positions=step_positions)
    ask(engine, [given])  # a cached prefix must not suppress the prompt's logits
    events = events_of(
        engine,
        given,
        logprobs=3,
        prompt_logprobs=True,
        temperature=0.7,
        seed=1,
        repetition_penalty=1.5,
        ignore_eos=True,
    )
    answer = [event.token_id for event in events]
    whole = torch.cat([given.token_ids, torch.tensor(answer[:-1])])
    expected = raw_logprobs(chunks, type(given)(whole, given.image_slots, given.pixels))
    found = [*events[0].prompt_logprobs, *(event.logprobs for event in events)]
    assert all(event.prompt_logprobs is None for event in events[1:]) and len(events[0].prompt_logprobs) == 30
    slots = given.image_slots.tolist()
    for position, (token, entry) in enumerate(zip([*whole.tolist(), answer[-1]], found)):
        if position == 0 or position in slots:
            assert entry is None
            continue
        row = expected[position - 1]
        assert abs(entry.chosen - row[token]) <= FP32_MODULE * row.abs().max()
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()


def test_prompt_logprobs_without_new_tokens(chunks: list) -> None:
    [event] = events_of(engine_of(chunks), prompt(1), max_new_tokens=0, prompt_logprobs=True, logprobs=0)
    assert (event.token_id, event.finish_reason, event.logprobs) == (None, "length", None) and len(
        event.prompt_logprobs
    ) == 24
    [event] = events_of(engine_of(chunks), prompt(1), max_new_tokens=0)
    assert (event.token_id, event.finish_reason, event.prompt_logprobs) == (None, "length", None)


def test_cancellation_frees_rows_and_keeps_other_answers(chunks: list) -> None:
    expected = ask(engine_of(chunks), mixed_prompts(), ignore_eos=True)
    engine = engine_of(chunks, max_requests=3)
    for number, given in enumerate(mixed_prompts()):
        engine.add(GenerationRequest(str(number), given, SamplingParams(max_new_tokens=12, ignore_eos=True)))
    events = engine.step() + engine.step()
    engine.cancel("1")
    engine.cancel("5")  # still waiting
    engine.cancel("unknown")
    last = engine.step()
    assert {(event.request_id, event.finish_reason) for event in last if event.finish_reason} == {
        ("1", "cancelled"),
        ("5", "cancelled"),
    }
    assert engine.stats.running == 3
    events += last + drain(engine)
    answers = {
        str(number): [
            event.token_id for event in events if event.request_id == str(number) and event.token_id is not None
        ]
        for number in range(6)
    }
    assert (
        [answers[name] for name in "0234"] == [expected[int(name)] for name in "0234"]
        and len(answers["1"]) == 2
        and not answers["5"]
    )
    assert engine.stats.cache_usage == 0 and not engine.has_work


def test_cancelled_prefill_releases_requests_waiting_for_its_prefix(chunks: list) -> None:
    engine = engine_of(chunks, step_positions=16)
    for name in ("first", "second"):
        engine.add(GenerationRequest(name, prompt(4, length=50), SamplingParams(max_new_tokens=3, ignore_eos=True)))
    engine.step()
    assert engine.stats.running == 1 and engine.stats.waiting == 1
    engine.cancel("first")
    events = drain(engine)
    assert [event.token_id for event in events if event.request_id == "second"] == ask(
        engine_of(chunks), [prompt(4, length=50)], max_new_tokens=3
    )[0]
