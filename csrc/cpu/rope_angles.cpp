// rope_angles: cos and sin of position * inv_freq, the product and all else in fp64, so that a position of a million still has
// its angle to fp32's last bit. No instruction of it needs a library, and compilers vectorize the loop.
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

// pi / 2 in three parts. The first two have 33 bits: times a whole number of up to 20 bits they are exact.
constexpr double kPart1 = 1.5707963267341256, kPart2 = 6.077100506303966e-11, kPart3 = 2.0222662487959506e-21;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves a whole number in the last bits

GEMMA4_INLINE int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
GEMMA4_INLINE double double_of(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// |x| < 1.6e6. Series to r^13: |r| <= pi / 4 leaves an error below 1e-12.
GEMMA4_INLINE void cos_sin(double x, float& cos, float& sin) {
  const double shifted = x * 0.6366197723675814 + kRound, n = shifted - kRound;
  const int64_t quarter = bits_of(shifted);
  const double r = ((x - n * kPart1) - n * kPart2) - n * kPart3, z = r * r;
  const double s =
      r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800 + z / 6227020800.0))))));
  const double c =
      1 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z / 479001600.0)))));
  // Odd quarters swap the two, and some change a sign: by bits, as a compiler vectorizes no choice between doubles.
  const int64_t swap = (bits_of(s) ^ bits_of(c)) & -(quarter & 1);
  cos = static_cast<float>(double_of(bits_of(c) ^ swap ^ static_cast<int64_t>(static_cast<uint64_t>(quarter + 1) >> 1 << 63)));
  sin = static_cast<float>(double_of(bits_of(s) ^ swap ^ static_cast<int64_t>(static_cast<uint64_t>(quarter) >> 1 << 63)));
}

}  // namespace

void rope_angles(const RopeAngles& a) {
  parallel(a.tokens, a.tokens * a.pairs * 64, [&](int64_t t) {
    const double position = static_cast<double>(a.positions[t]);
    float *cos = a.cos + t * a.pairs, *sin = a.sin + t * a.pairs;
    for_vecs(a.pairs, [&](int64_t i, int n) GEMMA4_LAMBDA_INLINE {
      float freq[kWidth], c[kWidth], s[kWidth];  // of its own: what may overlap is not vectorized
      store(freq, load_some(a.inv_freq + i, n));
      for (int l = 0; l < kWidth; ++l) cos_sin(position * freq[l], c[l], s[l]);
      store_some(cos + i, load(c), n), store_some(sin + i, load(s), n);
    });
  });
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
