"""The self-check: does the fast path give the reference's answer, with these weights, on this machine?

Layer by layer, the fast path and the reference get the *same* input, so that an error shows where it is made and cannot grow:
a prompt longer than the window's ring, a further chunk, decode steps; and a ragged batch with an idle row. Where generation
replays a recorded decode step, that is held to the same step op by op. Truth is the reference in a wider dtype, one layer
widened at a time; the yardstick is what plain PyTorch (the reference in the model's own dtype) loses. A comparison passes if
its error is at most SLACK x the yardstick + FLOOR. Where a block fails, each op is replaced by the reference in turn: the op
whose replacement mends it is named.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_fast import ops
from gemma4_fast.cache import TILE
from gemma4_fast.config import LayerConfig
from gemma4_fast.edges import relative_error, window_edges
from gemma4_fast.graph import DecodeGraph, recordable
from gemma4_fast.layers import model_ops
from gemma4_fast.ops.moe import moe_crossover
from gemma4_fast.quant import QuantizedWeight, WeightLike
from gemma4_fast.reference import model as reference
from gemma4_fast.reference import ops as reference_ops
from gemma4_fast.report import FLOOR, Comparison, EndToEnd, Report
from gemma4_fast.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from gemma4_fast.cache import KVCache
    from gemma4_fast.layers import Step
    from gemma4_fast.model import Gemma4

CHUNK, DECODE = 17, 4  # tokens of the second chunk, decode steps
BATCH = (42, 29)  # tokens of the sequences of the ragged batch; a third one stays idle
FIRST, NEWEST = 8, 56  # tokens that the feed-forward block is compared on: experts are dear to widen and run
ROWS = (1, 2, 5, 16)  # and numbers of rows it is run with again: kernels differ by them
LOGIT_TOKENS = 64  # newest tokens that are compared end to end
DRAWN = Sampling(temperature=1.0, top_k=64, top_p=0.95)  # as Gemma 4's checkpoints recommend
CLOSE_CALL = 1e-4  # relative margin between the last expert taken and the next, below which either choice is right
HALF_CLOSE = 0.1  # and where others' router computes in half precision


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
    input_ids: the tokens to run, default random ones (seeded), enough to pass the sliding window and wrap its cache.
    progress(done, total) counts layers. Extra memory: one layer in the wider dtype, and the activations of the tokens.
    """
    from gemma4_fast.model import Gemma4

    if level not in ("quick", "full"):
        raise ValueError(f"level must be 'quick' or 'full', got {level!r}")
    if isinstance(model, Gemma4):
        return _verify(model, level, _tokens(model, input_ids, seed), progress)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"expected a Gemma4 or an accelerated model of transformers, got {type(model).__name__}")
    from gemma4_fast.integrations.beside import compare, native_of

    native = native_of(model)
    ids = _tokens(native, input_ids, seed)
    report = _verify(native, level, ids, progress)
    if not report.not_finite:
        compare(model, report, ids)
    return report


@torch.inference_mode()
def _verify(model: Gemma4, level: str, ids: Tensor, progress: Callable[[int, int], None] | None) -> Report:
    with model.running():
        report = Report(level, str(model.device), str(model.dtype).removeprefix("torch."), _backends(model))
        tensors = model.state_dict()
        report.not_finite = [n for n, t in tensors.items() if not _all_finite(t)]
        if not report.not_finite:
            _Check(model, tensors, ids, report).run(level, progress)
    return report


def _tokens(model: Gemma4, given: Sequence[int] | Tensor | None, seed: int) -> Tensor:
    c = model.config
    if given is None:
        window = max((layer.window or 0 for layer in c.layers()), default=0)
        ring = -(-window // TILE) * TILE
        count = min(ring + 13 + CHUNK + DECODE, c.max_position_embeddings)
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
    return picked.long().to(model.device)


def _all_finite(x: WeightLike) -> bool:
    """A sum is finite only if every term is (or, rarely, overflows: then look again). In blocks: PyTorch widens a whole one."""
    if isinstance(x, QuantizedWeight):
        return bool(x.scale.isfinite().all())
    blocks = x.reshape(-1).split(1 << 24)
    sums = torch.stack([b.sum(dtype=torch.float32) for b in blocks])
    return bool(sums.isfinite().all()) or all(bool(b.isfinite().all()) for b in blocks)


def _backends(model: Gemma4) -> dict[str, str]:
    return {name: ops.decide(name, model.device, model.dtype)[0] for name in model_ops(model.config)}


@dataclass(frozen=True)
class Layered:
    """What another implementation's layer was given, and gave: the residual stream [T, H], and its PLE inputs [T, P]."""

    x: Tensor
    ple: Tensor | None
    out: Tensor


@torch.inference_mode()
def compare_layers(model: Gemma4, ids: Tensor, layers: Sequence[Layered], whose: str, report: Report) -> None:
    """All layers on what `whose` layers were given, for one prompt ids [T]: their outputs' errors against the wider reference.
    It is `whose` error that decides how large ours may be."""
    with model.running():
        tensors = model.state_dict()
        check = _Check(model, tensors, ids, report)
        kinds = {c.index for c in (check.config.layers() if report.level == "full" else check._kinds())}
        step, kv = model.model.step([len(ids)], None), dict[int, tuple[Tensor, Tensor]]()
        for layer, other in zip(check.config.layers(), layers, strict=True):
            x, i = other.x, layer.index
            got, _ = model.model.run_layer(i, x, None, step, None, other.ple)
            if i not in kinds:
                continue
            w, wide = check._weights(True).layer(i), check.wide
            between = reference.attention_block(w, check.config, layer, x.to(wide), kv)
            ple = None if other.ple is None else other.ple.to(wide)
            truth = reference.feed_forward_block(w, check.config, layer, between, ple)
            margin = HALF_CLOSE if model.dtype in (torch.bfloat16, torch.float16) else CLOSE_CALL
            keep = check._clear_calls(layer, between, margin)[:, None]
            ours, theirs = (relative_error(torch.where(keep, y.to(wide), truth), truth) for y in (got, other.out))
            report.comparisons.append(Comparison(f"beside {whose}", "prefill", ours, theirs, layer=i, kind=layer.label))


class _Plan:
    """Sequences and how they are cut: a prefill, a second chunk, decode steps. Idle sequences have no tokens."""

    def __init__(self, name: str, sequences: list[Tensor], idle: int = 0) -> None:
        self.name, self.sequences, self.idle = name, sequences, idle
        shortest = min(s.shape[0] for s in sequences)
        decode, chunk = min(DECODE, shortest // 3), min(CHUNK, shortest // 3)
        first = [s.shape[0] - chunk - decode for s in sequences]
        none = [0] * idle
        self.pieces: list[tuple[str, list[int]]] = [("prefill", first + none), ("chunk", [chunk] * len(sequences) + none)]
        self.pieces += [("decode", [1] * len(sequences) + none)] * decode
        self.counts = {"prefill": 0, "chunk": chunk, "decode": decode}  # of each sequence; prefill: what is left

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
    after: dict[int, list[Tensor]] = field(default_factory=dict)
    cut: dict[int, Tensor] = field(default_factory=dict)  # between, of each sequence's newest prefill token alone
    ple: list[Tensor | None] = field(default_factory=list)  # by piece: what all layers get beside the stream
    hidden: list[Tensor] = field(default_factory=list)

    def of(self, pieces: list[Tensor], sequence: int) -> Tensor:
        """One sequence's rows of a stream, in order [T, H]."""
        return torch.cat([x[self.plan.rows(i)[sequence]] for i, x in enumerate(pieces)])


Store = dict[int, tuple[Tensor, Tensor]]


class _Check:
    def __init__(self, model: Gemma4, tensors: Mapping[str, Tensor], ids: Tensor, report: Report) -> None:
        self.model, self.tensors, self.ids, self.report = model, tensors, ids, report
        self.config, self.text = model.config, model.model
        half = model.dtype in (torch.bfloat16, torch.float16)
        self.wide = torch.float32 if half else torch.float64
        longest, shorter = (ids.roll(7 * n)[: max(3, min(n, ids.shape[0]))] for n in BATCH)
        self.plans = [_Plan("", [ids]), _Plan("batch ", [longest, shorter], idle=1)]

    def run(self, level: str, progress: Callable[[int, int], None] | None) -> None:
        layers = self.config.layers() if level == "full" else self._kinds()
        for layer in self._kinds():
            self._window_edges(layer)
        self._embedding()
        runs = [self._fast(plan, [c.index for c in layers]) for plan in self.plans]
        # What layers share: K and V, wide and plain, of each plan's sequences.
        stores: list[list[tuple[Store, Store]]] = [[({}, {}) for _ in plan.sequences] for plan in self.plans]
        for done, layer in enumerate(layers):
            for run, store in zip(runs, stores, strict=True):
                self._attention(layer, run, store)
            self._feed_forward(layer, runs)
            if progress is not None:
                progress(done + 1, len(layers))
        self._head(runs[0].of(runs[0].hidden, 0))
        if level == "full" or self.model.device.type == "cuda":  # it runs all layers, which takes no time on a GPU alone
            self._recorded_step()
        if level == "full":
            self.report.end_to_end = self._end_to_end()

    def _kinds(self) -> list[LayerConfig]:
        """The first layer of each kind, and the donors that these need, in order."""
        first: dict[object, LayerConfig] = {}
        for layer in self.config.layers():
            first.setdefault(layer.kind, layer)
        wanted = {c.index for c in first.values()}
        wanted |= {c.kv_donor for c in first.values() if c.kv_donor is not None}
        return [self.config.layer(i) for i in sorted(wanted)]

    def _fast(self, plan: _Plan, indices: Sequence[int], inputs: Mapping[int, list[Tensor]] | None = None) -> _Run:
        """Layers `indices` on the fast path. Each gets what the one before gave, or, piece by piece, inputs[index]."""
        run = _Run(plan)
        batch = len(plan.sequences) + plan.idle
        cache = self.model.new_cache(batch, max(s.shape[0] for s in plan.sequences))
        for piece, (phase, new) in enumerate(plan.pieces):
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
                x, h = self.text.run_layer(i, x, h, step, cache, None if ple is None else ple[:, i], between.append)
                run.after.setdefault(i, []).append(x)
            self.text.write_donors(step, cache)
            if phase == "prefill":
                self._cut(run, indices, step, cache, ple)
            cache.advance(new)
            run.hidden.append(ops.rms_norm(x, self.text.norm.weight, self.config.rms_norm_eps))
        return run

    def _cut(self, run: _Run, indices: Sequence[int], step: Step, cache: KVCache, ple: Tensor | None) -> None:
        """The layers that share KV, once more on each sequence's newest token alone, as generation runs them."""
        rows = self.text.last_rows(step)
        last = self.text.last_step(step, cache, [n > 0 for n in step.new_lens])
        for i in indices:
            if self.config.layer(i).kv_donor is not None:
                seen: list[Tensor] = []
                own = None if ple is None else ple[rows][:, i]
                self.text.run_layer(i, run.before[i][0][rows], None, last, cache, own, seen.append)
                run.cut[i] = seen[0]

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

    def _attention(self, layer: LayerConfig, run: _Run, stores: list[tuple[Store, Store]]) -> None:
        i, plan = layer.index, run.plan
        place: dict[str, Any] = dict(layer=i, kind=layer.label)
        wanted: list[tuple[Tensor, Tensor]] = []  # truth, plain of each sequence
        for b, store in enumerate(stores):
            x = run.of(run.before[i], b)
            both = [
                reference.attention_block(w.layer(i), self.config, layer, x.to(w["norm.weight"].dtype), kv)
                for w, kv in zip((self._weights(True), self._weights(False)), store, strict=True)
            ]
            wanted.append((both[0], both[1]))

        def judge(again: _Run) -> list[Comparison]:
            rows: list[Comparison] = []
            for b, (truth, plain) in enumerate(wanted):
                rows += self._compare("attention", plan, again.of(again.between[i], b), truth, plain, **place)
            if i in again.cut:
                at = [plan.pieces[0][1][b] - 1 for b in range(len(wanted))]
                truth, plain = (torch.stack([w[k][t] for w, t in zip(wanted, at, strict=True)]) for k in (0, 1))
                errors = relative_error(again.cut[i][: len(at)], truth), relative_error(plain, truth)
                rows.append(Comparison("attention", f"{plan.name}newest token alone", *errors, **place))
            return rows

        indices = [i] if layer.kv_donor is None else [layer.kv_donor, i]
        self._add(judge(run), lambda: judge(self._fast(plan, indices, {n: run.before[n] for n in indices})))

    def _feed_forward(self, layer: LayerConfig, runs: list[_Run]) -> None:
        """What the runs gave on some of their tokens, and the block alone on different numbers of rows."""
        i, block = layer.index, self.text.layer(layer.index)
        picked: list[tuple[Tensor, Tensor, Tensor | None, str]] = []  # input, output, PLE [n, .] and phase
        for run in runs:
            for piece, (phase, _) in enumerate(run.plan.pieces):
                x, y = run.between[i][piece], run.after[i][piece]
                rows = torch.arange(sum(run.plan.pieces[piece][1]), device=x.device)
                rows = rows if rows.shape[0] <= FIRST + NEWEST else torch.cat((rows[:FIRST], rows[-NEWEST:]))
                given = run.ple[piece]
                picked.append((x[rows], y[rows], None if given is None else given[rows, i], run.plan.name + phase))
        x = torch.cat([p[0] for p in picked])
        ple = None if picked[0][2] is None else torch.cat([cast(Tensor, p[2]) for p in picked])
        phases = [p[3] for p in picked for _ in range(p[0].shape[0])]
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

        every = torch.arange(x.shape[0], device=x.device)
        # So many rows, these over and over if need be, that the experts take their path for many tokens if they have one.
        crossover = moe_crossover(x.device, x.dtype)
        many = torch.arange(1 + (64 if crossover == math.inf else int(crossover)), device=x.device) % x.shape[0]

        def compare(phase: str, got: Tensor, part: Tensor) -> Comparison:
            settled = torch.where(keep[part], got.to(truth.dtype), truth[part])
            errors = relative_error(settled, truth[part]), relative_error(plain[part], truth[part])
            return Comparison("feed-forward", phase, *errors, layer=i, kind=layer.label)

        def block_alone(rows: int, part: Tensor) -> Tensor:
            pieces = []
            for some in part.split(rows):
                # 0 is added to x: its norms, by the op that makes them.
                x_out, h, e = block.end_of_attention(torch.zeros_like(x[some]), x[some])
                pieces.append(block.feed_forward_block(x_out, cast(Tensor, h), e, None if ple is None else ple[some], None)[0])
            return torch.cat(pieces)

        def judge(outputs: Callable[[], Tensor]) -> list[Comparison]:
            got, rows = outputs(), []
            for phase in dict.fromkeys(phases):
                part = torch.tensor([p == phase for p in phases], device=x.device)
                rows.append(compare(phase, got[part], part))
            for count in ROWS:
                newest = every[-2 * count :]
                rows.append(compare(f"{count} rows", block_alone(count, newest), newest))
            if layer.is_moe:
                rows.append(compare(f"{many.shape[0]} rows", block_alone(many.shape[0], many), many))
            return rows

        def replay() -> Tensor:
            """All rows as the runs took them: piece by piece."""
            return torch.cat([block_alone(len(part), part) for part in every.split([p[0].shape[0] for p in picked])])

        self._add(judge(lambda: torch.cat([p[1] for p in picked])), lambda: judge(replay))

    def _clear_calls(self, layer: LayerConfig, x: Tensor, margin: float = CLOSE_CALL) -> Tensor:
        """[T] bool: False where the router's last choice and the runner-up are too close to call: in fp32, by default."""
        clear = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        if not layer.is_moe or self.config.top_k_experts == self.config.num_experts:
            return clear
        w = self._weights(True).layer(layer.index)
        one = torch.ones_like(w["router.per_expert_scale"])
        args = w["router.scale"], w["router.proj.weight"], one, self.config.top_k_experts + 1
        probs, _ = reference_ops.route_topk(x.to(self.wide), *args, self.config.rms_norm_eps)
        clear = (probs[:, -2] - probs[:, -1]) > margin * probs[:, -2]
        if not clear.any():  # experts that are equal everywhere have a rule (the lower id), and it is checked
            return torch.ones_like(clear)
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
        return row if row.ok else replace(row, op=f"{op} [{self.report.backends[op]}]")

    def _suspects(self) -> list[str]:
        """The model's ops. One made of others is not at fault where they are; one that a backend has in one comes before them,
        since a part that is replaced takes it apart."""
        names = [n for n in model_ops(self.config) if self.report.backends[n] != "composed"]
        return sorted(names, key=lambda n: ops.TABLE[n].compose is None)

    def _mended(self, op: str, again: Callable[[], list[Comparison]]) -> bool:
        with ops.use_backend("reference", ops=[op]):
            return all(r.ok for r in again())

    def _head(self, hidden: Tensor) -> None:
        """Logits of given hidden states [T, H], and the argmax form, for different numbers of rows."""
        for rows in (LOGIT_TOKENS, 5, 1):
            h = hidden[-rows:]
            truth, plain = (self._reference_logits(h, wide) for wide in (True, False))
            errors = relative_error(self.model.logits(h), truth), relative_error(plain, truth)
            row = Comparison("logits", f"{h.shape[0]} rows", *errors)
            self._note(row, "logits")
            # A greedy choice is right if the truth's logit there is the largest, within what plain PyTorch loses.
            ids = self.model.logits(h, argmax=True)
            missed, allowed = math.inf, (plain.to(truth.dtype) - truth).abs().max().item()
            if int(ids.min()) >= 0 and int(ids.max()) < truth.shape[1]:
                missed = (truth.amax(-1) - truth.gather(-1, ids[:, None]).squeeze(-1)).max().item()
            scale = truth.abs().max().item() + 1e-30
            row = Comparison("greedy choice", f"{h.shape[0]} rows", missed / scale, allowed / scale)
            self._note(row, "logits")
            if rows < LOGIT_TOKENS:  # a quarter of a million logits are sorted for each
                self._draws(h, truth, allowed)

    def _draws(self, h: Tensor, truth: Tensor, allowed: float) -> None:
        """Tokens drawn from hidden states h [T, H] with these logits, where rounding decides only between tokens that are as
        likely within what plain PyTorch loses of a logit."""
        rows, vocab, scale = *truth.shape, truth.abs().max().item() + 1e-30
        row, hot = torch.arange(rows, device=h.device), 1e12  # so hot that all that stay are as likely
        if vocab < 3:  # a top_k of all is none
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
            ("of the top_k", Sampling(hot, top_k=most), (most - 1 - row % most + 0.5) / most, most - 1 - row % most),
            ("of two", Sampling(apart, top_k=2), middle, second),
            ("by top_p", Sampling(apart, top_k=2, top_p=0.4), late, torch.zeros_like(row)),
            ("by min_p", Sampling(apart, top_k=2, min_p=1.0), late, torch.zeros_like(row)),
        ]
        for what, sampling, uniform, wanted in plan:
            got = self.model.choose(h, sampling, uniform.float())
            missed = math.inf
            if sampling.top_k == 0:
                missed = 0.0 if torch.equal(got, wanted) else math.inf
            elif int(got.min()) >= 0 and int(got.max()) < vocab:
                wanted = ids.gather(-1, wanted[:, None])
                missed = (truth.gather(-1, wanted) - truth.gather(-1, got[:, None])).abs().max().item()
            self._note(Comparison("drawn token", f"{rows} rows, {what}", missed / scale, allowed / scale), "sample")

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

    def _reference_logits(self, hidden: Tensor, wide: bool) -> Tensor:
        w, hidden = self._weights(wide), hidden.to(self.wide) if wide else hidden
        blocks = [F.linear(hidden, w.widened(cast(Tensor, block))) for block in self.model.head.split(16384)]
        return reference.softcap(torch.cat(blocks, -1), self.config)

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
