// Chooses between float loops of three vector widths, by cpuid or by a matrix product's isa name.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "kernels.h"

namespace ptq4adm {

// avx512_vnni runs the AVX-512 table and avx_vnni the AVX2 one; a table is null where its file was
// not compiled for the instruction set. Throws like select_kernels.
template <class Table>
const Table& select_vector_kernels(const std::string& wanted, const Table& scalar,
                                   const Table* avx2, const Table* avx512) {
  const std::string isa = wanted == "auto" ? auto_isa() : wanted;
  const Table* wide = has_avx512() ? avx512 : nullptr;
  const Table* narrow = has_avx2() ? avx2 : nullptr;
  if (isa == "auto") return wide != nullptr ? *wide : narrow != nullptr ? *narrow : scalar;
  const bool is_emulated = isa.rfind("emulated_", 0) == 0;  // only test builds get this far with it
  if (isa == "scalar" || is_emulated) return scalar;
  if (isa != "avx512_vnni" && isa != "avx_vnni" && isa != "avx2") {
    throw std::invalid_argument("isa '" + isa +
                                "' is unknown; use auto, avx512_vnni, avx_vnni, "
                                "avx2 or scalar");
  }
  const Table* chosen = isa == "avx512_vnni" ? wide : narrow;
  if (chosen == nullptr) {
    throw std::runtime_error("isa '" + isa +
                             "' is not available on this processor or in this "
                             "build; use isa='auto'");
  }
  return *chosen;
}

}  // namespace ptq4adm
