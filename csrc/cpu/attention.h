// What both attention ops do with a tile of keys and values: scores, softmax as it goes, weighted sum of the values.
//
// Rows are queries (of one token, or of several) that share a KV head. For each row: m, the largest score so far; l, the sum of
// e^(score - m); acc, the sum of e^(score - m) v. Source: Milakov & Gimelshein 2018, Dao et al. 2022.
#pragma once

#include "cpu/product.h"
#include "cpu/rows.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

constexpr int kKeys = static_cast<int>(kKeyTile);
constexpr float kNever = -1e30f;    // a masked score: finite, so that no inf - inf appears

template <class T>
struct Softmax {  // of `rows` queries
  int64_t rows, dim;
  float *m, *l, *acc;  // [rows], [rows], [rows, dim]

  void start() {
    for (int64_t r = 0; r < rows; ++r) m[r] = kNever, l[r] = 0.0f;
    for (int64_t i = 0; i < rows * dim; ++i) acc[i] = 0.0f;
  }
};

// scores[r * kKeys + c] = q[r] . k[c] over `size` columns. Meanwhile memory is asked for the rows `soon` [keys], or for none.
template <class T>
GEMMA4_INLINE void score_tile(int64_t rows, int keys, int64_t size, const T* const* q, const T* const* k, float* scores,
                              const T* const* soon) {
  product<T>(
      rows, keys, size, [&](int64_t i) { return q[i]; }, [&](int64_t j) { return k[j]; },
      [](int64_t, int) { return Rows<T>{nullptr, 0}; },
      [&](int64_t i, int mm, int64_t j, int nn, const float* y) {
        if (soon && i == 0)
          for (int c = 0; c < nn; ++c)
            for (int64_t d = 0; d < size; d += 64 / static_cast<int64_t>(sizeof(T))) prefetch(soon[j + c] + d);
        for (int r = 0; r < mm; ++r) store(scores + (i + r) * kKeys + j, load(y + r * kWidth));  // beyond nn: masked by take_tile
      });
}

#if defined(__AVX512BF16__)
// Two rows of bf16 values as one operand of vdpbf16ps: their columns interleaved, 16 at a time, in the order that the unpack
// instructions give; `unpermuted` undoes it for a finished accumulator pair.
struct ValuePair {
  __m512bh lo, hi;
};
GEMMA4_INLINE ValuePair value_pair(__m512i a, __m512i b) {
  return {(__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_unpackhi_epi16(a, b)};
}
// acc[r] [dim] += p[r] [keys] v [keys, dim] for M rows. 32 columns at a time; pairs of keys share one instruction. While it
// multiplies, it asks for the rows `next` [keys], or for none.
template <int M>
GEMMA4_INLINE void add_values(const float* p, int keys, const bf16* const* v, int64_t dim, float* acc, const bf16* const* next) {
  alignas(64) bf16 weights[M][kKeys];
  for (int r = 0; r < M; ++r)
    for (int c = 0; c < keys; c += kWidth) store(weights[r] + c, load(p + r * kKeys + c));
  const auto weight_pair = [&](int r, int c) GEMMA4_LAMBDA_INLINE {
    int32_t pair;
    std::memcpy(&pair, weights[r] + c, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  };
  for (int64_t d = 0; d < dim; d += 32) {
    const int rest = static_cast<int>(min_of<int64_t>(32, dim - d));
    Vec lo[M], hi[M];
    for (int r = 0; r < M; ++r) lo[r] = hi[r] = set(0.0f);
    const auto add_pair = [&](int c, __m512i first, __m512i second) GEMMA4_LAMBDA_INLINE {
      const ValuePair pair = value_pair(first, second);
      for (int r = 0; r < M; ++r) {
        const __m512bh w = weight_pair(r, c);
        lo[r].v = _mm512_dpbf16_ps(lo[r].v, w, pair.lo);
        hi[r].v = _mm512_dpbf16_ps(hi[r].v, w, pair.hi);
      }
    };
    const auto add_pairs = [&](auto load_row) GEMMA4_LAMBDA_INLINE {
      int c = 0;
      if (next)
        for (; c + 2 <= keys; c += 2) {
          prefetch(next[c] + d), prefetch(next[c + 1] + d);
          add_pair(c, load_row(v[c]), load_row(v[c + 1]));
        }
      else
        for (; c + 2 <= keys; c += 2) add_pair(c, load_row(v[c]), load_row(v[c + 1]));
      if (c < keys) {  // the last one alone, with a partner of zeros
        for (int r = 0; r < M; ++r) weights[r][c + 1] = bf16{0};
        add_pair(c, load_row(v[c]), _mm512_setzero_si512());
      }
    };
    if (rest == 32) add_pairs([&](const bf16* row) GEMMA4_LAMBDA_INLINE { return load_step(row + d); });
    else add_pairs([&](const bf16* row) GEMMA4_LAMBDA_INLINE { return load_step(row + d, rest); });
    // lo holds columns 0-3, 8-11, 16-19, 24-27 and hi the others
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int r = 0; r < M; ++r) {
      float* to = acc + r * dim + d;
      const Vec first = {_mm512_permutex2var_ps(lo[r].v, low, hi[r].v)};
      const Vec second = {_mm512_permutex2var_ps(lo[r].v, high, hi[r].v)};
      const int n1 = min_of(rest, 16), n2 = rest - n1;
      store_some(to, add(load_some(to, n1), first), n1);
      if (n2 > 0) store_some(to + 16, add(load_some(to + 16, n2), second), n2);
    }
  }
}
#endif

template <int M, class T>
GEMMA4_INLINE void add_values(const float* p, int keys, const T* const* v, int64_t dim, float* acc, const T* const* next) {
  for_vecs(dim, [&](int64_t d, int n) GEMMA4_LAMBDA_INLINE {
    Vec sum[M];
    for (int r = 0; r < M; ++r) sum[r] = load_some(acc + r * dim + d, n);
    for (int c = 0; c < keys; ++c) {
      if (next) prefetch(next[c] + d);
      const Vec x = load_some(v[c] + d, n);
      for (int r = 0; r < M; ++r) sum[r] = fma(set(p[r * kKeys + c]), x, sum[r]);
    }
    for (int r = 0; r < M; ++r) store_some(acc + r * dim + d, sum[r], n);
  });
}

// Takes in one tile: scores [rows, kKeys] already scaled and masked, values v[0 .. keys). next: rows to ask for, or null.
template <class T>
__attribute__((noinline)) void take_tile(const Softmax<T>& s, float* scores, int keys, const T* const* v, const T* const* next) {
  for (int64_t r = 0; r < s.rows; ++r) {
    float* row = scores + r * kKeys;
    Vec largest = set(s.m[r]);
    for (int c = keys; c % kWidth; ++c) row[c] = kNever;  // whole Vecs: the rest counts for nothing
    for (int c = 0; c < keys; c += kWidth) largest = max(largest, load(row + c));
    const float m = max_lanes(largest);
    if (m > s.m[r]) {
      float factor;
      Vec e = exp(set(s.m[r] - m));
      float lanes[kWidth];
      store(lanes, e);
      factor = lanes[0];
      s.m[r] = m;
      s.l[r] *= factor;
      float* acc = s.acc + r * s.dim;
      for_vecs(s.dim, [&](int64_t d, int n) GEMMA4_LAMBDA_INLINE { store_some(acc + d, mul(load_some(acc + d, n), set(factor)), n); });
    }
    Vec total = set(0.0f);
    for (int c = 0; c < keys; c += kWidth) {
      const Vec e = exp(sub(load(row + c), set(m)));
      store(row + c, e);
      if (c + kWidth <= keys) total = add(total, e);
      else total = add(total, load(row + c, keys - c));
    }
    s.l[r] += sum_lanes(total);
  }
  constexpr int M = kWidth == 16 ? 8 : 4;
  int64_t r = 0;
  const auto add = [&](auto add_rows, int64_t count) {
    for (; r + count <= s.rows; r += count) add_rows(scores + r * kKeys, s.acc + r * s.dim, r == 0 ? next : nullptr);
  };
  add([&](const float* p, float* acc, const T* const* n) { add_values<M>(p, keys, v, s.dim, acc, n); }, M);
  add([&](const float* p, float* acc, const T* const* n) { add_values<2>(p, keys, v, s.dim, acc, n); }, 2);
  add([&](const float* p, float* acc, const T* const* n) { add_values<1>(p, keys, v, s.dim, acc, n); }, 1);
}

// ---- caches ------------------------------------------------------------------------------------------------------------

// Row of slot s of sequence b, KV head h.
template <class T>
GEMMA4_INLINE const T* cache_row(const Cache& cache, const void* base, int64_t b, int64_t s, int64_t h, int64_t kv_heads,
                                 int64_t dim) {
  const int64_t row = cache.block_table
                          ? static_cast<int64_t>(cache.block_table[b * cache.blocks + s / cache.block_size]) * cache.block_size +
                                s % cache.block_size
                          : b * cache.slots + s;
  return static_cast<const T*>(base) + (row * kv_heads + h) * dim;
}

// cos and sin [pairs] of a position, from the angles of its tile's first position and of its place in the tile.
GEMMA4_INLINE void angles_at(const Cache& cache, int64_t position, float* cos, float* sin) {
  const float *c1 = cache.tile_cos + position / kKeys * cache.pairs, *s1 = cache.tile_sin + position / kKeys * cache.pairs;
  const float *c2 = cache.within_cos + position % kKeys * cache.pairs, *s2 = cache.within_sin + position % kKeys * cache.pairs;
  for_vecs(cache.pairs, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
    const Vec a = load_some(c1 + i, n), b = load_some(s1 + i, n), c = load_some(c2 + i, n), d = load_some(s2 + i, n);
    store_some(cos + i, sub(mul(a, c), mul(b, d)), n);
    store_some(sin + i, fma(a, d, mul(b, c)), n);
  });
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
