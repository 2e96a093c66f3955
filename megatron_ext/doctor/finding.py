"""What a check found."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "note", "warning", "problem"]


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    """`problem`: training will not run or will be wrong; `warning`: slow or fragile; `note`: an
    option that is not there, or a setting worth knowing."""
    subject: str
    text: str
    remedy: str = ""
