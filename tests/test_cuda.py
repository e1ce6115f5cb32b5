"""The CUDA kernels: on a GPU if there is one, else compiled for the host and emulated: see emulated.py and emulator/emulator.h."""

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


# ---- the emulator finds what it should ----

# A mistake one could make: its name, the source, the text there and what it becomes, and the op and case that see it.
MUTANTS: list[tuple[str, str, str, str, str, str]] = [
    ("no_wait", "norms.cu", "  wait_for_inputs();\n  float x[8], w[8];", "  float x[8], w[8];", "rms_norm", "26b"),
]


@pytest.mark.skipif(GPU, reason="kernels with mistakes are for the emulator")
@pytest.mark.parametrize("name, source, before, after, op_name, case", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_mistake_is_seen(name: str, source: str, before: str, after: str, op_name: str, case: str) -> None:
    op = ops.TABLE[op_name]
    args = op.inputs(case, torch.bfloat16)
    judge = Judge(op, args)
    kernels = emulated.mutant(name, source, before, after)
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
