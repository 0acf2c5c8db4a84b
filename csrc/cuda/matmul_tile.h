// A tile of a matrix product: W4A8 or W8A8, of rows or of the pixels of a convolution.
//
// Activations go through shared memory, several steps of 64 k ahead (cp.async). Weights go from
// global memory straight to registers, in the order of the tensor core, one step ahead; they are
// decoded between the products. One body serves every product: a loader finds the activations.
//
// Split K, segments of K and results: tile_output.h.

#pragma once

#include "fragments.h"
#include "params.h"
#include "pixels.h"
#include "tile_output.h"
#include "weight_reader.h"

namespace ptq4adm {

template <int kBlockMValue, int kBlockNValue, int kWarpsMValue, int kWarpsNValue, int kStagesValue>
struct TileShape {
  static constexpr int kBlockM = kBlockMValue;  // rows
  static constexpr int kBlockN = kBlockNValue;  // channels
  static constexpr int kWarpsM = kWarpsMValue;
  static constexpr int kWarpsN = kWarpsNValue;
  static constexpr int kStages = kStagesValue;  // tiles of activations in shared memory
  static constexpr int kThreads = kWarpsM * kWarpsN * kLanes;
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kWarpM = kBlockM / kWarpsM;
  static constexpr int kWarpN = kBlockN / kWarpsN;
  static constexpr int kRowFragments = kWarpM / 16;
  static constexpr int kUnits = kWarpN / kUnitChannels;
  static constexpr int kColumnFragments = 2 * kUnits;
  static constexpr int kLoaderRows = kBlockM * kRowChunks / kThreads;

  // --- shared memory: a flag, places of pixels, then activations and (later) results. With two
  // segments results have memory of their own, as the sums of the first wait there.
  static constexpr int kFlag = 0;
  static constexpr int kStageShift = 0;
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
  static constexpr int kFours = kRowFragments * kColumnFragments;
  PTQ4ADM_DEVICE static int32_t* four(Sums& acc, int i) {
    return acc[i / kColumnFragments][i % kColumnFragments];
  }
  PTQ4ADM_DEVICE static void barrier() { block_barrier(); }
};

template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void multiply_step(typename Tile::Sums& acc, const char* tile, int thread,
                                  const WeightFragment<Tile::kUnits, kWeight, 1>& fragment) {
  const int lane = thread % kLanes;
  const int first_row = thread / kLanes / Tile::kWarpsN * Tile::kWarpM;
  PTQ4ADM_UNROLL
  for (int j = 0; j < 2; ++j) {
    uint32_t b[Tile::kColumnFragments][2];
    PTQ4ADM_UNROLL
    for (int f = 0; f < Tile::kColumnFragments; ++f) {
      decode(b[f], fragment, f / 2, f % 2, j);
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

// Add the steps first .. last - 1 of a segment to the sums. Ends with a barrier.
template <class Tile, Weight kWeight, class Loader>
PTQ4ADM_DEVICE void accumulate(typename Tile::Sums& acc, const Params& params, int segment,
                               int first, int last) {
  if (first >= last) return;
  const TilePlace place = tile_place<Tile>(params);
  const int first_row = place.rows * Tile::kBlockM;
  char* buffer = shared_memory() + Tile::kBuffer;
  const int thread = hidden(thread_index());
  Loader loader(params, shared_memory() + Tile::kPlaces, thread, first_row, segment, first);
  PTQ4ADM_UNROLL
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (first + stage < last) {
      loader.copy(params, buffer + stage * Tile::kStageBytes);
      loader.advance(params);
    }
    copy_async_commit();
  }
  using Reader = WeightReader<Tile::kUnits, kWeight, (Tile::kWarpsM > 1), 1>;
  const int column = thread / kLanes % Tile::kWarpsN * Tile::kWarpN;
  const Reader reader(params, thread % kLanes, place.column, column, kUnitChannels, segment);
  typename Reader::Fragment fragment;
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
    typename Reader::Fragment next;
    reader.read(next, params, step + 1 < last ? step + 1 : step);
    multiply_step<Tile, kWeight>(acc, buffer + stage * Tile::kStageBytes, thread, fragment);
    fragment = next;
    stage = (stage + 1) & (Tile::kStages - 1);
  }
  copy_async_wait<0>();
  block_barrier();
}

// --- results ------------------------------------------------------------------------------------

// Put the sums of a segment where the results are staged.
template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void stage_sums(const typename Tile::Sums& acc, const Params& params, char* results,
                               int segment) {
  const int thread = hidden(thread_index());
  const int lane = thread % kLanes;
  const int warp_row = thread / kLanes / Tile::kWarpsN * Tile::kWarpM;
  const int warp_column = thread / kLanes % Tile::kWarpsN * Tile::kWarpN;
  const int first_row = tile_place<Tile>(params).rows * Tile::kBlockM;
  const Staging staging = staging_of(params, segment);
  PTQ4ADM_UNROLL
  for (int i = 0; i < Tile::kRowFragments; ++i) {
    PTQ4ADM_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * i + c_row(lane, 2 * h);
      const float scale = row_scale(staging, first_row + row, params.M);
      PTQ4ADM_UNROLL
      for (int f = 0; f < Tile::kColumnFragments; ++f) {
        const int column = warp_column + 8 * f + c_column(lane, 0);
        uint64_t* place = reinterpret_cast<uint64_t*>(
            results + stage_offset(row, column, Tile::kBlockN, Tile::kStageShift));
        uint64_t both = 0;
        if (staging.is_added) both = load(place);
        uint32_t word[2];
        PTQ4ADM_UNROLL
        for (int e = 0; e < 2; ++e) {
          word[e] = staged_word<kWeight>(staging, acc[i][f][2 * h + e], scale,
                                         static_cast<uint32_t>(both >> (32 * e)));
        }
        store(place, word[0] | static_cast<uint64_t>(word[1]) << 32);
      }
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

// Grid: tiles of the product by splits.
template <class Tile, Weight kWeight, template <int, int> class LoaderOf>
PTQ4ADM_DEVICE void matmul_tile(const Params& params) {
  using Loader = LoaderOf<Tile::kThreads, Tile::kLoaderRows>;
  using Sums = typename Tile::Sums;
  char* results = shared_memory() + Tile::result_offset(params.blocks[1] > 0);
  run_tile<Tile>(
      params, results,
      [&](Sums& acc, const Steps& steps) {
        accumulate<Tile, kWeight, Loader>(acc, params, steps.segment, steps.first, steps.last);
      },
      [&](const Sums& acc, int segment) {
        stage_sums<Tile, kWeight>(acc, params, results, segment);
      },
      [&](int row) { return tile_place<Tile>(params).rows * Tile::kBlockM + row; });
}

}  // namespace ptq4adm
