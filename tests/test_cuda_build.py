"""How the CUDA kernels become a library: at first use, with what is there; and that PyTorch loads it, even one without CUDA."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_compiled
import pytest
import torch

from gemma4_fast import cuda_build, native
from gemma4_fast.ops import table

# ---- the library itself ----

LOAD = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gemma4_fast_cuda::")]
has = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
said = None
if not torch.cuda.is_available():
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    try:
        on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        torch.ops.gemma4_fast_cuda.rms_norm.default.redispatch(on_gpu, x, None, x, 1e-6, 0, False)
    except RuntimeError as error:
        said = str(error)
print(json.dumps([names, has, said]))
"""


@pytest.mark.skipif(isinstance(cuda_build.find_tools(), str), reason=f"the package {cuda_build.find_tools()}")
@pytest.mark.full
def test_the_library_loads_without_a_gpu() -> None:
    """Whatever PyTorch this is: no CUDA library is wanted by the one that was built, and none is given away."""
    folder = cuda_compiled.BUILD / cuda_compiled.QUICK
    tools, _ = cuda_compiled.prepare(cuda_compiled.QUICK, folder)
    cuda_build.run_ninja(folder, tools.ninja)
    library = folder / "_cuda.so"
    done = subprocess.run([sys.executable, "-c", LOAD, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names, has, said = json.loads(done.stdout)
    assert "gemma4_fast_cuda::rms_norm" in has and set(has) == set(names)
    if not torch.cuda.is_available():
        assert said is not None and said.startswith("CUDA: ")  # what a launch throws is a Python error, with CUDA's words
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in symbols.lower().replace("gemma4_fast_cuda", "") and "stable" not in symbols.replace(" U ", "")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed and "libcuda" not in needed


# ---- building at first use ----

COMPILER = """\
#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V{version}"; exit ;;
  *--list-gpu-code*) printf 'sm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\nsm_120\\n'; exit ;;
esac
echo "$*" >> {log}
if [ -e {broken} ]; then echo "norms.cu(3): error: no such thing"; exit 1; fi
while [ "$1" != "-o" ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with compilers that write down what they are asked for, and a cache of its own; broken: they fail."""
    said = dict(log=tmp_path / "asked", broken=tmp_path / "broken", version="13.0.88")
    for name in ("bin/nvcc", "bin/cxx"):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(COMPILER.format(**said))
        program.chmod(0o755)
    for name in ("CUDACXX", "CUDA_PATH", "GEMMA4_FAST_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "cxx"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def built(*capabilities: tuple[int, int], torch: str = "2.13.0") -> Path:
    return native._built_for(torch, Path("/where/torch/is"), set(capabilities or [(9, 0)]))


def asked(machine: Path) -> str:
    return (machine / "asked").read_text() if (machine / "asked").exists() else ""


def test_built_once_and_found_again(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gemma4_fast"):
        library = built()
    assert library.read_text() == "made\n" and library.is_relative_to(machine / "cache" / "gemma4_fast")
    begins, ends = caplog.messages
    assert "building the CUDA kernels with nvcc 13.0.88" in begins and "sm_90a" in begins and str(library.parent) in begins
    assert "built in " in ends
    files = [line for line in asked(machine).splitlines() if " -c " in line]
    assert len(files) == len([*cuda_build.csrc().glob("cuda/*.cu"), *cuda_build.csrc().glob("cuda/*.cpp")])
    assert all("code=sm_90a" in line and "sm_80" not in line for line in files if ".cu " in line)
    assert sorted(p.name for p in library.parent.iterdir()) == ["_cuda.so", "lock"]  # nothing else is left
    (machine / "broken").touch()
    assert built() == library and len(caplog.messages) == 2


def test_what_makes_another_library(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {built(), built(torch="2.14.0"), built((8, 6)), built((8, 6), (9, 0))}
    for name in ("nvcc", "cxx"):
        compiler = machine / "bin" / name
        compiler.write_text(compiler.read_text().replace("V13.0.88", "V13.1.2"))
        made.add(built())
    (machine / "csrc" / "cuda").mkdir(parents=True)
    for path in cuda_build.sources(cuda_build.csrc()):
        (machine / "csrc" / "cuda" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cuda_build, "csrc", lambda: machine / "csrc")
    assert built() in made  # the same files in another place
    header = machine / "csrc" / "cuda" / "device.cuh"
    header.write_text(header.read_text() + "\n")
    made.add(built())
    assert len(made) == 7 and all(path.exists() for path in made)


def test_two_that_build_at_once(machine: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: built(), range(2))
    assert one == other and one.read_text() == "made\n" and len(list(one.parent.iterdir())) == 2
    files = [line for line in asked(machine).splitlines() if " -c " in line]
    assert len(files) == len([*cuda_build.csrc().glob("cuda/*.cu"), *cuda_build.csrc().glob("cuda/*.cpp")])  # by one of them


def test_progress_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "SAY_AFTER", 0)
    with caplog.at_level(logging.WARNING, "gemma4_fast"):
        built()
    steps = [message for message in caplog.messages if " files are built after " in message]
    assert steps and steps[-1].startswith(f"gemma4_fast: {len(steps)} of {len(steps)} ")


@pytest.fixture
def fresh() -> Iterator[None]:
    native._cuda_kernels_missing.cache_clear()
    table.backend_missing.cache_clear()
    yield
    native._cuda_kernels_missing.cache_clear()
    table.backend_missing.cache_clear()


@pytest.fixture
def one_gpu(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch says that there is a GPU; nothing was built when the package was installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A GPU")
    monkeypatch.setattr(native, "_installed", lambda name: tmp_path / "not built")


def test_a_build_that_fails_is_told_once(machine: Path, one_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    (machine / "broken").touch()
    with caplog.at_level(logging.WARNING, "gemma4_fast"):
        why = table.backend_missing("cuda", "cuda")
        table.backend_missing.cache_clear()
        assert table.backend_missing("cuda", "cuda") == why
    assert why == f"could not build its kernels with {machine}/bin/nvcc: see the log"
    (told,) = (message for message in caplog.messages if "norms.cu(3): error: no such thing" in message)
    assert "others are used" in told
    assert not list((machine / "cache").rglob("*.so")) and not list((machine / "cache").rglob("build-*"))


def test_what_does_not_load_is_told(machine: Path, one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    why = native.cuda_kernels_missing()
    assert why is not None and why.startswith("has kernels in ") and "do not run here" in why and "file too short" in why
    native._cuda_kernels_missing.cache_clear()

    def too_old() -> None:
        raise RuntimeError("CUDA: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native, "_try_out", too_old)
    assert "driver version is insufficient" in str(native.cuda_kernels_missing())
    native._cuda_kernels_missing.cache_clear()
    monkeypatch.setattr(native, "_try_out", lambda: None)
    assert native.cuda_kernels_missing() is None and table.backend_missing("cuda", "cuda") is None


def test_what_installing_has_built_comes_first(machine: Path, one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, loaded = machine / "_cuda.so", list[str]()
    installed.touch()
    monkeypatch.setattr(native, "_installed", lambda name: installed)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(native, "_try_out", lambda: None)
    assert native.cuda_kernels_missing() is None and loaded == [str(installed)] and not asked(machine)
    # But for a GPU that it has nothing for: then what is built for all that are there.
    native._cuda_kernels_missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (11, 0))[i])
    assert native.cuda_kernels_missing() is None
    assert loaded[1:] == [str(built((9, 0), (11, 0), torch=torch.__version__))]
    native._cuda_kernels_missing.cache_clear()
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    why = str(native.cuda_kernels_missing())
    assert why.startswith("needs nvcc ") and why.endswith(" (those installed are not for compute capability 11.0)")


def test_what_is_missing_is_one_sentence(machine: Path, one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        native._cuda_kernels_missing.cache_clear()
        said = native.cuda_kernels_missing()
        assert said is not None and said[0].islower() and "\n" not in said
        return said

    (machine / "cache").touch()  # no folder can be made there
    assert "XDG_CACHE_HOME" in missing()
    monkeypatch.setattr(cuda_build, "find_ninja", lambda: None)
    assert missing() == "needs ninja to build its kernels, and there is none: pip install ninja"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler: install g++" in missing()
    nvcc = machine / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("V13.0.88", "V12.6.3"))
    assert f"needs nvcc 12.8 or newer to build its kernels, and {nvcc} is 12.6.3" in missing()
    nvcc.write_text("#!/bin/sh\n")
    assert "reports no version" in missing()
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    assert "needs nvcc to build its kernels, and there is none: install the CUDA toolkit" in missing()
    monkeypatch.setenv("GEMMA4_FAST_NATIVE", "0")
    assert "GEMMA4_FAST_NATIVE is 0" in missing()


def test_nvcc_where_it_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc, other = machine / "bin" / "nvcc", machine / "other" / "nvcc"
    other.parent.mkdir()
    other.write_bytes(nvcc.read_bytes())
    other.chmod(0o755)
    assert cuda_build.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDACXX", str(other))
    assert cuda_build.find_nvcc() == str(other)
    monkeypatch.delenv("CUDACXX")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(other.parent))
    assert cuda_build.find_nvcc() == str(other)


def test_which_gpus_the_backend_is_for(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str | None:
        table.backend_missing.cache_clear()
        return table.backend_missing("cuda", "cuda")

    monkeypatch.setattr(native, "cuda_kernels_missing", lambda: "was asked")
    assert missing() == "was asked"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((8, 0), (7, 5))[i])
    assert str(missing()).startswith("needs compute capability 8.0, and A GPU has 7.5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch finds none" in str(missing())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert missing() == "needs an NVIDIA GPU"


@pytest.mark.parametrize(
    "capability, target",
    [
        ((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
        ((11, 0), "compute_100"), ((12, 1), "sm_120"), ((13, 0), "compute_120"), ((7, 5), None),
    ],
)  # fmt: skip
def test_what_is_compiled_for_a_gpu(capability: tuple[int, int], target: str | None) -> None:
    assert cuda_build.target_for(capability, ["sm_120", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100"]) == target
    assert cuda_build.installed_for(capability) == (capability not in ((11, 0), (7, 5)))


def test_flags_for_targets() -> None:
    assert cuda_build.gencode(["sm_80", "sm_90a"]) == (
        "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a"
    )
    assert cuda_build.gencode(["sm_90a", "sm_120"], ptx_too=True).endswith(
        " -gencode=arch=compute_120,code=sm_120 -gencode=arch=compute_120,code=compute_120"
    )
    assert cuda_build.gencode(["compute_120"]) == "-gencode=arch=compute_120,code=compute_120"
