r"""Trains the tiny Gemma 4 checkpoint of this folder (26B-A4B architecture, 4.9M parameters) on the CPU.

Text: the six novels of Jane Austen (public domain), as packaged in the Debian package r-cran-janeaustenr. Fetch and unpack
it, make the text files, train, evaluate:

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb deb
    R=deb/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
    python -m gemma4_fast.tiny.train --prepare $R --out text
    python -m gemma4_fast.tiny.train --text text/novel*.txt --heldout text/heldout.txt --out DIR --steps 1700 --rows 4 \
        --muon --compile --lr 4e-3 --cooldown 0.7 --dropout 0.1
    python -m gemma4_fast.tiny.train --eval DIR

The model is transformers' Gemma4ForCausalLM, so the result does not depend on this package's kernels. For speed on a CPU
the training step swaps in two equivalent forms through transformers' own interfaces: all experts as one dense product with
the unrouted ones weighted zero, and sliding-window attention in blocks of one window.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

HERE = Path(__file__).resolve().parent
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
PAD, EOS, BOS, UNK, SOT, EOT = range(6)
CONFIG = dict(
    vocab_size=4096, hidden_size=192, intermediate_size=96, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, num_global_key_value_heads=1, head_dim=256, global_head_dim=512, attention_k_eq_v=True,
    sliding_window=128, layer_types=["sliding_attention"] * 5 + ["full_attention"], num_kv_shared_layers=0,
    enable_moe_block=True, num_experts=16, top_k_experts=4, moe_intermediate_size=32, use_double_wide_mlp=False,
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=4096, final_logit_softcapping=30.0,
    hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
    attention_dropout=0.0, max_position_embeddings=1024, use_bidirectional_attention=None, initializer_range=0.02,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
    pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS,
)  # fmt: skip
GENERATION = dict(
    bos_token_id=BOS, eos_token_id=[EOS, EOT], pad_token_id=PAD, do_sample=True, temperature=0.8, top_k=40, top_p=0.95
)
EVAL_WINDOW, EVAL_STRIDE = 512, 256


# ---------------------------------------------------------------- text
def read_rdb(path: Path) -> Iterator[list[str]]:
    """Yields every character vector of an R lazy-load database (length-prefixed zlib blobs of XDR-serialized objects)."""
    data = path.read_bytes()
    while data:
        z = zlib.decompressobj()
        raw, data = z.decompress(data[4:]), z.unused_data
        pos = 18 + struct.unpack(">i", raw[14:18])[0]
        count, lines = struct.unpack(">i", raw[pos + 4 : pos + 8])[0], []
        pos += 8
        for _ in range(count):
            size = max(0, struct.unpack(">i", raw[pos + 4 : pos + 8])[0])
            lines.append(raw[pos + 8 : pos + 8 + size].decode())
            pos += 8 + size
        yield lines


def chapters_of(lines: list[str]) -> list[str]:
    """Drops title pages, headings, footnotes and closing matter; joins wrapped lines; one string per chapter."""
    out: list[str] = []
    text = "\n".join(lines)
    text = re.split(r"\n\s*(?:FINIS|Finis|THE END|A NOTE ON THE TEXT)", text)[0]
    for body in re.split(r"\n\s*(?:CHAPTER|Chapter) [0-9IVXL]+\s*\n", text)[1:]:
        body = re.sub(r"\n\s*(VOLUME [IVX]+|[* ]{3,}|\*Vide .*|\[(?:End volume|At this point).*?\])\s*(?=\n|$)", "\n", body)
        body = body.replace("_", "").replace("love is declared,*", "love is declared,")
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body)]
        out.append("\n\n".join(p for p in paragraphs if p))
    return out


def prepare(rdb: Path, out: Path) -> None:
    """Writes novel*.txt (chapters separated by a form feed) and heldout.txt (one whole chapter of every novel)."""
    out.mkdir(parents=True, exist_ok=True)
    held = []
    for i, lines in enumerate(read_rdb(rdb), 1):
        chapters = chapters_of(lines)
        first = len(chapters) * 3 // 5  # the first chapter of usual length past three fifths of the novel
        pick = next(j for j in range(first, len(chapters)) if 10000 <= len(chapters[j]) <= 17000)
        held.append(chapters.pop(pick))
        (out / f"novel{i}.txt").write_text("\f".join(chapters), encoding="utf-8")
        print(f"{lines[0].strip()}: {len(chapters)} chapters, {sum(map(len, chapters))} characters, held out {pick + 1}")
    (out / "heldout.txt").write_text("\n\n".join(held) + "\n", encoding="utf-8")


def dialogues(chapter: str) -> Iterator[str]:
    """Runs of consecutive paragraphs with quoted speech, as user/model turns without the narration between quotes."""
    run: list[str] = []
    for paragraph in chapter.split("\n\n") + [""]:
        quotes = re.findall(r'"([^"]+)"?', paragraph)
        speech = " ".join(q.strip() for q in quotes)
        if paragraph.startswith('"') and 8 <= len(speech) <= 600 and sum(map(len, quotes)) > 0.4 * len(paragraph):
            run.append(speech[0].upper() + re.sub(r"[,;:]$", ".", speech[1:]))
            if len(run) < 8:
                continue
        run = run[: len(run) // 2 * 2]
        if run:
            roles = ("user", "model")
            yield "<bos>" + "".join(f"<|turn>{roles[i % 2]}\n{s}<turn|>\n" for i, s in enumerate(run))
        run = []


# ---------------------------------------------------------------- tokenizer and export
def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any UTF-8 text round-trips, since the 256 bytes are all in the vocabulary."""
    tok = Tokenizer(models.BPE())
    pattern = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = CONFIG["vocab_size"]
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=2)
    )
    assert tok.get_vocab_size() == size, tok.get_vocab_size()
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return tok


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def export(model: Gemma4ForCausalLM, tok: Tokenizer, out: Path) -> None:
    """Writes the checkpoint in bf16, config.json in the published spelling; every file is replaced atomically."""
    tmp = out / ".export"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(tmp, state_dict=state)
    (tmp / "generation_config.json").unlink(missing_ok=True)
    tok.save(str(tmp / "tokenizer.json"))
    names = ("pad_token", "eos_token", "bos_token", "unk_token")
    write_json(
        tmp / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict(zip(names, SPECIAL, strict=False)),
            "additional_special_tokens": SPECIAL[4:],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    )
    base = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "dtype": "bfloat16"}
    write_json(tmp / "config.json", {**base, **CONFIG, "use_cache": True})
    write_json(tmp / "generation_config.json", GENERATION)
    shutil.copy(HERE / "chat_template.jinja", tmp / "chat_template.jinja")
    for f in tmp.iterdir():
        f.chmod(0o644)
        if (out / f.name).resolve() != HERE / "chat_template.jinja":
            os.replace(f, out / f.name)
    shutil.rmtree(tmp)


# ---------------------------------------------------------------- model
def dense_experts(mod: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All experts as one product; the experts that a token is not routed to have weight zero."""
    e, two_i, h = mod.gate_up_proj.shape
    i = two_i // 2
    w = torch.zeros(x.shape[0], e, dtype=weights.dtype).scatter(1, ids, weights).to(x.dtype)
    gate = F.linear(x, mod.gate_up_proj[:, :i].reshape(e * i, h))
    up = F.linear(x, mod.gate_up_proj[:, i:].reshape(e * i, h))
    act = (mod.act_fn(gate) * up).view(-1, e, i) * w[:, :, None].to(gate.dtype)
    return (act.view(-1, e * i) @ mod.down_proj.transpose(1, 2).reshape(e * i, h).to(act.dtype)).to(x.dtype)


def block_attention(
    mod: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **kwargs: object
) -> tuple[torch.Tensor, None]:
    """Causal attention in blocks of one window, each against itself and the block before; a full layer is one block."""
    b, n, t, d = q.shape
    w = mod.sliding_window or t
    blocks, span = t // w, min(t, 2 * w)
    assert t % w == 0 and k.shape[1] == 1, "whole windows and one KV head"
    qb = q.view(b, n, blocks, w, d).transpose(1, 2).reshape(b * blocks, n * w, d)

    def spans(x: torch.Tensor) -> torch.Tensor:
        x = x.to(q.dtype).reshape(b, blocks, w, d)
        x = torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1], x], 2) if blocks > 1 else x
        return x.view(b * blocks, span, d)

    i, j = torch.arange(w)[:, None] + span - w, torch.arange(span)[None]
    keep = ((j <= i) & (j > i - w)).repeat(n, 1)[None].expand(blocks, -1, -1).clone()
    keep[0, :, : span - w] = False
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, float("-inf"))
    scores = torch.bmm(qb, spans(k).transpose(1, 2)).view(b, blocks, n * w, span) + bias
    out = torch.bmm(scores.float().softmax(-1).to(q.dtype).view(b * blocks, n * w, span), spans(v))
    return out.view(b, blocks, n, w, d).permute(0, 1, 3, 2, 4).reshape(b, t, n, d), None


AttentionInterface.register("tiny_block", block_attention)
ALL_EXPERTS_FUNCTIONS.register("tiny_dense", dense_experts)


def build(seed: int) -> Gemma4ForCausalLM:
    """A fresh fp32 model, initialised so that the first loss is about ln V and attention starts out smooth."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**CONFIG)).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.04)
        for i, layer in enumerate(model.model.layers):
            layer.layer_scalar.fill_(0.75 + 0.0625 * (i % 4))  # a fixed scale; every branch that reads x normalises it
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.fill_(layer.self_attn.head_dim**-0.25)  # the softmax scale is 1.0
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.fill_(0.4)
            for p in layer.parameters():
                if p.dim() >= 2:
                    p.normal_(0, p.shape[-1] ** -0.5)
            layer.router.proj.weight.normal_(0, 0.5)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps, on stacks of equal-shaped matrices (RMS matched to Adam)."""

    def __init__(self, params: list[torch.Tensor], lr: float, decay: float) -> None:
        super().__init__(params, dict(lr=lr, decay=decay))
        shapes = sorted({p.shape[-2:] for p in params})
        self.stacks = [[p for p in params if p.shape[-2:] == s] for s in shapes]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["decay"]
        for stack in self.stacks:
            update = []
            for p in stack:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 0.05)
                update.append(p.grad.lerp(m, 0.95).reshape(-1, *p.shape[-2:]))
            x = torch.cat(update)
            r, c = x.shape[-2:]
            x = x.transpose(1, 2) if r > c else x
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
            for _ in range(5):
                a = x @ x.transpose(1, 2)
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = (x.transpose(1, 2) if r > c else x).float() * (0.2 * max(r, c) ** 0.5)
            for p, u in zip(stack, x.split([p.numel() // (r * c) for p in stack]), strict=True):
                p.mul_(1 - lr * decay).add_(u.reshape(p.shape), alpha=-lr)


# ---------------------------------------------------------------- data, loss, evaluation
class Batches:
    """Sequences of `length`+1 tokens: `<bos>` and running text from a paragraph's start on, or packed dialogues."""

    def __init__(self, texts: list[str], tok: Tokenizer, length: int, chat: float, seed: int) -> None:
        self.length, self.chat, self.rng = length, chat, random.Random(seed)
        chapters = [c for text in texts for c in text.split("\f")]
        talk = [d for c in chapters for d in dialogues(c)]
        self.talk = [e.ids for e in tok.encode_batch(talk, add_special_tokens=False)]
        stream: list[int] = []
        self.starts: list[int] = []
        for chapter in chapters:
            for n, e in enumerate(tok.encode_batch(chapter.split("\n\n"), add_special_tokens=False)):
                stream += tok.encode("\n\n", add_special_tokens=False).ids if n else [BOS]
                self.starts.append(len(stream))
                stream += e.ids
            stream.append(EOS)
        self.stream, self.seen, self.queue = stream, 0, []
        self.talk_tokens = sum(map(len, self.talk))

    def text_row(self) -> list[int]:
        """The next window: every epoch lays windows from a new offset, each moved on to a paragraph's start."""
        if not self.queue:
            marks = range(self.rng.randrange(self.length), len(self.stream) - self.length, self.length)
            ordered, k = [], 0
            for mark in marks:
                while k + 1 < len(self.starts) and self.starts[k] < mark:
                    k += 1
                ordered.append(min(self.starts[k], len(self.stream) - self.length))
            self.queue = self.rng.sample(ordered, len(ordered))
        start = self.queue.pop()
        return [BOS] + self.stream[start : start + self.length]

    def row(self) -> list[int]:
        if self.rng.random() >= self.chat:
            return self.text_row()
        row: list[int] = []
        while len(row) <= self.length:
            row += self.rng.choice(self.talk)
        return row[: self.length + 1]

    def batch(self, rows: int) -> torch.Tensor:
        self.seen += rows * self.length
        return torch.tensor([self.row() for _ in range(rows)])


def token_losses(model: Gemma4ForCausalLM, ids: torch.Tensor, masks: dict | None = None) -> torch.Tensor:
    """Negative log-likelihood (nats) of every next token, [rows, length]."""
    hidden = model.model(input_ids=ids[:, :-1], attention_mask=masks, use_cache=False).last_hidden_state
    cap = CONFIG["final_logit_softcapping"]
    logits = cap * torch.tanh(model.lm_head(hidden).float() / cap)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)


@torch.no_grad()
def heldout_loss(model: Gemma4ForCausalLM, ids: list[int], full: bool = True) -> tuple[float, int]:
    """Sum of nats over `ids` and their number. Windows of EVAL_WINDOW inputs, each starting with `<bos>`, every EVAL_STRIDE
    tokens; a window counts only the tokens that no earlier window has counted, so each token counts once."""
    total, done, size = 0.0, 0, EVAL_WINDOW
    for start in range(0, len(ids), EVAL_STRIDE if full else size):
        chunk = ids[start : start + size]
        losses = token_losses(model, torch.tensor([[BOS] + chunk]))[0]
        fresh = start + len(chunk) - done
        if fresh > 0:
            total, done = total + losses[-fresh:].double().sum().item(), done + fresh
        if start + size >= len(ids):
            break
    return total, done


def evaluate(folder: Path) -> None:
    """Perplexity and bits per byte on heldout.txt (bf16 weights computed in fp32, then all in bf16), and expert use."""
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        counts = torch.zeros(CONFIG["num_hidden_layers"], CONFIG["num_experts"])
        for row, layer in zip(counts, model.model.layers, strict=True):

            def count(mod: torch.nn.Module, inputs: tuple, outputs: tuple, row: torch.Tensor = row) -> None:
                row += torch.bincount(outputs[2].flatten(), minlength=row.numel())

            layer.router.register_forward_hook(count)
        nats, n = heldout_loss(model, ids)
        size = len(text.encode())
        print(f"{dtype}: perplexity {math.exp(nats / n):.3f} on {n} tokens / {size} bytes, {nats / n:.4f} nats/token, "
              f"{nats / math.log(2) / size:.4f} bits/byte")  # fmt: skip
    share = counts / counts.sum(1, keepdim=True) * CONFIG["num_experts"]
    for i, row in enumerate(share):
        print(f"layer {i}: expert load over the even share, min {row.min():.2f} max {row.max():.2f}")


# ---------------------------------------------------------------- training
def train(args: argparse.Namespace) -> None:
    random.seed(args.seed)
    texts = [Path(f).read_text(encoding="utf-8") for f in args.text]
    tok = train_tokenizer([c for t in texts for c in t.split("\f")])
    data = Batches(texts, tok, args.length, args.chat, args.seed)
    held = Path(args.heldout).read_text(encoding="utf-8")
    held_ids = tok.encode(held, add_special_tokens=False).ids
    print(f"{len(data.stream)} text tokens, {len(data.talk)} dialogues with {data.talk_tokens} tokens, held out "
          f"{len(held_ids)} tokens / {len(held.encode())} bytes", flush=True)  # fmt: skip
    model = build(args.seed)
    model.config._attn_implementation, model.config._experts_implementation = "tiny_block", "tiny_dense"
    masks = {"full_attention": None, "sliding_attention": None}
    if args.dropout:
        drop = lambda m, i, o: F.dropout(o, args.dropout, m.training)  # noqa: E731
        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(drop)
            layer.post_feedforward_layernorm.register_forward_hook(drop)
    routed: list[torch.Tensor] = []

    def balance(mod: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        probs, _, ids = outputs
        load = (ids[:, :, None] == torch.arange(probs.shape[-1])).float().mean((0, 1))
        routed.append(probs.shape[-1] * (probs.mean(0) * load).sum())

    for layer in model.model.layers:
        layer.router.register_forward_hook(balance)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.dim() >= 2 and "embed" not in n and "router" not in n]
    tables = [p for n, p in named if p.dim() >= 2 and ("embed" in n or "router" in n)]
    vectors = [p for _, p in named if p.dim() < 2]
    print(f"{sum(p.numel() for _, p in named)} parameters", flush=True)
    groups = [dict(params=tables, weight_decay=args.decay), dict(params=vectors, weight_decay=0.0)]
    optimizers: list[torch.optim.Optimizer] = []
    if args.muon:
        optimizers.append(Muon(matrices, args.lr, args.decay))
    else:
        groups.append(dict(params=matrices, weight_decay=args.decay))
    optimizers.append(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-10))
    losses_of: Callable[..., torch.Tensor] = (
        torch.compile(token_losses, dynamic=False, fullgraph=True) if args.compile else token_losses
    )
    start = last_export = last_print = time.monotonic()
    step, done, running = 0, 0.0, 0.0
    threads, cost = torch.get_num_threads(), {}
    while done < 1:
        began = time.monotonic()
        if args.adapt and step > 20:  # a shared machine: now and then time three steps on one thread or on all
            other = 1 if threads > 1 else args.adapt
            use = other if step % 80 in (21, 22, 23) else threads
            torch.set_num_threads(use)
        factor = min(1.0, max((step + 1) / 100, done * 50), (1 - done) / args.cooldown)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = args.lr * factor
        model.train()
        routed.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            nll = losses_of(model, data.batch(args.rows), masks).mean()
        (nll + args.balance * torch.stack(routed).sum()).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
        cost[torch.get_num_threads()] = time.monotonic() - began
        if args.adapt and step % 80 == 23:
            threads = min(cost, key=cost.__getitem__)
        step += 1
        running = nll.item() if step == 1 else running * 0.95 + nll.item() * 0.05
        now = time.monotonic()
        start = now if step == 1 else start  # the first step compiles
        done = step / args.steps if args.steps else (now - start) / (60 * args.minutes)
        if step == 1 or now - last_print > args.report or done >= 1:
            model.eval()
            model.config._attn_implementation = "sdpa"
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
                nats, n = heldout_loss(model, held_ids[:8192] if done < 1 else held_ids, full=False)
            model.config._attn_implementation = "tiny_block"
            last_print = time.monotonic()
            rate = (data.seen - args.rows * args.length) / max(1, now - start)
            passes = data.seen * (1 - args.chat) / len(data.stream)
            print(
                f"step {step} {done:.1%} {now - start:.0f}s lr {args.lr * factor:.1e} loss {running:.3f} "
                f"held out {nats / n:.3f} balance {sum(routed).item() / len(routed):.3f} {rate:.0f} tok/s "
                f"threads {threads} epoch {passes:.2f}",
                flush=True,
            )
        if args.out and (done >= 1 or now - last_export > 60 * args.export_every):
            export(model, tok, Path(args.out))
            shutil.copy(args.heldout, Path(args.out) / "heldout.txt")
            last_export = time.monotonic()
    print(f"{step} steps, {data.seen} tokens, {time.monotonic() - start:.0f}s", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--prepare", type=Path, metavar="RDB", help="make text files in --out from the unpacked package")
    ap.add_argument("--eval", type=Path, metavar="DIR", help="perplexity of a checkpoint on its heldout.txt")
    ap.add_argument("--text", nargs="+", help="training text, chapters separated by form feeds")
    ap.add_argument("--heldout", help="held-out text")
    ap.add_argument("--out", help="folder to write")
    ap.add_argument("--steps", type=int, default=0)
    ap.add_argument("--minutes", type=float, default=60, help="length of the run, unless --steps is given")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--rows", type=int, default=8)
    ap.add_argument("--length", type=int, default=512)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--decay", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.0)
    ap.add_argument("--chat", type=float, default=0.15, help="part of the sequences that is dialogue")
    ap.add_argument("--balance", type=float, default=0.01)
    ap.add_argument("--cooldown", type=float, default=0.5, help="last part of the run, over which the rate falls to zero")
    ap.add_argument("--report", type=float, default=30, help="seconds between progress lines")
    ap.add_argument("--export-every", type=float, default=5, help="minutes between exports")
    ap.add_argument("--adapt", type=int, default=0, metavar="N", help="use one thread or N, whichever is faster just now")
    for flag in ("muon", "compile", "fp32"):
        ap.add_argument(f"--{flag}", action="store_true")
    args = ap.parse_args()
    if args.prepare:
        prepare(args.prepare, Path(args.out))
    elif args.eval:
        evaluate(args.eval)
    else:
        train(args)


if __name__ == "__main__":
    main()
