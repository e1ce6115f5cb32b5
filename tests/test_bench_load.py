"""A busy machine is noticed, rows and pages say so, and a benchmark is as short as it can be."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from family import MEMBERS
from transformers import Gemma4TextConfig

from gemma4_fast.bench import compare, html, load, markdown, model, plan, rows, show, timing
from gemma4_fast.bench.dummy import dummy
from gemma4_fast.bench.ops import BlockMaker, Case, OpBench, quantized
from gemma4_fast.bench.recorder import Recorder
from gemma4_fast.bench.rows import OURS, Row, Spread
from gemma4_fast.bench.scale import crossovers
from gemma4_fast.bench.timing import Roofline
from gemma4_fast.cli import main
from gemma4_fast.config import PRESETS, Gemma4Config
from gemma4_fast.ops import TABLE
from gemma4_fast.quant import QuantizedWeight
from gemma4_fast.verify import verify

CPU = torch.device("cpu")
TWO = {"cpu": "some", "cpus": 2, "threads": 2}
LINUX = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux alone tells")


def spread(us: float) -> Spread:
    return Spread(us, us, us, us, 5)


def row(name: str = "linear/odd", us: float = 100.0, **fields: Any) -> Row:
    return Row(
        "op",
        name,
        "torch",
        time_us=spread(us),
        dtype="bfloat16",
        device="cpu",
        **{"machine": TWO, **fields},
    )


def of_model(
    contender: str = OURS,
    us: float = 1000.0,
    phase: str = "decode",
    **fields: Any,
) -> Row:
    params = {
        "model": "26b-a4b",
        "layers": 2,
        "vocab": 8,
        "batch": 1,
        "prompt_len": 128,
        "new_tokens": 8,
        "phase": phase,
    }
    params |= {"depth": False, **fields.pop("params", {})}
    common: dict[str, Any] = dict(
        dtype="bfloat16",
        device="cpu",
        machine=TWO,
        tokens=1,
        bytes=1 << 30,
    )
    return Row("model", phase, contender, time_us=spread(us), params=params, **{**common, **fields})


# ---------------------------------------------------------------- counting
def proc(folder: Path, *, busy: int, processes: dict[int, tuple[int, int]]) -> None:
    """A /proc with two processors, and processes: pid -> (parent, ticks)."""
    half = busy // 2
    lines = [
        "cpu  0 0 0 0",
        *(f"cpu{i} {half} 0 0 999 9 0 0 0 7 7" for i in range(2)),
        "cpu7 5000 0 0 0 0 0 0 0 0 0",
        "intr 5",
    ]
    (folder / "stat").write_text("\n".join(lines) + "\n")
    for pid, (parent, ticks) in processes.items():
        (folder / str(pid)).mkdir(exist_ok=True)
        fields = ["S", str(parent), *["0"] * 9, str(ticks - 3), "1", "1", "1", *["0"] * 30]
        (folder / str(pid) / "stat").write_text(f"{pid} (a (strange) name) {' '.join(fields)}\n")


def test_what_others_take_is_everything_less_our_own_tree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [10.0]
    monkeypatch.setattr(load, "_PROC", tmp_path)
    monkeypatch.setattr(load.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    me = os.getpid()
    child, grandchild, stranger = me + 1, me + 2, me + 3
    proc(
        tmp_path,
        busy=1000,
        processes={me: (1, 10), child: (me, 20), grandchild: (child, 30), stranger: (1, 40)},
    )
    watched = load.Load()
    with watched.measured():
        clock[0] = 12.0
        proc(
            tmp_path,
            busy=1300,
            processes={me: (1, 60), child: (me, 70), grandchild: (child, 130), stranger: (1, 140)},
        )
    assert watched.others == 0.5  # 3 s of CPU time in 2 s, of which our three took 2 s
    with watched.measured():
        clock[0] = 13.9
    assert watched.others == pytest.approx(1.0 / 3.9, abs=0.005)
    brief = load.Load()
    with brief.measured():
        clock[0] = 14.0
    assert brief.others is None


def test_a_system_that_does_not_tell_is_no_busy_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "_PROC", tmp_path / "none")
    assert load.reading() is None
    watched = load.Load()
    with watched.measured():
        pass
    assert watched.others is None


@LINUX
def test_a_childs_work_is_our_own() -> None:
    before = load.reading()
    work = "import time\nwhile time.process_time() < 0.5: pass"
    with subprocess.Popen([sys.executable, "-c", work]) as child:
        while load.reading().own < before.own + 0.3:  # type: ignore[union-attr]
            assert child.poll() is None, "what it takes is not counted while it runs"
    after = load.reading()
    assert before is not None and after is not None
    assert after.own - before.own > 0.45, "what it took is lost when it ends"


def test_busy_is_more_than_the_idle_processors() -> None:
    assert not load.disturbed(row(other_load=0.2)) and load.disturbed(row(other_load=0.5))
    assert not load.disturbed(row(other_load=0.5, machine={"cpus": 4, "threads": 2}))
    assert load.disturbed(row(other_load=2.5, machine={"cpus": 4, "threads": 2}))
    on_gpu = row(other_load=1.1, machine={"cpus": 2, "threads": 2})
    on_gpu.device = "cuda:0"
    assert not load.disturbed(on_gpu)


def test_the_recorder_says_which_rows_are_disturbed(tmp_path: Path) -> None:
    cpus = load.allowed(Recorder(CPU)._environment["machine"], "cpu")
    with Recorder(CPU, tmp_path / "rows.jsonl") as recorder:
        for fields in (
            dict(roofline={"gb_s": 10.0}, other_load=0.0),
            dict(roofline={"gb_s": 14.0}),
            dict(roofline={"gb_s": 9.0}),  # 14 / 9 is more than 1.5
            dict(roofline={"gb_s": 12.0, "gb_s_p20": 7.0, "gb_s_p80": 11.0}),
            dict(other_load=cpus + 1),
            dict(),
        ):
            recorder.add(row(**fields))
    made = rows.read(tmp_path / "rows.jsonl")
    assert [r.busy for r in made] == [False, False, True, True, True, None]
    assert made[1].drift == 1.4 and made[4].other_load == cpus + 1
    assert json.loads(rows.line(made[2]))["busy"] is True


def test_rates_of_other_dtypes_are_no_drift() -> None:
    rates = load.Rates()
    assert rates.drift(Row("roofline", "matmul bfloat16", "torch", time_us=spread(1.0), flops=10**6)) == 1.0
    assert rates.drift(Row("roofline", "matmul float32", "torch", time_us=spread(9.0), flops=10**6)) == 1.0
    assert rates.drift(row(roofline={"gflop_s": 500.0})) == 2.0  # of the same name as the first
    assert rates.drift(row()) is None


# ---------------------------------------------------------------- what readers see
def test_tables_and_pages_say_that_the_machine_was_busy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disturbed = of_model(busy=True, other_load=1.2, drift=1.8)
    made = [disturbed, of_model("peer", busy=False)]
    crowded = "busy: other processes competed for CPU time and kept 1.2 of 2 processors busy"
    drifted = "busy: the machine's own rates varied in this run, by a factor of 1.8"
    assert show.notes(disturbed, made) == [crowded, drifted] and show.notes(made[1], made) == []
    all_in_all = "1 of 2 rows are marked busy. During 1 of them, other processes kept up to 1.2 processors busy."
    show.tables(made, show.console())
    out = capsys.readouterr().out
    assert all_in_all in out and f"[1] {crowded}\n[2] {drifted}\n" in out
    html.write(made, tmp_path / "page.html", {})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all_in_all in page and f"<li>{crowded}</li>" in page and "<td>[1] [2]</td>" in page
    text = markdown.performance(made)
    assert all_in_all in text and "1. Busy: other" in text and "2. Busy: the machine" in text
    assert " [1] [2] | 1,000 (1,000–1,000) |" in text
    quiet = made[1:]
    assert "usy" not in markdown.performance(quiet)
    show.tables(quiet, show.console())
    assert "usy" not in capsys.readouterr().out


def test_a_reason_that_all_rows_share_stands_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = [
        of_model(busy=True, other_load=0.4, drift=1.0),
        of_model("peer", busy=True, other_load=1.2, drift=1.6),
        of_model("broken", status="failed", message="a reason"),
    ]
    shared = "busy: other processes competed for CPU time and kept 0.4 to 1.2 of 2 processors busy"
    found = show.shown("model", made)
    assert found.common == [shared]
    assert [line[-1] for line in found.lines] == ["", "[1]", "failed [2]"]
    show.tables(made, show.console())
    assert f"\nall measured rows: {shared}\n[1] busy: the machine" in capsys.readouterr().out
    html.write(made, tmp_path / "page.html", {})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<p>All measured rows: {shared}.</p>" in page.replace(' class="soft"', "")
    text = markdown.performance(made)
    assert text.count(f"\nAll measured rows: {shared}.\n") == 1 and text.count("0.4 to 1.2") == 1
    alone = show.shown("model", made[:1])  # one row has its own notes
    assert alone.notes and not alone.common


def test_amounts_without_the_number_of_processors() -> None:
    (text,) = load.reasons(row(other_load=5.0, machine={}), [])
    assert text.endswith("kept 5 processors busy")


def test_a_drifting_machine_is_not_said_to_run_other_processes() -> None:
    text = load.summary(
        [of_model(busy=True, other_load=0.0, drift=1.9), of_model("peer", busy=False)],
    )
    assert "rates varied by up to 1.9x" in text and "also vary by themselves" in text
    assert "processors busy" not in text
    crowded = load.summary([of_model(busy=True, other_load=1.0, drift=1.0)])
    assert "processors busy" in crowded and "vary" not in crowded
    assert load.summary([of_model(busy=False, other_load=1.0, drift=1.9)]) == ""


def test_each_note_stands_once_below_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    made = [
        of_model("one", message="first; shared"),
        of_model("two", message="shared"),
        of_model("three", message="shared; last"),
        of_model("silent"),
        of_model("four", status="failed", message="a reason; with a semicolon"),
    ]
    found = show.shown("model", made)
    assert found.notes == ["first", "shared", "last", "a reason; with a semicolon"]
    assert found.common == []
    assert found.headings[-1] == "notes"
    lasts = [line[-1] for line in found.lines]
    assert lasts == ["[1] [2]", "[2]", "[2] [3]", "", "failed [4]"]
    show.tables(made, show.console())
    out = capsys.readouterr().out
    assert out.count("shared") == 1 and "\n[2] shared\n" in out
    assert "notes" not in show.shown("model", [of_model()]).headings


def test_notes_have_their_numbers_in_order() -> None:
    assert show.numbers(["b", "a"], ["a", "b"]) == "[1] [2]"


def test_the_readmes_notes_stand_at_their_rows() -> None:
    fast = of_model(us=1e4, roofline={"gb_s": 80.0, "gb_s_p20": 70.0, "gb_s_p80": 90.0})
    peer = of_model("peer", us=1e4, roofline={"gb_s": 80.0, "gb_s_p20": 70.0, "gb_s_p80": 90.0})
    whole = of_model(phase="prefill", params={"vocab": 262144})
    text = markdown.performance([fast, peer, whole])
    lines = [line for line in text.splitlines() if line.startswith("| 26b-a4b")]
    assert "batch 1 [1] |" in lines[0] and "% [2] |" in lines[0] and lines[0].count("[") == 2
    assert "[" not in lines[1]
    assert "\n\n1. The vocabulary is cut to 8 of 262,144 tokens.\n2. Above 100%: the kernel" in text
    text = markdown.performance([fast, peer])
    once = "All measured rows: the vocabulary is cut to 8 of 262,144 tokens."
    assert f"\n\n{once}\n\n1. Above" in text
    assert text.count("brackets") == 2  # the explanation stands once


def test_the_readmes_notes_are_numbered_in_reading_order() -> None:
    """The columns are not in the order of the rows: this package comes first."""
    peer = of_model("peer", busy=True, drift=1.9)
    fast = of_model(us=1e4, roofline={"gb_s": 80.0, "gb_s_p20": 70.0, "gb_s_p80": 90.0})
    whole = of_model(phase="prefill", params={"vocab": 262144})
    text = markdown.performance([peer, fast, whole])
    assert re.findall(r"\[(\d)\]", text.split("---:")[-1]) == ["1", "2", "3"]
    assert "1. The vocabulary" in text and "2. Above" in text and "3. Busy" in text


def test_one_thread_is_no_threads() -> None:
    assert markdown.hardware(of_model(machine={"cpu": "some", "threads": 1})) == "some, 1 thread"
    assert markdown.hardware(of_model()) == "some, 2 threads"


def test_compare_says_which_rows_were_disturbed() -> None:
    quiet, disturbed = row(bytes=1000), row(bytes=1000, busy=True)
    assert "busy: true): 1 of these rows" in compare.text(
        compare.compare([quiet], [disturbed]),
        0.05,
    )
    assert "busy" not in compare.text(compare.compare([quiet], [quiet]), 0.05)


def test_this_package_is_the_first_column() -> None:
    assert markdown.ours_first([of_model("peer"), of_model(f"{OURS} torch"), of_model()]) == [
        OURS,
        f"{OURS} torch",
        "peer",
    ]


@pytest.mark.parametrize(
    "one, why",
    [
        (
            row("linear/x", flops=10**9, bytes=1, roofline={"gflop_s": 1000.0}),
            "this shape multiplies faster",
        ),
        (
            row("linear/x_int8", flops=10**9, bytes=1, roofline={"gflop_s": 1000.0}),
            "8-bit products",
        ),
        (
            of_model(flops=10**10, params={"quantize": "int4"}, roofline={"gflop_s": 1000.0}),
            "8-bit products",
        ),
        (row(bytes=10**7, roofline={"gb_s": 50.0}, cold=False), "reads from the cache"),
        (of_model(bytes=10**7, roofline={"gb_s": 5.0}), "reads from the cache"),
        (of_model(us=1e4, roofline={"gb_s": 80.0}), "older roofline"),
        (
            of_model(us=1e4, roofline={"gb_s": 80.0, "gb_s_p20": 60.0, "gb_s_p80": 120.0}),
            "rate varied",
        ),
        (
            of_model(us=1e4, roofline={"gb_s": 80.0, "gb_s_p20": 70.0, "gb_s_p80": 90.0}),
            "faster than PyTorch's sum",
        ),
    ],
)
def test_more_than_all_of_the_roofline_is_explained(one: Row, why: str) -> None:
    assert one.percent_of_roofline is not None and one.percent_of_roofline > 100
    (note,) = show.notes(one, [one])[-1:]
    assert note.startswith("above 100%: ") and why in note
    if one.kind == "model":
        assert why in markdown.performance([one])
    one.time_us = spread(1e6)
    assert not any("above" in note for note in show.notes(one, [one]))


def test_the_roofline_and_what_is_held_against_it_lie_in_the_same_pages(
    fast: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small pages are read a third slower, so they would not show the limit of huge ones."""
    asked: list[int] = []
    monkeypatch.setattr(
        timing.native,
        "use_huge_pages",
        lambda t, now=False: asked.append(t.data_ptr()),
    )
    roofline = timing.Roofline(CPU)
    assert asked == [roofline._from.data_ptr(), roofline._to.data_ptr()]
    assert roofline._from.min() == roofline._to.max() == 1
    large = BlockMaker(torch.float32).randn(1001, 1001)
    assert large.data_ptr() in asked and len(set(large[0].tolist())) > 900
    copies = timing.Rotation({"x": large}, 1 << 10, CPU, limit=3).copies
    assert {x.data_ptr() for (x,) in copies} <= set(asked)
    assert all(torch.equal(x, large) for (x,) in copies)


# ---------------------------------------------------------------- one contender, one name
def test_older_files_name_of_the_automatic_choice_is_the_same_contender() -> None:
    def read(contender: str, device: str, status: str = "ok") -> str:
        written = of_model(contender, status=status).to_dict() | {"device": device}
        return Row.from_dict(written).contender

    assert read("gemma4-fast cpu", "cpu") == OURS
    assert read("gemma4-fast torch", "cpu") == "gemma4-fast torch"
    assert read("gemma4-fast cpu", "cuda:0") == read("gemma4-fast cpu", "cpu", "unsupported") == "gemma4-fast cpu"


def test_older_files_name_of_busy_processes_is_the_new_one() -> None:
    written = of_model().to_dict() | {"name": "decode at 8, batch 1, 1 busy beside it"}
    assert Row.from_dict(written).name == "decode at 8, batch 1, with 1 busy process"


def planned(**options: Any) -> plan.Plan:
    config = PRESETS["26b-a4b"].slice(num_layers=2, vocab_size=64)
    return plan.Plan(config, "26b-a4b", torch.bfloat16, CPU, [plan.Workload(1, 8, 2)], **options)


def labels(**options: Any) -> list[str]:
    return [c.label for c in planned(**options).contenders()]


def test_a_backend_that_is_the_automatic_choice_is_no_second_contender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = {"chosen": "cpu"}
    monkeypatch.setattr(plan.ops, "decide", lambda name, device, dtype: (choice["chosen"], {}))
    assert labels() == labels(backends=("cpu",)) == labels(backends=("", "cpu")) == [OURS]
    assert labels(backends=("", "torch")) == [OURS, "gemma4-fast torch"]
    choice["chosen"] = "torch"
    assert labels(backends=("", "cpu")) == [OURS, "gemma4-fast cpu"]
    assert labels(every=True) == [OURS]


def test_slow_contenders_run_only_if_all_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.ops, "decide", lambda name, device, dtype: ("cpu", {}))
    few = ["transformers grouped_mm", "transformers eager"]
    assert labels(peers=("transformers",)) == [OURS, *few]
    asked = labels(peers=("transformers",), every=True)
    assert asked == [OURS, "gemma4-fast torch", *few, "transformers batched_mm"]
    assert labels(peers=("transformers",), every=True, quantize="int8") == [
        OURS,
        *few,
        "transformers batched_mm",
    ]


# ---------------------------------------------------------------- load that we make
def children() -> set[int]:
    """The processes that this one has started and not yet waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


@LINUX
def test_busy_processes_end_with_their_block() -> None:
    before = children()
    with pytest.raises(KeyboardInterrupt), load.burning(2):
        assert len(children() - before) == 2
        raise KeyboardInterrupt
    assert children() == before


@LINUX
def test_busy_processes_end_with_a_process_that_is_killed() -> None:
    script = (
        "import subprocess, time\n"
        "from gemma4_fast.bench import load\n"
        "real, started = subprocess.Popen, []\n"
        "load.subprocess.Popen = lambda *a, **k: started.append(real(*a, **k)) or started[-1]\n"
        "with load.burning(2):\n"
        "    print(*(p.pid for p in started), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = list(map(int, parent.stdout.readline().split()))
        parent.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    while any(_runs(pid) for pid in pids):  # each looks for its parent many times a second
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workloads_are_measured_once_more_beside_busy_processes() -> None:
    found = list(plan.workloads([8], [16], [1], 4, busy=3))
    assert [(w.length, w.depth, w.busy) for w in found] == [
        (8, False, 0),
        (8, False, 3),
        (16, True, 0),
        (16, True, 3),
    ]
    assert found[0].ids(99, 1) != found[1].ids(99, 1)  # no prefix cache knows the second
    assert [w.busy for w in plan.workloads([8], [], [1], 4)] == [0]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PROBE_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(timing, "MATMUL", {"cpu": 256})
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 17)
    monkeypatch.setattr(model, "REST", 0.0)


PEER = """
class Peer:
    def load(self, spec):
        return {"version": "1"}
    def prompt(self, variant, ids, new):
        import os
        busy = os.path.exists(FLAG)
        return 0.5 if busy else 0.25, [0.5 if busy else 0.125] * (new - 1), [[1] * new for _ in ids]
"""


def test_busy_rows_say_beside_what_and_what_is_left(
    fast: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = tmp_path / "busy"
    counts: list[int] = []

    @contextlib.contextmanager
    def burning(count: int) -> Any:
        counts.append(count)
        if count:
            flag.touch()
        yield
        flag.unlink(missing_ok=True)

    (tmp_path / "peer.py").write_text(PEER.replace("FLAG", repr(str(flag))))
    monkeypatch.setitem(plan.PEERS, "fine", (str(tmp_path / "peer.py"), ("",), ("",)))
    monkeypatch.setattr(model, "burning", burning)
    options = [
        "--model",
        "tiny",
        "--prompt",
        "8",
        "--decode",
        "3",
        "--rounds",
        "1",
        "--check",
        "off",
        "--quiet",
    ]
    file = tmp_path / "rows.jsonl"
    assert main(["bench", "model", *options, "--busy", "2", "--peers", "fine", "-o", str(file)]) == 0
    out = capsys.readouterr().out
    assert set(counts) == {0, 2}
    found = {(r.params["phase"], r.params.get("busy_processes")): r for r in rows.read(file) if r.contender == "fine"}
    assert set(found) == {(phase, busy) for phase in ("prefill", "decode") for busy in (None, 2)}
    assert found["prefill", 2].of_quiet == 0.5 and found["decode", 2].of_quiet == 0.25
    assert found["decode", None].of_quiet is None and "--busy" not in found["decode", None].command
    beside = found["decode", 2]
    assert "--busy 2" in beside.command and beside.name.endswith(", with 2 busy processes")
    assert found["decode", 2].key != found["decode", None].key
    assert "of the quiet speed" in out and "25%" in out
    text = markdown.performance(rows.read(file))
    assert "after 8, batch 1, with 2 busy processes" in text and "25% of quiet" in text


# ---------------------------------------------------------------- as short as the samples allow
def result(*first_us: float, steps: list[float] | None = None) -> model.Result:
    return model.Result(list(first_us), turns=len(first_us), turn_us=steps or list(first_us))


def test_turns_that_agree_are_enough() -> None:
    assert result(100.0, 101.0, 102.0).settled
    assert not result(100.0, 101.0).settled
    assert not result(100.0, 101.0, 120.0).settled
    assert not result(100.0, 101.0, 102.0, steps=[10.0, 12.0, 10.0]).settled
    assert result(150.0, 100.0, 101.0, 102.0).settled  # the latest count


class Script:
    """A ModelBench whose turns take the seconds that a list says, on a clock of the test's own."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
        together: bool,
        **options: Any,
    ) -> None:
        self.clock, self.turns, self.starts = 0.0, list[tuple[str, int]](), list[str]()
        monkeypatch.setattr(model.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(model, "process_of", lambda peer, peers: peer)
        peers = ("transformers", "llama.cpp")
        self.bench = model.ModelBench(
            planned(peers=peers, **options),
            Roofline(CPU),
            lambda *_: None,
            "",
        )
        bench: Any = self.bench
        noise = iter(range(1, 10**6))

        def start(process: str) -> None:
            self.starts.append(process)
            bench.workers[process] = object()

        def stop(process: str) -> None:
            del bench.workers[process]
            bench.warmed = {(w, c) for w, c in bench.warmed if c.peer != process}

        def turn(w: plan.Workload, c: plan.Contender, round_: int) -> None:
            found = bench.results.setdefault((w, c), model.Result())
            self.clock += seconds
            self.turns.append((c.label, round_))
            found.latest_s = seconds
            bench.warmed.add((w, c))
            if round_:
                found.turns += 1
                found.first_us.append(100.0 * next(noise))

        for name, what in (("_start", start), ("_stop", stop), ("_turn", turn), ("_probe", lambda w: None),
                           ("_steps", lambda: None), ("_write", lambda w: None)):  # fmt: skip
            setattr(bench, name, what)
        (bench._side_by_side if together else bench._one_at_a_time)()

    def counted(self) -> dict[str, int]:
        return {c.label: r.turns for (_, c), r in self.bench.results.items()}


@pytest.mark.parametrize("together", [True, False])
def test_a_run_ends_in_its_minutes(
    fast: None,
    monkeypatch: pytest.MonkeyPatch,
    together: bool,
) -> None:
    at_ease = Script(monkeypatch, 0.1, together, rounds=4, minutes=6)
    assert set(at_ease.counted().values()) == {4}
    late = Script(monkeypatch, 14.0, together, rounds=4, minutes=3)
    counts = late.counted()
    assert len(counts) == 4 and all(1 <= turns < 4 for turns in counts.values())
    assert late.clock <= 180 + 14 * 8  # its minutes, or a warm-up and a turn of each
    over = Script(monkeypatch, 200.0, together, rounds=4, minutes=1)
    assert set(over.counted().values()) == {1}


def test_contenders_that_do_not_fit_are_loaded_forth_and_back(
    fast: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(monkeypatch, 0.1, False, rounds=4, minutes=6)
    assert script.starts == [OURS, "transformers", "llama.cpp", "transformers", OURS]
    of_ours = [round_ for label, round_ in script.turns if label == OURS]
    assert of_ours == [0, 1, 2, 0, 3, 4]  # a process that is new warms up
    assert [round_ for label, round_ in script.turns if label == "llama.cpp"] == [0, 1, 2, 3, 4]
    assert Script(monkeypatch, 0.1, False, rounds=1, minutes=6).starts == [
        OURS,
        "transformers",
        "llama.cpp",
    ]


# ---------------------------------------------------------------- dummy weights
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_quick_dummy_weights_are_a_model(quantize: str | None) -> None:
    config = Gemma4Config.from_dict(Gemma4TextConfig(**MEMBERS["e2b"]).to_dict())
    one, two = (dummy(config, dtype=torch.float32, device=CPU, quantize=quantize, seed=3) for _ in range(2))
    other = dummy(config, dtype=torch.float32, device=CPU, quantize=quantize, seed=4)
    for name in one.state_dict():
        a, b, c = (m.state_dict()[name] for m in (one, two, other))
        if isinstance(a, QuantizedWeight):
            a, b, c = (w.dequantize(torch.float32) for w in (a, b, c))
        assert torch.equal(a, b) and not torch.equal(a, c) and bool(a.isfinite().all()), name
    assert one.model.layers[1].mlp.down_proj.weight.shape == (
        config.hidden_size,
        config.layer(1).intermediate_size,
    )
    assert verify(one, level="quick").ok


# ---------------------------------------------------------------- options that every command takes
@pytest.mark.parametrize("what", ["all", "ops", "model", "scale", "cache"])
def test_what_measures_takes_the_options_of_every_command(what: str) -> None:
    from gemma4_fast.arguments import parser
    from gemma4_fast.cli import COMMANDS

    options = [
        "--json",
        "--backend",
        "torch",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--quantize",
        "int4",
        "--seed",
        "3",
    ]
    args = parser(COMMANDS).parse_args(["bench", what, *options])
    assert (args.json, args.backend, args.dtype, args.device, args.quantize, args.seed) == (
        True, "torch", "float32", "cpu", "int4", 3,
    )  # fmt: skip


def test_ops_are_measured_on_quantized_weights(fast: None) -> None:
    op = TABLE["linear"]
    plain = [Case(op, f"linear/{n}", op.cases[n], command=f"--op linear --case {n}") for n in ("odd", "int4")]
    norm = Case(TABLE["rms_norm"], "rms_norm/odd", TABLE["rms_norm"].cases["odd"])
    assert quantized(plain, None) == plain
    (case,) = quantized([*plain, norm], "int8")
    made = OpBench(Roofline(CPU), torch.float32, ["torch"], seconds=0.01).run(case)
    before = OpBench(Roofline(CPU), torch.float32, ["torch"], seconds=0.01).run(plain[0])
    (found, command), (original, _) = made[0], before[0]
    assert found.status == "ok" and found.name == "linear/odd, int8" and found.params["quantize"] == "int8"
    assert found.bytes is not None and original.bytes is not None and found.bytes < original.bytes
    assert "--case odd --quantize int8" in command and found.key != original.key
    with pytest.raises(ValueError, match="holds weights"):
        quantized([norm], "int8")


def test_the_crossover_is_of_weights_that_are_not_quantized() -> None:
    def point(path: str, us: float, **more: str) -> Row:
        params = {"op": "moe", "axis": "tokens", "x": 8, **more}
        return Row("scale", "moe", f"torch {path}", time_us=spread(us), device="cpu", params=params)

    paths = [point("moe_decode", 50.0), point("grouped", 100.0)]
    slow = [point("moe_decode", 500.0, quantize="int4"), point("grouped", 100.0, quantize="int4")]
    assert crossovers([*paths, *slow]) == {"cpu torch": 8}
    assert main(["bench", "scale", "--write", "--quantize", "int4"]) == 2


def test_files_are_on_the_disk_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(model.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    model._flush(tmp_path / "a")
    assert synced == [(tmp_path / "a").stat().st_ino]
    model._flush(tmp_path)
    assert sorted(synced[1:]) == sorted((tmp_path / name).stat().st_ino for name in ("a", "b"))
