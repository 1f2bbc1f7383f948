// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: the searches of formats/ggml/legacy.py for the block of every lane, bit for bit.

#pragma once

#include "ggml_line.h"

namespace line {

// --- ggml's own -----------------------------------------------------------------------------------------------------

// make_qx_quants: the scale of least error under `weight`, and the factor and shift that give its codes.
template <int Top>
QUANTOOL_DEVICE Float make_qx(const Float* x, const Float* weight, Float max, Float& scaling) {
  Float wx[Block], scale = {}, best = {}, chosen = {};
#pragma unroll
  for (int k = 0; k < Block; ++k) wx[k] = weight[k] * x[k];
  for (int n = 0; n < 19; ++n) {
    const int i = n == 0 ? 0 : n <= 9 ? n - 10 : n - 9;
    const Float inverse = -(splat(0.1f) * float(i) + float(Top)) / max;
    Float a = {}, b = {};
#pragma unroll
    for (int k = 0; k < Block; ++k) {
      const Float q = Symmetric<-Top, Top - 1>::nearest(inverse * x[k]);
      a += wx[k] * q;
      b += weight[k] * q * q;
    }
    const Int better = n == 0 ? splat(-1) : (b > 0.f) & (a * a > best * b);
    scale = lanes::select(better, a / b, scale);
    if (n == 0) scale = lanes::select(b == 0.f, splat(0.f), scale);
    best = lanes::select(better, scale * a, best);
    chosen = lanes::select(better, inverse, chosen);
  }
  scaling = chosen;
  return lanes::select(absolute(max) < GroupMaxEps, splat(0.f), scale);
}

// make_qkx3_quants: the line of least error under `weight` with a minimum of at most 0, and the one that codes it.
template <int MaxCode>
QUANTOOL_DEVICE Line make_qkx3(const Float* x, const Float* weight, Float low, Float high, Line& coding) {
  Float w = {}, wx = {};
#pragma unroll
  for (int k = 0; k < Block; ++k) {
    w += weight[k];
    wx += weight[k] * x[k];
  }
  low = lanes::select(low > 0.f, splat(0.f), low);
  const Int empty = high <= low;
  const auto code = [](Float v) { return to_float(clamp(nearest(v), splat(0), splat(MaxCode))); };
  const Float first = splat(float(MaxCode)) / (high - low);
  Float scale = 1.f / first, best = {}, q[Block];
#pragma unroll
  for (int k = 0; k < Block; ++k) {
    const Float difference = scale * code(first * (x[k] - low)) + low - x[k];
    best += weight[k] * (difference * difference);
  }
  coding = {first, low};
  for (int i = 0; i < 37; ++i) {
    const Float inverse = (splat(0.05f) * float(i) - 0.9f + float(MaxCode)) / (high - low);
    Float sq = {}, sqq = {}, sqx = {}, error = {};
#pragma unroll
    for (int k = 0; k < Block; ++k) {
      q[k] = code(inverse * (x[k] - low));
      const Float wq = weight[k] * q[k];
      sq += wq;
      sqq += wq * q[k];
      sqx += wq * x[k];
    }
    const Float determinant = w * sqq - sq * sq;
    Float this_scale = (w * sqx - wx * sq) / determinant, this_low = (sqq * wx - sq * sqx) / determinant;
    this_scale = lanes::select(this_low > 0.f, sqx / sqq, this_scale);
    this_low = lanes::select(this_low > 0.f, splat(0.f), this_low);
#pragma unroll
    for (int k = 0; k < Block; ++k) {
      const Float difference = this_scale * q[k] + this_low - x[k];
      error += weight[k] * (difference * difference);
    }
    const Int better = (determinant > 0.f) & (error < best);
    if (!any(better)) continue;
    best = lanes::select(better, error, best);
    coding = select(better, {inverse, low}, coding);
    scale = lanes::select(better, this_scale, scale);
    low = lanes::select(better, this_low, low);
  }
  coding.step = lanes::select(empty, splat(0.f), coding.step);
  return {lanes::select(empty, splat(0.f), scale), low};
}

// --- the types ------------------------------------------------------------------------------------------------------

struct Tile {
  Float x[Block], users[Block], objective[Block];
};

struct Found {
  Float d, m, code[Block];  // m only where the type has a minimum
};

// 1 / d as ggml has it: 0 where d is 0, and where the quotient overflows (there C's conversion to integers gives 0).
QUANTOOL_DEVICE Float inverse_of(Float d, Int& usable) {
  const Float inverse = lanes::select(d == 0.f, splat(0.f), 1.f / d);
  usable = finite(inverse);
  return lanes::select(usable, inverse, splat(0.f));
}

// Without its fraction; 0 for NaN, which is what is left of C's conversion in a few bits.
QUANTOOL_DEVICE Float integer(Float v) { return to_float(truncate(lanes::select(v == v, v, splat(0.f)))); }

// Where the largest weight is sent: picked greedily out of a fine grid, on Gaussian and on real rows.
QUANTOOL_TABLE float Tops4[] = {-8.2f, -7.2f, -8.6f, -7.8f};
QUANTOOL_TABLE float Tops5[] = {-16.2f, -15.2f, -15.8f, -16.6f, -14.2f, -14.8f};
QUANTOOL_TABLE float Tops8[] = {127.f, 125.f, 125.8f, 123.f, 124.2f, 121.f, 122.2f, 120.2f};
QUANTOOL_TABLE float WeightedTops4[] = {-9.f,  -8.8f, -8.6f, -8.4f, -8.2f, -8.f, -7.8f, -7.6f, -7.4f, -7.2f,
                                        -6.9f, -6.6f, -6.2f, 6.2f,  6.6f,  6.8f, 7.f,   7.2f,  7.4f,  7.8f};
QUANTOOL_TABLE float WeightedTops5[] = {-17.f,  -16.6f, -16.4f, -16.2f, -16.f, -15.8f, -15.5f,
                                        -15.2f, -14.8f, -14.2f, -13.8f, -13.f, 13.f,   13.6f,
                                        14.f,   14.3f,  14.6f,  14.9f,  15.2f, 15.6f};

// `search` finds d, m and the codes as they are stored, from 0 on; with Exact they are ggml's.

template <int Top>
struct SymmetricType {
  static constexpr int Words = Top == 8 ? 4 : 5, Bytes = 2 + 4 * Words;
  static constexpr bool HasMinimum = false, HasObjective = true;
  using Level = Symmetric<-Top, Top - 1>;

  template <bool Weighted, bool Exact>
  static QUANTOOL_DEVICE void search(const Tile& t, Found& f) {
    const Float max = signed_max<Block>(t.x), coarse = max / splat(float(-Top));
    if constexpr (Weighted) {
      Float scaling;
      f.d = make_qx<Top>(t.x, t.objective, max, scaling);
      if constexpr (Exact) {
        const Int empty = absolute(max) < GroupMaxEps;
#pragma unroll
        for (int k = 0; k < Block; ++k)
          f.code[k] = lanes::select(empty, splat(0.f), Level::nearest(scaling * t.x[k]) + float(Top));
        return;
      }
      const View<2> v{t.x, {t.users, t.objective}};
      f.d = half(lanes::select(f.d == f.d, f.d, coarse));
      f.d = Top == 8 ? refine<Level>(v, f.d, max, WeightedTops4, 2) : refine<Level>(v, f.d, max, WeightedTops5, 2);
    } else if constexpr (Exact) {
      f.d = coarse;
      Int usable;
      const Float inverse = inverse_of(f.d, usable), shift = lanes::select(usable, splat(Top + 0.5f), splat(0.f));
#pragma unroll
      for (int k = 0; k < Block; ++k) f.code[k] = integer(minimum(t.x[k] * inverse + shift, splat(2 * Top - 0.5f)));
      return;
    } else {
      const View<0> v{t.x, {}};
      f.d = Top == 8 ? refine<Level>(v, half(coarse), max, Tops4, 1) : refine<Level>(v, half(coarse), max, Tops5, 1);
    }
    const Float inverse = reciprocal(f.d);
#pragma unroll
    for (int k = 0; k < Block; ++k) f.code[k] = Level::nearest(t.x[k] * inverse) + float(Top);
  }
};

struct Q8Type {
  static constexpr int Words = 8, Bytes = 34;
  static constexpr bool HasMinimum = false, HasObjective = false;
  using Level = Symmetric<-127, 127>;

  template <bool Weighted, bool Exact>
  static QUANTOOL_DEVICE void search(const Tile& t, Found& f) {
    Float max = {};
#pragma unroll
    for (int k = 0; k < Block; ++k) max = maximum(max, absolute(t.x[k]));
    f.d = max / splat(127.f);
    if constexpr (Exact) {
      Int usable;
      const Float inverse = inverse_of(f.d, usable);
#pragma unroll
      for (int k = 0; k < Block; ++k) {  // half away from zero: the number before 0.5 is added, with the sign
        const Float q = t.x[k] * inverse;
        f.code[k] = integer(q + from_bits(bits(splat(0.49999997f)) | (bits(q) & INT32_MIN))) + 128.f;
      }
      return;
    }
    f.d = refine<Level>(View<Weighted>{t.x, {t.users}}, half(f.d), max, Tops8, 1);
    const Float inverse = reciprocal(f.d);
#pragma unroll
    for (int k = 0; k < Block; ++k) f.code[k] = Level::nearest(t.x[k] * inverse) + 128.f;
  }
};

QUANTOOL_TABLE Shift Shifts15[] = {{.15f, .45f}, {-.45f, -.15f}};
QUANTOOL_TABLE Shift Shifts31[] = {{.15f, .3f}, {-.45f, -.15f}};
QUANTOOL_TABLE Shift WeightedShifts[] = {
    {-.45f, -.45f}, {-.45f, -.15f}, {-.45f, .15f}, {-.45f, .45f}, {-.15f, -.45f}, {-.15f, -.15f},
    {-.15f, .15f},  {-.15f, .45f},  {.15f, -.45f}, {.15f, -.15f}, {.15f, .15f},   {.15f, .45f},
    {.45f, -.45f},  {.45f, -.15f},  {.45f, .15f},  {.45f, .45f}};

template <int MaxCode>
struct AffineType {
  static constexpr int Words = MaxCode == 15 ? 4 : 5, Bytes = 4 + 4 * Words;
  static constexpr bool HasMinimum = true, HasObjective = true;

  static QUANTOOL_DEVICE void range(const Float* x, Float& low, Float& high) {
    low = high = x[0];
#pragma unroll
    for (int k = 1; k < Block; ++k) {
      low = minimum(x[k], low);  // of 0 and -0 the first, as in C
      high = maximum(x[k], high);
    }
  }

  template <bool Weighted, bool Exact>
  static QUANTOOL_DEVICE void search(const Tile& t, Found& f) {
    Float low, high;
    range(t.x, low, high);
    Line l{(high - low) / splat(float(MaxCode)), low};
    if constexpr (Weighted) {
      Line coding;
      const Line found = make_qkx3<MaxCode>(t.x, t.objective, low, high, coding);
      if constexpr (Exact) {
        f.d = found.step;
        f.m = found.low;
#pragma unroll
        for (int k = 0; k < Block; ++k)
          f.code[k] = to_float(clamp(nearest(coding.step * (t.x[k] - coding.low)), splat(0), splat(MaxCode)));
        return;
      }
      const View<2> v{t.x, {t.users, t.objective}};
      l = select(finite(found.step) & finite(found.low), found, l);
      l = refine_affine<MaxCode>(v, {half(l.step), half(l.low)}, low, high, WeightedShifts, f.code);
    } else if constexpr (Exact) {
      Int usable;
      const Float inverse = inverse_of(l.step, usable);
#pragma unroll
      for (int k = 0; k < Block; ++k)
        f.code[k] = minimum(integer((t.x[k] - low) * inverse + 0.5f), splat(float(MaxCode)));
    } else {
      const View<0> v{t.x, {}};
      const Line stored{half(l.step), half(l.low)};
      l = MaxCode == 15 ? refine_affine<MaxCode>(v, stored, low, high, Shifts15, f.code)
                        : refine_affine<MaxCode>(v, stored, low, high, Shifts31, f.code);
    }
    f.d = l.step;
    f.m = l.low;
  }
};

// --- bytes ----------------------------------------------------------------------------------------------------------

// The block after its halves d and m, as words. Changes the codes.
template <class Type>
QUANTOOL_DEVICE void pack(Float* code, Int* words) {
  if constexpr (Type::Words == 8) {
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      words[w] = splat(0);
#pragma unroll
      for (int b = 0; b < 4; ++b) words[w] |= truncate(code[4 * w + b]) << (8 * b);
      words[w] ^= 0x80808080;  // int8
    }
  } else {
    if constexpr (Type::Words == 5) {
      words[0] = splat(0);
#pragma unroll
      for (int k = 0; k < Block; ++k) {
        const Int high = code[k] >= 16.f;
        words[0] |= high & static_cast<int32_t>(1u << k);
        code[k] -= lanes::select(high, splat(16.f), splat(0.f));
      }
    }
    pack_nibbles(code, words + Type::Words - 4);
  }
}

}  // namespace line
