"""Rows as tables for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_fast import terminal
from gemma4_fast.bench import load
from gemma4_fast.bench.rows import KINDS, Row, Spread

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {
    "roofline": "what this machine does: measured at the start and at the end, so that drift shows",
    "op": "ops: median of cold calls (p20 to p80)",
    "scale": "scaling: median of cold calls (p20 to p80)",
    "model": "whole model: median (p20 to p80); time to first token, or of one decode step",
    "step": "one decode step by op",
    "cache": "KV cache, one sequence",
}


ALL_ROWS = "all measured rows"


def number(value: float | None, unit: str = "") -> str:
    """Three digits, thousands separated; "-" for nothing."""
    if value is None:
        return "-"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def microseconds(value: float) -> str:
    """ "812 ns", "23.4 µs", "1.2 ms", "3.45 s"."""
    for unit, scale in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if value >= scale:
            return f"{number(value / scale)} {unit}"
    return f"{number(value * 1e3)} ns"


def spread(time: Spread | None) -> str:
    """ "1.23 ms (1.2 to 1.31)": median, p20, p80, in the median's unit."""
    if time is None:
        return "-"
    text = microseconds(time.median)
    unit = {"s": 1e6, "ms": 1e3, "µs": 1.0, "ns": 1e-3}[text.split()[1]]
    return text if time.samples == 1 else f"{text} ({number(time.p20 / unit)} to {number(time.p80 / unit)})"


def limit(row: Row) -> str:
    """Percent of the roofline, and which of its two sides."""
    share = row.percent_of_roofline
    return "-" if share is None else f"{share:.3g}% of {row.bound}"


_QUANTIZED = re.compile(r"int[48]\b|_int[48]_")
# A model's step that reads fewer bytes may find them in the last cache.
_CACHED = 32 << 20


def above(row: Row) -> str:
    """Why this row exceeds its roofline, as far as the row itself tells; empty if it does not."""
    share = row.percent_of_roofline
    if share is None or round(share) <= 100:
        return ""
    return f"above 100%: {_why_above(row)}"


def _why_above(row: Row) -> str:
    if row.bound == "compute":
        if row.params.get("quantize") or _QUANTIZED.search(row.name):
            return f"8-bit products are faster than the {row.dtype} products of the roofline"
        return f"this shape multiplies faster than the square {row.dtype} matrices of the roofline"
    if row.cold is False or (row.kind in ("model", "step") and (row.bytes or 0) < _CACHED):
        return "this row reads from the cache, and the roofline is the rate of the memory"
    roof = row.roofline or {}
    high = roof.get("gb_s_p80")
    if high is None:  # as in rows from before the roofline had huge pages
        return "this older roofline was measured on small pages, which are slower than huge ones"
    if row.gb_s is not None and row.gb_s <= high:
        return "the memory's rate varied, and the percentage refers to its median"
    return "the kernel reads faster than PyTorch's sum, which measures the roofline"


def notes(row: Row, rows: Sequence[Row]) -> list[str]:
    """All that is to be said about a row beside its figures, each as a short text of its own.

    rows: the rows of its table.
    """
    if row.status != "ok":
        return [row.message] if row.message else []
    found = row.message.split("; ") if row.message else []
    if row.cold is False:
        found.append("warm: too small to rotate out of the cache")
    if text := above(row):
        found.append(text)
    return found + busy(row, rows)


def busy(row: Row, rows: Sequence[Row]) -> list[str]:
    """The notes on why a row of the table `rows` counts as busy; none if it does not."""
    if not row.busy:
        return []
    return [f"busy: {why}" for why in load.reasons(row, rows) or ["the row does not say why"]]


def common(notes_of: Sequence[Sequence[str]]) -> list[str]:
    """The notes that all rows have, if there are several rows. Such a note is stated once."""
    if len(notes_of) < 2:
        return []
    return [note for note in notes_of[0] if all(note in others for others in notes_of)]


def numbers(of_row: Sequence[str], every: Sequence[str]) -> str:
    """ "[1] [3]": the places of a row's notes among the table's, from 1."""
    places = sorted(every.index(note) + 1 for note in of_row)
    return " ".join(f"[{place}]" for place in places)


def who(row: Row) -> str:
    return row.contender if row.mode == "eager" else f"{row.contender}, {row.mode}"


def memory(value: int | None) -> str:
    return "-" if value is None else terminal.size(value)


_NAME: tuple[str, Callable[[Row], str]] = ("", lambda r: r.name)
_OP: list[tuple[str, Callable[[Row], str]]] = [
    _NAME,
    ("runs on", who),
    ("time", lambda r: spread(r.time_us)),
    ("GB/s", lambda r: number(r.gb_s)),
    ("GFLOP/s", lambda r: number(r.gflop_s)),
    ("of the roofline", limit),
]


def quiet_share(row: Row) -> str:
    """What is left of the quiet speed beside busy processes."""
    return "" if row.of_quiet is None else f"{100 * row.of_quiet:.3g}%"


COLUMNS: dict[str, list[tuple[str, Callable[[Row], str]]]] = {
    "roofline": [
        _NAME,
        ("when", lambda r: str(r.params.get("at", ""))),
        ("time", lambda r: spread(r.time_us)),
        ("GB/s", lambda r: number(r.gb_s)),
        ("GFLOP/s", lambda r: number(r.gflop_s)),
    ],
    "op": _OP,
    "scale": _OP,
    "model": [
        _NAME,
        ("with", who),
        ("time", lambda r: spread(r.time_us)),
        ("tokens/s", lambda r: number(r.tokens_per_s)),
        ("of the quiet speed", quiet_share),
        ("of the roofline", limit),
        ("peak memory", lambda r: memory(r.peak_bytes)),
    ],
    "step": [
        _NAME,
        ("runs on", who),
        ("step", lambda r: spread(r.time_us)),
        ("of which", lambda r: ", ".join(f"{op} {microseconds(us)}" for op, us in (r.parts or {}).items())),
    ],
    "cache": [
        _NAME,
        ("layout", lambda r: r.contender),
        ("allocated", lambda r: memory(r.cache_bytes)),
        ("read per decoded token", lambda r: memory(r.read_bytes)),
    ],
}


def console(width: int = 200) -> Console:
    """On stdout; as wide as it needs to be where that is no terminal."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise  # where rich would end the process with 1, which here means a wrong result

    probe = Pipe(highlight=False)
    return probe if probe.is_terminal else Pipe(highlight=False, width=width)


def tables(rows: Sequence[Row], on: Console) -> None:
    """A table for each kind of row there is; a wrong result is printed red."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for kind in KINDS:
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        on.print(Text(TITLES[kind], style="bold"))
        made = shown(kind, of_kind)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in made.headings:
            table.add_column(heading, overflow="fold")
        for row, cells in zip(of_kind, made.lines, strict=True):
            style = {"ok": "", "wrong": "bold red"}.get(row.status, "dim")
            table.add_row(*(Text(cell, style=style) for cell in cells))
        on.print(table)
        for note in made.common:
            on.print(Text(f"{ALL_ROWS}: {note}"))
        for i, note in enumerate(made.notes, 1):
            on.print(Text(f"[{i}] {note}"))
        if made.common or made.notes:
            on.print()
    if text := load.summary(rows):
        on.print(Text(text, style="bold yellow"))


@dataclass(frozen=True)
class Shown:
    """A table: the cells of each line, and its notes.

    notes: those that the last column numbers from 1. common: those that hold for every row with a
    result.
    """

    headings: list[str]
    lines: list[list[str]]
    notes: list[str]
    common: list[str]


def shown(kind: str, rows: Sequence[Row]) -> Shown:
    """The table of these rows, all of one kind. A column that is empty in all rows is left out."""
    shared = common([notes(row, rows) for row in rows if row.status == "ok"])
    every = list(dict.fromkeys(note for row in rows for note in notes(row, rows)))
    every = [note for note in every if note not in shared]

    def last(row: Row) -> str:
        status = "" if row.status == "ok" else row.status
        own = [note for note in notes(row, rows) if note not in shared]
        return f"{status} {numbers(own, every)}".strip()

    wanted = [*COLUMNS[kind], ("notes", last)]
    columns = [(heading, [cell(row) for row in rows]) for heading, cell in wanted]
    columns = [(heading, cells) for heading, cells in columns if any(cells)]
    lines = [list(line) for line in zip(*(cells for _, cells in columns), strict=True)]
    return Shown([heading for heading, _ in columns], lines, every, shared)
