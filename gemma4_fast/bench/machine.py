"""Where a row was measured: processor, GPU, clocks, versions, commit; and how much memory there is to use."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import gemma4_fast
from gemma4_fast import native, terminal
from gemma4_fast.memory import available_bytes
from gemma4_fast.memory import free_bytes as free_bytes  # others here import it from this file


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _first(file: str, field: str) -> str | None:
    """The value of the first "field : value" line of one of /proc's files."""
    try:
        found = re.search(rf"^{field}\s*:\s*(.+)$", Path(file).read_text(), re.M)
    except OSError:
        return None
    return found[1].strip() if found else None


def cpu_name() -> str:
    return _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _cpu_mhz() -> float | None:
    """Mean over the processors, now."""
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return None
    return round(sum(map(float, found)) / len(found)) if found else None


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware as a row records it, without what changes (see `clocks`)."""
    features = native.cpu_features()
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "arch": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_flags": sorted(n for n, there in features.items() if there)
        if features is not None
        else [torch.backends.cpu.get_cpu_capability()],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    if (total := _first("/proc/meminfo", "MemTotal")) is not None:
        found["memory_bytes"] = int(total.split()[0]) << 10
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "gpu_arch": f"{gpu.major}.{gpu.minor}"}
    return {k: v for k, v in found.items() if v is not None}


def clocks(device: torch.device) -> dict[str, Any]:
    """What changes while a benchmark runs: clocks and load, at this moment."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    found: dict[str, Any] = {"cpu_mhz": _cpu_mhz(), "load_average": load}
    if device.type == "cuda":
        uuid = f"GPU-{getattr(torch.cuda.get_device_properties(device), 'uuid', '')}"
        query = "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit,driver_version"
        if (text := _output("nvidia-smi", query, "--format=csv,noheader", "-i", uuid)) is not None:
            names = "gpu_clock", "gpu_memory_clock", "gpu_power", "gpu_power_limit", "gpu_driver"
            found |= dict(zip(names, text.split(", "), strict=False))
    return {k: v for k, v in found.items() if v is not None}


def label(found: dict[str, Any]) -> str:
    """A machine as a folder name: "nvidia-h200", "amd-epyc-9b45-2-threads"."""
    text = found.get("gpu") or f"{found.get('cpu', 'unknown')} {found.get('threads', '?')} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|\d+-core|processor", "", str(text).lower())).strip("-")


def commit() -> str | None:
    """Of the checkout this package runs from, "+" at the end if its code has changed since; None outside a checkout."""
    root = Path(gemma4_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists() or (head := _output("git", "rev-parse", "--short=12", "HEAD", cwd=root)) is None:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "gemma4_fast", "kernels", "csrc", cwd=root)
    return head + ("+" if changed else "")


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a row that are the same for a whole run."""
    return {"device": str(device), "machine": machine(device), "versions": terminal.versions(), "commit": commit()}


def limit_memory(pid: int) -> tuple[int, int] | None:
    """From now on this process gets an error if it asks for more memory than there is free at the moment, where Linux would
    end some process instead. Returns the limits there were; None, and nothing is done, where that cannot be."""
    free, used = available_bytes(), _first(f"/proc/{pid}/status", "VmData")
    if free is None or used is None:
        return None
    import resource

    before = resource.prlimit(pid, resource.RLIMIT_DATA)
    limit = (int(used.split()[0]) << 10) + free
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
    return before


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Inside, on a CPU, this process has `limit_memory`."""
    before = limit_memory(os.getpid()) if device.type == "cpu" else None
    try:
        yield
    finally:
        if before is not None:
            import resource

            resource.prlimit(0, resource.RLIMIT_DATA, before)
