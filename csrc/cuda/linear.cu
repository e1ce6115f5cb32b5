// linear, geglu_mlp's products and logits for few rows: see linear.cuh.

#include "cuda/linear.cuh"

namespace gemma4_fast::cuda {
namespace {

template <class T, int kBits, int kTokenTiles, bool kWhole>
KERNEL(kWarps* kWarp, (kBlocksAtOnce<kBits, kTokenTiles, kWhole>)) linear_kernel(KERNEL_ARGS(Linear) a) {
  linear_block<T, kBits, kTokenTiles, kWhole, true>(a, block_index().x, grid_size().x);
}

}  // namespace

void linear(const Stream& on, const Linear& args) {
  const Linear a = tiled(args);
  by_shape(a.dtype, a.bits, a.m, linear_whole(a), [&](auto type, auto bits, auto token_tiles, auto whole) {
    const auto kernel = linear_kernel<decltype(type), bits.value, token_tiles.value, whole.value>;
    launch(on, {{(int)linear_blocks(a)}, kWarps * kWarp, linear_shared(a, token_tiles.value)}, kernel, a);
  });
}

}  // namespace gemma4_fast::cuda
