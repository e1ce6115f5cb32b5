"""The package's own error types. A caller's plain mistake (wrong shape, value out of range) is a ValueError instead."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4_fast.report import Report


class UnsupportedError(RuntimeError):
    """A valid request that this backend, machine or package version cannot serve."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the tensors or keys at fault."""


class SelfCheckError(RuntimeError):
    """The fast path and the reference disagree. `report` holds every comparison that was made."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def out_of_memory(e: BaseException) -> bool:
    """Whether this is the machine's memory running out, for which PyTorch's CPU allocator has no type of its own."""
    text = " ".join(str(e).split())
    return isinstance(e, MemoryError) or bool(re.search(r"out of memory|can't allocate memory|not enough memory", text, re.I))
