// The two loops of GPTQ over the columns of one block, for the CPU.
//
// Rounding (Frantar et al. 2022, algorithm 1), where W is the weight and F the Cholesky factor U of the inverse Hessian:
//
//     for i in 0..B:   code_i = clamp(round(w_i / s_i) + z_i, 0, max_code)
//                      e_i    = (w_i - (code_i - z_i) s_i) / F[i, i]
//                      w_j   -= e_i F[i, j]                              for every j > i
//
// Descent, where W is the gradient (weight - rounded weight) H of the squared error and F the Hessian H itself:
//
//     for i in 0..B:   code_i = clamp(round(code_i + w_i / (F[i, i] s_i)), 0, max_code)
//                      e_i    = (the new code_i - the old) s_i
//                      w_j   -= e_i F[i, j]                              for every j > i
//
// Rows of W know nothing of each other, so the innermost loop runs over rows, `Tile` at a time, and tiles are shared
// out over torch's threads. A column is updated only when its turn comes, from all errors before it (left-looking),
// which keeps it in registers; the order of the additions to each weight is that of the loops above. With no fused
// multiply-add (-ffp-contract=off) every code and error is bit for bit that of the torch references in gptq_ops.py.
//
//     tile     column 0 | column 1 | ... | column B-1        each of `Tile` rows: errors up to i, weights from there on
//     factor   row j holds F[0, j] F[1, j] ... F[j, j]       F transposed, so that a column's factors are contiguous

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/c/shim.h>  // torch_parallel_for: torch's own threads, in torch 2.10 and later

namespace {

#if defined(__AVX512F__)
constexpr int Lanes = 16, Accumulators = 4;
#elif defined(__AVX__)
constexpr int Lanes = 8, Accumulators = 8;
#else
constexpr int Lanes = 4, Accumulators = 8;
#endif
constexpr int64_t Tile = Lanes * Accumulators;
constexpr int64_t CacheLine = 64 / sizeof(float);

typedef float Vector __attribute__((vector_size(Lanes * sizeof(float)), may_alias));

struct alignas(64) Column {
  float row[Tile];
};

struct Problem {
  const float* weight;  // [rows, columns], rows `weight_stride` apart
  int64_t weight_stride;
  const float* factor;  // [columns, columns]
  const float* scales;  // [rows, num_groups]
  const float* zeros;   // [rows, num_groups]; null in the descent
  int64_t num_groups;
  const int32_t* groups;  // [columns]
  int64_t rows, columns;
  float max_code;
  uint8_t* codes;  // [columns, rows]; the descent starts from what is there
  float* errors;   // [columns, rows]
};

// W[first : first + count] transposed; rows past the end are zeros.
void load(const Problem& p, int64_t first, int64_t count, Column* tile) {
  for (int64_t start = 0; start < p.columns; start += CacheLine)
    for (int64_t r = 0; r < Tile; ++r)
      for (int64_t j = start; j < std::min(start + CacheLine, p.columns); ++j)
        tile[j].row[r] = r < count ? p.weight[(first + r) * p.weight_stride + j] : 0;
}

// w_j - sum_{i < j} e_i U[i, j]
Column update(const Column* tile, const float* factor, int64_t j) {
  Column column = tile[j];
  Vector* w = reinterpret_cast<Vector*>(column.row);
  for (int64_t i = 0; i < j; ++i) {
    const Vector* e = reinterpret_cast<const Vector*>(tile[i].row);
    for (int a = 0; a < Accumulators; ++a) w[a] -= e[a] * factor[i];
  }
  return column;
}

struct Grid {
  Column scale, zero;
  int32_t group = -1;
};

// The scales and zeros of the rows of a tile for column j; of rows past the end, 1 and 0.
void find_grid(const Problem& p, int64_t first, int64_t count, int64_t j, Grid* grid) {
  if (p.groups[j] == grid->group) return;
  grid->group = p.groups[j];
  for (int64_t r = 0; r < Tile; ++r) {
    const int64_t at = (first + r) * p.num_groups + grid->group;
    grid->scale.row[r] = r < count ? p.scales[at] : 1;
    grid->zero.row[r] = r < count && p.zeros ? p.zeros[at] : 0;
  }
}

void quantize_tile(const Problem& p, int64_t first, int64_t count, Column* tile) {
  load(p, first, count, tile);
  Grid grid;
  for (int64_t j = 0; j < p.columns; ++j) {
    find_grid(p, first, count, j, &grid);
    const float* factor = p.factor + j * p.columns;
    const float diagonal = factor[j], max_code = p.max_code;
    const Column w = update(tile, factor, j);
    Column e;
    uint8_t code[Tile];
    for (int64_t r = 0; r < Tile; ++r) {
      const float scale = grid.scale.row[r], zero = grid.zero.row[r];
      float q = std::nearbyint(w.row[r] / scale) + zero;
      q = q < 0 ? 0 : q;  // these two let NaN pass
      q = q > max_code ? max_code : q;
      e.row[r] = (w.row[r] - (q - zero) * scale) / diagonal;
      code[r] = static_cast<uint8_t>(static_cast<int32_t>(q == q ? q : 0));
    }
    tile[j] = e;
    std::copy_n(e.row, count, p.errors + j * p.rows + first);
    std::copy_n(code, count, p.codes + j * p.rows + first);
  }
}

void descend_tile(const Problem& p, int64_t first, int64_t count, Column* tile) {
  load(p, first, count, tile);
  Grid grid;
  for (int64_t j = 0; j < p.columns; ++j) {
    find_grid(p, first, count, j, &grid);
    const float* factor = p.factor + j * p.columns;
    const float inverse = factor[j] > 0 ? 1 / factor[j] : 0, max_code = p.max_code;
    const Column w = update(tile, factor, j);
    Column e;
    uint8_t code[Tile] = {};
    std::copy_n(p.codes + j * p.rows + first, count, code);
    for (int64_t r = 0; r < Tile; ++r) {
      const float old = code[r];
      float q = std::nearbyint(old + w.row[r] * inverse / grid.scale.row[r]);
      q = q < 0 ? 0 : q;  // these two let NaN pass
      q = q > max_code ? max_code : q;
      q = q == q ? q : old;
      e.row[r] = (q - old) * grid.scale.row[r];
      code[r] = static_cast<uint8_t>(static_cast<int32_t>(q));
    }
    tile[j] = e;
    std::copy_n(e.row, count, p.errors + j * p.rows + first);
    std::copy_n(code, count, p.codes + j * p.rows + first);
  }
}

template <void (*one_tile)(const Problem&, int64_t, int64_t, Column*)>
void over_tiles(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  std::vector<Column> tile(p.columns);
  for (int64_t t = begin; t < end; ++t) one_tile(p, t * Tile, std::min(Tile, p.rows - t * Tile), tile.data());
}

}  // namespace

// What the pointers hold is said at Problem. Both return 0, or torch's error code.
extern "C" int32_t quantool_gptq_columns(const float* weight, int64_t weight_stride, const float* factor,
                                         const float* scales, const float* zeros, int64_t num_groups,
                                         const int32_t* groups, int64_t rows, int64_t columns, int64_t max_code,
                                         uint8_t* codes, float* errors) {
  Problem p{weight, weight_stride, factor,  scales, zeros, num_groups, groups,
            rows,   columns,       static_cast<float>(max_code), codes, errors};
  return torch_parallel_for(0, (rows + Tile - 1) / Tile, 1, over_tiles<quantize_tile>, &p);
}

extern "C" int32_t quantool_descend_columns(const float* gradient, int64_t gradient_stride, const float* hessian,
                                            const float* scales, int64_t num_groups, const int32_t* groups,
                                            int64_t rows, int64_t columns, int64_t max_code, uint8_t* codes,
                                            float* moves) {
  Problem p{gradient, gradient_stride, hessian, scales, nullptr, num_groups, groups,
            rows,     columns,         static_cast<float>(max_code), codes, moves};
  return torch_parallel_for(0, (rows + Tile - 1) / Tile, 1, over_tiles<descend_tile>, &p);
}
