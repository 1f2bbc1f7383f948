// The kernels for many tokens and 4-bit codes.
#include "wna16_gemm.cuh"

template <>
int quantool::gemm<4>(const Wna16& p, int64_t dtype, int64_t scale_dtype, void* stream) {
  return gemm_for_tokens<4>(p, dtype, scale_dtype, stream);
}
