"""Dummy weights in seconds: a model whose tensors are windows of one block of noise."""

from __future__ import annotations

import math
import random

import torch

from gemma4_fast import weights
from gemma4_fast.config import Gemma4Config
from gemma4_fast.model import Gemma4

_BLOCK = 1 << 24  # numbers of noise
_WINDOW = 1 << 22  # of them that are copied at once


def dummy(
    config: Gemma4Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    seed: int = 0,
) -> Gemma4:
    """A model as Gemma4.dummy makes it, with weights of the same scales, but made much faster.

    To draw a number for every weight of a large model takes minutes. The weights follow from config,
    dtype, kind of device and seed, so every process has the same.
    """
    with torch.device("meta"):
        model = Gemma4(config)
    model.to(dtype)
    if quantize is not None:
        model.quantize(quantize)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    block = torch.empty(_BLOCK, device=device).normal_(generator=generator)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            draw = random.Random(f"{seed}:{name}")
            mean, std = weights.dummy_scale(name, t, config.hidden_size_per_layer_input)
            if name.endswith("layer_scalar"):
                mean, std = 0.75, 0.1
            for part in t.split(max(1, _WINDOW // max(1, math.prod(t.shape[1:])))):
                count = math.prod(part.shape)
                start = draw.randrange(_BLOCK - count)
                window = block[start : start + count] * std + mean
                part.copy_(window.to(dtype).view(part.shape))
    return model
