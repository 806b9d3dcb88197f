// Launches a kernel on a device and stream handed over by torch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mosaic {

inline void check_cuda(const char* function, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(function) + ": CUDA says: " + cudaGetErrorString(status) +
                           ". Rebuild with TORCH_CUDA_ARCH_LIST set to this GPU's architecture "
                           "and with a CUDA toolkit that is no newer than the driver.");
}

template <class Kernel, class Argument>
void launch(const char* function, Kernel kernel, unsigned blocks, int threads, int device,
            void* stream, const Argument& argument) {
  // The extension carries its own CUDA runtime, which has its own idea of the current device.
  check_cuda(function, cudaSetDevice(device));
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(argument);
  check_cuda(function, cudaGetLastError());
}

}  // namespace mosaic
