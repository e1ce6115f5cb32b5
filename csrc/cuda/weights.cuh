// A tile of weight rows times a few rows of x, as a stream of 16-byte loads that go into tensor cores as they come.
//
// mma's A is the weights, 16 rows, and its B up to eight rows of x (tokens): one product does for 1 to 8 tokens, whose results
// depend on nothing but themselves. The order of columns within a product is free, if A and B agree on it: lane 4 g + c takes
// columns [8 c, 8 c + 8) of 32 consecutive ones, 16 bytes of a row, of both.
//   floats     a tile has 16 rows: lane 4 g + c loads of rows g and g + 8.
//   quantized  a tile has 32 rows, two panels of gemma4_fast.quant: lane 4 g + c loads, for each word of columns, those of the
//              rows 4 g ... 4 g + 3, which lie together; they are rows g and g + 8 of two products. Values go into the product as
//              the integers that they are, exact in bf16 and fp16; the scale of 32 columns is a factor of their sums.
// A lane keeps `kDepth` steps of 32 columns on their way: as one is used, the one `kDepth` further on is asked for.
#pragma once

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {

using device::Bytes8;

constexpr int kStep = 32;  // columns
template <int kBits>
constexpr int kTileRows = kBits ? 32 : 16;
inline int rows_of_tile(int bits) { return bits ? kTileRows<8> : kTileRows<0>; }
template <int kBits>
constexpr int kProducts = kTileRows<kBits> / 16;  // of 16 rows each
template <int kBits>
constexpr int kDepth = kBits == 4 ? 5 : kBits == 8 ? 3 : 4;

// A lane's share of a step, as loaded.
template <int kBits>
struct Words;
template <>
struct Words<0> {
  Bytes16 row[2];
};
template <>
struct Words<8> {
  Bytes16 word[2];  // columns 0 ... 3 and 4 ... 7 of four rows
  Bytes8 scale;
};
template <>
struct Words<4> {
  Bytes16 word[1];
  Bytes8 scale;
};

// A lane's rows of a tile of [.., columns]. Rows that there are not: null, and zeros.
template <class T, int kBits, bool kWhole>
struct WeightRows {
  const T* row[2];
  int columns;

  // Of a tile whose rows 0 ... 7 are `low`, low + 1 ... of a matrix [.., columns], and rows 8 ... 15 `high`, ... below `end`s.
  DEVICE static WeightRows at(const T* matrix, int64_t low, int64_t low_end, int64_t high, int64_t high_end, int columns) {
    const int g = device::lane_index() / 4;
    return {{low + g < low_end ? matrix + (low + g) * columns : nullptr, high + g < high_end ? matrix + (high + g) * columns : nullptr},
            columns};
  }
  DEVICE Words<0> load(int step) const {
    const int first = step * kStep + device::lane_index() % 4 * 8;
    Words<0> w = {};
    UNROLL for (int i = 0; i < 2; ++i) {
      if (row[i]) w.row[i] = load_eight<T, kWhole, true>(row[i], first, columns);
    }
    return w;
  }
};

template <int kBits>
struct QuantizedRows {
  const Bytes16* words;   // of the lane's four rows: word w lies 4 w further on
  const Bytes8* scales;   // group g lies 4 g further on

  // Of a tile whose rows 0 ... 15 are panel `low`, and rows 16 ... 31 panel `high`, of those below `panels`.
  DEVICE static QuantizedRows at(const void* data, const void* scale, int64_t low, int64_t high, int64_t panels, int groups) {
    const int g = device::lane_index() / 4;
    const int64_t panel = g < 4 ? low : high;
    if (panel >= panels) return {nullptr, nullptr};
    return {static_cast<const Bytes16*>(data) + panel * groups * kBits * 4 + g % 4,
            static_cast<const Bytes8*>(scale) + panel * groups * 4 + g % 4};
  }
  DEVICE Words<kBits> load(int step) const {
    constexpr int per_lane = kBits / 4;
    Words<kBits> w = {};
    if (!words) return w;
    const int c = device::lane_index() % 4;
    UNROLL for (int i = 0; i < per_lane; ++i) w.word[i] = device::load_weight(words + 4 * (step * kBits + c * per_lane + i));
    w.scale = device::load_weight(scales + 4 * step);
    return w;
  }
};

template <class T>
constexpr bool kIsBf16 = sizeof(T) == 0;
template <>
constexpr bool kIsBf16<device::bf16> = true;
template <>
constexpr bool kIsBf16<device::half> = false;

// Bytes `low` and `high` of a word of four values q + 128 -> the pair q, q. fp16 has 10 bits behind its leading one: 0x6400 + u is
// 1024 + u. bf16 has 7: 0x4300 + u is 128 + u for u < 128, the eighth bit is taken off with the offset.
template <class T>
DEVICE uint32_t bytes_to_pair(uint32_t word, uint32_t selector) {
  if constexpr (kIsBf16<T>) {
    const uint32_t p = device::choose_bytes(word, 0x43434343u, selector);
    return device::subtract<T>(p & 0xff7fff7fu, (p ^ 0x00800080u) & 0xff80ff80u);
  } else {
    return device::subtract<T>(device::choose_bytes(word, 0x64646464u, selector), 0x64806480u);
  }
}

// Four bits of each half of `word`, values q + 8 -> the pair q, q.
template <class T>
DEVICE uint32_t nibbles_to_pair(uint32_t word) {
  constexpr uint32_t magic = kIsBf16<T> ? 0x43004300u : 0x64006400u, offset = kIsBf16<T> ? 0x43084308u : 0x64086408u;
  return device::subtract<T>((word & 0x000f000fu) | magic, offset);
}

// sums[p][n] += the tile's products p with tokens 8 n ... 8 n + 7, over one step.
template <class T, int kTokenTiles>
DEVICE void multiply(float (&sums)[1][kTokenTiles][4], const Words<0>& w, const Bytes16 (&x)[kTokenTiles]) {
  UNROLL for (int j = 0; j < 2; ++j) {
    const uint32_t a[4] = {w.row[0].w[2 * j], w.row[1].w[2 * j], w.row[0].w[2 * j + 1], w.row[1].w[2 * j + 1]};
    UNROLL for (int n = 0; n < kTokenTiles; ++n) device::mma<T>(sums[0][n], a, x[n].w[2 * j], x[n].w[2 * j + 1]);
  }
}

template <class T, int kBits, int kTokenTiles>
DEVICE void multiply(float (&sums)[2][kTokenTiles][4], const Words<kBits>& w, const Bytes16 (&given)[kTokenTiles]) {
  Bytes16 x[kTokenTiles];
  UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    x[n] = given[n];
    if constexpr (kBits == 4) {  // in the order that the pairs of a word come in: columns 0 2, 1 3, 4 6, 5 7
      UNROLL for (int i = 0; i < 4; ++i)
        x[n].w[i] = device::choose_bytes(given[n].w[i / 2 * 2], given[n].w[i / 2 * 2 + 1], i % 2 ? 0x7632 : 0x5410);
    }
  }
  UNROLL for (int p = 0; p < 2; ++p) {
    float part[kTokenTiles][4] = {};
    UNROLL for (int j = 0; j < 2; ++j) {
      uint32_t a[4];
      UNROLL for (int r = 0; r < 2; ++r) {  // rows g and g + 8 of this product
        if constexpr (kBits == 8) {
          const uint32_t word = w.word[j].w[2 * p + r];
          a[r] = bytes_to_pair<T>(word, 0x4140), a[r + 2] = bytes_to_pair<T>(word, 0x4342);
        } else {
          const uint32_t word = w.word[0].w[2 * p + r] >> 4 * j;
          a[r] = nibbles_to_pair<T>(word), a[r + 2] = nibbles_to_pair<T>(word >> 8);
        }
      }
      UNROLL for (int n = 0; n < kTokenTiles; ++n) device::mma<T>(part[n], a, x[n].w[2 * j], x[n].w[2 * j + 1]);
    }
    const float2 scale = device::unpack<device::half>(w.scale.w[p]);
    UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      UNROLL for (int i = 0; i < 4; ++i)
        sums[p][n][i] = device::fused_multiply_add(i < 2 ? scale.x : scale.y, part[n][i], sums[p][n][i]);
    }
  }
}

// Where in the tile the lane's sum [p][n][i] belongs: row, and token.
template <int kBits>
DEVICE int tile_row(int p, int i) {
  const int g = device::lane_index() / 4;
  return kBits ? 4 * g + 2 * p + i / 2 : g + i / 2 * 8;
}
DEVICE int tile_token(int n, int i) { return 8 * n + device::lane_index() % 4 * 2 + i % 2; }

// The sums of a warp's tile over steps [begin, end). `ready`, called when the first weights are on their way, gives the lane's
// rows of x, of `columns` each: T const* [kTokenTiles], null for zeros.
template <class T, int kBits, int kTokenTiles, bool kWhole, class Rows, class Ready>
DEVICE void stream_tile(float (&sums)[kProducts<kBits>][kTokenTiles][4], const Rows& rows, int columns, int begin, int end,
                        const Ready& ready) {
  Words<kBits> ring[kDepth<kBits>];
  UNROLL for (int i = 0; i < kDepth<kBits>; ++i) {
    if (begin + i < end) ring[i] = rows.load(begin + i);
  }
  const T* x_rows[kTokenTiles];
  ready(x_rows);
  for (int step = begin; step < end; step += kDepth<kBits>) {
    UNROLL for (int i = 0; i < kDepth<kBits>; ++i) {
      if (step + i < end) {
        const int first = (step + i) * kStep + device::lane_index() % 4 * 8;
        Bytes16 x[kTokenTiles];
        UNROLL for (int n = 0; n < kTokenTiles; ++n) {
          x[n] = {};
          if (x_rows[n]) x[n] = load_eight<T, kWhole>(x_rows[n], first, columns);
        }
        multiply<T>(sums, ring[i], x);
      }
      if (step + i + kDepth<kBits> < end) ring[i] = rows.load(step + i + kDepth<kBits>);
    }
  }
}

}  // namespace gemma4_fast::cuda
