// Memory of a product: one allocation that the calling thread keeps, cut into buffers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "integers.h"
#include "kernels.h"

namespace ptq4adm {

// Cuts aligned buffers out of one allocation; without memory it only measures.
class Arena {
 public:
  explicit Arena(uint8_t* memory) : memory_(memory) {}
  template <typename T>
  T* take(int64_t count) {
    T* taken = memory_ != nullptr ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* memory_;
  int64_t bytes_ = 0;
};

// One thread's buffers.
struct Workspace {
  const int8_t** rows[2];  // [tiles][taps][rows of a tile], one a segment
  int32_t* row_start[2];   // [block_rows], -weight_offset * sum(x)
  uint8_t* panel;          // a decoded chunk
  int16_t* mult;           // its multipliers
  int32_t* channel_start;  // [width]
  int32_t* acc[2];         // [block_rows][width]
  float* staging;          // [rows of a tile][width], floats on their way to int8
  float* values;           // [block_rows][width], of a gated pair; or null

  Workspace(Arena& arena, const Kernels& kernels, int64_t block_rows, int64_t taps, int segments,
            bool is_gated) {
    const int64_t width = kernels.panels * kPanel;
    for (int segment = 0; segment < segments; ++segment) {
      rows[segment] = arena.take<const int8_t*>(block_rows * taps);
      row_start[segment] = arena.take<int32_t>(block_rows);
      acc[segment] = arena.take<int32_t>(block_rows * width);
    }
    panel = arena.take<uint8_t>(kernels.chunk_k * width * kernels.panel_copies);
    mult = arena.take<int16_t>(kernels.chunk_k / kBlockK * width * 2);
    channel_start = arena.take<int32_t>(width);
    staging = arena.take<float>(kernels.rows * width);
    values = is_gated ? arena.take<float>(block_rows * width) : nullptr;
  }
};

// The calling thread keeps its buffer: fresh pages for every call cost more than small products.
inline uint8_t* scratch(int64_t bytes) {
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

}  // namespace ptq4adm
