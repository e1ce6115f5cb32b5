// linear: y = x w^T; logits: the same over the vocabulary, softcapped, or the largest alone. One task is some rows of w.
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

template <class T>
void linear_of(const Linear& a) {
  const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const int64_t rows = rows_per_task(a.tokens, a.n, a.k * sizeof(T), kTileN);
  parallel((a.n + rows - 1) / rows, a.tokens * a.n * a.k, [=](int64_t task) {
    const int64_t first = task * rows;
    product<T>(
        a.tokens, min_of(rows, a.n - first), a.k, kTileN, kTileN * a.k, [&](int64_t i) { return x + i * a.k; },
        [&](int64_t j) { return w + (first + j) * a.k; },
        [&](int64_t i, int mm, int64_t j, int nn, const float* y) {
          for (int r = 0; r < mm; ++r) store_some(out + (i + r) * a.n + first + j, load_some(y + r * nn, nn), nn);
        });
  });
}

// Whether a later logit takes the place of the best so far. As torch.argmax: the first NaN beats all.
inline bool beats(float y, float best) { return y > best || (y != y && best == best); }

template <class T>
void logits_of(const Logits& a) {
  const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const int64_t rows = (a.vocab + a.tasks - 1) / a.tasks;
  const auto task_body = [=](int64_t task) {
    const int64_t begin = task * rows;
    if (out == nullptr)
      for (int64_t t = 0; t < a.tokens; ++t) a.best_of[t * a.tasks + task] = -INFINITY, a.best_id[t * a.tasks + task] = begin;
    product<T>(
        a.tokens, max_of<int64_t>(0, min_of(rows, a.vocab - begin)), a.hidden, kTileN, kTileN * a.hidden,
        [&](int64_t i) { return x + i * a.hidden; }, [&](int64_t j) { return w + (begin + j) * a.hidden; },
        [&](int64_t i, int mm, int64_t j, int nn, float* y) {
          if (out == nullptr) {  // softcap never changes the order
            for (int r = 0; r < mm; ++r)
              for (int c = 0; c < nn; ++c) {
                float& best = a.best_of[(i + r) * a.tasks + task];
                if (beats(y[r * nn + c], best)) best = y[r * nn + c], a.best_id[(i + r) * a.tasks + task] = begin + j + c;
              }
            return;
          }
          if (a.softcap > 0)
            for_vecs(mm * nn, [&](int64_t e, int n) GEMMA4_LAMBDA_INLINE {
              store_some(y + e, softcap(load_some(y + e, n), a.softcap), n);
            });
          for (int r = 0; r < mm; ++r) store_some(out + (i + r) * a.vocab + begin + j, load_some(y + r * nn, nn), nn);
        });
  };
  parallel(a.tasks, a.tokens * a.vocab * a.hidden, task_body);
  if (out != nullptr) return;
  for (int64_t t = 0; t < a.tokens; ++t) {  // the first task that has the largest has the lowest id
    int64_t best = 0;
    for (int64_t task = 1; task < a.tasks; ++task)
      if (beats(a.best_of[t * a.tasks + task], a.best_of[t * a.tasks + best])) best = task;
    a.best[t] = a.best_id[t * a.tasks + best];
  }
}

}  // namespace

void linear(const Linear& a) { a.dtype == Dtype::f32 ? linear_of<float>(a) : linear_of<bf16>(a); }
void logits(const Logits& a) { a.dtype == Dtype::f32 ? logits_of<float>(a) : logits_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
