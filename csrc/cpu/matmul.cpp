// The loops around the kernels: row blocks, panels of channels, chunks of K.
//
// A task is a block of rows and some panels. It looks up the pixels that its rows read (a
// convolution is a product with jumping row pointers: no patch is ever copied), then decodes the
// weight chunk by chunk and multiplies each chunk with every tile of the block.

#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "positions.h"
#include "tiling.h"
#include "workspace.h"

namespace ptq4adm {
namespace {

constexpr int64_t kSmallMacs = 1 << 19;  // below this, starting threads costs more than it gains
constexpr int64_t kCopyBytes = 1 << 16;  // of activations, copied by one task

// One K segment, as all tasks see it.
struct Segment {
  const int8_t* x;  // NHWC, `channels` a multiple of 4
  int64_t channels;
  std::vector<Chunk> chunks;
};

class Matmul {
 public:
  Matmul(const Kernels& kernels, const ActivationKernels& activations, const Conv2dShape& shape,
         const MatmulCall& call, int64_t threads)
      : kernels_(kernels),
        activations_(activations),
        format_(call.bits == 8 ? kernels.w8
                : call.w_mult  ? kernels.w4_groups
                               : kernels.w4),
        shape_(shape),
        call_(call),
        stored_panels_(ceil_div(result_channels(), kPanel)),
        panel_bytes_(shape.k_padded() * kPanel * call.bits / 8),
        tiling_(kernels, shape, result_channels(), threads),
        threads_(threads) {
    for (int segment = 0; segment < segments(); ++segment) {
      const int64_t channels = round_up(shape.channels[static_cast<size_t>(segment)], kStepK);
      segments_[segment] = {call.x_q[segment], channels,
                            chunks_of(shape, segment, kernels.chunk_k)};
    }
  }

  bool run() {
    const int64_t workers = std::min(threads_, tiling_.tasks());
    Arena measured(nullptr);
    allocate_shared(measured);
    const int64_t shared_bytes = measured.bytes();
    workspace(measured);
    const int64_t worker_bytes = measured.bytes() - shared_bytes;
    uint8_t* memory = scratch(shared_bytes + workers * worker_bytes);
    Arena shared(memory);
    allocate_shared(shared);
    copy_activations();
    sum_pixels();
    parallel_for(tiling_.tasks(), threads_, [&](int64_t task, int64_t thread) {
      Arena arena(memory + shared_bytes + thread * worker_bytes);
      run_task(task, workspace(arena));
    });
    return is_finite_;
  }

 private:
  int segments() const { return shape_.channels[1] > 0 ? 2 : 1; }
  int64_t result_channels() const { return shape_.out_channels / (call_.is_geglu ? 2 : 1); }
  int64_t pixels() const { return shape_.batch * shape_.height * shape_.width; }

  Workspace workspace(Arena& arena) const {
    return {arena, kernels_, tiling_.block_rows, shape_.taps(), segments(), call_.is_geglu};
  }

  void run_task(int64_t task, const Workspace& workspace) {
    // panel groups of one row block follow each other, so their activations are warm
    const int64_t block = task / tiling_.panel_groups, group = task % tiling_.panel_groups;
    const int64_t first_row = block * tiling_.block_rows;
    const int64_t rows = std::min(tiling_.block_rows, shape_.rows() - first_row);
    for (int segment = 0; segment < segments(); ++segment) {
      find_rows(segment, first_row, rows, workspace);
    }
    const int64_t begin = tiling_.panels * group / tiling_.panel_groups;
    const int64_t end = tiling_.panels * (group + 1) / tiling_.panel_groups;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kernels_.panels;
      const int64_t panels = std::min(kernels_.panels, stored_panels_ - first);
      if (call_.is_geglu) {
        multiply_panel({first, panels, Part::kValue}, first_row, rows, workspace);
        multiply_panel({first, panels, Part::kGate}, first_row, rows, workspace);
      } else {
        multiply_panel({first, panels, Part::kWhole}, first_row, rows, workspace);
      }
    }
  }

  bool needs_copy(int segment) const {
    const int64_t channels = shape_.channels[static_cast<size_t>(segment)];
    return format_.is_activation_offset || channels % kStepK != 0;
  }

  void allocate_shared(Arena& arena) {
    zeros_ = arena.take<int8_t>(std::max(segments_[0].channels, segments_[1].channels));
    for (int segment = 0; segment < segments(); ++segment) {
      copies_[segment] = needs_copy(segment)
                             ? arena.take<int8_t>(pixels() * segments_[segment].channels)
                             : nullptr;
      const bool needs_sums = format_.weight_offset != 0 && shape_.taps() > 1;
      pixel_sums_[segment] = needs_sums ? arena.take<int32_t>(pixels()) : nullptr;
    }
  }

  // The kernels read activations where they lie, unless rows do not split into steps of 4 channels
  // or the activation is the unsigned side.
  void copy_activations() {
    const int flip = format_.is_activation_offset ? kActivationOffset : 0;
    std::memset(zeros_, flip,
                static_cast<size_t>(std::max(segments_[0].channels, segments_[1].channels)));
    for (int segment = 0; segment < segments(); ++segment) {
      if (!needs_copy(segment)) continue;
      const int64_t channels = shape_.channels[static_cast<size_t>(segment)];
      const int64_t padded = segments_[segment].channels;
      const int64_t per_task = std::max<int64_t>(1, kCopyBytes / padded);
      parallel_for(ceil_div(pixels(), per_task), threads_, [&](int64_t task, int64_t) {
        for (int64_t i = task * per_task; i < std::min(pixels(), (task + 1) * per_task); ++i) {
          const int8_t* from = call_.x_q[segment] + i * channels;
          int8_t* to = copies_[segment] + i * padded;
          for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<int8_t>(from[c] ^ flip);
          std::memset(to + channels, 0, static_cast<size_t>(padded - channels));
        }
      });
      segments_[segment].x = copies_[segment];
    }
  }

  // Sums over the channels of every pixel, which a convolution needs once for each tap.
  void sum_pixels() {
    for (int index = 0; index < segments(); ++index) {
      if (pixel_sums_[index] == nullptr) continue;
      const Segment& segment = segments_[index];
      const int64_t per_task = std::max<int64_t>(1, kCopyBytes / segment.channels);
      parallel_for(ceil_div(pixels(), per_task), threads_, [&](int64_t task, int64_t) {
        for (int64_t i = task * per_task; i < std::min(pixels(), (task + 1) * per_task); ++i) {
          pixel_sums_[index][i] =
              kernels_.sum_row(segment.x + i * segment.channels, segment.channels);
        }
      });
    }
  }

  // Fills the row pointers of a block and what its accumulators start from.
  void find_rows(int index, int64_t first_row, int64_t rows, const Workspace& workspace) const {
    const Segment& segment = segments_[index];
    const int64_t taps = shape_.taps(), tile_rows = kernels_.rows;
    const int32_t* pixel_sums = pixel_sums_[index];
    Position at(shape_, first_row);
    for (int64_t r = 0; r < round_up(rows, tile_rows); ++r) {
      const int8_t** out = workspace.rows[index] + r / tile_rows * taps * tile_rows + r % tile_rows;
      if (r >= rows) {  // rows past the end fill the last tile
        for (int64_t tap = 0; tap < taps; ++tap) out[tap * tile_rows] = zeros_;
        workspace.row_start[index][r] = 0;
        continue;
      }
      uint32_t sum = 0;
      for_each_tap(shape_, at, [&](int64_t tap, int64_t pixel) {
        out[tap * tile_rows] = pixel < 0 ? zeros_ : segment.x + pixel * segment.channels;
        if (pixel_sums != nullptr && pixel >= 0) sum += static_cast<uint32_t>(pixel_sums[pixel]);
      });
      if (format_.weight_offset != 0 && pixel_sums == nullptr && out[0] != zeros_) {
        sum = static_cast<uint32_t>(kernels_.sum_row(out[0], segment.channels));
      }
      const uint32_t start = 0u - static_cast<uint32_t>(format_.weight_offset) * sum;
      workspace.row_start[index][r] = static_cast<int32_t>(start);
      at.advance(shape_);
    }
  }

  // Half of a gated pair: the values wait in the workspace until their gates are there.
  enum class Part { kWhole, kValue, kGate };

  struct Panel {
    int64_t first, panels;  // stored panels of the result's channels
    Part part;

    int64_t width() const { return panels * kPanel; }
  };

  int64_t first_weight(const Panel& panel) const {
    return panel.first + (panel.part == Part::kGate ? stored_panels_ : 0);
  }

  void multiply_panel(const Panel& panel, int64_t first_row, int64_t rows,
                      const Workspace& workspace) {
    for (int index = 0; index < segments(); ++index) {
      const std::vector<Chunk>& chunks = segments_[index].chunks;
      for (size_t i = 0; i < chunks.size(); ++i) {
        decode(chunks[i], first_weight(panel), panel.panels, workspace);
        const bool is_last = index + 1 == segments() && i + 1 == chunks.size();
        for (int64_t r = 0; r < rows; r += kernels_.rows) {
          multiply_tile(index, chunks[i], i == 0, r, panel.panels, workspace);
          if (is_last) write(panel, first_row, r, std::min(kernels_.rows, rows - r), workspace);
        }
      }
    }
  }

  void decode(const Chunk& chunk, int64_t first_stored, int64_t panels,
              const Workspace& workspace) const {
    DecodeCall decode{};
    decode.packed = static_cast<const uint8_t*>(call_.qweight) + first_stored * panel_bytes_ +
                    chunk.first_k * kPanel * call_.bits / 8;
    decode.packed_stride = panel_bytes_;
    decode.panels = panels;
    decode.k = chunk.k;
    if (call_.w_mult != nullptr) {
      load_multipliers(chunk, first_stored, panels, workspace.mult);
      decode.mult = workspace.mult;
    }
    decode.panel = workspace.panel;
    decode.channel_start = workspace.channel_start;
    format_.decode(decode);
  }

  void load_multipliers(const Chunk& chunk, int64_t first_stored, int64_t panels,
                        int16_t* mult) const {
    const int64_t blocks = shape_.k_padded() / kBlockK;
    for (int64_t block = 0; block < chunk.k / kBlockK; ++block) {
      for (int64_t n = 0; n < panels * kPanel; ++n, mult += 2) {
        const int64_t channel = first_stored * kPanel + n;  // weights of channels past N are zero
        const int64_t at = channel * blocks + chunk.first_k / kBlockK + block;
        mult[0] = mult[1] = channel < shape_.out_channels ? call_.w_mult[at] : int16_t{1};
      }
    }
  }

  void multiply_tile(int index, const Chunk& chunk, bool is_first, int64_t r, int64_t panels,
                     const Workspace& workspace) const {
    TileCall tile{};
    tile.rows = workspace.rows[index] + r * shape_.taps();
    tile.runs = chunk.runs.data();
    tile.run_count = static_cast<int64_t>(chunk.runs.size());
    tile.panel = workspace.panel;
    tile.mult = workspace.mult;
    tile.panels = panels;
    tile.row_start = is_first ? workspace.row_start[index] + r : nullptr;
    tile.channel_start = format_.is_activation_offset ? workspace.channel_start : nullptr;
    tile.acc = workspace.acc[index] + r * panels * kPanel;
    format_.tile(tile);
  }

  // Rows r .. r + rows of the block.
  void write(const Panel& panel, int64_t first_row, int64_t r, int64_t rows,
             const Workspace& workspace) {
    if (call_.output == Output::kInt32) {
      write_accumulators(panel, first_row + r, r, rows, workspace);
      return;
    }
    const int64_t N = result_channels(), width = panel.width(), column = panel.first * kPanel;
    const int64_t offset = (first_row + r) * N + column;
    TileEpilogue tile = epilogue(first_row + r, first_weight(panel) * kPanel);
    tile.acc = workspace.acc[0] + r * width;
    tile.acc2 = segments() == 2 ? workspace.acc[1] + r * width : nullptr;
    tile.acc_stride = width;
    tile.rows = rows;
    tile.columns = std::min(width, N - column);
    if (panel.part == Part::kValue) {
      kernels_.finish(tile, workspace.values + r * width, width);
    } else if (panel.part == Part::kWhole && call_.output == Output::kFloat32) {
      kernels_.finish(tile, static_cast<float*>(call_.out[0]) + offset, N);
    } else {
      kernels_.finish(tile, workspace.staging, width);
      for (int64_t i = 0; i < rows; ++i) {
        const float* value =
            panel.part == Part::kGate ? workspace.values + (r + i) * width : nullptr;
        write_row(value, workspace.staging + i * width, tile.columns, offset + i * N);
      }
    }
  }

  // Gates and quantizes one row of a tile; y holds the gates of `value`, or the result itself.
  void write_row(const float* value, float* y, int64_t columns, int64_t offset) {
    const bool is_float = call_.output == Output::kFloat32;
    float* gated = is_float ? static_cast<float*>(call_.out[0]) + offset : y;
    uint32_t largest = 0;
    if (value != nullptr) {
      largest = activations_.geglu(value, y, columns, gated);
      if (is_float && largest >= kActivationInfinity) gate_plainly(value, y, columns, gated);
    }
    if (is_float) return;
    int8_t* out = static_cast<int8_t*>(call_.out[0]) + offset;
    largest = std::max(largest, activations_.quantize(y, columns, 1.0f / *call_.out_scale, out));
    if (largest >= kActivationInfinity) is_finite_ = false;
  }

  // The vector loops bound their argument, which would hide NaN and infinity.
  static void gate_plainly(const float* value, const float* gate, int64_t columns, float* gated) {
    for (int64_t n = 0; n < columns; ++n) {
      gated[n] = value[n] * (0.5f * gate[n] * (1.0f + std::erf(gate[n] * 0.70710678f)));
    }
  }

  void write_accumulators(const Panel& panel, int64_t first_row, int64_t r, int64_t rows,
                          const Workspace& workspace) const {
    const int64_t N = shape_.out_channels, column = panel.first * kPanel;
    const int64_t columns = std::min(panel.width(), N - column);
    for (int segment = 0; segment < segments(); ++segment) {
      int32_t* out = static_cast<int32_t*>(call_.out[segment]) + first_row * N + column;
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(workspace.acc[segment] + (r + i) * panel.width(), columns, out + i * N);
      }
    }
  }

  TileEpilogue epilogue(int64_t first_row, int64_t first_column) const {
    const int64_t N = shape_.out_channels;
    const auto row_scale = [&](int segment) {
      return call_.x_scale[segment] + (call_.is_x_scale_per_row[segment] ? first_row : 0);
    };
    TileEpilogue tile{};
    tile.x_scale = row_scale(0);
    tile.x_scale_stride = call_.is_x_scale_per_row[0] ? 1 : 0;
    if (segments() == 2) {
      tile.x2_scale = row_scale(1);
      tile.x2_scale_stride = call_.is_x_scale_per_row[1] ? 1 : 0;
    }
    tile.w_scale = call_.w_scale + first_column;
    if (call_.bias != nullptr) tile.bias = call_.bias + first_column;
    if (call_.temb != nullptr) {
      tile.temb = call_.temb + first_column;
      tile.rows_per_temb = shape_.rows() / call_.temb_rows;
    }
    if (call_.residual != nullptr) tile.residual = call_.residual + first_row * N + first_column;
    tile.first_row = first_row;
    tile.stride = N;
    return tile;
  }

  const Kernels& kernels_;
  const ActivationKernels& activations_;
  const Format& format_;
  const Conv2dShape& shape_;
  const MatmulCall& call_;
  const int64_t stored_panels_;  // panels of 16 that hold N
  const int64_t panel_bytes_;    // of one stored panel
  const Tiling tiling_;
  const int64_t threads_;
  Segment segments_[2] = {};
  int8_t* zeros_ = nullptr;  // what padding reads
  int8_t* copies_[2] = {};
  int32_t* pixel_sums_[2] = {};  // convolutions with an offset weight
  std::atomic<bool> is_finite_{true};
};

std::vector<int64_t> nearest_index(int64_t from, int64_t to) {
  std::vector<int64_t> index(static_cast<size_t>(to));
  for (int64_t i = 0; i < to; ++i) index[static_cast<size_t>(i)] = i * from / to;
  return index;
}

}  // namespace

Conv2dShape::Conv2dShape(std::array<int64_t, 3> size, Pair channels, int64_t out_channels,
                         Pair kernel_size, Pair stride, Pair padding, Pair dilation, Pair upsample,
                         Pair out_size)
    : batch(size[0]),
      height(size[1]),
      width(size[2]),
      channels(channels),
      out_channels(out_channels),
      kernel_size(kernel_size),
      stride(stride),
      padding(padding),
      dilation(dilation),
      upsample(upsample),
      out_size(out_size),
      source_row(nearest_index(height, upsample[0])),
      source_column(nearest_index(width, upsample[1])) {}

int64_t Conv2dShape::channels_padded(int segment) const {
  return round_up(channels[static_cast<size_t>(segment)], kBlockK);
}

bool matmul(const Kernels& kernels, const ActivationKernels& activations, const Conv2dShape& shape,
            const MatmulCall& call, int64_t threads) {
  const int64_t rows = shape.rows();
  if (rows == 0 || shape.out_channels == 0) return true;
  const bool is_small = rows * shape.out_channels * shape.k_padded() < kSmallMacs;
  threads = is_small ? 1 : std::max<int64_t>(1, threads);
  return Matmul(kernels, activations, shape, call, threads).run();
}

}  // namespace ptq4adm
