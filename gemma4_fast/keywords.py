"""Unknown keyword arguments raise a TypeError that names the argument to use instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from gemma4_fast.spelling import did_you_mean

P = ParamSpec("P")
T = TypeVar("T")

_BEAMS = "beam search is not supported"
_CONTEXT = "the cache grows with each generation, so no context is set in advance"
_KERNELS = "backend chooses the kernels"
_LENGTH = "use max_new_tokens, which does not count the prompt"
_MASK = "no mask is needed, since prompts of different lengths are passed as a list"
_PENALTY = "penalties are not supported; use temperature, top_k, top_p and min_p"
_PROMPT = "pass it as the first argument"
_QUANTIZE = 'use quantize="int8" or quantize="int4"'
_SAMPLING = "use temperature=0 for the likeliest token, or a temperature above 0 to sample"
_SEVERAL = "pass a list that holds the prompt several times"
_STOP = "use stop for strings"
_TOP = "use logprobs=n for the n likeliest tokens of each step"

# Keywords of other libraries, and what to use here instead.
FOREIGN = {
    "attention_mask": _MASK,
    "attn_implementation": _KERNELS,
    "best_of": _SEVERAL,
    "device_map": 'use device, as in from_pretrained(path, device="cuda")',
    "do_sample": _SAMPLING,
    "eos_token_id": "use stop_token_ids",
    "frequency_penalty": _PENALTY,
    "generator": "use seed",
    "input_ids": _PROMPT,
    "inputs": _PROMPT,
    "load_in_4bit": 'use quantize="int4"',
    "load_in_8bit": 'use quantize="int8"',
    "low_cpu_mem_usage": "weights are always read one tensor at a time",
    "max_length": _LENGTH,
    "max_model_len": _CONTEXT,
    "max_tokens": "use max_new_tokens",
    "messages": _PROMPT,
    "n": _SEVERAL,
    "n_ctx": _CONTEXT,
    "num_beams": _BEAMS,
    "num_return_sequences": _SEVERAL,
    "presence_penalty": _PENALTY,
    "prompts": _PROMPT,
    "quantization": _QUANTIZE,
    "quantization_config": _QUANTIZE,
    "repetition_penalty": _PENALTY,
    "stop_sequences": _STOP,
    "stop_strings": _STOP,
    "stream": "call model.stream(...)",
    "streamer": "call model.stream(...)",
    "top_logprobs": _TOP,
    "top_n": _TOP,
    "torch_dtype": 'use dtype, as in from_pretrained(path, dtype="bfloat16")',
    "trust_remote_code": "code of a checkpoint is never run",
}


def explicit(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that its TypeError for an unknown keyword says what to use instead."""
    parameters = inspect.signature(function).parameters
    known = [name for name in parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                advice = _advice(name, known)
                raise TypeError(f"{function.__name__}() has no argument {name!r}{advice}")
        return function(*args, **kwargs)

    return checked


def _advice(name: str, known: list[str]) -> str:
    if name in FOREIGN:
        return f": {FOREIGN[name]}"
    return did_you_mean(name, known) or f": it takes {', '.join(known)}"
