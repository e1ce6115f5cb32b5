"""Every op x backend x case of the table against its reference in fp64, in every dtype: generated, nothing listed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def to(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating tensors in `dtype`; everything cloned, so that an op which writes its arguments harms nobody else."""

    def one(v: Any) -> Any:
        if not isinstance(v, torch.Tensor):
            return v
        return v.to(dtype, copy=True) if v.dtype.is_floating_point else v.clone()

    return {k: one(v) for k, v in args.items()}


def run(fn: Any, op: ops.Op, args: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs, followed by the arguments the op writes in place."""
    out = fn(*args.values())
    outs = list(out) if isinstance(out, tuple) else [out]
    return [o for o in outs + [args[name] for name in op.mutates] if o is not None]


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return (got.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


ROWS = [
    pytest.param(op, backend, case, dtype, id=f"{op.name}-{backend}-{case}-{str(dtype)[6:]}")
    for op in ops.TABLE.values()
    for backend in (op.impls if op.compose is None else ["torch"])
    for case in op.cases
    for dtype in DTYPES
]


@pytest.mark.parametrize("op, backend, case, dtype", ROWS)
def test_backend_matches_reference(op: ops.Op, backend: str, case: str, dtype: torch.dtype) -> None:
    args = op.inputs(case, dtype)
    truth = run(op.reference, op, to(args, torch.float64))
    plain = run(op.reference, op, args | {k: args[k].clone() for k in op.mutates if args[k] is not None})
    with ops.use_backend(backend):
        got = run(op, op, args | {k: args[k].clone() for k in op.mutates if args[k] is not None})
    assert len(got) == len(truth)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert g.shape == t.shape
        if not t.dtype.is_floating_point:
            assert torch.equal(g.long(), t.long())
            continue
        assert g.dtype == p.dtype
        assert g.isfinite().all()
        assert error(g, t) <= op.slack * error(p, t) + 1e-5
