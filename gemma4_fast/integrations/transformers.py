"""`accelerate`: a Gemma 4 model of transformers whose text decoder is this package's.

The model stays what it is: its class becomes a subclass of the same name, its parameters stay its own (this package's model
reads the same memory), `generate` is transformers' own. A call of the text model that can be served runs here; any other one
runs transformers' code, on the same weights, and the reason is logged once.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from gemma4_fast import ops
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.integrations import binding
from gemma4_fast.integrations.kv_cache import Gemma4Cache, spans
from gemma4_fast.layers import Embedded
from gemma4_fast.model import Gemma4
from gemma4_fast.quant import parse_quantize

log = logging.getLogger("gemma4_fast")
CHUNK = 2048  # tokens of a prompt that run at once
# `past_key_values` up to transformers 5.23, `cache` after it.
CACHE = "cache" if "cache" in inspect.signature(modeling_gemma4.Gemma4TextModel.forward).parameters else "past_key_values"
# What a text model is called with that is served, or says nothing about its keys, values and hidden states.
SERVED = frozenset((
    "input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "inputs_embeds", "per_layer_inputs", "use_cache",
    "logits_to_keep", "return_dict", "output_hidden_states", "labels", "num_items_in_batch",
))  # fmt: skip


@dataclass
class Call:
    """What a call of the text model asks for, once it is known that it can be served."""

    batch: int
    columns: int
    new: Tensor | None  # [B, T] bool, on the host: columns that hold a token. None: all of them
    mask: Tensor | None  # [B, seen + T] bool, on the host: the same of all columns
    base: list[int]  # of each sequence: the caller's position of its first token
    decode: bool  # one token for each sequence, after others
    image_ids: Tensor | None = None  # [B, T] int32, -1: text
    input_ids: Tensor | None = None  # [B, T], where the caller has them but passes embeddings


class Served(dict[str, Any]):
    """An attention mask that Gemma4Model hands on to its text model unread, as it does with masks that are made already."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


@dataclass
class Engine:
    """What an accelerated text model has beside its own: the native model on the same weights."""

    backend: str | None
    quantize: str | None
    head: nn.Module | None = field(default=None, repr=False)  # the lm_head whose weight is the native model's
    native: Gemma4 | None = field(default=None, repr=False)
    said: set[str] = field(default_factory=set)
    _hooks: int = -1
    _addresses: list[int] = field(default_factory=list, repr=False)
    _config: dict[str, Any] = field(default_factory=dict, repr=False)
    _unfit: str | None = None
    _needs_grad: bool = False

    # ---------------------------------------------------------------- weights
    def bind(self, text: nn.Module) -> str | None:
        """Sees to it that the native model has the text model's weights. Returns why it cannot, or None."""
        if self.quantize is not None and self.native is not None:
            return None
        if (reason := binding.unfit(text)) is not None:
            return reason
        config = text.config.to_dict()  # type: ignore[operator, union-attr]
        now = binding.addresses(text, self.head)
        if self.native is None or config != self._config or now != self._addresses:
            try:
                self._bind(text)
            except ValueError as error:
                self.native = None
                return str(error)
            self._config, self._addresses = config, binding.addresses(text, self.head)
        self._needs_grad = any(p.requires_grad for p in text.parameters())
        return None

    def _bind(self, text: nn.Module) -> None:
        config = binding.config_of(text)
        if self.head is None:  # a bare text model, of which no one asks logits
            config = type(config)(**{**vars_of(config), "tie_word_embeddings": True})
        if self.native is None or self.native.config != config:
            with torch.device("meta"):
                self.native = Gemma4(config, self.backend)
        binding.share(self.native, text, self.head)

    def forget(self) -> None:
        """The weights may have become other tensors."""
        self._hooks = -1
        if self.quantize is None:
            self.native = None
            self._addresses = []

    # ---------------------------------------------------------------- which calls
    def call(self, text: nn.Module, kwargs: dict[str, Any], mm_token_type_ids: Tensor | None = None) -> Call | str:
        """What these arguments of the text model ask for, or why they cannot be served. ValueError for a call that no one can
        serve."""
        if text.training:
            return "the model is in training mode"
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "it is being compiled or traced"
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        if not isinstance(given, Tensor) or (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None):
            return "it is given neither or both of input_ids and inputs_embeds"
        if odd := [k for k, v in kwargs.items() if k not in SERVED and v is not None and v is not False]:
            return f"{odd[0]} is asked for"
        if any(getattr(text.config, f"output_{k}", False) for k in ("attentions", "router_logits")):
            return "the configuration asks for attentions or router logits"
        if getattr(text.config, "is_causal", None) is False:
            return "is_causal is off"
        if not isinstance(kwargs.get("output_hidden_states") or False, bool):
            return "it asks for some layers' hidden states"
        if torch.is_autocast_enabled(given.device.type):
            return "autocast is on"
        batch, columns = given.shape[:2]
        if batch == 0 or columns == 0:
            return "it has no tokens"
        cache = kwargs.get(CACHE)
        if cache is not None and not isinstance(cache, (Gemma4Cache, DynamicCache)):
            return f"its cache is a {type(cache).__name__}"
        decode = columns == 1 and cache is not None and cache.get_seq_length() > 0
        # Modules and weights are looked at before a prompt; for a token alone if a hook was made, or something was moved.
        if not decode or self._hooks != binding.hooks_made():
            self._unfit = self.bind(text)
            self._hooks = binding.hooks_made()
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
        place = _placed(kwargs.get("attention_mask"), kwargs.get("position_ids"), cache, batch, columns, self._window)
        if isinstance(place, str):
            return place
        seen = 0 if cache is None or not isinstance(cache, Gemma4Cache) or cache.kv is None else max(cache.kv.host_lens)
        if seen + columns > (limit := self.native.config.max_position_embeddings):
            return f"{seen + columns} tokens are more than max_position_embeddings = {limit}"
        if mm_token_type_ids is not None and self.native.config.use_bidirectional_attention == "vision":
            images = spans(mm_token_type_ids)[:, -columns:]
            if images.shape != (batch, columns):
                return f"mm_token_type_ids have shape {list(mm_token_type_ids.shape)}"
            place.image_ids = images if bool((images >= 0).any()) else None
        return place

    def _cannot_continue(self, cache: Cache | None, batch: int) -> str | None:
        if not isinstance(cache, Gemma4Cache):
            used = cache is not None and (type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length() > 0)
            return f"its cache is a {type(cache).__name__} that transformers' code has filled, or will" if used else None
        if cache.plain:
            return "transformers' code has filled its cache"
        if cache.model is not self.native and cache.kv is not None:
            return "its cache was filled with other weights, or on another device"
        if cache.kv is not None and cache.kv.layer(0).v.dtype != cast(Gemma4, self.native).dtype:
            return "its cache has another dtype"
        return None

    @property
    def _window(self) -> int:
        return max((c.window for c in cast(Gemma4, self.native).config.layers() if c.window), default=1 << 62)

    def decline(self, reason: str) -> None:
        """Says once that a call is left to transformers' code. UnsupportedError if its weights are no longer there."""
        if self.quantize is not None:
            raise UnsupportedError(
                f"{reason}; transformers' code would have to run this, and its weights were freed when the model was quantized "
                f"to {self.quantize}"
            )
        if reason not in self.said:
            self.said.add(reason)
            log.warning("gemma4_fast: calls like this one are left to transformers' code (said once): %s", reason)

    # ---------------------------------------------------------------- running them
    def cache_for(self, text: nn.Module, kwargs: dict[str, Any]) -> Gemma4Cache | None:
        """The call's cache: its own, an empty one made ours, or a new one if it wants one."""
        native, cache = cast(Gemma4, self.native), kwargs.get(CACHE)
        if isinstance(cache, Gemma4Cache):
            cache.model = native  # an empty one may have been made for the one before
            return cache
        if cache is not None:
            return Gemma4Cache.adopt(cache, native, text.config)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(text.config, "use_cache", False)
        return Gemma4Cache(native, text.config) if use_cache else None

    def run(
        self, call: Call, tokens: Tensor | tuple[Tensor, Tensor | None], cache: Gemma4Cache | None, newest: bool, every: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """tokens: ids [B, T], or embeddings [B, T, H] and their PLE inputs [B, T, L * P] -> final hidden states [B, T, H], and
        if `every` the layers' residual streams; if `newest`, [B, 1, H] of each sequence's last column alone."""
        native = cast(Gemma4, self.native)
        if cache is None:
            return self._piece(call, tokens, None, slice(None), newest, every)
        kv = cache.prepare(call.batch, call.columns)
        try:
            if call.decode and not every and isinstance(tokens, Tensor):
                with native.running():
                    h = cache.graph.run(tokens[:, 0].long(), [1] * call.batch)[:, None]
                streams: list[Tensor] = []
            else:
                width = call.columns if every or call.image_ids is not None else max(1, CHUNK // call.batch)
                pieces = [slice(lo, min(lo + width, call.columns)) for lo in range(0, call.columns, width)]
                done = [self._piece(call, tokens, cache, piece, newest, every) for piece in pieces]
                h = done[-1][0] if newest else torch.cat([d[0] for d in done], 1) if len(done) > 1 else done[0][0]
                streams = done[-1][1]
        except BaseException:
            cache.broken()
            raise
        assert kv is cache.kv
        cache.wrote(call.columns, call.mask, call.base)
        return h, streams

    def _piece(
        self,
        call: Call,
        tokens: Tensor | tuple[Tensor, Tensor | None],
        cache: Gemma4Cache | None,
        columns: slice,
        newest: bool,
        every: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Some columns of the call."""
        native = cast(Gemma4, self.native)
        new = None if call.new is None else call.new[:, columns]
        width = len(range(*columns.indices(call.columns)))
        lens = [width] * call.batch if new is None else new.sum(1).tolist()
        kv = None if cache is None else cache.kv
        last = [n > 0 for n in lens] if newest and kv is not None else None
        rows = None if new is None else new.flatten().nonzero()[:, 0].to(native.device)

        def flat(x: Tensor) -> Tensor:
            x = x[:, columns].flatten(0, 1)
            return x if rows is None else x[rows]

        streams: list[Tensor] = []
        if not any(lens):  # nothing but padding
            return torch.zeros(call.batch, width, native.config.hidden_size, dtype=native.dtype, device=native.device), streams
        with native.running():
            if isinstance(tokens, Tensor):
                inputs: Tensor | Embedded = flat(tokens).long()
            else:
                x = flat(tokens[0])
                inputs = x, None if tokens[1] is None else native.model.per_layer_inputs(x, flat(tokens[1]))
            step = native.model.step(lens, kv)
            if call.image_ids is not None:
                step.image_ids = flat(call.image_ids.to(native.device))
            h = native.model(inputs, step, kv, last, streams if every else None)

        def shaped(x: Tensor) -> Tensor:
            if last is not None:
                return x[:, None]
            if rows is None:
                return x.view(call.batch, width, -1)
            whole = x.new_zeros(call.batch * width, x.shape[1])
            return whole.index_copy_(0, rows, x).view(call.batch, width, -1)

        return shaped(h), [shaped(s) for s in streams]

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model's own: it finds the copied weights at its first call."""
        return self._anew(self._copied_head(memo))

    def _copied_head(self, memo: dict[int, Any]) -> nn.Module | None:
        import copy

        return copy.deepcopy(self.head, memo)

    def _anew(self, head: nn.Module | None) -> Engine:
        if self.quantize is not None:
            raise UnsupportedError(f"a model quantized to {self.quantize} is neither copied nor pickled; load it again")
        return Engine(self.backend, None, head)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **vars(self._anew(self.head))}


def vars_of(config: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _placed(mask: Any, positions: Any, cache: Cache | None, batch: int, columns: int, window: int) -> Call | str:
    """Where the call's columns stand: which hold tokens, and whether these follow one another, as they do here."""
    own = cache if isinstance(cache, Gemma4Cache) else None
    seen = 0 if own is None else own.seen
    lens = [0] * batch if own is None or own.kv is None else own.kv.host_lens
    if own is not None and own.kv is not None and len(lens) != batch:
        return f"its cache holds {len(lens)} sequences, its input {batch}"
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
    host = None if mask is None else mask.to("cpu").bool()
    if host is not None and bool(host.all()):
        host = None
    before = None if own is None else own.mask
    if host is None:
        if before is not None:
            return _unmasked(before)
        new = None
    else:
        old = host[:, :seen]
        new = host[:, seen:]
        if before is None and not bool(old.all()):
            return "its attention mask hides tokens that were seen before"
        if before is not None and not torch.equal(old, before):
            if bool((old & ~before).any()):
                return _unmasked(before)
            return "its attention mask hides tokens that were seen before"
        new = None if bool(new.all()) else new
    # Each token's number in its sequence [B, T], and what the caller calls its position.
    first = torch.tensor(lens)[:, None]
    real = torch.ones(batch, columns, dtype=torch.bool) if new is None else new
    rank = first + real.cumsum(1) - 1
    given = (torch.arange(columns)[None] + seen if positions is None else positions.to("cpu")).expand(batch, columns)
    shift = given - rank
    base = []
    for b in range(batch):
        own_shift = shift[b] if new is None else shift[b][real[b]]
        known = own is not None and bool(own.base) and lens[b] > 0
        expected = cast(Gemma4Cache, own).base[b] if known else int(own_shift[0]) if len(own_shift) else 0
        if bool((own_shift != expected).any()):
            return "its positions do not follow one another"
        base.append(expected)
    if host is not None and _has_gaps(host) and host.shape[1] > window:
        return "there is padding between its tokens, which counts for transformers' sliding window"
    return Call(batch, columns, new, host, base, columns == 1 and seen > 0 and new is None and min(lens) > 0)


def _unmasked(before: Tensor) -> str:
    raise ValueError(
        "the attention mask shows tokens that were padding when they were seen, so that no keys of them were kept: pass the mask "
        f"of before, with {before.shape[1]} columns, and the new tokens' after it"
    )


def _has_gaps(mask: Tensor) -> bool:
    """Whether a sequence's tokens [B, S] are not all beside each other."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return bool((starts.sum(1) > 1).any())


# ---------------------------------------------------------------- the classes of accelerated models
class _Accelerated:
    """What all of them have. transformers asks the class's own file for some things, and must find its own."""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(ORIGINAL[cls]._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(ORIGINAL[cls]._can_set_experts_implementation())


class _Text(_Accelerated):
    """The text model: `forward` runs here what can be served."""

    def _run(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text = cast(nn.Module, self)
        engine: Engine = vars(self)["_gemma4_fast"]
        kwargs = named(original, args, kwargs)
        mask = kwargs.get("attention_mask")
        call = mask.call if isinstance(mask, Served) else engine.call(text, kwargs)
        cache = None if isinstance(call, str) else engine.cache_for(text, kwargs)
        if isinstance(call, str):
            engine.decline(call)
            return self._leave(original, kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None:
            ids = call.input_ids
        native = cast(Gemma4, engine.native)
        tokens: Tensor | tuple[Tensor, Tensor | None]
        if ids is not None:
            _check_ids(ids, native.config.vocab_size)
            tokens = ids
        else:
            ple = kwargs.get("per_layer_inputs")
            if native.config.hidden_size_per_layer_input:
                if ple is None:
                    ple = cast(Any, text).get_per_layer_inputs(None, embeds)
                ple = ple.flatten(2)
            tokens = cast(Tensor, embeds), ple
        every = kwargs.get("output_hidden_states")
        every = bool(getattr(text.config, "output_hidden_states", False) if every is None else every)
        # What else the layers that share keys and values would do for nothing, if the caller wants the newest token alone.
        shared = native.config.num_kv_shared_layers > 0 and call.columns > 1
        newest = (
            shared and not every and kwargs.get("logits_to_keep") == 1 and (call.new is None or bool(call.new[:, -1].all()))
        )
        newest = newest and cache is not None
        h, streams = engine.run(call, tokens, cache, newest, every)
        h = _normal(h)
        hidden = (*(_normal(s) for s in streams[:-1]), h) if every else None
        output = binding.output_class(_original_of(self))
        out = output(last_hidden_state=h, hidden_states=hidden, **{CACHE: cache})
        return_dict = kwargs.get("return_dict")
        if return_dict is None:
            return_dict = getattr(text.config, "return_dict", True)
        return out if return_dict else out.to_tuple()

    def _leave(self, original: Any, kwargs: dict[str, Any]) -> Any:
        """transformers' own code, with a cache that it can write."""
        cache = kwargs.get(CACHE)
        if isinstance(cache, Gemma4Cache):
            given = kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if given is None else given
            if any(cache.base) and isinstance(given, Tensor) and len(cache.base) == given.shape[0]:
                # Its keys were turned by the tokens' numbers, so the new ones have to be, too.
                positions = kwargs.get("position_ids")
                if positions is None:
                    positions = torch.arange(given.shape[1], device=given.device)[None] + cache.get_seq_length()
                kwargs["position_ids"] = positions - torch.tensor(cache.base, device=positions.device)[:, None]
            cache.to_plain()
        return original(self, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        engine: Engine | None = vars(self).get("_gemma4_fast")
        if engine is not None:
            engine.forget()
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        return out


class _Multimodal(_Accelerated):
    """The model that puts images' embeddings among the tokens': tells the text model beforehand what it will be asked."""

    def _run(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text = cast(Any, self).language_model
        engine = vars(text).get("_gemma4_fast")
        kwargs = named(original, args, kwargs)
        mask = kwargs.get("attention_mask")
        if engine is None or not (mask is None or isinstance(mask, Tensor)):
            return original(self, **kwargs)
        towers = [kwargs.get(k) for k in ("pixel_values", "pixel_values_videos", "input_features", "mm_encoder_outputs")]
        mm_token_type_ids = kwargs.get("mm_token_type_ids")
        asked = {k: v for k, v in kwargs.items() if k in SERVED or k.startswith("output_")}
        if mm_token_type_ids is not None and not isinstance(self, modeling_gemma4.Gemma4Model):
            # gemma4_unified shows images to one another in other layers, too.
            images = bool((spans(mm_token_type_ids) >= 0).any())
            call: Call | str = "it has images" if images else engine.call(text, asked)
        else:
            call = engine.call(text, asked, mm_token_type_ids)
        if isinstance(call, str):
            engine.decline(call)
            cache = kwargs.get(CACHE)
            if isinstance(cache, Gemma4Cache):
                cache.to_plain()
            return original(self, **kwargs)
        ids = kwargs.get("input_ids")
        if ids is not None and not any(t is not None for t in towers):
            config = cast(Any, self).config
            place = [t for t in (config.image_token_id, config.video_token_id, config.audio_token_id) if t is not None]
            stands = torch.isin(ids, torch.tensor(place, device=ids.device))
            call.input_ids = torch.where(stands, config.text_config.pad_token_id, ids)
        kwargs["attention_mask"] = Served(call)
        return original(self, **kwargs)


class _Generates(_Accelerated):
    """A model with a head: its `generate` gets a cache with room for all it may write."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        out = super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **more)  # type: ignore[misc]
        text = text_of(cast(nn.Module, self))
        engine = None if text is None else vars(text).get("_gemma4_fast")
        cache = model_kwargs.get(CACHE)
        asks = any(getattr(generation_config, f"output_{k}", False) for k in ("attentions", "router_logits"))
        if text is None or engine is None or cache is None or asks or engine.native is None:
            return out
        if not getattr(cache, "_is_user_defined", False):
            Gemma4Cache.adopt(cache, engine.native, text.config, getattr(generation_config, "max_length", None))
        return out

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        text = text_of(cast(nn.Module, self))
        engine = None if text is None else vars(text).get("_gemma4_fast")
        if engine is not None and engine.quantize is not None:
            raise UnsupportedError(f"a model quantized to {engine.quantize} cannot be saved; keep what it was loaded from")
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class Linear(nn.Linear):
    """The head."""

    def forward(self, input: Tensor) -> Tensor:
        engine: Engine | None = vars(self).get("_gemma4_fast")
        native = None if engine is None else engine.native
        weight = self.weight
        if (
            native is None
            or self.training
            or input.dtype != native.dtype
            or input.device != native.device
            or weight.data_ptr() != native.head.data_ptr()
            or torch.is_autocast_enabled(input.device.type)
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        ):
            return super().forward(input)
        with native.running():
            out = ops.linear(input.reshape(-1, input.shape[-1]), native.head)
        return _normal(out).view(*input.shape[:-1], -1)


def named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names; a cache by the name of this version of transformers."""
    if args:
        names = list(inspect.signature(function).parameters)[1 : len(args) + 1]
        if len(names) < len(args) or (twice := set(names) & set(kwargs)):
            raise TypeError(f"forward() got too many arguments, or {sorted(twice)} twice")
        kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
    else:
        kwargs = dict(kwargs)
    if CACHE == "cache" and kwargs.get("past_key_values") is not None and kwargs.get("cache") is None:
        kwargs["cache"] = kwargs.pop("past_key_values")
    return kwargs


def _normal(x: Tensor) -> Tensor:
    """A tensor of the caller's own: one of inference mode could not be used with others that want gradients."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= vocab_size:
        raise IndexError(f"token ids must lie in [0, {vocab_size}), got {int(low) if int(low) < 0 else int(high)}")


def _made(room: type, original: type) -> type:
    """A subclass of transformers' class, of its name. transformers keeps what can be recorded by the class's text."""
    if hasattr(room, "_run"):
        forward = original.forward  # type: ignore[attr-defined]

        @functools.wraps(forward)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(forward, args, kwargs)

        members: dict[str, Any] = {"forward": run}
    else:
        members = {}
    made = type(original.__name__, (room, original), {**members, "__module__": __name__, "__doc__": original.__doc__})
    recorded = getattr(original, "_can_record_outputs", None)
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), recorded)
    return made


Gemma4TextModel = _made(_Text, modeling_gemma4.Gemma4TextModel)
Gemma4Model = _made(_Multimodal, modeling_gemma4.Gemma4Model)
Gemma4ForCausalLM = _made(_Generates, modeling_gemma4.Gemma4ForCausalLM)
Gemma4ForConditionalGeneration = _made(_Generates, modeling_gemma4.Gemma4ForConditionalGeneration)
Gemma4UnifiedTextModel = _made(_Text, modeling_gemma4_unified.Gemma4UnifiedTextModel)
Gemma4UnifiedModel = _made(_Multimodal, modeling_gemma4_unified.Gemma4UnifiedModel)
Gemma4UnifiedForCausalLM = _made(_Generates, modeling_gemma4_unified.Gemma4UnifiedForCausalLM)
Gemma4UnifiedForConditionalGeneration = _made(_Generates, modeling_gemma4_unified.Gemma4UnifiedForConditionalGeneration)
MADE = (
    Gemma4TextModel, Gemma4Model, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4UnifiedTextModel, Gemma4UnifiedModel,
    Gemma4UnifiedForCausalLM, Gemma4UnifiedForConditionalGeneration,
)  # fmt: skip
ORIGINAL: dict[type, Any] = {made: made.__bases__[1] for made in MADE} | {Linear: nn.Linear}
FAST = {original: made for made, original in ORIGINAL.items()}


def _original_of(module: Any) -> type:
    return ORIGINAL.get(type(module), type(module))


def text_of(model: nn.Module) -> nn.Module | None:
    """The model's text model, if it has one alone."""
    kinds = modeling_gemma4.Gemma4TextModel, modeling_gemma4_unified.Gemma4UnifiedTextModel
    found = [m for m in model.modules() if isinstance(m, kinds)]
    return found[0] if len(found) == 1 else None


def accelerate(model: Any, *, backend: str | None = None, quantize: str | None = None, check: bool | str = True) -> Any:
    """Makes a Gemma 4 model of transformers run on this package's kernels, in place; returns the same object.

    model: Gemma4ForCausalLM, Gemma4ForConditionalGeneration (its towers stay as they are), what AutoModel gives, or a model
    that contains one of these. Its parameters become this package's by sharing their memory. backend: as `Gemma4`'s.
    quantize: "int8" or "int4" frees the text model's weights for quantized ones; what only transformers' code could run
    is then refused. check: True compares one layer of each kind with the reference, "full" all layers and the whole model,
    False nothing. `restore(model)` undoes it, unless it is quantized.

    ValueError: no Gemma 4 text model in it, or arguments; UnsupportedError: `quantize` for a model that cannot be served;
    SelfCheckError: the kernels are wrong here; the model is as it was then.
    """
    if check not in (True, False, "quick", "full"):
        raise ValueError(f"check must be True, False, 'quick' or 'full', got {check!r}")
    parse_quantize(quantize)
    ops.parse_backend(backend)
    text = text_of(model) if isinstance(model, nn.Module) else None
    if text is None:
        raise ValueError(f"{type(model).__name__} holds no Gemma 4 text model of transformers, or several")
    if "_gemma4_fast" in vars(text):
        restore(model)
    engine = Engine(backend, None, _head_of(model, text))
    vars(text)["_gemma4_fast"] = engine
    if engine.head is not None:
        vars(engine.head)["_gemma4_fast"] = engine
        if type(engine.head) is nn.Linear:
            engine.head.__class__ = Linear
    for module in model.modules():
        if type(module) in FAST and type(module) is not nn.Linear:
            module.__class__ = FAST[type(module)]
    reason = engine.bind(text)
    if reason is not None and quantize is not None:
        restore(model)
        raise UnsupportedError(f"it cannot be quantized: {reason}")
    if reason is not None:
        engine.decline(reason)
    elif check:
        from gemma4_fast.verify import verify

        try:
            verify(cast(Gemma4, engine.native), level="full" if check == "full" else "quick").raise_if_wrong()
        except BaseException:
            restore(model)
            raise
    return model


def _head_of(model: nn.Module, text: nn.Module) -> nn.Module | None:
    """The lm_head that belongs to the text model."""
    for module in model.modules():
        head = getattr(module, "lm_head", None)
        if isinstance(head, nn.Linear) and head.bias is None and any(m is text for m in module.modules()):
            return head
    return None


def restore(model: Any) -> Any:
    """Undoes `accelerate`, in place; returns the same object. Caches made by the accelerated model stay good.

    ValueError if it is not accelerated; UnsupportedError if it was quantized, as the weights are gone.
    """
    text = text_of(model) if isinstance(model, nn.Module) else None
    engine: Engine | None = None if text is None else vars(text).get("_gemma4_fast")
    if text is None or engine is None:
        raise ValueError(f"this {type(model).__name__} is not accelerated")
    if engine.quantize is not None:
        raise UnsupportedError(f"its weights were freed when it was quantized to {engine.quantize}; load it again")
    for module in model.modules():
        if type(module) in ORIGINAL:
            module.__class__ = ORIGINAL[type(module)]
        vars(module).pop("_gemma4_fast", None)
    if engine.native is not None:
        binding.unpack(engine.native, text)
    return model
