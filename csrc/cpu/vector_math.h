// Elementary functions of one vector, over the vector types of vector_scalar.h, vector_avx2.h and
// vector_avx512.h. Everything here has internal linkage: each instruction set's file compiles its own
// copy, so the linker can never put AVX code where the portable kernels call it.
//
// A vector type V has kWidth lanes and
//   load, load_first(p, n)     the lanes from n on are zero
//   store, store_first         store_int8, store_int8_first round to even
//   set, add, sub, mul, div, min, max, multiply_add (fused or not), round, scale_by_power (x * 2^n)
//   sum, largest_lane, first_lane
//   no_magnitude, max_magnitude, largest     running maximum of |x| as bits
#pragma once

#include <cstdint>

namespace ptq4adm {
namespace {

// e^x within 1e-7 of itself for -87 <= x <= 88; outside, the value at the bound. x = n ln2 + r with
// |r| <= ln2 / 2; the high part of ln2 has 10 bits, so n * high is exact even without a fused
// product. Coefficients: least squares for the relative error over r, refined to its minimax (3e-9).
template <class V>
typename V::Float exponential(typename V::Float x) {
  using F = typename V::Float;
  x = V::max(V::min(x, V::set(88.0f)), V::set(-87.0f));
  const F n = V::round(V::mul(x, V::set(1.44269504f)));
  F r = V::multiply_add(n, V::set(-0.693359375f), x);
  r = V::multiply_add(n, V::set(2.12194440e-4f), r);
  F p = V::set(1.3814467e-3f);
  p = V::multiply_add(p, r, V::set(8.3687808e-3f));
  p = V::multiply_add(p, r, V::set(4.1668393e-2f));
  p = V::multiply_add(p, r, V::set(1.66665196e-1f));
  p = V::multiply_add(p, r, V::set(4.9999994e-1f));
  p = V::add(V::multiply_add(V::mul(p, r), r, r), V::set(1.0f));
  return V::scale_by_power(p, n);
}

template <class V>
typename V::Float silu_of(typename V::Float x) {
  const typename V::Float negative = V::sub(V::set(0.0f), x);
  return V::div(x, V::add(V::set(1.0f), exponential<V>(negative)));
}

// gelu(x) = x * (0.5 + x * P(x^2) / Q(x^2)), within 2e-7 |x|. The fraction is erf(x / sqrt 2) / 2x,
// fitted to 1.1e-8 over |x| <= 4 sqrt 2, where erf is 1 in float32. All coefficients are positive,
// so nothing cancels. Below -4 sqrt 2 the result is 0 but for rounding.
template <class V>
typename V::Float gelu_of(typename V::Float x) {
  using F = typename V::Float;
  const F bound = V::set(5.656854f);
  const F above = V::max(x, V::set(-5.656854f));
  const F inner = V::min(above, bound);
  const F u = V::mul(inner, inner);
  F p = V::set(2.1818982e-8f);
  p = V::multiply_add(p, u, V::set(6.3649018e-6f));
  p = V::multiply_add(p, u, V::set(1.7693924e-4f));
  p = V::multiply_add(p, u, V::set(4.7259107e-3f));
  p = V::multiply_add(p, u, V::set(3.46923694e-2f));
  p = V::multiply_add(p, u, V::set(3.98942202e-1f));
  F q = V::set(1.17127865e-6f);
  q = V::multiply_add(q, u, V::set(7.6023040e-5f));
  q = V::multiply_add(q, u, V::set(1.93056045e-3f));
  q = V::multiply_add(q, u, V::set(2.91191787e-2f));
  q = V::multiply_add(q, u, V::set(2.53626436e-1f));
  q = V::multiply_add(q, u, V::set(1.0f));
  const F cumulative = V::multiply_add(inner, V::div(p, q), V::set(0.5f));
  return V::mul(above, cumulative);
}

}  // namespace
}  // namespace ptq4adm
