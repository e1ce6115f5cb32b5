"""The op table and its dispatcher: choice, refusal, errors before work."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma4_fast
from gemma4_fast import UnsupportedError, explain, native, ops, use_backend
from gemma4_fast.explain import support_table
from gemma4_fast.ops import table
from gemma4_fast.quant import QuantizedWeight
from gemma4_fast.reference import ops as reference

DESIGN = [
    "rms_norm", "norm_add_norm", "moe_norm_add_norm", "qkv_norm_rope", "gqa_decode", "gqa_prefill", "route_topk",
    "expert_dispatch", "grouped_gemm", "moe_decode", "moe",
    "moe_feed_forward", "linear", "geglu_mlp", "ple_gate", "logits", "sample", "embedding",
    "rope_angles",
]  # fmt: skip
X = torch.randn(3, 8)


def triton_rms_norm(x: torch.Tensor, weight: Any = None, eps: float = 1e-6) -> torch.Tensor:
    return torch.full_like(x, 7.0)


@pytest.fixture
def fake_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A `cpu` backend for rms_norm alone, that takes fp32 with an even last axis."""

    def accepts(x: torch.Tensor, *_: Any) -> str | None:
        return None if x.shape[-1] % 2 == 0 else "takes even sizes only"

    impl = ops.Impl("test_table:triton_rms_norm", (torch.float32,), accepts)
    for op in ops.TABLE.values():
        monkeypatch.delitem(op.impls, "cpu", raising=False)
    monkeypatch.setitem(ops.TABLE["rms_norm"].impls, "cpu", impl)
    monkeypatch.setattr(native, "kernels_missing", lambda: None)
    table._SAID.clear()
    table.backend_missing.cache_clear()
    yield
    table.backend_missing.cache_clear()


def test_the_table_is_the_design() -> None:
    assert sorted(ops.TABLE) == sorted(DESIGN)
    for op in ops.TABLE.values():
        assert op.compose is not None or "torch" in op.impls


@pytest.mark.parametrize("name", DESIGN)
def test_public_function_reference_and_check_agree_on_arguments(name: str) -> None:
    op = ops.TABLE[name]
    want = list(inspect.signature(op.reference).parameters)
    for fn in (getattr(ops, name), op.check, *(impl.function for impl in op.impls.values())):
        assert list(inspect.signature(fn).parameters) == want
    for fn in (getattr(ops, name), op.check):  # the defaults too
        defaults = [p.default for p in inspect.signature(fn).parameters.values()]
        assert defaults == [p.default for p in inspect.signature(op.reference).parameters.values()]
    for case in op.cases:
        assert list(op.inputs(case, torch.float32)) == want


@pytest.mark.parametrize("name", DESIGN)
def test_cost_is_positive_and_cases_are_reproducible(name: str) -> None:
    op = ops.TABLE[name]
    for case in op.cases:
        a, b = op.inputs(case, torch.bfloat16), op.inputs(case, torch.bfloat16)
        for x, y in zip(a.values(), b.values(), strict=True):
            if isinstance(x, QuantizedWeight):
                x, y = x.dequantize(), y.dequantize()
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        cost = op.cost(*a.values())
        empty = any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in a.values())
        assert cost.flops >= 0 and (cost.bytes > 0 or empty)


def test_automatic_choice_takes_the_first_that_serves(fake_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    assert ops.rms_norm(X)[0, 0] == 7.0
    with caplog.at_level(logging.WARNING, "gemma4_fast"):
        for _ in range(3):
            odd = ops.rms_norm(X[:, :5])
    assert torch.allclose(odd, reference.rms_norm(X[:, :5]))
    assert [r.message.count("even sizes only") for r in caplog.records] == [1]  # said once
    assert torch.allclose(ops.rms_norm(X.double()), reference.rms_norm(X.double()))


def test_a_named_backend_never_falls_back(fake_cpu: None) -> None:
    with use_backend("cpu"):
        assert ops.rms_norm(X)[0, 0] == 7.0
        with pytest.raises(UnsupportedError, match=r"rms_norm.*cpu: takes even sizes only"):
            ops.rms_norm(X[:, :5])
        with pytest.raises(UnsupportedError, match="does not take bfloat16"):
            ops.rms_norm(X.bfloat16())
        with pytest.raises(UnsupportedError, match=r"linear.*has no kernel"):
            ops.linear(X, X)
    with use_backend("cpu,torch"):
        assert torch.allclose(ops.rms_norm(X[:, :5]), reference.rms_norm(X[:, :5]))
        ops.linear(X, X)
    with use_backend("torch"):
        assert ops.rms_norm(X)[0, 0] != 7.0


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_here_says_so(backend: str) -> None:
    with use_backend(backend), pytest.raises(UnsupportedError, match=f"{backend}: needs a GPU"):
        ops.rms_norm(X)
    why = f"{backend}: needs a GPU, and the device is cpu$"
    with pytest.raises(UnsupportedError, match=why):
        gemma4_fast.Gemma4.from_pretrained("tiny", backend=backend)


def test_selection_is_scoped_and_nests(fake_cpu: None) -> None:
    with use_backend("torch"):
        with use_backend("cpu", ops=["rms_norm"]):
            assert ops.rms_norm(X)[0, 0] == 7.0
            ops.linear(X, X)  # still torch
            with use_backend("reference"):
                assert ops.rms_norm(X)[0, 0] != 7.0
            assert ops.rms_norm(X)[0, 0] == 7.0
        assert ops.rms_norm(X)[0, 0] != 7.0
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert ops.rms_norm(X)[0, 0] == 7.0


def test_a_composed_op_hands_the_choice_to_its_parts() -> None:
    args = ops.TABLE["moe"].inputs("odd", torch.float32)
    with use_backend("cuda", ops=["moe"]), pytest.raises(UnsupportedError, match="needs a GPU"):
        ops.moe(**args)


def test_a_choice_for_one_op_holds_inside_a_model_with_a_backend(fake_cpu: None) -> None:
    model = gemma4_fast.Gemma4.from_pretrained("tiny", "float32", None, "torch", check=False)
    with use_backend("triton", ops=["logits"]), pytest.raises(UnsupportedError, match=r"logits.*needs a GPU"):
        model(torch.tensor([[1, 2]]))
    with use_backend("reference", ops=["logits"]):
        chosen = {c.op: c.backend for c in explain(model).choices}
    assert chosen["logits"] == "reference" and chosen["rms_norm"] == "torch"


def test_a_replaced_kernel_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.linear(X, X)
    impl = ops.Impl("gemma4_fast.ops.torch_backend:linear", (torch.float64,))
    monkeypatch.setitem(ops.TABLE["linear"].impls, "torch", impl)
    with use_backend("torch"), pytest.raises(UnsupportedError, match="does not take float32"):
        ops.linear(X, X)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="named by text"), use_backend(3):  # type: ignore[arg-type]
        pass
    for bad in ("fast", "", "cpu,", "CUDA"):
        with pytest.raises(ValueError, match="unknown backend"), use_backend(bad):
            pass
    with pytest.raises(ValueError, match="unknown ops"), use_backend("torch", ops=["softmax"]):
        pass
    with pytest.raises(ValueError, match="already in the table"):
        ops.register(dataclasses.replace(ops.TABLE["linear"]))
    with pytest.raises(ValueError, match="unknown backend"):
        gemma4_fast.Gemma4.from_pretrained("tiny", backend="fast")


def test_explain_shows_the_decision(fake_cpu: None) -> None:
    shown = explain(device="cpu", dtype="float32")
    by_op = {c.op: c for c in shown.choices}
    assert by_op["rms_norm"].backend == "cpu" and by_op["linear"].backend == "torch"
    assert set(by_op["rms_norm"].passed_over) == {"cuda", "triton"}
    assert by_op["linear"].passed_over["cpu"] == "has no kernel for this op"
    assert by_op["moe"].backend == "composed"
    text = str(shown)
    assert "rms_norm" in text
    assert "cuda not used: needs a GPU, and the device is cpu" in text
    assert "not used\n" in text.splitlines(keepends=True)[2]  # `linear` has a reason of its own
    assert shown.to_dict()["ops"]["linear"]["backend"] == "torch"
    assert explain(device="cpu").choices[0].backend == "torch"  # bf16: the fake takes fp32 only
    with use_backend("reference"):
        shown = explain(device="cpu")
        assert {c.backend for c in shown.choices} == {"reference", "composed"}
        assert "not used" not in str(shown)
    model = gemma4_fast.Gemma4.from_pretrained("tiny", check=False, backend="reference")
    assert {c.backend for c in explain(model).choices} == {"reference", "composed"}


def test_readme_has_the_support_table() -> None:
    readme = (Path(gemma4_fast.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert support_table() in readme


# One call per op that must be refused before any backend runs: what to change in a good case, and a word of the message.
BAD_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("rms_norm", dict(x=torch.ones(2, 3, dtype=torch.long)), "floating"),
    ("rms_norm", dict(weight=torch.ones(5)), "weight has shape"),
    ("rms_norm", dict(weight=torch.ones(2816, dtype=torch.float64)), "dtype"),
    ("norm_add_norm", dict(residual=torch.ones(1, 2816)), "residual"),
    ("norm_add_norm", dict(scale=torch.ones(2)), "scale"),
    ("norm_add_norm", dict(next_weight=torch.ones(3)), "next_weight"),
    ("norm_add_norm", dict(other_weight=torch.ones(3)), "other_weight"),
    ("moe_norm_add_norm", dict(experts=torch.ones(2, 2816)), "experts"),
    ("moe_norm_add_norm", dict(dense_weight=torch.ones(3)), "dense_weight"),
    ("moe_norm_add_norm", dict(experts_weight=None), "experts_weight"),
    ("qkv_norm_rope", dict(num_q_heads=15), "columns"),
    ("qkv_norm_rope", dict(k_weight=None), "k_weight"),
    ("qkv_norm_rope", dict(cos=torch.ones(5, 128)), "cos"),
    ("qkv_norm_rope", dict(slots=torch.zeros(6, dtype=torch.long)), "go together"),
    ("qkv_norm_rope", dict(k_cache=torch.zeros(1, 8, 8, 256)), "without v_cache"),
    ("gqa_decode", dict(window=0), "window"),
    ("gqa_decode", dict(kv_lens=torch.ones(5)), "dtype"),
    ("gqa_decode", dict(kv_lens=torch.ones(4, dtype=torch.int32)), "lengths"),
    ("gqa_decode", dict(k_cache=None), "inv_freq"),
    ("gqa_decode", dict(v_cache=torch.zeros(5, 128, 3, 256)), "k_cache has shape|do not divide"),
    ("gqa_prefill", dict(k=torch.zeros(3, 8, 256)), "k has shape"),
    ("gqa_prefill", dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), "empty"),
    ("gqa_prefill", dict(prefix_lens=torch.zeros(2, dtype=torch.int32)), "go together"),
    ("gqa_prefill", dict(image_ids=torch.zeros(2, dtype=torch.int32)), "image_ids"),
    ("route_topk", dict(top_k=0), "top_k"),
    ("route_topk", dict(top_k=129), "top_k"),
    ("route_topk", dict(scale=torch.ones(3)), "scale"),
    ("expert_dispatch", dict(ids=torch.zeros(3, 2, dtype=torch.long)), "int32"),
    ("expert_dispatch", dict(block_m=0), "block_m"),
    ("expert_dispatch", dict(num_experts=2.5), "num_experts"),
    ("grouped_gemm", dict(epilogue="relu"), "epilogue"),
    ("grouped_gemm", dict(epilogue="combine"), "rows|topk_weights"),
    ("grouped_gemm", dict(offsets=torch.zeros(3, dtype=torch.int32)), "offsets"),
    ("moe", dict(ids=torch.zeros(1, 8)), "ids"),
    ("moe", dict(topk_weights=torch.zeros(1, 7)), "topk_weights"),
    ("moe", dict(down=torch.zeros(8, 2816, 703)), "down"),
    ("moe_decode", dict(gate_up=torch.zeros(8, 1407, 2816)), "even"),
    ("moe_feed_forward", dict(h=torch.ones(1, 5)), "h has shape"),
    ("moe_feed_forward", dict(experts_down=torch.ones(8, 2816, 3)), "experts_down"),
    ("moe_feed_forward", dict(experts_gate_up=torch.ones(7, 1408, 2816)), "experts_gate_up"),
    ("linear", dict(weight=torch.ones(4, 5)), "weight"),
    ("geglu_mlp", dict(gate_up=torch.ones(3, 2816)), "even"),
    ("geglu_mlp", dict(down=torch.ones(2816, 3)), "down"),
    ("ple_gate", dict(ple=torch.ones(2, 256)), "ple"),
    ("ple_gate", dict(gate=torch.ones(255, 1536)), "gate"),
    ("logits", dict(softcap=-1.0), "softcap"),
    ("logits", dict(x=torch.ones(2816)), "axes"),
    ("logits", dict(weight=torch.ones(0, 2816)), "rows"),
    ("logits", dict(softcap=math.inf), "softcap"),
    ("sample", dict(uniform=torch.ones(3)), "uniform has shape"),
    ("sample", dict(uniform=torch.ones(2, dtype=torch.int64)), "uniform has dtype"),
    ("sample", dict(x=torch.ones(2816)), "axes"),
    ("sample", dict(softcap=0), "softcap"),
    ("sample", dict(temperature=0), "temperature"),
    ("sample", dict(temperature=math.inf), "temperature"),
    ("sample", dict(top_k=-1), "top_k"),
    ("sample", dict(top_k=5.0), "top_k"),
    ("sample", dict(top_p=0), "top_p"),
    ("sample", dict(top_p=math.nan), "top_p"),
    ("sample", dict(min_p=None), "min_p"),
    ("sample", dict(min_p=1.5), "min_p"),
    ("rms_norm", dict(x=torch.tensor(1.0)), "axes"),
    ("rms_norm", dict(eps="small"), "eps"),
    ("norm_add_norm", dict(residual=None), "residual"),
    ("norm_add_norm", dict(weight=None), "weight"),
    ("qkv_norm_rope", dict(q_weight=None), "q_weight"),
    ("qkv_norm_rope", dict(sin=None), "sin"),
    ("gqa_decode", dict(v_cache=None), "v_cache"),
    ("gqa_decode", dict(kv_lens=None), "lengths"),
    ("gqa_prefill", dict(k=None, v=None), "k must be"),
    ("gqa_prefill", dict(cu_seqlens=None), "cu_seqlens"),
    ("route_topk", dict(scale=None), "scale"),
    ("route_topk", dict(top_k=2.0), "top_k"),
    ("moe", dict(topk_weights=None), "topk_weights"),
    ("linear", dict(weight=None), "weight"),
    ("ple_gate", dict(weight=None), "weight"),
    ("embedding", dict(weight=None), "weight"),
    ("embedding", dict(weight=QuantizedWeight.empty(8, (2, 3, 32))), "axes"),
    ("embedding", dict(ids=torch.zeros(2, dtype=torch.int32)), "int64"),
    ("embedding", dict(ids=torch.zeros(1, 2, dtype=torch.int64)), "ids has shape"),
    ("embedding", dict(scale="much"), "scale"),
    ("rope_angles", dict(positions=torch.zeros(2)), "int64"),
    ("rope_angles", dict(inv_freq=torch.ones(2, 2)), "axes"),
    ("rope_angles", dict(inv_freq=None), "inv_freq"),
]


@pytest.mark.parametrize("name, change, word", BAD_CALLS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments_are_a_clear_value_error(name: str, change: dict[str, Any], word: str) -> None:
    op = ops.TABLE[name]
    args = op.inputs(next(iter(op.cases)), torch.float32)
    assert set(change) <= set(args)
    with pytest.raises(ValueError, match=word) as caught:
        getattr(ops, name)(**{**args, **change})
    assert name.split("_")[0] in str(caught.value)


def test_arguments_on_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="on meta, expected cpu"):
        ops.linear(X, X.to("meta"))
