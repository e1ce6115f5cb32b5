"""A prefill and a decode step under pytest-benchmark, for work on the model: `pytest bench/ --benchmark-only -k model`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_fast import Gemma4, Gemma4Config, verify
from gemma4_fast.bench.model import fitting
from gemma4_fast.cache import KVCache

MODELS = ("tiny", "26b-a4b, 2 layers", "e2b, 5 layers")
PROMPT, TOKENS = 128, 1024


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, device: torch.device) -> Gemma4:
    """Checked before it is timed. The cut members have dummy weights at true shapes."""
    name = request.param
    if name == "tiny":
        loaded = Gemma4.from_pretrained("tiny", device=device, check=False)
    else:
        preset, layers = name.split(", ")
        config = Gemma4Config.preset(preset).slice(num_layers=int(layers.split()[0]), vocab_size=16384)
        loaded = Gemma4.dummy(fitting(config, torch.bfloat16, 8 << 30), device=device)
    verify(loaded, level="quick").raise_if_wrong()
    return loaded


def tokens(model: Gemma4, count: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (1, count), device=model.device)


def timed(benchmark: Any, model: Gemma4, ids: torch.Tensor, prepare: Any, rounds: int) -> None:
    def run(cache: KVCache) -> None:
        model(ids, cache)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {"dtype": str(model.dtype), "device": str(model.device)}
    benchmark.pedantic(run, setup=lambda: ((prepare(),), {}), rounds=rounds, warmup_rounds=1)


def test_model_prefill(benchmark: Any, model: Gemma4) -> None:
    length = min(PROMPT, model.config.max_position_embeddings // 2)
    timed(benchmark, model, tokens(model, length), lambda: model.new_cache(1, 2 * length), rounds=5)


def test_model_decode(benchmark: Any, model: Gemma4) -> None:
    length = min(TOKENS, model.config.max_position_embeddings // 2)
    cache = model.new_cache(1, 2 * length)
    model(tokens(model, length), cache)

    def same_length() -> KVCache:
        cache.host_lens = [length]
        cache.lens.fill_(length)
        return cache

    timed(benchmark, model, tokens(model, 1), same_length, rounds=20)
