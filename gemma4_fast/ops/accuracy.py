"""Is a backend right? The one bound that tests and benchmarks share.

Truth is the reference in a wider dtype. An error may be at most `slack` times what plain PyTorch (the reference in the given
dtype) loses, plus 1e-5; integers are exact, and nothing may be NaN. With a quantized weight truth is the reference over the
values that it stands for, and plain PyTorch rounds the activations as the format's kernels do: see quant.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops.table import Op
from gemma4_fast.quant import QuantizedWeight

ALWAYS = 1e-5


@dataclass(frozen=True)
class Verdict:
    """error: the largest one found. allowed: the bound where the error comes nearest to it, or is furthest beyond."""

    ok: bool
    message: str = ""
    error: float = 0.0
    allowed: float = ALWAYS


@contextmanager
def nan_poison() -> Iterator[None]:
    """Inside: memory from torch.empty holds NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # some CUDA calls have no deterministic form
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def converted(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating tensors in `dtype`, quantized weights dequantized."""
    wide = (Tensor, QuantizedWeight)
    return {k: v.to(dtype) if isinstance(v, wide) and v.dtype.is_floating_point else v for k, v in args.items()}


def outputs(op: Op, fn: Callable[..., Any], args: Mapping[str, Any]) -> list[Tensor]:
    """What fn returns, followed by the arguments it writes in place; the caller's stay as they are."""
    own = {**args, **{k: args[k].clone() for k in op.mutates if args[k] is not None}}
    out = fn(*own.values())
    outs = list(out) if isinstance(out, tuple) else [out]
    return [o for o in outs + [own[name] for name in op.mutates] if o is not None]


class Judge:
    """Judges functions on one set of arguments; truth and the yardstick are computed once."""

    def __init__(self, op: Op, args: Mapping[str, Any], truth_dtype: torch.dtype = torch.float64) -> None:
        self.op, self.args = op, args
        self.plain = outputs(op, op.reference, args)
        self.truth = outputs(op, op.reference, converted(args, truth_dtype))

    def __call__(self, fn: Callable[..., Any]) -> Verdict:
        with nan_poison():
            return self.of(outputs(self.op, fn, self.args))

    def of(self, got: list[Tensor]) -> Verdict:
        """Of outputs that are there already."""
        if len(got) != len(self.truth):
            return Verdict(False, f"{len(got)} outputs, expected {len(self.truth)}")
        worst = Verdict(True)
        for i, (g, p, t) in enumerate(zip(got, self.plain, self.truth, strict=True)):
            verdict = self._one(g, p, t)
            if not verdict.ok:
                return Verdict(False, f"output {i}: {verdict.message}", verdict.error, verdict.allowed)
            if verdict.error * worst.allowed >= worst.error * verdict.allowed:
                worst = verdict
        return worst

    def truth_of_mutated(self, returned: int) -> list[Tensor]:
        """The right values of what is written in place, in the dtype that it has: to stand in where only the returned outputs
        are judged."""
        return [t.to(p.dtype) for t, p in zip(self.truth[returned:], self.plain[returned:], strict=True)]

    def _one(self, got: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
        if got.shape != plain.shape or got.dtype != plain.dtype:
            return Verdict(False, f"{got.dtype} {list(got.shape)}, expected {plain.dtype} {list(plain.shape)}")
        if not truth.dtype.is_floating_point:
            wrong = int((got.long() != truth.long()).sum())
            return Verdict(wrong == 0, f"{wrong} of {got.numel()} integers differ", float(wrong), 0.0)
        if not got.isfinite().all():
            return Verdict(False, f"{int((~got.isfinite()).sum())} of {got.numel()} values are not finite", float("inf"))
        error, allowed = _error(got, truth), self.op.slack * _error(plain, truth) + ALWAYS
        return Verdict(error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}", error, allowed)


def _error(got: Tensor, truth: Tensor) -> float:
    """The largest difference, block by block: outputs may be large, and are widened for it."""
    if not truth.numel():
        return 0.0
    pairs = zip(got.reshape(-1).split(1 << 24), truth.reshape(-1).split(1 << 24), strict=True)
    return max((g.double() - t.double()).abs().max().item() for g, t in pairs)
