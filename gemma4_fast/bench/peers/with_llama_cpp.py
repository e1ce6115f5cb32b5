"""llama.cpp as a contender, by the C interface that llama-cpp-python has: one context, greedy, with llama-bench's settings."""

from __future__ import annotations

import ctypes
import time
from itertools import pairwise
from typing import Any

import llama_cpp
import numpy as np

_ERROR = 4  # ggml's log levels
_BATCH, _UBATCH = 2048, 512  # llama.cpp's defaults
_errors: list[str] = []


class Unsupported(Exception):
    """See worker.py."""


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: object) -> None:
    """Keeps the errors and drops the rest, some hundred lines for each model."""
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _failure(what: str) -> Exception:
    """With llama.cpp's own words; the first error names the cause, and later ones follow from it."""
    text = "; ".join([what, *_errors])
    return MemoryError(text) if "alloc" in text else RuntimeError(text)


class Peer:
    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.spec, on_gpu = spec, spec["device"] != "cpu"
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise Unsupported("this build of llama.cpp has no GPU support")
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = -1 if on_gpu else 0
        if on_gpu:  # by default it spreads over all the GPUs
            params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = int(spec["device"].partition(":")[2] or 0)
        self.model = llama_cpp.llama_model_load_from_file(spec["gguf"].encode(), params)
        if not self.model:
            raise _failure("llama.cpp did not load the model")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch = 0
        self._kept: list[list[int]] | None = None
        kind = {None: "bf16", "int8": "Q8_0", "int4": "Q4_0"}[spec["quantize"]]
        return {"version": llama_cpp.__version__, "note": f"{kind} weights, fp16 cache"}

    def prompt(self, variant: str, ids: list[list[int]], new: int) -> tuple[float, list[float], list[list[int]]]:
        self._use(len(ids))
        self._kept = None
        times = [time.perf_counter()]
        llama_cpp.llama_memory_clear(self.memory, False)
        tokens = [self._decode(ids, 0)]
        times.append(time.perf_counter())
        for i in range(new - 1):
            tokens.append(self._decode([[t] for t in tokens[-1]], len(ids[0]) + i))
            times.append(time.perf_counter())
        took = [b - a for a, b in pairwise(times)]
        return took[0], took[1:], [list(row) for row in zip(*tokens, strict=True)]

    def depth(self, variant: str, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """Over the prompt's own keys and values: all but its last token, whose step is the first that is timed."""
        self._use(len(ids))
        before = len(ids[0]) - 1
        if self._kept != ids or not self._rewind(len(ids), before, new):
            llama_cpp.llama_memory_clear(self.memory, False)
            if before:
                self._decode([row[:-1] for row in ids], 0)
            self._kept = ids
        tokens, times = [[row[-1] for row in ids]], [time.perf_counter()]
        for i in range(new):
            tokens.append(self._decode([[t] for t in tokens[-1]], before + i))
            times.append(time.perf_counter())
        return [b - a for a, b in pairwise(times)], [list(row) for row in zip(*tokens[1:], strict=True)]

    def score(self, variant: str, ids: list[list[int]], top: int) -> list[tuple[int, float]]:
        self._use(len(ids))
        self._kept = None
        llama_cpp.llama_memory_clear(self.memory, False)
        self._decode(ids, 0)
        logits = self._logits(len(ids[0]) - 1).astype(np.float64)
        best = np.argsort(-logits)[:top]
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        return [(int(i), float(logits[i])) for i in best]

    def _use(self, batch: int) -> None:
        """A context for `batch` sequences. One for more would hold their caches too."""
        if batch == self.batch:
            return
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        self.context, self.batch, self._kept = None, 0, None
        params = llama_cpp.llama_context_default_params()
        length = -(-self.spec["max_len"] // 256) * 256  # the cache of a sequence is padded so
        params.n_seq_max, params.n_ctx = batch, batch * length
        params.n_batch = max(_BATCH, batch * length)  # what one call takes; it runs in parts of n_ubatch
        params.n_ubatch = _UBATCH
        params.n_threads = params.n_threads_batch = self.spec["threads"]
        params.swa_full = False  # the library's default is True, that of llama.cpp's programs is False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            self.context = None
            raise _failure("llama.cpp made no context")
        self.batch, self.memory = batch, llama_cpp.llama_get_memory(self.context)

    def _rewind(self, batch: int, length: int, new: int) -> bool:
        """Drops the `new` tokens that an earlier call put after the first `length`. False if that cannot be done."""
        # The cache of a sliding layer has room for _UBATCH tokens beside its window, and new ones take the place of the
        # oldest. Each call begins in the first cell that is free, so that all calls together take at most 2 * new cells.
        if 2 * new > _UBATCH:
            return False
        return all(llama_cpp.llama_memory_seq_rm(self.memory, s, length, -1) for s in range(batch))

    def _decode(self, ids: list[list[int]], start: int) -> list[int]:
        """Runs ids [B][T], at positions from `start`, and gives the likeliest next token [B] of each sequence."""
        batch, count = len(ids), len(ids[0])
        token = np.array(ids, np.int32).ravel()
        position = np.tile(np.arange(start, start + count, dtype=np.int32), batch)
        sequence = np.repeat(np.arange(batch, dtype=np.int32), count)
        pointers = sequence.ctypes.data + 4 * np.arange(batch * count, dtype=np.uintp)
        ones = np.ones(batch * count, np.int32)
        wanted = np.zeros(batch * count, np.int8)
        last = np.arange(1, batch + 1) * count - 1
        wanted[last] = 1
        fields: dict[str, np.ndarray[Any, Any]] = dict(token=token, pos=position, n_seq_id=ones, seq_id=pointers, logits=wanted)
        types = dict(llama_cpp.llama_batch._fields_)
        own = llama_cpp.llama_batch(
            n_tokens=batch * count, **{k: ctypes.cast(v.ctypes.data, types[k]) for k, v in fields.items()}
        )
        if code := llama_cpp.llama_decode(self.context, own):
            raise _failure(f"llama_decode gave {code}")
        return [int(self._logits(i).argmax()) for i in last.tolist()]

    def _logits(self, index: int) -> np.ndarray[Any, Any]:
        """[V] fp32, in llama.cpp's own memory, of the token at `index` of the latest batch."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, index), (self.vocab,))
