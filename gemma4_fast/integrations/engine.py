"""What an accelerated text model has beside its own: a native model on the same weights, and the say in which calls it serves.

transformers' batches are padded, columns of a rectangle; here tokens travel end to end. `Call` is a rectangle once it is
known which of its columns hold tokens, and that these follow one another as they do here.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from gemma4_fast.config import Gemma4Config
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.integrations import binding
from gemma4_fast.integrations.binding import Look
from gemma4_fast.integrations.interfaces import is_transformed
from gemma4_fast.integrations.kv_cache import CACHE, Gemma4Cache
from gemma4_fast.layers import Embedded
from gemma4_fast.model import Gemma4

log = logging.getLogger("gemma4_fast")
CALL_LEFT = "a call, and others like it, is left to transformers' code"
ALL_LEFT = "accelerate makes nothing faster: every call is left to transformers' code as long as this holds"
CHUNK = 2048  # tokens of a prompt that run at once
FILLED = "its cache was filled by transformers' code"
GRADIENTS = "gradients are on: call it under torch.no_grad() or torch.inference_mode()"
# What a text model is called with that is served, or says nothing about its keys, values and hidden states.
SERVED = frozenset((
    "input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "per_layer_inputs", "use_cache", "logits_to_keep",
    "return_dict", "output_hidden_states", "labels", "num_items_in_batch", "token_type_ids", "mm_token_type_ids",
))  # fmt: skip
# Ids [B, T], or embeddings [B, T, H] with, in a model that has them, the same per layer [B, T, L * P].
Tokens = Tensor | tuple[Tensor, Tensor | None]


# transformers' own ways to attend and to run experts, and this package's: what comes out is the same. Others are someone's own.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention", "kernels-community/", "paged|", "gemma4_fast")
EXPERTS = ("eager", "grouped_mm", "batched_mm", "deepgemm", "gemma4_fast")


# Text models as they were when they were looked at last. Not their engines', which they have: what is no more is to be freed at
# once, not when Python looks for circles.
_LOOKS: weakref.WeakKeyDictionary[nn.Module, Look] = weakref.WeakKeyDictionary()


def _holds(text: nn.Module) -> bool:
    look = _LOOKS.get(text)
    return look is not None and look.holds()


@dataclass
class Call:
    """What a call of the text model asks for, once it is known that it can be served. B sequences, T columns."""

    batch: int
    columns: int
    new: Tensor | None  # [B, T] bool, on the host: columns that hold a token. None: all of them
    mask: Tensor | None  # [B, seen + T] bool, where the caller's is: the same of all columns
    base: list[int]  # of each sequence: the caller's position of its first token
    decode: bool  # one token for each sequence, after others
    image_ids: Tensor | None = None  # [B, T] int32, -1: text
    images_everywhere: bool = False  # they see each other in all layers, not in the sliding ones alone
    input_ids: Tensor | None = None  # [B, T], where the caller has them but passes embeddings


class Engine:
    """backend: as `Gemma4`'s. head: the lm_head whose weight the native model has too, if there is one."""

    def __init__(self, backend: str | None = None, head: nn.Module | None = None) -> None:
        self.backend = backend
        self._head = None if head is None else weakref.ref(head)  # which has this
        self._lock = threading.RLock()
        self.native: Gemma4 | None = None
        self.quantization: str | None = None  # what the weights were quantized to, after which transformers' own are gone
        self.said: set[str] = set()
        self._caches: weakref.WeakSet[Gemma4Cache] = weakref.WeakSet()  # those that were made for `native`
        self._unfit: str | None = None
        self._config: dict[str, Any] = {}  # what transformers' tells
        self._weights: list[Any] = []  # those that `native` has, and where
        self._rotary: list[tuple[int, int]] = []

    @property
    def head(self) -> nn.Module | None:
        return None if self._head is None else self._head()

    # ---------------------------------------------------------------- weights
    def bind(self, text: nn.Module) -> str | None:
        """Sees to it that the native model has the text model's weights. Returns why it cannot, or None."""
        with self._lock:
            _LOOKS.pop(text, None)
            look = Look(text, self.head)
            unfit = binding.unfit(text, weights=self.quantization is None)
            if unfit is None and self.quantization is None:
                try:
                    unfit = self._bind(text, look)
                except ValueError as error:
                    unfit, self._weights = str(error), []
            self._unfit = unfit
            _LOOKS[text] = look if look.holds() else Look(text, self.head)
            return unfit

    def _bind(self, text: nn.Module, look: Look) -> str | None:
        told: dict[str, Any] = cast(Any, text).config.to_dict()
        buffers = [b for b in cast(nn.Module, text.rotary_emb).buffers() if not b.is_inference()]
        rotary = [(b.data_ptr(), b._version) for b in buffers]  # which goes up as someone writes into one
        same = told == self._config and look.weights == self._weights and rotary == self._rotary
        if self.native is not None and same:
            return None
        if told.get("num_hidden_layers") != len(cast(nn.ModuleList, text.layers)):
            return "it has another number of layers than its configuration"
        table, head = cast(Any, text).embed_tokens.weight, None if self.head is None else cast(Tensor, self.head.weight)
        tied = head is None or head.data_ptr() == table.data_ptr()  # no head: a text model alone, of which no one asks logits
        config = dataclasses.replace(Gemma4Config.from_dict(told), tie_word_embeddings=tied)
        native = self.native
        if native is None or native.config != config:
            with torch.device("meta"):
                native = Gemma4(config, self.backend)
            native.to(table.dtype)
        if (reason := binding.odd_rotary(text, native)) is not None:
            return reason
        binding.share(native, text, self.head)
        self._config, self._weights, self._rotary = told, Look(text, self.head).weights, rotary
        self.native = native
        return None

    def moving(self, text: nn.Module, moves: bool) -> None:
        """The text model's weights are about to become other tensors, or to go; or not, as in a `.to` where they are."""
        _LOOKS.pop(text, None)  # it holds them
        if moves and self.quantization is None and self.native is not None:
            for cache in self._caches:
                cache.forget_graph()
            binding.release(self.native)  # what it holds would stay beside the new ones, for as long as one of its caches
            self.native, self._weights = None, []

    def moved(self, text: nn.Module, fn: Callable[[Tensor], Tensor], moves: bool) -> None:
        """They have, each by fn. The quantized ones are the native model's alone."""
        if moves and self.quantization is not None and self.native is not None:
            self.native._apply(fn)
            binding.share(self.native, text, self.head)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model's own, which finds the copied weights at its first call."""
        self.only_if_whole("copied")
        new = memo[id(self)] = Engine(self.backend)
        if self.head is not None:
            new._head = weakref.ref(copy.deepcopy(self.head, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        self.only_if_whole("pickled")
        return {"backend": self.backend, "head": self.head}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def only_if_whole(self, done: str) -> None:
        """UnsupportedError if the weights of transformers' model are gone."""
        if self.quantization is not None:
            raise UnsupportedError(
                f"a model quantized to {self.quantization} cannot be {done}: its weights were freed; load it again instead"
            )

    # ---------------------------------------------------------------- which calls
    @property
    def looks_late(self) -> bool:
        """Whether a decode step is launched before it is found out that the model has changed: a GPU is busy with it then."""
        return self.native is not None and self.native.device.type == "cuda"

    def is_stale(self, text: nn.Module) -> bool:
        """Whether a decode step that was not looked at before has run with what the model was."""
        if not self.looks_late or _holds(text):
            return False
        _LOOKS.pop(text, None)
        return True

    def call(self, text: nn.Module, kwargs: dict[str, Any], mm_token_type_ids: Tensor | None = None) -> Call | str:
        """What these arguments of the text model ask for, or why they cannot be served. ValueError for a call that no one can
        serve."""
        given = given_of(kwargs)
        cache: Cache | None = kwargs.get(CACHE)
        if isinstance(cache, Gemma4Cache):
            cache.only_if_whole()
        if (reason := _unusual(text, kwargs, given)) is not None:
            return reason
        assert isinstance(given, Tensor)
        batch, columns = given.shape[:2]
        decode = columns == 1 and cache is not None and cache.get_seq_length() > 0
        # Before a prompt all is looked at, its configuration too; before a token, whether anything has become another.
        if not decode or text not in _LOOKS or not (self.looks_late or _holds(text)) or not self._same_window(text):
            self.bind(text)
        if self._unfit is not None or self.native is None:
            return self._unfit or "it has no weights"
        if torch.is_grad_enabled():
            wants = any(isinstance(v, Tensor) and v.requires_grad for v in kwargs.values())
            if wants or Look(text, self.head).needs_grad:
                return GRADIENTS
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
            seen = 0 if own is None else own.seen
            images = spans(mm_token_type_ids)[:, seen : seen + columns]  # they are told from the beginning
            if images.shape != (batch, columns):
                return f"its mm_token_type_ids have shape {list(mm_token_type_ids.shape)}, for {seen + columns} tokens"
            call.image_ids = images if bool((images >= 0).any()) else None
        return call

    def _same_window(self, text: nn.Module) -> bool:
        """What transformers reads of a configuration at each call."""
        if self.native is None:
            return False
        config, own = cast(Any, text).config, self.native.config
        same = config.sliding_window == own.sliding_window
        return same and (not own.enable_moe_block or config.top_k_experts == own.top_k_experts)

    def _cannot_continue(self, cache: Cache | None, batch: int) -> str | None:
        """Why what a cache holds cannot be gone on from."""
        if cache is None:
            return None
        if not isinstance(cache, Gemma4Cache):
            fresh = type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0
            return None if fresh else f"its cache is a {type(cache).__name__} that transformers' code fills"
        if cache.plain:
            return FILLED
        if cache.kv is None:
            return None
        if cache.model is not self.native or cache.changes != self.native.changes:
            return "its cache was filled with other weights, or where the model was before"
        if cache.kv.batch_size != batch:
            return f"its cache holds {cache.kv.batch_size} sequences, its input {batch}"
        return None

    def decline(self, reason: str, what: str = CALL_LEFT) -> None:
        """Says once that `what` is left to transformers' code. UnsupportedError if the weights it would need are gone."""
        if self.quantization is not None:
            raise UnsupportedError(
                f"{reason}; transformers' code would have to run this, and its weights were freed when the model was quantized "
                f"to {self.quantization}"
            )
        if reason == FILLED and self.said:  # which is why it was filled
            return
        kind = re.sub(r"\d+", "N", reason)
        if kind not in self.said:
            self.said.add(kind)
            log.warning("gemma4_fast: %s: %s", what, reason)

    # ---------------------------------------------------------------- running them
    def cache_for(self, text: nn.Module, cache: Cache | None, wanted: bool) -> Gemma4Cache | None:
        """A call's cache: its own, an empty one made ours, or a new one if it is wanted."""
        native, config = cast(Gemma4, self.native), cast(Any, text).config
        if isinstance(cache, Gemma4Cache):
            if cache.kv is None:
                cache.model = native  # it may have been made for another one
        elif cache is not None:
            cache = Gemma4Cache.adopt(cache, native, config)
        elif wanted:
            cache = Gemma4Cache(native, config)
        if cache is not None:
            self._caches.add(cache)
        return cache

    def run(
        self, call: Call, tokens: Tokens, cache: Gemma4Cache | None, *, last_only: bool = False, all_layers: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states [B, T, H], zeros for padding; if `last_only`, [B, 1, H] of the last column alone. With
        `all_layers` also the residual streams before the first layer and after each, of the same shape."""
        if cache is None:
            return self._piece(call, tokens, None, slice(0, call.columns), last_only=False, all_layers=all_layers)
        native = cast(Gemma4, self.native)
        cache.prepare(call.batch, call.columns)
        try:
            if call.decode and not all_layers and isinstance(tokens, Tensor):
                with native.running():
                    h = cache.graph.run(tokens[:, 0].long(), [1] * call.batch)
                h, streams = h.clone()[:, None], list[Tensor]()  # the step's own output is the next one's, too
            else:
                # Images see each other forwards, so that they stay whole.
                width = call.columns if all_layers or call.image_ids is not None else max(1, CHUNK // call.batch)
                pieces = [slice(lo, min(lo + width, call.columns)) for lo in range(0, call.columns, width)]
                done = [self._piece(call, tokens, cache, piece, last_only=last_only, all_layers=all_layers) for piece in pieces]
                h, streams = done[-1]
                if not last_only and len(done) > 1:
                    h = torch.cat([d[0] for d in done], 1)
            cache.wrote(call.columns, call.mask, call.base)
        except BaseException:
            cache.broke()
            raise
        return h, streams

    def _piece(
        self, call: Call, tokens: Tokens, cache: Gemma4Cache | None, columns: slice, *, last_only: bool, all_layers: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """`run` of some columns."""
        native, width = cast(Gemma4, self.native), columns.stop - columns.start
        kv = None if cache is None else cache.kv
        new = None if call.new is None else call.new[:, columns]
        lens = [width] * call.batch if new is None else new.sum(1).tolist()
        rows = None if new is None else new.flatten().nonzero()[:, 0].to(native.device)
        last = [n > 0 for n in lens] if last_only else None

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
                return like.new_zeros(call.batch, 1 if last_only else width, len(like)), streams
            inputs: Tensor | Embedded
            if isinstance(tokens, Tensor):
                inputs = flat(tokens).long()
            else:
                x = flat(tokens[0])
                inputs = x, None if tokens[1] is None else native.model.per_layer_inputs(x, flat(tokens[1]))
            step = native.model.step(lens, kv)
            if call.image_ids is not None:
                step.image_ids, step.images_everywhere = flat(call.image_ids.to(native.device)), call.images_everywhere
            h = native.model(inputs, step, kv, last, streams if all_layers else None)
            return shaped(h), [shaped(s) for s in streams]


def given_of(kwargs: dict[str, Any]) -> Any:
    """What a call computes on: ids, or embeddings."""
    return kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")


def _unusual(text: nn.Module, kwargs: dict[str, Any], given: Any) -> str | None:
    """What a call asks for beside hidden states of tokens after others."""
    config = cast(Any, text).config
    if text.training:
        return "the model is in training mode"
    if config.num_hidden_layers != len(cast(nn.ModuleList, text.layers)):
        return "it has another number of layers than its configuration"
    for what, known in (("attn", ATTENTION), ("experts", EXPERTS)):
        name = getattr(config, f"_{what}_implementation", None)
        if name is not None and not name.startswith(known):
            return f"its {what}_implementation is {name!r}"
    if torch.jit.is_tracing():
        return "it is being traced"
    if isinstance(given, Tensor) and given.is_meta:
        return "its input is on the meta device"
    if is_transformed():
        return "it runs under forward-mode autodiff or a torch.func transform"
    if kwargs.get("input_ids") is not None and kwargs.get("per_layer_inputs") is not None:
        return "it is given per_layer_inputs beside input_ids"
    if not isinstance(given, Tensor) or (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None):
        return "it is given neither or both of input_ids and inputs_embeds"
    if given.dim() != (3 if given.is_floating_point() else 2) or given.numel() == 0:
        return f"its input has shape {list(given.shape)}"
    for name, value in kwargs.items():
        asks_nothing = value is None or (value is False and name.startswith(("output_", "return_")))
        if name not in SERVED and not asks_nothing:
            return f"{name} is requested"
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
        return "its attention mask is not a padding mask [batch, tokens]"
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
        mask = mask.to(torch.bool, copy=True)  # the caller may write into his
        known = mask.new_ones(batch, seen) if before is None else before.to(mask.device)
        differs = mask[:, :seen] != known
        # All that is asked of a device at once: whether tokens are hidden or shown, and which of the new columns hold one.
        told = torch.cat([torch.stack([(differs & known).any(), (differs & ~known).any()]), mask[:, seen:].flatten()]).cpu()
        hidden, shown = told[:2].tolist()
        if shown:
            _refuse_unmasked(seen)
        if hidden:
            return "its attention mask hides tokens that were seen before"
        new = told[2:].view(batch, columns)
        if bool(new.all()):
            new, mask = None, None if before is None else mask
    elif before is not None:
        _refuse_unmasked(seen)
    # Each token's number in its sequence [B, T], and how far from it what the caller calls its position is.
    real = torch.ones(batch, columns, dtype=torch.bool, device="cpu") if new is None else new
    number = torch.tensor(lens, device="cpu")[:, None] + real.cumsum(1) - 1
    given = torch.arange(seen, seen + columns, device="cpu")[None] if positions is None else positions.cpu()
    shift = given - number
    first = shift.gather(1, real.int().argmax(1, keepdim=True))[:, 0]  # of the first new token
    base = torch.where(real.any(1), first, 0)
    if cache is not None and cache.base:
        base = torch.where(torch.tensor(lens, device="cpu") > 0, torch.tensor(cache.base, device="cpu"), base)
    if bool(((shift != base[:, None]) & real).any()):
        return "its positions do not follow one another"
    if mask is not None and mask.shape[1] > window and _has_gaps(mask):
        return "there is padding between its tokens, which counts for transformers' sliding window"
    return Call(batch, columns, new, mask, base.tolist(), columns == 1 and new is None and min(lens) > 0)


def _refuse_unmasked(seen: int) -> None:
    raise ValueError(
        f"attention_mask shows tokens among the first {seen} that were padding before, so their "
        "keys were not kept: pass the earlier mask, followed by that of the new tokens"
    )


def _has_gaps(mask: Tensor) -> bool:
    """Whether a sequence's tokens [B, S] are not all beside each other."""
    return bool((_starts(mask).sum(1) > 1).any())


def _starts(mask: Tensor) -> Tensor:
    """[B, S] bool: where a run of True begins."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts


def spans(mm_token_type_ids: Tensor) -> Tensor:
    """[B, S] kinds of tokens, 1 an image's and 2 a video's -> [B, S] int32, the number of the image, -1 for the others."""
    image = (mm_token_type_ids == 1) | (mm_token_type_ids == 2)
    return torch.where(image, _starts(image).cumsum(1) - 1, -1).to(torch.int32)
