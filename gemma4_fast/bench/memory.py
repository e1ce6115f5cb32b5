"""Bytes of KV cache, and bytes of it that one decoded token reads, from tensors that are allocated for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from gemma4_fast.bench.rows import Row
from gemma4_fast.cache import allocate
from gemma4_fast.config import PRESETS, LayerConfig
from gemma4_fast.ops.attention import GQA_DECODE

CONTEXTS = tuple(1 << n for n in range(10, 19))  # 1K ... 256K
GEMMA3 = "gemma3-27b"
_LARGE = 64 << 20  # bytes of a layer's cache above which its tensors are made without their memory
# What becomes of a layer in each layout.
LAYOUTS = {
    "K+V of every token": lambda c: dataclasses.replace(c, window=None, k_eq_v=False),
    "K+V, window only": lambda c: dataclasses.replace(c, k_eq_v=False),
    "this package": lambda c: c,
}


def gemma3_layers() -> tuple[LayerConfig, ...]:
    """Gemma 3 27B, for comparison: 62 layers, every sixth one full, 16 KV heads of 128 (its config.json)."""
    return tuple(
        LayerConfig(
            index=i, is_sliding=i % 6 != 5, head_dim=128, num_q_heads=32, num_kv_heads=16,
            window=1024 if i % 6 != 5 else None, k_eq_v=False, kv_donor=None, intermediate_size=21504, is_moe=False,
            rope_theta=1e4 if i % 6 != 5 else 1e6, num_rotary_pairs=64,
        )
        for i in range(62)
    )  # fmt: skip


def members() -> dict[str, tuple[Sequence[LayerConfig], int]]:
    """Layers and longest context of every member, and of Gemma 3 27B."""
    known = {name: (config.layers(), config.max_position_embeddings) for name, config in PRESETS.items()}
    return {**known, GEMMA3: (gemma3_layers(), 131072)}


def measure(layers: Sequence[LayerConfig], context: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, str]:
    """Of one sequence: bytes allocated, bytes that a decode step reads, and where: the device, or in part "meta".

    Each layer's tensors are made on the device; large ones on the meta device, which keeps the books of the same allocation
    without its memory (a test holds the two equal). Layers that share KV allocate nothing and read their donor's.
    """
    allocated, read, where = 0, 0, str(device)
    lens = torch.full((1,), context, dtype=torch.int32)
    for layer in layers:
        size = context * layer.num_kv_heads * layer.head_dim * dtype.itemsize * 2
        on = device if size <= _LARGE else torch.device("meta")
        cache = allocate(layer, 1, context, dtype, on)
        if layer.kv_donor is None:
            allocated += sum(t.untyped_storage().nbytes() for t in (cache.k, cache.v) if t is not None)
        q = torch.empty(1, layer.num_q_heads, layer.head_dim, dtype=dtype, device="meta")
        read += GQA_DECODE.cost(q, cache.k, cache.v, lens, layer.window).bytes - 2 * q.nbytes
        where = where if on == device else "meta"
    return allocated, read, where


def rows(
    wanted: Mapping[str, tuple[Sequence[LayerConfig], int]], contexts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Row, str]]:
    """A row for each member, context and layout, and the command that makes it again."""
    short = str(dtype).removeprefix("torch.")
    for member, (layers, limit) in wanted.items():
        for context in contexts:
            name = f"{member} at {context >> 10}K" if context % 1024 == 0 else f"{member} at {context}"
            for layout, change in LAYOUTS.items():
                if member == GEMMA3 and layout == "this package":
                    continue  # it has no K = V layers, so this would be the same again
                row = Row("cache", name, layout, dtype=short, params={"model": member, "context": context})
                if context > limit:
                    row.status, row.message = "unsupported", f"beyond this model's {limit} positions"
                else:
                    changed = [change(layer) for layer in layers]
                    row.cache_bytes, row.read_bytes, where = measure(changed, context, dtype, device)
                    row.message = "" if where == str(device) else "large layers by the books of the meta device"
                yield row, f"cache --config {member} --context {context} --dtype {short} --device {device}"
