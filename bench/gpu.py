"""All that needs a GPU, in one command that ends within ten minutes: `make gpu`, or `python bench/gpu.py`.

The op table on the device in bf16, fp16 and fp32, the ops at true shapes on both backends for a GPU beside PyTorch's own,
26B-A4B with dummy weights, the checkers of memory and of races over a part of the table, 26B-A4B beside transformers, and a
profile of the CUDA kernels that are furthest from their floor. Nothing comes from the network. Each part has a
time of its own, and what one part finds does not keep the next from running; rows are written as they are made, into
bench/results/<machine>/. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gemma4_fast import cuda_build
from gemma4_fast.bench.machine import label, machine
from gemma4_fast.triton.common import TARGETS

ROOT = Path(__file__).resolve().parents[1]
# The ops whose gaps matter most come first: time may run out.
OPS = "moe,moe_decode,gqa_decode,gqa_prefill,linear,logits,geglu_mlp,grouped_gemm,route_topk,qkv_norm_rope,norm_add_norm,"
OPS += "moe_norm_add_norm,moe_feed_forward,sample"
CHECKED = "odd or ring or idle or skewed or empty_experts or ties or few or wrapped"  # cases that are small enough for checkers
GRACE = 6  # seconds between asking a part to stop, so that it writes its rows, and ending it


@dataclass(frozen=True)
class Part:
    """seconds: when it is stopped, which fails it unless `may_stop`: rows come one by one. program, module: without which it is
    left out."""

    name: str
    seconds: int
    command: list[str]
    may_stop: bool = False
    program: str = ""
    module: str = ""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """The program or module that it wants and that is not there, if there is one."""
        if self.program and shutil.which(self.program) is None:
            return self.program
        return self.module if self.module and importlib.util.find_spec(self.module) is None else ""


def all_of(*commands: list[str]) -> list[str]:
    """One command that runs all of them, one after another; it fails at the first that does."""
    return commands[0] if len(commands) == 1 else ["sh", "-ec", "\n".join(map(shlex.join, commands))]


def parts(folder: Path, python: str = sys.executable) -> Iterator[Part]:
    jobs = min(12, os.cpu_count() or 1)
    nvidia = torch.version.hip is None
    major, minor = torch.cuda.get_device_capability() if nvidia else (0, 0)
    compiling = []  # which takes longer than running, and has all cores here
    if nvidia and cuda_build.find_nvcc():
        why_not = "from gemma4_fast.ops.table import backend_missing; import sys; sys.exit(backend_missing('cuda', 'cuda'))"
        compiling.append([python, "-c", why_not])
    if (target := f"sm_{major}{minor}") in TARGETS:
        command = [python, str(ROOT / "tests/triton_compiled.py"), "--target", target, "--keep-cache", "--jobs", str(jobs)]
        compiling.append(command)
    if compiling:
        yield Part("compile", 55, all_of(*compiling))
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]
    cuda, triton, tests = str(ROOT / "tests/test_cuda.py"), str(ROOT / "tests/test_triton.py"), [*test]
    if importlib.util.find_spec("transformers"):
        tests.append(str(ROOT / "tests/test_accelerate.py::test_on_a_gpu"))
    many = ["-n", str(jobs)] if importlib.util.find_spec("xdist") else []
    yield Part("tests", 95, [*tests, cuda, triton, *many])
    bench = [python, "-m", "gemma4_fast", "bench"]
    file = folder / "gpu-ops.jsonl"
    rows = ["--backend", "cuda,triton,torch" if nvidia else "triton,torch", "--seconds", "0.1", "--append", "-o", str(file)]
    yield Part("ops", 95, [*bench, "ops", "--op", OPS, "--rivals", *rows], may_stop=True)
    ours = ["--backend", "auto,triton" if nvidia else "triton"]
    model = [*bench, "model", "--config", "26b-a4b", *ours, "--append", "-o", str(folder / "gpu-model.jsonl")]
    deep = [*model, "--rounds", "3", "--depth", "1K"]
    yield Part("model", 45, [*deep, "--decode", "64"], may_stop=True)
    yield Part("model, int4", 25, [*deep, "--decode", "64", "--quantize", "int4"], may_stop=True)
    yield Part("model, batch 64", 25, [*deep, "--decode", "32", "--batch", "64"], may_stop=True)
    check = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    small = ["-x", "-k", f"test_matches_reference and ({CHECKED}) and bfloat16"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else the checker sees one large allocation
    checker = dict(program="compute-sanitizer", env=uncached)
    yield Part("memory checker", 45, [*check, "memcheck", *test, cuda, triton, *small], **checker)
    if nvidia:  # Triton's barriers are the compiler's
        races, barriers = ([*check, tool, *test, cuda, *small] for tool in ("racecheck", "synccheck"))
        yield Part("race checker", 35, all_of(races, barriers), **checker)
    beside = [*model, "--rounds", "2", "--prompt", "128", "--decode", "16", "--peers"]
    theirs = dict(may_stop=True, module="transformers")
    yield Part("transformers", 30, [*beside, "transformers,accelerate"], **theirs)  # cut to what fits twice, if need be
    # By itself, as compiling may take all of its time: nothing is counted before everyone has warmed up. A fifth of the model,
    # since each layer is compiled.
    fifth = ["--layers", "6", "--vocab", "52428"]
    yield Part("torch.compile", 25, [*beside, "torch.compile", *fifth], **theirs)
    profile = [python, str(ROOT / "bench/furthest.py"), str(file), "-o", str(folder / "profile.txt")]
    yield Part("profile", 25, profile, may_stop=True, program="ncu")


def run(part: Part) -> str:
    """ "ok", or why not. Its output is shown as it comes."""
    if part.missing:
        return f"left out: there is no {part.missing} here"
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **part.env}
    process = subprocess.Popen(part.command, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(part.seconds)
        return "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {part.seconds} s{'; the rows it has made count' if part.may_stop else ''}"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a part that is still running to stop, which ends its own processes too; then makes it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # what it has started and left behind, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="PART", help="this part alone, as the summary names it; may be repeated"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 2
    folder = args.results / label(machine(torch.device("cuda", 0)))
    chosen = list(parts(folder))
    if unknown := set(args.only or ()) - {part.name for part in chosen}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in chosen)}")
    folder.mkdir(parents=True, exist_ok=True)
    told: list[tuple[Part, float, str]] = []
    for part in chosen:
        if args.only and part.name not in args.only:
            continue
        print(f"\n==== {part.name}: {' '.join(part.command)}", flush=True)
        start = time.perf_counter()
        how = run(part)
        told.append((part, time.perf_counter() - start, how))
    print("\n==== summary")
    for part, seconds, how in told:
        print(f"{part.name:18} {seconds:6.1f} s  {how}")
    print(f"rows: {folder}")
    fine = ("ok", "left out"), ("ok", "left out", "stopped")
    return int(not all(how.startswith(fine[part.may_stop]) for part, _, how in told))


if __name__ == "__main__":
    sys.exit(main())
