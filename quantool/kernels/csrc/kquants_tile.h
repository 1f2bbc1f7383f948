// One super-block per lane, and what each type makes of it.

#pragma once

#include "kquants_pack.h"
#include "kquants_search.h"

namespace kquants {

// What a block stores of its steps and offsets.
struct Grid {
  Float d, dmin;               // float16 values
  Float scales[16], mins[16];  // integers; mins only of affine types
};

struct Tile {
  Float x[SuperBlock];
  Float importance[SuperBlock];  // only where there is one
  Float weight[SuperBlock];      // ggml's, of the squared error (Q2_K without importance: of its magnitude)
  Float codes[SuperBlock];
  Grid grid;
};

template <class Type>
inline Grid select_grid(Int mask, const Grid& yes, const Grid& no) {
  Grid grid = no;
  grid.d = select(mask, yes.d, no.d);
  if (!Type::Signed) grid.dmin = select(mask, yes.dmin, no.dmin);
  for (int g = 0; g < Type::Groups; ++g) {
    grid.scales[g] = select(mask, yes.scales[g], no.scales[g]);
    if (!Type::Signed) grid.mins[g] = select(mask, yes.mins[g], no.mins[g]);
  }
  return grid;
}

// Reach: how far the default search moves an integer scale, without and with importance. ggml is slower with
// importance, and the finer a type, the more its error has to gain.
template <int GroupCount, int MaxCode, int MaxScale, int Reach_>
struct AffineType {
  static constexpr bool Signed = false, Coarse = false;
  static constexpr int Count = GroupCount, Groups = SuperBlock / GroupCount;
  static constexpr int Lowest = 0, Highest = MaxCode, LowestScale = 0, HighestScale = MaxScale;
  static constexpr bool Absolute = GroupCount == 16;  // Q2_K without importance sums |error|, not its square
  static constexpr int VarianceFactor = Absolute ? 1 : 2;  // see weigh_by_importance
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
  static constexpr Steps Plain = {-0.5f, 0.1f, 15};
  static void pack(uint8_t* out, const Fields& f) { pack_q2_k(out, f); }
};

struct Q4K : AffineType<32, 15, 63, 2> {
  static constexpr int Bytes = 144;
  static constexpr Steps Plain = {-1.f, 0.1f, 20};
  static void pack(uint8_t* out, const Fields& f) { pack_q4_k(out, f); }
};

struct Q5K : AffineType<32, 31, 63, 2> {
  static constexpr int Bytes = 176;
  static constexpr Steps Plain = {-0.5f, 0.1f, 15};
  static void pack(uint8_t* out, const Fields& f) { pack_q5_k(out, f); }
};

struct Q3K : SignedType<4, 32, 2> {
  static constexpr int Bytes = 110;
  static void pack(uint8_t* out, const Fields& f) { pack_q3_k(out, f); }
};

struct Q6K : SignedType<32, 128, 8> {
  static constexpr int Bytes = 210;
  static void pack(uint8_t* out, const Fields& f) { pack_q6_k(out, f); }
};

constexpr Steps Weighted = {-0.9f, 0.05f, 36};  // of all affine types

}  // namespace kquants
