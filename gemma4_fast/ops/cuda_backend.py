"""The `cuda` backend: the kernels of csrc/cuda behind the table's signatures, for bf16 and fp16, and quantized weights.

Everything is allocated here, outputs and scratch, so that the kernels own no memory. What the launchers may not do: look at a
tensor's values, since that waits for the GPU and no CUDA graph could hold it. Shapes, formulas and sources:
`gemma4_fast.reference.ops`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
MAX_HIDDEN = 6144  # 8 kMost in csrc/cuda/norms.cu


def run(name: str, like: Tensor, *args: Any) -> None:
    """The op of csrc/cuda/torch_ops.cpp, on the stream that `like`'s device is at."""
    on_gpu = like.device.type == "cuda"  # not, where the kernels are emulated
    stream = torch._C._cuda_getCurrentRawStream(like.device.index) if on_gpu else 0
    _op(name)(*args, stream, on_gpu and has_early_launch(like.device))


@functools.cache
def _op(name: str) -> Any:
    return getattr(torch.ops.gemma4_fast_cuda, name).default


@functools.cache
def has_early_launch(device: torch.device) -> bool:
    """Programmatic dependent launch. Not sm_120, where others' graphs of such launches fail (sglang#18596)."""
    return (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


def _whole(x: Tensor) -> Tensor:
    """Contiguous, by a copy where it is not."""
    return x if x.is_contiguous() else x.contiguous()


def _maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else _whole(x)


# ---- norms ----


def accepts_rows(x: Tensor, *_: object) -> str | None:
    return None if x.shape[-1] <= MAX_HIDDEN else f"takes rows of up to {MAX_HIDDEN}, got {x.shape[-1]}"


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = _whole(x)
    out = torch.empty_like(x)
    if x.numel():
        run("rms_norm", x, x, _maybe(weight), out, eps)
    return out


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _norm_add_norm(x, None, residual, (None, None, weight), scale, next_weight, eps, other_weight)


def moe_norm_add_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    experts_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    weights = dense_weight, experts_weight, weight
    return _norm_add_norm(dense, experts, residual, weights, scale, next_weight, eps, None)[:2]


def _norm_add_norm(
    x: Tensor,
    experts: Tensor | None,
    residual: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Tensor],
    scale: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    other_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """weights: x's and the experts' own where there are experts, and the sum's."""
    x = _whole(x)
    y = torch.empty_like(x)
    z, other = (None if w is None else torch.empty_like(x) for w in (next_weight, other_weight))
    if x.numel():
        norms = *map(_maybe, weights), scale, _maybe(next_weight), _maybe(other_weight)
        run("norm_add_norm", x, x, _maybe(experts), _whole(residual), *norms, y, z, other, eps)
    return y, z, other
