"""Benchmark time to first token, inter-token latency and throughput at 1, 4 and 16 users against transformers.

All users send one request at the same time: a new image and some words; all answers have the same length.
transformers answers requests sequentially, as a script around generate does. Rounds alternate between engine and
transformers; medians and the engine's counters are printed. Tokens per CPU second depend less on other load. Without
--model, a random model is made (--width, --layers). Needs transformers (extra [dev]).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatron_share4v.mcore  # noqa: F401  (before anything of megatron.core)
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.loading.prompt import Prompt
from megatron_share4v.errors import exit_on_closed_output
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.request import GenerationRequest, SamplingParams
from megatron_share4v.infer.session import Session
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: examples/ is not installed

from examples.quickstart.tokenizer import train_tokenizer

PIECES = 32000
USERS = (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an export of layout llava-hf")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the random model's decoder")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--words", type=int, default=40, help="text tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = Device.detect(local_rank=0, local_world_size=1)
    world = World.single_process()
    with (
        tempfile.TemporaryDirectory() as holder,
        process_group(world, device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        model = arguments.model or random_model(Path(holder) / "model", arguments)
        session = Session.open(model, mesh=mesh, dtype=arguments.dtype)
        config = EngineConfig(max_requests=max(USERS), max_positions=None if arguments.model else 1024)
        answer = load_transformers(model, arguments, device, vision=session.config.model.vision)
        measure(session, Engine.open(session, config), answer, arguments)


def random_model(directory: Path, arguments: argparse.Namespace) -> Path:
    """Save a random model with transformers, with a tokenizer of LLaMA's size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
    }
    heads = arguments.width // 64
    text = {
        "hidden_size": arguments.width,
        "intermediate_size": arguments.width * 43 // 16,
        "num_hidden_layers": arguments.layers,
    }
    text |= {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 1024,
        "vocab_size": PIECES + 64,
    }
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**tower),
            text_config=LlamaConfig(**text),
            image_token_index=PIECES,
            tie_word_embeddings=False,
        )
    ).save_pretrained(directory)
    draw = random.Random(0)
    texts = (" ".join("".join(draw.choices(string.ascii_lowercase, k=8)) for _ in range(20)) for _ in range(3000))
    train_tokenizer(texts, directory / "tokenizer.model", vocab_size=PIECES)
    return directory


def load_transformers(
    directory: Path, arguments: argparse.Namespace, device: Device, *, vision: VisionConfig
) -> Callable[[Prompt], tuple[list[int], list[float]]]:
    """Return a function that answers one prompt with transformers: ids, and seconds from the start to each token."""
    from transformers import AutoModelForImageTextToText
    from transformers.generation.streamers import BaseStreamer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = AutoModelForImageTextToText.from_pretrained(
        str(directory), local_files_only=True, dtype=dtype, attn_implementation="sdpa"
    )
    model = model.eval().to(device.torch_device)

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.started = time.perf_counter()
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter() - self.started)

        def end(self) -> None:
            pass

    @torch.no_grad()
    def answer(prompt: Prompt) -> tuple[list[int], list[float]]:
        clock, length = Clock(), prompt.token_ids.numel()
        ids = (
            prompt.token_ids.index_fill(0, prompt.image_slots, model.config.image_token_id)
            .unsqueeze(0)
            .to(device.torch_device)
        )
        pixels = normalise(prompt.pixels.to(device.torch_device), dtype=dtype, vision=vision)
        new = arguments.new_tokens
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            suppress_tokens=list(range(PIECES, model.config.text_config.vocab_size)),
            streamer=clock,
            pad_token_id=0,
        )
        return output[0, length:].tolist(), clock.times[1:]  # the first call passes the prompt

    return answer


def make_prompts(session: Session, count: int, arguments: argparse.Namespace, *, seed: int) -> list[Prompt]:
    """Build prompts with random images and words."""
    vision, generator = session.config.model.vision, torch.Generator().manual_seed(seed)
    slots = torch.arange(1, 1 + vision.num_features)
    found = []
    for _ in range(count):
        ids = torch.randint(
            300, session.encoder.tokenizer.vocab_size, (1 + vision.num_features + arguments.words,), generator=generator
        )
        ids[0], ids[slots] = session.encoder.tokenizer.eos_id, 0
        pixels = torch.randint(
            0, 256, (1, vision.image_size, vision.image_size, 3), generator=generator, dtype=torch.uint8
        )
        found.append(Prompt(token_ids=ids, image_slots=slots, pixels=pixels))
    return found


def generate_with_engine(
    engine: Engine, given: list[Prompt], arguments: argparse.Namespace
) -> tuple[list[list[int]], list[list[float]]]:
    """Answer all prompts with the engine: ids, and seconds from the start to each token."""
    ids: dict[str, list[int]] = {str(number): [] for number in range(len(given))}
    times: dict[str, list[float]] = {name: [] for name in ids}
    # As with transformers' min_new_tokens, the end token is masked, not skipped.
    sampling = SamplingParams(max_new_tokens=arguments.new_tokens, min_tokens=arguments.new_tokens)
    started = time.perf_counter()
    for name, prompt in zip(ids, given):
        engine.add(GenerationRequest(name, prompt, sampling))
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None, "min_tokens masks the end token"
            ids[event.request_id].append(event.token_id)
            times[event.request_id].append(time.perf_counter() - started)
    return list(ids.values()), list(times.values())


def measure(
    session: Session,
    engine: Engine,
    answer: Callable[[Prompt], tuple[list[int], list[float]]],
    arguments: argparse.Namespace,
) -> None:
    """Run a warm-up round and all measured rounds; print one line of JSON per mode, and the ratios."""
    records: dict[str, list[dict[str, float]]] = {}
    equal = requested = 0
    for number in range(arguments.rounds + 1):
        first: tuple[Prompt, list[int]] | None = None
        for users in USERS:
            given = make_prompts(session, users, arguments, seed=1000 * number + users)
            before, spent = engine.stats, time.process_time()
            ids, times = generate_with_engine(engine, given, arguments)
            after, spent = engine.stats, time.process_time() - spent
            assert after.encoder_calls - before.encoder_calls == users
            assert after.computed_prompt_tokens - before.computed_prompt_tokens == sum(
                prompt.token_ids.numel() for prompt in given
            )
            first = first or (given[0], ids[0])
            record_round(records, f"engine, {users} users", times, spent, measured=number > 0)
        spent = time.process_time()
        assert first is not None
        reference, token_times = answer(first[0])
        equal, requested = equal + (reference == first[1]), requested + 1
        record_round(
            records, "transformers, one by one", [token_times], time.process_time() - spent, measured=number > 0
        )
    medians = {}
    for name, rounds in records.items():
        medians[name] = {key: statistics.median(record[key] for record in rounds) for key in rounds[0]}
        print(json.dumps({"who": name, **{key: round(value, 4) for key, value in medians[name].items()}}))
    most, one, theirs_ = (
        medians[name]
        for name in (f"engine, {USERS[-1]} users", f"engine, {USERS[0]} users", "transformers, one by one")
    )
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        print(
            f"{key}: {USERS[-1]} users / 1 user {most[key] / one[key]:.2f}, {USERS[-1]} users / transformers "
            f"{most[key] / theirs_[key]:.2f}"
        )
    parameters = sum(parameter.numel() for parameter in session.chunks[0].parameters())
    print(
        f"{parameters / 1e6:.0f}M parameters, {arguments.dtype}, {arguments.threads} threads, {arguments.words} "
        "words and an image, "
        f"{arguments.new_tokens} new tokens; greedy answers equal to transformers': {equal} of {requested}; "
        f"{engine.stats}"
    )


def record_round(
    records: dict[str, list[dict[str, float]]], name: str, times: list[list[float]], spent: float, *, measured: bool
) -> None:
    """Add the medians of one round, computed from the time of each token and the CPU time."""
    if measured:
        gaps = [later - earlier for row in times for earlier, later in itertools.pairwise(row)]
        record = {
            "first_token_s": statistics.median(row[0] for row in times),
            "between_tokens_s": statistics.median(gaps),
        }
        tokens = sum(map(len, times))
        record |= {"tokens_per_s": tokens / max(row[-1] for row in times), "tokens_per_cpu_s": tokens / spent}
        records.setdefault(name, []).append(record)


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
