// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: a thread searches the block it has in registers, as a lane does in ../ggml_legacy.cpp.
#pragma once
#include "ggml_blocks.cuh"

#include "../ggml_legacy.h"

namespace quantool {

// sum(x^2) / columns of every row, the sum in the order of the columns: a warp reads 8 rows, a thread adds up one.
constexpr int MEAN_ROWS = 8, MEAN_COLUMNS = 128, MEAN_STRIDE = MEAN_COLUMNS / 4 + 1;  // the latter in 16 bytes
constexpr int MEAN_SHARED = MEAN_ROWS * MEAN_STRIDE * 16;

__global__ void __launch_bounds__(32) mean_squares(const uint4* weight, float* mean, int64_t rows, int64_t columns) {
  uint4* tile = reinterpret_cast<uint4*>(shared_memory());
  const int lane = threadIdx.x;
  const int64_t first = (int64_t)blockIdx.x * MEAN_ROWS, units = columns / 4;
  const int here = (int)min((int64_t)MEAN_ROWS, rows - first);
  Float sum = {};
  for (int64_t start = 0; start < units; start += MEAN_COLUMNS / 4) {
    const int count = (int)min((int64_t)(MEAN_COLUMNS / 4), units - start);
#pragma unroll
    for (int r = 0; r < MEAN_ROWS; r++)
      if (r < here && lane < count) tile[r * MEAN_STRIDE + lane] = weight[(first + r) * units + start + lane];
    __syncwarp();
    if (lane < here) {
#pragma unroll 4
      for (int i = 0; i < count; i++) {
        const uint4 v = tile[lane * MEAN_STRIDE + i];
        const Float x[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
        for (int k = 0; k < 4; k++) sum += x[k] * x[k];
      }
    }
    __syncwarp();
  }
  if (lane < here) mean[first + lane] = (sum / Float((float)columns)).value;
}

// The block of this thread, in shared memory: d, m if the type has one, and the words of its codes.
template <class Type>
QUANTOOL_DEVICE void write_block(line::Found& f) {
  Int words[8];
  line::pack<Type>(f.code, words);
  uint16_t* to = reinterpret_cast<uint16_t*>(shared_of_warp() + lane_of_warp() * Type::Bytes);
  to[0] = (uint16_t)lanes::to_half(f.d);
  if (Type::HasMinimum) to[1] = (uint16_t)lanes::to_half(f.m);
  write_words<Type::Words>(to + 1 + Type::HasMinimum, words);
}

template <class Type, bool Weighted, bool Exact>
__global__ void __launch_bounds__(GGML_THREADS)
    quantize_legacy(const uint4* weight, const uint4* importance, const float* mean, uint8_t* out, int64_t blocks,
                    uint32_t per_row) {
  const int64_t first = first_of_warp();
  if (first >= blocks) return;
  line::Tile t;
  load_weights(weight, blocks, t.x);
  if constexpr (Weighted) {
    load_importance(importance, per_row, t.users);
    if constexpr (!Exact) line::count_evenly(line::without(t.users), t.users);
    if constexpr (Type::HasObjective) {
      const int64_t row = min(first + lane_of_warp(), blocks - 1) / per_row;
      line::set_objective<Exact>(t.x, t.users, mean[row], t.objective);
    }
  }
  line::Found f;
  Type::template search<Weighted, Exact>(t, f);
  write_block<Type>(f);
  store_from_shared(out + first * Type::Bytes, (int)min((int64_t)32, blocks - first) * Type::Bytes);
}

}  // namespace quantool
