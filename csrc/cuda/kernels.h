// The CUDA kernels' arguments, and what launches them: all that csrc/cuda/torch_ops.cpp knows of them. Tensors are contiguous
// unless a stride is named; shapes, formulas and sources: gemma4_fast.reference.ops. Floats are `dtype`, unless said otherwise.
#pragma once

#include <cstdint>

namespace gemma4_fast::cuda {

enum class Dtype { bf16, f16 };

struct Stream {
  void* stream;
  bool early;  // kernels are launched while the ones before still run: see wait_for_inputs in device.cuh
};

struct RmsNorm {
  Dtype dtype;
  const void *x, *weight;  // [rows, hidden], [hidden] or null
  void* out;
  int64_t rows;
  int hidden;
  float eps;
};

// experts null: norm_add_norm of x; else moe_norm_add_norm of x, the dense branch, and experts.
struct NormAddNorm {
  Dtype dtype;
  const void *x, *experts, *residual;                             // [rows, hidden]
  const void *x_weight, *experts_weight;                          // [hidden], with experts alone
  const void *weight, *scale, *next_weight, *other_weight;        // [hidden], scale [1]; all but the first may be null
  void *y, *z, *other_z;                                          // [rows, hidden]
  int64_t rows;
  int hidden;
  float eps;
};

// x [m, k] with rows x_stride apart, m <= 16, times weight [n, k] (geglu: [2 n, k]) -> out [m, n]; see linear.cuh.
struct Linear {
  enum class End { none, softcap, geglu, gate, argmax, keep };
  Dtype dtype;
  End end;
  int bits;  // of weight's values: 0 for floats, else 8 or 4, see gemma4_fast.quant, with `scale`
  const void *x, *weight, *scale;
  void* out;          // argmax: int64 [m]
  const void* other;  // gate: [m, n], rows other_stride apart
  int64_t x_stride, other_stride, n;
  int m, k;
  float cap;
  // argmax: a largest of each block and token, [blocks, m], and the counter of the blocks that have theirs.
  float* best;
  int32_t* best_at;
  uint32_t* counter;
  // keep: the logits, [m, kept_stride], which is all blocks' rows, -inf behind n; of each block the largest, `best` [m, blocks],
  // and the sum of 2^((logit - largest) by). With cap, of 0 for none.
  float *kept, *sums;
  int64_t kept_stride;
  float by;
  // Set by `linear`: tiles of weight's rows, and whether a block's warps share one.
  int64_t tiles;
  bool shared;
};

// head: end keep. uniform [m] in [0, 1). out: int64 [m]. top_k 0: all, and then top_p and min_p are not looked at.
struct Sample {
  Linear head;
  const float* uniform;
  void* out;
  int top_k;
  float top_p, min_p;
  int blocks, rows;  // the launcher's: of the head, and logits of each
};

struct MoeDecode {
  Dtype dtype;
  int bits;       // of the weights' values, as in Linear
  const void* x;  // [tokens, hidden]
  const float* topk_weights;  // [tokens, top_k]
  const int32_t* ids;
  const void *gate_up, *gate_up_scale, *down, *down_scale;  // [experts, 2 inter, hidden], [experts, hidden, inter]
  void *h, *out;                                            // [tokens top_k, inter], [tokens, hidden]
  int tokens, top_k, experts, hidden, inter;
};

// weight: [vocab, hidden]; with bits a QuantizedWeight's bytes, and scales its scales, fp16: see gemma4_fast/quant.py.
struct Embedding {
  Dtype dtype;
  const void *weight, *scales;
  const int64_t* ids;  // [tokens]
  void* out;           // [tokens, hidden]
  int64_t tokens, vocab;
  int hidden, bits;
  float scale;
};

struct RopeAngles {
  const int64_t* positions;  // [tokens]
  const float* inv_freq;     // [pairs]
  float *cos, *sin;          // [tokens, pairs]
  int64_t tokens;
  int pairs;
};

// qkv [tokens, q_heads + n kv_heads, dim]: n = 2 packs q, k, v; n = 1 q and one projection that is K and V, which `k_is_v` says.
// k, v: [rows, kv_heads, dim], null if not wanted; slots [tokens] names their rows, null: the tokens'.
struct QkvNormRope {
  Dtype dtype;
  const void *qkv, *q_weight, *k_weight;  // weights [dim]
  const float *cos, *sin;                 // [tokens, pairs]
  const int64_t* slots;
  void *q, *k, *v;  // q [tokens, q_heads, dim]
  int64_t tokens, rows;
  int q_heads, kv_heads, dim, pairs;
  bool k_is_v;
  float eps;
};

// sums: scratch, fp32 [parts, tokens, experts + 1], a part for every 512 columns. counters: zeros, one for every 16 tokens.
struct RouteTopk {
  Dtype dtype;
  const void *x, *scale, *proj, *per_expert_scale;  // [tokens, hidden], [hidden], [experts, hidden], [experts]
  float *sums, *weights;                            // weights, ids [tokens, top_k]
  int32_t* ids;
  uint32_t* counters;
  int tokens, hidden, experts, top_k;
  float eps;
};

// The dense branch's two products, and the router and its experts, whose ids and weights are the router's.
struct MoeFeedForward {
  RouteTopk route;
  Linear gate_up, down;
  MoeDecode experts;
};

// k null: a V-only cache, of which keys are rebuilt by freq and k_weight. counters: one for each sequence and KV head (and each
// eight of its query heads), 0 as every launch leaves them; null: a second launch merges.
struct GqaDecode {
  Dtype dtype;
  const void *q, *k, *v;                             // [B, Hq, D]; [B, S, Hkv, D], or [blocks, block_size, Hkv, D] with table
  uint32_t k_batch, k_slot, k_head, v_batch, v_slot, v_head;  // the caches' strides but the last, which is 1: in 16 bytes
  const void* lens;                                  // [B] int32 or int64
  const int* table;                                  // [B, S / block_size] or null
  const float* freq;                                 // [pairs]
  const void* k_weight;                              // [D]
  void* out;                                         // [B, Hq, D]
  void *pieces, *sums;                               // scratch: see merge_kv.cuh
  uint32_t* counters;
  int capacity;                                      // pieces that the scratch has room for
  int batch, heads, kv_heads, dim, slots, block_size, table_stride, window, pairs;
  float scale;
  bool wide_lens;                                    // int64
  int cores, shared, shared_block;                   // multiprocessors, bytes of shared memory of one, and that a block may have
  int buffers, blocks;                               // the launcher's: of the ring, of the first launch
};

// Each op's launcher `void op(const Stream&, const Args&)`, in its own .cu file.
#define GEMMA4_CUDA_OPS(OP)       \
  OP(rms_norm, RmsNorm)           \
  OP(norm_add_norm, NormAddNorm)  \
  OP(linear, Linear)              \
  OP(sample, Sample)              \
  OP(moe_decode, MoeDecode)       \
  OP(embedding, Embedding)        \
  OP(rope_angles, RopeAngles)     \
  OP(qkv_norm_rope, QkvNormRope)  \
  OP(route_topk, RouteTopk)       \
  OP(moe_feed_forward, MoeFeedForward) \
  OP(gqa_decode, GqaDecode)

#define GEMMA4_DECLARE(op, Args) void op(const Stream& on, const Args& a);
GEMMA4_CUDA_OPS(GEMMA4_DECLARE)
#undef GEMMA4_DECLARE

struct Kernels {
#define GEMMA4_MEMBER(op, Args) void (*op)(const Stream&, const Args&);
  GEMMA4_CUDA_OPS(GEMMA4_MEMBER)
#undef GEMMA4_MEMBER
};

#define GEMMA4_ENTRY(op, Args) &op,
#define GEMMA4_ALL_KERNELS {GEMMA4_CUDA_OPS(GEMMA4_ENTRY)}

}  // namespace gemma4_fast::cuda
