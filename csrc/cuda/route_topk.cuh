// route_topk: p = softmax((x / rms(x) * scale * hidden^-0.5) @ proj^T); the top_k largest, divided by their sum, times a learned
// scale of each expert.
//
// x [tokens, hidden]; scale [hidden]; proj [experts, hidden]; per_expert_scale [experts]; weights [tokens, top_k] fp32 in falling
// order of p, ids [tokens, top_k] int32; of equal logits the lower id comes first. All in fp32. Source: Gemma 4's router.
//
// One launch. A block has 16 tokens, 8 experts and 512 columns, a warp 64 of these: for the 26B's router 96 blocks, so that all
// of proj is on its way before the wait. rms(x) is a factor of a row: blocks sum x * scale * proj^T and x^2 side by side, and
// neither order of summing depends on the tokens. The last block of 16 tokens adds the parts and picks, a warp a token.

#pragma once

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda::route {

using namespace device;

constexpr int kTokens = 16, kExperts = 8, kSteps = 2, kColumns = 32 * kWarps * kSteps;  // of a block
constexpr int kMostExperts = 1024;

struct Shared {
  float sums[kWarps][kTokens][kExperts], squares[kWarps][kTokens];
  float gains[kMostExperts];
  uint32_t flag;
};

// d [16, 8] += x scale proj^T over 8 columns, as the fp32 product: x scale has up to 22 bits, `high` the upper 11 and `low` exactly
// the rest, proj 11. y: a lane's columns j and j + 1 of x scale, for two tokens; w: of proj, for an expert.
DEVICE void multiply(float (&low_sum)[4], float (&high_sum)[4], const float (&y)[2][8], const float (&w)[8], int j) {
  float high[4], low[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    const float value = y[i % 2][j + i / 2];
    high[i] = bits_to_float(float_to_bits(value) & 0xffffe000u);
    low[i] = value - high[i];
  }
  mma_tf32(low_sum, low, w[j], w[j + 1]);
  mma_tf32(high_sum, high, w[j], w[j + 1]);
}

// A warp, one token. sums: of the token, [parts] of `stride` floats. The softmax's own sum cancels in the division by the largest's.
template <int kEach>
DEVICE void pick(const RouteTopk& a, const float* sums, int64_t stride, int parts, const float* gains, int token) {
  const int lane = lane_index();
  constexpr int kAtOnce = kEach <= 4 ? 6 : 1;  // parts whose loads are on their way together: 6 are all of the 26B's
  float logits[kEach] = {}, squares = 0;
  for (int part = 0; part < parts; part += kAtOnce) {
    float loaded[kAtOnce][kEach + 1];
    UNROLL for (int p = 0; p < kAtOnce; ++p) {
      const float* row = sums + (part + p) * stride;
      UNROLL for (int i = 0; i <= kEach; ++i) {
        const int expert = i < kEach ? lane + i * kWarp : a.experts;
        const bool there = part + p < parts && (i == kEach || expert < a.experts);
        loaded[p][i] = there ? load_fresh(row + expert) : 0.0f;
      }
    }
    UNROLL for (int p = 0; p < kAtOnce; ++p) {
      squares += loaded[p][kEach];
      UNROLL for (int i = 0; i < kEach; ++i) logits[i] += loaded[p][i];
    }
  }
  const float by = reciprocal_sqrt(squares / a.hidden + a.eps) * reciprocal_sqrt(a.hidden);
  // 0: none there, or taken. So the ids differ and exist, whatever x holds. A NaN is the largest, and makes all weights NaN.
  uint32_t keys[kEach];
  UNROLL for (int i = 0; i < kEach; ++i) keys[i] = lane + i * kWarp < a.experts ? to_key(logits[i] * by) : 0;
  uint32_t key = 0, id = 0;  // lane k's: the k-th largest
  for (int k = 0; k < a.top_k; ++k) {
    uint32_t most = 0, lowest = 0xffffffffu;
    UNROLL for (int i = 0; i < kEach; ++i) most = keys[i] > most ? keys[i] : most;
    most = warp_max(most);
    UNROLL for (int i = kEach - 1; i >= 0; --i) lowest = keys[i] == most ? lane + i * kWarp : lowest;
    lowest = warp_min(lowest);
    UNROLL for (int i = 0; i < kEach; ++i) keys[i] = uint32_t(lane + i * kWarp) == lowest ? 0 : keys[i];
    if (lane == k) key = most, id = lowest;
  }
  const float logit = from_key(key), largest = shuffle(logit, 0);
  const float p = lane < a.top_k ? exp2_fast((logit - largest) * kLog2e) : 0.0f;
  const float sum = warp_sum(p);
  if (lane < a.top_k) {
    store(a.weights + int64_t(token) * a.top_k + lane, divide(p, sum) * gains[id]);
    store(a.ids + int64_t(token) * a.top_k + lane, int32_t(id));
  }
}

// Block (part of the columns, experts, tokens) of `grid`. kEach: experts of a lane in the end, of 32 lanes.
template <class T, int kEach, bool kWhole>
DEVICE void route_block(const RouteTopk& a, Dim block, Dim grid) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, c = lane % 4;
  const int part = block.x, expert = block.y * kExperts + g, first_token = block.z * kTokens;
  const int first = part * kColumns + warp * 32 * kSteps + 8 * c;  // the lane's columns: eight of every 32
  const auto read = [&](const void* p, int row, bool real, int column) {
    return load_eight<T, kWhole>(static_cast<const T*>(p) + int64_t(row) * a.hidden, column, real ? a.hidden : 0);
  };
  Bytes16 proj[kSteps], scale[kSteps], x[kSteps][2];
  UNROLL for (int s = 0; s < kSteps; ++s) {
    const bool real = expert < a.experts;
    const T* row = static_cast<const T*>(a.proj) + (real ? int64_t(expert) * a.hidden : 0);
    proj[s] = load_eight<T, kWhole, true>(row, first + 32 * s, real ? a.hidden : 0);
    scale[s] = load_eight<T, kWhole, true>(static_cast<const T*>(a.scale), first + 32 * s, a.hidden);
  }
  wait_for_inputs();
  UNROLL for (int s = 0; s < kSteps; ++s)
    UNROLL for (int i = 0; i < 2; ++i) {
      const int token = first_token + g + 8 * i;
      x[s][i] = read(a.x, token < a.tokens ? token : 0, token < a.tokens, first + 32 * s);
    }
  UNROLL for (int i = 0; i < (kEach * kWarp + kThreads - 1) / kThreads; ++i) {
    const int e = thread_index() + i * kThreads;
    if (e < a.experts) shared.gains[e] = to_float(load(static_cast<const T*>(a.per_expert_scale) + e));
  }

  // k of the products is any order of the columns: a lane brings those that it has, two at a time.
  float low[kSteps][4] = {}, high[kSteps][4] = {}, squares[2] = {};
  UNROLL for (int s = 0; s < kSteps; ++s) {
    float w[8], by[8], y[2][8];
    to_floats<T>(w, proj[s]);
    to_floats<T>(by, scale[s]);
    UNROLL for (int i = 0; i < 2; ++i) {
      to_floats<T>(y[i], x[s][i]);
      squares[i] += sum_of_squares(y[i]);
      UNROLL for (int j = 0; j < 8; ++j) y[i][j] *= by[j];
    }
    UNROLL for (int j = 0; j < 8; j += 2) multiply(low[s], high[s], y, w, j);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    const float sum = (low[0][i] + low[1][i]) + (high[0][i] + high[1][i]);
    shared.sums[warp][g + i / 2 * 8][2 * c + i % 2] = sum;
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    const float sum = warp_sum<4>(squares[i]);
    if (c == 0) shared.squares[warp][g + 8 * i] = sum;
  }
  sync_block();

  // sums [parts, tokens, experts + 1]: the warps' together; the squares are one expert more.
  const int64_t row_size = a.experts + 1, stride = a.tokens * row_size;
  const int i = thread_index(), is_square = i >= kTokens * kExperts, t = is_square ? i - kTokens * kExperts : i / kExperts;
  const int e = is_square ? a.experts : block.y * kExperts + i % kExperts;
  const bool mine = is_square ? t < kTokens && block.y == 0 : e < a.experts;
  if (mine && first_token + t < a.tokens) {
    float sum = 0;
    UNROLL for (int w = 0; w < kWarps; ++w) sum += is_square ? shared.squares[w][t] : shared.sums[w][t][i % kExperts];
    store(a.sums + part * stride + (first_token + t) * row_size + e, sum);
  }
  const uint32_t blocks = grid.x * grid.y;
  if (!last_to_arrive(a.counters + block.z, blocks, &shared.flag)) return;
  for (int t = first_token + warp; t < a.tokens && t < first_token + kTokens; t += kWarps)
    pick<kEach>(a, a.sums + t * row_size, stride, grid.x, shared.gains, t);
}

// ---- on the host ----

inline bool whole(const RouteTopk& a) { return a.hidden % 8 == 0 && aligned(a.x) && aligned(a.scale) && aligned(a.proj); }
ANYWHERE Dim grid_of(const RouteTopk& a) {
  return {divide_up(a.hidden, kColumns), divide_up(a.experts, kExperts), divide_up(a.tokens, kTokens)};
}

}  // namespace gemma4_fast::cuda::route
