// The pool of threads (csrc/cpu/pool.h): each check prints its name if it fails. Run by tests/test_pool.py,
// and by `make sanitize` under ThreadSanitizer.
#include "cpu/pool.h"

#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace gemma4_fast {

int num_threads() { return 4; }

namespace GEMMA4_ISA {
namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

// Three phases, each of which needs all of the one before: out[i] = 3 * (sum of 0 .. n - 1) + i.
bool phases_are_right(int threads, int64_t n) {
  std::vector<int64_t> first(n), second(n), third(n);
  Phase a(n, [&](int64_t i) { first[i] = i; });
  Phase b(n, [&](int64_t i) {
    int64_t sum = 0;
    for (int64_t x : first) sum += x;
    second[i] = sum;
  });
  Phase c(n, [&](int64_t i) { third[i] = second[(i + 1) % n] + 2 * second[(i + 7) % n] + i; });
  run_phases(threads, a, b, c);
  for (int64_t i = 0; i < n; ++i)
    if (third[i] != 3 * (n * (n - 1) / 2) + i) return false;
  return true;
}

void every_size() {
  bool ok = true;
  for (int round = 0; round < 200; ++round)
    for (int threads : {1, 2, 3, 8})
      for (int64_t n : {1, 2, 5, 64}) ok = ok && phases_are_right(threads, n);
  expect(ok, "phases on 1 to 8 threads");
  Phase none(0, [](int64_t) {});
  Phase also_none(0, [](int64_t) {});
  run_phases(4, none, also_none);
}

void many_callers() {
  std::vector<std::thread> callers;
  std::vector<char> ok(24, 1);  // more callers than the pool has places for calls
  for (size_t c = 0; c < ok.size(); ++c)
    callers.emplace_back([&ok, c] {
      for (int round = 0; round < 50; ++round) ok[c] = ok[c] && phases_are_right(4, 33);
    });
  for (std::thread& caller : callers) caller.join();
  expect(std::memchr(ok.data(), 0, ok.size()) == nullptr, "calls from many threads at once");
}

// All workers are held inside one call. Another call must not wait for them.
void absent_workers_hold_up_nobody() {
  constexpr int kThreads = 4;
  std::atomic<int> inside{0};
  std::atomic<bool> release{false}, returned{false};
  std::thread holder([&] {
    Phase held(kThreads, [&](int64_t) {
      ++inside;
      while (!release) std::this_thread::yield();
    });
    run_phases(kThreads, held);
  });
  while (inside < kThreads) std::this_thread::yield();
  std::thread other([&] {
    expect(phases_are_right(kThreads, 100), "a call while all workers are busy");
    returned = true;
  });
  for (int i = 0; i < 10000 && !returned; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  expect(returned, "a call returns while all workers are held elsewhere");
  release = true;
  other.join();
  holder.join();
}

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// One thread has work, and sleeps; those that wait for it must sleep too. This counts processor time.
void waiting_threads_sleep() {
  const double before = cpu_seconds();
  Phase slow(1, [](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(500)); });
  Phase after(4, [](int64_t) {});
  run_phases(4, slow, after);
  expect(cpu_seconds() - before < 0.25, "threads that wait for 0.5 s sleep");
}

void forked_process_works() {
  const pid_t child = fork();
  if (child == 0) _exit(phases_are_right(4, 100) ? 0 : 1);
  int status = -1;
  for (int i = 0; i < 2000 && waitpid(child, &status, WNOHANG) == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked process computes");
}

}  // namespace
}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast

int main() {
  using namespace gemma4_fast::GEMMA4_ISA;
  every_size();
  many_callers();
  absent_workers_hold_up_nobody();
  waiting_threads_sleep();
#if !defined(__SANITIZE_THREAD__)  // which cannot follow a fork of a process with threads
  forked_process_works();
#endif
  std::printf("pool: %d failures\n", failures);
  return failures != 0;
}
