"""The command line's words: commands, options, and what their values must look like."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gemma4_fast import __version__
from gemma4_fast.spelling import did_you_mean

PROGRAM = "gemma4-fast"
SEEDS = 2**63  # below this
MOST_THREADS = 4096
# The values of --check, and the argument `check` of `Gemma4.from_pretrained` that each stands for.
CHECKS: dict[str, bool | str] = {"auto": True, "quick": "quick", "full": "full", "off": False}
Command = Callable[[Namespace], int]


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, with the name that was probably meant."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), known)
            expected = f"expected {', '.join(known)}"
            raise argparse.ArgumentError(action, f"{expected}, got {value!r}{hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also accept words of the prompt after an option: `generate It --seed 3 is so`."""
        found, rest = super().parse_known_args(args, namespace)
        if hasattr(found, "words") and not any(re.match("-.", word) for word in rest):
            found.words += rest
            rest = []
        if rest:  # reported here, since the main parser would not name this command's help
            option = next((word for word in rest if word.startswith("--")), "")
            hint = did_you_mean(option.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest


def count(text: str) -> int:
    """A whole number of at least 1, also as "32K"."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    value = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()] if match else 0
    if not 1 <= value < 1 << 62:
        expected = "a whole number of at least 1, as in 8192 or 8K"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:40]!r}")
    return value


def counts(text: str) -> list[int]:
    """Several of those, as in "1,8,4K"."""
    return list(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def threads(text: str) -> int:
    value = count(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got {text!r}")
    return value


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file or folder, got an empty one")
    return Path(text)


class Several(argparse.Action):
    """An option that may be repeated: the values of each time are added, without doubles, and replace the default."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        if self.nargs == "+":  # each word of the option may hold several values
            values = [value for word in values for value in word]
        before = getattr(namespace, self.dest)
        setattr(
            namespace,
            self.dest,
            list(dict.fromkeys([*([] if before is self.default else before), *values])),
        )


def names(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return list(dict.fromkeys(found))


def percent(text: str) -> float:
    """ "5%" or "0.05" -> 0.05."""
    number = text.removesuffix("%")
    try:
        value = float(number) / (100 if number != text else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, got {text!r}")
    return value


def duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0 and up to 3600, got {text!r}")
    return value


def seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def parser(commands: Mapping[str, Command]) -> Parser:
    """`commands` maps each command's name to the function that runs it."""
    top = Parser(
        prog=PROGRAM,
        description="Gemma 4 on the kernels that fit this machine, checked against plain PyTorch.",
        epilog=f"`{PROGRAM} COMMAND --help` lists a command's options. The default model is small.",
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        summary: str,
        *groups: Callable[[Parser], None],
        description: str | None = None,
        epilog: str | None = None,
    ) -> Parser:
        added: Parser = subparsers.add_parser(
            name,
            help=summary,
            description=description or summary,
            epilog=epilog,
        )
        added.set_defaults(run=commands[name])
        for group in groups:
            group(added)
        return added

    command(
        "demo", "text, speed, kernels and the self-check in half a minute",
        _model, _load, _sample("80"),
    )  # fmt: skip
    p = command(
        "generate", "continue a text", _model, _load, _sample("256"),
        description="Continue a text. The prompt is used as it is; `chat` puts it into "
        "the model's chat template.",
    )  # fmt: skip
    p.add_argument(
        "words",
        nargs="*",
        metavar="PROMPT",
        help="the text; several words form one prompt; - or none: read standard input",
    )
    p.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the prompt from a file, without its last line break",
    )
    p = command(
        "chat", "talk with the model", _model, _load, _sample("no limit but the context"),
        description="Talk with the model, using the checkpoint's chat template. If standard "
        "input is not a terminal, each of its lines is a message or a command. A line that "
        "fails is reported; the conversation goes on, and the exit code is 2.",
        epilog="In the conversation: /continue resumes an answer that was cut off, "
        "/reset clears the conversation, /save FILE and /load FILE keep it, /think on|off, "
        "/help, /quit.",
    )  # fmt: skip
    p.add_argument("--system", metavar="TEXT", help="system prompt")
    p = command("check", "compare the model with the reference, layer by layer (exit code 0 or 1)", _model)
    _memory(p)
    p.add_argument("--level", choices=("full", "quick"), default="full", help="quick: one layer of each kind")
    p.add_argument(
        "--seed",
        metavar="S",
        type=seed,
        default=0,
        help="seed of the random test tokens (default 0)",
    )
    p = command(
        "info", "a model's sizes, the memory it needs, the kernels that will run", _model,
        description="A model's sizes, the memory it needs, and the kernels that will run here. "
        "Weights are not read. --model may also be the name of a published model, which needs no "
        "checkpoint: e2b, e4b, 12b, 26b-a4b, 31b.",
    )  # fmt: skip
    p.add_argument(
        "--context",
        metavar="N",
        nargs="+",
        type=counts,
        action=Several,
        help="tokens of context, one row for each, as in 8192 or 4K,32K",
    )
    p.add_argument("--batch", metavar="B", type=count, default=1, help="sequences at a time (default 1)")
    p.add_argument(
        "--seed",
        metavar="S",
        type=seed,
        help="accepted as by every command; nothing here is random",
    )
    _bench(command)
    return top


def _bench(command: Callable[..., Parser]) -> None:
    """`bench` and its subcommands. They share -o, --json, --csv, --plot, --html, and the device."""
    top = command(
        "bench", "time the ops and the model beside other libraries and the machine's limits",
        description="Benchmarks. Every result is checked against the reference before it is timed, "
        "contenders take turns in one run, and the machine's own limits are measured beside them. "
        "Ctrl-C keeps the finished rows.",
    )  # fmt: skip
    kinds = top.add_subparsers(title="benchmarks", metavar="WHAT", required=True, dest="bench")

    def kind(name: str, summary: str, description: str | None = None) -> Parser:
        added: Parser = kinds.add_parser(name, help=summary, description=description or summary)
        return added

    p = kind("all", "the standard report of this machine, in ten minutes at most")
    _where(p)
    _cases(p)
    _peers(p)
    p.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="store the model's weights in 8 or 4 bits",
    )
    p.add_argument(
        "--config",
        metavar="M",
        default="26b-a4b",
        help="member for the model benchmark (default 26b-a4b)",
    )
    _memory(p)
    p.add_argument(
        "--minutes",
        metavar="M",
        type=count,
        default=10,
        help="start nothing more after M minutes (default 10)",
    )
    p.add_argument("--results", metavar="DIR", type=path, default=Path("bench/results"),
                   help="where this machine's folder is made (default bench/results)")  # fmt: skip

    p = kind("ops", "each op of the table, on every backend that runs here and on torch")
    p.add_argument(
        "--op",
        metavar="OP",
        type=names,
        action=Several,
        default=[],
        help="only these ops, as in linear,moe",
    )
    p.add_argument("--case", metavar="C", type=names, action=Several, default=[],
                   help="only these cases (default: those at true shapes; all: the small test cases too)")  # fmt: skip
    p.add_argument(
        "--rivals",
        action="store_true",
        help="time the PyTorch calls of transformers beside moe and attention",
    )
    _weights(p)
    _where(p)
    _cases(p)
    _targets(p)

    p = kind(
        "model", "the whole model: prefill, decode, first token, memory, beside its peers",
        "Prefill and decode of the whole model. Without --model it has dummy weights of the true "
        "shapes; without --layers and --vocab it is cut so that all contenders fit into memory.",
    )  # fmt: skip
    p.add_argument("--config", metavar="M", default="26b-a4b", help="e2b, e4b, 12b, 26b-a4b (default), 31b")
    p.add_argument("--layers", metavar="N", type=count, help="use only the first N layers")
    p.add_argument("--vocab", metavar="V", type=count, help="use only V tokens of the vocabulary")
    p.add_argument("--model", metavar="PATH", help="a checkpoint instead (folder or hub id)")
    p.add_argument("--quantize", choices=("int8", "int4"), help="weights in 8 or 4 bits")
    p.add_argument("--prompt", metavar="P", type=counts, action=Several, default=[],
                   help="prompt lengths (default 128,512; none if --depth is given)")  # fmt: skip
    p.add_argument(
        "--decode",
        metavar="N",
        type=count,
        default=32,
        help="tokens to decode after each prompt (default 32)",
    )
    p.add_argument(
        "--batch",
        metavar="B",
        type=counts,
        action=Several,
        default=[1],
        help="sequences at a time, as in 1,4,16 (default 1)",
    )
    p.add_argument(
        "--depth",
        metavar="D",
        type=counts,
        action=Several,
        default=[],
        help="also decode after D tokens, as in 8K,32K",
    )
    p.add_argument(
        "--rounds",
        metavar="R",
        type=count,
        default=5,
        help="at most R turns of each contender; fewer if their timings agree (default 5)",
    )
    p.add_argument(
        "--minutes",
        metavar="M",
        type=count,
        default=6,
        help="after M minutes, no contender gets more than one turn (default 6)",
    )
    p.add_argument(
        "--busy",
        metavar="N",
        type=count,
        help="measure again while N other processes each keep one processor busy",
    )
    p.add_argument(
        "--check",
        choices=("quick", "off"),
        default="quick",
        help="self-check before anything is timed",
    )
    _memory(p)
    _where(p)
    p.add_argument(
        "--backend",
        metavar="B",
        help="backends of this package, as contenders: auto,triton (default: auto)",
    )
    _peers(p)
    _targets(p)

    p = kind("scale", "time by tokens, context, batch and experts hit; where moe switches paths")
    p.add_argument(
        "--axis",
        metavar="A",
        type=names,
        action=Several,
        default=[],
        help="tokens, context, batch, experts (default: all)",
    )
    p.add_argument(
        "--points",
        metavar="N",
        type=counts,
        action=Several,
        help="points on the axis, as in 1,8,64 (default: by device)",
    )
    p.add_argument(
        "--write",
        action="store_true",
        help="write the measured crossover into gemma4_fast/ops/moe.py",
    )
    _weights(p)
    _where(p)
    _cases(p)
    _targets(p)

    p = kind("cache", "KV cache of every member: its bytes, and those that a decoded token reads")
    p.add_argument(
        "--config",
        metavar="M",
        type=names,
        action=Several,
        default=[],
        help="only these members, or gemma3-27b",
    )
    p.add_argument("--context", metavar="N", type=counts, action=Several, help="tokens (default 1K to 256K)")
    unused = "accepted, but no cache depends on it"
    p.add_argument("--backend", metavar="B", help=unused)
    p.add_argument("--quantize", choices=("int8", "int4"), help=unused)
    _where(p)
    _targets(p)

    p = kind("compare", "what a second run did slower beyond the noise (exit code 1) or faster")
    p.add_argument("before", metavar="A.jsonl")
    p.add_argument("after", metavar="B.jsonl")
    p.add_argument(
        "--threshold",
        metavar="P",
        type=percent,
        default=0.05,
        help="ignore changes below this (default 5%%)",
    )
    p.add_argument("--all", action="store_true", help="show unchanged rows too")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    _debug(p)

    p = kind("report", "show saved rows as tables, pictures and pages")
    p.add_argument("files", metavar="ROWS.jsonl", nargs="+", type=path)
    p.add_argument(
        "--markdown",
        action="store_true",
        help="the README's performance table, instead of all tables",
    )
    _pages(p)
    _debug(p)


def _where(p: Parser) -> None:
    g = p.add_argument_group("where")
    g.add_argument(
        "--dtype",
        metavar="T",
        default="bfloat16",
        help="bfloat16 (default), float16, float32, float64",
    )
    g.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    g.add_argument("--threads", metavar="N", type=threads, help="CPU threads (default: PyTorch's choice)")
    g.add_argument(
        "--seed",
        metavar="S",
        type=seed,
        default=0,
        help="seed of inputs and dummy weights (default 0)",
    )
    g.add_argument("--quiet", action="store_true", help="no progress on stderr")
    if not any("--json" in a.option_strings for a in p._actions):
        g.add_argument(
            "--json",
            action="store_true",
            help="rows as JSON lines on stdout, each as it is finished",
        )
    _debug(p)


def _debug(p: Parser) -> None:
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _cases(p: Parser) -> None:
    p.add_argument(
        "--backend",
        metavar="B",
        help="only these backends, beside torch: cuda, triton, cpu, reference",
    )
    p.add_argument(
        "--seconds",
        metavar="S",
        type=duration,
        default=0.5,
        help="time spent sampling each row (default 0.5)",
    )


def _weights(p: Parser) -> None:
    p.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="measure only ops with weights, which are stored in 8 or 4 bits",
    )


def _peers(p: Parser) -> None:
    p.add_argument(
        "--peers", metavar="P", type=names, action=Several, default=[],
        help="what to compare with: transformers, torch.compile, accelerate, vllm, llama.cpp, "
        "llama-bench; all: all of these and the slow ones (transformers' batched_mm, this "
        "package's torch backend)",
    )  # fmt: skip
    p.add_argument(
        "--peer-python",
        metavar="PEER=PROGRAM",
        action="append",
        default=[],
        help="a peer's Python interpreter, if it has its own; may be repeated",
    )


def _targets(p: Parser) -> None:
    g = _pages(p)
    g.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=path,
        help="rows as JSON lines, each as it is finished",
    )
    g.add_argument("--append", action="store_true", help="append to an existing file")


def _pages(p: Parser) -> argparse._ArgumentGroup:
    g = p.add_argument_group("output")
    g.add_argument("--csv", metavar="FILE", type=path, help="a table for spreadsheets")
    g.add_argument("--plot", metavar="DIR", type=path, help="pictures (PNG)")
    g.add_argument("--html", metavar="FILE", type=path, help="tables and pictures on one page")
    if not any("--json" in a.option_strings for a in p._actions):
        g.add_argument("--json", action="store_true", help="rows as JSON lines on stdout")
    return g


def _model(p: Parser) -> None:
    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        default="tiny",
        metavar="M",
        help="checkpoint folder, hub id, or tiny (the default)",
    )
    g.add_argument(
        "--backend",
        metavar="B",
        help="auto (default), cuda, triton, cpu, torch, reference; or several: cpu,torch",
    )
    g.add_argument(
        "--dtype",
        metavar="T",
        help="bfloat16, float16, float32, float64 (default: the checkpoint's)",
    )
    g.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="weights in 8 or 4 bits, quantized while loading",
    )
    g.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    g.add_argument("--threads", metavar="N", type=threads, help="CPU threads (default: PyTorch's choice)")
    g.add_argument("--json", action="store_true", help="machine-readable output")
    g.add_argument(
        "--quiet",
        action="store_true",
        help="no notes and no progress on stderr, only warnings and errors",
    )
    g.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _memory(p: Parser) -> None:
    p.add_argument(
        "--ignore-memory",
        action="store_true",
        help="load the weights even if they exceed the free memory",
    )


def _load(p: Parser) -> None:
    _memory(p)
    p.add_argument(
        "--check",
        choices=tuple(CHECKS),
        default="auto",
        help="self-check before use: auto (default; quick, or an earlier verdict that still "
        "holds), quick (one layer of each kind), full (every layer), off",
    )
    p.add_argument(
        "--no-check",
        dest="check",
        action="store_const",
        const="off",
        help="the same as --check off",
    )


def _sample(new_tokens: str) -> Callable[[Parser], None]:
    """The options of generation. new_tokens: the default of --max-new-tokens, in words."""

    def add(p: Parser) -> None:
        g = p.add_argument_group("generation (defaults are the checkpoint's recommendations)")
        g.add_argument(
            "--max-new-tokens",
            metavar="N",
            type=count,
            help=f"end after N tokens, or where the model's context ends (default: {new_tokens})",
        )
        _sampling(g)

    return add


def _sampling(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--temperature", metavar="T", type=float, help="0: always the likeliest token")
    g.add_argument("--top-k", metavar="K", type=int, help="only the K likeliest tokens (0: all)")
    g.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="only the likeliest tokens whose probabilities add up to P",
    )
    g.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        help="only tokens at least P times as likely as the likeliest",
    )
    g.add_argument(
        "--seed",
        metavar="S",
        type=seed,
        help="the same seed gives the same text (default: a new one)",
    )
    g.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text; may be repeated",
    )
