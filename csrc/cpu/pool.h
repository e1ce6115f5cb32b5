// The threads of the CPU kernels: the caller, and workers that help whoever calls.
//
// Why not OpenMP: its threads wait for each other at the end of every parallel region, and they spin
// while they wait. They wait even for a thread that has not begun, because another process has its
// core. Beside one busy process on two cores, decode fell to a twentieth of its speed. Here a caller
// waits only for work that a worker has begun, and a waiting thread soon sleeps.
#pragma once

#include <atomic>
#include <cstdint>

namespace gemma4_fast {

// Runs body(context) on the caller and on up to `threads` - 1 workers. A worker may start late or not
// at all, so `body` must share out its work among the threads that take part (see parallel.h).
// Returns when the caller and every worker that took part have returned from `body`. Any number of
// threads may call at once: they share the workers.
void run_team(int threads, void (*body)(void*), void* context);

// Something that happens once. Setting it costs a system call only if a thread sleeps until then.
class Event {
 public:
  void set();
  void wait();  // spins briefly, then sleeps
  void reset() { state_.store(kOpen, std::memory_order_relaxed); }

 private:
  enum State : uint32_t { kOpen, kAwaited, kSet };
  std::atomic<uint32_t> state_{kOpen};
};

}  // namespace gemma4_fast
