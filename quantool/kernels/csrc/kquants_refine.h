// The default search of the K-quants: from ggml's blocks downhill, without losing what ggml was after.
//
// Two errors of a super-block count. E1 is ggml's own objective, whose weights favour large values; E2 is what a user
// measures: sum (x - x')^2, times the importance where there is one. With E1 = E2 = 1 for ggml's block, minimise
//
//     a E1 + b E2 = sum v (x - x')^2        first a = b = 1/2
//
// by turns: d (and dmin) by least squares for the integers and codes as they are, rounded to float16; then, for every
// group, its integer scale (and min) among the neighbours, with the codes rounded anew for each. After a round in which
// E1 has room to spare, a is halved, and doubled where it had none. What is kept is the block with the least E2 among
// those in which neither error is above ggml's; ggml's own, if there is no other.
//
// With an importance E1 alone is minimised, and the least E1 kept: its weights, importance * sqrt(sigma^2 + x^2), say
// better than E2's what a model loses (Q2_K on stories-4m: KL divergence 0.1257 by E1, 0.1292 by E2, 0.1276 by ggml).
//
// Here is what is done with one group; the loops over groups and rounds are in kquants.cpp and cuda/kquants.cuh.

#pragma once

#include "kquants_group.h"

namespace kquants {

constexpr int Rounds = 2;
constexpr float Margin = 0.9999f;  // "lower" by more than the rounding of the sums

// E1, E2 of a group, or of all of them
struct Errors {
  Float own, plain;

  QUANTOOL_DEVICE void add(Errors group) {
    own += group.own;
    plain += group.plain;
  }
};

// What a group needs of a grid: x ~ step * code - offset
struct Line {
  Float step, offset;
};

// Q2_K without importance: ggml sums magnitudes, weight[k] |e|.
template <class Type, bool Weighted>
constexpr bool Linear = Type::Absolute && !Weighted;

template <class Type>
QUANTOOL_DEVICE Line line_of(Float d, Float dmin, Float scale, Float min) {
  return {d * scale, Type::Signed ? splat(0.f) : dmin * min};
}

QUANTOOL_DEVICE Float inverse_of(Float step) { return select(step == 0.f, splat(0.f), 1.f / step); }

template <class Type>
QUANTOOL_DEVICE Float round_code(Float shifted, Float inverse) {
  return clamp(rint(shifted * inverse), splat(float(Type::Lowest)), splat(float(Type::Highest)));
}

// Both errors of a group with its `codes`, or null: those nearest to its weights.
template <class Type, bool Weighted>
QUANTOOL_DEVICE Errors group_errors(const Float* x, const Float* w, const Float* importance, const Float* codes,
                                    Line line) {
  Errors sum = {splat(0.f), splat(0.f)};
  const Float inverse = inverse_of(line.step);
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) {
    const Float code = codes ? codes[k] : round_code<Type>(x[k] + line.offset, inverse);
    const Float error = line.step * code - line.offset - x[k], square = error * error;
    sum.own += w[k] * (Linear<Type, Weighted> ? absolute(error) : square);
    sum.plain += Weighted ? importance[k] * square : square;
  }
  return sum;
}

// a and b of what is minimised; `bound` and `least` are for the errors of the next candidates.
template <bool Weighted>
struct Aims {
  Float own, plain, bound, least;

  QUANTOOL_DEVICE explicit Aims(Errors ggml) {
    own = select(ggml.own > 0.f, 0.5f / ggml.own, splat(0.f));
    plain = Weighted ? splat(0.f) : select(ggml.plain > 0.f, 0.5f / ggml.plain, splat(0.f));
    bound = Margin * (Weighted ? ggml.plain : ggml.own);
    least = Margin * (Weighted ? ggml.own : ggml.plain);
  }

  // Whether a block with these errors is the best so far.
  QUANTOOL_DEVICE Int better(Errors errors) {
    const Float aim = Weighted ? errors.own : errors.plain;
    const Int room = (Weighted ? errors.plain : errors.own) <= bound, result = room & (aim < least);
    least = select(result, aim, least);
    if (!Weighted) own *= select(room, splat(0.5f), splat(2.f));
    return result;
  }
};

// What each weight costs: cost[k] e^2, or cost[k] |e| + aims.plain e^2 where ggml sums magnitudes.
template <class Type, bool Weighted>
QUANTOOL_DEVICE void mix(const Float* w, const Aims<Weighted>& aims, Float* cost) {
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) {
    cost[k] = aims.own * w[k];
    if (!Linear<Type, Weighted> && !Weighted) cost[k] += aims.plain;
  }
}

// The sums of least squares for d and dmin: x ~ d (s l) - dmin m over the super-block.
struct Normal {
  Float ss, xs, sm, mm, xm;

  QUANTOOL_DEVICE void add(Normal group) {
    ss += group.ss;
    xs += group.xs;
    sm += group.sm;
    mm += group.mm;
    xm += group.xm;
  }
};

// Those of a group. A magnitude |e| counts as e^2 / (2 |e|).
template <class Type, bool Linear>
QUANTOOL_DEVICE Normal group_normal(const Float* x, const Float* cost, Float plain, Line line, Float s, Float m) {
  const Float zero = splat(0.f), inverse = inverse_of(line.step);
  Float w = zero, wx = zero, wl = zero, wll = zero, wxl = zero;
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) {
    const Float shifted = x[k] + line.offset, l = round_code<Type>(shifted, inverse);
    Float weight = cost[k];
    if (Linear) {
      const Float error = maximum(absolute(line.step * l - shifted), line.step * 0.05f);
      weight = plain + select(line.step == 0.f, zero, weight * 0.5f / error);
    }
    const Float product = weight * l;
    wll += product * l;
    wxl += product * x[k];
    if (Type::Signed) continue;
    w += weight;
    wx += weight * x[k];
    wl += product;
  }
  if (Type::Signed) return {s * s * wll, s * wxl, zero, zero, zero};
  return {s * s * wll, s * wxl, s * m * wl, m * m * w, m * wx};
}

// d and dmin for these sums, as float16; what they are where the sums do not say.
template <class Type>
QUANTOOL_DEVICE void refit(const Normal& n, Float& d, Float& dmin) {
  if (Type::Signed) {
    const Float fit = n.xs / n.ss;
    d = select((fit > 0.f) | (fit < 0.f), finite_half(fit), d);
    return;
  }
  const Float determinant = n.ss * n.mm - n.sm * n.sm;
  const Float fit = (n.xs * n.mm - n.sm * n.xm) / determinant, fit_min = (n.sm * n.xs - n.ss * n.xm) / determinant;
  const Int valid = (determinant > 0.f) & (fit > 0.f) & (fit_min >= 0.f);
  d = select(valid, finite_half(fit), d);
  dmin = select(valid, finite_half(fit_min), dmin);
}

// The cost of a group for a step and an offset, its codes rounded for them.
template <class Type, bool Linear>
QUANTOOL_DEVICE Float group_cost(const Float* x, const Float* w, Float plain, Float step, Float inverse, Float offset) {
  Float cost = splat(0.f);
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) {
    const Float shifted = Type::Signed ? x[k] : x[k] + offset;
    const Float error = step * round_code<Type>(shifted, inverse) - shifted;
    if (Linear)
      cost += (plain * absolute(error) + w[k]) * absolute(error);
    else
      cost += w[k] * (error * error);
  }
  return cost;
}

// The best of the integers near those of a group. Scale and min mostly move together: both widen the range.
template <class Type, bool Weighted>
QUANTOOL_DEVICE void move_group(const Float* x, const Float* cost, Float plain, Float d, Float dmin, Float& scale,
                                Float& min) {
  constexpr int Reach = Weighted ? Type::WeightedReach : Type::Reach, Slack = Type::Signed ? 0 : 1;
  const Float first_scale = scale, first_min = min;
  Float least = splat(0.f);
  const auto try_scale = [&](Float s, int first, int last, bool start) {
    s = clamp(s, splat(float(Type::LowestScale)), splat(float(Type::HighestScale)));
    const Float step = d * s, inverse = inverse_of(step);
#pragma unroll 1
    for (int change = first; change <= last; ++change) {
      const Float m = clamp(first_min + splat(float(change)), splat(0.f), splat(float(Type::HighestScale)));
      const Float found = group_cost<Type, Linear<Type, Weighted>>(x, cost, plain, step, inverse, dmin * m);
      const Int better = start ? splat(-1) : found < least;
      least = select(better, found, least);
      scale = select(better, s, scale);
      if (!Type::Signed) min = select(better, m, min);
    }
  };
  try_scale(first_scale, 0, 0, true);
  if (Type::Coarse && Weighted) try_scale(-first_scale, 0, 0, false);  // of 8 levels, 4 are below zero and 3 above
#pragma unroll 1
  for (int change = -Reach; change <= Reach; ++change)
    try_scale(first_scale + splat(float(change)), change - Slack, change + Slack, false);
}

// The codes nearest to the weights.
template <class Type>
QUANTOOL_DEVICE void round_again(const Float* x, Line line, Float* codes) {
  const Float inverse = inverse_of(line.step);
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) codes[k] = round_code<Type>(x[k] + line.offset, inverse);
}

}  // namespace kquants
