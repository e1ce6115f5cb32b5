// embedding: out[t] = weight[ids[t]] * scale.
//
// weight [vocab, hidden], floats, or 8 or 4 bits with an fp16 scale for each 32 columns; out [tokens, hidden], the product in fp32,
// rounded once. An id outside of [0, vocab) reads nothing and gives a row of NaN: a device cannot raise. Eight columns a thread,
// 128 threads a block: at one token the time is that of a launch and two trips to memory, for the id and for its row.

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {
namespace {

using namespace device;

constexpr int kBlock = 128;

// Columns [first, first + 8) of a row of a quantized matrix. See gemma4_fast/quant.py: panels of 16 rows, a word of each beside
// the others; 8 bits: four columns a word; 4 bits: eight, the first four in the low halves of the bytes.
template <int kBits>
DEVICE void load_quantized(float (&f)[8], const Embedding& a, int64_t row, int first) {
  const int64_t panel = row / 16;
  const int lane = row % 16, groups = divide_up(a.hidden, 32);
  const auto* words = static_cast<const uint32_t*>(a.weight) + (panel * groups * kBits + first * kBits / 32) * 16 + lane;
  const float scale = to_float(load(static_cast<const half*>(a.scales) + (panel * groups + first / 32) * 16 + lane));
  const uint32_t low = load(words), high = kBits == 8 ? load(words + 16) : low >> 4;
  const uint32_t mask = kBits == 8 ? 255 : 15;
  constexpr int kOffset = kBits == 8 ? 128 : 8;
  UNROLL for (int i = 0; i < 4; ++i) {
    f[i] = float(int(low >> 8 * i & mask) - kOffset) * scale;
    f[i + 4] = float(int(high >> 8 * i & mask) - kOffset) * scale;
  }
}

template <class T, int kBits, bool kWhole>
KERNEL(kBlock, 1) embedding_kernel(KERNEL_ARGS(Embedding) a) {
  const int64_t token = block_index().x;
  const int first = 8 * (block_index().y * kBlock + thread_index());
  if (first >= a.hidden) return;
  wait_for_inputs();
  const int64_t row = load(a.ids + token);
  float f[8];
  UNROLL for (int i = 0; i < 8; ++i) f[i] = bits_to_float(0x7fc00000u);  // NaN
  if (row >= 0 && row < a.vocab) {
    if constexpr (kBits > 0) load_quantized<kBits>(f, a, row, first);
    else to_floats<T>(f, load_eight<T, kWhole>(static_cast<const T*>(a.weight) + row * a.hidden, first, a.hidden));
  }
  UNROLL for (int i = 0; i < 8; ++i) f[i] *= a.scale;
  store_eight<T, kWhole>(static_cast<T*>(a.out) + token * a.hidden, first, a.hidden, from_floats<T>(f));
}

}  // namespace

void embedding(const Stream& on, const Embedding& a) {
  const bool whole = a.hidden % 8 == 0 && aligned(a.out) && (a.bits || aligned(a.weight));
  by_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto start = [&](auto kernel, auto odd_kernel) {
      launch(on, {{(int)a.tokens, divide_up(a.hidden, 8 * kBlock)}, kBlock}, whole ? kernel : odd_kernel, a);
    };
    if (a.bits == 0) start(embedding_kernel<T, 0, true>, embedding_kernel<T, 0, false>);
    if (a.bits == 4) start(embedding_kernel<T, 4, true>, embedding_kernel<T, 4, false>);
    if (a.bits == 8) start(embedding_kernel<T, 8, true>, embedding_kernel<T, 8, false>);
  });
}

}  // namespace gemma4_fast::cuda
