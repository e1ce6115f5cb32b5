"""Where finished rows go, each at once: to a file, and to standard output as JSON lines. What raised becomes a row too."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TextIO

import torch

from gemma4_fast.bench import rows
from gemma4_fast.bench.machine import clocks, environment
from gemma4_fast.bench.rows import Row
from gemma4_fast.errors import UnsupportedError, out_of_memory


class Recorder:
    """Completes each row with where and when it was measured, and keeps it.

    output: a file for JSON lines. ValueError, before any work, if it is there already and `append` is not set.
    """

    def __init__(
        self, device: torch.device, output: Path | None = None, *, append: bool = False, stdout: TextIO | None = None
    ) -> None:
        if output is not None and output.exists() and not append:
            raise ValueError(f"{output} is there already: give another --output, or --append to add to it")
        self.rows: list[Row] = []
        self._file = None if output is None else open(output, "a", encoding="utf-8")  # noqa: SIM115  closed with the recorder
        self._stdout = stdout
        self._device, self._environment = device, environment(device)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Row, command: str = "") -> Row:
        """command: what makes this row again, without the program's name."""
        own = dict(self._environment)
        own["machine"] = {**own["machine"], **clocks(self._device)}
        own["versions"] = {**own["versions"], **row.versions}
        own["finished"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = dataclasses.replace(row, command=f"gemma4-fast bench {command}" if command else row.command, **own)
        self.rows.append(row)
        for stream in (self._file, self._stdout):
            if stream is not None:
                stream.write(rows.line(row) + "\n")
                stream.flush()  # whatever ends this run, what is done is kept
        return row


def fault(e: BaseException) -> dict[str, str]:
    """The status and message of a row whose measurement raised `e`."""
    text = " ".join(str(e).split())[:300]
    if isinstance(e, UnsupportedError):
        return {"status": "unsupported", "message": text}
    if out_of_memory(e):
        return {"status": "out of memory", "message": text or type(e).__name__}
    return {"status": "failed", "message": f"{type(e).__name__}: {text}"}
