// The CUDA kernels as torch.ops.gemma4_fast_cuda.*, over torch's stable ABI: one binary for torch 2.10 and newer.
//
// Callers are gemma4_fast/ops/cuda_backend.py and cuda_attention.py: arguments come checked, tensors contiguous where kernels.h
// says so, outputs and scratch allocated, the device set. Each op ends with the stream, and whether its kernels may be launched
// early. Of torch's macros only those that its headers have since 2.10. With GEMMA4_EMULATED the same ops take CPU tensors, and
// the kernels are those of the library that `use` names: see tests/emulator.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "cuda/kernels.h"

#if defined(GEMMA4_EMULATED)
#include "library.h"
#endif

namespace gemma4_fast::cuda {
namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#if defined(GEMMA4_EMULATED)

// One call of an op: its kernels may touch the tensors that it names, and no other memory.
struct Call {
  Call() { emulated().forget(); }
  template <class T>
  T* note(const Tensor& x, bool writable, bool weight) {
    int64_t last = 0;
    for (int64_t i = 0; i < x.dim(); ++i) last += x.size(i) ? (x.size(i) - 1) * x.stride(i) : 0;
    if (x.numel()) emulated().allow(x.data_ptr(), (last + 1) * x.element_size(), writable, weight);
    return static_cast<T*>(x.data_ptr());
  }
  const Kernels& kernels() const { return *emulated().kernels; }
};

#else

const Kernels all_kernels = GEMMA4_ALL_KERNELS;

struct Call {
  template <class T>
  T* note(const Tensor& x, bool, bool) {
    return static_cast<T*>(x.data_ptr());
  }
  const Kernels& kernels() const { return all_kernels; }
};

#endif

// Of an op's call: `in` and `out` give its tensors' memory, `weight` that of what the launch before did not write and kernels may
// therefore read before their wait; `run` runs its kernels.
class Op : Call {
 public:
  Op(int64_t stream, bool early) : on_{reinterpret_cast<void*>(stream), early} {}

  template <class T = void>
  const T* in(const Tensor& x) {
    return note<T>(x, false, false);
  }
  template <class T = void>
  const T* in(const Optional& x) {
    return x ? note<T>(*x, false, false) : nullptr;
  }
  template <class T = void>
  const T* weight(const Tensor& x) {
    return note<T>(x, false, true);
  }
  template <class T = void>
  const T* weight(const Optional& x) {
    return x ? note<T>(*x, false, true) : nullptr;
  }
  template <class T = void>
  T* out(const Tensor& x) {
    return note<T>(x, true, false);
  }
  template <class T = void>
  T* out(const Optional& x) {
    return x ? note<T>(*x, true, false) : nullptr;
  }
  template <class Args>
  void run(void (*Kernels::*kernel)(const Stream&, const Args&), const Args& args) {
    (kernels().*kernel)(on_, args);
  }

 private:
  Stream on_;
};

Dtype dtype_of(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == torch::headeronly::ScalarType::BFloat16 || type == torch::headeronly::ScalarType::Half,
                  "the CUDA kernels take bfloat16 and float16");
  return type == torch::headeronly::ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

void rms_norm(Tensor x, Optional weight, Tensor out, double eps, int64_t stream, bool early) {
  Op op(stream, early);
  const int64_t hidden = x.size(-1);
  op.run<RmsNorm>(&Kernels::rms_norm, {dtype_of(x), op.in(x), op.weight(weight), op.out(out), x.numel() / hidden, (int)hidden, (float)eps});
}

void norm_add_norm(Tensor x, Optional experts, Tensor residual, Optional x_weight, Optional experts_weight, Tensor weight,
                   Optional scale, Optional next_weight, Optional other_weight, Tensor y, Optional z, Optional other_z, double eps,
                   int64_t stream, bool early) {
  Op op(stream, early);
  op.run<NormAddNorm>(&Kernels::norm_add_norm,
                      {dtype_of(x), op.in(x), op.in(experts), op.in(residual), op.weight(x_weight), op.weight(experts_weight), op.weight(weight),
                       op.weight(scale), op.weight(next_weight), op.weight(other_weight), op.out(y), op.out(z), op.out(other_z), x.size(0),
                       (int)x.size(1), (float)eps});
}

// 0 for floats; else what a weight's scale says: data [.., panels, groups * bits, 16, 4], scale [.., panels, groups, 16].
int bits_of(const Tensor& data, const Optional& scale) {
  return !scale ? 0 : data.size(-3) == 8 * scale->size(-2) ? 8 : 4;
}

// end: see Linear::End. other: for end gate. best, best_at, counter: for end argmax.
void linear(Tensor x, Tensor weight, Optional scale, int64_t n, int64_t end, double cap, Optional other, Optional best,
            Optional best_at, Optional counter, Tensor out, int64_t stream, bool early) {
  Op op(stream, early);
  op.run<Linear>(&Kernels::linear,
                 {dtype_of(x), (Linear::End)end, bits_of(weight, scale), op.in(x), op.weight(weight), op.weight(scale), op.out(out),
                  op.in(other), x.stride(0), other ? other->stride(0) : 0, n, (int)x.size(0), (int)x.size(1), (float)cap,
                  op.out<float>(best), op.out<int32_t>(best_at), op.out<uint32_t>(counter)});
}

// softcap, temperature: 0 for none; more than 0. logits [m, blocks * rows], most, sums [m, blocks]: fp32 scratch.
void sample(Tensor x, Tensor weight, Optional scale, int64_t n, Tensor uniform, double softcap, double temperature, int64_t top_k,
            double top_p, double min_p, Tensor logits, Tensor most, Tensor sums, Tensor out, int64_t stream, bool early) {
  Op op(stream, early);
  Sample a{};
  a.head.dtype = dtype_of(x), a.head.end = Linear::End::keep, a.head.bits = bits_of(weight, scale);
  a.head.x = op.in(x), a.head.weight = op.weight(weight), a.head.scale = op.weight(scale), a.head.x_stride = x.stride(0);
  a.head.n = n, a.head.m = (int)x.size(0), a.head.k = (int)x.size(1), a.head.cap = (float)softcap;
  a.head.kept = op.out<float>(logits), a.head.best = op.out<float>(most), a.head.sums = op.out<float>(sums);
  a.head.kept_stride = logits.size(1);
  a.head.by = (float)(1.4426950408889634 / temperature);
  a.uniform = op.in<float>(uniform), a.out = op.out(out);
  a.top_k = (int)top_k, a.top_p = (float)top_p, a.min_p = (float)min_p;
  op.run<Sample>(&Kernels::sample, a);
}

void moe_decode(Tensor x, Tensor topk_weights, Tensor ids, Tensor gate_up, Optional gate_up_scale, Tensor down,
                Optional down_scale, int64_t inter, Tensor h, Tensor out, int64_t stream, bool early) {
  Op op(stream, early);
  op.run<MoeDecode>(&Kernels::moe_decode,
                    {dtype_of(x), bits_of(down, down_scale), op.in(x), op.in<float>(topk_weights), op.in<int32_t>(ids),
                     op.weight(gate_up), op.weight(gate_up_scale), op.weight(down), op.weight(down_scale), op.out(h), op.out(out), (int)x.size(0),
                     (int)ids.size(1), (int)gate_up.size(0), (int)x.size(1), (int)inter});
}

void embedding(Tensor weight, Optional scales, Tensor ids, Tensor out, int64_t bits, int64_t vocab, double scale, int64_t stream,
               bool early) {
  Op op(stream, early);
  op.run<Embedding>(&Kernels::embedding, {dtype_of(out), op.weight(weight), op.in(scales), op.in<int64_t>(ids), op.out(out), out.size(0),
                                          vocab, (int)out.size(1), (int)bits, (float)scale});
}

void rope_angles(Tensor positions, Tensor inv_freq, Tensor cos, Tensor sin, int64_t stream, bool early) {
  Op op(stream, early);
  op.run<RopeAngles>(&Kernels::rope_angles, {op.in<int64_t>(positions), op.weight<float>(inv_freq), op.out<float>(cos),
                                             op.out<float>(sin), cos.size(0), (int)cos.size(1)});
}

void qkv_norm_rope(Tensor qkv, Tensor q_weight, Optional k_weight, Tensor cos, Tensor sin, Optional slots, Tensor q, Optional k,
                   Optional v, int64_t kv_heads, double eps, int64_t stream, bool early) {
  Op op(stream, early);
  const int64_t q_heads = q.size(1), dim = q.size(2), rows = v ? v->numel() / (kv_heads * dim) : 0;
  const bool k_is_v = qkv.size(1) == (q_heads + kv_heads) * dim;
  op.run<QkvNormRope>(&Kernels::qkv_norm_rope,
                      {dtype_of(qkv), op.in(qkv), op.weight(q_weight), op.weight(k_weight), op.in<float>(cos), op.in<float>(sin),
                       op.in<int64_t>(slots), op.out(q), op.out(k), op.out(v), q.size(0), rows, (int)q_heads, (int)kv_heads,
                       (int)dim, (int)cos.size(1), k_is_v, (float)eps});
}

void route_topk(Tensor x, Tensor scale, Tensor proj, Tensor per_expert_scale, Tensor sums, Tensor counters, Tensor weights,
                Tensor ids, double eps, int64_t stream, bool early) {
  Op op(stream, early);
  op.run<RouteTopk>(&Kernels::route_topk,
                    {dtype_of(x), op.in(x), op.weight(scale), op.weight(proj), op.in(per_expert_scale), op.out<float>(sums),
                     op.out<float>(weights), op.out<int32_t>(ids), op.out<uint32_t>(counters), (int)x.size(0), (int)x.size(1),
                     (int)proj.size(0), (int)ids.size(1), (float)eps});
}

// dense: h of the dense branch [tokens, n]; the rest as in those ops.
void moe_feed_forward(Tensor x, Tensor h, Tensor e, Tensor gate_up, Optional gate_up_scale, Tensor down, Optional down_scale,
                      Tensor router_scale, Tensor proj, Tensor per_expert_scale, Tensor experts_gate_up,
                      Optional experts_gate_up_scale, Tensor experts_down, Optional experts_down_scale, int64_t inter, Tensor sums,
                      Tensor counters, Tensor weights, Tensor ids, Tensor dense_h, Tensor dense, Tensor experts_h, Tensor experts,
                      double eps, int64_t stream, bool early) {
  Op op(stream, early);
  const int tokens = x.size(0), hidden = x.size(1), dense_inter = dense_h.size(1), top_k = ids.size(1);
  const Dtype dtype = dtype_of(x);
  const int bits = bits_of(down, down_scale);
  const auto product = [&](Linear::End end, const Tensor& from, const Tensor& w, const Optional& scale, const Tensor& to) {
    return Linear{dtype, end, bits, op.in(from), op.weight(w), op.weight(scale), op.out(to), nullptr, from.stride(0), 0, to.size(1), tokens,
                  (int)from.size(1), 0, nullptr, nullptr, nullptr};
  };
  MoeFeedForward a;
  a.route = {dtype, op.in(x), op.weight(router_scale), op.weight(proj), op.in(per_expert_scale), op.out<float>(sums),
             op.out<float>(weights), op.out<int32_t>(ids), op.out<uint32_t>(counters), tokens, hidden, (int)proj.size(0), top_k,
             (float)eps};
  a.gate_up = product(Linear::End::geglu, h, gate_up, gate_up_scale, dense_h);
  a.down = product(Linear::End::none, dense_h, down, down_scale, dense);
  a.experts = {dtype, bits, op.in(e), op.in<float>(weights), op.in<int32_t>(ids), op.weight(experts_gate_up),
               op.weight(experts_gate_up_scale), op.weight(experts_down), op.weight(experts_down_scale), op.out(experts_h), op.out(experts),
               tokens, top_k, (int)proj.size(0), hidden, (int)inter};
  op.run<MoeFeedForward>(&Kernels::moe_feed_forward, a);
}

void gqa_decode(Tensor q, Optional k_cache, Tensor v_cache, Tensor kv_lens, Optional block_table, Optional inv_freq,
                Optional k_weight, Tensor out, Tensor pieces, Tensor sums, Optional counters, int64_t window, double scale,
                int64_t cores, int64_t shared, int64_t shared_block, int64_t stream, bool early) {
  Op op(stream, early);
  const auto stride = [&](const Tensor& x, int i) { return static_cast<uint32_t>(x.stride(i) / 8); };
  GqaDecode a{};
  a.dtype = dtype_of(q);
  a.q = op.in(q), a.v = op.in(v_cache), a.lens = op.in(kv_lens), a.out = op.out(out);
  a.v_batch = stride(v_cache, 0), a.v_slot = stride(v_cache, 1), a.v_head = stride(v_cache, 2);
  if (k_cache) {
    a.k = op.in(*k_cache);
    a.k_batch = stride(*k_cache, 0), a.k_slot = stride(*k_cache, 1), a.k_head = stride(*k_cache, 2);
  } else {
    a.freq = op.weight<float>(inv_freq), a.k_weight = op.weight(k_weight), a.pairs = (int)inv_freq->size(0);
  }
  a.pieces = op.out(pieces), a.sums = op.out(sums), a.counters = op.out<uint32_t>(counters), a.capacity = (int)sums.size(0);
  a.batch = (int)q.size(0), a.heads = (int)q.size(1), a.kv_heads = (int)v_cache.size(2), a.dim = (int)q.size(2);
  a.slots = a.block_size = (int)v_cache.size(1);
  if (block_table) {
    a.table = op.in<int>(*block_table), a.table_stride = (int)block_table->stride(0);
    a.slots = a.block_size * (int)block_table->size(1);
  }
  a.window = window > 0 && window < a.slots ? (int)window : a.slots;
  a.scale = (float)scale, a.wide_lens = kv_lens.scalar_type() == torch::headeronly::ScalarType::Long;
  a.cores = (int)cores, a.shared = (int)shared, a.shared_block = (int)shared_block;
  op.run<GqaDecode>(&Kernels::gqa_decode, a);
}

STABLE_TORCH_LIBRARY(gemma4_fast_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, Tensor(a!) out, float eps, int stream, bool early) -> ()");
  m.def("norm_add_norm(Tensor x, Tensor? experts, Tensor residual, Tensor? x_weight, Tensor? experts_weight, Tensor weight, "
        "Tensor? scale, Tensor? next_weight, Tensor? other_weight, Tensor(a!) y, Tensor(b!)? z, Tensor(c!)? other_z, float eps, "
        "int stream, bool early) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? scale, int n, int end, float cap, Tensor? other, Tensor(a!)? best, "
        "Tensor(b!)? best_at, Tensor(c!)? counter, Tensor(d!) out, int stream, bool early) -> ()");
  m.def("sample(Tensor x, Tensor weight, Tensor? scale, int n, Tensor uniform, float softcap, float temperature, int top_k, "
        "float top_p, float min_p, Tensor(a!) logits, Tensor(b!) most, Tensor(c!) sums, Tensor(d!) out, int stream, bool early) "
        "-> ()");
  m.def("moe_decode(Tensor x, Tensor topk_weights, Tensor ids, Tensor gate_up, Tensor? gate_up_scale, Tensor down, "
        "Tensor? down_scale, int inter, Tensor(a!) h, Tensor(b!) out, int stream, bool early) -> ()");
  m.def("embedding(Tensor weight, Tensor? scales, Tensor ids, Tensor(a!) out, int bits, int vocab, float scale, int stream, "
        "bool early) -> ()");
  m.def("rope_angles(Tensor positions, Tensor inv_freq, Tensor(a!) cos, Tensor(b!) sin, int stream, bool early) -> ()");
  m.def("qkv_norm_rope(Tensor qkv, Tensor q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? slots, Tensor(a!) q, "
        "Tensor(b!)? k, Tensor(c!)? v, int kv_heads, float eps, int stream, bool early) -> ()");
  m.def("route_topk(Tensor x, Tensor scale, Tensor proj, Tensor per_expert_scale, Tensor(a!) sums, Tensor(b!) counters, "
        "Tensor(c!) weights, Tensor(d!) ids, float eps, int stream, bool early) -> ()");
  m.def("moe_feed_forward(Tensor x, Tensor h, Tensor e, Tensor gate_up, Tensor? gate_up_scale, Tensor down, Tensor? down_scale, "
        "Tensor router_scale, Tensor proj, Tensor per_expert_scale, Tensor experts_gate_up, Tensor? experts_gate_up_scale, "
        "Tensor experts_down, Tensor? experts_down_scale, int inter, Tensor(a!) sums, Tensor(b!) counters, Tensor(c!) weights, "
        "Tensor(d!) ids, Tensor(e!) dense_h, Tensor(f!) dense, Tensor(g!) experts_h, Tensor(h!) experts, float eps, int stream, "
        "bool early) -> ()");
  m.def("gqa_decode(Tensor q, Tensor? k_cache, Tensor v_cache, Tensor kv_lens, Tensor? block_table, Tensor? inv_freq, "
        "Tensor? k_weight, Tensor(a!) out, Tensor(b!) pieces, Tensor(c!) sums, Tensor(d!)? counters, int window, float scale, "
        "int cores, int shared, int shared_block, int stream, bool early) -> ()");
#if defined(GEMMA4_EMULATED)
  m.def("use(str library, int seed) -> ()");
  m.def("launches() -> int");
#endif
}

#if defined(GEMMA4_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(gemma4_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("use", TORCH_BOX(&use));
  m.impl("launches", TORCH_BOX(&launches));
}
STABLE_TORCH_LIBRARY_IMPL(gemma4_fast_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gemma4_fast_cuda, CUDA, m) {
#endif
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("norm_add_norm", TORCH_BOX(&norm_add_norm));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("moe_decode", TORCH_BOX(&moe_decode));
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("rope_angles", TORCH_BOX(&rope_angles));
  m.impl("qkv_norm_rope", TORCH_BOX(&qkv_norm_rope));
  m.impl("route_topk", TORCH_BOX(&route_topk));
  m.impl("moe_feed_forward", TORCH_BOX(&moe_feed_forward));
  m.impl("gqa_decode", TORCH_BOX(&gqa_decode));
}

}  // namespace
}  // namespace gemma4_fast::cuda
