// From the sums of a tile to stored results: equation (1) of params.h, gating, quantization.
//
// Results pass through shared memory: there four neighbours of a row meet in one thread, and the
// threads of a warp hold whole lines of every tensor of the result. A thread moves 16 bytes of
// float32, 8 of float16 and 4 of int8 at a time; a warp's accesses are without gaps whatever the
// dtype.

#pragma once

#include "fragments.h"
#include "params.h"

namespace ptq4adm {

constexpr int kGroup = 4;  // neighbouring channels that a thread finishes together

// The one scale, or the row of a table in use. A step outside the table cannot raise here: it gives
// NaN, which every later layer shows.
PTQ4ADM_DEVICE float uniform_scale(const Scale& scale, const int64_t* step) {
  if (scale.form == ScaleForm::kOne) return load(scale.values);
  if (scale.form != ScaleForm::kTable) return 1.0f;
  const int64_t row = load(step);
  return row >= 0 && row < scale.table_size ? load(scale.values + row) : nan_f32();
}

PTQ4ADM_DEVICE float float_bits(uint32_t bits) {
  union {
    uint32_t word;
    float value;
  } both;
  both.word = bits;
  return both.value;
}

PTQ4ADM_DEVICE uint32_t bits_of(float value) {
  union {
    float value;
    uint32_t word;
  } both;
  both.value = value;
  return both.word;
}

PTQ4ADM_DEVICE float float_of_half(uint32_t bits, Dtype dtype) {
  const uint16_t value = static_cast<uint16_t>(bits);
  return dtype == Dtype::kFloat16 ? float_from_half(value) : float_from_bfloat16(value);
}

PTQ4ADM_DEVICE uint16_t half_of_float(float value, Dtype dtype) {
  return dtype == Dtype::kFloat16 ? half_from_float(value) : bfloat16_from_float(value);
}

// Read `count` of four floats of any dtype; the others are left as they are.
PTQ4ADM_DEVICE void load_group(float (&y)[kGroup], const Term& term, int64_t offset, int count,
                               bool is_wide) {
  if (term.dtype == Dtype::kFloat32) {
    const float* values = static_cast<const float*>(term.values) + offset;
    if (is_wide) {
      const Bytes16 four = load_16(values);
      PTQ4ADM_UNROLL
      for (int i = 0; i < kGroup; ++i) y[i] = float_bits(four.word[i]);
      return;
    }
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) y[i] = load(values + i);
    }
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(term.values) + offset;
  if (is_wide) {
    const uint64_t four = load(reinterpret_cast<const uint64_t*>(values));
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      y[i] = float_of_half(static_cast<uint32_t>(four >> (16 * i)), term.dtype);
    }
    return;
  }
  PTQ4ADM_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) y[i] = float_of_half(load(values + i), term.dtype);
  }
}

// Write `count` of four 32-bit words of int32 or float32.
PTQ4ADM_DEVICE void store_words(void* out, int64_t offset, const Bytes16& words, int count,
                                bool is_wide) {
  uint32_t* values = static_cast<uint32_t*>(out) + offset;
  if (is_wide) {
    store_16(values, words);
    return;
  }
  PTQ4ADM_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) store(values + i, words.word[i]);
  }
}

PTQ4ADM_DEVICE void store_halves(void* out, int64_t offset, const float (&y)[kGroup], Dtype dtype,
                                 int count, bool is_wide) {
  uint16_t* values = static_cast<uint16_t*>(out) + offset;
  if (is_wide) {
    uint64_t four = 0;
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      four |= static_cast<uint64_t>(half_of_float(y[i], dtype)) << (16 * i);
    }
    store(reinterpret_cast<uint64_t*>(values), four);
    return;
  }
  PTQ4ADM_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) store(values + i, half_of_float(y[i], dtype));
  }
}

// clamp(rint(y * reciprocal), -127, 127); NaN becomes -127.
PTQ4ADM_DEVICE uint32_t quantize_byte(float y, float reciprocal) {
  float scaled = multiply_rn(y, reciprocal);
  scaled = scaled > -127.0f ? scaled : -127.0f;
  scaled = scaled < 127.0f ? scaled : 127.0f;
  return static_cast<uint32_t>(round_half_even(scaled)) & 0xffu;
}

PTQ4ADM_DEVICE void store_bytes(void* out, int64_t offset, const float (&y)[kGroup],
                                float reciprocal, int count, bool is_wide) {
  int8_t* values = static_cast<int8_t*>(out) + offset;
  if (is_wide) {
    uint32_t four = 0;
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) four |= quantize_byte(y[i], reciprocal) << (8 * i);
    store(reinterpret_cast<uint32_t*>(values), four);
    return;
  }
  PTQ4ADM_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) store(values + i, static_cast<int8_t>(quantize_byte(y[i], reciprocal)));
  }
}

// y = y * w_scale + bias (+ temb) (+ residual) of four neighbours: `channel` is the first.
PTQ4ADM_DEVICE void add_terms(float (&y)[kGroup], const Params& params, int row, int channel,
                              int count) {
  float value[kGroup] = {};
  const Term w_scale = {params.w_scale, Dtype::kFloat32};
  load_group(value, w_scale, channel, count, params.is_wide);
  PTQ4ADM_UNROLL
  for (int i = 0; i < kGroup; ++i) y[i] = multiply_rn(y[i], value[i]);
  // one loop, so that the code of every dtype is there once
  PTQ4ADM_ROLLED
  for (int which = 0; which < 3; ++which) {
    const Term term = which == 0 ? params.bias : which == 1 ? params.temb : params.residual;
    if (term.values == nullptr) continue;
    const int64_t line = which == 0 ? 0 : which == 1 ? row / params.rows_per_sample : row;
    load_group(value, term, line * params.N + channel, count, params.is_wide);
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) y[i] = add_rn(y[i], value[i]);
  }
}

// x * Phi(x), by the error function.
PTQ4ADM_DEVICE float gelu(float x) {
  return multiply_rn(multiply_rn(x, 0.5f), add_rn(1.0f, erf_f32(multiply_rn(x, 0.70710678f))));
}

// Finish four neighbours of a staged row and store them.
//
// `staged_row` and `group` (fours of result channels) count in the tile. `row` is of the product;
// outside 0 .. M - 1 nothing is stored. `kColumns` and `kShift` are those of stage_offset.
template <int kColumns, int kShift>
PTQ4ADM_DEVICE void finish_group(const Params& params, void* out, const char* results, int row,
                                 int staged_row, int first_column, int group, float reciprocal) {
  const bool is_gated = params.is_gated;
  const int channels = is_gated ? params.N / 2 : params.N;
  const int channel = (is_gated ? first_column / 2 : first_column) + group * kGroup;
  const int left = channels - channel;
  if (row < 0 || row >= params.M || left <= 0) return;
  const int count = left < kGroup ? left : kGroup;
  const int column = is_gated ? group / 4 * 32 + group % 4 * kGroup : group * kGroup;
  const int64_t offset = static_cast<int64_t>(row) * channels + channel;
  if (params.out_dtype == Dtype::kInt32) {
    store_words(out, offset, load_16(results + stage_offset(staged_row, column, kColumns, kShift)),
                count, params.is_wide);
    return;
  }
  float y[kGroup], gate[kGroup] = {};
  // the gates first, then their values, by the same code
  PTQ4ADM_ROLLED
  for (int side = is_gated ? 1 : 0; side >= 0; --side) {
    const Bytes16 words = load_16(
        results + stage_offset(staged_row, column + side * kUnitChannels, kColumns, kShift));
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) y[i] = float_bits(words.word[i]);
    add_terms(y, params, row, channel + side * channels, count);
    if (side == 1) {
      PTQ4ADM_UNROLL
      for (int i = 0; i < kGroup; ++i) gate[i] = gelu(y[i]);
    }
  }
  if (is_gated) {
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) y[i] = multiply_rn(y[i], gate[i]);
  }
  if (params.out_dtype == Dtype::kInt8) {
    store_bytes(out, offset, y, reciprocal, count, params.is_wide);
  } else if (params.out_dtype == Dtype::kFloat32) {
    Bytes16 words;
    PTQ4ADM_UNROLL
    for (int i = 0; i < kGroup; ++i) words.word[i] = bits_of(y[i]);
    store_words(out, offset, words, count, params.is_wide);
  } else {
    store_halves(out, offset, y, params.out_dtype, count, params.is_wide);
  }
}

}  // namespace ptq4adm
