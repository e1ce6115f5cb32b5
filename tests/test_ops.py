"""Every op x backend x case of the table against its reference in fp64, in every dtype: generated, nothing listed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_fast import ops
from gemma4_fast.ops.accuracy import Judge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ROWS = [
    pytest.param(op, backend, case, dtype, id=f"{op.name}-{backend}-{case}-{str(dtype)[6:]}")
    for op in ops.TABLE.values()
    for backend in (op.impls if op.compose is None else ["torch"])
    if backend not in ("cpu", "triton", "cuda")  # see test_cpu.py, test_triton.py, test_cuda.py
    for case in op.cases
    for dtype in DTYPES
    if op.compose is not None or dtype in op.impls[backend].dtypes
]


@pytest.mark.parametrize("op, backend, case, dtype", ROWS)
def test_backend_matches_reference(op: ops.Op, backend: str, case: str, dtype: torch.dtype) -> None:
    verdict = Judge(op, op.inputs(case, dtype))(ops.bound(op, backend))
    assert verdict.ok, verdict.message


def broken(fn: Any, change: Any) -> Any:
    """fn with its (first) output changed in place."""

    def wrapped(*args: Any) -> Any:
        out = fn(*args)
        change(out[0] if isinstance(out, tuple) else out)
        return out

    return wrapped


@pytest.mark.parametrize("name, case", [("linear", "odd"), ("norm_add_norm", "odd"), ("gqa_decode", "odd")])
def test_the_judge_sees_what_is_wrong(name: str, case: str) -> None:
    op = ops.TABLE[name]
    judge, right = Judge(op, op.inputs(case, torch.float32)), ops.bound(op, "torch")
    assert judge(right).ok
    assert "not finite" in judge(broken(right, lambda y: y.view(-1)[-1].fill_(float("nan")))).message
    off = judge(broken(right, lambda y: y.view(-1)[0].add_(0.01)))
    assert not off.ok and off.error == pytest.approx(0.01, rel=0.05) and off.allowed < 1e-3
    assert "expected" in judge(lambda *a: ops.TABLE[name].reference(*a)[0][:1]).message
    unwritten = judge(broken(right, lambda y: y.view(-1)[1:2].copy_(torch.empty(1))))
    assert not unwritten.ok  # memory that nobody wrote holds NaN


def test_the_judge_sees_a_wrong_integer_and_a_cache_that_was_not_written() -> None:
    op = ops.TABLE["expert_dispatch"]
    judge = Judge(op, op.inputs("odd", torch.float32))
    assert "1 of" in judge(broken(ops.bound(op, "torch"), lambda order: order[3].add_(1))).message
    op = ops.TABLE["qkv_norm_rope"]
    args = op.inputs("full_v_only_cache", torch.float32)
    before = args["v_cache"].clone()
    judge = Judge(op, args)
    assert judge(ops.bound(op, "torch")).ok
    assert torch.equal(args["v_cache"], before)  # the caller's stay as they were

    def forgets(*a: Any) -> Any:
        return op.reference(*a[:7])[0], None, None

    assert not judge(forgets).ok
