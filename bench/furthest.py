"""What NVIDIA's profiler says of the CUDA kernels that are furthest from their floor: `python bench/furthest.py ROWS -o FILE`.

ROWS: what `gemma4-fast bench ops --backend cuda` has measured here; the floor is the roofline's, measured beside each row.
Of the chosen ops the kernels of one call, after one that warms up, are profiled by `ncu`, in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from gemma4_fast import ops
from gemma4_fast.bench import rows
from gemma4_fast.bench.ops import BlockMaker
from gemma4_fast.bench.rows import Row

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
REFUSED = "ERR_NVGPUCTRPERM"  # the machine's owner keeps the counters to himself


def furthest(measured: Iterable[Row], count: int) -> list[Row]:
    """The newest row of each case on the cuda backend, in the order of their percents of the roofline, one of an op. Rows
    replayed from a graph if there are any: others hold the time that Python takes."""
    ours = [r for r in measured if (r.kind, r.contender, r.status, r.dtype) == ("op", "cuda", "ok", "bfloat16")]
    newest = {row.key: row for row in ours}
    graphs = [row for row in newest.values() if row.mode == "graph"]
    chosen: dict[str, Row] = {}
    for row in sorted(graphs or newest.values(), key=lambda row: row.percent_of_roofline or 0.0):
        if row.percent_of_roofline is not None:
            chosen.setdefault(row.name.split("/")[0], row)
    return list(chosen.values())[:count]


def call(name: str) -> None:
    """What is profiled: one call of the op with the case's inputs, and one before."""
    op_name, _, case = name.partition("/")
    op = ops.TABLE[op_name]
    args = {**op.bench_cases, **op.gpu_cases, **op.cases}[case](BlockMaker(torch.bfloat16, "cuda")).values()
    run = ops.bound(op, "cuda")
    with torch.inference_mode():
        run(*args)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run(*args)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profiled(name: str) -> tuple[int, str]:
    """ncu's exit code, and what it says."""
    ours = ["--kernel-name-base", "demangled", "--kernel-name", "regex:gemma4_fast::cuda"]
    sections = [part for section in SECTIONS for part in ("--section", section)]
    command = ["ncu", "--profile-from-start", "off", "--launch-count", "4", *ours, *sections, sys.executable, __file__]
    done = subprocess.run([*command, "--call", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", type=Path, nargs="?")
    p.add_argument("-o", "--output", type=Path)
    p.add_argument("--count", type=int, default=2, metavar="N", help="how many ops (default: 2)")
    p.add_argument("--call", metavar="OP/CASE", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.call:
        call(args.call)
        return 0
    if args.rows is None or args.output is None:
        p.error("a file of rows, and -o FILE")
    chosen = furthest(rows.read(args.rows), args.count) if args.rows.exists() else []
    if not chosen:
        print(f"no row of the cuda backend in {args.rows}: there is nothing to profile")
    args.output.unlink(missing_ok=True)
    for row in chosen:
        print(f"{row.name}: {row.percent_of_roofline:.0f}% of the roofline ({row.mode})", flush=True)
        code, said = profiled(row.name)
        with args.output.open("a", encoding="utf-8") as file:
            file.write(f"==== {row.name}: {row.percent_of_roofline:.0f}% of the roofline ({row.mode})\n{said}\n")
        print(said, flush=True)
        if REFUSED in said:
            print("this machine lets no one count: nothing is profiled")
            return 0
        if code:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
