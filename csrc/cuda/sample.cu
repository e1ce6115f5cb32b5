// sample: the next token of each row, drawn from softmax(end(x @ weight^T) / temperature) as `uniform` says.
//
// Of the probabilities stay the top_k largest, of these the fewest of the largest whose sum reaches top_p, of these all of at
// least min_p times the largest. Without a top_k all stay, in the order of the ids. Source: gemma4_fast.reference.ops.sample.
//
// The head's launch keeps the logits in fp32, 4 bytes where a row of the weight has 5632, and of each of its blocks (128 or 256
// logits) the largest, and the sum of the weights exp((logit - largest) / temperature). In a second one a block for each row reads
// those alone, a few thousand, and of the logits one block's, or the top_k blocks' with the largest logits: no others can hold one
// of the top_k largest. Sums are in one order, so that a row draws the same alone and in a batch.

#include "cuda/linear.cuh"

namespace gemma4_fast::cuda {
namespace {

constexpr int kDrawers = 1024;  // threads
constexpr int kMostBlocks = 4 * kDrawers, kMostKept = 64, kMostLogits = 16 * kDrawers;  // of the head, of one row
static_assert(kMostKept * 256 <= kMostLogits);

struct Draw {
  uint32_t integers[kWarp];
  float floats[kWarp];
  float rest;  // of the draw, in the block that it fell into
  int blocks[kMostKept];
  struct Candidate {
    uint32_t key;
    int id;
  } found[kMostKept], sorted[kMostKept];
};
static_assert(kDrawers == kWarp * kWarp);  // a lane for each warp

// ---- of all threads, for all threads ----

template <class Of>
DEVICE uint32_t of_block(uint32_t x, uint32_t* scratch, Of of_warp) {
  x = of_warp(x);
  sync_block();
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_block();
  return of_warp(scratch[lane_index()]);
}
DEVICE uint32_t block_max(uint32_t x, uint32_t* scratch) { return of_block(x, scratch, [](uint32_t v) { return warp_max(v); }); }
DEVICE uint32_t block_add(uint32_t x, uint32_t* scratch) { return of_block(x, scratch, [](uint32_t v) { return warp_add(v); }); }

// x of this and all threads before it; `total` of all.
template <class N>
DEVICE N sums_so_far(N x, N* scratch, N* total) {
  const int lane = lane_index();
  const auto of_warp = [&](N v) {
    UNROLL for (int by = 1; by < kWarp; by *= 2) {
      const N before = shuffle(v, lane >= by ? lane - by : 0);
      if (lane >= by) v += before;
    }
    return v;
  };
  x = of_warp(x);
  sync_block();
  if (lane == kWarp - 1) scratch[warp_index()] = x;
  sync_block();
  const N warps = of_warp(scratch[lane]), before = shuffle(warps, warp_index() > 0 ? warp_index() - 1 : 0);
  *total = shuffle(warps, kWarp - 1);
  return warp_index() > 0 ? before + x : x;
}

// The first thread with a weight whose sum with those before is more than `target`; by rounding none may: then the last with one.
// -1: no thread has one.
DEVICE int first_beyond(float weight, float sum, float target, uint32_t* scratch) {
  const uint32_t me = thread_index();
  const uint32_t first = ~block_max(weight > 0.0f && sum > target ? ~me : 0, scratch);
  return first != 0xffffffffu ? int(first) : int(block_max(weight > 0.0f ? me + 1 : 0, scratch)) - 1;
}

// put(place, item) for each of a thread's keys that is among the block's k largest, the lower thread's and item's first of equals;
// places from 0 on, in that order. Keys of 0 are none. Ends with a barrier.
template <int kItems, class Put>
DEVICE void put_largest(const uint32_t (&keys)[kItems], uint32_t k, uint32_t* scratch, Put put) {
  uint32_t least = 0;  // the largest number that at least k keys reach, bit by bit
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t more = least | 1u << bit;
    uint32_t reach = 0;
    UNROLL for (int i = 0; i < kItems; ++i) reach += keys[i] >= more;
    if (block_add(reach, scratch) >= k) least = more;
  }
  uint32_t above = 0, equal = 0, mask = 0, all;
  UNROLL for (int i = 0; i < kItems; ++i) above += keys[i] > least, equal += keys[i] == least;
  uint32_t left = k - block_add(above, scratch);  // of the equal ones
  const uint32_t before = sums_so_far(equal, scratch, &all) - equal;
  left = left > before ? left - before : 0;
  UNROLL for (int i = 0; i < kItems; ++i) {
    const bool tied = keys[i] == least && keys[i] != 0 && left > 0;
    if (tied) --left;
    if (tied || keys[i] > least) mask |= 1u << i;
  }
  const uint32_t mine = count_bits(mask);
  uint32_t place = sums_so_far(mine, scratch, &all) - mine;
  UNROLL for (int i = 0; i < kItems; ++i)
    if (mask >> i & 1) put(place++, i);
  sync_block();
}

// ---- the draw ----

DEVICE float weight_of(const Sample& a, float logit, float largest) { return exp2_fast((logit - largest) * a.head.by); }

// From all logits: the block that it falls into, then the one of its logits.
DEVICE int draw_from_all(const Sample& a, Draw& s, int row, float u) {
  const int blocks = a.blocks, rows = a.rows, each = divide_up(blocks, kDrawers), first = thread_index() * each;
  constexpr int kEach = kMostBlocks / kDrawers;
  float most[kEach], weights[kEach], mine = 0, total;
  uint32_t key = 0;
  UNROLL for (int i = 0; i < kEach; ++i) {
    const bool there = i < each && first + i < blocks;
    const int64_t at = int64_t(row) * blocks + first + i;
    most[i] = there ? load(a.head.best + at) : -infinity();
    weights[i] = there ? load(a.head.sums + at) : 0.0f;
    if (there) key = to_key(most[i]) > key ? to_key(most[i]) : key;
  }
  const float largest = from_key(block_max(key, s.integers));
  UNROLL for (int i = 0; i < kEach; ++i) {
    weights[i] *= most[i] == -infinity() ? 0.0f : weight_of(a, most[i], largest);
    mine += weights[i];
  }
  const float sum = sums_so_far(mine, s.floats, &total);
  if (!(total < infinity())) return -1;
  const int thread = first_beyond(mine, sum, u * total, s.integers);
  if (thread < 0) return -1;
  if (thread_index() == thread) {
    float rest = u * total - (sum - mine), of_last = rest;
    int at = -1, last = 0;
    UNROLL for (int i = 0; i < kEach; ++i) {
      if (at < 0 && weights[i] > 0.0f) {
        last = i, of_last = rest;
        if (rest < weights[i]) at = i;
        else rest -= weights[i];
      }
    }
    s.blocks[0] = first + last, s.rest = of_last;  // by rounding it may be beyond the last one, and so behind that one's end
  }
  sync_block();
  const int block = s.blocks[0];
  const float rest = s.rest;
  const float* logits = a.head.kept + row * a.head.kept_stride + block * rows;
  const float weight = thread_index() < rows ? weight_of(a, load(logits + thread_index()), largest) : 0.0f;
  return block * rows + first_beyond(weight, sums_so_far(weight, s.floats, &total), rest, s.integers);
}

DEVICE int draw_from_largest(const Sample& a, Draw& s, int row, float u) {
  const int blocks = a.blocks, rows = a.rows, me = thread_index();
  const int k = min(a.top_k, blocks);
  {
    constexpr int kEach = kMostBlocks / kDrawers;
    const int each = divide_up(blocks, kDrawers);
    uint32_t keys[kEach];
    UNROLL for (int i = 0; i < kEach; ++i) {
      const int block = me * each + i;
      keys[i] = i < each && block < blocks ? to_key(load(a.head.best + int64_t(row) * blocks + block)) : 0;
    }
    put_largest(keys, k, s.integers, [&](uint32_t place, int i) { s.blocks[place] = me * each + i; });
  }
  {
    constexpr int kEach = kMostLogits / kDrawers;
    const int logits = k * rows, each = divide_up(logits, kDrawers);
    const auto id_of = [&](int i) { return s.blocks[i / rows] * rows + i % rows; };
    uint32_t keys[kEach];
    UNROLL for (int i = 0; i < kEach; ++i) {
      const int logit = me * each + i;
      keys[i] = 0;
      if (i < each && logit < logits) {
        const int id = id_of(logit);
        if (id < a.head.n) keys[i] = to_key(load(a.head.kept + row * a.head.kept_stride + id));
      }
    }
    put_largest(keys, a.top_k, s.integers, [&](uint32_t place, int i) { s.found[place] = {keys[i], id_of(me * each + i)}; });
  }
  const bool mine = me < a.top_k;
  if (mine) {  // found in the order of their ids
    const Draw::Candidate own = s.found[me];
    int before = 0;
    for (int i = 0; i < a.top_k; ++i) before += s.found[i].key > own.key || (s.found[i].key == own.key && i < me);
    s.sorted[before] = own;
  }
  sync_block();
  float weight = mine ? weight_of(a, from_key(s.sorted[me].key), from_key(s.sorted[0].key)) : 0.0f, total;
  const float sum = sums_so_far(weight, s.floats, &total);
  if (!(total < infinity())) return -1;
  if (me > 0 && (sum - weight >= a.top_p * total || weight < a.min_p)) weight = 0;
  const float kept = sums_so_far(weight, s.floats, &total);
  const int at = first_beyond(weight, kept, u * total, s.integers);
  return at < 0 ? -1 : s.sorted[at].id;
}

template <class T>
KERNEL(kDrawers, 1) sample_kernel(KERNEL_ARGS(Sample) a) {
  auto& s = *reinterpret_cast<Draw*>(shared_memory());
  const int row = block_index().x;
  wait_for_inputs();
  const T* x = static_cast<const T*>(a.head.x) + row * a.head.x_stride;
  uint32_t wrong = 0;
  for (int i = thread_index(); i < a.head.k; i += kDrawers) {
    const float v = to_float(load(x + i));
    wrong |= v - v != 0.0f;
  }
  int id = -1;
  if (block_max(wrong, s.integers) == 0) {
    const float u = load(a.uniform + row);
    id = a.top_k ? draw_from_largest(a, s, row, u) : draw_from_all(a, s, row, u);
  }
  if (thread_index() == 0) store(static_cast<int64_t*>(a.out) + row, int64_t(id));
}

}  // namespace

void sample(const Stream& on, const Sample& args) {
  Sample a = args;
  a.rows = kWarps * rows_of_tile(a.head.bits), a.blocks = (int)(a.head.kept_stride / a.rows);
  linear(on, a.head);
  by_type(a.head.dtype, [&](auto type) {
    launch(on, {{a.head.m}, kDrawers, sizeof(Draw)}, sample_kernel<decltype(type)>, a);
  });
}

}  // namespace gemma4_fast::cuda
