"""The decode step, recorded once and run again: what a CUDA graph is on a GPU, for the CPU kernels.

A step of one token for each sequence is the same calls with the same shapes every time. Op by op, Python, checks and
allocations cost some tens of microseconds a call; a replay costs less than one. Layers alone are recorded; embedding and
the choice of the next token are run as always.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_fast import ops
from gemma4_fast.cache import KVCache
from gemma4_fast.layers import Step, model_ops

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4


class DecodeGraph:
    """The decode steps of one model with one cache. `run` gives the same bits as running op by op, which it does for as
    long as there is nothing to replay: the first step under a selection of backends, and all of them where an op is not
    served by a kernel that can be recorded.

    The model's parameters must stay the tensors they are; their values may change.
    """

    def __init__(self, model: Gemma4, cache: KVCache) -> None:
        self.text, self.cache = model.model, cache
        self.times: dict[str, float] | None = None  # a dict collects the seconds of each op's replayed calls, by its name
        self._key: Any = None  # what the steps so far have in common
        self._tried = False  # whether such a step has been recorded, or found to be none that can be
        self._recording: _Recording | None = None

    def run(self, ids: Tensor, new_lens: list[int]) -> Tensor:
        """ids [B] int64, new_lens [B] (0: idle) -> final normed hidden states [B, H], valid until the next call; the
        cache counts the new tokens. As `Text.forward` with a decode step."""
        step = self.text.step(new_lens, self.cache, decode=True)
        key = ops.selection(), ops.decode_limit(max(self.cache.host_lens) + 1)
        if key == self._key and (self._recording is not None or (not self._tried and self._recordable())):
            x, ple = self.text.embed(ids)
            if self._recording is None:
                h = self._record(x, ple, step)
            else:
                h = self._recording.replay(_inputs(x, ple, step), self.times)
            self.cache.advance(new_lens)
            return h
        # The first one builds what is kept between steps, such as tables of angles, so that the next need not.
        self._tried = key == self._key
        self._key, self._recording = key, None
        return self.text(ids, step, self.cache)

    def _recordable(self) -> bool:
        like, names = self.text.norm.weight, model_ops(self.text.config)
        return all(ops.recordable(name, like.device, like.dtype) for name in names)

    def _record(self, x: Tensor, ple: Tensor | None, step: Step) -> Tensor:
        kernels, watch = torch.ops.gemma4_fast_cpu, _Watch()
        self._tried = True
        kernels.record_start()
        try:
            with watch:
                h = self.text.decode(x, ple, step, self.cache)
        except BaseException:
            kernels.release(kernels.record_stop())
            self._key = None
            raise
        made = _Recording(kernels.record_stop(), watch.calls, _inputs(x, ple, step), h)
        if not watch.unknown:
            self._recording = made
        return h


class _Recording:
    """A recording in C++, released with this object: its number, the names of its calls, the tensors it reads and writes."""

    def __init__(self, number: int, calls: list[str], inputs: list[Tensor], output: Tensor) -> None:
        self.number, self.calls, self.inputs, self.output = number, calls, inputs, output
        weakref.finalize(self, torch.ops.gemma4_fast_cpu.release, number)

    def replay(self, inputs: list[Tensor], times: dict[str, float] | None = None) -> Tensor:
        torch._foreach_copy_(self.inputs, inputs)
        if times is None:
            torch.ops.gemma4_fast_cpu.replay(self.number, None)
            return self.output
        seconds = torch.empty(len(self.calls), dtype=torch.float64)
        torch.ops.gemma4_fast_cpu.replay(self.number, seconds)
        for name, took in zip(self.calls, seconds.tolist(), strict=True):
            times[name] = times.get(name, 0.0) + took
        return self.output


def _inputs(x: Tensor, ple: Tensor | None, step: Step) -> list[Tensor]:
    """Everything that differs from one decode step to the next."""
    assert step.kv_lens is not None
    angles = [part for pair in step.angles.values() for part in pair]
    return [x, *([] if ple is None else [ple]), step.kv_lens, *angles, *step.rows.values()]


class _Watch(TorchDispatchMode):
    """Notes the kernels called, and what computes a tensor and is no kernel of ours: a replay would not do it again."""

    ALLOCATIONS = frozenset(("empty", "empty_like", "new_empty"))

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "gemma4_fast_cpu":
            self.calls.append(name)
        elif name not in self.ALLOCATIONS:
            views = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            made = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, Tensor)]
            if func._schema.is_mutable or any(o.untyped_storage().data_ptr() not in views for o in made):
                self.unknown.add(f"{func.namespace}::{name}")
        return out
