// moe_decode: out[t] = sum_k topk_weights[t, k] * down[e] @ (gelu_tanh(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t, k]
//
// x [T, H], T <= 16; topk_weights [T, K] fp32; ids [T, K] int32, T K <= 256; gate_up [E, 2 I, H], gate rows first; down [E, H, I];
// floats or quantized. An id outside [0, E) adds nothing. Source: gemma4_fast.reference.ops.moe.
//
// Two kernels, without a sort and without padding: what counts is that an expert's weights cross memory once, in 16-byte loads,
// with the whole machine at it (weights.cuh).
//   gate_up  a block for each assignment (t, k) and tile of rows: 8 of gate beside the same 8 of up (quantized: 16), so that GeGLU
//            is done where the sums are. The first assignment of an expert serves all of them, up to as many as a product has
//            columns; the others' blocks end at once.
//   down     a block for each tile of rows of down, over all tokens and experts: each warp takes an expert, whole, for all its
//            tokens. Every (t, k) has its own sums, which are added in the order of k: a token's bits do not depend on the batch.

#pragma once

#include "cuda/linear.cuh"

namespace gemma4_fast::cuda {

constexpr int kMostPairs = kThreads;

// Which assignments are to the same expert. In shared memory, filled by all threads; ends with a barrier.
struct Pairs {
  int32_t id[kMostPairs];    // -1: none
  int32_t rank[kMostPairs];  // how many of the same expert come before
  DEVICE void fill(const MoeDecode& a) {
    const int p = thread_index(), pairs = a.tokens * a.top_k;
    if (p < pairs) {
      const int e = load(a.ids + p);
      id[p] = e >= 0 && e < a.experts ? e : -1;
    }
    sync_block();
    if (p < pairs) {
      int before = 0;
      for (int q = 0; q < p; ++q) before += id[q] == id[p];
      rank[p] = before;
    }
    sync_block();
  }
};

// The assignments of rank [first, first + count) to expert e, into slots [count]; -1 where there are none. By one warp.
DEVICE void gather(const Pairs& of, int pairs, int e, int first, int count, int32_t* slots) {
  for (int i = lane_index(); i < count; i += kWarp) slots[i] = -1;
  sync_warp();
  for (int p = lane_index(); p < pairs; p += kWarp) {
    const int at = of.rank[p] - first;
    if (of.id[p] == e && at >= 0 && at < count) slots[at] = p;
  }
  sync_warp();
}

template <class T, int kBits, int kTokenTiles, bool kWhole>
DEVICE void gate_up_block(const MoeDecode& a, int tile, int pair) {
  constexpr int rows = kTileRows<kBits>, outputs = rows / 2, tokens = 8 * kTokenTiles;
  struct Shared {
    float sums[kWarps][rows][tokens];
    Pairs of;
    int32_t slots[kWarps][tokens];
  };
  auto& s = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = warp_index(), g = lane_index() / 4, pairs = a.tokens * a.top_k;
  const int steps = divide_up(a.hidden, kStep);
  wait_for_inputs();
  s.of.fill(a);
  const int e = s.of.id[pair];
  if (e < 0 || s.of.rank[pair] % tokens) return;  // no expert, or another block's
  gather(s.of, pairs, e, s.of.rank[pair], tokens, s.slots[warp]);

  float sums[kProducts<kBits>][kTokenTiles][4] = {};
  const auto with = [&](const auto& weight_rows) {
    stream_tile<T, kBits, kTokenTiles, kWhole>(
        sums, weight_rows, a.hidden, warp * steps / kWarps, (warp + 1) * steps / kWarps, [&](const T*(&x)[kTokenTiles]) {
          UNROLL for (int n = 0; n < kTokenTiles; ++n) {
            const int p = s.slots[warp][8 * n + g];
            x[n] = p < 0 ? nullptr : static_cast<const T*>(a.x) + int64_t(p / a.top_k) * a.hidden;
          }
        });
  };
  if constexpr (kBits == 0) {
    const int64_t gate = int64_t(e) * 2 * a.inter, up = gate + a.inter, i = tile * outputs;
    with(WeightRows<T, 0, kWhole>::at(static_cast<const T*>(a.gate_up), gate + i, up, up + i, up + a.inter, a.hidden));
  } else {
    const int64_t panels = (a.inter + 15) / 16, gate = e * 2 * panels + tile;
    with(QuantizedRows<kBits>::at(a.gate_up, a.gate_up_scale, gate, gate + panels, a.experts * 2 * panels, steps));
  }
  UNROLL for (int p = 0; p < kProducts<kBits>; ++p) {
    UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      UNROLL for (int i = 0; i < 4; ++i) s.sums[warp][tile_row<kBits>(p, i)][tile_token(n, i)] = sums[p][n][i];
    }
  }
  sync_block();
  const auto total = [&](int row, int token) {
    float sum = 0;
    UNROLL for (int w = 0; w < kWarps; ++w) sum += s.sums[w][row][token];
    return sum;
  };
  for (int j = thread_index(); j < outputs * tokens; j += kThreads) {
    const int row = j % outputs, token = j / outputs, i = tile * outputs + row, p = s.slots[0][token];
    if (p < 0 || i >= a.inter) continue;
    const float h = gelu_tanh(total(row, token)) * total(row + outputs, token);
    store(static_cast<uint16_t*>(a.h) + int64_t(p) * a.inter + i, static_cast<uint16_t>(pack<T>(h, 0)));
  }
}

template <class T, int kBits, int kTokenTiles, bool kWhole>
DEVICE void down_block(const MoeDecode& a, int tile) {
  constexpr int rows = kTileRows<kBits>, tokens = 8 * kTokenTiles;
  struct Shared {
    Pairs of;
    int32_t slots[kWarps][tokens];
  };
  auto& s = *reinterpret_cast<Shared*>(shared_memory());
  auto* sums_of = reinterpret_cast<float(*)[rows]>(&s + 1);  // each assignment's
  const int warp = warp_index(), g = lane_index() / 4, pairs = a.tokens * a.top_k;
  const int steps = divide_up(a.inter, kStep);
  wait_for_inputs();
  s.of.fill(a);
  int turn = 0;
  for (int p = 0; p < pairs; ++p) {
    const int e = s.of.id[p];
    if (e < 0 || s.of.rank[p] % tokens) continue;  // each expert once, and again for more assignments than a product has
    if (turn++ % kWarps != warp) continue;
    gather(s.of, pairs, e, s.of.rank[p], tokens, s.slots[warp]);
    float sums[kProducts<kBits>][kTokenTiles][4] = {};
    const auto with = [&](const auto& weight_rows) {
      stream_tile<T, kBits, kTokenTiles, kWhole>(sums, weight_rows, a.inter, 0, steps, [&](const T*(&h)[kTokenTiles]) {
        UNROLL for (int n = 0; n < kTokenTiles; ++n) {
          const int q = s.slots[warp][8 * n + g];
          h[n] = q < 0 ? nullptr : static_cast<const T*>(a.h) + int64_t(q) * a.inter;
        }
      });
    };
    if constexpr (kBits == 0) {
      const int64_t first = int64_t(e) * a.hidden, end = first + a.hidden, n = first + tile * rows;
      with(WeightRows<T, 0, kWhole>::at(static_cast<const T*>(a.down), n, end, n + 8, end, a.inter));
    } else {
      const int64_t panels = (a.hidden + 15) / 16, n = e * panels + 2 * tile;
      with(QuantizedRows<kBits>::at(a.down, a.down_scale, n, n + 1, (e + 1) * panels, steps));
    }
    UNROLL for (int q = 0; q < kProducts<kBits>; ++q) {
      UNROLL for (int n = 0; n < kTokenTiles; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) {
          const int slot = s.slots[warp][tile_token(n, i)];
          if (slot >= 0) sums_of[slot][tile_row<kBits>(q, i)] = sums[q][n][i];
        }
      }
    }
    sync_warp();
  }
  sync_block();
  for (int j = thread_index(); j < rows * a.tokens; j += kThreads) {
    const int row = j % rows, t = j / rows;
    const int64_t n = tile * rows + row;
    if (n >= a.hidden) continue;
    float out = 0;
    for (int p = t * a.top_k; p < (t + 1) * a.top_k; ++p)
      if (s.of.id[p] >= 0) out = fused_multiply_add(load(a.topk_weights + p), sums_of[p][row], out);
    store(static_cast<uint16_t*>(a.out) + int64_t(t) * a.hidden + n, static_cast<uint16_t>(pack<T>(out, 0)));
  }
}

// ---- on the host ----

// The first of the two kernels alone.
void experts_gate_up(const Stream& on, const MoeDecode& a);

inline int pairs_shared(int token_tiles) { return sizeof(Pairs) + kWarps * 8 * token_tiles * sizeof(int32_t); }
inline Launch gate_up_launch(const MoeDecode& a, int token_tiles) {
  const int sums = kWarps * rows_of_tile(a.bits) * 8 * token_tiles * (int)sizeof(float);
  return {{divide_up(a.inter, rows_of_tile(a.bits) / 2), a.tokens * a.top_k}, kThreads, sums + pairs_shared(token_tiles)};
}
inline Launch down_launch(const MoeDecode& a, int token_tiles) {
  const int sums = a.tokens * a.top_k * rows_of_tile(a.bits) * (int)sizeof(float);
  return {{divide_up(a.hidden, rows_of_tile(a.bits))}, kThreads, sums + pairs_shared(token_tiles)};
}
inline bool moe_whole(const MoeDecode& a) {
  return a.hidden % 8 == 0 && a.inter % 8 == 0 && aligned(a.x) && aligned(a.gate_up) && aligned(a.down);
}

}  // namespace gemma4_fast::cuda
