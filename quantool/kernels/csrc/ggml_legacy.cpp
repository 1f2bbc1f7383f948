// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: formats/ggml/legacy.py compiled, bit for bit. The searches are in ggml_legacy.h.

#include "ggml_legacy.h"

#include <vector>

#include "ggml_tiles.h"

namespace {

using namespace line;

template <class Type>
void store(const Problem& p, int64_t first, Found& f) {
  Int words[8];
  pack<Type>(f.code, words);
  const Int d = to_half(f.d), m = Type::HasMinimum ? to_half(f.m) : Int{};
  const int64_t count = std::min<int64_t>(Lanes, p.rows * p.columns / Block - first);
  for (int lane = 0; lane < count; ++lane) {
    uint8_t* out = p.blocks + (first + lane) * Type::Bytes;
    store_half(d, lane, out);
    if (Type::HasMinimum) store_half(m, lane, out + 2);
    store_words(words, Type::Words, lane, out + Type::Bytes - 4 * Type::Words);
  }
}

template <class Type, bool Weighted, bool Exact>
void quantize_tiles(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  const int64_t per_row = p.columns / Block;
  Tile t;
  Found f;
  for (int64_t first = begin * Lanes; first < end * Lanes; first += Lanes) {
    load<Block>(p, first, t.x);
    if (Weighted) {
      load_importance<Block>(p, first, t.users);
      if (!Exact) count_evenly(without(t.users), t.users);
      if (Type::HasObjective) {
        Float mean;
        for (int lane = 0; lane < Lanes; ++lane) mean[lane] = p.mean[std::min((first + lane) / per_row, p.rows - 1)];
        set_objective<Exact>(t.x, t.users, mean, t.objective);
      }
    }
    Type::template search<Weighted, Exact>(t, f);
    store<Type>(p, first, f);
  }
}

void mean_squares(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  Float x[Block];
  for (int64_t row = begin * Lanes; row < std::min(end * Lanes, p.rows); row += Lanes) {
    Float sum = {};
    const float* source[Lanes];
    for (int64_t column = 0; column < p.columns; column += Block) {
      for (int lane = 0; lane < Lanes; ++lane)
        source[lane] = p.weight + std::min(row + lane, p.rows - 1) * p.columns + column;
      load_columns<Block>(source, x);
      for (int k = 0; k < Block; ++k) sum += x[k] * x[k];
    }
    sum = sum / splat(float(p.columns));
    for (int lane = 0; lane < Lanes && row + lane < p.rows; ++lane) p.mean[row + lane] = sum[lane];
  }
}

template <class Type>
int32_t quantize(const float* weight, const float* importance, int64_t rows, int64_t columns, int32_t exact,
                 uint8_t* blocks) {
  Problem p{weight, importance, rows, columns, blocks, nullptr};
  std::vector<float> mean;
  if (importance != nullptr && Type::HasObjective) {
    mean.resize(rows);
    p.mean = mean.data();
    const int32_t code = torch_parallel_for(0, (rows + Lanes - 1) / Lanes, 1, mean_squares, &p);
    if (code) return code;
  }
  return with_flags(importance != nullptr, exact != 0, [&](auto weighted, auto exactly) {
    const int64_t tiles = (rows * columns / Block + Lanes - 1) / Lanes;
    return torch_parallel_for(0, tiles, 64, quantize_tiles<Type, weighted, exactly>, &p);
  });
}

}  // namespace

// 0, or torch's error code: W [rows, columns], importance [columns] or null, blocks [rows, bytes].
#define QUANTOOL_LEGACY(name, Type)                                                                                 \
  extern "C" int32_t quantool_quantize_##name(const float* weight, const float* importance, int64_t rows,           \
                                              int64_t columns, int32_t exact, uint8_t* blocks) {                    \
    return quantize<Type>(weight, importance, rows, columns, exact, blocks);                                        \
  }

QUANTOOL_LEGACY(q4_0, SymmetricType<8>)
QUANTOOL_LEGACY(q4_1, AffineType<15>)
QUANTOOL_LEGACY(q5_0, SymmetricType<16>)
QUANTOOL_LEGACY(q5_1, AffineType<31>)
QUANTOOL_LEGACY(q8_0, Q8Type)
