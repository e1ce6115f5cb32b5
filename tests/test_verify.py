"""The self-check: right models pass, and every way we know to get Gemma 4 wrong is caught and named."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from bounds import assert_same_in_fp64
from family import MEMBERS, fast_model
from test_native import require_native

from gemma4_fast import Gemma4, SelfCheckError, ops, quant, verify
from gemma4_fast.cache import LayerCache
from gemma4_fast.layers import Text
from gemma4_fast.ops import torch_backend
from gemma4_fast.quant import QuantizedWeight
from gemma4_fast.reference import model as reference_model
from gemma4_fast.reference import ops as reference
from gemma4_fast.report import Comparison, Report
from gemma4_fast.verify import Layered, _Check, _Tokens, compare_layers


@pytest.fixture(autouse=True)
def on_torch() -> Iterator[None]:
    """The faults are planted in the torch backend; test_cpu.py plants one in the CPU kernels."""
    with ops.use_backend("torch"):
        yield


@contextmanager
def broken(op: str, wrong: Callable[..., Any]) -> Iterator[None]:
    """Inside: the torch backend of `op` is `wrong`."""
    impl = ops.TABLE[op].impls["torch"]
    right = impl.function
    impl.__dict__["function"] = wrong  # the cached import
    try:
        yield
    finally:
        impl.__dict__["function"] = right


@pytest.fixture(scope="module")
def tiny() -> Gemma4:
    return Gemma4.from_pretrained("tiny", check=False)


@pytest.fixture(scope="module")
def tiny_fp32() -> Gemma4:
    return Gemma4.from_pretrained("tiny", check=False, dtype="float32")


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_member_passes(member: str, dtype: torch.dtype) -> None:
    report = verify(fast_model(member, dtype), level="full")
    assert report.ok, report.verdict()
    layers = {c.layer for c in report.comparisons if c.layer is not None}
    assert layers == set(range(fast_model(member).config.num_hidden_layers))
    phases = {c.phase for c in report.comparisons if c.what == "attention"}
    assert phases >= {"prefill", "chunk", "decode", "batch prefill", "batch chunk", "batch decode"}
    assert ("newest token alone" in phases) == (fast_model(member).config.num_kv_shared_layers > 0)


@pytest.mark.parametrize("member", MEMBERS)
def test_quick_covers_each_kind_of_layer(member: str) -> None:
    model = fast_model(member)
    report = verify(model)
    assert report.ok, report.verdict()
    seen = {model.config.layer(c.layer).kind for c in report.comparisons if c.layer is not None}
    assert seen == {c.kind for c in model.config.layers()}


def test_tiny_passes_in_all_dtypes(tiny: Gemma4, tiny_fp32: Gemma4) -> None:
    for model in (tiny, tiny_fp32):
        report = verify(model, level="full")
        assert report.ok, report.verdict()
        assert report.end_to_end is not None and report.end_to_end.kl < 0.1
        assert report.end_to_end.decides == (model.dtype == torch.float32)


# How to get it wrong: op -> a function that takes the right implementation's place.


def _swapped_gate_and_up(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch_backend.geglu_mlp(x, gate_up.roll(gate_up.shape[0] // 2, 0), down)


def _silu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = torch.nn.functional.linear(x, gate_up).chunk(2, -1)
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)


def _window_plus(n: int, op: str) -> Callable[..., torch.Tensor]:
    right = getattr(torch_backend, op)
    place = 4  # window's place in both signatures

    def wrong(*args: Any) -> torch.Tensor:
        window = args[place]
        return right(*args[:place], None if window is None else window + n, *args[place + 1 :])

    return wrong


def _decode_window_plus(n: int) -> Callable[..., torch.Tensor]:
    def wrong(q: Any, k: Any, v: Any, lens: Any, window: int | None = None, *rest: Any) -> torch.Tensor:
        return torch_backend.gqa_decode(q, k, v, lens, None if window is None else window + n, *rest)

    return wrong


def _unfolded_decode(*args: Any) -> torch.Tensor:
    """The V-only cache's K without k_norm's weight."""
    *head, k_weight, scale = args
    return torch_backend.gqa_decode(*head, None if k_weight is None else torch.ones_like(k_weight), scale)


def _unrotated_decode(*args: Any) -> torch.Tensor:
    *head, inv_freq, k_weight, scale = args
    return torch_backend.gqa_decode(*head, None if inv_freq is None else inv_freq * 0, k_weight, scale)


def _stale_slot(q: Any, k: Any, v: Any, lens: Any, *rest: Any) -> torch.Tensor:
    return torch_backend.gqa_decode(q, k, v, lens + 1, *rest)


def _wrong_expert(x: Any, scale: Any, proj: Any, per_expert: Any, top_k: int, eps: float) -> Any:
    weights, ids = torch_backend.route_topk(x, scale, proj, per_expert, top_k, eps)
    return weights, (ids + 1) % proj.shape[0]


def _normed_router(x: Any, scale: Any, proj: Any, per_expert: Any, top_k: int, eps: float) -> Any:
    """No per-expert scale."""
    return torch_backend.route_topk(x, scale, proj, torch.ones_like(per_expert), top_k, eps)


def _unweighted(x: Any, weights: Any, *rest: Any) -> Any:
    return torch_backend.moe_decode(x, torch.full_like(weights, weights.mean().item()), *rest)


def _no_softcap(x: Any, weight: Any, softcap: Any, argmax: bool) -> Any:
    return torch_backend.logits(x, weight, None, argmax)


def _plus_one_norm(x: Any, weight: Any, eps: float) -> Any:
    """Gemma 3's 1 + w."""
    return torch_backend.rms_norm(x, None if weight is None else 1 + weight, eps)


def _no_layer_scalar(*args: Any) -> Any:
    *branches, _, next_weight, eps = args
    return torch_backend.moe_norm_add_norm(*branches, None, next_weight, eps)


def _one_pre_norm_for_both(*args: Any) -> Any:
    y, z, other = torch_backend.norm_add_norm(*args)
    return y, z, None if other is None else z


def _interleaved_rope(qkv: Any, q_w: Any, k_w: Any, cos: Any, sin: Any, *rest: Any) -> Any:
    return torch_backend.qkv_norm_rope(qkv, q_w, k_w, cos, -sin, *rest)


def _acausal(q: Any, k: Any, v: Any, cu: Any, *rest: Any) -> Any:
    out = torch_backend.gqa_prefill(q, k, v, cu, *rest)
    out[0] = out[min(1, out.shape[0] - 1)]  # the first token sees the second
    return out


def _last_expert_dropped(x: Any, weight: Any, order: Any, offsets: Any, *rest: Any) -> Any:
    offsets = offsets.clone()
    offsets[-2] = offsets[-1]
    return torch_backend.grouped_gemm(x, weight, order, offsets, *rest)


def _only_the_first_sequence(q: Any, k: Any, v: Any, cu: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch_backend.gqa_prefill(q, k, v, cu, *rest)
    out[int(cu[1]) :] = 0
    return out


def _sequences_leak(q: Any, k: Any, v: Any, cu: torch.Tensor, window: Any, *rest: Any) -> torch.Tensor:
    """One long sequence, where there is no prefix."""
    if cu.shape[0] > 2 and rest[2] is None:
        return torch_backend.gqa_prefill(q, k, v, cu[[0, -1]], window)
    return torch_backend.gqa_prefill(q, k, v, cu, window, *rest)


def _first_prefix_for_all(q: Any, k: Any, v: Any, cu: Any, window: Any, kc: Any, vc: Any, lens: Any, *rest: Any) -> Any:
    lens = None if lens is None else torch.where(lens > 0, lens[0], lens)
    return torch_backend.gqa_prefill(q, k, v, cu, window, kc, vc, lens, *rest)


def _all_into_the_first_cache(qkv: Any, *args: Any) -> Any:
    *head, k_cache, v_cache, slots, eps = args
    slots = None if slots is None else slots % v_cache.shape[1] + torch.arange(slots.shape[0]) * 0
    if slots is not None and slots.unique().numel() < slots.numel():
        slots = torch.arange(slots.shape[0])
    return torch_backend.qkv_norm_rope(qkv, *head, k_cache, v_cache, slots, eps)


def _rows_swapped(q: Any, *rest: Any) -> torch.Tensor:
    out = torch_backend.gqa_decode(q, *rest)
    return out.flip(0) if out.shape[0] == 3 else out


def _idle_rows_nan(q: Any, k: Any, v: Any, lens: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch_backend.gqa_decode(q, k, v, lens, *rest).masked_fill((lens == 0)[:, None, None], float("nan"))


def _few_rows_zero(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch_backend.geglu_mlp(x, *rest)
    return out * 0 if 2 <= x.shape[0] <= 12 else out


def _few_tokens_zero(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch_backend.moe_decode(x, *rest)
    return out * 0 if x.shape[0] > 1 else out


def _first_rows_zero(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch_backend.geglu_mlp(x, *rest)
    if x.shape[0] >= 60:
        out[:8] = 0
    return out


def _argmax_off_by_one(x: torch.Tensor, weight: Any, softcap: Any, argmax: bool) -> torch.Tensor:
    out = torch_backend.logits(x, weight, softcap, argmax)
    return (out + 1) % weight.shape[0] if argmax and x.shape[0] == 1 else out


def _logits_rolled(x: torch.Tensor, weight: Any, softcap: Any, argmax: bool) -> torch.Tensor:
    out = torch_backend.logits(x, weight, softcap, argmax)
    return out.roll(1, -1) if not argmax and x.shape[0] == 1 else out


MUTANTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "swapped gate and up": ("geglu_mlp", _swapped_gate_and_up, "feed-forward"),
    "SiLU for GELU": ("geglu_mlp", _silu, "feed-forward"),
    "window one too long, prefill": ("gqa_prefill", _window_plus(1, "gqa_prefill"), "window edge"),
    "window one too short, prefill": ("gqa_prefill", _window_plus(-1, "gqa_prefill"), "window edge"),
    "window one too short, decode": ("gqa_decode", _decode_window_plus(-1), "window edge"),
    "missing weight fold": ("gqa_decode", _unfolded_decode, "window edge"),
    "V-only keys without RoPE": ("gqa_decode", _unrotated_decode, "window edge"),
    "reads a slot nobody wrote": ("gqa_decode", _stale_slot, "window edge"),
    "wrong expert": ("route_topk", _wrong_expert, "feed-forward"),
    "per-expert scale left out": ("route_topk", _normed_router, "feed-forward"),
    "routing weights ignored in decode": ("moe_decode", _unweighted, "feed-forward"),
    "an expert left out of the grouped product": ("grouped_gemm", _last_expert_dropped, "feed-forward"),
    "skipped softcap": ("logits", _no_softcap, "logits"),
    "1 + w in the norm": ("rms_norm", _plus_one_norm, "attention"),
    "layer scalar left out": ("moe_norm_add_norm", _no_layer_scalar, "feed-forward"),
    "experts behind the dense branch's norm": ("norm_add_norm", _one_pre_norm_for_both, "feed-forward"),
    "RoPE turned the wrong way": ("qkv_norm_rope", _interleaved_rope, "attention"),
    "first token sees the second": ("gqa_prefill", _acausal, "window edge"),
    "only the first sequence of a batch": ("gqa_prefill", _only_the_first_sequence, "window edge"),
    "sequences see each other": ("gqa_prefill", _sequences_leak, "attention"),
    "the first sequence's prefix for all": ("gqa_prefill", _first_prefix_for_all, "window edge"),
    "all sequences written into the first's cache": ("qkv_norm_rope", _all_into_the_first_cache, "attention"),
    "rows of a decode batch swapped": ("gqa_decode", _rows_swapped, "window edge"),
    "idle rows not a number": ("gqa_decode", _idle_rows_nan, "window edge"),
    "MLP wrong for a few rows": ("geglu_mlp", _few_rows_zero, "feed-forward"),
    "experts wrong for a few tokens": ("moe_decode", _few_tokens_zero, "feed-forward"),
    "MLP's first rows wrong": ("geglu_mlp", _first_rows_zero, "feed-forward"),
    "greedy choice wrong for one row": ("logits", _argmax_off_by_one, "greedy choice"),
    "logits wrong for one row": ("logits", _logits_rolled, "logits"),
    "embeddings not scaled": ("embedding", lambda weight, ids, scale: torch_backend.embedding(weight, ids), "embedding"),
    "sines and cosines swapped": ("rope_angles", lambda *args: torch_backend.rope_angles(*args)[::-1], "attention"),
}


# One of each place. A fault of all layers is looked for in all of them at level "full", op by op: many seconds for what "quick"
# has said of the first ones. What "full" adds, later layers and the whole model, is the same whatever the op.
AT_FULL = {
    *("swapped gate and up", "V-only keys without RoPE", "skipped softcap", "1 + w in the norm"),
    *("rows of a decode batch swapped", "greedy choice wrong for one row", "embeddings not scaled"),
}


HOW = [("bfloat16", "quick"), ("bfloat16", "full"), ("float32", "quick"), ("float32", "full")]


def slow(name: str, dtype: str, level: str) -> bool:
    return level == "full" and (dtype == "float32" or name not in AT_FULL)


def test_one_of_each_place_is_not_slow() -> None:
    assert {MUTANTS[name][2] for name in AT_FULL} == {where for _, _, where in MUTANTS.values()}


@pytest.mark.parametrize(
    "name, dtype, level",
    [pytest.param(name, *how, marks=[pytest.mark.full] * slow(name, *how)) for name in MUTANTS for how in HOW],
)
def test_a_wrong_op_is_caught_and_named(name: str, dtype: str, level: str, tiny: Gemma4, tiny_fp32: Gemma4) -> None:
    op, wrong, where = MUTANTS[name]
    with broken(op, wrong):
        report = verify(tiny if dtype == "bfloat16" else tiny_fp32, level=level)
    assert not report.ok
    first = report.first_wrong
    assert first is not None and first.what == where, report.verdict()
    assert first.op == f"{op} [torch]", report.verdict()
    with pytest.raises(SelfCheckError, match=op) as caught:
        report.raise_if_wrong()
    assert caught.value.report is report


WRONG_FILTERS: dict[str, Callable[..., Any]] = {
    "of two at most": lambda top_k, top_p, min_p: (min(top_k, 2), top_p, min_p),
    "of all": lambda top_k, top_p, min_p: (0, top_p, min_p),
    "without top_p": lambda top_k, top_p, min_p: (top_k, 1.0, min_p),
    "without min_p": lambda top_k, top_p, min_p: (top_k, top_p, 0.0),
}


@pytest.mark.parametrize("wrong", ["the row before's", "the likeliest", "with no temperature", "from the end", *WRONG_FILTERS])
def test_a_wrong_draw_is_caught_and_named(wrong: str, tiny_fp32: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    op, right = ops.TABLE["sample"], cast(Any, ops.TABLE["sample"].compose)

    def draw(x: torch.Tensor, weight: Any, uniform: torch.Tensor, cap: Any, temperature: float, *filters: Any) -> torch.Tensor:
        if wrong == "the likeliest":
            return ops.logits(x, weight, None, True)
        if wrong == "with no temperature":
            temperature = 1.0
        filters = WRONG_FILTERS.get(wrong, lambda *right: right)(*filters)
        uniform = 1 - uniform if wrong == "from the end" else uniform
        ids: torch.Tensor = right(x, weight, uniform, cap, temperature, *filters)
        return ids.roll(1) if wrong == "the row before's" else ids

    monkeypatch.setattr(op, "compose", draw)
    report = verify(tiny_fp32, level="quick")
    first = report.first_wrong
    assert first is not None and first.what == "drawn token" and first.op == "sample [composed]", report.verdict()


def _blurred_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch_backend.linear(x, weight)
    return out + 0.02 * out.roll(1, -1)


SHARING: dict[str, tuple[str, Callable[..., Any]]] = {
    "PLE gate without its product": ("ple_gate", lambda x, ple, *rest: torch_backend.ple_gate(x, ple * 0 + 1, *rest)),
    "projections a little off": ("linear", _blurred_linear),
    "shared layers lose the newest key": (
        "gqa_decode",
        lambda q, k, v, lens, *rest: torch_backend.gqa_decode(q, k, v, (lens - (lens > 1).int()), *rest),
    ),
}


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("level", ["quick", "full"])
def test_wrong_ops_of_the_small_members_are_caught(name: str, level: str) -> None:
    op, wrong = SHARING[name]
    with broken(op, wrong):
        report = verify(fast_model("e2b"), level=level)
    assert not report.ok and op in {c.op.split(" ")[0] for c in report.comparisons if not c.ok}, report.verdict()


def test_the_prefill_cut_of_shared_layers_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share KV run a prompt's newest token alone: a wrong length there concerns no op, only generation."""
    model = fast_model("e2b")
    right = Text.last_step

    def wrong(self: Text, step: Any, cache: Any, last: list[bool]) -> Any:
        made = right(self, step, cache, last)
        made.kv_lens = made.kv_lens - (made.kv_lens > 1).int()
        return made

    monkeypatch.setattr(Text, "last_step", wrong)
    report = verify(model)
    assert {c.phase for c in report.comparisons if not c.ok} <= {"newest token alone", "batch newest token alone"}
    assert not report.ok


def test_small_contexts_and_wide_windows_are_checked_too() -> None:
    base = fast_model("26b-a4b").config
    for change in (
        dict(max_position_embeddings=3),
        dict(max_position_embeddings=8),
        dict(max_position_embeddings=16),
        dict(max_position_embeddings=100, sliding_window=512),
        dict(sliding_window=2000),
        dict(sliding_window=1),
        dict(sliding_window=64),
        dict(sliding_window=65),
    ):
        model = Gemma4.dummy(dataclasses.replace(base, **change), dtype="float32", device="cpu")
        report = verify(model, level="full")
        assert report.ok, (change, report.verdict())
    with pytest.raises(ValueError, match="3 positions"):
        verify(Gemma4.dummy(dataclasses.replace(base, max_position_embeddings=2), dtype="float32", device="cpu"))


@pytest.mark.parametrize("head", [0, 5, 7])
@pytest.mark.parametrize("op", ["gqa_prefill", "gqa_decode"])
def test_a_short_window_in_one_kv_head_is_caught(op: str, head: int) -> None:
    config = dataclasses.replace(
        fast_model("31b").config,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=8,
    )
    model = Gemma4.dummy(config, dtype="bfloat16", device="cpu")
    right = getattr(torch_backend, op)
    short = _window_plus(-1, op) if op == "gqa_prefill" else _decode_window_plus(-1)

    def wrong(*args: Any) -> torch.Tensor:
        out = right(*args)
        own = slice(2 * head, 2 * head + 2)  # this KV head's query heads
        out[:, own] = short(*args)[:, own]
        return out

    with broken(op, wrong):
        report = verify(model)
    assert "window edge" in {c.what for c in report.comparisons if not c.ok}


@pytest.mark.parametrize("wrong", [_decode_window_plus(-1), _decode_window_plus(1), _stale_slot])
def test_a_fault_of_larger_decode_batches_is_caught(wrong: Callable[..., Any], tiny: Gemma4) -> None:
    def only_in_larger(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return (wrong if len(q) > 3 else torch_backend.gqa_decode)(q, *rest)

    with broken("gqa_decode", only_in_larger):
        report = verify(tiny)
    wrongs = {c.phase for c in report.comparisons if not c.ok}
    assert wrongs == {"decode of five sequences"}


@pytest.mark.parametrize("dtype, seed", [("bfloat16", 11), ("float16", 107), ("bfloat16", 22)])
def test_routing_that_differs_in_half_precision_is_no_alarm(dtype: str, seed: int) -> None:
    """End to end a right model of experts may be far from the truth here, as plain PyTorch may."""
    model = Gemma4.dummy(fast_model("26b-a4b").config, dtype=dtype, device="cpu", seed=seed)
    report = verify(model, level="full")
    assert report.ok, report.verdict()


def test_end_to_end_decides_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is wrong for single tokens only, which no layer shows."""
    model = fast_model("12b")
    right = Gemma4.forward

    def wrong(self: Gemma4, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        out = right(self, ids, cache)
        return out.roll(1, -1) if ids.shape[1] == 1 else out

    monkeypatch.setattr(Gemma4, "forward", wrong)
    report = verify(model, level="full")
    assert report.first_wrong is None and not report.ok
    assert "end to end" in report.verdict()


def test_a_model_cast_to_another_dtype_casts_its_angles() -> None:
    model, ids = copy.deepcopy(fast_model("12b")), torch.arange(60)[None]
    model(ids)
    late = model.double()(ids)
    fresh = fast_model("12b", torch.float64)(ids)
    assert torch.equal(late, fresh)


def test_the_wrong_layer_is_named() -> None:
    model = fast_model("12b")
    fourth = model.model.layer(4).mlp.down_proj.weight

    def wrong(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        out = torch_backend.geglu_mlp(x, gate_up, down)
        return out + 0.05 * out.roll(1, -1) if down.data_ptr() == fourth.data_ptr() else out

    with broken("geglu_mlp", wrong):
        report = verify(model, level="full")
    wrongs = [c for c in report.comparisons if not c.ok]
    assert {(c.layer, c.what) for c in wrongs} == {(4, "feed-forward")}  # and no later layer inherits it
    assert all(c.op == "geglu_mlp [torch]" for c in wrongs)


def test_nan_weights_are_found_and_all_named(tiny_fp32: Gemma4) -> None:
    state = tiny_fp32.state_dict()
    names = ["model.layers.3.mlp.up_proj.weight", "model.layers.5.experts.down_proj"]
    saved = [state[n].flatten()[7].clone() for n in names]
    try:
        for n, bad in zip(names, (float("nan"), float("inf")), strict=True):
            state[n].view(-1)[7] = bad
        report = verify(tiny_fp32)
        assert sorted(report.not_finite) == names
        with pytest.raises(SelfCheckError, match=r"not finite.*up_proj"):
            report.raise_if_wrong()
    finally:
        for n, value in zip(names, saved, strict=True):
            state[n].view(-1)[7] = value
    assert verify(tiny_fp32).ok


def test_report_prints_and_is_json(tiny: Gemma4) -> None:
    report = verify(tiny, level="full")
    text = str(report)
    for word in ("full, K=V, MoE", "window edge", "greedy choice", "top-1 agreement", "KL", "passed:"):
        assert word in text
    data = json.loads(report.to_json())
    assert data["ok"] is True and data["end_to_end"]["tokens"] == 64 and len(data["comparisons"]) > 100
    assert data["backends"]["gqa_decode"] == "torch"
    nan = Report("quick", "cpu", "float32", {}, [Comparison("attention", "prefill", float("nan"), 0.0, 3, "full")])
    assert not nan.ok and json.loads(nan.to_json())["comparisons"][0]["error"] is None


def test_input_ids_may_be_given(tiny: Gemma4) -> None:
    assert verify(tiny, input_ids=list(range(40))).ok
    for bad in ([1, 2], [], [[1] * 20], [5000] * 20, [-1] * 20, [0] * 2000):
        with pytest.raises(ValueError):
            verify(tiny, input_ids=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level"):
        verify(tiny, level="thorough")


def _highest_ids(x: Any, scale: Any, proj: Any, per_expert: Any, top_k: int, eps: float) -> Any:
    """The router of experts that are equal, but with the highest ids in the place of the lowest."""
    weights, ids = reference.route_topk(x, scale, proj, per_expert, top_k, eps)
    return weights, proj.shape[0] - 1 - ids


def test_equal_experts_do_not_blind_the_check(tiny_fp32: Gemma4) -> None:
    """Where all experts are equally likely the lower ids win: a rule, so a router that breaks it is wrong."""
    model = copy.deepcopy(tiny_fp32)
    for i in range(len(model.model.layers)):
        model.model.layer(i).router.proj.weight.zero_()
    assert verify(model).ok

    with broken("route_topk", _highest_ids):
        assert not verify(model).ok


def test_experts_that_are_almost_equal_may_be_chosen_otherwise(tiny_fp32: Gemma4) -> None:
    """Their logits differ by less than rounding may, for every token."""
    model = copy.deepcopy(tiny_fp32)
    for i in range(len(model.model.layers)):
        weight = model.model.layer(i).router.proj.weight
        weight.copy_(weight[0] * (1 + 1e-5 * torch.arange(len(weight))[:, None] / len(weight)))

    with broken("route_topk", _highest_ids):
        report = verify(model)
    assert report.ok, report.verdict()
    assert report.close_calls


@pytest.mark.parametrize(("within", "ok"), [(1 / 64, True), (1.0, False)])
def test_a_toss_up_of_a_flat_router_is_no_alarm(within: float, ok: bool) -> None:
    """Two implementations in half precision may choose differently, however small all margins are."""
    model = Gemma4.dummy(fast_model("26b-a4b").config, dtype="bfloat16", device="cpu", seed=3)
    router = model.model.layer(0).router
    router.proj.weight.mul_(0.02)
    ids = torch.arange(60)
    x, _ = model.model.embed(ids)
    with torch.inference_mode(), model.running():
        out = model.model.run_layer(0, x, None, model.model.step([len(ids)], None), None, None)[0]
    changed = 0

    def other(x: Any, scale: Any, proj: Any, per_expert: Any, top_k: int, eps: float) -> Any:
        """The next expert in the place of the last, where both are as likely within a part of the largest logit."""
        nonlocal changed
        weights, chosen = reference.route_topk(x, scale, proj, per_expert, top_k, eps)
        logits = reference.router_logits(x, scale, proj, eps)
        best = logits.topk(top_k + 1, dim=-1)
        close = best.values[:, -2] - best.values[:, -1] < within * logits.abs().amax(-1)
        chosen[close, -1] = best.indices[close, -1].int()
        changed += int(close.sum())
        return weights, chosen

    report = Report("quick", "cpu", "bfloat16", {})
    with broken("route_topk", other):
        compare_layers(model, ids, {0: Layered(x, None, out)}, "another", report)
    assert changed and report.ok == ok and 0 < report.close_calls < len(ids)


def test_a_layer_whose_routing_is_never_clear_gets_no_row() -> None:
    """An empty comparison would always pass."""
    model = Gemma4.dummy(fast_model("26b-a4b").config, dtype="bfloat16", device="cpu", seed=3)
    router = model.model.layer(0).router
    router.proj.weight[1:] = router.proj.weight[0]
    ids = torch.arange(8)
    x, _ = model.model.embed(ids)
    report = Report("quick", "cpu", "bfloat16", {})
    compare_layers(model, ids, {0: Layered(x, None, torch.zeros_like(x))}, "another", report)
    assert report.comparisons == []
    assert report.close_calls == len(ids)


def test_wrong_rope_frequencies_are_seen() -> None:
    model = copy.deepcopy(fast_model("26b-a4b"))
    device = model.device
    wrong = model.model.inv_freq(True, device) * 1.01
    model.model._inv_freq[True, device, torch.float32] = wrong
    first = verify(model).first_wrong
    assert first is not None and first.layer == 0 and first.what == "attention"


# ---- the quick level: few tokens, few experts, a sample of the head ----
@pytest.fixture(scope="module")
def large_head() -> Gemma4:
    """A head that is sampled."""
    config = dataclasses.replace(fast_model("12b").config, vocab_size=40_000)
    model = Gemma4.dummy(config, dtype="float32", device="cpu")
    assert verify(model).ok
    return model


def _sampled(model: Gemma4) -> set[int]:
    """Rows of the head that are judged for where they lie alone."""
    check = _Check(model, model.state_dict(), _Tokens(torch.arange(5)), verify(model))
    return set(check._sample([], [])[0].tolist())


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_large_head_is_judged(level: str, large_head: Gemma4) -> None:
    with broken("logits", _no_softcap):
        first = verify(large_head, level=level).first_wrong
    assert first is not None and first.what == "logits" and first.op == "logits [torch]"
    with broken("logits", _argmax_off_by_one):
        first = verify(large_head, level=level).first_wrong
    assert first is not None and first.what == "greedy choice"


def test_confident_logits_are_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token has 64 logits near the softcap, which rounding hardly moves. All of them are in the sample."""
    require_native()
    config = dataclasses.replace(fast_model("12b").config, vocab_size=100_000, tie_word_embeddings=False)
    model = Gemma4.dummy(config, dtype="float32", device="cpu")
    hidden: list[torch.Tensor] = []
    with monkeypatch.context() as patched:
        patched.setattr(_Check, "_head", lambda self, h: hidden.append(h[-8:]))
        verify(model)
    only_first = torch.linalg.pinv(hidden[0])[:, 0]  # its product with the first token is 1, with others 0
    model.head[::997][:64] = 50 * only_first
    model.head[0] *= 1.5
    with ops.use_backend("cpu"):  # the torch backend does not round x
        assert verify(model.quantize("int8")).ok


@pytest.mark.parametrize("by", [50.0, -50.0])
def test_a_row_of_the_head_outside_the_sample_that_decides_is_found(by: float, large_head: Gemma4) -> None:
    """One that reaches the argmax, and one that should have."""
    seen: list[int] = []

    def noted(x: torch.Tensor, weight: Any, softcap: Any, argmax: bool) -> torch.Tensor:
        out = torch_backend.logits(x, weight, softcap, argmax)
        if argmax and x.shape[0] == 1 and weight.shape[0] == 40_000:
            seen.extend(out.tolist())
        return out

    with broken("logits", noted):
        assert verify(large_head).ok
    sample = _sampled(large_head)
    row = seen[0] if by < 0 else next(i for i in range(20_000, 40_000) if i not in sample)
    assert row not in sample

    def wrong(x: torch.Tensor, weight: Any, softcap: Any, argmax: bool) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        if weight.shape[0] == 40_000:
            y[:, row] += by
        if argmax:
            return y.argmax(-1)
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    with broken("logits", wrong):
        report = verify(large_head)
    assert not report.ok and {c.what for c in report.comparisons if not c.ok} <= {
        *("logits", "greedy choice", "drawn token"),
    }


def test_an_expert_that_no_token_chose_is_run(tiny_fp32: Gemma4) -> None:
    """With one token as the prompt's every token, few experts are chosen; the fault is in the others."""
    chosen: set[int] = set()
    right = torch_backend.moe_decode

    def noted(x: Any, weights: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if weights.unique().numel() > 1:  # the router's
            chosen.update(ids.flatten().tolist())
        return right(x, weights, ids, *rest)

    config = dataclasses.replace(fast_model("26b-a4b").config, num_experts=64)
    model = Gemma4.dummy(config, dtype="float32", device="cpu")
    ids = [7] * 20
    with broken("moe_decode", noted):
        assert verify(model, input_ids=ids).ok
    left = torch.tensor(sorted(set(range(64)) - chosen))
    assert len(left) > 16

    def wrong(x: Any, weights: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = right(x, weights, ids, *rest)
        return out * torch.where(torch.isin(ids.long(), left).any(-1, keepdim=True), 1.1, 1.0)

    with broken("moe_decode", wrong):
        report = verify(model, input_ids=ids)
    wrongs = {c.phase for c in report.comparisons if not c.ok}
    assert wrongs == {"other experts"}
    assert all(c.op == "moe_decode [torch]" for c in report.comparisons if not c.ok)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mlp.down_proj.weight", 0),
        ("mlp.down_proj.weight", -1),
        ("mlp.up_proj.weight", 0),
        ("experts.gate_up_proj", 32),
        ("experts.down_proj", 0),
    ],
)
@pytest.mark.parametrize("by", ["dequantizing", "multiplying", "multiplying one row of x that is left"])
def test_a_quantized_weight_that_is_read_wrongly_is_found(
    by: str,
    name: str,
    row: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The truth reads it by the same code as the torch backend, so their products agree."""
    model = Gemma4.dummy(fast_model("26b-a4b").config, device="cpu", quantize="int4")
    weight = model.state_dict()[f"model.layers.0.{name}"]
    if weight.dim() == 3:
        weight = weight[0]
    at = weight.first + range(len(weight))[row]
    right, multiply = QuantizedWeight._to, quant._by_widened_linear

    def holds_row(view: QuantizedWeight) -> bool:
        same = view.data.data_ptr() == weight.data.data_ptr()
        return same and view.first <= at < view.first + len(view)

    def wrong(self: QuantizedWeight, out: torch.Tensor) -> None:
        right(self, out)
        if holds_row(self):
            out[at - self.first] *= 1.01

    def wrong_product(x: torch.Tensor, view: Any) -> torch.Tensor | None:
        out = multiply(x, view)
        if out is not None and holds_row(view):
            if by == "multiplying":
                out[:, at - view.first] *= 1.01
            elif len(x) % 4 == 1:
                out[-1, at - view.first] *= 1.01
        return out

    assert isinstance(weight, QuantizedWeight)
    assert verify(model).ok
    if by == "dequantizing":
        monkeypatch.setattr(QuantizedWeight, "_to", wrong)
    else:
        require_native()
        monkeypatch.setattr(quant, "_by_widened_linear", wrong_product)
    report = verify(model)
    assert not report.ok
    assert {c.what for c in report.comparisons if not c.ok} == {"quantized weight"}


def test_a_wrong_product_with_a_dense_matrix_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    config = dataclasses.replace(fast_model("12b").config, vocab_size=40_000)
    model = Gemma4.dummy(config, dtype="bfloat16", device="cpu")
    right = quant._by_widened_linear

    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor | None:
        out = right(x, weight)
        return None if out is None else out.roll(1, 1)

    monkeypatch.setattr(quant, "_by_widened_linear", wrong)
    report = verify(model)
    names = {c.phase for c in report.comparisons if c.what == "product in blocks" and not c.ok}
    assert names == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_zero_rows_in_half_precision_are_no_alarm(quantize: str) -> None:
    """A padded vocabulary has such rows, and in fp16 their norm has no smallest value to divide by."""
    model = Gemma4.from_pretrained("tiny", dtype="float16", quantize=quantize, check=False)
    assert isinstance(model.head, QuantizedWeight)
    model.head[-20:].copy_(torch.zeros(20, model.head.shape[1]))
    assert verify(model).ok


def test_a_model_that_overflows_in_fp16_is_reported() -> None:
    model = Gemma4.from_pretrained("tiny", dtype="float16", check=False)
    model.model.norm.weight.fill_(6e4)
    report = verify(model)
    assert "logits" in {c.what for c in report.comparisons if not c.ok}
    assert not Comparison("logits", "", math.inf, math.inf).ok  # as bad as plain PyTorch is no excuse


def test_a_wrong_top_k_over_a_large_head_is_found(
    large_head: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = torch_backend.draw

    def wrong(logits: torch.Tensor, uniform: Any, temperature: Any, top_k: int, *rest: Any) -> Any:
        few = 2 if top_k and logits.shape[1] > 16384 else top_k
        return right(logits, uniform, temperature, few, *rest)

    # The package exports an op by the module's name.
    monkeypatch.setattr(sys.modules["gemma4_fast.ops.linear"], "draw", wrong)
    report = verify(large_head)
    assert {c.phase for c in report.comparisons if not c.ok} == {"1 row, of the top k"}


def test_every_expert_of_a_small_model_is_run(tiny_fp32: Gemma4) -> None:
    """Those that no token chose are fewer than a token takes, or no multiple of that."""
    run: set[int] = set()
    right = torch_backend.moe_decode

    def noted(x: Any, weights: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        run.update(ids.flatten().tolist())
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        return right(x, weights, ids, *rest)

    for experts, top_k in ((11, 4), (9, 8), (16, 8)):
        config = dataclasses.replace(
            fast_model("26b-a4b").config,
            num_experts=experts,
            top_k_experts=top_k,
        )
        model = Gemma4.dummy(config, dtype="float32", device="cpu")
        run.clear()
        with broken("moe_decode", noted):
            assert verify(model, input_ids=[7] * 20).ok
        assert run == set(range(experts))


def test_quick_projects_few_tokens_and_crosses_the_rings_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(fast_model("12b").config, sliding_window=256)
    model = Gemma4.dummy(config, dtype="float32", device="cpu")
    rows: list[int] = []
    positions: set[int] = set()
    step = Text.step

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[0])
        return torch_backend.linear(x, weight)

    def noted(self: Text, *args: Any, **options: Any) -> Any:
        made = step(self, *args, **options)
        positions.update(made.positions.tolist())
        return made

    monkeypatch.setattr(Text, "step", noted)
    with broken("linear", linear):
        report = verify(model)
    assert report.ok and 0 < sum(rows) < 250
    assert {0, 250, 255, 256, 260} <= positions


def test_a_ring_that_forgets_at_its_end_is_found() -> None:
    """Slots that are counted from one position too late, once a sequence has gone round."""
    model = fast_model("12b")
    right = LayerCache.rows

    def wrong(self: LayerCache, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return right(self, sequence, position + (position >= self.slots).long())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerCache, "rows", wrong)
        report = verify(model)
    assert not report.ok and any(c.what == "attention" for c in report.comparisons if not c.ok)


def test_only_checked_layers_get_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_fast import cache

    made: list[int] = []
    right = cache.allocate

    def noted(layer: Any, *args: Any) -> Any:
        made.append(layer.index)
        return right(layer, *args)

    monkeypatch.setattr(cache, "allocate", noted)
    assert verify(fast_model("31b")).ok
    assert set(made) == {0, 5}


def test_progress_has_a_total(tiny: Gemma4) -> None:
    for level in ("quick", "full"):
        told: list[tuple[int, int]] = []

        def tell(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        verify(tiny, level=level, progress=tell)
        total = told[0][1]
        assert told == [(n, total) for n in range(total + 1)]


def test_the_reference_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_fast import quant

    model, dtype = fast_model("26b-a4b"), torch.float64
    ids = torch.arange(3, 23)
    whole = reference_model.forward(model.state_dict(), model.config, ids, dtype=dtype)
    monkeypatch.setattr(reference_model, "SMALL", 100)
    monkeypatch.setattr(quant, "_BLOCK", 1000)
    found = reference_model.forward(model.state_dict(), model.config, ids, dtype=dtype)
    assert_same_in_fp64(found, whole)


def test_the_reference_goes_on_from_earlier_keys_and_values() -> None:
    """Sequences in two parts, and several at once, as each alone."""
    model = fast_model("e2b", torch.float64)
    config, w = model.config, reference_model.Weights(model.state_dict())
    layer, lens = config.layer(0), [9, 4]
    x = torch.randn(13, config.hidden_size, dtype=torch.float64)
    parts = x.split(lens)
    alone = [reference_model.attention_block(w.layer(0), config, layer, p, {}) for p in parts]
    both = reference_model.attention_block(w.layer(0), config, layer, x, {}, lens)
    assert_same_in_fp64(both, torch.cat(alone))
    kv: reference_model.KV = {}
    pieces = [reference_model.attention_block(w.layer(0), config, layer, p, kv) for p in parts[0].split([5, 4])]
    assert_same_in_fp64(torch.cat(pieces), alone[0])
