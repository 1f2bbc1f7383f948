// Launchers of ggml_iq4.cuh: W float32 [rows, columns], importance float32 [columns] or null -> blocks [rows, bytes].
// Columns are a multiple of 32, of IQ4_XS of 256; everything is 16-byte aligned. The workspace is not used.
#include "ggml_iq4.cuh"

namespace quantool {
namespace {

template <class Choose>
int quantize(Choose choose, const void* weight, const void* importance, void* out, int64_t rows, int64_t columns,
             int64_t exact, int size, void* stream) {
  const int64_t blocks = rows * (columns / Block), grid = (blocks + GGML_THREADS - 1) / GGML_THREADS;
  if (columns % size || grid > INT32_MAX || columns > INT32_MAX) return -1;
  const auto kernel = line::with_flags(importance != nullptr, exact != 0, choose);
  return launch(kernel, dim3((unsigned)grid), GGML_THREADS, GGML_SHARED, stream, (const uint4*)weight,
                (const uint4*)importance, (uint8_t*)out, blocks, (uint32_t)(columns / Block));
}

}  // namespace
}  // namespace quantool

extern "C" int quantool_quantize_iq4_nl_cuda(const void* weight, const void* importance, void*, void* blocks,
                                             int64_t rows, int64_t columns, int64_t exact, void* stream) {
  const auto choose = [](auto weighted, auto exactly) { return &quantool::quantize_iq4_nl<weighted, exactly>; };
  return quantool::quantize(choose, weight, importance, blocks, rows, columns, exact, 32, stream);
}

extern "C" int quantool_quantize_iq4_xs_cuda(const void* weight, const void* importance, void*, void* blocks,
                                             int64_t rows, int64_t columns, int64_t exact, void* stream) {
  const auto choose = [](auto weighted, auto exactly) { return &quantool::quantize_iq4_xs<weighted, exactly>; };
  return quantool::quantize(choose, weight, importance, blocks, rows, columns, exact, 256, stream);
}
