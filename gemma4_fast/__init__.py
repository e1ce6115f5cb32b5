"""Gemma 4 from PyTorch, fast, and checked against a reference on the user's machine."""

from __future__ import annotations

from gemma4_fast import ops
from gemma4_fast.model import Gemma4

__version__ = "0.1.0"
__all__ = ["Gemma4", "ops"]
