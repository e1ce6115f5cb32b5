// route_topk: logits = (rms(x) * scale * H^-0.5) proj^T in fp32, softmax over all experts, the top K (of equals the lower id),
// renormalised to 1, times per_expert_scale.
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

// out[t] = x[t] . w for M rows of fp32 x, w in T: one load of w serves all rows.
template <class T, int M>
GEMMA4_INLINE void wide_dots(const float* x, int64_t x_stride, const T* w, int64_t size, float* out, int64_t out_stride) {
  Vec acc[M][2];
  for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = set(0.0f);
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth)
    for (int u = 0; u < 2; ++u) {
      const Vec b = load(w + i + u * kWidth);
      for (int r = 0; r < M; ++r) acc[r][u] = fma(load(x + r * x_stride + i + u * kWidth), b, acc[r][u]);
    }
  for_vecs(size - i, [&](int64_t j, int n) GEMMA4_LAMBDA_INLINE {
    const Vec b = load_some(w + i + j, n);
    for (int r = 0; r < M; ++r) acc[r][0] = fma(load_some(x + r * x_stride + i + j, n), b, acc[r][0]);
  });
  for (int r = 0; r < M; ++r) out[r * out_stride] = sum_lanes(add(acc[r][0], acc[r][1]));
}

// The lowest id that is not among ids [count].
int64_t first_left(const int32_t* ids, int64_t count) {
  for (int64_t e = 0;; ++e) {
    bool taken = false;
    for (int64_t i = 0; i < count; ++i) taken |= ids[i] == e;
    if (!taken) return e;
  }
}

// The K largest logits, of equals the one of the lower id; then their probabilities, from e^(logit - largest).
template <class T>
void choose(const RouteTopk& a, int64_t t) {
  float* logits = a.logits + t * a.experts;  // a chosen one becomes NaN
  float largest = logits[0], total = 0.0f, e_to[kWidth];
  for (int64_t e = 1; e < a.experts; ++e) largest = max_of(largest, logits[e]);
  for_vecs(a.experts, [&](int64_t e, int n) GEMMA4_LAMBDA_INLINE {
    store(e_to, exp(sub(load_some(logits + e, n), set(largest))));
    for (int i = 0; i < n; ++i) total += e_to[i];
  });
  float kept = 0.0f;
  float* weights = a.weights + t * a.top_k;
  int32_t* ids = a.ids + t * a.top_k;
  for (int64_t k = 0; k < a.top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < a.experts; ++e)
      if (logits[e] == logits[e] && (best < 0 || logits[e] > logits[best])) best = e;
    if (best < 0) best = first_left(ids, k);  // the router's logits have NaN in them, and so has `total`
    store(e_to, exp(set(logits[best] - largest)));
    weights[k] = e_to[0] / total, ids[k] = static_cast<int32_t>(best);
    kept += weights[k];
    logits[best] = NAN;
  }
  for (int64_t k = 0; k < a.top_k; ++k)
    weights[k] = weights[k] / kept * to_float(static_cast<const T*>(a.per_expert_scale)[ids[k]]);
}

template <class T>
void route_topk_of(const RouteTopk& a) {
  const T *x = static_cast<const T*>(a.x), *scale = static_cast<const T*>(a.scale), *proj = static_cast<const T*>(a.proj);
  const float root = 1.0f / std::sqrt(static_cast<float>(a.hidden));
  constexpr int kTokens = 4, kExperts = 8;
  Phase norm(a.tokens, [=](int64_t t) {
    float* h = a.normed + t * a.hidden;
    rms_norm_row(x + t * a.hidden, static_cast<const T*>(nullptr), h, a.hidden, a.eps);
    for_vecs(a.hidden, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
      store_some(h + i, mul(mul(load_some(h + i, n), load_some(scale + i, n)), set(root)), n);
    });
  });
  const int64_t expert_tasks = (a.experts + kExperts - 1) / kExperts;
  Phase dots((a.tokens + kTokens - 1) / kTokens * expert_tasks, [=](int64_t task) {
    const int64_t t = task / expert_tasks * kTokens, last = min_of((task % expert_tasks + 1) * kExperts, a.experts);
    for (int64_t e = task % expert_tasks * kExperts; e < last; ++e) {
      const float* h = a.normed + t * a.hidden;
      float* out = a.logits + t * a.experts + e;
      if (a.tokens - t >= kTokens) wide_dots<T, kTokens>(h, a.hidden, proj + e * a.hidden, a.hidden, out, a.experts);
      else
        for (int64_t r = 0; r < a.tokens - t; ++r)
          wide_dots<T, 1>(h + r * a.hidden, a.hidden, proj + e * a.hidden, a.hidden, out + r * a.experts, a.experts);
    }
  });
  Phase top(a.tokens, [=](int64_t t) { choose<T>(a, t); });
  run_phases(threads_for(a.tokens * a.hidden * a.experts), norm, dots, top);
}

}  // namespace

void route_topk(const RouteTopk& a) { a.dtype == Dtype::f32 ? route_topk_of<float>(a) : route_topk_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
