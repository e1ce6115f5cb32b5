"""Misspelled names: the known name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.75  # at least this similar; a lower value would propose 12b for 27b


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean rms_norm?", "" if none is similar."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=CUTOFF)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""
