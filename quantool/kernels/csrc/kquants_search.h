// The searches of ggml's K-quants for one sub-block in every lane: which scale (and minimum) loses least.
//
//     search_affine    x ~ scale * code - min, codes 0..MaxCode        make_qkx2_quants, make_qkx3_quants
//     search_positive  x ~ scale * code, x >= 0, codes 0..MaxCode      make_qp_quants: scales of scales
//     search_signed    x ~ scale * code, codes -Half..Half-1           make_qx_quants
//     descend_signed   the same by coordinate descent                  make_q3_quants
//
// Every sum runs over the weights in order, in float32, and every expression is grouped as there, so that the lanes
// find what the scalar code finds, bit for bit. Source: ggml-quants.c of https://github.com/ggml-org/ggml

#pragma once

#include "lanes.h"

namespace kquants {

using namespace lanes;

constexpr float Epsilon = 1e-15f;  // ggml's GROUP_MAX_EPS: a sub-block below it is zero

// Candidates for the number of steps between the least and the largest value: max_code + first + delta * i for
// i = 0..count.
struct Steps {
  float first, delta;
  int count;
};

// start + delta * i, rounded twice
QUANTOOL_DEVICE Float after_steps(float start, float delta, int i) {
  return splat(start) + splat(delta) * splat(float(i));
}

struct Affine {
  Float scale, min;          // x ~ scale * code - min
  Float inverse, code_base;  // code = round(inverse * (x - code_base)), as the search had it
};

// Infinite where the range is next to nothing: ggml's rounding then gives code 0.
QUANTOOL_DEVICE Float usable(Float inverse) { return select(inverse > 3.4028235e38f, splat(0.f), inverse); }

QUANTOOL_DEVICE Float affine_code(Float x, Float inverse, Float base, float max_code) {
  return clamp(rint(inverse * (x - base)), splat(0.f), splat(max_code));
}

template <bool Absolute>
QUANTOOL_DEVICE Float penalty(Float difference) { return Absolute ? absolute(difference) : difference * difference; }

template <int Count, bool Absolute>
QUANTOOL_DEVICE Float affine_error(const Float* x, const Float* w, const Float* codes, Float scale, Float min) {
  Float error = splat(0.f);
#pragma unroll
  for (int k = 0; k < Count; ++k) error += w[k] * penalty<Absolute>(scale * codes[k] + min - x[k]);
  return error;
}

// Least squares for x ~ scale * code + min with min <= 0, as sums over the weights; `valid` where it has a solution.
struct Fit {
  Float scale, min;
  Int valid;
};

QUANTOOL_DEVICE Fit fit_affine(Float w, Float wx, Float wl, Float wll, Float wxl) {
  const Float determinant = w * wll - wl * wl;
  const Float scale = (w * wxl - wx * wl) / determinant, min = (wll * wx - wl * wxl) / determinant;
  const Int positive = min > 0.f;
  return {select(positive, wxl / wll, scale), select(positive, splat(0.f), min), determinant > 0.f};
}

// `Absolute` sums |error| in place of its square. Each candidate starts from the best minimum so far, as ggml's does.
template <int Count, int MaxCode, bool Absolute>
QUANTOOL_DEVICE Affine search_affine(const Float* x, const Float* w, Steps steps) {
  Float min = x[0], max = x[0], sum_w = w[0], sum_x = w[0] * x[0];
#pragma unroll
  for (int k = 1; k < Count; ++k) {
    min = minimum(x[k], min);
    max = maximum(x[k], max);
    sum_w += w[k];
    sum_x += w[k] * x[k];
  }
  min = select(min > 0.f, splat(0.f), min);
  const Int flat = max <= min;
  Float inverse = float(MaxCode) / (max - min);
  Affine best = {1.f / inverse, min, usable(inverse), min};
  Float codes[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) codes[k] = affine_code(x[k], best.inverse, min, MaxCode);
  Float least = affine_error<Count, Absolute>(x, w, codes, best.scale, min);
#pragma unroll 1
  for (int i = 0; i <= steps.count; ++i) {
    inverse = usable((after_steps(steps.first, steps.delta, i) + splat(float(MaxCode))) / (max - best.min));
    Float wl = splat(0.f), wll = splat(0.f), wxl = splat(0.f);
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      const Float l = affine_code(x[k], inverse, best.min, MaxCode), product = w[k] * l;
      codes[k] = l;
      wl += product;
      wll += product * l;
      wxl += product * x[k];
    }
    const Fit fit = fit_affine(sum_w, sum_x, wl, wll, wxl);
    const Float error = affine_error<Count, Absolute>(x, w, codes, fit.scale, fit.min);
    const Int better = fit.valid & (error < least);
    least = select(better, error, least);
    best.inverse = select(better, inverse, best.inverse);
    best.code_base = select(better, best.min, best.code_base);
    best.scale = select(better, fit.scale, best.scale);
    best.min = select(better, fit.min, best.min);
  }
  const Float zero = splat(0.f);  // a flat sub-block: no steps, code 0
  best.inverse = select(flat, zero, best.inverse);
  best.code_base = select(flat, zero, best.code_base);
  best.scale = select(flat, zero, best.scale);
  best.min = -select(flat, min, best.min);
  return best;
}

// sum w x l and sum w l^2 of codes l: scale = wxl / wll is the least-squares scale.
struct Moments {
  Float wxl, wll;
};

// ggml keeps the codes of scales in bytes, also those that are negative or beyond all bounds.
QUANTOOL_DEVICE Float last_byte(Int code) { return to_float(code & 255); }

// One step of `descend`: the code that is best for the scale of all others, if the error falls with it.
template <bool Positive>
QUANTOOL_DEVICE Int move_code(Float x, Float w, Float& code, Moments& sums, int lowest, int highest) {
  const Float product = w * x;
  Float wxl = sums.wxl - product * code, wll = sums.wll - w * code * code;
  Int better = wxl > 0.f;
  if (Positive) better &= wll > 0.f;
  Int rounded = minimum(nearest(x * wll / wxl), splat(highest));
  if (!Positive) rounded = maximum(rounded, splat(lowest));
  const Float moved = to_float(rounded);
  wxl += product * moved;
  wll += w * moved * moved;
  better &= (moved != code) & (wll > 0.f) & (wxl * wxl * sums.wll > sums.wxl * sums.wxl * wll);
  code = select(better, Positive ? last_byte(rounded) : moved, code);
  sums.wxl = select(better, wxl, sums.wxl);
  sums.wll = select(better, wll, sums.wll);
  return better;
}

// Gauss-Seidel over the codes of `Chains` sub-blocks side by side: each waits for a division, so they take turns.
template <int Count, int Chains, bool Positive>
QUANTOOL_DEVICE void descend(const Float* x, const Float* w, Float* codes, Moments* sums, int lowest, int highest) {
#pragma unroll 1
  for (int sweep = 0; sweep < 5; ++sweep) {
    Int changed = splat(0);
#pragma unroll
    for (int k = 0; k < Count; ++k)
#pragma unroll
      for (int c = 0; c < Chains; ++c) {
        const int i = c * Count + k;
        changed |= move_code<Positive>(x[i], w[i], codes[i], sums[c], lowest, highest);
      }
    if (!any(changed)) break;
  }
}

QUANTOOL_DEVICE Float ratio(Moments sums) { return select(sums.wll > 0.f, sums.wxl / sums.wll, splat(0.f)); }

// A negative x, which an affine search can leave where few weights count, ends up as a large code: as in ggml.
template <int Count, int MaxCode>
QUANTOOL_DEVICE Float search_positive(const Float* x, const Float* w, Float* codes) {
  const Int highest = splat(MaxCode);
  Float max = splat(0.f);
#pragma unroll
  for (int k = 0; k < Count; ++k) max = maximum(x[k], max);
  Float inverse = float(MaxCode) / max, least = splat(0.f);
#pragma unroll 1
  for (int i = -5; i <= 4; ++i) {  // -5 stands for the plain one, which comes first; 0 would repeat it
    if (i == 0) continue;
    const Float candidate = i == -5 ? inverse : after_steps(MaxCode, 0.1f, i) / max, scale = 1.f / candidate;
    Float error = splat(0.f);
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      const Float difference = x[k] - scale * to_float(minimum(nearest(candidate * x[k]), highest));
      error += w[k] * difference * difference;
    }
    const Int better = i == -5 ? splat(-1) : error < least;
    least = select(better, error, least);
    inverse = select(better, candidate, inverse);
  }
  Moments sums = {splat(0.f), splat(0.f)};
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const Int code = minimum(nearest(inverse * x[k]), highest);
    sums.wxl += w[k] * x[k] * to_float(code);
    sums.wll += w[k] * to_float(code) * to_float(code);
    codes[k] = last_byte(code);
  }
  descend<Count, 1, true>(x, w, codes, &sums, 0, MaxCode);
  const Int zero = max < Epsilon;
#pragma unroll
  for (int k = 0; k < Count; ++k) codes[k] = select(zero, splat(0.f), minimum(codes[k], to_float(highest)));
  return select(zero, splat(0.f), ratio(sums));
}

struct Signed {
  Float scale, inverse;  // code = clamp(round(inverse * x), -Half, Half - 1), as the search had it
};

QUANTOOL_DEVICE Float signed_code(Float x, Float inverse, float half) {
  return clamp(rint(inverse * x), splat(-half), splat(half - 1));
}

template <int Count, int Half>
QUANTOOL_DEVICE Moments signed_moments(const Float* x, const Float* w, Float inverse, Float* codes) {
  Moments sums = {splat(0.f), splat(0.f)};
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const Float l = signed_code(x[k], inverse, Half);
    if (codes) codes[k] = l;
    sums.wxl += w[k] * x[k] * l;
    sums.wll += w[k] * l * l;
  }
  return sums;
}

template <int Count, int Half>
QUANTOOL_DEVICE Signed search_signed(const Float* x, const Float* w) {
  const Float max = signed_max<Count>(x);
  Signed best = {splat(0.f), -float(Half) / max};
  Moments sums = signed_moments<Count, Half>(x, w, best.inverse, nullptr);
  best.scale = select(sums.wll != 0.f, sums.wxl / sums.wll, splat(0.f));
  Float gain = best.scale * sums.wxl;
#pragma unroll 1
  for (int i = -9; i <= 9; ++i) {
    if (i == 0) continue;
    const Float inverse = -after_steps(Half, 0.1f, i) / max;
    sums = signed_moments<Count, Half>(x, w, inverse, nullptr);
    const Int better = (sums.wll > 0.f) & (sums.wxl * sums.wxl > gain * sums.wll);
    best.inverse = select(better, inverse, best.inverse);
    best.scale = select(better, sums.wxl / sums.wll, best.scale);
    gain = select(better, best.scale * sums.wxl, gain);
  }
  const Int zero = absolute(max) < Epsilon;  // its codes are those of scale 0: Half in ggml's L is 0 as well
  return {select(zero, splat(0.f), best.scale), select(zero, splat(0.f), best.inverse)};
}

// `Chains` sub-blocks, one after another in x and codes; without importance their weights are w = x^2.
template <int Count, int Half, int Chains>
QUANTOOL_DEVICE void descend_signed(const Float* x, const Float* w, Float* codes, Float* scales) {
  Moments sums[Chains];
#pragma unroll
  for (int c = 0; c < Chains; ++c) {
    const int i = c * Count;
    sums[c] = signed_moments<Count, Half>(x + i, w + i, -float(Half) / signed_max<Count>(x + i), codes + i);
  }
  descend<Count, Chains, false>(x, w, codes, sums, -Half, Half - 1);
#pragma unroll
  for (int c = 0; c < Chains; ++c)
    scales[c] = select(absolute(signed_max<Count>(x + c * Count)) < Epsilon, splat(0.f), ratio(sums[c]));
}

}  // namespace kquants
