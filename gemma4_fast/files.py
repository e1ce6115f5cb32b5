"""Files: paths as callers give them, JSON objects, errors in one line, the cache folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma4_fast.errors import CheckpointError


def path_text(path: object, wanted: str = "a path") -> str:
    """A caller's str or PathLike as text; ValueError for anything else."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise ValueError(f"expected {wanted}, got {type(path).__name__}")
    return text


def cache_folder() -> Path | None:
    """This package's folder in the user's cache; None where the user has no home folder.

    It is $XDG_CACHE_HOME/gemma4_fast, or ~/.cache/gemma4_fast if that variable is unset, empty or
    a relative path, which the XDG specification says to ignore. The folder need not exist.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "gemma4_fast"
    if os.environ.get("HOME") == "":  # which Path.home() takes for the root folder
        return None
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "gemma4_fast" if home.is_absolute() else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`; CheckpointError names the file if it cannot be read or is something else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{file}: cannot be read: {one_line(e)}") from e
    except (ValueError, RecursionError) as e:  # not only JSONDecodeError: an integer of some thousand digits, too
        raise CheckpointError(f"{file}: not valid JSON: {one_line(e)}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


ORIGINAL = "load the bf16 original it was made from"
FEWER_BITS = "quantize='int4' (--quantize int4) quantizes it while loading"
NO_GGUF = f"reads safetensors, not GGUF: {ORIGINAL}; {FEWER_BITS}"


def foreign(folder: Path) -> str | None:
    """What a folder holds in place of a checkpoint, and what to do; None if that is not known."""
    if (folder / "adapter_config.json").is_file():
        base = None
        with suppress(CheckpointError):
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return (
            f"is a PEFT adapter{of}, not a model. Load it with transformers and peft, merge it "
            "with model = model.merge_and_unload(), and then call gemma4_fast.accelerate(model) or "
            "save that model and load its folder"
        )
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"holds {files[0].name}, and this package {NO_GGUF}"
    return None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when all is written; until then what was there stays. A link
    stays one, and what it leads to is replaced; a device is written to as it is."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    beside = path.with_name(f".{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as e:  # of the file that was asked for
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        beside.unlink(missing_ok=True)


def one_line(e: BaseException) -> str:
    """An error's message without its line breaks; its type's name if it has none."""
    return " ".join(str(e).split()) or type(e).__name__
