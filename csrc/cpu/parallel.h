// Work on several threads: one fork and join for all phases of an op.
//
//   Phase first(tasks, [&](int64_t task) {...}), second(...);
//   run_phases(threads, first, second);
//
// A phase starts when all tasks of the one before are done. Each thread first takes the tasks of its own part, which lie side
// by side in memory, then what others have left; whoever takes a task, its result is the same. Any number of threads makes
// progress: a thread waits only for tasks that another one is already running.
#pragma once

#include <atomic>

#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {

constexpr int kMaxThreads = 256;

template <class Body>
struct Phase {
  int64_t tasks;
  Body body;
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Part parts[kMaxThreads];
  int num_parts = 1;
  alignas(64) std::atomic<int64_t> done{0};
  Event all_done;

  Phase(int64_t tasks, Body body) : tasks(tasks), body(body) {}
  Phase(const Phase&) = delete;

  void divide(int threads) {
    num_parts = threads;
    for (int p = 0; p < threads; ++p) {
      parts[p].next.store(tasks * p / threads, std::memory_order_relaxed);
      parts[p].end = tasks * (p + 1) / threads;
    }
  }

  void work(int self, bool last) {
    int64_t mine = 0;
    for (int i = 0; i < num_parts; ++i) {
      Part& part = parts[(self + i) % num_parts];
      while (part.next.load(std::memory_order_relaxed) < part.end) {
        const int64_t task = part.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= part.end) break;
        body(task);
        ++mine;
      }
    }
    if (done.fetch_add(mine, std::memory_order_acq_rel) + mine >= tasks) all_done.set();
    if (!last) all_done.wait();
  }
};
template <class Body>
Phase(int64_t, Body) -> Phase<Body>;

// Runs the phases one after the other. `threads` 1 does it on the caller alone: for work that is smaller than a fork.
template <class... Phases>
void run_phases(int threads, Phases&... phases) {
  threads = threads < kMaxThreads ? threads : kMaxThreads;
  if (threads <= 1) {
    (
        [&] {
          for (int64_t task = 0; task < phases.tasks; ++task) phases.body(task);
        }(),
        ...);
    return;
  }
  (phases.divide(threads), ...);
  std::atomic<int> arrived{0};
  auto body = [&] {
    const int self = arrived.fetch_add(1, std::memory_order_relaxed) % threads;
    int left = sizeof...(Phases);
    (phases.work(self, --left == 0), ...);
  };
  run_team(threads, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

// One phase. `work` is a rough count of operations or bytes: below `kWorthAFork` the caller does it alone.
constexpr int64_t kWorthAFork = 1 << 16;
inline int threads_for(int64_t work) { return work < kWorthAFork ? 1 : num_threads(); }

template <class Body>
void parallel(int64_t tasks, int64_t work, Body body) {
  Phase<Body> phase(tasks, body);
  run_phases(tasks < 2 ? 1 : threads_for(work), phase);
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
