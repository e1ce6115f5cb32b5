"""Gemma4: the model a user holds. Loading, running and generating; the layers are in `layers.py`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gemma4_fast import native, ops
from gemma4_fast.cache import KVCache
from gemma4_fast.config import Gemma4Config
from gemma4_fast.keywords import explicit
from gemma4_fast.layers import Quantizable, Table, Text, model_ops, quantize
from gemma4_fast.quant import BITS, WeightLike, parse_quantize

if TYPE_CHECKING:
    from gemma4_fast.generate import Generation, Stream
    from gemma4_fast.sampling import Sampling
    from gemma4_fast.tokenizer import Tokenizer
    from gemma4_fast.verdicts import Verdict

log = logging.getLogger("gemma4_fast")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Gemma4(nn.Module):
    """A Gemma 4 text model. State-dict names are transformers'; parameters need no gradient and get none.

    `backend`: one name, several in order of preference ("cpu,torch"), or None for the automatic choice of every op.
    """

    def __init__(self, config: Gemma4Config, backend: str | None = None) -> None:
        from gemma4_fast.graph import Spares

        super().__init__()
        self.config = config
        self.backend = backend
        ops.parse_backend(backend)
        self.model = Text(config)
        if not config.tie_word_embeddings:
            self.lm_head = Table(config.vocab_size, config.hidden_size)
        self.quantization: str | None = None  # see `quantize`
        self.changes = 0  # how often its parameters may have become other tensors: moved, cast, quantized, loaded
        self.generation_config: dict[str, Any] = {}
        self.path: Path | None = None  # the checkpoint's folder, where the tokenizer lies
        self.source: str | None = None  # what the weights were loaded from: see verdicts.source_of
        self.verdict: Verdict | None = None  # of the self-check that it passed when it was loaded
        self._tokenizer: Tokenizer | None = None
        self.spares = Spares()  # what generations left to the next ones

    def _changed(self) -> None:
        self.changes += 1
        self.spares.clear()

    @classmethod
    @explicit
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        *,
        quantize: str | None = None,
        check: bool | str = True,
        load_format: str = "auto",
        seed: int = 0,
        progress: bool = True,
        check_memory: bool = True,
    ) -> Gemma4:
        """A model from a checkpoint folder or a hub id ("google/gemma-4-E4B-it"); "tiny" is the one in this package.

        dtype: bfloat16, float16, float32 or float64 (None: as the config says). device: None takes the GPU if there is one.
        quantize: "int8" or "int4" for weights of 8 or 4 bits, see `quantize`; each tensor is quantized as it is read, so that
        the bf16 weights need not fit into memory.
        check: "quick" compares one layer of each kind with the reference before returning and
        raises SelfCheckError if it is wrong; "full" compares every layer and the whole model; False
        does neither. True is "quick", unless the same model has passed on this machine before and
        nothing has changed since: see `verdict` and gemma4_fast/verdicts.py. load_format "dummy"
        reads config.json only and fills in seeded random weights.
        progress: on a terminal, show bars while a large checkpoint is read and while it is checked,
        and a line if an earlier verdict serves in place of the check. (Elsewhere that line is
        logged at level INFO.)
        check_memory: before any weights are read or downloaded, compare what the model needs with
        the memory that is free: its weights, the cache of one sequence of 4096 tokens, 0.5 GiB for
        the process, and the self-check. If the weights alone do not fit, UnsupportedError says what
        would; if only the sum does not, a warning does. False skips this.

        Errors: CheckpointError (files), UnsupportedError (the backend cannot run here, or there is
        not enough memory), ValueError (arguments). Nothing is loaded before those that can be known
        beforehand.
        """
        from gemma4_fast import memory, terminal, verdicts, weights

        if check not in (True, False, "quick", "full"):
            raise ValueError(f"check must be True, False, 'quick' or 'full', got {check!r}")
        if load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format must be 'auto' or 'dummy', got {load_format!r}")
        parse_quantize(quantize)
        backends = ops.parse_backend(backend)
        target = parse_device(device)
        path = weights.resolve(path_or_hub_id, patterns=("config.json",))
        config = Gemma4Config.from_pretrained(path)
        chosen = parse_dtype(dtype if dtype is not None else config.dtype)
        if check_memory:
            load = memory.Load(config, chosen, quantize, check=check)
            memory.require(load, target, Path(path_or_hub_id).name)
        path = weights.resolve(path_or_hub_id)
        if config.towers:
            log.warning("%s has %s towers; only its text model is loaded", path, " and ".join(config.towers))
        with ops.default_backend(backends or None):
            ops.require(target, chosen, model_ops(config))
        settings = weights.load_generation_config(path, vocab_size=config.vocab_size)
        source = verdicts.source_of(path, load_format, seed)
        with torch.device("meta"):
            model = cls(config, backend)
        model.to(chosen)
        if quantize is not None:
            model.quantize(quantize)
        if load_format == "dummy":
            model.to_empty(device=target)
            weights.dummy(model, seed)
        else:
            weights.load(model, path, device=target, dtype=chosen, progress=progress)
        model.path = path
        model.generation_config = settings
        model.source = source
        if check:
            with terminal.progress_bar("checking", shown=progress) as bar:
                verdicts.settle(model, check, progress=bar)
            if model.verdict is not None and model.verdict.from_disk:
                line = f'gemma4_fast: {model.verdict}; check="{model.verdict.level}" runs it again'
                if bar is None:
                    log.info("%s", line)
                else:
                    terminal.note(line)
        return model

    @classmethod
    @explicit
    def dummy(
        cls,
        config: Gemma4Config,
        *,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str | None = None,
        backend: str | None = None,
        quantize: str | None = None,
        seed: int = 0,
        check_memory: bool = True,
    ) -> Gemma4:
        """A model with seeded random weights of the right scale, made on the device.

        It is for benchmarks at true shapes.
        check_memory: as in `from_pretrained`.
        """
        from gemma4_fast import memory, weights

        chosen, target = parse_dtype(dtype), parse_device(device)
        with torch.device("meta"):
            model = cls(config, backend)
        model.to(chosen)
        if quantize is not None:
            model.quantize(quantize)
        if check_memory:
            memory.require(memory.Load(config, chosen, quantize, check=False), target)
        model.to_empty(device=target)
        weights.dummy(model, seed)
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> Gemma4:
        self._changed()
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._changed()
        return super().load_state_dict(state_dict, strict, assign)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Gemma4:
        """As nn.Module.to_empty, with huge pages where the system has them."""
        tables = [m for m in self.modules() if isinstance(m, Quantizable)]
        had_memory = [not w.is_meta for m in tables for w in m.quantized().values()]
        super().to_empty(device=device, recurse=recurse)
        weights = [w for m in tables for w in m.quantized().values()]
        for weight, had in zip(weights, had_memory, strict=True):
            if had:  # one that had none has been cleared as it got it
                weight.clear()
        for parameter in self.parameters():  # quantized weights see to it themselves, before they clear their memory
            native.use_huge_pages(parameter)
        return self

    def quantize(self, to: str, done: Callable[[str], None] | None = None) -> Gemma4:
        """Weights of 8 or 4 bits, in place: "int8" has the values of GGUF's Q8_0, "int4" those of Q4_0, with a scale for each
        32 of a row. Projections and experts; embeddings and the head never below 8 bits; norms, router and the small matrices
        of per-layer embeddings stay. ValueError, before any work, for another word, for a model that is quantized already, and
        for a weight with values that no scale serves, by its name. done: is told the name of each module as it has been.
        """
        bits = parse_quantize(to)
        if bits is None:
            raise ValueError("quantize must be 'int8' or 'int4', got None")
        if self.quantization is not None:
            raise ValueError(f"this model is already quantized to {self.quantization}")
        if self.device.type != "meta":
            from gemma4_fast import memory

            memory.warn_to_quantize(self, bits)
        self._changed()
        quantize(self, bits, done)
        self.quantization = to
        return self

    def save_pretrained(self, path: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write a checkpoint that transformers and `from_pretrained` load: config, weights, and the tokenizer if known.

        UnsupportedError for a quantized model: there is no such file format yet.
        """
        from gemma4_fast import weights
        from gemma4_fast.errors import UnsupportedError

        if self.quantization is not None:
            what = f"a model quantized to {self.quantization}"
            raise UnsupportedError(f"{what} cannot be saved; keep its checkpoint")

        weights.save_pretrained(self, path, max_shard_bytes=max_shard_bytes, tokenizer_from=self.path)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def head(self) -> WeightLike:
        """[V, H]: the embedding table, or lm_head where they are not tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read at the first use. CheckpointError if there is none."""
        if self._tokenizer is None:
            from gemma4_fast.errors import CheckpointError
            from gemma4_fast.tokenizer import Tokenizer

            if self.path is None:
                raise CheckpointError("this model was not loaded from a folder, so it has no tokenizer; pass token ids")
            self._tokenizer = Tokenizer.from_pretrained(self.path)
        return self._tokenizer

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> KVCache:
        """An empty cache for sequences of up to `max_len` tokens (default: the model's maximum)."""
        return KVCache(
            self.config,
            batch_size,
            self.config.max_position_embeddings if max_len is None else max_len,
            self.dtype,
            self.device,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside: no gradients, and this model's backends."""
        with torch.inference_mode(), ops.default_backend(self.backend):
            yield

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """input_ids [B, T] int -> logits [B, T, V] in the model's dtype. With a cache the tokens follow those it holds.

        ValueError for ids that are out of range, an empty batch or prompt, a wrong device, or a context overflow.
        """
        self._check_forward(input_ids, cache)
        batch, tokens = input_ids.shape
        decode = cache is not None and tokens == 1
        with self.running():
            step = self.model.step([tokens] * batch, cache, decode=decode)
            h = self.model(input_ids.reshape(-1).long(), step, cache)
            return self.logits(h).view(batch, tokens, -1)

    def logits(self, h: Tensor, *, argmax: bool = False) -> Tensor:
        """Final hidden states [T, H] -> softcapped logits [T, V], or the argmax [T] (-1: not finite)."""
        return ops.logits(h, self.head, self.config.final_logit_softcapping, argmax)

    def choose(self, h: Tensor, sampling: Sampling, uniform: Tensor | None = None) -> Tensor:
        """Final hidden states [T, H] -> the next tokens' ids [T] (-1: not finite), the likeliest, or drawn by uniform [T] fp32
        in [0, 1)."""
        if sampling.greedy:
            return self.logits(h, argmax=True)
        return ops.sample(h, self.head, *self._draw(sampling, cast(Tensor, uniform)))

    def chooses_in_one(self, h: Tensor, sampling: Sampling) -> bool:
        """Whether a backend has that choice in one: of hidden states like h, and numbers like its first column."""
        return sampling.greedy or ops.in_one("sample", h, self.head, *self._draw(sampling, h[:, 0]))

    def _draw(self, s: Sampling, uniform: Tensor) -> tuple[Any, ...]:
        return uniform, self.config.final_logit_softcapping, s.temperature, s.top_k, s.top_p, s.min_p

    def _check_forward(self, input_ids: Tensor, cache: KVCache | None) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids must be an int64 or int32 tensor, got {got}")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [B, T] with B, T >= 1, got shape {list(input_ids.shape)}")
        if input_ids.device != self.device:
            raise ValueError(f"input_ids are on {input_ids.device}, the model on {self.device}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.config.vocab_size}), got {low if low < 0 else high}")
        have, limit, what = 0, self.config.max_position_embeddings, "max_position_embeddings"
        if cache is not None:
            if cache.config != self.config or cache.lens.device != self.device:
                raise ValueError("this cache was made for another model or device")
            if cache.layer(0).v.dtype != self.dtype:
                raise ValueError(f"the cache holds {cache.layer(0).v.dtype}, the model computes in {self.dtype}")
            if cache.batch_size != input_ids.shape[0]:
                raise ValueError(f"input_ids have {input_ids.shape[0]} rows, the cache {cache.batch_size}")
            have, limit, what = max(cache.host_lens), cache.max_len, "the cache's max_len"
        if have + input_ids.shape[1] > limit:
            raise ValueError(f"{have} cached + {input_ids.shape[1]} new tokens exceed {what} = {limit}")

    @explicit
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        logprobs: int | None = None,
        prefill_chunk: int = 2048,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Generation | list[Generation]:
        """Continue one prompt, which gives a Generation, or several, which give a list of them.

        prompt: text, token ids (a list or a 1-D tensor) or chat messages (a list of dicts with
            "role" and "content"); for several prompts a list of these, or a 2-D tensor.
        max_new_tokens: the most tokens to add. None: 256, or what the context leaves.
        temperature, top_k, top_p, min_p: how the next token is drawn. Temperature 0 always takes
            the likeliest token. What is None comes from the checkpoint's generation_config.json;
            without that file the likeliest token is taken.
        seed: an integer in [0, 2^63). The same seed gives the same tokens; prompt b of several
            draws from seed + b. None: a new seed at each call.
        stop: strings that end the text, and are not part of it.
        stop_token_ids: token ids that end the text. None: the checkpoint's; (): none.
        logprobs: n >= 0 records each token's log-probability and the n likeliest tokens. None: off.
        prefill_chunk: how many tokens of the prompts run at once.
        on_prefill: is called with (done, total) prompt tokens after each chunk.

        ValueError, before any work, for values out of range and for a prompt and output that
        exceed the model's positions. The cache stays with the model for its next call with as many
        prompts, if it takes at most an eighth of the weights' bytes; `model.spares.clear()` frees
        it.
        """
        from gemma4_fast.generate import generate

        return generate(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )

    @explicit
    def stream(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        logprobs: int | None = None,
        prefill_chunk: int = 2048,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Stream:
        """Continue one prompt; iterate over the result for the new text, piece by piece.

        The arguments and errors are those of `generate`. The Stream's `result` is the Generation
        so far, which is complete when the iteration ends.
        """
        from gemma4_fast.generate import stream

        return stream(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )


def meta_model(config: Gemma4Config, dtype: torch.dtype = torch.bfloat16, quantize: str | None = None) -> Gemma4:
    """The model's tensors as shapes alone."""
    with torch.device("meta"):
        model = Gemma4(config).to(dtype)
    return model if quantize is None else model.quantize(quantize)


@functools.cache  # building the shapes takes some 40 ms
def weights_size(config: Gemma4Config, dtype: torch.dtype, quantize: str | None = None) -> int:
    """Bytes of the model's weights."""
    return sum(t.nbytes for t in meta_model(config, dtype, quantize).state_dict().values())


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """ "bf16", "bfloat16", torch.bfloat16, ... -> one of DTYPES."""
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        hint = ""
        if isinstance(dtype, str) and dtype.lower() in BITS:
            bits = dtype.lower()
            hint = f"; use quantize={bits!r} (--quantize {bits}) for quantized weights"
        raise ValueError(f"dtype must be one of {names}, got {dtype!r}{hint}")
    return found


def parse_device(device: torch.device | str | None) -> torch.device:
    """A usable torch device; None: the GPU if there is one. ValueError if it does not exist here."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device must be a name or a torch.device, got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError as e:
        if str(device).partition(":")[0].lower() in ("gpu", "nvidia", "rocm", "hip"):
            raise ValueError(f"unknown device {device!r}; use cuda") from e
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda or cuda:0") from e
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {str(device)!r}")
    if found.type == "cpu":
        if found.index:
            raise ValueError(f"no device {str(device)!r}: the processor is one device, cpu")
        return torch.device("cpu")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            if count == 0:
                raise ValueError(f"no CUDA device found, so {str(device)!r} cannot be used")
            many = "1 CUDA device" if count == 1 else f"{count} CUDA devices"
            raise ValueError(f"no device {str(device)!r}: this machine has {many}")
        found = torch.device("cuda", found.index if found.index is not None else torch.cuda.current_device())
    return found
