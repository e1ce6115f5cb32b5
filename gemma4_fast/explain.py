"""Which backend will run each op here, and why the others will not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gemma4_fast import ops
from gemma4_fast.layers import model_ops
from gemma4_fast.tables import render

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4


@dataclass(frozen=True)
class Choice:
    """The decision for one op. `passed_over` maps each backend tried before the chosen one to its reason."""

    op: str
    summary: str
    backend: str
    passed_over: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """All decisions for one device and dtype. Prints as a table; shapes may still change a choice at the call."""

    device: str
    dtype: str
    choices: tuple[Choice, ...]

    def to_dict(self) -> dict[str, Any]:
        rows = {c.op: {"backend": c.backend, "passed_over": c.passed_over} for c in self.choices}
        return {"device": self.device, "dtype": self.dtype, "ops": rows}

    def __str__(self) -> str:
        picks = [c for c in self.choices if c.backend != "composed"]
        common = set.intersection(*(set(c.passed_over.items()) for c in picks)) if picks else set()
        rows = []
        for c in self.choices:
            own = [f"{b}: {why}" for b, why in c.passed_over.items() if (b, why) not in common]
            rows.append((c.op, c.backend, c.summary, "; ".join(own)))
        text = render(("op", "runs on", "does", "passed over"), rows, title=f"{self.dtype} on {self.device}")
        for backend in ops.AUTO_ORDER:
            text += "".join(f"passed over everywhere: {b}, it {why}\n" for b, why in common if b == backend)
        return text


def explain(
    model: Gemma4 | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> Explanation:
    """The decisions for a model (its ops, device, dtype and backend), or for every op on a device and dtype.

    device None: the GPU if there is one. Outside a model the selection of `use_backend` in force counts.
    """
    from gemma4_fast.model import parse_device, parse_dtype

    if model is not None:
        with model.running():
            return _explain(model_ops(model.config), model.device, model.dtype)
    return _explain(tuple(ops.TABLE), parse_device(device), parse_dtype(dtype))


def _explain(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Explanation:
    choices = []
    for name in names:
        backend, reasons = ops.decide(name, device, dtype)
        choices.append(Choice(name, ops.TABLE[name].summary, backend, reasons))
    return Explanation(str(device), str(dtype).removeprefix("torch."), tuple(choices))


def support_table() -> str:
    """The README's table, in Markdown: each op, what it does, and the backends that have it."""
    columns = [b for b in ops.BACKENDS if b != "reference"]
    lines = ["| op | does | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for op in ops.TABLE.values():
        marks = ["yes" if b in op.impls else "composed" if op.compose else "" for b in columns]
        lines.append(f"| `{op.name}` | {op.summary} | " + " | ".join(marks) + " |")
    return "\n".join(lines)
