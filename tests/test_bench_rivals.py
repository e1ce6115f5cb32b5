"""The rivals of `bench ops --rivals` are right, and make the very calls that transformers makes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemma4_fast import ops
from gemma4_fast.bench.rivals import RIVALS, grouped_mm, sdpa
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.ops.accuracy import Judge
from gemma4_fast.ops.attention import decode_case, prefill_case
from gemma4_fast.ops.moe import moe_case
from gemma4_fast.ops.table import Maker

Make = Callable[[Maker], dict[str, Any]]
DTYPES = [torch.float32, torch.bfloat16]
CASES: dict[str, tuple[str, Make]] = {
    "experts, one token": ("moe", lambda m: moe_case(m, 1, 64, 32, 16, 4)),
    "experts": ("moe", lambda m: moe_case(m, 40, 64, 32, 16, 4)),
    "experts, some idle": ("moe", lambda m: moe_case(m, 40, 64, 32, 16, 4, "empty")),
    "part of a window": ("gqa_decode", lambda m: decode_case(m, [9, 9], 4, 2, 32, 64, window=16)),
    "ring": ("gqa_decode", lambda m: decode_case(m, [300] * 3, 4, 2, 32, 64, window=50)),
    "K and V": ("gqa_decode", lambda m: decode_case(m, [33, 33], 8, 2, 512, 64)),
    "V only": ("gqa_decode", lambda m: decode_case(m, [60], 8, 2, 512, 64, v_only=True)),
    "V only, paged": ("gqa_decode", lambda m: decode_case(m, [130, 130], 8, 1, 64, 192, v_only=True, block=64)),
    "V only, wrapped": ("gqa_decode", lambda m: decode_case(m, [300], 4, 1, 64, 64, v_only=True)),
    "one head each": ("gqa_decode", lambda m: decode_case(m, [20], 4, 4, 32, 64)),
    "prompts": ("gqa_prefill", lambda m: prefill_case(m, [33, 33], 4, 2, 32)),
    "head_dim 512": ("gqa_prefill", lambda m: prefill_case(m, [33], 4, 2, 512)),
    "prompts, window": ("gqa_prefill", lambda m: prefill_case(m, [40, 40], 4, 2, 32, window=16)),
    "as long as the window": ("gqa_prefill", lambda m: prefill_case(m, [16], 4, 2, 32, window=16)),
    "one token": ("gqa_prefill", lambda m: prefill_case(m, [1], 4, 2, 32, window=16)),
    "after a prompt": ("gqa_prefill", lambda m: prefill_case(m, [9, 9], 4, 2, 32, None, [50, 50])),
    "after a ring": ("gqa_prefill", lambda m: prefill_case(m, [20, 20], 4, 2, 32, 50, [100, 100])),
    "after V only": ("gqa_prefill", lambda m: prefill_case(m, [20], 4, 2, 64, None, [40], v_only=True, block=16)),
    "images": ("gqa_prefill", lambda m: prefill_case(m, [35, 35], 4, 2, 32, 16, images=True)),
    "images after a ring": ("gqa_prefill", lambda m: prefill_case(m, [35], 4, 2, 32, 16, [100], images=True)),
    "window of one": ("gqa_prefill", lambda m: prefill_case(m, [5], 4, 2, 32, 1, [30])),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rivals_are_right(case: str, dtype: torch.dtype) -> None:
    op, make = CASES[case]
    (way,) = RIVALS[op].values()
    verdict = Judge(ops.TABLE[op], make(Maker(dtype)))(way.whole)
    assert verdict.ok, verdict.message


def test_sequences_of_different_lengths_are_not_measured() -> None:
    for op, make in (
        ("gqa_decode", lambda m: decode_case(m, [9, 5], 4, 2, 32, 16)),
        ("gqa_prefill", lambda m: prefill_case(m, [9, 5], 4, 2, 32)),
        ("gqa_prefill", lambda m: prefill_case(m, [9, 9], 4, 2, 32, None, [9, 5])),
    ):
        with pytest.raises(UnsupportedError, match="different lengths"):
            RIVALS[op]["torch sdpa"].whole(*make(Maker(torch.float32)).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name, (op, _) in CASES.items() if op == "moe"])
def test_experts_have_the_bits_of_transformers(case: str, dtype: torch.dtype) -> None:
    args = CASES[case][1](Maker(dtype))
    act = ACT2FN["gelu_pytorch_tanh"]  # as transformers' Gemma4TextExperts gates

    def gate(x: torch.Tensor) -> torch.Tensor:
        half, up = x.chunk(2, dim=-1)
        return act(half) * up

    layer = SimpleNamespace(
        num_experts=16, gate_up_proj=args["gate_up"], down_proj=args["down"], _apply_gate=gate, has_gate=True, has_bias=False,
        has_post_expert_norm=False, is_transposed=False, _is_expert_parallel=False,
    )  # fmt: skip
    theirs = grouped_mm_experts_forward(layer, args["x"], args["ids"].long(), args["topk_weights"])
    assert torch.equal(grouped_mm(*args.values()), theirs)


class Spy:
    """Notes with what SDPA is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        inner = F.scaled_dot_product_attention

        def spied(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            mask = options["attn_mask"]
            told: dict[str, Any] = {n: (x.shape, x.dtype, x.is_contiguous()) for n, x in (("q", q), ("k", k), ("v", v))}
            told |= {"mask": None if mask is None else mask.tolist(), "scale": options["scale"]}
            told |= {"causal": options["is_causal"], "gqa": options.get("enable_gqa", False)}
            self.calls.append(told)
            return inner(q, k, v, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spied)


@pytest.mark.parametrize("case", [name for name, (op, _) in CASES.items() if op != "moe"])
def test_attention_makes_the_call_of_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, make = CASES[case]
    prepare = RIVALS[op]["torch sdpa"].prepare
    assert prepare is not None
    q, k, v, mask, scale = prepare(*make(Maker(torch.float32)).values()).values()
    assert k.is_contiguous() and v.is_contiguous()
    layer, spy = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True), Spy(monkeypatch)
    theirs, _ = sdpa_attention_forward(layer, q, k, v, mask, scaling=scale)  # type: ignore[arg-type]
    assert torch.equal(sdpa(q, k, v, mask, scale), theirs.flatten(0, 1))
    first, second = spy.calls
    assert first == second


@pytest.mark.parametrize("prompt", [8, 16, 24])  # before, at and beyond the window
def test_inside_their_model_attention_is_called_like_that(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, layouts, masks and flags of a prompt, of five more tokens and of a decode step, in a sliding and a full layer."""
    kinds = {"sliding_attention": (32, 16), "full_attention": (512, None)}
    config = Gemma4TextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_global_key_value_heads=2, head_dim=32, global_head_dim=512, sliding_window=16, vocab_size=64,
        layer_types=list(kinds), hidden_size_per_layer_input=0, num_kv_shared_layers=0, pad_token_id=0,
    )  # fmt: skip
    model, cache = Gemma4ForCausalLM(config).eval(), DynamicCache(config=config)
    spy, m = Spy(monkeypatch), Maker(torch.float32)
    with torch.inference_mode():
        for tokens in (prompt, 5, 1):
            model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
        theirs, spy.calls = spy.calls, []
        for prefix, tokens in ((None, prompt), ([prompt], 5)):
            for dim, window in kinds.values():
                args = prefill_case(m, [tokens], 4, 2, dim, window, prefix)
                RIVALS["gqa_prefill"]["torch sdpa"].whole(*args.values())
        for dim, window in kinds.values():
            args = decode_case(m, [prompt + 6], 4, 2, dim, 64, window)
            RIVALS["gqa_decode"]["torch sdpa"].whole(*args.values())
        for dim, window in kinds.values():  # a prompt of one token is a decode step to transformers
            args = prefill_case(m, [1], 4, 2, dim, window, [prompt + 5])
            RIVALS["gqa_prefill"]["torch sdpa"].whole(*args.values())
    assert spy.calls == [*theirs, *theirs[-2:]]
