// SPDX-License-Identifier: Apache-2.0
// One element of the fused step. A is the accumulation type: float, or double for double data.
//
// Sums run in the order x, (uncond_m, cond_m, clipped x_0 term of m) for m = 0.., noise, each
// product rounded before it is added, as in msdda_fast/kernels/fused_step/_eager.py.
#pragma once

#include "msdda/philox.h"

namespace msdda {

// A zero coefficient masks its input: NaN and Inf there do not propagate.
template <class A>
MSDDA_HD A add_term(A total, A coefficient, A value) {
  return coefficient != A{0} ? total + coefficient * value : total;
}

// NaN stays NaN, as in torch.clamp
template <class A>
MSDDA_HD A clamp_symmetric(A value, A range) {
  const A low = value < -range ? -range : value;
  return low > range ? range : low;
}

// Smallest variance among the active objectives (weight != 0), folded over objectives.
template <class A>
MSDDA_HD A least_variance(A least, A variance, A weight) {
  return weight != A{0} && variance < least ? variance : least;
}

// w_i r_i with r_i = least / variance: 1 for the least itself, also where both are zero.
template <class A>
MSDDA_HD A scaled_weight(A least, A variance, A weight) {
  const A ratio = variance == least ? A{1} : least / variance;
  return weight != A{0} ? weight * ratio : A{0};
}

}  // namespace msdda
