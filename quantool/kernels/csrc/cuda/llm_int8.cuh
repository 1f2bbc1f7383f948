// LLM.int8() (Dettmers et al. 2022, section 3): input channels in which any token is large are multiplied in float.
//
//   y[m, n] = scale[n] * (step[m] * sum over other k of code[m, k] * weight[n, k]
//                         + sum over outlier columns k of x[m, k] * weight[n, k]) + bias[n]
//
// Which columns those are, the host never learns: a bit for each column, then a list of the columns in order with its
// length at the end, all on the device. So nothing waits, and a CUDA graph may record it.
//
//   llm_int8_outliers   x                          -> outliers uint8 [columns / 8], bit k % 8 of byte k / 8 is column k
//   llm_int8_quantize   x, outliers                -> codes, steps (0 in outlier columns), found int32 [columns + 1]
//   w8a8_gemm           codes, weight              -> products, exact
//   llm_int8_finish     products, x, weight, found -> y
//
// Tokens are rounded from float16, as bitsandbytes does on a CPU: kernels/ops.py, linear_llm_int8.
#pragma once
#include "w8a8.cuh"
#include "w8a8_quantize.cuh"

namespace quantool {

template <class Float>
QUANTOOL_DEVICE uint32_t as_fp16(uint32_t pair) {
  return FP16::pair(Float::low(pair), Float::high(pair));
}

constexpr int OUTLIER_THREADS = 256;
constexpr int OUTLIER_CHUNKS = 8;  // of 8 columns, for a block: a line of 128 bytes
constexpr int OUTLIER_SHARED = OUTLIER_THREADS;

// |x| as float16 at least `threshold` in any token
template <class Float>
__global__ void __launch_bounds__(OUTLIER_THREADS)
    llm_int8_outliers(const uint4* __restrict__ x, uint8_t* __restrict__ outliers, float threshold, int tokens,
                      int chunks) {
  constexpr int LINES = OUTLIER_THREADS / OUTLIER_CHUNKS;
  const int line = threadIdx.x / OUTLIER_CHUNKS, chunk = blockIdx.x * OUTLIER_CHUNKS + threadIdx.x % OUTLIER_CHUNKS;
  uint32_t bits = 0;
  if (chunk < chunks)
    for (int token = line; token < tokens; token += LINES) {
      const uint4 values = x[(int64_t)token * chunks + chunk];
      const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t pair = as_fp16<Float>(words[i]);
        bits |= (uint32_t)(fabsf(FP16::low(pair)) >= threshold) << (2 * i);
        bits |= (uint32_t)(fabsf(FP16::high(pair)) >= threshold) << (2 * i + 1);
      }
    }
  uint8_t* of_lines = shared_memory();
  of_lines[threadIdx.x] = (uint8_t)bits;
  __syncthreads();
  if (line || chunk >= chunks) return;
  for (int i = 1; i < LINES; i++) bits |= of_lines[i * OUTLIER_CHUNKS + threadIdx.x];
  outliers[chunk] = (uint8_t)bits;
}

constexpr int FOUND_TOGETHER = 16;  // columns of an mma

// The columns whose bits are set, in order, by one block. The list goes on with -1 up to a whole number of mma.
QUANTOOL_DEVICE void list_columns(const uint8_t* outliers, int32_t* found, int columns) {
  int* of_warps = reinterpret_cast<int*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int count = 0;
  for (int base = 0; base < columns; base += QUANTIZE_THREADS) {
    const int column = base + threadIdx.x;
    const bool outlier = column < columns && (outliers[column / 8] >> (column % 8) & 1);
    const uint32_t votes = __ballot_sync(0xffffffffu, outlier);
    if (lane == 0) of_warps[warp] = __popc(votes);
    __syncthreads();
    int place = count + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < QUANTIZE_WARPS; w++) {
      if (w < warp) place += of_warps[w];
      count += of_warps[w];
    }
    if (outlier) found[place] = column;
    __syncthreads();
  }
  const int rest = (FOUND_TOGETHER - count % FOUND_TOGETHER) % FOUND_TOGETHER;
  if ((int)threadIdx.x < rest) found[count + threadIdx.x] = -1;
  if (threadIdx.x == 0) found[columns] = count;
}

// Codes of what is no outlier; `unit` is the step of an absmax of 1. Without outliers (null) there is no threshold.
// With them the block after the last token lists the columns.
template <class Float>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    llm_int8_quantize(const uint4* __restrict__ x, const uint8_t* __restrict__ outliers, uint2* __restrict__ codes,
                      float* __restrict__ steps, int32_t* __restrict__ found, float threshold, float unit, int tokens,
                      int columns) {
  const int token = blockIdx.x, chunks = columns / 8;
  if (token == tokens) {
    list_columns(outliers, found, columns);
    return;
  }
  x += (int64_t)token * chunks, codes += (int64_t)token * chunks;
  Range range = {0, 0, 0};
  const auto include_small = [&](float v) {
    if (!outliers || !(fabsf(v) >= threshold)) include(range, v);
  };
  for (int c = threadIdx.x; c < chunks; c += QUANTIZE_THREADS) {
    const uint4 values = x[c];
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t pair = as_fp16<Float>(words[i]);
      include_small(FP16::low(pair)), include_small(FP16::high(pair));
    }
  }
  range = join_block(range);
  const float absmax = fmaxf(-range.low, range.high);
  const float inverse = absmax == 0 ? 0 : __fmul_rn(127.f, __fdiv_rn(1.f, absmax));  // what torch makes of 127 / absmax
  if (threadIdx.x == 0) steps[token] = poison_infinity(absmax) * unit + range.poison;
  for (int c = threadIdx.x; c < chunks; c += QUANTIZE_THREADS) {
    uint4 values = x[c];
    values = {as_fp16<Float>(values.x), as_fp16<Float>(values.y), as_fp16<Float>(values.z), as_fp16<Float>(values.w)};
    uint2 out = eight_codes<FP16>(values, [=](float v) { return __fmul_rn(v, inverse); });
    if (outliers) {  // a bit in every byte, times 255
      const uint32_t bits = outliers[c];
      out.x &= ~(((bits & 15) * 0x00204081u & 0x01010101u) * 0xff);
      out.y &= ~(((bits >> 4) * 0x00204081u & 0x01010101u) * 0xff);
    }
    codes[c] = out;
  }
}

constexpr int LLM_THREADS = 128;
constexpr int LLM_ROWS = LLM_THREADS / 2;  // of a block: 16 for each warp

// A warp owns 16 rows and 8 * MJ tokens. The operands of the float part come from memory as they are: the listed
// columns of few weights and tokens. Rows and k go to lanes as in w8a8_gemm.
template <class Float, int MJ>
__global__ void __launch_bounds__(LLM_THREADS)
    llm_int8_finish(const int32_t* __restrict__ products, const uint16_t* __restrict__ x,
                    const int8_t* __restrict__ weight, const int32_t* __restrict__ found, Scaling scaling, int tokens,
                    int rows, int columns, int splits) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = blockIdx.y * LLM_ROWS + threadIdx.x / 32 * 16 + 2 * g, first_token = blockIdx.x * (8 * MJ);
  const bool inside = row < rows;
  weight += (int64_t)row * columns, x += (int64_t)first_token * columns;
  const auto weights = [&](int line, int k0, int k1) {
    const float low = inside && k0 >= 0 ? weight[(int64_t)line * columns + k0] : 0;
    const float high = inside && k1 >= 0 ? weight[(int64_t)line * columns + k1] : 0;
    return Float::pair(low, high);  // exact
  };
  const auto values = [&](int token, int k0, int k1) {
    const bool there = first_token + token < tokens;
    const uint32_t low = there && k0 >= 0 ? x[(int64_t)token * columns + k0] : 0;
    const uint32_t high = there && k1 >= 0 ? x[(int64_t)token * columns + k1] : 0;
    return low | high << 16;
  };

  float sum[MJ][4] = {};
  const int count = found[columns];
  for (int base = 0; base < count; base += FOUND_TOGETHER) {
    const uint4 k = *reinterpret_cast<const uint4*>(found + base + 4 * t);
    const uint32_t a[4] = {weights(0, k.x, k.y), weights(1, k.x, k.y), weights(0, k.z, k.w), weights(1, k.z, k.w)};
#pragma unroll
    for (int j = 0; j < MJ; j++) Float::mma(sum[j], a, values(8 * j + g, k.x, k.y), values(8 * j + g, k.z, k.w));
  }
  if (!inside) return;
  const RowPair pair = load_rows(scaling, row);
#pragma unroll
  for (int j = 0; j < MJ; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = first_token + 8 * j + 2 * t + e;
      if (token >= tokens) continue;
      const int64_t at = (int64_t)token * rows + row;
      int32_t even = 0, odd = 0;
#pragma unroll 1
      for (int s = 0; s < splits; s++) {
        const uint2 part = *reinterpret_cast<const uint2*>(products + (int64_t)s * tokens * rows + at);
        even += (int32_t)part.x, odd += (int32_t)part.y;
      }
      const float step = scaling.steps[token];
      store_rows(scaling, pair, at, step * even + sum[j][e], step * odd + sum[j][2 + e]);
    }
}

}  // namespace quantool
