"""gqa_prefill: causal attention of new tokens over themselves and over what the cache holds from before them

q [T, Hq, D], k, v [T, Hkv, D], sequences end to end, sequence b in rows cu_seqlens[b] … cu_seqlens[b + 1]; prefix_lens [B]:
positions in the cache, which is as in split_kv.py (V-only: its keys are rebuilt first, once for all queries, by
rebuilt_keys.py). image_ids [T] int32: tokens of one image (equal ids >= 0) also see each other forwards; -1: text. out [T,
Hq, D]:
  softmax(scale q K^T) V over keys that are (not later, or of the same image) and newer than query - window.
Source: FlashAttention (Dao et al. 2022), over grouped queries (Ainslie et al. 2023).

A program takes BLOCK_M rows of one KV head of one sequence; row r is query head r % GROUP of token r // GROUP. Which sequence
it has, it finds out itself from cu_seqlens, so that the host never waits for them. The cache and the new tokens have a launch
each, whose results a third merges: with both loops in one kernel, or results in fp32, the registers run over.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import LOG2E, Target, cdiv, early, inputs_ready, maybe, pow2, target, whole
from gemma4_fast.triton.rebuilt_keys import rebuilt_keys
from gemma4_fast.triton.split_kv import cache_rows, columns_together, offset_type, paging


@triton.jit
def _attend(scores, v, m, l, acc):
    """One tile more. scores [BLOCK_M, BLOCK_N] fp32, base 2, -inf where masked."""
    most = tl.maximum(m, tl.max(scores, 1))
    finite = tl.where(most == float("-inf"), 0.0, most)  # a row that has seen nothing yet
    p = tl.exp2(scores - finite[:, None])
    old = tl.exp2(m - finite)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return most, l * old + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["batch"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, prefix_ptr, table_ptr, image_ptr, lse_ptr, out_ptr, scale, window, batch,
    slots, block_size, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CACHE: tl.constexpr,
    PARTIAL: tl.constexpr, PAGED: tl.constexpr, K_PAGED: tl.constexpr, ALIKE: tl.constexpr, OFFSET: tl.constexpr,
    IMAGES: tl.constexpr, BATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    index, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    some = tl.arange(0, BATCH)
    begins = tl.load(cu_ptr + some, mask=some < batch, other=0)
    ends = tl.load(cu_ptr + some + 1, mask=some < batch, other=0)
    last = tl.cumsum(tl.cdiv((ends - begins) * GROUP, BLOCK_M), 0)  # [BATCH]: number of tiles up to and with each sequence
    if index >= tl.max(last, 0):
        return
    b = tl.sum((last <= index).to(tl.int32), 0)
    index = index - tl.max(tl.where(last <= index, last, 0), 0)
    begin = tl.load(cu_ptr + b)
    count = tl.load(cu_ptr + b + 1) - begin
    index = tl.cdiv(count * GROUP, BLOCK_M) - 1 - index  # the longest first
    row = index * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP  # [BLOCK_M] of the sequence's new ones
    row_ok = token < count
    first, final = index * BLOCK_M // GROUP, tl.minimum((index * BLOCK_M + BLOCK_M - 1) // GROUP, count - 1)
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    d_ok = d < D
    q_at = ((begin + token).to(tl.int64) * KV_HEADS + head) * GROUP + row % GROUP  # of all heads of all tokens
    q = tl.load(q_ptr + q_at[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if CACHE:
        prefix = tl.load(prefix_ptr + b).to(tl.int32)
        lo = tl.maximum(prefix - slots, 0)
        if WINDOW:
            lo = tl.maximum(lo, prefix + first - window + 1)
        for p0 in range(lo, prefix, BLOCK_N):
            position = p0 + n
            n_ok = (position < prefix)[:, None] & d_ok[None, :]
            v_row = cache_rows(position, table_ptr, b, slots, block_size, stride_vb, stride_vs, stride_table, PAGED, OFFSET)
            v_row += head.to(OFFSET) * stride_vh
            if ALIKE:
                k_row = v_row
            else:
                k_row = cache_rows(
                    position, table_ptr, b, slots, block_size, stride_kb, stride_ks, stride_table, K_PAGED, OFFSET
                )
                k_row += head.to(OFFSET) * stride_kh
            k = tl.load(k_ptr + k_row[:, None] + d[None, :], mask=n_ok, other=0.0)  # [BLOCK_N, BLOCK_D]
            v = tl.load(v_ptr + v_row[:, None] + d[None, :], mask=n_ok, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            sees = (position < prefix)[None, :]
            if WINDOW:
                sees = sees & (position[None, :] > prefix + token[:, None] - window)
            m, l, acc = _attend(tl.where(sees, scores, float("-inf")), v, m, l, acc)
    else:
        lo = 0
        if WINDOW:
            lo = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        hi = final + 1
        if IMAGES:
            row_image = tl.load(image_ptr + begin + token, mask=row_ok, other=-1)
            for j0 in range(hi, count, BLOCK_N):  # how far behind the diagonal the images reach
                image = tl.load(image_ptr + begin + j0 + n, mask=j0 + n < count, other=-2)
                same = (image[None, :] == row_image[:, None]) & (row_image >= 0)[:, None]
                hi = tl.where(tl.max(tl.max(same.to(tl.int32), 1), 0) > 0, tl.minimum(j0 + BLOCK_N, count), hi)
        for j0 in range(lo, hi, BLOCK_N):
            j = j0 + n
            at = ((begin + j).to(tl.int64) * KV_HEADS + head) * D
            n_ok = (j < count)[:, None] & d_ok[None, :]
            k = tl.load(k_ptr + at[:, None] + d[None, :], mask=n_ok, other=0.0)
            v = tl.load(v_ptr + at[:, None] + d[None, :], mask=n_ok, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            # Tiles in the middle are seen whole; a mask would cost a third of their arithmetic.
            edge = j0 + BLOCK_N > first + 1
            if WINDOW:
                edge = edge | (j0 <= final - window)
            if edge:
                sees = j[None, :] <= token[:, None]
                if IMAGES:
                    image = tl.load(image_ptr + begin + j, mask=j < count, other=-2)
                    sees = sees | ((image[None, :] == row_image[:, None]) & (row_image >= 0)[:, None])
                if WINDOW:
                    sees = sees & (j[None, :] > token[:, None] - window)
                scores = tl.where(sees, scores, float("-inf"))
            m, l, acc = _attend(scores, v, m, l, acc)

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    to = out_ptr + q_at[:, None] * D + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])
    if PARTIAL:
        tl.store(lse_ptr + q_at, m + tl.log2(l), mask=row_ok)


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(lse_ptr, part_ptr, out_ptr, rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Two parts [2, rows, D], and their log-sums [2, rows] (base 2) -> out [rows, D]."""
    inputs_ready()
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    ok = (row < rows)[:, None] & (d < D)[None, :]
    lse_0 = tl.load(lse_ptr + row, mask=row < rows, other=0.0)  # of the cache: -inf if a query saw nothing there
    lse_1 = tl.load(lse_ptr + rows + row, mask=row < rows, other=0.0)  # of the new tokens: each sees itself
    most = tl.maximum(lse_0, lse_1)
    share_0, share_1 = tl.exp2(lse_0 - most), tl.exp2(lse_1 - most)
    total = share_0 + share_1
    at = row[:, None] * D + d[None, :]
    out = tl.load(part_ptr + at, mask=ok, other=0.0).to(tl.float32) * (share_0 / total)[:, None]
    out += tl.load(part_ptr + rows.to(tl.int64) * D + at, mask=ok, other=0.0).to(tl.float32) * (share_1 / total)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=ok)


def tile(dim: int, itemsize: int, plain: bool, t: Target) -> dict[str, Any]:
    """BLOCK_M, BLOCK_N, warps and stages: the most that shared memory and registers hold, see tests/triton_compiled.txt.
    `plain`: new tokens alone, without images; the rest needs more registers."""
    if t.kind == "hip":
        return dict(
            BLOCK_M=64 if dim <= 256 else 32, BLOCK_N=32 if dim <= 256 else 16, num_warps=4 if dim <= 256 else 8, num_stages=1
        )
    row, hopper = pow2(dim) * itemsize, 90 <= t.arch < 120  # and the large Blackwells
    if row > 1024:
        return dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)
    if row > 512:
        return dict(BLOCK_M=64 if hopper else 32, BLOCK_N=32, num_warps=8, num_stages=2)
    if t.shared < 160_000:
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2)
    return dict(BLOCK_M=128 if hopper else 64, BLOCK_N=64 if plain or not hopper else 32, num_warps=8, num_stages=2)


def gqa_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    q, k, v, cu_seqlens, image_ids = whole(q), whole(k), whole(v), whole(cu_seqlens), maybe(image_ids)
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    (tokens, heads, dim), kv_heads, batch = q.shape, k.shape[1], cu_seqlens.shape[0] - 1
    group, cached = heads // kv_heads, v_cache is not None
    sizes = tile(dim, q.element_size(), not cached and image_ids is None, target(q.device))
    grid = ((cdiv(tokens * group, sizes["BLOCK_M"]) + batch) * kv_heads,)
    flags = dict(
        KV_HEADS=kv_heads,
        GROUP=group,
        D=dim,
        WINDOW=window is not None,
        BATCH=pow2(batch),
        BLOCK_D=pow2(dim, 16),
        **sizes,
        **early(q),
    )
    lse, parts = None, [out]
    if v_cache is not None and prefix_lens is not None:
        lse = q.new_empty(2, tokens, heads, dtype=torch.float32)
        parts = [*q.new_empty(2, *q.shape)]
        v_cache, block_table, prefix_lens = columns_together(v_cache), maybe(block_table), whole(prefix_lens)
        slots, block_size, stride_table, paged = paging(v_cache, block_table)
        rebuilt = k_cache is None
        if k_cache is None:
            assert inv_freq is not None and k_weight is not None
            k_cache = rebuilt_keys(v_cache, prefix_lens, block_table, inv_freq, k_weight)
        k_cache = columns_together(k_cache)
        strides = *k_cache.stride()[:3], *v_cache.stride()[:3], stride_table
        _prefill_kernel[grid](
            q, k_cache, v_cache, cu_seqlens, prefix_lens, block_table, None, lse[0], parts[0], scale, window or 0, batch,
            slots, block_size, *strides, CACHE=True, PARTIAL=True, PAGED=paged, K_PAGED=paged and not rebuilt,
            ALIKE=strides[:3] == strides[3:6] and not (paged and rebuilt), OFFSET=offset_type(k_cache, v_cache), IMAGES=False,
            **flags,
        )  # fmt: skip
    _prefill_kernel[grid](
        q, k, v, cu_seqlens, None, None, image_ids, None if lse is None else lse[1], parts[-1], scale, window or 0, batch,
        1, 1, *(0,) * 7, CACHE=False, PARTIAL=cached, PAGED=False, K_PAGED=False, ALIKE=True, OFFSET=tl.int32,
        IMAGES=image_ids is not None, **flags,
    )  # fmt: skip
    if cached:
        rows = tokens * heads
        _merge_kernel[(cdiv(rows, 8),)](lse, parts[0], out, rows, D=dim, BLOCK_R=8, BLOCK_D=pow2(dim), num_warps=4, **early(q))
    return out
