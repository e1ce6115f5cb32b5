"""`gemma4-fast info`: a model's numbers, the memory it needs, what will run. Reads config and headers, no weights."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemma4_fast import native, ops, terminal
from gemma4_fast.bench.plan import floor
from gemma4_fast.bench.timing import PROBE_BYTES, Stopwatch, cache_bytes
from gemma4_fast.cache import KVCache, allocate
from gemma4_fast.config import PRESETS, Gemma4Config, member
from gemma4_fast.explain import Explanation, explain
from gemma4_fast.layers import model_ops
from gemma4_fast.memory import Fit, Load, fit, gib, installed_bytes
from gemma4_fast.model import Gemma4, meta_model, parse_device, parse_dtype, weights_size
from gemma4_fast.tables import render
from gemma4_fast.weights import INDEX, SINGLE, resolve, validate

CONTEXTS = (1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 18)


def find(name: str, quiet: bool = False) -> tuple[Gemma4Config, Path | None]:
    """The config of a preset, or the config and folder of a checkpoint.

    Of a checkpoint on the hub only config.json is downloaded. quiet: do not say so.
    """
    if name in PRESETS and not Path(name).is_dir():
        return PRESETS[name], None
    fetching = partial(terminal.fetching, quiet=quiet)
    path = resolve(name, patterns=("config.json",), on_download=fetching)
    return Gemma4Config.from_pretrained(path), path


def parameters(model: Gemma4) -> dict[str, int]:
    """How many there are, and how many one token's pass reads: of the experts those it is sent to, of a table that is
    only looked up one row."""
    c, total, active = model.config, 0, 0
    for name, p in model.named_parameters():
        total += p.numel()
        if ".experts." in name:
            active += p.numel() * c.top_k_experts // c.num_experts
        elif name.endswith("embed_tokens_per_layer.weight") or (
            name.endswith("embed_tokens.weight") and not c.tie_word_embeddings
        ):
            active += p[0].numel()
        else:
            active += p.numel()
    return {"total": total, "active_per_token": active}


def memory(
    config: Gemma4Config, contexts: list[int], batch: int, dtype: torch.dtype, weight_bytes: int
) -> list[dict[str, int]]:
    """For each context: bytes of the cache that this package allocates, and of one that keeps K and V of every token.

    The figures are those of real allocations, made on the meta device. The plain cache serves shared layers once too.
    """
    rows = []
    for context in contexts:
        cache = KVCache(config, batch, context, dtype, device="meta").nbytes
        plain = 0
        for layer in config.layers():
            if layer.kv_donor is None:
                uncapped = dataclasses.replace(layer, window=None, k_eq_v=False)
                pair = allocate(uncapped, batch, context, dtype, "meta")
                plain += pair.v.nbytes + (0 if pair.k is None else pair.k.nbytes)
        rows.append(dict(context=context, batch=batch, cache=cache, plain_cache=plain, weights_and_cache=weight_bytes + cache))
    return rows


def shape(config: Gemma4Config) -> dict[str, Any]:
    """The numbers people ask for, by their names in config.json or plain words."""
    layers = config.layers()
    return {
        "member": member(config),
        "hidden_size": config.hidden_size,
        "layers": {
            "total": len(layers),
            "sliding": sum(c.is_sliding for c in layers),
            "full": sum(not c.is_sliding for c in layers),
            "sharing_kv": config.num_kv_shared_layers,
            "pattern": "".join("S" if c.is_sliding else "F" for c in layers),
        },
        "sliding_window": config.sliding_window,
        "heads": [_heads(config, sliding) for sliding in (True, False) if any(c.is_sliding == sliding for c in layers)],
        "intermediate_size": config.intermediate_size,
        "double_wide_mlp": config.use_double_wide_mlp,
        "experts": {
            "num_experts": config.num_experts,
            "top_k": config.top_k_experts,
            "intermediate_size": config.moe_intermediate_size,
        }
        if config.enable_moe_block
        else None,
        "per_layer_embedding_size": config.hidden_size_per_layer_input,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "towers_left_out": list(config.towers),
    }


def _heads(config: Gemma4Config, sliding: bool) -> dict[str, Any]:
    layer = next(c for c in config.layers() if c.is_sliding == sliding)
    return {
        "kind": "sliding" if sliding else "full",
        "query": layer.num_q_heads,
        "key_value": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "k_eq_v": layer.k_eq_v,
    }


def stored(model: Gemma4, path: Path | None) -> dict[str, Any] | None:
    """What the checkpoint holds by its headers, which are checked against the config; None without weights at hand."""
    if path is None or not ((path / SINGLE).exists() or (path / INDEX).exists()):
        return None
    found = validate(model, path)
    width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    by_dtype: Counter[str] = Counter()
    for t in found.values():
        by_dtype[t.dtype] += math.prod(t.shape) * width[t.dtype]
    return {"tensors": len(found), "files": len({t.file for t in found.values()}), "bytes": dict(by_dtype)}


def machine() -> dict[str, Any]:
    """What there is to run on: processor, extension, PyTorch, GPUs."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    features = native.cpu_features()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": installed_bytes(),
        "native_extension": native.available(),
        "native_missing_because": native.missing_reason(),
        "native_build": native.build_info(),
        "cpu_features": None if features is None else sorted(n for n, there in features.items() if there),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": [{"name": g.name, "memory_bytes": g.total_memory, "arch": f"{g.major}.{g.minor}"} for g in gpus],
        "versions": terminal.versions(),
    }


PROBE_SECONDS = 0.3


def read_rate(device: torch.device, free: int | None) -> float:
    """Measure how many bytes per second this device reads from its memory.

    The measurement takes a moment, and memory of at most a quarter of the `free` bytes.
    """
    stopwatch = Stopwatch(device)
    size = max(PROBE_BYTES[device.type], 2 * cache_bytes(device))
    if free is not None:
        size = min(size, free // 4)
    probe = torch.ones(max(1, size // 4), device=device)
    stopwatch.seconds(probe.sum)  # warm-up
    samples: list[float] = []
    while not samples or sum(samples) < PROBE_SECONDS:
        samples.append(stopwatch.seconds(probe.sum))
    return probe.nbytes / statistics.median(samples)


@dataclass(frozen=True)
class Speed:
    """An estimate of the decode speed.

    step_bytes: bytes that one step reads. tokens_per_s: None where these bytes fit into the
    processor's cache, which is read faster than memory.
    """

    step_bytes: int
    read_bytes_per_s: float
    tokens_per_s: float | None


def speed(found: Fit, device: torch.device) -> Speed:
    """Estimate the decode speed from the bytes that a step reads and the memory's read rate.

    A step reads the weights that its tokens use, and the cache of a full context.
    """
    load = found.load
    step = floor(load.config, load.dtype, load.quantize, load.batch, 1, load.length - 1).bytes
    rate = read_rate(device, found.free)
    return Speed(step, rate, load.batch * rate / step if step > cache_bytes(device) else None)


def answer(found: Fit, estimate: Speed) -> str:
    """Say in one sentence whether the model fits and how fast it is.

    If it does not fit, a second sentence says what would.
    """
    if found.free is None:
        return f"{found}."
    if not found.fits:
        verdict = "not even its weights fit" if found.is_impossible else "it does not fit"
        return f"{found}: {verdict}. {found.advice(command_line=True)}"
    if estimate.tokens_per_s is None:
        return f"{found}: it fits."
    rate = f"{estimate.tokens_per_s:,.0f}"
    if estimate.tokens_per_s < 10:
        rate = f"{estimate.tokens_per_s:.2g}"
    per = "token" if found.load.batch == 1 else f"step of {found.load.batch} tokens"
    read = f"{gib(estimate.step_bytes)} per {per}"
    why = f"an estimate: {read} at a measured {gib(estimate.read_bytes_per_s)}/s"
    return f"{found}: it fits, at about {rate} tokens/s ({why})."


def kernels(config: Gemma4Config, device: torch.device, dtype: torch.dtype, backend: str | None) -> Explanation:
    """The decisions for the ops that this model calls."""
    with ops.use_backend(backend):
        every = explain(device=device, dtype=dtype)
    wanted = model_ops(config)
    return dataclasses.replace(every, choices=tuple(c for c in every.choices if c.op in wanted))


def run(args: Namespace) -> int:
    """The command."""
    device = parse_device(args.device)
    ops.parse_backend(args.backend)
    config, path = find(args.model, args.quiet)
    dtype = parse_dtype(args.dtype if args.dtype is not None else config.dtype)
    model = meta_model(config)
    count = parameters(model)
    limit = config.max_position_embeddings
    too_long = [c for c in args.context or [] if c > limit]
    if too_long:
        most = f"at most {limit} tokens ({limit >> 10}K)"
        raise ValueError(f"--context: {args.model} takes {most}, got {too_long[0]}")
    contexts = args.context or [*(c for c in CONTEXTS if c < limit), limit]
    weight_bytes = {n: count["total"] * w for n, w in (("bfloat16", 2), ("float32", 4))}
    weight_bytes |= {n: weights_size(config, dtype, n) for n in ("int8", "int4")}
    load = Load(
        config=config,
        dtype=dtype,
        quantize=args.quantize,
        context=None if args.context is None else max(args.context),
        batch=args.batch,
    )
    found = fit(load, device, Path(args.model).name)
    estimate = speed(found, device)
    facts = {
        "model": args.model,
        "path": None if path is None else str(path),
        "shape": shape(config),
        "parameters": count,
        "weight_bytes": weight_bytes,
        "checkpoint": stored(model, path),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "quantize": args.quantize,
        "memory": memory(config, contexts, args.batch, dtype, weights_size(config, dtype, args.quantize)),
        "kernels": (chosen := kernels(config, device, dtype, args.backend)).to_dict()["ops"],
        "machine": machine(),
        "fit": {**found.to_dict(), **vars(estimate), "answer": answer(found, estimate)},
    }
    if args.json:
        terminal.print_json(facts, indent=2)
    else:
        print(_page(facts, chosen))
    return 0


def _page(facts: dict[str, Any], chosen: Explanation) -> str:
    parts = [
        # The page is longer than most terminals, so the answer comes first and last.
        f"{facts['model']}\n\n{facts['fit']['answer']}",
        render(("model", facts["model"]), _model_rows(facts)),
        render(
            ("context", "batch", "cache", "without window/K=V savings", "weights + cache"),
            [(f"{r['context']:,}", f"{r['batch']}", *(terminal.size(r[k]) for k in _MEMORY_COLUMNS)) for r in facts["memory"]],
            title=f"memory in {facts['quantize'] or facts['dtype']} (activations come on top)",
        ),
        "kernels, " + str(chosen),
        render(("machine", ""), _machine_rows(facts["machine"])),
        facts["fit"]["answer"],
    ]
    return "\n".join(p.strip("\n") + "\n" for p in parts).rstrip("\n")


_MEMORY_COLUMNS = ("cache", "plain_cache", "weights_and_cache")


def _model_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    s, count = facts["shape"], facts["parameters"]
    layers, experts, checkpoint = s["layers"], s["experts"], facts["checkpoint"]
    rows = [("published as", s["member"])] if s["member"] not in (None, facts["model"]) else []
    shares = f"; the last {layers['sharing_kv']} share K and V" if layers["sharing_kv"] else ""
    rows += [
        ("layers", f"{layers['total']}: {layers['sliding']} sliding, {layers['full']} full{shares}"),
        ("", layers["pattern"]),
        ("window", f"{s['sliding_window']} tokens"),
    ]
    for h in s["heads"]:
        equal = ", K=V" if h["k_eq_v"] else ""
        rows.append((f"{h['kind']} heads", f"{h['query']} query, {h['key_value']} key-value, dim {h['head_dim']}{equal}"))
    double = f" (twice that in the last {layers['sharing_kv']} layers)" if s["double_wide_mlp"] else ""
    rows.append(("hidden, MLP", f"{s['hidden_size']}, {s['intermediate_size']}{double}"))
    if experts:
        size = f"size {experts['intermediate_size']}, {experts['top_k']} per token"
        rows.append(("experts", f"{experts['num_experts']} experts, {size}"))
    if s["per_layer_embedding_size"]:
        rows.append(("per-layer embedding", f"{s['per_layer_embedding_size']} per layer"))
    rows += [
        ("vocabulary, context", f"{s['vocab_size']:,} tokens, {s['max_position_embeddings']:,} positions"),
        ("parameters", f"{count['total']:,}, of which a token uses {count['active_per_token']:,}"),
        ("weights", ", ".join(f"{terminal.size(b)} in {n}" for n, b in facts["weight_bytes"].items())),
    ]
    if checkpoint:
        sizes = ", ".join(f"{terminal.size(b)} of {n}" for n, b in checkpoint["bytes"].items())
        files = "1 file" if checkpoint["files"] == 1 else f"{checkpoint['files']} files"
        rows.append(("checkpoint", f"{checkpoint['tensors']} tensors in {files}: {sizes}"))
    elif facts["path"]:
        rows.append(("checkpoint", "config.json only, no weights here"))
    if s["towers_left_out"]:
        rows.append(("left out", f"the {' and '.join(s['towers_left_out'])} towers: this package serves text"))
    return rows


def _machine_rows(m: dict[str, Any]) -> list[tuple[str, str]]:
    ram = "" if m["memory_bytes"] is None else f", {terminal.size(m['memory_bytes'])} of memory"
    build = m["native_build"] or {}
    compiled = f"yes, by {build.get('compiler')} {build.get('compiler_version')}, for {build.get('arch')}"
    v = m["versions"]
    accelerator = "CUDA " + m["cuda"] if m["cuda"] else "ROCm " + m["hip"] if m["hip"] else "CPU build"
    rows = [
        ("platform", f"{m['platform']}, {m['hardware_threads']} threads ({m['torch_threads']} used by PyTorch){ram}"),
        ("C++ extension", compiled if m["native_extension"] else f"no: {m['native_missing_because']}"),
    ]
    if m["cpu_features"] is not None:
        rows.append(("CPU features", " ".join(m["cpu_features"]) or "none that kernels use"))
    rows += [
        ("Python, PyTorch", f"{v['python']}, {v['torch']} ({accelerator})"),
        ("Triton", v["triton"] or "not installed"),
        ("transformers", v["transformers"] or "not installed"),
        *(("GPU", f"{g['name']}, {terminal.size(g['memory_bytes'])}, {g['arch']}") for g in m["gpus"]),
    ]
    return rows if m["gpus"] else [*rows, ("GPU", "none")]
