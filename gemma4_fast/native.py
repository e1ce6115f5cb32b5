"""The compiled libraries: `gemma4_fast._native`, what this machine can do, `gemma4_fast._cpu`, the CPU kernels, and
`gemma4_fast._cuda`, those of NVIDIA's GPUs.

All are optional. Where one was not built, these functions return None, and `missing_reason()`,
`kernels_missing()` or `cuda_kernels_missing()` says why and what to do. Nothing is loaded before
the first call. That call also builds the CUDA kernels if the installation has none for these GPUs:
it builds for these GPUs only, into the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import shlex
import sys
import sysconfig
import tempfile
import threading
import time
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gemma4_fast import cuda_build
from gemma4_fast.files import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("gemma4_fast")

_NAME = "gemma4_fast._native"


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension module, or the reason why there is none."""
    try:
        return importlib.import_module(_NAME), None
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        return None, not_built("the C++ libraries were", "pybind11 and a C++17 compiler")
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


def use_huge_pages(tensor: Tensor, *, now: bool = False) -> None:
    """Asks for huge pages behind a new CPU tensor, which nothing has written to yet; with `now` behind one that holds values,
    which move into them. Does nothing where there are none.

    Weights and caches are streams of hundreds of megabytes: with pages of 4 KB each costs the processor a walk through its
    page tables, and its prefetcher a stop.
    """
    module, _ = _load()
    if module is not None and tensor.device.type == "cpu" and tensor.nbytes:
        module.use_huge_pages(tensor.data_ptr(), tensor.nbytes, now)


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


def _installed(name: str) -> Path:
    """Where setup.py puts a library."""
    return Path(__file__).with_name(name + str(sysconfig.get_config_var("EXT_SUFFIX")))


def not_built(what: str, needs: str) -> str:
    """Says why a library is not there, and what to do.

    what: its name and a verb, "the CPU kernels were". needs: what must be there when it is built.
    """
    package = Path(__file__).parent
    source = package.parent
    if not ((source / "setup.py").is_file() and (source / "csrc").is_dir()):
        return (
            f"{what} not built when gemma4-fast was installed, which needs {needs}. Once these are "
            "there, type `pip install --no-build-isolation .` in the source folder of gemma4-fast"
        )
    if (installed := _installed_elsewhere(package)) is not None:
        return (
            f"Python was started in {source} and imported gemma4_fast from there, where {what} not "
            f"built. The installed package in {installed} has them. Start Python in another folder"
        )
    return (
        f"{what} not built in {source}, from where gemma4_fast was imported; that needs {needs}. "
        "Once these are there, type `pip install --no-build-isolation -e .` in that folder"
    )


def _installed_elsewhere(package: Path) -> Path | None:
    """The folder of another copy of this package on sys.path that has its libraries, or None."""
    for entry in sys.path:
        folder = Path(entry, package.name)
        if (folder / _installed("_native").name).is_file() and not folder.samefile(package):
            return folder
    return None


@cache
def kernels_missing() -> str | None:
    """None once the CPU kernels are loaded, as torch.ops.gemma4_fast_cpu; else one sentence saying why they are not."""
    import torch

    if (reason := missing_reason()) is not None:
        return reason
    library = _installed("_cpu")
    if not library.exists():
        needs = "PyTorch 2.10 or newer, ninja and a C++17 compiler"
        return not_built("the CPU kernels were", needs)
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


# ---- CUDA kernels ----

SAY_AFTER = 10  # seconds between two words on how far a build is


_BUILDING = threading.Lock()  # and a file for other processes: see _built_for


def cuda_kernels_missing() -> str | None:
    """None once the CUDA kernels are loaded, as torch.ops.gemma4_fast_cuda, and run here; else why not: "needs nvcc ...".

    For a process that has GPUs. May build them, which takes a minute, and says so; a build that fails is not tried again.
    """
    with _BUILDING:
        return _cuda_kernels_missing()


@cache
def _cuda_kernels_missing() -> str | None:
    import torch

    library, capabilities = _installed("_cuda"), _capabilities()
    strange = [f"{major}.{minor}" for major, minor in sorted(capabilities) if not cuda_build.installed_for((major, minor))]
    if strange or not library.exists():
        but = f" (those installed are not for compute capability {', '.join(strange)})" if library.exists() else ""
        try:
            library = _built_for(torch.__version__, Path(torch.__file__).parent, capabilities)
        except cuda_build.BuildError as error:
            return f"{error}{but}"
        except (OSError, ValueError) as error:  # a compiler that does not run, a folder that cannot be looked into
            return f"could not build its kernels: {error}{but}"
    try:
        torch.ops.load_library(str(library))
        _try_out()
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except (OSError, RuntimeError) as error:
        return f"has kernels in {library} that do not run here: {error.__cause__ or error}"
    return None


def _capabilities() -> set[tuple[int, int]]:
    import torch

    return {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}


def _try_out() -> None:
    """A launch on the current GPU. RuntimeError: the driver is too old for these kernels, or they are for other GPUs."""
    import torch

    x = torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda")
    torch.ops.gemma4_fast_cuda.rms_norm(x, None, x, 1e-6, torch.cuda.current_stream().cuda_stream, False)


def _refuse_others(*paths: Path) -> None:
    """BuildError for what someone else could have put there, or can change."""
    for path in paths:
        found = path.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            remedy = "remove it or their write permission"
            raise cuda_build.BuildError(
                f"does not load {path}, which others may write to: {remedy}",
            )


def _built_for(torch_version: str, torch_folder: Path, capabilities: set[tuple[int, int]]) -> Path:
    """The library for these GPUs, from the cache, or built into it. BuildError: one sentence, what is missing or went wrong."""
    import fcntl  # where there is CUDA for us, on Linux

    if os.environ.get("GEMMA4_FAST_NATIVE") == "0":
        raise cuda_build.BuildError("is not built here: GEMMA4_FAST_NATIVE is 0")
    tools = cuda_build.find_tools()
    if isinstance(tools, str):
        raise cuda_build.BuildError(tools)
    known = cuda_build.told([tools.nvcc, "--list-gpu-code"]).split()
    targets = [cuda_build.target_for(capability, known) for capability in sorted(capabilities)]
    gencode = cuda_build.gencode(dict.fromkeys(filter(None, targets)))
    csrc = cuda_build.csrc()
    files = cuda_build.sources(csrc)
    # Of what the compiler says the first line: the others may be in the user's language.
    compilers = tools.version, tools.cxx, cuda_build.told([*shlex.split(tools.cxx), "--version"]).partition("\n")[0]
    recipe = [torch_version, compilers, gencode, cuda_build.FLAGS, cuda_build.TORCH_FLAGS, platform.machine()]
    key = hashlib.sha256(repr([recipe, [(f.name, f.read_bytes()) for f in files]]).encode()).hexdigest()[:16]
    cache = cache_folder()
    if cache is None:
        raise cuda_build.BuildError(
            "has no folder to build its kernels in, since there is no home folder: set "
            "XDG_CACHE_HOME to the absolute path of one"
        )
    folder = cache / key
    library = folder / "_cuda.so"
    if library.exists():
        _refuse_others(folder, library)
        return library
    log.warning("gemma4_fast: building the CUDA kernels with nvcc %s (%s), once, into %s", tools.version, gencode, folder)
    start = said = time.perf_counter()

    def tell(done: int, steps: int) -> None:
        nonlocal said
        if (now := time.perf_counter()) - said >= SAY_AFTER:
            said = now
            log.warning("gemma4_fast: %d of %d files are built after %.0f s", done, steps, now - start)

    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        _refuse_others(folder)
        # One process builds, others wait. In a folder of its own, and moved when it is whole: one may be killed.
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if library.exists():
                return library
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as name:
                work = Path(name)
                cuda_build.write_ninja(work, work / library.name, tools, torch_folder, gencode, files, csrc)
                cuda_build.run_ninja(work, tools.ninja, tell=tell)
                (work / library.name).replace(library)
    except cuda_build.BuildError as error:
        failed = "the CUDA kernels could not be built; others are used. The end of the log:"
        log.warning("gemma4_fast: %s\n%s", failed, error)
        why = f"could not build its kernels with {tools.nvcc}: see the log"
        raise cuda_build.BuildError(why) from error
    except OSError as error:
        why = f"cannot write its build ({error}): set XDG_CACHE_HOME to a writable folder"
        raise cuda_build.BuildError(why) from error
    log.warning("gemma4_fast: built in %.0f s", time.perf_counter() - start)
    return library
