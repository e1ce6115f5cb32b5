"""moe_decode: out[t] = sum_k topk_weights[t, k] * down[e] @ (gelu_tanh(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t, k]

x [T, H]; topk_weights [T, K] fp32; ids [T, K] int32; gate_up [E, 2 I, H], gate rows first; down [E, H, I]; floats, or
quantized. Returns [T, H] in x.dtype. An id outside [0, E) adds nothing. Source: gemma4_fast.reference.ops.moe.

For few tokens, without sorting and without padding to tiles of rows: what counts is that each expert's weights are read once.
  gate_up  a program for each assignment (t, k) and BLOCK_I rows of gate and up. The first assignment of an expert serves all
           of them, 16 at a time, the others' programs end at once. Writes h [T K, I].
  down     a program for each token and BLOCK_N rows of down, over all K experts: the sum over experts is one in registers.
           Programs of one tile of rows and all tokens are neighbours, so that an expert of two tokens is read once.
From MANY tokens on it sorts, and goes the way of grouped_gemm.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.quant import WeightLike
from gemma4_fast.triton.common import cdiv, early, gelu_tanh, inputs_ready, parts, pow2, target, weight_tile, whole
from gemma4_fast.triton.expert_dispatch import expert_dispatch
from gemma4_fast.triton.grouped_gemm import grouped_gemm

# Tokens from which it sorts. Of weights of floats `moe` decides, by what was measured; of quantized ones vLLM's measurement
# (vllm#41379). A program looks at all assignments, which is no way to serve thousands.
MANY, MANY_QUANTIZED = 129, 17


@triton.jit(do_not_specialize=["pairs"])
def _gate_up_kernel(
    x_ptr, ids_ptr, w_ptr, s_ptr, h_ptr, H, I, E, pairs, TOP_K: tl.constexpr, PAIRS: tl.constexpr, BITS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    pair = tl.program_id(1)
    all_pairs = tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + all_pairs, mask=all_pairs < pairs, other=-1)  # [PAIRS]
    expert = tl.load(ids_ptr + pair)
    mine = ids == expert
    if (expert < 0) | (expert >= E) | (tl.sum((mine & (all_pairs < pair)).to(tl.int32), 0) > 0):
        return  # no expert, or another program's
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    count = tl.sum(mine.to(tl.int32), 0)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = i < I
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        m_ok = slot < count
        chosen = mine[None, :] & (rank[None, :] == slot[:, None])  # [BLOCK_M, PAIRS]: the slot-th of the expert's assignments
        at = tl.sum(tl.where(chosen, all_pairs[None, :], 0), 1)  # [BLOCK_M]
        x_at = x_ptr + (at // TOP_K).to(tl.int64)[:, None] * H
        gate = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            ok = m_ok[:, None] if EVEN_K else m_ok[:, None] & (k < H)[None, :]
            x = tl.load(x_at + k[None, :], mask=ok, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = weight_tile(w_ptr, s_ptr, i, i_ok, k0, I, H, expert, 0, 2, BLOCK_K, BITS, EVEN_K).to(x.dtype)
            u = weight_tile(w_ptr, s_ptr, i, i_ok, k0, I, H, expert, 1, 2, BLOCK_K, BITS, EVEN_K).to(x.dtype)
            gate = tl.dot(x, tl.trans(w), gate, input_precision="ieee")
            up = tl.dot(x, tl.trans(u), up, input_precision="ieee")
        h = (gelu_tanh(gate) * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at.to(tl.int64)[:, None] * I + i[None, :], h, mask=m_ok[:, None] & i_ok[None, :])


@triton.jit
def _down_kernel(
    h_ptr, weight_ptr, ids_ptr, w_ptr, s_ptr, out_ptr, H, I, E, TOP_K: tl.constexpr, BITS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < H
    steps = tl.cdiv(I, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)  # summed over columns once, at the end
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):
        pair, k0 = token * TOP_K + step // steps, (step % steps) * BLOCK_K
        expert = tl.load(ids_ptr + pair)
        real = (expert >= 0) & (expert < E)
        expert = tl.where(real, expert, 0)
        k = k0 + tl.arange(0, BLOCK_K)
        h = tl.load(h_ptr + pair.to(tl.int64) * I + k, mask=real & (k < I), other=0.0).to(tl.float32)  # [BLOCK_K]
        w = weight_tile(w_ptr, s_ptr, n, n_ok & real, k0, H, I, expert, 0, 1, BLOCK_K, BITS, EVEN_K)
        acc += w.to(tl.float32) * (h * tl.load(weight_ptr + pair))[None, :]
    out = tl.sum(acc, 1)
    tl.store(out_ptr + token.to(tl.int64) * H + n, out.to(out_ptr.dtype.element_ty), mask=n_ok)


def moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    (tokens, hidden), inter, experts, top_k = x.shape, down.shape[2], gate_up.shape[0], ids.shape[1]
    x, ids, topk_weights = whole(x), whole(ids), whole(topk_weights.float())
    (w1, s1, bits), (w2, s2, _) = parts(gate_up), parts(down)
    if ids.numel() == 0 or hidden == 0 or inter == 0:
        return x.new_zeros(x.shape)
    if tokens >= (MANY_QUANTIZED if bits else MANY):
        order, offsets, _ = expert_dispatch(ids, experts)
        h = grouped_gemm(x, gate_up, order, offsets, top_k, "geglu")
        return grouped_gemm(h, down, order, offsets, top_k, "combine", topk_weights)
    t, wide = target(x.device), x.element_size() == 4
    h = x.new_empty(ids.numel(), inter)
    block_k = min(128 if wide or bits else 256, pow2(hidden, 32))  # unpacked, 256 columns take all registers
    _gate_up_kernel[(cdiv(inter, 16), ids.numel())](
        x, ids, w1, s1, h, hidden, inter, experts, ids.numel(),
        TOP_K=top_k, PAIRS=pow2(ids.numel(), 16), BITS=bits, EVEN_K=hidden % block_k == 0, BLOCK_M=16, BLOCK_I=16,
        BLOCK_K=block_k, num_warps=4, num_stages=2 if t.kind == "hip" else 3, **early(x),
    )  # fmt: skip
    out = x.new_empty(x.shape)
    block_k = min(128 if wide else 256, pow2(inter, 32))
    _down_kernel[(tokens, cdiv(hidden, 16))](
        h, topk_weights, ids, w2, s2, out, hidden, inter, experts, TOP_K=top_k, BITS=bits, EVEN_K=inter % block_k == 0,
        BLOCK_N=16, BLOCK_K=block_k, STAGES=2 if t.kind == "hip" else 6, num_warps=4, **early(x),
    )  # fmt: skip
    return out
