// Launcher of the kernels for few tokens.
#include "wna16_gemv.cuh"

using namespace quantool;

extern "C" int quantool_wna16_gemv(const void* x, const void* tiles, const void* scales, const void* zeros,
                                   const void* bias, void* y, void* partials, int64_t tokens, int64_t rows,
                                   int64_t columns, int64_t group, int64_t splits, int64_t bits, int64_t dtype,
                                   int64_t scale_dtype, void* stream) {
  if (!fits(tokens, rows, columns, group, splits, partials) || tokens > 8) return -1;
  const Wna16 p = problem(x, tiles, scales, zeros, bias, y, partials, tokens, rows, columns, group, splits);
  if (bits == 8) return for_dtype<8>(p, dtype, scale_dtype, [&](auto f) { return gemv<decltype(f), 1>(p, stream); });
  if (bits != 4) return -1;
  // Two row tiles to a block halve the reads of x, where enough blocks remain. x of one token stays in L1; that of eight
  // is twice the bytes of 16 rows, most of it from L2: then one block to a multiprocessor will do. Not yet measured.
  const bool two = rows % 32 == 0 && rows / 32 * splits >= (tokens > 2 ? 128 : 512);
  return for_dtype<4>(p, dtype, scale_dtype,
                      [&](auto f) { return two ? gemv<decltype(f), 2>(p, stream) : gemv<decltype(f), 1>(p, stream); });
}
