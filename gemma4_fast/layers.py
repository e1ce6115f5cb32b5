"""The layers of Gemma 4's text model. A layer reads like the formula, and every op goes through the table.

Tokens travel flat, [num_tokens, hidden_size], sequences end to end; only attention knows where one ends. The pre-norm of a
sublayer is computed by the op that ends the sublayer before it, so layers hand on the pair (x, h): the residual stream and
its normed form.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemma4_fast import ops
from gemma4_fast.cache import TILE, KVCache, LayerCache
from gemma4_fast.config import Gemma4Config, LayerConfig
from gemma4_fast.quant import LARGEST_WEIGHT, QuantizedWeight

# The ops a model calls; `moe` chooses among moe_decode and the two after it.
MODEL_OPS = (
    "embedding", "rope_angles", "rms_norm", "norm_add_norm", "linear", "qkv_norm_rope", "gqa_prefill", "gqa_decode",
    "geglu_mlp", "logits", "sample",
)  # fmt: skip
PLE_OPS = ("ple_gate",)
MOE_OPS = ("moe_feed_forward", "route_topk", "moe_decode", "expert_dispatch", "grouped_gemm", "moe_norm_add_norm")


def model_ops(config: Gemma4Config) -> tuple[str, ...]:
    """Names of the ops a model of this config calls."""
    ple = PLE_OPS if config.hidden_size_per_layer_input else ()
    return MODEL_OPS + ple + (MOE_OPS if config.enable_moe_block else ())


class Weight(nn.Module):
    """A bare `weight` parameter: a norm's [H], a projection's [N, K], a table's [V, H]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape), requires_grad=False)


class Quantizable(nn.Module):
    """A module whose parameters may become QuantizedWeights. Under the same names, and in the state dict too."""

    least_bits = 4
    parts_apart = 1  # see QuantizedWeight.parts

    def quantize(self, bits: int) -> None:
        """Each parameter becomes a quantized one of `bits`, or of `least_bits`; on the meta device its shape alone does."""
        for name, old in list(self.named_parameters(recurse=False)):
            parts = self.parts_apart if name != "down_proj" else 1
            new = QuantizedWeight.empty(max(bits, self.least_bits), old.shape, old.dtype, old.device, parts)
            if not old.is_meta:
                new.copy_(old)
            delattr(self, name)
            setattr(self, name, new)

    def quantized(self) -> dict[str, QuantizedWeight]:
        return {name: w for name, w in vars(self).items() if isinstance(w, QuantizedWeight)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizable:
        super()._apply(fn, recurse)
        for name, w in self.quantized().items():
            setattr(self, name, w.apply(fn))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: w for name, w in self.quantized().items()})


class Matrix(Quantizable, Weight):
    """A projection [N, K] that may be quantized."""

    weight: Any


class Table(Matrix):
    """[V, H]: embeddings, the head. Never below 8 bits: llama.cpp too keeps 6 or 8 where the rest has 4."""

    least_bits = 8


class PackedWeight(Matrix):
    """Several projections of one input in one [N, K] parameter, so that one product serves them.

    In the state dict each part has its own name, as in transformers, and is a view of the parameter.
    """

    def __init__(self, in_features: int, parts: dict[str, int], parts_apart: int = 1) -> None:
        super().__init__(sum(parts.values()), in_features)
        self.parts, self.parts_apart = parts, parts_apart

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        parent = prefix[: prefix[:-1].rfind(".") + 1]  # without this module's own name
        weight = self.weight if keep_vars else self.weight.detach()
        for part, rows in zip(self.parts, weight.split(list(self.parts.values())), strict=True):
            destination[f"{parent}{part}.weight"] = rows


def _pack_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a module loads: its children's parts, which have names of their own, become the children's parameters."""
    for name, child in module.named_children():
        if isinstance(child, PackedWeight):
            parts = [f"{prefix}{part}.weight" for part in child.parts]
            if all(isinstance(state_dict.get(part), Tensor) for part in parts):
                state_dict[f"{prefix}{name}.weight"] = torch.cat([state_dict.pop(part) for part in parts])


@dataclass
class Step:
    """What all layers share in one pass over `num_tokens` new tokens.

    Prefill attends to the new K and V beside what the cache held before; decode (one token for every sequence) writes the
    cache first and reads only it.
    """

    positions: Tensor  # [T] int64
    sequence: Tensor  # [T] int64, which sequence a token belongs to
    cu_seqlens: Tensor  # [B + 1] int32
    prefix_lens: Tensor | None  # [B] int32, tokens in the cache before this pass; None where there are none
    kv_lens: Tensor | None  # [B] int32, the same after it; 0 marks an idle row. Set for decode only
    angles: dict[bool, tuple[Tensor, Tensor]]  # by is_sliding: cos, sin [T, R]
    new_lens: list[int]
    rows: dict[int, Tensor] = field(default_factory=dict)  # by slots per sequence: cache row [T] of each token
    shared: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by donor layer: this pass's K and V
    limit: int | None = None  # no sequence in a cache that is read is longer. For kernels that do not ask the device
    image_ids: Tensor | None = None  # [T] int32, of a prefill: tokens of one image see each other in sliding layers; -1: text
    images_everywhere: bool = False  # and in full ones


class Attention(nn.Module):
    def __init__(self, config: Gemma4Config, layer: LayerConfig) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.is_donor = any(c.kv_donor == layer.index for c in config.layers())
        q, kv = layer.num_q_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        parts = {"q_proj": q}
        if layer.kv_donor is None:
            parts["k_proj"] = kv
            if not layer.k_eq_v:
                parts["v_proj"] = kv
            self.k_norm = Weight(layer.head_dim)
        self.qkv_proj = PackedWeight(config.hidden_size, parts)
        self.q_norm = Weight(layer.head_dim)
        self.o_proj = Matrix(config.hidden_size, q)
        self.register_load_state_dict_pre_hook(_pack_parts)

    def forward(self, h: Tensor, step: Step, cache: KVCache | None, owner: Attention, inv_freq: Tensor) -> Tensor:
        """h [T, H] -> [T, H]. `owner` is the attention whose K and V are read: this one, or the donor's."""
        layer, own = self.layer, owner is self
        kv = None if cache is None else cache.layer(layer.index)
        read = kv if kv is None or step.limit is None or layer.window is not None else kv.first(step.limit)
        qkv = ops.linear(h, self.qkv_proj.weight)
        k_weight = self.k_norm.weight if own else None
        heads = layer.num_q_heads, layer.num_kv_heads if own else 0
        norm = (qkv, self.q_norm.weight, k_weight, *step.angles[layer.is_sliding], *heads)
        # What a V-only cache needs besides V
        rebuild = (inv_freq, owner.k_norm.weight) if layer.k_eq_v else (None, None)

        if step.kv_lens is not None and kv is not None and read is not None:  # decode
            if own:
                q, _, _ = ops.qkv_norm_rope(*norm, kv.k, kv.v, step.rows[kv.slots], self.eps)
            else:
                q, _, _ = ops.qkv_norm_rope(*norm, eps=self.eps)
            a = ops.gqa_decode(q, read.k, read.v, step.kv_lens, layer.window, None, *rebuild)
        else:
            q, k, v = ops.qkv_norm_rope(*norm, eps=self.eps)
            if k is None or v is None:
                k, v = step.shared[owner.layer.index]
            before: tuple[Tensor | None, ...] = (None, None, None)
            if read is not None and step.prefix_lens is not None:
                before = read.k, read.v, step.prefix_lens
            images = step.image_ids if layer.is_sliding or step.images_everywhere else None
            a = ops.gqa_prefill(q, k, v, step.cu_seqlens, layer.window, *before, None, *rebuild, images)  # type: ignore[call-arg, arg-type]
            if self.is_donor:  # its cache is written once the layers that share it are through: see Text.forward
                step.shared[layer.index] = k, v
            elif own and kv is not None:
                write_new(kv, step, k, v)
        return ops.linear(a.flatten(1), self.o_proj.weight)


def write_new(kv: LayerCache, step: Step, k: Tensor, v: Tensor) -> None:
    """A prefill's K, V [T, Hkv, D] into one layer's cache; of a chunk longer than a ring only the newest tokens."""
    if max(step.new_lens, default=0) > kv.slots:
        last = step.cu_seqlens[1:].long()[step.sequence]
        keep = torch.arange(k.shape[0], device=k.device) >= last - kv.slots
        rows = kv.rows(step.sequence[keep], step.positions[keep])
        kv.write(k[keep], v[keep], rows)
        return
    if kv.slots not in step.rows:
        step.rows[kv.slots] = kv.rows(step.sequence, step.positions)
    kv.write(k, v, step.rows[kv.slots])


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = PackedWeight(hidden, {"gate_proj": intermediate, "up_proj": intermediate}, parts_apart=2)
        self.down_proj = Matrix(hidden, intermediate)
        self.register_load_state_dict_pre_hook(_pack_parts)


class Router(nn.Module):
    def __init__(self, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.proj = Weight(num_experts, hidden)
        self.scale = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.per_expert_scale = nn.Parameter(torch.empty(num_experts), requires_grad=False)


class Experts(Quantizable):
    gate_up_proj: Any
    down_proj: Any
    parts_apart = 2

    def __init__(self, hidden: int, intermediate: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate), requires_grad=False)


class Layer(nn.Module):
    """One decoder layer, as two blocks: attention, then feed-forward with PLE and the layer scalar."""

    def __init__(self, config: Gemma4Config, layer: LayerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.layer, self.eps, self.top_k = layer, config.rms_norm_eps, config.top_k_experts
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(hidden, layer.intermediate_size)
        self.input_layernorm = Weight(hidden)
        self.post_attention_layernorm = Weight(hidden)
        self.pre_feedforward_layernorm = Weight(hidden)
        self.post_feedforward_layernorm = Weight(hidden)
        self.layer_scalar = nn.Parameter(torch.empty(1), requires_grad=False)
        if layer.is_moe:
            self.router = Router(hidden, config.num_experts)
            self.experts = Experts(hidden, config.moe_intermediate_size, config.num_experts)
            self.post_feedforward_layernorm_1 = Weight(hidden)
            self.post_feedforward_layernorm_2 = Weight(hidden)
            self.pre_feedforward_layernorm_2 = Weight(hidden)
        self.has_ple = bool(config.hidden_size_per_layer_input)
        if self.has_ple:
            self.per_layer_input_gate = Weight(config.hidden_size_per_layer_input, hidden)
            self.per_layer_projection = Weight(hidden, config.hidden_size_per_layer_input)
            self.post_per_layer_input_norm = Weight(hidden)

    def attention_block(
        self, x: Tensor, h: Tensor, step: Step, cache: KVCache | None, owner: Attention, inv_freq: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, h = rms(x) [T, H] -> x + rms(attention(h)), and the feed-forward's pre-norms of it: the dense branch's, and the
        experts' where there are experts."""
        return self.end_of_attention(self.self_attn(h, step, cache, owner, inv_freq), x)

    def end_of_attention(self, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """a, x [T, H] -> x + rms(a), and its pre-norms."""
        weights = self.post_attention_layernorm.weight, None, self.pre_feedforward_layernorm.weight
        other = self.pre_feedforward_layernorm_2.weight if self.layer.is_moe else None
        return ops.norm_add_norm(a, x, *weights, self.eps, other)

    def feed_forward_block(
        self, x: Tensor, h: Tensor, e: Tensor | None, ple: Tensor | None, next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x, its pre-norms h and for experts e [T, H], ple [T, P] -> the layer's output, and its norm by the next layer's
        weight."""
        mlp = self.mlp.gate_up_proj.weight, self.mlp.down_proj.weight
        end = self.layer_scalar, next_norm, self.eps
        last = end if ple is None else (None, None, self.eps)
        post = self.post_feedforward_layernorm.weight
        if e is not None:
            router = self.router.scale, self.router.proj.weight, self.router.per_expert_scale
            experts = self.experts.gate_up_proj, self.experts.down_proj
            d, e = ops.moe_feed_forward(x, h, e, *mlp, *router, *experts, self.top_k, self.eps)
            norms = self.post_feedforward_layernorm_1.weight, self.post_feedforward_layernorm_2.weight, post
            x, h_next = ops.moe_norm_add_norm(d, e, x, *norms, *last)
        else:
            x, h_next, _ = ops.norm_add_norm(ops.geglu_mlp(h, *mlp), x, post, *last)
        if ple is None:
            return x, h_next
        gate, proj = self.per_layer_input_gate.weight, self.per_layer_projection.weight
        return ops.ple_gate(x, ple, gate, proj, self.post_per_layer_input_norm.weight, *end)


def quantize(model: nn.Module, bits: int, done: Callable[[str], None] | None = None) -> None:
    """Projections, experts and tables of the model become quantized ones, one after the other, so that memory never holds
    more than one of them twice. What stays: norms, scalars, the router, and the small matrices of per-layer embeddings.
    done: is told the name of each module as it has been."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, Quantizable)}
    for name, module in tables.items():
        for parameter, w in module.named_parameters(recurse=False):
            if not w.is_meta and w.numel():
                low, high = torch.aminmax(w)
                if not max(-low, high).item() <= LARGEST_WEIGHT[max(bits, module.least_bits)]:
                    raise ValueError(f"{name}.{parameter}: a value is not finite, or too large for a scale in fp16")
    for name, module in tables.items():
        module.quantize(bits)
        if done is not None:
            done(name)


Embedded = tuple[Tensor, Tensor | None]  # x [T, H], and the layers' PLE inputs [T, L, P] where a model has them


class Text(nn.Module):
    """Embedding, layers, final norm: what transformers' state dict calls `model`."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Table(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in config.layers())
        self.norm = Weight(config.hidden_size)
        if size := config.hidden_size_per_layer_input:
            width = config.num_hidden_layers * size
            self.embed_tokens_per_layer = Table(config.vocab_size_per_layer_input, width)
            self.per_layer_model_projection = Weight(width, config.hidden_size)
            self.per_layer_projection_norm = Weight(size)
        self._inv_freq: dict[tuple[bool, torch.device, torch.dtype], Tensor] = {}
        self._ple_scales: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def inv_freq(self, is_sliding: bool, device: torch.device) -> Tensor:
        """[R] radians per token of one kind of layer. Not a buffer: it must survive `to_empty` and casts to bf16."""
        dtype = self.norm.weight.dtype
        key = is_sliding, device, dtype  # a model may be cast after it has run
        if key not in self._inv_freq:
            layer = next(c for c in self.config.layers() if c.is_sliding == is_sliding)
            # theta^(-2 i / D) in fp32 at least, as positions go to 262144. Written here a second time, not taken from the
            # reference, so that the self-check would see a mistake.
            exponent = torch.arange(0, 2 * layer.num_rotary_pairs, 2, device=device).to(
                torch.promote_types(dtype, torch.float32)
            )
            self._inv_freq[key] = layer.rope_theta ** -(exponent / layer.head_dim)
        return self._inv_freq[key]

    def step(self, new_lens: list[int], cache: KVCache | None, *, decode: bool = False, going: Tensor | None = None) -> Step:
        """The Step for `new_lens[b]` new tokens of each sequence b.

        decode: one row for every sequence, and the cache is written first. new_lens[b] = 0 then marks an idle row: it counts
        for nothing, and what it writes lands in the slot that the next token would take. going: new_lens [B] on the device,
        for a step that is captured: all that differs from one step to the next is then computed there.
        """
        device, batch = self.norm.weight.device, len(new_lens)
        if decode and cache is not None:
            positions, sequence = cache.lens.long(), torch.arange(batch, device=device)
            kv_lens = cache.lens + 1
            if going is None and 0 in new_lens:
                going = torch.tensor(new_lens, device=device)
            if going is not None:
                kv_lens = torch.where(going > 0, kv_lens, 0)
            caches = {kv.slots: kv for kv in (cache.layer(i) for i in range(len(self.layers)))}
            return Step(
                positions=positions,
                sequence=sequence,
                cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=device),
                prefix_lens=None,
                kv_lens=kv_lens,
                angles=self.angles(positions),
                new_lens=new_lens,
                rows={slots: kv.rows(sequence, positions) for slots, kv in caches.items()},
                limit=None if device.type == "cpu" else ops.decode_limit(max(cache.host_lens) + 1),
            )
        have = [0] * batch if cache is None else cache.host_lens
        bounds = list(itertools.accumulate(new_lens, initial=0))
        new = torch.tensor(new_lens, device=device)
        sequence = torch.arange(batch, device=device).repeat_interleave(new, output_size=bounds[-1])
        shift = torch.tensor([h - lo for h, lo in zip(have, bounds, strict=False)], device=device)
        positions = torch.arange(bounds[-1], device=device) + shift[sequence]
        return Step(
            positions=positions,
            sequence=sequence,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
            prefix_lens=cache.lens.clone() if cache is not None and any(have) else None,
            kv_lens=None,
            angles=self.angles(positions),
            new_lens=new_lens,
            limit=None if device.type == "cpu" else -(-max(have, default=0) // TILE) * TILE,
        )

    def kept(self) -> Iterator[Tensor]:
        """Tensors that passes read, and that are no parameters."""
        yield from (*self._inv_freq.values(), *self._ple_scales.values())

    def angles(self, positions: Tensor) -> dict[bool, tuple[Tensor, Tensor]]:
        """positions [T] int64 -> for each kind of layer, by is_sliding: cos, sin [T, R]."""
        kinds = {c.is_sliding for c in self.config.layers()}
        return {s: ops.rope_angles(positions, self.inv_freq(s, positions.device)) for s in kinds}

    def embed(self, ids: Tensor) -> Embedded:
        """ids [T] int64 -> x [T, H], and the layers' PLE inputs [T, L, P] (None for models without)."""
        c, weight = self.config, self.embed_tokens.weight
        x = ops.embedding(weight, ids, _rounded(c.hidden_size**0.5, weight.dtype))
        if not (size := c.hidden_size_per_layer_input):
            return x, None
        token = ops.embedding(self.embed_tokens_per_layer.weight, ids, _rounded(size**0.5, weight.dtype))
        return x, self.per_layer_inputs(x, token)

    def per_layer_inputs(self, x: Tensor, token: Tensor) -> Tensor:
        """Embeddings x [T, H] and those per layer, token [T, L * P] -> the layers' PLE inputs [T, L, P]."""
        c, size = self.config, self.config.hidden_size_per_layer_input
        context = ops.linear(x, self.per_layer_model_projection.weight)
        # (rms(context * H^-0.5) + token) * 2^-0.5. A factor before a norm acts on its eps alone.
        norm, eps = self.per_layer_projection_norm.weight, c.rms_norm_eps * c.hidden_size
        ple, _, _ = ops.norm_add_norm(context.view(-1, size), token.view(-1, size), norm, self._ple_scale(norm), None, eps)
        return ple.view(-1, c.num_hidden_layers, size)

    def _ple_scale(self, like: Tensor) -> Tensor:
        """[1]: 2^-0.5. Kept, as `inv_freq` is and for the same reason."""
        key = like.device, like.dtype
        if key not in self._ple_scales:
            self._ple_scales[key] = torch.full((1,), 2.0**-0.5, dtype=like.dtype, device=like.device)
        return self._ple_scales[key]

    def layer(self, index: int) -> Layer:
        """Decoder layer `index`."""
        return cast(Layer, self.layers[index])

    def owner(self, index: int) -> Attention:
        """The attention whose K and V layer `index` reads."""
        donor = self.config.layer(index).kv_donor
        return self.layer(index if donor is None else donor).self_attn

    def forward(
        self,
        ids: Tensor | Embedded,
        step: Step,
        cache: KVCache | None,
        last: list[bool] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """`run`, after which the cache counts the new tokens."""
        h = self.run(ids, step, cache, last, outputs)
        if cache is not None:
            cache.advance(step.new_lens)
        return h

    def run(
        self,
        ids: Tensor | Embedded,
        step: Step,
        cache: KVCache | None,
        last: list[bool] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """ids [T] int64 -> final normed hidden states [T, H]; the new tokens are in the cache, and not counted yet.

        ids: or what `embed` makes of them. last: only the newest token's hidden state of each sequence b with last[b] is
        wanted -> [B, H]; other rows are undefined. Layers that share KV then see these tokens alone, since they add nothing to
        any cache. outputs: a list that is given the residual stream before the first layer and after each [T, H].
        """
        x, ple = self.embed(ids) if isinstance(ids, Tensor) else ids
        if outputs is not None:
            outputs.append(x)
        h: Tensor | None = None
        picked = last is None or step.kv_lens is not None  # a decode step has one token a sequence already
        for index in range(self.config.num_hidden_layers):
            if index == self.config.first_shared_layer and cache is not None and not picked and last is not None:
                self.write_donors(step, cache)
                cut = self.last_rows(step)
                x, h, ple = x[cut], None if h is None else h[cut], None if ple is None else ple[cut]
                step = self.last_step(step, cache, last)
                picked = True
            x, h = self.run_layer(index, x, h, step, cache, None if ple is None else ple[:, index])
            if outputs is not None:
                outputs.append(x)
        if cache is not None:
            self.write_donors(step, cache)
        h = cast(Tensor, h)
        return h if picked else h[self.last_rows(step)]

    def run_layer(
        self,
        index: int,
        x: Tensor,
        h: Tensor | None,
        step: Step,
        cache: KVCache | None,
        ple: Tensor | None,
        observe: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Layer `index` on (x, h): its output and the pre-norm of what follows. h None: computed from x.

        observe is shown the residual stream between the two blocks.
        """
        layer = self.layer(index)
        following = self.norm if index + 1 == len(self.layers) else self.layer(index + 1).input_layernorm
        x, h, e = self.run_attention(index, x, h, step, cache)
        if observe is not None:
            observe(x)
        return layer.feed_forward_block(x, cast(Tensor, h), e, ple, following.weight)

    def run_attention(
        self, index: int, x: Tensor, h: Tensor | None, step: Step, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The first block of layer `index`, as `Layer.attention_block`. h None: computed from x."""
        layer = self.layer(index)
        if h is None:
            h = ops.rms_norm(x, layer.input_layernorm.weight, layer.eps)
        freq = self.inv_freq(layer.layer.is_sliding, x.device)
        return layer.attention_block(x, h, step, cache, self.owner(index), freq)

    def write_donors(self, step: Step, cache: KVCache) -> None:
        """What Attention left in step.shared goes to the donors' caches, now that nothing reads their old content."""
        for index, (k, v) in step.shared.items():
            write_new(cache.layer(index), step, k, v)
        step.shared.clear()

    @staticmethod
    def last_rows(step: Step) -> Tensor:
        """Row of each sequence's newest token [B] int64 (any row for a sequence without new tokens)."""
        return (step.cu_seqlens[1:].long() - 1).clamp(min=0)

    def last_step(self, step: Step, cache: KVCache, last: list[bool]) -> Step:
        """The Step that shows the rest of the layers only each sequence's newest token, as a decode step over the caches."""
        rows = self.last_rows(step)
        new = torch.tensor(step.new_lens, dtype=torch.int32, device=rows.device)
        wanted = torch.tensor(last, device=rows.device)
        positions = step.positions[rows]
        return Step(
            positions=positions,
            sequence=torch.arange(len(last), device=rows.device),
            cu_seqlens=torch.arange(len(last) + 1, dtype=torch.int32, device=rows.device),
            prefix_lens=step.prefix_lens,
            kv_lens=torch.where(wanted, cache.lens + new, 0),
            angles={s: (cos[rows], sin[rows]) for s, (cos, sin) in step.angles.items()},
            new_lens=step.new_lens,
        )


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype))
