// A tile of a matrix product for compute capability 9.0a: W4A8 or W8A8, of rows or of the pixels of
// a convolution of stride 1.
//
//   acc^T[channels, rows] = W X^T      wgmma.m64nNk32: A, the weight, in registers; B, activations,
//                                      in shared memory; a row of the product is a column of acc^T
//
// One warpgroup copies: a single lane of it asks the Tensor Memory Accelerator for boxes of
// activations (boxes.h), 64 k of the tile's rows each, into a ring of stages. One or two warpgroups
// multiply: each has 64 kFragments channels of the tile and all its rows. Weights go from global
// memory straight to registers, in the order that the sm_80 kernel uses as well, three steps of 64
// k ahead of their product; they are decoded while the products of the step before run.
//
//   step s of a warpgroup      wait until stage s has landed
//                              issue 2 kFragments products with the fragments of s
//                              wait for the products of s - 1, hand their stage back
//                              decode the fragments of s + 1 (s runs), load the weights of s + 3
//
// Fragments of s and s + 1 are two sets of registers, named at compile time: what an asynchronous
// product reads may not change until it is waited for. Split K, segments of K and results:
// tile_output.h.

#pragma once

#include "boxes.h"
#include "fragments.h"
#include "instructions_sm90.h"
#include "params.h"
#include "tile_output.h"
#include "weight_reader.h"

namespace ptq4adm {

// What a kernel of this family is told, by value; tensor maps must stay in the parameters.
struct ParamsSm90 {
  TensorMap x_map[2];  // of each segment: [B, H, W, C] or [M, C], boxes of 64 channels
  Params params;       // x and is_x_aligned are not read
  Boxes boxes;
};

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupChannels = 64;  // of an instruction

template <int kBlockMValue, int kFragmentsValue, int kWarpgroupsValue, int kStagesValue,
          int kBlocksValue>
struct WarpgroupTile {
  static constexpr int kBlockM = kBlockMValue;          // rows, N of the instruction
  static constexpr int kFragments = kFragmentsValue;    // of 64 channels, of a warpgroup
  static constexpr int kWarpgroups = kWarpgroupsValue;  // that multiply; one more copies
  static constexpr int kStages = kStagesValue;
  static constexpr int kBlocks = kBlocksValue;  // that fit on a multiprocessor by registers
  static constexpr int kBlockN = kWarpgroupChannels * kFragments * kWarpgroups;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;

  // --- registers: a block starts with the same share for every thread. Where that is not enough,
  // a whole warpgroup copies, as only warpgroups can leave registers to each other; else a warp.
  static constexpr bool kIsExchanging = kBlocks < 3;
  static constexpr int kBlockThreads = kThreads + (kIsExchanging ? kWarpgroup : kLanes);
  static constexpr int kLaunchRegisters = 65536 / (kBlocks * kBlockThreads) / 8 * 8;
  static constexpr int kCopyRegisters = 24;
  static constexpr int kRegisters =
      (kLaunchRegisters * (kWarpgroups + 1) - kCopyRegisters) / kWarpgroups / 8 * 8;

  // --- shared memory: barriers, a flag, rows of the product; then, from a multiple of what the
  // swizzle repeats after, the ring and (later) results. With two segments results have memory of
  // their own, as the sums of the first wait there.
  static constexpr int kFull = 0;
  static constexpr int kEmpty = kFull + kStages * 8;
  static constexpr int kFlag = kEmpty + kStages * 8;
  static constexpr int kRows = kFlag + 16;
  static constexpr int kRing = (kRows + kBlockM * 4 + 1023) / 1024 * 1024;
  static constexpr int kStageBytes = kBlockM * kRowBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = kBlockM * kBlockN * 4;

  PTQ4ADM_BOTH static constexpr int result_offset(bool has_two_segments) {
    return kRing + (has_two_segments ? kRingBytes : 0);
  }
  PTQ4ADM_BOTH static constexpr int shared_bytes(bool has_two_segments) {
    return result_offset(has_two_segments) +
           (has_two_segments || kSumBytes > kRingBytes ? kSumBytes : kRingBytes);
  }

  static constexpr int kStageShift = 1;
  using Sums = int32_t[kFragments][kBlockM / 2];
  static constexpr int kFours = kFragments * kBlockM / 8;
  PTQ4ADM_DEVICE static int32_t* four(Sums& acc, int i) {
    return &acc[i / (kBlockM / 8)][i % (kBlockM / 8) * 4];
  }
  PTQ4ADM_DEVICE static void barrier() { warpgroup_barrier(1, kThreads); }
};

// Row 2 (lane % 4) + e and channel lane / 4 + 8 h of eight rows and a warp's sixteen channels:
// which of a fragment's sums that is.
PTQ4ADM_BOTH constexpr int sum_index(int eight, int h, int e) { return 4 * eight + 2 * h + e; }

// --- the ring of stages -------------------------------------------------------------------------

// A place in the ring, on either side of it: the k-th time round has parity k % 2.
template <class Tile>
struct RingPlace {
  int stage = 0;
  int parity = 0;

  PTQ4ADM_DEVICE void advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  PTQ4ADM_DEVICE Barrier* full() const { return barrier(Tile::kFull); }
  PTQ4ADM_DEVICE Barrier* empty() const { return barrier(Tile::kEmpty); }
  PTQ4ADM_DEVICE char* bytes() const {
    return shared_memory() + Tile::kRing + stage * Tile::kStageBytes;
  }

 private:
  PTQ4ADM_DEVICE Barrier* barrier(int first) const {
    return reinterpret_cast<Barrier*>(shared_memory() + first) + stage;
  }
};

// By all threads, once: barriers, which row of the product each row of the tile is, and zeros where
// boxes leave a part of the stages empty.
template <class Tile>
PTQ4ADM_DEVICE void prepare_shared_memory(const ParamsSm90& all) {
  if (thread_index() == 0) {
    RingPlace<Tile> place;
    PTQ4ADM_ROLLED
    for (; place.parity == 0; place.advance()) {
      barrier_init(place.full(), 1);
      barrier_init(place.empty(), Tile::kThreads / kLanes);
    }
    barrier_init_fence();
  }
  const BoxPlace box = box_place(all.boxes, tile_place<Tile>(all.params).rows);
  PTQ4ADM_ROLLED
  for (int row = thread_index(); row < Tile::kBlockM; row += Tile::kBlockThreads) {
    store(reinterpret_cast<int32_t*>(shared_memory() + Tile::kRows) + row,
          int32_t{box_row(all.boxes, box, row)});
  }
  const int filled = box_pixels(all.boxes) * kRowBytes;
  if (filled < Tile::kStageBytes) {
    PTQ4ADM_ROLLED
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      char* bytes = shared_memory() + Tile::kRing + stage * Tile::kStageBytes;
      PTQ4ADM_ROLLED
      for (int i = filled + thread_index() * 16; i < Tile::kStageBytes;
           i += Tile::kBlockThreads * 16) {
        store_16(bytes + i, Bytes16{});
      }
    }
    async_proxy_fence();
  }
  block_barrier();
}

// --- the warpgroup that copies ------------------------------------------------------------------

// Ask for the steps of a segment, one box each.
template <class Tile>
PTQ4ADM_DEVICE void copy_steps(const ParamsSm90& all, RingPlace<Tile>& place, const BoxPlace& box,
                               const Steps& steps) {
  const Window& window = all.params.window;
  const TensorMap* map = &all.x_map[steps.segment];
  const int bytes = box_pixels(all.boxes) * kRowBytes;
  const int channels = all.params.channels[steps.segment];
  int channel = steps.first * kBlockK, tap_row = 0, tap_column = 0;
  if (all.boxes.is_image) {
    const int steps_a_tap = (channels + kBlockK - 1) / kBlockK;
    const int tap = steps.first / steps_a_tap;
    channel = (steps.first - tap * steps_a_tap) * kBlockK;
    tap_row = tap / window.kernel_width;
    tap_column = tap - tap_row * window.kernel_width;
  }
  PTQ4ADM_ROLLED
  for (int step = steps.first; step < steps.last; ++step) {
    barrier_wait(place.empty(), place.parity ^ 1);
    barrier_arrive_expect(place.full(), bytes);
    if (all.boxes.is_image) {
      copy_box_4d(place.bytes(), map, channel,
                  box.column - window.padding[1] + tap_column * window.dilation[1],
                  box.row - window.padding[0] + tap_row * window.dilation[0], box.image,
                  place.full());
    } else {
      copy_box_2d(place.bytes(), map, channel, box.column, place.full());
    }
    place.advance();
    channel += kBlockK;
    if (all.boxes.is_image && channel >= channels) {
      channel = 0;
      if (++tap_column == window.kernel_width) {
        tap_column = 0;
        ++tap_row;
      }
    }
  }
}

template <class Tile>
PTQ4ADM_DEVICE void copy_tile(const ParamsSm90& all) {
  const Params& params = all.params;
  prefetch_tensor_map(&all.x_map[0]);
  const BoxPlace box = box_place(all.boxes, tile_place<Tile>(params).rows);
  RingPlace<Tile> place;
  Steps steps = steps_of_block(params);
  // the same rounds as the warpgroups that multiply: run_tile
  PTQ4ADM_ROLLED
  while (true) {
    copy_steps<Tile>(all, place, box, steps);
    if (params.splits > 1 || steps.segment == 1 || params.blocks[1] == 0) return;
    steps = {1, 0, params.blocks[1]};
  }
}

// --- the warpgroups that multiply ---------------------------------------------------------------

// A fragments of a step of 64 k: two instructions of 32 k for each 64 channels.
template <class Tile>
using Fragments = uint32_t[Tile::kFragments][2][4];

// Decoding of 8 bits only changes the order of registers. Left to the compiler, such copies drift
// to where they wait for the newest load; exclusive or with a zero that it cannot know is
// arithmetic, and stays. The grid has one block along its last axis.
PTQ4ADM_DEVICE uint32_t unknown_zero() { return static_cast<uint32_t>(block_index(2)); }

template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void decode_step(Fragments<Tile>& a,
                                const WeightFragment<Tile::kFragments, kWeight, 2>& weight) {
  PTQ4ADM_UNROLL
  for (int f = 0; f < Tile::kFragments; ++f) {
    PTQ4ADM_UNROLL
    for (int j = 0; j < 2; ++j) {
      PTQ4ADM_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t both[2];
        decode(both, weight, f, h, j);
        if constexpr (kWeight == Weight::kInt8) {
          both[0] ^= unknown_zero();
          both[1] ^= unknown_zero();
        }
        a[f][j][h] = both[0];
        a[f][j][2 + h] = both[1];
        settle(a[f][j][h]);
        settle(a[f][j][2 + h]);
      }
    }
  }
}

// Issue the products of a step.
template <class Tile>
PTQ4ADM_DEVICE void multiply_stage(typename Tile::Sums& acc, const Fragments<Tile>& a,
                                   const RingPlace<Tile>& place) {
  barrier_wait(place.full(), place.parity);
  wgmma_fence();
  PTQ4ADM_UNROLL
  for (int j = 0; j < 2; ++j) {
    const uint64_t descriptor = matrix_descriptor(place.bytes() + j * kBlockK / 2);
    PTQ4ADM_UNROLL
    for (int f = 0; f < Tile::kFragments; ++f) {
      wgmma_s8_64xNx32<Tile::kBlockM>(acc[f], a[f][j], descriptor);
    }
  }
  wgmma_commit();
}

template <class Tile, Weight kWeight>
struct Multiplier {
  static constexpr int kUnits = Tile::kFragments;
  using Reader = WeightReader<kUnits, kWeight, false, 2>;

  RingPlace<Tile> place;  // of the step whose products are issued next

  // Add the steps of a segment to the sums. Ends with a barrier.
  PTQ4ADM_DEVICE void accumulate(typename Tile::Sums& acc, const Params& params,
                                 const Steps& steps) {
    if (steps.first >= steps.last) return;
    const int thread = hidden(thread_index());
    const int column = thread / kWarpgroup * (kUnits * kWarpgroupChannels) +
                       thread % kWarpgroup / kLanes * kUnitChannels;
    const Reader reader(params, thread % kLanes, tile_place<Tile>(params).column, column,
                        kWarpgroupChannels, steps.segment);
    const int last = steps.last - 1;
    typename Reader::Fragment even, odd;  // weights as they are in memory
    Fragments<Tile> a_even, a_odd;
    reader.read(even, params, steps.first);
    reader.read(odd, params, steps.first < last ? steps.first + 1 : last);
    decode_step<Tile, kWeight>(a_even, even);
    reader.read(even, params, steps.first + 2 < last ? steps.first + 2 : last);
    RingPlace<Tile> running = place;
    int step = steps.first;
    PTQ4ADM_ROLLED
    while (true) {
      run_step(acc, params, reader, a_even, a_odd, odd, running, step, steps);
      if (++step == steps.last) break;
      run_step(acc, params, reader, a_odd, a_even, even, running, step, steps);
      if (++step == steps.last) break;
    }
    wgmma_wait<0>();
    release(running);
    // The ring's memory may become that of results. Products that were waited for, and boxes whose
    // phase was, are done with it for every proxy, so that no fence is needed.
    Tile::barrier();
  }

 private:
  PTQ4ADM_DEVICE static void release(const RingPlace<Tile>& done) {
    if (lane_index() == 0) barrier_arrive(done.empty());
  }

  // Multiply a step; meanwhile decode the next from `loaded`, and load the one three further on.
  PTQ4ADM_DEVICE void run_step(typename Tile::Sums& acc, const Params& params, const Reader& reader,
                               const Fragments<Tile>& a, Fragments<Tile>& next,
                               typename Reader::Fragment& loaded, RingPlace<Tile>& running,
                               int step, const Steps& steps) {
    multiply_stage<Tile>(acc, a, place);
    wgmma_wait<1>();
    if (step > steps.first) {
      release(running);
      running.advance();
    }
    place.advance();
    decode_step<Tile, kWeight>(next, loaded);
    reader.read(loaded, params, step + 3 < steps.last ? step + 3 : steps.last - 1);
  }
};

// Put the sums of a segment where the results are staged.
template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void stage_warpgroup_sums(const typename Tile::Sums& acc, const Params& params,
                                         char* results, int segment) {
  const int thread = hidden(thread_index());
  const int lane = thread % kLanes;
  const int first_column = thread / kWarpgroup * (Tile::kFragments * kWarpgroupChannels) +
                           thread % kWarpgroup / kLanes * kUnitChannels + lane / 4;
  const int32_t* rows = reinterpret_cast<const int32_t*>(shared_memory() + Tile::kRows);
  const Staging staging = staging_of(params, segment);
  PTQ4ADM_UNROLL
  for (int eight = 0; eight < Tile::kBlockM / 8; ++eight) {
    PTQ4ADM_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * eight + 2 * (lane % 4) + e;
      float scale = staging.uniform;
      if (staging.x_scale.form == ScaleForm::kRow) {
        scale = row_scale(staging, load(rows + row), params.M);
      }
      PTQ4ADM_UNROLL
      for (int f = 0; f < Tile::kFragments; ++f) {
        PTQ4ADM_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int column = first_column + f * kWarpgroupChannels + 8 * h;
          uint32_t* place = reinterpret_cast<uint32_t*>(
              results + stage_offset(row, column, Tile::kBlockN, Tile::kStageShift));
          uint32_t first = 0;
          if (staging.is_added) first = load(place);
          store(place, staged_word<kWeight>(staging, acc[f][sum_index(eight, h, e)], scale, first));
        }
      }
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

// Grid: tiles of the product (boxes by channels, these fastest) by splits.
template <class Tile, Weight kWeight>
PTQ4ADM_DEVICE void matmul_warpgroup_tile(const ParamsSm90& all) {
  prepare_shared_memory<Tile>(all);
  if (warp_uniform(warp_index()) >= Tile::kThreads / kLanes) {
    if constexpr (Tile::kIsExchanging) registers_decrease<Tile::kCopyRegisters>();
    if (thread_index() == Tile::kThreads) copy_tile<Tile>(all);
    return;
  }
  if constexpr (Tile::kIsExchanging) registers_increase<Tile::kRegisters>();
  const Params& params = all.params;
  using Sums = typename Tile::Sums;
  char* results = shared_memory() + Tile::result_offset(params.blocks[1] > 0);
  const int32_t* rows = reinterpret_cast<const int32_t*>(shared_memory() + Tile::kRows);
  Multiplier<Tile, kWeight> multiplier;
  run_tile<Tile>(
      params, results,
      [&](Sums& acc, const Steps& steps) { multiplier.accumulate(acc, params, steps); },
      [&](const Sums& acc, int segment) {
        stage_warpgroup_sums<Tile, kWeight>(acc, params, results, segment);
      },
      [&](int row) { return load(rows + row); });
}

}  // namespace ptq4adm
