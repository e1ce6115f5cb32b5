"""Text generation: prefill in chunks, a decode loop, stop conditions, streaming.

A `Session` runs a batch of prompts token by token; `generate` and `stream` turn its tokens into text. Prompts may differ in
length: they travel end to end, without padding.
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma4_fast.cache import KVCache
from gemma4_fast.errors import CheckpointError
from gemma4_fast.graph import DecodeGraph
from gemma4_fast.keywords import explicit
from gemma4_fast.sampling import Sampling

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

Prompt = str | Sequence[int] | Sequence[dict[str, str]] | Tensor
DEFAULT_NEW_TOKENS = 256
ROOM = 256  # a cache is for a multiple of so many tokens: the next prompt, a little longer, may take it over
SMALLEST = 1024  # tokens that a kept cache has room for at first


@dataclass
class Generation:
    """What became of one prompt. `token_ids` holds every new token, a stop token too; `text` leaves special tokens out and
    ends before a stop string (None if the model has no tokenizer). logprobs are natural logs of the model's own
    distribution, before temperature and filters; top_logprobs[i] are the likeliest (id, logprob) at token i."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None  # "stop" (a stop token or string) or "length"
    stopped_by: int | str | None = None  # the stop token's id, or the stop string
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prefill_seconds: float = 0.0  # of the whole batch
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Token:
    """One new token of one sequence."""

    sequence: int
    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


@dataclass
class Prefix:
    """A cache kept between calls, and the tokens it holds: a chat's next turn prefills only what is new. New values that were
    written into the model's parameters since, or into a part of it alone, are not seen: start with another one."""

    cache: KVCache | None = None
    ids: list[int] = field(default_factory=list)
    model: Gemma4 | None = None  # whose keys and values they are,
    changes: int = 0  # and its `changes` then
    graph: DecodeGraph | None = None  # the recorded decode step over that cache


class Session:
    """A batch of prompts on their way. Arguments are checked, and nothing has run, when the constructor returns."""

    def __init__(
        self,
        model: Gemma4,
        prompts: list[list[int]],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        logprobs: int | None = None,
        prefill_chunk: int = 2048,
        prefix: Prefix | None = None,
    ) -> None:
        self.model, self.prompts = model, prompts
        self.sampling = sampling or Sampling()
        self.logprobs, self.prefill_chunk, self.prefix = logprobs, prefill_chunk, prefix
        self.choose: Sampling | None = None  # what the decode step itself chooses by, if it can and no more is asked for
        config = model.config
        self._check_prompts(config.vocab_size)
        self.max_new_tokens = self._room(max_new_tokens, config.max_position_embeddings)
        for name, value, low in (("logprobs", logprobs, 0), ("prefill_chunk", prefill_chunk, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if logprobs is not None and logprobs > config.vocab_size:
            raise ValueError(f"logprobs must be at most vocab_size = {config.vocab_size}, got {logprobs}")
        stops: Any = stop_ids(model) if stop_token_ids is None else stop_token_ids
        if isinstance(stops, int):  # True too, which is refused below
            stops = (stops,)
        if not isinstance(stops, (list, tuple, set, frozenset)):
            raise ValueError(f"stop_token_ids must be a token id or a list of them, got {type(stops).__name__}")
        if bad := [t for t in stops if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < config.vocab_size]:
            raise ValueError(f"stop token ids must lie in [0, {config.vocab_size}), got {bad[0]!r}")
        self.stop_ids = frozenset(stops)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ValueError(f"seed must be an integer in [0, 2^63), got {seed!r}")
        first = secrets.randbits(48) if seed is None else seed
        self.seeds = [(first + b) % 2**63 for b in range(len(prompts))]
        self.prefill_seconds = self.decode_seconds = 0.0
        self.prefilled = 0  # tokens of the prompts that a kept prefix did not hold
        self.graph: DecodeGraph | None = None  # while it runs, with the cache

    def _check_prompts(self, vocab: int) -> None:
        if not self.prompts:
            raise ValueError("the batch is empty: expected at least one prompt")
        for b, ids in enumerate(self.prompts):
            if not ids:
                raise ValueError(f"prompt {b} is empty: expected at least one token")
            if bad := [t for t in ids if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocab]:
                raise ValueError(f"prompt {b}: token ids must be integers in [0, {vocab}), got {bad[0]!r}")

    def _room(self, wanted: int | None, limit: int) -> int:
        longest = max(map(len, self.prompts))
        if wanted is None:
            wanted = min(DEFAULT_NEW_TOKENS, max(1, limit - longest))
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {wanted!r}")
        if longest + wanted > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens = {wanted} exceed max_position_embeddings = {limit}"
            )
        return wanted

    def run(self, on_prefill: Callable[[int, int], None] | None = None) -> Iterator[list[Token]]:
        """Yields, step by step, the new token of every sequence that is still going. `finish(b)` takes one out.

        on_prefill(done, total) is called after each chunk of the prompts, in tokens.
        """
        between = False  # two steps: all that was written has been counted
        try:
            for tokens in self._run(on_prefill):
                between = True
                yield tokens
                between = False
            between = True
        finally:
            if between and self.graph is not None and self.prefix is None:
                self.model.spares.give(self.graph)
            self.graph = None

    def _run(self, on_prefill: Callable[[int, int], None] | None) -> Iterator[list[Token]]:
        batch = len(self.prompts)
        self.going = [True] * batch
        numbers = self._numbers()
        start = time.perf_counter()
        cache, hidden = self._prefill(on_prefill)
        graph = self.graph = self._decode_graph(cache)
        uniform = next(numbers)
        with self.model.running():
            if self.logprobs is None and graph.can_choose(hidden, self.sampling):
                self.choose = self.sampling
            tokens, ids = self._choose(graph.finish(hidden, self.choose, uniform), uniform, 0)
        self.prefill_seconds = time.perf_counter() - start
        yield tokens
        for step in range(1, self.max_new_tokens):
            if not any(self.going):
                return
            start = time.perf_counter()
            going, uniform = [int(g) for g in self.going], next(numbers)
            if self.prefix is not None and cache.host_lens[0] == cache.max_len:
                cache = self.prefix.cache = cache.resized(self._capacity(cache.max_len + 1))
                graph = self.graph = self._decode_graph(cache)
                ids = ids.clone()  # it may be memory of the old graph
            with self.model.running():
                run = partial(graph.run, ids, going, choose=self.choose, uniform=uniform)
                out = self._pass(run, [tokens[0].id], cache)
                tokens, ids = self._choose(out, uniform, step)
            self.decode_seconds += time.perf_counter() - start
            yield tokens

    def _decode_graph(self, cache: KVCache) -> DecodeGraph:
        """The one that came or is kept with the cache, or a new one."""
        if self.prefix is None:
            return self.graph or DecodeGraph(self.model, cache)
        kept = self.prefix.graph
        if kept is None or kept.cache is not cache or kept.model is not self.model:
            kept = self.prefix.graph = DecodeGraph(self.model, cache)
        return kept

    def finish(self, sequence: int) -> None:
        """This sequence wants no more tokens."""
        self.going[sequence] = False

    def _prefill(self, on_prefill: Callable[[int, int], None] | None) -> tuple[KVCache, Tensor]:
        """All prompts into the cache, `prefill_chunk` tokens at a time -> the cache, and each last token's hidden state."""
        cache, done = self._cache()
        total = sum(map(len, self.prompts))
        self.prefilled = total - sum(done)
        hidden = None
        with self.model.running():
            while any(d < len(p) for d, p in zip(done, self.prompts, strict=True)):
                budget, new = self.prefill_chunk, []
                for have, prompt in zip(done, self.prompts, strict=True):
                    new.append(min(len(prompt) - have, budget))
                    budget -= new[-1]
                flat = [t for d, n, p in zip(done, new, self.prompts, strict=True) for t in p[d : d + n]]
                ids = torch.tensor(flat, device=self.model.device)
                done = [d + n for d, n in zip(done, new, strict=True)]
                ends = [n > 0 and d == len(p) for d, n, p in zip(done, new, self.prompts, strict=True)]
                step = self.model.model.step(new, cache)
                h = self._pass(partial(self.model.model, ids, step, cache, last=ends), flat, cache)
                hidden = h if hidden is None else torch.where(torch.tensor(ends, device=h.device)[:, None], h, hidden)
                if on_prefill is not None:
                    on_prefill(sum(done), total)
        assert hidden is not None  # every prompt has at least one token to run
        return cache, hidden

    def _pass(self, run: Callable[[], Tensor], flat: list[int], cache: KVCache) -> Tensor:
        """One pass of the model over the new tokens `flat`. Until it ends a kept prefix has no cache: an interrupt would
        leave it half-written."""
        if self.prefix is None:
            return run()
        self.prefix.cache = None
        hidden = run()
        self.prefix.ids.extend(flat)
        self.prefix.cache = cache
        return hidden

    def _cache(self) -> tuple[KVCache, list[int]]:
        """A cache with room for everything, and how many tokens of each prompt it already holds."""
        room = max(map(len, self.prompts)) + self.max_new_tokens
        if self.prefix is None:
            batch, none = len(self.prompts), [0] * len(self.prompts)
            self.graph = self.model.spares.take(self.model, batch, room)
            if self.graph is not None:
                return self.graph.cache, none
            return self.model.new_cache(batch, min(self.model.config.max_position_embeddings, -(-room // ROOM) * ROOM)), none
        if len(self.prompts) != 1:
            raise ValueError(f"a kept prefix serves one prompt, got {len(self.prompts)}")
        kept, prompt = self.prefix, self.prompts[0]
        usable = kept.model is self.model and kept.changes == self.model.changes
        cache = kept.cache if usable else None
        room = len(prompt) + min(self.max_new_tokens, ROOM)  # the cache grows with the answer
        # The last prompt token always runs again, for its hidden state: less than all is kept.
        if (
            cache is None
            or cache.host_lens != [len(kept.ids)]
            or len(kept.ids) >= len(prompt)
            or kept.ids != prompt[: len(kept.ids)]
        ):
            kept.cache = kept.graph = None  # the old one's memory may be needed for the new one
            cache = self.model.new_cache(1, self._capacity(room))
            kept.cache = cache
            kept.ids = []
            kept.model = self.model
            kept.changes = self.model.changes
        elif cache.max_len < room:
            cache = kept.cache = cache.resized(self._capacity(room))
        return cache, [len(kept.ids)]

    def _capacity(self, tokens: int) -> int:
        """The size, in tokens, of a kept cache for at least `tokens`: each is twice the last."""
        limit = self.model.config.max_position_embeddings
        return min(limit, max(SMALLEST, 1 << (tokens - 1).bit_length()))

    def _numbers(self) -> Iterator[Tensor | None]:
        """What tokens are drawn by, step by step, [B] in [0, 1): a sequence's own, alone or in a batch, on any device. ROOM
        steps at a time: a chat's turn has room for many more than it takes."""
        if self.sampling.greedy:
            yield from itertools.repeat(None)
        sources = [random.Random(seed) for seed in self.seeds]  # not torch's generators, of whose seeds 32 bits count
        while True:
            drawn = [[source.getrandbits(24) for source in sources] for _ in range(ROOM)]
            yield from (torch.tensor(drawn) / (1 << 24)).to(self.model.device)

    def _choose(self, out: Tensor, uniform: Tensor | None, step: int) -> tuple[list[Token], Tensor]:
        """Hidden states [B, H], or with `self.choose` the ids [B] -> the tokens of the sequences still going, and all ids [B]
        on the device."""
        values, top = None, None
        # The likeliest never from the logits: softcapped and rounded to bf16, the largest have equals.
        ids = out if self.choose is not None else self.model.choose(out, self.sampling, uniform)
        chosen = ids.tolist()
        if min(chosen) < 0:  # an idle sequence that has gone wrong is no one's concern, but its id must be one
            ids = ids.clamp(min=0)
        if self.logprobs is not None:
            logp = self.model.logits(out).float().log_softmax(-1)
            values = logp.gather(-1, ids[:, None]).squeeze(-1).tolist()
            top = [t.tolist() for t in logp.topk(self.logprobs, dim=-1)] if self.logprobs else None
        for b, token in enumerate(chosen):
            if self.going[b] and token < 0:
                raise FloatingPointError(
                    f"sequence {b}: the model's activations are not finite at new token {step}; "
                    "the self-check shows whether weights or kernels are at fault (fp16 can "
                    "overflow: use bfloat16)"
                )
        tokens = []
        for b, token in enumerate(chosen):
            if self.going[b]:
                best = None if top is None else list(zip(top[1][b], top[0][b], strict=True))
                tokens.append(Token(b, token, None if values is None else values[b], best))
        return tokens, ids


def stop_ids(model: Gemma4) -> tuple[int, ...]:
    """The checkpoint's stop tokens: generation_config.json's, else config.json's."""
    eos = model.generation_config.get("eos_token_id")
    if eos is None:
        return model.config.eos_token_id
    return tuple(eos) if isinstance(eos, list) else (eos,)


def default_sampling(model: Gemma4, **given: Any) -> Sampling:
    """What the caller gave; for the rest what generation_config.json recommends, and greedy if it recommends nothing."""
    recommended = model.generation_config if model.generation_config.get("do_sample") else {}
    names = ("temperature", "top_k", "top_p", "min_p")
    settings = {n: recommended[n] for n in names if recommended.get(n) is not None}
    if recommended:
        settings.setdefault("temperature", 1.0)
    settings.update({n: v for n, v in given.items() if v is not None})
    if "temperature" not in settings and settings:  # a filter alone asks for sampling
        settings["temperature"] = 1.0
    return Sampling(**settings)


def encode_prompts(model: Gemma4, prompt: Any) -> tuple[list[list[int]], bool]:
    """Any accepted form of prompt -> token ids of each, and whether it was a single one.

    One prompt: text, token ids (list or 1-D tensor), or chat messages (list of {"role", "content"}). Several: a list of
    those, or a 2-D tensor.
    """
    if isinstance(prompt, Tensor):
        if prompt.dtype not in (torch.int64, torch.int32) or prompt.dim() not in (1, 2):
            raise ValueError(f"a prompt tensor must be 1-D or 2-D int64, got {list(prompt.shape)} {prompt.dtype}")
        prompt = prompt.tolist()
    if isinstance(prompt, str) or (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], (int, dict))):
        return [_encode(model, prompt)], True
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(f"a prompt is text, token ids or chat messages, or a list of these, got {type(prompt).__name__}")
    return [_encode(model, p) for p in prompt], False


def _encode(model: Gemma4, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty: expected at least one character")
        return model.tokenizer.encode(prompt)
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(f"a prompt is text, token ids or chat messages, got {type(prompt).__name__}")
    if prompt and isinstance(prompt[0], dict):
        return model.tokenizer.encode(model.tokenizer.apply_chat_template(list(prompt)))
    return list(prompt)


class Stream:
    """Iterates over the text of one generation in pieces that never split a character. `result` is whole at the end."""

    def __init__(self, session: Session, stop: Sequence[str], on_prefill: Callable[[int, int], None] | None) -> None:
        from gemma4_fast.tokenizer import StopStrings, TextStream

        self._session = session
        self._stop = StopStrings(stop)
        self._text = TextStream(session.model.tokenizer)
        self.result = Generation(session.prompts[0], text="")
        self.steps = self._run(on_prefill)  # the text of each token, often "": it may stop anywhere
        self._pieces = filter(None, self.steps)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, on_prefill: Callable[[int, int], None] | None) -> Iterator[str]:
        for tokens in self._session.run(on_prefill):
            piece = record(self.result, tokens[0], self._session, self._text, self._stop)
            self._times()
            yield piece
            if self.result.finish_reason is not None:
                break

    def _times(self) -> None:
        self.result.prefill_seconds = self._session.prefill_seconds
        self.result.decode_seconds = self._session.decode_seconds


def record(result: Generation, token: Token, session: Session, text: Any, stop: Any) -> str:
    """Note one token in `result`, and end it if a stop condition is met. Returns the new text ("" without a tokenizer)."""
    result.token_ids.append(token.id)
    if token.logprob is not None:
        if result.logprobs is None:
            result.logprobs = []
        result.logprobs.append(token.logprob)
    if token.top is not None:
        if result.top_logprobs is None:
            result.top_logprobs = []
        result.top_logprobs.append(token.top)
    piece = "" if text is None else stop.put(text.put(token.id))
    if token.id in session.stop_ids:
        result.finish_reason, result.stopped_by = "stop", token.id
    elif len(result.token_ids) == session.max_new_tokens:
        result.finish_reason = "length"
    if text is not None and result.finish_reason is not None:
        piece += stop.put(text.end()) + stop.end()
    if stop is not None and stop.hit is not None:
        result.finish_reason, result.stopped_by = "stop", stop.hit
    if result.finish_reason is not None:
        session.finish(token.sequence)
    if text is not None:
        result.text = (result.text or "") + piece
    return piece


@explicit
def generate(
    model: Gemma4,
    prompt: Any,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: int | Sequence[int] | None = None,
    logprobs: int | None = None,
    prefill_chunk: int = 2048,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generation | list[Generation]:
    """Continue one prompt, which gives a Generation, or several, which give a list of them.

    `Gemma4.generate` describes the arguments; `encode_prompts` says what a prompt may be.
    """
    from gemma4_fast.tokenizer import StopStrings, TextStream

    words = _stop_strings(stop)
    prompts, single = encode_prompts(model, prompt)
    session = Session(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=default_sampling(model, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        seed=seed,
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
    )
    tokenizer = _tokenizer_or_none(model)
    if tokenizer is None and words:
        raise ValueError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
    stops = [StopStrings(words) for _ in prompts]
    texts = [None if tokenizer is None else TextStream(tokenizer) for _ in prompts]
    results = [Generation(p) for p in prompts]
    for tokens in session.run(on_prefill):
        for t in tokens:
            record(results[t.sequence], t, session, texts[t.sequence], stops[t.sequence])
    for r in results:
        r.prefill_seconds, r.decode_seconds = session.prefill_seconds, session.decode_seconds
    return results[0] if single else results


def _stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    words = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"stop must be a text or a list of texts, the stop strings, got {stop!r}")
    return list(words)


def _tokenizer_or_none(model: Gemma4) -> Any:
    try:
        return model.tokenizer
    except CheckpointError:
        if model.path is not None and (model.path / "tokenizer.json").exists():
            raise  # there is one, and it is broken
        return None


@explicit
def stream(
    model: Gemma4,
    prompt: Any,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: int | Sequence[int] | None = None,
    logprobs: int | None = None,
    prefill_chunk: int = 2048,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Stream:
    """Like `generate` for one prompt, as an iterator of text pieces; its `result` is the Generation so far."""
    words = _stop_strings(stop)
    prompts, single = encode_prompts(model, prompt)
    if not single:
        raise ValueError("stream takes one prompt; use generate for several")
    session = Session(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=default_sampling(
            model,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        ),
        seed=seed,
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
    )
    return Stream(session, words, on_prefill)


def perplexity(model: Gemma4, ids: Sequence[int], *, window: int = 512, stride: int = 256) -> tuple[float, int]:
    """exp(mean negative log-likelihood) of `ids`, and how many tokens it counts: all of them.

    Windows of `window` tokens, each after a <bos>, start every `stride`; a window counts only the tokens that no earlier one
    has counted.
    """
    if not 1 <= stride <= window or not ids:
        raise ValueError(f"expected 1 <= stride <= window and at least one token, got {stride}, {window}, {len(ids)} tokens")
    total, counted = 0.0, 0
    for start in range(0, len(ids), stride):
        piece = torch.tensor([model.config.bos_token_id, *ids[start : start + window]], device=model.device)
        fresh = start + piece.shape[0] - 1 - counted
        if fresh > 0:
            logp = model(piece[None, :-1])[0, -fresh:].float().log_softmax(-1)
            total -= logp.gather(-1, piece[-fresh:, None]).double().sum().item()
            counted += fresh
    return math.exp(total / counted), counted
