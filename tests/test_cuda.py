"""The CUDA kernels: on a GPU if there is one, else compiled for the host and emulated: see emulated.py, emulator/emulator.h."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import pytest
import test_graph
import torch
from family import MEMBERS
from torch import Tensor

from gemma4_fast import Gemma4, Gemma4Config, UnsupportedError, graph, ops, verify
from gemma4_fast.ops import cuda_attention, cuda_backend, table
from gemma4_fast.ops.accuracy import Judge, converted, nan_poison, outputs
from gemma4_fast.ops.attention import decode_case
from gemma4_fast.ops.embedding import angles_case, embedding_case
from gemma4_fast.ops.linear import linear_case, mlp_case
from gemma4_fast.ops.moe import moe_case, route_case
from gemma4_fast.ops.norms import qkv_case
from gemma4_fast.ops.table import Maker
from gemma4_fast.quant import QuantizedWeight
from gemma4_fast.reference import ops as reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and (reason := emulated.why_not()):
    pytest.skip(reason, allow_module_level=True)
if GPU and (reason := table.backend_missing("cuda", "cuda")) and reason.startswith("needs "):  # and not: could not be built
    pytest.skip(f"the cuda backend {reason}", allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def emulation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without a GPU: the table takes the emulated kernels for the ones of a GPU."""
    if GPU:
        yield
        return
    emulated.use()
    seen = (test_a_mistake_is_seen, test_a_mistake_is_seen_by)
    chosen = [i.callspec.params for i in request.session.items if isinstance(i, pytest.Function) and i.function in seen]
    mistakes = [(p["name"], p["file"], p["before"], p["after"], p["source"]) for p in chosen if not emulated.SANITIZED]
    with emulated.on_cpu(), emulated.built_beside(mistakes):
        yield


# Cases that take the emulator seconds. Their float16 runs are left to `make test-full`: bfloat16
# runs the same source, and the quick cases run in both dtypes.
SLOW = {
    "linear": ["26b_qkv_one_token"],
    "geglu_mlp": ["26b_dense_one_token", "e2b", "int4_one_token"],
    "moe_decode": ["26b_one_token", "26b", "int8_one_token"],
    "moe_feed_forward": ["26b_one_token"],
}


def rows() -> Iterator[Any]:
    for op in (op for op in ops.TABLE.values() if "cuda" in op.impls):
        for case, dtype in itertools.product(op.cases, op.impls["cuda"].dtypes):
            slow = not GPU and dtype == torch.float16 and case in SLOW.get(op.name, [])
            marks = [pytest.mark.full] if slow else []
            yield pytest.param(op, case, dtype, marks=marks, id=f"{op.name}-{case}-{str(dtype)[6:]}")


ROWS = list(rows())


def on_cuda(op: ops.Op) -> Any:
    return ops.bound(op, "cuda")


def why_not(op: ops.Op, args: dict[str, Any]) -> str | None:
    accepts = op.impls["cuda"].accepts
    return None if accepts is None else accepts(*args.values())


def test_every_op_has_cases_that_it_takes() -> None:
    for op in (op for op in ops.TABLE.values() if "cuda" in op.impls):
        taken = [case for case in op.cases if why_not(op, op.inputs(case, torch.bfloat16)) is None]
        assert 3 * len(taken) >= 2 * len(op.cases), op.name


@pytest.mark.parametrize("op, case, dtype", ROWS)
def test_matches_reference(op: ops.Op, case: str, dtype: torch.dtype) -> None:
    """And gives the same bits in whatever order threads and blocks run. What a kernel does not take is said."""
    args = op.inputs(case, dtype, DEVICE)
    reason = why_not(op, args)
    if reason and op.compose is None:
        with pytest.raises(UnsupportedError, match=re.escape(reason)):
            on_cuda(op)(*args.values())
        return
    if reason:  # its parts serve it, and are judged, or one of them says why it cannot
        try:
            on_cuda(op)(*args.values())
        except UnsupportedError as error:
            assert "takes up to" in str(error)
            return
    first = outputs(op, on_cuda(op), args)
    if not GPU:
        emulated.use(seed=1)
    with nan_poison():
        again = outputs(op, on_cuda(op), args)
    verdict = Judge(op, args).of(again)
    assert verdict.ok, verdict.message
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


QUANTIZED = [p for p in ROWS if p.values[1].startswith(("int8", "int4")) and p.values[2] == torch.float16]


@pytest.mark.parametrize("op, case, dtype", QUANTIZED)
def test_quantized_weights_are_what_they_stand_for(op: ops.Op, case: str, dtype: torch.dtype) -> None:
    """These kernels round no activations, as the table's judge allows: here they are held to the dequantized product."""
    args = op.inputs(case, dtype, DEVICE)
    if why_not(op, args):
        return
    dense = {k: v.dequantize() if isinstance(v, QuantizedWeight) else v for k, v in args.items()}
    exact = {k: v.dequantize(torch.float64) if isinstance(v, QuantizedWeight) else v for k, v in args.items()}
    judge = Judge(op, dense)
    judge.truth = outputs(op, op.reference, converted(exact, torch.float64))
    verdict = judge.of(outputs(op, on_cuda(op), args))
    assert verdict.ok, verdict.message


# ---- few rows ----


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("name", ["linear", "geglu_mlp", "logits", "moe_decode"])
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(name: str, bits: int) -> None:
    """For any number of rows that there is a kernel for."""
    m = Maker(torch.bfloat16, DEVICE)
    vocab = 131100 if GPU or bits == 0 else 3100  # the emulator takes seconds for the large one
    args = {
        "linear": lambda: linear_case(m, 16, 96, out=70, bits=bits),
        "geglu_mlp": lambda: mlp_case(m, 16, 96, 40, bits=bits),
        "logits": lambda: dict(x=m.randn(16, 96), weight=m.weight(bits, vocab, 96, scale=0.1), softcap=30.0),
        "moe_decode": lambda: moe_case(m, 16, 96, 40, 12, 5, bits=bits),
    }[name]()
    split = [k for k in args if k in ("x", "topk_weights", "ids")]
    together = on_cuda(ops.TABLE[name])(*args.values())
    for rows in (slice(0, 1), slice(3, 8), slice(5, 14), slice(15, 16)):
        some = on_cuda(ops.TABLE[name])(*{**args, **{k: args[k][rows] for k in split}}.values())
        assert torch.equal(some, together[rows])


@pytest.mark.parametrize("bits", [0, 4])
def test_experts_that_are_not_there_add_nothing_and_one_may_come_twice(bits: int) -> None:
    args = moe_case(Maker(torch.float16, DEVICE), 16, 64, 32, 8, 3, bits=bits)
    args["ids"][:, 1] = torch.tensor([-1, 8, 1 << 30, -(1 << 31)] * 4)
    args["ids"][:, 2] = args["ids"][0, 0]  # more than a product's columns for one expert
    args["ids"][::2, 0] = args["ids"][0, 0]
    known = (args["ids"] >= 0) & (args["ids"] < 8)
    same = {**args, "ids": args["ids"].where(known, 0), "topk_weights": args["topk_weights"] * known}
    verdict = Judge(ops.TABLE["moe_decode"], same).of([on_cuda(ops.TABLE["moe_decode"])(*args.values())])
    assert verdict.ok, verdict.message


def test_the_largest_logit_of_many_blocks() -> None:
    """The first of equal ones, wherever they lie; -1 for a row that is not finite."""
    weight = torch.zeros(5000, 40, dtype=torch.bfloat16, device=DEVICE)
    weight[[700, 4096, 4999], :] = 1
    weight[4097, :8] = 3
    x = torch.ones(4, 40, dtype=torch.bfloat16, device=DEVICE)
    x[1, 8:] = 0
    x[2, 39] = float("nan")
    x[3] = -1
    assert ops.bound(ops.TABLE["logits"], "cuda")(x, weight, None, True).tolist() == [700, 4097, -1, 0]


# ---- draws ----

SAMPLE = ops.TABLE["sample"]
DRAWS = {
    "of all": dict(top_k=0, top_p=1.0, min_p=0.0),
    "top_k": dict(top_k=64, top_p=1.0, min_p=0.0),
    "top_p": dict(top_k=60, top_p=0.8, min_p=0.0),
    "min_p": dict(top_k=33, top_p=1.0, min_p=0.2),
}


@pytest.mark.parametrize("filters", DRAWS)
@pytest.mark.parametrize("bits, vocab", [(0, 3001), (8, 777), (4, 20)])
def test_draws_fall_where_they_should(bits: int, vocab: int, filters: str) -> None:
    """Into the share of [0, 1) that a token's exact probability has, to what fp32 can tell: at its ends too."""
    m, settings = Maker(torch.float16, DEVICE), dict(temperature=0.7, **DRAWS[filters])
    if settings["top_k"] >= vocab:
        settings["top_k"] = vocab // 2
    weight, x = m.weight(bits, vocab, 64, scale=0.2), m.randn(1, 64)
    exact = weight.double() if isinstance(weight, Tensor) else weight.dequantize(torch.float64)
    p, ids = reference.restricted(reference.logits(x.double(), exact, 9.0), **settings)
    ends = torch.zeros(2, vocab, dtype=torch.float64, device=DEVICE)  # of each id, where its share begins and ends
    ends[1, ids[0]] = p[0].cumsum(-1) / p.sum()
    ends[0, ids[0]] = (p[0].cumsum(-1) - p[0]) / p.sum()
    at_the_end = 1 - 2.0**-24 * torch.arange(1, 5)
    for some in torch.cat((torch.tensor([0.0, 2**-24]), at_the_end, torch.arange(1, 27) / 27)).to(DEVICE).split(16):
        got = on_cuda(SAMPLE)(x.expand(len(some), -1).contiguous(), weight, some, 9.0, *settings.values())
        assert int(got.min()) >= 0 and int(got.max()) < vocab
        low, high = ends[:, got]
        assert (low - 2e-6 <= some).all() and (some <= high + 2e-6).all()


@pytest.mark.parametrize("filters", DRAWS)
def test_a_row_draws_the_same_alone_and_in_a_batch(filters: str) -> None:
    """Of more blocks than threads, too, once with a top_k and once without."""
    m = Maker(torch.bfloat16, DEVICE)
    many = GPU or filters in ("of all", "top_p")  # the emulator takes seconds for many blocks
    vocab = 140_001 if many else 9_001
    x, weight, uniform = m.randn(9, 32), m.randn(vocab, 32, scale=0.4), torch.arange(9, device=DEVICE) / 9
    settings = 30.0, 1.0, *DRAWS[filters].values()
    together = on_cuda(SAMPLE)(x, weight, uniform, *settings)
    for row in (0, 4, 8):
        one = slice(row, row + 1)
        assert torch.equal(on_cuda(SAMPLE)(x[one], weight, uniform[one], *settings), together[one])


def test_the_last_of_many_blocks_has_the_end() -> None:
    """Where rounding leaves more of the draw than there is: its last token, not its first."""
    uniform = torch.tensor([1 - 2.0**-53], dtype=torch.float64, device=DEVICE)  # in fp32 it is 1
    for vocab in (3, 300, 640, 1000, 12000):
        x, weight = (torch.zeros(n, 16, dtype=torch.bfloat16, device=DEVICE) for n in (1, vocab))
        assert on_cuda(SAMPLE)(x, weight, uniform).tolist() == [vocab - 1]


def test_of_equal_logits_the_lower_ids_stay() -> None:
    weight = torch.zeros(1000, 16, dtype=torch.bfloat16, device=DEVICE)
    weight[[17, 300, 301, 640, 999]] = 2.0
    weight[[5, 500]] = 3.0
    x, uniform = torch.ones(8, 16, dtype=torch.bfloat16, device=DEVICE), torch.arange(8, device=DEVICE) / 8
    hot = 1e9  # all that stay are as likely
    ids = on_cuda(SAMPLE)(x, weight, uniform, None, hot, 4, 1.0, 0.0).tolist()
    assert ids == [5, 5, 500, 500, 17, 17, 300, 300]
    ids = on_cuda(SAMPLE)(x, weight, uniform, None, hot, 8, 1.0, 0.0).tolist()
    assert ids == [5, 500, 17, 300, 301, 640, 999, 0]


@pytest.mark.parametrize("top_k", [0, 5])
def test_rows_that_are_not_finite_draw_nothing(top_k: int) -> None:
    m = Maker(torch.bfloat16, DEVICE)
    x, weight = m.randn(6, 64), m.randn(500, 64)
    x[1, 5], x[3, 60], x[4] = float("nan"), float("inf"), -float("inf")
    ids = on_cuda(SAMPLE)(x, weight, x.new_full((6,), 0.5).float(), 30.0, 1.0, top_k, 1.0, 0.0)
    assert ((ids < 0) == torch.tensor([False, True, False, True, True, False], device=DEVICE)).all()
    weight[499, 3] = float("nan")
    assert on_cuda(SAMPLE)(x, weight, x.new_full((6,), 0.5).float(), 30.0, 1.0, top_k, 1.0, 0.0).tolist() == [-1] * 6


def test_draws_that_one_kernel_cannot_make_are_made_of_logits() -> None:
    m = Maker(torch.bfloat16, DEVICE)
    x, weight, uniform = m.randn(2, 64), m.randn(500, 64), torch.tensor([0.3, 0.6], device=DEVICE)
    for settings, why in (((70, 1.0, 0.0), "up to 64"), ((0, 0.9, 0.0), "with a top_k"), ((0, 1.0, 0.1), "with a top_k")):
        assert why in str(cuda_backend.accepts_sample(x, weight, uniform, None, 1.0, *settings))
        assert not ops.in_one("sample", x, weight, uniform, None, 1.0, *settings)
        assert (on_cuda(SAMPLE)(x, weight, uniform, None, 1.0, *settings) >= 0).all()


# ---- what the table's cases have not ----


def judged(op_name: str, args: dict[str, Any]) -> None:
    op = ops.TABLE[op_name]
    verdict = Judge(op, args)(on_cuda(op))
    assert verdict.ok, verdict.message


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, at an address that is no multiple of 16 bytes."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_an_id_outside_the_table_gives_nan(bits: int) -> None:
    m = Maker(torch.bfloat16, DEVICE)
    weight, ids = m.weight(bits, 31, 104, scale=1.0), m.ints([3, -1, 30, 31, 2**40, -(2**62)], torch.int64)
    out = on_cuda(ops.TABLE["embedding"])(weight, ids, 2.0)
    inside = torch.tensor([True, False, True, False, False, False], device=DEVICE)
    assert out[~inside].isnan().all() and out[inside].isfinite().all()


def test_angles_far_out() -> None:
    """In fp32 the angle itself would be wrong by a hundredth at 2^18."""
    positions = torch.tensor([0, 1, 7, 8191, 2**18 - 1, 2**18, 2**22 + 5, -3], device=DEVICE)
    inv_freq = 1e4 ** (-torch.arange(0, 70, device=DEVICE, dtype=torch.float32) / 70)
    cos, sin = on_cuda(ops.TABLE["rope_angles"])(positions, inv_freq)
    angles = positions.double()[:, None] * inv_freq.double()
    assert (cos - angles.cos()).abs().max() < 2e-7 and (sin - angles.sin()).abs().max() < 2e-7


@pytest.mark.parametrize("dim, pairs, parts", [(1, 0, 2), (7, 3, 1), (255, 100, 2), (511, 255, 1)])
@pytest.mark.parametrize("cache", ["", "kv", "v"])
def test_odd_heads(dim: int, pairs: int, parts: int, cache: str) -> None:
    judged("qkv_norm_rope", qkv_case(Maker(torch.float16, DEVICE), 3, 3, 2, dim, pairs, parts, cache))


def test_slots_outside_of_the_cache_are_not_written() -> None:
    args = qkv_case(Maker(torch.bfloat16, DEVICE), 6, 4, 2, 256, 128, 2, "kv")
    rows = args["v_cache"].shape[1]
    args["slots"] = torch.tensor([4, -1, rows, rows - 1, 2**40, 0], device=DEVICE)
    op, inside = ops.TABLE["qkv_norm_rope"], torch.tensor([0, 3, 5], device=DEVICE)
    got = outputs(op, on_cuda(op), args)
    for name in ("qkv", "cos", "sin", "slots"):
        args[name] = args[name][inside]
    fewer = outputs(op, on_cuda(op), args)
    assert torch.equal(got[0][inside], fewer[0]) and got[0].isfinite().all()
    assert torch.equal(got[1], fewer[1]) and torch.equal(got[2], fewer[2])


def test_addresses_need_no_alignment() -> None:
    m = Maker(torch.float16, DEVICE)
    cases = {
        "embedding": embedding_case(m, 3, 9, 64, 2.0),
        "qkv_norm_rope": qkv_case(m, 3, 4, 2, 64, 32, 2, "kv"),
        "route_topk": route_case(m, 3, 128, 16, 4),
        "rope_angles": angles_case(m, 3, 32, 64, 1e4),
    }
    for name, args in cases.items():
        judged(name, {k: shifted(v) if isinstance(v, Tensor) else v for k, v in args.items()})


def route(args: dict[str, Any]) -> list[Tensor]:
    op = ops.TABLE["route_topk"]
    return outputs(op, on_cuda(op), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, hidden, experts, top_k", [(16, 2816, 128, 8), (17, 96, 1024, 32), (64, 1040, 129, 1), (2, 8, 1, 1)]
)
def test_router_shapes(tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    """And a token's are the same bits alone."""
    args = route_case(Maker(dtype, DEVICE), tokens, hidden, experts, top_k)
    judged("route_topk", args)
    weights, ids = route(args)
    for token in {0, tokens // 2, tokens - 1}:
        one = route({**args, "x": args["x"][token : token + 1]})
        assert torch.equal(one[0][0], weights[token]) and torch.equal(one[1][0], ids[token])


@pytest.mark.parametrize("bits", [0x7FC0, -0x40, 0x7F80, -0x80], ids=["nan", "negative nan", "inf", "-inf"])
def test_experts_exist_whatever_x_holds(bits: int) -> None:
    bad = torch.tensor(bits, dtype=torch.int16, device=DEVICE).view(torch.bfloat16)
    args = route_case(Maker(torch.bfloat16, DEVICE), 4, 200, 40, 8)
    args["x"][1, 50] = bad
    args["x"][2] = bad
    args["x"][3] = 0
    weights, ids = route(args)
    assert ids.min() >= 0 and ids.max() < 40
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert weights[0].isfinite().all() and weights[1:3].isnan().all()
    assert ids[3].tolist() == list(range(8))  # all equal
    args["proj"][7, 3] = bad
    weights, ids = route(args)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    if bad.isnan():  # of one expert, it is all experts' weights' by the softmax
        assert weights.isnan().all()


def test_router_takes_the_values_of_its_dtype() -> None:
    """In fp16 x * scale may be more than 65504, or as small as 1e-13; in bf16 x may be 1e18."""
    for dtype, size in ((torch.float16, 1e4), (torch.float16, 1e-4), (torch.bfloat16, 1e18), (torch.bfloat16, 1e-3)):
        args = route_case(Maker(dtype, DEVICE), 3, 200, 40, 8)
        args["x"] *= size / 4
        args["scale"] *= 100
        args["proj"] /= 100
        judged("route_topk", args)


def test_router_serves_few_tokens() -> None:
    args = route_case(Maker(torch.bfloat16, DEVICE), 65, 32, 4, 2)
    with pytest.raises(UnsupportedError, match="64"):
        route(args)


# ---- gqa_decode: one sequence's bits, however the work is cut ----

DECODE = ops.TABLE["gqa_decode"]


def decode_args(lens: list[int], dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> dict[str, Any]:
    """As a case of the table: query heads, KV heads, dim, slots, and window, v_only, block."""
    return decode_case(Maker(dtype, torch.device(DEVICE)), lens, **sizes)


def decode(args: dict[str, Any], cores: int | None = None, one_launch: bool = True) -> torch.Tensor:
    machine = cuda_attention.machine(args["q"].device)
    with nan_poison():
        return cuda_attention.decode_on(machine if cores is None else replace(machine, cores=cores), one_launch, **args)


# Nine nodes and more, so that sums of nodes have several; windows that begin anywhere; sequences of all lengths.
CUT = {
    "long": dict(lens=[5300, 4609], q_heads=2, kv_heads=1, dim=64, slots=5312),
    "long_v_only": dict(lens=[5300, 700], q_heads=2, kv_heads=1, dim=64, slots=5312, v_only=True),
    "window": dict(lens=[5000, 37, 0, 1100, 1, 1024], q_heads=4, kv_heads=2, dim=128, slots=1024, window=1000),
    "window_256": dict(lens=[900, 100], q_heads=4, kv_heads=2, dim=256, slots=320, window=300),
    "v_only_512": dict(lens=[600, 0, 161], q_heads=8, kv_heads=1, dim=512, slots=640, v_only=True),
    "paged": dict(lens=[1500, 640, 3], q_heads=3, kv_heads=1, dim=96, slots=1536, block=16),
}


@pytest.mark.parametrize("name", CUT)
def test_decode_has_the_same_bits_however_it_is_cut(name: str) -> None:
    args = decode_args(**CUT[name])
    first = decode(args)
    verdict = Judge(DECODE, args).of([first])
    assert verdict.ok, verdict.message
    for cores, one_launch in itertools.product((1, 2, 3, 5, 11, 40), (True, False)):
        assert torch.equal(decode(args, cores, one_launch), first), (cores, one_launch)
    of_one = ["q", "kv_lens", *(["k_cache", "v_cache"] if args["block_table"] is None else ["block_table"])]
    for b in range(len(args["kv_lens"])):
        alone = {**args, **{k: args[k][b : b + 1] for k in of_one if args[k] is not None}}
        assert torch.equal(decode(alone), first[b : b + 1]), b
    assert all(not c.any() for c in cuda_backend._COUNTERS.values())


@pytest.mark.parametrize("v_only", [False, True])
def test_decode_merges_in_one_order(v_only: bool) -> None:
    """Leaves that cancel each other leave of the output little but what rounding left: another order would show in it."""
    args = decode_args([2560, 64, 1024], q_heads=8, kv_heads=2, dim=128, slots=2560, v_only=v_only, block=32)
    args["scale"] = 1e-7  # the same weight for all, nearly
    for blocks in args["block_table"].long():
        some, others = blocks.view(-1, 2, 4).unbind(1)  # of four tiles
        args["v_cache"][others] = -args["v_cache"][some]
    first = decode(args)
    for cores in (1, 3, 5, 7, 9, 17, 20, 25, 35, 45, 60, 132):  # whole nodes, parts of them in leaves and in tiles
        assert torch.equal(decode(args, cores), first), cores


@pytest.mark.parametrize("v_only", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_decode_of_blocks_is_that_of_the_cache(block: int, v_only: bool) -> None:
    args = decode_args([300, 64, 1], q_heads=4, kv_heads=2, dim=64, slots=192, v_only=v_only, block=block)
    whole = dict(args, block_table=None)
    for name in ("k_cache", "v_cache"):
        if args[name] is not None:
            whole[name] = args[name][args["block_table"].long()].flatten(1, 2)
    assert torch.equal(decode(args), decode(whole))


@pytest.mark.parametrize("v_only", [False, True])
def test_decode_reads_no_slot_that_is_not_seen(v_only: bool) -> None:
    args = decode_args([70, 5, 0, 33], q_heads=2, kv_heads=1, dim=64, slots=96, window=40, v_only=v_only)
    first = decode(args)
    for b, length in enumerate(args["kv_lens"].tolist()):
        unseen = [s for s in range(96) if not max(0, length - 40) <= s < length]
        for name in ("k_cache", "v_cache"):
            if args[name] is not None:
                args[name][b, unseen] = float("nan")
    assert torch.equal(decode(args), first)


def test_decode_takes_views_and_any_lengths() -> None:
    args = decode_args([90, 40], q_heads=4, kv_heads=2, dim=64, slots=128)
    both = torch.stack((args["k_cache"], args["v_cache"]), 3)  # [B, S, Hkv, 2, D]
    views = dict(args, k_cache=both[:, :96, :, 0], v_cache=both[:, :96, :, 1], kv_lens=args["kv_lens"].long())
    assert torch.equal(decode(views), decode(args))
    odd = torch.zeros(2, 128, 2, 65, dtype=args["q"].dtype, device=DEVICE)[..., 1:].copy_(args["v_cache"])
    assert torch.equal(decode(dict(args, v_cache=odd)), decode(args))


@pytest.mark.parametrize("v_only", [False, True])
@pytest.mark.parametrize("heads, kv_heads, dim", [(12, 1, 64), (20, 2, 48), (7, 1, 272), (1, 1, 16), (16, 1, 512)])
def test_decode_shapes(heads: int, kv_heads: int, dim: int, v_only: bool) -> None:
    args = decode_args([70, 9], q_heads=heads, kv_heads=kv_heads, dim=dim, slots=80, v_only=v_only)
    judge = Judge(DECODE, dict(args, scale=0.7))
    verdict = judge(on_cuda(DECODE))
    assert verdict.ok, verdict.message


def test_decode_far_out() -> None:
    """Angles of position 262144, in windows that few slots hold."""
    args = decode_args([262144, 131071], q_heads=2, kv_heads=1, dim=256, slots=64, v_only=True)
    verdict = Judge(DECODE, args)(on_cuda(DECODE))
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("cores, shared", [(108, 167936), (188, 102400)])
def test_decode_with_less_shared_memory(cores: int, shared: int) -> None:
    on = cuda_attention.Machine(cores, shared, shared - 1024)
    for sizes in CUT["window_256"], CUT["v_only_512"]:
        args = decode_args(**sizes)
        assert torch.equal(cuda_attention.decode_on(on, True, **args), decode(args))


def test_decode_refuses() -> None:
    args = decode_args([9], q_heads=2, kv_heads=1, dim=64, slots=16, v_only=True)
    with pytest.raises(UnsupportedError, match="multiples of 16"):
        on_cuda(DECODE)(*decode_args([9], q_heads=2, kv_heads=1, dim=24, slots=16).values())
    with pytest.raises(UnsupportedError, match="float32"):
        on_cuda(DECODE)(*dict(args, inv_freq=args["inv_freq"].double()).values())


def test_what_is_not_a_number_stays_where_it_is() -> None:
    """A head's NaN is that head's, and a tile's is not lost, however the work is cut."""
    args = decode_case(Maker(torch.bfloat16, DEVICE), [700], 8, 1, 64, 768)
    names = "q", "k_cache", "v_cache", "kv_lens", "window", "block_table", "inv_freq", "k_weight", "scale"
    for cores in (1, 5, 132):
        m = replace(cuda_attention.machine(args["q"].device), cores=cores)
        whole = cuda_attention.decode_on(m, False, *(args[n] for n in names))
        q, k = args["q"].clone(), args["k_cache"].clone()
        q[0, 2], k[0, 640:672] = float("nan"), float("nan")
        one = cuda_attention.decode_on(m, False, *({**args, "q": q}[n] for n in names))
        assert one[0, 2].isnan().all() and torch.equal(one[0, [0, 1, 3, 4, 5, 6, 7]], whole[0, [0, 1, 3, 4, 5, 6, 7]])
        assert cuda_attention.decode_on(m, False, *({**args, "k_cache": k}[n] for n in names)).isnan().all()


# ---- a whole model ----


@pytest.mark.skipif(GPU, reason="counts the emulator's launches")
def test_the_launches_of_a_layer_s_decode_step() -> None:
    """Of the 26B's kind: qkv; norms, RoPE and cache; attention; o_proj; norms; the feed-forward's three; norms. A bench on a
    GPU counts those that there are."""

    def launches(layers: int) -> int:
        types = ["sliding_attention"] * (layers - 1) + ["full_attention"]
        config = {**MEMBERS["26b-a4b"], "num_hidden_layers": layers, "layer_types": types}
        config = Gemma4Config.from_dict({"model_type": "gemma4_text", **config})
        model = Gemma4.dummy(config, dtype=torch.bfloat16, device="cpu", backend="cuda,torch")
        cache = model.new_cache(1, 64)
        with model.running():
            model.model(torch.tensor([5, 6]), model.model.step([2], cache), cache)
            before = torch.ops.gemma4_fast_cuda.launches()
            model.model(torch.tensor([7]), model.model.step([1], cache, decode=True), cache)
        return torch.ops.gemma4_fast_cuda.launches() - before

    assert launches(3) - launches(2) == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_model_passes_its_self_check(dtype: torch.dtype) -> None:
    backend = f"cuda,{'triton' if GPU else 'torch'}"  # which serves what this one has no kernel for: prefill
    report = verify(Gemma4.from_pretrained("tiny", dtype, DEVICE, backend, check=False))
    assert report.ok, str(report)


@pytest.mark.skipif(GPU, reason="a stand-in for a captured step")
@pytest.mark.parametrize("filters", ["of all", "top_p"])
def test_a_captured_step_draws_the_next_tokens(filters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of steps that hand out hidden states, from which the same op draws."""
    model, options = Gemma4.from_pretrained("tiny", check=False, backend="cuda,torch"), dict(temperature=1.0, **DRAWS[filters])
    prompts = [[5, 6, 7], [8, 9]]

    def tokens() -> list[list[int]]:
        model.spares.clear()
        return [g.token_ids for g in model.generate(prompts, max_new_tokens=9, stop_token_ids=(), seed=3, **options)]

    made = test_graph.Captured.made = []
    monkeypatch.setattr(graph.DecodeGraph, "on_gpu", True)
    monkeypatch.setattr(ops, "recordable", lambda *_: True)
    monkeypatch.setattr(graph, "_Captured", test_graph.Captured)
    drawn = tokens()
    assert [c.inputs.uniform is not None for c in made] == [True] and made[0].replays == 7
    monkeypatch.setattr(graph.DecodeGraph, "can_choose", lambda *_: False)
    assert tokens() == drawn and made[1].inputs.uniform is None
    assert len({tuple(row) for row in drawn}) == 2


# ---- the emulator finds what it should ----

# A mistake one could make: its name; the file of csrc/cuda, the text there and what it becomes; the source that is built anew;
# and the op and case that see it.
MUTANTS: list[tuple[str, str, str, str, str, str, str]] = [
    (
        "no_weight",
        "norms.cu",
        "  wait_for_inputs();\n  float x[8], w[8];\n  to_floats<T>(x, load_eight<T, kWhole>(",
        "  float x[8], w[8];\n  to_floats<T>(x, load_eight<T, kWhole, true>(",
        "norms.cu",
        "rms_norm",
        "26b",
    ),
    ("no_wait", "norms.cu", "  wait_for_inputs();\n  float x[8], w[8];", "  float x[8], w[8];", "norms.cu", "rms_norm", "26b"),
    (
        "no_barrier",
        "linear.cuh",
        "shared ? sync_block() : sync_warp();",
        "if (!shared) sync_warp();",
        "linear.cu",
        "linear",
        "int8_odd",
    ),
    (
        "barrier_of_some",
        "linear.cuh",
        "shared ? sync_block() : sync_warp();",
        "if (warp) sync_block();",
        "linear.cu",
        "linear",
        "odd",
    ),
    ("one_row_more", "linear.cuh", "if (n >= a.n) continue;", "if (n > a.n) continue;", "linear.cu", "linear", "odd"),
    ("one_column_more", "rows.cuh", "if (first + i < size) v", "if (first + i <= size) v", "linear.cu", "linear", "odd"),
    (
        "tile_too_many",
        "linear.cuh",
        "return sums + (is_of_head(a)",
        "return sums / 2 + (is_of_head(a)",
        "linear.cu",
        "linear",
        "odd",
    ),
    (
        "wrong_scale",
        "weights.cuh",
        "unpack<device::half>(w.scale.w[p])",
        "unpack<device::half>(w.scale.w[0])",
        "linear.cu",
        "linear",
        "int4_odd",
    ),
    ("early_x", "linear.cuh", "        wait_for_inputs();\n", "", "linear.cu", "linear", "26b_qkv_one_token"),
    ("missing_fence", "device.cuh", "    fence();\n    *flag", "    *flag", "linear.cu", "logits", "argmax_ties"),
    ("lower_of_equals", "linear.cuh", "b.at < a.at", "b.at > a.at", "linear.cu", "logits", "argmax_ties"),
    (
        "no_barrier_before_down",
        "moe_decode.cuh",
        "    sync_warp();\n  }\n  sync_block();",
        "    sync_warp();\n  }",
        "moe_decode.cu",
        "moe_decode",
        "odd",
    ),
    (
        "found_too_early",
        "sample.cu",
        "put(place++, i);\n  sync_block();",
        "put(place++, i);",
        "sample.cu",
        "sample",
        "26b_slice",
    ),
    (
        "another_s_logits",
        "sample.cu",
        "kept + row * a.head.kept_stride + block * rows",
        "kept + block * rows",
        "sample.cu",
        "sample",
        "free",
    ),
    (
        "sum_of_another_largest",
        "linear.cuh",
        "part.y * exp2_fast((part.x - most) * a.by)",
        "part.y",
        "linear.cu",
        "sample",
        "free",
    ),
    ("rank_off", "moe_decode.cuh", "q < p; ++q", "q <= p; ++q", "moe_decode.cu", "moe_decode", "skewed"),
    (
        "weights_of_another",
        "moe_decode.cuh",
        "load(a.topk_weights + p)",
        "load(a.topk_weights + t)",
        "moe_decode.cu",
        "moe_decode",
        "odd",
    ),
    (
        "dense_alone",
        "moe_feed_forward.cu",
        "if (block < experts)",
        "if (block <= experts)",
        "moe_feed_forward.cu",
        "moe_feed_forward",
        "odd",
    ),
    ("scale", "embedding.cu", "f[i] *= a.scale", "f[i] *= 1", "embedding.cu", "embedding", "odd"),
    ("offset", "embedding.cu", "128 : 8", "127 : 7", "embedding.cu", "embedding", "int8_odd"),
    ("nibbles", "embedding.cu", "low >> 4", "low", "embedding.cu", "embedding", "int4_odd"),
    (
        "panels",
        "embedding.cu",
        "panel * groups + first / 32",
        "row / 8 * groups + first / 32",
        "embedding.cu",
        "embedding",
        "int8",
    ),
    ("quarter", "device.cuh", "turn % 2 ? sin : cos", "turn % 3 ? sin : cos", "rope_angles.cu", "rope_angles", "full_far"),
    ("turn", "qkv_norm_rope.cu", "cos[j] - y[j]", "cos[j] + y[j]", "qkv_norm_rope.cu", "qkv_norm_rope", "odd"),
    (
        "lanes",
        "qkv_norm_rope.cu",
        "warp_sum<kLanes>",
        "warp_sum<kWarp>",
        "qkv_norm_rope.cu",
        "qkv_norm_rope",
        "sliding_prefill",
    ),
    (
        "weights",
        "qkv_norm_rope.cu",
        "is_k ? a.k_weight : a.q_weight",
        "a.q_weight",
        "qkv_norm_rope.cu",
        "qkv_norm_rope",
        "full_kv_cache",
    ),
    (
        "slots",
        "qkv_norm_rope.cu",
        "a.slots ? load(a.slots + token) : token",
        "token",
        "qkv_norm_rope.cu",
        "qkv_norm_rope",
        "full_v_only_cache",
    ),
    ("early_slots", "qkv_norm_rope.cu", "  wait_for_inputs();\n", "", "qkv_norm_rope.cu", "qkv_norm_rope", "shared_q_only"),
    (
        "v_of_k",
        "qkv_norm_rope.cu",
        "head - first_v",
        "head - a.q_heads",
        "qkv_norm_rope.cu",
        "qkv_norm_rope",
        "sliding_one_token_cache",
    ),
    (
        "low_half",
        "route_topk.cuh",
        "mma_tf32(low_sum, low",
        "if (false) mma_tf32(low_sum, low",
        "route_topk.cu",
        "route_topk",
        "26b",
    ),
    (
        "ties",
        "route_topk.cuh",
        "warp_min(lowest)",
        "warp_max(lowest == 0xffffffffu ? 0 : lowest)",
        "route_topk.cu",
        "route_topk",
        "ties",
    ),
    ("gains", "route_topk.cuh", "* gains[id]", "* gains[lane]", "route_topk.cu", "route_topk", "odd"),
    (
        "taken",
        "route_topk.cuh",
        "== lowest ? 0 : keys[i]",
        "== lowest ? keys[i] : keys[i]",
        "route_topk.cu",
        "route_topk",
        "all_experts",
    ),
    (
        "arrival",
        "route_topk.cuh",
        "!last_to_arrive(a.counters + block.z, blocks, &shared.flag)",
        "block.x + block.y",
        "route_topk.cu",
        "route_topk",
        "26b",
    ),
    (
        "no_reset",
        "device.cuh",
        "count_up(counter, count - 1)",
        "count_up(counter, count)",
        "route_topk.cu",
        "route_topk",
        "odd",
    ),
    (
        "tile_not_waited_for",
        "gqa_decode.cu",
        "      wait_for_all_but(a.buffers - 2);\n",
        "",
        "gqa_decode.cu",
        "gqa_decode",
        "full_kv",
    ),
    (
        "tile_too_early",
        "gqa_decode.cu",
        "      wait_for_all_but(a.buffers - 2);\n      sync_block();\n",
        "      wait_for_all_but(a.buffers - 2);\n",
        "gqa_decode.cu",
        "gqa_decode",
        "full_kv",
    ),
    (
        "scores_too_early",
        "gqa_decode.cu",
        "      if constexpr (kRebuilt)\n        sync_block();\n      else\n",
        "      if constexpr (!kRebuilt)\n",
        "gqa_decode.cu",
        "gqa_decode",
        "full_v_only",
    ),
    (
        "q_not_turned_back",
        "gqa_decode.cu",
        "keys.turn_back(of_q.w, tile * kTile), ",
        "",
        "gqa_decode.cu",
        "gqa_decode",
        "full_v_only",
    ),
    ("keys_not_turned", "gqa_decode.cu", ", keys.rotate(x, y)", "", "gqa_decode.cu", "gqa_decode", "full_v_only"),
    (
        "one_too_many",
        "split_kv.cuh",
        "position < seen.length",
        "position <= seen.length",
        "gqa_decode.cu",
        "gqa_decode",
        "full_kv",
    ),
    (
        "one_too_few",
        "split_kv.cuh",
        "position >= seen.lo",
        "position > seen.lo",
        "gqa_decode.cu",
        "gqa_decode",
        "sliding_ring_paged",
    ),
    (
        "no_ring",
        "gqa_decode.cu",
        "uint32_t(position) % uint32_t(a.slots)",
        "uint32_t(position)",
        "gqa_decode.cu",
        "gqa_decode",
        "sliding_ring_paged",
    ),
    (
        "early_lengths",
        "gqa_decode.cu",
        "  wait_for_inputs();\n  if (warp == 0) {",
        "  if (warp == 0) {",
        "gqa_decode.cu",
        "gqa_decode",
        "odd",
    ),
    (
        "early_merge",
        "gqa_decode.cu",
        "  wait_for_inputs();\n  const int rows",
        "  const int rows",
        "gqa_decode.cu",
        "gqa_decode",
        "full_v_only",
    ),
    ("pieces_not_there", "merge_kv.cuh", "  wait_for_copies<0>();\n", "", "gqa_decode.cu", "gqa_decode", "sliding_ring_paged"),
    (
        "pieces_not_fenced",
        "device.cuh",
        "    fence();\n    *flag",
        "    *flag",
        "gqa_decode.cu",
        "gqa_decode",
        "sliding_ring_paged",
    ),
    (
        "other_row",
        "split_kv.cuh",
        "row.number / eights, head0",
        "row.number % 1, head0",
        "gqa_decode.cu",
        "gqa_decode",
        "sliding_ring_paged",
    ),
]

# The same, seen by a test of its own.
OWN_MUTANTS: list[tuple[str, str, str, str, str, Callable[[], None]]] = [
    (
        "not_a_number_as_no_part",
        "gqa_decode.cu",
        "most = max(most, kLeast);",
        "",
        "gqa_decode.cu",
        test_what_is_not_a_number_stays_where_it_is,
    ),
    (
        "one_more_stays",
        "sample.cu",
        "sum - weight >= a.top_p * total",
        "sum >= a.top_p * total",
        "sample.cu",
        lambda: test_draws_fall_where_they_should(0, 3001, "top_p"),
    ),
    (
        "sums_too_early",
        "sample.cu",
        "  sync_block();\n  if (lane == kWarp - 1)",
        "  if (lane == kWarp - 1)",
        "sample.cu",
        lambda: test_draws_fall_where_they_should(0, 3001, "top_p"),
    ),
    (
        "logits_behind_the_last",
        "linear.cuh",
        "if (lane < rows && n < a.n) {\n        y",
        "if (lane < rows) {\n        y",
        "linear.cu",
        lambda: test_draws_fall_where_they_should(0, 3001, "of all"),
    ),
    ("end", "sample.cu", "s.rest = of_last;", "s.rest = rest;", "sample.cu", test_the_last_of_many_blocks_has_the_end),
    (
        "ids",
        "embedding.cu",
        "row >= 0 && row < a.vocab",
        "true",
        "embedding.cu",
        lambda: test_an_id_outside_the_table_gives_nan(8),
    ),
    ("far", "device.cuh", "double(position) * double(freq)", "float(position) * freq", "rope_angles.cu", test_angles_far_out),
    (
        "inside",
        "qkv_norm_rope.cu",
        "slot >= 0 && slot < a.rows",
        "slot >= 0",
        "qkv_norm_rope.cu",
        test_slots_outside_of_the_cache_are_not_written,
    ),
    (
        "nan",
        "device.cuh",
        "x != x ? 0xffffffffu : ",
        "",
        "route_topk.cu",
        lambda: test_experts_exist_whatever_x_holds(-0x40),
    ),
    (
        "many",
        "route_topk.cuh",
        "part += kAtOnce",
        "part += kAtOnce + 1",
        "route_topk.cu",
        lambda: test_router_shapes(3, 4096, 16, 4, torch.float16),
    ),
    (
        "part_of_a_leaf",
        "split_kv.cuh",
        "tiles_apart = skip && begin % kLeaf",
        "tiles_apart = false",
        "gqa_decode.cu",
        lambda: test_decode_merges_in_one_order(False),
    ),
    (
        "part_of_a_node",
        "split_kv.cuh",
        "leaves_apart = skip && begin % kNode",
        "leaves_apart = false",
        "gqa_decode.cu",
        lambda: test_decode_merges_in_one_order(True),
    ),
    (
        "no_mark",
        "gqa_decode.cu",
        "else if (!to_node && r.work.shift == 0)",
        "else if (false)",
        "gqa_decode.cu",
        lambda: test_decode_merges_in_one_order(True),
    ),
    (
        "nan_of_a_slot",
        "gqa_decode.cu",
        "mine >> k * kStep & 1",
        "true",
        "gqa_decode.cu",
        lambda: test_decode_reads_no_slot_that_is_not_seen(False),
    ),
]


@pytest.mark.skipif(GPU, reason="kernels with mistakes are for the emulator")
@pytest.mark.skipif(emulated.SANITIZED, reason="what a sanitizer sees ends the process")
@pytest.mark.parametrize("name, file, before, after, source, op_name, case", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_mistake_is_seen(name: str, file: str, before: str, after: str, source: str, op_name: str, case: str) -> None:
    op = ops.TABLE[op_name]
    args = op.inputs(case, torch.bfloat16)
    judge = Judge(op, args)
    kernels = emulated.mutant(name, file, before, after, source)
    emulated.use(kernels)
    seen = False
    try:
        for seed in range(4):
            emulated.use(kernels, seed)
            seen = seen or not judge(on_cuda(op)).ok
    except RuntimeError as error:
        assert "emulator: " in str(error)
        seen = True
    finally:
        emulated.use()
        cuda_backend._COUNTERS.clear()  # a launch that failed has not left them zero
    assert seen


@pytest.mark.skipif(GPU, reason="kernels with mistakes are for the emulator")
@pytest.mark.skipif(emulated.SANITIZED, reason="what a sanitizer sees ends the process")
@pytest.mark.parametrize("name, file, before, after, source, test", OWN_MUTANTS, ids=[m[0] for m in OWN_MUTANTS])
def test_a_mistake_is_seen_by(name: str, file: str, before: str, after: str, source: str, test: Callable[[], None]) -> None:
    emulated.use(emulated.mutant(name, file, before, after, source))
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            test()
    finally:
        emulated.use()
        cuda_backend._COUNTERS.clear()


# Too little shared memory for rms_norm: its accesses are plain ones, which the emulator does not look at.
BEYOND_SHARED = """
import emulated, torch
from gemma4_fast import ops
change = "launch_rows(on, a, 1, whole", "launch_rows(on, a, 0, whole"
emulated.use(emulated.mutant("beyond_shared", "norms.cu", *change, "norms.cu"))
with emulated.on_cpu():
    ops.bound(ops.TABLE["rms_norm"], "cuda")(torch.randn(2, 512).bfloat16())
"""


@pytest.mark.skipif(not emulated.SANITIZED, reason="for `make sanitize`")
def test_a_sanitizer_sees_plain_accesses() -> None:
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/kernels.so" in line}
    assert loaded == {str(emulated.BUILD / "kernels.so")}  # the sanitized ones
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", BEYOND_SHARED], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "AddressSanitizer: use-after-poison" in done.stderr and "rms_norm_kernel" in done.stderr


@pytest.mark.skipif(not GPU, reason="elsewhere the table is told so")
def test_the_table_knows_what_runs_here() -> None:
    assert table.backend_missing("cuda", DEVICE) is None
