"""The optional C++ extension: what it says about the machine, and that the package lives without it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gemma4_fast import native

X86 = platform.machine().lower() in ("x86_64", "amd64")

# Our name -> the name in /proc/cpuinfo. Linux lists a feature there only if it is usable, like we do.
CPUINFO_NAMES = {
    "x86_64": {
        **{name: name for name in ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl")},
        **{name: name for name in ("amx_tile", "amx_int8", "amx_bf16")},
        "avx512vnni": "avx512_vnni",
        "avx512bf16": "avx512_bf16",
    },
    "aarch64": {"neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm", "sve": "sve"},
}


def require_native() -> None:
    """Skips where the extension is rightly missing; where a compiler is at hand, a missing extension is a failure."""
    if native.available():
        return
    compiler = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    assert shutil.which(compiler) is None, f"{compiler} is there, but: {native.missing_reason()}"
    pytest.skip(str(native.missing_reason()))


@pytest.fixture
def fresh_load() -> Iterator[None]:
    """Lets a test see the extension loaded, or fail to load, anew."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_available() -> None:
    require_native()
    assert native.missing_reason() is None
    threads = native.hardware_threads()
    assert threads is not None and threads >= 0


def test_cpu_features_are_named_on_every_machine() -> None:
    require_native()
    features = native.cpu_features()
    assert features is not None
    assert set(features) == set().union(*CPUINFO_NAMES.values())
    assert all(type(value) is bool for value in features.values())
    if X86:
        assert not any(features[name] for name in CPUINFO_NAMES["aarch64"])


def test_cpu_features_agree_with_the_operating_system() -> None:
    require_native()
    cpuinfo, names = Path("/proc/cpuinfo"), CPUINFO_NAMES.get(platform.machine())
    if not cpuinfo.exists() or names is None:
        pytest.skip("needs Linux on x86_64 or aarch64")
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
    if not lines:
        pytest.skip("this /proc/cpuinfo lists no features")
    listed = set(lines[0].partition(":")[2].split())
    features = native.cpu_features()
    assert features is not None
    assert {name: features[name] for name in names} == {name: theirs in listed for name, theirs in names.items()}


def test_build_info() -> None:
    require_native()
    info = native.build_info()
    assert info is not None
    assert set(info) == {"compiler", "compiler_version", "cxx_standard", "arch", "flags", "debug"}
    assert info["compiler"] in ("gcc", "clang", "msvc")
    assert info["cxx_standard"] == "C++17"
    assert type(info["debug"]) is bool
    assert "march" not in str(info["flags"])  # must run on every machine of the architecture
    assert "/" not in str(info["flags"])  # and tell nothing of the one it was built on


def test_without_the_extension(fresh_load: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma4_fast._native", None)  # makes its import fail
    assert not native.available()
    assert native.cpu_features() is None
    assert native.build_info() is None
    assert native.hardware_threads() is None
    assert "compiler" in str(native.missing_reason())


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source folder in which nothing has been built, and from where the package was imported."""
    package = tmp_path / "clone" / "gemma4_fast"
    package.mkdir(parents=True)
    (package.parent / "csrc").mkdir()
    (package.parent / "setup.py").touch()
    monkeypatch.setattr(native, "__file__", str(package / "native.py"))
    monkeypatch.setattr(sys, "path", [str(package.parent), str(tmp_path / "site-packages")])
    return package.parent


def said_of_kernels() -> str:
    return native.not_built("the CPU kernels were", "a compiler")


def test_sources_that_hide_the_installed_package(clone: Path, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "gemma4_fast"
    package.mkdir(parents=True)
    assert "Python was started" not in said_of_kernels()  # it has no libraries either
    (package / native._installed("_native").name).touch()
    said = said_of_kernels()
    assert f"Python was started in {clone}" in said
    assert f"installed package in {package} has them" in said
    assert "Start Python in another folder" in said and "a compiler" not in said
    assert len(said.replace(str(clone), "").replace(str(package), "")) < 180


def test_sources_in_which_nothing_was_built(clone: Path) -> None:
    said = said_of_kernels()
    assert f"were not built in {clone}" in said and "needs a compiler" in said
    assert "`pip install --no-build-isolation -e .`" in said


def test_a_package_installed_without_kernels(clone: Path) -> None:
    (clone / "setup.py").unlink()
    said = said_of_kernels()
    assert "not built when gemma4-fast was installed, which needs a compiler" in said
    assert "`pip install --no-build-isolation .`" in said


def test_only_the_kernels_are_missing(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: None)
    native.kernels_missing.cache_clear()
    assert str(native.kernels_missing()).startswith(f"the CPU kernels were not built in {clone}")
    native.kernels_missing.cache_clear()


def fail_import_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def import_module(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_an_extension_that_does_not_load(fresh_load: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_import_with(monkeypatch, ImportError("libstdc++.so.6: version `GLIBCXX_9' not found"))
    assert not native.available()
    assert "GLIBCXX_9" in str(native.missing_reason())


def test_other_errors_are_not_swallowed(fresh_load: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_import_with(monkeypatch, ModuleNotFoundError("No module named 'other'", name="other"))
    with pytest.raises(ModuleNotFoundError, match="other"):
        native.available()


def test_nothing_is_loaded_before_the_first_call() -> None:
    code = "import sys, gemma4_fast.native; print('gemma4_fast._native' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
