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

#pragma once

#include "kquants_tile.h"

namespace kquants {

constexpr int Rounds = 2;
constexpr float Margin = 0.9999f;  // "lower" by more than the rounding of the sums

struct Errors {
  Float own, plain;  // E1, E2
};

// What each weight costs: weight[k] e^2, or weight[k] |e| + plain e^2 where ggml sums magnitudes (Q2_K).
struct Costs {
  Float weight[SuperBlock];
  Float plain;
};

template <class Type>
inline Float round_code(Float shifted, Float inverse) {
  return clamp(rint(shifted * inverse), splat(float(Type::Lowest)), splat(float(Type::Highest)));
}

inline Float inverse_of(Float step) { return select(step == 0.f, splat(0.f), 1.f / step); }

template <class Type>
inline Float offset_of(const Grid& grid, int g) { return Type::Signed ? splat(0.f) : grid.dmin * grid.mins[g]; }

// Both errors of a grid with the codes of the tile (`Stored`) or those nearest to its weights.
template <class Type, bool Weighted, bool Stored>
Errors measure(const Tile& tile, const Grid& grid) {
  Errors sum = {splat(0.f), splat(0.f)};
  for (int g = 0; g < Type::Groups; ++g) {
    const Float step = grid.d * grid.scales[g], offset = offset_of<Type>(grid, g), inverse = inverse_of(step);
    for (int k = g * Type::Count; k < (g + 1) * Type::Count; ++k) {
      const Float code = Stored ? tile.codes[k] : round_code<Type>(tile.x[k] + offset, inverse);
      const Float error = step * code - offset - tile.x[k], square = error * error;
      sum.own += tile.weight[k] * (Type::Absolute && !Weighted ? absolute(error) : square);
      sum.plain += Weighted ? tile.importance[k] * square : square;
    }
  }
  return sum;
}

template <class Type, bool Weighted>
void mix(const Tile& tile, Float own, Float plain, Costs& costs) {
  costs.plain = plain;
  for (int k = 0; k < SuperBlock; ++k) {
    costs.weight[k] = own * tile.weight[k];
    if (!(Type::Absolute && !Weighted)) costs.weight[k] += Weighted ? plain * tile.importance[k] : plain;
  }
}

// The cost of one group for a step and an offset, its codes rounded for them.
template <class Type, bool Linear>
inline Float group_cost(const Float* x, const Float* w, Float plain, Float step, Float inverse, Float offset) {
  Float cost = splat(0.f);
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

// d and dmin by least squares: x ~ d (s l) - dmin m over the super-block. A magnitude |e| counts as e^2 / (2 |e|).
template <class Type, bool Linear>
void refit(const Tile& tile, const Costs& costs, Grid& grid) {
  const Float zero = splat(0.f);
  Float ss = zero, sm = zero, mm = zero, xs = zero, xm = zero;
  for (int g = 0; g < Type::Groups; ++g) {
    const Float step = grid.d * grid.scales[g], offset = offset_of<Type>(grid, g), inverse = inverse_of(step);
    Float w = zero, wx = zero, wl = zero, wll = zero, wxl = zero;
    for (int k = g * Type::Count; k < (g + 1) * Type::Count; ++k) {
      const Float shifted = tile.x[k] + offset, l = round_code<Type>(shifted, inverse);
      Float weight = costs.weight[k];
      if (Linear) {
        const Float error = maximum(absolute(step * l - shifted), step * 0.05f);
        weight = costs.plain + select(step == 0.f, zero, weight * 0.5f / error);
      }
      const Float product = weight * l;
      wll += product * l;
      wxl += product * tile.x[k];
      if (Type::Signed) continue;
      w += weight;
      wx += weight * tile.x[k];
      wl += product;
    }
    const Float s = grid.scales[g];
    ss += s * s * wll;
    xs += s * wxl;
    if (Type::Signed) continue;
    const Float m = grid.mins[g];
    sm += s * m * wl;
    mm += m * m * w;
    xm += m * wx;
  }
  if (Type::Signed) {
    const Float d = xs / ss;
    grid.d = select((d > 0.f) | (d < 0.f), finite_half(d), grid.d);
    return;
  }
  const Float determinant = ss * mm - sm * sm;
  const Float d = (xs * mm - sm * xm) / determinant, dmin = (sm * xs - ss * xm) / determinant;
  const Int valid = (determinant > 0.f) & (d > 0.f) & (dmin >= 0.f);
  grid.d = select(valid, finite_half(d), grid.d);
  grid.dmin = select(valid, finite_half(dmin), grid.dmin);
}

// The best of the integers near those of one group. Scale and min mostly move together: both widen the range.
template <class Type, bool Weighted>
void move_group(const Tile& tile, const Costs& costs, Grid& grid, int g) {
  constexpr bool Linear = Type::Absolute && !Weighted;
  constexpr int Reach = Weighted ? Type::WeightedReach : Type::Reach, Slack = Type::Signed ? 0 : 1;
  const Float *x = tile.x + g * Type::Count, *w = costs.weight + g * Type::Count;
  const Float scale = grid.scales[g], min = grid.mins[g];
  Float least = splat(0.f);
  const auto try_scale = [&](Float s, int first, int last, bool start) {
    s = clamp(s, splat(float(Type::LowestScale)), splat(float(Type::HighestScale)));
    const Float step = grid.d * s, inverse = inverse_of(step);
    for (int change = first; change <= last; ++change) {
      const Float m = clamp(min + float(change), splat(0.f), splat(float(Type::HighestScale)));
      const Float cost = group_cost<Type, Linear>(x, w, costs.plain, step, inverse, grid.dmin * m);
      const Int better = start ? splat(-1) : cost < least;
      least = select(better, cost, least);
      grid.scales[g] = select(better, s, grid.scales[g]);
      if (!Type::Signed) grid.mins[g] = select(better, m, grid.mins[g]);
    }
  };
  try_scale(scale, 0, 0, true);
  if (Type::Coarse && Weighted) try_scale(-scale, 0, 0, false);  // of 8 levels, 4 are below zero and 3 above
  for (int change = -Reach; change <= Reach; ++change)
    try_scale(scale + float(change), change - Slack, change + Slack, false);
}

// From the grid given; the tile holds ggml's block.
template <class Type, bool Weighted>
void refine(Tile& tile, Grid grid) {
  const Errors ggml = measure<Type, Weighted, true>(tile, tile.grid);
  const Float zero = splat(0.f);
  Float own = select(ggml.own > 0.f, 0.5f / ggml.own, zero);
  const Float plain = Weighted ? zero : select(ggml.plain > 0.f, 0.5f / ggml.plain, zero);
  const Float bound = Margin * (Weighted ? ggml.plain : ggml.own);
  Float least = Margin * (Weighted ? ggml.own : ggml.plain);
  Int improved = splat(0);
  Costs costs;
  for (int round = 0; round < Rounds; ++round) {
    mix<Type, Weighted>(tile, own, plain, costs);
    refit<Type, Type::Absolute && !Weighted>(tile, costs, grid);
    for (int g = 0; g < Type::Groups; ++g) move_group<Type, Weighted>(tile, costs, grid, g);
    const Errors errors = measure<Type, Weighted, false>(tile, grid);
    const Float aim = Weighted ? errors.own : errors.plain;
    const Int room = (Weighted ? errors.plain : errors.own) <= bound, better = room & (aim < least);
    least = select(better, aim, least);
    tile.grid = select_grid<Type>(better, grid, tile.grid);
    improved |= better;
    if (!Weighted) own *= select(room, splat(0.5f), splat(2.f));
  }
  for (int g = 0; g < Type::Groups; ++g) {
    const Float inverse = inverse_of(tile.grid.d * tile.grid.scales[g]), offset = offset_of<Type>(tile.grid, g);
    for (int k = g * Type::Count; k < (g + 1) * Type::Count; ++k)
      tile.codes[k] = select(improved, round_code<Type>(tile.x[k] + offset, inverse), tile.codes[k]);
  }
}

}  // namespace kquants
