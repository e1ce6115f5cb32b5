// Emulated kernels are a library of their own, without PyTorch, so that a test can build one with a mistake in it in seconds.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace gemma4_fast::cuda {

struct Emulated {
  const Kernels* kernels;
  void (*allow)(const void* begin, size_t bytes, bool writable, bool weight);  // see emulator.h
  void (*forget)();
  void (*set_seed)(uint64_t seed);
  int64_t (*launches)();  // so far
};

// The library in use.
inline Emulated& emulated() {
  static Emulated now{};
  return now;
}

inline void use(std::string library, int64_t seed) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  emulated() = *static_cast<const Emulated*>(dlsym(handle, "gemma4_fast_emulated"));
  emulated().set_seed(seed);
}

inline int64_t launches() { return emulated().launches(); }

}  // namespace gemma4_fast::cuda
