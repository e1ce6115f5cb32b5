"""Gemma4Config: the text model's numbers, from any config.json of the Gemma 4 family.

Two spellings exist and both are read: the published one (`global_head_dim`, `num_global_key_value_heads`, usually nested
under `text_config`) and the one transformers >= 5.2x saves (`per_layer_config: {"5": {"head_dim": ...}}`). A key that this
package does not know and that could change the result is refused by name; it is never ignored.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from gemma4_fast.errors import CheckpointError
from gemma4_fast.files import FEWER_BITS, ORIGINAL, foreign, path_text, read_json
from gemma4_fast.spelling import did_you_mean

SLIDING, FULL = "sliding_attention", "full_attention"
_MAX_SIZE = 2**31 - 1  # positions and lengths are int32 on the device; a larger size is a mistake in the file

# Keys that say nothing about the function the text model computes.
_HARMLESS = {
    "architectures", "attention_dropout", "attn_implementation", "_attn_implementation", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "experts_implementation", "_experts_implementation", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "_name_or_path", "name_or_path", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Top-level keys of a multimodal config.json that concern its towers or its special tokens only.
_HARMLESS_OUTER = {
    "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index", "eoi_token_id",
    "image_token_id", "video_token_id", "vision_soft_tokens_per_image",
}  # fmt: skip
_TOWERS = ("vision_config", "audio_config")
_MODEL_TYPES = {"gemma4_text", "gemma4_unified_text"}
_OUTER_MODEL_TYPES = {"gemma4", "gemma4_unified"}


@dataclass(frozen=True)
class LayerConfig:
    """What one decoder layer is. `kv_donor` is the layer whose cache it reads, or None if it has keys and values itself."""

    index: int
    is_sliding: bool
    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    window: int | None  # number of keys a query sees, its own included; None: all
    k_eq_v: bool  # one projection gives K and V; the cache keeps V alone
    kv_donor: int | None
    intermediate_size: int
    is_moe: bool
    rope_theta: float
    num_rotary_pairs: int  # column i of a head pairs with i + head_dim/2, for i < num_rotary_pairs

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of one kind run the same code at the same shapes."""
        return tuple(v for k, v in vars(self).items() if k not in ("index", "kv_donor")) + (self.kv_donor is None,)

    @property
    def label(self) -> str:
        """A few words for people: "sliding", "full, K=V", "sliding, shares KV of layer 13"."""
        words = ["sliding" if self.is_sliding else "full"]
        words += ["K=V"] if self.k_eq_v else []
        words += [f"shares KV of layer {self.kv_donor}"] if self.kv_donor is not None else []
        words += ["MoE"] if self.is_moe else []
        return ", ".join(words)


@dataclass(frozen=True)
class Gemma4Config:
    """Names are those of transformers' Gemma4TextConfig. Sizes are counts of elements, `sliding_window` a count of tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_types: tuple[str, ...]
    sliding_window: int
    num_global_key_value_heads: int
    head_dim: int = 256
    global_head_dim: int = 512
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    sliding_rope_theta: float = 1e4
    global_rope_theta: float = 1e6
    global_partial_rotary_factor: float = 0.25
    final_logit_softcapping: float | None = 30.0
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 262144
    enable_moe_block: bool = False
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    tie_word_embeddings: bool = True
    use_bidirectional_attention: str | None = None  # concerns image tokens only; this package serves text
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    dtype: str = field(default="bfloat16", compare=False)  # as stored; a model may run in another
    towers: tuple[str, ...] = field(default=(), compare=False)  # towers that the checkpoint has and this package leaves

    def __post_init__(self) -> None:
        positive: tuple[str, ...] = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "num_global_key_value_heads", "sliding_window", "head_dim", "global_head_dim",
            "max_position_embeddings",
        )  # fmt: skip
        if self.enable_moe_block:
            positive += ("num_experts", "top_k_experts", "moe_intermediate_size")
        for name in positive:
            _expect_int(getattr(self, name), name, 1)
        for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_kv_shared_layers", "pad_token_id",
                     "bos_token_id"):  # fmt: skip
            _expect_int(getattr(self, name), name, 0)
        for name in ("rms_norm_eps", "sliding_rope_theta", "global_rope_theta"):
            _expect_positive(getattr(self, name), name)
        if self.final_logit_softcapping is not None:
            _expect_positive(self.final_logit_softcapping, "final_logit_softcapping")
        for name in ("attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.dtype, str):
            raise ValueError(f"dtype must be text, got {self.dtype!r}")
        if not isinstance(self.eos_token_id, tuple):
            raise ValueError(f"eos_token_id must be a tuple of integers, got {self.eos_token_id!r}")
        for token in self.eos_token_id:
            _expect_int(token, "eos_token_id", 0, self.vocab_size - 1)
        if not isinstance(self.layer_types, tuple) or not all(isinstance(t, str) for t in self.layer_types):
            raise ValueError(f"layer_types must be a tuple of strings, got {self.layer_types!r}")
        n = self.num_hidden_layers
        if len(self.layer_types) != n:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries, expected num_hidden_layers = {n}")
        if bad := sorted(set(self.layer_types) - {SLIDING, FULL}):
            raise ValueError(f"layer_types may hold {SLIDING!r} and {FULL!r}, got {bad}")
        if self.layer_types[-1] != FULL:
            raise ValueError(f"the last layer must be {FULL!r}, got {self.layer_types[-1]!r}")
        for heads in (self.num_key_value_heads, self.num_global_key_value_heads):
            if self.num_attention_heads % heads:
                raise ValueError(f"{self.num_attention_heads} query heads do not divide into {heads} key-value heads")
        for dim in (self.head_dim, self.global_head_dim):
            if dim % 32:
                raise ValueError(f"head dims must be multiples of 32, got {dim}")
        if self.enable_moe_block and self.top_k_experts > self.num_experts:
            raise ValueError(f"top_k_experts = {self.top_k_experts} exceeds num_experts = {self.num_experts}")
        _expect_share(self.global_partial_rotary_factor, "global partial_rotary_factor")
        if not 0 <= self.num_kv_shared_layers < n:
            raise ValueError(f"num_kv_shared_layers must lie in [0, {n}), got {self.num_kv_shared_layers}")
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < self.vocab_size:
            raise ValueError(
                f"vocab_size_per_layer_input = {self.vocab_size_per_layer_input} is below vocab_size = {self.vocab_size}"
            )
        own, shared = set(self.layer_types[: self.first_shared_layer]), set(self.layer_types[self.first_shared_layer :])
        if not shared <= own:
            raise ValueError(f"layers that share KV have no donor of type {sorted(shared - own)}")

    @property
    def first_shared_layer(self) -> int:
        """Index of the first layer that reads another layer's cache; num_hidden_layers if none does."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def layer(self, index: int) -> LayerConfig:
        """The numbers of decoder layer `index`."""
        sliding = self.layer_types[index] == SLIDING
        shared = index >= self.first_shared_layer
        donor = None
        if shared:  # the last layer of the same type before sharing begins
            donor = max(i for i in range(self.first_shared_layer) if self.layer_types[i] == self.layer_types[index])
        head_dim = self.head_dim if sliding else self.global_head_dim
        rotary = 1.0 if sliding else self.global_partial_rotary_factor
        return LayerConfig(
            index=index,
            is_sliding=sliding,
            head_dim=head_dim,
            num_q_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads if sliding else self.num_global_key_value_heads,
            window=self.sliding_window if sliding else None,
            k_eq_v=self.attention_k_eq_v and not sliding,
            kv_donor=donor,
            intermediate_size=self.intermediate_size * (2 if self.use_double_wide_mlp and shared else 1),
            is_moe=self.enable_moe_block,
            rope_theta=self.sliding_rope_theta if sliding else self.global_rope_theta,
            num_rotary_pairs=int(rotary * head_dim // 2),
        )

    def layers(self) -> tuple[LayerConfig, ...]:
        """All decoder layers in order."""
        return self._layers

    @cached_property  # every step asks for them, and nothing here can change
    def _layers(self) -> tuple[LayerConfig, ...]:
        return tuple(self.layer(i) for i in range(self.num_hidden_layers))

    def slice(self, *, num_layers: int | None = None, vocab_size: int | None = None) -> Gemma4Config:
        """A smaller model at true shapes: the last `num_layers` entries of the layer pattern and the first `vocab_size` tokens.

        The share of layers that share KV is kept as far as each such layer still has a donor.
        """
        n = self.num_hidden_layers if num_layers is None else num_layers
        _expect_int(n, "num_layers", 1, self.num_hidden_layers)
        vocab = self.vocab_size if vocab_size is None else vocab_size
        _expect_int(vocab, "vocab_size", 1, self.vocab_size)
        types = self.layer_types[-n:]
        shared = round(n * self.num_kv_shared_layers / self.num_hidden_layers)
        while shared and not set(types[n - shared :]) <= set(types[: n - shared]):
            shared -= 1
        ple_vocab = min(self.vocab_size_per_layer_input, vocab)
        return dataclasses.replace(
            self, num_hidden_layers=n, layer_types=types, num_kv_shared_layers=shared, vocab_size=vocab,
            vocab_size_per_layer_input=ple_vocab,
            eos_token_id=tuple(t for t in self.eos_token_id if t < vocab) or (min(1, vocab - 1),),
            bos_token_id=min(self.bos_token_id, vocab - 1), pad_token_id=min(self.pad_token_id, vocab - 1),
        )  # fmt: skip

    @classmethod
    def preset(cls, name: str) -> Gemma4Config:
        """A published member of the family by name: e2b, e4b, 12b, 26b-a4b, 31b.

        ValueError for another name. Names may be shortened, as `preset_name` does it.
        """
        found = preset_name(name)
        if found is None:
            hint = did_you_mean(name, PRESETS)
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}{hint}")
        return PRESETS[found]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Gemma4Config:
        """Read `config.json` in the folder `path` (or that file itself). CheckpointError names what cannot be served."""
        file = Path(path_text(path))
        file = file / "config.json" if file.is_dir() else file
        if not file.exists():
            if (what := foreign(file.parent)) is not None:
                raise CheckpointError(f"{file.parent}: {what}")
            raise CheckpointError(f"{file}: no such file; a checkpoint folder holds config.json")
        data = read_json(file)
        try:
            return cls.from_dict(data)
        except ValueError as e:
            raise CheckpointError(f"{file}: {e}") from e

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Gemma4Config:
        """From the parsed config.json, nested (`text_config`) or flat, in either spelling. ValueError says what is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        towers: tuple[str, ...] = ()
        outer: dict[str, Any] = {}
        if "text_config" in data:
            _expect_gemma4(data.get("model_type"), _OUTER_MODEL_TYPES)
            outer = {k: v for k, v in data.items() if k not in ("text_config", "model_type", *_TOWERS)}
            towers = tuple(k.removesuffix("_config") for k in _TOWERS if data.get(k) is not None)
            quantized = outer.pop("quantization_config", None)
            tied = outer.pop("tie_word_embeddings", None)
            _refuse_unknown(outer, _HARMLESS | _HARMLESS_OUTER, "config.json")
            raw = _mapping(data["text_config"], "text_config")
            if quantized is not None:
                raw["quantization_config"] = quantized
            if tied is not None:
                inner = raw.get("tie_word_embeddings")
                if inner not in (None, tied):
                    raise ValueError(f"tie_word_embeddings is {tied!r}, but {inner!r} in text_config")
                raw["tie_word_embeddings"] = tied
        else:
            raw = dict(data)
        return cls(towers=towers, **_text_fields(raw, outer))

    def to_dict(self) -> dict[str, Any]:
        """A flat config.json in the published spelling, which transformers loads as Gemma4ForCausalLM."""
        own = dataclasses.asdict(self)
        for name in ("towers", "sliding_rope_theta", "global_rope_theta", "global_partial_rotary_factor"):
            del own[name]
        if not self.enable_moe_block:
            own.update(num_experts=None, top_k_experts=None, moe_intermediate_size=None)
        if not self.attention_k_eq_v:  # transformers reads the key only for models with K = V
            own["num_global_key_value_heads"] = None
        rope = {
            SLIDING: {"rope_type": "default", "rope_theta": self.sliding_rope_theta},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": self.global_rope_theta,
                "partial_rotary_factor": self.global_partial_rotary_factor,
            },
        }
        return {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            **own,
            "layer_types": list(self.layer_types),
            "eos_token_id": list(self.eos_token_id),
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "rope_parameters": rope,
        }


def _expect(value: object, allowed: set[str], name: str) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; this package serves {sorted(allowed)}")


def _expect_gemma4(model_type: object, allowed: set[str]) -> None:
    if not isinstance(model_type, str) or model_type not in allowed:
        raise ValueError(
            f"model_type is {model_type!r}, which is not Gemma 4: this package serves "
            f"{', '.join(sorted(allowed))}; other models run with transformers"
        )


def _expect_int(value: object, name: str, low: int, high: int = _MAX_SIZE) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer and must lie in [{low}, {high}], got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    """A finite number. The comparison, unlike math.isfinite, also takes integers that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _expect_positive(value: object, name: str) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def _expect_share(value: object, name: str) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return float(value)


def _mapping(value: object, name: str) -> dict[str, Any]:
    """A copy of a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return dict(value)


def _refuse_unknown(keys: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(k for k in keys if k not in known):
        raise ValueError(f"{where} has keys this package does not know and will not ignore: {', '.join(unknown)}")


def _text_fields(raw: dict[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of config.json -> Gemma4Config's fields; every key is used, known to be harmless, or refused."""
    take = raw.pop
    model_type = take("model_type", None)
    _expect_gemma4(model_type, _MODEL_TYPES)
    for key, only in (("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False)):
        if (value := take(key, only)) not in (only, None):
            raise ValueError(f"{key} = {value!r} is not supported; Gemma 4 has {only!r}")
    quantization = take("quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        by = f" by {method}" if isinstance(method, str) else ""
        what = f"the weights are quantized{by} (quantization_config)"
        raise ValueError(f"{what}, which this package cannot read yet: {ORIGINAL}; {FEWER_BITS}")
    bidirectional = take("use_bidirectional_attention", None)
    if bidirectional not in (None, "vision"):
        got = f"use_bidirectional_attention = {bidirectional!r}"
        raise ValueError(f"{got} is not supported; expected null or 'vision'")
    for key in ("attn_logit_softcapping", "rope_scaling", "query_pre_attn_scalar"):
        if take(key, None) is not None:
            raise ValueError(f"{key} is set; Gemma 4 has none and this package would ignore it")

    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "sliding_window")  # fmt: skip
    if missing := [k for k in required if raw.get(k) is None]:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    fields: dict[str, Any] = {k: take(k) for k in required}
    n = fields["num_hidden_layers"]
    _expect_int(n, "num_hidden_layers", 1)

    types = take("layer_types", None)
    if types is None:
        types = [FULL if i % 6 == 5 or i == n - 1 else SLIDING for i in range(n)]
    if not isinstance(types, (list, tuple)) or not all(isinstance(t, str) for t in types):
        raise ValueError(f"layer_types must be a list of strings, got {types!r}")
    fields["layer_types"] = tuple(types)
    # Absent keys take transformers' defaults, which is what made the file short in the first place.
    defaults: dict[str, Any] = {
        "head_dim": 256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "attention_k_eq_v": False,
        "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "enable_moe_block": False, "tie_word_embeddings": True,
        "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
    }  # fmt: skip
    if model_type == "gemma4_unified_text":
        defaults.update(max_position_embeddings=262144, hidden_size_per_layer_input=0)
    for key, default in defaults.items():
        value = take(key, default)
        if value is None:
            value = 0 if key == "hidden_size_per_layer_input" else default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        fields[key] = value
    fields["final_logit_softcapping"] = take("final_logit_softcapping", None)
    moe = {k: take(k, None) or 0 for k in ("num_experts", "top_k_experts", "moe_intermediate_size")}
    fields.update(moe if fields["enable_moe_block"] else {})
    fields["use_bidirectional_attention"] = bidirectional
    fields.update(_global_heads(raw, fields))
    fields.update(_rope(take("rope_parameters", None)))

    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "dtype", "torch_dtype"):
        value = raw.get(key, outer.get(key))
        if value is not None:
            fields["dtype" if key == "torch_dtype" else key] = value
    eos = fields.get("eos_token_id", 1)
    fields["eos_token_id"] = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    _refuse_unknown(raw, _HARMLESS, "the text config")
    return fields


def _global_heads(raw: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, int]:
    """Head dim and KV heads of the full-attention layers, from either spelling."""
    head_dim = raw.pop("global_head_dim", None)
    kv_heads = raw.pop("num_global_key_value_heads", None)
    kv_heads = kv_heads if fields["attention_k_eq_v"] else None  # transformers gates it the same way
    per_layer = raw.pop("per_layer_config", None)
    if per_layer is not None and (layers := _mapping(per_layer, "per_layer_config")):
        if bad := [k for k in layers if not str(k).isdecimal()]:
            raise ValueError(f"per_layer_config must have layer numbers as keys, got {bad[0]!r}")
        # Some versions pad the keys: "04".
        by_index = {int(k): _mapping(v, f"per_layer_config[{k}]") for k, v in layers.items()}
        want = [i for i, t in enumerate(fields["layer_types"]) if t == FULL]
        if sorted(by_index) != want:
            raise ValueError(f"per_layer_config names layers {sorted(by_index)}, expected the full-attention ones {want}")
        first = by_index[want[0]]
        if any(over != first for over in by_index.values()):
            different = "per_layer_config differs between full-attention layers"
            raise ValueError(f"{different}, which is not supported")
        _refuse_unknown(first, {"head_dim", "num_key_value_heads"}, "per_layer_config")
        head_dim = first.get("head_dim", fields["head_dim"] if head_dim is None else head_dim)
        kv_heads = first.get("num_key_value_heads", kv_heads)
    return {
        "global_head_dim": 512 if head_dim is None else head_dim,
        "num_global_key_value_heads": fields["num_key_value_heads"] if kv_heads is None else kv_heads,
    }


def _rope(given: object) -> dict[str, float]:
    """Both RoPE kinds. Any parameter beyond theta and the rotated share would change the angles, so it is refused."""
    if given is None:
        return {}
    rope = _mapping(given, "rope_parameters")
    if set(rope) != {SLIDING, FULL}:
        raise ValueError(f"rope_parameters must have {SLIDING!r} and {FULL!r}, got {sorted(rope)}")
    sliding, full = (_mapping(rope[kind], f"rope_parameters[{kind}]") for kind in (SLIDING, FULL))
    _expect(sliding.pop("rope_type", "default"), {"default"}, f"rope_parameters[{SLIDING}].rope_type")
    _expect(full.pop("rope_type", None), {"proportional"}, f"rope_parameters[{FULL}].rope_type")
    for params, kind in ((sliding, SLIDING), (full, FULL)):
        if params.pop("factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters[{kind}].factor other than 1 is not supported")
    if sliding.pop("partial_rotary_factor", 1.0) != 1.0:
        factor = f"rope_parameters[{SLIDING}].partial_rotary_factor"
        raise ValueError(f"{factor} other than 1 is not supported")
    _refuse_unknown(sliding, {"rope_theta"}, f"rope_parameters[{SLIDING}]")
    _refuse_unknown(full, {"rope_theta", "partial_rotary_factor"}, f"rope_parameters[{FULL}]")
    return {
        "sliding_rope_theta": _expect_positive(sliding.get("rope_theta", 1e4), f"rope_parameters[{SLIDING}].rope_theta"),
        "global_rope_theta": _expect_positive(full.get("rope_theta", 1e6), f"rope_parameters[{FULL}].rope_theta"),
        "global_partial_rotary_factor": _expect_share(
            full.get("partial_rotary_factor", 1.0), f"rope_parameters[{FULL}].partial_rotary_factor"
        ),
    }


def _pattern(period: int, layers: int) -> tuple[str, ...]:
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))


# The published members (Google's config.json files; vocab 262144, head dims 256 and 512, softcap 30 in all of them).
PRESETS: dict[str, Gemma4Config] = {
    "e2b": Gemma4Config(
        vocab_size=262144, hidden_size=1536, intermediate_size=6144, num_hidden_layers=35, num_attention_heads=8,
        num_key_value_heads=1, num_global_key_value_heads=1, layer_types=_pattern(5, 35), sliding_window=512,
        num_kv_shared_layers=20, use_double_wide_mlp=True, hidden_size_per_layer_input=256,
    ),
    "e4b": Gemma4Config(
        vocab_size=262144, hidden_size=2560, intermediate_size=10240, num_hidden_layers=42, num_attention_heads=8,
        num_key_value_heads=2, num_global_key_value_heads=2, layer_types=_pattern(6, 42), sliding_window=512,
        num_kv_shared_layers=18, hidden_size_per_layer_input=256,
    ),
    "12b": Gemma4Config(
        vocab_size=262144, hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=1, layer_types=_pattern(6, 48), sliding_window=1024,
        attention_k_eq_v=True, max_position_embeddings=262144, use_bidirectional_attention="vision",
    ),
    "26b-a4b": Gemma4Config(
        vocab_size=262144, hidden_size=2816, intermediate_size=2112, num_hidden_layers=30, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=2, layer_types=_pattern(6, 30), sliding_window=1024,
        attention_k_eq_v=True, max_position_embeddings=262144, use_bidirectional_attention="vision",
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
    ),
    "31b": Gemma4Config(
        vocab_size=262144, hidden_size=5376, intermediate_size=21504, num_hidden_layers=60, num_attention_heads=32,
        num_key_value_heads=16, num_global_key_value_heads=4, layer_types=_pattern(6, 60), sliding_window=1024,
        attention_k_eq_v=True, max_position_embeddings=262144, use_bidirectional_attention="vision",
    ),
}  # fmt: skip


# The hub's names of the published members. They hold weights; the presets are shapes alone.
HUB_IDS = {
    "e2b": "google/gemma-4-E2B-it",
    "e4b": "google/gemma-4-E4B-it",
    "12b": "google/gemma-4-12B-it",
    "26b-a4b": "google/gemma-4-26B-A4B-it",
    "31b": "google/gemma-4-31B-it",
}


def preset_name(text: str) -> str | None:
    """The preset that a name means: "26b-a4b", "26B" and "gemma-4-26b-a4b-it" all give "26b-a4b".

    None if it means none of them.
    """
    short = text.lower().removeprefix("gemma-4-").removesuffix("-it")
    if short in PRESETS:
        return short
    return next((name for name in PRESETS if name.split("-")[0] == short), None)


def member(config: Gemma4Config) -> str | None:
    """The name of the published member that this config is, or None.

    Token ids and dtype may differ.
    """
    aside = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "use_bidirectional_attention")
    for name, preset in PRESETS.items():
        same = {field: getattr(preset, field) for field in aside}
        if dataclasses.replace(config, **same) == preset:
            return name
    return None
