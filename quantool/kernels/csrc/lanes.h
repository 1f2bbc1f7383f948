// One SIMD lane per block: the scalar search of ggml runs in every lane of a vector at once.
//
// A search over the weights of one block is a chain of sums that nothing may reorder if its bytes are to be ggml's. So
// `Lanes` blocks are loaded transposed, and every operation below acts on the same weight of each of them:
//
//     tile[k] = { block 0 [k], block 1 [k], ..., block Lanes-1 [k] }
//
// Each lane then sees the operations of the scalar algorithm, in its order; `if` becomes `select`. GCC's vector types
// compile to AVX-512, AVX2, SSE2 or NEON alike. Compile with -ffp-contract=off: a fused multiply-add rounds once less.
// On CUDA a thread is the lane (lanes_cuda.h): what is written with these names runs on both and gives the same bits.

#pragma once

#if defined(QUANTOOL_DEVICE)  // by cuda/device.cuh
#include "lanes_cuda.h"
#else
#define QUANTOOL_DEVICE inline

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/c/shim.h>  // torch_parallel_for: torch's own threads, in torch 2.10 and later

namespace lanes {

#if defined(__AVX512F__)
constexpr int Lanes = 16;
#elif defined(__AVX2__)
constexpr int Lanes = 8;
#else
constexpr int Lanes = 4;
#endif

typedef float Float __attribute__((vector_size(Lanes * sizeof(float))));
typedef int32_t Int __attribute__((vector_size(Lanes * sizeof(int32_t))));  // also what a comparison gives: 0 or -1

inline Float splat(float value) { return Float{} + value; }
inline Int splat(int32_t value) { return Int{} + value; }

inline Float select(Int mask, Float yes, Float no) { return mask ? yes : no; }
inline Int select(Int mask, Int yes, Int no) { return mask ? yes : no; }

// One instruction where GCC makes two of the comparison; b where either is NaN, as there.
#if defined(__AVX512F__)
inline Float minimum(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
inline Float maximum(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Float minimum(Float a, Float b) { return (Float)_mm256_min_ps((__m256)a, (__m256)b); }
inline Float maximum(Float a, Float b) { return (Float)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline Float minimum(Float a, Float b) { return a < b ? a : b; }
inline Float maximum(Float a, Float b) { return a > b ? a : b; }
#endif
inline Int minimum(Int a, Int b) { return a < b ? a : b; }
inline Int maximum(Int a, Int b) { return a > b ? a : b; }
template <class Vector>
inline Vector clamp(Vector v, Vector low, Vector high) { return minimum(maximum(v, low), high); }

inline Int bits(Float v) { return reinterpret_cast<Int>(v); }
inline Float from_bits(Int v) { return reinterpret_cast<Float>(v); }
inline Float to_float(Int v) { return __builtin_convertvector(v, Float); }
inline Int truncate(Float v) { return __builtin_convertvector(v, Int); }

inline Float absolute(Float v) { return from_bits(bits(v) & 0x7fffffff); }

inline bool any(Int mask) {
  int64_t words[sizeof(Int) / sizeof(int64_t)], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (int64_t word : words) all |= word;
  return all != 0;
}

inline Float sqrt(Float v) {
  for (int lane = 0; lane < Lanes; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
}

// tile[k][lane] = source[lane][k] for k < count.
inline void load_transposed(const float* const* source, int64_t count, Float* tile) {
  constexpr int64_t Line = 16;
  float* out = reinterpret_cast<float*>(tile);
  for (int64_t start = 0; start < count; start += Line)
    for (int lane = 0; lane < Lanes; ++lane)
      for (int64_t k = start; k < std::min(start + Line, count); ++k) out[k * Lanes + lane] = source[lane][k];
}

}  // namespace lanes

#endif

namespace lanes {

constexpr float Magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the last bits

// The nearest integer, ties to even, for |v| < 2^22.
QUANTOOL_DEVICE Float rint(Float v) { return (v + Magic) - Magic; }
// The same as an integer, and beyond 2^22 the bits that ggml's nearest_int would give.
QUANTOOL_DEVICE Int nearest(Float v) { return (bits(v + Magic) & 0x007fffff) - 0x00400000; }

// float16, nearest, ties to even, as its 16 bits; 65520 and above is infinite.
QUANTOOL_DEVICE Int to_half(Float v) {
  const Int sign = (bits(v) >> 16) & 0x8000, magnitude = bits(v) & 0x7fffffff;
  const Int normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Int subnormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;  // the last bit of 0.5f is worth 2^-24
  const Int overflow = select(magnitude > 0x7f800000, splat(0x7e00), splat(0x7c00));
  return sign | select(magnitude >= 0x47800000, overflow, select(magnitude < 0x38800000, subnormal, normal));
}

QUANTOOL_DEVICE Float from_half(Int half) {
  const Int sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  const Int subnormal = bits(to_float(magnitude) * 0x1p-24f);
  const Int normal = (magnitude << 13) + select(magnitude >= 0x7c00, splat(224 << 23), splat(112 << 23));
  return from_bits(sign | select(magnitude < 0x400, subnormal, normal));
}

QUANTOOL_DEVICE Float round_to_half(Float v) { return from_half(to_half(v)); }

// The nearest float16 that is finite; 0 for NaN.
QUANTOOL_DEVICE Float finite_half(Float v) {
  return round_to_half(clamp(select(v == v, v, splat(0.f)), splat(-65504.f), splat(65504.f)));
}

// The first of the x of largest magnitude, with its sign, in each lane.
template <int Count>
QUANTOOL_DEVICE Float signed_max(const Float* x) {
  Float max = splat(0.f), largest = splat(0.f);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const Float magnitude = absolute(x[k]);
    const Int larger = magnitude > largest;
    largest = select(larger, magnitude, largest);
    max = select(larger, x[k], max);
  }
  return max;
}

}  // namespace lanes
