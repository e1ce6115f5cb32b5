// What the ops do with one row: norms and RoPE, in fp32.
#pragma once

#include "cpu/vec.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

// f(i, count): whole Vecs as (i, kWidth), then what is left as (i, rest). `count` is a constant where f is inlined.
template <class F>
GEMMA4_INLINE void for_vecs(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) f(i, kWidth);
  if (i < size) f(i, static_cast<int>(size - i));
}
// 1 / sqrt(mean(x^2) + eps)
template <class T>
GEMMA4_INLINE float inverse_rms(const T* x, int64_t size, float eps) {
  Vec sum[4] = {set(0), set(0), set(0), set(0)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth)
    for (int u = 0; u < 4; ++u) {
      const Vec v = load(x + i + u * kWidth);
      sum[u] = fma(v, v, sum[u]);
    }
  for_vecs(size - i, [&](int64_t j, int n) GEMMA4_LAMBDA_INLINE {
    const Vec v = load_some(x + i + j, n);
    sum[0] = fma(v, v, sum[0]);
  });
  const float total = sum_lanes(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}

// out = x / rms(x) * weight; weight may be null. out may be x.
template <class T, class Out>
GEMMA4_INLINE void rms_norm_row(const T* x, const T* weight, Out* out, int64_t size, float eps) {
  const Vec inverse = set(inverse_rms(x, size, eps));
  for_vecs(size, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
    const Vec y = mul(load_some(x + i, n), inverse);
    store_some(out + i, weight ? mul(y, load_some(weight + i, n)) : y, n);
  });
}

// y = (residual + rms_norm(x, weight)) * scale, z = rms_norm(y, next_weight)
template <class T>
GEMMA4_INLINE void norm_add_norm_row(const NormAddNorm& a, const T* x, int64_t row) {
  const T* residual = static_cast<const T*>(a.residual) + row * a.hidden;
  const T *weight = static_cast<const T*>(a.weight), *next = static_cast<const T*>(a.next_weight);
  T* y = static_cast<T*>(a.y) + row * a.hidden;
  const Vec scale = set(a.scale ? to_float(*static_cast<const T*>(a.scale)) : 1.0f);
  const Vec inverse = set(inverse_rms(x, a.hidden, a.eps));
  for_vecs(a.hidden, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
    const Vec normed = mul(mul(load_some(x + i, n), inverse), load_some(weight + i, n));
    store_some(y + i, mul(add(load_some(residual + i, n), normed), scale), n);
  });
  if (next) rms_norm_row(y, next, static_cast<T*>(a.z) + row * a.hidden, a.hidden, a.eps);
}

// RoPE in place on x [dim]: columns i and i + dim / 2 are a pair for i < pairs.
GEMMA4_INLINE void rotate_row(float* x, const float* cos, const float* sin, int64_t dim, int64_t pairs) {
  float* y = x + dim / 2;
  for_vecs(pairs, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
    const Vec a = load_some(x + i, n), b = load_some(y + i, n), c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(x + i, sub(mul(a, c), mul(b, s)), n);
    store_some(y + i, add(mul(b, c), mul(a, s)), n);
  });
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
