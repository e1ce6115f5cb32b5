"""The ops, as plain functions over the table. Shapes, formulas and sources: `gemma4_fast.reference.ops`, same names.

Each call checks its arguments, then runs on the backend that the selection in force gives (see `use_backend`), by default
the fastest that serves the device, dtype and shapes. Errors: ValueError for wrong arguments, UnsupportedError for a valid
call that the chosen backends cannot serve.
"""

from __future__ import annotations

from torch import Tensor

from gemma4_fast.ops.attention import GQA_DECODE, GQA_PREFILL
from gemma4_fast.ops.cpu_backend import decode_limit, shared_scratch
from gemma4_fast.ops.cpu_backend import kernels as cpu_kernels
from gemma4_fast.ops.cuda_backend import shared_step
from gemma4_fast.ops.embedding import EMBEDDING, ROPE_ANGLES
from gemma4_fast.ops.linear import GEGLU_MLP, LINEAR, LOGITS, SAMPLE
from gemma4_fast.ops.moe import EXPERT_DISPATCH, GROUPED_GEMM, MOE, MOE_DECODE, MOE_FEED_FORWARD, ROUTE_TOPK
from gemma4_fast.ops.norms import MOE_NORM_ADD_NORM, NORM_ADD_NORM, PLE_GATE, QKV_NORM_ROPE, RMS_NORM
from gemma4_fast.ops.table import (
    AUTO_ORDER,
    BACKENDS,
    TABLE,
    Cost,
    Impl,
    Maker,
    Op,
    bound,
    decide,
    default_backend,
    in_one,
    parse_backend,
    recordable,
    register,
    require,
    selection,
    use_backend,
)
from gemma4_fast.quant import WeightLike

__all__ = [
    "AUTO_ORDER", "BACKENDS", "TABLE", "Cost", "Impl", "Maker", "Op", "bound", "cpu_kernels",
    "decide", "decode_limit", "default_backend", "embedding", "expert_dispatch", "geglu_mlp",
    "gqa_decode", "gqa_prefill", "grouped_gemm", "in_one",
    "linear", "logits", "moe", "moe_decode", "moe_feed_forward", "moe_norm_add_norm", "norm_add_norm", "parse_backend",
    "ple_gate", "qkv_norm_rope", "recordable", "register", "require", "rms_norm", "rope_angles", "route_topk", "sample",
    "selection", "shared_scratch", "shared_step", "use_backend",
]  # fmt: skip


def embedding(weight: WeightLike, ids: Tensor, scale: float = 1.0) -> Tensor:
    """Rows ids [T] of weight [V, H], times scale -> [T, H]."""
    return EMBEDDING(weight, ids, scale)


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """positions [T], inv_freq [R] -> cos, sin [T, R]."""
    return ROPE_ANGLES(positions, inv_freq)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x [..., H] / rms(x) * weight [H]."""
    return RMS_NORM(x, weight, eps)


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = (residual + rms_norm(x, weight)) * scale [T, H]; rms_norm(y, next_weight), rms_norm(y, other_weight), or None."""
    return NORM_ADD_NORM(x, residual, weight, scale, next_weight, eps, other_weight)


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
    """norm_add_norm of x = rms_norm(dense, dense_weight) + rms_norm(experts, experts_weight), all [T, H]."""
    weights = dense_weight, experts_weight, weight
    return MOE_NORM_ADD_NORM(dense, experts, residual, *weights, scale, next_weight, eps)


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
    """Packed projection [T, (Hq + n Hkv) D] -> q [T, Hq, D], k, v [T, Hkv, D], or k and v into the cache at `slots`."""
    return QKV_NORM_ROPE(qkv, q_weight, k_weight, cos, sin, num_q_heads, num_kv_heads, k_cache, v_cache, slots, eps)


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
    """One new token per sequence, q [B, Hq, D], over its cache [B, S, Hkv, D] -> [B, Hq, D]."""
    return GQA_DECODE(q, k_cache, v_cache, kv_lens, window, block_table, inv_freq, k_weight, scale)


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
    """New tokens q [T, Hq, D], k, v [T, Hkv, D], sequences end to end, over themselves and the cache -> [T, Hq, D]."""
    return GQA_PREFILL(
        q, k, v, cu_seqlens, window, k_cache, v_cache, prefix_lens, block_table, inv_freq, k_weight, image_ids, scale
    )


def route_topk(
    x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual x [T, H] -> routing weights [T, K] fp32 and expert ids [T, K] int32."""
    return ROUTE_TOPK(x, scale, proj, per_expert_scale, top_k, eps)


def expert_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K] -> order [T*K], offsets [E + 1], tiles [n, 2], all int32."""
    return EXPERT_DISPATCH(ids, num_experts, block_m)


def grouped_gemm(
    x: Tensor,
    weight: WeightLike,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> Tensor:
    """Each expert's rows times weight[e], with epilogue "none", "geglu" or "combine"."""
    return GROUPED_GEMM(x, weight, order, offsets, top_k, epilogue, topk_weights)


def moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    """Routed experts for few tokens, x [T, H] -> [T, H]."""
    return MOE_DECODE(x, topk_weights, ids, gate_up, down)


def moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    """Routed experts, x [T, H] -> [T, H]: moe_decode or expert_dispatch + grouped_gemm, by the number of tokens."""
    return MOE(x, topk_weights, ids, gate_up, down)


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
    """Both branches of a layer with experts, x and its pre-norms h and e [T, H] -> geglu_mlp(h), moe(e) [T, H]."""
    router = router_scale, router_proj, per_expert_scale
    return MOE_FEED_FORWARD(x, h, e, gate_up, down, *router, experts_gate_up, experts_down, top_k, eps)


def linear(x: Tensor, weight: WeightLike) -> Tensor:
    """x [..., K] @ weight [N, K]^T."""
    return LINEAR(x, weight)


def geglu_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    """gelu_tanh(x @ gate^T) * (x @ up^T) @ down^T."""
    return GEGLU_MLP(x, gate_up, down)


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
    """Per-layer-embedding gate with its post-norm, residual, layer scalar and the next pre-norm."""
    return PLE_GATE(x, ple, gate, proj, weight, scale, next_weight, eps)


def logits(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> Tensor:
    """x [T, H] -> softcapped logits [T, V], or the argmax ids [T] (-1 for a row that is not finite)."""
    return LOGITS(x, weight, softcap, argmax)


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
    """The next token of each row of x [T, H], drawn by `uniform` [T] in [0, 1) -> ids [T] (-1 for a row that is not finite)."""
    return SAMPLE(x, weight, uniform, softcap, temperature, top_k, top_p, min_p)
