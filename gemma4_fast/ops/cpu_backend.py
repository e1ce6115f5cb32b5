"""The `cpu` backend: the C++ kernels of csrc/cpu behind the table's signatures, for fp32 and bf16, and quantized weights.

Everything is allocated here, outputs and scratch, so that the kernels own no memory. Shapes, formulas and sources:
`gemma4_fast.reference.ops`. Same bits for one sequence whatever the batch or the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gemma4_fast import native
from gemma4_fast.ops import checks
from gemma4_fast.quant import GROUP, WeightLike

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 512  # kMaxHeadDim in csrc/cpu/kernels.h
SPLIT = 256  # kDecodeSplit
TILE = 64  # kKeyTile
MAX_ROWS = 64  # kRows in csrc/cpu/gqa_prefill.cpp: query heads of one KV head


class _Kernels:
    """torch.ops.gemma4_fast_cpu, with ValueError for what a kernel finds wrong with its arguments' values: indices, say, that
    would leave memory."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.gemma4_fast_cpu, name).default

        def call(*args: Any) -> None:
            try:
                op(*args)
            except RuntimeError as error:
                _, mark, why = str(error).splitlines()[0].partition("bad argument: ")
                if not mark:
                    raise
                raise ValueError(why) from None

        setattr(self, name, call)
        return call


kernels: Any = _Kernels()


def _whole(x: Tensor) -> Tensor:
    """Contiguous, by a copy where it is not."""
    return x if x.is_contiguous() else x.contiguous()


def _maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else _whole(x)


def _fp32(x: Tensor) -> Tensor:
    return _whole(x if x.dtype == torch.float32 else x.float())


def embedding(weight: WeightLike, ids: Tensor, scale: float = 1.0) -> Tensor:
    values, scales = _parts(weight)
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype, device="cpu")
    kernels.embedding(values, scales, _whole(ids), out, scale, weight.shape[0], native.isa())
    return out


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (inv_freq.new_empty(positions.shape[0], inv_freq.shape[0]) for _ in range(2))
    kernels.rope_angles(_whole(positions), _whole(inv_freq), cos, sin, native.isa())
    return cos, sin


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = _whole(x)
    out = torch.empty_like(x)
    kernels.rms_norm(x, _maybe(weight), out, eps, native.isa())
    return out


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = _whole(x)
    y = torch.empty_like(x)
    z = None if next_weight is None else torch.empty_like(x)
    kernels.norm_add_norm(x, _whole(residual), _whole(weight), scale, _maybe(next_weight), y, z, eps, native.isa())
    return y, z, None if other_weight is None else rms_norm(y, other_weight, eps)


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
    # Rows are in the caches from one to the next: on a CPU one kernel for all would save nothing that shows.
    dense, _, _ = norm_add_norm(experts, rms_norm(dense, dense_weight, eps), experts_weight, eps=eps)
    return norm_add_norm(dense, residual, weight, scale, next_weight, eps)[:2]


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
    qkv, dim = _whole(qkv), q_weight.shape[0]
    q = qkv.new_empty(qkv.shape[0], num_q_heads, dim)
    cached = v_cache is not None
    if num_kv_heads == 0 or cached:
        k, v = k_cache, v_cache
    else:
        k, v = (qkv.new_empty(qkv.shape[0], num_kv_heads, dim) for _ in range(2))
    weights = _whole(q_weight), _maybe(k_weight)
    to = k, v, _maybe(slots) if cached else None
    kernels.qkv_norm_rope(qkv, *weights, _fp32(cos), _fp32(sin), num_q_heads, num_kv_heads, q, *to, eps, native.isa())
    return q, None if cached else k, None if cached else v


def accepts_qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    *_: object,
) -> str | None:
    if any(c is not None and not c.is_contiguous() for c in (k_cache, v_cache)):
        return "writes contiguous caches only"
    return _head_dim(q_weight.shape[0])


def _head_dim(dim: int) -> str | None:
    return f"takes even head dims up to {MAX_HEAD_DIM}, got {dim}" if dim > MAX_HEAD_DIM or dim % 2 else None


_ANGLES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # inv_freq -> its values, (tile cos, tile sin, within cos, within sin)


def _angles(inv_freq: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos, sin of every TILE-th position [tiles, R], and of the positions in a tile [TILE, R]: their products are all angles.

    4096 tiles for 262144 positions: 2 MB, where a table of all positions would take 128. Computed in fp64, kept in fp32.
    """
    values, kept = _ANGLES.get(inv_freq, (None, None))
    if values is None or kept[0].shape[0] * TILE < positions or not torch.equal(values, inv_freq):  # written in place since
        tiles = max(16, 1 << (-(-positions // TILE) - 1).bit_length())
        freq = inv_freq.double()
        start = torch.arange(0, tiles * TILE, TILE, dtype=torch.float64, device="cpu")[:, None] * freq
        within = torch.arange(TILE, dtype=torch.float64, device="cpu")[:, None] * freq
        kept = cast(Any, tuple(x.float() for angle in (start, within) for x in (angle.cos(), angle.sin())))
        _ANGLES[inv_freq] = inv_freq.clone(), kept
    return cast(Any, kept)


def _rebuild(v_only: bool, positions: int, inv_freq: Tensor | None, k_weight: Tensor | None) -> tuple[Any, ...]:
    """k_weight and angles, what the keys of a V-only cache are rebuilt from; Nones for a cache that has its keys."""
    if not v_only:
        return (None,) * 5
    return _whole(cast(Tensor, k_weight)), *_angles(cast(Tensor, inv_freq), positions)


def _lengths(op: str, lens: Tensor) -> tuple[Tensor, int]:
    """int32 of lengths in the cache, and the longest."""
    values = lens.tolist()
    longest = max(values, default=0)
    checks.require(op, longest < 2**31 and min(values, default=0) >= 0, f"lengths must lie in [0, 2**31), got {values}")
    return _whole(lens.int()), longest


def decode_limit(longest: int) -> int:
    """The length that a decode step of this one is made ready for, so that a recorded step serves until it is reached."""
    return max(1024, 1 << (longest - 1).bit_length())


_SHARED: ContextVar[dict[int, Tensor] | None] = ContextVar("gemma4_fast_scratch", default=None)


@contextmanager
def shared_scratch() -> Iterator[None]:
    """Inside: attention's scratch, over long contexts the largest there is, is the same memory at every call of one size. For a
    recording, which keeps what its calls were given: they run one after the other."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def _scratch(size: int) -> Tensor:
    """fp32 [size]."""
    shared = _SHARED.get()
    if shared is None:
        return torch.empty(size, dtype=torch.float32, device="cpu")
    if size not in shared:
        shared[size] = torch.empty(size, dtype=torch.float32, device="cpu")
    return shared[size]


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
    q = _whole(q)
    slots = v_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lens, longest = _lengths("gqa_decode", kv_lens)
    longest = decode_limit(longest)
    splits = max(1, -(-min(slots, longest) // SPLIT))
    out = torch.empty_like(q)
    partial = _scratch(q.shape[0] * q.shape[1] * splits * (q.shape[2] + 2))
    rebuild = _rebuild(k_cache is None, longest, inv_freq, k_weight)
    cache = _maybe(k_cache), _whole(v_cache), lens, _maybe(block_table), *rebuild
    kernels.gqa_decode(q, *cache, partial, out, window or 0, splits, scale, native.isa())
    return out


def accepts_gqa_decode(q: Tensor, k_cache: Tensor | None, v_cache: Tensor, *_: object) -> str | None:
    return _head_dim(q.shape[2])


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
    q = _whole(q)
    out = torch.empty_like(q)
    lens, longest = (None, 0) if prefix_lens is None else _lengths("gqa_prefill", prefix_lens)
    v_only = v_cache is not None and k_cache is None
    cache = _maybe(k_cache), _maybe(v_cache), lens, _maybe(block_table), _maybe(image_ids)
    rebuild = _rebuild(v_only, longest, inv_freq, k_weight)
    kernels.gqa_prefill(q, _whole(k), _whole(v), _whole(cu_seqlens), *cache, *rebuild, out, window or 0, scale, native.isa())
    return out


def accepts_gqa_prefill(q: Tensor, k: Tensor, *_: object) -> str | None:
    if q.shape[1] > MAX_ROWS * k.shape[1]:
        return f"takes up to {MAX_ROWS} query heads per KV head, got {q.shape[1] // k.shape[1]}"
    return _head_dim(q.shape[2])


def route_topk(
    x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    weights = x.new_empty(tokens, top_k, dtype=torch.float32)
    ids = x.new_empty(tokens, top_k, dtype=torch.int32)
    normed = x.new_empty(tokens, hidden, dtype=torch.float32)
    logits = x.new_empty(tokens, proj.shape[0], dtype=torch.float32)
    params = _whole(scale), _whole(proj), _whole(per_expert_scale)
    kernels.route_topk(_whole(x), *params, weights, ids, normed, logits, eps, native.isa())
    return weights, ids


def expert_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    pairs = ids.numel()
    order, offsets = ids.new_empty(pairs), ids.new_empty(num_experts + 1)
    tiles = ids.new_empty(-(-pairs // block_m) + min(num_experts, pairs), 2)
    kernels.expert_dispatch(_whole(ids), block_m, order, offsets, tiles)
    return order, offsets, tiles


EPILOGUES = {"none": 0, "geglu": 1, "combine": 2}


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> Tensor:
    rows, n = order.shape[0], weight.shape[1]
    shape = {"none": (rows, n), "geglu": (rows, n // 2), "combine": (rows // top_k, n)}[epilogue]
    out = x.new_empty(shape)
    total = None if topk_weights is None else x.new_empty(shape, dtype=torch.float32)
    args = _whole(x), _whole(weight), _whole(order), _whole(offsets), top_k, EPILOGUES[epilogue]
    kernels.grouped_gemm(*args, None if topk_weights is None else _fp32(topk_weights), total, out, native.isa())
    return out


def accepts_grouped(x: Tensor, weight: WeightLike, *_: object) -> str | None:
    return None if isinstance(weight, Tensor) else "takes no quantized weights; moe_decode does, for any number of tokens"


# ---- products with weights of floats, or of 8 or 4 bits ----
ROUNDED = 40  # kRoundedGroup in csrc/cpu/kernels.h


def _parts(weight: WeightLike) -> tuple[Tensor, Tensor | None]:
    """What a kernel is given: values, and the scales of a quantized weight."""
    return (_whole(weight), None) if isinstance(weight, Tensor) else (weight.data, weight.scale)


def _rounded(rows: int, weight: WeightLike) -> Tensor | None:
    """Scratch for rows of what is multiplied by `weight`, rounded to 8 bits; None for a weight of floats."""
    if isinstance(weight, Tensor):
        return None
    return torch.empty(rows * -(-weight.shape[-1] // GROUP) * ROUNDED, dtype=torch.uint8, device="cpu")


def accepts_geglu(x: Tensor, gate_up: WeightLike, down: WeightLike) -> str | None:
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return None
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor) or gate_up.bits != down.bits:
        return "takes gate_up and down of the same number of bits"
    return checks.accepts_geglu(x, gate_up, down)


def accepts_moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> str | None:
    return accepts_geglu(x, gate_up, down)


def moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    x, pairs = _whole(x), ids.numel()
    inter, rounded = down.shape[2], _rounded(x.shape[0], gate_up)
    h = x.new_empty(pairs, inter) if rounded is None else _rounded(pairs, down)
    total = x.new_empty(x.shape, dtype=torch.float32)
    order = ids.new_empty(pairs + gate_up.shape[0] + 1)
    out = torch.empty_like(x)
    (w1, s1), (w2, s2) = _parts(gate_up), _parts(down)
    weights = w1, w2, s1, s2, inter, rounded
    kernels.moe(x, _fp32(topk_weights), _whole(ids), *weights, h, total, order, out, native.isa())
    return out


def linear(x: Tensor, weight: WeightLike) -> Tensor:
    x = _whole(x)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if x.shape[-1] == 0:
        return out.zero_()
    kernels.linear(x, *_parts(weight), _rounded(x.numel() // x.shape[-1], weight), out, native.isa())
    return out


def geglu_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    x = _whole(x)
    out = torch.empty_like(x)
    if x.shape[-1] == 0:
        return out
    rows, inter = x.numel() // x.shape[-1], down.shape[1]
    rounded = _rounded(rows, gate_up)
    h = x.new_empty(rows, inter) if rounded is None else _rounded(rows, down)
    (w1, s1), (w2, s2) = _parts(gate_up), _parts(down)
    kernels.geglu_mlp(x, w1, w2, s1, s2, inter, rounded, h, out, native.isa())
    return out


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
    x = _whole(x)
    ple = ple if ple.stride(-1) == 1 else ple.contiguous()  # a layer's slice of all layers': rows apart, columns together
    g, h, y = x.new_empty(ple.shape), torch.empty_like(x), torch.empty_like(x)
    z = None if next_weight is None else torch.empty_like(x)
    params = _whole(gate), _whole(proj), _whole(weight), scale, _maybe(next_weight)
    kernels.ple_gate(x, ple, *params, g, h, y, z, eps, native.isa())
    return y, z


def logits(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> Tensor:
    x, vocab = _whole(x), weight.shape[0]
    args = x, *_parts(weight), _rounded(x.shape[0], weight), vocab
    tasks = -(-vocab // 256)
    if not argmax:
        out = x.new_empty(x.shape[0], vocab)
        kernels.logits(*args, out, None, None, None, tasks, softcap or 0.0, native.isa())
        return out
    best_of = x.new_empty(x.shape[0], tasks, dtype=torch.float32)
    best_id, best = (x.new_empty(shape, dtype=torch.int64) for shape in ((x.shape[0], tasks), (x.shape[0],)))
    kernels.logits(*args, None, best, best_of, best_id, tasks, 0.0, native.isa())
    return best
