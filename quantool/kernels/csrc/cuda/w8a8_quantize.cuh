// Tokens to int8, one block for each: its range first, then its codes.
//
//   x [tokens, columns] bf16 or fp16  ->  codes int8 [tokens, columns], steps float32 [tokens], zeros int32 [tokens]
//   x = step * (code - zero), with the step and zero point of compressed-tensors (kernels/ops.py, round_input)
//
// The codes are those of the torch reference bit for bit: true divisions, rounding half to even, nothing contracted.
// A token that has a NaN, or an infinite range, gets the step NaN, and with it a row of NaN in the product.
#pragma once
#include "device.cuh"

namespace quantool {

constexpr int QUANTIZE_THREADS = 512;
constexpr int QUANTIZE_WARPS = QUANTIZE_THREADS / 32;

struct Range {
  float low, high;  // at most and at least 0
  float poison;     // NaN after a NaN, else 0
};
constexpr int RANGE_SHARED = QUANTIZE_WARPS * sizeof(Range);

QUANTOOL_DEVICE void include(Range& r, float v) {
  r.low = fminf(r.low, v), r.high = fmaxf(r.high, v);  // both pass over a NaN
  r.poison = v != v ? v : r.poison;
}

QUANTOOL_DEVICE Range join_lanes(Range r) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) {
    r.low = fminf(r.low, __shfl_xor_sync(0xffffffffu, r.low, lanes));
    r.high = fmaxf(r.high, __shfl_xor_sync(0xffffffffu, r.high, lanes));
    r.poison += __shfl_xor_sync(0xffffffffu, r.poison, lanes);
  }
  return r;
}

// The range of what all threads of the block have seen, in every thread.
QUANTOOL_DEVICE Range join_block(Range r) {
  Range* of_warps = reinterpret_cast<Range*>(shared_memory());
  r = join_lanes(r);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = r;
  __syncthreads();
  return join_lanes(of_warps[threadIdx.x % QUANTIZE_WARPS]);
}

// v + NaN where v is infinite or NaN already
QUANTOOL_DEVICE float poison_infinity(float v) { return v + (v - v); }

QUANTOOL_DEVICE uint32_t code_byte(float v) { return (uint32_t)(int)fminf(fmaxf(rintf(v), -128.f), 127.f) & 0xff; }

// f(value) of 8 values in the order of memory, as bytes
template <class Float, class Function>
QUANTOOL_DEVICE uint2 eight_codes(const uint4& values, Function f) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
  uint32_t halves[4];
#pragma unroll
  for (int i = 0; i < 4; i++) halves[i] = code_byte(f(Float::low(words[i]))) | code_byte(f(Float::high(words[i]))) << 8;
  return make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
}

// With `zeros` (asymmetric) there is one block more than tokens: it writes a token of ones, whose products with the
// weights are the sums of their rows, which is what a zero point has to be multiplied by.
// `static_step` and `static_zero` are one number each, for all tokens, or null. columns % 8 == 0.
template <class Float>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    w8a8_quantize(const uint4* __restrict__ x, uint2* __restrict__ codes, float* __restrict__ steps,
                  int32_t* __restrict__ zeros, const float* __restrict__ static_step,
                  const int8_t* __restrict__ static_zero, int tokens, int columns) {
  const int token = blockIdx.x, chunks = columns / 8;
  codes += (int64_t)token * chunks;
  if (token == tokens) {
    for (int c = threadIdx.x; c < chunks; c += QUANTIZE_THREADS) codes[c] = make_uint2(0x01010101, 0x01010101);
    return;
  }
  x += (int64_t)token * chunks;
  Range range = {0, 0, 0};
  for (int c = threadIdx.x; c < chunks; c += QUANTIZE_THREADS) {
    const uint4 values = x[c];
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) include(range, Float::low(words[i])), include(range, Float::high(words[i]));
  }
  range = join_block(range);

  float step, zero = 0;
  if (static_step) {
    step = *static_step == 0 ? 1 : *static_step;
    if (static_zero) zero = *static_zero;
  } else {
    const float span = zeros ? __fsub_rn(range.high, range.low) : fmaxf(-range.low, range.high);
    step = span == 0 ? 1 : __fdiv_rn(span, zeros ? 255.f : 127.5f);
    if (zeros) zero = rintf(__fsub_rn(-128.f, __fdiv_rn(range.low, step)));
  }
  if (threadIdx.x == 0) {
    steps[token] = poison_infinity(step) + range.poison;
    if (zeros) zeros[token] = (int)fminf(fmaxf(zero, -128.f), 127.f);
  }
  for (int c = threadIdx.x; c < chunks; c += QUANTIZE_THREADS)
    codes[c] = eight_codes<Float>(x[c], [=](float v) { return __fadd_rn(__fdiv_rn(v, step), zero); });
}

}  // namespace quantool
