"""What the C++ extension `gemma4_fast._native` says about this machine and about its own build.

The extension is optional: where no compiler was at hand when the package was installed, these functions return None and
`missing_reason()` says why. Nothing is loaded before the first call.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

_NAME = "gemma4_fast._native"


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension module, or the reason why there is none."""
    try:
        return importlib.import_module(_NAME), None
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        return None, (
            f"{_NAME} was not built: gemma4-fast was installed without a working C++17 compiler. "
            "Install one (g++ or clang++), then install gemma4-fast again."
        )
    except ImportError as error:
        return None, f"{_NAME} was built but does not load here: {error}"


def available() -> bool:
    """Whether the extension is there and loads."""
    return _load()[0] is not None


def missing_reason() -> str | None:
    """One sentence saying why the extension is not available; None when it is."""
    return _load()[1]


def cpu_features() -> dict[str, bool] | None:
    """Which instruction sets kernels may use here: the processor has them, the operating system saves their registers.

    The same names on every architecture (`avx2`, `avx512bf16`, `neon`, ...), False for those of another one.
    """
    module, _ = _load()
    return None if module is None else module.cpu_features()


def hardware_threads() -> int | None:
    """Number of hardware threads the C++ runtime sees; 0 if it cannot tell."""
    module, _ = _load()
    return None if module is None else module.hardware_threads()


def build_info() -> dict[str, str | bool] | None:
    """How the extension was built: `compiler`, `compiler_version`, `cxx_standard`, `arch`, `flags`, `debug`."""
    module, _ = _load()
    return None if module is None else module.build_info()
