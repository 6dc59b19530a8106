"""The official openai SDK against the server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from server_fixture import (
    SENTENCES,
    TOKENS_PER_IMAGE,
    FakeEngine,
    FakeLimits,
    Running,
    data_url,
    picture,
    running,
    until,
)

from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.prompt import make_prompt
from megatron_share4v.data.records import Turn


def client_of(server: Running, *, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return client_of(server)


def ask(client: openai.OpenAI, text: str = "What is it?", *, image: bytes | None = None, **options):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": data_url(image)}})
    return client.chat.completions.create(model="share4v", messages=[{"role": "user", "content": parts}], **options)


def test_chat_prompt_equals_training(client: openai.OpenAI, server: Running, encoder: Encoder) -> None:
    image = picture()
    answer = ask(client, image=image, temperature=0)
    expected = make_prompt(
        encoder, [Turn("human", "<image>\nWhat is it?")], image=image, tokens_per_image=TOKENS_PER_IMAGE
    )
    [request] = server.engine.requests
    assert request.prompt.token_ids.tolist() == expected.token_ids.tolist()
    assert request.prompt.image_slots.tolist() == expected.image_slots.tolist()
    assert request.prompt.pixels.equal(expected.pixels)
    assert request.sampling.stop_ids == {encoder.tokenizer.eos_id} and request.sampling.seed is None
    [choice] = answer.choices
    assert choice.finish_reason == "stop" and choice.message.role == "assistant" and choice.message.content
    assert answer.usage.prompt_tokens == expected.token_ids.numel()
    assert answer.usage.completion_tokens == len(encoder.tokenizer.encode(choice.message.content))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-") and answer.model == "share4v"


def test_history_with_system_and_image(client: openai.OpenAI, server: Running, encoder: Encoder) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour?"},
    ]
    client.chat.completions.create(model="share4v", messages=messages)
    ids = [i for i in server.engine.requests[0].prompt.token_ids.tolist() if i]
    assert (
        encoder.tokenizer.decode(ids, skip_special=False).replace(" ", "")
        == "<s>Bebrief.USER:ASSISTANT:Acat.</s>USER:Whatcolour?ASSISTANT:"
    )


def test_stream_equals_complete_response(client: openai.OpenAI) -> None:
    whole = ask(client, image=picture(), temperature=0)
    chunks = list(ask(client, image=picture(), temperature=0, stream=True, stream_options={"include_usage": True}))
    first, *deltas, finish, last = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert len(deltas) > 5
    assert "".join(chunk.choices[0].delta.content for chunk in deltas) == whole.choices[0].message.content
    assert finish.choices[0].finish_reason == "stop" and finish.choices[0].delta.content is None
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_multi_token_characters_are_never_split(client: openai.OpenAI, server: Running) -> None:
    text = "Grüße, 世界! 👩‍🚀 ok"
    server.engine.answer = lambda engine, request: text
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)]
    assert "".join(chunks) == text and not any("\ufffd" in chunk for chunk in chunks)
    server.engine.answer = lambda engine, request: "ok 世"
    assert ask(client, max_tokens=3).choices[0].finish_reason == "length"


def test_n_and_seed(client: openai.OpenAI) -> None:
    def texts(**options) -> list[str]:
        return [choice.message.content for choice in ask(client, n=3, temperature=1.0, **options).choices]

    first = texts(seed=7)
    assert len(set(first)) == 3 and texts(seed=7) == first and texts(seed=8) != first
    assert texts() != texts()
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, temperature=1.0, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: openai.OpenAI, server: Running, stream: bool) -> None:
    server.engine.answer, server.engine.step_s = lambda engine, request: "One boat. Two boats. Three boats.", 0.003

    def answer_and_reason(**options) -> tuple[str, str]:
        answer = ask(client, stream=stream, **options)
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = list(answer)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason

    assert answer_and_reason(stop="Three") == ("One boat. Two boats. ", "stop")
    assert answer_and_reason(stop=["nothing", "o boats"]) == ("One boat. Tw", "stop")
    assert answer_and_reason(stop=["boats. T"], extra_body={"include_stop_str_in_output": True}) == (
        "One boat. Two boats. T",
        "stop",
    )
    assert answer_and_reason(stop=["boats?"]) == ("One boat. Two boats. Three boats.", "stop")
    until(lambda: not server.engine.has_work)
    assert len(server.engine.cancelled) == 3


def test_stop_ids_and_eos(client: openai.OpenAI, server: Running, encoder: Encoder) -> None:
    server.engine.answer = lambda engine, request: SENTENCES[5]
    ids = encoder.tokenizer.encode(SENTENCES[5])
    answer = ask(client, extra_body={"stop_token_ids": [ids[6]]})
    assert answer.usage.completion_tokens == ids.index(ids[6]) and answer.choices[0].finish_reason == "stop"
    answer = ask(client, max_tokens=len(ids) + 5, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == len(ids) + 5 and answer.choices[0].finish_reason == "length"
    assert server.engine.requests[-1].sampling.stop_ids == frozenset()


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI, server: Running) -> None:
    extra = {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.5, "min_tokens": 2}
    ask(
        client,
        temperature=0.3,
        top_p=0.8,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        max_completion_tokens=9,
        seed=11,
        extra_body=extra,
    )
    s = server.engine.requests[0].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.3, 0.8, 40, 0.05, 1.5)
    assert (s.presence_penalty, s.frequency_penalty, s.max_new_tokens, s.min_tokens, s.seed) == (0.5, -0.5, 9, 2, 11)
    ask(client, temperature=0.7, top_p=0)
    assert server.engine.requests[1].sampling.temperature == 0.0
    assert server.engine.requests[1].sampling.max_new_tokens == 512 - server.engine.requests[1].prompt.token_ids.numel()


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, server: Running, encoder: Encoder, stream: bool) -> None:
    server.engine.answer = lambda engine, request: "A red 世"
    answer = ask(client, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        entries = [
            entry for chunk in answer if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
        ]
    else:
        entries = answer.choices[0].logprobs.content
    ids = encoder.tokenizer.encode("A red 世")
    assert len(entries) == len(ids)
    assert [entry.logprob for entry in entries] == pytest.approx([-0.01 * (i % 50) for i in ids])
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == " A red 世"
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in entries)
    assert entries[-1].token.startswith("\\x")


def test_completions(client: openai.OpenAI, server: Running, encoder: Encoder) -> None:
    server.engine.answer = lambda engine, request: "boats are red."
    answer = client.completions.create(model="share4v", prompt="Three", max_tokens=30)
    assert answer.choices[0].text == " boats are red." and answer.object == "text_completion"
    assert server.engine.requests[0].prompt.token_ids.tolist() == [1, *encoder.tokenizer.encode("Three")]
    answer = client.completions.create(model="share4v", prompt=["Three", "Two"], n=2, max_tokens=30, echo=True)
    assert [(c.index, c.text) for c in answer.choices] == [
        (i, f"{'Three' if i < 2 else 'Two'} boats are red.") for i in range(4)
    ]
    answer = client.completions.create(model="share4v", prompt=[[1, 300, 301], [1, 302]], max_tokens=5)
    assert [r.prompt.token_ids.tolist() for r in server.engine.requests[-2:]] == [
        [1, 300, 301],
        [1, 302],
    ] and answer.usage.prompt_tokens == 5
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="share4v", prompt=["Three", "Two"], max_tokens=30, echo=True, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == ["Three boats are red.", "Two boats are red."]
    assert (
        client.completions.create(
            model="share4v", prompt="Three", extra_body={"max_tokens": None}
        ).usage.completion_tokens
        <= 16
    )


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, encoder: Encoder) -> None:
    answer = client.completions.create(model="share4v", prompt="Three boats", max_tokens=0, echo=True, logprobs=1)
    ids = [1, *encoder.tokenizer.encode("Three boats")]
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == "Three boats" and answer.usage.completion_tokens == 0
    assert len(found.tokens) == len(ids) and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx([-0.01 * (i % 50) for i in ids[1:]])
    assert "".join(found.tokens[1:]) == " Three boats"


def test_models(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card.id == "share4v" and card.max_model_len == 512
    assert client.models.retrieve("share4v").id == "share4v"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_map_to_sdk_exceptions(client: openai.OpenAI, server: Running, encoder: Encoder) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.body["code"] == 404 and caught.value.body["param"] == "model"
    with pytest.raises(openai.BadRequestError, match="top_p must be a number from 0 to 1, got 3") as caught:
        ask(client, top_p=3)
    assert caught.value.body == {
        "message": str(caught.value.body["message"]),
        "type": "invalid_request_error",
        "param": "top_p",
        "code": 400,
    }
    with pytest.raises(openai.BadRequestError, match="leaves none for an answer") as caught:
        ask(client, "cat " * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="1 per conversation"):
        turn = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}]}
        client.chat.completions.create(model="share4v", messages=[turn, {"role": "assistant", "content": "x"}, turn])
    with running(encoder, api_key="secret") as guarded:
        with pytest.raises(openai.AuthenticationError):
            client_of(guarded, key="wrong").models.list()
        assert client_of(guarded, key="secret").models.list().data
    with running(encoder, load_s=0.4, wait=False) as loading:
        until(lambda: loading.http.started)
        with pytest.raises(openai.InternalServerError, match="still loading") as caught:
            client_of(loading).models.list()
        assert caught.value.status_code == 503


def test_full_queue_is_a_rate_limit_error(encoder: Encoder) -> None:
    engine = FakeEngine(encoder, limits=FakeLimits(max_requests=1), step_s=0.01)
    with running(encoder, engine=engine, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client_of(server), temperature=0)
        until(lambda: engine.running)
        second = pool.submit(ask, client_of(server), temperature=0)
        until(lambda: server.worker.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="try again later") as caught:
            ask(client_of(server))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert first.result().choices[0].message.content == second.result().choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="3 answers in one request"):
            ask(client_of(server), n=3)


def test_16_concurrent_requests_equal_sequential_ones(client: openai.OpenAI, server: Running) -> None:
    server.engine.step_s = 0.001

    def one(number: int) -> str:
        image = picture(seed=number % 5) if number % 2 else None
        answer = ask(
            client, f"Question {number % 7}?", image=image, temperature=0.5, seed=number, stream=number % 3 == 0
        )
        if number % 3 == 0:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    alone = [one(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(16))) == alone
    assert len(set(alone)) > 8
