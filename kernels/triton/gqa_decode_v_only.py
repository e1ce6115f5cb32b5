"""gqa_decode over a V-only cache: K = RoPE(w * V) is rebuilt in the kernel, so that half the bytes are read

Where V = rms(x) and K = RoPE(rms(x) * w) come from one projection (Gemma 4's full layers), K needs no memory. v_cache as in
gqa_decode.py; how the work is cut and merged: split_kv.py; inv_freq [R] fp32, the rotary pairs (i, i + D/2), i < R; k_weight
[D].

Two thirds of a key's work are saved by algebra. Columns that do not rotate: q . (w * v) = (q * w) . v, so w goes into q,
once, and v is the key. Pairs that do, at position p = t + o of the tile that begins at t: q . R(p) k = (R(-t) q) . (R(o) k),
so q is turned back by t once a tile, and the keys by their offset o in the tile alone, whose angles are the same for all
tiles: a table [BLOCK_N, R]. The head's columns are therefore taken in up to six pieces: the rotating lo and hi, and what lies
behind each, in two powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import Target, cos_sin, early, inputs_ready, once_a_step, pow2, target, whole
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
def _angles_kernel(freq_ptr, cos_ptr, sin_ptr, R, BLOCK_R: tl.constexpr):
    """One offset in a tile. Columns behind R do not rotate: cos 1, sin 0."""
    inputs_ready()
    i, r = tl.program_id(0), tl.arange(0, BLOCK_R)
    cos, sin = cos_sin(i + tl.zeros([BLOCK_R], tl.int32), tl.load(freq_ptr + r, mask=r < R, other=0.0))
    tl.store(cos_ptr + i * BLOCK_R + r, cos)
    tl.store(sin_ptr + i * BLOCK_R + r, sin)


@triton.jit
def _piece(ptr, row, row_ok, first, limit, SIZE: tl.constexpr):
    """Columns [first, first + SIZE) of rows [N] at offsets `row`, 0 from `limit` on."""
    c = first + tl.arange(0, SIZE)
    return tl.load(ptr + row[:, None] + c[None, :], mask=row_ok[:, None] & (c < limit)[None, :], other=0.0)


@triton.jit
def _weighted(q_ptr, row, row_ok, w_ptr, first, limit, SIZE: tl.constexpr):
    """q * w of these columns, rounded to q's dtype."""
    c = first + tl.arange(0, SIZE)
    w = tl.load(w_ptr + c, mask=c < limit, other=0.0).to(tl.float32)
    q = _piece(q_ptr, row, row_ok, first, limit, SIZE)
    return (q.to(tl.float32) * w[None, :]).to(q.dtype)


@triton.jit
def _store(acc_ptr, row, row_ok, first, limit, acc, SIZE: tl.constexpr):
    c = first + tl.arange(0, SIZE)
    tl.store(acc_ptr + row[:, None] + c[None, :], acc, mask=row_ok[:, None] & (c < limit)[None, :])


@triton.jit
def _tiles_kernel(
    q_ptr, v_ptr, w_ptr, freq_ptr, cos_ptr, sin_ptr, lens_ptr, table_ptr, m_ptr, l_ptr, acc_ptr, scale, window, slots,
    block_size, splits, R, stride_vb, stride_vs, stride_vh, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr, PER_SPLIT: tl.constexpr,
    OFFSET: tl.constexpr, NODE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    REST_1: tl.constexpr, REST_2: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    b, head, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    lo, length, first = seen(lens_ptr, b, slots, window, BLOCK_N, NODE)
    begin = tl.maximum(first + split * PER_SPLIT, lo // BLOCK_N)
    end = tl.minimum(first + (split + 1) * PER_SPLIT, tl.cdiv(length, BLOCK_N))
    if begin >= end:
        return
    HALF: tl.constexpr = D // 2
    g = tl.arange(0, BLOCK_G)
    g_ok = g < GROUP
    row = (b * KV_HEADS + head).to(tl.int64) * GROUP + g
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    q_lo = _piece(q_ptr, row * D, g_ok, 0, HALF, BLOCK_R).to(tl.float32)  # [BLOCK_G, BLOCK_R]
    q_hi = _piece(q_ptr, row * D, g_ok, HALF, D, BLOCK_R).to(tl.float32)
    w_lo = tl.load(w_ptr + r, mask=r < HALF, other=0.0).to(tl.float32)
    w_hi = tl.load(w_ptr + HALF + r, mask=r < HALF, other=0.0).to(tl.float32)
    freq = tl.load(freq_ptr + r, mask=r < R, other=0.0)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc_lo, acc_hi = tl.zeros([BLOCK_G, BLOCK_R], tl.float32), tl.zeros([BLOCK_G, BLOCK_R], tl.float32)
    if REST_1:
        q_lo1 = _weighted(q_ptr, row * D, g_ok, w_ptr, BLOCK_R, HALF, REST_1)
        q_hi1 = _weighted(q_ptr, row * D, g_ok, w_ptr, HALF + BLOCK_R, D, REST_1)
        acc_lo1, acc_hi1 = tl.zeros([BLOCK_G, REST_1], tl.float32), tl.zeros([BLOCK_G, REST_1], tl.float32)
    if REST_2:
        q_lo2 = _weighted(q_ptr, row * D, g_ok, w_ptr, BLOCK_R + REST_1, HALF, REST_2)
        q_hi2 = _weighted(q_ptr, row * D, g_ok, w_ptr, HALF + BLOCK_R + REST_1, D, REST_2)
        acc_lo2, acc_hi2 = tl.zeros([BLOCK_G, REST_2], tl.float32), tl.zeros([BLOCK_G, REST_2], tl.float32)
    for t in range(begin, end):
        position = t * BLOCK_N + n
        valid = (position >= lo) & (position < length)
        at = (
            cache_rows(position, table_ptr, b, slots, block_size, stride_vb, stride_vs, stride_table, PAGED, OFFSET)
            + head.to(OFFSET) * stride_vh
        )
        v_lo = _piece(v_ptr, at, valid, 0, HALF, BLOCK_R)  # [BLOCK_N, BLOCK_R]
        v_hi = _piece(v_ptr, at, valid, HALF, D, BLOCK_R)
        cos, sin = cos_sin(t * BLOCK_N + tl.zeros([BLOCK_R], tl.int32), freq)
        back_lo = (q_lo * cos[None, :] + q_hi * sin[None, :]).to(v_lo.dtype)  # R(-t) q
        back_hi = (q_hi * cos[None, :] - q_lo * sin[None, :]).to(v_lo.dtype)
        cos = tl.load(cos_ptr + n[:, None] * BLOCK_R + r[None, :])  # [BLOCK_N, BLOCK_R]; kept over the loop, they would spill
        sin = tl.load(sin_ptr + n[:, None] * BLOCK_R + r[None, :])
        k_lo, k_hi = v_lo.to(tl.float32) * w_lo[None, :], v_hi.to(tl.float32) * w_hi[None, :]
        turned_lo = (k_lo * cos - k_hi * sin).to(v_lo.dtype)
        turned_hi = (k_hi * cos + k_lo * sin).to(v_lo.dtype)
        scores = tl.dot(back_lo, tl.trans(turned_lo), input_precision="ieee")  # [BLOCK_G, BLOCK_N]
        scores = tl.dot(back_hi, tl.trans(turned_hi), scores, input_precision="ieee")
        if REST_1:
            v_lo1 = _piece(v_ptr, at, valid, BLOCK_R, HALF, REST_1)
            v_hi1 = _piece(v_ptr, at, valid, HALF + BLOCK_R, D, REST_1)
            scores = tl.dot(q_lo1, tl.trans(v_lo1), scores, input_precision="ieee")
            scores = tl.dot(q_hi1, tl.trans(v_hi1), scores, input_precision="ieee")
        if REST_2:
            v_lo2 = _piece(v_ptr, at, valid, BLOCK_R + REST_1, HALF, REST_2)
            v_hi2 = _piece(v_ptr, at, valid, HALF + BLOCK_R + REST_1, D, REST_2)
            scores = tl.dot(q_lo2, tl.trans(v_lo2), scores, input_precision="ieee")
            scores = tl.dot(q_hi2, tl.trans(v_hi2), scores, input_precision="ieee")
        p, m_tile, l_tile = tile_softmax(scores, valid, scale)
        p = p.to(v_lo.dtype)
        m, old, new = shares(m, m_tile)
        l = merged(l, old, l_tile, new)
        old, new = old[:, None], new[:, None]
        acc_lo = merged(acc_lo, old, tl.dot(p, v_lo, input_precision="ieee"), new)
        acc_hi = merged(acc_hi, old, tl.dot(p, v_hi, input_precision="ieee"), new)
        if REST_1:
            acc_lo1 = merged(acc_lo1, old, tl.dot(p, v_lo1, input_precision="ieee"), new)
            acc_hi1 = merged(acc_hi1, old, tl.dot(p, v_hi1, input_precision="ieee"), new)
        if REST_2:
            acc_lo2 = merged(acc_lo2, old, tl.dot(p, v_lo2, input_precision="ieee"), new)
            acc_hi2 = merged(acc_hi2, old, tl.dot(p, v_hi2, input_precision="ieee"), new)
    to = row * splits + split
    tl.store(m_ptr + to, m, mask=g_ok)
    tl.store(l_ptr + to, l, mask=g_ok)
    _store(acc_ptr, to * D, g_ok, 0, HALF, acc_lo, BLOCK_R)
    _store(acc_ptr, to * D, g_ok, HALF, D, acc_hi, BLOCK_R)
    if REST_1:
        _store(acc_ptr, to * D, g_ok, BLOCK_R, HALF, acc_lo1, REST_1)
        _store(acc_ptr, to * D, g_ok, HALF + BLOCK_R, D, acc_hi1, REST_1)
    if REST_2:
        _store(acc_ptr, to * D, g_ok, BLOCK_R + REST_1, HALF, acc_lo2, REST_2)
        _store(acc_ptr, to * D, g_ok, HALF + BLOCK_R + REST_1, D, acc_hi2, REST_2)


def pieces(dim: int, pairs: int) -> tuple[int, int, int]:
    """BLOCK_R, REST_1, REST_2: half a head's columns as the rotating ones, and the rest as two powers of two. 512: 64, 128, 64.

    tl.dot sums over at least 16 columns; of more than 128 the registers run over.
    """
    block_r = pow2(pairs, 16)
    rest = max(0, dim // 2 - block_r)
    first = min(128, max(16, 1 << rest.bit_length() - 1)) if rest else 0
    return block_r, first, pow2(rest - first, 16) if rest > first else 0


def tile(itemsize: int, t: Target) -> dict[str, Any]:
    """BLOCK_N, warps and stages for a V tile of [BLOCK_N, D]: 96,512 bytes of shared memory at D = 512, two stages."""
    if t.kind == "hip":
        return dict(BLOCK_N=16, num_warps=4, num_stages=1)
    return dict(BLOCK_N=64 if itemsize == 2 else 16, num_warps=8, num_stages=2)


def angles(inv_freq: Tensor, block_n: int, block_r: int) -> tuple[Tensor, Tensor]:
    """cos, sin [block_n, block_r] fp32 of the offsets in a tile."""
    cos, sin = (inv_freq.new_empty(block_n, block_r) for _ in range(2))
    _angles_kernel[(block_n,)](whole(inv_freq), cos, sin, inv_freq.shape[0], BLOCK_R=block_r, num_warps=1, **early(cos))
    return cos, sin


def gqa_decode_v_only(
    q: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None,
    block_table: Tensor | None,
    inv_freq: Tensor,
    k_weight: Tensor,
    scale: float,
) -> Tensor:
    q, out = whole(q), torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return out
    batch, heads, dim = q.shape
    kv_heads, t, pairs = v_cache.shape[2], target(q.device), inv_freq.shape[0]
    v_cache = columns_together(v_cache)
    block_r, rest_1, rest_2 = pieces(dim, pairs)
    sizes = tile(q.element_size(), t)
    cos, sin = once_a_step(angles, inv_freq, sizes["BLOCK_N"], block_r)
    slots, block_size, stride_table, paged = paging(v_cache, block_table)
    s = Splits(q, kv_heads, slots, window, sizes["BLOCK_N"], t.cores)
    _tiles_kernel[(batch * kv_heads, s.splits)](
        q, v_cache, whole(k_weight), whole(inv_freq), cos, sin, kv_lens, block_table, s.m, s.l, s.acc, scale, s.window, slots,
        block_size, s.splits, pairs, *v_cache.stride()[:3], stride_table,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=dim, PAGED=paged, PER_SPLIT=s.per_split, NODE=NODE,
        OFFSET=offset_type(v_cache), BLOCK_G=pow2(heads // kv_heads, 16), BLOCK_R=block_r, REST_1=rest_1, REST_2=rest_2,
        **sizes, **early(q),
    )  # fmt: skip
    return s.merge(kv_lens, out)
