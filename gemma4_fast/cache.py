"""KV caches. Each layer keeps only what its kind needs:

sliding   a ring of the window, rounded up to a tile: slot = position mod size. Order never matters, K is already rotated.
full      K and V of every position.
V only    for layers whose K and V come from one projection: K = RoPE(w * V) is rebuilt by the attention op.

Layers that share KV have no cache of their own; `KVCache.layer(i)` gives their donor's.
"""

from __future__ import annotations

from collections.abc import Collection
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


def allocate(
    layer: LayerConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str, spare: int = 0
) -> LayerCache:
    """An empty cache for one layer that has keys and values of its own. spare: tokens that a ring has beside its window."""
    slots = min(max_len, layer.window + spare if layer.window else max_len)
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
    are checked without waiting for the device. spare: so many of the newest tokens can be taken back (`take_back`) after they
    have been written; a ring has else forgotten what they took the place of. only: the layers that get memory, None for all;
    the others, which must not run, are given a cache of one that does.
    """

    def __init__(
        self,
        config: Gemma4Config,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        spare: int = 0,
        only: Collection[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 1 <= max_len <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"max_len must lie in [1, max_position_embeddings = {limit}], got {max_len}")
        self.config, self.max_len, self.batch_size, self.spare = config, max_len, batch_size, spare
        self.host_lens = [0] * batch_size
        self.lost = [0] * batch_size  # positions of each sequence below which a ring has taken others' place
        self._used = 0  # slots of full caches that may have been written since they were 0
        layers = config.layers()
        with torch.inference_mode(False):  # made inside inference mode they could not be written outside
            self.lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
            own = {
                c.index: allocate(c, batch_size, max_len, dtype, device, spare)
                for c in layers
                if c.kv_donor is None and (only is None or c.index in only)
            }
        alike = {layers[i].is_sliding: kv for i, kv in own.items()}
        self._layers = []
        for c in layers:
            kv = own.get(c.index if c.kv_donor is None else c.kv_donor)
            if kv is None:
                kv = alike.get(c.is_sliding, next(iter(own.values())))
            self._layers.append(kv)
        self._window = max((c.window for c in layers if c.window), default=0)
        self._ring = min((self.layer(c.index).slots for c in layers if c.window), default=self.max_len)

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
        self.lost = [max(lost, have - self._ring) for lost, have in zip(self.lost, self.host_lens, strict=True)]
        self._used = max(self._used, *self.host_lens)

    def take_back(self, tokens: list[int]) -> None:
        """Forget the newest tokens[b] of each sequence b. ValueError if there are fewer, or a ring has lost what was before."""
        if not all(0 <= n <= have for n, have in zip(tokens, self.host_lens, strict=True)):
            raise ValueError(f"cannot take back {tokens} of {self.host_lens} tokens")
        # The token that comes next, at position have - n, sees those from have - n - window + 1.
        both = zip(self.host_lens, self.lost, tokens, strict=True)
        if not all(n == have or lost <= max(0, have - n - self._window + 1) for have, lost, n in both):
            raise ValueError(f"taking back {tokens} of {self.host_lens} tokens: the sliding window has moved on past them")
        self.host_lens = [have - n for have, n in zip(self.host_lens, tokens, strict=True)]
        self.lost = [lost if have else 0 for lost, have in zip(self.lost, self.host_lens, strict=True)]
        self._set_lens()

    def _set_lens(self) -> None:
        self.lens.copy_(torch.tensor(self.host_lens, dtype=torch.int32))

    def resized(self, max_len: int, spare: int = 0) -> KVCache:
        """A cache of that room with the same tokens. ValueError if they do not fit."""
        if max(self.host_lens) > max_len:
            raise ValueError(f"{max(self.host_lens)} tokens do not fit into max_len = {max_len}")
        return self._copied(torch.arange(self.batch_size), max_len, spare)

    def selected(self, sequences: Tensor) -> KVCache:
        """A cache whose sequence i is a copy of this one's sequences[i]; int64, any number of them."""
        return self._copied(sequences.cpu(), self.max_len, self.spare)

    def reorder(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequences[i] is, in place: a recorded step stays good. sequences [B] int64."""
        order = sequences.tolist()
        if order == list(range(self.batch_size)):
            return
        index = sequences.to(self.lens.device)
        for kv in self.own():
            used = min(self._used, kv.slots)
            for values in (kv.k, kv.v):
                if values is not None:
                    values[:, :used] = values[index, :used]
        self.host_lens, self.lost = ([old[i] for i in order] for old in (self.host_lens, self.lost))
        self._set_lens()

    def _copied(self, sequences: Tensor, max_len: int, spare: int) -> KVCache:
        order, device = sequences.tolist(), self.lens.device
        first = self.own()[0].v
        new = KVCache(self.config, len(order), max_len, first.dtype, device, spare)
        new.lost = [self.lost[i] for i in order]
        new.count([self.host_lens[i] for i in order])
        new._set_lens()
        new._used = self._used
        index, used = sequences.to(device), self._used
        for old, kv in zip(self.own(), new.own(), strict=True):
            for source, target in ((old.k, kv.k), (old.v, kv.v)):
                if source is None or target is None:
                    continue
                if old.slots == kv.slots:
                    target[:, :used] = source[index, :used]
                    continue
                for b, (i, length) in enumerate(zip(order, new.host_lens, strict=True)):
                    kept = torch.arange(max(0, length - min(old.slots, kv.slots)), length, device=device)
                    target[b, kept % kv.slots] = source[i, kept % old.slots]
        return new

    def own(self) -> list[LayerCache]:
        """The caches, each donor's once, in the layers' order."""
        return list({id(c): c for c in self._layers}.values())

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.host_lens, self.lost = [0] * self.batch_size, [0] * self.batch_size
        self.lens.zero_()

    def clear(self) -> None:
        """As it was when it was new: `reset`, and what masked slots hold is 0 again. Not after a pass that was cut off, which
        has written more than it counted."""
        self.reset()
        for kv in self.own():
            for values in (kv.k, kv.v):
                if values is not None:
                    values[:, : self._used + 1].zero_()  # an idle row writes where its next token would be
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, each donor's counted once."""
        return sum(c.v.nbytes + (0 if c.k is None else c.k.nbytes) for c in self.own())
