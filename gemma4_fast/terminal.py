"""What the commands share when they talk to people and to machines: progress bars, rates, sizes, JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma4_fast.generate import Generation
    from gemma4_fast.sampling import Sampling


@contextmanager
def progress_bar(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A function (done, total) that shows and moves a bar on stderr, which disappears at the end.

    The bar appears at the first call. None if `shown` is False or stderr is not a terminal.
    """
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    time_columns = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), *time_columns
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(label, total=None)

    def move(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        progress.start()  # does nothing if it has started

    try:
        yield move
    finally:
        if progress.live.is_started:
            progress.stop()


def note(text: str) -> None:
    """One line for people, on stderr: stdout is for the result. Where nobody can read it, that is no reason to fail."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def fetching(repo: str, quiet: bool = False) -> None:
    """Say on a terminal that a download begins, and silence the hub client's report of each retry.

    quiet: say nothing, and show no progress either.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if quiet:
        disable_progress_bars()
    elif sys.stderr.isatty():
        note(f"gemma4-fast: looking for {repo} on the hub")


def print_json(value: Mapping[str, Any], *, indent: int | None = None) -> None:
    print(json.dumps(value, indent=indent), flush=True)


def size(count: float) -> str:
    """Bytes in binary units: "51.2 GiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.3g} {units[0]}"


def rate(count: int, seconds: float) -> float | None:
    """Tokens per second; None where nothing was timed."""
    return count / seconds if count > 0 and seconds > 0 else None


def rates(result: Generation, prefilled: int) -> dict[str, float | None]:
    """Seconds and tokens/s of one generation. The first new token comes from prefill, so decoding made one less."""
    return {
        "prefill_s": result.prefill_seconds,
        "decode_s": result.decode_seconds,
        "prefill_tok_s": rate(prefilled, result.prefill_seconds),
        "decode_tok_s": rate(len(result.token_ids) - 1, result.decode_seconds),
    }


def timing_line(result: Generation, prefilled: int) -> str:
    """ "prefill 9 tokens, 231 tok/s; decode 64 tokens, 48.1 tok/s"."""

    def figure(value: float | None) -> str:
        return "" if value is None else f", {value:.3g} tok/s" if value < 1000 else f", {value:.0f} tok/s"

    timed = rates(result, prefilled)
    return (
        f"prefill {prefilled} tokens{figure(timed['prefill_tok_s'])}; "
        f"decode {len(result.token_ids)} tokens{figure(timed['decode_tok_s'])}"
    )


def sampling_dict(sampling: Sampling) -> dict[str, Any]:
    return {"greedy": sampling.greedy, **vars(sampling)}


def versions() -> dict[str, str | None]:
    """Of this package, Python and the libraries that decide what runs; None for one that is not installed."""
    from importlib import metadata

    import torch

    from gemma4_fast import __version__

    found: dict[str, str | None] = {"gemma4_fast": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)  # the metadata of some builds leaves out the local part: +cpu, +cu130
    for name in ("triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
