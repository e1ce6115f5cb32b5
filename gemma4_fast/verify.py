"""The self-check: does the fast path give the reference's answer, with these weights, on this machine?

Layer by layer, the fast path and the reference get the *same* input, so that an error shows where it is made and cannot grow:
prompt longer than the window, a further chunk, and decode steps that wrap the ring. Truth is the reference in a wider dtype,
one layer widened at a time; the yardstick is what plain PyTorch (the reference in the model's own dtype) loses. A comparison
passes if its error is at most SLACK x the yardstick + FLOOR. Where a block fails, each op is replaced by the reference in
turn: the op whose replacement mends it is named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gemma4_fast import ops
from gemma4_fast.config import LayerConfig
from gemma4_fast.edges import relative_error, window_edges
from gemma4_fast.errors import SelfCheckError
from gemma4_fast.layers import model_ops
from gemma4_fast.reference import model as reference
from gemma4_fast.reference import ops as reference_ops
from gemma4_fast.tables import render

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

SLACK, FLOOR = 2.0, 1e-5
CHUNK, DECODE = 17, 4  # tokens of the second chunk, decode steps
FEED_FORWARD_TOKENS = 64  # newest tokens that the feed-forward block is compared on: experts are dear to widen and run
LOGIT_TOKENS = 64  # newest tokens that are compared end to end
CLOSE_CALL = 1e-4  # relative margin between the last expert taken and the next, below which either choice is right


@dataclass(frozen=True)
class Comparison:
    """One output, against the truth. Errors are relative: the worst token's |got - truth| / |truth|, both L2 norms."""

    what: str  # "attention", "feed-forward", "embedding", "logits", "window edge"
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
        return self.error <= self.limit  # False for NaN

    def describe(self) -> str:
        """One line that names place, op and figures."""
        where = self.what if self.layer is None else f"layer {self.layer} ({self.kind}), {self.what}"
        where += f", {self.phase}" if self.phase else ""
        culprit = f"; the op at fault is {self.op}" if self.op else ""
        return f"{where}: relative error {self.error:.2g}, allowed {self.limit:.2g}{culprit}"


@dataclass(frozen=True)
class EndToEnd:
    """Logits of the whole model over `tokens` positions: this model's against the truth, beside plain PyTorch's.

    median_error is the median over positions of |logits - truth| / |truth|, both L2 norms.
    """

    tokens: int
    top1: float  # share of positions with the truth's likeliest token
    plain_top1: float
    kl: float  # mean KL(truth || got), nats
    plain_kl: float
    max_error: float  # max |logit - truth|
    plain_max_error: float
    median_error: float
    plain_median_error: float

    @property
    def ok(self) -> bool:
        """By the median position: in half precision a few positions route to other experts and say little, in both."""
        return self.median_error <= SLACK * self.plain_median_error + FLOOR


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
            return (
                f"FAILED: end to end, KL {end.kl:.2g} (plain {end.plain_kl:.2g}), "
                f"median relative logit error {end.median_error:.2g} (plain {end.plain_median_error:.2g})"
            )
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
                ("median relative error", f"{end.median_error:.2e}", f"{end.plain_median_error:.2e}"),
            )
            text += render(("end to end", "this model", "plain PyTorch"), pairs, title=f"{end.tokens} positions")
        return text + self.verdict()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.inference_mode()
def verify(
    model: Gemma4,
    *,
    level: str = "quick",
    input_ids: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare `model` with the reference; nothing is raised for a wrong answer, see Report.raise_if_wrong.

    level "quick": the first layer of each kind, and the head. "full": every layer, and the whole model end to end.
    input_ids: the tokens to run, default random ones (seeded), enough to pass the sliding window and wrap its cache.
    progress(done, total) counts layers. Extra memory: one layer in the wider dtype, and the activations of the tokens.
    """
    if level not in ("quick", "full"):
        raise ValueError(f"level must be 'quick' or 'full', got {level!r}")
    ids = _tokens(model, input_ids, seed)
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
        count = min(window + 13 + CHUNK + DECODE, c.max_position_embeddings)
        picked = torch.randint(c.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    else:
        picked = torch.as_tensor(given)
        if picked.dim() != 1 or picked.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be one sequence of integers, got {list(picked.shape)} {picked.dtype}")
        if not DECODE + 2 <= picked.numel() <= c.max_position_embeddings:
            raise ValueError(f"input_ids must hold {DECODE + 2} to {c.max_position_embeddings} tokens, got {picked.numel()}")
        if int(picked.min()) < 0 or int(picked.max()) >= c.vocab_size:
            raise ValueError(f"token ids must lie in [0, {c.vocab_size})")
    return picked.long().to(model.device)


def _all_finite(x: Tensor) -> bool:
    """A sum is finite only if every term is (or, rarely, overflows: then look again). In blocks: PyTorch widens a whole one."""
    blocks = x.reshape(-1).split(1 << 24)
    sums = torch.stack([b.sum(dtype=torch.float32) for b in blocks])
    return bool(sums.isfinite().all()) or all(bool(b.isfinite().all()) for b in blocks)


def _backends(model: Gemma4) -> dict[str, str]:
    return {name: ops.decide(name, model.device, model.dtype)[0] for name in model_ops(model.config)}


@dataclass
class _Run:
    """Residual streams [T, H] of a fast run, by layer: what went in, what stood between the blocks, what came out."""

    before: dict[int, list[Tensor]] = field(default_factory=dict)
    between: dict[int, list[Tensor]] = field(default_factory=dict)
    after: dict[int, list[Tensor]] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)

    def whole(self, streams: Mapping[int, list[Tensor]], layer: int) -> Tensor:
        return torch.cat(streams[layer])


class _Check:
    def __init__(self, model: Gemma4, tensors: Mapping[str, Tensor], ids: Tensor, report: Report) -> None:
        self.model, self.tensors, self.ids, self.report = model, tensors, ids, report
        self.config, self.text = model.config, model.model
        half = model.dtype in (torch.bfloat16, torch.float16)
        self.wide = torch.float32 if half else torch.float64
        total = ids.shape[0]
        chunk = min(CHUNK, (total - DECODE) // 2)
        self.phases = {"prefill": total - chunk - DECODE, "chunk": chunk, "decode": DECODE}

    def run(self, level: str, progress: Callable[[int, int], None] | None) -> None:
        layers = self.config.layers() if level == "full" else self._kinds()
        indices = [c.index for c in layers]
        for layer in self._kinds():
            self._window_edges(layer)
        x, ple = self.text.embed(self.ids)
        self._embedding(x, ple)
        run = self._fast(indices)
        kv: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
        for done, layer in enumerate(layers):
            self._layer(layer, run, ple, kv)
            if progress is not None:
                progress(done + 1, len(layers))
        self._head(torch.cat(run.hidden))
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

    def _fast(self, indices: Sequence[int], inputs: Mapping[int, list[Tensor]] | None = None) -> _Run:
        """Layers `indices` on the fast path: a prefill, a second chunk, decode steps.

        Each layer gets what the one before gave, or, phase by phase, inputs[index].
        """
        run, at = _Run(), 0
        cache = self.model.new_cache(1, self.ids.shape[0])
        pieces = [self.phases["prefill"], self.phases["chunk"], *[1] * self.phases["decode"]]
        for part, count in enumerate(pieces):
            step = self.text.step([count], cache, decode=count == 1)
            x, ple = self.text.embed(self.ids[at : at + count])
            h: Tensor | None = None
            for place, i in enumerate(indices):
                if inputs is not None:
                    x, h = inputs[i][part], None
                elif place and indices[place - 1] != i - 1:
                    h = None  # the norm at hand is the one that a skipped layer would have taken
                run.before.setdefault(i, []).append(x)
                between = run.between.setdefault(i, [])
                x, h = self.text.run_layer(i, x, h, step, cache, None if ple is None else ple[:, i], between.append)
                run.after.setdefault(i, []).append(x)
            self.text.write_donors(step, cache)
            cache.advance([count])
            run.hidden.append(ops.rms_norm(x, self.text.norm.weight, self.config.rms_norm_eps))
            at += count
        return run

    def _weights(self, wide: bool) -> reference.Weights:
        return reference.Weights(self.tensors, dtype=self.wide if wide else None)

    def _compare(self, what: str, got: Tensor, truth: Tensor, plain: Tensor, **place: Any) -> list[Comparison]:
        """Phase by phase. got, truth, plain [n, ...]: the newest n tokens."""
        rows, end = [], got.shape[0]
        for phase, count in reversed(self.phases.items()):
            start = max(0, end - count)
            if start < end:
                part = slice(start, end)
                errors = relative_error(got[part], truth[part]), relative_error(plain[part], truth[part])
                rows.append(Comparison(what, phase, *errors, **place))
            end = start
        return rows[::-1]

    def _embedding(self, x: Tensor, ple: Tensor | None) -> None:
        outs = []
        for wide in (True, False):
            w = self._weights(wide)
            base = reference.embed(w, self.config, self.ids)
            outs.append((base, reference.per_layer_inputs(w, self.config, self.ids, base)))
        (truth, truth_ple), (plain, plain_ple) = outs
        errors = relative_error(x, truth), relative_error(plain, truth)
        self.report.comparisons.append(Comparison("embedding", "", *errors))
        if ple is not None:
            t, p = cast(Tensor, truth_ple), cast(Tensor, plain_ple)
            errors = relative_error(ple, t), relative_error(p, t)
            self.report.comparisons.append(Comparison("per-layer inputs", "", *errors))

    def _layer(self, layer: LayerConfig, run: _Run, ple: Tensor | None, kv: tuple[dict[int, Any], dict[int, Any]]) -> None:
        i, config = layer.index, self.config
        x, between = run.whole(run.before, i), run.whole(run.between, i)
        place: dict[str, Any] = dict(layer=i, kind=layer.label)
        truth, plain = (
            reference.attention_block(w.layer(i), config, layer, x.to(w["norm.weight"].dtype), store)
            for w, store in zip((self._weights(True), self._weights(False)), kv, strict=True)
        )
        rows = self._compare("attention", between, truth, plain, **place)
        self._add(rows, layer, run, lambda again: self._compare("attention", again.whole(again.between, i), truth, plain))

        tail = slice(-FEED_FORWARD_TOKENS, None)
        source = between[tail]
        keep = self._clear_calls(layer, source)
        given = None if ple is None else ple[:, i][tail]
        truth_ff, plain_ff = (
            reference.feed_forward_block(
                w.layer(i),
                config,
                layer,
                source.to(w["norm.weight"].dtype),
                None if given is None else given.to(w["norm.weight"].dtype),
            )
            for w in (self._weights(True), self._weights(False))
        )

        def settle(got: Tensor) -> Tensor:  # tokens whose routing is a toss-up count as right
            return torch.where(keep[:, None], got[tail].to(truth_ff.dtype), truth_ff)

        calm = torch.where(keep[:, None], plain_ff.to(truth_ff.dtype), truth_ff)
        rows = self._compare("feed-forward", settle(run.whole(run.after, i)), truth_ff, calm, **place)
        # Replayed on the same residual: what the attention of the rerun gives may differ, the block's input must not.
        self._add(rows, layer, run, lambda again: self._replay(layer, source, given, settle, truth_ff, calm))

    def _replay(
        self,
        layer: LayerConfig,
        x: Tensor,
        ple: Tensor | None,
        settle: Callable[[Tensor], Tensor],
        truth: Tensor,
        plain: Tensor,
    ) -> list[Comparison]:
        """The feed-forward block alone, token by token and all at once, as the phases do."""
        block = self.text.layer(layer.index)
        weight = block.pre_feedforward_layernorm.weight

        def once(part: slice) -> Tensor:
            h = ops.rms_norm(x[part], weight, block.eps)
            return block.feed_forward_block(x[part], h, None if ple is None else ple[part], None)[0]

        many = x.shape[0] - self.phases["decode"]
        pieces = [once(slice(0, many))] + [once(slice(t, t + 1)) for t in range(many, x.shape[0])]
        return self._compare("feed-forward", settle(torch.cat(pieces)), truth, plain)

    def _clear_calls(self, layer: LayerConfig, x: Tensor) -> Tensor:
        """[T] bool: False where the router's last choice and the runner-up are too close to call in fp32."""
        clear = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        if not layer.is_moe or self.config.top_k_experts == self.config.num_experts:
            return clear
        w = self._weights(True).layer(layer.index)
        one = torch.ones_like(w["router.per_expert_scale"])
        args = w["router.scale"], w["router.proj.weight"], one, self.config.top_k_experts + 1
        probs, _ = reference_ops.route_topk(x.to(self.wide), *args, self.config.rms_norm_eps)
        clear = (probs[:, -2] - probs[:, -1]) > CLOSE_CALL * probs[:, -2]
        if not clear.any():  # experts that are equal everywhere have a rule (the lower id), and it is checked
            return torch.ones_like(clear)
        self.report.close_calls += int((~clear).sum())
        return clear

    def _add(self, rows: list[Comparison], layer: LayerConfig, run: _Run, again: Callable[[_Run], list[Comparison]]) -> None:
        """Record the rows; if one is wrong, find the op whose replacement by the reference mends them all."""
        if not all(r.ok for r in rows) and (op := self._culprit(layer, run, again)):
            rows = [r if r.ok else Comparison(**{**asdict(r), "op": op}) for r in rows]
        self.report.comparisons += rows

    def _culprit(self, layer: LayerConfig, run: _Run, again: Callable[[_Run], list[Comparison]]) -> str:
        indices = [layer.index] if layer.kv_donor is None else [layer.kv_donor, layer.index]
        inputs = {i: run.before[i] for i in indices}
        for name in model_ops(self.config):
            with ops.use_backend("reference", ops=[name]):
                if all(r.ok for r in again(self._fast(indices, inputs))):
                    return f"{name} [{self.report.backends[name]}]"
        return ""

    def _head(self, hidden: Tensor) -> None:
        """Logits of given hidden states, and the argmax form, on the newest tokens."""
        hidden = hidden[-LOGIT_TOKENS:]
        truth, plain = (self._reference_logits(hidden.to(d)) for d in (self.wide, hidden.dtype))
        backend = self.report.backends["logits"]
        errors = relative_error(self.model.logits(hidden), truth), relative_error(plain, truth)
        row = Comparison("logits", "", *errors)
        if not row.ok:
            row = Comparison("logits", "", *errors, op=f"logits [{backend}]")
        self.report.comparisons.append(row)
        # A greedy choice is right if the truth's logit there is its maximum, within what plain PyTorch's choice misses.
        uncapped = hidden.to(self.wide) @ self.model.head.to(self.wide).T if self.model.head.numel() < 1 << 24 else truth
        ids = self.model.logits(hidden, argmax=True)
        if int(ids.min()) < 0 or int(ids.max()) >= truth.shape[1]:
            missed, allowed = math.inf, 0.0
        else:
            best = uncapped.amax(-1)
            scale = best.abs().mean().item() + 1e-30
            missed = (best - uncapped.gather(-1, ids[:, None]).squeeze(-1)).max().item() / scale
            allowed = (best - uncapped.gather(-1, plain.argmax(-1)[:, None]).squeeze(-1)).max().item() / scale
            allowed = max(allowed, torch.finfo(hidden.dtype).eps)
        row = Comparison("greedy choice", "", missed, allowed)
        self.report.comparisons.append(row if row.ok else Comparison("greedy choice", "", missed, allowed, op="logits"))

    def _reference_logits(self, hidden: Tensor) -> Tensor:
        blocks = [hidden @ block.to(hidden.dtype).T for block in self.model.head.split(16384)]
        return reference.softcap(torch.cat(blocks, -1), self.config)

    def _end_to_end(self) -> EndToEnd:
        n = min(LOGIT_TOKENS, self.ids.shape[0])
        cache = self.model.new_cache(1, self.ids.shape[0])
        cut = self.phases["prefill"], self.phases["chunk"], *[1] * self.phases["decode"]
        pieces = [self.model(part[None], cache)[0, -n:] for part in self.ids.split(list(cut))]
        got = torch.cat(pieces)[-n:].to(self.wide)
        truth = reference.forward(self.tensors, self.config, self.ids, dtype=self.wide, last=n)
        plain = reference.forward(self.tensors, self.config, self.ids, last=n).to(self.wide)
        logp = truth.log_softmax(-1)

        def figures(x: Tensor) -> tuple[float, float, float, float]:
            kl = (logp.exp() * (logp - x.log_softmax(-1))).sum(-1).mean().item()
            agree = (x.argmax(-1) == truth.argmax(-1)).double().mean().item()
            relative = (x - truth).norm(dim=-1) / truth.norm(dim=-1)
            return agree, kl, (x - truth).abs().max().item(), relative.median().item()

        pairs = [v for both in zip(figures(got), figures(plain), strict=True) for v in both]
        return EndToEnd(n, *pairs)

    def _window_edges(self, layer: LayerConfig) -> None:
        """Attention with queries that look at just one key: the oldest they may see, the one before it, the newest, the next.

        In a long window one key more or less hardly moves the output of real weights; here it decides it.
        """
        for op, phase, error, plain in window_edges(self.model, layer, self.wide):
            row = Comparison("window edge", phase, error, plain, layer.index, layer.label)
            self.report.comparisons.append(
                row if row.ok else Comparison(**{**asdict(row), "op": f"{op} [{self.report.backends[op]}]"})
            )
