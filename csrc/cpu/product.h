// Products of few or many rows x with rows of a weight, both stored row by row: y[i][j] = sum_k x[i][k] w[j][k].
//
// No operand is repacked. A tile of kTileM x kTileN outputs keeps one accumulator each, walks both operands along k, and adds
// the accumulators' lanes at the end: 10 loads for 24 dot products with AVX-512 BF16, 3 instructions per output for the end.
// So weights stay as the checkpoint has them: nothing is copied at load.
//
// The bits of y[i][j] depend on x[i], w[j] and K alone, not on the tile that it falls into.
//
// What was tried (bf16, one core, GFLOP/s; oneDNN's packed product in brackets):
//   Zen 4, K = 2816, 8 to 512 rows: 200-216 (188). It issues one vdpbf16ps a cycle.
//   Zen 5, which issues two, 512 rows: K = 2816 294 (447), K = 4096 289, K = 2048 381: a tile's rows no longer fit into L1.
//     In stretches of 28 KB 336, of 40 KB 360; the next rows of x asked into L1 meanwhile: worse where K is long.
//     One loop for each usual number of prefetches: K = 704 271 -> 283, K = 4096 329 -> 369.
//     Tiles of 3 x 8 the same, 6 x 4 -8%, 8 x 3 -15%, 2 x 12 -33%. What is left to oneDNN is adding lanes, a tile's start,
//     and x from L2 (a tile of 704 columns whose operands lie in L1: 403).
//   Zen 5, one row of x, of the read rate, two threads: tiles of six rows 82%, six rows asked for in the order of
//     addresses 90%, row by row 98% (dot_rows); one thread 82%, -, 97%.
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
  const Rows<T> a{all.a.first + a0 * k_size, a1 - a0}, b{all.b.first + b0 * k_size, b1 - b0};
  return a.count ? Ahead<T>{a, b} : Ahead<T>{b, {nullptr, 0}};
}

// The lines of `rows` that the step of a tile at column k asks for.
template <class T>
GEMMA4_INLINE void ask(const Rows<T>& rows, int count, int64_t k) {
  const T* line = rows.first + k * count;
  for (int c = 0; c < count; ++c) prefetch(line + c * kStep<T>);
}

// A stretch of the columns that a tile works on: all of them, or where rows are so long that a tile's would not fit into L1
// together, one stretch after the other, with the accumulators kept in between.
struct Stretch {
  int64_t begin, end;  // whole steps, but for the last end
  bool first, last;
};

// out[i * N + j] = x[i] . w[j] when the last stretch is through; kept [M * N] holds the sums until then.
template <class T, int M, int N>
__attribute__((noinline)) void dot_tile(const T* const* x, const T* const* w, const Stretch& part, const Ahead<T>& ahead, Vec* kept,
                                        float* out) {
  Vec acc[M * N];
  if (part.first)
    for (int i = 0; i < M * N; ++i) acc[i] = set(0.0f);
  else
    for (int i = 0; i < M * N; ++i) acc[i] = kept[i];
  constexpr int step = kStep<T>;
  int64_t k = part.begin;
  const auto add_step = [&](auto load_raw) GEMMA4_LAMBDA_INLINE {
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
  const auto steps = [&](auto ask_some) GEMMA4_LAMBDA_INLINE {
    for (; k + step <= part.end; k += step) {
      ask_some();
      add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k); });
    }
  };
  const int asked = ahead.a.count + ahead.b.count;  // one loop each for the usual numbers: the general one costs 10%
  if (asked == 0) steps([] {});
  else if (asked == 1 && ahead.a.count) steps([&]() GEMMA4_LAMBDA_INLINE { ask(ahead.a, 1, k); });
  else if (asked == 3 && ahead.a.count == 3) steps([&]() GEMMA4_LAMBDA_INLINE { ask(ahead.a, 3, k); });
  else steps([&]() GEMMA4_LAMBDA_INLINE { ask(ahead.a, ahead.a.count, k), ask(ahead.b, ahead.b.count, k); });
  if (const int rest = static_cast<int>(part.end - k)) add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k, rest); });
  if (!part.last) {
    for (int i = 0; i < M * N; ++i) kept[i] = acc[i];
    return;
  }
  int i = 0;
  for (; i + 4 <= M * N; i += 4) sum_lanes4(acc + i, out + i);
  for (; i < M * N; ++i) out[i] = sum_lanes(acc[i]);
}

template <class T>
using DotTile = void (*)(const T* const*, const T* const*, const Stretch&, const Ahead<T>&, Vec*, float*);

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

// The longest stretch: what a tile reads of x and w takes 40 KB of L1. (One core, Zen 5, bf16, 512 rows: K = 2816 in one stretch
// 294 GFLOP/s, K = 2048 381.)
template <class T>
constexpr int64_t kDepth = 40 * 1024 / ((kTileM + kTileN) * static_cast<int64_t>(sizeof(T)));

// Rows x_row(0 .. m) times the weight rows w_row(0 .. n).
// ahead(j, nn): the rows of w to ask for while rows j .. j + nn are multiplied.
// emit(i, mm, j, nn, y): rows i .. i + mm of x, rows j .. j + nn of w, y[mm * nn].
template <class T, class XRow, class WRow, class Next, class Emit>
GEMMA4_INLINE void product(int64_t m, int64_t n, int64_t k_size, XRow x_row, WRow w_row, Next ahead, Emit emit) {
  const T* x[kRowBlock];
  const T* w[kTileN];
  float y[kTileM * kTileN];
  Vec kept[kRowBlock / kTileM][kTileM * kTileN];
  const int64_t stretches = max_of<int64_t>(1, (k_size + kDepth<T> - 1) / kDepth<T>);
  const int64_t depth = ((k_size + stretches - 1) / stretches + kStep<T> - 1) / kStep<T> * kStep<T>;
  for (int64_t block = 0; block < m; block += kRowBlock) {
    const int64_t rows = min_of(kRowBlock, m - block);
    for (int64_t r = 0; r < rows; ++r) x[r] = x_row(block + r);
    const int64_t tiles = (rows + kTileM - 1) / kTileM;  // cut evenly: 5 rows are 3 + 2, not 4 + 1
    for (int64_t j = 0; j < n; j += kTileN) {
      const int nn = static_cast<int>(min_of<int64_t>(kTileN, n - j));
      for (int c = 0; c < nn; ++c) w[c] = w_row(j + c);
      const Ahead<T> all = block == 0 ? ahead(j, nn) : Ahead<T>{{nullptr, 0}, {nullptr, 0}};
      const int wanted = all.a.count + all.b.count;
      for (int64_t p = 0; p < stretches; ++p) {
        const Stretch part{min_of(k_size, p * depth), min_of(k_size, (p + 1) * depth), p == 0, p + 1 == stretches};
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t i = rows * t / tiles;
          const int mm = static_cast<int>(rows * (t + 1) / tiles - i);
          const Ahead<T> next = part_of(all, static_cast<int>(wanted * t / tiles), static_cast<int>(wanted * (t + 1) / tiles), k_size);
          dot_tile_of<T>(mm, nn)(x + i, w, part, next, kept[t], y);
          if (part.last) emit(block + i, mm, j, nn, y);
        }
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
      m, n, k_size, x_row, [&](int64_t j) { return w + j * k_size; },
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
