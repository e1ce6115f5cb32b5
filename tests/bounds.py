"""How far apart two float results may be, on any processor.

Two correct implementations round differently, and how much depends on the processor. A fixed
tolerance that holds on one machine can therefore fail on another. These tests use one rule:
the error against an fp64 truth may be at most `SLACK` times the error of plain PyTorch (eager) on
the same inputs, plus `FLOOR` times the largest value of the truth.

`gemma4_fast.ops.accuracy.Judge` applies the same rule to an op of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SLACK = 2.0
FLOOR = 1e-5
FP64 = 1e-10  # of the scale, far above what fp64 rounds and far below what fp32 does


def largest(x: Tensor) -> float:
    """The largest magnitude in x, 0 if x is empty."""
    return x.detach().double().abs().max().item() if x.numel() else 0.0


def error(got: Tensor, truth: Tensor) -> float:
    """The largest difference between two tensors of one shape."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    return largest(got.detach().double() - truth.detach().double())


def allowed(plain: Tensor, truth: Tensor, scale: float = 0.0, loss: float = 0.0) -> float:
    """The largest error that the rule allows. `plain` is what eager PyTorch computes.

    `scale`: that of the inputs, for a result that is small because its terms cancel.
    `loss`: eager's error in a larger sample, for results of few values, which it can hit by luck.
    """
    return SLACK * max(error(plain, truth), loss) + FLOOR * max(largest(truth), scale)


def assert_right(
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    scale: float = 0.0,
    loss: float = 0.0,
) -> None:
    """`got` obeys the rule. `plain` is eager PyTorch's result, `truth` the one in fp64.

    `scale` and `loss` are those of `allowed`.
    """
    assert truth.dtype == torch.float64, truth.dtype
    off, bound = error(got, truth), allowed(plain, truth, scale, loss)
    assert off <= bound, f"error {off:.3g}, allowed {bound:.3g}"  # fails for NaN too


def assert_same_in_fp64(got: Tensor, wanted: Tensor) -> None:
    """Two fp64 results differ by nothing but the order of sums."""
    assert got.dtype == wanted.dtype == torch.float64, (got.dtype, wanted.dtype)
    off, bound = error(got, wanted), FP64 * largest(wanted)
    assert off <= bound, f"they differ by {off:.3g}, allowed {bound:.3g}"  # fails for NaN too


class InFp64(TorchFunctionMode):
    """Inside, code that asks for fp32 gets fp64.

    transformers widens norms, softmax and RoPE to fp32, whatever the model's dtype. In this mode
    a model of fp64 rounds nothing to fp32 and serves as the truth.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})
