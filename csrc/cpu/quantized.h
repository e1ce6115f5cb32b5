// Products with weights of 8 or 4 bits. What is stored is defined in gemma4_fast/quant.py: panels of 16 rows, and in a panel,
// group of 32 columns by group of 32 columns, quads of columns interleaved by row, so that one 64-byte load holds four
// consecutive columns of each of the 16 rows:
//
//   8 bits   8 loads a group    load j: columns 4 j .. 4 j + 3, the value + 128 in each byte
//   4 bits   4 loads a group    load j: columns 8 j .. 8 j + 3 in the low nibbles, the next four in the high ones, value + 8
//   scales   16 fp16 a group
//
// x is rounded to 8 bits as it comes, with a scale for each group of 32 (GGUF's Q8_0, but the scale stays fp32). Weights are
// unsigned and x is signed, as vpdpbusd wants them; the sum of a group starts at -128 or -8 times the sum of its x, which takes
// the offset out again. Integer sums are exact, so the bits of an output depend on its row of x and of w alone.
//
// Instructions for a group of 16 rows and one row of x: 8 loads, 8 vpdpbusd (x from memory, broadcast), 4 to scale and add.
#pragma once

#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

constexpr int kGroup = 32, kPanel = 16;

// A group of a row of x.
struct Rounded {
  int8_t q[kGroup];
  float scale;
  int32_t start;  // -offset * sum of q; offset: what a weight's stored value is above its true one
};
static_assert(sizeof(Rounded) == kRoundedGroup, "allocated in gemma4_fast/ops/cpu_backend.py");

GEMMA4_INLINE void round_group(const float* x, int offset, Rounded& to) {
  Vec largest = set(0.0f), poison = set(0.0f), sum = set(0.0f);
  for (int i = 0; i < kGroup; i += kWidth) {
    const Vec v = load(x + i);
    largest = max(largest, max(v, sub(set(0.0f), v)));
    poison = fma(v, set(0.0f), poison);  // NaN if one of x is not finite: so are the products then
  }
  const float m = max_lanes(largest);
  const Vec factor = set(m > 1e-30f ? 127.0f / m : 0.0f);
  for (int i = 0; i < kGroup; i += kWidth) {
    const Vec r = round_to_even(mul(load(x + i), factor));
    store_int8(to.q + i, r);
    sum = add(sum, r);
  }
  to.scale = m > 1e-30f ? m / 127.0f : 0.0f;
  to.scale += sum_lanes(poison);
  const float total = sum_lanes(sum);
  to.start = total == total ? -offset * static_cast<int32_t>(total) : 0;
}

// A row x [k], the last group filled up with zeros.
template <class T>
void round_row(const T* x, int64_t k, int offset, Rounded* to) {
  for (int64_t begin = 0; begin < k; begin += kGroup) {
    float wide[kGroup] = {};
    for_vecs(min_of<int64_t>(kGroup, k - begin),
             [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE { store_some(wide + i, load_some(x + begin + i, n), n); });
    round_group(wide, offset, to[begin / kGroup]);
  }
}

constexpr int offset_of(int bits) { return bits == 8 ? 128 : 8; }
constexpr int64_t group_bytes(int bits) { return kGroup * kPanel * bits / 8; }
constexpr int64_t kStreamAhead = 8192;  // bytes that a stream of panels is asked for before it is read

GEMMA4_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// What a tile asks of memory while it multiplies, group by group.
struct Asked {
  const uint8_t* next;   // null: nothing
  int64_t turn;          // from this group on
  const uint8_t* after;  // from here
  bool near;             // into L1: it is read soon. Else into L2
};

template <int Bits>
GEMMA4_INLINE void ask(Asked& asked, int64_t group, const uint16_t* scale) {
  if (!asked.next) return;
  if (group == asked.turn) asked.next = asked.after;
  if (asked.near) {
    for (int64_t byte = 0; byte < group_bytes(Bits); byte += 64) prefetch_near(asked.next + byte);
    prefetch_near(scale + kStreamAhead / group_bytes(Bits) * kPanel);
  } else {
    for (int64_t byte = 0; byte < group_bytes(Bits); byte += 64) prefetch(asked.next + byte);
  }
  asked.next += group_bytes(Bits);
}

// y[r] [16] = the products of rows x[r] [groups] and of one panel.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int kTokens = 8;  // rows of x that one tile takes: 8 registers of weights, 8 of sums

template <int Bits, int M>
__attribute__((noinline)) void panel_tile(const Rounded* const* x, const uint8_t* w, const uint16_t* scale, int64_t groups,
                                          Asked asked, float* y) {
  __m512 sum[M];
  for (int r = 0; r < M; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i q[8];
    if constexpr (Bits == 8) {
      for (int j = 0; j < 8; ++j) q[j] = _mm512_loadu_si512(w + j * 64);
    } else {
      const __m512i low = _mm512_set1_epi8(15);
      for (int j = 0; j < 4; ++j) {
        const __m512i both = _mm512_loadu_si512(w + j * 64);
        q[2 * j] = _mm512_and_si512(both, low);
        q[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      }
    }
    ask<Bits>(asked, g, scale);
    const __m512 s = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale)));
    for (int r = 0; r < M; ++r) {
      const Rounded& a = x[r][g];
      __m512i dot = _mm512_set1_epi32(a.start);
      for (int j = 0; j < 8; ++j) {
        int32_t quad;
        std::memcpy(&quad, a.q + 4 * j, 4);
        dot = _mm512_dpbusd_epi32(dot, q[j], _mm512_set1_epi32(quad));
      }
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(s, _mm512_set1_ps(a.scale)), sum[r]);
    }
    w += group_bytes(Bits), scale += kPanel;
  }
  for (int r = 0; r < M; ++r) _mm512_storeu_ps(y + r * kPanel, sum[r]);
}

#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kTokens = 2;

// vpmaddubsw adds pairs into 16 bits. 8-bit weights: |w| times x with w's sign, at most 2 * 128 * 127, taken to 32 bits at once.
// 4-bit: 8 pairs of at most 2 * 15 * 127 fit.
template <int Bits, int M>
__attribute__((noinline)) void panel_tile(const Rounded* const* x, const uint8_t* w, const uint16_t* scale, int64_t groups,
                                          Asked asked, float* y) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sum[M][2];
  for (int r = 0; r < M; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    ask<Bits>(asked, g, scale);
    for (int half = 0; half < 2; ++half) {  // of the 16 rows
      __m256i dot[M], pairs[M];
      for (int r = 0; r < M; ++r) {
        dot[r] = Bits == 8 ? _mm256_setzero_si256() : _mm256_set1_epi32(x[r][g].start);
        pairs[r] = _mm256_setzero_si256();
      }
      for (int j = 0; j < 8; ++j) {
        const uint8_t* from = w + (Bits == 8 ? j : j / 2) * 64 + half * 32;
        __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        if constexpr (Bits == 8) q = _mm256_xor_si256(q, _mm256_set1_epi8(-128));  // signed again
        else q = _mm256_and_si256(j % 2 ? _mm256_srli_epi16(q, 4) : q, _mm256_set1_epi8(15));
        for (int r = 0; r < M; ++r) {
          int32_t quad;
          std::memcpy(&quad, x[r][g].q + 4 * j, 4);
          const __m256i a = _mm256_set1_epi32(quad);
          if constexpr (Bits == 8)
            dot[r] = _mm256_add_epi32(
                dot[r], _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q)), ones));
          else
            pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(q, a));
        }
      }
      const __m256 s = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + half * 8)));
      for (int r = 0; r < M; ++r) {
        if constexpr (Bits == 4) dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs[r], ones));
        const __m256 by = _mm256_mul_ps(s, _mm256_set1_ps(x[r][g].scale));
        sum[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]), by, sum[r][half]);
      }
    }
    w += group_bytes(Bits), scale += kPanel;
  }
  for (int r = 0; r < M; ++r)
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(y + r * kPanel + half * 8, sum[r][half]);
}

#else
constexpr int kTokens = 2;

template <int Bits, int M>
__attribute__((noinline)) void panel_tile(const Rounded* const* x, const uint8_t* w, const uint16_t* scale, int64_t groups,
                                          Asked, float* y) {
  for (int i = 0; i < M * kPanel; ++i) y[i] = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    for (int r = 0; r < M; ++r) {
      int32_t dot[kPanel];
      for (int n = 0; n < kPanel; ++n) dot[n] = x[r][g].start;
      for (int j = 0; j < 8; ++j)
        for (int n = 0; n < kPanel; ++n)
          for (int c = 0; c < 4; ++c) {
            const uint8_t byte = w[(Bits == 8 ? j : j / 2) * 64 + n * 4 + c];
            dot[n] += (Bits == 8 ? byte : j % 2 ? byte >> 4 : byte & 15) * x[r][g].q[4 * j + c];
          }
      for (int n = 0; n < kPanel; ++n)
        y[r * kPanel + n] += static_cast<float>(dot[n]) * (half_to_float(scale[n]) * x[r][g].scale);
    }
    w += group_bytes(Bits), scale += kPanel;
  }
}
#endif

template <int Bits>
GEMMA4_INLINE void panel_tile_of(int m, const Rounded* const* x, const uint8_t* w, const uint16_t* scale, int64_t groups,
                                 const Asked& asked, float* y) {
  switch (m) {
    case 1: return panel_tile<Bits, 1>(x, w, scale, groups, asked, y);
    case 2: return panel_tile<Bits, 2>(x, w, scale, groups, asked, y);
    case 3: if constexpr (kTokens > 2) return panel_tile<Bits, 3>(x, w, scale, groups, asked, y); break;
    case 4: if constexpr (kTokens > 2) return panel_tile<Bits, 4>(x, w, scale, groups, asked, y); break;
    case 5: if constexpr (kTokens > 2) return panel_tile<Bits, 5>(x, w, scale, groups, asked, y); break;
    case 6: if constexpr (kTokens > 2) return panel_tile<Bits, 6>(x, w, scale, groups, asked, y); break;
    case 7: if constexpr (kTokens > 2) return panel_tile<Bits, 7>(x, w, scale, groups, asked, y); break;
    case 8: if constexpr (kTokens > 2) return panel_tile<Bits, 8>(x, w, scale, groups, asked, y); break;
  }
}

// Panels of one matrix [n, k], from its first one.
template <int Bits>
struct Panels {
  const uint8_t* data;
  const uint16_t* scale;
  int64_t groups;

  int64_t bytes() const { return groups * group_bytes(Bits); }  // of one panel
  Panels from(int64_t panel) const { return {data + panel * bytes(), scale + panel * groups * kPanel, groups}; }
};

template <int Bits>
GEMMA4_INLINE Panels<Bits> panels_of(const void* data, const Quantized& q) {
  return {static_cast<const uint8_t*>(data), q.scale, q.groups};
}

// What to ask for during tile t of `tiles` of a panel that `next` follows in the task. Panels that have one tile alone pass by
// as one stream; of others the first tile asks for the whole next panel.
template <int Bits>
GEMMA4_INLINE Asked asked_of(const Panels<Bits>& own, const uint8_t* next, int64_t t, int64_t tiles) {
  if (t > 0) return {nullptr, 0, nullptr, false};
  if (tiles > 1) return {next, -1, nullptr, false};
  const int64_t left = max_of<int64_t>(0, own.bytes() - kStreamAhead), turn = left / group_bytes(Bits);
  return {own.data + kStreamAhead, turn, next + (turn * group_bytes(Bits) + kStreamAhead - own.bytes()), true};
}

constexpr int64_t kRoundedBlock = 64;  // rows of x that stay in L2 while a task's panels pass by

// Rows x_row(0 .. m) times `panels` panels of w. emit(i, mm, p, y): rows i .. i + mm of x, panel p, y[mm * 16].
// after: the panel that a task reads next.
template <int Bits, class XRow, class Emit>
GEMMA4_INLINE void panel_product(int64_t m, int64_t panels, const Panels<Bits>& w, const uint8_t* after, XRow x_row, Emit emit) {
  const Rounded* x[kTokens];
  float y[kTokens * kPanel];
  for (int64_t block = 0; block < m; block += kRoundedBlock) {
    const int64_t rows = min_of(kRoundedBlock, m - block), tiles = (rows + kTokens - 1) / kTokens;
    for (int64_t p = 0; p < panels; ++p) {
      const Panels<Bits> own = w.from(p);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = block + rows * t / tiles;
        const int mm = static_cast<int>(block + rows * (t + 1) / tiles - i);
        for (int r = 0; r < mm; ++r) x[r] = x_row(i + r);
        const Asked asked = asked_of<Bits>(own, p + 1 < panels ? own.data + own.bytes() : after, block + t, tiles);
        panel_tile_of<Bits>(mm, x, own.data, own.scale, w.groups, asked, y);
        emit(i, mm, p, y);
      }
    }
  }
}

// The GeGLU of columns [32 first, 32 last) of gate and up, rounded again: group g of row i of h is h_row(i)[g].
// after_gate, after_up: the panels that a task reads next.
template <int Bits, class XRow, class HRow>
GEMMA4_INLINE void geglu_panels(int64_t m, int64_t first, int64_t last, int64_t panels, const Panels<Bits>& gate,
                                const Panels<Bits>& up, const uint8_t* after_gate, const uint8_t* after_up, int down_offset,
                                XRow x_row, HRow h_row) {
  const Rounded* x[kTokens];
  float g[kTokens * kPanel], u[kTokens * kPanel], h[kTokens][kGroup];
  for (int64_t block = 0; block < m; block += kRoundedBlock) {
    const int64_t rows = min_of(kRoundedBlock, m - block), tiles = (rows + kTokens - 1) / kTokens;
    for (int64_t group = first; group < last; ++group)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = block + rows * t / tiles;
        const int mm = static_cast<int>(block + rows * (t + 1) / tiles - i);
        for (int r = 0; r < mm; ++r) x[r] = x_row(i + r);
        for (int half = 0; half < 2; ++half) {
          const int64_t p = 2 * group + half;
          if (p >= panels) {
            for (int r = 0; r < mm; ++r)
              for (int c = 0; c < kPanel; ++c) h[r][kPanel + c] = 0.0f;
            break;
          }
          const Panels<Bits> a = gate.from(p), b = up.from(p);
          const bool more = p + 1 < min_of(2 * last, panels);
          // Which is read next: with one tile a panel, up after gate.
          const uint8_t* next_gate = more ? a.data + a.bytes() : after_gate;
          const uint8_t* next_up = more ? b.data + b.bytes() : after_up;
          const Asked for_gate = asked_of<Bits>(a, tiles > 1 ? next_gate : b.data, block + t, tiles);
          const Asked for_up = asked_of<Bits>(b, tiles > 1 ? next_up : next_gate, block + t, tiles);
          panel_tile_of<Bits>(mm, x, a.data, a.scale, a.groups, for_gate, g);
          panel_tile_of<Bits>(mm, x, b.data, b.scale, b.groups, for_up, u);
          for (int r = 0; r < mm; ++r)
            for (int c = 0; c < kPanel; c += kWidth)
              store(h[r] + half * kPanel + c, mul(gelu_tanh(load(g + r * kPanel + c)), load(u + r * kPanel + c)));
        }
        for (int r = 0; r < mm; ++r) round_group(h[r], down_offset, h_row(i + r)[group]);
      }
  }
}

template <class T>
GEMMA4_INLINE void store_panel_row(T* to, const float* y, int64_t n) {  // of a panel whose last rows may be padding
  for_vecs(min_of<int64_t>(n, kPanel), [&](int64_t c, int count) GEMMA4_LAMBDA_INLINE {
    store_some(to + c, load_some(y + c, count), count);
  });
}

// Panels that one task takes: as rows_per_task.
inline int64_t panels_per_task(int64_t m, int64_t panels, int64_t panel_bytes) {
  return rows_per_task(m, panels, panel_bytes, 1);
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
