// moe_feed_forward: both branches of a layer with experts, geglu_mlp(h) and moe_decode(e, route_topk(x)), in three launches
//
// All [tokens, hidden], tokens <= 16; at most 128 experts. Source: gemma4_fast.reference.ops.moe_feed_forward.
//
//   first   the router's blocks, and the dense branch's gate and up: the dense weights stream while the router's last block picks.
//   second  the experts' gate and up.
//   third   the experts' down, and the dense branch's.
// What a block does is what a block of those ops' own kernels does: see linear.cuh, moe_decode.cuh, route_topk.cuh. The shorter
// ones come last, so that they fill up what the longer ones leave.

#include "cuda/moe_decode.cuh"
#include "cuda/route_topk.cuh"

namespace gemma4_fast::cuda {
namespace {

template <class T, int kBits, int kTokenTiles, bool kWhole>
KERNEL(kThreads, kWhole ? 2 : 1) first_kernel(KERNEL_ARGS(MoeFeedForward) a) {
  const Dim grid = route::grid_of(a.route);
  const int routers = grid.x * grid.y * grid.z, block = block_index().x;
  if (block < routers)
    route::route_block<T, 4, kWhole>(a.route, {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y}, grid);
  else
    linear_block<T, kBits, kTokenTiles, kWhole, false>(a.gate_up, block - routers, grid_size().x - routers);
}

template <class T, int kBits, int kTokenTiles, bool kWhole>
KERNEL(kThreads, kWhole ? 2 : 1) third_kernel(KERNEL_ARGS(MoeFeedForward) a) {
  const int experts = divide_up(a.experts.hidden, kTileRows<kBits>), block = block_index().x;
  if (block < experts)
    down_block<T, kBits, kTokenTiles, kWhole>(a.experts, block);
  else
    linear_block<T, kBits, kTokenTiles, kWhole, false>(a.down, block - experts, grid_size().x - experts);
}

}  // namespace

void moe_feed_forward(const Stream& on, const MoeFeedForward& args) {
  MoeFeedForward a = args;
  a.gate_up = tiled(a.gate_up), a.down = tiled(a.down);
  const bool all_whole = linear_whole(a.gate_up) && linear_whole(a.down) && moe_whole(a.experts) && route::whole(a.route);
  const auto more = [](int x, int y) { return x > y ? x : y; };
  by_shape(a.experts.dtype, a.experts.bits, a.experts.tokens, all_whole, [&](auto type, auto bits, auto token_tiles, auto whole) {
    using T = decltype(type);
    const Dim grid = route::grid_of(a.route);
    const int routers = grid.x * grid.y * grid.z;
    const int shared = more(sizeof(route::Shared), linear_shared(a.gate_up, token_tiles.value));
    const Launch first = {{routers + (int)linear_blocks(a.gate_up)}, kThreads, shared};
    launch(on, first, first_kernel<T, bits.value, token_tiles.value, whole.value>, a);
    experts_gate_up(on, a.experts);
    const Launch down = down_launch(a.experts, token_tiles.value);
    const int most = more(down.shared, linear_shared(a.down, token_tiles.value));
    const Launch third = {{down.grid.x + (int)linear_blocks(a.down)}, kThreads, most};
    launch(on, third, third_kernel<T, bits.value, token_tiles.value, whole.value>, a);
  });
}

}  // namespace gemma4_fast::cuda
