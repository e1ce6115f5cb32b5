"""geglu_mlp: out = (gelu_tanh(x @ gate^T) * (x @ up^T)) @ down^T

x [.., H]; gate_up [2 I, H], gate rows first; down [H, I]; floats, or quantized. Two products of linear.py, the first of which
ends with GeGLU; what stands between them, [M, I], is rounded to x.dtype, as in plain PyTorch.
"""

from __future__ import annotations

from torch import Tensor

from gemma4_fast.quant import WeightLike
from gemma4_fast.triton.common import whole
from gemma4_fast.triton.linear import product


def geglu_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    rows = whole(x).view(x.shape[:-1].numel(), x.shape[-1])
    return product(product(rows, gate_up, "geglu"), down).view(x.shape)
