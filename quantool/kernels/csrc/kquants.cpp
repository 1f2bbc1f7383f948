// Rows of float32 to blocks of ggml's Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, for the CPU: `Lanes` super-blocks at once.
//
//     W[256 i + k] ~ d * scales[g] * code - dmin * mins[g]        g = k / Count      Q2_K, Q4_K, Q5_K (affine)
//     W[256 i + k] ~ d * scales[g] * (code - Half)                                   Q3_K, Q6_K (signed)
//
// A tile holds one super-block per lane. First each of its groups is searched for a float scale (and minimum), then the
// scales for d and integers, then the codes are rounded again on the grid that will be stored. That is ggml's own
// result, byte for byte; unless it is asked for, kquants_refine.h goes on from there. What is done with each group
// stands in the headers, for CUDA too.
//
// The oracle is quantool/formats/ggml/kquants.py, equal bit for bit.

#include "kquants_refine.h"

namespace {

using namespace kquants;

struct Problem {
  const float* weight;      // [rows, columns]
  const float* importance;  // [columns] or null
  int64_t super_blocks, per_row;
  bool exact;
  uint8_t* out;
};

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
Grid select_grid(Int mask, const Grid& yes, const Grid& no) {
  Grid grid = no;
  grid.d = select(mask, yes.d, no.d);
  if (!Type::Signed) grid.dmin = select(mask, yes.dmin, no.dmin);
  for (int g = 0; g < Type::Groups; ++g) {
    grid.scales[g] = select(mask, yes.scales[g], no.scales[g]);
    if (!Type::Signed) grid.mins[g] = select(mask, yes.mins[g], no.mins[g]);
  }
  return grid;
}

template <class Type>
Line line_of(const Grid& grid, int g) {
  return kquants::line_of<Type>(grid.d, grid.dmin, grid.scales[g], grid.mins[g]);
}

template <class Type, bool Weighted>
void weigh(Tile& tile) {
  Float variance = splat(0.f);
  if (NeedsVariance<Type, Weighted>) variance = variance_of<Type>(square_sum<SuperBlock>(tile.x, variance));
  for (int k = 0; k < SuperBlock; k += Type::Count)
    kquants::weigh<Type, Weighted>(tile.x + k, tile.importance + k, variance, tile.weight + k);
}

// d, dmin and the integers for the float scales and mins of all groups.
template <class Type, bool Weighted>
Grid scale_groups(const Float* scales, const Float* mins, const Float* weights, bool exact) {
  Grid grid;
  grid.d = store_half(affine_integers<Type, Weighted>(scales, weights, grid.scales), exact);
  grid.dmin = store_half(affine_integers<Type, Weighted>(mins, weights, grid.mins), exact);
  return grid;
}

// ggml's grid and codes in the tile. The result is where the default search starts: there too, but without ggml's
// mishap with negative scales.
template <class Type, bool Weighted>
Grid quantize_affine(Tile& tile, bool exact) {
  constexpr int Groups = Type::Groups, Count = Type::Count;
  Affine found[Groups];
  Float scales[Groups], mins[Groups], weights[Groups];
  Int negative = splat(0);
  for (int g = 0; g < Groups; ++g) {
    found[g] = search_group<Type, Weighted>(tile.x + g * Count, tile.weight + g * Count);
    scales[g] = found[g].scale;
    mins[g] = found[g].min;
    weights[g] = total<Count>(tile.weight + g * Count);
    negative |= scales[g] < 0.f;
  }
  tile.grid = scale_groups<Type, Weighted>(scales, mins, weights, exact);
  for (int g = 0; g < Groups; ++g) {
    const Line line = line_of<Type>(tile.grid, g);
    requantize_affine<Type>(tile.x + g * Count, found[g], line.step, line.offset, tile.codes + g * Count);
  }
  if (exact || !any(negative)) return tile.grid;
  for (int g = 0; g < Groups; ++g) scales[g] = maximum(scales[g], splat(0.f));
  return select_grid<Type>(negative, scale_groups<Type, Weighted>(scales, mins, weights, exact), tile.grid);
}

template <class Type, bool Weighted>
Grid quantize_signed(Tile& tile, bool exact) {
  constexpr int Groups = Type::Groups, Count = Type::Count, Chains = 4;
  Float scales[Groups], weights[Groups];
  for (int g = 0, k = 0; g < Groups; g += Chains, k += Chains * Count)
    search_groups<Type, Weighted, Chains>(tile.x + k, tile.weight + k, tile.codes + k, scales + g);
  for (int g = 0; g < Groups; ++g) weights[g] = total<Count>(tile.weight + g * Count);
  Int zero;
  tile.grid.d = store_half(signed_integers<Type, Weighted>(scales, weights, tile.grid.scales, zero), exact);
  for (int g = 0; g < Groups; ++g)
    requantize_signed<Type>(tile.x + g * Count, tile.grid.d * tile.grid.scales[g], zero, tile.codes + g * Count);
  return tile.grid;
}

template <class Type, bool Weighted>
Errors measure(const Tile& tile, const Grid& grid, const Float* codes) {
  Errors sum = {splat(0.f), splat(0.f)};
  for (int g = 0, k = 0; g < Type::Groups; ++g, k += Type::Count)
    sum.add(group_errors<Type, Weighted>(tile.x + k, tile.weight + k, tile.importance + k, codes ? codes + k : nullptr,
                                         line_of<Type>(grid, g)));
  return sum;
}

// From the grid given; the tile holds ggml's block.
template <class Type, bool Weighted>
void refine(Tile& tile, Grid grid) {
  constexpr int Groups = Type::Groups, Count = Type::Count;
  const Float zero = splat(0.f);
  Aims<Weighted> aims(measure<Type, Weighted>(tile, tile.grid, tile.codes));
  Int improved = splat(0);
  Float cost[SuperBlock];
  for (int round = 0; round < Rounds; ++round) {
    Normal sums = {zero, zero, zero, zero, zero};
    const Float plain = aims.plain;
    for (int g = 0, k = 0; g < Groups; ++g, k += Count) {
      mix<Type, Weighted>(tile.weight + k, aims, cost + k);
      sums.add(group_normal<Type, Linear<Type, Weighted>>(tile.x + k, cost + k, plain, line_of<Type>(grid, g),
                                                         grid.scales[g], grid.mins[g]));
    }
    refit<Type>(sums, grid.d, grid.dmin);
    for (int g = 0, k = 0; g < Groups; ++g, k += Count)
      move_group<Type, Weighted>(tile.x + k, cost + k, plain, grid.d, grid.dmin, grid.scales[g], grid.mins[g]);
    const Int better = aims.better(measure<Type, Weighted>(tile, grid, nullptr));
    tile.grid = select_grid<Type>(better, grid, tile.grid);
    improved |= better;
  }
  for (int g = 0, k = 0; g < Groups; ++g, k += Count) {
    Float codes[Count];
    round_again<Type>(tile.x + k, line_of<Type>(tile.grid, g), codes);
    for (int i = 0; i < Count; ++i) tile.codes[k + i] = select(improved, codes[i], tile.codes[k + i]);
  }
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

template <class Type, bool Weighted>
void quantize_tile(const Problem& p, int64_t first, Tile& tile) {
  const float *x[Lanes], *importance[Lanes];
  const int64_t count = std::min<int64_t>(Lanes, p.super_blocks - first);
  for (int lane = 0; lane < Lanes; ++lane) {
    const int64_t block = first + std::min<int64_t>(lane, count - 1);  // lanes past the end repeat the last
    x[lane] = p.weight + block * SuperBlock;
    importance[lane] = p.importance + block % p.per_row * SuperBlock;
  }
  load_transposed(x, SuperBlock, tile.x);
  if (Weighted) load_transposed(importance, SuperBlock, tile.importance);
  weigh<Type, Weighted>(tile);
  Grid start;
  if constexpr (Type::Signed)
    start = quantize_signed<Type, Weighted>(tile, p.exact);
  else
    start = quantize_affine<Type, Weighted>(tile, p.exact);
  if (!p.exact) refine<Type, Weighted>(tile, start);
  for (int lane = 0; lane < count; ++lane)
    Type::template pack<1>(p.out + (first + lane) * Type::Bytes, fields_of<Type>(tile, lane), 0);
}

template <class Type, bool Weighted>
void quantize_tiles(int64_t begin, int64_t end, void* problem) {
  Tile tile;
  for (int64_t t = begin; t < end; ++t)
    quantize_tile<Type, Weighted>(*static_cast<const Problem*>(problem), t * Lanes, tile);
}

template <class Type>
int32_t quantize(const float* weight, const float* importance, int64_t rows, int64_t columns, int32_t exact,
                 uint8_t* blocks) {
  const int64_t per_row = columns / SuperBlock;
  Problem p{weight, importance, rows * per_row, per_row, exact != 0, blocks};
  const auto run = importance ? quantize_tiles<Type, true> : quantize_tiles<Type, false>;
  return torch_parallel_for(0, (p.super_blocks + Lanes - 1) / Lanes, 1, run, &p);
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
