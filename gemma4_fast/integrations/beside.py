"""An accelerated model beside transformers' own code, on the same weights: what `verify` adds for one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gemma4_fast.edges import relative_error
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.integrations.kv_cache import CACHE
from gemma4_fast.integrations.transformers import ORIGINAL, accelerated_text, engine_of, text_of
from gemma4_fast.model import Gemma4
from gemma4_fast.reference import model as reference
from gemma4_fast.report import Comparison, Report
from gemma4_fast.verify import Layered, compare_layers, kinds_of

WHOSE = "transformers"
# Compared at level "quick", where each costs time in fp32. With experts, the routing of three tokens
# in four is too close to call in half precision, and only the others are compared.
TOKENS, ROUTED_TOKENS = 8, 24
LOGITS = 64  # newest tokens whose logits are compared at level "full"
STEPS = 4  # of those, decoded one by one


def native_of(model: nn.Module) -> Gemma4:
    """The native model of an accelerated one. ValueError if it is not accelerated; UnsupportedError if it cannot be served."""
    text = accelerated_text(model)
    if text is None:
        kind = type(model).__name__
        remedy = "call gemma4_fast.accelerate(model) first"
        raise ValueError(f"this {kind} is not accelerated; {remedy}")
    engine = engine_of(text)
    if (reason := engine.bind(text)) is not None:
        raise UnsupportedError(f"all its calls are left to transformers' code: {reason}")
    return cast(Gemma4, engine.native)


@torch.inference_mode()
def compare(model: nn.Module, report: Report, ids: Tensor) -> None:
    """Adds to the report each layer beside transformers', given what theirs was given; at level "full" also logits, of a
    prompt and of steps after it. A quantized model has only the reference to be compared with."""
    text = cast(nn.Module, text_of(model))
    if engine_of(text).quantization is not None:
        return
    native = cast(Gemma4, engine_of(text).native)
    if report.level != "full":
        ids = ids[: ROUTED_TOKENS if native.config.enable_moe_block else TOKENS]
    layers = native.config.layers() if report.level == "full" else kinds_of(native.config)
    seen = _layers(text, ids, {c.index for c in layers})
    compare_layers(native, ids, seen, WHOSE, report)
    wide = torch.float64 if native.dtype in (torch.float32, torch.float64) else torch.float32
    experts = native.config.enable_moe_block and wide == torch.float32  # where routing differs now and then
    if report.level != "full" or experts or engine_of(text).head is None:
        return
    n, steps = min(LOGITS, len(ids)), min(STEPS, len(ids) // 3)
    truth = reference.forward(native.state_dict(), native.config, ids, dtype=wide, last=n)
    ours, theirs = (_logits(text, ids, steps, fast).to(wide)[-n:] for fast in (True, False))
    for phase, part in (("prefill", slice(0, n - steps)), ("decode", slice(n - steps, n))):
        errors = relative_error(ours[part], truth[part]), relative_error(theirs[part], truth[part])
        report.comparisons.append(Comparison(f"logits beside {WHOSE}", phase, *errors))


def _layers(text: nn.Module, ids: Tensor, wanted: set[int]) -> dict[int, Layered]:
    """What transformers' layers `wanted` are given and give for one prompt ids [T], by their index. The others hand on what
    they are given."""
    seen: dict[int, Layered] = {}
    given: list[tuple[Tensor, Tensor | None]] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ple = args[1] if len(args) > 1 else kwargs.get("per_layer_input")
        given.append((args[0][0].clone(), None if ple is None else ple[0]))  # the layer may write into its input

    def skipped(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    layers, hooks = cast(nn.ModuleList, text.layers), []
    skipping = [layer for i, layer in enumerate(layers) if i not in wanted]
    for i in sorted(wanted):

        def after(layer: nn.Module, args: tuple[Any, ...], out: Any, i: int = i) -> None:
            x, ple = given.pop()
            y = (out[0] if isinstance(out, tuple) else out)[0]
            seen[i] = Layered(x, ple, y.clone())  # the next layer may write into it

        hooks.append(layers[i].register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layers[i].register_forward_hook(after))
    own = [vars(layer).get("forward") for layer in skipping]
    try:
        for layer in skipping:
            vars(layer)["forward"] = skipped
        ORIGINAL[type(text)].forward(text, input_ids=ids[None], use_cache=False)
    finally:
        for layer, forward in zip(skipping, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward
        for h in hooks:
            h.remove()
    return seen


def _logits(text: nn.Module, ids: Tensor, steps: int, fast: bool) -> Tensor:
    """[T, V] of a prompt and so many steps after it, accelerated or by transformers' code."""
    run = text if fast else lambda **kwargs: ORIGINAL[type(text)].forward(text, **kwargs)
    head, config = cast(nn.Linear, engine_of(text).head), cast(Any, text).config
    cache, found = None, []
    for part in (ids[: len(ids) - steps], *ids[len(ids) - steps :].split(1)):
        out = run(input_ids=part[None], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        h = out.last_hidden_state[0]
        found.append(head(h) if fast else nn.functional.linear(h, head.weight))
    logits = torch.cat(found)
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap
