// qkv_norm_rope: q = RoPE(rms(q) * q_weight), k = RoPE(rms(k) * k_weight), v = rms(v), and the cache write.
//
// qkv [tokens, (q_heads + n kv_heads) dim]: n = 2 packs q, k, v; n = 1 q and one projection that is K and V; kv_heads = 0: q
// alone. cos, sin [tokens, pairs]; q [tokens, q_heads, dim]; k, v the tokens' rows, or the rows `slots` of the caches: a slot
// outside of those is not written. RoPE's pairs are columns i and i + dim/2 for i < pairs; the rest stay. In fp32, rounded once.
// Source: RoFormer (Su et al. 2021), Gemma 3 and 4.
//
// A head is the work of 8, 16 or 32 lanes. A lane has eight columns of each half, and with them both of every pair. At batch 1
// the time is that of a launch and one trip to memory: nothing that is read depends on anything read.

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {
namespace {

using namespace device;

constexpr int kBlock = 128;

// Of a row of `pairs` cosines or sines, [first, first + 8); behind its end `rest`.
template <bool kWhole>
DEVICE void load_angles(float (&f)[8], const float* row, int first, int pairs, float rest) {
  if constexpr (kWhole) {
    UNROLL for (int i = 0; i < 8; i += 4) {
      Bytes16 v = {};
      if (first < pairs) v = load(reinterpret_cast<const Bytes16*>(row + first + i));
      UNROLL for (int j = 0; j < 4; ++j) f[i + j] = first < pairs ? bits_to_float(v.w[j]) : rest;
    }
  } else {
    UNROLL for (int i = 0; i < 8; ++i) f[i] = first + i < pairs ? load(row + first + i) : rest;
  }
}

template <class T, int kLanes, bool kWhole>
KERNEL(kBlock, 1) qkv_norm_rope_kernel(KERNEL_ARGS(QkvNormRope) a) {
  const int64_t token = block_index().x;
  const int head = block_index().y * (kBlock / kLanes) + thread_index() / kLanes;
  const int i = thread_index() % kLanes * 8, half = a.dim / 2;  // the lane's columns: i ... i + 7, and half + i ... half + i + 7
  const int first_v = a.q_heads + (a.k_is_v ? 0 : a.kv_heads), heads = first_v + a.kv_heads;
  const bool is_q = head < a.q_heads, is_k = !is_q && head < a.q_heads + a.kv_heads && a.k, is_v = head >= first_v && head < heads;
  const bool turned = is_q || is_k, used = turned || is_v;

  const T* weight = static_cast<const T*>(is_k ? a.k_weight : a.q_weight);
  const Bytes16 first_weight = load_eight<T, kWhole, true>(weight, i, turned ? half : 0);
  const Bytes16 second_weight = load_eight<T, kWhole, true>(weight + half, i, turned ? a.dim - half : 0);
  wait_for_inputs();
  const T* row = static_cast<const T*>(a.qkv) + (token * heads + head) * a.dim;
  float x[8], y[8], cos[8], sin[8], w[8];
  to_floats<T>(x, load_eight<T, kWhole>(row, i, used ? half : 0));
  to_floats<T>(y, load_eight<T, kWhole>(row + half, i, used ? a.dim - half : 0));
  load_angles<kWhole>(cos, a.cos + token * a.pairs, i, turned ? a.pairs : 0, 1.0f);  // columns without a pair are not turned
  load_angles<kWhole>(sin, a.sin + token * a.pairs, i, turned ? a.pairs : 0, 0.0f);
  const int64_t slot = a.slots ? load(a.slots + token) : token;
  const bool inside = slot >= 0 && slot < a.rows;

  const auto write = [&](void* out, int64_t at) {
    T* to = static_cast<T*>(out) + at * a.dim;
    store_eight<T, kWhole>(to, i, half, from_floats<T>(x));
    store_eight<T, kWhole>(to + half, i, a.dim - half, from_floats<T>(y));
  };
  const float by = reciprocal_sqrt(warp_sum<kLanes>(sum_of_squares(x) + sum_of_squares(y)) / a.dim + a.eps);
  UNROLL for (int j = 0; j < 8; ++j) x[j] *= by, y[j] *= by;
  if (is_v && inside) write(a.v, slot * a.kv_heads + head - first_v);
  if (!turned) return;
  to_floats<T>(w, first_weight);
  UNROLL for (int j = 0; j < 8; ++j) x[j] *= w[j];
  to_floats<T>(w, second_weight);
  UNROLL for (int j = 0; j < 8; ++j) {
    y[j] *= w[j];
    const float turned_x = x[j] * cos[j] - y[j] * sin[j];
    y[j] = y[j] * cos[j] + x[j] * sin[j];
    x[j] = turned_x;
  }
  if (is_q) write(a.q, token * a.q_heads + head);
  if (is_k && inside) write(a.k, slot * a.kv_heads + head - a.q_heads);
}

}  // namespace

void qkv_norm_rope(const Stream& on, const QkvNormRope& a) {
  bool whole = a.dim % 16 == 0 && a.pairs % 8 == 0;
  for (const void* p : {a.qkv, a.q_weight, a.k_weight, (const void*)a.cos, (const void*)a.sin, (const void*)a.q, (const void*)a.k,
                        (const void*)a.v})
    whole = whole && aligned(p);
  const int heads = a.q_heads + (a.k_is_v ? 1 : 2) * a.kv_heads;
  by_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto start = [&](int lanes, auto kernel, auto odd_kernel) {
      launch(on, {{(int)a.tokens, divide_up(heads, kBlock / lanes)}, kBlock}, whole ? kernel : odd_kernel, a);
    };
    if (a.dim <= 128) return start(8, qkv_norm_rope_kernel<T, 8, true>, qkv_norm_rope_kernel<T, 8, false>);
    if (a.dim <= 256) return start(16, qkv_norm_rope_kernel<T, 16, true>, qkv_norm_rope_kernel<T, 16, false>);
    start(32, qkv_norm_rope_kernel<T, 32, true>, qkv_norm_rope_kernel<T, 32, false>);
  });
}

}  // namespace gemma4_fast::cuda
