"""The op table under pytest-benchmark, for work on one kernel: `pytest bench/ --benchmark-only -k "moe_decode and cpu"`.

The same specs, the same gate and the same cold inputs as `gemma4-fast bench ops`, which also has the roofline and the
interleaving; here pytest-benchmark's own --benchmark-save and --benchmark-compare are at hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_fast import ops
from gemma4_fast.bench.ops import BlockMaker, bound_to, serving
from gemma4_fast.bench.timing import Rotation
from gemma4_fast.model import parse_device
from gemma4_fast.ops.accuracy import Judge

DTYPE = torch.bfloat16
ROWS = [
    pytest.param(op, case, backend, id=f"{op.name}-{case}-{backend}")
    for op in ops.TABLE.values()
    for case in op.bench_cases
    for backend in serving(op, parse_device(None), DTYPE)
]


@pytest.mark.parametrize("op, case, backend", ROWS)
def test_op(benchmark: Any, device: torch.device, op: ops.Op, case: str, backend: str) -> None:
    fn, cuda = bound_to(op, backend), device.type == "cuda"
    with torch.inference_mode():
        args = op.bench_cases[case](BlockMaker(DTYPE, device))
        verdict = Judge(op, args, torch.float32)(fn)
        assert verdict.ok, f"wrong, so not timed: {verdict.message}"
        cost = op.cost(*args.values())
        call = Rotation(args, cost.bytes, device).call(fn)

        def timed() -> None:
            call()
            if cuda:
                torch.cuda.synchronize()

        benchmark.group = f"{op.name}/{case}"
        benchmark.extra_info |= {"bytes": cost.bytes, "flops": cost.flops, "dtype": str(DTYPE), "device": str(device)}
        benchmark.pedantic(timed, rounds=20, warmup_rounds=1)
