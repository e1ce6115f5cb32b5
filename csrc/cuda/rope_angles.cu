// rope_angles: cos[t, i], sin[t, i] = cos, sin(positions[t] * inv_freq[i]), fp32 [tokens, pairs].
//
// Source: RoFormer (Su et al. 2021). A block a token, a thread a pair: the time is that of a launch and one trip to memory.

#include "cuda/device.cuh"

namespace gemma4_fast::cuda {
namespace {

using namespace device;

constexpr int kMost = 256;  // threads

KERNEL(kMost, 1) rope_angles_kernel(KERNEL_ARGS(RopeAngles) a) {
  const int64_t token = block_index().x;
  const int i = block_index().y * kMost + thread_index();
  if (i >= a.pairs) return;
  wait_for_inputs();
  const auto [cos, sin] = cos_sin(load(a.positions + token), load(a.inv_freq + i));
  store(a.cos + token * a.pairs + i, cos);
  store(a.sin + token * a.pairs + i, sin);
}

}  // namespace

void rope_angles(const Stream& on, const RopeAngles& a) {
  const int threads = a.pairs < kMost ? divide_up(a.pairs, kWarp) * kWarp : kMost;
  launch(on, {{(int)a.tokens, divide_up(a.pairs, kMost)}, threads}, rope_angles_kernel, a);
}

}  // namespace gemma4_fast::cuda
