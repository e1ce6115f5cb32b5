"""What transformers calls for `experts_implementation="gemma4_fast"` and `attn_implementation="gemma4_fast"`.

Registered by when_imported.py. transformers is imported inside the functions alone, for it is what calls them.

    experts          the routed experts of one layer, or a rank's share of them
    attention_mask   None where a Gemma 4 text layer's mask is plain: causal, within the layer's window, nothing padded. Else
                     the mask of transformers' "sdpa"; of a batch padded on one side, with a `Padding` that says the same
    attention        plain and padded masks: the kernels. Anything else: transformers' sdpa function, with the mask

The kernels serve Gemma 4's text layers. What None means is agreed between the two functions above for those alone: unlike
sdpa's it holds for any number of queries, which are the last ones of the keys, and it knows the window.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from gemma4_fast import ops
from gemma4_fast.errors import UnsupportedError

log = logging.getLogger("gemma4_fast")

TEXT = ("gemma4_text", "gemma4_unified_text")  # model types whose attention is as this module expects it
AUDIO = "gemma4_audio"
# Arguments of other models' attention that change what it computes. Any further ones are for other implementations.
FOREIGN = ("softcap", "position_bias", "s_aux")
_PADDING = "gemma4_fast_padding"  # attribute of a mask that has one; a slice or a copy of the mask has none

_said: set[str] = set()


def is_transformed() -> bool:
    """Whether someone differentiates forwards, or is in torch.func's vmap, jvp or grad."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _wants_gradients(*tensors: Tensor) -> bool:
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# ---- experts ----


@torch.compiler.disable
def experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Routed experts of a Gemma 4 layer: hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H].

    self.gate_up_proj [E, 2 I, H], gate rows first, self.down_proj [E, H, I], of hidden_states' dtype. An id of E or more, in
    expert parallelism another rank's expert, adds nothing and costs nothing. UnsupportedError for experts of another kind, for
    dtypes that differ, for sharded parameters, and where gradients are requested.
    """
    if (why := _foreign(self)) is not None:
        raise UnsupportedError(f'experts_implementation="gemma4_fast" serves Gemma 4\'s experts; {type(self).__name__} {why}')
    gate_up, down = _whole_parameter(self, "gate_up_proj"), _whole_parameter(self, "down_proj")
    if _wants_gradients(hidden_states, top_k_weights, gate_up, down):
        raise UnsupportedError(
            'experts_implementation="gemma4_fast" computes no gradients: run it under torch.no_grad() or '
            'torch.inference_mode(), and train with experts_implementation="grouped_mm"'
        )
    if not hidden_states.dtype == gate_up.dtype == down.dtype:
        raise UnsupportedError(
            f'experts_implementation="gemma4_fast" takes one dtype, got hidden_states of {hidden_states.dtype}, '
            f"gate_up_proj of {gate_up.dtype} and down_proj of {down.dtype}: load the model in one dtype, unquantized"
        )
    wide = top_k_weights if top_k_weights.dtype == torch.float64 else top_k_weights.float()
    return ops.moe(hidden_states, wide, top_k_index.to(torch.int32), gate_up, down)


@functools.cache
def _gelu_tanh() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["gelu_pytorch_tanh"])


def _foreign(module: Any) -> str | None:
    """None for experts that compute what Gemma 4's do, else what is different."""
    for name, usual, why in (
        ("has_bias", False, "has biases"),
        ("is_transposed", False, "has transposed weights"),
        ("is_concatenated", True, "has gate and up rows interleaved"),
        ("has_gate", True, "has no gate"),
        ("has_post_expert_norm", False, "norms what each expert returns"),
    ):
        if getattr(module, name, usual) != usual:
            return why
    if getattr(module._apply_gate, "__module__", None) != "transformers.integrations.moe":
        return "has a gate function of its own"
    if type(module.act_fn) is not _gelu_tanh():
        return f"has the activation {type(module.act_fn).__name__}, not gelu_pytorch_tanh"
    return None


def _whole_parameter(module: nn.Module, name: str) -> Tensor:
    """The parameter, as the tensor that this rank has. transformers' hooks hand out a sharded one's local part, and add up what
    the ranks return; where they are not at work, half of the answer would pass for all of it."""
    parameter: Any = getattr(module, name)
    if not hasattr(parameter, "to_local"):  # no DTensor
        return parameter
    if any(not placement.is_replicate() for placement in parameter.placements):
        raise UnsupportedError(
            f"{name} is a DTensor sharded as {tuple(parameter.placements)}, outside of transformers' hooks, which add up the "
            'ranks\' results: load the model with tp_plan="auto" or a distributed_config'
        )
    return parameter.to_local()


# ---- masks ----


@dataclass(frozen=True)
class Padding:
    """Which tokens of a padded batch are none, for T queries that are the last of S keys. All tensors are on the keys' device.

    Row b's real keys are first .. first + count[b], of which `prefix_lens[b]` come before the queries.
    """

    tokens: int  # T
    keys: int  # S
    window: int | None
    count: list[int]  # [B]
    prefix_lens: Tensor  # [B] int32
    cu_seqlens: Tensor  # [B + 1] int32: real queries up to each row's
    rows: Tensor  # [N] int64: where they are among the B * T
    shifted: Tensor  # [B, S] int64: row b's keys, from its first real one on

    @classmethod
    def of(cls, real: Tensor, tokens: int, window: int | None) -> Padding | None:
        """real [B, S] bool: the keys that are tokens. None if a row's are not one piece, or if padding follows a cache."""
        keys = real.shape[1]
        count = real.sum(1)  # [B]
        first = real.int().argmax(1)  # [B]: of equals the first
        at = torch.arange(keys, device=real.device)  # [S]
        piece = (at >= first[:, None]) & (at < (first + count)[:, None])
        if not torch.equal(piece, real) or (tokens < keys and not bool((real[:, -1] | (count == 0)).all())):
            return None
        new = real[:, keys - tokens :]  # [B, T]
        return cls(
            tokens=tokens,
            keys=keys,
            window=window,
            count=count.tolist(),
            prefix_lens=(count - new.sum(1)).int(),
            cu_seqlens=F.pad(new.sum(1).cumsum(0), (1, 0)).int(),
            rows=new.flatten().nonzero().squeeze(1),
            shifted=(at + first[:, None]).clamp(max=keys - 1),
        )


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask [B, 1, T, S] bool that transformers' sdpa_mask makes of the same arguments, or None where it is plain.

    T = q_length queries from q_offset on, S = kv_length keys from kv_offset on; attention_mask [B, tokens] bool: False for
    padding. allow_is_causal_skip is False where transformers has put anything on top of the causal or sliding mask.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    given: dict[str, Any] = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap, config=config, **kwargs,
    )  # fmt: skip
    if mask_function is not None:
        given["mask_function"] = mask_function
    kind = getattr(config, "model_type", None)
    if kind not in TEXT:
        make = eager_mask if kind == AUDIO and not _audio_takes_sdpa() else sdpa_mask
        skips = dict(allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip)
        return make(**given, **skips)
    plain = (
        allow_is_causal_skip
        and not allow_is_bidirectional_skip
        and not use_vmap
        and not torch.compiler.is_compiling()
        and local_size in (None, getattr(config, "sliding_window", None))
        and not isinstance(q_offset, Tensor)  # a static cache's, whose keys are not all written
        and q_offset + q_length == kv_offset + kv_length
        and 0 < q_length <= kv_length
    )
    padding = None
    if plain and attention_mask is not None:
        plain = attention_mask.dim() == 2 and attention_mask.shape[0] == batch_size
        seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        seen = F.pad(seen, (0, kv_length - seen.shape[1]))  # [B, S]
        if plain and not bool(seen.all()):
            plain, padding = False, Padding.of(seen, q_length, local_size)
    if plain:
        return None
    # Made in any case: sdpa's own None is only right with as many keys as queries, or with one query and no window.
    with torch.inference_mode(False):  # a tensor of inference mode has no version
        mask = sdpa_mask(**given, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    if padding is not None:
        setattr(mask, _PADDING, (padding, mask._version))
    return mask


def _audio_takes_sdpa() -> bool:
    """Whether this transformers' audio tower reads sdpa's masks. It asks for one, and computes attention itself."""
    module = sys.modules.get("transformers.models.gemma4.modeling_gemma4")
    return bool(getattr(getattr(module, "Gemma4AudioModel", None), "_supports_sdpa", True))


# ---- attention ----


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hkv, S, D], all of one dtype -> ([B, T, Hq, D], None).

    attention_mask: what `attention_mask` above returned, or any mask that transformers' sdpa function takes. Queries of padding
    give 0. Gradients are computed, by sdpa.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    padding, version = getattr(attention_mask, _PADDING, (None, 0))
    if padding is not None and (attention_mask is None or attention_mask._version != version):
        padding = None  # someone has written into the mask
    if _text_layer(module, is_causal):
        why = _why_not(query, key, value, attention_mask, padding, dropout, sliding_window, kwargs)
        if why is None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if padding is not None:
                return _padded(query, key, value, padding, scale), None
            one = query.shape[2] == 1
            return (_decode if one else _prefill)(query, key, value, sliding_window, scale), None
        if not torch.compiler.is_compiling() and why not in _said:
            _said.add(why)
            log.warning("gemma4_fast: attention is left to transformers' sdpa function where %s", why)
        if attention_mask is None:
            attention_mask = _spelled_out(query, key, sliding_window)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
        sliding_window=sliding_window, **kwargs,
    )  # fmt: skip


def _text_layer(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether this is a layer for which `attention_mask` returns None where the mask is plain."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return kind in TEXT and bool(getattr(module, "is_causal", False)) and is_causal is not False


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Padding | None,
    dropout: float,
    window: int | None,
    kwargs: dict[str, Any],
) -> str | None:
    """None if the kernels serve this call, else the case in which they do not."""
    if torch.compiler.is_compiling():
        return "the model is compiled"
    if mask is not None and padding is None:
        return (
            "the mask is more than causal, a window and padding on one side: a mask of the caller's, images, packed sequences, "
            "a static cache, or a slice of a padded one"
        )
    if padding is not None and (padding.tokens, padding.keys, padding.window) != (query.shape[2], key.shape[2], window):
        return "a mask is used for other shapes than those it was made for"
    if dropout > 0:
        return "dropout is active"
    if _wants_gradients(query, key, value):
        return "gradients are requested"
    if kwargs.get("output_attentions") or any(kwargs.get(name) is not None for name in FOREIGN):
        return "more than the attention output is requested"
    if key.shape != value.shape or not query.dtype == key.dtype == value.dtype:
        return "keys, values and queries are of different kinds"
    if not 0 < query.shape[2] <= key.shape[2]:
        return "there are fewer keys than queries"
    return None


def _spelled_out(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """The plain mask [1, 1, T, S] bool, T queries being the last of S keys; None where sdpa's None means the same."""
    tokens, keys = query.shape[2], key.shape[2]
    if tokens == 1 and (window is None or keys <= window):
        return None
    at = torch.arange(keys - tokens, keys, device=query.device)[:, None]  # [T, 1]
    other = torch.arange(keys, device=query.device)  # [S]
    mask = other <= at
    if window is not None:
        mask &= other > at - window
    return mask[None, None]


def _decode(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """T = 1. Each KV head is a sequence of its own with one head: so the cache [B, Hkv, S, D] is read where it lies."""
    (batch, heads, _, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    sequences = batch * kv_heads
    lens = torch.full((sequences,), keys, dtype=torch.int32, device=query.device)
    k, v = (x.reshape(sequences, keys, 1, dim) for x in (key, value))
    out = ops.gqa_decode(query.reshape(sequences, heads // kv_heads, dim), k, v, lens, window, scale=scale)
    return out.view(batch, 1, heads, dim)


def _prefill(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    (batch, _, tokens, _), keys = query.shape, key.shape[2]
    prefix = keys - tokens
    q = query.transpose(1, 2)  # [B, T, Hq, D]
    k, v = (x[:, :, prefix:].transpose(1, 2).flatten(0, 1) for x in (key, value))  # [B T, Hkv, D]
    ends = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    if window is not None:
        prefix = min(prefix, window - 1)  # what the first query sees
    old_k = old_v = lens = None
    if prefix:
        start = keys - tokens - prefix
        old_k, old_v = (x[:, :, start : start + prefix].transpose(1, 2) for x in (key, value))  # [B, prefix, Hkv, D]
        lens = torch.full((batch,), prefix, dtype=torch.int32, device=query.device)
    out = ops.gqa_prefill(q.flatten(0, 1), k, v, ends, window, old_k, old_v, lens, scale=scale)
    return out.view(q.shape)


def _padded(query: Tensor, key: Tensor, value: Tensor, padding: Padding, scale: float) -> Tensor:
    """Each row's own tokens alone, however many those are."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T or S, heads, D]
    batch, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    if tokens == 1:  # a row at a time, for which the padding is behind a window: to push its keys together is to copy them
        rows = []
        for b, count in enumerate(padding.count):
            seen = count if padding.window is None else min(count, padding.window)
            row = slice(b, b + 1)
            rows.append(_decode(query[row], key[row], value[row], seen, scale) if seen else torch.zeros_like(q[row]))
        return torch.cat(rows)
    old_k = old_v = None
    if tokens < keys:  # each row's cache from its first real token on
        at = torch.arange(batch, device=query.device)[:, None]
        old_k, old_v = k[at, padding.shifted], v[at, padding.shifted]  # [B, S, Hkv, D]
    new_q, new_k, new_v = (x[:, x.shape[1] - tokens :].flatten(0, 1)[padding.rows] for x in (q, k, v))  # [N, heads, D]
    lens = None if old_k is None else padding.prefix_lens
    new = ops.gqa_prefill(new_q, new_k, new_v, padding.cu_seqlens, padding.window, old_k, old_v, lens, scale=scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    out.view(batch * tokens, *q.shape[2:])[padding.rows] = new
    return out
