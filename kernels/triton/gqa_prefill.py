"""gqa_prefill: causal attention of new tokens over themselves and over what the cache holds from before them

q [T, Hq, D], k, v [T, Hkv, D], sequences end to end, sequence b in rows cu_seqlens[b] … cu_seqlens[b + 1]; prefix_lens [B]: positions in
the cache, which is as in gqa_decode.py (V-only: its keys are rebuilt first, once for all queries, by rebuilt_keys.py). image_ids
[T] int32: tokens of one image (equal ids >= 0) also see each other forwards; -1: text. out [T, Hq, D]:
  softmax(scale q K^T) V over keys that are (not later, or of the same image) and newer than query - window.
Source: FlashAttention (Dao et al. 2022), over grouped queries (Ainslie et al. 2023).

A program takes BLOCK_M rows of one KV head of one sequence; row r is query head r % GROUP of token r // GROUP. Which sequence it has, it
finds out itself from cu_seqlens, so that the host never waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import LOG2E, Target, cdiv, maybe, pow2, target, whole
from gemma4_fast.triton.gqa_decode import cache_rows, columns_together
from gemma4_fast.triton.rebuilt_keys import rebuilt_keys


@triton.jit
def _attend(scores, v, m, l, acc):  # noqa: E741
    """One tile more. scores [BLOCK_M, BLOCK_N] fp32, base 2, -inf where masked."""
    most = tl.maximum(m, tl.max(scores, 1))
    finite = tl.where(most == float("-inf"), 0.0, most)  # a row that has seen nothing yet
    p = tl.exp2(scores - finite[:, None])
    old = tl.exp2(m - finite)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return most, l * old + tl.sum(p, 1), acc


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, k_cache_ptr, v_cache_ptr, prefix_ptr, table_ptr, image_ptr, out_ptr, scale, window, batch,
    slots, block_size, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, PAGED: tl.constexpr,
    REBUILT: tl.constexpr, IMAGES: tl.constexpr, BATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
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
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if PREFIX:
        prefix = tl.load(prefix_ptr + b).to(tl.int32)
        lo = tl.maximum(prefix - slots, 0)
        if WINDOW:
            lo = tl.maximum(lo, prefix + first - window + 1)
        for p0 in range(lo, prefix, BLOCK_N):
            position = p0 + n
            ok = (position < prefix)[:, None] & d_ok[None, :]
            if REBUILT:  # keys lie in slots, whether the values are paged or not
                k_row = (b.to(tl.int64) * slots + position % slots) * (KV_HEADS * D) + head * D
            else:
                k_row = (
                    cache_rows(position, table_ptr, b, slots, block_size, stride_kb, stride_ks, stride_table, PAGED)
                    + head * stride_kh
                )
            v_row = (
                cache_rows(position, table_ptr, b, slots, block_size, stride_vb, stride_vs, stride_table, PAGED)
                + head * stride_vh
            )
            k = tl.load(k_cache_ptr + k_row[:, None] + d[None, :], mask=ok, other=0.0)  # [BLOCK_N, BLOCK_D]
            v = tl.load(v_cache_ptr + v_row[:, None] + d[None, :], mask=ok, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            sees = (position < prefix)[None, :] & row_ok[:, None]
            if WINDOW:
                sees = sees & (position[None, :] > prefix + token[:, None] - window)
            m, l, acc = _attend(tl.where(sees, scores, float("-inf")), v, m, l, acc)  # noqa: E741

    lo = 0
    if WINDOW:
        lo = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    if IMAGES:
        row_image = tl.load(image_ptr + begin + token, mask=row_ok, other=-1)
        hi = count
    else:
        hi = final + 1
    for j0 in range(lo, hi, BLOCK_N):
        j = j0 + n
        # Tiles in the middle are seen whole; a mask would cost a third of their arithmetic.
        edge = j0 + BLOCK_N > first + 1
        if WINDOW:
            edge = edge | (j0 <= final - window)
        if IMAGES:
            image = tl.load(image_ptr + begin + j, mask=j < count, other=-2)
            same = (image[None, :] == row_image[:, None]) & (row_image >= 0)[:, None]
            wanted = (j0 <= final) | (tl.max(same.to(tl.int32)) > 0)
        else:
            wanted = True
        if wanted:
            at = ((begin + j).to(tl.int64) * KV_HEADS + head) * D
            ok = (j < count)[:, None] & d_ok[None, :]
            k = tl.load(k_ptr + at[:, None] + d[None, :], mask=ok, other=0.0)
            v = tl.load(v_ptr + at[:, None] + d[None, :], mask=ok, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            if edge:
                sees = j[None, :] <= token[:, None]
                if IMAGES:
                    sees = sees | same
                if WINDOW:
                    sees = sees & (j[None, :] > token[:, None] - window)
                scores = tl.where(sees & row_ok[:, None] & (j < count)[None, :], scores, float("-inf"))
            m, l, acc = _attend(scores, v, m, l, acc)  # noqa: E741
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    to = out_ptr + q_at[:, None] * D + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])


def tile(dim: int, itemsize: int, t: Target) -> dict[str, Any]:
    """BLOCK_M, BLOCK_N, warps and stages: the most that shared memory holds. At D = 512 64 rows of 8 warps are what registers hold."""
    if t.kind == "hip":
        return dict(BLOCK_M=64, BLOCK_N=32 if dim <= 256 else 16, num_warps=4 if dim <= 256 else 8, num_stages=1)
    row = pow2(dim) * itemsize
    for block_m, block_n in ((128, 64), (128, 32), (64, 32), (64, 16), (32, 16), (16, 16)):
        if block_m * row + 2 * 2 * block_n * row <= t.shared and block_m * pow2(dim) <= 128 * 256:
            break
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8 if block_m >= 64 else 4, num_stages=2)


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
    q, k, v, cu_seqlens = whole(q), whole(k), whole(v), whole(cu_seqlens)
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    (tokens, heads, dim), kv_heads, batch = q.shape, k.shape[1], cu_seqlens.shape[0] - 1
    sizes, group = tile(dim, q.element_size(), target(q.device)), heads // k.shape[1]
    slots, strides, block_size, rebuilt = 1, (0,) * 6, 1, False
    if v_cache is not None and prefix_lens is not None:
        v_cache, block_table, block_size = columns_together(v_cache), maybe(block_table), v_cache.shape[1]
        slots = block_size * (1 if block_table is None else block_table.shape[1])
        rebuilt = k_cache is None
        if k_cache is None:
            assert inv_freq is not None and k_weight is not None
            k_cache = rebuilt_keys(v_cache, prefix_lens, block_table, slots, inv_freq, k_weight)
        k_cache = columns_together(k_cache)
        strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    tiles = cdiv(tokens * group, sizes["BLOCK_M"]) + batch
    _prefill_kernel[(tiles * kv_heads,)](
        q, k, v, cu_seqlens, k_cache, v_cache, prefix_lens, block_table, maybe(image_ids), out, scale, window or 0, batch,
        slots, block_size, *strides, 0 if block_table is None else block_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, D=dim, WINDOW=window is not None, PREFIX=v_cache is not None,
        PAGED=block_table is not None, REBUILT=rebuilt, IMAGES=image_ids is not None, BATCH=pow2(batch), BLOCK_D=pow2(dim, 16), **sizes,
    )  # fmt: skip
    return out
