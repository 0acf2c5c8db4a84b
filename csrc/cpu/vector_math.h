// Elementary functions of one vector, over the vector types of vector_scalar.h, vector_avx2.h and
// vector_avx512.h. Everything here has internal linkage: each instruction set's file compiles its
// own copy, so the linker can never put AVX code where the portable kernels call it.
//
// A vector type V has kWidth lanes and
//   load, load_first(p, n)     the lanes from n on are zero
//   store, store_first         store_int8, store_int8_first round to even
//   set, add, sub, mul, div, min, max, round, scale_by_power (x * 2^n, normal results only)
//   multiply_add, multiply_subtract (fused or not)
//   sum, largest_lane, first_lane
//   no_magnitude, max_magnitude, largest     running maximum of |x| as bits
#pragma once

#include <cstdint>

namespace ptq4adm {
namespace {

// 2^x for -126 < x < 127: 2^x = 2^n 2^f with n = rint(x). `exact_x(n)` is x - n, from x before it
// was rounded. The polynomial has a relative error of 1.1e-7 over |f| <= 1/2 (minimax, 2^0 = 1).
template <class V, class Fraction>
typename V::Float power_of_two(typename V::Float x, const Fraction& exact_x) {
  using F = typename V::Float;
  const F n = V::round(x);
  const F f = exact_x(n);
  F p = V::set(1.32647005e-3f);
  p = V::multiply_add(p, f, V::set(9.67153348e-3f));
  p = V::multiply_add(p, f, V::set(5.55073395e-2f));
  p = V::multiply_add(p, f, V::set(2.40222424e-1f));
  p = V::multiply_add(p, f, V::set(6.93147004e-1f));
  p = V::multiply_add(p, f, V::set(1.0f));
  return V::scale_by_power(p, n);
}

// e^x within 1e-6 of itself for -87 <= x <= 87; outside, the value at the bound.
template <class V>
typename V::Float exponential(typename V::Float x) {
  using F = typename V::Float;
  const F bounded = V::max(V::min(x, V::set(87.0f)), V::set(-87.0f));
  const F factor = V::set(1.44269504f);  // 1 / ln 2
  return power_of_two<V>(V::mul(bounded, factor),
                         [&](F n) { return V::multiply_subtract(bounded, factor, n); });
}

// silu(x) = x / (1 + e^-x), within 4e-7 + 1e-7 |x| of itself for |x| <= 86 (2e-8 |x| where products
// are fused). Beyond, e^-x stays at its bound: x, or less than 5e-38 |x|.
template <class V>
typename V::Float silu_of(typename V::Float x) {
  using F = typename V::Float;
  const F bounded = V::max(V::min(x, V::set(86.0f)), V::set(-86.0f));
  const F factor = V::set(-1.44269504f);  // -1 / ln 2
  const F power = power_of_two<V>(V::mul(bounded, factor),
                                  [&](F n) { return V::multiply_subtract(bounded, factor, n); });
  return V::div(x, V::add(V::set(1.0f), power));
}

// gelu(x) = x * (0.5 + x * P(x^2) / Q(x^2)), within 2e-7 |x| (3e-7 where products are not fused).
// The fraction is erf(x / sqrt 2) / 2x, fitted to 1.1e-8 over |x| <= 4 sqrt 2, where erf is 1 in
// float32. All coefficients are positive, so nothing cancels. Below -4 sqrt 2 the result is 0 but
// for rounding.
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
