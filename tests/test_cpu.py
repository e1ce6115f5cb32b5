"""The CPU kernels: every op x case x instruction set of the table, and what only they promise.

Every instruction set that this machine has is run, not the best alone. The promise: a sequence's bits depend neither on what
else is in the batch nor on the number of threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_native import require_native
from torch import Tensor

import gemma4_fast
from gemma4_fast import UnsupportedError, native, ops, use_backend
from gemma4_fast.ops import cpu_backend, table
from gemma4_fast.ops.accuracy import Judge, nan_poison
from gemma4_fast.ops.attention import decode_case, prefill_case
from gemma4_fast.ops.linear import mlp_case
from gemma4_fast.ops.moe import moe_case
from gemma4_fast.ops.table import Maker

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_native()
    assert native.kernels_missing() is None


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def require_isa(isa: str) -> None:
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")


ROWS = [
    pytest.param(op, isa, case, dtype, id=f"{op.name}-{isa}-{case}-{str(dtype)[6:]}")
    for op in ops.TABLE.values()
    if "cpu" in op.impls
    for case in op.cases
    for dtype in DTYPES
    for isa in native.ISAS
]


@functools.lru_cache(maxsize=1)
def judge(name: str, case: str, dtype: torch.dtype) -> Judge:
    """One for all instruction sets, which come one after the other."""
    return Judge(ops.TABLE[name], ops.TABLE[name].inputs(case, dtype))


@pytest.mark.parametrize("op, isa, case, dtype", ROWS)
def test_every_instruction_set_matches_the_reference(op: ops.Op, isa: str, case: str, dtype: torch.dtype) -> None:
    require_isa(isa)
    with use_backend("cpu", isa=isa):
        verdict = judge(op.name, case, dtype)(op)
    assert verdict.ok, verdict.message


def test_every_op_has_a_cpu_kernel() -> None:
    assert [op.name for op in ops.TABLE.values() if op.compose is None and "cpu" not in op.impls] == []


# Shapes around the kernels' own sizes: tiles of 4 x 6, blocks of 64 rows, tasks, steps of 32, splits of 256 slots.
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(
    "tokens, n, k", [(1, 1, 1), (5, 7, 31), (4, 6, 32), (63, 65, 33), (65, 13, 63), (130, 40, 8), (3, 2000, 5)]
)
def test_products_at_the_edges_of_tiles(isa: str, tokens: int, n: int, k: int) -> None:
    require_isa(isa)
    m = Maker(BF16)
    args = dict(x=m.randn(tokens, k), weight=m.randn(n, k, scale=k**-0.5))
    with use_backend("cpu", isa=isa):
        assert (verdict := Judge(ops.TABLE["linear"], args)(ops.linear)).ok, verdict.message
        many = moe_case(m, tokens, k, n % 40 + 1, 7, 3)
        assert (verdict := Judge(ops.TABLE["moe"], many)(ops.moe_decode)).ok, verdict.message
        assert (verdict := Judge(ops.TABLE["moe"], many)(ops.moe)).ok, verdict.message


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_the_edges_of_tiles(isa: str, dtype: torch.dtype) -> None:
    require_isa(isa)
    m = Maker(dtype)
    cases = [
        decode_case(m, [255, 256, 257, 600], 24, 1, 64, 640),  # more heads in a group than are served together
        decode_case(m, [700, 513], 4, 2, 128, 512, window=500),
        decode_case(m, [900, 257, 64], 8, 1, 64, 320, v_only=True),  # a ring's turn inside a tile, V only
    ]
    for args in cases:
        with use_backend("cpu", isa=isa):
            assert (verdict := Judge(ops.TABLE["gqa_decode"], args)(ops.gqa_decode)).ok, verdict.message
    for args in (
        prefill_case(m, [65, 64, 1], 6, 2, 32, window=63),
        prefill_case(m, [200], 64, 1, 32),  # a group as large as a block
        prefill_case(m, [70, 3], 8, 2, 64, None, [190, 65], 192, v_only=True),
        prefill_case(m, [70], 4, 4, 64, 100, [300], 128),
    ):
        with use_backend("cpu", isa=isa):
            assert (verdict := Judge(ops.TABLE["gqa_prefill"], args)(ops.gqa_prefill)).ok, verdict.message


def test_softcap_keeps_the_digits_of_small_logits() -> None:
    """Each logit is one product here, so its relative error is that of the softcap alone."""
    size = torch.logspace(-8, 3, 400)
    values = torch.cat((size, -size))
    truth = 30 * torch.tanh(values.double() / 30)
    for isa in native.isas():
        with use_backend("cpu", isa=isa):
            got = ops.logits(torch.ones(1, 1), values[:, None], 30.0)[0].double()
        roundings = 16  # of the exponential's few terms, and of what is made of it
        assert ((got - truth) / truth).abs().max() < roundings * 2**-24


def test_large_values_do_not_overflow() -> None:
    m = Maker(FP32)
    args: dict[str, Any] = moe_case(m, 3, 96, 32, 4, 2)
    args["x"] *= 1e4  # gelu of +-1e4: e^(2u) overflows where it is not cut
    args = {**args, "x": args["x"].clone()}
    hot: dict[str, Any] = prefill_case(m, [40], 2, 1, 64)
    hot["q"] *= 1e3  # scores of +-1e4
    for isa in native.isas():
        with use_backend("cpu", isa=isa):
            for name, given in (("moe", args), ("gqa_prefill", hot)):
                verdict = Judge(ops.TABLE[name], given)(getattr(ops, name))
                assert verdict.ok, verdict.message
            x = torch.tensor([[float("inf")], [-2000.0], [200.0]])
            capped = ops.logits(x, torch.ones(1, 1), 30.0)
        assert torch.allclose(capped.flatten(), torch.tensor([30.0, -30.0, 30.0 * math.tanh(200 / 30)]))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(isa: str, dtype: torch.dtype) -> None:
    require_isa(isa)
    m = Maker(dtype)
    x, w = m.randn(150, 200), m.randn(77, 200)
    experts = moe_case(m, 150, 96, 33, 8, 3)
    route = ops.TABLE["route_topk"].inputs("26b", dtype)
    with use_backend("cpu", isa=isa):
        whole = ops.linear(x, w)
        assert all(torch.equal(whole[i : i + n], ops.linear(x[i : i + n], w)) for i, n in [(0, 1), (7, 5), (149, 1), (60, 66)])
        whole, weights = ops.moe_decode(**experts), (experts.pop("gate_up"), experts.pop("down"))
        grouped = ops.moe(**experts, gate_up=weights[0], down=weights[1])  # sorted beforehand
        assert torch.equal(grouped, whole)
        for i in (0, 3, 149):
            assert torch.equal(whole[i : i + 1], ops.moe_decode(*(a[i : i + 1] for a in experts.values()), *weights))
        probs, ids = ops.route_topk(**route)
        one = ops.route_topk(**{**route, "x": route["x"][5:6]})
        assert torch.equal(one[0], probs[5:6]) and torch.equal(one[1], ids[5:6])


def rows_of(args: dict[str, Any], per_token: tuple[str, ...], rows: slice) -> list[Any]:
    return [v[rows] if k in per_token and v is not None else v for k, v in args.items()]


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(isa: str, bits: int, dtype: torch.dtype) -> None:
    """Every product and the ops around them: of 150 tokens some, by ones and by handfuls."""
    require_isa(isa)
    m = Maker(dtype)
    x = m.randn(150, 97)
    head = dict(x=x, weight=m.weight(bits, 501, 97, scale=0.1), softcap=30.0, argmax=False)
    calls: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
        (ops.linear, dict(x=x, weight=head["weight"]), ("x",)),
        (ops.geglu_mlp, mlp_case(m, 150, 97, 71, bits), ("x",)),
        (ops.logits, head, ("x",)),
        (ops.logits, {**head, "argmax": True}, ("x",)),
        (ops.moe_decode, moe_case(m, 150, 97, 33, 8, 3, bits=bits), ("x", "topk_weights", "ids")),
    ]
    if not bits:
        gate = dict(gate=m.randn(40, 97, scale=0.1), proj=m.randn(97, 40, scale=0.2), weight=m.gain(97), scale=m.gain(1))
        calls.append((ops.ple_gate, dict(x=x, ple=m.randn(150, 40), **gate, next_weight=m.gain(97)), ("x", "ple")))
    with use_backend("cpu", isa=isa):
        for op, args, per_token in calls:
            whole = op(*args.values())
            for rows in (slice(0, 1), slice(149, 150), slice(7, 12), slice(60, 126)):
                part = op(*rows_of(args, per_token, rows))
                for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (whole, part)), strict=True):
                    assert torch.equal(a[rows], b), f"{op.__name__} {rows}"


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("cache", ["kv", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(isa: str, cache: str, dtype: torch.dtype) -> None:
    """Attention: sequences from one key to several splits, with other neighbours each."""
    require_isa(isa)
    lens = [1, 700, 256, 1300]
    decode = decode_case(Maker(dtype), lens, 8, 2, 64, 1344, v_only=cache == "v")
    new = [5, 130, 1, 77]
    prefill = prefill_case(Maker(dtype), new, 8, 2, 64, None, [1200, 3, 0, 40], 1344, v_only=cache == "v")
    with use_backend("cpu", isa=isa):
        whole = ops.gqa_decode(**decode)
        for b in range(4):
            one = rows_of(decode, ("q", "k_cache", "v_cache", "kv_lens"), slice(b, b + 1))
            assert torch.equal(ops.gqa_decode(*one)[0], whole[b])
        whole = ops.gqa_prefill(**prefill)
        starts = prefill["cu_seqlens"].tolist()
        for b in range(4):
            rows = slice(starts[b], starts[b + 1])
            alone = {k: v[rows] if k in ("q", "k", "v") else v for k, v in prefill.items()}
            alone["cu_seqlens"] = torch.tensor([0, new[b]], dtype=torch.int32)
            one = rows_of(alone, ("k_cache", "v_cache", "prefix_lens"), slice(b, b + 1))
            assert torch.equal(ops.gqa_prefill(*one), whole[rows])


@pytest.mark.parametrize("isa", native.ISAS)
def test_generated_tokens_and_logits_do_not_depend_on_batch_or_threads(isa: str, threads: Any) -> None:
    require_isa(isa)
    model = gemma4_fast.Gemma4.from_pretrained("tiny", progress=False, check=False)
    prompts = [[5, 6, 7] * 20, [9, 8, 4, 3, 90, 7, 6, 5], [11] * 33]

    def results(rows: list[list[int]], n: int) -> list[Tensor]:
        threads(n)
        with use_backend("cpu", isa=isa):
            found = [torch.tensor(g.token_ids) for g in model.generate(rows, max_new_tokens=6, temperature=0)]
            same = [r[:8] for r in rows]  # `forward` takes rows of one length
            cache = model.new_cache(len(rows), 128)
            prefill = model(torch.tensor(same), cache)
            step = model(torch.tensor([[r[0]] for r in rows]), cache)
        return [torch.cat((t.float(), p.flatten(), s.flatten())) for t, p, s in zip(found, prefill, step, strict=True)]

    alone = [results([p], 1)[0] for p in prompts]
    for n in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, results(prompts, n), strict=True))


def test_the_instruction_set_is_an_argument() -> None:
    x, w = torch.randn(3, 1000), torch.randn(500, 1000)
    with (
        pytest.raises(ValueError, match="unknown instruction set 'sse'; the CPU kernels have plain, avx2"),
        use_backend("cpu", isa="sse"),
    ):
        pass
    with use_backend("cpu", isa="plain"):
        assert native.isa() == 0
        with use_backend("torch", ops=["linear"]):
            assert native.isa() == 0
        bound = ops.bound(ops.TABLE["linear"], "cpu")
        with table.default_backend("cpu"):
            assert native.isa() == 0
        plain = ops.linear(x, w)
    assert native.isa() == list(native.ISAS).index(native.isas()[0])
    assert torch.equal(bound(x, w), plain) and not torch.equal(plain, ops.linear(x, w))


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isas", lambda: ("avx2", "plain"))
    with pytest.raises(UnsupportedError, match="cannot run avx512; it has avx2, plain"), use_backend("cpu", isa="avx512"):
        pass


def test_without_the_kernels_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels_missing", lambda: "the CPU kernels were not built")
    table.backend_missing.cache_clear()
    for op in ops.TABLE.values():
        op._kept.clear()
    try:
        x = torch.randn(2, 8)
        assert ops.TABLE["linear"].first_serving(x.device, x.dtype) == "torch"
        ops.linear(x, x)
        with pytest.raises(UnsupportedError, match=r"linear.*were not built"), use_backend("cpu"):
            ops.linear(x, x)
        with pytest.raises(UnsupportedError, match="were not built"), use_backend("cpu", isa="avx2"):
            pass
    finally:
        table.backend_missing.cache_clear()
        for op in ops.TABLE.values():
            op._kept.clear()


def test_views_and_odd_addresses() -> None:
    m = Maker(BF16)
    wide, w = m.randn(6, 130), m.randn(9, 64)
    padded = m.randn(9 * 64 + 1)[1:].view(9, 64)  # two bytes off any alignment
    with use_backend("cpu"):
        for x in (wide[:, 1:65], wide[::2, :64], wide.T.contiguous().T[:, :64]):
            assert torch.equal(ops.linear(x, w), ops.linear(x.contiguous(), w))
        assert torch.equal(ops.linear(wide[:, :64], padded), ops.linear(wide[:, :64], padded.clone()))
        assert torch.equal(ops.linear(wide[:, :9], w.T), ops.linear(wide[:, :9], w.T.contiguous()))
        assert torch.equal(ops.rms_norm(wide[:, 3:70]), ops.rms_norm(wide[:, 3:70].contiguous()))


def test_views_of_indices() -> None:
    args = ops.TABLE["qkv_norm_rope"].inputs("sliding_one_token_cache", FP32)
    args = {k: v.repeat(3, *[1] * (v.dim() - 1)) if k in ("qkv", "cos", "sin") else v for k, v in args.items()}
    args["slots"] = torch.tensor([4, 0, 2, 0, 9, 0])[::2]
    caches = [{k: args[k].clone() for k in ("k_cache", "v_cache")} for _ in range(2)]
    with use_backend("cpu"):
        ops.qkv_norm_rope(**{**args, **caches[0]})
        ops.qkv_norm_rope(**{**args, **caches[1], "slots": args["slots"].contiguous()})
    assert all(torch.equal(caches[0][k], caches[1][k]) for k in caches[0])


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_output(isa: str, dtype: torch.dtype) -> None:
    """A kernel that turned NaN into a number would hide a fault upstream."""
    require_isa(isa)
    m, nan = Maker(dtype), float("nan")
    with use_backend("cpu", isa=isa):
        x, w = m.randn(2, 64), m.randn(70, 64)
        x[1, 3] = nan
        for out in (ops.logits(x, w, 30.0), ops.geglu_mlp(x, w, m.randn(64, 35))):
            assert out[1].isnan().all() and not out[0].isnan().any()
        route = ops.TABLE["route_topk"].inputs("odd", dtype)
        route["x"][2, 5] = nan
        weights, ids = ops.route_topk(**route)
        assert weights[2].isnan().all() and not weights[:2].isnan().any()
        assert ids[2].unique().numel() == ids.shape[1] and ids.min() >= 0 and ids.max() < 13
        route["x"][2, 5], route["proj"][4, 1] = 0, nan  # of one expert alone
        assert ops.route_topk(**route)[0].isnan().all()
        for slots, at in ((64, 10), (640, 300), (640, 639)):  # of one split, or of one that others are merged with
            for v_only in (False, True):
                decode: dict[str, Any] = decode_case(m, [slots], 4, 2, 32, slots, v_only=v_only)
                decode["v_cache" if v_only else "k_cache"][0, at, 1, 3] = nan
                out = ops.gqa_decode(**decode)
                assert out[0, 2:].isnan().all() and not out[0, :2].isnan().any()
                decode["k_cache" if not v_only else "v_cache"][0, :, 1] = nan  # all keys of a head
                assert ops.gqa_decode(**decode)[0, 2:].isnan().all()
        prefill: dict[str, Any] = prefill_case(m, [70], 2, 1, 32)
        prefill["q"][66, 1, 0] = nan
        assert ops.gqa_prefill(**prefill).isnan().flatten(1).any(1).nonzero().flatten().tolist() == [66]


def test_an_odd_number_of_keys_counts_the_last_value_once() -> None:
    args: dict[str, Any] = decode_case(Maker(BF16), [3], 2, 1, 32, 16)
    args["v_cache"][0, 2, 0, 5] = float("inf")  # times a padding weight of 0 it would be NaN
    for isa in native.isas():
        with use_backend("cpu", isa=isa):
            assert ops.gqa_decode(**args)[0, :, 5].tolist() == [float("inf")] * 2


@pytest.mark.parametrize("isa", native.ISAS)
def test_argmax_at_its_edges(isa: str) -> None:
    require_isa(isa)
    w = torch.zeros(700, 2)
    w[:, 0] = -1
    x = torch.tensor([[float("inf"), 1.0], [1.0, 0.0], [1.0, 1.0]])
    w[650, 1], w[690, 1] = float("nan"), float("nan")
    for rows in (w[:1], w[:600], w):
        with use_backend("cpu", isa=isa):
            got = ops.logits(x, rows, None, True).tolist()
        assert got == [-1, *torch.argmax(x[1:] @ rows.T, -1).tolist()]  # the first row is not finite


def test_router_orders_experts_that_are_all_but_impossible() -> None:
    proj = torch.tensor([[0.0], [-120.0], [-100.0], [-95.0], [-110.0]])
    for isa in native.isas():
        with use_backend("cpu", isa=isa):
            _, ids = ops.route_topk(torch.ones(1, 1), torch.ones(1), proj, torch.ones(5), 5)
        assert ids.tolist() == [[0, 3, 2, 4, 1]]


def test_a_block_table_may_hold_anything_beyond_a_sequences_blocks() -> None:
    m = Maker(BF16)
    decode: dict[str, Any] = decode_case(m, [20, 33], 2, 1, 32, 64, block=16)
    prefill: dict[str, Any] = prefill_case(m, [5, 4], 2, 1, 32, None, [16, 40], 64, block=16)
    for name, args, used in (("gqa_decode", decode, (2, 3)), ("gqa_prefill", prefill, (1, 3))):
        padded = args["block_table"].clone()
        for row, n in zip(padded, used, strict=True):
            row[n:] = -1
        for isa in native.isas():
            with use_backend("cpu", isa=isa):
                assert torch.equal(getattr(ops, name)(**{**args, "block_table": padded}), getattr(ops, name)(**args))
        padded[0, used[0] - 1] = -1
        with use_backend("cpu"), pytest.raises(ValueError, match="block_table must lie in"):
            getattr(ops, name)(**{**args, "block_table": padded})


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_frequencies_written_in_place_are_seen(backend: str) -> None:
    args: dict[str, Any] = decode_case(Maker(FP32), [40], 2, 1, 32, 64, v_only=True)
    with use_backend(backend):
        ops.gqa_decode(**args)
        args["inv_freq"] *= 0.5
        assert torch.equal(ops.gqa_decode(**args), ops.gqa_decode(**{**args, "inv_freq": args["inv_freq"].clone()}))


def test_kernels_do_not_lose_gradients() -> None:
    x, w = torch.randn(2, 8, requires_grad=True), torch.randn(3, 8)
    assert ops.linear(x, w).requires_grad  # PyTorch serves
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="computes no gradients"):
        ops.linear(x, w)
    with use_backend("cpu"), torch.no_grad():
        ops.linear(x, w)


def test_shapes_without_columns() -> None:
    with use_backend("cpu"):
        assert ops.geglu_mlp(torch.ones(3, 0), torch.ones(4, 0), torch.ones(0, 2)).shape == (3, 0)
        assert ops.linear(torch.ones(3, 0), torch.ones(4, 0)).tolist() == [[0.0] * 4] * 3
        assert ops.rms_norm(torch.ones(3, 0)).shape == (3, 0)
    none: dict[str, Any] = prefill_case(Maker(FP32), [3], 2, 1, 32)
    decode: dict[str, Any] = decode_case(Maker(FP32), [3], 2, 1, 32, 8, v_only=True)
    qkv = ops.TABLE["qkv_norm_rope"].inputs("shared_q_only", FP32)
    for name, args, message in (
        ("gqa_prefill", {**none, "q": none["q"][:, :0]}, "none may be 0"),
        ("gqa_prefill", {**none, "k": none["k"][:, :0], "v": none["v"][:, :0]}, "none may be 0"),
        ("gqa_decode", {**decode, "v_cache": decode["v_cache"][:, :, :0]}, "none may be 0"),
        ("gqa_decode", {**decode, "inv_freq": torch.ones(17)}, "17 rotary pairs, head_dim 32 has 16"),
        ("gqa_decode", {**decode, "kv_lens": torch.tensor([2**32 + 3])}, "lengths must lie in"),
        ("qkv_norm_rope", {**qkv, "qkv": torch.ones(3, 0), "q_weight": torch.ones(0)}, "q_weight is empty"),
    ):
        with use_backend("cpu"), pytest.raises(ValueError, match=message):
            getattr(ops, name)(**args)


def test_more_threads_than_cores_make_progress(threads: Any) -> None:
    args: dict[str, Any] = moe_case(Maker(BF16), 9, 256, 96, 8, 3)
    alone = ops.moe(**args)
    threads(8)
    assert torch.equal(ops.moe(**args), alone)


@pytest.mark.parametrize("name", sorted(n for n, op in ops.TABLE.items() if "cpu" in op.impls))
def test_no_tokens(name: str) -> None:
    op = ops.TABLE[name]
    if "no_tokens" in op.cases:
        empty = op.inputs("no_tokens", BF16)
    else:
        args = op.inputs(next(iter(op.cases)), BF16)
        tokens = args[next(iter(args))].shape[0]
        empty = {k: v[:0] if isinstance(v, Tensor) and v.shape[0] == tokens and v.dim() > 1 else v for k, v in args.items()}
    if name == "gqa_prefill":
        empty["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    elif name == "gqa_decode":
        empty["kv_lens"] = args["kv_lens"][:0]
    elif name == "grouped_gemm":
        empty |= {"order": args["order"][:0], "offsets": torch.zeros_like(args["offsets"])}
    elif name == "qkv_norm_rope":
        empty["slots"] = None if args["slots"] is None else args["slots"][:0]
    with use_backend("cpu"), nan_poison():
        got = op(*empty.values())
    for out, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, op.reference(*empty.values()))), strict=True):
        assert (out is None) == (want is None)
        assert out is None or (out.shape == want.shape and out.dtype == want.dtype and torch.equal(out, want))


def test_indices_that_would_leave_memory_are_refused() -> None:
    m = Maker(FP32)
    experts: dict[str, Any] = moe_case(m, 2, 16, 8, 4, 2)
    decode: dict[str, Any] = decode_case(m, [20, 30], 2, 1, 32, 64, block=16)
    long: dict[str, Any] = decode_case(m, [20], 2, 1, 32, 64)
    prefill: dict[str, Any] = prefill_case(m, [5, 4], 2, 1, 32)
    cached = ops.TABLE["qkv_norm_rope"].inputs("full_v_only_cache", FP32)
    order, offsets, _ = ops.expert_dispatch(experts["ids"], 4)
    grouped = dict(x=experts["x"], weight=experts["gate_up"], order=order, offsets=offsets, top_k=2, epilogue="geglu")
    bad = [
        ("grouped_gemm", {**grouped, "order": order + 1}, "order must lie in"),
        ("grouped_gemm", {**grouped, "offsets": offsets.flip(0)}, "offsets must"),
        ("grouped_gemm", {**grouped, "offsets": offsets + 1}, "offsets must go from 0"),
        ("gqa_decode", {**decode, "block_table": decode["block_table"] + 9}, "block_table must lie in"),
        ("gqa_decode", {**long, "kv_lens": torch.tensor([-1], dtype=torch.int32)}, "lengths must lie in"),
        ("gqa_prefill", {**prefill, "cu_seqlens": prefill["cu_seqlens"] + 1}, "cu_seqlens must go from 0"),
        ("gqa_prefill", {**prefill, "cu_seqlens": prefill["cu_seqlens"].flip(0)}, "cu_seqlens must"),
        ("qkv_norm_rope", {**cached, "slots": cached["slots"] + 10**6}, "slots must lie in"),
    ]
    for name, args, message in bad:
        with use_backend("cpu"), pytest.raises(ValueError, match=message):
            getattr(ops, name)(**args)


def test_shapes_that_the_kernels_do_not_take() -> None:
    m = Maker(FP32)
    for args, why in (
        (decode_case(m, [3], 2, 1, 1024, 64), "head dims up to 512"),
        (decode_case(m, [3], 2, 1, 33, 64), "even head dims"),
    ):
        with use_backend("cpu"), pytest.raises(UnsupportedError, match=why):
            ops.gqa_decode(**args)
        ops.gqa_decode(**args)  # PyTorch serves
    many = prefill_case(m, [3], 65, 1, 32)
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="up to 64 query heads per KV head, got 65"):
        ops.gqa_prefill(**many)
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="does not take float16"):
        ops.linear(torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 2, dtype=torch.float16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_runs_the_kernels_and_sees_a_wrong_one(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma4_fast.Gemma4.from_pretrained("tiny", dtype, progress=False, check="full")  # raises if it is wrong
    right = ops.TABLE["linear"].impls["cpu"].function
    monkeypatch.setitem(ops.TABLE["linear"].impls["cpu"].__dict__, "function", lambda x, w: right(x, w).roll(1, -1))
    report = gemma4_fast.verify(model)
    assert not report.ok and report.first_wrong is not None and "[cpu]" in report.first_wrong.op


def test_only_a_callers_mistake_is_a_value_error() -> None:
    x = torch.ones(1, 8)
    with use_backend("cpu"), pytest.raises(ValueError) as caught:
        ops.embedding(torch.ones(4, 8), torch.tensor([4]))
    assert str(caught.value) == "embedding: ids must lie in [0, 4), got 4"
    with pytest.raises(RuntimeError, match="no such instruction set: 99"):
        cpu_backend.kernels.rms_norm(x, None, torch.empty_like(x), 1e-6, 99)


@pytest.mark.parametrize("isa", native.ISAS)
def test_angles_are_right_to_the_last_bit(isa: str) -> None:
    """Of positions up to a million; from plain PyTorch's fp32 products they would be off by a hundredth."""
    require_isa(isa)
    positions = torch.cat((torch.arange(3000), torch.arange(262000, 262200), torch.tensor([10**6, 2**20 - 1, -5])))
    freq = 1e4 ** -(torch.arange(0, 256, 2) / 256)
    with use_backend("cpu", isa=isa):
        got = ops.rope_angles(positions, freq)
    angle = positions.double()[:, None] * freq.double()
    for x, truth in zip(got, (angle.cos(), angle.sin()), strict=True):
        assert ((x.double() - truth).abs() <= 2.0**-24 * truth.abs() + 1e-10).all()
