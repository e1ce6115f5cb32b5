"""embedding: out[t] = weight[ids[t]] * scale.

weight [V, H], any of DTYPES, or a QuantizedWeight of 8 or 4 bits; ids [T] int64; out [T, H] in weight.dtype, the product
rounded once. An id outside [0, V) reads nothing and gives a row of NaN: a device cannot raise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.quant import WeightLike
from gemma4_fast.triton.common import cdiv, early, inputs_ready, parts, pow2, weight_tile, whole


def tile(hidden: int) -> tuple[int, int]:
    """Columns of a program, whole groups of 32, and warps: a thread copies 16 bytes of bf16."""
    block = min(1024, pow2(hidden, 32))
    return block, max(1, block // 256)


@triton.jit
def _embedding_kernel(
    w_ptr, s_ptr, ids_ptr, out_ptr, V, H, scale, BLOCK: tl.constexpr, BITS: tl.constexpr, EVEN_H: tl.constexpr
):
    inputs_ready()
    t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    h0 = tl.program_id(1) * BLOCK
    h = h0 + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + t)
    ok = (row >= 0) & (row < V)
    w = weight_tile(w_ptr, s_ptr, row, ok, h0, V, H, 0, 0, 1, BLOCK, BITS, EVEN_H).to(tl.float32)  # [1, BLOCK]
    out = tl.where(ok[:, None], w * scale, float("nan"))
    tl.store(out_ptr + t[:, None] * H + h[None, :], out.to(out_ptr.dtype.element_ty), mask=(h < H)[None, :])


def embedding(weight: WeightLike, ids: Tensor, scale: float = 1.0) -> Tensor:
    vocab, hidden = weight.shape
    tokens = ids.shape[0]
    out = torch.empty(tokens, hidden, dtype=weight.dtype, device=weight.device)
    if out.numel():
        values, scales, bits = parts(weight)
        block, warps = tile(hidden)
        grid = (tokens, cdiv(hidden, block))
        args = values, scales, whole(ids), out, vocab, hidden, float(scale), block, bits, hidden % block == 0
        _embedding_kernel[grid](*args, num_warps=warps, **early(out))
    return out
