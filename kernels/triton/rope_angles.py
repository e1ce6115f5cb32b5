"""rope_angles: cos[t, i], sin[t, i] = cos, sin(positions[t] * inv_freq[i]).

positions [T] int64; inv_freq [R] fp32, radians per token; cos, sin [T, R] fp32. Source: RoFormer (Su et al. 2021).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import cdiv, cos_sin, early, inputs_ready, pow2, whole

ROWS = 4  # tokens of a program


@triton.jit(do_not_specialize=["T"])
def _rope_angles_kernel(pos_ptr, freq_ptr, cos_ptr, sin_ptr, T, R, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    inputs_ready()
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    position = tl.load(pos_ptr + t, mask=t < T, other=0)
    freq = tl.load(freq_ptr + r, mask=r < R, other=0.0)
    cos, sin = cos_sin(position[:, None], freq[None, :])  # [BLOCK_T, BLOCK_R]
    at = t[:, None] * R + r[None, :]
    ok = (t < T)[:, None] & (r < R)[None, :]
    tl.store(cos_ptr + at, cos, mask=ok)
    tl.store(sin_ptr + at, sin, mask=ok)


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    tokens, pairs = positions.shape[0], inv_freq.shape[0]
    cos, sin = (inv_freq.new_empty(tokens, pairs) for _ in range(2))
    if cos.numel():
        args = whole(positions), whole(inv_freq), cos, sin, tokens, pairs, ROWS, pow2(pairs)
        _rope_angles_kernel[(cdiv(tokens, ROWS),)](*args, num_warps=4, **early(cos))
    return cos, sin
