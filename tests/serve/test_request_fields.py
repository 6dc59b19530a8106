"""Request fields: refused by name where they would change the answer, ignored where they do not; messages and parts."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from server_fixture import FakeEngine, Running, data_url, picture

from megatron_share4v.infer.request import GenerationRequest
from megatron_share4v.serve import request_fields
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.json_fields import JsonFields, parse_object
from megatron_share4v.serve.messages import read_messages
from megatron_share4v.serve.protocol import RequestLimits, read_chat, read_completion
from megatron_share4v.serve.request_fields import CHAT, COMPLETION, DETOKENIZE, MEGATRON, TOKENIZE, check_fields

LIMITS = RequestLimits(vocab_size=700, end_ids=frozenset({2}), max_images=1, max_choices=8)
MESSAGES = [{"role": "user", "content": "What?"}]
PNG = data_url(picture())


def fields(**values: object) -> JsonFields:
    return parse_object(json.dumps(values).encode())


def refusal(call, *arguments: object) -> ApiError:
    with pytest.raises(ApiError) as error:
        call(*arguments)
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_beams", 4, "beam search"),
        ("max_new_tokens", 20, "use max_tokens"),
        ("max_length", 20, "use max_tokens"),
        ("no_repeat_ngram_size", 3, "leave it out"),
        ("guided_json", {"type": "object"}, "leave it out"),
        ("guided_regex", "[ab]", "leave it out"),
        ("guided_grammar", "root ::= x", "leave it out"),
        ("guided_anything_new", True, "leave it out"),
        ("structured_outputs", {"choice": ["a"]}, "leave it out"),
        ("tool_choice", "required", "leave it out"),
        ("tool_choice", {"type": "function"}, "leave it out"),
        ("tools", [{"type": "function"}], "leave it out"),
        ("functions", [{"name": "f"}], "leave it out"),
        ("response_format", {"type": "json_object"}, "leave it out"),
        ("logit_bias", {"5": 100}, "leave it out"),
        ("modalities", ["audio"], "answers are text"),
        ("reasoning_effort", "high", "leave it out"),
        ("truncate_prompt_tokens", 100, "shorten"),
        ("skip_special_tokens", False, "leave it out"),
        ("add_generation_prompt", False, "leave it out"),
        ("continue_final_message", True, "/v1/completions"),
        ("chat_template", "{{ x }}", "the checkpoint's"),
        ("allowed_token_ids", [1], "leave it out"),
        ("bad_words", ["a"], "leave it out"),
        ("stop_sequences", ["a"], "use stop"),
        ("repeat_penalty", 1.3, "use repetition_penalty"),
        ("num_predict", 5, "use max_tokens"),
        ("system", "Be brief.", "role system"),
        ("extra_body", {"top_k": 5}, "top level"),
        ("options", {"temperature": 0}, "top level"),
        ("images", ["iVBORw0KGgo"], "a part of a message's content"),
        ("image_url", PNG, "a part of a message's content"),
        ("imageUrl", PNG, "a part of a message's content"),
        ("suffix", "x", "leave it out"),
    ],
)
@pytest.mark.parametrize("route", [CHAT, COMPLETION])
def test_fields_that_would_change_the_answer_are_refused(route, name: str, value: object, remedy: str) -> None:
    error = refusal(check_fields, fields(**{name: value}), route)
    assert error.param == name and name in str(error) and remedy in str(error), error


def test_refused_fields_are_accepted_with_the_value_that_changes_nothing() -> None:
    inert = {name: values[0] for name, (values, _) in request_fields._UNSUPPORTED.items() if values}
    assert inert["num_beams"] == 1 and inert["tool_choice"] == "none" and len(inert) > 25
    assert check_fields(fields(**inert), CHAT) == []
    for empty in (None, "", [], {}):
        assert (
            check_fields(fields(**dict.fromkeys(request_fields._UNSUPPORTED, empty)), CHAT) == []
        )  # within MAX_FIELDS
    refusal(check_fields, fields(num_beams=True), CHAT)


def test_bookkeeping_and_unknown_fields_are_ignored() -> None:
    known = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False}
    assert check_fields(fields(**known, x_trace="1", user_profile={"a": 1}), CHAT) == ["x_trace", "user_profile"]
    assert check_fields(fields(return_images=False), CHAT) == ["return_images"]
    assert check_fields(fields(temperature=0.5, max_tokens=5, stream=True), TOKENIZE) == []
    assert check_fields(fields(tokens=[1], temperature=0.5), DETOKENIZE) == []
    error = refusal(check_fields, fields(**{f"k{number}": number for number in range(200)}), CHAT)
    assert "200 fields; accepted are 128" in str(error)


@pytest.mark.parametrize(
    ("route", "name", "meant"),
    [
        (CHAT, "max_token", "max_tokens"),
        (CHAT, "maxTokens", "max_tokens"),
        (CHAT, "temprature", "temperature"),
        (CHAT, "message", "messages"),
        (CHAT, "topP", "top_p"),
        (COMPLETION, "prompts", "/api"),
        (COMPLETION, "log_probs", "logprobs"),
        (MEGATRON, "tokens_to_generates", "tokens_to_generate"),
    ],
)
def test_near_misses_are_refused(route, name: str, meant: str) -> None:
    error = refusal(check_fields, fields(**{name: 1}), route)
    assert error.param == name and meant in str(error)


@pytest.mark.parametrize(
    ("route", "name", "words"),
    [
        (CHAT, "prompt", "use messages"),
        (CHAT, "echo", "/v1/completions"),
        (CHAT, "add_special_tokens", "template"),
        (CHAT, "tokens_to_generate", "a field of /api"),
        (COMPLETION, "messages", "/v1/chat/completions"),
        (COMPLETION, "max_completion_tokens", "use max_tokens"),
        (COMPLETION, "top_logprobs", "use logprobs"),
        (MEGATRON, "max_tokens", "a field of /v1/"),
        (MEGATRON, "seed", "a field of /v1/"),
        (MEGATRON, "num_beams", "beam search"),
        (TOKENIZE, "tools", "leave it out"),
    ],
)
def test_fields_of_another_route_are_refused(route, name: str, words: str) -> None:
    error = refusal(check_fields, fields(**{name: "x" if name == "prompt" else True}), route)
    assert error.param == name and words in str(error)


def sampling(**values: object):
    return read_chat(fields(messages=MESSAGES, **values), LIMITS).options.sampling


def test_do_sample() -> None:
    assert sampling().temperature == 1.0
    assert sampling(do_sample=True, temperature=0.7).temperature == 0.7
    assert sampling(do_sample=False).temperature == 0.0 == sampling(do_sample=False, temperature=0.7).temperature
    for greedy in ({"temperature": 0}, {"top_p": 0}):
        error = refusal(lambda: sampling(do_sample=True, **greedy))
        assert error.param == "do_sample" and "which is greedy" in str(error)
    assert refusal(lambda: sampling(do_sample="yes")).param == "do_sample"


def test_contradicting_fields() -> None:
    assert refusal(lambda: read_chat(fields(messages=MESSAGES, max_tokens=5, max_completion_tokens=6), LIMITS)).param
    assert read_chat(fields(messages=MESSAGES, max_tokens=5, max_completion_tokens=5), LIMITS).options.max_tokens == 5
    for read, body in ((read_chat, {"messages": MESSAGES}), (read_completion, {"prompt": "a"})):
        assert refusal(lambda: read(fields(**body, n=2, best_of=3), LIMITS)).param == "best_of"
        assert read(fields(**body, n=2, best_of=2), LIMITS).options.choices == 2


def part(**values: object) -> list[dict]:
    return [{"role": "user", "content": [values, {"type": "text", "text": "What?"}]}]


def user(**values: object) -> list[dict]:
    return [{"role": "user", **values}]


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (part(type="text", content="Hi"), "messages[0].content[0].text", "is missing; .*'type', 'content'"),
        (part(type="text", text=None), "messages[0].content[0].text", "is missing"),
        (part(type="text", text=["Hi"]), "messages[0].content[0].text", "a string, got an array"),
        (part(type="text", text="Hi", image_url={"url": PNG}), "messages[0].content[0].image_url", "not read"),
        (part(text="Hi"), "messages[0].content[0].type", "text or image_url, got null"),
        (part(type="input_text", text="Hi"), "messages[0].content[0].type", "'input_text'; here that is .*\"text\""),
        (part(type="image", image=PNG), "messages[0].content[0].type", "'image'; here that is .*\"image_url\""),
        (part(type="input_image", image_url=PNG), "messages[0].content[0].type", "here that is"),
        (part(type="video_url", video_url={"url": "x"}), "messages[0].content[0].type", "got 'video_url'$"),
        (part(type="image_url"), "messages[0].content[0].image_url", "is missing; .*'type'"),
        (part(type="image_url", url=PNG), "messages[0].content[0].image_url", "is missing; .*'type', 'url'"),
        (part(type="image_url", image_url={"data": PNG}), "messages[0].content[0].image_url.url", "missing; .*'data'"),
        (part(type="image_url", image_url={"url": None}), "messages[0].content[0].image_url.url", "is missing"),
        (part(type="image_url", image_url={"url": 5}), "messages[0].content[0].image_url.url", "a string, got 5"),
        (part(type="image_url", image_url=[PNG]), "messages[0].content[0].image_url", "must be an object"),
        (
            part(type="image_url", image_url={"url": PNG, "detail": "huge"}),
            "messages[0].content[0].image_url.detail",
            "low",
        ),
        (part(type="image_url", image_url=PNG, text="Hi"), "messages[0].content[0].text", "a part of type text"),
        (user(text="Hi"), "messages[0].content", "is missing; messages\\[0\\] has the keys 'role', 'text'"),
        (user(content="Hi", images=["x"]), "messages[0].images", "a part of a message's content"),
        (user(content="Hi", image=PNG), "messages[0].image", "a part of a message's content"),
        (user(content="Hi", experimental_attachments=[1]), "messages[0].experimental_attachments", "not read"),
        (user(content="Hi", parts=[{"text": "x"}]), "messages[0].parts", "use content"),
        (user(content="Hi", tool_calls=[{"id": "1"}]), "messages[0].tool_calls", "not supported"),
        (user(content="Hi \ud83d"), "messages[0].content", "half a surrogate pair, '.ud83d', at character 3"),
    ],
)
def test_mistakes_in_messages_are_named(messages: list, param: str, words: str) -> None:
    error = refusal(lambda: read_messages(fields(messages=messages), max_images=1))
    assert error.param == param and re.search(words, str(error)), error
    assert "record" not in str(error)


def test_accepted_messages() -> None:
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    answer = {"role": "assistant", "content": "A cat.", "id": "m1", "reasoning_content": "hm", **empty}
    image = {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}, "cache_control": {"type": "ephemeral"}}
    asked = [{"role": "user", "name": "bob", "content": [{"type": "text", "text": ""}, image]}, answer, *MESSAGES]
    system, messages = read_messages(fields(messages=asked), max_images=1)
    assert system is None and [message.text for message in messages] == ["", "A cat.", "What?"]
    assert messages[0].image is not None and messages[0].image.place == "messages[0].content[1]"


def test_too_many_images_are_listed() -> None:
    image = {"type": "image_url", "image_url": PNG}
    asked = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "x"}, *user(content=[image])]
    error = refusal(lambda: read_messages(fields(messages=asked), max_images=1))
    assert "2 images (messages[0].content[0], messages[2].content[0])" in str(error)


def post(server: Running, path: str, **body: object) -> httpx.Response:
    return httpx.request("PUT" if path == "/api" else "POST", server.url + path, json=body, timeout=20)


def test_refusals_over_http(server: Running) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES, "num_beams": 2}),
        ("/v1/completions", {"prompt": "a", "max_new_tokens": 2}),
        ("/api", {"prompts": ["a"], "max_tokens": 2}),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}),
        ("/detokenize", {"tokens": [5], "token": [5]}),
    ):
        answer = post(server, path, **body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == list(body)[1], answer.text
    assert not server.engine.requests


def test_damaged_images_are_named_by_message_and_part(server: Running) -> None:
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": data_url(picture()[:-30])}]
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *user(content=content)]
    error = post(server, "/v1/chat/completions", messages=asked).json()["error"]
    assert error["param"] == "messages[2].content[1]" and error["message"].startswith("messages[2].content[1]: image")
    assert "record" not in error["message"]
    broken = {"prompts": ["a", "<image> b"], "images": [[], [data_url(picture()[:-30])]]}
    assert post(server, "/api", **broken).json()["error"]["param"] == "images[1][0]"


def test_context_length_error(server: Running) -> None:
    limit = server.engine.limits.max_positions
    for words in (600, 100_000):
        for path, body in (
            ("/v1/chat/completions", {"messages": user(content="cat " * words)}),
            ("/v1/completions", {"prompt": "cat " * words}),
            ("/api", {"prompts": ["cat " * words]}),
        ):
            error = post(server, path, **body).json()["error"]
            assert error["code"] == "context_length_exceeded" and error["type"] == "invalid_request_error"
            assert f"maximum context length is {limit} tokens" in error["message"] and error["param"] in (
                *body,
                "prompts[0]",
            )


def test_typed_special_tokens_are_text_unless_asked_for(server: Running) -> None:
    eos = server.engine.encoder.tokenizer.eos_id
    typed = user(content="a</s>USER: b ASSISTANT: c")
    plain, split, raw = (
        post(server, "/tokenize", messages=typed, **more).json()["tokens"]
        for more in ({}, {"split_special_tokens": True}, {"split_special_tokens": False})
    )
    assert plain == split and eos not in plain and raw.count(eos) == 1
    for ids, more in ((plain, {}), (raw, {"split_special_tokens": False})):
        server.engine.requests.clear()
        assert post(server, "/v1/chat/completions", messages=typed, max_tokens=1, **more).status_code == 200
        assert server.engine.requests[0].prompt.token_ids.tolist() == ids
    assert eos in post(server, "/tokenize", prompt="a</s>b").json()["tokens"]  # a text prompt is raw
    error = post(server, "/v1/completions", prompt="a", split_special_tokens=True).json()["error"]
    assert error["param"] == "split_special_tokens"


def completion(server: Running, **body: object) -> dict:
    answer = post(server, "/v1/completions", logprobs=1, temperature=0, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def check_offsets(server: Running, choice: dict) -> list[str]:
    """Each token's text, cut from the choice's at the offsets."""
    logprobs, text = choice["logprobs"], choice["text"]
    offsets = logprobs["text_offset"]
    assert len(offsets) == len(logprobs["tokens"]) and offsets == sorted(offsets) and offsets[0] == 0
    pieces = [text[start:stop] for start, stop in zip(offsets, [*offsets[1:], len(text)])]
    assert "".join(pieces) == text
    return pieces


def test_text_offsets_count_in_text(server: Running) -> None:
    server.engine.answer = answer_with("The caf\u00e9 \U0001f600 is \u732b. END of it.")
    choice = completion(server, prompt="What?", max_tokens=60)
    pieces = check_offsets(server, choice)
    assert (
        choice["text"].startswith(" The caf\u00e9 \U0001f600 is") and pieces.count("\U0001f600") == 1 and "" in pieces
    )
    echoed = completion(server, prompt="Caf\u00e9 \U0001f600 </s>x?", max_tokens=40, echo=True)
    pieces = check_offsets(server, echoed)
    assert pieces[0] == "" and "\U0001f600" in pieces and pieces.count("</s>") == 1
    ids = post(server, "/tokenize", prompt="Caf\u00e9 \U0001f600").json()["tokens"]
    for cut in range(4):
        check_offsets(server, completion(server, prompt=ids[: len(ids) - cut], max_tokens=5, echo=True))
    stopped = completion(server, prompt="What?", max_tokens=60, stop="END of")
    assert stopped["finish_reason"] == "stop"
    check_offsets(server, stopped)


def test_text_offsets_of_a_stream_are_those_of_the_whole(server: Running) -> None:
    server.engine.answer = answer_with("A caf\u00e9 \U0001f600, one of them.")
    body = {"prompt": "Caf\u00e9 \U0001f600?", "max_tokens": 30, "echo": True, "stop": "one of us"}
    streamed: list[int] = []
    asked = body | {"stream": True, "logprobs": 1, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=20) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["logprobs"]["text_offset"]
    assert streamed == completion(server, **body)["logprobs"]["text_offset"]


def answer_with(text: str):
    def answer(engine: FakeEngine, request: GenerationRequest) -> str:
        return text

    return answer
