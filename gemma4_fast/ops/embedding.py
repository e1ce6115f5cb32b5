"""Specs of what a pass begins with: embedding, rope_angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops import checks, cpu_backend, cuda_backend, triton_backend
from gemma4_fast.ops.table import Cost, Impl, Maker, Op, register
from gemma4_fast.quant import QuantizedWeight, WeightLike
from gemma4_fast.reference import ops as reference


def _check_embedding(weight: WeightLike, ids: Tensor, scale: float = 1.0) -> None:
    op = "embedding"
    if isinstance(weight, QuantizedWeight):
        checks.require(op, weight.dim() == 2, f"weight must have 2 axes, got shape {list(weight.shape)}")
    else:
        checks.floating(op, "weight", weight, 2)
    checks.shaped(op, "ids", ids, (-1,), weight, (torch.int64,))  # type: ignore[arg-type]  # asked for its device alone
    checks.positive(op, "scale", scale)


def embedding_case(m: Maker, tokens: int, vocab: int, hidden: int, scale: float = 1.0, bits: int = 0) -> dict[str, Any]:
    ids = [0, vocab - 1, *((t * 7919 + 3) % vocab for t in range(tokens))][:tokens]
    return dict(weight=m.weight(bits, vocab, hidden, scale=1.0), ids=m.ints(ids, torch.int64), scale=scale)


def _embedding_cost(weight: WeightLike, ids: Tensor, scale: float = 1.0) -> Cost:
    values = ids.numel() * weight.shape[1]
    row = weight.nbytes // max(1, weight.shape[0])
    return Cost(values, ids.numel() * row + ids.nbytes + values * weight.dtype.itemsize)


EMBEDDING = register(
    Op(
        name="embedding",
        summary="rows of a table, times a number",
        reference=reference.embedding,
        check=_check_embedding,
        cases={
            "26b_one_token": lambda m: embedding_case(m, 1, 500, 2816, 53.0),
            "e2b_per_layer": lambda m: embedding_case(m, 5, 300, 8960, 16.0),
            "odd": lambda m: embedding_case(m, 7, 31, 97, 0.37),
            "no_tokens": lambda m: embedding_case(m, 0, 31, 64),
            "int8": lambda m: embedding_case(m, 9, 500, 256, 16.0, bits=8),
            "int8_odd": lambda m: embedding_case(m, 7, 31, 97, bits=8),
            "int4_odd": lambda m: embedding_case(m, 7, 31, 97, 3.0, bits=4),
        },
        cost=_embedding_cost,
        bench_cases={
            "26b_1_token": lambda m: embedding_case(m, 1, 262144, 2816, 53.0),
            "26b_512_tokens": lambda m: embedding_case(m, 512, 262144, 2816, 53.0),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:embedding", cuda_backend.DTYPES, accepts=checks.accepts_embedding),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:embedding", cpu_backend.DTYPES, accepts=checks.accepts_embedding),
            "triton": Impl("gemma4_fast.triton.embedding:embedding", triton_backend.DTYPES, accepts=checks.accepts_embedding),
            "torch": Impl("gemma4_fast.ops.torch_backend:embedding"),
        },
    )
)


def _check_rope_angles(positions: Tensor, inv_freq: Tensor) -> None:
    op = "rope_angles"
    checks.floating(op, "inv_freq", inv_freq, 1)
    checks.shaped(op, "positions", positions, (-1,), inv_freq, (torch.int64,))


def angles_case(m: Maker, tokens: int, pairs: int, dim: int, theta: float, first: int = 0) -> dict[str, Any]:
    dtype = torch.promote_types(m.dtype, torch.float32)
    freq = theta ** -(torch.arange(0, 2 * pairs, 2, dtype=torch.float64) / dim)
    positions = m.ints((first + t for t in range(tokens)), torch.int64)
    return dict(positions=positions, inv_freq=freq.to(m.device, dtype))


def _angles_cost(positions: Tensor, inv_freq: Tensor) -> Cost:
    out = positions.numel() * inv_freq.numel()
    return Cost(30 * out, positions.nbytes + inv_freq.nbytes + 2 * out * inv_freq.element_size())


ROPE_ANGLES = register(
    Op(
        name="rope_angles",
        summary="cos and sin of positions",
        reference=reference.rope_angles,
        check=_check_rope_angles,
        cases={
            "sliding": lambda m: angles_case(m, 64, 128, 256, 1e4),
            "full_far": lambda m: angles_case(m, 7, 64, 512, 1e6, first=262137),
            "one_token": lambda m: angles_case(m, 1, 128, 256, 1e4, first=1000),
            "odd": lambda m: angles_case(m, 5, 3, 10, 100.0, first=99),
            "no_tokens": lambda m: angles_case(m, 0, 3, 10, 100.0),
        },
        cost=_angles_cost,
        bench_cases={
            "sliding_1_token": lambda m: angles_case(m, 1, 128, 256, 1e4, first=1000),
            "sliding_512_tokens": lambda m: angles_case(m, 512, 128, 256, 1e4),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:rope_angles", cuda_backend.DTYPES, accepts=checks.accepts_angles),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:rope_angles", cpu_backend.DTYPES, accepts=checks.accepts_angles),
            "triton": Impl("gemma4_fast.triton.rope_angles:rope_angles", triton_backend.DTYPES, accepts=checks.accepts_angles),
            "torch": Impl("gemma4_fast.ops.torch_backend:rope_angles"),
        },
    )
)
