"""A conversation: answers that are cut and continued, commands, and what a terminal sends."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_fast import Gemma4, cli, console, generate
from gemma4_fast.cache import KVCache
from gemma4_fast.chat import Chat, Conversation
from gemma4_fast.generate import Generation
from gemma4_fast.tokenizer import Tokenizer

GREEDY = ("--temperature", "0")
DRAWN = ("--temperature", "1", "--seed", "7")
QUESTION = "Good morning. Where is your sister?"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model() -> Gemma4:
    return Gemma4.from_pretrained("tiny", device="cpu", dtype="float64", check=False)


def chat_of(model: Gemma4, *options: str) -> Chat:
    return Chat(model, cli.parser(cli.COMMANDS).parse_args(["chat", "--json", *options]))


def lines(capsys: Capture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def interactive(chat: Chat, monkeypatch: pytest.MonkeyPatch, *messages: str) -> int:
    """Runs the chat as a person's who types these messages."""

    def typed(prompt: str, interrupted: str) -> Iterator[str]:
        yield from messages

    monkeypatch.setattr(console, "typed", typed)
    chat.interactive = True
    return chat.run()


# ---------------------------------------------------------------- cut and continued
@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_continue_gives_what_the_uncut_answer_would_have(
    options: tuple[str, ...],
    model: Gemma4,
    capsys: Capture,
) -> None:
    chat_of(model, *options, "--max-new-tokens", "24").answer(QUESTION)
    (uncut,) = lines(capsys)
    assert len(uncut["tokens"]) > 6
    cut = chat_of(model, *options, "--max-new-tokens", "5")
    cut.answer(QUESTION)
    while cut.cut and sum(len(t.answer) for t in cut.conversation.turns) < len(uncut["tokens"]):
        cut.resume()
    parts = lines(capsys)
    tokens = [token for part in parts for token in part["tokens"]]
    assert tokens[: len(uncut["tokens"])] == uncut["tokens"]
    assert "".join(part["text"] for part in parts).startswith(uncut["text"])
    assert [part["continued"] for part in parts] == [False] + [True] * (len(parts) - 1)
    assert [part["finish_reason"] for part in parts[:2]] == ["length", "length"]
    assert len(cut.conversation.turns) == 1
    assert all(part["prefilled_tokens"] == 0 for part in parts[1:])


def test_continue_reads_the_answer_again_where_nothing_is_kept(
    model: Gemma4,
    capsys: Capture,
) -> None:
    chat_of(model, *GREEDY, "--max-new-tokens", "12").answer(QUESTION)
    chat = chat_of(model, *GREEDY, "--max-new-tokens", "6")
    chat.answer(QUESTION)
    chat.paused = None
    chat.prefix = generate.Prefix()
    chat.resume()
    uncut, first, second = lines(capsys)
    assert first["tokens"] + second["tokens"] == uncut["tokens"]
    assert second["continued"] and second["prefilled_tokens"] == second["prompt_tokens"]
    assert len(chat.conversation.turns) == 1
    assert len(chat.conversation.turns[0].answer) == 12


def test_the_turn_after_a_continued_answer_has_all_of_it(model: Gemma4, capsys: Capture) -> None:
    whole = chat_of(model, *GREEDY, "--max-new-tokens", "10")
    whole.answer(QUESTION)
    whole.answer("And you?")
    pieces = chat_of(model, *GREEDY, "--max-new-tokens", "5")
    pieces.answer(QUESTION)
    pieces.resume()
    pieces.answer("And you?")
    _, want, _, _, got = lines(capsys)
    assert got["prompt_tokens"] == want["prompt_tokens"]
    assert got["tokens"] == want["tokens"][:5]
    assert got["prefilled_tokens"] == want["prefilled_tokens"] < got["prompt_tokens"]


def test_an_answer_is_limited_only_by_the_context(
    model: Gemma4,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "stop_ids", lambda model: ())
    chat = chat_of(model, *DRAWN)
    assert chat.limit == model.config.max_position_embeddings
    chat.limit = 120
    chat.answer("One.")
    (first,) = lines(capsys)
    assert first["finish_reason"] == "length"
    assert first["prompt_tokens"] + len(first["tokens"]) == chat.limit
    with pytest.raises(ValueError, match="fill the context"):
        chat.resume()
    chat.answer("Two.")  # the first turn makes room
    assert len(chat.conversation.turns) == 1


def test_a_full_context_forgets_the_oldest_turns_to_continue(
    model: Gemma4, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "stop_ids", lambda model: ())
    chat = chat_of(model, *DRAWN, "--max-new-tokens", "40")
    chat.limit = 120
    chat.answer("One.")
    chat.args.max_new_tokens = None
    chat.answer("Two.")
    half = len(chat.conversation.turns[1].answer)
    chat.args.max_new_tokens = 5
    chat.resume()
    assert [turn.user for turn in chat.conversation.turns] == ["Two."]
    assert len(chat.conversation.turns[0].answer) == half + 5
    assert lines(capsys)[-1]["continued"]


def test_what_was_cut_is_said(
    model: Gemma4,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = chat_of(model, *GREEDY, "--max-new-tokens", "3")
    chat.args.json = False
    chat.answer(QUESTION)
    err = capsys.readouterr().err
    assert "cut off after 3 tokens (--max-new-tokens); type /continue to resume" in err
    monkeypatch.setattr(generate, "stop_ids", lambda model: ())
    chat.args.max_new_tokens = None
    chat.limit = 120
    chat.answer(QUESTION)
    err = capsys.readouterr().err
    assert "cut off, since the context of 120 tokens is full; type /continue" in err


def test_more_new_tokens_than_the_context_are_clamped(model: Gemma4, capsys: Capture) -> None:
    chat = chat_of(model, *GREEDY, "--max-new-tokens", "5000")
    assert "--max-new-tokens 5000 is ignored: the context is 1024 tokens" in capsys.readouterr().err
    chat.answer(QUESTION)
    assert lines(capsys)[0]["tokens"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cache_grows_with_the_answer(
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    model = Gemma4.from_pretrained("tiny", device="cpu", dtype=dtype, check=False)
    monkeypatch.setattr(generate, "stop_ids", lambda model: ())
    chat = chat_of(model, *DRAWN, "--max-new-tokens", "150")
    chat.answer(QUESTION)
    sizes: list[int] = []
    resized = KVCache.resized

    def spy(self: KVCache, max_len: int, spare: int = 0) -> KVCache:
        sizes.append(max_len)
        return resized(self, max_len, spare)

    monkeypatch.setattr(KVCache, "resized", spy)
    monkeypatch.setattr(generate, "SMALLEST", 32)
    monkeypatch.setattr(generate, "ROOM", 4)
    small = chat_of(model, *DRAWN, "--max-new-tokens", "150")
    small.answer(QUESTION)
    want, got = lines(capsys)
    assert got["tokens"] == want["tokens"] and len(got["tokens"]) == 150
    assert sizes == sorted(set(sizes)) and len(sizes) >= 2


# ---------------------------------------------------------------- commands
def test_commands_that_cannot_be_done_say_why(model: Gemma4, tmp_path: Path) -> None:
    chat = chat_of(model, *GREEDY, "--max-new-tokens", "3")
    (tmp_path / "other.json").write_text("{}")
    for line, words in {
        "/foo": "unknown command /foo: /help",
        "/continue": "no answer to continue",
        "/continue now": "/continue takes no argument, got 'now'",
        "/quit now": "/quit takes no argument, got 'now'",
        "/exit now": "/exit takes no argument",
        "/hlep": "did you mean /help?",
        "/save": "/save FILE",
        "/save x.json": "nothing to save",
        "/load": "/load FILE",
        "/load nowhere.json": "nowhere.json: cannot be read",
        "/think": "/think on or /think off",
        "/think on": "does not support thinking",
    }.items():
        with pytest.raises(ValueError, match=words):
            chat.command(*line.partition(" ")[::2])
    chat.answer(QUESTION)
    for file in ("other.json", "."):
        with pytest.raises(ValueError, match="is not a saved conversation"):
            chat.command("/save", str(tmp_path / file))
    assert (tmp_path / "other.json").read_text() == "{}"
    with pytest.raises(ValueError, match="cannot be written"):
        chat.command("/save", "a" * 300)


def test_a_complete_answer_is_not_continued(
    model: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(generate, "stop_ids", lambda model: tuple(range(model.config.vocab_size)))
    chat = chat_of(model, *GREEDY)
    chat.answer(QUESTION)
    assert lines(capsys)[0]["finish_reason"] == "stop"
    with pytest.raises(ValueError, match="complete"):
        chat.resume()


def test_a_persons_mistakes_do_not_end_the_chat(
    model: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Chat, "answer", lambda self, text: asked.append(text))
    chat = chat_of(model)
    typed = ("/foo", "one", "/two\nlines\n", " /three", "/help", "/reset", "", "/quit", "never")
    assert interactive(chat, monkeypatch, *typed) == 0
    err = capsys.readouterr().err
    assert asked == ["one", "/two\nlines", "/three"]
    assert "unknown command /foo" in err and "/save FILE" in err
    assert err.endswith("conversation cleared\n")


def test_a_script_goes_on_after_a_mistake(
    model: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    file = tmp_path / "talk.json"
    script = f"{QUESTION}\n/foo\n/quit now\nAnd you?\n/save {file}\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", _Script(script))
    assert chat_of(model, *GREEDY, "--max-new-tokens", "3").run() == 2
    shown = capsys.readouterr()
    assert "gemma4-fast: error: unknown command /foo: /help" in shown.err
    assert "gemma4-fast: error: /quit takes no argument, got 'now'" in shown.err
    assert len(shown.out.splitlines()) == 2
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved if m["role"] == "user"] == [QUESTION, "And you?"]
    monkeypatch.setattr(sys, "stdin", _Script("/reset\n"))
    assert chat_of(model).run() == 0


def test_a_script_goes_on_when_memory_runs_out(
    model: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def fails(self: Chat, text: str) -> None:
        raise MemoryError

    monkeypatch.setattr(Chat, "answer", fails)
    monkeypatch.setattr(sys, "stdin", _Script("one\n/reset\n"))
    assert chat_of(model).run() == 2
    err = capsys.readouterr().err
    assert "not enough memory" in err and err.endswith("conversation cleared\n")


def test_quiet_leaves_only_errors(
    model: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    script = f"{QUESTION}\n/save {tmp_path / 'talk.json'}\n/reset\n/foo\n"
    options = (*GREEDY, "--max-new-tokens", "3")
    monkeypatch.setattr(sys, "stdin", _Script(script))
    chat_of(model, *options).run()
    loud = capsys.readouterr()
    assert "cut off" in loud.err or "saved" in loud.err
    monkeypatch.setattr(sys, "stdin", _Script(script))
    chat_of(model, *options, "--quiet").run()
    quiet = capsys.readouterr()
    assert len(quiet.out.splitlines()) == len(loud.out.splitlines()) == 1
    assert quiet.err.count("\n") == 1 and "unknown command /foo" in quiet.err


def test_memory_that_runs_out_leaves_the_conversation(
    model: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    chat = chat_of(model, *GREEDY, "--max-new-tokens", "3")
    chat.answer(QUESTION)

    def fails(self: KVCache, *_: object) -> KVCache:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(generate.Session, "_cache", fails)
    assert interactive(chat, monkeypatch, "And you?") == 0
    assert "not enough memory" in capsys.readouterr().err
    assert [turn.user for turn in chat.conversation.turns] == [QUESTION]


def test_saved_conversations_are_loaded(model: Gemma4, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "talk.json"
    first = chat_of(model, *GREEDY, "--max-new-tokens", "6", "--system", "Be brief.")
    first.answer(QUESTION)
    first.command("/save", str(file))
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert saved[1]["content"] == QUESTION
    assert saved[2]["content"] == lines(capsys)[0]["text"]
    second = chat_of(model, *GREEDY, "--max-new-tokens", "6")
    second.command("/load", str(file))
    assert second.conversation.messages() == saved
    second.command("/save", str(file))  # over a conversation
    for chat in (first, second):
        chat.resume()
        chat.answer("And you?")
    after = lines(capsys)
    assert after[0]["tokens"] == after[2]["tokens"] and after[1]["tokens"] == after[3]["tokens"]


BAD_FILES = {
    "{": "not a JSON file of messages",
    "[]": "at least one message",
    '"text"': "list of at least one message",
    '[{"role": "user"}]': "message 0",
    '[{"role": "user", "content": "a"}]': "no answer",
    '[{"role": "system", "content": "a"}]': "in turns",
    '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]': "in turns",
    '[{"role": "user", "content": [{"type": "image", "url": "a"}]}]': "an image",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_changes_nothing(
    text: str,
    model: Gemma4,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    chat = chat_of(model, *GREEDY, "--max-new-tokens", "3")
    chat.answer(QUESTION)
    before = chat.conversation, chat.conversation.messages(), chat.paused
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=BAD_FILES[text]) as caught:
        chat.command("/load", str(tmp_path / "bad.json"))
    assert "bad.json" in str(caught.value)
    assert (chat.conversation, chat.conversation.messages(), chat.paused) == before
    chat.resume()


def test_thinking_is_asked_of_the_template(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_pretrained(model.tokenizer.folder)
    switch = "{%- if enable_thinking -%}<|turn>think{%- endif -%}"
    tokenizer.chat_template = switch + (tokenizer.chat_template or "")
    monkeypatch.setattr(model, "_tokenizer", tokenizer)
    chat = chat_of(model)
    plain = chat.conversation.ask("one")
    chat.conversation.withdraw()
    chat.command("/think", "on")
    thinking = chat.conversation.ask("one")
    chat.conversation.answered(Generation(thinking, [300, 301]), frozenset())
    chat.command("/think", "off")
    assert len(thinking) > len(plain)
    assert chat.conversation.ask("two")[: len(plain)] == plain


def test_thoughts_are_not_saved(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = model.tokenizer
    words = tokenizer.encode("aside", add_bos=False), tokenizer.encode("Yes.", add_bos=False)
    marks = {"<|channel>": 6, "<channel|>": 7}
    monkeypatch.setattr(tokenizer, "token_id", marks.get)
    conversation = Conversation(tokenizer)
    prompt = conversation.ask("one")
    answer = [6, *words[0], 7, *words[1]]
    conversation.answered(Generation(prompt, answer), frozenset())
    assert conversation.messages()[1]["content"] == "Yes."
    assert conversation._ran is None  # the template is asked again, which takes them out


class _Script:
    """Standard input of a script: lines, and no terminal."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines(keepends=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def isatty(self) -> bool:
        return False


# ---------------------------------------------------------------- a terminal
READER = """
from gemma4_fast.console import typed
for message in typed("> ", "stopped"):
    print("GOT", [message], flush=True)
"""
READLINE = "import sys; sys.modules['readline'] = None\n"  # as where there is none


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
@pytest.mark.parametrize("before", ["", READLINE], ids=["readline", "plain"])
def test_a_pasted_block_is_one_message(before: str) -> None:
    sent = [b"one\n", b"a\nb\nc", b"x\r\ry\r", b"\x1b[200~p\nq\x1b[201~\r"]
    want = [["one"], ["a\nb\nc"], ["x\n\ny\n"], ["p\nq"]]
    if before:  # nobody strips the marks, so none are asked for
        sent.pop()
        want.pop()
    shown = _at_a_terminal(before + READER, sent)
    got = [line.partition("GOT ")[2] for line in shown.splitlines() if "GOT " in line]
    assert got == [repr(w) for w in want]


def _at_a_terminal(code: str, sent: list[bytes]) -> str:
    """What a Python program shows that is given these pieces, each after it asks, then Ctrl-D."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""

    def read_until(mark: bytes, times: int) -> None:
        nonlocal shown
        while shown.count(mark) < times:
            if not select.select([terminal], [], [], 60)[0]:
                raise AssertionError(f"no {mark!r} in {shown!r}")
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # how Linux tells the end
                piece = b""
            if not piece:
                return
            shown += piece

    for i, piece in enumerate(sent, 1):
        read_until(b"> ", i)
        os.write(terminal, piece)
        read_until(b"GOT ", i)
    read_until(b"> ", len(sent) + 1)
    os.write(terminal, b"\x04")
    read_until(b"the end", 1)
    os.waitpid(pid, 0)
    os.close(terminal)
    return shown.decode()
