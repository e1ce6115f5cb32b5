"""What attention over a cache shares: where a position lies, and how one new token's work is cut and merged

A cache [B, S, Hkv, D], or [num_blocks, block_size, Hkv, D] with block_table [B, blocks] int32; position p lies in slot p mod S.

A decode call's cache is cut where it does not depend on who else is in the batch, into tiles of BLOCK_N positions and nodes of
NODE. A program takes one node, or if those are too few for the machine one tile; the Hq / Hkv query heads of a KV head are the
rows of its products. Sums and maxima are merged tile by tile into their node, and the nodes by a second kernel, in the same
order and with the same operations whoever does it: a sequence gets the same bits alone and in a batch. Partial sums: fp32 [B,
Hq, splits, D], and m, l [B, Hq, splits]. Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import LOG2E, cdiv, early, inputs_ready, pow2

NODE = 512  # positions


@triton.jit
def seen(lens_ptr, b, slots, window, BLOCK_N: tl.constexpr, NODE: tl.constexpr):
    """The newest positions [lo, length) that sequence b has in its cache and its query sees; the first tile of lo's node."""
    length = tl.load(lens_ptr + b).to(tl.int32)
    lo = tl.maximum(length - tl.minimum(slots, window), 0)
    return lo, length, (lo // NODE) * (NODE // BLOCK_N)


@triton.jit
def cache_rows(
    position, table_ptr, b, slots, block_size, stride_b, stride_s, stride_table, PAGED: tl.constexpr, OFFSET: tl.constexpr
):
    """Offsets of positions [N] in a cache, as `offset_type` of it: where 32 bits hold them, they take half the registers."""
    slot = position % slots
    if PAGED:
        block = tl.load(table_ptr + b * stride_table + slot // block_size).to(OFFSET)
        return block * stride_b + (slot % block_size).to(OFFSET) * stride_s
    else:
        return b.to(OFFSET) * stride_b + slot.to(OFFSET) * stride_s


@triton.jit
def tile_softmax(scores, valid, scale):
    """Scores [M, N] fp32 -> weights relative to the tile's largest, that (base 2), and their sum. A tile has a valid column."""
    s = tl.where(valid[None, :], scores * (scale * LOG2E), float("-inf"))
    m = tl.max(s, 1)
    p = tl.exp2(s - m[:, None])
    return p, m, tl.sum(p, 1)


@triton.jit
def shares(m, m_new):
    """The larger maximum, and by what (l, acc) of two parts are multiplied when they are merged; 0 for a part that is empty."""
    most = tl.maximum(m, m_new)
    finite = tl.where(most == float("-inf"), 0.0, most)
    return most, tl.exp2(m - finite), tl.exp2(m_new - finite)


@triton.jit
def merged(x, share, x_new, share_new):
    """One rounding, then a fused one: the compiler is left no choice, so that every kernel gets the same bits."""
    return tl.fma(x, share, x_new * share_new)


@triton.jit
def _merge_kernel(
    m_ptr, l_ptr, acc_ptr, lens_ptr, out_ptr, window, slots, splits,
    HEADS: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, PER_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
    NODE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    row = tl.program_id(0).to(tl.int64)  # a query head of a sequence
    lo, length, first = seen(lens_ptr, (row // HEADS).to(tl.int32), slots, window, BLOCK_N, NODE)
    first_tile, end_tile = lo // BLOCK_N - first, tl.cdiv(length, BLOCK_N) - first
    PARTS: tl.constexpr = TILES // PER_SPLIT  # splits of a node: 1, or its tiles
    nodes = tl.cdiv(end_tile, TILES)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    most = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for s0 in range(0, nodes * PARTS, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        there = (s * PER_SPLIT + PER_SPLIT > first_tile) & (s * PER_SPLIT < end_tile)
        most = tl.maximum(most, tl.load(m_ptr + row * splits + s, mask=there, other=float("-inf")))
    largest = tl.max(most, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([BLOCK_D], tl.float32)
    weight = 0.0
    for n0 in range(0, nodes, BLOCK_S):
        m = tl.full([BLOCK_S], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for part in tl.static_range(PARTS):  # as a program that takes a whole node does it
            s = (n0 + tl.arange(0, BLOCK_S)) * PARTS + part
            there = (s * PER_SPLIT + PER_SPLIT > first_tile) & (s * PER_SPLIT < end_tile)
            at = row * splits + s
            m_new = tl.load(m_ptr + at, mask=there, other=float("-inf"))
            l_new = tl.load(l_ptr + at, mask=there, other=0.0)
            acc_new = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
            m, old, new = shares(m, m_new)
            l = merged(l, old, l_new, new)
            acc = merged(acc, old[:, None], acc_new, new[:, None])
        share = tl.exp2(m - largest)
        total += tl.sum(acc * share[:, None], 0)
        weight += tl.sum(l * share, 0)
    out = total / tl.where(length == 0, 1.0, weight)  # an idle row: 0
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


class Splits:
    """How a call's work is cut, and where its parts' results go."""

    def __init__(self, q: Tensor, kv_heads: int, slots: int, window: int | None, block_n: int, cores: int) -> None:
        self.batch, self.heads, self.dim = q.shape
        self.slots, self.window, self.block_n = slots, min(window or slots, slots), block_n
        nodes = cdiv(self.window, NODE) + 1  # they are cut at multiples of NODE, wherever the window begins
        self.tiles = NODE // block_n
        # Whole nodes, if they are enough to give three of four multiprocessors one; else tiles.
        self.per_split = self.tiles if 4 * self.batch * kv_heads * (nodes - 1) >= 3 * cores else 1
        self.splits = nodes * (self.tiles // self.per_split)
        self.m, self.l = (q.new_empty(self.batch, self.heads, self.splits, dtype=torch.float32) for _ in range(2))
        self.acc = q.new_empty(self.batch, self.heads, self.splits, self.dim, dtype=torch.float32)

    def merge(self, lens: Tensor, out: Tensor) -> Tensor:
        block_d = min(64, pow2(self.dim))
        _merge_kernel[(self.batch * self.heads, cdiv(self.dim, block_d))](
            self.m, self.l, self.acc, lens, out, self.window, self.slots, self.splits, HEADS=self.heads, D=self.dim,
            TILES=self.tiles, PER_SPLIT=self.per_split, BLOCK_N=self.block_n, NODE=NODE, BLOCK_S=16, BLOCK_D=block_d,
            num_warps=4, **early(out),
        )  # fmt: skip
        return out


def offset_type(*caches: Tensor) -> Any:
    """Of offsets into these caches, which may be views: 32 bits if they hold them all."""
    spans = (sum((size - 1) * stride for size, stride in zip(c.shape, c.stride(), strict=True)) for c in caches)
    return tl.int32 if max(spans) < 2**31 else tl.int64


def columns_together(x: Tensor) -> Tensor:
    """A cache whose columns lie together; the rest may be a view."""
    return x if x.stride(-1) == 1 else x.contiguous()


def paging(cache: Tensor, block_table: Tensor | None) -> tuple[int, int, int, bool]:
    """Slots of a sequence, those of a block, the table's stride, and whether there is a table."""
    size = cache.shape[1]
    return (size, size, 0, False) if block_table is None else (size * block_table.shape[1], size, block_table.stride(0), True)
