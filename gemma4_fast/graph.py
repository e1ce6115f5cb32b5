"""The decode step, recorded once and run again: on a GPU as a CUDA graph, and the same for the CPU kernels.

A step of one token for each sequence is the same calls with the same shapes every time. Op by op, Python, checks and
allocations cost some tens of microseconds a call, more where a step's weights have taken the caches; a replay costs less than
one for all of them. All of a step is in it, from the tokens' ids to their successors', if those are the likeliest, or drawn by
a kernel of ours.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_fast import ops
from gemma4_fast.cache import KVCache
from gemma4_fast.layers import Quantizable, Step, model_ops
from gemma4_fast.sampling import Sampling

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

log = logging.getLogger("gemma4_fast")


class DecodeGraph:
    """The decode steps of one model with one cache. `run` gives the same bits as running op by op, which it does for as
    long as there is nothing to replay: the first step under a selection of backends, and all of them where an op cannot be
    recorded: on a CPU one that no kernel of ours serves, on a GPU one that waits for the device.

    Parameters may change their values, and the model as `Gemma4.changes` counts it; a parameter that becomes another tensor
    by other ways is not seen, unless one asks (`fits`).
    """

    KEPT = 4  # recordings: of each way to choose tokens, or none, and of a long context or a short one

    def __init__(self, model: Gemma4, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        weights = _weights(model)
        self.changes, self._addresses, self.weight_bytes = model.changes, _addresses(weights), sum(w.nbytes for w in weights)
        self.times: dict[str, float] | None = None  # a dict collects the seconds of each op's replayed calls, by its name
        self.recordings: dict[Any, _Recording | _Captured] = {}  # by what such a step depends on
        self._key: Any = None  # that of the step before
        self._tried = False  # whether such a step was to be recorded, and is none that can be
        self._refused = False  # a GPU's: whether capturing has failed

    def run(self, ids: Tensor, new_lens: list[int], *, choose: Sampling | None = None, uniform: Tensor | None = None) -> Tensor:
        """ids [B] int64, new_lens [B] (0: idle) -> final normed hidden states [B, H]; or with `choose`, which `can_choose`, the
        next ids [B] int64 (-1 for a hidden state that is not finite), drawn by uniform [B] fp32 if not greedy. Valid until the
        next call. The cache counts the new tokens."""
        if choose is None or choose.greedy:
            uniform = None
        elif uniform is None:
            raise ValueError("a step that draws its tokens needs uniform numbers [B]")
        longest = max((have + 1 for have, n in zip(self.cache.host_lens, new_lens, strict=True) if n), default=1)
        if longest > self.cache.max_len or not all(n in (0, 1) for n in new_lens):
            raise ValueError(f"a step of {new_lens} tokens to {self.cache.host_lens} of at most {self.cache.max_len}")
        if self.changes != self.model.changes:  # its weights may be other tensors
            self.changes, self._key = self.model.changes, None
            self.recordings.clear()
        key = choose, ops.selection(), ops.decode_limit(longest)
        choice = _Choice(choose, uniform)
        if self.on_gpu and self.times is not None:  # a CUDA graph has no times of its parts: whoever asks times the calls
            return self._op_by_op(ids, new_lens, choice)
        to_record = key == self._key and key not in self.recordings and not self._tried and self._recordable()
        if to_record and self.on_gpu:
            self._capture(ids, new_lens, choice)
        if key in self.recordings:
            self._key, self._tried = key, False
            out = self.recordings[key].replay(ids, new_lens, uniform, self.times)
        elif to_record and not self.on_gpu:
            out = self._record(ids, new_lens, choice)
        else:
            # The first one builds what is kept between steps, such as tables of angles, so that the next need not.
            self._tried = key == self._key
            self._key = key
            return self._op_by_op(ids, new_lens, choice)
        self.cache.count(new_lens)
        return out

    @property
    def recorded(self) -> bool:
        """Whether the last step was replayed, or is recorded."""
        return self._key in self.recordings

    def fits(self, model: Gemma4) -> bool:
        """Whether what is recorded reads this model's weights: they may have become other tensors in ways that `changes` does
        not count."""
        return self.changes == model.changes and self._addresses == _addresses(_weights(model))

    def _keep(self, recording: _Recording | _Captured) -> None:
        while len(self.recordings) >= self.KEPT:
            del self.recordings[next(iter(self.recordings))]
        self.recordings[self._key] = recording

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def can_choose(self, h: Tensor, choose: Sampling) -> bool:
        """Whether the choice of tokens by hidden states like h [B, H] can be in the step. On a CPU the likeliest alone."""
        return choose.greedy or (self.on_gpu and self.model.chooses_in_one(h, choose))

    def finish(self, h: Tensor, choose: Sampling | None = None, uniform: Tensor | None = None) -> Tensor:
        """Of hidden states [B, H], what `run` returns: of a prompt's last ones too."""
        return h if choose is None else self.model.choose(h, choose, uniform)

    def _op_by_op(self, ids: Tensor, new_lens: list[int], choice: _Choice) -> Tensor:
        step = self.model.model.step(new_lens, self.cache, decode=True)
        return self.finish(self.model.model(ids, step, self.cache), *choice)

    def _recordable(self) -> bool:
        return not self._refused and recordable(self.model)

    def _capture(self, ids: Tensor, new_lens: list[int], choice: _Choice) -> None:
        """A CUDA graph of the step, to be replayed; none, from here on, where an op cannot be in one."""
        inputs, text, cache = _Inputs(ids, new_lens, choice.uniform), self.model.model, self.cache

        def step() -> Tensor:
            now = text.step(new_lens, cache, decode=True, going=inputs.going)
            out = self.finish(text.run(inputs.ids, now, cache), choice.sampling, inputs.uniform)
            cache.lens.add_(inputs.going)
            return out

        # Not `step`, which knows this object: what is dropped is to be freed at once.
        reads = cache, _weights(self.model), list(text.kept())
        self._tried = True
        try:
            self._keep(_Captured(step, inputs, reads))
        except RuntimeError as error:  # what capturing an op raises that waits for the device
            self._refused = True
            why = "since no CUDA graph can capture them"
            log.warning("gemma4_fast: decode steps run op by op, %s: %s", why, error)
        except BaseException:
            self._key = None
            raise

    def _record(self, ids: Tensor, new_lens: list[int], choice: _Choice) -> Tensor:
        kernels, watch, inputs = torch.ops.gemma4_fast_cpu, _Watch(), _Inputs(ids, new_lens)
        now = self.model.model.step(new_lens, self.cache, decode=True)
        slots = torch.tensor(list(now.rows))
        self._tried = True
        try:
            kernels.record_start()
            with watch, ops.shared_scratch():
                step = self._step(now, inputs, slots)
                out = self.finish(self.model.model.run(inputs.ids, step, self.cache), choice.sampling)
                kernels.count_tokens(self.cache.lens, inputs.going)
            made = _Recording(kernels.record_stop(), watch.calls, inputs, out)
        except BaseException:
            kernels.record_drop()
            self._key = None
            raise
        if not watch.unknown:
            self._keep(made)
        return out

    def _step(self, now: Step, inputs: _Inputs, slots: Tensor) -> Step:
        """The step `now`, but what differs from one to the next comes from kernels, so that a replay finds it out anew."""
        lens = self.cache.lens
        positions, kv_lens = torch.empty_like(now.positions), torch.empty_like(lens)
        rows = positions.new_empty(len(now.rows), len(positions))
        torch.ops.gemma4_fast_cpu.decode_rows(lens, inputs.going, slots, positions, kv_lens, rows)
        anew = dict(zip(now.rows, rows.unbind(), strict=True))
        return replace(now, positions=positions, kv_lens=kv_lens, angles=self.model.model.angles(positions), rows=anew)


def recordable(model: Gemma4) -> bool:
    """Whether the selection in force gives each of the model's ops a kernel that can be in a recorded step."""
    return all(ops.recordable(name, model.device, model.dtype) for name in model_ops(model.config))


class Spares:
    """What generations that have ended leave to the model's next ones: by number of prompts a cache, and with it the recorded
    decode steps. So a step is recorded once for a batch size, not once a call. Together they have at most one in SHARE of the
    weights' bytes; the oldest goes first. What is copied or pickled with a model is an empty one."""

    SHARE = 8

    def __init__(self) -> None:
        self._graphs: dict[int, DecodeGraph] = {}

    def take(self, model: Gemma4, batch: int, room: int) -> DecodeGraph | None:
        """One with an empty cache for `batch` sequences of `room` tokens, if there is one; it is the caller's alone."""
        graph = self._graphs.pop(batch, None)  # in one step: another thread gets None
        if graph is None or graph.cache.max_len < room or not graph.fits(model):
            return None
        graph.model = model
        graph._refused, graph._key = False, None  # what could not be captured is tried again: there may be more memory now
        graph.cache.clear()
        return graph

    def give(self, graph: DecodeGraph) -> None:
        """Of a generation that ended between two steps."""
        most = graph.weight_bytes // self.SHARE
        if not graph.recordings or graph.changes != graph.model.changes or graph.cache.nbytes > most:
            return
        graph.times = None
        del graph.model  # else the model, which has this, would keep itself alive
        self._graphs.pop(graph.cache.batch_size, None)
        while self._graphs and graph.cache.nbytes + sum(g.cache.nbytes for g in self._graphs.values()) > most:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[graph.cache.batch_size] = graph

    def clear(self) -> None:
        """Frees them all."""
        self._graphs.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def __deepcopy__(self, _: object) -> Spares:
        return Spares()

    def __reduce__(self) -> tuple[type[Spares], tuple[()]]:
        return Spares, ()


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The model and all modules within it, in some order: as `modules()`, in a fraction of its time."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]


def _weights(model: Gemma4) -> list[Tensor]:
    """All of them, in some order. Looked at in each generation, so without what makes `model.parameters()` slow."""
    found = list[Tensor]()
    for module in modules_of(model):
        found += [w for w in module._parameters.values() if w is not None]
        if isinstance(module, Quantizable) and not module._parameters:  # it is quantized as a whole
            found += [t for w in module.quantized().values() for t in (w.data, w.scale)]
    return found


def _addresses(weights: list[Tensor]) -> list[int]:
    return [w.data_ptr() for w in weights]


class _Choice(NamedTuple):
    """How a step chooses the next tokens: not at all, or so, by uniform [B] if it draws."""

    sampling: Sampling | None = None
    uniform: Tensor | None = None


class _Inputs:
    """What a replay is given: ids [B], of each sequence whether it goes on, [B] int32, and what it draws by, [B] fp32."""

    def __init__(self, ids: Tensor, new_lens: list[int], uniform: Tensor | None = None) -> None:
        self.ids, self.new_lens = ids.clone(), list(new_lens)
        self.going = torch.tensor(new_lens, dtype=torch.int32, device=ids.device)
        self.uniform = None if uniform is None else uniform.clone()

    def set(self, ids: Tensor, new_lens: list[int], uniform: Tensor | None = None) -> None:
        if ids.shape != self.ids.shape:
            raise ValueError(f"ids have shape {list(ids.shape)}, expected {list(self.ids.shape)}")
        self.ids.copy_(ids)
        if self.uniform is not None:
            self.uniform.copy_(cast(Tensor, uniform))
        if new_lens != self.new_lens:
            self.going.copy_(torch.tensor(new_lens))
            self.new_lens = list(new_lens)  # once they are


class _Captured:
    """A CUDA graph, and the tensors it reads and writes. reads: what the step refers to. It must live as long as the graph,
    which knows addresses alone."""

    def __init__(self, step: Callable[[], Tensor], inputs: _Inputs, reads: object) -> None:
        self.inputs, self.graph, self.reads = inputs, torch.cuda.CUDAGraph(), reads
        device = inputs.ids.device
        stream = torch.cuda.Stream(device)
        # Not torch.cuda.graph, which leaves its own stream the current one if the capture's end raises. thread_local: what
        # other threads do with the device is their affair.
        with torch.cuda.device(device), torch.cuda.stream(stream), ops.shared_step():
            torch.cuda.synchronize(device)
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = step()  # nothing runs yet
            finally:
                self.graph.capture_end()

    def replay(self, ids: Tensor, new_lens: list[int], uniform: Tensor | None, times: dict[str, float] | None = None) -> Tensor:
        self.inputs.set(ids, new_lens, uniform)
        with torch.cuda.device(self.inputs.ids.device):
            self.graph.replay()
        return self.output


class _Recording:
    """A recording in C++, released with this object: its number, the names of its calls, the tensors it reads and writes."""

    def __init__(self, number: int, calls: list[str], inputs: _Inputs, output: Tensor) -> None:
        self.number, self.calls, self.inputs, self.output = number, calls, inputs, output
        weakref.finalize(self, torch.ops.gemma4_fast_cpu.release, number)

    def replay(self, ids: Tensor, new_lens: list[int], uniform: Tensor | None, times: dict[str, float] | None = None) -> Tensor:
        self.inputs.set(ids, new_lens, uniform)
        if times is None:
            ops.cpu_kernels.replay(self.number, None)
            return self.output
        seconds = torch.empty(len(self.calls), dtype=torch.float64)
        ops.cpu_kernels.replay(self.number, seconds)
        for name, took in zip(self.calls, seconds.tolist(), strict=True):
            times[name] = times.get(name, 0.0) + took
        return self.output


class _Watch(TorchDispatchMode):
    """Notes the kernels called, and what computes a tensor and is no kernel of ours: a replay would not do it again."""

    ALLOCATIONS = frozenset(("empty", "empty_like", "new_empty"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks each mode; "yes", what it assumes, costs an import of torch._dynamo: 0.7 s at a process's first token."""
        return False

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
