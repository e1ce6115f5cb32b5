"""The CUDA kernels: on a GPU if there is one, else compiled for the host and emulated: see emulated.py, emulator/emulator.h."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch

from gemma4_fast import UnsupportedError, ops
from gemma4_fast.ops import table
from gemma4_fast.ops.accuracy import Judge, converted, outputs
from gemma4_fast.ops.linear import linear_case, mlp_case
from gemma4_fast.ops.moe import moe_case
from gemma4_fast.ops.table import Maker
from gemma4_fast.quant import QuantizedWeight

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and (reason := emulated.why_not()):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    """Without a GPU: the table takes the emulated kernels for the ones of a GPU."""
    if GPU:
        yield
        return
    emulated.use()
    with emulated.on_cpu():
        yield


ROWS = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case}-{str(dtype)[6:]}")
    for op in ops.TABLE.values()
    if "cuda" in op.impls
    for case, dtype in itertools.product(op.cases, op.impls["cuda"].dtypes)
]


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
    if reason := why_not(op, args):
        with pytest.raises(UnsupportedError, match=re.escape(reason)):
            on_cuda(op)(*args.values())
        return
    first = outputs(op, on_cuda(op), args)
    if not GPU:
        emulated.use(seed=1)
    judge = Judge(op, args)
    verdict = judge(on_cuda(op))
    assert verdict.ok, verdict.message
    again = outputs(op, on_cuda(op), args)
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
    args = {
        "linear": lambda: linear_case(m, 16, 96, out=70, bits=bits),
        "geglu_mlp": lambda: mlp_case(m, 16, 96, 40, bits=bits),
        "logits": lambda: dict(x=m.randn(16, 96), weight=m.weight(bits, 131100, 96, scale=0.1), softcap=30.0),
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


# ---- the emulator finds what it should ----

# A mistake one could make: its name; the file of csrc/cuda, the text there and what it becomes; the source that is built anew;
# and the op and case that see it.
MUTANTS: list[tuple[str, str, str, str, str, str, str]] = [
    ("no_wait", "norms.cu", "  wait_for_inputs();\n  float x[8], w[8];", "  float x[8], w[8];", "norms.cu", "rms_norm", "26b"),
    (
        "no_barrier",
        "linear.cu",
        "shared ? sync_block() : sync_warp();",
        "if (!shared) sync_warp();",
        "linear.cu",
        "linear",
        "int8_odd",
    ),
    (
        "barrier_of_some",
        "linear.cu",
        "shared ? sync_block() : sync_warp();",
        "if (warp) sync_block();",
        "linear.cu",
        "linear",
        "odd",
    ),
    ("one_row_more", "linear.cu", "if (n >= a.n) continue;", "if (n > a.n) continue;", "linear.cu", "linear", "odd"),
    ("one_column_more", "weights.cuh", "if (first + j < columns)", "if (first + j <= columns)", "linear.cu", "linear", "odd"),
    (
        "tile_too_many",
        "linear.cu",
        "{{(int)blocks}, kWarps * kWarp, shared}",
        "{{(int)blocks}, kWarps * kWarp, shared / 2}",
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
    ("early_x", "linear.cu", "        wait_for_inputs();\n", "", "linear.cu", "linear", "26b_qkv_one_token"),
    ("missing_fence", "device.cuh", "    fence();\n    *flag", "    *flag", "linear.cu", "logits", "int8_argmax"),
    ("lower_of_equals", "linear.cu", "b.at < a.at", "b.at > a.at", "linear.cu", "logits", "argmax_ties"),
    (
        "no_barrier_before_down",
        "moe_decode.cu",
        "    sync_warp();\n  }\n  sync_block();",
        "    sync_warp();\n  }",
        "moe_decode.cu",
        "moe_decode",
        "26b",
    ),
    ("rank_off", "moe_decode.cu", "q < p; ++q", "q <= p; ++q", "moe_decode.cu", "moe_decode", "skewed"),
    (
        "weights_of_another",
        "moe_decode.cu",
        "load(a.topk_weights + p)",
        "load(a.topk_weights + t)",
        "moe_decode.cu",
        "moe_decode",
        "odd",
    ),
]


@pytest.mark.skipif(GPU, reason="kernels with mistakes are for the emulator")
@pytest.mark.parametrize("name, file, before, after, source, op_name, case", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_mistake_is_seen(name: str, file: str, before: str, after: str, source: str, op_name: str, case: str) -> None:
    op = ops.TABLE[op_name]
    args = op.inputs(case, torch.bfloat16)
    judge = Judge(op, args)
    kernels = emulated.mutant(name, file, before, after, source)
    seen = ""
    try:
        for seed in range(4):
            emulated.use(kernels, seed)
            seen = seen or judge(on_cuda(op)).message
    except RuntimeError as error:
        seen = str(error)
    finally:
        emulated.use()
    assert seen


def test_the_table_knows_what_runs_here() -> None:
    assert table.backend_missing("cuda", DEVICE) is None
