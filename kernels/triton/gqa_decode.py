"""gqa_decode: attention of one new token per sequence over its cache,  out[b, h] = softmax(scale q[b, h] K^T) V

q [B, Hq, D]; k_cache, v_cache [B, S, Hkv, D], or [num_blocks, block_size, Hkv, D] with block_table [B, blocks] int32; kv_lens
[B] int; window: only the newest so many positions. k_cache None: K is rebuilt, gqa_decode_v_only.py. How the work is cut and
merged: split_kv.py. Source: Flash-Decoding (Dao et al. 2023), over grouped queries (Ainslie et al. 2023).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import Target, early, inputs_ready, maybe, pow2, target, whole
from gemma4_fast.triton.gqa_decode_v_only import gqa_decode_v_only
from gemma4_fast.triton.split_kv import (
    NODE,
    Splits,
    cache_rows,
    columns_together,
    merged,
    offset_type,
    paging,
    seen,
    shares,
    tile_softmax,
)


@triton.jit
def _tiles_kernel(
    q_ptr, k_ptr, v_ptr, lens_ptr, table_ptr, m_ptr, l_ptr, acc_ptr, scale, window, slots, block_size, splits,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr, PER_SPLIT: tl.constexpr,
    OFFSET: tl.constexpr, NODE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    b, head, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    lo, length, first = seen(lens_ptr, b, slots, window, BLOCK_N, NODE)
    begin = tl.maximum(first + split * PER_SPLIT, lo // BLOCK_N)
    end = tl.minimum(first + (split + 1) * PER_SPLIT, tl.cdiv(length, BLOCK_N))
    if begin >= end:
        return
    d = tl.arange(0, BLOCK_D)
    d_ok = d < D
    g = tl.arange(0, BLOCK_G)
    row = (b * KV_HEADS + head).to(tl.int64) * GROUP + g  # [BLOCK_G] of all query heads of the batch
    q = tl.load(
        q_ptr + row[:, None] * D + d[None, :], mask=(g < GROUP)[:, None] & d_ok[None, :], other=0.0
    )  # [BLOCK_G, BLOCK_D]
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for tile in range(begin, end):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (position >= lo) & (position < length)
        ok = valid[:, None] & d_ok[None, :]
        k_row = cache_rows(position, table_ptr, b, slots, block_size, stride_kb, stride_ks, stride_table, PAGED, OFFSET)
        v_row = cache_rows(position, table_ptr, b, slots, block_size, stride_vb, stride_vs, stride_table, PAGED, OFFSET)
        k = tl.load(
            k_ptr + (k_row + head.to(OFFSET) * stride_kh)[:, None] + d[None, :], mask=ok, other=0.0
        )  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptr + (v_row + head.to(OFFSET) * stride_vh)[:, None] + d[None, :], mask=ok, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_G, BLOCK_N]
        p, m_tile, l_tile = tile_softmax(scores, valid, scale)
        acc_tile = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m, old, new = shares(m, m_tile)
        l = merged(l, old, l_tile, new)
        acc = merged(acc, old[:, None], acc_tile, new[:, None])
    to = row * splits + split
    tl.store(m_ptr + to, m, mask=g < GROUP)
    tl.store(l_ptr + to, l, mask=g < GROUP)
    tl.store(acc_ptr + to[:, None] * D + d[None, :], acc, mask=(g < GROUP)[:, None] & d_ok[None, :])


def tile(dim: int, itemsize: int, t: Target) -> dict[str, Any]:
    """BLOCK_N, warps and stages for a K and a V tile of [BLOCK_N, dim]."""
    if t.kind == "hip":
        return dict(BLOCK_N=16 if dim > 256 else 32, num_warps=4, num_stages=1)
    row = 2 * pow2(dim) * itemsize  # bytes of a position's K and V
    block_n = 64 if row <= 1024 else 32 if 3 * 32 * row <= 2 * t.shared else 16
    return dict(BLOCK_N=block_n, num_warps=4 if dim <= 256 else 8, num_stages=3 if 3 * block_n * row < t.shared // 2 else 2)


def gqa_decode(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    kv_lens, block_table = whole(kv_lens), maybe(block_table)
    if k_cache is None:
        assert inv_freq is not None and k_weight is not None
        return gqa_decode_v_only(q, v_cache, kv_lens, window, block_table, inv_freq, k_weight, scale)
    q, out = whole(q), torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return out
    batch, heads, dim = q.shape
    kv_heads, t = v_cache.shape[2], target(q.device)
    k_cache, v_cache = columns_together(k_cache), columns_together(v_cache)
    sizes = tile(dim, q.element_size(), t)
    slots, block_size, stride_table, paged = paging(v_cache, block_table)
    s = Splits(q, kv_heads, slots, window, sizes["BLOCK_N"], t.cores)
    _tiles_kernel[(batch * kv_heads, s.splits)](
        q, k_cache, v_cache, kv_lens, block_table, s.m, s.l, s.acc, scale, s.window, slots, block_size, s.splits,
        *k_cache.stride()[:3], *v_cache.stride()[:3], stride_table,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=dim, PAGED=paged, PER_SPLIT=s.per_split, NODE=NODE,
        OFFSET=offset_type(k_cache, v_cache), BLOCK_G=pow2(heads // kv_heads, 16), BLOCK_D=pow2(dim, 16), **sizes, **early(q),
    )  # fmt: skip
    return s.merge(kv_lens, out)
