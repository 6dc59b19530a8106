"""Validation of one record: its form, its decoded image, its tokenised conversation; used by preparation and audit.

A record that cannot be trained yields a Rejected with kind and reason; nothing raises.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch

from megatron_share4v.data.images.jpeg_damage import find_jpeg_damage
from megatron_share4v.data.images.pil_decoder import ImageHeader, validate_image
from megatron_share4v.data.images.policy import OversizedImage
from megatron_share4v.data.loading.encode import check_placeholders, count_trained_positions
from megatron_share4v.data.loading.workers import ordered_map
from megatron_share4v.data.prepare.annotations import Entry, count_words, parse_record
from megatron_share4v.data.prepare.image_files import EncodedImage, ImageFiles
from megatron_share4v.data.prepare.record_keys import describe_missing_image, find_lost_media
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.text.mask import encode_conversation
from megatron_share4v.text.template import IMAGE_PLACEHOLDER, Template
from megatron_share4v.text.tokenizer import Tokenizer

BAD_RECORD, MISSING, OVERSIZED, CORRUPT = "bad record", "missing image", "oversized image", "corrupt image"
PLACEHOLDERS, STRAY = "placeholder mismatch", "placeholder without image"
BAD_CONVERSATION, NO_LABEL = "bad conversation", "no label"
KINDS = (BAD_RECORD, MISSING, OVERSIZED, CORRUPT, PLACEHOLDERS, STRAY, BAD_CONVERSATION, NO_LABEL)
CHUNK = 16  # records per request to a worker
AHEAD = 2  # look-ahead of each worker in chunks: bounds the image bytes in memory
NO_LIMIT = 1 << 62

Item = TypeVar("Item")
Verdict = TypeVar("Verdict")


@dataclass(frozen=True)
class Rejected:
    """Rejected record. kind: the failed check, one of KINDS; reason: the message."""

    kind: str
    reason: str


@dataclass(frozen=True)
class CheckedImage:
    """Image that decodes.

    data: the encoded file, empty when not requested; archive, offset: as in EncodedImage. damage: libjpeg's warning.
    """

    data: bytes
    length: int
    crc32: int
    header: ImageHeader
    archive: int | None
    offset: int
    damage: str = ""


@dataclass(frozen=True)
class CheckedText:
    """Conversation that can be trained.

    words: LLaVA's length. n_tok: positions kept, an image counted as one; n_lab: trained positions among them.
    full_tok,
    full_lab: the same before truncation. identity: 64-bit hash of the turns.
    """

    words: int
    n_tok: int
    n_lab: int
    full_tok: int
    full_lab: int
    identity: int


@dataclass(frozen=True)
class Accepted:
    """Valid record. image is None for text only, and when validation of the image was not requested."""

    id: str
    image_path: str | None
    image: CheckedImage | None
    text: CheckedText


@dataclass(frozen=True)
class RecordValidator:
    """Callable that validates (entry, whether its image is known to be valid); runs in workers.

    keep_bytes: return the encoded image as well.
    """

    images: ImageFiles
    tokenizer: Tokenizer
    template: Template
    max_text_length: int
    keep_bytes: bool = True

    def __call__(self, request: tuple[Entry, bool]) -> Accepted | Rejected:
        """Validate one entry."""
        entry, image_is_known = request
        try:
            record = parse_record(entry.content, where=entry.where)
        except DataError as error:
            return Rejected(BAD_RECORD, str(error))
        if record.image is None and (lost := check_text_only(entry.content, record.turns, where=entry.where)):
            return lost
        image = None
        if record.image is not None and not image_is_known:
            try:
                found = self.images.read(record.image)
            except DataError as error:
                return Rejected(MISSING, str(error))
            checked = check_image(found, keep_bytes=self.keep_bytes)
            if isinstance(checked, Rejected):
                return checked
            image = checked
        text = self.check_text(record.turns, has_image=record.image is not None)
        return text if isinstance(text, Rejected) else Accepted(record.id, record.image, image, text)

    def check_text(self, turns: tuple[Turn, ...], *, has_image: bool) -> CheckedText | Rejected:
        """Tokenise a conversation and count its positions."""
        kind = (
            PLACEHOLDERS
            if has_image and sum(IMAGE_PLACEHOLDER in turn.text for turn in turns) != 1
            else BAD_CONVERSATION
        )
        try:
            encoded = encode_conversation(
                self.tokenizer, self.template, turns, has_image=has_image, max_length=NO_LIMIT
            )
            kind = PLACEHOLDERS
            kept = encoded.input_ids[: self.max_text_length]
            check_placeholders(torch.as_tensor(kept), images=int(has_image))
        except DataError as error:
            return Rejected(kind, str(error))
        labels = torch.as_tensor(encoded.labels)
        n_lab = count_trained_positions(labels[: self.max_text_length])
        if not n_lab:
            return Rejected(NO_LABEL, f"nothing to train: no answer within the first {self.max_text_length} positions")
        words = count_words(turns)
        identity = hashlib.blake2b(
            "\0".join(f"{turn.role}\0{turn.text}" for turn in turns).encode("utf-8", "surrogatepass"), digest_size=8
        ).digest()
        return CheckedText(
            words=words if has_image else -words,
            n_tok=len(kept),
            n_lab=n_lab,
            full_tok=len(encoded.input_ids),
            full_lab=count_trained_positions(labels),
            identity=int.from_bytes(identity, "little"),
        )


def check_text_only(content: object, turns: tuple[Turn, ...], *, where: str) -> Rejected | None:
    """Refuse a record that is read as text only, although a key or a placeholder names a picture."""
    keys = content if isinstance(content, dict) else {}
    if reason := find_lost_media(keys):
        return Rejected(BAD_RECORD, f"{where}: {reason}")
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        return Rejected(STRAY, f"{where}: {describe_missing_image(keys)}")
    return None


def check_image(found: EncodedImage, *, keep_bytes: bool) -> CheckedImage | Rejected:
    """Decode an image once."""
    data = found.data
    try:
        header = validate_image(data)
    except DataError as error:
        return Rejected(OVERSIZED if isinstance(error, OversizedImage) else CORRUPT, str(error))
    return CheckedImage(
        data=data if keep_bytes else b"",
        length=len(data),
        crc32=zlib.crc32(data),
        header=header,
        archive=found.archive,
        offset=found.offset,
        damage=find_jpeg_damage(data),
    )


def validate_all(
    validate: Callable[[Item], Verdict], items: Iterable[Item], *, workers: int
) -> Iterator[tuple[Item, Verdict]]:
    """Yield each item with its verdict, in order, from `workers` processes (0: this process).

    Items are taken from their iterator with bounded look-ahead.
    """
    pending: deque[tuple[Item, ...]] = deque()
    iterator = iter(items)

    def chunks() -> Iterator[tuple[Item, ...]]:
        while chunk := tuple(islice(iterator, CHUNK)):
            pending.append(chunk)
            yield chunk

    for verdicts in ordered_map(_ChunkFunction(validate), chunks(), num_workers=workers, prefetch=AHEAD):
        yield from zip(pending.popleft(), verdicts)


@dataclass(frozen=True)
class _ChunkFunction(Generic[Item, Verdict]):
    """Function applied to each item of a chunk."""

    function: Callable[[Item], Verdict]

    def __call__(self, chunk: tuple[Item, ...]) -> list[Verdict]:
        return [self.function(item) for item in chunk]
