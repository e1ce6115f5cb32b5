"""Sampling: contenders take turns, on data that is in no cache; and the roofline they are held against.

On these terms two runs agree although machines drift: whatever slows one contender down for a while slows the others too,
and the machine's own limits are sampled between their calls.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma4_fast import native
from gemma4_fast.bench.load import Load
from gemma4_fast.bench.machine import free_bytes
from gemma4_fast.bench.rows import Row, Spread
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.ops import shared_step
from gemma4_fast.quant import QuantizedWeight

Call = Callable[[], Any]
T = TypeVar("T")
MIN_ROUNDS, MAX_ROUNDS = 5, 1000
MATMUL = {"cpu": 2048, "cuda": 8192}  # rows, columns and depth of the product that gives the matmul rate, if it is quick
QUICK = 0.05  # seconds that it may take: some processors have no fast fp16
PROBE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
RATE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cache_bytes(device: torch.device) -> int:
    """Size of the last caches before memory: a GPU's L2; of the L3s that this process's processors have, the sum (32 MiB where
    the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[tuple[int, str], int] = {}  # (level, the processors that share it)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
    for cpu in cpus:
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            level, shared, size = ((index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            found[int(level), shared] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] if size[-1:] in "KM" else int(size)
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or 32 << 20


class Stopwatch:
    """Seconds of one call on this device: wall clock on a CPU, events around it on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, call: Call) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start_event, end_event = self._events
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3


class Rotation:
    """Copies of a call's arguments, handed out in turn, so that none is in a cache when its turn comes.

    touched: bytes that one call reads. `cold` says whether the copies (at most `limit` of them, in at most a quarter of the
    free memory) exceed twice the cache.
    """

    def __init__(self, args: Mapping[str, Any], touched: int, device: torch.device, limit: int = 8192) -> None:
        whole = 2 * cache_bytes(device)
        one = sum(v.nbytes for v in args.values() if isinstance(v, (Tensor, QuantizedWeight)))
        free = free_bytes(device)
        room = limit if free is None else max(1, free // 4 // max(1, one))
        count = min(limit, room, max(1, -(-whole // max(1, touched))))
        self.cold = count * touched >= whole
        self.copies = [tuple(args.values())]
        for _ in range(count - 1):
            self.copies.append(tuple(_copied(v) for v in args.values()))
        self._turn = itertools.cycle(self.copies)

    def call(self, fn: Callable[..., Any]) -> Call:
        """fn on the next copy, whoever had the one before."""
        return lambda: fn(*next(self._turn))

    def warm(self, fn: Callable[..., Any], seconds: float = 1.0) -> None:
        """fn on every copy, for at most so long: what a backend makes once for each weight is made before the clock runs."""
        start = time.perf_counter()
        for args in self.copies:
            fn(*args)
            if time.perf_counter() - start > seconds:
                return


def _copied(value: Any) -> Any:
    """A copy. A tensor's lies in huge pages, as weights and caches do."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)  # a quantized weight, or a number
    new = torch.empty_like(value)
    native.use_huge_pages(new)
    return new.copy_(value)


def _roomy(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`count` elements, not yet written, in huge pages where the system has them."""
    new = torch.empty(count, dtype=dtype, device=device)
    native.use_huge_pages(new)
    return new


def captured(calls: Sequence[Call]) -> tuple[Call, Any]:
    """One CUDA graph of all the calls, and what the last of them returns, which each replay writes anew.

    The calls have run before. UnsupportedError if one of them waits for the device, which a graph cannot.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls[0]()
    except RuntimeError as e:
        raise UnsupportedError(f"waits for the device, so no graph can hold it: {str(e).splitlines()[0]}") from e
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph, out = torch.cuda.CUDAGraph(), None
    with torch.cuda.stream(side):  # torch.cuda.graph would leave its own stream current if the capture's end raised
        for call in calls:  # on this stream too, whose memory is its own
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            with shared_step():  # not the calls before: what these share must be the graph's own
                for call in calls:
                    out = call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay, out


def turns(
    contenders: Mapping[str, Call], stopwatch: Stopwatch, seconds: float, every: Mapping[str, Call] | None = None
) -> dict[str, list[float]]:
    """Samples in microseconds of each contender, and of each probe in `every`, for about `seconds` in all.

    Each round starts with another contender. Probes run at the start and then as often as they take a third of the time.
    """
    names, probes = list(contenders), dict(every or {})
    samples: dict[str, list[float]] = {name: [] for name in (*names, *probes)}
    for call in contenders.values():
        stopwatch.seconds(call)
    start, probing = time.perf_counter(), 0.0
    for number in range(MAX_ROUNDS):
        spent = time.perf_counter() - start
        if number >= MIN_ROUNDS and spent >= seconds:
            break
        if probing <= spent / 3:
            before = time.perf_counter()
            for name, probe in probes.items():
                samples[name].append(stopwatch.seconds(probe) * 1e6)
            probing += time.perf_counter() - before
        for name in rotated(names, number):
            samples[name].append(stopwatch.seconds(contenders[name]) * 1e6)
    return samples


def rotated(items: Sequence[T], by: int) -> Iterator[T]:
    """The items, starting with another one for each `by`."""
    by %= max(1, len(items))
    return itertools.chain(items[by:], items[:by])


class Roofline:
    """What this machine does at its best: bytes read and copied per second, and products per second, per dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stopwatch = device, Stopwatch(device)
        count = max(PROBE_BYTES[device.type], 8 * cache_bytes(device)) // 4
        # Written, so that they are really there; in huge pages, as weights and caches are.
        self._from, self._to = (_roomy(count, torch.float32, device).fill_(1) for _ in range(2))
        self._products: dict[torch.dtype, tuple[Call, int, float]] = {}

    @property
    def nbytes(self) -> int:
        return self._from.nbytes

    def read(self) -> None:
        """Reads `nbytes` once. A sum is the plainest thing that does, and none was found to be faster."""
        self._from.sum()

    def copy(self) -> None:
        """Reads and writes `nbytes`."""
        self._to.copy_(self._from)

    def product(self, dtype: torch.dtype) -> tuple[Call, int, float]:
        """A square product in this dtype, its flops, and the seconds it took at best: as large as is quick."""
        if dtype not in self._products:
            n, seconds = 256, 0.0
            while True:
                a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
                call: Call = functools.partial(torch.mm, a, b)
                seconds = min(self.stopwatch.seconds(call) for _ in range(3))
                if n >= MATMUL[self.device.type] or 8 * seconds > QUICK:
                    break
                n *= 2
            self._products[dtype] = call, 2 * n**3, seconds
        return self._products[dtype]

    def rows(self, when: str, dtypes: Sequence[torch.dtype] = RATE_DTYPES, seconds: float = 0.5) -> list[Row]:
        """kind "roofline", a row each for read, copy, and the product in each dtype."""
        made = []
        for name, call, moved in (("read", self.read, self.nbytes), ("copy", self.copy, 2 * self.nbytes)):
            made.append(self._row(name, when, call, seconds, bytes=moved))
        for dtype in dtypes:
            product, flops, _ = self.product(dtype)
            made.append(self._row(f"matmul {str(dtype).removeprefix('torch.')}", when, product, seconds, flops=flops))
        return made

    def _row(self, name: str, when: str, call: Call, seconds: float, **cost: Any) -> Row:
        load = Load()
        with load.measured():
            samples = turns({name: call}, self.stopwatch, seconds)[name]
        time_us = Spread.of(samples)
        return Row("roofline", name, "torch", params={"at": when}, time_us=time_us, other_load=load.others, **cost)

    def probes(self, flops: int, moved: int, dtype: torch.dtype) -> dict[str, Call]:
        """What to sample between the calls of a row of this cost: reading always, products where they may be the limit."""
        chosen: dict[str, Call] = {"read": self.read}
        product, of_product, seconds = self.product(dtype)
        reading = min(self.stopwatch.seconds(self.read) for _ in range(2))
        if flops * seconds / of_product > 0.3 * moved / self.nbytes * reading:
            chosen["product"] = product
        return chosen

    def of_samples(self, samples: Mapping[str, list[float]], dtype: torch.dtype) -> dict[str, float]:
        """The rates of the probes' samples.

        gb_s and gflop_s are medians; with _p20 and _p80 at the end, the spread.
        """
        found = {}
        for probe, name, digits in (("read", "gb_s", 2), ("product", "gflop_s", 1)):
            if not samples.get(probe):
                continue
            done = self.nbytes if probe == "read" else self.product(dtype)[1]
            took = Spread.of(samples[probe])
            found[name] = round(done / took.median / 1e3, digits)
            found[f"{name}_p20"] = round(done / took.p80 / 1e3, digits)
            found[f"{name}_p80"] = round(done / took.p20 / 1e3, digits)
        return found
