"""Gemma 4 from PyTorch, fast, and checked against a reference on the user's machine.

Public: `Gemma4` (load and run a model), `accelerate` and `restore` (the same for a model of
transformers), `verify` (compare a model with the reference), `ops` (the kernels as functions),
`explain` (which kernel runs, and why), `use_backend` (choose one).

Importing this package imports no PyTorch: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemma4_fast.integrations import when_imported
from gemma4_fast.keywords import explicit

if TYPE_CHECKING:
    from gemma4_fast import ops
    from gemma4_fast.config import Gemma4Config
    from gemma4_fast.errors import CheckpointError, SelfCheckError, UnsupportedError
    from gemma4_fast.explain import explain
    from gemma4_fast.model import Gemma4
    from gemma4_fast.ops import use_backend
    from gemma4_fast.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "errors",
    "Gemma4": "model",
    "Gemma4Config": "config",
    "SelfCheckError": "errors",
    "UnsupportedError": "errors",
    "explain": "explain",
    "use_backend": "ops",
    "verify": "verify",
}  # the module of each public name that is loaded when it is first used


@explicit
def accelerate(
    model: Any,
    *,
    backend: str | None = None,
    quantize: str | None = None,
    check: bool | str = True,
) -> Any:
    """Make a Gemma 4 model of transformers run on this package's kernels, in place.

    See `gemma4_fast.integrations.transformers.accelerate`.
    """
    from gemma4_fast.integrations import transformers

    return transformers.accelerate(model, backend=backend, quantize=quantize, check=check)


def restore(model: Any) -> Any:
    """Undo `accelerate`, in place. See `gemma4_fast.integrations.transformers.restore`."""
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


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(f"{__name__}.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    found = getattr(home, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `verify` and `explain` the functions, although modules have the same names.

    Python sets a submodule as an attribute of its package when it imports it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
when_imported.install()
