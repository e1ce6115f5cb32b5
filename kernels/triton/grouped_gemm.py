"""grouped_gemm: each expert's rows times its matrix;  y[r] = x[row of r] @ weight[e]^T,  offsets[e] <= r < offsets[e + 1]

weight [E, N, K], of floats or quantized; order [M] int32, offsets [E + 1] int32 from expert_dispatch; M = T top_k sorted rows.
  geglu    x [T, K] is gathered, row r reads x[order[r] // top_k]; N = 2 I, gate rows first: [M, I] = gelu_tanh(gate) * up
  none     x [M, K] -> [M, N]
  combine  x [M, K], topk_weights [T, top_k] fp32: out[t] = sum_k topk_weights[t, k] * y[row of (t, k)] -> [T, N]
Assignments to no expert lie behind offsets[E]; combine leaves them out. Source: gemma4_fast.reference.ops.grouped_gemm.

A fixed number of programs walks over all tiles; which expert a tile belongs to, each finds out from the offsets, so that the
host never waits for them. Tiles of rows of one expert follow each other and share a tile of its weight, which on targets that
have it comes by descriptor (TMA). combine writes its rows, rounded as in plain PyTorch, where the assignments were, and a
second kernel adds them in the order of k: no atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gemma4_fast.quant import WeightLike
from gemma4_fast.triton.common import Target, cdiv, early, gelu_tanh, inputs_ready, parts, pow2, target, weight_tile, whole


def tile(rows_per_expert: float, double: bool, itemsize: int, bits: int, t: Target) -> dict[str, Any]:
    """Tile sizes, warps and stages; `double`: each tile has columns of gate and of up. 704 is 11 * 64."""
    block_m = 16 if rows_per_expert <= 12 else 32 if rows_per_expert <= 24 else 64 if rows_per_expert <= 96 else 128
    roomy = t.shared > 200_000
    block_k = 128 if block_m <= 32 and roomy else 64
    if itemsize == 4:
        block_k //= 2
    stages = 2 if t.kind == "hip" or bits else 4 if roomy and block_m > 32 and not (double and t.arch >= 100) else 3
    return dict(BLOCK_M=block_m, BLOCK_N=64 if double or block_m <= 32 else 128, BLOCK_K=block_k,
                num_warps=8 if block_m == 128 else 4, num_stages=stages)  # fmt: skip


@triton.jit
def _tile(w, s_ptr, row, row_ok, n0, k0, N, K, expert, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
          BITS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """weight_tile, by descriptor where there is one: rows behind a part's last are another's, and their columns not stored."""
    if TMA:
        return w.load([(expert * PARTS + PART) * N + n0, k0])
    else:
        return weight_tile(w, s_ptr, row, row_ok, k0, N, K, expert, PART, PARTS, BLOCK_K, BITS, EVEN_K)


@triton.jit(do_not_specialize=["rows"])
def _grouped_kernel(
    x_ptr, w, s_ptr, order_ptr, offsets_ptr, out_ptr, rows, N, K, E, tiles_n,
    TOP_K: tl.constexpr, GEGLU: tl.constexpr, SCATTER: tl.constexpr, BITS: tl.constexpr, TMA: tl.constexpr,
    EVEN_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    experts = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    ends = tl.cumsum(tl.cdiv(end - begin, BLOCK_M) * tiles_n, 0)  # [EXPERTS]: number of tiles up to and with each expert
    PARTS: tl.constexpr = 2 if GEGLU else 1
    for t in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        expert = tl.sum((ends <= t).to(tl.int32), 0)
        lo, hi = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        local = t - tl.max(tl.where(ends <= t, ends, 0), 0)
        tiles_m = tl.cdiv(hi - lo, BLOCK_M)
        r = lo + (local % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M] sorted rows
        n0 = (local // tiles_m) * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)
        r_ok, n_ok = r < hi, n < N
        at = tl.load(order_ptr + r, mask=r_ok, other=0) if GEGLU or SCATTER else r
        x_at = x_ptr + (at // TOP_K if GEGLU else r).to(tl.int64)[:, None] * K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            ok = r_ok[:, None] if EVEN_K else r_ok[:, None] & (k < K)[None, :]
            x = tl.load(x_at + k[None, :], mask=ok, other=0.0)  # [BLOCK_M, BLOCK_K]
            b = _tile(w, s_ptr, n, n_ok, n0, k0, N, K, expert, 0, PARTS, BLOCK_K, BITS, EVEN_K, TMA)
            acc = tl.dot(x, tl.trans(b.to(x.dtype)), acc, input_precision="ieee")
            if GEGLU:
                b = _tile(w, s_ptr, n, n_ok, n0, k0, N, K, expert, 1, PARTS, BLOCK_K, BITS, EVEN_K, TMA)
                up = tl.dot(x, tl.trans(b.to(x.dtype)), up, input_precision="ieee")
        if GEGLU:
            acc = gelu_tanh(acc) * up
        to = (at if SCATTER else r).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=r_ok[:, None] & n_ok[None, :])
    # Rows of no expert, behind the last one's: 0.
    for r0 in range(tl.max(end, 0) + tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        r = r0 + tl.arange(0, BLOCK_M)
        at = tl.load(order_ptr + r, mask=r < rows, other=0) if SCATTER else r
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            zero = tl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty)
            tl.store(out_ptr + at.to(tl.int64)[:, None] * N + n[None, :], zero, mask=(r < rows)[:, None] & (n < N)[None, :])


@triton.jit
def _combine_kernel(y_ptr, weight_ptr, out_ptr, N, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    inputs_ready()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(TOP_K):
        y = tl.load(y_ptr + (token * TOP_K + k) * N + n, mask=n < N, other=0.0)
        acc += tl.load(weight_ptr + token * TOP_K + k) * y.to(tl.float32)
    tl.store(out_ptr + token * N + n, acc.to(out_ptr.dtype.element_ty), mask=n < N)


def grouped_gemm(
    x: Tensor,
    weight: WeightLike,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> Tensor:
    rows, (experts, n, k), double = order.shape[0], weight.shape, epilogue == "geglu"
    n = n // 2 if double else n
    x, order, offsets = whole(x), whole(order), whole(offsets)
    values, scales, bits = parts(weight)
    y = x.new_empty(rows, n) if k else x.new_zeros(rows, n)
    t = target(x.device)
    if rows and n and k:
        sizes = tile(rows / experts, double, x.element_size(), bits, t)
        sizes["BLOCK_K"] = min(sizes["BLOCK_K"], pow2(k, 32))
        tma = t.has_tma and not bits and k * x.element_size() % 16 == 0 and values.data_ptr() % 16 == 0
        if tma:
            flat = values.view(-1, k)
            values = TensorDescriptor(flat, list(flat.shape), [k, 1], [sizes["BLOCK_N"], sizes["BLOCK_K"]])
        tiles_n = cdiv(n, sizes["BLOCK_N"])
        most = (cdiv(rows, sizes["BLOCK_M"]) + min(experts, rows)) * tiles_n
        per_core = 1 if sizes["BLOCK_M"] == 128 else 2
        _grouped_kernel[(min(most, per_core * t.cores),)](
            x, values, scales, order, offsets, y, rows, n, k, experts, tiles_n,
            TOP_K=top_k, GEGLU=double, SCATTER=epilogue == "combine", BITS=bits, TMA=tma, EVEN_K=k % sizes["BLOCK_K"] == 0,
            EXPERTS=pow2(experts), **sizes, **early(x),
        )  # fmt: skip
    if epilogue != "combine":
        return y
    assert topk_weights is not None
    out = x.new_empty(rows // top_k, n)
    if out.numel():
        block_n = min(1024, pow2(n))
        grid = (out.shape[0], cdiv(n, block_n))
        _combine_kernel[grid](y, whole(topk_weights.float()), out, n, TOP_K=top_k, BLOCK_N=block_n, **early(x))
    return out
