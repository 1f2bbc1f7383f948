// IQ4_NL, IQ4_XS: the searches of formats/ggml/iq4.py for the (super-)block of every lane, bit for bit.
//
// A super-block has 8 groups of 32 weights. A lane of the CPU has all of them; on CUDA 8 threads have one each, do the
// same for it and exchange what concerns the whole. A `Spread` says so:
//
//     All, Here     the number of groups, and of those that this lane has
//     own(g)        which of these group g is; the only one, where there is one
//     of(g, v)      v of the lane that has group g
//
// A sum over groups is the same chain of additions on both: for g: sum += of(g, mine[own(g)]).

#pragma once

#include "ggml_line.h"

namespace line {

constexpr int Groups = 8, Tries = 7, TopCount = 18;
QUANTOOL_TABLE float Levels[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
QUANTOOL_TABLE float Tops[] = {-141, -137, -133, -129, -125, -121, -117, -113, -109,
                               93,   97,   101,  105,  109,  113,  117,  121,  125};  // half of them negative
QUANTOOL_TABLE float Divisors[] = {-32, -31, -30, -29, -28, 31, 30, 29, 28};  // integers that the largest scale becomes
constexpr float Blend = 0.5f;

template <int Count>
struct Whole {  // a lane has all groups
  static constexpr int All = Count, Here = Count;
  static QUANTOOL_DEVICE int own(int g) { return g; }
  template <class Value>
  static QUANTOOL_DEVICE Value of(int, Value v) {
    return v;
  }
};

struct Iq4 {
  // The code of the nearest level, of the upper one of two, and the level.
  static QUANTOOL_DEVICE Float code(Float v) {
    Float code = splat(0.f);
#pragma unroll
    for (int i = 0; i < 15; ++i) code = lanes::select(v >= (Levels[i] + Levels[i + 1]) / 2, splat(i + 1.f), code);
    return code;
  }
  static QUANTOOL_DEVICE Float nearest(Float v) {
    Float level = splat(Levels[0]);
#pragma unroll
    for (int i = 0; i < 15; ++i)
      level = lanes::select(v >= (Levels[i] + Levels[i + 1]) / 2, splat(Levels[i + 1]), level);
    return level;
  }
};

template <class Spread>
struct Weights {
  Float x[Spread::Here][Block], users[Spread::Here][Block], objective[Spread::Here][Block];
};

template <class Spread>
QUANTOOL_DEVICE Float sum_over_groups(const Float* mine) {
  Float sum = splat(0.f);
#pragma unroll
  for (int g = 0; g < Spread::All; ++g) sum += Spread::of(g, mine[Spread::own(g)]);
  return sum;
}

// What the error of each weight counts, `users` having been loaded where there is an importance.
template <class Spread, bool Weighted, bool Exact>
QUANTOOL_DEVICE void weigh(Weights<Spread>& w) {
  if constexpr (!Weighted) {
#pragma unroll
    for (int g = 0; g < Spread::Here; ++g)
#pragma unroll
      for (int k = 0; k < Block; ++k) {
        w.users[g][k] = splat(1.f);
        w.objective[g][k] = w.x[g][k] * w.x[g][k];
      }
    return;
  }
  if constexpr (!Exact) {
    Int none = splat(-1);
#pragma unroll
    for (int g = 0; g < Spread::All; ++g) none &= Spread::of(g, without(w.users[Spread::own(g)]));
#pragma unroll
    for (int g = 0; g < Spread::Here; ++g) count_evenly(none, w.users[g]);
  }
  Float sum = splat(0.f);
#pragma unroll
  for (int g = 0; g < Spread::All; ++g) {
    const Float* x = w.x[Spread::own(g)];
    Float more = sum;
#pragma unroll
    for (int k = 0; k < Block; ++k) more += x[k] * x[k];
    sum = Spread::of(g, more);
  }
  sum *= 2.f / (Spread::All * Block);
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) set_objective<Exact>(w.x[g], w.users[g], sum, w.objective[g]);
}

// ggml's scale of least error under `objective`; NaN where it has no weight.
QUANTOOL_DEVICE Float fit_scale(const Float* x, const Float* objective) {
  const Float top = signed_max<Block>(x);
  const View<1> v{x, {objective}};
  Float scale = {}, best = {};
  for (int n = 0; n < 2 * Tries + 2; ++n) {
    const Float inverse = n == 0 ? 1.f / (-top / splat(Levels[0])) : splat(n - 1 - Tries + Levels[0]) / top;
    StepSums<1> s;
#pragma unroll
    for (int k = 0; k < Block; ++k) s.add(v, k, Iq4::nearest(inverse * x[k]));
    const Float fitted = s.a[0] / s.b[0];
    const Int better = n == 0 ? splat(-1) : (s.b[0] > 0.f) & (s.a[0] * s.a[0] > best * s.b[0]);
    scale = n == 0 ? fitted : lanes::select(better, fitted, scale);
    best = n == 0 ? scale * s.a[0] : lanes::select(better, scale * s.a[0], best);
  }
  return lanes::select(absolute(top) < GroupMaxEps, splat(0.f), scale);
}

// The 16 bytes of 32 codes.
QUANTOOL_DEVICE void pack_levels(const Float* x, Float step, Int* words) {
  const Float inverse = reciprocal(step);
  Float code[Block];
#pragma unroll
  for (int k = 0; k < Block; ++k) code[k] = Iq4::code(x[k] * inverse);
  pack_nibbles(code, words);
}

// --- IQ4_NL ---------------------------------------------------------------------------------------------------------

template <bool Weighted, bool Exact>
QUANTOOL_DEVICE Float find_step(const Weights<Whole<1>>& w) {
  const Float *x = w.x[0], *users = w.users[0], *objective = w.objective[0];
  Float d = fit_scale(x, objective);
  d = lanes::select(d == d, d, splat(0.f));
  if constexpr (Exact) return d;
  const View<2> v{x, {Weighted ? users : objective, Weighted ? objective : users}};
  return refine<Iq4>(v, half(d), signed_max<Block>(x), Tops, 2);
}

// --- IQ4_XS ---------------------------------------------------------------------------------------------------------

// d and the integers in front of it; codes are the nearest.
template <class Spread>
struct Scales {
  Float d, integer[Spread::Here];
};

struct Errors {
  Float objective, users;
};

template <class Spread>
QUANTOOL_DEVICE Errors errors_of(const Weights<Spread>& w, const Scales<Spread>& s) {
  Float objective[Spread::Here], users[Spread::Here];
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) {
    Float errors[2];
    line_errors<Iq4>(View<2>{w.x[g], {w.objective[g], w.users[g]}}, s.d * s.integer[g], errors);
    objective[g] = errors[0];
    users[g] = errors[1];
  }
  return {sum_over_groups<Spread>(objective), sum_over_groups<Spread>(users)};
}

// Both errors in one, in shares of what they were.
struct Mixed {
  static constexpr int Count = 1;
  const Float *x, *objective, *users;
  Float share, rest;

  QUANTOOL_DEVICE Float weighed(int, int k, Float value) const {
    return (objective[k] * share + users[k] * rest) * value;
  }
};

// The step of most gain in each group, with the largest weight near the first or near the last level.
template <class Spread>
QUANTOOL_DEVICE void best_steps(const Mixed* views, Float (*steps)[2]) {
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) {
    const Mixed& v = views[g];
    const Float scale = reciprocal(signed_max<Block>(v.x));
    Float gain;
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Float best = {}, found = {};
      for (int i = 0; i < TopCount / 2; ++i) {
        const Float inverse = scale * Tops[sign * TopCount / 2 + i];
        StepSums<1> sums;
#pragma unroll
        for (int k = 0; k < Block; ++k) sums.add(v, k, Iq4::nearest(v.x[k] * inverse));
        const Float step = fit_step(sums, Float{}, Float{}, gain);
        const Int better = gain > best;
        best = lanes::select(better, gain, best);
        found = lanes::select(better, step, found);
      }
      steps[g][sign] = found;
    }
  }
}

// For each group the integer of least error among those nearest to its two steps.
template <class Spread>
QUANTOOL_DEVICE void nearest_integers(const Mixed* views, const Float (*steps)[2], Scales<Spread>& s) {
  const Float inverse = reciprocal(s.d);
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) {
    const Mixed& v = views[g];
    Float best = splat(__builtin_inff()), found = {}, error;
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      const Float integer = clamp(rint(steps[g][sign] * inverse), splat(-32.f), splat(31.f));
      line_errors<Iq4>(v, s.d * integer, &error);
      const Int better = error < best;
      best = lanes::select(better, error, best);
      found = lanes::select(better, integer, found);
    }
    s.integer[g] = found;
  }
}

// The best d for the integers and codes of `s`.
template <class Spread>
QUANTOOL_DEVICE Float refit(const Mixed* views, const Scales<Spread>& s) {
  Float a[Spread::Here], b[Spread::Here];
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) {
    const Mixed& v = views[g];
    const Float inverse = reciprocal(s.d * s.integer[g]);
    StepSums<1> sums;
#pragma unroll
    for (int k = 0; k < Block; ++k) sums.add(v, k, Iq4::nearest(v.x[k] * inverse));
    a[g] = s.integer[g] * sums.a[0];
    b[g] = s.integer[g] * (s.integer[g] * sums.b[0]);
  }
  return half(sum_over_groups<Spread>(a) * reciprocal(sum_over_groups<Spread>(b)));
}

template <class Spread>
QUANTOOL_DEVICE void improve(const Weights<Spread>& w, Float largest, Scales<Spread>& s) {
  const Errors limit = errors_of(w, s);
  const Float share = reciprocal(limit.objective) * Blend, rest = reciprocal(limit.users);
  Mixed views[Spread::Here];
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) views[g] = {w.x[g], w.objective[g], w.users[g], share, rest};
  Float steps[Spread::Here][2], best = limit.users;
  best_steps<Spread>(views, steps);
  for (float divisor : Divisors) {
    Scales<Spread> fresh;
    fresh.d = half(largest / splat(divisor));
    nearest_integers(views, steps, fresh);
    for (int i = 0; i < 2; ++i) {
      if (i) fresh.d = refit(views, fresh);
      const Errors errors = errors_of(w, fresh);
      const Int better = (errors.objective <= limit.objective) & (errors.users < best);
      best = lanes::select(better, errors.users, best);
      s.d = lanes::select(better, fresh.d, s.d);
#pragma unroll
      for (int g = 0; g < Spread::Here; ++g) s.integer[g] = lanes::select(better, fresh.integer[g], s.integer[g]);
    }
  }
}

template <class Spread, bool Exact>
QUANTOOL_DEVICE Scales<Spread> find_scales(const Weights<Spread>& w) {
  Float scales[Spread::Here], most = splat(0.f), largest = splat(0.f);
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g) scales[g] = fit_scale(w.x[g], w.objective[g]);
#pragma unroll
  for (int g = 0; g < Spread::All; ++g) {
    const Float scale = Spread::of(g, scales[Spread::own(g)]);
    const Int larger = absolute(scale) > most;
    most = lanes::select(larger, absolute(scale), most);
    largest = lanes::select(larger, scale, largest);
  }
  Scales<Spread> s;
  s.d = -largest / splat(32.f);
  const Float inverse = reciprocal(s.d);
#pragma unroll
  for (int g = 0; g < Spread::Here; ++g)
    s.integer[g] = to_float(clamp(nearest(inverse * scales[g]), splat(-32), splat(31)));
  if constexpr (!Exact) {
    s.d = half(s.d);
    improve(w, largest, s);
  }
  return s;
}

// The integers as they are stored, from 0 on: their low 4 bits, and their high 2.
template <class Spread>
QUANTOOL_DEVICE void pack_integers(const Scales<Spread>& s, Int& low, Int& high) {
  low = high = splat(0);
#pragma unroll
  for (int g = 0; g < Spread::All; ++g) {
    const Int integer = truncate(Spread::of(g, s.integer[Spread::own(g)])) + 32;
    low |= (integer & 15) << (4 * g);
    high |= (integer >> 4) << (2 * g);
  }
}

}  // namespace line
