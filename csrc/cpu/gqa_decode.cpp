// gqa_decode: one query per sequence over its cache: a ring, all positions, or V alone.
//
// Tasks are (sequence, KV head, split of kSplit slots); a second phase merges the splits in their order. Splits are cut by
// slot number, so a sequence's bits depend neither on the batch nor on the threads.
//
// V only: K = RoPE(w * v). On the columns that RoPE leaves alone q . (w v) = (q w) . v, so w moves into q. Of the others, 2 x
// pairs, q is rotated back to the first position of a run of at most kKeys slots, and the keys by their distance from it,
// whose angles are one small table. So a slot costs one row of v from memory, half of K and V.
//
// What was tried (26B-A4B, bf16, Zen 5, two threads; microseconds over 8K and 32K V-only slots, over 8K of K + V, of 512 columns):
//   rotated columns as a product of their own                              1423  5230  1738
//   one product, over keys copied to where their rotated columns fit       1336  5011  1756
//   probabilities made bf16 a vector at a time, no cases in the inner loop 1170  4450  1560
//   v asked for while the scores of its own run are computed               1170  4450  1440
//   half of the next v asked for while the keys are rotated                1170  3960  1440
//   all of the next v asked for between the scores' tiles                  1330  5000  -
// 64 slots of one KV head then take 7.7 us: scores 1.9, values 1.9, rotation 1, the rest waits for memory.
#include "cpu/attention.h"
#include "cpu/parallel.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

constexpr int64_t kSplit = kDecodeSplit;
constexpr int64_t kMaxGroup = 16;  // query heads of one KV head that are served together
constexpr int64_t kMaxPairs = kMaxHeadDim / 2;

// What the queries of a run are multiplied with: v, and in the rotated columns [w v]_i cos - [w v]_{i + D/2} sin, ... at angles
// of distance 0, 1, 2, ... from the run's first position. Meanwhile memory is asked for the first halves of the rows `next`.
template <class T>
void rotate_keys(const Cache& cache, int keys, const T* const* v, const T* const* next, int64_t dim, T* out) {
  const T* weight = static_cast<const T*>(cache.k_weight);
  const int64_t pairs = cache.pairs, half = dim / 2;
  for (int c = 0; c < keys; ++c) {
    const float *cos = cache.within_cos + c * pairs, *sin = cache.within_sin + c * pairs;
    T *to = out + c * dim, *to_half = to + half;
    for (int64_t d = 0; d < half; d += 64 / static_cast<int64_t>(sizeof(T))) prefetch(next[c] + d);
    for_vecs(pairs, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
      const Vec a = mul(load_some(v[c] + i, n), load_some(weight + i, n));
      const Vec b = mul(load_some(v[c] + half + i, n), load_some(weight + half + i, n));
      const Vec cs = load_some(cos + i, n), sn = load_some(sin + i, n);
      store_some(to + i, sub(mul(a, cs), mul(b, sn)), n);
      store_some(to_half + i, fma(a, sn, mul(b, cs)), n);
    });
    std::memcpy(to + pairs, v[c] + pairs, static_cast<size_t>(half - pairs) * sizeof(T));
    std::memcpy(to_half + pairs, v[c] + half + pairs, static_cast<size_t>(half - pairs) * sizeof(T));
  }
}

// The rotary columns of queries of a run that starts at `position`: turned back by its angle.
template <class T>
void rotate_queries(const Cache& cache, int64_t rows, const T* const* q, int64_t dim, int64_t position, T* out) {
  const int64_t pairs = cache.pairs, half = dim / 2;
  float cos[kMaxPairs], sin[kMaxPairs];
  angles_at(cache, position, cos, sin);
  for (int64_t r = 0; r < rows; ++r) {
    T *to = out + r * dim, *to_half = to + half;
    for_vecs(pairs, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
      const Vec a = load_some(q[r] + i, n), b = load_some(q[r] + half + i, n);
      const Vec cs = load_some(cos + i, n), sn = load_some(sin + i, n);
      store_some(to + i, fma(a, cs, mul(b, sn)), n);
      store_some(to_half + i, sub(mul(b, cs), mul(a, sn)), n);
    });
  }
}

template <class T>
void attend_split(const GqaDecode& a, int64_t b, int64_t h, int64_t split, int64_t first_head, int64_t rows, float* partial) {
  const Cache& cache = a.cache;
  const int64_t dim = a.dim, last = a.kv_lens[b] - 1, slots = cache.slots;
  Softmax<T> s{rows, dim, partial, partial + rows, partial + 2 * rows};
  s.start();
  const T* q[kMaxGroup];
  for (int64_t r = 0; r < rows; ++r) q[r] = static_cast<const T*>(a.q) + (b * a.q_heads + first_head + r) * dim;
  alignas(64) T folded[kMaxGroup * kMaxHeadDim], built[kKeys * kMaxHeadDim];
  const T* q_folded[kMaxGroup];
  if (!cache.k)
    for (int64_t r = 0; r < rows; ++r) {
      T* to = folded + r * dim;
      for_vecs(dim, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
        store_some(to + i, mul(load_some(q[r] + i, n), load_some(static_cast<const T*>(cache.k_weight) + i, n)), n);
      });
      q_folded[r] = to;
    }

  // Slots before `turn` hold the newest round of the ring, the others the one before.
  const int64_t turn = last % slots + 1, round = last / slots * slots;
  const int64_t oldest = max_of<int64_t>(0, a.window ? last - a.window + 1 : 0);
  int64_t slot = split * kSplit;
  const int64_t end = min_of(slot + kSplit, min_of(slots, last + 1));
  while (slot < end) {
    const bool newest = slot < turn;
    const int64_t position = newest ? round + slot : round - slots + slot;  // of the run's first slot
    int keys = static_cast<int>(min_of<int64_t>(kKeys, end - slot));
    if (newest) keys = static_cast<int>(min_of<int64_t>(keys, turn - slot));
    if (position + keys > oldest) {
      const T *k[kKeys], *v[kKeys];
      float scores[kMaxGroup * kKeys];
      for (int c = 0; c < keys; ++c) v[c] = cache_row<T>(cache, cache.v, b, slot + c, h, a.kv_heads, dim);
      // What memory brings meanwhile: v while the scores are computed, then the next run's k; of a V-only cache the next v.
      const T* next[kKeys];
      for (int c = 0; c < keys; ++c)
        next[c] = cache_row<T>(cache, cache.k ? cache.k : cache.v, b, min_of(slot + keys + c, min_of(slots - 1, last)), h, a.kv_heads, dim);
      if (cache.k) {
        for (int c = 0; c < keys; ++c) k[c] = cache_row<T>(cache, cache.k, b, slot + c, h, a.kv_heads, dim);
        score_tile<T>(rows, keys, dim, q, k, scores, v);
      } else {
        rotate_queries<T>(cache, rows, q, dim, position, folded);
        rotate_keys<T>(cache, keys, v, next, dim, built);
        for (int c = 0; c < keys; ++c) k[c] = built + c * dim;
        score_tile<T>(rows, keys, dim, q_folded, k, scores, nullptr);
      }
      const int64_t unseen = oldest - position;  // keys of the run that the window no longer shows
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < keys; ++c) scores[r * kKeys + c] = c < unseen ? kNever : scores[r * kKeys + c] * a.scale;
      take_tile<T>(s, scores, keys, v, next);
    }
    slot += keys;
  }
}

template <class T>
void gqa_decode_of(const GqaDecode& a) {
  const int64_t group = a.q_heads / a.kv_heads, parts = (group + kMaxGroup - 1) / kMaxGroup;
  const int64_t record = a.dim + 2;  // per query head and split: m, l, acc, grouped by part as attend_split has them
  const auto part_rows = [=](int64_t part) { return min_of(kMaxGroup, group - part * kMaxGroup); };
  const auto place = [=](int64_t b, int64_t h, int64_t part, int64_t split) {
    return a.partial + (((b * a.kv_heads + h) * a.splits + split) * group + part * kMaxGroup) * record;
  };
  const auto splits_of = [=](int64_t b) {
    const int64_t used = min_of<int64_t>(a.kv_lens[b], a.cache.slots);
    return (used + kSplit - 1) / kSplit;
  };
  Phase attend(a.batch * a.kv_heads * parts * a.splits, [=](int64_t task) {
    const int64_t split = task % a.splits, part = task / a.splits % parts;
    const int64_t h = task / a.splits / parts % a.kv_heads, b = task / a.splits / parts / a.kv_heads;
    if (split < splits_of(b))
      attend_split<T>(a, b, h, split, h * group + part * kMaxGroup, part_rows(part), place(b, h, part, split));
  });
  Phase merge(a.batch * a.q_heads, [=](int64_t task) {
    const int64_t b = task / a.q_heads, head = task % a.q_heads, h = head / group;
    const int64_t part = head % group / kMaxGroup, r = head % group % kMaxGroup, rows = part_rows(part);
    const int64_t splits = splits_of(b);
    T* out = static_cast<T*>(a.out) + task * a.dim;
    float largest = kNever, total = 0.0f;
    for (int64_t s = 0; s < splits; ++s) largest = max_of(largest, place(b, h, part, s)[r]);
    alignas(64) float sum[kMaxHeadDim] = {};
    for (int64_t s = 0; s < splits; ++s) {
      const float* from = place(b, h, part, s);
      if (from[r] <= kNever && from[rows + r] == from[rows + r]) continue;  // nothing of this split is in the window
      const float weight = std::exp(from[r] - largest);
      total += weight * from[rows + r];
      const float* acc = from + 2 * rows + r * a.dim;
      for_vecs(a.dim, [&](int64_t d, int n) GEMMA4_LAMBDA_INLINE {
        store_some(sum + d, fma(load_some(acc + d, n), set(weight), load_some(sum + d, n)), n);
      });
    }
    const Vec scale = set(total == 0.0f ? 0.0f : 1.0f / total);  // an idle row is 0, a NaN stays
    for_vecs(a.dim, [&](int64_t d, int n) GEMMA4_LAMBDA_INLINE { store_some(out + d, mul(load_some(sum + d, n), scale), n); });
  });
  run_phases(threads_for(a.batch * a.splits * kSplit * a.q_heads * a.dim), attend, merge);
}

}  // namespace

void gqa_decode(const GqaDecode& a) { a.dtype == Dtype::f32 ? gqa_decode_of<float>(a) : gqa_decode_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
