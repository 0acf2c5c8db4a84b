#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace ptq4adm {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // 128 KiB of input: long against the cost of a task
constexpr float kSmallestAbsmax = 1e-8f;    // reference.py: SMALLEST_ABSMAX

float dynamic_scale(uint32_t absmax_bits) {
  float absmax = 0.0f;
  std::memcpy(&absmax, &absmax_bits, sizeof absmax);
  return std::max(absmax, kSmallestAbsmax) / static_cast<float>(kInt8Max);
}

void raise_to(std::atomic<uint32_t>& largest, uint32_t bits) {
  uint32_t seen = largest.load(std::memory_order_relaxed);
  while (bits > seen && !largest.compare_exchange_weak(seen, bits)) {
  }
}

bool quantize_tensor(const Kernels& kernels, const float* x, int64_t count, float* scale,
                     bool is_static, int8_t* x_q, int64_t threads) {
  const int64_t tasks = (count + kTaskElements - 1) / kTaskElements;
  const auto size = [&](int64_t task) { return std::min(kTaskElements, count - task * kTaskElements); };
  std::atomic<uint32_t> largest{0};
  if (!is_static) {
    parallel_for(tasks, threads, [&](int64_t task, int64_t) {
      raise_to(largest, kernels.absmax_bits(x + task * kTaskElements, size(task)));
    });
    if (largest >= kInfinityBits) return false;
    *scale = dynamic_scale(largest);
  }
  const float inverse_scale = 1.0f / *scale;
  parallel_for(tasks, threads, [&](int64_t task, int64_t) {
    const int64_t first = task * kTaskElements;
    raise_to(largest, kernels.quantize(x + first, size(task), inverse_scale, x_q + first));
  });
  return largest < kInfinityBits;
}

}  // namespace

bool quantize_int8(const Kernels& kernels, const float* x, int64_t rows, int64_t columns,
                   float* scale, bool is_static, int8_t* x_q, int64_t threads) {
  if (rows == 1) return quantize_tensor(kernels, x, columns, scale, is_static, x_q, threads);
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, columns));
  std::atomic<uint32_t> largest{0};
  parallel_for((rows + task_rows - 1) / task_rows, threads, [&](int64_t task, int64_t) {
    const int64_t end = std::min(rows, (task + 1) * task_rows);
    for (int64_t row = task * task_rows; row < end; ++row) {
      const uint32_t bits = kernels.absmax_bits(x + row * columns, columns);
      raise_to(largest, bits);
      if (bits >= kInfinityBits) continue;
      scale[row] = dynamic_scale(bits);
      kernels.quantize(x + row * columns, columns, 1.0f / scale[row], x_q + row * columns);
    }
  });
  return largest < kInfinityBits;
}

}  // namespace ptq4adm
