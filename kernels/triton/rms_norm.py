"""rms_norm: out = x / sqrt(mean(x^2) + eps) * weight, mean over a row.

x, out [T, H], any of DTYPES (leading axes flattened to T); weight [H] or None. In fp32, rounded once.
Source: Zhang & Sennrich 2019; Gemma 4 multiplies by `weight`, not 1 + weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import cdiv, early, inputs_ready, maybe, pow2, whole


def tile(hidden: int) -> tuple[int, int, int]:
    """Rows of a program, columns, warps. A function of H alone: a row is summed in one order, alone or in a batch."""
    block = pow2(hidden)
    rows = min(16, max(1, 1024 // block))
    return rows, block, min(16, max(1, rows * block // 256))


@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(x_ptr, w_ptr, out_ptr, T, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    inputs_ready()
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK)
    at = t[:, None] * H + h[None, :]  # [ROWS, BLOCK]
    ok = (t < T)[:, None] & (h < H)[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + h, mask=h < H, other=0.0).to(tl.float32)  # on its way while the row is summed
    y = x * tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    if w_ptr is not None:
        y = y * w[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = whole(x)
    out = torch.empty_like(x)
    if x.numel():
        hidden = x.shape[-1]
        tokens = x.numel() // hidden
        rows, block, warps = tile(hidden)
        _rms_norm_kernel[(cdiv(tokens, rows),)](
            x, maybe(weight), out, tokens, hidden, eps, rows, block, num_warps=warps, **early(x)
        )
    return out
