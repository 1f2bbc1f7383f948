// Launchers of ggml_legacy.cuh: W float32 [rows, columns], importance float32 [columns] or null,
// blocks uint8 [rows, bytes]. Columns are a multiple of 32; everything is 16-byte aligned. With an importance
// `workspace` is float32 [rows].
#include "ggml_legacy.cuh"

namespace quantool {
namespace {

template <class Type>
int quantize(const void* weight, const void* importance, void* workspace, void* out, int64_t rows, int64_t columns,
             int64_t exact, void* stream) {
  const int64_t blocks = rows * (columns / Block), grid = (blocks + GGML_THREADS - 1) / GGML_THREADS;
  if (columns % Block || grid > INT32_MAX || columns > INT32_MAX) return -1;
  if (importance && Type::HasObjective) {
    if (!workspace) return -1;
    const dim3 warps((unsigned)((rows + MEAN_ROWS - 1) / MEAN_ROWS));
    const int error = launch(mean_squares, warps, 32, MEAN_SHARED, stream, (const uint4*)weight, (float*)workspace,
                             rows, columns);
    if (error) return error;
  }
  return line::with_flags(importance != nullptr, exact != 0, [=](auto weighted, auto exactly) {
    return launch(quantize_legacy<Type, weighted, exactly>, dim3((unsigned)grid), GGML_THREADS, GGML_SHARED, stream,
                  (const uint4*)weight, (const uint4*)importance, (const float*)workspace, (uint8_t*)out, blocks,
                  (uint32_t)(columns / Block));
  });
}

}  // namespace
}  // namespace quantool

#define QUANTOOL_LEGACY(name, Type)                                                                              \
  extern "C" int quantool_quantize_##name##_cuda(const void* weight, const void* importance, void* workspace,    \
                                                 void* blocks, int64_t rows, int64_t columns, int64_t exact,     \
                                                 void* stream) {                                                 \
    return quantool::quantize<Type>(weight, importance, workspace, blocks, rows, columns, exact, stream);        \
  }

QUANTOOL_LEGACY(q4_0, line::SymmetricType<8>)
QUANTOOL_LEGACY(q4_1, line::AffineType<15>)
QUANTOOL_LEGACY(q5_0, line::SymmetricType<16>)
QUANTOOL_LEGACY(q5_1, line::AffineType<31>)
QUANTOOL_LEGACY(q8_0, line::Q8Type)
