// The router, in one launch: see route_topk.cuh.

#include "cuda/route_topk.cuh"

namespace gemma4_fast::cuda {
namespace {

using namespace route;

template <class T, int kEach, bool kWhole>
KERNEL(kThreads, 1) route_topk_kernel(KERNEL_ARGS(RouteTopk) a) {
  route_block<T, kEach, kWhole>(a, block_index(), grid_size());
}

}  // namespace

void route_topk(const Stream& on, const RouteTopk& a) {
  by_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto start = [&](auto kernel, auto odd_kernel) {
      launch(on, {grid_of(a), kThreads, sizeof(Shared)}, whole(a) ? kernel : odd_kernel, a);
    };
    if (a.experts <= 128)
      start(route_topk_kernel<T, 4, true>, route_topk_kernel<T, 4, false>);
    else
      start(route_topk_kernel<T, kMostExperts / kWarp, true>, route_topk_kernel<T, kMostExperts / kWarp, false>);
  });
}

}  // namespace gemma4_fast::cuda
