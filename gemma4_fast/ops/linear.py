"""Specs of the dense ops: linear, geglu_mlp, logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemma4_fast.ops import checks, cpu_backend, cuda_backend, triton_backend
from gemma4_fast.ops.table import Cost, Impl, Maker, Op, register
from gemma4_fast.ops.torch_backend import draw
from gemma4_fast.quant import WeightLike
from gemma4_fast.reference import ops as reference


def _check_linear(x: Tensor, weight: WeightLike) -> None:
    checks.floating("linear", "x", x)
    checks.weight("linear", "weight", weight, (-1, x.shape[-1]), x)


def linear_case(m: Maker, *shape: int, out: int, bits: int = 0) -> dict[str, Any]:
    return dict(x=m.randn(*shape), weight=m.weight(bits, out, shape[-1], scale=1 / math.sqrt(shape[-1])))


LINEAR = register(
    Op(
        name="linear",
        summary="x @ weight^T",
        reference=reference.linear,
        check=_check_linear,
        cases={
            "26b_qkv_one_token": lambda m: linear_case(m, 1, 2816, out=8192),
            "e2b_o_proj": lambda m: linear_case(m, 9, 2048, out=1536),
            "batched": lambda m: linear_case(m, 2, 5, 64, out=96),
            "odd": lambda m: linear_case(m, 3, 97, out=31),
            "no_tokens": lambda m: linear_case(m, 0, 64, out=32),
            "int8_one_token": lambda m: linear_case(m, 1, 2816, out=512, bits=8),
            "int8_odd": lambda m: linear_case(m, 3, 97, out=31, bits=8),
            "int4": lambda m: linear_case(m, 2, 5, 2048, out=96, bits=4),
            "int4_odd": lambda m: linear_case(m, 11, 33, out=17, bits=4),
        },
        cost=lambda x, weight: Cost(
            2 * x.numel() * weight.shape[0],
            x.nbytes + weight.nbytes + x.numel() // x.shape[-1] * weight.shape[0] * x.element_size(),
        ),
        bench_cases={
            "26b_qkv_1_token": lambda m: linear_case(m, 1, 2816, out=8192),
            "26b_qkv_16_tokens": lambda m: linear_case(m, 16, 2816, out=8192),
            "26b_qkv_512_tokens": lambda m: linear_case(m, 512, 2816, out=8192),
            "26b_qkv_1_token_int8": lambda m: linear_case(m, 1, 2816, out=8192, bits=8),
            "26b_qkv_1_token_int4": lambda m: linear_case(m, 1, 2816, out=8192, bits=4),
            "26b_qkv_512_tokens_int8": lambda m: linear_case(m, 512, 2816, out=8192, bits=8),
            "26b_qkv_512_tokens_int4": lambda m: linear_case(m, 512, 2816, out=8192, bits=4),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:linear", cuda_backend.DTYPES, accepts=cuda_backend.accepts_linear),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:linear", cpu_backend.DTYPES, accepts=checks.accepts_weights),
            "triton": Impl("gemma4_fast.triton.linear:linear", triton_backend.DTYPES, accepts=checks.accepts_weights),
            "torch": Impl("gemma4_fast.ops.torch_backend:linear"),
        },
    )
)


def _check_mlp(x: Tensor, gate_up: WeightLike, down: WeightLike) -> None:
    op = "geglu_mlp"
    checks.floating(op, "x", x)
    checks.weight(op, "gate_up", gate_up, (-1, x.shape[-1]), x)
    checks.require(op, gate_up.shape[0] % 2 == 0, f"gate_up has {gate_up.shape[0]} rows, expected an even number")
    checks.weight(op, "down", down, (x.shape[-1], gate_up.shape[0] // 2), x)


def mlp_case(m: Maker, tokens: int, hidden: int, inter: int, bits: int = 0) -> dict[str, Any]:
    return dict(
        x=m.randn(tokens, hidden),
        gate_up=m.weight(bits, 2 * inter, hidden, scale=1 / math.sqrt(hidden), parts=2),
        down=m.weight(bits, hidden, inter, scale=1 / math.sqrt(inter)),
    )


GEGLU_MLP = register(
    Op(
        name="geglu_mlp",
        summary="dense MLP with gelu_tanh gating",
        reference=reference.geglu_mlp,
        check=_check_mlp,
        cases={
            "26b_dense_one_token": lambda m: mlp_case(m, 1, 2816, 2112),
            "e2b": lambda m: mlp_case(m, 7, 1536, 6144),
            "odd": lambda m: mlp_case(m, 3, 97, 33),
            "int8": lambda m: mlp_case(m, 9, 256, 704, bits=8),
            "int8_odd": lambda m: mlp_case(m, 3, 97, 33, bits=8),
            "int4_one_token": lambda m: mlp_case(m, 1, 2816, 2112, bits=4),
            "int4_odd": lambda m: mlp_case(m, 5, 97, 17, bits=4),
        },
        cost=lambda x, gate_up, down: Cost(
            2 * x.numel() // x.shape[-1] * (gate_up.numel() + down.numel()), gate_up.nbytes + down.nbytes + 2 * x.nbytes
        ),
        bench_cases={
            "26b_1_token": lambda m: mlp_case(m, 1, 2816, 2112),
            "26b_512_tokens": lambda m: mlp_case(m, 512, 2816, 2112),
            "26b_1_token_int8": lambda m: mlp_case(m, 1, 2816, 2112, bits=8),
            "26b_1_token_int4": lambda m: mlp_case(m, 1, 2816, 2112, bits=4),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:geglu_mlp", cuda_backend.DTYPES, accepts=cuda_backend.accepts_geglu_mlp),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:geglu_mlp", cpu_backend.DTYPES, accepts=cpu_backend.accepts_geglu),
            "triton": Impl("gemma4_fast.triton.geglu_mlp:geglu_mlp", triton_backend.DTYPES, accepts=checks.accepts_geglu),
            "torch": Impl("gemma4_fast.ops.torch_backend:geglu_mlp"),
        },
    )
)


def _check_head(op: str, x: Tensor, weight: WeightLike, softcap: float | None) -> None:
    checks.floating(op, "x", x, 2)
    checks.weight(op, "weight", weight, (-1, x.shape[1]), x)
    checks.require(op, weight.shape[0] > 0, "weight has no rows")
    if softcap is not None:
        checks.positive(op, "softcap", softcap)


def _check_logits(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> None:
    _check_head("logits", x, weight, softcap)


def _logits_case(
    m: Maker,
    tokens: int,
    hidden: int,
    vocab: int,
    cap: float | None = 30.0,
    argmax: bool = False,
    big: float = 1.0,
    bits: int = 0,
) -> dict[str, Any]:
    return dict(
        x=m.randn(tokens, hidden),
        weight=m.weight(bits, vocab, hidden, scale=big / math.sqrt(hidden)),
        softcap=cap,
        argmax=argmax,
    )


def _clear(args: dict[str, Any]) -> dict[str, Any]:
    """x becomes the direction of a row of the weight: of a quarter of a million logits no rounding decides which is largest."""
    args["x"] = args["weight"][torch.tensor([1000])] * args["x"].shape[1] ** 0.5
    return args


def _tied(args: dict[str, Any]) -> dict[str, Any]:
    """Every row of the weight twice: the first must win."""
    args["weight"][500:] = args["weight"][:500]
    return args


def _logits_cost(x: Tensor, weight: WeightLike, softcap: float | None = None, argmax: bool = False) -> Cost:
    out = 8 * x.shape[0] if argmax else x.shape[0] * weight.shape[0] * x.element_size()
    return Cost(2 * x.shape[0] * weight.numel(), x.nbytes + weight.nbytes + out)


LOGITS = register(
    Op(
        name="logits",
        summary="lm_head with softcap, or argmax alone",
        reference=reference.logits,
        check=_check_logits,
        cases={
            "26b_slice": lambda m: _logits_case(m, 2, 2816, 4096),
            "saturated": lambda m: _logits_case(m, 4, 64, 500, big=40.0),
            "no_cap": lambda m: _logits_case(m, 3, 64, 100, cap=None),
            "argmax": lambda m: _logits_case(m, 5, 2816, 4096, argmax=True),
            "argmax_ties": lambda m: _tied(_logits_case(m, 3, 64, 1000, argmax=True)),
            "odd": lambda m: _logits_case(m, 3, 97, 1001),
            "int8": lambda m: _logits_case(m, 3, 256, 1001, bits=8),
            "int4_odd": lambda m: _logits_case(m, 3, 97, 1001, cap=None, bits=4),
            "int8_argmax": lambda m: _clear(_logits_case(m, 5, 2816, 4099, argmax=True, bits=8)),
        },
        cost=_logits_cost,
        bench_cases={
            "26b_1_token": lambda m: _logits_case(m, 1, 2816, 262144),
            "26b_1_token_argmax": lambda m: _clear(_logits_case(m, 1, 2816, 262144, argmax=True)),
            "26b_1_token_argmax_int8": lambda m: _clear(_logits_case(m, 1, 2816, 262144, argmax=True, bits=8)),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:logits", cuda_backend.DTYPES, accepts=cuda_backend.accepts_linear),
            "cpu": Impl("gemma4_fast.ops.cpu_backend:logits", cpu_backend.DTYPES, accepts=checks.accepts_weights),
            "triton": Impl("gemma4_fast.triton.logits:logits", triton_backend.DTYPES, accepts=checks.accepts_weights),
            "torch": Impl("gemma4_fast.ops.torch_backend:logits"),
        },
    )
)


def _check_sample(
    x: Tensor,
    weight: WeightLike,
    uniform: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> None:
    _check_head("sample", x, weight, softcap)
    checks.shaped("sample", "uniform", uniform, (x.shape[0],), x, (torch.float32, torch.float64))
    checks.positive("sample", "temperature", temperature)
    checks.integer("sample", "top_k", top_k, 0)
    checks.share("sample", "top_p", top_p)
    checks.require("sample", top_p > 0, f"top_p must be more than 0, got {top_p!r}")
    checks.share("sample", "min_p", min_p)


def _compose_sample(
    x: Tensor,
    weight: WeightLike,
    uniform: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    ids = draw(LOGITS(x, weight, softcap, False), uniform, temperature, top_k, top_p, min_p)
    return torch.where(x.isfinite().all(-1), ids, -1)


def sample_case(
    m: Maker,
    rows: int,
    hidden: int,
    vocab: int,
    cap: float | None = 30.0,
    bits: int = 0,
    temperature: float = 0.3,
    **restricted: Any,
) -> dict[str, Any]:
    """Draws that no rounding of a logit decides: each in the middle of what a likely token has of the row's [0, 1)."""
    args = dict(x=m.randn(rows, hidden), weight=m.weight(bits, vocab, hidden, scale=1 / math.sqrt(hidden)))
    settings = dict(softcap=cap, temperature=temperature, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **restricted})
    exact = [w.double() if isinstance(w, Tensor) else w.dequantize(torch.float64) for w in args.values()]
    y = reference.logits(exact[0], exact[1], cap)
    p, _ = reference.restricted(y, **{k: v for k, v in settings.items() if k != "softcap"})
    p = p / p.sum(-1, keepdim=True)
    middle, wanted = p.cumsum(-1) - p / 2, (torch.arange(rows, device=p.device)[:, None] + 1) / (rows + 1)
    likely = p.where((middle - wanted).abs() < 0.3, 0).argmax(-1, keepdim=True)
    return dict(**args, uniform=middle.gather(-1, likely).squeeze(-1).float(), **settings)


def _drawn(args: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Of logits' arguments, cleared: nearly all of the probability is one token's."""
    args = _clear(args)
    del args["argmax"]
    uniform = args["x"].new_full((args["x"].shape[0],), 0.5, dtype=torch.float32)
    return dict(x=args["x"], weight=args["weight"], uniform=uniform, softcap=args["softcap"], **settings)


GEMMA = dict(temperature=1.0, top_k=64, top_p=0.95, min_p=0.0)  # what its checkpoints recommend
FREE = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


SAMPLE = register(
    Op(
        name="sample",
        summary="lm_head and the draw of the next token: temperature, top-k, top-p, min-p",
        reference=reference.sample,
        check=_check_sample,
        cases={
            "26b_slice": lambda m: sample_case(m, 2, 2816, 4096, top_k=64, top_p=0.95),
            "free": lambda m: sample_case(m, 5, 256, 4099),
            "no_cap_odd": lambda m: sample_case(m, 3, 97, 1001, cap=None, top_k=20, top_p=0.9, min_p=0.05),
            "min_p": lambda m: sample_case(m, 3, 64, 1000, min_p=0.1),
            "top_p": lambda m: sample_case(m, 3, 64, 1000, top_p=0.6),
            "top_1": lambda m: sample_case(m, 4, 64, 500, top_k=1),
            "top_k_of_fewer": lambda m: sample_case(m, 4, 64, 30, top_k=50),
            "cold": lambda m: sample_case(m, 4, 64, 500, temperature=1e-9, top_k=64),
            "hot": lambda m: sample_case(m, 4, 64, 50, temperature=1e9),
            "int8": lambda m: sample_case(m, 3, 256, 1001, bits=8, top_k=64, top_p=0.95),
            "int4_odd": lambda m: sample_case(m, 3, 97, 1001, cap=None, bits=4),
        },
        cost=lambda x, weight, *_: _logits_cost(x, weight, argmax=True),
        bench_cases={
            "26b_1_token": lambda m: _drawn(_logits_case(m, 1, 2816, 262144), **GEMMA),
            "26b_1_token_free": lambda m: _drawn(_logits_case(m, 1, 2816, 262144), **FREE),
            "26b_1_token_int8": lambda m: _drawn(_logits_case(m, 1, 2816, 262144, bits=8), **GEMMA),
        },
        impls={
            "cuda": Impl("gemma4_fast.ops.cuda_backend:sample", cuda_backend.DTYPES, accepts=cuda_backend.accepts_sample),
        },
        compose=_compose_sample,
        parts=("logits",),
    )
)
