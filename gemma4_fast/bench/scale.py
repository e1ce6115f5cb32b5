"""Time along an axis: tokens, context, batch, experts hit. And from what number of tokens `moe` should change its path."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gemma4_fast.bench.ops import Case
from gemma4_fast.bench.rows import Row, Spread
from gemma4_fast.ops.attention import GQA_DECODE, GQA_PREFILL, decode_case, prefill_case
from gemma4_fast.ops.linear import GEGLU_MLP, LINEAR, linear_case, mlp_case
from gemma4_fast.ops.moe import CROSSOVER, MOE, MOE_DECODE, grouped_moe, moe_case
from gemma4_fast.ops.table import Maker, Op

Make = Callable[[Maker], dict[str, Any]]
GROUPED = dataclasses.replace(MOE, compose=grouped_moe)
PATHS = {"moe_decode": MOE_DECODE, "grouped": GROUPED}
JUDGED_CONTEXT = 8192  # longer ones are judged at this length: the reference holds a copy of K and V for each query head
EQUAL = 1.02  # a ratio of times up to which the two paths count as equally fast


@dataclasses.dataclass(frozen=True)
class Axis:
    """One line of a picture: an op along one axis. `points` are the defaults, on a CPU and on a GPU."""

    op: Op
    series: str
    make: Callable[[Maker, int], dict[str, Any]]
    points: Mapping[str, Sequence[int]]
    paths: Mapping[str, Op] = dataclasses.field(default_factory=dict)
    tokens: Callable[[int], int] = lambda x: x  # that one call works on


def _hit(m: Maker, experts: int) -> dict[str, Any]:
    """16 tokens of 8 experts each that reach so many different experts in all."""
    args = moe_case(m, 16, 2816, 704, 128, 8)
    slots = torch.arange(16 * 8).view(16, 8)
    args["ids"] = (slots % experts).to(args["ids"].device, torch.int32)  # a token's 8 are distinct, as experts >= 8
    return args


_TOKENS = {"cpu": (1, 4, 16, 64, 256), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
_CONTEXT = {"cpu": (1 << 10, 1 << 12, 1 << 14, 1 << 16), "cuda": tuple(1 << n for n in range(10, 19))}
_BATCH = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 4, 16, 64)}
AXES: dict[str, tuple[Axis, ...]] = {
    "tokens": (
        Axis(MOE, "26B experts", lambda m, x: moe_case(m, x, 2816, 704, 128, 8),
             {"cpu": (1, 2, 4, 8, 16, 32, 64, 128), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)}, PATHS),
        Axis(LINEAR, "26B QKV projection", lambda m, x: linear_case(m, x, 2816, out=8192), _TOKENS),
        Axis(GEGLU_MLP, "26B dense MLP", lambda m, x: mlp_case(m, x, 2816, 2112), _TOKENS),
        Axis(GQA_PREFILL, "26B sliding layer", lambda m, x: prefill_case(m, [x], 16, 8, 256, window=1024),
             {"cpu": (64, 256, 1024), "cuda": (64, 256, 1024, 4096, 8192)}),
        Axis(GQA_PREFILL, "26B full layer", lambda m, x: prefill_case(m, [x], 16, 2, 512),
             {"cpu": (64, 256, 1024), "cuda": (64, 256, 1024, 4096, 8192)}),
    ),
    "context": (
        Axis(GQA_DECODE, "26B sliding layer", lambda m, x: decode_case(m, [x], 16, 8, 256, 1024, window=1024),
             _CONTEXT, tokens=lambda x: 1),
        Axis(GQA_DECODE, "26B full layer, V only", lambda m, x: decode_case(m, [x], 16, 2, 512, x, v_only=True),
             _CONTEXT, tokens=lambda x: 1),
        Axis(GQA_DECODE, "26B full layer, K and V", lambda m, x: decode_case(m, [x], 16, 2, 512, x),
             _CONTEXT, tokens=lambda x: 1),
    ),
    "batch": (
        Axis(GQA_DECODE, "26B sliding layer", lambda m, x: decode_case(m, [4096] * x, 16, 8, 256, 1024, window=1024), _BATCH),
        Axis(GQA_DECODE, "26B full layer at 4K, V only",
             lambda m, x: decode_case(m, [4096] * x, 16, 2, 512, 4096, v_only=True), _BATCH),
    ),
    "experts": (
        Axis(MOE, "26B, 16 tokens", _hit, {"cpu": (8, 16, 32, 64, 128), "cuda": (8, 16, 32, 64, 128)}, PATHS,
             tokens=lambda x: 16),
    ),
}  # fmt: skip


def cases(axes: Sequence[str], device: torch.device, points: Sequence[int] | None = None) -> list[Case]:
    """The cases of these axes; `points` instead of the defaults."""
    return [_case(axis, a, x) for axis in axes for a in AXES[axis] for x in points or a.points[device.type] if _valid(axis, x)]


def _valid(axis: str, x: int) -> bool:
    return axis != "experts" or 8 <= x <= 128


def _case(axis: str, a: Axis, x: int) -> Case:
    def make(at: int) -> Make:
        return lambda m: a.make(m, at)

    return Case(
        a.op,
        f"{a.op.name}, {a.series}, {axis} {x}",
        make(x),
        kind="scale",
        params={"axis": axis, "series": a.series, "op": a.op.name, "x": x},
        tokens=a.tokens(x),
        judged=make(JUDGED_CONTEXT) if axis == "context" and x > JUDGED_CONTEXT else None,
        judged_at=f"{axis} {JUDGED_CONTEXT}",
        paths=a.paths,
        command=f"--axis {axis} --points {x}",
    )


def crossovers(rows: Sequence[Row]) -> dict[str, int]:
    """From the rows of the experts along `tokens`: by device and backend, the largest measured number of tokens up to which
    moe_decode was never slower than the grouped path by more than 2% and the noise. 0 if it is slower from the start."""
    times: dict[tuple[str, str, str], dict[int, Spread]] = {}  # (where, path, mode): by tokens
    for row in rows:
        if row.params.get("quantize"):  # the experts of a model in half precision decide
            continue
        if row.kind == "scale" and (row.params["op"], row.params["axis"]) == ("moe", "tokens") and row.time_us is not None:
            backend, _, path = row.contender.partition(" ")
            where = f"{row.device.split(':')[0]} {backend}"
            times.setdefault((where, path, row.mode), {})[row.params["x"]] = row.time_us
    found = {}
    for mode in ("eager", "graph"):  # the second counts where there is one: a model replays graphs
        for where in [w for w, path, m in times if m == mode and path == "moe_decode"]:
            decode, grouped = times[where, "moe_decode", mode], times.get((where, "grouped", mode), {})
            points = sorted(grouped)
            lost = [x for x in points if x not in decode or _slower(decode[x], grouped[x])]
            if points:
                found[where] = max((x for x in points if not lost or x < lost[0]), default=0)
    return found


def _slower(a: Spread, b: Spread) -> bool:
    return a.median > EQUAL * b.median and a.p20 > b.p80


def write_crossovers(found: Mapping[str, int], file: Path | None = None) -> Path:
    """Puts the measured crossovers where `moe` reads them: the dict CROSSOVER of gemma4_fast/ops/moe.py. Others stay."""
    file = Path(inspect.getfile(grouped_moe)) if file is None else file
    source = file.read_text(encoding="utf-8")
    entries = "".join(f'    "{where}": {x},\n' for where, x in sorted({**CROSSOVER, **found}.items()))
    changed, count = re.subn(
        r"^CROSSOVER: dict\[str, int\] = \{.*?\}$", f"CROSSOVER: dict[str, int] = {{\n{entries}}}", source, flags=re.M | re.S
    )
    if count != 1:
        raise ValueError(f"{file}: expected one CROSSOVER to write to, found {count}")
    file.write_text(changed, encoding="utf-8")
    CROSSOVER.update(found)
    return file
