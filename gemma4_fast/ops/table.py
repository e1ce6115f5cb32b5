"""The table: one `Op` per operation, and the dispatcher that picks a backend for each call.

An Op holds everything that is known about an operation once: its reference, its check of the arguments, its named cases, its
cost, and where each backend's implementation lives. Tests, benchmarks, `explain` and the support table are made from it.

Backends: `reference` (truth, any dtype, never chosen by itself), `torch` (PyTorch calls, never missing), `cpu` (C++),
`triton` (NVIDIA, AMD), `cuda` (NVIDIA). The automatic choice walks AUTO_ORDER and takes the first that serves the device,
dtype and shapes. A backend that the caller names never falls back: it works or raises UnsupportedError.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma4_fast import native
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.quant import QuantizedWeight, WeightLike
from gemma4_fast.spelling import did_you_mean

log = logging.getLogger("gemma4_fast")

AUTO_ORDER = ("cuda", "triton", "cpu", "torch")
BACKENDS = (*AUTO_ORDER, "reference")
RECORDABLE = "gemma4_fast.ops.cpu_backend:"
YARDSTICK = "linear"  # most of a model's time; every backend has it
OLDEST_GPU = (8, 0)  # for the cuda backend
HALF_AND_UP = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Cost:
    """The floor of one call: floating-point operations, and bytes that must cross memory once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Impl:
    """Where one backend's function lives ("package.module:name", imported at the first call) and what it takes.

    `accepts(*args)` returns None, or why these arguments cannot be served; it may look at shapes, never at values.
    """

    path: str
    dtypes: tuple[torch.dtype, ...] = HALF_AND_UP
    accepts: Callable[..., str | None] | None = None

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        module, name = self.path.split(":")
        return getattr(importlib.import_module(module), name)


class Maker:
    """Seeded random tensors for an op's cases: made on the CPU, so that every device sees the same values."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, generator=self.generator) * scale
        return x.to(self.device, dtype or self.dtype)

    def gain(self, *shape: int) -> Tensor:
        """A norm weight: around 1, never all the same, so that a forgotten one shows."""
        return (1 + 0.3 * self.randn(*shape, dtype=torch.float32)).to(self.dtype)

    def quantized(self, bits: int, *shape: int, scale: float = 1.0, parts: int = 1) -> QuantizedWeight:
        """The same values as `randn`, quantized."""
        return QuantizedWeight.of(self.randn(*shape, scale=scale), bits, parts)

    def weight(self, bits: int, *shape: int, scale: float, parts: int = 1) -> WeightLike:
        """bits 0: a tensor."""
        return self.quantized(bits, *shape, scale=scale, parts=parts) if bits else self.randn(*shape, scale=scale)

    def ints(self, values: Iterable[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)


@dataclass
class Op:
    """One row of the table. `reference`, `check`, `cost` and every implementation take the same positional arguments."""

    name: str
    summary: str
    reference: Callable[..., Any]
    check: Callable[..., None]
    cases: Mapping[str, Callable[[Maker], dict[str, Any]]]
    cost: Callable[..., Cost]
    impls: dict[str, Impl] = field(default_factory=dict)
    bench_cases: Mapping[str, Callable[[Maker], dict[str, Any]]] = field(default_factory=dict)  # true shapes, too large to test
    gpu_cases: Mapping[str, Callable[[Maker], dict[str, Any]]] = field(default_factory=dict)  # more of them, too slow on a CPU
    compose: Callable[..., Any] | None = None  # an op made of other ops, where no backend of `impls` has it in one
    parts: tuple[str, ...] = ()  # which ones
    mutates: tuple[str, ...] = ()  # arguments that are written in place; outputs, for a test
    slack: float = 2.0
    _kept: dict[Any, tuple[list[str], dict[str, str]]] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any) -> Any:
        self.check(*args)
        if self.compose is not None:
            if _SELECTION.get().for_op(self.name)[:1] == ("reference",):
                return self.reference(*args)
            impl = self.in_one(args)
            return self.compose(*args) if impl is None else _on(args[0].device, impl.function)(*args)
        return self.select(args)(*args)

    def in_one(self, args: tuple[Any, ...]) -> Impl | None:
        """Of an op made of others: what has it in one for these arguments; looks at no values."""
        impl = self.fused(args[0].device, args[0].dtype)
        return impl if impl is not None and _refusal(impl, args) is None else None

    def fused(self, device: torch.device, dtype: torch.dtype) -> Impl | None:
        """Of an op made of others: what has it in one, if that is of the backend that would serve its parts. A part for which
        the caller has chosen a backend is served by that one."""
        if not self.impls:
            return None
        chosen = _SELECTION.get()
        wanted = chosen.for_op(self.name)
        if chosen.per_op and any(chosen.for_op(part) != wanted for part in self.parts):
            return None
        serving = (b for b in wanted or AUTO_ORDER if backend_missing(b, device.type, named=bool(wanted)) is None)
        impl = self.impls.get(next(serving, ""))
        return impl if impl is not None and dtype in impl.dtypes else None

    def select(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The implementation that serves these arguments under the selection in force."""
        x: Tensor = args[0]
        wanted = _SELECTION.get().for_op(self.name)
        serving, reasons = self._candidates(wanted, x.device, x.dtype)
        for backend in serving:
            if backend == "reference":
                return self.reference
            impl = self.impls[backend]
            reason = _refusal(impl, args, gradients=backend == "torch")
            if reason is None:
                return impl.function if backend == "torch" else _on(x.device, impl.function)
            reasons = {**reasons, backend: reason}
            if not wanted:
                _say_once(self.name, backend, reason)
        why = "; ".join(f"{b}: {r}" for b, r in reasons.items())
        raise UnsupportedError(f"op {self.name} on {x.device}, {x.dtype}: {why}")

    def _candidates(
        self, wanted: tuple[str, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple[list[str], dict[str, str]]:
        """Backends that serve this device and dtype, in order, and why the others do not. Kept: it is asked at every call."""
        key = wanted, device, dtype, *map(id, self.impls.values())
        if key not in self._kept:
            asked = {b: self.why_not(b, device, dtype, named=bool(wanted)) for b in wanted or AUTO_ORDER}
            serving = [b for b, reason in asked.items() if reason is None]
            self._kept[key] = serving, {b: reason for b, reason in asked.items() if reason is not None}
            # One warning for the model is enough where every op would give the same reason.
            if not wanted and warn_if_slow(device, dtype) is None:
                for backend, reason in self._kept[key][1].items():
                    if backend in self.impls and backend_missing(backend, device.type, named=False) is None:
                        _say_once(self.name, backend, reason)
        return self._kept[key]

    def first_serving(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The backend that the selection in force gives this device and dtype, shapes aside; None if none serves."""
        serving, _ = self._candidates(_SELECTION.get().for_op(self.name), device, dtype)
        return serving[0] if serving else None

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype, *, named: bool = True) -> str | None:
        """None if `backend` serves this device and dtype (shapes aside), else the reason. named: the caller asks for it."""
        if self.compose is not None or backend == "reference":
            return None
        if (reason := backend_missing(backend, device.type, named=named)) is not None:
            return reason
        impl = self.impls.get(backend)
        if impl is None:
            return "has no kernel for this op"
        if dtype.is_floating_point and dtype not in impl.dtypes:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        return None

    def inputs(self, case: str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of a named case, by name, in the order of the signature."""
        return self.cases[case](Maker(dtype, device, seed))


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's launcher, with its tensors' GPU, if it is one, the current one: where Triton and CUDA launch."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function

    def there(*args: Any) -> Any:
        with torch.cuda.device(device):
            return function(*args)

    return there


def _refusal(impl: Impl, args: tuple[Any, ...], gradients: bool = False) -> str | None:
    """Why it cannot serve these arguments. gradients: it computes them. A kernel cannot serve arguments that want one: its
    outputs would have none, and no one would be told."""
    if not gradients and torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return "computes no gradients, and an argument requires one"
    return None if impl.accepts is None else impl.accepts(*args)


TABLE: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an op to the table; a name is taken once."""
    if op.name in TABLE:
        raise ValueError(f"op {op.name!r} is already in the table")
    TABLE[op.name] = op
    return op


@functools.cache
def backend_missing(backend: str, device_type: str, *, named: bool = True) -> str | None:
    """None if the backend can run on tensors of this device type in this process, else why not. named: the caller asks for it,
    and so may have Triton's interpreter, which is slow and for tests."""
    if backend in ("torch", "reference"):
        return None
    if backend == "cpu":
        return native.kernels_missing() if device_type == "cpu" else "runs on CPU tensors only"
    interpreted = backend == "triton" and device_type == "cpu" and named and _triton_interprets()
    if device_type != "cuda" and not interpreted:
        return f"needs a GPU, and the device is {device_type}"
    if backend == "cuda":
        return _cuda_missing()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None


def _cuda_missing() -> str | None:
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "needs a GPU, and PyTorch finds none"
    for i in range(torch.cuda.device_count()):  # each, since a tensor may be on any
        if (capability := torch.cuda.get_device_capability(i)) < OLDEST_GPU:
            has = ".".join(map(str, capability))
            return f"needs compute capability 8.0, and {torch.cuda.get_device_name(i)} has {has}: CUDA_VISIBLE_DEVICES hides it"
    return native.cuda_kernels_missing()


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


_SAID: set[tuple[str, str]] = set()


def _say_once(op: str, backend: str, reason: str) -> None:
    """The first reason alone: others may be as many as there are shapes."""
    if (op, backend) not in _SAID:
        _SAID.add((op, backend))
        log.warning("gemma4_fast: %s does not use %s: %s", op, backend, reason)


def slow_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model runs on PyTorch's kernels alone on this device and in this dtype, and what to do about it.

    None if this package has kernels for it, or if the caller has chosen the backend.
    """
    if _SELECTION.get().for_op(YARDSTICK):
        return None
    backend, reasons = decide(YARDSTICK, device, dtype)
    if backend != "torch":
        return None
    if device.type != "cpu":
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        return f"this package has no kernels for {device} here, so PyTorch's are used ({why})"
    if (missing := backend_missing("cpu", "cpu")) is not None:
        return f"without the CPU kernels a model runs many times slower: {missing}"
    impl = TABLE[YARDSTICK].impls.get("cpu")
    if impl is None or dtype in impl.dtypes:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"a model in {name} runs many times slower on a CPU, since the CPU kernels take bfloat16 "
        "and float32 only: load it with dtype='bfloat16' (--dtype bfloat16)"
    )


def warn_if_slow(device: torch.device, dtype: torch.dtype, what: str = "") -> str | None:
    """Logs `slow_reason` as a warning, once in a process, and returns it.

    what: the beginning of a message of its own, "accelerate changes nothing: ".
    """
    reason = slow_reason(device, dtype)
    if reason is not None and (what, reason) not in _SAID:
        _SAID.update({(what, reason), ("", reason)})
        log.warning("gemma4_fast: %s%s", what, reason)
    return reason


@dataclass(frozen=True)
class _Selection:
    """Backends named by the caller, in order of preference: for single ops, and for all others. Empty: automatic."""

    default: tuple[str, ...] = ()
    per_op: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def for_op(self, name: str) -> tuple[str, ...]:
        return self.per_op.get(name, self.default)


_AUTOMATIC = _Selection()
_SELECTION: ContextVar[_Selection] = ContextVar("gemma4_fast_backend", default=_AUTOMATIC)


def parse_backend(backend: str | Iterable[str] | None) -> tuple[str, ...]:
    """ "cpu", "cpu,torch", ("cpu", "torch"), None or "auto" -> names in order of preference; empty means automatic."""
    if backend is None or backend == "auto":
        return ()
    names = backend.split(",") if isinstance(backend, str) else backend
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"a backend is named by text, or several by a list of texts, got {backend!r}")
    names = [n.strip() for n in names]
    if not names:
        raise ValueError("no backend named; leave the argument out for the automatic choice")
    for name in names:
        if name not in BACKENDS:
            listed = ", ".join(BACKENDS)
            hint = did_you_mean(name, [*BACKENDS, "auto"])
            raise ValueError(f"unknown backend {name!r}; expected {listed} or auto{hint}")
    return tuple(names)


def _parse_isa(isa: str | None) -> str:
    if isa is None:
        return native.ISA.get()
    if isa not in native.ISAS:
        raise ValueError(f"unknown instruction set {isa!r}; the CPU kernels have {', '.join(native.ISAS)}")
    if (reason := native.kernels_missing()) is not None:
        raise UnsupportedError(reason)
    if isa not in native.isas():
        raise UnsupportedError(f"this processor cannot run {isa}; it has {', '.join(native.isas())}")
    return isa


def selection() -> object:
    """The selection in force, to compare and to hash: equal ones choose the same backends and the same instruction set."""
    chosen = _SELECTION.get()
    return chosen.default, tuple(sorted(chosen.per_op.items())), native.ISA.get()


@contextmanager
def use_backend(
    backend: str | Iterable[str] | None, *, ops: Iterable[str] | None = None, isa: str | None = None
) -> Iterator[None]:
    """Choose backends for the calls inside: one name, or several in order of preference. `ops` limits it to these ops.

    A named backend never falls back to one that is not named: UnsupportedError says why it cannot serve a call. isa: the
    instruction set of the CPU kernels, "plain", "avx2", "avx512" or "avx512_bf16", instead of the best that the machine has;
    of all of them, whatever `ops` says.
    """
    names, now = parse_backend(backend), _SELECTION.get()
    chosen_isa = _parse_isa(isa)
    if ops is None:
        new = _Selection(names)
    else:
        chosen = list(ops)
        if unknown := [n for n in chosen if n not in TABLE]:
            raise ValueError(f"unknown ops {unknown}; the table has {sorted(TABLE)}")
        chosen += [part for n in chosen for part in TABLE[n].parts]
        new = _Selection(now.default, {**now.per_op, **dict.fromkeys(chosen, names)})
    token, isa_token = _SELECTION.set(new), native.ISA.set(chosen_isa)
    try:
        yield
    finally:
        _SELECTION.reset(token)
        native.ISA.reset(isa_token)


@contextmanager
def default_backend(backend: str | Iterable[str] | None) -> Iterator[None]:
    """Like use_backend, but what a surrounding `use_backend(..., ops=...)` has chosen for single ops stays."""
    now, names = _SELECTION.get(), parse_backend(backend)
    token = _SELECTION.set(_Selection(names or now.default, now.per_op))
    try:
        yield
    finally:
        _SELECTION.reset(token)


def bound(op: Op, backend: str | Iterable[str]) -> Callable[..., Any]:
    """The op as a function that always runs on this backend: `use_backend` settled once, at no cost per call."""
    context = copy_context()
    context.run(_SELECTION.set, _Selection(parse_backend(backend)))
    return functools.partial(context.run, op)


def require(device: torch.device, dtype: torch.dtype, ops: Iterable[str]) -> None:
    """Raise UnsupportedError if the selection in force cannot serve these ops here.

    A reason names the ops that it is for, unless it is for all of them; `explain` lists every op.
    Warns, once, if the ops can be served only with PyTorch's kernels.
    """
    any_served = False
    faults: dict[str, list[str]] = {}
    for name in ops:
        backend, reasons = decide(name, device, dtype)
        if backend == "none":
            why = "; ".join(f"{b}: {reason}" for b, reason in reasons.items())
            faults.setdefault(why, []).append(name)
        elif backend != "composed":
            any_served = True
    if faults:
        lines = list(faults)
        if any_served or len(faults) > 1:
            lines = [f"{why} ({', '.join(names)})" for why, names in faults.items()]
        where = f"{device} in {str(dtype).removeprefix('torch.')}"
        raise UnsupportedError(f"cannot run on {where}: {'; '.join(lines)}")
    warn_if_slow(device, dtype)


def in_one(name: str, *args: Any) -> bool:
    """Whether the selection in force has this op, which others make up, in one for these arguments."""
    return TABLE[name].in_one(args) is not None


def recordable(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the selection in force gives this op a kernel whose calls `graph.py` can record and replay: on a GPU kernels of
    ours, whose launchers never wait for it."""
    backend, _ = decide(name, device, dtype)
    if device.type == "cuda":
        return backend in ("composed", "cuda", "triton")
    return backend == "composed" or (backend == "cpu" and TABLE[name].impls[backend].path.startswith(RECORDABLE))


def decide(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The backend that the selection in force gives this op here, shapes aside, and why each one tried before is not it.

    The backend is "none" if nothing serves, and "composed" for an op that is made of others.
    """
    op, reasons = TABLE[name], dict[str, str]()
    if op.compose is not None:
        fused = op.fused(device, dtype)
        return next((b for b, impl in op.impls.items() if impl is fused), "composed"), reasons
    wanted = _SELECTION.get().for_op(name)
    for backend in wanted or AUTO_ORDER:
        reason = op.why_not(backend, device, dtype, named=bool(wanted))
        if reason is None:
            return backend, reasons
        reasons[backend] = reason
    return "none", reasons
