// What kernel bodies are written in: the few instructions that CUDA C++ has no operator for, and the launch.
//
// nvcc compiles this file as it stands. In the tests g++ compiles the same bodies against tests/kernels/emulator/
// emulator.h, which gives every name of the first half a body in plain C++ and runs one fiber per thread. So a body may
// use: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, __ballot_sync,
// the names of this file, and C++. Shared memory is always dynamic (shared_memory()): the emulator poisons it for every
// block and gives it exact bounds. No torch headers, no half or bfloat16 classes: 16-bit floats are their bits.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define QUANTOOL_HD __host__ __device__ __forceinline__
#define QUANTOOL_DEVICE __device__ __forceinline__

namespace quantool {

// (a & b) | c, one LOP3
QUANTOOL_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// 16 bytes that are read once: past L1, where the activations live
QUANTOOL_DEVICE uint4 load_streaming(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// 16 bytes of global memory on their way into shared memory; zeros when not `valid`, and then `global` is not read
QUANTOOL_DEVICE void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  __trap();
#endif
}

// closes the group of copies begun since the last one
QUANTOOL_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// returns when at most `Pending` groups of this thread are under way; the data of others is there after a barrier
template <int Pending>
QUANTOOL_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit values (or 8x16 of bytes) from shared memory: lane l has the address of row l % 8 of matrix
// l / 8, 16 bytes, and gets in r[j] word l % 4 of row l / 4 of matrix j, as the operands of mma want it (PTX, ldmatrix)
QUANTOOL_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

QUANTOOL_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t quantool_shared[];
  return quantool_shared;
}

// Two 16-bit floats in a word, the first in the low half.
struct BF16 {
  static QUANTOOL_DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static QUANTOOL_DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  static QUANTOOL_DEVICE uint32_t pair(float low, float high) {  // round to nearest even
    const __nv_bfloat162 r = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&r);
  }
  static QUANTOOL_DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
#else
    r = pair(fmaf(low(a), low(b), low(c)), fmaf(high(a), high(b), high(c)));
#endif
    return r;
  }
  // D += A B of one warp: A 16x16 by rows, B 16x8 by columns, D float32 (PTX, mma.sync.m16n8k16)
  static QUANTOOL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
  }
};

struct FP16 {
  static QUANTOOL_DEVICE float low(uint32_t pair) { return __half2float(__ushort_as_half((uint16_t)pair)); }
  static QUANTOOL_DEVICE float high(uint32_t pair) { return __half2float(__ushort_as_half((uint16_t)(pair >> 16))); }
  static QUANTOOL_DEVICE uint32_t pair(float low, float high) {
    const __half2 r = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&r);
  }
  static QUANTOOL_DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
  static QUANTOOL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
  }
};

// D += A B in int32: A int8 16x32 by rows, B int8 32x8 by columns (PTX, mma.sync.m16n8k32)
QUANTOOL_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Queue a kernel on a stream. The result is a cudaError_t: 0, or what keeps it from starting.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, void* stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return (int)cudaGetLastError();  // that error, or the next launch would find it
  }
  kernel<<<grid, block, shared_bytes, (cudaStream_t)stream>>>(static_cast<Parameters>(arguments)...);
  return (int)cudaGetLastError();
}

}  // namespace quantool

#else
#include "emulator.h"
#endif
