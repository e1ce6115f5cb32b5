"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, which runs them on the CPU.

The interpreter finds wrong numbers and indexes; it runs programs one after the other, so it finds no races, and it cuts bf16
off instead of rounding, so bf16 is judged on a GPU alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family import MEMBERS
from torch import Tensor

from gemma4_fast import Gemma4, Gemma4Config, UnsupportedError, explain, ops, use_backend, verify
from gemma4_fast.graph import DecodeGraph, Spares
from gemma4_fast.ops import table
from gemma4_fast.ops.accuracy import Judge, converted, outputs
from gemma4_fast.ops.attention import decode_case, prefill_case
from gemma4_fast.ops.moe import moe_case
from gemma4_fast.ops.table import Maker
from gemma4_fast.quant import QuantizedWeight

pytest.importorskip("triton")

from gemma4_fast.triton import common, gqa_decode_v_only, split_kv

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float16, torch.float32]
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),  # numpy, of infinities
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # the interpreter's loops
]


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Without a GPU: kernels defined here are for the interpreter, and the table knows that it can run them."""
    if GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        half_the_work(patch)
        forget()
        yield
    forget()


def half_the_work(patch: pytest.MonkeyPatch) -> None:
    """Of the interpreter, whose results are the same without it."""
    from triton.runtime import interpreter

    # It looks at every sum and product for an overflow, and tells of it in debug mode alone, which is off.
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    # It prepares triton.language for a function at each of its calls: once in a launch for all functions of a module will do.
    prepare, launch, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def prepare_once(fn: Any) -> Any:
        if (module := id(fn.__globals__)) in prepared:
            return None
        prepared.add(module)
        return prepare(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    patch.setattr(interpreter, "_patch_lang", prepare_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)


def forget() -> None:
    """What the table knows of this machine."""
    table.backend_missing.cache_clear()
    for op in ops.TABLE.values():
        op._kept.clear()


# What takes the interpreter many seconds; each of these ops has quick cases too, and a whole model below.
SLOW = {
    "linear": ["26b_qkv_one_token", "e2b_o_proj", "int8_one_token"],
    "geglu_mlp": ["26b_dense_one_token", "e2b", "int4_one_token", "int8"],
    "logits": ["26b_slice", "argmax", "int8_argmax"],
    "gqa_decode": ["sliding_ring", "full_v_only", "full_v_only_paged", "full_kv", "sliding_short"],
    "grouped_gemm": ["26b_geglu", "26b_combine"],
    "moe_decode": ["26b_one_token", "26b", "int8_one_token", "int8_odd", "int4", "int4_few"],
    "moe": ["26b_one_token", "26b_prefill"],
    "moe_feed_forward": ["26b_one_token", "few", "int8"],
    "ple_gate": ["e2b_one_token", "e4b"],
    "embedding": ["e2b_per_layer"],
    "sample": ["26b_slice"],
}


def rows() -> Iterator[Any]:
    for op in ops.TABLE.values():
        if op.compose is None and "triton" not in op.impls:
            continue
        for case, dtype in itertools.product(op.cases, DTYPES):
            slow = [pytest.mark.full] if not GPU and case in SLOW.get(op.name, []) else []
            yield pytest.param(op, case, dtype, marks=slow, id=f"{op.name}-{case}-{str(dtype)[6:]}")


def on(backend: str, op: ops.Op) -> Any:
    return ops.bound(op, backend)


@pytest.mark.parametrize("op, case, dtype", list(rows()))
def test_matches_reference(op: ops.Op, case: str, dtype: torch.dtype) -> None:
    verdict = Judge(op, op.inputs(case, dtype, DEVICE))(on("triton", op))
    assert verdict.ok, verdict.message


QUANTIZED = [
    pytest.param(op, case, id=f"{op.name}-{case}")
    for op in ops.TABLE.values()
    for case in op.cases
    if case.startswith(("int8", "int4")) and (GPU or case not in SLOW.get(op.name, []))
]


@pytest.mark.parametrize("op, case", QUANTIZED)
def test_quantized_weights_are_what_they_stand_for(op: ops.Op, case: str) -> None:
    """These kernels round no activations, as the table's judge allows: here they are held to the dequantized product."""
    args = op.inputs(case, torch.float16, DEVICE)
    dense = {k: v.dequantize() if isinstance(v, QuantizedWeight) else v for k, v in args.items()}
    exact = {k: v.dequantize(torch.float64) if isinstance(v, QuantizedWeight) else v for k, v in args.items()}
    judge = Judge(op, dense)
    judge.truth = outputs(op, op.reference, converted(exact, torch.float64))
    verdict = judge.of(outputs(op, on("triton", op), args))
    assert verdict.ok, verdict.message


def test_every_slow_case_is_one() -> None:
    assert all(set(cases) < set(ops.TABLE[name].cases) for name, cases in SLOW.items())


# ---- attention ----


def decode(args: dict[str, Any]) -> Tensor:
    with use_backend("triton"):
        return ops.gqa_decode(**args)


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """A GPU of so many multiprocessors."""
    token = common.ASSUMED.set(common.Target("cuda", 90, count, 232448))
    try:
        yield
    finally:
        common.ASSUMED.reset(token)


@pytest.mark.parametrize("v_only", [False, True])
@pytest.mark.skipif(GPU, reason="pretends to be other GPUs")
def test_a_sequence_gets_the_same_bits_however_the_work_is_cut(v_only: bool) -> None:
    args = decode_case(Maker(torch.float16), [700, 3], 4, 1, 64, 768, v_only=v_only)
    with cores(1):  # a node a program
        whole = decode(args)
    with cores(10**6):  # a tile a program
        cut = decode(args)
    assert torch.equal(whole, cut)
    assert Judge(ops.TABLE["gqa_decode"], args).of([cut]).ok


@pytest.mark.skipif(not GPU, reason="numpy's products depend on how many rows there are")
@pytest.mark.parametrize("v_only", [False, True])
def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(v_only: bool) -> None:
    args = decode_case(Maker(torch.bfloat16, DEVICE), [5000, *range(1, 2000, 17)], 16, 2, 512, 5056, v_only=v_only)
    together = decode(args)
    alone = {k: v[:1] if isinstance(v, Tensor) and k in ("q", "k_cache", "v_cache", "kv_lens") else v for k, v in args.items()}
    assert torch.equal(decode(alone), together[:1])
    assert torch.equal(decode(args), together)


@pytest.mark.parametrize("v_only", [False, True])
def test_a_paged_cache_gives_the_same_bits(v_only: bool) -> None:
    paged = decode_case(Maker(DTYPES[0], DEVICE), [70, 33], 4, 2, 64, 96, v_only=v_only, block=32)
    table = paged["block_table"].long()
    flat = {k: None if paged[k] is None else paged[k][table].flatten(1, 2) for k in ("k_cache", "v_cache")}
    assert torch.equal(decode(paged), decode({**paged, **flat, "block_table": None}))
    paged = prefill_case(Maker(DTYPES[0], DEVICE), [9, 20], 4, 2, 64, None, [50, 64], 96, v_only=v_only, block=32)
    table = paged["block_table"].long()
    flat = {k: None if paged[k] is None else paged[k][table].flatten(1, 2) for k in ("k_cache", "v_cache")}
    with use_backend("triton"):
        assert torch.equal(ops.gqa_prefill(**paged), ops.gqa_prefill(**{**paged, **flat, "block_table": None}))


@pytest.mark.parametrize("v_only", [False, True])
def test_what_no_query_sees_may_be_anything(v_only: bool) -> None:
    """Slots behind a sequence's end, and before its window, hold NaN."""
    args = decode_case(Maker(DTYPES[0], DEVICE), [70], 4, 2, 64, 128, window=40, v_only=v_only)
    wanted = decode(args)
    for cache in (args["k_cache"], args["v_cache"]):
        if cache is not None:
            cache[:, 70:] = float("nan")
            cache[:, :30] = float("nan")
    assert torch.equal(decode(args), wanted)
    args = prefill_case(Maker(DTYPES[0], DEVICE), [20], 4, 2, 64, 16, [30], 64, v_only=v_only)
    with use_backend("triton"):
        wanted = ops.gqa_prefill(**args)
        for cache in (args["k_cache"], args["v_cache"]):
            if cache is not None:
                cache[:, 30:] = float("nan")
                cache[:, :14] = float("nan")
        assert torch.equal(ops.gqa_prefill(**args), wanted)


def test_a_view_of_a_cache_is_read_where_it_is() -> None:
    """A cache's first slots, of a step that knows how long the longest sequence is."""
    args = decode_case(Maker(DTYPES[0], DEVICE), [60, 7], 4, 2, 64, 256)
    short = {k: args[k][:, :64] for k in ("k_cache", "v_cache")}
    assert not short["k_cache"].is_contiguous()
    assert torch.equal(decode({**args, **short}), decode(args))


@pytest.mark.parametrize("v_only", [False, True])
def test_tensors_may_be_views(v_only: bool) -> None:
    """Lengths and tables with gaps between their entries, or none at all."""
    args = decode_case(Maker(DTYPES[0], DEVICE), [40, 40, 9], 4, 2, 64, 64, v_only=v_only, block=16)
    wanted = decode(args)
    apart = args["kv_lens"].repeat_interleave(2)
    apart[1::2] = 10**6
    views = dict(kv_lens=apart[::2], block_table=args["block_table"].t().contiguous().t())
    assert torch.equal(decode({**args, **views}), wanted)
    same = args["kv_lens"][:1].expand(3)
    assert torch.equal(decode({**args, "kv_lens": same}), decode({**args, "kv_lens": same.contiguous()}))
    args = prefill_case(Maker(DTYPES[0], DEVICE), [5, 3], 4, 2, 64, None, [30, 9], 64, v_only=v_only)
    apart = args["prefix_lens"].repeat_interleave(2)
    apart[1::2] = 60
    with use_backend("triton"):
        assert torch.equal(ops.gqa_prefill(**{**args, "prefix_lens": apart[::2]}), ops.gqa_prefill(**args))


@pytest.mark.parametrize("v_only", [False, True])
def test_what_is_not_finite_is_not_hidden(v_only: bool) -> None:
    args = decode_case(Maker(DTYPES[0], DEVICE), [20, 5, 0], 2, 1, 64, 64, v_only=v_only)
    args["v_cache" if v_only else "k_cache"][0, 3] = float("nan")
    out = decode(args)
    assert out[0].isnan().all() and out[1].isfinite().all() and (out[2] == 0).all()


def test_layers_of_a_captured_step_share_their_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    angles = gqa_decode_v_only.angles
    monkeypatch.setattr(gqa_decode_v_only, "angles", lambda *args: made.append(1) or angles(*args))
    args = decode_case(Maker(DTYPES[0], DEVICE), [70], 4, 2, 64, 128, v_only=True)
    other = {**args, "inv_freq": args["inv_freq"] * 0.5}
    wanted = [decode(args), decode(other)]
    assert len(made) == 2
    with ops.shared_step():
        got = [decode(args), decode(other), decode(args), decode(other)]
    assert len(made) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, wanted * 2, strict=True))


def test_offsets_have_64_bits_where_32_do_not_hold_them() -> None:
    cache = torch.empty(1, dtype=torch.float16, device="meta").expand(4, 2**20, 1, 512)
    fits, beyond = (
        cache.as_strided((1, 2**22, 1, 512), (2**31, 511, 512, 1)),
        cache.as_strided((2, 4, 1, 512), (2**31, 1, 1, 1)),
    )
    assert split_kv.offset_type(fits) == split_kv.tl.int32
    assert split_kv.offset_type(fits, beyond) == split_kv.tl.int64


# ---- products ----


def test_products_of_nothing() -> None:
    with use_backend("triton"):
        for x, weight in ((torch.ones(0, 8), torch.ones(5, 8)), (torch.ones(3, 0), torch.ones(5, 0))):
            ids = ops.logits(x.to(DEVICE), weight.to(DEVICE), 30.0, True)
            assert ids.dtype == torch.int64 and ids.tolist() == [0] * len(x)
            assert ops.logits(x.to(DEVICE), weight.to(DEVICE), 30.0).shape == (len(x), 5)


def test_a_softcap_far_above_the_logits_changes_little() -> None:
    op, generator = ops.TABLE["logits"], torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 64, generator=generator).to(DEVICE) for n in (3, 50))
    for cap in (1e3, 1e6):
        verdict = Judge(op, dict(x=x, weight=weight / 8, softcap=cap, argmax=False))(on("triton", op))
        assert verdict.ok, verdict.message


# ---- experts ----


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("bits", [0, 4])
def test_an_id_that_is_no_expert_adds_nothing(tokens: int, bits: int) -> None:
    args = moe_case(Maker(DTYPES[0], DEVICE), tokens, 64, 32, 8, 4, bits=bits)
    wanted = {**args, "topk_weights": args["topk_weights"].clone()}
    wanted["topk_weights"][:, 1] = 0
    wanted["topk_weights"][0] = 0
    args["ids"] = args["ids"].clone()
    args["ids"][:, 1], args["ids"][0] = 8, -1
    with use_backend("triton"):
        verdict = Judge(ops.TABLE["moe"], wanted).of([ops.moe(**args)])
    assert verdict.ok, verdict.message


def test_more_tokens_of_one_expert_than_a_tile_has_rows() -> None:
    args = moe_case(Maker(torch.float32, DEVICE), 16, 64, 32, 8, 2, "one")
    args["ids"][:] = torch.tensor([3, 3], dtype=torch.int32)  # 32 of one, both assignments of a token
    op = ops.TABLE["moe_decode"]
    verdict = Judge(op, args)(on("triton", op))
    assert verdict.ok, verdict.message


# ---- what must turn the judge's light red ----

MUTANTS = [
    # file, what stands there, what a mistake would put there, op, case
    ("gqa_decode", "valid = (position >= lo)", "valid = (position > lo)", "gqa_decode", "odd"),
    ("gqa_decode", "position < length)", "position < length - 1)", "gqa_decode", "odd"),
    ("split_kv", 'float("-inf"))\n    m = tl.max(s, 1)', "0.0)\n    m = tl.max(s, 1)", "gqa_decode", "odd"),
    ("split_kv", "scores * (scale * LOG2E)", "scores * LOG2E * LOG2E", "gqa_decode", "odd"),
    ("split_kv", "tl.exp2(m_new - finite)", "tl.exp2(m_new - m_new)", "gqa_decode", "odd"),
    ("split_kv", "slot = position % slots", "slot = (position + 1) % slots", "gqa_decode", "odd"),
    ("gqa_decode_v_only", "q_lo * cos[None, :] + q_hi", "q_lo * cos[None, :] - q_hi", "gqa_decode", "full_v_only_wrapped"),
    ("gqa_decode_v_only", "w_ptr, HALF + BLOCK_R, D, REST_1)", "w_ptr, BLOCK_R, D, REST_1)", "gqa_decode",
     "full_v_only_wrapped"),
    ("gqa_prefill", "sees = j[None, :] <= token[:, None]", "sees = j[None, :] < token[:, None] + 2", "gqa_prefill", "odd"),
    ("gqa_prefill", "token[:, None] - window)\n                scores", "token[:, None] - window + 1)\n                scores",
     "gqa_prefill", "images"),
    ("gqa_prefill", "prefix + token[:, None] - window)", "token[:, None] - window)", "gqa_prefill", "sliding_ring_prefix"),
    ("gqa_prefill", "share_1 / total", "share_0 / total", "gqa_prefill", "full_paged_prefix"),
    ("gqa_prefill", "(row_image >= 0)[:, None])\n", "(row_image >= 99)[:, None])\n", "gqa_prefill", "images"),
    ("gqa_prefill", "l * old + tl.sum(p, 1)", "l + tl.sum(p, 1)", "gqa_prefill", "images"),
    ("rebuilt_keys", "lo * cos - hi * sin", "lo * cos + hi * sin", "gqa_prefill", "full_v_only_paged"),
    ("qkv_norm_rope", "a * cos - b * sin", "a * cos + b * sin", "qkv_norm_rope", "odd"),
    ("norm_add_norm", "y = y * tl.load(scale_ptr)", "y = y * 1.0 + 0 * tl.load(scale_ptr)", "norm_add_norm", "26b"),
    ("linear", "(k0 + tl.arange(0, BLOCK_K) < K)", "(k0 + tl.arange(0, BLOCK_K) < K - 1)", "linear", "odd"),
    ("linear", "cap * tanh(acc / cap)", "cap * tanh(acc)", "logits", "odd"),
    ("linear", "gelu_tanh(acc) * up", "gelu_tanh(up) * acc", "geglu_mlp", "odd"),
    ("moe_decode", "rank[None, :] == slot[:, None]", "rank[None, :] == slot[:, None] + 1", "moe_decode", "odd"),
    ("moe_decode", "h * tl.load(weight_ptr + pair)", "h * 1.0", "moe_decode", "odd"),
    ("grouped_gemm", "r_ok, n_ok = r < hi", "r_ok, n_ok = r < hi - 1", "grouped_gemm", "none"),
    ("grouped_gemm", "at // TOP_K if GEGLU", "at // (2 * TOP_K) if GEGLU", "grouped_gemm", "skewed_geglu"),
    ("route_topk", "* tl.load(expert_scale_ptr + ids)", "+ 0 * tl.load(expert_scale_ptr + ids)", "route_topk", "odd"),
    ("norm_add_norm", "(z * other_w)", "(z * next_w)", "norm_add_norm", "before_experts"),
    ("norm_add_norm", "_normed(experts, H, eps) * experts_w", "experts * experts_w", "moe_norm_add_norm", "odd"),
    ("expert_dispatch", "tl.cumsum(mine, 0) - mine", "tl.sum(mine, 0) - tl.cumsum(mine, 0)", "expert_dispatch", "odd"),
    ("expert_dispatch", "(counts + block_m - 1) // block_m", "counts // block_m + 1", "expert_dispatch", "odd"),
    ("embedding", "* scale", "* 1.0", "embedding", "odd"),
    ("common", "- 128\n", "- 127\n", "embedding", "int8_odd"),
    ("common", "[N, W * 8]) - 8", "[N, W * 8]) - 7", "embedding", "int4_odd"),
    ("rms_norm", "/ H + eps", "/ (H + 1) + eps", "rms_norm", "odd"),
    ("gqa_prefill", "(j[None, :] > token[:, None] - window)", "(j[None, :] >= token[:, None] - window)", "gqa_prefill", "odd"),
    ("grouped_gemm", "tl.load(weight_ptr + token * TOP_K + k) * y", "1.0 * y", "grouped_gemm", "odd"),
    ("linear", "gelu_tanh(acc) * other", "acc * other", "ple_gate", "odd"),
    ("qkv_norm_rope", "tl.load(slots_ptr + token)", "(tl.load(slots_ptr + token) + 1) % num_rows", "qkv_norm_rope", "odd"),
    ("route_topk", "tl.where(e == best, LOWEST, key)", "tl.where(key == tl.max(key, 0), LOWEST, key)", "route_topk", "ties"),
    ("common", "swap = (turn & 1) == 1", "swap = (turn & 1) == 2", "rope_angles", "full_far"),
    ("common", "0.044715 * x * x * x", "0.044715 * x * x", "geglu_mlp", "odd"),
]  # fmt: skip
KERNELS = Path(common.__file__).parent


@contextlib.contextmanager
def kernels_with(file: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """All kernels imported anew, of a copy in which `old` is `new` in one file."""
    package = "gemma4_fast.triton"
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(package + ".")}
    parent = sys.modules[package]
    for source in KERNELS.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        if source.stem == file:
            assert old in text, f"{file}.py has no {old!r} any more: mend this mutant"
            text = text.replace(old, new)
        (folder / source.name).write_text(text, encoding="utf-8")
    path = parent.__path__
    parent.__path__ = [str(folder)]
    try:
        yield
    finally:
        parent.__path__ = path
        for name in [n for n in sys.modules if n.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules.update(kept)
        for name, module in kept.items():
            setattr(parent, name.rsplit(".", 1)[1], module)


@functools.cache
def judge_of_the_right(name: str, case: str) -> Judge:
    """Which has let the kernel pass as it is: once for all its mistakes."""
    op = ops.TABLE[name]
    judge = Judge(op, op.inputs(case, torch.float32))
    assert judge(op.impls["triton"].function).ok
    return judge


@pytest.mark.skipif(GPU, reason="the interpreter shows it, and on a GPU some of these would leave memory")
@pytest.mark.parametrize("file, old, new, name, case", MUTANTS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTANTS)])
def test_a_mistake_is_seen(file: str, old: str, new: str, name: str, case: str, tmp_path: Path) -> None:
    judge = judge_of_the_right(name, case)
    with kernels_with(file, old, new, tmp_path):
        module = ops.TABLE[name].impls["triton"].path.partition(":")[0]
        function = getattr(importlib.import_module(module), name)
        assert not judge(function).ok


def test_experts_whose_tiles_are_larger_than_32_bits_hold() -> None:
    ids = torch.tensor([[3, 0], [1, 3], [2, 0]], dtype=torch.int32, device=DEVICE)
    for block_m in (2**31 - 1, 2**40):
        with use_backend("triton"):
            got = ops.expert_dispatch(ids, 4, block_m)
        for mine, theirs in zip(got, ops.TABLE["expert_dispatch"].reference(ids, 4, block_m), strict=True):
            assert torch.equal(mine, theirs)


# ---- choosing it ----


def test_the_interpreter_is_never_the_automatic_choice() -> None:
    if not GPU:
        assert all(c.backend != "triton" for c in explain(device="cpu", dtype="float32").choices)
        with use_backend("triton"):
            shown = {c.backend for c in explain(device="cpu", dtype="float32").choices}
        assert shown == {"triton", "composed"}
    else:
        assert {c.backend for c in explain(device="cuda").choices} <= {"cuda", "triton", "composed"}


def test_what_the_kernels_do_not_take_is_refused() -> None:
    args = decode_case(Maker(torch.float16, DEVICE), [3], 2, 1, 1024, 8)
    with use_backend("triton"):
        with pytest.raises(UnsupportedError, match="even head dims up to 512, got 1024"):
            ops.gqa_decode(**args)
        args = decode_case(Maker(torch.float16, DEVICE), [3], 20, 1, 512, 8)
        with pytest.raises(UnsupportedError, match="up to 16 query heads per KV head of 512 columns, got 20"):
            ops.gqa_decode(**args)
        args = decode_case(Maker(torch.float16, DEVICE), [3], 2, 1, 64, 8, v_only=True)
        with pytest.raises(UnsupportedError, match="frequencies in float32"):
            ops.gqa_decode(**{**args, "inv_freq": args["inv_freq"].double()})
        with pytest.raises(UnsupportedError, match="does not take float64"):
            ops.rms_norm(torch.ones(2, 8, dtype=torch.float64, device=DEVICE))
        weight = QuantizedWeight.of(torch.randn(32, 64, device=DEVICE), 8)
        with pytest.raises(UnsupportedError, match="no views"):
            ops.linear(torch.ones(1, 64, device=DEVICE), weight[3:9])
        with pytest.raises(UnsupportedError, match="in 2 parts"):
            ops.geglu_mlp(torch.ones(1, 64, device=DEVICE), weight, QuantizedWeight.of(torch.randn(64, 16, device=DEVICE), 8))


# ---- a whole model ----


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU; test_graph.py has a stand-in")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_step_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many replays, a row that is idle at times, and a cache that outgrows what a graph was made for."""
    monkeypatch.setattr(ops, "decode_limit", lambda longest: -(-longest // 16) * 16)
    model = Gemma4.from_pretrained("tiny", dtype, DEVICE, "triton", check=False)
    caches = [model.new_cache(3, 128) for _ in range(2)]
    prompt = torch.arange(60, 75, device=DEVICE)
    with model.running():
        for cache in caches:
            model.model(prompt, model.model.step([5, 5, 5], cache), cache)
        graph = DecodeGraph(model, caches[0])
        for n in range(60):
            going = [1, int(n % 3 != 1), int(n < 30)]
            ids = torch.tensor([n + 5, 2 * n + 7, 90], device=DEVICE)
            wanted = model.model(ids, model.model.step(going, caches[1], decode=True), caches[1])
            got = graph.run(ids, going)
            for b in (b for b in range(3) if going[b]):
                assert torch.equal(got[b], wanted[b]), f"step {n}, sequence {b}"
            _ = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(4)]  # what was freed is overwritten
        assert graph.recorded
    assert torch.equal(caches[0].lens, caches[1].lens)


@pytest.mark.skipif(not GPU, reason="replays CUDA graphs")
def test_a_generation_goes_on_with_the_last_ones_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spares, "SHARE", 0.01)
    config = Gemma4Config.from_dict({"model_type": "gemma4_text", **MEMBERS["26b-a4b"]})
    model, fresh = (Gemma4.dummy(config, device=DEVICE, backend="triton") for _ in range(2))
    for prompts in ([[5, 6, 7]], [[9, 4]], [[5], [6]], [[5, 6, 7]]):
        fresh.spares.clear()
        got, wanted = (m.generate(prompts, max_new_tokens=6, stop_token_ids=[]) for m in (model, fresh))
        assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
    assert len(model.spares) == 2


# Experts and V-only caches; shared caches and per-layer embeddings: one layer of each kind.
@pytest.mark.parametrize("member, types", [("26b-a4b", 1), ("e2b", 2)])
def test_a_whole_model_runs_on_these_kernels_alone(member: str, types: int) -> None:
    layers = ["sliding_attention", "full_attention"] * types
    change = dict(num_hidden_layers=len(layers), layer_types=layers, num_kv_shared_layers=len(layers) - 2)
    config = Gemma4Config.from_dict({"model_type": "gemma4_text", **MEMBERS[member], **change})
    made = {}
    for backend in ("torch", "triton"):
        model = Gemma4.dummy(config, dtype=torch.float32, device=DEVICE, backend=backend)
        made[backend] = model.generate([[5, 6, 7, 8, 9], [3]], max_new_tokens=2, temperature=0.0, stop_token_ids=())
    assert [g.token_ids for g in made["triton"]] == [g.token_ids for g in made["torch"]]


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_model_passes_its_self_check(dtype: torch.dtype) -> None:
    report = verify(Gemma4.from_pretrained("tiny", dtype, DEVICE, "triton", check=False))
    assert report.ok, str(report)
