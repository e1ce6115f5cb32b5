// The table of this instruction set's kernels: see kernels.h.
#include "cpu/kernels.h"

#define GEMMA4_TEXT_(x) #x
#define GEMMA4_TEXT(x) GEMMA4_TEXT_(x)

namespace gemma4_fast {
namespace GEMMA4_ISA {

void rms_norm(const RmsNorm&);
void norm_add_norm(const NormAddNorm&);
void embedding(const Embedding&);
void rope_angles(const RopeAngles&);
void linear(const Linear&);
void geglu_mlp(const GegluMlp&);
void moe(const Moe&);
void grouped_gemm(const GroupedGemm&);
void route_topk(const RouteTopk&);
void ple_gate(const PleGate&);
void logits(const Logits&);
void qkv_norm_rope(const QkvNormRope&);
void gqa_decode(const GqaDecode&);
void gqa_prefill(const GqaPrefill&);
bool quantize_rows(const QuantizeRows&);
void dequantize_rows(const DequantizeRows&);
void widened_linear(const WidenedLinear&);
bool all_finite(const void*, int64_t, int64_t, uint32_t);

extern const Kernels kernels;
const Kernels kernels = {GEMMA4_TEXT(GEMMA4_ISA), rms_norm, norm_add_norm, embedding, rope_angles, linear, geglu_mlp, moe,
                         grouped_gemm, route_topk, ple_gate, logits, qkv_norm_rope, gqa_decode, gqa_prefill, quantize_rows,
                         dequantize_rows, widened_linear, all_finite};

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
