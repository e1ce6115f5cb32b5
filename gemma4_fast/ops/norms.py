"""Specs of the norm ops: rms_norm, norm_add_norm, moe_norm_add_norm, qkv_norm_rope, ple_gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops import checks, cpu_backend, cuda_attention, cuda_backend, triton_backend
from gemma4_fast.ops.table import Cost, Impl, Maker, Op, register
from gemma4_fast.reference import ops as reference


def _check_rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> None:
    checks.floating("rms_norm", "x", x)
    checks.positive("rms_norm", "eps", eps)
    checks.shaped("rms_norm", "weight", weight, x.shape[-1:], x, optional=True)


def _rms_norm_case(m: Maker, *shape: int, weight: bool = True) -> dict[str, Any]:
    return dict(x=m.randn(*shape), weight=m.gain(shape[-1]) if weight else None, eps=1e-6)


def _rms_norm_cost(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Cost:
    return Cost(4 * x.numel(), 2 * x.nbytes + (0 if weight is None else weight.nbytes))


RMS_NORM = register(
    Op(
        name="rms_norm",
        summary="x / rms(x) * weight",
        reference=reference.rms_norm,
        check=_check_rms_norm,
        cases={
            "26b": lambda m: _rms_norm_case(m, 7, 2816),
            "31b_one_token": lambda m: _rms_norm_case(m, 1, 5376),
            "heads_no_weight": lambda m: _rms_norm_case(m, 5, 3, 512, weight=False),
            "odd": lambda m: _rms_norm_case(m, 3, 97),
            "empty": lambda m: _rms_norm_case(m, 0, 64),
        },
        cost=_rms_norm_cost,
        bench_cases={
            "26b_1_token": lambda m: _rms_norm_case(m, 1, 2816),
            "26b_512_tokens": lambda m: _rms_norm_case(m, 512, 2816),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:rms_norm", cuda_backend.DTYPES, accepts=cuda_backend.accepts_rows),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:rms_norm", cpu_backend.DTYPES),
            "triton": Impl("gemma4_fast.triton.rms_norm:rms_norm", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:rms_norm"),
        },
    )
)


def _check_norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> None:
    op = "norm_add_norm"
    checks.floating(op, "x", x, 2)
    checks.positive(op, "eps", eps)
    checks.shaped(op, "residual", residual, x.shape, x)
    checks.shaped(op, "weight", weight, x.shape[-1:], x)
    checks.shaped(op, "scale", scale, (1,), x, optional=True)
    checks.shaped(op, "next_weight", next_weight, x.shape[-1:], x, optional=True)
    checks.shaped(op, "other_weight", other_weight, x.shape[-1:], x, optional=True)


def _norm_add_norm_case(
    m: Maker, tokens: int, hidden: int, scale: bool = True, nxt: bool = True, other: bool = False
) -> dict[str, Any]:
    return dict(
        x=m.randn(tokens, hidden),
        residual=m.randn(tokens, hidden, scale=3.0),
        weight=m.gain(hidden),
        scale=m.gain(1) if scale else None,
        next_weight=m.gain(hidden) if nxt else None,
        eps=1e-6,
        other_weight=m.gain(hidden) if other else None,
    )


def _norm_add_norm_cost(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> Cost:
    norms = sum(w is not None for w in (next_weight, other_weight))
    return Cost((6 + 4 * norms) * x.numel(), (3 + norms) * x.nbytes + (1 + norms) * weight.nbytes)


NORM_ADD_NORM = register(
    Op(
        name="norm_add_norm",
        summary="post-norm + residual, layer scalar, next pre-norm",
        reference=reference.norm_add_norm,
        check=_check_norm_add_norm,
        cases={
            "26b": lambda m: _norm_add_norm_case(m, 5, 2816),
            "e2b_one_token": lambda m: _norm_add_norm_case(m, 1, 1536, scale=False),
            "last_layer": lambda m: _norm_add_norm_case(m, 4, 256, nxt=False),
            "before_experts": lambda m: _norm_add_norm_case(m, 2, 2816, scale=False, other=True),
            "odd": lambda m: _norm_add_norm_case(m, 3, 97, scale=False, nxt=False),
            "odd_other": lambda m: _norm_add_norm_case(m, 3, 97, nxt=False, other=True),
        },
        cost=_norm_add_norm_cost,
        bench_cases={
            "26b_1_token": lambda m: _norm_add_norm_case(m, 1, 2816, other=True),
            "26b_512_tokens": lambda m: _norm_add_norm_case(m, 512, 2816, other=True),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:norm_add_norm", cuda_backend.DTYPES, accepts=cuda_backend.accepts_rows),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:norm_add_norm", cpu_backend.DTYPES),
            "triton": Impl("gemma4_fast.triton.norm_add_norm:norm_add_norm", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:norm_add_norm"),
        },
    )
)


def _check_moe_norm_add_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    experts_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    op = "moe_norm_add_norm"
    checks.floating(op, "dense", dense, 2)
    checks.positive(op, "eps", eps)
    checks.shaped(op, "experts", experts, dense.shape, dense)
    checks.shaped(op, "residual", residual, dense.shape, dense)
    for name, w in (("dense_weight", dense_weight), ("experts_weight", experts_weight), ("weight", weight)):
        checks.shaped(op, name, w, dense.shape[-1:], dense)
    checks.shaped(op, "scale", scale, (1,), dense, optional=True)
    checks.shaped(op, "next_weight", next_weight, dense.shape[-1:], dense, optional=True)


def _moe_norm_add_norm_case(m: Maker, tokens: int, hidden: int, end: bool = True) -> dict[str, Any]:
    return dict(
        dense=m.randn(tokens, hidden),
        experts=m.randn(tokens, hidden, scale=0.5),
        residual=m.randn(tokens, hidden, scale=3.0),
        dense_weight=m.gain(hidden),
        experts_weight=m.gain(hidden),
        weight=m.gain(hidden),
        scale=m.gain(1) if end else None,
        next_weight=m.gain(hidden) if end else None,
        eps=1e-6,
    )


def _moe_norm_add_norm_cost(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    experts_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Cost:
    norms = int(next_weight is not None)
    return Cost((15 + 4 * norms) * dense.numel(), (4 + norms) * dense.nbytes + (3 + norms) * weight.nbytes)


MOE_NORM_ADD_NORM = register(
    Op(
        name="moe_norm_add_norm",
        summary="post-norms of the dense and the expert branch, their sum, then norm_add_norm",
        reference=reference.moe_norm_add_norm,
        check=_check_moe_norm_add_norm,
        cases={
            "26b_one_token": lambda m: _moe_norm_add_norm_case(m, 1, 2816),
            "before_ple": lambda m: _moe_norm_add_norm_case(m, 4, 256, end=False),
            "odd": lambda m: _moe_norm_add_norm_case(m, 3, 97),
        },
        cost=_moe_norm_add_norm_cost,
        bench_cases={
            "26b_1_token": lambda m: _moe_norm_add_norm_case(m, 1, 2816),
            "26b_512_tokens": lambda m: _moe_norm_add_norm_case(m, 512, 2816),
        },
        impls={
            "cuda": Impl(
                "gemma4_fast.ops.cuda_backend:moe_norm_add_norm", cuda_backend.DTYPES, accepts=cuda_backend.accepts_rows
            ),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:moe_norm_add_norm", cpu_backend.DTYPES),
            "triton": Impl("gemma4_fast.triton.norm_add_norm:moe_norm_add_norm", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:moe_norm_add_norm"),
        },
    )
)


def _check_qkv_norm_rope(
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
) -> None:
    op = "qkv_norm_rope"
    checks.floating(op, "qkv", qkv, 2)
    checks.floating(op, "q_weight", q_weight, 1)
    checks.floating(op, "cos", cos, 2)
    checks.integer(op, "num_q_heads", num_q_heads, 1)
    checks.integer(op, "num_kv_heads", num_kv_heads, 0)
    checks.positive(op, "eps", eps)
    tokens, dim = qkv.shape[0], q_weight.shape[0]
    checks.shaped(op, "q_weight", q_weight, (dim,), qkv)
    checks.require(op, dim > 0, "q_weight is empty: a head must have columns")
    parts = (1, 2) if num_kv_heads else (0,)
    widths = [(num_q_heads + n * num_kv_heads) * dim for n in parts]
    checks.require(op, qkv.shape[1] in widths, f"qkv has {qkv.shape[1]} columns, expected {' or '.join(map(str, widths))}")
    checks.require(op, num_kv_heads == 0 or k_weight is not None, "k_weight is needed where there are KV heads")
    checks.shaped(op, "k_weight", k_weight, (dim,), qkv, optional=True)
    checks.shaped(op, "cos", cos, (tokens, -1), qkv, (torch.float32, torch.float64))
    checks.shaped(op, "sin", sin, cos.shape, qkv, (cos.dtype,))
    checks.require(op, cos.shape[1] <= dim // 2, f"cos has {cos.shape[1]} rotary pairs, head_dim {dim} has {dim // 2}")
    checks.require(op, k_cache is None or v_cache is not None, "k_cache was given without v_cache")
    checks.require(op, (v_cache is None) == (slots is None), "v_cache and slots go together")
    if v_cache is not None:
        checks.require(op, num_kv_heads > 0, "a cache was given, but there are no KV heads to write")
        checks.shaped(op, "v_cache", v_cache, (-1, -1, num_kv_heads, dim), qkv)
        checks.shaped(op, "k_cache", k_cache, v_cache.shape, qkv, optional=True)
        checks.shaped(op, "slots", slots, (tokens,), qkv, (torch.int64,))
        checks.require(op, v_cache.is_contiguous(), "v_cache must be contiguous")
        checks.require(op, k_cache is None or k_cache.is_contiguous(), "k_cache must be contiguous")


def qkv_case(
    m: Maker,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    pairs: int,
    parts: int,
    cache: str = "",
) -> dict[str, Any]:
    """parts: 2 for q, k, v; 1 for K = V; 0 for q alone. cache: "" none, "kv" both, "v" V only."""
    positions = torch.arange(tokens, device=m.device) * 37 % 1000
    freq = 1e4 ** (-2 * torch.arange(pairs, device=m.device, dtype=torch.float32) / dim)
    cos, sin = reference.rope_angles(positions, freq)
    slots = [(5 * t + 1) % 13 for t in range(tokens)]  # distinct for up to 13 tokens
    shape = (1, max(13, tokens), kv_heads, dim)
    return dict(
        qkv=m.randn(tokens, (q_heads + parts * kv_heads) * dim),
        q_weight=m.gain(dim),
        k_weight=m.gain(dim) if kv_heads else None,
        cos=cos,
        sin=sin,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        k_cache=m.randn(*shape) if cache == "kv" else None,
        v_cache=m.randn(*shape) if cache else None,
        slots=m.ints(slots, torch.int64) if cache else None,
        eps=1e-6,
    )


def _qkv_cost(
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
) -> Cost:
    outs = num_q_heads + num_kv_heads * (1 if v_cache is not None and k_cache is None else 2)
    out_bytes = qkv.shape[0] * outs * q_weight.shape[0] * qkv.element_size()
    return Cost(8 * qkv.numel(), qkv.nbytes + out_bytes + cos.nbytes + sin.nbytes)


QKV_NORM_ROPE = register(
    Op(
        name="qkv_norm_rope",
        summary="q/k/v norms, RoPE, cache write from the packed projection",
        reference=reference.qkv_norm_rope,
        check=_check_qkv_norm_rope,
        cases={
            "sliding_prefill": lambda m: qkv_case(m, 6, 16, 8, 256, 128, 2),
            "sliding_one_token_cache": lambda m: qkv_case(m, 1, 16, 8, 256, 128, 2, "kv"),
            "full_k_eq_v_prefill": lambda m: qkv_case(m, 5, 16, 2, 512, 64, 1),
            "full_v_only_cache": lambda m: qkv_case(m, 4, 16, 2, 512, 64, 1, "v"),
            "full_kv_cache": lambda m: qkv_case(m, 3, 8, 2, 512, 64, 2, "kv"),
            "shared_q_only": lambda m: qkv_case(m, 3, 8, 0, 512, 64, 0),
            "odd": lambda m: qkv_case(m, 7, 3, 1, 96, 48, 2, "kv"),
        },
        cost=_qkv_cost,
        mutates=("k_cache", "v_cache"),
        bench_cases={
            "26b_sliding_1_token": lambda m: qkv_case(m, 1, 16, 8, 256, 128, 2, "kv"),
            "26b_full_1_token": lambda m: qkv_case(m, 1, 16, 2, 512, 64, 1, "v"),
            "26b_sliding_512_tokens": lambda m: qkv_case(m, 512, 16, 8, 256, 128, 2),
        },
        impls={
            "cuda": Impl(
                "gemma4_fast.ops.cuda_attention:qkv_norm_rope",
                cuda_backend.DTYPES,
                accepts=cuda_attention.accepts_qkv_norm_rope,
            ),
            "cpu": Impl(
                "gemma4_fast.ops.cpu_backend:qkv_norm_rope", cpu_backend.DTYPES, accepts=cpu_backend.accepts_qkv_norm_rope
            ),
            "triton": Impl("gemma4_fast.triton.qkv_norm_rope:qkv_norm_rope", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:qkv_norm_rope"),
        },
    )
)


def _check_ple_gate(
    x: Tensor,
    ple: Tensor,
    gate: Tensor,
    proj: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    op = "ple_gate"
    checks.floating(op, "x", x, 2)
    checks.positive(op, "eps", eps)
    hidden = x.shape[1]
    checks.floating(op, "ple", ple, 2)
    checks.shaped(op, "ple", ple, (x.shape[0], -1), x)
    checks.shaped(op, "gate", gate, (ple.shape[1], hidden), x)
    checks.shaped(op, "proj", proj, (hidden, ple.shape[1]), x)
    checks.shaped(op, "weight", weight, (hidden,), x)
    checks.shaped(op, "scale", scale, (1,), x, optional=True)
    checks.shaped(op, "next_weight", next_weight, (hidden,), x, optional=True)


def _ple_case(m: Maker, tokens: int, hidden: int, ple: int, nxt: bool = True) -> dict[str, Any]:
    return dict(
        x=m.randn(tokens, hidden),
        ple=m.randn(tokens, ple),
        gate=m.randn(ple, hidden, scale=1 / math.sqrt(hidden)),
        proj=m.randn(hidden, ple, scale=1 / math.sqrt(ple)),
        weight=m.gain(hidden),
        scale=m.gain(1) if nxt else None,
        next_weight=m.gain(hidden) if nxt else None,
        eps=1e-6,
    )


def _ple_cost(
    x: Tensor,
    ple: Tensor,
    gate: Tensor,
    proj: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Cost:
    outs = 2 if next_weight is None else 3
    return Cost(4 * x.shape[0] * gate.numel(), gate.nbytes + proj.nbytes + ple.nbytes + outs * x.nbytes)


PLE_GATE = register(
    Op(
        name="ple_gate",
        summary="per-layer-embedding gate, norm, residual, layer scalar, next pre-norm",
        reference=reference.ple_gate,
        check=_check_ple_gate,
        cases={
            "e2b_one_token": lambda m: _ple_case(m, 1, 1536, 256),
            "e4b": lambda m: _ple_case(m, 6, 2560, 256),
            "odd": lambda m: _ple_case(m, 3, 97, 33, nxt=False),
        },
        cost=_ple_cost,
        bench_cases={
            "e4b_1_token": lambda m: _ple_case(m, 1, 2560, 256),
            "e4b_512_tokens": lambda m: _ple_case(m, 512, 2560, 256),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:ple_gate", cuda_backend.DTYPES, accepts=cuda_backend.accepts_ple_gate),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:ple_gate", cpu_backend.DTYPES),
            "triton": Impl("gemma4_fast.triton.ple_gate:ple_gate", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:ple_gate"),
        },
    )
)
