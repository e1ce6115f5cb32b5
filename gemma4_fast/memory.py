"""Will it fit? What a model needs beside what is free, known before any weights are read.

The estimate adds up four things: the weights and the KV cache, by the shapes of the tensors that
would be allocated, the process itself, and the self-check.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from gemma4_fast.cache import KVCache
from gemma4_fast.config import PRESETS, Gemma4Config, member
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.layers import Quantizable
from gemma4_fast.model import meta_model, weights_size
from gemma4_fast.quant import QuantizedWeight

log = logging.getLogger("gemma4_fast")

GIB = 1 << 30
PROCESS = GIB // 2  # bytes of PyTorch, the libraries, the tokenizer and the activations
QUICK_CHECK = 300 << 20  # bytes that the quick self-check may take
DEFAULT_CONTEXT = 4096  # tokens, where no context is asked for
SHORTEST = 1024  # tokens: no shorter context is proposed


# ---------------------------------------------------------------- what is free
def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on this device now; None if the system does not say.

    On a GPU that includes what PyTorch's allocator holds in reserve for this process.
    """
    if device.type == "cpu":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserve


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that a process can allocate now without swapping, within the limits of its cgroups.

    Linux: MemAvailable and the cgroups (v1 and v2). Elsewhere psutil is asked if it is installed;
    without it the answer is all the memory that is installed, and None where even that is unknown.
    root: the folder that holds `proc` and `sys`.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(root / "proc/meminfo"), re.M)
    if found is None:
        return _available_elsewhere()
    free = int(found[1]) << 10
    return max(0, min([free, *_left_in_cgroups(root)]))


def _available_elsewhere() -> int | None:
    try:
        import psutil
    except ModuleNotFoundError:
        return installed_bytes()
    return int(psutil.virtual_memory().available)


def installed_bytes() -> int | None:
    """Bytes of memory that this machine has; None if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others lack these names
        return None


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """For each limit on this process's memory, its own cgroup's or a parent's: bytes left."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not path:
            continue
        if controllers == "":
            top = root / "sys/fs/cgroup"
            limit, used, cached = "memory.max", "memory.current", r"^(?:in)?active_file (\d+)$"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = r"^total_(?:in)?active_file (\d+)$"
        else:
            continue
        # In a container the path may be the host's and not exist here. Then only the top counts.
        own = top.joinpath(*[part for part in PurePosixPath(path).parts if part not in ("/", "..")])
        for folder in (own, *own.parents):
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal():  # an unlimited cgroup of v2 says "max"
                # Cached file pages count as used, but the system frees them when memory runs short.
                pages = re.findall(cached, _text(folder / "memory.stat"), re.M)
                yield int(most) - int(now) + sum(map(int, pages))
            if folder == top:
                break


def _text(file: Path) -> str:
    """The content of one of the system's files; empty if it is not there."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


# ---------------------------------------------------------------- what is needed
@dataclass(frozen=True)
class Load:
    """How a model would be loaded and used.

    dtype: the dtype of its computations and its cache. quantize: None, "int8" or "int4".
    context: tokens of each of `batch` sequences. None: 4096, or all of the model's positions if
    those are fewer.
    check: False, True or "quick", or "full".
    """

    config: Gemma4Config
    dtype: torch.dtype
    quantize: str | None = None
    context: int | None = None
    batch: int = 1
    check: bool | str = True

    @property
    def length(self) -> int:
        """Tokens of context."""
        if self.context is not None:
            return self.context
        return min(DEFAULT_CONTEXT, self.config.max_position_embeddings)

    @property
    def format(self) -> str:
        """The format of its weights, such as "bfloat16" or "int4"."""
        return self.quantize or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Need:
    """The bytes that a Load needs."""

    weights: int
    cache: int
    process: int
    check: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.process + self.check


def needed(load: Load) -> Need:
    """The memory that a Load needs. ValueError for a context beyond the model's positions."""
    return Need(
        weights=weights_size(load.config, load.dtype, load.quantize),
        cache=KVCache(load.config, load.batch, load.length, load.dtype, device="meta").nbytes,
        process=PROCESS,
        check=_check_bytes(load),
    )


def _check_bytes(load: Load) -> int:
    if load.check != "full":
        return QUICK_CHECK if load.check else 0
    wide = torch.float32.itemsize if load.dtype.itemsize == 2 else torch.float64.itemsize
    layers = meta_model(load.config).model.layers
    return wide * max(sum(p.numel() for p in layer.parameters()) for layer in layers)


@dataclass(frozen=True)
class Alternative:
    """What would fit instead. A field is None where the Load stays as it is."""

    needed: int
    quantize: str | None = None
    context: int | None = None
    member: str | None = None


@dataclass(frozen=True)
class Fit:
    """The memory a Load needs, and the bytes that are free (None: unknown).

    name: what messages call the model.
    """

    load: Load
    name: str
    need: Need
    free: int | None

    @property
    def fits(self) -> bool | None:
        """Whether there is enough free memory; None if the free memory is unknown."""
        return None if self.free is None else self.need.total <= self.free

    @property
    def is_impossible(self) -> bool:
        """Whether the weights alone exceed what is free."""
        return self.free is not None and self.need.weights > self.free

    def __str__(self) -> str:
        """ "26B-A4B in int4 with a context of 32K needs 15.1 GiB; 21.3 GiB are free"."""
        load = self.load
        many = f" for each of {load.batch} sequences" if load.batch > 1 else ""
        free = "the free memory is unknown"
        if self.free is not None:
            free = f"{gib(self.free)} are free"
        what = f"{self.name} in {load.format} with a context of {tokens(load.length)}{many}"
        return f"{what} needs {gib(self.need.total)}; {free}"

    def alternatives(self) -> list[Alternative]:
        """What would fit: fewer bits, a shorter context, both, or a smaller member."""
        if self.free is None:
            return []
        fewer = _fewer_bits(self.load.quantize)
        found = [self._try(quantize=bits) for bits in fewer]
        found.append(self._shorter(None))
        if fewer and not any(found):
            found.append(self._shorter(fewer[-1]))
        found.append(self._smaller())
        return [one for one in found if one is not None]

    def _try(
        self,
        *,
        quantize: str | None = None,
        context: int | None = None,
        name: str | None = None,
    ) -> Alternative | None:
        """The Load with these changes, if it fits; else None."""
        config = self.load.config if name is None else PRESETS[name]
        longest = self.load.length if context is None else context
        load = Load(
            config=config,
            dtype=self.load.dtype,
            quantize=quantize or self.load.quantize,
            context=min(longest, config.max_position_embeddings),
            batch=self.load.batch,
            check=self.load.check,
        )
        total = needed(load).total
        if self.free is None or total > self.free:
            return None
        return Alternative(total, quantize, context, name)

    def _shorter(self, quantize: str | None) -> Alternative | None:
        """The longest power of two below the context that fits."""
        context = 1 << ((self.load.length - 1).bit_length() - 1)
        while context >= SHORTEST:
            if (found := self._try(quantize=quantize, context=context)) is not None:
                return found
            context //= 2
        return None

    def _smaller(self) -> Alternative | None:
        """The largest smaller member that fits, with as many bits as possible.

        The context becomes shorter only if no member fits with this one.
        """
        sizes = {name: weights_size(config, self.load.dtype) for name, config in PRESETS.items()}
        own = weights_size(self.load.config, self.load.dtype)
        largest_first = sorted(sizes, key=lambda name: -sizes[name])
        smaller = [name for name in largest_first if sizes[name] < own]
        contexts = [c for c in (DEFAULT_CONTEXT, SHORTEST) if c < self.load.length]
        for context in (None, *contexts):
            for name in smaller:
                for bits in (None, *_fewer_bits(self.load.quantize)):
                    found = self._try(quantize=bits, context=context, name=name)
                    if found is not None:
                        return found
        return None

    def advice(self, *, command_line: bool = False) -> str:
        """One sentence that lists the alternatives as Python arguments or command-line options."""
        found = [_phrase(one, command_line) for one in self.alternatives()]
        if not found:
            return "No member of the family fits."
        *rest, last = found
        listed = f"{', '.join(rest)} or {last}" if rest else last
        return f"What fits: {listed}."

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Sizes are in bytes."""
        return {
            "context": self.load.length,
            "batch": self.load.batch,
            "format": self.load.format,
            "weights": self.need.weights,
            "cache": self.need.cache,
            "process": self.need.process,
            "check": self.need.check,
            "needed": self.need.total,
            "free": self.free,
            "fits": self.fits,
            "alternatives": [] if self.fits else [vars(one) for one in self.alternatives()],
        }


def _fewer_bits(quantize: str | None) -> tuple[str, ...]:
    smaller: dict[str | None, tuple[str, ...]] = {None: ("int8", "int4"), "int8": ("int4",)}
    return smaller.get(quantize, ())


def _phrase(one: Alternative, command_line: bool) -> str:
    words = []
    if one.member is not None:
        words.append(f"the smaller {one.member.upper()}")
    if one.quantize is not None and command_line:
        words.append(f"--quantize {one.quantize}")
    elif one.quantize is not None:
        words.append(f'quantize="{one.quantize}"')
    if one.context is not None:
        words.append(f"a context of {tokens(one.context)}")
    return f"{' with '.join(words)} ({gib(one.needed)})"


# ---------------------------------------------------------------- the question
def fit(load: Load, device: torch.device, name: str | None = None) -> Fit:
    """Compare a Load with the free memory of the device.

    name: what to call a model that is not a published one.
    """
    published = member(load.config)
    called = name or "the model" if published is None else published.upper()
    return Fit(load, called, needed(load), free_bytes(device))


def require(
    load: Load,
    device: torch.device,
    name: str | None = None,
    *,
    command_line: bool = False,
) -> None:
    """UnsupportedError if the weights alone exceed the free memory; a warning if the total does.

    Both say what would fit. command_line: as command-line options, not as Python arguments.
    """
    found = fit(load, device, name)
    if found.fits is not False:
        return
    advice = found.advice(command_line=command_line)
    if not found.is_impossible:
        parts = ", ".join(f"{name} {gib(count)}" for name, count in vars(found.need).items())
        log.warning("gemma4_fast: %s, so memory may run out (%s). %s", found, parts, advice)
        return
    anyway = "--ignore-memory" if command_line else "check_memory=False"
    raise UnsupportedError(
        f"not enough memory: {found}, and the weights alone take {gib(found.need.weights)}. "
        f"{advice} To load it anyway, use {anyway}"
    )


def warn_to_quantize(model: nn.Module, bits: int) -> None:
    """Warn if memory may run out while a loaded model is quantized in place.

    Each weight is freed once its quantized copy is complete, so there must be room for the largest
    copy.
    """
    copies = [
        QuantizedWeight.empty(max(bits, module.least_bits), weight.shape, device="meta").nbytes
        for module in model.modules()
        if isinstance(module, Quantizable)
        for weight in module.parameters(recurse=False)
    ]
    device = next(model.parameters()).device
    free = free_bytes(device)
    if free is not None and max(copies) > free:
        log.warning(
            "gemma4_fast: memory may run out: the largest quantized weight takes %s, %s are free",
            gib(max(copies)),
            gib(free),
        )


def gib(count: float) -> str:
    """Bytes as "15.1 GiB"."""
    return f"{count / GIB:.1f} GiB"


def tokens(count: int) -> str:
    """A number of tokens as "32K", or in full where it is no multiple of 1024."""
    return f"{count:,}" if count % 1024 else f"{count // 1024}K"
