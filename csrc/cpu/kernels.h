// The inner loops of the cpu backend, one table of functions per instruction set.
//
// A tile is a few activation rows times a panel of output channels. Activations are read where they
// lie: a row is one pointer a kernel tap, and a convolution is a product whose pointers jump. The
// weight is decoded, once for all row tiles of a block, into
//
//   panel    8 bit [k / 4][16 * panels channels][4 k]     panels = 1 .. Kernels::panels
//
// (twice, high and low nibbles, for 8 bits on AVX2).
// vpdpbusd and vpmaddubsw multiply unsigned by signed bytes. Where the weight takes the unsigned
// side it is stored as w + weight_offset, and weight_offset * sum(x) of the row is what the
// accumulator starts from, negated; where the activation does, it is copied as x + 128 and the
// chunk starts from -128 * sum(w) of the channel. Sums may wrap on the way: the arithmetic is
// modulo 2^32 and the true sum fits, so the accumulator is exact.
#pragma once

#include <cstdint>
#include <string>

namespace ptq4adm {

constexpr int64_t kPanel = 16;   // channels of a stored panel: ptq4adm/ops/prepack.py
constexpr int64_t kBlockK = 64;  // ptq4adm/packing/layout.py: BLOCK_K
constexpr int64_t kStepK = 4;    // k that one 32-bit lane multiplies at once
constexpr int32_t kActivationOffset = 128;

// A stretch of K inside one kernel tap.
struct Run {
  int64_t tap;
  int64_t channel;      // of the first k
  int64_t steps;        // of 4 k that hold activations
  int64_t panel_steps;  // of 4 k in the panel: the steps and the layout's zero padding
};

// A chunk of one panel in its stored order (ptq4adm/ops/prepack.py), and where it is decoded to.
struct DecodeCall {
  const uint8_t* packed;  // first of `panels` stored panels at the chunk's first k
  int64_t packed_stride;  // bytes from one stored panel to the next
  int64_t panels;         // 1 .. 4
  int64_t k;              // a multiple of 64
  const int16_t* mult;    // [k / 64][panels][16 channels][2], each multiplier twice; groups only
  uint8_t* panel;
  int32_t* channel_start;  // [panels * 16]: -128 * sum(w * mult); formats with offset activations
};

struct TileCall {
  const int8_t* const* rows;  // [taps][Kernels::rows]: the channels that a tap reads
  const Run* runs;
  int64_t run_count;
  const uint8_t* panel;
  const int16_t* mult;  // as in DecodeCall
  int64_t panels;
  const int32_t* row_start;      // [rows]: first value of each accumulator, or null: go on
  const int32_t* channel_start;  // [panels * 16]: added on entry, or null
  int32_t* acc;                  // [rows][panels * 16]
};

// Rows and columns of one output tile, pointing at its first element.
struct TileEpilogue {
  const int32_t* acc;   // [rows][acc_stride]
  const int32_t* acc2;  // second K segment, or null
  int64_t acc_stride;
  const float* x_scale;  // read at row * x_scale_stride (0 or 1)
  const float* x2_scale;
  int64_t x_scale_stride;
  int64_t x2_scale_stride;
  const float* w_scale;   // [columns]
  const float* bias;      // [columns], or null
  const float* temb;      // [B, N] at the tile's first column, or null
  const float* residual;  // [M, N] at the tile's first element, or null
  int64_t first_row;      // m of the tile's first row
  int64_t rows_per_temb;  // M / B
  int64_t stride;         // N: row stride of temb and residual
  int64_t rows;
  int64_t columns;  // 1 .. acc_stride
};

// How one kind of weight is multiplied.
struct Format {
  int32_t weight_offset;      // panel holds w + this, unsigned; 0: signed
  bool is_activation_offset;  // rows hold x + 128, unsigned
  void (*decode)(const DecodeCall& call);
  // acc += x * panel over the runs
  void (*tile)(const TileCall& call);
};

struct Kernels {
  const char* name;
  int64_t rows;          // of a tile
  int64_t panels;        // stored panels side by side in the widest tile
  int64_t chunk_k;       // decoded at a time: the panel stays in the cache it is read from
  int64_t panel_copies;  // bytes of a panel per weight: 2 where W8 is split into nibbles
  Format w4, w4_groups, w8;

  // sum += all bytes of a row
  int32_t (*sum_row)(const int8_t* row, int64_t channels);

  // y = (acc * x_scale [+ acc2 * x2_scale]) * w_scale + bias + temb + residual, in that order and
  // never fused, so that every instruction set and the reference agree bit for bit.
  void (*finish)(const TileEpilogue& tile, float* y, int64_t y_stride);
};

const Kernels& scalar_kernels();
// null where the file was not compiled for the instruction set
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_vnni_kernels();
#ifdef PTQ4ADM_EMULATE_VNNI
// The two VNNI tables with every instruction spelled out in plain C++: tests compile them in.
const Kernels& emulated_avx_vnni_kernels();
const Kernels& emulated_avx512_vnni_kernels();
#endif

// The kernels for "auto" or a name. Throws std::invalid_argument for an unknown name and
// std::runtime_error for an instruction set that this processor or this build lacks.
const Kernels& select_kernels(const char* isa);

// Whether this build holds an instruction set, whatever the processor runs.
bool is_compiled(const std::string& isa);

// What "auto" means from now on, in the whole process and for every kernel: "auto" (the fastest
// that runs, the default) or a name. For comparing instruction sets; throws like select_kernels.
void set_auto_isa(const std::string& isa);
std::string auto_isa();

}  // namespace ptq4adm
