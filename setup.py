"""What pyproject.toml cannot say: the package layout and the native extension."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Callable
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# What each instruction set of the CPU kernels is compiled with. The choice is made at run time: gemma4_fast/native.py.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c"
ISAS = {"plain": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}

# Sources of the CPU kernels that are compiled once, with plain flags, for all instruction sets.
ONCE = ("torch_ops.cpp", "pool.cpp")

# By its file: importing the package would need PyTorch, which is not there when a build is isolated.
spec = importlib.util.spec_from_file_location("cuda_build", "gemma4_fast/cuda_build.py")
assert spec is not None and spec.loader is not None
cuda_build = sys.modules["cuda_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_build)
ninja_quoted = cuda_build.quoted


# The kernels use the stable ABI of this release, so that they run with every later one.
OLDEST_TORCH = (2, 10)


def torch_folder() -> Path | None:
    """The folder of the PyTorch to compile against; None if there is none.

    An isolated build, as in a plain `pip install .`, cannot import the PyTorch of the environment that
    it builds for. But the kernels use the stable ABI alone, so they need only PyTorch's headers, and
    those can be found.
    """
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent
    beside = Path(sysconfig.get_path("platlib"), "torch")
    return beside if Path(beside, "version.py").is_file() else None


def torch_version(folder: Path) -> dict[str, object]:
    """What torch/version.py says: `__version__`, and `cuda`, None for a build without CUDA."""
    return runpy.run_path(str(folder / "version.py"))


def has_cuda() -> bool:
    """Whether the PyTorch that is there runs on NVIDIA's GPUs, and nvcc is at hand."""
    folder = torch_folder()
    if folder is None or isinstance(cuda_build.find_tools(), str):
        return False
    return torch_version(folder).get("cuda") is not None


def why_no_torch() -> str | None:
    """Why the CPU kernels cannot be compiled against this PyTorch; None if they can."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    folder = torch_folder()
    if folder is None:
        return f"the build found no PyTorch {oldest} or newer"
    version = str(torch_version(folder)["__version__"])
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        return f"the build found PyTorch {version}, and needs {oldest} or newer"
    return None


def progress(what: str) -> Callable[[int, int], None]:
    """Shows how far a build is, on a terminal in one line that changes.

    An example: "CPU kernels: 7 of 61 files".
    """

    def tell(done: int, steps: int) -> None:
        end = "\r" if sys.stdout.isatty() and done < steps else "\n"
        print(f"{what}: {done} of {steps} files", end=end, flush=True)

    return tell


def say_aloud(message: str) -> None:
    """Prints to stderr, and to the terminal if stderr is not one: pip hides what a build prints."""
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(f"\n{message}\n")
        except OSError:
            pass  # there is no terminal


NO_COMPILER = """the C++ compiler is missing or failed
    (to install one, Debian and Ubuntu: apt install g++; macOS: xcode-select --install)"""
LEFT_OUT = """\
{line}
gemma4-fast was built WITHOUT:
{left_out}
It works without them, but models on a CPU run many times slower.
To build them, type:

    pip install "torch>=2.10" ninja pybind11 "setuptools>=77"
    pip install --no-build-isolation {source}
{line}"""


class Build(build):
    """Starts without the modules of an earlier build, which pip would otherwise install again.

    pip builds in the source folder, where `build/` stays from one installation to the next.
    """

    def run(self) -> None:
        built = Path(self.build_lib, "gemma4_fast").resolve()
        if built != Path(__file__).resolve().parent / "gemma4_fast":  # `--build-lib .` builds in place
            shutil.rmtree(built, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds the bindings, and with ninja the libraries of kernels."""

    def run(self) -> None:
        self.reasons: dict[str, str] = {}  # why an extension was not built, by its name
        super().run()
        names = {native.name: "the C++ extension", kernels.name: "the CPU kernels"}
        missing = [
            f"  - {name}: {self.reasons.get(ext.name, NO_COMPILER)}"
            for ext in self.extensions
            if (name := names.get(ext.name)) and not Path(self.get_ext_fullpath(ext.name)).exists()
        ]
        if missing:
            editable = "-e ." if self.inplace else "."
            left_out = "\n".join(missing)
            say_aloud(LEFT_OUT.format(line="*" * 88, left_out=left_out, source=editable))

    def build_extension(self, ext: Extension) -> None:
        # A failed build is no error (see `optional` below), so what an earlier build left must not pass for its result.
        built = Path(self.get_ext_fullpath(ext.name))
        if newer_group([*ext.sources, *ext.depends], str(built)):
            built.unlink(missing_ok=True)
        if ext.name == kernels.name:
            self.build_kernels(ext, built)
            return
        if ext.name == cuda_kernels.name:
            self.build_cuda_kernels(ext, built)
            return
        command = [*getattr(self.compiler, "compiler_so", []), *ext.extra_compile_args]
        # Flags only: include folders and path maps would put this machine's paths into the binary.
        flags = [arg for arg in command[1:] if arg.startswith("-") and "/" not in arg]
        if sys.platform != "win32":  # quoting differs there; the flags are then reported as unknown
            ext.define_macros.append(("GEMMA4_FAST_FLAGS", '"{}"'.format(" ".join(flags).replace('"', '\\"'))))
        super().build_extension(ext)

    def build_kernels(self, ext: Extension, built: Path) -> None:
        """Each kernel file once per instruction set, those of ONCE once; see csrc/cpu/vec.h."""
        if (reason := why_no_torch()) is not None:
            raise self.left_out(ext, reason)
        try:
            from ninja import BIN_DIR, ninja_syntax
        except ImportError as error:  # it is not there, or another package of that name is
            raise self.left_out(ext, "the build found no ninja") from error
        if sys.platform == "win32":
            raise self.left_out(ext, "they are for GCC and Clang; on Windows gemma4-fast runs without them")
        torch = torch_folder()
        assert torch is not None
        folder = Path(self.build_temp, "cpu").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        built = built.resolve()
        built.parent.mkdir(parents=True, exist_ok=True)
        csrc = Path("csrc").resolve()
        # GCC 12 takes its own AVX-512 headers for uses of uninitialized memory.
        common = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -Wall -Wno-uninitialized -Wno-maybe-uninitialized"
        # A product and a sum must not become one instruction in one tile and stay two in another.
        common += f" -ffp-contract=off -I{ninja_quoted(csrc)} -ffile-prefix-map={ninja_quoted(csrc)}=csrc"
        common += f" {os.environ.get('CXXFLAGS', '')}"
        include = torch / "include"
        headers = include, include / "torch" / "csrc" / "api" / "include"
        torch_include = " ".join(f"-isystem {ninja_quoted(path)}" for path in headers)
        torch_flags = f"-DTORCH_TARGET_VERSION=0x020a000000000000 {torch_include}"  # the stable ABI of torch 2.10
        if len(ISAS) > 1:
            torch_flags += " -DGEMMA4_X86"
        if sys.platform == "darwin":
            link = "-bundle -undefined dynamic_lookup"
            library = "-ltorch_cpu"
        else:
            link = "-shared -pthread"
            library = "-Wl,--no-as-needed -ltorch_cpu -ldl"
        with (folder / "build.ninja").open("w") as file:
            n = ninja_syntax.Writer(file)
            n.variable("cxx", os.environ.get("CXX", "c++"))
            n.rule("compile", "$cxx -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"$cxx {link} $in -o $out -L{ninja_quoted(torch / 'lib')} {library} $ldflags")
            n.variable("ldflags", os.environ.get("LDFLAGS", ""))
            objects = []
            for source in map(Path, ext.sources):
                for isa, flags in {"": torch_flags}.items() if source.name in ONCE else ISAS.items():
                    target = f"{source.stem}.{isa or 'any'}.o"
                    flags += f" -DGEMMA4_ISA={isa}" if isa else ""
                    n.build(target, "compile", str(source.resolve()), variables={"flags": f"{common} {flags}"})
                    objects.append(target)
            n.build(str(built), "link", objects)
        try:
            said = cuda_build.run_ninja(folder, str(Path(BIN_DIR, "ninja")), jobs=self.jobs(), tell=progress("CPU kernels"))
        except cuda_build.BuildError as error:
            print(error, file=sys.stderr)
            raise self.left_out(ext, NO_COMPILER) from error
        if said:  # the compiler's warnings
            print(said, file=sys.stderr)

    def left_out(self, ext: Extension, reason: str) -> CompileError:
        """The error to raise when an extension cannot be built.

        `reason` is printed when all other extensions have been built.
        """
        self.reasons[ext.name] = reason
        return CompileError(reason)

    def jobs(self) -> int | None:
        return self.parallel if isinstance(self.parallel, int) else None

    def build_cuda_kernels(self, ext: Extension, built: Path) -> None:
        """For all GPUs that the kernels are for. Where this has not been done, native.py builds for those that are there."""
        folder, torch, tools = Path(self.build_temp, "cuda").resolve(), torch_folder(), cuda_build.find_tools()
        assert torch is not None and not isinstance(tools, str)
        built.parent.mkdir(parents=True, exist_ok=True)
        gencode = cuda_build.gencode(cuda_build.TARGETS, ptx_too=True)
        cuda_build.write_ninja(folder, built.resolve(), tools, torch, gencode, map(Path, ext.sources), Path("csrc").resolve())
        try:
            cuda_build.run_ninja(folder, tools.ninja, jobs=self.jobs(), tell=progress("CUDA kernels"))
        except cuda_build.BuildError as error:
            raise CompileError(f"nvcc {tools.version} could not build the CUDA kernels: {error}") from error

    def copy_extensions_to_source(self) -> None:  # the last step of an editable install and of `build_ext --inplace`
        for ext in self.extensions:
            Path("gemma4_fast", Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()


# Plain C++17 for any machine of the architecture: no -march=native.
native = Pybind11Extension(
    "gemma4_fast._native",
    sources=["csrc/native.cpp"],
    depends=["setup.py"],
    cxx_std=17,
    # Without a working compiler the package still installs; gemma4_fast/native.py then reports what is missing.
    optional=True,
)

# The CPU kernels, a library that PyTorch loads. Needs PyTorch's headers and ninja at build time.
kernels = Extension(
    "gemma4_fast._cpu",
    sources=sorted(glob("csrc/cpu/*.cpp")),
    depends=["setup.py", *sorted(glob("csrc/cpu/*.h"))],
    optional=True,
)

# The CUDA kernels, likewise. Without nvcc, or with a PyTorch that knows no CUDA, they are left out.
cuda_kernels = Extension(
    "gemma4_fast._cuda",
    sources=[*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/torch_ops.cpp"],
    depends=["setup.py", "gemma4_fast/cuda_build.py", *sorted(glob("csrc/cuda/*.cuh")), *sorted(glob("csrc/cuda/*.h"))],
    optional=True,
)

extensions = [native, kernels, *([cuda_kernels] if has_cuda() else [])]
ParallelCompile(default=os.cpu_count() or 1).install()

setup(
    # kernels/triton is imported as gemma4_fast.triton. The leaf is mapped, and kernels/ has no __init__.py: a top-level
    # package `kernels` would shadow the one that transformers looks for.
    # csrc/cuda comes along as data, to be compiled where a GPU is.
    packages=[*find_packages(include=["gemma4_fast", "gemma4_fast.*"]), "gemma4_fast.triton", "gemma4_fast.csrc.cuda"],
    package_dir={"gemma4_fast.triton": "kernels/triton", "gemma4_fast.csrc.cuda": "csrc/cuda"},
    package_data={
        "gemma4_fast.csrc.cuda": ["*.cu", "*.cuh", "*.h", "*.cpp"],
        "gemma4_fast": [
            "py.typed",
            # The tiny model: weights, configs, tokenizer, chat template, texts, and the script that trained it.
            *(f"tiny/*.{ending}" for ending in ("safetensors", "json", "jinja", "txt", "md", "py")),
            "tiny/LICENSE*",
        ],
    },
    # GEMMA4_FAST_NATIVE=0 leaves the extensions out.
    ext_modules=extensions if os.environ.get("GEMMA4_FAST_NATIVE") != "0" else [],
    cmdclass={"build": Build, "build_ext": BuildNative},
)
