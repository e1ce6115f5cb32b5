"""One plain PyTorch function per op of the table. Read them beside the formulas; they are never tuned.

Every function takes any floating dtype. Half-precision inputs are widened to fp32 exactly where transformers' Gemma4 widens
them (norms, RoPE angles, softmax, router) and rounded back where it rounds; in fp64 nothing is rounded at all. The error that
one of these makes in bf16 against itself in fp64 is the yardstick ("what plain PyTorch loses") for every other backend.

Names: T num_tokens, B batch, H hidden_size, Hq/Hkv query/KV heads, D head_dim, S cache slots per sequence, W window,
E num_experts, K top_k, I intermediate size, V vocab_size, P hidden_size_per_layer_input, R rotary pairs.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """fp32 for half-precision x, x itself for fp32 and fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x [..., H] -> x / sqrt(mean(x^2) + eps) * weight, in fp32 or wider, rounded to x.dtype. weight [H]; None: no weight.

    Source: Zhang & Sennrich 2019; Gemma 4 multiplies by `weight`, not 1 + weight.
    """
    wide = _wide(x)
    y = wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (y if weight is None else y * _wide(weight)).to(x.dtype)


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The end of a sublayer: y = (residual + rms_norm(x, weight)) * scale, and z = rms_norm(y, next_weight).

    x, residual [T, H]; weight, next_weight, other_weight [H]; scale [1]. other_weight: of a second norm of y, for a sublayer
    with two branches. Returns (y, z, z of other_weight), None for a norm without a weight. Source: Gemma 2 (post-norms).
    """
    y = residual + rms_norm(x, weight, eps)
    y = y if scale is None else y * scale
    z, other = (None if w is None else rms_norm(y, w, eps) for w in (next_weight, other_weight))
    return y, z, other


def moe_norm_add_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    experts_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """norm_add_norm of a layer with experts: x there is rms_norm(dense, dense_weight) + rms_norm(experts, experts_weight) here.

    dense, experts, residual [T, H]; the weights [H]; scale [1]. Returns (y, z), z None without next_weight. Source: Gemma 4.
    """
    x = rms_norm(dense, dense_weight, eps) + rms_norm(experts, experts_weight, eps)
    return norm_add_norm(x, residual, weight, scale, next_weight, eps)[:2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [..., heads, D] with cos, sin [..., R]: columns i and i + D/2 form a pair, for i < R; the rest stay.

    Source: RoFormer (Su et al. 2021), half-split pairing. Gemma 4's "proportional" RoPE on full-attention layers has
    R = D/8 pairs, its sliding layers R = D/2. Angles are rounded to x.dtype first, as transformers does.
    """
    pairs, half = cos.shape[-1], x.shape[-1] // 2
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    a, b = x[..., :pairs], x[..., half : half + pairs]
    return torch.cat(
        (a * cos - b * sin, x[..., pairs:half], b * cos + a * sin, x[..., half + pairs :]),
        dim=-1,
    )


def embedding(weight: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
    """Rows ids [T] int64 of weight [V, H], times scale -> [T, H]. Gemma's is sqrt(H), rounded to the weight's dtype."""
    return F.embedding(ids, weight) * scale


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """positions [...] int, inv_freq [R] radians per token -> cos, sin [..., R] in inv_freq.dtype."""
    angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    return angles.cos(), angles.sin()


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Norms and RoPE on the packed projection, and the cache write.

    qkv [T, (Hq + n Hkv) D]: n = 2 holds q, k, v; n = 1 holds q and one projection that is both K and V; num_kv_heads = 0
    holds q alone (a layer that reads another layer's cache). q_weight, k_weight [D]; cos, sin [T, R].
    q = RoPE(rms(q) * q_weight), k = RoPE(rms(k) * k_weight), v = rms(v).

    Without v_cache: returns q [T, Hq, D], k, v [T, Hkv, D]. With v_cache [A, S, Hkv, D] and slots [T] int64 (distinct rows of
    the cache flattened to [A*S, Hkv, D]): v, and k if there is a k_cache, are written there; returns (q, None, None).
    """
    tokens, dim = qkv.shape[0], q_weight.shape[0]
    heads = qkv.view(tokens, qkv.shape[1] // dim, dim)
    q = rotate(rms_norm(heads[:, :num_q_heads], q_weight, eps), cos, sin)
    if num_kv_heads == 0:
        return q, None, None
    raw_k, raw_v = heads[:, num_q_heads : num_q_heads + num_kv_heads], heads[:, -num_kv_heads:]
    v = rms_norm(raw_v, None, eps)
    k = rotate(rms_norm(raw_k, k_weight, eps), cos, sin)
    if v_cache is None:
        return q, k, v
    if slots is None:
        raise ValueError("v_cache needs slots")
    v_cache.view(-1, num_kv_heads, dim)[slots] = v
    if k_cache is not None:
        k_cache.view(-1, num_kv_heads, dim)[slots] = k
    return q, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v for one sequence. q [T, Hq, D], k, v [S, Hkv, D], mask [T, S] bool, True: may look.

    Hq / Hkv query heads share a KV head (grouped-query attention, Ainslie et al. 2023). Softmax in fp32 or wider.
    """
    q = q.unflatten(1, (k.shape[1], -1))  # [T, Hkv, Hq / Hkv, D]
    scores = torch.einsum("tkgd,skd->kgts", q, k) * scale
    scores = _wide(scores).masked_fill(~mask, float("-inf"))
    return torch.einsum("kgts,skd->tkgd", scores.softmax(-1).to(q.dtype), v).flatten(1, 2)


def cached_sequence(
    length: int,
    k_cache: Tensor | None,
    v_cache: Tensor,
    table_row: Tensor | None,
    inv_freq: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one sequence of `length` tokens has left in its cache: k, v [n, Hkv, D] and positions [n] int64, n <= S.

    k_cache, v_cache [S, Hkv, D]; with table_row [blocks] int32 they are [num_blocks, block_size, Hkv, D] instead and slot s
    lies in block table_row[s // block_size]. Slot s holds the newest position p with p mod S = s: a ring if length > S.
    Without k_cache, K = RoPE(k_weight * V) is rebuilt: both come from one projection (V = rms(x), K = RoPE(rms(x) * w)).
    """
    if table_row is not None:
        v_cache = v_cache[table_row.long()].flatten(0, 1)
        k_cache = None if k_cache is None else k_cache[table_row.long()].flatten(0, 1)
    size = v_cache.shape[0]
    positions = torch.arange(max(0, length - size), length, device=v_cache.device)
    v = v_cache[positions % size]
    if k_cache is not None:
        return k_cache[positions % size], v, positions
    if inv_freq is None or k_weight is None:
        raise ValueError("a V-only cache needs inv_freq and k_weight")
    k = (_wide(v) * _wide(k_weight)).to(v.dtype)
    return rotate(k, *rope_angles(positions, _wide(inv_freq))), v, positions


def gqa_decode(
    q: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor,
    kv_lens: Tensor,
    window: int | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Attention of one new token per sequence over its cache, which already holds that token.

    q [B, Hq, D]; k_cache, v_cache [B, S, Hkv, D], or [num_blocks, block_size, Hkv, D] with block_table [B, blocks] int32;
    kv_lens [B] int, tokens so far, the new one included (0: an idle row, output 0); the query stands at kv_lens - 1 and
    sees the newest `window` tokens. k_cache None: V-only cache, K is rebuilt from k_weight [D] and inv_freq [R].
    Returns [B, Hq, D].
    """
    out = torch.zeros_like(q)
    for b, length in enumerate(kv_lens.tolist()):
        if length == 0:
            continue
        row = (None, b) if block_table is None else (block_table[b], slice(None))
        k, v, positions = cached_sequence(
            length, None if k_cache is None else k_cache[row[1]], v_cache[row[1]], row[0], inv_freq, k_weight
        )
        mask = positions > length - 1 - (window or length)
        out[b] = attend(q[b : b + 1], k, v, mask[None], scale)[0]
    return out


def gqa_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    k_weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Causal attention of new tokens over themselves and what the cache holds from before them.

    q [T, Hq, D], k, v [T, Hkv, D]: all sequences end to end, sequence b in rows cu_seqlens[b]:cu_seqlens[b + 1]
    (cu_seqlens [B + 1] int32). prefix_lens [B] int: tokens already in the cache, read as in gqa_decode; None: no prefix.
    image_ids [T] int32: tokens of one image (equal ids >= 0) also see each other forwards; -1: text. Then the window:
    (causal or same image) and key > query - window. Returns [T, Hq, D].
    """
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for b, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        prefix = 0 if prefix_lens is None else int(prefix_lens[b])
        keys, values = k[lo:hi], v[lo:hi]
        key_pos = q_pos = torch.arange(prefix, prefix + hi - lo, device=q.device)
        if prefix:
            if v_cache is None:
                raise ValueError("prefix_lens needs v_cache")
            row = (None, b) if block_table is None else (block_table[b], slice(None))
            old_k, old_v, old_pos = cached_sequence(
                prefix, None if k_cache is None else k_cache[row[1]], v_cache[row[1]], row[0], inv_freq, k_weight
            )
            keys, values, key_pos = torch.cat((old_k, keys)), torch.cat((old_v, values)), torch.cat((old_pos, key_pos))
        mask = key_pos[None] <= q_pos[:, None]  # [T_b, S_b]
        if image_ids is not None:
            ids = image_ids[lo:hi]
            same = (ids[:, None] == ids[None]) & (ids[:, None] >= 0)
            mask[:, mask.shape[1] - ids.shape[0] :] |= same
        if window is not None:
            mask &= key_pos[None] > q_pos[:, None] - window
        out[lo:hi] = attend(q[lo:hi], keys, values, mask, scale)
    return out


def route_topk(
    x: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Gemma 4's router, all in fp32 or wider: softmax over all experts, the top K, renormalised to 1, times a learned scale.

    x [T, H]: the residual stream, un-normed; scale [H]; proj [E, H]; per_expert_scale [E].
    Returns weights [T, K] fp32 (fp64 for fp64 x), in falling order of probability, and ids [T, K] int32; of equal
    probabilities the lower expert id comes first.
    """
    probs = router_logits(x, scale, proj, eps).softmax(-1)
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    probs, ids = probs[:, :top_k], ids[:, :top_k]
    weights = probs / probs.sum(-1, keepdim=True) * _wide(per_expert_scale)[ids]
    return weights, ids.to(torch.int32)


def router_logits(x: Tensor, scale: Tensor, proj: Tensor, eps: float = 1e-6) -> Tensor:
    """x [T, H], scale [H], proj [E, H] -> (rms(x) * scale * H^-0.5) @ proj^T [T, E], in fp32 or wider."""
    h = rms_norm(_wide(x), None, eps) * _wide(scale) * x.shape[-1] ** -0.5
    return F.linear(h, _wide(proj))


def expert_dispatch(ids: Tensor, num_experts: int, block_m: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the T*K (token, expert) assignments by expert, and cut each expert's rows into tiles of block_m.

    ids [T, K] int32. Returns order [T*K] int32: sorted row r is assignment order[r] (token order[r] // K), stable, so that
    an expert sees its tokens in order; offsets [E + 1] int32: expert e owns sorted rows offsets[e]:offsets[e + 1];
    tiles [ceil(T*K / block_m) + min(E, T*K), 2] int32: (expert, first sorted row), -1 where there is no tile.
    An id outside [0, E) is another device's expert: such assignments come last, behind offsets[E], and have no tile.
    """
    flat = ids.flatten().long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    rows = [
        (expert, start)
        for expert in range(num_experts)
        for start in range(int(offsets[expert]), int(offsets[expert + 1]), block_m)
    ]
    size = -(-flat.numel() // block_m) + min(num_experts, flat.numel())
    tiles = torch.full((size, 2), -1, dtype=torch.int32, device=ids.device)
    if rows:
        tiles[: len(rows)] = torch.tensor(rows, dtype=torch.int32, device=ids.device)
    return order.to(torch.int32), offsets.to(torch.int32), tiles


def geglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2I], gate first -> gelu_tanh(gate) * up [..., I]. Source: Shazeer 2020; tanh form of GELU."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    epilogue: str = "none",
    topk_weights: Tensor | None = None,
) -> Tensor:
    """Each expert's rows times that expert's matrix. weight [E, N, Kdim]; order, offsets from expert_dispatch; M = T*K rows.

    epilogue "geglu": x [T, Kdim] is gathered (sorted row r reads x[order[r] // top_k]), N = 2I -> [M, I].
    epilogue "none": x [M, Kdim] sorted rows -> [M, N].
    epilogue "combine": x [M, Kdim] sorted rows; out[t] = sum_k topk_weights[t, k] * (row of (t, k)) @ weight^T -> [T, N],
    summed in fp32 or wider, here in the order of k; each backend has its own fixed order.
    Rows behind offsets[E], of no expert: 0, and nothing in the sum.
    """
    rows = x[order.long() // top_k] if epilogue == "geglu" else x
    y = rows.new_zeros(order.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    for expert, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        if lo < hi:
            y[lo:hi] = F.linear(rows[lo:hi], weight[expert])
    if epilogue == "geglu":
        return geglu(y)
    if epilogue == "none":
        return y
    if topk_weights is None:
        raise ValueError("epilogue 'combine' needs topk_weights")
    unsorted = torch.empty_like(y)
    unsorted[order.long()] = y
    terms = _wide(unsorted).view(-1, top_k, y.shape[-1]) * topk_weights[..., None].to(_wide(y).dtype)
    return terms.sum(1).to(x.dtype)


def moe(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Routed experts: out[t] = sum_k topk_weights[t, k] * down[e] @ geglu(gate_up[e] @ x[t]), e = ids[t, k].

    x [T, H]; topk_weights [T, K]; ids [T, K] int32; gate_up [E, 2I, H], gate rows first; down [E, H, I]. Returns [T, H].
    An id outside [0, E), another device's expert, adds nothing.
    """
    order, offsets, _ = expert_dispatch(ids, gate_up.shape[0])
    h = grouped_gemm(x, gate_up, order, offsets, ids.shape[1], "geglu")
    return grouped_gemm(h, down, order, offsets, ids.shape[1], "combine", topk_weights)


def moe_decode(x: Tensor, topk_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same as `moe`, for few tokens: the op exists so that a backend can serve it without sorting."""
    return moe(x, topk_weights, ids, gate_up, down)


def moe_feed_forward(
    x: Tensor,
    h: Tensor,
    e: Tensor,
    gate_up: Tensor,
    down: Tensor,
    router_scale: Tensor,
    router_proj: Tensor,
    per_expert_scale: Tensor,
    experts_gate_up: Tensor,
    experts_down: Tensor,
    top_k: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Both branches of a layer with experts: geglu_mlp(h), and moe(e) by what route_topk says of x.

    x [T, H], the residual stream; h, e [T, H], its pre-norms for the dense branch and the experts. The rest as in those ops.
    Returns the branches' outputs [T, H] each, before their norms.
    """
    weights, ids = route_topk(x, router_scale, router_proj, per_expert_scale, top_k, eps)
    return geglu_mlp(h, gate_up, down), moe(e, weights, ids, experts_gate_up, experts_down)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] @ weight [N, K]^T -> [..., N]. Gemma 4 has no biases."""
    return F.linear(x, weight)


def geglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [..., H], gate_up [2I, H] (gate rows first), down [H, I] -> geglu(x @ gate_up^T) @ down^T [..., H]."""
    return F.linear(geglu(F.linear(x, gate_up)), down)


def ple_gate(
    x: Tensor,
    ple: Tensor,
    gate: Tensor,
    proj: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """PLE: y = (x + rms_norm(proj @ (gelu_tanh(gate @ x) * ple), weight)) * scale, z = rms_norm(y, next_weight).

    x [T, H]; ple [T, P], this layer's input; gate [P, H]; proj [H, P]; weight, next_weight [H]; scale [1].
    Returns (y, z), z None without next_weight. Source: Gemma 3n / Gemma 4 E-models.
    """
    h = F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * ple, proj)
    return norm_add_norm(h, x, weight, scale, next_weight, eps)[:2]


def logits(x: Tensor, weight: Tensor, softcap: float | None = None, argmax: bool = False) -> Tensor:
    """x [T, H] @ weight [V, H]^T, then softcap * tanh(logits / softcap) -> [T, V] in x.dtype.

    argmax=True: the id of the largest logit instead, [T] int64, the lower id of equals, and -1 for a row of x that is not
    finite. tanh is monotonic, so the softcap is left out there: near the cap it would round different logits to equal ones.
    Source: Gemma 2 (logit soft-capping).
    """
    y = F.linear(x, weight)
    if argmax:
        best = y.argmax(-1)  # documented: the first of equal maxima
        return torch.where(x.isfinite().all(-1), best, -1)
    return y if softcap is None else softcap * torch.tanh(y / softcap)


def sample(
    x: Tensor,
    weight: Tensor,
    uniform: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The next token of each row, drawn from p = softmax(logits(x) / temperature) -> ids [T] int64, -1 for a row that is not
    finite.

    x [T, H]; weight [V, H]; uniform [T] fp32 in [0, 1). Of p stay the top_k largest (0: all), of those the fewest of the
    largest whose sum reaches top_p of theirs, and of those all of at least min_p times the largest. The id is the first whose
    sum with those before it is more than `uniform` of what stayed: in falling order of p where top_k or top_p leave something
    out, the lower id first of equals, else in the order of the ids. Source: inverse transform sampling; top-p: Holtzman et al.
    2020; min-p: Nguyen et al. 2024.
    """
    p, ids = restricted(logits(x, weight, softcap), temperature, top_k, top_p, min_p)
    sums = p.cumsum(-1)
    at = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
    chosen = ids.gather(-1, at.clamp(max=p.shape[-1] - 1)).squeeze(-1)
    return torch.where(x.isfinite().all(-1), chosen, -1)


def restricted(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """What `sample` draws from: logits [T, V] -> p [T, n], 0 where it is left out, and whose it is, [T, n]."""
    ids = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    in_order = 0 < top_k < logits.shape[-1] or top_p < 1
    if in_order:
        logits, ids = (x[:, : top_k or None] for x in logits.sort(dim=-1, descending=True, stable=True))
    p = (logits / temperature).softmax(-1)
    if in_order:
        p = p.where(p.cumsum(-1) - p < top_p * p.sum(-1, keepdim=True), 0)
    return p.where(p >= min_p * p.amax(-1, keepdim=True), 0), ids
