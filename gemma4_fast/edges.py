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
from gemma4_fast.cache import allocate
from gemma4_fast.config import LayerConfig
from gemma4_fast.reference import ops as reference

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

NEW = 16  # tokens whose queries are pointed
SHORT = 5  # length of a sequence whose cache is mostly empty
HEADS = 4  # KV heads that the reference takes at once


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The worst row's L2 distance, relative to the row's norm, but at least to a hundredth of the rows' typical norm."""
    got, truth = got.to(truth.dtype).flatten(1), truth.flatten(1)
    norm = truth.norm(dim=1)
    worst = (got - truth).norm(dim=1) / norm.clamp(min=0.01 * norm.square().mean().sqrt().item() + 1e-30)
    return worst.max().item() if worst.isfinite().all() else math.inf


def window_edges(model: Gemma4, layer: LayerConfig, wide: torch.dtype) -> Iterator[tuple[str, str, float, float]]:
    """Yields (op, phase, relative error, what plain PyTorch loses) for this kind of layer at its true shapes."""
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
            return randn(*v.shape)
        angles = reference.rope_angles(torch.arange(v.shape[0], device=device), freq)
        return reference.rotate(v.float() * k_weight.float(), *angles).to(dtype)

    def point(key: Tensor) -> Tensor:
        """Queries [..., Hq, D] whose score with key [..., Hkv, D] outweighs all other keys together a hundredfold."""
        score = math.log(total) + 5
        q = key.float() * score / key.float().square().sum(-1, keepdim=True)
        return q.to(dtype).repeat_interleave(layer.num_q_heads // layer.num_kv_heads, -2)

    def widened(*args: Any) -> list[Any]:
        return [a.to(wide) if isinstance(a, Tensor) and a.dtype == dtype else a for a in args]

    def judge_rows(phase: str, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[str, str, float, float]:
        """A prefill of one sequence, of which the reference computes some rows alone."""
        key = torch.arange(total, device=device)
        mask = key[None] <= rows[:, None]
        if window is not None:
            mask &= key[None] > rows[:, None] - window
        wide_q, wide_k, wide_v = widened(q[rows], k, v)
        truth = reference.attend(wide_q, wide_k, wide_v, mask, 1.0)
        plain = reference.attend(q[rows], k, v, mask, 1.0)
        bounds = torch.tensor([0, total], dtype=torch.int32, device=device)
        got = ops.gqa_prefill(q, k, v, bounds, window)[rows]
        return "gqa_prefill", phase, relative_error(got, truth), relative_error(plain, truth)

    def in_parts(plain_op: Callable[..., Tensor], wide_args: bool, *args: Any) -> Tensor:
        """The reference on some heads after the others, so that not all of a cache is widened at once.

        The arguments with more than two axes are [..., heads, D]: the queries first, then keys and values.
        """
        group, outs = layer.num_q_heads // layer.num_kv_heads, []
        for first in range(0, layer.num_kv_heads, HEADS):
            last = min(first + HEADS, layer.num_kv_heads)
            own = []
            for i, a in enumerate(args):
                if isinstance(a, Tensor) and a.dim() > 2:
                    by = group if i == 0 else 1
                    a = a[..., first * by : last * by, :]
                own.append(a)
            outs.append(plain_op(*(widened(*own) if wide_args else own)))
        return torch.cat(outs, -2)

    def judge(op: str, phase: str, args: Sequence[Any], sequences: Sequence[Sequence[Any]]) -> tuple[str, str, float, float]:
        """op(*args) beside the reference, which takes one of these sequences' arguments after the other."""
        plain_op = getattr(reference, op)
        truth, plain = (torch.cat([in_parts(plain_op, wide_args, *own) for own in sequences]) for wide_args in (True, False))
        return op, phase, relative_error(getattr(ops, op)(*args), truth), relative_error(plain, truth)

    def judge_decode(phase: str, q: Tensor, k: Tensor | None, v: Tensor, lens: Tensor) -> tuple[str, str, float, float]:
        sequences = [
            (
                q[b : b + 1],
                None if k is None else k[b : b + 1],
                v[b : b + 1],
                lens[b : b + 1],
                window,
                None,
                *rebuild,
            )
            for b in range(len(q))
        ]
        return judge("gqa_decode", phase, (q, k, v, lens, window, None, *rebuild), sequences)

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
    yield judge_rows("prefill", q, k, v, at)

    # A further chunk of two sequences with different prefixes: the second has the first's tokens, but stops earlier.
    kv = allocate(layer, 2, total, dtype, device)
    prefixes = [total - new, max(1, total - new - new // 2)]
    for b, prefix in enumerate(prefixes):
        at = torch.arange(max(0, prefix - kv.slots), prefix, device=device)
        kv.write(k[at], v[at], kv.rows(torch.full_like(at, b), at))
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
    yield judge("gqa_prefill", "chunk", (q, k[rows], v[rows], bounds, window, *old), sequences)

    # Decode: the newest key, the oldest in the window, the one before it if the ring still has it, an empty slot, an idle row.
    del sequences, old
    kv = allocate(layer, 5, total, dtype, device)
    everywhere = torch.arange(kv.slots, device=device)
    garbage_v = -v[everywhere % total]
    garbage_k = keys(garbage_v) if layer.k_eq_v else -k[everywhere % total]
    last = total - 1
    oldest = max(0, last - window + 1) if window is not None else 0
    before = oldest - 1 if oldest - 1 > last - kv.slots and oldest > 0 else last
    lens_host = [total, total, total, short, 0]
    for b, length in enumerate(lens_host):
        if length < kv.slots:
            kv.write(garbage_k, garbage_v, kv.rows(torch.full_like(everywhere, b), everywhere))
        at = torch.arange(max(0, length - kv.slots), length, device=device)
        kv.write(k[at], v[at], kv.rows(torch.full_like(at, b), at))
    pointed = point(torch.stack((k[last], k[oldest], k[before], garbage_k[short], k[last])))
    lens = torch.tensor(lens_host, dtype=torch.int32, device=device)
    yield judge_decode("decode", pointed, kv.k, kv.v, lens)
    for b in (1, 3):  # alone: kernels split the work by the size of the batch
        k_alone = None if kv.k is None else kv.k[b : b + 1]
        alone = pointed[b : b + 1], k_alone, kv.v[b : b + 1], lens[b : b + 1]
        yield judge_decode("decode, batch 1", *alone)
