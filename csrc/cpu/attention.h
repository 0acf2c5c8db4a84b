// Float attention over [B, T, heads, head_dim], threads over heads.
#pragma once

#include <cstdint>

#include "attention_kernels.h"

namespace ptq4adm {

// One head of the first sample, and how far the next head and the next sample lie, in floats.
struct AttentionBatch {
  AttentionHead first;
  int64_t batch, heads;
  int64_t q_head, k_head, v_head, out_head;
  int64_t q_sample, k_sample, v_sample, out_sample;
  int64_t bias_sample;
};

void attention(const AttentionKernels& kernels, const AttentionBatch& batch, int64_t threads);

}  // namespace ptq4adm
