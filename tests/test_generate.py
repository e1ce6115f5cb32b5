"""Generation on the tiny model: sampling, stops, streaming, log-probabilities, chat prefix, refusals."""

from __future__ import annotations

import copy
import math
import re
import weakref
from typing import Any

import pytest
import torch
from bounds import assert_right, error
from torch import Tensor

from gemma4_fast import CheckpointError, Gemma4, Gemma4Config, ops
from gemma4_fast.generate import Generation, Prefix, Session, Stream, perplexity
from gemma4_fast.ops.torch_backend import draw, restrict
from gemma4_fast.reference import model as reference
from gemma4_fast.sampling import Sampling
from gemma4_fast.weights import tiny_path

PROMPT = "It is a truth universally acknowledged"


def reference_logprobs(model: Gemma4, ids: list[int]) -> tuple[Tensor, Tensor, float]:
    """Log-probabilities [T, V] after each of `ids`: the reference model's in fp32 and in fp64.

    They are the yardstick and the truth for the rule of bounds.py. Returns the loss too, that of
    all values, for comparisons of few.
    """
    tensors = model.state_dict()
    plain, truth = (
        reference.forward(tensors, model.config, torch.tensor(ids), dtype=dtype).log_softmax(-1)
        for dtype in (torch.float32, torch.float64)
    )
    return plain, truth, error(plain, truth)


@pytest.fixture(scope="module")
def tiny() -> Gemma4:
    return Gemma4.from_pretrained("tiny", check=False, dtype="float32")


def one(model: Gemma4, prompt: Any = PROMPT, **options: Any) -> Generation:
    result = model.generate(prompt, **options)
    assert isinstance(result, Generation)
    return result


def test_stream_and_generate_give_the_same(tiny: Gemma4) -> None:
    options: dict[str, Any] = dict(max_new_tokens=40, seed=3)
    whole = one(tiny, **options)
    stream = tiny.stream(PROMPT, **options)
    pieces = list(stream)
    assert len(pieces) > 5 and "".join(pieces) == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids
    assert stream.result.finish_reason == whole.finish_reason
    assert whole.prefill_seconds > 0 and whole.decode_seconds > 0


def test_seed_decides(tiny: Gemma4) -> None:
    texts = [one(tiny, max_new_tokens=30, seed=s, temperature=1.0).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = {one(tiny, max_new_tokens=30, temperature=1.5, top_k=0, top_p=1.0).text for _ in range(3)}
    assert len(unseeded) > 1
    batch = tiny.generate([PROMPT] * 3, max_new_tokens=20, seed=1, temperature=1.0)
    assert isinstance(batch, list) and len({g.text for g in batch}) > 1  # sequence b draws from seed + b


def test_defaults_come_from_generation_config(tiny: Gemma4) -> None:
    assert tiny.generation_config["do_sample"] is True
    given = {k: tiny.generation_config[k] for k in ("temperature", "top_k", "top_p")}
    assert one(tiny, max_new_tokens=20, seed=5).text == one(tiny, max_new_tokens=20, seed=5, **given).text
    greedy = one(tiny, max_new_tokens=20, temperature=0)
    assert greedy.text == one(tiny, max_new_tokens=20, temperature=0, seed=9).text


def test_stop_string_ends_the_text_before_it(tiny: Gemma4) -> None:
    free = one(tiny, max_new_tokens=60, seed=1)
    assert free.text is not None
    word = free.text.split()[4]
    cut = one(tiny, max_new_tokens=60, seed=1, stop=["zebra", word])
    assert cut.text == free.text[: free.text.index(word)]
    assert (cut.finish_reason, cut.stopped_by) == ("stop", word)
    assert len(cut.token_ids) < len(free.token_ids)
    streamed = tiny.stream(PROMPT, max_new_tokens=60, seed=1, stop=word)
    assert "".join(streamed) == cut.text


def test_no_stop_strings(tiny: Gemma4) -> None:
    options: dict[str, Any] = dict(max_new_tokens=8, seed=1)
    want = one(tiny, **options).token_ids
    for none in (None, (), []):
        assert one(tiny, stop=none, **options).token_ids == want
        stream = tiny.stream(PROMPT, stop=none, **options)
        assert list(stream) and stream.result.token_ids == want
    for bad in (5, [5], {"a": 1}, b"a"):
        for call in (tiny.generate, tiny.stream):
            with pytest.raises(ValueError, match="stop strings"):
                call(PROMPT, stop=bad)


def test_logprobs_are_appended(tiny: Gemma4) -> None:
    """A new list for each token would make long texts take quadratic time."""
    stream = tiny.stream(PROMPT, max_new_tokens=12, temperature=0, stop_token_ids=(), logprobs=2)
    lists = {(id(stream.result.logprobs), id(stream.result.top_logprobs)) for _ in stream}
    assert len(lists) == 1
    assert stream.result.logprobs is not None and len(stream.result.logprobs) == 12
    assert stream.result.top_logprobs is not None and len(stream.result.top_logprobs) == 12


def test_stop_tokens(tiny: Gemma4) -> None:
    free = one(tiny, max_new_tokens=30, temperature=0, stop_token_ids=())
    assert free.finish_reason == "length" and len(free.token_ids) == 30
    at = next(i for i, t in enumerate(free.token_ids) if t not in free.token_ids[:i] and i > 2)
    stop = free.token_ids[at]
    cut = one(tiny, max_new_tokens=30, temperature=0, stop_token_ids=[4095, stop])
    assert cut.token_ids == free.token_ids[: at + 1]
    assert (cut.finish_reason, cut.stopped_by) == ("stop", stop)
    assert one(tiny, max_new_tokens=30, temperature=0, stop_token_ids=stop).token_ids == cut.token_ids
    both = tiny.generate([PROMPT, "Mr. Darcy"], max_new_tokens=30, temperature=0, stop_token_ids=[stop])
    assert isinstance(both, list)
    assert both[0].token_ids == cut.token_ids  # a finished neighbour changes nothing
    assert both[1].token_ids == one(tiny, "Mr. Darcy", max_new_tokens=30, temperature=0, stop_token_ids=[stop]).token_ids


def test_logprobs_are_the_models_own(tiny: Gemma4) -> None:
    got = one(tiny, max_new_tokens=12, seed=2, temperature=0.7, top_k=5, logprobs=3)
    ids, chosen = got.prompt_ids + got.token_ids, torch.tensor(got.token_ids)[:, None]
    plain, truth, loss = reference_logprobs(tiny, ids[:-1])
    plain, truth = (x[len(got.prompt_ids) - 1 :] for x in (plain, truth))
    assert got.logprobs is not None and got.top_logprobs is not None
    logprobs = torch.tensor(got.logprobs)[:, None]
    assert_right(logprobs, plain.gather(-1, chosen), truth.gather(-1, chosen), loss=loss)
    best = truth.topk(3).indices
    assert [[t for t, _ in top] for top in got.top_logprobs] == best.tolist()
    values = torch.tensor([[v for _, v in top] for top in got.top_logprobs])
    assert_right(values, plain.gather(-1, best), truth.gather(-1, best), loss=loss)
    alone = one(tiny, max_new_tokens=3, temperature=0, logprobs=0)
    assert alone.logprobs is not None and len(alone.logprobs) == 3 and alone.top_logprobs is None


def test_prompt_forms(tiny: Gemma4) -> None:
    ids = tiny.tokenizer.encode(PROMPT)
    options: dict[str, Any] = dict(max_new_tokens=8, temperature=0)
    want = one(tiny, **options).token_ids
    assert one(tiny, ids, **options).token_ids == want
    assert one(tiny, torch.tensor(ids), **options).token_ids == want
    for batch in ([PROMPT], [ids], torch.tensor([ids]), [torch.tensor(ids)]):
        many = tiny.generate(batch, **options)
        assert isinstance(many, list) and many[0].token_ids == want
    chat = one(tiny, [{"role": "user", "content": "Where is Mr. Darcy?"}], **options)
    assert chat.prompt_ids[0] == tiny.tokenizer.bos_token_id and chat.prompt_ids.count(2) == 1


def test_kept_prefix_prefills_only_what_is_new(tiny: Gemma4) -> None:
    first = tiny.tokenizer.encode(PROMPT)
    prefix, seen = Prefix(), []
    options: dict[str, Any] = dict(max_new_tokens=10, temperature=0, stop_token_ids=())

    def turn(ids: list[int]) -> list[int]:
        return one_session(tiny, ids, prefix, seen, **options)

    reply = turn(first)
    second = first + reply + tiny.tokenizer.encode(" And then", add_bos=False)
    again = turn(second)
    assert seen[0] == (len(first), len(first))
    assert seen[1][0] == len(second)
    assert again == one(tiny, second, **options).token_ids
    assert prefix.cache is not None and prefix.cache.host_lens == [len(prefix.ids)]
    prefix.ids.pop()  # as an interrupt between the two counts would leave it
    third = second + again + [7]
    assert turn(third) == one(tiny, third, **options).token_ids
    other = tiny.tokenizer.encode("Something else entirely, quite unlike the first")
    assert turn(other) == one(tiny, other, **options).token_ids  # not a continuation: begins anew


def one_session(model: Gemma4, ids: list[int], prefix: Prefix, seen: list[Any], **options: Any) -> list[int]:
    options.pop("temperature")
    session = Session(model, [ids], prefix=prefix, sampling=Sampling(), **options)
    before = len(prefix.ids)
    progress: list[tuple[int, int]] = []
    out = [t.id for tokens in session.run(lambda done, total: progress.append((done, total))) for t in tokens]
    seen.append(progress[-1])
    assert before == 0 or progress[0][0] > before or prefix.ids[:before] != ids[:before]
    return out


def test_prefill_progress_counts_tokens(tiny: Gemma4) -> None:
    calls: list[tuple[int, int]] = []
    tiny.generate([[5] * 20, [6] * 7], max_new_tokens=1, prefill_chunk=8, on_prefill=lambda *a: calls.append(a))
    assert calls == [(8, 27), (16, 27), (24, 27), (27, 27)]


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "empty"),
    ([], {}, "empty"),
    ([[]], {}, "prompt 0 is empty"),
    (["a", ""], {}, "empty"),
    ([1, 2, 4096], {}, r"\[0, 4096\).*4096"),
    ([1, -1], {}, "-1"),
    ([[1, 2], [3, 9999]], {}, "prompt 1.*9999"),
    ([1.5], {}, "a prompt is"),
    (17, {}, "a prompt is"),
    (torch.ones(2, 2), {}, "int64"),
    ([1], dict(max_new_tokens=0), "max_new_tokens"),
    ([1], dict(max_new_tokens=1.5), "max_new_tokens"),
    ([1], dict(max_new_tokens=1024), "max_position_embeddings = 1024"),
    ([1] * 1020, dict(max_new_tokens=5), "1020 tokens and max_new_tokens = 5"),
    ([1] * 1025, {}, "exceed"),
    ([1], dict(temperature=-0.1), "temperature"),
    ([1], dict(temperature=float("nan")), "temperature"),
    ([1], dict(temperature=float("inf")), "temperature"),
    ([1], dict(temperature="hot"), "temperature"),
    ([1], dict(top_k=-1), "top_k"),
    ([1], dict(top_k=1.0), "top_k"),
    ([1], dict(top_p=0.0), "top_p"),
    ([1], dict(top_p=1.1), "top_p"),
    ([1], dict(min_p=-0.1), "min_p"),
    ([1], dict(seed=-1), "seed"),
    ([1], dict(seed="x"), "seed"),
    ([1], dict(logprobs=-1), "logprobs"),
    ([1], dict(logprobs=5000), "logprobs"),
    ([1], dict(prefill_chunk=0), "prefill_chunk"),
    ([1], dict(stop_token_ids=[4096]), "stop token"),
    ([1], dict(stop_token_ids=-1), "stop token"),
    ([1], dict(stop_token_ids=[True]), "stop token"),
    ([1], dict(stop_token_ids="5"), "stop_token_ids"),
    ([1], dict(stop_token_ids=1.5), "stop_token_ids"),
    ([1], dict(stop_token_ids={5: 1}), "stop_token_ids"),
    ([1], dict(stop_token_ids=True), "stop token"),
    ([1], dict(stop=[""]), "stop strings"),
    ([1], dict(stop=5), "stop strings"),
    ([{"role": "user"}], {}, "content"),
]


@pytest.mark.parametrize("prompt, options, word", REFUSED)
def test_bad_requests_are_refused_before_any_work(
    prompt: Any, options: dict[str, Any], word: str, tiny: Gemma4, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(tiny.model), "forward", no_work)
    with pytest.raises(ValueError, match=word):
        tiny.generate(prompt, **options)


def test_overflow_is_exact(tiny: Gemma4) -> None:
    full = one(tiny, [1] * 1020, max_new_tokens=4, stop_token_ids=(), temperature=0)
    assert len(full.token_ids) == 4
    assert len(one(tiny, [1] * 1022, temperature=0, stop_token_ids=()).token_ids) == 2  # the default takes what is left


def test_forward_refuses_bad_input(tiny: Gemma4) -> None:
    good = torch.tensor([[1, 2, 3]])
    cache = tiny.new_cache(1, 8)
    for ids, kept, word in (
        (good.float(), None, "int64"),
        ([[1]], None, "int64"),
        (good[0], None, "B, T"),
        (good[:, :0], None, "B, T"),
        (good[:0], None, "B, T"),
        (good + 4095, None, "token ids"),
        (good - 3, None, "token ids"),
        (good.to("meta"), None, "meta"),
        (good.expand(2, 3), cache, "2 rows"),
        (good.expand(1, 3).repeat(1, 3), cache, "max_len = 8"),
        (good.repeat(1, 400), None, "max_position_embeddings"),
        (good, Gemma4.from_pretrained("tiny", check=False).new_cache(1, 8), "bfloat16"),
    ):
        with pytest.raises(ValueError, match=word):
            tiny(ids, kept)
    assert cache.host_lens == [0]
    with pytest.raises(ValueError, match="max_len"):
        tiny.new_cache(1, 2000)
    with pytest.raises(ValueError, match="batch_size"):
        tiny.new_cache(0, 8)


def test_from_pretrained_refuses_bad_arguments() -> None:
    for options, word in (
        (dict(dtype="int8"), "dtype"),
        (dict(dtype=torch.int32), "dtype"),
        (dict(device="cuda:7"), "not there|CUDA"),
        (dict(device="tpu"), "device"),
        (dict(check="maybe"), "check"),
        (dict(load_format="pickle"), "load_format"),
    ):
        with pytest.raises(ValueError, match=word):
            Gemma4.from_pretrained("tiny", **options)  # type: ignore[arg-type]


def test_a_model_without_tokenizer_takes_ids_only() -> None:
    config = Gemma4Config.from_pretrained(tiny_path())
    model = Gemma4.dummy(config, dtype="float32")
    assert one(model, [5, 6], max_new_tokens=3).text is None
    with pytest.raises(CheckpointError, match="tokenizer"):
        model.generate("text")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        model.generate([5], stop="x")


def test_activations_that_overflow_are_reported(tiny: Gemma4) -> None:
    weight = tiny.model.layer(3).post_attention_layernorm.weight
    saved = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="not finite"):
            tiny.generate(PROMPT, max_new_tokens=3)
    finally:
        weight.copy_(saved)


# Sampling alone


def frequencies(logits: torch.Tensor, temperature: float, *filters: float, n: int = 4000) -> torch.Tensor:
    draws = [torch.rand(1, generator=torch.Generator().manual_seed(i)) for i in range(n)]  # as n sequences have them
    ids = draw(logits.expand(n, -1), torch.cat(draws), temperature, *(filters or (0, 1.0, 0.0)))
    return torch.bincount(ids, minlength=logits.shape[-1]) / n


def test_sampling_draws_from_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    for t in (0.5, 1.0, 2.0):
        got = frequencies(logits, t)
        assert (got - (logits / t).softmax(-1)).abs().max() < 0.03  # 4 standard deviations
    of_two = torch.tensor([1.0, 0, 2.0, 0, 0]).softmax(-1)[[0, 2]]
    got = frequencies(logits, 1.0, 2, 1.0, 0.0)
    assert got[[1, 3, 4]].sum() == 0 and (got[[0, 2]] - of_two / of_two.sum()).abs().max() < 0.03


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_of_equal_logits_the_lower_ids_stay(backend: str) -> None:
    weight = torch.zeros(1000, 16)
    weight[[17, 300, 301, 640, 999]] = 2.0
    weight[[5, 500]] = 3.0
    x, uniform = torch.ones(8, 16), torch.arange(8) / 8
    with ops.use_backend(None if backend == "auto" else backend):
        assert ops.sample(x, weight, uniform, None, 100.0, 4).tolist() == [5, 5, 5, 500, 500, 17, 17, 300]


def test_filters_keep_what_they_should() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]]))

    def kept(**settings: Any) -> set[int]:
        left, ids = restrict(logits, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings})
        index = torch.arange(5)[None] if ids is None else ids
        return set(index[left > -math.inf].tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {1, 3}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}
    assert kept(top_p=0.6) == {1, 3}
    assert kept(top_p=0.7) == {1, 3, 4}
    assert kept(top_p=0.01) == {1}
    assert kept(min_p=0.5) == {1, 3, 4}
    assert kept(min_p=1.0) == {1}
    assert kept(top_k=3, top_p=0.5) == {1, 3}  # 0.4 of the 0.85 that top_k leaves is not yet half of it
    assert kept(top_k=4, min_p=0.6) == {1, 3}


def test_perplexity_counts_each_token_once(tiny: Gemma4) -> None:
    ids = tiny.tokenizer.encode(
        PROMPT + ", that a single man in possession of a good fortune must be in want of a wife.", False
    )
    whole, counted = perplexity(tiny, ids, window=1000, stride=1000)
    assert counted == len(ids)
    bos, chosen = tiny.config.bos_token_id, torch.tensor(ids)[:, None]
    assert bos is not None
    plain, truth, loss = reference_logprobs(tiny, [bos, *ids[:-1]])
    mean = truth.gather(-1, chosen).mean()
    assert_right(-torch.tensor(whole).log(), plain.gather(-1, chosen).mean(), mean, loss=loss)
    for window, stride in ((8, 8), (8, 3), (5, 1)):
        assert perplexity(tiny, ids, window=window, stride=stride)[1] == len(ids)
    with pytest.raises(ValueError):
        perplexity(tiny, ids, window=4, stride=5)


def test_heldout_perplexity_is_the_recorded_one() -> None:
    """transformers made the figure in the tiny model's README; this package's model gives it too."""
    folder = tiny_path()
    recorded = re.search(r"\| bf16 \| ([\d,]+) \|.*?\| ([\d.]+) \| [\d.]+ \|$", (folder / "README.md").read_text(), re.M)
    assert recorded is not None
    model = Gemma4.from_pretrained("tiny", check=False)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    got, counted = perplexity(model, model.tokenizer.encode(text, add_bos=False))
    assert counted == int(recorded[1].replace(",", ""))
    assert got == pytest.approx(float(recorded[2]), rel=2e-3)


def test_stream_is_an_iterator(tiny: Gemma4) -> None:
    stream = tiny.stream(PROMPT, max_new_tokens=5, seed=1)
    assert isinstance(stream, Stream)
    first = next(stream)
    assert isinstance(first, str)
    with pytest.raises(ValueError, match="one prompt"):
        tiny.stream(["a", "b"])


def test_an_aborted_prefill_spoils_no_kept_prefix(tiny: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is overwritten layer by layer: a prefix whose pass was cut short must not be continued."""
    ids = [3 + (7 * i * i) % 4000 for i in range(300)]
    prefix, right = Prefix(), tiny.model.run_layer

    def first_logprobs(prompt: list[int], kept: Prefix | None) -> list[float]:
        session = Session(tiny, [prompt], max_new_tokens=1, stop_token_ids=(), logprobs=5, prefill_chunk=50, prefix=kept)
        return [value for tokens in session.run() for _, value in tokens[0].top or []]

    def interrupted(index: int, *args: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return right(index, *args)

    first_logprobs(ids[:200], prefix)
    monkeypatch.setattr(tiny.model, "run_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first_logprobs(ids[:200] + [9] * 60, prefix)
    monkeypatch.setattr(tiny.model, "run_layer", right)
    plain, truth, loss = reference_logprobs(tiny, ids)
    best = truth[-1].topk(5).indices
    for kept in (prefix, None):
        assert_right(torch.tensor(first_logprobs(ids, kept)), plain[-1, best], truth[-1, best], loss=loss)


def test_a_kept_prefix_belongs_to_its_model(tiny: Gemma4) -> None:
    other = Gemma4.dummy(tiny.config, dtype="float32", device="cpu")
    prefix, ids = Prefix(), list(range(3, 60))

    def token(model: Gemma4, kept: Prefix | None, prompt: list[int]) -> int:
        return next(iter(Session(model, [prompt], max_new_tokens=1, prefix=kept).run()))[0].id

    token(tiny, prefix, ids[:40])
    assert token(other, prefix, ids) == token(other, None, ids)


def test_all_of_a_seed_counts_and_a_longer_generation_begins_the_same(tiny: Gemma4) -> None:
    def tokens(seed: int, new: int = 12) -> list[int]:
        result = tiny.generate([5, 6], temperature=1.0, seed=seed, max_new_tokens=new, stop_token_ids=())
        assert isinstance(result, Generation)
        return result.token_ids

    assert len({tuple(tokens(seed)) for seed in (1, 1 + 2**32, 1 + 2**40, 2**63 - 1, 2**32 - 1)}) == 5
    assert tokens(7, 20)[:12] == tokens(7)


def test_a_tiny_temperature_is_greedy_and_a_huge_one_refused() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.5]])
    for t in (1e-300, 1e-46, 1e-40, 1e-39, 1e-10):
        assert draw(logits, torch.tensor([0.9]), t, 0, 1.0, 0.0).tolist() == [1]
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=10**400)


def test_a_stream_that_has_ended_holds_no_cache(tiny: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    new_cache = Gemma4.new_cache
    monkeypatch.setattr(Gemma4, "new_cache", lambda *args: made.append(weakref.ref(c := new_cache(*args))) or c)
    tiny.spares.clear()
    for _ in range(2):  # the second one has the first one's
        stream = tiny.stream([5, 6, 7], max_new_tokens=4, stop_token_ids=())
        assert list(stream) and len(made) == 1
        assert len(tiny.spares) == 1 and made[0]() is not None  # the model keeps it, the stream does not
    tiny.spares.clear()
    assert made[0]() is None and len(stream.result.token_ids) == 4


def test_a_kept_prefix_is_not_used_by_a_model_that_changed(tiny: Gemma4) -> None:
    model = copy.deepcopy(tiny)
    for change in (model.float, lambda: model.quantize("int8")):
        prefix = Prefix()
        first = [5, 6, 7, 8]
        options: dict[str, Any] = dict(max_new_tokens=3, stop_token_ids=())
        tokens = [t[0].id for t in Session(model, [first], prefix=prefix, **options).run()]
        change()
        ids = [*first, *tokens, 9]
        again = [t[0].id for t in Session(model, [ids], prefix=prefix, **options).run()]
        assert again == model.generate(ids, temperature=0, **options).token_ids


def test_greedy_tokens_are_the_same_with_log_probabilities(tiny: Gemma4) -> None:
    for prompt in ([9] * 40, [5, 6, 7], [100, 200, 300]):
        options: dict[str, Any] = dict(max_new_tokens=6, temperature=0, stop_token_ids=())
        plain, told = tiny.generate(prompt, **options), tiny.generate(prompt, logprobs=2, **options)
        assert plain.token_ids == told.token_ids
