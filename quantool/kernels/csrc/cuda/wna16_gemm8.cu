// The kernels for many tokens and 8-bit codes.
#include "wna16_gemm.cuh"

template <>
int quantool::gemm<8>(const Wna16& p, int64_t dtype, int64_t scale_dtype, void* stream) {
  return gemm_for_tokens<8>(p, dtype, scale_dtype, stream);
}
