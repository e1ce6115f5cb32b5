"""Weights of 8 or 4 bits: `QuantizedWeight`, the one format that every backend reads.

Symmetric, one fp16 scale for each 32 consecutive values of a row: w = scale * q. The values are exactly those of GGUF's Q8_0
(q in [-127, 127], scale = largest |w| / 127) and Q4_0 (q in [-8, 7], scale = the w of largest magnitude / -8), by the rules of
llama.cpp's gguf package, with roundings half away from zero.

The CPU kernels also round the activations, to Q8_0 (with a scale in fp32); `F.linear(x, weight)` does the same in plain
PyTorch: what the kernels are judged by. The Triton kernels round none, and unpack the weights in registers; the torch backend
multiplies by the dequantized weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_fast import native

GROUP = 32  # values that share a scale
PANEL = 16  # rows that are stored interleaved
BITS = {"int8": 8, "int4": 4}
LARGEST_WEIGHT = {8: 127 * 65504.0, 4: 8 * 65504.0}  # by bits: its scale is finite in fp16
_CHUNK = 1 << 24  # values that are widened at once while quantizing
_WIDENED_ROWS = 64  # kWidenedRows in csrc/cpu/kernels.h
_BLOCK = 1 << 21  # values that a product dequantizes at once: as fp32 they stay in a core's caches


def parse_quantize(quantize: str | None) -> int | None:
    """None, "int8" or "int4" -> bits of a weight."""
    if quantize is not None and (not isinstance(quantize, str) or quantize not in BITS):
        raise ValueError(f"quantize must be {', '.join(map(repr, BITS))} or None, got {quantize!r}")
    return None if quantize is None else BITS[quantize]


class QuantizedWeight:
    """A matrix [N, K], or one for each expert [E, N, K], in 8 or 4 bits.

    bits: 8 or 4. dtype: the floating dtype that the model computes in, and that rows of a table come in.
    data: uint8 [.., P, G * bits, 16, 4], scale: fp16 [.., P, G, 16], for P panels of 16 rows and G groups of 32 columns; rows
    and columns are filled up with zeros. In 64 bytes lie four consecutive columns of each of 16 rows: the stored value is
    q + 128, or of four bits q + 8, columns 8 j .. 8 j + 3 in the low halves and the next four in the high ones.
    parts: a matrix of several projections, gate and up, has rows filled up in each of them.

    Indexing and `split` along the first axis give views; `copy_` quantizes into one. It is no Tensor, but has what a model and
    the reference ask of a weight.
    """

    def __init__(
        self, bits: int, data: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype, parts: int = 1
    ) -> None:
        self.bits, self.data, self.scale, self.dtype, self.parts = bits, data, scale, dtype, parts
        self.shape = torch.Size(shape)
        self.first = 0  # the row of the matrix that a view begins with
        self.rows = self.shape[-2]  # of the whole matrix

    @classmethod
    def empty(
        cls,
        bits: int,
        shape: Sequence[int],
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        parts: int = 1,
    ) -> QuantizedWeight:
        """Zeros, to be filled by `copy_`. ValueError for bits or a shape that there is not."""
        if bits not in BITS.values():
            raise ValueError(f"a weight is quantized to 8 or 4 bits, got {bits!r}")
        if len(shape) not in (2, 3) or min(shape[-2:]) < 1 or parts < 1 or shape[-2] % parts:
            raise ValueError(
                f"a weight of shape {list(shape)} in {parts} parts cannot be quantized: expected [N, K] or [E, N, K]"
            )
        *experts, n, k = shape
        panels, groups = parts * -(-(n // parts) // PANEL), -(-k // GROUP)
        data = torch.empty((*experts, panels, groups * bits, PANEL, 4), dtype=torch.uint8, device=device)
        scale = torch.empty((*experts, panels, groups, PANEL), dtype=torch.float16, device=device)
        new = cls(bits, data, scale, shape, dtype, parts)
        new.clear()
        return new

    @classmethod
    def of(cls, weight: Tensor, bits: int, parts: int = 1) -> QuantizedWeight:
        """`weight` [N, K] or [E, N, K], of a floating dtype, quantized."""
        return cls.empty(bits, weight.shape, weight.dtype, weight.device, parts).copy_(weight)

    # ---- what a model and the reference ask of a weight ----
    device = property(lambda self: self.data.device)
    is_meta = property(lambda self: self.data.is_meta)
    requires_grad = False

    @property
    def nbytes(self) -> int:
        """Of the rows of this view, scales included."""
        whole = self.data.nbytes + self.scale.nbytes
        return whole if self.shape[-2] == self.rows else whole * self.shape[-2] // self.rows

    def numel(self) -> int:
        return math.prod(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def detach(self) -> QuantizedWeight:
        return self

    def is_contiguous(self) -> bool:
        """Whether this is all that is stored, so that kernels may take it as it is."""
        return self.shape[-2] == self.rows and self._contiguous()

    def _contiguous(self) -> bool:
        return self.data.is_contiguous() and self.scale.is_contiguous()

    def to(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """What `nn.Module._apply` does to a parameter: another device is obeyed, another dtype is that of computing alone."""
        new = copy.copy(self)
        new.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        new.data, new.scale = (
            moved if moved.dtype == own.dtype else own.to(moved.device)
            for own, moved in ((self.data, fn(self.data)), (self.scale, fn(self.scale)))
        )
        if self.is_meta and not new.is_meta:
            new.clear()
        return new

    def clear(self) -> None:
        """All zeros: what fills up rows and columns must not be whatever memory held. The first touch of new memory."""
        native.use_huge_pages(self.data)
        native.use_huge_pages(self.scale)
        self.data.fill_(128 if self.bits == 8 else 0x88)
        self.scale.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        new = copy.copy(self)
        new.data, new.scale = self.data.clone(), self.scale.clone()
        return new

    def __repr__(self) -> str:
        return f"QuantizedWeight(int{self.bits}, {list(self.shape)}, {self.device})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: int | slice | Tensor) -> Any:
        """An expert by its number, a slice along the first axis: views. Rows of a matrix by their ids: a Tensor in `dtype`."""
        if isinstance(at, Tensor):
            if self.dim() == 3 or at.dtype not in (torch.int64, torch.int32):
                raise ValueError("rows are taken by a tensor of integer ids, experts by a number or a slice")
            if at.device.type == "cpu" and at.numel() and not 0 <= int(at.min()) <= int(at.max()) < len(self):
                raise IndexError(f"ids must lie in [0, {len(self)})")  # a negative one would be a row of padding
            return self.rows_by_formula(at.flatten(), self.dtype).view(*at.shape, self.shape[-1])
        if not isinstance(at, (int, slice)):
            raise ValueError(f"rows and experts are taken by a number, a slice or a tensor of ids, got {type(at).__name__}")
        if isinstance(at, int) and self.dim() == 2:
            return self.rows_by_formula(torch.tensor([range(self.shape[0])[at]], device=self.device), self.dtype)[0]
        new = copy.copy(self)
        if self.dim() == 3:
            new.data, new.scale = self.data[at], self.scale[at]
            new.shape = self.shape[1:] if isinstance(at, int) else torch.Size((new.data.shape[0], *self.shape[1:]))
            return new
        start, stop, step = at.indices(self.shape[0])  # type: ignore[union-attr]
        if step != 1:
            raise ValueError(f"rows of a quantized weight are taken one after the other, got a step of {step}")
        new.first, new.shape = self.first + start, torch.Size((max(0, stop - start), self.shape[1]))
        return new

    def split(self, sizes: int | Sequence[int]) -> list[QuantizedWeight]:
        """Views along the first axis, as Tensor.split."""
        if isinstance(sizes, int):
            sizes = [min(sizes, len(self) - at) for at in range(0, len(self), sizes)]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [self[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def index_select(self, dim: int, ids: Tensor) -> QuantizedWeight:
        """A new matrix of the rows `ids` [n] int64, copied as they are stored. dim must be 0."""
        if dim != 0 or self.dim() != 2:
            raise ValueError(f"rows are taken from a matrix along axis 0, got {self.dim()} axes, {dim}")
        shape = len(ids), self.shape[1]
        new = QuantizedWeight.empty(self.bits, shape, self.dtype, self.device)
        place = new._place(torch.arange(len(ids), device=self.device))
        panel, lane = self._place(ids)
        new.data[place[0], :, place[1]] = self.data[panel, :, lane]
        new.scale[place[0], :, place[1]] = self.scale[panel, :, lane]
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """F.linear(x, weight), with x rounded to Q8_0; F.embedding(ids, weight)."""
        if func is F.linear and not kwargs and len(args) == 2:
            x, weight = args
            return linear_in_blocks(rounded(x), weight).to(x.dtype)
        if func is F.embedding and len(args) == 2:
            ids, weight = args
            return weight[ids]
        return NotImplemented

    # ---- values ----
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a Tensor of `shape`. fp32 and wider hold them exactly; None: `self.dtype`."""
        dtype = dtype or self.dtype
        if self.dim() == 3:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
            for e in range(len(self)):
                out[e] = self[e].dequantize(dtype)
            return out
        if self._has_kernel():
            return self._values_by_kernel(dtype)
        return self.rows_by_formula(torch.arange(self.shape[0], device=self.device), dtype)

    def _has_kernel(self) -> bool:
        """Whether the CPU kernels quantize and dequantize this matrix: the same bits, many times as fast."""
        return self.device.type == "cpu" and native.kernels_missing() is None and self._contiguous()

    def _values_by_kernel(self, dtype: torch.dtype) -> Tensor:
        """All rows of this view of a matrix -> [n, K]. The kernel writes fp32 and bf16."""
        by_kernel = dtype if dtype == torch.bfloat16 else torch.float32
        out = torch.empty(self.shape, dtype=by_kernel, device="cpu")
        self._to(out)
        return out.to(dtype)

    def _to(self, out: Tensor) -> None:
        """All rows of this view of a matrix to out [n, K], contiguous, of any floating dtype."""
        if self._has_kernel() and out.dtype in (torch.float32, torch.bfloat16):
            place = self.first, self.rows, self.parts
            kernel = torch.ops.gemma4_fast_cpu.dequantize_rows
            kernel(self.data, self.scale, out, *place, native.isa())
        else:
            out.copy_(self.dequantize(out.dtype))

    def rows_by_formula(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of this view of a matrix by their ids [n] -> [n, K], in plain PyTorch.

        The kernels are judged by this.
        """
        panel, lane = self._place(rows)
        q = self.data[panel, :, lane]  # [n, G * bits, 4]
        if self.bits == 4:
            q = torch.stack((q & 15, q >> 4), dim=2)  # quads 2 j and 2 j + 1
        wide = torch.promote_types(dtype, torch.float32)
        scale = self.scale[panel, :, lane].to(wide)  # [n, G]
        values = q.view(*scale.shape, GROUP).to(wide) - (128 if self.bits == 8 else 8)
        values *= scale[..., None]
        return values.flatten(1)[:, : self.shape[1]].to(dtype)

    def _place(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Panel, and row of the panel, of rows of this view."""
        row, per_part = rows + self.first, self.rows // self.parts
        stored = row // per_part * (-(-per_part // PANEL) * PANEL) + row % per_part
        return stored // PANEL, stored % PANEL

    def copy_(self, source: Tensor) -> QuantizedWeight:
        """Quantizes `source`, of this shape, into this view. ValueError if a value is not finite, or too large for a scale."""
        if not isinstance(source, Tensor) or not source.dtype.is_floating_point:
            got = source.dtype if isinstance(source, Tensor) else type(source).__name__
            raise ValueError(f"a weight is quantized from a tensor of a floating dtype, got {got}")
        if source.shape != self.shape:
            raise ValueError(f"a source of shape {list(source.shape)} does not fit a weight of shape {list(self.shape)}")
        if self.dim() == 3:
            for e in range(len(self)):
                self[e].copy_(source[e])
            return self
        step = max(1, _CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            self._write(start, source[start : start + step])
        return self

    def _write(self, start: int, source: Tensor) -> None:
        """Rows [start, start + n) from source [n, K], by the CPU kernel where there is one: the same bits, 30 times as fast."""
        source = source.to(self.device)
        if self._has_kernel():
            finite = self._write_by_kernel(start, source)
        else:
            finite = self._write_by_torch(start, source)
        if not finite:
            raise ValueError("a value is not finite, or too large for a scale in fp16")

    def _write_by_kernel(self, start: int, source: Tensor) -> bool:
        if source.dtype not in (torch.float32, torch.bfloat16):
            source = source.float()
        if source.stride(1) != 1:
            source = source.contiguous()
        place = self.first + start, self.rows, self.parts
        return bool(torch.ops.gemma4_fast_cpu.quantize_rows(source, self.data, self.scale, *place, native.isa()))

    def _write_by_torch(self, start: int, source: Tensor) -> bool:
        q, scale = quantized(F.pad(source, (0, -self.shape[1] % GROUP)), self.bits)
        if not scale.isfinite().all():
            return False
        panel, lane = self._place(torch.arange(start, start + source.shape[0], device=self.device))
        if self.bits == 4:
            pairs = q.view(q.shape[0], -1, 2, 4)
            self.data[panel, :, lane] = pairs[:, :, 0] | pairs[:, :, 1] << 4
        else:
            self.data[panel, :, lane] = q.view(q.shape[0], -1, 4)
        self.scale[panel, :, lane] = scale
        return True


def quantized(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w [n, K], K a multiple of 32 -> q + offset, uint8 [n, K], and scales, fp16 [n, K / 32], by GGUF's rules."""
    x = w.float().view(w.shape[0], -1, GROUP)
    if bits == 8:
        scale = x.abs().amax(-1, keepdim=True) / 127
    else:
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        scale = largest / -8
    inverse = 1 / scale
    y = x * torch.where(inverse.isfinite(), inverse, 0.0)  # of zeros, or of values near 1e-39: all become zeros
    # Q8_0 rounds halves away from zero, Q4_0 upwards.
    if bits == 8:
        q = torch.trunc(y + torch.copysign(torch.full_like(y, 0.5), y)).clamp_(-127, 127) + 128
    else:
        q = torch.trunc(y + 8.5).clamp_(0, 15)
    return q.nan_to_num_(0).to(torch.uint8).flatten(1), scale[..., 0].half()


def rounded(x: Tensor) -> Tensor:
    """x [..., K] to 8 bits with a scale for each 32 values, and back: fp32 or wider. What the CPU kernels multiply by."""
    wide = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, -x.shape[-1] % GROUP))
    groups = wide.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale == 0, 0.0, (groups / scale).round())
    return (q * scale).flatten(-2)[..., : x.shape[-1]]


WeightLike = Tensor | QuantizedWeight


def linear_in_blocks(x: Tensor, weight: WeightLike) -> Tensor:
    """x [..., K] times a weight [N, K], which is converted to x's dtype block by block -> [..., N].

    A block fits the processor's caches, and all of them take the same memory.
    """
    n, k = weight.shape
    rows = max(1, _BLOCK // k)
    out, buffer = x.new_empty(*x.shape[:-1], n), x.new_empty(0)
    for start in range(0, n, rows):
        block = weight[start : start + rows]
        if isinstance(block, Tensor) and block.dtype == x.dtype:
            wide = block
        else:
            if not buffer.numel():
                buffer = x.new_empty(min(rows, n), k)
            wide = buffer[: len(block)]
            if isinstance(block, QuantizedWeight):
                block._to(wide)
            else:
                wide.copy_(block)
        out[..., start : start + rows] = F.linear(x, wide)
    return out


def widened_linear(x: Tensor, weight: WeightLike) -> Tensor:
    """The product of `linear_in_blocks`, for the self-check.

    For few rows of fp32 x, a CPU kernel multiplies, two to three times as fast. No backend uses it,
    so its mistakes cannot hide another's.
    """
    n, k = weight.shape
    out = _by_widened_linear(x.reshape(-1, k), weight)
    return linear_in_blocks(x, weight) if out is None else out.view(*x.shape[:-1], n)


def _by_widened_linear(x: Tensor, weight: WeightLike) -> Tensor | None:
    """x [T, K] fp32 times a weight [N, K] -> [T, N] by the CPU kernel; None if it does not do that."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or len(x) > _WIDENED_ROWS:
        return None
    if native.kernels_missing() is not None:
        return None
    if isinstance(weight, QuantizedWeight):
        if not weight._contiguous():
            return None
        data, scale = weight.data, weight.scale
        place = weight.first, weight.rows, weight.parts
    else:
        if weight.dtype != torch.bfloat16 or weight.stride(1) != 1:
            return None
        data, scale = weight, None
        place = 0, len(weight), 1
    out = x.new_empty(len(x), len(weight))
    kernel = torch.ops.gemma4_fast_cpu.widened_linear
    kernel(x.contiguous(), data, scale, out, *place, native.isa())
    return out
