"""Choosing the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy, the rest is ignored. top_k 0, top_p 1, min_p 0: off. Applied in the order they stand here."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError("top_p must lie in (0, 1], got 0")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer >= 0 (0: off), got {self.top_k!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _number(name: str, value: object, low: float, high: float) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    ok = ok and (value <= 1e30)  # type: ignore[operator]  # and so not infinite, nor an int beyond all floats
    if not ok:
        bounds = f"in [{low:g}, {high:g}]" if high != math.inf else f">= {low:g}"
        raise ValueError(f"{name} must be a number {bounds}, got {value!r}")


def sample(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """logits [B, V] -> ids [B] int64. generators[b], on the logits' device, alone decides for row b."""
    if sampling.greedy:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # at most 0: a tiny temperature cannot overflow
    kept, ids = restrict(logits, sampling)
    # argmax(p / e) with e ~ Exp(1) draws from p: one draw a row, and a row's neighbours do not matter.
    noise = torch.empty_like(kept)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    choice = (kept - noise.log()).argmax(-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def restrict(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """logits [B, V] fp32, temperature applied -> log-weights [B, n] with -inf where a filter removes a token, and the ids
    [B, n] they belong to (None: n = V, in order). At least the likeliest token stays."""
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k, dim=-1)  # falling
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    if sampling.top_p < 1:  # keep the shortest head that reaches top_p
        before = logits.softmax(-1).cumsum(-1) - logits.softmax(-1)
        drop = before >= sampling.top_p
        drop[..., 0] = False
        logits = logits.masked_fill(drop, -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), -math.inf)
    return logits, ids
