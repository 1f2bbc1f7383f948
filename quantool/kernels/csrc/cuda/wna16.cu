// Launchers of y = x W^T with 4- and 8-bit W in tiles (tiles.cuh), and of W itself. -1: no kernel is compiled for this.
#include "wna16_gemm.cuh"
#include "wna16_gemv.cuh"
#include "wna16_simt.cuh"

using namespace quantool;

extern "C" int quantool_wna16_gemm(const void* x, const void* tiles, const void* scales, const void* zeros,
                                   const void* bias, void* y, void* partials, int64_t tokens, int64_t rows,
                                   int64_t columns, int64_t group, int64_t splits, int64_t bits, int64_t dtype,
                                   int64_t scale_dtype, void* stream) {
  if (!fits(tokens, rows, columns, group, splits, partials) || tokens > 128) return -1;
  const Wna16 p = problem(x, tiles, scales, zeros, bias, y, partials, tokens, rows, columns, group, splits);
  if (bits == 4) return gemm<4>(p, dtype, scale_dtype, stream);
  if (bits == 8) return gemm<8>(p, dtype, scale_dtype, stream);
  return -1;
}

extern "C" int quantool_wna16_simt(const void* x, const void* tiles, const void* scales, const void* zeros,
                                   const void* bias, void* y, int64_t tokens, int64_t rows, int64_t columns,
                                   int64_t group, int64_t bits, int64_t dtype, int64_t scale_dtype, void* stream) {
  if (!fits(tokens, rows, columns, group, 1, nullptr) || tokens > INT32_MAX) return -1;
  const Wna16 p = problem(x, tiles, scales, zeros, bias, y, nullptr, tokens, rows, columns, group, 1);
  const dim3 grid((unsigned)((rows / TILE_ROWS + 3) / 4), (unsigned)(tokens < 65535 ? tokens : 65535));
  return for_bits(p, bits, dtype, scale_dtype,
                  [&](auto f) { return launch(wna16_simt<decltype(f)>, grid, dim3(128), 0, stream, p); });
}

extern "C" int quantool_wna16_dequantize(const void* tiles, const void* scales, const void* zeros, void* w,
                                         int64_t rows, int64_t columns, int64_t group, int64_t bits, int64_t dtype,
                                         int64_t scale_dtype, void* stream) {
  if (!fits(1, rows, columns, group, 1, nullptr)) return -1;
  const Wna16 p = problem(nullptr, tiles, scales, zeros, nullptr, nullptr, nullptr, 1, rows, columns, group, 1);
  const int64_t blocks = (rows / TILE_ROWS * (columns / TILE_COLUMNS) + 7) / 8;
  if (blocks >= (int64_t)1 << 29) return -1;
  return for_bits(p, bits, dtype, scale_dtype, [&](auto f) {
    return launch(wna16_dequantize<decltype(f)>, dim3((unsigned)blocks), dim3(256), 0, stream, p, (uint4*)w);
  });
}
