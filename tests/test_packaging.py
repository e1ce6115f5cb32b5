"""The package as others get it: sdist and wheel, with and without a compiler, and what importing it pulls in."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import gemma4_fast
from gemma4_fast import cuda_build, native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "LICENSE"),
    *(".ci", "csrc", "examples", "gemma4_fast", "kernels", "tests"),
)
TINY = (
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "heldout.txt", "README.md", "train.py"),
)
# Slow to import, or not installed everywhere. Each is imported by the function that needs it.
HEAVY = ("transformers", "tokenizers", "jinja2", "rich", "triton", "huggingface_hub", "safetensors")
# Where `make wheel` can run: it needs a compiler, and auditwheel knows Linux alone.
MAKES_WHEEL = sys.platform == "linux" and native.available()
makes_wheel = pytest.mark.skipif(not MAKES_WHEEL, reason="needs Linux and a C++17 compiler")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Runs a command and returns what it printed; the test fails with the whole output if the command does."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # without a terminal, to which setup.py would write
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip_wheel(source: Path, folder: Path) -> list[str | Path]:
    """The command that builds a wheel with this environment's build tools; it fetches nothing."""
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    return [sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", folder, source]


# The start of a program that shall see the package unpacked in sys.argv[1], not the editable install of this checkout,
# which would fill in whatever the wheel lacks.
ONLY_UNPACKED = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
sys.path.insert(0, sys.argv[1])
"""


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def native_members(wheel: Path) -> list[str]:
    return [name for name in members(wheel) if re.match(r"gemma4_fast/_(native|cpu|cuda)\.", name)]


def python_files() -> set[str]:
    """Every module of the package, by its path in a wheel."""
    ours = {f"gemma4_fast/{path.relative_to(ROOT / 'gemma4_fast')}" for path in (ROOT / "gemma4_fast").rglob("*.py")}
    triton = {f"gemma4_fast/triton/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    return ours | triton


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything built: a build in the repository itself could pick up its leftovers."""
    folder = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r})", cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def built(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel that `make wheel` makes, and what it printed.

    It is built from the sdist, so that whatever the sdist lacks shows. It is not optimized, which
    would take three times as long: the build in place, on which the other tests run, is.
    """
    folder = tmp_path_factory.mktemp("wheel")
    not_optimized = {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -O0"}
    if not MAKES_WHEEL:
        printed = run(*pip_wheel(sdist, folder), cwd=folder, **not_optimized)
    else:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        (folder,) = folder.iterdir()
        # -o: this environment is set up, whatever its age.
        make = ("make", "wheel", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.dev-done")
        both = ("sh", "-c", '"$@" 2>&1', "sh")  # the warnings too
        printed = run(*both, *make, cwd=folder, MAKEFLAGS="", **not_optimized)
        folder = folder / "dist"
    (wheel,) = folder.glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, str]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new virtual environment, where pip has installed the wheel.

    pip found no compiler. What the package needs, PyTorch above all, is that of this environment.
    """
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    flags = ("--no-deps", "--no-index", "--disable-pip-version-check")
    without = {"PATH": str(python.parent), **NO_COMPILER}
    run(python, "-m", "pip", "install", *flags, wheel, cwd=folder, **without)
    # A line of a .pth file adds a folder without the folder's own .pth files, so this checkout,
    # which is installed as editable, stays out.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = run(python, "-c", code, cwd=folder)
    outer = [entry for entry in sys.path if entry.endswith("-packages")]
    Path(purelib.strip(), "outer.pth").write_text("\n".join(outer))
    return python.parent


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked: what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_kernels_can_be_compiled_where_they_are_installed(installed: Path, tmp_path: Path) -> None:
    code = "from gemma4_fast import cuda_build as b; print(*b.sources(b.csrc()))"
    sources = [Path(name) for name in run(sys.executable, "-I", "-c", ONLY_UNPACKED + code, installed, cwd=tmp_path).split()]
    assert {path.parent for path in sources} == {installed / "gemma4_fast" / "csrc" / "cuda"}
    texts = {path.name: path.read_text() for path in sources}
    included = {name for text in texts.values() for name in re.findall(r'^#include "cuda/(.+)"', text, re.M)}
    assert "device.cuh" in included and included <= set(texts)  # so -I gemma4_fast/csrc finds all
    code = "import importlib.util as u; print([u.find_spec(name) for name in ('csrc', 'kernels')])"
    said = run(sys.executable, "-I", "-c", ONLY_UNPACKED + code, installed, cwd=tmp_path)
    assert str(installed) not in said


def test_transformers_imports_from_the_repository_root() -> None:
    # `python -c` puts the current folder first on sys.path. With a kernels/__init__.py this import breaks.
    code = "import transformers; from transformers import Gemma4ForCausalLM as G; print(G.__module__)"
    assert "transformers.models.gemma4" in run(sys.executable, "-c", code, cwd=ROOT)


def test_kernels_is_no_package(wheel: Path, tmp_path: Path) -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not any(name.startswith("kernels") for name in members(wheel))
    # Nor does an editable install make it one (a `kernels` from elsewhere may be installed).
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.submodule_search_locations)"
    assert str(ROOT) not in run(sys.executable, "-I", "-c", code, cwd=tmp_path)


def test_triton_kernels_are_a_subpackage(tmp_path: Path) -> None:
    assert gemma4_fast.__file__ is not None
    if Path(gemma4_fast.__file__).resolve().parent != ROOT / "gemma4_fast":
        pytest.skip("not an editable install")
    code = "import gemma4_fast.triton as t; print(t.__file__)"
    for folder in (tmp_path, ROOT):
        path = Path(run(sys.executable, "-c", code, cwd=folder).strip())
        assert path.resolve() == ROOT / "kernels" / "triton" / "__init__.py"


def test_sdist_can_be_built_and_read(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert csrc | kernels <= names
    assert {"Makefile", "README.md", "LICENSE", "setup.py", "tests/requirements/run.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_everything(wheel: Path) -> None:
    names = members(wheel)
    assert python_files() <= names
    assert {f"gemma4_fast/tiny/{name}" for name in TINY} <= names
    assert "gemma4_fast/py.typed" in names
    built = [native.available(), native.available() and native.kernels_missing() is None]
    built.append(torch.version.cuda is not None and not isinstance(cuda_build.find_tools(), str))
    assert [any(part in name for name in native_members(wheel)) for part in ("/_native.", "/_cpu.", "/_cuda.")] == built
    # The CUDA kernels' sources, to be compiled where the GPU is.
    cuda = {f"gemma4_fast/csrc/cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix != ".md"}
    assert cuda == {name for name in names if name.startswith("gemma4_fast/csrc/")} and len(cuda) >= 5
    # Nothing else: no tests, sources or leftovers. The licence lies in the dist-info folder.
    info = f"gemma4_fast-{version('gemma4-fast')}.dist-info/"
    assert not [name for name in names if not name.startswith(("gemma4_fast/", info))]
    assert not [name for name in names - cuda if name.endswith((".pyc", ".cpp", ".h", ".cu", ".cuh"))]
    assert f"{info}licenses/LICENSE" in names
    assert (ROOT / "gemma4_fast/tiny/model.safetensors").stat().st_size < 12e6


def test_wheel_metadata(wheel: Path) -> None:
    info = f"gemma4_fast-{version('gemma4-fast')}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(f"{info}entry_points.txt").decode()
        metadata = archive.read(f"{info}METADATA").decode()
    assert "gemma4-fast = gemma4_fast.cli:main" in scripts
    assert f"\nVersion: {gemma4_fast.__version__}\n" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    always = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE))
    # transformers is optional, and PyTorch brings the triton that fits it.
    assert always == {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich", "huggingface_hub", "psutil"}


@makes_wheel
def test_wheel_is_for_many_linuxes(wheel: Path, tmp_path: Path) -> None:
    from elftools.elf.elffile import ELFFile  # auditwheel's

    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = rf"{python}-{python}-manylinux_2_(\d+)_{platform.machine()}"
    version = re.escape(gemma4_fast.__version__)
    name = re.fullmatch(rf"gemma4_fast-{version}-({tag})\.whl", wheel.name)
    assert name is not None, wheel.name
    # The Linux that it was built on is new enough for it; usually an older one is, too.
    assert int(name[2]) <= int(platform.libc_ver()[1].split(".")[1])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (described,) = tmp_path.glob("*.dist-info/WHEEL")
    assert f"\nTag: {name[1]}\n" in described.read_text()
    libraries = [path for path in tmp_path.rglob("*") if ".so" in path.name]
    assert {path.name.partition(".")[0] for path in libraries} >= {"_native", "_cpu"}
    # PyTorch's libraries are not in the wheel, nor looked for in a folder of this machine.
    assert {path.parent for path in libraries} == {tmp_path / "gemma4_fast"}
    system = r"(libc|libm|libgcc_s|libstdc\+\+|libpthread|ld-linux[\w-]*)\.so\.\d+"
    for path in libraries:
        with path.open("rb") as file:
            tags = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        others = {library for library in needed if not re.fullmatch(system, library)}
        assert others == (set() if path.name.startswith("_native") else {"libtorch_cpu.so"})
        assert not [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


@makes_wheel
def test_a_build_says_how_far_it_is(built: tuple[Path, str]) -> None:
    steps = re.findall(r"^CPU kernels: (\d+) of (\d+) files$", built[1], re.M)
    assert len({total for _, total in steps}) == 1
    total = int(steps[0][1])
    assert total > 20 and [int(done) for done, _ in steps] == list(range(1, total + 1))


@makes_wheel
def test_making_a_wheel_uses_nothing_deprecated(built: tuple[Path, str]) -> None:
    assert "eprecat" not in built[1]


def test_a_wheel_holds_nothing_of_an_earlier_build(tree: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tree, source)
    for name in ("lib", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"):
        stale = source / "build" / name / "gemma4_fast" / "removed_long_ago.py"
        stale.parent.mkdir(parents=True)
        stale.touch()
    run(*pip_wheel(source, tmp_path), cwd=tmp_path, GEMMA4_FAST_NATIVE="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert python_files() <= members(wheel)
    assert "gemma4_fast/removed_long_ago.py" not in members(wheel)


@makes_wheel
def test_linting_does_not_fetch_triton(tmp_path: Path) -> None:
    def steps(target: str) -> str:
        return run("make", "-n", target, f"VENV={tmp_path}/venv", cwd=ROOT, MAKEFLAGS="")

    assert "requirements/triton.txt" in steps("test")
    lint = steps("lint")
    assert "requirements/dev.txt" in lint and "triton.txt" not in lint


@makes_wheel
def test_wheel_runs_where_there_is_no_compiler(fresh: Path, tmp_path: Path) -> None:
    nowhere = {"PATH": str(fresh), "PYTHONPATH": "", "HOME": str(tmp_path), **NO_COMPILER}
    command = ("generate", "It is a truth", "--max-new-tokens", "4", "--device", "cpu", "--json")
    said = json.loads(run(fresh / "gemma4-fast", *command, cwd=tmp_path, **nowhere))
    assert len(said["tokens"]) == 4
    assert set(said["backends"].values()) == {"cpu", "composed"}
    code = "import gemma4_fast, shutil; print(gemma4_fast.__file__, shutil.which('c++'))"
    file, compiler = run(fresh / "python", "-c", code, cwd=tmp_path, **nowhere).split()
    assert Path(file).is_relative_to(fresh.parent) and compiler == "None"


# Runs the rest of the command line on a terminal of its own, and prints all that came there.
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal as Unix has it")
def test_wheel_without_a_compiler(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    command = pip_wheel(sdist, tmp_path)
    # pip hides what a build prints, but the user is told on the terminal.
    seen = run(sys.executable, "-c", ON_A_TERMINAL, *command, cwd=tmp_path, **NO_COMPILER)
    assert "gemma4-fast was built WITHOUT:" in seen
    for name in ("the C++ extension", "the CPU kernels"):
        assert f"- {name}: the C++ compiler is missing or failed" in seen, seen
    assert "pip install --no-build-isolation ." in seen
    (without,) = tmp_path.glob("*.whl")
    assert not native_members(without)
    assert members(wheel) - members(without) == set(native_members(wheel))
    with zipfile.ZipFile(without) as archive:
        archive.extractall(tmp_path / "installed")
    code = ONLY_UNPACKED + "from gemma4_fast import native; print(native.available(), native.missing_reason())"
    said = run(sys.executable, "-I", "-c", code, tmp_path / "installed", cwd=tmp_path)
    assert said.startswith("False") and "compiler" in said


@makes_wheel
def test_sources_that_hide_the_installed_package(tree: Path, installed: Path) -> None:
    """`python -c` puts the current folder first, here a clone in which nothing has been built."""
    code = f"""{ONLY_UNPACKED}
sys.path.append(sys.path.pop(0))
from gemma4_fast import native
print(native.kernels_missing())
"""
    said = run(sys.executable, "-c", code, installed, cwd=tree)
    assert f"Python was started in {tree}" in said and f"installed package in {installed}" in said
    assert "compiler" not in said


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines; nothing is built."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setitem(sys.modules, "cuda_build", cuda_build)  # setup.py puts its own there
    return runpy.run_path("setup.py")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "the build found no PyTorch 2.10 or newer"),
        ("2.9.1+cpu", "the build found PyTorch 2.9.1+cpu, and needs 2.10 or newer"),
        ("2.10.0", None),
        ("3.0.0a0+git1234567", None),
    ],
)
def test_an_isolated_build_uses_the_environments_torch(
    version: str | None,
    reason: str | None,
    setup_py: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as in an isolated build
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup_py["why_no_torch"]() == reason


def test_a_build_without_torch_says_what_it_left_out(
    setup_py: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    distribution = setuptools.Distribution({"ext_modules": [setup_py["kernels"]]})
    command = setup_py["BuildNative"](distribution)
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.finalize_options()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    command.run()
    said = capfd.readouterr().err
    assert "  - the CPU kernels: the build found no PyTorch 2.10 or newer\n" in said
    assert 'pip install "torch>=2.10" ninja pybind11' in said


# Imports torch first, then takes away the network and other programs, then imports the package.
IMPORT_PROBE = """
import json
import torch

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        raise RuntimeError(f"import gemma4_fast did {event} {args}")

sys.addaudithook(refuse)
before = set(sys.modules)
import gemma4_fast
print(json.dumps([gemma4_fast.__file__, sorted(set(sys.modules) - before)]))
"""


def test_import_is_light_and_needs_nothing_from_outside(installed: Path, tmp_path: Path) -> None:
    # No compiler either: nothing can be found on an empty PATH.
    said = run(sys.executable, "-I", "-c", ONLY_UNPACKED + IMPORT_PROBE, installed, cwd=tmp_path, PATH="")
    file, imported = json.loads(said)
    assert Path(file) == installed / "gemma4_fast" / "__init__.py"
    assert not {name.partition(".")[0] for name in imported} & set(HEAVY)
    assert "gemma4_fast.cli" not in imported


def test_wheel_works_where_it_is_unpacked(installed: Path, tmp_path: Path) -> None:
    code = ONLY_UNPACKED + (
        "import gemma4_fast.triton, gemma4_fast.native as native; from gemma4_fast.cli import main; "
        "print(gemma4_fast.triton.__file__, native.available(), callable(main))"
    )
    said = run(sys.executable, "-I", "-c", code, installed, cwd=tmp_path).split()
    assert said == [str(installed / "gemma4_fast/triton/__init__.py"), str(native.available()), "True"]


def test_set_up_installs_exact_versions() -> None:
    lines = []
    for name in ("run.txt", "dev.txt", "triton.txt"):
        lines += (ROOT / "tests" / "requirements" / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "-r"))]
    pin = r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+"|; sys_platform == "linux")?'
    assert not [line for line in pins if not re.fullmatch(pin, line)]
    assert "torch==2.13.0" in pins
