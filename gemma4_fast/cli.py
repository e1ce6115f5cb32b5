"""The command `gemma4-fast`: demo, generate, chat, check, info, bench.

The result goes to stdout, everything about it to stderr. Exit codes: 0 done, 1 the self-check failed, 2 an error, told in
one line, 130 Ctrl-C. Only errors that a caller can cause are told so; any other is a bug here and keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_fast import terminal
from gemma4_fast.arguments import CHECKS, PROGRAM, parser
from gemma4_fast.errors import CheckpointError, SelfCheckError, UnsupportedError, out_of_memory
from gemma4_fast.spelling import did_you_mean

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4
    from gemma4_fast.report import Report
    from gemma4_fast.tokenizer import Tokenizer


WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a disk's own refusals, which name no file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own); returns the exit code."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):  # closed by the caller: `>&-`
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another; that is no reason to end
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        with warnings_to_stderr():
            args = parser(COMMANDS).parse_args(argv)
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader had enough; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SelfCheckError as e:
        return told(f"{e}", debug, code=1)
    except (ValueError, UnsupportedError, FloatingPointError) as e:  # CheckpointError is a ValueError
        return told(f"error: {e}", debug)
    except OSError as e:
        if e.filename is None and e.errno not in WRITING:
            raise
        return told(f"error: {e.filename}: {e.strerror}" if e.filename is not None else f"error: {e.strerror}", debug)
    except (MemoryError, RuntimeError) as e:
        if (what := machine_fault(e)) is None:
            raise
        return told(f"error: {what}", debug)


def told(message: str, debug: bool, code: int = 2) -> int:
    """One line on stderr, whatever the message is made of."""
    if debug:
        raise
    terminal.note(f"{PROGRAM}: {' '.join(message.split())}")
    return code


def machine_fault(e: BaseException) -> str | None:
    """What to tell of an error that PyTorch raises without a type of its own; None if it is not one of those."""
    text = " ".join(str(e).split())
    if out_of_memory(e):
        asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", text, re.I)
        amount = ""
        if asked:
            number, unit = asked[1].rstrip("."), asked[2]
            size = terminal.size(int(number)) if unit == "bytes" else f"{number} {unit}"
            amount = f": {size} could not be allocated"
        advice = f"`{PROGRAM} info` shows what a model needs; a shorter context needs less"
        return f"not enough memory{amount}. {advice}"
    return None


@contextmanager
def warnings_to_stderr() -> Iterator[None]:
    """The package's own warnings, a line each. stderr is looked up now, as a caller may have replaced it."""
    log, handler = logging.getLogger("gemma4_fast"), logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.format = lambda record: (  # type: ignore[method-assign]
        f"{PROGRAM}: {' '.join(record.getMessage().removeprefix('gemma4_fast: ').split())}"
    )
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


# ---------------------------------------------------------------- loading
@dataclass
class Loaded:
    model: Gemma4
    report: Report | None
    load_s: float
    check_s: float


def locate(args: Namespace) -> Path:
    """The checkpoint's folder. What is not there gets a hint at what is.

    Of a checkpoint on the hub the weights are left to `load`, which looks at the memory first.
    """
    from gemma4_fast.config import preset_name
    from gemma4_fast.weights import SMALL_FILES, resolve

    name = args.model
    fetching = functools.partial(terminal.fetching, quiet=args.quiet)
    try:
        return resolve(name, patterns=SMALL_FILES, on_download=fetching)
    except CheckpointError as e:
        preset = preset_name(name)
        if preset is not None:
            raise CheckpointError(f"{e}. `{PROGRAM} info --model {preset}` shows its sizes") from e
        raise CheckpointError(f"{e}{did_you_mean(name, ['tiny'])}") from e


def prepare(args: Namespace) -> None:
    """What is settled before anything is read: threads, and arguments that no model could make right."""
    import torch

    from gemma4_fast.sampling import Sampling

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = ("temperature", "top_k", "top_p", "min_p")
    Sampling(**{n: getattr(args, n) for n in names if getattr(args, n, None) is not None})
    if "" in getattr(args, "stop", []):
        raise ValueError("--stop needs some text")


def load(
    args: Namespace,
    path: Path,
    check: bool | str,
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
) -> Loaded:
    """The model, checked if `check` says so, as in `Gemma4.from_pretrained`.

    SelfCheckError if it is wrong. UnsupportedError, before any weights are read, if they exceed
    the free memory. context: tokens that the cache will be for (default: 4096).
    """
    from gemma4_fast.model import Gemma4
    from gemma4_fast.weights import resolve

    start = time.perf_counter()
    options = {name: getattr(args, name) for name in ("dtype", "device", "backend", "quantize")}
    if not args.ignore_memory:
        require_memory(args, path, getattr(args, "level", check), context)
    path = resolve(args.model)
    shown = not args.quiet
    model = Gemma4.from_pretrained(path, **options, check=False, check_memory=False, progress=shown)
    model._tokenizer = tokenizer  # large ones take a second to read
    loaded = Loaded(model, None, time.perf_counter() - start, 0.0)
    if check:
        loaded.report, loaded.check_s = settled(model, check, args)
    return loaded


def checked_by(loaded: Loaded) -> str | None:
    """What the self-check said, now or at an earlier start; None if it was not asked."""
    if loaded.report is not None:
        return loaded.report.verdict()
    return None if loaded.model.verdict is None else str(loaded.model.verdict)


def settled(model: Gemma4, check: bool | str, args: Namespace) -> tuple[Report | None, float]:
    """The report of the check, or None if an earlier one still holds, and the seconds it took.

    If an earlier check still holds, a line on stderr says so, but not with --quiet or --json.
    SelfCheckError: the model is wrong.
    """
    from gemma4_fast import verdicts

    start = time.perf_counter()
    with terminal.progress_bar("checking", shown=not args.quiet) as bar:
        report = verdicts.settle(model, check, progress=bar)
    tell = not args.quiet and not args.json
    if tell and (verdict := model.verdict) is not None and verdict.from_disk:
        terminal.note(f"{PROGRAM}: {verdict}; --check {verdict.level} runs it again")
    return report, time.perf_counter() - start


def require_memory(
    args: Namespace,
    path: Path,
    check: bool | str,
    context: int | None,
) -> None:
    """UnsupportedError if the weights exceed the free memory; a warning if it may run out."""
    from gemma4_fast import memory
    from gemma4_fast.config import Gemma4Config
    from gemma4_fast.model import parse_device, parse_dtype

    config = Gemma4Config.from_pretrained(path)
    load = memory.Load(
        config=config,
        dtype=parse_dtype(config.dtype if args.dtype is None else args.dtype),
        quantize=args.quantize,
        context=None if context is None else min(context, config.max_position_embeddings),
        check=check,
    )
    memory.require(load, parse_device(args.device), Path(args.model).name, command_line=True)


# ---------------------------------------------------------------- commands
def demo(args: Namespace) -> int:
    from gemma4_fast.demo import Demo

    prepare(args)
    loaded = load(args, locate(args), CHECKS[args.check])
    return Demo(loaded.model, args, loaded.report).run()


def read_prompt(args: Namespace) -> str:
    """The words, the file or standard input; of the last two without a last line break."""
    words: list[str] = args.words
    if "-" in words and len(words) > 1:
        raise ValueError(
            "- reads the prompt from standard input, so no other words may be given; to put a - "
            "into the prompt, quote the prompt"
        )
    if words and args.prompt_file is not None:
        raise ValueError("expected one prompt, got words and --prompt-file; give one of them")
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.prompt_file}: not UTF-8 text (byte {e.start})") from e
    elif words and words != ["-"]:
        text = " ".join(words)
    elif not words and sys.stdin.isatty():
        raise ValueError("no prompt: give it as an argument, with --prompt-file, or on standard input")
    else:
        if sys.stdin.isatty() and not args.quiet:
            terminal.note(f"{PROGRAM}: reading the prompt; Ctrl-D on an empty line ends it")
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"standard input is not UTF-8 text (byte {e.start})") from e
    if not text:
        raise ValueError("the prompt is empty")
    return text


def encode(
    path: Path,
    prompt: str,
    wanted: int | None,
    quiet: bool = False,
) -> tuple[Tokenizer, list[int], int | None]:
    """The tokenizer, the prompt's token ids, and `wanted` clamped to the room for new tokens.

    A line on stderr says if `wanted` was clamped, unless `quiet` is set. ValueError, before a model
    is loaded, if the prompt fills the context.
    """
    from gemma4_fast.config import Gemma4Config
    from gemma4_fast.tokenizer import Tokenizer

    limit = Gemma4Config.from_pretrained(path).max_position_embeddings
    tokenizer = Tokenizer.from_pretrained(path)
    ids = tokenizer.encode(prompt)
    room = limit - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the model's context is {limit} tokens, so "
            "there is no room for new ones; shorten the prompt"
        )
    if wanted is None or wanted <= room:
        return tokenizer, ids, wanted
    if not quiet:
        why = f"the context is {limit} tokens and the prompt uses {len(ids)}"
        terminal.note(f"{PROGRAM}: --max-new-tokens reduced to {room}: {why}")
    return tokenizer, ids, room


def generate(args: Namespace) -> int:
    from gemma4_fast.generate import DEFAULT_NEW_TOKENS, Session, Stream, default_sampling

    prepare(args)
    prompt = read_prompt(args)
    path = locate(args)
    tokenizer, ids, room = encode(path, prompt, args.max_new_tokens, args.quiet)
    context = len(ids) + (room or DEFAULT_NEW_TOKENS)
    loaded = load(args, path, CHECKS[args.check], tokenizer, context)
    model = loaded.model
    used = secrets.randbits(48) if args.seed is None else args.seed
    given = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "min_p")}
    sampling = default_sampling(model, **given)
    session = Session(model, [ids], max_new_tokens=room, sampling=sampling, seed=used)
    # A shorter prompt runs in one piece, and a bar would jump from 0 to 1.
    shown = len(ids) > session.prefill_chunk and not args.quiet
    with terminal.progress_bar("reading the prompt", shown=shown) as bar:

        def on_prefill(done: int, total: int) -> None:
            if bar is not None:
                bar(done, total)

        on_prefill(0, len(ids))
        stream = Stream(session, args.stop, on_prefill)
        first = next(stream, "")
    if not args.json:
        print(first, end="", flush=True)
    for piece in stream:
        if not args.json:
            print(piece, end="", flush=True)
    result = stream.result
    if not args.json:
        print("" if (result.text or "").endswith("\n") else "\n", end="", flush=True)
        cut = ""
        if result.finish_reason == "length":
            cut = f"; cut off after {session.max_new_tokens} tokens (--max-new-tokens)"
        if not args.quiet:
            terminal.note(f"[{terminal.timing_line(result, len(ids))}; seed {used}{cut}]")
        return 0
    from gemma4_fast.explain import explain

    chosen = explain(model)
    terminal.print_json(
        {
            "model": args.model,
            "prompt": prompt,
            "prompt_tokens": len(ids),
            "tokens": result.token_ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "stopped_by": result.stopped_by,
            "seed": used,
            "sampling": terminal.sampling_dict(session.sampling),
            "max_new_tokens": session.max_new_tokens,
            "timings": {"load_s": loaded.load_s, "check_s": loaded.check_s, **terminal.rates(result, len(ids))},
            "check": checked_by(loaded),
            "backends": {c.op: c.backend for c in chosen.choices},
            "device": chosen.device,
            "dtype": chosen.dtype,
            "versions": terminal.versions(),
        }
    )
    return 0


def chat(args: Namespace) -> int:
    from gemma4_fast.chat import Chat
    from gemma4_fast.config import Gemma4Config
    from gemma4_fast.tokenizer import Tokenizer

    prepare(args)
    path = locate(args)
    Gemma4Config.from_pretrained(path)  # what this is, before what it lacks
    tokenizer = Tokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{path}: has no chat template, so it is a base model: use `{PROGRAM} generate`")
    return Chat(load(args, path, CHECKS[args.check], tokenizer).model, args).run()


def check(args: Namespace) -> int:
    from gemma4_fast.verify import verify

    prepare(args)
    model = load(args, locate(args), check=False).model
    with terminal.progress_bar("checking", shown=not args.quiet) as bar:
        report = verify(model, level=args.level, seed=args.seed, progress=bar)
    print(report.to_json() if args.json else report)
    return 0 if report.ok else 1


def info(args: Namespace) -> int:
    from gemma4_fast import info as page
    from gemma4_fast.config import PRESETS, preset_name

    prepare(args)
    if not Path(args.model).is_dir():
        args.model = preset_name(args.model) or args.model
    try:
        return page.run(args)
    except CheckpointError as e:
        if "/" in args.model or Path(args.model).exists():
            raise
        close = did_you_mean(args.model, ["tiny", *PRESETS])
        raise CheckpointError(f"{e}; the published models are {', '.join(PRESETS)}{close}") from e


def bench(args: Namespace) -> int:
    from gemma4_fast.bench import command

    return command.run(args)


COMMANDS = {"demo": demo, "generate": generate, "chat": chat, "check": check, "info": info, "bench": bench}

if __name__ == "__main__":
    sys.exit(main())
