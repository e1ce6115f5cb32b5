"""Verdicts of self-checks on disk: when one is taken, when not, and that no file does harm."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import Terminal

from gemma4_fast import Gemma4, SelfCheckError, ops, use_backend, verdicts, verify
from gemma4_fast.cli import main
from gemma4_fast.demo import Demo
from gemma4_fast.errors import CheckpointError
from gemma4_fast.ops import torch_backend
from gemma4_fast.report import Report
from gemma4_fast.weights import tiny_path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of verdicts."""
    folder = tmp_path / "checked"
    monkeypatch.setattr(verdicts, "folder", lambda: folder)
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The level of each self-check that runs; none of them computes anything."""
    levels: list[str] = []

    def passed(model: Gemma4, *, level: str, progress: Any = None, **_: Any) -> Report:
        levels.append(level)
        if progress is not None:
            progress(1, 1)
        return Report(level, "cpu", "bfloat16", {})

    module = sys.modules["gemma4_fast.verify"]  # the package exports the function by this name
    monkeypatch.setattr(module, "verify", passed)
    return levels


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the packaged model."""
    names = ("config.json", "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        shutil.copy2(tiny_path() / name, folder / name)
    return folder


def load(path: str | Path = "tiny", **options: Any) -> Gemma4:
    return Gemma4.from_pretrained(path, progress=False, **options)


def test_the_second_start_takes_the_first_ones_verdict(
    kept: Path,
    runs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = load().verdict
    assert first is not None and not first.from_disk and runs == ["quick"]
    second = load().verdict
    assert second is not None and second.from_disk and second.time == first.time
    assert capsys.readouterr().err == ""
    Gemma4.from_pretrained("tiny")
    assert runs == ["quick"]
    assert capsys.readouterr() == ("", "")  # the library prints nothing
    assert "passed on 20" in str(second) and " at " in str(second)
    (file,) = kept.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and kept.stat().st_mode & 0o777 == 0o700


def test_the_logger_tells_when_the_model_passed(
    kept: Path,
    runs: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="gemma4_fast")
    load()
    assert caplog.messages == []
    found = load().verdict
    assert caplog.messages == [f'gemma4_fast: {found}; check="quick" runs it again']


def test_a_terminal_tells_when_the_model_passed(
    kept: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="gemma4_fast")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    Gemma4.from_pretrained("tiny")
    before = len(shown.getvalue())
    found = Gemma4.from_pretrained("tiny").verdict
    line = f'gemma4_fast: {found}; check="quick" runs it again'
    assert line in shown.getvalue()[before:]
    assert caplog.messages == []
    before = len(shown.getvalue())
    load()
    assert line not in shown.getvalue()[before:]


def test_the_command_line_names_its_own_option(
    kept: Path,
    runs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["generate", "It", "--max-new-tokens", "1", "--device", "cpu"]
    assert main(command) == 0
    assert "self-check" not in capsys.readouterr().err
    assert main(command) == 0
    assert runs == ["quick"]
    printed = capsys.readouterr()
    assert "with these weights and this build; --check quick runs it again\n" in printed.err
    assert "self-check" not in printed.out
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert "self-check" not in printed.err
    assert json.loads(printed.out)["check"].startswith("self-check passed on 20")


def test_a_verdict_from_disk_shows_no_progress(
    kept: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["generate", "It", "--max-new-tokens", "1", "--device", "cpu"]

    def shown(*options: str) -> str:
        stderr = Terminal()
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main([*command, *options]) == 0
        return stderr.getvalue()

    load()
    again = shown()
    assert "self-check passed on" in again and "checking" not in again
    assert shown("--quiet") == ""
    assert "checking" in shown("--check", "quick")


def test_the_demo_says_what_checked_the_model(
    kept: Path,
    runs: list[str],
) -> None:
    def said(check: bool) -> str:
        return Demo(load(check=check), Namespace(seed=0, prompt=None), None).check_at_load()

    load()
    assert said(True) == "passed at an earlier start"
    assert said(False) == "skipped"


def test_what_is_asked_for_by_name_always_runs(kept: Path, runs: list[str]) -> None:
    for check in ("quick", "full", "quick", True):
        load(check=check)
    assert runs == ["quick", "full", "quick"]
    assert load(check=False).verdict is None


def test_a_full_verdict_serves_a_quick_one(kept: Path, runs: list[str]) -> None:
    load(check="full")
    found = load().verdict
    assert found is not None and found.level == "full" and runs == ["full"]


def test_a_check_that_fails_leaves_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impl = ops.TABLE["geglu_mlp"].impls["torch"]
    right = impl.function
    monkeypatch.setitem(vars(impl), "function", lambda x, *w: right(x, *w) + 1)
    for _ in range(2):
        with pytest.raises(SelfCheckError):
            load(backend="torch")
    assert not kept.exists()


def rewritten(folder: Path) -> None:
    """Another weight of the same size, which the time of the file's last change tells of."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1_000_000))


def other_config(folder: Path) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["rms_norm_eps"] = 2e-6
    file.write_text(json.dumps(data), encoding="utf-8")


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path], dict[str, Any]]] = {
    "dtype": lambda m, path: dict(dtype="float32"),
    "bits": lambda m, path: dict(quantize="int8"),
    "backend": lambda m, path: dict(backend="torch"),
    "a weight": lambda m, path: rewritten(path) or {},  # type: ignore[func-returns-value]
    "config": lambda m, path: other_config(path) or {},  # type: ignore[func-returns-value]
    "sources": lambda m, path: m.setattr(verdicts, "build", lambda: "other") or {},  # type: ignore[func-returns-value]
    "libraries": lambda m, path: m.setattr(verdicts, "hash_of", lambda file: "x") or {},  # type: ignore[func-returns-value]
    "torch": lambda m, path: m.setattr(torch, "__version__", "2.99.0") or {},  # type: ignore[func-returns-value]
    "triton": lambda m, path: m.setattr(verdicts, "_version", lambda name: "9") or {},  # type: ignore[func-returns-value]
    "processor": lambda m, path: m.setattr(verdicts, "_processor", lambda: "Z80") or {},  # type: ignore[func-returns-value]
    "dummy weights": lambda m, path: dict(load_format="dummy"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_checks_again(
    what: str,
    kept: Path,
    checkpoint: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(checkpoint)
    load(checkpoint)
    assert runs == ["quick"]
    verdicts.build()  # hashed before anything else is
    options = CHANGES[what](monkeypatch, checkpoint)
    load(checkpoint, **options)
    assert runs == ["quick", "quick"]


def outside_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return torch_backend.rms_norm(x, weight, eps)


def test_no_verdict_is_kept_for_code_from_outside(
    kept: Path,
    checkpoint: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such code may change, and no part of the key would."""
    outside = ops.Impl(f"{__name__}:outside_rms_norm")
    for backend in ("torch", "cpu"):
        monkeypatch.setitem(ops.TABLE["rms_norm"].impls, backend, outside)
    load(checkpoint)
    load(checkpoint)
    assert runs == ["quick", "quick"]
    assert not kept.exists()


def test_threads_and_instruction_sets_are_in_the_key(kept: Path) -> None:
    model = load(check=False)
    parts, threads = verdicts.parts_of(model), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert verdicts.parts_of(model)["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)
    with use_backend("torch"):
        assert verdicts.parts_of(model)["backends"] != parts["backends"]
    assert {"python", "isa", "device", "config"} <= parts.keys()


def test_every_file_of_the_package_is_in_the_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gemma4_fast

    (tmp_path / "ops").mkdir()
    (tmp_path / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(gemma4_fast, "__file__", str(tmp_path / "__init__.py"))
    found = set()
    for name in ("ops/linear.py", "_cpu.so"):
        for text in ("a", "b"):
            (tmp_path / name).write_text(text, encoding="utf-8")
            found.add(verdicts.build.__wrapped__())
    assert len(found) == 4


def test_dummy_weights_are_told_by_their_seed(kept: Path, runs: list[str]) -> None:
    for seed in (1, 1, 2):
        load(load_format="dummy", seed=seed)
    assert runs == ["quick", "quick"]


DAMAGED = ["", "{", "[]", "{}", "null", '{"key": 1}', "\0" * 99, "[" * 4096]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_none(text: str, kept: Path, runs: list[str]) -> None:
    load()
    (file,) = kept.iterdir()
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")
    load()
    assert runs == ["quick", "quick"]
    assert json.loads(file.read_text(encoding="utf-8")).keys() == whole.keys()  # written anew


OTHERS: list[dict[str, Any]] = [
    {"key": "other"},
    {"level": "none"},
    {"time": "soon"},
    {"time": None},
    {"time": float("nan")},
    {"time": 1e300},
]


@pytest.mark.parametrize("change", OTHERS)
def test_a_file_that_says_something_else_is_none(
    change: dict[str, Any],
    kept: Path,
    runs: list[str],
) -> None:
    load()
    (file,) = kept.iterdir()
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**data, **change}), encoding="utf-8")
    load()
    assert runs == ["quick", "quick"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_none(kept: Path) -> None:
    kept.mkdir()
    os.mkfifo(kept / "key.json")
    found: list[verdicts.Verdict | None] = []
    reader = threading.Thread(target=lambda: found.append(verdicts.read("key")), daemon=True)
    reader.start()
    reader.join(timeout=60)
    assert found == [None]


def test_a_file_that_others_can_write_is_none(
    kept: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load()
    (file,) = kept.iterdir()
    file.chmod(0o666)
    load()
    file.chmod(0o600)
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    load()
    assert runs == ["quick"] * 3


def test_a_folder_that_cannot_be_made_or_written_to_is_no_error(
    tmp_path: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for folder in (file / "checked", None):
        monkeypatch.setattr(verdicts, "folder", lambda folder=folder: folder)
        assert load().verdict is not None
    assert runs == ["quick", "quick"]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # of conftest.py's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert verdicts.folder() == tmp_path / "gemma4_fast" / "checked"
        patch.delenv("XDG_CACHE_HOME")
        patch.setenv("HOME", str(tmp_path))
        below_home = tmp_path / ".cache" / "gemma4_fast" / "checked"
        assert verdicts.folder() == below_home
        patch.setenv("XDG_CACHE_HOME", "relative")
        assert verdicts.folder() == below_home


@pytest.mark.parametrize("home", ["", "relative"])
def test_without_a_home_no_verdict_is_kept(
    home: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # of conftest.py's
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setenv("HOME", home)
        assert verdicts.folder() is None


def test_libraries_of_other_packages_are_not_in_the_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = tmp_path / "cache" / "gemma4_fast" / "key" / "_cuda.so"
    built.parent.mkdir(parents=True)
    other = tmp_path / "other.so"
    libraries = set(torch.ops.loaded_libraries)
    monkeypatch.setattr(torch.ops, "loaded_libraries", libraries)
    before = verdicts._libraries()
    for file in (built, other):
        file.write_bytes(b"library")
        libraries.add(str(file))
    added = set(verdicts._libraries()) - set(before)
    assert added == {("_cuda.so", verdicts.hash_of(built))}


def test_a_checkpoint_that_cannot_be_read_is_the_loaders_to_tell(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to(checkpoint / "gone")
    assert verdicts.source_of(checkpoint) is None
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)


def test_a_model_that_came_from_no_checkpoint_keeps_none(kept: Path, runs: list[str]) -> None:
    model = Gemma4.dummy(load(check=False).config, device="cpu")
    for _ in range(2):
        verdicts.settle(model, True)
    assert runs == ["quick", "quick"] and not kept.exists()


def test_verify_itself_reads_and_keeps_nothing(kept: Path) -> None:
    assert verify(load(check=False)).ok and not kept.exists()
