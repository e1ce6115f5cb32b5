"""The `torch` backend: PyTorch calls only, any device. Never missing, and the baseline that every benchmark row stands beside.

Signatures and meaning are those of gemma4_fast.reference.ops, which documents shapes and formulas; here only what differs.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gemma4_fast.ops import checks
from gemma4_fast.quant import WeightLike
from gemma4_fast.reference.ops import embedding, geglu, rope_angles, rotate, route_topk

__all__ = [
    "draw", "embedding", "expert_dispatch", "geglu_mlp", "gqa_decode", "gqa_prefill", "grouped_gemm", "linear", "logits",
    "moe_decode", "norm_add_norm", "ple_gate", "qkv_norm_rope", "restrict", "rms_norm", "rope_angles", "route_topk",
]  # fmt: skip


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """fp32 or wider in and out: F.rms_norm is one fused pass."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def dense(weight: WeightLike) -> Tensor:
    """A weight as a Tensor: a quantized one dequantized, at each call."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def linear(x: Tensor, weight: WeightLike) -> Tensor:
    return F.linear(x, dense(weight))


def geglu_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    return F.linear(geglu(F.linear(x, dense(gate_up))), dense(down))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return _rms(_wide(x), None if weight is None else _wide(weight), eps).to(x.dtype)


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y = _wide(residual) + _rms(_wide(x), _wide(weight), eps)
    y = (y if scale is None else y * scale).to(x.dtype)
    z, other = (None if w is None else rms_norm(y, w, eps) for w in (next_weight, other_weight))
    return y, z, other


def moe_norm_add_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    experts_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    x = _rms(_wide(dense), _wide(dense_weight), eps) + _rms(_wide(experts), _wide(experts_weight), eps)
    return norm_add_norm(x.to(dense.dtype), residual, weight, scale, next_weight, eps)[:2]


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dim = q_weight.shape[0]
    heads = _wide(qkv.view(qkv.shape[0], -1, dim))  # stays wide through norm and RoPE, rounded once
    q = rotate(_rms(heads[:, :num_q_heads], _wide(q_weight), eps), cos, sin).to(qkv.dtype)
    if num_kv_heads == 0 or k_weight is None:
        return q, None, None
    k = v = None
    if v_cache is None or k_cache is not None:
        raw_k = heads[:, num_q_heads : num_q_heads + num_kv_heads]
        k = rotate(_rms(raw_k, _wide(k_weight), eps), cos, sin).to(qkv.dtype)
    v = _rms(heads[:, -num_kv_heads:], None, eps).to(qkv.dtype)
    if v_cache is None or slots is None:
        return q, k, v
    write_cache(v_cache, v, slots)
    if k_cache is not None and k is not None:
        write_cache(k_cache, k, slots)
    return q, None, None


def write_cache(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """cache [..., Hkv, D] contiguous: rows [T, Hkv, D] become its flattened rows `slots` [T] int64, which are distinct."""
    cache.view(-1, *cache.shape[-2:]).index_copy_(0, slots, rows)


_ANGLES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # inv_freq -> its values, (cos, sin) [positions, R] grown by doubling


def _angle_table(inv_freq: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin [>= positions, R] of a V-only cache's slots: the same for every layer and step, so kept."""
    values, table = _ANGLES.get(inv_freq, (None, None))
    if values is None or table[0].shape[0] < positions or not torch.equal(values, inv_freq):  # written in place since
        size = max(256, 1 << (positions - 1).bit_length())
        angles = torch.arange(size, device=inv_freq.device, dtype=inv_freq.dtype)[:, None] * inv_freq
        table = angles.cos(), angles.sin()
        _ANGLES[inv_freq] = inv_freq.clone(), table
    return cast(tuple[Tensor, Tensor], table)


def _blocks(cache: Tensor | None, block_table: Tensor | None) -> Tensor | None:
    """[num_blocks, block_size, Hkv, D] -> [B, S, Hkv, D]; a cache without a block table is that already."""
    return cache if cache is None or block_table is None else cache[block_table.long()].flatten(1, 2)


def gqa_decode(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    batch, q_heads, dim = q.shape
    k, v = _blocks(k_cache, block_table), cast(Tensor, _blocks(v_cache, block_table))
    slots, kv_heads = v.shape[1], v.shape[2]
    used = slots
    if kv_lens.device.type == "cpu":  # elsewhere reading the lengths would stall the queue, and the mask does it alone
        used = min(slots, max(kv_lens.tolist(), default=0))
    last = kv_lens.long()[:, None] - 1
    # Newest position <= last that is congruent to the slot, mod S; negative where the slot is still empty. [B, used]
    positions = last - (last - torch.arange(used, device=q.device)) % slots
    mask = positions >= 0
    if window is not None:
        mask &= positions > last - window
    grouped = q.view(batch, kv_heads, q_heads // kv_heads, dim)  # a group's heads are the rows of one product
    v = v[:, :used].transpose(1, 2)  # [B, Hkv, used, D]
    if k is None:
        out = _attend_v_only(
            grouped, v, kv_lens, positions, mask[:, None, None], cast(Tensor, inv_freq), cast(Tensor, k_weight), scale
        )
    else:
        out = F.scaled_dot_product_attention(
            grouped, k[:, :used].transpose(1, 2), v, attn_mask=mask[:, None, None], scale=scale
        )
    return out.reshape(q.shape).masked_fill((kv_lens <= 0)[:, None, None], 0.0)  # an idle row attends to nothing


def _attend_v_only(
    q: Tensor,
    v: Tensor,
    kv_lens: Tensor,
    positions: Tensor,
    mask: Tensor,
    inv_freq: Tensor,
    k_weight: Tensor,
    scale: float,
) -> Tensor:
    """Attention with K = RoPE(w * V), without building all of K. q [B, Hkv, G, D], v [B, Hkv, S, D], positions [B, S].

    On the columns that RoPE leaves alone q . (w V) = (q w) . V, so w moves into q; only the 2 R rotated columns are built.
    """
    dtype, pairs, half = q.dtype, inv_freq.shape[0], q.shape[-1] // 2
    if kv_lens.device.type == "cpu":
        longest = max(kv_lens.tolist(), default=0)
    else:  # the model's V-only caches are no rings, so positions stay below their size
        longest = int(v.shape[2])
    cos, sin = _angle_table(inv_freq, longest)
    index = positions.clamp(min=0)
    cos, sin = cos[index].unsqueeze(1), sin[index].unsqueeze(1)  # [B, 1, S, R]
    q, v, w = _wide(q) * scale, _wide(v), _wide(k_weight)  # few rows: on a CPU fp32 products are the fast ones
    a, b = v[..., :pairs] * w[:pairs], v[..., half : half + pairs] * w[half : half + pairs]
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)  # [B, Hkv, S, 2R]
    q_rotated = torch.cat((q[..., :pairs], q[..., half : half + pairs]), -1)
    w = w.clone()
    w[:pairs] = w[half : half + pairs] = 0
    scores = (q * w) @ v.transpose(-1, -2) + q_rotated @ rotated.transpose(-1, -2)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).to(dtype)


def gqa_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    prefixes = [0] * (len(bounds) - 1) if prefix_lens is None else prefix_lens.tolist()
    old_k, old_v = _blocks(k_cache, block_table), _blocks(v_cache, block_table)
    for b, prefix in enumerate(prefixes):
        lo, hi = bounds[b], bounds[b + 1]
        if lo == hi:
            continue
        keys, values, first = k[lo:hi], v[lo:hi], prefix  # `first`: the position of keys[0]
        if prefix and old_v is not None:
            first = max(0, prefix - old_v.shape[1], 0 if window is None else prefix - window + 1)
            positions = torch.arange(first, prefix, device=q.device)
            slots = positions % old_v.shape[1]
            before = old_v[b, slots]
            if old_k is not None:
                before_k = old_k[b, slots]
            else:
                cos, sin = _angle_table(cast(Tensor, inv_freq), prefix)
                before_k = rotate(_wide(before) * _wide(cast(Tensor, k_weight)), cos[positions], sin[positions])
            keys, values = torch.cat((before_k.to(k.dtype), keys)), torch.cat((before, values))
        ids = None if image_ids is None else image_ids[lo:hi]
        out[lo:hi] = _attend_blocks(q[lo:hi], keys, values, prefix - first, window, ids, scale)
    return out


_MASK_ELEMENTS = 1 << 24  # rows x keys of one mask: 16 MB as bool, 64 MB as the fp32 that SDPA makes of it


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, offset: int, window: int | None, ids: Tensor | None, scale: float
) -> Tensor:
    """One sequence, in blocks of query rows so that no [T, S] mask or score is made whole. Row i is key i + offset."""
    tokens, total = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T or S, D]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if offset == 0 and ids is None and (window is None or tokens <= window):
        return attend(q, k, v, is_causal=True)[0].transpose(0, 1)
    rows = max(16, min(window or tokens, _MASK_ELEMENTS // total))
    out = []
    for lo in range(0, tokens, rows):
        hi = min(lo + rows, tokens)
        start = 0 if window is None else max(0, lo + offset - window + 1)
        end = hi + offset if ids is None else total  # an image may reach past the block
        at = torch.arange(lo + offset, hi + offset, device=q.device)[:, None]
        key = torch.arange(start, end, device=q.device)
        mask = key <= at  # [rows, keys]
        if ids is not None:
            image = F.pad(ids, (offset, 0), value=-1)[start:end]
            mask |= (image == ids[lo:hi, None]) & (image >= 0)
        if window is not None:
            mask &= key > at - window
        out.append(attend(q[:, :, lo:hi], k[:, :, start:end], v[:, :, start:end], attn_mask=mask))
    return torch.cat(out, 2)[0].transpose(0, 1) if out else q[0].transpose(0, 1)


def expert_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    flat = ids.flatten().long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # the last: no expert here
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # integers: the order of the sum does not matter
    counts = counts[:num_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    tiles_of = (counts + block_m - 1) // block_m
    ends = tiles_of.cumsum(0)
    tile = torch.arange(-(-flat.numel() // block_m) + min(num_experts, flat.numel()), device=ids.device)
    expert = torch.searchsorted(ends, tile, right=True)  # num_experts for a tile past the last
    real = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    row = offsets[expert] + (tile - (ends - tiles_of)[expert]) * block_m
    tiles = torch.stack((expert, row), 1).masked_fill(~real[:, None], -1)
    return order.to(torch.int32), offsets.to(torch.int32), tiles.to(torch.int32)


def grouped_gemm(
    x: Tensor,
    weight: WeightLike,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> Tensor:
    rows = x[order.long() // top_k] if epilogue == "geglu" else x
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and isinstance(weight, Tensor):  # no host sync
        y = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:])
        # Rows of no expert here are left as they were in memory.
        y.masked_fill_((torch.arange(rows.shape[0], device=x.device) >= offsets[-1])[:, None], 0.0)
    else:
        y = rows.new_zeros(rows.shape[0], weight.shape[1])
        bounds = offsets.tolist()
        for expert, (lo, hi) in enumerate(itertools.pairwise(bounds)):
            if lo < hi:
                y[lo:hi] = F.linear(rows[lo:hi], dense(weight[expert]))
    if epilogue == "geglu":
        return geglu(y)
    if epilogue == "none":
        return y
    return _combine(y[order.long().argsort()], cast(Tensor, topk_weights)).to(x.dtype)


def _combine(y: Tensor, topk_weights: Tensor) -> Tensor:
    """y [T*K, N] in (token, k) order, topk_weights [T, K] -> their weighted sum [T, N], fp32 or wider, in the order of k."""
    terms = _wide(y).view(*topk_weights.shape, y.shape[-1])
    return (terms * topk_weights[..., None].to(terms.dtype)).sum(1)


def moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    tokens, top_k = ids.shape
    flat, num_experts = ids.flatten().long(), gate_up.shape[0]
    if x.device.type != "cpu" and isinstance(gate_up, Tensor):  # no host sync: copies of the weights of few experts
        here = (flat >= 0) & (flat < num_experts)
        flat = torch.where(here, flat, 0)
        h = geglu(torch.bmm(gate_up[flat], x.repeat_interleave(top_k, 0)[..., None]).squeeze(-1))
        y = torch.bmm(down[flat], h[..., None]).squeeze(-1).masked_fill(~here[:, None], 0.0)
    elif tokens == 1:  # no weight is copied, nothing is sorted
        y = x.new_zeros(top_k, x.shape[1])
        for k, e in enumerate(flat.tolist()):
            if 0 <= e < num_experts:
                y[k] = F.linear(geglu(F.linear(x, dense(gate_up[e]))), dense(down[e]))[0]
    else:  # each expert's weights are read once for all of its tokens
        order, offsets, _ = expert_dispatch(ids, num_experts)
        h = grouped_gemm(x, gate_up, order, offsets, top_k, "geglu")
        return grouped_gemm(h, down, order, offsets, top_k, "combine", topk_weights)
    return _combine(y, topk_weights).to(x.dtype)


def ple_gate(
    x: Tensor,
    ple: Tensor,
    gate: Tensor,
    proj: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    h = F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * ple, proj)
    return norm_add_norm(h, x, weight, scale, next_weight, eps)[:2]


def logits(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> Tensor:
    y = F.linear(x, dense(weight))
    if argmax:
        return torch.where(x.isfinite().all(-1), y.argmax(-1), -1)
    return y if softcap is None else (torch.tanh(_wide(y) / softcap) * softcap).to(x.dtype)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Of `sample`, what follows the logits [T, V] -> ids [T]; -1 where none is finite."""
    logits = logits.float()
    # At most 0: a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / checks.in_fp32(temperature)
    kept, ids = restrict(logits, top_k, top_p, min_p)
    sums = kept.exp().cumsum(-1, dtype=torch.float64)  # in fp32 a quarter of a million summands lose digits that `uniform` has
    at = torch.searchsorted(sums, uniform.double()[:, None] * sums[:, -1:], right=True).clamp(max=kept.shape[-1] - 1)
    chosen = (at if ids is None else ids.gather(-1, at)).squeeze(-1)
    return torch.where(sums[:, -1].isfinite(), chosen, -1)


def restrict(logits: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """logits [T, V] fp32, temperature applied -> log-weights [T, n] with -inf where a filter removes a token, and the ids
    [T, n] they belong to (None: n = V, in order). At least the likeliest token stays."""
    ids, last = None, logits.shape[-1] - 1
    if 0 < top_k <= last:
        # Integers in the order of the logits, the lower id the larger of equals: topk itself promises no order of equals.
        bits = (logits + 0.0).view(torch.int32).long()
        keys = bits.where(bits >= 0, bits ^ 0x7FFFFFFF) << 32 | torch.arange(last, -1, -1, device=logits.device)
        ids = last - (keys.topk(top_k, dim=-1).values & 0xFFFFFFFF)  # falling
        logits = logits.gather(-1, ids)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:  # keep the shortest head that reaches top_p
        p = logits.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p
        drop[..., 0] = False
        logits = logits.masked_fill(drop, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits, ids
