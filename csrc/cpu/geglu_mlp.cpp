// geglu_mlp: down (gelu_tanh(gate x) * up x), one fork for both products. ple_gate: the same shape with the per-layer
// embedding in up's place, then norm_add_norm.
#include "cpu/geglu.h"
#include "cpu/quantized.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

template <class T>
void geglu_mlp_of(const GegluMlp& a) {
  const T *x = static_cast<const T*>(a.x), *gate = static_cast<const T*>(a.gate_up), *up = gate + a.inter * a.hidden;
  const T* down = static_cast<const T*>(a.down);
  T *h = static_cast<T*>(a.h), *out = static_cast<T*>(a.out);
  const int64_t columns = rows_per_task(a.tokens, a.inter, 2 * a.hidden * sizeof(T));
  const int64_t rows = rows_per_task(a.tokens, a.hidden, a.inter * sizeof(T));
  Phase first((a.inter + columns - 1) / columns, [=](int64_t task) {
    const int64_t c = task * columns;
    geglu_product<T>(
        a.tokens, c, min_of(columns, a.inter - c), a.hidden, gate, up, gate + (c + columns) * a.hidden,
        up + (c + columns) * a.hidden, [&](int64_t i) { return x + i * a.hidden; },
        [&](int64_t i) { return h + i * a.inter; });
  });
  Phase second((a.hidden + rows - 1) / rows, [=](int64_t task) {
    const int64_t n = task * rows;
    const T* own = down + n * a.inter;
    product<T>(
        a.tokens, min_of(rows, a.hidden - n), a.inter, [&](int64_t i) { return h + i * a.inter; }, own, own + rows * a.inter,
        [&](int64_t i, int mm, int64_t j, int nn, const float* y) { store_rows(y, mm, nn, out + i * a.hidden + n + j, a.hidden); });
  });
  run_phases(threads_for(a.tokens * a.hidden * a.inter), first, second);
}

template <class T, int Bits>
void quantized_mlp_of(const GegluMlp& a) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  Rounded *rounded = static_cast<Rounded*>(a.rounded), *h = static_cast<Rounded*>(a.h);
  const int64_t groups = a.q_gate_up.groups, h_groups = a.q_down.groups;
  const int64_t inter_panels = (a.inter + kPanel - 1) / kPanel, out_panels = (a.hidden + kPanel - 1) / kPanel;
  const Panels<Bits> gate = panels_of<Bits>(a.gate_up, a.q_gate_up), up = gate.from(inter_panels);
  const Panels<Bits> down = panels_of<Bits>(a.down, a.q_down);
  const int64_t columns = panels_per_task(a.tokens, h_groups, 4 * gate.bytes());  // groups of 32 of h: 2 panels of gate, 2 of up
  const int64_t rows = panels_per_task(a.tokens, out_panels, down.bytes());
  Phase round(a.tokens, [=](int64_t t) { round_row(x + t * a.hidden, a.hidden, offset_of(Bits), rounded + t * groups); });
  Phase first((h_groups + columns - 1) / columns, [=](int64_t task) {
    geglu_panels<Bits>(
        a.tokens, task * columns, min_of((task + 1) * columns, h_groups), inter_panels, gate, up,
        gate.from(2 * (task + 1) * columns).data, up.from(2 * (task + 1) * columns).data, offset_of(Bits),
        [&](int64_t i) { return rounded + i * groups; }, [&](int64_t i) { return h + i * h_groups; });
  });
  Phase second((out_panels + rows - 1) / rows, [=](int64_t task) {
    panel_product<Bits>(
        a.tokens, min_of(rows, out_panels - task * rows), down.from(task * rows), down.from((task + 1) * rows).data,
        [&](int64_t i) { return h + i * h_groups; },
        [&](int64_t i, int mm, int64_t p, const float* y) {
          const int64_t n = (task * rows + p) * kPanel;
          for (int r = 0; r < mm; ++r) store_panel_row(out + (i + r) * a.hidden + n, y + r * kPanel, a.hidden - n);
        });
  });
  run_phases(threads_for(a.tokens * a.hidden * a.inter), round, first, second);
}

template <class T>
void ple_gate_of(const PleGate& a) {
  const T *x = static_cast<const T*>(a.x), *ple = static_cast<const T*>(a.ple);
  const T *gate = static_cast<const T*>(a.gate), *proj = static_cast<const T*>(a.proj);
  T *g = static_cast<T*>(a.g), *h = static_cast<T*>(a.h);
  const int64_t columns = rows_per_task(a.tokens, a.size, a.hidden * sizeof(T));
  const int64_t rows = rows_per_task(a.tokens, a.hidden, a.size * sizeof(T));
  Phase first((a.size + columns - 1) / columns, [=](int64_t task) {
    const int64_t n = task * columns;
    const T* own = gate + n * a.hidden;
    product<T>(
        a.tokens, min_of(columns, a.size - n), a.hidden, [&](int64_t i) { return x + i * a.hidden; }, own, own + columns * a.hidden,
        [&](int64_t i, int mm, int64_t j, int nn, float* y) {
          for (int r = 0; r < mm; ++r) {
            const Vec up = load_some(ple + (i + r) * a.ple_stride + n + j, nn);
            store_some(g + (i + r) * a.size + n + j, mul(gelu_tanh(load_some(y + r * kWidth, nn)), up), nn);
          }
        });
  });
  Phase second((a.hidden + rows - 1) / rows, [=](int64_t task) {
    const int64_t n = task * rows;
    const T* own = proj + n * a.size;
    product<T>(
        a.tokens, min_of(rows, a.hidden - n), a.size, [&](int64_t i) { return g + i * a.size; }, own, own + rows * a.size,
        [&](int64_t i, int mm, int64_t j, int nn, const float* y) { store_rows(y, mm, nn, h + i * a.hidden + n + j, a.hidden); });
  });
  Phase third(a.tokens, [&](int64_t t) { norm_add_norm_row(a.norm, h + t * a.hidden, t); });
  run_phases(threads_for(a.tokens * a.hidden * a.size), first, second, third);
}

}  // namespace

void geglu_mlp(const GegluMlp& a) {
  if (a.q_down.scale == nullptr) return a.dtype == Dtype::f32 ? geglu_mlp_of<float>(a) : geglu_mlp_of<bf16>(a);
  if (a.q_down.bits == 8) return a.dtype == Dtype::f32 ? quantized_mlp_of<float, 8>(a) : quantized_mlp_of<bf16, 8>(a);
  return a.dtype == Dtype::f32 ? quantized_mlp_of<float, 4>(a) : quantized_mlp_of<bf16, 4>(a);
}
void ple_gate(const PleGate& a) { a.dtype == Dtype::f32 ? ple_gate_of<float>(a) : ple_gate_of<bf16>(a); }

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
