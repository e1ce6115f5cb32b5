"""Window edges: attention asked about one key at a time, so that one key too many or too few decides the answer.

With real weights and a window of 1024, an off-by-one changes the output by a thousandth and hides in bf16 rounding. Here each
query points straight at one key: the oldest it may see, the one just before that, its own, or the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma4_fast import ops
from gemma4_fast.cache import LayerCache, allocate
from gemma4_fast.config import LayerConfig
from gemma4_fast.reference import ops as reference

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

NEW = 16  # tokens whose queries are pointed
SHORT = 5  # length of a sequence whose cache is mostly empty
HEADS = 4  # KV heads that the reference takes at once

Edge = tuple[str, str, float, float]  # op, phase, relative error, what plain PyTorch loses


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The worst row's L2 distance, relative to the row's norm, but at least to a hundredth of the rows' typical norm."""
    got, truth = got.to(truth.dtype).flatten(1), truth.flatten(1)
    norm = truth.norm(dim=1)
    worst = (got - truth).norm(dim=1) / norm.clamp(min=0.01 * norm.square().mean().sqrt().item() + 1e-30)
    return worst.max().item() if worst.isfinite().all() else math.inf


def window_edges(model: Gemma4, layer: LayerConfig, wide: torch.dtype) -> Iterator[Edge]:
    """Compare this kind of layer's attention at its true shapes."""
    dtype, device, window = model.dtype, model.device, layer.window
    total = min((window or 2 * NEW) + 2 * NEW, model.config.max_position_embeddings)
    new, short = min(NEW, total // 2), min(SHORT, total - 1)
    owner = model.model.owner(layer.index)
    freq = model.model.inv_freq(layer.is_sliding, device)
    k_weight = owner.k_norm.weight
    rebuild: tuple[Any, ...] = (freq, k_weight) if layer.k_eq_v else (None, None)
    generator = torch.Generator().manual_seed(layer.index)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def keys(v: Tensor) -> Tensor:
        """K of positions 0, 1, ...: from V where they are one projection."""
        if not layer.k_eq_v:
            return v.flip(0, -1)  # as random as V, and at once
        angles = reference.rope_angles(torch.arange(v.shape[0], device=device), freq)
        return reference.rotate(v.float() * k_weight.float(), *angles).to(dtype)

    def point(key: Tensor) -> Tensor:
        """Queries [..., Hq, D] whose score with key [..., Hkv, D] outweighs all other keys together a hundredfold."""
        score = math.log(total) + 5
        q = key.float() * score / key.float().square().sum(-1, keepdim=True)
        return q.to(dtype).repeat_interleave(layer.num_q_heads // layer.num_kv_heads, -2)

    def widened(*args: Any) -> list[Any]:
        return [a.to(wide) if isinstance(a, Tensor) and a.dtype == dtype else a for a in args]

    def heads(args: Sequence[Any], first: int) -> list[Any]:
        """The arguments for HEADS KV heads. Those with more than two axes are [..., heads, D], the queries first."""
        group = layer.num_q_heads // layer.num_kv_heads
        own = []
        for i, a in enumerate(args):
            if isinstance(a, Tensor) and a.dim() > 2:
                by = group if i == 0 else 1
                a = a[..., first * by : (first + HEADS) * by, :]
            own.append(a)
        return own

    def references(plain_op: Callable[..., Tensor], sequences: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
        """The truth, and what plain PyTorch gives, for one of these sequences' arguments after the other.

        They take a few heads at a time, so that not all of a cache is widened at once.
        """
        blocks = range(0, layer.num_kv_heads, HEADS)
        truth, plain = [], []
        for args in sequences:
            parts = [heads(args, first) for first in blocks]
            truth.append(torch.cat([plain_op(*widened(*own)) for own in parts], -2))
            plain.append(torch.cat([plain_op(*own) for own in parts], -2))
        return torch.cat(truth), torch.cat(plain)

    def row(op: str, phase: str, got: Tensor, truth: Tensor, plain: Tensor) -> Edge:
        return op, phase, relative_error(got, truth), relative_error(plain, truth)

    def fill(kv: LayerCache, lens: Sequence[int]) -> None:
        """The newest keys and values of sequences of these lengths, with garbage in the slots that stay empty."""
        for b, length in enumerate(lens):
            if length < kv.slots:
                slot = torch.arange(kv.slots, device=device)
                rows = kv.rows(torch.full_like(slot, b), slot)
                kv.write(garbage_k[: kv.slots], garbage_v[: kv.slots], rows)
            at = torch.arange(max(0, length - kv.slots), length, device=device)
            kv.write(k[at], v[at], kv.rows(torch.full_like(at, b), at))

    def decode_args(
        kv: LayerCache,
        q: Tensor,
        lens: Tensor,
        window: int | None,
        own: slice,
    ) -> tuple[Any, ...]:
        """The arguments of gqa_decode for some sequences of a batch."""
        k_own = None if kv.k is None else kv.k[own]
        return q[own], k_own, kv.v[own], lens[own], window, None, *rebuild

    def decode(
        kv: LayerCache,
        phase: str,
        host_lens: Sequence[int],
        pointed: Sequence[Tensor],
        window: int | None,
        alone: Sequence[int] = (),
    ) -> Iterator[Edge]:
        """One step of sequences of these lengths, whose queries point at these keys; of some also alone."""
        fill(kv, host_lens)
        q, lens = point(torch.stack(tuple(pointed))), torch.tensor(host_lens, dtype=torch.int32, device=device)
        parts = [slice(b, b + 1) for b in range(len(host_lens))]
        args = [decode_args(kv, q, lens, window, own) for own in parts]
        truth, plain = references(reference.gqa_decode, args)
        got = ops.gqa_decode(*decode_args(kv, q, lens, window, slice(None)))
        yield row("gqa_decode", phase, got, truth, plain)
        for b in alone:  # kernels split the work by the size of the batch
            got = ops.gqa_decode(*args[b])
            yield row("gqa_decode", "decode, batch 1", got, truth[parts[b]], plain[parts[b]])

    def five_sequences() -> Iterator[Edge]:
        """A larger batch, in small: short sequences, and a window that is short as well."""
        most = min(2 * NEW, total)
        near = None if window is None else min(window, most // 2)
        oldest = 0 if near is None else most - near
        pointed = [k[oldest], k[max(0, oldest - 1)], k[most - 2], garbage_k[short], k[0]]
        kv = allocate(layer, 5, most, dtype, device)
        lens = [most, most, most - 1, short, 0]
        yield from decode(kv, "decode of five sequences", lens, pointed, near)

    v = randn(total, layer.num_kv_heads, layer.head_dim)
    k = keys(v)
    picked = []
    for t in range(total):
        oldest = t - window + 1 if window is not None else 0
        target = (oldest, oldest - 1, t, t + 1)[t % 4]
        picked.append(target if 0 <= target < total else t)
    targets = torch.tensor(picked, device=device)
    # The first rows, some of each stretch, and all from where the window begins to leave something out.
    judged = [t for t in range(total) if t < NEW or t % 97 < 4 or t >= total - 3 * NEW]
    at = torch.tensor(judged, device=device)
    q = v.new_zeros(total, layer.num_q_heads, layer.head_dim)
    q[at] = point(k[targets[at]])
    key = torch.arange(total, device=device)
    mask = key[None] <= at[:, None]
    if window is not None:
        mask &= key[None] > at[:, None] - window
    expected = references(reference.attend, [(q[at], k, v, mask, 1.0)])
    bounds = torch.tensor([0, total], dtype=torch.int32, device=device)
    got = ops.gqa_prefill(q, k, v, bounds, window)[at]
    yield row("gqa_prefill", "prefill", got, *expected)

    # A further chunk of two sequences with different prefixes: the second has the first's tokens, but stops earlier.
    kv = allocate(layer, 2, total, dtype, device)
    prefixes = [total - new, max(1, total - new - new // 2)]
    everywhere = torch.arange(kv.slots, device=device)
    garbage_v = -v[everywhere % total]
    garbage_k = keys(garbage_v) if layer.k_eq_v else -k[everywhere % total]
    fill(kv, prefixes)
    rows = torch.cat([torch.arange(prefix, prefix + new, device=device) for prefix in prefixes])
    q = point(k[targets[rows]])
    bounds = torch.tensor([0, new, 2 * new], dtype=torch.int32, device=device)
    lens = torch.tensor(prefixes, dtype=torch.int32, device=device)
    sequences = []
    for b in range(2):
        own = slice(b * new, (b + 1) * new)
        of = rows[own]
        k_old = None if kv.k is None else kv.k[b : b + 1]
        old = k_old, kv.v[b : b + 1], lens[b : b + 1], None, *rebuild
        sequences.append((q[own], k[of], v[of], bounds[:2], window, *old))
    old = kv.k, kv.v, lens, None, *rebuild
    got = ops.gqa_prefill(q, k[rows], v[rows], bounds, window, *old)
    yield row("gqa_prefill", "chunk", got, *references(reference.gqa_prefill, sequences))

    # Decode: the newest key, beside an idle row, in the cache that the chunk has left. Then the
    # oldest key in the window, the one before it if the ring still has it, and an empty slot.
    last = total - 1
    oldest = max(0, last - window + 1) if window is not None else 0
    before = oldest - 1 if oldest - 1 > last - kv.slots and oldest > 0 else last
    del sequences, old
    yield from five_sequences()
    yield from decode(kv, "decode beside an idle row", [total, 0], [k[last], k[last]], window)
    del kv
    kv = allocate(layer, 3, total, dtype, device)
    pointed = [k[oldest], k[before], garbage_k[short]]
    yield from decode(kv, "decode", [total, total, short], pointed, window, alone=(0, 2))
