"""vLLM as a contender: its engine in this process, driven step by step, so that each token has its time."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

_STEP_TOKENS = 4096, 16384  # the smallest and the largest of vLLM's defaults, by device, for the tokens that one step may take
_BLOCK = 256  # cache rows that are given out together, at most


class Unsupported(Exception):
    """See worker.py."""


class Peer:
    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["quantize"]:
            raise Unsupported(f"quantize={spec['quantize']} is not measured with vLLM")
        if spec["dtype"] == "float64":
            raise Unsupported("vLLM has no float64")
        if not Path(spec["path"]).is_dir():  # vLLM would look for a model of this name on the network
            raise ValueError(f"there is no checkpoint folder {spec['path']}")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        batch = spec["max_batch"]
        length = spec["max_len"] + _ahead(batch * spec["max_len"], batch, _STEP_TOKENS[0])
        length = min(length, spec["config"]["max_position_embeddings"])
        cache = batch * _cache_bytes(spec["config"], length, 4 if spec["dtype"] == "float32" else 2)
        options = {} if spec["device"] == "cpu" else _on_gpu(spec)
        if spec["device"] == "cpu":
            _bind(spec["threads"])
        import vllm

        self.llm = vllm.LLM(
            model=spec["path"],
            dtype=spec["dtype"],
            max_model_len=length,
            max_num_seqs=batch,
            kv_cache_memory_bytes=cache,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_logprobs=-1,  # no limit
            seed=spec["seed"],
            **options,
        )
        self._number = itertools.count()
        config = self.llm.llm_engine.vllm_config
        self._step_tokens = config.scheduler_config.max_num_batched_tokens
        how = config.compilation_config
        note = f"compiled: {how.mode.name} by {how.backend or 'nothing'}, CUDA graphs: {how.cudagraph_mode.name}".lower()
        return {"version": vllm.__version__, "note": note}

    def prompt(self, variant: str, ids: list[list[int]], new: int) -> tuple[float, list[float], list[list[int]]]:
        took, tokens = self._run(ids, new)
        return took[0], took[1:], tokens

    def depth(self, variant: str, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """From the second call on the prefix cache has the prompt but for its last block, whose token is not counted."""
        took, tokens = self._run(ids, new + 1)
        return took[1:], [row[1:] for row in tokens]

    def score(self, variant: str, ids: list[list[int]], top: int) -> list[tuple[int, float]]:
        (output,) = self.llm.generate(
            [{"prompt_token_ids": row} for row in ids], self._sampling(1, logprobs=top), use_tqdm=False
        )
        found = output.outputs[0].logprobs[0]
        return [(token, entry.logprob) for token, entry in found.items()]

    def _sampling(self, new: int, **options: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, **options)

    def _run(self, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """Seconds [new] until every sequence had its next token, and the tokens [B][new].

        Prompts that do not fit into one step leave the sequences out of step: the first ones make tokens while the last
        prompt runs. So each is asked for as many more as it may be ahead by, and all still run when the last has its `new`.
        """
        engine = self.llm.llm_engine
        sampling = self._sampling(new + _ahead(sum(map(len, ids)), len(ids), self._step_tokens))
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
        took = [b - a for a, b in itertools.pairwise(times)]
        return took[:new], [row[:new] for row in tokens.values()]


def _ahead(tokens: int, batch: int, step_tokens: int) -> int:
    """How many steps after the first it may take until all prompts have run, if decoding sequences go before them."""
    return (tokens - 1) // max(1, step_tokens - batch)


def _bind(threads: int) -> None:
    """This many threads, on as many of the cores that this process may use. Before the import: OpenMP looks only once."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # What vLLM has for it. Version 0.32 hands it to workers that are processes of their own, and here there is none.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"


def _on_gpu(spec: dict[str, Any]) -> dict[str, Any]:
    """Options that leave the rest of the GPU to the others on it. vLLM takes the first GPU it sees: that is made this one."""
    index = int(spec["device"].partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    import torch

    free, total = torch.cuda.mem_get_info(0)
    share = min(free, spec["memory_bytes"] or free) / total
    torch.cuda.set_per_process_memory_fraction(share, 0)
    # The size of the cache is given, so vLLM only checks that this much is free.
    return {"gpu_memory_utilization": 0.95 * share}


def _cache_bytes(config: dict[str, Any], length: int, itemsize: int) -> int:
    """Bytes of keys and values that vLLM may hold for one sequence: both, in every layer that does not share another's."""
    rows_at_most = config["sliding_window"] + 2 * _STEP_TOKENS[1]  # two steps may be under way
    elements = 0
    for kind in config["layer_types"][: config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0)]:
        full = kind == "full_attention"
        own = config.get("num_global_key_value_heads") if full and config.get("attention_k_eq_v") else None
        heads, dim = own or config["num_key_value_heads"], config["global_head_dim" if full else "head_dim"]
        elements += heads * dim * 2 * ((length if full else min(length, rows_at_most)) + 2 * _BLOCK)
    # A quarter more, as vLLM pads its groups of layers to the same size.
    return elements * itemsize * 5 // 4
