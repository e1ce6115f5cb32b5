// Keys of a V-only cache, K = RoPE(w * V), rebuilt where an mma takes them as its a.
//
// At position p = t + o of the tile that begins at t, q . R(p) k = (R(-t) q) . (R(o) k): q is turned back once a tile, and keys by
// their offset in it, by angles that a lane keeps. Columns that do not rotate: q . (w * v) = (q * w) . v, so that v is the key.
// Pairs (i, i + D / 2) rotate, i < 64 at most: a warp has 16 of them, 16 part + 2c + {0, 1, 8, 9} in lane 4 g + c.
#pragma once

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {

using namespace device;

// In turns, times 2^64: what is lost at position 2^18 is less than fp32 keeps of the angle.
DEVICE uint64_t turns(const float* freq, int i, int pairs) {
  if (i >= pairs) return 0;
  const double x = bits_to_float(load_weight(reinterpret_cast<const uint32_t*>(freq) + i)) * 0.15915494309189535;
  return static_cast<uint64_t>((x - static_cast<int64_t>(x)) * 18446744073709551616.0);
}

DEVICE CosSin angle_of(uint64_t turns, uint32_t position) {
  const auto part = static_cast<int32_t>((turns * position) >> 32);  // of a turn, in 2^-32, from -1/2 on
  const float x = part * 1.4629180792671596e-9f;                      // 2 pi / 2^32
  return {cos_fast(x), sin_fast(x)};
}

// A lane keeps the angles of its keys' offsets in registers, what is used once a tile in `shared`. All is there after a barrier.
template <class T>
struct RebuiltKeys {
  struct alignas(16) Columns {
    uint64_t turn[4];  // of columns 2c, 2c + 1, 2c + 8, 2c + 9
    uint32_t w[2][2];  // [lo, hi][columns 2c and 2c + 1, 2c + 8 and + 9], pairs of T
  };
  static constexpr int kBytes = 4 * 4 * sizeof(Columns);  // of each part and c
  Columns* columns;
  float cos[8], sin[8];  // [i of a][column]

  // mt: which 16 positions of the tile the warp has.
  DEVICE RebuiltKeys(char* shared, const float* freq, int pairs, const T* k_weight, int dim, int part, int mt)
      : columns(reinterpret_cast<Columns*>(shared) + 4 * part + lane_index() % 4) {
    const int g = lane_index() / 4, first = 16 * part + lane_index() % 4 * 2;
    uint64_t turn[4];
    UNROLL for (int i = 0; i < 4; ++i) turn[i] = turns(freq, first + i % 2 + i / 2 * 8, pairs);
    UNROLL for (int i = 0; i < 4; ++i) {
      UNROLL for (int j = 0; j < 2; ++j) {
        const CosSin x = angle_of(turn[i / 2 * 2 + j], 16 * mt + g + i % 2 * 8);
        cos[2 * i + j] = x.cos, sin[2 * i + j] = x.sin;
      }
      if (mt != 0 || g != 0) continue;
      columns->turn[i] = turn[i];
      const int at = first + i % 2 * 8, half = dim / 2;
      columns->w[i / 2][i % 2] = at < half ? load_weight(reinterpret_cast<const uint32_t*>(k_weight + i / 2 * half + at)) : 0;
    }
  }

  // b's of q's columns lo and hi, two of each, turned back by the position.
  DEVICE void turn_back(uint32_t (&q)[4], uint32_t position) const {
    UNROLL for (int i = 0; i < 2; ++i) {
      const float2 a = unpack<T>(q[i]), b = unpack<T>(q[2 + i]);
      const CosSin x = angle_of(columns->turn[2 * i], position), y = angle_of(columns->turn[2 * i + 1], position);
      q[i] = pack<T>(a.x * x.cos + b.x * x.sin, a.y * y.cos + b.y * y.sin);
      q[2 + i] = pack<T>(b.x * x.cos - a.x * x.sin, b.y * y.cos - a.y * y.sin);
    }
  }

  // a's of v's columns lo and hi into those of the keys.
  DEVICE void rotate(uint32_t (&lo)[4], uint32_t (&hi)[4]) const {
    UNROLL for (int i = 0; i < 4; ++i) {
      float2 a = unpack<T>(lo[i]), b = unpack<T>(hi[i]);
      const float2 u = unpack<T>(columns->w[0][i / 2]), v = unpack<T>(columns->w[1][i / 2]);
      a = {a.x * u.x, a.y * u.y}, b = {b.x * v.x, b.y * v.y};
      lo[i] = pack<T>(a.x * cos[2 * i] - b.x * sin[2 * i], a.y * cos[2 * i + 1] - b.y * sin[2 * i + 1]);
      hi[i] = pack<T>(b.x * cos[2 * i] + a.x * sin[2 * i], b.y * cos[2 * i + 1] + a.y * sin[2 * i + 1]);
    }
  }
};

// Of a cache that has its keys.
struct StoredKeys {
  static constexpr int kBytes = 0;
  template <class... Args>
  DEVICE StoredKeys(const Args&...) {}
};

}  // namespace gemma4_fast::cuda
