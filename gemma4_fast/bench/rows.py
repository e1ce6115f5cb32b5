"""Rows: one measurement each, and files of them. The fields are documented in bench/README.md."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4_fast.files import replacing

OURS = "gemma4-fast"  # this package with the backends that it chooses by itself
SCHEMA = 1
KINDS = ("roofline", "op", "scale", "model", "step", "cache")
STATUSES = ("ok", "wrong", "unsupported", "missing", "out of memory", "failed")


@dataclass(frozen=True)
class Spread:
    """What the samples of one timed thing say, in microseconds."""

    median: float
    p20: float
    p80: float
    min: float
    samples: int

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Spread:
        """Of at least one sample."""
        if len(microseconds) == 1:
            only = microseconds[0]
            return cls(only, only, only, only, 1)
        fifths = statistics.quantiles(microseconds, n=5, method="inclusive")
        return cls(statistics.median(microseconds), fifths[0], fifths[-1], min(microseconds), len(microseconds))


@dataclass
class Row:
    """One measurement, or why there is none. Fields that do not apply are None (and left out of files)."""

    kind: str
    name: str
    contender: str
    status: str = "ok"
    message: str = ""
    mode: str = "eager"  # or "graph": replayed from a CUDA graph
    dtype: str = ""
    device: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    time_us: Spread | None = None  # of one call, one prefill, or one decode step
    tokens: int | None = None  # that this time makes or reads
    bytes: int | None = None  # the floor: what must cross memory once
    flops: int | None = None
    # gb_s, gflop_s: medians, measured between the samples of this row. With _p20, _p80: their spread.
    roofline: dict[str, float] | None = None
    cold: bool | None = None  # the inputs were rotated through more memory than the last cache holds
    error: dict[str, float] | None = None  # against the reference: max, and what was allowed
    parts: dict[str, float] | None = None  # microseconds by op, of one decode step
    peak_bytes: int | None = None  # of memory, while this row ran
    cache_bytes: int | None = None  # allocated
    read_bytes: int | None = None  # of the cache, for one decoded token
    busy: bool | None = None  # whether other work disturbed this row: see load.py
    other_load: float | None = None  # processors that other processes kept busy meanwhile
    drift: float | None = None  # factor between the machine's own rates in this run
    of_quiet: float | None = None  # share of the speed that the same measurement had without --busy
    command: str = ""
    finished: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    schema: int = SCHEMA

    # ---- what follows from the above
    @property
    def gb_s(self) -> float | None:
        return None if self.time_us is None or not self.bytes else self.bytes / self.time_us.median / 1e3

    @property
    def gflop_s(self) -> float | None:
        return None if self.time_us is None or not self.flops else self.flops / self.time_us.median / 1e3

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.time_us is None or not self.tokens else self.tokens / self.time_us.median * 1e6

    @property
    def floors_us(self) -> dict[str, float]:
        """Microseconds that memory and arithmetic alone would take at the rates measured beside this row."""
        roof = self.roofline or {}
        floors = {"memory": (self.bytes, roof.get("gb_s")), "compute": (self.flops, roof.get("gflop_s"))}
        return {what: need / rate / 1e3 for what, (need, rate) in floors.items() if need and rate}

    @property
    def bound(self) -> str | None:
        """Which of the two limits this row: "memory" or "compute"."""
        floors = self.floors_us
        return max(floors, key=lambda what: floors[what]) if floors else None

    @property
    def percent_of_roofline(self) -> float | None:
        if self.time_us is None or self.bound is None:
            return None
        return 100 * self.floors_us[self.bound] / self.time_us.median

    @property
    def key(self) -> tuple[str, ...]:
        """The same for the same measurement in another run, on whatever machine."""
        params = json.dumps(self.params, sort_keys=True)
        return self.kind, self.name, params, self.contender, self.mode, self.dtype, self.device.split(":")[0]

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "", {})}
        for name in ("gb_s", "gflop_s", "tokens_per_s", "bound", "percent_of_roofline"):
            if (value := getattr(self, name)) is not None:
                own[name] = round(value, 3) if isinstance(value, float) else value
        return own

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """ValueError says what is wrong with a row that no bench wrote."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ValueError(f"not a row of schema {SCHEMA}")
        own = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        for name in ("kind", "name", "contender"):
            own.setdefault(name, None)
        own["contender"] = _one_name(own)
        for name, right in _FIELDS.items():
            if name in own and not right.holds(own[name]):
                raise ValueError(f"{name} must be {right.words}, got {_short(own[name])}")
        own["name"] = _OLD_BESIDE.sub(lambda found: beside(int(found[1])), own["name"])
        for name, right in PARAMS.get(own["kind"], {}).items():
            if not right.holds(value := own.get("params", {}).get(name)):
                raise ValueError(f"params.{name} of a {own['kind']} row must be {right.words}, got {_short(value)}")
        if own.get("time_us") is not None:
            own["time_us"] = Spread(**own["time_us"])
        row = cls(**own)
        if row.status == "ok" and (row.cache_bytes if row.kind == "cache" else row.time_us) is None:
            raise ValueError(f"{row.kind} rows that are ok must have {'cache_bytes' if row.kind == 'cache' else 'time_us'}")
        return row


def beside(count: int) -> str:
    """The end of a row's name, ", with 2 busy processes": how many ran beside it; "" for none."""
    if not count:
        return ""
    return f", with {count} busy {'process' if count == 1 else 'processes'}"


_OLD_BESIDE = re.compile(r", (\d+) busy beside it$")  # as older files say it


def _one_name(own: Mapping[str, Any]) -> Any:
    """The row's contender.

    Older files say "gemma4-fast cpu" where that backend was named on a CPU. The automatic choice is
    the same there, so the row gets its name.
    """
    on_cpu = str(own.get("device", "")).startswith("cpu")
    if own["contender"] == f"{OURS} cpu" and on_cpu and own.get("status") != "unsupported":
        return OURS
    return own["contender"]


# ---------------------------------------------------------------- what a row from a file may hold
@dataclass(frozen=True)
class _Type:
    words: str
    holds: Callable[[Any], bool]


def _number(x: Any) -> bool:
    """Neither so small nor so large that a quotient of two overflows."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 1e-9 <= x <= 1e20


def _one_of(known: Sequence[str]) -> _Type:
    return _Type(f"one of {', '.join(known)}", lambda x: x in known)


def _mapping(words: str, holds: Callable[[str, Any], bool]) -> _Type:
    return _Type(words, lambda x: isinstance(x, dict) and all(holds(k, v) for k, v in x.items()))


def _optional(t: _Type) -> _Type:
    return _Type(t.words, lambda x: x is None or t.holds(x))


_TEXT = _Type("text", lambda x: isinstance(x, str))
_FLAG = _Type("true or false", lambda x: isinstance(x, bool))
_COUNT = _Type("a whole number of at least 1", lambda x: isinstance(x, int) and _number(x) and x < 1 << 62)
_NUMBERS = _mapping("an object of positive numbers", lambda _, x: _number(x))
_SIZE = _Type("a whole number of at least 0", lambda x: isinstance(x, int) and (x == 0 or _COUNT.holds(x)))
_SPREAD = tuple(f.name for f in dataclasses.fields(Spread))
_TIME = _Type(
    f"an object of {', '.join(_SPREAD)}, all of them positive numbers, and the median between p20 and p80",
    lambda x: (
        isinstance(x, dict) and set(x) == set(_SPREAD) and all(map(_number, x.values())) and x["p20"] <= x["median"] <= x["p80"]
    ),
)
_PARTS = _Type(
    "an object of numbers, not all of them 0",
    lambda x: isinstance(x, dict) and all(v == 0 or _number(v) for v in x.values()) and any(x.values()),
)
_MACHINE = {"cpu": _TEXT, "gpu": _TEXT, "cpus": _COUNT, "threads": _COUNT,
            "memory_bytes": _COUNT, "gpu_memory_bytes": _COUNT,
            "cpu_flags": _Type("a list of text", lambda x: isinstance(x, list) and all(map(_TEXT.holds, x)))}  # fmt: skip
_FIELDS: dict[str, _Type] = {
    "kind": _one_of(KINDS),
    "status": _one_of(STATUSES),
    **dict.fromkeys(("name", "contender", "message", "mode", "dtype", "device", "command", "finished"), _TEXT),
    **dict.fromkeys(("tokens", "bytes", "flops", "peak_bytes", "cache_bytes", "read_bytes"), _optional(_SIZE)),
    "commit": _optional(_TEXT),
    **dict.fromkeys(("cold", "busy"), _optional(_FLAG)),
    "other_load": _optional(_Type("a number of at least 0", lambda x: x == 0 or _number(x))),
    **dict.fromkeys(("drift", "of_quiet"), _optional(_Type("a positive number", _number))),
    "params": _mapping("an object", lambda *_: True),
    "time_us": _optional(_TIME),
    "roofline": _optional(_NUMBERS),
    "parts": _optional(_PARTS),
    "error": _optional(_mapping("an object of numbers", lambda _, x: isinstance(x, (int, float)))),
    "machine": _mapping("an object as `bench` writes it", lambda k, v: k not in _MACHINE or _MACHINE[k].holds(v)),
    "versions": _mapping("an object of text", lambda _, x: x is None or _TEXT.holds(x)),
}
_MODEL = {
    "quantize": _optional(_TEXT),
    "model": _TEXT,
    "layers": _COUNT,
    "vocab": _COUNT,
    "batch": _COUNT,
    "prompt_len": _COUNT,
}
# By kind of row: the parameters that tables and pictures are made by.
PARAMS: dict[str, dict[str, _Type]] = {
    "scale": {"axis": _TEXT, "series": _TEXT, "op": _TEXT, "x": _COUNT},
    "model": {**_MODEL, "new_tokens": _COUNT, "phase": _one_of(("prefill", "decode")), "depth": _FLAG},
    "step": _MODEL,
    "cache": {"model": _TEXT, "context": _COUNT},
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------- files
def read(path: str | Path) -> list[Row]:
    """The rows of a JSON-lines file. ValueError names file and line; OSError if it cannot be read."""
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = Row.from_dict(json.loads(line.decode()))
                json.dumps(row.to_dict(), allow_nan=False, ensure_ascii=False).encode()  # it can be written again
                rows.append(row)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}, line {number}: {e}") from e
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def line(row: Row) -> str:
    return json.dumps(row.to_dict(), allow_nan=False)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """One line a row; nested fields become columns like time_us.median."""
    flat = [dict(_flatten(row.to_dict())) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(flat)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, v in value.items():
        if isinstance(v, Mapping):
            yield from _flatten(v, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", " ".join(map(str, v)) if isinstance(v, list) else v
