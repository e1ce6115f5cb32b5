"""The benchmarks: what is wrong is never timed, what breaks is a row, what is done is kept, and rows mean what they say."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family import MEMBERS

from gemma4_fast import ops
from gemma4_fast.arguments import parser
from gemma4_fast.bench import command, compare, memory, model, plan, process, rows, scale, timing
from gemma4_fast.bench.machine import available_bytes, label, memory_limit
from gemma4_fast.bench.ops import BlockMaker, Case, OpBench
from gemma4_fast.bench.recorder import Recorder, fault
from gemma4_fast.bench.rivals import Way
from gemma4_fast.bench.rows import Row, Spread
from gemma4_fast.cache import KVCache
from gemma4_fast.cli import COMMANDS, main
from gemma4_fast.config import PRESETS, Gemma4Config
from gemma4_fast.reference import ops as reference

CPU = torch.device("cpu")
Run = Callable[..., tuple[int, str, str]]
CALLS: list[int] = []


def wrong_rms_norm(x: torch.Tensor, weight: Any = None, eps: float = 1e-6) -> torch.Tensor:
    CALLS.append(1)
    return reference.rms_norm(x, weight, eps) * 1.01


def slow_rms_norm(x: torch.Tensor, weight: Any = None, eps: float = 1e-6) -> torch.Tensor:
    time.sleep(0.005)
    return reference.rms_norm(x, weight, eps)


def hungry_rms_norm(x: torch.Tensor, weight: Any = None, eps: float = 1e-6) -> torch.Tensor:
    return torch.empty(1 << 60)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small_probe: None) -> Run:
    """run(*arguments) of `gemma4-fast bench` -> exit code, stdout, stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO())
        code = main(["bench", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roofline that is measured in no time, as no test looks at its value."""
    monkeypatch.setattr(timing, "PROBE_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(timing, "MATMUL", {"cpu": 256})
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 17)
    monkeypatch.setattr(model, "REST", 0.0)


@pytest.fixture
def bench(small_probe: None) -> OpBench:
    return OpBench(timing.Roofline(CPU), torch.float32, seconds=0.01)


def with_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """This file's function as the `cpu` backend of rms_norm."""
    monkeypatch.setitem(ops.TABLE["rms_norm"].impls, "cpu", ops.Impl(f"test_bench:{name}"))


def timed(contender: str = "torch", us: float = 100.0, spread: float = 0.02, **fields: Any) -> Row:
    time_us = Spread(us, us * (1 - spread), us * (1 + spread), us * (1 - 2 * spread), 50)
    fields = {"kind": "op", "name": "linear/odd", "bytes": 1000, "roofline": {"gb_s": 50.0}, **fields}
    return Row(contender=contender, time_us=time_us, **fields)


def cached(size: int) -> Row:
    return Row("cache", "e2b at 1K", "this package", params={"model": "e2b", "context": 1024}, cache_bytes=size)


# ---------------------------------------------------------------- rows
def test_a_row_survives_its_file(tmp_path: Path) -> None:
    row = timed(
        params={"x": 3}, machine={"cpu": "some", "cpu_flags": ["avx2"]}, versions={"torch": "2"}, cold=False, flops=5000
    )
    (tmp_path / "rows.jsonl").write_text(rows.line(row) + "\n\n" + rows.line(cached(7)) + "\n")
    back, other = rows.read(tmp_path / "rows.jsonl")
    assert back == row and other.cache_bytes == 7
    data = json.loads(rows.line(row))
    assert data["gb_s"] == 0.01 and data["gflop_s"] == 0.05 and data["bound"] == "memory"
    assert data["percent_of_roofline"] == pytest.approx(100 * (1000 / 50e9) / 100e-6, abs=1e-3)


def with_fields(**fields: Any) -> str:
    return json.dumps({"schema": 1, "kind": "op", "name": "x", "contender": "y", **fields})


@pytest.mark.parametrize(
    "line, what",
    [
        ("{", "line 1"),
        ("[]", "not a row"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1, "kind": "op", "name": "x"}', "contender must be text"),
        ('{"schema": 1, "kind": "ops", "name": "x", "contender": "y"}', "kind must be one of"),
        (with_fields(time_us={"median": 1}), "time_us must be an object of median, p20"),
        (with_fields(time_us=dict(median=0, p20=1, p80=1, min=1, samples=1)), "positive"),
        (with_fields(time_us=dict(median=1e-300, p20=1, p80=1, min=1, samples=1)), "positive"),
        (with_fields(status="fine"), "status must be"),
        (with_fields(params=[1]), "params must be an object"),
        (with_fields(machine="a"), "machine must be"),
        (with_fields(machine={"cpu_flags": 5}), "machine must be"),
        (with_fields(versions={"torch": 2}), "versions must be"),
        (with_fields(roofline={"gb_s": -1}), "positive numbers"),
        (with_fields(roofline={"gb_s": float("nan")}), "positive numbers"),
        (with_fields(roofline={"gb_s": 5e-324}), "positive numbers"),
        (with_fields(bytes=10**400), "bytes must be"),
        (with_fields(tokens=True), "tokens must be"),
        (with_fields(commit=7), "commit must be"),
        (with_fields(kind="scale", params={"axis": "tokens"}), "params.series of a scale row"),
        (with_fields(kind="model", params={"model": "x", "layers": "2"}), "params.layers of a model row"),
        (with_fields(kind=[]), "kind must be one of"),
        ("\ud800", "can't decode"),
        (with_fields(name="\ud800", status="failed"), "surrogates"),
        (with_fields(params={"x": float("nan")}, status="failed"), "not JSON compliant"),
        (with_fields(), "op rows that are ok must have time_us"),
        (with_fields(time_us=dict(median=3, p20=4, p80=5, min=1, samples=1)), "between p20 and p80"),
        (with_fields(parts={"moe": 0}), "not all of them 0"),
        (with_fields(kind="scale", params={"axis": "x", "series": "y", "op": "z", "x": 10**20}), "params.x"),
    ],
)
def test_a_file_that_holds_no_rows_says_where(tmp_path: Path, line: str, what: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes((line + "\n").encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1") as e:
        rows.read(file)
    assert what in str(e.value)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        rows.read(file)


def test_spread_is_of_the_samples() -> None:
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0, 5.0, 1)
    assert Spread.of([float(x) for x in range(11)]) == Spread(5.0, 2.0, 8.0, 0.0, 11)


def test_csv_has_a_column_for_each_nested_field(tmp_path: Path) -> None:
    rows.write_csv([timed(), Row("cache", "a", "b", cache_bytes=7)], tmp_path / "rows.csv")
    head, first, second = (tmp_path / "rows.csv").read_text().splitlines()
    assert "time_us.median" in head.split(",") and "cache_bytes" in head.split(",")
    assert first.startswith("op,linear/odd") and second.startswith("cache,a,b")


# ---------------------------------------------------------------- ops
def case(name: str = "odd") -> Case:
    op = ops.TABLE["rms_norm"]
    return Case(op, f"rms_norm/{name}", op.cases[name], command=f"--op rms_norm --case {name}")


def test_a_wrong_op_is_never_timed(bench: OpBench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch, "wrong_rms_norm")
    CALLS.clear()
    by_name = {row.contender: row for row, _ in bench.run(case())}
    assert by_name["cpu"].status == "wrong" and by_name["cpu"].time_us is None and "allowed" in by_name["cpu"].message
    assert by_name["torch"].status == "ok" and by_name["torch"].time_us is not None
    assert len(CALLS) == 1  # by the judge


def test_out_of_memory_is_that_rows_result(bench: OpBench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch, "hungry_rms_norm")
    by_name = {row.contender: row for row, _ in bench.run(case())}
    assert by_name["cpu"].status == "out of memory" and by_name["torch"].status == "ok"
    large = Case(ops.TABLE["rms_norm"], "too large", lambda m: dict(x=torch.empty(1 << 60), weight=None, eps=1e-6))
    assert {row.status for row, _ in bench.run(large)} == {"out of memory"}
    assert bench.run(case())[-1][0].status == "ok"  # and the next one runs


def test_a_backend_named_that_cannot_serve_is_a_row(small_probe: None) -> None:
    named = OpBench(timing.Roofline(CPU), torch.float32, ["triton"], seconds=0.01)
    by_name = {row.contender: row for row, _ in named.run(case())}
    assert by_name["triton"].status == "unsupported" and "GPU" in by_name["triton"].message
    assert by_name["torch"].time_us is not None


def test_a_rival_is_judged_and_timed_like_a_backend(bench: OpBench) -> None:
    prepared: list[int] = []

    def prepare(x: torch.Tensor, weight: Any, eps: float) -> dict[str, Any]:
        prepared.append(1)
        return dict(weight=weight, x=x)

    def prepare_once(x: torch.Tensor, weight: Any, eps: float, calls: list[int] = []) -> dict[str, Any]:  # noqa: B006
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("its copies")
        return dict(weight=weight, x=x)

    def other(weight: Any, x: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, weight)

    CALLS.clear()
    one = case()
    one.rivals = {
        "torch wrong": Way(wrong_rms_norm),
        "torch hungry": Way(hungry_rms_norm),
        "torch other": Way(other, prepare),
        "torch late": Way(other, prepare_once),
    }
    made = {row.contender: (row, line) for row, line in bench.run(one)}
    found = {name: row.status for name, (row, _) in made.items()}
    faults = {"torch wrong": "wrong", "torch hungry": "out of memory", "torch late": "out of memory"}
    assert set(faults) < set(found) and found == {**dict.fromkeys(found, "ok"), **faults}
    assert len(CALLS) == 1 and len(prepared) == 2  # for the judge alone; for the judge, and before the clock runs
    row, line = made["torch other"]
    assert row.time_us is not None and row.error is not None and row.bytes == made["torch"][0].bytes
    assert "--backend torch --rivals" in line and "--rivals" not in made["torch"][1]


def test_every_op_has_cases_at_true_shapes_that_its_check_takes() -> None:
    for op in ops.TABLE.values():
        assert op.bench_cases, op.name
    for name in ("rms_norm", "qkv_norm_rope", "route_topk", "expert_dispatch"):  # the small ones
        for make in ops.TABLE[name].bench_cases.values():
            ops.TABLE[name].check(*make(BlockMaker(torch.bfloat16)).values())


def test_block_maker_is_noise_without_a_period_in_the_columns() -> None:
    x = BlockMaker(torch.float32).randn(600, 4000)
    assert x.shape == (600, 4000) and abs(x.mean().item()) < 0.01 and abs(x.std().item() - 1) < 0.01
    assert not any(torch.equal(x[0], row) for row in x[1:])


def test_contenders_take_turns_and_probes_sit_between_them() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.turns(calls, timing.Stopwatch(CPU), 0.0, {"probe": lambda: order.append("p")})
    assert len(samples["a"]) == len(samples["c"]) == timing.MIN_ROUNDS and samples["probe"]
    turns = "".join(order[3:]).replace("p", "")
    assert turns.startswith("abcbcacab")


def test_rotation_hands_out_cold_copies_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    x = torch.zeros(100)
    rotation = timing.Rotation({"x": x, "n": 3}, 400, CPU)
    seen: list[int] = []
    call = rotation.call(lambda x, n: seen.append(x.data_ptr()))
    for _ in range(10):
        call()
    assert rotation.cold and len(set(seen[:5])) == 5 and seen[:5] == seen[5:]
    assert not timing.Rotation({"x": x}, 400, CPU, limit=2).cold


# ---------------------------------------------------------------- compare
def verdicts(before: list[Row], after: list[Row], threshold: float = 0.05) -> list[str]:
    return [c.verdict for c in compare.compare(before, after, threshold).changes]


def test_compare_knows_noise_from_change() -> None:
    a = timed(us=100.0)
    assert verdicts([a], [timed(us=103.0)]) == ["same"]  # below the threshold
    assert verdicts([a], [timed(us=110.0)]) == ["slower"]
    assert verdicts([a], [timed(us=90.0)]) == ["faster"]
    assert verdicts([a], [timed(us=110.0, spread=0.2)]) == ["same"]  # within its own spread
    assert verdicts([a], [timed(us=110.0)], threshold=0.2) == ["same"]
    slower_machine = {"gb_s": 50.0 / 1.12}
    assert verdicts([a], [timed(us=110.0, roofline=slower_machine)]) == ["same"]
    assert verdicts([a], [timed(us=130.0, roofline=slower_machine)]) == ["slower"]
    assert verdicts([a], [timed(us=90.0, roofline={"gb_s": 50.0 * 1.12})]) == ["same"]


def test_compare_takes_the_machines_own_noise_off() -> None:
    steady = [timed(name=f"other {i}", roofline={"gb_s": 50.0}) for i in range(10)]
    shaky = [timed(name=f"other {i}", roofline={"gb_s": 50.0 - 3 * i}) for i in range(10)]
    assert "slower" in verdicts([*steady, timed()], [*steady, timed(us=130.0)])
    assert "slower" not in verdicts([*shaky, timed()], [*shaky, timed(us=130.0)])
    assert "slower" in verdicts([*shaky, timed()], [*shaky, timed(us=300.0)])


def test_compare_tells_of_what_broke_and_of_memory() -> None:
    a = timed()
    broken = Row("op", "linear/odd", "torch", status="wrong")
    assert verdicts([a], [broken]) == ["broken"] and verdicts([broken], [a]) == ["mended"]
    failed = Row("op", "linear/odd", "torch", status="failed")
    assert verdicts([failed], [broken]) == ["broken"] and verdicts([broken], [failed]) == ["same"]
    shaky = [timed(name=f"other {i}", roofline={"gb_s": 50.0 - 3 * i}) for i in range(10)]
    assert verdicts([a], [timed(us=200.0), *shaky]) == ["slower"]  # rows that are not compared are no noise
    small, large = cached(100), cached(120)
    assert verdicts([small], [large]) == ["larger"] and verdicts([large], [small]) == ["smaller"]
    little = [timed(kind="model", peak_bytes=n << 20) for n in (100, 140)]
    assert verdicts(little[:1], little[1:]) == ["same"]
    much = [timed(kind="model", peak_bytes=n << 30) for n in (1, 2)]
    assert verdicts(much[:1], much[1:]) == ["same", "larger"]
    found = compare.compare([a, timed("x")], [a, timed("cpu")], 0.05)
    assert len(found.changes) == len(found.only_a) == len(found.only_b) == 1 and not found.worse
    with pytest.raises(ValueError, match="no row in common: A has 1, such as op linear/odd"):
        compare.compare([a], [timed("cpu")])


def test_runs_with_several_numbers_of_threads_are_not_mixed() -> None:
    one, two = (timed(us=us, machine={"threads": n}) for n, us in ((1, 200.0), (2, 100.0)))
    assert verdicts([one, two], [two, one]) == ["same", "same"]
    assert verdicts([one], [two]) == ["faster"]  # two machines


def test_compare_on_the_command_line(run: Run, tmp_path: Path) -> None:
    for name, us in (("a", 100.0), ("b", 150.0)):
        (tmp_path / name).write_text(rows.line(timed(us=us, machine={"cpu": name})) + "\n")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    code, out, _ = run("compare", a, b)
    assert code == 1 and "slower" in out and "1.500" in out and "the machines differ in cpu: a / b" in out
    assert run("compare", b, a)[0] == 0 and run("compare", a, b, "--threshold", "60%")[0] == 0
    code, out, _ = run("compare", a, b, "--json")
    assert code == 1 and json.loads(out)["changes"][0]["ratio"] == 1.5
    assert run("compare", a, str(tmp_path / "none"))[0] == 2
    assert run("compare", a, b, "--threshold", "-1")[0] == 2


def test_a_slowed_op_is_flagged(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("ops", "--op", "rms_norm,linear", "--case", "odd", "--dtype", "float32", "--seconds", "0.02", "--quiet")
    assert run(*options, "-o", str(tmp_path / "a"))[0] == 0
    monkeypatch.setitem(ops.TABLE["rms_norm"].impls, "torch", ops.Impl("test_bench:slow_rms_norm"))
    assert run(*options, "-o", str(tmp_path / "b"))[0] == 0
    code, out, _ = run("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    slower = [c["name"] for c in json.loads(out)["changes"] if c["verdict"] == "slower"]
    assert code == 1 and "rms_norm/odd" in slower


# ---------------------------------------------------------------- the command line
def test_ops_smoke_and_each_row_can_be_made_again(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    options = ("--op", "rms_norm,moe", "--case", "odd", "--seconds", "0.01", "--dtype", "float32")
    code, out, err = run("ops", *options, "-o", str(file), "--csv", str(tmp_path / "rows.csv"))
    assert code == 0 and "rms_norm/odd" in out and "of the roofline" in out and "2 of 2: moe/odd" in err
    made = rows.read(file)
    # A row for each backend that runs here
    assert list(dict.fromkeys(r.name for r in made if r.kind == "op")) == ["rms_norm/odd", "moe/odd"]
    assert {r.params["at"] for r in made if r.kind == "roofline"} == {"start", "end"}
    row = made[-1 - sum(r.params.get("at") == "end" for r in made)]
    assert row.kind == "op" and row.machine["threads"] and row.versions["torch"] and row.error is not None
    assert row.time_us is not None and row.percent_of_roofline is not None
    code, out, _ = run(*shlex.split(row.command)[2:], "--json", "--quiet")
    again = [Row.from_dict(json.loads(line)) for line in out.splitlines()]
    assert code == 0 and row.key in {r.key for r in again}


def test_rivals_are_asked_for_and_can_be_made_again(run: Run) -> None:
    assert parser(COMMANDS).parse_args(["bench", "ops"]).rivals is False
    options = ("--op", "rms_norm,moe,gqa_prefill", "--case", "odd,many,int8,full", "--seconds", "0.01", "--quiet", "--json")
    code, out, _ = run("ops", *options, "--rivals", "--dtype", "float32")
    made = [row for row in map(Row.from_dict, map(json.loads, out.splitlines())) if row.kind == "op"]
    found = {(row.name, row.contender): row.status for row in made if " " in row.contender}
    assert code == 0 and found == {
        ("moe/many", "torch grouped_mm"): "ok",
        ("moe/odd", "torch grouped_mm"): "failed",  # PyTorch wants rows of a multiple of 16 bytes
        ("gqa_prefill/full", "torch sdpa"): "ok",
        ("gqa_prefill/odd", "torch sdpa"): "unsupported",
    }  # and none with quantized weights
    (row,) = [row for row in made if (row.name, row.contender) == ("gqa_prefill/full", "torch sdpa")]
    code, out, _ = run(*shlex.split(row.command)[2:], "--json", "--quiet")
    assert code == 0 and row.key in {Row.from_dict(json.loads(line)).key for line in out.splitlines()}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of the folder bench/, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_kernels_furthest_from_their_floor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    furthest = script("furthest", monkeypatch)

    def row(name: str, us: float, contender: str = "cuda", mode: str = "graph", dtype: str = "bfloat16") -> Row:
        time_us, roof = Spread(us, us, us, us, 9), {"gb_s": 1.0}
        return Row("op", name, contender, time_us=time_us, mode=mode, dtype=dtype, bytes=1000, roofline=roof)

    slow, fast = row("a/x", 100.0), row("a/y", 2.0)
    old, now = row("b/x", 1000.0), row("b/x", 4.0)  # the later one counts
    others = [row("c/x", 900.0, "triton"), row("d/x", 900.0, mode="eager"), row("e/x", 900.0, dtype="float16")]
    measured = [old, slow, fast, now, *others, Row("op", "f/x", "cuda", "failed", mode="graph", dtype="bfloat16")]
    assert furthest.furthest(measured, 2) == [slow, now]
    assert furthest.furthest(others, 2) == [others[1]]  # without graphs
    file, told = tmp_path / "rows.jsonl", tmp_path / "profile.txt"
    file.write_text("".join(json.dumps(r.to_dict()) + "\n" for r in measured))
    monkeypatch.setattr(furthest, "profiled", lambda name: (0, f"told of {name}"))
    assert furthest.main([str(file), "-o", str(told)]) == 0
    assert told.read_text().splitlines()[0:2] == ["==== a/x: 1% of the roofline (graph)", "told of a/x"]
    assert "told of b/x" in told.read_text()
    monkeypatch.setattr(furthest, "profiled", lambda name: (1, "==ERROR== ERR_NVGPUCTRPERM"))
    assert furthest.main([str(file), "-o", str(told)]) == 0 and "nothing is profiled" in capsys.readouterr().out
    monkeypatch.setattr(furthest, "profiled", lambda name: (1, "something else"))
    assert furthest.main([str(file), "-o", str(told)]) == 1
    assert furthest.main([str(tmp_path / "none"), "-o", str(told)]) == 0


def test_all_that_needs_a_gpu_ends_in_ten_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = script("gpu", monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    parts = {part.name: part for part in gpu.parts(Path("results"))}
    assert sum(part.seconds + gpu.GRACE for part in parts.values()) < 575
    must = {"compile", "tests", "memory checker", "race checker"}
    assert {name for name, part in parts.items() if not part.may_stop} == must
    assert sum("test_cuda.py" in " ".join(part.command) for part in parts.values()) == 3
    assert parts["ops"].command.index("cuda,triton,torch") and "racecheck" in parts["race checker"].command[-1]
    decode = ops.TABLE["gqa_decode"]
    checked = [case for case in decode.cases if any(word in case for word in gpu.CHECKED.split(" or "))]
    assert {decode.inputs(case, torch.bfloat16)["k_cache"] is None for case in checked} == {True, False}  # both kernels
    parsed = {}
    for name, part in parts.items():
        if "bench" in part.command:
            parsed[name] = parser(COMMANDS).parse_args(part.command[part.command.index("bench") :])
    assert parsed["ops"].rivals and set(parsed["ops"].op) <= set(ops.TABLE)
    assert parsed["transformers"].peers == ["transformers", "accelerate"] and parsed["torch.compile"].peers == ["torch.compile"]
    assert gpu.run(gpu.Part("all", 9, gpu.all_of(["true"], ["true"]))) == "ok"
    assert gpu.run(gpu.Part("all", 9, gpu.all_of(["false"], ["true"]))) == "exit code 1"
    start, mark = time.perf_counter(), tmp_path / "not stopped"
    late = ["sh", "-c", f"sleep 3; touch {mark}"]
    assert gpu.run(gpu.Part("all", 1, gpu.all_of(late, ["true"]))) == "stopped after 1 s"
    time.sleep(max(0.0, 4 - (time.perf_counter() - start)))
    assert not mark.exists()  # what the shell has started is stopped too
    for kind in ("program", "module"):
        lost = gpu.run(dataclasses.replace(parts["transformers"], **{kind: "nothing_of_this_name"}))
        assert lost == "left out: there is no nothing_of_this_name here"


def test_a_wrong_op_ends_with_1_and_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch, "wrong_rms_norm")
    code, out, _ = run("ops", "--op", "rms_norm", "--case", "odd", "--seconds", "0.01", "--quiet")
    assert code == 1 and re.search(r"rms_norm/odd +cpu +- .*wrong \[\d\]", out)
    assert re.search(r"^\[\d\] output 0: error", out, re.M)


def test_ctrl_c_keeps_what_is_done(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = OpBench.run

    def interrupted(self: OpBench, case: Case) -> Any:
        if case.name.startswith("linear"):
            raise KeyboardInterrupt
        return inner(self, case)

    monkeypatch.setattr(OpBench, "run", interrupted)
    file = tmp_path / "rows.jsonl"
    code, out, err = run("ops", "--op", "rms_norm,linear", "--case", "odd", "--seconds", "0.01", "-o", str(file))
    assert code == 130 and "rms_norm/odd" in out and "finished rows are kept" in err
    assert [r.name for r in rows.read(file)][-1] == "rms_norm/odd"


@pytest.mark.parametrize(
    "argv, what",
    [
        (("ops", "--op", "rms"), "unknown op 'rms'"),
        (("ops", "--op", "rmsnorm"), "did you mean rms_norm?"),
        (("op", "--op", "rms_norm"), "did you mean ops?"),
        (("ops", "--op", "linear", "--case", "od"), "did you mean odd?"),
        (("model", "--config", "26b-4b"), "did you mean 26b-a4b?"),
        (("model", "--peers", "transfomers"), "did you mean transformers?"),
        (("ops", "--backend", "tritan"), "did you mean triton?"),
        (("ops", "--case", "nothing"), "have no case nothing"),
        (("ops", "--backend", "avx"), "unknown backend"),
        (("ops", "--seconds", "0"), "expected seconds"),
        (("ops", "--csv", "no/folder/x.csv"), "no folder"),
        (("ops", "--dtype", "int8"), "(--quantize int8)"),
        (("model", "--config", "27b"), "unknown config"),
        (("model", "--peers", "vlm"), "unknown peer 'vlm'"),
        (("model", "--busy", "0"), "whole number"),
        (("ops", "--op", "rms_norm", "--quantize", "int8"), "holds weights"),
        (("cache", "--backend", "avx"), "unknown backend"),
        (("model", "--prompt", "300K"), "exceed this model's 262144 positions"),
        (("model", "--layers", "99"), "num_layers"),
        (("model", "--model", "tiny", "--layers", "2"), "a --model runs as it is"),
        (("model", "--peers", "vllm", "--peer-python", "vllm=nowhere"), "no program"),
        (("model", "--batch", "1,x"), "whole number"),
        (("scale", "--axis", "time"), "unknown axis"),
        (("scale", "--axis", "experts", "--points", "4"), "no point is left"),
        (("cache", "--config", "27b"), "unknown config"),
        (("report", "missing.jsonl"), "missing.jsonl"),
        (("cache", "-o", "same", "--csv", "same"), "files are the same"),
        (("cache", "--csv", "."), "is a folder"),
        (("cache", "--csv", ""), "name of a file"),
        (("cache", "--plot", ""), "name of a file"),
        (("cache", "--html", "/dev/null"), "not a regular file"),
        (("cache", "--append", "-o", __file__), "--append takes a file of rows"),
        (("cache", "--threads", "99999999999"), "at most"),
        (("cache", "--device", "cpu:5"), "no device 'cpu:5'"),
        (("report", "missing.jsonl", "-o", "x"), "unrecognized"),
        (("report", "missing.jsonl", "--markdown", "--json"), "both write to standard output"),
        (("cache", "--append"), "--append takes"),
        (("cache", "--plot", ".", "--csv", "cache.png"), "puts its pictures"),
        (("cache", "--context", "9" * 30), "whole number"),
        (("model", "--peer-python", "vllm=/bin/true"), "not among --peers"),
        (("model", "--peers", "vllm", "--peer-python", f"vllm={__file__}"), "no program"),
        (("model", "--model", "~nobody-of-this-name/x"), "no such user"),
    ],
)
def test_mistakes_are_told_before_any_work(run: Run, argv: tuple[str, ...], what: str) -> None:
    code, out, err = run(*argv)
    assert code == 2 and what in err and not out and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["26b", "26B-A4B", "gemma-4-26b-a4b-it"])
def test_members_have_short_names(name: str, run: Run) -> None:
    code, out, _ = run("cache", "--config", name, "--context", "1K", "--quiet", "--json")
    assert code == 0
    assert {json.loads(line)["params"]["model"] for line in out.splitlines()} == {"26b-a4b"}
    device = torch.device("cpu")
    args = parser(COMMANDS).parse_args(["bench", "model", "--config", name, "--layers", "1"])
    assert command.model_plan(args, device, torch.bfloat16).label == "26b-a4b"


def test_a_file_that_is_there_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    options = ("cache", "--config", "e2b", "--context", "1K", "--quiet", "-o", str(file))
    assert run(*options)[0] == 0
    before = file.read_text()
    code, _, err = run(*options)
    assert code == 2 and "--append" in err and file.read_text() == before
    assert run(*options, "--append")[0] == 0 and file.read_text().startswith(before)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files")
def test_half_a_line_does_not_spoil_a_file(tmp_path: Path) -> None:
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = tmp_path / "rows.jsonl"
    with Recorder(CPU, file) as recorder:
        recorder.add(timed())
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))
            recorder.add(timed())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert recorder.failed and len(recorder.rows) == 2
    assert len(rows.read(file)) == 1


def test_a_reader_that_left_does_not_cost_the_file_its_rows(tmp_path: Path) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Recorder(CPU, tmp_path / "rows.jsonl", stdout=Left()) as recorder:
        with pytest.raises(BrokenPipeError):
            recorder.add(timed())
        recorder.add(timed())  # as what was measured is written at the end
    assert len(rows.read(tmp_path / "rows.jsonl")) == 2


def test_what_is_appended_begins_a_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows.line(timed()))
    assert run("cache", "--config", "e2b", "--context", "1K", "--quiet", "--append", "-o", str(file))[0] == 0
    assert len(rows.read(file)) > 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_loses_the_file_alone(run: Run, tmp_path: Path) -> None:
    options = ("cache", "--config", "e2b", "--context", "1K,2K", "--quiet")
    code, out, err = run(*options, "--append", "-o", "/dev/full")
    assert code == 2 and "e2b at 2K" in out and err.count("No space left") == 1
    code, out, err = run(*options, "--csv", "/dev/full")
    assert code == 2 and "e2b at 2K" in out and "No space left" in err and len(err.splitlines()) == 1


def test_a_reader_that_had_enough_does_not_cost_the_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows.line(timed(name=f"row {i}")) + "\n" for i in range(2000)))
    script = "import sys; from gemma4_fast.cli import main; sys.exit(main())"
    arguments = ["bench", "report", str(file), "--csv", str(tmp_path / "rows.csv")]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout is not None and p.stderr is not None
        p.stdout.close()
        assert p.stderr.read() == b""
    assert p.returncode == 141 and len((tmp_path / "rows.csv").read_text().splitlines()) == 2001


def test_no_target_replaces_another_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows.line(timed(dtype="float32", flops=5000, roofline={"gb_s": 50.0, "gflop_s": 100.0})) + "\n")
    before = file.read_bytes()
    (tmp_path / "hard.csv").hardlink_to(file)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run("report", str(file), "--csv", str(tmp_path / "hard.csv"))[0] == 2
    assert run("report", str(file), "--csv", str(tmp_path / "loop"))[0] == 2
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "roofline.png").symlink_to(file)
    assert run("report", str(file), "--plot", str(tmp_path / "pictures"))[0] == 0
    assert file.read_bytes() == before and (tmp_path / "pictures" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_replaces_what_a_link_leads_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(rows.line(timed()) + "\n")
    (tmp_path / "page.html").symlink_to(tmp_path / "real.html")
    assert run("report", str(tmp_path / "rows.jsonl"), "--html", str(tmp_path / "page.html"))[0] == 0
    assert (tmp_path / "page.html").is_symlink() and "linear/odd" in (tmp_path / "real.html").read_text()


def test_options_that_are_repeated_add_up() -> None:
    args = parser(COMMANDS).parse_args(["bench", "ops", "--op", "linear,moe", "--op", "moe,rms_norm"])
    assert args.op == ["linear", "moe", "rms_norm"]
    args = parser(COMMANDS).parse_args(["bench", "model", "--prompt", "8", "--prompt", "16"])
    assert args.prompt == [8, 16]
    assert parser(COMMANDS).parse_args(["bench", "model", "--batch", "4"]).batch == [4]


def test_report_shows_saved_rows(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows.line(timed(command="gemma4-fast bench ops")) + "\n")
    code, out, _ = run("report", str(file), "--html", str(tmp_path / "page.html"), "--plot", str(tmp_path / "pictures"))
    assert code == 0 and "linear/odd" in out and "linear/odd" in (tmp_path / "page.html").read_text()


def test_the_standard_report_keeps_the_run_before(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = iter([100.0, 150.0])

    def one(args: Namespace, device: torch.device, dtype: torch.dtype) -> command.Work:
        return lambda say, add: add(timed(us=next(speed)), "ops")  # type: ignore[func-returns-value,return-value]

    def none(args: Namespace, device: torch.device, dtype: torch.dtype) -> command.Work:
        return lambda say, add: None

    monkeypatch.setattr(command, "WORK", {"cache": none, "model": none, "ops": one, "scale": none})
    assert run("all", "--results", str(tmp_path), "--quiet")[0] == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == label(rows.read(folder / "standard.jsonl")[0].machine)
    assert (folder / "report" / "index.html").exists() and (folder / "report" / "rows.csv").exists()
    _, _, err = run("all", "--results", str(tmp_path), "--quiet")
    before, now = (rows.read(folder / name)[0].time_us for name in ("standard.previous.jsonl", "standard.jsonl"))
    assert "slower" in err and before is not None and now is not None and (before.median, now.median) == (100.0, 150.0)


def test_what_is_left_when_the_minutes_are_over_is_not_begun(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow(args: Namespace, device: torch.device, dtype: torch.dtype) -> command.Work:
        def work(say: command.Say, add: command.Add) -> None:
            for i in range(5):
                say(f"row {i}")
                add(timed(name=f"row {i}"), "ops")
                clock[0] += 25.0

        return work

    def none(args: Namespace, device: torch.device, dtype: torch.dtype) -> command.Work:
        return lambda say, add: None

    monkeypatch.setattr(command, "WORK", {"cache": slow, "model": slow, "ops": none, "scale": none})
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    code, _, err = run("all", "--results", str(tmp_path), "--quiet", "--minutes", "1")
    (file,) = tmp_path.glob("*/standard.jsonl")
    assert code == 0 and [r.name for r in rows.read(file)] == ["row 0", "row 1", "row 2"] and "1 minutes are over" in err


def test_every_subcommand_is_in_the_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser(COMMANDS).parse_args(["bench", "--help"])
    out = capsys.readouterr().out
    for name in ("all", "ops", "model", "scale", "cache", "compare", "report"):
        assert re.search(rf"^    {name} ", out, re.M)


# ---------------------------------------------------------------- scaling and the crossover
def test_scale_smoke(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code, _, _ = run("scale", "--axis", "context", "--points", "64,128", "--seconds", "0.01", "--quiet", "-o", str(file))
    made = [r for r in rows.read(file) if r.kind == "scale"]
    assert code == 0 and {r.params["x"] for r in made} == {64, 128} and {r.status for r in made} == {"ok"}
    assert {r.params["series"] for r in made} == {a.series for a in scale.AXES["context"]}


def paths(decode: dict[int, float], grouped: dict[int, float], backend: str = "torch", mode: str = "eager") -> list[Row]:
    return [
        timed(f"{backend} {path}", us=us, kind="scale", device="cpu", mode=mode, params={"op": "moe", "axis": "tokens", "x": x})
        for path, times in (("moe_decode", decode), ("grouped", grouped))
        for x, us in times.items()
    ]


def test_crossover_is_the_last_point_where_decode_does_not_lose() -> None:
    grouped = {1: 100.0, 8: 200.0, 16: 300.0, 32: 400.0}
    assert scale.crossovers(paths({1: 50.0, 8: 150.0, 16: 310.0, 32: 900.0}, grouped)) == {"cpu torch": 16}  # 3%: noise
    assert scale.crossovers(paths({1: 200.0, 8: 150.0, 16: 250.0, 32: 900.0}, grouped)) == {"cpu torch": 0}
    assert scale.crossovers(paths(grouped, grouped)) == {"cpu torch": 32}
    replayed = paths({1: 50.0, 8: 500.0}, {1: 100.0, 8: 200.0}, "cuda", "graph")
    eager = paths({1: 50.0, 8: 50.0}, {1: 100.0, 8: 200.0}, "cuda")
    assert scale.crossovers(replayed + eager) == {"cpu cuda": 1}  # graphs count
    assert scale.crossovers([timed()]) == {}


def test_crossover_is_written_where_moe_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_fast.ops.moe import CROSSOVER, moe_crossover

    source = Path(scale.inspect.getfile(scale.grouped_moe)).read_text()
    copy = tmp_path / "moe.py"
    copy.write_text(source)
    for where in list(CROSSOVER):
        monkeypatch.delitem(CROSSOVER, where)
    monkeypatch.setitem(CROSSOVER, "cpu other", 5)
    with ops.use_backend("torch"):
        assert moe_crossover(CPU, torch.bfloat16) == 16  # not measured
        scale.write_crossovers({"cpu torch": 48}, copy)
        assert moe_crossover(CPU, torch.bfloat16) == 48
    found: dict[str, Any] = {}
    block = re.search(r"^CROSSOVER: dict\[str, int\] = (\{.*?\})$", copy.read_text(), re.M | re.S)
    assert block is not None
    exec(f"c = {block[1]}", found)
    assert found["c"] == {"cpu other": 5, "cpu torch": 48}
    compile(copy.read_text(), "moe.py", "exec")
    monkeypatch.delitem(CROSSOVER, "cpu torch")
    copy.write_text("nothing here")
    with pytest.raises(ValueError, match="expected one CROSSOVER"):
        scale.write_crossovers({"cpu torch": 48}, copy)


# ---------------------------------------------------------------- caches
def test_cache_smoke(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code, _, _ = run("cache", "--context", "1K,256K", "--quiet", "-o", str(file))
    made = rows.read(file)
    assert code == 0 and {r.params["model"] for r in made} == {*PRESETS, memory.GEMMA3}
    beyond = {r.params["model"] for r in made if r.status == "unsupported"}
    assert beyond == {"e2b", "e4b", memory.GEMMA3}


def test_cache_bytes_are_those_of_the_papers_table() -> None:
    """Per token of full layers, K and V: the published configs' arithmetic."""
    for name, per_token in (("e2b", 6144), ("e4b", 16384), ("12b", 16384), ("26b-a4b", 20480), ("31b", 81920)):
        layers = [c for c in PRESETS[name].layers() if not c.is_sliding]
        plain = [dataclasses.replace(c, k_eq_v=False) for c in layers]
        held, read, where = memory.measure(plain, 1024, torch.bfloat16, CPU)
        assert held == 1024 * per_token and where == "cpu"
        readers = len(layers) / sum(c.kv_donor is None for c in layers)
        assert read == held * readers  # every layer reads, those that share too


def test_cache_is_measured_alike_with_and_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = PRESETS["26b-a4b"].layers()
    real = memory.measure(layers, 4096, torch.bfloat16, CPU)
    monkeypatch.setattr(memory, "_LARGE", 0)
    assert memory.measure(layers, 4096, torch.bfloat16, CPU) == (*real[:2], "meta")
    assert real[0] == KVCache(PRESETS["26b-a4b"], 1, 4096, torch.bfloat16).nbytes


# ---------------------------------------------------------------- whole models
def test_floor_is_the_published_arithmetic() -> None:
    need = plan.floor(PRESETS["26b-a4b"], torch.bfloat16, None, batch=1, new=1, before=0)
    assert need.bytes == pytest.approx(7.64e9, rel=2e-3)  # 3.82 B parameters a token
    assert need.flops == pytest.approx(2 * 3.82e9, rel=2e-3)
    eight = plan.floor(PRESETS["26b-a4b"], torch.bfloat16, None, batch=8, new=1, before=0)
    hit = 128 * (1 - (1 - 8 / 128) ** 8)  # 52 experts in expectation
    assert eight.bytes - need.bytes == pytest.approx((hit - 8) * 3 * 704 * 2816 * 2 * 30, rel=1e-3)
    deep = plan.floor(PRESETS["26b-a4b"], torch.bfloat16, None, batch=1, new=1, before=131072)
    # V alone in the five full layers, K and V of the window in the others
    assert deep.bytes - need.bytes == 5 * 131072 * 2 * 512 * 2 + 25 * 1024 * 2 * 8 * 256 * 2


def test_fitting_cuts_what_does_not_fit() -> None:
    config = PRESETS["26b-a4b"]
    assert plan.fitting(config, torch.bfloat16, 60 << 30) == config
    cut = plan.fitting(config, torch.bfloat16, 12 << 30)
    assert cut.num_hidden_layers == 6 and cut.vocab_size == 262144 // 5
    with pytest.raises(ValueError, match="not even one layer"):
        plan.fitting(config, torch.bfloat16, 1 << 20)


PEER = """
import os, time
class Unsupported(Exception):
    pass
class Peer:
    def load(self, spec):
        print("noise on stdout")
        if {fault!r} == "load":
            import a_module_that_is_not_there
        self.calls = 0
        return {{"version": "9.9", "note": "a fake"}}
    def prompt(self, variant, ids, new):
        if {fault!r} == "memory":
            raise MemoryError("too much")
        if {fault!r} == "killed":
            os.kill(os.getpid(), 9)
        if {fault!r} == "lame":
            time.sleep(0.2)
        if {fault!r} == "liar":
            return float("nan"), [0.5] * (new - 1), [[1] * new for _ in ids]
        if {fault!r} == "slow":
            import pathlib, subprocess
            child = subprocess.Popen(["sleep", "600"])
            pathlib.Path({folder!r}, "pids").write_text(f"{{os.getpid()}} {{child.pid}} ")
            time.sleep(600)
        if {fault!r} == "unsupported" and len(ids) > 1:
            raise Unsupported("one at a time")
        return 0.25, [0.5] * (new - 1), [[1] * new for _ in ids]
    def score(self, variant, ids, top):
        return [(-1 - i, 0.0) for i in range(top)] if {fault!r} == "other" else []
    def depth(self, variant, ids, new):
        self.calls += 1
        if {fault!r} == "lame" and self.calls == 1:
            time.sleep(0.2)
        return [0.125] * new, [[1] * new for _ in ids]
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that fail in every way there is, and one that does not."""
    for name in ("fine", "load", "memory", "killed", "unsupported", "other", "liar", "slow", "lame"):
        (tmp_path / f"{name}.py").write_text(PEER.format(fault=name, folder=str(tmp_path)))
        monkeypatch.setitem(plan.PEERS, name, (str(tmp_path / f"{name}.py"), ("",), ("",)))


def test_whatever_happens_to_a_peer_is_a_row(run: Run, fakes: None, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code, out, err = run(
        "model", "--model", "tiny", "--prompt", "8", "--depth", "16", "--decode", "3", "--batch", "1,2", "--rounds", "2",
        "--peers", "fine,load,memory,killed,unsupported,other,liar", "-o", str(file),
    )  # fmt: skip
    assert code == 1, err  # one of them runs another model
    made = [r for r in rows.read(file) if r.kind == "model"]
    found = {(r.contender, r.params["phase"], r.params["depth"], r.params["batch"]): r for r in made}
    ours = {"gemma4-fast", "gemma4-fast torch"} & {r.contender for r in made}  # one where there are no kernels
    assert "gemma4-fast" in ours and len(found) == len(made) == (7 + len(ours)) * 2 * 3  # batches; prefill, decode, at depth

    fine = found["fine", "prefill", False, 2]
    assert fine.time_us == Spread(250000, 250000, 250000, 250000, 2) and fine.tokens == 16 and fine.versions["fine"] == "9.9"
    decode = found["fine", "decode", False, 2]
    assert (
        decode.time_us is not None
        and decode.time_us.samples == 4
        and decode.tokens_per_s == 4
        and decode.message.startswith("a fake; not compared")
    )
    deep = found["fine", "decode", True, 1]
    again = command.model_plan(parser(COMMANDS).parse_args(shlex.split(deep.command)[1:]), CPU, torch.bfloat16)
    assert [(w.length, w.depth, w.batch) for w in again.workloads] == [(16, True, 1)]  # and nothing else
    assert deep.time_us is not None and deep.time_us.median == 125000 and deep.time_us.samples == 6

    assert all(r.status == "missing" and "a_module_that_is_not_there" in r.message for r in made if r.contender == "load")
    assert all(r.status == "wrong" and r.time_us is None for r in made if r.contender == "other")
    assert found["memory", "prefill", False, 1].status == "out of memory"
    assert (
        found["killed", "decode", False, 1].status == "out of memory"
        and "killed" in found["killed", "decode", False, 1].message
    )
    assert found["killed", "decode", True, 1].status == "ok"  # a new process took over
    assert found["unsupported", "prefill", False, 1].status == "ok"
    assert found["unsupported", "prefill", False, 2].message == "one at a time"
    assert found["liar", "prefill", False, 1].status == "failed" and "no answer" in found["liar", "prefill", False, 1].message
    assert "no answer" in found["liar", "prefill", False, 2].message  # a new process was asked, and lied again
    ours = found["gemma4-fast", "decode", False, 1]
    assert ours.status == "ok" and ours.peak_bytes and ours.bytes
    assert "fine" in out
    (step, *_) = [r for r in rows.read(file) if r.kind == "step"]
    assert step.parts is not None and {"moe", "linear", "gqa_decode", "between ops"} <= set(step.parts)


def test_the_automatic_choice_may_stand_beside_named_backends() -> None:
    assert command.own_contenders(None) == command.own_contenders("auto") == ()
    assert command.own_contenders("auto, torch") == ("", "torch") and command.own_contenders("cpu") == ("cpu",)
    for bad in ("auto,fast", "", "cpu,"):
        with pytest.raises(ValueError, match="unknown backend"):
            command.own_contenders(bad or " ")


def test_a_slow_contender_has_fewer_turns(run: Run, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PATIENCE", 0.3)
    _, out, _ = run("model", "--model", "tiny", "--prompt", "8", "--depth", "16", "--decode", "3", "--rounds", "4", "--check",
                    "off", "--peers", "lame", "--json", "--quiet")  # fmt: skip
    made = [Row.from_dict(json.loads(line)) for line in out.splitlines()]
    (once,) = [r for r in made if r.contender == "lame" and r.params["phase"] == "prefill"]
    assert once.time_us is not None and once.time_us.samples == 1 and "its first run is counted" in once.message
    (deep,) = [r for r in made if r.contender == "lame" and r.params["depth"]]
    # Only the run that fills the cache is slow; the others agree, so that three of them are enough.
    assert deep.time_us is not None and deep.time_us.samples == model.AGREEING * 3


def gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


SLOW = ("model", "--model", "tiny", "--prompt", "8", "--decode", "2", "--rounds", "1", "--check", "off", "--peers", "slow")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
def test_a_peer_that_does_not_answer_is_ended_with_its_children(
    run: Run, fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = process.Worker.ask

    def ask(self: process.Worker, **request: Any) -> dict[str, Any]:
        monkeypatch.setattr(process, "LIMIT", 1.0 if request["do"] == "prompt" and "slow" in self.log.name else 600.0)
        return inner(self, **request)

    monkeypatch.setattr(process.Worker, "ask", ask)
    code, out, err = run(*SLOW, "--json", "--quiet")
    made = [Row.from_dict(json.loads(line)) for line in out.splitlines()]
    late = [r for r in made if r.contender == "slow"]
    assert code == 0 and late and all(r.status == "failed" and r.message == "no answer within 1 s" for r in late), err
    assert [r for r in made if r.kind == "model" and r.contender == "gemma4-fast" and r.status == "ok"]
    assert all(gone(pid) for pid in (tmp_path / "pids").read_text().split())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_the_run_ends_its_processes(run: Run, fakes: None, tmp_path: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup")
    pids = tmp_path / "pids"

    ended = threading.Event()

    def end() -> None:
        while not (pids.exists() and pids.read_text().endswith(" ")):
            if ended.wait(0.05):
                return
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    code, _, err = run(*SLOW)
    ended.set()
    thread.join()
    assert code == 130 and "finished rows are kept" in err
    assert all(gone(pid) for pid in pids.read_text().split())


def test_peers_that_do_not_fit_together_run_one_at_a_time(
    run: Run, fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.ModelBench, "_fit_together", lambda self: False)
    code, out, err = run("model", "--model", "tiny", "--prompt", "8", "--decode", "2", "--rounds", "2", "--check", "off",
                         "--peers", "fine", "--json")  # fmt: skip
    assert code == 0, err
    made = [Row.from_dict(json.loads(line)) for line in out.splitlines()]
    by_name = {(r.contender, r.params["phase"]): r for r in made if r.kind == "model"}
    assert "loaded alone, since all" in by_name["gemma4-fast", "prefill"].message
    assert all(r.time_us is not None and r.time_us.samples == 2 for r in by_name.values())


def test_a_model_that_fails_its_self_check_is_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = process.Worker.ask

    def doubted(self: process.Worker, **request: Any) -> dict[str, Any]:
        assert request["do"] not in ("prompt", "depth", "step"), "timed although it is wrong"
        answer = inner(self, **request)
        return {**answer, "right": False, "verdict": "linear is wrong"} if request["do"] == "check" else answer

    monkeypatch.setattr(process.Worker, "ask", doubted)
    code, out, _ = run("model", "--model", "tiny", "--prompt", "8", "--decode", "2", "--rounds", "1", "--quiet")
    assert code == 1 and "wrong [1]" in out and "[1] linear is wrong\n" in out


@pytest.mark.slow
def test_transformers_runs_the_same_model(run: Run) -> None:
    code, out, _ = run("model", "--model", "tiny", "--prompt", "20", "--depth", "30", "--decode", "4", "--rounds", "1",
                         "--peers", "transformers,vllm", "--json", "--quiet", "--check", "off")  # fmt: skip
    made = [r for r in (Row.from_dict(json.loads(line)) for line in out.splitlines()) if r.kind == "model"]
    theirs = [r for r in made if r.contender.startswith("transformers")]
    assert code == 0 and {r.contender for r in theirs} == {"transformers grouped_mm", "transformers eager"}
    for row in theirs:
        assert row.status == "ok", row.message
        apart = re.search(r"log-probabilities within ([\d.e-]+) of gemma4-fast's", row.message)
        assert apart is not None and float(apart[1]) < 0.3


@pytest.mark.slow
def test_dummy_weights_are_the_same_in_transformers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Gemma4Config.from_dict({"model_type": "gemma4_text", **MEMBERS["e2b"]})
    monkeypatch.setitem(PRESETS, "e2b", small)
    code, out, _ = run("model", "--config", "e2b", "--layers", "10", "--vocab", "64", "--prompt", "16", "--decode", "3",
                         "--dtype", "float32", "--rounds", "1", "--peers", "transformers", "--json", "--quiet")  # fmt: skip
    made = [r for r in (Row.from_dict(json.loads(line)) for line in out.splitlines()) if r.kind == "model"]
    (row,) = [r for r in made if r.contender == "transformers" and r.params["phase"] == "prefill"]
    apart = re.search(r"log-probabilities within ([\d.e-]+) of", row.message)
    assert code == 0 and apart is not None and float(apart[1]) < 1e-3, row.message


# ---------------------------------------------------------------- the recorder
def test_faults_become_statuses() -> None:
    assert fault(MemoryError())["status"] == "out of memory"
    assert fault(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))["status"] == "out of memory"
    assert fault(ops.table.UnsupportedError("no kernel"))["status"] == "unsupported"
    assert fault(ModuleNotFoundError(name="gguf")) == {"status": "missing", "message": "gguf is not installed"}
    assert fault(KeyError("x")) == {"status": "failed", "message": "KeyError: 'x'"}


def test_the_recorder_writes_each_row_at_once(tmp_path: Path) -> None:
    with Recorder(CPU, tmp_path / "rows.jsonl") as recorder:
        recorder.add(timed(), "ops --op linear")
        (row,) = rows.read(tmp_path / "rows.jsonl")
    assert row.command == "gemma4-fast bench ops --op linear" and row.machine["cpu"] and row.finished.endswith("+00:00")


def test_labels_are_folder_names() -> None:
    assert label({"gpu": "NVIDIA H200"}) == "nvidia-h200"
    assert label({"cpu": "Intel(R) Xeon(R) Platinum 8480C", "threads": 4}) == "intel-xeon-platinum-8480c-4-threads"
    assert re.fullmatch(r"[a-z0-9-]+", label({}))


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone can tell and limit it")
def test_asking_for_more_memory_than_there_is_raises() -> None:
    with memory_limit(CPU), pytest.raises(RuntimeError, match="allocate memory"):
        torch.ones(available_bytes() or 0, dtype=torch.int16)  # twice of it
    assert torch.ones(1000).sum() == 1000


def test_the_readmes_figures_are_rows(run: Run) -> None:
    root = Path(__file__).resolve().parent.parent
    files = [str(file) for name in ("model", "standard") for file in sorted(root.glob(f"bench/results/*/{name}.jsonl"))]
    code, out, _ = run("report", "--markdown", *files)
    readme = (root / "README.md").read_text(encoding="utf-8")
    start, end = "standard.jsonl; held by a test -->\n", "<!-- end -->"
    assert code == 0 and readme[readme.index(start) + len(start) : readme.index(end)].strip() == out.strip()
    for row in (row for file in files for row in rows.read(file)):
        assert row.machine["cpu"] and row.versions["torch"]
        assert row.commit and not row.commit.endswith("+")  # what was measured is what is committed
        if row.command:
            parser(COMMANDS).parse_args(shlex.split(row.command)[1:])
