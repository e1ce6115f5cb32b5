// gemma4_fast._native: what this processor can do, how this file was compiled, and advice about memory.
//
// Compiled with plain C++17 flags, so that it loads on every machine of the architecture.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)  // GCC and Clang
#define GEMMA4_FAST_X86 1
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#define GEMMA4_FAST_ARM_LINUX 1
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#define GEMMA4_FAST_ARM_APPLE 1
#include <sys/sysctl.h>
#endif

namespace py = pybind11;

namespace {

// Every name exists on every architecture, so that a caller can ask without knowing where it runs.
struct CpuFeatures {
  // x86
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512vnni = false, avx512bf16 = false;
  bool amx_tile = false, amx_int8 = false, amx_bf16 = false;
  // ARM
  bool neon = false, dotprod = false, i8mm = false, sve = false;
};

#if defined(GEMMA4_FAST_X86)

bool bit(unsigned reg, int index) { return (reg >> index) & 1u; }

// XCR0: the register states that the operating system saves on a context switch. Only valid if cpuid reports OSXSAVE.
// Inline assembly, because the _xgetbv intrinsic wants -mxsave.
unsigned read_xcr0() {
  unsigned eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

// cpuid rather than __builtin_cpu_supports: compilers differ in the names they know, and an unknown one does not compile.
// Bits: Intel SDM volume 2, CPUID; states: volume 1, chapter 13.
CpuFeatures detect() {
  CpuFeatures f;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return f;
  const unsigned leaf1_ecx = ecx;

  const bool osxsave = bit(leaf1_ecx, 27);
  const unsigned xcr0 = osxsave ? read_xcr0() : 0;
  constexpr unsigned kAvxState = 0x6;         // bits 1, 2: XMM and YMM
  constexpr unsigned kAvx512State = 0xe6;     // and bits 5-7: opmask, upper ZMM, ZMM16-31
  constexpr unsigned kAmxState = 0x60000;     // bits 17, 18: tile config and tile data
  const bool os_avx = (xcr0 & kAvxState) == kAvxState && bit(leaf1_ecx, 28);
  const bool os_avx512 = os_avx && (xcr0 & kAvx512State) == kAvx512State;
  // Linux also wants each process to ask (arch_prctl ARCH_REQ_XCOMP_PERM) before its first AMX instruction: the kernel's job.
  const bool os_amx = (xcr0 & kAmxState) == kAmxState;

  f.fma = os_avx && bit(leaf1_ecx, 12);
  f.f16c = os_avx && bit(leaf1_ecx, 29);

  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return f;
  const unsigned max_subleaf = eax;
  f.avx2 = os_avx && bit(ebx, 5);
  f.avx512f = os_avx512 && bit(ebx, 16);
  f.avx512dq = f.avx512f && bit(ebx, 17);
  f.avx512bw = f.avx512f && bit(ebx, 30);
  f.avx512vl = f.avx512f && bit(ebx, 31);
  f.avx512vnni = f.avx512f && bit(ecx, 11);
  f.amx_bf16 = os_amx && bit(edx, 22);
  f.amx_tile = os_amx && bit(edx, 24);
  f.amx_int8 = os_amx && bit(edx, 25);

  if (max_subleaf < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return f;
  f.avx_vnni = f.avx2 && bit(eax, 4);
  f.avx512bf16 = f.avx512f && bit(eax, 5);
  return f;
}

#elif defined(GEMMA4_FAST_ARM_LINUX)

// Bits of the kernel's user-space interface (arch/arm64/include/uapi/asm/hwcap.h), spelled out because old headers lack them.
CpuFeatures detect() {
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);
  CpuFeatures f;
  f.neon = (hwcap >> 1) & 1;      // HWCAP_ASIMD
  f.dotprod = (hwcap >> 20) & 1;  // HWCAP_ASIMDDP
  f.sve = (hwcap >> 22) & 1;      // HWCAP_SVE
  f.i8mm = (hwcap2 >> 13) & 1;    // HWCAP2_I8MM
  return f;
}

#elif defined(GEMMA4_FAST_ARM_APPLE)

bool sysctl_flag(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

CpuFeatures detect() {
  CpuFeatures f;
  f.neon = true;  // part of the architecture there
  f.dotprod = sysctl_flag("hw.optional.arm.FEAT_DotProd");
  f.i8mm = sysctl_flag("hw.optional.arm.FEAT_I8MM");
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

py::dict cpu_features() {
  const CpuFeatures f = detect();
  py::dict d;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx_vnni"] = f.avx_vnni;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512dq"] = f.avx512dq;
  d["avx512vl"] = f.avx512vl;
  d["avx512vnni"] = f.avx512vnni;
  d["avx512bf16"] = f.avx512bf16;
  d["amx_tile"] = f.amx_tile;
  d["amx_int8"] = f.amx_int8;
  d["amx_bf16"] = f.amx_bf16;
  d["neon"] = f.neon;
  d["dotprod"] = f.dotprod;
  d["i8mm"] = f.i8mm;
  d["sve"] = f.sve;
  return d;
}

py::dict build_info() {
  py::dict d;
#if defined(__clang__)
  d["compiler"] = "clang";
  d["compiler_version"] = __clang_version__;
#elif defined(__GNUC__)
  d["compiler"] = "gcc";
  d["compiler_version"] = __VERSION__;
#elif defined(_MSC_VER)
  d["compiler"] = "msvc";
  d["compiler_version"] = std::to_string(_MSC_FULL_VER);
#else
  d["compiler"] = "unknown";
  d["compiler_version"] = "unknown";
#endif

#if defined(_MSVC_LANG)  // MSVC leaves __cplusplus at 199711 by default
  constexpr long standard = _MSVC_LANG;
#else
  constexpr long standard = __cplusplus;
#endif
  d["cxx_standard"] = "C++" + std::to_string(standard / 100 % 100);

#if defined(__x86_64__) || defined(_M_X64)
  d["arch"] = "x86_64";
#elif defined(__aarch64__) || defined(_M_ARM64)
  d["arch"] = "aarch64";
#else
  d["arch"] = "other";
#endif

#if defined(GEMMA4_FAST_FLAGS)
  d["flags"] = GEMMA4_FAST_FLAGS;
#else
  d["flags"] = "unknown";
#endif

#if defined(NDEBUG)
  d["debug"] = false;
#else
  d["debug"] = true;
#endif
  return d;
}

// Asks the system to back memory by huge pages, where whole ones fit: when it is touched, or `now`, what it holds moving into
// them (Linux 6.1 and newer). False: it does not.
bool use_huge_pages(uintptr_t address, size_t bytes, bool now) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;  // of x86-64, and of ARM with 4 KB pages; where they are larger, no harm
  constexpr int kCollapse = 25;                    // MADV_COLLAPSE, which older headers lack
  const uintptr_t first = (address + kHuge - 1) / kHuge * kHuge, last = (address + bytes) / kHuge * kHuge;
  if (first >= last || madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) != 0) return false;
  return !now || madvise(reinterpret_cast<void*>(first), last - first, kCollapse) == 0;
#else
  return (void)address, (void)bytes, (void)now, false;
#endif
}

// Takes the whole pages of a read-only file mapping out of this process's resident memory; the system may keep them cached.
bool release_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  return first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED) == 0;
#else
  return (void)address, (void)bytes, false;
#endif
}

}  // namespace

// No state that threads share, hence no need for the GIL on free-threaded builds of Python.
PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "What this processor can do, how this module was compiled, and advice about memory.";
  m.def("cpu_features", &cpu_features, "Instruction sets that the processor has and the operating system supports.");
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); }, "Number of hardware threads; 0 if unknown.");
  m.def("use_huge_pages", &use_huge_pages, py::arg("address"), py::arg("bytes"), py::arg("now"), "Asks for huge pages.");
  m.def("release_pages", &release_pages, py::arg("address"), py::arg("bytes"), "Drops the pages of a file that was read.");
  m.def("build_info", &build_info, "Compiler, standard, architecture and flags of this build.");
}
