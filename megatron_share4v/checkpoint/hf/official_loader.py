"""Rules by which the official ShareGPT4V and LLaVA code choose how to load a directory, so that exports fit them.

Both take the kind of model from the directory's name, and the vision tower from `mm_vision_tower` in config.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.errors import ConversionError


@dataclass(frozen=True)
class OfficialCode:
    """How one code base recognises a multimodal model and its tower."""

    title: str
    word: str
    """In the model's name, in any case."""
    cuts_name: bool
    """Whether only the part of the name before the first underscore counts."""
    tower_starts: tuple[str, ...]
    """Beginnings of tower names that are fetched from the hub."""
    tower_words: tuple[str, ...] = ()

    def model_name(self, path: str) -> str:
        """Return the name that the code gives to the model in the directory `path`."""
        parts = path.strip("/").split("/")
        if parts[-1].startswith("checkpoint-") and len(parts) > 1:
            return f"{parts[-2]}_{parts[-1]}"
        return parts[-1].split("_")[0] if self.cuts_name else parts[-1]

    def is_multimodal(self, path: str) -> bool:
        """Return whether the code loads the directory `path` with its images."""
        return self.word in self.model_name(path).lower()

    def accepts_tower(self, name: str) -> bool:
        """Return whether the code takes `name` for a CLIP tower, from the current directory."""
        return (
            os.path.exists(name) or name.startswith(self.tower_starts) or any(word in name for word in self.tower_words)
        )


SHAREGPT4V = OfficialCode("ShareGPT4V", "sharegpt4v", True, ("openai", "laion", "Lin-Chen"))
LLAVA = OfficialCode("LLaVA", "llava", False, ("openai", "laion"), ("ShareGPT4V",))
CODES = (SHAREGPT4V, LLAVA)


def tower_name(given: str | None, *, folder: Path) -> str:
    """Return the value of `mm_vision_tower` for an export whose tower is in `folder`.

    `given` is a hub name, kept as it is, or a path (it starts with a slash, a dot or a tilde), made absolute like the
    default, because the official code looks from its own working directory. Raises ConversionError for an empty one.
    """
    if given is None:
        return os.path.abspath(folder)
    if not given.strip():
        raise ConversionError("--tower-name is empty; give a path or the hub name of a CLIP tower")
    return os.path.abspath(os.path.expanduser(given)) if given.startswith(("/", ".", "~")) else given


def export_warnings(target: Path, name: str) -> Iterator[str]:
    """Yield what keeps the official code from loading the export `target`, whose tower's name is `name`."""
    path = os.path.abspath(target)
    if not any(code.is_multimodal(path) for code in CODES):
        names = " and ".join(f"{code.title} reads {code.model_name(path)!r}" for code in CODES)
        yield (
            f"{target}: the official code would load it as a plain language model: it looks for 'sharegpt4v' "
            f"(ShareGPT4V, before the first underscore) or 'llava' (LLaVA) in the directory's name; {names}. "
            f"Rename it, for example to llava-sharegpt4v-{target.name.replace('_', '-')}"
        )
    # The tower of the export itself is published with it.
    if Path(name).is_absolute() and not Path(name).is_relative_to(path) and not os.path.exists(name):
        yield f"mm_vision_tower {name} does not exist here; the official code looks for it where it runs"
    elif not Path(name).is_absolute() and not any(code.accepts_tower(name) for code in CODES):
        starts = ", ".join(SHAREGPT4V.tower_starts)
        yield (
            f"mm_vision_tower {name!r} is refused by the official code, which takes existing paths and hub names that "
            f"start with {starts}, or (LLaVA) contain ShareGPT4V"
        )
