"""Things that are no checkpoint of ours: what they are, and what to do next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma4_fast import CheckpointError, Gemma4, Gemma4Config
from gemma4_fast.config import HUB_IDS, PRESETS, preset_name
from gemma4_fast.tokenizer import Tokenizer
from gemma4_fast.weights import tiny_path


def config(**changes: Any) -> str:
    return json.dumps({**json.loads((tiny_path() / "config.json").read_text()), **changes})


# By name: the files of a folder, and words of the message.
FOLDERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "gguf": (
        {"model-Q4_0.gguf": ""},
        ["model-Q4_0.gguf", "safetensors", "bf16 original", "--quantize int4"],
    ),
    "gguf and config.json": ({"config.json": config(), "m.gguf": ""}, ["m.gguf", "bf16 original"]),
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "google/gemma-4-E4B-it"}'},
        ["PEFT adapter of google/gemma-4-E4B-it", "merge_and_unload()", "accelerate(model)"],
    ),
    "broken adapter": ({"adapter_config.json": "{"}, ["PEFT adapter,", "merge_and_unload()"]),
    "Gemma 3": ({"config.json": '{"model_type": "gemma3_text"}'}, ["gemma3_text", "not Gemma 4"]),
    "Gemma 3 with images": (
        {"config.json": '{"model_type": "gemma3", "text_config": {}}'},
        ["'gemma3'", "not Gemma 4"],
    ),
    "quantized": (
        {"config.json": config(quantization_config={"quant_method": "compressed-tensors"})},
        ["quantized by compressed-tensors", "bf16 original", "quantize='int4'"],
    ),
    "quantized somehow": ({"config.json": config(quantization_config={})}, ["quantized (quant"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_something_else(name: str, tmp_path: Path) -> None:
    files, words = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Gemma4.from_pretrained(tmp_path, check=False)
    assert str(tmp_path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["model.gguf", "org/gemma-4-E4B-it-qat-q4_0-gguf"])
def test_gguf_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="not GGUF: load the bf16 original"):
        Gemma4.from_pretrained(name)


@pytest.mark.parametrize("name", ["26b-a4b", "26B", "gemma-4-26b-a4b"])
def test_a_preset_has_no_weights(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = r"preset.*without weights.*google/gemma-4-26B-A4B-it"
    with pytest.raises(CheckpointError, match=words):
        Gemma4.from_pretrained(name)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()  # a folder of that name is a folder
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Gemma4.from_pretrained(name)


def test_names_of_presets() -> None:
    assert set(HUB_IDS) == set(PRESETS)
    for name, hub_id in HUB_IDS.items():
        assert preset_name(hub_id.removeprefix("google/")) == name
        assert Gemma4Config.preset(name.upper()) is PRESETS[name]
    assert preset_name("26b") == "26b-a4b"
    for other in ("27b", "", "tiny", "26", "a4b"):
        assert preset_name(other) is None


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_path(), folder, ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file.*Copy"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read.*save_pretrained"):
        Tokenizer.from_pretrained(folder)


MEDIA = {"image": "an image", "image_url": "an image", "audio": "audio"}


@pytest.mark.parametrize("kind", MEDIA)
def test_messages_that_hold_more_than_text(kind: str) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_path())
    parts = [{"type": kind, "url": "x"}, {"type": "text", "text": "What is this?"}]
    with pytest.raises(ValueError, match=f"message 0 holds {MEDIA[kind]}.*accelerate"):
        tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    for odd in ([], {}, None):
        with pytest.raises(ValueError, match="content must be text"):
            message = {"role": "user", "content": [{"type": odd}]}
            tokenizer.apply_chat_template([message])
