// quantize_rows: rows of floats into the panels of a quantized weight, by the rules of `quantized` in gemma4_fast/quant.py,
// bit by bit. dequantize_rows: the way back. all_finite: whether a tensor of floats is. The layout: quantized.h.
//
// A task is one panel, so that no two threads write to one line. Group by group, in three passes over at most 4 KB of source:
// the largest value of each row; scales and their inverses, for all rows at once; then the rows, 32 values at a time.
#include "cpu/panels.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

constexpr int64_t kAhead = 16;  // groups: sixteen rows are more streams than hardware prefetchers follow

// What of a group there is, [count], widened and filled up with zeros.
template <class T>
struct Group {
  Vec v[kGroup / kWidth];
};
template <class T>
GEMMA4_INLINE Group<T> load_group(const T* x, int64_t count) {
  Group<T> group;
  if (count >= kGroup) {
    for (int i = 0; i < kGroup / kWidth; ++i) group.v[i] = load(x + i * kWidth);
  } else {
    for (int i = 0; i < kGroup / kWidth; ++i) {
      const int64_t left = count - i * kWidth;
      group.v[i] = left <= 0 ? set(0.0f) : load_some(x + i * kWidth, static_cast<int>(min_of<int64_t>(left, kWidth)));
    }
  }
  return group;
}

// What the scale is made from: for 8 bits the largest |x|, for 4 the first x of the largest |x|, with its sign.
template <int Bits, class T>
GEMMA4_INLINE float largest_of(const Group<T>& group, Vec& poison) {
  Vec high = group.v[0], low = group.v[0];
  for (int i = 0; i < kGroup / kWidth; ++i) {
    high = max(high, group.v[i]), low = min(low, group.v[i]);
    poison = fma(group.v[i], set(0.0f), poison);  // NaN if one of x is not finite
  }
  if (Bits == 8) return max_lanes(max(high, sub(set(0.0f), low)));
  const float top = max_lanes(high), bottom = max_lanes(sub(set(0.0f), low));
  const float largest = max_of(top, bottom);
  if (top != bottom) return std::copysign(largest, top - bottom);  // which is which is a coin toss: no branch
  float x[kGroup];  // both signs; or all zero, and then the sign of the first counts
  for (int i = 0; i < kGroup / kWidth; ++i) store(x + i * kWidth, group.v[i]);
  for (int i = 0; i < kGroup; ++i)
    if (std::fabs(x[i]) == largest) return x[i];
  return largest;  // NaN
}

// q, times `inverse` and rounded: halves away from zero for 8 bits, upwards for 4. To every 64th byte go four bytes.
template <int Bits, class T>
GEMMA4_INLINE void write_group(const Group<T>& group, float inverse, uint8_t* to) {
  int8_t q[kGroup];
  for (int i = 0; i < kGroup / kWidth; ++i) {
    const Vec y = mul(group.v[i], set(inverse));
    // NaN becomes the lower bound: of two operands, the second is taken then
    const Vec v = Bits == 8 ? min(max(add(y, copysign(0.5f, y)), set(-127.0f)), set(127.0f))
                            : min(max(add(y, set(8.5f)), set(0.0f)), set(15.0f));
    store_int8(q + i * kWidth, trunc(v));
  }
  uint32_t quads[kGroup / 4];
  std::memcpy(quads, q, sizeof(quads));
  for (int j = 0; j < Bits; ++j) {
    const uint32_t stored = Bits == 8 ? quads[j] ^ 0x80808080u : quads[2 * j] | quads[2 * j + 1] << 4;
    std::memcpy(to + j * 64, &stored, 4);
  }
}

// Rows `lane` .. `lane + rows` of a panel, from source x [rows, k]. Returns whether all values and scales are finite.
template <int Bits, class T>
bool quantize_panel(const T* x, int64_t stride, int64_t k, int64_t lane, int64_t rows, uint8_t* data, uint16_t* scale) {
  Vec poison = set(0.0f);
  float largest_scale = 0.0f;
  for (int64_t begin = 0; begin < k; begin += kGroup) {
    float largest[kPanel] = {}, inverse[kPanel];
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x + r * stride + begin;
      if (begin + kAhead * kGroup < k)
        for (size_t byte = 0; byte < kGroup * sizeof(T); byte += 64)
          prefetch_near(reinterpret_cast<const char*>(row + kAhead * kGroup) + byte);
      largest[r] = largest_of<Bits>(load_group(row, k - begin), poison);
    }
    uint16_t half[kPanel];
    for (int i = 0; i < kPanel; i += kWidth) {
      const Vec s = div(load(largest + i), set(Bits == 8 ? 127.0f : -8.0f));
      store_half(half + i, s);
      store(largest + i, s);
      store(inverse + i, div(set(1.0f), s));
    }
    for (int i = 0; i < kPanel; ++i) {
      largest_scale = max_of(largest_scale, std::fabs(largest[i]));
      inverse[i] = std::fabs(inverse[i]) <= 3.402823466e38f ? inverse[i] : 0.0f;  // of 0, or of next to nothing
    }
    std::memcpy(scale + lane, half, static_cast<size_t>(rows) * 2);
    for (int64_t r = 0; r < rows; ++r)
      write_group<Bits>(load_group(x + r * stride + begin, k - begin), inverse[r], data + (lane + r) * 4);
    data += group_bytes(Bits);
    scale += kPanel;
  }
  return largest_scale < 65520.0f && sum_lanes(poison) == 0.0f;  // from 65520 on fp16 rounds to infinity
}

template <int Bits, class T>
bool quantize_rows_of(const QuantizeRows& a) {
  std::atomic<bool> finite{true};
  const auto take = [&](int64_t panel, int64_t lane, int64_t row, int64_t rows) {
    const T* source = static_cast<const T*>(a.source) + (row - a.first) * a.stride;
    uint8_t* data = static_cast<uint8_t*>(a.data) + panel * a.groups * group_bytes(Bits);
    uint16_t* scale = a.scale + panel * a.groups * kPanel;
    if (!quantize_panel<Bits>(source, a.stride, a.k, lane, rows, data, scale))
      finite.store(false, std::memory_order_relaxed);
  };
  for_panels(a.first, a.first + a.rows, a.n, a.parts, a.k, take);
  return finite.load(std::memory_order_relaxed);
}

template <int Bits, class T>
void dequantize_rows_of(const DequantizeRows& a) {
  const auto take = [&](int64_t panel, int64_t lane, int64_t row, int64_t rows) {
    const uint8_t* data = static_cast<const uint8_t*>(a.data) + panel * a.groups * group_bytes(Bits);
    const uint16_t* scale = a.scale + panel * a.groups * kPanel;
    T* out = static_cast<T*>(a.out) + (row - a.first) * a.k;
    dequantize_panel<Bits>(data, scale, a.k, lane, rows, out, a.k);
  };
  for_panels(a.first, a.first + a.rows, a.n, a.parts, a.k, take);
}

// Whole blocks without a branch, so that the compiler makes vectors of them.
template <class Word>
bool words_finite(const Word* words, int64_t size, Word exponent) {
  constexpr int64_t task_size = 1 << 18, block = 4096;
  std::atomic<bool> finite{true};
  parallel((size + task_size - 1) / task_size, size, [&](int64_t task) {
    const int64_t end = min_of(size, (task + 1) * task_size);
    for (int64_t begin = task * task_size; begin < end; begin += block) {
      const int64_t count = min_of(block, end - begin);
      const Word* at = words + begin;
      Word bad = 0;
      for (int64_t i = 0; i < count; ++i) bad |= static_cast<Word>((at[i] & exponent) == exponent);
      if (bad) {
        finite.store(false, std::memory_order_relaxed);
        return;
      }
    }
  });
  return finite.load(std::memory_order_relaxed);
}

}  // namespace

void dequantize_rows(const DequantizeRows& a) {
  if (a.rows == 0) return;
  if (a.dtype == Dtype::f32) {
    if (a.bits == 8) dequantize_rows_of<8, float>(a);
    else dequantize_rows_of<4, float>(a);
  } else {
    if (a.bits == 8) dequantize_rows_of<8, bf16>(a);
    else dequantize_rows_of<4, bf16>(a);
  }
}

bool all_finite(const void* values, int64_t size, int64_t bytes, uint32_t exponent) {
  if (bytes == 4) return words_finite(static_cast<const uint32_t*>(values), size, exponent);
  return words_finite(static_cast<const uint16_t*>(values), size, static_cast<uint16_t>(exponent));
}

bool quantize_rows(const QuantizeRows& a) {
  if (a.rows == 0) return true;
  if (a.dtype == Dtype::f32) return a.bits == 8 ? quantize_rows_of<8, float>(a) : quantize_rows_of<4, float>(a);
  return a.bits == 8 ? quantize_rows_of<8, bf16>(a) : quantize_rows_of<4, bf16>(a);
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
