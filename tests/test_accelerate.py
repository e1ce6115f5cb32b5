"""accelerate(model): transformers' Gemma 4 gives the same answers on this package's kernels, in all that `generate` and
`forward` offer; what is not served runs transformers' own code, and says so once."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from family import assert_near_eager
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicCache
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

import gemma4_fast
from gemma4_fast import Gemma4, UnsupportedError, accelerate, restore
from gemma4_fast.graph import recordable
from gemma4_fast.integrations.engine import Engine
from gemma4_fast.integrations.kv_cache import CACHE, Gemma4Cache
from gemma4_fast.integrations.transformers import text_of
from gemma4_fast.weights import resolve

PAD, EOS, IMAGE = 0, 210, 200
GREEDY: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=list(family.MEMBERS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of transformers, and an accelerated copy."""
    return accelerated(request.param)


@pytest.fixture(scope="module")
def moe() -> tuple[Any, Any]:
    return accelerated("26b-a4b")


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any]:
    """Layers that share keys and values, and per-layer embeddings."""
    return accelerated("e2b")


def accelerated(member: str) -> tuple[Any, Any]:
    theirs = family.transformers_model(member)
    return theirs, accelerate(copy.deepcopy(theirs), check=False)


def engine(model: Any) -> Engine:
    found = vars(text_of(model))["_gemma4_fast"]
    assert isinstance(found, Engine)
    return found


def both(pair: tuple[Any, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The outputs of the two models; the accelerated one served the call itself."""
    before = set(engine(pair[1]).said)
    out = pair[0](*copy.deepcopy(args), **copy.deepcopy(kwargs)), pair[1](*args, **kwargs)
    assert engine(pair[1]).said == before, "left to transformers' code"
    return out


def cache_of(out: Any) -> Any:
    return out[CACHE]


def left_padded() -> tuple[Tensor, Tensor]:
    """ids [3, 30], and a mask of which two rows begin with padding."""
    ids, mask = family.prompt(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, :1] = 0
    return ids, mask


# ---------------------------------------------------------------- forward
def test_logits_are_the_same(pair: tuple[Any, Any]) -> None:
    theirs, ours = both(pair, family.prompt(3, 30))
    assert_near_eager(ours.logits, theirs.logits)
    assert isinstance(cache_of(ours), Gemma4Cache) and cache_of(ours).get_seq_length() == 30


def test_padding_left_and_right(pair: tuple[Any, Any]) -> None:
    ids, mask = left_padded()
    for padded in (mask, mask.flip(1)):
        theirs, ours = both(pair, ids, attention_mask=padded)
        assert_near_eager(ours.logits[padded.bool()], theirs.logits[padded.bool()])
    row = pair[1](ids[:1, 7:]).logits
    assert_near_eager(pair[1](ids, attention_mask=mask).logits[:1, 7:].detach(), row.detach())


def test_hidden_states_and_tuples(pair: tuple[Any, Any]) -> None:
    theirs, ours = both(pair, family.prompt(2, 20), output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for got, wanted in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_near_eager(got, wanted)
    theirs, ours = both(pair, family.prompt(2, 20), use_cache=False, return_dict=False)
    assert len(ours) == len(theirs) == 1
    assert_near_eager(ours[0], theirs[0])


def test_loss_and_logits_to_keep(moe: tuple[Any, Any], shared: tuple[Any, Any]) -> None:
    ids = family.prompt(2, 20)
    for models in (moe, shared):
        theirs, ours = both(models, ids, labels=ids)
        assert_near_eager(ours.loss, theirs.loss)
        for keep in (1, 3, torch.tensor([2, 5])):
            theirs, ours = both(models, ids, logits_to_keep=keep)
            assert_near_eager(ours.logits, theirs.logits)


def test_arguments_by_position(moe: tuple[Any, Any]) -> None:
    ids, mask = left_padded()
    theirs, ours = both(moe, ids, mask)
    assert_near_eager(ours.logits[mask.bool()], theirs.logits[mask.bool()])


def test_embeddings_in_place_of_ids(pair: tuple[Any, Any]) -> None:
    ids = family.prompt(2, 20)
    embeds = pair[0].get_input_embeddings()(ids).detach()
    theirs, ours = both(pair, inputs_embeds=embeds)
    assert_near_eager(ours.logits, theirs.logits)


def test_a_prompt_in_pieces(pair: tuple[Any, Any]) -> None:
    """Chunk after chunk, then token by token, beyond the window of 8: by the caller's own loop, with padding."""
    ids, mask = left_padded()
    whole = pair[0](ids, attention_mask=mask).logits
    cache, got = None, []
    for lo, hi in ((0, 11), (11, 12), (12, 25), (25, 26), (26, 27), (27, 28), (28, 29), (29, 30)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, lo:hi]
        more = {CACHE: cache, "position_ids": positions}
        out = pair[1](ids[:, lo:hi], attention_mask=mask[:, :hi], use_cache=True, **more)
        cache = cache_of(out)
        got.append(out.logits)
    assert not engine(pair[1]).said
    assert_near_eager(torch.cat(got, 1)[mask.bool()], whole[mask.bool()])


def test_long_prompts_run_in_chunks(moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma4_fast.integrations.engine.CHUNK", 24)
    ids, mask = left_padded()
    theirs, ours = both(moe, ids, attention_mask=mask)
    assert_near_eager(ours.logits[mask.bool()], theirs.logits[mask.bool()])


def test_what_a_caller_gets_can_be_used_with_gradients(moe: tuple[Any, Any]) -> None:
    h = moe[1](family.prompt(1, 9), output_hidden_states=True).hidden_states[-1]
    with torch.enable_grad():
        probe = nn.Linear(h.shape[-1], 1)
        probe(h).sum().backward()
    assert probe.weight.grad is not None


def test_bare_text_models(moe: tuple[Any, Any]) -> None:
    theirs = moe[0].model
    ours = accelerate(copy.deepcopy(theirs), check=False)
    a, b = both((theirs, ours), family.prompt(2, 20))
    assert_near_eager(b.last_hidden_state, a.last_hidden_state)
    step = ours(family.prompt(2, 1), **{CACHE: cache_of(b)}).last_hidden_state
    assert_near_eager(step, theirs(family.prompt(2, 1), **{CACHE: cache_of(a)}).last_hidden_state)
    kept = step.clone()
    ours(family.prompt(2, 1, seed=5), **{CACHE: cache_of(b)})
    assert torch.equal(kept, step), "the next step wrote into what the last one gave"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """No farther from the truth than twice what transformers loses. A dense model: experts would be a matter of luck."""
    theirs = family.transformers_in("12b", dtype)
    ours = accelerate(copy.deepcopy(theirs))
    a, b = both((theirs, ours), family.prompt(2, 40))
    truth = family.transformers_model("12b").double()(family.prompt(2, 40)).logits.detach()
    family.transformers_model("12b").float()
    error, allowed = ((x.logits.double() - truth).norm() for x in (b, a))
    assert b.logits.dtype == dtype and error <= 2 * allowed


# ---------------------------------------------------------------- generate
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=5, temperature=0.7),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "beam_sampling": dict(num_beams=2, do_sample=True),
    "several": dict(do_sample=True, num_return_sequences=3),
    "processors": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=9, bad_words_ids=[[5], [17]]),
    "chunked_prefill": dict(prefill_chunk_size=7),
    "no_cache": dict(use_cache=False),
    "guidance": dict(guidance_scale=1.5),
}


def generated(pair: tuple[Any, Any], ids: Tensor, **kwargs: Any) -> tuple[Any, Any]:
    before, out = set(engine(pair[1]).said), []
    for model in pair:
        torch.manual_seed(0)
        out.append(model.generate(ids, **{**GREEDY, **copy.deepcopy(kwargs)}))
    assert engine(pair[1]).said == before, "left to transformers' code"
    return out[0], out[1]


@pytest.mark.parametrize("mode", MODES)
def test_generates_the_same_tokens(mode: str, pair: tuple[Any, Any]) -> None:
    theirs, ours = generated(pair, family.prompt(2, 13), **MODES[mode])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_generates_the_same_tokens_with_padding(mode: str, pair: tuple[Any, Any]) -> None:
    ids, mask = left_padded()
    theirs, ours = generated(pair, ids, attention_mask=mask, **MODES[mode])
    assert torch.equal(ours, theirs)
    alone = pair[1].generate(ids[:1, 7:], **{**GREEDY, **MODES[mode]})
    assert torch.equal(ours[0, 30:], alone[0, 23:])


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant", "itself"])
def test_drafted_tokens_are_taken_back(how: str, pair: tuple[Any, Any]) -> None:
    """Beyond the window: rings have to remember what rejected drafts took the place of."""
    assistant = family.transformers_model("12b" if how == "assistant" else "e2b")
    if how == "itself":
        assistant = pair[1]  # two caches of one model at a time
    options = dict(prompt_lookup_num_tokens=3) if how == "prompt_lookup" else dict(assistant_model=assistant)
    ids = family.prompt(1, 5).repeat(1, 6)
    plain, _ = generated(pair, ids)
    assert torch.equal(pair[1].generate(ids, **GREEDY, **options), plain)
    assert not engine(pair[1]).said


def test_outputs_of_generate(pair: tuple[Any, Any]) -> None:
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)
    theirs, ours = generated(pair, family.prompt(2, 13), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for got, wanted in zip(ours.scores + ours.logits, theirs.scores + theirs.logits, strict=True):
        assert_near_eager(got, wanted)
    for got, wanted in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert_near_eager(a, b)


def test_what_people_pass_to_generate(moe: tuple[Any, Any]) -> None:
    seen: list[int] = []

    class Watch:
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    def shift(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(1, -1)

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

    extras = dict(logits_processor=LogitsProcessorList([shift]), stopping_criteria=StoppingCriteriaList([stop]))
    theirs, ours = generated(moe, family.prompt(1, 13), **extras)
    assert torch.equal(ours, theirs) and ours.shape[1] == 20
    out = moe[1].generate(family.prompt(1, 13), streamer=Watch(), **GREEDY)
    assert seen == [*out[0].tolist(), -1]
    with torch.inference_mode():
        assert torch.equal(moe[1].generate(family.prompt(1, 13), **GREEDY), out)


@pytest.mark.parametrize("ready", [False, True])
def test_goes_on_from_a_cache(ready: bool, pair: tuple[Any, Any]) -> None:
    """A conversation: the second call gives the whole text, and the cache that the first one filled."""
    outs = []
    for model in pair:
        cache = {CACHE: DynamicCache(config=model.config)} if ready else {}
        first = model.generate(family.prompt(2, 13), return_dict_in_generate=True, **GREEDY, **cache)
        kept = cache.get(CACHE, first[CACHE])
        longer = torch.cat([first.sequences, family.prompt(2, 9, seed=3)], 1)
        outs.append(model.generate(longer, return_dict_in_generate=True, **GREEDY, **{CACHE: kept}))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert isinstance(outs[1][CACHE], Gemma4Cache) and outs[1][CACHE].get_seq_length() == outs[0][CACHE].get_seq_length()
    assert not engine(pair[1]).said


def test_embeddings_begin_a_generation(pair: tuple[Any, Any]) -> None:
    ids = family.prompt(2, 13)
    embeds = pair[0].get_input_embeddings()(ids).detach()
    a, b = (m.generate(inputs_embeds=embeds, **GREEDY) for m in pair)
    assert torch.equal(a, b) and not engine(pair[1]).said


def test_decode_steps_are_recorded_once(moe: tuple[Any, Any]) -> None:
    model = moe[1]
    native = engine(model).native
    assert native is not None
    if not recordable(native):
        pytest.skip("no kernels that can be recorded here")
    native.spares.clear()
    native.spares.SHARE = 1e-6  # type: ignore[misc]
    try:
        out = model.generate(family.prompt(1, 13), return_dict_in_generate=True, **GREEDY)
        graph = out[CACHE].graph
        assert graph.recorded
        del out
        assert len(native.spares) == 1
        out = model.generate(family.prompt(1, 13, seed=2), return_dict_in_generate=True, **GREEDY)
        assert out[CACHE].graph is graph and len(native.spares) == 0
        plain, again = generated(moe, family.prompt(1, 13, seed=2))
        assert torch.equal(plain, again) and torch.equal(again, out.sequences)
    finally:
        del native.spares.SHARE
        native.spares.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("member", ["e2b", "26b-a4b"])
def test_on_a_gpu(member: str) -> None:
    theirs = copy.deepcopy(family.transformers_model(member)).cuda()
    pair = theirs, accelerate(copy.deepcopy(theirs))
    ids, mask = (x.cuda() for x in left_padded())
    for mode in ("greedy", "beams"):
        a, b = (m.generate(ids, attention_mask=mask, **GREEDY, **MODES[mode]) for m in pair)
        assert torch.equal(a, b)
    out = pair[1].generate(ids[1:], return_dict_in_generate=True, **GREEDY)
    assert out[CACHE].graph.recorded, "a decode step in generate replays a CUDA graph"
    half = family.transformers_in(member, torch.bfloat16).cuda()
    fast = accelerate(copy.deepcopy(half))
    truth = theirs(ids).logits  # in fp32
    a, b = both((half, fast), ids)
    error, allowed = ((x.logits.float() - truth).norm(dim=-1).median() for x in (b, a))
    assert error <= 2 * allowed
    assert not engine(pair[1]).said and gemma4_fast.verify(fast).ok


# ---------------------------------------------------------------- the cache
def filled(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """By columns, as transformers counts them if it is not told: padding shifts a sequence's positions."""
    ids, mask = left_padded()
    a, b = both(pair, ids, attention_mask=mask)
    return cache_of(a), cache_of(b)


def assert_same_keys(theirs: Any, ours: Any, mask: Tensor | None = None) -> None:
    assert len(ours) == len(theirs) and ours.is_sliding == theirs.is_sliding
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        for wanted, got in zip(a[:2], b[:2], strict=True):
            assert (wanted is None) == (got is None), index
            if wanted is None or not wanted.numel():
                continue
            assert got.shape == wanted.shape, index
            if mask is not None:
                shown = mask[:, -wanted.shape[2] :].bool()[:, None, :, None]
                got, wanted = got * shown, wanted * shown
            assert_near_eager(got, wanted)


def test_the_cache_shows_transformers_keys_and_values(pair: tuple[Any, Any]) -> None:
    _, mask = left_padded()
    theirs, ours = filled(pair)
    assert ours.get_seq_length() == 30 and ours.batch_size == 3
    assert_same_keys(theirs, ours, mask)
    plain = pickle.loads(pickle.dumps(ours))
    assert type(plain) is DynamicCache and plain.get_seq_length() == 30
    assert_same_keys(theirs, plain, mask)
    assert_same_keys(theirs, ours, mask)  # and it is as it was


@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "copy"])
def test_the_cache_changes_its_batch(change: str, pair: tuple[Any, Any]) -> None:
    _, mask = left_padded()
    token, index = family.prompt(4, 1, seed=9), torch.tensor([2, 0, 0])
    logits = []
    for model, cache in zip(pair, filled(pair), strict=True):
        rows = torch.arange(3)
        if change == "reorder":
            cache.reorder_cache(index)
            rows = index
        elif change == "select":
            cache.batch_select_indices(index[:2])
            rows = index[:2]
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2)
        else:
            more = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            twin = copy.deepcopy(cache)
            model(family.prompt(3, 1, seed=4), attention_mask=more, **{CACHE: twin})
        wide = torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=torch.long)], 1)
        ids = token[torch.arange(len(rows)) % 4]
        out = model(ids, attention_mask=wide, **{CACHE: cache})
        logits.append(out.logits)
    assert_near_eager(logits[1], logits[0])
    assert not engine(pair[1]).said


def test_the_cache_forgets_its_newest_tokens(pair: tuple[Any, Any]) -> None:
    _, mask = left_padded()
    token = family.prompt(3, 1, seed=9)
    for model, cache in zip(pair, filled(pair), strict=True):
        cache.activate_past_recording()
        steps = []
        for seed in (11, 12):  # what is forgotten, and what comes in its place
            drafts = family.prompt(3, 5, seed=seed)
            wide = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
            model(drafts, attention_mask=wide, **{CACHE: cache})
            cache.crop(-5)
            assert cache.get_seq_length() == 30
        wide = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        steps.append(model(token, attention_mask=wide, **{CACHE: cache}).logits)
        if model is pair[0]:
            wanted = steps
    assert_near_eager(steps[0], wanted[0])
    assert not engine(pair[1]).said


def test_a_window_that_moved_on_cannot_be_cropped(moe: tuple[Any, Any]) -> None:
    ids = family.prompt(1, 100)  # the ring has 64 slots
    cache = cache_of(moe[1](ids))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-60)
    assert cache.get_seq_length() == 100
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    cache.reset()
    assert_near_eager(moe[1](ids, **{CACHE: cache}).logits, moe[0](ids).logits)


def test_a_pass_that_was_interrupted(moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = family.prompt(1, 30)
    cache = cache_of(moe[1](ids))
    with monkeypatch.context() as patch:
        patch.setattr(type(engine(moe[1]).native.model), "write_donors", lambda *_: 1 / 0)  # type: ignore[union-attr]
        with pytest.raises(ZeroDivisionError):
            moe[1](ids, **{CACHE: cache})
    for options in ({}, {"output_attentions": True}):
        with pytest.raises(RuntimeError, match="interrupted"):
            moe[1](ids[:, :1], **{CACHE: cache}, **options)
    cache.reset()
    assert_near_eager(moe[1](ids, **{CACHE: cache}).logits, moe[0](ids).logits)


def test_a_mask_that_the_caller_writes_into(moe: tuple[Any, Any]) -> None:
    ids, mask = family.prompt(2, 24), torch.ones(2, 24, dtype=torch.bool)
    mask[0, :3] = False
    theirs, ours = both(moe, ids[:, :20], attention_mask=mask[:, :20])
    mask[0, :6] = False  # hides three more
    step = dict(attention_mask=mask[:, :21])
    assert_near_eager(
        moe[1](ids[:, 20:21], **step, **{CACHE: cache_of(ours)}).logits,
        moe[0](ids[:, 20:21], **step, **{CACHE: cache_of(theirs)}).logits,
    )


def test_the_cache_grows(moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma4_fast.integrations.kv_cache.ROOM", 32)
    ids = family.prompt(1, 400)
    out = moe[1](ids[:, :10])
    room = cache_of(out).kv.max_len
    for lo in range(10, 400, 65):
        out = moe[1](ids[:, lo : lo + 65], **{CACHE: cache_of(out)})
    assert room <= 64 and cache_of(out).kv.max_len >= 400
    assert_near_eager(out.logits[:, -1], moe[0](ids).logits[:, -1])


def test_the_cache_is_smaller(moe: tuple[Any, Any]) -> None:
    """V alone where K and V are one projection's, and nothing for padding."""
    cache = cache_of(moe[1](family.prompt(1, 60)))
    assert [cache.kv.layer(i).k is None for i in range(6)] == [False] * 5 + [True]


# ---------------------------------------------------------------- what is left to transformers' code
@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="gemma4_fast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "gemma4_fast"]


def fresh(member: str = "26b-a4b") -> tuple[Any, Any]:
    theirs = copy.deepcopy(family.transformers_model(member))
    return theirs, accelerate(copy.deepcopy(theirs), check=False)


def causal(tokens: int, window: int | None = None) -> Tensor:
    q, k = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = (k <= q) & (k > q - window if window else torch.ones_like(k <= q))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def pruned_mask() -> dict[str, Tensor]:
    """Masks of one's own: every token sees itself and the first."""
    mask = causal(20)
    mask[..., 5:, 1:5] = torch.finfo(torch.float32).min
    return {"full_attention": mask, "sliding_attention": mask}


LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "output_attentions": ("output_attentions", dict(output_attentions=True)),
    "masks_of_ones_own": ("attention mask is not a padding mask", dict(attention_mask=pruned_mask())),
    "positions_that_skip": ("do not follow", dict(position_ids=torch.arange(0, 40, 2)[None])),
    "packed_sequences": ("do not follow", dict(position_ids=torch.tensor([[*range(12), *range(8)]]), use_cache=False)),
    "holes_in_a_window": (
        "padding between",
        dict(
            attention_mask=torch.tensor([[1] * 4 + [0] * 9 + [1] * 7]),
            position_ids=torch.tensor([[*range(4), *[1] * 9, *range(4, 11)]]),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_transformers_code(name: str, warned: Callable[[], list[str]]) -> None:
    word, options = LEFT[name]
    theirs, ours = fresh()
    ids = family.prompt(1, 20)
    a, b = theirs(ids, **copy.deepcopy(options)), ours(ids, **copy.deepcopy(options))
    ours(ids, **copy.deepcopy(options))
    real = options.get("attention_mask")
    real = real.bool() if isinstance(real, Tensor) else torch.ones(1, 20, dtype=torch.bool)
    assert_near_eager(b.logits[real], a.logits[real])
    assert len(warned()) == 1 and word in warned()[0]
    if a.attentions is not None:
        assert all(torch.equal(x, y) for x, y in zip(b.attentions, a.attentions, strict=True))


def test_in_the_midst_of_a_text(warned: Callable[[], list[str]]) -> None:
    """A cache that was filled here goes on in transformers' code, and stays there."""
    ids, mask = left_padded()
    positions = [(mask.cumsum(1) - 1).clamp(min=0), None]  # None: by columns, so that padding shifts them
    for given in positions:
        models, logits = fresh(), []
        for model in models:
            cache, out = None, []
            for lo, hi, more in ((0, 20, {}), (20, 21, {"output_attentions": True}), (21, 22, {}), (22, 30, {})):
                place = {} if given is None else {"position_ids": given[:, lo:hi]}
                o = model(ids[:, lo:hi], attention_mask=mask[:, :hi], use_cache=True, **{CACHE: cache}, **place, **more)
                cache = cache_of(o)
                out.append(o.logits)
            logits.append(torch.cat(out, 1))
        assert_near_eager(logits[1][mask.bool()], logits[0][mask.bool()])
        assert cache.plain and cache.get_seq_length() == 30
    assert any("output_attentions" in w for w in warned())


def test_other_caches_are_transformers_own(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh()
    ids = family.prompt(1, 12)
    for model in (theirs, ours):
        out = model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
        if model is theirs:
            wanted = out
    assert torch.equal(out, wanted) and any("StaticCache" in w for w in warned())
    filled = DynamicCache(config=theirs.config)
    theirs(ids, **{CACHE: filled})
    assert_near_eager(ours(ids[:, :1], **{CACHE: copy.deepcopy(filled)}).logits, theirs(ids[:, :1], **{CACHE: filled}).logits)
    static = {CACHE: StaticCache(config=theirs.config, max_cache_len=40)}
    assert_near_eager(ours(ids, **static).logits, theirs(ids).logits)


def test_training(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh()
    ids = family.prompt(2, 12)
    for model in (theirs, ours):
        model.train()
        with torch.enable_grad():
            model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        assert_near_eager(b.grad, a.grad)
    assert any("training mode" in w for w in warned())
    # And a step of the optimizer is seen at once: the weights are the same memory.
    for model in (theirs, ours):
        for p in model.parameters():
            p -= 0.01 * p.grad
        model.eval()
    assert_near_eager(ours(ids).logits, theirs(ids).logits)


def test_gradients_in_evaluation_mode(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh()
    ids = family.prompt(1, 12)
    with torch.enable_grad():
        ours(ids).logits.sum().backward()
    assert ours.lm_head.weight.grad is not None and any("no_grad" in w for w in warned())
    embeds = theirs.get_input_embeddings()(ids).detach()
    ours.requires_grad_(False)
    given = embeds.clone().requires_grad_()
    with torch.enable_grad():
        ours(inputs_embeds=given).logits.sum().backward()
        assert given.grad is not None
        logits = ours(ids).logits  # nothing wants any now
    assert_near_eager(logits, theirs(ids).logits)
    assert not logits.requires_grad


def test_compiling(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh("12b")
    ids = family.prompt(1, 12)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_near_eager(compiled(ids, use_cache=False).logits, theirs(ids).logits)
    assert not warned()


def test_autocast(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(family.prompt(1, 12)).logits, theirs(family.prompt(1, 12)).logits)
    assert any("autocast" in w for w in warned())


def test_hooks_are_called(warned: Callable[[], list[str]]) -> None:
    """Also one that is made in the midst of a text; and without it the kernels are back."""
    theirs, ours = fresh()
    ids, seen = family.prompt(1, 12), []
    cache = cache_of(ours(ids))
    hook = ours.model.layers[2].mlp.register_forward_hook(lambda module, args, out: seen.append(out) or out * 0)
    other = theirs.model.layers[2].mlp.register_forward_hook(lambda module, args, out: out * 0)
    ours(ids[:, :1], **{CACHE: cache})
    assert len(seen) == 1
    assert_near_eager(ours(ids).logits, theirs(ids).logits)
    hook.remove()
    other.remove()
    assert isinstance(cache_of(ours(ids)), Gemma4Cache) and not cache_of(ours(ids)).plain
    assert_near_eager(ours(ids).logits, theirs(ids).logits)
    assert len(seen) == 2 and any("layers.2.mlp has a hook" in w for w in warned())


class Adapted(nn.Module):
    """As an adapter's library wraps a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.mean()


def test_other_libraries_layers(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh()
    for model in (theirs, ours):
        model.model.layers[3].self_attn.q_proj = Adapted(model.model.layers[3].self_attn.q_proj)
    assert_near_eager(ours(family.prompt(1, 12)).logits, theirs(family.prompt(1, 12)).logits)
    assert any("layers.3.self_attn.q_proj is a" in w for w in warned())
    late = accelerate(copy.deepcopy(theirs))  # accelerated with it: said then
    assert len(warned()) == 2 and "layers.3.self_attn.q_proj is a" in warned()[1]
    late.model.layers[3].self_attn.q_proj = late.model.layers[3].self_attn.q_proj.base
    assert isinstance(cache_of(late(family.prompt(1, 12))), Gemma4Cache)


def other(weight: Tensor) -> Tensor:
    """Not a multiple, which the norm behind a projection would cancel."""
    return weight.roll(3, 0) * 0.9


def replaced(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(other(model.model.layers[1].mlp.up_proj.weight))


def pointed_elsewhere(model: Any) -> None:
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight.data = other(weight.data)


def assigned(model: Any) -> None:
    model.load_state_dict({k: other(v) if "o_proj" in k else v for k, v in model.state_dict().items()}, assign=True)


def biased(model: Any) -> None:
    model.model.layers[2].self_attn.o_proj.bias = nn.Parameter(torch.linspace(-1, 1, 64))


def swapped(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()


def patched(model: Any) -> None:
    layer = model.model.layers[2].mlp
    layer.forward = lambda x: x.flip(-1)


CHANGES = {f.__name__: f for f in (replaced, pointed_elsewhere, assigned, biased, swapped, patched)}


@pytest.mark.parametrize("how", ["one token", "one token, seen late", "three tokens"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_in_the_midst_of_a_text(change: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen late: as on a GPU, after the step has been launched, which is then undone."""
    if "late" in how:
        monkeypatch.setattr(Engine, "looks_late", True)
    theirs, ours = fresh()
    ids, first, rest = family.prompt(1, 80), family.prompt(1, 1, seed=7), family.prompt(1, 3, seed=2)
    rest = rest if how == "three tokens" else rest[:, :1]
    caches = [cache_of(model(ids)) for model in (theirs, ours)]
    for model, cache in zip((theirs, ours), caches, strict=True):
        model(first, **{CACHE: cache})
        CHANGES[change](model)
    unchanged = family.transformers_model("26b-a4b")(torch.cat([ids, first, rest], 1)).logits[:, -rest.shape[1] :]
    for _ in range(2):
        wanted, got = (model(rest, **{CACHE: cache}).logits for model, cache in zip((theirs, ours), caches, strict=True))
        assert_near_eager(got, wanted)
        assert (wanted - unchanged).abs().max() > 0.1


def test_a_text_model_within_another_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "looks_late", True)
    theirs = multimodal("26b-a4b")
    ours = accelerate(copy.deepcopy(theirs), check=False)
    ids, logits = family.prompt(1, 20, 199), []
    for model in (theirs, ours):
        cache = cache_of(model(ids, use_cache=True))
        model(ids[:, :1], **{CACHE: cache})
        weight = model.model.language_model.layers[1].mlp.up_proj.weight
        model.model.language_model.layers[1].mlp.up_proj.weight = nn.Parameter(other(weight))
        logits.append(model(ids[:, 1:2], **{CACHE: cache}).logits)
    assert_near_eager(logits[1], logits[0])


def test_weights_that_become_other_tensors(moe: tuple[Any, Any]) -> None:
    theirs, ours = fresh()
    ids = family.prompt(1, 12)
    doubled = {k: v * 1.1 for k, v in theirs.state_dict().items()}
    for model in (theirs, ours):
        model.load_state_dict(doubled, assign=True)
    assert_near_eager(ours(ids).logits, theirs(ids).logits)
    for change in CHANGES.values():
        for model in (theirs, ours):
            change(model)
        assert_near_eager(ours(ids).logits, theirs(ids).logits)
    theirs, ours = fresh()
    for model in (theirs, ours):
        model.set_experts_implementation("eager")  # the default has no fp64
        model.double()
    assert_near_eager(ours(ids).logits, theirs(ids).logits)  # transformers' norms stay in fp32
    assert ours(ids).logits.dtype == torch.float64


def test_moving_to_where_it_is_changes_nothing(moe: tuple[Any, Any]) -> None:
    """Pipelines do it before each call."""
    ids = family.prompt(1, 12)
    cache = cache_of(moe[1](ids))
    moe[1].to("cpu").float()
    assert not cache_of(moe[1](ids[:, :1], **{CACHE: cache})).plain
    quantized = accelerate(copy.deepcopy(moe[0]), quantize="int8", check=False)
    cache = cache_of(quantized(ids))
    quantized.to("cpu")
    quantized(ids[:, :1], **{CACHE: cache})


def test_what_else_is_not_ignored(warned: Callable[[], list[str]]) -> None:
    """Other implementations of attention and experts, other frequencies, a bias of the head, a class that was patched."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.gemma4 import modeling_gemma4

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value.flip(2), *args, **kwargs)

    AttentionInterface.register("of_ones_own", attend)
    ALL_EXPERTS_FUNCTIONS.register("of_ones_own", lambda self, x, ids, weights: x.flip(-1))
    ids, (plain, _) = family.prompt(1, 12), fresh()
    usual = plain(ids).logits

    def check(word: str, change: Callable[[Any], Any]) -> None:
        theirs, ours = fresh()
        for model in (theirs, ours):
            change(model)
        assert (theirs(ids).logits - usual).abs().max() > 0.1
        assert_near_eager(ours(ids).logits, theirs(ids).logits)
        assert word in warned()[-1]

    check("attn_implementation", lambda m: m.set_attn_implementation("of_ones_own"))
    check("experts_implementation", lambda m: m.set_experts_implementation("of_ones_own"))
    check("RoPE", lambda m: m.model.rotary_emb.sliding_attention_inv_freq.mul_(0.5))
    right = modeling_gemma4.Gemma4TextMLP.forward
    try:
        modeling_gemma4.Gemma4TextMLP.forward = lambda self, x: right(self, x.flip(-1))
        theirs, ours = fresh()
        assert_near_eager(ours(ids).logits, theirs(ids).logits)
        assert (theirs(ids).logits - usual).abs().max() > 0.1
    finally:
        modeling_gemma4.Gemma4TextMLP.forward = right
    theirs, ours = fresh()
    for model in (theirs, ours):
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 211))
    assert_near_eager(ours(ids).logits, theirs(ids).logits)


def test_fewer_layers_than_the_configuration_has(warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh("31b")
    for model in (theirs, ours):
        model.model.layers = model.model.layers[:6]
        model.config.num_hidden_layers = 6
        assert_near_eager(model(family.prompt(1, 12)).logits, theirs(family.prompt(1, 12)).logits)
    ours.config.num_hidden_layers = 12
    accelerate(ours)  # is not to fail
    assert "layers" in warned()[-1]


def test_reasons_with_numbers_are_said_once(moe: tuple[Any, Any], warned: Callable[[], list[str]]) -> None:
    ours = fresh()[1]
    for length in (510, 511):
        cache = cache_of(ours(family.prompt(1, length)))
        ours(family.prompt(1, 5), **{CACHE: cache})
    assert len(warned()) == 1 and "max_position_embeddings" in warned()[0]


def test_a_class_of_ones_own() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

    class Mine(Gemma4TextModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state.flip(-1)
            return out

    model = copy.deepcopy(family.transformers_model("12b"))
    model.model.__class__ = Mine
    wanted = model(family.prompt(1, 12)).logits
    accelerate(model)
    assert_near_eager(model(family.prompt(1, 12)).logits, wanted)
    assert any("forward of its own" in reason for reason in engine(model).said)
    restore(model)
    with pytest.raises(UnsupportedError, match="forward of its own"):
        accelerate(model, quantize="int8")
    assert_near_eager(model(family.prompt(1, 12)).logits, wanted)


def test_what_an_old_cache_keeps_alive() -> None:
    """Not the weights that it was made with, but for what its keys are rebuilt from."""
    ours = fresh()[1]
    out = ours.generate(family.prompt(1, 12), return_dict_in_generate=True, **GREEDY)
    cache, before = out[CACHE], sum(p.nbytes for p in ours.parameters())
    wanted = [layer.keys for layer in cache.layers]
    ours.double()
    assert cache.model is not engine(ours).native and sum(p.nbytes for p in cache.model.parameters()) < before / 1000
    assert not cache._graph and len(cache.model.spares) == 0
    for layer, keys in zip(cache.layers, wanted, strict=True):
        assert torch.equal(layer.keys, keys)


def test_what_is_no_more_is_freed_at_once() -> None:
    """Without a search for circles, which may come late: of a GPU's memory, too late."""
    gc.collect()
    gc.disable()
    try:
        ours = fresh()[1]
        ours.generate(family.prompt(1, 12), **GREEDY)
        kept = [weakref.ref(engine(ours).native), weakref.ref(ours.model.layers[0].mlp.up_proj.weight)]  # type: ignore[type-var]
        del ours
        assert [k() for k in kept] == [None, None]
    finally:
        gc.enable()


def test_threads_bind_once() -> None:
    """All call at once after the weights have moved."""
    theirs, ours = fresh()
    ids = family.prompt(1, 12)
    wanted = theirs.double().float()(ids).logits
    for _ in range(5):
        ours.double().float()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            outs = list(pool.map(lambda _: no_grad_call(ours, ids), range(4)))
        for logits in outs:
            assert_near_eager(logits, wanted)
    ours.model.layers[0].self_attn.q_proj.weight.mul_(0)
    theirs.model.layers[0].self_attn.q_proj.weight.mul_(0)
    assert_near_eager(ours(ids).logits, theirs(ids).logits)


def no_grad_call(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_training_after_inference_mode() -> None:
    ours = copy.deepcopy(family.transformers_model("26b-a4b"))
    with torch.inference_mode():
        accelerate(ours, check=False)
        ours(family.prompt(1, 9))
    ours.double().float()
    with torch.inference_mode():
        ours(family.prompt(1, 9))
        restore(ours)
    ours.train()
    with torch.enable_grad():
        ours(family.prompt(1, 9), labels=family.prompt(1, 9)).loss.backward()
    assert ours.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_default_device(moe: tuple[Any, Any]) -> None:
    """What a call asks for is found out on the host: as "meta" is one, "cuda" may be."""
    ids, mask = left_padded()
    torch.set_default_device("meta")
    try:
        call = engine(moe[1]).call(moe[1].model, dict(input_ids=ids, attention_mask=mask))
    finally:
        torch.set_default_device(None)
    assert not isinstance(call, str) and torch.equal(call.new, mask.bool()) and call.base == [7, 1, 0]


def test_models_made_by_its_class(moe: tuple[Any, Any], tmp_path: Path) -> None:
    made = type(moe[1])(moe[0].config).eval()
    made.load_state_dict(moe[0].state_dict())
    assert_near_eager(made(family.prompt(1, 9)).logits, moe[0](family.prompt(1, 9)).logits)
    moe[1].save_pretrained(tmp_path)
    loaded = type(moe[1]).from_pretrained(tmp_path)
    assert_near_eager(loaded(family.prompt(1, 9)).logits, moe[0](family.prompt(1, 9)).logits)
    assert_near_eager(accelerate(loaded)(family.prompt(1, 9)).logits, moe[0](family.prompt(1, 9)).logits)


@pytest.mark.parametrize("case", ["labels behind padding", "padding after the prompt"])
def test_what_comes_of_padding(case: str, warned: Callable[[], list[str]]) -> None:
    theirs, ours = fresh()
    ids, mask = left_padded()
    if case == "labels behind padding":
        labels = ids.masked_fill(mask == 0, -100)
        for given in (
            dict(attention_mask=mask, labels=labels),
            dict(attention_mask=mask.flip(1), labels=labels.flip(1)),
        ):
            assert_near_eager(ours(ids, **given).loss, theirs(ids, **given).loss)
    else:
        options = dict(attention_mask=mask.flip(1), **GREEDY)
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert len(warned()) == 1


def test_arguments_that_are_off_count_too(moe: tuple[Any, Any]) -> None:
    theirs, ours = fresh()
    assert_near_eager(ours(family.prompt(1, 12), is_causal=False).logits, theirs(family.prompt(1, 12), is_causal=False).logits)
    assert (theirs(family.prompt(1, 12), is_causal=False).logits - theirs(family.prompt(1, 12)).logits).abs().max() > 0.1


def test_forward_derivatives(warned: Callable[[], list[str]]) -> None:
    import torch.autograd.forward_ad as forward_ad

    theirs, ours = fresh("12b")
    embeds = theirs.get_input_embeddings()(family.prompt(1, 9))
    tangents = []
    for model in (theirs, ours):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeds, torch.ones_like(embeds))
            tangents.append(forward_ad.unpack_dual(model(inputs_embeds=dual).logits).tangent)
    assert_near_eager(tangents[1], tangents[0])
    assert "forward-mode autodiff" in warned()[0]


def test_a_head_that_is_no_longer_plain(moe: tuple[Any, Any]) -> None:
    theirs, ours = fresh("12b")
    for model in (theirs, ours):
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        model.lm_head.parametrizations.weight.original0.mul_(2)
    assert_near_eager(ours(family.prompt(1, 9)).logits, theirs(family.prompt(1, 9)).logits)
    theirs, ours = fresh("12b")
    for model in (theirs, ours):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight[:100])
    assert_near_eager(ours(family.prompt(1, 9)).logits, theirs(family.prompt(1, 9)).logits)


def test_a_cache_without_windows(pair: tuple[Any, Any]) -> None:
    """Made without a configuration it keeps all, so that it can be cropped to any length."""
    ids, logits = family.prompt(1, 150), []
    for model in pair:
        cache = DynamicCache()
        model(ids, **{CACHE: cache})
        cache.crop(-120)
        logits.append(model(ids[:, 5:25], **{CACHE: cache}).logits)
    assert_near_eager(logits[1], logits[0])
    assert not engine(pair[1]).said


def test_layers_of_the_cache_by_themselves(moe: tuple[Any, Any]) -> None:
    for change in (lambda c: c.layers[0].crop(-2), lambda c: setattr(c.layers[1], "values", c.layers[1].values * 2)):
        caches = [cache_of(model(family.prompt(1, 6))) for model in moe]
        for cache in caches:
            change(cache)
        assert caches[1].plain
        assert_same_keys(*caches)


# ---------------------------------------------------------------- what is refused
def test_what_is_refused(moe: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="expected one transformers Gemma 4 text model in"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got a Gemma4"):
        accelerate(Gemma4.from_pretrained("tiny", check=False))
    with pytest.raises(ValueError, match="quantize"):
        accelerate(moe[0], quantize="int5")
    with pytest.raises(ValueError, match="backend"):
        accelerate(moe[0], backend="fpga")
    with pytest.raises(ValueError, match="check"):
        accelerate(moe[0], check="maybe")
    with pytest.raises(ValueError, match="not accelerated"):
        restore(moe[0])
    assert type(moe[0]) is Gemma4ForCausalLM
    ids, mask = left_padded()
    with pytest.raises(IndexError, match=r"\[0, 211\)"):
        moe[1](torch.tensor([[3, 211]]))
    cache = cache_of(moe[1](ids, attention_mask=mask))
    with pytest.raises(ValueError, match="were padding before"):
        moe[1](ids[:, :1], attention_mask=torch.ones(3, 31, dtype=torch.long), **{CACHE: cache})
    with pytest.raises(ValueError, match="were padding before"):
        moe[1](ids[:, :1], **{CACHE: cache})


def test_a_backend_that_cannot_run_here(moe: tuple[Any, Any]) -> None:
    model = copy.deepcopy(moe[0])
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError):
            accelerate(model, backend="cuda")
        assert type(model) is Gemma4ForCausalLM and type(model.lm_head) is nn.Linear
    accelerate(model, backend="torch")
    assert engine(model).native.backend == "torch"  # type: ignore[union-attr]


def test_a_wrong_kernel_is_found(moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    impl = gemma4_fast.ops.TABLE["geglu_mlp"].impls["torch"]
    right = impl.function
    monkeypatch.setitem(vars(impl), "function", lambda x, gate_up, down: right(x, gate_up.roll(1, 0), down))
    model = copy.deepcopy(moe[0])
    with pytest.raises(gemma4_fast.SelfCheckError, match="geglu_mlp"):
        accelerate(model, backend="torch")
    assert type(model) is Gemma4ForCausalLM
    assert_near_eager(model(family.prompt(1, 9)).logits, moe[0](family.prompt(1, 9)).logits)


def test_verify_holds_it_to_transformers_code(pair: tuple[Any, Any]) -> None:
    report = gemma4_fast.verify(pair[1], level="full")
    assert report.ok, report.verdict()
    layers = [c for c in report.comparisons if c.what == "beside transformers"]
    assert [c.layer for c in layers] == list(range(pair[0].config.num_hidden_layers))
    assert [c.phase for c in report.comparisons if c.what == "logits beside transformers"] == ["prefill", "decode"]
    quick = gemma4_fast.verify(pair[1])
    assert quick.ok and 0 < sum(c.what == "beside transformers" for c in quick.comparisons) < len(layers)
    assert gemma4_fast.verify(pair[1], input_ids=[5, 6, 7], level="full").ok
    with torch.no_grad():
        assert not cache_of(pair[1](family.prompt(1, 9))).plain  # its hooks are gone


@pytest.mark.parametrize("member", ["26b-a4b", "12b"])
def test_verify_finds_a_layer_that_is_not_transformers(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = accelerate(copy.deepcopy(family.transformers_model(member)))
    impl = gemma4_fast.ops.TABLE["geglu_mlp"].impls["torch"]
    right = impl.function
    monkeypatch.setitem(vars(impl), "function", lambda x, gate_up, down: right(x, gate_up, down) + 1e-3 * x)
    with gemma4_fast.use_backend("torch"):
        report = gemma4_fast.verify(ours, level="full")
    wrong = [c.what for c in report.comparisons if not c.ok]
    assert "beside transformers" in wrong and "logits beside transformers" in wrong


def test_verify_says_what_it_cannot_compare(moe: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="not accelerated"):
        gemma4_fast.verify(moe[0])
    with pytest.raises(ValueError, match="expected a Gemma4"):
        gemma4_fast.verify("tiny")
    quantized = accelerate(copy.deepcopy(moe[0]), quantize="int8", check=False)
    report = gemma4_fast.verify(quantized, level="full")
    assert report.ok and not any("beside" in c.what for c in report.comparisons)
    _, ours = fresh()
    ours.model.layers[3].self_attn.q_proj = Adapted(ours.model.layers[3].self_attn.q_proj)
    with pytest.raises(UnsupportedError, match="q_proj"):
        gemma4_fast.verify(ours)


# ---------------------------------------------------------------- the weights
def test_the_weights_are_the_same_memory(pair: tuple[Any, Any]) -> None:
    native, model = engine(pair[1]).native, pair[1]
    assert native is not None
    lies = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in native.parameters()]
    for name, p in model.named_parameters():
        assert any(lo <= p.data_ptr() and p.data_ptr() + p.nbytes <= hi for lo, hi in lies), name
    assert sum(hi - lo for lo, hi in lies) <= sum(p.nbytes for p in model.parameters()) + 4 * model.config.num_hidden_layers
    assert dict(model.named_parameters()).keys() == dict(pair[0].named_parameters()).keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), pair[0].state_dict().values(), strict=True))


def test_restore(pair: tuple[Any, Any]) -> None:
    theirs = pair[0]
    model = accelerate(copy.deepcopy(theirs), check=False)
    cache = cache_of(model(family.prompt(1, 12)))
    assert restore(model) is model and type(model) is type(theirs)
    assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), theirs.modules(), strict=True))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.model.layers.parameters())
    assert torch.equal(model(family.prompt(1, 12)).logits, theirs(family.prompt(1, 12)).logits)
    a = theirs(family.prompt(1, 12))
    wanted = theirs(family.prompt(1, 1), **{CACHE: cache_of(a)}).logits
    assert_near_eager(model(family.prompt(1, 1), **{CACHE: cache}).logits, wanted)
    accelerate(accelerate(model))  # again, and twice


def test_copies(moe: tuple[Any, Any]) -> None:
    model, ids = Gemma4ForCausalLM(moe[0].config).eval(), family.prompt(1, 12)  # one without transformers' hooks, as they
    model.load_state_dict(moe[0].state_dict())  # cannot be pickled
    accelerate(model)
    wanted = model(ids).logits
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for other in copies:
        assert type(other) is type(model) and torch.equal(other(ids).logits, wanted)
        assert not cache_of(other(ids)).plain and other.lm_head.weight is other.model.embed_tokens.weight
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert not torch.equal(other(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)


def test_save_pretrained(moe: tuple[Any, Any], tmp_path: Path) -> None:
    moe[1].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Gemma4ForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), moe[0].state_dict().values(), strict=True))
    size, weights = (tmp_path / "model.safetensors").stat().st_size, sum(p.nbytes for p in moe[0].parameters())
    assert size < 1.05 * weights


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantized(to: str, pair: tuple[Any, Any]) -> None:
    theirs = pair[0]
    model = accelerate(copy.deepcopy(theirs), quantize=to)
    native = gemma4_fast.Gemma4(engine(pair[1]).native.config)  # type: ignore[union-attr]
    native.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})
    native.quantize(to)
    ids = family.prompt(2, 20)
    assert_near_eager(model(ids).logits, native(ids))
    embeds = model.get_input_embeddings()(ids)
    out = model.generate(ids, **GREEDY)
    wanted = native.generate(ids, max_new_tokens=20, temperature=0.0, stop_token_ids=(EOS,))
    for row, result in zip(out, wanted, strict=True):
        assert row[20 : 20 + len(result.token_ids)].tolist() == result.token_ids
    assert embeds.shape == (2, 20, theirs.config.hidden_size)
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert sum(p.nbytes for p in model.parameters()) < sum(p.nbytes for p in theirs.parameters()) / 8
    refused: list[Callable[[], Any]] = [
        lambda: model(ids, output_attentions=True),
        lambda: model.train()(ids),
        lambda: restore(model),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
        lambda: model.state_dict(),
        lambda: model.save_pretrained("nowhere"),
        lambda: model.load_state_dict({}, strict=False),
        lambda: model.resize_token_embeddings(300),
        lambda: hooked(model),
    ]
    for call in refused:
        with pytest.raises(UnsupportedError, match=to):
            call()
        model.eval()
    assert not Path("nowhere").exists()
    assert model.bfloat16()(ids).logits.dtype == torch.bfloat16


def test_a_head_of_its_own() -> None:
    """Whatever the configuration says: the weights decide."""
    theirs = copy.deepcopy(family.transformers_model("12b"))
    theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.roll(1, 0))
    ids = family.prompt(2, 12)
    a, b = both((theirs, accelerate(copy.deepcopy(theirs))), ids)
    assert_near_eager(b.logits, a.logits)
    quantized = accelerate(copy.deepcopy(theirs), quantize="int8")(ids).logits
    tied = accelerate(copy.deepcopy(family.transformers_model("12b")), quantize="int8")(ids).logits
    assert_near_eager(quantized, tied.roll(1, -1))


def hooked(model: Any) -> None:
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0)
    try:
        model(family.prompt(1, 9))
    finally:
        hook.remove()


def test_quantizing_frees_the_weights(moe: tuple[Any, Any]) -> None:
    model = copy.deepcopy(moe[0])
    kept = {n: weakref.ref(p) for n, p in model.named_parameters() if p.dim() > 1 and "router" not in n}
    assert len(kept) > 50
    accelerate(model, quantize="int4")
    gc.collect()
    assert not [n for n, p in kept.items() if p() is not None]
    model.tie_weights()  # what evaluations call on any model
    model(family.prompt(1, 9))
    model.bfloat16()
    native = engine(model).native
    assert native is not None
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in native.model.layers.parameters() if p.numel() > 1)


# ---------------------------------------------------------------- images
def multimodal(member: str) -> Any:
    """A model with a small vision tower; its images weigh as much as its words."""
    numbers = dict(family.MEMBERS[member])
    if member in ("12b", "26b-a4b", "31b"):
        numbers["use_bidirectional_attention"] = "vision"
    vision = Gemma4VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        patch_size=4, position_embedding_size=64, pooling_kernel_size=2,
    )  # fmt: skip
    tokens = dict(image_token_id=IMAGE, video_token_id=201, audio_token_id=202, boi_token_id=203, eoi_token_id=204)
    config = Gemma4Config(text_config=Gemma4TextConfig(**numbers), vision_config=vision, audio_config=None, **tokens)
    config.audio_config = None
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    words = family.transformers_model(member).model.state_dict()
    model.model.language_model.load_state_dict(words)
    model.model.embed_vision.embedding_projection.weight.mul_(20)
    return model


def with_image(batch: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """30 tokens, of which 9 are an image of 6 x 6 patches."""
    ids = torch.randint(3, 199, (batch, 30), generator=torch.Generator().manual_seed(3))
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    ids[:, 8:17], kinds[:, 8:17] = IMAGE, 1
    mask[0, :pad] = 0
    place = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    pixels = torch.rand(batch, 36, 48, generator=torch.Generator().manual_seed(4))
    return dict(
        input_ids=ids, mm_token_type_ids=kinds, attention_mask=mask, pixel_values=pixels,
        image_position_ids=place.repeat(batch, 1, 1),
    )  # fmt: skip


def agree(pair: tuple[Any, Any], **inputs: Tensor) -> None:
    """The two models' logits of the tokens that are real, and what they generate."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    a, b = both(pair, **inputs)
    assert_near_eager(b.logits[real], a.logits[real])
    a, b = (m.generate(**inputs, **GREEDY) for m in pair)
    assert torch.equal(a, b)


def told_apart(model: Any, inputs: dict[str, Tensor]) -> float:
    """The most a logit changes when the model is not told which tokens are an image's."""
    blind = {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])}
    return float((model(**blind).logits - model(**inputs).logits).abs().max())


@pytest.mark.parametrize("member", ["e2b", "26b-a4b"])
def test_images(member: str) -> None:
    theirs = multimodal(member)
    pair = theirs, accelerate(copy.deepcopy(theirs))
    for inputs in (with_image(), with_image(2, pad=5), dict(input_ids=family.prompt(2, 20, 199))):
        agree(pair, **inputs)
    assert not engine(pair[1]).said
    inputs = with_image()
    assert (told_apart(pair[1], inputs) > 0.1) == (member == "26b-a4b"), (
        "an image's tokens see each other forwards, in the larger models"
    )
    quantized = accelerate(copy.deepcopy(theirs), quantize="int8")
    assert quantized.generate(**inputs, **GREEDY).shape[1] > 30


def unified() -> Any:
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedTextConfig
    from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedVisionConfig

    text = Gemma4UnifiedTextConfig(**{**family.MEMBERS["12b"], "use_bidirectional_attention": "vision"})
    vision = Gemma4UnifiedVisionConfig(
        patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32
    )
    torch.manual_seed(0)
    tokens = dict(image_token_id=IMAGE, video_token_id=201, audio_token_id=202)
    model = Gemma4UnifiedForConditionalGeneration(
        Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config=None, **tokens)
    ).eval()
    model.model.language_model.load_state_dict(family.transformers_model("12b").model.state_dict())
    for name, weight in model.model.named_parameters():
        if name.endswith("embedding_projection.weight"):
            weight.copy_(20 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * weight.shape[1] ** -0.5)
    return model


def with_patches(patches: int, batch: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """30 tokens, of which so many are an image's."""
    ids = torch.randint(3, 199, (batch, 30), generator=torch.Generator().manual_seed(3))
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    ids[:, 8 : 8 + patches], kinds[:, 8 : 8 + patches] = IMAGE, 1
    mask[0, :pad] = 0
    place = torch.stack([torch.arange(patches), torch.zeros(patches, dtype=torch.long)], -1)[None].repeat(batch, 1, 1)
    pixels = torch.rand(batch, patches, 48, generator=torch.Generator().manual_seed(4))
    images = dict(mm_token_type_ids=kinds, pixel_values=pixels, image_position_ids=place)
    return dict(input_ids=ids, attention_mask=mask, **images)


def test_unified_models() -> None:
    theirs = unified()
    pair = theirs, accelerate(copy.deepcopy(theirs))
    for inputs in (dict(input_ids=family.prompt(2, 20, 199)), with_patches(7), with_patches(7, 2, pad=5)):
        agree(pair, **inputs)
    assert not engine(pair[1]).said
    inputs = with_patches(7)
    assert told_apart(pair[1], inputs) > 0.1
    wide = with_patches(12)
    assert_near_eager(pair[1](**wide).logits, theirs(**wide).logits)
    assert [r for r in engine(pair[1]).said if "an image of N tokens" in r] and len(engine(pair[1]).said) == 1


def test_images_in_pieces() -> None:
    """A caller's own loop: kinds of tokens are told from the beginning, as transformers reads them."""
    theirs = multimodal("26b-a4b")
    ours = accelerate(copy.deepcopy(theirs), check=False)
    inputs = with_image()
    embeds = []
    for model in (theirs, ours):
        cache, logits = None, []
        for lo, hi in ((0, 5), (5, 17), (17, 30)):
            images = {k: inputs[k] for k in ("pixel_values", "image_position_ids")} if lo == 5 else {}
            kinds = inputs["mm_token_type_ids"][:, :hi]
            out = model(inputs["input_ids"][:, lo:hi], mm_token_type_ids=kinds, use_cache=True, **images, **{CACHE: cache})
            cache = cache_of(out)
            logits.append(out.logits)
        embeds.append(torch.cat(logits, 1))
    assert_near_eager(embeds[1], embeds[0])
    assert not engine(ours).said


def test_gradients_of_pixels(warned: Callable[[], list[str]]) -> None:
    ours = accelerate(multimodal("26b-a4b"), check=False).requires_grad_(False)
    inputs = with_image()
    inputs["pixel_values"].requires_grad_()
    with torch.enable_grad():
        ours(**inputs).logits.sum().backward()
    assert inputs["pixel_values"].grad is not None and len(warned()) == 1 and "no_grad" in warned()[0]


def test_hooks_on_the_text_model_itself() -> None:
    theirs = multimodal("26b-a4b")
    ours = accelerate(copy.deepcopy(theirs), check=False)
    ids = family.prompt(1, 12, 199)

    def steer(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].flip(-1)}

    usual = theirs(input_ids=ids).logits
    for model in (theirs, ours):
        model.model.language_model.register_forward_pre_hook(steer, with_kwargs=True)
    wanted = theirs(input_ids=ids).logits
    assert_near_eager(ours(input_ids=ids).logits, wanted)
    assert (wanted - usual).abs().max() > 0.1 and not engine(ours).said


# ---------------------------------------------------------------- what stands on transformers
@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, Any]:
    folder = resolve("tiny")
    load: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # noqa: E731
    return load(), accelerate(load()), AutoTokenizer.from_pretrained(folder)


def test_pipeline_and_chat_template(tiny: tuple[Any, Any, Any]) -> None:
    theirs, ours, tokenizer = tiny
    options = GenerationConfig(max_new_tokens=20, do_sample=False)
    said = []
    for model in (theirs, ours):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        said.append(write("It is a truth", generation_config=options))
    assert said[0] == said[1]
    messages = [{"role": "user", "content": "Hello"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    outs = [m.generate(**inputs, generation_config=options) for m in (theirs, ours)]
    assert torch.equal(*outs)
    assert not engine(ours).said


def test_text_streamer(tiny: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    _, ours, tokenizer = tiny
    inputs = tokenizer("It is a truth", return_tensors="pt")
    out = ours.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0]) in capsys.readouterr().out


def test_adapters_once_they_are_merged() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        copy.deepcopy(family.transformers_model("26b-a4b")),
        LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False),
    ).eval()
    ids = family.prompt(2, 12)
    wanted = adapted(ids).logits
    assert accelerate(adapted) is adapted
    assert_near_eager(adapted(ids).logits, wanted)
    assert any("PEFT" in reason and "merge_and_unload" in reason for reason in engine(adapted).said)
    merged = adapted.merge_and_unload()
    out = merged(ids)
    assert_near_eager(out.logits, wanted)
    assert not cache_of(out).plain


def test_automodel(tiny: tuple[Any, Any, Any]) -> None:
    model = accelerate(AutoModel.from_pretrained(resolve("tiny"), dtype=torch.float32))
    assert_near_eager(model(family.prompt(1, 12)).last_hidden_state, tiny[0].model(family.prompt(1, 12)).last_hidden_state)
