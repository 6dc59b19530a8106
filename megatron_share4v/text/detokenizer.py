"""Incremental detokenizer: token ids to text without incomplete characters or possible starts of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_share4v.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Incremental decoder of token ids; `stopped` is the stop string that was found, after which nothing is returned.

    after: preceding ids whose text is known; without any, the first token's leading space is dropped, as sentencepiece
    does. decoded: number of characters that the ids fed until now complete, withheld ones and stop strings included.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False, *, after: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop, self._include_stop = tokenizer, tuple(stop), include_stop
        self._ids = self._without_special(after)
        self._start, self._shown = 0, len(self._ids)
        self._held = ""
        self.decoded = 0
        self.stopped: str | None = None

    def feed(self, ids: Iterable[int]) -> str:
        """Add `ids` and return the text that they complete."""
        if self.stopped is not None:
            return ""
        self._ids += self._without_special(ids)
        return self._release(self._decoded(final=False), final=False)

    def finish(self) -> str:
        """Return the withheld text; an incomplete character becomes U+FFFD."""
        return "" if self.stopped is not None else self._release(self._decoded(final=True), final=True)

    def _without_special(self, ids: Iterable[int]) -> list[int]:
        """Leave out ids without a text: a window that starts with one would lose the next token's space."""
        return [i for i in ids if i not in self._tokenizer.special_ids]

    def _decoded(self, *, final: bool) -> str:
        if len(self._ids) == self._shown:
            return ""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT) and not final:
            return ""
        # The window restarts at the previous output: enough for sentencepiece's spaces, at constant cost per step.
        self._start, self._shown = self._shown, len(self._ids)
        self.decoded += len(text) - len(before)
        return text[len(before) :]

    def _release(self, text: str, *, final: bool) -> str:
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            place, self.stopped = min(found, key=lambda one: one[0])
            return self._held[: place + len(self.stopped) * self._include_stop]
        keep = 0 if final else max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def _overlap(self, stop: str) -> int:
        """Number of characters at the end that may start `stop`."""
        return next(
            (size for size in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:size])), 0
        )
