"""One HTML file that holds everything about a run: pictures, and a table for each kind of row. It fetches nothing."""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment

from gemma4_fast.bench import load, plots, show
from gemma4_fast.bench.markdown import by_machine, commits, hardware, versions
from gemma4_fast.bench.rows import KINDS, Row
from gemma4_fast.files import replacing

# By how the file's name begins: what a picture says.
EXPLAINED = {
    "model": "Tokens per second of each contender on the same weights and prompts, beside what this machine's memory and "
    "arithmetic would allow: longer bars are better, and the dashed line is the limit.",
    "decode-step": "Where the time of one decode step goes: each op's part of it, in the order of their size.",
    "roofline": "Every op by its arithmetic per byte: the nearer to the line above it, the less is left to gain. Filled points "
    "are eager calls, hollow ones replayed graphs; numbered is each case's fastest, pale the others.",
    "latency": "Median time of one call with inputs that are not in the cache; the band goes from p20 to p80, and the dashed "
    "line is what the rates measured beside these very calls allow.",
    "cache": "Memory that the KV cache of one sequence takes, by what of each layer is kept.",
}
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gemma4-fast bench: {{ runs | map(attribute="where") | join("; ") }}</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --line: #d8d8d8; --page: #fff; --wrong: #b00020 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a6a6a6; --line: #3c3c3c; --page: #161616; --wrong: #ff7b86 }
}
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { margin: .3rem 0; max-width: 48rem }
.soft, figcaption, details { color: var(--soft) }
figcaption { max-width: 48rem; margin-bottom: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0 1.2rem; font-size: .92rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
figure { margin: .4rem 0 }
figure div, .table { overflow-x: auto }
img { display: block; max-width: max(100%, 46rem); height: auto; background: #fff; border-radius: 6px }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
td { white-space: nowrap }
td.long, td details[open] { white-space: normal; min-width: 13rem }
tr.wrong td { color: var(--wrong); font-weight: 600 }
tr.failed td { color: var(--soft) }
code { font-size: .95em; font-weight: 400; overflow-wrap: anywhere; user-select: all }
summary { cursor: pointer }
</style>
</head>
<body>
<h1>gemma4-fast bench</h1>
{% for run in runs %}
<dl>
{% for name, value in run.facts if value %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endfor %}
{% if wrong %}<p style="color: var(--wrong)"><strong>{{ wrong }} wrong</strong>: results outside of what is allowed, in red
below. Their times are not taken.</p>{% endif %}
{% if busy %}<p style="color: var(--wrong)"><strong>{{ busy }}</strong></p>{% endif %}
{% for picture in pictures %}
<h2>{{ picture.title }}</h2>
<figure>
<figcaption>{{ picture.text }}</figcaption>
<div><img alt="{{ picture.title }}" width="{{ picture.width }}" src="data:image/png;base64,{{ picture.data }}"></div>
</figure>
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="table"><table>
<thead><tr>{% for heading in table.headings %}<th>{{ heading }}</th>{% endfor %}<th></th></tr></thead>
<tbody>
{% for line in table.lines %}
<tr{% if line.style %} class="{{ line.style }}"{% endif %}>
{% for cell in line.cells %}<td{% if cell | length > 40 %} class="long"{% endif %}>{{ cell }}</td>{% endfor %}
<td>{% if line.command %}<details><summary>again</summary><code>{{ line.command }}</code></details>{% endif %}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% for note in table.common %}<p class="soft">{{ note }}</p>
{% endfor %}{% if table.notes %}<ol class="soft">
{% for note in table.notes %}<li>{{ note }}</li>
{% endfor %}</ol>{% endif %}
{% endfor %}
</body>
</html>
"""


def write(rows: Sequence[Row], path: str | Path, pictures: Mapping[str, Path]) -> None:
    """The page. Without pictures it draws its own, if matplotlib is there. The file changes only when it is complete."""
    with tempfile.TemporaryDirectory() as folder:
        if not pictures and importlib.util.find_spec("matplotlib") is not None:
            pictures = plots.draw(rows, folder)
        page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
        text = page.render(
            runs=[{"where": hardware(of_one[0]), "facts": _facts(of_one)} for of_one in by_machine(rows).values()],
            busy=load.summary(rows),
            wrong=sum(row.status == "wrong" for row in rows),
            pictures=[_picture(title, file) for title, file in pictures.items()],
            tables=[_table(kind, of_kind) for kind in KINDS if (of_kind := [row for row in rows if row.kind == kind])],
        )
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What is the same for all rows of a machine."""
    machine = rows[0].machine
    times = sorted(row.finished for row in rows if row.finished)
    memory = [show.memory(machine.get(name)) for name in ("gpu_memory_bytes", "memory_bytes") if machine.get(name)]
    return [
        ("machine", hardware(rows[0])),
        ("processor", f"{machine.get('cpu', '')}, {' '.join(machine.get('cpu_flags', []))}".strip(", ")),
        ("memory", ", ".join(memory)),
        ("versions", versions(rows)),
        ("commit", commits(rows).removeprefix("commit ")),
        ("measured", " to ".join(dict.fromkeys(time[:16].replace("T", " ") for time in (times[:1] + times[-1:])))),
        ("rows", str(len(rows))),
    ]


def _picture(title: str, file: Path) -> dict[str, str]:
    text = next((text for name, text in EXPLAINED.items() if file.name.startswith(name)), "")
    data = file.read_bytes()
    width = int.from_bytes(data[16:20], "big") * 100 // 150  # at 100 pixels an inch, so that all have letters of one size
    return {"title": title, "text": text, "width": str(width), "data": base64.b64encode(data).decode()}


def _table(kind: str, rows: Sequence[Row]) -> dict[str, object]:
    """Of one kind; what is empty in all of its rows is left out."""
    made = show.shown(kind, rows)
    styles = {"ok": "", "wrong": "wrong"}
    lines = [
        {"cells": cells, "style": styles.get(row.status, "failed"), "command": row.command}
        for row, cells in zip(rows, made.lines, strict=True)
    ]
    title = show.TITLES[kind]
    return {
        "title": title[0].upper() + title[1:],
        "headings": made.headings,
        "lines": lines,
        "common": [f"{show.ALL_ROWS.capitalize()}: {note}." for note in made.common],
        "notes": made.notes,
    }
