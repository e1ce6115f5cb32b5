"""ple_gate: y = (x + rms_norm(proj @ (gelu_tanh(gate @ x) * ple), weight)) * scale,  z = rms_norm(y, next_weight)

x [T, H]; ple [T, P], rows may lie apart; gate [P, H]; proj [H, P]; weight, next_weight [H]; scale [1]. Two products of
linear.py, the first of which ends with the gate, then norm_add_norm. Source: per-layer embeddings of Gemma 3n and Gemma 4.
"""

from __future__ import annotations

from torch import Tensor

from gemma4_fast.triton.common import whole
from gemma4_fast.triton.linear import product
from gemma4_fast.triton.norm_add_norm import norm_add_norm


def ple_gate(
    x: Tensor,
    ple: Tensor,
    gate: Tensor,
    proj: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    x, ple = whole(x), ple if ple.stride(-1) == 1 else ple.contiguous()
    return norm_add_norm(product(product(x, gate, "gate", other=ple), proj), x, weight, scale, next_weight, eps)[:2]
