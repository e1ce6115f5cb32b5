"""`gemma4-fast chat`: a conversation through the checkpoint's own template, with one cache for all of it.

Two rules. What people type cannot become a special token: "<turn|>" in a message is seven characters and ends no turn.
And a turn only prefills what is new: its prompt is the token ids of the conversation so far, exactly as they ran, and
after them what the template adds.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from gemma4_fast import terminal
from gemma4_fast.explain import explain
from gemma4_fast.generate import DEFAULT_NEW_TOKENS, Generation, Prefix, Session, Stream, default_sampling
from gemma4_fast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


class Specials:
    """The spellings of a tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids = tokenizer, tokenizer.special_ids
        spelled = sorted({tokenizer.token(i) or "" for i in self.ids} - {""}, key=len, reverse=True)
        self.whole = re.compile(f"({_any(spelled)})" if spelled else r"((?!))")
        self.heads = {s[:n] for s in spelled for n in range(1, len(s))}
        self.tails = {s[n:] for s in spelled for n in range(1, len(s))}
        self.longest = max(map(len, spelled), default=0)

    def in_text(self, text: str) -> bool:
        """Whether encoding gives a special token: a tokenizer may also normalise text into one that it does not spell."""
        return bool(text) and not self.ids.isdisjoint(self.tokenizer.encode(text, add_bos=False))


class Literal:
    """Carries text through a template in such a way that it comes out as text.

    Each spelling of a special token in a message is swapped for a random word before the template is rendered. Then
    what was rendered is encoded piece by piece: the words' originals as plain characters, all the rest as usual.
    `borders` swaps also what, at the ends of a message, begins or ends such a spelling: the template might complete it.
    """

    def __init__(self, specials: Specials, *, borders: bool) -> None:
        self._specials, self._borders = specials, borders
        self._originals: dict[str, str] = {}

    def protect(self, text: str) -> str:
        """`text`, without white space at its ends, safe to give to a template."""
        head, middle, tail = self._cut(text.strip())
        pieces = self._specials.whole.split(middle)  # what was found stands at the odd places
        swapped = [self._swap(p) if i % 2 or self._specials.in_text(p) else p for i, p in enumerate(pieces)]
        return "".join([self._swap(head), *swapped, self._swap(tail)])

    def _cut(self, text: str) -> tuple[str, str, str]:
        if not self._borders:
            return "", text, ""
        sizes = range(min(self._specials.longest, len(text)), 0, -1)
        start = next((n for n in sizes if text[:n] in self._specials.tails), 0)
        end = next((n for n in sizes if n <= len(text) - start and text[-n:] in self._specials.heads), 0)
        return text[:start], text[start : len(text) - end], text[len(text) - end :]

    def _swap(self, text: str) -> str:
        if not text:
            return text
        word = marker()
        self._originals[word] = text
        return word

    def encode(self, rendered: str, *, add_bos: bool) -> list[int]:
        """Token ids of what a template made of protected text."""
        encode = self._specials.tokenizer.encode
        if not self._originals:
            return encode(rendered, add_bos=add_bos)
        first, *rest = re.split(f"({_any(self._originals)})", rendered)
        ids = encode(first, add_bos=add_bos)
        for piece in rest:
            original = self._originals.get(piece)
            ids += encode(piece if original is None else original, add_bos=False, allow_special=original is None)
        return ids


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


def marker() -> str:
    """A word that no one types by chance or can guess, and that templates leave alone."""
    return f"m{secrets.token_hex(12)}m"


@dataclass
class Turn:
    """What was asked, and the answer's token ids without the one that ended it."""

    user: str
    answer: list[int] = field(default_factory=list)


class Conversation:
    """The turns so far, and the prompt for the next answer."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer, self._specials, self._system = tokenizer, Specials(tokenizer), system
        self.turns: list[Turn] = []
        self._ran: list[int] | None = None  # the ids that ran up to the last answer's end, where they can be continued

    def reset(self) -> None:
        self.turns, self._ran = [], None

    def ask(self, text: str) -> list[int]:
        """A new turn -> the prompt's token ids, which begin with all that has run."""
        self.turns.append(Turn(text))
        return self._continued() or self._whole()

    def withdraw(self) -> None:
        """Take back the newest turn, which got no answer."""
        self.turns.pop()

    def drop_oldest(self) -> list[int] | None:
        """Forget the oldest turn -> the shorter prompt; None if only the newest turn is left."""
        if len(self.turns) < 2:
            return None
        self.turns.pop(0)
        self._ran = None
        return self._whole()

    def answered(self, result: Generation, stop_ids: frozenset[int]) -> None:
        """Note the answer to the newest turn."""
        ids = list(result.token_ids)
        if isinstance(result.stopped_by, str):  # tokens beyond the stop string are not part of the answer
            ids = self._tokenizer.encode(result.text or "", add_bos=False, allow_special=False)
        elif ids and ids[-1] in stop_ids:
            ids.pop()
        self.turns[-1].answer = ids
        # Special tokens in an answer mark thoughts or calls, which templates treat in ways of their own.
        plain = self._specials.ids.isdisjoint(ids)
        self._ran = [*result.prompt_ids, *ids] if plain else None

    def _messages(self, literal: Literal, last_answer: str | None = None) -> list[dict[str, str]]:
        """The turns, ready for the template; the newest answer may be given in another form."""
        answers = [self._spell(turn.answer, literal) for turn in self.turns[:-1]]
        if last_answer is not None:
            answers[-1] = last_answer
        messages = [] if self._system is None else [{"role": "system", "content": literal.protect(self._system)}]
        for i, turn in enumerate(self.turns):
            messages.append({"role": "user", "content": literal.protect(turn.user)})
            if i < len(answers):
                messages.append({"role": "assistant", "content": answers[i]})
        return messages

    def _spell(self, ids: list[int], literal: Literal) -> str:
        """An answer as the template expects it: its special tokens are special, and what it merely spells is not."""
        text = ""
        for special, run in itertools.groupby(ids, self._specials.ids.__contains__):
            if special:
                text += "".join(self._tokenizer.token(token) or "" for token in run)
            else:
                text += literal.protect(self._tokenizer.decode(list(run)))
        return text

    def _encode(self, render: Callable[[Literal], str | None], *, add_bos: bool) -> list[int] | None:
        """With messages encoded as part of their surroundings where that is safe, as transformers does it."""
        strict, usual = (self._encode_once(render, borders, add_bos) for borders in (True, False))
        if strict is None or usual is None:
            return strict
        special = self._specials.ids
        same = [t for t in strict if t in special] == [t for t in usual if t in special]
        return usual if same else strict

    def _encode_once(self, render: Callable[[Literal], str | None], borders: bool, add_bos: bool) -> list[int] | None:
        literal = Literal(self._specials, borders=borders)
        rendered = render(literal)
        return None if rendered is None else literal.encode(rendered, add_bos=add_bos)

    def _whole(self) -> list[int]:
        ids = self._encode(lambda literal: self._tokenizer.apply_chat_template(self._messages(literal)), add_bos=True)
        return ids or []

    def _continued(self) -> list[int] | None:
        """What has run, and then what the template writes after the last answer. None where that cannot be told."""
        if self._ran is None:
            return None
        place = marker()

        def render(literal: Literal) -> str | None:
            rendered = self._tokenizer.apply_chat_template(self._messages(literal, place))
            return rendered.partition(place)[2] if rendered.count(place) == 1 else None

        new = self._encode(render, add_bos=False)
        return self._ran + new if new else None


class Interrupt:
    """Inside: the first Ctrl-C sets `hit`, for the answer to end between two tokens with its cache in order.

    A second one raises KeyboardInterrupt wherever the program is, and without `wanted` the first one does.
    """

    def __init__(self, *, wanted: bool) -> None:
        # Elsewhere than in the main thread Python forbids handlers.
        self._on, self.hit = wanted and threading.current_thread() is threading.main_thread(), False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True

    def __enter__(self) -> Interrupt:
        if self._on:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            signal.signal(signal.SIGINT, self._before)


class Stopped(Exception):
    """Ctrl-C came while the prompt was still being read."""


class Chat:
    """A model, a conversation, and the cache that both share."""

    def __init__(self, model: Gemma4, args: Namespace) -> None:
        self.model, self.args = model, args
        self.conversation = Conversation(model.tokenizer, args.system)
        self.prefix = Prefix()
        self.seed = secrets.randbits(48) if args.seed is None else args.seed
        given = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "min_p")}
        self.sampling = default_sampling(model, **given)
        self.chosen = explain(model)
        self.answers, self.interactive = 0, sys.stdin.isatty()

    def reset(self) -> None:
        self.conversation.reset()
        self.prefix = Prefix()

    def _fit(self, text: str) -> tuple[list[int], int]:
        """The prompt for a new turn, old turns dropped until it fits, and the most tokens its answer may have."""
        limit = self.model.config.max_position_embeddings
        wanted = self.args.max_new_tokens
        reserve = min(DEFAULT_NEW_TOKENS, limit // 4) if wanted is None else wanted
        ids, dropped = self.conversation.ask(text), 0
        while len(ids) + reserve > limit and (shorter := self.conversation.drop_oldest()) is not None:
            ids, dropped = shorter, dropped + 1
        if len(ids) + reserve > limit:
            self.conversation.withdraw()
            raise ValueError(
                f"the message makes a prompt of {len(ids)} tokens; with {reserve} for the answer that exceeds "
                f"the model's context of {limit}. Shorten it, or lower --max-new-tokens"
            )
        if dropped:
            what = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            terminal.note(f"gemma4-fast: the context of {limit} tokens is full: {what} forgotten (/reset starts afresh)")
        return ids, min(DEFAULT_NEW_TOKENS, limit - len(ids)) if wanted is None else wanted

    def answer(self, text: str) -> None:
        """One turn: prints the answer as it comes, or one line of JSON."""
        args, as_json = self.args, self.args.json
        ids, room = self._fit(text)
        cache, held = self.prefix.cache, len(self.prefix.ids)
        seed = (self.seed + self.answers) % 2**63
        session = Session(self.model, [ids], max_new_tokens=room, sampling=self.sampling, seed=seed, prefix=self.prefix)
        long = len(ids) - held > session.prefill_chunk and not as_json
        with Interrupt(wanted=self.interactive) as interrupt:

            def on_prefill(done: int, total: int) -> None:  # the cache and its record agree when this is called
                if bar is not None:
                    bar(done, total)
                if interrupt.hit:
                    raise Stopped

            stream = Stream(session, args.stop, on_prefill)
            result = stream.result
            try:
                with terminal.progress_bar("reading", shown=long) as bar:
                    first = next(stream, "")
                for piece in itertools.chain([first], stream):
                    if not as_json:
                        print(piece, end="", flush=True)
                    if interrupt.hit:
                        break
            except Stopped:
                pass
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.prefix = Prefix()  # the second one came in the midst of a step: the cache may be half-written
        reused = held if self.prefix.cache is cache and cache is not None else 0
        self._note(result, interrupt.hit and result.finish_reason is None, seed, len(ids) - reused, session.stop_ids)

    def _note(self, result: Generation, interrupted: bool, seed: int, prefilled: int, stop_ids: frozenset[int]) -> None:
        if result.token_ids:
            self.conversation.answered(result, stop_ids)
            self.answers += 1
        else:
            self.conversation.withdraw()
        if not self.args.json:
            print(flush=True)
            if sys.stderr.isatty():
                terminal.note(f"[{terminal.timing_line(result, prefilled)}{', stopped' if interrupted else ''}]")
            return
        line = {
            "turn": len(self.conversation.turns),
            "prompt_tokens": len(result.prompt_ids),
            "prefilled_tokens": prefilled,
            "tokens": result.token_ids,
            "text": result.text,
            "finish_reason": "interrupted" if interrupted else result.finish_reason,
            "stopped_by": result.stopped_by,
            "seed": seed,
            "sampling": terminal.sampling_dict(self.sampling),
            "timings": terminal.rates(result, prefilled),
            "backends": {c.op: c.backend for c in self.chosen.choices},
            "device": self.chosen.device,
            "dtype": self.chosen.dtype,
        }
        terminal.print_json(line)

    def run(self) -> int:
        """Until /exit or the end of the input. What cannot be served ends a script, but not a person's session."""
        if self.interactive:
            terminal.note(HELP)
        for line in _lines(self.interactive):
            text = line.strip()
            if text == "/exit":
                break
            if text == "/reset":
                self.reset()
            elif text:
                try:
                    self.answer(text)
                except ValueError as e:
                    if not self.interactive:
                        raise
                    terminal.note(f"gemma4-fast: error: {' '.join(str(e).split())}")
        return 0


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        try:
            yield from sys.stdin
        except UnicodeDecodeError as e:
            raise ValueError(f"standard input is not UTF-8 text (byte {e.start})") from e
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - input() then has line editing and a history
    prompt = "> "
    while True:
        try:
            if not sys.stdout.isatty():  # input() would write its prompt there, into the answers
                print(prompt, end="", file=sys.stderr, flush=True)
            yield input(prompt if sys.stdout.isatty() else "")
        except EOFError:
            terminal.note("")
            return
        except KeyboardInterrupt:
            terminal.note(f"\n{HELP}")
