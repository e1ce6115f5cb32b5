"""One set of weights for two models: transformers' text model, and this package's, whose parameters are the same memory.

Where this package packs several projections into one matrix, transformers' parameters become views of that matrix.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from gemma4_fast.config import Gemma4Config
from gemma4_fast.layers import PackedWeight
from gemma4_fast.model import DTYPES, Gemma4
from gemma4_fast.native import use_huge_pages

# Where the classes of an untouched text model come from, beside its own modeling file.
_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.container", "torch.nn.modules.sparse", "transformers.activations")


def config_of(told: dict[str, Any]) -> Gemma4Config:
    """Of what transformers' configuration of a text model tells. ValueError says what this package does not serve."""
    return Gemma4Config.from_dict(told)


@dataclass
class Look:
    """What a text model is like now. unfit: why it does more, or other things, than its weights say; None if it does not.
    addresses: where its weights lie, and the head's."""

    unfit: str | None
    addresses: list[int]
    needs_grad: bool = False


def look(text: nn.Module, head: nn.Module | None) -> Look:
    """Once through all modules and weights, before each prompt: by their dictionaries, since `modules()` takes milliseconds."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return Look("there are hooks for all modules (torch.nn.modules.module)", [])
    own = next(c.__module__ for c in type(text).__mro__ if c.__module__.startswith("transformers."))
    first: Tensor = cast(Any, text).norm.weight
    dtype, device = first.dtype, first.device
    found, modules = Look(None, []), [text]
    while modules:
        m = modules.pop()
        if m is not text and (reason := _odd(m, own)) is not None:
            return Look(f"{_name(text, m)} {reason}", [])
        modules += [child for child in m._modules.values() if child is not None]
        weights: list[Any] = [w for w in m._parameters.values() if w is not None]
        if (scalar := m._buffers.get("layer_scalar")) is not None:
            weights.append(scalar)
        for w in weights:
            if type(w) not in (nn.Parameter, Tensor) or w.is_meta or w.dtype != dtype or w.device != device:
                what = f"{type(w).__name__}, {w.dtype} on {w.device}"
                return Look(f"a weight of {_name(text, m) or 'the model'} is a {what}; its norm is {dtype} on {device}", [])
            found.addresses.append(w.data_ptr())
            found.needs_grad = found.needs_grad or w.requires_grad
    if dtype not in DTYPES:
        return Look(f"its weights are {dtype}", [])
    if head is not None:
        found.addresses.append(cast(Tensor, head.weight).data_ptr())
    return found


def _odd(m: nn.Module, own: str) -> str | None:
    """What a module does beside what its class in transformers' file `own`, or PyTorch's, does with its weights."""
    kind = type(m)
    if not _is_plain(cast(Any, kind), own):
        return f"is a {kind.__module__}.{kind.__qualname__}"
    if "forward" in m.__dict__:
        return "has another forward than its class"
    for hooks in (m._forward_hooks, m._forward_pre_hooks):
        # Not those by which transformers itself records outputs that are asked for.
        if hooks and any(getattr(h, "__module__", None) != "transformers.utils.output_capturing" for h in hooks.values()):
            return "has a hook"
    return None


@functools.cache
def _is_plain(kind: type, own: str) -> bool:
    if kind.__module__ == "transformers.activations":
        return kind.__name__ == "GELUTanh"
    return kind.__module__ in (own, *_PLAIN) or kind.__module__.startswith("gemma4_fast.")


def _name(text: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in text.named_modules() if m is module)


def hooks_made() -> int:
    """How many hooks this process has made: as long as it is the same, no module has got one."""
    return RemovableHandle.next_id


def share(native: Gemma4, text: nn.Module, head: nn.Module | None) -> None:
    """Makes the native model's parameters the memory of `text`'s and the head's. Peak memory: one packed matrix more.

    ValueError for a weight that is missing or has another shape than the configuration says.
    """
    for name, module in native.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            if name == "lm_head":
                shared = None if head is None else head.weight
            elif isinstance(module, PackedWeight):
                parent = text.get_submodule(name.removeprefix("model.").rpartition(".")[0])
                shared = packed([getattr(parent, part).weight for part in module.parts])
            else:
                shared = getattr(text.get_submodule(name.removeprefix("model").removeprefix(".")), own, None)
            if not isinstance(shared, Tensor) or shared.shape != parameter.shape:
                got = "none" if not isinstance(shared, Tensor) else str(list(shared.shape))
                raise ValueError(f"{name}.{own}: got {got}, the configuration says {list(parameter.shape)}")
            use_huge_pages(shared, now=True)
            setattr(module, own, nn.Parameter(shared.detach(), requires_grad=False))
    native._changed()


def packed(parts: list[nn.Parameter]) -> Tensor:
    """Weights [N_i, K] end to end in one matrix [sum N_i, K], of which they become views, if they are not yet."""
    first, rows = parts[0].data, sum(p.shape[0] for p in parts)
    end = first.data_ptr()
    for p in parts:
        if p.data_ptr() != end or not p.data.is_contiguous():
            break
        end += p.nbytes
    else:
        same = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parts)
        if same or len(parts) == 1:
            return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
    whole = torch.empty(rows, first.shape[1], dtype=first.dtype, device=first.device)
    for p, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
        view.copy_(p.data)
        p.data = view
    return whole


def unpack(native: Gemma4, text: nn.Module) -> None:
    """Gives transformers' parameters that are views of a packed matrix memory of their own again."""
    for name, module in native.named_modules():
        if isinstance(module, PackedWeight) and module._parameters:
            parent = text.get_submodule(name.removeprefix("model.").rpartition(".")[0])
            for part in module.parts:
                weight = getattr(parent, part).weight
                weight.data = weight.data.clone()
            del module._parameters["weight"]  # before the next one is copied


def output_class(text_class: type) -> type:
    """What a text model of this class of transformers returns."""
    found: type = getattr(sys.modules[text_class.__module__], text_class.__name__ + "OutputWithPast")
    return found
