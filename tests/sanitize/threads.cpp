// Every CPU kernel on 1, 2 and 5 threads of the pool, and calls from several threads at once, for
// ThreadSanitizer.
//
// Data is made up; what a kernel computes is judged by tests/test_cpu.py. Here outputs must be finite, and the same bits for
// every number of threads. Sizes are large enough that kernels fork (kWorthAFork in parallel.h), and divide nothing.
// `make sanitize` compiles it together with csrc/cpu, for the machine at hand.
#include <algorithm>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/quantized.h"

namespace gemma4_fast {

static int wanted = 1;

int num_threads() { return wanted; }

namespace GEMMA4_ISA {
extern const Kernels kernels;
namespace {

int cases = 0, failures = 0;

// A vector that a kernel's arguments take as a pointer.
template <class T>
struct Values : std::vector<T> {
  using std::vector<T>::vector;
  operator T*() { return this->data(); }
  operator const T*() const { return this->data(); }
};

uint32_t random_state = 1;
uint32_t next_random() { return (random_state = random_state * 1664525u + 1013904223u) >> 8; }

template <class T>
Values<T> random_values(int64_t count) {
  Values<T> v(count);
  for (T& x : v) x = from_float<T>(static_cast<float>(next_random() % 2001) / 1000.0f - 1.0f);  // -1 .. 1
  return v;
}

// Outputs and scratch before a kernel has written them: all bits set, in floats NaN.
template <class T>
Values<T> unwritten(int64_t count) {
  Values<T> v(count);
  if (count) std::memset(static_cast<void*>(v.data()), 0xff, count * sizeof(T));
  return v;
}

double as_double(double x) { return x; }
double as_double(bf16 x) { return to_float(x); }

// A kernel's outputs, as doubles that have their values.
template <class... T>
std::vector<double> outputs_of(const Values<T>&... outputs) {
  std::vector<double> all;
  const auto add = [&](const auto& v) { for (const auto x : v) all.push_back(as_double(x)); };
  (add(outputs), ...);
  return all;
}

// run(): outputs_of one call of a kernel on the same inputs, with outputs and scratch of its own.
template <class Run>
void check(const char* kernel, const char* variant, Run run) {
  std::vector<double> expected;
  for (const int threads : {1, 2, 5}) {
    wanted = threads;
    const std::vector<double> got = run();
    if (threads == 1) expected = got;
    // == takes 0 for -0, and NaN, as unwritten outputs are, for different from itself; memcmp the other way round.
    if (got == expected && !std::memcmp(got.data(), expected.data(), got.size() * sizeof(double))) continue;
    std::printf("%s %s on %d threads: other bits than on one, or NaN\n", kernel, variant, wanted);
    ++failures;
  }
  ++cases;
}

// [matrices, rows, k] of T, or of 8 or 4 bits where `bits` is not 0. `parts` of the rows are filled up to whole panels.
template <class T>
struct Weight {
  int bits;
  int64_t groups;
  Values<T> floats;
  Values<uint8_t> data;
  Values<uint16_t> scale;

  Weight(int bits, int64_t matrices, int64_t rows, int64_t k, int64_t parts = 1)
      : bits(bits), groups(bits ? (k + kGroup - 1) / kGroup : 0), floats(random_values<T>(bits ? 0 : matrices * rows * k)) {
    const int64_t panels = matrices * parts * ((rows / parts + kPanel - 1) / kPanel);
    data.resize(panels * groups * group_bytes(bits)), scale.resize(panels * groups * kPanel);
    for (uint8_t& x : data) x = static_cast<uint8_t>(next_random());
    for (uint16_t& x : scale) x = static_cast<uint16_t>(0x2000 | (next_random() & 0x3ff));  // fp16 from 2^-7 to 2^-6
  }
  const void* at() const { return bits ? static_cast<const void*>(data) : floats; }
  Quantized q() const { return {bits ? scale.data() : nullptr, groups, bits}; }
  Values<Rounded> rounded(int64_t rows) const { return unwritten<Rounded>(rows * groups); }  // of what is multiplied by it
  const char* name() const { return bits == 8 ? "int8" : bits == 4 ? "int4" : ""; }
};

constexpr int64_t kTopK = 3, kExperts = 11, kHeads = 6, kKvHeads = 2, kDim = 74, kPairs = 18;

template <class T>
struct Checks {
  static constexpr Dtype dtype = sizeof(T) == 4 ? Dtype::f32 : Dtype::bf16;
  static Values<T> in(int64_t count) { return random_values<T>(count); }
  static Values<T> out(int64_t count) { return unwritten<T>(count); }

  // Of each token's pairs: three different ones. The last expert gets none.
  static Values<int32_t> expert_ids(int64_t pairs) {
    Values<int32_t> ids(pairs);
    for (int64_t p = 0; p < pairs; ++p) ids.at(p) = static_cast<int32_t>(p * 7 % (kExperts - 1));
    return ids;
  }

  static void norms() {
    constexpr int64_t tokens = 70, hidden = 1003, all = tokens * hidden;
    const auto x = in(all), residual = in(all), weight = in(hidden), scale = in(1), next = in(hidden);
    check("rms_norm", "", [&] {
      auto y = out(all);
      kernels.rms_norm({dtype, x, weight, y, tokens, hidden, 1e-6f});
      return outputs_of(y);
    });
    check("norm_add_norm", "", [&] {
      auto y = out(all), z = out(all);
      kernels.norm_add_norm({dtype, x, residual, weight, scale, next, y, z, tokens, hidden, 1e-6f});
      return outputs_of(y, z);
    });
  }

  static void embedding(int bits) {
    constexpr int64_t tokens = 71, vocab = 259, hidden = 1003;
    const Weight<T> w(bits, 1, vocab, hidden);
    Values<int64_t> ids(tokens);
    for (int64_t t = 0; t < tokens; ++t) ids.at(t) = t * 31 % vocab;
    check("embedding", w.name(), [&] {
      auto y = out(tokens * hidden);
      kernels.embedding({dtype, w.at(), ids, y, tokens, hidden, 3.0f, w.q()});
      return outputs_of(y);
    });
  }

  static void rope_angles() {
    constexpr int64_t tokens = 71;
    Values<int64_t> positions(tokens);
    for (int64_t t = 0; t < tokens; ++t) positions.at(t) = t * 4001;
    const auto freq = random_values<float>(kPairs);
    check("rope_angles", "", [&] {
      auto cos = unwritten<float>(tokens * kPairs), sin = unwritten<float>(tokens * kPairs);
      kernels.rope_angles({positions, freq, cos, sin, tokens, kPairs});
      return outputs_of(cos, sin);
    });
  }

  static void linear(int bits, int64_t tokens) {
    constexpr int64_t n = 259, k = 267;
    const auto x = in(tokens * k);
    const Weight<T> w(bits, 1, n, k);
    check("linear", w.name(), [&] {
      auto y = out(tokens * n);
      auto rounded = w.rounded(tokens);
      kernels.linear({dtype, x, w.at(), y, tokens, n, k, w.q(), rounded});
      return outputs_of(y);
    });
  }

  static void logits(int bits) {
    constexpr int64_t tokens = 66, hidden = 1003, vocab = 101, tasks = 3;  // so many that rounding x forks too
    const auto x = in(tokens * hidden);
    const Weight<T> w(bits, 1, vocab, hidden);
    for (const bool argmax : {false, true})
      check(argmax ? "argmax of logits" : "logits", w.name(), [&] {
        auto y = out(argmax ? 0 : tokens * vocab);
        auto best = unwritten<int64_t>(argmax ? tokens : 0), best_id = unwritten<int64_t>(tokens * tasks);
        auto best_of = unwritten<float>(tokens * tasks);
        auto rounded = w.rounded(tokens);
        void* to = argmax ? nullptr : y.data();
        kernels.logits({dtype, x, w.at(), to, best, best_of, best_id, tokens, vocab, hidden, tasks, 30, w.q(), rounded});
        return outputs_of(y, best);
      });
  }

  static void geglu_mlp(int bits, int64_t tokens) {
    constexpr int64_t hidden = 331, inter = 208;
    const auto x = in(tokens * hidden);
    const Weight<T> gate_up(bits, 1, 2 * inter, hidden, 2), down(bits, 1, hidden, inter);
    check("geglu_mlp", down.name(), [&] {
      auto h = out(tokens * inter), y = out(tokens * hidden);
      auto rounded = gate_up.rounded(tokens), rounded_h = down.rounded(tokens);
      void* to = bits ? static_cast<void*>(rounded_h) : h;
      kernels.geglu_mlp({dtype, x, gate_up.at(), down.at(), to, y, tokens, hidden, inter, gate_up.q(), down.q(), rounded});
      return outputs_of(y);
    });
  }

  static void ple_gate(int64_t tokens) {
    constexpr int64_t hidden = 331, size = 203, stride = 2 * size;
    const auto x = in(tokens * hidden), ple = in(tokens * stride), gate = in(size * hidden), proj = in(hidden * size);
    const auto weight = in(hidden), scale = in(1), next = in(hidden);
    check("ple_gate", "", [&] {
      auto g = out(tokens * size), h = out(tokens * hidden), y = out(tokens * hidden), z = out(tokens * hidden);
      const NormAddNorm norm{dtype, h, x, weight, scale, next, y, z, tokens, hidden, 1e-6f};
      kernels.ple_gate({dtype, x, ple, gate, proj, g, h, norm, tokens, hidden, size, stride});
      return outputs_of(y, z);
    });
  }

  static void moe(int bits, int64_t tokens) {
    constexpr int64_t hidden = 267, inter = 112;
    const int64_t pairs = tokens * kTopK;
    const auto x = in(tokens * hidden);
    const auto weights = random_values<float>(pairs);
    const auto ids = expert_ids(pairs);
    const Weight<T> gate_up(bits, kExperts, 2 * inter, hidden, 2), down(bits, kExperts, hidden, inter);
    check("moe", down.name(), [&] {
      auto h = out(pairs * inter), y = out(tokens * hidden);
      auto rounded = gate_up.rounded(tokens), rounded_h = down.rounded(pairs);
      void* to = bits ? static_cast<void*>(rounded_h) : h;
      auto sum = unwritten<float>(tokens * hidden);
      auto order = unwritten<int32_t>(pairs), offsets = unwritten<int32_t>(kExperts + 1);
      kernels.moe({dtype, x, gate_up.at(), down.at(), weights, ids, to, y, sum, order, offsets, tokens, kTopK, kExperts,
                   hidden, inter, gate_up.q(), down.q(), rounded});
      return outputs_of(y);
    });
  }

  static void grouped_gemm() {
    constexpr int64_t tokens = 23, rows = tokens * kTopK, n = 118, k = 267;
    const auto x = in(rows * k), w = in(kExperts * n * k);
    const auto weights = random_values<float>(rows);
    auto order = unwritten<int32_t>(rows), offsets = unwritten<int32_t>(kExperts + 1);
    sort_by_expert(expert_ids(rows), rows, kExperts, order, offsets);
    const char* const epilogues[] = {"", "geglu", "combine"};
    const int64_t sizes[] = {rows * n, rows * n / 2, tokens * n};
    for (int e = 0; e < 3; ++e)
      check("grouped_gemm", epilogues[e], [&] {
        auto y = out(sizes[e]);
        auto sum = unwritten<float>(tokens * n);
        kernels.grouped_gemm({dtype, x, w, order, offsets, weights, y, sum, rows, kTopK, kExperts, n, k, e});
        return outputs_of(y);
      });
  }

  static void route_topk() {
    constexpr int64_t tokens = 23, hidden = 267, experts = 37;
    const auto x = in(tokens * hidden), scale = in(hidden), proj = in(experts * hidden), each = in(experts);
    check("route_topk", "", [&] {
      auto weights = unwritten<float>(tokens * kTopK), normed = unwritten<float>(tokens * hidden);
      auto scores = unwritten<float>(tokens * experts);
      auto ids = unwritten<int32_t>(tokens * kTopK);
      kernels.route_topk({dtype, x, scale, proj, each, weights, ids, normed, scores, tokens, hidden, experts, kTopK, 1e-6f});
      return outputs_of(weights, ids);
    });
  }

  static void qkv_norm_rope() {
    constexpr int64_t tokens = 101, stride = (kHeads + 2 * kKvHeads) * kDim, kv_size = tokens * kKvHeads * kDim;
    const auto qkv = in(tokens * stride), q_weight = in(kDim), k_weight = in(kDim);
    const auto cos = random_values<float>(tokens * kPairs), sin = random_values<float>(tokens * kPairs);
    Values<int64_t> rows(tokens);
    for (int64_t t = 0; t < tokens; ++t) rows.at(t) = t * 5 % tokens;
    for (const bool cached : {false, true})
      check("qkv_norm_rope", cached ? "rows of a cache" : "", [&] {
        auto q = out(tokens * kHeads * kDim), k = out(kv_size), v = out(kv_size);
        kernels.qkv_norm_rope({dtype, qkv, q_weight, k_weight, cos, sin, q, k, v, cached ? rows.data() : nullptr, tokens, kHeads,
                               kKvHeads, kDim, kPairs, 2, 1e-6f});
        return outputs_of(q, k, v);
      });
  }

  // Rows 5 .. 238 of 246 in two parts, so that a part begins within the rows.
  static void quantize_rows(int bits) {
    constexpr int64_t n = 246, k = 267, first = 5, rows = 233, groups = (k + kGroup - 1) / kGroup, panels = 16;
    const auto w = in(rows * k);
    check("quantize_rows", bits == 8 ? "int8" : "int4", [&] {
      Values<uint8_t> data(panels * groups * group_bytes(bits));
      Values<uint16_t> scale(panels * groups * kPanel);
      const bool finite = kernels.quantize_rows({dtype, w, data, scale, rows, k, first, n, k, groups, 2, bits});
      return outputs_of(data, scale, Values<int32_t>(1, finite ? 0 : -1));
    });
  }

  // The same rows of a quantized weight, or all rows of a bf16 one.
  static void dequantized(int bits) {
    constexpr int64_t n = 246, k = 267, tokens = 7;
    const int64_t first = bits ? 5 : 0, rows = bits ? 233 : n;
    const Weight<T> w(bits, 1, n, k, 2);
    if (bits) {
      check("dequantize_rows", w.name(), [&] {
        auto y = out(rows * k);
        kernels.dequantize_rows({dtype, w.at(), w.scale, y, rows, first, n, k, w.groups, 2, bits});
        return outputs_of(y);
      });
    }
    if (!bits && dtype != Dtype::bf16) return;
    const auto x = random_values<float>(tokens * k);
    check("widened_linear", w.name(), [&] {
      auto y = unwritten<float>(tokens * rows);
      kernels.widened_linear({x, w.at(), y, tokens, rows, k, k, w.q(), first, n, 2});
      return outputs_of(y);
    });
  }

  // Two sequences: a ring of 512 slots with a window; or V alone, in blocks of 32 slots.
  static void attention(bool v_only) {
    constexpr int64_t slots = 512, block = 32, tiles = 16, tokens = 90, row = kKvHeads * kDim;
    const auto k_cache = in(2 * slots * row), v_cache = in(2 * slots * row), k_weight = in(kDim);
    const auto tile_cos = random_values<float>(tiles * kPairs), tile_sin = random_values<float>(tiles * kPairs);
    const auto cos = random_values<float>(kKeyTile * kPairs), sin = random_values<float>(kKeyTile * kPairs);
    Values<int32_t> table;
    for (int32_t i = 0; i < 2 * slots / block; ++i) table.push_back(i ^ 5);
    Cache cache{k_cache, v_cache, nullptr, slots, slots, 1};
    if (v_only)
      cache = {nullptr, v_cache, table, slots, block, slots / block, k_weight, tile_cos, tile_sin, cos, sin, kPairs};
    const char* const name = v_only ? "V-only cache" : "ring";
    const int64_t window = v_only ? 0 : 77;
    const auto q = in(tokens * kHeads * kDim), k = in(tokens * row), v = in(tokens * row);
    const Values<int32_t> lens = {v_only ? 300 : 700, 511};  // 700: a ring that has come round
    check("gqa_decode", name, [&] {
      constexpr int64_t splits = slots / kDecodeSplit;
      auto y = out(2 * kHeads * kDim);
      auto partial = unwritten<float>(2 * kHeads * splits * (kDim + 2));
      kernels.gqa_decode({dtype, q, cache, lens, y, partial, 2, kHeads, kKvHeads, kDim, window, splits, 0.25f});
      return outputs_of(y);
    });
    const Values<int32_t> starts = {0, 59, tokens}, prefix = {100, 7};
    Values<int32_t> images(tokens, -1);
    std::fill(images.begin() + 20, images.begin() + 50, 0);
    check("gqa_prefill", name, [&] {
      auto y = out(tokens * kHeads * kDim);
      kernels.gqa_prefill({dtype, q, k, v, starts, cache, prefix, images, y, 2, kHeads, kKvHeads, kDim, window, 0.25f});
      return outputs_of(y);
    });
  }

  static void all() {
    norms(), rope_angles(), grouped_gemm(), route_topk(), qkv_norm_rope(), attention(false), attention(true);
    for (const int64_t tokens : {1, 5, 70}) ple_gate(tokens);
    for (const int bits : {0, 8, 4}) {
      embedding(bits), logits(bits), dequantized(bits);
      if (bits) quantize_rows(bits);
      for (const int64_t tokens : {1, 5, 70})  // one row, a few tiles of rows, more than one block of tiles
        linear(bits, tokens), geglu_mlp(bits, tokens), moe(bits, tokens);
    }
  }
};

}  // namespace
}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast

int main() {
  using namespace gemma4_fast::GEMMA4_ISA;
  Checks<float>::all();
  Checks<gemma4_fast::bf16>::all();
  std::printf("%s: %d cases, %d failures\n", kernels.name, cases, failures);
  return failures != 0;
}
