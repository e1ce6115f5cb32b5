"""Argument checks shared by the ops: ValueError with what was got and what was expected, before any backend runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gemma4_fast.quant import QuantizedWeight, WeightLike

INTS = (torch.int32, torch.int64)


def floating(op: str, name: str, x: Tensor, ndim: int | None = None) -> None:
    """x is a floating tensor, of `ndim` axes if given."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if (x.dim() == 0) if ndim is None else (x.dim() != ndim):
        raise ValueError(f"{op}: {name} must have {ndim or 'some'} axes, got shape {list(x.shape)}")


def shaped(
    op: str,
    name: str,
    x: Tensor | None,
    shape: Sequence[int],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
    *,
    optional: bool = False,
) -> None:
    """x has `shape` (-1: any size), `like`'s device, and one of `dtypes` (None: `like`'s dtype). optional: or is None."""
    if optional and x is None:
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.shape != shape and not _fits(x.shape, shape):  # plain loops: this runs some fifteen times for each layer and token
        want = ["any" if s == -1 else s for s in shape]
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {want}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {like.device}")
    if x.dtype != like.dtype if dtypes is None else x.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes or (like.dtype,))
        raise ValueError(f"{op}: {name} has dtype {x.dtype}, expected {expected}")


def weight(op: str, name: str, w: WeightLike, shape: Sequence[int], like: Tensor) -> None:
    """w is a tensor as in `shaped`, or a quantized weight of that shape, device and dtype."""
    if not isinstance(w, QuantizedWeight):
        return shaped(op, name, w, shape, like)
    require(op, _fits(w.shape, shape), f"{name} has shape {list(w.shape)}, expected {['any' if s == -1 else s for s in shape]}")
    require(op, w.device == like.device, f"{name} is on {w.device}, expected {like.device}")
    require(op, w.dtype == like.dtype, f"{name} is for {w.dtype}, expected {like.dtype}")


def whole_weight(w: WeightLike, parts: int) -> str | None:
    """None for a tensor, or a quantized weight that kernels can read as it is stored; else why they cannot."""
    if not isinstance(w, QuantizedWeight):
        return None
    if not w.is_contiguous():
        return "takes whole quantized weights, no views of some rows"
    return None if w.parts == parts else f"takes this quantized weight in {parts} parts, got {w.parts}"


# What kernels of several backends ask beyond an op's own check: see `Impl.accepts`.
def accepts_weights(x: Tensor, weight: WeightLike, *_: object) -> str | None:
    return whole_weight(weight, 1)


def accepts_geglu(x: Tensor, gate_up: WeightLike, down: WeightLike) -> str | None:
    return whole_weight(gate_up, 2) or whole_weight(down, 1)


def accepts_embedding(weight: WeightLike, *_: object) -> str | None:
    return whole_weight(weight, 1)


def accepts_angles(positions: Tensor, inv_freq: Tensor) -> str | None:
    return None if inv_freq.dtype == torch.float32 else "takes frequencies in float32"


def _fits(shape: Sequence[int], pattern: Sequence[int]) -> bool:
    if len(shape) != len(pattern):
        return False
    for size, want in zip(shape, pattern, strict=True):  # noqa: SIM110
        if size != want and want != -1:
            return False
    return True


def require(op: str, ok: bool, message: str) -> None:
    """A plain condition on the arguments."""
    if not ok:
        raise ValueError(f"{op}: {message}")


def integer(op: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """value is an int in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(
            f"{op}: {name} must be an integer {f'>= {low}' if high is None else f'in [{low}, {high}]'}, got {value!r}"
        )


def positive(op: str, name: str, value: object) -> None:
    """value is a number > 0, and not infinite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be a positive number, got {value!r}")


def in_fp32(temperature: float) -> float:
    """The nearest one that kernels can divide by: in fp32 neither 0 nor infinite, nor is its inverse."""
    return min(max(temperature, 1e-30), 1e30)


def share(op: str, name: str, value: object) -> None:
    """value is a number in [0, 1]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be a number in [0, 1], got {value!r}")
