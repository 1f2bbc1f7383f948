// The two loops of GPTQ over the columns of one block, at most 128: what ../gptq.cpp says, operation by operation.
//
// The weights of a row are in the registers of eight lanes, so that a warp has 4 rows and a block of threads 32:
//
//     lane 0    column 0   column 8    ...   column 120
//     lane 1    column 1   column 9    ...   column 121
//     ...
//     lane 7    column 7   column 15   ...   column 127
//
// The lane whose turn it is rounds its column and sends the error to the other seven, and all of them take it from
// their columns to come. Lanes out of turn round too, for nothing: there is no faster way to wait. More lanes to a row
// would do more of that; with fewer, 4096 rows are too few warps to hide how long a division takes.
//
//     shared memory    the factor F, rows of 128 floats; then, when all rows are done, the results
//                      errors float32 [columns][36], codes uint8 [columns][36]: 32 rows each, written out side by side
//
// Rows past the end compute the last row once more. The intrinsics keep the compiler from joining a product to a sum.
#pragma once
#include "device.cuh"

namespace quantool {

constexpr int GPTQ_COLUMNS = 128, GPTQ_LANES = 8, GPTQ_OWN = GPTQ_COLUMNS / GPTQ_LANES;
constexpr int GPTQ_ROWS = 32, GPTQ_THREADS = GPTQ_ROWS * GPTQ_LANES;
constexpr int GPTQ_PITCH = GPTQ_ROWS + 4;  // of the results: the lanes of a warp write to 32 banks

struct GptqBlock {
  const float* weight;    // [rows, columns]; of the descent the gradient
  const float4* factor;   // [columns, 128]
  const float* scales;    // [rows, num_groups]
  const float* zeros;     // [rows, num_groups]; of the rounding alone
  const uint8_t* before;  // [rows, columns], the codes; of the descent alone
  const int32_t* groups;  // [columns]
  uint8_t* codes;         // [columns, rows]
  float* errors;          // [columns, rows]
  int64_t rows;
  int columns, num_groups;
  float max_code;
};

struct Turn {
  float code, error;
};

// NaN stays, as in torch
QUANTOOL_DEVICE float clamp_code(float code, float max_code) {
  code = code < 0 ? 0 : code;
  return code > max_code ? max_code : code;
}

// The nearest code of w, and how far it is from w.
struct Rounding {
  static QUANTOOL_DEVICE float shift(const GptqBlock& p, int64_t row, int, int group) {
    return p.zeros[row * p.num_groups + group];
  }
  static QUANTOOL_DEVICE float pivot(float diagonal) { return diagonal; }
  static QUANTOOL_DEVICE Turn turn(float w, float scale, float zero, float diagonal, float max_code) {
    const float code = clamp_code(__fadd_rn(rintf(__fdiv_rn(w, scale)), zero), max_code);
    const float rounded = __fmul_rn(__fsub_rn(code, zero), scale);
    return {code == code ? code : 0, __fdiv_rn(__fsub_rn(w, rounded), diagonal)};
  }
};

// The code at the lowest point of its parabola, and what its rounded weight moves by.
struct Descent {
  static QUANTOOL_DEVICE float shift(const GptqBlock& p, int64_t row, int column, int) {
    return (float)p.before[row * p.columns + column];
  }
  static QUANTOOL_DEVICE float pivot(float diagonal) { return diagonal > 0 ? __fdiv_rn(1, diagonal) : 0; }
  static QUANTOOL_DEVICE Turn turn(float gradient, float scale, float old, float inverse, float max_code) {
    const float steps = __fdiv_rn(__fmul_rn(gradient, inverse), scale);
    float code = clamp_code(rintf(__fadd_rn(old, steps)), max_code);
    code = code == code ? code : old;
    return {code, __fmul_rn(__fsub_rn(code, old), scale)};
  }
};

// What the registers of one lane hold: column 8 k + lane in place k.
struct GptqLane {
  float w[GPTQ_OWN];      // the weight; after its turn the error
  float scale[GPTQ_OWN];  // of its group
  float shift[GPTQ_OWN];  // what the turn takes; after it the code
};

// Columns past the end have the last one's. A group that is not there has NaN for a scale: nobody has read the groups
// before, which would have waited for the GPU.
template <class Loop>
QUANTOOL_DEVICE void load_lane(const GptqBlock& p, int64_t row, int lane, GptqLane& own) {
#pragma unroll
  for (int k = 0; k < GPTQ_OWN; k++) {
    const int column = min(GPTQ_LANES * k + lane, p.columns - 1), group = p.groups[column];
    const bool known = (uint32_t)group < (uint32_t)p.num_groups;
    own.w[k] = p.weight[row * p.columns + column];
    own.scale[k] = known ? p.scales[row * p.num_groups + group] : __uint_as_float(0x7fffffffu);
    own.shift[k] = known ? Loop::shift(p, row, column, group) : 0;
  }
}

// All columns in turn.
template <class Loop>
QUANTOOL_DEVICE void walk_columns(const float* factor, int columns, float max_code, int lane, GptqLane& own) {
#pragma unroll
  for (int k = 0; k < GPTQ_OWN; k++) {
    const int first = GPTQ_LANES * k, turns = min(GPTQ_LANES, columns - first);
    const float pivot = Loop::pivot(factor[min(first + lane, columns - 1) * (GPTQ_COLUMNS + 1)]);
#pragma unroll 1
    for (int t = 0; t < turns; t++) {
      const float* row = factor + (first + t) * GPTQ_COLUMNS + lane;
      const Turn mine = Loop::turn(own.w[k], own.scale[k], own.shift[k], pivot, max_code);
      const float error = __shfl_sync(0xffffffffu, mine.error, (threadIdx.x & (32 - GPTQ_LANES)) + t);
      const float left = __fsub_rn(own.w[k], __fmul_rn(row[first], error));
      own.w[k] = lane > t ? left : lane == t ? error : own.w[k];
      own.shift[k] = lane == t ? mine.code : own.shift[k];
#pragma unroll
      for (int m = k + 1; m < GPTQ_OWN; m++)
        own.w[m] = __fsub_rn(own.w[m], __fmul_rn(row[GPTQ_LANES * m], error));
    }
  }
}

// Results by columns, 32 rows of one side by side.
QUANTOOL_DEVICE void store_rows(const GptqBlock& p, int64_t first, int lane, const GptqLane& own) {
  float* errors = reinterpret_cast<float*>(shared_memory());
  uint8_t* codes = reinterpret_cast<uint8_t*>(errors + p.columns * GPTQ_PITCH);
#pragma unroll
  for (int k = 0; k < GPTQ_OWN; k++) {
    const int column = GPTQ_LANES * k + lane, at = column * GPTQ_PITCH + threadIdx.x / GPTQ_LANES;
    if (column < p.columns) errors[at] = own.w[k], codes[at] = (uint8_t)own.shift[k];
  }
  __syncthreads();
  const int64_t row = first + threadIdx.x % GPTQ_ROWS;
  if (row >= p.rows) return;
  for (int column = threadIdx.x / GPTQ_ROWS; column < p.columns; column += GPTQ_THREADS / GPTQ_ROWS) {
    const int at = column * GPTQ_PITCH + threadIdx.x % GPTQ_ROWS;
    p.errors[column * p.rows + row] = errors[at];
    p.codes[column * p.rows + row] = codes[at];
  }
}

template <class Loop>
__global__ void __launch_bounds__(GPTQ_THREADS) gptq_columns(GptqBlock p) {
  const int lane = threadIdx.x % GPTQ_LANES;
  const int64_t first = (int64_t)blockIdx.x * GPTQ_ROWS, row = first + threadIdx.x / GPTQ_LANES;
  float4* factor = reinterpret_cast<float4*>(shared_memory());
#pragma unroll 8
  for (int i = threadIdx.x; i < p.columns * (GPTQ_COLUMNS / 4); i += GPTQ_THREADS) factor[i] = p.factor[i];
  GptqLane own;
  load_lane<Loop>(p, row < p.rows ? row : p.rows - 1, lane, own);
  __syncthreads();
  walk_columns<Loop>(reinterpret_cast<const float*>(factor), p.columns, p.max_code, lane, own);
  __syncthreads();  // nobody needs the factor any more
  store_rows(p, first, lane, own);
}

}  // namespace quantool
