"""Weights of 8 and 4 bits: their values, their edges, models that have them, and what they cost in quality."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_same_in_fp64
from family import MEMBERS
from safetensors.torch import load_file, save_file
from test_native import require_native
from torch import Tensor

import gemma4_fast
from gemma4_fast import UnsupportedError, cli, native, ops, quant, use_backend, verify
from gemma4_fast.config import Gemma4Config
from gemma4_fast.errors import CheckpointError
from gemma4_fast.layers import Quantizable
from gemma4_fast.model import Gemma4, weights_size
from gemma4_fast.ops.accuracy import Judge
from gemma4_fast.quant import GROUP, QuantizedWeight, _by_widened_linear, rounded
from gemma4_fast.weights import save_pretrained, tiny_path

BITS = [8, 4]


def by_loops(row: list[float], bits: int) -> list[float]:
    """GGUF's Q8_0 and Q4_0 of one row, value by value, as the formats define them."""
    out: list[float] = []
    for at in range(0, len(row), GROUP):
        group = row[at : at + GROUP]
        if bits == 8:
            d = torch.tensor(max(map(abs, group)), dtype=torch.float32) / 127
        else:
            d = torch.tensor(max(group, key=abs), dtype=torch.float32) / -8
        inverse = 1 / d if d else torch.tensor(0.0)
        scale = d.half().float()
        for x in group:
            y = float(torch.tensor(x) * inverse)
            if bits == 8:
                q = math.copysign(math.floor(abs(y) + 0.5), y)
            else:
                q = min(15, math.floor(y + 8.5)) - 8
            out.append(float(scale * q))
    return out


@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_gguf(bits: int) -> None:
    w = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits))
    w[1, :32] = 0  # a group of zeros
    w[2, 40] = 300  # an outlier
    w[3] *= 1e-6  # scales that fp16 holds with few bits
    found = QuantizedWeight.of(w, bits).dequantize(torch.float32)
    assert found.tolist() == [by_loops(row, bits) for row in w.tolist()]
    assert found[1, :32].count_nonzero() == 0


@pytest.mark.parametrize("bits, kind", [(8, "Q8_0"), (4, "Q4_0")])
def test_values_are_those_of_the_gguf_package(bits: int, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    w[7, 3] = 1000
    blocks = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[kind])
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(QuantizedWeight.of(w, bits).dequantize(torch.float32), theirs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape, parts", [((1, 1), 1), ((31, 33), 1), ((34, 97), 2), ((3, 20, 70), 2), ((2, 16, 32), 1)])
def test_what_is_stored_is_what_comes_out(bits: int, shape: tuple[int, ...], parts: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized = QuantizedWeight.of(w, bits, parts)
    whole = quantized.dequantize(torch.float32)
    flat = w.float().flatten(0, -2)
    assert whole.flatten(0, -2).tolist() == [by_loops(row, bits) for row in flat.tolist()]
    assert quantized.dequantize().dtype == torch.bfloat16 and quantized.numel() == w.numel()
    matrix, rows = (quantized[-1], whole[-1]) if len(shape) == 3 else (quantized, whole)
    for part, want in zip(matrix.split(7), rows.split(7), strict=True):
        assert torch.equal(part.dequantize(torch.float32), want)
    ids = torch.tensor([[shape[-2] - 1, 0]])
    assert torch.equal(F.embedding(ids, matrix), rows[ids].bfloat16())  # type: ignore[arg-type]
    assert torch.equal(matrix[0], rows[0].bfloat16())
    again = copy.deepcopy(quantized)
    matrix.copy_(torch.zeros_like(rows))
    assert matrix.dequantize().count_nonzero() == 0 and torch.equal(again.dequantize(torch.float32), whole)


def by_torch(w: Tensor, bits: int, parts: int, first: int = 0, n: int | None = None) -> QuantizedWeight:
    """w [rows, K] into rows from `first` on of a weight [n, K], without the kernel."""
    weight = QuantizedWeight.empty(bits, (n or len(w), w.shape[1]), w.dtype, parts=parts)
    assert weight[first:]._write_by_torch(0, w)
    return weight


def same_bits(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return torch.equal(a.data, b.data) and torch.equal(a.scale.view(torch.int16), b.scale.view(torch.int16))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_stores_the_bits_that_pytorch_does(dtype: torch.dtype, bits: int, isa: str) -> None:
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    g = torch.Generator().manual_seed(3)
    for (n, k), parts in (((1, 1), 1), ((31, 33), 1), ((34, 97), 2), ((48, 64), 3), ((110, 1055), 2)):
        # scales of fp16's normal and subnormal numbers, below them, and below what 1 / scale can hold
        for size in (1.0, 1e-5, 1e-9, 1e-39, 1e-44):
            w = torch.randn(n, k, generator=g) * size
            w[torch.rand(n, k, generator=g) < 0.1] = -0.0
            w[:, ::7] = size * 3 * torch.randn(w[:, ::7].shape, generator=g).sign()  # ties, of both signs
            w[-1, -1] = 1000 * size  # an outlier
            w[n // 3, : k // 2] = 0.0  # groups of zeros, of either sign
            w[n // 2, : k // 2] = -0.0
            w = w.to(dtype)
            want = by_torch(w, bits, parts)
            with use_backend("cpu", isa=isa):
                assert same_bits(QuantizedWeight.of(w, bits, parts), want)
                assert same_bits(QuantizedWeight.of(w.mT.contiguous().mT, bits, parts), want)  # unit stride down the columns
                wide = torch.full((n, k + 5), math.nan, dtype=dtype)  # what lies beside the rows is not read as theirs
                wide[:, 2:-3] = w
                assert same_bits(QuantizedWeight.of(wide[:, 2:-3], bits, parts), want)
            for first in {0, n // 3, n // 2, n - 1}:  # some rows alone: their neighbours in a panel stay
                rows = w[: max(1, (n - first) // 2)]
                got = QuantizedWeight.empty(bits, (n, k), dtype, parts=parts)
                with use_backend("cpu", isa=isa):
                    got[first : first + len(rows)].copy_(rows)
                assert same_bits(got, by_torch(rows, bits, parts, first, n))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_rounds_scales_as_pytorch_does(bits: int, isa: str) -> None:
    """Every fp16 number, what lies between two, and both their neighbours; what becomes infinite is refused."""
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    half = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    scales = torch.cat((half, (half[1:] + half[:-1]) / 2, torch.tensor([65519.0])))
    scales = torch.cat([scales, *(torch.nextafter(scales, torch.tensor(to)) for to in (0.0, 65519.0))])
    by = 127 if bits == 8 else -8
    w = torch.zeros(len(scales), 32)
    w[:, 5] = scales * by
    with use_backend("cpu", isa=isa):
        assert same_bits(QuantizedWeight.of(w, bits), by_torch(w, bits, 1))
        for dtype in (torch.float32, torch.bfloat16):
            for bad in (math.nan, -math.nan, math.inf, -math.inf, 65536.0 * by, -65536.0 * by):
                for at in (0, 31, 40, 64):
                    v = torch.ones(20, 65, dtype=dtype)
                    v[17, at] = bad
                    with pytest.raises(ValueError, match="not finite, or too large for a scale in fp16"):
                        QuantizedWeight.of(v, bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_takes_experts_and_any_number_of_threads(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    w = torch.randn(3, 70, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = [by_torch(expert, bits, 2) for expert in w]
    monkeypatch.setattr(quant, "quantized", None)  # it is the kernel that does it
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = QuantizedWeight.of(w, bits, 2)
        torch.set_num_threads(before)
        assert all(same_bits(found[e], want[e]) for e in range(3))


def test_the_kernel_refuses_rows_that_there_are_not() -> None:
    require_native()
    assert native.kernels_missing() is None
    weight, op = QuantizedWeight.empty(8, (20, 64)), torch.ops.gemma4_fast_cpu.quantize_rows
    for source, first, n, parts, why in (
        (torch.ones(3, 64), 18, 20, 1, "rows"),
        (torch.ones(3, 64), 0, 60, 1, "another shape"),
        (torch.ones(3, 65), 0, 20, 1, "another shape"),
        (torch.ones(3, 64), 0, 20, 3, "rows"),
        (torch.ones(3, 128)[:, ::2], 0, 20, 1, "contiguous"),
        (torch.ones(3, 1, 64), 0, 20, 1, "matrix"),
    ):
        with pytest.raises(RuntimeError, match=why):
            op(source, weight.data, weight.scale, first, n, parts, 0)


def test_a_view_takes_new_values_alone() -> None:
    quantized = QuantizedWeight.of(torch.ones(40, 64), 4)
    quantized[5:9].copy_(torch.full((4, 64), 2.0))
    assert quantized.dequantize()[:, 0].tolist() == [1.0] * 5 + [2.0] * 4 + [1.0] * 31


def test_wrong_sources_and_shapes() -> None:
    for bad in (math.nan, math.inf, 1e8):
        w = torch.ones(2, 32)
        w[1, 4] = bad
        with pytest.raises(ValueError, match="too large for a scale"):
            QuantizedWeight.of(w, 8)
    with pytest.raises(ValueError, match=r"shape \[2, 31\] does not fit a weight of shape \[2, 32\]"):
        QuantizedWeight.empty(8, (2, 32)).copy_(torch.ones(2, 31))
    for bits, shape, parts in ((3, (2, 2), 1), (8, (2,), 1), (8, (0, 2), 1), (8, (3, 2), 2)):
        with pytest.raises(ValueError, match=r"8 or 4 bits|cannot be quantized"):
            QuantizedWeight.empty(bits, shape, parts=parts)
    with pytest.raises(ValueError, match="one after the other"):
        QuantizedWeight.empty(8, (4, 2))[::2]


def test_the_yardstick_rounds_activations_in_groups() -> None:
    x = torch.zeros(2, 40)
    x[0, 0], x[0, 1], x[0, 35], x[1, 3] = 127.0, 0.4, 1e-3, -5.0
    assert rounded(x)[0, 0] == 127 and rounded(x)[0, 1] == 0 and rounded(x)[0, 35] == x[0, 35]
    assert torch.allclose(rounded(x)[1], x[1])


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_no_sum_saturates(isa: str, bits: int) -> None:
    """The largest products that 16-bit sums of pairs can meet, of both signs."""
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    for sign in (1, -1):
        w = torch.full((17, 64), -127.0 if bits == 8 else -8.0)  # scales of 1: all sums are whole numbers
        w[::2, ::2] *= sign
        x = torch.full((3, 64), 127.0 * sign)
        x[1, 1::2] *= -1
        quantized = QuantizedWeight.of(w, bits)
        with use_backend("cpu", isa=isa):
            assert torch.equal(ops.linear(x, quantized), F.linear(x, quantized.dequantize()))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_edges_of_tiles_batches_and_faults(isa: str, bits: int) -> None:
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    m = ops.table.Maker(torch.bfloat16)
    for tokens, n, k in ((1, 1, 1), (9, 15, 31), (65, 17, 33), (17, 1000, 64), (130, 33, 65)):
        args = dict(x=m.randn(tokens, k), weight=m.quantized(bits, n, k, scale=k**-0.5))
        with use_backend("cpu", isa=isa):
            assert (verdict := Judge(ops.TABLE["linear"], args)(ops.linear)).ok, verdict.message
            whole = ops.linear(**args)
            for i in {0, tokens // 2, tokens - 1}:  # the same bits alone
                assert torch.equal(ops.linear(args["x"][i : i + 1], args["weight"]), whole[i : i + 1])
    x, w = m.randn(3, 64), m.quantized(bits, 20, 64)
    x[1, 40], x[2, 3] = math.nan, math.inf
    with use_backend("cpu", isa=isa):
        out = ops.linear(x, w)
        assert out[0].isfinite().all() and not out[1:].isfinite().any()
        assert ops.linear(x[:0], w).shape == (0, 20)
        assert ops.logits(x[:0], w).shape == (0, 20) and ops.logits(x[:0], w, None, True).shape == (0,)
        mlp = m.quantized(bits, 2 * 17, 64, parts=2), m.quantized(bits, 64, 17)
        assert ops.geglu_mlp(x[:0], *mlp).shape == (0, 64)
        experts = m.quantized(bits, 3, 2 * 17, 64, parts=2), m.quantized(bits, 3, 64, 17)
        assert ops.moe(x[:0], torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int32), *experts).shape == (0, 64)
        h = ops.geglu_mlp(x, *mlp)
        assert h[0].isfinite().all() and not h[1:].isfinite().any()


def test_what_the_kernels_do_not_take_pytorch_serves() -> None:
    require_native()
    m = ops.table.Maker(torch.float32)
    x, w = m.randn(2, 64), m.quantized(8, 32, 64)
    mixed: dict[str, Any] = dict(x=x, gate_up=m.quantized(8, 34, 64, parts=2), down=m.quantized(4, 64, 17))
    for op, args, why in (
        ("linear", dict(x=x, weight=w[4:]), "no views of some rows"),
        ("linear", dict(x=x, weight=m.quantized(8, 32, 64, parts=2)), "in 1 parts, got 2"),
        ("geglu_mlp", mixed, "same number of bits"),
        ("geglu_mlp", {**mixed, "down": m.randn(64, 17)}, "same number of bits"),
        ("geglu_mlp", {**mixed, "gate_up": m.quantized(4, 34, 64)}, "in 2 parts, got 1"),
    ):
        with use_backend("cpu"), pytest.raises(UnsupportedError, match=why):
            getattr(ops, op)(**args)
        getattr(ops, op)(**args)
    with pytest.raises(ValueError, match=r"weight has shape \[32, 64\], expected \['any', 63\]"):
        ops.linear(x[:, :63], w)
    with pytest.raises(ValueError, match=r"weight is for torch.float32, expected torch.bfloat16"):
        ops.linear(x.bfloat16(), w)


# ---- models ----
def perplexity(model: Gemma4, ids: list[int]) -> float:
    with torch.inference_mode():
        logp = model(torch.tensor([ids]))[0, :-1].float().log_softmax(-1)
    return math.exp(-logp.gather(-1, torch.tensor(ids[1:])[:, None]).mean().item())


def rounded_like_gguf(bits: int) -> Gemma4:
    """The tiny model over weights that went through Q8_0 or Q4_0 and back, in fp32 and plain PyTorch alone."""
    model = Gemma4.from_pretrained("tiny", "float32", backend="torch", check=False, progress=False)
    kept = ("norm", "router", "scalar", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
    for name, t in model.state_dict().items():
        if t.dim() > 1 and not any(k in name for k in kept):
            own = 8 if "embed_tokens" in name or "lm_head" in name else bits
            x = F.pad(t, (0, -t.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
            largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
            d = largest.abs() / 127 if own == 8 else largest / -8
            y = x * torch.where(d == 0, 0.0, 1 / d)
            q = torch.where(y < 0, -(0.5 - y).floor(), (y + 0.5).floor()) if own == 8 else (y + 8.5).floor().clamp(0, 15) - 8
            t.copy_((q * d.half().float()).flatten(-2)[..., : t.shape[-1]])
    return model


@pytest.mark.parametrize("quantize, bits", [("int8", 8), ("int4", 4)])
def test_quality_is_that_of_gguf_rounding(quantize: str, bits: int) -> None:
    require_native()
    text = (tiny_path() / "heldout.txt").read_text(encoding="utf-8")
    model = Gemma4.from_pretrained("tiny", quantize=quantize, check=False, progress=False)
    ids = model.tokenizer.encode(text)[:1000]
    ours, theirs = perplexity(model, ids), perplexity(rounded_like_gguf(bits), ids)
    plain = perplexity(Gemma4.from_pretrained("tiny", check=False, progress=False), ids)
    print(f"perplexity over {len(ids)} tokens: bf16 {plain:.3f}, {quantize} {ours:.3f}, GGUF rounding in fp32 {theirs:.3f}")
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours < plain * (1.02 if bits == 8 else 1.3)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_memory_given_anew_has_no_rows_of_rubbish(quantize: str) -> None:
    """Rows that fill up a panel are never written to: whoever gives a weight its memory clears them."""
    config = Gemma4Config.from_dict({"model_type": "gemma4_text", **MEMBERS["12b"]})
    model = Gemma4.dummy(config, device="cpu", quantize=quantize)
    weights = [w for m in model.modules() if isinstance(m, Quantizable) for w in m.quantized().values()]
    for w in weights:
        w.data.fill_(255), w.scale.fill_(math.nan)
    model.to_empty(device="cpu")
    for m in model.modules():
        for w in m.quantized().values() if isinstance(m, Quantizable) else ():
            assert not w.scale.isnan().any() and w not in weights


def test_a_weight_that_no_scale_serves_is_named_before_any_is_quantized() -> None:
    model = Gemma4.from_pretrained("tiny", check=False, progress=False)
    for bad in (math.nan, math.inf, 1e30):
        model.model.layer(3).mlp.down_proj.weight.data[0, 0] = bad
        with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj\.weight: a value is not finite, or too large"):
            model.quantize("int4")
        assert model.quantization is None
        assert not any(m.quantized() for m in model.modules() if isinstance(m, Quantizable))


def test_a_model_that_computes_in_fp64_is_checked() -> None:
    for quantize in ("int8", "int4"):
        Gemma4.from_pretrained("tiny", "float64", quantize=quantize, check="full", progress=False)  # raises if it is wrong


def test_what_is_no_weight_is_refused() -> None:
    w = QuantizedWeight.of(torch.ones(20, 32), 8)
    for source in (w, torch.ones(20, 32, dtype=torch.int32), torch.ones(20, 32, dtype=torch.complex64), [1.0]):
        with pytest.raises(ValueError, match="a tensor of a floating dtype"):
            w.copy_(source)  # type: ignore[arg-type]
    for at in (torch.ones(20, dtype=torch.bool), (1, 2), None, torch.ones(2)):
        with pytest.raises(ValueError, match="are taken by a"):
            w[at]  # type: ignore[index]
    with pytest.raises(ValueError, match="in 0 parts cannot"):
        QuantizedWeight.empty(8, (2, 32), parts=0)
    with pytest.raises(ValueError, match="quantize must be"):
        Gemma4.from_pretrained("tiny", quantize=["int8"])  # type: ignore[arg-type]


def test_a_model_cast_by_type_keeps_its_quantized_bytes() -> None:
    model = Gemma4.from_pretrained("tiny", quantize="int8", check=False, progress=False)
    ids = torch.tensor([[5, 6, 7]])
    wanted = copy.deepcopy(model).float()(ids)
    assert torch.equal(model.type(torch.float32)(ids), wanted)  # type: ignore[arg-type]


def test_another_default_device_does_not_matter() -> None:
    require_native()
    m = ops.table.Maker(torch.float32)
    x, w = m.randn(3, 64), m.quantized(8, 20, 64)
    wanted = ops.linear(x, w)
    with torch.device("meta"):
        assert torch.equal(ops.linear(x, w), wanted)


def test_ids_of_rows_that_there_are_not() -> None:
    w = QuantizedWeight.of(torch.ones(20, 32), 8)
    for ids in ([-1], [0, 20]):
        with pytest.raises(IndexError, match=r"ids must lie in \[0, 20\)"):
            F.embedding(torch.tensor(ids), w)
    with pytest.raises(ValueError, match="experts by a number or a slice"):
        QuantizedWeight.of(torch.ones(2, 20, 32), 8)[torch.tensor([0])]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_model_is_checked_and_the_same_however_it_came_about(quantize: str) -> None:
    require_native()
    model = Gemma4.from_pretrained("tiny", quantize=quantize, check="full", progress=False)  # raises if it is wrong
    later = Gemma4.from_pretrained("tiny", check=False, progress=False).quantize(quantize)
    ids = torch.tensor([[5, 6, 7, 8] * 5])
    assert torch.equal(model(ids), later(ids)) and torch.equal(copy.deepcopy(model)(ids), model(ids))
    size = sum(t.nbytes for t in model.state_dict().values())
    assert size == weights_size(model.config, torch.bfloat16, quantize) < 0.6 * weights_size(model.config, torch.bfloat16)
    assert model.quantization == quantize and model.dtype == torch.bfloat16
    assert model.generate([5, 6, 7], max_new_tokens=4).token_ids
    wide = model.to(torch.float32)
    assert verify(wide).ok and wide(ids).dtype == torch.float32


def test_the_self_check_sees_a_wrong_quantized_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    model = Gemma4.from_pretrained("tiny", quantize="int8", check=False, progress=False)
    right = ops.TABLE["geglu_mlp"].impls["cpu"].function
    monkeypatch.setitem(ops.TABLE["geglu_mlp"].impls["cpu"].__dict__, "function", lambda *a: right(*a).roll(1, -1))
    assert not verify(model).ok
    monkeypatch.undo()
    layer = model.model.layer(2).mlp.down_proj
    layer.weight.scale[0, 0, 0] = math.nan
    assert verify(model).not_finite == ["model.layers.2.mlp.down_proj.weight"]


def test_dummy_weights_are_the_quantized_draws() -> None:
    config = gemma4_fast.Gemma4Config.from_pretrained(tiny_path())
    dense, small = (Gemma4.dummy(config, device="cpu", quantize=q) for q in (None, "int8"))
    got, want = small.state_dict(), dense.state_dict()
    for name, t in got.items():
        if isinstance(t, QuantizedWeight):
            error = (t.dequantize(torch.float32) - want[name].float()).abs().max().item()
            assert error <= want[name].abs().max().item() / 127
        else:
            assert torch.equal(t, want[name])


def test_words_and_states_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantize must be 'int8', 'int4' or None, got 'q4'"):
        Gemma4.from_pretrained("tiny", quantize="q4")
    model = Gemma4.from_pretrained("tiny", quantize="int4", check=False, progress=False)
    with pytest.raises(ValueError, match="already quantized to int4"):
        model.quantize("int8")
    with pytest.raises(UnsupportedError, match="quantized to int4 cannot be saved"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(model.state_dict())


def test_a_weight_too_large_for_its_scale_is_named(tmp_path: Path) -> None:
    model = Gemma4.from_pretrained("tiny", check=False, progress=False)
    save_pretrained(model, tmp_path)
    tensors: dict[str, Tensor] = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = 1e30
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(name) + ".*too large"):
        Gemma4.from_pretrained(tmp_path, quantize="int8", check=False, progress=False)


def test_the_command_line_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "It is a truth", "--max-new-tokens", "4", "--quantize", "int4", "--json"]) == 0
    assert cli.main(["check", "--level", "quick", "--quantize", "int8"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "--model", "26b-a4b", "--quantize", "int4"]) == 0
    assert "memory in int4" in capsys.readouterr().out


# ---- the way back ----
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_kernel_dequantizes_to_the_bits_that_pytorch_does(dtype: torch.dtype, bits: int, isa: str) -> None:
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    shapes = (((1, 1), 1), ((31, 33), 1), ((34, 97), 2), ((48, 64), 3), ((110, 1055), 2))
    for (n, k), parts in shapes:
        for size in (1.0, 1e-5, 1e-9):  # scales of fp16's normal and subnormal numbers, and 0
            w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * size
            whole = QuantizedWeight.of(w, bits, parts)
            for first, end in {(0, n), (n // 3, n), (0, (n + 1) // 2), (n // 2, n // 2 + 1)}:
                view = whole[first:end]
                want = view.rows_by_formula(torch.arange(end - first), dtype)
                with use_backend("cpu", isa=isa):
                    assert torch.equal(view.dequantize(dtype), want)
                    out = torch.full((end - first, k), math.nan, dtype=dtype)
                    view._to(out)
                assert torch.equal(out, want)


def test_the_kernel_dequantizes_rows_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    weight = QuantizedWeight.of(torch.ones(20, 64), 8)
    op = torch.ops.gemma4_fast_cpu.dequantize_rows
    for out, first, n, parts, why in (
        (torch.ones(3, 64), 18, 20, 1, "rows"),
        (torch.ones(3, 64), 0, 60, 1, "another shape"),
        (torch.ones(3, 65), 0, 20, 1, "another shape"),
        (torch.ones(3, 64), 0, 20, 3, "rows"),
        (torch.ones(3, 128)[:, ::2], 0, 20, 1, "contiguous"),
        (torch.ones(3, 1, 64), 0, 20, 1, "matrix"),
    ):
        with pytest.raises(RuntimeError, match=why):
            op(weight.data, weight.scale, out, first, n, parts, 0)
    experts = QuantizedWeight.of(torch.randn(3, 20, 64), 4)
    want = torch.stack([experts[e].rows_by_formula(torch.arange(20), torch.float32) for e in range(3)])
    monkeypatch.setattr(QuantizedWeight, "rows_by_formula", None)  # it is the kernel that does it
    assert torch.equal(experts.dequantize(torch.float32), want)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", [0, *BITS])
def test_the_kernel_multiplies_by_widened_rows(bits: int, isa: str) -> None:
    """Around its own sizes: 16 rows of the weight, 256 columns of it, four rows of x."""
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    generator = torch.Generator().manual_seed(0)
    for t, n, k in ((1, 1, 1), (1, 7, 33), (3, 40, 256), (6, 15, 257), (35, 50, 1500), (64, 34, 545)):
        x = torch.randn(t, k, generator=generator)
        dense = torch.randn(n, k, generator=generator).bfloat16()
        whole: Any = QuantizedWeight.of(dense, bits, 2 - n % 2) if bits else dense
        for weight in (whole, whole[n // 3 :], whole[n // 2 : n // 2 + 1]):
            wide = weight.to(torch.float64)
            with use_backend("cpu", isa=isa):
                got = _by_widened_linear(x, weight)
            assert got is not None
            sizes = F.linear(x.abs().double(), wide.abs())
            roundings = k / 4 + 20  # eight lanes, two roundings for each term; then the lanes' sum
            off = (got - F.linear(x.double(), wide)).abs()
            assert (off <= roundings * 2**-24 * sizes).all()


def test_a_product_that_the_kernel_does_not_do() -> None:
    x, weight = torch.ones(2, 64), torch.ones(3, 64, dtype=torch.bfloat16)
    for wrong_x, wrong_weight in (
        (x.double(), weight),
        (torch.ones(65, 64), weight),
        (x, weight.half()),
        (x, weight.repeat(1, 2)[:, ::2]),
    ):
        assert _by_widened_linear(wrong_x, wrong_weight) is None
    require_native()
    op = torch.ops.gemma4_fast_cpu.widened_linear
    q = QuantizedWeight.of(torch.ones(3, 64), 8)
    out = torch.empty(2, 3)
    for wrong, why in (
        ((x.double(), weight, None, out, 0, 3, 1), "float32"),
        ((x, weight[:2], None, out, 0, 3, 1), "bf16"),
        ((x, weight.float(), None, out, 0, 3, 1), "bf16"),
        ((torch.ones(65, 64), weight, None, torch.empty(65, 3), 0, 3, 1), "at most 64 rows"),
        ((x, q.data, q.scale, out, 1, 3, 1), "rows"),
        ((torch.ones(2, 65), q.data, q.scale, out, 0, 3, 1), "another shape"),
    ):
        with pytest.raises(RuntimeError, match=why):
            op(*wrong, 0)


@pytest.mark.parametrize("bits", BITS)
def test_no_rows_by_formula_are_an_empty_matrix(bits: int) -> None:
    weight = QuantizedWeight.of(torch.randn(20, 64), bits)
    none = torch.empty(0, dtype=torch.int64)
    assert weight.rows_by_formula(none, torch.float32).shape == (0, 64)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_finds_what_is_not_finite(dtype: torch.dtype, isa: str) -> None:
    require_native()
    if isa not in native.isas():
        pytest.skip(f"this processor has no {isa}")
    assert native.kernels_missing() is None
    op, number = torch.ops.gemma4_fast_cpu.all_finite, list(native.ISAS).index(isa)
    largest = torch.finfo(dtype).max
    for size in (1, 5, 4097, (1 << 18) + 3):
        x = torch.randn(size).to(dtype)
        x[size // 2] = -largest
        assert op(x, number)
        for bad in (math.nan, math.inf, -math.inf):
            for at in {0, size // 2, size - 1}:
                y = x.clone()
                y[at] = bad
                assert not op(y, number)


@pytest.mark.parametrize("bits", [0, *BITS])
def test_a_product_in_blocks_is_the_product(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    w: Any = QuantizedWeight.of(dense, bits, 2) if bits else dense
    x = torch.randn(3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = F.linear(x, w.to(torch.float64))
    most = []
    right = F.linear

    def noted(x: Tensor, w: Tensor) -> Tensor:
        most.append(w.numel())
        return right(x, w)

    monkeypatch.setattr(quant, "_BLOCK", 1000)
    monkeypatch.setattr(quant.F, "linear", noted)
    found = quant.linear_in_blocks(x, w)
    assert_same_in_fp64(found, whole)
    assert max(most) <= 1000 and sum(most) == dense.numel()


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_taken_as_they_are_stored(bits: int) -> None:
    w = QuantizedWeight.of(torch.randn(70, 96), bits, 2)
    ids = torch.tensor([69, 0, 34, 35, 3])
    taken = w.index_select(0, ids)
    whole = w.dequantize(torch.float32)
    assert torch.equal(taken.dequantize(torch.float32), whole[ids]) and taken.is_contiguous()
    view = w[10:].index_select(0, torch.tensor([0, 59]))
    assert torch.equal(view.dequantize(torch.float32), whole[[10, 69]])
    with pytest.raises(ValueError, match="along axis 0"):
        w.index_select(1, ids)
