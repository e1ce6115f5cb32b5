"""Writes a checkpoint folder, or a model, as a GGUF file of llama.cpp's `gemma4` architecture.

The file has no tokenizer ("no_vocab"): llama.cpp runs token ids with it, not text.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gemma4_fast import weights
from gemma4_fast.config import Gemma4Config
from gemma4_fast.errors import UnsupportedError
from gemma4_fast.model import Gemma4

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

QUANTIZATIONS = {"int8": "Q8_0", "int4": "Q4_0"}

# transformers' name -> llama.cpp's. Those of a layer follow "model.layers.N." and "blk.N.".
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
_LAYER = {
    "layer_scalar": "layer_output_scale.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",  # a K=V layer has none, which is how llama.cpp knows it
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
}
_CHUNK = 2**20  # elements that are widened to fp32 at once


def gguf_name(name: str) -> str:
    """What llama.cpp calls the tensor that transformers calls `name`."""
    if not name.startswith("model.layers."):
        return _OUTSIDE[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_LAYER[rest]}"


def write_gguf(
    source: Path | Gemma4, target: Path, quantize: str | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Writes a text model, from a checkpoint folder or from memory, to the file `target`; returns it.
    Beside the model it needs memory for one tensor of the result.

    quantize: None for bf16 matrices, "int8" for Q8_0, "int4" for Q4_0; llama.cpp's own converter and quantizer keep some
    tensors wider, and so does this. progress(bytes written, bytes in all) is called after each tensor.

    ModuleNotFoundError: there is no package `gguf`.
    UnsupportedError: a model that no file would make llama.cpp run, such as some slices of a published one.
    """
    import gguf

    config = source.config if isinstance(source, Gemma4) else Gemma4Config.from_pretrained(source)
    _refuse(config)
    if isinstance(source, Gemma4):
        model, tensor = source, source.state_dict().__getitem__
    else:
        model, tensor = _stored(config, source)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, "gemma4")
    _add_metadata(writer, config, quantize)

    types: dict[str, GGMLQuantizationType] = {}
    total = 0
    for name, t in model.state_dict().items():
        shape = (_rows(name, t, config), *t.shape[1:])
        types[name] = _type(gguf_name(name), shape, quantize, config.tie_word_embeddings)
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        nbytes = math.prod(shape) // block * size
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes, types[name])
        total += nbytes
    factors = _rope_factors(config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = 0
        for name, kind in types.items():
            t = tensor(name)
            data = _convert(t[: _rows(name, t, config)].cpu(), kind)
            writer.write_tensor_data(data)
            written += data.nbytes
            if progress is not None:
                progress(written, total)
        writer.write_tensor_data(factors)
        writer.close()
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return target


def _stored(config: Gemma4Config, checkpoint: Path) -> tuple[Gemma4, Callable[[str], Tensor]]:
    """The model without its weights, and what reads one of them from the checkpoint."""
    with torch.device("meta"):
        model = Gemma4(config)
    stored = weights.validate(model, checkpoint)

    def tensor(name: str) -> Tensor:
        # The file is memory-mapped: get_tensor copies nothing.
        with safe_open(stored[name].file, framework="pt", device="cpu") as f:
            found: Tensor = f.get_tensor(stored[name].key)
        return found

    return model, tensor


def _refuse(config: Gemma4Config) -> None:
    """llama.cpp has the published models' layer patterns in its code, and aborts the process for others."""
    layers, first = config.layers(), config.first_shared_layer
    if not any(layer.is_sliding for layer in layers):
        raise UnsupportedError("llama.cpp runs no Gemma 4 without sliding layers")
    if any(layer.kv_donor != first - (2 if layer.is_sliding else 1) for layer in layers[first:]):
        raise UnsupportedError("llama.cpp shares keys and values only of a sliding layer and the full one right after it")


def _rows(name: str, t: Tensor, config: Gemma4Config) -> int:
    """How many rows of t are written: llama.cpp wants as many per-layer embeddings as there are token embeddings."""
    return config.vocab_size if name == "model.embed_tokens_per_layer.weight" else t.shape[0]


def _type(name: str, shape: Sequence[int], quantize: str | None, tied: bool) -> GGMLQuantizationType:
    """The type of the tensor that llama.cpp calls `name`, by the rules of its converter and its quantizer."""
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    if quantize is None or name == "per_layer_model_proj.weight":
        return Type.BF16
    kind = Type[QUANTIZATIONS[quantize]]
    if kind == Type.Q4_0 and (name == "output.weight" or (tied and name.endswith("token_embd.weight"))):
        kind = Type.Q6_K if shape[-1] % GGML_QUANT_SIZES[Type.Q6_K][0] == 0 else Type.Q8_0
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Type.BF16


def _convert(t: Tensor, to: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """t in any float type -> what is written: fp32, bf16 (as int16), or rows of quantized blocks (as bytes)."""
    import gguf

    if to == gguf.GGMLQuantizationType.F32:
        return t.float().numpy()
    if to == gguf.GGMLQuantizationType.BF16:
        return t.bfloat16().contiguous().view(torch.int16).numpy()
    rows = t.reshape(-1, t.shape[-1])
    out = np.empty(gguf.quant_shape_to_byte_shape(tuple(rows.shape), to), np.uint8)
    step = max(1, _CHUNK // rows.shape[1])

    def part(start: int) -> None:
        x = rows[start : start + step].float().numpy()
        out[start : start + step] = _q6_k(x) if to == gguf.GGMLQuantizationType.Q6_K else gguf.quants.quantize(x, to)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(part, range(0, len(rows), step)))
    return out


def _q6_k(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x [N, K] fp32 -> [N, K/256 * 210] bytes of Q6_K, a type that `gguf` reads but does not write.

    256 numbers share an fp16 factor, 16 of them an int8 one; a number is its own 6 bits minus 32 times both.
    """
    blocks = x.reshape(-1, 16, 16)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)[..., 0]  # [M, 16], with its sign
    scale = extreme / -32
    factor = np.take_along_axis(scale, np.abs(scale).argmax(-1, keepdims=True), -1) / -128
    factor = factor.astype(np.float16).astype(np.float32)
    scales = _round(scale, factor, -128, 127)
    q = (_round(blocks, (scales * factor)[..., None], -32, 31) + 32).astype(np.uint8)
    low, high = (q & 15).reshape(-1, 2, 2, 64), (q >> 4).reshape(-1, 2, 4, 32)
    low = low[:, :, 0] | low[:, :, 1] << 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = low.reshape(-1, 128), high.reshape(-1, 64), scales.astype(np.int8).view(np.uint8), factor.astype(np.float16)
    return np.concatenate([p.view(np.uint8) for p in parts], -1).reshape(len(x), -1)


def _round(x: np.ndarray[Any, Any], unit: np.ndarray[Any, Any], low: int, high: int) -> np.ndarray[Any, Any]:
    """x in units of `unit`, as whole numbers in [low, high]; 0 where the unit is 0."""
    return np.clip(np.rint(np.divide(x, unit, out=np.zeros_like(x), where=unit != 0)), low, high)


def _rope_factors(config: Gemma4Config) -> np.ndarray[Any, Any]:
    """[D/2] fp32, for full attention: llama.cpp turns all pairs of columns there, by angles that it divides by these."""
    layer = config.layer(config.num_hidden_layers - 1)
    factors = np.full(layer.head_dim // 2, 1e30, np.float32)  # a pair that does not turn
    factors[: layer.num_rotary_pairs] = 1
    return factors


def _add_metadata(writer: GGUFWriter, config: Gemma4Config, quantize: str | None) -> None:
    import gguf

    layers = config.layers()
    writer.add_name("gemma4_fast benchmark")
    file_type = {None: "MOSTLY_BF16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}[quantize]
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)  # absent would mean 30

    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([layer.num_kv_heads for layer in layers])
    writer.add_key_length(config.global_head_dim)
    writer.add_value_length(config.global_head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([layer.is_sliding for layer in layers])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)

    writer.add_rope_dimension_count(config.global_head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base(config.global_rope_theta)
    writer.add_rope_freq_base_swa(config.sliding_rope_theta)

    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
