// Products of few or many rows x with rows of a weight, both stored row by row: y[i][j] = sum_k x[i][k] w[j][k].
//
// No operand is repacked. A tile of kTileM x kTileN outputs keeps one accumulator each, walks both operands along k, and adds
// the accumulators' lanes at the end: 11 loads for 24 dot products with AVX-512 BF16, 3 instructions per output for the end.
// kWidth columns, of several tiles, are handed on as whole Vecs.
// So weights stay as the checkpoint has them: nothing is copied at load.
//
// The bits of y[i][j] depend on x[i], w[j] and K alone, not on the tile that it falls into.
//
// What was tried (bf16, one core, GFLOP/s; oneDNN's packed product in brackets):
//   Zen 4, K = 2816, 8 to 512 rows: 200-216 (188). It issues one vdpbf16ps a cycle.
//   Zen 5, which issues two (499 from registers), 512 rows: K = 2816 294 (447), K = 4096 289, K = 2048 381: a tile's rows no
//     longer fit into L1. In stretches of 28 KB 336, of 40 KB 360; the next rows of x asked into L1 meanwhile: worse where K is
//     long. One loop for each usual number of prefetches: K = 704 271 -> 283, K = 4096 329 -> 369.
//     Tiles of 4 x 6, whose rows of 6 were masked loads and stores; 3 x 8 the same, 6 x 4 -8%, 8 x 3 -15%, 2 x 12 -33%.
//     3 x 8, handed on as Vecs of 16: alone -5%, what is done with them included +3%.
//     The loops over accumulators unrolled early (GEMMA4_UNROLL): before, GCC kept the 24 in memory at both ends of a tile, 96
//     loads and stores. Operands in L2, K = 704: 363 -> 405; K = 2816: 386 -> 422. The same in the quantized products, in
//     attention and in the router: nothing.
//     Two cores, 512 rows, all of it: linear 680 -> 800 (880), MLP 655 -> 810, experts, first half 600 -> 755, second 455 -> 640.
//     Second half: 352 rows a task instead of 96: +2%; the next expert's rows of h asked for: +5%.
//   Zen 5, one row of x, of the read rate, two threads: tiles of six rows 82%, six rows asked for in the order of
//     addresses 90%, row by row 98% (dot_rows); one thread 82%, -, 97%.
//   Zen 5, 5 to 16 rows of x: 76% of the read rate, whether lines are asked into L1 or L2; not asked for 60 to 72%. Row by row, 8
//     rows of x at once: K = 704 93% up to 9 rows, but K = 2816, whose x leaves L1, 84% at 5 rows, 75% at 7, 53% at 8; cut into
//     pieces that stay in L1 70 to 80%, and less than tiles from 12 rows on. Not kept.
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

// Of x[i] . w[j], for M rows of x and kTileN of w: parts[i * kParts] = add_lanes when the last stretch is through; kept
// [M * kTileN] holds the sums until then.
template <class T, int M>
__attribute__((noinline)) void dot_tile(const T* const* x, const T* const* w, const Stretch& part, const Rows<T>& ahead, Vec* kept,
                                        Vec* parts) {
  constexpr int N = kTileN, step = kStep<T>;
  Vec acc[M * N];
  if (part.first)
    GEMMA4_UNROLL for (int i = 0; i < M * N; ++i) acc[i] = set(0.0f);
  else
    GEMMA4_UNROLL for (int i = 0; i < M * N; ++i) acc[i] = kept[i];
  int64_t k = part.begin;
  const auto add_step = [&](auto load_raw) GEMMA4_LAMBDA_INLINE {
    Raw<T> xs[M];
    GEMMA4_UNROLL for (int i = 0; i < M; ++i) xs[i] = load_raw(x[i]);
    GEMMA4_UNROLL for (int j = 0; j < N; ++j) {
      const Raw<T> b = load_raw(w[j]);
      GEMMA4_UNROLL for (int i = 0; i < M; ++i) acc[i * N + j] = dot(acc[i * N + j], xs[i], b);
    }
  };
  const auto steps = [&](auto ask_some) GEMMA4_LAMBDA_INLINE {
    for (; k + step <= part.end; k += step) {
      ask_some();
      add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k); });
    }
  };
  if (ahead.count == 0) steps([] {});  // one loop each for the usual numbers: the general one costs 10%
  else if (ahead.count == 1) steps([&]() GEMMA4_LAMBDA_INLINE { ask(ahead, 1, k); });
  else steps([&]() GEMMA4_LAMBDA_INLINE { ask(ahead, ahead.count, k); });
  if (const int rest = static_cast<int>(part.end - k)) add_step([&](const T* p) GEMMA4_LAMBDA_INLINE { return raw(p + k, rest); });
  if (part.last)
    GEMMA4_UNROLL for (int i = 0; i < M; ++i) parts[i * kParts] = add_lanes(acc + i * N);
  else
    GEMMA4_UNROLL for (int i = 0; i < M * N; ++i) kept[i] = acc[i];
}

template <class T>
using DotTile = void (*)(const T* const*, const T* const*, const Stretch&, const Rows<T>&, Vec*, Vec*);

// The tile of m <= kTileM rows of x.
template <class T>
DotTile<T> dot_tile_of(int m) {
  switch (m) {
    case 1: return dot_tile<T, 1>;
    case 2: return dot_tile<T, 2>;
    case 3: if constexpr (kTileM > 2) return dot_tile<T, 3>; break;
    case 4: if constexpr (kTileM > 3) return dot_tile<T, 4>; break;
  }
  return nullptr;
}

// The same for few rows of x, where memory sets the pace: n <= kWidth rows of w that lie one after the other, as one stream of
// lines, each asked for 4 KB before it is read. after: where that stream goes on behind the last row.
// out[i * kWidth + j] = x[i] . w[j], with the bits that dot_tile gives.
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
      for (int i = 0; i < M; ++i) sum_lanes4(sums + i * 4, out + i * kWidth + j - 3);
  }
  for (int j = n / 4 * 4; j < n; ++j)
    for (int i = 0; i < M; ++i) out[i * kWidth + j] = sum_lanes(sums[i * 4 + j % 4]);
}

template <class T>
GEMMA4_INLINE void dot_rows_of(int m, const T* const* x, const T* w, int n, int64_t k_size, const T* after, float* out) {
  switch (m) {
    case 1: return dot_rows<T, 1>(x, w, n, k_size, after, out);
    case 2: return dot_rows<T, 2>(x, w, n, k_size, after, out);
    case 3: if constexpr (kFewRows > 2) return dot_rows<T, 3>(x, w, n, k_size, after, out); break;
    case 4: if constexpr (kFewRows > 2) return dot_rows<T, 4>(x, w, n, k_size, after, out); break;
  }
}

constexpr int64_t kRowBlock = 64;  // rows of x that stay in L2 while a task's rows of w pass by

// The longest stretch: what a tile reads of x and w takes 40 KB of L1. (One core, Zen 5, bf16, 512 rows: K = 2816 in one stretch
// 294 GFLOP/s, K = 2048 381.)
template <class T>
constexpr int64_t kDepth = 40 * 1024 / ((kTileM + kTileN) * static_cast<int64_t>(sizeof(T)));

// The first n <= kWidth columns of y [m, kWidth], to rows that are `stride` apart.
template <class T>
GEMMA4_INLINE void store_rows(const float* y, int m, int n, T* out, int64_t stride) {
  for (int r = 0; r < m; ++r) store_some(out + r * stride, load_some(y + r * kWidth, n), n);
}

// Rows x_row(0 .. m) times the weight rows w_row(0 .. n).
// ahead(j, nn): the rows of w to ask for while rows j .. j + nn are multiplied.
// emit(i, mm, j, nn, y): rows i .. i + mm of x, rows j .. j + nn of w, y[r * kWidth + c].
template <class T, class XRow, class WRow, class Next, class Emit>
GEMMA4_INLINE void product(int64_t m, int64_t n, int64_t k_size, XRow x_row, WRow w_row, Next ahead, Emit emit) {
  const T* x[kRowBlock];
  const T* w[kWidth];
  Vec kept[(kRowBlock + kTileM - 1) / kTileM][kTileM * kTileN];  // by tile
  Vec parts[kRowBlock * kParts];                                 // by row of x
  alignas(64) float y[kTileM * kWidth];
  const int64_t stretches = max_of<int64_t>(1, (k_size + kDepth<T> - 1) / kDepth<T>);
  const int64_t depth = ((k_size + stretches - 1) / stretches + kStep<T> - 1) / kStep<T> * kStep<T>;
  for (int64_t block = 0; block < m; block += kRowBlock) {
    const int64_t rows = min_of(kRowBlock, m - block);
    for (int64_t r = 0; r < rows; ++r) x[r] = x_row(block + r);
    const int64_t tiles = (rows + kTileM - 1) / kTileM;  // cut evenly: 7 rows are 2 + 2 + 3, not 3 + 3 + 1
    for (int64_t j = 0; j < n; j += kWidth) {
      const int nn = static_cast<int>(min_of<int64_t>(kWidth, n - j)), cuts = (nn + kTileN - 1) / kTileN;
      for (int c = 0; c < cuts * kTileN; ++c) w[c] = w_row(min_of(j + c, n - 1));  // beyond the last one: no one looks at those
      const Rows<T> all = block == 0 ? ahead(j, nn) : Rows<T>{nullptr, 0};
      for (int cut = 0; cut < cuts; ++cut)
        for (int64_t p = 0; p < stretches; ++p) {
          const Stretch part{min_of(k_size, p * depth), min_of(k_size, (p + 1) * depth), p == 0, p + 1 == stretches};
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = rows * t / tiles, turn = cut * tiles + t, turns = cuts * tiles;
            const int mm = static_cast<int>(rows * (t + 1) / tiles - i);
            const int from = static_cast<int>(all.count * turn / turns), to = static_cast<int>(all.count * (turn + 1) / turns);
            dot_tile_of<T>(mm)(x + i, w + cut * kTileN, part, {all.first + from * k_size, to - from}, kept[t],
                               parts + i * kParts + cut);
            if (!part.last || cut + 1 < cuts) continue;
            for (int r = 0; r < mm; ++r) store(y + r * kWidth, join(parts + (i + r) * kParts));
            emit(block + i, mm, j, nn, y);
          }
        }
    }
  }
}

// The same with n rows that lie one after the other at w. after: what a task reads next.
template <class T, class XRow, class Emit>
GEMMA4_INLINE void product(int64_t m, int64_t n, int64_t k_size, XRow x_row, const T* w, const T* after, Emit emit) {
  if (m <= kFewRows) {
    const T* x[kFewRows];
    float y[kFewRows * kWidth];
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
        return left == 0 ? Rows<T>{after, kWidth} : Rows<T>{w + (j + nn) * k_size, static_cast<int>(min_of<int64_t>(kWidth, left))};
      },
      emit);
}

// Rows of a weight that one task takes, in whole Vecs, and at least four tasks for each thread. For few rows of x about 128 KB,
// for many 512 KB: then a block of x is read from L2 more often, and all of x less often from L3.
inline int64_t rows_per_task(int64_t m, int64_t n, int64_t row_bytes, int width = kWidth) {
  int64_t rows = max_of<int64_t>(1, ((m > kFewRows ? 512 : 128) << 10) / max_of<int64_t>(row_bytes, 1));
  rows = min_of(rows, max_of<int64_t>(1, n / (4 * num_threads())));
  return (rows + width - 1) / width * width;
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
