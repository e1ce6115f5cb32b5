"""The self-check: does the fast path give the reference's answer, with these weights, on this machine?

Each layer of the fast path and of the reference gets the same input, so an error shows in the layer
that makes it and cannot grow. The truth is the reference in a wider dtype. Its matrices are widened
block by block; on a CPU a kernel does that, and some rows of each matrix are compared with plain
PyTorch. The yardstick is what plain PyTorch loses: the reference in the model's own dtype. A
comparison passes if its error is at most SLACK x the yardstick + FLOOR. If a block fails, the check
replaces one op after the other by the reference and names the op whose replacement mends the block.

Level "full" runs a prompt that is longer than the window's ring, a second chunk, decode steps, and
a ragged batch with an idle row. Where generation replays a recorded decode step, that step is
compared with the same one run op by op.

Level "quick" costs little more than reading the weights a few times:
- The cache starts with random keys and values that end shortly before the ring does. Some 20 tokens
  then suffice to cross its end. The ragged batch starts with an empty cache.
- The feed-forward block runs on few distinct tokens, so few experts are hit. They are repeated
  where many rows are needed. Some experts that no token chose run as well.
- The head's truth covers the whole vocabulary for one token. For the others it covers a sample of
  the vocabulary and the tokens that the fast path finds likeliest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_fast import native, ops
from gemma4_fast.cache import TILE, KVCache
from gemma4_fast.config import Gemma4Config, LayerConfig
from gemma4_fast.edges import relative_error, window_edges
from gemma4_fast.graph import DecodeGraph, recordable
from gemma4_fast.layers import model_ops
from gemma4_fast.ops.moe import moe_crossover
from gemma4_fast.quant import PANEL, QuantizedWeight, WeightLike, rounded, widened_linear
from gemma4_fast.reference import model as reference
from gemma4_fast.reference import ops as reference_ops
from gemma4_fast.report import FLOOR, Comparison, EndToEnd, Report
from gemma4_fast.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from gemma4_fast.layers import Step
    from gemma4_fast.model import Gemma4

ROWS = (1, 2, 5, 16)  # rows that the feed-forward block runs with: each may take another kernel
MANY = 65  # and one that they take their path for many rows with
LOGIT_TOKENS = 64  # newest tokens that are compared end to end
DRAWN = Sampling(temperature=1.0, top_k=64, top_p=0.95)  # as Gemma 4's checkpoints recommend
# If the router's logits of the last expert taken and of the next differ by less, either is right.
CLOSE_CALL = 1e-4
HALF_CLOSE = 1 / 32  # of the largest logit: for another implementation's router in half precision
UNCHOSEN = 16  # experts that no token chose, which are run as well
SAMPLED_FROM = 16384  # rows of a head above which level "quick" judges a sample of them
RUN, RUNS = 64, 48  # the sample: so many runs of so many rows, spread over the head
CANDIDATES = 64  # and of each token the ids that the fast path finds likeliest


@dataclass(frozen=True)
class _Extent:
    """How much a level runs."""

    decode: int  # decode steps
    batch: tuple[int, int]  # tokens of the sequences of the ragged batch; a third one stays idle
    logits: int  # newest tokens that the head is compared on
    first: int  # tokens of a piece that the feed-forward block is compared on: its first ones,
    newest: int  # and its newest ones
    every_piece: bool  # whether each piece runs the feed-forward block, or the last one alone


CHUNK = 17  # tokens of the second chunk
EXTENTS = {
    "quick": _Extent(2, (10, 6), logits=8, first=0, newest=16, every_piece=False),
    "full": _Extent(4, (42, 29), logits=64, first=8, newest=56, every_piece=True),
}
DISTINCT = 6  # tokens in all that level "quick" runs the feed-forward block on


def verify(
    model: Any,
    *,
    level: str = "quick",
    input_ids: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare `model` with the reference; nothing is raised for a wrong answer, see Report.raise_if_wrong.

    model: a Gemma4, or a model of transformers that `accelerate` has been given: that is also held to transformers' own code,
    layer by layer and, at level "full", end to end.
    level "quick": the first layer of each kind, and the head. "full": every layer, and the whole model end to end.
    input_ids: the tokens to run, all of them in one sequence; default random ones (seeded), enough to wrap the sliding
    window's cache. progress(done, total) counts steps of similar length.
    Extra memory at level "quick": below 300 MB at all published shapes.
    """
    from gemma4_fast.model import Gemma4

    if level not in EXTENTS:
        raise ValueError(f"level must be 'quick' or 'full', got {level!r}")
    if isinstance(model, Gemma4):
        return _verify(model, level, _tokens(model, input_ids, seed, level), progress)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"expected a Gemma4 or an accelerated model of transformers, got {type(model).__name__}")
    from gemma4_fast.integrations.beside import compare, native_of

    native = native_of(model)
    tokens = _tokens(native, input_ids, seed, level)
    report = _verify(native, level, tokens, progress)
    if not report.not_finite:
        compare(model, report, tokens.ids)
    return report


@torch.inference_mode()
def _verify(model: Gemma4, level: str, tokens: _Tokens, progress: Callable[[int, int], None] | None) -> Report:
    with model.running():
        report = Report(level, str(model.device), str(model.dtype).removeprefix("torch."), _backends(model))
        tensors = model.state_dict()
        check = _Check(model, tensors, tokens, report, progress)
        if progress is not None:  # to read all weights takes a while
            progress(0, check.total)
        report.not_finite = [n for n, t in tensors.items() if not _all_finite(t)]
        check.step()
        if not report.not_finite:
            check.run()
    return report


class _Tokens(NamedTuple):
    """ids [T] int64, and the number of random keys and values that stand before them."""

    ids: Tensor
    history: int = 0


def _tokens(model: Gemma4, given: Sequence[int] | Tensor | None, seed: int, level: str) -> _Tokens:
    c, history = model.config, 0
    if given is None:
        window = max((layer.window or 0 for layer in c.layers()), default=0)
        ring, extent = -(-window // TILE) * TILE, EXTENTS[level]
        if level == "full":
            count = ring + 13 + CHUNK + extent.decode
        else:  # the chunk crosses the ring's end
            count = CHUNK + extent.decode
            history = max(0, min(ring - CHUNK // 2, c.max_position_embeddings - count))
        count = min(count, c.max_position_embeddings)
        if count < 3:
            raise ValueError(f"the self-check needs 3 positions, the model has {count}")
        picked = torch.randint(c.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    else:
        picked = torch.as_tensor(given)
        if picked.dim() != 1 or picked.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be one sequence of integers, got {list(picked.shape)} {picked.dtype}")
        if not 3 <= picked.numel() <= c.max_position_embeddings:
            raise ValueError(f"input_ids must hold 3 to {c.max_position_embeddings} tokens, got {picked.numel()}")
        if int(picked.min()) < 0 or int(picked.max()) >= c.vocab_size:
            raise ValueError(f"token ids must lie in [0, {c.vocab_size})")
    return _Tokens(picked.long().to(model.device), history)


def _all_finite(x: WeightLike) -> bool:
    """Whether a weight holds neither NaN nor infinity.

    The CPU kernel tells at memory speed. Elsewhere sums do: a finite sum has finite terms. If a sum
    is not finite, it may have overflowed, and each term is tested. The sums are of blocks, because
    PyTorch would widen a whole tensor.
    """
    if isinstance(x, QuantizedWeight):
        return _all_finite(x.scale)
    by_kernel = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if by_kernel and x.device.type == "cpu" and x.is_contiguous() and not native.kernels_missing():
        return bool(torch.ops.gemma4_fast_cpu.all_finite(x, native.isa()))
    blocks = x.reshape(-1).split(1 << 24)
    sums = torch.stack([b.sum(dtype=torch.float32) for b in blocks])
    return bool(sums.isfinite().all()) or all(bool(b.isfinite().all()) for b in blocks)


def _misread(view: WeightLike, wide: torch.dtype) -> float:
    """The relative error of some rows of a matrix [n, K], as the truth's products read them.

    They are the first and the last rows, and those where a part begins: each time so many that they
    span two panels. Quantized rows are also dequantized, in fp32 and in the matrix's dtype, since
    the kernel has separate code for each.
    """
    n, worst = len(view), 0.0
    borders: list[int] = []
    if isinstance(view, QuantizedWeight):
        per_part = view.rows // view.parts
        borders = [part * per_part - 1 - view.first for part in range(1, view.parts)]
    x = torch.randn(7, view.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(view.device, wide)
    for start in (0, *(at for at in borders if 0 <= at < n), max(0, n - PANEL - 1)):
        ids = torch.arange(start, min(start + PANEL + 1, n), device=view.device)
        rows: WeightLike = view[start : start + len(ids)]
        plain = rows.to(wide)
        if isinstance(rows, QuantizedWeight) and isinstance(view, QuantizedWeight):
            plain = view.rows_by_formula(ids, wide)
            for dtype in {torch.float32, view.dtype}:
                got = rows.dequantize(dtype)
                want = view.rows_by_formula(ids, dtype)
                if not torch.equal(got, want):  # equal infinities are right, and fp16 has no room for norms
                    worst = max(worst, relative_error(got.float(), want.float()))
        for count in (5, 6, 7):  # the kernel takes four rows of x, and one, two or three that are left
            off = (widened_linear(x[:count], rows) - F.linear(x[:count], plain)).abs()
            # A sum may cancel, but the sizes of its terms do not.
            off /= F.linear(x[:count].abs(), plain.abs()).clamp(min=1e-30)
            worst = max(worst, off.max().item() if off.isfinite().all() else math.inf)
    return worst


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _backends(model: Gemma4) -> dict[str, str]:
    return {name: ops.decide(name, model.device, model.dtype)[0] for name in model_ops(model.config)}


@dataclass(frozen=True)
class Layered:
    """What another implementation's layer was given, and gave: the residual stream [T, H], and its PLE inputs [T, P]."""

    x: Tensor
    ple: Tensor | None
    out: Tensor


def kinds_of(config: Gemma4Config) -> list[LayerConfig]:
    """The first layer of each kind, and the donors that these need, in order."""
    first: dict[object, LayerConfig] = {}
    for layer in config.layers():
        first.setdefault(layer.kind, layer)
    wanted = {c.index for c in first.values()}
    wanted |= {c.kv_donor for c in first.values() if c.kv_donor is not None}
    return [config.layer(i) for i in sorted(wanted)]


@torch.inference_mode()
def compare_layers(model: Gemma4, ids: Tensor, layers: Mapping[int, Layered], whose: str, report: Report) -> None:
    """Compare our layers with another implementation's, on the inputs that its layers were given.

    ids [T]: the prompt. layers: what each layer was given and gave, by index, with the donors of
    layers that share KV. whose: the other implementation's name. Its error against the wider
    reference decides how large ours may be. Tokens whose routing is too close to call are left out;
    a layer where that is so for all of them gets no row.
    """
    with model.running():
        check = _Check(model, model.state_dict(), _Tokens(ids), report)
        step, kv = model.model.step([len(ids)], None), cast(reference.KV, {})
        for i, other in layers.items():
            layer, x = check.config.layer(i), other.x
            got, _ = model.model.run_layer(i, x, None, step, None, other.ple)
            w, wide = check._weights(True).layer(i), check.wide
            between = reference.attention_block(w, check.config, layer, x.to(wide), kv)
            half = model.dtype in (torch.bfloat16, torch.float16)
            keep = check._clear_calls(layer, between, half=half)
            if not keep.any():
                continue
            ple = None if other.ple is None else other.ple[keep].to(wide)
            truth = reference.feed_forward_block(w, check.config, layer, between[keep], ple)
            ours, theirs = (relative_error(y[keep], truth) for y in (got, other.out))
            row = Comparison(f"beside {whose}", "prefill", ours, theirs, layer=i, kind=layer.label)
            report.comparisons.append(row)


class _Plan:
    """Sequences and how they are cut: a prefill, a second chunk, decode steps. Idle sequences have no tokens.

    history: so many random keys and values stand before the tokens. There is no prefill then.
    """

    def __init__(self, name: str, sequences: list[Tensor], steps: int, *, idle: int = 0, history: int = 0) -> None:
        self.name, self.sequences, self.idle, self.history = name, sequences, idle, history
        shortest = min(s.shape[0] for s in sequences)
        decode = min(steps, shortest // 3)
        chunk = shortest - decode if history else min(CHUNK, shortest // 3)
        none = [0] * idle
        self.pieces: list[tuple[str, list[int]]] = [("chunk", [chunk] * len(sequences) + none)]
        if not history:
            first = [s.shape[0] - chunk - decode for s in sequences]
            self.pieces.insert(0, ("prefill", first + none))
        self.pieces += [("decode", [1] * len(sequences) + none)] * decode
        self.counts = {"prefill": 0, "chunk": chunk, "decode": decode}  # of each sequence; prefill: what is left

    @property
    def room(self) -> int:
        """Positions of the longest sequence."""
        return self.history + max(s.shape[0] for s in self.sequences)

    def rows(self, piece: int) -> list[slice]:
        """Which rows of a piece's flat tokens belong to each sequence."""
        ends = list(itertools.accumulate(self.pieces[piece][1], initial=0))
        return [slice(ends[b], ends[b + 1]) for b in range(len(self.sequences))]

    def ids(self, piece: int) -> Tensor:
        """Flat token ids of a piece; an idle row of a decode step has id 0."""
        at = [sum(new[b] for _, new in self.pieces[:piece]) for b in range(len(self.sequences))]
        new = self.pieces[piece][1]
        parts = [s[a : a + n] for s, a, n in zip(self.sequences, at, new, strict=False)]
        if self.pieces[piece][0] == "decode":
            parts.append(self.sequences[0].new_zeros(self.idle))
        return torch.cat(parts)


@dataclass
class _Run:
    """Residual streams of a fast run of a plan, by layer, then piece: what went in, stood between the blocks, came out."""

    plan: _Plan
    before: dict[int, list[Tensor]] = field(default_factory=dict)
    between: dict[int, list[Tensor]] = field(default_factory=dict)
    after: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by piece, of those that run the feed-forward block
    cut: dict[int, Tensor] = field(default_factory=dict)  # between, of each sequence's newest prefill token alone
    ple: list[Tensor | None] = field(default_factory=list)  # by piece: what all layers get beside the stream
    hidden: list[Tensor] = field(default_factory=list)

    def of(self, pieces: list[Tensor], sequence: int) -> Tensor:
        """One sequence's rows of a stream, in order [T, H]."""
        return torch.cat([x[self.plan.rows(i)[sequence]] for i, x in enumerate(pieces)])


class _Check:
    def __init__(
        self,
        model: Gemma4,
        tensors: Mapping[str, Tensor],
        tokens: _Tokens,
        report: Report,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.tensors, self.report, self.progress = model, tensors, report, progress
        self.config, self.text, self.ids = model.config, model.model, tokens.ids
        half = model.dtype in (torch.bfloat16, torch.float16)
        self.wide = torch.float32 if half else torch.float64
        self.full, self.extent = report.level == "full", EXTENTS[report.level]
        self.kinds = kinds_of(self.config)
        self.layers = list(self.config.layers()) if self.full else self.kinds
        # On a GPU it runs all layers, which takes no time there.
        self.records = self.full or model.device.type == "cuda"
        ids, steps = tokens.ids, self.extent.decode
        longest, shorter = (ids.roll(7 * n)[: max(3, min(n, ids.shape[0]))] for n in self.extent.batch)
        self.plans = [
            _Plan("", [ids], steps, history=tokens.history),
            _Plan("batch ", [longest, shorter], steps, idle=1),
        ]
        self.tried: set[tuple[int, bool]] = set()  # feed-forward blocks that ran with different numbers of rows
        self.past: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: see `_history`
        # The weights, edges, embedding, runs, two blocks a layer, the head, and what only some do.
        self.total = 3 + len(self.kinds) + len(self.plans) + 2 * len(self.layers)
        self.total += self.records + self.full
        self.done = 0

    def step(self) -> None:
        """Counts a step as done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def run(self) -> None:
        self._stored()
        for layer in self.kinds:
            self._window_edges(layer)
            self.step()
        self._embedding()
        self.step()
        runs = []
        for plan in self.plans:
            runs.append(self._fast(plan, [c.index for c in self.layers]))
            self.step()
        stores: tuple[reference.KV, reference.KV] = {}, {}  # what layers share: K and V, wide and plain
        for layer in self.layers:
            self._attention(layer, runs, stores)
            self.step()
            self._feed_forward(layer, runs)
            self.step()
        self._head(runs[0].of(runs[0].hidden, 0))
        self.step()
        if self.records:
            self._recorded_step()
            self.step()
        if self.full:
            self.report.end_to_end = self._end_to_end()
            self.step()

    def _stored(self) -> None:
        """Compare some rows of each matrix, as the truth's products read them, with plain PyTorch.

        A kernel widens the matrices for the truth. The torch backend dequantizes by the same code,
        so comparing its products with the truth's cannot show a fault in it.
        """
        checked = tuple(f"model.layers.{layer.index}." for layer in self.layers)
        for name, weight in self.tensors.items():
            quantized = isinstance(weight, QuantizedWeight)
            if ".layers." in name and not name.startswith(checked):
                continue
            if weight.dim() < 2 or not (quantized or weight.numel() > reference.SMALL):
                continue
            views = [weight[0], weight[len(weight) - 1]] if weight.dim() == 3 else [weight]
            error = max(_misread(view, self.wide) for view in views)
            what = "quantized weight" if quantized else "product in blocks"
            self.report.comparisons.append(Comparison(what, name, error, 0.0))

    def _history(self, layer: LayerConfig) -> tuple[Tensor, Tensor]:
        """Random K, V [n, Hkv, D] of the positions before the first plan's tokens, as cached.

        K has the norms of the layer's own keys. Where K is rebuilt from V, plain PyTorch rebuilds it.
        """
        if layer.index not in self.past:
            n, generator = self.plans[0].history, torch.Generator().manual_seed(layer.index)
            v = torch.randn(n, layer.num_kv_heads, layer.head_dim, generator=generator)
            v = v.to(self.model.device, self.model.dtype)
            source = v if layer.k_eq_v else v.roll(1, 0)
            self.past[layer.index] = self._rebuilt(layer, source), v
        return self.past[layer.index]

    def _rebuilt(self, layer: LayerConfig, v: Tensor) -> Tensor:
        """K = RoPE(w * V) of positions 0, 1, ... from V [n, Hkv, D], in its dtype."""
        w = self.text.owner(layer.index).k_norm.weight.to(v.dtype)
        freq = reference.inv_freq(layer, v.dtype, v.device)
        return reference_ops.cached_sequence(v.shape[0], None, v, None, freq, w)[0]

    def _cache(self, plan: _Plan, indices: Sequence[int]) -> KVCache:
        """A cache for these layers alone, which holds the plan's history."""
        batch, history = len(plan.sequences) + plan.idle, plan.history
        model = self.model
        cache = KVCache(self.config, batch, plan.room, model.dtype, model.device, only=indices)
        if history:
            for i in indices:
                if (layer := self.config.layer(i)).kv_donor is None:
                    kv, (k, v) = cache.layer(i), self._history(layer)
                    at = torch.arange(max(0, history - kv.slots), history, device=v.device)
                    kv.write(k[at], v[at], kv.rows(torch.zeros_like(at), at))
            cache.advance([history] * len(plan.sequences) + [0] * plan.idle)
        return cache

    def _fast(self, plan: _Plan, indices: Sequence[int], inputs: Mapping[int, list[Tensor]] | None = None) -> _Run:
        """Layers `indices` on the fast path. Each gets what the one before gave, or, piece by piece, inputs[index]."""
        run, cache = _Run(plan), self._cache(plan, indices)
        for piece, (phase, new) in enumerate(plan.pieces):
            whole = self.extent.every_piece or piece + 1 == len(plan.pieces)
            step = self.text.step(new, cache, decode=phase == "decode")
            x, ple = self.text.embed(plan.ids(piece))
            run.ple.append(ple)
            h: Tensor | None = None
            for place, i in enumerate(indices):
                if inputs is not None:
                    x, h = inputs[i][piece], None
                elif place and indices[place - 1] != i - 1:
                    h = None  # the norm at hand is the one that a skipped layer would have taken
                run.before.setdefault(i, []).append(x)
                between = run.between.setdefault(i, [])
                if whole:
                    own = None if ple is None else ple[:, i]
                    x, h = self.text.run_layer(i, x, h, step, cache, own, between.append)
                    run.after.setdefault(i, {})[piece] = x
                else:
                    x, h = self.text.run_attention(i, x, h, step, cache)[0], None
                    between.append(x)
            self.text.write_donors(step, cache)
            if phase == "prefill":
                self._cut(run, indices, step, cache)
            cache.advance(new)
            run.hidden.append(ops.rms_norm(x, self.text.norm.weight, self.config.rms_norm_eps))
        return run

    def _cut(self, run: _Run, indices: Sequence[int], step: Step, cache: KVCache) -> None:
        """The layers that share KV, once more on each sequence's newest token alone, as generation runs them."""
        rows = self.text.last_rows(step)
        last = self.text.last_step(step, cache, [n > 0 for n in step.new_lens])
        for i in indices:
            if self.config.layer(i).kv_donor is not None:
                x = run.before[i][0][rows]
                run.cut[i] = self.text.run_attention(i, x, None, last, cache)[0]

    def _weights(self, wide: bool) -> reference.Weights:
        return reference.Weights(self.tensors, dtype=self.wide if wide else None)

    def _compare(self, what: str, plan: _Plan, got: Tensor, truth: Tensor, plain: Tensor, **place: Any) -> list[Comparison]:
        """One sequence, phase by phase. got, truth, plain [T, H]."""
        rows, end = [], got.shape[0]
        for phase in ("decode", "chunk", "prefill"):
            start = end - plan.counts[phase] if phase != "prefill" else 0
            if start < end:
                part = slice(start, end)
                errors = relative_error(got[part], truth[part]), relative_error(plain[part], truth[part])
                rows.append(Comparison(what, plan.name + phase, *errors, **place))
            end = start
        return rows[::-1]

    def _embedding(self) -> None:
        outs = []
        for wide in (True, False):
            w = self._weights(wide)
            base = reference.embed(w, self.config, self.ids)
            outs.append((base, reference.per_layer_inputs(w, self.config, self.ids, base)))

        def judge() -> list[Comparison]:
            rows = []
            names = "embedding", "per-layer inputs"
            for what, got, truth, plain in zip(names, self.text.embed(self.ids), *outs, strict=True):
                if got is not None:
                    t, p = cast(Tensor, truth), cast(Tensor, plain)
                    rows.append(Comparison(what, "", relative_error(got, t), relative_error(p, t)))
            return rows

        self._add(judge(), judge)

    def _attention(self, layer: LayerConfig, runs: list[_Run], stores: tuple[reference.KV, reference.KV]) -> None:
        i = layer.index
        place: dict[str, Any] = dict(layer=i, kind=layer.label)
        sequences = [(run, b) for run in runs for b in range(len(run.plan.sequences))]
        parts = [run.of(run.before[i], b) for run, b in sequences]
        lens, x = [len(part) for part in parts], torch.cat(parts)
        outs = []  # truth and plain, of all sequences at once, so that each matrix is widened once
        for wide, kv in zip((True, False), stores, strict=True):
            if layer.kv_donor is None and any(run.plan.history for run in runs):
                kv[i] = [self._earlier(layer, run.plan.history, wide) for run, _ in sequences]
            w = self._weights(wide)
            into = x.to(self.wide) if wide else x
            out = reference.attention_block(w.layer(i), self.config, layer, into, kv, lens)
            outs.append(out.split(lens))
        wanted = list(zip(*outs, strict=True))

        def judge(again: list[_Run]) -> list[Comparison]:
            rows: list[Comparison] = []
            for run in again:
                own = [w for w, (r, _) in zip(wanted, sequences, strict=True) if r.plan is run.plan]
                for b, (truth, plain) in enumerate(own):
                    got = run.of(run.between[i], b)
                    rows += self._compare("attention", run.plan, got, truth, plain, **place)
                if i in run.cut:
                    at = [run.plan.pieces[0][1][b] - 1 for b in range(len(own))]
                    truth, plain = (torch.stack([w[k][t] for w, t in zip(own, at, strict=True)]) for k in (0, 1))
                    errors = relative_error(run.cut[i][: len(at)], truth), relative_error(plain, truth)
                    phase = f"{run.plan.name}newest token alone"
                    rows.append(Comparison("attention", phase, *errors, **place))
            return rows

        indices = [i] if layer.kv_donor is None else [layer.kv_donor, i]

        def again() -> list[Comparison]:
            inputs = [{n: run.before[n] for n in indices} for run in runs]
            pairs = zip(runs, inputs, strict=True)
            return judge([self._fast(run.plan, indices, given) for run, given in pairs])

        self._add(judge(runs), again)

    def _earlier(self, layer: LayerConfig, history: int, wide: bool) -> tuple[Tensor, Tensor]:
        """K, V of a sequence's history, for the reference."""
        k, v = self._history(layer)
        k, v = k[:history], v[:history]
        if not wide:
            return k, v
        v = v.to(self.wide)
        return self._rebuilt(layer, v) if layer.k_eq_v else k.to(self.wide), v

    def _feed_forward(self, layer: LayerConfig, runs: list[_Run]) -> None:
        """What the runs gave on some of their tokens, and the block alone on different numbers of rows."""
        i, block = layer.index, self.text.layer(layer.index)
        first, newest = self.extent.first, self.extent.newest
        # Input, output, PLE [n, .] and phase. At level "quick" most pieces have no output; of those,
        # only the first gives tokens.
        picked: list[tuple[Tensor, Tensor | None, Tensor | None, str]] = []
        spare = DISTINCT - len(self.plans[0].sequences) - len(self.plans[1].sequences)
        for run in runs:
            for piece, (phase, _) in enumerate(run.plan.pieces):
                y = run.after[i].get(piece)
                if y is None and picked:
                    continue
                rows = torch.arange(sum(run.plan.pieces[piece][1]), device=self.ids.device)
                if y is None:
                    rows = rows[-spare:]
                elif rows.shape[0] > first + newest:
                    rows = torch.cat((rows[:first], rows[-newest:]))
                x, given = run.between[i][piece][rows], run.ple[piece]
                ple = None if given is None else given[rows, i]
                picked.append((x, None if y is None else y[rows], ple, run.plan.name + phase))
        x = torch.cat([p[0] for p in picked])
        ple = None if picked[0][2] is None else torch.cat([cast(Tensor, p[2]) for p in picked])
        truth, plain = (
            reference.feed_forward_block(
                w.layer(i),
                self.config,
                layer,
                x.to(w["norm.weight"].dtype),
                None if ple is None else ple.to(w["norm.weight"].dtype),
            )
            for w in (self._weights(True), self._weights(False))
        )
        keep = self._clear_calls(layer, x)[:, None]
        plain = torch.where(keep, plain.to(truth.dtype), truth)  # tokens whose routing is a toss-up count as right

        ends = list(itertools.accumulate((p[0].shape[0] for p in picked), initial=0))
        every = torch.arange(x.shape[0], device=x.device)
        with_output = [
            (p[3], every[lo:hi], p[1]) for p, lo, hi in zip(picked, ends, ends[1:], strict=False) if p[1] is not None
        ]
        # So many rows, these over and over if need be, that the experts take their path for many tokens if they have one.
        crossover = moe_crossover(x.device, x.dtype) if layer.is_moe else math.inf
        many = MANY if crossover == math.inf else max(MANY, 1 + int(crossover))
        form = layer.intermediate_size, layer.is_moe
        # At level "quick" only the first layer of each form runs them. The others would run the same
        # code at the same shapes.
        counts = () if form in self.tried and not self.full else (*ROWS, many)
        self.tried.add(form)

        def compare(phase: str, got: Tensor, part: Tensor) -> Comparison:
            settled = torch.where(keep[part], got.to(truth.dtype), truth[part])
            errors = relative_error(settled, truth[part]), relative_error(plain[part], truth[part])
            return Comparison("feed-forward", phase, *errors, layer=i, kind=layer.label)

        def block_alone(part: Tensor) -> Tensor:
            # 0 is added to x: its norms, by the op that makes them.
            x_out, h, e = block.end_of_attention(torch.zeros_like(x[part]), x[part])
            own = None if ple is None else ple[part]
            return block.feed_forward_block(x_out, cast(Tensor, h), e, own, None)[0]

        def judge(outputs: list[Tensor]) -> list[Comparison]:
            rows = []
            for phase in dict.fromkeys(p for p, _, _ in with_output):
                of_phase = [n for n, (p, _, _) in enumerate(with_output) if p == phase]
                part = torch.cat([with_output[n][1] for n in of_phase])
                rows.append(compare(phase, torch.cat([outputs[n] for n in of_phase]), part))
            for count in counts:  # from the newest back, over and over
                part = every.flip(0)[torch.arange(count, device=x.device) % x.shape[0]]
                rows.append(compare(_rows(count), block_alone(part), part))
            return rows

        self._add(
            judge([y for _, _, y in with_output]),
            lambda: judge([block_alone(part) for _, part, _ in with_output]),
        )
        if layer.is_moe:
            self._unchosen(layer, x)

    def _unchosen(self, layer: LayerConfig, x: Tensor) -> None:
        """Run up to UNCHOSEN experts, evenly spread, that the router chose for none of x [T, H]."""
        w, top_k = self._weights(True).layer(layer.index), self.config.top_k_experts
        router = w["router.scale"], w["router.proj.weight"], w["router.per_expert_scale"]
        eps = self.config.rms_norm_eps
        _, chosen = reference_ops.route_topk(x.to(self.wide), *router, top_k, eps)
        left = sorted(set(range(self.config.num_experts)) - set(chosen.flatten().tolist()))
        if not left:
            return
        count = min(UNCHOSEN, len(left))
        spread = [left[n * len(left) // count] for n in range(count)]
        # Each token needs top_k different experts: others fill up the last token's.
        spread += [e for e in range(self.config.num_experts) if e not in spread[-(count % top_k) :]]
        tokens = -(-count // top_k)
        ids = torch.tensor(spread[: tokens * top_k], dtype=torch.int32, device=x.device).view(tokens, top_k)
        experts = self.text.layer(layer.index).experts
        e = reference_ops.rms_norm(x[torch.arange(tokens, device=x.device) % x.shape[0]], None, eps)
        weights = torch.full(ids.shape, 1 / top_k, device=x.device)
        weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        plain_w = self._weights(False).layer(layer.index)
        truth, plain = (
            reference_ops.moe(
                e.to(of["layer_scalar"].dtype),
                weights,
                ids,
                of["experts.gate_up_proj"],
                of["experts.down_proj"],
            )
            for of in (w, plain_w)
        )

        def judge() -> list[Comparison]:
            got = ops.moe(e, weights, ids, experts.gate_up_proj, experts.down_proj)
            errors = relative_error(got, truth), relative_error(plain, truth)
            place: dict[str, Any] = dict(layer=layer.index, kind=layer.label)
            return [Comparison("feed-forward", "other experts", *errors, **place)]

        self._add(judge(), judge)

    def _clear_calls(self, layer: LayerConfig, x: Tensor, *, half: bool = False) -> Tensor:
        """[T] bool: False where the router's last choice and the runner-up are too close to call.

        half: another implementation is compared. Its router computes in half precision, and its x
        differs a little from this one.
        """
        clear = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        if not layer.is_moe or self.config.top_k_experts == self.config.num_experts:
            return clear
        w = self._weights(True).layer(layer.index)
        args = w["router.scale"], w["router.proj.weight"]
        logits = reference_ops.router_logits(x.to(self.wide), *args, self.config.rms_norm_eps)
        if not logits.any():  # all experts are equal: then the lower ids are right, which is checked
            return clear
        best = logits.topk(self.config.top_k_experts + 1, dim=-1).values
        margin = best[:, -2] - best[:, -1]
        clear = margin > (HALF_CLOSE * logits.abs().amax(-1) if half else CLOSE_CALL)
        self.report.close_calls += int((~clear).sum())
        return clear

    def _add(self, rows: list[Comparison], again: Callable[[], list[Comparison]]) -> None:
        """Record the rows; if one is wrong, find the op whose replacement by the reference mends them all.

        `again` makes the same rows anew, from the same inputs, under the selection in force.
        """
        if not all(r.ok for r in rows) and not all(r.ok for r in again()):  # one that does not come again has no name
            op = next((name for name in self._suspects() if self._mended(name, again)), None)
            if op is not None:
                rows = [self._blamed(r, op) for r in rows]
        self.report.comparisons += rows

    def _note(self, row: Comparison, op: str) -> None:
        """Record the row; if it is wrong, this op is."""
        self.report.comparisons.append(self._blamed(row, op))

    def _blamed(self, row: Comparison, op: str) -> Comparison:
        if row.ok or not math.isfinite(row.plain_error):  # plain PyTorch overflows too
            return row
        return replace(row, op=f"{op} [{self.report.backends[op]}]")

    def _suspects(self) -> list[str]:
        """The model's ops. One made of others is not at fault where they are; one that a backend has in one comes before them,
        since a part that is replaced takes it apart."""
        names = [n for n in model_ops(self.config) if self.report.backends[n] != "composed"]
        return sorted(names, key=lambda n: ops.TABLE[n].compose is None)

    def _mended(self, op: str, again: Callable[[], list[Comparison]]) -> bool:
        with ops.use_backend("reference", ops=[op]):
            return all(r.ok for r in again())

    def _head(self, hidden: Tensor) -> None:
        """Logits, argmax and drawn tokens from hidden states [T, H], for different numbers of rows.

        The row that runs alone is the one whose likeliest token is furthest ahead, so that a wrong
        choice cannot pass for rounding.
        """
        head, most = self.model.head, min(self.extent.logits, hidden.shape[0])
        hidden = hidden[-most:]
        if self.full or len(head) <= SAMPLED_FROM:
            self._judge_head(hidden, head, *self._both_logits(hidden, head), (most, 5, 1))
            return
        fast, best = self.model.logits(hidden), self.model.logits(hidden, argmax=True)
        one = self._clearest(fast)
        h = hidden[one]
        fast_one, best_one = self.model.logits(h), self.model.logits(h, argmax=True)
        truth_of_one = self._reference_logits(h, head, wide=True)
        ids, spread = self._sample([fast, fast_one, truth_of_one], [best, best_one])
        table = head.index_select(0, ids)
        truth, plain = self._both_logits(hidden, table)
        self._judge_logits(_rows(most), fast[:, ids], truth, plain)
        there = (best >= 0) & (best < len(head))
        place = torch.searchsorted(ids, best.clamp(min=0, max=len(head) - 1))
        place = torch.where(there, place, -1)
        self._judge_choice(_rows(most), place, truth, self._allowed(truth, plain))
        self._judge_head(hidden, table, truth, plain, (5,))
        # Of one token the truth covers the whole vocabulary. What plain PyTorch loses is estimated: the
        # rows that are spread stand for all that are not in the sample.
        off = (plain[one].to(truth.dtype) - truth[one]).square().flatten()
        stands_for = torch.ones_like(off)
        stands_for[spread] += (len(head) - len(ids)) / spread.sum()
        lost = (off * stands_for).sum().sqrt() / truth_of_one.norm().clamp(min=1e-30)
        error = relative_error(fast_one, truth_of_one)
        self._note(Comparison("logits", _rows(1), error, lost.item()), "logits")
        allowed = self._allowed(truth[one], plain[one])
        self._judge_choice(_rows(1), best_one, truth_of_one, allowed)
        self._draws(h, truth_of_one, allowed, head, whole=True)

    @staticmethod
    def _clearest(logits: Tensor) -> slice:
        """The row of logits [T, V] whose largest is furthest above the next."""
        top = logits.topk(min(2, logits.shape[1]), dim=-1).values
        row = int((top[:, 0] - top[:, -1]).argmax())
        return slice(row, row + 1)

    def _judge_head(
        self,
        hidden: Tensor,
        table: WeightLike,
        truth: Tensor,
        plain: Tensor,
        counts: Sequence[int],
    ) -> None:
        """All of it over a table [V, H], the head or some of its rows, whose logits are known [T, V]."""
        softcap = self.config.final_logit_softcapping
        for n in counts:
            rows = self._clearest(truth) if n == 1 else slice(-n, None)
            h, t, p = hidden[rows], truth[rows], plain[rows]
            phase, allowed = _rows(h.shape[0]), self._allowed(t, p)
            self._judge_logits(phase, ops.logits(h, table, softcap), t, p)
            self._judge_choice(phase, ops.logits(h, table, softcap, True), t, allowed)
            if n <= 5:  # a quarter of a million logits are sorted for each
                self._draws(h, t, allowed, table)

    def _sample(self, logits: Sequence[Tensor], ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Ids [n] of some rows of the head, in order, and which of them are only there to be spread.

        They are runs of rows spread over the head, the likeliest tokens by these logits [T, V], and
        the given ids.
        """
        vocab = len(self.model.head)
        starts = torch.linspace(0, vocab - RUN, RUNS, dtype=torch.float64).long()
        runs = (starts[:, None] + torch.arange(RUN)).flatten().to(self.ids.device)
        likely = [y.topk(CANDIDATES, dim=-1).indices for y in logits]
        chosen = torch.cat([runs[:0], *(part.flatten() for part in (*likely, *ids))]).unique()
        chosen = chosen[(chosen >= 0) & (chosen < vocab)]
        found = torch.cat((runs, chosen)).unique()
        return found, ~torch.isin(found, chosen)

    def _judge_logits(self, phase: str, got: Tensor, truth: Tensor, plain: Tensor) -> None:
        errors = relative_error(got, truth), relative_error(plain, truth)
        self._note(Comparison("logits", phase, *errors), "logits")

    @staticmethod
    def _allowed(truth: Tensor, plain: Tensor) -> float:
        """What plain PyTorch loses of a logit at most."""
        return (plain.to(truth.dtype) - truth).abs().max().item()

    def _judge_choice(self, phase: str, chosen: Tensor, truth: Tensor, allowed: float) -> None:
        """A greedy choice is right if the truth's logit there is the largest, within what plain PyTorch loses. chosen [T]:
        columns of truth [T, V]."""
        missed, scale = math.inf, truth.abs().max().item() + 1e-30
        if int(chosen.min()) >= 0 and int(chosen.max()) < truth.shape[1]:
            missed = (truth.amax(-1) - truth.gather(-1, chosen[:, None]).squeeze(-1)).max().item()
        self._note(Comparison("greedy choice", phase, missed / scale, allowed / scale), "logits")

    def _draws(
        self,
        h: Tensor,
        truth: Tensor,
        allowed: float,
        table: WeightLike,
        *,
        whole: bool = False,
    ) -> None:
        """Tokens drawn from hidden states h [T, H] with these logits over a table.

        A drawn token may differ from the right one only if their logits differ by no more than
        plain PyTorch loses. whole: the table is the whole head. Each draw reads all of it, so only
        some ways of drawing are tried.
        """
        rows, vocab, scale = *truth.shape, truth.abs().max().item() + 1e-30
        row, hot = torch.arange(rows, device=h.device), 1e12  # so hot that all that stay are as likely
        if vocab < 3:  # a top_k of all is none
            return
        if not truth.isfinite().all():  # the comparison of the logits has failed
            return
        most = min(64, vocab - 1)
        ranked, ids = truth.topk(max(2, most), dim=-1)
        # As a temperature, it leaves the second of two more than 0.3, or else the first more than 0.7.
        apart = 1.5 * (ranked[:, 0] - ranked[:, 1]).mean().item() + 1e-30
        p = (ranked[:, :2] / apart).softmax(-1)
        second = (p[:, 1] > 0.3).long()
        middle = torch.where(second > 0, 1 - p[:, 1] / 2, p[:, 0] / 2)
        late, any_id = torch.full_like(middle, 0.9), (row * 7919 + 1) * 4099 % vocab
        # How, the numbers drawn by, and the tokens: by their rank, or their ids.
        plan: list[tuple[str, Sampling, Tensor, Tensor]] = [
            ("of all", Sampling(hot), (any_id + 0.5) / vocab, any_id),
            ("of the top k", Sampling(hot, top_k=most), (most - 1 - row % most + 0.5) / most, most - 1 - row % most),
            ("of two", Sampling(apart, top_k=2), middle, second),
            ("by top_p", Sampling(apart, top_k=2, top_p=0.4), late, torch.zeros_like(row)),
            ("by min_p", Sampling(apart, top_k=2, min_p=1.0), late, torch.zeros_like(row)),
        ]
        for what, sampling, uniform, wanted in plan[:2] if whole else plan:
            got = ops.sample(h, table, *self.model._draw(sampling, uniform.float()))
            missed = math.inf
            if sampling.top_k == 0:
                missed = 0.0 if torch.equal(got, wanted) else math.inf
            elif int(got.min()) >= 0 and int(got.max()) < vocab:
                wanted = ids.gather(-1, wanted[:, None])
                missed = (truth.gather(-1, wanted) - truth.gather(-1, got[:, None])).abs().max().item()
            self._note(Comparison("drawn token", f"{_rows(rows)}, {what}", missed / scale, allowed / scale), "sample")

    def _recorded_step(self) -> None:
        """The decode step as generation replays it, beside op by op on another cache; before the last one a sequence ends. The
        same bits, since only kernels of ours can be recorded."""
        if not recordable(self.model):
            return
        plan = self.plans[1]
        room, live = max(s.shape[0] for s in plan.sequences), len(plan.sequences)
        for choose in (None, GREEDY, DRAWN):
            caches = [self.model.new_cache(live + plan.idle, room) for _ in range(2)]
            graph, alike, got, wanted = DecodeGraph(self.model, caches[0]), True, list[Tensor](), list[Tensor]()
            like_hidden = self.model.model.norm.weight.expand(live + plan.idle, -1)
            if choose is not None and not graph.can_choose(like_hidden, choose):
                continue
            for piece, (phase, new) in enumerate(plan.pieces):
                if phase != "decode":
                    for cache in caches:
                        self.text(plan.ids(piece), self.text.step(new, cache), cache)
                    continue
                going = [0, *new[1:]] if piece + 1 == len(plan.pieces) else new
                rows = [b for b in range(live) if going[b]]
                ids, uniform = plan.ids(piece), self._uniform(len(going))
                h = self.text(ids, self.text.step(going, caches[1], decode=True), caches[1])
                out = graph.run(ids, going, choose=choose, uniform=uniform)[rows]
                if graph.recorded:
                    got.append(out)
                    wanted.append(graph.finish(h, choose, uniform)[rows])
                    alike = alike and torch.equal(got[-1], wanted[-1]) and torch.equal(caches[0].lens, caches[1].lens)
            if got:
                error = relative_error(torch.cat(got), torch.cat(wanted)) if choose is None else 1.0
                error = 0.0 if alike else max(error, 2 * FLOOR)  # any difference is one too many
                what = "decode" if choose is None else "greedy" if choose.greedy else "drawn"
                self.report.comparisons.append(Comparison("recorded step", what, error, 0.0))

    def _uniform(self, rows: int) -> Tensor:
        """Different ones, that are no edges."""
        return (torch.arange(rows, device=self.model.device, dtype=torch.float32) + 0.5) / rows

    def _both_logits(self, hidden: Tensor, table: WeightLike) -> tuple[Tensor, Tensor]:
        """The truth, and what plain PyTorch makes of it."""
        if isinstance(table, QuantizedWeight) and self.wide == torch.float32:
            # Both multiply by the table's values in fp32, so it is dequantized once for the two.
            rows = torch.cat((hidden.to(self.wide), rounded(hidden)))
            truth, plain = widened_linear(rows, table).chunk(2)
            plain = plain.to(hidden.dtype)
            return reference.softcap(truth, self.config), reference.softcap(plain, self.config)
        truth = self._reference_logits(hidden, table, wide=True)
        return truth, self._reference_logits(hidden, table, wide=False)

    def _reference_logits(self, hidden: Tensor, table: WeightLike, wide: bool) -> Tensor:
        w, hidden = self._weights(wide), hidden.to(self.wide) if wide else hidden
        logits = F.linear(hidden, w.matrix(cast(Tensor, table)))
        return reference.softcap(logits, self.config)

    def _end_to_end(self) -> EndToEnd:
        plan, n = self.plans[0], min(LOGIT_TOKENS, self.ids.shape[0])
        cache = self.model.new_cache(1, self.ids.shape[0])
        pieces = self.ids.split([new[0] for _, new in plan.pieces])
        got = torch.cat([self.model(part[None], cache)[0, -n:] for part in pieces])[-n:].to(self.wide)
        truth = reference.forward(self.tensors, self.config, self.ids, dtype=self.wide, last=n)
        plain = reference.forward(self.tensors, self.config, self.ids, last=n).to(self.wide)
        logp = truth.log_softmax(-1)

        def figures(x: Tensor) -> tuple[float, float, float]:
            kl = (logp.exp() * (logp - x.log_softmax(-1))).sum(-1).mean().item()
            agree = (x.argmax(-1) == truth.argmax(-1)).double().mean().item()
            return agree, kl, (x - truth).abs().max().item()

        def medians(x: Tensor) -> dict[str, float]:
            relative = (x - truth).norm(dim=-1) / truth.norm(dim=-1)
            chunk, decode = plan.counts["chunk"], plan.counts["decode"]
            parts = {"decode": relative[n - decode :], "chunk": relative[max(0, n - decode - chunk) : n - decode]}
            parts["prefill"] = relative[: max(0, n - decode - chunk)]
            return {phase: part.median().item() for phase, part in parts.items() if part.numel()}

        (top1, kl, worst), (plain_top1, plain_kl, plain_worst) = figures(got), figures(plain)
        ours, theirs = medians(got), medians(plain)
        return EndToEnd(
            tokens=n,
            top1=top1,
            plain_top1=plain_top1,
            kl=kl,
            plain_kl=plain_kl,
            max_error=worst,
            plain_max_error=plain_worst,
            medians={phase: (ours[phase], theirs[phase]) for phase in ours},
            decides=not (self.config.enable_moe_block and self.wide == torch.float32),
        )

    def _window_edges(self, layer: LayerConfig) -> None:
        """Attention with queries that look at just one key: the oldest they may see, the one before it, the newest, the next.

        In a long window one key more or less hardly moves the output of real weights; here it decides it.
        """
        for op, phase, error, plain in window_edges(self.model, layer, self.wide):
            row = Comparison("window edge", phase, error, plain, layer.index, layer.label)
            self._note(row, op)
