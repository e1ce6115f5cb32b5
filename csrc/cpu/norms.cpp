// rms_norm; norm_add_norm: y = (residual + rms_norm(x, weight)) * scale, z = rms_norm(y, next_weight); qkv_norm_rope.
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

template <class T>
void rms_norm_of(const RmsNorm& a) {
  parallel(a.rows, a.rows * a.hidden, [&](int64_t r) {
    rms_norm_row(static_cast<const T*>(a.x) + r * a.hidden, static_cast<const T*>(a.weight),
                 static_cast<T*>(a.out) + r * a.hidden, a.hidden, a.eps);
  });
}

template <class T>
void norm_add_norm_of(const NormAddNorm& a) {
  parallel(a.tokens, a.tokens * a.hidden, [&](int64_t t) { norm_add_norm_row(a, static_cast<const T*>(a.x) + t * a.hidden, t); });
}

// One token: every head's norm, RoPE for q and k, and each to where it belongs.
template <class T>
void qkv_norm_rope_token(const QkvNormRope& a, int64_t t) {
  const T* row = static_cast<const T*>(a.qkv) + t * (a.q_heads + a.projections * a.kv_heads) * a.dim;
  const float *cos = a.cos + t * a.pairs, *sin = a.sin + t * a.pairs;
  float wide[kMaxHeadDim];
  const auto rotated = [&](const T* from, const T* weight, T* to) {
    rms_norm_row(from, weight, wide, a.dim, a.eps);
    rotate_row(wide, cos, sin, a.dim, a.pairs);
    for_vecs(a.dim, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE { store_some(to + i, load_some(wide + i, n), n); });
  };
  for (int64_t h = 0; h < a.q_heads; ++h)
    rotated(row + h * a.dim, static_cast<const T*>(a.q_weight), static_cast<T*>(a.q) + (t * a.q_heads + h) * a.dim);
  const int64_t to = (a.slots ? a.slots[t] : t) * a.kv_heads * a.dim;
  const T* k = row + a.q_heads * a.dim;
  const T* v = k + (a.projections - 1) * a.kv_heads * a.dim;
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    if (a.k) rotated(k + h * a.dim, static_cast<const T*>(a.k_weight), static_cast<T*>(a.k) + to + h * a.dim);
    rms_norm_row(v + h * a.dim, static_cast<const T*>(nullptr), static_cast<T*>(a.v) + to + h * a.dim, a.dim, a.eps);
  }
}

template <class T>
void qkv_norm_rope_of(const QkvNormRope& a) {
  parallel(a.tokens, a.tokens * (a.q_heads + a.projections * a.kv_heads) * a.dim, [&](int64_t t) { qkv_norm_rope_token<T>(a, t); });
}

}  // namespace

void rms_norm(const RmsNorm& a) { a.dtype == Dtype::f32 ? rms_norm_of<float>(a) : rms_norm_of<bf16>(a); }
void norm_add_norm(const NormAddNorm& a) { a.dtype == Dtype::f32 ? norm_add_norm_of<float>(a) : norm_add_norm_of<bf16>(a); }
void qkv_norm_rope(const QkvNormRope& a) { a.dtype == Dtype::f32 ? qkv_norm_rope_of<float>(a) : qkv_norm_rope_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
