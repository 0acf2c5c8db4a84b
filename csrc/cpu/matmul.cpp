// The loops around the kernels: row blocks, panels of 16 channels, chunks of K.
//
// A task packs the activations of one row block (all of K, patches of a convolution included: there
// is no im2col of the whole input) and then walks over panels; a W4 chunk is decoded once into L1
// and used by every group of 4 rows of the block.

#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"

namespace ptq4adm {
namespace {

constexpr int64_t kPackedBytes = 384 << 10;  // activations of a row block: they stay in L2
constexpr int64_t kMaxBlockRows = 128;
constexpr int64_t kTasksPerThread = 3;       // enough that the last task does not decide
constexpr int64_t kSmallMacs = 1 << 19;      // below this, starting threads costs more than it gains

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

struct alignas(64) Multipliers {
  int16_t value[kChunkK / kBlockK * 2 * kPanel];
};

// How the product is cut into tasks: row blocks times groups of panels.
struct Tiling {
  int64_t block_rows, row_blocks, panels, panel_groups;

  Tiling(const Conv2dShape& shape, int64_t row_bytes, int64_t threads) {
    const int64_t rows = shape.rows();
    const int64_t fitting = std::clamp(kPackedBytes / row_bytes, 4 * kRows, kMaxBlockRows);
    row_blocks = ceil_div(rows, fitting / kRows * kRows);
    if (threads > 1 && row_blocks % threads != 0) {  // equal shares, if blocks stay long enough
      const int64_t balanced = round_up(row_blocks, threads);
      if (rows / balanced >= 4 * kRows) row_blocks = balanced;
    }
    block_rows = round_up(ceil_div(rows, row_blocks), kRows);
    row_blocks = ceil_div(rows, block_rows);
    panels = ceil_div(shape.out_channels, kPanel);
    const bool is_even = row_blocks % threads == 0;
    panel_groups = is_even ? 1 : std::min(panels, ceil_div(kTasksPerThread * threads, row_blocks));
  }

  int64_t tasks() const { return row_blocks * panel_groups; }
};

// One thread's buffers, cut out of one allocation.
struct Workspace {
  uint8_t* packed;      // activations of the row block, kernels.h: x
  int8_t* panel;        // a decoded chunk
  Multipliers* mult;
  int32_t* acc[2];      // [block_rows][16], one a segment
  float* staging;       // [block_rows][16], floats on their way to int8

  static int64_t bytes(int64_t block_rows, int64_t row_bytes) {
    return round_up(block_rows * row_bytes, 64) + kChunkK * kPanel +
           static_cast<int64_t>(sizeof(Multipliers)) + 3 * block_rows * kPanel * 4;
  }

  Workspace(uint8_t* base, int64_t block_rows, int64_t row_bytes) {
    packed = base;
    panel = reinterpret_cast<int8_t*>(packed + round_up(block_rows * row_bytes, 64));
    mult = reinterpret_cast<Multipliers*>(panel + kChunkK * kPanel);
    acc[0] = reinterpret_cast<int32_t*>(mult + 1);
    acc[1] = acc[0] + block_rows * kPanel;
    staging = reinterpret_cast<float*>(acc[1] + block_rows * kPanel);
  }
};

// The calling thread keeps its buffer: fresh pages for every call cost more than small products.
uint8_t* scratch(int64_t bytes) {
  struct Buffer {
    std::unique_ptr<uint8_t, decltype(&std::free)> memory{nullptr, &std::free};
    int64_t size = 0;
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    buffer.memory.reset();
    buffer.size = 0;
    buffer.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, round_up(bytes, 64))));
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.size = bytes;
  }
  return buffer.memory.get();
}

class Matmul {
 public:
  Matmul(const Kernels& kernels, const Conv2dShape& shape, const MatmulCall& call, int64_t threads)
      : kernels_(kernels),
        shape_(shape),
        call_(call),
        row_bytes_(shape.k_padded() * (call.bits == 4 ? 1 : 2)),
        tiling_(shape, row_bytes_, threads),
        threads_(threads) {}

  bool run() {
    const int64_t bytes = round_up(Workspace::bytes(tiling_.block_rows, row_bytes_), 64);
    uint8_t* memory = scratch(bytes * std::min(threads_, tiling_.tasks()));
    parallel_for(tiling_.tasks(), threads_, [&](int64_t task, int64_t thread) {
      const Workspace workspace(memory + thread * bytes, tiling_.block_rows, row_bytes_);
      run_task(task, workspace);
    });
    return is_finite_;
  }

 private:
  int segments() const { return shape_.channels[1] > 0 ? 2 : 1; }

  void run_task(int64_t task, const Workspace& workspace) {
    // panel groups of one row block follow each other, so their packing reads warm activations
    const int64_t block = task / tiling_.panel_groups, group = task % tiling_.panel_groups;
    const int64_t first_row = block * tiling_.block_rows;
    const int64_t rows = std::min(tiling_.block_rows, shape_.rows() - first_row);
    pack_rows(first_row, rows, workspace);
    const int64_t begin = tiling_.panels * group / tiling_.panel_groups;
    const int64_t end = tiling_.panels * (group + 1) / tiling_.panel_groups;
    for (int64_t panel = begin; panel < end; ++panel) {
      accumulate(panel, rows, workspace);
      write(panel, first_row, rows, workspace);
    }
  }

  // --- activations ------------------------------------------------------------------------------

  struct Pixel {
    int64_t sample, row, column;  // top left of the receptive field, in the enlarged input
  };

  Pixel pixel(int64_t m) const {
    const int64_t pixels = shape_.out_size[0] * shape_.out_size[1];
    const int64_t within = m % pixels;
    return {m / pixels, within / shape_.out_size[1] * shape_.stride[0] - shape_.padding[0],
            within % shape_.out_size[1] * shape_.stride[1] - shape_.padding[1]};
  }

  // The channels that a kernel tap reads, or null in the zero padding.
  const int8_t* source(int segment, const Pixel& pixel, int64_t tap) const {
    const int64_t row = pixel.row + tap / shape_.kernel_size[1] * shape_.dilation[0];
    const int64_t column = pixel.column + tap % shape_.kernel_size[1] * shape_.dilation[1];
    if (row < 0 || row >= shape_.upsample[0] || column < 0 || column >= shape_.upsample[1]) {
      return nullptr;
    }
    const int64_t line = pixel.sample * shape_.height + shape_.source_row[row];
    const int64_t index = line * shape_.width + shape_.source_column[column];
    return call_.x_q[segment] + index * shape_.channels[segment];
  }

  void pack_rows(int64_t first_row, int64_t rows, const Workspace& workspace) const {
    uint8_t* x = workspace.packed;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t valid = std::min(kRows, rows - r0);
      Pixel pixels[kRows];
      for (int64_t r = 0; r < valid; ++r) pixels[r] = pixel(first_row + r0 + r);
      for (int segment = 0; segment < segments(); ++segment) {
        const int64_t channels_padded = shape_.channels_padded(segment);
        for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
          const int8_t* sources[kRows] = {};  // rows past the end read as zeros
          for (int64_t r = 0; r < valid; ++r) sources[r] = source(segment, pixels[r], tap);
          if (call_.bits == 4) {
            kernels_.pack_u8(sources, shape_.channels[segment], channels_padded, x);
            x += kRows * channels_padded;
          } else {
            kernels_.pack_s16(sources, shape_.channels[segment], channels_padded,
                              reinterpret_cast<int16_t*>(x));
            x += 2 * kRows * channels_padded;
          }
        }
      }
    }
  }

  // --- accumulation -----------------------------------------------------------------------------

  void accumulate(int64_t panel, int64_t rows, const Workspace& workspace) const {
    int64_t first_k = 0;
    for (int segment = 0; segment < segments(); ++segment) {
      int32_t* acc = workspace.acc[segment];
      std::fill_n(acc, round_up(rows, kRows) * kPanel, 0);
      alignas(64) int32_t weight_sum[kPanel] = {};
      const int64_t end_k = first_k + shape_.k_padded(segment);
      for (int64_t k0 = first_k; k0 < end_k; k0 += kChunkK) {
        const int64_t k = std::min(kChunkK, end_k - k0);
        if (call_.bits == 4) {
          accumulate_w4(panel, rows, k0, k, workspace, acc, weight_sum);
        } else {
          accumulate_w8(panel, rows, k0, k, workspace, acc);
        }
      }
      if (call_.bits == 4) remove_offset(acc, rows, weight_sum);
      first_k = end_k;
    }
  }

  void accumulate_w4(int64_t panel, int64_t rows, int64_t k0, int64_t k,
                     const Workspace& workspace, int32_t* acc, int32_t* weight_sum) const {
    const int16_t* mult = multipliers(panel, k0, k, workspace);
    const uint8_t* packed = static_cast<const uint8_t*>(call_.qweight) +
                            (panel * shape_.k_padded() + k0) * (kPanel / 2);
    kernels_.unpack_w4(packed, mult, k, workspace.panel, weight_sum);
    for (int64_t r = 0; r < rows; r += kRows) {
      const uint8_t* x = workspace.packed + r * row_bytes_ + kRows * k0;
      kernels_.tile_w4(x, workspace.panel, mult, k, acc + r * kPanel);
    }
  }

  void accumulate_w8(int64_t panel, int64_t rows, int64_t k0, int64_t k,
                     const Workspace& workspace, int32_t* acc) const {
    const int8_t* packed =
        static_cast<const int8_t*>(call_.qweight) + (panel * shape_.k_padded() + k0) * kPanel;
    for (int64_t r = 0; r < rows; r += kRows) {
      const uint8_t* x = workspace.packed + r * row_bytes_ + 2 * kRows * k0;
      kernels_.tile_w8(reinterpret_cast<const int16_t*>(x), packed, k, acc + r * kPanel);
    }
  }

  const int16_t* multipliers(int64_t panel, int64_t k0, int64_t k,
                             const Workspace& workspace) const {
    static const Multipliers ones = [] {
      Multipliers all{};
      for (int16_t& value : all.value) value = 1;
      return all;
    }();
    if (call_.w_mult == nullptr) return ones.value;
    const int64_t blocks = shape_.k_padded() / kBlockK;
    for (int64_t block = 0; block < k / kBlockK; ++block) {
      for (int64_t n = 0; n < kPanel; ++n) {
        const int64_t channel = panel * kPanel + n;  // weights of channels past N are zero
        const bool is_real = channel < shape_.out_channels;
        const int16_t value =
            is_real ? call_.w_mult[channel * blocks + k0 / kBlockK + block] : int16_t{1};
        workspace.mult->value[(block * kPanel + n) * 2] = value;
        workspace.mult->value[(block * kPanel + n) * 2 + 1] = value;
      }
    }
    return workspace.mult->value;
  }

  // Activations entered as x + 128: takes 128 * sum(w) off again, modulo 2^32.
  static void remove_offset(int32_t* acc, int64_t rows, const int32_t* weight_sum) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < kPanel; ++n) {
        const uint32_t offset = static_cast<uint32_t>(weight_sum[n]) * kActivationOffset;
        int32_t& value = acc[r * kPanel + n];
        value = static_cast<int32_t>(static_cast<uint32_t>(value) - offset);
      }
    }
  }

  // --- output -----------------------------------------------------------------------------------

  void write(int64_t panel, int64_t first_row, int64_t rows, const Workspace& workspace) {
    const int64_t N = shape_.out_channels, first_column = panel * kPanel;
    const int64_t columns = std::min(kPanel, N - first_column);
    const int64_t offset = first_row * N + first_column;
    if (call_.output == Output::kInt32) {
      for (int segment = 0; segment < segments(); ++segment) {
        int32_t* out = static_cast<int32_t*>(call_.out[segment]) + offset;
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(workspace.acc[segment] + r * kPanel, columns, out + r * N);
        }
      }
      return;
    }
    const TileEpilogue tile = epilogue(first_row, first_column, rows, columns, workspace);
    if (call_.output == Output::kFloat32) {
      kernels_.finish(tile, static_cast<float*>(call_.out[0]) + offset, N);
      return;
    }
    kernels_.finish(tile, workspace.staging, kPanel);
    const float inverse_scale = 1.0f / *call_.out_scale;
    int8_t* out = static_cast<int8_t*>(call_.out[0]) + offset;
    for (int64_t r = 0; r < rows; ++r) {
      const float* y = workspace.staging + r * kPanel;
      const uint32_t largest = kernels_.quantize(y, columns, inverse_scale, out + r * N);
      if (largest >= kInfinityBits) is_finite_ = false;
    }
  }

  TileEpilogue epilogue(int64_t first_row, int64_t first_column, int64_t rows, int64_t columns,
                        const Workspace& workspace) const {
    const int64_t N = shape_.out_channels;
    const auto row_scale = [&](int segment) {
      return call_.x_scale[segment] + (call_.is_x_scale_per_row[segment] ? first_row : 0);
    };
    TileEpilogue tile{};
    tile.acc = workspace.acc[0];
    tile.x_scale = row_scale(0);
    tile.x_scale_stride = call_.is_x_scale_per_row[0] ? 1 : 0;
    if (segments() == 2) {
      tile.acc2 = workspace.acc[1];
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
    tile.rows = rows;
    tile.columns = columns;
    return tile;
  }

  const Kernels& kernels_;
  const Conv2dShape& shape_;
  const MatmulCall& call_;
  const int64_t row_bytes_;  // packed activations of one row
  const Tiling tiling_;
  const int64_t threads_;
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

bool matmul(const Kernels& kernels, const Conv2dShape& shape, const MatmulCall& call,
            int64_t threads) {
  const int64_t rows = shape.rows();
  if (rows == 0 || shape.out_channels == 0) return true;
  const bool is_small = rows * shape.out_channels * shape.k_padded() < kSmallMacs;
  return Matmul(kernels, shape, call, is_small ? 1 : std::max<int64_t>(1, threads)).run();
}

}  // namespace ptq4adm
