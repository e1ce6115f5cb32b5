"""vLLM as a contender: its engine in this process, driven step by step, so that each token has its time."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

_GIB = 1 << 30
_TOKENS = 8192  # that one step may take, at least: a batch of prompts then runs in one, and sequences stay in step


class Unsupported(Exception):
    """See worker.py."""


class Peer:
    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["quantize"]:
            raise Unsupported(f"quantize={spec['quantize']} is not measured with vLLM")
        if spec["dtype"] == "float64":
            raise Unsupported("vLLM has no float64")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        cache = 2 * spec["max_batch"] * _uncapped(spec["config"], spec["max_len"])
        options: dict[str, Any] = {}
        if spec["device"] == "cpu":
            cpus = sorted(os.sched_getaffinity(0))[: spec["threads"]]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
            os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(1 + cache // _GIB)
        else:  # what it needs, and not most of the GPU: others are on it too
            import torch

            torch.cuda.set_device(spec["device"])
            weights = sum(file.stat().st_size for file in Path(spec["path"]).glob("*.safetensors"))
            total = torch.cuda.mem_get_info()[1]
            options["gpu_memory_utilization"] = min(0.9, (1.1 * weights + cache + 4 * _GIB) / total)
        import vllm
        from vllm import LLM

        self.llm = LLM(
            model=spec["path"],
            dtype=spec["dtype"],
            max_model_len=spec["max_len"],
            max_num_seqs=max(4, spec["max_batch"]),
            max_num_batched_tokens=max(_TOKENS, spec["max_batch"] * spec["max_len"]),
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            seed=spec["seed"],
            **options,
        )
        self._number = itertools.count()
        return {"version": vllm.__version__}

    def prompt(self, variant: str, ids: list[list[int]], new: int) -> tuple[float, list[float], list[list[int]]]:
        took, tokens = self._run(ids, new)
        return took[0], took[1:], tokens

    def depth(self, variant: str, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """From the second call on the prefix cache has the prompt; the token that ends its rest is not counted."""
        took, tokens = self._run(ids, new + 1)
        return took[1:], [row[1:] for row in tokens]

    def score(self, variant: str, ids: list[list[int]], top: int) -> list[tuple[int, float]]:
        (output,) = self.llm.generate(
            [{"prompt_token_ids": row} for row in ids], self._sampling(1, logprobs=min(top, 20)), use_tqdm=False
        )
        found = output.outputs[0].logprobs[0]
        return [(token, entry.logprob) for token, entry in found.items()]

    def _sampling(self, new: int, **options: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, **options)

    def _run(self, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """Seconds [new] until every sequence had its next token, and the tokens [B][new]."""
        engine, sampling = self.llm.llm_engine, self._sampling(new)
        tokens: dict[str, list[int]] = {}
        times = [time.perf_counter()]
        for row in ids:
            name = str(next(self._number))
            tokens[name] = []
            engine.add_request(name, {"prompt_token_ids": row}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                # An engine that makes ids unique puts something behind ours.
                name = output.request_id if output.request_id in tokens else output.request_id.split("-")[0]
                tokens[name] = list(output.outputs[0].token_ids)
            times += [now] * (min(map(len, tokens.values())) + 1 - len(times))
        return [b - a for a, b in itertools.pairwise(times)], list(tokens.values())


def _uncapped(config: dict[str, Any], length: int) -> int:
    """Bytes of keys and values of one sequence, if every layer keeps every token."""
    heads = max(config["num_key_value_heads"], config.get("num_global_key_value_heads") or 0)
    dim = max(config["head_dim"], config["global_head_dim"])
    return int(config["num_hidden_layers"] * 2 * heads * dim * 2 * length)
