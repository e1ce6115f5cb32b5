"""Pictures, the HTML page and the README's tables: what they show, and what they must never show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_fast.bench import html, markdown, plots
from gemma4_fast.bench.rows import Row, Spread

MACHINE = {"cpu": "A CPU with $ and _", "threads": 2, "cpu_flags": ["AVX512"], "memory_bytes": 16 << 30}
OUT = "out of memory"


def spread(us: float) -> Spread:
    return Spread(us, 0.9 * us, 1.2 * us, 0.8 * us, 5)


def made(kind: str, name: str, contender: str = "torch", us: float | None = None, **fields: Any) -> Row:
    common: dict[str, Any] = dict(
        dtype="bfloat16", device="cpu", machine=MACHINE, commit="0123456789ab", command=f"again {name}"
    )
    common["versions"] = {"gemma4_fast": "1.2.3", "triton": None}
    return Row(kind, name, contender, time_us=None if us is None else spread(us), **{**common, **fields})


def model(contender: str, us: float | None, phase: str = "decode", status: str = "ok", **params: Any) -> Row:
    at = {
        "model": "26b-a4b",
        "layers": 2,
        "vocab": 8192,
        "batch": 1,
        "prompt_len": 128,
        "new_tokens": 32,
        "phase": phase,
        "depth": False,
        **params,
    }
    cost: dict[str, Any] = dict(tokens=128 if phase == "prefill" else 1, bytes=10**9, roofline={"gb_s": 100.0})
    return made("model", f"{phase} 128, batch 1", contender, us, status=status, params=at, **cost)


def rows() -> list[Row]:
    """A few of every kind, among them some that failed."""
    roof = {"gb_s": 30.0, "gflop_s": 400.0}
    return [
        made("roofline", "read", us=1e4, bytes=3 * 10**8, dtype="", params={"at": "start"}),
        made("roofline", "matmul bfloat16", us=1e4, flops=4 * 10**9, dtype="", params={"at": "start"}),
        *(made("op", f"linear/{n}", us=10.0 * n, bytes=10**5, flops=n * 10**5, roofline=roof) for n in (1, 40)),
        made("op", "expert_dispatch/b", us=9.0, bytes=10**5, roofline=roof),
        made("op", "linear/c", status="wrong", message="off by <script>alert('x')</script> at [0, 1]"),
        *(
            made("scale", f"moe, tokens {x}", f"torch {path}", 100.0 * x, bytes=x * 10**6, roofline=roof,
                 params={"axis": "tokens", "series": "26B experts", "op": "moe", "x": x})
            for path in ("moe_decode", "grouped") for x in (1, 8, 1024)
        ),
        made("scale", "gqa_decode, context 4096", us=50.0, bytes=10**6, roofline=roof,
             params={"axis": "context", "series": "full", "op": "gqa_decode", "x": 4096}),
        model("gemma4-fast", 20_000.0), model("peer", 10_000.0), model("large", None, status=OUT),
        made("step", "decode step", "gemma4-fast", 100.0, parts={"moe": 60.0, "linear": 39.0, "rms_norm": 1.0},
             params={"model": "26b-a4b", "layers": 2, "vocab": 8192, "batch": 1, "prompt_len": 128}),
        *(
            made("cache", f"e2b at {context}", layout, cache_bytes=size * context, params={"model": "e2b", "context": context})
            for context in (1024, 131072) for layout, size in (("K+V of every token", 4096), ("this package", 1024))
        ),
        made("cache", "e2b at 262144", "this package", status="unsupported", params={"model": "e2b", "context": 262144}),
    ]  # fmt: skip


def texts(figure: Any) -> Iterator[str]:
    """Every text in a figure."""
    from matplotlib.text import Text

    return (t.get_text() for t in figure.findobj(Text))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is drawn, by the file's name, beside the files."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn: dict[str, Any] = {}
    save = figure.Figure.savefig

    def keeping(self: Any, path: Path) -> None:
        drawn[path.name] = self
        save(self, path)

    monkeypatch.setattr(figure.Figure, "savefig", keeping)
    return drawn


# ---------------------------------------------------------------- pictures
def test_each_kind_has_its_pictures(tmp_path: Path, figures: dict[str, Any]) -> None:
    drawn = plots.draw(rows(), tmp_path)
    names = {"model.png", "decode-step.png", "roofline.png", "latency-tokens.png", "latency-context.png", "cache.png"}
    assert {path.name for path in drawn.values()} == names == {path.name for path in tmp_path.iterdir()}
    for path in drawn.values():
        data = path.read_bytes()
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert 1000 <= width <= 2000
        assert 200 <= height <= 1500
    for figure in figures.values():
        assert "A CPU with $ and _, 2 threads" in figure.get_suptitle()
        assert "commit 0123456789ab" in figure.get_suptitle()
        sizes = [t.get_fontsize() for axes in figure.axes for t in (*axes.texts, *axes.get_xticklabels(), axes.xaxis.label)]
        assert min(sizes) >= 8


def test_only_what_there_is_is_drawn(tmp_path: Path, figures: dict[str, Any]) -> None:
    of_ops = [row for row in rows() if row.kind == "op"]
    assert list(plots.draw(of_ops, tmp_path).values()) == [tmp_path / "roofline.png"]  # also without the machine's figures
    assert plots.draw([row for row in of_ops if row.status != "ok"], tmp_path) == {}


def test_what_failed_has_no_bar_and_no_point(tmp_path: Path, figures: dict[str, Any]) -> None:
    timed = model("large", 1.0, status=OUT)  # a time that must not be believed
    wrong = made("op", "linear/c", us=1.0, status="wrong", bytes=1, flops=1)
    plots.draw([row for row in rows() if (row.contender, row.name) not in {("large", timed.name), ("torch", wrong.name)}]
               + [timed, wrong], tmp_path)  # fmt: skip
    (axes,) = figures["model.png"].axes
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx([50.0, 100.0])  # tokens/s
    assert OUT in texts(figures["model.png"])
    points = [
        xy for line in figures["roofline.png"].axes[0].lines if line.get_linestyle() == "None" for xy in line.get_xydata()
    ]
    assert sorted(x for x, _ in points) == [1.0, 40.0]
    assert "linear/c" not in texts(figures["roofline.png"])
    assert "expert_dispatch/b" in texts(figures["roofline.png"])  # no arithmetic, so only in the list


def test_small_parts_of_a_step_are_other(tmp_path: Path, figures: dict[str, Any]) -> None:
    plots.draw(rows(), tmp_path)
    figure = figures["decode-step.png"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["moe", "linear", "other"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [60.0, 39.0, 1.0]


def test_two_machines_have_pictures_of_their_own(tmp_path: Path, figures: dict[str, Any]) -> None:
    other = [dataclasses.replace(row, machine={"gpu": "A GPU"}) for row in rows() if row.kind == "op"]
    drawn = plots.draw([*rows(), *other], tmp_path)
    assert (tmp_path / "roofline-a-gpu-bfloat16.png") in drawn.values()
    assert len(drawn) == len(set(drawn.values())) == 7


def test_a_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.require()
    html.write(rows(), tmp_path / "index.html", {})  # which does without pictures
    assert "<img" not in (tmp_path / "index.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the page
def test_the_page_has_every_row_and_fetches_nothing(tmp_path: Path, figures: dict[str, Any]) -> None:
    page = tmp_path / "index.html"
    page.write_text("the one before")
    html.write(rows(), page, {})
    text = page.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [page]  # nothing of the writing is left
    for row in rows():
        assert f">{row.name}</td>" in text
        assert f"<code>{row.command}</code>" in text
    assert text.count("data:image/png;base64,") == 6
    assert all(found.startswith("data:") for found in re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"' >]+)", text))
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    (wrong,) = re.findall(r'<tr class="wrong">.*?</tr>', text, re.S)
    assert "linear/c" in wrong


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "index.html"
    page.write_text("the one before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        html.write(rows(), page, {"Some": _png(tmp_path)})
    assert page.read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "some.png"]


def _png(folder: Path) -> Path:
    path = folder / "some.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    return path


# ---------------------------------------------------------------- the README's tables
def test_the_table_bolds_the_best_and_names_what_failed() -> None:
    text = markdown.performance(rows())
    assert text == markdown.performance(rows())
    line = next(line for line in text.splitlines() if "decode after 128" in line)
    subject, *cells = line.strip("| ").split(" | ")
    assert subject == "26b-a4b, 2 of 30 layers, bfloat16: decode after 128, batch 1"
    assert cells == ["50 (41.7–55.6), 50%", "**100 (83.3–111)**", "out of memory"]
    assert "A CPU with $ and _, 2 threads, 16 GiB of memory; gemma4-fast 1.2.3; commit 0123456789ab" in text
    assert "All measured rows: the vocabulary is cut to 8,192 of 262,144 tokens." in text
    assert "| e2b, bfloat16 | 512 MiB | 128 MiB |" in text


def test_the_later_of_two_measurements_counts() -> None:
    text = markdown.performance([model("gemma4-fast", 20_000.0), model("gemma4-fast", 40_000.0)])
    assert "**25 (20.8–27.8)**, 25%" in text
    assert "| 50 (" not in text


def test_each_machine_has_a_section() -> None:
    other = dataclasses.replace(model("vllm", 5000.0), machine={"gpu": "A GPU"}, device="cuda:0")
    text = markdown.performance([*rows(), other])
    assert re.findall("^#### (.*)", text, re.M) == [
        "A CPU with $ and _, 2 threads", "A GPU", "KV cache of one sequence of 131,072 tokens",
    ]  # fmt: skip
    assert "vllm" not in text.split("A GPU")[0]


def test_rows_without_a_model_have_no_table() -> None:
    with pytest.raises(ValueError, match="bench model"):
        markdown.performance([row for row in rows() if row.kind == "op"])
