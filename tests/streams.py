"""Streams that stand in for a terminal."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """Text that is written to a terminal."""

    def isatty(self) -> bool:
        return True
