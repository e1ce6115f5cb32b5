"""Text to token ids and back, chat templates, text as it streams, and stop strings.

Two things need care. A character may span tokens, so a stream may only give out text that later tokens cannot change.
And a chat template is code from the checkpoint: it runs in jinja2's sandbox, which keeps it from everything but the
messages, though not from looping for long.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_fast.errors import CheckpointError
from gemma4_fast.weights import one_line, read_json

if TYPE_CHECKING:
    import jinja2
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Types of message parts that transformers serves and this package's own model does not.
_OTHER_MEDIA = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "audio": "audio",
    "input_audio": "audio",
    "video": "a video",
}
# What a template's own code can raise while it runs; its author is not the caller, so none of it is the caller's error.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Tokenizer:
    """tokenizer.json of a checkpoint folder, with the special tokens of tokenizer_config.json and the chat template.

    Attributes: `vocab_size` (tokens, added ones included), `bos_token_id`, `eos_token_id`, `pad_token_id` (None where
    the checkpoint names none), `special_ids` (what `decode` leaves out), `chat_template` (its source, or None).
    """

    def __init__(self, folder: str | Path) -> None:
        """CheckpointError names the file that is missing or broken."""
        self.folder = Path(folder)
        self._tokenizer = _read_tokenizer(self.folder / "tokenizer.json")
        config_file = self.folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        self._special = _special_tokens(config)  # {"bos_token": "<bos>", ...}: the template's variables
        self.chat_template = _template_source(self.folder, config)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        for token in ("bos", "eos", "pad"):  # Gemma's spelling, where the file leaves them out
            if self.token_id(f"<{token}>") is not None:
                self._special.setdefault(f"{token}_token", f"<{token}>")
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self.token_id(self._special.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self  # nothing about it changes, and a chat template that was in use cannot be copied

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder. CheckpointError if it has none that can be read."""
        return cls(folder)

    def token_id(self, token: str) -> int | None:
        """The id of the token spelled exactly so, such as "<|turn>"; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The spelling of a token, as the vocabulary has it; None for an id beyond it. ValueError for no id at all."""
        try:
            return self._tokenizer.id_to_token(token_id)
        except (OverflowError, TypeError) as e:
            raise ValueError(f"a token id is an integer >= 0, got {token_id!r}") from e

    def encode(self, text: str, add_bos: bool = True, *, allow_special: bool = True) -> list[int]:
        """Token ids of `text`, with <bos> in front exactly once: none is added if the text begins with it, as the
        prompt from a chat template does.

        Special tokens spelled out in the text become those tokens, as in transformers. For text from strangers pass
        `allow_special=False`: then "<turn|>" is just seven characters and cannot end a turn.
        """
        if not isinstance(text, str):
            raise ValueError(f"expected text, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ValueError(f"the text is not valid Unicode: lone surrogate at position {e.start}") from e
        tokenizer = self._tokenizer if allow_special else self._literal
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids that the tokenizer does not have count as nothing: a model's table may be longer."""
        try:
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as e:
            raise ValueError("token ids are integers >= 0") from e

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same tokenizer, blind to special tokens. A copy, as switching the flag would hit other threads."""
        copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation, by the checkpoint's own template; `encode` adds no second <bos> to it.

        messages: [{"role": "user", "content": "..."}, ...]; content may be a list of {"type": "text", "text": "..."}.
        variables: whatever else the template reads (tools, enable_thinking, ...).
        Special tokens spelled out inside a message come through as they are.
        ValueError: bad messages, or the template refuses them. CheckpointError: no template, or one that is broken or
        reaches for what the sandbox forbids.
        """
        import jinja2

        check_messages(messages)
        values = {"tools": None, "documents": None, **self._special, **variables}
        values.update(messages=messages, add_generation_prompt=add_generation_prompt)
        try:
            return self._template.render(values)
        except _refusal() as e:
            raise ValueError(f"the chat template rejects these messages: {e}") from e
        except jinja2.exceptions.SecurityError as e:
            raise CheckpointError(f"{self.folder}: the chat template does what the sandbox forbids: {e}") from e
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as e:
            raise CheckpointError(f"{self.folder}: the chat template failed: {type(e).__name__}: {one_line(e)}") from e

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        if self.chat_template is None:
            raise CheckpointError(f"{self.folder}: has no chat template; is it a base model?")
        try:
            return _sandbox().from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as e:
            raise CheckpointError(f"{self.folder}: chat template, line {e.lineno}: {e.message}") from e
        except (
            jinja2.TemplateError,
            SyntaxError,
            *_TEMPLATE_FAULTS,
        ) as e:  # SyntaxError: nested past what Python compiles
            raise CheckpointError(f"{self.folder}: the chat template cannot be compiled: {one_line(e)}") from e


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not file.is_file():
        if file.with_name("tokenizer.model").is_file():
            raise CheckpointError(
                f"{file}: no such file, and tokenizer.model cannot be read. transformers writes "
                "one: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise CheckpointError(
            f"{file}: no such file, and text needs one. Copy tokenizer.json, tokenizer_config.json "
            "and chat_template.jinja from the original checkpoint, or pass token ids in Python"
        )
    read_json(file)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception, nothing narrower
        raise CheckpointError(f"{file}: not a tokenizer that the tokenizers library can read: {one_line(e)}") from e
    tokenizer.no_truncation()  # a file can carry both; neither is a property of the text
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every named token of tokenizer_config.json, which writes them as strings or as {"content": ...}."""
    named = {k: v for k, v in config.items() if k.endswith("_token")}
    extra = config.get("extra_special_tokens")
    named.update(extra if isinstance(extra, Mapping) else {})
    plain = {k: v.get("content") if isinstance(v, Mapping) else v for k, v in named.items()}
    return {k: v for k, v in plain.items() if isinstance(v, str)}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, Mapping)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return source


def check_messages(messages: object) -> None:
    """ValueError if these are no chat messages of text."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {messages!r:.80}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f'message {i} must be {{"role": ..., "content": ...}}, got {message!r:.80}')
        if not isinstance(message["role"], str):
            raise ValueError(f"message {i}: role must be text, got {message['role']!r:.80}")
        content = message["content"]
        for part in content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind in _OTHER_MEDIA:
                raise ValueError(
                    f"message {i} holds {_OTHER_MEDIA[kind]}; this model is text only here. For "
                    "images, audio and video load the checkpoint with transformers and call "
                    "gemma4_fast.accelerate(model)"
                )
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"message {i}: content must be text (or a list of text parts), got {part!r:.80}")


@functools.cache
def _refusal() -> type[Exception]:
    """What raise_exception in a template raises; a class of its own, since these errors are about the messages."""
    import jinja2

    return type("TemplateRefusal", (jinja2.TemplateError,), {})


@functools.cache
def _sandbox() -> jinja2.Environment:
    """What transformers renders chat templates in: the same whitespace rules, filters, functions and guards."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the model's turns for training; here it is just its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """A namespace with no _private names, which could pass it off as another kind of object."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # self may also be a name in the template
            self, attributes = args[0], dict(*args[1:], **kwargs)
            jinja2.utils.Namespace.__init__(self)
            for name, value in attributes.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: object) -> None:
        raise _refusal()(str(message))

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes for HTML

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class, which has more to it
    env.globals["namespace"] = Namespace
    return env


class TextStream:
    """One sequence's tokens in, its text out, piece by piece: the pieces joined are exactly `decode` of all the ids.

    A piece never holds part of a character. The bytes of a byte-fallback run (SentencePiece's <0xF0>...) come out when
    the run ends, since one bad byte changes how the decoder shows all of it. Each token costs a decode of a few.
    """

    # An unfinished UTF-8 character has at most 3 bytes, so its first byte is in one of the last 3 tokens.
    _CONTEXT = 3

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # tokens already given out (but for an unfinished character), for what follows them
        self._given = 0  # characters of the context's own text that have been given out
        self._held: list[int] = []

    def put(self, token_id: int) -> str:
        """Adds one token; returns the text that has become certain, often "". ValueError if it is no token id."""
        token = self._tokenizer.token(token_id)
        if token is None or (self._skip and token_id in self._tokenizer.special_ids):
            return ""
        self._held.append(token_id)
        return "" if _BYTE_TOKEN.fullmatch(token) else self._take(final=False)

    def end(self) -> str:
        """The text held back until now; an unfinished character shows as U+FFFD, as in `decode`."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        ids = self._context + self._held
        text = self._tokenizer.decode(ids, self._skip)
        sure = len(text) - (text.endswith("\ufffd") and not final)  # one trailing U+FFFD may be an unfinished character
        piece = text[self._given : sure]
        kept = ids[-self._CONTEXT :]
        # Decoders drop a leading space and show a cut-off first character as U+FFFD, with or without what comes next.
        self._given = len(self._tokenizer.decode(kept, self._skip)) - (len(text) - sure)
        self._context, self._held = kept, []
        return piece


class StopStrings:
    """Watches a stream of text for stop strings; the text before the first one is let through, the stop string is not.

    Text that may be the start of a stop string is held back. The first stop string to be complete wins, and among those
    that end at the same character the longest: how the text is cut into pieces changes nothing. `hit` is the one found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if bad := [s for s in self._stops if not isinstance(s, str) or not s]:
            raise ValueError(f"stop strings must be non-empty text, got {bad[0]!r}")
        self.hit: str | None = None
        self._held = ""

    def put(self, piece: str) -> str:
        """Adds text; returns the text to pass on. After a hit everything is dropped."""
        if self.hit is not None:
            return ""
        text = self._held + piece
        starts = [(text.find(s), s) for s in self._stops]
        hits = [(start + len(s), start, s) for start, s in starts if start >= 0]
        if hits:
            _, start, self.hit = min(hits)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """The text held back, now that no more will follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
