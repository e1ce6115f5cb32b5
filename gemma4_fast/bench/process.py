"""A contender's process: started, asked, and ended with all that it started itself."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gemma4_fast.bench.machine import limit_memory

LIMIT = 600.0  # seconds after which a process that does not answer is ended
Answer = dict[str, Any]


class Worker:
    """`ask` never raises for what goes wrong in there: the answer says so. OSError: the interpreter does not start.

    The process has a session of its own, so that what it started (a benchmark program, compilers) can be ended with it. So
    Ctrl-C does not reach it: what interrupts `ask` ends it.
    """

    def __init__(self, name: str, file: str, python: str, scratch: Path, device: torch.device) -> None:
        self.device = device
        here = Path(__file__).resolve().parent
        root = str(here.parent.parent)
        # A CPU row must not use a GPU on the quiet, as llama.cpp would for long prompts. Otherwise it sees one GPU, its own.
        seen = "" if device.type == "cpu" else _visible(device)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        self.log = open(scratch / f"{name}.log", "ab")  # noqa: SIM115  closed by stop
        self.process = subprocess.Popen(
            [python, str(here / "peers" / "worker.py"), str(here / "peers" / file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": seen, "HIP_VISIBLE_DEVICES": seen},
        )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ask(self, **request: Any) -> Answer:
        """The answer to a request of worker.py's protocol; if it is not "ok", it has a row's status and message."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self._reset_peak()
        if self.device.type == "cpu":
            with contextlib.suppress(OSError):  # it has ended
                limit_memory(self.process.pid)
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(LIMIT, end)
        timer.daemon = True
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            self.kill()
            raise
        finally:
            timer.cancel()
        if not line:
            return self._how_it_ended(late.is_set())
        try:
            answer = _checked(request, json.loads(line))
        except (ValueError, RecursionError):
            self.kill()  # what it says next would be taken for the answer to another question
            self.process.wait()
            return _failed(f"its process answered {line.strip()[:80]!r}, which is no answer")
        answer.setdefault("peak_bytes", self._peak() if self.device.type == "cpu" else None)
        return answer

    def _how_it_ended(self, late: bool) -> Answer:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed its output, and lives
            self.kill()
            self.process.wait()
            return _failed("closed its output without an answer")
        if late:
            return _failed(f"no answer within {LIMIT:.0f} s")
        if code == -signal.SIGKILL:
            why = "killed by the system, most likely because memory ran out"
            return _failed(why, "out of memory")
        self.log.flush()
        last = Path(self.log.name).read_bytes()[-4000:].decode(errors="replace").strip().splitlines()[-1:]
        return _failed(": ".join([f"ended with exit code {code}", *last])[:250])

    def _peak(self) -> int | None:
        with contextlib.suppress(OSError, StopIteration):
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))) << 10
        return None

    def _reset_peak(self) -> None:
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def kill(self) -> None:
        """Ends it and its children now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Lets it end by itself, for ten seconds."""
        try:
            with contextlib.suppress(OSError, ValueError):
                assert self.process.stdin is not None
                self.process.stdin.write('{"do": "quit"}\n')
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        finally:
            self.kill()
            self.process.wait()
            self.log.close()


def _visible(device: torch.device) -> str:
    """What CUDA_VISIBLE_DEVICES must be for a process that shall see this GPU alone."""
    seen, index = os.environ.get("CUDA_VISIBLE_DEVICES"), device.index or 0
    return seen.split(",")[index] if seen else str(index)


def _failed(message: str, status: str = "failed") -> Answer:
    return {"ok": False, "status": status, "message": message}


# ---------------------------------------------------------------- answers
def _is_time(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x) and x > 0


def _are_times(x: Any) -> bool:
    return isinstance(x, list) and all(map(_is_time, x))


def _some_times(x: Any) -> bool:
    return _are_times(x) and len(x) > 0


def _is_token(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _are_tokens(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(row, list) and all(map(_is_token, row)) for row in x)


def _is_log(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _are_scores(x: Any) -> bool:
    return isinstance(x, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_token(pair[0]) and _is_log(pair[1]) for pair in x
    )


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


# What the answer to each request holds, beside "ok".
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "load": {"version": _is_text},
    "prompt": {"first_s": _is_time, "steps_s": _are_times, "tokens": _are_tokens},
    "depth": {"steps_s": _some_times, "tokens": _are_tokens},
    "score": {"top": _are_scores},
    "step": {
        "steps_s": _some_times,
        "parts_s": lambda x: isinstance(x, dict) and all(map(_some_times, x.values())),
        "launches": lambda x: x is None or isinstance(x, int),
    },
    "check": {"right": lambda x: isinstance(x, bool), "verdict": _is_text},
}
_FAULT: dict[str, Callable[[Any], bool]] = {"status": _is_text, "message": _is_text}


def _checked(request: dict[str, Any], answer: Any) -> Answer:
    """The answer itself. ValueError if it is not one to this request."""
    if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
        raise ValueError
    fields = _FIELDS[request["do"]] if answer["ok"] else _FAULT
    if not all(name in answer and right(answer[name]) for name, right in fields.items()):
        raise ValueError
    if not _is_text(answer.get("note", "")) or (answer.get("tokens") and len(answer["tokens"]) != len(request["ids"])):
        raise ValueError
    return answer
