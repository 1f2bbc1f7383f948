// What kernels/cuda.py asks of the CUDA runtime itself.
#include "device.cuh"

namespace quantool {

__global__ void nothing() {}

}  // namespace quantool

// Whether this library has code for the current device that its driver accepts: 0, or a cudaError_t. Launches nothing,
// so that it may be asked while a CUDA graph is captured.
extern "C" int quantool_cuda_probe() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, quantool::nothing);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch, torch's perhaps, would find it
  return (int)error;
#else
  return 0;
#endif
}

extern "C" const char* quantool_cuda_error_string(int error) {
#if defined(__CUDACC__)
  return cudaGetErrorString((cudaError_t)error);
#else
  return emulator::error();
#endif
}
