"""The README's performance tables from rows, and the words that pictures and pages share with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemma4_fast.bench.load import summary
from gemma4_fast.bench.machine import label
from gemma4_fast.bench.rows import OURS, Row, beside
from gemma4_fast.bench.show import ALL_ROWS, above, busy, common, memory, number, numbers, who
from gemma4_fast.config import PRESETS

_LONG = 131072  # tokens of context at which the README tells the size of the caches
_LEGEND = """\
A figure is the median of tokens per second, with p20–p80 in brackets. The best of each row is bold.
A percentage is that of the roofline, which is measured between the samples. A dash means that
nothing was measured. The numbers in square brackets refer to the notes below each table.
"""
_PROGRAMS = {"gemma4_fast": OURS, "python": "Python", "torch": "PyTorch"}


# ---------------------------------------------------------------- words
def by_machine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By label, in the order of the rows. Of the same measurement made twice on a machine the later one counts."""
    found: dict[str, dict[tuple[str, ...], Row]] = {}
    for row in rows:
        found.setdefault(label(row.machine), {})[row.key] = row
    return {name: list(of_one.values()) for name, of_one in found.items()}


def hardware(row: Row) -> str:
    """ "NVIDIA H200", "AMD EPYC, 2 threads"."""
    found = row.machine
    if gpu := found.get("gpu"):
        return str(gpu)
    threads = found.get("threads", "?")
    return f"{found.get('cpu', 'unknown machine')}, {threads} {'thread' if threads == 1 else 'threads'}"


def versions(rows: Iterable[Row]) -> str:
    """Of everything that took part: "gemma4-fast 0.1.0, Python 3.11.7, PyTorch 2.13.0"."""
    found = dict.fromkeys((name, version) for row in rows for name, version in row.versions.items() if version)
    return ", ".join(f"{_PROGRAMS.get(name, name)} {version}" for name, version in found)


def commits(rows: Iterable[Row]) -> str:
    """ "commit 2057515989d4"; empty where none is known."""
    found = dict.fromkeys(row.commit for row in rows if row.commit)
    return f"commit {', '.join(found)}" if found else ""


def subject(row: Row) -> str:
    """What a row of kind "model" or "step" ran: "26b-a4b, 2 of 30 layers, bfloat16"."""
    name, layers = str(row.params["model"]), row.params["layers"]
    whole = PRESETS[name].num_hidden_layers if name in PRESETS else layers
    size = f"{layers} layers" if layers == whole else f"{layers} of {whole} layers"
    return ", ".join(filter(None, (name, size, row.dtype, row.params.get("quantize"))))


def workload(row: Row) -> str:
    """What of it was measured: "prefill 128, batch 1"."""
    p = row.params
    before = ""
    if p["phase"] == "decode":
        before = "at depth " if p["depth"] else "after "
    text = f"{p['phase']} {before}{p['prompt_len']:,}, batch {p['batch']}"
    return text + beside(p.get("busy_processes", 0))


def ours_first(rows: Iterable[Row]) -> list[str]:
    """The contenders by name: this package's own, then the others in the order of the rows."""
    names = dict.fromkeys(who(row) for row in rows)
    return sorted(names, key=lambda name: (name != OURS, not name.startswith(OURS)))


def best(rows: Iterable[Row]) -> Row | None:
    """The fastest of those that worked."""
    return max((r for r in rows if r.status == "ok" and r.tokens_per_s), key=lambda r: r.tokens_per_s or 0.0, default=None)


# ---------------------------------------------------------------- the tables
def performance(rows: Sequence[Row]) -> str:
    """GitHub Markdown: a table of the whole model for each machine, and one of the caches. Its numbers are the rows' alone."""
    sections = [_LEGEND] if any(row.kind == "model" for row in rows) else []
    for of_one in by_machine(rows).values():
        if models := [row for row in of_one if row.kind == "model"]:
            sections.append(f"#### {hardware(models[0])}\n\n{_speeds(models)}")
    if caches := [row for row in rows if row.kind == "cache" and row.params["context"] == _LONG]:
        sections.append(f"#### KV cache of one sequence of {_LONG:,} tokens\n\n{_caches(caches)}")
    if not sections:
        raise ValueError(f"no row of a whole model, nor of a cache at {_LONG} tokens: bench model and bench cache make them")
    return "\n".join(sections)


def _speeds(rows: list[Row]) -> str:
    """One machine's table, with what was measured and the notes below it."""
    contenders = ours_first(rows)
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(f"{subject(row)}: {workload(row)}", {})[who(row)] = row
    shared = common([_all_notes(row, rows) for row in rows if row.status == "ok"])
    every: list[str] = []  # the numbered notes, in reading order

    def marked(cell: str, notes: Iterable[str]) -> str:
        own = [note for note in notes if note not in shared]
        every.extend(note for note in own if note not in every)
        return f"{cell} {numbers(own, every)}".strip()

    cells = []
    for name, found in lines.items():
        cuts = dict.fromkeys(note for row in found.values() for note in _cut(row))
        fastest = best(found.values())
        first = marked(name, cuts)
        of_line = map(found.get, contenders)
        speeds = [marked(_speed(row, fastest), _notes(row, rows)) for row in of_line]
        cells.append([first, *speeds])
    facts = [hardware(rows[0])]
    if total := rows[0].machine.get("memory_bytes"):
        facts.append(f"{memory(total)} of memory")
    under = [", ".join(facts), versions(rows), commits(rows)]
    told_once = "".join(f"\n{ALL_ROWS.capitalize()}: {note}.\n" for note in shared)
    listed = "".join(f"{i}. {note[0].upper()}{note[1:]}.\n" for i, note in enumerate(every, 1))
    table = _table(["tokens/s", *contenders], cells)
    told = f"{'; '.join(filter(None, under))}. {summary(rows)}".rstrip()
    return f"{table}\n{told}\n{told_once}" + (f"\n{listed}" if listed else "")


def _all_notes(row: Row, rows: Sequence[Row]) -> list[str]:
    return [*_cut(row), *_notes(row, rows)]


def _notes(row: Row | None, rows: Sequence[Row]) -> list[str]:
    """Those of a row's notes that bear on how its figure compares with the others of its table."""
    if row is None or row.status != "ok":
        return []
    reason = above(row) if _told(row) else ""
    return [reason, *busy(row, rows)] if reason else busy(row, rows)


def _speed(row: Row | None, fastest: Row | None) -> str:
    if row is None:
        return "–"
    if row.status != "ok" or row.time_us is None or not row.tokens:
        return row.status
    slow, fast = (number(row.tokens / us * 1e6) for us in (row.time_us.p80, row.time_us.p20))
    text = number(row.tokens_per_s) if row.time_us.samples == 1 else f"{number(row.tokens_per_s)} ({slow}–{fast})"
    if row is fastest:
        text = f"**{text}**"
    share = row.percent_of_roofline
    if share is not None and _told(row):
        text = f"{text}, {share:.0f}%"
    if row.of_quiet is not None:
        text = f"{text}, {100 * row.of_quiet:.0f}% of quiet"
    return text


def _told(row: Row) -> bool:
    """Whether the table tells how near to the roofline a row is."""
    return row.contender.startswith(OURS)


def _cut(row: Row) -> list[str]:
    """A note on what is left of the vocabulary, if it was cut."""
    name = row.params["model"]
    vocab = row.params["vocab"]
    whole = PRESETS[name].vocab_size if name in PRESETS else vocab
    if vocab == whole:
        return []
    return [f"the vocabulary is cut to {vocab:,} of {whole:,} tokens"]


def _caches(rows: list[Row]) -> str:
    layouts = list(dict.fromkeys(row.contender for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        text = memory(row.cache_bytes) if row.status == "ok" else row.status
        cells.setdefault(f"{row.params['model']}, {row.dtype}", {})[row.contender] = text
    return _table(["", *layouts], [[name, *(of_one.get(layout, "–") for layout in layouts)] for name, of_one in cells.items()])


def _table(headings: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in [headings, rule, *lines])
