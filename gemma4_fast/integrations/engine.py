"""What an accelerated text model has beside its own: a native model on the same weights, and the say in which calls it serves.

transformers' batches are padded, columns of a rectangle; here tokens travel end to end. `Call` is a rectangle once it is
known which of its columns hold tokens, and that these follow one another as they do here.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from gemma4_fast.errors import UnsupportedError
from gemma4_fast.integrations import binding
from gemma4_fast.integrations.kv_cache import CACHE, Gemma4Cache
from gemma4_fast.layers import Embedded
from gemma4_fast.model import Gemma4

log = logging.getLogger("gemma4_fast")
CHUNK = 2048  # tokens of a prompt that run at once
# What a text model is called with that is served, or says nothing about its keys, values and hidden states.
SERVED = frozenset((
    "input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "per_layer_inputs", "use_cache", "logits_to_keep",
    "return_dict", "output_hidden_states", "labels", "num_items_in_batch", "token_type_ids", "mm_token_type_ids",
))  # fmt: skip
# Ids [B, T], or embeddings [B, T, H] with, in a model that has them, the same per layer [B, T, L * P].
Tokens = Tensor | tuple[Tensor, Tensor | None]


@dataclass
class Call:
    """What a call of the text model asks for, once it is known that it can be served."""

    batch: int
    columns: int
    new: Tensor | None  # [B, T] bool, on the host: columns that hold a token. None: all of them
    mask: Tensor | None  # [B, seen + T] bool, where the caller's is: the same of all columns
    base: list[int]  # of each sequence: the caller's position of its first token
    decode: bool  # one token for each sequence, after others
    image_ids: Tensor | None = None  # [B, T] int32, -1: text
    input_ids: Tensor | None = None  # [B, T], where the caller has them but passes embeddings


@dataclass
class Engine:
    """backend: as `Gemma4`'s. head: the lm_head whose weight the native model has too, if there is one."""

    backend: str | None = None
    head: nn.Module | None = field(default=None, repr=False)
    quantization: str | None = None  # what the weights were quantized to, after which transformers' own are gone
    native: Gemma4 | None = field(default=None, repr=False)
    said: set[str] = field(default_factory=set)
    _unfit: str | None = None  # why the text model cannot be served, as it was when it was looked at last,
    _hooks: int = -1  # and how many hooks there were then
    _needs_grad: bool = False
    _config: dict[str, Any] = field(default_factory=dict, repr=False)
    _addresses: list[int] = field(default_factory=list, repr=False)

    # ---------------------------------------------------------------- weights
    def bind(self, text: nn.Module) -> str | None:
        """Sees to it that the native model has the text model's weights. Returns why it cannot, or None."""
        self._hooks = binding.hooks_made()
        self._unfit = self._bind(text) if self.quantization is None else None
        return self._unfit

    def _bind(self, text: nn.Module) -> str | None:
        now = binding.look(text, self.head)
        if now.unfit is not None:
            return now.unfit
        told: dict[str, Any] = cast(Any, text).config.to_dict()
        if self.native is None or told != self._config or now.addresses != self._addresses:
            try:
                self._share(text, told)
            except ValueError as error:
                self.native = None
                return str(error)
            self._config, self._addresses = told, binding.look(text, self.head).addresses
        self._needs_grad = now.needs_grad
        return None

    def _share(self, text: nn.Module, told: dict[str, Any]) -> None:
        table, head = cast(Any, text).embed_tokens.weight, None if self.head is None else cast(Tensor, self.head.weight)
        tied = head is None or head.data_ptr() == table.data_ptr()  # no head: a text model alone, of which no one asks logits
        config = dataclasses.replace(binding.config_of(told), tie_word_embeddings=tied)
        if self.native is None or self.native.config != config:
            with torch.device("meta"):
                self.native = Gemma4(config, self.backend)
        binding.share(self.native, text, self.head)

    def moving(self) -> None:
        """The text model's weights are about to become other tensors."""
        self._hooks = -1
        if self.quantization is None:
            self.native, self._addresses = None, []  # what it holds would stay beside the new ones

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """They have, each by fn. The quantized ones are the native model's alone."""
        if self.quantization is not None and self.native is not None:
            self.native._apply(fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model's own, which finds the copied weights at its first call."""
        self.only_if_whole("copied")
        new = memo[id(self)] = Engine(self.backend)
        new.head = copy.deepcopy(self.head, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        self.only_if_whole("pickled")
        return {**vars(Engine(self.backend)), "head": self.head}

    def only_if_whole(self, done: str) -> None:
        """UnsupportedError if the weights of transformers' model are gone."""
        if self.quantization is not None:
            raise UnsupportedError(
                f"a model quantized to {self.quantization} cannot be {done}: its weights were freed; load it again instead"
            )

    # ---------------------------------------------------------------- which calls
    def call(self, text: nn.Module, kwargs: dict[str, Any], mm_token_type_ids: Tensor | None = None) -> Call | str:
        """What these arguments of the text model ask for, or why they cannot be served. ValueError for a call that no one can
        serve."""
        given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        cache: Cache | None = kwargs.get(CACHE)
        if (reason := _unusual(text, kwargs, given)) is not None:
            return reason
        assert isinstance(given, Tensor)
        batch, columns = given.shape[:2]
        decode = columns == 1 and cache is not None and cache.get_seq_length() > 0
        # Modules and weights are looked at before a prompt; for one token if a hook was made, or something was moved.
        if not decode or self._hooks != binding.hooks_made():
            self.bind(text)
        if self._unfit is not None or self.native is None:
            return self._unfit or "it has no weights"
        if torch.is_grad_enabled() and (self._needs_grad or given.requires_grad):
            return "gradients are on: call it under torch.no_grad() or torch.inference_mode()"
        if given.device != self.native.device:
            return f"its input is on {given.device}, the model on {self.native.device}"
        if given.is_floating_point() and given.dtype != self.native.dtype:
            return f"its embeddings are {given.dtype}, the model {self.native.dtype}"
        if (reason := self._cannot_continue(cache, batch)) is not None:
            return reason
        own = cache if isinstance(cache, Gemma4Cache) and cache.kv is not None else None
        window = max((c.window for c in self.native.config.layers() if c.window), default=1 << 62)
        call = _placed(kwargs.get("attention_mask"), kwargs.get("position_ids"), own, batch, columns, window)
        if isinstance(call, str):
            return call
        longest = columns + (0 if own is None or own.kv is None else max(own.kv.host_lens))
        if longest > (limit := self.native.config.max_position_embeddings):
            return f"{longest} tokens are more than max_position_embeddings = {limit}"
        if mm_token_type_ids is not None and self.native.config.use_bidirectional_attention == "vision":
            images = spans(mm_token_type_ids)[:, -columns:]
            if images.shape != (batch, columns):
                return f"mm_token_type_ids have shape {list(mm_token_type_ids.shape)}"
            call.image_ids = images if bool((images >= 0).any()) else None
        return call

    def _cannot_continue(self, cache: Cache | None, batch: int) -> str | None:
        """Why what a cache holds cannot be gone on from."""
        if cache is None:
            return None
        if not isinstance(cache, Gemma4Cache):
            fresh = type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0
            return None if fresh else f"its cache is a {type(cache).__name__} that transformers' code fills"
        if cache.cut_off:
            raise RuntimeError("a call was interrupted while it wrote this cache: start with a new one, or `reset()` it")
        if cache.plain:
            return "its cache was filled by transformers' code"
        if cache.kv is None:
            return None
        if cache.model is not self.native or cache.changes != self.native.changes:
            return "its cache was filled with other weights, or where the model was before"
        if cache.kv.batch_size != batch:
            return f"its cache holds {cache.kv.batch_size} sequences, its input {batch}"
        return None

    def decline(self, reason: str) -> None:
        """Says once that a call is left to transformers' code. UnsupportedError if the weights it would need are gone."""
        if self.quantization is not None:
            raise UnsupportedError(
                f"{reason}; transformers' code would have to run this, and its weights were freed when the model was quantized "
                f"to {self.quantization}"
            )
        if reason not in self.said:
            self.said.add(reason)
            log.warning("gemma4_fast: a call, and others like it, is left to transformers' code: %s", reason)

    # ---------------------------------------------------------------- running them
    def cache_for(self, text: nn.Module, cache: Cache | None, wanted: bool) -> Gemma4Cache | None:
        """A call's cache: its own, an empty one made ours, or a new one if it is wanted."""
        native, config = cast(Gemma4, self.native), cast(Any, text).config
        if isinstance(cache, Gemma4Cache):
            if cache.kv is None:
                cache.model = native  # it may have been made for another one
            return cache
        if cache is not None:
            return Gemma4Cache.adopt(cache, native, config)
        return Gemma4Cache(native, config) if wanted else None

    def run(
        self, call: Call, tokens: Tokens, cache: Gemma4Cache | None, *, newest: bool = False, every: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states [B, T, H], zeros for padding; if `newest`, [B, 1, H] of the last column alone. If `every`, also
        the residual streams before the first layer and after each, of the same shape."""
        if cache is None:
            return self._piece(call, tokens, None, slice(0, call.columns), newest=False, every=every)
        native = cast(Gemma4, self.native)
        cache.prepare(call.batch, call.columns)
        try:
            if call.decode and not every and isinstance(tokens, Tensor):
                with native.running():
                    h = cache.graph.run(tokens[:, 0].long(), [1] * call.batch)
                h, streams = h.clone()[:, None], list[Tensor]()  # the step's own output is the next one's, too
            else:
                # Images see each other forwards, so that they stay whole.
                width = call.columns if every or call.image_ids is not None else max(1, CHUNK // call.batch)
                pieces = [slice(lo, min(lo + width, call.columns)) for lo in range(0, call.columns, width)]
                done = [self._piece(call, tokens, cache, piece, newest=newest, every=every) for piece in pieces]
                h, streams = done[-1]
                if not newest and len(done) > 1:
                    h = torch.cat([d[0] for d in done], 1)
        except BaseException:
            cache.broke()
            raise
        cache.wrote(call.columns, call.mask, call.base)
        return h, streams

    def _piece(
        self, call: Call, tokens: Tokens, cache: Gemma4Cache | None, columns: slice, *, newest: bool, every: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """`run` of some columns."""
        native, width = cast(Gemma4, self.native), columns.stop - columns.start
        kv = None if cache is None else cache.kv
        new = None if call.new is None else call.new[:, columns]
        lens = [width] * call.batch if new is None else new.sum(1).tolist()
        rows = None if new is None else new.flatten().nonzero()[:, 0].to(native.device)
        last = [n > 0 for n in lens] if newest else None

        def flat(x: Tensor) -> Tensor:  # [B, columns, ...] -> [T, ...]
            x = x[:, columns].flatten(0, 1)
            return x if rows is None else x[rows]

        def shaped(x: Tensor) -> Tensor:  # and back
            if last is not None:
                return x[:, None]
            if rows is None:
                return x.view(call.batch, width, -1)
            whole = x.new_zeros(call.batch * width, x.shape[1])
            return whole.index_copy_(0, rows, x).view(call.batch, width, -1)

        streams: list[Tensor] = []
        with native.running():
            if not any(lens):  # padding
                like = native.model.norm.weight
                return like.new_zeros(call.batch, 1 if newest else width, len(like)), streams
            inputs: Tensor | Embedded
            if isinstance(tokens, Tensor):
                inputs = flat(tokens).long()
            else:
                x = flat(tokens[0])
                inputs = x, None if tokens[1] is None else native.model.per_layer_inputs(x, flat(tokens[1]))
            step = native.model.step(lens, kv)
            if call.image_ids is not None:
                step.image_ids = flat(call.image_ids.to(native.device))
            h = native.model(inputs, step, kv, last, streams if every else None)
            return shaped(h), [shaped(s) for s in streams]


def _unusual(text: nn.Module, kwargs: dict[str, Any], given: Any) -> str | None:
    """What a call asks for beside hidden states of tokens after others."""
    config = cast(Any, text).config
    if text.training:
        return "the model is in training mode"
    if torch.jit.is_tracing():
        return "it is being traced"
    if not isinstance(given, Tensor) or (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None):
        return "it is given neither or both of input_ids and inputs_embeds"
    if given.dim() != (3 if given.is_floating_point() else 2) or given.numel() == 0:
        return f"its input has shape {list(given.shape)}"
    for name, value in kwargs.items():
        if name not in SERVED and value is not None and value is not False:
            return f"{name} is asked for"
    for name in ("output_attentions", "output_router_logits"):
        if kwargs.get(name) is None and getattr(config, name, False):
            return f"{name} is on in its configuration"
    hidden = kwargs.get("output_hidden_states")
    if not isinstance(getattr(config, "output_hidden_states", False) if hidden is None else hidden, bool):
        return "it asks for some layers' hidden states"
    if getattr(config, "is_causal", None) is False:
        return "is_causal is off"
    if torch.is_autocast_enabled(given.device.type):
        return "autocast is on"
    return None


def _placed(mask: Any, positions: Any, cache: Gemma4Cache | None, batch: int, columns: int, window: int) -> Call | str:
    """Which of the call's columns hold tokens; or what is there beside tokens that follow one another after padding."""
    seen, lens = (0, [0] * batch) if cache is None or cache.kv is None else (cache.seen, cache.kv.host_lens)
    before = None if cache is None else cache.mask
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "its attention mask is not one of padding, [batch, tokens]"
    if mask is not None and mask.shape != (batch, seen + columns):
        return f"its attention mask has shape {list(mask.shape)}, its tokens {[batch, seen + columns]}"
    if positions is not None and not (
        isinstance(positions, Tensor)
        and positions.dim() == 2
        and positions.shape[1] == columns
        and len(positions) in (1, batch)
    ):
        return "its position_ids are not [batch, tokens]"
    new: Tensor | None = None
    if mask is not None:
        mask = mask.bool()
        known = mask.new_ones(batch, seen) if before is None else before.to(mask.device)
        if not torch.equal(mask[:, :seen], known):
            if bool((mask[:, :seen] & ~known).any()):
                _refuse_unmasked(seen)
            return "its attention mask hides tokens that were seen before"
        new = mask[:, seen:].cpu()
        if bool(new.all()):
            new, mask = None, None if before is None else mask
    elif before is not None:
        _refuse_unmasked(seen)
    # Each token's number in its sequence [B, T], and what the caller calls its position.
    real = torch.ones(batch, columns, dtype=torch.bool) if new is None else new
    number = torch.tensor(lens)[:, None] + real.cumsum(1) - 1
    given = torch.arange(seen, seen + columns)[None] if positions is None else positions.cpu()
    shift, base = given - number, []
    for b, n in enumerate(lens):
        own = shift[b][real[b]]
        wanted = cache.base[b] if cache is not None and n > 0 else int(own[0]) if len(own) else 0
        if bool((own != wanted).any()):
            return "its positions do not follow one another"
        base.append(wanted)
    if mask is not None and mask.shape[1] > window and _has_gaps(mask):
        return "there is padding between its tokens, which counts for transformers' sliding window"
    return Call(batch, columns, new, mask, base, columns == 1 and new is None and min(lens) > 0)


def _refuse_unmasked(seen: int) -> None:
    raise ValueError(
        f"attention_mask shows tokens among the first {seen} that were padding when they were seen, so that no keys of them "
        "were kept: pass the mask of before, and the new tokens' after it"
    )


def _has_gaps(mask: Tensor) -> bool:
    """Whether a sequence's tokens [B, S] are not all beside each other."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return bool((starts.sum(1) > 1).any())


def spans(mm_token_type_ids: Tensor) -> Tensor:
    """[B, S] kinds of tokens, 1 an image's and 2 a video's -> [B, S] int32, the number of the image, -1 for the others."""
    image = (mm_token_type_ids == 1) | (mm_token_type_ids == 2)
    starts = image.clone()
    starts[:, 1:] &= ~image[:, :-1]
    return torch.where(image, starts.cumsum(1) - 1, -1).to(torch.int32)
