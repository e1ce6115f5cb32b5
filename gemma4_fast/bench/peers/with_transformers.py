"""transformers as a contender: `generate` with its defaults, each experts implementation, torch.compile, and accelerated."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import torch


class Unsupported(Exception):
    """See worker.py."""


class _Clock:
    """A streamer that notes when it is given something: first the prompt, then each new token of the batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Peer:
    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        import transformers
        from transformers.utils import logging

        self.quantize = spec["quantize"]
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if spec["device"] == "cpu":
            torch.set_num_threads(spec["threads"])
        dtype = getattr(torch, spec["dtype"])
        if spec["path"] is not None:
            model = transformers.AutoModelForCausalLM.from_pretrained(spec["path"], dtype=dtype, local_files_only=True)
            self.model = model.to(spec["device"]).eval()
        else:
            self.model = _sharing(spec, dtype)
        # No stop token, so that all make the same number of tokens; and nothing that a checkpoint recommends.
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self.device = spec["device"]
        self._own, self._accelerated = self.model, None
        self._eager, self._variant = self.model.forward, ""
        self._kept: tuple[list[list[int]], torch.Tensor, Any] | None = None  # ids at depth, all ids so far, cache
        note = f"{getattr(self.model.config, '_attn_implementation', '?')} attention"
        return {"version": transformers.__version__, "note": note}

    def _use(self, variant: str) -> None:
        if variant == self._variant:
            return
        self._kept, self._variant = None, variant
        self.model = self._own
        if variant == "accelerate":
            self.model = self._accelerated = self._accelerated or self._twin()
            return
        if self.quantize:
            raise Unsupported(f"quantize={self.quantize} is not measured with transformers")
        if variant == "compile":
            if hasattr(self.model, "set_experts_implementation"):
                self.model.set_experts_implementation("grouped_mm")  # the default, whatever contender ran before
            self.model.forward = torch.compile(self._eager)
            return
        self.model.forward = self._eager
        if variant:
            self.model.set_experts_implementation(variant)

    def _twin(self) -> Any:
        """A second model on the same weights, accelerated. Quantized it is the only one, as the weights are freed."""
        import gemma4_fast

        if self.quantize:
            return gemma4_fast.accelerate(self.model, quantize=self.quantize, check=False)
        twin = copy.deepcopy(self.model, {id(p): p for p in [*self.model.parameters(), *self.model.buffers()]})
        gemma4_fast.accelerate(twin, check=False)
        return twin

    def _generate(self, ids: torch.Tensor, new: int, cache: Any = None) -> tuple[list[float], torch.Tensor]:
        """Times [new] from the call or the token before to each new token, and all ids [B, P + new]."""
        options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if self._variant == "compile" and cache is None:
            # What transformers recommends with it: decode steps of one shape. It would compile these alone; here both are.
            options = {"cache_implementation": "static", "disable_compile": True}
        clock, start = _Clock(), time.perf_counter()
        with torch.inference_mode(self._variant != "compile"), torch.no_grad():
            mask = torch.ones_like(ids)
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=new, streamer=clock, **options)
        times = [start, *clock.times[1:]]
        return [b - a for a, b in itertools.pairwise(times)], out

    def prompt(self, variant: str, ids: list[list[int]], new: int) -> tuple[float, list[float], list[list[int]]]:
        self._use(variant)
        took, out = self._generate(torch.tensor(ids, device=self.device), new)
        return took[0], took[1:], out[:, len(ids[0]) :].tolist()

    def score(self, variant: str, ids: list[list[int]], top: int) -> list[tuple[int, float]]:
        if variant == "compile":  # the same module: compiling for this one shape would take as long as the benchmark
            variant = ""
        self._use(variant)
        with torch.inference_mode():
            logits = self.model(torch.tensor(ids, device=self.device)).logits[0, -1].float()
        values, tokens = logits.log_softmax(-1).topk(top)
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    def depth(self, variant: str, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """The cache is filled with noise: a decode step takes as long over it as over a prompt's keys and values. It is
        kept from call to call, and a call adds its few tokens to it."""
        self._use(variant)
        if variant in ("compile", "accelerate"):
            raise Unsupported(f"depth is not measured with {variant}")
        if self._kept is None or self._kept[0] != ids:
            self._kept = None
            self._kept = ids, *self._filled(ids)
        _, seen, cache = self._kept
        took, out = self._generate(seen, new, cache)
        self._kept = ids, out, cache  # the newest token has not run yet
        return took, out[:, seen.shape[1] :].tolist()

    def _filled(self, ids: list[list[int]]) -> tuple[torch.Tensor, Any]:
        """The ids [B, P] and a cache that holds noise for all of them but the last."""
        from transformers import DynamicCache

        config = self.model.config.get_text_config()
        probe = torch.tensor([row[:2] for row in ids], device=self.device)
        with torch.inference_mode():
            shapes = self.model(probe, past_key_values=DynamicCache(config=config)).past_key_values
        cache = DynamicCache(config=config)
        for index, layer in enumerate(shapes.layers):
            if layer.keys is None or not layer.keys.numel():
                continue  # shares another layer's
            batch, heads, _, dim = layer.keys.shape
            noise = [torch.randn(batch, heads, len(ids[0]) - 1, dim).to(layer.keys) for _ in range(2)]
            with torch.inference_mode():
                cache.update(*noise, index)
        return torch.tensor(ids, device=self.device), cache


def _sharing(spec: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model whose weights are those that this package makes from the seed, in the same storage: no second copy."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    from gemma4_fast import Gemma4Config
    from gemma4_fast.bench.dummy import dummy

    device = torch.device(spec["device"])
    weights = dummy(Gemma4Config.from_dict(spec["config"]), dtype=dtype, device=device, seed=spec["seed"])
    config = Gemma4TextConfig.from_dict(copy.deepcopy(spec["config"]))
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    model.load_state_dict(weights.state_dict(), assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # buffers are not in a state dict
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.nn.Buffer(torch.tensor(module.scalar_embed_scale), persistent=False)
    return model.to(spec["device"]).eval()
