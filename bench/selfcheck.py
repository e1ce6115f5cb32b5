"""What the self-check costs at true shapes.

    python bench/selfcheck.py --config 26b-a4b --quantize int4

The model is a slice with one layer of each kind and the true vocabulary, with random weights. Each
run prints a row: wall and CPU seconds, and the peak of memory above what the model takes. With
--profile the row also has the seconds of each part of the check.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gemma4_fast import Gemma4, Gemma4Config
from gemma4_fast.config import PRESETS
from gemma4_fast.verify import _Check, kinds_of, verify

PARTS = ("_window_edges", "_embedding", "_fast", "_attention", "_feed_forward", "_head")


def slice_of(config: Gemma4Config) -> Gemma4Config:
    """One layer of each kind, in the order in which the model has them."""
    kinds = [c for c in kinds_of(config) if c.index < config.first_shared_layer]
    types = [config.layer_types[c.index] for c in kinds]
    shared = types if config.num_kv_shared_layers else []
    return dataclasses.replace(
        config,
        num_hidden_layers=len(types) + len(shared),
        layer_types=tuple(types + shared),
        num_kv_shared_layers=len(shared),
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """The most memory that was resident inside, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self.start = self.highest = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, resident())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def extra(self) -> int:
        return self.highest - self.start


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
        result = call()
    figures = {
        "wall_s": round(time.perf_counter() - wall, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
        "extra_mb": round(peak.extra / 1e6, 1),
    }
    return result, figures


def timed_parts(spent: dict[str, list[float]]) -> None:
    """Wraps each part of the check, so that its seconds are added to `spent`."""
    for name in PARTS:
        right = getattr(_Check, name)

        def timed(*args: Any, _right: Any = right, _name: str = name, **options: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            out = _right(*args, **options)
            took = spent.setdefault(_name, [0.0, 0.0])
            took[0] += time.perf_counter() - wall
            took[1] += time.process_time() - cpu
            return out

        setattr(_Check, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="e2b,e4b,12b,26b-a4b,31b")
    parser.add_argument("--quantize", default="none,int8,int4")
    parser.add_argument("--level", default="quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also the seconds of each part")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spent: dict[str, list[float]] = {}
    if args.profile:
        timed_parts(spent)
    for name in args.config.split(","):
        for bits in args.quantize.split(","):
            quantize = None if bits == "none" else bits
            model = Gemma4.dummy(slice_of(PRESETS[name]), device="cpu", quantize=quantize)
            for run in range(args.repeat):
                spent.clear()
                report, figures = measured(lambda model=model: verify(model, level=args.level))
                row = {"config": name, "weights": quantize or "bf16", "run": run, **figures}
                row |= {"ok": report.ok, "comparisons": len(report.comparisons)}
                if spent:
                    row["parts"] = {k: [round(x, 3) for x in v] for k, v in spent.items()}
                print(json.dumps(row), flush=True)
                if not report.ok:
                    print(report.verdict(), flush=True)
            del model


if __name__ == "__main__":
    main()
