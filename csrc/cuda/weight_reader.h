// The weight on its way from global memory to the registers of a tensor core: one 16-byte load a
// lane, unit of 16 channels and step of 64 k (two at 8 bits), and the decoding of what was loaded.
//
// A lane's part of a unit is two fragments B of mma.m16n8k32 (8 channels each, columns of the
// product) and, the same bytes, one fragment A of wgmma.m64nNk32 (the 16 channels of its warp,
// rows of the product): both instructions give a lane channels lane / 4 and lane / 4 + 8, and of
// each the k from 4 (lane % 4) and from 4 (lane % 4) + 16.

#pragma once

#include "fragments.h"
#include "params.h"

namespace ptq4adm {

// What a lane holds of the weight for one step of 64 k.
//
// `kMultipliers`: registers for the multipliers of the two halves of a unit's channels. One saves a
// register and waits for the loads where they are issued, to join them; two wait where they are
// used.
template <int kUnits, Weight kWeight, int kMultipliers>
struct WeightFragment {
  static_assert(kMultipliers == 1 || kMultipliers == 2, "joined, or one a half");
  static constexpr int kParts = kWeight == Weight::kInt8 ? 2 : 1;
  Bytes16 part[kUnits][kParts];
  uint32_t multiplier[kUnits][kMultipliers];

  PTQ4ADM_DEVICE uint32_t multiplier_of(int u, int h) const {
    return kMultipliers == 1 ? multiplier[u][0] >> (8 * h) & 0xffu
                             : multiplier[u][h % kMultipliers];
  }
};

// Where a lane's part of the weight lies.
//
// `kIsShared`: other warps of the block read the same units, so they are worth keeping in L1.
template <int kUnits, Weight kWeight, bool kIsShared, int kMultipliers>
struct WeightReader {
  using Fragment = WeightFragment<kUnits, kWeight, kMultipliers>;
  uint32_t unit[kUnits];  // offsets at the segment's first step; a weight is below 4 GiB
  uint32_t multiplier[kUnits];

  // The tile begins at `first_column`; unit u is its columns from `column` + u `stride` on.
  PTQ4ADM_DEVICE WeightReader(const Params& params, int lane, int first_column, int column,
                              int stride, int segment) {
    const int blocks = params.blocks[0] + params.blocks[1];
    const int first_block = segment == 0 ? 0 : params.blocks[0];
    const int panels = (params.N + kUnitChannels - 1) / kUnitChannels;
    PTQ4ADM_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int channel =
          tile_channel(first_column, column + u * stride, params.N, params.is_gated);
      // beyond the last channel anything may be multiplied: it is never stored
      const int panel = channel / kUnitChannels < panels ? channel / kUnitChannels : panels - 1;
      unit[u] = static_cast<uint32_t>(panel * blocks + first_block) * unit_bytes(kWeight) +
                unit_offset(lane);
      if constexpr (kWeight == Weight::kInt4Groups) {
        multiplier[u] = (panel * kUnitChannels + lane / 4) * blocks + first_block;
      }
    }
  }

  PTQ4ADM_DEVICE void read(Fragment& fragment, const Params& params, int step) const {
    PTQ4ADM_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      PTQ4ADM_UNROLL
      for (int part = 0; part < fragment.kParts; ++part) {
        const char* address = static_cast<const char*>(params.qweight) +
                              (unit[u] + step * unit_bytes(kWeight) + part * kUnitStepBytes);
        fragment.part[u][part] = kIsShared ? load_16(address) : load_stream_16(address);
      }
      if constexpr (kWeight == Weight::kInt4Groups) {
        const uint8_t* address = params.w_mult + (multiplier[u] + step);
        const int half = 8 * (params.blocks[0] + params.blocks[1]);
        fragment.multiplier[u][0] = load(address);
        if constexpr (kMultipliers == 2) {
          fragment.multiplier[u][1] = load(address + half);
        } else {
          fragment.multiplier[u][0] |= load(address + half) << 8;
        }
      }
    }
  }
};

// Eight channels (half h of unit u) and 32 k (step j): k from 4 (lane % 4), and 16 further.
template <int kUnits, Weight kWeight, int kMultipliers>
PTQ4ADM_DEVICE void decode(uint32_t (&b)[2],
                           const WeightFragment<kUnits, kWeight, kMultipliers>& fragment, int u,
                           int h, int j) {
  if constexpr (kWeight == Weight::kInt8) {
    b[0] = fragment.part[u][j].word[2 * h];
    b[1] = fragment.part[u][j].word[2 * h + 1];
  } else if constexpr (kWeight == Weight::kInt4Groups) {
    decode_int4_groups(b, fragment.part[u][0].word[2 * h + j], fragment.multiplier_of(u, h));
  } else {
    decode_int4(b, fragment.part[u][0].word[2 * h + j]);
  }
}

}  // namespace ptq4adm
