// Products of few or many rows x with rows of a weight, both stored row by row: y[i][j] = sum_k x[i][k] w[j][k].
//
// No operand is repacked. A tile of kTileM x kTileN outputs keeps one accumulator each, walks both operands along k, and adds
// the accumulators' lanes at the end: 10 loads for 24 dot products with AVX-512 BF16, 3 instructions per output for the end.
// Measured on one core of an AMD EPYC (Zen 4), bf16, K = 2816: 200-216 GFLOP/s for 8 to 512 rows, where oneDNN's packed
// product reaches 188. So weights stay as the checkpoint has them: nothing is copied at load.
//
// The bits of y[i][j] depend on x[i], w[j] and K alone, not on the tile that it falls into.
#pragma once

#include "cpu/vec.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

// Rows of w come from memory, and the processor's own prefetcher starts anew in each tile. So the tiles that share some rows of w
// ask for the next ones, each for its part of them, into L2: memory is then busy while they multiply. Of the read bandwidth (two threads, Zen 4, one row of x), with
// and without: K = 2816 113% and 104%, K = 704 102% and 77%; into L1 instead 103% and 75%; two tiles on 113% and 97%.
template <class T>
struct Ahead {  // rows to ask for
  const T* row[kTileN];
  int count;
};

// out[i * N + j] = x[i] . w[j]
template <class T, int M, int N>
__attribute__((noinline)) void dot_tile(const T* const* x, const T* const* w, int64_t k_size, const Ahead<T>& ahead, float* out) {
  Vec acc[M * N];
  for (int i = 0; i < M * N; ++i) acc[i] = set(0.0f);
  constexpr int step = kStep<T>;
  int64_t k = 0;
  const auto add_step = [&](auto load_raw) GEMMA4_LAMBDA_INLINE {
    if (ahead.count == N)
      for (int j = 0; j < N; ++j) prefetch(ahead.row[j] + k);
    else
      for (int j = 0; j < ahead.count; ++j) prefetch(ahead.row[j] + k);
    if constexpr (M <= N) {
      Raw<T> xs[M];
      for (int i = 0; i < M; ++i) xs[i] = load_raw(x[i]);
      for (int j = 0; j < N; ++j) {
        const Raw<T> b = load_raw(w[j]);
        for (int i = 0; i < M; ++i) acc[i * N + j] = dot(acc[i * N + j], xs[i], b);
      }
    } else {
      Raw<T> ws[N];
      for (int j = 0; j < N; ++j) ws[j] = load_raw(w[j]);
      for (int i = 0; i < M; ++i) {
        const Raw<T> a = load_raw(x[i]);
        for (int j = 0; j < N; ++j) acc[i * N + j] = dot(acc[i * N + j], a, ws[j]);
      }
    }
  };
  for (; k + step <= k_size; k += step) add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k); });
  if (const int rest = static_cast<int>(k_size - k)) add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k, rest); });
  int i = 0;
  for (; i + 4 <= M * N; i += 4) sum_lanes4(acc + i, out + i);
  for (; i < M * N; ++i) out[i] = sum_lanes(acc[i]);
}

template <class T>
using DotTile = void (*)(const T* const*, const T* const*, int64_t, const Ahead<T>&, float*);

template <class T, int M>
DotTile<T> dot_tile_of(int n) {
  switch (n) {
    case 1: return dot_tile<T, M, 1>;
    case 2: return dot_tile<T, M, 2>;
    case 3: if constexpr (kTileN > 2) return dot_tile<T, M, 3>; break;
    case 4: if constexpr (kTileN > 2) return dot_tile<T, M, 4>; break;
    case 5: if constexpr (kTileN > 4) return dot_tile<T, M, 5>; break;
    case 6: if constexpr (kTileN > 4) return dot_tile<T, M, 6>; break;
  }
  return nullptr;
}

// The tile of m <= kTileM rows of x and n <= kTileN rows of w.
template <class T>
DotTile<T> dot_tile_of(int m, int n) {
  switch (m) {
    case 1: return dot_tile_of<T, 1>(n);
    case 2: return dot_tile_of<T, 2>(n);
    case 3: if constexpr (kTileM > 2) return dot_tile_of<T, 3>(n); break;
    case 4: if constexpr (kTileM > 2) return dot_tile_of<T, 4>(n); break;
  }
  return nullptr;
}

constexpr int64_t kRowBlock = 64;  // rows of x that stay in L2 while a task's rows of w pass by

// Rows x_row(0 .. m) times the weight rows w_row(0 .. n), `width` <= kTileN rows of w at a time.
// `ahead`: elements from a tile's rows of w to the next tile's, or 0 if they are in a cache.
// emit(i, mm, j, nn, y): rows i .. i + mm of x, rows j .. j + nn of w, y[mm * nn].
template <class T, class XRow, class WRow, class Emit>
GEMMA4_INLINE void product(int64_t m, int64_t n, int64_t k_size, int width, int64_t ahead, XRow x_row, WRow w_row,
                           Emit emit) {
  const T* x[kTileM];
  const T* w[kTileN];
  float y[kTileM * kTileN];
  for (int64_t block = 0; block < m; block += kRowBlock) {
    const int64_t rows = min_of(kRowBlock, m - block);
    const int64_t tiles = (rows + kTileM - 1) / kTileM;  // cut evenly: 5 rows are 3 + 2, not 4 + 1
    for (int64_t j = 0; j < n; j += width) {
      const int nn = static_cast<int>(min_of<int64_t>(width, n - j));
      for (int c = 0; c < nn; ++c) w[c] = w_row(j + c);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = block + rows * t / tiles;
        const int mm = static_cast<int>(block + rows * (t + 1) / tiles - i);
        for (int r = 0; r < mm; ++r) x[r] = x_row(i + r);
        Ahead<T> next;
        next.count = 0;
        if (ahead && block == 0)
          for (int64_t c = nn * t / tiles; c < nn * (t + 1) / tiles; ++c) next.row[next.count++] = w[c] + ahead;
        dot_tile_of<T>(mm, nn)(x, w, k_size, next, y);
        emit(i, mm, j, nn, y);
      }
    }
  }
}

// Rows of a weight that one task takes, in whole tiles, and at least four tasks for each thread. For few rows of x about 128 KB,
// for many 512 KB: then a block of x is read from L2 more often, and all of x less often from L3.
inline int64_t rows_per_task(int64_t m, int64_t n, int64_t row_bytes, int width) {
  int64_t rows = max_of<int64_t>(1, ((m > kRowBlock ? 512 : 128) << 10) / max_of<int64_t>(row_bytes, 1));
  rows = min_of(rows, max_of<int64_t>(1, n / (4 * num_threads())));
  return (rows + width - 1) / width * width;
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
