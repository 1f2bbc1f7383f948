// Launchers of the LLM.int8() kernels; the int8 product between them is quantool_w8a8_gemm. dtypes as in w8a8.cu.
#include "llm_int8.cuh"

using namespace quantool;

// outliers uint8 [columns / 8]
extern "C" int quantool_llm_int8_outliers(const void* x, void* outliers, int64_t tokens, int64_t columns, int64_t dtype,
                                          double threshold, void* stream) {
  if (columns % 16 || dtype < 0 || dtype > 1) return -1;
  const int64_t chunks = columns / 8;
  return launch(dtype == 0 ? llm_int8_outliers<BF16> : llm_int8_outliers<FP16>,
                dim3((chunks + OUTLIER_CHUNKS - 1) / OUTLIER_CHUNKS), dim3(OUTLIER_THREADS), OUTLIER_SHARED, stream,
                (const uint4*)x, (uint8_t*)outliers, threshold, tokens, chunks);
}

// codes int8 [tokens, columns], steps float32 [tokens], found int32 [columns + 1]; without outliers found is null too.
extern "C" int quantool_llm_int8_quantize(const void* x, const void* outliers, void* codes, void* steps, void* found,
                                          int64_t tokens, int64_t columns, int64_t dtype, double threshold, double unit,
                                          void* stream) {
  if (columns % 16 || dtype < 0 || dtype > 1) return -1;
  return launch(dtype == 0 ? llm_int8_quantize<BF16> : llm_int8_quantize<FP16>, dim3(tokens + (outliers != nullptr)),
                dim3(QUANTIZE_THREADS), RANGE_SHARED, stream, (const uint4*)x, (const uint8_t*)outliers, (uint2*)codes,
                (float*)steps, (int32_t*)found, threshold, unit, tokens, columns);
}

template <class Float, int MJ>
static int finish(const void* products, const void* x, const void* weight, const void* found, const Scaling& scaling,
                  int64_t tokens, int64_t rows, int64_t columns, int64_t splits, void* stream) {
  const dim3 grid((tokens + 8 * MJ - 1) / (8 * MJ), (rows + LLM_ROWS - 1) / LLM_ROWS);
  return launch(llm_int8_finish<Float, MJ>, grid, dim3(LLM_THREADS), 0, stream, (const int32_t*)products,
                (const uint16_t*)x, (const int8_t*)weight, (const int32_t*)found, scaling, tokens, rows, columns,
                splits);
}

// y from products int32 [splits, tokens, rows] and the columns that are found.
extern "C" int quantool_llm_int8_finish(const void* products, const void* x, const void* weight, const void* found,
                                        const void* steps, const void* scales, const void* bias, void* y,
                                        int64_t tokens, int64_t rows, int64_t columns, int64_t splits, int64_t dtype,
                                        int64_t scale_dtype, int64_t bias_dtype, void* stream) {
  if (columns % 16 || rows % 2 || dtype < 0 || dtype > 1) return -1;
  const Scaling scaling = {(const float*)steps, scales, bias, y, (int)dtype, (int)scale_dtype, (int)bias_dtype};
  const bool few = tokens <= 8;
  const auto kernel = dtype == 0 ? few ? finish<BF16, 1> : finish<BF16, 4> : few ? finish<FP16, 1> : finish<FP16, 4>;
  return kernel(products, x, weight, found, scaling, tokens, rows, columns, splits, stream);
}
