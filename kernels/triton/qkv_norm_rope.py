"""qkv_norm_rope: q = RoPE(rms(q) * q_weight), k = RoPE(rms(k) * k_weight), v = rms(v), and the cache write.

qkv [T, (Hq + n Hkv) D], any of DTYPES: n = 2 packs q, k, v; n = 1 q and one projection that is K and V; Hkv = 0 q alone.
q_weight, k_weight [D]; cos, sin [T, R]; q [T, Hq, D]; k, v [T, Hkv, D], or the rows `slots` [T] int64 of k_cache, v_cache
[A, S, Hkv, D] flattened to [A*S, Hkv, D]; a slot outside of that is not written. RoPE's pairs are columns i and i + D/2 for
i < R; the rest stay. In fp32, rounded once. Source: RoFormer (Su et al. 2021), Gemma 3 and 4.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import early, inputs_ready, maybe, pow2, whole


@triton.jit(do_not_specialize=["num_rows"])
def _qkv_norm_rope_kernel(
    qkv_ptr, q_w_ptr, k_w_ptr, cos_ptr, sin_ptr, slots_ptr, q_ptr, k_ptr, v_ptr,
    num_rows, num_heads, Hq, Hkv, R, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, K_IS_V: tl.constexpr,
):  # fmt: skip
    """One program per (token, head of qkv). What a head does not write is masked, so that no load waits for a branch."""
    inputs_ready()
    HALF: tl.constexpr = D // 2
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    i = tl.arange(0, BLOCK)  # a column of each half
    first, second = i < HALF, i < D - HALF
    x_ptr = qkv_ptr + (token * num_heads + head) * D
    a = tl.load(x_ptr + i, mask=first, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF + i, mask=second, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * R + i, mask=i < R, other=1.0)  # columns without a pair are rotated by nothing
    sin = tl.load(sin_ptr + token * R + i, mask=i < R, other=0.0)
    is_q = head < Hq
    w_a = tl.load(q_w_ptr + i, mask=first & is_q, other=0.0).to(tl.float32)
    w_b = tl.load(q_w_ptr + HALF + i, mask=second & is_q, other=0.0).to(tl.float32)
    rms = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
    a, b = a * rms, b * rms
    if v_ptr is not None:
        row = token if slots_ptr is None else tl.load(slots_ptr + token)
        inside = (row >= 0) & (row < num_rows)
        first_v = Hq if K_IS_V else Hq + Hkv
        to_v = v_ptr + (row * Hkv + head - first_v) * D
        ok = inside & (head >= first_v)
        tl.store(to_v + i, a.to(v_ptr.dtype.element_ty), mask=first & ok)
        tl.store(to_v + HALF + i, b.to(v_ptr.dtype.element_ty), mask=second & ok)
        if k_ptr is not None:
            is_k = (head >= Hq) & (head < Hq + Hkv)
            w_a += tl.load(k_w_ptr + i, mask=first & is_k, other=0.0).to(tl.float32)
            w_b += tl.load(k_w_ptr + HALF + i, mask=second & is_k, other=0.0).to(tl.float32)
    a, b = a * w_a, b * w_b
    a, b = a * cos - b * sin, b * cos + a * sin
    to_q = q_ptr + (token * Hq + head) * D
    tl.store(to_q + i, a.to(q_ptr.dtype.element_ty), mask=first & is_q)
    tl.store(to_q + HALF + i, b.to(q_ptr.dtype.element_ty), mask=second & is_q)
    if k_ptr is not None:
        to_k = k_ptr + (row * Hkv + head - Hq) * D
        tl.store(to_k + i, a.to(k_ptr.dtype.element_ty), mask=first & is_k & inside)
        tl.store(to_k + HALF + i, b.to(k_ptr.dtype.element_ty), mask=second & is_k & inside)


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tokens, dim = qkv.shape[0], q_weight.shape[0]
    heads = qkv.shape[1] // dim
    q = qkv.new_empty(tokens, num_q_heads, dim)
    cached = v_cache is not None
    k, v = k_cache, v_cache
    if num_kv_heads and not cached:
        k, v = (qkv.new_empty(tokens, num_kv_heads, dim) for _ in range(2))
    if tokens:
        rows = 0 if v is None else v.numel() // (num_kv_heads * dim)
        tensors = whole(qkv), whole(q_weight), maybe(k_weight), whole(cos.float()), whole(sin.float()), maybe(slots), q, k, v
        sizes = rows, heads, num_q_heads, num_kv_heads, cos.shape[1], eps, dim, pow2(dim - dim // 2)
        _qkv_norm_rope_kernel[(tokens * heads,)](*tensors, *sizes, heads == num_q_heads + num_kv_heads, num_warps=1, **early(q))
    return (q, None, None) if cached else (q, k, v)
