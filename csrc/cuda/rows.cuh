// Rows of 16-bit values, eight at a time.
#pragma once

#include "cuda/device.cuh"

namespace gemma4_fast::cuda {

using device::Bytes16;

constexpr int kWarps = 8, kThreads = kWarps * device::kWarp;  // of a block, but where a file has another kBlock

// Columns [first, first + 8) of a row of `size`; zeros behind its end. kWhole: the row is 16-byte aligned, `size` a multiple of 8.
// kWeight: by load_weight.
template <class T, bool kWhole, bool kWeight = false>
DEVICE Bytes16 load_eight(const T* row, int first, int size) {
  const auto read = [](const auto* at) {
    if constexpr (kWeight) return device::load_weight(at);
    else return device::load(at);
  };
  Bytes16 v = {};
  if constexpr (kWhole) {
    if (first < size) v = read(reinterpret_cast<const Bytes16*>(row + first));
  } else {
    const auto* halves = reinterpret_cast<const uint16_t*>(row);
    UNROLL for (int i = 0; i < 8; ++i) {
      if (first + i < size) v.w[i / 2] |= uint32_t(read(halves + first + i)) << i % 2 * 16;
    }
  }
  return v;
}

template <class T, bool kWhole>
DEVICE void store_eight(T* row, int first, int size, const Bytes16& v) {
  if constexpr (kWhole) {
    if (first < size) device::store(reinterpret_cast<Bytes16*>(row + first), v);
  } else {
    auto* halves = reinterpret_cast<uint16_t*>(row);
    UNROLL for (int i = 0; i < 8; ++i) {
      if (first + i < size) device::store(halves + first + i, static_cast<uint16_t>(v.w[i / 2] >> i % 2 * 16));
    }
  }
}

template <class T>
DEVICE void to_floats(float (&f)[8], const Bytes16& v) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const float2 pair = device::unpack<T>(v.w[i]);
    f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
  }
}

template <class T>
DEVICE Bytes16 from_floats(const float (&f)[8]) {
  Bytes16 v;
  UNROLL for (int i = 0; i < 4; ++i) v.w[i] = device::pack<T>(f[2 * i], f[2 * i + 1]);
  return v;
}

DEVICE float sum_of_squares(const float (&f)[8]) {
  float sum = 0;
  UNROLL for (int i = 0; i < 8; ++i) sum += f[i] * f[i];
  return sum;
}

// ---- on the host ----

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <auto v>
struct Is {
  static constexpr auto value = v;
};

// function(T()) for the kernels' type.
template <class Function>
void by_type(Dtype dtype, Function function) {
  dtype == Dtype::bf16 ? function(device::bf16{}) : function(device::half{});
}

}  // namespace gemma4_fast::cuda
