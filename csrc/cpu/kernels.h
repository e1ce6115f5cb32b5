// The kernels of the CPU backend: what each takes, and the table of them that each instruction set has.
//
// Pointers are to contiguous rows unless a stride says otherwise. T num_tokens, H hidden_size, K and N a product's inner and
// outer size, I intermediate size, E num_experts, D head_dim. Formulas: gemma4_fast/reference/ops.py, same names.
#pragma once

#include <cstdint>

namespace gemma4_fast {

struct bf16 {
  uint16_t bits;
};

constexpr int64_t kMaxHeadDim = 512;  // heads lie on the stack in places
constexpr int64_t kDecodeSplit = 256;  // slots of a cache that one task of gqa_decode takes
constexpr int64_t kKeyTile = 64;       // keys that the attention ops take at once, and the step of the tile angles

enum class Dtype : int { f32, bf16 };

struct RmsNorm {
  Dtype dtype;
  const void *x, *weight;  // [rows, H], [H] or null
  void* out;
  int64_t rows, hidden;
  float eps;
};

struct NormAddNorm {
  Dtype dtype;
  const void *x, *residual, *weight, *scale, *next_weight;  // [T, H] twice, [H], [1] or null, [H] or null
  void *y, *z;                                              // [T, H]; z is null without next_weight
  int64_t tokens, hidden;
  float eps;
};

// What makes a weight a quantized one: `weight` is then uint8 panels (see quantized.h), of rows that are filled up to 16.
struct Quantized {
  const uint16_t* scale;  // fp16 [.., panels, groups, 16], or null for a weight of floats
  int64_t groups;         // of 32 columns
  int bits;               // 8 or 4
};
constexpr int kRoundedGroup = 40;  // bytes of scratch for 32 values of x, rounded to 8 bits

struct Embedding {
  Dtype dtype;  // of out, and of a weight of floats
  const void* weight;   // [V, H]
  const int64_t* ids;   // [T]
  void* out;            // [T, H]
  int64_t tokens, hidden;
  float by;
  Quantized q;
};

struct RopeAngles {
  const int64_t* positions;  // [T]
  const float* inv_freq;     // [pairs]
  float *cos, *sin;          // [T, pairs]
  int64_t tokens, pairs;
};

struct Linear {
  Dtype dtype;
  const void *x, *weight;  // [T, K], [N, K]
  void* out;               // [T, N]
  int64_t tokens, n, k;
  Quantized q;
  void* rounded;  // scratch of a quantized weight: x
};

// Rows [first, first + rows) of a weight [n, k] in `parts`, from source [rows, k].
struct QuantizeRows {
  Dtype dtype;
  const void* source;
  void* data;       // uint8 [panels, groups * bits, 16, 4]
  uint16_t* scale;  // fp16 [panels, groups, 16]
  int64_t rows, stride, first, n, k, groups, parts;
  int bits;
};

// The way back: the same rows, to out [rows, k].
struct DequantizeRows {
  Dtype dtype;  // of out
  const void* data;
  const uint16_t* scale;
  void* out;
  int64_t rows, first, n, k, groups, parts;
  int bits;
};

// out = x w^T: x [tokens, k] and out [tokens, rows] fp32, the weight bf16 [rows, k], or rows [first, first + rows) of a
// quantized one [n, k] in `parts`.
constexpr int64_t kWidenedRows = 64;  // tokens at most
struct WidenedLinear {
  const float* x;
  const void* weight;
  float* out;
  int64_t tokens, rows, k;
  int64_t stride;  // of a bf16 weight's rows
  Quantized q;
  int64_t first, n, parts;
};

struct GegluMlp {
  Dtype dtype;
  const void *x, *gate_up, *down;  // [T, H], [2I, H], [H, I]
  void *h, *out;                   // scratch [T, I], or rounded h; [T, H]
  int64_t tokens, hidden, inter;
  Quantized q_gate_up, q_down;  // both or none
  void* rounded;
};

struct Moe {
  Dtype dtype;
  const void *x, *gate_up, *down;  // [T, H], [E, 2I, H], [E, H, I]
  const float* topk_weights;       // [T, K]
  const int32_t* ids;              // [T, K]
  void *h, *out;                   // scratch [T * K, I], or rounded h; [T, H]
  float* sum;                      // scratch [T, H]
  int32_t *order, *offsets;        // scratch [T * K], [E + 1]
  int64_t tokens, top_k, experts, hidden, inter;
  Quantized q_gate_up, q_down;
  void* rounded;
};

struct GroupedGemm {
  Dtype dtype;
  const void *x, *weight;          // see the reference
  const int32_t *order, *offsets;  // [M], [E + 1]
  const float* topk_weights;       // [T, K] for the epilogue "combine"
  void* out;
  float* sum;  // scratch [T, N] for "combine"
  int64_t rows, top_k, experts, n, k;
  int epilogue;  // 0 none, 1 geglu, 2 combine
};

struct RouteTopk {
  Dtype dtype;
  const void *x, *scale, *proj, *per_expert_scale;  // [T, H], [H], [E, H], [E]
  float* weights;                                   // [T, K]
  int32_t* ids;                                     // [T, K]
  float *normed, *logits;                           // scratch [T, H], [T, E]
  int64_t tokens, hidden, experts, top_k;
  float eps;
};

struct PleGate {
  Dtype dtype;
  const void *x, *ple, *gate, *proj;  // [T, H], [T, P] with ple_stride, [P, H], [H, P]
  void *g, *h;                        // scratch [T, P], [T, H]
  NormAddNorm norm;                   // of h
  int64_t tokens, hidden, size, ple_stride;
};

struct Logits {
  Dtype dtype;
  const void *x, *weight;  // [T, H], [V, H]
  void* out;               // [T, V], or null for the argmax
  int64_t* best;           // [T]
  float* best_of;          // scratch: [T, tasks] values
  int64_t* best_id;        // scratch: [T, tasks] ids
  int64_t tokens, vocab, hidden, tasks;
  float softcap;  // 0: none
  Quantized q;
  void* rounded;
};

struct QkvNormRope {
  Dtype dtype;
  const void *qkv, *q_weight, *k_weight;  // [T, (Hq + n Hkv) D], [D], [D]
  const float *cos, *sin;                 // [T, pairs]
  void *q, *k, *v;                        // [T, Hq, D]; [T, Hkv, D] or a cache's rows; k may be null
  const int64_t* slots;                   // [T], rows of the cache, or null
  int64_t tokens, q_heads, kv_heads, dim, pairs, projections;
  float eps;
};

// A cache: slot s of sequence b is row s of k[b], or row s % block_size of k[block_table[b][s / block_size]]; and so v.
struct Cache {
  const void *k, *v;           // [B, S, Hkv, D] or [num_blocks, block_size, Hkv, D]; k is null for a V-only cache
  const int32_t* block_table;  // [B, blocks] or null
  int64_t slots, block_size, blocks;
  const void* k_weight;        // [D] in the cache's dtype, of a V-only cache
  const float *tile_cos, *tile_sin;      // [tiles, pairs]: angles of the tiles' first positions
  const float *within_cos, *within_sin;  // [tile, pairs]: angles of positions inside a tile
  int64_t pairs;
};

struct GqaDecode {
  Dtype dtype;
  const void* q;  // [B, Hq, D]
  Cache cache;
  const int32_t* kv_lens;  // [B]
  void* out;               // [B, Hq, D]
  float* partial;          // scratch
  int64_t batch, q_heads, kv_heads, dim, window, splits;  // window 0: none
  float scale;
};

struct GqaPrefill {
  Dtype dtype;
  const void *q, *k, *v;      // [T, Hq, D], [T, Hkv, D] twice
  const int32_t* cu_seqlens;  // [B + 1]
  Cache cache;                // v null: no prefix
  const int32_t* prefix_lens;  // [B]
  const int32_t* image_ids;    // [T] or null
  void* out;
  int64_t batch, q_heads, kv_heads, dim, window;
  float scale;
};

// Counting sort of (token, expert) pairs by expert, stable, so that an expert sees its tokens in order: sorted row r is pair
// order[r] [pairs], expert e owns rows offsets[e] .. offsets[e + 1] [experts + 1]. An id outside of [0, experts) is no expert
// here, but another device's: those pairs come last, behind offsets[experts].
static inline void sort_by_expert(const int32_t* ids, int64_t pairs, int64_t experts, int32_t* order, int32_t* offsets) {
  for (int64_t e = 0; e <= experts; ++e) offsets[e] = 0;
  const auto here = [=](int64_t p) { return ids[p] >= 0 && ids[p] < experts; };
  for (int64_t p = 0; p < pairs; ++p)
    if (here(p)) ++offsets[ids[p] + 1];
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  int32_t elsewhere = offsets[experts];
  for (int64_t p = 0; p < pairs; ++p) order[here(p) ? offsets[ids[p]]++ : elsewhere++] = static_cast<int32_t>(p);
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

struct Kernels {
  const char* name;
  void (*rms_norm)(const RmsNorm&);
  void (*norm_add_norm)(const NormAddNorm&);
  void (*embedding)(const Embedding&);
  void (*rope_angles)(const RopeAngles&);
  void (*linear)(const Linear&);
  void (*geglu_mlp)(const GegluMlp&);
  void (*moe)(const Moe&);
  void (*grouped_gemm)(const GroupedGemm&);
  void (*route_topk)(const RouteTopk&);
  void (*ple_gate)(const PleGate&);
  void (*logits)(const Logits&);
  void (*qkv_norm_rope)(const QkvNormRope&);
  void (*gqa_decode)(const GqaDecode&);
  void (*gqa_prefill)(const GqaPrefill&);
  bool (*quantize_rows)(const QuantizeRows&);  // false: a value is not finite, or too large for a scale in fp16
  void (*dequantize_rows)(const DequantizeRows&);
  void (*widened_linear)(const WidenedLinear&);
  // Numbers of 2 or 4 bytes. One whose exponent, these bits, is all ones is infinite or no number.
  bool (*all_finite)(const void* values, int64_t size, int64_t bytes, uint32_t exponent);
};

// ---- threads -----------------------------------------------------------------------------------------------------------

// torch.get_num_threads().
int num_threads();

}  // namespace gemma4_fast
