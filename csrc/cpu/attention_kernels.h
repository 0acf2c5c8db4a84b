// Float attention of one head, one function per instruction set: softmax(q k^T * scale + bias) v.
#pragma once

#include <cstdint>

namespace ptq4adm {

// Queries of one head against all its keys. Rows lie `*_stride` floats apart; each holds head_dim.
struct AttentionHead {
  const float* q;
  const float* k;
  const float* v;
  const float* bias;  // [keys], added to the scores; or null
  float* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  int64_t queries, keys, head_dim;
  float scale;
};

struct AttentionKernels {
  const char* name;
  // floats of scratch that `run` needs
  int64_t (*scratch_floats)(const AttentionHead& head);
  void (*run)(const AttentionHead& head, float* scratch);
};

const AttentionKernels& scalar_attention_kernels();
// Null where the file was not compiled for the instruction set.
const AttentionKernels* avx2_attention_kernels();    // AVX2 and FMA
const AttentionKernels* avx512_attention_kernels();  // AVX-512 F, BW, DQ, VL

// As select_activation_kernels.
const AttentionKernels& select_attention_kernels(const char* isa);

}  // namespace ptq4adm
