// The line of values of 32 weights, W ~ d level(code) or d code + m: formats/ggml/line_search.py, compiled.
//
// What is computed, and why, is said there; here every lane of a vector is a block (lanes.h), and each lane does the
// operations of that file in their order, so that the bits are the same. Blocks of all rows are one flat list.

#pragma once

#include "lanes.h"

namespace line {

using namespace lanes;

constexpr int Block = 32;
constexpr float HalfMax = 65504.f, Tiny = 1e-30f, Huge = 1e30f, GroupMaxEps = 1e-15f;

inline Float reciprocal(Float v) { return select(absolute(v) < Tiny, splat(0.f), 1.f / v); }
inline Float half(Float v) { return round_to_half(clamp(v, splat(-HalfMax), splat(HalfMax))); }
inline Int finite(Float v) { return absolute(v) < __builtin_inff(); }

template <int Low, int High>
struct Symmetric {
  static Float nearest(Float v) { return clamp(rint(v), splat(float(Low)), splat(float(High))); }
};

// What a search sees of a block: its weights and what the error of each counts. Metrics 0: all the same; 1: by the
// user's importance; 2: by ggml's objective as well, which comes first.
template <int Metrics>
struct View {
  static constexpr int Count = Metrics == 2 ? 2 : 1, Last = Count - 1;
  const Float* x;
  const Float* weight[2];

  Float weighed(int metric, int k, Float value) const { return Metrics == 0 ? value : weight[metric][k] * value; }
};

// --- one step per block ---------------------------------------------------------------------------------------------

template <int Metrics>
struct StepSums {
  Float a[2] = {}, b[2] = {};

  void add(const View<Metrics>& v, int k, Float q) {
    for (int m = 0; m < View<Metrics>::Count; ++m) {
      const Float wq = v.weighed(m, k, q);
      a[m] += wq * v.x[k];
      b[m] += wq * q;
    }
  }
};

// The best step for these sums and what it gains, kept where ggml's objective is within `limit`.
template <int Metrics>
inline Float fit_step(const StepSums<Metrics>& s, Float square, Float limit, Float& gain) {
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

template <class Level, int Metrics>
inline void line_errors(const View<Metrics>& v, Float step, Float* errors) {
  const Float inverse = reciprocal(step);
  Float sum[2] = {};
  for (int k = 0; k < Block; ++k) {
    const Float difference = v.x[k] - step * Level::nearest(v.x[k] * inverse);
    for (int m = 0; m < View<Metrics>::Count; ++m) sum[m] += v.weighed(m, k, difference * difference);
  }
  for (int m = 0; m < View<Metrics>::Count; ++m) errors[m] = sum[m];
}

// A stored step whose error with the nearest codes is at most that of `step`, under each of the weights.
template <class Level, int Metrics, int Tops>
inline Float refine(const View<Metrics>& v, Float step, Float max, const float (&tops)[Tops], int rounds) {
  constexpr int Last = View<Metrics>::Last;
  Float errors[2], fresh[2], square = {};
  line_errors<Level>(v, step, errors);
  const Float limit = errors[0];
  if (Metrics == 2)
    for (int k = 0; k < Block; ++k) square += v.weighed(0, k, v.x[k]) * v.x[k];
  const Float scale = reciprocal(max);
  Float best = {}, found = step, gain;
  constexpr int Together = Metrics == 2 ? 1 : 2;  // candidates in flight at once
  static_assert(Tops % Together == 0);
  for (int t = 0; t < Tops; t += Together) {
    StepSums<Metrics> sums[Together];
    Float inverse[Together];
    for (int c = 0; c < Together; ++c) inverse[c] = scale * tops[t + c];
    for (int k = 0; k < Block; ++k)
      for (int c = 0; c < Together; ++c) sums[c].add(v, k, Level::nearest(v.x[k] * inverse[c]));
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

inline Line select(Int mask, Line yes, Line no) {
  return {lanes::select(mask, yes.step, no.step), lanes::select(mask, yes.low, no.low)};
}

struct LineSums {
  Float w = {}, wy = {}, wq = {}, wqq = {}, wqy = {};

  void add(Float weighed_q, Float q, Float y) {
    wq += weighed_q;
    wqq += weighed_q * q;
    wqy += weighed_q * y;
  }
  void include(const LineSums& totals) {
    w = totals.w;
    wy = totals.wy;
  }
  Line solve() const {
    const Float determinant = w * wqq - wq * wq;
    return {(w * wqy - wy * wq) / determinant, (wqq * wy - wq * wqy) / determinant};
  }
  Float explained(Line l) const {
    return l.step * (wqy + wqy - l.step * wqq) + l.low * (wy + wy - l.low * w - (l.step + l.step) * wq);
  }
  LineSums plus(Float factor, const LineSums& o) const {
    return {w + factor * o.w, wy + factor * o.wy, wq + factor * o.wq, wqq + factor * o.wqq, wqy + factor * o.wqy};
  }
};

constexpr float Blends[] = {0.f, 0.25f, 1.f, 4.f};  // how much ggml's objective counts in a fit beside the user's

template <int Metrics>
inline Line fit_affine(const LineSums* sums, Float room, Float& best) {
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
inline Float affine_code(Float v) { return clamp(rint(v), splat(0.f), splat(float(MaxCode))); }

// The codes nearest to a line, and their errors.
template <int MaxCode, int Metrics>
inline void affine_errors(const View<Metrics>& v, Line l, Float* code, Float* errors) {
  const Float inverse = reciprocal(l.step);
  Float sum[2] = {};
  for (int k = 0; k < Block; ++k) {
    const Float above = v.x[k] - l.low;
    code[k] = affine_code<MaxCode>(above * inverse);
    const Float difference = above - l.step * code[k];
    for (int m = 0; m < View<Metrics>::Count; ++m) sum[m] += v.weighed(m, k, difference * difference);
  }
  for (int m = 0; m < View<Metrics>::Count; ++m) errors[m] = sum[m];
}

// A candidate sends the smallest weight to `first` and the largest to max_code + `second`, both less than a half away,
// so that no code is out of range.
struct Shift {
  float first, second;
};

// A stored line whose error with the nearest codes is at most that of `l`, under each of the weights; and those codes.
template <int MaxCode, int Metrics, int Shifts>
inline Line refine_affine(const View<Metrics>& v, Line l, Float low, Float high, const Shift (&shifts)[Shifts],
                          Float* code) {
  constexpr int Count = View<Metrics>::Count, Last = View<Metrics>::Last;
  LineSums totals[2], sums[2];
  Float errors[2] = {}, square = {}, y[Block];
  const Float inverse = reciprocal(l.step);
  for (int k = 0; k < Block; ++k) {
    y[k] = v.x[k] - low;
    const Float above = v.x[k] - l.low, q = affine_code<MaxCode>(above * inverse), difference = above - l.step * q;
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
  for (int m = 0; m < Count; ++m) sums[m].include(totals[m]);
  Float best, gain;
  Line found = fit_affine<Metrics>(sums, room, best);
  const Float scale = reciprocal(high - low);
  constexpr int Together = Metrics == 2 ? 1 : 2;  // candidates in flight at once
  static_assert(Shifts % Together == 0);
  for (int s = 0; s < Shifts; s += Together) {
    LineSums of[Together][2];
    Float factor[Together];
    for (int c = 0; c < Together; ++c) factor[c] = scale * (MaxCode + shifts[s + c].second - shifts[s + c].first);
    for (int k = 0; k < Block; ++k)
      for (int c = 0; c < Together; ++c) {
        const Float q = rint(y[k] * factor[c] + shifts[s + c].first);
        for (int m = 0; m < Count; ++m) of[c][m].add(v.weighed(m, k, q), q, y[k]);
      }
    for (int c = 0; c < Together; ++c) {
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

// --- what a call works on -------------------------------------------------------------------------------------------

struct Problem {
  const float* weight;      // [rows, columns], as units of `Size` weights one after the other
  const float* importance;  // [columns] or null
  int64_t rows, columns;
  bool exact;
  uint8_t* blocks;
  float* mean;  // sum(x^2) / columns of every row, where ggml's objective needs it
};

#if !defined(__clang__)
// Lanes rows of Lanes numbers become columns: each pass interleaves the first half of the vectors with the second.
inline void transpose(Float* v) {
  Int low, high;  // which numbers of two vectors, one after the other, are interleaved
  for (int lane = 0; lane < Lanes; ++lane) {
    low[lane] = lane / 2 + lane % 2 * Lanes;
    high[lane] = low[lane] + Lanes / 2;
  }
  for (int pass = 1; pass < Lanes; pass *= 2) {
    Float mixed[Lanes];
    for (int i = 0; i < Lanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(v[i], v[i + Lanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(v[i], v[i + Lanes / 2], high);
    }
    for (int i = 0; i < Lanes; ++i) v[i] = mixed[i];
  }
}

#endif

// x[k][lane] = source[lane][k], with fewer stores than load_transposed where the compiler has two-vector shuffles.
template <int Size>
inline void load_columns(const float* const* source, Float* x) {
#if defined(__clang__)
  load_transposed(source, Size, x);
#else
  for (int start = 0; start < Size; start += Lanes) {
    for (int lane = 0; lane < Lanes; ++lane) std::memcpy(x + start + lane, source[lane] + start, sizeof(Float));
    transpose(x + start);
  }
#endif
}

// The weights of units first, first + 1, ... of `Size` weights, one unit in every lane; the last again past the end.
template <int Size>
inline void load(const Problem& p, int64_t first, Float* x) {
  const int64_t last = p.rows * p.columns / Size - 1;
  const float* source[Lanes];
  for (int lane = 0; lane < Lanes; ++lane) source[lane] = p.weight + std::min(first + lane, last) * Size;
  load_columns<Size>(source, x);
}

// The importance of their columns. A unit without any would leave every code open: there all columns count the same.
template <int Size>
inline void load_importance(const Problem& p, int64_t first, Float* importance) {
  const int64_t per_row = p.columns / Size;
  const float* source[Lanes];
  for (int lane = 0; lane < Lanes; ++lane) source[lane] = p.importance + (first + lane) % per_row * Size;
  load_columns<Size>(source, importance);
  if (p.exact) return;
  Int none = splat(-1);
  for (int k = 0; k < Size; ++k) none &= importance[k] == 0.f;
  if (any(none))
    for (int k = 0; k < Size; ++k) importance[k] = lanes::select(none, splat(1.f), importance[k]);
}

// 32 codes of 4 bits as ggml packs them: byte j holds code j and code j + 16. Sums of so few bits are exact.
inline void pack_nibbles(const Float* code, Int* words) {
  for (int w = 0; w < 4; ++w) {
    Float byte[4];
    for (int b = 0; b < 4; ++b) byte[b] = code[4 * w + b] + 16.f * code[4 * w + b + 16];
    words[w] = truncate(byte[0] + 256.f * byte[1]) | truncate(byte[2] + 256.f * byte[3]) << 16;
  }
}

// lane `lane` of `count` words, at `out`.
inline void store_words(const Int* words, int count, int lane, uint8_t* out) {
  for (int w = 0; w < count; ++w) {
    const int32_t word = words[w][lane];
    std::memcpy(out + 4 * w, &word, 4);
  }
}

inline void store_half(Int halves, int lane, uint8_t* out) {
  const uint16_t half = static_cast<uint16_t>(halves[lane]);
  std::memcpy(out, &half, 2);
}

}  // namespace line
