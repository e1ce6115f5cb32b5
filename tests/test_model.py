"""The model against transformers, and against itself: cached, chunked, ragged, saved."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import FLOOR, assert_right, assert_same_in_fp64, error, largest
from family import (
    MEMBERS,
    assert_model_right,
    exact_logits,
    fast_model,
    load_with_transformers,
    prompt,
    transformers_in,
    transformers_model,
)
from safetensors.torch import load_file, save_file

from gemma4_fast import Gemma4
from gemma4_fast.generate import Generation, Session
from gemma4_fast.reference import model as reference

each_member = pytest.mark.parametrize("member", MEMBERS)
WINDOW = 8  # family.py's; prompts below are longer


@torch.no_grad()
def their_logits(member: str, ids: torch.Tensor, model: Any = None) -> torch.Tensor:
    return (model or transformers_model(member))(ids).logits


@each_member
def test_fp32_logits_are_transformers(member: str) -> None:
    ids = prompt(2, 60)
    assert_right(fast_model(member)(ids), their_logits(member, ids), exact_logits(member, ids))


@each_member
def test_reference_agrees_with_transformers(member: str) -> None:
    model, ids = fast_model(member), prompt(1, 60)
    theirs, truth = their_logits(member, ids)[0], exact_logits(member, ids)[0]
    assert_right(reference.forward(model.state_dict(), model.config, ids[0]), theirs, truth)
    wide = reference.forward(model.state_dict(), model.config, ids[0], dtype=torch.float64)
    # Two truths: they agree up to the RoPE frequencies, which transformers rounds to fp32.
    assert wide.dtype == torch.float64
    assert error(wide, truth) < FLOOR * largest(truth)


@each_member
def test_bf16_error_is_at_most_half_more_than_transformers(member: str) -> None:
    ids = prompt(8, 60)
    exact = exact_logits(member, ids)
    theirs = their_logits(member, ids, transformers_in(member, torch.bfloat16))
    ours = fast_model(member, torch.bfloat16)(ids)

    def rms(x: torch.Tensor) -> float:
        return (x.double() - exact).square().mean().sqrt().item()

    assert ours.dtype == torch.bfloat16
    print(f"{member}: ours {rms(ours):.4f}, transformers {rms(theirs):.4f}")
    assert rms(ours) <= 1.5 * rms(theirs)


@each_member
def test_greedy_tokens_are_transformers_past_the_window_and_round_the_ring(member: str) -> None:
    theirs, ids = transformers_model(member), prompt(1, 20)  # 84 tokens in all; the ring has 64 slots
    theirs.generation_config.eos_token_id = None
    want = theirs.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    model = fast_model(member)
    got = model.generate(ids[0], max_new_tokens=64, temperature=0, stop_token_ids=())
    assert not isinstance(got, list)
    assert got.token_ids == want
    assert len(set(want)) > 8  # a model that repeats one token would prove little


@each_member
def test_cached_decoding_is_the_full_forward(member: str) -> None:
    model, ids = fast_model(member), prompt(2, 90)
    cache = model.new_cache(2, 90)
    cuts = [1, 1, 15, 40, 9, *[1] * 24]  # one-token pieces first, last, and past the ring's 64 slots
    pieces = [model(piece, cache) for piece in ids.split(cuts, dim=1)]
    assert_right(torch.cat(pieces, 1), their_logits(member, ids), exact_logits(member, ids))
    assert cache.host_lens == cache.lens.tolist() == [90, 90]


RAGGED = [prompt(1, tokens, seed=tokens) for tokens in (70, 3, 101)]


@functools.cache
def ragged_last_logits(member: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last token of each prompt in RAGGED, alone: transformers' logits in fp32 and in fp64."""
    plain = torch.stack([their_logits(member, ids)[0, -1] for ids in RAGGED])
    truth = torch.stack([exact_logits(member, ids)[0, -1] for ids in RAGGED])
    return plain, truth


@each_member
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_prefill_is_one_shot(member: str, chunk: int) -> None:
    model = fast_model(member)
    prompts = [ids[0].tolist() for ids in RAGGED]

    session = Session(model, prompts, max_new_tokens=1, prefill_chunk=chunk)
    with torch.inference_mode():
        last = model.logits(session._prefill(None)[1])
    assert_model_right(member, last, *ragged_last_logits(member))


@torch.no_grad()
def assert_scores_right(member: str, generation: Generation) -> None:
    """The log-probabilities of the tokens that were generated obey the rule of bounds.py."""
    ids = torch.tensor([generation.prompt_ids + generation.token_ids])
    chosen = torch.tensor(generation.token_ids)[:, None]
    plain, truth = (
        logits[0, len(generation.prompt_ids) - 1 : -1].log_softmax(-1).gather(-1, chosen)[:, 0]
        for logits in (their_logits(member, ids), exact_logits(member, ids))
    )
    assert generation.logprobs is not None
    assert_model_right(member, torch.tensor(generation.logprobs), plain, truth)


@each_member
def test_a_ragged_batch_is_each_alone(member: str) -> None:
    model = fast_model(member)
    prompts = [prompt(1, n, seed=n)[0].tolist() for n in (5, 66, 1, 30)]
    options: dict[str, Any] = dict(max_new_tokens=20, stop_token_ids=(), logprobs=2)
    for sampling in (dict(temperature=0.0), dict(temperature=0.9, top_k=30, top_p=0.9)):
        together = model.generate(prompts, seed=7, **sampling, **options)
        assert isinstance(together, list)
        for b, p in enumerate(prompts):
            alone = model.generate(p, seed=7 + b, **sampling, **options)
            assert not isinstance(alone, list)
            assert alone.token_ids == together[b].token_ids
            assert_scores_right(member, alone)
            assert_scores_right(member, together[b])


@each_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_loads_in_transformers_with_the_same_logits(member: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = fast_model(member, dtype), prompt(1, 30)
    model.save_pretrained(tmp_path / "saved")
    theirs = load_with_transformers(tmp_path / "saved", dtype)
    again = Gemma4.from_pretrained(tmp_path / "saved", check=False)
    assert again.dtype == dtype and again.config == model.config
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(their_logits(member, ids, theirs), their_logits(member, ids, transformers_in(member, dtype)))


@each_member
def test_fp64_and_fp16_run(member: str) -> None:
    model, ids = fast_model(member, torch.float64), prompt(1, 20)
    truth = reference.forward(model.state_dict(), model.config, ids[0])
    assert_same_in_fp64(model(ids)[0], truth)
    half = fast_model(member, torch.float16)(ids)
    assert half.dtype == torch.float16 and half.isfinite().all()


def test_state_dict_views_share_the_parameters() -> None:
    model = fast_model("e2b")
    before = model(prompt(1, 5))
    model.state_dict()["model.layers.0.mlp.up_proj.weight"][0] *= -3.0
    assert error(model(prompt(1, 5)), before) > 1e-3
    packed = model.model.layer(0).self_attn.qkv_proj.weight
    view = model.state_dict()["model.layers.0.self_attn.v_proj.weight"]
    assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_v_only_cache_is_half_of_k_and_v() -> None:
    model = fast_model("31b")
    cache = model.new_cache(1, 512)
    full = [cache.layer(c.index) for c in model.config.layers() if not c.is_sliding]
    sliding = [cache.layer(c.index) for c in model.config.layers() if c.is_sliding]
    assert full and all(kv.k is None and kv.slots == 512 for kv in full)
    assert sliding and all(kv.k is not None and kv.slots == 64 for kv in sliding)
    shared = fast_model("e2b")
    assert shared.new_cache(1, 64).layer(9) is not None
    cache = shared.new_cache(1, 64)
    assert cache.layer(9) is cache.layer(4) and cache.layer(8) is cache.layer(5)


def test_a_checkpoint_with_towers_loads_its_text_part_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = fast_model("e2b"), prompt(1, 12)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in load_file(file).items()}
    tensors["model.vision_tower.patch_embedder.input_proj.weight"] = torch.zeros(4, 4)
    tensors["model.layers.9.self_attn.k_proj.weight".replace("model.", "model.language_model.", 1)] = torch.zeros(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    nested = {"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 4}, "audio_config": None}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with caplog.at_level(logging.WARNING, "gemma4_fast"):
        again = Gemma4.from_pretrained(tmp_path)
    assert ["vision towers; only its text model" in r.message for r in caplog.records] == [True]
    assert torch.equal(again(ids), model(ids))


def test_a_cache_made_in_inference_mode_can_be_used_outside() -> None:
    model = fast_model("e2b")
    with torch.inference_mode():
        cache = model.new_cache(1, 16)
        model(prompt(1, 4), cache)
    cache.reset()
    assert torch.equal(model(prompt(1, 4), cache), model(prompt(1, 4), model.new_cache(1, 16)))
    with pytest.raises(ValueError, match="max_len"):
        model.new_cache(1, 0)
