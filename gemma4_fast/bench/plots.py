"""Pictures of rows, as PNG files. matplotlib is imported when the first one is drawn, and only its Figure objects are used."""

from __future__ import annotations

import importlib.util
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_fast import terminal
from gemma4_fast.bench.markdown import by_machine, commits, hardware, ours_first, subject, workload
from gemma4_fast.bench.rows import KINDS, OURS, Row, Spread
from gemma4_fast.bench.show import limit, microseconds, number, who

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, without their yellow, and Tol's "muted" ones: the colour-blind can tell both apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#999933", "#000000")
MARKERS = "osD^v<>ph"
MINE, VARIANT, PEER = "#0072B2", "#56B4E9", "#A0A0A0"
PARTS = ("#332288", "#DDCC77", "#117733", "#88CCEE", "#CC6677", "#44AA99", "#882255", "#999933", "#AA4499")
DARK = ("#332288", "#117733", "#882255", "#AA4499")  # of PARTS: written on in white
OTHER, GREY = "#DDDDDD", "#555555"
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "text.parse_math": False, "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
}  # fmt: skip
LABELS = {
    "tokens": "tokens of one call",
    "context": "tokens of context",
    "batch": "sequences of one call",
    "experts": "experts hit",
}
FLOOR = "floor: the roofline"
CROWD = 6  # lines in a panel above which eager calls and graphs are apart
LISTED = 40  # ops in the list beside the roofline


def require() -> None:
    """ValueError, with what to do, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install matplotlib")


def draw(rows: Sequence[Row], folder: str | Path) -> dict[str, Path]:
    """The pictures that these rows give -> the files by title. Each machine and dtype, if there are several, has its own."""
    require()
    import matplotlib

    runs: dict[tuple[str, str], list[Row]] = {}
    for machine, of_one in by_machine(rows).items():
        for dtype in dict.fromkeys(row.dtype for row in of_one if row.dtype):
            runs[machine, dtype] = [row for row in of_one if row.dtype in ("", dtype)]
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for run, of_run in runs.items():
            for name, title, figure in _figures(of_run):
                words = re.sub(r"[^A-Za-z0-9-]+", "-", "-".join((name, *run) if len(runs) > 1 else (name,)))
                path = Path(folder) / f"{words[:120]}.png"
                path.unlink(missing_ok=True)  # so that a link is not followed to what it leads to
                figure.savefig(path)
                drawn[f"{title} ({', '.join(run)})" if len(runs) > 1 else title] = path
    return drawn


def _figures(rows: list[Row]) -> Iterator[tuple[str, str, Figure]]:
    """File name, title and picture. Only what is ok is drawn; of the whole model the statuses of the others are written."""
    good = [row for row in rows if row.status == "ok" and (row.time_us or row.cache_bytes)]
    ok = {kind: [row for row in good if row.kind == kind] for kind in KINDS}
    if ok["model"]:
        yield "model", "The whole model", _model([row for row in rows if row.kind == "model"])
    if steps := [row for row in ok["step"] if row.parts]:
        yield "decode-step", "One decode step by op", _steps(steps)
    if ok["op"]:
        yield "roofline", "Ops and the roofline", _roofline(ok["op"], ok["roofline"])
    for axis in dict.fromkeys(row.params["axis"] for row in ok["scale"]):
        yield f"latency-{axis}", f"Time by {axis}", _latency(axis, [row for row in ok["scale"] if row.params["axis"] == axis])
    if ok["cache"]:
        yield "cache", "KV cache by context", _caches(ok["cache"])


# ---------------------------------------------------------------- what they share
def _time(row: Row) -> Spread:
    assert row.time_us is not None, "a row that is ok has a time"
    return row.time_us


def _figure(rows: Sequence[Row], title: str, width: float, height: float) -> Figure:
    """An empty one, with a heading that says what, where, and of which commit."""
    from matplotlib.figure import Figure

    where = "; ".join(filter(None, (hardware(rows[0]), rows[0].dtype if rows[0].dtype not in title else "", commits(rows))))
    lines = [line for text in (title, where) for line in textwrap.wrap(text, round(width * 13))]
    figure = Figure(figsize=(width, height + 0.2 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=10, linespacing=1.35)
    return figure


def _panels(
    rows: Sequence[Row], title: str, names: Sequence[str], columns: int, height: float, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name."""
    columns = min(columns, len(names))
    lines = math.ceil(len(names) / columns)
    figure = _figure(rows, title, max(7.0, 11.0 * columns / 3), height * lines)
    every = list(figure.subplots(lines, columns, squeeze=False, **shared).flat)
    for axes in every[len(names) :]:
        axes.remove()
    for axes, name in zip(every, names, strict=False):
        axes.set_title(name, loc="left", fontweight="bold")
        axes.tick_params(labelbottom=True)  # also where the axis is shared and the panel below is missing
    return figure, every[: len(names)]


def _subtitle(axes: Axes, text: str) -> None:
    axes.set_title(axes.get_title("left"), loc="left", fontweight="bold", pad=18)
    axes.annotate(text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=GREY)


def _styles(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each contender; hollow for those that replay a graph."""
    found = {who(row): row for row in rows}
    # Backends alone come first, so that they have the same colours with and without contenders like "torch grouped".
    order = sorted(dict.fromkeys(row.contender for row in found.values()), key=lambda name: " " in name)
    styles = {}
    for name, row in found.items():
        i = order.index(row.contender) % len(COLORS)
        face = COLORS[i] if row.mode == "eager" else "white"
        styles[name] = dict(color=COLORS[i], marker=MARKERS[i], markerfacecolor=face, markeredgecolor=COLORS[i])
    return styles


def _legend(figure: Figure, every: Iterable[Axes]) -> None:
    """One under all panels, with each entry once. The figure grows by it."""
    entries = {text: handle for axes in every for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0] == FLOOR))
    columns = max(1, round(figure.get_figwidth() / (0.55 + 0.075 * max(map(len, entries)))))
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(entries) / columns))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False)


def _short(count: float) -> str:
    """1024 -> "1K"."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 1024 == 0 else f"{count:g}"


def _log_x(axes: Axes, points: Iterable[int]) -> None:
    """A logarithmic axis with ticks where the points are, as far as there is room for their labels."""
    xs = sorted(set(points))
    span = math.log(xs[-1] / xs[0])
    ticks = xs[-1:]
    for x in reversed(xs):
        if math.log(ticks[-1] / x) > 0.13 * span:
            ticks.append(x)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [_short(x) for x in ticks])
    axes.set_xticks(xs, [""] * len(xs), minor=True)
    pad = math.exp(0.03 * span) if span else 2.0
    axes.set_xlim(xs[0] / pad, xs[-1] * pad)


def _log_y(axes: Axes, values: Iterable[float], text: Callable[[float], str], base: int = 10) -> None:
    """A logarithmic axis around these values, with a handful of labelled ticks even where they lie close together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found), max(found)
    decades = math.log10(high / low)
    pad = 10 ** max(0.06 * decades, (0.8 - decades) / 2)
    subs = (1,) if base != 10 or decades > 3 else (1, 3) if decades > 1.6 else (1, 2, 5)
    axes.set_yscale("log")
    axes.set_ylim(low / pad, high * pad)
    axes.yaxis.set_major_locator(LogLocator(base, subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, color="#E5E5E5", linewidth=0.6)


# ---------------------------------------------------------------- the whole model
def _model(rows: list[Row]) -> Figure:
    """A bar for each contender, a panel for each workload; who failed is named with the status."""
    subjects = list(dict.fromkeys(subject(row) for row in rows))
    contenders = ours_first(rows)
    panels: dict[str, dict[str, Row]] = {}
    for row in rows:
        name = workload(row) if len(subjects) == 1 else f"{subject(row)}\n{workload(row)}"
        panels.setdefault(name, {})[who(row)] = row
    title, height = f"Whole model: {'; '.join(subjects)}", 1.0 + 0.26 * len(contenders)
    figure, every = _panels(rows, title, list(panels), 2 if len(panels) <= 4 else 3, height, sharey=True)
    for axes, found in zip(every, panels.values(), strict=True):
        rates = {c: [(row.tokens or 0) / us * 1e6 for us in (_time(row).p80, _time(row).median, _time(row).p20)]
                 for c, row in found.items() if row.status == "ok" and row.time_us}  # fmt: skip
        roofs = [(row.tokens or 0) / row.floors_us[row.bound] * 1e6 for row in found.values() if row.bound]
        widest = max((*roofs[:1], *(fast for _, _, fast in rates.values())), default=1.0)
        for y, c in enumerate(contenders):
            if c in rates:
                slow, middle, fast = rates[c]
                axes.barh(y, middle, 0.66, color=MINE if c == OURS else VARIANT if c.startswith(OURS) else PEER)
                axes.errorbar(middle, y, xerr=[[middle - slow], [fast - middle]], color="black", linewidth=1, capsize=2.5)
                _label(axes, fast, y, number(middle), fontweight="bold")
            else:
                _label(axes, 0, y, found[c].status if c in found else "not measured", color=GREY, fontstyle="italic")
        if roofs:
            axes.axvline(roofs[0], color=GREY, linestyle="--", linewidth=1.2, zorder=0.5)
            _subtitle(axes, f"dashed: the roofline, {number(roofs[0])} tokens/s")
        axes.set_xlim(0, 1.15 * widest)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
        axes.set_yticks(range(len(contenders)), contenders)
        axes.set_ylim(len(contenders) - 0.4, -0.6)
        axes.set_xlabel("tokens/s (whiskers: p20 to p80)")
        axes.tick_params(axis="y", length=0)
    return figure


def _label(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    box = dict(facecolor="white", edgecolor="none", pad=1, alpha=0.85)
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8, bbox=box, **style)


# ---------------------------------------------------------------- one decode step
def _steps(rows: list[Row]) -> Figure:
    """A bar for each contender and batch, of the ops' times; what is small in all of them is "other"."""
    parts = [row.parts or {} for row in rows]
    shares = {op: max(p.get(op, 0.0) / sum(p.values()) for p in parts) for op in dict.fromkeys(op for p in parts for op in p)}
    shown = sorted((op for op in shares if shares[op] >= 0.02), key=lambda op: -shares[op])[: len(PARTS)]
    colors = dict(zip((*shown, "other"), (*PARTS[: len(shown)], OTHER), strict=True))
    subjects = list(dict.fromkeys(subject(row) for row in rows))
    figure = _figure(rows, f"One decode step by op: {'; '.join(subjects)}", 11, 1.2 + 0.5 * len(rows))
    axes = figure.subplots()
    widest = max(sum(p.values()) for p in parts)
    names = []
    for y, (row, p) in enumerate(zip(rows, parts, strict=True)):
        took = {op: p.get(op, 0.0) for op in shown}
        took["other"] = sum(us for op, us in p.items() if op not in shown)
        left = 0.0
        for op, us in took.items():
            axes.barh(y, us, 0.7, left, color=colors[op], edgecolor="white", linewidth=0.8, label=op)
            if us > 0.06 * widest:
                ink = "white" if colors[op] in DARK else "black"
                axes.text(left + us / 2, y, microseconds(us), ha="center", va="center", fontsize=8, color=ink)
            left += us
        _label(axes, left, y, microseconds(_time(row).median), fontweight="bold")
        name = f"{who(row)}\nbatch {row.params['batch']}, after {row.params['prompt_len']:,}"
        names.append(name if len(subjects) == 1 else f"{subject(row)}\n{name}")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.1 * widest)
    axes.xaxis.set_major_formatter(lambda value, _: microseconds(value) if value else "0")
    axes.set_xlabel("time in each op; at the end of a bar: the whole step, median")
    axes.tick_params(axis="y", length=0)
    _legend(figure, [axes])
    return figure


# ---------------------------------------------------------------- ops
def _roofline(rows: list[Row], machine: list[Row]) -> Figure:
    """Every op by intensity and rate. Numbers, and the list beside, start at the op that is farthest from its roof."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.name, []).append(row)
    fastest = [min(of_one, key=lambda row: _time(row).median) for of_one in cases.values()]
    fastest.sort(key=lambda row: row.percent_of_roofline or math.inf)
    figure = _figure(rows, "Ops and the roofline", 11.5, max(4.4, 0.165 * (min(len(fastest), LISTED) + 4)))
    axes, side = figure.subplots(1, 2, width_ratios=(1.1, 1))
    styles = _styles(rows)
    points: dict[int, tuple[float, float]] = {}  # by the row's identity
    leaders = set(map(id, fastest))
    for row in rows:
        if row.bytes and row.flops and row.gflop_s:
            x, y = points[id(row)] = row.flops / row.bytes, row.gflop_s
            size, alpha, layer = (6.0, 1.0, 4) if id(row) in leaders else (4.5, 0.4, 3)
            axes.plot(x, y, linestyle="", markersize=size, alpha=alpha, zorder=layer, **styles[who(row)])
    for name, style in styles.items():
        axes.plot([], [], linestyle="", label=name, **style)
    xs, ys = [x for x, _ in points.values()] or [1.0], [y for _, y in points.values()] or [1.0]
    roofs = {row.name: row for row in reversed(machine)}  # those of the start count
    read, product = roofs.get("read"), roofs.get(f"matmul {rows[0].dtype}")
    if read is not None and product is not None and read.gb_s and product.gflop_s:
        ridge = product.gflop_s / read.gb_s
        ends, ys = (min(*xs, ridge) / 2, max(*xs, ridge) * 3), [*ys, product.gflop_s]
        roof = dict(color="black", linewidth=1.2, zorder=2)
        axes.plot([ends[0], ridge], [ends[0] * read.gb_s, product.gflop_s], label=f"read: {number(read.gb_s)} GB/s", **roof)
        text = f"{product.name}: {number(product.gflop_s)} GFLOP/s"
        axes.plot([ridge, ends[1]], [product.gflop_s] * 2, "--", label=text, **roof)
        xs += ends
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 1.3, max(xs) * 1.3)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    _log_y(axes, ys, number)
    axes.set_xlabel("arithmetic intensity, flop/byte")
    axes.set_ylabel("GFLOP/s")
    _list(side, fastest, styles)
    _legend(figure, [axes])
    numbered = {str(i): points[id(row)] for i, row in enumerate(fastest[:LISTED], 1) if id(row) in points}
    _write_beside(figure, axes, numbered, list(points.values()))
    return figure


def _list(axes: Axes, fastest: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    """The legend of the numbers: which op, on what it is the fastest, and how near to the roofline."""
    lines = [(str(i), row.name, who(row), limit(row), styles[who(row)]["color"]) for i, row in enumerate(fastest[:LISTED], 1)]
    axes.axis("off")
    axes.set_ylim(max(len(lines) + 1, 20), -1)
    for y, (*cells, color) in enumerate([("", "farthest from its roof first", "fastest", "of the roofline", "black"), *lines]):
        for x, cell in zip((0.03, 0.05, 0.6, 0.79), cells, strict=True):
            style: dict[str, Any] = dict(ha="right" if x == 0.03 else "left", fontweight="normal" if y and x > 0.03 else "bold")
            axes.text(x, y, cell, va="center", fontsize=8, color=color if x in (0.03, 0.6) else "black", **style)
    if len(fastest) > LISTED:
        axes.text(0.05, LISTED + 1, f"and {len(fastest) - LISTED} nearer to it", va="center", fontsize=8, fontstyle="italic")


def _write_beside(
    figure: Figure, axes: Axes, texts: dict[str, tuple[float, float]], points: Sequence[tuple[float, float]]
) -> None:
    """Each text near its point, where it covers neither a point nor another text; farther away with a line to it."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # from here on the panel stays where it is
    unit = 72 / figure.dpi
    taken = [(x * unit, y * unit, 4.0, 4.0) for x, y in axes.transData.transform(points)]  # centre and half the size, in points
    for text, point in texts.items():
        x, y = axes.transData.transform(point) * unit
        half = 2.8 * len(text) + 0.5, 4.5
        around = [(r, a * math.pi / 8) for r in range(9, 90, 6) for a in range(16)]
        places = [(r * math.cos(a), r * math.sin(a)) for r, a in around]
        dx, dy = next((p for p in places if not any(_overlap((x + p[0], y + p[1], *half), t) for t in taken)), places[0])
        taken.append((x + dx, y + dy, *half))
        line = dict(arrowstyle="-", color=GREY, linewidth=0.5, shrinkA=0, shrinkB=2) if math.hypot(dx, dy) > 14 else None
        where: dict[str, Any] = dict(xytext=(dx, dy), textcoords="offset points", ha="center", va="center", zorder=5)
        written = axes.annotate(text, point, fontsize=8, fontweight="bold", arrowprops=line, **where)
        written.set_path_effects([withStroke(linewidth=2, foreground="white")])


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]


# ---------------------------------------------------------------- along an axis
def _latency(axis: str, rows: list[Row]) -> Figure:
    """A panel for each op and series, a line for each contender; dashed what the machine's roofline allows."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row.params['op']}, {row.params['series']}", []).append(row)
    for name, found in list(panels.items()):
        if len(_styles(found)) > CROWD:
            del panels[name]
            for row in found:
                panels.setdefault(f"{name}, {row.mode}", []).append(row)
    figure, every = _panels(rows, f"Time of one call by {axis}", list(panels), 3, 2.4)
    styles = _styles(rows)
    for axes, found in zip(every, panels.values(), strict=True):
        found.sort(key=lambda row: row.params["x"])
        for name, style in styles.items():
            mine = [row for row in found if who(row) == name]
            xs, times = [row.params["x"] for row in mine], [_time(row) for row in mine]
            low, high = [t.p20 for t in times], [t.p80 for t in times]
            if mine:
                axes.plot(xs, [t.median for t in times], label=name, markersize=4, linewidth=1.4, **style)
                axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
                axes.vlines(xs, low, high, color=style["color"], linewidth=0.8)
        floors = {row.params["x"]: row.floors_us[row.bound] for row in found if row.bound}
        axes.plot(list(floors), list(floors.values()), "--", color="black", linewidth=1, label=FLOOR)
        if len(floors) == 1:
            axes.axhline(*floors.values(), linestyle="--", color="black", linewidth=1)
        _log_x(axes, [row.params["x"] for row in found])
        _log_y(axes, [*floors.values(), *(us for row in found for us in (_time(row).p20, _time(row).p80))], microseconds)
        axes.set_xlabel(LABELS.get(axis, axis))
        axes.set_ylabel("time of one call")
    _legend(figure, every)
    return figure


# ---------------------------------------------------------------- the cache
def _caches(rows: list[Row]) -> Figure:
    """A panel for each member of the family, a line for each layout."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.params["model"], []).append(row)
    figure, every = _panels(rows, "KV cache of one sequence", list(panels), 3, 2.4, sharex=True, sharey=True)
    layouts = list(dict.fromkeys(row.contender for row in rows))
    for axes, found in zip(every, panels.values(), strict=True):
        sizes = {c: {row.params["context"]: row.cache_bytes or 0 for row in found if row.contender == c} for c in layouts}
        for i, (layout, by_context) in enumerate(sizes.items()):
            width = 3.4 - 1.2 * i  # layouts may come to the same size: the later ones are thinner, so that each can be seen
            line: dict[str, Any] = dict(
                marker="os^"[i % 3], markersize=width + 2, linewidth=max(width, 1), color=COLORS[i % len(COLORS)]
            )
            axes.plot(list(by_context), list(by_context.values()), label=layout, **line)
        longest = max(row.params["context"] for row in found)
        ends = [terminal.size(b) for by_context in sizes.values() if (b := by_context.get(longest)) is not None]
        _subtitle(axes, f"at {_short(longest)}: {' → '.join(dict.fromkeys(ends))}")
        wide = max(row.cache_bytes or 0 for row in rows) > 64 * min(row.cache_bytes or 0 for row in rows)
        _log_x(axes, [row.params["context"] for row in rows])
        _log_y(axes, [row.cache_bytes for row in rows if row.cache_bytes], terminal.size, base=4 if wide else 2)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("allocated")
    _legend(figure, every)
    return figure
