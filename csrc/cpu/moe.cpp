// Routed experts: out[t] = sum_k weights[t, k] * down[e] (gelu_tanh(gate[e] x) * up[e] x), e = ids[t, k]; and grouped_gemm, its
// two halves alone.
//
// For one token or thousands the same: (token, expert) pairs are sorted by expert, each expert's weights are read once, and
// nothing is padded. First half: one task is some columns of one expert. Second half: one task is some columns of the output,
// to which it adds expert by expert, in the order of their ids: no atomics, no scratch for the single products, and a
// token's bits are the same alone or in a batch. Pairs of no expert here come last in the order, and are in no task.
#include "cpu/geglu.h"
#include "cpu/quantized.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

struct Sorted {
  const int32_t *order, *offsets;  // sorted row r is pair order[r]; expert e owns rows offsets[e] .. offsets[e + 1]
};

// Tasks are of experts that have rows alone, so that equal numbers of them are equal work.
int64_t count_active(const Sorted& s, int64_t experts) {
  int64_t active = 0;
  for (int64_t e = 0; e < experts; ++e) active += s.offsets[e + 1] > s.offsets[e];
  return active;
}
int64_t nth_active(const Sorted& s, int64_t n) {
  for (int64_t e = 0;; ++e)
    if (s.offsets[e + 1] > s.offsets[e] && n-- == 0) return e;
}

// The expert after e that has rows, or the first one that has.
int64_t next_active(const Sorted& s, int64_t e, int64_t experts) {
  for (int64_t next = e + 1; next < experts; ++next)
    if (s.offsets[next + 1] > s.offsets[next]) return next;
  return nth_active(s, 0);
}

// Columns of the first product: task -> (expert that has rows, first column).
template <class T>
GEMMA4_INLINE void first_half(const Sorted& s, int64_t task, int64_t chunks, int64_t columns, const T* x, const T* gate_up,
                              T* h, int64_t hidden, int64_t inter, int64_t top_k, int64_t experts) {
  const int64_t e = nth_active(s, task / chunks), c = task % chunks * columns;
  const int64_t begin = s.offsets[e], rows = s.offsets[e + 1] - begin;
  const T* gate = gate_up + e * 2 * inter * hidden;
  const bool last = c + columns >= inter;  // what is read next belongs to the next expert
  const int64_t next = last ? next_active(s, e, experts) : e;
  const T* after = gate_up + next * 2 * inter * hidden + (last ? 0 : c + columns) * hidden;
  geglu_product<T>(
      rows, c, min_of(columns, inter - c), hidden, gate, gate + inter * hidden, after, after + inter * hidden,
      [&](int64_t i) { return x + static_cast<uint32_t>(s.order[begin + i]) / static_cast<uint32_t>(top_k) * hidden; }, [&](int64_t i) { return h + (begin + i) * inter; });
}

// Columns n .. n + columns of sum [tokens, hidden].
GEMMA4_INLINE void zero_sums(float* sum, int64_t tokens, int64_t hidden, int64_t n, int64_t columns) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < columns; ++c) sum[t * hidden + n + c] = 0.0f;
}
template <class T>
GEMMA4_INLINE void round_sums(const float* sum, int64_t tokens, int64_t hidden, int64_t n, int64_t columns, T* out) {
  for (int64_t t = 0; t < tokens; ++t)
    for_vecs(columns, [&](int64_t c, int count) GEMMA4_LAMBDA_INLINE {
      store_some(out + t * hidden + n + c, load_some(sum + t * hidden + n + c, count), count);
    });
}

// Columns n .. n + columns of the second product, of all experts, weighted and summed; then rounded to out.
template <class T>
GEMMA4_INLINE void second_half(const Sorted& s, int64_t n, int64_t columns, const T* h, const T* down,
                               const float* topk_weights, float* sum, T* out, int64_t tokens, int64_t hidden, int64_t inter,
                               int64_t experts, int64_t top_k) {
  columns = min_of(columns, hidden - n);
  zero_sums(sum, tokens, hidden, n, columns);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t begin = s.offsets[e], rows = s.offsets[e + 1] - begin;
    if (rows == 0) continue;
    const T* w = down + (e * hidden + n) * inter;
    const int64_t next = next_active(s, e, experts);  // after the last one the first, for the next task
    const T* after = down + (next * hidden + n + (next <= e ? columns : 0)) * inter;
    // The next expert's rows of h, asked for a few lines at each tile
    const char* soon = reinterpret_cast<const char*>(h + s.offsets[next] * inter);
    const char* const soon_end = reinterpret_cast<const char*>(h + s.offsets[next + 1] * inter);
    const int64_t lines = (soon_end - soon) * kTileM * kWidth / (64 * rows * columns) + 1;
    for (int64_t block = 0; block < rows; block += kRowBlock) {
      const int64_t m = min_of(kRowBlock, rows - block);
      float *to[kRowBlock], weight[kRowBlock];  // where a row's products are added, and with which weight
      for (int64_t i = 0; i < m; ++i) {
        const uint32_t pair = static_cast<uint32_t>(s.order[begin + block + i]);
        to[i] = sum + static_cast<int64_t>(pair / static_cast<uint32_t>(top_k)) * hidden + n, weight[i] = topk_weights[pair];
      }
      product<T>(
          m, columns, inter, [&](int64_t i) { return h + (begin + block + i) * inter; }, w, after,
          [&](int64_t i, int mm, int64_t j, int nn, const float* y) {
            for (int64_t c = 0; c < lines && soon < soon_end; ++c, soon += 64) prefetch(soon);
            for (int r = 0; r < mm; ++r) {
              float* at = to[i + r] + j;
              store_some(at, fma(load_some(y + r * kWidth, nn), set(weight[i + r]), load_some(at, nn)), nn);
            }
          });
    }
  }
  round_sums(sum, tokens, hidden, n, columns, out);
}

template <class T>
void moe_of(const Moe& a) {
  const T *x = static_cast<const T*>(a.x), *gate_up = static_cast<const T*>(a.gate_up), *down = static_cast<const T*>(a.down);
  T *h = static_cast<T*>(a.h), *out = static_cast<T*>(a.out);
  const int64_t pairs = a.tokens * a.top_k;
  sort_by_expert(a.ids, pairs, a.experts, a.order, a.offsets);
  const Sorted s{a.order, a.offsets};
  const int64_t active = count_active(s, a.experts), here = s.offsets[a.experts];
  const int64_t per_expert = active ? (here + active - 1) / active : 0;
  const int64_t columns = rows_per_task(per_expert, a.inter, 2 * a.hidden * sizeof(T));
  const int64_t chunks = (a.inter + columns - 1) / columns;
  const int64_t rows = rows_per_task(per_expert, a.hidden, a.inter * sizeof(T));
  Phase first(active * chunks, [=](int64_t task) {
    first_half(s, task, chunks, columns, x, gate_up, h, a.hidden, a.inter, a.top_k, a.experts);
  });
  Phase second((a.hidden + rows - 1) / rows, [=](int64_t task) {
    second_half(s, task * rows, rows, h, down, a.topk_weights, a.sum, out, a.tokens, a.hidden, a.inter, a.experts, a.top_k);
  });
  run_phases(threads_for(here * a.hidden * a.inter), first, second);
}

// The same over quantized weights: x is rounded before the first half, h as the first half writes it.
template <class T, int Bits>
void quantized_moe_of(const Moe& a) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  Rounded *rounded = static_cast<Rounded*>(a.rounded), *h = static_cast<Rounded*>(a.h);
  const int64_t pairs = a.tokens * a.top_k, groups = a.q_gate_up.groups, h_groups = a.q_down.groups;
  const int64_t inter_panels = (a.inter + kPanel - 1) / kPanel, out_panels = (a.hidden + kPanel - 1) / kPanel;
  const Panels<Bits> gate_up = panels_of<Bits>(a.gate_up, a.q_gate_up), down = panels_of<Bits>(a.down, a.q_down);
  sort_by_expert(a.ids, pairs, a.experts, a.order, a.offsets);
  const Sorted s{a.order, a.offsets};
  const int64_t active = count_active(s, a.experts), here = s.offsets[a.experts];
  const int64_t per_expert = active ? (here + active - 1) / active : 0;
  const int64_t columns = panels_per_task(per_expert, h_groups, 4 * gate_up.bytes());
  const int64_t chunks = (h_groups + columns - 1) / columns;
  const int64_t rows = panels_per_task(per_expert, out_panels, down.bytes());
  Phase round(a.tokens, [=](int64_t t) { round_row(x + t * a.hidden, a.hidden, offset_of(Bits), rounded + t * groups); });
  Phase first(active * chunks, [=](int64_t task) {
    const int64_t e = nth_active(s, task / chunks), c = task % chunks * columns;
    const int64_t begin = s.offsets[e];
    const Panels<Bits> gate = gate_up.from(2 * e * inter_panels);
    const bool last = c + columns >= h_groups;
    const int64_t next = last ? next_active(s, e, a.experts) : e;
    const Panels<Bits> after = gate_up.from(2 * next * inter_panels + (last ? 0 : 2 * (c + columns)));
    geglu_panels<Bits>(
        s.offsets[e + 1] - begin, c, min_of(c + columns, h_groups), inter_panels, gate, gate.from(inter_panels), after.data,
        after.from(inter_panels).data, offset_of(Bits),
        [&](int64_t i) { return rounded + static_cast<uint32_t>(s.order[begin + i]) / static_cast<uint32_t>(a.top_k) * groups; },
        [&](int64_t i) { return h + (begin + i) * h_groups; });
  });
  Phase second((out_panels + rows - 1) / rows, [=](int64_t task) {
    const int64_t n = task * rows * kPanel, columns = min_of(rows * kPanel, a.hidden - n);
    zero_sums(a.sum, a.tokens, a.hidden, n, columns);
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t begin = s.offsets[e];
      if (s.offsets[e + 1] == begin) continue;
      const int64_t next = next_active(s, e, a.experts);  // after the last one the first, for the next task
      const Panels<Bits> after = down.from(next * out_panels + (next > e ? task : task + 1) * rows);
      panel_product<Bits>(
          s.offsets[e + 1] - begin, min_of(rows, out_panels - task * rows), down.from(e * out_panels + task * rows), after.data,
          [&](int64_t i) { return h + (begin + i) * h_groups; },
          [&](int64_t i, int mm, int64_t p, const float* y) {
            for (int r = 0; r < mm; ++r) {
              const uint32_t pair = static_cast<uint32_t>(s.order[begin + i + r]);
              const Vec weight = set(a.topk_weights[pair]);
              float* to = a.sum + static_cast<int64_t>(pair / static_cast<uint32_t>(a.top_k)) * a.hidden + n + p * kPanel;
              for_vecs(min_of<int64_t>(kPanel, columns - p * kPanel), [&](int64_t c, int count) GEMMA4_LAMBDA_INLINE {
                store_some(to + c, fma(load_some(y + r * kPanel + c, count), weight, load_some(to + c, count)), count);
              });
            }
          });
    }
    round_sums(a.sum, a.tokens, a.hidden, n, columns, out);
  });
  run_phases(threads_for(here * a.hidden * a.inter), round, first, second);
}

template <class T>
void grouped_gemm_of(const GroupedGemm& a) {
  const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const Sorted s{a.order, a.offsets};
  const int64_t active = count_active(s, a.experts), here = s.offsets[a.experts];
  const int64_t per_expert = active ? (here + active - 1) / active : 0, work = here * a.n * a.k;
  if (a.epilogue == 2) {
    const int64_t rows = rows_per_task(per_expert, a.n, a.k * sizeof(T));
    parallel((a.n + rows - 1) / rows, work, [=](int64_t task) {
      second_half(s, task * rows, rows, x, w, a.topk_weights, a.sum, out, a.rows / a.top_k, a.n, a.k, a.experts, a.top_k);
    });
  } else if (a.epilogue == 1) {
    const int64_t inter = a.n / 2, columns = rows_per_task(per_expert, inter, 2 * a.k * sizeof(T));
    const int64_t chunks = (inter + columns - 1) / columns;
    parallel(active * chunks, work,
             [=](int64_t task) { first_half(s, task, chunks, columns, x, w, out, a.k, inter, a.top_k, a.experts); });
  } else {
    const int64_t rows = rows_per_task(per_expert, a.n, a.k * sizeof(T)), chunks = (a.n + rows - 1) / rows;
    parallel(active * chunks, work, [=](int64_t task) {
      const int64_t e = nth_active(s, task / chunks), n = task % chunks * rows, begin = s.offsets[e];
      const T* own = w + (e * a.n + n) * a.k;
      product<T>(
          s.offsets[e + 1] - begin, min_of(rows, a.n - n), a.k, [&](int64_t i) { return x + (begin + i) * a.k; }, own,
          own + rows * a.k,
          [&](int64_t i, int mm, int64_t j, int nn, const float* y) { store_rows(y, mm, nn, out + (begin + i) * a.n + n + j, a.n); });
    });
  }
}

}  // namespace

void moe(const Moe& a) {
  if (a.q_down.scale == nullptr) return a.dtype == Dtype::f32 ? moe_of<float>(a) : moe_of<bf16>(a);
  if (a.q_down.bits == 8) return a.dtype == Dtype::f32 ? quantized_moe_of<float, 8>(a) : quantized_moe_of<bf16, 8>(a);
  return a.dtype == Dtype::f32 ? quantized_moe_of<float, 4>(a) : quantized_moe_of<bf16, 4>(a);
}
void grouped_gemm(const GroupedGemm& a) { a.dtype == Dtype::f32 ? grouped_gemm_of<float>(a) : grouped_gemm_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
