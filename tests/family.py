"""Small random models shaped like the five members of the family, made by transformers: the truth to compare with.

Imported by several tests. Shapes are small, but head dims, patterns and special cases are those of the real ones.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from bounds import FLOOR, SLACK, InFp64, assert_right, error, largest
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from gemma4_fast import Gemma4
from gemma4_fast.config import Gemma4Config

_BASE: dict[str, Any] = dict(
    vocab_size=211, hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32, global_head_dim=64,
    sliding_window=8, max_position_embeddings=512, final_logit_softcapping=30.0, hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=211, dtype="float32",
)  # fmt: skip


def _types(period: int, layers: int) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


MEMBERS: dict[str, dict[str, Any]] = {
    "e2b": dict(
        _BASE, num_hidden_layers=10, layer_types=_types(5, 10), num_key_value_heads=1, num_kv_shared_layers=4,
        use_double_wide_mlp=True, hidden_size_per_layer_input=32,
    ),
    "e4b": dict(
        _BASE, num_hidden_layers=12, layer_types=_types(6, 12), num_key_value_heads=2, num_kv_shared_layers=5,
        hidden_size_per_layer_input=32,
    ),
    "12b": dict(
        _BASE, num_hidden_layers=6, layer_types=_types(6, 6), num_key_value_heads=2, num_global_key_value_heads=1,
        attention_k_eq_v=True,
    ),
    "26b-a4b": dict(
        _BASE, num_hidden_layers=6, layer_types=_types(6, 6), num_key_value_heads=2, num_global_key_value_heads=1,
        attention_k_eq_v=True, enable_moe_block=True, num_experts=16, top_k_experts=4, moe_intermediate_size=32,
    ),
    "31b": dict(
        _BASE, num_hidden_layers=12, layer_types=_types(6, 12), num_key_value_heads=4, num_global_key_value_heads=2,
        attention_k_eq_v=True, num_attention_heads=8, hidden_size=96,
    ),
}  # fmt: skip


@functools.cache
def transformers_model(member: str) -> Gemma4ForCausalLM:
    """fp32, eager attention, every parameter random: a norm left at 1 or a scalar left at 1 would hide a mistake."""
    config = Gemma4TextConfig(**MEMBERS[member])
    config._attn_implementation = "eager"
    model = Gemma4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "layer_scalar" in name:
                tensor.copy_(0.7 + 0.1 * noise)
            elif "q_norm" in name or "k_norm" in name:
                tensor.copy_(tensor.shape[0] ** -0.25 * (1 + 0.3 * noise))
            elif "norm" in name or "scale" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif "router.proj" in name:
                tensor.copy_(2 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def widened(model: Any) -> Any:
    """A copy of a model of transformers in fp64, to be called in `InFp64`.

    RoPE frequencies and embedding scales keep the values that they have in fp32.
    """
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # PyTorch's grouped_mm does not take fp64
    return wide


@torch.no_grad()
def in_fp64(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What a model of transformers returns when it computes in fp64: the truth."""
    wide = widened(model)
    with InFp64():
        return wide(*args, **kwargs)


@functools.cache
def wide_model(member: str) -> Gemma4ForCausalLM:
    return widened(transformers_model(member))


@torch.no_grad()
def exact_logits(member: str, ids: Tensor, **kwargs: Any) -> Tensor:
    """What transformers computes when nothing is rounded to fp32: the truth, in fp64."""
    wide = wide_model(member)  # made outside the mode, in which its RoPE frequencies would differ
    with InFp64():
        return wide(ids, **kwargs).logits


@functools.cache
def relative_loss(member: str) -> float:
    """What transformers' eager model loses in fp32 on this machine, relative to its largest logit."""
    ids = prompt(3, 60)
    truth = exact_logits(member, ids)
    with torch.no_grad():
        plain = transformers_model(member)(ids).logits
    return error(plain, truth) / largest(truth)


def assert_model_right(member: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """`got` obeys the rule of bounds.py, with eager's loss taken from more tokens than these."""
    assert_right(got, eager, truth, loss=relative_loss(member) * largest(truth))


def assert_near_eager(got: Tensor, eager: Tensor) -> None:
    """`got` is what some member's eager model computed, up to the rounding of both.

    For fp32 results whose truth in fp64 is not at hand. Against the truth, eager's error is
    `relative_loss` of the scale, and the rule of bounds.py allows `SLACK` times that and `FLOOR`
    to what is compared with it.
    """
    assert got.shape == eager.shape and got.dtype == eager.dtype
    loss = max(map(relative_loss, MEMBERS))
    bound = ((1 + SLACK) * loss + FLOOR) * largest(eager)
    off = error(got, eager)
    assert off <= bound, f"they differ by {off:.3g}, allowed {bound:.3g}"  # fails for NaN too


@functools.cache
def transformers_in(member: str, dtype: torch.dtype) -> Gemma4ForCausalLM:
    """The same weights loaded by transformers in `dtype`. (Casting a loaded model would round its RoPE frequencies too.)"""
    with tempfile.TemporaryDirectory() as folder:
        transformers_model(member).save_pretrained(folder)
        return load_with_transformers(Path(folder), dtype)


def load_with_transformers(folder: Path, dtype: torch.dtype) -> Gemma4ForCausalLM:
    plain: dict[str, Any] = dict(attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).eval()


def fast_model(member: str, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Gemma4:
    """The same weights in this package's model."""
    theirs = transformers_model(member)
    model = Gemma4(Gemma4Config.from_dict(theirs.config.to_dict()), backend)
    model.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})  # tied
    return model.to(dtype)


def prompt(batch: int, tokens: int, vocab: int = 211, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))
