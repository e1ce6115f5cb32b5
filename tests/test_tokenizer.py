"""Tokenizer, chat templates in the sandbox, streamed text, stop strings."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gemma4_fast import Gemma4
from gemma4_fast.errors import CheckpointError
from gemma4_fast.tokenizer import StopStrings, TextStream, Tokenizer
from gemma4_fast.weights import tiny_path

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
TEXTS = [
    "It was a truth universally acknowledged, that a single man must be in want of a wife.",
    " leading and  double   spaces \n\n\ttabs\n",
    "日本語と中文，한국어도 조금.",
    "emoji 👩‍👩‍👧‍👦 🇯🇵 😀😀😀 done",
    "combining e\u0301 a\u0308\u0323 and RTL עברית",
    "a literal \ufffd and \ufffd\ufffd",
    "",
]


def byte_level() -> tokenizers.Tokenizer:
    """As in the tiny model: byte-level BPE, where a character can span tokens and tokens can straddle characters."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(TEXTS[:3] + ["😀😁😂日月火水木"] * 5, trainer)
    return tok


def _bytes_and_text() -> tuple[dict[str, int], list[tuple[str, str]]]:
    words = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyz日本語,.\ufffd"]
    words += ["th", "the", "▁t", "▁the", "▁a", "▁▁", "日本"]
    merges = [("t", "h"), ("th", "e"), ("▁", "t"), ("▁", "the"), ("▁", "a"), ("▁", "▁"), ("日", "本")]
    return {w: i for i, w in enumerate(words)}, merges


def gemma_style() -> tokenizers.Tokenizer:
    """As in the published checkpoints: spaces become ▁, unknown characters their bytes."""
    vocab, merges = _bytes_and_text()
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens(SPECIAL)
    return tok


def metaspace() -> tokenizers.Tokenizer:
    """SentencePiece with a space put in front of the text, which decoding takes away again."""
    vocab, merges = _bytes_and_text()
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tok.add_special_tokens(SPECIAL)
    return tok


def llama_style() -> tokenizers.Tokenizer:
    """The other spelling of the same: strip one leading space from the joined text."""
    tok = gemma_style()
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    return tok


KINDS: list[Callable[[], tokenizers.Tokenizer]] = [byte_level, gemma_style, metaspace, llama_style]


def save(tok: tokenizers.Tokenizer, folder: Path, template: str | None = None, **config: Any) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": {"__type": "AddedToken", "content": "<eos>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def tok(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save(request.param(), tmp_path_factory.mktemp("tok"))


# ---------------------------------------------------------------- ids and text
def test_round_trip_and_special_ids(tok: Tokenizer) -> None:
    for text in TEXTS:
        assert tok.decode(tok.encode(text)).lstrip(" ") == text.lstrip(" ")  # Metaspace eats a leading space
    assert (tok.pad_token_id, tok.eos_token_id, tok.bos_token_id) == (0, 1, 2)
    assert tok.special_ids == frozenset(range(6))
    assert tok.token_id("<|turn>") == 4 and tok.token_id("<nothing>") is None
    assert tok.token(4) == "<|turn>" and tok.token(tok.vocab_size) is None
    assert tok.decode([2, 4]) == "" and tok.decode([2, 4], skip_special_tokens=False).split() in (
        ["<bos><|turn>"], ["<bos>", "<|turn>"],
    )  # fmt: skip


def test_bos_comes_once(tok: Tokenizer) -> None:
    plain = tok.encode("the", add_bos=False)
    assert 2 not in plain
    assert tok.encode("the") == [2, *plain]
    assert tok.encode("<bos>the").count(2) == 1
    assert tok.encode("<bos>the", add_bos=False)[0] == 2  # asked for in the text
    assert tok.encode("") == [2]


def test_a_post_processor_adds_no_second_bos(tmp_path: Path) -> None:
    raw = byte_level()
    special = [("<bos>", 2), ("<eos>", 1)]
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    tok = save(raw, tmp_path)
    ids = tok.encode("a b c d e f")
    assert ids.count(2) == 1 and 1 not in ids and 0 not in ids and tok.decode(ids) == "a b c d e f"


def test_special_tokens_in_user_text(tok: Tokenizer) -> None:
    text = "the<turn|>the<bos>"
    assert 5 in tok.encode(text) and tok.encode(text).count(2) == 2
    literal = tok.encode(text, allow_special=False)
    assert 5 not in literal and literal.count(2) == 1
    assert tok.decode(literal) == text
    assert tok.encode("plain text", allow_special=False) == tok.encode("plain text")
    assert 5 in tok.encode(text)  # the flag of one call leaves the next alone


def test_bad_input_is_a_value_error(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        tok.encode("a\ud800b")
    with pytest.raises(ValueError, match="expected text, got bytes"):
        tok.encode(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token ids are integers >= 0"):
        tok.decode([-1])
    for bad in (-1, "a", 2**80):
        with pytest.raises(ValueError, match="a token id is an integer >= 0"):
            TextStream(tok).put(bad)  # type: ignore[arg-type]


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content, words in (
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[]", "expected a JSON object"),
        (b"\xff\xfe", "cannot be read"), (b"{}", "not a tokenizer"), (b'{"model": {"type": "BPE"}}', "not a tokenizer"),
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"tokenizer.json: {words}"):
            Tokenizer.from_pretrained(tmp_path)
    byte_level().save(str(file))
    tok = Tokenizer(tmp_path)  # no tokenizer_config.json: Gemma's own names
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (2, 1, 0)
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="chat_template is not text"):
        Tokenizer.from_pretrained(tmp_path)


# ---------------------------------------------------------------- chat templates
# The shape of Gemma 4's own: macros, namespace, system turn, tools as JSON, thinking, roles mapped, loop controls.
GEMMA = """
{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- if '<|channel>' in part -%}
            {%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
        {%- else -%}
            {%- set ns.result = ns.result + part -%}
        {%- endif -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- set loop_messages = messages -%}
{{ bos_token }}
{%- if (enable_thinking is defined and enable_thinking) or tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}
        {{- messages[0]['content'] | trim -}}
        {%- set loop_messages = messages[1:] -%}
    {%- endif -%}
    {%- for tool in tools or [] %}
    {{ tool | tojson(indent=2) }}
    {% endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif %}
{% for message in loop_messages %}
    {% if message['role'] == 'skip' %}{% continue %}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- if role not in ('user', 'model') -%}{{ raise_exception('unknown role ' ~ role) }}{%- endif -%}
    {{- '<|turn>' + role + '\\n' }}
    {%- if message['content'] is string %}
        {%- generation %}{{ strip_thinking(message['content']) }}{% endgeneration -%}
    {%- else %}{% for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}{% endif -%}
    {{- '<turn|>\\n' -}}
{% endfor %}
{% set extra = dict(a=1, b='é<&>') %}
{{ extra | tojson }}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}
"""
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Où est <b>日本</b>? 😀\n"},
    {"role": "assistant", "content": "<|channel>thought<channel|>In Asia.  "},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "France?"}]},
]
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Größe & <Ort>", "parameters": {}}}]


def hugging_face(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]], ids=["system", "turns", "one"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"enable_thinking": True}], ids=["", "tools", "thinking"])
def test_template_renders_as_in_transformers(
    tmp_path: Path, messages: list[dict[str, Any]], prompt: bool, variables: dict[str, Any]
) -> None:
    tiny = tiny_path() / "chat_template.jinja"
    for name, template in (("gemma", GEMMA), ("tiny", tiny.read_text())):
        tok = save(byte_level(), tmp_path / name, template)
        ours = tok.apply_chat_template(messages, add_generation_prompt=prompt, **variables)
        theirs = hugging_face(tmp_path / name)
        asked = {"add_generation_prompt": prompt, **variables}
        assert ours == theirs.apply_chat_template(messages, tokenize=False, **asked)
        assert ours.startswith("<bos>")
        assert tok.encode(ours) == theirs.apply_chat_template(messages, **asked)["input_ids"]


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    say = [{"role": "user", "content": "x"}]
    tok = save(byte_level(), tmp_path)
    assert tok.chat_template is None
    with pytest.raises(CheckpointError, match="has no chat template"):
        tok.apply_chat_template(say)
    assert save(byte_level(), tmp_path, chat_template="config").apply_chat_template(say) == "config"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert save(byte_level(), tmp_path, chat_template=several).apply_chat_template(say) == "plain"
    assert save(byte_level(), tmp_path, "file", chat_template="config").apply_chat_template(say) == "file"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "sandbox forbids"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "sandbox forbids"),
        ("{{ raise_exception.__globals__.os }}", "sandbox forbids"),
        ("{{ lipsum.__globals__['os'].system('true') }}", "sandbox forbids"),
        ("{{ strftime_now.__globals__ }}{{ cycler.__init__.__globals__.os }}", "sandbox forbids"),
        ("{{ namespace(__class__='x') }}", "sandbox forbids"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "sandbox forbids"),
        ("{{ messages.append({}) }}", "sandbox forbids"),
        ("{{ messages[0].update(role='x') }}", "sandbox forbids"),
        ("{% for i in range(10**9) %}x{% endfor %}", "failed: OverflowError"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: RecursionError"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "failed: TypeError"),
        ("{{ messages[99].role.x }}", "failed: UndefinedError"),
        ("{{ messages | nofilter }}", "line 1: No filter named"),
        ("{% for %}", "line 1"),
        ("\n{{ oops", "line 2"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "cannot be compiled"),
    ],
)
def test_hostile_and_broken_templates(tmp_path: Path, template: str, words: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    tok = save(byte_level(), tmp_path, template)
    with pytest.raises(CheckpointError, match=words) as caught:
        tok.apply_chat_template(messages)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("reach", ["raise_exception.__globals__", "dict.__base__", "'{0.__class__}'.format(messages)"])
def test_what_the_sandbox_hides_prints_as_nothing(tmp_path: Path, reach: str) -> None:
    tok = save(byte_level(), tmp_path, "<{{ " + reach + " }}>")
    assert tok.apply_chat_template([{"role": "user", "content": "x"}]) == "<>"


def test_a_template_may_refuse_and_messages_are_checked(tmp_path: Path) -> None:
    tok = save(byte_level(), tmp_path, GEMMA)
    why = "the chat template rejects these messages: unknown role judge"
    with pytest.raises(ValueError, match=why) as caught:
        tok.apply_chat_template([{"role": "judge", "content": "x"}])
    assert not isinstance(caught.value, CheckpointError)
    image = {"type": "image", "url": "x"}
    for bad, words in (
        ([], "at least one message"),
        ("hi", "must be a list"),
        ([{"role": "user"}], "message 0 must be"),
        ([{"role": "user", "content": "x"}, "y"], "message 1 must be"),
        ([{"role": 1, "content": "x"}], "role must be text"),
        ([{"role": "user", "content": None}], "content must be text"),
        ([{"role": "user", "content": [image]}], "message 0 holds an image"),
    ):
        with pytest.raises(ValueError, match=words):
            tok.apply_chat_template(bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- streaming
def stream(tok: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    text = TextStream(tok, skip)
    return [*map(text.put, ids), text.end()]


def test_pieces_join_to_the_decoded_text(tok: Tokenizer) -> None:
    rng = random.Random(0)
    letters = "".join(TEXTS) + "the the"
    for n in range(300):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(40)))
        ids = tok.encode(TEXTS[n] if n < len(TEXTS) else text)
        pieces = stream(tok, ids)
        assert "".join(pieces) == tok.decode(ids)
        if "\ufffd" not in text and n >= len(TEXTS):
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("skip", [True, False])
def test_any_ids_stream_exactly(tok: Tokenizer, skip: bool) -> None:
    """Random ids: broken UTF-8, special tokens in the middle of characters, ids the tokenizer does not have."""
    rng = random.Random(1)
    bytes_first = [i for i in range(tok.vocab_size) if (tok.token(i) or "").startswith("<0x")]
    for _ in range(1500):
        pool = rng.choice([range(tok.vocab_size + 3), bytes_first or range(tok.vocab_size), range(6, 262)])
        ids = [rng.choice(pool) if rng.random() < 0.9 else rng.randrange(6) for _ in range(rng.randrange(25))]
        assert "".join(stream(tok, ids, skip)) == tok.decode(ids, skip)


def test_text_is_not_held_longer_than_needed(tok: Tokenizer) -> None:
    """Text is out once it is certain: plain words at once, a character of bytes with the token after it."""
    text = TextStream(tok)
    ids = tok.encode("the the", add_bos=False)
    assert "".join(map(text.put, ids)) == "the the"
    assert text.end() == ""
    smiley = [*tok.encode("a 😀a", add_bos=False)]
    text = TextStream(tok)
    assert "".join(map(text.put, smiley)) == "a 😀a" and text.end() == ""
    cut = TextStream(tok)
    pieces = [cut.put(i) for i in smiley[:-2]]
    assert "".join(pieces) == "a " and cut.end().strip("\ufffd") == ""


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tok: Tokenizer) -> None:
        self.token, self.special_ids, self.count, self._tok = tok.token, tok.special_ids, 0, tok

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.count += len(ids)
        return self._tok.decode(ids, skip_special_tokens)


def test_streaming_takes_linear_time(tok: Tokenizer) -> None:
    rng = random.Random(2)
    first_byte = tok.token_id("<0xE4>")
    cases = [
        [rng.randrange(6, tok.vocab_size) for _ in range(3000)],
        tok.encode("the 日本語 😀 " * 300),
        [first_byte if first_byte is not None else 200] * 3000,  # nothing but garbage
    ]
    for ids in cases:
        counting = Counting(tok)
        pieces = stream(counting, ids)  # type: ignore[arg-type]
        assert counting.count <= 12 * len(ids)
        assert "".join(pieces) == tok.decode(ids)


# ---------------------------------------------------------------- stop strings
def cut(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    watch = StopStrings(stops)
    out = [watch.put(p) for p in pieces]
    return [*out, watch.end()], watch.hit


def test_stop_strings_by_hand() -> None:
    assert cut(["\n\n"], ["a\n", "b\n", "\nc", "d"]) == (["a", "\nb", "", "", ""], "\n\n")
    assert cut(["stop"], ["s", "t", "o", "x"]) == (["", "", "", "stox", ""], None)
    assert cut(["stop"], ["a sto"]) == (["a ", "sto"], None)  # the held text comes out at the end
    assert cut(["ab", "abc"], ["xabc"]) == (["x", ""], "ab")  # a prefix of another is complete first
    assert cut(["abcde", "cd"], ["abcde"]) == (["ab", ""], "cd")
    assert cut(["bcd", "abcd"], ["xabcd"]) == (["x", ""], "abcd")  # same end: the longest
    assert cut(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", "", ""], "aab")  # overlaps itself
    assert cut([], ["a", "b"]) == (["a", "b", ""], None)
    assert StopStrings("two words").put("two wordsx") == ""  # one string is one stop, not its letters
    for bad in ([""], ["a", ""], [3]):
        with pytest.raises(ValueError, match="stop strings must be non-empty text"):
            StopStrings(bad)  # type: ignore[arg-type]


def test_stop_strings_do_not_depend_on_the_pieces() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(20)))
        words = [rng.choices("abc"[: rng.randrange(2, 4)], k=rng.randrange(1, 5)) for _ in range(rng.randrange(4))]
        stops = ["".join(word) for word in words]
        # The truth, one character at a time: the first end of text at which some stop string is complete.
        expected: tuple[str, str | None] = text, None
        for end in range(1, len(text) + 1):
            if hits := [s for s in stops if text[:end].endswith(s)]:
                longest = max(hits, key=len)
                expected = text[: end - len(longest)], longest
                break
        pieces, rest = [], text
        while rest:
            n = rng.randrange(1, 5)
            pieces.append(rest[:n])
            rest = rest[n:]
        out, hit = cut(stops, pieces)
        assert ("".join(out), hit) == expected, (text, stops, pieces)


def test_stop_strings_across_tokens(tok: Tokenizer) -> None:
    ids = tok.encode("the 日本 the 😀 the")
    text, watch = TextStream(tok), StopStrings(["本 t", "😀"])
    out = "".join(watch.put(text.put(i)) for i in ids) + watch.put(text.end()) + watch.end()
    assert out == "the 日" and watch.hit == "本 t"


def test_the_tiny_model_has_a_tokenizer(tmp_path: Path) -> None:
    tok = Tokenizer.from_pretrained(tiny_path())
    prompt = tok.apply_chat_template([{"role": "user", "content": "Good morning!"}])
    ids = tok.encode(prompt)
    turn = tok.token_id("<|turn>")
    assert ids[:2] == [tok.bos_token_id, turn] and ids.count(turn) == 2
    assert "".join(stream(tok, ids)) == tok.decode(ids)
    shutil.copyfile(tiny_path() / "tokenizer.json", tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path).encode("Good morning!") == tok.encode("Good morning!")


def test_a_copy_of_a_model_shares_its_tokenizer() -> None:
    model = Gemma4.from_pretrained("tiny", check=False, progress=False)
    model.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert copy.deepcopy(model).tokenizer is model.tokenizer
