"""logits: out = cap * tanh((x @ weight^T) / cap), or the id of the largest alone, without the logits ever reaching memory

x [T, H]; weight [V, H], floats or quantized. Returns [T, V] in x.dtype; with argmax [T] int64, the lower id of equals, -1 for
a row of x that is not finite. A product of linear.py; the largest of each tile is kept there, and the largest of those found
by a second kernel.
"""

from __future__ import annotations

from torch import Tensor

from gemma4_fast.quant import WeightLike
from gemma4_fast.triton.common import whole
from gemma4_fast.triton.linear import product


def logits(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> Tensor:
    if argmax:
        return product(whole(x), weight, "argmax")
    return product(whole(x), weight, "none" if softcap is None else "softcap", cap=softcap or 0.0)
