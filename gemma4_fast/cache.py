"""KV caches. Each layer keeps only what its kind needs:

sliding   a ring of the window, rounded up to a tile: slot = position mod size. Order never matters, K is already rotated.
full      K and V of every position.
V only    for layers whose K and V come from one projection: K = RoPE(w * V) is rebuilt by the attention op.

Layers that share KV have no cache of their own; `KVCache.layer(i)` gives their donor's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_fast import native
from gemma4_fast.config import Gemma4Config, LayerConfig

TILE = 64  # kernels read a cache in tiles of this many slots


@dataclass
class LayerCache:
    """k, v [B, S, Hkv, D]; k is None for a V-only cache."""

    k: Tensor | None
    v: Tensor

    @property
    def slots(self) -> int:
        """S, slots per sequence."""
        return self.v.shape[1]

    def first(self, limit: int) -> LayerCache:
        """The slots of positions below `limit`, of a cache that has not gone round: views, where there are more."""
        if limit >= self.slots:
            return self
        return LayerCache(None if self.k is None else self.k[:, :limit], self.v[:, :limit])

    def rows(self, sequence: Tensor, position: Tensor) -> Tensor:
        """Row of the cache flattened to [B*S, Hkv, D] for each (sequence, position), both int64."""
        return sequence * self.slots + position % self.slots

    def write(self, k: Tensor, v: Tensor, rows: Tensor) -> None:
        """k, v [T, Hkv, D] to the rows [T] int64, which must be distinct."""
        self.v.view(-1, *self.v.shape[2:]).index_copy_(0, rows, v)
        if self.k is not None:
            self.k.view(-1, *self.k.shape[2:]).index_copy_(0, rows, k)


def allocate(layer: LayerConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
    """An empty cache for one layer that has keys and values of its own."""
    slots = min(max_len, layer.window or max_len)
    slots = -(-slots // TILE) * TILE
    shape = (batch_size, slots, layer.num_kv_heads, layer.head_dim)
    return LayerCache(None if layer.k_eq_v else _zeros(shape, dtype, device), _zeros(shape, dtype, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, not empty: a masked slot still takes part as 0 * value, and 0 * NaN is NaN."""
    new = torch.empty(shape, dtype=dtype, device=device)
    native.use_huge_pages(new)
    return new.zero_()


class KVCache:
    """The caches of all layers for `batch_size` sequences of up to `max_len` tokens each.

    `lens` [B] int32 on the device counts the tokens each sequence has; `host_lens` is the same on the host, so that bounds
    are checked without waiting for the device.
    """

    def __init__(
        self,
        config: Gemma4Config,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 1 <= max_len <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"max_len must lie in [1, max_position_embeddings = {limit}], got {max_len}")
        self.config, self.max_len, self.batch_size = config, max_len, batch_size
        self.host_lens = [0] * batch_size
        self._used = 0  # slots of full caches that may have been written since they were 0
        layers = config.layers()
        with torch.inference_mode(False):  # made inside inference mode they could not be written outside
            self.lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
            own = {c.index: allocate(c, batch_size, max_len, dtype, device) for c in layers if c.kv_donor is None}
        self._layers = [own[c.index if c.kv_donor is None else c.kv_donor] for c in layers]

    def layer(self, index: int) -> LayerCache:
        """The cache that decoder layer `index` reads: its own, or its donor's."""
        return self._layers[index]

    def advance(self, new: list[int]) -> None:
        """Count `new[b]` more tokens for each sequence b, after all layers have written them."""
        self.count(new)
        self.lens += torch.tensor(new, dtype=torch.int32).to(self.lens.device, non_blocking=True)

    def count(self, new: list[int]) -> None:
        """The host's half of `advance`, for a step that counts on the device itself."""
        self.host_lens = [have + n for have, n in zip(self.host_lens, new, strict=True)]
        self._used = max(self._used, *self.host_lens)

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.host_lens = [0] * self.batch_size
        self.lens.zero_()

    def clear(self) -> None:
        """As it was when it was new: `reset`, and what masked slots hold is 0 again. Not after a pass that was cut off, which
        has written more than it counted."""
        self.reset()
        for kv in {id(c): c for c in self._layers}.values():
            for values in (kv.k, kv.v):
                if values is not None:
                    values[:, : self._used + 1].zero_()  # an idle row writes where its next token would be
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, each donor's counted once."""
        unique = {id(c): c for c in self._layers}.values()
        return sum(c.v.nbytes + (0 if c.k is None else c.k.nbytes) for c in unique)
