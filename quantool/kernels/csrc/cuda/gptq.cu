// Launchers of gptq.cuh: one block of columns, 128 at most. What the pointers hold is said at GptqBlock; the factor has
// rows of 128 floats, whatever the number of columns, and is 16-byte aligned.
#include "gptq.cuh"

namespace quantool {
namespace {

template <class Loop>
int walk(const GptqBlock& block, void* stream) {
  if (block.columns > GPTQ_COLUMNS) return -1;
  if (block.columns == 0) return 0;
  const dim3 grid((unsigned)((block.rows + GPTQ_ROWS - 1) / GPTQ_ROWS));
  const int shared = block.columns * GPTQ_COLUMNS * (int)sizeof(float);  // of the factor; the results take less
  return launch(gptq_columns<Loop>, grid, GPTQ_THREADS, shared, stream, block);
}

}  // namespace
}  // namespace quantool

extern "C" int quantool_gptq_columns_cuda(const void* weight, const void* factor, const void* scales, const void* zeros,
                                          const void* groups, void* codes, void* errors, int64_t rows,
                                          int64_t columns, int64_t num_groups, int64_t max_code, void* stream) {
  const quantool::GptqBlock block{(const float*)weight, (const float4*)factor,  (const float*)scales,
                                  (const float*)zeros,  nullptr,                (const int32_t*)groups,
                                  (uint8_t*)codes,      (float*)errors,         rows,
                                  (int)columns,         (int)num_groups,        (float)max_code};
  return quantool::walk<quantool::Rounding>(block, stream);
}

// `before` are the codes that move, `after` what they become
extern "C" int quantool_descend_columns_cuda(const void* gradient, const void* hessian, const void* scales,
                                             const void* groups, const void* before, void* after, void* moves,
                                             int64_t rows, int64_t columns, int64_t num_groups, int64_t max_code,
                                             void* stream) {
  const quantool::GptqBlock block{(const float*)gradient, (const float4*)hessian,  (const float*)scales,
                                  nullptr,                (const uint8_t*)before,  (const int32_t*)groups,
                                  (uint8_t*)after,        (float*)moves,           rows,
                                  (int)columns,           (int)num_groups,         (float)max_code};
  return quantool::walk<quantool::Descent>(block, stream);
}
