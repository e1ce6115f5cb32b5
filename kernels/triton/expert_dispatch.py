"""expert_dispatch: sort the M = T K (token, expert) assignments by expert, stably, and cut each expert's rows into tiles.

ids [T, K] int32. order [M] int32: sorted row r is assignment order[r]; offsets [E + 1] int32: expert e owns sorted rows
offsets[e]:offsets[e + 1]; tiles [ceil(M / block_m) + min(E, M), 2] int32: (expert, first sorted row), -1 where there is no
tile. Ids outside [0, E) (experts of another device) are sorted to the end, behind offsets[E], and get no tile.

A counting sort that the host never waits for: counts per expert and block of assignments; for each expert their running sum
over the blocks; then every block knows where its rows begin. Integers, no atomics: the same bits always.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import cdiv, pow2, whole

BLOCK_A = 64  # assignments of a block
BLOCK_E = 64  # experts counted by a program
BLOCK_S = 1024  # blocks summed at once


@triton.jit
def _bucket(ids_ptr, a, M, E):
    """The experts of assignments `a`; E for an id that is none, and E + 1 behind the last assignment."""
    e = tl.load(ids_ptr + a, mask=a < M, other=0)
    return tl.where(a < M, tl.where((e >= 0) & (e < E), e, E), E + 1)


@triton.jit(do_not_specialize=["M", "blocks"])
def _count_kernel(ids_ptr, counts_ptr, M, E, blocks, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts [E + 1, blocks] int32."""
    block = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    own = _bucket(ids_ptr, block * BLOCK_A + tl.arange(0, BLOCK_A), M, E)
    counts = tl.sum((own[:, None] == e[None, :]).to(tl.int32), 0)  # [BLOCK_A, BLOCK_E] -> [BLOCK_E]
    tl.store(counts_ptr + e.to(tl.int64) * blocks + block, counts, mask=e <= E)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(counts_ptr, totals_ptr, blocks, BLOCK_S: tl.constexpr):
    """One program per expert: its counts become the sums of those before them; totals [E + 1] int32 is the sum of all."""
    e = tl.program_id(0)
    row_ptr = counts_ptr + e.to(tl.int64) * blocks
    total = 0
    for start in range(0, blocks, BLOCK_S):
        b = start + tl.arange(0, BLOCK_S)
        counts = tl.load(row_ptr + b, mask=b < blocks, other=0)
        tl.store(row_ptr + b, total + tl.cumsum(counts, 0) - counts, mask=b < blocks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + e, total)


@triton.jit(do_not_specialize=["M", "blocks", "num_tiles"])
def _place_kernel(
    ids_ptr, before_ptr, totals_ptr, order_ptr, offsets_ptr, tiles_ptr, M, E, blocks, num_tiles, block_m,
    BLOCK_A: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Programs [0, E]: one expert's offset and tiles; program E fills up with -1. The others: one block of assignments."""
    e = tl.arange(0, EXPERTS)
    totals = tl.load(totals_ptr + e, mask=e <= E, other=0)
    i = tl.arange(0, BLOCK_A)
    own = tl.program_id(0)
    if own <= E:
        per_expert = tl.where(e < E, (totals + block_m - 1) // block_m, 0)
        row = tl.sum(tl.where(e < own, totals, 0), 0)
        tl.store(offsets_ptr + own, row)
        first = tl.sum(tl.where(e < own, per_expert, 0), 0)
        end = tl.where(own < E, first + tl.sum(tl.where(e == own, per_expert, 0), 0), num_tiles)
        for start in range(first, end, BLOCK_A):
            n = start + i
            tl.store(tiles_ptr + 2 * n, tl.where(own < E, own, -1), mask=n < end)
            tl.store(tiles_ptr + 2 * n + 1, tl.where(own < E, row + (n - first) * block_m, -1), mask=n < end)
    else:
        block = own - E - 1
        a = block * BLOCK_A + i
        ok = a < M
        mine = _bucket(ids_ptr, a, M, E)
        same = (mine[None, :] == mine[:, None]) & (i[None, :] < i[:, None])  # [BLOCK_A, BLOCK_A]: earlier ones of the expert
        rank = tl.sum(same.to(tl.int32), 1)
        starts = tl.gather(tl.cumsum(totals, 0) - totals, tl.where(ok, mine, 0), 0)
        before = tl.load(before_ptr + mine.to(tl.int64) * blocks + block, mask=ok, other=0)
        tl.store(order_ptr + starts + before + rank, a, mask=ok)


def expert_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    ids = whole(ids)
    pairs = ids.numel()
    if pairs == 0:
        return ids.new_empty(0), ids.new_zeros(num_experts + 1), ids.new_empty(0, 2)
    num_tiles, blocks = cdiv(pairs, block_m) + min(num_experts, pairs), cdiv(pairs, BLOCK_A)
    order, offsets, tiles = ids.new_empty(pairs), ids.new_empty(num_experts + 1), ids.new_empty(num_tiles, 2)
    counts, totals = ids.new_empty(num_experts + 1, blocks), ids.new_empty(num_experts + 1)
    _count_kernel[(blocks, cdiv(num_experts + 1, BLOCK_E))](ids, counts, pairs, num_experts, blocks, BLOCK_A, BLOCK_E)
    _scan_kernel[(num_experts + 1,)](counts, totals, blocks, BLOCK_S)
    sizes = pairs, num_experts, blocks, num_tiles, block_m, BLOCK_A, pow2(num_experts + 1)
    _place_kernel[(num_experts + 1 + blocks,)](ids, counts, totals, order, offsets, tiles, *sizes)
    return order, offsets, tiles
