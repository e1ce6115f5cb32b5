"""Gemma 4 from PyTorch, fast, and checked against a reference on the user's machine.

Public: `Gemma4` (load and run a model), `accelerate` and `restore` (do that to a model of transformers), `verify` (compare it
with the reference), `ops` (the kernels as functions), `explain` (which kernel runs, and why), `use_backend` (choose one).
"""

from __future__ import annotations

from typing import Any

from gemma4_fast import ops
from gemma4_fast.config import Gemma4Config
from gemma4_fast.errors import CheckpointError, SelfCheckError, UnsupportedError
from gemma4_fast.explain import explain
from gemma4_fast.integrations import when_imported
from gemma4_fast.keywords import explicit
from gemma4_fast.model import Gemma4
from gemma4_fast.ops import use_backend
from gemma4_fast.verify import verify

__version__ = "0.1.0"


@explicit
def accelerate(model: Any, *, backend: str | None = None, quantize: str | None = None, check: bool | str = True) -> Any:
    """Make a Gemma 4 model of transformers run on this package's kernels, in place; see integrations/transformers.py."""
    from gemma4_fast.integrations import transformers

    return transformers.accelerate(model, backend=backend, quantize=quantize, check=check)


def restore(model: Any) -> Any:
    """Undo `accelerate`, in place; see integrations/transformers.py."""
    from gemma4_fast.integrations import transformers

    return transformers.restore(model)


__all__ = [
    "CheckpointError",
    "Gemma4",
    "Gemma4Config",
    "SelfCheckError",
    "UnsupportedError",
    "accelerate",
    "explain",
    "ops",
    "restore",
    "use_backend",
    "verify",
]

when_imported.install()
