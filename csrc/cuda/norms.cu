// rms_norm:       out = x / rms(x) * weight
// norm_add_norm:  y = (residual + x / rms(x) * weight) * scale,  z = y / rms(y) * next_weight, another z by other_weight
//   with experts: of x = x / rms(x) * x_weight + experts / rms(experts) * experts_weight
//
// Source: Gemma 2 (post-norms), Gemma 4. In fp32; y is rounded once, and z is the norm of y as rounded. One block a row, eight
// columns a thread: at batch 1 the time is that of a launch and one trip to memory, and weights make theirs before the wait.

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {
namespace {

using namespace device;

constexpr int kMost = 768;  // threads: rows of up to 6144

DEVICE float inverse_rms(float squares, int hidden, float eps, float* scratch, int warps) {
  return reciprocal_sqrt(block_sum(squares, scratch, warps) / hidden + eps);
}

template <class T, bool kWhole>
KERNEL(kMost, 1) rms_norm_kernel(KERNEL_ARGS(RmsNorm) a) {
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const int h = 8 * thread_index(), warps = divide_up(divide_up(a.hidden, 8), kWarp);
  const int64_t row = block_index().x * int64_t(a.hidden);
  Bytes16 weight = {};
  if (a.weight) weight = load_eight<T, kWhole, true>(static_cast<const T*>(a.weight), h, a.hidden);
  wait_for_inputs();
  float x[8], w[8];
  to_floats<T>(x, load_eight<T, kWhole>(static_cast<const T*>(a.x) + row, h, a.hidden));
  to_floats<T>(w, weight);
  const float by = inverse_rms(sum_of_squares(x), a.hidden, a.eps, scratch, warps);
  UNROLL for (int i = 0; i < 8; ++i) x[i] *= a.weight ? by * w[i] : by;
  store_eight<T, kWhole>(static_cast<T*>(a.out) + row, h, a.hidden, from_floats<T>(x));
}

// A row's eight values times 1 / rms(row) times weight.
template <class T>
DEVICE void normed(float (&x)[8], const Bytes16& weight, int hidden, float eps, float* scratch, int warps) {
  const float by = inverse_rms(sum_of_squares(x), hidden, eps, scratch, warps);
  float w[8];
  to_floats<T>(w, weight);
  UNROLL for (int i = 0; i < 8; ++i) x[i] *= by * w[i];
}

template <class T, bool kWhole>
KERNEL(kMost, 1) norm_add_norm_kernel(KERNEL_ARGS(NormAddNorm) a) {
  const int h = 8 * thread_index(), hidden = a.hidden, warps = divide_up(divide_up(hidden, 8), kWarp);
  auto* scratch = reinterpret_cast<float*>(shared_memory());  // [4][warps]: each sum its own, so that none waits for another
  const int64_t row = block_index().x * int64_t(hidden);
  const auto read = [&](const void* p) { return load_eight<T, kWhole>(static_cast<const T*>(p) + row, h, hidden); };
  const auto read_weight = [&](const void* p) {
    return p ? load_eight<T, kWhole, true>(static_cast<const T*>(p), h, hidden) : Bytes16{};
  };
  const auto write = [&](void* p, const Bytes16& v) { store_eight<T, kWhole>(static_cast<T*>(p) + row, h, hidden, v); };
  const Bytes16 weight = read_weight(a.weight), next = read_weight(a.next_weight), other = read_weight(a.other_weight);
  const Bytes16 x_weight = read_weight(a.x_weight), experts_weight = read_weight(a.experts_weight);
  wait_for_inputs();
  float x[8], y[8];
  to_floats<T>(x, read(a.x));
  const Bytes16 residual = read(a.residual);
  if (a.experts) {
    float experts[8];
    to_floats<T>(experts, read(a.experts));
    normed<T>(x, x_weight, hidden, a.eps, scratch, warps);
    normed<T>(experts, experts_weight, hidden, a.eps, scratch + warps, warps);
    UNROLL for (int i = 0; i < 8; ++i) x[i] += experts[i];
  }
  normed<T>(x, weight, hidden, a.eps, scratch + 2 * warps, warps);
  to_floats<T>(y, residual);
  const float scale = a.scale ? to_float(load(static_cast<const T*>(a.scale))) : 1.0f;
  UNROLL for (int i = 0; i < 8; ++i) y[i] = (y[i] + x[i]) * scale;
  const Bytes16 rounded = from_floats<T>(y);
  write(a.y, rounded);
  if (!a.next_weight && !a.other_weight) return;
  to_floats<T>(y, rounded);
  const float by = inverse_rms(sum_of_squares(y), hidden, a.eps, scratch + 3 * warps, warps);
  const auto write_normed = [&](void* p, const Bytes16& w) {
    float z[8];
    to_floats<T>(z, w);
    UNROLL for (int i = 0; i < 8; ++i) z[i] *= by * y[i];
    write(p, from_floats<T>(z));
  };
  if (a.next_weight) write_normed(a.z, next);
  if (a.other_weight) write_normed(a.other_z, other);
}

// kernel(T(), whole) with as many threads as a row has eights.
template <class Args, class Kernel>
void launch_rows(const Stream& on, const Args& a, int sums, bool whole, Kernel kernel) {
  const int warps = divide_up(divide_up(a.hidden, 8), kWarp);
  by_type(a.dtype, [&](auto type) {
    launch(on, {{(int)a.rows}, warps * kWarp, sums * warps * (int)sizeof(float)}, kernel(type, whole), a);
  });
}

}  // namespace

void rms_norm(const Stream& on, const RmsNorm& a) {
  const bool whole = a.hidden % 8 == 0 && aligned(a.x) && aligned(a.weight);
  launch_rows(on, a, 1, whole, [](auto type, bool whole) {
    using T = decltype(type);
    return whole ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>;
  });
}

void norm_add_norm(const Stream& on, const NormAddNorm& a) {
  bool whole = a.hidden % 8 == 0;
  for (const void* p : {a.x, a.experts, a.residual, a.x_weight, a.experts_weight, a.weight, a.next_weight, a.other_weight})
    whole = whole && aligned(p);
  launch_rows(on, a, 4, whole, [](auto type, bool whole) {
    using T = decltype(type);
    return whole ? norm_add_norm_kernel<T, true> : norm_add_norm_kernel<T, false>;
  });
}

}  // namespace gemma4_fast::cuda
