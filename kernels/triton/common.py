"""What the kernels share: the target's limits, and small device functions. Imports nothing of the package but its weights.

Kernels accumulate in fp32, offset rows in int64 and sum in a fixed order. `tl.dot` takes fp32 operands at full precision
(IEEE): TF32 would lose more than plain PyTorch does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_fast.quant import QuantizedWeight, WeightLike

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Target:
    """What tile choices depend on. arch: 80 … 120 for NVIDIA's compute capability, 942 for AMD's gfx942. shared: bytes a
    program may have. cores: multiprocessors or compute units."""

    kind: str  # "cuda" or "hip"
    arch: int
    cores: int
    shared: int

    @property
    def has_tma(self) -> bool:
        """Copies of whole tiles by descriptor. sm_120 has them too, but Triton 3.6 keeps a stack for them there."""
        return self.kind == "cuda" and 90 <= self.arch < 120

    @property
    def has_early_launch(self) -> bool:
        """Programmatic dependent launch, see `early`. Not sm_120, where others' graphs of such launches fail (sglang#18596)."""
        return self.kind == "cuda" and 90 <= self.arch < 120


TARGETS = {
    "sm_80": Target("cuda", 80, 108, 166912),
    "sm_90": Target("cuda", 90, 132, 232448),
    "sm_100": Target("cuda", 100, 148, 232448),
    "sm_120": Target("cuda", 120, 188, 101376),
    "gfx942": Target("hip", 942, 304, 65536),
}
ASSUMED: ContextVar[Target] = ContextVar("gemma4_fast_triton_target", default=TARGETS["sm_90"])  # for tensors on no GPU


def target(device: torch.device) -> Target:
    """The GPU that `device` is; for the interpreter, and for compiling without a GPU, the assumed one."""
    return ASSUMED.get() if device.type != "cuda" else _target(device.index or 0)


@functools.cache
def _target(index: int) -> Target:
    p = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = "".join(c for c in p.gcnArchName.split(":")[0] if c.isdigit())
        return Target("hip", int(arch or 0), p.multi_processor_count, 65536)
    shared = getattr(p, "shared_memory_per_block_optin", 101376)
    return Target("cuda", 10 * p.major + p.minor, p.multi_processor_count, shared)


# What launchers make that is the same for all layers of a step, by what it is made of. A dict while a step is being captured,
# so that each replay computes it once; else None: each call makes its own.
STEP: ContextVar[dict[object, Any] | None] = ContextVar("gemma4_fast_triton_step", default=None)


def once_a_step(make: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """make(*args), or what it returned to an earlier layer of the step; tensors among the args count by identity."""
    kept = STEP.get()
    if kept is None:
        return make(*args)
    key = (make, *(id(a) if isinstance(a, Tensor) else a for a in args))
    if key not in kept:
        kept[key] = make(*args), args  # the args too, so that their ids stay theirs
    return kept[key][0]


def early(x: Tensor) -> dict[str, bool]:
    """Options of a launch on x's GPU: the kernel begins while the one before it still runs, so that it is in place when that
    ends. It must begin with `inputs_ready`; tests/triton_compiled.py sees to it that no access to memory comes before."""
    return {"launch_pdl": True} if target(x.device).has_early_launch else {}


def whole(x: Tensor) -> Tensor:
    """Contiguous, by a copy where it is not."""
    return x if x.is_contiguous() else x.contiguous()


def maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else whole(x)


def pow2(n: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, triton.next_power_of_2(max(1, n)))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def parts(weight: WeightLike) -> tuple[Tensor, Tensor | None, int]:
    """What a kernel is given of a weight: its values (of a quantized one int32 words), scales, and bits (0: not quantized)."""
    if isinstance(weight, QuantizedWeight):
        return weight.data.view(torch.int32).squeeze(-1), weight.scale, weight.bits
    return whole(weight), None, 0


# ---- on the device ----


@triton.jit
def inputs_ready():
    """First in every kernel. Waits until the launch before this one has ended and its results are seen, and so, since that one
    waited too, all launches before; then the next may begin to wait."""
    if tl.target_info.cuda_capability_geq(9):
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def gelu_tanh(x):
    """fp32. x * sigmoid(2 u) is 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * u)


@triton.jit
def tanh(x):
    """fp32. Near 0, where 2 sigmoid(2 x) - 1 would lose digits, its series."""
    s = x * x
    small = x + x * s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869489)))
    return tl.where(s < 0.0625, small, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def cos_sin(position, freq):
    """cos, sin of position (int) times freq (fp32, radians), fp32: product and reduction to a quarter turn in fp64, so that
    positions of 262144 lose nothing; then Taylor polynomials on [-pi/4, pi/4]. No branches: a library's cos has one, and
    keeps a stack for it."""
    angle = position.to(tl.float64) * freq.to(tl.float64)
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = (angle - quarter * 1.5707963267948966).to(tl.float32)
    turn = quarter.to(tl.int32) & 3
    s = r * r
    sin = r + r * s * (-1.6666667e-1 + s * (8.333333e-3 + s * (-1.9841270e-4 + s * 2.7557319e-6)))
    cos = 1.0 + s * (-0.5 + s * (4.1666668e-2 + s * (-1.3888889e-3 + s * (2.4801587e-5 + s * -2.7557319e-7))))
    swap = (turn & 1) == 1
    c, d = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return tl.where((turn == 1) | (turn == 2), -c, c), tl.where(turn >= 2, -d, d)


@triton.jit
def words_of(row, word, num_words, first_panel):
    """Offsets [N, W] of 32-bit words of a quantized matrix: row [N, 1], word [1, W] of that row. See gemma4_fast.quant: panels
    of 16 rows, a word of each beside the others."""
    panel = first_panel + row // 16
    return panel.to(tl.int64) * (num_words * 16) + word * 16 + row % 16


@triton.jit
def unpacked(words, BITS: tl.constexpr):
    """int32 words [N, W] -> fp32 [N, W * 32 / BITS], in the order of the columns, offsets taken off."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if BITS == 8:  # four columns in four bytes
        a, b = words & 255, (words >> 8) & 255
        c, d = (words >> 16) & 255, (words >> 24) & 255
        q = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [N, W * 4]) - 128
    else:  # columns 0 … 3 in the low halves of the bytes, 4 … 7 in the high ones
        a, b = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
        w = tl.reshape(tl.join(a, b), [N, W * 2])
        a, b = w & 15, (w >> 8) & 15
        c, d = (w >> 16) & 15, (w >> 24) & 15
        q = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [N, W * 8]) - 8
    return q.to(tl.float32)


@triton.jit
def weight_tile(
    w_ptr, s_ptr, row, row_ok, k0, N, K, expert, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Rows `row` of part PART of an expert's matrix, which has PARTS of N rows each (gate and up: 2; a plain matrix: expert 0,
    1 part), columns [k0, k0 + BLOCK_K): [len(row), BLOCK_K], as stored if BITS is 0, else fp32. What is out of bounds is 0."""
    part = expert * PARTS + PART
    if BITS == 0:
        k = k0 + tl.arange(0, BLOCK_K)
        ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (k < K)[None, :]
        first = tl.cast(part, tl.int64) * N
        return tl.load(w_ptr + (first + row)[:, None] * K + k[None, :], mask=ok, other=0.0)
    else:
        PER: tl.constexpr = 32 // BITS  # columns of a word
        ROWS: tl.constexpr = row.shape[0]
        groups, first_panel = tl.cdiv(K, 32), part * tl.cdiv(N, 16)
        word = k0 // PER + tl.arange(0, BLOCK_K // PER)
        ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (word < groups * BITS)[None, :]
        words = tl.load(w_ptr + words_of(row[:, None], word[None, :], groups * BITS, first_panel), mask=ok, other=0)
        group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
        ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (group < groups)[None, :]
        scale = tl.load(s_ptr + words_of(row[:, None], group[None, :], groups, first_panel), mask=ok, other=0.0)
        q = tl.reshape(unpacked(words, BITS), [ROWS, BLOCK_K // 32, 32])
        return tl.reshape(q * scale.to(tl.float32)[:, :, None], [ROWS, BLOCK_K])
