"""Checkpoint folders: found, checked by their headers, streamed in, written out. Safetensors only, never a pickle.

The model is any nn.Module with `config: Gemma4Config` whose `state_dict()` gives Hugging Face's tensor names, and
tensors that share storage with the parameters: loading copies into them, one at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gemma4_fast import native
from gemma4_fast.config import HUB_IDS, Gemma4Config, preset_name
from gemma4_fast.errors import CheckpointError
from gemma4_fast.files import NO_GGUF, foreign, one_line, path_text, read_json
from gemma4_fast.sampling import Sampling

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")  # all of a checkpoint but its weights
_HUB_PATTERNS = (*SMALL_FILES, "*.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
# First part of a tower tensor's name, after an optional "model.": transformers' gemma4 and gemma4_unified, and what
# the published unified files call the latter's vision embedder.
_TOWERS = {"vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder", "multi_modal_projector"}
_UNUSED_KV = re.compile(r"model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight")
_NAMES_SHOWN = 20
_PROGRESS_FROM_BYTES = 256 * 2**20
_CHUNK = 2**22  # elements of fp32 noise that `dummy` holds at once; the weights depend on it
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- finding
def tiny_path() -> Path:
    """The folder of the small trained checkpoint that comes with the package."""
    return Path(__file__).parent / "tiny"


def resolve(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] = _HUB_PATTERNS,
    on_download: Callable[[str], None] | None = None,
) -> Path:
    """A checkpoint folder on this disk: "tiny" is the packaged one, an existing folder is itself, "org/name" is fetched
    from the Hugging Face hub (json, safetensors and jinja files only, or those that fit `patterns`). "./tiny" means a folder
    of that name.

    on_download(id) is called before the hub is asked. CheckpointError says, in one line, why there is none and what to do.
    """
    text = path_text(path_or_hub_id, "a path or hub id")
    if text == "tiny":
        return tiny_path()
    if not text:
        raise CheckpointError("the path of the checkpoint is empty")
    try:
        path = Path(text).expanduser()
    except RuntimeError as e:
        raise CheckpointError(f"{text!r}: there is no such user") from e
    if path.is_dir():
        return path
    if text.lower().endswith("gguf"):
        raise CheckpointError(f"{text}: this package {NO_GGUF}")
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is the folder that holds config.json")
    if (preset := preset_name(text)) is not None:
        raise CheckpointError(
            f"{text!r} is a preset, the shape of a published model without weights. For the "
            f"weights give a hub id, such as {HUB_IDS[preset]}, or your folder of weights"
        )
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        raise CheckpointError(f"{text!r}: no such folder (a hub id looks like org/name, the packaged model is 'tiny')")
    if on_download is not None:
        on_download(text)
    return _download(text, revision, local_files_only, patterns)


def _download(repo: str, revision: str | None, local_files_only: bool, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    only: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=local_files_only, **only))
    except errors.GatedRepoError as e:
        hint = f"accept its licence at https://huggingface.co/{repo} and run `hf auth login`"
        raise CheckpointError(f"{repo} is gated on the hub: {hint}") from e
    except errors.RevisionNotFoundError as e:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the hub") from e
    except errors.RepositoryNotFoundError as e:
        hint = "check the spelling, or run `hf auth login` if it is private"
        raise CheckpointError(f"{repo!r} is neither a folder here nor a model on the hub; {hint}") from e
    except errors.HFValidationError as e:
        raise CheckpointError(f"{repo!r} is neither a folder here nor a valid hub id") from e
    except (errors.LocalEntryNotFoundError, ConnectionError) as e:
        why = "downloads are switched off" if local_files_only else "the hub cannot be reached"
        hint = "give the path of a local folder, or fetch it once while online"
        missing = f"{repo!r} is not a folder here and not in the hub's cache"
        raise CheckpointError(f"{missing}, and {why}; {hint}") from e
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as e:  # HTTPError: the base of the hub's client, timeouts
        raise CheckpointError(f"{repo} could not be fetched from the hub: {one_line(e)}") from e


# ---------------------------------------------------------------- reading headers
@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint as its header describes it. `dtype` is safetensors' word: "BF16", "F32", ..."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor in model.safetensors, or in the shards that the index names, by stored name; only headers are read.

    CheckpointError names the file that is missing, empty, cut short or broken, and a tensor in no or two of the shards.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():  # the order transformers looks in
        return _header(single)
    if not index.exists():
        raise CheckpointError(f"{folder}: {_nothing_to_load(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' of tensor name to file name")
    for name in weight_map.values():  # a shard lies beside its index, whatever the index says
        if name in ("", ".", "..") or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a file name in this folder; refused")
    files = sorted(set(weight_map.values()))
    if gone := [f for f in files if not (folder / f).exists()]:
        raise CheckpointError(f"{folder}: {_names(gone, 'missing shard')} named in {INDEX}")
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(folder / file).items():
            if name in found:
                raise CheckpointError(f"{folder}: tensor {name!r} is in two shards, {found[name].file.name} and {file}")
            found[name] = stored
    if absent := [f"{n} (not in {f})" for n, f in weight_map.items() if n not in found or found[n].file.name != f]:
        raise CheckpointError(f"{index}: {_names(absent, 'tensor')} that the named shard does not hold")
    return found


def _nothing_to_load(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if (what := foreign(folder)) is not None:
        return what
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    if any(f.endswith((".bin", ".pt", ".pth", ".ckpt")) for f in files):
        return f"holds pickled weights but no {SINGLE}; this package never unpickles, so use a safetensors release"
    if shards := [f for f in files if f.endswith(".safetensors")]:
        return f"holds {shards[0]} but neither {SINGLE} nor {INDEX}"
    return f"holds neither {SINGLE} nor {INDEX}"


def _header(file: Path) -> dict[str, Stored]:
    try:
        with file.open("rb") as raw:
            if raw.read(20).startswith(b"version https://git"):
                raise CheckpointError(f"{file}: is a git-lfs pointer, not the weights; run `git lfs pull`")
        with safe_open(file, framework="pt") as f:
            keys = f.keys()
            slices = [f.get_slice(key) for key in keys]
            return {k: Stored(file, k, tuple(s.get_shape()), str(s.get_dtype())) for k, s in zip(keys, slices, strict=True)}
    except (SafetensorError, OSError) as e:
        size = f"{file.stat().st_size} bytes, " if file.is_file() else ""
        raise CheckpointError(f"{file}: not a readable safetensors file ({size}{one_line(e)}); it may be cut short") from e


def canonical(name: str) -> str:
    """A stored tensor name as Gemma4ForCausalLM spells it: both multimodal prefixes become `model.`."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def validate(model: nn.Module, path: Path) -> dict[str, Stored]:
    """Holds the headers of the checkpoint `path` against `model`, which may be on the meta device, and reads no data.

    Returns the stored tensor of each name of `model.state_dict()`. CheckpointError lists every tensor that is missing,
    unexpected, of the wrong shape or not floating point, all at once.
    """
    config: Gemma4Config = model.config  # type: ignore[assignment]
    wanted = model.state_dict()
    found: dict[str, Stored] = {}
    extra, problems = [], []
    for name, stored in read_headers(path).items():
        own = canonical(name)
        if own in found:
            problems.append(f"{own} is stored twice, as {found[own].key} and as {name}")
        elif own in wanted:
            found[own] = stored
        elif own == "lm_head.weight":  # the config ties it to the embedding
            _log.info("%s: lm_head.weight is ignored, the config ties it to the embedding", stored.file)
        elif not (_is_tower(name) and config.towers) and not _is_unused_kv(own, config):
            extra.append(name)
    missing = [n for n in wanted if n not in found]
    shapes = [
        f"{n} (got {list(s.shape)}, expected {list(wanted[n].shape)})"
        for n, s in found.items()
        if s.shape != tuple(wanted[n].shape)
    ]
    dtypes = [f"{n} (got {s.dtype})" for n, s in found.items() if s.dtype not in _FLOATS]
    if any(map(_is_tower, extra)):
        problems.append("config.json has no vision_config or audio_config, but there are tower tensors")
    problems += [_names(missing, "missing tensor")] if missing else []
    problems += [_names(extra, "unexpected tensor")] if extra else []
    problems += [_names(shapes, "misshaped tensor")] if shapes else []
    problems += [_names(dtypes, "tensor", f" not in {'/'.join(_FLOATS)}")] if dtypes else []
    if problems:
        raise CheckpointError(f"{path}: does not fit its config: {'; '.join(problems)}")
    return found


def _is_tower(name: str) -> bool:
    return name.removeprefix("model.").partition(".")[0] in _TOWERS


def _is_unused_kv(name: str, config: Gemma4Config) -> bool:
    """Published files carry keys and values for layers that read another layer's cache; nothing ever uses them."""
    match = _UNUSED_KV.fullmatch(name)
    return match is not None and config.first_shared_layer <= int(match[1]) < config.num_hidden_layers


# ---------------------------------------------------------------- loading
def load(model: nn.Module, path: Path, *, device: torch.device | str, dtype: torch.dtype, progress: bool = True) -> None:
    """Fills `model` from the checkpoint folder `path`, reading each tensor once; peak memory is the result plus one tensor.

    A model on the meta device is cast to `dtype` and allocated on `device` once the headers have been checked; one that
    already has storage must be on `device` in `dtype` (ValueError). Stored floats are converted to `dtype`.
    `progress` shows a bar on stderr if that is a terminal and the checkpoint is large.
    CheckpointError: see `validate`; also a file that cannot be read to its end.
    """
    stored = validate(model, path)
    if any(t.is_meta for t in model.state_dict().values()):
        model.to(dtype=dtype).to_empty(device=device)
    targets, expected = model.state_dict(), torch.empty(0, device=device).device
    for name, t in targets.items():
        if t.dtype != dtype or t.device != expected:
            raise ValueError(f"{name}: got {t.dtype} on {t.device}, expected {dtype} on {expected}")
    by_file: dict[Path, list[str]] = {}
    for name, s in stored.items():
        by_file.setdefault(s.file, []).append(name)
    total = sum(file.stat().st_size for file in by_file)
    shown = progress and total >= _PROGRESS_FROM_BYTES and sys.stderr.isatty()
    with _bar(total, shown) as advance, torch.no_grad():
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt", device="cpu") as f:  # memory-mapped: get_tensor copies nothing
                    for name in names:
                        source = f.get_tensor(stored[name].key)
                        try:
                            targets[name].copy_(source)
                        except ValueError as e:  # of a quantized weight
                            raise CheckpointError(f"{file}: {stored[name].key}: {e}") from e
                        advance(source.nbytes)
                        native.release_pages(source)  # each is read once
                        del source  # holds the file's mapping
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{file}: reading the weights failed: {one_line(e)}") from e


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes, or nothing. On stderr: stdout may be someone's JSON."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda count: progress.advance(task, count)


def dummy(model: nn.Module, seed: int = 0) -> None:
    """Fills `model`, which must have storage, with seeded random weights that give activations of unit scale.

    Each tensor is drawn on its own device from (seed, its name) alone, so their order is nothing to them; a bf16 model
    gets the rounded values of the fp32 one. Kinds of device differ from one another in their draws.
    """
    per_layer = model.config.hidden_size_per_layer_input  # type: ignore[union-attr]
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_meta:
                raise ValueError(f"{name} is on the meta device; call model.to_empty(device=...) first")
            mean, std = dummy_scale(name, t, per_layer)  # type: ignore[arg-type]
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()  # hash() changes from process to process
            generator = torch.Generator(t.device).manual_seed(int.from_bytes(digest[:7], "little"))
            for part in t.split(max(1, _CHUNK // max(1, math.prod(t.shape[1:])))):  # rows, so any stride will do
                noise = torch.empty(part.shape, dtype=torch.float32, device=t.device)
                if name.endswith("layer_scalar"):
                    part.copy_(noise.uniform_(0.5, 1.0, generator=generator))
                else:
                    part.copy_(noise.normal_(mean, std, generator=generator))


def dummy_scale(name: str, t: torch.Tensor, per_layer: int) -> tuple[float, float]:
    """(mean, std). Inputs have unit scale, so a linear layer [N, K] has std K^-0.5; so have experts and tables, as
    the embedding is multiplied by sqrt(H)."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):  # q.k is not divided by sqrt(D)
        return t.shape[0] ** -0.25, 0.1 * t.shape[0] ** -0.25
    if name.endswith("post_attention_layernorm.weight"):
        # Attention averages over tokens. At full weight that makes all positions alike within some tens of layers.
        return 0.5, 0.05
    if t.dim() == 1:
        return 1.0, 0.1
    if name.endswith("router.proj.weight"):  # its input has norm 1
        return 0.0, 1.0
    if name.endswith("embed_tokens_per_layer.weight"):  # multiplied by sqrt(P)
        return 0.0, per_layer**-0.5
    return 0.0, t.shape[-1] ** -0.5


# ---------------------------------------------------------------- saving
def save_pretrained(
    model: nn.Module, path: str | Path, *, max_shard_bytes: float = 5e9, tokenizer_from: Path | None = None
) -> None:
    """Writes a checkpoint folder that transformers loads: config.json, generation_config.json if the model has
    `generation_config`, safetensors (with an index above `max_shard_bytes`), what tokenizer files `tokenizer_from` has.

    All is written beside its place first and then moved in, the file that makes a folder loadable last: interrupted, it
    leaves the old checkpoint or one that no one loads. Shards of an earlier save are removed; other files stay.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, expected a folder")
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    if meta := [n for n, t in tensors.items() if t.is_meta]:
        raise ValueError(f"nothing to save: {meta[0]} is on the meta device")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    generation = getattr(model, "generation_config", None)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as scratch:
        new = Path(scratch)
        _write_json(new / "config.json", {**model.config.to_dict(), "dtype": dtype})  # type: ignore[union-attr, operator]
        if generation:
            _write_json(new / "generation_config.json", generation)
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, new / name)
        _write_shards(tensors, new, max_shard_bytes)
        entry = new / (SINGLE if (new / SINGLE).exists() else INDEX)
        stale = [path / SINGLE, path / INDEX, path / "generation_config.json", *path.glob("model-*-of-*.safetensors")]
        if (new / "tokenizer.json").exists():  # another tokenizer's template would win over the new one's
            stale += [path / name for name in TOKENIZER_FILES if not (new / name).exists()]
        for old in stale:  # the loadable names go first
            old.unlink(missing_ok=True)
        for file in sorted(new.iterdir(), key=lambda f: f == entry):
            os.replace(file, path / file.name)


def _write_shards(tensors: Mapping[str, torch.Tensor], folder: Path, max_bytes: float) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    weight_map = {}
    for file, shard in zip(files, shards, strict=True):
        save_file({name: t.contiguous() for name, t in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if count > 1:
        total = sum(t.nbytes for t in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


# ---------------------------------------------------------------- JSON and words
def load_generation_config(path: Path, *, vocab_size: int | None = None) -> dict[str, Any]:
    """The folder's generation_config.json; {} if it has none. CheckpointError names the file, and the key if a value that
    generation uses is wrong. `vocab_size` bounds its stop tokens."""
    file = path / "generation_config.json"
    if not file.exists():
        return {}
    data = read_json(file)
    eos = data.get("eos_token_id")
    limit = math.inf if vocab_size is None else vocab_size
    for token in eos if isinstance(eos, list) else [eos] if eos is not None else []:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < limit:
            raise CheckpointError(f"{file}: eos_token_id must hold token ids in [0, {limit}), got {token!r}")
    if data.get("do_sample") not in (None, True, False):
        raise CheckpointError(f"{file}: do_sample must be true or false, got {data['do_sample']!r}")
    try:
        Sampling(**{f.name: data[f.name] for f in dataclasses.fields(Sampling) if data.get(f.name) is not None})
    except ValueError as e:
        raise CheckpointError(f"{file}: {e}") from e
    return data


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _names(items: list[str], noun: str, rest: str = "") -> str:
    """ "2 tensors that fit nowhere: a, b" from ["a", "b"], "tensor" and " that fit nowhere"."""
    more = f", ... and {len(items) - _NAMES_SHOWN} more" if len(items) > _NAMES_SHOWN else ""
    plural = "s" if len(items) > 1 else ""
    return f"{len(items)} {noun}{plural}{rest}: {', '.join(items[:_NAMES_SHOWN])}{more}"
