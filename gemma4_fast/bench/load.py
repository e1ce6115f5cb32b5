"""How busy the machine is with other work: the CPU time in Linux's /proc/stat, less our own.

Also processes that keep processors busy on purpose, to measure beside them: `bench model --busy N`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_fast.bench.rows import Row

# A row counts as busy if other processes keep more processors busy than this run leaves idle, by more
# than TOLERATED, or if the machine's own rates differ in one run by more than a factor of DRIFT.
TOLERATED = 0.25
DRIFT = 1.5
_SHORTEST = 0.2  # seconds; the kernel counts in steps of about 0.01
_PROC = Path("/proc")


@dataclass(frozen=True)
class Reading:
    """Seconds on the clock, and the CPU seconds spent until then.

    everything: on the processors that this process may use, by whatever ran there.
    own: by this process and its descendants.
    """

    at: float
    everything: float
    own: float


def reading() -> Reading | None:
    """The counters now; None where the system has none."""
    try:
        ticks = float(os.sysconf("SC_CLK_TCK"))
        everything = _everything() / ticks
        own = _own(os.getpid()) / ticks
    except (AttributeError, OSError, ValueError):
        return None
    return Reading(time.perf_counter(), everything, own) if everything else None


def _everything() -> int:
    """Clock ticks in which the processors that this process may use were not idle.

    What the hypervisor gave to others counts too.
    """
    processors = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    total = 0
    for line in (_PROC / "stat").read_text().splitlines():
        name, *values = line.split()
        if name in processors:
            user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
            total += user + nice + system + irq + softirq + steal
    return total


def _own(root: int) -> int:
    """Clock ticks of the process `root` and its descendants, those that have ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended; its parent's counter has its time now, or will have it
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        # Its own time, and that of children it has waited for.
        ticks[pid] = sum(map(int, fields[11:15]))
    own = 0
    for pid, spent in ticks.items():
        ancestor = pid
        while ancestor != root and ancestor in parents:
            ancestor = parents[ancestor]
        own += spent if ancestor == root else 0
    return own


class Load:
    """How many processors other processes kept busy, over all stretches that were `measured`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._taken = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        before = reading()
        yield
        after = reading()
        if before is not None and after is not None:
            self._seconds += after.at - before.at
            self._taken += (after.everything - before.everything) - (after.own - before.own)

    def add(self, other: Load) -> None:
        self._seconds += other._seconds
        self._taken += other._taken

    @property
    def others(self) -> float | None:
        """Processors; None if that is not known, or was measured for too short a time to tell."""
        if self._seconds < _SHORTEST:
            return None
        return round(max(0.0, self._taken / self._seconds), 2)


# ---------------------------------------------------------------- what it means for a row
def allowed(machine: dict[str, Any], device: str) -> float:
    """Processors that others may keep busy: those that this run leaves idle, and TOLERATED."""
    threads = machine.get("threads", 1) if device.startswith("cpu") else 1
    return max(0, machine.get("cpus", threads) - threads) + TOLERATED


def disturbed(row: Row) -> bool:
    """Whether this row counts as busy, by its own figures."""
    return _crowded(row) or _drifted(row)


def reasons(row: Row, rows: Sequence[Row]) -> list[str]:
    """In words, why this row counts as busy. Empty if it does not.

    rows: the rows of its table. The amounts are those of all rows that share the reason, so that
    the table has one note for each reason.
    """
    found = []
    if _crowded(row):
        sharing = [other for other in rows if _crowded(other)] or [row]
        loads = [other.other_load or 0.0 for other in sharing]
        sizes = {other.machine.get("cpus") for other in sharing}
        size = sizes.pop() if len(sizes) == 1 else None
        total = f" of {size}" if size else ""
        kept = f"kept {_range(loads)}{total} processors busy"
        found.append(f"other processes competed for CPU time and {kept}")
    if _drifted(row):
        drifts = [other.drift or 1.0 for other in rows if _drifted(other)] or [row.drift or 1.0]
        found.append(f"the machine's own rates varied in this run, by a factor of {_range(drifts)}")
    return found


def _range(amounts: Sequence[float]) -> str:
    """ "0.4 to 1.2", or "0.4" for amounts that look the same."""
    return " to ".join(dict.fromkeys(f"{amount:.2g}" for amount in (min(amounts), max(amounts))))


def _crowded(row: Row) -> bool:
    return row.other_load is not None and row.other_load > allowed(row.machine, row.device)


def _drifted(row: Row) -> bool:
    return row.drift is not None and row.drift > DRIFT


class Rates:
    """The machine's own rates in one run, as its rows tell them."""

    def __init__(self) -> None:
        self._extremes: dict[str, tuple[float, float]] = {}

    def drift(self, row: Row) -> float | None:
        """The largest factor between the machine's rates up to this row.

        A rate of this row is compared with the same rate of earlier rows, and the p80 of its samples
        with their p20. None for a row that has no rates.
        """
        factors = []
        for name, (low, rate, high) in _rates(row).items():
            least, most = self._extremes.get(name, (rate, rate))
            factors.append(max(rate / least, most / rate, high / low))
            self._extremes[name] = min(least, rate), max(most, rate)
        return round(max(factors), 2) if factors else None


def _rates(row: Row) -> dict[str, tuple[float, float, float]]:
    """By the roofline's name for each rate: the p20, median and p80 of the row's samples."""
    if row.kind == "roofline":
        rate = row.gb_s or row.gflop_s
        return {row.name: (rate, rate, rate)} if rate else {}
    found = {}
    roof = row.roofline or {}
    for key, name in (("gb_s", "read"), ("gflop_s", f"matmul {row.dtype}")):
        if key in roof:
            found[name] = (
                roof.get(f"{key}_p20", roof[key]),
                roof[key],
                roof.get(f"{key}_p80", roof[key]),
            )
    return found


def summary(rows: Sequence[Row]) -> str:
    """How many of these rows are busy, and why; empty if none is."""
    busy = [row for row in rows if row.busy]
    if not busy:
        return ""
    sentences = [f"{len(busy)} of {len(rows)} rows are marked busy."]
    if loads := [row.other_load or 0.0 for row in busy if _crowded(row)]:
        most = f"{max(loads):.2g} processors"
        sentences.append(f"During {len(loads)} of them, other processes kept up to {most} busy.")
    if drifts := [row.drift or 1.0 for row in busy if _drifted(row)]:
        factor = f"{max(drifts):.2g}x"
        sentences += [
            f"For {len(drifts)} of them, the machine's own rates varied by up to {factor}.",
            "Other processes may be the cause, but a virtual machine's rates also vary by themselves.",
        ]
    sentences.append("Measure these rows again to see which figures hold.")
    return " ".join(sentences)


# ---------------------------------------------------------------- load that we make
_BURN = """\
import os, sys
parent = int(sys.argv[1])
sys.stdout.write("burning\\n")
sys.stdout.flush()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Inside, so many processes keep a processor busy each, without touching memory.

    They end with the block, whatever ends it, and by themselves if this process is killed.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BURN, str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # Ctrl-C is this process's to handle
                )
            )
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # from here on it burns
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
