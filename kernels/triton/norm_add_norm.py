"""norm_add_norm: y = (residual + x / rms(x) * weight) * scale, z = y / rms(y) * next_weight.

x, residual, y, z [T, H], any of DTYPES; weight, next_weight [H]; scale [1]. scale None: no factor; next_weight None: no z.
In fp32; y is rounded once, and z is the norm of y as rounded. One pass over memory. Source: Gemma 2 (post-norms).
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
def _norm_add_norm_kernel(x_ptr, res_ptr, w_ptr, scale_ptr, next_ptr, y_ptr, z_ptr, H, eps, BLOCK: tl.constexpr):
    inputs_ready()
    h = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * H + h  # [BLOCK]
    ok = h < H
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    residual = tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + h, mask=ok, other=0.0).to(tl.float32)
    if next_ptr is not None:
        next_w = tl.load(next_ptr + h, mask=ok, other=0.0).to(tl.float32)
    y = residual + x * tl.rsqrt(tl.sum(x * x, 0) / H + eps) * w
    if scale_ptr is not None:
        y = y * tl.load(scale_ptr).to(tl.float32)
    rounded = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, rounded, mask=ok)
    if next_ptr is not None:
        y = rounded.to(tl.float32)
        z = y * tl.rsqrt(tl.sum(y * y, 0) / H + eps) * next_w
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=ok)


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    x = whole(x)
    y = torch.empty_like(x)
    z = None if next_weight is None else torch.empty_like(x)
    if x.numel():
        tokens, hidden = x.shape
        block, warps = tile(hidden)
        args = x, whole(residual), whole(weight), scale, maybe(next_weight), y, z, hidden, eps, block
        _norm_add_norm_kernel[(tokens,)](*args, num_warps=warps, **early(x))
    return y, z
