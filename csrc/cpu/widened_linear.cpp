// widened_linear: out = x w^T in fp32, for few rows of x and a weight that is stored in fewer bits.
//
// The self-check's truth is made of these products. The weight is read once, and 16 rows by 256
// columns of it at a time are widened into a buffer. The code is plain on purpose: it shares no
// products with the kernels that it judges. The self-check compares some of its rows with those of
// PyTorch.
//
// A task is 16 rows of the weight. Each thread adds up a task's sums in the order of columns, so the
// bits do not depend on the number of threads.
//
// Floor: the weight's bytes, read once, for few rows of x; from about 20 rows on, the
// multiplications. Measured with a weight [43008, 5376] on 2 threads of a Zen 4 server, in ms,
// beside blocks that PyTorch widens and multiplies (the best of 3; memory read 35 to 59 GB/s):
//   rows of x          1          6          35
//   bf16       17 |  43   29 |  95   104 | 181
//   int8       26 |  54   42 | 107   124 | 247
//   int4       48 |  72   58 | 128   136 | 235
// So bf16 reaches 27 GB/s with one row, and 79 G multiplications/s with 35. Buffers of 512, 1024
// and 2048 columns were up to 1.6 times slower for one row (they leave the nearest cache), and no
// faster for 35. Quantized weights wait for `dequantize_panel`, which makes 5 to 9 G values/s.
#include "cpu/panels.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

constexpr int64_t kColumns = 256;  // widened at once: 16 KB, which stay in a core's nearest cache
constexpr int kRowsOfX = 4;        // rows of x in a tile, at most
constexpr int kRowsOfW = kWidth == 16 ? 4 : 2;  // of the weight: a tile's sums stay in registers

struct Widened {
  alignas(64) float values[kPanel][kColumns];
  float sums[kWidenedRows][kPanel];
};
using Sums = float (*)[kPanel];

// sums[i][r + j] += x_i . w_(r + j) over some columns, for X rows of x that lie `stride` apart.
template <int X>
GEMMA4_INLINE void add_tile(
    const float* x, int64_t stride, const Widened& w, int r, int64_t columns, Sums sums) {
  Vec acc[X][kRowsOfW];
  GEMMA4_UNROLL for (int i = 0; i < X; ++i)
    GEMMA4_UNROLL for (int j = 0; j < kRowsOfW; ++j) acc[i][j] = set(0.0f);
  for_vecs(columns, [&](int64_t c, int n) GEMMA4_LAMBDA_INLINE {
    Vec own[kRowsOfW];
    GEMMA4_UNROLL for (int j = 0; j < kRowsOfW; ++j) own[j] = load_some(w.values[r + j] + c, n);
    GEMMA4_UNROLL for (int i = 0; i < X; ++i) {
      const Vec of_x = load_some(x + i * stride + c, n);
      GEMMA4_UNROLL for (int j = 0; j < kRowsOfW; ++j) acc[i][j] = fma(of_x, own[j], acc[i][j]);
    }
  });
  GEMMA4_UNROLL for (int i = 0; i < X; ++i)
    GEMMA4_UNROLL for (int j = 0; j < kRowsOfW; ++j) sums[i][r + j] += sum_lanes(acc[i][j]);
}

template <int X>
void add_rows(
    const float* x, int64_t stride, int64_t rows, const Widened& w, int64_t columns, Sums sums) {
  int64_t i = 0;
  for (; i + X <= rows; i += X) {
    for (int r = 0; r < kPanel; r += kRowsOfW)
      add_tile<X>(x + i * stride, stride, w, r, columns, sums + i);
  }
  if constexpr (X > 1) {
    if (i < rows) add_rows<X - 1>(x + i * stride, stride, rows - i, w, columns, sums + i);
  }
}

// out[i][row + r] for `rows` rows of the weight, at most kPanel. widen(w, begin, columns) fills
// w.values.
template <class Widen>
void product(const WidenedLinear& a, int64_t row, int64_t rows, Widen widen) {
  Widened w;
  std::memset(w.sums, 0, sizeof(w.sums));
  if (rows < kPanel) std::memset(w.values, 0, sizeof(w.values));
  for (int64_t begin = 0; begin < a.k; begin += kColumns) {
    const int64_t columns = min_of(kColumns, a.k - begin);
    widen(w, begin, columns);
    add_rows<kRowsOfX>(a.x + begin, a.k, a.tokens, w, columns, w.sums);
  }
  for (int64_t i = 0; i < a.tokens; ++i)
    std::memcpy(a.out + i * a.rows + row, w.sums[i], static_cast<size_t>(rows) * sizeof(float));
}

void of_bf16(const WidenedLinear& a) {
  parallel((a.rows + kPanel - 1) / kPanel, a.rows * a.k * a.tokens, [&](int64_t task) {
    const int64_t row = task * kPanel;
    const int64_t rows = min_of<int64_t>(kPanel, a.rows - row);
    const bf16* weight = static_cast<const bf16*>(a.weight) + row * a.stride;
    product(a, row, rows, [&](Widened& w, int64_t begin, int64_t columns) {
      for (int64_t r = 0; r < rows; ++r) {
        const bf16* from = weight + r * a.stride + begin;
        for_vecs(columns, [&](int64_t c, int n) GEMMA4_LAMBDA_INLINE {
          // 16 rows are more streams than hardware prefetchers follow.
          prefetch(from + kColumns + c);
          store_some(w.values[r] + c, load_some(from + c, n), n);
        });
      }
    });
  });
}

template <int Bits>
void of_quantized(const WidenedLinear& a) {
  const auto take = [&](int64_t panel, int64_t lane, int64_t row, int64_t rows) {
    const int64_t first_group = panel * a.q.groups;
    const uint8_t* data = static_cast<const uint8_t*>(a.weight) + first_group * group_bytes(Bits);
    const uint16_t* scale = a.q.scale + first_group * kPanel;
    product(a, row - a.first, rows, [&](Widened& w, int64_t begin, int64_t columns) {
      const int64_t group = begin / kGroup;
      const uint8_t* own = data + group * group_bytes(Bits);
      float* to = w.values[0];
      dequantize_panel<Bits>(own, scale + group * kPanel, columns, lane, rows, to, kColumns);
    });
  };
  for_panels(a.first, a.first + a.rows, a.n, a.parts, a.k, take);
}

}  // namespace

void widened_linear(const WidenedLinear& a) {
  if (a.tokens == 0 || a.rows == 0) return;
  if (!a.q.scale) of_bf16(a);
  else if (a.q.bits == 8) of_quantized<8>(a);
  else of_quantized<4>(a);
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
