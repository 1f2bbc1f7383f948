// The line of values of 32 weights, W ~ d level(code) or d code + m: formats/ggml/line_search.py, compiled.
//
// What is computed, and why, is said there; here every lane of a vector is a block (lanes.h), and each lane does the
// operations of that file in their order, so that the bits are the same. On CUDA a lane is a thread, whose block stays
// in registers: there every loop over its weights has to be unrolled.

#pragma once

#include <type_traits>

#include "lanes.h"

#if defined(__CUDACC__)
#define QUANTOOL_TABLE __constant__ constexpr  // read by a number that is not known when compiling
#else
#define QUANTOOL_TABLE constexpr
#endif

namespace line {

using namespace lanes;

constexpr int Block = 32;
constexpr float HalfMax = 65504.f, Tiny = 1e-30f, Huge = 1e30f, GroupMaxEps = 1e-15f;

QUANTOOL_DEVICE Float reciprocal(Float v) { return select(absolute(v) < Tiny, splat(0.f), 1.f / v); }
QUANTOOL_DEVICE Float half(Float v) { return round_to_half(clamp(v, splat(-HalfMax), splat(HalfMax))); }
QUANTOOL_DEVICE Int finite(Float v) { return absolute(v) < __builtin_inff(); }

template <int Low, int High>
struct Symmetric {
  static QUANTOOL_DEVICE Float nearest(Float v) { return clamp(rint(v), splat(float(Low)), splat(float(High))); }
};

// What a search sees of a block: its weights and what the error of each counts. Metrics 0: all the same; 1: by the
// user's importance; 2: by ggml's objective as well, which comes first.
template <int Metrics>
struct View {
  static constexpr int Count = Metrics == 2 ? 2 : 1, Last = Count - 1;
  const Float* x;
  const Float* weight[2];

  QUANTOOL_DEVICE Float weighed(int metric, int k, Float value) const {
    return Metrics == 0 ? value : weight[metric][k] * value;
  }
};

// --- one step per block ---------------------------------------------------------------------------------------------

template <int Metrics>
struct StepSums {
  Float a[2] = {}, b[2] = {};

  template <class View>
  QUANTOOL_DEVICE void add(const View& v, int k, Float q) {
#pragma unroll
    for (int m = 0; m < View::Count; ++m) {
      const Float wq = v.weighed(m, k, q);
      a[m] += wq * v.x[k];
      b[m] += wq * q;
    }
  }
};

// The best step for these sums and what it gains, kept where ggml's objective is within `limit`.
template <int Metrics>
QUANTOOL_DEVICE Float fit_step(const StepSums<Metrics>& s, Float square, Float limit, Float& gain) {
  constexpr int Last = View<Metrics>::Last;
  Float step = s.a[Last] / s.b[Last];
  if (Metrics < 2) {
    gain = s.a[Last] * step;
    return step;
  }
  const Float middle = s.a[0] / s.b[0];
  const Float reach = lanes::sqrt((limit - (square - s.a[0] * middle)) / s.b[0]);
  step = select(step > middle + reach, middle + reach, step);
  step = select(step < middle - reach, middle - reach, step);
  step = select(reach == reach, step, reach);
  gain = step * (s.a[Last] + s.a[Last] - step * s.b[Last]);
  return step;
}

template <class Level, class View>
QUANTOOL_DEVICE void line_errors(const View& v, Float step, Float* errors) {
  const Float inverse = reciprocal(step);
  Float sum[2] = {};
#pragma unroll
  for (int k = 0; k < Block; ++k) {
    const Float difference = v.x[k] - step * Level::nearest(v.x[k] * inverse);
#pragma unroll
    for (int m = 0; m < View::Count; ++m) sum[m] += v.weighed(m, k, difference * difference);
  }
#pragma unroll
  for (int m = 0; m < View::Count; ++m) errors[m] = sum[m];
}

// A stored step whose error with the nearest codes is at most that of `step`, under each of the weights.
template <class Level, int Metrics, int Tops>
QUANTOOL_DEVICE Float refine(const View<Metrics>& v, Float step, Float max, const float (&tops)[Tops], int rounds) {
  constexpr int Last = View<Metrics>::Last;
  Float errors[2], fresh[2], square = {};
  line_errors<Level>(v, step, errors);
  const Float limit = errors[0];
  if (Metrics == 2)
#pragma unroll
    for (int k = 0; k < Block; ++k) square += v.weighed(0, k, v.x[k]) * v.x[k];
  const Float scale = reciprocal(max);
  Float best = {}, found = step, gain;
  constexpr int Together = Metrics == 2 ? 1 : 2;  // candidates in flight at once
  static_assert(Tops % Together == 0);
  for (int t = 0; t < Tops; t += Together) {
    StepSums<Metrics> sums[Together];
    Float inverse[Together];
#pragma unroll
    for (int c = 0; c < Together; ++c) inverse[c] = scale * tops[t + c];
#pragma unroll
    for (int k = 0; k < Block; ++k)
#pragma unroll
      for (int c = 0; c < Together; ++c) sums[c].add(v, k, Level::nearest(v.x[k] * inverse[c]));
#pragma unroll
    for (int c = 0; c < Together; ++c) {
      const Float candidate = fit_step(sums[c], square, limit, gain);
      const Int better = gain > best;
      best = select(better, gain, best);
      found = select(better, candidate, found);
    }
  }
  for (int i = 0; i < rounds; ++i) {
    if (i) {
      const Float inverse = reciprocal(found);
      StepSums<Metrics> sums;
#pragma unroll
      for (int k = 0; k < Block; ++k) sums.add(v, k, Level::nearest(v.x[k] * inverse));
      found = fit_step(sums, square, limit, gain);
    }
    found = half(select(found == found, found, step));
    line_errors<Level>(v, found, fresh);
    Int better = fresh[Last] < errors[Last];
    if (Metrics == 2) better &= fresh[0] <= limit;
    step = select(better, found, step);
    errors[Last] = select(better, fresh[Last], errors[Last]);
  }
  return step;
}

// --- a step and a minimum per block ---------------------------------------------------------------------------------

struct Line {
  Float step, low;
};

QUANTOOL_DEVICE Line select(Int mask, Line yes, Line no) {
  return {lanes::select(mask, yes.step, no.step), lanes::select(mask, yes.low, no.low)};
}

struct LineSums {
  Float w = {}, wy = {}, wq = {}, wqq = {}, wqy = {};

  QUANTOOL_DEVICE void add(Float weighed_q, Float q, Float y) {
    wq += weighed_q;
    wqq += weighed_q * q;
    wqy += weighed_q * y;
  }
  QUANTOOL_DEVICE void include(const LineSums& totals) {
    w = totals.w;
    wy = totals.wy;
  }
  QUANTOOL_DEVICE Line solve() const {
    const Float determinant = w * wqq - wq * wq;
    return {(w * wqy - wy * wq) / determinant, (wqq * wy - wq * wqy) / determinant};
  }
  QUANTOOL_DEVICE Float explained(Line l) const {
    return l.step * (wqy + wqy - l.step * wqq) + l.low * (wy + wy - l.low * w - (l.step + l.step) * wq);
  }
  QUANTOOL_DEVICE LineSums plus(Float factor, const LineSums& o) const {
    return {w + factor * o.w, wy + factor * o.wy, wq + factor * o.wq, wqq + factor * o.wqq, wqy + factor * o.wqy};
  }
};

QUANTOOL_TABLE float Blends[] = {0.f, 0.25f, 1.f, 4.f};  // how much ggml's objective counts in a fit beside the user's

template <int Metrics>
QUANTOOL_DEVICE Line fit_affine(const LineSums* sums, Float room, Float& best) {
  if (Metrics < 2) {
    const Line l = sums[0].solve();
    best = sums[0].explained(l);
    return l;
  }
  const Float unit = sums[1].w / sums[0].w;
  best = splat(0.f);
  Line found = {splat(0.f), splat(0.f)};
  for (float blend : Blends) {
    const Line l = sums[1].plus(unit * blend, sums[0]).solve();
    const Float gain = sums[1].explained(l);
    const Int better = (gain > best) & (sums[0].explained(l) >= room);
    best = lanes::select(better, gain, best);
    found = select(better, l, found);
  }
  return found;
}

template <int MaxCode>
QUANTOOL_DEVICE Float affine_code(Float v) { return clamp(rint(v), splat(0.f), splat(float(MaxCode))); }

// The codes nearest to a line, and their errors.
template <int MaxCode, int Metrics>
QUANTOOL_DEVICE void affine_errors(const View<Metrics>& v, Line l, Float* code, Float* errors) {
  const Float inverse = reciprocal(l.step);
  Float sum[2] = {};
#pragma unroll
  for (int k = 0; k < Block; ++k) {
    const Float above = v.x[k] - l.low;
    code[k] = affine_code<MaxCode>(above * inverse);
    const Float difference = above - l.step * code[k];
#pragma unroll
    for (int m = 0; m < View<Metrics>::Count; ++m) sum[m] += v.weighed(m, k, difference * difference);
  }
#pragma unroll
  for (int m = 0; m < View<Metrics>::Count; ++m) errors[m] = sum[m];
}

// A candidate sends the smallest weight to `first` and the largest to max_code + `second`, both less than a half away,
// so that no code is out of range.
struct Shift {
  float first, second;
};

// A stored line whose error with the nearest codes is at most that of `l`, under each of the weights; and those codes.
template <int MaxCode, int Metrics, int Shifts>
QUANTOOL_DEVICE Line refine_affine(const View<Metrics>& v, Line l, Float low, Float high, const Shift (&shifts)[Shifts],
                          Float* code) {
  constexpr int Count = View<Metrics>::Count, Last = View<Metrics>::Last;
  LineSums totals[2], sums[2];
  Float errors[2] = {}, square = {}, y[Block];
  const Float inverse = reciprocal(l.step);
#pragma unroll
  for (int k = 0; k < Block; ++k) {
    y[k] = v.x[k] - low;
    const Float above = v.x[k] - l.low, q = affine_code<MaxCode>(above * inverse), difference = above - l.step * q;
#pragma unroll
    for (int m = 0; m < Count; ++m) {
      const Float wy = v.weighed(m, k, y[k]);
      errors[m] += v.weighed(m, k, difference * difference);
      totals[m].wy += wy;
      if (Metrics > 0) totals[m].w += v.weight[m][k];
      if (Metrics == 2 && m == 0) square += wy * y[k];
      sums[m].add(v.weighed(m, k, q), q, y[k]);
    }
  }
  if (Metrics == 0) totals[0].w = splat(float(Block));
  const Float room = square - errors[0];
#pragma unroll
  for (int m = 0; m < Count; ++m) sums[m].include(totals[m]);
  Float best, gain;
  Line found = fit_affine<Metrics>(sums, room, best);
  const Float scale = reciprocal(high - low);
  constexpr int Together = Metrics == 2 ? 1 : 2;  // candidates in flight at once
  static_assert(Shifts % Together == 0);
  for (int s = 0; s < Shifts; s += Together) {
    LineSums of[Together][2];
    Float factor[Together];
#pragma unroll
    for (int c = 0; c < Together; ++c) factor[c] = scale * (MaxCode + shifts[s + c].second - shifts[s + c].first);
#pragma unroll
    for (int k = 0; k < Block; ++k)
#pragma unroll
      for (int c = 0; c < Together; ++c) {
        const Float q = rint(y[k] * factor[c] + shifts[s + c].first);
#pragma unroll
        for (int m = 0; m < Count; ++m) of[c][m].add(v.weighed(m, k, q), q, y[k]);
      }
#pragma unroll
    for (int c = 0; c < Together; ++c) {
#pragma unroll
      for (int m = 0; m < Count; ++m) of[c][m].include(totals[m]);
      const Line candidate = fit_affine<Metrics>(of[c], room, gain);
      const Int better = gain > best;
      best = lanes::select(better, gain, best);
      found = select(better, candidate, found);
    }
  }
  const Line stored = {half(found.step), half(low + found.low)};
  Float fresh[2];
  affine_errors<MaxCode>(v, stored, code, fresh);
  Int better = fresh[Last] < errors[Last];
  if (Metrics == 2) better &= fresh[0] <= errors[0];
  l = select(better, stored, l);
  if (any(~better)) affine_errors<MaxCode>(v, l, code, fresh);
  return l;
}

// --- blocks ---------------------------------------------------------------------------------------------------------

// A unit without any importance would leave every code open: there all columns count the same.
QUANTOOL_DEVICE Int without(const Float* importance) {
  Int none = splat(-1);
#pragma unroll
  for (int k = 0; k < Block; ++k) none &= importance[k] == 0.f;
  return none;
}

QUANTOOL_DEVICE void count_evenly(Int where, Float* importance) {
  if (!any(where)) return;
#pragma unroll
  for (int k = 0; k < Block; ++k) importance[k] = lanes::select(where, splat(1.f), importance[k]);
}

// What ggml minimises where there is an importance.
template <bool Exact>
QUANTOOL_DEVICE void set_objective(const Float* x, const Float* users, Float mean, Float* objective) {
#pragma unroll
  for (int k = 0; k < Block; ++k) {
    const Float square = mean + x[k] * x[k];
    objective[k] = users[k] * lanes::sqrt(Exact ? square : minimum(square, splat(Huge)));
  }
}

// 32 codes of 4 bits as ggml packs them: byte j holds code j and code j + 16. Sums of so few bits are exact.
QUANTOOL_DEVICE void pack_nibbles(const Float* code, Int* words) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    Float byte[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) byte[b] = code[4 * w + b] + 16.f * code[4 * w + b + 16];
    words[w] = truncate(byte[0] + 256.f * byte[1]) | truncate(byte[2] + 256.f * byte[3]) << 16;
  }
}

// What a search is compiled for: run(weighted, exact), two std::bool_constant.
template <class Run>
auto with_flags(bool weighted, bool exact, Run run) {
  using std::false_type, std::true_type;
  if (weighted) return exact ? run(true_type{}, true_type{}) : run(true_type{}, false_type{});
  return exact ? run(false_type{}, true_type{}) : run(false_type{}, false_type{});
}

}  // namespace line
