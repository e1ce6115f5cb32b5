"""route_topk: p = softmax((x / rms(x) * scale * H^-0.5) @ proj^T); the K largest, divided by their sum, times a learned scale.

x [T, H]; scale [H]; proj [E, H]; per_expert_scale [E], all in one of DTYPES. weights [T, K] fp32 in falling order of p, ids
[T, K] int32; of equal logits the lower id comes first. All in fp32. Source: Gemma 4's router.

Two kernels. rms(x) is a factor of a row, so the first needs no pass over x for it: it sums (x * scale) @ proj^T and x^2 side by
side, over parts of H, so that many programs share the reading of proj for one token. The second adds the parts and picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.triton.common import cdiv, early, inputs_ready, pow2, target, whole

BLOCK_T = 16  # tokens of a program: the rows of the smallest tensor-core product, whatever T: its sums have one order
MAX_SPLITS = 8  # parts of H


def tile(tokens: int, experts: int, hidden: int, dtype: torch.dtype, cores: int) -> tuple[int, int, int]:
    """Experts and columns of a program's tile, and parts of H. As wide as leaves a program for each core, since every program
    reads x anew. The order of a sum depends on the columns and parts, and they not on T."""
    block_h = 32 if dtype == torch.float32 else 64
    splits = min(MAX_SPLITS, cdiv(hidden, block_h))
    block_e, most = 16, pow2(min(experts, 64), 16)
    while block_e < most and cdiv(tokens, BLOCK_T) * cdiv(experts, 2 * block_e) * splits >= cores:
        block_e *= 2
    return block_e, block_h, splits


@triton.jit(do_not_specialize=["T"])
def _logits_kernel(
    x_ptr, scale_ptr, proj_ptr, logits_ptr, squares_ptr, T, E, H, splits,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """logits [splits, T, E], squares [splits, T] fp32: the sums over each part of H, neither normed nor scaled."""
    inputs_ready()
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    part = tl.cdiv(tl.cdiv(H, BLOCK_H), splits) * BLOCK_H
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for h0 in range(split * part, tl.minimum(split * part + part, H), BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        ok = h < H
        x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=(t < T)[:, None] & ok[None, :], other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + h, mask=ok, other=0.0).to(tl.float32)
        # [BLOCK_H, BLOCK_E]
        w = tl.load(proj_ptr + e[None, :] * H + h[:, None], mask=(e < E)[None, :] & ok[:, None], other=0.0)
        squares += tl.sum(x * x, 1)
        y = x * scale
        if w.dtype == tl.float32:
            acc = tl.dot(y, w, acc, input_precision="ieee")
        else:
            # x and scale have 8 bits each in bf16, 11 in fp16, their product y therefore 16, or 22: hi is the upper half, lo
            # exactly the rest. Products of halves are exact in fp32, so two dots on tensor cores are the fp32 product.
            unit = tl.full([BLOCK_T], 1.0, tl.float32)
            if w.dtype == tl.float16:  # without the exponents of fp32: a power of two brings a row's largest into [1, 2)
                largest = tl.max(tl.abs(y), 1)
                unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                unit = tl.maximum(unit, 1.1754944e-38)
                y = y / unit[:, None]
            hi = y.to(w.dtype)
            lo = (y - hi.to(tl.float32)).to(w.dtype)
            acc += tl.dot(lo, w, tl.dot(hi, w)) * unit[:, None]
    rows = split.to(tl.int64) * T + t
    tl.store(logits_ptr + rows[:, None] * E + e[None, :], acc, mask=(t < T)[:, None] & (e < E)[None, :])
    if tl.program_id(1) == 0:
        tl.store(squares_ptr + rows, squares, mask=t < T)


@triton.jit(do_not_specialize=["T"])
def _topk_kernel(
    logits_ptr, squares_ptr, expert_scale_ptr, weights_ptr, ids_ptr, T, E, H, K, factor, eps,
    SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per token. factor: H^-0.5."""
    inputs_ready()
    LOWEST: tl.constexpr = -2147483648
    t = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    logits = tl.zeros([BLOCK_E], tl.float32)
    squares = 0.0
    for s in tl.static_range(SPLITS):
        logits += tl.load(logits_ptr + (t + s * T) * E + e, mask=e < E, other=0.0)
        squares += tl.load(squares_ptr + t + s * T)
    logits = logits * (tl.rsqrt(squares / H + eps) * factor)
    logits = tl.where(e < E, logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 0))
    p = p / tl.sum(p, 0)

    # Integers in the order of the logits, NaN among them: whatever they hold, the K ids differ and lie in [0, E).
    bits = logits.to(tl.int32, bitcast=True)
    key = tl.where(e < E, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    ids = tl.zeros([BLOCK_K], tl.int32)
    top = tl.zeros([BLOCK_K], tl.float32)
    for i in range(K):
        best = tl.argmax(key, 0, tie_break_left=True)
        ids = tl.where(k == i, best, ids)
        top = tl.where(k == i, tl.sum(tl.where(e == best, p, 0.0), 0), top)
        key = tl.where(e == best, LOWEST, key)
    weights = top / tl.sum(top, 0) * tl.load(expert_scale_ptr + ids).to(tl.float32)
    tl.store(weights_ptr + t * K + k, weights, mask=k < K)
    tl.store(ids_ptr + t * K + k, ids, mask=k < K)


def route_topk(
    x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    (tokens, hidden), experts = x.shape, proj.shape[0]
    weights = x.new_empty(tokens, top_k, dtype=torch.float32)
    ids = x.new_empty(tokens, top_k, dtype=torch.int32)
    if tokens == 0:
        return weights, ids
    device = target(x.device)
    block_e, block_h, splits = tile(tokens, experts, hidden, x.dtype, device.cores)
    logits = x.new_empty(splits, tokens, experts, dtype=torch.float32)
    squares = x.new_empty(splits, tokens, dtype=torch.float32)
    grid = (cdiv(tokens, BLOCK_T), cdiv(experts, block_e), splits)
    args = whole(x), whole(scale), whole(proj), logits, squares, tokens, experts, hidden, splits
    stages = 6 if device.kind == "cuda" else 2  # all of a part is on its way at once; AMD's pipeliner fails beyond 3
    _logits_kernel[grid](*args, BLOCK_T, block_e, block_h, num_warps=4, num_stages=stages, **early(x))
    sizes = tokens, experts, hidden, top_k, hidden**-0.5, eps, splits, pow2(experts), pow2(top_k)
    _topk_kernel[(tokens,)](logits, squares, whole(per_expert_scale), weights, ids, *sizes, num_warps=1, **early(x))
    return weights, ids
