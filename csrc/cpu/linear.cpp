// linear: y = x w^T; logits: the same over the vocabulary, softcapped, or the largest alone. One task is some rows of w.
#include "cpu/parallel.h"
#include "cpu/quantized.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

template <class T>
void linear_of(const Linear& a) {
  const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const int64_t rows = rows_per_task(a.tokens, a.n, a.k * sizeof(T));
  parallel((a.n + rows - 1) / rows, a.tokens * a.n * a.k, [=](int64_t task) {
    const int64_t first = task * rows;
    const T* own = w + first * a.k;
    product<T>(
        a.tokens, min_of(rows, a.n - first), a.k, [&](int64_t i) { return x + i * a.k; }, own, own + rows * a.k,
        [&](int64_t i, int mm, int64_t j, int nn, const float* y) { store_rows(y, mm, nn, out + i * a.n + first + j, a.n); });
  });
}

template <class T, int Bits>
void quantized_linear_of(const Linear& a) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  Rounded* rounded = static_cast<Rounded*>(a.rounded);
  const int64_t groups = a.q.groups, panels = (a.n + kPanel - 1) / kPanel;
  const Panels<Bits> w = panels_of<Bits>(a.weight, a.q);
  const int64_t per_task = panels_per_task(a.tokens, panels, w.bytes());
  Phase round(a.tokens, [=](int64_t t) { round_row(x + t * a.k, a.k, offset_of(Bits), rounded + t * groups); });
  Phase multiply((panels + per_task - 1) / per_task, [=](int64_t task) {
    const int64_t first = task * per_task;
    panel_product<Bits>(
        a.tokens, min_of(per_task, panels - first), w.from(first), w.from(first + per_task).data, [&](int64_t i) { return rounded + i * groups; },
        [&](int64_t i, int mm, int64_t p, const float* y) {
          const int64_t n = (first + p) * kPanel;
          for (int r = 0; r < mm; ++r) store_panel_row(out + (i + r) * a.n + n, y + r * kPanel, a.n - n);
        });
  });
  run_phases(threads_for(a.tokens * a.n * a.k), round, multiply);
}

// Whether a later logit takes the place of the best so far. As torch.argmax: the first NaN beats all.
inline bool beats(float y, float best) { return y > best || (y != y && best == best); }

// What to do with y [m, width], the logits of tokens i .. i + m and of `n` <= width ids from `id` on.
template <class T>
GEMMA4_INLINE void take_logits(const Logits& a, int64_t task, int64_t i, int m, int64_t id, int n, int width, float* y) {
  T* out = static_cast<T*>(a.out);
  if (out == nullptr) {  // softcap never changes the order
    for (int r = 0; r < m; ++r)
      for (int c = 0; c < n; ++c) {
        float& best = a.best_of[(i + r) * a.tasks + task];
        if (beats(y[r * width + c], best)) best = y[r * width + c], a.best_id[(i + r) * a.tasks + task] = id + c;
      }
    return;
  }
  if (a.softcap > 0)
    for_vecs(m * width, [&](int64_t e, int count) GEMMA4_LAMBDA_INLINE {
      store_some(y + e, softcap(load_some(y + e, count), a.softcap), count);
    });
  for (int r = 0; r < m; ++r)
    for_vecs(n, [&](int64_t c, int count) GEMMA4_LAMBDA_INLINE {
      store_some(out + (i + r) * a.vocab + id + c, load_some(y + r * width + c, count), count);
    });
}

template <class T>
GEMMA4_INLINE bool all_finite(const T* x, int64_t size) {
  Vec sum = set(0);
  for_vecs(size, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE { sum = fma(load_some(x + i, n), set(0), sum); });
  return sum_lanes(sum) == 0.0f;  // NaN if one of x is not finite
}

// multiply(task, first id, last id): the products of a task's rows of w, shown to take_logits.
template <class T, class Multiply>
void logits_tasks(const Logits& a, int64_t width, Multiply multiply) {
  const int64_t rows = ((a.vocab + width - 1) / width + a.tasks - 1) / a.tasks * width;
  parallel(a.tasks, a.tokens * a.vocab * a.hidden, [=](int64_t task) {
    const int64_t first = min_of(task * rows, a.vocab);
    if (a.out == nullptr)
      for (int64_t t = 0; t < a.tokens; ++t) a.best_of[t * a.tasks + task] = -INFINITY, a.best_id[t * a.tasks + task] = first;
    multiply(task, first, min_of(first + rows, a.vocab));
  });
  if (a.out != nullptr) return;
  for (int64_t t = 0; t < a.tokens; ++t) {  // the first task that has the largest has the lowest id
    if (!all_finite(static_cast<const T*>(a.x) + t * a.hidden, a.hidden)) {
      a.best[t] = -1;
      continue;
    }
    int64_t best = 0;
    for (int64_t task = 1; task < a.tasks; ++task)
      if (beats(a.best_of[t * a.tasks + task], a.best_of[t * a.tasks + best])) best = task;
    a.best[t] = a.best_id[t * a.tasks + best];
  }
}

template <class T>
void logits_of(const Logits& a) {
  const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.weight);
  logits_tasks<T>(a, kWidth, [=](int64_t task, int64_t first, int64_t last) {
    product<T>(
        a.tokens, last - first, a.hidden, [&](int64_t i) { return x + i * a.hidden; }, w + first * a.hidden, w + last * a.hidden,
        [&](int64_t i, int mm, int64_t j, int nn, float* y) { take_logits<T>(a, task, i, mm, first + j, nn, kWidth, y); });
  });
}

template <class T, int Bits>
void quantized_logits_of(const Logits& a) {
  const T* x = static_cast<const T*>(a.x);
  Rounded* rounded = static_cast<Rounded*>(a.rounded);
  const int64_t groups = a.q.groups;
  const Panels<Bits> w = panels_of<Bits>(a.weight, a.q);
  parallel(a.tokens, a.tokens * a.hidden,
           [=](int64_t t) { round_row(x + t * a.hidden, a.hidden, offset_of(Bits), rounded + t * groups); });
  logits_tasks<T>(a, kPanel, [=](int64_t task, int64_t first, int64_t last) {
    panel_product<Bits>(
        a.tokens, (last - first + kPanel - 1) / kPanel, w.from(first / kPanel), w.from(last / kPanel).data,
        [&](int64_t i) { return rounded + i * groups; },
        [&](int64_t i, int mm, int64_t p, float* y) {
          const int64_t id = first + p * kPanel;
          take_logits<T>(a, task, i, mm, id, static_cast<int>(min_of<int64_t>(kPanel, last - id)), kPanel, y);
        });
  });
}

}  // namespace

void linear(const Linear& a) {
  if (a.q.scale == nullptr) return a.dtype == Dtype::f32 ? linear_of<float>(a) : linear_of<bf16>(a);
  if (a.q.bits == 8) return a.dtype == Dtype::f32 ? quantized_linear_of<float, 8>(a) : quantized_linear_of<bf16, 8>(a);
  return a.dtype == Dtype::f32 ? quantized_linear_of<float, 4>(a) : quantized_linear_of<bf16, 4>(a);
}
void logits(const Logits& a) {
  if (a.q.scale == nullptr) return a.dtype == Dtype::f32 ? logits_of<float>(a) : logits_of<bf16>(a);
  if (a.q.bits == 8) return a.dtype == Dtype::f32 ? quantized_logits_of<float, 8>(a) : quantized_logits_of<bf16, 8>(a);
  return a.dtype == Dtype::f32 ? quantized_logits_of<float, 4>(a) : quantized_logits_of<bf16, 4>(a);
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
