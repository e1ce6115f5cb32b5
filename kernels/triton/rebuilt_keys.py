"""The keys of a V-only cache: K = RoPE(k_weight * V), for prefill, where each key meets many queries and is worth being made
once

v_cache [B, S, Hkv, D], or [num_blocks, block_size, Hkv, D] with block_table [B, blocks] int32; lens [B] positions; inv_freq
[R] fp32; k_weight [D]. Returns [B, slots, Hkv, D] in v_cache.dtype: the key of slot s of sequence b, unwritten where the slot
is empty.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import cdiv, cos_sin, early, inputs_ready, pow2, whole
from gemma4_fast.triton.split_kv import cache_rows, paging


@triton.jit
def _keys_kernel(
    v_ptr, lens_ptr, table_ptr, freq_ptr, w_ptr, k_ptr, slots, block_size, R, stride_vb, stride_vs, stride_vh, stride_table,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAGED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    b, length = tl.program_id(1), tl.load(lens_ptr + tl.program_id(1)).to(tl.int32)
    if tl.program_id(0) * BLOCK_S >= length:
        return
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    ok = (slot < length) & (slot < slots)
    position = slot + tl.maximum(length - 1 - slot, 0) // slots * slots  # the newest one that lies in the slot
    v_row = cache_rows(
        tl.where(ok, slot, 0), table_ptr, b, slots, block_size, stride_vb, stride_vs, stride_table, PAGED, tl.int64
    )
    k_row = (b.to(tl.int64) * slots + slot) * (KV_HEADS * 2 * HALF)
    r = tl.arange(0, BLOCK_R)
    turns = ok[:, None] & (r < R)[None, :]
    cos, sin = cos_sin(position[:, None], tl.load(freq_ptr + r, mask=r < R, other=0.0)[None, :])  # [BLOCK_S, BLOCK_R]
    w_lo = tl.load(w_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    w_hi = tl.load(w_ptr + HALF + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    for head in range(KV_HEADS):
        v_at, k_at = v_ptr + v_row[:, None] + tl.cast(head, tl.int64) * stride_vh, k_ptr + k_row[:, None] + head * (2 * HALF)
        lo = tl.load(v_at + r[None, :], mask=turns, other=0.0).to(tl.float32) * w_lo
        hi = tl.load(v_at + HALF + r[None, :], mask=turns, other=0.0).to(tl.float32) * w_hi
        tl.store(k_at + r[None, :], (lo * cos - hi * sin).to(k_ptr.dtype.element_ty), mask=turns)
        tl.store(k_at + HALF + r[None, :], (hi * cos + lo * sin).to(k_ptr.dtype.element_ty), mask=turns)
        for c0 in range(0, 2 * HALF, BLOCK_C):  # the columns that do not turn
            c = c0 + tl.arange(0, BLOCK_C)
            plain = ok[:, None] & ((c < 2 * HALF) & (c % HALF >= R))[None, :]
            w = tl.load(w_ptr + c, mask=c < 2 * HALF, other=0.0).to(tl.float32)
            v = tl.load(v_at + c[None, :], mask=plain, other=0.0).to(tl.float32)
            tl.store(k_at + c[None, :], (v * w[None, :]).to(k_ptr.dtype.element_ty), mask=plain)


def rebuilt_keys(v_cache: Tensor, lens: Tensor, block_table: Tensor | None, inv_freq: Tensor, k_weight: Tensor) -> Tensor:
    batch, kv_heads, dim = lens.shape[0], *v_cache.shape[2:]
    slots, block_size, stride_table, paged = paging(v_cache, block_table)
    k = v_cache.new_empty(batch, slots, kv_heads, dim)
    _keys_kernel[(cdiv(slots, 16), batch)](
        v_cache, lens, block_table, whole(inv_freq), whole(k_weight), k, slots, block_size, inv_freq.shape[0],
        *v_cache.stride()[:3], stride_table, KV_HEADS=kv_heads, HALF=dim // 2, PAGED=paged, BLOCK_S=16,
        BLOCK_R=pow2(inv_freq.shape[0], 16), BLOCK_C=128, **early(k),
    )  # fmt: skip
    return k
