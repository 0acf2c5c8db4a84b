// A tile of a matrix product: W4A8 or W8A8, of rows or of the pixels of a convolution.
//
// Activations go through shared memory, several steps of 64 k ahead (cp.async). Weights go from
// global memory straight to registers, in the order of the tensor core, one step ahead; they are
// decoded between the products. One body serves every product: a loader finds the activations.
//
// Several blocks may share the k of a tile (split K): each leaves its sums in a slab, and the last
// to arrive adds them up. Two segments of K have a scale each, so their sums are kept apart: those
// of the first are scaled and wait in shared memory, where the thread that left them adds its own
// of the second; they cost no register.

#pragma once

#include "epilogue.h"
#include "fragments.h"
#include "params.h"
#include "pixels.h"

namespace ptq4adm {

template <int kBlockMValue, int kBlockNValue, int kWarpsMValue, int kWarpsNValue, int kStagesValue>
struct TileShape {
  static constexpr int kBlockM = kBlockMValue;  // rows
  static constexpr int kBlockN = kBlockNValue;  // channels
  static constexpr int kWarpsM = kWarpsMValue;
  static constexpr int kWarpsN = kWarpsNValue;
  static constexpr int kStages = kStagesValue;  // tiles of activations in shared memory
  static constexpr int kThreads = kWarpsM * kWarpsN * kLanes;
  static constexpr int kWarpM = kBlockM / kWarpsM;
  static constexpr int kWarpN = kBlockN / kWarpsN;
  static constexpr int kRowFragments = kWarpM / 16;
  static constexpr int kUnits = kWarpN / kUnitChannels;
  static constexpr int kColumnFragments = 2 * kUnits;
  static constexpr int kLoaderRows = kBlockM * kRowChunks / kThreads;

  // --- shared memory: a flag, places of pixels, then activations and (later) results. With two
  // segments results have memory of their own, as the sums of the first wait there.
  static constexpr int kPlaces = 128;
  static constexpr int kBuffer = kPlaces + kBlockM * kPixelPlaceBytes;
  static constexpr int kStageBytes = kBlockM * kRowBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = kBlockM * kBlockN * 4;

  PTQ4ADM_BOTH static constexpr int result_offset(bool has_two_segments) {
    return kBuffer + (has_two_segments ? kPipelineBytes : 0);
  }
  PTQ4ADM_BOTH static constexpr int shared_bytes(bool has_two_segments) {
    return result_offset(has_two_segments) +
           (has_two_segments || kSumBytes > kPipelineBytes ? kSumBytes : kPipelineBytes);
  }

  using Sums = int32_t[kRowFragments][kColumnFragments][4];
};

// What a lane holds of the weight for one step of 64 k.
template <class Tile, Weight kWeight>
struct WeightFragment {
  static constexpr int kParts = kWeight == Weight::kInt8 ? 2 : 1;
  Bytes16 part[Tile::kUnits][kParts];
  uint32_t multiplier[Tile::kUnits];  // of the two halves of a unit's channels: bits 7..0, 15..8
};

// Where a lane's part of the weight lies.
template <class Tile, Weight kWeight>
struct WeightReader {
  uint32_t unit[Tile::kUnits];  // offsets at the segment's first step; a weight is below 4 GiB
  uint32_t multiplier[Tile::kUnits];

  PTQ4ADM_DEVICE WeightReader(const Params& params, int thread, int first_column, int segment) {
    const int lane = thread % kLanes;
    const int blocks = params.blocks[0] + params.blocks[1];
    const int first_block = segment == 0 ? 0 : params.blocks[0];
    const int panels = (params.N + kUnitChannels - 1) / kUnitChannels;
    PTQ4ADM_UNROLL
    for (int u = 0; u < Tile::kUnits; ++u) {
      const int column = thread / kLanes % Tile::kWarpsN * Tile::kWarpN + u * kUnitChannels;
      const int channel = tile_channel(first_column, column, params.N, params.is_gated);
      // beyond the last channel anything may be multiplied: it is never stored
      const int panel = channel / kUnitChannels < panels ? channel / kUnitChannels : panels - 1;
      unit[u] = static_cast<uint32_t>(panel * blocks + first_block) * unit_bytes(kWeight) +
                unit_offset(lane);
      if constexpr (kWeight == Weight::kInt4Groups) {
        multiplier[u] = (panel * kUnitChannels + lane / 4) * blocks + first_block;
      }
    }
  }

  PTQ4ADM_DEVICE void read(WeightFragment<Tile, kWeight>& fragment, const Params& params,
                           int step) const {
    PTQ4ADM_UNROLL
    for (int u = 0; u < Tile::kUnits; ++u) {
      PTQ4ADM_UNROLL
      for (int part = 0; part < fragment.kParts; ++part) {
        const char* address = static_cast<const char*>(params.qweight) +
                              (unit[u] + step * unit_bytes(kWeight) + part * kUnitStepBytes);
        // another row of warps reads it as well: from L1
        fragment.part[u][part] = Tile::kWarpsM > 1 ? load_16(address) : load_stream_16(address);
      }
      if constexpr (kWeight == Weight::kInt4Groups) {
        const uint8_t* address = params.w_mult + (multiplier[u] + step);
        const int half = 8 * (params.blocks[0] + params.blocks[1]);
        fragment.multiplier[u] = load(address) | load(address + half) << 8;
      }
    }
  }
};

// The B fragment of eight channels (half h of unit u) and 32 k (step j).
template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void decode(uint32_t (&b)[2], const WeightFragment<Tile, kWeight>& fragment, int u,
                           int h, int j) {
  if constexpr (kWeight == Weight::kInt8) {
    b[0] = fragment.part[u][j].word[2 * h];
    b[1] = fragment.part[u][j].word[2 * h + 1];
  } else if constexpr (kWeight == Weight::kInt4Groups) {
    decode_int4_groups(b, fragment.part[u][0].word[2 * h + j],
                       fragment.multiplier[u] >> (8 * h) & 0xffu);
  } else {
    decode_int4(b, fragment.part[u][0].word[2 * h + j]);
  }
}

template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void multiply_step(typename Tile::Sums& acc, const char* tile, int thread,
                                  const WeightFragment<Tile, kWeight>& fragment) {
  const int lane = thread % kLanes;
  const int first_row = thread / kLanes / Tile::kWarpsN * Tile::kWarpM;
  PTQ4ADM_UNROLL
  for (int j = 0; j < 2; ++j) {
    uint32_t b[Tile::kColumnFragments][2];
    PTQ4ADM_UNROLL
    for (int f = 0; f < Tile::kColumnFragments; ++f) {
      decode<Tile, kWeight>(b[f], fragment, f / 2, f % 2, j);
    }
    // rows outside: a fragment of activations is dead before the next is wanted
    PTQ4ADM_UNROLL
    for (int i = 0; i < Tile::kRowFragments; ++i) {
      uint32_t a[4];
      load_matrix_x4(a, tile + tile_offset(first_row + 16 * i + a_row(lane), a_chunk(lane, j)));
      PTQ4ADM_UNROLL
      for (int f = 0; f < Tile::kColumnFragments; ++f) multiply_s8_16x8x32(acc[i][f], a, b[f]);
    }
  }
}

// Where a block's tile begins. Channels run fastest: blocks that run together read the same rows.
struct TilePlace {
  int row, column;
};

// Computed anew wherever it is needed, so that nothing of it lives through the main loop.
template <class Tile>
PTQ4ADM_DEVICE TilePlace tile_place(const Params& params) {
  const int tile = hidden(block_index(0));
  const int tiles_n = (params.N + Tile::kBlockN - 1) / Tile::kBlockN;
  const int tile_m = tile / tiles_n;
  return {tile_m * Tile::kBlockM, (tile - tile_m * tiles_n) * Tile::kBlockN};
}

// Add the steps first .. last - 1 of a segment to the sums. Ends with a barrier.
template <class Tile, Weight kWeight, class Loader>
PTQ4ADM_DEVICE void accumulate(typename Tile::Sums& acc, const Params& params, int segment,
                               int first, int last) {
  if (first >= last) return;
  const TilePlace place = tile_place<Tile>(params);
  char* buffer = shared_memory() + Tile::kBuffer;
  const int thread = hidden(thread_index());
  Loader loader(params, shared_memory() + Tile::kPlaces, thread, place.row, segment, first);
  PTQ4ADM_UNROLL
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (first + stage < last) {
      loader.copy(params, buffer + stage * Tile::kStageBytes);
      loader.advance(params);
    }
    copy_async_commit();
  }
  const WeightReader<Tile, kWeight> reader(params, thread, place.column, segment);
  WeightFragment<Tile, kWeight> fragment;
  reader.read(fragment, params, first);
  static_assert((Tile::kStages & (Tile::kStages - 1)) == 0, "stages are counted by a mask");
  int stage = 0;
  PTQ4ADM_ROLLED
  for (int step = first; step < last; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    block_barrier();
    if (step + Tile::kStages - 1 < last) {
      // into the stage that everyone multiplied a step ago
      const int free_stage = (stage + Tile::kStages - 1) & (Tile::kStages - 1);
      loader.copy(params, buffer + free_stage * Tile::kStageBytes);
      loader.advance(params);
    }
    copy_async_commit();
    WeightFragment<Tile, kWeight> next;
    reader.read(next, params, step + 1 < last ? step + 1 : step);
    multiply_step<Tile, kWeight>(acc, buffer + stage * Tile::kStageBytes, thread, fragment);
    fragment = next;
    stage = (stage + 1) & (Tile::kStages - 1);
  }
  copy_async_wait<0>();
  block_barrier();
}

// --- split K ------------------------------------------------------------------------------------

// Offset of a thread's four sums of a fragment in a slab, in bytes: neighbours write side by side.
template <class Tile>
PTQ4ADM_DEVICE int slab_offset(int thread, int i, int f) {
  return ((i * Tile::kColumnFragments + f) * Tile::kThreads + thread) * 16;
}

template <class Tile>
PTQ4ADM_DEVICE void clear_sums(typename Tile::Sums& acc) {
  PTQ4ADM_UNROLL
  for (int i = 0; i < Tile::kRowFragments; ++i) {
    PTQ4ADM_UNROLL
    for (int f = 0; f < Tile::kColumnFragments; ++f) {
      PTQ4ADM_UNROLL
      for (int e = 0; e < 4; ++e) acc[i][f][e] = 0;
    }
  }
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
    for (int i = 0; i < Tile::kRowFragments; ++i) {
      PTQ4ADM_UNROLL
      for (int f = 0; f < Tile::kColumnFragments; ++f) {
        const Bytes16 sums = load_l2_16(place + slab_offset<Tile>(thread, i, f));
        PTQ4ADM_UNROLL
        for (int e = 0; e < 4; ++e) acc[i][f][e] += static_cast<int32_t>(sums.word[e]);
      }
    }
  }
}

// Leave the block's sums in its slab and return whether every other block of the tile had done so.
template <class Tile>
PTQ4ADM_DEVICE bool arrive(const typename Tile::Sums& acc, const Params& params) {
  const int64_t slab = static_cast<int64_t>(block_index(1)) * grid_size(0) + block_index(0);
  const int thread = hidden(thread_index());
  char* place = reinterpret_cast<char*>(params.slabs) + slab * Tile::kSumBytes;
  PTQ4ADM_UNROLL
  for (int i = 0; i < Tile::kRowFragments; ++i) {
    PTQ4ADM_UNROLL
    for (int f = 0; f < Tile::kColumnFragments; ++f) {
      Bytes16 sums;
      PTQ4ADM_UNROLL
      for (int e = 0; e < 4; ++e) sums.word[e] = static_cast<uint32_t>(acc[i][f][e]);
      store_l2_16(place + slab_offset<Tile>(thread, i, f), sums);
    }
  }
  // every thread's stores come before the one thread's count
  block_barrier();
  int32_t* flag = reinterpret_cast<int32_t*>(shared_memory());
  if (thread_index() == 0) {
    const int32_t before = count_arrival(params.counters + block_index(0));
    const bool is_last = before == params.splits - 1;
    if (is_last) store(params.counters + block_index(0), int32_t{0});
    store(flag, int32_t{is_last});
  }
  block_barrier();
  return load(flag) != 0;
}

// --- results ------------------------------------------------------------------------------------

// Put the sums of a segment where the results are staged.
//
// Float32 after x_scale, or int32 if those are the result. The second segment is added to what the
// same thread left there of the first.
template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void stage_sums(const typename Tile::Sums& acc, const Params& params, char* results,
                               int segment) {
  constexpr int kShift = kWeight == Weight::kInt4 ? 4 : 0;  // decode_int4 leaves 16 w
  const int thread = hidden(thread_index());
  const int lane = thread % kLanes;
  const int warp_row = thread / kLanes / Tile::kWarpsN * Tile::kWarpM;
  const int warp_column = thread / kLanes % Tile::kWarpsN * Tile::kWarpN;
  const bool is_int32 = params.out_dtype == Dtype::kInt32;
  const int first_row = tile_place<Tile>(params).row;
  const Scale x_scale = segment == 0 ? params.x_scale[0] : params.x_scale[1];
  const float uniform = uniform_scale(x_scale, params.step);
  PTQ4ADM_UNROLL
  for (int i = 0; i < Tile::kRowFragments; ++i) {
    PTQ4ADM_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * i + c_row(lane, 2 * h);
      float scale = uniform;
      if (x_scale.form == ScaleForm::kRow && first_row + row < params.M) {
        scale = load(x_scale.values + first_row + row);
      }
      PTQ4ADM_UNROLL
      for (int f = 0; f < Tile::kColumnFragments; ++f) {
        const int column = warp_column + 8 * f + c_column(lane, 0);
        uint64_t* place =
            reinterpret_cast<uint64_t*>(results + stage_offset(row, column, Tile::kBlockN));
        uint64_t both = 0;
        if (segment == 1 && !is_int32) both = load(place);
        uint32_t word[2];
        PTQ4ADM_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int32_t sum = acc[i][f][2 * h + e] >> kShift;
          float y = multiply_rn(static_cast<float>(sum), scale);
          // not 0 + y: that would lose the sign of zero
          if (segment == 1) y = add_rn(float_bits(static_cast<uint32_t>(both >> (32 * e))), y);
          word[e] = is_int32 ? static_cast<uint32_t>(sum) : bits_of(y);
        }
        store(place, word[0] | static_cast<uint64_t>(word[1]) << 32);
      }
    }
  }
}

// Store what is staged: all terms that are left of equation (1).
template <class Tile>
PTQ4ADM_DEVICE void store_results(const Params& params, const char* results, void* out) {
  const TilePlace place = tile_place<Tile>(params);
  const int groups = Tile::kBlockN / kGroup / (params.is_gated ? 2 : 1);
  float reciprocal = 1.0f;
  if (params.out_dtype == Dtype::kInt8) {
    reciprocal = divide_rn(1.0f, uniform_scale(params.out_scale, params.step));
  }
  PTQ4ADM_ROLLED
  for (int item = hidden(thread_index()); item < Tile::kBlockM * groups; item += Tile::kThreads) {
    const int row = item / groups;
    finish_group<Tile::kBlockN>(params, out, results, place.row, row, place.column,
                                item - row * groups, reciprocal);
  }
}

// --- the kernel ---------------------------------------------------------------------------------

// Grid: tiles of the product by splits.
template <class Tile, Weight kWeight, template <int, int> class LoaderOf>
PTQ4ADM_DEVICE void matmul_tile(const Params& params) {
  using Loader = LoaderOf<Tile::kThreads, Tile::kLoaderRows>;
  const bool has_two_segments = params.blocks[1] > 0;
  char* results = shared_memory() + Tile::result_offset(has_two_segments);

  // --- which steps ------------------------------------------------------------------------------
  int segment = 0, first = 0, last = params.blocks[0];
  if (params.splits > 1) {
    segment = block_index(1) >= params.first_splits ? 1 : 0;
    const int splits = segment == 0 ? params.first_splits : params.splits - params.first_splits;
    const int split = block_index(1) - (segment == 0 ? 0 : params.first_splits);
    const int steps = params.blocks[segment];
    const int share = (steps + splits - 1) / splits;
    first = split * share;
    last = first + share < steps ? first + share : steps;
  }

  // --- one round a segment, one copy of every part ----------------------------------------------
  bool is_reducing = false;
  PTQ4ADM_ROLLED
  while (true) {
    typename Tile::Sums acc;
    clear_sums<Tile>(acc);
    if (is_reducing) {
      const bool is_first = segment == 0 && has_two_segments;
      sum_slabs<Tile>(acc, params, segment == 0 ? 0 : params.first_splits,
                      is_first ? params.first_splits : params.splits);
    } else {
      accumulate<Tile, kWeight, Loader>(acc, params, segment, first, last);
      if (params.splits > 1) {
        if (!arrive<Tile>(acc, params)) return;
        is_reducing = true;
        segment = 0;
        continue;
      }
    }
    stage_sums<Tile, kWeight>(acc, params, results, segment);
    const bool is_last = segment == 1 || !has_two_segments;
    const bool is_int32 = params.out_dtype == Dtype::kInt32;
    if (is_last || is_int32) {
      block_barrier();
      store_results<Tile>(params, results,
                          is_int32 && segment == 1 ? params.out[1] : params.out[0]);
      if (is_last) return;
      block_barrier();
    }
    segment = 1;
    last = params.blocks[1];
  }
}

}  // namespace ptq4adm
