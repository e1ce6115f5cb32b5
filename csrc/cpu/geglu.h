// The product whose epilogue is GeGLU: gate and up rows of a weight side by side in one tile, gelu_tanh(gate) * up behind it.
#pragma once

#include "cpu/product.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

// out(i)[c] = gelu_tanh(x_row(i) . gate[c]) * (x_row(i) . up[c]) for rows i < m and columns first <= c < first + columns.
// A tile's rows of w, for kTileN = 6: gate c, c + 1, c + 2, then up c, c + 1, c + 2.
// after_gate, after_up: the rows that a task reads next.
template <class T, class XRow, class Out>
GEMMA4_INLINE void geglu_product(int64_t m, int64_t first, int64_t columns, int64_t k_size, const T* gate, const T* up,
                                 const T* after_gate, const T* after_up, XRow x_row, Out out) {
  static_assert(kTileN % 2 == 0 && kTileM * kTileN / 2 <= kWidth, "a tile's results fit one Vec");
  if (m <= kTileM) {
    const T* x[kTileM];
    float g[kTileM * kWidth], u[kTileM * kWidth];
    for (int64_t i = 0; i < m; ++i) x[i] = x_row(i);
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int count = static_cast<int>(min_of<int64_t>(kWidth, columns - c));
      const bool last = c + count == columns;
      const T *g_rows = gate + (first + c) * k_size, *u_rows = up + (first + c) * k_size;
      dot_rows_of<T>(static_cast<int>(m), x, g_rows, count, k_size, u_rows, g);
      dot_rows_of<T>(static_cast<int>(m), x, u_rows, count, k_size, last ? after_gate : g_rows + count * k_size, u);
      for (int64_t i = 0; i < m; ++i) {
        const Vec h = mul(gelu_tanh(load_some(g + i * count, count)), load_some(u + i * count, count));
        store_some(out(i) + first + c, h, count);
      }
    }
    return;
  }
  const int64_t n = 2 * columns;
  const auto w_row = [&](int64_t j) {
    const int64_t start = j / kTileN * kTileN, half = min_of<int64_t>(kTileN, n - start) / 2, c = j - start;
    return (c < half ? gate : up) + (first + start / 2 + (c < half ? c : c - half)) * k_size;
  };
  const auto ahead = [&](int64_t j, int nn) GEMMA4_LAMBDA_INLINE {
    const int64_t c = first + (j + nn) / 2, left = first + columns - c;
    if (left == 0) return Ahead<T>{{after_gate, kTileN / 2}, {after_up, kTileN / 2}};
    const int count = static_cast<int>(min_of<int64_t>(kTileN / 2, left));
    return Ahead<T>{{gate + c * k_size, count}, {up + c * k_size, count}};
  };
  product<T>(m, n, k_size, x_row, w_row, ahead, [&](int64_t i, int mm, int64_t j, int nn, const float* y) {
    const int half = nn / 2;
    float g[kWidth] = {}, u[kWidth] = {}, h[kWidth];
    for (int r = 0; r < mm; ++r)
      for (int c = 0; c < half; ++c) g[r * half + c] = y[r * nn + c], u[r * half + c] = y[r * nn + half + c];
    store(h, mul(gelu_tanh(load(g)), load(u)));
    for (int r = 0; r < mm; ++r) store_some(out(i + r) + first + j / 2, load_some(h + r * half, half), half);
  });
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
