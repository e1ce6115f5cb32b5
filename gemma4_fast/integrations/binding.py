"""One set of weights for two models: transformers' text model, and this package's, whose parameters are the same memory.

Where this package packs several projections into one matrix, transformers' parameters become views of that matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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


def unfit(text: nn.Module) -> str | None:
    """Why this text model does more, or other things, than its weights say; None if it does not.

    A module of another library (an adapter's, a quantized one), a hook, a replaced `forward`, tensors that are not all there.
    """
    own = next(c.__module__ for c in type(text).__mro__ if c.__module__.startswith("transformers."))
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks for all modules (torch.nn.modules.module)"
    for name, m in text.named_modules():
        kind = type(m)
        if name and kind.__module__ not in (own, *_PLAIN) and not kind.__module__.startswith("gemma4_fast."):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
        if kind.__module__ == "transformers.activations" and kind.__name__ != "GELUTanh":
            return f"{name} is a {kind.__name__}, Gemma 4 has GELUTanh"
        if name and "forward" in vars(m):
            return f"the forward of {name} was replaced"
        if name and any(_counts(hook) for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())):
            return f"{name} has a hook"
    first: Tensor = cast(Any, text).norm.weight
    for name, w in _tensors(text):
        if type(w.data) is not Tensor:
            return f"{name} is a {type(w.data).__name__}"
        if w.is_meta:
            return f"{name} is on the meta device"
        if w.device != first.device or w.dtype != first.dtype:
            return f"{name} is {w.dtype} on {w.device}, norm.weight {first.dtype} on {first.device}"
    if first.dtype not in DTYPES:
        return f"its weights are {first.dtype}"
    return None


def _counts(hook: Any) -> bool:
    """Whether a hook is someone's: not one of those by which transformers itself records outputs that are asked for."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def hooks_made() -> int:
    """How many hooks this process has made: as long as it is the same, no module has got one."""
    return RemovableHandle.next_id


def _tensors(text: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the layers' scalars: what the state dict holds."""
    yield from text.named_parameters()
    yield from ((name, b) for name, b in text.named_buffers() if name.endswith("layer_scalar"))


def addresses(text: nn.Module, head: nn.Module | None) -> list[int]:
    """Where the weights lie: they are the native model's as long as this is the same."""
    tensors = [w for _, w in _tensors(text)] + ([] if head is None else [cast(Tensor, head.weight)])
    return [w.data_ptr() for w in tensors]


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
