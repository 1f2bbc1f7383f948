// Launcher of nf4_encode.cuh. dtype: 0 bfloat16, 1 float16, 2 float32.
#include "nf4_encode.cuh"

namespace quantool {
namespace {

template <class T>
int encode(const void* weight, const void* table, void* codes, void* absmax, int64_t count, int64_t block_size,
           void* stream) {
  int lanes = 1;
  while (lanes < 32 && 16 * lanes <= block_size) lanes *= 2;
  const int64_t threads = (count + block_size - 1) / block_size * lanes;
  const dim3 grid((unsigned)((threads + ENCODE_THREADS - 1) / ENCODE_THREADS));
  return launch(nf4_encode<T>, grid, ENCODE_THREADS, ENCODE_SHARED, stream, (const uint4*)weight, (const float*)table,
                (uint8_t*)codes, (float*)absmax, count, block_size, lanes);
}

}  // namespace
}  // namespace quantool

// codes uint8 [count] and absmax float32 [blocks] from the weight [count] and the levels of the codes, float32 [16]
extern "C" int quantool_nf4_encode(const void* weight, const void* table, void* codes, void* absmax, int64_t count,
                                   int64_t block_size, int64_t dtype, void* stream) {
  if (block_size < 8 || block_size % 8 || count > (int64_t)1 << 38) return -1;
  if (dtype == 0) return quantool::encode<quantool::BF16>(weight, table, codes, absmax, count, block_size, stream);
  if (dtype == 1) return quantool::encode<quantool::FP16>(weight, table, codes, absmax, count, block_size, stream);
  if (dtype == 2) return quantool::encode<quantool::F32>(weight, table, codes, absmax, count, block_size, stream);
  return -1;
}
