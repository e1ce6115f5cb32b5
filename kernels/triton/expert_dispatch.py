"""expert_dispatch: sort the M = T K (token, expert) assignments by expert, stably, and cut each expert's rows into tiles.

ids [T, K] int32. order [M] int32: sorted row r is assignment order[r]; offsets [E + 1] int32: expert e owns sorted rows
offsets[e]:offsets[e + 1]; tiles [ceil(M / block_m) + min(E, M), 2] int32: (expert, first sorted row), -1 where there is no
tile. Ids outside [0, E) (experts of another device) are sorted to the end, behind offsets[E], and get no tile.

One launch, for which the host never waits: each expert's program counts all experts' assignments, which tells it where its own
rows and tiles begin, then places its own. That reads the ids 2 (E + 1) times, from the L2 cache: 4 bytes an assignment, of
which the product that follows reads thousands. A histogram adds atomically, but integers: the same result always.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import cdiv, early, inputs_ready, pow2, whole

BLOCK_T = 64  # tiles written at once


def tile(pairs: int) -> tuple[int, int]:
    """Assignments looked at at once, and warps."""
    return (1024, 4) if pairs <= 1024 else (4096, 8)


@triton.jit
def _bucket(ids_ptr, a, M, E):
    """The experts of assignments `a`; E for an id that is none, and E + 1 behind the last assignment."""
    e = tl.load(ids_ptr + a, mask=a < M, other=0)
    return tl.where(a < M, tl.where((e >= 0) & (e < E), e, E), E + 1)


@triton.jit(do_not_specialize=["M", "num_tiles"])
def _dispatch_kernel(
    ids_ptr, order_ptr, offsets_ptr, tiles_ptr, M, E, num_tiles, block_m,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Program own < E: one expert's offset, tiles and rows. Program E: the rows of no expert, and tiles of -1."""
    inputs_ready()
    own = tl.program_id(0)
    e, i = tl.arange(0, BUCKETS), tl.arange(0, BLOCK_A)
    counts = tl.zeros([BUCKETS], tl.int32)
    for a0 in range(0, M, BLOCK_A):
        counts += tl.histogram(_bucket(ids_ptr, a0 + i, M, E), BUCKETS)
    row = tl.sum(tl.where(e < own, counts, 0), 0)
    tl.store(offsets_ptr + own, row)

    per_expert = tl.where(e < E, (counts + block_m - 1) // block_m, 0)
    first = tl.sum(tl.where(e < own, per_expert, 0), 0)
    end = tl.where(own < E, first + tl.sum(tl.where(e == own, per_expert, 0), 0), num_tiles)
    for start in range(first, end, BLOCK_T):
        n = start + tl.arange(0, BLOCK_T)
        tl.store(tiles_ptr + 2 * n, tl.where(own < E, own, -1), mask=n < end)
        tl.store(tiles_ptr + 2 * n + 1, tl.where(own < E, row + (n - first) * block_m, -1), mask=n < end)

    for a0 in range(0, M, BLOCK_A):
        mine = (_bucket(ids_ptr, a0 + i, M, E) == own).to(tl.int32)
        tl.store(order_ptr + row + tl.cumsum(mine, 0) - mine, a0 + i, mask=mine > 0)
        row += tl.sum(mine, 0)


def expert_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    ids = whole(ids)
    pairs = ids.numel()
    if pairs == 0:
        return ids.new_empty(0), ids.new_zeros(num_experts + 1), ids.new_empty(0, 2)
    block_m = min(block_m, pairs)  # of more it is the same, and may leave 32 bits
    num_tiles = cdiv(pairs, block_m) + min(num_experts, pairs)
    order, offsets, tiles = ids.new_empty(pairs), ids.new_empty(num_experts + 1), ids.new_empty(num_tiles, 2)
    block, warps = tile(pairs)
    sizes = pairs, num_experts, num_tiles, block_m, block, BLOCK_T, pow2(num_experts + 2)
    _dispatch_kernel[(num_experts + 1,)](ids, order, offsets, tiles, *sizes, num_warps=warps, **early(ids))
    return order, offsets, tiles
