"""Specs of the mixture-of-experts ops: route_topk, expert_dispatch, grouped_gemm, moe_decode, moe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops import checks, cpu_backend, cuda_backend, triton_backend
from gemma4_fast.ops.linear import GEGLU_MLP, mlp_case
from gemma4_fast.ops.table import Cost, Impl, Maker, Op, register
from gemma4_fast.quant import WeightLike
from gemma4_fast.reference import ops as reference

WEIGHTS = (torch.float32, torch.float64)  # routing weights stay wide whatever x is


def _check_route(x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6) -> None:
    op = "route_topk"
    checks.floating(op, "x", x, 2)
    checks.floating(op, "proj", proj, 2)
    experts, hidden = proj.shape[0], x.shape[1]
    checks.shaped(op, "proj", proj, (experts, hidden), x)
    checks.shaped(op, "scale", scale, (hidden,), x)
    checks.shaped(op, "per_expert_scale", per_expert_scale, (experts,), x)
    checks.integer(op, "top_k", top_k, 1, experts)
    checks.positive(op, "eps", eps)


def route_case(m: Maker, tokens: int, hidden: int, experts: int, top_k: int, ties: bool = False) -> dict[str, Any]:
    proj = m.randn(experts, hidden)
    if ties:  # equal rows give equal probabilities: the lower id must win
        proj[1::2] = proj[0::2]
    return dict(
        x=m.randn(tokens, hidden, scale=4.0),
        scale=m.gain(hidden),
        proj=proj,
        per_expert_scale=m.gain(experts),
        top_k=top_k,
        eps=1e-6,
    )


ROUTE_TOPK = register(
    Op(
        name="route_topk",
        summary="residual -> routing weights fp32 and expert ids",
        reference=reference.route_topk,
        check=_check_route,
        cases={
            "26b": lambda m: route_case(m, 6, 2816, 128, 8),
            "26b_one_token": lambda m: route_case(m, 1, 2816, 128, 8),
            "ties": lambda m: route_case(m, 5, 64, 16, 4, ties=True),
            "all_experts": lambda m: route_case(m, 3, 32, 4, 4),
            "odd": lambda m: route_case(m, 7, 97, 13, 3),
        },
        cost=lambda x, scale, proj, per_expert_scale, top_k, eps=1e-6: Cost(
            2 * x.shape[0] * proj.numel(), x.nbytes + proj.nbytes + 8 * x.shape[0] * top_k
        ),
        bench_cases={
            "26b_1_token": lambda m: route_case(m, 1, 2816, 128, 8),
            "26b_512_tokens": lambda m: route_case(m, 512, 2816, 128, 8),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:route_topk", cuda_backend.DTYPES, accepts=cuda_backend.accepts_route),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:route_topk", cpu_backend.DTYPES),
            "triton": Impl("gemma4_fast.triton.route_topk:route_topk", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:route_topk"),
        },
    )
)


def _check_ids(op: str, ids: Tensor, num_experts: int) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int32:
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{op}: ids must be [T, K] int32, got {got}")
    checks.require(op, num_experts > 0, f"num_experts must be positive, got {num_experts}")


def _check_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> None:
    checks.integer("expert_dispatch", "num_experts", num_experts, 1)
    _check_ids("expert_dispatch", ids, num_experts)
    checks.integer("expert_dispatch", "block_m", block_m, 1)


def _ids(m: Maker, tokens: int, experts: int, top_k: int, skew: str = "") -> Tensor:
    """Distinct experts per token. skew "one": all tokens to the same; "empty": the upper half of the experts gets none;
    "elsewhere": half of the ids are other devices' experts, on both sides of [0, experts); "none": all of them are."""
    limit = {"": experts, "one": top_k, "empty": max(top_k, experts // 2)}.get(skew, 2 * experts)
    rows = [torch.randperm(limit, generator=m.generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack(rows) if rows else torch.empty(0, top_k)
    if skew == "elsewhere":
        ids -= experts // 2
    elif skew == "none":
        ids += experts
    return ids.to(m.device, torch.int32)


def _dispatch_case(m: Maker, tokens: int, experts: int, top_k: int, block_m: int, skew: str = "") -> dict[str, Any]:
    return dict(ids=_ids(m, tokens, experts, top_k, skew), num_experts=experts, block_m=block_m)


EXPERT_DISPATCH = register(
    Op(
        name="expert_dispatch",
        summary="(token, expert) assignments sorted by expert, and their tiles",
        reference=reference.expert_dispatch,
        check=_check_dispatch,
        cases={
            "26b": lambda m: _dispatch_case(m, 100, 128, 8, 16),
            "one_token": lambda m: _dispatch_case(m, 1, 128, 8, 64),
            "skewed": lambda m: _dispatch_case(m, 50, 16, 2, 16, "one"),
            "empty_experts": lambda m: _dispatch_case(m, 33, 16, 4, 32, "empty"),
            "elsewhere": lambda m: _dispatch_case(m, 50, 16, 4, 16, "elsewhere"),
            "none_here": lambda m: _dispatch_case(m, 9, 5, 2, 4, "none"),
            "no_tokens": lambda m: _dispatch_case(m, 0, 16, 4, 16),
            "odd": lambda m: _dispatch_case(m, 37, 13, 3, 7),
        },
        cost=lambda ids, num_experts, block_m=64: Cost(0, 2 * ids.nbytes + 4 * num_experts),
        bench_cases={
            "26b_512_tokens": lambda m: _dispatch_case(m, 512, 128, 8, 64),
        },
        gpu_cases={
            "26b_4096_tokens": lambda m: _dispatch_case(m, 4096, 128, 8, 64),
        },
        impls={
            "cpu": Impl("gemma4_fast.ops.cpu_backend:expert_dispatch", cpu_backend.DTYPES),
            "triton": Impl("gemma4_fast.triton.expert_dispatch:expert_dispatch", triton_backend.DTYPES),
            "torch": Impl("gemma4_fast.ops.torch_backend:expert_dispatch"),
        },
    )
)


def _check_grouped(
    x: Tensor,
    weight: WeightLike,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> None:
    op = "grouped_gemm"
    checks.floating(op, "x", x, 2)
    checks.require(op, epilogue in ("none", "geglu", "combine"), f"epilogue must be none, geglu or combine, got {epilogue!r}")
    checks.weight(op, "weight", weight, (-1, -1, x.shape[1]), x)
    checks.shaped(op, "order", order, (-1,), x, (torch.int32,))
    checks.shaped(op, "offsets", offsets, (weight.shape[0] + 1,), x, (torch.int32,))
    rows = order.shape[0]
    checks.integer(op, "top_k", top_k, 1)
    checks.require(op, rows % top_k == 0, f"{rows} assignments do not divide into top_k = {top_k}")
    tokens = rows // top_k if epilogue == "geglu" else rows
    checks.require(op, x.shape[0] == tokens, f"x has {x.shape[0]} rows, expected {tokens}")
    checks.require(op, epilogue != "geglu" or weight.shape[1] % 2 == 0, "geglu needs an even number of output rows")
    checks.require(op, (epilogue == "combine") == (topk_weights is not None), "topk_weights go with epilogue 'combine'")
    checks.shaped(op, "topk_weights", topk_weights, (rows // top_k, top_k), x, WEIGHTS, optional=True)


def _grouped_case(
    m: Maker, tokens: int, experts: int, top_k: int, n: int, k: int, epilogue: str, skew: str = ""
) -> dict[str, Any]:
    ids = _ids(m, tokens, experts, top_k, skew)
    order, offsets, _ = reference.expert_dispatch(ids, experts)
    rows = tokens if epilogue == "geglu" else tokens * top_k
    return dict(
        x=m.randn(rows, k),
        weight=m.randn(experts, n, k, scale=1 / math.sqrt(k)),
        order=order,
        offsets=offsets,
        top_k=top_k,
        epilogue=epilogue,
        topk_weights=m.randn(tokens, top_k, dtype=torch.float32).abs() if epilogue == "combine" else None,
    )


def _grouped_cost(
    x: Tensor,
    weight: WeightLike,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> Cost:
    rows, n = order.shape[0], weight.shape[1]
    hit = int((offsets.diff() > 0).sum())
    out = {"none": rows * n, "geglu": rows * n // 2, "combine": rows // top_k * n}[epilogue]
    return Cost(2 * int(offsets[-1]) * n * x.shape[1], x.nbytes + out * x.element_size() + hit * weight[0].nbytes)


GROUPED_GEMM = register(
    Op(
        name="grouped_gemm",
        summary="each expert's rows times its matrix, with GeGLU or weighted combine",
        reference=reference.grouped_gemm,
        check=_check_grouped,
        cases={
            "26b_geglu": lambda m: _grouped_case(m, 12, 8, 2, 1408, 2816, "geglu"),
            "26b_combine": lambda m: _grouped_case(m, 12, 8, 2, 2816, 704, "combine"),
            "none": lambda m: _grouped_case(m, 20, 16, 4, 96, 64, "none"),
            "skewed_geglu": lambda m: _grouped_case(m, 40, 16, 2, 64, 96, "geglu", "one"),
            "empty_experts_combine": lambda m: _grouped_case(m, 25, 16, 4, 96, 32, "combine", "empty"),
            "elsewhere_geglu": lambda m: _grouped_case(m, 25, 5, 3, 34, 97, "geglu", "elsewhere"),
            "elsewhere_combine": lambda m: _grouped_case(m, 25, 16, 4, 96, 32, "combine", "elsewhere"),
            "elsewhere_none": lambda m: _grouped_case(m, 9, 16, 4, 64, 32, "none", "elsewhere"),
            "none_here": lambda m: _grouped_case(m, 3, 16, 4, 64, 96, "geglu", "none"),
            "one_token": lambda m: _grouped_case(m, 1, 16, 4, 64, 96, "geglu"),
            "odd": lambda m: _grouped_case(m, 7, 5, 3, 34, 97, "combine"),
        },
        cost=_grouped_cost,
        bench_cases={
            "26b_geglu_512_tokens": lambda m: _grouped_case(m, 512, 128, 8, 1408, 2816, "geglu"),
            "26b_combine_512_tokens": lambda m: _grouped_case(m, 512, 128, 8, 2816, 704, "combine"),
        },
        gpu_cases={
            "26b_geglu_4096_tokens": lambda m: _grouped_case(m, 4096, 128, 8, 1408, 2816, "geglu"),
            "26b_combine_4096_tokens": lambda m: _grouped_case(m, 4096, 128, 8, 2816, 704, "combine"),
        },
        impls={
            "cpu": Impl("gemma4_fast.ops.cpu_backend:grouped_gemm", cpu_backend.DTYPES, accepts=cpu_backend.accepts_grouped),
            "triton": Impl(
                "gemma4_fast.triton.grouped_gemm:grouped_gemm", triton_backend.DTYPES, accepts=triton_backend.accepts_grouped
            ),
            "torch": Impl("gemma4_fast.ops.torch_backend:grouped_gemm"),
        },
    )
)


def _check_moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> None:
    op = "moe"
    checks.floating(op, "x", x, 2)
    checks.weight(op, "gate_up", gate_up, (-1, -1, -1), x)
    experts, tokens, hidden = gate_up.shape[0], x.shape[0], x.shape[1]
    _check_ids(op, ids, experts)
    checks.shaped(op, "ids", ids, (tokens, -1), x, (torch.int32,))
    checks.shaped(op, "topk_weights", topk_weights, ids.shape, x, WEIGHTS)
    checks.weight(op, "gate_up", gate_up, (experts, -1, hidden), x)
    checks.require(op, gate_up.shape[1] % 2 == 0, f"gate_up has {gate_up.shape[1]} rows per expert, expected an even number")
    checks.weight(op, "down", down, (experts, hidden, gate_up.shape[1] // 2), x)


def moe_case(
    m: Maker, tokens: int, hidden: int, inter: int, experts: int, top_k: int, skew: str = "", bits: int = 0
) -> dict[str, Any]:
    return dict(
        x=m.randn(tokens, hidden),
        topk_weights=m.randn(tokens, top_k, dtype=torch.float32).abs(),
        ids=_ids(m, tokens, experts, top_k, skew),
        gate_up=m.weight(bits, experts, 2 * inter, hidden, scale=1 / math.sqrt(hidden), parts=2),
        down=m.weight(bits, experts, hidden, inter, scale=1 / math.sqrt(inter)),
    )


def _moe_cost(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Cost:
    here = ids[(ids >= 0) & (ids < gate_up.shape[0])]
    hit = int(here.unique().numel())
    per_row = 2 * (gate_up[0].numel() + down[0].numel())
    return Cost(here.numel() * per_row, hit * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes)


MOE_DECODE = register(
    Op(
        name="moe_decode",
        summary="routed experts for few tokens: no sort, no padding",
        reference=reference.moe_decode,
        check=_check_moe,
        cases={
            "26b_one_token": lambda m: moe_case(m, 1, 2816, 704, 8, 8),
            "26b": lambda m: moe_case(m, 5, 2816, 704, 8, 2),
            "skewed": lambda m: moe_case(m, 16, 96, 32, 16, 4, "one"),
            "elsewhere": lambda m: moe_case(m, 9, 96, 32, 16, 4, "elsewhere"),
            "elsewhere_one_token": lambda m: moe_case(m, 1, 96, 32, 16, 8, "elsewhere"),
            "none_here": lambda m: moe_case(m, 2, 97, 33, 5, 3, "none"),
            "none_here_one_token": lambda m: moe_case(m, 1, 96, 32, 16, 4, "none"),
            "no_tokens": lambda m: moe_case(m, 0, 96, 32, 16, 4),
            "odd": lambda m: moe_case(m, 3, 97, 33, 5, 3),
            "int8_one_token": lambda m: moe_case(m, 1, 2816, 704, 8, 8, bits=8),
            "int8_odd": lambda m: moe_case(m, 13, 97, 49, 5, 3, bits=8),
            "int8_elsewhere": lambda m: moe_case(m, 13, 97, 49, 5, 3, "elsewhere", bits=8),
            "int4_elsewhere": lambda m: moe_case(m, 3, 97, 33, 5, 3, "elsewhere", bits=4),
            "int4": lambda m: moe_case(m, 30, 256, 704, 8, 2, bits=4),
            "int4_few": lambda m: moe_case(m, 11, 256, 704, 8, 4, bits=4),
            "int4_odd": lambda m: moe_case(m, 3, 97, 33, 5, 3, bits=4),
        },
        cost=_moe_cost,
        bench_cases={
            "26b_1_token": lambda m: moe_case(m, 1, 2816, 704, 128, 8),
            "26b_8_tokens": lambda m: moe_case(m, 8, 2816, 704, 128, 8),
            "26b_1_token_int8": lambda m: moe_case(m, 1, 2816, 704, 128, 8, bits=8),
            "26b_1_token_int4": lambda m: moe_case(m, 1, 2816, 704, 128, 8, bits=4),
        },
        impls={
            "cuda": Impl(
                "gemma4_fast.ops.cuda_backend:moe_decode", cuda_backend.DTYPES, accepts=cuda_backend.accepts_moe_decode
            ),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:moe_decode", cpu_backend.DTYPES, accepts=cpu_backend.accepts_moe),
            "triton": Impl(
                "gemma4_fast.triton.moe_decode:moe_decode", triton_backend.DTYPES, accepts=triton_backend.accepts_moe
            ),
            "torch": Impl("gemma4_fast.ops.torch_backend:moe_decode"),
        },
    )
)


# By device type and backend of moe_decode: the largest number of tokens up to which it is not slower than the grouped path,
# for E = 128, K = 8, I = 704. `gemma4-fast bench scale --write` measures and writes this.
CROSSOVER: dict[str, int] = {
    "cpu torch": 128,
}
# Backends whose moe_decode sorts too, and takes any number of tokens: in one fork where the grouped path has two, which on 2
# cores is up to 4% faster for 17 to 256 tokens, and never slower.
ANY_NUMBER = ("cpu",)


def moe_crossover(device: torch.device, dtype: torch.dtype) -> float:
    """The largest number of tokens that `moe` hands to moe_decode, for the backend that serves it there; inf for all.

    Where it was not measured: 16, from which vLLM saw gathered experts lose to the grouped path (vllm#41379).
    """
    backend = MOE_DECODE.first_serving(device, dtype)
    return math.inf if backend in ANY_NUMBER else CROSSOVER.get(f"{device.type} {backend}", 16)


def grouped_moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    """The path for many tokens: sorted by expert, each expert's weights read once."""
    top_k = ids.shape[1]
    order, offsets, _ = EXPERT_DISPATCH(ids, gate_up.shape[0])
    h = GROUPED_GEMM(x, gate_up, order, offsets, top_k, "geglu", None)
    return GROUPED_GEMM(h, down, order, offsets, top_k, "combine", topk_weights)


def _compose_moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: WeightLike, down: WeightLike) -> Tensor:
    # Quantized weights: moe_decode of every backend that takes them is made for any number of tokens.
    if not isinstance(gate_up, Tensor) or x.shape[0] <= moe_crossover(x.device, x.dtype):
        return MOE_DECODE.select((x, topk_weights, ids, gate_up, down))(x, topk_weights, ids, gate_up, down)
    return grouped_moe(x, topk_weights, ids, gate_up, down)


MOE = register(
    Op(
        name="moe",
        summary="routed experts: moe_decode for few tokens, dispatch + grouped_gemm for many",
        reference=reference.moe,
        check=_check_moe,
        cases={
            "26b_one_token": lambda m: moe_case(m, 1, 2816, 704, 8, 8),
            "26b_prefill": lambda m: moe_case(m, 24, 2816, 704, 8, 2),
            "many": lambda m: moe_case(m, 200, 96, 32, 16, 4),
            "skewed": lambda m: moe_case(m, 40, 96, 32, 16, 4, "one"),
            "empty_experts": lambda m: moe_case(m, 40, 96, 32, 16, 4, "empty"),
            "elsewhere": lambda m: moe_case(m, 40, 96, 32, 16, 4, "elsewhere"),
            "none_here": lambda m: moe_case(m, 20, 97, 33, 5, 3, "none"),
            "odd": lambda m: moe_case(m, 19, 97, 33, 5, 3),
            "int8": lambda m: moe_case(m, 40, 96, 32, 16, 4, bits=8),
            "int4": lambda m: moe_case(m, 70, 97, 33, 5, 3, bits=4),
        },
        cost=_moe_cost,
        bench_cases={
            "26b_1_token": lambda m: moe_case(m, 1, 2816, 704, 128, 8),
            "26b_128_tokens": lambda m: moe_case(m, 128, 2816, 704, 128, 8),
            "26b_512_tokens": lambda m: moe_case(m, 512, 2816, 704, 128, 8),
            "26b_512_tokens_int8": lambda m: moe_case(m, 512, 2816, 704, 128, 8, bits=8),
            "26b_512_tokens_int4": lambda m: moe_case(m, 512, 2816, 704, 128, 8, bits=4),
        },
        gpu_cases={
            "26b_8_tokens": lambda m: moe_case(m, 8, 2816, 704, 128, 8),
            "26b_16_tokens": lambda m: moe_case(m, 16, 2816, 704, 128, 8),
            "26b_32_tokens": lambda m: moe_case(m, 32, 2816, 704, 128, 8),
            "26b_64_tokens": lambda m: moe_case(m, 64, 2816, 704, 128, 8),
            "26b_4096_tokens": lambda m: moe_case(m, 4096, 2816, 704, 128, 8),
        },
        compose=_compose_moe,
        parts=("moe_decode", "expert_dispatch", "grouped_gemm"),
    )
)


def _check_feed_forward(
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
) -> None:
    op = "moe_feed_forward"
    checks.floating(op, "x", x, 2)
    checks.shaped(op, "h", h, x.shape, x)
    checks.shaped(op, "e", e, x.shape, x)
    GEGLU_MLP.check(h, gate_up, down)
    _check_route(x, router_scale, router_proj, per_expert_scale, top_k, eps)
    experts = router_proj.shape[0]
    checks.weight(op, "experts_gate_up", experts_gate_up, (experts, -1, x.shape[1]), x)
    rows = experts_gate_up.shape[1]
    checks.require(op, rows % 2 == 0, f"experts_gate_up has {rows} rows per expert, expected an even number")
    checks.weight(op, "experts_down", experts_down, (experts, x.shape[1], rows // 2), x)


def _compose_feed_forward(
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
    dense = GEGLU_MLP(h, gate_up, down)
    weights, ids = ROUTE_TOPK(x, router_scale, router_proj, per_expert_scale, top_k, eps)
    return dense, MOE(e, weights, ids, experts_gate_up, experts_down)


def feed_forward_case(
    m: Maker, tokens: int, hidden: int, dense: int, inter: int, experts: int, top_k: int, bits: int = 0
) -> dict[str, Any]:
    x = m.randn(tokens, hidden, scale=4.0)
    mlp, route = mlp_case(m, tokens, hidden, dense, bits), route_case(m, tokens, hidden, experts, top_k)
    moe = moe_case(m, tokens, hidden, inter, experts, top_k, bits=bits)
    routing = {"router_scale": route["scale"], "router_proj": route["proj"], "per_expert_scale": route["per_expert_scale"]}
    weights = {"experts_gate_up": moe["gate_up"], "experts_down": moe["down"]}
    return dict(
        x=x, h=mlp["x"], e=moe["x"], gate_up=mlp["gate_up"], down=mlp["down"], **routing, **weights, top_k=top_k, eps=1e-6
    )


def _feed_forward_cost(
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
) -> Cost:
    weights, ids = reference.route_topk(x, router_scale, router_proj, per_expert_scale, top_k, eps)
    costs = (
        GEGLU_MLP.cost(h, gate_up, down),
        ROUTE_TOPK.cost(x, router_scale, router_proj, per_expert_scale, top_k, eps),
        _moe_cost(e, weights, ids, experts_gate_up, experts_down),
    )
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


MOE_FEED_FORWARD = register(
    Op(
        name="moe_feed_forward",
        summary="both branches of a layer with experts: the dense MLP, the router and its experts",
        reference=reference.moe_feed_forward,
        check=_check_feed_forward,
        cases={
            "26b_one_token": lambda m: feed_forward_case(m, 1, 2816, 2112, 704, 8, 8),
            "few": lambda m: feed_forward_case(m, 5, 256, 192, 96, 16, 4),
            "many": lambda m: feed_forward_case(m, 40, 96, 128, 32, 16, 4),
            "odd": lambda m: feed_forward_case(m, 3, 97, 35, 33, 5, 3),
            "int8": lambda m: feed_forward_case(m, 11, 256, 192, 96, 16, 4, bits=8),
            "int4_one_token": lambda m: feed_forward_case(m, 1, 256, 192, 96, 16, 4, bits=4),
        },
        cost=_feed_forward_cost,
        bench_cases={
            "26b_1_token": lambda m: feed_forward_case(m, 1, 2816, 2112, 704, 128, 8),
            "26b_1_token_int4": lambda m: feed_forward_case(m, 1, 2816, 2112, 704, 128, 8, bits=4),
        },
        gpu_cases={
            "26b_8_tokens": lambda m: feed_forward_case(m, 8, 2816, 2112, 704, 128, 8),
        },
        impls={
            "cuda": Impl(
                "gemma4_fast.ops.cuda_backend:moe_feed_forward",
                cuda_backend.DTYPES,
                accepts=cuda_backend.accepts_moe_feed_forward,
            ),
        },
        compose=_compose_feed_forward,
        parts=("geglu_mlp", "route_topk", "moe", *MOE.parts),
    )
)
