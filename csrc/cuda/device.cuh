// The device layer: what a kernel asks of the GPU, under one name each. Kernels are written over this alone, so that they read
// like their formula, and so that the same source runs on a CPU: with GEMMA4_EMULATED the first half of this file is
// tests/emulator/emulator.h, where threads are fibers. PTX is written here and nowhere else.
//
// A kernel is `template <...> KERNEL(threads, blocks) name(KERNEL_ARGS(Args) a)`: at most `threads` in a block, `blocks` of
// them at once on a multiprocessor. What it may assume of memory:
//   load        of what earlier launches wrote; never of what this launch writes. Only after wait_for_inputs().
//   load_weight of what the launch before did not write, a weight: allowed before wait_for_inputs(), past the L1 cache.
//   load_fresh  of what other blocks of this launch wrote, after `last_to_arrive` said so.
//   store       seen by the block after a barrier, by other blocks after `fence`, by the next launch at the end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels.h"

#if defined(GEMMA4_EMULATED)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define DEVICE __device__ __forceinline__
#define ANYWHERE __host__ __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define KERNEL_ARGS(type) const __grid_constant__ type
#define UNROLL _Pragma("unroll")

namespace gemma4_fast::device {

using bf16 = __nv_bfloat16;
using half = __half;

struct Dim {
  int x = 1, y = 1, z = 1;
};

DEVICE int thread_index() { return threadIdx.x; }
// x, but what follows from it is computed behind this, not kept in registers from before.
DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE Dim block_index() { return {(int)blockIdx.x, (int)blockIdx.y, (int)blockIdx.z}; }
DEVICE Dim grid_size() { return {(int)gridDim.x, (int)gridDim.y, (int)gridDim.z}; }

// ---- numbers ----
template <class T>
DEVICE float2 unpack(uint32_t pair);
template <>
DEVICE float2 unpack<bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
DEVICE float2 unpack<half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<half2*>(&pair));
}
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
  auto pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
DEVICE uint32_t pack<half>(float low, float high) {
  auto pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
// a - b of two pairs. Exact where the result has few digits, as in unpacking weights.
template <class T>
DEVICE uint32_t subtract(uint32_t a, uint32_t b);
template <>
DEVICE uint32_t subtract<bf16>(uint32_t a, uint32_t b) {
  auto d = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<uint32_t*>(&d);
}
template <>
DEVICE uint32_t subtract<half>(uint32_t a, uint32_t b) {
  auto d = __hsub2(*reinterpret_cast<half2*>(&a), *reinterpret_cast<half2*>(&b));
  return *reinterpret_cast<uint32_t*>(&d);
}
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE float to_float(half x) { return __half2float(x); }
DEVICE float to_float(float x) { return x; }
DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
// Bytes `selector`'s four nibbles name, of the eight that a (0 ... 3) and b (4 ... 7) hold.
DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float exp2_fast(float x) {  // 2^x to 2 ulp; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEVICE float sin_fast(float x) { return __sinf(x); }  // these two: |x| <= pi, to 2^-21
DEVICE float cos_fast(float x) { return __cosf(x); }
DEVICE float divide(float a, float b) { return __fdividef(a, b); }  // 2 ulp, |b| < 2^126

// ---- memory ----
struct alignas(16) Bytes16 {
  uint32_t w[4];
};
struct alignas(8) Bytes8 {
  uint32_t w[2];
};
extern __shared__ char4 shared_bytes[];
DEVICE char* shared_memory() { return reinterpret_cast<char*>(shared_bytes); }

// None of these is `nc`: that promises memory which nobody writes while this launch is there, and the launch before may; and it
// lets the compiler move a load to either side of wait_for_inputs(), as it does.
template <class T>
DEVICE T load(const T* at) {
  return *at;
}
template <>
DEVICE Bytes16 load(const Bytes16* at) {
  const uint4 v = *reinterpret_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}
// Volatile, so that the compiler too leaves it before the wait that it stands before.
DEVICE Bytes16 load_weight(const Bytes16* at) {
  Bytes16 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(at));
  return v;
}
DEVICE Bytes8 load_weight(const Bytes8* at) {
  Bytes8 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(at));
  return v;
}
DEVICE uint32_t load_weight(const uint32_t* at) {
  uint32_t v;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}
DEVICE uint16_t load_weight(const uint16_t* at) {
  uint16_t v;
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(at));
  return v;
}
template <class T>
DEVICE T load_fresh(const T* at) {
  return __ldcg(at);
}
template <>
DEVICE Bytes16 load_fresh(const Bytes16* at) {
  uint4 v = __ldcg(reinterpret_cast<const uint4*>(at));
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
DEVICE void store(T* at, T value) {
  *at = value;
}
template <>
DEVICE void store(Bytes16* at, Bytes16 v) {
  *reinterpret_cast<uint4*>(at) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
template <>
DEVICE void store(Bytes8* at, Bytes8 v) {
  *reinterpret_cast<uint2*>(at) = make_uint2(v.w[0], v.w[1]);
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void fence() { __threadfence(); }
// The counter before: it goes up by one, from `last` back to 0.
DEVICE uint32_t count_up(uint32_t* counter, uint32_t last) { return atomicInc(counter, last); }

// 16 bytes from global to shared memory, past the L1 cache and without a register: of what load and load_fresh may read; zeros if
// not `real`. Arrived after commit_copies, wait_for_copies and, for other threads' copies, a barrier.
DEVICE void copy_async(void* shared, const void* global, bool real) {
  const uint32_t to = __cvta_generic_to_shared(shared);
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int newest>  // all but so many of the groups committed last have arrived
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Programmatic dependent launch. Until wait_for_inputs() only load_weight is allowed: the launch before may still be running.
// Each kernel calls it, in every thread that reads or writes memory, and so has waited for all launches before.
DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- a warp ----
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int shuffle(int x, int from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE uint32_t shuffle(uint32_t x, int from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE float shuffle(float x, int from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE int count_bits(uint32_t x) { return __popc(x); }
DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE uint32_t warp_min(uint32_t x) { return __reduce_min_sync(0xffffffffu, x); }
DEVICE uint32_t warp_add(uint32_t x) { return __reduce_add_sync(0xffffffffu, x); }

// d [16, 8] += a [16, 16] b [16, 8] in fp32, for the whole warp. Of lane 4 g + c (mma.m16n8k16 in the PTX manual):
//   a: (row g, columns 2c and 2c + 1), (g + 8, the same), (g, 2c + 8 and + 9), (g + 8, the same)
//   b: (rows 2c and 2c + 1, column g), (2c + 8 and + 9, g)      d: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma<half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d [16, 8] += a [16, 8] b [8, 8]: of a and b the upper 19 bits (tf32: the exponents of fp32, 11 significant bits), products and
// sums in fp32. Of lane 4 g + c (mma.m16n8k8):
//   a: (row g, column c), (g + 8, c), (g, c + 4), (g + 8, c + 4)      b: (row c, column g), (c + 4, g)      d: as above
DEVICE void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// Four 8 x 8 matrices of 16-bit values from shared memory. Lane 8 i + r names row r of matrix i (16 bytes, aligned); lane 4 g + c
// gets of each its row g, columns 2c and 2c + 1; transposed: its rows 2c and 2c + 1, column g.
DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  const uint32_t at = __cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  const uint32_t at = __cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}

// ---- from the host ----
struct Launch {
  Dim grid;
  int threads;
  int shared = 0;  // bytes
};
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Args>
void launch(const cuda::Stream& on, const Launch& size, void (*kernel)(const Args), const Args& args) {
  if (size.shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size.shared));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(size.grid.x, size.grid.y, size.grid.z);
  config.blockDim = dim3(size.threads);
  config.dynamicSmemBytes = size.shared;
  config.stream = static_cast<cudaStream_t>(on.stream);
  config.attrs = &attribute;
  config.numAttrs = on.early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace gemma4_fast::device
#endif

// ---- made of the above, on both ----
namespace gemma4_fast::device {

constexpr int kWarp = 32;

DEVICE int lane_index() { return thread_index() % kWarp; }
DEVICE int warp_index() { return thread_index() / kWarp; }

// Of a value of each lane, the sum in one order for every lane; or of each group of `lanes`.
template <int lanes = kWarp>
DEVICE float warp_sum(float x) {
  UNROLL for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Of a value of each of `warps` warps' threads, in one order; `scratch`: `warps` floats of shared memory that nothing else uses
// before the next barrier.
DEVICE float block_sum(float x, float* scratch, int warps) {
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_block();
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  return sum;
}

// Whether this block is the last of `count` that say so of this counter, which then is as it was; what the others stored before
// is there for load_fresh. `flag`: a word of shared memory. For all threads of the block.
DEVICE bool last_to_arrive(uint32_t* counter, uint32_t count, uint32_t* flag) {
  sync_block();
  if (thread_index() == 0) {
    fence();
    *flag = count_up(counter, count - 1);
    fence();
  }
  sync_block();
  return *flag == count - 1;
}

constexpr float kLog2e = 1.4426950408889634f;

DEVICE float infinity() { return bits_to_float(0x7f800000u); }

// Integers in the order of floats, 1 and up; NaN is the largest.
DEVICE uint32_t to_key(float x) {
  const uint32_t bits = float_to_bits(x + 0.0f);  // no -0, which equals 0
  return x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float from_key(uint32_t key) { return bits_to_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// x * sigmoid(2 u) is 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
DEVICE float gelu_tanh(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return divide(x, 1.0f + exp2_fast(-2.0f * kLog2e * u));
}

struct CosSin {
  float cos, sin;
};

// Of `position` times `freq`, radians. The product and its reduction to a quarter turn are in fp64, so that positions of 2^18
// and more lose nothing; then Taylor polynomials on [-pi/4, pi/4]. No branches: a library's cos has one, and a stack for it.
DEVICE CosSin cos_sin(int64_t position, float freq) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 2^52: a double of this size has no digits behind the point
  const double angle = double(position) * double(freq);
  const double quarter = angle * 0.6366197723675814 + kRound - kRound;
  const float r = float(angle - quarter * 1.5707963267948966), s = r * r;
  const int turn = int(int64_t(quarter) & 3);
  const float sin = r + r * s * (-1.6666667e-1f + s * (8.333333e-3f + s * (-1.9841270e-4f + s * 2.7557319e-6f)));
  const float cos = 1.0f + s * (-0.5f + s * (4.1666668e-2f + s * (-1.3888889e-3f + s * (2.4801587e-5f + s * -2.7557319e-7f))));
  const float c = turn % 2 ? sin : cos, d = turn % 2 ? cos : sin;
  return {turn == 1 || turn == 2 ? -c : c, turn >= 2 ? -d : d};
}

ANYWHERE int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace gemma4_fast::device
