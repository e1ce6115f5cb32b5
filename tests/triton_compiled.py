"""Compiles every Triton kernel for GPUs that are not there, and reads in the machine code whether it will run and run well.

    python tests/triton_compiled.py                    compile all, compare with tests/triton_compiled.txt
    python tests/triton_compiled.py --target sm_90 --op linear
    python tests/triton_compiled.py --write            make the file anew; with --target or --op, those entries alone
    python tests/triton_compiled.py --dtype float32    the same kernels for another dtype: rules alone, nothing is compared

How: each op's Triton function is called with the shapes of its `bench_cases` and `gpu_cases`, in bf16, on tensors of the meta
device, and every launch that it makes is caught. A first pass only lists the launches. Then a pool of processes compiles each
distinct one: a process calls the function again, and lets this launch through to the compiler.

What holds for every compiler version (`broken_rules`): no spills and no stack, for both are slow memory; shared memory,
registers and tensor memory that the GPU has; tensor cores for products of bf16; where launches are early, no look at memory
before the one before has ended. What the file adds (`differences`): the kernels and tile sizes are those it lists, and with
the Triton version it names also the same instructions and no more registers. Triton's interpreter tests what the kernels
compute; this tests what it cannot see.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_fast.ops import TABLE
from gemma4_fast.ops.table import Maker, Op
from gemma4_fast.quant import QuantizedWeight

FILE = Path(__file__).with_suffix(".txt")
COMMAND = "python tests/triton_compiled.py --write"
QUICK = "sm_90"  # what --quick compiles for
SPARE_REGISTERS = 8  # a thread may take this many more than the file says: a change of wording should not fail a test
AMD_WARP, NVIDIA_WARP = 64, 32
WIDTH = 120  # of the file's lines
INDENT = "    "  # of a block's lines; twice this and more: the line above goes on
DTYPES = ("bfloat16", "float16", "float32")
HEADER = f"""\
# What the Triton kernels compile to, for each GPU, at their real shapes (bench_cases and gpu_cases) in bf16.
# Written by `{COMMAND}`; tests/test_triton_compiled.py compares.
# triton {{version}}
#
# A block is one kernel of one op, with the cases that compile to the same code (kernel/2: another code of the kernel,
# which the same cases launch too). Then the dtypes behind the pointers (bf16[64,128]: a descriptor of such tiles) and
# the compile-time constants, without those that are None, 0 or False. Then for each GPU:
#   registers   of a thread (AMD: vector registers)
#   shared      bytes of shared memory of a program
#   warps       of a program
#   stages      iterations of a pipelined loop that are in flight
#   HMMA, ...   the tensor-core instructions; -: none
#   tma         tiles are copied to shared memory by descriptor; async: by the threads, which do not wait; none: neither
# and the dtypes and constants that are not the same for all. No kernel spills registers or has a stack: tested.

"""


# ---- what is known of a kernel ----


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the machine code of one kernel says. Counts are of instructions in the code, not of executions."""

    registers: int  # of a thread; AMD: vector registers
    shared: int  # bytes of a program
    spills: int  # instructions that move registers to memory and back; AMD: vector registers so moved
    stack: int  # bytes of a thread
    tensor: str  # the tensor-core instructions; "-": none
    async16: int  # asynchronous copies of 16 bytes a thread
    async_: int  # and of fewer
    tma: int  # copies of tiles by descriptor
    load16: int  # global loads of at least 16 bytes a thread
    load: int  # and of fewer
    total_warps: int  # those that a specialized kernel adds included
    tensor_memory: int  # columns; Blackwell alone
    wants_tensor: bool  # it multiplies matrices of at most 16 bits a value
    hasty: int | None  # accesses to memory, and exits, before it waits for the launch before; None: it is not launched early

    @property
    def copies(self) -> str:
        """How the kernel's loads run ahead of its arithmetic."""
        return "tma" if self.tma else "async" if self.async16 or self.async_ else "none"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel by one case of an op. number: which of them. identity: equal ones compile to the same code.
    constants: words, in a fixed order: dtypes of pointers, then what is constant to the compiler."""

    op: str
    case: str
    kernel: str
    target: str
    warps: int
    stages: int
    constants: str
    grid: tuple[int, ...] = (1,)
    number: int = 0
    identity: str = ""
    dtype: str = DTYPES[0]  # of the case's tensors

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.case, self.kernel, self.target

    def __str__(self) -> str:
        return named(self.key)


def named(key: tuple[str, ...]) -> str:
    return f"{' '.join(key[:-1])} for {key[-1]}"


class Row(NamedTuple):
    """What the file says of one kernel of one case for one target. Only `constants` may have blanks in it, or be empty."""

    op: str
    case: str
    kernel: str
    target: str
    registers: int
    shared: int
    warps: int
    stages: int
    tensor: str
    copies: str
    constants: str

    @classmethod
    def of(cls, launch: Launch, facts: Facts) -> Row:
        found = (facts.registers, facts.shared, launch.warps, launch.stages, facts.tensor, facts.copies)
        return cls(*launch.key, *found, launch.constants)

    @property
    def key(self) -> tuple[str, ...]:
        return self[:4]


# ---- the file ----

TARGET_LINE = re.compile(r" +(\S+) +(\d+) registers +(\d+) shared +(\d+) warps +(\d+) stages +(\S+) +(tma|async|none)\b(.*)")


def in_order(words: Iterable[str]) -> str:
    """Dtypes, then constants by name."""
    return " ".join(sorted(words, key=lambda word: ("=" in word, word)))


def wrapped(line: str, indent: int = 2 * len(INDENT)) -> str:
    rest = " " * max(indent, 2 * len(INDENT))
    return textwrap.fill(line, WIDTH, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def blocks(rows: Iterable[Row]) -> str:
    """The file without its header: cases whose rows are the same for all targets share a block."""
    of_case, cases = defaultdict[tuple[str, ...], list[Row]](list), defaultdict[tuple[Row, ...], list[str]](list)
    for row in sorted(rows, key=lambda r: (r.op, r.kernel, r.case, r.target.startswith("gfx"), len(r.target), r.target)):
        of_case[row.op, row.kernel, row.case].append(row._replace(case=""))
    for (_, _, case), same in of_case.items():
        cases[tuple(same)].append(case)
    every = [row for same in cases for row in same]
    target, registers, shared, warps, stages, tensor, copies = (
        max((len(str(getattr(row, name))) for row in every), default=0) for name in Row._fields[3:10]
    )

    def block(same: tuple[Row, ...]) -> str:
        words = [row.constants.split() for row in same]
        common = set(words[0]).intersection(*words)
        lines = [
            wrapped(f"{same[0].op} {same[0].kernel}  {' '.join(cases[same])}"),
            wrapped(INDENT + (in_order(common) or "-")),
        ]
        for row, own in zip(same, words, strict=True):
            line = (
                f"{INDENT}{row.target:{target}}  {row.registers:{registers}} registers  {row.shared:{shared}} shared  "
                f"{row.warps:{warps}} warps  {row.stages:{stages}} stages  {row.tensor:{tensor}}  {row.copies:{copies}}  "
            )
            lines.append(wrapped(line + in_order(set(own) - common), len(line)).rstrip())
        return "\n".join(lines)

    return "\n\n".join(map(block, cases)) + "\n"


def text(rows: Iterable[Row], version: str) -> str:
    return HEADER.format(version=version) + blocks(rows)


def parse(written: str) -> tuple[str, list[Row]]:
    """The file's text -> the Triton version that it was made with, and its rows. ValueError if it is no such file."""
    version = re.search(r"^# triton (\S+)$", written, re.M)
    if version is None:
        raise ValueError(f"this is not a file that `{COMMAND}` writes: no line '# triton VERSION'")
    body = re.sub(r"^#.*\n", "", written, flags=re.M).strip("\n")
    body = re.sub(rf"\n{2 * INDENT} *", " ", body)  # lines that go on
    rows = []
    for block in filter(None, body.split("\n\n")):
        head, *lines = block.split("\n")
        matches = [TARGET_LINE.fullmatch(line) for line in lines[1:]]
        if len(head.split()) < 3 or None in matches or not matches:
            raise ValueError(f"this is no block that `{COMMAND}` writes: {head} ...")
        (op, kernel, *cases), common = head.split(), lines[0].split()
        for match in filter(None, matches):
            target, *numbers, tensor, how, own = match.groups()
            constants = in_order(word for word in [*common, *own.split()] if word != "-")
            rows += [Row(op, case, kernel, target, *map(int, numbers), tensor, how, constants) for case in cases]
    return version[1], rows


# ---- judging ----


def broken_rules(facts: Facts, target: Any) -> list[str]:
    """What no kernel may do, whatever the compiler. target: a `gemma4_fast.triton.common.Target`."""
    amd, warps, broken = target.kind == "hip", facts.total_warps, []
    if facts.spills or facts.stack:
        spilled = f"{facts.spills}; a stack of {facts.stack} bytes"
        broken.append(f"spills registers ({spilled}): smaller tiles or more warps need fewer")
    if facts.shared > target.shared:
        broken.append(f"takes {facts.shared} bytes of shared memory, the GPU has {target.shared}: fewer stages need less")
    if warps * (AMD_WARP if amd else NVIDIA_WARP) > 1024:
        broken.append(f"has {warps} warps, more than the 1024 threads that a program may have")
    granted = -(-facts.registers // 8) * 8
    # AMD: 512 registers for each lane of one of four units, which share a program's warps. NVIDIA: 65536 for all threads.
    needed, there_are = (granted * -(-warps // 4), 512) if amd else (granted * NVIDIA_WARP * warps, 65536)
    if needed > there_are:
        broken.append(f"cannot be launched: {warps} warps of {granted} registers need {needed}, there are {there_are}")
    if facts.tensor_memory > 512:
        broken.append(f"takes {facts.tensor_memory} columns of tensor memory, there are 512")
    if facts.wants_tensor and facts.tensor == "-":
        broken.append("multiplies matrices of 16-bit values or smaller without tensor cores")
    if target.has_early_launch and facts.hasty is None:
        broken.append("is launched when the one before has ended: `**early(x)` among its options puts it in place before")
    if facts.hasty:
        broken.append(f"races: {facts.hasty} accesses to memory or ways out before it waits, `inputs_ready()` must come first")
    return broken


def differences(row: Row, expected: Row, same_version: bool) -> list[str]:
    """What is worse or other than the file says. Another version may choose other instructions, but not none for some."""
    found = []
    if row.tensor != expected.tensor and (same_version or row.tensor == "-"):
        found.append(f"tensor-core instructions: {row.tensor}, expected {expected.tensor}")
    if same_version and row.copies != expected.copies:
        found.append(f"copies to shared memory: {row.copies}, expected {expected.copies}")
    if same_version and row.registers > expected.registers + SPARE_REGISTERS:
        found.append(f"takes {row.registers} registers, expected {expected.registers}, or at most {SPARE_REGISTERS} more")
    return found


def unlisted(launches: Iterable[Launch], rows: Iterable[Row]) -> list[str]:
    """Launches that have no row, rows without a launch, and those whose warps, stages or constants are others."""
    launched, listed = {launch.key: launch for launch in launches}, {row.key: row for row in rows}
    found = [f"{named(key)}: is in the file, but is launched no more" for key in listed.keys() - launched]
    for key, launch in launched.items():
        row = listed.get(key)
        if row is None:
            found.append(f"{launch}: is not in the file")
            continue
        for name in ("warps", "stages", "constants"):
            if getattr(launch, name) != getattr(row, name):
                found.append(f"{launch}: {name} {getattr(launch, name)}, the file has {getattr(row, name)}")
    return sorted(found)


# ---- catching launches ----


class ShapesOnly(Maker):
    """A Maker whose large tensors have no memory. Ids and lengths, which decide shapes, are real ones, on the CPU."""

    def __init__(self, dtype: str) -> None:
        super().__init__(getattr(torch, dtype))

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def quantized(self, bits: int, *shape: int, scale: float = 1.0, parts: int = 1) -> QuantizedWeight:
        return QuantizedWeight.empty(bits, shape, self.dtype, "meta", parts)


def arguments(op: Op, case: str, dtype: str) -> list[Any]:
    """The arguments of a benchmark's case, all tensors on the meta device."""

    def moved(value: Any) -> Any:
        if isinstance(value, QuantizedWeight):
            return value.apply(lambda t: t.to("meta"))
        return value.to("meta") if isinstance(value, Tensor) else value

    return [moved(value) for value in {**op.bench_cases, **op.gpu_cases}[case](ShapesOnly(dtype)).values()]


class Refused(Exception):
    """Triton's kernel does not take these arguments."""


def _select_triton(op: Op, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Stands in for `Op.select`, which gives Triton tensors on a GPU alone."""
    impl = op.impls["triton"]
    if impl.accepts is not None and (reason := impl.accepts(*args)) is not None:
        raise Refused(f"Triton's {op.name} {reason}")
    return impl.function


class CompileOnlyDriver:
    """What Triton asks a GPU's driver before it compiles. A number for each target: kernels are kept apart by it."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        from gemma4_fast.triton.common import TARGETS

        amd = TARGETS[name].kind == "hip"
        self.target = GPUTarget("hip", name, AMD_WARP) if amd else GPUTarget("cuda", TARGETS[name].arch, NVIDIA_WARP)
        self.number = list(TARGETS).index(name)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _constants(fn: Any, details: dict[str, Any]) -> str:
    """Dtypes behind the pointers, each tile that a descriptor copies, and the constants but for None, 0 and False."""
    types = [t.replace(" ", "") for t in details["signature"].values() if isinstance(t, str)]
    pointers = ",".join(dict.fromkeys(t.lstrip("*k") for t in types if t.startswith("*")))
    tiles = dict.fromkeys(t[len("tensordesc<") : -1] for t in types if t.startswith("tensordesc"))

    def shown(value: Any) -> str:
        value = getattr(value, "value", value)  # of a tl.constexpr
        return getattr(value, "__name__", None) or str(value).replace(" ", "")

    values = {fn.params[path[0]].name: shown(value) for path, value in details["constants"].items()}
    told = [f"{name}={value}" for name, value in values.items() if value not in ("None", "0", "False")]
    return in_order([*filter(None, [pointers]), *tiles, *told])


@contextmanager
def launches_caught(let_through: int | None = None) -> Iterator[tuple[list[Launch], list[Any]]]:
    """Nothing is run inside. Launches are listed (op, case and target are left blank); number `let_through` is compiled."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    original, caught, compiled, count = JITFunction.run, list[Launch](), list[Any](), 0
    programs: tuple[int, ...] = ()

    def instead_of_compiling(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        name, warps, stages = fn.name, compile["num_warps"], compile["num_stages"]
        constants = _constants(fn.jit_function, compile)
        caught.append(Launch("", "", name, "", warps, stages, constants, programs, count - 1, f"{fn.module}.{name} {key}"))
        return True

    def run(fn: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        nonlocal count, programs
        count += 1
        programs = tuple(grid({**dict(zip(fn.arg_names, args, strict=False)), **kwargs}) if callable(grid) else grid)
        knobs.runtime.jit_cache_hook = None if count - 1 == let_through else instead_of_compiling
        kernel = original(fn, *args, grid=grid, warmup=True, **kwargs)
        if count - 1 == let_through:
            compiled.append(kernel)
        return kernel

    JITFunction.run = run
    try:
        yield caught, compiled
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = original, None


def call(op: Op, case: str, target: str, dtype: str, let_through: int | None = None) -> tuple[list[Launch], list[Any]]:
    """Calls the op's Triton function for `target` with the case's arguments. Launches, and the kernel that was compiled."""
    from triton.runtime import driver

    from gemma4_fast.triton.common import ASSUMED, TARGETS

    args = arguments(op, case, dtype)
    driver.set_active(CompileOnlyDriver(target))
    token, select = ASSUMED.set(TARGETS[target]), Op.select
    Op.select = _select_triton
    try:
        with launches_caught(let_through) as (caught, compiled):
            op(*args)
    finally:
        Op.select = select
        ASSUMED.reset(token)
    return caught, compiled


def listed(op: Op, case: str, target: str, dtype: str) -> list[Launch]:
    """The launches of a case, each distinct code once. A kernel's second code is called kernel/2."""
    distinct: dict[str, Launch] = {}
    for launch in call(op, case, target, dtype)[0]:
        distinct.setdefault(launch.identity, launch)
    launches, times = [], Counter[str]()
    for launch in distinct.values():
        times[launch.kernel] += 1
        name = launch.kernel if times[launch.kernel] == 1 else f"{launch.kernel}/{times[launch.kernel]}"
        where = dict(op=op.name, case=case, target=target, dtype=dtype)
        launches.append(dataclasses.replace(launch, **where, kernel=name, identity=f"{target} {launch.identity}"))
    return launches


# ---- reading machine code ----

OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)((?:\.\w+)*)", re.M)
TENSOR = re.compile(r"UTC\w*MMA|[HIQOD]G?MMA")
WIDE = {"128", "256"}
# What must not come before the wait: what others may still be writing, and an end that the next launch would take for theirs.
HASTY = re.compile(r"LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UTMA\w+|UBLK\w+|EXIT|RET")
HASTY_IR = re.compile(r"\b(?:scf|cf)\.\w+|\btt\.(?:load|store|atomic\w*|descriptor_\w+|call|return)\b")
SIXTEEN_BITS_OR_FEWER = re.compile(r"tt\.dot(?:_scaled)? .*?tensor<[\dx]+x(?:bf16|f16|i8|f8\w*)")


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, spills, stack and instructions, from NVIDIA's disassembler, which Triton brings along."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", sass)}
    found = Counter[str]()
    tensor, waits, hasty = set[str](), False, 0
    for opcode, suffixes in OPCODE.findall(sass):
        waits = waits or opcode == "ACQBULK"
        hasty += not waits and HASTY.fullmatch(opcode) is not None
        if TENSOR.fullmatch(opcode):
            tensor.add(opcode)
        elif opcode in ("LDG", "LDGSTS"):
            found[opcode + ("16" if WIDE & set(suffixes.split(".")) else "")] += 1
        else:
            found[opcode] += 1
    return dict(
        registers=usage["REG"],
        spills=found["LDL"] + found["STL"],
        stack=usage["STACK"] + usage["LOCAL"],
        tensor="+".join(sorted(tensor)) or "-",
        async16=found["LDGSTS16"],
        async_=found["LDGSTS"],
        tma=found["UTMALDG"] + found["UBLKCP"],
        load16=found["LDG16"],
        load=found["LDG"],
        hasty=hasty,
    )


def read_amdgcn(assembly: str) -> dict[str, Any]:
    """The same, from AMD's assembly and the metadata at its end."""
    said = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M)}
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(\w+)\s(.*)$", assembly, re.M)
    wide = [size.endswith("x4") for size, _ in loads]
    to_shared = ["lds" in size or re.search(r"\blds\b", operands) is not None for size, operands in loads]
    kinds = Counter(zip(wide, to_shared, strict=True))
    return dict(
        registers=said["vgpr_count"],
        spills=said["vgpr_spill_count"],  # scalar ones go to vector registers, or else to the stack
        stack=said["private_segment_fixed_size"],
        tensor="mfma" if re.search(r"^\s+v_s?mfmac?_", assembly, re.M) else "-",
        async16=kinds[True, True],
        async_=kinds[False, True],
        tma=0,
        load16=kinds[True, False],
        load=kinds[False, False],
        hasty=0,
    )


def facts_of(kernel: Any) -> Facts:
    """What a compiled kernel (triton's CompiledKernel) says about itself."""
    read = read_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else read_amdgcn(kernel.asm["amdgcn"])
    # In the machine code, what comes before; in the source's terms, that no branch leads around the wait.
    before = kernel.asm["ttir"].partition("tt.func public")[2].partition("griddepcontrol.wait")[0]
    read["hasty"] += len(HASTY_IR.findall(before))
    if not getattr(kernel.metadata, "launch_pdl", False):
        read["hasty"] = None
    return Facts(
        **read,
        shared=kernel.metadata.shared,
        total_warps=kernel.metadata.num_warps,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        wants_tensor=SIXTEEN_BITS_OR_FEWER.search(kernel.asm["ttir"]) is not None,
    )


# ---- compiling, in processes ----


def start_worker(modules: list[str], folder: Path) -> None:
    """What is printed from here on goes to a file: a compiler that fails prints whole programs."""
    with (folder / f"{os.getpid()}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    imported(modules)


def said_in(log: Path, begin: int = 0) -> str:
    """What the first lines say that tell what a compiler stumbled over."""
    told = re.findall(r"\b(?:error|assertion|fatal)\b.{1,200}", log.read_bytes()[begin:].decode(errors="replace"), re.I)
    return "; ".join(dict.fromkeys(told[:3]))


def compiled_facts(launch: Launch, folder: Path) -> Facts | str:
    """In a worker: what a launch compiles to, or why it does not."""
    begin = os.lseek(1, 0, os.SEEK_END)
    try:
        _, (kernel,) = call(TABLE[launch.op], launch.case, launch.target, launch.dtype, launch.number)
        return facts_of(kernel)
    except Exception as error:  # noqa: BLE001  # compilers fail in many ways; all are findings about this kernel
        sys.stdout.flush()
        return f"does not compile: {type(error).__name__}: {error}; {said_in(folder / f'{os.getpid()}.log', begin)}"


def compiled(launches: list[Launch], jobs: int, modules: list[str], folder: Path) -> dict[str, Facts | str]:
    """What the launches compile to, by their identity. folder: for the workers' output."""
    wanted = list({launch.identity: launch for launch in launches}.values())
    results: dict[str, Facts | str] = {}

    def pool(workers: int) -> ProcessPoolExecutor:
        start = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads half
        return ProcessPoolExecutor(workers, start, initializer=start_worker, initargs=(modules, folder))

    if not wanted:
        return results
    with pool(min(jobs, len(wanted))) as workers:
        futures = {workers.submit(compiled_facts, launch, folder): launch for launch in wanted}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                results[futures[future].identity] = future.result()
    for launch in wanted:  # LLVM has ended a process, and with it the pool: which kernel was it?
        if launch.identity not in results:
            with pool(1) as worker:
                future = worker.submit(compiled_facts, launch, folder)
                if isinstance(future.exception(), BrokenProcessPool):
                    log = max(folder.glob("*.log"), key=lambda file: file.stat().st_mtime_ns)
                    results[launch.identity] = f"does not compile: the compiler ends its process; {said_in(log)}"
                else:
                    results[launch.identity] = future.result()
    return results


def imported(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)


# ---- the command ----


def with_kernels(names: Iterable[str]) -> list[Op]:
    """Those ops that Triton has a kernel for; of a composed one, for all of its parts."""
    return [TABLE[n] for n in names if all("triton" in TABLE[part].impls for part in TABLE[n].parts or (n,))]


def trace(ops: Iterable[Op], targets: Iterable[str], dtype: str) -> tuple[list[Launch], list[str], list[str]]:
    """All launches; what went wrong; what Triton's kernels do not take."""
    launches, faults, refused = list[Launch](), list[str](), list[str]()
    for op in ops:
        for case in (*op.bench_cases, *op.gpu_cases):
            for target in targets:
                try:
                    launches += listed(op, case, target, dtype)
                except Refused as reason:
                    refused.append(f"{op.name} {case} for {target} is left out: {reason}")
                except Exception as error:  # noqa: BLE001  # whatever a kernel's launcher does wrong
                    hint = "; a launcher that reads values of tensors makes the GPU wait" if "meta tensor" in str(error) else ""
                    faults.append(f"{op.name} {case} for {target}: the call fails: {type(error).__name__}: {error}{hint}")
    return launches, faults, refused


def quick(launches: Iterable[Launch]) -> list[Launch]:
    """For one target, of each op the first case that launches a kernel."""
    first: dict[tuple[str, ...], Launch] = {}
    for launch in launches:
        if launch.target == QUICK:
            first.setdefault((launch.op, launch.kernel), launch)
    return list(first.values())


def read(file: Path) -> tuple[str | None, list[Row]]:
    return parse(file.read_text()) if file.exists() else (None, [])


def judge(launch: Launch, facts: Facts | str, expected: Row | None, same_version: bool) -> list[str]:
    """All that is wrong with one launch, in whole sentences."""
    from gemma4_fast.triton.common import TARGETS

    if isinstance(facts, str):
        return [f"{launch}: {facts}"]
    found = broken_rules(facts, TARGETS[launch.target])
    if any(size > 65535 for size in launch.grid[1:]):
        found.append(f"cannot be launched: a grid of {launch.grid}, where all but the first may be 65535 at most")
    if expected is not None:
        found += differences(Row.of(launch, facts), expected, same_version)
    return [f"{launch}: {fault}" for fault in found]


def table(made: Iterable[tuple[Launch, Facts]]) -> str:
    """All facts, a launch a line."""
    names = [field.name.rstrip("_") for field in dataclasses.fields(Facts)]
    lines: list[tuple[Any, ...]] = [("op", "case", "kernel", "target", *names, "warps", "stages", "constants")]
    lines += [(*launch.key, *dataclasses.astuple(f), launch.warps, launch.stages, launch.constants) for launch, f in made]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    numbers = [isinstance(cell, int) for cell in lines[-1]]
    return "\n".join(
        "  ".join(str(c).rjust(w) if n else str(c).ljust(w) for c, w, n in zip(line, widths, numbers, strict=True)).rstrip()
        for line in lines
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not there, and judge what comes out.")
    p.add_argument("--target", action="append", metavar="NAME", help="sm_90, gfx942, ...; may be repeated; all if left out")
    p.add_argument("--op", action="append", metavar="NAME", help="an op of the table; may be repeated; all if left out")
    p.add_argument("--write", action="store_true", help="write what is found into the file, instead of comparing")
    p.add_argument("--quick", action="store_true", help=f"compile for {QUICK}, of each op the first launch of a kernel")
    p.add_argument("--counts", action="store_true", help="print all that is counted in the code, one launch a line")
    p.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the tensors; but for the default, the file is left alone"
    )
    p.add_argument(
        "--keep-cache",
        action="store_true",
        help="compile into Triton's own cache (TRITON_CACHE_DIR, or ~/.triton/cache) instead of a temporary folder: a later "
        "run on a GPU of that target finds the kernels compiled",
    )
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one for each core)")
    p.add_argument("--file", type=Path, default=FILE, help="the file to compare with, or to write")
    p.add_argument("--import", action="append", default=[], dest="modules", metavar="MODULE", help="a module with more ops")
    return p


def main(argv: list[str] | None = None) -> int:
    """0: all is as it should be. 1: faults, which are printed last."""
    p = parser()
    args = p.parse_args(argv)
    compared = args.dtype == DTYPES[0]  # the file is of this one
    if args.write and args.quick:
        p.error("--quick leaves out most rows of the file: it cannot --write")
    if args.write and not compared:
        p.error(f"the file is of {DTYPES[0]}: --dtype {args.dtype} cannot --write")
    os.environ.pop("TRITON_INTERPRET", None)  # a kernel is compiled or interpreted: it is read at the kernel's definition
    try:
        import triton
    except ImportError:
        p.error("the triton package is not installed: pip install triton")
    from gemma4_fast.triton.common import TARGETS

    imported(args.modules)
    targets, names = args.target or list(TARGETS), args.op or list(TABLE)
    for name, known in [*((t, TARGETS) for t in targets), *((n, TABLE) for n in names)]:
        if name not in known:
            p.error(f"there is no {name!r}; there are {', '.join(known)}")
    anew = args.write and not (args.target or args.op)
    try:
        version, rows = (None, []) if anew or not compared else read(args.file)
    except ValueError as error:
        p.error(f"{args.file}: {error}")
    chosen = [row for row in rows if (not args.target or row.target in targets) and (not args.op or row.op in names)]
    others = [row for row in rows if row not in chosen]
    if args.write and others and version != triton.__version__:
        p.error(f"the file is of triton {version}, this is {triton.__version__}: write all of it, without --target and --op")
    with tempfile.TemporaryDirectory() as folder:
        if not args.keep_cache:
            os.environ["TRITON_CACHE_DIR"] = folder
        launches, faults, refused = trace(with_kernels(names), targets, args.dtype)
        results = compiled(quick(launches) if args.quick else launches, args.jobs, args.modules, Path(folder))

    made = [(launch, results[launch.identity]) for launch in launches if launch.identity in results]
    good = [(launch, facts) for launch, facts in made if not isinstance(facts, str)]
    new = [Row.of(launch, facts) for launch, facts in good]
    if new:
        print(table(good) if args.counts else blocks(new))
    if refused:
        print("\n".join(refused))
    if args.write:
        args.file.write_text(text([*others, *new], triton.__version__))
    elif compared:
        if missing := unlisted(launches, chosen):
            faults += missing
            print(f"Kernels are not those of the file, or not as they were. If that is meant, run: {COMMAND}")
        if version not in (None, triton.__version__):
            print(f"The file is of triton {version}, not {triton.__version__}: instructions and registers are not compared.")
    expected = {} if args.write else {row.key: row for row in chosen}
    for launch, facts in made:
        faults += judge(launch, facts, expected.get(launch.key), version == triton.__version__)
    print(f"{len(launches)} launches, {len(results)} kernels compiled with triton {triton.__version__}, {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
