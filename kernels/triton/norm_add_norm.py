"""norm_add_norm: y = (residual + x / rms(x) * weight) * scale, z = y / rms(y) * next_weight, and another z by other_weight.

x, residual, y, z [T, H], any of DTYPES; the weights [H]; scale [1]. scale None: no factor; a weight None: no z of it.
moe_norm_add_norm: the same of x = dense / rms(dense) * dense_weight + experts / rms(experts) * experts_weight, all [T, H].
In fp32; y is rounded once, and z is the norm of y as rounded. One pass over memory. Source: Gemma 2 (post-norms), Gemma 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import early, inputs_ready, maybe, pow2, whole


def tile(hidden: int) -> tuple[int, int]:
    """Columns of a program, which has one row, and warps: a thread loads 16 bytes of each bf16 tensor, up to H = 4096."""
    block = pow2(hidden)
    return block, min(16, max(1, block // 256))


@triton.jit
def _row(ptr, at, ok):
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _normed(x, H, eps):
    return x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)


@triton.jit
def _norm_add_norm_kernel(
    x_ptr, experts_ptr, res_ptr, x_w_ptr, experts_w_ptr, w_ptr, scale_ptr, next_ptr, other_ptr, y_ptr, z_ptr, other_z_ptr,
    H, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    h = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * H + h  # [BLOCK]
    ok = h < H
    x, residual, w = _row(x_ptr, at, ok), _row(res_ptr, at, ok), _row(w_ptr, h, ok)
    if experts_ptr is not None:
        experts, x_w, experts_w = _row(experts_ptr, at, ok), _row(x_w_ptr, h, ok), _row(experts_w_ptr, h, ok)
    if next_ptr is not None:  # on their way while the row is summed
        next_w = _row(next_ptr, h, ok)
    if other_ptr is not None:
        other_w = _row(other_ptr, h, ok)
    if experts_ptr is not None:
        x = _normed(x, H, eps) * x_w + _normed(experts, H, eps) * experts_w
    y = residual + _normed(x, H, eps) * w
    if scale_ptr is not None:
        y = y * tl.load(scale_ptr).to(tl.float32)
    rounded = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, rounded, mask=ok)
    if next_ptr is not None or other_ptr is not None:
        z = _normed(rounded.to(tl.float32), H, eps)
        if next_ptr is not None:
            tl.store(z_ptr + at, (z * next_w).to(z_ptr.dtype.element_ty), mask=ok)
        if other_ptr is not None:
            tl.store(other_z_ptr + at, (z * other_w).to(other_z_ptr.dtype.element_ty), mask=ok)


def _launch(
    x: Tensor, experts: Tensor | None, residual: Tensor, weights: tuple[Tensor | None, ...], scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """weights: x's and the experts' own where there are experts, the sum's, and those of the norms of y."""
    x = whole(x)
    x_w, experts_w, w, next_w, other_w = map(maybe, weights)
    y = torch.empty_like(x)
    z, other = (None if v is None else torch.empty_like(x) for v in (next_w, other_w))
    if x.numel():
        tokens, hidden = x.shape
        block, warps = tile(hidden)
        norms = x_w, experts_w, w, scale, next_w, other_w
        args = x, maybe(experts), whole(residual), *norms, y, z, other, hidden, eps, block
        _norm_add_norm_kernel[(tokens,)](*args, num_warps=warps, **early(x))
    return y, z, other


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _launch(x, None, residual, (None, None, weight, next_weight, other_weight), scale, eps)


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
    return _launch(dense, experts, residual, (dense_weight, experts_weight, weight, next_weight, None), scale, eps)[:2]
