"""linear: out = x @ weight^T, and the same product with other ends, which geglu_mlp, logits and ple_gate are made of.

x [M, K]; weight [N, K], of floats or quantized; out [M, N] in x.dtype. Sums in fp32 along K, in steps that do not depend on M:
up to FEW rows a row has the same bits whatever its neighbours are. Ends, on the fp32 sums:
  none      out = sums
  geglu     weight [2 I, K], gate rows first: out [M, I] = gelu_tanh(gate) * up
  softcap   out = cap * tanh(sums / cap)
  gate      out = gelu_tanh(sums) * other [M, N]
  argmax    of each tile of columns the largest sum and its column: best [M, tiles] fp32, at [M, tiles] int32
Source: the formulas of gemma4_fast.reference.ops.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.quant import WeightLike
from gemma4_fast.triton.common import (
    Target,
    cdiv,
    early,
    gelu_tanh,
    inputs_ready,
    parts,
    pow2,
    tanh,
    target,
    weight_tile,
    whole,
)

FEW = 64  # rows up to which reading the weight is what takes the time


def tile(m: int, n: int, itemsize: int, bits: int, double: bool, t: Target) -> dict[str, Any]:
    """Tile sizes, warps and stages for m rows of x times n rows of weight, twice as many if `double` (gate and up).

    Few rows: a stream of weights, of which some 40 KB a multiprocessor must be on their way at any time; narrow tiles, so
    that all multiprocessors have one. They go through mma.sync, whose sums do not depend on the tile. Many rows: arithmetic.
    """
    amd = t.kind == "hip"
    if m <= FEW:
        narrow = n * (2 if double else 1) < 32 * t.cores  # fewer than a tile of 32 rows for each multiprocessor
        block_n, block_k = (16 if narrow or double else 32), (256 if narrow else 128) // (2 if itemsize == 4 else 1)
        if bits:
            block_k = 256 // (2 if itemsize == 4 else 1)
        stages = 2 if amd else 3 if m > 16 else 5 if narrow else 4
        warps = 2 if block_n == 16 and not double else 4
        return dict(BLOCK_M=16 if m <= 16 else 32, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages)
    roomy = t.shared > 200_000
    block_k = 64 if itemsize == 2 and (roomy or not double) else 32
    stages = 2 if amd or bits else 4 if roomy or double else 3
    return dict(BLOCK_M=128, BLOCK_N=64 if double else 128, BLOCK_K=block_k, num_warps=8, num_stages=stages)


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _product_kernel(
    x_ptr, w_ptr, s_ptr, out_ptr, other_ptr, at_ptr,
    M, N, K, stride_xm, stride_other, cap, tiles_m, tiles_n,
    END: tl.constexpr, BITS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    # Tiles of rows beside each other first, eight at a time: they share a tile of the weight, and the eight stay in the cache.
    pid = tl.program_id(0)
    group = pid // (8 * tiles_n)
    rows_here = tl.minimum(tiles_m - group * 8, 8)
    pid_m = group * 8 + (pid % (8 * tiles_n)) % rows_here
    pid_n = (pid % (8 * tiles_n)) // rows_here
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_ok, n_ok = m < M, n < N
    PARTS: tl.constexpr = 2 if END == "geglu" else 1
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_at = x_ptr + m.to(tl.int64)[:, None] * stride_xm + tl.arange(0, BLOCK_K)[None, :]
    for k0 in range(0, K, BLOCK_K):
        k_ok = m_ok[:, None] if EVEN_K else m_ok[:, None] & (k0 + tl.arange(0, BLOCK_K) < K)[None, :]
        x = tl.load(x_at + k0, mask=k_ok, other=0.0)  # [BLOCK_M, BLOCK_K]
        w = weight_tile(w_ptr, s_ptr, n, n_ok, k0, N, K, 0, 0, PARTS, BLOCK_K, BITS, EVEN_K).to(x.dtype)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if END == "geglu":
            u = weight_tile(w_ptr, s_ptr, n, n_ok, k0, N, K, 0, 1, PARTS, BLOCK_K, BITS, EVEN_K).to(x.dtype)
            up = tl.dot(x, tl.trans(u), up, input_precision="ieee")
    if END == "argmax":
        acc = tl.where(n_ok[None, :], acc, float("-inf"))
        best, at = tl.max(acc, 1, return_indices=True)  # the first of equal ones
        to = m.to(tl.int64) * tiles_n + pid_n
        tl.store(out_ptr + to, best, mask=m_ok)
        tl.store(at_ptr + to, pid_n * BLOCK_N + at, mask=m_ok)
    else:
        ok = m_ok[:, None] & n_ok[None, :]
        if END == "geglu":
            acc = gelu_tanh(acc) * up
        elif END == "softcap":
            acc = cap * tanh(acc / cap)
        elif END == "gate":
            other = tl.load(other_ptr + m.to(tl.int64)[:, None] * stride_other + n[None, :], mask=ok, other=0.0)
            acc = gelu_tanh(acc) * other.to(tl.float32)
        to = m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _best_kernel(
    x_ptr, best_ptr, at_ptr, out_ptr, K, tiles, stride_xm, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """One row: the largest of its tiles' best, the first of equal ones; -1 if x's row is not finite."""
    inputs_ready()
    m = tl.program_id(0).to(tl.int64)
    bad = tl.zeros([BLOCK_K], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
        bad |= (tl.abs(x) < float("inf")).to(tl.int32) ^ 1  # infinite, or NaN
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK_T], tl.int32)
    for t0 in range(0, tiles, BLOCK_T):  # of each lane the first of its largest
        t = t0 + tl.arange(0, BLOCK_T)
        best = tl.load(best_ptr + m * tiles + t, mask=t < tiles, other=float("-inf"))
        at = tl.load(at_ptr + m * tiles + t, mask=t < tiles, other=0)
        first = tl.where(best > largest, at, first)
        largest = tl.maximum(best, largest)
    winners = tl.where(largest == tl.max(largest, 0), first, 2147483647)
    tl.store(out_ptr + m, tl.where(tl.max(bad, 0) > 0, -1, tl.min(winners, 0)).to(tl.int64))


def product(x: Tensor, weight: WeightLike, end: str = "none", *, cap: float = 0.0, other: Tensor | None = None) -> Tensor:
    """x [M, K] contiguous rows -> [M, N] with one of the ends above; "argmax": ids [M] int64."""
    (m, k), double = x.shape, end == "geglu"
    n = weight.shape[0] // 2 if double else weight.shape[0]
    values, scales, bits = parts(weight)
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros(m, dtype=torch.int64) if end == "argmax" else x.new_zeros(m, n)
    sizes = tile(m, n, x.element_size(), bits, double, target(x.device))
    sizes["BLOCK_K"] = min(sizes["BLOCK_K"], pow2(k, 32))
    tiles_m, tiles_n = cdiv(m, sizes["BLOCK_M"]), cdiv(n, sizes["BLOCK_N"])
    out, at = x.new_empty(m, n) if end != "argmax" else x.new_empty(m, tiles_n, dtype=torch.float32), None
    if end == "argmax":
        at = x.new_empty(m, tiles_n, dtype=torch.int32)
    _product_kernel[(tiles_m * tiles_n,)](
        x, values, scales, out, other, at, m, n, k, x.stride(0), 0 if other is None else other.stride(0), cap, tiles_m, tiles_n,
        END=end, BITS=bits, EVEN_K=k % sizes["BLOCK_K"] == 0, **sizes, **early(x),
    )  # fmt: skip
    if at is None:
        return out
    best = x.new_empty(m, dtype=torch.int64)
    blocks = dict(BLOCK_K=min(4096, pow2(k)), BLOCK_T=min(1024, pow2(tiles_n)))
    _best_kernel[(m,)](x, out, at, best, k, tiles_n, x.stride(0), **blocks, **early(x))
    return best


def linear(x: Tensor, weight: WeightLike) -> Tensor:
    rows = whole(x).view(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return product(rows, weight).view(*x.shape[:-1], weight.shape[0])
