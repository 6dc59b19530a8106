"""The two ways to score. A number of `corrected` is not comparable with a published one."""

from __future__ import annotations

from enum import StrEnum


class Profile(StrEnum):
    """`official` reproduces the official scripts with their bugs; `corrected` mends the bugs that the scoring
    functions name.
    """

    OFFICIAL = "official"
    CORRECTED = "corrected"


OFFICIAL, CORRECTED = Profile.OFFICIAL, Profile.CORRECTED
