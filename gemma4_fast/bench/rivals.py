"""What one runs without this package: the PyTorch calls that transformers 5.23 makes for an op, as contenders of `bench ops`.

None is the `torch` backend's call: for many tokens that sorts too, but counts tiles, and groups for bf16 on a GPU alone; its
attention reads this package's caches, masks them in the call and lets SDPA share K and V among the heads of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_fast.errors import UnsupportedError
from gemma4_fast.reference.ops import cached_sequence, geglu


@dataclass(frozen=True)
class Way:
    """One way to an op's result. prepare: from the op's arguments those of `call`, where they differ; not timed."""

    call: Callable[..., Any]
    prepare: Callable[..., dict[str, Any]] | None = None

    def whole(self, *args: Any) -> Any:
        """From the op's arguments to its result."""
        return self.call(*args) if self.prepare is None else self.call(*self.prepare(*args).values())


# ---------------------------------------------------------------- experts
def grouped_mm(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Source: grouped_mm_experts_forward of transformers' integrations/moe.py. Arguments as in the op `moe`."""
    tokens, top_k = ids.shape
    experts, order = ids.flatten().sort()
    counted = experts.float() if x.device.type == "cpu" else experts  # histc takes no integers on a CPU
    counts = torch.histc(counted, bins=gate_up.shape[0], min=0, max=gate_up.shape[0] - 1)
    offsets = counts.cumsum(0, dtype=torch.int32)
    h = geglu(F.grouped_mm(x[order // top_k], gate_up.transpose(-2, -1), offs=offsets))
    y = F.grouped_mm(h, down.transpose(-2, -1), offs=offsets) * topk_weights.flatten()[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return y[inverse].view(tokens, top_k, -1).sum(1).to(x.dtype)


# ---------------------------------------------------------------- attention
_GQA_UP_TO = 256  # head_dim up to which transformers has SDPA share K and V, and only without a mask


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Source: sdpa_attention_forward of transformers' integrations/sdpa_attention.py.

    q [B, Hq, T, D]; k, v [B, Hkv, S, D]; mask [B or 1, 1, T, S] bool, None: causal if T > 1, else all. Returns [B T, Hq, D].
    """
    batch, heads, tokens, dim = q.shape
    groups = heads // k.shape[1]
    shared = groups > 1 and mask is None and dim <= _GQA_UP_TO
    if groups > 1 and not shared:
        if tokens == 1:  # a group's heads are the rows of one product
            q = q.reshape(batch, -1, groups, dim)
        else:
            k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, is_causal=tokens > 1 and mask is None, enable_gqa=shared
    )
    return out.reshape(q.shape[0], heads, tokens, dim).transpose(1, 2).contiguous().flatten(0, 1)


def _decode(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    length = _one_length(kv_lens)
    k, v = _kept(length, window or length, k_cache, v_cache, q.shape[0], block_table, inv_freq, k_weight)
    # transformers makes a mask for a full window, although it hides nothing.
    mask = None if window is None or k.shape[2] < window else q.new_ones(1, 1, 1, k.shape[2], dtype=torch.bool)
    return dict(q=q.unsqueeze(2), k=k, v=v, mask=mask, scale=scale)


def _prefill(
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
) -> dict[str, Any]:
    batch, tokens = cu_seqlens.shape[0] - 1, _one_length(cu_seqlens.diff())
    q, k, v = (x.view(batch, tokens, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    if v_cache is not None and prefix_lens is not None:
        prefix = _one_length(prefix_lens)
        newest = prefix if window is None else window - 1
        before = _kept(prefix, newest, k_cache, v_cache, batch, block_table, inv_freq, k_weight)
        k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
    k, v, total = k.contiguous(), v.contiguous(), k.shape[2]
    mask = None
    if image_ids is not None or tokens not in (1, total) or (window is not None and total >= window):
        at = torch.arange(total - tokens, total, device=q.device)[:, None]
        key = torch.arange(total, device=q.device)
        mask = (key <= at)[None, None]  # [1, 1, T, S]
        if image_ids is not None:
            ids = F.pad(image_ids.view(batch, 1, 1, tokens), (total - tokens, 0), value=-1)
            own = image_ids.view(batch, 1, tokens, 1)
            mask = mask | ((ids == own) & (own >= 0))
        if window is not None:
            mask = mask & (key > at - window)
    return dict(q=q, k=k, v=v, mask=mask, scale=scale)


def _one_length(lens: Tensor) -> int:
    found = set(lens.tolist())
    if len(found) != 1:
        raise UnsupportedError("sequences of different lengths, which transformers pads, are not measured")
    return int(found.pop())


def _kept(
    length: int,
    newest: int,
    k_cache: Tensor | None,
    v_cache: Tensor,
    batch: int,
    block_table: Tensor | None,
    inv_freq: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """K and V [B, Hkv, S, D] of at most so many of the newest tokens; K too where this package's cache keeps V alone."""
    found = []
    for b in range(batch):
        one, row = (b, None) if block_table is None else (slice(None), block_table[b])
        k, v, _ = cached_sequence(length, None if k_cache is None else k_cache[one], v_cache[one], row, inv_freq, k_weight)
        found.append(torch.stack((k, v))[:, max(0, k.shape[0] - newest) :])
    both = torch.stack(found, 1).transpose(2, 3).contiguous()  # [2, B, Hkv, S, D]
    return both[0], both[1]


# By op: contenders' names, and what they do.
RIVALS: Mapping[str, Mapping[str, Way]] = {
    "moe": {"torch grouped_mm": Way(grouped_mm)},
    "gqa_decode": {"torch sdpa": Way(sdpa, _decode)},
    "gqa_prefill": {"torch sdpa": Way(sdpa, _prefill)},
}
