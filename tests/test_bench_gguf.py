"""GGUF files: every tensor of every member under llama.cpp's name, with its values, and what llama.cpp reads beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family import MEMBERS
from transformers import Gemma4TextConfig

from gemma4_fast import Gemma4, Gemma4Config
from gemma4_fast.bench.gguf_file import _q6_k, gguf_name, write_gguf
from gemma4_fast.errors import UnsupportedError

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

# Sharing begins after a full layer, as in the published models.
SHARED = {"e2b": 5, "e4b": 6}


def small(member: str, **more: Any) -> Gemma4Config:
    config = Gemma4Config.from_dict(Gemma4TextConfig(**MEMBERS[member]).to_dict())
    return dataclasses.replace(config, **{"num_kv_shared_layers": SHARED.get(member, 0), **more})


def saved(config: Gemma4Config, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Gemma4:
    model = Gemma4.dummy(config, dtype=dtype, device="cpu")
    model.save_pretrained(folder, **options)
    return model


def read(file: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def values(tensor: Any) -> torch.Tensor:
    """fp32, in the shape PyTorch gives it: GGUF lists dimensions from the innermost."""
    flat = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
    return torch.from_numpy(flat).reshape(*map(int, reversed(tensor.shape)))


@pytest.mark.parametrize("member", MEMBERS)
def test_tensors(member: str, tmp_path: Path) -> None:
    model = saved(config := small(member), tmp_path / "model")
    found = read(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    factors = values(found.pop("rope_freqs.weight"))
    turning = config.global_head_dim // 8
    assert factors.tolist() == [1.0] * turning + [pytest.approx(1e30)] * (3 * turning)

    state = model.state_dict()
    assert set(found) == {gguf_name(name) for name in state}
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA4]}
    for name, t in state.items():
        stored = found[gguf_name(name)]
        wide = t.dim() == 1 or "router" in name
        assert stored.tensor_type == (Type.F32 if wide else Type.BF16), name
        assert torch.equal(values(stored), t.float()), name
        stem = gguf_name(name).rpartition(".")[0]
        assert ".".join("{bid}" if p.isdecimal() else p for p in stem.split(".")) in known, name


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("member", MEMBERS)
def test_quantized(member: str, quantize: str, tmp_path: Path) -> None:
    """int8 and int4 have steps of 1/127 and 1/8 of the largest of 32 numbers; the tied table stays wide."""
    model = saved(small(member), tmp_path / "model")
    found = read(write_gguf(tmp_path / "model", tmp_path / "model.gguf", quantize))
    for name, t in model.state_dict().items():
        stored = found[gguf_name(name)]
        if t.dim() == 1 or "router" in name:
            expected, steps = Type.F32, None
        elif "per_layer_model_projection" in name:
            expected, steps = Type.BF16, None
        elif quantize == "int8" or "embed_tokens" in name:
            expected, steps = Type.Q8_0, 127
        else:
            expected, steps = Type.Q4_0, 8
        assert stored.tensor_type == expected, name
        got, t = values(stored), t.float()
        if steps is None:
            assert torch.equal(got, t), name
            continue
        largest = t.reshape(-1, 32).abs().amax(-1, keepdim=True)
        # Half a step; a whole one where the range of 4 bits, -8 to 7, cuts a number off. 2^-10: the step is rounded to fp16.
        bound = largest * ((0.5 if steps == 127 else 1.0) / steps + 2.0**-10)
        assert ((got - t).reshape(-1, 32).abs() <= bound).all(), name


@pytest.mark.parametrize("tied", [True, False])
def test_4_bit_tables(tied: bool, tmp_path: Path) -> None:
    """Wide for the table that gives the logits, as llama.cpp's quantizer does it."""
    model = saved(small("12b", hidden_size=256, tie_word_embeddings=tied), tmp_path / "model")
    found = read(write_gguf(tmp_path / "model", tmp_path / "model.gguf", "int4"))
    assert found["token_embd.weight"].tensor_type == (Type.Q6_K if tied else Type.Q4_0)
    head = "token_embd.weight" if tied else "output.weight"
    assert found[head].tensor_type == Type.Q6_K
    t = model.state_dict()["model.embed_tokens.weight" if tied else "lm_head.weight"].float()
    assert (values(found[head]) - t).square().mean().sqrt() < 0.02 * t.std()


def test_q6_k() -> None:
    """Half of the step of each 16 numbers, and 1/32 where the range cuts off; the steps are a 128th of the largest."""
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-3, 30, 1, 0, 1])[:, None]
    x[3, :16], x[5, 256:] = 0, 0
    got = torch.from_numpy(gguf.quants.dequantize(_q6_k(x.numpy()), Type.Q6_K)).reshape(-1, 16)
    largest, largest_of_256 = x.reshape(-1, 16).abs().amax(-1), x.reshape(-1, 256).abs().amax(-1).repeat_interleave(16)
    error = (got - x.reshape(-1, 16)).abs().amax(-1)
    assert (error <= largest / 32 + largest_of_256 / 256 + 1e-6).all()
    assert (got.reshape(6, 512)[4] == 0).all()


@pytest.mark.parametrize("member", MEMBERS)
def test_metadata(member: str, tmp_path: Path) -> None:
    saved(config := small(member), tmp_path / "model")
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model", tmp_path / "model.gguf", "int4"))
    got = {name.removeprefix("gemma4."): field.contents() for name, field in reader.fields.items()}
    sliding = [t == "sliding_attention" for t in config.layer_types]
    wide = 2 if config.use_double_wide_mlp else 1
    ffn = [96 * (wide if i >= config.first_shared_layer else 1) for i in range(config.num_hidden_layers)]
    expected: dict[str, Any] = {
        "general.architecture": "gemma4",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "tokenizer.ggml.model": "no_vocab",
        "vocab_size": 211,
        "block_count": config.num_hidden_layers,
        "context_length": 512,
        "embedding_length": config.hidden_size,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "feed_forward_length": ffn,
        "final_logit_softcapping": 30.0,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if s else config.num_global_key_value_heads for s in sliding],
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": sliding,
        "rope.dimension_count": 64,
        "rope.dimension_count_swa": 32,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    }
    if config.enable_moe_block:
        expected |= {"expert_count": 16, "expert_used_count": 4, "expert_feed_forward_length": 32}
    assert {name: got.get(name) for name in expected} == expected
    assert ("expert_count" in got) == config.enable_moe_block


def test_no_softcap_is_said(tmp_path: Path) -> None:
    """llama.cpp takes an absent key for 30."""
    saved(small("12b", final_logit_softcapping=None), tmp_path / "model")
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    assert reader.get_field("gemma4.final_logit_softcapping").contents() == 0


def test_sources(tmp_path: Path) -> None:
    """Shards and one file give the same bytes; fp32 is rounded to bf16; surplus rows of per-layer embeddings are left out."""
    config = small("e2b", vocab_size_per_layer_input=300)
    model = saved(config, tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_bytes=200_000)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    calls: list[tuple[int, int]] = []
    one = write_gguf(tmp_path / "one", tmp_path / "one.gguf", progress=lambda done, total: calls.append((done, total)))
    shards = write_gguf(tmp_path / "shards", tmp_path / "shards.gguf")
    assert one.read_bytes() == shards.read_bytes()
    assert calls == sorted(calls) and len(calls) == len(model.state_dict()) and calls[-1][0] == calls[-1][1]
    table = model.state_dict()["model.embed_tokens_per_layer.weight"]
    assert table.shape[0] == 300
    assert torch.equal(values(read(one)["per_layer_token_embd.weight"]), table[:211].float())

    wide = saved(config, tmp_path / "wide", torch.float32)
    found = read(write_gguf(tmp_path / "wide", tmp_path / "wide.gguf"))
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(values(found[gguf_name(name)]), wide.state_dict()[name].bfloat16().float())


def test_interrupted(tmp_path: Path) -> None:
    """No file that could be taken for a whole one, and none left over."""
    saved(small("12b"), tmp_path / "model")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_kv_shared_layers=4), "right after it"),
        (dict(num_kv_shared_layers=0, num_hidden_layers=1, layer_types=("full_attention",)), "sliding layers"),
    ],
)
def test_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """llama.cpp would abort the process that loads them."""
    saved(small("e2b", **change), tmp_path / "model")
    with pytest.raises(UnsupportedError, match=words):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
