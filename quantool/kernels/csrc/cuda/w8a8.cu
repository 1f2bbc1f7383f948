// Launchers of the W8A8 kernels. dtypes: 0 bf16, 1 fp16, 2 float32 (of scales and bias only).
#include "w8a8_gemm.cuh"
#include "w8a8_quantize.cuh"

using namespace quantool;

// codes int8 [tokens, columns] and steps float32 [tokens]; with zeros int32 [tokens] codes has one token more.
extern "C" int quantool_w8a8_quantize(const void* x, void* codes, void* steps, void* zeros, const void* static_step,
                                      const void* static_zero, int64_t tokens, int64_t columns, int64_t dtype,
                                      void* stream) {
  if (columns % 16 || dtype < 0 || dtype > 1) return -1;
  return launch(dtype == 0 ? w8a8_quantize<BF16> : w8a8_quantize<FP16>, dim3(tokens + (zeros != nullptr)),
                dim3(QUANTIZE_THREADS), RANGE_SHARED, stream, (const uint4*)x, (uint2*)codes, (float*)steps,
                (int32_t*)zeros, (const float*)static_step, (const int8_t*)static_zero, tokens, columns);
}

template <class Tile>
static int gemm(const void* codes, const void* weight, void* products, const Scaling& scaling, int64_t tokens,
                int64_t rows, int64_t columns, int64_t splits, void* stream) {
  const dim3 grid((tokens + Tile::TOKENS - 1) / Tile::TOKENS, (rows + Tile::ROWS - 1) / Tile::ROWS, splits);
  return launch(w8a8_gemm<Tile>, grid, dim3(Tile::THREADS), Tile::SHARED, stream, (const int8_t*)codes,
                (const int8_t*)weight, (int32_t*)products, scaling, tokens, rows, columns);
}

// Into products int32 [splits, tokens, rows], or where that is null scaled into y (splits = 1).
//
// Few tokens: reading W is all, so blocks of few rows for every multiprocessor to have one, and 8 warps along K to keep
// the reads coming. More tokens: every block reads all of them, so more rows for each. Many: 4 warps of 64 x 64
// products, which read the least of shared memory for an mma. kernels/int8.py splits K by the rows of a block.
extern "C" int quantool_w8a8_gemm(const void* codes, const void* weight, const void* steps, const void* scales,
                                  const void* bias, void* y, void* products, int64_t tokens, int64_t rows,
                                  int64_t columns, int64_t splits, int64_t dtype, int64_t scale_dtype,
                                  int64_t bias_dtype, void* stream) {
  if (columns % 16 || rows % 2 || splits < 1 || splits > 65535 || (!products && splits > 1)) return -1;
  const Scaling scaling = {(const float*)steps, scales, bias, y, (int)dtype, (int)scale_dtype, (int)bias_dtype};
  const auto tile = tokens <= 16   ? gemm<GemmTile<32, 16, 2, 1, 4>>
                    : tokens <= 32 ? gemm<GemmTile<32, 32, 2, 1, 4>>
                    : tokens <= 64 ? gemm<GemmTile<64, 64, 2, 2, 2>>
                                   : gemm<GemmTile<128, 128, 2, 2, 1>>;
  return tile(codes, weight, products, scaling, tokens, rows, columns, splits, stream);
}

// y from products int32 [splits, tokens, rows]; with zeros int32 [tokens] from [splits, tokens + 1, rows].
extern "C" int quantool_w8a8_finish(const void* products, const void* steps, const void* zeros, const void* scales,
                                    const void* bias, void* y, int64_t tokens, int64_t rows, int64_t splits,
                                    int64_t dtype, int64_t scale_dtype, int64_t bias_dtype, void* stream) {
  if (rows % 2) return -1;
  const Scaling scaling = {(const float*)steps, scales, bias, y, (int)dtype, (int)scale_dtype, (int)bias_dtype};
  const dim3 grid(tokens, (rows / 2 + FINISH_THREADS - 1) / FINISH_THREADS);
  return launch(w8a8_finish, grid, dim3(FINISH_THREADS), 0, stream, (const int32_t*)products, (const int32_t*)zeros,
                scaling, tokens, rows, splits);
}
