"""Lists, folders, globs and archives become image entries with stable ids."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from megatron_share4v.caption.inputs import read_image_entries
from megatron_share4v.data.prepare.image_files import SUFFIXES
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger


def read(root: Path, *images: str, listed: object = None, name: str = "list.json"):
    file = None
    if listed is not None:
        file = root / name
        file.write_text(listed if isinstance(listed, str) else json.dumps(listed), encoding="utf-8")
    return read_image_entries(images_file=file, images=images, root=root)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_the_official_list_keeps_order_and_duplicates(tmp_path: Path) -> None:
    pictures = read(tmp_path, listed=["b.jpg", "a.jpg", "b.jpg", "b.jpg"])
    assert [picture.path for picture in pictures] == ["b.jpg", "a.jpg", "b.jpg", "b.jpg"]
    first = pictures[0].id
    assert [picture.id for picture in pictures][2:] == [f"{first}~2", f"{first}~3"] and pictures[1].id != first


def test_id_depends_on_the_path_alone(tmp_path: Path) -> None:
    [alone] = read(tmp_path, listed=["x/a.jpg"])
    assert alone.id == read(tmp_path, listed=["b.jpg", "x/a.jpg", "c.jpg"])[1].id == "7a1e5fdce15b7126"


def test_given_ids_are_kept_and_made_unique(tmp_path: Path) -> None:
    entries = ({"id": "a", "image": "1.jpg"}, {"id": "a~2", "path": "2.jpg"}, {"id": "a", "image": "3.jpg"}, "4.jpg")
    lines = "\n".join(json.dumps(entry) for entry in entries)
    pictures = read(tmp_path, listed=lines + "\n", name="list.jsonl")
    assert [picture.id for picture in pictures][:3] == ["a", "a~2", "a~3"]
    assert len({picture.id for picture in pictures}) == 4
    assert [picture.path for picture in pictures] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]


def test_annotation_file_as_list(tmp_path: Path) -> None:
    assert read(tmp_path, listed=[{"id": "7", "image": "coco/7.jpg", "conversations": []}])[0].id == "7"


def test_folders_globs_and_archives(tmp_path: Path) -> None:
    for name in ("coco/b.JPG", "coco/a.png", "coco/deep/c.webp", "coco/notes.txt", "odd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    write_tar(tmp_path / "coco/sam.tar", {"k1.jpg": b"one", "k1.json": b"{}", "./k2.png": b"two"})
    assert [p.path for p in read(tmp_path, "coco")] == [
        "coco/a.png",
        "coco/b.JPG",
        "coco/sam/k1.jpg",
        "coco/sam/k2.png",
        "coco/deep/c.webp",
    ]
    assert [p.path for p in read(tmp_path, "coco/*.png", "coco/**/*.webp", "odd")] == [
        "coco/a.png",
        "coco/deep/c.webp",
        "odd",
    ]
    assert [p.read() for p in read(tmp_path, "coco/sam.tar")] == [b"one", b"two"]
    assert read(tmp_path, "odd")[0].read() == b"odd"


def test_every_format_that_is_decoded_is_taken_and_the_rest_is_counted(tmp_path: Path, caplog) -> None:
    """A phone's or a browser's folder: nothing is left out without a word."""
    picture = Image.new("RGB", (8, 6), (200, 10, 10))
    taken = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.AVIF": "AVIF", "d.jp2": "JPEG2000", "e.mpo": "MPO", "f.tiff": "TIFF"}
    for name, form in {**taken, "g.apng": "PNG", "h.dib": "BMP", "no_suffix": "WEBP"}.items():
        picture.save(tmp_path / name, form)
    for name in ("phone.heic", "two.HEIC", "drawing.svg", "README", "notes.txt"):
        (tmp_path / name).write_bytes(b"no image")
    members = {"x/1.jp2": b"", "x/2.heic": b"", "x/3": (tmp_path / "a.jfif").read_bytes(), "x/4": b"text"}
    write_tar(tmp_path / "z.tar", members)
    with caplog.at_level("WARNING", logger=get_logger().name):
        found = [picture.path for picture in read(tmp_path, ".")]
    assert found == [*sorted([*taken, "g.apng", "h.dib", "no_suffix"]), "z/x/1.jp2", "z/x/3"]
    assert "not read as images: 3 .heic, 2 without a suffix, 1 " in caplog.text and "1 .svg" in caplog.text
    assert {path.suffix.lower() for path in map(Path, found)} - {""} <= set(SUFFIXES)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "phone.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no images \(but 1 .heic\); looked for .jpg"):
        read(tmp_path, "only")
    assert [picture.path for picture in read(tmp_path, "only/phone.heic")] == ["only/phone.heic"]  # named: tried


def test_annotations_of_any_form_as_list(tmp_path: Path) -> None:
    records = [
        {"id": "1", "images": ["a.png"], "conversations": []},
        {"id": "2", "image": ["b.png"]},
        {"image": "c.png"},
    ]
    text_only = {"id": "t", "conversations": []}
    lines = "\n".join(map(json.dumps, [*records, text_only]))
    for listed, name in (([*records, text_only], "a.json"), (lines, "a.jsonl"), (lines, "lines.json")):
        assert [picture.path for picture in read(tmp_path, listed=listed, name=name)] == ["a.png", "b.png", "c.png"]
    assert [picture.path for picture in read(tmp_path, listed=json.dumps(records[0]))] == ["a.png"]


@pytest.mark.parametrize(
    ("listed", "name", "what"),
    [
        ('{"a": 1}', "l.json", "expected a list"),
        ('["a.jpg", 3]', "l.json", "entry 1: is '3'"),
        ('["a.jpg"', "l.json", "is not JSON"),
        ('"a.jpg"\n{"id": 3}\n', "l.jsonl", "entry 1"),
        ("[]", "l.json", "has no images"),
    ],
)
def test_invalid_lists_are_rejected(listed: str, name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what):
        read(tmp_path, listed=listed, name=name)


def test_missing_and_damaged_inputs_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, folder or match"):
        read(tmp_path, "nowhere/*.jpg")
    with pytest.raises(DataError, match="no such file, folder or match"):
        read(tmp_path, "x" * 5000)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="compressed as a whole"):
        read(tmp_path, "a.tar.gz")
    write_tar(tmp_path / "cut.tar", {"a.jpg": bytes(5000)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:2000])
    with pytest.raises(DataError, match="ends within a.jpg"):
        read(tmp_path, "cut.tar")
