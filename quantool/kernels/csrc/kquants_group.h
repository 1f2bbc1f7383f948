// What tells the types apart, and what is done with one group of weights: ggml's part. The default search goes on from
// there (kquants_refine.h).
//
//     weigh      what the error of each weight counts in ggml's search
//     search     a float scale (and minimum) for a group: kquants_search.h
//     integers   d and the integer scales of a super-block for those, likewise dmin and the mins
//     requantize the codes on the grid that is stored
//
// On the CPU a group is one of 8 or 16 in a tile, on CUDA it is what a thread has in its registers.

#pragma once

#include "kquants_pack.h"
#include "kquants_search.h"

namespace kquants {

// Reach: how far the default search moves an integer scale, without and with importance. ggml is slower with
// importance, and the finer a type, the more its error has to gain.
template <int GroupCount, int MaxCode, int MaxScale, int Reach_>
struct AffineType {
  static constexpr bool Signed = false, Coarse = false;
  static constexpr int Count = GroupCount, Groups = SuperBlock / GroupCount;
  static constexpr int Lowest = 0, Highest = MaxCode, LowestScale = 0, HighestScale = MaxScale;
  static constexpr bool Absolute = GroupCount == 16;  // Q2_K without importance sums |error|, not its square
  static constexpr int VarianceFactor = Absolute ? 1 : 2;  // of sigma^2, see weigh
  static constexpr int Reach = Reach_, WeightedReach = 4;
};

template <int Half, int MaxScale, int Reach_>
struct SignedType {
  static constexpr bool Signed = true, Absolute = false;
  static constexpr bool Coarse = Half == 4;  // Q3_K: scales stored from 0 on, and with searches of its own
  static constexpr int Count = 16, Groups = 16;
  static constexpr int Lowest = -Half, Highest = Half - 1, LowestScale = -MaxScale, HighestScale = MaxScale - 1;
  static constexpr int VarianceFactor = 2;
  static constexpr int Reach = Reach_, WeightedReach = Coarse ? 6 : 8;
};

struct Q2K : AffineType<16, 3, 15, 1> {
  static constexpr int Bytes = 84;
  static constexpr QUANTOOL_DEVICE Steps plain() { return {-0.5f, 0.1f, 15}; }
  template <int Workers>
  static QUANTOOL_DEVICE void pack(uint8_t* out, const Fields& f, int worker) { pack_q2_k<Workers>(out, f, worker); }
};

struct Q4K : AffineType<32, 15, 63, 2> {
  static constexpr int Bytes = 144;
  static constexpr QUANTOOL_DEVICE Steps plain() { return {-1.f, 0.1f, 20}; }
  template <int Workers>
  static QUANTOOL_DEVICE void pack(uint8_t* out, const Fields& f, int worker) { pack_q4_k<Workers>(out, f, worker); }
};

struct Q5K : AffineType<32, 31, 63, 2> {
  static constexpr int Bytes = 176;
  static constexpr QUANTOOL_DEVICE Steps plain() { return {-0.5f, 0.1f, 15}; }
  template <int Workers>
  static QUANTOOL_DEVICE void pack(uint8_t* out, const Fields& f, int worker) { pack_q5_k<Workers>(out, f, worker); }
};

struct Q3K : SignedType<4, 32, 2> {
  static constexpr int Bytes = 110;
  template <int Workers>
  static QUANTOOL_DEVICE void pack(uint8_t* out, const Fields& f, int worker) { pack_q3_k<Workers>(out, f, worker); }
};

struct Q6K : SignedType<32, 128, 8> {
  static constexpr int Bytes = 210;
  template <int Workers>
  static QUANTOOL_DEVICE void pack(uint8_t* out, const Fields& f, int worker) { pack_q6_k<Workers>(out, f, worker); }
};

constexpr QUANTOOL_DEVICE Steps weighted_steps() { return {-0.9f, 0.05f, 36}; }  // of all affine types

// float16, where ggml overflows to infinity and a finite number serves better.
QUANTOOL_DEVICE Float store_half(Float v, bool exact) { return exact ? round_to_half(v) : finite_half(v); }

template <int Count>
QUANTOOL_DEVICE Float square_sum(const Float* x, Float sum) {
#pragma unroll
  for (int k = 0; k < Count; ++k) sum += x[k] * x[k];
  return sum;
}

template <int Count>
QUANTOOL_DEVICE Float total(const Float* w) {
  Float sum = splat(0.f);
#pragma unroll
  for (int k = 0; k < Count; ++k) sum += w[k];
  return sum;
}

// Whether ggml weighs with sigma^2 of the whole super-block: with importance, and not in Q6_K, which takes it as it is.
template <class Type, bool Weighted>
constexpr bool NeedsVariance = Weighted && !(Type::Signed && !Type::Coarse);

// sigma^2 of sum x^2 over the super-block
template <class Type>
QUANTOOL_DEVICE Float variance_of(Float squares) {
  return splat(float(Type::VarianceFactor)) * squares / splat(float(SuperBlock));
}

// ggml's weights: importance * sqrt(sigma^2 + x^2) with importance, without it x^2 or |x|, to which Q4_K and Q5_K add
// the root mean square of the group.
template <class Type, bool Weighted>
QUANTOOL_DEVICE void weigh(const Float* x, const Float* importance, Float variance, Float* w) {
  Float mean = splat(0.f);
  if (!Weighted && !Type::Signed && !Type::Absolute)
    mean = sqrt(square_sum<Type::Count>(x, mean) / splat(float(Type::Count)));
#pragma unroll
  for (int k = 0; k < Type::Count; ++k)
    if (NeedsVariance<Type, Weighted>)
      w[k] = importance[k] * sqrt(variance + x[k] * x[k]);
    else if (Weighted)
      w[k] = importance[k];
    else
      w[k] = Type::Signed ? x[k] * x[k] : mean + absolute(x[k]);
}

// --- affine: Q2_K, Q4_K, Q5_K

template <class Type, bool Weighted>
QUANTOOL_DEVICE Affine search_group(const Float* x, const Float* w) {
  if constexpr (Weighted)
    return search_affine<Type::Count, Type::Highest, false>(x, w, weighted_steps());
  else
    return search_affine<Type::Count, Type::Highest, Type::Absolute>(x, w, Type::plain());
}

// x >= 0 over their largest as integers, without importance. ggml keeps them in a byte, which matters where 1 / max is
// infinite.
template <int Groups, int MaxScale>
QUANTOOL_DEVICE Float scale_to_largest(const Float* x, Float* codes) {
  Float max = splat(0.f);
#pragma unroll
  for (int g = 0; g < Groups; ++g) max = maximum(x[g], max);
  const Float inverse = select(max > 0.f, float(MaxScale) / max, splat(0.f));
#pragma unroll
  for (int g = 0; g < Groups; ++g) codes[g] = to_float(minimum(nearest(inverse * x[g]) & 255, splat(MaxScale)));
  return max / float(MaxScale);
}

// d for the scales of all groups, or dmin for their mins, and the integers for them; `weights` are those of the groups.
template <class Type, bool Weighted>
QUANTOOL_DEVICE Float affine_integers(const Float* scales, const Float* weights, Float* integers) {
  if constexpr (Weighted)
    return search_positive<Type::Groups, Type::HighestScale>(scales, weights, integers);
  else
    return scale_to_largest<Type::Groups, Type::HighestScale>(scales, integers);
}

template <class Type>
QUANTOOL_DEVICE void requantize_affine(const Float* x, const Affine& found, Float step, Float offset, Float* codes) {
  const Int none = step == 0.f;  // the codes count for nothing; ggml leaves those of the search
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) {
    const Int code = clamp(nearest((x[k] + offset) / step), splat(0), splat(Type::Highest));
    const Float searched = affine_code(x[k], found.inverse, found.code_base, Type::Highest);
    codes[k] = select(none, searched, to_float(code));
  }
}

// --- signed: Q3_K, Q6_K

// The scales and codes of `Chains` groups, one after another in x, w and codes.
template <class Type, bool Weighted, int Chains>
QUANTOOL_DEVICE void search_groups(const Float* x, const Float* w, Float* codes, Float* scales) {
  if constexpr (Type::Coarse && !Weighted) {
    descend_signed<Type::Count, -Type::Lowest, Chains>(x, w, codes, scales);
  } else {
#pragma unroll
    for (int c = 0; c < Chains; ++c) {
      const Signed found = search_signed<Type::Count, -Type::Lowest>(x + c * Type::Count, w + c * Type::Count);
      scales[c] = found.scale;
#pragma unroll
      for (int k = c * Type::Count; k < (c + 1) * Type::Count; ++k)
        codes[k] = signed_code(x[k], found.inverse, -Type::Lowest);
    }
  }
}

// The largest scale of Q3_K and Q6_K becomes -MaxScale, without importance (Q6_K: always).
template <class Type>
QUANTOOL_DEVICE Float scale_to_signed_largest(const Float* scales, Float* integers) {
  const Float inverse = float(Type::LowestScale) / signed_max<Type::Groups>(scales);
#pragma unroll
  for (int g = 0; g < Type::Groups; ++g)
    integers[g] = to_float(clamp(nearest(inverse * scales[g]), splat(Type::LowestScale), splat(Type::HighestScale)));
  return 1.f / inverse;
}

// d and the integer scales; those of Q3_K with importance are searched as weights are. `zero` says where the largest
// scale leaves nothing of a block: Q3_K without importance asks for zero itself.
template <class Type, bool Weighted>
QUANTOOL_DEVICE Float signed_integers(const Float* scales, const Float* weights, Float* integers, Int& zero) {
  constexpr bool Searched = Type::Coarse && Weighted;
  const Float largest = signed_max<Type::Groups>(scales);
  zero = Type::Coarse && !Weighted ? largest == 0.f : absolute(largest) < Epsilon;
  Float d;
  if constexpr (Searched) {
    const Signed found = search_signed<Type::Groups, -Type::LowestScale>(scales, weights);
#pragma unroll
    for (int g = 0; g < Type::Groups; ++g) integers[g] = signed_code(scales[g], found.inverse, -Type::LowestScale);
    d = found.scale;
  } else {
    d = select(zero, splat(0.f), scale_to_signed_largest<Type>(scales, integers));
  }
  const Float stored_as_zero = splat(Type::Coarse ? float(Type::LowestScale) : 0.f);
#pragma unroll
  for (int g = 0; g < Type::Groups; ++g) integers[g] = select(zero, stored_as_zero, integers[g]);
  return d;
}

// Where a step is 0 the codes count for nothing, and ggml leaves those of the search, or zero bits: the lowest level.
template <class Type>
QUANTOOL_DEVICE void requantize_signed(const Float* x, Float step, Int zero, Float* codes) {
  const Float lowest = splat(float(Type::Lowest));
  const Int none = step == 0.f;
  const Int bare = (Type::Coarse ? splat(0) : zero) | (absolute(signed_max<Type::Count>(x)) < Epsilon);
#pragma unroll
  for (int k = 0; k < Type::Count; ++k) {
    const Int code = clamp(nearest(x[k] / step), splat(Type::Lowest), splat(Type::Highest));
    codes[k] = select(none, select(bare, lowest, codes[k]), to_float(code));
  }
}

}  // namespace kquants
