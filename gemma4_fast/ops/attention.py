"""Specs of the attention ops: gqa_decode, gqa_prefill."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gemma4_fast.ops import checks, cpu_backend, cuda_attention, cuda_backend, triton_backend
from gemma4_fast.ops.table import Cost, Impl, Maker, Op, register
from gemma4_fast.reference import ops as reference


def _check_heads(op: str, q: Tensor, kv_heads: int) -> None:
    _, heads, dim = q.shape
    checks.require(
        op, heads > 0 and kv_heads > 0 and dim > 0, f"{heads} query heads, {kv_heads} KV heads, head_dim {dim}: none may be 0"
    )
    checks.require(op, heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} KV heads")


def _check_cache(
    op: str,
    q: Tensor,
    sequences: int,
    k_cache: Tensor | None,
    v_cache: Tensor,
    lens: Tensor,
    block_table: Tensor | None,
    inv_freq: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    """What both ops ask of a cache: [B, S, Hkv, D], or blocks with a table; K beside V, or what K is rebuilt from."""
    dim = q.shape[-1]
    checks.shaped(op, "v_cache", v_cache, (-1 if block_table is not None else sequences, -1, -1, dim), q)
    checks.require(op, v_cache.shape[1] > 0, "v_cache has no slots")
    checks.shaped(op, "k_cache", k_cache, v_cache.shape, q, optional=True)
    _check_heads(op, q, v_cache.shape[2])
    checks.shaped(op, "lengths", lens, (sequences,), q, checks.INTS)
    checks.shaped(op, "block_table", block_table, (sequences, -1), q, (torch.int32,), optional=True)
    if k_cache is None:
        checks.require(op, inv_freq is not None and k_weight is not None, "without k_cache, inv_freq and k_weight are needed")
        checks.shaped(op, "inv_freq", inv_freq, (-1,), q, (torch.float32, torch.float64))
        pairs = cast(Tensor, inv_freq).shape[0]
        checks.require(op, pairs <= dim // 2, f"inv_freq has {pairs} rotary pairs, head_dim {dim} has {dim // 2}")
        checks.shaped(op, "k_weight", k_weight, (dim,), q)


def _check_decode(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    checks.floating("gqa_decode", "q", q, 3)
    if window is not None:
        checks.integer("gqa_decode", "window", window, 1)
    checks.positive("gqa_decode", "scale", scale)
    _check_cache("gqa_decode", q, q.shape[0], k_cache, v_cache, kv_lens, block_table, inv_freq, k_weight)


def _cache(
    m: Maker, batch: int, slots: int, kv_heads: int, dim: int, v_only: bool, block: int = 0, table_seed: int = 0
) -> dict[str, Any]:
    """k_cache, v_cache, block_table, inv_freq, k_weight of a case. block > 0: blocks of that size, in shuffled order."""
    shape: tuple[int, ...] = (batch, slots, kv_heads, dim)
    table = None
    if block:
        blocks = slots // block
        order = torch.randperm(batch * blocks + 2, generator=torch.Generator().manual_seed(table_seed))
        table = order[: batch * blocks].view(batch, blocks).to(m.device, torch.int32)
        shape = (batch * blocks + 2, block, kv_heads, dim)
    pairs = dim // 8
    freq = 1e6 ** (-2 * torch.arange(pairs, device=m.device, dtype=torch.float32) / dim)
    return dict(
        k_cache=None if v_only else m.randn(*shape),
        v_cache=m.randn(*shape),
        block_table=table,
        inv_freq=freq if v_only else None,
        k_weight=m.gain(dim) * dim**-0.25 if v_only else None,
    )


def decode_case(
    m: Maker,
    lens: list[int],
    q_heads: int,
    kv_heads: int,
    dim: int,
    slots: int,
    window: int | None = None,
    v_only: bool = False,
    block: int = 0,
) -> dict[str, Any]:
    c = _cache(m, len(lens), slots, kv_heads, dim, v_only, block)
    return dict(
        q=m.randn(len(lens), q_heads, dim, scale=dim**-0.5),
        k_cache=c["k_cache"],
        v_cache=c["v_cache"],
        kv_lens=m.ints(lens),
        window=window,
        block_table=c["block_table"],
        inv_freq=c["inv_freq"],
        k_weight=c["k_weight"],
        scale=1.0,
    )


def _kv_bytes(tokens: int, k_cache: Tensor | None, v_cache: Tensor) -> int:
    return tokens * v_cache.shape[-2] * v_cache.shape[-1] * v_cache.element_size() * (1 if k_cache is None else 2)


def _decode_cost(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> Cost:
    seen = int(kv_lens.clamp(max=window).sum()) if window else int(kv_lens.sum())
    return Cost(4 * seen * q.shape[1] * q.shape[2], 2 * q.nbytes + _kv_bytes(seen, k_cache, v_cache))


GQA_DECODE = register(
    Op(
        name="gqa_decode",
        summary="attention of one new token per sequence over its cache",
        reference=reference.gqa_decode,
        check=_check_decode,
        cases={
            "sliding_ring": lambda m: decode_case(m, [5, 128, 129, 300, 1000], 16, 8, 256, 128, window=100),
            "sliding_short": lambda m: decode_case(m, [1], 8, 1, 256, 64, window=512),
            "full_kv": lambda m: decode_case(m, [33, 7], 8, 2, 512, 64),
            "full_v_only": lambda m: decode_case(m, [130, 1, 77], 16, 2, 512, 192, v_only=True),
            "full_v_only_paged": lambda m: decode_case(m, [130, 64], 8, 1, 512, 192, v_only=True, block=64),
            "sliding_ring_paged": lambda m: decode_case(m, [150, 64], 4, 2, 256, 128, window=128, block=32),
            "full_v_only_wrapped": lambda m: decode_case(m, [300, 64], 4, 1, 64, 64, v_only=True),
            "idle_row": lambda m: decode_case(m, [0, 9], 4, 2, 256, 64, window=64),
            "odd": lambda m: decode_case(m, [19, 3], 3, 1, 96, 19, window=7),
        },
        cost=_decode_cost,
        bench_cases={
            "26b_sliding": lambda m: decode_case(m, [5000], 16, 8, 256, 1024, window=1024),
            "26b_sliding_batch_16": lambda m: decode_case(m, [5000] * 16, 16, 8, 256, 1024, window=1024),
            "26b_full_8k": lambda m: decode_case(m, [8192], 16, 2, 512, 8192, v_only=True),
            "26b_full_32k": lambda m: decode_case(m, [32768], 16, 2, 512, 32768, v_only=True),
            "26b_full_32k_with_k": lambda m: decode_case(m, [32768], 16, 2, 512, 32768),
            "26b_full_8k_batch_8": lambda m: decode_case(m, [8192] * 8, 16, 2, 512, 8192, v_only=True),
        },
        gpu_cases={
            "26b_sliding_batch_64": lambda m: decode_case(m, [5000] * 64, 16, 8, 256, 1024, window=1024),
            "26b_full_1k": lambda m: decode_case(m, [1024], 16, 2, 512, 1024, v_only=True),
            "26b_full_4k": lambda m: decode_case(m, [4096], 16, 2, 512, 4096, v_only=True),
            "26b_full_128k": lambda m: decode_case(m, [131072], 16, 2, 512, 131072, v_only=True),
            "26b_full_128k_with_k": lambda m: decode_case(m, [131072], 16, 2, 512, 131072),
            "26b_full_8k_batch_32": lambda m: decode_case(m, [8192] * 32, 16, 2, 512, 8192, v_only=True),
            "26b_full_8k_batch_32_with_k": lambda m: decode_case(m, [8192] * 32, 16, 2, 512, 8192),
            "26b_full_8k_paged": lambda m: decode_case(m, [8192], 16, 2, 512, 8192, v_only=True, block=64),
            "31b_full_32k": lambda m: decode_case(m, [32768], 32, 4, 512, 32768, v_only=True),
            "e4b_full_8k": lambda m: decode_case(m, [8192], 8, 2, 512, 8192),
        },
        impls={
            "cuda": Impl(
                "gemma4_fast.ops.cuda_attention:gqa_decode", cuda_backend.DTYPES, accepts=cuda_attention.accepts_gqa_decode
            ),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:gqa_decode", cpu_backend.DTYPES, accepts=cpu_backend.accepts_gqa_decode),
            "triton": Impl(
                "gemma4_fast.triton.gqa_decode:gqa_decode", triton_backend.DTYPES, accepts=triton_backend.accepts_gqa_decode
            ),
            "torch": Impl("gemma4_fast.ops.torch_backend:gqa_decode"),
        },
    )
)


def _check_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    op = "gqa_prefill"
    checks.floating(op, "q", q, 3)
    checks.shaped(op, "k", k, (q.shape[0], -1, q.shape[2]), q)
    checks.shaped(op, "v", v, k.shape, q)
    _check_heads(op, q, k.shape[1])
    if window is not None:
        checks.integer(op, "window", window, 1)
    checks.positive(op, "scale", scale)
    checks.shaped(op, "cu_seqlens", cu_seqlens, (-1,), q, (torch.int32,))
    checks.require(op, cu_seqlens.shape[0] >= 1, "cu_seqlens is empty, expected B + 1 entries")
    checks.shaped(op, "image_ids", image_ids, (q.shape[0],), q, (torch.int32,), optional=True)
    checks.require(op, (v_cache is None) == (prefix_lens is None), "v_cache and prefix_lens go together")
    if v_cache is not None and prefix_lens is not None:
        sequences = cu_seqlens.shape[0] - 1
        _check_cache(op, q, sequences, k_cache, v_cache, prefix_lens, block_table, inv_freq, k_weight)
        checks.require(op, v_cache.shape[2] == k.shape[1], f"the cache has {v_cache.shape[2]} KV heads, k {k.shape[1]}")
    else:
        checks.require(op, k_cache is None, "k_cache was given without v_cache")


def prefill_case(
    m: Maker,
    new: list[int],
    q_heads: int,
    kv_heads: int,
    dim: int,
    window: int | None = None,
    prefix: list[int] | None = None,
    slots: int = 64,
    v_only: bool = False,
    block: int = 0,
    images: bool = False,
) -> dict[str, Any]:
    tokens = sum(new)
    c = _cache(m, len(new), slots, kv_heads, dim, v_only, block) if prefix else {}
    ids = [-1 if t % 11 < 4 else t // 11 for t in range(tokens)]  # text, an image of 7 tokens, text, ...
    return dict(
        q=m.randn(tokens, q_heads, dim, scale=dim**-0.5),
        k=m.randn(tokens, kv_heads, dim),
        v=m.randn(tokens, kv_heads, dim),
        cu_seqlens=m.ints([sum(new[:b]) for b in range(len(new) + 1)]),
        window=window,
        k_cache=c.get("k_cache"),
        v_cache=c.get("v_cache"),
        prefix_lens=m.ints(prefix) if prefix else None,
        block_table=c.get("block_table"),
        inv_freq=c.get("inv_freq"),
        k_weight=c.get("k_weight"),
        image_ids=m.ints(ids) if images else None,
        scale=1.0,
    )


def _prefill_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    scale: float = 1.0,
) -> Cost:
    new = cu_seqlens.diff().tolist()
    old = [0] * len(new) if prefix_lens is None else prefix_lens.tolist()
    pairs = sum(min(p + i + 1, window or p + i + 1) for n, p in zip(new, old, strict=True) for i in range(n))
    cached = sum(min(p, window or p) for p in old)
    kv = k.nbytes + v.nbytes + (0 if v_cache is None else _kv_bytes(cached, k_cache, v_cache))
    return Cost(4 * pairs * q.shape[1] * q.shape[2], 2 * q.nbytes + kv)


GQA_PREFILL = register(
    Op(
        name="gqa_prefill",
        summary="causal attention of new tokens over themselves and the cache",
        reference=reference.gqa_prefill,
        check=_check_prefill,
        cases={
            "sliding": lambda m: prefill_case(m, [150, 3], 16, 8, 256, window=64),
            "sliding_ring_prefix": lambda m: prefill_case(m, [70, 1, 20], 4, 2, 256, 64, [100, 30, 64]),
            "full": lambda m: prefill_case(m, [33], 8, 2, 512),
            "full_v_only_prefix": lambda m: prefill_case(m, [20, 5], 16, 2, 512, None, [40, 0], 64, v_only=True),
            "full_paged_prefix": lambda m: prefill_case(m, [9, 17], 4, 1, 512, None, [50, 64], 64, block=16),
            "full_v_only_paged": lambda m: prefill_case(m, [9], 4, 2, 512, None, [60], 64, v_only=True, block=32),
            "images": lambda m: prefill_case(m, [40, 30], 4, 2, 256, window=16, images=True),
            "one_token": lambda m: prefill_case(m, [1], 8, 1, 256, window=512),
            "odd": lambda m: prefill_case(m, [13, 0, 7], 3, 1, 96, window=5),
            "empty_sequence_images": lambda m: prefill_case(m, [0, 0, 7], 3, 1, 96, window=4, images=True),
            "empty_sequence_images_prefix": lambda m: prefill_case(m, [17, 0], 4, 2, 64, 9, [8, 15], 64, images=True),
        },
        cost=_prefill_cost,
        bench_cases={
            "26b_sliding_2k": lambda m: prefill_case(m, [2048], 16, 8, 256, window=1024),
            "26b_full_2k": lambda m: prefill_case(m, [2048], 16, 2, 512),
            "26b_full_512_after_2k": lambda m: prefill_case(m, [512], 16, 2, 512, None, [2048], 2560, v_only=True),
        },
        gpu_cases={
            "26b_sliding_8k": lambda m: prefill_case(m, [8192], 16, 8, 256, window=1024),
            "26b_full_8k": lambda m: prefill_case(m, [8192], 16, 2, 512),
            "26b_sliding_2k_after_8k": lambda m: prefill_case(m, [2048], 16, 8, 256, 1024, [8192], 1024),
            "26b_full_2k_after_30k": lambda m: prefill_case(m, [2048], 16, 2, 512, None, [30720], 32768, v_only=True),
            "26b_sliding_images": lambda m: prefill_case(m, [2048], 16, 8, 256, window=1024, images=True),
        },
        impls={
            "cpu": Impl("gemma4_fast.ops.cpu_backend:gqa_prefill", cpu_backend.DTYPES, accepts=cpu_backend.accepts_gqa_prefill),
            "triton": Impl(
                "gemma4_fast.triton.gqa_prefill:gqa_prefill", triton_backend.DTYPES, accepts=triton_backend.accepts_gqa_prefill
            ),
            "torch": Impl("gemma4_fast.ops.torch_backend:gqa_prefill"),
        },
    )
)
