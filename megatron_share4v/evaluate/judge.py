"""Requests to a judge model: every raw reply is appended to a journal at once, so that no request is paid for twice.

Without an endpoint, open requests are written in the format of OpenAI's Batch API, and its output file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import write_rows
from megatron_share4v.evaluate.benchmark_files import get_field, read_jsonl
from megatron_share4v.evaluate.judge_prompts import Body, JudgeReplies, Request
from megatron_share4v.remote.openai_client import ChatClient, Reply, parse_completion

JOURNAL, REQUESTS, REPLIES = "judge.jsonl", "judge_requests.jsonl", "judge_replies.jsonl"


@dataclass(frozen=True)
class Judgement:
    """Replies of a judge.

    verdicts: raw replies by request id. model: as requested. answered_as: model names that the server reported.
    """

    verdicts: JudgeReplies
    model: str
    answered_as: tuple[str, ...]
    seed: int | None
    replies: int


@dataclass(frozen=True)
class _Open:
    """Request body still to send.

    name: made of request, attempt and content, so that replies to other content or by other judges never match.
    """

    name: str
    body: Body


class ReplyLog:
    """All known judge replies, from the journal and the batch output in `directory`."""

    def __init__(self, directory: Path) -> None:
        """Read both files. Raises DataError for a damaged one."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / JOURNAL
        self._known: dict[str, Reply] = {}
        self._mend()
        for path in (self._path, directory / REPLIES):
            for where, row in read_jsonl(path) if path.exists() else ():
                self._known[get_field(row, "custom_id", str, where=where)] = _reply_of(row, where=where)

    def __getitem__(self, name: str) -> Reply | None:
        return self._known.get(name)

    def add(self, name: str, reply: Reply) -> None:
        """Append a reply to the journal and sync it to disk."""
        self._known[name] = reply
        row = {"custom_id": name, "model": reply.model, "content": reply.text}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _mend(self) -> None:
        """Truncate an incomplete last line left by a killed process."""
        if self._path.exists():
            with self._path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)


def collect_judgement(
    requests: Sequence[Request],
    directory: Path,
    *,
    model: str,
    chat: ChatClient | None,
    seed: int | None = None,
    on_reply: Callable[[int], object] | None = None,
) -> Judgement | None:
    """Get all replies to `requests`; None without `chat` while some are open: those are then in
    `directory`/judge_requests.jsonl (see `resume_instructions`).

    model: name of the judge. seed: sent when given. on_reply: called with the number of replies as they arrive. Raises
    ConfigError when the endpoint refuses key, model or path, and DataError when some requests got no reply; received
    replies are kept and the same call resumes.
    """
    replies = ReplyLog(directory)
    extra = {"model": model} | ({} if seed is None else {"seed": seed})
    while opened := [each for request in requests if (each := _next(request, replies, extra))]:
        if chat is None:
            write_rows(directory / REQUESTS, (_batch_row(each) for each in opened))
            return None
        _ask(opened, chat, replies, on_reply)
    received = {request.id: list(_replies(request, replies, extra)) for request in requests}
    flat = [reply for each in received.values() for reply in each]
    verdicts = {name: [reply.text for reply in each] for name, each in received.items()}
    return Judgement(verdicts, model, tuple(sorted({reply.model for reply in flat if reply.model})), seed, len(flat))


def resume_instructions(directory: Path, *, model: str) -> str:
    """Instructions for the user when open requests were written to a file."""
    return (
        f"the questions for the judge are in {directory / REQUESTS}. Either start the same command again with "
        "--judge-base-url (any server that "
        f"speaks OpenAI's interface; requests name --judge-model {model}), or send the file to OpenAI's Batch API "
        "yourself, put its output at "
        f"{directory / REPLIES}, and start the same command again. A line of yours may also be "
        '{"custom_id": "...", "content": "the raw reply"}'
    )


def _ask(
    opened: Sequence[_Open], chat: ChatClient, replies: ReplyLog, on_reply: Callable[[int], object] | None
) -> None:
    failures: list[tuple[str, DataError]] = []
    pool = ThreadPoolExecutor(chat.endpoint.concurrency)
    futures = {pool.submit(chat.ask, each.body): each.name for each in opened}
    try:
        for number, future in enumerate(as_completed(futures), 1):
            try:
                replies.add(futures[future], future.result())
            except DataError as error:
                failures.append((futures[future], error))
            if on_reply:
                on_reply(number - len(failures))
            if len(failures) > chat.endpoint.concurrency and len(failures) == number:
                chat.stop()  # the endpoint fails, not single requests
                break
    except BaseException:
        chat.stop()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        name, first = failures[0]
        raise DataError(
            f"judge {chat.endpoint.model} at {chat.endpoint.url}: {len(failures)} of {len(opened)} requests got no "
            f"reply; {name}: {first}. "
            "See to it, and start the same command again: the replies that came are kept"
        ) from first


def _replies(request: Request, replies: ReplyLog, extra: Mapping[str, object]) -> Iterator[Reply]:
    """Yield the known replies to a request in order; each body depends on the replies before it."""
    received: list[Reply] = []
    while (opened := _opened(request, received, extra)) and (reply := replies[opened.name]):
        received.append(reply)
        yield reply


def _next(request: Request, replies: ReplyLog, extra: Mapping[str, object]) -> _Open | None:
    return _opened(request, list(_replies(request, replies, extra)), extra)


def _opened(request: Request, received: Sequence[Reply], extra: Mapping[str, object]) -> _Open | None:
    body = request.body([reply.text for reply in received])
    if body is None:
        return None
    body = {**extra, **body}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    return _Open(f"{request.id}/{len(received)}/{digest}", body)


def _batch_row(opened: _Open) -> dict[str, object]:
    return {"custom_id": opened.name, "method": "POST", "url": "/v1/chat/completions", "body": opened.body}


def _reply_of(row: Mapping[str, object], *, where: str) -> Reply:
    """Parse a line of the journal or of the Batch API's output."""
    if "response" not in row:
        return Reply(get_field(row, "content", str, where=where), 0, None, str(row.get("model") or ""))
    try:
        return parse_completion(get_field(row, "response", dict, where=where).get("body"))
    except ValueError as error:
        raise DataError(f"{where}: has no reply ({error}); remove the line to send the request again") from error
