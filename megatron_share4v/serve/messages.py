"""Messages of a chat request: roles in turn, text, and at most one image in a user's message."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.images.url import check_image_url
from megatron_share4v.serve.json_fields import JsonFields, format_value
from megatron_share4v.serve.request_fields import check_unsupported, keys_of
from megatron_share4v.text.template import GPT, HUMAN

MAX_MESSAGES, MAX_PARTS = 1024, 64
ROLES = {"system": "system", "developer": "system", "user": HUMAN, "assistant": GPT}
DETAILS = ("auto", "low", "high")
IMAGE_PART = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
_OTHER_PARTS = {
    "image": IMAGE_PART,
    "input_image": IMAGE_PART,
    "image_file": IMAGE_PART,
    "input_text": '{"type": "text", "text": "..."}',
    "output_text": '{"type": "text", "text": "..."}',
}
"""Part types of other APIs, with what they are here."""


@dataclass(frozen=True)
class RequestImage:
    """Image of a message. place: dotted name of its part in the request."""

    url: str
    place: str


@dataclass(frozen=True)
class Message:
    """One message. place: dotted name in the request."""

    role: str
    text: str
    image: RequestImage | None
    place: str


@dataclass(frozen=True)
class Conversation:
    """Messages of a request.

    system: system prompt; None for the template's own. raw: typed special tokens and role headers act as such.
    """

    system: str | None
    messages: tuple[Message, ...]
    raw: bool = False


def read_conversation(fields: JsonFields, *, max_images: int) -> Conversation:
    """Read `messages` and `split_special_tokens` (transformers' name). Raises ApiError."""
    system, messages = read_messages(fields, max_images=max_images)
    return Conversation(system, messages, raw=not fields.boolean("split_special_tokens", True))


def read_messages(fields: JsonFields, *, max_images: int) -> tuple[str | None, tuple[Message, ...]]:
    """The system prompt (None when no message gives one) and the other messages. Raises ApiError."""
    entries = [
        JsonFields.of(entry, f"messages[{place}]")
        for place, entry in enumerate(fields.items("messages", shortest=1, longest=MAX_MESSAGES, kind=dict))
    ]
    messages = [_message(entry) for entry in entries]
    system = None
    if messages[0].role == "system":
        system = messages.pop(0).text
    for place, message in enumerate(messages):
        if message.role == "system":
            raise ApiError(f"{message.place}: a system message must be the first", param=message.place)
        if message.role != (HUMAN, GPT)[place % 2]:
            raise ApiError(
                f"{message.place}: after an optional system message, user and assistant must take turns, a user first",
                param=message.place,
            )
    if not messages or messages[-1].role != HUMAN:
        raise ApiError("messages must end with one by the user, to be answered", param="messages")
    places = [message.image.place for message in messages if message.image is not None]
    if len(places) > max_images:
        raise ApiError(
            f"the conversation has {len(places)} images ({', '.join(places[:8])}); this server takes {max_images} per "
            "conversation",
            param="messages",
        )
    return system, tuple(messages)


def _message(entry: JsonFields) -> Message:
    role = ROLES.get(entry.text("role", ""))
    if role is None:
        raise entry.refuse("role", f"one of {', '.join(ROLES)}")
    check_unsupported(entry, frozenset({"role", "content", "name"}))
    if isinstance(entry.values.get("content"), str):
        text, image = entry.text("content"), None
    elif not entry.has("content"):
        raise _missing(entry, "content")
    else:
        parts = entry.items("content", shortest=1, longest=MAX_PARTS, kind=dict)
        text, image = _read_parts(
            [JsonFields.of(part, f"{entry.name('content')}[{place}]") for place, part in enumerate(parts)], entry
        )
    if image is not None and role != HUMAN:
        raise ApiError(f"{image.place}: only a user's message can have an image", param=image.place)
    if not text and image is None and role != "system":
        raise ApiError(
            f"{entry.name('content')} is empty; write something, or leave the message out", param=entry.name("content")
        )
    return Message(role=role, text=text, image=image, place=entry.path)


def _read_parts(parts: list[JsonFields], entry: JsonFields) -> tuple[str, RequestImage | None]:
    texts, images = [], []
    for part in parts:
        kind = part.text("type", "")
        if kind == "text":
            texts.append(_required_text(part, "text"))
            check_unsupported(part, frozenset({"type", "text"}))
        elif kind == "image_url":
            images.append(_read_image(part))
        else:
            raise _unknown_part(part, kind)
    if len(images) > 1:
        raise ApiError(f"{entry.path} has {len(images)} images; a message can have one", param=entry.name("content"))
    return "\n".join(text for text in texts if text), images[0] if images else None


def _read_image(part: JsonFields) -> RequestImage:
    if isinstance(part.values.get("image_url"), str):
        url = part.values["image_url"]
    elif part.has("image_url"):
        holder = part.child("image_url")
        url = _required_text(holder, "url")
        if holder.text("detail", "auto") not in DETAILS:
            raise holder.refuse("detail", f"one of {', '.join(DETAILS)}, which have no effect")
        check_unsupported(holder, frozenset({"url", "detail"}))
    else:
        raise _missing(part, "image_url")
    if part.has("text"):
        raise ApiError(f"{part.name('text')}: write text into a part of type text", param=part.name("text"))
    check_unsupported(part, frozenset({"type", "image_url"}))
    check_image_url(url, place=part.path)
    return RequestImage(url=url, place=part.path)


def _required_text(fields: JsonFields, key: str) -> str:
    if not fields.has(key):
        raise _missing(fields, key)
    return fields.text(key)


def _missing(fields: JsonFields, key: str) -> ApiError:
    return ApiError(
        f"{fields.name(key)} is missing; {fields.path} has the keys {keys_of(fields.values)}", param=fields.name(key)
    )


def _unknown_part(part: JsonFields, kind: str) -> ApiError:
    here = _OTHER_PARTS.get(kind)
    remedy = f"; here that is {here}" if here else ""
    return ApiError(
        f"{part.name('type')} must be text or image_url, got {format_value(part.values.get('type'))}{remedy}",
        param=part.name("type"),
    )
