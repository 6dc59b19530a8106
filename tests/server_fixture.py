"""A server on its own port with a fake engine: deterministic answers at a chosen speed."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from tiny_tokenizer import train_llama_like

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.errors import DataError
from megatron_share4v.infer.engine import EngineStats
from megatron_share4v.infer.request import GenerationRequest, TokenEvent, TokenLogprobs
from megatron_share4v.serve.engine_thread import ServedModel
from megatron_share4v.serve.server import HttpServer, build_app, http_server
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template

TOKENS_PER_IMAGE, IMAGE_SIZE, VOCABULARY = 16, 32, 700
SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "The image shows a small harbour at dusk, with three wooden boats resting on calm water.",
    "Warm light from the windows of a red house is mirrored in the waves, and a cat sits on the pier.",
    "In the background, soft hills rise under a violet sky; the first stars are already visible.",
    "Describe this image in detail. What is in the picture? How many boats are there? What colour is the house?",
    "There are three boats. The house is red. The cat looks at the water and seems to wait for the fishermen.",
]


def train_tokenizer(path: Path) -> Path:
    """Train a LLaMA-like sentencepiece model with byte fallback."""
    return train_llama_like(path, SENTENCES * 10, vocab_size=VOCABULARY)


def make_encoder(directory: Path) -> Encoder:
    """Encoder with template vicuna_v1 and padded images, as in most checkpoints."""
    tokenizer = SentencePieceTokenizer(train_tokenizer(directory / "tokenizer.model"))
    return Encoder(
        tokenizer=tokenizer,
        template=get_template("vicuna_v1"),
        max_text_length=2048,
        images=ImagePolicy(image_size=IMAGE_SIZE),
    )


def picture(*, size: tuple[int, int] = (60, 40), seed: int = 0, form: str = "PNG") -> bytes:
    """A small image file."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """The file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class FakeLimits:
    max_requests: int = 16
    max_positions: int = 512


def default_answer(engine: FakeEngine, request: GenerationRequest) -> str:
    """Sentences chosen by the prompt's ids and pixels, and by the seed when sampling."""
    prompt, sampling = request.prompt, request.sampling
    content = hashlib.sha256(prompt.token_ids.numpy().tobytes() + prompt.pixels.numpy().tobytes()).hexdigest()
    if sampling.temperature > 0.001:
        content += str(sampling.seed if sampling.seed is not None else random.random())
    chosen = random.Random(content)
    return " ".join(chosen.sample(SENTENCES[2:], 3))


@dataclass
class FakeEngine:
    """Fake with the interface of infer.engine.Engine.

    answer may be replaced at any time; step_s: duration of a step; broken: raised by the next step.
    """

    encoder: Encoder
    limits: FakeLimits = field(default_factory=FakeLimits)
    step_s: float = 0.0
    answer: Callable[[FakeEngine, GenerationRequest], str] = default_answer
    stats: EngineStats = field(default_factory=EngineStats)
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    broken: Exception | None = None
    running: dict[str, tuple[GenerationRequest, list[int], int]] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: GenerationRequest) -> None:
        prompt, sampling = request.prompt, request.sampling
        if prompt.token_ids.numel() + sampling.max_new_tokens > self.limits.max_positions:
            raise DataError("does not fit")
        assert len(self.running) < self.limits.max_requests
        ids = self.encoder.tokenizer.encode(self.answer(self, request))
        self.requests.append(request)
        self.running[request.id] = (request, ids, 0)
        self.stats.prompt_tokens += prompt.token_ids.numel()
        self.stats.running = len(self.running)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.running.pop(request_id)
        self.stats.running = len(self.running)

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_s)
        if self.broken is not None:
            raise self.broken
        self.stats.steps += 1
        events = [self._next(*state) for state in self.running.values()]
        for event in events:
            if event.finish_reason is not None:
                self.running.pop(event.request_id)
        self.stats.running = len(self.running)
        return events

    def _next(self, request: GenerationRequest, ids: list[int], place: int) -> TokenEvent:
        sampling = request.sampling
        prompt_logprobs = None
        if sampling.prompt_logprobs and place == 0:
            prompt_logprobs = (
                None,
                *(self._logprobs(i, sampling.logprobs) for i in request.prompt.token_ids.tolist()[1:]),
            )
        ends = place >= len(ids) or ids[place] in sampling.stop_ids
        if ends and not (sampling.ignore_eos and place >= len(ids)) and place >= sampling.min_tokens:
            return TokenEvent(request.id, None, None, "stop", prompt_logprobs)
        token = ids[place % len(ids)]
        self.running[request.id] = (request, ids, place + 1)
        self.stats.generation_tokens += 1
        logprobs = None if sampling.logprobs is None else self._logprobs(token, sampling.logprobs)
        return TokenEvent(
            request.id, token, logprobs, "length" if place + 1 == sampling.max_new_tokens else None, prompt_logprobs
        )

    def _logprobs(self, token: int, alternatives: int) -> TokenLogprobs:
        chosen = -0.01 * (token % 50)
        others = tuple(
            ((token + step) % self.encoder.tokenizer.vocab_size, chosen - step) for step in range(alternatives)
        )
        return TokenLogprobs(chosen=chosen, top=others)


@dataclass
class Running:
    """A running server."""

    url: str
    engine: FakeEngine
    http: HttpServer
    config: ServeConfig
    app: object

    @property
    def worker(self):
        return self.app.state.worker


@contextlib.contextmanager
def running(
    encoder: Encoder,
    *,
    engine: FakeEngine | None = None,
    load_s: float = 0.0,
    fetcher=None,
    wait: bool = True,
    port: int = 0,
    **settings,
) -> Iterator[Running]:
    """Run a server in a thread; `settings` are ServeConfig's."""
    engine = engine or FakeEngine(encoder)
    config = ServeConfig(**{"host": "127.0.0.1", "port": port, "drain_s": 2.0} | settings)

    def load() -> ServedModel:
        time.sleep(load_s)
        return ServedModel(engine=engine, encoder=encoder, tokens_per_image=TOKENS_PER_IMAGE)

    app = build_app(config, load, fetcher=fetcher)
    server = http_server(app, config)
    listening = socket.create_server(("127.0.0.1", port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        if wait:
            until(lambda: app.state.worker.failure or app.state.worker.served, timeout_s=60)
            assert app.state.worker.failure is None, app.state.worker.failure
            until(lambda: server.started and httpx.get(f"{url}/health").status_code == 200, timeout_s=60)
        yield Running(url=url, engine=engine, http=server, config=config, app=app)
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"


def until(holds: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)
