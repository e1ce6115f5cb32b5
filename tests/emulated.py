"""The CUDA kernels on a CPU: csrc/cuda compiled for the host over tests/emulator, built by ninja into build/emulator.

`load()` builds and loads torch.ops.gemma4_fast_cuda; `use()` names the kernels that its ops run, and the seed of the order that
threads run in; `mutant()` builds kernels with a change in one of their sources, `built_beside()` many while tests run. With
GEMMA4_FAST_SANITIZE=1, as `make sanitize` sets it beside what must be loaded first, all of them are built for AddressSanitizer
and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gemma4_fast import ops
from gemma4_fast.ops import table

ROOT = Path(__file__).parents[1]
SANITIZED = os.environ.get("GEMMA4_FAST_SANITIZE") == "1"
BUILD = ROOT / "build" / ("sanitize/emulator" if SANITIZED else "emulator")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-DGEMMA4_EMULATED", f"-I{ROOT}/tests/emulator", f"-I{ROOT}/csrc"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


def why_not() -> str | None:
    """None if the kernels can be emulated here."""
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64") or platform.system() != "Linux":
        return "the emulator runs on Linux, on x86-64 and AArch64"
    return None if shutil.which(COMPILER) else f"there is no {COMPILER}"


def build(folder: Path = BUILD, changed: dict[Path, Path] | None = None) -> Path:
    """The library of kernels, and beside it that of torch's ops. changed: files of csrc/cuda, by the ones that stand for them;
    then kernels alone, and of the others what `load` has built."""
    from ninja import BIN_DIR, ninja_syntax
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    extra = SANITIZE if SANITIZED else ["-O0" if changed else "-O2"]  # a mistake is built once, and run for one case
    with (folder / "build.ninja").open("w") as file:
        n = ninja_syntax.Writer(file)
        n.variable("cxx", COMPILER)
        n.variable("flags", " ".join([*([f"-I{folder}"] if changed else []), *FLAGS, *extra]))
        n.rule("compile", "$cxx $flags $more -MMD -MF $out.d -c -x c++ $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("link", f"$cxx {' '.join(extra)} -shared $in -o $out $more")
        objects = []
        for source in dict.fromkeys([*(changed or {}), *SOURCES, ROOT / "tests" / "emulator" / "library.cpp"]):
            if source in (changed or {}) or not changed:
                objects += n.build(f"{source.stem}.o", "compile", str((changed or {}).get(source, source)))
            else:
                objects.append(str(BUILD / f"{source.stem}.o"))
        n.build("kernels.so", "link", objects)
        if not changed:
            include = " ".join(f"-isystem {path}" for path in cpp_extension.include_paths())
            torch_flags = f"-DTORCH_TARGET_VERSION=0x020a000000000000 {include}"
            facing = n.build("torch_ops.o", "compile", str(ROOT / "csrc/cuda/torch_ops.cpp"), variables={"more": torch_flags})
            libraries = f"-L{cpp_extension.library_paths()[0]} -Wl,--no-as-needed -ltorch_cpu -ldl"
            n.build("ops.so", "link", facing, variables={"more": libraries})
    done = subprocess.run([str(Path(BIN_DIR, "ninja")), "-C", str(folder), "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "kernels.so"


@functools.cache
def load() -> Path:
    """The kernels as they are."""
    kernels = build()
    torch.ops.load_library(str(BUILD / "ops.so"))
    return kernels


def use(kernels: Path | None = None, seed: int = 0) -> None:
    real = load()
    torch.ops.gemma4_fast_cuda.use(str(kernels or real), seed)


Mistake = tuple[str, str, str, str, str]  # what `mutant` takes
_BESIDE: dict[Mistake, Future[Path]] = {}


@contextmanager
def built_beside(mistakes: Iterable[Mistake]) -> Iterator[None]:
    """Inside, they are built in this order, while tests run, which keep one core busy; `mutant` waits for the one it needs."""
    load()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        try:
            _BESIDE.update({mistake: pool.submit(_mutant, *mistake) for mistake in mistakes})
            yield
        finally:
            _BESIDE.clear()
            pool.shutdown(cancel_futures=True)


def mutant(name: str, file: str, before: str, after: str, source: str) -> Path:
    """Kernels with `before`, which stands there once, changed in `file` of csrc/cuda, a source or a header of `source`."""
    beside = _BESIDE.get((name, file, before, after, source))
    return _mutant(name, file, before, after, source) if beside is None else beside.result()


def _mutant(name: str, file: str, before: str, after: str, source: str) -> Path:
    load()
    folder = BUILD / "mutants" / name
    changed = folder / "cuda" / file  # where `#include "cuda/..."` looks first
    changed.parent.mkdir(parents=True, exist_ok=True)
    for other in set(changed.parent.iterdir()) - {changed}:  # of the same name's mistake, before it was in this file
        other.unlink()
    text = (ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
    if not changed.exists() or changed.read_text(encoding="utf-8") != text.replace(before, after):
        changed.write_text(text.replace(before, after), encoding="utf-8")
    if file == source:
        return build(folder, {ROOT / "csrc" / "cuda" / source: changed})
    copy = folder / source  # its headers are looked for in `folder` first, so that it must not lie beside the real ones
    copy.write_text((ROOT / "csrc" / "cuda" / source).read_text(encoding="utf-8"), encoding="utf-8")
    return build(folder, {ROOT / "csrc" / "cuda" / source: copy})


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, to the table the cuda backend runs on CPU tensors, if it is named."""
    real = table.backend_missing

    @functools.cache
    def missing(backend: str, device_type: str, *, named: bool = True) -> str | None:
        return None if backend == "cuda" and device_type == "cpu" and named else real(backend, device_type, named=named)

    def forget() -> None:
        for op in ops.TABLE.values():
            op._kept.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "backend_missing", missing)
        forget()
        yield
    forget()
