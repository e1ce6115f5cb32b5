// See pool.h. Compiled once, with plain flags.
//
// What was tried, with 2 of 30 layers of 26B-A4B in int4, on 2 threads of a Zen 4. The percentages are
// the speed beside one busy process, compared with the speed on a quiet machine.
//   OpenMP                               decode 30%, prefill 52%
//   OpenMP, OMP_WAIT_POLICY=passive      decode 69%, prefill 62%
//   this pool                            decode 60%, prefill 60%
//   one thread alone                     decode 57%, prefill 56%
//   spinning for 100 us instead of 20    decode 53%, prefill 59%
//   workers call sched_yield each ms     decode 61%, prefill 54%; beside two busy ones 27%, not 45%
//   workers nap 1 ms of 2 if preempted   slower than one thread: the caller waits for their naps
//   workers leave the team for a break   no better, and a quiet prefill loses 40%
//   workers keep off the caller's core   no difference: the scheduler often wakes them there
//   workers stay away once preempted     as slow as one thread alone, on quiet machines too
//   without calm_openmp                  quiet prefill 6% slower: PyTorch's threads spin on our cores
#include "cpu/pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <initializer_list>
#include <cstdint>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#else
#include <condition_variable>
#include <mutex>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemma4_fast {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr microseconds kSpin{20};  // before a waiting thread sleeps
constexpr int kCalls = 16;         // that may be under way at once; further callers work alone
constexpr int kMaxWorkers = 255;

inline void pause_thread() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Whether `word` changed from `old` within kSpin.
bool spin_while(const std::atomic<uint32_t>& word, uint32_t old) {
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 32; ++i) {
      if (word.load(std::memory_order_acquire) != old) return true;
      pause_thread();
    }
  } while (Clock::now() - start < kSpin);
  return false;
}

#if defined(__linux__)
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain word");

// May return early, for no reason.
void sleep_while(std::atomic<uint32_t>& word, uint32_t old) {
  auto* futex = reinterpret_cast<uint32_t*>(&word);
  syscall(SYS_futex, futex, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}
void wake(std::atomic<uint32_t>& word, int threads) {
  auto* futex = reinterpret_cast<uint32_t*>(&word);
  syscall(SYS_futex, futex, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}
#else
// One lock for all words. Only threads that go to sleep and those that wake them take it. It is never
// freed, since workers wait here until the process ends.
struct Sleepers {
  std::mutex mutex;
  std::condition_variable condition;
};
Sleepers* sleepers = new Sleepers;

void sleep_while(std::atomic<uint32_t>& word, uint32_t old) {
  std::unique_lock<std::mutex> lock(sleepers->mutex);
  if (word.load() == old) sleepers->condition.wait(lock);
}
void wake(std::atomic<uint32_t>&, int) {
  std::lock_guard<std::mutex> lock(sleepers->mutex);
  sleepers->condition.notify_all();
}
#endif

// A call that workers may join. Calls live in the pool, not on the caller's stack, so that a worker
// that comes late still finds one, and sees that it is closed.
struct alignas(64) Call {
  std::atomic<bool> taken{false};
  std::atomic<int> places{0};  // workers that may still join
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  // Workers that have returned. Closing the call subtracts those that joined: at 0 all are back.
  std::atomic<int> returned{0};
  Event all_returned;

  bool join() {
    int now = places.load(std::memory_order_acquire);
    while (now > 0)
      if (places.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void leave() {
    if (returned.fetch_add(1, std::memory_order_acq_rel) + 1 == 0) all_returned.set();
  }

  // Lets no more workers join, and waits for those that did.
  void close(int threads) {
    const int joined = threads - 1 - places.exchange(0, std::memory_order_acq_rel);
    if (returned.fetch_sub(joined, std::memory_order_acq_rel) != joined) all_returned.wait();
  }
};

bool start_thread(void* (*run)(void*), void* argument) {
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return false;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, size_t{4} << 20);
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
  pthread_t thread;
  const int failed = pthread_create(&thread, &attributes, run, argument);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  return failed == 0;
}

// PyTorch's own OpenMP threads spin for milliseconds after each of its parallel regions, on the cores
// that ours need. libgomp lets them spin only briefly once it manages more threads than there are
// cores, so one thread opens a region that is large enough for that, and keeps it open.
// OMP_WAIT_POLICY would do the same, but it is read when PyTorch is loaded, which is before us. With
// another OpenMP this changes nothing. It is not done where a team of `threads` leaves most cores free.
void calm_openmp(int threads) {
  const auto run = [](void* team) -> void* {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return nullptr;
    using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
    const auto parallel = reinterpret_cast<Region>(dlsym(torch, "GOMP_parallel"));
    const auto num_procs = reinterpret_cast<int (*)()>(dlsym(torch, "omp_get_num_procs"));
    if (parallel == nullptr || num_procs == nullptr) return nullptr;
    // PyTorch's own team of this size counts as well.
    const int threads = static_cast<int>(reinterpret_cast<intptr_t>(team));
    const int missing = num_procs() - threads > 0 ? num_procs() - threads : 0;
    if (missing > threads) return nullptr;
    parallel([](void*) {}, nullptr, static_cast<unsigned>(missing + 2), 0);
    while (true) pause();  // libgomp counts the region's threads for as long as this one lives
  };
  start_thread(run, reinterpret_cast<void*>(static_cast<intptr_t>(threads)));
}

struct Pool {
  Call calls[kCalls];
  alignas(64) std::atomic<uint32_t> news{0};  // counts calls: a worker sleeps until it changes
  alignas(64) std::atomic<int> asleep{0};
  std::atomic<int> workers{0};

  // Joins a call that has room. False: there is none.
  bool help() {
    for (Call& call : calls)
      if (call.join()) {
        call.body(call.context);
        call.leave();
        return true;
      }
    return false;
  }

  [[noreturn]] void work() {
    while (true) {
      const uint32_t seen = news.load(std::memory_order_acquire);
      if (help() || spin_while(news, seen)) continue;
      asleep.fetch_add(1);
      sleep_while(news, seen);
      asleep.fetch_sub(1);
    }
  }

  void grow(int wanted) {
    wanted = wanted < kMaxWorkers ? wanted : kMaxWorkers;
    int have = workers.load(std::memory_order_relaxed);
    while (have < wanted) {
      if (!workers.compare_exchange_weak(have, have + 1)) continue;
      if (!start_thread([](void* pool) -> void* { static_cast<Pool*>(pool)->work(); }, this)) {
        workers.fetch_sub(1);
        return;  // the system has no more threads: those that are there do the work
      }
      ++have;
    }
  }
};

// Never freed: workers look at it until the process ends. A forked process has no workers, and gets a
// pool of its own.
std::atomic<Pool*> current_pool{nullptr};

void forget_pool() {
  current_pool.store(nullptr);
#if !defined(__linux__)
  sleepers = new Sleepers;  // the parent's may be locked by a thread that does not exist here
#endif
}

Pool& pool(int threads) {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* made = new Pool;
  if (current_pool.compare_exchange_strong(found, made)) {
    calm_openmp(threads);
    return *made;
  }
  delete made;
  return *found;
}

}  // namespace

void run_team(int threads, void (*body)(void*), void* context) {
  Call* call = nullptr;
  if (threads > 1) {
    Pool& all = pool(threads);
    all.grow(threads - 1);
    for (Call& one : all.calls) {
      if (one.taken.load(std::memory_order_relaxed)) continue;
      if (one.taken.exchange(true, std::memory_order_acquire)) continue;
      call = &one;
      break;
    }
    if (call != nullptr) {
      call->body = body;
      call->context = context;
      call->returned.store(0, std::memory_order_relaxed);
      call->all_returned.reset();
      call->places.store(threads - 1, std::memory_order_release);
      all.news.fetch_add(1);
      if (all.asleep.load() > 0) wake(all.news, threads - 1);
    }
  }
  body(context);
  if (call == nullptr) return;
  call->close(threads);
  call->taken.store(false, std::memory_order_release);
}

void Event::set() {
  if (state_.exchange(kSet, std::memory_order_acq_rel) == kAwaited) wake(state_, kMaxWorkers);
}

void Event::wait() {
  if (state_.load(std::memory_order_acquire) == kSet) return;
  if (spin_while(state_, kOpen) && state_.load(std::memory_order_acquire) == kSet) return;
  uint32_t open = kOpen;
  state_.compare_exchange_strong(open, kAwaited, std::memory_order_acq_rel);
  while (state_.load(std::memory_order_acquire) == kAwaited) sleep_while(state_, kAwaited);
}

}  // namespace gemma4_fast
