"""Scoring profiles. Scores of `corrected` are not comparable with published ones."""

from __future__ import annotations

from enum import StrEnum


class Profile(StrEnum):
    """`official` reproduces the official scripts with their bugs; `corrected` fixes the bugs listed in the
    docstrings of the scoring functions.
    """

    OFFICIAL = "official"
    CORRECTED = "corrected"


OFFICIAL, CORRECTED = Profile.OFFICIAL, Profile.CORRECTED
