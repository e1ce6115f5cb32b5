// gqa_decode: attention of one new token per sequence over its cache,  out[b, h] = softmax(scale q[b, h] K^T) V
//
// q [B, Hq, D]; caches [B, S, Hkv, D], position p in slot p mod S, or [num_blocks, block_size, Hkv, D] with block_table. Of a
// V-only cache K = RoPE(w * V) is rebuilt: rebuilt_keys.cuh. How the work is cut and merged: split_kv.cuh. Source: Flash-Decoding
// (Dao et al. 2023), over grouped queries (Ainslie et al. 2023).
//
// A block takes tiles of 32 positions, one after the other, through a ring of buffers: one of the V-only cache's for a tile, else
// K's and then V's. Positions are the mma's 16 rows, a KV head's query heads its 8 columns: none is empty for groups of eight.
//   S^T [32, 8] = K Q^T: a warp has 16 positions and a quarter of D; the quarters' sums meet in shared memory
//   every warp takes the tile's softmax weights from there, as the b of
//   O^T [D, 8] = V^T P^T: a warp has an eighth of D
// Groups of more than eight are rows of their own, and read the cache again: no Gemma 4 has them. A row of one range and one node
// is written at once. The others' pieces are merged by the last block that has one, if they are small (a window's); else by a
// second launch: of a long cache's row one multiprocessor would read megabytes, level after level of a tree that waits at each.

#include <algorithm>
#include <type_traits>

#include "cuda/rebuilt_keys.cuh"
#include "cuda/merge_kv.cuh"

namespace gemma4_fast::cuda {
namespace {

constexpr float kLeast = -3e38f;
constexpr int kScores = 36;  // floats of a head's row of a quarter's scores: 32, and 4 against bank conflicts
constexpr int kScoresBytes = 4 * kHeads * kScores * 4, kRangeBytes = 128;

DEVICE void wait_for_all_but(int newest) {
  if (newest >= 4) return wait_for_copies<4>();
  if (newest == 3) return wait_for_copies<3>();
  if (newest == 2) return wait_for_copies<2>();
  newest == 1 ? wait_for_copies<1>() : wait_for_copies<0>();
}

// The bytes of a buffer's row, its 16-byte chunks in an order in which no eight rows' same chunk shares a bank. Of chunks first + at
// with `first` a multiple of eight: row_at(row, at) + 16 first.
template <int D>
DEVICE int chunk_at(int row, int at) {
  return row * (2 * D) + (at ^ (row & 7)) * 16;
}

// A tile of one cache into a buffer; what the row does not see, and padding, becomes 0.
template <int D>
DEVICE void copy_tile(const GqaDecode& a, const Range& r, int tile, bool of_v, char* buffer) {
  constexpr int kChunks = D / 8;
  const int lane = lane_index(), position = tile * kTile + lane;
  const bool real = r.sees(position);
  const uint32_t by_batch = of_v ? a.v_batch : a.k_batch, by_slot = of_v ? a.v_slot : a.k_slot;
  uint32_t offset = (of_v ? a.v_head : a.k_head) * r.kv_head;  // of the lane's position, in 16 bytes
  if (real) {
    const uint32_t slot = uint32_t(position) % uint32_t(a.slots);
    if (a.table) {
      const uint32_t in = slot / uint32_t(a.block_size);
      offset += by_batch * load(a.table + int64_t(r.row.b) * a.table_stride + in) + by_slot * (slot - in * a.block_size);
    } else {
      offset += by_batch * r.row.b + by_slot * slot;
    }
  }
  const uint32_t rows = ballot(real);
  // A thread has one chunk of every kStep-th row; first < kStep, so that their places differ by constants.
  constexpr int kStep = kThreads / kChunks;
  const int first = thread_index() / kChunks, chunk = thread_index() % kChunks, column = column_of<D>(8 * chunk, r.half);
  const char* from = static_cast<const char*>(of_v ? a.v : a.k) + 2 * max(column, 0);
  const uint32_t mine = column >= 0 ? rows >> first : 0;
  UNROLL for (int k = 0; k < kTile / kStep; ++k) {
    const auto of_row = (uint32_t)shuffle((int)offset, first + k * kStep);
    const int to = chunk_at<D>(first, chunk ^ (k * kStep & 7)) + k * kStep * (2 * D);
    copy_async(buffer + to, from + uint64_t(of_row) * 16, mine >> k * kStep & 1);
  }
}

// Sixteens of columns, in the order that a quarter of the warps takes them, its j-th being first_sixteen(j) + quarter: rotating lo
// and hi, the rest of lo, of hi.
template <int D>
DEVICE constexpr int first_sixteen(int j) {
  constexpr int kHalf = D / 32;
  return j == 0 ? 0 : j == 1 ? kHalf : 4 * (j - 2) + (4 * (j - 2) < kHalf - 4 ? 4 : 8);
}

// Whether a kernel can merge rows: the others have no registers for it, and no windows in Gemma 4.
template <int D, bool kRebuilt>
constexpr bool kMergesItself = D <= 256 && !kRebuilt;

template <class T, int D, bool kRebuilt>
KERNEL(kThreads, 2) gqa_decode_kernel(KERNEL_ARGS(GqaDecode) a) {
  using Keys = std::conditional_t<kRebuilt, RebuiltKeys<T>, StoredKeys>;
  constexpr int kSixteens = D / 64, kBuffer = kTile * D * 2, kEntries = kRebuilt ? 1 : 2;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, c = lane % 4;
  const int quarter = warp / 2, mt = warp % 2;
  auto& r = *reinterpret_cast<Range*>(shared_memory());
  auto* flag = reinterpret_cast<uint32_t*>(shared_memory() + sizeof(Range));
  static_assert(sizeof(Range) + 4 <= kRangeBytes);
  auto* scores = reinterpret_cast<float*>(shared_memory() + kRangeBytes);  // [4 quarters][8 heads][kScores]
  // b's of Q^T [D, 8], of the quarter's sixteens: two of each, of two at once.
  auto* q = reinterpret_cast<Bytes16*>(shared_memory() + kRangeBytes + kScoresBytes) + quarter * (kSixteens / 2) * kWarp + lane;
  char* of_keys = shared_memory() + kRangeBytes + kScoresBytes + 16 * D;
  char* ring = of_keys + Keys::kBytes;
  // Where a lane points load_matrices: rows, chunks.
  const int k_lane = chunk_at<D>(16 * mt + lane % 16, 2 * quarter + lane / 16);
  const int v_lane = chunk_at<D>(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);

  const auto* k_weight = static_cast<const T*>(a.k_weight);
  const Keys keys(of_keys, a.freq, a.pairs, k_weight, a.dim, quarter, mt);
  wait_for_inputs();
  if (warp == 0) {
    const Cut work = cut(a);
    const int block = block_index().x, units = block < work.blocks ? work.begin_of(block + 1) : 0;
    const int unit = units ? work.begin_of(block) : 0;
    const Row row = units ? row_of(a, work, unit) : Row{};
    if (lane == 0) {
      r.work = work, r.unit = unit, r.end_unit = units, r.row = row;
      r.advance(a);
    }
  }
  for (sync_block(); r.begin < r.end; sync_block()) {
    // Entries of the ring: the range's tiles, or K's and V's in turn.
    const auto copy = [&](int entry, int to) {
      const int tile = r.begin + entry / kEntries;
      if (tile < r.end) copy_tile<D>(a, r, tile, kRebuilt || entry % 2 == 1, ring + to * kBuffer);
      commit_copies();
    };
    for (int i = 0; i < a.buffers - 1; ++i) copy(i, i);
    int reading = 0;
    const auto next_buffer = [&](int entry) {  // it has come, and the one before is read
      wait_for_all_but(a.buffers - 2);
      sync_block();
      copy(entry + a.buffers - 1, (reading == 0 ? a.buffers : reading) - 1);
      char* at = ring + reading * kBuffer;
      reading = reading + 1 == a.buffers ? 0 : reading + 1;
      return at;
    };

    // q, each warp of a quarter half of it. There after the first tile's barrier.
    const int64_t head = int64_t(r.row.b) * a.heads + r.head0 + g;
    const int lane_columns = anew(thread_index()) / (2 * kWarp) * 16 + anew(thread_index()) % 4 * 2;
    const auto* of_head = static_cast<const T*>(a.q) + head * a.dim;
    UNROLL for (int j = 0; j < kSixteens; ++j) {
      if (j / 2 % 2 != mt) continue;
      UNROLL for (int i = 0; i < 2; ++i) {
        const int at = lane_columns + first_sixteen<D>(j) % (D / 32) * 16 + 8 * i;
        const auto pair_of = [&](const T* row) {
          return reinterpret_cast<const uint32_t*>(row + first_sixteen<D>(j) / (D / 32) * r.half + at);
        };
        uint32_t pair = g < r.heads && at < r.half ? load(pair_of(of_head)) : 0;
        if (kRebuilt && j >= 2 && at < r.half) {
          const float2 x = unpack<T>(pair), w = unpack<T>(load_weight(pair_of(k_weight)));
          pair = pack<T>(x.x * w.x, x.y * w.y);
        }
        q[j / 2 * kWarp].w[j % 2 * 2 + i] = pair;
      }
    }

    Sums<D> leaf, node;
    leaf.clear(), node.clear();
    for (int tile = r.begin; tile < r.end; ++tile) {
      char* k_tile = next_buffer((tile - r.begin) * kEntries);
      float sum[2][4] = {};
      UNROLL for (int j = 0; j < kSixteens; j += 2) {
        uint32_t x[4], y[4];
        Bytes16 of_q = q[j / 2 * kWarp];
        load_matrices(x, k_tile + k_lane + 32 * first_sixteen<D>(j));
        load_matrices(y, k_tile + k_lane + 32 * first_sixteen<D>(j + 1));
        if constexpr (kRebuilt)
          if (j == 0) keys.turn_back(of_q.w, tile * kTile), keys.rotate(x, y);
        mma<T>(sum[0], x, of_q.w[0], of_q.w[1]);
        mma<T>(sum[1], y, of_q.w[2], of_q.w[3]);
      }
      // Position 16 s + 8 i + 2c + j of a head's row is its float 8c + 4 s + 2 i + j, s turned round in every other pair of heads.
      UNROLL for (int i = 0; i < 4; ++i) {
        float* to = scores + (quarter * kHeads + 2 * c + i % 2) * kScores;
        to[g / 2 * 8 + (mt ^ (c & 1)) * 4 + i / 2 * 2 + g % 2] = sum[0][i] + sum[1][i];
      }
      char* v_tile = k_tile;
      if constexpr (kRebuilt)
        sync_block();
      else
        v_tile = next_buffer((tile - r.begin) * kEntries + 1);

      // Softmax of the tile's column g: this lane has eight positions of it.
      float p[8], most = -infinity(), l = 0;
      UNROLL for (int i = 0; i < 2; ++i) {
        Bytes16 of[4];
        UNROLL for (int w = 0; w < 4; ++w)
          of[w] = *reinterpret_cast<const Bytes16*>(scores + (w * kHeads + g) * kScores + 8 * c + (i ^ (g / 2 & 1)) * 4);
        UNROLL for (int j = 0; j < 4; ++j) {
          float x = bits_to_float(of[0].w[j]);
          UNROLL for (int w = 1; w < 4; ++w) x += bits_to_float(of[w].w[j]);
          p[4 * i + j] = x * (a.scale * kLog2e);
        }
      }
      if (!r.sees(tile * kTile) || !r.sees(tile * kTile + kTile - 1))
        UNROLL for (int i = 0; i < 8; ++i)
          if (!r.sees(tile * kTile + i / 4 * 16 + i % 4 / 2 * 8 + 2 * c + i % 2)) p[i] = -infinity();
      UNROLL for (int i = 0; i < 8; ++i) most = max(most, p[i]);
      UNROLL for (int by = 1; by < 4; by *= 2) most = max(most, shuffle_xor(most, by));
      most = max(most, kLeast);  // -infinity is for no part at all; of NaN and -infinity alone l becomes NaN, or 0
      UNROLL for (int i = 0; i < 8; ++i) p[i] = exp2_fast(p[i] - most), l += p[i];
      UNROLL for (int by = 1; by < 4; by *= 2) l += shuffle_xor(l, by);
      uint32_t b[2][2];
      UNROLL for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = pack<T>(p[2 * i], p[2 * i + 1]);
      leaf.merge(most, l, [&](float (&x)[4], int i) {
        UNROLL for (int j = 0; j < 4; ++j) x[j] = 0;
        UNROLL for (int k = 0; k < 2; ++k) {
          uint32_t v[4];
          load_matrices_transposed(v, v_tile + v_lane + 16 * k * (2 * D) + 32 * kWarps * i);
          mma<T>(x, v, b[k][0], b[k][1]);
        }
      });

      const bool last = tile + 1 == r.end, leaf_ends = tile % kLeaf == kLeaf - 1 || tile + 1 == r.row_end;
      const bool to_node = leaf_ends && tile >= r.tiles_apart, put_leaf = !to_node && (last || tile < r.tiles_apart);
      if (to_node) {
        node.merge(leaf.m, leaf.l, [&](float (&x)[4], int i) { UNROLL for (int j = 0; j < 4; ++j) x[j] = leaf.acc[i][j]; });
        leaf.clear();
      }
      if (r.alone) continue;
      const bool node_ends = last || tile < r.leaves_apart || tile % kNode == kNode - 1;
      if (to_node ? node_ends : put_leaf && node.m != -infinity())
        put(a, r, to_node ? tile : tile / kLeaf * kLeaf - 1, node);
      else if (to_node && r.work.shift < 4)
        put_sums(a, r, tile, -infinity(), 0);
      if (put_leaf)
        put(a, r, tile, leaf);
      else if (!to_node && r.work.shift == 0)
        put_sums(a, r, tile, -infinity(), 0);
    }
    if (r.alone) {
      const int thread = anew(thread_index());
      float l[2];
      Sums<D>::of_pair(l, node.l);
      UNROLL for (int i = 0; i < Sums<D>::kMTiles; ++i)
        write<T, D>(a, r.row, r.half, thread / kWarp + kWarps * i, thread % 4, thread % kWarp / 4, node.acc[i], l);
    } else if constexpr (kMergesItself<D, kRebuilt>) {
      uint32_t* counter = a.counters + r.row.b * rows_of_sequence(a) + r.row.number;
      if (a.counters && last_to_arrive(counter, blocks_of(r.work, r.row, r.seen), flag)) {
        auto* exchange = reinterpret_cast<Part*>(ring);
        const int places = places_of<D>(a), units = r.seen.units(r.work.shift);
        const InShared pieces = bring(in_scratch(a, r.row, places), units, places, reinterpret_cast<Bytes16*>(exchange + kThreads));
        merge_row<T, D, 2>(a, r.work, r.row, pieces, 0, 1, exchange);
      }
    }
    sync_block();  // the ring and the range are free
    if (thread_index() == 0) r.pass(a), r.advance(a);
  }
  for (int b = block_index().x; b < a.batch; b += a.blocks) {  // idle rows
    if (seen(a, b).length != 0) continue;
    const int64_t eights_of_row = int64_t(a.heads) * a.dim / 8;
    for (int64_t i = thread_index(); i < eights_of_row; i += kThreads)
      store(static_cast<Bytes16*>(a.out) + b * eights_of_row + i, Bytes16{});
  }
}

// Block x, y: slices y, y + ... of row x.
template <class T, int D>
KERNEL(kThreads, 2) merge_kernel(KERNEL_ARGS(GqaDecode) a) {
  wait_for_inputs();
  const int rows = rows_of_sequence(a);
  const Cut work = cut(a);
  const Row row = numbered(a, work, block_index().x / rows, block_index().x % rows);
  const Seen s = seen(a, row.b);
  if (s.length == 0 || (s.units(4) == 1 && blocks_of(work, row, s) == 1)) return;  // it is written
  merge_row<T, D, 6>(a, work, row, in_scratch(a, row, places_of<D>(a)), block_index().y, grid_size().y, reinterpret_cast<Part*>(shared_memory()));
}

template <class T, int D, bool kRebuilt>
void launch_decode(const Stream& on, GqaDecode a) {
  constexpr int kBuffer = kTile * D * 2, kRest = kRangeBytes + kScoresBytes + 16 * D + (kRebuilt ? RebuiltKeys<T>::kBytes : 0);
  // Two blocks to a multiprocessor, if each has two buffers then.
  a.buffers = (a.shared / 2 - 1024 - kRest) / kBuffer;
  if (a.buffers < 2) a.buffers = (std::min(a.shared - 1024, a.shared_block) - kRest) / kBuffer;
  a.buffers = std::min(a.buffers, 6);
  if (a.buffers < 2) throw std::runtime_error("gqa_decode: a block has too little shared memory here for two tiles");
  const int rows = a.batch * a.kv_heads * divide_up(a.heads / a.kv_heads, kHeads);
  a.blocks = (int)std::min<int64_t>(2 * a.cores, int64_t(rows) * (divide_up(a.window, kTile) + 1));
  const int places = places_of<D>(a);
  const int64_t of_row = (divide_up(a.window, kTile) + 1) * int64_t(places + kHeads / 2) * 16 + kThreads * sizeof(Part);
  if (!kMergesItself<D, kRebuilt> || of_row > a.buffers * kBuffer) a.counters = nullptr;
  launch(on, {{a.blocks}, kThreads, kRest + a.buffers * kBuffer}, gqa_decode_kernel<T, D, kRebuilt>, a);
  if (a.counters) return;
  launch(on, {{rows, divide_up(places, kWarp)}, kThreads, kThreads * (int)sizeof(Part)}, merge_kernel<T, D>, a);
}

}  // namespace

void gqa_decode(const Stream& on, const GqaDecode& a) {
  by_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto of_dim = [&](auto rebuilt) {
      constexpr bool kRebuilt = decltype(rebuilt)::value;
      a.dim <= 128   ? launch_decode<T, 128, kRebuilt>(on, a)
      : a.dim <= 256 ? launch_decode<T, 256, kRebuilt>(on, a)
                     : launch_decode<T, 512, kRebuilt>(on, a);
    };
    a.k ? of_dim(std::false_type()) : of_dim(std::true_type());
  });
}

}  // namespace gemma4_fast::cuda
