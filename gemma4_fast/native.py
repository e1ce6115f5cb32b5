"""The two C++ libraries: `gemma4_fast._native`, what this machine can do, and `gemma4_fast._cpu`, the CPU kernels.

Both are optional: where no compiler was at hand when the package was installed, these functions return None and
`missing_reason()` or `kernels_missing()` says why. Nothing is loaded before the first call.
"""

from __future__ import annotations

import importlib
import sysconfig
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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


def use_huge_pages(tensor: Tensor) -> None:
    """Asks for huge pages behind a new CPU tensor, which nothing has written to yet; does nothing where there are none.

    Weights and caches are streams of hundreds of megabytes: with pages of 4 KB each costs the processor a walk through its
    page tables, and its prefetcher a stop.
    """
    module, _ = _load()
    if module is not None and tensor.device.type == "cpu" and tensor.nbytes:
        module.use_huge_pages(tensor.data_ptr(), tensor.nbytes)


def release_pages(tensor: Tensor) -> None:
    """Says that `tensor`, mapped from a file and never written to, has been read: its pages leave this process's memory.

    Else they stay until the file is closed, and a process looks as large as the file that it reads. Read again, the tensor
    is as it was; but values of one that lies in other memory may be lost.
    """
    module, _ = _load()
    if module is not None and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes:
        module.release_pages(tensor.data_ptr(), tensor.nbytes)


# Instruction sets that the CPU kernels are compiled for, slowest first, in the order of `kTables` in csrc/cpu/torch_ops.cpp,
# and the features that each needs.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma", "f16c")
ISAS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "avx512bf16"),
}


@cache
def kernels_missing() -> str | None:
    """None once the CPU kernels are loaded, as torch.ops.gemma4_fast_cpu; else one sentence saying why they are not."""
    import torch

    if (reason := missing_reason()) is not None:
        return reason
    library = Path(__file__).with_name("_cpu" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if not library.exists():
        return (
            "the CPU kernels were not built: that needs a C++17 compiler, PyTorch and ninja at hand; install those, then "
            "gemma4-fast with `pip install --no-build-isolation`"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CPU kernels were built but do not load here: {error}"
    return None


ISA: ContextVar[str] = ContextVar("gemma4_fast_isa", default="")  # the one asked for (`use_backend`); "" for the best


def isa() -> int:
    """The instruction set that the CPU kernels are to run with here, as the number that they take."""
    return _isa_number(ISA.get())


@cache
def _isa_number(name: str) -> int:
    return list(ISAS).index(name or isas()[0])


@cache
def isas() -> tuple[str, ...]:
    """Instruction sets of the CPU kernels that run on this machine, fastest first; () without the extension."""
    features = cpu_features() or {}
    x86 = (build_info() or {}).get("arch") == "x86_64"
    usable = [isa for isa, needs in ISAS.items() if all(features.get(f) for f in needs) and (x86 or isa == "plain")]
    return tuple(reversed(usable)) if available() else ()
