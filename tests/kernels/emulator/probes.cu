// What csrc/cuda/device.cuh offers, one launcher per name, for test_device.py: in the emulator and on a GPU alike.
#include "device.cuh"

namespace quantool {

template <class T>
__global__ void pair_of(const float2* x, uint32_t* y, int64_t count) {
  const int64_t i = blockIdx.x * 32ll + threadIdx.x;
  if (i < count) y[i] = T::pair(x[i].x, x[i].y);
}

template <class T>
__global__ void floats_of(const uint32_t* x, float2* y, int64_t count) {
  const int64_t i = blockIdx.x * 32ll + threadIdx.x;
  if (i < count) y[i] = make_float2(T::low(x[i]), T::high(x[i]));
}

template <class T>
__global__ void fma_of(const uint32_t* x, uint32_t* y, int64_t count) {
  const int64_t i = blockIdx.x * 32ll + threadIdx.x;
  if (i < count) y[i] = T::fma(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
}

// registers of the lanes: a [32, 4], b [32, 2], d [32, 4]
template <class T>
__global__ void mma_of(const uint32_t* a, const uint32_t* b, float* d) {
  const int l = threadIdx.x;
  const uint32_t rows[4] = {a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3]};
  float sums[4] = {d[4 * l], d[4 * l + 1], d[4 * l + 2], d[4 * l + 3]};
  T::mma(sums, rows, b[2 * l], b[2 * l + 1]);
  for (int i = 0; i < 4; i++) d[4 * l + i] = sums[i];
}

__global__ void mma_s8_of(const uint32_t* a, const uint32_t* b, int32_t* d) {
  const int l = threadIdx.x;
  const uint32_t rows[4] = {a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3]};
  int32_t sums[4] = {d[4 * l], d[4 * l + 1], d[4 * l + 2], d[4 * l + 3]};
  mma_s8(sums, rows, b[2 * l], b[2 * l + 1]);
  for (int i = 0; i < 4; i++) d[4 * l + i] = sums[i];
}

// x [32, 3] and y [32, 6]: what lanes exchange, and two functions of three words
__global__ void words_of(const uint32_t* x, uint32_t* y) {
  const int l = threadIdx.x;
  const uint32_t a = x[3 * l], b = x[3 * l + 1], c = x[3 * l + 2];
  y[6 * l] = __shfl_sync(0xffffffffu, a, (int)(b % 32));
  y[6 * l + 1] = __shfl_xor_sync(0xffffffffu, a, 5);
  y[6 * l + 2] = __shfl_down_sync(0xffffffffu, a, 3);
  y[6 * l + 3] = __ballot_sync(0xffffffffu, a & 1);
  y[6 * l + 4] = __byte_perm(a, b, c & 0xffffu);
  y[6 * l + 5] = and_or(a, b, c);
}

// 16 bytes per lane through shared memory, zeros from lane `valid` on
__global__ void copies_of(const uint4* x, uint4* y, int64_t valid) {
  uint4* buffer = reinterpret_cast<uint4*>(shared_memory());
  copy_async(buffer + threadIdx.x, x + threadIdx.x, threadIdx.x < valid);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = buffer[31 - threadIdx.x];
  y[32 + threadIdx.x] = load_streaming(x + threadIdx.x);
}

// x [32, 4] are the rows of four matrices, one per lane: y [32, 4] what each lane gets of each matrix
__global__ void matrices_of(const uint4* x, uint32_t* y) {
  uint4* rows = reinterpret_cast<uint4*>(shared_memory());
  rows[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  uint32_t found[4];
  load_matrices(found, rows + threadIdx.x);
  for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = found[i];
}

}  // namespace quantool

using namespace quantool;

static dim3 blocks(int64_t count) { return dim3((unsigned)((count + 31) / 32)); }

extern "C" int probe_pair(const float2* x, uint32_t* y, int64_t count, int64_t fp16, void* stream) {
  return launch(fp16 ? pair_of<FP16> : pair_of<BF16>, blocks(count), 32, 0, stream, x, y, count);
}
extern "C" int probe_floats(const uint32_t* x, float2* y, int64_t count, int64_t fp16, void* stream) {
  return launch(fp16 ? floats_of<FP16> : floats_of<BF16>, blocks(count), 32, 0, stream, x, y, count);
}
extern "C" int probe_fma(const uint32_t* x, uint32_t* y, int64_t count, int64_t fp16, void* stream) {
  return launch(fp16 ? fma_of<FP16> : fma_of<BF16>, blocks(count), 32, 0, stream, x, y, count);
}
extern "C" int probe_mma(const uint32_t* a, const uint32_t* b, float* d, int64_t fp16, void* stream) {
  return launch(fp16 ? mma_of<FP16> : mma_of<BF16>, 1, 32, 0, stream, a, b, d);
}
extern "C" int probe_mma_s8(const uint32_t* a, const uint32_t* b, int32_t* d, void* stream) {
  return launch(mma_s8_of, 1, 32, 0, stream, a, b, d);
}
extern "C" int probe_words(const uint32_t* x, uint32_t* y, void* stream) {
  return launch(words_of, 1, 32, 0, stream, x, y);
}
extern "C" int probe_copies(const uint4* x, uint4* y, int64_t valid, void* stream) {
  return launch(copies_of, 1, 32, 512, stream, x, y, valid);
}
extern "C" int probe_matrices(const uint4* x, uint32_t* y, void* stream) {
  return launch(matrices_of, 1, 32, 512, stream, x, y);
}
