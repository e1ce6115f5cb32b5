"""Compiles every CUDA kernel for GPUs that are not there, and reads in the machine code whether it will run and run well.

    python tests/cuda_compiled.py                      compile all, compare with tests/cuda_compiled.txt
    python tests/cuda_compiled.py --target sm_90a --op rms_norm
    python tests/cuda_compiled.py --write              make the file anew; with --target or --op, those lines alone

The sources are all csrc/cuda/*.cu there are, compiled as an installation compiles them, into build/cuda/<target>: what has not
changed is not compiled again. What holds for every compiler version (`broken_rules`): no spills, no stack and no local memory;
everything inlined; where launches are early, no look at memory before the one before has ended, but for weights; and what the
launchers ask for is there, for as many blocks at once as KERNEL(threads, blocks) says (`launched`). What the file adds
(`differences`): the kernels are those it lists and take no more shared memory; with the nvcc version that it names there are no
more registers, and no fewer loads of 16 bytes, tensor-core instructions and weights asked for early. What the kernels compute,
test_cuda.py tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gemma4_fast import cuda_build
from gemma4_fast.cuda_build import Tools

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".txt")
BUILD = ROOT / "build" / "cuda"
COMMAND = "python tests/cuda_compiled.py --write"
QUICK = "sm_90a"  # what `make test` compiles for
# Bytes of shared memory: of a multiprocessor, and that a block may have. RESERVED of each block's are the system's.
SHARED = {"sm_80": (164 << 10, 163 << 10), "sm_120": (100 << 10, 99 << 10)}
SHARED |= dict.fromkeys(("sm_90a", "sm_100"), (228 << 10, 227 << 10))
RESERVED = 1 << 10
# 100 KB hold two tiles of 512 columns once, and not twice: attention takes one block there, of the two that it is compiled for.
ALONE = re.compile(r"gqa_decode_kernel<\w+,512,\w+> for sm_120")


class Row(NamedTuple):
    """What the machine code of one kernel says; of instructions, how often they stand in the code. In the file: a line."""

    file: str
    kernel: str  # without blanks
    target: str
    registers: int  # of a thread
    shared: int  # bytes of a block
    hmma: int  # tensor-core instructions
    load16: int  # loads from global memory of 16 bytes a thread and more
    load: int  # and of fewer
    async16: int  # the same, to shared memory, for which no thread waits
    async_: int
    matrices: int  # ldmatrix
    early: int  # loads of weights before the launch before has ended

    @property
    def key(self) -> tuple[str, str, str]:
        return self[:3]

    def __str__(self) -> str:
        return f"{self.file} {self.kernel} for {self.target}"


NUMBERS = Row._fields[3:]
LINE = re.compile(r"(sm_\w+)" + len(NUMBERS) * r" +(\d+)" + r"  (\S+) (\S+)")
HEADER = f"""\
# What the CUDA kernels compile to, a kernel and GPU a line. Written by `{COMMAND}`; tests/test_cuda_compiled.py compares.
# nvcc {{version}}
#
#   regs    registers of a thread                               async16, async  copies to shared memory that run by themselves
#   shared  bytes of shared memory of its largest launch        ldsm            matrices loaded from shared memory
#   hmma    tensor-core instructions                            early           loads of weights before the wait for the launch
#   ldg16   loads from global memory of 16 bytes; ldg: fewer                    before (sm_90 and newer)
# Tested: no kernel spills registers or has a stack; there is shared memory for the blocks that KERNEL(threads, blocks) says.
#
#      regs shared  hmma ldg16   ldg async16 async  ldsm early
"""


class Facts(NamedTuple):
    """What is in no line, since it must not be."""

    stack: int  # bytes of a thread
    spills: int  # bytes stored and loaded
    local: int  # instructions that reach a thread's own memory
    waits: bool  # for the launch before
    hasty: int  # looks at memory before that, but for weights
    called: bool  # a function that is not inlined
    threads: int  # KERNEL's: in a block at most
    blocks: int  # and on a multiprocessor at once at least


Found = dict[Row, Facts]


# ---- the file ----


def line(row: Row) -> str:
    numbers = "".join(f"{n:{width}}" for n, width in zip(row[3:], (4, 7, 6, 6, 6, 8, 6, 6, 6), strict=True))
    return f"{row.target:7}{numbers}  {row.file} {row.kernel}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: (r.file, r.kernel, len(r.target.rstrip("a")), r.target))


def text(rows: Iterable[Row], version: str) -> str:
    return HEADER.format(version=version) + "".join(f"{line(row)}\n" for row in in_order(rows))


def parse(written: str) -> tuple[str, list[Row]]:
    """The file's text -> the nvcc version that it was made with, and its rows. ValueError if it is no such file."""
    version, rows = re.search(r"^# nvcc (\S+)$", written, re.M), []
    if version is None:
        raise ValueError(f"this is not a file that `{COMMAND}` writes: no line '# nvcc VERSION'")
    for told in written.splitlines():
        if not told.startswith("#"):
            if (match := LINE.fullmatch(told)) is None:
                raise ValueError(f"this is no line that `{COMMAND}` writes: {told}")
            target, *numbers, file, kernel = match.groups()
            rows.append(Row(file, kernel, target, *map(int, numbers)))
    return version[1], rows


# ---- judging ----


def has_early_launch(target: str) -> bool:
    return int(re.sub(r"\D", "", target)) >= 90


def broken_rules(row: Row, facts: Facts) -> list[str]:
    """What no kernel may do, whatever the compiler."""
    found = []
    if facts.spills or facts.stack or facts.local:
        what = f"{facts.spills} bytes of spills, {facts.local} instructions on local memory, a stack of {facts.stack} bytes"
        found.append(f"keeps values in slow memory ({what}): fewer values at once, and no array with an index known late")
    if facts.called:
        found.append("is a function that is called: write DEVICE, so that it is inlined")
    elif has_early_launch(row.target) and not facts.waits:
        found.append("never waits for the launch before: wait_for_inputs()")
    elif facts.hasty:
        found.append(f"races: {facts.hasty} looks at memory, other than load_weight, may come before wait_for_inputs()")
    return found


def differences(row: Row, expected: Row, same_version: bool) -> list[str]:
    """What is worse than the file says. Another version may choose other instructions, but not none for some."""
    found = []
    if same_version and row.registers > expected.registers:
        found.append(f"takes {row.registers} registers, expected {expected.registers}")
    if row.shared > expected.shared:
        found.append(f"takes {row.shared} bytes of shared memory, expected {expected.shared}")
    words = dict(hmma="tensor-core instructions", load16="loads of 16 bytes", async16="asynchronous copies of 16 bytes")
    for name, what in {**words, "early": "loads of weights before the wait"}.items():
        now, then = getattr(row, name), getattr(expected, name)
        if now < then and (same_version or now == 0):
            found.append(f"has {now} {what}, expected {then}")
    return found


def launched(found: Found, asked: dict[str, tuple[int, int]]) -> tuple[Found, list[str]]:
    """The rows with the bytes that launches ask for, and which launches cannot be. asked: by kernel, threads and bytes."""
    complete, faults = Found(), list[str]()
    for row, facts in found.items():
        threads, shared = asked.get(row.kernel, (0, 0))
        row = row._replace(shared=row.shared + shared)
        complete[row] = facts
        of_all, of_block = SHARED[row.target]
        blocks = 1 if ALONE.search(str(row)) else facts.blocks
        if row.kernel not in asked:
            faults.append(f"{row}: is launched by no call of tests/cuda_launches.py")
        if threads > facts.threads:
            faults.append(f"{row}: is launched with {threads} threads, and KERNEL says {facts.threads}")
        if row.shared > of_block:
            faults.append(f"{row}: is launched with {row.shared} bytes of shared memory, and a block may have {of_block}")
        elif blocks > (fit := of_all // (row.shared + RESERVED)):
            faults.append(f"{row}: fits {fit} times with {row.shared} bytes of shared memory, and KERNEL says {blocks} blocks")
    return complete, faults


def unlisted(found: Iterable[Row], listed: Iterable[Row]) -> list[str]:
    now, then = {row.key: row for row in found}, {row.key: row for row in listed}
    gone = [f"{row}: is in the file, and is compiled no more" for key, row in then.items() if key not in now]
    return sorted([*gone, *(f"{row}: is not in the file" for key, row in now.items() if key not in then)])


# ---- reading machine code ----

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)([^;?&]*)", re.M)
WIDE = {"128", "256"}
HASTY = re.compile(r"LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UTMA\w+|UBLK\w+")
LOCAL = {"LDL", "STL"}
BOUNDS = re.compile(r"\.entry (\w+)\([^)]*\)\s+\.maxntid (\d+)[^\n]*\s+\.minnctapersm (\d+)")


class Instruction(NamedTuple):
    address: int
    guarded: bool  # a predicate decides whether it happens
    opcode: str
    suffixes: frozenset[str]
    operands: str

    @property
    def target(self) -> int | None:
        """Where it may go to."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found and self.opcode in ("BRA", "JMP", "BSSY", "CALL", "WARPSYNC") else None

    @property
    def is_weight(self) -> bool:
        """As load_weight in csrc/cuda/device.cuh asks for it: not to stay in the L1 cache."""
        return self.opcode == "LDG" and "NA" in self.suffixes


def instructions(sass: str) -> list[Instruction]:
    return [
        Instruction(int(address, 16), bool(guard), opcode, frozenset(suffixes.split(".")), operands)
        for address, guard, opcode, suffixes, operands in INSTRUCTION.findall(sass)
    ]


def before_wait(code: list[Instruction]) -> list[Instruction]:
    """What some way from the beginning leads to without the wait for the launch before."""
    index = {ins.address: i for i, ins in enumerate(code)}
    ways, seen = [0], set[int]()
    meetings, met = defaultdict[str, list[int]](list), set[str]()  # of threads that went different ways, by the barrier's name

    def go(address: int | None) -> None:
        if address in index:
            ways.append(index[address])

    while ways:
        i = ways.pop()
        if i in seen or i >= len(code):
            continue
        seen.add(i)
        ins = code[i]
        barrier = ins.operands.split(",")[0].strip()
        if ins.opcode == "BSSY" and ins.target is not None:
            meetings[barrier].append(ins.target)
            if barrier in met:
                go(ins.target)
        elif ins.opcode == "BSYNC":
            met.add(barrier)
            for address in meetings[barrier]:
                go(address)
        elif ins.opcode in ("BRX", "JMX"):  # who knows where to
            return code
        else:
            go(ins.target)
        always = not ins.guarded and "," not in ins.operands
        if not (always and ins.opcode in ("ACQBULK", "EXIT", "RET", "BRA", "JMP")):
            ways.append(i + 1)
    return [code[i] for i in sorted(seen)]


def short(name: str) -> str:
    """void gemma4_fast::cuda::(anonymous namespace)::k<__half, 4>(gemma4_fast::cuda::Args) -> k<half,4>"""
    name = re.sub(r"\(anonymous namespace\)::|gemma4_fast::(?:cuda|device)::|^void ", "", name)
    name = re.sub(r"\((?:const )?\w+\)(?: const)?$", "", name)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "half").replace(" ", "")


def demangled(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def read(file: str, target: str, log: str, sass: str) -> Found:
    """What ptxas says of each kernel (-Xptxas -v), and its code and PTX, as cuobjdump shows them."""
    kernels = set(re.findall(r"Compiling entry function '(\w+)'", log))
    told = dict(re.findall(r"Function properties for (\w+)\n((?:(?!.*Function properties).*\n)*)", log))
    codes = dict(re.findall(r"Function : (\w+)\n((?:(?!.*Function : ).*\n)*)", sass))
    bounds = {name: (int(n), int(m)) for name, n, m in BOUNDS.findall(sass)}
    found = Found()
    for mangled, name in demangled(told.keys() | codes.keys()).items():
        said = told.get(mangled, "")

        def number(pattern: str, said: str = said) -> int:
            return sum(map(int, re.findall(pattern, said)))

        threads, blocks = bounds.get(mangled, (0, 0))
        code = instructions(codes.get(mangled, ""))
        early = has_early_launch(target)
        before = before_wait(code) if early else []
        count = Counter(i.opcode + ("16" if i.opcode in ("LDG", "LDGSTS") and WIDE & i.suffixes else "") for i in code)
        row = Row(
            file, name, target,
            registers=number(r"Used (\d+) registers"), shared=number(r"(\d+) bytes smem"), hmma=count["HMMA"],
            load16=count["LDG16"], load=count["LDG"], async16=count["LDGSTS16"], async_=count["LDGSTS"],
            matrices=count["LDSM"], early=sum(i.is_weight for i in before),
        )  # fmt: skip
        assert row.key not in {r.key for r in found}, f"two kernels are called {row}"
        found[row] = Facts(
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill"),
            local=count["LDL"] + count["STL"],
            waits=not early or count["ACQBULK"] > 0,
            hasty=sum(HASTY.fullmatch(i.opcode) is not None and not i.is_weight for i in before),
            called=mangled not in kernels,
            threads=threads,
            blocks=blocks,
        )
    return found


# ---- compiling ----


def find_cuobjdump(tools: Tools) -> str | None:
    """CUDA's own, or the one that Triton brings along."""
    beside = Path(shutil.which(tools.nvcc) or tools.nvcc).resolve().with_name("cuobjdump")
    triton = find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else beside
    return shutil.which(beside) or shutil.which("cuobjdump") or shutil.which(brought)


def what_is_missing() -> str | None:
    tools = cuda_build.find_tools()
    if isinstance(tools, str):
        return f"compiling {tools}"
    if shutil.which("c++filt") is None or shutil.which("nm") is None:
        return "there are no c++filt and nm (binutils)"
    return None if find_cuobjdump(tools) else "there is no cuobjdump: pip install triton, which brings it"


def disassembled(cuobjdump: str, built: Path) -> str:
    """What it has said of this file before, if the file is not newer."""
    kept = built.with_suffix(".sass")
    if not kept.exists() or kept.stat().st_mtime_ns < built.stat().st_mtime_ns:
        done = subprocess.run([cuobjdump, "-sass", "-ptx", str(built)], capture_output=True, text=True, check=True)
        kept.write_text(done.stdout)
    return kept.read_text()


def prepare(target: str, folder: Path, files: Iterable[Path] | None = None) -> tuple[Tools, list[str]]:
    """A build of the library for this target alone -> what it needs, and the objects."""
    tools, torch = cuda_build.find_tools(), find_spec("torch")
    assert not isinstance(tools, str) and torch is not None and torch.origin is not None
    csrc = ROOT / "csrc"
    files = cuda_build.sources(csrc) if files is None else files
    gencode = cuda_build.gencode([target], ptx_too=True)  # which alone keeps KERNEL's numbers
    objects = cuda_build.write_ninja(folder, folder / "_cuda.so", tools, Path(torch.origin).parent, gencode, files, csrc)
    return tools, objects


def compiled(target: str, folder: Path, files: Iterable[Path], jobs: int | None = None) -> tuple[Found, list[str]]:
    """The kernels of these sources, and what is wrong with the code for the CPU beside them. BuildError: no code."""
    every = None if folder == BUILD / target else files  # one build.ninja for a folder
    tools, _ = prepare(target, folder, every)
    objects = [folder / f"{file.stem}.o" for file in files]
    cuda_build.run_ninja(folder, tools.ninja, [built.name for built in objects], jobs=jobs)
    cuobjdump = find_cuobjdump(tools)
    assert cuobjdump is not None
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        codes = list(pool.map(lambda built: disassembled(cuobjdump, built), objects))
    found, faults = Found(), []
    for file, built, sass in zip(files, objects, codes, strict=True):
        found |= read(file.name, target, Path(f"{built}.log").read_text(), sass)
        wanted = subprocess.run(["nm", "-u", str(built)], capture_output=True, text=True, check=True).stdout.split()
        if "exit" in wanted:  # what nvcc makes of a function for the GPU alone that is called on the CPU, without a word
            faults.append(f"{file.name} for {target}: a launcher calls what is DEVICE, which would end the process")
    return found, faults


def asked_for() -> dict[str, dict[str, tuple[int, int]]]:
    """By target and kernel, what launches ask for."""
    command = [sys.executable, str(Path(__file__).with_name("cuda_launches.py"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


# ---- the command ----


def chosen_files(names: Iterable[str] | None) -> list[Path]:
    """All kernel files, or those that launch these ops or are called so. ValueError for a name that is neither."""
    files = [path for path in cuda_build.sources(ROOT / "csrc") if path.suffix == ".cu"]
    if names is None:
        return files
    of: dict[str, Path] = {path.stem: path for path in files}
    for path in files:
        of |= dict.fromkeys(re.findall(r"^void (\w+)\(const Stream& ", path.read_text(), re.M), path)
    if unknown := [name for name in names if name not in of]:
        raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(sorted(of))}")
    return sorted({of[name] for name in names})


def main(argv: list[str] | None = None) -> int:
    """0: all is as it should be. 1: faults, which are printed last."""
    p = argparse.ArgumentParser(description="Compile the CUDA kernels for GPUs that are not there, and judge what comes out.")
    p.add_argument("--target", action="append", choices=cuda_build.TARGETS, metavar="NAME", help="sm_90a, ...; all if left out")
    p.add_argument("--op", action="append", metavar="NAME", help="an op, or a file without its ending; all if left out")
    p.add_argument("--write", action="store_true", help="write what is found into the file, instead of comparing")
    p.add_argument("--jobs", type=int, metavar="N", help="processes (default: about one for each core)")
    p.add_argument("--file", type=Path, default=FILE, help="the file to compare with, or to write")
    args = p.parse_args(argv)
    if (missing := what_is_missing()) is not None:
        p.error(missing)
    tools = cuda_build.find_tools()
    assert not isinstance(tools, str)
    targets = args.target or list(cuda_build.TARGETS)
    anew = args.write and not (args.target or args.op)
    try:
        files = chosen_files(args.op)
        version, rows = parse(args.file.read_text()) if args.file.exists() and not anew else (None, [])
    except ValueError as error:
        p.error(str(error))
    names = {file.name for file in files}
    listed = [r for r in rows if r.target in targets and (r.file in names or args.op is None)]
    others = [row for row in rows if row not in listed]
    if args.write and others and version != tools.version:
        p.error(f"the file is of nvcc {version}, this is {tools.version}: write all of it, without --target and --op")

    found, faults = Found(), list[str]()
    try:
        asked = asked_for()
        for target in targets:
            more, wrong = compiled(target, BUILD / target, files, args.jobs)
            more, impossible = launched(more, asked[target])
            found |= more
            faults += wrong + impossible
    except cuda_build.BuildError as error:
        print(error)
        return 1
    same = version == tools.version
    if args.op or args.target:
        print(HEADER.splitlines()[-1], *map(line, in_order(found)), sep="\n")
    if args.write:
        args.file.write_text(text([*others, *found], tools.version))
    else:
        faults += unlisted(found, listed)
        if not same:
            print(f"The file is of nvcc {version}, not {tools.version}: registers and most instructions are not compared.")
    expected = {} if args.write else {row.key: row for row in listed}
    for row, facts in found.items():
        wrong = broken_rules(row, facts)
        wrong += differences(row, expected[row.key], same) if row.key in expected else []
        faults += [f"{row}: {fault}" for fault in wrong]
    if faults and not args.write:
        print(f"If kernels are meant to be so, run: {COMMAND}")
    print(f"{len(found)} kernels compiled with nvcc {tools.version}, {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
