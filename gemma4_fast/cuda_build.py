"""How csrc/cuda becomes a library that PyTorch loads: which compiler, for which GPUs, with which flags.

Used by setup.py, which builds for every GPU that the kernels are for; by `native.py`, which builds at first use for the GPUs
that are there; and by tests/cuda_compiled.py, which reads what comes out. So it imports neither PyTorch nor this package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")  # GPUs of the same first digits run them too; later ones, PTX of the last
OLDEST_NVCC = (12, 8)  # the first that knows all of TARGETS
INSTALL = "install the CUDA toolkit, or name one: CUDA_HOME=/usr/local/cuda"
FLAGS = "-std=c++17 -O3 -DNDEBUG -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v"
# -Xptxas=-v: what nvcc says of each kernel, for tests/cuda_compiled.py.
# torch's stable ABI as of 2.10, in a file that sees no header of CUDA.
TORCH_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -Wall -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA"


class BuildError(Exception):
    """Why there is no library; with what the compiler said last."""


@dataclass(frozen=True)
class Tools:
    """Programs, found on this machine."""

    nvcc: str
    version: str  # of nvcc, "13.0.88"
    cxx: str
    ninja: str

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")[:2]))


def csrc() -> Path:
    """The folder of sources: in an installed package inside of it, in a checkout beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def sources(folder: Path) -> list[Path]:
    """All that the library is made of, headers too."""
    return sorted(p for p in (folder / "cuda").iterdir() if p.suffix in (".cu", ".cuh", ".cpp", ".h"))


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [os.environ.get("CUDACXX"), *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    for candidate in (*named, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def find_ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return str(Path(BIN_DIR, "ninja"))


def told(command: list[str]) -> str:
    """What a program prints."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout


def find_tools() -> Tools | str:
    """The programs that a build needs, or which one is missing and what to do: "needs ..., and ..."."""
    if sys.platform != "linux":
        return "builds its kernels only on Linux"
    if (nvcc := find_nvcc()) is None:
        return f"needs nvcc to build its kernels, and there is none: {INSTALL}"
    try:
        said = told([nvcc, "--version"])
    except OSError as error:
        said = str(error)
    if (match := re.search(r"\bV(\d+\.\d+\.\d+)", said)) is None:
        return f"needs nvcc to build its kernels, and {nvcc} reports no version: {INSTALL}"
    cxx, ninja = os.environ.get("CXX") or "c++", find_ninja()
    tools = Tools(nvcc, match[1], cxx, ninja or "")
    if tools.release < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        return f"needs nvcc {oldest} or newer to build its kernels, and {nvcc} is {tools.version}: {INSTALL}"
    try:
        program = shlex.split(cxx)[0]
    except (IndexError, ValueError):  # blanks alone, or a quote that does not end
        program = cxx
    if shutil.which(program) is None:
        return f"needs a C++17 compiler to build its kernels, and there is no {cxx}: install g++, or name one: CXX=g++-13"
    if ninja is None:
        return "needs ninja to build its kernels, and there is none: pip install ninja"
    return tools


def target_for(capability: tuple[int, int], known: Iterable[str]) -> str | None:
    """What to compile for, so that a GPU of this capability runs it. known: what nvcc --list-gpu-code lists."""
    if capability == (9, 0):
        return "sm_90a"
    numbers = sorted(int(name.removeprefix("sm_")) for name in known if re.fullmatch(r"sm_\d+", name))
    wanted = 10 * capability[0] + capability[1]
    same = [n for n in numbers if n // 10 == wanted // 10 and n <= wanted]  # binaries run on later ones of the same generation
    if same:
        return f"sm_{same[-1]}"
    older = [n for n in numbers if n <= wanted]
    return f"compute_{older[-1]}" if older else None  # the driver compiles it


def installed_for(capability: tuple[int, int]) -> bool:
    """Whether what setup.py builds, for TARGETS and with the last one's PTX, runs on a GPU of this capability."""
    return target_for(capability, TARGETS) in (*TARGETS, TARGETS[-1].replace("sm_", "compute_"))


def gencode(targets: Iterable[str], ptx_too: bool = False) -> str:
    """nvcc's flags for these targets; ptx_too: of the last one also PTX, which later GPUs' drivers compile."""
    flags, targets = [], list(targets)
    for target in targets:
        virtual = target.replace("sm_", "compute_")
        flags.append(f"-gencode=arch={virtual},code={target}")
        if ptx_too and target == targets[-1]:
            flags.append(f"-gencode=arch={virtual},code={virtual}")
    return " ".join(flags)


def quoted(path: str | Path) -> str:
    """A path as one word of a shell command in a build.ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def written(path: Path) -> str:
    """A path in a build line of a build.ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def write_ninja(
    folder: Path, library: Path, tools: Tools, torch: Path, gencode: str, files: Iterable[Path], include: Path
) -> list[str]:
    """Writes folder/build.ninja: a library of `files`. torch: the folder of its package. -> the objects, by their names."""
    host = f"-ccbin {quoted(tools.cxx)}" if len(shlex.split(tools.cxx)) == 1 else ""  # not `ccache g++`
    torch_include = f"-isystem {quoted(torch / 'include')}"
    map_paths = f"-ffile-prefix-map={quoted(include)}=csrc"
    compile = "-MD -MF $out.d -c $in -o $out"
    # What nvcc says of each kernel (-Xptxas -v) goes to a file, and to the reader only if it fails.
    lines = [
        f"rule cuda\n  command = {quoted(tools.nvcc)} {host} {FLAGS} {gencode} -I{quoted(include)} {compile}"
        " > $out.log 2>&1 || { cat $out.log; exit 1; }\n  depfile = $out.d\n  deps = gcc\n  description = $in",
        f"rule torch\n  command = {tools.cxx} {TORCH_FLAGS} {map_paths} -I{quoted(include)} {torch_include} {compile}"
        "\n  depfile = $out.d\n  deps = gcc\n  description = $in",
        # CUDA's runtime goes in: the library loads where there is none, and beside whichever PyTorch brings.
        f"rule link\n  command = {quoted(tools.nvcc)} {host} -shared -nodlink -cudart static $in -o $out"
        f" -L{quoted(torch / 'lib')} -Xlinker --no-as-needed -ltorch_cpu\n  description = $out",
    ]
    objects = []
    for file in files:
        if file.suffix in (".cu", ".cpp"):
            objects.append(f"{file.stem}.o")
            lines.append(f"build {objects[-1]}: {'cuda' if file.suffix == '.cu' else 'torch'} {written(file.resolve())}")
    lines.append(f"build {written(library)}: link {' '.join(objects)}\ndefault {written(library)}")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    ninja = folder / "build.ninja"
    if not ninja.exists() or ninja.read_text(encoding="utf-8") != text:
        ninja.write_text(text, encoding="utf-8")
    return objects


def run_ninja(
    folder: Path,
    ninja: str,
    wanted: Iterable[str] = (),
    *,
    jobs: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> str:
    """Builds what folder/build.ninja says, with the program `ninja`. tell(done, all) is called after each step.

    Returns what the compilers printed. BuildError, with the last lines of that, if the build fails.
    """
    command = [ninja, "-C", str(folder), *([f"-j{jobs}"] if jobs else []), *wanted]
    pipes: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said: list[str] = []
    env = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    try:
        with subprocess.Popen(command, env=env, text=True, errors="replace", **pipes) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if step := re.match(r"\[(\d+)/(\d+)\] ", line):
                    if tell is not None:
                        tell(int(step[1]), int(step[2]))
                else:
                    said.append(line.rstrip())
    except OSError as error:
        raise BuildError(f"{ninja}: {error}") from error
    if process.returncode:
        raise BuildError("\n".join(filter(None, said[-30:])) or f"{ninja} ended with {process.returncode}")
    return "\n".join(line for line in said if not line.startswith("ninja: "))
