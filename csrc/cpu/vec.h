// Vectors of floats for the instruction set that a file is compiled for. Kernels are written once, over these names.
//
// Each kernel file is compiled once per instruction set, with other flags and another GEMMA4_ISA. Everything here lies in a
// namespace of that name, so that the linker never takes AVX-512 code for a machine without it. For the same reason kernel
// files use no std:: class whose members could be emitted out of line.
//
//   Vec              kWidth floats
//   Raw<T>           what one step of a dot product loads: kStep<T> elements of T
//   dot(acc, a, b)   acc += a * b, lane by lane
//   sum_lanes        the sum of a Vec's lanes, always in the same order. Of kWidth Vecs at once: `add_lanes` of each kTileN of
//                    them, then `join` of the kParts parts, whose lanes are the sums
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#define GEMMA4_INLINE inline __attribute__((always_inline))
#define GEMMA4_LAMBDA_INLINE __attribute__((always_inline))
// Before a loop over an array of Vecs: unrolled early enough that the array becomes registers.
#define GEMMA4_UNROLL _Pragma("GCC unroll 32")

namespace gemma4_fast {
namespace GEMMA4_ISA {

GEMMA4_INLINE float to_float(float x) { return x; }
GEMMA4_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T>
GEMMA4_INLINE T from_float(float x);
template <>
GEMMA4_INLINE float from_float<float>(float x) {
  return x;
}
template <>
GEMMA4_INLINE bf16 from_float<bf16>(float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

GEMMA4_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }       // into L2
GEMMA4_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }  // into L1

template <class T>
GEMMA4_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
GEMMA4_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

constexpr int kWidth = 16;
struct Vec {
  __m512 v;
};

GEMMA4_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
GEMMA4_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
GEMMA4_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

GEMMA4_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }  // n < 16
GEMMA4_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
GEMMA4_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
GEMMA4_INLINE Vec widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
GEMMA4_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
GEMMA4_INLINE Vec load(const bf16* p, int n) {  // AVX-512VL's masked loads, through the 512-bit form that BW has
  return widen(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(first(n), p)));
}
GEMMA4_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
GEMMA4_INLINE void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
GEMMA4_INLINE __m256i narrow(Vec x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), quiet));
#endif
}
GEMMA4_INLINE void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
GEMMA4_INLINE void store(bf16* p, Vec x, int n) {
  _mm512_mask_storeu_epi16(p, first(n), _mm512_castsi256_si512(narrow(x)));
}

// lanes that are whole numbers of at most 127, or NaN, which becomes anything
GEMMA4_INLINE void store_int8(int8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
GEMMA4_INLINE void store_half(uint16_t* p, Vec x) {  // fp16, to the nearest, ties to even
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
GEMMA4_INLINE Vec trunc(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)}; }
GEMMA4_INLINE Vec copysign(float x, Vec sign) {  // x >= 0
  return {_mm512_or_ps(_mm512_set1_ps(x), _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
GEMMA4_INLINE Vec round_to_even(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
GEMMA4_INLINE Vec scale_by_power_of_two(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// Lanes l of each quarter as (l0 + l2) + (l1 + l3), then the quarters as (q0 + q2) + (q1 + q3).
GEMMA4_INLINE float sum_lanes(Vec x) {
  __m512 t = _mm512_add_ps(x.v, _mm512_shuffle_ps(x.v, x.v, 0x4e));  // l + l^2
  t = _mm512_add_ps(t, _mm512_shuffle_ps(t, t, 0xb1));               // + l^1
  t = _mm512_add_ps(t, _mm512_shuffle_f32x4(t, t, 0x4e));            // quarters q + q^2
  t = _mm512_add_ps(t, _mm512_shuffle_f32x4(t, t, 0xb1));            // + q^1
  return _mm512_cvtss_f32(t);
}
// Several at once: the same additions in the same order. Of four, [q][i]: quarter q of a[i], its lanes added.
GEMMA4_INLINE __m512 quarters_of4(const Vec* a) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
// Of a and b, each [4][4], q0 + q2 and q1 + q3: [a or b][2][4].
GEMMA4_INLINE __m512 halves_of8(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
GEMMA4_INLINE Vec sums_of16(__m512 a, __m512 b) {  // each [2][2][4]
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))};
}
GEMMA4_INLINE void sum_lanes4(const Vec* a, float* out) {
  const __m512 t = quarters_of4(a);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
GEMMA4_INLINE float max_lanes(Vec x) { return _mm512_reduce_max_ps(x.v); }

template <class T>
struct Raw;
template <class T>
constexpr int kStep = kWidth;

template <>
struct Raw<float> {
  Vec v;
};
GEMMA4_INLINE Raw<float> raw(const float* p) { return {load(p)}; }
GEMMA4_INLINE Raw<float> raw(const float* p, int n) { return {load(p, n)}; }
GEMMA4_INLINE Vec dot(Vec acc, const Raw<float>& a, const Raw<float>& b) { return fma(a.v, b.v, acc); }

template <>
constexpr int kStep<bf16> = 2 * kWidth;
GEMMA4_INLINE __m512i load_step(const bf16* p) { return _mm512_loadu_si512(p); }
GEMMA4_INLINE __m512i load_step(const bf16* p, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }

#if defined(__AVX512BF16__)
constexpr int kTileM = 3, kTileN = 8, kFewRows = 4;
GEMMA4_INLINE Vec add_lanes(const Vec* acc) { return {halves_of8(quarters_of4(acc), quarters_of4(acc + 4))}; }
GEMMA4_INLINE Vec join(const Vec* parts) { return sums_of16(parts[0].v, parts[1].v); }
template <>
struct Raw<bf16> {
  __m512bh v;
};
GEMMA4_INLINE Raw<bf16> raw(const bf16* p) { return {(__m512bh)load_step(p)}; }
GEMMA4_INLINE Raw<bf16> raw(const bf16* p, int n) { return {(__m512bh)load_step(p, n)}; }
GEMMA4_INLINE Vec dot(Vec acc, const Raw<bf16>& a, const Raw<bf16>& b) { return {_mm512_dpbf16_ps(acc.v, a.v, b.v)}; }
#else
constexpr int kTileM = 4, kTileN = 4, kFewRows = 4;
GEMMA4_INLINE Vec add_lanes(const Vec* acc) { return {quarters_of4(acc)}; }
GEMMA4_INLINE Vec join(const Vec* parts) {
  return sums_of16(halves_of8(parts[0].v, parts[1].v), halves_of8(parts[2].v, parts[3].v));
}
template <>
struct Raw<bf16> {
  __m512 even, odd;
};
GEMMA4_INLINE Raw<bf16> split(__m512i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
GEMMA4_INLINE Raw<bf16> raw(const bf16* p) { return split(load_step(p)); }
GEMMA4_INLINE Raw<bf16> raw(const bf16* p, int n) { return split(load_step(p, n)); }
GEMMA4_INLINE Vec dot(Vec acc, const Raw<bf16>& a, const Raw<bf16>& b) {
  return {_mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, acc.v))};
}
#endif

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kWidth = 8;
constexpr int kTileM = 2, kTileN = 4, kFewRows = 2;
struct Vec {
  __m256 v;
};

GEMMA4_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
GEMMA4_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
GEMMA4_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
GEMMA4_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }

GEMMA4_INLINE __m256i first(int n) {  // lanes below n: all ones
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GEMMA4_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
GEMMA4_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
GEMMA4_INLINE Vec widen(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
GEMMA4_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
GEMMA4_INLINE Vec load(const bf16* p, int n) {
  bf16 t[8] = {};
  std::memcpy(t, p, static_cast<size_t>(n) * 2);
  return load(t);
}
GEMMA4_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
GEMMA4_INLINE void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first(n), x.v); }
GEMMA4_INLINE void store(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
GEMMA4_INLINE void store(bf16* p, Vec x, int n) {
  bf16 t[8];
  store(t, x);
  std::memcpy(p, t, static_cast<size_t>(n) * 2);
}

GEMMA4_INLINE void store_int8(int8_t* p, Vec x) {
  const __m256i wide = _mm256_cvtps_epi32(x.v);
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(pairs, pairs));
}
GEMMA4_INLINE void store_half(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
GEMMA4_INLINE Vec trunc(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)}; }
GEMMA4_INLINE Vec copysign(float x, Vec sign) {
  return {_mm256_or_ps(_mm256_set1_ps(x), _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
GEMMA4_INLINE Vec round_to_even(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
GEMMA4_INLINE Vec scale_by_power_of_two(Vec x, Vec n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(e))};
}

// Lanes l of each half as (l0 + l2) + (l1 + l3), then the halves.
GEMMA4_INLINE float sum_lanes(Vec x) {
  __m256 t = _mm256_add_ps(x.v, _mm256_shuffle_ps(x.v, x.v, 0x4e));
  t = _mm256_add_ps(t, _mm256_shuffle_ps(t, t, 0xb1));
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
GEMMA4_INLINE Vec add_lanes(const Vec* a) {  // of four, [h][i]: half h of a[i], its lanes added
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  return {_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee))};
}
GEMMA4_INLINE Vec join(const Vec* parts) {
  const __m256 a = parts[0].v, b = parts[1].v;
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}
GEMMA4_INLINE void sum_lanes4(const Vec* a, float* out) {
  const __m256 t = add_lanes(a).v;
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
GEMMA4_INLINE float max_lanes(Vec x) {
  float t[8];
  store(t, x);
  float m = t[0];
  for (int i = 1; i < 8; ++i) m = max_of(m, t[i]);
  return m;
}

template <class T>
struct Raw;
template <class T>
constexpr int kStep = kWidth;

template <>
struct Raw<float> {
  Vec v;
};
GEMMA4_INLINE Raw<float> raw(const float* p) { return {load(p)}; }
GEMMA4_INLINE Raw<float> raw(const float* p, int n) { return {load(p, n)}; }
GEMMA4_INLINE Vec dot(Vec acc, const Raw<float>& a, const Raw<float>& b) { return fma(a.v, b.v, acc); }

template <>
constexpr int kStep<bf16> = 2 * kWidth;
template <>
struct Raw<bf16> {
  __m256 even, odd;
};
GEMMA4_INLINE Raw<bf16> raw(const bf16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
GEMMA4_INLINE Raw<bf16> raw(const bf16* p, int n) {
  bf16 t[16] = {};
  std::memcpy(t, p, static_cast<size_t>(n) * 2);
  return raw(t);
}
GEMMA4_INLINE Vec dot(Vec acc, const Raw<bf16>& a, const Raw<bf16>& b) {
  return {_mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, acc.v))};
}

#else  // plain C++: loops of a fixed length, which compilers turn into NEON, SSE or what there is

constexpr int kWidth = 8;
constexpr int kTileM = 2, kTileN = 2, kFewRows = 2;
struct Vec {
  float v[kWidth];
};
#define GEMMA4_LANES for (int i = 0; i < kWidth; ++i)

GEMMA4_INLINE Vec set(float x) { Vec r; GEMMA4_LANES r.v[i] = x; return r; }
GEMMA4_INLINE Vec add(Vec a, Vec b) { Vec r; GEMMA4_LANES r.v[i] = a.v[i] + b.v[i]; return r; }
GEMMA4_INLINE Vec sub(Vec a, Vec b) { Vec r; GEMMA4_LANES r.v[i] = a.v[i] - b.v[i]; return r; }
GEMMA4_INLINE Vec mul(Vec a, Vec b) { Vec r; GEMMA4_LANES r.v[i] = a.v[i] * b.v[i]; return r; }
GEMMA4_INLINE Vec div(Vec a, Vec b) { Vec r; GEMMA4_LANES r.v[i] = a.v[i] / b.v[i]; return r; }
GEMMA4_INLINE Vec fma(Vec a, Vec b, Vec c) { Vec r; GEMMA4_LANES r.v[i] = a.v[i] * b.v[i] + c.v[i]; return r; }
GEMMA4_INLINE Vec max(Vec a, Vec b) { Vec r; GEMMA4_LANES r.v[i] = max_of(a.v[i], b.v[i]); return r; }
GEMMA4_INLINE Vec min(Vec a, Vec b) { Vec r; GEMMA4_LANES r.v[i] = min_of(a.v[i], b.v[i]); return r; }
GEMMA4_INLINE Vec load(const float* p) { Vec r; GEMMA4_LANES r.v[i] = p[i]; return r; }
GEMMA4_INLINE Vec load(const float* p, int n) { Vec r; GEMMA4_LANES r.v[i] = i < n ? p[i] : 0.0f; return r; }
GEMMA4_INLINE Vec load(const bf16* p) { Vec r; GEMMA4_LANES r.v[i] = to_float(p[i]); return r; }
GEMMA4_INLINE Vec load(const bf16* p, int n) { Vec r; GEMMA4_LANES r.v[i] = i < n ? to_float(p[i]) : 0.0f; return r; }
GEMMA4_INLINE void store(float* p, Vec x) { GEMMA4_LANES p[i] = x.v[i]; }
GEMMA4_INLINE void store(float* p, Vec x, int n) { for (int i = 0; i < n; ++i) p[i] = x.v[i]; }
GEMMA4_INLINE void store(bf16* p, Vec x) { GEMMA4_LANES p[i] = from_float<bf16>(x.v[i]); }
GEMMA4_INLINE void store(bf16* p, Vec x, int n) { for (int i = 0; i < n; ++i) p[i] = from_float<bf16>(x.v[i]); }
GEMMA4_INLINE void store_int8(int8_t* p, Vec x) { GEMMA4_LANES p[i] = static_cast<int8_t>(x.v[i] == x.v[i] ? x.v[i] : 0.0f); }
GEMMA4_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (size < 0x38800000u) {  // below 2^-14: units of 2^-24. Adding 0.5 makes them the last bits of a float, rounded
    float y;
    std::memcpy(&y, &size, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
}
GEMMA4_INLINE void store_half(uint16_t* p, Vec x) { GEMMA4_LANES p[i] = float_to_half(x.v[i]); }
GEMMA4_INLINE Vec trunc(Vec x) { Vec r; GEMMA4_LANES r.v[i] = static_cast<float>(static_cast<int>(x.v[i])); return r; }  // |x| < 2^31
GEMMA4_INLINE Vec copysign(float x, Vec sign) { Vec r; GEMMA4_LANES r.v[i] = std::copysign(x, sign.v[i]); return r; }
GEMMA4_INLINE Vec round_to_even(Vec x) {  // |x| < 2^22: adding and taking away 1.5 * 2^23 rounds
  Vec r;
  GEMMA4_LANES r.v[i] = (x.v[i] + 12582912.0f) - 12582912.0f;
  return r;
}
GEMMA4_INLINE Vec scale_by_power_of_two(Vec x, Vec n) { Vec r; GEMMA4_LANES r.v[i] = std::ldexp(x.v[i], n.v[i] == n.v[i] ? (int)n.v[i] : 0); return r; }
GEMMA4_INLINE float sum_lanes(Vec x) {
  float q[2];
  for (int h = 0; h < 2; ++h) q[h] = (x.v[4 * h] + x.v[4 * h + 2]) + (x.v[4 * h + 1] + x.v[4 * h + 3]);
  return q[0] + q[1];
}
GEMMA4_INLINE void sum_lanes4(const Vec* a, float* out) { for (int i = 0; i < 4; ++i) out[i] = sum_lanes(a[i]); }
GEMMA4_INLINE Vec add_lanes(const Vec* a) { return {{sum_lanes(a[0]), sum_lanes(a[1])}}; }
GEMMA4_INLINE Vec join(const Vec* parts) { Vec r; GEMMA4_LANES r.v[i] = parts[i / kTileN].v[i % kTileN]; return r; }
GEMMA4_INLINE float max_lanes(Vec x) {
  float m = x.v[0];
  for (int i = 1; i < kWidth; ++i) m = max_of(m, x.v[i]);
  return m;
}
#undef GEMMA4_LANES

template <class T>
constexpr int kStep = kWidth;
template <class T>
struct Raw {
  Vec v;
};
template <class T>
GEMMA4_INLINE Raw<T> raw(const T* p) {
  return {load(p)};
}
template <class T>
GEMMA4_INLINE Raw<T> raw(const T* p, int n) {
  return {load(p, n)};
}
template <class T>
GEMMA4_INLINE Vec dot(Vec acc, const Raw<T>& a, const Raw<T>& b) {
  return fma(a.v, b.v, acc);
}

#endif

constexpr int kParts = kWidth / kTileN;

template <class T>
GEMMA4_INLINE Vec load_some(const T* p, int n) {
  return n == kWidth ? load(p) : load(p, n);
}
template <class T>
GEMMA4_INLINE void store_some(T* p, Vec x, int n) {
  if (n == kWidth) store(p, x);
  else store(p, x, n);
}

// e^x = 2^n (1 + r p): |r| <= ln(2) / 2, and 1 + r p is the Taylor polynomial of e^r of degree 7.
struct Exponential {
  Vec n, r, p;
};
GEMMA4_INLINE Exponential exponential(Vec x) {
  x = min(set(88.0f), max(set(-87.0f), x));  // in this order NaN stays NaN: of two operands, the second is taken then
  const Vec n = round_to_even(mul(x, set(1.44269504f)));
  Vec r = fma(n, set(-0.693145752f), x);  // ln 2 in two parts: the first has few bits, so n times it is exact
  r = fma(n, set(-1.42860677e-6f), r);
  Vec p = set(1.0f / 5040);
  p = fma(p, r, set(1.0f / 720));
  p = fma(p, r, set(1.0f / 120));
  p = fma(p, r, set(1.0f / 24));
  p = fma(p, r, set(1.0f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1.0f));
  return {n, r, p};
}

// exp(x) to 2 units in the last place.
GEMMA4_INLINE Vec exp(Vec x) {
  const Exponential e = exponential(x);
  return scale_by_power_of_two(fma(e.p, e.r, set(1.0f)), e.n);
}

// exp(x) - 1, which keeps its digits near 0: 2^n r p + (2^n - 1).
GEMMA4_INLINE Vec exp_minus_1(Vec x) {
  const Exponential e = exponential(x);
  const Vec power = scale_by_power_of_two(set(1.0f), e.n);
  return add(scale_by_power_of_two(mul(e.p, e.r), e.n), sub(power, set(1.0f)));
}

// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + e^(-2u)).
GEMMA4_INLINE Vec gelu_tanh(Vec x) {
  const Vec u2 = mul(mul(x, fma(mul(x, x), set(0.044715f), set(1.0f))), set(-1.5957691216f));
  return div(x, add(set(1.0f), exp(u2)));
}

// cap * tanh(x / cap). tanh(y) = m / (m + 2) with m = e^(2y) - 1 is accurate near 0 as well.
GEMMA4_INLINE Vec softcap(Vec x, float cap) {
  const Vec m = exp_minus_1(mul(x, set(2.0f / cap)));
  return mul(set(cap), div(m, add(m, set(2.0f))));
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
