"""The whole model beside its peers: each contender in a process of its own, in turns, on the same weights and tokens.

Processes because a peer may crash, be killed for its memory, or need another interpreter; and because a process's peak memory
is its own. Where all fit into memory at once they stay loaded and take turns run by run. Where they
do not, they are loaded one after another, in one order and then in the opposite one, so that a
machine that slows down meanwhile slows all of them alike. The rows say so.

A run is as short as its samples allow: contenders whose turns agree have no more of them, and a run
that exceeds its minutes gives each contender one turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemma4_fast import terminal
from gemma4_fast.bench.dummy import dummy
from gemma4_fast.bench.gguf_file import write_gguf
from gemma4_fast.bench.load import Load, burning
from gemma4_fast.bench.machine import free_bytes
from gemma4_fast.bench.plan import (
    EVERYTHING,
    FROM_FILES,
    GGUF,
    PEERS,
    SLOW,
    Contender,
    Plan,
    Workload,
    floor,
    process_of,
    processes,
    room_for,
)
from gemma4_fast.bench.process import Worker
from gemma4_fast.bench.recorder import fault
from gemma4_fast.bench.rows import OURS, Row, Spread, beside
from gemma4_fast.bench.timing import Roofline, Stopwatch, rotated
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.model import weights_size

PATIENCE = 30.0  # seconds that all turns of one contender with one workload may take together
AROUND = 20.0  # seconds that the rooflines before and after take, and ending the processes
WARM = 8  # tokens that dummy weights decode to warm up
AGREEING = 3  # counted turns after which a contender that is steady has had enough
STEADY = 1.05  # the largest ratio between the times of turns that agree
REST = 0.3  # seconds before each turn: OpenMP's threads spin for a while after their work, on the cores of the next
# Tokens of the prompt whose next token's log-probabilities are compared; how many of the likeliest; and of how many of the
# other's. Random weights have no favourites: in six layers the rounding of bf16 alone moves log-probabilities by 0.2, and what
# is among one's first 20 may be the other's 50th.
SCORED, LIKELIEST, OF = 16, 20, 1000


@dataclass
class Result:
    """What one contender did with one workload."""

    first_us: list[float] = field(default_factory=list)
    steps_us: list[float] = field(default_factory=list)
    turns: int = 0  # that are counted
    turn_us: list[float] = field(default_factory=list)  # the median step of each of them
    load: Load = field(default_factory=Load)  # what other processes took during them
    latest_s: float = 0.0  # that the latest turn took
    tokens: list[list[int]] | None = None  # of the uncounted run, which all contenders do on the same prompts
    peak_bytes: int | None = None
    cold: bool = False  # it was so slow that its first run is the one that counts
    fault: dict[str, Any] | None = None

    @property
    def settled(self) -> bool:
        """Whether the latest turns agree, so that more of them would tell nothing new."""
        if self.turns < AGREEING:
            return False
        latest = [times[-AGREEING:] for times in (self.first_us, self.turn_us) if times]
        return all(max(times) <= STEADY * min(times) for times in latest)


class ModelBench:
    """Runs a Plan and hands each finished row to `add(row, command)`."""

    def __init__(
        self,
        plan: Plan,
        roofline: Roofline,
        add: Callable[[Row, str], object],
        options: str,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.plan, self.add, self.options, self.progress = plan, add, options, progress
        self.contenders = plan.contenders()
        self.roofline, self.stopwatch = roofline, Stopwatch(plan.device)
        self.workers: dict[str, Worker] = {}
        self.faults: dict[Contender, dict[str, Any]] = {}  # those that cannot run at all
        self.notes: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.together = True  # whether all are loaded at once
        self.results: dict[tuple[Workload, Contender], Result] = {}
        self.probes: dict[Workload, dict[str, list[float]]] = {}
        self.scores: dict[Contender, list[tuple[int, float]]] = {}
        self.written: set[tuple[Workload, Contender]] = set()
        self.checked: set[Contender] = set()
        self.warmed: set[tuple[Workload, Contender]] = set()  # by the processes that run now
        self.most = plan.rounds  # counted turns that a contender may have so far
        self.until = math.inf  # when a contender that has had a turn gets no further one
        self.deadline = time.monotonic() + 60 * plan.minutes - AROUND

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma4-fast-bench-")))
            stack.callback(self._stop_all)
            self.scratch = scratch
            self.path = self._checkpoint()
            self.gguf = self._gguf()
            stack.callback(self._write_rest)  # Ctrl-C too keeps what was measured
            self.together = self._fit_together()
            if self.together:
                self._side_by_side()
            else:
                self._one_at_a_time()

    def _peers(self) -> list[str]:
        return list(dict.fromkeys(c.peer for c in self.contenders))

    def _processes(self) -> list[str]:
        return [p for p in self._peers() if process_of(p, self.plan.peers) == p]

    def _process_of(self, c: Contender) -> str:
        return process_of(c.peer, self.plan.peers)

    def _checkpoint(self) -> Path | None:
        """The folder with the weights. Dummies are written if a peer needs a folder."""
        plan = self.plan
        readers = tuple(p for p in FROM_FILES if p not in GGUF)
        if plan.path is not None or not set(self._peers()) & set(readers):
            return plan.path
        # The checkpoint, a GGUF file, and what a peer converts them to.
        if not self._has_room(3 * weights_size(plan.config, plan.dtype), FROM_FILES):
            return None
        self._say("writing the weights to a checkpoint")
        try:
            model = dummy(plan.config, dtype=plan.dtype, device=plan.device, seed=plan.seed)
            model.save_pretrained(self.scratch / "checkpoint")
            _flush(self.scratch / "checkpoint")
        except (MemoryError, OSError, RuntimeError) as e:
            self._rule_out(FROM_FILES, fault(e))
            return None
        del model
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()  # the contenders' processes need it
        return self.scratch / "checkpoint"

    def _gguf(self) -> Path | None:
        """The file for llama.cpp. Written here, as a peer's interpreter need not have what that takes."""
        plan = self.plan
        wanted = [c for c in self.contenders if c.peer in GGUF and c not in self.faults]
        if not wanted or not self._has_room(weights_size(plan.config, plan.dtype, plan.quantize), GGUF):
            return None
        file = self.scratch / "model.gguf"
        self._say("writing the weights to a GGUF file")
        try:
            if plan.dtype != torch.bfloat16:
                short = str(plan.dtype).removeprefix("torch.")
                raise UnsupportedError(f"dtype {short} is not measured with llama.cpp; its files here hold bf16")
            source = self.path or dummy(plan.config, dtype=plan.dtype, device=plan.device, seed=plan.seed)
            write_gguf(source, file, plan.quantize)
            _flush(file)
            return file
        except ModuleNotFoundError as e:
            self._rule_out(GGUF, {**fault(e), "message": f"{e.name}, which writes its GGUF file, is not installed"})
        except Exception as e:  # noqa: BLE001  whatever a foreign library raises is these contenders' result
            self._rule_out(GGUF, fault(e))
        finally:
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _has_room(self, need: int, peers: tuple[str, ...]) -> bool:
        """Whether the disk has so many bytes free; if not, that is these peers' result."""
        free = shutil.disk_usage(self.scratch).free
        if need > free:
            message = f"its files need {terminal.size(need)} of disk, and there are {terminal.size(free)}"
            self._rule_out(peers, {"status": "failed", "message": message})
        return need <= free

    def _rule_out(self, peers: tuple[str, ...], why: dict[str, str]) -> None:
        """None of these peers' contenders runs."""
        self.faults |= {c: why for c in self.contenders if c.peer in peers}

    def _fit_together(self) -> bool:
        plan = self.plan
        free = free_bytes(plan.device)
        each = weights_size(plan.config, plan.dtype, plan.quantize)
        return free is None or each <= room_for(len(processes(plan.peers)), free)

    # ---- workers
    def _start(self, process: str) -> None:
        """Loads one process; what fails becomes the fault of its contenders."""
        plan = self.plan
        mine = [c for c in self.contenders if self._process_of(c) == process and c not in self.faults]
        if not mine:
            return
        self._say(f"loading {process}")
        python = plan.pythons.get(process, sys.executable)
        try:
            worker = Worker(process, PEERS[process][0], python, self.scratch, plan.device)
        except OSError as e:
            self.faults |= {c: fault(e) for c in mine}
            return
        self.workers[process] = worker
        answer = worker.ask(
            do="load",
            path=None if self.path is None else str(self.path),
            gguf=None if self.gguf is None else str(self.gguf),
            config=plan.config.to_dict(),
            dtype=str(plan.dtype).removeprefix("torch."),
            quantize=plan.quantize,
            device="cpu" if plan.device.type == "cpu" else "cuda:0",  # the only one it sees
            threads=torch.get_num_threads(),
            seed=plan.seed,
            max_len=max(w.length + (2 + plan.rounds) * w.new for w in plan.workloads),
            max_batch=max(w.batch for w in plan.workloads),
            memory_bytes=free_bytes(plan.device),
        )
        if not answer["ok"]:
            self.faults |= {c: _fault_of(answer) for c in mine}
            self._stop(process)
            return
        self.versions[process], self.notes[process] = answer["version"], answer.get("note", "")
        if not self.together:
            alone = "loaded alone, since all contenders together do not fit into memory"
            self.notes[process] = "; ".join(n for n in (self.notes[process], alone) if n)
        prompt = Workload(1, min(SCORED, plan.config.max_position_embeddings - 1), 1).ids(plan.config.vocab_size, 0)
        for c in [c for c in mine if c not in self.scores]:
            answer = worker.ask(do="score", variant=c.variant, ids=prompt, new=min(OF, plan.config.vocab_size))
            if not answer["ok"] and worker.ended:
                self.faults[c] = _fault_of(answer)
                return self._renew(process)
            if answer["ok"]:
                self.scores[c] = [(token, p) for token, p in answer["top"]]
                if _distance(self._our_scores(), self.scores[c]) is None:
                    self.faults[c] = {
                        "status": "wrong",
                        "message": f"runs another model: its likeliest tokens are not {OURS}'s",
                    }
        if process == OURS and plan.check:
            for c in [c for c in mine if c not in self.checked]:
                self._say(f"checking {c.label}")
                self.checked.add(c)
                answer = worker.ask(do="check", variant=c.variant)
                if not answer["ok"]:
                    self.faults[c] = _fault_of(answer)
                elif not answer["right"]:
                    self.faults[c] = {"status": "wrong", "message": answer["verdict"]}
                if not answer["ok"] and worker.ended:
                    return self._renew(process)

    def _renew(self, process: str) -> None:
        """Where a process has ended, the contenders that shared it with the one at fault get a new one."""
        if process in self.workers and self.workers[process].ended:
            self._stop(process)
            self._start(process)

    def _our_scores(self) -> list[tuple[int, float]] | None:
        return next((self.scores[c] for c in self.contenders if c.peer == OURS and c in self.scores), None)

    def _stop(self, process: str) -> None:
        if process in self.workers:
            self.workers[process].stop()
            del self.workers[process]
            self.warmed = {(w, c) for w, c in self.warmed if self._process_of(c) != process}

    def _stop_all(self) -> None:
        try:
            for process in list(self.workers):
                self._stop(process)
        finally:  # a further Ctrl-C does not wait for them
            for worker in self.workers.values():
                worker.kill()

    # ---- time
    def _say(self, what: str) -> None:
        self.progress(f"{what} (about {_minutes(self._remaining())} left)")

    def _remaining(self) -> float:
        """Seconds that the rest will take, judged by the turns so far.

        They exceed the minutes that are left only if some contender has not had its one turn.
        """
        left = max(0.0, self.deadline - time.monotonic())
        known = [r.latest_s for r in self.results.values() if r.latest_s]
        if not known:
            return left
        typical = statistics.mean(known)
        needed = 0.0  # for those that have had no turn
        wanted = 0.0
        for w in self.plan.workloads:
            for c in self.contenders:
                result = self.results.get((w, c), Result())
                if c in self.faults or result.fault is not None or result.settled:
                    continue
                wanted += (self.plan.rounds - result.turns) * (result.latest_s or typical)
                if not result.turns:
                    needed += 2 * (result.latest_s or typical)
        return max(needed, min(wanted, left))

    def _share(self, parts: int) -> float:
        """When the first of the `parts` that are left has used its share of the time."""
        now = time.monotonic()
        return now + max(0.0, self.deadline - now) / parts

    # ---- turns
    def _side_by_side(self) -> None:
        for process in self._processes():
            self._start(process)
        self._steps()
        groups = self._groups()
        passes = [(heavy, group) for heavy in (False, True) for group in groups if self._of_weight(heavy)]
        for i, (heavy, group) in enumerate(passes):
            self.until = self._share(len(passes) - i)
            for round_ in range(self.plan.rounds + 1):  # the first warms up
                for c in rotated(self._of_weight(heavy), round_):
                    for w in group:
                        if not self._is_over(w, c):
                            self._say(f"{_name(w)}: round {round_} of {self.plan.rounds}, {c.label}")
                            self._probe(w)
                            self._turn(w, c, round_)
            for w in group:
                self._write(w)

    def _groups(self) -> list[list[Workload]]:
        """Workloads that take turns: the same one by itself and beside busy processes."""
        found: dict[Workload, list[Workload]] = {}
        for w in self.plan.workloads:
            found.setdefault(_quiet(w), []).append(w)
        return list(found.values())

    def _of_weight(self, heavy: bool) -> list[Contender]:
        return [c for c in self.contenders if c.is_heavy is heavy]

    def _one_at_a_time(self) -> None:
        """The first half of the turns in one order, the second in the opposite one."""
        forth = self._processes()
        visits = [(process, self.plan.rounds // 2 or 1) for process in forth]
        if self.plan.rounds > 1:
            visits += [(process, self.plan.rounds) for process in reversed(forth)]
        took: dict[str, float] = {}
        for i, (process, most) in enumerate(visits):
            start = time.monotonic()
            second = process in took
            if second and start + took[process] > self.deadline and process not in self.workers:
                continue  # loading it again takes more time than there is
            self.most = most
            # The second half has the time that the first leaves.
            until = self._share(len(visits) - i if second else len(forth) - i)
            if process not in self.workers:
                self._start(process)
            if process == OURS and not second:
                self._steps()
            self._visit(process, until, second)
            took[process] = time.monotonic() - start
            if i + 1 == len(visits) or visits[i + 1][0] != process:
                self._stop(process)

    def _visit(self, process: str, until: float, second: bool) -> None:
        """The turns that the contenders of one process have while it is loaded.

        until: when they should be done, in seconds of `time.monotonic`.
        """
        mine = [c for c in self.contenders if self._process_of(c) == process]
        groups = self._groups()
        for i, group in enumerate(groups):
            now = time.monotonic()
            self.until = now + max(0.0, until - now) / (len(groups) - i)
            for round_ in range(self.most + 1):
                for c in rotated(mine, round_):
                    for w in group:
                        if self._is_over(w, c, may_settle=second):
                            continue
                        self._say(f"{c.label}: {_name(w)}")
                        self._probe(w)
                        if (w, c) not in self.warmed:
                            self._turn(w, c, 0)
                        self._turn(w, c, self.results[w, c].turns + 1)

    def _probe(self, w: Workload) -> None:
        read, (product, _, _) = self.roofline.read, self.roofline.product(self.plan.dtype)
        samples = self.probes.setdefault(_quiet(w), {"read": [], "product": []})
        time.sleep(REST)
        for name, call in (("read", read), ("product", product)):
            samples[name].append(min(self.stopwatch.seconds(call) for _ in range(3)) * 1e6)  # the first wakes the threads
        time.sleep(REST)

    def _is_over(self, w: Workload, c: Contender, may_settle: bool = True) -> bool:
        """Whether a contender gets no more turns with this workload.

        It has failed or has had all of them, its turns agree, or one more would take too long.
        """
        if c in self.faults:
            self.results.setdefault((w, c), Result(fault=self.faults[c]))
        result = self.results.get((w, c), Result())
        if result.fault is not None or result.turns >= self.most or (may_settle and result.settled):
            return True
        impatient = (result.turns + 1) * result.latest_s > PATIENCE
        late = time.monotonic() + result.latest_s > self.until
        return result.turns > 0 and (impatient or late)

    def _turn(self, w: Workload, c: Contender, round_: int, again: bool = False) -> None:
        """Round 0 warms up and is not counted, unless it is so slow that it has to do. What compiles runs it `again` if it
        was slow: how long a turn takes is not known before."""
        result = self.results.setdefault((w, c), Result())
        process = self._process_of(c)
        if self._is_over(w, c, may_settle=False):
            return
        if process not in self.workers:
            result.fault = {"status": "failed", "message": "its process has ended"}
            return
        ids = w.ids(self.plan.config.vocab_size, round_)
        # The tokens of a checkpoint's warm-up are compared; dummy weights' are not.
        brief = round_ == 0 and self.plan.path is None and not w.depth
        new = min(WARM, w.new) if brief else w.new
        what = "depth" if w.depth else "prompt"
        load = Load()
        with burning(w.busy), load.measured():
            start = time.perf_counter()
            answer = self.workers[process].ask(do=what, variant=c.variant, ids=ids, new=new)
            result.latest_s = time.perf_counter() - start
        if not answer["ok"]:
            result.fault = _fault_of(answer)
            self._renew(process)
            return
        self.warmed.add((w, c))
        if round_ == 0:
            result.tokens = answer["tokens"] or None
            compiles = c.variant == "compile"
            if compiles and not again and result.latest_s * self.plan.rounds > PATIENCE:
                self._turn(w, c, 0, again=True)
            if compiles or w.depth or 2 * result.latest_s < PATIENCE:  # at depth some run a long prompt first
                return
            result.cold = True
        result.turns += 1
        result.load.add(load)
        if answer.get("first_s") is not None:
            result.first_us.append(answer["first_s"] * 1e6)
        if answer["steps_s"]:
            result.turn_us.append(statistics.median(answer["steps_s"]) * 1e6)
        result.steps_us += [s * 1e6 for s in answer["steps_s"]]
        if answer["peak_bytes"] is not None:
            result.peak_bytes = max(result.peak_bytes or 0, answer["peak_bytes"])

    # ---- rows
    def _write_rest(self) -> None:
        for w in self.plan.workloads:
            self._write(w)

    def _write(self, w: Workload) -> None:
        """The rows of all that have had turns with this workload, and none yet."""
        plan = self.plan
        dtype = str(plan.dtype).removeprefix("torch.")
        roof = self.roofline.of_samples(self.probes.get(_quiet(w), {}), plan.dtype)
        at: dict[str, Any] = {
            "model": plan.label, "layers": plan.config.num_hidden_layers, "vocab": plan.config.vocab_size, "batch": w.batch,
            "prompt_len": w.length, "new_tokens": w.new,
        }  # fmt: skip
        if plan.quantize:
            at["quantize"] = plan.quantize
        if w.busy:
            at["busy_processes"] = w.busy
        ours = next((r.tokens for c in self.contenders if (r := self.results.get((w, c))) and r.tokens), None)
        for c in self.contenders:
            result = self.results.get((w, c))
            if result is None or (w, c) in self.written or not (result.fault or result.steps_us or result.first_us):
                continue
            self.written.add((w, c))
            process = self._process_of(c)
            notes = [self.notes.get(process, "")]
            if c.variant == "compile":
                notes.append("default mode, static cache, grouped_mm experts")
            if c.is_heavy and self.together:
                notes.append("had its turns after the others")
            if result.cold:
                notes.append("so slow that its first run is counted")
            if c.peer != OURS:
                notes.append(_distance(self._our_scores(), self.scores.get(c)) or f"not compared with {OURS}")
                if plan.path is not None and not w.depth:  # dummy weights repeat the last token, whoever runs them
                    notes.append(_agreement(ours, result.tokens))
            version = self.versions.get(process)
            fields: dict[str, Any] = {
                "dtype": dtype,
                "roofline": roof,
                "peak_bytes": result.peak_bytes,
                "other_load": result.load.others,
                "message": "; ".join(n for n in notes if n),
                "versions": {process: version} if version and process != OURS else {},
            }
            if result.fault is not None:
                fields |= {**result.fault, "peak_bytes": None, "roofline": None}
            quiet = self.results.get((_quiet(w), c), Result()) if w.busy else Result()
            phases = [("decode", result.steps_us, quiet.steps_us, 1, w.length)]
            if not w.depth:
                phases.insert(0, ("prefill", result.first_us, quiet.first_us, w.length, 0))
            for phase, samples, undisturbed, new, before in phases:
                if result.fault is None and not samples:
                    continue
                where = "at " if phase == "decode" else ""
                name = f"{phase} {where}{w.length}, batch {w.batch}{beside(w.busy)}"
                row = Row("model", name, c.label, params={**at, "phase": phase, "depth": w.depth}, **fields)
                if result.fault is None:
                    need = floor(plan.config, plan.dtype, plan.quantize, w.batch, new, before)
                    row.time_us, row.tokens = Spread.of(samples), w.batch * new
                    row.bytes, row.flops = need.bytes, need.flops
                    if undisturbed:
                        row.of_quiet = round(statistics.median(undisturbed) / row.time_us.median, 4)
                self.add(row, f"{self._command(w)}{self._asking_for(c)}")

    def _steps(self) -> None:
        """A decode step by op, of each of this package's backends, for each batch."""
        seen: set[int] = set()
        for w in self.plan.workloads:
            if w.batch in seen or w.depth or w.busy:
                continue
            seen.add(w.batch)
            for c in [c for c in self.contenders if c.peer == OURS and c not in self.faults]:
                if OURS not in self.workers:
                    return
                self._say(f"{c.label}: one decode step by op")
                ids = w.ids(self.plan.config.vocab_size, 0)
                answer = self.workers[OURS].ask(do="step", variant=c.variant, ids=ids, new=min(w.new, 32))
                params = {"model": self.plan.label, "layers": self.plan.config.num_hidden_layers, "batch": w.batch,
                          "vocab": self.plan.config.vocab_size, "prompt_len": w.length}  # fmt: skip
                name = f"decode step at {w.length}, batch {w.batch}"
                row = Row("step", name, c.label, dtype=str(self.plan.dtype).removeprefix("torch."), params=params)
                if answer["ok"]:
                    row.time_us = Spread.of([s * 1e6 for s in answer["steps_s"]])
                    parts = {op: Spread.of([s * 1e6 for s in took]).median for op, took in answer["parts_s"].items()}
                    row.parts = {op: round(parts[op], 2) for op in sorted(parts, key=lambda op: -parts[op])}
                    if (launches := answer["launches"]) is not None:
                        row.params["launches"] = launches
                        each = launches / self.plan.config.num_hidden_layers
                        row.message = f"{launches} kernels, {each:.1f} a layer with what is before and behind them"
                else:
                    row.status, row.message = answer["status"], answer["message"]
                self.add(row, self._command(w))
                if not answer["ok"]:
                    self._renew(OURS)

    def _command(self, w: Workload) -> str:
        size = f"--depth {w.length}" if w.depth else f"--prompt {w.length}"
        beside = f" --busy {w.busy}" if w.busy else ""
        return f"model {self.options} {size} --decode {w.new} --batch {w.batch}{beside}"

    def _asking_for(self, c: Contender) -> str:
        """The options that make this contender take part."""
        if c.variant == SLOW:
            return f" --peers {EVERYTHING}"
        if c.peer != OURS:
            return f" --peers {c.peer}"
        return f" --backend auto,{c.variant}" if c.variant and not self.plan.backends else ""


def _flush(path: Path) -> None:
    """Waits until a file, or the files of a folder, are on the disk.

    Otherwise the next large allocation would wait for that, for a minute or more.
    """
    for file in path.iterdir() if path.is_dir() else [path]:
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def _fault_of(answer: dict[str, Any]) -> dict[str, Any]:
    return {k: answer[k] for k in ("status", "message")}


def _name(w: Workload) -> str:
    return f"{'depth' if w.depth else 'prompt'} {w.length}, batch {w.batch}{beside(w.busy)}"


def _quiet(w: Workload) -> Workload:
    """The same workload on the machine by itself."""
    return dataclasses.replace(w, busy=0)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _distance(ours: list[tuple[int, float]] | None, theirs: list[tuple[int, float]] | None) -> str | None:
    """How far the log-probabilities of our likeliest next tokens lie apart; None if it cannot be the same model, as fewer than
    half of them are likely there, or half of them differ by more than a nat. Empty if one of the two is not known."""
    if not ours or not theirs:
        return ""
    ours, other = ours[:LIKELIEST], dict(theirs)
    both = sorted(abs(p - other[token]) for token, p in ours if token in other)
    if 2 * len(both) < len(ours) or both[len(both) // 2] > 1.0:
        return None
    return f"log-probabilities within {both[-1]:.2g} of {OURS}'s"


def _agreement(ours: list[list[int]] | None, theirs: list[list[int]] | None) -> str:
    """How far greedy decoding agrees, in the sequence where it parts first."""
    if not ours or not theirs:
        return ""
    same = min(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    )
    return f"greedy tokens agree: {same} of {len(ours[0])}"
