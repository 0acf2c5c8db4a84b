// What happens to a tile's sums, whatever instruction made them: split K, two segments of K, and
// the way through shared memory to stored results. Shared by both families of matrix products.
//
// Several blocks may share the k of a tile (split K): each leaves its sums in a slab, and the last
// to arrive adds them up. Two segments of K have a scale each, so their sums are kept apart: those
// of the first are scaled and wait in shared memory, where the thread that left them adds its own
// of the second; they cost no register.
//
// A Tile says
//   kBlockM, kBlockN   rows and channels
//   kThreads           threads that hold sums: the first of the block
//   kSumBytes          of all sums, 4 kBlockM kBlockN
//   kFlag              4 bytes of shared memory that nothing else uses after the sums are made
//   kStageShift        of stage_offset: how its threads write results
//   Sums, kFours       a thread's sums, as kFours times four; four(sums, i) is the i-th four
//   barrier()          among the threads that hold sums

#pragma once

#include "epilogue.h"
#include "fragments.h"
#include "params.h"

namespace ptq4adm {

// Which tile a block works on. Channels run fastest: blocks that run together read the same rows.
struct TilePlace {
  int rows;    // number of the tile along the rows
  int column;  // first column
};

// Computed anew wherever it is needed, so that nothing of it lives through the main loop.
template <class Tile>
PTQ4ADM_DEVICE TilePlace tile_place(const Params& params) {
  const int tile = hidden(block_index(0));
  const int tiles_n = (params.N + Tile::kBlockN - 1) / Tile::kBlockN;
  const int rows = tile / tiles_n;
  return {rows, (tile - rows * tiles_n) * Tile::kBlockN};
}

// --- split K ------------------------------------------------------------------------------------

// Steps of 64 k of a segment: first .. last - 1.
struct Steps {
  int segment, first, last;
};

// A block's share. Without split K, of the first segment: the second follows in the same block.
PTQ4ADM_DEVICE Steps steps_of_block(const Params& params) {
  if (params.splits == 1) return {0, 0, params.blocks[0]};
  const int segment = block_index(1) >= params.first_splits ? 1 : 0;
  const int splits = segment == 0 ? params.first_splits : params.splits - params.first_splits;
  const int split = block_index(1) - (segment == 0 ? 0 : params.first_splits);
  const int steps = params.blocks[segment];
  const int share = (steps + splits - 1) / splits;
  const int first = split * share;
  return {segment, first, first + share < steps ? first + share : steps};
}

template <class Tile>
PTQ4ADM_DEVICE void clear_sums(typename Tile::Sums& acc) {
  PTQ4ADM_UNROLL
  for (int i = 0; i < Tile::kFours; ++i) {
    PTQ4ADM_UNROLL
    for (int e = 0; e < 4; ++e) Tile::four(acc, i)[e] = 0;
  }
}

// Offset of a thread's i-th four sums in a slab, in bytes: neighbours write side by side.
template <class Tile>
PTQ4ADM_DEVICE int slab_offset(int thread, int i) {
  return (i * Tile::kThreads + thread) * 16;
}

// Add the slabs first .. last - 1 of a tile to the sums.
template <class Tile>
PTQ4ADM_DEVICE void sum_slabs(typename Tile::Sums& acc, const Params& params, int first, int last) {
  const int thread = hidden(thread_index());
  PTQ4ADM_ROLLED
  for (int split = first; split < last; ++split) {
    const int64_t slab = static_cast<int64_t>(split) * grid_size(0) + block_index(0);
    const char* place = reinterpret_cast<const char*>(params.slabs) + slab * Tile::kSumBytes;
    PTQ4ADM_UNROLL
    for (int i = 0; i < Tile::kFours; ++i) {
      const Bytes16 sums = load_l2_16(place + slab_offset<Tile>(thread, i));
      PTQ4ADM_UNROLL
      for (int e = 0; e < 4; ++e) Tile::four(acc, i)[e] += static_cast<int32_t>(sums.word[e]);
    }
  }
}

// Leave the block's sums in its slab and return whether every other block of the tile had done so.
template <class Tile>
PTQ4ADM_DEVICE bool arrive(typename Tile::Sums& acc, const Params& params) {
  const int64_t slab = static_cast<int64_t>(block_index(1)) * grid_size(0) + block_index(0);
  const int thread = hidden(thread_index());
  char* place = reinterpret_cast<char*>(params.slabs) + slab * Tile::kSumBytes;
  PTQ4ADM_UNROLL
  for (int i = 0; i < Tile::kFours; ++i) {
    Bytes16 sums;
    PTQ4ADM_UNROLL
    for (int e = 0; e < 4; ++e) sums.word[e] = static_cast<uint32_t>(Tile::four(acc, i)[e]);
    store_l2_16(place + slab_offset<Tile>(thread, i), sums);
  }
  // every thread's stores come before the one thread's count
  Tile::barrier();
  int32_t* flag = reinterpret_cast<int32_t*>(shared_memory() + Tile::kFlag);
  if (thread_index() == 0) {
    const int32_t before = count_arrival(params.counters + block_index(0));
    const bool is_last = before == params.splits - 1;
    if (is_last) store(params.counters + block_index(0), int32_t{0});
    store(flag, int32_t{is_last});
  }
  Tile::barrier();
  return load(flag) != 0;
}

// --- results ------------------------------------------------------------------------------------

// How the sums of a segment are scaled where they are staged.
struct Staging {
  Scale x_scale;
  float uniform;  // of all rows, unless each has its own
  bool is_int32;  // the sums themselves are the result
  bool is_added;  // to what the same thread staged of the first segment
};

PTQ4ADM_DEVICE Staging staging_of(const Params& params, int segment) {
  const Scale x_scale = segment == 0 ? params.x_scale[0] : params.x_scale[1];
  const bool is_int32 = params.out_dtype == Dtype::kInt32;
  return {x_scale, uniform_scale(x_scale, params.step), is_int32, segment == 1 && !is_int32};
}

// `row` of the product; any number outside 0 .. M - 1 for none.
PTQ4ADM_DEVICE float row_scale(const Staging& staging, int row, int M) {
  if (staging.x_scale.form != ScaleForm::kRow || row < 0 || row >= M) return staging.uniform;
  return load(staging.x_scale.values + row);
}

// A sum as it is staged: int32, or float32 after x_scale. `first` is what lies there.
template <Weight kWeight>
PTQ4ADM_DEVICE uint32_t staged_word(const Staging& staging, int32_t acc, float scale,
                                    uint32_t first) {
  constexpr int kShift = kWeight == Weight::kInt4 ? 4 : 0;  // decode_int4 leaves 16 w
  const int32_t sum = acc >> kShift;
  if (staging.is_int32) return static_cast<uint32_t>(sum);
  float y = multiply_rn(static_cast<float>(sum), scale);
  // not 0 + y: that would lose the sign of zero
  if (staging.is_added) y = add_rn(float_bits(first), y);
  return bits_of(y);
}

// Store what is staged: all terms that are left of equation (1). `row_of` gives the row of the
// product of a row of the tile, or a number outside 0 .. M - 1 for none.
template <class Tile, class RowOf>
PTQ4ADM_DEVICE void store_results(const Params& params, const char* results, void* out,
                                  RowOf row_of) {
  const int first_column = tile_place<Tile>(params).column;
  const int groups = Tile::kBlockN / kGroup / (params.is_gated ? 2 : 1);
  float reciprocal = 1.0f;
  if (params.out_dtype == Dtype::kInt8) {
    reciprocal = divide_rn(1.0f, uniform_scale(params.out_scale, params.step));
  }
  PTQ4ADM_ROLLED
  for (int item = hidden(thread_index()); item < Tile::kBlockM * groups; item += Tile::kThreads) {
    const int row = item / groups;
    finish_group<Tile::kBlockN, Tile::kStageShift>(params, out, results, row_of(row), row,
                                                   first_column, item - row * groups, reciprocal);
  }
}

// --- the kernel ---------------------------------------------------------------------------------

// All that a block's threads with sums do: one round a segment, one copy of every part.
//
// `accumulate(acc, steps)` adds a segment's steps to the sums and ends with a barrier;
// `stage(acc, segment)` puts them where `results` points. Grid: tiles by splits.
template <class Tile, class Accumulate, class Stage, class RowOf>
PTQ4ADM_DEVICE void run_tile(const Params& params, char* results, Accumulate accumulate,
                             Stage stage, RowOf row_of) {
  const bool has_two_segments = params.blocks[1] > 0;
  Steps steps = steps_of_block(params);
  bool is_reducing = false;
  PTQ4ADM_ROLLED
  while (true) {
    typename Tile::Sums acc;
    clear_sums<Tile>(acc);
    if (is_reducing) {
      const bool is_first = steps.segment == 0 && has_two_segments;
      sum_slabs<Tile>(acc, params, steps.segment == 0 ? 0 : params.first_splits,
                      is_first ? params.first_splits : params.splits);
    } else {
      accumulate(acc, steps);
      if (params.splits > 1) {
        if (!arrive<Tile>(acc, params)) return;
        is_reducing = true;
        steps.segment = 0;
        continue;
      }
    }
    stage(acc, steps.segment);
    const bool is_last = steps.segment == 1 || !has_two_segments;
    const bool is_int32 = params.out_dtype == Dtype::kInt32;
    if (is_last || is_int32) {
      Tile::barrier();
      store_results<Tile>(params, results,
                          is_int32 && steps.segment == 1 ? params.out[1] : params.out[0], row_of);
      if (is_last) return;
      Tile::barrier();
    }
    steps = {1, 0, params.blocks[1]};
  }
}

}  // namespace ptq4adm
