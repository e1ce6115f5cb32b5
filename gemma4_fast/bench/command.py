"""`gemma4-fast bench ...`: what each subcommand runs, and what becomes of its rows."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from gemma4_fast import ops, terminal
from gemma4_fast.bench import compare as comparing
from gemma4_fast.bench import html, markdown, memory, model, plots, rows, scale, show
from gemma4_fast.bench import ops as op_rows
from gemma4_fast.bench.machine import free_bytes, label, machine, memory_limit
from gemma4_fast.bench.plan import EVERYTHING, MINUTES, PEERS, Plan, fitting, process_of, processes, room_for, workloads
from gemma4_fast.bench.recorder import Recorder
from gemma4_fast.bench.rows import OURS, Row
from gemma4_fast.bench.timing import RATE_DTYPES, Roofline
from gemma4_fast.config import PRESETS, Gemma4Config, preset_name
from gemma4_fast.memory import Load, require
from gemma4_fast.model import parse_device, parse_dtype
from gemma4_fast.spelling import did_you_mean

PROMPTS = [128, 512]  # tokens
Say = Callable[[str], None]
Add = Callable[[Row, str], object]
Work = Callable[[Say, Add], None]


def run(args: Namespace) -> int:
    """The command; returns the exit code."""
    if args.bench == "compare":
        return compare(args)
    if args.bench == "report":
        return report(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, dtype = parse_device(args.device), parse_dtype(args.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and graphs are made on the current one
    if args.bench == "all":
        return everything(args, device, dtype)
    work = WORK[args.bench](args, device, dtype)  # what is wrong with the arguments is said here, before any work
    _check_targets(args)
    code, made = measured(args, device, work, args.output, args.append)
    present(made, args)
    if args.bench == "scale" and args.write:
        if code:
            raise ValueError("no crossover is written from a run that was stopped, had a wrong result or could not be saved")
        _write_crossovers(made)
    return code


def measured(args: Namespace, device: torch.device, work: Work, output: Path | None, append: bool) -> tuple[int, list[Row]]:
    """Does the work -> exit code, and the rows. Ctrl-C keeps those that are done (130); a wrong result is 1, and a file that
    could not be written 2."""
    stdout = sys.stdout if args.json else None
    with Recorder(device, output, append=append, stdout=stdout) as recorder, memory_limit(device), _progress(args.quiet) as say:
        try:
            with _terminated_like_ctrl_c():
                work(say, recorder.add)
        except KeyboardInterrupt:
            terminal.note(f"gemma4-fast: stopped; the {len(recorder.rows)} finished rows are kept")
            return 130, recorder.rows
    if recorder.failed:
        return 2, recorder.rows
    return int(any(row.status == "wrong" for row in recorder.rows)), recorder.rows


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal too end the work in order: rows kept, processes ended, temporary files removed."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other can set a handler
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Say]:
    """Says what is going on, on stderr: in one line that changes on a terminal, a line each elsewhere."""
    if quiet:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield lambda text: terminal.note(f"bench: {text}")
    else:
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield status.update


# ---------------------------------------------------------------- what is measured
def _common(args: Namespace, device: torch.device, dtype: torch.dtype) -> str:
    """The options that every row's command has."""
    return f"--dtype {str(dtype).removeprefix('torch.')} --device {device} --threads {torch.get_num_threads()}"


def _names(wanted: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """`wanted`, or all of them. ValueError for one that is not known."""
    if unknown := [w for w in wanted if w not in known]:
        got = ", ".join(map(repr, unknown))
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"unknown {what} {got}; expected {', '.join(known)}{hint}")
    return list(wanted) or list(known)


def _between_rooflines(
    args: Namespace, device: torch.device, dtype: torch.dtype, inner: Callable[[Roofline, Say, Add], None]
) -> Work:
    """The machine's own figures, what `inner` measures, and the machine's figures again."""
    command = f"ops --op rms_norm {_common(args, device, dtype)}"  # the shortest that measures them

    def work(say: Say, add: Add) -> None:
        roofline = Roofline(device)
        dtypes = list(dict.fromkeys((dtype, *RATE_DTYPES)))
        for when in ("start", "end"):
            say(f"the roofline at the {when}: reading, copying, multiplying")
            for row in roofline.rows(when, dtypes):
                add(row, command)
            if when == "start":
                inner(roofline, say, add)

    return work


def _cases(cases: list[op_rows.Case], args: Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    backends = ops.parse_backend(args.backend)
    options = f"{_common(args, device, dtype)} --seconds {args.seconds:g} --seed {args.seed}"

    def inner(roofline: Roofline, say: Say, add: Add) -> None:
        bench = op_rows.OpBench(roofline, dtype, backends, seconds=args.seconds, seed=args.seed, options=options)
        for i, case in enumerate(cases):
            say(f"{i + 1} of {len(cases)}: {case.name}")
            for row, command in bench.run(case):
                add(row, command)

    return _between_rooflines(args, device, dtype, inner)


def op_work(args: Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    names = _names(args.op, list(ops.TABLE), "op")
    found = op_rows.cases(names, args.case, device, args.rivals)
    return _cases(op_rows.quantized(found, args.quantize), args, device, dtype)


def scale_work(args: Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    cases = scale.cases(_names(args.axis, list(scale.AXES), "axis"), device, args.points)
    if not cases:
        raise ValueError("no point is left: the axis of experts goes from 8 to 128")
    if args.write and args.quantize:
        raise ValueError("--write needs weights that are not quantized: leave --quantize out")
    return _cases(op_rows.quantized(cases, args.quantize), args, device, dtype)


def cache_work(args: Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    ops.parse_backend(args.backend)
    every = memory.members()
    asked = [preset_name(name) or name for name in args.config]
    wanted = {name: every[name] for name in _names(asked, list(every), "config")}

    def work(say: Say, add: Add) -> None:
        for name, layers in wanted.items():
            say(f"caches of {name}")
            for row, command in memory.rows({name: layers}, args.context or memory.CONTEXTS, dtype, device):
                add(row, command)

    return work


def model_plan(args: Namespace, device: torch.device, dtype: torch.dtype) -> Plan:
    """The run that `bench model` asks for. ValueError for what cannot be."""
    known = [p for p in PEERS if p != OURS]
    named = _names(args.peers, [*known, EVERYTHING], "peer") if args.peers else []
    every = EVERYTHING in named
    peers = tuple(known if every else named)
    pythons = {}
    for item in args.peer_python:
        peer, _, python = item.partition("=")
        if not (Path(python).is_file() and os.access(python, os.X_OK)):
            raise ValueError(f"--peer-python takes PEER=PROGRAM, and there is no program {python!r}")
        if (process := process_of(peer, peers)) != peer:
            raise ValueError(f"{peer} runs in {process}' process: --peer-python {process}=... is for both")
        if peer not in peers:
            raise ValueError(f"--peer-python names {peer!r}, which is not among --peers")
        pythons[peer] = python
    path = None
    if args.model is not None:
        from gemma4_fast.weights import resolve

        if args.layers or args.vocab:
            raise ValueError("--layers and --vocab cut a --config with dummy weights; a --model runs as it is")
        path = resolve(args.model)
        config = Gemma4Config.from_pretrained(path)
        name = path.name if Path(args.model).is_dir() else args.model  # rows do not tell where a folder lies
    else:
        name = _names([preset_name(args.config) or args.config], list(PRESETS), "config")[0]
        config = PRESETS[name]
        if args.layers or args.vocab:
            config = config.slice(num_layers=args.layers, vocab_size=args.vocab)
        else:
            free = free_bytes(device)
            room = room_for(len(processes(peers)), free or 8 << 30)
            config = fitting(config, dtype, int(0.9 * room))  # a little less will be free when they start
    prompts = args.prompt or ([] if args.depth else PROMPTS)
    asked = list(workloads(prompts, args.depth, args.batch, args.decode, args.busy or 0))
    for w in asked:
        if w.length + w.new * (args.rounds + 2) > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"{w.length} tokens and {args.rounds} rounds of {w.new} exceed this model's {limit} positions")
    if not args.ignore_memory:
        load = Load(
            config=config,
            dtype=dtype,
            quantize=args.quantize,
            context=max(w.length + w.new for w in asked),
            batch=max(w.batch for w in asked),
            check=args.check != "off",
        )
        require(load, device, f"{name}, {config.num_hidden_layers} layers,", command_line=True)
    return Plan(
        config=config,
        label=name,
        dtype=dtype,
        device=device,
        workloads=asked,
        peers=peers,
        backends=own_contenders(args.backend),
        path=path,
        quantize=args.quantize,
        rounds=args.rounds,
        check=args.check != "off",
        seed=args.seed,
        pythons=pythons,
        every=every,
        minutes=args.minutes,
    )


def own_contenders(backend: str | None) -> tuple[str, ...]:
    """ "auto,triton" -> ("", "triton"): each a contender of its own, and the automatic choice may be one of them."""
    names = [name.strip() for name in (backend or "auto").split(",")]
    ops.parse_backend([name for name in names if name != "auto"] or "auto")
    return () if names == ["auto"] else tuple("" if name == "auto" else name for name in names)


def model_work(args: Namespace, device: torch.device, dtype: torch.dtype) -> Work:
    plan = model_plan(args, device, dtype)
    if plan.path is not None:
        what = f"--model {shlex.quote(plan.label)}"
    else:
        what = f"--config {plan.label} --layers {plan.config.num_hidden_layers} --vocab {plan.config.vocab_size}"
    options = f"{what} {_common(args, device, dtype)} --rounds {args.rounds} --seed {args.seed}"
    options += f" --quantize {plan.quantize}" if plan.quantize else ""
    options += f" --backend {','.join(b or 'auto' for b in plan.backends)}" if plan.backends else ""
    options += "" if plan.check else " --check off"
    options += f" --minutes {plan.minutes}" if plan.minutes != MINUTES else ""
    return _between_rooflines(
        args, device, dtype, lambda roofline, say, add: model.ModelBench(plan, roofline, add, options, say).run()
    )  # fmt: skip


WORK: dict[str, Callable[[Namespace, torch.device, torch.dtype], Work]] = {
    "ops": op_work,
    "model": model_work,
    "scale": scale_work,
    "cache": cache_work,
}


FINISHING = 0.06  # of the minutes: to end what runs, and to draw


class _Over(Exception):
    """The time of the standard report is over."""


def everything(args: Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """The standard report of this machine: all four, into results/<machine>/, beside what was there before.

    When the minutes are over, what is left is not begun. The whole-model part comes last, as it takes what there is.
    """
    folder = args.results / label(machine(device))
    file, previous, pages = folder / "standard.jsonl", folder / "standard.previous.jsonl", folder / "report"
    part = folder / "standard.part.jsonl"
    given = Namespace(
        **{k: v for k, v in vars(args).items() if k != "config"}, op=[], case=[], rivals=False, axis=[], points=None,
        context=None, depth=[], layers=None, vocab=None, model=None, check="quick", batch=[1], prompt=PROMPTS,
        decode=32, rounds=3, busy=None, write=False,
    )  # fmt: skip
    parts = []
    for name in ("cache", "ops", "scale", "model"):
        config = [] if name == "cache" else args.config
        own = {**vars(given), "config": config}
        if name != "model":  # the ops' own cases have quantized weights among them
            own["quantize"] = None
        parts.append(WORK[name](Namespace(**own), device, dtype))
    plots.require()
    pages.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * args.minutes * (1 - FINISHING)

    def work(say: Say, add: Add) -> None:
        def say_in_time(text: str) -> None:
            if time.monotonic() > deadline:
                raise _Over
            say(text)

        for inner in parts:
            try:
                inner(say_in_time, add)
            except _Over:
                over = f"{args.minutes} minutes are over; the rest was not measured"
                terminal.note(f"bench: {over} (--minutes allows more)")
                return

    code, made = measured(args, device, work, part, append=False)
    if code in (2, 130):
        terminal.note(f"rows: {part}")
        if code == 2 and not args.json:  # they are not in the file
            show.tables(made, show.console())
        return code
    if file.exists():
        os.replace(file, previous)
    os.replace(part, file)
    try:
        rows.write_csv(made, pages / "rows.csv")
        html.write(made, pages / "index.html", plots.draw(made, pages))
    finally:
        if not args.json:
            show.tables(made, show.console())
    terminal.note(f"rows: {file}\nreport: {pages / 'index.html'}")
    if previous.exists():
        try:
            found = comparing.compare(rows.read(previous), made, 0.05)
        except ValueError as e:  # of another schema, or nothing in common: no reason to fail
            terminal.note(f"not compared with the previous run: {e}")
        else:
            terminal.note("compared with the previous run:\n" + comparing.text(found, 0.05))
    return code


def _write_crossovers(made: Sequence[Row]) -> None:
    found = scale.crossovers(made)
    if not found:
        raise ValueError("no crossover was measured; use --axis tokens")
    scale.write_crossovers(found)
    terminal.note("written to gemma4_fast/ops/moe.py: " + ", ".join(f"{where}: {x} tokens" for where, x in found.items()))


# ---------------------------------------------------------------- what becomes of the rows
def _check_targets(args: Namespace) -> None:
    """ValueError, before any work, for a file that could not be written at its end."""
    output = getattr(args, "output", None)
    if output is None and getattr(args, "append", False):
        raise ValueError("--append takes the file of an --output")
    targets = [target for target in (output, args.csv, args.html) if target is not None]
    inputs = list(dict.fromkeys(getattr(args, "files", [])))
    for target in targets:
        try:
            there = target.resolve().parent.is_dir()
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{target}: {e}") from e
        if not there:
            raise ValueError(f"{target}: there is no folder {target.parent}")
        if target.is_dir():
            raise ValueError(f"{target} is a folder, expected a file")
    if args.html is not None and args.html.exists() and not args.html.is_file():
        raise ValueError(f"{args.html} is not a regular file, so --html cannot replace it")
    taken = [*targets, *inputs]
    if any(_same(a, b) for i, a in enumerate(taken) for b in taken[:i] if a in targets or b in targets):
        raise ValueError("two of the files are the same; an output must not replace another file")
    if args.plot is not None and args.plot.exists() and not args.plot.is_dir():
        raise ValueError(f"--plot takes a folder, and {args.plot} is a file")
    if args.plot is not None:
        for file in taken:
            if file.suffix == ".png" and file.resolve().parent == args.plot.resolve():
                raise ValueError(f"{file} lies where --plot puts its pictures, and could be replaced by one")
    if args.plot is not None or args.html is not None:
        plots.require()


def _same(a: Path, b: Path) -> bool:
    """Whether two names are one file: also by a link of either kind."""
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


def present(made: Sequence[Row], args: Namespace) -> None:
    """The files that were asked for, and tables on stdout (unless that has the JSON lines). Whatever becomes of the one, the
    other is not lost by it."""
    if not made:
        return
    try:
        _write_files(made, args)
    finally:
        if not args.json:
            show.tables(made, show.console())
            for where, x in scale.crossovers(made).items():
                print(f"moe_decode is the faster or equal path up to {x} tokens on {where}")


def _write_files(made: Sequence[Row], args: Namespace) -> None:
    if args.csv is not None:
        rows.write_csv(made, args.csv)
    drawn = {}
    if args.plot is not None:
        args.plot.mkdir(parents=True, exist_ok=True)
        drawn = plots.draw(made, args.plot)
        terminal.note(f"pictures: {', '.join(str(path) for path in drawn.values()) or 'these rows give none'}")
    if args.html is not None:
        html.write(made, args.html, drawn)
        terminal.note(f"report: {args.html}")


def report(args: Namespace) -> int:
    """Rows that were saved, shown again."""
    if args.markdown and args.json:
        raise ValueError("--markdown and --json both write to standard output")
    made = [row for file in dict.fromkeys(args.files) for row in rows.read(file)]
    _check_targets(args)
    if args.markdown:
        table = markdown.performance(made)
        _write_files(made, args)
        print(table, end="")
        return 0
    try:
        present(made, args)
    finally:
        if args.json:
            for row in made:
                print(rows.line(row))
    return 0


def compare(args: Namespace) -> int:
    """Exit code 1 if something became worse beyond the noise."""
    found = comparing.compare(rows.read(args.before), rows.read(args.after), args.threshold)
    if args.json:
        terminal.print_json(
            {
                "threshold": args.threshold,
                "worse": len(found.worse),
                "machines_differ_in": list(found.machines),
                "machine_noise": found.noise,
                "changes": [c.to_dict() for c in found.changes],
                "only_in_a": [row.name for row in found.only_a],
                "only_in_b": [row.name for row in found.only_b],
            },
            indent=2,
        )
    else:
        print(comparing.text(found, args.threshold, args.all))
    return 1 if found.worse else 0
