"""`gemma4-fast demo`: text from a model, its speed beside two others, the kernels that ran, and whether they are right."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gemma4_fast import ops, terminal
from gemma4_fast.explain import explain
from gemma4_fast.generate import Generation, generate, stream
from gemma4_fast.reference import model as reference
from gemma4_fast.tables import render
from gemma4_fast.verify import verify

if TYPE_CHECKING:
    from gemma4_fast.explain import Explanation
    from gemma4_fast.model import Gemma4
    from gemma4_fast.report import Report

PROMPT, SEED, NEW_TOKENS = "It is a truth universally acknowledged", 1813, 80
ROUNDS = 3
PROMPT_TOKENS, DECODE_TOKENS, REFERENCE_TOKENS = 128, 32, 4
SLOW = 20.0  # seconds of warm-up above which one round has to do
SECOND_COPY = 4 * 2**30  # bytes of weights above which transformers does not get a copy of its own
ABOUT = "gemma4-fast: Gemma 4 on the kernels that fit this machine, checked here against plain PyTorch."
# What a library that is not ours can raise while it loads and runs a model. It gets a row in a table; it must not end
# the demo of this package.
_FOREIGN_FAULTS = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)

Run = tuple[list[int], float, float]  # new token ids, seconds to the first, seconds from there to the last


@dataclass
class Contender:
    """One way to run the model greedily, and what it took in each round."""

    name: str
    run: Callable[[], Run]
    note: str = ""
    ids: list[int] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)  # tokens/s, by round
    decode: list[float] = field(default_factory=list)

    def round(self, prompt_tokens: int) -> None:
        self.ids, first, rest = self.run()
        self.prefill.append(prompt_tokens / first)
        self.decode.append((len(self.ids) - 1) / rest)

    def to_dict(self) -> dict[str, Any]:
        spread = {
            k: {"median": statistics.median(v), "min": min(v), "max": max(v)} if v else None
            for k, v in (("prefill_tok_s", self.prefill), ("decode_tok_s", self.decode))
        }
        return {"name": self.name, **spread, "new_tokens": len(self.ids), "note": self.note}


def ours(model: Gemma4, prompt: list[int]) -> Contender:
    def run() -> Run:
        result = generate(model, prompt, max_new_tokens=DECODE_TOKENS, temperature=0.0, stop_token_ids=())
        assert isinstance(result, Generation)
        return result.token_ids, result.prefill_seconds, result.decode_seconds

    return Contender("gemma4-fast", run)


def plain(model: Gemma4, prompt: list[int]) -> Contender:
    tensors = model.state_dict()

    def run() -> Run:
        ids, times = list(prompt), [time.perf_counter()]
        for _ in range(REFERENCE_TOKENS):
            given = torch.tensor(ids, device=model.device)
            with torch.inference_mode():
                ids.append(int(reference.forward(tensors, model.config, given, last=1)[-1].argmax()))
            times.append(time.perf_counter())
        return ids[len(prompt) :], times[1] - times[0], times[-1] - times[1]

    return Contender("its reference", run, "no cache: runs the whole text again for each token")


class _Clock:
    """A transformers streamer that notes when it is given something: first the prompt, then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def theirs(model: Gemma4, prompt: list[int]) -> Contender:
    """transformers on the same checkpoint, with its defaults. Raises one of _FOREIGN_FAULTS where it cannot."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers import __version__ as version
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    other = AutoModelForCausalLM.from_pretrained(model.path, dtype=model.dtype, local_files_only=True)
    other = other.to(model.device).eval()
    # No stop token, so that all make the same number of tokens; a fresh config, as the checkpoint's asks for sampling.
    other.generation_config = GenerationConfig(do_sample=False, max_new_tokens=DECODE_TOKENS, pad_token_id=0)

    def run() -> Run:
        ids = torch.tensor([prompt], device=model.device)
        clock, start = _Clock(), time.perf_counter()
        with torch.inference_mode():
            out = other.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock)
        new = out[0, len(prompt) :].tolist()
        return new, clock.times[1] - start, clock.times[-1] - clock.times[1]

    implementation = getattr(other.config, "_attn_implementation", "?")
    return Contender(f"transformers {version}", run, f"its defaults ({implementation} attention)")


def measure(
    contenders: Sequence[Contender],
    prompt_tokens: int,
    quiet: bool = False,
) -> list[Contender]:
    """Warm up, then run the contenders in turn; each round starts with another one.

    A foreign fault becomes a note. quiet: show no progress.
    """

    def attempt(c: Contender, act: Callable[[], object]) -> None:
        try:
            act()
        except _FOREIGN_FAULTS as e:
            if not c.name.startswith("transformers"):
                raise
            c.note, c.prefill, c.decode, c.ids = failure(e), [], [], []
            going.remove(c)

    going = list(contenders)
    start = time.perf_counter()
    for c in contenders:
        attempt(c, c.run)
    rounds = ROUNDS if time.perf_counter() - start < SLOW else 1
    with terminal.progress_bar("measuring", shown=not quiet) as bar:
        if bar is not None:
            bar(0, rounds)
        for i in range(rounds):
            for c in [*contenders[i % len(contenders) :], *contenders[: i % len(contenders)]]:
                if c in going:
                    attempt(c, lambda c=c: c.round(prompt_tokens))  # type: ignore[misc]
            if bar is not None:
                bar(i + 1, rounds)
    return list(contenders)


def failure(e: BaseException) -> str:
    if isinstance(e, ModuleNotFoundError) and e.name == "transformers":
        return "not installed"
    return f"failed: {type(e).__name__}: {' '.join(str(e).split())[:100]}"


def benchmark(model: Gemma4, prompt: list[int], quiet: bool = False) -> list[Contender]:
    contenders = [ours(model, prompt), plain(model, prompt)]
    weights = sum(t.nbytes for t in model.state_dict().values())
    other = Contender("transformers", lambda: ([], 0.0, 0.0))
    if weights > SECOND_COPY:
        size = terminal.size(weights)
        other.note = f"not measured: it would need {size} for its own copy of the weights"
    else:
        try:
            contenders.append(theirs(model, prompt))
        except _FOREIGN_FAULTS as e:
            other.note = failure(e)
    measured = measure(contenders, len(prompt), quiet)
    return measured if len(measured) == 3 else [*measured, other]


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def agreement(rows: Sequence[Contender]) -> list[dict[str, Any]]:
    """How many of its greedy tokens each other contender shares with ours before they part."""
    first, *rest = rows
    return [{"with": c.name, "agree": agreeing(first.ids, c.ids), "of": min(len(first.ids), len(c.ids))} for c in rest if c.ids]


def speed_table(rows: Sequence[Contender], prompt_tokens: int, where: str) -> str:
    def figure(values: list[float]) -> str:
        if not values:
            return "-"
        middle, low, high = (
            f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in (statistics.median(values), min(values), max(values))
        )
        return middle if len(values) == 1 else f"{middle} ({low} to {high})"

    rounds = max(len(c.decode) for c in rows)
    return render(
        ("tokens/s, batch 1", f"prefill, {prompt_tokens} tokens", "decode", "new tokens", ""),
        [(c.name, figure(c.prefill), figure(c.decode), str(len(c.ids) or "-"), c.note) for c in rows],
        title=f"speed: {where}; greedy, median of {rounds} interleaved rounds (least to most)",
    )


def kernels_line(chosen: Explanation) -> str:
    """The decisions in a few words: "torch: rms_norm, linear, ...", and what was passed over for all of them."""
    by_backend: dict[str, list[str]] = {}
    for c in chosen.choices:
        by_backend.setdefault(c.backend, []).append(c.op)
    lines = [f"  {backend}: {', '.join(names)}" for backend, names in by_backend.items()]
    passed: dict[tuple[str, str], int] = {}
    for c in chosen.choices:
        for item in c.passed_over.items():
            passed[item] = passed.get(item, 0) + 1
    for backend in ops.AUTO_ORDER:
        for (name, why), count in passed.items():
            if name == backend:
                scope = "" if count == len(chosen.choices) else f" ({count} of {len(chosen.choices)} ops)"
                lines.append(f"  not {name}{scope}: {why}")
    return "\n".join(lines)


class Demo:
    """The five parts, in the order in which they are shown."""

    def __init__(self, model: Gemma4, args: Namespace, report: Report | None) -> None:
        self.model, self.args, self.quick = model, args, report
        self.prompt = PROMPT
        self.seed = SEED if args.seed is None else args.seed

    def tell(self) -> Generation:
        """Streams the text; returns what became of it."""
        from rich.console import Console
        from rich.text import Text

        args, console = self.args, None if self.args.json else Console(highlight=False)
        options = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "min_p", "stop")}
        if args.model == "tiny":  # made from whole books, it may end one after a sentence; then it just goes on
            options["stop_token_ids"] = ()
        limit = self.model.config.max_position_embeddings
        room = limit - len(self.model.tokenizer.encode(self.prompt))
        count = min(args.max_new_tokens or NEW_TOKENS, room)
        pieces = stream(self.model, self.prompt, max_new_tokens=count, seed=self.seed, **options)
        if console is not None:
            console.print(Text(self.prompt, style="bold"), end="", soft_wrap=True)
        for piece in pieces:
            if console is not None:
                console.print(Text(piece, style="cyan"), end="", soft_wrap=True)
                console.file.flush()
        if console is not None:
            console.print("\n")
        return pieces.result

    def check_at_load(self) -> str:
        """What the self-check said when the model was loaded, or at an earlier start."""
        if self.quick is not None:
            return self.quick.verdict()
        return "skipped" if self.model.verdict is None else "passed at an earlier start"

    def run(self) -> int:
        model, as_json, start = self.model, self.args.json, time.perf_counter()
        where = f"{str(model.dtype).removeprefix('torch.')} on {model.device}, CPU threads: {torch.get_num_threads()}"
        if not as_json:
            print(ABOUT)
            print(f"Model: {self.args.model}, {where}. ", end="")
            print(f"Self-check at load: {self.check_at_load()}\n", flush=True)
        text = self.tell()
        seen = [*text.prompt_ids, *text.token_ids]
        room = model.config.max_position_embeddings - DECODE_TOKENS
        prompt = list(itertools.islice(itertools.cycle(seen), min(PROMPT_TOKENS, room)))
        rows = benchmark(model, prompt, self.args.quiet)
        agree = agreement(rows)
        if not as_json:
            print(speed_table(rows, len(prompt), where).rstrip("\n"))
            for a in agree:
                print(f"greedy tokens that agree with {a['with']}: the first {a['agree']} of {a['of']}", end="")
                print("" if a["agree"] == a["of"] else " (in half precision they part where two tokens are nearly even)")
        chosen = explain(model)
        if not as_json:
            print(f"\nkernels: {chosen.dtype} on {chosen.device}\n{kernels_line(chosen)}\n", flush=True)
        with terminal.progress_bar("checking", shown=not self.args.quiet) as bar:
            report = verify(model, level="full", progress=bar)
        seconds = time.perf_counter() - start
        if as_json:
            terminal.print_json(self._json(text, rows, agree, chosen, report, seconds))
        else:
            print(f"self-check against the reference, every layer and end to end: {report.verdict()}")
            print(f"({seconds:.1f} s. Next: gemma4-fast generate, chat, check, info; see --help.)")
        return 0 if report.ok else 1

    def _json(
        self,
        text: Generation,
        rows: Sequence[Contender],
        agree: list[dict[str, Any]],
        chosen: Explanation,
        report: Report,
        seconds: float,
    ) -> dict[str, Any]:
        return {
            "model": self.args.model,
            "device": chosen.device,
            "dtype": chosen.dtype,
            "threads": torch.get_num_threads(),
            "prompt": self.prompt,
            "seed": self.seed,
            "tokens": text.token_ids,
            "text": text.text,
            "finish_reason": text.finish_reason,
            "timings": terminal.rates(text, len(text.prompt_ids)),
            "speed": [c.to_dict() for c in rows],
            "agreement": agree,
            "backends": {c.op: c.backend for c in chosen.choices},
            "check": json.loads(report.to_json()),
            "seconds": seconds,
            "versions": terminal.versions(),
        }
