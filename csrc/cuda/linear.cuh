// linear: out = end(x @ weight^T),  x [M, K] with M <= 16, weight [N, K], floats or quantized.
//   end  none; softcap: cap * tanh(y / cap); geglu: gelu_tanh(x @ gate^T) * (x @ up^T), weight [2 N, K], gate rows first;
//        gate: gelu_tanh(y) * other; argmax: the row of the largest alone, the lower of equals, -1 if x's row is not finite
//        keep: what sample.cu draws from
//
// Source: gemma4_fast.reference.ops: linear, geglu_mlp, ple_gate, logits. For few rows everything is the stream of weights: see
// weights.cuh. The eight warps of a block share a tile's columns, so that even a narrow matrix is spread over the machine in one
// wave of equal blocks; where there are tiles in plenty (the head's 16384), each warp has its own and nothing is shared.
// argmax writes no logits: each block keeps its largest, and the last one to end picks among the blocks'.

#pragma once

#include <cfloat>

#include "cuda/weights.cuh"

namespace gemma4_fast::cuda {

using namespace device;

constexpr int64_t kManyTiles = 4096;  // from so many on each warp of a block has its own
constexpr float kLowest = -FLT_MAX;

using End = Linear::End;

DEVICE float tanh_accurate(float x) {  // near 0, where 1 - 2 / (e^2x + 1) would lose digits, its series
  const float s = x * x;
  const float small = x + x * s * (-0.33333334f + s * (0.13333334f + s * (-0.053968254f + s * 0.021869489f)));
  return s < 0.0625f ? small : 1.0f - divide(2.0f, 1.0f + exp2_fast(2.0f * kLog2e * x));
}

// The lane's rows of tile `tile`. geglu: rows of gate in the tile's first half, the same rows of up in its second.
template <class T, int kBits, bool kWhole>
DEVICE auto rows_of(const Linear& a, int64_t tile, bool geglu) {
  constexpr int rows = kTileRows<kBits>;
  if constexpr (kBits == 0) {
    const auto* w = static_cast<const T*>(a.weight);
    const int64_t n = tile * (geglu ? rows / 2 : rows);
    return geglu ? WeightRows<T, 0, kWhole>::at(w, n, a.n, a.n + n, 2 * a.n, a.k)
                 : WeightRows<T, 0, kWhole>::at(w, n, a.n, n + rows / 2, a.n, a.k);
  } else {
    const int64_t panels = (a.n + 15) / 16;  // of one part
    return geglu ? QuantizedRows<kBits>::at(a.weight, a.scale, tile, panels + tile, 2 * panels, (a.k + 31) / 32)
                 : QuantizedRows<kBits>::at(a.weight, a.scale, 2 * tile, 2 * tile + 1, panels, (a.k + 31) / 32);
  }
}

struct Best {
  float value;
  int at;
};
DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a; }
DEVICE Best better_of_lanes(Best mine, int mask) {
  return better(mine, {shuffle_xor(mine.value, mask), (int)shuffle_xor((uint32_t)mine.at, mask)});
}

// The last block: of each token the largest of the blocks' largest.
template <class T>
DEVICE void pick_largest(const Linear& a, int blocks) {
  const int lane = lane_index();
  for (int m = warp_index(); m < a.m; m += kWarps) {
    const T* x = static_cast<const T*>(a.x) + m * a.x_stride;
    bool finite = true;
    for (int k = lane; k < a.k; k += kWarp) {
      const float v = to_float(load(x + k));
      finite = finite && v - v == 0.0f;
    }
    Best best{kLowest, INT32_MAX};
    for (int b = lane; b < blocks; b += kWarp) {
      const int64_t at = int64_t(b) * a.m + m;
      best = better(best, {load_fresh(a.best + at), load_fresh(a.best_at + at)});
    }
    for (int mask = 16; mask > 0; mask /= 2) best = better_of_lanes(best, mask);
    const bool all = ballot(finite) == 0xffffffffu;
    if (lane == 0) store(static_cast<int64_t*>(a.out) + m, all && best.at != INT32_MAX ? int64_t(best.at) : int64_t(-1));
  }
}

// Blocks at once on a multiprocessor: what leaves a thread the registers for its steps on their way.
template <int kBits, int kTokenTiles, bool kWhole>
constexpr int kBlocksAtOnce = !kWhole ? 1 : kTokenTiles == 2 ? 2 : kBits ? 3 : 4;

// Block `block` of `blocks`. kHead: with the ends of a head, argmax and keep.
template <class T, int kBits, int kTokenTiles, bool kWhole, bool kHead>
DEVICE void linear_block(const Linear& a, int block, int blocks) {
  constexpr int rows = kTileRows<kBits>, tokens = 8 * kTokenTiles;
  const bool geglu = a.end == End::geglu, shared = a.shared;
  const int outputs = geglu ? rows / 2 : rows;  // of a tile
  const auto tile_of = [&](int warp) { return shared ? block : block * kWarps + warp; };  // below 2^31, as weight's rows
  const int steps = divide_up(a.k, kStep), part = warp_index();
  float sums[kProducts<kBits>][kTokenTiles][4] = {};
  stream_tile<T, kBits, kTokenTiles, kWhole>(
      sums, rows_of<T, kBits, kWhole>(a, tile_of(part), geglu), a.k, shared ? part * steps / kWarps : 0,
      shared ? (part + 1) * steps / kWarps : steps, [&](const T*(&x)[kTokenTiles]) {
        wait_for_inputs();
        UNROLL for (int n = 0; n < kTokenTiles; ++n) {
          const int m = 8 * n + lane_index() / 4;
          x[n] = m < a.m ? static_cast<const T*>(a.x) + m * a.x_stride : nullptr;
        }
      });

  // Each warp's sums of the tile it shares, or of its own: [kWarps][rows][tokens] in shared memory.
  auto* all = reinterpret_cast<float*>(shared_memory());
  const int thread = anew(thread_index()), lane = thread % kWarp, warp = thread / kWarp, tile = tile_of(warp);
  UNROLL for (int p = 0; p < kProducts<kBits>; ++p) {
    UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      UNROLL for (int i = 0; i < 4; ++i) all[(warp * rows + tile_row<kBits>(p, i)) * tokens + tile_token(n, i)] = sums[p][n][i];
    }
  }
  shared ? sync_block() : sync_warp();
  const auto total = [&](int row, int token) {
    if (!shared) return all[(warp * rows + row) * tokens + token];
    float sum = 0;
    UNROLL for (int w = 0; w < kWarps; ++w) sum += all[(w * rows + row) * tokens + token];
    return sum;
  };
  const int first = shared ? thread_index() : lane, threads = shared ? kWarps * kWarp : kWarp;

  if (kHead && a.end == End::argmax) {  // never shared: the largest of a lane's rows, of the lanes, of the warps
    auto* bests = reinterpret_cast<Best*>(all + kWarps * rows * tokens);  // [kWarps][tokens]
    for (int token = 0; token < a.m; ++token) {
      Best best{kLowest, INT32_MAX};
      for (int row = lane; row < rows; row += kWarp)
        if (tile * rows + row < a.n) best = better(best, {total(row, token), (int)(tile * rows + row)});
      for (int mask = 16; mask > 0; mask /= 2) best = better_of_lanes(best, mask);
      if (lane == 0) bests[warp * tokens + token] = best;
    }
    sync_block();
    const int token = thread_index();
    if (token < a.m) {
      Best best = bests[token];
      for (int w = 1; w < kWarps; ++w) best = better(best, bests[w * tokens + token]);
      const int64_t at = block * int64_t(a.m) + token;
      store(a.best + at, best.value), store(a.best_at + at, best.at);
    }
    if (last_to_arrive(a.counter, blocks, reinterpret_cast<uint32_t*>(all))) pick_largest<T>(a, blocks);
  } else if (kHead && a.end == End::keep) {  // never shared: a lane has a row
    auto* parts = reinterpret_cast<float2*>(all + kWarps * rows * tokens);  // [kWarps][tokens]: largest, sum
    const int n = tile * rows + lane;
    for (int token = 0; token < a.m; ++token) {
      float y = -infinity();
      if (lane < rows && n < a.n) {
        y = total(lane, token);
        if (a.cap != 0.0f) y = a.cap * tanh_accurate(y / a.cap);
      }
      if (lane < rows) store(a.kept + token * a.kept_stride + n, y);
      const float most = from_key(warp_max(to_key(y)));
      const float sum = warp_sum(y == -infinity() ? 0.0f : exp2_fast((y - most) * a.by));
      if (lane == 0) parts[warp * tokens + token] = {most, sum};
    }
    sync_block();
    const int token = thread / kWarps, w = thread % kWarps;  // eight lanes a token, one for each warp's part
    const float2 part = token < a.m ? parts[w * tokens + token] : float2{-infinity(), 0.0f};
    uint32_t key = to_key(part.x);
    UNROLL for (int by = 1; by < kWarps; by *= 2) key = max(key, shuffle_xor(key, by));
    const float most = from_key(key), sum = warp_sum<kWarps>(part.y == 0.0f ? 0.0f : part.y * exp2_fast((part.x - most) * a.by));
    if (w == 0 && token < a.m) {
      const int64_t at = token * a.kept_stride / (kWarps * rows) + block;
      store(a.best + at, most), store(a.sums + at, sum);
    }
  } else {
    for (int i = first; i < outputs * a.m; i += threads) {
      const int row = i % outputs, token = i / outputs;
      const int64_t n = int64_t(tile) * outputs + row;
      if (n >= a.n) continue;
      float y = total(row, token);
      if (geglu) y = gelu_tanh(y) * total(row + outputs, token);
      if (a.end == End::softcap) y = a.cap * tanh_accurate(y / a.cap);
      if (a.end == End::gate) y = gelu_tanh(y) * to_float(load(static_cast<const T*>(a.other) + token * a.other_stride + n));
      store(static_cast<uint16_t*>(a.out) + token * a.n + n, static_cast<uint16_t>(pack<T>(y, 0)));
    }
  }
}

// ---- on the host ----

inline bool is_of_head(const Linear& a) { return a.end == End::argmax || a.end == End::keep; }

// How the kernel cuts it: what `a` says of tiles is set here.
inline Linear tiled(const Linear& args) {
  Linear a = args;
  const int outputs = rows_of_tile(a.bits) / (a.end == End::geglu ? 2 : 1);
  a.tiles = (a.n + outputs - 1) / outputs;
  a.shared = a.tiles < kManyTiles && !is_of_head(a);
  return a;
}
inline int64_t linear_blocks(const Linear& a) { return a.shared ? a.tiles : (a.tiles + kWarps - 1) / kWarps; }
inline int linear_shared(const Linear& a, int token_tiles) {
  const int tokens = 8 * token_tiles;
  const int sums = kWarps * rows_of_tile(a.bits) * tokens * (int)sizeof(float), bests = kWarps * tokens * (int)sizeof(Best);
  return sums + (is_of_head(a) ? bests : 0);
}
inline bool linear_whole(const Linear& a) {
  return a.k % 8 == 0 && (a.m == 1 || a.x_stride % 8 == 0) && aligned(a.x) && aligned(a.weight);
}

// function(T(), bits, tiles of tokens, whole), all of them types: what a kernel is made for.
template <class Function>
void by_shape(Dtype dtype, int bits, int tokens, bool whole, Function function) {
  const auto with = [&](auto type, auto b) {
    if (!whole)  // rare: one kernel for all
      function(type, b, Is<2>(), Is<false>());
    else
      tokens > 8 ? function(type, b, Is<2>(), Is<true>()) : function(type, b, Is<1>(), Is<true>());
  };
  by_type(dtype, [&](auto type) { bits == 0 ? with(type, Is<0>()) : bits == 8 ? with(type, Is<8>()) : with(type, Is<4>()); });
}

}  // namespace gemma4_fast::cuda
