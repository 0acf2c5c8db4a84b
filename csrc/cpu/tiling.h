// How a product is cut: rows and panels into tasks, K into chunks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "integers.h"
#include "kernels.h"
#include "matmul.h"

namespace ptq4adm {

constexpr int64_t kBlockBytes = 512 << 10;  // activations of a row block: they stay in L2
constexpr int64_t kMinBlockRows = 96;       // a chunk is decoded once for so many rows
constexpr int64_t kMaxBlockRows = 512;
constexpr int64_t kTasksPerThread = 3;  // enough that the last task does not decide

// How the product is cut into tasks: row blocks times groups of panels.
struct Tiling {
  int64_t block_rows, row_blocks, panels, panel_groups;

  Tiling(const Kernels& kernels, const Conv2dShape& shape, int64_t columns, int64_t threads) {
    const int64_t rows = shape.rows();
    const int64_t row_bytes = std::max<int64_t>(1, shape.channels[0] + shape.channels[1]);
    const int64_t fitting = std::clamp(kBlockBytes / row_bytes, kMinBlockRows, kMaxBlockRows);
    row_blocks = ceil_div(rows, fitting);
    if (threads > 1 && row_blocks % threads != 0) {  // equal shares, if blocks stay long enough
      const int64_t balanced = round_up(row_blocks, threads);
      if (rows / balanced >= kMinBlockRows) row_blocks = balanced;
    }
    block_rows = round_up(ceil_div(rows, row_blocks), kernels.rows);
    row_blocks = ceil_div(rows, block_rows);
    panels = ceil_div(columns, kPanel * kernels.panels);
    const bool is_even = row_blocks % threads == 0;
    panel_groups = is_even ? 1 : std::min(panels, ceil_div(kTasksPerThread * threads, row_blocks));
  }

  int64_t tasks() const { return row_blocks * panel_groups; }
};

// A stretch of K that is decoded at once.
struct Chunk {
  int64_t first_k, k;  // in the padded K of the layer
  std::vector<Run> runs;
};

inline std::vector<Chunk> chunks_of(const Conv2dShape& shape, int segment, int64_t chunk_k) {
  const int64_t padded = shape.channels_padded(segment);
  const int64_t channels = shape.channels[static_cast<size_t>(segment)];
  std::vector<Chunk> chunks;
  int64_t first_k = segment == 0 ? 0 : shape.k_padded(0);
  for (int64_t tap = 0; tap < shape.taps(); ++tap) {
    for (int64_t c = 0; c < padded;) {
      if (chunks.empty() || chunks.back().k == chunk_k) chunks.push_back({first_k, 0, {}});
      Chunk& chunk = chunks.back();
      const int64_t k = std::min(padded - c, chunk_k - chunk.k);
      const int64_t real = std::clamp<int64_t>(channels - c, 0, k);
      chunk.runs.push_back({tap, c, ceil_div(real, kStepK), k / kStepK});
      chunk.k += k;
      first_k += k;
      c += k;
    }
  }
  return chunks;
}

}  // namespace ptq4adm
