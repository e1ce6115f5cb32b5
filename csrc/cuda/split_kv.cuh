// How decode attention's work over a cache is cut, and how the parts' results are merged: the same bits however it is cut, and
// so for a sequence alone and in a batch.
//
// A row is a sequence with one KV head and up to eight of its query heads; it sees positions [lo, length). At absolute positions
// its work is cut into tiles of 32, leaves of 4 tiles, nodes of 4 leaves. One operation merges two parts' softmax (m, l, acc),
// and the order is one: tiles into their leaf, leaves into their node, one after the other; nodes j = w mod 8 into sum w, the
// eight sums into the result. Whoever has consecutive parts from the first of a leaf or a node on merges them itself; what
// begins in the middle of one is kept apart. A part merged into nothing is itself, bit for bit.
//
// Units of 1, 4 or 16 tiles, of all rows one after the other, are dealt out in ranges, as many to one block as to another.
// Every block finds this out for itself, from the lengths in the GPU's memory: the host plans nothing, a recorded step holds for
// any lengths, and slots that no length reaches cost nothing. A unit has a place for one piece, that which ends with it.
#pragma once

#include "cuda/rows.cuh"

namespace gemma4_fast::cuda {

using namespace device;

constexpr int kTile = 32, kLeaf = 4, kNode = 16;  // positions; tiles; tiles
constexpr int kHeads = 8;  // of a row, the n of mma

struct Seen {
  int lo, length;
  // Of 2^shift tiles, cut at multiples of that.
  DEVICE int first(int shift) const { return lo / kTile >> shift; }
  DEVICE int units(int shift) const { return length == 0 ? 0 : ((length - 1) / kTile >> shift) - first(shift) + 1; }
};

DEVICE Seen seen(const GqaDecode& a, int b) {
  const int length = a.wide_lens ? (int)load(static_cast<const int64_t*>(a.lens) + b) : load(static_cast<const int*>(a.lens) + b);
  return {length > a.window ? length - a.window : 0, length};  // the launcher has made window at most slots
}

DEVICE int rows_of_sequence(const GqaDecode& a) { return a.kv_heads * divide_up(a.heads / a.kv_heads, kHeads); }
ANYWHERE int pairs_of_heads(const GqaDecode& a) {
  const int group = a.heads / a.kv_heads;
  return group < kHeads ? divide_up(group, 2) : kHeads / 2;
}

DEVICE int warp_sum(int x) {
  UNROLL for (int mask = 16; mask > 0; mask /= 2) x += (int)shuffle_xor((uint32_t)x, mask);
  return x;
}

// A row's place: its sequence, its number there, and of which unit of all it is the first.
struct Row {
  int b, number, base;
};

struct Cut {
  int shift;          // 2^shift tiles a unit
  int units, blocks;  // of all rows, and that they are dealt out to

  DEVICE int begin_of(int block) const { return (int)(int64_t(block) * units / blocks); }
  DEVICE int block_of(int unit) const { return (int)(((int64_t(unit) + 1) * blocks - 1) / units); }
};

// The largest units that leave the busiest multiprocessor at most an eighth more to do than single tiles would.
DEVICE Cut cut(const GqaDecode& a) {
  int counts[3] = {};
  for (int b = lane_index(); b < a.batch; b += kWarp) {
    const Seen s = seen(a, b);
    UNROLL for (int i = 0; i < 3; ++i) counts[i] += s.units(2 * i);
  }
  Cut best{};
  int64_t least = 0;
  UNROLL for (int i = 0; i < 3; ++i) {
    const int64_t units = int64_t(warp_sum(counts[i])) * rows_of_sequence(a);
    const int at_once = units > a.cores ? 2 : 1;  // blocks of a multiprocessor
    const int64_t rounds = (units + at_once * a.cores - 1) / (at_once * a.cores), load = rounds * at_once << 2 * i;
    if (i == 0) least = load;
    if (best.units == 0 || best.units > a.capacity || 8 * load <= 9 * least)
      best = {2 * i, units < 0x7fffffff ? (int)units : 0x7fffffff, units < a.blocks ? (int)units : a.blocks};
  }
  return best;
}

DEVICE int blocks_of(const Cut& cut, const Row& row, const Seen& s) {
  return cut.block_of(row.base + s.units(cut.shift) - 1) - cut.block_of(row.base) + 1;
}

// For a whole warp, as the next.
DEVICE Row numbered(const GqaDecode& a, const Cut& cut, int b, int number) {
  int before = 0;
  for (int i = lane_index(); i < b; i += kWarp) before += seen(a, i).units(cut.shift);
  return {b, number, warp_sum(before) * rows_of_sequence(a) + number * seen(a, b).units(cut.shift)};
}

// The row that a unit belongs to.
DEVICE Row row_of(const GqaDecode& a, const Cut& cut, int unit) {
  const int rows = rows_of_sequence(a), of_one = unit / rows;
  for (int b0 = 0, before = 0;; b0 += kWarp) {
    const int b = b0 + lane_index(), mine = b < a.batch ? seen(a, b).units(cut.shift) : 0;
    int sum = mine;
    UNROLL for (int by = 1; by < kWarp; by *= 2) {
      const int x = shuffle(sum, lane_index() >= by ? lane_index() - by : 0);
      if (lane_index() >= by) sum += x;
    }
    const uint32_t ends_behind = ballot(before + sum > of_one);
    if (ends_behind || b0 + kWarp >= a.batch) {
      const int at = kWarp - count_bits(ends_behind);  // sums never fall: the first of those lanes
      const int units = shuffle(mine, at), first = rows * (before + shuffle(sum, at) - units);
      const int number = (unit - first) / units;
      return {b0 + at, number, first + number * units};
    }
    before += shuffle(sum, kWarp - 1);
  }
}

// A block's part of a row. In shared memory, since a lane has no registers to keep it in, or what follows from it.
struct Range {
  Cut work;
  int unit, end_unit;  // of the block's, what is left
  Row row;
  Seen seen;
  int kv_head, head0, heads;  // the first of the row's query heads, and how many
  int half;                   // of a head's columns
  int begin, end, row_end;    // tiles
  int unit0;                  // of all rows' units, the one that a row which begins at position 0 would begin with
  // What begins in the middle of a leaf or a node is kept apart until that ends: tiles below these.
  int tiles_apart, leaves_apart;
  bool alone;  // the row's one piece

  DEVICE bool sees(int position) const { return position >= seen.lo && position < seen.length; }

  // The next one; none: begin is end. For one thread.
  DEVICE void advance(const GqaDecode& a) {
    begin = end = 0;
    if (unit == end_unit) return;
    while (seen = cuda::seen(a, row.b), seen.length == 0) ++row.b;
    const int units = seen.units(work.shift), skip = unit - row.base, take = min(units - skip, end_unit - unit);
    unit0 = row.base - seen.first(work.shift);
    row_end = (seen.length - 1) / kTile + 1;
    begin = skip ? (unit - unit0) << work.shift : seen.lo / kTile;
    end = skip + take < units ? (unit + take - unit0) << work.shift : row_end;
    tiles_apart = skip && begin % kLeaf ? (begin / kLeaf + 1) * kLeaf : 0;
    leaves_apart = skip && begin % kNode ? (begin / kNode + 1) * kNode : 0;
    alone = take == units && seen.units(4) == 1;
    const int group = a.heads / a.kv_heads, eights = divide_up(group, kHeads);
    half = a.dim / 2, kv_head = row.number / eights, head0 = kv_head * group + row.number % eights * kHeads;
    heads = min((kv_head + 1) * group - head0, kHeads);
  }
  DEVICE void pass(const GqaDecode& a) {
    unit += min(row.base + seen.units(work.shift), end_unit) - unit;
    row.base = unit;
    if (++row.number == rows_of_sequence(a)) ++row.b, row.number = 0;
  }
};

}  // namespace gemma4_fast::cuda
