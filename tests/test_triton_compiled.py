"""Triton's kernels compiled for GPUs that are not there, compared with triton_compiled.txt; and that a bad kernel is seen.

Compiling runs in a process of its own: in this one, kernels may be defined for Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton_compiled
from triton_compiled import Facts, Launch, Row

pytest.importorskip("triton")

from gemma4_fast.triton.common import TARGETS

GOOD = Facts(
    registers=128, shared=65536, spills=0, stack=0, tensor="HGMMA", async16=8, async_=0, tma=0, load16=2, load=0,
    total_warps=4, tensor_memory=0, wants_tensor=True, hasty=0,
)  # fmt: skip
LAUNCH = Launch("linear", "26b_1_token", "_kernel", "sm_90", 4, 3, "bf16 END=none K=1")
ROW = Row.of(LAUNCH, GOOD)


def run(*args: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command, as one would type it; `folder` has modules to --import."""
    paths = [str(folder or ""), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, triton_compiled.__file__, *map(str, args)]
    return subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def test_some_kernels_compile_and_all_are_listed() -> None:
    done = run("--quick")
    assert done.returncode == 0, done.stdout


@pytest.mark.full
def test_every_kernel_for_every_target() -> None:
    done = run()
    assert done.returncode == 0, done.stdout


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_fit_too(dtype: str) -> None:
    """fp32 is there to look into a model with, not to be fast: its products, which no tensor core does, may spill."""
    done = run("--dtype", dtype, "--target", "sm_80", "--target", "sm_90")
    faults = [line for line in done.stdout.partition(" faults\n")[2].splitlines() if line]
    if dtype == "float32":
        faults = [fault for fault in faults if " spills registers (" not in fault]
    assert " kernels compiled with triton" in done.stdout and not faults, done.stdout


@pytest.mark.parametrize(
    "target, change, message",
    [
        ("sm_90", dict(spills=3), "spills"),
        ("sm_90", dict(stack=8), "stack of 8 bytes"),
        ("sm_90", dict(shared=232449), "232449 bytes of shared memory, the GPU has 232448"),
        ("sm_120", dict(shared=110000), "the GPU has 101376"),
        ("sm_90", dict(registers=129, total_warps=16), "cannot be launched: 16 warps of 136 registers"),
        ("sm_90", dict(registers=32, total_warps=64), "64 warps"),
        ("gfx942", dict(registers=257, total_warps=8), "cannot be launched"),
        ("gfx942", dict(registers=32, total_warps=32), "32 warps"),
        ("sm_100", dict(tensor_memory=513), "tensor memory"),
        ("sm_90", dict(tensor="-"), "without tensor cores"),
        ("sm_90", dict(hasty=None), "when the one before has ended"),
        ("sm_90", dict(hasty=2), "races: 2 accesses"),
    ],
)
def test_what_no_kernel_may_do(target: str, change: dict[str, Any], message: str) -> None:
    assert not triton_compiled.broken_rules(dataclasses.replace(GOOD, shared=65536), TARGETS[target])
    (fault,) = triton_compiled.broken_rules(dataclasses.replace(GOOD, **change), TARGETS[target])
    assert message in fault


def test_a_grid_that_no_gpu_takes() -> None:
    assert not triton_compiled.judge(dataclasses.replace(LAUNCH, grid=(100000, 65535)), GOOD, ROW, True)
    (fault,) = triton_compiled.judge(dataclasses.replace(LAUNCH, grid=(1, 65536)), GOOD, ROW, True)
    assert "65535" in fault


@pytest.mark.parametrize(
    "change, message, in_another_version",
    [
        (dict(tensor="HMMA"), "HMMA, expected HGMMA", False),
        (dict(tensor="-"), "-, expected HGMMA", True),
        (dict(copies="none"), "none, expected async", False),
        (dict(copies="tma"), "tma, expected async", False),
        (dict(registers=137), "137 registers, expected 128", False),
    ],
)
def test_what_differs_from_the_file(change: dict[str, Any], message: str, in_another_version: bool) -> None:
    row = ROW._replace(**change)
    (found,) = triton_compiled.differences(row, ROW, same_version=True)
    assert message in found
    assert bool(triton_compiled.differences(row, ROW, same_version=False)) == in_another_version


def test_what_may_differ_from_the_file() -> None:
    assert not triton_compiled.differences(ROW._replace(registers=136), ROW, same_version=True)
    assert not triton_compiled.differences(ROW._replace(registers=20), ROW, same_version=True)


def test_one_word_for_copies() -> None:
    words = {"tma": dict(tma=1), "async": dict(async16=0, async_=1), "none": dict(async16=0)}
    assert {dataclasses.replace(GOOD, **change).copies: change for change in words.values()} == words


def test_rows_without_a_launch_and_launches_without_a_row() -> None:
    assert not triton_compiled.unlisted([LAUNCH], [ROW])
    assert triton_compiled.unlisted([], [ROW]) == [
        "linear 26b_1_token _kernel for sm_90: is in the file, but is launched no more"
    ]
    assert triton_compiled.unlisted([LAUNCH], []) == ["linear 26b_1_token _kernel for sm_90: is not in the file"]
    for change in (dict(warps=8), dict(stages=4), dict(constants="bf16 END=geglu K=1")):
        (found,) = triton_compiled.unlisted([dataclasses.replace(LAUNCH, **change)], [ROW])
        assert f"the file has {getattr(ROW, next(iter(change)))}" in found


def test_the_file_is_read_as_it_was_written() -> None:
    rows = [ROW._replace(case=case, target=target) for case in ("a", "b") for target in TARGETS]
    rows += [ROW._replace(kernel="_kernel/2", target=target, constants="", tensor="-", copies="none") for target in TARGETS]
    rows += [
        ROW._replace(op="moe", case=f"a_case_with_a_long_name_{i}", constants=f"bf16 {'LONG' * 20}=1 M=1") for i in range(9)
    ]
    written = triton_compiled.text(rows, "3.6.0")
    version, read = triton_compiled.parse(written)
    assert version == "3.6.0" and sorted(read) == sorted(rows)
    assert triton_compiled.text(reversed(rows), "3.6.0") == written
    assert max(map(len, written.splitlines())) <= triton_compiled.WIDTH
    with pytest.raises(ValueError, match="no line '# triton VERSION'"):
        triton_compiled.parse(written.replace("# triton 3", "# 3"))
    for broken in (
        written.replace(" stages ", " phases "),
        written + "\nlinear _kernel  a\n    bf16\n",
        written + "\nlinear _kernel\n",
    ):
        with pytest.raises(ValueError, match="this is no block that"):
            triton_compiled.parse(broken)


def test_what_is_the_same_is_written_once() -> None:
    rows = [
        ROW._replace(case=case, target=target, constants=f"bf16 BLOCK={block} K={k}")
        for case, k in (("a", 1), ("b", 1), ("c", 2))
        for target, block in (("gfx942", 32), ("sm_90", 64), ("sm_100", 64))
    ]
    rows[1] = rows[1]._replace(registers=96)
    sm_90, sm_100, gfx942 = (
        f"    {target:6}  128 registers  65536 shared  4 warps  3 stages  HGMMA  async"
        for target in ("sm_90", "sm_100", "gfx942")
    )
    expected = f"""\
linear _kernel  a
    bf16 K=1
{sm_90.replace("128", " 96")}  BLOCK=64
{sm_100}  BLOCK=64
{gfx942}  BLOCK=32

linear _kernel  b
    bf16 K=1
{sm_90}  BLOCK=64
{sm_100}  BLOCK=64
{gfx942}  BLOCK=32

linear _kernel  c
    bf16 K=2
{sm_90}  BLOCK=64
{sm_100}  BLOCK=64
{gfx942}  BLOCK=32
"""
    assert triton_compiled.blocks(rows) == expected
    same = triton_compiled.blocks([*rows[:1], rows[1]._replace(registers=128), *rows[2:]])
    assert same.startswith("linear _kernel  a b\n    bf16 K=1\n") and same.count("linear") == 2


def test_spills_of_an_amd_kernel() -> None:
    counts = {"vgpr_count": 256, "vgpr_spill_count": 2, "sgpr_spill_count": 1, "private_segment_fixed_size": 16}
    code = (
        "\tglobal_load_dwordx4 v[0:3], v1, s[0:1]\n\tbuffer_load_dword v2, s[8:11], 0 offen lds\n\tv_mfma_f32_32x32x8_bf16 a\n"
    )
    read = triton_compiled.read_amdgcn(code + "".join(f"    .{name}: {value}\n" for name, value in counts.items()))
    assert (read["registers"], read["spills"], read["stack"], read["tensor"]) == (256, 2, 16, "mfma")
    assert (read["load16"], read["load"], read["async16"], read["async_"]) == (1, 0, 0, 1)


BAD_KERNELS = """
import multiprocessing
import os

import torch
import triton
import triton.language as tl

from gemma4_fast.ops.table import Cost, Impl, Op, register
from gemma4_fast.triton.common import early, inputs_ready


@triton.jit
def hoards(x_ptr, out_ptr, BLOCK: tl.constexpr):
    inputs_ready()
    x = tl.load(x_ptr + tl.arange(0, BLOCK))  # in one warp, BLOCK / 32 values for each thread
    tl.store(out_ptr + tl.arange(0, BLOCK), x - tl.sum(x, 0))


@triton.jit
def squares(x_ptr, out_ptr, K, BLOCK: tl.constexpr):
    inputs_ready()
    i = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + i[:, None] * K + k + i[None, :])
        y = tl.load(x_ptr + i[None, :] * K + k + i[:, None])
        acc = tl.dot(x, y, acc, input_precision="ieee")
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], acc)


@triton.jit
def looks(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    inputs_ready()
    tl.store(out_ptr, x)


@triton.jit
def leaves(x_ptr, out_ptr, n):
    if tl.program_id(0) >= n:
        return
    inputs_ready()
    tl.store(out_ptr, tl.load(x_ptr))


@triton.jit
def forgets(x_ptr, out_ptr, n):
    if n > 2:
        inputs_ready()
    tl.store(out_ptr, tl.load(x_ptr))


@triton.jit(noinline=True)
def fetched(x_ptr):
    return tl.load(x_ptr)


@triton.jit
def calls(x_ptr, out_ptr):
    x = fetched(x_ptr)
    inputs_ready()
    tl.store(out_ptr, x)


def races(x):
    calls[(1,)](x, x, **early(x))
    looks[(1,)](x, x, **early(x))
    leaves[(1,)](x, x, 4096, **early(x))
    forgets[(1,)](x, x, 4096, **early(x))


def late(x):
    hoards[(1,)](x, x, 64)


def spills(x):
    hoards[(1,)](x.float(), x.float(), 16384, num_warps=1, **early(x))


def oversized(x):
    squares[(1,)](x, x.float(), 4096, 64, num_stages=30, **early(x))


def exact(x):
    squares[lambda sizes: (4096 // sizes["K"],)](x.float(), x.float(), 4096, 32, **early(x))


def reads(x):
    hoards[(int(x.max()),)](x, x, 64)


def unserved(x):
    raise AssertionError("refused arguments must not come here")


def breaks(x):
    squares[(1,)](x, x, 4096, 48)  # no power of two


def dies(x):
    hoards[(1,)](x, x, 64)
    if multiprocessing.parent_process() is not None:  # while compiling, not while launches are listed
        print("LLVM ERROR: out of patience", flush=True)
        os._exit(134)


for function in (spills, oversized, exact, races, late, reads, unserved, breaks, dies):
    accepts = (lambda x: "takes no such x") if function is unserved else None
    register(Op(
        name=function.__name__, summary="", reference=function, check=lambda x: None, cases={}, cost=lambda x: Cost(0, 0),
        bench_cases={"one": lambda m: dict(x=m.randn(64, 4096))},
        impls={"triton": Impl(f"bad_kernels:{function.__name__}", accepts=accepts)},
    ))
"""


@pytest.mark.full
def test_bad_kernels_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    file = tmp_path / "compiled.txt"
    common = ("--import", "bad_kernels", "--target", "sm_90", "--file", file)
    names = ("spills", "oversized", "exact", "races", "late", "reads", "unserved", "breaks")
    done = run(*common, "--write", *(part for name in names for part in ("--op", name)), folder=tmp_path)
    assert done.returncode == 1
    lines = [line for line in done.stdout.partition(" faults\n")[2].splitlines() if " for sm_90: " in line]
    faults = {line.split()[0]: line for line in lines}
    assert set(faults) == {"spills", "oversized", "races", "late", "reads", "breaks"}, done.stdout
    assert {line.split()[2] for line in lines if ": races: " in line} == {"looks", "leaves", "forgets", "calls"}
    assert "in place before" in faults["late"]
    assert (
        re.search(r"spills registers \([1-9]\d*; a stack of [1-9]", faults["spills"])
        and "bytes of shared memory" not in faults["spills"]
    )
    assert "bytes of shared memory, the GPU has 232448" in faults["oversized"]
    assert "the call fails" in faults["reads"] and "makes the GPU wait" in faults["reads"]
    assert "does not compile" in faults["breaks"]
    assert "unserved one for sm_90 is left out: Triton's unserved takes no such x" in done.stdout

    version, rows = triton_compiled.parse(file.read_text())
    found = {row.op: row for row in rows}
    assert set(found) == {"spills", "oversized", "exact", "races", "late"}
    assert found["spills"].copies == "none"
    assert found["oversized"][6:] == (4, 30, "HGMMA", "async", "bf16,fp32 BLOCK=64")
    assert found["exact"].tensor == "-" and found["exact"].constants == "fp32 BLOCK=32"
    assert not cache.exists()

    exact = found["exact"]
    file.write_text(triton_compiled.text([exact._replace(tensor="HMMA"), exact._replace(case="gone")], version))
    done = run(*common, "--op", "exact", "--op", "dies", "--jobs", "1", "--keep-cache", "--counts", folder=tmp_path)
    assert done.returncode == 1
    assert "dies one hoards for sm_90: does not compile: the compiler ends its process; ERROR: out of patience" in done.stdout
    assert "dies one hoards for sm_90: is not in the file" in done.stdout
    assert "exact one squares for sm_90: tensor-core instructions: -, expected HMMA" in done.stdout
    assert "exact gone squares for sm_90: is in the file, but is launched no more" in done.stdout
    assert triton_compiled.COMMAND in done.stdout and " 4 faults\n" in done.stdout
    assert re.search(r"^op .* load16  load ", done.stdout, re.M) and re.search(
        r"^exact +one .* fp32 BLOCK=32$", done.stdout, re.M
    )
    assert list(cache.glob("*/squares.cubin"))

    done = run(*common, "--op", "exact", "--op", "oversized", "--dtype", "float16", folder=tmp_path)
    assert done.returncode == 1 and "    fp16,fp32 BLOCK=64\n" in done.stdout
    assert " 1 faults\noversized one squares for sm_90: takes " in done.stdout, done.stdout
    assert run(*common, "--dtype", "float16", "--write", folder=tmp_path).returncode == 2
