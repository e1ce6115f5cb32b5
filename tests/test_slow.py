"""Never slow in silence: whatever makes a model slow is logged, once, with what to do about it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import family
import pytest
import torch

from gemma4_fast import Gemma4, UnsupportedError, accelerate, cli, native, ops
from gemma4_fast.ops import table

REASON = "the CPU kernels were not built. Type `make`"
Warned = Callable[[], list[str]]


def forget() -> None:
    """The table looks at the machine again, and has said nothing yet."""
    table.backend_missing.cache_clear()
    for op in ops.TABLE.values():
        op._kept.clear()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Warned]:
    """What has been logged since the beginning of the test, as in a new process."""
    caplog.set_level(logging.WARNING, logger="gemma4_fast")
    monkeypatch.setattr(table, "_SAID", set())
    forget()
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "gemma4_fast"]
    forget()


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setattr(native, "kernels_missing", lambda: REASON)


def test_a_model_without_the_cpu_kernels(no_kernels: None, warned: Warned) -> None:
    for _ in range(2):
        model = Gemma4.from_pretrained("tiny", device="cpu", check=False)
        assert len(warned()) == 1  # before the first token
        model.generate("It is", max_new_tokens=2)
    said = "gemma4_fast: without the CPU kernels a model runs many times slower: "
    assert warned() == [said + REASON]


def test_a_backend_that_runs_no_op_is_refused_without_a_list_of_ops(no_kernels: None) -> None:
    with pytest.raises(UnsupportedError) as error:
        Gemma4.from_pretrained("tiny", device="cpu", backend="cpu", check=False)
    assert str(error.value) == f"cannot run on cpu in bfloat16: cpu: {REASON}"


def test_ops_are_named_if_others_run(no_kernels: None) -> None:
    with ops.use_backend("cpu", ops=["linear"]), pytest.raises(UnsupportedError) as error:
        ops.require(torch.device("cpu"), torch.float32, ("linear", "rms_norm"))
    assert str(error.value) == f"cannot run on cpu in float32: cpu: {REASON} (linear)"


def test_a_backend_that_was_chosen_is_no_surprise(no_kernels: None, warned: Warned) -> None:
    model = Gemma4.from_pretrained("tiny", device="cpu", backend="torch", check=False)
    model.generate("It is", max_new_tokens=2)
    assert warned() == []


def test_a_model_of_random_weights(no_kernels: None, warned: Warned) -> None:
    config = Gemma4.from_pretrained("tiny", device="cpu", backend="torch", check=False).config
    model = Gemma4.dummy(config, device="cpu")
    model(torch.tensor([[5, 6]]))
    assert len(warned()) == 1 and REASON in warned()[0]


def test_fp16_on_a_cpu(warned: Warned) -> None:
    model = Gemma4.from_pretrained("tiny", dtype="float16", device="cpu", check=False)
    assert len(warned()) == 1
    model.generate("It is", max_new_tokens=2)
    assert len(warned()) == 1 and "float16" in warned()[0] and "dtype='bfloat16'" in warned()[0]
    Gemma4.from_pretrained("tiny", dtype="bfloat16", device="cpu", check=False)(torch.tensor([[5]]))
    assert len(warned()) == 1


def test_the_command_line_shows_it(warned: Warned, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "float16", "--device", "cpu", "--check", "off", "--max-new-tokens", "2"]
    assert cli.main(["generate", "It is", *options]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "gemma4-fast: " in line]
    assert len(said) == 1 and "a model in float16" in said[0] and "--dtype bfloat16" in said[0]


def test_accelerate_without_the_cpu_kernels(no_kernels: None, warned: Warned) -> None:
    model = copy.deepcopy(family.transformers_model("26b-a4b"))
    for _ in range(2):
        accelerate(model, check=False)
    (said,) = warned()
    assert said.startswith("gemma4_fast: accelerate makes nothing faster: without the CPU kernels")
    assert REASON in said


def test_accelerate_in_fp16_on_a_cpu(warned: Warned) -> None:
    accelerate(copy.deepcopy(family.transformers_model("26b-a4b")).half(), check=False)
    (said,) = warned()
    assert "accelerate makes nothing faster: a model in float16" in said


def test_accelerate_a_model_that_is_not_served(warned: Warned) -> None:
    model = copy.deepcopy(family.transformers_model("26b-a4b"))
    model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    accelerate(model, check=False)
    (said,) = warned()
    assert "accelerate makes nothing faster: every call is left to transformers' code" in said
    assert "layers.2.mlp has a hook" in said
