"""Will it fit? Free memory by the system's files, the estimate, and what is said of both."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from gemma4_fast import Gemma4, Gemma4Config, UnsupportedError, info, memory, model, weights
from gemma4_fast.cli import main
from gemma4_fast.config import PRESETS
from gemma4_fast.memory import GIB, Load, available_bytes, fit, needed
from gemma4_fast.weights import tiny_path

CPU = torch.device("cpu")
BF16 = torch.bfloat16
MOE = PRESETS["26b-a4b"]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float | None], None]:
    """free(x): from now on x GiB are free."""

    def set_to(gib: float | None) -> None:
        count = None if gib is None else int(gib * GIB)
        monkeypatch.setattr(memory, "available_bytes", lambda: count)

    return set_to


def system(root: Path, **files: str) -> Path:
    """A folder with these files of /proc and /sys; "__" stands for a slash."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = "MemTotal:  32000 kB\nMemFree:  100 kB\nMemAvailable:    20000 kB\n"


def write(root: Path, folder: str, **files: int | str) -> None:
    """Files of a cgroup; "__" stands for a dot."""
    there = root / "sys/fs/cgroup" / folder
    there.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (there / name.replace("__", ".")).write_text(f"{content}\n")


# ---------------------------------------------------------------- what is free
def test_without_limits_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    assert available_bytes(tmp_path) == 20000 << 10


@pytest.mark.parametrize("where", ["a/b", "a", ""])
def test_the_limit_of_a_cgroup_or_its_parents_counts(where: str, tmp_path: Path) -> None:
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")
    for folder in ("a/b", "a", ""):
        write(tmp_path, folder, memory__max="max", memory__current=5000)
    stat = "anon 900\ninactive_file 300\nactive_file 40\nworkingset_activate_file 7"
    write(tmp_path, where, memory__max=9000, memory__current=5000, memory__stat=stat)
    assert available_bytes(tmp_path) == 9000 - 5000 + 340  # cached files are given up


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    groups = "9:cpu,cpuacct:/\n4:memory:/job/7\n0::/\n"
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=groups)
    unlimited = 9223372036854771712
    write(
        tmp_path, "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=1 << 40
    )  # fmt: skip
    assert available_bytes(tmp_path) == 20000 << 10
    stat = "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 3"
    write(
        tmp_path,
        "memory/job",
        memory__limit_in_bytes=800,
        memory__usage_in_bytes=500,
        memory__stat=stat,
    )
    assert available_bytes(tmp_path) == 323


def test_in_a_container_the_hosts_path_is_not_there(tmp_path: Path) -> None:
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/../docker/f00\n")
    write(tmp_path, "", memory__max=700, memory__current=900)
    assert available_bytes(tmp_path) == 0  # above the limit


def test_a_cgroup_with_any_name_is_read(tmp_path: Path) -> None:
    system(tmp_path, proc__meminfo=MEMINFO)
    groups = tmp_path / "proc/self/cgroup"
    groups.parent.mkdir()
    groups.write_bytes(b"no cgroup\n0::/caf\xe9\n")  # a name is bytes, and these are not UTF-8
    write(tmp_path, "caf\udce9", memory__max=9000, memory__current=5000)
    assert available_bytes(tmp_path) == 4000


def test_elsewhere_psutil_is_asked_or_all_that_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=123))
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert available_bytes(tmp_path) == 123
    monkeypatch.setitem(sys.modules, "psutil", None)
    sizes = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__, raising=False)
    assert available_bytes(tmp_path) == 40960
    monkeypatch.delattr(memory.os, "sysconf")
    assert available_bytes(tmp_path) is None


def test_a_gpus_free_memory_includes_the_allocators_reserve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert memory.free_bytes(torch.device("cuda", 0)) == 1040


# ---------------------------------------------------------------- what is needed
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_need_is_what_is_allocated(quantize: str | None) -> None:
    config = Gemma4Config.from_pretrained(tiny_path())
    made = Gemma4.dummy(config, device="cpu", quantize=quantize)
    found = needed(Load(config, BF16, quantize, context=300, batch=2, check=False))
    assert found.weights == sum(t.nbytes for t in made.state_dict().values())
    assert found.cache == made.new_cache(2, 300).nbytes
    assert found.total == found.weights + found.cache + memory.PROCESS
    assert needed(Load(config, BF16, quantize)).check == memory.QUICK_CHECK


def test_a_full_check_widens_the_largest_layer() -> None:
    made = model.meta_model(PRESETS["e2b"])
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in made.model.layers)
    for dtype, width in ((BF16, 4), (torch.float32, 8)):
        assert needed(Load(PRESETS["e2b"], dtype, check="full")).check == width * largest


# ---------------------------------------------------------------- what would fit
def told(free: float, load: Load) -> list[dict[str, Any]]:
    found = memory.Fit(load, "X", needed(load), int(free * GIB))
    return [{k: v for k, v in vars(one).items() if v is not None} for one in found.alternatives()]


def test_fewer_bits_and_a_smaller_member_are_proposed() -> None:
    load = Load(MOE, BF16, context=32768)
    (quantized, member) = told(21, load)
    assert quantized == {
        "quantize": "int4",
        "needed": needed(Load(MOE, BF16, "int4", context=32768)).total,
    }
    assert member["member"] == "12b" and member["quantize"] == "int8"
    assert [one.get("quantize") for one in told(30, load)] == ["int8", "int4", None]


def test_the_longest_context_that_fits_is_proposed() -> None:
    load = Load(MOE, BF16, "int4", context=262144)
    room = needed(Load(MOE, BF16, "int4", context=65536)).total / GIB
    first = told(room, load)[0]
    assert first["context"] == 65536 and "quantize" not in first
    load = Load(MOE, BF16, context=262144)  # in bfloat16 no context fits
    assert (told(room, load)[0]["quantize"], told(room, load)[0]["context"]) == ("int4", 65536)


def test_a_smaller_member_is_proposed_with_a_shorter_context_if_need_be() -> None:
    load = Load(MOE, BF16, context=131072)
    room = needed(Load(PRESETS["e2b"], BF16, "int4", context=4096)).total / GIB
    (member,) = told(room, load)
    assert (member["member"], member["quantize"], member["context"]) == ("e2b", "int4", 4096)


def test_where_nothing_fits_that_is_said() -> None:
    load = Load(PRESETS["e2b"], BF16)
    assert told(1, load) == []
    assert memory.Fit(load, "E2B", needed(load), GIB).advice() == "No member of the family fits."


# ---------------------------------------------------------------- before a model is loaded
def test_weights_that_exceed_what_is_free_are_refused_before_they_are_made(
    free: Callable[[float | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "dummy", lambda *_: pytest.fail("weights were made"))
    free(20)
    with pytest.raises(UnsupportedError) as error:
        Gemma4.dummy(MOE, device="cpu")
    text = str(error.value)
    assert "26B-A4B in bfloat16 with a context of 4K needs 47.7 GiB; 20.0 GiB are free" in text
    assert 'quantize="int4" (14.3 GiB)' in text and "check_memory=False" in text


def test_from_pretrained_refuses_before_anything_is_read(
    free: Callable[[float | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(0)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "load", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(UnsupportedError, match=r"tiny in bfloat16 .* 0\.0 GiB are free"):
            Gemma4.from_pretrained("tiny", device="cpu")
    Gemma4.from_pretrained("tiny", device="cpu", check=False, check_memory=False)
    Gemma4.dummy(Gemma4Config.from_pretrained(tiny_path()), device="cpu", check_memory=False)


def test_nothing_is_downloaded_that_does_not_fit(
    free: Callable[[float | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(tiny_path())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    free(0)
    with pytest.raises(UnsupportedError, match="name in bfloat16"):
        Gemma4.from_pretrained("org/name", device="cpu")
    assert main(["generate", "x", "--model", "org/name", "--device", "cpu"]) == 2
    assert asked and not any("*.safetensors" in patterns for patterns in asked)
    free(None)
    Gemma4.from_pretrained("org/name", device="cpu", check=False)
    assert "*.safetensors" in asked[-1]


def test_a_tight_fit_is_a_warning(
    free: Callable[[float | None], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    free(0.1)
    Gemma4.from_pretrained("tiny", device="cpu", check=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "memory may run out (weights 0.0 GiB" in record.getMessage()
    for unknown_or_enough in (None, 2):
        free(unknown_or_enough)
        Gemma4.from_pretrained("tiny", device="cpu", check=False)
    assert len(caplog.records) == 1


def test_quantizing_in_place_warns_where_a_copy_does_not_fit(
    free: Callable[[float | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Gemma4.from_pretrained("tiny", device="cpu", check=False)
    free(0)
    tiny.quantize("int8")
    assert "the largest quantized weight takes" in caplog.text


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "x"],
        ["chat"],
        ["check"],
        ["demo"],
        ["bench", "model", "--layers", "1", "--vocab", "64"],
    ],
)
def test_commands_refuse_what_does_not_fit(
    command: list[str],
    free: Callable[[float | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Gemma4, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    free(0)
    assert main([*command, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not enough memory" in err and "--ignore-memory" in err
    assert err.count("\n") == 1


def test_ignore_memory_loads_all_the_same(
    free: Callable[[float | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    free(0)
    argv = ["generate", "x", "--max-new-tokens", "2", "--check", "off", "--device", "cpu"]
    assert main([*argv, "--ignore-memory"]) == 0
    assert capsys.readouterr().out


def test_generate_counts_the_cache_of_its_own_context(
    free: Callable[[float | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Load] = []
    monkeypatch.setattr(memory, "needed", lambda load: seen.append(load) or needed(load))
    argv = ["--max-new-tokens", "7", "--check", "off", "--device", "cpu", "--json"]
    assert main(["generate", "one two three", *argv]) == 0
    found = json.loads(capsys.readouterr().out)
    assert seen[-1].context == found["prompt_tokens"] + 7 and seen[-1].check is False


# ---------------------------------------------------------------- info
def answered(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["info", "--model", "26b-a4b", "--device", "cpu", "--json", *argv]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["fit"]
    return found


def test_info_answers_the_question_in_a_sentence(
    free: Callable[[float | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(info, "read_rate", lambda device, free: 20.0 * GIB)
    monkeypatch.setattr(info, "cache_bytes", lambda device: 32 << 20)
    free(21.3)
    found = answered(capsys, "--quantize", "int4", "--context", "1K,32K")
    load = Load(MOE, BF16, "int4", context=32768)
    assert (found["context"], found["needed"]) == (32768, needed(load).total)
    assert found["fits"] and found["tokens_per_s"] == 20 * GIB / found["step_bytes"]
    what, _, verdict = found["answer"].partition("; ")
    assert what == "26B-A4B in int4 with a context of 32K needs 14.9 GiB"
    verdict, _, why = verdict.partition(" (")
    assert verdict == "21.3 GiB are free: it fits, at about 7 tokens/s"
    assert why == ("an estimate: 2.9 GiB per token at a measured 20.0 GiB/s).")
    monkeypatch.setattr(info, "read_rate", lambda device, free: 2000.0 * GIB)
    found = answered(capsys, "--quantize", "int4", "--context", "32K")
    assert "at about 697 tokens/s" in found["answer"]
    main(["info", "--model", "26b-a4b", "--device", "cpu", "--quantize", "int4"])
    lines = capsys.readouterr().out.splitlines()
    last = lines[-1]
    assert lines[:3] == ["26b-a4b", "", last]
    assert last.startswith("26B-A4B in int4 with a context of 4K needs 14.") and "it fits" in last


def test_info_says_what_would_fit(
    free: Callable[[float | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(info, "read_rate", lambda device, free: 1.0)
    free(21)
    found = answered(capsys)
    assert found["fits"] is False and found["alternatives"][0]["quantize"] == "int4"
    assert "not even its weights fit. What fits: --quantize int4 (14.6 GiB) or " in found["answer"]
    free(25.2)  # the weights in int8 take 25.0
    found = answered(capsys, "--quantize", "int8")
    assert "25.2 GiB are free: it does not fit. What" in found["answer"]
    free(None)
    assert answered(capsys)["answer"].endswith("the free memory is unknown.")


def test_no_speed_is_told_of_what_fits_into_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "cache_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(info, "read_rate", lambda device, free: 1.0)
    assert main(["info", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["fit"]
    assert found["tokens_per_s"] is None and found["answer"].endswith(" are free: it fits.")


def test_the_rate_of_reading_is_measured_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PROBE_SECONDS", 0.0)
    sizes: list[int] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, **k: sizes.append(n) or ones(n, **k))
    assert info.read_rate(CPU, 4 << 20) > 0
    assert sizes == [(1 << 20) // 4]


def test_the_names_in_a_sentence(free: Callable[[float | None], None]) -> None:
    free(1)
    load = Load(PRESETS["e4b"].slice(num_layers=6), BF16, context=1000, batch=3)
    text = str(fit(load, CPU, "mine"))
    assert text.startswith("mine in bfloat16 with a context of 1,000 for each of 3 sequences needs")
