// Tensor maps: what a TMA copy knows of a tensor in global memory. Encoded on the host, passed to a
// kernel as a `__grid_constant__` parameter, opaque to it.
//
// tensor_map.cu asks the driver to encode one; emulator_boxes.cpp writes the description itself
// into the words. Both check the rules of tensor_map_rules.h first.
#pragma once

#include <cstdint>

namespace ptq4adm {

// CUtensorMap, in size and alignment (64 bytes before CUDA 13).
struct alignas(128) TensorMap {
  uint64_t word[16];
};

// A tensor of bytes and the box of it that one copy takes. Dimensions count from the innermost, so
// strides[0] is 1 and not an argument of anything. Boxes land in shared memory densely, in rows of
// box[0] bytes, under the 64-byte swizzle: bits 4 and 5 of an address are exchanged by bits 7
// and 8.
struct TensorMapDescription {
  static constexpr int kMaxRank = 4;
  static constexpr int kSwizzleBytes = 64;

  uint64_t base = 0;                // address in global memory, a multiple of 16
  int rank = 0;                     // 2 or 4
  int64_t sizes[kMaxRank] = {};     // elements of a byte, 1 to 2^32
  int64_t strides[kMaxRank] = {1};  // bytes, multiples of 16 from the second on
  int box[kMaxRank] = {};           // elements, 1 to 256; the innermost 64

  int64_t box_bytes() const {
    int64_t bytes = 1;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};

// Encodes a map. Returns the reason if that cannot be; the text lives until the thread's next call.
const char* make_tensor_map(TensorMap* map, const TensorMapDescription& description);

// sizes and box from the innermost dimension on; strides in bytes, of every dimension but that one.
template <int kRank>
TensorMapDescription describe_tensor(const void* base, const int64_t (&sizes)[kRank],
                                     const int64_t (&strides)[kRank - 1], const int (&box)[kRank]) {
  static_assert(kRank == 2 || kRank == 4, "boxes are copied in two and in four dimensions");
  TensorMapDescription description;
  description.base = reinterpret_cast<uintptr_t>(base);
  description.rank = kRank;
  for (int i = 0; i < kRank; ++i) {
    description.sizes[i] = sizes[i];
    description.strides[i] = i == 0 ? 1 : strides[i - 1];
    description.box[i] = box[i];
  }
  return description;
}

inline const char* make_tensor_map_2d(TensorMap* map, const void* base, const int64_t (&sizes)[2],
                                      const int64_t (&strides)[1], const int (&box)[2]) {
  return make_tensor_map(map, describe_tensor<2>(base, sizes, strides, box));
}
inline const char* make_tensor_map_4d(TensorMap* map, const void* base, const int64_t (&sizes)[4],
                                      const int64_t (&strides)[3], const int (&box)[4]) {
  return make_tensor_map(map, describe_tensor<4>(base, sizes, strides, box));
}

}  // namespace ptq4adm
