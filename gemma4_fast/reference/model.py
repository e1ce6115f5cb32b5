"""The whole of Gemma 4's text model in one page, to be read beside the formula. No cache, no batch, no tuning.

`weights` is any mapping from transformers' state-dict names to tensors. Every function works in the dtype of the weights it
is given; `Weights(tensors, dtype=torch.float64)` widens each tensor at the moment it is read, a matrix block by block, so that
judging a large model in fp64 takes next to no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_fast.config import Gemma4Config, LayerConfig
from gemma4_fast.quant import QuantizedWeight, rounded, widened_linear
from gemma4_fast.reference import ops

SMALL = 1 << 20  # values of a matrix that is widened whole


class Widened:
    """A matrix [N, K], or one for each expert [E, N, K], that is widened block by block in products.

    It offers what this page needs of a weight: `shape`, `dtype`, `to`, indexing by an expert's
    number, and `F.linear`. rounds_x: x is rounded to 8 bits first, as for a quantized weight.
    """

    def __init__(self, weight: Any, dtype: torch.dtype, *, rounds_x: bool = False) -> None:
        self.weight, self.dtype, self.shape = weight, dtype, weight.shape
        self.rounds_x = rounds_x

    def __getitem__(self, expert: int) -> Widened:
        return Widened(self.weight[expert], self.dtype, rounds_x=self.rounds_x)

    def to(self, dtype: torch.dtype) -> Tensor:
        """All of it."""
        return cast(Tensor, self.weight.to(self.dtype).to(dtype))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or len(args) != 2 or args[0].dtype != args[1].dtype:
            return NotImplemented
        x, matrix = args
        if matrix.rounds_x:
            return widened_linear(rounded(x), matrix.weight).to(x.dtype)
        return widened_linear(x, matrix.weight)


class Weights(Mapping[str, Tensor]):
    """A view of named tensors below a prefix, widened to `dtype` when read (None: as stored)."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "model.", dtype: torch.dtype | None = None) -> None:
        self._tensors, self._prefix, self._dtype = tensors, prefix, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.matrix(self._tensors[self._prefix + name].detach())

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self._prefix) for n in self._tensors if n.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def widened(self, w: Tensor) -> Tensor:
        """w as these weights are read: quantized ones too, so that the truth's products do not round x to their bits."""
        return w if self._dtype is None else w.to(self._dtype)

    def matrix(self, w: Tensor) -> Tensor:
        """w in the dtype of these weights. A large one is widened block by block, in its products.

        A large one that keeps its dtype is also multiplied in blocks, since PyTorch may copy a whole
        matrix before a product.
        """
        if w.numel() <= SMALL:
            return self.widened(w)
        if self._dtype is None:
            return cast(Tensor, Widened(w, w.dtype, rounds_x=isinstance(w, QuantizedWeight)))
        return cast(Tensor, Widened(w, self._dtype))

    def layer(self, index: int) -> Weights:
        """The tensors of decoder layer `index`, with names as in facts: "self_attn.q_proj.weight", "layer_scalar", ..."""
        return Weights(self._tensors, f"{self._prefix}layers.{index}.", self._dtype)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` of a table, widened after the look-up: embedding tables are too large to widen whole."""
        return self.widened(self._tensors[self._prefix + name].detach()[ids])


def inv_freq(layer: LayerConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[R] radians per token: theta^(-2 i / D). The exponent is over the whole head dim, also where only R < D/2 pairs turn.

    Half-precision dtypes get fp32: an angle is position * inv_freq, and positions go to 262144.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    i = torch.arange(layer.num_rotary_pairs, device=device).to(dtype)
    return 1.0 / (layer.rope_theta ** (2 * i / layer.head_dim))


def embed(w: Weights, config: Gemma4Config, ids: Tensor) -> Tensor:
    """ids [T] -> x [T, H] = table[ids] * sqrt(H), the factor rounded to x's dtype (53.0 in bf16 for the 26B)."""
    x = w.rows("embed_tokens.weight", ids)
    return x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)


def per_layer_inputs(w: Weights, config: Gemma4Config, ids: Tensor, x: Tensor) -> Tensor | None:
    """PLE [T, L, P] = (rms(projection(x) * H^-0.5) + table[ids] * sqrt(P)) * 2^-0.5; None for models without."""
    if not (size := config.hidden_size_per_layer_input):
        return None
    context = F.linear(x, w["per_layer_model_projection.weight"]) * config.hidden_size**-0.5
    context = context.view(ids.shape[0], config.num_hidden_layers, size)
    context = ops.rms_norm(context, w["per_layer_projection_norm.weight"], config.rms_norm_eps)
    token = w.rows("embed_tokens_per_layer.weight", ids) * torch.tensor(size**0.5, dtype=x.dtype, device=x.device)
    return (context + token.view_as(context)) * 2.0**-0.5


KV = dict[int, list[tuple[Tensor, Tensor]]]  # by layer: K, V [S, Hkv, D] of each sequence


def attention_block(
    w: Weights,
    config: Gemma4Config,
    layer: LayerConfig,
    x: Tensor,
    kv: KV,
    lens: Sequence[int] | None = None,
) -> Tensor:
    """x [T, H] -> x + rms(attention(rms(x))), for sequences of `lens` tokens end to end (None: one sequence).

    `kv` has the K and V of the tokens that came before x, if there are any; those of x are appended, for the layers that share
    them and for the tokens that follow.
    """
    eps, lens = config.rms_norm_eps, [x.shape[0]] if lens is None else list(lens)
    donor = layer.index if layer.kv_donor is None else layer.kv_donor
    before = [k.shape[0] for k, _ in kv.get(donor, [])] or [0] * len(lens)
    if layer.kv_donor is not None:  # the donor has appended these tokens already
        before = [n - new for n, new in zip(before, lens, strict=True)]
    h = ops.rms_norm(x, w["input_layernorm.weight"], eps)
    position = torch.cat([torch.arange(n, n + new, device=x.device) for n, new in zip(before, lens, strict=True)])
    cos, sin = ops.rope_angles(position, inv_freq(layer, x.dtype, x.device))

    def heads(name: str, count: int) -> Tensor:
        return F.linear(h, w[f"self_attn.{name}.weight"]).view(-1, count, layer.head_dim)

    q = heads("q_proj", layer.num_q_heads)
    q = ops.rotate(ops.rms_norm(q, w["self_attn.q_norm.weight"], eps), cos, sin)
    if layer.kv_donor is None:
        raw_k = heads("k_proj", layer.num_kv_heads)
        raw_v = raw_k if layer.k_eq_v else heads("v_proj", layer.num_kv_heads)
        k = ops.rotate(ops.rms_norm(raw_k, w["self_attn.k_norm.weight"], eps), cos, sin)
        v = ops.rms_norm(raw_v, None, eps)
        new_kv = list(zip(k.split(lens), v.split(lens), strict=True))
        if donor in kv:
            pairs = zip(kv[donor], new_kv, strict=True)
            new_kv = [(torch.cat((a, c)), torch.cat((b, d))) for (a, b), (c, d) in pairs]
        kv[donor] = new_kv

    outputs = []
    for (k, v), q_of, at in zip(kv[donor], q.split(lens), position.split(lens), strict=True):
        key = torch.arange(k.shape[0], device=x.device)
        mask = key[None] <= at[:, None]
        if layer.window is not None:
            mask &= key[None] > at[:, None] - layer.window
        outputs.append(ops.attend(q_of, k, v, mask, 1.0))
    a = F.linear(torch.cat(outputs).flatten(1), w["self_attn.o_proj.weight"])
    return x + ops.rms_norm(a, w["post_attention_layernorm.weight"], eps)


def feed_forward_block(w: Weights, config: Gemma4Config, layer: LayerConfig, x: Tensor, ple: Tensor | None) -> Tensor:
    """x [T, H] -> the layer's output: dense branch, routed experts (MoE), per-layer embedding (ple [T, P]), layer scalar."""
    eps = config.rms_norm_eps
    h = ops.rms_norm(x, w["pre_feedforward_layernorm.weight"], eps)
    gate, up = F.linear(h, w["mlp.gate_proj.weight"]), F.linear(h, w["mlp.up_proj.weight"])
    d = F.linear(F.gelu(gate, approximate="tanh") * up, w["mlp.down_proj.weight"])
    if layer.is_moe:
        d = ops.rms_norm(d, w["post_feedforward_layernorm_1.weight"], eps)
        router = w["router.scale"], w["router.proj.weight"], w["router.per_expert_scale"]
        weights, ids = ops.route_topk(x, *router, config.top_k_experts, eps)  # reads the un-normed residual
        e = ops.rms_norm(x, w["pre_feedforward_layernorm_2.weight"], eps)
        e = ops.moe(e, weights, ids, w["experts.gate_up_proj"], w["experts.down_proj"])
        d = d + ops.rms_norm(e, w["post_feedforward_layernorm_2.weight"], eps)
    x = x + ops.rms_norm(d, w["post_feedforward_layernorm.weight"], eps)
    if ple is not None:
        h = F.gelu(F.linear(x, w["per_layer_input_gate.weight"]), approximate="tanh") * ple
        h = F.linear(h, w["per_layer_projection.weight"])
        x = x + ops.rms_norm(h, w["post_per_layer_input_norm.weight"], eps)
    return x * w["layer_scalar"]


def head(w: Weights, tensors: Mapping[str, Tensor], config: Gemma4Config, x: Tensor) -> Tensor:
    """x [T, H] -> logits [T, V]: final norm, the unscaled embedding table (or lm_head), softcap."""
    x = ops.rms_norm(x, w["norm.weight"], config.rms_norm_eps)
    table = tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].detach()
    return softcap(F.linear(x, w.matrix(table)), config)


def softcap(y: Tensor, config: Gemma4Config) -> Tensor:
    """softcap * tanh(y / softcap), or y for a model without."""
    cap = config.final_logit_softcapping
    return y if cap is None else cap * torch.tanh(y / cap)


@torch.no_grad()
def forward(
    tensors: Mapping[str, Tensor],
    config: Gemma4Config,
    ids: Tensor,
    *,
    dtype: torch.dtype | None = None,
    last: int | None = None,
) -> Tensor:
    """ids [T] int64, one sequence from position 0 -> logits [T, V] (of the last `last` tokens if given).

    `dtype` None computes in the dtype of the tensors.
    """
    w = Weights(tensors, dtype=dtype)
    x = embed(w, config, ids)
    ple = per_layer_inputs(w, config, ids, x)
    kv: KV = {}
    for layer in config.layers():
        lw = w.layer(layer.index)
        x = attention_block(lw, config, layer, x, kv)
        x = feed_forward_block(lw, config, layer, x, None if ple is None else ple[:, layer.index])
    return head(w, tensors, config, x[-last:] if last else x)
