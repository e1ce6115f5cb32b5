"""This package as a contender: what `Gemma4.generate` does, timed token by token."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from gemma4_fast import Gemma4, Gemma4Config, __version__, verify
from gemma4_fast.bench.dummy import dummy
from gemma4_fast.cache import KVCache
from gemma4_fast.generate import Session
from gemma4_fast.graph import DecodeGraph
from gemma4_fast.ops.table import Op
from gemma4_fast.sampling import GREEDY

Timed = tuple[list[float], list[list[int]]]


class Unsupported(Exception):
    """See worker.py."""


class Peer:
    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["device"] == "cpu":
            torch.set_num_threads(spec["threads"])
        options: dict[str, Any] = {
            "dtype": getattr(torch, spec["dtype"]),
            "device": torch.device(spec["device"]),
            "quantize": spec["quantize"],
        }
        if spec["path"] is not None:
            options |= {"check_memory": False}  # the plan was compared with the free memory
            self.model = Gemma4.from_pretrained(spec["path"], check=False, progress=False, **options)
        else:
            self.model = dummy(Gemma4Config.from_dict(spec["config"]), seed=spec["seed"], **options)
        self._kept: tuple[list[list[int]], KVCache, DecodeGraph] | None = None
        return {"version": __version__}

    def check(self, variant: str) -> tuple[bool, str]:
        """The self-check of one layer of each kind, on this backend."""
        self._use(variant)
        report = verify(self.model, level="quick")
        return report.ok, report.verdict()

    def _use(self, variant: str) -> None:
        """A variant is a backend, or "" for the automatic choice."""
        self.model.backend = variant or None

    def prompt(self, variant: str, ids: list[list[int]], new: int) -> tuple[float, list[float], list[list[int]]]:
        self._use(variant)
        tokens: list[list[int]] = [[] for _ in ids]
        times = [time.perf_counter()]
        session = Session(self.model, ids, max_new_tokens=new, stop_token_ids=())
        for step in session.run():
            times.append(time.perf_counter())
            for token in step:
                tokens[token.sequence].append(token.id)
        took = [b - a for a, b in itertools.pairwise(times)]
        return took[0], took[1:], tokens

    def depth(self, variant: str, ids: list[list[int]], new: int) -> Timed:
        """The cache is filled with noise of a norm's scale: a decode step takes as long over it as over a prompt's."""
        self._use(variant)
        model, batch, length = self.model, len(ids), len(ids[0])
        if self._kept is None or self._kept[0] != ids:
            self._kept = None
            cache = model.new_cache(batch, length + new)
            for layer in cache.own():
                for t in (layer.k, layer.v):
                    if t is not None:
                        t.normal_()
            self._kept = ids, cache, DecodeGraph(model, cache)
        _, cache, graph = self._kept
        cache.host_lens = [length] * batch
        cache.lens.fill_(length)
        last = torch.tensor([row[-1] for row in ids], device=model.device)
        out, times = [], [time.perf_counter()]
        for _ in range(new):
            with model.running():
                last = graph.run(last, [1] * batch, choose=GREEDY)
                tokens = last.tolist()  # as generate does
            if min(tokens) < 0:
                raise FloatingPointError("the model's activations are not finite")
            out.append(tokens)
            times.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(times)], [list(row) for row in zip(*out, strict=True)]

    def score(self, variant: str, ids: list[list[int]], top: int) -> list[tuple[int, float]]:
        self._use(variant)
        logits = self.model(torch.tensor(ids, device=self.model.device))[0, -1].float()
        values, tokens = logits.log_softmax(-1).topk(top)
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    def step(self, variant: str, ids: list[list[int]], new: int) -> tuple[list[float], dict[str, list[float]], int | None]:
        """Seconds of each decode step after this prompt; and in as many further steps, of the ops by name. Those of a recorded
        step take their own times; of one that is not, each op is called by itself and waited for. The rest of those steps is
        "between ops". Then how many kernels a step launches, on a GPU."""
        _, steps, _ = self.prompt(variant, ids, new + 1)
        session = Session(self.model, ids, max_new_tokens=new + 4, stop_token_ids=())
        run = session.run()
        for _ in range(3):  # the prompt, and if nothing is left of an earlier one a first step, and one to record
            next(run)
        launches = _kernels_of(lambda: next(run)) if self.model.device.type == "cuda" else None
        parts: dict[str, list[float]] = {}
        assert session.graph is not None
        for _ in range(new):
            with _timed_ops(self.model.device) as by_op:
                session.graph.times = by_op
                start = time.perf_counter()
                next(run)
                took = time.perf_counter() - start
            by_op["between ops"] = took - sum(by_op.values())
            for name, seconds in by_op.items():
                parts.setdefault(name, []).append(seconds)
        return steps, parts, launches


def _kernels_of(run: Callable[[], object]) -> int:
    """How many kernels of the GPU it runs: those of a replayed graph are counted one by one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_gpu)


class _timed_ops:
    """Inside: every call of an op is timed, the parts of a composed op with it. On a GPU the device is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._by_op: dict[str, float] = {}
        self._inside = False

    def __enter__(self) -> dict[str, float]:
        self._call, outer = Op.__call__, self

        def timed(op: Op, *args: Any) -> Any:
            if outer._inside:
                return outer._call(op, *args)
            outer._inside = True
            outer._wait()
            start = time.perf_counter()
            try:
                result = outer._call(op, *args)
                outer._wait()
                return result
            finally:
                outer._inside = False
                outer._by_op[op.name] = outer._by_op.get(op.name, 0.0) + time.perf_counter() - start

        Op.__call__ = timed  # type: ignore[method-assign, assignment]
        return self._by_op

    def __exit__(self, *_: object) -> None:
        Op.__call__ = self._call  # type: ignore[method-assign]
