// What the drivers of activation.h share: scales, the running maximum, the size of a task.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "activation.h"
#include "integers.h"

namespace ptq4adm {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // 128 KiB of input: long against the cost of a task
constexpr float kSmallestAbsmax = 1e-8f;    // reference.py: SMALLEST_ABSMAX

[[maybe_unused]] float as_float(uint32_t bits) {
  float value = 0.0f;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] float dynamic_scale(float absmax) {
  return std::max(absmax, kSmallestAbsmax) / kLargestInt8;
}

// Largest |value| that several threads met, as bits.
class Largest {
 public:
  void raise_to(uint32_t bits) {
    uint32_t seen = bits_.load(std::memory_order_relaxed);
    while (bits > seen && !bits_.compare_exchange_weak(seen, bits)) {
    }
  }
  uint32_t bits() const { return bits_; }
  QuantizeStatus status() const {
    return bits_ < kActivationInfinity ? QuantizeStatus::kOk : QuantizeStatus::kNonFinite;
  }

 private:
  std::atomic<uint32_t> bits_{0};
};

// Writes the static scale in use, if there is one. False if step lies outside the table.
[[maybe_unused]] bool read_static_scale(const QuantizedOutput& out) {
  if (out.table == nullptr) return true;
  const int64_t row = out.step != nullptr && out.table_size > 1 ? *out.step : 0;
  if (row < 0 || row >= out.table_size) return false;
  *out.scale = out.table[row];
  return true;
}

}  // namespace
}  // namespace ptq4adm
