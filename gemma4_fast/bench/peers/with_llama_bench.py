"""llama.cpp's own benchmark program as a contender: what its users quote. Standard library only."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any


class Unsupported(Exception):
    """See worker.py."""


class Peer:
    """Each call runs the program anew: it loads the model, warms up (the prompt, and one new token) and measures once."""

    elsewhere = True

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        program = shutil.which("llama-bench")
        if program is None:
            raise FileNotFoundError("llama-bench is not on PATH")
        device, _, index = spec["device"].partition(":")
        where = ["-ngl", "0"] if device == "cpu" else ["-sm", "none", "-mg", index or "0"]
        self.command = [program, "-m", spec["gguf"], "-t", str(spec["threads"]), "-r", "1", "-o", "json", *where]
        found = self._run(1, 0, 0)
        if device != "cpu" and found["backends"] == "CPU":
            raise Unsupported("this build of llama.cpp has no GPU support")
        note = "its own random tokens; no sampling; a step is the average of a run"
        return {"version": f"{found['build_number']} ({found['build_commit']})", "note": note}

    def prompt(self, variant: str, ids: list[list[int]], new: int) -> tuple[float, list[float], list[list[int]]]:
        """first_s is the prompt's run without the choice of a token; the new tokens have a run of their own, as one that
        measures both would start them from an empty cache."""
        _one(ids)
        length = len(ids[0])
        first = self._run(length, 0, 0)["avg_ns"] / 1e9
        step = self._run(0, new - 1, length)["avg_ns"] / 1e9 / (new - 1) if new > 1 else 0.0
        return first, [step] if new > 1 else [], []

    def depth(self, variant: str, ids: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        _one(ids)
        return [self._run(0, new, len(ids[0]))["avg_ns"] / 1e9 / new], []

    def _run(self, prompt: int, new: int, depth: int) -> dict[str, Any]:
        """What it says of one test: `prompt` tokens at once or `new` tokens one by one, after `depth` tokens."""
        command = [*self.command, "-p", str(prompt), "-n", str(new), "-d", str(depth)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"llama-bench ended with exit code {done.returncode}: {last}")
        (found,) = json.loads(done.stdout)
        return dict(found)


def _one(ids: list[list[int]]) -> None:
    if len(ids) != 1:
        raise Unsupported("llama-bench runs one sequence")
