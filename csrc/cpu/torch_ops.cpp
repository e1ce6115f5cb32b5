// The CPU kernels as torch.ops.gemma4_fast_cpu.*, over torch's stable ABI: one binary for torch 2.10 and newer.
//
// Callers are gemma4_fast/ops/cpu_backend.py alone: arguments come checked, tensors contiguous where kernels.h says so, outputs
// and scratch allocated. `isa` is an index into `kTables`. Compiled once, with plain flags. Of torch's macros only those that
// its headers have since 2.10: STABLE_TORCH_ERROR_CODE_CHECK came with 2.13.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>

#include "cpu/kernels.h"
#include "cpu/recording.h"

namespace gemma4_fast {

#define GEMMA4_DECLARE(isa) \
  namespace isa {           \
  extern const Kernels kernels; \
  }
GEMMA4_DECLARE(plain)
#if defined(GEMMA4_X86)
GEMMA4_DECLARE(avx2)
GEMMA4_DECLARE(avx512)
GEMMA4_DECLARE(avx512_bf16)
#endif

int num_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const Kernels* const kTables[] = {
    &plain::kernels,
#if defined(GEMMA4_X86)
    &avx2::kernels, &avx512::kernels, &avx512_bf16::kernels,
#endif
};

const Kernels& table(int64_t isa) {
  constexpr int64_t count = sizeof(kTables) / sizeof(kTables[0]);
  STD_TORCH_CHECK(isa >= 0 && isa < count, "no such instruction set: ", isa);
  return *kTables[isa];
}

Dtype dtype_of(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Float || type == torch::headeronly::ScalarType::BFloat16,
                  "the CPU kernels take float32 and bfloat16");
  return type == torch::headeronly::ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

template <class T = void>
T* at(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T = void>
T* at(const Optional& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// What cpu_backend.py tells from a fault of this package, by the words it begins with.
#define GEMMA4_CHECK_ARGUMENT(ok, ...) STD_TORCH_CHECK(ok, "bad argument: ", __VA_ARGS__)

// Indices that memory is written or read by: a wrong one must not get there.
template <class T>
void check_range(const T* values, int64_t count, int64_t low, int64_t limit, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    GEMMA4_CHECK_ARGUMENT(values[i] >= low && values[i] < limit, what, " must lie in [", low, ", ", limit, "), got ", values[i]);
}

void rms_norm(Tensor x, Optional weight, Tensor out, double eps, int64_t isa) {
  submit([=] {
    const int64_t hidden = x.size(-1);
    RmsNorm a{dtype_of(x), at(x), at(weight), at(out), hidden ? x.numel() / hidden : 0, hidden, (float)eps};
    table(isa).rms_norm(a);
  });
}

NormAddNorm norm_args(const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& scale, const Optional& next,
                      const Tensor& y, const Optional& z, double eps) {
  return {dtype_of(x), at(x), at(residual), at(weight), at(scale), at(next), at(y), at(z), x.size(0), x.size(1), (float)eps};
}

void norm_add_norm(Tensor x, Tensor residual, Tensor weight, Optional scale, Optional next_weight, Tensor y, Optional z,
                   double eps, int64_t isa) {
  submit([=] {
    table(isa).norm_add_norm(norm_args(x, residual, weight, scale, next_weight, y, z, eps));
  });
}

// What a weight's scale says, if it has one: data [.., panels, groups * bits, 16, 4], scale [.., panels, groups, 16].
Quantized quantized(const Tensor& data, const Optional& scale) {
  if (!scale) return {};
  const int64_t groups = scale->size(-2);
  return {at<uint16_t>(scale), groups, data.size(-3) == 8 * groups ? 8 : 4};
}

void embedding(Tensor weight, Optional scale, Tensor ids, Tensor out, double by, int64_t vocab, int64_t isa) {
  submit([=] {
    check_range(at<int64_t>(ids), ids.numel(), 0, vocab, "embedding: ids");
    table(isa).embedding({dtype_of(out), at(weight), at<int64_t>(ids), at(out), ids.numel(), out.size(-1), (float)by, quantized(weight, scale)});
  });
}

void rope_angles(Tensor positions, Tensor inv_freq, Tensor cos, Tensor sin, int64_t isa) {
  submit([=] {
    table(isa).rope_angles({at<int64_t>(positions), at<float>(inv_freq), at<float>(cos), at<float>(sin), positions.numel(), inv_freq.numel()});
  });
}

void linear(Tensor x, Tensor weight, Optional scale, Optional rounded, Tensor out, int64_t isa) {
  submit([=] {
    const int64_t k = x.size(-1);
    table(isa).linear({dtype_of(x), at(x), at(weight), at(out), x.numel() / k, out.size(-1), k, quantized(weight, scale), at(rounded)});
  });
}

void geglu_mlp(Tensor x, Tensor gate_up, Tensor down, Optional gate_up_scale, Optional down_scale, int64_t inter,
               Optional rounded, Tensor h, Tensor out, int64_t isa) {
  submit([=] {
    const int64_t hidden = x.size(-1);
    table(isa).geglu_mlp({dtype_of(x), at(x), at(gate_up), at(down), at(h), at(out), x.numel() / hidden, hidden, inter,
                          quantized(gate_up, gate_up_scale), quantized(down, down_scale), at(rounded)});
  });
}

void moe(Tensor x, Tensor topk_weights, Tensor ids, Tensor gate_up, Tensor down, Optional gate_up_scale, Optional down_scale,
         int64_t inter, Optional rounded, Tensor h, Tensor sum, Tensor order, Tensor out, int64_t isa) {
  submit([=] {
    const int64_t experts = gate_up.size(0);
    table(isa).moe({dtype_of(x), at(x), at(gate_up), at(down), at<float>(topk_weights), at<int32_t>(ids), at(h), at(out),
                    at<float>(sum), at<int32_t>(order), at<int32_t>(order) + ids.numel(), ids.size(0), ids.size(1), experts, x.size(1),
                    inter, quantized(gate_up, gate_up_scale), quantized(down, down_scale), at(rounded)});
  });
}

void expert_dispatch(Tensor ids, int64_t block_m, Tensor order, Tensor offsets, Tensor tiles) {
  submit([=] {
    const int64_t pairs = ids.numel(), experts = offsets.numel() - 1;
    const int32_t* id = at<int32_t>(ids);
    int32_t *to = at<int32_t>(order), *first = at<int32_t>(offsets), *tile = at<int32_t>(tiles);
    sort_by_expert(id, pairs, experts, to, first);
    int32_t* const end = tile + tiles.numel();
    for (int32_t e = 0; e < experts; ++e)
      for (int64_t row = first[e]; row < first[e + 1]; row += block_m) *tile++ = e, *tile++ = static_cast<int32_t>(row);
    while (tile < end) *tile++ = -1;
  });
}

void grouped_gemm(Tensor x, Tensor weight, Tensor order, Tensor offsets, int64_t top_k, int64_t epilogue, Optional topk_weights,
                  Optional sum, Tensor out, int64_t isa) {
  submit([=] {
    const int64_t rows = order.numel(), experts = weight.size(0);
    check_range(at<int32_t>(order), rows, 0, rows, "grouped_gemm: order");
    const int32_t* o = at<int32_t>(offsets);
    for (int64_t e = 0; e < experts; ++e) GEMMA4_CHECK_ARGUMENT(o[e] <= o[e + 1], "grouped_gemm: offsets must not fall");
    GEMMA4_CHECK_ARGUMENT(o[0] == 0 && o[experts] <= rows, "grouped_gemm: offsets must go from 0 to at most ", rows);
    if (epilogue != 2 && rows > 0) {  // rows of no expert here: 0
      const int64_t row = out.numel() / rows * out.element_size();
      std::memset(static_cast<char*>(at(out)) + o[experts] * row, 0, (rows - o[experts]) * row);
    }
    table(isa).grouped_gemm({dtype_of(x), at(x), at(weight), at<int32_t>(order), o, at<float>(topk_weights), at(out),
                             at<float>(sum), rows, top_k, experts, weight.size(1), weight.size(2), (int)epilogue});
  });
}

void route_topk(Tensor x, Tensor scale, Tensor proj, Tensor per_expert_scale, Tensor weights, Tensor ids, Tensor normed,
                Tensor logits, double eps, int64_t isa) {
  submit([=] {
    table(isa).route_topk({dtype_of(x), at(x), at(scale), at(proj), at(per_expert_scale), at<float>(weights), at<int32_t>(ids),
                           at<float>(normed), at<float>(logits), x.size(0), x.size(1), proj.size(0), ids.size(1), (float)eps});
  });
}

void ple_gate(Tensor x, Tensor ple, Tensor gate, Tensor proj, Tensor weight, Optional scale, Optional next_weight, Tensor g,
              Tensor h, Tensor y, Optional z, double eps, int64_t isa) {
  submit([=] {
    table(isa).ple_gate({dtype_of(x), at(x), at(ple), at(gate), at(proj), at(g), at(h),
                         norm_args(h, x, weight, scale, next_weight, y, z, eps), x.size(0), x.size(1), gate.size(0),
                         ple.stride(0)});
  });
}

// out [T, vocab], or for the argmax best [T] and scratch best_of, best_id [T, tasks]. A task is some rows of the weight.
void logits(Tensor x, Tensor weight, Optional scale, Optional rounded, int64_t vocab, Optional out, Optional best,
            Optional best_of, Optional best_id, int64_t tasks, double softcap, int64_t isa) {
  submit([=] {
    table(isa).logits({dtype_of(x), at(x), at(weight), at(out), at<int64_t>(best), at<float>(best_of), at<int64_t>(best_id),
                       x.size(0), vocab, x.size(1), tasks, (float)softcap, quantized(weight, scale), at(rounded)});
  });
}

void qkv_norm_rope(Tensor qkv, Tensor q_weight, Optional k_weight, Tensor cos, Tensor sin, int64_t q_heads, int64_t kv_heads,
                   Tensor q, Optional k, Optional v, Optional slots, double eps, int64_t isa) {
  submit([=] {
    const int64_t dim = q_weight.size(0), heads = qkv.size(1) / dim, tokens = qkv.size(0);
    if (slots) check_range(at<int64_t>(slots), tokens, 0, v->numel() / (kv_heads * dim), "qkv_norm_rope: slots");
    table(isa).qkv_norm_rope({dtype_of(qkv), at(qkv), at(q_weight), at(k_weight), at<float>(cos), at<float>(sin), at(q), at(k),
                              at(v), at<int64_t>(slots), tokens, q_heads, kv_heads, dim, cos.size(1),
                              kv_heads ? (heads - q_heads) / kv_heads : 1, (float)eps});
  });
}

struct CacheTensors {
  Optional k, v, block_table, k_weight, tile_cos, tile_sin, within_cos, within_sin;
};

Cache cache_of(const CacheTensors& c, const int32_t* lens, int64_t sequences) {
  Cache a{};
  if (!c.v) return a;
  a.k = at(c.k), a.v = at(c.v), a.block_table = at<int32_t>(c.block_table);
  a.block_size = c.v->size(1), a.blocks = c.block_table ? c.block_table->size(1) : 1;
  a.slots = a.block_size * a.blocks;
  a.k_weight = at(c.k_weight);
  a.tile_cos = at<float>(c.tile_cos), a.tile_sin = at<float>(c.tile_sin);
  a.within_cos = at<float>(c.within_cos), a.within_sin = at<float>(c.within_sin);
  a.pairs = c.within_cos ? c.within_cos->size(1) : 0;
  const int64_t limit = c.tile_cos ? c.tile_cos->size(0) * kKeyTile + 1 : INT32_MAX;
  check_range(lens, sequences, 0, limit, "lengths");
  if (a.block_table)  // entries beyond a sequence's last block are never followed: they may hold anything
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t used = (std::min<int64_t>(lens[b], a.slots) + a.block_size - 1) / a.block_size;
      check_range(a.block_table + b * a.blocks, used, 0, c.v->size(0), "block_table");
    }
  return a;
}

void gqa_decode(Tensor q, Optional k_cache, Tensor v_cache, Tensor kv_lens, Optional block_table, Optional k_weight,
                Optional tile_cos, Optional tile_sin, Optional within_cos, Optional within_sin, Tensor partial, Tensor out,
                int64_t window, int64_t splits, double scale, int64_t isa) {
  submit([=] {
    const int32_t* lens = at<int32_t>(kv_lens);
    const int64_t batch = q.size(0), heads = q.size(1), kv_heads = v_cache.size(2), dim = q.size(2);
    const Cache cache =
        cache_of({k_cache, v_cache, block_table, k_weight, tile_cos, tile_sin, within_cos, within_sin}, lens, batch);
    for (int64_t b = 0; b < batch; ++b)
      STD_TORCH_CHECK(std::min<int64_t>(lens[b], cache.slots) <= splits * kDecodeSplit, "gqa_decode: too few splits");
    STD_TORCH_CHECK(partial.numel() >= batch * heads * splits * (dim + 2), "gqa_decode: scratch is too small");
    table(isa).gqa_decode({dtype_of(q), at(q), cache, lens, at(out), at<float>(partial), batch, heads, kv_heads, dim, window,
                           splits, (float)scale});
  });
}

void gqa_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Optional k_cache, Optional v_cache, Optional prefix_lens,
                 Optional block_table, Optional image_ids, Optional k_weight, Optional tile_cos, Optional tile_sin,
                 Optional within_cos, Optional within_sin, Tensor out, int64_t window, double scale, int64_t isa) {
  submit([=] {
    const int64_t batch = cu_seqlens.numel() - 1;
    const int32_t *cu = at<int32_t>(cu_seqlens), *prefix = at<int32_t>(prefix_lens);
    for (int64_t b = 0; b < batch; ++b) GEMMA4_CHECK_ARGUMENT(cu[b] <= cu[b + 1], "gqa_prefill: cu_seqlens must not fall");
    GEMMA4_CHECK_ARGUMENT(cu[0] == 0 && cu[batch] == q.size(0), "gqa_prefill: cu_seqlens must go from 0 to ", q.size(0));
    const Cache cache =
        cache_of({k_cache, v_cache, block_table, k_weight, tile_cos, tile_sin, within_cos, within_sin}, prefix, batch);
    table(isa).gqa_prefill({dtype_of(q), at(q), at(k), at(v), cu, cache, prefix, at<int32_t>(image_ids), at(out), batch, q.size(1),
                            k.size(1), q.size(2), window, (float)scale});
  });
}

// What data and scale of a weight [n, k] in `parts` are, if its rows [first, first + rows) can be taken.
Quantized check_rows_of(const Tensor& data, const Tensor& scale, int64_t first, int64_t rows, int64_t n, int64_t k,
                        int64_t parts, const char* op) {
  STD_TORCH_CHECK(parts > 0 && n > 0 && n % parts == 0 && first >= 0 && first + rows <= n, op, ": rows [", first, ", ",
                  first + rows, ") of ", n, " in ", parts, " parts");
  const Quantized q = quantized(data, scale);
  STD_TORCH_CHECK(data.size(0) == parts * ((n / parts + 15) / 16) && scale.size(0) == data.size(0) && q.groups == (k + 31) / 32,
                  op, ": data and scale are of another shape");
  return q;
}

// source [rows, k] -> rows [first, first + rows) of a weight [n, k]. 0: a value is not finite, or too large for a scale. Weights
// are filled outside of steps, and the answer is for the caller: not recorded.
int64_t quantize_rows(Tensor source, Tensor data, Tensor scale, int64_t first, int64_t n, int64_t parts, int64_t isa) {
  STD_TORCH_CHECK(source.dim() == 2 && source.stride(1) == 1, "quantize_rows: source must be a matrix with contiguous rows");
  const int64_t rows = source.size(0), k = source.size(1);
  const Quantized to = check_rows_of(data, scale, first, rows, n, k, parts, "quantize_rows");
  return table(isa).quantize_rows({dtype_of(source), at(source), at(data), at<uint16_t>(scale), rows, source.stride(0), first, n,
                                   k, to.groups, parts, to.bits});
}

// Rows [first, first + rows) of a weight [n, k] -> out [rows, k], fp32 or bf16.
void dequantize_rows(Tensor data, Tensor scale, Tensor out, int64_t first, int64_t n, int64_t parts, int64_t isa) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "dequantize_rows: out must be a contiguous matrix");
  const int64_t rows = out.size(0), k = out.size(1);
  const Quantized from = check_rows_of(data, scale, first, rows, n, k, parts, "dequantize_rows");
  table(isa).dequantize_rows(
      {dtype_of(out), at(data), from.scale, at(out), rows, first, n, k, from.groups, parts, from.bits});
}

// x [T, K] times a weight [N, K], bf16 or quantized -> out [T, N]. x and out are fp32. T <= 64.
void widened_linear(Tensor x, Tensor weight, Optional scale, Tensor out, int64_t first, int64_t n, int64_t parts, int64_t isa) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && x.is_contiguous() && out.is_contiguous() && dtype_of(x) == Dtype::f32 &&
                      dtype_of(out) == Dtype::f32 && x.size(0) == out.size(0) && x.size(0) <= kWidenedRows,
                  "widened_linear: x and out must be contiguous fp32 matrices of at most ", kWidenedRows, " rows");
  const int64_t rows = out.size(1), k = x.size(1);
  if (scale) {
    check_rows_of(weight, *scale, first, rows, n, k, parts, "widened_linear");
  } else {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == k && weight.stride(1) == 1 &&
                        dtype_of(weight) == Dtype::bf16,
                    "widened_linear: the weight must be bf16 [", rows, ", ", k, "]");
  }
  table(isa).widened_linear({at<float>(x), at(weight), at<float>(out), x.size(0), rows, k, weight.stride(0),
                             quantized(weight, scale), first, n, parts});
}

// Whether all values of a contiguous tensor, fp32, bf16 or fp16, are finite: 0 or 1.
int64_t all_finite(Tensor x, int64_t isa) {
  const bool half = x.scalar_type() == torch::headeronly::ScalarType::Half;
  const int64_t bytes = half || dtype_of(x) == Dtype::bf16 ? 2 : 4;
  uint32_t exponent = bytes == 2 ? 0x7f80u : 0x7f800000u;
  if (half) exponent = 0x7c00u;
  return table(isa).all_finite(at(x), x.numel(), bytes, exponent);
}

// ---- what a decode step begins and ends with: see graph.py ----------------------------------------------------------------

// lens [B], going [B] (0: idle) -> positions [B] of the new tokens; kv_lens [B], lengths with them, 0 where idle; and for caches
// of slots[i] per sequence, rows [i, B] that they go to. An idle sequence writes where its next token will.
void decode_rows(Tensor lens, Tensor going, Tensor slots, Tensor positions, Tensor kv_lens, Tensor rows) {
  submit([=] {
    const int64_t batch = lens.numel();
    const auto *len = at<int32_t>(lens), *goes = at<int32_t>(going);
    for (int64_t b = 0; b < batch; ++b) {
      at<int64_t>(positions)[b] = len[b];
      at<int32_t>(kv_lens)[b] = goes[b] ? len[b] + 1 : 0;
      for (int64_t i = 0; i < slots.numel(); ++i) {
        const int64_t size = at<int64_t>(slots)[i];
        at<int64_t>(rows)[i * batch + b] = b * size + len[b] % size;
      }
    }
  });
}

void count_tokens(Tensor lens, Tensor going) {
  submit([=] {
    for (int64_t b = 0; b < lens.numel(); ++b) at<int32_t>(lens)[b] += at<int32_t>(going)[b];
  });
}

// ---- recordings: see recording.h ---------------------------------------------------------------------------------------

void record_start() {
  recording_now = std::make_unique<Recording>();  // one that an interrupt left open ends here
}
void record_drop() { recording_now.reset(); }

int64_t record_stop() {
  STD_TORCH_CHECK(recording_now, "this thread does not record");
  return recordings().keep(std::move(recording_now));
}
// seconds [calls] fp64: what each took.
void replay(int64_t number, Optional seconds) {
  const auto recording = recordings().find(number);
  STD_TORCH_CHECK(recording, "no such recording: ", number);
  if (!seconds) {
    for (const auto& work : *recording) work();
    return;
  }
  STD_TORCH_CHECK(seconds->numel() == static_cast<int64_t>(recording->size()), "seconds: expected ", recording->size());
  double* to = at<double>(seconds);
  for (const auto& work : *recording) {
    const auto start = std::chrono::steady_clock::now();
    work();
    *to++ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}
void release(int64_t number) { recordings().drop(number); }

STABLE_TORCH_LIBRARY(gemma4_fast_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, Tensor(a!) out, float eps, int isa) -> ()");
  m.def("norm_add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? scale, Tensor? next_weight, Tensor(a!) y, "
        "Tensor(b!)? z, float eps, int isa) -> ()");
  m.def("embedding(Tensor weight, Tensor? scale, Tensor ids, Tensor(a!) out, float by, int vocab, int isa) -> ()");
  m.def("rope_angles(Tensor positions, Tensor inv_freq, Tensor(a!) cos, Tensor(b!) sin, int isa) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? scale, Tensor(a!)? rounded, Tensor(b!) out, int isa) -> ()");
  m.def("geglu_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_scale, Tensor? down_scale, int inter, "
        "Tensor(a!)? rounded, Tensor(b!) h, Tensor(c!) out, int isa) -> ()");
  m.def("moe(Tensor x, Tensor topk_weights, Tensor ids, Tensor gate_up, Tensor down, Tensor? gate_up_scale, "
        "Tensor? down_scale, int inter, Tensor(a!)? rounded, Tensor(b!) h, Tensor(c!) sum, Tensor(d!) order, Tensor(e!) out, "
        "int isa) -> ()");
  m.def("expert_dispatch(Tensor ids, int block_m, Tensor(a!) order, Tensor(b!) offsets, Tensor(c!) tiles) -> ()");
  m.def("grouped_gemm(Tensor x, Tensor weight, Tensor order, Tensor offsets, int top_k, int epilogue, Tensor? topk_weights, "
        "Tensor(a!)? sum, Tensor(b!) out, int isa) -> ()");
  m.def("route_topk(Tensor x, Tensor scale, Tensor proj, Tensor per_expert_scale, Tensor(a!) weights, Tensor(b!) ids, "
        "Tensor(c!) normed, Tensor(d!) logits, float eps, int isa) -> ()");
  m.def("ple_gate(Tensor x, Tensor ple, Tensor gate, Tensor proj, Tensor weight, Tensor? scale, Tensor? next_weight, "
        "Tensor(a!) g, Tensor(b!) h, Tensor(c!) y, Tensor(d!)? z, float eps, int isa) -> ()");
  m.def("logits(Tensor x, Tensor weight, Tensor? scale, Tensor(a!)? rounded, int vocab, Tensor(b!)? out, Tensor(c!)? best, "
        "Tensor(d!)? best_of, Tensor(e!)? best_id, int tasks, float softcap, int isa) -> ()");
  m.def("qkv_norm_rope(Tensor qkv, Tensor q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int q_heads, int kv_heads, "
        "Tensor(a!) q, Tensor(b!)? k, Tensor(c!)? v, Tensor? slots, float eps, int isa) -> ()");
  m.def("gqa_decode(Tensor q, Tensor? k_cache, Tensor v_cache, Tensor kv_lens, Tensor? block_table, Tensor? k_weight, "
        "Tensor? tile_cos, Tensor? tile_sin, Tensor? within_cos, Tensor? within_sin, Tensor(a!) partial, Tensor(b!) out, "
        "int window, int splits, float scale, int isa) -> ()");
  m.def("gqa_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? k_cache, Tensor? v_cache, Tensor? prefix_lens, "
        "Tensor? block_table, Tensor? image_ids, Tensor? k_weight, Tensor? tile_cos, Tensor? tile_sin, Tensor? within_cos, "
        "Tensor? within_sin, Tensor(a!) out, int window, float scale, int isa) -> ()");
  m.def("decode_rows(Tensor lens, Tensor going, Tensor slots, Tensor(a!) positions, Tensor(b!) kv_lens, Tensor(c!) rows) -> ()");
  m.def("count_tokens(Tensor(a!) lens, Tensor going) -> ()");
  m.def("quantize_rows(Tensor source, Tensor(a!) data, Tensor(b!) scale, int first, int n, int parts, int isa) -> int");
  m.def("dequantize_rows(Tensor data, Tensor scale, Tensor(a!) out, int first, int n, int parts, int isa) -> ()");
  m.def("widened_linear(Tensor x, Tensor weight, Tensor? scale, Tensor(a!) out, int first, int n, int parts, int isa) -> ()");
  m.def("all_finite(Tensor x, int isa) -> int");
  m.def("record_start() -> ()");
  m.def("record_stop() -> int");
  m.def("record_drop() -> ()");
  m.def("replay(int recording, Tensor(a!)? seconds) -> ()");
  m.def("release(int recording) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemma4_fast_cpu, CompositeExplicitAutograd, m) {  // no tensor tells where they run
  m.impl("record_start", TORCH_BOX(&record_start));
  m.impl("record_stop", TORCH_BOX(&record_stop));
  m.impl("record_drop", TORCH_BOX(&record_drop));
  m.impl("replay", TORCH_BOX(&replay));
  m.impl("release", TORCH_BOX(&release));
}

STABLE_TORCH_LIBRARY_IMPL(gemma4_fast_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("norm_add_norm", TORCH_BOX(&norm_add_norm));
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("rope_angles", TORCH_BOX(&rope_angles));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("geglu_mlp", TORCH_BOX(&geglu_mlp));
  m.impl("moe", TORCH_BOX(&moe));
  m.impl("expert_dispatch", TORCH_BOX(&expert_dispatch));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("route_topk", TORCH_BOX(&route_topk));
  m.impl("ple_gate", TORCH_BOX(&ple_gate));
  m.impl("logits", TORCH_BOX(&logits));
  m.impl("qkv_norm_rope", TORCH_BOX(&qkv_norm_rope));
  m.impl("gqa_decode", TORCH_BOX(&gqa_decode));
  m.impl("gqa_prefill", TORCH_BOX(&gqa_prefill));
  m.impl("decode_rows", TORCH_BOX(&decode_rows));
  m.impl("count_tokens", TORCH_BOX(&count_tokens));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("dequantize_rows", TORCH_BOX(&dequantize_rows));
  m.impl("widened_linear", TORCH_BOX(&widened_linear));
  m.impl("all_finite", TORCH_BOX(&all_finite));
}

}  // namespace
}  // namespace gemma4_fast
