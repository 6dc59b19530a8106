"""Index of a prepared data set: one fixed-size row per sample (`index.npy`), its key (`keys.npy`), and `dataset.json`.

Both arrays are memory-mapped, so all processes of a machine share them. Rows are in the order of the annotation file.
sample_reader.py reads what a row refers to; sampler.py decides the training order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_share4v.data.store.shards import REMEDY
from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text
from megatron_share4v.text.template_format import Template, TrainedMarkers
from megatron_share4v.text.tokenizer_config import LEGACY_RULE, TokenizerRule

if TYPE_CHECKING:
    from megatron_share4v.text.tokenizer import Tokenizer

VERSION = 2
IN_PLACE = 0xFFFF  # image_shard value: the image is a separate file, at the record's path below `images_root`

ROW = np.dtype(
    [
        ("shard", "<u2"),  # shard of the text
        (
            "image_shard",
            "<u2",
        ),  # differs from `shard` where samples share an image; IN_PLACE: a file outside the shards
        ("image_offset", "<u8"),
        ("image_length", "<u4"),
        ("image_crc32", "<u4"),
        ("text_offset", "<u8"),
        ("text_length", "<u4"),
        ("text_crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("n_img", "u1"),  # images of the sample: 0 or 1
        ("words", "<i4"),  # whitespace words of all turns; negative for text only (LLaVA's signed modality length)
        ("n_tok", "<u4"),  # text positions after truncation, an image counted as one
        ("n_lab", "<u4"),  # positions whose next token is trained
        ("flags", "u1"),  # reserved
    ]
)


@dataclass(frozen=True)
class ShardFile:
    """Shard file name and size in bytes; an absolute path for an image archive that is used in place."""

    name: str
    size: int


@dataclass(frozen=True)
class SourceCount:
    """Counts of one source (first folder of the image path): accepted samples, rejected records, distinct images of the
    samples.
    """

    samples: int
    rejected: int
    images: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """Content of dataset.json: the files of this index, and the settings it was prepared with."""

    samples: int
    shards: tuple[ShardFile, ...]
    index_sha256: str
    keys_sha256: str
    tokenizer_fingerprint: str
    template: str
    max_text_length: int
    sources: dict[str, SourceCount]
    images_root: str | None = None  # folder of images that were left in place
    tokenizer_rule: TokenizerRule | None = LEGACY_RULE  # of data sets that do not state it; null: a tokenizer.json
    trained_markers: TrainedMarkers = "answer_only"
    version: int = VERSION

    @staticmethod
    def from_json(text: str) -> DatasetInfo:
        """Parse the output of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        fields = json.loads(text)
        shards = tuple(ShardFile(**item) for item in fields.pop("shards"))
        sources = {name: SourceCount(**item) for name, item in fields.pop("sources").items()}
        return DatasetInfo(shards=shards, sources=sources, **fields)

    def to_json(self) -> str:
        """Format as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


class Index:
    """Rows, keys and description of one prepared directory. Pickles as its path, so workers map the same files."""

    def __init__(self, *, directory: Path, rows: np.ndarray, keys: np.ndarray, info: DatasetInfo) -> None:
        """rows: [N] of dtype ROW; keys: [N] fixed-size bytes."""
        self.directory = directory
        self.rows = rows
        self.info = info
        self._keys = keys

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return _load, (self.directory,)

    @property
    def fingerprint(self) -> str:
        """sha256 of index.npy: the identity of the data set."""
        return self.info.index_sha256

    @property
    def tokenizer_rule(self) -> TokenizerRule | None:
        """Rule for text after a special token that the samples were counted with, and are to be trained with; None:
        a tokenizer.json."""
        return self.info.tokenizer_rule

    def key(self, row: int) -> str:
        """The sample's key, unique in the data set."""
        return self._keys[row].decode("ascii")

    @staticmethod
    def open(directory: str | Path) -> Index:
        """Map the index of `directory` and verify that everything it refers to is there, whole and unchanged in size.

        Raises DataError naming each file that is missing, cut, or of another data set.
        """
        index = _load(Path(directory))
        problems = _file_problems(index.directory, index.info)
        if problems:
            raise DataError(f"data set {directory}: " + "; ".join(problems) + f". {REMEDY}")
        return index

    def check(self, *, tokenizer: Tokenizer, template: Template, max_text_length: int) -> None:
        """Raise DataError, naming each difference, unless the data set was prepared with these settings."""
        configured = {
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_rule": tokenizer.rule,
            "template": template.name,
            "trained_markers": template.trained_markers,
            "max_text_length": max_text_length,
        }
        prepared = {
            "tokenizer": self.info.tokenizer_fingerprint,
            "tokenizer_rule": self.info.tokenizer_rule,
            "template": self.info.template,
            "trained_markers": self.info.trained_markers,
            "max_text_length": self.info.max_text_length,
        }
        differences = [
            f"{name} is {_brief(configured[name])}, prepared with {_brief(prepared[name])}"
            for name in configured
            if configured[name] != prepared[name]
        ]
        if differences:
            raise DataError(
                f"data set {self.directory} was prepared with other settings than this run's: "
                + "; ".join(differences)
                + ". Set the run's data section to what the data set was prepared with, "
                "or run tools/prepare_data.py again with the new values"
            )


def write_index(directory: Path, *, rows: np.ndarray, keys: np.ndarray, info: DatasetInfo) -> None:
    """Write index.npy, keys.npy and dataset.json; fills in the two sha256 of `info`."""
    np.save(directory / "index.npy", rows)
    np.save(directory / "keys.npy", keys)
    info = dataclasses.replace(
        info, index_sha256=_sha256(directory / "index.npy"), keys_sha256=_sha256(directory / "keys.npy")
    )
    (directory / "dataset.json").write_text(info.to_json(), encoding="utf-8")


def _load(directory: Path) -> Index:
    path = directory / "dataset.json"
    try:
        info = DatasetInfo.from_json(read_text(path))
        rows = np.load(directory / "index.npy", mmap_mode="r")
        keys = np.load(directory / "keys.npy", mmap_mode="r")
    except OSError as error:
        raise DataError(
            f"data set {directory}: {error}; give a directory that tools/prepare_data.py has written"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise DataError(
            f"data set {directory}: dataset.json, index.npy or keys.npy is damaged ({error}); {REMEDY}"
        ) from error
    if info.version != VERSION or rows.dtype != ROW:
        raise DataError(
            f"data set {directory}: format version {info.version}, expected {VERSION}; run tools/prepare_data.py again"
        )
    if not len(rows) == len(keys) == info.samples:
        raise DataError(
            f"data set {directory}: {len(rows)} index rows, {len(keys)} keys, "
            f"{info.samples} samples in dataset.json; {REMEDY}"
        )
    return Index(directory=directory, rows=rows, keys=keys, info=info)


def _file_problems(directory: Path, info: DatasetInfo) -> list[str]:
    problems = []
    if info.images_root and not Path(info.images_root).is_dir():
        problems.append(f"the images were left in place and their folder {info.images_root} is missing")
    for shard in info.shards:
        path = directory / shard.name
        if not path.is_file():
            problems.append(f"{shard.name} is missing")
        elif path.stat().st_size != shard.size:
            problems.append(f"{shard.name} has {path.stat().st_size} bytes instead of {shard.size}")
    for name, expected in (("index.npy", info.index_sha256), ("keys.npy", info.keys_sha256)):
        if _sha256(directory / name) != expected:
            problems.append(f"{name} does not match dataset.json (sha256 differs)")
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(value: object) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
