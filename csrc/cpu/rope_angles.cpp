// rope_angles: cos and sin of position * inv_freq, the product and all else in fp64, so that a position of a million still has
// its angle to fp32's last bit. No instruction of it needs a library, and compilers vectorize the loop.
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace gemma4_fast {
namespace GEMMA4_ISA {
namespace {

// pi / 2 in three parts. The first two have 33 bits: times a whole number of up to 20 bits they are exact.
constexpr double kPart1 = 1.5707963267341256, kPart2 = 6.077100506303966e-11, kPart3 = 2.0222662487959506e-21;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves a whole number in the last bits

// |x| < 1.6e6. Series to r^13: |r| <= pi / 4 leaves an error below 1e-12.
GEMMA4_INLINE void cos_sin(double x, float& cos, float& sin) {
  const double shifted = x * 0.6366197723675814 + kRound, n = shifted - kRound;
  int64_t quarter;
  std::memcpy(&quarter, &shifted, 8);
  const double r = ((x - n * kPart1) - n * kPart2) - n * kPart3, z = r * r;
  const double s =
      r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800 + z / 6227020800.0))))));
  const double c =
      1 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z / 479001600.0)))));
  const bool odd = quarter & 1;
  const double along = odd ? s : c, across = odd ? c : s;
  cos = static_cast<float>((quarter + 1) & 2 ? -along : along);
  sin = static_cast<float>(quarter & 2 ? -across : across);
}

}  // namespace

void rope_angles(const RopeAngles& a) {
  parallel(a.tokens, a.tokens * a.pairs * 64, [&](int64_t t) {
    const double position = static_cast<double>(a.positions[t]);
    float *cos = a.cos + t * a.pairs, *sin = a.sin + t * a.pairs;
    for (int64_t i = 0; i < a.pairs; ++i) cos_sin(position * a.inv_freq[i], cos[i], sin[i]);
  });
}

}  // namespace GEMMA4_ISA
}  // namespace gemma4_fast
