// Ceilings of this machine: the rate of one instruction chain, or of copying memory, measured.
//
// A chain works on registers only: twelve independent accumulators hide the latency, no load or
// store interferes. Operations are counted as in 2 * M * N * K: a multiply and an add are two.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptq4adm {

// Names that `measure_peak` knows, whether this processor runs them or not:
//   fma_avx2, fma_avx512       float32 multiply-add                                    GFLOP/s
//   maddubs_avx2               vpmaddubsw and vpaddw: int8 products, int16 sums        GOP/s
//   maddubs_avx512             the same with 512 bits                                  GOP/s
//   dpbusd_256, dpbusd_512     vpdpbusd: int8 products, int32 sums (AVX-512 VNNI)      GOP/s
//   copy                       memcpy of buffers beyond the last cache, read + written GB/s
std::vector<std::string> peak_kinds();

// Why a kind cannot run on this processor, or an empty string. Throws std::invalid_argument for an
// unknown kind.
std::string peak_missing(const std::string& kind);

// Rate of a kind on `threads` threads for about `milliseconds`, in 10^9 a second. Throws
// std::invalid_argument for an unknown kind and std::runtime_error for one that cannot run here.
double measure_peak(const std::string& kind, double milliseconds, int64_t threads);

}  // namespace ptq4adm
