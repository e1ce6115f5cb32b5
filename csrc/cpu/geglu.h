// The product whose epilogue is GeGLU: gate and up rows of a weight side by side in one tile, gelu_tanh(gate) * up behind it.
#pragma once

#include "cpu/product.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

// out(i)[c] = gelu_tanh(x_row(i) . gate[c]) * (x_row(i) . up[c]) for rows i < m and columns first <= c < first + columns.
// Rows of w come as kWidth of gate, the same kWidth of up, the next of gate, and so on.
// after_gate, after_up: the rows that a task reads next.
template <class T, class XRow, class Out>
GEMMA4_INLINE void geglu_product(int64_t m, int64_t first, int64_t columns, int64_t k_size, const T* gate, const T* up,
                                 const T* after_gate, const T* after_up, XRow x_row, Out out) {
  if (m <= kFewRows) {
    const T* x[kFewRows];
    float g[kFewRows * kWidth], u[kFewRows * kWidth];
    for (int64_t i = 0; i < m; ++i) x[i] = x_row(i);
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int count = static_cast<int>(min_of<int64_t>(kWidth, columns - c));
      const bool last = c + count == columns;
      const T *g_rows = gate + (first + c) * k_size, *u_rows = up + (first + c) * k_size;
      dot_rows_of<T>(static_cast<int>(m), x, g_rows, count, k_size, u_rows, g);
      dot_rows_of<T>(static_cast<int>(m), x, u_rows, count, k_size, last ? after_gate : g_rows + count * k_size, u);
      for (int64_t i = 0; i < m; ++i) {
        const Vec h = mul(gelu_tanh(load_some(g + i * kWidth, count)), load_some(u + i * kWidth, count));
        store_some(out(i) + first + c, h, count);
      }
    }
    return;
  }
  const int64_t n = (columns + kWidth - 1) / kWidth * 2 * kWidth;
  const auto column_of = [](int64_t j) { return j / (2 * kWidth) * kWidth; };  // the first of its kWidth
  const auto is_up = [](int64_t j) { return j / kWidth % 2 == 1; };
  const auto w_row = [&](int64_t j) {
    return (is_up(j) ? up : gate) + (first + min_of(column_of(j) + j % kWidth, columns - 1)) * k_size;
  };
  const auto ahead = [&](int64_t j, int) GEMMA4_LAMBDA_INLINE {
    const int64_t next = j + kWidth, c = column_of(next);
    if (next == n) return Rows<T>{after_gate, kWidth};
    return Rows<T>{(is_up(next) ? up : gate) + (first + c) * k_size, static_cast<int>(min_of<int64_t>(kWidth, columns - c))};
  };
  alignas(64) float gates[kRowBlock * kWidth];
  product<T>(m, n, k_size, x_row, w_row, ahead, [&](int64_t i, int mm, int64_t j, int, const float* y) {
    const int64_t c = column_of(j);
    const int count = static_cast<int>(min_of<int64_t>(kWidth, columns - c));
    for (int r = 0; r < mm; ++r) {
      float* g = gates + (i + r) % kRowBlock * kWidth;
      if (is_up(j)) store_some(out(i + r) + first + c, mul(gelu_tanh(load(g)), load(y + r * kWidth)), count);
      else store(g, load(y + r * kWidth));
    }
  });
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
