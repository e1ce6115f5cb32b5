"""Keywords: every option is in the signature, and an unknown one names the one to use."""

from __future__ import annotations

import copy
import importlib
import inspect
import pydoc
import sys
from collections.abc import Callable
from typing import Any

import family
import pytest
from torch import nn

import gemma4_fast
from gemma4_fast import Gemma4, accelerate, explain
from gemma4_fast.generate import generate, stream
from gemma4_fast.keywords import FOREIGN, explicit

OPTIONS = [
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "logprobs",
    "prefill_chunk",
    "on_prefill",
]


@pytest.fixture(scope="module")
def tiny() -> Gemma4:
    return Gemma4.from_pretrained("tiny", device="cpu", check=False)


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_methods_and_functions_have_the_same_options(name: str) -> None:
    method = inspect.signature(getattr(Gemma4, name))
    function = inspect.signature({"generate": generate, "stream": stream}[name])
    assert list(method.parameters) == ["self", "prompt", *OPTIONS]
    assert list(function.parameters) == ["model", "prompt", *OPTIONS]
    for option in OPTIONS:
        assert method.parameters[option] == function.parameters[option]
    assert method.return_annotation == function.return_annotation


@pytest.mark.parametrize("method", [Gemma4.generate, Gemma4.stream])
def test_help_lists_every_option(method: Callable[..., Any]) -> None:
    text = pydoc.plain(pydoc.render_doc(method))
    assert "**" not in text
    for option in OPTIONS:
        assert f"{option}:" in text


def test_the_options_are_described() -> None:
    described = inspect.getdoc(Gemma4.generate) or ""
    for option in OPTIONS:
        assert option in described


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_methods_hand_every_option_on(
    name: str,
    tiny: Gemma4,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {option: object() for option in OPTIONS}
    seen: dict[str, Any] = {}
    module = importlib.import_module("gemma4_fast.generate")
    monkeypatch.setattr(module, name, lambda model, prompt, **options: seen.update(options))
    getattr(tiny, name)("x", **given)
    assert seen == given


def test_options_of_stream_reach_the_generation(tiny: Gemma4) -> None:
    options: dict[str, Any] = dict(
        max_new_tokens=6,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        seed=4,
        stop_token_ids=(),
        logprobs=1,
    )
    streamed = tiny.stream("It is", **options)
    list(streamed)
    whole = tiny.generate("It is", **options)
    assert streamed.result.token_ids == whole.token_ids and len(whole.token_ids) == 6
    assert streamed.result.top_logprobs == whole.top_logprobs


@pytest.mark.parametrize(
    "keyword, ours",
    [
        ("do_sample", "temperature"),
        ("max_tokens", "max_new_tokens"),
        ("max_length", "max_new_tokens"),
        ("num_return_sequences", "list"),
        ("stop_strings", "stop"),
        ("eos_token_id", "stop_token_ids"),
        ("top_n", "logprobs"),
        ("temprature", "did you mean temperature"),
        ("max_new_token", "did you mean max_new_tokens"),
        ("zzz", "it takes prompt, max_new_tokens"),
    ],
)
@pytest.mark.parametrize("name", ["generate", "stream"])
def test_keywords_of_generation(name: str, keyword: str, ours: str, tiny: Gemma4) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\) has no argument '{keyword}'[:;] .*{ours}"):
        getattr(tiny, name)("x", **{keyword: 1})
    function = {"generate": generate, "stream": stream}[name]
    with pytest.raises(TypeError, match=f"'{keyword}'"):
        function(tiny, "x", **{keyword: 1})


@pytest.mark.parametrize(
    "keyword, ours",
    [
        ("device_map", "device"),
        ("torch_dtype", "dtype"),
        ("load_in_4bit", 'quantize="int4"'),
        ("load_in_8bit", 'quantize="int8"'),
        ("attn_implementation", "backend"),
        ("quantise", "did you mean quantize"),
    ],
)
def test_keywords_of_loading(keyword: str, ours: str) -> None:
    for call in (Gemma4.from_pretrained, Gemma4.dummy, accelerate):
        with pytest.raises(TypeError, match=f"{call.__name__}.*{keyword}.*[:;] .*{ours}"):
            call("no/such/folder", **{keyword: "auto"})


def test_no_keyword_of_ours_counts_as_foreign() -> None:
    loading = Gemma4.from_pretrained, Gemma4.dummy, accelerate
    for function in (Gemma4.generate, Gemma4.stream, *loading):
        assert not set(inspect.signature(function).parameters) & set(FOREIGN)


def test_a_function_stays_what_it_is() -> None:
    @explicit
    def add(a: int, *, b: int = 2) -> int:
        """Sum."""
        return a + b

    assert add(1) == 3 and add(a=1, b=1) == 2
    assert add.__doc__ == "Sum."
    assert str(inspect.signature(add)) == "(a: 'int', *, b: 'int' = 2) -> 'int'"
    with pytest.raises(TypeError, match="missing 1 required"):
        add()  # type: ignore[call-arg]


# ---------------------------------------------------------------- explain and accelerate
def test_explain_refuses_other_objects() -> None:
    with pytest.raises(ValueError, match=r"expected a Gemma4 or an accelerated model.*got str"):
        explain("tiny")
    with pytest.raises(ValueError, match="this Linear is not accelerated; call gemma4_fast"):
        explain(nn.Linear(2, 2))


def test_explain_needs_no_transformers_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gemma4_fast.integrations.transformers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="this Linear is not accelerated; call gemma4_fast"):
        explain(nn.Linear(2, 2))


def test_explain_takes_an_accelerated_model() -> None:
    theirs = family.transformers_model("26b-a4b")
    with pytest.raises(ValueError, match="this Gemma4ForCausalLM is not accelerated; call"):
        explain(theirs)
    fast = accelerate(copy.deepcopy(theirs), check=False, backend="torch")
    found = explain(fast)
    assert (found.device, found.dtype) == ("cpu", "float32")
    backends = {choice.op: choice.backend for choice in found.choices}
    assert backends["linear"] == "torch"
    assert "moe_feed_forward" in backends and "ple_gate" not in backends
    assert explain(fast.model).to_dict() == found.to_dict()


def test_accelerate_without_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "gemma4_fast.integrations.transformers"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    integrations = importlib.import_module("gemma4_fast.integrations")
    monkeypatch.delattr(integrations, "transformers", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (accelerate, gemma4_fast.restore):
        with pytest.raises(ImportError, match=r"pip install 'gemma4-fast\[transformers\]'"):
            call(nn.Linear(2, 2))
