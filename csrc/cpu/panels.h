// Panels of a quantized weight, as the kernels walk and dequantize them that fill a weight, read it back, or multiply by its
// widened values. The layout: quantized.h.
#pragma once

#include "cpu/quantized.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

// Groups that are dequantized together, so that a row's bytes are read as vectors long after they were
// written one by one. A load that needs the bytes of several recent stores has to wait until these have
// reached the cache. One group at a time was up to 10 times slower while the host was busy.
constexpr int64_t kTogether = 8;

// Calls take(panel, lane, row, rows) for each panel that holds some of the rows [first, end) of a weight [n, k] in parts:
// `rows` of them, from `row` on, lie in the panel's lanes from `lane` on.
template <class Take>
void for_panels(int64_t first, int64_t end, int64_t n, int64_t parts, int64_t k, Take take) {
  // Parts are filled up to whole panels, so stored rows, and their panels, come in the order of rows.
  const int64_t per_part = n / parts, part_panels = (per_part + kPanel - 1) / kPanel;
  const auto panel_of = [=](int64_t row) { return row / per_part * part_panels + row % per_part / kPanel; };
  const int64_t begin = panel_of(first), panels = panel_of(end - 1) + 1 - begin;
  parallel(panels, (end - first) * k, [&](int64_t task) {
    const int64_t panel = begin + task, part = panel / part_panels;
    const int64_t start = part * per_part + panel % part_panels * kPanel;  // the row in lane 0
    const int64_t from = max_of(start, first);
    const int64_t to = min_of(min_of(start + kPanel, (part + 1) * per_part), end);
    take(panel, from - start, from, to - from);
  });
}

// The first k columns of rows `lane` .. `lane + rows` of a panel to out [rows, k], whose rows are `stride` apart.
template <int Bits, class T>
void dequantize_panel(const uint8_t* data, const uint16_t* scale, int64_t k, int64_t lane, int64_t rows, T* out, int64_t stride) {
  constexpr int64_t kQuads = kGroup / 4;
  for (int64_t begin = 0; begin < k; begin += kTogether * kGroup) {
    const int64_t columns = min_of<int64_t>(kTogether * kGroup, k - begin);
    const int64_t groups = (columns + kGroup - 1) / kGroup;
    uint32_t quads[kPanel][kTogether * kQuads];  // of each row, its columns in order
    for (int64_t j = 0; j < groups * Bits; ++j) {
      uint32_t stored[kPanel];
      std::memcpy(stored, data + j * 64, 64);
      for (int r = 0; r < kPanel; ++r) {
        if (Bits == 8) {
          quads[r][j] = stored[r];
        } else {
          quads[r][2 * j] = stored[r] & 0x0f0f0f0fu;
          quads[r][2 * j + 1] = stored[r] >> 4 & 0x0f0f0f0fu;
        }
      }
    }
    for (int64_t r = lane; r < lane + rows; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t q[kGroup];
        std::memcpy(q, quads[r] + g * kQuads, kGroup);
        float value[kGroup];
        for (int i = 0; i < kGroup; ++i) value[i] = static_cast<float>(static_cast<int>(q[i]) - offset_of(Bits));
        const Vec by = set(half_to_float(scale[g * kPanel + r]));
        T* to = out + (r - lane) * stride + begin + g * kGroup;
        const int64_t count = min_of<int64_t>(kGroup, columns - g * kGroup);
        if (count == kGroup) {
          for (int i = 0; i < kGroup; i += kWidth) store(to + i, mul(load(value + i), by));
        } else {
          for_vecs(count, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
            store_some(to + i, mul(load_some(value + i, n), by), n);
          });
        }
      }
    }
    data += groups * group_bytes(Bits);
    scale += groups * kPanel;
  }
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
