"""All that needs a GPU, in one command that ends within ten minutes: `make gpu`, or `python bench/gpu.py`.

The op table on the device in bf16, fp16 and fp32, the memory checker over a part of it, the ops at true shapes, and 26B-A4B
with dummy weights. Needs nothing from the network. Each part has a time of its own, and what one part finds does not keep the
next
from running; rows are written as they are made, into bench/results/<machine>/. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma4_fast.bench.machine import label, machine

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "26b-a4b"
CHECKED = "odd or ring or idle or skewed or empty_experts or one_token"  # cases small enough for the memory checker


@dataclass(frozen=True)
class Part:
    """seconds: when it is stopped. wants: a program without which it is left out."""

    name: str
    seconds: int
    command: list[str]
    wants: str = ""


def parts(folder: Path, python: str = sys.executable) -> list[Part]:
    test = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", str(ROOT / "tests/test_triton.py")]
    many = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []  # compiling takes the time
    bench = [python, "-m", "gemma4_fast", "bench"]
    small = ["-k", f"test_matches_reference and ({CHECKED}) and float16 and not bfloat16"]
    model = [
        *bench,
        "model",
        "--config",
        SHAPES,
        "--backend",
        "triton",
        "--rounds",
        "3",
        "--append",
        "-o",
        str(folder / "gpu-model.jsonl"),
    ]
    return [
        Part("tests", 170, [*test, "-q", *many]),
        Part("ops", 150, [*bench, "ops", "--backend", "triton,torch", "--seconds", "0.1", "-o", str(folder / "gpu-ops.jsonl"),
        "--append"]), Part("model", 80, [*model, "--depth", "1K", "--decode", "64"]), Part("model, batch 64", 60, [*model,
        "--depth", "1K", "--decode", "32", "--batch", "64"]), Part("memory checker", 90, ["compute-sanitizer", "--tool",
        "memcheck", "--error-exitcode", "9", *test, "-q", "-x", *small],
             wants="compute-sanitizer"),
    ]  # fmt: skip


def run(part: Part) -> str:
    """ "ok", or why not. Its output is shown as it comes."""
    if part.wants and shutil.which(part.wants) is None:
        return f"left out: there is no {part.wants} here"
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if part.wants:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else it sees one large allocation
    process = subprocess.Popen(part.command, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {part.seconds} s; what it had done counts"
    return "ok" if code == 0 else f"exit code {code}"


def main() -> int:
    names = ("tests", "ops", "model", "model, batch 64", "memory checker")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names, action="append", help="this part; may be repeated")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 2
    folder = args.results / label(machine(torch.device("cuda", 0)))
    folder.mkdir(parents=True, exist_ok=True)
    told: list[tuple[str, float, str]] = []
    for part in parts(folder):
        if args.only and part.name not in args.only:
            continue
        print(f"\n==== {part.name}: {' '.join(part.command)}", flush=True)
        start = time.perf_counter()
        how = run(part)
        told.append((part.name, time.perf_counter() - start, how))
    print("\n==== summary")
    for name, seconds, how in told:
        print(f"{name:18} {seconds:6.1f} s  {how}")
    print(f"rows: {folder}")
    return int(any(how != "ok" and not how.startswith("left out") for _, _, how in told))


if __name__ == "__main__":
    sys.exit(main())
