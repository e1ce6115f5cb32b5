// Parts of decode attention's sums: on their way, in scratch, and merged. See split_kv.cuh for the order.
//
//   pieces [units][D / 16][pairs of heads][8][4] fp32, as mma leaves it: of m-tile i, pair c, lane g: (column 16 i + g, head 2c),
//          (the same, 2c + 1), (column 16 i + g + 8, head 2c), (the same, 2c + 1)
//   sums   [units][8 heads] of m (base 2) and l, fp32; m = -inf where no piece ends
// Columns are those of a head padded to D: the padding follows each half.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/split_kv.cuh"

namespace gemma4_fast::cuda {

// By what two parts are multiplied: base 2. Not for two empty ones.
struct Shares {
  float m, old, fresh;
};
DEVICE Shares shares(float m, float m_new) {
  const float most = m > m_new ? m : m_new;
  return {most, exp2_fast(m - most), exp2_fast(m_new - most)};
}
// One rounding, then a fused one: the compiler is left no choice.
DEVICE float merged(float x, float share, float x_new, float share_new) {
  return fused_multiply_add(x, share, x_new * share_new);
}

// Of heads g: m and l. Of a lane's places in O^T, m-tiles warp, warp + 8, ... of it: acc.
template <int D>
struct Sums {
  static constexpr int kMTiles = D / 128;
  float m, l, acc[kMTiles][4];

  DEVICE void clear() {
    m = -infinity(), l = 0;
    UNROLL for (int i = 0; i < kMTiles; ++i) UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = 0;
  }
  // acc_of(x, i): what is new of m-tile i.
  template <class AccOf>
  DEVICE void merge(float m_new, float l_new, AccOf acc_of) {
    const Shares by = shares(m, m_new);
    m = by.m, l = merged(l, by.old, l_new, by.fresh);
    float old[2], fresh[2];
    of_pair(old, by.old), of_pair(fresh, by.fresh);
    UNROLL for (int i = 0; i < kMTiles; ++i) {
      float x[4];
      acc_of(x, i);
      UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = merged(acc[i][j], old[j % 2], x[j], fresh[j % 2]);
    }
  }
  // Of heads 2c and 2c + 1, from the lanes that have them.
  DEVICE static void of_pair(float (&x)[2], float mine) {
    UNROLL for (int i = 0; i < 2; ++i) x[i] = shuffle(mine, lane_index() % 4 * 8 + 4 * i);
  }
};

// m and l of the piece that ends with the tile; -inf: none does. Returns the unit.
DEVICE int64_t put_sums(const GqaDecode& a, const Range& r, int tile, float m, float l) {
  const int64_t unit = r.unit0 + (tile >> r.work.shift);
  const int thread = anew(thread_index());
  if (thread < kWarp && thread % 4 == 0)
    store(static_cast<Bytes8*>(a.sums) + unit * kHeads + thread / 4, Bytes8{{float_to_bits(m), float_to_bits(l)}});
  return unit;
}

template <int D>
DEVICE void put(const GqaDecode& a, const Range& r, int tile, Sums<D>& x) {
  const int pairs = pairs_of_heads(a), thread = anew(thread_index()), warp = thread / kWarp, g = thread % kWarp / 4, c = thread % 4;
  auto* to = static_cast<Bytes16*>(a.pieces) + put_sums(a, r, tile, x.m, x.l) * (D / 16 * pairs * 8);
  UNROLL for (int i = 0; i < Sums<D>::kMTiles; ++i) {
    Bytes16 v;
    UNROLL for (int j = 0; j < 4; ++j) v.w[j] = float_to_bits(x.acc[i][j]);
    if (c < pairs) store(to + ((warp + kWarps * i) * pairs + c) * 8 + g, v);
  }
  x.clear();
}

// Of a pair of heads.
struct Part {
  float m[2], l[2], acc[4];
};
DEVICE Part nothing() { return {{-infinity(), -infinity()}, {}, {}}; }
DEVICE void merge(Part& x, const Part& y) {
  if (y.m[0] == -infinity()) return;
  UNROLL for (int h = 0; h < 2; ++h) {
    const Shares s = shares(x.m[h], y.m[h]);
    x.m[h] = s.m;
    x.l[h] = merged(x.l[h], s.old, y.l[h], s.fresh);
    UNROLL for (int i = h; i < 4; i += 2) x.acc[i] = merged(x.acc[i], s.old, y.acc[i], s.fresh);
  }
}

// The place in a head of 2 half columns of a column of one padded to D; -1: padding.
template <int D>
DEVICE int column_of(int padded, int half) {
  const int in_half = padded % (D / 2);
  return in_half < half ? padded / (D / 2) * half + in_half : -1;
}

// acc / l of m-tile i, of a pair of heads, into the output. half: of a head's columns.
template <class T, int D>
DEVICE void write(const GqaDecode& a, const Row& row, int half, int i, int pair, int g, const float (&acc)[4], const float (&l)[2]) {
  const int group = a.heads / a.kv_heads, eights = divide_up(group, kHeads);
  const int head = row.number % eights * kHeads + 2 * pair;  // of the KV head's
  auto* out = static_cast<uint16_t*>(a.out) + (int64_t(row.b) * a.heads + row.number / eights * group + head) * a.dim;
  UNROLL for (int j = 0; j < 2; ++j) {
    const int column = column_of<D>(16 * i + g + 8 * j, half);
    if (column < 0) continue;
    const uint32_t both = pack<T>(divide(acc[2 * j], l[0]), divide(acc[2 * j + 1], l[1]));
    if (head < group) store(out + column, (uint16_t)both);
    if (head + 1 < group) store(out + a.dim + column, (uint16_t)(both >> 16));
  }
}

// 16 bytes each.
template <int D>
ANYWHERE int places_of(const GqaDecode& a) {
  return D / 16 * pairs_of_heads(a) * 8;
}

// Where a row's pieces lie: in scratch, written by other launches or blocks.
struct InScratch {
  const Bytes16 *sums, *pieces;
  DEVICE Bytes16 sum(int64_t at) const { return load_fresh(sums + at); }
  DEVICE Bytes16 piece(int64_t at) const { return load_fresh(pieces + at); }
};
DEVICE InScratch in_scratch(const GqaDecode& a, const Row& row, int places) {
  return {static_cast<const Bytes16*>(a.sums) + int64_t(row.base) * (kHeads / 2),
          static_cast<const Bytes16*>(a.pieces) + int64_t(row.base) * places};
}
// The same, all brought into shared memory at once: one block's loads would wait for one another.
struct InShared {
  const Bytes16 *sums, *pieces;
  DEVICE Bytes16 sum(int at) const { return sums[at]; }
  DEVICE Bytes16 piece(int at) const { return pieces[at]; }
};
DEVICE InShared bring(const InScratch& from, int units, int places, Bytes16* shared) {
  const int sums = units * (kHeads / 2);
  for (int i = thread_index(); i < sums + units * places; i += kThreads)
    copy_async(shared + i, i < sums ? from.sums + i : from.pieces + i - sums, true);
  commit_copies();
  wait_for_copies<0>();
  sync_block();
  return {shared, shared + sums};
}

// The row's pieces into the output: slices of 32 of its places, from the `first` of every `stride` on. All of the block. Each
// warp has a slice and every eighth node (every second or fourth if there are no more). kAtOnce: loads on their way. shared:
// kThreads Parts.
template <class T, int D, int kAtOnce, class From>
DEVICE void merge_row(const GqaDecode& a, const Cut& cut, const Row& row, const From& from, int first, int stride, Part* shared) {
  const Seen s = seen(a, row.b);
  const int unit0 = s.first(cut.shift), units = s.units(cut.shift), node0 = s.first(4), nodes = s.units(4);
  const int sums = nodes > 4 ? 8 : nodes > 2 ? 4 : nodes;  // of nodes, each a warp's
  const int at_once = kWarps / sums, warp = warp_index(), lane = lane_index();
  const int pairs = pairs_of_heads(a), places = places_of<D>(a);
  for (int slice = first * at_once; slice * kWarp < places; slice += stride * at_once) {
    const int place = (slice + warp / sums) * kWarp + lane, pair = place / 8 % pairs;
    Part total = nothing(), of_node = nothing(), of_leaf = nothing();
    int node = warp % sums, unit = 0, end = 0;  // the row's; units [unit, end) of the node are left
    const auto enter = [&] {
      unit = max(((node0 + node) * kNode >> cut.shift) - unit0, 0);
      end = min(((node0 + node + 1) * kNode >> cut.shift) - unit0, units);
    };
    enter();
    while (node < nodes && place < places) {
      Part parts[kAtOnce];
      int ends[kAtOnce];  // 1: with this unit its leaf, 2: its node too
      UNROLL for (int i = 0; i < kAtOnce; ++i) {  // acc where there is no piece too, so that no load waits for another
        parts[i] = nothing(), ends[i] = 0;
        if (node >= nodes) continue;
        const Bytes16 ml = from.sum(unit * (kHeads / 2) + pair);
        const Bytes16 acc = from.piece(int64_t(unit) * places + place);
        UNROLL for (int h = 0; h < 2; ++h) parts[i].m[h] = bits_to_float(ml.w[2 * h]), parts[i].l[h] = bits_to_float(ml.w[2 * h + 1]);
        UNROLL for (int j = 0; j < 4; ++j) parts[i].acc[j] = bits_to_float(acc.w[j]);
        ++unit;
        ends[i] = unit == end ? 2 : ((unit0 + unit) << cut.shift) % kLeaf == 0;
        if (unit == end) node += sums, enter();
      }
      UNROLL for (int i = 0; i < kAtOnce; ++i) {
        merge(of_leaf, parts[i]);
        if (ends[i] == 0) continue;
        merge(of_node, of_leaf);
        of_leaf = nothing();
        if (ends[i] == 1) continue;
        merge(total, of_node);
        of_node = nothing();
      }
    }
    if (sums > 1) {
      shared[thread_index()] = total;
      sync_block();
      if (warp % sums == 0)
        for (int w = 1; w < sums; ++w) merge(total, shared[thread_index() + w * kWarp]);
    }
    if (warp % sums == 0 && place < places) write<T, D>(a, row, a.dim / 2, place / 8 / pairs, pair, place % 8, total.acc, total.l);
    if (sums > 1) sync_block();
  }
}

}  // namespace gemma4_fast::cuda
