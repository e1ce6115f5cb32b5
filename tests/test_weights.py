"""Checkpoints: found, refused with every fault named, loaded in little memory, made up, and saved for transformers."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from bounds import allowed, error
from family import in_fp64
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from streams import Terminal
from test_native import require_native
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from gemma4_fast import weights
from gemma4_fast.config import FULL, SLIDING, Gemma4Config
from gemma4_fast.errors import CheckpointError
from gemma4_fast.model import Gemma4

SMALL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, num_global_key_value_heads=2, head_dim=32, global_head_dim=64, sliding_window=16,
    layer_types=(SLIDING, SLIDING, FULL) * 2, max_position_embeddings=256, vocab_size_per_layer_input=128,
)  # fmt: skip
PLE = dict(hidden_size_per_layer_input=32, num_kv_shared_layers=3)
K_EQ_V = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
MEMBERS: dict[str, Gemma4Config] = {
    name: Gemma4Config(**{**SMALL, **more})  # type: ignore[arg-type]
    for name, more in {
        "e2b": dict(**PLE, num_key_value_heads=1, num_global_key_value_heads=1, use_double_wide_mlp=True),
        "e4b": PLE,
        "12b": K_EQ_V,
        "26b": dict(**K_EQ_V, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=48),
        "31b": dict(**K_EQ_V, num_hidden_layers=9, layer_types=(SLIDING, SLIDING, FULL) * 3),
        "untied": dict(tie_word_embeddings=False),
    }.items()
}


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Gemma4Config:
    return MEMBERS[request.param]


def empty(config: Gemma4Config) -> Gemma4:
    with torch.device("meta"):
        return Gemma4(config)


def made_up(config: Gemma4Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> Gemma4:
    return Gemma4.dummy(config, dtype=dtype, device="cpu", seed=seed)


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> Gemma4:
    model = empty(Gemma4Config.from_pretrained(path))
    weights.load(model, path, device="cpu", dtype=dtype)
    return model


def in_transformers(config: Gemma4Config, **more: Any) -> Gemma4ForCausalLM:
    return Gemma4ForCausalLM(Gemma4TextConfig(**{**config.to_dict(), "dtype": "float32", **more})).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_model(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Both of transformers: equal weights, and logits that differ by rounding alone, by where in memory the weights lie."""
    ids = torch.arange(40).view(2, 20) * 3 % 127
    with torch.no_grad():
        one, two = a(input_ids=ids).logits, b(input_ids=ids).logits
        truth = in_fp64(a, input_ids=ids).logits
    right = error(two, truth) <= allowed(one, truth)
    return same(a.state_dict(), b.state_dict()) and bool(one.std() > 0.1) and right


# ---------------------------------------------------------------- saved here, loaded in transformers, and back
@pytest.mark.parametrize("shard_bytes", [5e9, 60_000], ids=["single", "sharded"])
def test_transformers_loads_what_is_saved(member: Gemma4Config, shard_bytes: float, tmp_path: Path) -> None:
    model = made_up(member)
    model.generation_config = {"temperature": 0.5, "do_sample": True}
    weights.save_pretrained(model, tmp_path / "out", max_shard_bytes=shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs) is Gemma4ForCausalLM and theirs.dtype == torch.float32
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.generation_config.temperature == 0.5
    direct = in_transformers(member)
    direct.load_state_dict(model.state_dict(), strict=not member.tie_word_embeddings)  # tied: the head is the table
    assert same_model(theirs, direct)
    assert same(loaded(tmp_path / "out").state_dict(), model.state_dict())
    assert (tmp_path / "out" / weights.INDEX).exists() == (shard_bytes < 5e9)


def test_what_transformers_saves_loads_here_and_goes_back(member: Gemma4Config, tmp_path: Path) -> None:
    theirs = in_transformers(member)
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    ours = loaded(tmp_path / "theirs")
    assert {n for n in theirs.state_dict() if n in ours.state_dict()} == set(ours.state_dict())
    weights.save_pretrained(ours, tmp_path / "ours")
    assert same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), theirs)


def test_the_dtype_is_converted_and_recorded(tmp_path: Path) -> None:
    full = made_up(MEMBERS["26b"])
    weights.save_pretrained(full, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    half = loaded(tmp_path, torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in half.state_dict().values())
    assert same(half.state_dict(), {k: v.bfloat16() for k, v in full.state_dict().items()})
    weights.save_pretrained(half, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded(tmp_path, torch.float64).state_dict()["model.norm.weight"].dtype == torch.float64


def test_load_into_a_model_that_has_storage(tmp_path: Path) -> None:
    model = made_up(MEMBERS["e2b"])
    weights.save_pretrained(model, tmp_path)
    other = made_up(MEMBERS["e2b"], seed=1)
    q_proj = other.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    weights.load(other, tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(q_proj, model.state_dict()["model.layers.0.self_attn.q_proj.weight"])  # in place
    with pytest.raises(ValueError, match=r"got torch.float32 on cpu, expected torch.bfloat16 on cpu"):
        weights.load(other, tmp_path, device="cpu", dtype=torch.bfloat16)


# ---------------------------------------------------------------- names that load, names that do not
def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file({k: v.clone() for k, v in tensors.items()}, path / weights.SINGLE)
    (path / "config.json").write_text(json.dumps(config))
    return path


def nested(config: Gemma4Config, **towers: Any) -> dict[str, Any]:
    return {"model_type": "gemma4", "text_config": config.to_dict(), **towers}


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    model = made_up(MEMBERS["untied"])
    head = "language_model.lm_head." if prefix.startswith("language_model.") else "lm_head."
    stored = {
        k.replace("model.", prefix, 1) if k.startswith("model.") else k.replace("lm_head.", head): v
        for k, v in model.state_dict().items()
    }
    assert (set(stored) == set(model.state_dict())) == (prefix == "model.")
    assert same(loaded(write(tmp_path, stored, MEMBERS["untied"].to_dict())).state_dict(), model.state_dict())


def test_a_head_beside_a_tied_config_is_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made_up(MEMBERS["12b"])
    stored = {**model.state_dict(), "lm_head.weight": torch.zeros(128, 64)}
    with caplog.at_level(logging.INFO, "gemma4_fast"):
        assert same(loaded(write(tmp_path, stored, MEMBERS["12b"].to_dict())).state_dict(), model.state_dict())
    assert [r.message for r in caplog.records if "lm_head.weight is ignored" in r.message]


TOWERS = (
    "model.vision_tower.encoder.layers.0.q_proj.weight", "model.audio_tower.conv.weight", "vision_tower.std_bias",
    "model.embed_vision.embedding_projection.weight", "model.embed_audio.embedding_projection.weight",
    "model.vision_embedder.patch_dense.weight",
)  # fmt: skip


@pytest.mark.parametrize("has_towers", [True, False])
def test_tower_tensors_are_skipped_only_if_the_config_has_towers(has_towers: bool, tmp_path: Path) -> None:
    model = made_up(MEMBERS["e4b"])
    stored = {**model.state_dict(), **{name: torch.ones(2, dtype=torch.int8) for name in TOWERS}}
    config = nested(MEMBERS["e4b"], **({"vision_config": {}, "audio_config": {}} if has_towers else {}))
    write(tmp_path, stored, config)
    if has_towers:
        assert same(loaded(tmp_path).state_dict(), model.state_dict())
    else:
        with pytest.raises(CheckpointError, match="no vision_config") as caught:
            loaded(tmp_path)
        assert all(name in str(caught.value) for name in TOWERS)


def test_unused_tensors_of_kv_shared_layers_may_be_there(tmp_path: Path) -> None:
    model = made_up(MEMBERS["e2b"])
    state = model.state_dict()
    assert not any(n.startswith("model.layers.3.") and "k_proj" in n for n in state)
    names = [f"self_attn.{n}.weight" for n in ("k_proj", "v_proj", "k_norm", "v_norm")]
    unused = {f"model.layers.{i}.{n}": torch.ones(7) for i in (3, 4, 5) for n in names}
    assert same(loaded(write(tmp_path, {**state, **unused}, MEMBERS["e2b"].to_dict())).state_dict(), state)
    not_shared = {"model.layers.2.self_attn.v_norm.weight": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"1 unexpected tensor: model.layers.2.self_attn.v_norm.weight"):
        loaded(write(tmp_path, {**state, **not_shared}, MEMBERS["e2b"].to_dict()))
    beyond = {"model.layers.6.self_attn.k_proj.weight": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"unexpected tensor: model.layers.6"):
        loaded(write(tmp_path, {**state, **beyond}, MEMBERS["e2b"].to_dict()))


def test_every_fault_is_named_at_once_and_nothing_is_allocated(tmp_path: Path) -> None:
    stored = dict(made_up(MEMBERS["26b"]).state_dict())
    del stored["model.layers.0.router.scale"], stored["model.norm.weight"]
    stored["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    stored["model.layers.2.layer_scalar"] = torch.ones(1, dtype=torch.int32)
    stored["model.layers.3.self_attn.o_proj.weight"] = torch.zeros(64, 128, dtype=torch.float8_e4m3fn)
    stored["model.layers.4.experts.gate_up_proj_scale"] = torch.ones(8)
    stored["model.language_model.layers.5.layer_scalar"] = torch.ones(1)
    model = empty(MEMBERS["26b"])
    with pytest.raises(CheckpointError) as caught:
        weights.load(model, write(tmp_path, stored, {}), device="cpu", dtype=torch.float32)
    text = str(caught.value)
    for words in (
        "2 missing tensors: ", "model.layers.0.router.scale", "model.norm.weight",
        "1 unexpected tensor: model.layers.4.experts.gate_up_proj_scale",
        "1 misshaped tensor: model.layers.1.mlp.up_proj.weight (got [3, 5], expected [96, 64])",
        "2 tensors not in F64/F32/F16/BF16: ",
        "model.layers.2.layer_scalar (got I32)", "model.layers.3.self_attn.o_proj.weight (got F8_E4M3)",
        "model.layers.5.layer_scalar is stored twice", str(tmp_path),
    ):  # fmt: skip
        assert words in text, text
    assert "\n" not in text and all(t.is_meta for t in model.state_dict().values())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.zeros(1)}, {})
    n = len(empty(MEMBERS["31b"]).state_dict())
    with pytest.raises(CheckpointError, match=rf"{n} missing tensors: .*, ... and {n - 20} more; 1 unexpected tensor: x"):
        weights.load(empty(MEMBERS["31b"]), tmp_path, device="cpu", dtype=torch.float32)


# ---------------------------------------------------------------- broken folders and files
def sharded(path: Path) -> dict[str, Any]:
    weights.save_pretrained(made_up(MEMBERS["12b"]), path, max_shard_bytes=100_000)
    return json.loads((path / weights.INDEX).read_text())


def shard(path: Path, number: int) -> Path:
    return sorted(path.glob("model-*.safetensors"))[number]


def _reindex(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / weights.INDEX).read_text())
    change(index["weight_map"])
    (path / weights.INDEX).write_text(json.dumps(index))


def _copy_tensor(path: Path) -> None:
    name = next(iter(load_file(shard(path, 0))))
    save_file({**load_file(shard(path, 1)), name: torch.zeros(1)}, shard(path, 1))


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda p: shard(p, 1).write_bytes(b""), r"model-00002-of-\d+.safetensors: .*0 bytes"),
    "truncated data": (lambda p: os.truncate(shard(p, 1), shard(p, 1).stat().st_size - 1), r"model-00002.*cut short"),
    "truncated header": (lambda p: os.truncate(shard(p, 0), 20), r"model-00001.*20 bytes"),
    "longer than it says": (lambda p: shard(p, 0).open("ab").write(b"x"), "model-00001"),
    "garbage header": (lambda p: shard(p, 0).write_bytes(b"\x10" + b"\0" * 7 + b"{garbage" * 9), "model-00001"),
    "huge header": (lambda p: shard(p, 0).write_bytes(b"\xff" * 99), "model-00001"),
    "git-lfs pointer": (lambda p: shard(p, 0).write_text("version https://git-lfs.github.com/spec"), "git lfs pull"),
    "missing shards": (lambda p: [shard(p, i).unlink() for i in (2, 0)], "2 missing shards: model-00001.*model-00003"),
    "index not JSON": (lambda p: (p / weights.INDEX).write_text("{"), r"index.json: not valid JSON"),
    "index not UTF-8": (lambda p: (p / weights.INDEX).write_bytes(b"\xff{}"), r"index.json: cannot be read"),
    "index a list": (lambda p: (p / weights.INDEX).write_text("[]"), "expected a JSON object, got list"),
    "index without map": (lambda p: (p / weights.INDEX).write_text("{}"), "expected a 'weight_map'"),
    "index of numbers": (lambda p: _reindex(p, lambda m: m.update({NORM: 3})), "expected a 'weight_map'"),  # type: ignore[dict-item]
    "absent tensor": (
        lambda p: _reindex(p, lambda m: m.update(ghost=m[NORM])), r"1 tensor: ghost \(not in model-.*\) that the"),
    "wrong shard": (lambda p: _reindex(p, lambda m: m.update({NORM: shard(p, 0).name})), "1 tensor: model.norm.weight"),
    "in two shards": (_copy_tensor, r"'model.* is in two shards, model-00001.*safetensors and model-00002"),
    "path upwards": (lambda p: _reindex(p, lambda m: m.update({NORM: "../x.safetensors"})), r"'../x.*' .*refused"),
    "absolute path": (lambda p: _reindex(p, lambda m: m.update({NORM: "/etc/passwd"})), "'/etc/passwd' .*refused"),
    "other slashes": (lambda p: _reindex(p, lambda m: m.update({NORM: "..\\x"})), "refused"),
    "parent": (lambda p: _reindex(p, lambda m: m.update({NORM: ".."})), r"'..' .*refused"),
    "no index": (lambda p: (p / weights.INDEX).unlink(), "holds model-00001.* but neither model.safetensors nor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_checkpoints(fault: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    assert loaded(tmp_path) is not None
    breaks, words = FAULTS[fault]
    breaks(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        loaded(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="this package never unpickles"):
        weights.read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / weights.SINGLE)
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        weights.read_headers(tmp_path)
    (tmp_path / weights.SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        weights.read_headers(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        weights.read_headers(tmp_path / "nowhere")


def test_generation_config(tmp_path: Path) -> None:
    assert weights.load_generation_config(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"top_k": 3}')
    assert weights.load_generation_config(tmp_path) == {"top_k": 3}
    for broken, words in (("{", "not valid JSON"), ("3", "expected a JSON object"), ("[" * 10**5, "not valid JSON")):
        file.write_text(broken)
        with pytest.raises(CheckpointError, match=f"generation_config.json: {words}"):
            weights.load_generation_config(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("eos_token_id", 999999), ("eos_token_id", [1, 128]), ("eos_token_id", "x"), ("eos_token_id", -1),
        ("eos_token_id", {"a": 1}), ("eos_token_id", True), ("temperature", "hot"), ("temperature", -1), ("top_k", 1.5),
        ("top_p", 2), ("min_p", "x"), ("do_sample", "yes"),
    ],
)  # fmt: skip
def test_wrong_values_in_generation_config_are_told_at_load(key: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {key}"):
        weights.load_generation_config(tmp_path, vocab_size=128)
    good = {"eos_token_id": [1, 127], "temperature": None, "top_k": 0, "top_p": 1.0, "do_sample": False}
    file.write_text(json.dumps(good))
    assert weights.load_generation_config(tmp_path, vocab_size=128) == good
    file.write_text('{"eos_token_id": 128}')
    assert weights.load_generation_config(tmp_path) == {"eos_token_id": 128}  # without the vocabulary's size no one can tell


# ---------------------------------------------------------------- finding
def test_resolve_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert weights.resolve("tiny") == weights.tiny_path() and (weights.tiny_path() / "config.json").exists()
    assert weights.resolve("./tiny") == Path("tiny")
    assert weights.resolve("org/name") == Path("org/name")
    assert weights.resolve(tmp_path) == tmp_path
    for text in ("./nowhere", "/no/where", "nowhere", "a/b/c", "~/no where", "../x", "no/", Path("some/where")):
        with pytest.raises(CheckpointError, match="no such folder"):
            weights.resolve(text)
    with pytest.raises(CheckpointError, match="empty"):
        weights.resolve("")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        weights.resolve("file")
    for bad in (3, None, b"tiny"):
        with pytest.raises(ValueError, match=f"expected a path or hub id, got {type(bad).__name__}"):
            weights.resolve(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a path or hub id, got int"):
        Gemma4.from_pretrained(3)  # type: ignore[arg-type]


HUB_ERRORS = {
    errors.GatedRepoError: "is gated on the hub: accept its licence at https://huggingface.co/org/name",
    errors.RepositoryNotFoundError: "neither a folder here nor a model on the hub",
    errors.RevisionNotFoundError: "has no revision 'v9'",
    errors.LocalEntryNotFoundError: "the hub cannot be reached; give the path of a local folder",
    errors.OfflineModeIsEnabled: "the hub cannot be reached",
    errors.HFValidationError: "nor a valid hub id",
    errors.HfHubHTTPError: "could not be fetched from the hub: the details",
    errors.HTTPError: "could not be fetched from the hub: the details",
    PermissionError: "could not be fetched from the hub: the details",
}


@pytest.mark.parametrize("kind", HUB_ERRORS, ids=lambda kind: kind.__name__)
def test_hub_errors_are_one_clear_line(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        error = kind.__new__(kind)
        Exception.__init__(error, "the\n\ndetails")  # past its own __init__, which wants a server's response
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=HUB_ERRORS[kind]) as caught:
        weights.resolve("org/name", revision="v9")
    assert "\n" not in str(caught.value) and "org/name" in str(caught.value)


def test_hub_download_asks_for_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **k: asked.update(k, repo=repo) or str(tmp_path))
    assert weights.resolve("org/name", revision="main", local_files_only=True) == tmp_path
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("org/name", "main", True)
    only = {k: asked[k] for k in ("allow_patterns", "ignore_patterns")}
    files = ["config.json", "model-1.safetensors", "chat_template.jinja", "tokenizer.json", weights.INDEX]
    never = ["pytorch_model.bin", "x.pt", "model.py", "original/model.safetensors", "a.pkl", "model.gguf"]
    assert list(huggingface_hub.utils.filter_repo_objects(files + never, **only)) == files
    told: list[str] = []
    weights.resolve("org/name", patterns=("config.json",), on_download=told.append)
    assert asked["allow_patterns"] == ["config.json"] and told == ["org/name"]


def test_not_in_the_cache_and_no_network() -> None:
    with pytest.raises(CheckpointError, match="not in the hub's cache, and downloads are switched off"):
        weights.resolve("no-such-org/no-such-name", local_files_only=True)


# ---------------------------------------------------------------- memory and progress
PEAK = """
import re, sys, threading
from pathlib import Path
import torch
from gemma4_fast.config import Gemma4Config
from gemma4_fast.model import Gemma4
from gemma4_fast import weights
from gemma4_fast.quant import QuantizedWeight

def resident():  # anonymous memory, and pages of files
    status = Path("/proc/self/status").read_text()
    return [int(re.search(kind + r":\\s+(\\d+)", status)[1]) * 1024 for kind in ("RssAnon", "RssFile")]

path = Path(sys.argv[1])
torch.zeros(10**6).bfloat16().sum()  # starts the thread pool
torch.empty_like(torch.empty(1, device="meta"), device="cpu")  # imports 30 MB of torch
with torch.device("meta"):
    model = Gemma4(Gemma4Config.from_pretrained(path))
if sys.argv[2] in ("int8", "int4"):
    model.to(torch.bfloat16).quantize(sys.argv[2])
    QuantizedWeight.of(torch.ones(1, 1), 4)  # loads the kernels
before, peak, stop = resident(), [0, 0], threading.Event()

def watch():
    global peak
    while not stop.wait(0.0005):
        peak = [max(now) for now in zip(peak, resident())]

thread = threading.Thread(target=watch)
thread.start()
if sys.argv[2] != "all at once":
    weights.load(model, path, device="cpu", dtype=torch.bfloat16)
else:  # what the test must catch
    from safetensors.torch import load_file
    state = {k: v.bfloat16().clone() for f in path.glob("*.safetensors") for k, v in load_file(f).items()}
    model.to(torch.bfloat16).to_empty(device="cpu")
    for k, v in model.state_dict().items():
        v.copy_(state[k])
stop.set()
thread.join()
print(*(p - b for p, b in zip(peak, before)), sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 to bf16", "bf16 to bf16"])
def test_peak_memory_is_the_result_plus_one_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = dict(vocab_size=16384, hidden_size=1024, intermediate_size=4096, head_dim=128, global_head_dim=256)
    layers = dict(num_hidden_layers=3, layer_types=(SLIDING, SLIDING, FULL))
    config = dataclasses.replace(MEMBERS["12b"], **sizes, **layers)  # type: ignore[arg-type]
    model = made_up(config, dtype)
    weights.save_pretrained(model, tmp_path, max_shard_bytes=60e6)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    layer = sum(t.nbytes for n, t in model.state_dict().items() if n.startswith("model.layers.0."))
    assert layer < 0.25 * sum(t.nbytes for t in model.state_dict().values())
    del model
    excess = {}
    for how in ("stream", "all at once") if dtype == torch.float32 else ("stream",):
        run = subprocess.run([sys.executable, "-c", PEAK, tmp_path, how], capture_output=True, text=True, check=True)
        peak, _, result = map(int, run.stdout.split())
        excess[how] = peak - result
    assert result > 100e6 and excess["stream"] < layer < excess.get("all at once", result)


def test_a_checkpoint_larger_than_the_model_streams_through(tmp_path: Path) -> None:
    """One file of 435 MB in bf16: what is resident of it, and of temporary memory, is one tensor and not the whole."""
    require_native()
    sizes = dict(vocab_size=4096, hidden_size=2048, intermediate_size=16384, head_dim=128, global_head_dim=256)
    layers = dict(num_hidden_layers=2, layer_types=(SLIDING, FULL))
    config = dataclasses.replace(MEMBERS["12b"], **sizes, **layers)  # type: ignore[arg-type]
    model = empty(config).to(torch.bfloat16).to_empty(device="cpu")
    for t in model.state_dict().values():
        t.fill_(0.5)  # random values would take longer than all the rest
    weights.save_pretrained(model, tmp_path)
    file, largest = (tmp_path / "model.safetensors").stat().st_size, max(t.nbytes for t in model.state_dict().values())
    del model
    assert file > 400e6 and largest < 0.2 * file
    for how, share in (("int4", 0.3), ("int8", 0.55), ("stream", 1.0)):
        run = subprocess.run([sys.executable, "-c", PEAK, tmp_path, how], capture_output=True, text=True, check=True)
        anonymous, mapped, result = map(int, run.stdout.split())
        print(f"{how}: file {file >> 20} MiB, weights {result >> 20}, peak anonymous {anonymous >> 20}, mapped {mapped >> 20}")
        assert result < share * file
        assert result * 0.9 < anonymous <= result + largest  # a peak below the result would be one that was not seen
        assert mapped <= 1.5 * largest  # with what the code itself needs of libraries


def test_progress_goes_to_a_terminal_on_stderr_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sharded(tmp_path)
    model = empty(MEMBERS["12b"])

    def shown(stream: io.StringIO, progress: bool) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        weights.load(model, tmp_path, device="cpu", dtype=torch.float32, progress=progress)
        return stream.getvalue()

    assert shown(Terminal(), True) == ""  # small
    monkeypatch.setattr(weights, "_PROGRESS_FROM_BYTES", 1000)
    assert "loading" in shown(Terminal(), True)
    assert shown(Terminal(), False) == ""
    assert shown(io.StringIO(), True) == ""
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- dummy weights
def test_dummy_depends_on_seed_and_name_alone() -> None:
    full, again, other = (made_up(MEMBERS["e2b"], seed=s).state_dict() for s in (0, 0, 1))
    assert same(full, again) and not any(torch.equal(full[k], other[k]) for k in full)
    half = made_up(MEMBERS["e2b"], torch.bfloat16).state_dict()
    assert same(half, {k: v.bfloat16() for k, v in full.items()})
    alone = made_up(dataclasses.replace(MEMBERS["e2b"], num_kv_shared_layers=0, use_double_wide_mlp=False)).state_dict()
    assert len(alone) > len(full)
    assert all(torch.equal(alone[k], full[k]) for k in full if alone[k].shape == full[k].shape)
    assert len({t.flatten()[0].item() for t in full.values()}) == len(full)  # no two tensors drawn alike
    with pytest.raises(ValueError, match="meta device"):
        weights.dummy(empty(MEMBERS["e2b"]))


def test_dummy_scales() -> None:
    moe, ple = made_up(MEMBERS["26b"]).state_dict(), made_up(MEMBERS["e4b"]).state_dict()
    for state, name, std in (
        (moe, "model.embed_tokens.weight", 64**-0.5), (moe, "model.layers.0.self_attn.q_proj.weight", 64**-0.5),
        (moe, "model.layers.0.self_attn.o_proj.weight", 128**-0.5), (moe, "model.layers.0.experts.down_proj", 48**-0.5),
        (moe, "model.layers.0.mlp.down_proj.weight", 96**-0.5), (moe, "model.layers.0.experts.gate_up_proj", 64**-0.5),
        (moe, "model.layers.0.router.proj.weight", 1.0), (ple, "model.embed_tokens_per_layer.weight", 32**-0.5),
    ):  # fmt: skip
        assert state[name].std().item() == pytest.approx(std, rel=0.15), name
        assert abs(state[name].mean().item()) < 0.2 * std
    for state in (moe, ple):
        for name, t in state.items():
            if name.endswith("layer_scalar"):
                assert 0.5 <= t.item() <= 1.0
            elif t.dim() == 1:
                scale = t.shape[0] ** -0.25 if "self_attn" in name else 0.5 if "post_attention" in name else 1.0
                assert t.mean().item() == pytest.approx(scale, rel=0.15) and 0.03 < t.std() / scale < 0.2, name


def test_large_tensors_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    real = torch.empty

    def empty_spy(*size: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        made = real(*size, **kwargs)
        largest = max(largest, made.numel())
        return made

    model = made_up(MEMBERS["26b"])
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    monkeypatch.setattr(torch, "empty", empty_spy)
    weights.dummy(model)
    assert largest == 2 * 48 * 64  # one expert of gate_up_proj: rows of the first dimension are not cut


@pytest.mark.parametrize(("name", "layers"), [("26b", 30), ("e2b", 35), ("31b", 60)])
def test_dummy_models_behave(name: str, layers: int) -> None:
    """In bf16 through the true number of layers: finite, at unit scale, and the logits depend on the text."""
    period = len(MEMBERS[name].layer_types) // 2
    types = ((SLIDING,) * (period - 1) + (FULL,)) * layers
    shared = 20 if name == "e2b" else 0
    config = dataclasses.replace(
        MEMBERS[name],
        num_hidden_layers=layers,
        layer_types=types[-layers:],
        num_kv_shared_layers=shared,
        vocab_size=512,
        vocab_size_per_layer_input=512,
    )
    theirs = in_transformers(config, dtype="bfloat16").bfloat16()
    theirs.load_state_dict(made_up(config, torch.bfloat16).state_dict(), strict=False)
    ids = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = theirs(input_ids=ids, output_hidden_states=True)
    for hidden in out.hidden_states:
        rms = hidden.float().pow(2).mean(-1).sqrt()
        assert hidden.isfinite().all() and rms.min() > 0.2 and rms.max() < 6
    logits = out.logits.float()
    assert logits.std(-1).min() > 0.5 and logits.std(-1).max() < 2  # of the softcap's 30
    assert (logits.argmax(-1) == ids).float().mean() < 0.5  # does not just repeat
    alike = torch.corrcoef(logits[0])[~torch.eye(48, dtype=torch.bool)]
    assert alike.mean() < 0.6 and alike.max() < 0.95  # nor say one thing always
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 0.5 * torch.tensor(512.0).log() < entropy.mean() < 0.99 * torch.tensor(512.0).log()


# ---------------------------------------------------------------- saving over something
def test_saving_over_a_checkpoint_leaves_no_old_part(tmp_path: Path) -> None:
    sharded(tmp_path)
    for name in ("README.md", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("old")
    model = made_up(MEMBERS["26b"])
    weights.save_pretrained(model, tmp_path)
    kept = {"config.json", weights.SINGLE, "README.md", "tokenizer.json", "chat_template.jinja"}
    assert {f.name for f in tmp_path.iterdir()} == kept
    assert same(loaded(tmp_path).state_dict(), model.state_dict())
    weights.save_pretrained(model, tmp_path, max_shard_bytes=50_000)
    assert not (tmp_path / weights.SINGLE).exists()
    assert same(loaded(tmp_path).state_dict(), model.state_dict())

    source = tmp_path / "tok"
    source.mkdir()
    (source / "tokenizer.json").write_text("new")
    (source / "unrelated.json").write_text("x")
    weights.save_pretrained(model, tmp_path, tokenizer_from=source)
    assert (tmp_path / "tokenizer.json").read_text() == "new" and not (tmp_path / "chat_template.jinja").exists()
    assert not (tmp_path / "unrelated.json").exists()
    weights.save_pretrained(model, tmp_path, tokenizer_from=tmp_path)  # onto itself
    assert (tmp_path / "tokenizer.json").read_text() == "new"
    weights.save_pretrained(model, tmp_path, tokenizer_from=tmp_path / "nowhere")  # a checkpoint without a tokenizer
    assert (tmp_path / "tokenizer.json").read_text() == "new"


@pytest.mark.parametrize("shard_bytes", [5e9, 100_000], ids=["single", "sharded"])
def test_an_interrupted_save_leaves_the_old_checkpoint_or_none(
    shard_bytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at every file that is written and every file that is moved into place."""
    old, new = made_up(MEMBERS["12b"]), made_up(MEMBERS["12b"], seed=1)
    outcomes = []
    for target, attribute in (("safetensors.torch", "save_file"), ("os", "replace")):
        module = sys.modules[target]
        real = getattr(module, attribute)
        for survive in range(40):
            path = tmp_path / f"{attribute}{survive}"
            weights.save_pretrained(old, path, max_shard_bytes=150_000)
            left = survive

            def interrupted(*args: Any, **kwargs: Any) -> None:
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                real(*args, **kwargs)  # noqa: B023

            monkeypatch.setattr(module, attribute, interrupted)
            try:
                weights.save_pretrained(new, path, max_shard_bytes=shard_bytes)
                outcomes.append("saved")
            except KeyboardInterrupt:
                outcomes.append("interrupted")
            monkeypatch.setattr(module, attribute, real)
            assert not list(path.glob(".saving-*"))
            if outcomes[-1] == "saved":
                assert same(loaded(path).state_dict(), new.state_dict())
                break
            if attribute == "save_file":
                assert same(loaded(path).state_dict(), old.state_dict())
            else:
                with pytest.raises(CheckpointError):
                    loaded(path)
    assert outcomes.count("saved") == 2 and outcomes.count("interrupted") >= 3


def test_save_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        weights.save_pretrained(made_up(MEMBERS["12b"]), tmp_path / "file")
    with pytest.raises(ValueError, match="nothing to save"):
        weights.save_pretrained(empty(MEMBERS["12b"]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
