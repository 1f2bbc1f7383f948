// The encoder of 4-bit levels (nf4, fp4): the largest magnitude of every block of weights, and the level nearest to each
// weight over it. Operation by operation what torch computes in nf4.py; the intrinsics keep the compiler from replacing
// a division.
//
// A level is searched for among the 15 midpoints between the levels in ascending order, by halves. They lie in 15 banks
// of shared memory, as the 16 codes do in 16, so that 32 lanes look up different ones in one cycle.
#pragma once
#include "rtn.cuh"

namespace quantool {

constexpr int ENCODE_THREADS = 256;
constexpr int ENCODE_SHARED = 2 * 16 * 4;
constexpr float LEAST_ABSMAX = 1e-38f;

struct Levels {
  const float* bounds;    // between the levels in ascending order
  const uint32_t* codes;  // of the levels in ascending order

  // A NaN has the code of the lowest level.
  QUANTOOL_DEVICE uint32_t nearest(float v) const {
    int below = 0;
#pragma unroll
    for (int half = 8; half > 0; half /= 2) below += v > bounds[below + half - 1] ? half : 0;
    return codes[below];
  }
};

// Sorts the 16 levels of `table`, equal ones in the order of their codes. All threads of a block.
QUANTOOL_DEVICE Levels write_levels(const float* table) {
  float* bounds = reinterpret_cast<float*>(shared_memory());
  uint32_t* codes = reinterpret_cast<uint32_t*>(bounds + 16);
  const int code = threadIdx.x;
  if (code < 16) {
    int rank = 0;
    for (int other = 0; other < 16; other++)
      rank += table[other] < table[code] || (table[other] == table[code] && other < code);
    codes[rank] = code;
  }
  __syncthreads();
  if (code < 15) bounds[code] = __fmul_rn(__fadd_rn(table[codes[code]], table[codes[code + 1]]), 0.5f);
  __syncthreads();
  return {bounds, codes};
}

template <class T>
QUANTOOL_DEVICE float load_one(const uint4* values, int64_t i) {
  return T::low(reinterpret_cast<const uint16_t*>(values)[i]);
}
template <>
QUANTOOL_DEVICE float load_one<F32>(const uint4* values, int64_t i) {
  return reinterpret_cast<const float*>(values)[i];
}

// Up to 8 weights; what follows them is 0.
template <class T>
QUANTOOL_DEVICE void load_some(const uint4* weight, int64_t first, int64_t count, float (&v)[8]) {
  if (count >= 8) return load_eight<T>(weight, first / 8, v);
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = k < count ? load_one<T>(weight, first + k) : 0;
}

// `lanes` (a power of two, at most 32) threads to a block of weights, each with eight at a time, the eights of a block in
// turn. block_size % 8 == 0.
template <class T>
__global__ void __launch_bounds__(ENCODE_THREADS)
    nf4_encode(const uint4* weight, const float* table, uint8_t* codes, float* absmax, int64_t count,
               int64_t block_size, int lanes) {
  const Levels levels = write_levels(table);
  const int64_t block = ((int64_t)blockIdx.x * ENCODE_THREADS + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes, stride = 8 * lanes;
  const int64_t start = block * block_size, end = min(start + block_size, count), first = start + 8 * lane;
  float v[8], top = 0;
  int64_t at = first;
  for (; at < end; at += stride) {
    load_some<T>(weight, at, end - at, v);
#pragma unroll
    for (int k = 0; k < 8; k++) top = higher(top, fabsf(v[k]));
  }
  for (int step = lanes / 2; step > 0; step /= 2) top = higher(top, __shfl_xor_sync(0xffffffffu, top, step));

  const bool whole = end - start == block_size;
  const float least = higher(LEAST_ABSMAX, top), inverse = __fdiv_rn(1.0f, least);
  if (lane == 0 && start < count) absmax[block] = whole ? top : least;
  for (at -= stride; at >= first; at -= stride) {  // backwards: the last eight are here already, and often the only ones
    uint32_t word[2] = {};
#pragma unroll
    for (int k = 0; k < 8; k++)
      word[k / 4] |= levels.nearest(whole ? __fmul_rn(v[k], inverse) : __fdiv_rn(v[k], least)) << 8 * (k % 4);
    if (at + 8 <= end) {
      *reinterpret_cast<uint2*>(codes + at) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++)
        if (k < end - at) codes[at + k] = (uint8_t)(word[k / 4] >> 8 * (k % 4));
    }
    if (at > first) load_some<T>(weight, at - stride, 8, v);
  }
}

}  // namespace quantool
