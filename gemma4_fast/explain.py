"""Which backend will run each op here, and why the others will not."""

from __future__ import annotations

import sys
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
        columns = ["op", "runs on", "does", "not used"]
        if not any(row[3] for row in rows):
            columns.pop()
        shown = [row[: len(columns)] for row in rows]
        text = render(columns, shown, title=f"{self.dtype} on {self.device}")
        for backend in ops.AUTO_ORDER:
            for name, why in common:
                if name == backend:
                    text += f"{name} not used: {why}\n"
        return text


def explain(
    model: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> Explanation:
    """The decisions for a model (its ops, device, dtype and backend), or for every op on a device and dtype.

    model: a Gemma4, or a model of transformers that `accelerate` has been given.
    device None: the GPU if there is one. Outside a model the selection of `use_backend` in force counts.
    ValueError: another object. UnsupportedError: an accelerated model that transformers' own code
    runs, and why.
    """
    from gemma4_fast.model import parse_device, parse_dtype

    if model is not None:
        native = _native(model)
        with native.running():
            return _explain(model_ops(native.config), native.device, native.dtype)
    return _explain(tuple(ops.TABLE), parse_device(device), parse_dtype(dtype))


def _native(model: Any) -> Gemma4:
    """The Gemma4 that runs this model."""
    from gemma4_fast.model import Gemma4

    if isinstance(model, Gemma4):
        return model
    if not isinstance(model, torch.nn.Module):
        got = type(model).__name__
        raise ValueError(f"expected a Gemma4 or an accelerated model of transformers, got {got}")
    if "gemma4_fast.integrations.transformers" not in sys.modules:  # which accelerates models
        kind = type(model).__name__
        remedy = "call gemma4_fast.accelerate(model) first"
        raise ValueError(f"this {kind} is not accelerated; {remedy}")
    from gemma4_fast.integrations.beside import native_of

    return native_of(model)


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
