"""What pyproject.toml cannot say: the package layout and the native extension."""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.modified import newer_group


class BuildNative(build_ext):
    """Builds the extension and tells it with which flags, so that a bug report can say so."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        command = [*getattr(self.compiler, "compiler_so", []), *ext.extra_compile_args]
        # Flags only: include folders and path maps would put this machine's paths into the binary.
        flags = [arg for arg in command[1:] if arg.startswith("-") and "/" not in arg]
        if sys.platform != "win32":  # quoting differs there; the flags are then reported as unknown
            ext.define_macros.append(("GEMMA4_FAST_FLAGS", '"{}"'.format(" ".join(flags).replace('"', '\\"'))))
        # A failed build is no error (see `optional` below), so what an earlier build left must not pass for its result.
        built = Path(self.get_ext_fullpath(ext.name))
        if newer_group([*ext.sources, *ext.depends], str(built)):
            built.unlink(missing_ok=True)
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:  # the last step of an editable install and of `build_ext --inplace`
        for ext in self.extensions:
            Path("gemma4_fast", Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()


# Plain C++17 for any machine of the architecture: no -march=native. A kernel that needs AVX-512 says so at its own
# function and is chosen at run time.
native = Pybind11Extension(
    "gemma4_fast._native",
    sources=sorted(glob("csrc/cpu/*.cpp")),
    include_dirs=["csrc"],
    depends=["setup.py", *sorted(glob("csrc/**/*.h", recursive=True))],
    cxx_std=17,
    # Without a working compiler the package still installs; gemma4_fast/native.py then reports what is missing.
    optional=True,
)

ParallelCompile(default=os.cpu_count() or 1).install()

setup(
    # kernels/triton is imported as gemma4_fast.triton. The leaf is mapped, and kernels/ has no __init__.py: a top-level
    # package `kernels` would shadow the one that transformers looks for.
    packages=[*find_packages(include=["gemma4_fast", "gemma4_fast.*"]), "gemma4_fast.triton"],
    package_dir={"gemma4_fast.triton": "kernels/triton"},
    package_data={
        "gemma4_fast": [
            "py.typed",
            # The tiny model: weights, configs, tokenizer, chat template, texts, and the script that trained it.
            *(f"tiny/*.{ending}" for ending in ("safetensors", "json", "jinja", "txt", "md", "py")),
            "tiny/LICENSE*",
        ]
    },
    # GEMMA4_FAST_NATIVE=0 leaves the extension out.
    ext_modules=[native] if os.environ.get("GEMMA4_FAST_NATIVE") != "0" else [],
    cmdclass={"build_ext": BuildNative},
)
