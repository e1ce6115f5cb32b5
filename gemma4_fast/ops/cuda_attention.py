"""The `cuda` backend's attention: see cuda_backend.py. How decode attention's work is cut: csrc/cuda/split_kv.cuh."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops.cuda_backend import at_16, counters, maybe, run, whole

MAX_HEAD_DIM = 512  # 16 columns a lane in csrc/cuda/qkv_norm_rope.cu


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tokens, dim = qkv.shape[0], q_weight.shape[0]
    q = qkv.new_empty(tokens, num_q_heads, dim)
    cached = v_cache is not None
    k, v = k_cache, v_cache
    if num_kv_heads and not cached:
        k, v = (qkv.new_empty(tokens, num_kv_heads, dim) for _ in range(2))
    if tokens:
        weights = whole(q_weight), maybe(k_weight)
        tables = whole(cos.float()), whole(sin.float())
        run("qkv_norm_rope", q, whole(qkv), *weights, *tables, maybe(slots), q, k, v, num_kv_heads, eps)
    return (q, None, None) if cached else (q, k, v)


def accepts_qkv_norm_rope(qkv: Tensor, q_weight: Tensor, *_: object) -> str | None:
    dim = q_weight.shape[0]
    return None if dim <= MAX_HEAD_DIM else f"takes heads of up to {MAX_HEAD_DIM} columns, got {dim}"


# csrc/cuda/split_kv.cuh and rebuilt_keys.cuh: positions of a tile and of a node, heads of a row, pairs that rotate.
TILE, NODE, HEADS, MAX_PAIRS = 32, 512, 8, 64
SCRATCH = 64 << 20  # bytes that pieces may have beyond one for each node


@dataclass(frozen=True)
class Machine:
    """Multiprocessors, and bytes of shared memory: of one, and that a block may have."""

    cores: int = 132
    shared: int = 233472
    shared_block: int = 232448


@functools.cache
def machine(device: torch.device) -> Machine:
    """Of an emulated device, an H200."""
    if device.type != "cuda":
        return Machine()
    p = torch.cuda.get_device_properties(device)
    optin = getattr(p, "shared_memory_per_block_optin", 101376)  # the least that any has
    return Machine(p.multi_processor_count, p.shared_memory_per_multiprocessor, optin)


def _rows(q: Tensor, v_cache: Tensor) -> int:
    """Of csrc/cuda/split_kv.cuh."""
    group = q.shape[1] // v_cache.shape[2]
    return q.shape[0] * v_cache.shape[2] * -(-group // HEADS)


def _reach(cache: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(cache.shape, cache.stride(), strict=True)) + 1


def _in_chunks(cache: Tensor) -> Tensor:
    """A cache whose heads are aligned to 16 bytes; it may be a view."""
    aligned = cache.stride(-1) == 1 and cache.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in cache.stride()[:-1])
    return cache if aligned else cache.clone(memory_format=torch.contiguous_format)


def accepts_gqa_decode(q: Tensor, k_cache: Tensor | None, v_cache: Tensor, *args: Any) -> str | None:
    dim, inv_freq = q.shape[2], args[3] if len(args) > 3 else None
    if dim % 16 or dim > MAX_HEAD_DIM:
        return f"takes head dims that are multiples of 16, up to {MAX_HEAD_DIM}, got {dim}"
    if max(_reach(c) for c in (k_cache, v_cache) if c is not None) > 1 << 35:
        return "takes caches of up to 64 GiB"
    if k_cache is not None or inv_freq is None:
        return None
    if inv_freq.dtype != torch.float32:
        return "takes frequencies in float32"
    return None if inv_freq.shape[0] <= MAX_PAIRS else f"takes up to {MAX_PAIRS} rotary pairs, got {inv_freq.shape[0]}"


def gqa_decode(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    return decode_on(machine(q.device), True, q, k_cache, v_cache, kv_lens, window, block_table, inv_freq, k_weight, scale)


def decode_on(
    m: Machine,
    one_launch: bool,
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None,
    block_table: Tensor | None,
    inv_freq: Tensor | None,
    k_weight: Tensor | None,
    scale: float,
) -> Tensor:
    """m decides how the work is cut, one_launch whether a row's last block may merge it; neither changes a bit."""
    q = at_16(q)
    out = torch.empty_like(q)
    if not q.numel() or not v_cache.numel():
        return out.zero_()
    v_cache, block_table = _in_chunks(v_cache), maybe(block_table)
    slots = v_cache.shape[1] if block_table is None else v_cache.shape[1] * block_table.shape[1]
    seen, rows, group = min(window or slots, slots), _rows(q, v_cache), q.shape[1] // v_cache.shape[2]
    padded = next(d for d in (128, 256, 512) if q.shape[2] <= d)
    per_piece = padded * min(-(-group // 2), HEADS // 2) * 2  # fp32 values
    tiles, nodes = -(-seen // TILE) + 1, -(-seen // NODE) + 1
    pieces = max(rows * nodes, min(rows * tiles, SCRATCH // (4 * per_piece)))
    itself = one_launch and k_cache is not None and padded <= 256  # and if shared memory suffices
    run(
        "gqa_decode",
        q,
        q,
        None if k_cache is None else _in_chunks(k_cache),
        v_cache,
        whole(kv_lens),
        block_table,
        maybe(inv_freq),
        None if k_weight is None else at_16(k_weight),
        out,
        q.new_empty(pieces, per_piece, dtype=torch.float32),
        q.new_empty(pieces, HEADS, 2, dtype=torch.float32),
        counters(q, rows) if itself else None,
        seen,
        scale,
        m.cores,
        m.shared,
        m.shared_block,
    )
    return out
