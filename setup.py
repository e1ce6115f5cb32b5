"""What pyproject.toml cannot say: the package layout and the native extension."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# What each instruction set of the CPU kernels is compiled with. The choice is made at run time: gemma4_fast/native.py.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c"
ISAS = {"plain": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}

ONCE = ("torch_ops.cpp", "pool.cpp")  # of the CPU kernels' sources: compiled with plain flags, for all instruction sets

# By its file: importing the package would need PyTorch, which is not there when a build is isolated.
spec = importlib.util.spec_from_file_location("cuda_build", "gemma4_fast/cuda_build.py")
assert spec is not None and spec.loader is not None
cuda_build = sys.modules["cuda_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_build)
ninja_quoted = cuda_build.quoted


def torch_folder() -> Path | None:
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found is not None and found.origin is not None else None


def has_cuda() -> bool:
    """Whether the PyTorch that is there runs on NVIDIA's GPUs, and nvcc is at hand."""
    folder = torch_folder()
    version = Path(folder, "version.py") if folder else None
    if version is None or not version.exists() or isinstance(cuda_build.find_tools(), str):
        return False
    return runpy.run_path(str(version)).get("cuda") is not None


class BuildNative(build_ext):
    """Builds the bindings, and with ninja the libraries of kernels."""

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
        try:
            import ninja
            from ninja import ninja_syntax
            from torch.utils import cpp_extension

            runner = str(Path(ninja.BIN_DIR, "ninja"))
        except (ImportError, AttributeError) as error:  # AttributeError: some other package of that name
            raise CompileError(
                f"the CPU kernels need torch and ninja at build time ({error}); install torch and ninja, then gemma4-fast with "
                "`pip install --no-build-isolation`"
            ) from error
        if sys.platform == "win32":
            raise CompileError("the CPU kernels are built with GCC or Clang; on Windows gemma4-fast runs without them")
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
        torch_include = " ".join(f"-isystem {ninja_quoted(path)}" for path in cpp_extension.include_paths())
        torch_flags = f"-DTORCH_TARGET_VERSION=0x020a000000000000 {torch_include}"  # the stable ABI of torch 2.10
        if len(ISAS) > 1:
            torch_flags += " -DGEMMA4_X86"
        link = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        library = "-Wl,--no-as-needed -ltorch_cpu" if sys.platform != "darwin" else "-ltorch_cpu"
        with (folder / "build.ninja").open("w") as file:
            n = ninja_syntax.Writer(file)
            n.variable("cxx", os.environ.get("CXX", "c++"))
            n.rule("compile", "$cxx -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"$cxx {link} $in -o $out -L{ninja_quoted(cpp_extension.library_paths()[0])} {library} $ldflags")
            n.variable("ldflags", os.environ.get("LDFLAGS", ""))
            objects = []
            for source in map(Path, ext.sources):
                for isa, flags in {"": torch_flags}.items() if source.name in ONCE else ISAS.items():
                    target = f"{source.stem}.{isa or 'any'}.o"
                    flags += f" -DGEMMA4_ISA={isa}" if isa else ""
                    n.build(target, "compile", str(source.resolve()), variables={"flags": f"{common} {flags}"})
                    objects.append(target)
            n.build(str(built), "link", objects)
        jobs = [f"-j{self.parallel}"] if isinstance(self.parallel, int) else []
        command = [runner, "-C", str(folder), *([] if self.verbose > 1 else ["--quiet"]), *jobs]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"ninja could not build the CPU kernels, see above: {error}") from error

    def build_cuda_kernels(self, ext: Extension, built: Path) -> None:
        """For all GPUs that the kernels are for. Where this has not been done, native.py builds for those that are there."""
        folder, torch, tools = Path(self.build_temp, "cuda").resolve(), torch_folder(), cuda_build.find_tools()
        assert torch is not None and not isinstance(tools, str)
        built.parent.mkdir(parents=True, exist_ok=True)
        gencode = cuda_build.gencode(cuda_build.TARGETS, ptx_too=True)
        cuda_build.write_ninja(folder, built.resolve(), tools, torch, gencode, map(Path, ext.sources), Path("csrc").resolve())

        def tell(done: int, steps: int) -> None:
            print(f"CUDA kernels: {done} of {steps} files", flush=True)

        try:
            cuda_build.run_ninja(folder, tools, jobs=self.parallel if isinstance(self.parallel, int) else None, tell=tell)
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

# The CPU kernels, a library that PyTorch loads. Needs torch and ninja at build time, hence --no-build-isolation.
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
    cmdclass={"build_ext": BuildNative},
)
