// The product whose epilogue is GeGLU: gate and up rows of a weight side by side in one tile, gelu_tanh(gate) * up behind it.
#pragma once

#include "cpu/product.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

// out(i)[c] = gelu_tanh(x_row(i) . gate[c]) * (x_row(i) . up[c]) for rows i < m and columns first <= c < first + columns.
template <class T, class XRow, class Out>
GEMMA4_INLINE void geglu_product(int64_t m, int64_t first, int64_t columns, int64_t k_size, const T* gate, const T* up,
                                 XRow x_row, Out out) {
  static_assert(kTileN % 2 == 0 && kTileM * kTileN / 2 <= kWidth, "a tile's results fit one Vec");
  const int64_t n = 2 * columns;
  const auto w_row = [&](int64_t j) {
    const int64_t start = j / kTileN * kTileN, half = min_of<int64_t>(kTileN, n - start) / 2, c = j - start;
    return (c < half ? gate : up) + (first + start / 2 + (c < half ? c : c - half)) * k_size;
  };
  product<T>(m, n, k_size, kTileN, kTileN / 2 * k_size, x_row, w_row, [&](int64_t i, int mm, int64_t j, int nn, const float* y) {
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
