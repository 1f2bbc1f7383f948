// Round to nearest, the two passes over a weight: the range of every group, and the codes on a grid.
//
// Groups follow each other in memory, so that W [N, K] is one array of N K / group of them, and values come eight at a
// time. What is computed is, operation by operation, what torch computes in rtn.py; the intrinsics keep the compiler
// from replacing a division or joining an addition to what is before it.
#pragma once
#include "device.cuh"

namespace quantool {

struct F32;  // beside BF16 and FP16

// values 8 i to 8 i + 7
template <class T>
QUANTOOL_DEVICE void load_eight(const uint4* values, int64_t i, float (&v)[8]) {
  const uint4 w = load_streaming(values + i);
  v[0] = T::low(w.x), v[1] = T::high(w.x), v[2] = T::low(w.y), v[3] = T::high(w.y);
  v[4] = T::low(w.z), v[5] = T::high(w.z), v[6] = T::low(w.w), v[7] = T::high(w.w);
}
template <>
QUANTOOL_DEVICE void load_eight<F32>(const uint4* values, int64_t i, float (&v)[8]) {
  const uint4 a = load_streaming(values + 2 * i), b = load_streaming(values + 2 * i + 1);
  v[0] = __uint_as_float(a.x), v[1] = __uint_as_float(a.y), v[2] = __uint_as_float(a.z), v[3] = __uint_as_float(a.w);
  v[4] = __uint_as_float(b.x), v[5] = __uint_as_float(b.y), v[6] = __uint_as_float(b.z), v[7] = __uint_as_float(b.w);
}

// unlike fminf and fmaxf these keep a NaN, as torch.aminmax does
QUANTOOL_DEVICE float lower(float a, float b) { return b < a || b != b ? b : a; }
QUANTOOL_DEVICE float higher(float a, float b) { return b > a || b != b ? b : a; }

constexpr int RTN_THREADS = 256;

// `lanes` (a power of two, at most 32) threads to a group of `eights` times eight values; zero is in every range.
template <class T>
__global__ void __launch_bounds__(RTN_THREADS)
    group_range(const uint4* weight, float* low, float* high, int64_t groups, int64_t eights, int lanes) {
  const int64_t group = ((int64_t)blockIdx.x * RTN_THREADS + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  float least = 0, most = 0;
  if (group < groups) {
#pragma unroll 4
    for (int64_t i = lane; i < eights; i += lanes) {
      float v[8];
      load_eight<T>(weight, group * eights + i, v);
#pragma unroll
      for (int k = 0; k < 8; k++) least = lower(least, v[k]), most = higher(most, v[k]);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    least = lower(least, __shfl_xor_sync(0xffffffffu, least, step));
    most = higher(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  if (lane == 0 && group < groups) low[group] = least, high[group] = most;
}

// scale i, stored as dtype 0 bfloat16, 1 float16, 2 float32
QUANTOOL_DEVICE float load_scale(const void* scales, uint32_t i, int dtype) {
  if (dtype == 2) return static_cast<const float*>(scales)[i];
  const uint32_t bits = static_cast<const uint16_t*>(scales)[i];
  return dtype == 0 ? BF16::low(bits) : FP16::low(bits);
}

// One thread to eight codes: clamp(round(w / scale) + zero, 0, max_code), and 0 of a NaN. `zeros` may be null.
template <class T>
__global__ void __launch_bounds__(RTN_THREADS)
    quantize_affine(const uint4* weight, const void* scales, const uint8_t* zeros, uint2* codes, uint32_t count,
                    uint32_t eights, int bits, int scale_dtype) {
  const uint32_t i = blockIdx.x * RTN_THREADS + threadIdx.x;
  if (i >= count) return;
  const uint32_t group = i / eights;
  const float scale = load_scale(scales, group, scale_dtype), max_code = (float)((1 << bits) - 1);
  const float zero = (float)(zeros ? zeros[group] : 1 << (bits - 1));
  float v[8];
  load_eight<T>(weight, i, v);
  uint32_t word[2] = {};
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float code = __fadd_rn(rintf(__fdiv_rn(v[k], scale)), zero);
    word[k / 4] |= (uint32_t)fminf(fmaxf(code, 0.0f), max_code) << 8 * (k % 4);
  }
  codes[i] = make_uint2(word[0], word[1]);
}

}  // namespace quantool
