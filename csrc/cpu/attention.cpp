#include "attention.h"

#include <algorithm>

#include "integers.h"
#include "parallel.h"
#include "select_vector.h"
#include "workspace.h"

namespace ptq4adm {
namespace {

constexpr int64_t kHeadsPerThread = 3;  // enough that the last task does not decide
constexpr int64_t kMinQueries = 192;    // keys are packed again for every part of the queries

}  // namespace

const AttentionKernels& select_attention_kernels(const char* isa) {
  return select_vector_kernels(isa, scalar_attention_kernels(), avx2_attention_kernels(),
                               avx512_attention_kernels());
}

void attention(const AttentionKernels& kernels, const AttentionBatch& batch, int64_t threads) {
  const int64_t queries = batch.first.queries, all_heads = batch.batch * batch.heads;
  if (queries == 0 || all_heads == 0) return;
  const int64_t wanted = ceil_div(threads == 1 ? 1 : kHeadsPerThread * threads, all_heads);
  const int64_t parts = std::clamp<int64_t>(queries / kMinQueries, 1, wanted);
  const int64_t part_queries = ceil_div(queries, parts);
  const int64_t tasks = all_heads * parts;
  const int64_t floats = round_up(kernels.scratch_floats(batch.first), 16);
  float* memory = reinterpret_cast<float*>(scratch(std::min(threads, tasks) * floats * 4));
  parallel_for(tasks, threads, [&](int64_t task, int64_t thread) {
    const int64_t part = task % parts, sample = task / parts / batch.heads;
    const int64_t h = task / parts % batch.heads, first = part * part_queries;
    AttentionHead head = batch.first;
    head.queries = std::min(part_queries, queries - first);
    if (head.queries <= 0) return;
    head.q += sample * batch.q_sample + h * batch.q_head + first * head.q_stride;
    head.k += sample * batch.k_sample + h * batch.k_head;
    head.v += sample * batch.v_sample + h * batch.v_head;
    head.out += sample * batch.out_sample + h * batch.out_head + first * head.out_stride;
    if (head.bias != nullptr) head.bias += sample * batch.bias_sample;
    kernels.run(head, memory + thread * floats);
  });
}

}  // namespace ptq4adm
