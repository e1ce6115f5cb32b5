"""transformers' own interfaces: attn_implementation="gemma4_fast" and experts_implementation="gemma4_fast", beside eager.

Models of family.py in fp32, judged by the rule of bounds.py: transformers' eager attention and experts in fp64 are the truth,
and the same in fp32 is the yardstick. The rule allows about 1e-4 in logits of up to 5, where a window one too long or padding
taken for text gives 1e-2 and more. A case also says which way attention must have gone, for transformers' sdpa would be right
too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bounds import InFp64, assert_right, largest
from family import (
    MEMBERS,
    assert_model_right,
    assert_near_eager,
    in_fp64,
    prompt,
    transformers_model,
    wide_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Gemma4ForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations import sdpa_attention

from gemma4_fast import UnsupportedError, ops
from gemma4_fast.integrations import interfaces, when_imported

NAME = "gemma4_fast"
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
NEW = 21  # tokens of a prompt, more than the window of 8
GREEDY: dict[str, Any] = dict(max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None)


# ---- registering ----


def in_python(code: str, *arguments: str | Path) -> Any:
    """What the program prints, as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


SAY = """
    import json
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
    from gemma4_fast.integrations import interfaces
    want = {ExpertsInterface: interfaces.experts, AttentionInterface: interfaces.attention}
    want[AttentionMaskInterface] = interfaces.attention_mask
    print(json.dumps([*before, *(i._global_mapping.get("gemma4_fast") is f for i, f in want.items())]))
"""


def test_it_registers_when_transformers_comes_later_and_does_not_import_it() -> None:
    code = f"""
    import sys
    import gemma4_fast
    before = ["transformers" in sys.modules]
    from transformers import AutoModelForCausalLM
    {SAY}"""
    assert in_python(code) == [False, True, True, True]


def test_it_registers_when_transformers_was_there_before() -> None:
    code = f"""
    import transformers.modeling_utils, transformers.integrations.moe
    before = ["gemma4_fast" in transformers.modeling_utils.AttentionInterface._global_mapping]
    import gemma4_fast
    {SAY}"""
    assert in_python(code) == [False, True, True, True]


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A package with a module that is to be registered: its file, and what was registered with."""
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("")
    file = package / "experts.py"
    file.write_text("x = 1\n")
    seen: list[ModuleType] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(when_imported, "REGISTRARS", {"made_up.experts": seen.append})
    monkeypatch.setattr(when_imported, "_said", set())
    yield SimpleNamespace(file=file, seen=seen)
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


def test_a_module_is_registered_once_it_has_run_and_looks_as_if_nobody_had_been_there(made_up: SimpleNamespace) -> None:
    spec = importlib.util.find_spec("made_up.experts")
    assert spec is not None and spec.loader is not None and spec.origin == str(made_up.file)
    assert spec.loader.get_source("made_up.experts") == "x = 1\n"  # type: ignore[attr-defined]
    assert copy.copy(spec.loader).path == str(made_up.file)  # type: ignore[attr-defined]
    assert not made_up.seen and "made_up.experts" not in sys.modules  # to look for it is not to import it
    module = importlib.import_module("made_up.experts")
    assert made_up.seen == [module] and module.x == 1
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader  # type: ignore[union-attr]
    assert importlib.import_module("made_up.experts") is module and len(made_up.seen) == 1
    made_up.file.write_text("x = 22\n")
    assert importlib.reload(module).x == 22 and len(made_up.seen) == 2  # the new classes know nobody yet
    other = importlib.import_module("made_up.other")
    assert len(made_up.seen) == 2 and type(other.__loader__) is SourceFileLoader


def test_an_import_that_fails_fails_as_ever_and_the_next_one_is_registered(made_up: SimpleNamespace) -> None:
    made_up.file.write_text("import made_up.missing\n")
    with pytest.raises(ModuleNotFoundError, match=r"made_up\.missing"):
        importlib.import_module("made_up.experts")
    assert not made_up.seen and "made_up.experts" not in sys.modules
    made_up.file.unlink()
    importlib.invalidate_caches()
    assert importlib.util.find_spec("made_up.experts") is None
    with pytest.raises(ModuleNotFoundError, match=r"made_up\.experts"):
        importlib.import_module("made_up.experts")
    made_up.file.write_text("x = 333\n")
    importlib.invalidate_caches()
    assert importlib.import_module("made_up.experts").x == 333 and len(made_up.seen) == 1


def test_other_finders_are_asked_in_their_order(made_up: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Other:
        def __init__(self, name: str, finds: bool) -> None:
            self.name, self.finds = name, finds

        def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
            if fullname != "made_up.experts":
                return None
            asked.append(self.name)
            return importlib.util.spec_from_loader(fullname, self) if self.finds else None  # type: ignore[arg-type]

        def create_module(self, spec: ModuleSpec) -> None: ...

        def exec_module(self, module: ModuleType) -> None:
            module.__dict__["x"] = self.name

    finders = [when_imported._FINDER, Other("first", False), Other("second", True), Other("third", True)]
    monkeypatch.setattr(sys, "meta_path", [*finders, *(f for f in sys.meta_path if f is not when_imported._FINDER)])
    module = importlib.import_module("made_up.experts")
    assert module.x == "second" and asked == ["first", "second"] and made_up.seen == [module]


def test_threads_that_import_it_at_once_wait_for_one_registration(made_up: SimpleNamespace) -> None:
    made_up.file.write_text("import time\ntime.sleep(0.1)\nx = 1\n")
    start, got = threading.Barrier(8), []

    def go() -> None:
        start.wait(10)
        got.append((importlib.import_module("made_up.experts").x, len(made_up.seen)))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == [(1, 1)] * 8


@pytest.mark.parametrize("error", [AttributeError("gone"), TypeError("changed"), ImportError("moved")])
def test_what_cannot_be_registered_is_said_once_and_breaks_no_import(
    made_up: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(module: ModuleType) -> None:
        raise error

    monkeypatch.setitem(when_imported.REGISTRARS, "made_up.experts", fail)
    with caplog.at_level(logging.WARNING, NAME):
        module = importlib.import_module("made_up.experts")
        importlib.reload(module)
    assert module.x == 1
    assert [r.message for r in caplog.records] == [
        f"gemma4_fast: could not register with made_up.experts of transformers {transformers.__version__}: {error}"
    ]


@pytest.mark.parametrize("version", ["4.57.1", "5.16.0", "", "unknown"])
def test_an_older_transformers_is_left_alone(
    made_up: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # not always `transformers` itself
    with caplog.at_level(logging.WARNING, NAME):
        importlib.reload(importlib.import_module("made_up.experts"))
    assert not made_up.seen and len(caplog.records) == 1 and "older than 5.17" in caplog.text


@pytest.mark.parametrize("version", ["5.17.0", "5.18.0.dev0", "6.0"])
def test_a_newer_one_is_not(made_up: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # not always `transformers` itself
    importlib.import_module("made_up.experts")
    assert len(made_up.seen) == 1


def test_installing_twice_changes_nothing(made_up: SimpleNamespace) -> None:
    module = importlib.import_module("made_up.experts")
    before = list(sys.meta_path)
    when_imported.install()
    assert sys.meta_path == before and made_up.seen == [module, module]


# ---- experts ----


class Case:
    """An eager experts module, and the same with ours; with `here` experts alone, as on a rank that has the first of them."""

    def __init__(self, dtype: torch.dtype = torch.float32, here: int = 16) -> None:
        self.theirs = copy.deepcopy(transformers_model("26b-a4b").model.layers[0].experts).to(dtype).requires_grad_(False)
        self.ours = copy.deepcopy(self.theirs)
        self.ours.num_experts = here
        for name in ("gate_up_proj", "down_proj"):
            setattr(self.ours, name, torch.nn.Parameter(getattr(self.ours, name)[:here].clone(), requires_grad=False))
        self.theirs.config, self.ours.config = (SimpleNamespace(_experts_implementation=name) for name in ("eager", NAME))

    def truth(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the eager module computes in fp64."""
        with InFp64():
            return copy.deepcopy(self.theirs).double()(x.double(), ids, weights.double())


def routed(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, top_k_index, top_k_weights, as from a router of 16 experts."""
    g = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(16, generator=g)[:4] for _ in range(tokens)])
    return torch.randn(tokens, 64, generator=g).to(dtype), ids, torch.rand(tokens, 4, generator=g)


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("here", [16, 8, 1])
def test_experts_are_eagers_all_of_them_or_a_ranks_share(tokens: int, here: int) -> None:
    case, (x, ids, weights) = Case(here=here), routed(tokens)
    want = case.theirs(x, ids, weights.masked_fill(ids >= here, 0.0))
    got = case.ours(x, ids.clamp(max=here), weights)  # whatever the weight of an expert that is elsewhere
    assert_right(got, want, case.truth(x, ids, weights.masked_fill(ids >= here, 0.0)))
    nobody = case.ours(x, torch.full_like(ids, here), weights)
    assert torch.equal(nobody, torch.zeros_like(x))


def test_no_tokens() -> None:
    case = Case()
    out = case.ours(torch.empty(0, 64), torch.empty(0, 4, dtype=torch.long), torch.empty(0, 4))
    assert out.shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_lose_no_more_than_eager_does(dtype: torch.dtype, tokens: int) -> None:
    x, ids, weights = routed(tokens, dtype=dtype)
    case = Case(dtype)
    a, b = case.theirs(x, ids, weights), case.ours(x, ids, weights)
    assert b.dtype == dtype
    assert_right(b, a, case.truth(x, ids, weights))


def test_weights_of_another_dtype_are_taken() -> None:
    x, ids, weights = routed(6, dtype=torch.bfloat16)
    case = Case(torch.bfloat16)
    assert torch.equal(case.ours(x, ids, weights.bfloat16()), case.ours(x, ids, weights.bfloat16().float()))


def sharded(placement: Any) -> Any:
    return SimpleNamespace(to_local=lambda: torch.zeros(2, 2), placements=(placement,))


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(has_bias=True), "has biases"),
        (dict(is_transposed=True), "transposed"),
        (dict(is_concatenated=False), "interleaved"),
        (dict(has_gate=False), "no gate"),
        (dict(has_post_expert_norm=True), "norms what"),
        (dict(act_fn=torch.nn.SiLU()), "SiLU, not gelu_pytorch_tanh"),
        (dict(_apply_gate=lambda x: x), "gate function of its own"),
    ],
)
def test_experts_of_another_kind_are_refused(change: dict[str, Any], why: str) -> None:
    case = Case()
    for name, value in change.items():
        setattr(case.ours, name, value)
    with pytest.raises(UnsupportedError, match=why):
        case.ours(*routed(2))


@pytest.mark.parametrize("what", ["hidden_states", "top_k_weights", "gate_up_proj", "down_proj"])
def test_gradients_are_refused_where_they_are_asked_for(what: str) -> None:
    case, (x, ids, weights) = Case(), routed(2)
    if what.endswith("proj"):
        getattr(case.ours, what).requires_grad_(True)
    else:
        {"hidden_states": x, "top_k_weights": weights}[what].requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"no gradients: run it under torch\.no_grad"):
        case.ours(x, ids, weights)
    with torch.no_grad():
        case.ours(x, ids, weights)
    with torch.inference_mode():
        case.ours(x, ids, weights)


@pytest.mark.parametrize("what", ["hidden_states", "down_proj"])
def test_dtypes_that_differ_are_refused(what: str) -> None:
    case, (x, ids, weights) = Case(), routed(2)
    if what == "hidden_states":
        x = x.bfloat16()
    else:
        case.ours.down_proj.data = case.ours.down_proj.bfloat16()
    with pytest.raises(UnsupportedError, match=f"one dtype, got.*{what} of torch.bfloat16"):
        case.ours(x, ids, weights)


def test_a_sharded_parameter_is_refused_where_nobody_adds_up_the_ranks_results() -> None:
    from torch.distributed.tensor import Replicate, Shard

    local = interfaces._whole_parameter(SimpleNamespace(p=sharded(Replicate())), "p")  # type: ignore[arg-type]
    assert torch.equal(local, torch.zeros(2, 2))
    with pytest.raises(UnsupportedError, match="p is a DTensor sharded as"):
        interfaces._whole_parameter(SimpleNamespace(p=sharded(Shard(1))), "p")  # type: ignore[arg-type]


def test_another_models_experts_are_refused_rather_than_computed_with_gelu() -> None:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40,
        num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation=NAME).eval()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="MixtralExperts has the activation SiLU"):
        model(torch.tensor([[1, 2, 3]]))


# ---- attention: the functions ----


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often attention went which way: "decode", "prefill", "padded", "sdpa"."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str, way: str) -> None:
        function = getattr(owner, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            counts[way] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    for way in ("decode", "prefill", "padded"):
        counted(interfaces, f"_{way}", way)
    counted(sdpa_attention, "sdpa_attention_forward", "sdpa")
    return counts


def padded(*rows: str) -> Tensor:
    """ "..xxx" -> 0 0 1 1 1"""
    return torch.tensor([[int(c == "x") for c in row] for row in rows])


def layer(window: int | None) -> Any:
    """What the attention function is told of a layer of 4 query and 2 KV heads."""
    config = SimpleNamespace(model_type="gemma4_text", sliding_window=window or 8)
    return SimpleNamespace(config=config, is_causal=True, num_key_value_groups=2, head_dim=64, training=False)


def masks(tokens: int, keys: int, window: int | None, real: Tensor | None, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Eager's mask and ours, of T queries that are the last of S keys."""
    from transformers.masking_utils import causal_mask_function, eager_mask, sliding_window_causal_mask_function

    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    kwargs: dict[str, Any] = dict(
        batch_size=batch, q_length=tokens, kv_length=keys, q_offset=keys - tokens + 3, kv_offset=3, mask_function=function,
        attention_mask=None if real is None else torch.nn.functional.pad(real, (3, 0), value=True), local_size=window,
        config=layer(window).config, allow_is_causal_skip=True, use_vmap=False, device="cpu",
    )  # fmt: skip
    return eager_mask(**kwargs, dtype=torch.float64), interfaces.attention_mask(**kwargs, dtype=torch.float32)


def judge(
    module: Any, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, out: Tensor, rows: Tensor | None = None, **how: Any
) -> None:
    """`out`, of the tokens `rows` if given, obeys the rule. `mask` is eager's, in fp64."""
    from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward

    dtype = states[0].dtype
    plain_mask = None if mask is None else mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    plain, _ = eager_attention_forward(module, *states, plain_mask, **how)
    with InFp64():
        truth, _ = eager_attention_forward(module, *(x.double() for x in states), mask, **how)
    if rows is not None:
        out, plain, truth = out[rows], plain[rows], truth[rows]
    assert_right(out, plain, truth)


REAL = {
    "plain": None,
    "left": padded("...xxxxxxxxxxxxxxxxx", "xxxxxxxxxxxxxxxxxxxx").bool(),
    "nobody": padded("....................", "................xxxx").bool(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, keys", [(20, 20), (6, 20), (1, 20), (1, 1)])
@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("window", [None, 8])
def test_attention_is_eagers(
    dtype: torch.dtype, tokens: int, keys: int, real: str, window: int | None, took: Counter[str]
) -> None:
    g, module, rows = torch.Generator().manual_seed(0), layer(8), REAL[real]
    rows = None if rows is None else rows[:, -keys:]
    query, key, value = (
        torch.randn(2, heads, n, 64, generator=g).to(dtype) for heads, n in ((4, tokens), (2, keys), (2, keys))
    )
    eager, ours = masks(tokens, keys, window, rows)
    out, weights = interfaces.attention(module, query, key, value, ours, scaling=0.3, sliding_window=window)
    assert weights is None and out.shape == (2, tokens, 4, 64) and out.dtype == dtype and out.is_contiguous()
    assert "sdpa" not in took
    mine = None if rows is None else rows[:, -tokens:]
    if mine is not None:  # queries of padding: 0, whatever eager makes of them
        assert (out[~mine] == 0).all()
    judge(module, (query, key, value), eager, out, mine, scaling=0.3)


@pytest.mark.parametrize("tokens, keys", [(20, 20), (6, 20), (1, 20), (1, 1)])
@pytest.mark.parametrize("window", [None, 8, 30])
def test_a_plain_mask_that_sdpa_gets_after_all_is_spelled_out(
    tokens: int, keys: int, window: int | None, took: Counter[str]
) -> None:
    from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward

    g, module = torch.Generator().manual_seed(0), layer(window)
    query, key, value = (torch.randn(2, heads, n, 64, generator=g) for heads, n in ((4, tokens), (2, keys), (2, keys)))
    query.requires_grad_(True)
    eager, ours = masks(tokens, keys, window, None)
    assert ours is None
    out, _ = interfaces.attention(module, query, key, value, ours, scaling=0.3, sliding_window=window)
    want, _ = eager_attention_forward(module, query, key, value, eager.float(), scaling=0.3)
    assert set(took) == {"sdpa"} and out.requires_grad
    with InFp64():
        wide = query.detach().double().requires_grad_(True)
        truth, _ = eager_attention_forward(module, wide, key.double(), value.double(), eager, scaling=0.3)
    assert_right(out, want, truth)
    gradient, plain = (torch.autograd.grad(o.sum(), query)[0] for o in (out, want))
    # With one key to see, the gradient is a difference of equal terms.
    assert_right(gradient, plain, torch.autograd.grad(truth.sum(), wide)[0], scale=largest(key))


@pytest.mark.parametrize(
    "change",
    [
        dict(dropout=0.5), dict(softcap=30.0), dict(output_attentions=True), dict(is_causal=False), dict(sliding_window=7),
        dict(position_bias=torch.zeros(1, 4, 20, 20)), dict(s_aux=torch.zeros(4)),
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_not_theirs(
    change: dict[str, Any], took: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}
    monkeypatch.setattr(
        sdpa_attention, "sdpa_attention_forward", lambda *args, **kwargs: got.update(kwargs, mask=args[4]) or (None, None)
    )
    query, key = torch.randn(2, 4, 20, 64), torch.randn(2, 2, 20, 64)
    _, mask = masks(20, 20, 8, REAL["left"])
    kwargs = dict(scaling=0.3, sliding_window=8) | change
    interfaces.attention(layer(8), query, key, key, mask, **kwargs)
    assert not took and got["mask"] is mask and kwargs.items() <= got.items()


def test_no_scale_is_the_usual_one_and_a_layer_that_sees_all_is_left_alone(took: Counter[str]) -> None:
    module, (query, key, value) = layer(None), (torch.randn(1, heads, 9, 64) for heads in (4, 2, 2))
    eager, _ = masks(9, 9, None, None, batch=1)
    out, _ = interfaces.attention(module, query, key, value, None)
    judge(module, (query, key, value), eager, out)
    assert set(took) == {"prefill"}
    module.is_causal = False
    out, _ = interfaces.attention(module, query, key, value, None)
    judge(module, (query, key, value), None, out)
    assert took["sdpa"] == 1


def test_what_the_masks_tell() -> None:
    plain: dict[str, Any] = dict(
        batch_size=2, q_length=6, kv_length=20, q_offset=14, kv_offset=0, local_size=8, dtype=torch.float32
    )
    plain |= dict(config=layer(8).config, device="cpu")
    ours = interfaces.attention_mask
    assert ours(**plain) is None
    assert ours(**plain, attention_mask=torch.ones(2, 20, dtype=torch.bool)) is None
    left = ours(**plain, attention_mask=torch.arange(20)[None].expand(2, 20) >= 17)
    assert left is not None and left.shape == (2, 1, 6, 20) and left.gemma4_fast_padding[0].window == 8
    assert not hasattr(left[:, :, -1:, :], "gemma4_fast_padding")  # a slice is of other queries
    for change in (
        dict(allow_is_causal_skip=False),  # something is on top of it
        dict(allow_is_bidirectional_skip=True),
        dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=True, local_size=None),
        dict(use_vmap=True),
        dict(local_size=9),  # no window of this model
        dict(kv_length=21),  # keys behind the last query
        dict(q_offset=13),
        dict(q_offset=torch.tensor(14)),  # a static cache
        dict(attention_mask=torch.ones(2, 19, dtype=torch.bool)),  # shorter: the last key is padding, after a cache
    ):
        mask = ours(**{**plain, **change})
        assert mask is not None and mask.shape[:3] == (2, 1, 6) and not hasattr(mask, "gemma4_fast_padding"), change


def test_other_models_get_what_sdpa_gives() -> None:
    from transformers.masking_utils import sdpa_mask

    config = transformers.LlamaConfig()
    for kwargs in (dict(q_length=6, kv_length=6), dict(q_length=6, kv_length=20, q_offset=14), dict(q_length=3, kv_length=9)):
        a, b = (f(batch_size=1, config=config, **kwargs) for f in (sdpa_mask, interfaces.attention_mask))
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_another_model_runs_on_sdpa(took: Counter[str]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
    )
    theirs, ours = (AutoModelForCausalLM.from_config(config, attn_implementation=name).eval() for name in ("eager", NAME))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        a, b = (m.generate(prompt(2, 7, 40), **GREEDY) for m in (theirs, ours))
    assert torch.equal(a, b) and set(took) == {"sdpa"}


# ---- attention: models ----


@functools.cache
def fast(member: str) -> Gemma4ForCausalLM:
    config = copy.deepcopy(transformers_model(member).config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, experts_implementation=NAME).eval()
    model.load_state_dict(transformers_model(member).state_dict())
    assert model.config._attn_implementation == model.config._experts_implementation == NAME
    return model


class Pair:
    """The same calls of three models, each with its cache: eager's, ours, and eager's in fp64, which is the truth."""

    def __init__(self, member: str, **cache: Any) -> None:
        self.member = member
        self.models = transformers_model(member), fast(member), wide_model(member)
        self.caches: list[Any] = [cache.get("cache", lambda config: None)(m.config) for m in self.models]

    @torch.no_grad()
    def __call__(self, ids: Tensor, only: Tensor | None = None, **kwargs: Any) -> None:
        """The logits obey the rule, of the tokens `only`, if given."""
        got = []
        for i, model in enumerate(self.models):
            with InFp64() if i == 2 else contextlib.nullcontext():
                out = model(ids, past_key_values=self.caches[i], **kwargs)
            self.caches[i] = out.past_key_values
            got.append(out.logits if only is None else out.logits[only])
        eager, ours, truth = got
        assert_model_right(self.member, ours, eager, truth)


@pytest.mark.parametrize("member", MEMBERS)
def test_prefill_and_decode(member: str, took: Counter[str]) -> None:
    both, layers = Pair(member), MEMBERS[member]["num_hidden_layers"]
    both(prompt(2, NEW))
    assert took == {"prefill": layers}
    for step in range(3):
        both(prompt(2, 1, seed=step))
    assert took == {"prefill": layers, "decode": 3 * layers}


@pytest.mark.parametrize("member", ["26b-a4b", "e2b"])
def test_a_short_prompt_grows_beyond_the_window(member: str, took: Counter[str]) -> None:
    both = Pair(member)
    both(prompt(1, 1))
    for step in range(11):
        both(prompt(1, 1, seed=step))
    assert set(took) == {"decode"}


@pytest.mark.parametrize("member", ["26b-a4b", "e2b"])
@pytest.mark.parametrize("cache", [None, lambda config: DynamicCache()], ids=["sliding", "all"])
def test_chunks_after_a_cache(member: str, cache: Any, took: Counter[str]) -> None:
    both = Pair(member, **({"cache": cache} if cache else {}))
    for chunk in (3, 4, 1, NEW, 2, 1):  # within the window, across its edge, longer than it
        both(prompt(2, chunk, seed=chunk))
    assert set(took) == {"prefill", "decode"}


def test_without_a_cache(took: Counter[str]) -> None:
    Pair("26b-a4b")(prompt(2, NEW), use_cache=False)
    assert set(took) == {"prefill"}


@pytest.mark.parametrize("member", ["26b-a4b", "e2b"])
def test_left_padding(member: str, took: Counter[str]) -> None:
    both = Pair(member)
    # Rows that begin at once, within the window, beyond it, in the next chunk, and in the one after that.
    total = padded("x" * 20, "." * 3 + "x" * 17, "." * 10 + "x" * 10, "." * 13 + "x" * 7, "." * 17 + "x" * 3)
    done = 0
    for chunk in (11, 4, 3, 1, 1):
        ids, mask = prompt(5, chunk, seed=chunk), total[:, : done + chunk]
        both(ids, mask[:, done:].bool(), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, done:])
        done += chunk
        ways = set(took)
        took.clear()
        # Layers that share keys get a slice of the mask, which says nothing of padding.
        left = {"sdpa"} if member == "e2b" and chunk > 1 else set()
        assert "padded" in ways and ways <= {"padded", "prefill", "decode"} | left, (chunk, ways)


@pytest.mark.parametrize("member", ["26b-a4b", "e2b"])
def test_right_padding(member: str, took: Counter[str]) -> None:
    both = Pair(member)
    mask = padded("x" * 20, "x" * 13 + "." * 7, "x" * 3 + "." * 17, ".." + "x" * 11 + "." * 7)
    both(prompt(4, 20), mask.bool(), attention_mask=mask)
    assert took["padded"] and set(took) <= {"padded"} | ({"sdpa"} if member == "e2b" else set())
    took.clear()
    mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)  # goes on behind the padding: a hole
    both(prompt(4, 1), attention_mask=mask)
    assert set(took) == {"sdpa", "padded", "decode"}  # what a window shows has no hole


def test_holes_in_the_padding(took: Counter[str]) -> None:
    mask = padded("x" * 20, "xxx..xxx...xxxxxxxxx", "x.x.x.x.x.x.x.x.x.xx")
    Pair("26b-a4b")(prompt(3, 20), mask.bool(), attention_mask=mask)
    assert set(took) == {"sdpa"}


@pytest.mark.parametrize("keep", [0, 1, 2, 5, "indices"])
@pytest.mark.parametrize("mask", [None, padded("x" * NEW, "." * 4 + "x" * (NEW - 4))], ids=["plain", "padded"])
def test_layers_that_share_keys_see_the_last_queries_alone(keep: Any, mask: Tensor | None, took: Counter[str]) -> None:
    both = Pair("e2b")
    kept = torch.tensor([6, NEW - 1]) if keep == "indices" else keep
    only = None if mask is None or keep != 0 else mask.bool()
    both(prompt(2, NEW), only, attention_mask=mask, logits_to_keep=kept, use_cache=True)
    if mask is None:
        assert "sdpa" not in took
    if mask is None and keep == 1 and VERSION >= (5, 20):
        assert took == {"prefill": 6, "decode": 4}  # 4 of the 10 layers share others' keys
    both(
        prompt(2, 3),
        attention_mask=None if mask is None else torch.cat((mask, torch.ones(2, 3)), 1),
        logits_to_keep=kept if keep != "indices" else 0,
    )


def test_a_mask_of_the_callers(took: Counter[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "_said", set())
    at = torch.arange(NEW)
    prefix = (at[None] <= at[:, None]) | (at[None] < 5)  # the first five see each other
    mask = torch.where(prefix, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, NEW, NEW)
    with caplog.at_level(logging.WARNING, NAME):
        Pair("26b-a4b")(prompt(2, NEW), attention_mask=mask)
    assert set(took) == {"sdpa"}
    (record,) = [r for r in caplog.records if r.name == NAME and "attention" in r.message]
    assert "left to transformers' sdpa function where the mask is" in record.message


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_its_owner_writes_into(inference: bool, took: Counter[str]) -> None:
    """What it was made with says no longer what it is."""
    rows = torch.arange(NEW)[None].expand(2, NEW) >= torch.tensor([[3], [0]])
    with torch.inference_mode(inference):
        eager, ours = masks(NEW, NEW, None, rows)
        query, key, value = (torch.randn(2, heads, NEW, 64) for heads in (4, 2, 2))
        assert ours is not None
        ours[:, :, 10:, 7] = False
        eager[:, :, 10:, 7] = torch.finfo(eager.dtype).min
        out, _ = interfaces.attention(layer(None), query, key, value, ours, scaling=0.3, sliding_window=None)
        judge(layer(None), (query, key, value), eager, out, rows, scaling=0.3)
    assert set(took) == {"sdpa"}


def test_forward_derivatives_are_not_lost(took: Counter[str]) -> None:
    """sdpa has none on a CPU, and says so; experts refuse."""
    import torch.autograd.forward_ad as forward_ad

    query, key, value = (torch.randn(1, heads, 6, 64) for heads in (4, 2, 2))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(NotImplementedError, match="forward AD"):
            interfaces.attention(layer(None), query, key, dual, None, scaling=0.3, sliding_window=None)
        moe = transformers_model("26b-a4b").model.layers[0].experts
        with pytest.raises(UnsupportedError, match="no gradients"):
            interfaces.experts(moe, torch.randn(2, 64), torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4))
    assert set(took) == {"sdpa"}


def test_packed_sequences(took: Counter[str]) -> None:
    position_ids = torch.tensor([[*range(10), *range(7), *range(4)], [*range(3), *range(9), *range(9)]])
    Pair("26b-a4b")(prompt(2, NEW), position_ids=position_ids, use_cache=False)
    assert set(took) == {"sdpa"}


def test_all_tokens_see_each_other() -> None:
    config = copy.deepcopy(transformers_model("26b-a4b").config)
    config.use_bidirectional_attention, config.is_causal = "all", False
    theirs, ours = (
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name).eval() for name in ("eager", NAME)
    )
    ours.load_state_dict(theirs.state_dict())
    mask = padded("x" * NEW, "..." + "x" * (NEW - 3))
    for kwargs in (dict(), dict(attention_mask=mask)):
        with torch.no_grad():
            a, b = (m(prompt(2, NEW), use_cache=False, **kwargs).logits for m in (theirs, ours))
        assert_near_eager(b, a)
    # And where the config alone says it, after the layers were made.
    plain, told = transformers_model("26b-a4b"), fast("26b-a4b")
    for model in (plain, told):
        model.config.is_causal = False
    try:
        with torch.no_grad():
            a, b = (m(prompt(2, NEW), use_cache=False).logits for m in (plain, told))
    finally:
        for model in (plain, told):
            del model.config.is_causal
    assert_near_eager(b, a)


@pytest.mark.parametrize("member", ["26b-a4b", "e2b"])
@pytest.mark.parametrize(
    "kwargs, ways",
    [
        (dict(), {"prefill", "decode"}),
        (dict(attention_mask=padded("x" * 12, "." * 5 + "x" * 7)), {"padded", "decode", "sdpa"}),
        (dict(num_beams=3), {"prefill", "decode"}),
        (dict(prompt_lookup_num_tokens=3), {"prefill", "decode", "sdpa"}),
        (dict(cache_implementation="static"), {"sdpa", "prefill", "decode"}),
        (dict(use_cache=False), {"prefill", "decode"}),
    ],
    ids=["greedy", "padded", "beams", "lookup", "static", "no_cache"],
)
def test_generate(member: str, kwargs: dict[str, Any], ways: set[str], took: Counter[str]) -> None:
    ids = prompt(1 if "prompt_lookup_num_tokens" in kwargs else 2, 12)
    if "prompt_lookup_num_tokens" in kwargs:
        ids = torch.cat((ids[:, :6], ids[:, :6]), 1)
    a, b = (m.generate(ids, **GREEDY, **kwargs) for m in (transformers_model(member), fast(member)))
    assert torch.equal(a, b)
    assert set(took) <= ways and took


# ---- images, and what else a multimodal model has ----

IMAGE, PATCHES = 205, 36  # an image's token; patches of an image, 4 to a token


@functools.cache
def with_vision(implementation: str, member: str = "26b-a4b") -> Any:
    text = dict(MEMBERS[member], use_bidirectional_attention="vision")
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    vision |= dict(head_dim=16, patch_size=2, pooling_kernel_size=2, position_embedding_size=16)
    config = transformers.Gemma4Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=206, audio_token_id=207, boi_token_id=208,
        eoi_token_id=209, boa_token_id=210, eoa_token_index=210,
    )  # fmt: skip
    torch.manual_seed(0)
    how = dict(attn_implementation=implementation, experts_implementation=implementation)
    model = transformers.Gemma4ForConditionalGeneration._from_config(config, **how).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5 + (1 if "norm" in name else 0))
    return model


@torch.no_grad()
def test_images_see_themselves_and_the_vision_tower_sees_all(took: Counter[str]) -> None:
    ids = prompt(2, NEW, 200)
    ids[0, 2:11] = ids[1, 9:18] = IMAGE  # 9 tokens, more than the window
    at = torch.arange(PATCHES)
    places = torch.stack((at % 6, at // 6), 1)[None].expand(2, PATCHES, 2)
    pixels = torch.rand(2, PATCHES, 12, generator=torch.Generator().manual_seed(1))
    kwargs = dict(pixel_values=pixels, image_position_ids=places, mm_token_type_ids=(ids == IMAGE).long())
    eager, ours = with_vision("eager"), with_vision(NAME)
    assert ours.config.vision_config._attn_implementation == NAME
    a, b = (m(ids, **kwargs) for m in (eager, ours))
    # 2 layers of the tower and 5 sliding ones that have the images' masks; the full one is causal
    assert took == {"sdpa": 7, "prefill": 1}
    truth = in_fp64(eager, ids, **kwargs).logits
    assert_right(b.logits, a.logits, truth)
    took.clear()
    a, b = (m.generate(ids, **kwargs, **GREEDY) for m in (eager, ours))
    assert torch.equal(a, b) and took["decode"] == 6 * 13
    took.clear()
    text = prompt(2, NEW, 200)
    a, b = (m(text).logits for m in (eager, ours))
    assert set(took) == {"prefill"}
    assert_near_eager(b, a)


@torch.no_grad()
def test_the_audio_tower_gets_the_masks_that_it_reads() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    config = transformers.Gemma4AudioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    default = Gemma4AudioModel._from_config(copy.deepcopy(config)).eval()
    ours = Gemma4AudioModel._from_config(copy.deepcopy(config), attn_implementation=NAME).eval()
    ours.load_state_dict(default.state_dict())
    features = torch.randn(2, 60, config.input_feat_size if hasattr(config, "input_feat_size") else 128)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, 33:] = False
    a, b = (m(features, mask).last_hidden_state for m in (default, ours))
    truth = in_fp64(default, features.double(), mask).last_hidden_state
    assert_right(b, a, truth)


# ---- two ranks ----

TOKENS = 12  # of the prompt, and more than the window with those that are generated


def two_ranks() -> Gemma4ForCausalLM:
    """26B-A4B's architecture, with heads and experts that two ranks can share: two KV heads in every layer."""
    MEMBERS["two ranks"] = dict(MEMBERS["26b-a4b"], num_global_key_value_heads=2, vocab_size=212)
    try:
        return transformers_model.__wrapped__("two ranks")
    finally:
        del MEMBERS["two ranks"]


def ways_to_share() -> dict[str, dict[str, Any]]:
    """By name: how the experts are shared, as from_pretrained is told in this version of transformers."""
    ways: dict[str, dict[str, Any]] = {"tensor": dict(tp_plan="auto")}
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        return ways | {"expert": dict(distributed_config=DistributedConfig(tp_size=2, enable_expert_parallel=True))}
    for how in ("all_reduce", "all_to_all"):
        config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=how)
        ways[f"expert, {how}"] = dict(distributed_config=config)
    return ways


def rank_main(folder: Path, rank: int) -> None:
    """One of the two ranks: loads the model in each way, and writes what it computes and what it was given to compute."""
    torch.set_num_threads(1)
    if importlib.util.find_spec("accelerate") is None:  # asked for with any device map, and not used with a CPU's
        from transformers.integrations import accelerate

        accelerate.is_accelerate_available = lambda: True
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=10))
    given: list[tuple[list[int], int, int]] = []  # of each call: the shape of gate_up, ids, and those of other ranks
    moe = ops.moe

    def seen(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        assert type(gate_up) is type(down) is torch.nn.Parameter or type(gate_up) is type(down) is Tensor
        given.append((list(gate_up.shape), ids.numel(), int((ids >= gate_up.shape[0]).sum())))
        return moe(x, weights, ids, gate_up, down)

    ops.moe = seen
    ids, results = prompt(2, TOKENS), {}
    for name, how in ways_to_share().items():
        given.clear()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=NAME, experts_implementation=NAME, **how
        ).eval()
        with torch.no_grad():
            logits = model(ids).logits
            tokens = model.generate(ids, **GREEDY)
        results[name] = logits, tokens, list(given)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_experts_and_say_what_one_says(tmp_path: Path) -> None:
    eager = two_ranks()
    eager.save_pretrained(tmp_path)
    command = [sys.executable, __file__, str(tmp_path)]
    said = [(tmp_path / f"said{rank}").open("w+") for rank in range(2)]
    ranks = [subprocess.Popen([*command, str(r)], stdout=said[r], stderr=subprocess.STDOUT) for r in range(2)]
    try:
        for rank in ranks:
            rank.wait(timeout=600)  # both may wait long for a processor that others use too
    finally:
        for rank in ranks:  # a rank alone waits for the other
            rank.kill()
            rank.wait()
        for file in said:
            file.seek(0)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(file.read()[-3000:] for file in said)

    ids, layers, calls = prompt(2, TOKENS), eager.config.num_hidden_layers, GREEDY["max_new_tokens"] + 1
    with torch.no_grad():
        logits, tokens = eager(ids).logits, eager.generate(ids, **GREEDY)
        truth = in_fp64(eager, ids).logits
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert list(results[0]) == list(results[1]) == list(ways_to_share())
    for name in results[0]:
        for rank, result in enumerate(results):
            got, chosen, given = result[name]
            print(f"{name}, rank {rank}")
            assert_right(got, logits, truth)
            assert torch.equal(chosen, tokens), (name, rank)
            assert len(given) == layers * calls, "our experts ran, in every layer of every step"
            whole, shared = [16, 32, 64], [8, 64, 64]  # half of each expert's gate and up rows; half of the experts
            assert all(shape == (whole if name == "tensor" else shared) for shape, _, _ in given), (name, given[0])
        here = [[count - away for _, count, away in result[name][2]] for result in results]
        assignments = [2 * TOKENS * 4] * 2 * layers + [2 * 4] * (calls - 2) * layers
        if name == "tensor":
            assert here == [assignments] * 2
        else:  # each assignment is one rank's; exchanging tokens, a rank that gets none computes one row for nobody
            extra = {a + b - want for a, b, want in zip(*here, assignments, strict=True)}
            assert extra <= ({0, 1} if name == "expert, all_to_all" else {0}) and all(sum(h) > layers * calls for h in here)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]))
