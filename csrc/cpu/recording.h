// Steps that are recorded once and run again: the CPU's counterpart of a CUDA graph.
//
// Each op hands its work to `submit`, which runs it, and while this thread records also keeps it. What is kept holds the tensors
// it was given, so a replay reads and writes the same memory: new inputs are copied into the old ones first. All that lies
// between two kernels of an op-by-op step (Python, argument checks, allocations) is then gone; the kernels' own checks stay.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace gemma4_fast {

using Recording = std::vector<std::function<void()>>;

inline thread_local std::unique_ptr<Recording> recording_now;

// Finished recordings by their numbers.
struct Recordings {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const Recording>> kept;
  int64_t last = 0;

  int64_t keep(std::unique_ptr<Recording> recording) {
    std::lock_guard<std::mutex> lock(mutex);
    kept[++last] = std::move(recording);
    return last;
  }
  std::shared_ptr<const Recording> find(int64_t number) {  // null if there is none
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = kept.find(number);
    return found == kept.end() ? nullptr : found->second;
  }
  void drop(int64_t number) {
    std::shared_ptr<const Recording> last_owner = find(number);  // destroyed behind the lock
    std::lock_guard<std::mutex> lock(mutex);
    kept.erase(number);
  }
};

inline Recordings& recordings() {
  static Recordings all;
  return all;
}

template <class Work>
void submit(Work work) {
  work();
  if (recording_now) recording_now->push_back(std::move(work));
}

}  // namespace gemma4_fast
