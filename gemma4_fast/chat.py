"""`gemma4-fast chat`: a conversation through the checkpoint's own template, with one cache for all of it.

Two rules. What people type cannot become a special token: "<turn|>" in a message is seven characters and ends no turn.
And a turn only prefills what is new: its prompt is the token ids of the conversation so far, exactly as they ran, and
after them what the template adds.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gemma4_fast import console, terminal
from gemma4_fast.errors import out_of_memory
from gemma4_fast.explain import explain
from gemma4_fast.files import one_line, replacing
from gemma4_fast.generate import Generation, Prefix, Session, Stream, default_sampling
from gemma4_fast.spelling import did_you_mean
from gemma4_fast.tokenizer import Tokenizer, check_messages

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4

ANSWER_ROOM = 256  # tokens of the context that are kept free for an answer by forgetting old turns
RESUME = "type /continue to resume"
BANNER = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the conversation"
QUIT = ("/quit", "/exit")
HELP = """\
/continue      resume an answer that was cut off or stopped
/reset         clear the conversation
/save FILE     write the conversation to a file, as JSON messages
/load FILE     resume the conversation in a file
/think on|off  let the model think before it answers, if it supports thinking
/help          show this list
/quit, /exit   end the conversation, as Ctrl-D does
Ctrl-C stops an answer. A pasted block of lines is one message. Put a space before a message that
begins with "/"."""


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
    """The turns so far, and the prompt for the next answer.

    `variables` are passed to the chat template, such as {"enable_thinking": True}.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._specials = Specials(tokenizer)
        self._thought = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
        self._system = system
        self.variables: dict[str, Any] = {}
        self.turns: list[Turn] = []
        # The token ids that ran up to the end of the last answer; None if they cannot be continued.
        self._ran: list[int] | None = None

    def reset(self) -> None:
        self.turns = []
        self._ran = None

    def think(self, wanted: bool) -> None:
        """Set whether the template asks for thinking from the next answer on."""
        self.variables["enable_thinking"] = wanted
        self._ran = None

    def ask(self, text: str) -> list[int]:
        """A new turn -> the prompt's token ids, which begin with all that has run."""
        self.turns.append(Turn(text))
        return self._continued() or self._whole()

    def resume(self) -> list[int]:
        """The prompt that resumes the newest answer, which was cut off and ends this prompt."""
        return self._ran or [*self._whole(), *self.turns[-1].answer]

    def withdraw(self) -> None:
        """Take back the newest turn, which got no answer."""
        self.turns.pop()

    def drop_oldest(self) -> list[int] | None:
        """Forget the oldest turn and return the shorter prompt for the newest turn's answer.

        If part of that answer exists, the prompt ends with it. None if only one turn is left.
        """
        if len(self.turns) < 2:
            return None
        self.turns.pop(0)
        self._ran = None
        return [*self._whole(), *self.turns[-1].answer]

    def answered(self, result: Generation, stop_ids: frozenset[int]) -> None:
        """Record the answer to the newest turn, which may be incomplete."""
        ids = list(result.token_ids)
        if isinstance(result.stopped_by, str):  # tokens beyond the stop string are not part of the answer
            ids = self._tokenizer.encode(result.text or "", add_bos=False, allow_special=False)
        elif ids and ids[-1] in stop_ids:
            ids.pop()
        self.turns[-1].answer = ids
        # Special tokens in an answer mark thoughts or calls, which templates treat in ways of their own.
        plain = self._specials.ids.isdisjoint(ids) and not any(t in self._thought for t in ids)
        self._ran = [*result.prompt_ids, *ids] if plain else None

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages. The answers leave out the model's thoughts."""
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": self._said(turn.answer)})
        return messages

    def _said(self, answer: list[int]) -> str:
        opening, _ = self._thought
        said = []
        thinking = False
        for token in answer:
            if token in self._thought:
                thinking = token == opening
            elif not thinking:
                said.append(token)
        return self._tokenizer.decode(said)

    def replaced(self, messages: Sequence[dict[str, Any]]) -> Conversation:
        """A conversation that has these messages, and this one's tokenizer and variables.

        ValueError if the messages are not a conversation, or if the template rejects them.
        """
        check_messages(messages)
        texts = [(m["role"], _text(m["content"])) for m in messages]
        system = texts.pop(0)[1] if texts[0][0] in ("system", "developer") else None
        roles = [role for role, _ in texts]
        asked, answered = set(roles[::2]), set(roles[1::2])
        if asked != {"user"} or not answered <= {"assistant", "model"}:
            raise ValueError(
                "expected user and assistant messages in turns, after at most one system message, "
                f"got {', '.join(role for role, _ in texts[:6]) or 'none of them'}"
            )
        if len(roles) % 2:
            raise ValueError("the last message is the user's, and it has no answer")
        new = Conversation(self._tokenizer, system)
        new.variables = dict(self.variables)
        for (_, user), (_, answer) in zip(texts[::2], texts[1::2], strict=True):
            ids = self._tokenizer.encode(answer, add_bos=False, allow_special=False)
            new.turns.append(Turn(user, ids))
        new._whole()
        return new

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
        ids = self._encode(lambda literal: self._render(self._messages(literal)), add_bos=True)
        return ids or []

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(messages, **self.variables)

    def _continued(self) -> list[int] | None:
        """What has run, and then what the template writes after the last answer. None where that cannot be told."""
        if self._ran is None:
            return None
        place = marker()

        def render(literal: Literal) -> str | None:
            rendered = self._render(self._messages(literal, place))
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
        self.limit = model.config.max_position_embeddings
        self.cut = False  # whether the newest answer can be resumed
        self.paused: Reply | None = None  # what generates that answer, if it is still there
        if args.max_new_tokens is not None and args.max_new_tokens > self.limit:
            self._note(
                f"gemma4-fast: --max-new-tokens {args.max_new_tokens} is ignored: the context is "
                f"{self.limit} tokens, and an answer ends when it is full"
            )

    def _note(self, text: str) -> None:
        """A line on stderr, unless --quiet is given."""
        if not self.args.quiet:
            terminal.note(text)

    def reset(self) -> None:
        self.conversation.reset()
        self.prefix = Prefix()
        self._leave()

    def _leave(self) -> None:
        """Note that the newest answer can no longer be resumed."""
        self.cut = False
        self.paused = None

    def _fit(self, ids: list[int]) -> list[int]:
        """The prompt, from which the oldest turns are dropped until there is room to answer."""
        wanted = self.args.max_new_tokens or ANSWER_ROOM
        reserve = min(wanted, ANSWER_ROOM, self.limit // 4)
        dropped = 0
        while len(ids) + reserve > self.limit and (shorter := self.conversation.drop_oldest()):
            ids = shorter
            dropped += 1
        if len(ids) + reserve > self.limit:
            raise ValueError(
                f"the message makes a prompt of {len(ids)} tokens; with {reserve} for the answer "
                f"that exceeds the model's context of {self.limit}: shorten the message"
            )
        if dropped:
            what = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            full = f"the context of {self.limit} tokens is full"
            terminal.note(f"gemma4-fast: {full}, so {what} dropped; /reset clears the conversation")
        return ids

    def answer(self, text: str) -> None:
        """Run one turn: print the answer as it is generated, or one line of JSON.

        ValueError for a message that does not fit into the context.
        """
        try:
            ids = self._fit(self.conversation.ask(text))
        except ValueError:
            self.conversation.withdraw()
            raise
        self._leave()
        self._go_on(self._reply(ids))

    def resume(self) -> None:
        """Resume the newest answer after its last token, as if it had not been cut off.

        ValueError if there is none, if it is complete, or if it fills the context.
        """
        if not self.conversation.turns:
            raise ValueError("there is no answer to continue")
        if not self.cut:
            raise ValueError("the last answer is complete: there is nothing to continue")
        if self.paused is not None:
            self._go_on(self.paused)
            return
        try:
            ids = self._fit(self.conversation.resume())
        except ValueError as e:
            full = f"the message and its answer fill the context of {self.limit} tokens"
            raise ValueError(f"{full}; /reset clears the conversation") from e
        self._go_on(self._reply(ids, self.conversation.turns[-1].answer))

    def _reply(self, ids: list[int], before: Sequence[int] = ()) -> Reply:
        seed = (self.seed + self.answers) % 2**63
        session = Session(
            self.model,
            [ids],
            max_new_tokens=self.limit - len(ids),
            sampling=self.sampling,
            seed=seed,
            prefix=self.prefix,
        )
        return Reply(session, self.args.stop, seed, list(before))

    def _go_on(self, reply: Reply) -> None:
        """Run `reply` until it ends, is long enough or is interrupted, and print its text."""
        result = reply.begin()
        as_json = self.args.json
        new = len(result.prompt_ids) - len(self.prefix.ids)
        long = not reply.start and new > reply.session.prefill_chunk
        shown = long and not as_json and not self.args.quiet
        self.paused = None
        whole = True  # the reply is between two tokens
        with Interrupt(wanted=self.interactive) as interrupt:
            reply.interrupt = interrupt
            try:
                with terminal.progress_bar("reading", shown=shown) as reply.bar:
                    if reply.bar is not None:
                        reply.bar(0, new)
                    first = next(reply.steps, "")
                for piece in itertools.chain([first], reply.steps):
                    reply.text += piece
                    if not as_json:
                        print(piece, end="", flush=True)
                    if interrupt.hit or reply.made == self.args.max_new_tokens:
                        break
            except Stopped:
                whole = False
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                whole = False
                self.prefix = Prefix()  # the cache may be half-written
        interrupted = interrupt.hit and result.finish_reason is None
        if result.token_ids:
            self.conversation.answered(reply.whole(), reply.session.stop_ids)
            self.answers += reply.start == 0
            self.cut = result.finish_reason != "stop"
            if result.finish_reason is None and whole:
                self.paused = reply
        elif reply.before:
            self.cut = True
        else:
            self.conversation.withdraw()
        self._report(reply, interrupted)

    def _report(self, reply: Reply, interrupted: bool) -> None:
        """Report the part since `begin`: as JSON, or its timings and whether it was cut off."""
        result = reply.stream.result
        part = reply.part()
        prefilled = 0 if reply.start else reply.session.prefilled
        if not self.args.json:
            print(flush=True)
            if sys.stderr.isatty():
                stopped = ", stopped" if interrupted else ""
                self._note(f"[{terminal.timing_line(part, prefilled)}{stopped}]")
            if self.cut:
                self._note(f"gemma4-fast: {self._why_cut(result, interrupted)}")
            return
        line = {
            "turn": len(self.conversation.turns),
            "continued": bool(reply.start or reply.before),
            "prompt_tokens": len(result.prompt_ids),
            "prefilled_tokens": prefilled,
            "tokens": part.token_ids,
            "text": part.text,
            "finish_reason": "interrupted" if interrupted else result.finish_reason or "length",
            "stopped_by": result.stopped_by,
            "seed": reply.seed,
            "sampling": terminal.sampling_dict(self.sampling),
            "timings": terminal.rates(part, prefilled),
            "backends": {c.op: c.backend for c in self.chosen.choices},
            "device": self.chosen.device,
            "dtype": self.chosen.dtype,
        }
        terminal.print_json(line)

    def _why_cut(self, result: Generation, interrupted: bool) -> str:
        if interrupted:
            return f"stopped; {RESUME}"
        if result.finish_reason is None:
            wanted = self.args.max_new_tokens
            return f"cut off after {wanted} tokens (--max-new-tokens); {RESUME}"
        full = f"cut off, since the context of {self.limit} tokens is full"
        if len(self.conversation.turns) > 1:
            return f"{full}; type /continue to drop the oldest turns and resume"
        return f"{full}; /reset clears the conversation"

    # ------------------------------------------------------------ commands
    def run(self) -> int:
        """Answer until /quit or the end of the input. Returns the exit code.

        A message or command that fails is reported, and the conversation goes on. If standard input
        is not a terminal, the exit code then is 2.
        """
        code = 0
        if self.interactive:
            self._note(BANNER)
        for given in self._given():
            # A block of lines, and what begins with a space, is a message.
            command = given.startswith("/") and "\n" not in given.strip()
            text = given.strip()
            if command and text in QUIT:
                break
            if not text:
                continue
            try:
                if command:
                    self.command(*text.partition(" ")[::2])
                else:
                    self.answer(text)
            except ValueError as e:
                terminal.note(f"gemma4-fast: error: {one_line(e)}")
                code = 2
            except (MemoryError, RuntimeError) as e:
                if not out_of_memory(e):
                    raise
                self._out_of_memory()
                code = 2
        return 0 if self.interactive else code

    def _given(self) -> Iterator[str]:
        if self.interactive:
            yield from console.typed("> ", BANNER)
            return
        try:
            yield from sys.stdin
        except UnicodeDecodeError as e:
            raise ValueError(f"standard input is not UTF-8 text (byte {e.start})") from e

    def _out_of_memory(self) -> None:
        self.prefix = Prefix()
        self._leave()
        turns = self.conversation.turns
        if turns and not turns[-1].answer:
            self.conversation.withdraw()
        terminal.note(
            "\ngemma4-fast: error: not enough memory for a longer conversation; "
            "/save FILE keeps it, and /reset clears it and frees its memory"
        )

    def command(self, name: str, argument: str) -> None:
        """Run one command, other than /quit and /exit without an argument.

        ValueError if the command is unknown, has a wrong argument, or cannot be done.
        """
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: terminal.note(HELP),
            "/reset": lambda _: self.clear(),
            "/continue": lambda _: self.resume(),
            "/save": self.save,
            "/load": self.load,
            "/think": self.think,
        }
        if name not in (*commands, *QUIT):
            hint = did_you_mean(name, (*commands, *QUIT))
            raise ValueError(
                f"unknown command {name[:40]}: /help lists the commands; to send a message that "
                f"begins with / put a space before it{hint}"
            )
        argument = argument.strip()
        if argument and name in ("/help", "/reset", "/continue", *QUIT):
            raise ValueError(f"{name} takes no argument, got {argument[:40]!r}")
        commands[name](argument)

    def clear(self) -> None:
        """Clear the conversation and say so."""
        self.reset()
        self._note("conversation cleared")

    def save(self, name: str) -> None:
        """Write the conversation to the file of that name, as JSON messages.

        ValueError if there is no conversation yet, if the file exists and holds something else,
        or if it cannot be written.
        """
        file = _file("/save", name)
        if not self.conversation.turns:
            raise ValueError("there is nothing to save yet")
        if os.path.exists(file):  # False for a name too long, where Path.exists raises
            try:
                check_messages(read_messages(file))
            except ValueError as e:
                what = f"{file} exists and is not a saved conversation"
                raise ValueError(f"{what}; give another name") from e
        text = json.dumps(self.conversation.messages(), indent=2, ensure_ascii=False)
        try:
            with replacing(file) as beside:
                beside.write_text(f"{text}\n", encoding="utf-8")
        except OSError as e:
            raise ValueError(f"{file}: cannot be written: {e.strerror or e}") from e
        count = len(self.conversation.turns)
        self._note(f"saved {count} turn{'s' * (count > 1)} to {file}")

    def load(self, name: str) -> None:
        """Replace this conversation with the one in the file of that name.

        ValueError if the file holds no conversation; then nothing has changed.
        """
        file = _file("/load", name)
        messages = read_messages(file)
        try:
            loaded = self.conversation.replaced(messages)
        except ValueError as e:
            raise ValueError(f"{file}: {one_line(e)}") from e
        self.reset()
        self.conversation = loaded
        self.cut = True  # it may have been when it was saved
        count = len(loaded.turns)
        self._note(f"loaded {count} turn{'s' * (count > 1)} from {file}")

    def think(self, argument: str) -> None:
        """Turn thinking "on" or "off".

        ValueError for any other argument, and if the chat template does not support thinking.
        """
        if argument not in ("on", "off"):
            raise ValueError(f"expected /think on or /think off, got {argument[:40]!r}")
        if "enable_thinking" not in (self.model.tokenizer.chat_template or ""):
            raise ValueError("this model's chat template does not support thinking")
        self.conversation.think(argument == "on")
        self.paused = None
        self._note(f"thinking is {argument}")


class Reply:
    """An answer that is being generated. It can pause after any token and resume later.

    before: tokens of the answer that are already in the prompt, if it was cut off before.
    """

    def __init__(self, session: Session, stop: list[str], seed: int, before: list[int]) -> None:
        self.session = session
        self.seed = seed
        self.before = before
        self.bar: Callable[[int, int], None] | None = None
        self.interrupt: Interrupt | None = None
        self.stream = Stream(session, stop, self._on_prefill)
        self.steps = self.stream.steps

    def _on_prefill(self, done: int, total: int) -> None:
        """Called after each chunk of the prompt, when the cache is consistent."""
        if self.bar is not None:
            self.bar(done, total)
        if self.interrupt is not None and self.interrupt.hit:
            raise Stopped

    def begin(self) -> Generation:
        """Begin a part of the answer. Returns the Generation so far, which will grow."""
        result = self.stream.result
        self.start = len(result.token_ids)
        self.text = ""
        self._seconds = result.decode_seconds
        return result

    @property
    def made(self) -> int:
        """The number of tokens since `begin`."""
        return len(self.stream.result.token_ids) - self.start

    def part(self) -> Generation:
        """The part of the answer since `begin`."""
        result = self.stream.result
        return Generation(
            result.prompt_ids,
            result.token_ids[self.start :],
            text=self.text,
            prefill_seconds=0.0 if self.start else result.prefill_seconds,
            decode_seconds=result.decode_seconds - self._seconds,
        )

    def whole(self) -> Generation:
        """The whole answer, from its first token."""
        result = self.stream.result
        if not self.before:
            return result
        prompt = result.prompt_ids[: len(result.prompt_ids) - len(self.before)]
        text = self.session.model.tokenizer.decode(self.before) + (result.text or "")
        ids = [*self.before, *result.token_ids]
        return Generation(prompt, ids, text=text, stopped_by=result.stopped_by)


def _text(content: str | Sequence[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _file(command: str, name: str) -> Path:
    if not name:
        raise ValueError(f"{command} needs the name of a file: {command} FILE")
    try:
        return Path(name).expanduser()
    except RuntimeError as e:
        raise ValueError(f"{name}: there is no such user") from e


def read_messages(file: Path) -> Any:
    """The JSON in a file of messages. ValueError names the file and says what is wrong with it."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not a JSON file of messages: {one_line(e)}") from e
    return data["messages"] if isinstance(data, dict) and "messages" in data else data
