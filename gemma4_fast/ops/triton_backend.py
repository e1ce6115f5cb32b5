"""What the Triton kernels of kernels/triton take, asked before they are imported: Triton itself may not be installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops import checks
from gemma4_fast.quant import WeightLike

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 512
MAX_GROUP = 16  # query heads per KV head of so many columns: what a decode kernel has registers for


def accepts_moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> str | None:
    if isinstance(gate_up, Tensor) != isinstance(down, Tensor):
        return "takes gate_up and down both quantized, or neither"
    return checks.accepts_geglu(x, gate_up, down)


def accepts_grouped(
    x: Tensor, weight: WeightLike, order: Tensor, offsets: Tensor, top_k: int, epilogue: str = "none", *_: object
) -> str | None:
    return checks.whole_weight(weight, 2 if epilogue == "geglu" else 1)


def _attention(q: Tensor, inv_freq: Tensor | None) -> str | None:
    dim = q.shape[2]
    if dim > MAX_HEAD_DIM or dim % 2:
        return f"takes even head dims up to {MAX_HEAD_DIM}, got {dim}"
    if inv_freq is not None and inv_freq.dtype != torch.float32:
        return "takes frequencies in float32"
    return None


def accepts_gqa_decode(q: Tensor, k_cache: Tensor | None, v_cache: Tensor, *args: Any) -> str | None:
    most = MAX_GROUP * MAX_HEAD_DIM // max(1, q.shape[2])
    if q.shape[1] > most * v_cache.shape[2]:
        return f"takes up to {most} query heads per KV head of {q.shape[2]} columns, got {q.shape[1] // v_cache.shape[2]}"
    return _attention(q, args[3] if len(args) > 3 else None)  # inv_freq


def accepts_gqa_prefill(q: Tensor, *args: Any) -> str | None:
    return _attention(q, args[8] if len(args) > 8 else None)  # inv_freq


@contextmanager
def shared_step() -> Iterator[None]:
    """What `cuda_backend.shared_step` says, of these kernels."""
    common = sys.modules.get("gemma4_fast.triton.common")  # there, if a step has run on these kernels
    if common is None:
        yield
        return
    token = common.STEP.set({})
    try:
        yield
    finally:
        common.STEP.reset(token)
