// The device layer on a CPU: what csrc/cuda/device.cuh gives a kernel on a GPU, for kernels that are compiled for the host.
//
// Threads are fibers, blocks run one after the other. It is made to be as unkind as the hardware is allowed to be:
//   order       a thread runs until it must wait; who goes on is drawn by the seed, anew at every barrier, and so is the order of
//               the blocks. A warp may so run far ahead of another.
//   shared      memory holds NaN when a block begins.
//   copy_async  fills its target with NaN at once, and brings the bytes when its group is waited for, no sooner.
//   store       reaches the block at its next barrier, other blocks by a fence, others at the end of the launch; so does what is
//               fenced only when the block has counted itself.
//   load        of what another block of this launch stored, without load_fresh, is an error; so is any access to global memory
//               outside the op's tensors (`allow`), to shared memory outside the block's, or unaligned; an access to what may
//               not be there yet, before wait_for_inputs(); and a barrier or a warp's exchange that some thread does not come to.
// Blocks do not run beside each other, nor do launches: what only that would show (a fence after the count, a counter in use by
// two launches) is not seen. The first error ends the launch, and is thrown from it. Plain loads from outside of shared memory are
// seen by AddressSanitizer alone.
#pragma once

#include "cuda/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define DEVICE inline
#define ANYWHERE inline
#define KERNEL(threads, blocks) void
#define KERNEL_ARGS(type) const type
#define UNROLL

// CUDA's own.
struct float2 {
  float x, y;
};

namespace gemma4_fast::device {

struct Dim {
  int x = 1, y = 1, z = 1;
};

}  // namespace gemma4_fast::device

namespace gemma4_fast::emulator {

using device::Dim;

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kMostShared = 232448, kGuardBytes = 16 << 10;
constexpr unsigned char kGuard = 0xa5;

struct Range {
  uintptr_t begin, end;
  bool writable, weight;  // a weight may be read before wait_for_inputs()
};

// A store that not everyone sees yet.
struct Store {
  uintptr_t at;
  uint32_t bytes;
  unsigned char data[16];
  bool late = false;  // the block has counted itself since, without a fence between: no later fence brings it in time
};

struct Copy {
  char* to;
  const char* from;
  bool real;
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  std::vector<Store> stores;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is not committed yet
  int place = 0;  // in the order of who goes first
  bool ended = false, has_inputs = false;
  const char* waits_for = "";
};

struct Warp {
  void* slots[kWarp] = {};
  int arrived = 0;
  const char* what = nullptr;
};

// One for each thread of the host.
struct Machine {
  uint64_t seed = 0;
  int64_t launches = 0;
  void (*watch)(const void* kernel, int threads, int shared) = nullptr;  // is told of a launch instead of its being run
  std::vector<Range> allowed;
  std::string error;

  // The launch.
  std::function<void()> kernel;
  Dim grid, block;
  int block_number = 0, threads = 0;
  std::unordered_map<uintptr_t, int> written;  // by 4 bytes: what a block of this launch stored that others may see
  std::mt19937_64 random;

  // The block.
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  std::unique_ptr<char[]> stacks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Store> stores;  // that its threads see, and other blocks do not
  std::vector<int> order;     // threads, who goes first
  uint64_t ready[16] = {};    // a bit for each place in that order
  char* shared = nullptr;
  size_t shared_bytes = 0;
  int current = -1, at_barrier = 0, ended = 0;
  void* host = nullptr;  // the stack that launched
  void* host_fake_stack = nullptr;
  const void* host_bottom = nullptr;
  size_t host_size = 0;
};

inline Machine& machine() {
  thread_local Machine m;
  return m;
}

// ---- fibers ----

// Saves what a call must keep, and goes on where `to` was saved.
extern "C" void gemma4_fast_emulator_switch(void** from, void* to);

#if defined(GEMMA4_EMULATOR_SWITCH)  // in one source file
#if defined(__x86_64__)
asm(R"(
.text
.globl gemma4_fast_emulator_switch
gemma4_fast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl gemma4_fast_emulator_switch
gemma4_fast_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the emulator switches fibers on x86-64 and AArch64"
#endif
#endif

inline char* stack_of(int fiber) { return machine().stacks.get() + fiber * kStack; }

// fiber -1: the host. `last`: the fiber that is left does not come back.
inline void switch_to(int fiber, bool last = false) {
  Machine& m = machine();
  const int from = m.current;
  void** save = from < 0 ? &m.host : &m.fibers[from].stack_pointer;
  m.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void** fake = last ? nullptr : from < 0 ? &m.host_fake_stack : &m.fibers[from].fake_stack;
  if (fiber < 0)
    __sanitizer_start_switch_fiber(fake, m.host_bottom, m.host_size);
  else
    __sanitizer_start_switch_fiber(fake, stack_of(fiber), kStack);
#endif
  (void)last;
  gemma4_fast_emulator_switch(save, fiber < 0 ? m.host : m.fibers[fiber].stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from < 0 ? m.host_fake_stack : m.fibers[from].fake_stack, nullptr, nullptr);
#endif
}

inline void set_ready(int fiber, bool ready) {
  Machine& m = machine();
  const int place = m.fibers[fiber].place;
  const uint64_t bit = uint64_t(1) << place % 64;
  m.ready[place / 64] = ready ? m.ready[place / 64] | bit : m.ready[place / 64] & ~bit;
}

// All threads are ready, in an order that is drawn.
inline void draw_order() {
  Machine& m = machine();
  std::shuffle(m.order.begin(), m.order.end(), m.random);
  std::fill(m.ready, m.ready + 16, 0);
  for (int place = 0; place < m.threads; ++place) {
    m.fibers[m.order[place]].place = place;
    set_ready(m.order[place], true);
  }
}

// The next that can run, or the host if there is none.
inline int next() {
  Machine& m = machine();
  for (int i = 0; i < 16; ++i)
    if (m.ready[i]) return m.order[64 * i + __builtin_ctzll(m.ready[i])];
  return -1;
}

inline void record(const std::string& what, int thread) {
  Machine& m = machine();
  m.error = what + " (block " + std::to_string(m.block.x) + ", " + std::to_string(m.block.y) + ", " + std::to_string(m.block.z);
  m.error += ", thread " + std::to_string(thread) + ")";
}

// Ends the launch: no fiber runs on.
inline void fail(const std::string& what) {
  record(what, machine().current);
  switch_to(-1, true);
}

// The fiber waits until someone makes it ready again.
inline void wait(const char* what) {
  Machine& m = machine();
  m.fibers[m.current].waits_for = what;
  set_ready(m.current, false);
  switch_to(next());
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  Machine& first = machine();
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!first.host_bottom) first.host_bottom = bottom, first.host_size = size;
#endif
  Machine& m = machine();
  m.kernel();
  set_ready(m.current, false), m.fibers[m.current].ended = true;
  ++m.ended;
  if (m.at_barrier) fail("a barrier that this thread does not come to");
  switch_to(next(), true);
}

inline void prepare(int fiber) {
  Machine& m = machine();
  char* bottom = stack_of(fiber);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom, kStack);  // of frames that were left for good
#endif
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(bottom) + kStack) & ~uintptr_t(63));
#if defined(__x86_64__)
  top -= 8;  // six registers, where to begin, and where that would return to
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&run_fiber);
#else
  top -= 20;
  std::fill(top, top + 20, nullptr);
  top[11] = reinterpret_cast<void*>(&run_fiber);
#endif
  Fiber& f = m.fibers[fiber];
  f.stack_pointer = top;
  f.fake_stack = nullptr;
  f.stores.clear(), f.groups.clear();
  f.ended = f.has_inputs = false;
}

// ---- memory ----

inline bool overlaps(const Store& s, uintptr_t at, size_t bytes) { return s.at < at + bytes && at < s.at + s.bytes; }

inline const Range* inside(uintptr_t at, size_t bytes, bool write) {
  for (const Range& r : machine().allowed)
    if (at >= r.begin && at + bytes <= r.end && (r.writable || !write)) return &r;
  return nullptr;
}

inline void check_access(const void* p, size_t bytes, bool write, bool of_weight, const char* what) {
  Machine& m = machine();
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (at % bytes) fail(std::string(what) + " at an address that is no multiple of " + std::to_string(bytes));
  const Range* range = inside(at, bytes, write);
  if (!range)
    fail(std::string(what) + " outside of the op's tensors");
  else if (!m.fibers[m.current].has_inputs && !(of_weight && range->weight))
    fail(std::string(what) + " before wait_for_inputs()");
}

inline void see(const std::vector<Store>& stores, uintptr_t at, size_t bytes, unsigned char* to) {
  for (const Store& s : stores)
    if (overlaps(s, at, bytes))
      for (size_t i = 0; i < bytes; ++i)
        if (at + i >= s.at && at + i < s.at + s.bytes) to[i] = s.data[at + i - s.at];
}

enum class Kind { kPlain, kWeight, kFresh };

template <class T>
T read(const T* from, Kind kind) {
  Machine& m = machine();
  T value;
  const char* const names[] = {"load", "load_weight", "load_fresh"};
  check_access(from, sizeof(T), false, kind == Kind::kWeight, names[(int)kind]);
  const auto at = reinterpret_cast<uintptr_t>(from);
  if (kind != Kind::kFresh && !m.written.empty()) {
    const auto found = m.written.find(at / 4);
    if (found != m.written.end() && found->second != m.block_number)
      fail(std::string(names[(int)kind]) + " of what another block of this launch stored");
  }
  std::memcpy(static_cast<void*>(&value), from, sizeof(T));
  auto* bytes = reinterpret_cast<unsigned char*>(&value);
  if (!m.stores.empty()) see(m.stores, at, sizeof(T), bytes);
  if (!m.fibers[m.current].stores.empty()) see(m.fibers[m.current].stores, at, sizeof(T), bytes);
  return value;
}

template <class T>
void write(T* to, const T& value) {
  static_assert(sizeof(T) <= 16);
  check_access(to, sizeof(T), true, false, "store");
  Store s{reinterpret_cast<uintptr_t>(to), sizeof(T), {}};
  std::memcpy(s.data, &value, sizeof(T));
  machine().fibers[machine().current].stores.push_back(s);
}

inline void to_block(Fiber& f) {
  Machine& m = machine();
  m.stores.insert(m.stores.end(), f.stores.begin(), f.stores.end());
  f.stores.clear();
}

// By a fence, or at the end of the launch.
inline void to_memory(std::vector<Store>& stores, bool by_fence) {
  Machine& m = machine();
  const auto done = [&](const Store& s) {
    if (by_fence && s.late) return false;
    std::memcpy(reinterpret_cast<void*>(s.at), s.data, s.bytes);
    if (by_fence)
      for (uintptr_t word = s.at / 4; word <= (s.at + s.bytes - 1) / 4; ++word) m.written[word] = m.block_number;
    return true;
  };
  stores.erase(std::remove_if(stores.begin(), stores.end(), done), stores.end());
}

inline void check_shared(const void* p, size_t bytes, const char* what) {
  Machine& m = machine();
  const char* at = static_cast<const char*>(p);
  if (at < m.shared || at + bytes > m.shared + m.shared_bytes)
    fail(std::string(what) + " outside of the block's shared memory");
  else if ((at - m.shared) % bytes)
    fail(std::string(what) + " at an address of shared memory that is no multiple of " + std::to_string(bytes));
}

// ---- exchange ----

// All lanes of a warp come with a T; the last to come has `work` done on all of them.
template <class T, class Work>
void exchange(const char* what, T& mine, Work work) {
  Machine& m = machine();
  Warp& w = m.warps[m.current / kWarp];
  if (w.arrived && w.what != what) fail(std::string(what) + " while other lanes are at " + w.what);
  w.what = what;
  w.slots[m.current % kWarp] = &mine;
  if (++w.arrived < kWarp) return wait(what);
  w.arrived = 0;
  T* all[kWarp];
  for (int i = 0; i < kWarp; ++i) all[i] = static_cast<T*>(w.slots[i]);
  work(all);
  const int first = m.current / kWarp * kWarp;
  for (int i = first; i < first + kWarp; ++i) set_ready(i, true);
}

inline void barrier() {
  Machine& m = machine();
  if (m.ended) fail("a barrier that another thread has left out");
  if (++m.at_barrier < m.threads) return wait("sync_block");
  m.at_barrier = 0;
  for (Fiber& f : m.fibers) to_block(f);
  draw_order();
}

// ---- a launch ----

inline void run_block(size_t shared) {
  Machine& m = machine();
  m.shared = m.memory.get(), m.shared_bytes = shared;
  std::memset(m.shared, 0xff, shared);
  std::memset(m.shared + shared, kGuard, kGuardBytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(m.shared + shared, kGuardBytes);
#endif
  m.warps.assign((m.threads + kWarp - 1) / kWarp, {});
  m.stores.clear();
  m.at_barrier = m.ended = 0;
  for (int f = 0; f < m.threads; ++f) prepare(f);
  draw_order();
  switch_to(next());
  for (int f = 0; f < m.threads && m.error.empty(); ++f)
    if (!m.fibers[f].ended) record(std::string("waits for ever at ") + m.fibers[f].waits_for, f);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.shared + shared, kGuardBytes);
#endif
  const auto* guard = reinterpret_cast<unsigned char*>(m.shared + shared);
  for (size_t i = 0; i < kGuardBytes && m.error.empty(); ++i)
    if (guard[i] != kGuard) record("a plain store outside of the block's shared memory", -1);
}

inline void run(Dim grid, int threads, size_t shared, std::function<void()> kernel) {
  Machine& m = machine();
  if (threads % kWarp || threads < 1 || threads > 1024) throw std::runtime_error("a block has whole warps, 32 at most");
  if (shared > kMostShared) throw std::runtime_error("more shared memory than any GPU's block has");
  ++m.launches;
  m.grid = grid, m.threads = threads, m.kernel = std::move(kernel);
  m.error.clear(), m.written.clear();
  m.random.seed(m.seed);
  if (!m.stacks) {
    m.stacks.reset(new char[1024 * kStack]);
    m.memory.reset(static_cast<char*>(std::aligned_alloc(128, kMostShared + kGuardBytes)));
  }
  m.fibers.resize(threads);
  m.order.resize(threads);
  std::iota(m.order.begin(), m.order.end(), 0);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || blocks > (int64_t(1) << 31) - 1)
    throw std::runtime_error("no such grid");
  std::vector<int> numbers(blocks);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::shuffle(numbers.begin(), numbers.end(), m.random);
  std::vector<Store> late;  // what no fence has made known
  for (int n : numbers) {
    m.block_number = n;
    m.block = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    run_block(shared);
    if (!m.error.empty()) break;
    for (Fiber& f : m.fibers) to_block(f);
    late.insert(late.end(), m.stores.begin(), m.stores.end());
  }
  to_memory(late, false);
  if (!m.error.empty()) throw std::runtime_error("emulator: " + m.error);
}

// What an op's kernels may touch: its tensors. Forgotten by `forget`.
inline void allow(const void* begin, size_t bytes, bool writable, bool weight) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  machine().allowed.push_back({at, at + bytes, writable, weight});
}
inline void forget() { machine().allowed.clear(); }

}  // namespace gemma4_fast::emulator

namespace gemma4_fast::device {

using emulator::machine;
using std::max, std::min;  // CUDA's own

DEVICE int thread_index() { return machine().current; }
DEVICE int anew(int x) { return x; }
DEVICE Dim block_index() { return machine().block; }
DEVICE Dim grid_size() { return machine().grid; }

// ---- numbers ----
DEVICE float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
DEVICE uint32_t float_to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
DEVICE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(half x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return y;
}
DEVICE float to_float(float x) { return x; }
template <class T>
T rounded(float x);
template <>
DEVICE bf16 rounded<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
DEVICE half rounded<half>(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  half z;
  std::memcpy(&z, &y, 2);
  return z;
}
template <class T>
float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}
template <class T>
uint32_t pack(float low, float high) {
  return rounded<T>(low).bits | uint32_t(rounded<T>(high).bits) << 16;
}
template <class T>
uint32_t subtract(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(x.x - y.x, x.y - y.y);
}
DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float exp2_fast(float x) { return std::exp2(x); }
DEVICE float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
DEVICE float sin_fast(float x) { return std::sin(x); }
DEVICE float cos_fast(float x) { return std::cos(x); }
DEVICE float divide(float a, float b) { return a / b; }

// ---- memory ----
struct alignas(16) Bytes16 {
  uint32_t w[4];
};
struct alignas(8) Bytes8 {
  uint32_t w[2];
};
DEVICE char* shared_memory() { return machine().shared; }
template <class T>
T load(const T* at) {
  return emulator::read(at, emulator::Kind::kPlain);
}
template <class T>
T load_weight(const T* at) {
  return emulator::read(at, emulator::Kind::kWeight);
}
template <class T>
T load_fresh(const T* at) {
  return emulator::read(at, emulator::Kind::kFresh);
}
template <class T>
void store(T* at, T value) {
  emulator::write(at, value);
}

DEVICE void sync_block() { emulator::barrier(); }
DEVICE void sync_warp() {
  int nothing = 0;
  emulator::exchange("sync_warp", nothing, [](int**) {
    const int first = machine().current / emulator::kWarp * emulator::kWarp;
    for (int i = 0; i < emulator::kWarp; ++i) emulator::to_block(machine().fibers[first + i]);
  });
}
DEVICE void fence() {
  emulator::to_memory(machine().stores, true);
  emulator::to_memory(machine().fibers[machine().current].stores, true);
}
DEVICE uint32_t count_up(uint32_t* counter, uint32_t last) {
  emulator::check_access(counter, 4, true, false, "count_up");
  for (emulator::Store& s : machine().stores) s.late = true;
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

DEVICE void copy_async(void* shared, const void* global, bool real) {
  emulator::check_shared(shared, 16, "copy_async");
  if (real) emulator::check_access(global, 16, false, false, "copy_async");
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("copy_async from an address that is no multiple of 16");
  std::memset(shared, 0xff, 16);
  auto& groups = machine().fibers[machine().current].groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), real});
}
DEVICE void commit_copies() {
  auto& groups = machine().fibers[machine().current].groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int newest>
void wait_for_copies() {
  auto& groups = machine().fibers[machine().current].groups;
  while (int(groups.size()) - 1 > newest) {
    for (const emulator::Copy& c : groups.front())
      if (c.real)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
    groups.erase(groups.begin());
  }
}

DEVICE void wait_for_inputs() { machine().fibers[machine().current].has_inputs = true; }

// ---- a warp ----
template <class T>
T shuffle_xor(T x, int mask) {
  struct Lane {
    T value;
    int mask;
  } mine{x, mask};
  emulator::exchange("shuffle_xor", mine, [](Lane** lanes) {
    T values[emulator::kWarp];
    for (int i = 0; i < emulator::kWarp; ++i) values[i] = lanes[i]->value;
    for (int i = 0; i < emulator::kWarp; ++i) lanes[i]->value = values[(i ^ lanes[i]->mask) % emulator::kWarp];
  });
  return mine.value;
}
template <class T>
T shuffle(T x, int from) {
  struct Lane {
    T value;
    int from;
  } mine{x, from};
  emulator::exchange("shuffle", mine, [](Lane** lanes) {
    T values[emulator::kWarp];
    for (int i = 0; i < emulator::kWarp; ++i) values[i] = lanes[i]->value;
    for (int i = 0; i < emulator::kWarp; ++i) lanes[i]->value = values[lanes[i]->from & 31];
  });
  return mine.value;
}
DEVICE uint32_t ballot(bool x) {
  uint32_t mine = x;
  emulator::exchange("ballot", mine, [](uint32_t** lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < emulator::kWarp; ++i) bits |= *lanes[i] << i;
    for (int i = 0; i < emulator::kWarp; ++i) *lanes[i] = bits;
  });
  return mine;
}
DEVICE int count_bits(uint32_t x) { return __builtin_popcount(x); }
DEVICE uint32_t warp_max(uint32_t x) {
  emulator::exchange("warp_max", x, [](uint32_t** lanes) {
    const uint32_t most = **std::max_element(lanes, lanes + emulator::kWarp, [](auto a, auto b) { return *a < *b; });
    for (int i = 0; i < emulator::kWarp; ++i) *lanes[i] = most;
  });
  return x;
}
DEVICE uint32_t warp_min(uint32_t x) { return ~warp_max(~x); }
DEVICE uint32_t warp_add(uint32_t x) {
  emulator::exchange("warp_add", x, [](uint32_t** lanes) {
    const uint32_t sum = std::accumulate(lanes, lanes + emulator::kWarp, 0u, [](uint32_t s, auto lane) { return s + *lane; });
    for (int i = 0; i < emulator::kWarp; ++i) *lanes[i] = sum;
  });
  return x;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::exchange("mma", mine, [](Lane** lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const int g = lane / 4, c = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(lanes[lane]->a[i]);
        a[g + i % 2 * 8][2 * c + i / 2 * 8] = pair.x, a[g + i % 2 * 8][2 * c + i / 2 * 8 + 1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack<T>(lanes[lane]->b[i]);
        b[2 * c + i * 8][g] = pair.x, b[2 * c + i * 8 + 1][g] = pair.y;
      }
    }
    float d[16][8] = {};
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

DEVICE void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  struct Lane {
    float* d;
    const float* a;
    float b[2];
  } mine{d, a, {b0, b1}};
  emulator::exchange("mma_tf32", mine, [](Lane** lanes) {
    const auto tf32 = [](float x) { return bits_to_float(float_to_bits(x) & 0xffffe000u); };
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 8; ++k)
          sum += tf32(lanes[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2]) * tf32(lanes[column * 4 + k % 4]->b[k / 4]);
        lanes[lane]->d[i] += sum;
      }
  });
}

template <bool kTransposed>
void load_matrices_of(uint32_t (&m)[4], const void* row) {
  struct Lane {
    uint32_t* m;
    const char* row;
  } mine{m, static_cast<const char*>(row)};
  emulator::check_shared(row, 16, "load_matrices");
  emulator::exchange("load_matrices", mine, [](Lane** lanes) {
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < emulator::kWarp; ++lane) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const int r = kTransposed ? lane % 4 * 2 + j : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + j;
          std::memcpy(&pair[j], lanes[8 * i + r]->row + 2 * c, 2);
        }
        lanes[lane]->m[i] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
}
DEVICE void load_matrices(uint32_t (&m)[4], const void* row) { load_matrices_of<false>(m, row); }
DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) { load_matrices_of<true>(m, row); }

// ---- from the host ----
struct Launch {
  Dim grid;
  int threads;
  int shared = 0;
};

template <class Args>
void launch(const cuda::Stream&, const Launch& size, void (*kernel)(const Args), const Args& args) {
  if (machine().watch) return machine().watch(reinterpret_cast<const void*>(kernel), size.threads, size.shared);
  emulator::run(size.grid, size.threads, size.shared, [&] { kernel(args); });
}

}  // namespace gemma4_fast::device
