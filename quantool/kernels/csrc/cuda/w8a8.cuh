// The end of every int8 product: scales of tokens and of rows, zero points, bias, one rounding.
//
//   y[m, n] = step[m] * (sum over k of (code[m, k] - zero[m]) * weight[n, k]) * scale[n] + bias[n]
//
// All in float32 from the exact int32 sum on.
#pragma once
#include "device.cuh"

namespace quantool {

// Numbers of a dtype known at run time: 0 bf16, 1 fp16, 2 float32.
QUANTOOL_DEVICE float number(const void* numbers, int64_t i, int dtype) {
  if (dtype == 2) return static_cast<const float*>(numbers)[i];
  const uint32_t bits = static_cast<const uint16_t*>(numbers)[i];
  return dtype == 0 ? BF16::low(bits) : FP16::low(bits);
}

struct Scaling {
  const float* steps;  // [tokens]
  const void* scales;  // [rows] of scale_dtype
  const void* bias;    // [rows] of bias_dtype, or null
  void* y;             // [tokens, rows] of dtype
  int dtype, scale_dtype, bias_dtype;
};

// What two neighbouring rows are scaled by and end with
struct RowPair {
  float scale[2], bias[2];
};

QUANTOOL_DEVICE RowPair load_rows(const Scaling& from, int row) {
  RowPair pair = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    pair.scale[i] = number(from.scales, row + i, from.scale_dtype);
    if (from.bias) pair.bias[i] = number(from.bias, row + i, from.bias_dtype);
  }
  return pair;
}

// y[at], y[at + 1] (at is even) from their sums, which have the token's step in them
QUANTOOL_DEVICE void store_rows(const Scaling& to, const RowPair& pair, int64_t at, float even, float odd) {
  even = even * pair.scale[0] + pair.bias[0], odd = odd * pair.scale[1] + pair.bias[1];
  static_cast<uint32_t*>(to.y)[at / 2] = to.dtype == 0 ? BF16::pair(even, odd) : FP16::pair(even, odd);
}

}  // namespace quantool
