"""Rows from the op table: every backend beside `torch`, on the same inputs, in turns. Nothing wrong is ever timed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gemma4_fast import native, ops
from gemma4_fast.bench.load import Load
from gemma4_fast.bench.recorder import fault
from gemma4_fast.bench.rivals import RIVALS, Way
from gemma4_fast.bench.rows import Row, Spread
from gemma4_fast.bench.timing import Call, Roofline, Rotation, Stopwatch, captured, turns
from gemma4_fast.ops.accuracy import Judge, Verdict
from gemma4_fast.ops.table import Maker, Op
from gemma4_fast.quant import QuantizedWeight, WeightLike
from gemma4_fast.spelling import did_you_mean

_BLOCK = 1_000_003  # a prime, so that the noise does not come round at the same column of any matrix
_NARROW_FROM = 1 << 28  # bytes of inputs in half precision above which truth is computed in fp32, which fits
BASELINE = "torch"


class BlockMaker(Maker):
    """Fills large tensors with one block of noise over and over.

    A layer's experts take a second that way instead of a minute.
    bits: those of weights that the case does not quantize by itself; 0 leaves them as they are.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0, bits: int = 0) -> None:
        super().__init__(dtype, device, seed)
        self.bits = bits

    def weight(self, bits: int, *shape: int, scale: float, parts: int = 1) -> WeightLike:
        return super().weight(bits or self.bits, *shape, scale=scale, parts=parts)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        count = math.prod(shape)
        if count <= _BLOCK:
            return super().randn(*shape, scale=scale, dtype=dtype)
        block = super().randn(_BLOCK, scale=scale, dtype=dtype)
        out = torch.empty(count, dtype=block.dtype, device=block.device)
        native.use_huge_pages(out)
        whole = count // _BLOCK * _BLOCK
        out[:whole].view(-1, _BLOCK).copy_(block.expand(whole // _BLOCK, -1))
        out[whole:] = block[: count - whole]
        return out.view(shape)


@dataclass
class Case:
    """What one group of rows measures. `judged`: inputs for the correctness gate where those of `make` are too large."""

    op: Op
    name: str
    make: Callable[[Maker], dict[str, Any]]
    kind: str = "op"
    params: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    judged: Callable[[Maker], dict[str, Any]] | None = None
    judged_at: str = ""  # what those are, for people
    paths: Mapping[str, Op] = field(default_factory=dict)  # ours to the same result: a contender each, per backend
    rivals: Mapping[str, Way] = field(default_factory=dict)  # those of others, by contender
    command: str = ""
    bits: int = 0  # of the weights, where they are quantized at the caller's wish


def cases(names: Sequence[str], wanted: Sequence[str], device: torch.device, rivals: bool = False) -> list[Case]:
    """Of these ops the cases named; without names those at true shapes, on a GPU larger ones too; "all": the small ones with
    them. ValueError for a name that no op has. rivals: with the other ways there are to an op's result."""
    found = []
    known: set[str] = set()
    for name in names:
        op = ops.TABLE[name]
        every = {**op.bench_cases, **op.gpu_cases, **op.cases}
        known |= set(every)
        true_shapes = [*op.bench_cases, *(op.gpu_cases if device.type == "cuda" else ())]
        if "all" in wanted:
            chosen = list(dict.fromkeys((*true_shapes, *op.cases)))
        else:
            chosen = [c for c in every if c in wanted] if wanted else true_shapes
        others = RIVALS.get(name, {}) if rivals else {}
        found += [Case(op, f"{name}/{c}", every[c], rivals=others, command=f"--op {name} --case {c}") for c in chosen]
    if unknown := [w for w in wanted if w not in known and w != "all"]:
        hint = did_you_mean(unknown[0], known)
        listed = ", ".join(sorted(known))
        raise ValueError(f"these ops have no case {', '.join(unknown)}; expected {listed}{hint}")
    return found


_QUANTIZED = re.compile(r"int[48]")


def quantized(found: Sequence[Case], how: str | None) -> list[Case]:
    """The cases that hold weights, with the weights in 8 or 4 bits.

    how: "int8" or "int4"; None returns all cases as they are.
    ValueError if none of the cases holds weights.
    """
    if how is None:
        return list(found)
    bits = int(how.removeprefix("int"))
    chosen = [
        replace(
            case,
            name=f"{case.name}, {how}",
            params={**case.params, "quantize": how},
            command=f"{case.command} --quantize {how}",
            bits=bits,
        )
        for case in found
        if any(map(_QUANTIZED.match, case.op.cases)) and not _QUANTIZED.search(case.name)
    ]
    if not chosen:
        raise ValueError(f"--quantize {how}: none of these ops holds weights that are not quantized already")
    return chosen


def serving(op: Op, device: torch.device, dtype: torch.dtype, wanted: Iterable[str] = ()) -> dict[str, str | None]:
    """The backends to measure, and for each one named that cannot serve here the reason.

    Without names: all that serve. A composed op counts as a backend's if one of its parts does; `torch` serves the others.
    """
    found: dict[str, str | None] = {}
    for backend in tuple(wanted) or ops.AUTO_ORDER:
        reasons = [part.why_not(backend, device, dtype, named=bool(wanted)) for part in _parts(op)]
        reason = None if None in reasons else reasons[0]
        if reason is None or wanted:
            found[backend] = reason
    if BASELINE not in found:
        found[BASELINE] = None
    return found


def _parts(op: Op) -> list[Op]:
    return [ops.TABLE[name] for name in op.parts] if op.compose is not None else [op]


def bound_to(op: Op, backend: str) -> Callable[..., Any]:
    """The op as a function that runs on this backend; parts of a composed one that it lacks run on the baseline."""
    helped = op.compose is not None and backend not in (BASELINE, "reference")
    return ops.bound(op, (backend, BASELINE) if helped else backend)


class OpBench:
    """Measures cases of one dtype on one device. seconds: the time that one contender's samples may take."""

    def __init__(
        self,
        roofline: Roofline,
        dtype: torch.dtype,
        backends: Sequence[str] = (),
        *,
        seconds: float = 0.5,
        seed: int = 0,
        options: str = "",
    ) -> None:
        self.roofline, self.device, self.dtype = roofline, roofline.device, dtype
        self.backends, self.seconds, self.seed, self.options = tuple(backends), seconds, seed, options
        self.stopwatch = Stopwatch(self.device)

    def run(self, case: Case) -> list[tuple[Row, str]]:
        """The rows of one case, and the command that makes each again. Whatever a backend raises is its row's result."""
        rows, ways = list[Row](), {**self._ways(case), **case.rivals}
        try:
            with torch.inference_mode():
                self._run(case, rows, ways)
        except Exception as e:  # noqa: BLE001  inputs that do not fit, for one
            told = {row.contender for row in rows}
            rows += [self._row(case, name, **fault(e)) for name in ways if name not in told]
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a fault that stays ends the run here, where it is told as what it is
        base = f"{'scale' if case.kind == 'scale' else 'ops'} {case.command}"
        also = dict.fromkeys(case.rivals, " --rivals")
        return [
            (row, f"{base} --backend {row.contender.split()[0]}{also.get(row.contender, '')} {self.options}".rstrip())
            for row in rows
        ]

    def _row(self, case: Case, contender: str, **fields: Any) -> Row:
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(case.kind, case.name, contender, dtype=dtype, params=case.params, tokens=case.tokens, **fields)

    def _ways(self, case: Case) -> dict[str, Way]:
        """By contender: each backend, or each of the paths on each backend."""
        return {
            f"{backend} {name}".rstrip(): Way(bound_to(op, backend))
            for backend, why in serving(case.op, self.device, self.dtype, self.backends).items()
            if why is None
            for name, op in (case.paths or {"": case.op}).items()
        }

    def _run(self, case: Case, rows: list[Row], ways: Mapping[str, Way]) -> None:
        """Fills `rows`. Rivals take no quantized weights: then they have none."""
        args = case.make(BlockMaker(self.dtype, self.device, self.seed, case.bits))
        if any(isinstance(v, QuantizedWeight) for v in args.values()):
            ways = {name: way for name, way in ways.items() if name not in case.rivals}
        cost = case.op.cost(*args.values())
        for backend, why in serving(case.op, self.device, self.dtype, self.backends).items():
            if why is not None:
                rows.append(self._row(case, backend, status="unsupported", message=why))
        right: dict[str, dict[str, float]] = {}
        judge: Judge | None = self._judge(case, args)
        assert judge is not None
        for contender, way in ways.items():
            try:
                verdict = judge(way.whole)
            except Exception as e:  # noqa: BLE001  a kernel that does not run has this row
                rows.append(self._row(case, contender, **fault(e)))
                continue
            if verdict.ok:
                right[contender] = {"max": verdict.error, "allowed": verdict.allowed}
            else:
                rows.append(self._wrong(case, contender, "eager", verdict))
        if not right:
            return
        if self.device.type != "cuda" or case.judged is not None:
            judge = None  # its truth is as large as the inputs
        shared = Rotation(args, cost.bytes, self.device)
        rotations: dict[str, Rotation] = {}
        calls: dict[tuple[str, str], Call] = {}
        repeats: dict[tuple[str, str], int] = {}
        for name in right:
            way, rotation = ways[name], shared
            if way.prepare is not None:
                try:
                    rotation = Rotation(way.prepare(*args.values()), cost.bytes, self.device)
                except Exception as e:  # noqa: BLE001  copies of its own that do not fit
                    rows.append(self._row(case, name, **fault(e)))
                    continue
            rotation.warm(way.call)
            rotations[name], calls[name, "eager"] = rotation, rotation.call(way.call)
        if self.device.type == "cuda":
            for name, rotation in rotations.items():
                # One replay runs on all copies, so that they are cold here too.
                copies = (rotation.copies * 8)[: max(8, len(rotation.copies))]
                many = [functools.partial(ways[name].call, *copy) for copy in copies]
                try:
                    replay, out = captured(many)
                    verdict = self._replayed(judge, replay, out)
                except Exception as e:  # noqa: BLE001  it waits for the device, say
                    rows.append(self._row(case, name, mode="graph", **fault(e)))
                    continue
                if verdict.ok:
                    calls[name, "graph"], repeats[name, "graph"] = replay, len(many)
                else:
                    rows.append(self._wrong(case, name, "graph", verdict))
        judge = None
        named = {f"{name} {mode}": call for (name, mode), call in calls.items()}
        probes = self.roofline.probes(cost.flops, cost.bytes, self.dtype)
        load = Load()
        with load.measured():
            samples = turns(named, self.stopwatch, self.seconds * len(named), probes)
        roof = self.roofline.of_samples(samples, self.dtype)
        remark = f"judged at {case.judged_at}" if case.judged is not None else ""
        for name, mode in calls:
            took = [us / repeats.get((name, mode), 1) for us in samples[f"{name} {mode}"]]
            rows.append(
                self._row(
                    case,
                    name,
                    mode=mode,
                    time_us=Spread.of(took),
                    bytes=cost.bytes,
                    flops=cost.flops or None,
                    roofline=roof,
                    cold=rotations[name].cold,
                    error=right[name],
                    other_load=load.others,
                    message=remark,
                )
            )

    def _wrong(self, case: Case, contender: str, mode: str, verdict: Verdict) -> Row:
        found = {k: v for k, v in (("max", verdict.error), ("allowed", verdict.allowed)) if math.isfinite(v)}
        return self._row(case, contender, mode=mode, status="wrong", message=verdict.message, error=found)

    @staticmethod
    def _replayed(judge: Judge | None, replay: Call, out: Any) -> Verdict:
        """Whether a replay writes what it should, over outputs that were spoilt before. Caches are judged in the eager call."""
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        for o in outs:
            o.fill_(float("nan") if o.dtype.is_floating_point else -7)
        replay()
        torch.cuda.synchronize()
        if judge is None:
            return Verdict(all(bool(o.isfinite().all()) for o in outs), "a replay leaves outputs unwritten")
        return judge.of(outs + judge.truth_of_mutated(len(outs)))

    def _judge(self, case: Case, args: Mapping[str, Any]) -> Judge:
        """Truth in fp64; for half precision of a size that fourfold would not fit, in fp32."""
        if case.judged is not None:
            args = case.judged(BlockMaker(self.dtype, self.device, self.seed, case.bits))
        size = sum(v.nbytes for v in args.values() if isinstance(v, Tensor))
        narrow = self.dtype.itemsize == 2 and size > _NARROW_FROM
        return Judge(case.op, args, torch.float32 if narrow else torch.float64)
