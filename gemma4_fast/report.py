"""What the self-check found: single comparisons, the whole model's logits, and the report that holds them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma4_fast.errors import SelfCheckError
from gemma4_fast.tables import render

SLACK, FLOOR = 2.0, 1e-5  # an error may be SLACK x what plain PyTorch loses in the same dtype, plus FLOOR


@dataclass(frozen=True)
class Comparison:
    """One output, against the truth. Errors are relative: the worst token's |got - truth| / |truth|, both L2 norms."""

    what: str  # "attention", "feed-forward", "embedding", "logits", "window edge", "recorded step"
    phase: str  # "prefill", "chunk", "decode", or "" where there is none
    error: float
    plain_error: float  # what plain PyTorch loses in the same dtype
    layer: int | None = None
    kind: str = ""
    op: str = ""  # the op at fault, where it could be found

    @property
    def limit(self) -> float:
        return SLACK * self.plain_error + FLOOR

    @property
    def ok(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit

    def describe(self) -> str:
        """One line that names place, op and figures."""
        where = self.what if self.layer is None else f"layer {self.layer} ({self.kind}), {self.what}"
        where += f", {self.phase}" if self.phase else ""
        if not self.ok and not math.isfinite(self.plain_error):
            return f"{where}: not finite in this dtype, in plain PyTorch neither; use bfloat16 or float32"
        culprit = f"; the op at fault is {self.op}" if self.op else ""
        return f"{where}: relative error {self.error:.2g}, allowed {self.limit:.2g}{culprit}"


@dataclass(frozen=True)
class EndToEnd:
    """Logits of the whole model over `tokens` positions: this model's against the truth, beside plain PyTorch's.

    The medians, by phase, are over positions, of |logits - truth| / |truth|, both L2 norms: [this model's, plain PyTorch's].
    They decide, but for half-precision models with experts: there one token that is routed to another expert, which both do
    now and then, spreads through attention, and what is left says little; the comparisons layer by layer have decided.
    """

    tokens: int
    top1: float  # share of positions with the truth's likeliest token
    plain_top1: float
    kl: float  # mean KL(truth || got), nats
    plain_kl: float
    max_error: float  # max |logit - truth|
    plain_max_error: float
    medians: dict[str, tuple[float, float]]
    decides: bool

    @property
    def ok(self) -> bool:
        return not self.decides or all(got <= SLACK * plain + FLOOR for got, plain in self.medians.values())


@dataclass
class Report:
    """Every comparison that was made. `ok`, `first_wrong`; prints as a table; `to_json()` for machines."""

    level: str
    device: str
    dtype: str
    backends: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)  # names of weights that hold NaN or infinity
    end_to_end: EndToEnd | None = None
    close_calls: int = 0  # tokens left out of a feed-forward comparison: two experts were equally good

    @property
    def ok(self) -> bool:
        end = self.end_to_end is None or self.end_to_end.ok
        return end and not self.not_finite and all(c.ok for c in self.comparisons)

    @property
    def first_wrong(self) -> Comparison | None:
        """The comparison that failed first, in the order in which the model computes."""
        return next((c for c in self.comparisons if not c.ok), None)

    def verdict(self) -> str:
        """One line: passed, or what is wrong and where."""
        if self.not_finite:
            more = f" and {len(self.not_finite) - 3} more" if len(self.not_finite) > 3 else ""
            return f"FAILED: weights are not finite: {', '.join(self.not_finite[:3])}{more}"
        if (wrong := self.first_wrong) is not None:
            return f"FAILED: {wrong.describe()}"
        if not self.ok and (end := self.end_to_end) is not None:
            medians = ", ".join(f"{p} {a:.2g} (plain PyTorch {b:.2g})" for p, (a, b) in end.medians.items())
            return f"FAILED: end to end, KL {end.kl:.2g} (plain {end.plain_kl:.2g}), median relative logit error: {medians}"
        worst = max((c.error / max(c.limit, 1e-30) for c in self.comparisons), default=0.0)
        return f"passed: {len(self.comparisons)} comparisons, the worst at {worst:.0%} of what is allowed"

    def raise_if_wrong(self) -> None:
        """SelfCheckError, which carries this report, unless everything passed."""
        if not self.ok:
            raise SelfCheckError(f"self-check {self.verdict()}", self)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(c), "limit": c.limit, "ok": c.ok} for c in self.comparisons]
        end = None if self.end_to_end is None else {**asdict(self.end_to_end), "ok": self.end_to_end.ok}
        own = {k: v for k, v in vars(self).items() if k not in ("comparisons", "end_to_end")}
        return {"ok": self.ok, "verdict": self.verdict(), **own, "end_to_end": end, "comparisons": rows}

    def to_json(self) -> str:
        """The whole report as JSON; a number that is not finite becomes null."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        """A table, one row for each block (the worst of its phases), then end to end and the verdict."""
        groups: dict[tuple[str, str], list[Comparison]] = {}
        for c in self.comparisons:
            groups.setdefault(("" if c.layer is None else f"{c.layer}", f"{c.what}|{c.kind}"), []).append(c)
        rows = []
        for (layer, label), group in groups.items():
            what, kind = label.split("|")
            worst = max(group, key=lambda c: (not c.ok, c.error / c.limit))
            figures = f"{worst.error:.1e}", f"{worst.plain_error:.1e}", f"{worst.limit:.1e}"
            rows.append((layer, kind, what, worst.phase, *figures, "ok" if worst.ok else f"WRONG {worst.op}".strip()))
        columns = ("layer", "kind", "block", "worst at", "error", "plain PyTorch", "allowed", "")
        text = render(columns, rows, title=f"self-check ({self.level}), {self.dtype} on {self.device}")
        if (end := self.end_to_end) is not None:
            pairs = (
                ("top-1 agreement", f"{end.top1:.1%}", f"{end.plain_top1:.1%}"),
                ("KL, nats", f"{end.kl:.2e}", f"{end.plain_kl:.2e}"),
                ("max logit error", f"{end.max_error:.2e}", f"{end.plain_max_error:.2e}"),
                *((f"median error, {p}", f"{a:.2e}", f"{b:.2e}") for p, (a, b) in end.medians.items()),
            )
            note = "" if end.decides else "; shown only, as routing differs now and then in half precision"
            text += render(("end to end", "this model", "plain PyTorch"), pairs, title=f"{end.tokens} positions{note}")
        return text + self.verdict()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
