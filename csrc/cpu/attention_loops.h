// Attention over blocks of keys with a running softmax, written once over a vector type (the V of
// vector_math.h). Internal linkage: see the top of that file.
//
// The keys are transposed and the values padded once a head. Then blocks of queries meet blocks of
// keys that stay in L2; both products, q k^T and p v, are the same tile of 6 rows x up to kVectors
// vectors. Scores never leave L1.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "attention_kernels.h"
#include "vector_math.h"

namespace ptq4adm {
namespace {

template <class V, int64_t kVectors>
struct Attention {
  using F = typename V::Float;
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kColumns = kVectors * V::kWidth;
  static constexpr int64_t kKeyBlock = 512;  // x 64 channels, keys and values: 256 KiB
  static constexpr int64_t kQueryBlock = 192;
  static constexpr uint32_t kInfinityBits = 0x7f800000u;  // |x| >= this, as bits: infinity or NaN

  static int64_t padded(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }

  struct Scratch {
    float* keys;     // [padded keys / kColumns][head_dim][kColumns]
    float* values;   // [keys][padded head_dim]
    float* queries;  // [kQueryBlock][head_dim], scaled
    float* sums;     // [kQueryBlock][padded head_dim], the output before its division
    float* scores;   // [kRows][kKeyBlock]
    float* largest;  // [kQueryBlock]
    float* weight;   // [kQueryBlock], sum of exponentials
    int64_t end;

    Scratch(const AttentionHead& head, float* memory) {
      const int64_t width = padded(head.head_dim, V::kWidth);
      int64_t at = 0;
      const auto take = [&](float*& taken, int64_t count) {
        taken = memory != nullptr ? memory + at : nullptr;
        at += padded(count, 16);
      };
      take(keys, padded(head.keys, kColumns) * head.head_dim);
      take(values, head.keys * width);
      take(queries, kQueryBlock * head.head_dim);
      take(sums, kQueryBlock * width);
      take(scores, kRows * kKeyBlock);
      take(largest, kQueryBlock);
      take(weight, kQueryBlock);
      end = at;
    }
  };

  static int64_t scratch_floats(const AttentionHead& head) { return Scratch(head, nullptr).end; }

  static void run(const AttentionHead& head, float* memory) {
    const Scratch scratch(head, memory);
    pack_keys(head, scratch.keys);
    pack_values(head, scratch.values);
    for (int64_t first = 0; first < head.queries; first += kQueryBlock) {
      const int64_t rows = head.queries - first < kQueryBlock ? head.queries - first : kQueryBlock;
      start_queries(head, first, rows, scratch);
      for (int64_t key = 0; key < head.keys; key += kKeyBlock) {
        for (int64_t r = 0; r < rows; r += kRows) meet(head, r, key, scratch);
      }
      finish_queries(head, first, rows, scratch);
    }
  }

  // --- packing
  // ------------------------------------------------------------------------------------

  static void pack_keys(const AttentionHead& head, float* packed) {
    for (int64_t first = 0; first < head.keys; first += kColumns) {
      for (int64_t j = 0; j < kColumns; ++j) {
        if (first + j < head.keys) {
          const float* k = head.k + (first + j) * head.k_stride;
          for (int64_t d = 0; d < head.head_dim; ++d) packed[d * kColumns + j] = k[d];
        } else {
          for (int64_t d = 0; d < head.head_dim; ++d) packed[d * kColumns + j] = 0.0f;
        }
      }
      packed += kColumns * head.head_dim;
    }
  }

  static void pack_values(const AttentionHead& head, float* packed) {
    const int64_t width = padded(head.head_dim, V::kWidth);
    for (int64_t j = 0; j < head.keys; ++j, packed += width) {
      copy_padded(head.v + j * head.v_stride, head.head_dim, width, packed);
    }
  }

  static void copy_padded(const float* from, int64_t count, int64_t width, float* to) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    for (int64_t i = count; i < width; ++i) to[i] = 0.0f;
  }

  // Rows past the end repeat zeros: their scores are 0 and their results are dropped.
  static void start_queries(const AttentionHead& head, int64_t first, int64_t rows,
                            const Scratch& scratch) {
    const int64_t width = padded(head.head_dim, V::kWidth);
    for (int64_t r = 0; r < padded(rows, kRows); ++r) {
      float* q = scratch.queries + r * head.head_dim;
      for (int64_t d = 0; d < head.head_dim; ++d) {
        q[d] = r < rows ? head.q[(first + r) * head.q_stride + d] * head.scale : 0.0f;
      }
      for (int64_t d = 0; d < width; ++d) scratch.sums[r * width + d] = 0.0f;
      scratch.largest[r] = -std::numeric_limits<float>::infinity();
      scratch.weight[r] = 0.0f;
    }
  }

  static void finish_queries(const AttentionHead& head, int64_t first, int64_t rows,
                             const Scratch& scratch) {
    const int64_t width = padded(head.head_dim, V::kWidth);
    for (int64_t r = 0; r < rows; ++r) {
      const float weight = scratch.weight[r];
      const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;  // every key hidden: zeros
      float* out = head.out + (first + r) * head.out_stride;
      for (int64_t d = 0; d < head.head_dim; ++d) out[d] = scratch.sums[r * width + d] * inverse;
    }
  }

  // --- one tile of queries against one block of keys
  // ----------------------------------------------

  static void meet(const AttentionHead& head, int64_t r, int64_t key, const Scratch& scratch) {
    const int64_t keys = head.keys - key < kKeyBlock ? head.keys - key : kKeyBlock;
    const int64_t width = padded(head.head_dim, V::kWidth);
    const float* packed = scratch.keys + key * head.head_dim;
    for (int64_t j = 0; j < keys; j += kColumns) {
      product<kVectors, true>(scratch.queries + r * head.head_dim, head.head_dim, packed, kColumns,
                              head.head_dim, scratch.scores + j, kKeyBlock);
      packed += kColumns * head.head_dim;
    }
    float* sums = scratch.sums + r * width;
    for (int64_t i = 0; i < kRows; ++i) {
      const float shrink = soften(scratch.scores + i * kKeyBlock, keys,
                                  head.bias != nullptr ? head.bias + key : nullptr,
                                  scratch.largest[r + i], scratch.weight[r + i]);
      for (int64_t d = 0; d < width; d += V::kWidth) {
        float* sum = sums + i * width + d;
        V::store(sum, V::mul(V::load(sum), V::set(shrink)));
      }
    }
    const float* values = scratch.values + key * width;
    int64_t d = 0;
    for (; d + kColumns <= width; d += kColumns) {
      product<kVectors, false>(scratch.scores, kKeyBlock, values + d, width, keys, sums + d, width);
    }
    last_columns<kVectors - 1>(scratch, values + d, width, keys, sums + d, width - d);
  }

  template <int64_t kLeft>
  static void last_columns(const Scratch& scratch, const float* values, int64_t width, int64_t keys,
                           float* sums, int64_t columns) {
    if constexpr (kLeft > 0) {
      if (columns == kLeft * V::kWidth) {
        product<kLeft, false>(scratch.scores, kKeyBlock, values, width, keys, sums, width);
      } else {
        last_columns<kLeft - 1>(scratch, values, width, keys, sums, columns);
      }
    }
  }

  // Turns scores into exponentials of their distance to the largest so far, adds them to `weight`
  // and returns what earlier sums must shrink by. The tail up to a whole vector becomes 0.
  //
  // Scores of -infinity, from the bias, weigh nothing. NaN or +infinity make the whole row NaN: the
  // minimum and maximum instructions drop NaN, so it is looked for.
  static float soften(float* scores, int64_t keys, const float* bias, float& largest,
                      float& weight) {
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    for (int64_t j = keys; j % V::kWidth != 0; ++j) scores[j] = kLowest;
    typename V::Bits raw = V::no_magnitude(), biased = V::no_magnitude();
    F most = V::set(largest);
    for (int64_t j = 0; j < keys; j += V::kWidth) {
      F score = V::load(scores + j);
      raw = V::max_magnitude(raw, score);
      if (bias != nullptr) {
        const int64_t left = keys - j;
        score =
            V::add(score, left >= V::kWidth ? V::load(bias + j) : V::load_first(bias + j, left));
        V::store(scores + j, score);
        biased = V::max_magnitude(biased, score);
      }
      most = V::max(most, score);
    }
    const float new_largest = V::largest_lane(most);
    const bool is_infinite = new_largest > std::numeric_limits<float>::max();
    if (V::largest(raw) >= kInfinityBits || V::largest(biased) > kInfinityBits || is_infinite) {
      return poison(scores, keys, weight);
    }
    if (new_largest <= kLowest) {  // every key so far is hidden
      for (int64_t j = 0; j < padded(keys, V::kWidth); ++j) scores[j] = 0.0f;
      return 1.0f;
    }
    const F shift = V::set(new_largest);
    F sum = V::set(0.0f);
    for (int64_t j = 0; j < keys; j += V::kWidth) {
      const F e = exponential<V>(V::sub(V::load(scores + j), shift));
      V::store(scores + j, e);
      sum = V::add(sum, e);
    }
    // lanes past the end added e^-87 each, nothing beside the 1 of the largest
    const float shrink = scalar_exponential(largest - new_largest);
    weight = weight * shrink + V::sum(sum);
    largest = new_largest;
    return shrink;
  }

  // Weights of 0 times values, in a row whose weight is NaN from now on.
  static float poison(float* scores, int64_t keys, float& weight) {
    for (int64_t j = 0; j < padded(keys, V::kWidth); ++j) scores[j] = 0.0f;
    weight = std::numeric_limits<float>::quiet_NaN();
    return weight;
  }

  static float scalar_exponential(float x) {
    return x < -87.0f ? 0.0f : V::first_lane(exponential<V>(V::set(x)));
  }

  // c[6][columns] (+)= a[6][depth] b[depth][columns]
  template <int64_t kTileVectors, bool kStartsAtZero>
  static void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                      int64_t depth, float* c, int64_t c_stride) {
    F acc[kRows][kTileVectors];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTileVectors; ++v) {
        acc[r][v] = kStartsAtZero ? V::set(0.0f) : V::load(c + r * c_stride + v * V::kWidth);
      }
    }
    for (int64_t k = 0; k < depth; ++k, b += b_stride) {
      F column[kTileVectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTileVectors; ++v) column[v] = V::load(b + v * V::kWidth);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        const F row = V::set(a[r * a_stride + k]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kTileVectors; ++v) {
          acc[r][v] = V::multiply_add(row, column[v], acc[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTileVectors; ++v) {
        V::store(c + r * c_stride + v * V::kWidth, acc[r][v]);
      }
    }
  }

  static const AttentionKernels& table(const char* name) {
    static const AttentionKernels kernels{name, scratch_floats, run};
    return kernels;
  }
};

}  // namespace
}  // namespace ptq4adm
