"""Verdicts of self-checks that passed, kept on disk so that the next start need not check again.

Each verdict is a small JSON file in `folder()`. Its name, the key, is the SHA-256 of everything
that could change the verdict:

- this package's sources and compiled libraries, PyTorch, Triton and Python;
- the processor and its instruction set, or the GPU and its driver, and the number of threads;
- the backends that serve the model, its dtype, and the bits of its weights;
- the checkpoint: config.json, and the headers, sizes and modification times of its safetensors
  files.

One change goes unnoticed: a weight that is edited in place by someone who then restores the
file's modification time.

Reading and writing never fail. A file that is damaged, or that another user could have written,
is ignored. If the folder cannot be written to, no verdict is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma4_fast import native, ops
from gemma4_fast.files import cache_folder
from gemma4_fast.layers import model_ops

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4
    from gemma4_fast.report import Report


LEVELS = ("quick", "full")


@dataclass(frozen=True)
class Verdict:
    """That a model has passed its self-check.

    level: "quick" or "full". time: when it passed, in seconds since 1970. from_disk: whether the
    verdict was read from disk, so that an earlier start ran the check.
    """

    level: str
    time: float
    from_disk: bool = False

    def __str__(self) -> str:
        """One line that says when the model passed."""
        when = time.strftime("%Y-%m-%d at %H:%M", time.localtime(self.time))
        return f"self-check passed on {when} with these weights and this build"


def folder() -> Path | None:
    """The folder of verdicts, `checked` in the cache folder; None if there is no home folder."""
    cache = cache_folder()
    return None if cache is None else cache / "checked"


def settle(
    model: Gemma4,
    check: bool | str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report | None:
    """Check the model as the argument `check` of `Gemma4.from_pretrained` says.

    True uses a verdict from disk if there is one, and otherwise checks like "quick". "quick" and
    "full" always check. The verdict is stored in `model.verdict`, and on disk if the model was
    loaded from a checkpoint. Returns the report, or None if no check ran. SelfCheckError: the
    model is wrong.
    """
    from gemma4_fast.verify import verify

    key = key_of(model)
    model.verdict = read(key) if check is True and key is not None else None
    if not check or model.verdict is not None:
        return None
    level = "full" if check == "full" else "quick"
    report = verify(model, level=level, seed=seed, progress=progress)
    report.raise_if_wrong()
    model.verdict = Verdict(level, time.time())
    if key is not None:
        write(key, model.verdict)
    return report


# ---------------------------------------------------------------- the key
def source_of(path: Path, load_format: str = "auto", seed: int = 0) -> str | None:
    """A SHA-256 in hex that tells one checkpoint from another without reading its weights.

    For load_format "dummy" it covers the config and the seed, which determine the weights. None if
    a file cannot be read; the code that reads the weights reports why.
    """
    sha = hashlib.sha256()
    with contextlib.suppress(OSError):
        _add(sha, load_format, (path / "config.json").read_bytes())
        if load_format == "dummy":
            _add(sha, seed)
            return sha.hexdigest()
        for file in sorted(path.glob("*.safetensors*")):
            found = file.stat()
            _add(sha, file.name, found.st_size, found.st_mtime_ns, _header(file))
        return sha.hexdigest()
    return None


def _header(file: Path) -> bytes:
    """The header of a safetensors file, or the whole of a JSON index."""
    if file.suffix == ".json":
        return file.read_bytes()
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return opened.read(min(size, 100_000_000))


def key_of(model: Gemma4) -> str | None:
    """The key of the model's verdict: a SHA-256 in hex of everything that could change it.

    None if no key can cover that: the model was not loaded from a checkpoint, or an op runs on a
    backend that another package has added.
    """
    if model.source is None:
        return None
    parts = parts_of(model)
    if any(_from_outside(op, backend) for op, backend in parts["backends"].items()):
        return None
    sha = hashlib.sha256()
    for part in parts.items():
        _add(sha, *part)
    return sha.hexdigest()


def parts_of(model: Gemma4) -> dict[str, Any]:
    """Everything that could change the verdict, by name."""
    with model.running():
        backends = {name: ops.decide(name, model.device, model.dtype)[0] for name in model_ops(model.config)}
        isa = native.ISA.get() or native.isas()[:1]
    return {
        "package": build(),
        "libraries": _libraries(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": _device(model.device),
        "isa": isa,
        "threads": torch.get_num_threads(),
        "config": repr(model.config),
        "source": model.source,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "requested": model.backend,
        "backends": backends,
    }


def _from_outside(op: str, backend: str) -> bool:
    """Whether the function by which a backend serves an op lies outside this package."""
    impl = ops.TABLE[op].impls.get(backend)
    return impl is not None and not impl.path.startswith("gemma4_fast.")


def _libraries() -> list[tuple[str, str]]:
    """Name and SHA-256 of each library with operators that is this package's or PyTorch's.

    They matter because they compute what the check compares; CUDA kernels built on this machine lie
    in the cache folder, where `build` does not look. Libraries of other packages do not count:
    importing such a package must not cause a new check, and if an op runs on one of them, no
    verdict is kept at all.
    """
    roots = [Path(__file__).parent.resolve(), Path(torch.__file__).parent.resolve()]
    if (cache := cache_folder()) is not None:
        roots.append(cache.resolve())
    found = []
    for name in torch.ops.loaded_libraries:
        library = Path(name).resolve()
        if any(library.is_relative_to(root) for root in roots):
            found.append((library.name, hash_of(library)))
    return sorted(found)


@functools.cache
def build() -> str:
    """A SHA-256 in hex of this package's sources, kernels and compiled libraries."""
    import gemma4_fast

    sha = hashlib.sha256(gemma4_fast.__version__.encode())
    triton: Iterable[str] = ()
    with contextlib.suppress(ImportError):
        import gemma4_fast.triton

        triton = gemma4_fast.triton.__path__
    for root in dict.fromkeys([Path(gemma4_fast.__file__).parent, *map(Path, triton)]):
        for file in sorted(root.rglob("*")):
            if file.suffix in (".py", ".so", ".pyd") and file.is_file():
                _add(sha, str(file.relative_to(root)), hash_of(file))
    return sha.hexdigest()


def hash_of(file: Path) -> str:
    """The SHA-256 of a file in hex, or "" if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def _device(device: torch.device) -> list[Any]:
    """The processor, or the GPU and its driver."""
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        return [
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
            torch.version.cuda,
            driver.read_text(encoding="utf-8") if driver.exists() else "",
        ]
    return [platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()]


@functools.cache
def _processor() -> str:
    """The processor's model, as the operating system names it."""
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU part")
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        lines = text.partition("\n\n")[0].splitlines()
        return "\n".join(x for x in lines if x.partition(":")[0].strip() in names)
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _add(sha: Any, *values: object) -> None:
    """Add each value with its length, so that different lists never give the same bytes."""
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode()
        sha.update(len(data).to_bytes(8, "little") + data)


# ---------------------------------------------------------------- the files
def read(key: str) -> Verdict | None:
    """The verdict with this key, or None if there is none that can be trusted."""
    if (place := folder()) is None:
        return None
    path = place / f"{key}.json"
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            return None
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or _foreign(status):
                return None
            data = json.loads(file.read(4096))
        if data["key"] != key or data["level"] not in LEVELS:
            return None
        found = Verdict(data["level"], float(data["time"]), from_disk=True)
        str(found)  # fails if the time is outside the calendar
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return found


def _foreign(found: os.stat_result) -> bool:
    """Whether another user could have written the file."""
    if not hasattr(os, "getuid"):
        return False
    return found.st_uid != os.getuid() or bool(found.st_mode & 0o022)


def write(key: str, verdict: Verdict) -> None:
    """Store a verdict if the folder can be written to.

    The file is renamed into place, so no other process can read an incomplete one.
    """
    if (place := folder()) is None:
        return
    data = {"key": key, **asdict(verdict)}
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=place, prefix=".", suffix=".tmp")  # 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file)
            Path(name).replace(place / f"{key}.json")
        finally:
            Path(name).unlink(missing_ok=True)
