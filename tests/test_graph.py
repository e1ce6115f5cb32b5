"""The recorded decode step: the same bits as running op by op, and nothing recorded that a replay would not repeat."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import assert_right
from family import MEMBERS
from test_native import require_native
from torch import Tensor

from gemma4_fast import Gemma4, Gemma4Config, ops, use_backend, verify
from gemma4_fast.graph import DecodeGraph, Spares, _Recording
from gemma4_fast.ops import cpu_backend
from gemma4_fast.sampling import GREEDY, Sampling


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_native()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of the recordings that were replayed, call by call."""
    from gemma4_fast import graph

    seen: list[int] = []
    replay = graph._Recording.replay

    def noted(self: Any, *args: Any) -> Tensor:
        seen.append(self.number)
        return replay(self, *args)

    monkeypatch.setattr(graph._Recording, "replay", noted)
    yield seen


def model_of(member: str, dtype: torch.dtype = torch.float32, quantize: str | None = None, **change: Any) -> Gemma4:
    config = Gemma4Config.from_dict({"model_type": "gemma4_text", **MEMBERS[member], **change})
    return Gemma4.dummy(config, dtype=dtype, device="cpu", quantize=quantize)


def eager(model: Gemma4, cache: Any, ids: Tensor, going: list[int]) -> Tensor:
    step = model.model.step(going, cache, decode=True)
    return model.model(ids, step, cache)


def compare(model: Gemma4, batch: int, steps: int, start: int = 3) -> None:
    """The same tokens through a graph and op by op, some rows idle at times: hidden states and caches alike, bit for bit."""
    caches = [model.new_cache(batch, 64) for _ in range(2)]
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randint(model.config.vocab_size, shape, generator=generator)  # noqa: E731
    with model.running():
        prompt = draw(batch * start)
        for cache in caches:
            model.model(prompt, model.model.step([start] * batch, cache), cache)
        graph = DecodeGraph(model, caches[0])
        for n in range(steps):
            going = [int(b == 0 or n % 3 != b) for b in range(batch)]
            ids = draw(batch)
            h, wanted = graph.run(ids, going), eager(model, caches[1], ids, going)
            rows = [b for b in range(batch) if going[b]]
            assert torch.equal(h[rows], wanted[rows]), f"step {n}"
    assert caches[0].host_lens == caches[1].host_lens and torch.equal(caches[0].lens, caches[1].lens)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_op_by_op(member: str, dtype: torch.dtype, replays: list[int]) -> None:
    compare(model_of(member, dtype), batch=3, steps=14)  # rings of the window go round
    assert len(replays) == 12 and len(set(replays)) == 1


def test_many_rows(replays: list[int]) -> None:
    compare(model_of("26b-a4b"), batch=40, steps=6)
    assert len(replays) == 4


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights(quantize: str, replays: list[int]) -> None:
    compare(model_of("26b-a4b", torch.bfloat16, quantize), batch=2, steps=6)
    assert len(replays) == 4


def test_recorded_anew_when_a_cache_outgrows_what_it_was_made_ready_for(
    monkeypatch: pytest.MonkeyPatch, replays: list[int]
) -> None:
    limit = lambda longest: -(-longest // 16) * 16  # noqa: E731
    monkeypatch.setattr(cpu_backend, "decode_limit", limit)
    monkeypatch.setattr(ops, "decode_limit", limit)
    compare(model_of("12b"), batch=1, steps=40)
    assert len(set(replays)) == 3 and len(replays) == 40 - 2 * 3


def test_another_selection_of_backends_is_obeyed_at_once(replays: list[int]) -> None:
    model = model_of("e4b")
    cache = model.new_cache(1, 64)
    graph = DecodeGraph(model, cache)
    with torch.inference_mode():
        for _ in range(3):
            graph.run(torch.tensor([5]), [1])
        assert len(replays) == 1
        with use_backend("cpu", isa="plain"):
            graph.run(torch.tensor([5]), [1])
        with use_backend("torch"):
            for _ in range(4):
                graph.run(torch.tensor([5]), [1])
    assert len(replays) == 1


def test_new_values_of_the_weights_are_seen() -> None:
    model = model_of("26b-a4b", torch.bfloat16)
    first, second = model.new_cache(1, 64), model.new_cache(1, 64)
    graph = DecodeGraph(model, first)
    ids = torch.tensor([9])
    with model.running():
        for _ in range(3):
            graph.run(ids, [1]), eager(model, second, ids, [1])
        with torch.no_grad():
            for weight in model.state_dict().values():
                weight.mul_(1.25)
        changed = eager(model, second, ids, [1])
        assert torch.equal(graph.run(ids, [1]), changed)


def doubled(x: Tensor, weight: Tensor) -> Tensor:
    """A kernel that also computes in PyTorch, which a recording would not repeat."""
    return cpu_backend.linear(x, weight) * 2


def test_what_computes_elsewhere_is_not_recorded(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    real = ops.TABLE["linear"].impls["cpu"]
    monkeypatch.setitem(ops.TABLE["linear"].impls, "cpu", ops.Impl("test_graph:doubled", real.dtypes))
    compare(model_of("12b"), batch=1, steps=5)
    assert replays == []
    # One that calls itself a kernel of this package is found out while it is recorded, and not tried again.
    tries, record = [], DecodeGraph._record
    monkeypatch.setattr(DecodeGraph, "_record", lambda self, *args: tries.append(1) or record(self, *args))
    monkeypatch.setattr(cpu_backend, "doubled", doubled, raising=False)
    monkeypatch.setitem(ops.TABLE["linear"].impls, "cpu", ops.Impl("gemma4_fast.ops.cpu_backend:doubled", real.dtypes))
    compare(model_of("12b"), batch=1, steps=5)
    assert replays == [] and len(tries) == 1


def test_a_recording_ends_with_its_graph() -> None:
    model = model_of("12b")
    graph = DecodeGraph(model, model.new_cache(1, 64))
    with model.running():
        for _ in range(2):
            graph.run(torch.tensor([5]), [1])
    (recording,) = graph.recordings.values()
    assert graph.recorded and isinstance(recording, _Recording)
    number = recording.number
    torch.ops.gemma4_fast_cpu.replay(number, None)
    del graph, recording
    gc.collect()
    with pytest.raises(RuntimeError, match="no such recording"):
        torch.ops.gemma4_fast_cpu.replay(number, None)


def test_a_step_that_fails_leaves_nothing_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("12b")
    graph = DecodeGraph(model, model.new_cache(1, 64))

    def broken(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    kernels = torch.ops.gemma4_fast_cpu
    kernels.record_start()
    before = kernels.record_stop()
    with model.running():
        graph.run(torch.tensor([5]), [1])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.model, "run", broken)
            graph.run(torch.tensor([5]), [1])
        with pytest.raises(RuntimeError, match="no such recording"):  # the half of a step is not kept
            kernels.replay(before + 1, None)
        graph.run(torch.tensor([5]), [1])
    kernels.release(before)
    with pytest.raises(RuntimeError, match="does not record"):
        kernels.record_stop()
    kernels.record_start()  # an interrupt right behind it: the next recording begins anew
    graph = DecodeGraph(model, model.new_cache(1, 64))
    with model.running():
        for _ in range(3):
            graph.run(torch.tensor([5]), [1])
    assert graph.recorded


def test_a_step_that_a_cache_has_no_room_for() -> None:
    model = model_of("12b")
    graph = DecodeGraph(model, model.new_cache(1, 4))
    with model.running():
        for _ in range(4):
            graph.run(torch.tensor([5]), [1])
        for new_lens in ([1], [2], [-1]):
            with pytest.raises(ValueError, match="tokens to"):
                graph.run(torch.tensor([5]), new_lens)


def test_a_long_row_that_is_idle_does_not_count(replays: list[int]) -> None:
    """Of 1100 tokens, and of 1018 that grow beyond 1024: what is recorded while the long one is idle is made for the other."""
    for member in ("12b", "e4b"):
        model = model_of(member, max_position_embeddings=2048)
        prompts = [[i % 50 + 2 for i in range(n)] for n in (1100, 1018)]
        first = model.generate(prompts, max_new_tokens=1, stop_token_ids=())[0].token_ids[0]
        alone = model.generate(prompts[1], max_new_tokens=12, stop_token_ids=())
        stop = [first] if first not in alone.token_ids else []
        both = model.generate(prompts, max_new_tokens=12, stop_token_ids=stop)
        assert both[1].token_ids == alone.token_ids and both[0].finish_reason == "stop"
    assert replays


def test_attentions_scratch_is_one_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of("26b-a4b"), []
    scratch = cpu_backend._scratch
    monkeypatch.setattr(cpu_backend, "_scratch", lambda size: made.append(scratch(size)) or made[-1])
    graph = DecodeGraph(model, model.new_cache(1, 64))
    with model.running():
        graph.run(torch.tensor([5]), [1])
        del made[:]
        graph.run(torch.tensor([5]), [1])
    assert graph.recorded and len(made) == model.config.num_hidden_layers
    assert len({(s.numel(), s.data_ptr()) for s in made}) == len({s.numel() for s in made}) == 2


def test_the_likeliest_ids_are_those_of_the_logits(replays: list[int]) -> None:
    model = model_of("26b-a4b", torch.bfloat16)
    caches = [model.new_cache(2, 64) for _ in range(2)]
    graph, ids = DecodeGraph(model, caches[0]), torch.tensor([7, 9])
    with model.running():
        for n in range(6):
            if n == 4:  # a number that is none in what the second row reads
                model.model.embed_tokens.weight[3] = math.nan
                ids = torch.tensor([ids[0], 3])
            chosen = graph.run(ids, [1, 1], choose=GREEDY).clone()
            wanted = model.logits(eager(model, caches[1], ids, [1, 1]), argmax=True)
            assert torch.equal(chosen, wanted)
            assert chosen.tolist()[1] == -1 if n >= 4 else min(chosen.tolist()) >= 0
            ids = chosen.clamp(min=0)
    assert len(replays) == 4


def test_a_model_that_changed_is_recorded_anew(replays: list[int]) -> None:
    model = model_of("26b-a4b", torch.bfloat16)
    first, second = model.new_cache(1, 64), model.new_cache(1, 64)
    graph, ids = DecodeGraph(model, first), torch.tensor([9])
    with model.running():
        for change in ("", "int8", "again"):
            if change == "int8":
                model.quantize(change)
            elif change:
                norm = model.model.norm.weight.clone() * 2
                model.load_state_dict({"model.norm.weight": norm}, strict=False, assign=True)
            for _ in range(4):
                assert torch.equal(graph.run(ids, [1]), eager(model, second, ids, [1])), change
    assert len(replays) == 6 and len(set(replays)) == 3


def test_other_numbers_of_ids_are_refused() -> None:
    model = model_of("12b")
    graph = DecodeGraph(model, model.new_cache(2, 64))
    with model.running():
        for _ in range(3):
            graph.run(torch.tensor([5, 6]), [1, 1])
        with pytest.raises(ValueError, match=r"ids have shape \[1\], expected \[2\]"):
            graph.run(torch.tensor([5]), [1, 1])


def test_dynamo_is_not_imported() -> None:
    code = "import sys, gemma4_fast; m = gemma4_fast.Gemma4.from_pretrained('tiny', check=False, progress=False)\n"
    code += "m.generate([5, 6], max_new_tokens=5, stop_token_ids=()); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what a GPU does: the step is captured, and what is captured is what is replayed ----


class Captured:
    """Stands for a CUDA graph: what it would have captured runs at each replay."""

    made: list[Captured]

    def __init__(self, step: Any, inputs: Any, reads: Any) -> None:
        self.reads = reads
        self.step, self.inputs, self.replays = step, inputs, 0
        Captured.made.append(self)

    def replay(self, ids: Tensor, new_lens: list[int], uniform: Tensor | None, times: Any = None) -> Tensor:
        self.replays += 1
        self.inputs.set(ids, new_lens, uniform)
        return self.step()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Captured]:
    from gemma4_fast import graph

    Captured.made = []
    monkeypatch.setattr(graph.DecodeGraph, "on_gpu", True)
    monkeypatch.setattr(ops, "recordable", lambda *_: True)
    monkeypatch.setattr(graph, "_Captured", Captured)
    return Captured


@pytest.mark.parametrize("member", MEMBERS)
def test_a_captured_step_gives_the_same_bits(member: str, gpu: type[Captured]) -> None:
    with use_backend("torch"):
        compare(model_of(member), batch=3, steps=14)
    assert [c.replays for c in gpu.made] == [13]  # the first one runs op by op, and warms up


def test_numbers_belong_to_a_step_that_draws(gpu: type[Captured]) -> None:
    model = model_of("26b-a4b")
    graph = DecodeGraph(model, model.new_cache(1, 16))
    ids, uniform = torch.tensor([5]), torch.tensor([0.5])
    with use_backend("torch"), torch.inference_mode():
        for choose in (None, GREEDY):
            for _ in range(3):
                graph.run(ids, [1], choose=choose, uniform=uniform)
            graph.run(ids, [1], choose=choose)  # by the same recording
        with pytest.raises(ValueError, match="uniform"):
            graph.run(ids, [1], choose=Sampling(1.0))
    assert [c.replays for c in gpu.made] == [3, 3] and all(c.inputs.uniform is None for c in gpu.made)


def test_a_step_that_cannot_be_captured_runs_op_by_op(
    gpu: type[Captured], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        gpu.made.append(None)  # type: ignore[arg-type]
        raise RuntimeError("operation not permitted when stream is capturing")

    from gemma4_fast import graph

    monkeypatch.setattr(graph, "_Captured", fails)
    with use_backend("torch"):
        compare(model_of("26b-a4b"), batch=3, steps=8)
    assert len(gpu.made) == 1  # not tried again
    assert "not permitted when stream is capturing" in caplog.text


def test_captured_anew_when_a_cache_outgrows_what_it_was_made_ready_for(
    monkeypatch: pytest.MonkeyPatch, gpu: type[Captured]
) -> None:
    monkeypatch.setattr(ops, "decode_limit", lambda longest: -(-longest // 16) * 16)
    with use_backend("torch"):
        compare(model_of("12b"), batch=1, steps=40)
    assert len(gpu.made) == 3 and sum(c.replays for c in gpu.made) == 40 - 3


def test_a_step_that_knows_the_longest_sequence_reads_that_much_of_full_caches() -> None:
    """What steps on a GPU tell attention, so that it cuts its work without asking the device."""
    seen: list[tuple[int, ...]] = []
    decode = ops.gqa_decode

    def noted(q: Tensor, k: Tensor | None, v: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(v.shape))
        return decode(q, k, v, *args)

    def one_step(model: Gemma4, limit: int | None) -> Tensor:
        cache = model.new_cache(2, 192)
        with model.running(), use_backend("torch"):
            model.model(torch.arange(2 * 50), model.model.step([50, 50], cache), cache)
            step = model.model.step([1, 1], cache, decode=True)
            step.limit = limit
            return model.model(torch.tensor([5, 6]), step, cache)

    model = model_of("12b")
    truth = one_step(copy.deepcopy(model).double(), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "gqa_decode", noted)
        plain, limited = (one_step(model, limit) for limit in (None, 64))
    assert_right(limited, plain, truth)
    half = len(seen) // 2
    slots = [{s[1] for s in seen[:half]}, {s[1] for s in seen[half:]}]
    assert 192 in slots[0] and 192 not in slots[1] and 64 in slots[1]


def test_a_chat_keeps_its_recorded_step_with_its_cache() -> None:
    from gemma4_fast.generate import Prefix, Session

    model, prefix, ids = model_of("26b-a4b"), Prefix(), [5, 6, 7]
    graphs = []
    for _ in range(3):
        session = Session(model, [ids], max_new_tokens=4, prefix=prefix)
        ids = ids + [step[0].id for step in session.run()] + [9]
        graphs.append(prefix.graph)
    assert graphs[0] is not None and graphs[0] is graphs[1] is graphs[2]
    prefix.cache = None  # an interrupt lost it
    list(Session(model, [ids], max_new_tokens=2, prefix=prefix).run())
    assert prefix.graph is not graphs[0]


# ---- what one generation leaves to the next ----


def tokens_of(model: Gemma4, *prompts: list[int], new: int = 5) -> list[list[int]]:
    return [g.token_ids for g in model.generate([list(p) for p in prompts], max_new_tokens=new, stop_token_ids=[])]


class Forgetful(Spares):
    def give(self, graph: DecodeGraph) -> None:
        pass


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Gemma4, Gemma4]:
    """The same model twice: one keeps what its generations leave, one never does."""
    monkeypatch.setattr(Spares, "SHARE", 0.01)  # small as these models are, their caches are not small beside them
    kept, fresh = model_of("26b-a4b"), model_of("26b-a4b")
    fresh.spares = Forgetful()
    return kept, fresh


def test_the_next_generation_replays_the_last_ones_step(pair: tuple[Gemma4, Gemma4], replays: list[int]) -> None:
    model, fresh = pair
    first = tokens_of(model, [5, 6, 7])
    assert first == tokens_of(fresh, [5, 6, 7])
    replays.clear()
    for prompt in ([9, 4], [5, 6, 7], list(range(40, 90))):
        before = len(replays)
        assert tokens_of(model, prompt) == tokens_of(fresh, prompt)
        assert len(replays) - before == 4 + 2  # all of its steps; a fresh one runs the first op by op, and records the second
    assert len(set(replays)) == 1 + 3


def test_a_spare_serves_as_many_prompts_as_it_was_made_for(pair: tuple[Gemma4, Gemma4]) -> None:
    model, fresh = pair
    for prompts in ([[5, 6]], [[5, 6], [7]], [[8]], [[8]], [[7] * 297], [[4, 9]]):
        assert tokens_of(model, *prompts) == tokens_of(fresh, *prompts)
    assert {n: g.cache.max_len for n, g in model.spares._graphs.items()} == {1: 512, 2: 256}


def test_what_a_generation_left_in_a_cache_is_not_seen(pair: tuple[Gemma4, Gemma4]) -> None:
    model, fresh = pair
    tokens_of(model, [5, 6, 7])
    for layer in model.spares._graphs[1].cache._layers:
        for values in (layer.k, layer.v):
            if values is not None:
                values[:, : 3 + 5].fill_(float("nan"))
    with use_backend("torch"):  # whose products with masked slots are not left out
        assert tokens_of(model, [5, 6, 7]) == tokens_of(fresh, [5, 6, 7])


def test_new_weights_are_seen_however_they_came(pair: tuple[Gemma4, Gemma4]) -> None:
    def scaled(m: Gemma4) -> Tensor:
        return torch.randn(m.model.norm.weight.shape, generator=torch.Generator().manual_seed(1)).exp()

    def in_place(m: Gemma4) -> None:
        m.model.norm.weight.copy_(scaled(m))

    def replaced(m: Gemma4) -> None:
        m.model.norm.weight = torch.nn.Parameter(scaled(m) * 2, requires_grad=False)

    def behind_its_back(m: Gemma4) -> None:
        m.model.norm.weight.data = scaled(m) + 1

    model, fresh = pair
    seen = [tokens_of(model, [5, 6, 7])]
    for change in (in_place, replaced, behind_its_back, lambda m: m.quantize("int8"), lambda m: m.to(torch.bfloat16)):
        for m in pair:
            change(m)
        seen.append(tokens_of(model, [5, 6, 7]))
        assert seen[-1] == tokens_of(fresh, [5, 6, 7])
    assert len({str(s) for s in seen}) > 3


def test_two_streams_at_once_do_not_share_a_cache(pair: tuple[Gemma4, Gemma4]) -> None:
    from gemma4_fast.generate import Session

    model, fresh = pair
    tokens_of(model, [5, 6, 7])
    sessions = [Session(model, [ids], max_new_tokens=5, stop_token_ids=[]).run() for ids in ([5, 6, 7], [9, 4])]
    steps = list(zip(*sessions, strict=True))
    for i, ids in enumerate(([5, 6, 7], [9, 4])):
        assert [[step[i][0].id for step in steps]] == tokens_of(fresh, ids)


def test_no_more_is_kept_than_is_small_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("26b-a4b")
    monkeypatch.setattr(Spares, "SHARE", 1000)
    tokens_of(model, [5, 6, 7])
    assert len(model.spares) == 0
    weights, one = sum(p.nbytes for p in model.parameters()), model.new_cache(1, 256).nbytes
    monkeypatch.setattr(Spares, "SHARE", weights / (3.5 * one))
    for prompts in ([[5]], [[5], [6]], [[5]], [[5], [6], [7]]):
        tokens_of(model, *prompts)
    assert list(model.spares._graphs) == [3]  # three sequences' room: the others had to go
    tokens_of(model, [5])
    assert list(model.spares._graphs) == [1]
    model.to(torch.bfloat16)
    assert len(model.spares) == 0


def test_nothing_is_kept_of_a_generation_that_was_cut_off_or_recorded_nothing(pair: tuple[Gemma4, Gemma4]) -> None:
    model, _ = pair
    tokens_of(model, [5, 6, 7], new=1)
    with use_backend("torch"):
        tokens_of(model, [5, 6, 7])
    assert len(model.spares) == 0
    norm = model.model.norm.weight
    kept = norm.clone()
    norm.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        tokens_of(model, [5, 6, 7])
    assert len(model.spares) == 0
    norm.copy_(kept)
    stream = model.generate([5, 6, 7], max_new_tokens=5, stop_token_ids=[])
    assert len(model.spares) == 1 and stream.token_ids  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["moved", "replaced"])
def test_a_model_that_changes_during_a_generation_keeps_nothing_of_it(change: str, pair: tuple[Gemma4, Gemma4]) -> None:
    from gemma4_fast.generate import Session

    for model in pair:
        run = Session(model, [[5, 6, 7]], max_new_tokens=9, stop_token_ids=[]).run()
        for _ in range(4):
            next(run)
        if change == "moved":
            model.to(torch.bfloat16)
        else:
            weight = torch.randn(model.model.norm.weight.shape, generator=torch.Generator().manual_seed(1)).exp()
            model.model.norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        run.close()  # type: ignore[attr-defined]
    model, fresh = pair
    assert tokens_of(model, [5, 6, 7]) == tokens_of(fresh, [5, 6, 7])


def test_greedy_and_sampled_generations_have_a_recording_each(pair: tuple[Gemma4, Gemma4], replays: list[int]) -> None:
    model, fresh = pair
    for temperature in (0.0, 1.0, 0.0, 1.0, 0.0):
        options: dict[str, Any] = dict(max_new_tokens=5, stop_token_ids=[], temperature=temperature, seed=3)
        wanted = fresh.generate([5, 6, 7], **options)
        replays.clear()
        assert model.generate([5, 6, 7], **options).token_ids == wanted.token_ids  # type: ignore[union-attr]
    assert len(replays) == 4 and len(set(replays)) == 1


def test_times_that_somebody_asked_for_do_not_stay(pair: tuple[Gemma4, Gemma4]) -> None:
    from gemma4_fast.generate import Session

    model, _ = pair
    session = Session(model, [[5, 6, 7]], max_new_tokens=6, stop_token_ids=[])
    times: dict[str, float] = {}
    for _ in session.run():
        assert session.graph is not None
        session.graph.times = times
    seen = dict(times)
    assert seen
    tokens_of(model, [5, 6, 7])
    assert times == seen


def test_a_spare_neither_keeps_its_model_alive_nor_is_copied(pair: tuple[Gemma4, Gemma4]) -> None:
    model, _ = pair
    wanted = tokens_of(model, [5, 6, 7])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(copied.spares) == 0 and tokens_of(copied, [5, 6, 7]) == wanted
    alone = model_of("26b-a4b")
    tokens_of(alone, [5, 6, 7])
    assert len(alone.spares) == 1
    gc.disable()
    try:
        there = weakref.ref(alone.model.embed_tokens.weight)
        del alone
        assert there() is None
    finally:
        gc.enable()


def _old_states(self: Any, made: list[Tensor], cache: Any) -> Tensor:
    return made[0]


def _counts_twice(self: Any, made: list[Tensor], cache: Any) -> Tensor:
    cache.lens += 1
    return made[-1]


def _first_id(self: Any, made: list[Tensor], cache: Any) -> Tensor:
    return made[-1] * 0 if made[-1].dtype == torch.int64 else made[-1]


def _nobody_stops(self: Any, made: list[Tensor], cache: Any) -> Tensor:
    cache.lens += 1 - self.inputs.going
    return made[-1]


def _one_bit(self: Any, made: list[Tensor], cache: Any) -> Tensor:
    out = made[-1]
    if out.dim() == 2:
        smallest = out[0].abs().argmin()
        out[0, smallest] *= 1.0079  # the next number in bf16
    return out


@pytest.mark.parametrize(
    "fault, phase",
    [(None, ""), (_old_states, "decode"), (_counts_twice, "decode"), (_first_id, "greedy"), (_nobody_stops, "decode"),
     (_one_bit, "decode")],
)  # fmt: skip
def test_the_self_check_compares_the_recorded_step(fault: Any, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_fast import graph

    replay, init, caches, made = _Recording.replay, DecodeGraph.__init__, list[Any](), list[Tensor]()

    def noted(self: Any, model: Any, cache: Any) -> None:
        caches.append(cache)
        init(self, model, cache)

    def wrong(self: Any, *args: Any) -> Tensor:
        made.append(replay(self, *args).clone())
        return fault(self, made, caches[-1])

    if fault is not None:
        monkeypatch.setattr(graph.DecodeGraph, "__init__", noted)
        monkeypatch.setattr(graph._Recording, "replay", wrong)
    model = model_of("26b-a4b", torch.bfloat16)
    report = verify(model, level="full")
    rows = {c.phase: c for c in report.comparisons if c.what == "recorded step"}
    assert set(rows) == {"decode", "greedy"} and report.ok == (fault is None)
    if fault is not None:
        assert report.first_wrong is rows[phase]
    with use_backend("torch"):
        assert not [c for c in verify(model, level="full").comparisons if c.what == "recorded step"]


def test_the_next_generation_tries_again_what_could_not_be_captured(
    gpu: type[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma4_fast import graph

    def captured(*args: Any) -> Captured:
        tries.append(full[0])
        if full[0]:
            raise torch.OutOfMemoryError
        return Captured(*args)

    tries, full = list[bool](), [False]
    monkeypatch.setattr(graph, "_Captured", captured)
    monkeypatch.setattr(Spares, "SHARE", 0.01)
    model = model_of("26b-a4b")
    with use_backend("torch"):
        for full[0], temperature in ((False, 0.0), (True, 1.0), (False, 1.0)):
            model.generate([5, 6, 7], max_new_tokens=6, stop_token_ids=[], temperature=temperature)
    assert tries == [False, True, False]


def test_a_dropped_graph_frees_what_it_reads_at_once(gpu: type[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory is not what Python's collector of cycles looks at."""
    from gemma4_fast import graph

    class OutputAlone:
        def __init__(self, step: Any, inputs: Any, reads: Any) -> None:
            self.reads, self.output = reads, step()

        def replay(self, *_: Any) -> Tensor:
            return self.output

    monkeypatch.setattr(graph, "_Captured", OutputAlone)
    monkeypatch.setattr(Spares, "SHARE", 0.01)
    model = model_of("26b-a4b")
    gc.collect()
    gc.disable()
    try:
        with use_backend("torch"):
            tokens_of(model, [5, 6, 7])
        (kept,) = (weakref.ref(g.cache) for g in model.spares._graphs.values())
        model.spares.clear()
        assert kept() is None
        with use_backend("torch"):
            tokens_of(model, [5, 6, 7])
        weight = weakref.ref(model.model.embed_tokens.weight)
        assert len(model.spares) == 1
        del model
        assert weight() is None
    finally:
        gc.enable()
