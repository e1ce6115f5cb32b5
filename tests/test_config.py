"""config.json in every spelling, true presets, slices; and everything that must be refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4Config as HFConfig
from transformers import Gemma4TextConfig

from gemma4_fast import CheckpointError, Gemma4, Gemma4Config
from gemma4_fast.cache import KVCache
from gemma4_fast.config import FULL, PRESETS, SLIDING

each_preset = pytest.mark.parametrize("name", PRESETS)


def published(name: str, **changes: Any) -> dict[str, Any]:
    """The spelling of the published files: flat text part, global_head_dim."""
    return {**PRESETS[name].to_dict(), **changes}


@pytest.mark.parametrize(
    "name, full_bytes, sliding_mb",
    # Known figures: bytes a token of K and V in bf16 over all full layers; MB of the sliding layers' caches at the window.
    [("e2b", 6144, 6.3), ("e4b", 16384, 21), ("12b", 16384, 336), ("26b-a4b", 20480, 210), ("31b", 81920, 839)],
)
def test_presets_give_the_known_cache_sizes(name: str, full_bytes: int, sliding_mb: float) -> None:
    config = Gemma4Config.preset(name)
    cache = KVCache(config, 1, 4096, torch.bfloat16, "meta")
    own = [c for c in config.layers() if c.kv_donor is None]
    v_bytes = {s: sum(cache.layer(c.index).v.nbytes for c in own if c.is_sliding == s) for s in (True, False)}
    assert 2 * v_bytes[False] == full_bytes * 4096
    assert 2 * v_bytes[True] / 1e6 == pytest.approx(sliding_mb, rel=0.01)
    assert cache.nbytes == v_bytes[False] * (1 if config.attention_k_eq_v else 2) + 2 * v_bytes[True]


@each_preset
def test_presets_are_what_transformers_builds(name: str) -> None:
    from transformers import Gemma4ForCausalLM

    config = Gemma4Config.preset(name)
    with torch.device("meta"):
        ours = Gemma4(config)
        theirs = Gemma4ForCausalLM(Gemma4TextConfig(**published(name)))
    shapes = {n: tuple(t.shape) for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    assert {n: tuple(t.shape) for n, t in ours.state_dict().items()} == shapes


@each_preset
def test_every_spelling_gives_the_same_config(name: str, tmp_path: Path) -> None:
    config = Gemma4Config.preset(name)
    flat = published(name)
    saved_by_transformers = Gemma4TextConfig(**flat).to_dict()
    assert "per_layer_config" in saved_by_transformers
    nested = HFConfig(text_config=flat, vision_config={}, audio_config=None).to_dict()
    older = {"model_type": "gemma4", "text_config": flat, "vision_config": {"hidden_size": 8}, "image_token_id": 5}
    for i, data in enumerate((flat, saved_by_transformers, nested, older)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(data))
        assert Gemma4Config.from_pretrained(folder) == config
    assert Gemma4Config.from_dict(older).towers == ("vision",)
    unified = {"model_type": "gemma4_unified", "text_config": {**flat, "model_type": "gemma4_unified_text"}}
    assert Gemma4Config.from_dict(unified) == config


def test_the_facts_of_the_family() -> None:
    e2b, e4b = Gemma4Config.preset("e2b"), Gemma4Config.preset("e4b")
    assert {layer.kv_donor for layer in e2b.layers()} == {None, 13, 14}
    assert {layer.kv_donor for layer in e4b.layers()} == {None, 22, 23}
    assert [e2b.layer(i).intermediate_size for i in (14, 15, 34)] == [6144, 12288, 12288]
    moe = Gemma4Config.preset("26b-a4b")
    assert sum(layer.is_sliding for layer in moe.layers()) == 25
    full, sliding = moe.layer(5), moe.layer(4)
    assert (full.head_dim, full.num_kv_heads, full.k_eq_v, full.window, full.num_rotary_pairs) == (
        512,
        2,
        True,
        None,
        64,
    )
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.window, sliding.num_rotary_pairs) == (256, 8, 1024, 128)


@each_preset
@pytest.mark.parametrize("layers", [1, 2, 5, 6, 7, 12, 20])
def test_slices_keep_the_pattern(name: str, layers: int) -> None:
    whole = Gemma4Config.preset(name)
    cut = whole.slice(num_layers=layers, vocab_size=1000)
    assert cut.num_hidden_layers == len(cut.layers()) == layers
    assert cut.layer_types == whole.layer_types[-layers:] and cut.layer_types[-1] == FULL
    assert cut.hidden_size == whole.hidden_size and cut.vocab_size == 1000
    assert Gemma4Config.from_dict(cut.to_dict()) == cut
    if layers >= 10:
        assert (cut.num_kv_shared_layers > 0) == (whole.num_kv_shared_layers > 0)


def test_a_slice_runs() -> None:
    for name in ("e2b", "26b-a4b"):
        config = Gemma4Config.preset(name).slice(num_layers=2, vocab_size=64)
        assert config.layer_types == (SLIDING, FULL)
    small = Gemma4Config.preset("e2b").slice(num_layers=10, vocab_size=64)
    model = Gemma4.dummy(small, dtype="bfloat16")
    logits = model(torch.arange(20)[None])
    assert logits.isfinite().all() and logits.float().std() > 0.1


def test_slice_and_preset_refuse_nonsense() -> None:
    config = Gemma4Config.preset("12b")
    counts = (dict(num_layers=0), dict(num_layers=49), dict(vocab_size=0), dict(vocab_size=262145))
    for bad in (*counts, dict(num_layers=2.5), dict(num_layers=True), dict(vocab_size="9")):
        with pytest.raises(ValueError, match="must lie in"):
            config.slice(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="26b-a4b"):
        Gemma4Config.preset("27b")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"attention_sinks": True}, "attention_sinks"),
    "another activation": ({"hidden_activation": "silu"}, "hidden_activation"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "all bidirectional": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    "attention softcap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "rope scaling": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
    "wrong type": ({"model_type": "gemma3_text"}, "gemma3_text"),
    "layer types do not fit": ({"num_hidden_layers": 7}, "layer_types"),
    "unknown layer type": ({"layer_types": ["linear_attention"] * 47 + [FULL]}, "linear_attention"),
    "sliding last": ({"layer_types": [FULL] * 47 + [SLIDING]}, "last layer"),
    "no hidden size": ({"hidden_size": None}, "hidden_size"),
    "text for a number": ({"hidden_size": "3840"}, "hidden_size"),
    "negative window": ({"sliding_window": -1}, "sliding_window"),
    "heads do not divide": ({"num_key_value_heads": 7}, "do not divide"),
    "odd head dim": ({"head_dim": 250}, "head dims"),
    "text for a flag": ({"attention_k_eq_v": "yes"}, "attention_k_eq_v"),
    "more chosen than there are": (
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 8, "moe_intermediate_size": 32},
        "top_k_experts",
    ),
    "too many shared": ({"num_kv_shared_layers": 48}, "num_kv_shared_layers"),
    "shared without donor": ({"num_kv_shared_layers": 47}, "donor"),
    "rope of another kind": (
        {"rope_parameters": {SLIDING: {"rope_type": "yarn"}, FULL: {"rope_type": "proportional"}}},
        "yarn",
    ),
    "rope factor": (
        {"rope_parameters": {SLIDING: {"rope_theta": 1e4}, FULL: {"rope_type": "proportional", "factor": 8.0}}},
        "factor",
    ),
    "rope of one kind only": ({"rope_parameters": {FULL: {"rope_type": "proportional"}}}, "rope_parameters"),
    "eps as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "negative eps": ({"rms_norm_eps": -1}, "rms_norm_eps"),
    "no eps": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "endless eps": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "eps that no float holds": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "softcap as text": ({"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    "softcap of zero": ({"final_logit_softcapping": 0}, "final_logit_softcapping"),
    "negative softcap": ({"final_logit_softcapping": -3}, "final_logit_softcapping"),
    "PLE size as text": ({"hidden_size_per_layer_input": "256"}, "hidden_size_per_layer_input"),
    "PLE size with a fraction": ({"hidden_size_per_layer_input": 1.5}, "hidden_size_per_layer_input"),
    "negative PLE size": ({"hidden_size_per_layer_input": -5}, "hidden_size_per_layer_input"),
    "PLE vocabulary as text": ({"vocab_size_per_layer_input": "x"}, "vocab_size_per_layer_input"),
    "shared layers as text": ({"num_kv_shared_layers": "1"}, "num_kv_shared_layers"),
    "layers in a list": ({"per_layer_config": [1]}, "per_layer_config"),
    "an empty list of layers": ({"per_layer_config": []}, "per_layer_config"),
    "layers that are numbers": ({"per_layer_config": {str(i): 1 for i in range(5, 48, 6)}}, "per_layer_config"),
    "layers by name": ({"per_layer_config": {"last": {}}}, "per_layer_config"),
    "rope as text": ({"rope_parameters": "x"}, "rope_parameters"),
    "rope as number": ({"rope_parameters": 3}, "rope_parameters"),
    "rope of a kind as text": ({"rope_parameters": {SLIDING: "x", FULL: {}}}, "rope_parameters"),
    "rope type in a list": ({"rope_parameters": {SLIDING: {"rope_type": ["default"]}, FULL: {}}}, "rope_type"),
    **{
        f"theta {theta!r} of {kind}": (
            {"rope_parameters": {SLIDING: {}, FULL: {"rope_type": "proportional"}, kind: {**extra, "rope_theta": theta}}},
            "rope_theta",
        )
        for theta in (0, -1e4, "1e4", None)
        for kind, extra in ((SLIDING, {}), (FULL, {"rope_type": "proportional"}))
    },
    "rotated share as text": (
        {"rope_parameters": {SLIDING: {}, FULL: {"rope_type": "proportional", "partial_rotary_factor": "0.25"}}},
        "partial_rotary_factor",
    ),
    "eos as text": ({"eos_token_id": "x"}, "eos_token_id"),
    "eos as object": ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    "eos beyond the vocabulary": ({"eos_token_id": [1, 262144]}, "eos_token_id"),
    "negative eos": ({"eos_token_id": -1}, "eos_token_id"),
    "bos as list": ({"bos_token_id": [2]}, "bos_token_id"),
    "negative pad": ({"pad_token_id": -1}, "pad_token_id"),
    "dtype as number": ({"dtype": 16}, "dtype"),
    "model type in a list": ({"model_type": ["gemma4_text"]}, "model_type"),
    "layer types that are no text": ({"layer_types": [{}] * 48}, "layer_types"),
    "layer types as text": ({"layer_types": "full"}, "layer_types"),
    "no layer types": ({"layer_types": []}, "layer_types"),
    "no global head dim": ({"global_head_dim": 0}, "global_head_dim"),
    "a size beyond all bounds": ({"hidden_size": 10**30}, "hidden_size"),
    "layers that differ": ({"per_layer_config": {"5": {"head_dim": 128}}}, "per_layer_config"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_what_would_change_the_result_is_refused_by_name(name: str, nested: bool, tmp_path: Path) -> None:
    changes, word = REFUSED[name]
    data = published("12b", **changes)
    if nested:
        data = {"model_type": "gemma4", "text_config": data}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=word) as caught:
        Gemma4Config.from_pretrained(tmp_path)
    assert "config.json" in str(caught.value)


def test_unknown_key_beside_the_text_part_is_refused() -> None:
    with pytest.raises(ValueError, match="mystery"):
        Gemma4Config.from_dict({"model_type": "gemma4", "text_config": published("12b"), "mystery": 1})


@pytest.mark.parametrize("outer, inner", [(True, False), (False, True), (True, "yes")])
def test_two_opinions_on_tied_embeddings_are_refused(outer: Any, inner: Any) -> None:
    data = {"model_type": "gemma4", "tie_word_embeddings": outer}
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        Gemma4Config.from_dict({**data, "text_config": published("12b", tie_word_embeddings=inner)})
    for same in (outer, None):
        text = published("12b", tie_word_embeddings=same)
        assert Gemma4Config.from_dict({**data, "text_config": text}).tie_word_embeddings is outer


def test_an_outer_model_type_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="model_type"):
        Gemma4Config.from_dict({"model_type": ["gemma4"], "text_config": published("12b")})


def test_layers_are_made_once() -> None:
    config = Gemma4Config.preset("31b").slice(num_layers=12)
    assert config.layers() is config.layers() and config.layers() == tuple(config.layer(i) for i in range(12))
    other = dataclasses.replace(config, sliding_window=7)
    assert other.layers()[0].window == 7 and other != config
    assert config == Gemma4Config.preset("31b").slice(num_layers=12)


HUGE = '{"vocab_size": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', b"\xff\xfe\x00", "[" * 100_000, HUGE], ids=range(8))
def test_broken_json_is_one_clear_error(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Gemma4Config.from_pretrained(tmp_path)


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Gemma4Config.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a path, got int"):
        Gemma4Config.from_pretrained(3)  # type: ignore[arg-type]
