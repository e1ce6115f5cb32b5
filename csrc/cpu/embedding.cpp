// embedding: rows of a table, of floats or of 8 or 4 bits, times a number. A token is a task.
#include "cpu/parallel.h"
#include "cpu/quantized.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

template <class T>
void embedding_of(const Embedding& a) {
  const Vec by = set(a.by);
  parallel(a.tokens, a.tokens * a.hidden, [&](int64_t t) {
    const T* from = static_cast<const T*>(a.weight) + a.ids[t] * a.hidden;
    T* to = static_cast<T*>(a.out) + t * a.hidden;
    for_vecs(a.hidden, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE { store_some(to + i, mul(load_some(from + i, n), by), n); });
  });
}

// Of the 64 bytes that hold a quad of columns of 16 rows, four are this row's: see quantized.h.
template <class T, int Bits>
void quantized_embedding_of(const Embedding& a) {
  parallel(a.tokens, a.tokens * a.hidden * 16, [&](int64_t t) {
    const int64_t panel = a.ids[t] / kPanel, lane = a.ids[t] % kPanel;
    const uint8_t* from = static_cast<const uint8_t*>(a.weight) + panel * a.q.groups * group_bytes(Bits) + lane * 4;
    const uint16_t* scale = a.q.scale + panel * a.q.groups * kPanel + lane;
    T* to = static_cast<T*>(a.out) + t * a.hidden;
    for (int64_t begin = 0; begin < a.hidden; begin += kGroup, scale += kPanel) {
      float wide[kGroup];
      for (int j = 0; j < Bits; ++j, from += 64)
        for (int c = 0; c < 4; ++c) {
          if (Bits == 8) wide[4 * j + c] = static_cast<float>(from[c] - 128);
          else wide[8 * j + c] = static_cast<float>((from[c] & 15) - 8), wide[8 * j + 4 + c] = static_cast<float>((from[c] >> 4) - 8);
        }
      const Vec by = set(half_to_float(*scale) * a.by);
      for_vecs(min_of<int64_t>(kGroup, a.hidden - begin), [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
        store_some(to + begin + i, mul(load_some(wide + i, n), by), n);
      });
    }
  });
}

}  // namespace

void embedding(const Embedding& a) {
  if (a.q.scale == nullptr) return a.dtype == Dtype::f32 ? embedding_of<float>(a) : embedding_of<bf16>(a);
  if (a.q.bits == 8) return a.dtype == Dtype::f32 ? quantized_embedding_of<float, 8>(a) : quantized_embedding_of<bf16, 8>(a);
  return a.dtype == Dtype::f32 ? quantized_embedding_of<float, 4>(a) : quantized_embedding_of<bf16, 4>(a);
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
