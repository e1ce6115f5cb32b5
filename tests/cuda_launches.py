"""What launches ask of a GPU: of each CUDA kernel, the threads of a block and its bytes of shared memory.

    python tests/cuda_launches.py       as JSON, by target and kernel

The launchers of csrc/cuda are asked themselves: compiled for the host (emulated.py), with a `launch` that runs no kernel and
says what it was given. What attention takes depends on the machine, so each target's is named to it. cuda_compiled.py holds the
answers to what that machine has; it asks in a process of its own, since PyTorch may have a GPU's library of the same ops.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cuda_compiled
import emulated
import torch

from gemma4_fast.ops import cuda_attention, cuda_backend
from gemma4_fast.ops.attention import decode_case
from gemma4_fast.ops.embedding import angles_case, embedding_case
from gemma4_fast.ops.moe import feed_forward_case, moe_case, route_case
from gemma4_fast.ops.norms import qkv_case
from gemma4_fast.ops.table import Maker

Asked = dict[str, dict[str, tuple[int, int]]]


def calls(dtype: torch.dtype, machine: cuda_attention.Machine) -> Iterator[Callable[[], Any]]:
    """Of every kernel a launch, and one that asks for the most: many rows, assignments or columns. k: 60 divides nothing."""
    m, most = Maker(dtype), cuda_backend.MAX_ASSIGNMENTS
    for k, bits, rows in product((64, 60), (0, 8, 4), (8, cuda_backend.MAX_ROWS)):
        top_k = most // rows
        weight = m.weight(bits, 40, k, scale=1.0)
        yield partial(cuda_backend.logits, m.randn(rows, k), weight, argmax=True)
        yield partial(cuda_backend.embedding, **embedding_case(m, rows, 40, k, bits=bits))
        yield partial(cuda_backend.moe_decode, **moe_case(m, rows, k, k, top_k, top_k, bits=bits))
        yield partial(cuda_backend.moe_feed_forward, **feed_forward_case(m, rows, k, k, k, top_k, top_k, bits=bits))
    yield partial(cuda_backend.sample, m.randn(1, 64), m.randn(40, 64), torch.full((1,), 0.5))
    for k, experts in product((64, 60), (cuda_backend.FEW_EXPERTS, 2 * cuda_backend.FEW_EXPERTS)):
        yield partial(cuda_backend.route_topk, **route_case(m, 16, k, experts, 8))
    for hidden in (cuda_backend.MAX_HIDDEN, cuda_backend.MAX_HIDDEN - 1):
        x, w = m.randn(1, hidden), m.gain(hidden)
        yield partial(cuda_backend.rms_norm, x, w)
        yield partial(cuda_backend.moe_norm_add_norm, x, x, x, w, w, w, next_weight=w)
    for dim in (128, 256, 512):
        for pairs in (8, 7):
            yield partial(cuda_attention.qkv_norm_rope, **qkv_case(m, 1, 1, 1, dim, pairs, 2))
        for v_only, one_launch in product((False, True), (False, True)):
            args = decode_case(m, [64], 8, 1, dim, 64, v_only=v_only)
            yield partial(cuda_attention.decode_on, machine, one_launch, **args)
    yield partial(cuda_backend.rope_angles, **angles_case(m, 1, 256, 512, 1e4))


def asked(kernels: Path | None = None) -> Asked:
    """By target and kernel: the most threads and bytes. kernels: a library of emulated.py that is not the one there is."""
    path = kernels or emulated.load()
    emulated.use(path)
    library, symbol = ctypes.CDLL(str(path)), "gemma4_fast_emulated"
    told = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    places = {name: int(address, 16) for address, name in re.findall(r"^(\w+) \w (.*)$", told, re.M)}
    base = ctypes.addressof(ctypes.c_char.in_dll(library, symbol)) - places[symbol]
    names = {base + place: cuda_compiled.short(name) for name, place in places.items()}
    launches = list[tuple[int, int, int]]()
    watch = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)(lambda *told: launches.append(told))
    library.gemma4_fast_watch(watch)
    found: Asked = {}
    try:
        for target, (most, of_block) in cuda_compiled.SHARED.items():
            launches.clear()
            for dtype in cuda_backend.DTYPES:
                for call in calls(dtype, cuda_attention.Machine(shared=most, shared_block=of_block)):
                    call()
            found[target] = {}
            for kernel, threads, shared in launches:
                before = found[target].get(names[kernel], (0, 0))
                found[target][names[kernel]] = max(threads, before[0]), max(shared, before[1])
    finally:
        library.gemma4_fast_watch(None)
        emulated.use()
    return found


if __name__ == "__main__":
    print(json.dumps(asked()))
