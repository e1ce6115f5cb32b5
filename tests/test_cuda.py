"""The CUDA kernels: on a GPU if there is one, else compiled for the host and emulated: see emulated.py, emulator/emulator.h."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch

from gemma4_fast import ops
from gemma4_fast.ops import table
from gemma4_fast.ops.accuracy import Judge, converted, outputs
from gemma4_fast.quant import QuantizedWeight

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and (reason := emulated.why_not()):
    pytest.skip(reason, allow_module_level=True)
if GPU and (reason := table.backend_missing("cuda", "cuda")) and reason.startswith("needs "):  # and not: could not be built
    pytest.skip(f"the cuda backend {reason}", allow_module_level=True)


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


@pytest.mark.parametrize("op, case, dtype", ROWS)
def test_matches_reference(op: ops.Op, case: str, dtype: torch.dtype) -> None:
    """And gives the same bits in whatever order threads and blocks run."""
    args = op.inputs(case, dtype, DEVICE)
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
@pytest.mark.skipif(emulated.SANITIZED, reason="what a sanitizer sees ends the process")
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


# Too little shared memory for rms_norm: its accesses are plain ones, which the emulator does not look at.
BEYOND_SHARED = """
import emulated, torch
from gemma4_fast import ops
emulated.use(emulated.mutant("beyond_shared", "norms.cu", "launch_rows(on, a, 1, whole", "launch_rows(on, a, 0, whole"))
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


def test_the_table_knows_what_runs_here() -> None:
    assert table.backend_missing("cuda", DEVICE) is None
