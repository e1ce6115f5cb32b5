"""What a run of the model benchmark is asked: contenders and workloads; what fits into memory, and the floor under each."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gemma4_fast import ops, terminal
from gemma4_fast.bench.rows import OURS
from gemma4_fast.cache import KVCache
from gemma4_fast.config import Gemma4Config
from gemma4_fast.layers import model_ops
from gemma4_fast.model import meta_model, weights_size

# Peer -> the file that runs it, and the variants that are contenders of their own (for models with experts, and without).
PEERS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    OURS: ("with_ours.py", ("",), ("",)),
    "transformers": ("with_transformers.py", ("grouped_mm", "eager", "batched_mm"), ("",)),
    "torch.compile": ("with_transformers.py", ("compile",), ("compile",)),
    "accelerate": ("with_transformers.py", ("accelerate",), ("accelerate",)),  # transformers' generate on this package
    "vllm": ("with_vllm.py", ("",), ("",)),
    "llama.cpp": ("with_llama_cpp.py", ("",), ("",)),
    "llama-bench": ("with_llama_bench.py", ("",), ("",)),
}
GGUF = ("llama.cpp", "llama-bench")  # these load a GGUF file
FROM_FILES = ("vllm", *GGUF)  # and these any file; the others can make dummy weights themselves
EVERYTHING = "all"  # as --peers: every peer, and the slow ways too
SLOW = "batched_mm"  # transformers' way that copies each token's experts; only with EVERYTHING
ROUNDS = 5
MINUTES = 6
_SPARE = 1 << 30  # bytes that a process needs beside its weights


@dataclass(frozen=True)
class Workload:
    """A batch of prompts and the tokens after them.

    depth: only the tokens count, after a context of `length`.
    busy: processes that keep a processor busy each meanwhile.
    """

    batch: int
    length: int
    new: int
    depth: bool = False
    busy: int = 0

    def ids(self, vocab: int, round_: int) -> list[list[int]]:
        """[B][length]: new ones for each round, so that no prefix cache knows them; at depth always the same."""
        beside = f" {self.busy}" if self.busy else ""
        seed = f"{self.batch} {self.length} {0 if self.depth else round_}{beside}"
        draw = random.Random(seed)
        return [[draw.randrange(min(10, vocab - 1), vocab) for _ in range(self.length)] for _ in range(self.batch)]


@dataclass(frozen=True)
class Contender:
    peer: str
    variant: str

    @property
    def label(self) -> str:
        return self.peer if self.variant in ("", "compile", "accelerate") else f"{self.peer} {self.variant}"

    @property
    def is_heavy(self) -> bool:
        """Whether it takes so much memory at times that the others' pages suffer: batched_mm copies each token's experts, and
        on a machine with 24 GB prefill of 128 tokens was a quarter slower for all others after it."""
        return self.variant == SLOW


@dataclass
class Plan:
    """One run.

    path: a checkpoint; None for dummy weights.
    pythons: interpreters of peers that have one of their own.
    rounds: counted turns that each contender has at most. It has fewer if they agree or if the
        minutes are over.
    every: whether the slow contenders take part too.
    """

    config: Gemma4Config
    label: str
    dtype: torch.dtype
    device: torch.device
    workloads: list[Workload]
    peers: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    path: Path | None = None
    quantize: str | None = None
    rounds: int = ROUNDS
    check: bool = True
    seed: int = 0
    pythons: dict[str, str] = field(default_factory=dict)
    every: bool = False
    minutes: int = MINUTES

    def contenders(self) -> list[Contender]:
        """This package first. The backend that is the automatic choice is not listed twice."""
        chosen = {ops.decide(name, self.device, self.dtype)[0] for name in model_ops(self.config)} - {"composed"}
        variants = self.backends or ("",)
        # The torch backend dequantizes quantized weights at each call, so it is left out for them.
        if self.every and not self.backends and not self.quantize:
            variants = ("", "torch")
        found = [Contender(OURS, "" if {v} == chosen else v) for v in variants]
        for peer in self.peers:
            _, experts, dense = PEERS[peer]
            ways = experts if self.config.enable_moe_block else dense
            found += [Contender(peer, v) for v in ways if v != SLOW or self.every]
        return list(dict.fromkeys(found))


def room_for(processes: int, free: int) -> int:
    """Bytes of weights that each of so many processes may hold at once."""
    return int((0.95 * free / processes - _SPARE) / 1.15)


def process_of(peer: str, peers: Sequence[str]) -> str:
    """Whose process runs it: those that run transformers in another way share its process, if that is there."""
    return "transformers" if "transformers" in peers and PEERS[peer][0] == PEERS["transformers"][0] else peer


def processes(peers: Sequence[str]) -> list[str]:
    """What runs beside each other. llama-bench lives for one call."""
    return [OURS, *(p for p in peers if process_of(p, peers) == p and p != "llama-bench")]


def fitting(config: Gemma4Config, dtype: torch.dtype, room: int) -> Gemma4Config:
    """The model, or the largest of a half, a fifth and fewer of its layers (and of its vocabulary) whose weights fit."""
    n = config.num_hidden_layers
    period = next(i + 1 for i, t in enumerate(config.layer_types) if t == "full_attention")
    for layers in sorted({n, n // 2, max(period, n // 5), 2, 1}, reverse=True):
        cut = config if layers == n else config.slice(num_layers=layers, vocab_size=config.vocab_size * layers // n)
        if weights_size(cut, dtype) <= room:
            return cut
    raise ValueError(
        f"not even one layer fits: it takes {terminal.size(weights_size(cut, dtype))}, and there is room for "
        f"{terminal.size(room)} per contender; name fewer --peers, or a smaller --config"
    )


def workloads(
    prompts: Sequence[int], depths: Sequence[int], batches: Sequence[int], new: int, busy: int = 0
) -> Iterator[Workload]:
    """Every prompt and depth at every batch.

    busy: if not 0, each of them once more, beside so many busy processes.
    """
    for batch in batches:
        for length, depth in [*((length, False) for length in prompts), *((length, True) for length in depths)]:
            quiet = Workload(batch, length, new, depth)
            yield quiet
            if busy:
                yield dataclasses.replace(quiet, busy=busy)


# ---------------------------------------------------------------- the floor
@dataclass(frozen=True)
class Floor:
    bytes: int
    flops: int


def floor(config: Gemma4Config, dtype: torch.dtype, quantize: str | None, batch: int, new: int, before: int) -> Floor:
    """What a pass over `new` tokens of each sequence, after `before` others, must read and multiply.

    Of the experts those that are hit, in expectation over uniform routing; of the cache what this package's layout holds;
    logits of one token a sequence. Sources: facts of the architecture alone, no measurement.
    """
    tokens = batch * new
    missed = (1 - config.top_k_experts / config.num_experts) ** tokens if config.enable_moe_block else 0.0
    share = config.top_k_experts / config.num_experts if config.enable_moe_block else 0.0
    read = flops = 0.0
    for name, p in meta_model(config, dtype, quantize).state_dict().items():
        if name.endswith("embed_tokens_per_layer.weight"):
            read += tokens * p.nbytes / p.shape[0]
        elif name == "lm_head.weight" or (name.endswith("embed_tokens.weight") and config.tie_word_embeddings):
            read += p.nbytes
            flops += 2 * batch * p.numel()
        elif name.endswith("embed_tokens.weight"):
            read += tokens * p.nbytes / p.shape[0]
        elif ".experts." in name:
            read += (1 - missed) * p.nbytes
            flops += 2 * tokens * share * p.numel()
        else:
            read += p.nbytes
            flops += 2 * tokens * p.numel() if p.dim() > 1 else 0
    moved = read
    cache = KVCache(config, 1, before + new, dtype, device="meta")
    for layer in config.layers():
        seen = sum(min(before + i + 1, layer.window or before + i + 1) for i in range(new))
        flops += 4 * batch * seen * layer.num_q_heads * layer.head_dim
        kept = cache.layer(layer.index)
        rows = min(before, layer.window or before)
        per_row = layer.num_kv_heads * layer.head_dim * dtype.itemsize * (1 if kept.k is None else 2)
        moved += batch * rows * per_row
    return Floor(round(moved), round(flops))
