"""Keys of an annotation record: which one names the picture, and which are not read.

Files for other trainers have LLaVA's conversations with the picture under another key. Where the meaning is plain (one
path, or a list of one) it is taken; otherwise the record is refused with the key's name, because it would be trained on
its text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_share4v.text.template import IMAGE_PLACEHOLDER

IMAGE = "image"
IMAGE_KEYS = (IMAGE, "images", "image_path", "image_paths", "image_file", "image_files", "img", "img_path")
"""Keys that name the picture; the first that is not empty counts."""
MEDIA_KEYS = ("video", "videos", "audio", "audios", "sound")
LOCATION = "image_in"  # written by preparation: the shard and key that hold a shared image
_READ = frozenset({"id", "conversations", LOCATION})
_READ_OF_TURN = frozenset({"from", "value"})
_PICTURE_WORDS = ("image", "img", "pic", "photo")
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif", ".heic")
_LONGEST = 60


def is_empty(value: object) -> bool:
    """Whether a value says that there is none: null, "", [], {}, NaN, or a list of these, as exports from tables have
    them.
    """
    if isinstance(value, list):
        return all(entry is None or entry == "" for entry in value)
    return value is None or value in ("", {}) or value != value  # only NaN differs from itself


def find_image(content: Mapping[str, Any]) -> tuple[str | None, object]:
    """Return the key that names the picture and its value, a list of one unwrapped; (None, None) without one."""
    for key in IMAGE_KEYS:
        value = content.get(key)
        if not is_empty(value):
            return key, value[0] if isinstance(value, list) and len(value) == 1 else value
    return None, None


def image_path(content: object) -> str | None:
    """Path of the picture as the record has it, unchecked; None without one."""
    value = find_image(content)[1] if isinstance(content, dict) else None
    return value if isinstance(value, str) else None


def name_image_plainly(content: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Put the picture's path under `image`, in the place of the key that had it; other readers look for it there."""
    key = find_image(content)[0]
    if path is None or key is None or content.get(IMAGE) == path:
        return content
    return {IMAGE if name == key else name: path if name == key else value for name, value in content.items()
            if name == key or name != IMAGE}  # fmt: skip


def find_lost_media(content: Mapping[str, Any]) -> str | None:
    """Say which key of a record has pictures, video or audio that would not be trained; None without one.

    content: a record in which find_image found no path.
    """
    turns = content.get("conversations")
    parts = [("", content)] + [
        (f"turn {number}: ", turn)
        for number, turn in enumerate(turns if isinstance(turns, list) else (), 1)
        if isinstance(turn, dict) and len(turn) > len(_READ_OF_TURN)
    ]
    return next((where + reason for where, part in parts if (reason := _find_media(part))), None)


def _find_media(part: Mapping[str, Any]) -> str | None:
    """Say which key of a record or of a turn has pictures, video or audio."""
    found, media = find_image(part), ((key, part[key]) for key in MEDIA_KEYS if not is_empty(part.get(key)))
    for key, value in (found, *media):
        if key is not None:
            what = f"has {len(value)} entries" if isinstance(value, list) else f"is {shorten(value)}"
            return f"{key!r} {what}; a record has one picture, a relative path under its 'image'"
    for key, value in part.items():
        if key not in _READ and any(word in key.lower() for word in _PICTURE_WORDS) and _names_picture(value):
            return f"{key!r} is {shorten(value)}, which is not read; give the picture under the record's 'image'"
    return None


def describe_missing_image(content: Mapping[str, Any]) -> str:
    """Reason to refuse a record that says <image> and has no picture."""
    named = [key for key, value in content.items() if key not in _READ and _names_picture(value)]
    empty = [key for key in IMAGE_KEYS if key in content]
    if named:
        hint = f"is the picture under {', '.join(map(repr, named))}? Give it under 'image'"
    else:
        hint = "add the image or remove the placeholder"
    of_key = f" ({', '.join(f'{key!r} is {shorten(content[key])}' for key in empty)})" if empty else ""
    return f"a turn has {IMAGE_PLACEHOLDER} and the record has no image{of_key}; {hint}"


def unread_keys(content: object) -> Iterator[str]:
    """Yield the keys of a record that are not read and not empty; those of turns as "conversations[].KEY"."""
    if not isinstance(content, dict):
        return
    used = find_image(content)[0]
    yield from (key for key, value in content.items() if key not in _READ and key != used and not is_empty(value))
    turns = content.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and len(turn) > len(_READ_OF_TURN):
            yield from (f"conversations[].{key}" for key, value in turn.items()
                        if key not in _READ_OF_TURN and not is_empty(value))  # fmt: skip


def describe_unread(counts: Mapping[str, int], *, shown: int = 10) -> str:
    """Format the numbers of records by key that is not read; "" without one."""
    common = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    listed = ", ".join(f"{shorten(key)} in {count} records" for key, count in common[:shown])
    return listed + (f" and {len(common) - shown} other keys" if len(common) > shown else "")


def shorten(value: object) -> str:
    """Representation of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _names_picture(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and _names_picture(value[0])
    if isinstance(value, dict):
        return "bytes" in value or _names_picture(value.get("path"))
    return isinstance(value, str) and value.lower().endswith(_PICTURE_SUFFIXES)
