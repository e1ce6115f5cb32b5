"""The command line's words: commands, options, and what their values must look like."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import NoReturn

from gemma4_fast import __version__

PROGRAM = "gemma4-fast"
SEEDS = 2**63  # below this
Command = Callable[[Namespace], int]


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


def parser(commands: Mapping[str, Command]) -> Parser:
    """`commands` maps each command's name to the function that runs it."""
    top = Parser(
        prog=PROGRAM,
        description="Gemma 4 on the kernels that fit this machine, checked on this machine against plain PyTorch.",
        epilog=f"`{PROGRAM} COMMAND --help` lists a command's options. Without --model a small trained one is used.",
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, *groups: Callable[[Parser], None], description: str | None = None) -> Parser:
        added: Parser = subparsers.add_parser(name, help=summary, description=description or summary)
        added.set_defaults(run=commands[name])
        for group in groups:
            group(added)
        return added

    command("demo", "text, speed, kernels and the self-check in half a minute", _model, _load, _sample)
    p = command(
        "generate", "continue a text", _model, _load, _sample,
        description="Continue a text. The prompt is taken as it is; `chat` puts it into the model's chat template.",
    )  # fmt: skip
    source = p.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text; without it, standard input is read")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file (a last line break is cut off)")
    p = command(
        "chat", "talk with the model", _model, _load, _sample,
        description="Talk with the model, by the checkpoint's chat template. Standard input that is no terminal is "
        "taken a line a turn. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.",
    )  # fmt: skip
    p.add_argument("--system", metavar="TEXT", help="what the model is told about its part")
    p = command("check", "compare the model with the reference, layer by layer (exit code 0 or 1)", _model)
    p.add_argument("--level", choices=("full", "quick"), default="full", help="quick: one layer of each kind")
    p.add_argument("--seed", metavar="S", type=seed, default=0, help="of the random tokens it is compared on (default 0)")
    p = command(
        "info", "a model's numbers, the memory it needs, the kernels that will run", _model,
        description="A model's numbers, the memory it needs, and the kernels that will run here. Weights are not read. "
        "--model may also be a published model, without a checkpoint: e2b, e4b, 12b, 26b-a4b, 31b.",
    )  # fmt: skip
    p.add_argument("--context", metavar="N", nargs="+", type=count, help='tokens of context, as in 8192 or "8K"')
    p.add_argument("--batch", metavar="B", type=count, default=1, help="sequences at a time (default 1)")
    p.add_argument("--seed", metavar="S", type=seed, help="taken as by every command, and of no use here: nothing is random")
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
