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

// Rows of w come from memory, and the processor's own prefetcher starts anew in each tile. So the tiles that share some rows of
// w ask for the next ones, each for its part of them, into L2: memory is then busy while they multiply. They ask in the order
// of addresses, which memory answers fastest, though a tile reads its rows side by side.
template <class T>
struct Rows {  // `count` rows of w that follow one another in memory
  const T* first;
  int count;
};
template <class T>
struct Ahead {  // two runs, as of gate and up
  Rows<T> a, b;
};

// Rows [from, to) of the two runs as one.
template <class T>
GEMMA4_INLINE Ahead<T> part_of(const Ahead<T>& all, int from, int to, int64_t k_size) {
  const int a0 = min_of(from, all.a.count), a1 = min_of(to, all.a.count);
  const int b0 = max_of(from - all.a.count, 0), b1 = max_of(to - all.a.count, 0);
  return {{all.a.first + a0 * k_size, a1 - a0}, {all.b.first + b0 * k_size, b1 - b0}};
}

// The lines of `rows` that step `at` of a tile asks for.
template <class T>
GEMMA4_INLINE void ask(const Rows<T>& rows, int count, int64_t k) {
  const T* line = rows.first + k * count;
  for (int c = 0; c < count; ++c) prefetch(line + c * kStep<T>);
}

// out[i * N + j] = x[i] . w[j]
template <class T, int M, int N>
__attribute__((noinline)) void dot_tile(const T* const* x, const T* const* w, int64_t k_size, const Ahead<T>& ahead, float* out) {
  Vec acc[M * N];
  for (int i = 0; i < M * N; ++i) acc[i] = set(0.0f);
  constexpr int step = kStep<T>;
  int64_t k = 0;
  const auto add_step = [&](auto load_raw) GEMMA4_LAMBDA_INLINE {
    if (ahead.a.count == N) {
      ask(ahead.a, N, k);
    } else {
      ask(ahead.a, ahead.a.count, k);
      ask(ahead.b, ahead.b.count, k);
    }
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

// The same for few rows of x, where memory sets the pace: n <= kWidth rows of w that lie one after the other, as one stream of
// lines, each asked for 4 KB before it is read. after: where that stream goes on behind the last row.
// out[i * n + j] = x[i] . w[j], with the bits that dot_tile gives.
template <class T, int M>
__attribute__((noinline)) void dot_rows(const T* const* x, const T* w, int n, int64_t k_size, const T* after, float* out) {
  constexpr int64_t step = kStep<T>, distance = 4096 / sizeof(T);
  const T* const end = w + n * k_size;
  Vec sums[M * 4];
  for (int j = 0; j < n; ++j) {
    const T* row = w + j * k_size;
    Vec acc[M];
    for (int i = 0; i < M; ++i) acc[i] = set(0.0f);
    int64_t k = 0;
    const auto add_step = [&](auto load_raw) GEMMA4_LAMBDA_INLINE {
      const Raw<T> b = load_raw(row);
      for (int i = 0; i < M; ++i) acc[i] = dot(acc[i], load_raw(x[i]), b);
    };
    const auto add_steps = [&](int64_t to, const T* ahead) GEMMA4_LAMBDA_INLINE {
      for (; k + step <= to; k += step) {
        prefetch_near(ahead + k);
        add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k); });
      }
    };
    add_steps(min_of(k_size, max_of<int64_t>(0, end - row - distance)), row + distance);
    add_steps(k_size, after + (row + distance - end));
    if (const int rest = static_cast<int>(k_size - k)) add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k, rest); });
    for (int i = 0; i < M; ++i) sums[i * 4 + j % 4] = acc[i];
    if (j % 4 == 3)
      for (int i = 0; i < M; ++i) sum_lanes4(sums + i * 4, out + i * n + j - 3);
  }
  for (int j = n / 4 * 4; j < n; ++j)
    for (int i = 0; i < M; ++i) out[i * n + j] = sum_lanes(sums[i * 4 + j % 4]);
}

template <class T>
GEMMA4_INLINE void dot_rows_of(int m, const T* const* x, const T* w, int n, int64_t k_size, const T* after, float* out) {
  switch (m) {
    case 1: return dot_rows<T, 1>(x, w, n, k_size, after, out);
    case 2: return dot_rows<T, 2>(x, w, n, k_size, after, out);
    case 3: if constexpr (kTileM > 2) return dot_rows<T, 3>(x, w, n, k_size, after, out); break;
    case 4: if constexpr (kTileM > 2) return dot_rows<T, 4>(x, w, n, k_size, after, out); break;
  }
}

constexpr int64_t kRowBlock = 64;  // rows of x that stay in L2 while a task's rows of w pass by

// Rows x_row(0 .. m) times the weight rows w_row(0 .. n), `width` <= kTileN rows of w at a time.
// ahead(j): the rows of w to ask for while rows j .. j + width are multiplied.
// emit(i, mm, j, nn, y): rows i .. i + mm of x, rows j .. j + nn of w, y[mm * nn].
template <class T, class XRow, class WRow, class Next, class Emit>
GEMMA4_INLINE void product(int64_t m, int64_t n, int64_t k_size, int width, XRow x_row, WRow w_row, Next ahead, Emit emit) {
  const T* x[kTileM];
  const T* w[kTileN];
  float y[kTileM * kTileN];
  for (int64_t block = 0; block < m; block += kRowBlock) {
    const int64_t rows = min_of(kRowBlock, m - block);
    const int64_t tiles = (rows + kTileM - 1) / kTileM;  // cut evenly: 5 rows are 3 + 2, not 4 + 1
    for (int64_t j = 0; j < n; j += width) {
      const int nn = static_cast<int>(min_of<int64_t>(width, n - j));
      for (int c = 0; c < nn; ++c) w[c] = w_row(j + c);
      const Ahead<T> all = block == 0 ? ahead(j, nn) : Ahead<T>{{nullptr, 0}, {nullptr, 0}};
      const int wanted = all.a.count + all.b.count;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = block + rows * t / tiles;
        const int mm = static_cast<int>(block + rows * (t + 1) / tiles - i);
        for (int r = 0; r < mm; ++r) x[r] = x_row(i + r);
        const Ahead<T> next = part_of(all, static_cast<int>(wanted * t / tiles), static_cast<int>(wanted * (t + 1) / tiles), k_size);
        dot_tile_of<T>(mm, nn)(x, w, k_size, next, y);
        emit(i, mm, j, nn, y);
      }
    }
  }
}

// The same with n rows that lie one after the other at w. after: what a task reads next.
template <class T, class XRow, class Emit>
GEMMA4_INLINE void product(int64_t m, int64_t n, int64_t k_size, XRow x_row, const T* w, const T* after, Emit emit) {
  if (m <= kTileM) {
    const T* x[kTileM];
    float y[kTileM * kWidth];
    for (int64_t i = 0; i < m; ++i) x[i] = x_row(i);
    for (int64_t j = 0; j < n; j += kWidth) {
      const int nn = static_cast<int>(min_of<int64_t>(kWidth, n - j));
      const T* own = w + j * k_size;
      dot_rows_of<T>(static_cast<int>(m), x, own, nn, k_size, j + nn < n ? own + nn * k_size : after, y);
      emit(0, static_cast<int>(m), j, nn, y);
    }
    return;
  }
  product<T>(
      m, n, k_size, kTileN, x_row, [&](int64_t j) { return w + j * k_size; },
      [&](int64_t j, int nn) GEMMA4_LAMBDA_INLINE {
        const int64_t left = n - j - nn;
        if (left == 0) return Ahead<T>{{after, kTileN}, {nullptr, 0}};
        return Ahead<T>{{w + (j + nn) * k_size, static_cast<int>(min_of<int64_t>(kTileN, left))}, {nullptr, 0}};
      },
      emit);
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
