"""Gemma 4 from PyTorch, fast, and checked against a reference on the user's machine.

Public: `Gemma4` (load and run a model), `verify` (compare it with the reference), `ops` (the kernels as functions),
`explain` (which kernel runs, and why), `use_backend` (choose one).
"""

from __future__ import annotations

from gemma4_fast import ops
from gemma4_fast.config import Gemma4Config
from gemma4_fast.errors import CheckpointError, SelfCheckError, UnsupportedError
from gemma4_fast.explain import explain
from gemma4_fast.integrations import when_imported
from gemma4_fast.model import Gemma4
from gemma4_fast.ops import use_backend
from gemma4_fast.verify import verify

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Gemma4",
    "Gemma4Config",
    "SelfCheckError",
    "UnsupportedError",
    "explain",
    "ops",
    "use_backend",
    "verify",
]

when_imported.install()
