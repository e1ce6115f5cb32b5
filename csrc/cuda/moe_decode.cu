// Routed experts of few tokens: see moe_decode.cuh.

#include "cuda/moe_decode.cuh"

namespace gemma4_fast::cuda {
namespace {

template <class T, int kBits, int kTokenTiles, bool kWhole>
KERNEL(kThreads, (kBlocksAtOnce<kBits, kTokenTiles, kWhole>)) gate_up_kernel(KERNEL_ARGS(MoeDecode) a) {
  gate_up_block<T, kBits, kTokenTiles, kWhole>(a, block_index().x, block_index().y);
}

template <class T, int kBits, int kTokenTiles, bool kWhole>
KERNEL(kThreads, kWhole ? 2 : 1) down_kernel(KERNEL_ARGS(MoeDecode) a) {
  down_block<T, kBits, kTokenTiles, kWhole>(a, block_index().x);
}

}  // namespace

void experts_gate_up(const Stream& on, const MoeDecode& a) {
  by_shape(a.dtype, a.bits, a.tokens, moe_whole(a), [&](auto type, auto bits, auto token_tiles, auto whole) {
    launch(on, gate_up_launch(a, token_tiles.value), gate_up_kernel<decltype(type), bits.value, token_tiles.value, whole.value>, a);
  });
}

void moe_decode(const Stream& on, const MoeDecode& a) {
  experts_gate_up(on, a);
  by_shape(a.dtype, a.bits, a.tokens, moe_whole(a), [&](auto type, auto bits, auto token_tiles, auto whole) {
    launch(on, down_launch(a, token_tiles.value), down_kernel<decltype(type), bits.value, token_tiles.value, whole.value>, a);
  });
}

}  // namespace gemma4_fast::cuda
