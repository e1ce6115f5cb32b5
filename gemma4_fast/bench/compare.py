"""Two files of rows, row by row: what became slower or faster beyond the noise that the rows themselves state.

A row is slower if its median is slower by more than the threshold, and its fastest fifth (p20) is beyond the other's slowest
(p80), and both still hold after the drift and the noise of the machine are taken off. Rows carry the machine's own rates (its
roofline), measured between their samples: the ratio of the two is the drift, and how far they vary over all rows compared
the noise.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma4_fast.bench.rows import Row
from gemma4_fast.bench.show import memory, spread, who
from gemma4_fast.tables import render

WORSE = ("slower", "larger", "broken")
ENOUGH, FEW = 5, 1.1  # samples below which a spread says little, and the factor by which it is then widened
RATES = {"memory": "gb_s", "compute": "gflop_s"}
_SOME = 64 << 20  # bytes of memory that a process may take more or less from run to run


@dataclass(frozen=True)
class Change:
    """One row against its counterpart. ratio: B / A of the quantity, above 1 is worse; low, high: from the two spreads;
    drift: how much slower the machine itself was in B."""

    a: Row
    b: Row
    what: str  # "time", "peak memory", "cache", "read"
    verdict: str  # slower, faster, larger, smaller, broken, mended, same
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    drift: float | None = None

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in asdict(self).items() if k not in ("a", "b") and v is not None}
        return {"kind": self.a.kind, "name": self.a.name, "contender": who(self.a), "params": self.a.params, **own}


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]
    machines: tuple[str, ...]  # what differs between the two machines
    noise: dict[str, float]  # by bound: p80 / p20 of the machine's own rate over all rows compared

    @property
    def worse(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if c.verdict in WORSE)


def compare(before: Sequence[Row], after: Sequence[Row], threshold: float = 0.05) -> Comparison:
    """threshold: 0.05 is five percent. Of rows that were measured twice in one file the last counts. The roofline's own
    rows are the machine's, and never a regression. ValueError if the two have no row in common."""
    # Runs with several numbers of threads in one file are different rows; machines that differ in it are compared all the same.
    several = any(len({row.machine.get("threads") for row in rows}) > 1 for rows in (before, after))

    def by_key(rows: Sequence[Row]) -> dict[object, Row]:
        return {(row.key, row.machine.get("threads") if several else None): row for row in rows if row.kind != "roofline"}

    a, b = by_key(before), by_key(after)
    if not set(a) & set(b):
        raise ValueError(f"no row in common: A has {_example(a)}, and B has {_example(b)}")
    both = [row for rows in (a, b) for key, row in rows.items() if key in a and key in b]
    # Rates of other dtypes or threads are other rates, so the noise is that of the commonest kind of row.
    kinds = Counter((row.dtype, row.machine.get("threads")) for row in both if row.roofline)
    most = kinds.most_common(1)[0][0] if kinds else None
    alike = [row for row in both if (row.dtype, row.machine.get("threads")) == most]
    noise = {bound: _noise(alike, rate) for bound, rate in RATES.items()}
    changes = [change for key in a if key in b for change in _changes(a[key], b[key], threshold, noise)]
    names = ("cpu", "threads", "gpu", "omp_wait_policy")
    differing = tuple(
        f"{n}: {before[-1].machine.get(n)} / {after[-1].machine.get(n)}"
        for n in names
        if before[-1].machine.get(n) != after[-1].machine.get(n)
    )
    return Comparison(
        tuple(changes), tuple(a[k] for k in a if k not in b), tuple(b[k] for k in b if k not in a), differing, noise
    )  # fmt: skip


def _example(rows: Mapping[object, Row]) -> str:
    if not rows:
        return "none but the machine's own"
    row = next(iter(rows.values()))
    return f"{len(rows)}, such as {row.kind} {row.name} ({who(row)}, {row.dtype}, {row.device})"


def _noise(rows: Sequence[Row], rate: str) -> float:
    """p80 / p20 of one of the machine's own rates; 1 where too few rows have it."""
    rates = [row.roofline[rate] for row in rows if row.roofline and row.roofline.get(rate)]
    if len(rates) < ENOUGH:
        return 1.0
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    return fifths[-1] / fifths[0]


def _changes(a: Row, b: Row, threshold: float, noise: Mapping[str, float]) -> list[Change]:
    if a.status != b.status and {"ok", "wrong"} & {a.status, b.status}:
        worse = "same" if a.status == "wrong" else "broken"  # what was wrong and now fails is neither
        return [Change(a, b, "status", "mended" if b.status == "ok" else worse)]
    found = []
    if a.time_us is not None and b.time_us is not None:
        found.append(_time(a, b, threshold, noise))
    for what, name in (("cache", "cache_bytes"), ("read", "read_bytes"), ("peak memory", "peak_bytes")):
        old, new = getattr(a, name), getattr(b, name)
        if old is None or new is None:
            continue
        ratio = max(new, 1) / max(old, 1)
        some = _SOME if what == "peak memory" else 0
        beyond = abs(ratio - 1) > threshold and abs(new - old) > some
        verdict = "same" if not beyond else "larger" if ratio > 1 else "smaller"
        if what != "peak memory" or beyond:
            found.append(Change(a, b, what, verdict, ratio))
    return found


def _time(a: Row, b: Row, threshold: float, noise: Mapping[str, float]) -> Change:
    assert a.time_us is not None and b.time_us is not None
    old, new = a.time_us, b.time_us
    if old.median <= 0 or new.median <= 0 or old.p20 <= 0 or new.p20 <= 0:
        return Change(a, b, "time", "same")
    few = FEW if min(old.samples, new.samples) < ENOUGH else 1.0
    ratio, low, high = new.median / old.median, new.p20 / old.p80 / few, new.p80 / old.p20 * few
    drift = _drift(a, b)
    unsteady = max(noise.values())  # of both, as a row far from its roof is bound by neither
    most, least = max(drift, unsteady), min(drift, 1 / unsteady)
    verdict = "same"
    if ratio / most > 1 + threshold and low > most:
        verdict = "slower"
    elif ratio / least < 1 / (1 + threshold) and high < least:
        verdict = "faster"
    return Change(a, b, "time", verdict, ratio, low, high, drift)


def _drift(a: Row, b: Row) -> float:
    """How many times slower the machine was in b, by the rate that bounds this row."""
    name = RATES[b.bound or "memory"]
    old, new = ((row.roofline or {}).get(name) for row in (a, b))
    return old / new if old and new else 1.0


def text(found: Comparison, threshold: float, every: bool = False) -> str:
    """For people: what changed (or every row), then one line that says it all."""
    lines = []
    for c in found.changes:
        if c.verdict == "same" and not every:
            continue
        if c.what == "time":
            quantities = spread(c.a.time_us), spread(c.b.time_us)
        elif c.what == "status":
            quantities = (c.a.status, c.b.status)
        else:
            field = {"cache": "cache_bytes", "read": "read_bytes", "peak memory": "peak_bytes"}[c.what]
            quantities = memory(getattr(c.a, field)), memory(getattr(c.b, field))
        ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
        noise = "" if c.low is None else f"{c.low:.3f} to {c.high:.3f}"
        drift = "" if c.drift is None else f"{c.drift:.3f}"
        lines.append((c.verdict, c.a.name, who(c.a), c.what, *quantities, ratio, noise, drift))
    columns = ("", "row", "with", "", "A", "B", "B / A", "by the spreads", "machine slower by")
    table = render(columns, lines) if lines else ""
    counts = {v: sum(c.verdict == v for c in found.changes) for v in dict.fromkeys(c.verdict for c in found.changes)}
    said = ", ".join(f"{n} {v}" for v, n in counts.items()) or "nothing in common that was measured"
    notes = "".join(f"the machines differ in {m}\n" for m in found.machines)
    for rows, which in ((found.only_a, "A"), (found.only_b, "B")):
        if rows:
            notes += f"only in {which}: {len(rows)} rows, such as {rows[0].name} ({who(rows[0])})\n"
    if disturbed := sum(bool(c.a.busy or c.b.busy) for c in found.changes):
        notes += f"disturbed, or measured at drifting rates (busy: true): {disturbed} of these rows\n"
    steady = ", ".join(f"{bound} {ratio:.2f}x" for bound, ratio in found.noise.items())
    notes += f"the machine's own rates varied by (p80 / p20 over all rows): {steady}; what lies within that is noise\n"
    return f"{table}{notes}{said} (threshold {100 * threshold:g}%)"
