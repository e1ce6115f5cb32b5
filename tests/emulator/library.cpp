// What an emulated library exports, and the one place that has the switch between fibers.
#define GEMMA4_EMULATOR_SWITCH
#include "library.h"

#include "emulator.h"

namespace gemma4_fast::cuda {

const Kernels kernels = GEMMA4_ALL_KERNELS;

extern "C" __attribute__((visibility("default"))) const Emulated gemma4_fast_emulated{
    &kernels, &emulator::allow, &emulator::forget, [](uint64_t seed) { emulator::machine().seed = seed; },
    [] { return emulator::machine().launches; }};

extern "C" __attribute__((visibility("default"))) void gemma4_fast_watch(void (*watch)(const void*, int, int)) {
  emulator::machine().watch = watch;
}

}  // namespace gemma4_fast::cuda
