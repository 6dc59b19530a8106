"""Session fixtures: a small tokenizer, annotations with images, and the data set prepared from them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from tiny_tokenizer import LLAMA_SETTINGS, WORDS

from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.prepare.writer import PrepareOptions, PrepareSummary, prepare
from megatron_share4v.data.store.index import Index
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template

IMAGE_SIZE = 28
MAX_TEXT_LENGTH = 512


def _picture(number: int, *, mode: str = "RGB", size: tuple[int, int] | None = None, format: str = "PNG") -> bytes:
    """Encode a noise image that depends on `number` only."""
    width, height = size or (20 + number % 7, 20 + number % 5)
    rng = np.random.RandomState(number)
    image = Image.fromarray(rng.randint(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def sentence(number: int, length: int) -> str:
    """Return a sentence of `length` words that depends on `number` only."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(length))


def _record(number: int, *, image: bool, length: int) -> dict[str, object]:
    """Create an annotation with one round about an image, or two text-only rounds."""
    if image:
        turns = [f"<image>\n{sentence(number, 3)}", sentence(number, length)]
        fields = {"id": f"img_{number}", "image": f"coco/{number}.png"}
    else:
        turns = [sentence(number, 3), sentence(number, length), sentence(number + 1, 2), sentence(number + 2, length)]
        fields = {"id": f"txt_{number}"}
    return fields | {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    }


@dataclass(frozen=True)
class Prepared:
    """A prepared data set with its annotations, images and tokenizer."""

    directory: Path
    annotations: Path
    images: Path
    tokenizer_path: Path
    records: list[dict[str, object]]
    summary: PrepareSummary

    @property
    def index(self) -> Index:
        return Index.open(self.directory)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Function picture(number, mode=, size=, format=) that encodes an image."""
    return _picture


@pytest.fixture(scope="session")
def record() -> Callable[..., dict[str, object]]:
    """Function record(number, image=, length=) that creates an annotation."""
    return _record


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a sentencepiece model with the special ids of LLaMA."""
    directory = tmp_path_factory.mktemp("tokenizer")
    lines = [sentence(n, 8) + "." for n in range(200)] + [
        "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: polite answers to "
        "the user's questions."
    ] * 20
    corpus = directory / "corpus.txt"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(directory / "tokenizer"), vocab_size=400, **LLAMA_SETTINGS
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Prepared:
    """Data set of 24 samples in shards of 5; every third sample is text only."""
    root = tmp_path_factory.mktemp("prepared")
    images = root / "images"
    (images / "coco").mkdir(parents=True)
    records = [_record(n, image=n % 3 != 2, length=2 + (n * 5) % 11) for n in range(24)]
    for number in range(24):
        (images / "coco" / f"{number}.png").write_bytes(_picture(number))
    annotations = root / "annotations.json"
    annotations.write_text(json.dumps(records), encoding="utf-8")
    options = PrepareOptions(
        annotations=annotations,
        images=images,
        output=root / "out",
        tokenizer=tokenizer_path,
        max_text_length=MAX_TEXT_LENGTH,
        samples_per_shard=5,
    )
    return Prepared(root / "out", annotations, images, tokenizer_path, records, prepare(options))


@pytest.fixture(scope="session")
def encoder(tokenizer_path: Path) -> Encoder:
    """Encoder with the settings of `prepared` and a small image size."""
    return Encoder(
        tokenizer=SentencePieceTokenizer(tokenizer_path),
        template=get_template("vicuna_v1"),
        max_text_length=MAX_TEXT_LENGTH,
        images=ImagePolicy(image_size=IMAGE_SIZE, aspect_ratio="pad"),
    )
