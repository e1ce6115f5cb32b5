// gqa_prefill: causal attention of new tokens over the cache's tokens from before them and over themselves.
//
// A task is a block of at most kRows queries that share a KV head: kRows / group tokens. It walks the keys in tiles and keeps no
// score longer than a tile. Keys of a V-only prefix are rebuilt tile by tile, K = RoPE(w * v).
#include "cpu/attention.h"
#include "cpu/parallel.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

constexpr int64_t kRows = 64;

// K [keys, dim] of consecutive cached positions from their v.
template <class T>
void rebuild_keys(const Cache& cache, int keys, const T* const* v, int64_t dim, int64_t position, T* out) {
  float wide[kMaxHeadDim], cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
  for (int c = 0; c < keys; ++c) {
    for_vecs(dim, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
      store_some(wide + i, mul(load_some(v[c] + i, n), load_some(static_cast<const T*>(cache.k_weight) + i, n)), n);
    });
    angles_at(cache, position + c, cos, sin);
    rotate_row(wide, cos, sin, dim, cache.pairs);
    for_vecs(dim, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE { store_some(out + c * dim + i, load_some(wide + i, n), n); });
  }
}

// Queries of tokens [first, first + tokens) of sequence b (counted from its start), KV head h.
template <class T>
void attend_block(const GqaPrefill& a, int64_t b, int64_t h, int64_t first, int64_t tokens) {
  const int64_t group = a.q_heads / a.kv_heads, rows = tokens * group, dim = a.dim;
  const int64_t start = a.cu_seqlens[b], length = a.cu_seqlens[b + 1] - start;
  const int64_t prefix = a.cache.v ? a.prefix_lens[b] : 0;
  alignas(64) float acc[kRows * kMaxHeadDim], scores[kRows * kKeys], m[kRows], l[kRows];
  alignas(64) T built[kKeys * kMaxHeadDim];
  Softmax<T> s{rows, dim, m, l, acc};
  s.start();
  const T *q[kRows], *k[kKeys], *v[kKeys];
  for (int64_t r = 0; r < rows; ++r)
    q[r] = static_cast<const T*>(a.q) + ((start + first + r / group) * a.q_heads + h * group + r % group) * dim;

  // Tile of keys at positions [position, position + keys); `at` is the first query's position.
  const int64_t at = prefix + first;
  const auto take = [&](int64_t position, int keys) {
    score_tile<T>(rows, keys, dim, q, k, scores, nullptr);
    const bool whole = position + keys - 1 <= at && (!a.window || position > at + tokens - 1 - a.window);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = at + r / group;
      float* row = scores + r * kKeys;
      if (whole) {
        for (int c = 0; c < keys; ++c) row[c] *= a.scale;
        continue;
      }
      const int32_t* ids = a.image_ids ? a.image_ids + start - prefix : nullptr;  // by position
      for (int c = 0; c < keys; ++c) {
        const int64_t key = position + c;
        bool seen = key <= own;
        if (!seen && ids && ids[own] >= 0) seen = ids[key] == ids[own];
        if (a.window && key <= own - a.window) seen = false;
        row[c] = seen ? row[c] * a.scale : kNever;
      }
    }
    take_tile<T>(s, scores, keys, v, nullptr);
  };

  const int64_t oldest = a.window ? max_of<int64_t>(0, at - a.window + 1) : 0;
  for (int64_t position = max_of(oldest, prefix - a.cache.slots); position < prefix;) {
    int keys = static_cast<int>(min_of<int64_t>(kKeys, prefix - position));
    for (int c = 0; c < keys; ++c)
      v[c] = cache_row<T>(a.cache, a.cache.v, b, (position + c) % a.cache.slots, h, a.kv_heads, dim);
    if (a.cache.k) {
      for (int c = 0; c < keys; ++c)
        k[c] = cache_row<T>(a.cache, a.cache.k, b, (position + c) % a.cache.slots, h, a.kv_heads, dim);
    } else {
      rebuild_keys<T>(a.cache, keys, v, dim, position, built);
      for (int c = 0; c < keys; ++c) k[c] = built + c * dim;
    }
    take(position, keys);
    position += keys;
  }
  const int64_t end = a.image_ids ? length : first + tokens;  // an image may reach past the block
  for (int64_t j = max_of<int64_t>(0, oldest - prefix); j < end;) {
    const int keys = static_cast<int>(min_of<int64_t>(kKeys, end - j));
    for (int c = 0; c < keys; ++c) {
      k[c] = static_cast<const T*>(a.k) + ((start + j + c) * a.kv_heads + h) * dim;
      v[c] = static_cast<const T*>(a.v) + ((start + j + c) * a.kv_heads + h) * dim;
    }
    take(prefix + j, keys);
    j += keys;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* out = static_cast<T*>(a.out) + (q[r] - static_cast<const T*>(a.q));
    const Vec scale = set(1.0f / l[r]);
    for_vecs(dim, [&](int64_t d, int n) GEMMA4_LAMBDA_INLINE { store_some(out + d, mul(load_some(acc + r * dim + d, n), scale), n); });
  }
}

template <class T>
void gqa_prefill_of(const GqaPrefill& a) {
  const int64_t group = a.q_heads / a.kv_heads, tokens = max_of<int64_t>(1, kRows / group);
  int64_t blocks = 0, pairs = 0;  // of all sequences: blocks of queries; queries times the keys that they may see
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.cu_seqlens[b + 1] - a.cu_seqlens[b];
    blocks += (length + tokens - 1) / tokens;
    pairs += length * (length + (a.prefix_lens ? a.prefix_lens[b] : 0));
  }
  parallel(blocks * a.kv_heads, pairs * a.q_heads * a.dim, [=](int64_t task) {
    int64_t block = blocks - 1 - task / a.kv_heads, b = 0;  // the longest, at the end, first
    for (;; ++b) {
      const int64_t own = (a.cu_seqlens[b + 1] - a.cu_seqlens[b] + tokens - 1) / tokens;
      if (block < own) break;
      block -= own;
    }
    const int64_t length = a.cu_seqlens[b + 1] - a.cu_seqlens[b];
    attend_block<T>(a, b, task % a.kv_heads, block * tokens, min_of(tokens, length - block * tokens));
  });
}

}  // namespace

void gqa_prefill(const GqaPrefill& a) { a.dtype == Dtype::f32 ? gqa_prefill_of<float>(a) : gqa_prefill_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
