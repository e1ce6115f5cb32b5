"""The `cuda` backend: the kernels of csrc/cuda behind the table's signatures, for bf16 and fp16, and quantized weights.

Everything is allocated here, outputs and scratch, so that the kernels own no memory. What the launchers may not do: look at a
tensor's values, since that waits for the GPU and no CUDA graph could hold it. Shapes, formulas and sources:
`gemma4_fast.reference.ops`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops import checks, triton_backend
from gemma4_fast.quant import QuantizedWeight, WeightLike

DTYPES = (torch.bfloat16, torch.float16)
MAX_HIDDEN = 6144  # 8 kMost in csrc/cuda/norms.cu
MAX_ROUTED = 64, 1024, 32  # tokens, experts and top_k of csrc/cuda/route_topk.cuh
ROUTED_TOKENS, ROUTED_COLUMNS = 16, 512  # of a block there


def run(name: str, like: Tensor, *args: Any) -> None:
    """The op of csrc/cuda/torch_ops.cpp, on the stream that `like`'s device is at."""
    copied, _COPIES.made = _COPIES.made, False
    _op(name)(*args, _stream(like.device), has_early_launch(like.device) and not copied)


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


@functools.cache
def _op(name: str) -> Any:
    return getattr(torch.ops.gemma4_fast_cuda, name).default


@functools.cache
def has_early_launch(device: torch.device) -> bool:
    """Programmatic dependent launch. Not sm_120, where others' graphs of such launches fail (sglang#18596)."""
    return device.type == "cuda" and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


class _Copies(threading.local):
    """Whether this call has made one. If of a weight, the launch right before wrote what an early one reads at once."""

    made = False


_COPIES = _Copies()


def whole(x: Tensor) -> Tensor:
    """Contiguous, by a copy where it is not."""
    if x.is_contiguous():
        return x
    _COPIES.made = True
    return x.contiguous()


def at_16(x: Tensor) -> Tensor:
    """Contiguous, and at an address that is a multiple of 16 bytes."""
    x = whole(x)
    if x.data_ptr() % 16 == 0:
        return x
    _COPIES.made = True
    return x.clone()


def maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else whole(x)


# Of blocks that have ended, by device and stream: zeros, and zeros again after each launch (`last_to_arrive`). Launches of one
# stream run one after the other, so that they may share them. A graph has its own, zeroed in it: it may be replayed on any
# stream, and what is zeroed in one graph is not yet zero for the next.
_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
_GRAPHS: ContextVar[dict[tuple[torch.device, int], Tensor] | None] = ContextVar("gemma4_fast_cuda_graph", default=None)


def counters(like: Tensor, count: int) -> Tensor:
    """At least so many."""
    key, kept = (like.device, _stream(like.device)), _GRAPHS.get()
    if kept is None:
        theirs = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # a graph that is not ours
        kept = {} if theirs else _COUNTERS
    if key not in kept or kept[key].numel() < count:
        kept[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=like.device)
    return kept[key]


@contextmanager
def shared_step() -> Iterator[None]:
    """Inside, while a decode step is captured: what its layers have in common is made by the first that needs it."""
    token = _GRAPHS.set({})
    try:
        with triton_backend.shared_step():
            yield
    finally:
        _GRAPHS.reset(token)


# ---- norms ----


def accepts_rows(x: Tensor, *_: object) -> str | None:
    return None if x.shape[-1] <= MAX_HIDDEN else f"takes rows of up to {MAX_HIDDEN}, got {x.shape[-1]}"


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = whole(x)
    out = torch.empty_like(x)
    if x.numel():
        run("rms_norm", x, x, maybe(weight), out, eps)
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
    return _norm_add_norm(x, None, residual, (None, None, weight), scale, next_weight, eps, other_weight)


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
    weights = dense_weight, experts_weight, weight
    return _norm_add_norm(dense, experts, residual, weights, scale, next_weight, eps, None)[:2]


def _norm_add_norm(
    x: Tensor,
    experts: Tensor | None,
    residual: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Tensor],
    scale: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    other_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """weights: x's and the experts' own where there are experts, and the sum's."""
    x = whole(x)
    y = torch.empty_like(x)
    z, other = (None if w is None else torch.empty_like(x) for w in (next_weight, other_weight))
    if x.numel():
        norms = *map(maybe, weights), scale, maybe(next_weight), maybe(other_weight)
        run("norm_add_norm", x, x, maybe(experts), whole(residual), *norms, y, z, other, eps)
    return y, z, other


# ---- products of few rows ----

MAX_ROWS = 16  # the tokens of two products of csrc/cuda/weights.cuh
_ENDS = ("none", "softcap", "geglu", "gate", "argmax")  # Linear::End
_ROWS_OF_A_BLOCK = {0: 128, 8: 256, 4: 256}  # by a weight's bits: of one whose warps have a tile each


def parts(weight: WeightLike) -> tuple[Tensor, Tensor | None, int]:
    """What a kernel is given of a weight: its values, scales, and bits (0: not quantized)."""
    if isinstance(weight, QuantizedWeight):
        return at_16(weight.data), at_16(weight.scale), _bits(weight)
    return whole(weight), None, _bits(weight)


def _bits(weight: WeightLike) -> int:
    return weight.bits if isinstance(weight, QuantizedWeight) else 0


def few_rows(x: Tensor) -> str | None:
    rows = x.shape[:-1].numel()
    return None if rows <= MAX_ROWS else f"takes up to {MAX_ROWS} rows, got {rows}"


def accepts_linear(x: Tensor, weight: WeightLike, *_: object) -> str | None:
    return few_rows(x) or checks.accepts_weights(x, weight)


def accepts_geglu_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> str | None:
    return few_rows(x) or checks.accepts_geglu(x, gate_up, down)


def accepts_ple_gate(x: Tensor, *_: object) -> str | None:
    return few_rows(x) or accepts_rows(x)


def _product(x: Tensor, weight: WeightLike, end: str = "none", *, cap: float = 0.0, other: Tensor | None = None) -> Tensor:
    """x [M, K], columns together -> [M, N] with one of the ends of linear.cuh; "argmax": ids [M] int64."""
    (m, k), n = x.shape, weight.shape[0] // 2 if end == "geglu" else weight.shape[0]
    values, scales, bits = parts(weight)
    out = x.new_empty(m, dtype=torch.int64) if end == "argmax" else x.new_empty(m, n)
    if m == 0 or n == 0 or k == 0:
        return out.zero_()
    best: tuple[Tensor | None, ...] = None, None, None
    if end == "argmax":
        blocks = -(-n // _ROWS_OF_A_BLOCK[bits])
        best = x.new_empty(blocks, m, dtype=torch.float32), x.new_empty(blocks, m, dtype=torch.int32), counters(x, 1)
    run("linear", x, x, values, scales, n, _ENDS.index(end), cap, other, *best, out)
    return out


def _rows_of(x: Tensor) -> Tensor:
    """[.., K] -> [M, K]."""
    return whole(x).view(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def linear(x: Tensor, weight: WeightLike) -> Tensor:
    return _product(_rows_of(x), weight).view(*x.shape[:-1], weight.shape[0])


def geglu_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    return _product(_product(_rows_of(x), gate_up, "geglu"), down).view(x.shape)


def logits(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> Tensor:
    if argmax:
        return _product(whole(x), weight, "argmax")
    return _product(whole(x), weight, "none" if softcap is None else "softcap", cap=softcap or 0.0)


MAX_BLOCKS, MAX_TOP_K = 4096, 64  # kMostBlocks and kMostKept in csrc/cuda/sample.cu


def accepts_sample(
    x: Tensor,
    weight: WeightLike,
    uniform: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> str | None:
    vocab = weight.shape[0]
    if x.shape[1] == 0:
        return "takes rows of some columns"
    if not 0 < top_k < vocab and (top_p < 1 or min_p > 0):
        return "takes top_p and min_p with a top_k"
    if top_k < vocab and top_k > MAX_TOP_K:
        return f"takes a top_k of up to {MAX_TOP_K}, got {top_k}"
    if (most := MAX_BLOCKS * _ROWS_OF_A_BLOCK[_bits(weight)]) < vocab:
        return f"takes up to {most} logits, got {vocab}"
    return accepts_linear(x, weight)


def sample(
    x: Tensor,
    weight: WeightLike,
    uniform: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    x, m, n = whole(x), x.shape[0], weight.shape[0]
    out = x.new_empty(m, dtype=torch.int64)
    if m == 0:
        return out
    values, scales, bits = parts(weight)
    rows = _ROWS_OF_A_BLOCK[bits]
    blocks = -(-n // rows)
    logits, most, sums = (x.new_empty(m, size, dtype=torch.float32) for size in (blocks * rows, blocks, blocks))
    draws = whole(uniform.float()), softcap or 0.0, checks.in_fp32(temperature), top_k if top_k < n else 0, top_p, min_p
    run("sample", x, x, values, scales, n, *draws, logits, most, sums, out)
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
    x, ple = whole(x), ple if ple.stride(-1) == 1 else ple.contiguous()
    h = _product(_product(x, gate, "gate", other=ple), proj)
    return norm_add_norm(h, x, weight, scale, next_weight, eps)[:2]


# ---- what a pass begins with ----


def embedding(weight: WeightLike, ids: Tensor, scale: float = 1.0) -> Tensor:
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    if out.numel():
        values, scales, bits = parts(weight)
        run("embedding", out, values, scales, whole(ids), out, bits, weight.shape[0], float(scale))
    return out


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (inv_freq.new_empty(positions.shape[0], inv_freq.shape[0]) for _ in range(2))
    if cos.numel():
        run("rope_angles", cos, whole(positions), whole(inv_freq), cos, sin)
    return cos, sin


# ---- experts ----

FEW_EXPERTS = 128  # of a router whose blocks stand beside others: csrc/cuda/moe_feed_forward.cu
MAX_ASSIGNMENTS = 256  # (token, expert) assignments: kMostPairs in csrc/cuda/moe_decode.cuh


def accepts_moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> str | None:
    if _bits(gate_up) != _bits(down):
        return "takes gate_up and down of the same number of bits"
    if ids.numel() > MAX_ASSIGNMENTS:
        return f"takes up to {MAX_ASSIGNMENTS} assignments, got {ids.numel()}"
    return few_rows(x) or checks.accepts_geglu(x, gate_up, down)


def moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    x, inter = whole(x), down.shape[2]
    if ids.numel() == 0 or x.numel() == 0 or inter == 0:
        return torch.zeros_like(x)
    h, out = x.new_empty(ids.numel(), inter), torch.empty_like(x)
    weights = *parts(gate_up)[:2], *parts(down)[:2]
    run("moe_decode", x, x, whole(topk_weights.float()), whole(ids), *weights, inter, h, out)
    return out


def route_topk(
    x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    sums, arrived, weights, ids = _routing(x, proj.shape[0], top_k)
    if x.shape[0]:
        params = whole(scale), whole(proj), whole(per_expert_scale)
        run("route_topk", x, whole(x), *params, sums, arrived, weights, ids, eps)
    return weights, ids


def _routing(x: Tensor, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A router's scratch and counters, its weights and ids."""
    tokens, hidden = x.shape
    sums = x.new_empty(-(-hidden // ROUTED_COLUMNS), tokens, experts + 1, dtype=torch.float32)
    weights, ids = (x.new_empty(tokens, top_k, dtype=dtype) for dtype in (torch.float32, torch.int32))
    return sums, counters(x, -(-tokens // ROUTED_TOKENS)), weights, ids


def accepts_route(x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, *_: object) -> str | None:
    got = x.shape[0], proj.shape[0], top_k
    if all(n <= most for n, most in zip(got, MAX_ROUTED, strict=True)):
        return None
    limits, sizes = (", ".join(map(str, n)) for n in (MAX_ROUTED, got))
    return f"takes up to {limits} tokens, experts and experts of a token, got {sizes}"


# ---- both branches of a layer with experts ----


def accepts_moe_feed_forward(
    x: Tensor,
    h: Tensor,
    e: Tensor,
    gate_up: WeightLike,
    down: WeightLike,
    router_scale: Tensor,
    router_proj: Tensor,
    per_expert_scale: Tensor,
    experts_gate_up: WeightLike,
    experts_down: WeightLike,
    top_k: int,
    *_: object,
) -> str | None:
    if len(set(map(_bits, (gate_up, down, experts_gate_up, experts_down)))) > 1:
        return "takes all weights of the same bits"
    if 0 in (x.shape[1], down.shape[1], experts_down.shape[2]):
        return "takes no branch of width 0"
    if router_proj.shape[0] > FEW_EXPERTS:
        return f"takes up to {FEW_EXPERTS} experts, got {router_proj.shape[0]}"
    if x.shape[0] * top_k > MAX_ASSIGNMENTS:
        return f"takes up to {MAX_ASSIGNMENTS} assignments, got {x.shape[0] * top_k}"
    return (
        accepts_geglu_mlp(h, gate_up, down)
        or checks.accepts_geglu(e, experts_gate_up, experts_down)
        or accepts_route(x, router_scale, router_proj, per_expert_scale, top_k)
    )


def moe_feed_forward(
    x: Tensor,
    h: Tensor,
    e: Tensor,
    gate_up: WeightLike,
    down: WeightLike,
    router_scale: Tensor,
    router_proj: Tensor,
    per_expert_scale: Tensor,
    experts_gate_up: WeightLike,
    experts_down: WeightLike,
    top_k: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    x, h, e = whole(x), whole(h), whole(e)
    tokens = x.shape[0]
    dense_out, experts_out = torch.empty_like(x), torch.empty_like(x)
    if tokens == 0:
        return dense_out, experts_out
    dense_h, experts_h = x.new_empty(tokens, down.shape[1]), x.new_empty(tokens * top_k, experts_down.shape[2])
    dense = *parts(gate_up)[:2], *parts(down)[:2]
    routed = *parts(experts_gate_up)[:2], *parts(experts_down)[:2], experts_down.shape[2]
    router = whole(router_scale), whole(router_proj), whole(per_expert_scale)
    made = *_routing(x, router_proj.shape[0], top_k), dense_h, dense_out, experts_h, experts_out
    run("moe_feed_forward", x, x, h, e, *dense, *router, *routed, *made, eps)
    return dense_out, experts_out
