"""Where finished rows go, each at once: to a file, and to standard output as JSON lines. What raised becomes a row too."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import torch

from gemma4_fast import terminal
from gemma4_fast.bench import load, rows
from gemma4_fast.bench.machine import clocks, environment
from gemma4_fast.bench.rows import Row
from gemma4_fast.errors import UnsupportedError, out_of_memory


class Recorder:
    """Completes each row with where and when it was measured, and keeps it.

    output: a file for JSON lines. ValueError, before any work, if it is there already and `append` is not set, or holds
    something else than rows. If it cannot be written any more (a full disk), that is told once, `failed` is set, and the
    rows are still kept in `rows`.
    """

    def __init__(
        self, device: torch.device, output: Path | None = None, *, append: bool = False, stdout: TextIO | None = None
    ) -> None:
        self.rows: list[Row] = []
        self.failed = False
        self._file = None if output is None else _opened(output, append)
        self._stdout = stdout
        self._device, self._environment = device, environment(device)
        self._rates = load.Rates()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def add(self, row: Row, command: str = "") -> Row:
        """command: what makes this row again, without the program's name."""
        own = dict(self._environment)
        own["machine"] = {**own["machine"], **clocks(self._device)}
        own["versions"] = {**own["versions"], **row.versions}
        own["finished"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = dataclasses.replace(row, command=f"gemma4-fast bench {command}" if command else row.command, **own)
        row.drift = self._rates.drift(row)
        if row.drift is not None or row.other_load is not None:
            row.busy = load.disturbed(row)
        self.rows.append(row)
        line = rows.line(row) + "\n"
        if self._file is not None and not self.failed:
            self._save(self._file, line.encode())
        if self._stdout is not None:
            try:
                self._stdout.write(line)
                self._stdout.flush()
            except BrokenPipeError:  # once is enough to end the work; the rows that are then at hand still get into the file
                self._stdout = None
                raise
        return row

    def _save(self, file: BinaryIO, line: bytes) -> None:
        """All of the line, at once (whatever ends this run, what is done is kept), or nothing of it."""
        written = 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError as e:
            self.failed = True
            with contextlib.suppress(OSError):  # half a line would spoil the rows before it
                file.truncate(file.tell() - written)
            terminal.note(f"gemma4-fast: {file.name}: {e.strerror}; later rows are not saved there")


def _opened(output: Path, append: bool) -> BinaryIO:
    """The file, unbuffered, at its end, and at the beginning of a line."""
    if output.exists() and not append:
        raise ValueError(f"{output} exists: give another --output, or --append to add to it")
    file = cast(BinaryIO, open(output, "ab", buffering=0))  # noqa: SIM115  the recorder closes it
    if output.is_file() and output.stat().st_size:
        try:
            rows.read(output)
        except (ValueError, OSError) as e:
            file.close()
            raise ValueError(f"--append takes a file of rows: {e}") from e
        if not output.read_bytes().endswith(b"\n"):
            file.write(b"\n")
    return file


def fault(e: BaseException) -> dict[str, str]:
    """The status and message of a row whose measurement raised `e`."""
    text = " ".join(str(e).split())[:300]
    if isinstance(e, UnsupportedError):
        return {"status": "unsupported", "message": text}
    if isinstance(e, ModuleNotFoundError):
        return {"status": "missing", "message": f"{e.name} is not installed"}
    if out_of_memory(e):
        return {"status": "out of memory", "message": text or type(e).__name__}
    return {"status": "failed", "message": f"{type(e).__name__}: {text}"}
