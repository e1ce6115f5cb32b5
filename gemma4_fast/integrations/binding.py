"""One set of weights for two models: transformers' text model, and this package's, whose parameters are the same memory.

Where this package packs several projections into one matrix, transformers' parameters lie in that matrix. And what a text
model must be like for its weights to say all about it: its own classes, nothing added, nothing replaced.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from gemma4_fast.graph import modules_of
from gemma4_fast.layers import PackedWeight
from gemma4_fast.model import DTYPES, Gemma4
from gemma4_fast.native import use_huge_pages

# Where the classes of an untouched text model come from, beside its own modeling file.
_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.container", "torch.nn.modules.sparse", "transformers.activations")


class Look:
    """A text model, and its head, as they were when they were looked at.

    weights: where they lie, and how. All goes by the modules' dictionaries: `modules()` and `parameters()` of 26B-A4B take
    milliseconds. It holds these and what is in them, never the text model and the head, which own it.
    """

    def __init__(self, text: nn.Module, head: nn.Module | None) -> None:
        attributes = [m.__dict__ for m in (*modules_of(text), *([] if head is None else [head]))]
        parts = [d[name] for name in ("_modules", "_parameters", "_buffers") for d in attributes]
        self._all, self._filled = [*attributes, *parts], [d for d in parts if d]
        self._hooks = RemovableHandle.next_id  # how many this process has made
        self._objects, self._sizes = self._now(), self._lengths()
        self._tensors = [w for w in self._objects if isinstance(w, Tensor)]
        self._addresses = self._where()
        self.weights = [(w.data_ptr(), w.shape, w.stride()) for w in self._tensors]
        self.needs_grad = any(w.requires_grad for w in self._tensors)

    def holds(self) -> bool:
        """Whether no module, weight or hook has come, gone or become another since; one that was written to is the same."""
        if RemovableHandle.next_id != self._hooks or self._lengths() != self._sizes:
            return False
        return all(map(operator.is_, self._now(), self._objects)) and self._where() == self._addresses

    def _now(self) -> list[Any]:
        """Modules, weights and buffers."""
        return [*itertools.chain.from_iterable(map(dict.values, self._filled))]

    def _where(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._tensors)]

    def _lengths(self) -> list[int]:
        """A module, a weight or a `forward` of its own that has come is one entry more."""
        return [*map(len, self._all)]


def unfit(text: nn.Module, *, weights: bool = True) -> str | None:
    """Why the text model does more, or other things, than its weights say; None if it does not. weights: False where they are
    known to be gone."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks for all modules (torch.nn.modules.module)"
    if getattr(text, "_is_replica", False):
        return "it is a replica of torch.nn.DataParallel"
    own = next(c.__module__ for c in type(text).__mro__ if c.__module__.startswith("transformers."))
    eps = cast(Any, text).config.rms_norm_eps
    for m in modules_of(text):
        if m is not text and (reason := _odd(m, own, eps)) is not None:
            return f"{_name(text, m)} {reason}"
    return _odd_weight(text) if weights else None


def _odd_weight(text: nn.Module) -> str | None:
    first: Tensor = cast(Any, text).norm.weight
    dtype, device = first.dtype, first.device
    for m in modules_of(text):
        scalar = m._buffers.get("layer_scalar")
        for name, w in (*m._parameters.items(), ("layer_scalar", scalar)):
            if w is None:
                continue
            if type(w) not in (nn.Parameter, Tensor) or w.is_meta or w.dtype != dtype or w.device != device:
                where = f"{_name(text, m)}.{name}".removeprefix(".")
                return f"{where} is a {type(w).__name__}, {w.dtype} on {w.device}; norm.weight is {dtype} on {device}"
            if name == "bias":
                return f"{_name(text, m)} has a bias"
    return None if dtype in DTYPES else f"its weights are {dtype}"


def _odd(m: nn.Module, own: str, eps: float) -> str | None:
    """What a module does beside what its class in transformers' file `own`, or PyTorch's, does with its weights."""
    kind = type(m)
    if not _is_plain(cast(Any, kind), own):
        if kind.__module__.startswith("peft."):
            return (
                f"is a PEFT adapter that is not merged ({kind.__module__}.{kind.__qualname__}): "
                "call model = model.merge_and_unload() and then gemma4_fast.accelerate(model)"
            )
        return f"is a {kind.__module__}.{kind.__qualname__}"
    if "forward" in m.__dict__ or not _is_from(kind.forward.__module__, own):
        return "has another forward than its class"
    for hooks in (m._forward_hooks, m._forward_pre_hooks):
        # Not those by which transformers itself records outputs that are asked for.
        if hooks and any(getattr(h, "__module__", None) != "transformers.utils.output_capturing" for h in hooks.values()):
            return "has a hook"
    if getattr(m, "scaling", 1.0) != 1.0 or getattr(m, "eps", eps) != eps:
        return "has another scaling, or another eps, than the configuration"
    return None


@functools.cache
def _is_plain(kind: type, own: str) -> bool:
    if kind.__module__ == "transformers.activations":
        return kind.__name__ == "GELUTanh"
    return _is_from(kind.__module__, own)


def _is_from(module: str, own: str) -> bool:
    return module in (own, *_PLAIN, "torch.nn.modules.module") or module.startswith("gemma4_fast.")


def _name(text: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in text.named_modules() if m is module)


def odd_rotary(text: Any, native: Gemma4) -> str | None:
    """Whether someone has given the model other frequencies. Rounded ones are not: casting a model rounds its buffers."""
    for sliding, name in ((True, "sliding_attention"), (False, "full_attention")):
        theirs = getattr(text.rotary_emb, f"{name}_inv_freq", None)
        if theirs is None or not any(c.is_sliding == sliding for c in native.config.layers()):
            continue
        ours, theirs = native.model.inv_freq(sliding, torch.device("cpu")).float(), theirs.float().cpu()
        rest = theirs[len(ours) :]  # columns that do not turn
        scale = getattr(text.rotary_emb, f"{name}_attention_scaling", 1.0)
        if scale != 1.0 or not torch.allclose(theirs[: len(ours)], ours, rtol=2**-7, atol=0.0) or bool(rest.any()):
            return f"its RoPE of {name.replace('_', ' ')} is not the configuration's"
    return None


def share(native: Gemma4, text: nn.Module, head: nn.Module | None) -> None:
    """Makes the native model's parameters the memory of `text`'s and the head's; those that are quantized stay. Peak memory:
    one packed matrix more.

    ValueError for a weight that is missing or has another shape than the configuration says.
    """
    with torch.inference_mode(False):  # else no one could train what is made
        _share(native, text, head)
    native._changed()


def _share(native: Gemma4, text: nn.Module, head: nn.Module | None) -> None:
    for name, module in native.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            try:
                if name == "lm_head":
                    shared = cast(Any, head).weight
                elif isinstance(module, PackedWeight):
                    parent = text.get_submodule(name.removeprefix("model.").rpartition(".")[0])
                    shared = packed([getattr(parent, part).weight for part in module.parts])
                else:
                    shared = getattr(text.get_submodule(name.removeprefix("model").removeprefix(".")), own)
            except AttributeError as error:
                lacks = f"it lacks {name}.{own}, which the configuration requires"
                raise ValueError(f"{lacks}: {error}") from error
            if shared.shape != parameter.shape:
                raise ValueError(f"{name}.{own} is {list(shared.shape)}, {list(parameter.shape)} by the configuration")
            use_huge_pages(shared, now=True)
            setattr(module, own, nn.Parameter(shared.detach(), requires_grad=False))


def packed(parts: list[nn.Parameter]) -> Tensor:
    """Weights [N_i, K] end to end in one matrix [sum N_i, K], in which they lie from now on, if they do not yet."""
    first, rows = parts[0].data, sum(p.shape[0] for p in parts)
    end = first.data_ptr()
    for p in parts:
        if p.data_ptr() != end or not p.data.is_contiguous():
            break
        end += p.nbytes
    else:
        storage = first.untyped_storage()
        if storage.data_ptr() + storage.nbytes() >= end:
            return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
    whole = torch.empty(rows, first.shape[1], dtype=first.dtype, device=first.device)
    for p, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
        view.copy_(p.data)
        # Through DLPack: a storage of its own, over its part of the memory. Views of one storage would each be pickled whole.
        p.data = torch.from_dlpack(view)
    return whole


def unpack(native: Gemma4, text: nn.Module) -> None:
    """Gives transformers' parameters that lie in a packed matrix memory of their own again."""
    there = dict(text.named_modules())  # someone may have taken layers out
    for name, module in native.named_modules():
        if isinstance(module, PackedWeight) and module._parameters:
            for part in module.parts:
                weight = getattr(there.get(f"{name.removeprefix('model.').rpartition('.')[0]}.{part}"), "weight", None)
                if weight is not None:
                    with torch.inference_mode(False):
                        weight.data = weight.data.clone()
            del module._parameters["weight"]  # before the next one is copied


def release(native: Gemma4) -> None:
    """Lets go of the weights, but for those that a cache rebuilds its keys from."""
    for name, parameter in native.named_parameters():
        if not name.endswith("k_norm.weight"):
            parameter.data = parameter.data.new_empty(0)
    native._changed()


def output_class(text_class: type) -> Any:
    """What a text model of this class of transformers returns."""
    return getattr(sys.modules[text_class.__module__], text_class.__name__ + "OutputWithPast")
