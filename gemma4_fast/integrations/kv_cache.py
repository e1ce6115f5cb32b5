"""Gemma4Cache: what transformers calls a cache, over this package's KV caches.

V alone for layers whose K and V come from one projection, a ring for sliding ones, nothing for padding. transformers sees the
columns of its padded batches; here only the tokens count. Whoever writes keys and values itself (`update`, which the original
code does) gets transformers' own layers, filled with what was there: from then on it is an ordinary DynamicCache.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from gemma4_fast.cache import TILE, KVCache
from gemma4_fast.generate import ROOM
from gemma4_fast.graph import DecodeGraph
from gemma4_fast.reference.ops import cached_sequence, rope_angles, rotate

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

# What a model calls its cache: `past_key_values` up to transformers 5.23.
CACHE = "cache" if "cache" in inspect.signature(Gemma4TextModel.forward).parameters else "past_key_values"
AHEAD = 8192  # tokens for which there is room at first, however many `generate` may make


class Gemma4Cache(Cache):
    """The keys and values of a batch, for an accelerated model's forward and `generate`.

    model: the native model that writes it. text_config: transformers' configuration of the same text model. room: how many
    tokens a sequence is expected to reach; without one, or beyond, the cache grows by doubling. `layers[i].keys` and `.values`
    are made for whoever asks: to write into them changes nothing here.
    """

    is_compileable = False
    is_croppable = True
    offloading = False
    layer_class_to_replicate = None

    def __init__(self, model: Gemma4, text_config: Any, room: int | None = None) -> None:
        self.model, self.text_config = model, text_config
        self.room = room
        self.kv: KVCache | None = None  # None as long as it is empty, and once it is `plain`
        self.seen = 0  # columns
        self.mask: Tensor | None = None  # [B, seen] bool: columns that hold a token. None: all of them
        self.base: list[int] = []  # of each sequence: the position that the caller gives its first token
        self.plain = False  # transformers' own layers hold what there is
        self.record_past = self.keeps_all = False
        self._since_crop = 0  # columns since the last crop, which may take them back
        self.changes = -1  # the model's, when it was filled
        self.cut_off = False  # whether a pass that wrote it did not end
        self._own = DynamicCache(config=text_config)  # its layers: empty ones unless `plain`
        self._graph: list[DecodeGraph] = []  # the recorded decode step over `kv`, if any
        weakref.finalize(self, _give, self._graph).atexit = False

    @classmethod
    def adopt(cls, cache: Cache, model: Gemma4, text_config: Any, room: int | None = None) -> Gemma4Cache | None:
        """Makes an empty DynamicCache, in place, one of these. None if it is another cache, or not empty."""
        if type(cache) is not DynamicCache or cache.offloading or any(_is_used(layer) for layer in cache.layers):
            return None
        record_past = any(getattr(layer, "record_past", False) for layer in cache.layers)
        keeps_all = not cache.layers  # made without a configuration, it has no windows, and can be cropped to any length
        marks = {k: v for k, v in vars(cache).items() if k.startswith("_is_")}  # that `generate` leaves
        vars(cache).clear()
        cache.__class__ = cls
        adopted = cast(Gemma4Cache, cache)
        adopted.__init__(model, text_config, room)  # type: ignore[misc]
        adopted.__dict__.update(marks)
        adopted.record_past, adopted.keeps_all = record_past, keeps_all
        return adopted

    # ---------------------------------------------------------------- for the passes of the native model
    def prepare(self, batch: int, columns: int) -> None:
        """Sees to it that `kv` has room for so many columns more of each of its `batch` sequences."""
        self.only_if_whole()
        longest = columns + (0 if self.kv is None else max(self.kv.host_lens))
        limit = self.model.config.max_position_embeddings
        spare = -(-(self._since_crop + columns) // TILE) * TILE if self.record_past else 0
        if self.kv is None:
            self.changes = self.model.changes
            wanted = longest + ROOM if self.room is None else min(self.room, longest + AHEAD)
            room = min(limit, -(-max(longest, wanted) // ROOM) * ROOM)
            graph = None if spare or self.keeps_all else self.model.spares.take(self.model, batch, room)
            if graph is not None:
                self._graph[:] = [graph]
                self.kv = graph.cache
            else:
                device, dtype = self.model.device, self.model.dtype
                self.kv = KVCache(self.model.config, batch, room, dtype, device, room if self.keeps_all else spare)
        if longest > self.kv.max_len or spare > self.kv.spare:
            room = self.kv.max_len if longest <= self.kv.max_len else min(limit, max(2 * self.kv.max_len, longest))
            self._set(self.kv.resized(room, room if self.keeps_all else max(spare, self.kv.spare)))

    @property
    def graph(self) -> DecodeGraph:
        """The decode steps over `kv`."""
        assert self.kv is not None
        if not self._graph:
            self._graph[:] = [DecodeGraph(self.model, self.kv)]
        return self._graph[0]

    def wrote(self, columns: int, mask: Tensor | None, base: list[int]) -> None:
        """After a pass: `kv` has counted its tokens. mask [B, seen + columns]: of all columns now, None if all hold tokens."""
        self.seen += columns
        self._since_crop += columns
        self.mask, self.base = mask, base

    def unwrite(self) -> None:
        """As before the last pass, which wrote one token for each sequence: of no ring's window has that taken anything."""
        assert self.kv is not None
        self.kv.take_back([1] * self.kv.batch_size)
        self.seen -= 1
        self._since_crop -= 1
        self.mask = None if self.mask is None else self.mask[:, :-1]

    def only_if_whole(self) -> None:
        """RuntimeError after a pass that was cut off."""
        if self.cut_off:
            raise RuntimeError("a call was interrupted while it wrote this cache: start with a new one, or `reset()` it")

    def forget_graph(self) -> None:
        """The recorded step holds weights that are to go."""
        self._graph.clear()

    def broke(self) -> None:
        """A pass did not end: it has written more than it has counted, and into a ring over what is still to be seen."""
        self.cut_off = True
        self._set(None)

    def _set(self, kv: KVCache | None) -> None:
        self._graph.clear()
        self.kv = kv

    # ---------------------------------------------------------------- transformers' view of it
    @property
    def layers(self) -> list[Any]:
        own = self._own.layers
        return own if self.plain else [layer if _is_dummy(layer) else _Layer(self, i, layer) for i, layer in enumerate(own)]

    def __repr__(self) -> str:
        batch = 0 if self.kv is None else self.kv.batch_size
        return f"Gemma4Cache({'plain, ' if self.plain else ''}{batch} sequences, {self.get_seq_length()} columns)"

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._own.get_seq_length(layer_idx) if self.plain else self.seen

    def dense(self, index: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """K, V [B, Hkv, n, D] of layer `index`, copies, in transformers' columns: the newest n that its kind of layer keeps;
        zeros for padding. None where it is empty."""
        if self.kv is None:
            return None, None
        layer, kv = self.model.config.layer(index), self.kv.layer(index)
        attention = self.model.model.layer(index).self_attn
        freq = self.model.model.inv_freq(layer.is_sliding, kv.v.device)
        rebuild = (freq, attention.k_norm.weight) if layer.k_eq_v else (None, None)
        first = 0
        if layer.window:
            first = max(0, self.seen - (layer.window - 1) - (self._since_crop if self.record_past else 0))
        shape = kv.v.shape[0], kv.v.shape[2], self.seen - first, kv.v.shape[3]
        keys, values = kv.v.new_zeros(shape), kv.v.new_zeros(shape)
        for b, (length, base) in enumerate(zip(self.kv.host_lens, self.base, strict=True)):
            k, v, positions = cached_sequence(length, None if kv.k is None else kv.k[b], kv.v[b], None, *rebuild)
            if base:  # they are turned by the tokens' numbers; the caller counts from elsewhere
                k = rotate(k, *rope_angles(torch.full_like(positions, base), freq))
            columns = positions if self.mask is None else self.mask[b].nonzero()[:, 0].to(positions.device)[positions]
            there = columns >= first
            keys[b, :, columns[there] - first] = k[there].transpose(0, 1)
            values[b, :, columns[there] - first] = v[there].transpose(0, 1)
        return keys, values

    def to_plain(self) -> None:
        """Turns it into transformers' own layers."""
        self.only_if_whole()
        if self.plain:
            return
        own = self._own = DynamicCache(config=self.text_config)
        if self.record_past:
            own.activate_past_recording()
        for index, layer in enumerate(own.layers):
            if self.kv is None or _is_dummy(layer):
                continue
            if self.model.config.layer(index).kv_donor is not None:  # transformers before 5.18 has a layer there, unused
                continue
            layer.update(*self.dense(index))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self.seen
        self.plain = True
        self._set(None)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """transformers' own way to write a layer's keys and values, after which all layers are transformers' own."""
        self.to_plain()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.to_plain()  # whoever makes masks will write
        return super().get_mask_sizes(query_length, layer_idx)

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: it is made when its first tokens come."""

    @property
    def batch_size(self) -> int:
        if self.plain:
            return max((layer.keys.shape[0] for layer in self.layers if _is_used(layer)), default=-1)
        return -1 if self.kv is None else self.kv.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.kv is not None or (self.plain and any(_is_used(layer) for layer in self.layers))

    def activate_past_recording(self) -> None:
        self.record_past, self._since_crop = True, 0
        if self.plain:
            super().activate_past_recording()

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.record_past

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        if self.plain:
            super().reset()
        elif self.kv is not None:
            self.kv.clear()
        self.seen, self.mask, self.base, self._since_crop, self.cut_off = 0, None, [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns: so many as -tokens_to_remove says. RuntimeError if the sliding window has moved on past
        them; `activate_past_recording` before they are written keeps what they push out of it."""
        tokens_to_remove = int(tokens_to_remove)  # some versions hand over a tensor
        if tokens_to_remove > 0:
            DynamicLayer().crop(tokens_to_remove)  # ValueError, but for transformers 5.17, where it is the length to be left
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if self.plain:
            super().crop(tokens_to_remove)
        elif self.kv is not None and tokens_to_remove:
            columns = min(-tokens_to_remove, self.seen)
            kept = self.seen - columns
            if self.mask is None:
                tokens = [columns] * self.kv.batch_size
            else:
                tokens = self.mask[:, kept:].sum(1).tolist()
            try:
                self.kv.take_back(tokens)
            except ValueError as error:
                raise RuntimeError(f"{error}. Call `activate_past_recording` on the cache before they are written") from error
            self.seen = kept
            if self.mask is not None:
                self.mask = None if bool(self.mask[:, :kept].all()) else self.mask[:, :kept]
        self._since_crop = 0
        if self.kv is not None and self.kv.spare > 8 * TILE and not self.keeps_all:  # a long prompt's; what is drafted is short
            self._set(self.kv.resized(self.kv.max_len, 2 * TILE))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what beam_idx[i] is."""
        if self.plain:
            super().reorder_cache(beam_idx)
        elif self.kv is not None:
            if len(beam_idx) != self.kv.batch_size:
                self.batch_select_indices(beam_idx)
                return
            self.kv.reorder(beam_idx)
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order; int64 indices or a mask [B] bool."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        if self.plain:
            super().batch_select_indices(indices)
        elif self.kv is not None:
            self._set(self.kv.selected(indices))
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` of them, one after the other."""
        if (batch := self.batch_size) > 0:
            self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def _reorder(self, indices: Tensor) -> None:
        order = indices.tolist()
        self.mask = None if self.mask is None else self.mask[indices.to(self.mask.device)]
        self.base = [self.base[i] for i in order] if self.base else []

    def __deepcopy__(self, memo: dict[int, Any]) -> Gemma4Cache:
        """A copy for the same model: of a common beginning, say, that several texts go on from."""
        new = Gemma4Cache(self.model, self.text_config, self.room)
        memo[id(self)] = new
        for name in ("seen", "mask", "base", "plain", "record_past", "keeps_all", "changes", "cut_off", "_since_crop"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        if self.plain:
            new._own = copy.deepcopy(self._own, memo)
        new.kv = None if self.kv is None else self.kv.selected(torch.arange(self.kv.batch_size))
        return new

    def __reduce__(self) -> Any:
        """Pickled, it is a DynamicCache: the model that could rebuild its keys does not go with it."""
        plain = copy.deepcopy(self)
        plain.to_plain()
        return _same, (plain._own,)


class _Layer:
    """One layer of a Gemma4Cache, as transformers shows it."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: Gemma4Cache, index: int, own: Any) -> None:
        self._cache, self._index, self._of = cache, index, own
        self.is_sliding = bool(getattr(own, "is_sliding", False))
        if self.is_sliding:
            self.sliding_window = own.sliding_window
            self._sliding_window_tensor = own._sliding_window_tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._index})"

    @property
    def is_initialized(self) -> bool:
        return self._cache.kv is not None

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, n, D], a copy; rebuilt where V alone is kept."""
        return self._cache.dense(self._index)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._cache.to_plain()
        self._cache.layers[self._index].keys = value

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, n, D], a copy."""
        return self._cache.dense(self._index)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._cache.to_plain()
        self._cache.layers[self._index].values = value

    @property
    def record_past(self) -> bool:
        return self._cache.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._cache.record_past = value

    @property
    def batch_size(self) -> int:
        return self._cache.batch_size

    @property
    def device(self) -> torch.device:
        return self._cache.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._cache.model.dtype

    def get_seq_length(self) -> int:
        return self._cache.seen

    def get_max_length(self) -> int:
        return cast(int, self._of.get_max_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._index)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key_states, value_states, self._index, *args, **kwargs)

    @property
    def cumulative_length(self) -> int:
        return self._cache.seen

    def __getattr__(self, name: str) -> Any:
        if name not in _LAYER_ALONE:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        self._cache.to_plain()
        return getattr(self._cache.layers[self._index], name)


# What changes one layer and not the others: they become transformers' own, which can differ.
_LAYER_ALONE = ("crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch")


def _is_dummy(layer: Any) -> bool:
    """Whether transformers keeps nothing there: the layer reads another's keys and values."""
    return type(layer).__name__ == "DummyLayer"


def _is_used(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel() > 0


def _same(value: Any) -> Any:
    return value


def _give(graph: list[DecodeGraph]) -> None:
    """What a cache that is no more leaves to the model's next generation."""
    for g in graph:
        if g.cache.spare == 0:
            g.model.spares.give(g)
