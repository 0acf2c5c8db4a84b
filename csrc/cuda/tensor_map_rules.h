// The rules of a tensor map, for the two files that encode one.
#pragma once

#include <cstdint>
#include <string>

#include "tensor_map.h"

namespace ptq4adm {

// cuTensorMapEncodeTiled's, without interleave, for elements of a byte and the 64-byte swizzle; and
// that a row of the box fills the swizzle's span, so that rows lie side by side.
inline std::string tensor_map_offence(const TensorMapDescription& d) {
  const auto at = [](const char* name, int i) { return name + ("[" + std::to_string(i) + "] = "); };
  if (d.rank != 2 && d.rank != 4) {
    return "rank = " + std::to_string(d.rank) + "; boxes are copied in 2 or 4 dimensions";
  }
  if (d.base == 0 || d.base % 16 != 0) return "the tensor's address is no multiple of 16 bytes";
  for (int i = 0; i < d.rank; ++i) {
    if (d.sizes[i] < 1 || d.sizes[i] > int64_t{1} << 32) {
      return at("sizes", i) + std::to_string(d.sizes[i]) + "; needed: 1 to 2^32";
    }
    if (d.box[i] < 1 || d.box[i] > 256) {
      return at("box", i) + std::to_string(d.box[i]) + "; needed: 1 to 256";
    }
  }
  for (int i = 1; i < d.rank; ++i) {
    if (d.strides[i] < 16 || d.strides[i] % 16 != 0 || d.strides[i] >= int64_t{1} << 40) {
      return at("strides", i) + std::to_string(d.strides[i]) +
             " bytes; needed: a multiple of 16 from 16 on, under 2^40";
    }
  }
  if (d.box[0] != TensorMapDescription::kSwizzleBytes) {
    return at("box", 0) + std::to_string(d.box[0]) + "; needed: 64, the span of the swizzle";
  }
  return "";
}

}  // namespace ptq4adm
