// Rows of float32 to blocks of ggml's Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, for the CPU: `Lanes` super-blocks at once.
//
//     W[256 i + k] ~ d * scales[g] * code - dmin * mins[g]        g = k / Count      Q2_K, Q4_K, Q5_K (affine)
//     W[256 i + k] ~ d * scales[g] * (code - Half)                                   Q3_K, Q6_K (signed)
//
// A tile holds one super-block per lane. First each of its groups is searched for a float scale (and minimum), then the
// scales for d and integers, then the codes are rounded again on the grid that will be stored. That is ggml's own
// result, byte for byte; unless it is asked for, kquants_refine.h goes on from there.
//
// The oracle is quantool/formats/ggml/kquants.py, equal bit for bit.

#include "kquants_pack.h"
#include "kquants_refine.h"
#include "kquants_search.h"
#include "kquants_tile.h"

namespace {

using namespace kquants;

struct Problem {
  const float* weight;      // [rows, columns]
  const float* importance;  // [columns] or null
  int64_t super_blocks, per_row;
  bool exact;
  uint8_t* out;
};

// float16, where ggml overflows to infinity and a finite number serves better.
Float store_half(Float v, bool exact) { return exact ? round_to_half(v) : finite_half(v); }

Float square_sum(const Float* x, int count) {
  Float sum = splat(0.f);
  for (int k = 0; k < count; ++k) sum += x[k] * x[k];
  return sum;
}

// ggml's weights with importance: importance * sqrt(mean square * factor + x^2). Q6_K takes the importance itself.
template <class Type>
void weigh_by_importance(Tile& tile) {
  const Float variance = Type::VarianceFactor * square_sum(tile.x, SuperBlock) / float(SuperBlock);
  for (int k = 0; k < SuperBlock; ++k)
    tile.weight[k] = tile.importance[k] * sqrt(variance + tile.x[k] * tile.x[k]);
}

// ggml's own weights without: |x|, to which Q4_K and Q5_K add the root mean square of the group.
template <class Type>
void weigh_by_magnitude(Tile& tile) {
  for (int g = 0; g < Type::Groups; ++g) {
    const Float* x = tile.x + g * Type::Count;
    const Float mean = !Type::Absolute ? sqrt(square_sum(x, Type::Count) / float(Type::Count)) : splat(0.f);
    for (int k = 0; k < Type::Count; ++k) tile.weight[g * Type::Count + k] = mean + absolute(x[k]);
  }
}

Float group_weight(const Float* w, int count) {
  Float sum = splat(0.f);
  for (int k = 0; k < count; ++k) sum += w[k];
  return sum;
}

// x >= 0 over their largest as integers, without importance. ggml keeps them in a byte, which matters where 1 / max is
// infinite.
template <int Groups, int MaxScale>
Float scale_to_largest(const Float* x, Float* codes) {
  Float max = splat(0.f);
  for (int g = 0; g < Groups; ++g) max = maximum(x[g], max);
  const Float inverse = select(max > 0.f, float(MaxScale) / max, splat(0.f));
  for (int g = 0; g < Groups; ++g) codes[g] = to_float(minimum(nearest(inverse * x[g]) & 255, splat(MaxScale)));
  return max / float(MaxScale);
}

template <class Type>
void search_groups(const Tile& tile, Affine* found, bool weighted) {
  for (int g = 0; g < Type::Groups; ++g) {
    const Float *x = tile.x + g * Type::Count, *w = tile.weight + g * Type::Count;
    found[g] = weighted ? search_affine<Type::Count, Type::Highest, false>(x, w, Weighted)
                        : search_affine<Type::Count, Type::Highest, Type::Absolute>(x, w, Type::Plain);
  }
}

// d, dmin and the integers for them. `positive` takes negative scales for zero, which ggml does not.
template <class Type>
Grid scale_groups(const Tile& tile, const Affine* found, bool weighted, bool exact, bool positive) {
  Float scales[Type::Groups], mins[Type::Groups], weights[Type::Groups];
  for (int g = 0; g < Type::Groups; ++g) {
    scales[g] = positive ? maximum(found[g].scale, splat(0.f)) : found[g].scale;
    mins[g] = found[g].min;
    weights[g] = group_weight(tile.weight + g * Type::Count, Type::Count);
  }
  Grid grid;
  if (weighted) {
    grid.d = search_positive<Type::Groups, Type::HighestScale>(scales, weights, grid.scales);
    grid.dmin = search_positive<Type::Groups, Type::HighestScale>(mins, weights, grid.mins);
  } else {
    grid.d = scale_to_largest<Type::Groups, Type::HighestScale>(scales, grid.scales);
    grid.dmin = scale_to_largest<Type::Groups, Type::HighestScale>(mins, grid.mins);
  }
  grid.d = store_half(grid.d, exact);
  grid.dmin = store_half(grid.dmin, exact);
  return grid;
}

// ggml's grid and codes in the tile. The result is where the default search starts: there too, but without ggml's
// mishap with negative scales.
template <class Type>
Grid quantize_affine(Tile& tile, bool weighted, bool exact) {
  if (weighted)
    weigh_by_importance<Type>(tile);
  else
    weigh_by_magnitude<Type>(tile);
  Affine found[Type::Groups];
  search_groups<Type>(tile, found, weighted);
  tile.grid = scale_groups<Type>(tile, found, weighted, exact, false);
  Int negative = splat(0);
  for (int g = 0; g < Type::Groups; ++g) {
    negative |= found[g].scale < 0.f;
    const Float d = tile.grid.d * tile.grid.scales[g], min = tile.grid.dmin * tile.grid.mins[g];
    const Int none = d == 0.f;  // the codes count for nothing; ggml leaves those of the search
    for (int k = g * Type::Count; k < (g + 1) * Type::Count; ++k) {
      const Int code = clamp(nearest((tile.x[k] + min) / d), splat(0), splat(Type::Highest));
      const Float searched = affine_code(tile.x[k], found[g].inverse, found[g].code_base, Type::Highest);
      tile.codes[k] = select(none, searched, to_float(code));
    }
  }
  if (exact || !any(negative)) return tile.grid;
  return select_grid<Type>(negative, scale_groups<Type>(tile, found, weighted, exact, true), tile.grid);
}

// Whether the largest scale leaves nothing of a block: Q3_K without importance asks for zero itself.
template <class Type>
Int is_zero(Float largest) { return Type::Coarse ? largest == 0.f : absolute(largest) < Epsilon; }

// The largest scale of Q3_K and Q6_K becomes -MaxScale, without importance (Q6_K: always).
template <class Type>
Float scale_to_signed_largest(const Float* scales, Float* codes) {
  const Float max = signed_max<Type::Groups>(scales), inverse = float(Type::LowestScale) / max;
  for (int g = 0; g < Type::Groups; ++g)
    codes[g] = to_float(clamp(nearest(inverse * scales[g]), splat(Type::LowestScale), splat(Type::HighestScale)));
  return select(is_zero<Type>(max), splat(0.f), 1.f / inverse);
}

// The scales of all groups; tile.codes as the search leaves them.
template <class Type>
void search_signed_groups(Tile& tile, Float* scales) {
  for (int g = 0; g < Type::Groups; ++g) {
    const Float *x = tile.x + g * Type::Count, *w = tile.weight + g * Type::Count;
    const Signed found = search_signed<Type::Count, -Type::Lowest>(x, w);
    scales[g] = found.scale;
    for (int k = 0; k < Type::Count; ++k)
      tile.codes[g * Type::Count + k] = signed_code(x[k], found.inverse, -Type::Lowest);
  }
}

template <class Type>
void descend_signed_groups(Tile& tile, Float* scales) {
  constexpr int Chains = 4;
  for (int g = 0; g < Type::Groups; g += Chains) {
    const int k = g * Type::Count;
    descend_signed<Type::Count, -Type::Lowest, Chains>(tile.x + k, tile.weight + k, tile.codes + k, scales + g);
  }
}

// d and the integer scales of Q3_K with importance: searched as the weights are.
template <class Type>
void search_scale_of_scales(Tile& tile, const Float* scales) {
  Float weights[Type::Groups];
  for (int g = 0; g < Type::Groups; ++g) weights[g] = group_weight(tile.weight + g * Type::Count, Type::Count);
  const Signed found = search_signed<Type::Groups, -Type::LowestScale>(scales, weights);
  for (int g = 0; g < Type::Groups; ++g) tile.grid.scales[g] = signed_code(scales[g], found.inverse, -Type::LowestScale);
  tile.grid.d = found.scale;
}

// The codes on the stored grid; where a step is 0 they count for nothing, and ggml leaves those of the search, or zero
// bits: the lowest level.
template <class Type>
void requantize_signed(Tile& tile, Int zero) {
  const Float lowest = splat(float(Type::Lowest));
  for (int g = 0; g < Type::Groups; ++g) {
    const Float d = tile.grid.d * tile.grid.scales[g];
    const Int none = d == 0.f;
    const Int bare = (Type::Coarse ? splat(0) : zero) |
                     (absolute(signed_max<Type::Count>(tile.x + g * Type::Count)) < Epsilon);
    for (int k = g * Type::Count; k < (g + 1) * Type::Count; ++k) {
      const Int code = clamp(nearest(tile.x[k] / d), splat(Type::Lowest), splat(Type::Highest));
      tile.codes[k] = select(none, select(bare, lowest, tile.codes[k]), to_float(code));
    }
  }
}

template <class Type>
Grid quantize_signed(Tile& tile, bool weighted, bool exact) {
  if (weighted && Type::Coarse)
    weigh_by_importance<Type>(tile);
  else
    for (int k = 0; k < SuperBlock; ++k) tile.weight[k] = weighted ? tile.importance[k] : tile.x[k] * tile.x[k];
  Float scales[Type::Groups];
  if (Type::Coarse && !weighted)
    descend_signed_groups<Type>(tile, scales);
  else
    search_signed_groups<Type>(tile, scales);
  if (Type::Coarse && weighted)
    search_scale_of_scales<Type>(tile, scales);
  else
    tile.grid.d = scale_to_signed_largest<Type>(scales, tile.grid.scales);
  tile.grid.d = store_half(tile.grid.d, exact);
  const Float largest = signed_max<Type::Groups>(scales);
  const Int zero = weighted ? absolute(largest) < Epsilon : is_zero<Type>(largest);
  const Float stored_as_zero = splat(Type::Coarse ? float(Type::LowestScale) : 0.f);
  for (int g = 0; g < Type::Groups; ++g) tile.grid.scales[g] = select(zero, stored_as_zero, tile.grid.scales[g]);
  requantize_signed<Type>(tile, zero);
  return tile.grid;
}

template <class Type>
Fields fields_of(const Tile& tile, int lane) {
  constexpr int add_code = -Type::Lowest, add_scale = Type::Coarse ? -Type::LowestScale : 0;
  Fields f;
  for (int k = 0; k < SuperBlock; ++k)
    f.codes[k] = static_cast<uint8_t>(static_cast<int>(tile.codes[k][lane]) + add_code);
  for (int g = 0; g < Type::Groups; ++g) {
    f.scales[g] = static_cast<uint8_t>(static_cast<int>(tile.grid.scales[g][lane]) + add_scale);
    if constexpr (!Type::Signed) f.mins[g] = static_cast<uint8_t>(static_cast<int>(tile.grid.mins[g][lane]));
  }
  f.d = static_cast<uint16_t>(to_half(tile.grid.d)[lane]);
  if constexpr (!Type::Signed) f.dmin = static_cast<uint16_t>(to_half(tile.grid.dmin)[lane]);
  return f;
}

template <class Type>
void quantize_tile(const Problem& p, int64_t first, Tile& tile) {
  const float *x[Lanes], *importance[Lanes];
  const int64_t count = std::min<int64_t>(Lanes, p.super_blocks - first);
  for (int lane = 0; lane < Lanes; ++lane) {
    const int64_t block = first + std::min<int64_t>(lane, count - 1);  // lanes past the end repeat the last
    x[lane] = p.weight + block * SuperBlock;
    importance[lane] = p.importance + block % p.per_row * SuperBlock;
  }
  load_transposed(x, SuperBlock, tile.x);
  const bool weighted = p.importance != nullptr;
  if (weighted) load_transposed(importance, SuperBlock, tile.importance);
  Grid start;
  if constexpr (Type::Signed)
    start = quantize_signed<Type>(tile, weighted, p.exact);
  else
    start = quantize_affine<Type>(tile, weighted, p.exact);
  if (!p.exact) weighted ? refine<Type, true>(tile, start) : refine<Type, false>(tile, start);
  for (int lane = 0; lane < count; ++lane) Type::pack(p.out + (first + lane) * Type::Bytes, fields_of<Type>(tile, lane));
}

template <class Type>
void quantize_tiles(int64_t begin, int64_t end, void* problem) {
  Tile tile;
  for (int64_t t = begin; t < end; ++t) quantize_tile<Type>(*static_cast<const Problem*>(problem), t * Lanes, tile);
}

template <class Type>
int32_t quantize(const float* weight, const float* importance, int64_t rows, int64_t columns, int32_t exact,
                 uint8_t* blocks) {
  const int64_t per_row = columns / SuperBlock;
  Problem p{weight, importance, rows * per_row, per_row, exact != 0, blocks};
  return torch_parallel_for(0, (p.super_blocks + Lanes - 1) / Lanes, 1, quantize_tiles<Type>, &p);
}

}  // namespace

// 0, or torch's error code: see kernels/ggml.py.
#define QUANTOOL_QUANTIZE(name, Type)                                                                              \
  extern "C" int32_t quantool_quantize_##name(const float* weight, const float* importance, int64_t rows,          \
                                              int64_t columns, int32_t exact, uint8_t* blocks) {                   \
    return quantize<Type>(weight, importance, rows, columns, exact, blocks);                                       \
  }

QUANTOOL_QUANTIZE(q2_k, Q2K)
QUANTOOL_QUANTIZE(q3_k, Q3K)
QUANTOOL_QUANTIZE(q4_k, Q4K)
QUANTOOL_QUANTIZE(q5_k, Q5K)
QUANTOOL_QUANTIZE(q6_k, Q6K)
