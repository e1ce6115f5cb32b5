"""The command `gemma4-fast`: demo, generate, chat, check, info.

The result goes to stdout, everything about it to stderr. Exit codes: 0 done, 1 the self-check failed, 2 an error, told in one
line, 130 Ctrl-C. Only errors that a caller can cause are told so; any other is a bug here and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
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
from typing import TYPE_CHECKING, Any, NoReturn

from gemma4_fast import __version__, terminal
from gemma4_fast.errors import CheckpointError, SelfCheckError, UnsupportedError

if TYPE_CHECKING:
    from gemma4_fast.model import Gemma4
    from gemma4_fast.verify import Report

PROGRAM = "gemma4-fast"
SEEDS = 2**63  # below this


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own); returns the exit code."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another; that is no reason to end
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        with warnings_to_stderr():
            args = parser().parse_args(argv)
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
    except (ValueError, UnsupportedError) as e:  # CheckpointError is a ValueError
        return told(f"error: {e}", debug)
    except OSError as e:
        if e.filename is None:
            raise
        return told(f"error: {e.filename}: {e.strerror}", debug)
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
    if isinstance(e, MemoryError) or re.search(r"out of memory|can't allocate memory|not enough memory", text, re.I):
        asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", text, re.I)
        amount = ""
        if asked:
            number, unit = asked[1].rstrip("."), asked[2]
            amount = f": {terminal.size(int(number)) if unit == 'bytes' else f'{number} {unit}'} could not be had"
        return f"not enough memory{amount}. `{PROGRAM} info` tells what a model needs; a shorter context needs less"
    return text if "activations are not finite" in text else None


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


# ---------------------------------------------------------------- arguments
class Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def count(text: str) -> int:
    """A whole number of at least 1, also as "32K"."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    value = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()] if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def parser() -> Parser:
    top = Parser(
        prog=PROGRAM,
        description="Gemma 4 on the kernels that fit this machine, checked on this machine against plain PyTorch.",
        epilog=f"`{PROGRAM} COMMAND --help` lists a command's options. Without --model a small trained one is used.",
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, help: str, *groups: Any, **texts: str) -> Parser:
        added: Parser = commands.add_parser(name, help=help, description=texts.get("description", help))
        added.set_defaults(run=run)
        for group in groups:
            group(added)
        return added

    command("demo", demo, "text, speed, kernels and the self-check in half a minute", _model, _load, _sample)
    p = command(
        "generate", generate, "continue a text", _model, _load, _sample,
        description="Continue a text. The prompt is taken as it is; `chat` puts it into the model's chat template.",
    )  # fmt: skip
    source = p.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text; without it, standard input is read")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file (a last line break is cut off)")
    p = command(
        "chat", chat, "talk with the model", _model, _load, _sample,
        description="Talk with the model, by the checkpoint's chat template. Standard input that is no terminal is taken "
        "a line a turn. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.",
    )  # fmt: skip
    p.add_argument("--system", metavar="TEXT", help="what the model is told about its part")
    p = command("check", check, "compare the model with the reference, layer by layer (exit code 0 or 1)", _model)
    p.add_argument("--level", choices=("full", "quick"), default="full", help="quick: one layer of each kind")
    p = command(
        "info", info, "a model's numbers, the memory it needs, the kernels that will run", _model,
        description="A model's numbers, the memory it needs, and the kernels that will run here. Weights are not read. "
        "--model may also be one of the published models, of which no checkpoint is needed: e2b, e4b, 12b, 26b-a4b, 31b.",
    )  # fmt: skip
    p.add_argument("--context", metavar="N", nargs="+", type=count, help='tokens of context, as in 8192 or "8K"')
    p.add_argument("--batch", metavar="B", type=count, default=1, help="sequences at a time (default 1)")
    return top


def _model(p: Parser) -> None:
    g = p.add_argument_group("model")
    g.add_argument("--model", default="tiny", metavar="M", help="checkpoint folder, hub id, or tiny (the default)")
    g.add_argument("--backend", metavar="B", help="auto (default), cuda, triton, cpu, torch, reference; or several: cpu,torch")
    g.add_argument("--dtype", metavar="T", help="bfloat16, float16, float32, float64 (default: the checkpoint's)")
    g.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    g.add_argument("--threads", metavar="N", type=count, help="CPU threads (default: PyTorch's choice)")
    g.add_argument("--json", action="store_true", help="machine-readable output")
    g.add_argument("--debug", action="store_true", help="show where an error comes from")


def _load(p: Parser) -> None:
    p.add_argument(
        "--check", choices=("quick", "full", "off"), default="quick",
        help="self-check before use: quick (default; one layer of each kind), full (all), off",
    )  # fmt: skip


def _sample(p: Parser) -> None:
    g = p.add_argument_group("generation (defaults are the checkpoint's recommendations)")
    g.add_argument("--max-new-tokens", metavar="N", type=count, help="end after so many tokens")
    g.add_argument("--temperature", metavar="T", type=float, help="0: always the likeliest token")
    g.add_argument("--top-k", metavar="K", type=int, help="only the K likeliest tokens (0: all)")
    g.add_argument("--top-p", metavar="P", type=float, help="only the likeliest tokens that make up P of the probability")
    g.add_argument("--min-p", metavar="P", type=float, help="only tokens at least P times as likely as the likeliest")
    g.add_argument("--seed", metavar="S", type=seed, help="the same seed gives the same text (default: a new one)")
    g.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated")


# ---------------------------------------------------------------- loading
@dataclass
class Loaded:
    model: Gemma4
    report: Report | None
    load_s: float
    check_s: float


def locate(name: str) -> Path:
    """The checkpoint's folder. What is not there gets a hint at what is."""
    from gemma4_fast.config import PRESETS
    from gemma4_fast.weights import resolve

    if name.lower() in PRESETS and not Path(name).is_dir():
        raise ValueError(
            f"{name!r} names a published model, whose weights are not part of this package: give --model its folder, its "
            f"hub id, or leave it out for the packaged model (`{PROGRAM} info --model {name.lower()}` shows its numbers)"
        )
    try:
        return resolve(name)
    except CheckpointError as e:
        raise CheckpointError(f"{e}{hint(name, ['tiny'])}") from e


def hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


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


def load(args: Namespace, path: Path, level: str) -> Loaded:
    """The model, checked at `level` ("off" for not at all). SelfCheckError if it is wrong."""
    from gemma4_fast.model import Gemma4

    start = time.perf_counter()
    model = Gemma4.from_pretrained(path, dtype=args.dtype, device=args.device, backend=args.backend, check=False)
    loaded = Loaded(model, None, time.perf_counter() - start, 0.0)
    if level != "off":
        loaded.report, loaded.check_s = checked(model, level)
        loaded.report.raise_if_wrong()
    return loaded


def checked(model: Gemma4, level: str) -> tuple[Report, float]:
    from gemma4_fast.verify import verify

    start = time.perf_counter()
    with terminal.progress_bar("checking") as bar:
        report = verify(model, level=level, progress=bar)
    return report, time.perf_counter() - start


# ---------------------------------------------------------------- commands
def demo(args: Namespace) -> int:
    from gemma4_fast.demo import Demo

    prepare(args)
    loaded = load(args, locate(args.model), args.check)
    return Demo(loaded.model, args, loaded.report).run()


def read_prompt(args: Namespace) -> str:
    """From the argument, the file, or standard input; from the last two without the line break at the end."""
    if args.prompt is not None:
        text: str = args.prompt
    elif args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.prompt_file}: not UTF-8 text (byte {e.start})") from e
    elif sys.stdin.isatty():
        raise ValueError("no prompt: give it as an argument, with --prompt-file, or on standard input")
    else:
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"standard input is not UTF-8 text (byte {e.start})") from e
    if not text:
        raise ValueError("the prompt is empty")
    return text


def fits(path: Path, prompt: str, wanted: int | None) -> None:
    """ValueError if the context cannot hold prompt and output: found out before a large model is loaded."""
    from gemma4_fast.config import Gemma4Config
    from gemma4_fast.tokenizer import Tokenizer

    tokens = len(Tokenizer.from_pretrained(path).encode(prompt))
    limit = Gemma4Config.from_pretrained(path).max_position_embeddings
    if tokens + (wanted or 1) > limit:
        raise ValueError(
            f"a prompt of {tokens} tokens and {wanted or 1} to generate exceed the model's context of {limit} tokens"
        )


def generate(args: Namespace) -> int:
    from gemma4_fast.generate import Session, Stream, default_sampling

    prepare(args)
    prompt = read_prompt(args)
    path = locate(args.model)
    fits(path, prompt, args.max_new_tokens)
    loaded = load(args, path, args.check)
    model = loaded.model
    ids = model.tokenizer.encode(prompt)
    used = secrets.randbits(48) if args.seed is None else args.seed
    given = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "min_p")}
    session = Session(model, [ids], max_new_tokens=args.max_new_tokens, sampling=default_sampling(model, **given), seed=used)
    long = len(ids) > session.prefill_chunk  # a shorter prompt runs in one piece, and a bar would jump from 0 to 1
    with terminal.progress_bar("reading the prompt", shown=long) as bar:

        def on_prefill(done: int, total: int) -> None:
            if bar is not None:
                bar(done, total)

        stream = Stream(session, args.stop, on_prefill)
        first = next(stream, "")
    if not args.json:
        print(first, end="", flush=True)
    for piece in stream:
        if not args.json:
            print(piece, end="", flush=True)
    result = stream.result
    if not args.json:
        print(flush=True)
        terminal.note(f"[{terminal.timing_line(result, len(ids))}; seed {used}]")
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
            "check": None if loaded.report is None else loaded.report.verdict(),
            "backends": {c.op: c.backend for c in chosen.choices},
            "device": chosen.device,
            "dtype": chosen.dtype,
            "versions": terminal.versions(),
        }
    )
    return 0


def chat(args: Namespace) -> int:
    from gemma4_fast.chat import Chat
    from gemma4_fast.tokenizer import Tokenizer

    prepare(args)
    path = locate(args.model)
    if Tokenizer.from_pretrained(path).chat_template is None:
        raise CheckpointError(f"{path}: has no chat template, so it is a base model: use `{PROGRAM} generate`")
    return Chat(load(args, path, args.check).model, args).run()


def check(args: Namespace) -> int:
    prepare(args)
    report, _ = checked(load(args, locate(args.model), "off").model, args.level)
    print(report.to_json() if args.json else report)
    return 0 if report.ok else 1


def info(args: Namespace) -> int:
    from gemma4_fast import info as page
    from gemma4_fast.config import PRESETS

    prepare(args)
    try:
        return page.run(args)
    except CheckpointError as e:
        if "/" in args.model or Path(args.model).exists():
            raise
        close = hint(args.model, ["tiny", *PRESETS])
        raise CheckpointError(f"{e}; the published models are {', '.join(PRESETS)}{close}") from e


if __name__ == "__main__":
    sys.exit(main())
