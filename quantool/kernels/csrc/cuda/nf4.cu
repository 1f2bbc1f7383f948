// Launchers of the kernels of 4-bit levels. dtype is that of x, weight, bias and y: 0 bf16, 1 fp16.
#include "nf4.cuh"

using namespace quantool;

// weight [count] from codes uint8 [(count + 1) / 2] and absmax float32 [blocks]
extern "C" int quantool_nf4_dequantize(const void* codes, const void* absmax, const void* table, void* weight,
                                       int64_t count, int64_t block_size, int64_t dtype, void* stream) {
  if (block_size % 8 || block_size < 8 || count > (int64_t)1 << 34 || dtype < 0 || dtype > 1) return -1;
  const int64_t threads = (count + 7) / 8;
  return launch(dtype == 0 ? nf4_dequantize<BF16> : nf4_dequantize<FP16>,
                dim3((threads + DEQUANTIZE_THREADS - 1) / DEQUANTIZE_THREADS), dim3(DEQUANTIZE_THREADS),
                DEQUANTIZE_SHARED, stream, (const uint8_t*)codes, (const float*)absmax, (const float*)table,
                (uint16_t*)weight, count, block_size / 8);
}

// block_size is 64, 128, 256, ..
extern "C" int quantool_nf4_gemv(const void* x, const void* codes, const void* absmax, const void* table,
                                 const void* bias, void* y, int64_t tokens, int64_t rows, int64_t columns,
                                 int64_t block_size, int64_t dtype, void* stream) {
  int shift = 0;
  while (((int64_t)GEMV_COLUMNS << shift) < block_size) shift++;
  if (tokens < 1 || tokens > GEMV_TOKENS || rows % 2 || (int64_t)GEMV_COLUMNS << shift != block_size ||
      columns % block_size || dtype < 0 || dtype > 1)
    return -1;
  return launch(dtype == 0 ? nf4_gemv<BF16> : nf4_gemv<FP16>, dim3((rows + GEMV_ROWS - 1) / GEMV_ROWS),
                dim3(32 * GEMV_WARPS), GEMV_SHARED, stream, (const uint4*)x, (const uint2*)codes, (const float*)absmax,
                (const float*)table, (const uint16_t*)bias, (uint32_t*)y, tokens, rows, columns, shift);
}
