"""The CUDA kernels compiled for GPUs that are not there, compared with cuda_compiled.txt; and that a bad kernel is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_compiled
import cuda_launches
import emulated
import pytest
import torch
from cuda_compiled import Facts, Found, Row

from gemma4_fast import cuda_build

MISSING = cuda_compiled.what_is_missing()
compiles = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ROW = Row("linear.cu", "k<bf16,8>", "sm_90a", 128, 0, 16, 8, 2, 4, 0, 6, 8)
GOOD = Facts(stack=0, spills=0, local=0, waits=True, hasty=0, called=False, threads=256, blocks=2)


@compiles
@pytest.mark.full
def test_kernels_compile_to_what_the_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    code = cuda_compiled.main(["--target", cuda_compiled.QUICK])
    assert code == 0, capsys.readouterr().out


@compiles
@pytest.mark.full
def test_kernels_compile_for_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_compiled.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_product_s_first_block_fits_beside_a_window_s_attention(bits: int) -> None:
    """On an H100 or H200: o_proj's weights are on their way while attention, whose blocks are two, still runs (NOTES.md)."""
    _, rows = cuda_compiled.parse(cuda_compiled.FILE.read_text(encoding="utf-8"))
    numbers = {row.kernel: row for row in rows if row.target == "sm_90a"}
    attention, product = numbers["gqa_decode_kernel<bf16,256,false>"], numbers[f"linear_kernel<bf16,{bits},1,true>"]
    registers = [256 * -(-row.registers // 8) * 8 for row in (attention, attention, product)]  # 256 threads, given by eights
    assert sum(registers) <= 65536
    assert sum(row.shared + 1024 for row in (attention, attention, product)) <= cuda_compiled.SHARED["sm_90a"][0]


# ---- bad kernels ----

MUTANTS = """\
#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {
namespace {

using namespace device;

DEVICE const Bytes16* at(const void* p) { return static_cast<const Bytes16*>(p) + thread_index(); }
DEVICE Bytes16* at(void* p) { return static_cast<Bytes16*>(p) + thread_index(); }

KERNEL(256, 1) good(KERNEL_ARGS(RmsNorm) a) {
  const Bytes16 w = load_weight(at(a.weight));
  wait_for_inputs();
  Bytes16 x = load(at(a.x));
  UNROLL for (int i = 0; i < 4; ++i) x.w[i] += w.w[i];
  store(at(a.out), x);
}

// Weights in a branch and in a loop, and a block that leaves before the wait: nothing is wrong with these.
KERNEL(256, 1) good_with_branches(KERNEL_ARGS(RmsNorm) a) {
  if (block_index().x >= a.rows) return;
  Bytes16 w = {};
  if (a.weight)
    for (int k = 0; k < a.hidden; ++k) w.w[k & 3 ? 0 : 1] += load_weight(at(a.weight) + k).w[1];
  wait_for_inputs();
  Bytes16 x = load(at(a.x));
  UNROLL for (int i = 0; i < 4; ++i) x.w[i] += w.w[i];
  store(at(a.out), x);
}

KERNEL(1024, 2) spills(KERNEL_ARGS(RmsNorm) a) {  // in 32 registers
  wait_for_inputs();
  Bytes16 x[16];
  UNROLL for (int i = 0; i < 16; ++i) x[i] = load(at(a.x) + 1024 * i);
  UNROLL for (int i = 0; i < 16; ++i) store(at(a.out) + 1024 * i, x[15 - i]);
}

KERNEL(256, 1) keeps_an_array(KERNEL_ARGS(RmsNorm) a) {
  wait_for_inputs();
  uint32_t x[64];
  const auto* at = static_cast<const uint32_t*>(a.x);
  for (int i = 0; i < 64; ++i) x[load(at + i) & 63] = load(at + i + 1);
  store(static_cast<uint32_t*>(a.out) + thread_index(), x[load(at) & 63]);
}

KERNEL(256, 1) narrow(KERNEL_ARGS(RmsNorm) a) {
  wait_for_inputs();
  UNROLL for (int i = 0; i < 4; ++i) {
    const int64_t j = thread_index() + 256 * i;
    store(static_cast<uint32_t*>(a.out) + j, load(static_cast<const uint32_t*>(a.x) + j));
  }
}

KERNEL(256, 1) never_waits(KERNEL_ARGS(RmsNorm) a) { store(at(a.out), load_weight(at(a.weight))); }

KERNEL(256, 1) loads_early(KERNEL_ARGS(RmsNorm) a) {
  const Bytes16 x = load(at(a.x));
  wait_for_inputs();
  store(at(a.out), x);
}

KERNEL(256, 1) stores_early(KERNEL_ARGS(RmsNorm) a) {
  store(at(a.out), Bytes16{});
  wait_for_inputs();
}

KERNEL(256, 1) copies_early(KERNEL_ARGS(RmsNorm) a) {
  copy_async(shared_memory() + 16 * thread_index(), at(a.weight), true);
  wait_for_inputs();
  commit_copies();
  wait_for_copies<0>();
  store(at(a.out), reinterpret_cast<Bytes16*>(shared_memory())[thread_index()]);
}

KERNEL(256, 1) counts_early(KERNEL_ARGS(RmsNorm) a) {
  const uint32_t n = count_up(static_cast<uint32_t*>(a.out), 3);
  wait_for_inputs();
  store(static_cast<uint32_t*>(a.out) + 1 + thread_index(), n);
}

KERNEL(256, 1) waits_sometimes(KERNEL_ARGS(RmsNorm) a) {
  if (a.hidden > 2) wait_for_inputs();
  store(at(a.out), load(at(a.x)));
}

__device__ __noinline__ uint32_t fetched(const uint32_t* p) { return load(p) + load(p + 1); }

KERNEL(256, 1) calls(KERNEL_ARGS(RmsNorm) a) {
  wait_for_inputs();
  store(static_cast<uint32_t*>(a.out), fetched(static_cast<const uint32_t*>(a.x)));
}

DEVICE int blocks_of(int rows) { return (rows + 7) / 8; }

template <class Args>
void launch_blocks(const Stream& on, const Args& a) {
  for (auto kernel : {good, good_with_branches, spills, keeps_an_array, narrow, never_waits, loads_early, stores_early,
                      copies_early, counts_early, waits_sometimes, calls})
    launch(on, {{BLOCKS}, 256, 4096}, kernel, a);
}

}  // namespace

void rms_norm(const Stream& on, const RmsNorm& a) { launch_blocks(on, a); }

}  // namespace gemma4_fast::cuda
"""
RACES = ("loads_early", "stores_early", "copies_early", "counts_early", "waits_sometimes")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, list[str]]:
    folder = tmp_path_factory.mktemp("bad")
    source = folder / "bad.cu"
    source.write_text(MUTANTS.replace("BLOCKS", "blocks_of(a.hidden)"))
    return cuda_compiled.compiled("sm_90a", folder, [source])


@compiles
def test_bad_kernels_are_seen(bad: tuple[Found, list[str]]) -> None:
    found, wrong = bad
    rows = {row.kernel: row for row in found}
    faults = {row.kernel: cuda_compiled.broken_rules(row, facts) for row, facts in found.items()}
    assert not faults["good"] and rows["good"].early == rows["good"].load16 - 1 == 1
    assert not faults["good_with_branches"] and rows["good_with_branches"].early >= 1
    (spills,), (array,) = faults["spills"], faults["keeps_an_array"]
    assert "slow memory" in spills and "(0 bytes of spills" not in spills and " 0 instructions" not in spills
    assert "(0 bytes of spills" in array and "a stack of 256 bytes" in array and " 0 instructions" not in array
    assert not faults["narrow"] and (rows["narrow"].load16, rows["narrow"].load) == (0, 4)
    assert "has 0 loads of 16 bytes, expected 1" in cuda_compiled.differences(rows["narrow"], ROW._replace(load16=1), False)
    assert "never waits" in faults["never_waits"][0]
    assert {name for name, said in faults.items() if said and said[0].startswith("races: ")} == set(RACES)
    (function,) = (name for name in faults if "fetched" in name)
    assert "inlined" in faults[function][0]
    assert len(wrong) == 1 and "would end the process" in wrong[0]
    assert {(f.threads, f.blocks) for row, f in found.items() if row.kernel == "spills"} == {(1024, 2)}
    assert rows["copies_early"].async16 == 1


@compiles
def test_a_target_without_early_launches_and_a_launcher_that_is_right(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text(MUTANTS.replace("BLOCKS", "divide_up(a.hidden, 8)").replace("__noinline__", "__forceinline__"))
    found, wrong = cuda_compiled.compiled("sm_80", tmp_path, [source])
    assert not wrong
    faults = {row.kernel for row, facts in found.items() if cuda_compiled.broken_rules(row, facts)}
    assert faults == {"spills", "keeps_an_array"}
    source.write_text("#error what is wrong\n")
    with pytest.raises(cuda_build.BuildError, match="what is wrong"):
        cuda_compiled.compiled("sm_80", tmp_path, [source])


# ---- the file, and judging ----


@pytest.mark.parametrize(
    "change, message, in_another_version",
    [
        (dict(registers=129), "129 registers, expected 128", False),
        (dict(shared=16), "16 bytes of shared memory", True),
        (dict(hmma=15), "15 tensor-core", False),
        (dict(hmma=0), "0 tensor-core", True),
        (dict(load16=7), "7 loads of 16 bytes", False),
        (dict(load16=0), "0 loads of 16 bytes", True),
        (dict(async16=3), "3 asynchronous copies", False),
        (dict(early=7), "7 loads of weights before the wait", False),
    ],
)
def test_what_is_worse_than_the_file(change: dict[str, Any], message: str, in_another_version: bool) -> None:
    row = ROW._replace(**change)
    (found,) = cuda_compiled.differences(row, ROW, same_version=True)
    assert message in found
    assert bool(cuda_compiled.differences(row, ROW, same_version=False)) == in_another_version


# ---- what launches ask for ----


@pytest.mark.parametrize(
    "target, kernel, threads, shared, message",
    [
        ("sm_90a", "k", 256, 115712, ""),  # twice this and the system's: all of it
        ("sm_90a", "k", 256, 115713, "fits 1 times with 115713 bytes of shared memory, and KERNEL says 2 blocks"),
        ("sm_80", "k", 256, 115712, "fits 1 times"),
        ("sm_120", "k", 256, 101377, "with 101377 bytes of shared memory, and a block may have 101376"),
        ("sm_120", "gqa_decode_kernel<half,512,true>", 256, 101376, ""),
        ("sm_120", "gqa_decode_kernel<half,256,true>", 256, 101376, "fits 1 times"),
        ("sm_90a", "k", 288, 0, "with 288 threads, and KERNEL says 256"),
    ],
)
def test_launches_that_cannot_be(target: str, kernel: str, threads: int, shared: int, message: str) -> None:
    row = ROW._replace(target=target, kernel=kernel)
    complete, faults = cuda_compiled.launched({row: GOOD}, {kernel: (threads, shared)})
    assert complete == {row._replace(shared=shared): GOOD}
    assert len(faults) == bool(message) and all(message in fault for fault in faults)


def test_a_kernel_that_nobody_launches() -> None:
    assert cuda_compiled.launched({ROW: GOOD}, {})[1] == [f"{ROW}: is launched by no call of tests/cuda_launches.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch takes ops of these names once")
@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_a_launcher_that_asks_for_too_much() -> None:
    rows = [row for row in cuda_compiled.parse(cuda_compiled.FILE.read_text())[1] if row.kernel.startswith("gqa_decode_kernel")]
    as_it_is = cuda_launches.asked()
    assert rows and all(0 < as_it_is[row.target][row.kernel][1] <= row.shared for row in rows)
    change = "(a.shared / 2 - 1024 - kRest)", "(a.shared - 1024 - kRest)"
    greedy = cuda_launches.asked(emulated.mutant("one_block_for_two", "gqa_decode.cu", *change, "gqa_decode.cu"))
    seen = set()
    for row in rows:
        found = {row._replace(shared=0): GOOD}
        assert not cuda_compiled.launched(found, as_it_is[row.target])[1]
        seen |= {row.target for fault in cuda_compiled.launched(found, greedy[row.target])[1] if "fits 1 times" in fault}
    assert seen == set(cuda_build.TARGETS)


def test_what_is_better_than_the_file() -> None:
    better = ROW._replace(registers=100, hmma=17, load16=9, load=100, async16=5, early=9)
    assert not cuda_compiled.differences(better, ROW, same_version=True)
    assert not cuda_compiled.broken_rules(ROW, GOOD)


def test_kernels_without_a_line_and_lines_without_a_kernel() -> None:
    assert not cuda_compiled.unlisted([ROW], [ROW._replace(registers=1)])
    assert cuda_compiled.unlisted([ROW], []) == ["linear.cu k<bf16,8> for sm_90a: is not in the file"]
    assert cuda_compiled.unlisted([], [ROW]) == ["linear.cu k<bf16,8> for sm_90a: is in the file, and is compiled no more"]


def test_the_file_is_read_as_it_was_written() -> None:
    rows = [ROW._replace(kernel=k, target=t) for k in ("b<1>", "a<(End)1,true>") for t in cuda_build.TARGETS]
    written = cuda_compiled.text(reversed(rows), "13.0.88")
    version, read = cuda_compiled.parse(written)
    assert version == "13.0.88" and set(read) == set(rows)
    assert [r.kernel[0] for r in read] == 4 * ["a"] + 4 * ["b"] and [r.target for r in read[:4]] == list(cuda_build.TARGETS)
    assert cuda_compiled.text(read, "13.0.88") == written
    with pytest.raises(ValueError, match="no line '# nvcc VERSION'"):
        cuda_compiled.parse(written.replace("# nvcc", "# gcc"))
    with pytest.raises(ValueError, match="this is no line"):
        cuda_compiled.parse(written.replace("128", "many"))


def test_names_that_people_read() -> None:
    said = "void gemma4_fast::cuda::(anonymous namespace)::k<__nv_bfloat16, (gemma4_fast::cuda::End)1>(gemma4_fast::cuda::Args)"
    assert cuda_compiled.short(said) == "k<bf16,(End)1>"


def test_files_by_what_they_launch() -> None:
    (norms,) = cuda_compiled.chosen_files(["rms_norm", "norm_add_norm", "norms"])
    assert norms.name == "norms.cu" and norms in cuda_compiled.chosen_files(None)
    with pytest.raises(ValueError, match="there is no softmax; there are"):
        cuda_compiled.chosen_files(["softmax"])


@compiles
@pytest.mark.full
def test_the_command_tells_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version, rows = cuda_compiled.parse(cuda_compiled.FILE.read_text())
    narrow = [row for row in rows if row.file == "norms.cu" and row.target == "sm_90a"]
    file = tmp_path / "compiled.txt"
    others = [narrow[0]._replace(file="other.cu"), narrow[0]._replace(target="sm_80")]
    file.write_text(cuda_compiled.text([narrow[0]._replace(registers=16), *narrow[2:], *others], version))
    only = ["--target", "sm_90a", "--op", "rms_norm", "--file", str(file)]
    assert cuda_compiled.main(only) == 1
    said = capsys.readouterr().out
    assert f"{narrow[0]}: takes {narrow[0].registers} registers, expected 16" in said
    assert f"{narrow[1]}: is not in the file" in said and " 2 faults\n" in said and cuda_compiled.COMMAND in said
    assert cuda_compiled.main([*only, "--write"]) == 0
    assert set(cuda_compiled.parse(file.read_text())[1]) == {*narrow, *others}
    capsys.readouterr()
    file.write_text(cuda_compiled.text([narrow[0]._replace(registers=16), *narrow[1:], *others], "12.8.1"))
    assert cuda_compiled.main(only) == 0 and "not compared" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cuda_compiled.main([*only, "--write"])
