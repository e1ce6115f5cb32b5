"""`accelerate`: a Gemma 4 model of transformers whose text decoder is this package's.

The model stays what it is: its class becomes a subclass of the same name, its parameters stay its own (this package's model
reads the same memory), `generate` is transformers' own. A call of the text model that can be served runs here; any other one
runs transformers' code, on the same weights, and the reason is logged once.
"""

from __future__ import annotations

import functools
import inspect
import operator
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from transformers.models.gemma4 import modeling_gemma4
    from transformers.models.gemma4_unified import modeling_gemma4_unified
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError as error:  # it is not installed, or too old
    install = "pip install 'gemma4-fast[transformers]'"
    raise ImportError(
        f"accelerate needs transformers 5.17 or newer: {install} ({error})",
        name=error.name,
    ) from error

from gemma4_fast import ops
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.integrations.binding import output_class, unpack
from gemma4_fast.integrations.engine import ALL_LEFT, GRADIENTS, SERVED, Call, Engine, Tokens, given_of
from gemma4_fast.integrations.interfaces import is_transformed
from gemma4_fast.integrations.kv_cache import CACHE, Gemma4Cache
from gemma4_fast.layers import model_ops
from gemma4_fast.model import Gemma4
from gemma4_fast.ops.table import warn_if_slow
from gemma4_fast.quant import parse_quantize
from gemma4_fast.verify import verify

ENGINE = "_gemma4_fast"  # the name under which the modules of an accelerated model have their Engine
TEXT_MODELS = modeling_gemma4.Gemma4TextModel, modeling_gemma4_unified.Gemma4UnifiedTextModel


# Whether a call is left to transformers' code, as the model around the text model has settled.
_LEFT: ContextVar[bool] = ContextVar("_LEFT", default=False)


class _Stale(Exception):
    """A decode step has run with what the model was before. Nothing of it is left."""


class Served(dict[str, Any]):
    """An attention mask that Gemma4Model hands on to its text model unread, as it does with masks that are made already."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


# ---------------------------------------------------------------- what the classes of accelerated models do
class _Accelerated:
    """transformers reads the file that a class is in, and must find its own."""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(ORIGINAL[cls]._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(ORIGINAL[cls]._can_set_experts_implementation())

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self._only_if_whole("saved")
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        self._only_if_whole("resized")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing for a quantized model: its head is the native model's."""
        text = accelerated_text(self)
        if text is not None and engine_of(text).quantization is not None:
            return None
        return super().tie_weights(*args, **kwargs)  # type: ignore[misc]

    def _only_if_whole(self, done: str) -> None:
        text = accelerated_text(self)
        if text is not None:
            engine_of(text).only_if_whole(done)


class _Text(_Accelerated):
    """The text model."""

    def _run(self, original: Any, kwargs: dict[str, Any]) -> Any:
        if _LEFT.get() or ENGINE not in vars(self):
            return _left(original, self, kwargs)
        text, engine, mask = cast(Any, self), engine_of(self), kwargs.get("attention_mask")
        call = mask.call if isinstance(mask, Served) else engine.call(text, kwargs)
        if isinstance(call, str):
            engine.decline(call)
            return _left(original, self, kwargs)
        cache = engine.cache_for(text, kwargs.get(CACHE), bool(_told(text, kwargs, "use_cache")))
        all_layers, keep = bool(_told(text, kwargs, "output_hidden_states")), kwargs.get("logits_to_keep")
        config = cast(Gemma4, engine.native).config
        # The layers that share keys and values need not see the columns of which no one wants anything.
        last_only = config.num_kv_shared_layers > 0 and call.columns > 1 and cache is not None and not all_layers
        last_only = last_only and _is_one(keep) and (call.new is None or bool(call.new[:, -1].all()))
        h, streams = engine.run(call, self._tokens(call, kwargs), cache, last_only=last_only, all_layers=all_layers)
        if call.decode and engine.is_stale(text):
            cast(Gemma4Cache, cache).unwrite()
            if isinstance(mask, Served):
                raise _Stale
            return self._run(original, kwargs)
        if config.num_kv_shared_layers and call.columns > 1 and not all_layers and isinstance(keep, int) and keep > 0:
            h = h[:, -keep:]  # as transformers, where layers share keys and values
        h = _callers(h)
        hidden = (*(_callers(s) for s in streams[:-1]), h) if all_layers else None
        out = output_class(ORIGINAL[type(self)])(last_hidden_state=h, hidden_states=hidden, **{CACHE: cache})
        return out if _told(text, kwargs, "return_dict") in (None, True) else out.to_tuple()

    def _tokens(self, call: Call, kwargs: dict[str, Any]) -> Tokens:
        text, config = cast(Any, self), cast(Gemma4, engine_of(self).native).config
        ids: Tensor | None = kwargs["input_ids"] if kwargs.get("input_ids") is not None else call.input_ids
        if ids is not None:
            if bool(((ids < 0) | (ids >= config.vocab_size)).any()):
                raise IndexError(f"token ids must lie in [0, {config.vocab_size}), got {int(ids.min())} to {int(ids.max())}")
            return ids
        x: Tensor = kwargs["inputs_embeds"]
        if not config.hidden_size_per_layer_input:
            return x, None
        ple = kwargs.get("per_layer_inputs")
        return x, (text.get_per_layer_inputs(None, x) if ple is None else ple).flatten(2)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if ENGINE not in vars(self):
            return super()._apply(fn, recurse)  # type: ignore[misc]
        weight: Tensor = cast(Any, self).norm.weight.data
        then = fn(weight)
        moves = (then.data_ptr(), then.dtype, then.device) != (weight.data_ptr(), weight.dtype, weight.device)
        engine_of(self).moving(cast(nn.Module, self), moves)
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        engine_of(self).moved(cast(nn.Module, self), fn, moves)
        return out

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """UnsupportedError for a quantized model, which holds no weights of transformers'."""
        self._only_if_whole("saved")
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._only_if_whole("loaded into")
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]


class _Multimodal(_Accelerated):
    """The model that puts images' embeddings among the tokens': it settles beforehand what its text model will be asked."""

    def _run(self, original: Any, kwargs: dict[str, Any]) -> Any:
        text, mask, kinds = cast(Any, self).language_model, kwargs.get("attention_mask"), kwargs.get("mm_token_type_ids")
        if ENGINE not in vars(text) or isinstance(mask, dict) or _LEFT.get():
            return original(self, **kwargs)
        engine = engine_of(text)
        # What goes on to the text model is what is not this model's own.
        asked = {name: value for name, value in kwargs.items() if name in SERVED or name not in _parameters(original)}
        call = GRADIENTS if self._wants_gradients(kwargs) else engine.call(text, asked, kinds)
        if isinstance(call, Call) and call.image_ids is not None and isinstance(text, TEXT_MODELS[1]):
            call = _in_all_layers(call, text.config.sliding_window)
        if isinstance(call, str):
            engine.decline(call)
            return _left(original, self, kwargs)
        config, ids = cast(Any, self).config, kwargs.get("input_ids")
        towers = "pixel_values", "pixel_values_videos", "input_features", "mm_encoder_outputs"
        changed = text._forward_pre_hooks or any(kwargs.get(name) is not None for name in towers)
        if ids is not None and not changed:
            # Places of images that are not there count as padding, for transformers too.
            places = (config.image_token_id, config.video_token_id, config.audio_token_id)
            stands = functools.reduce(operator.or_, [ids == place for place in places if place is not None])
            call.input_ids = torch.where(stands, config.text_config.pad_token_id, ids)
        try:
            return original(self, **{**kwargs, "attention_mask": Served(call)})
        except _Stale:
            return self._run(original, kwargs)

    def _wants_gradients(self, kwargs: dict[str, Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        given = (v for v in kwargs.values() if isinstance(v, Tensor))
        return any(t.requires_grad for t in (*given, *cast(nn.Module, self).parameters()))


class _Generates(_Accelerated):
    """A model with a head."""

    def _run(self, original: Any, kwargs: dict[str, Any]) -> Any:
        """Padding has no hidden states here. Where something comes of them, transformers' code has to make them."""
        mask, reason = kwargs.get("attention_mask"), None
        given = given_of(kwargs)
        prompt = isinstance(given, Tensor) and given.dim() > 1 and given.shape[1] > 1
        if prompt and isinstance(mask, Tensor) and mask.dim() == 2:
            if kwargs.get("labels") is not None and not bool(mask[:, 0].all()):
                reason = "labels follow padding, and the loss counts what is predicted from padding"
            elif _is_one(kwargs.get("logits_to_keep")) and not bool(mask[:, -1].all()):
                reason = "the newest token of a sequence is padding"
        text = None if reason is None else accelerated_text(self)
        if reason is None or text is None:
            return original(self, **kwargs)
        engine_of(text).decline(reason)
        return _left(original, self, kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """The cache that `generate` makes, with room for all that it may write."""
        out = super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **more)  # type: ignore[misc]
        text, cache = accelerated_text(self), model_kwargs.get(CACHE)
        if text is None or cache is None or getattr(cache, "_is_user_defined", False):
            return out
        if (native := engine_of(text).native) is None:  # it was moved, and has not run since
            engine_of(text).bind(text)
            native = engine_of(text).native
        if native is None:
            return out
        if not any(getattr(generation_config, name, False) for name in ("output_attentions", "output_router_logits")):
            Gemma4Cache.adopt(cache, native, cast(Any, text).config, getattr(generation_config, "max_length", None))
        return out


class Linear(nn.Linear):
    """The head. Of a quantized model it has no weight of its own."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        engine: Engine | None = vars(self).get(ENGINE)
        native = None if engine is None else engine.native
        if engine is not None and engine.quantization is not None:
            if self.training or self.bias is not None or (torch.is_grad_enabled() and input.requires_grad):
                engine.decline("its head is trained, has a bias, or needs gradients")
        elif native is None or not self._is_plain(input, cast(Tensor, native.head)):
            return super().forward(input)
        native = cast(Gemma4, native)
        with native.running():
            out = ops.linear(input.reshape(-1, input.shape[-1]), native.head)
        return _callers(out).view(*input.shape[:-1], -1)

    def _is_plain(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is x times the native model's `weight`, and nothing else is asked for."""
        own = self.weight
        return (
            not self.training
            and self.bias is None
            and (own.data_ptr(), own.shape, own.stride()) == (weight.data_ptr(), weight.shape, weight.stride())
            and (x.dtype, x.device) == (weight.dtype, weight.device)
            and not x.is_meta
            and not torch.is_autocast_enabled(x.device.type)
            and not (torch.is_grad_enabled() and (x.requires_grad or own.requires_grad))
            and not is_transformed()
        )


class _Rows:
    """A quantized table where transformers reads rows of an embedding's `weight`."""

    def __init__(self, table: Any, native: Gemma4) -> None:
        self.table, self.native = table, native
        self.shape, self.dtype, self.device = table.shape, native.dtype, native.device

    def __getitem__(self, index: Any) -> Tensor:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        rows = torch.arange(self.shape[0], device=self.device)[rows]
        with self.native.running():
            out = ops.embedding(self.table, rows.reshape(-1), 1.0).view(*rows.shape, self.shape[1])
        return _callers(out)[(..., *columns)]


class _Embedding:
    """The embedding of a quantized model."""

    @property
    def weight(self) -> _Rows:
        native = cast(Gemma4, engine_of(self).native)
        return _Rows(native.get_submodule(vars(self)["_gemma4_table"]).weight, native)

    def forward(self, input_ids: Tensor) -> Tensor:
        own, rows = cast(Any, self), self.weight
        scale = float(torch.tensor(own.scalar_embed_scale, dtype=rows.dtype))
        with rows.native.running():
            out = ops.embedding(rows.table, input_ids.reshape(-1).long(), scale)
        return _callers(out).view(*input_ids.shape, -1)


# ---------------------------------------------------------------- the classes
def _made(room: type, original: Any) -> type:
    """A subclass of transformers' class, of its name. transformers knows what can be recorded by the class's text."""
    members: dict[str, Any] = {"__module__": __name__, "__doc__": original.__doc__}
    if hasattr(room, "_run"):
        forward = original.forward

        @functools.wraps(forward)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # transformers' code can be, without a break
                if ENGINE in self.__dict__:
                    self.__dict__[ENGINE].only_if_whole("compiled")
                return forward(self, *args, **kwargs)
            return self._run(forward, named(forward, args, kwargs))

        members["forward"] = run
    made = type(original.__name__, (room, original), members)
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), getattr(original, "_can_record_outputs", None))
    return made


# Under their own names, by which a pickled model finds them.
Gemma4TextModel = _made(_Text, modeling_gemma4.Gemma4TextModel)
Gemma4Model = _made(_Multimodal, modeling_gemma4.Gemma4Model)
Gemma4ForCausalLM = _made(_Generates, modeling_gemma4.Gemma4ForCausalLM)
Gemma4ForConditionalGeneration = _made(_Generates, modeling_gemma4.Gemma4ForConditionalGeneration)
Gemma4UnifiedTextModel = _made(_Text, modeling_gemma4_unified.Gemma4UnifiedTextModel)
Gemma4UnifiedModel = _made(_Multimodal, modeling_gemma4_unified.Gemma4UnifiedModel)
Gemma4UnifiedForCausalLM = _made(_Generates, modeling_gemma4_unified.Gemma4UnifiedForCausalLM)
Gemma4UnifiedForConditionalGeneration = _made(_Generates, modeling_gemma4_unified.Gemma4UnifiedForConditionalGeneration)
Gemma4TextScaledWordEmbedding = _made(_Embedding, modeling_gemma4.Gemma4TextScaledWordEmbedding)
Gemma4UnifiedTextScaledWordEmbedding = _made(_Embedding, modeling_gemma4_unified.Gemma4UnifiedTextScaledWordEmbedding)
MODELS = (
    Gemma4TextModel, Gemma4Model, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4UnifiedTextModel, Gemma4UnifiedModel,
    Gemma4UnifiedForCausalLM, Gemma4UnifiedForConditionalGeneration,
)  # fmt: skip
EMBEDDINGS = Gemma4TextScaledWordEmbedding, Gemma4UnifiedTextScaledWordEmbedding
ORIGINAL: dict[type, Any] = {made: made.__bases__[1] for made in (*MODELS, *EMBEDDINGS)} | {Linear: nn.Linear}
FAST = {ORIGINAL[made]: made for made in MODELS}


def named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by their names; the cache by that of this version of transformers."""
    if args:
        names = _parameters(function)[1 : len(args) + 1]
        if len(names) < len(args) or set(names) & set(kwargs):
            raise TypeError(f"forward() got {len(args)} positional arguments, and {sorted(kwargs)}")
        kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
    if CACHE == "cache" and kwargs.get("cache") is None and "past_key_values" in kwargs:
        kwargs = {**kwargs, "cache": kwargs["past_key_values"]}
        del kwargs["past_key_values"]
    return dict(kwargs)


def _left(original: Any, model: Any, kwargs: dict[str, Any]) -> Any:
    """transformers' code, in the models within this one too, with a cache that it can write."""
    if isinstance(cache := kwargs.get(CACHE), Gemma4Cache):
        cache.to_plain()
    token = _LEFT.set(True)
    try:
        return original(model, **kwargs)
    finally:
        _LEFT.reset(token)


def _is_one(keep: Any) -> bool:
    return isinstance(keep, int) and keep == 1


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _in_all_layers(call: Call, window: int) -> Call | str:
    """gemma4_unified's images, which see all of each other in every layer, beyond the window too."""
    images = cast(Tensor, call.image_ids)
    longest = max(int((images == image).sum(1).max()) for image in images.unique() if image >= 0)
    if longest > window:
        return f"it has an image of {longest} tokens, and a window of {window}"
    call.images_everywhere = True
    return call


def _told(text: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An argument, or what the model's configuration says of it."""
    value = kwargs.get(name)
    return getattr(text.config, name, None) if value is None else value


def _callers(x: Tensor) -> Tensor:
    """A tensor that the caller can use with others that want gradients: one of inference mode could not be."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def engine_of(module: Any) -> Engine:
    engine: Engine = vars(module)[ENGINE]
    return engine


# ---------------------------------------------------------------- what a user calls
def text_of(model: nn.Module) -> nn.Module | None:
    """The model's text model, if it has one."""
    found = [m for m in model.modules() if isinstance(m, TEXT_MODELS)]
    return found[0] if len(found) == 1 else None


def accelerated_text(model: Any) -> nn.Module | None:
    """The model's text model, if it has one and that is accelerated."""
    text = text_of(model)
    return text if text is not None and ENGINE in vars(text) else None


def accelerate(model: Any, *, backend: str | None = None, quantize: str | None = None, check: bool | str = True) -> Any:
    """Makes a Gemma 4 model of transformers run on this package's kernels, in place; returns the same object.

    model: Gemma4ForCausalLM, Gemma4ForConditionalGeneration (its towers stay as they are), what AutoModel gives, or a module
    that contains one of these. Its parameters and this package's become the same memory. backend: as `Gemma4`'s.
    quantize: "int8" or "int4" frees the text model's weights for quantized ones; what only transformers' code could run
    is then refused. check: True or "quick" compares one layer of each kind with the reference, "full" all layers and the
    whole model, False nothing. It always runs: nothing tells what became of weights in memory since an earlier one.
    `restore(model)` undoes it, unless it is quantized.

    ValueError: no Gemma 4 text model, or arguments; UnsupportedError: a backend that cannot run here, or `quantize` for a model
    that cannot be served; SelfCheckError: the kernels are wrong here. The model then is as it was.
    """
    if check not in (True, False, "quick", "full"):
        raise ValueError(f"check must be True, False, 'quick' or 'full', got {check!r}")
    parse_quantize(quantize)
    ops.parse_backend(backend)
    if isinstance(model, Gemma4):
        already = "a Gemma4, which already runs on these kernels"
        raise ValueError(f"expected a transformers model, got {already}")
    text = text_of(model) if isinstance(model, nn.Module) else None
    if text is None:
        where = f"{type(model).__name__}, got none or several"
        raise ValueError(f"expected one transformers Gemma 4 text model in {where}")
    if ENGINE in vars(text):
        restore(model)
    engine = Engine(backend, _head_of(model, text))
    _swap(model, text, engine)
    try:
        _take(text, engine, quantize, check)
    except BaseException:
        if engine.quantization is None:
            restore(model)
        raise
    return model


def _head_of(model: nn.Module, text: nn.Module) -> nn.Module | None:
    """The lm_head of the model that has the text model, if it is a plain one."""
    for module in model.modules():
        head = module._modules.get("lm_head")
        if (
            type(head) in (nn.Linear, Linear)
            and cast(nn.Linear, head).bias is None
            and any(m is text for m in module.modules())
        ):
            return head
    return None


def _swap(model: nn.Module, text: nn.Module, engine: Engine) -> None:
    vars(text)[ENGINE] = engine
    if engine.head is not None:
        vars(engine.head)[ENGINE] = engine
        engine.head.__class__ = Linear
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]


def _take(text: nn.Module, engine: Engine, quantize: str | None, check: bool | str) -> None:
    """The weights; quantized and checked if that is asked for."""
    reason = engine.bind(text)
    if type(text) not in MODELS or "forward" in vars(text):
        reason = f"its text model is a {type(text).__module__}.{type(text).__qualname__}, with a forward of its own"
    if reason is not None:
        if quantize is not None:
            raise UnsupportedError(f"this model cannot be quantized: {reason}")
        engine.decline(reason, ALL_LEFT)
        return
    native = cast(Gemma4, engine.native)
    with ops.default_backend(engine.backend):
        warn_if_slow(native.device, native.dtype, "accelerate makes nothing faster: ")
        ops.require(native.device, native.dtype, model_ops(native.config))
    if quantize is not None:
        engine.moving(text, False)
        native.quantize(quantize, lambda name: _free(text, engine, quantize, name))
    if check:
        verify(native, level="full" if check == "full" else "quick").raise_if_wrong()


def _free(text: nn.Module, engine: Engine, quantize: str, name: str) -> None:
    """transformers' weights of what the native model calls `name`, which has been quantized."""
    engine.quantization = quantize
    module = cast(Gemma4, engine.native).get_submodule(name)
    path = name.removeprefix("model.")
    if (parts := getattr(module, "parts", None)) is not None:
        for part in parts:
            del text.get_submodule(path.rpartition(".")[0]).get_submodule(part)._parameters["weight"]
    elif name == "lm_head":
        del cast(nn.Module, engine.head)._parameters["weight"]
    elif path.startswith("embed_tokens"):
        table = text.get_submodule(path)
        del table._parameters["weight"]
        table.__class__ = next(made for made in EMBEDDINGS if ORIGINAL[made] is type(table))
        vars(table).update({ENGINE: engine, "_gemma4_table": name})
        tied = cast(Gemma4, engine.native).config.tie_word_embeddings
        if path == "embed_tokens" and tied and engine.head is not None:
            del engine.head._parameters["weight"]
    else:
        own = text.get_submodule(path)
        for parameter in [p for p in ("weight", "gate_up_proj", "down_proj") if p in own._parameters]:
            del own._parameters[parameter]


def restore(model: Any) -> Any:
    """Undoes `accelerate`, in place; returns the same object. Caches that the accelerated model made stay good.

    ValueError if it is not accelerated; UnsupportedError if it was quantized, as the weights are gone.
    """
    text = accelerated_text(model) if isinstance(model, nn.Module) else None
    if text is None:
        raise ValueError(f"this {type(model).__name__} is not accelerated")
    engine = engine_of(text)
    engine.only_if_whole("restored")
    for module in model.modules():
        if ENGINE in vars(module) or type(module) in MODELS:
            module.__class__ = ORIGINAL.get(type(module), type(module))
            vars(module).pop(ENGINE, None)
    if engine.native is not None:
        unpack(engine.native, text)
        engine.native = None
    return model
