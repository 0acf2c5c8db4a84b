// Which vector instructions a library really executes: looked at, not asked for.
//
// A timer of the process's CPU time interrupts whatever thread runs; the handler decodes the prefix
// of the instruction at the interrupted address. Libraries choose their kernels by cpuid, by
// environment variables or by neither, and compile at run time: this sees all of it.
#pragma once

#include <cstdint>

namespace ptq4adm {

// Numbers of samples by the instruction they met.
struct InstructionCounts {
  int64_t total;    // samples
  int64_t sse;      // legacy 128-bit integer (and double) vector instructions
  int64_t bits128;  // VEX or EVEX vector instructions by vector length
  int64_t bits256;
  int64_t bits512;
  int64_t evex;    // AVX-512 encodings of any length
  int64_t dpbusd;  // vpdpbusd(s), either encoding: VNNI
};

// Why sampling cannot run here, or null.
const char* sampler_missing();

// Starts counting from zero. Throws std::runtime_error if it cannot run here or runs already.
void sampler_start();

// Stops, gives the timer and the signal back, and returns the counts.
InstructionCounts sampler_stop();

}  // namespace ptq4adm
